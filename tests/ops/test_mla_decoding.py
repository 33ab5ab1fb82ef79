"""MlaDecoding and MlaPrefillSparse: bodies against the references."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from op_harness import Step, assert_close, behind_a_page_of_nan, latent_pool, make_step, reference, run_op

from mla_trt.formats import ROW_FORMATS, KvLayout

P = 4
STEPS = {
    "ragged": ([3, 1, 5], [4, 7, 0], 0),
    "page borders": ([1, 1, 1, 1, 2], [P - 2, P - 1, P, 2 * P - 1, P - 1], 0),
    "padding": ([2, 0, 2], [1, 3, 8], 3),
    "empty sequences": ([0, 0, 1, 0], [5, 0, 0, 2], 0),
    "no sequence": ([], [], 0),
    "padding only": ([], [], 2),
    "no new tokens": ([0, 0], [5, 6], 2),
}
DIMENSIONS = {"small": (32, 16, 4), "odd": (37, 6, 1), "no rope": (24, 0, 3), "deepseek": (512, 64, 2)}


def _layout(row_format: str = "f32", rank: int = 32, rope: int = 16, page_size: int = P) -> KvLayout:
    return KvLayout(
        page_size=page_size, row_format=row_format, kv_lora_rank=rank, qk_rope_head_dim=rope, kv_scale=0.0123
    )


def _attributes(layout: KvLayout, scale: float = 0.2) -> dict[str, Any]:
    return {
        "kv_lora_rank": layout.kv_lora_rank,
        "qk_rope_head_dim": layout.qk_rope_head_dim,
        "page_size": layout.page_size,
        "row_format": layout.row_format,
        "kv_scale": layout.kv_scale,
        "softmax_scale": scale,
    }


def _inputs(rng: np.random.Generator, step: Step, layout: KvLayout, heads: int = 4) -> dict[str, Any]:
    query = rng.standard_normal((step.tokens, heads, layout.width), np.float32)
    query[step.inputs["token_sequence"] < 0] = np.nan  # padding may hold anything
    return {"query": query, **step.inputs, "kv_cache": latent_pool(rng, layout, step, with_new=True)}


def _lists(rng: np.random.Generator, step: Step, width: int) -> np.ndarray:
    """Lists with keys of the sequence, later ones, -1 and other nonsense, duplicates; some tokens have nothing."""
    indices = rng.integers(-2, 14, (step.tokens, width)).astype(np.int32)
    indices[:, 1::5] = -1
    indices[:, 3::7] = [2**31 - 1] if width > 3 else []
    indices[: step.tokens // 4 : 3] = -1
    return indices


def _compare(op_type: str, inputs: dict[str, Any], attributes: dict[str, Any], tolerance: float = 1e-5) -> None:
    found, expected = run_op(op_type, inputs, **attributes), reference(op_type, inputs, **attributes)
    assert_close(found["output"], expected["output"], tolerance)
    assert_close(found["lse"], expected["lse"], tolerance)


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_dense(row_format: str, case: tuple[list[int], list[int], int]) -> None:
    rng = np.random.default_rng(1)
    new, cached, padding = case
    layout, step = _layout(row_format), make_step(rng, new, cached, page_size=P, padding=padding)
    _compare("MlaDecoding", _inputs(rng, step, layout), _attributes(layout))


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_listed(row_format: str, case: tuple[list[int], list[int], int]) -> None:
    rng = np.random.default_rng(2)
    new, cached, padding = case
    layout, step = _layout(row_format), make_step(rng, new, cached, page_size=P, padding=padding)
    inputs = {**_inputs(rng, step, layout), "indices": _lists(rng, step, 11)}
    _compare("MlaDecoding", inputs, _attributes(layout))


@pytest.mark.parametrize("dimensions", DIMENSIONS.values(), ids=DIMENSIONS.keys())
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_dimensions(row_format: str, dimensions: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(3)
    rank, rope, heads = dimensions
    layout, step = _layout(row_format, rank, rope), make_step(rng, [2, 1], [5, 9], page_size=P)
    inputs = _inputs(rng, step, layout, heads)
    _compare("MlaDecoding", inputs, _attributes(layout, (rank + rope) ** -0.5))
    inputs["indices"] = _lists(rng, step, 9)
    _compare("MlaDecoding", inputs, _attributes(layout, (rank + rope) ** -0.5))


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_any_page_size(page_size: int) -> None:
    rng = np.random.default_rng(4)
    layout = _layout("fp8", page_size=page_size)
    step = make_step(rng, [2, 1, 1], [page_size - 1, 2 * page_size, 0], page_size=page_size)
    _compare("MlaDecoding", _inputs(rng, step, layout), _attributes(layout))


@pytest.mark.parametrize("listed", [False, True])
def test_sinks(listed: bool) -> None:
    rng = np.random.default_rng(5)
    layout, step = _layout("bf16"), make_step(rng, [2, 0, 3], [5, 1, 0], page_size=P, padding=1)
    inputs = {**_inputs(rng, step, layout, 5), "sinks": np.array([0.5, -40, 3, 200, -np.inf], np.float32)}
    if listed:
        inputs["indices"] = _lists(rng, step, 6)
    _compare("MlaDecoding", inputs, _attributes(layout))
    found = run_op("MlaDecoding", inputs, **_attributes(layout))
    without = {name: value for name, value in inputs.items() if name != "sinks"}
    plain = run_op("MlaDecoding", without, **_attributes(layout))
    np.testing.assert_allclose(found["lse"], plain["lse"], rtol=1e-6)  # the sink is not in it
    share = 1 / (1 + np.exp(inputs["sinks"][0] - plain["lse"][:, 0]))
    assert_close(found["output"][:, 0], plain["output"][:, 0] * share[:, None])
    assert (found["output"][:, 3] == 0).all()


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("row_format", ["f32", "fp8"])
def test_keys_on_pages_outside_the_pool_are_masked(row_format: str, listed: bool) -> None:
    rng = np.random.default_rng(6)
    layout, step = _layout(row_format), make_step(rng, [2, 1, 1], [9, 6, 3], page_size=P)
    table = step.inputs["block_table"]
    table[0, 1], table[1, 0], table[2, 0] = -1, step.pages, -(2**31)
    inputs = _inputs(rng, step, layout)
    if listed:
        inputs["indices"] = np.tile(np.arange(12, dtype=np.int32), (step.tokens, 1))
    _compare("MlaDecoding", inputs, _attributes(layout))
    found = run_op("MlaDecoding", inputs, **_attributes(layout))
    assert (found["output"][3] == 0).all()  # the last sequence has no page left
    assert np.isneginf(found["lse"][3]).all()


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_a_page_that_stands_in_for_missing_ones_does_not_leak(row_format: str, listed: bool) -> None:
    rng = np.random.default_rng(15)
    layout, step = _layout(row_format), make_step(rng, [2, 1, 1], [9, 6, 3], page_size=P)
    step.inputs["block_table"][0, 1] = -1
    inputs = behind_a_page_of_nan(_inputs(rng, step, layout), "kv_cache")
    if listed:
        inputs["indices"] = _lists(rng, step, 9)
    _compare("MlaDecoding", inputs, _attributes(layout))


@pytest.mark.parametrize("listed", [False, True])
def test_block_table_narrower_than_the_sequence(listed: bool) -> None:
    rng = np.random.default_rng(7)
    layout, step = _layout("fp8"), make_step(rng, [2, 1], [9, 5], page_size=P)
    inputs = _inputs(rng, step, layout)
    if listed:
        inputs["indices"] = np.tile(np.arange(12, dtype=np.int32), (step.tokens, 1))
    for width in (2, 0):
        inputs["block_table"] = step.inputs["block_table"][:, :width]
        _compare("MlaDecoding", inputs, _attributes(layout))


@pytest.mark.parametrize("listed", [False, True])
def test_empty_pool(listed: bool) -> None:
    rng = np.random.default_rng(8)
    layout, step = _layout("fp8"), make_step(rng, [2], [1], page_size=P)
    inputs = {**_inputs(rng, step, layout), "kv_cache": layout.empty(0)}
    if listed:
        inputs["indices"] = np.zeros((step.tokens, 3), np.int32)
    found = run_op("MlaDecoding", inputs, **_attributes(layout))
    assert (found["output"] == 0).all()
    assert np.isneginf(found["lse"]).all()


def test_a_key_listed_twice_counts_twice() -> None:
    rng = np.random.default_rng(9)
    layout, step = _layout(), make_step(rng, [1], [3], page_size=P)
    inputs = {**_inputs(rng, step, layout), "indices": np.array([[2, -1, 2, 0]], np.int32)}
    found = run_op("MlaDecoding", inputs, **_attributes(layout))
    latent, rope = layout.read(inputs["kv_cache"], *step.places(0, [2, 2, 0]))
    scores = 0.2 * inputs["query"][0].astype(np.float64) @ np.concatenate([latent, rope], axis=1).T
    weights = np.exp(scores)
    assert_close(found["output"][0], weights @ latent / weights.sum(1, keepdims=True))
    assert_close(found["lse"][0], np.log(weights.sum(1)))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_queries(dtype: type, listed: bool) -> None:
    rng = np.random.default_rng(10)
    layout, step = _layout("fp8"), make_step(rng, [2, 1], [5, 0], page_size=P, padding=1)
    inputs = _inputs(rng, step, layout)
    inputs["query"] = inputs["query"].astype(dtype)
    if listed:
        inputs["indices"] = _lists(rng, step, 6)
    found, expected = (
        run_op("MlaDecoding", inputs, **_attributes(layout)),
        reference("MlaDecoding", inputs, **_attributes(layout)),
    )
    assert found["output"].dtype == (np.float16 if dtype is np.float16 else np.float32)
    assert_close(found["output"], expected["output"], 1e-3 if dtype is np.float16 else 8e-3)
    assert_close(found["lse"], expected["lse"])


def test_lse_may_be_left_out() -> None:
    rng = np.random.default_rng(11)
    layout, step = _layout("f32"), make_step(rng, [2], [3], page_size=P)
    inputs = _inputs(rng, step, layout)
    found = run_op("MlaDecoding", inputs, ["output"], **_attributes(layout))
    assert_close(found["output"], reference("MlaDecoding", inputs, **_attributes(layout))["output"])


def test_many_keys_and_large_scores_stay_exact() -> None:
    rng = np.random.default_rng(12)
    layout, step = _layout("f32", page_size=64), make_step(rng, [1, 2], [700, 3], page_size=64)
    _compare("MlaDecoding", _inputs(rng, step, layout), _attributes(layout, 30.0), 1e-4)


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("with_lengths", [False, True])
def test_sparse_prefill(with_lengths: bool, case: tuple[list[int], list[int], int]) -> None:
    rng = np.random.default_rng(13)
    new, cached, padding = case
    layout, step = _layout("fp8"), make_step(rng, new, cached, page_size=P, padding=padding)
    inputs = {**_inputs(rng, step, layout), "indices": _lists(rng, step, 11)}
    inputs["sinks"] = rng.standard_normal(4).astype(np.float32)
    if with_lengths:
        inputs["index_lengths"] = rng.integers(-1, 14, step.tokens).astype(np.int32)
    _compare("MlaPrefillSparse", inputs, _attributes(layout))


def test_index_lengths_hide_the_rest_of_the_list() -> None:
    rng = np.random.default_rng(14)
    layout, step = _layout(), make_step(rng, [3], [5], page_size=P)
    inputs = {**_inputs(rng, step, layout), "indices": np.tile(np.array([4, 2, 0, 1], np.int32), (3, 1))}
    inputs["index_lengths"] = np.array([0, 2, 4], np.int32)
    found = run_op("MlaPrefillSparse", inputs, **_attributes(layout))
    assert np.isneginf(found["lse"][0]).all()
    inputs["indices"] = inputs["indices"][:, :2]
    shorter = run_op("MlaPrefillSparse", inputs, **_attributes(layout))
    assert_close(found["lse"][1], shorter["lse"][1], 1e-6)
    assert (found["lse"][2] > shorter["lse"][2]).all()
