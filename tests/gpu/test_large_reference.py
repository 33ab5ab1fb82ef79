"""The GPU tests' own reference and comparisons, on the CPU: equal to the op set's references."""

from __future__ import annotations

import numpy as np
import pytest
from cases import decoding_case, key_lists, kv_attributes, layout, step_of
from harness import compare, compare_exactly
from large_reference import append, attention, prefill
from op_harness import assert_close, e4m3_weight, garbage_pool, reference

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("row_format", ["f32", "fp8", "fp8_ds_mla"])
def test_equals_the_op_sets_reference(row_format: str, listed: bool) -> None:
    rng = np.random.default_rng(1)
    step = step_of(rng, [3, 0, 2, 1], [7, 3, 0, 9], page_size=4, padding=2)
    step.inputs["block_table"][0, 1] = -1
    step.inputs["block_table"][3, 0] = step.pages
    inputs, attributes = decoding_case(rng, step, layout(row_format, 40, 8, 4), 3)
    inputs["sinks"] = np.array([0.3, 300, -np.inf], np.float32)
    if listed:
        inputs["indices"] = key_lists(rng, step, 9)
        inputs["index_lengths"] = rng.integers(-1, 12, step.tokens).astype(np.int32)
    op_type = "MlaPrefillSparse" if listed else "MlaDecoding"
    found, expected = attention(inputs, attributes), reference(op_type, inputs, **attributes)
    for name in ("output", "lse"):
        assert_close(found[name], expected[name], 1e-6)


@pytest.mark.parametrize("e4m3", [False, True], ids=["f32 weights", "e4m3 weights"])
@pytest.mark.parametrize("row_format", ["f32", "fp8", "fp8_ds_mla"])
def test_prefill_equals_the_op_sets_reference(row_format: str, e4m3: bool) -> None:
    rng = np.random.default_rng(4)
    step = step_of(rng, [7, 0, 2, 7], [7, 3, 0, 9], page_size=4, padding=2)
    step.inputs["block_table"][0, 1] = -1
    step.inputs["block_table"][2, 0] = step.pages  # there is no key
    step.inputs["block_table"][3, :3] = -7  # the first three tokens see no key
    inputs, attributes = decoding_case(rng, step, layout(row_format, 140, 8, 4), 3)
    inputs["query"] = rng.standard_normal((step.tokens, 3, 24 + 8), np.float32)
    inputs["query"][-2:] = np.nan
    inputs["sinks"] = np.array([0.3, 1000, -np.inf], np.float32)
    for name, shape in (("w_uk", (3, 140, 24)), ("w_uv", (3, 20, 140))):
        if e4m3:
            inputs[name], inputs[f"{name}_scale"] = e4m3_weight(rng, *shape)
        else:
            inputs[name] = rng.standard_normal(shape, np.float32)
    del attributes["query_terms"]
    found, expected = prefill(inputs, attributes), reference("MlaPrefill", inputs, **attributes)
    for name in ("output", "lse"):
        assert_close(found[name], expected[name], 1e-6)


def test_narrow_tables_end_the_sequence() -> None:
    rng = np.random.default_rng(2)
    step = step_of(rng, [2], [9], page_size=4)
    inputs, attributes = decoding_case(rng, step, layout("bf16", 16, 4, 4), 2)
    inputs["block_table"] = inputs["block_table"][:, :1]
    found, expected = attention(inputs, attributes), reference("MlaDecoding", inputs, **attributes)
    assert_close(found["output"], expected["output"], 1e-6)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("rope", [0, 8])
@pytest.mark.parametrize("row_format", ["f32", "fp8", "fp8_ds_mla"])
def test_appends_what_the_op_sets_reference_appends(row_format: str, rope: int, interleaved: int) -> None:
    rng = np.random.default_rng(3)
    pages, step = layout(row_format, 40, rope, 4), step_of(rng, [3, 0, 2, 1], [7, 3, 0, 9], 4, padding=2)
    step.inputs["block_table"][0, 1] = -1
    inputs = {
        "query_rope": rng.standard_normal((step.tokens, 3, rope), np.float32),
        "latent": rng.standard_normal((step.tokens, 40), np.float32),
        "rope_key": rng.standard_normal((step.tokens, rope), np.float32),
        "norm_weight": rng.uniform(0.5, 1.5, 40).astype(np.float32),
        "cos": rng.uniform(-1, 1, (5, rope // 2)).astype(np.float32),
        "sin": rng.uniform(-1, 1, (5, rope // 2)).astype(np.float32),
        "rope_rows": rng.integers(-2, 8, step.tokens).astype(np.int32),
        "kv_cache": garbage_pool(rng, pages, step.pages),
        "page_copies": np.array([[step.free[0], step.free[1]], [-1, 0]], np.int32),
        **step.inputs,
    }
    attributes = {**kv_attributes(pages), "rope_interleaved": interleaved, "epsilon": 0.1}
    found, expected = append(inputs, attributes), reference("MlaFusedRopeRmsNormQuantization", inputs, **attributes)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_comparison_names_the_worst_value() -> None:
    expected = np.array([[1.0, 2.0], [-4.0, -np.inf]])
    found = expected.copy()
    found[0, 1] = 2.5
    with pytest.raises(AssertionError, match=r"output: error 0\.125 > 0\.001 .* at \[0, 1\]: found 2\.5, expected 2;"):
        compare("output", found, expected, 1e-3)
    assert compare("output", found, expected, 0.2).error == 0.125


def test_values_have_units_of_their_own() -> None:
    expected, found = np.array([1.0, 100.0]), np.array([1.5, 90.0])
    assert compare("output", found, expected, 1.0, units=np.array([1.0, 20.0])).index == (0,)
    with pytest.raises(AssertionError, match=r"error 2 > 1 \(of 5\) at \[1\]"):
        compare("output", found, expected, 1.0, units=np.array([1.0, 5.0]))
    with pytest.raises(AssertionError, match=r"at \[0\]"):
        compare("output", found, expected, 1.0, units=np.array([0.0, 20.0]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_unwritten_values_and_wrong_infinities_fail(bad: float) -> None:
    expected = np.array([1.0, -np.inf])
    for at in range(2):
        found = expected.copy()
        found[at] = bad
        with pytest.raises(AssertionError, match=rf"at \[{at}\]"):
            compare("lse", found, expected, 0.5)


def test_exact_comparisons_name_the_first_difference() -> None:
    with pytest.raises(AssertionError, match=r"1 of 3 differ, the first at \[2\]: found 4, expected 3"):
        compare_exactly("positions", np.array([1, 2, 4]), np.array([1, 2, 3]))
