"""MlaAttention, MlaSparseAttention and MlaDecodeBranchFp8: absorbed bodies against references that are not absorbed."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from op_harness import (
    CODE_STEP,
    Step,
    assert_close,
    assert_rows_close,
    e4m3_weight,
    garbage_pool,
    latent_pool,
    make_step,
    reference,
    run_op,
)

from mla_trt.formats import ROW_FORMATS, IndexLayout, KvLayout

P = 4
STEPS = {
    "ragged": ([3, 1, 5], [4, 7, 0], 0),
    "page borders": ([1, 1, 1, 2], [P - 2, P - 1, P, P - 1], 0),
    "padding": ([2, 0, 2], [1, 3, 8], 3),
    "no sequence": ([], [], 0),
    "padding only": ([], [], 2),
    "no new tokens": ([0, 0], [5, 6], 2),
}
# H, Dn, Dr, Dv, R
SMALL = (4, 24, 16, 20, 32)
DIMENSIONS = {
    "small": SMALL,
    "one head": (1, 8, 2, 5, 37),
    "no rope": (2, 16, 0, 16, 24),
    "deepseek": (2, 128, 64, 128, 512),
    "glm": (2, 192, 64, 256, 512),
}


def _layout(attributes: dict[str, Any]) -> KvLayout:
    names = ("page_size", "row_format", "kv_lora_rank", "qk_rope_head_dim", "kv_scale")
    return KvLayout(**{name: attributes[name] for name in names})


def _case(
    rng: np.random.Generator,
    step: Step,
    row_format: str = "fp8",
    dimensions: tuple[int, int, int, int, int] = SMALL,
    norm: bool = False,
    weights: str = "f32",
) -> tuple[dict[str, Any], dict[str, Any]]:
    heads, nope, rope, value, rank = dimensions
    attributes = {
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rope,
        "page_size": step.page_size,
        "row_format": row_format,
        "kv_scale": 0.01,
        "num_heads": heads,
        "qk_nope_head_dim": nope,
        "v_head_dim": value,
        "softmax_scale": (nope + rope) ** -0.5,
    }
    tokens = step.tokens
    inputs: dict[str, Any] = {
        "query": rng.standard_normal((tokens, heads, nope + rope), np.float32),
        "latent": rng.standard_normal((tokens, rank), np.float32),
        "rope_key": rng.standard_normal((tokens, rope), np.float32),
        "cos": rng.uniform(-1, 1, (tokens, rope // 2)).astype(np.float32),
        "sin": rng.uniform(-1, 1, (tokens, rope // 2)).astype(np.float32),
        **step.inputs,
        "kv_cache": latent_pool(rng, _layout(attributes), step, with_new=False),
    }
    padding = step.inputs["token_sequence"] < 0
    for name in ("query", "latent", "rope_key"):
        inputs[name][padding] = np.nan
    if norm:
        inputs["norm_weight"] = rng.uniform(0.5, 1.5, rank).astype(np.float32)
    if weights == "e4m3":
        inputs["w_uk"], inputs["w_uk_scale"] = e4m3_weight(rng, heads, rank, nope)
        inputs["w_uv"], inputs["w_uv_scale"] = e4m3_weight(rng, heads, value, rank)
    elif weights != "none":
        dtype = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[weights]
        inputs["w_uk"] = (rng.standard_normal((heads, rank, nope)) / rank**0.5).astype(dtype)
        inputs["w_uv"] = (rng.standard_normal((heads, value, rank)) / rank**0.5).astype(dtype)
    return inputs, attributes


def _compare(inputs: dict[str, Any], attributes: dict[str, Any], op: str = "MlaAttention") -> dict[str, Any]:
    """Output within 1e-5, cache byte for byte: for inputs without a norm."""
    found, expected = run_op(op, inputs, **attributes), reference(op, inputs, **attributes)
    np.testing.assert_array_equal(found["kv_cache_out"], expected["kv_cache_out"])
    assert_close(found["output"], expected["output"])
    return found


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_steps(row_format: str, case: tuple[list[int], list[int], int]) -> None:
    rng = np.random.default_rng(1)
    new, cached, padding = case
    step = make_step(rng, new, cached, page_size=P, padding=padding)
    found = _compare(*_case(rng, step, row_format))
    assert (found["output"][step.inputs["token_sequence"] < 0] == 0).all()


@pytest.mark.parametrize("dimensions", DIMENSIONS.values(), ids=DIMENSIONS.keys())
@pytest.mark.parametrize("weights", ["f32", "f16", "bf16", "e4m3"])
def test_weights(weights: str, dimensions: tuple[int, int, int, int, int]) -> None:
    rng = np.random.default_rng(2)
    step = make_step(rng, [3, 1], [4, 2], page_size=P)
    _compare(*_case(rng, step, "fp8", dimensions, weights=weights))


def test_absorbed_export_has_no_weights() -> None:
    rng = np.random.default_rng(3)
    step = make_step(rng, [3, 1], [4, 2], page_size=P, padding=1)
    _compare(*_case(rng, step, "fp8", (4, 32, 16, 32, 32), weights="none"))


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_norm(row_format: str) -> None:
    rng = np.random.default_rng(4)
    step = make_step(rng, [3, 1], [4, 2], page_size=P)
    inputs, attributes = _case(rng, step, row_format, norm=True)
    attributes["epsilon"] = 0.1
    found, expected = run_op("MlaAttention", inputs, **attributes), reference("MlaAttention", inputs, **attributes)
    layout, pools = _layout(attributes), (found["kv_cache_out"], expected["kv_cache_out"])
    assert_rows_close(layout, *pools, step.new_places(), CODE_STEP[row_format])
    same_rows = np.array_equal(*pools) or row_format in (
        "f32",
        "fp8",
    )  # these differ in the last bit of a scale or value
    assert_close(found["output"], expected["output"], 1e-5 if same_rows else CODE_STEP[row_format])


@pytest.mark.parametrize("interleaved", [0, 1])
def test_sinks_rope_rows_and_page_copies(interleaved: int) -> None:
    rng = np.random.default_rng(5)
    step = make_step(rng, [3, 0, 2], [4, 2, 0], page_size=P, padding=1)
    inputs, attributes = _case(rng, step)
    attributes["rope_interleaved"] = interleaved
    inputs["sinks"] = np.array([0.5, -3, 100, -np.inf], np.float32)
    inputs["cos"], inputs["sin"] = (rng.uniform(-1, 1, (9, 8)).astype(np.float32) for _ in range(2))
    inputs["rope_rows"] = rng.integers(0, 9, step.tokens).astype(np.int32)
    # a fork: the first page of sequence 0 was shared, and is now copied to a page of its own
    home, source = int(step.inputs["block_table"][0, 0]), step.free[0]
    inputs["kv_cache"][[home, source]] = inputs["kv_cache"][[source, home]]
    inputs["page_copies"] = np.array([[source, home], [-1, 0]], np.int32)
    _compare(inputs, attributes)


def test_key_pages_outside_the_pool_are_masked() -> None:
    rng = np.random.default_rng(6)
    step = make_step(rng, [2, 1], [9, 3], page_size=P)
    step.inputs["block_table"][0, 1] = -1
    step.inputs["block_table"][1, 0] = step.pages
    found = _compare(*_case(rng, step))
    assert (found["output"][2] == 0).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_model(dtype: type) -> None:
    rng = np.random.default_rng(7)
    step = make_step(rng, [3, 1], [4, 2], page_size=P)
    inputs, attributes = _case(rng, step)
    for name in ("query", "latent", "rope_key", "w_uk", "w_uv"):
        inputs[name] = inputs[name].astype(dtype)
    found, expected = run_op("MlaAttention", inputs, **attributes), reference("MlaAttention", inputs, **attributes)
    np.testing.assert_array_equal(found["kv_cache_out"], expected["kv_cache_out"])
    assert_close(found["output"], expected["output"], 1e-3 if dtype is np.float16 else 8e-3)


def test_sequences_do_not_see_each_other() -> None:
    rng = np.random.default_rng(8)
    step = make_step(rng, [2, 3], [5, 4], page_size=P)
    inputs, attributes = _case(rng, step)
    found = run_op("MlaAttention", inputs, **attributes)
    changed = {**inputs, **{name: inputs[name].copy() for name in ("query", "latent", "rope_key")}}
    for name in ("query", "latent", "rope_key"):
        changed[name][2:] += 1
    again = run_op("MlaAttention", changed, **attributes)
    np.testing.assert_allclose(again["output"][:2], found["output"][:2], rtol=1e-6, atol=1e-7)
    assert np.abs(again["output"][2:] - found["output"][2:]).max() > 1e-2


@pytest.mark.parametrize("row_format", ["f32", "fp8"])
def test_token_by_token_equals_all_at_once(row_format: str) -> None:
    rng = np.random.default_rng(17)
    whole = make_step(rng, [9], [0], page_size=P)
    inputs, attributes = _case(rng, whole, row_format)
    at_once = run_op("MlaAttention", inputs, **attributes)
    cache, outputs = inputs["kv_cache"], []
    for token in range(9):
        row = slice(token, token + 1)
        step = {
            **inputs,
            **{name: inputs[name][row] for name in ("query", "latent", "rope_key", "cos", "sin", "token_sequence")},
            "query_offsets": np.array([0, 1], np.int32),
            "cache_lengths": np.array([token], np.int32),
            "positions": np.array([token], np.int32),
            "kv_cache": cache,
        }
        found = run_op("MlaAttention", step, **attributes)
        cache = found["kv_cache_out"]
        outputs.append(found["output"])
    assert_close(np.concatenate(outputs), at_once["output"])
    np.testing.assert_array_equal(cache, at_once["kv_cache_out"])


def _sparse(
    rng: np.random.Generator, step: Step, index_format: str, top_k: int, row_format: str = "fp8"
) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs, attributes = _case(rng, step, row_format)
    attributes |= {"index_head_dim": 16, "index_rope_dim": 8, "index_format": index_format, "top_k": top_k}
    layout = IndexLayout(page_size=P, index_format=index_format, index_head_dim=16)
    cache = garbage_pool(rng, layout, step.pages)
    for sequence, length in enumerate(step.inputs["cache_lengths"].tolist()):
        page, slot = step.places(sequence, range(length))
        layout.write(cache, page, slot, rng.standard_normal((length, 16), np.float32))
    inputs |= {
        "index_query": rng.standard_normal((step.tokens, 3, 16), np.float32),
        "index_key": rng.standard_normal((step.tokens, 16), np.float32),
        "index_weights": rng.standard_normal((step.tokens, 3), np.float32),
        "index_cos": rng.uniform(-1, 1, (step.tokens, 4)).astype(np.float32),
        "index_sin": rng.uniform(-1, 1, (step.tokens, 4)).astype(np.float32),
        "indexer_cache": cache,
    }
    return inputs, attributes


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("index_format", ["f32", "fp8"])
@pytest.mark.parametrize("row_format", ["f32", "fp8", "fp8_ds_mla"])
def test_sparse_with_an_indexer(row_format: str, index_format: str, case: tuple[list[int], list[int], int]) -> None:
    rng = np.random.default_rng(9)
    new, cached, padding = case
    step = make_step(rng, new, cached, page_size=P, padding=padding)
    inputs, attributes = _sparse(rng, step, index_format, 3, row_format)
    found = _compare(inputs, attributes, "MlaSparseAttention")
    expected = reference("MlaSparseAttention", inputs, **attributes)
    for name in ("indices", "indexer_cache_out"):
        np.testing.assert_array_equal(found[name], expected[name], name)


def test_sparse_with_the_selection_of_another_layer() -> None:
    rng = np.random.default_rng(10)
    step = make_step(rng, [3, 1, 2], [4, 9, 0], page_size=P, padding=1)
    inputs, attributes = _case(rng, step)
    attributes |= {"index_head_dim": 0, "top_k": 5}
    inputs["indices"] = rng.integers(-1, 12, (step.tokens, 5)).astype(np.int32)
    outputs = ["output", "kv_cache_out", "indices"]
    found = run_op("MlaSparseAttention", inputs, outputs, **attributes)
    expected = reference("MlaSparseAttention", inputs, **attributes)
    assert_close(found["output"], expected["output"])
    np.testing.assert_array_equal(found["kv_cache_out"], expected["kv_cache_out"])
    np.testing.assert_array_equal(found["indices"], inputs["indices"])
    short = run_op("MlaSparseAttention", inputs, outputs[:2], **attributes)
    np.testing.assert_array_equal(short["output"], found["output"])


def test_sparse_with_all_keys_selected_is_dense() -> None:
    rng = np.random.default_rng(11)
    step = make_step(rng, [3, 1], [4, 9], page_size=P, padding=1)
    inputs, attributes = _sparse(rng, step, "fp8", 64)
    found = run_op("MlaSparseAttention", inputs, **attributes)
    dense = {name: value for name, value in inputs.items() if not name.startswith("index")}
    dense_attributes = {name: value for name, value in attributes.items() if not name.startswith(("index", "top_k"))}
    expected = run_op("MlaAttention", dense, **dense_attributes)
    assert_close(found["output"], expected["output"], 1e-6)
    np.testing.assert_array_equal(found["kv_cache_out"], expected["kv_cache_out"])


def test_sparse_16_bit_model() -> None:
    rng = np.random.default_rng(12)
    step = make_step(rng, [3, 1], [4, 9], page_size=P)
    inputs, attributes = _sparse(rng, step, "fp8", 3)
    for name in ("query", "latent", "rope_key", "index_query", "index_key"):
        inputs[name] = inputs[name].astype(np.float16)
    found, expected = (call("MlaSparseAttention", inputs, **attributes) for call in (run_op, reference))
    assert found["output"].dtype == np.float16
    assert_close(found["output"], expected["output"], 1e-3)
    np.testing.assert_array_equal(found["indices"], expected["indices"])


def _branch(
    rng: np.random.Generator, step: Step, dimensions: tuple[int, int, int, int, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs, attributes = _case(rng, step, "fp8", dimensions, weights="e4m3")
    for name in ("num_heads", "qk_nope_head_dim", "v_head_dim"):
        del attributes[name]
    inputs["query"][..., :3] *= 5000  # some groups are above the bound of 1200 and saturate
    inputs["query"][:1, :1] = 0  # and one has the scale 0
    return inputs, attributes


def _compare_branch(inputs: dict[str, Any], attributes: dict[str, Any]) -> None:
    """Nearly all outputs agree at f32 level, and none is off by more than one e4m3 code of one value can move it.

    The output of attention is quantised before W_UV, and its last bit may decide a rounding.
    """
    found, expected = (call("MlaDecodeBranchFp8", inputs, **attributes) for call in (run_op, reference))
    np.testing.assert_array_equal(found["kv_cache_out"], expected["kv_cache_out"])
    scale = np.abs(expected["output"]).max(initial=1e-30)
    errors = np.abs(found["output"] - expected["output"]).reshape(-1) / scale
    assert (errors > 2e-5).mean() <= 0.1 if len(errors) else True
    assert errors.max(initial=0.0) <= 2**-4


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
def test_decode_branch_steps(case: tuple[list[int], list[int], int]) -> None:
    rng = np.random.default_rng(13)
    new, cached, padding = case
    _compare_branch(*_branch(rng, make_step(rng, new, cached, page_size=P, padding=padding), SMALL))


@pytest.mark.parametrize("dimensions", DIMENSIONS.values(), ids=DIMENSIONS.keys())
def test_decode_branch_dimensions(dimensions: tuple[int, int, int, int, int]) -> None:
    rng = np.random.default_rng(14)
    _compare_branch(*_branch(rng, make_step(rng, [1, 2], [6, 3], page_size=P), dimensions))


def test_decode_branch_over_lists_with_sinks() -> None:
    rng = np.random.default_rng(15)
    step = make_step(rng, [1, 2], [6, 3], page_size=P)
    inputs, attributes = _branch(rng, step, SMALL)
    inputs["indices"] = np.array([[0, 4, -1], [2, 3, 9], [-1, -1, -1]], np.int32)
    inputs["sinks"] = np.array([0.5, -3, 1, -np.inf], np.float32)
    inputs["norm_weight"] = np.ones(32, np.float32)
    found, expected = (call("MlaDecodeBranchFp8", inputs, **attributes) for call in (run_op, reference))
    assert (found["output"][2] == 0).all()
    assert_close(found["output"], expected["output"], 2**-4)


def test_decode_branch_is_near_attention_without_quantisation() -> None:
    rng = np.random.default_rng(16)
    step = make_step(rng, [1, 2], [6, 3], page_size=P)
    inputs, attributes = _case(rng, step, "fp8", DIMENSIONS["deepseek"], weights="e4m3")
    exact = run_op("MlaAttention", inputs, **attributes)
    for name in ("num_heads", "qk_nope_head_dim", "v_head_dim"):
        del attributes[name]
    found = run_op("MlaDecodeBranchFp8", inputs, **attributes)
    np.testing.assert_array_equal(found["kv_cache_out"], exact["kv_cache_out"])
    assert_close(found["output"], exact["output"], 0.1)
    assert np.abs(found["output"] - exact["output"]).max() > 1e-4 * np.abs(exact["output"]).max()
