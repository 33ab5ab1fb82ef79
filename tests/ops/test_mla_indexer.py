"""MlaIndexer's body against its reference, cache rows byte for byte where there is no norm."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from op_harness import (
    CODE_STEP,
    Step,
    assert_rows_close,
    behind_a_page_of_nan,
    garbage_pool,
    make_step,
    reference,
    run_op,
)

from mla_trt.formats import INDEX_FORMATS, IndexLayout, decode_e4m3, encode_e4m3

OP = "MlaIndexer"
P = 4
STEPS = {
    "ragged": ([3, 1, 5], [4, 17, 0], 0),
    "page borders": ([1, 1, 1, 2], [P - 2, P - 1, P, 3 * P - 1], 0),
    "padding": ([2, 0, 2], [1, 3, 18], 3),
    "no sequence": ([], [], 0),
    "padding only": ([], [], 2),
    "no new tokens": ([0, 0], [5, 6], 2),
}


def _layout(index_format: str, size: int = 16, ue8m0: bool = False, page_size: int = P) -> IndexLayout:
    return IndexLayout(page_size=page_size, index_format=index_format, index_head_dim=size, scale_ue8m0=ue8m0)


def _attributes(layout: IndexLayout, top_k: int, **more: Any) -> dict[str, Any]:
    return {
        "index_head_dim": layout.index_head_dim,
        "page_size": layout.page_size,
        "index_format": layout.index_format,
        "index_scale_ue8m0": int(layout.scale_ue8m0),
        "top_k": top_k,
        **more,
    }


def _inputs(rng: np.random.Generator, step: Step, layout: IndexLayout, rope: int = 0, heads: int = 3) -> dict[str, Any]:
    size = layout.index_head_dim
    cache = garbage_pool(rng, layout, step.pages)
    for sequence, length in enumerate(step.inputs["cache_lengths"].tolist()):
        page, slot = step.places(sequence, range(length))
        layout.write(cache, page, slot, rng.standard_normal((length, size), np.float32))
    query = rng.standard_normal((step.tokens, heads, size), np.float32)
    weights = rng.standard_normal((step.tokens, heads), np.float32)
    query[step.inputs["token_sequence"] < 0] = weights[step.inputs["token_sequence"] < 0] = np.nan
    return {
        "index_query": query,
        "index_key": rng.standard_normal((step.tokens, size), np.float32),
        "index_weights": weights,
        "index_cos": rng.uniform(-1, 1, (step.tokens, rope // 2)).astype(np.float32),
        "index_sin": rng.uniform(-1, 1, (step.tokens, rope // 2)).astype(np.float32),
        **{name: value for name, value in step.inputs.items() if name != "schedule"},
        "indexer_cache": cache,
    }


def _with_norm(rng: np.random.Generator, inputs: dict[str, Any], size: int) -> dict[str, Any]:
    weight, bias = rng.uniform(0.5, 1.5, size), rng.standard_normal(size)
    return {**inputs, "index_norm_weight": weight.astype(np.float32), "index_norm_bias": bias.astype(np.float32)}


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("index_format", INDEX_FORMATS)
@pytest.mark.parametrize("top_k", [1, 6, 100])
def test_selection_and_rows(index_format: str, top_k: int, case: tuple[list[int], list[int], int]) -> None:
    rng = np.random.default_rng(1)
    new, cached, padding = case
    layout, step = _layout(index_format), make_step(rng, new, cached, page_size=P, padding=padding)
    inputs = _inputs(rng, step, layout, rope=8)
    attributes = _attributes(layout, top_k, index_rope_dim=8)
    found, expected = run_op(OP, inputs, **attributes), reference(OP, inputs, **attributes)
    np.testing.assert_array_equal(found["indexer_cache_out"], expected["indexer_cache_out"])
    np.testing.assert_array_equal(found["indices"], expected["indices"])


@pytest.mark.parametrize("index_format", INDEX_FORMATS)
@pytest.mark.parametrize("size", [16, 20, 128])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("rope", ["none", "part", "all"])
def test_rope(rope: str, interleaved: int, size: int, index_format: str) -> None:
    rng = np.random.default_rng(2)
    layout, step = _layout(index_format, size), make_step(rng, [3, 2], [4, 9], page_size=P)
    rope_dim = {"none": 0, "part": size // 2, "all": size}[rope]
    inputs = _inputs(rng, step, layout, rope_dim)
    inputs["rope_rows"] = np.array([4, 0, 2, 99, -5], np.int32)
    attributes = _attributes(layout, 5, index_rope_dim=rope_dim, index_rope_interleaved=interleaved)
    found, expected = run_op(OP, inputs, **attributes), reference(OP, inputs, **attributes)
    np.testing.assert_array_equal(found["indexer_cache_out"], expected["indexer_cache_out"])
    np.testing.assert_array_equal(found["indices"], expected["indices"])


def _scores(inputs: dict[str, Any], queries: np.ndarray, keys: np.ndarray, token: int) -> np.ndarray:
    products = np.maximum(queries[token].astype(np.float64) @ keys.T.astype(np.float64), 0)
    return inputs["index_weights"][token].astype(np.float64) @ products


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("hadamard", [0, 1])
@pytest.mark.parametrize("index_format", INDEX_FORMATS)
def test_norm_and_hadamard(index_format: str, hadamard: int, ue8m0: bool) -> None:
    rng = np.random.default_rng(3)
    layout = _layout(index_format, 32, ue8m0)
    step = make_step(rng, [6, 9], [14, 0], page_size=P, padding=1)
    inputs = _with_norm(rng, _inputs(rng, step, layout, rope=16), 32)
    attributes = _attributes(layout, 4, index_rope_dim=16, index_hadamard=hadamard, index_norm_epsilon=1e-3)
    found, expected = run_op(OP, inputs, **attributes), reference(OP, inputs, **attributes)
    step_size = CODE_STEP[index_format]
    assert_rows_close(layout, found["indexer_cache_out"], expected["indexer_cache_out"], step.new_places(), step_size)
    # the last bit of a norm may decide a rounding, and that a selection: nearly all lists must be the same
    assert (found["indices"] == expected["indices"]).all(axis=1).mean() >= 0.9


def test_norm_without_bias() -> None:
    rng = np.random.default_rng(4)
    layout, step = _layout("f32"), make_step(rng, [2], [1], page_size=P)
    inputs = _with_norm(rng, _inputs(rng, step, layout), 16)
    del inputs["index_norm_bias"]
    found = run_op(OP, inputs, **_attributes(layout, 3))["indexer_cache_out"]
    key = inputs["index_key"].astype(np.float64)
    key = (key - key.mean(1, keepdims=True)) / key.std(1, keepdims=True) * inputs["index_norm_weight"]
    np.testing.assert_allclose(layout.read(found, *step.places(0, [1, 2])), key, rtol=1e-4, atol=1e-5)


def test_hadamard_keeps_lengths_and_products() -> None:
    rng = np.random.default_rng(5)
    layout, step = _layout("f32", 64), make_step(rng, [3], [0], page_size=P)
    inputs = _inputs(rng, step, layout)
    found = run_op(OP, inputs, **_attributes(layout, 3, index_hadamard=1))["indexer_cache_out"]
    rows = layout.read(found, *step.places(0, range(3)))
    assert np.abs(rows - inputs["index_key"]).max() > 0.5
    np.testing.assert_allclose(rows @ rows.T, inputs["index_key"] @ inputs["index_key"].T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows[:, 0], inputs["index_key"].sum(1) / 8, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ue8m0", [False, True])
def test_fp8_scales(ue8m0: bool) -> None:
    rng = np.random.default_rng(6)
    layout, step = _layout("fp8", 16, ue8m0), make_step(rng, [4], [0], page_size=P)
    inputs = _inputs(rng, step, layout)
    inputs["index_key"][1] = 0
    found = run_op(OP, inputs, **_attributes(layout, 3))["indexer_cache_out"]
    page, _ = step.places(0, [0])
    scales = found[page[0], layout.scales_word : layout.scales_word + 4].view(np.float32)
    exact = np.maximum(np.abs(inputs["index_key"]).max(1) / np.float32(448), np.float32(1e-10))
    if ue8m0:
        assert (np.frexp(scales)[0] == 0.5).all()
        assert (scales >= exact).all()
        assert (scales < 2 * exact).all()
    else:
        np.testing.assert_array_equal(scales, exact)
    codes = found[page[0], : layout.row_words].view(np.uint8)[:16]
    np.testing.assert_array_equal(codes, encode_e4m3(inputs["index_key"][0] / scales[0]))


@pytest.mark.parametrize("index_format", INDEX_FORMATS)
def test_equal_scores_prefer_the_smaller_index(index_format: str) -> None:
    rng = np.random.default_rng(7)
    layout, step = _layout(index_format), make_step(rng, [1], [11], page_size=P)
    inputs = _inputs(rng, step, layout, heads=1)
    key = np.zeros((12, 16), np.float32)
    key[:, 0] = [1, 2, 1, 4, 2, 1, 2, 1, 4, 1, 2, 1]
    layout.write(inputs["indexer_cache"], *step.places(0, range(11)), key[:11])
    inputs["index_key"] = key[11:]
    inputs["index_query"] = np.eye(16, dtype=np.float32)[None, :1]
    inputs["index_weights"] = np.ones((1, 1), np.float32)
    for top_k, expected in ((1, [3]), (3, [1, 3, 8]), (5, [1, 3, 4, 6, 8]), (8, [0, 1, 2, 3, 4, 6, 8, 10])):
        assert run_op(OP, inputs, **_attributes(layout, top_k))["indices"].tolist() == [expected]
    inputs["index_weights"] = -np.ones((1, 1), np.float32)  # negative scores rank by value too
    assert run_op(OP, inputs, **_attributes(layout, 3))["indices"].tolist() == [[0, 2, 5]]
    inputs["index_query"] = -inputs["index_query"]  # relu leaves nothing: all equal
    assert run_op(OP, inputs, **_attributes(layout, 3))["indices"].tolist() == [[0, 1, 2]]


def test_lists_are_causal_and_end_with_minus_one() -> None:
    rng = np.random.default_rng(8)
    layout, step = _layout("fp8"), make_step(rng, [3, 2], [2, 0], page_size=P, padding=1)
    found = run_op(OP, _inputs(rng, step, layout), **_attributes(layout, 7))["indices"]
    visible = [3, 4, 5, 1, 2, 0]
    assert found.tolist() == [[*range(count), *[-1] * (7 - count)] for count in visible]


def test_keys_on_pages_outside_the_pool_are_not_visible() -> None:
    rng = np.random.default_rng(9)
    layout, step = _layout("fp8"), make_step(rng, [1, 1, 2], [9, 3, 5], page_size=P)
    table = step.inputs["block_table"]
    inputs = _inputs(rng, step, layout)
    table[0, 1], table[1, 0], table[2, 1] = -1, step.pages, 2**31 - 1
    attributes = _attributes(layout, 6)
    found, expected = run_op(OP, inputs, **attributes), reference(OP, inputs, **attributes)
    np.testing.assert_array_equal(found["indices"], expected["indices"])
    np.testing.assert_array_equal(found["indexer_cache_out"], expected["indexer_cache_out"])
    assert found["indices"][0].tolist() == [0, 1, 2, 3, 8, 9]
    assert found["indices"][1].tolist() == [-1] * 6


@pytest.mark.parametrize("index_format", INDEX_FORMATS)
def test_a_page_that_stands_in_for_missing_ones_does_not_leak(index_format: str) -> None:
    rng = np.random.default_rng(14)
    layout, step = _layout(index_format), make_step(rng, [1, 3], [9, 4], page_size=P)
    inputs = _inputs(rng, step, layout)
    step.inputs["block_table"][0, 1] = -1
    inputs = behind_a_page_of_nan(inputs, "indexer_cache")
    attributes = _attributes(layout, 6)
    found, expected = run_op(OP, inputs, **attributes), reference(OP, inputs, **attributes)
    np.testing.assert_array_equal(found["indices"], expected["indices"])


def test_queries_are_quantised_as_the_keys_are() -> None:
    rng = np.random.default_rng(10)
    layout, step = _layout("fp8", 128), make_step(rng, [4], [60], page_size=P)
    inputs = _inputs(rng, step, layout, heads=8)
    found = run_op(OP, inputs, **_attributes(layout, 8))
    scales = layout.scale(inputs["index_query"])
    queries = decode_e4m3(encode_e4m3(inputs["index_query"] / scales)) * scales
    keys = layout.read(found["indexer_cache_out"], *step.places(0, range(64)))
    for token in range(4):
        scores = _scores(inputs, queries, keys[: 61 + token], token)
        assert found["indices"][token].tolist() == sorted(np.argsort(-scores, kind="stable")[:8].tolist())


def test_pages_are_copied_first() -> None:
    rng = np.random.default_rng(11)
    layout, step = _layout("fp8"), make_step(rng, [1], [1], page_size=P)
    inputs = _inputs(rng, step, layout)
    source, home = step.free[0], int(step.inputs["block_table"][0, 0])
    inputs["page_copies"] = np.array([[source, home], [home, -4]], np.int32)
    found, expected = run_op(OP, inputs, **_attributes(layout, 2)), reference(OP, inputs, **_attributes(layout, 2))
    np.testing.assert_array_equal(found["indexer_cache_out"], expected["indexer_cache_out"])
    row = slice(0, layout.row_words)
    np.testing.assert_array_equal(found["indexer_cache_out"][home, row], inputs["indexer_cache"][source, row])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_inputs_are_computed_in_f32(dtype: type) -> None:
    rng = np.random.default_rng(12)
    layout, step = _layout("fp8"), make_step(rng, [3, 1], [4, 9], page_size=P)
    inputs = _inputs(rng, step, layout, rope=8)
    for name in ("index_query", "index_key"):
        inputs[name] = inputs[name].astype(dtype)
    attributes = _attributes(layout, 4, index_rope_dim=8)
    found, expected = run_op(OP, inputs, **attributes), reference(OP, inputs, **attributes)
    np.testing.assert_array_equal(found["indexer_cache_out"], expected["indexer_cache_out"])
    np.testing.assert_array_equal(found["indices"], expected["indices"])


def test_empty_pool() -> None:
    rng = np.random.default_rng(13)
    layout, step = _layout("fp8"), make_step(rng, [2], [0], page_size=P)
    inputs = {**_inputs(rng, step, layout), "indexer_cache": layout.empty(0)}
    assert (run_op(OP, inputs, **_attributes(layout, 3))["indices"] == -1).all()
