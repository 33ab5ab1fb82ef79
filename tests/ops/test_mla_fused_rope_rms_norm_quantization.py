"""MlaFusedRopeRmsNormQuantization's body against its reference; what is stored is compared byte for byte."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from op_harness import CODE_STEP, Step, assert_close, assert_rows_close, garbage_pool, make_step, reference, run_op

from mla_trt.formats import ROW_FORMATS, KvLayout, decode_e4m3

OP = "MlaFusedRopeRmsNormQuantization"
P = 4

STEPS = {
    "ragged": ([3, 1, 5], [4, 7, 0], 0),
    "page borders": ([1, 1, 1, 2], [P - 2, P - 1, P, P - 1], 0),
    "padding": ([2, 0, 2], [1, 3, 8], 3),
    "no sequence": ([], [], 0),
    "padding only": ([], [], 2),
    "no new tokens": ([0, 0], [5, 6], 0),
}
DIMENSIONS = {"small": (32, 16), "odd": (37, 6), "no rope": (24, 0), "deepseek": (512, 64)}


def _inputs(rng: np.random.Generator, step: Step, layout: KvLayout, norm: bool, heads: int = 3) -> dict[str, Any]:
    tokens, rank, rope = step.tokens, layout.kv_lora_rank, layout.qk_rope_head_dim
    inputs = {
        "query_rope": rng.standard_normal((tokens, heads, rope), np.float32),
        "latent": 3 * rng.standard_normal((tokens, rank), np.float32),
        "rope_key": rng.standard_normal((tokens, rope), np.float32),
        "cos": rng.uniform(-1, 1, (tokens, rope // 2)).astype(np.float32),
        "sin": rng.uniform(-1, 1, (tokens, rope // 2)).astype(np.float32),
        "kv_cache": garbage_pool(rng, layout, step.pages),
        **{name: step.inputs[name] for name in ("token_sequence", "positions", "block_table")},
    }
    if norm:
        inputs["norm_weight"] = rng.uniform(0.5, 1.5, rank).astype(np.float32)
    return inputs


def _attributes(layout: KvLayout) -> dict[str, Any]:
    return {
        "kv_lora_rank": layout.kv_lora_rank,
        "qk_rope_head_dim": layout.qk_rope_head_dim,
        "page_size": layout.page_size,
        "row_format": layout.row_format,
        "kv_scale": layout.kv_scale,
    }


def _layout(row_format: str, rank: int, rope: int, page_size: int = P) -> KvLayout:
    return KvLayout(page_size=page_size, row_format=row_format, kv_lora_rank=rank, qk_rope_head_dim=rope, kv_scale=0.03)


@pytest.mark.parametrize("dimensions", DIMENSIONS.values(), ids=DIMENSIONS.keys())
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_rows_without_norm_are_exact(row_format: str, dimensions: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    layout = _layout(row_format, *dimensions)
    step = make_step(rng, *STEPS["ragged"][:2], page_size=P, padding=2)
    inputs = _inputs(rng, step, layout, norm=False)
    found, expected = run_op(OP, inputs, **_attributes(layout)), reference(OP, inputs, **_attributes(layout))
    np.testing.assert_array_equal(found["kv_cache_out"], expected["kv_cache_out"])
    assert_close(found["query_rope_out"], expected["query_rope_out"], 1e-6)


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_rows_with_norm_differ_by_one_code_at_most(row_format: str) -> None:
    rng = np.random.default_rng(2)
    layout = _layout(row_format, 160, 16)
    step = make_step(rng, *STEPS["ragged"][:2], page_size=P, padding=2)
    inputs = _inputs(rng, step, layout, norm=True)
    found, expected = run_op(OP, inputs, **_attributes(layout)), reference(OP, inputs, **_attributes(layout))
    places = step.new_places()
    assert_rows_close(layout, found["kv_cache_out"], expected["kv_cache_out"], places, CODE_STEP[row_format])


@pytest.mark.parametrize("epsilon", [1e-6, 0.7])
def test_norm_uses_epsilon(epsilon: float) -> None:
    rng = np.random.default_rng(3)
    layout = _layout("f32", 8, 2)
    step = make_step(rng, [1], [0], page_size=P)
    inputs = _inputs(rng, step, layout, norm=True)
    found = run_op(OP, inputs, **_attributes(layout), epsilon=epsilon)
    latent, _ = layout.read(found["kv_cache_out"], *step.places(0, [0]))
    x = inputs["latent"].astype(np.float64)
    assert_close(latent, x / np.sqrt((x**2).mean() + epsilon) * inputs["norm_weight"], 1e-6)


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("row_format", ["f32", "fp8"])
def test_only_rows_of_new_tokens_change(row_format: str, case: tuple[list[int], list[int], int]) -> None:
    rng = np.random.default_rng(4)
    layout = _layout(row_format, 32, 16)
    new, cached, padding = case
    step = make_step(rng, new, cached, page_size=P, padding=padding)
    inputs = _inputs(rng, step, layout, norm=False)
    found = run_op(OP, inputs, **_attributes(layout))["kv_cache_out"]
    np.testing.assert_array_equal(found, reference(OP, inputs, **_attributes(layout))["kv_cache_out"])
    changed = np.zeros(found.shape, bool)
    for page, slot in zip(*step.new_places(), strict=True):
        changed[page, slot * layout.row_words : (slot + 1) * layout.row_words] = True
        if layout.has_page_scales:
            changed[page, layout.scales_word + slot] = True
    np.testing.assert_array_equal(found[~changed], inputs["kv_cache"][~changed])
    assert changed.sum() >= sum(new) * layout.row_words
    if sum(new):
        assert (found[changed] != inputs["kv_cache"][changed]).mean() > 0.9


def test_tokens_without_a_page_are_not_written() -> None:
    rng = np.random.default_rng(5)
    layout = _layout("fp8", 32, 16)
    step = make_step(rng, [2, 2, 2], [3, 3, 3], page_size=P)
    table = step.inputs["block_table"]
    table[0, 1], table[1, 0], table[2, 1] = -1, step.pages, 2**31 - 1
    inputs = _inputs(rng, step, layout, norm=False)
    found = run_op(OP, inputs, **_attributes(layout))["kv_cache_out"]
    np.testing.assert_array_equal(found, reference(OP, inputs, **_attributes(layout))["kv_cache_out"])
    written = {0: [3], 1: [4], 2: [3]}
    kept = inputs["kv_cache"].copy()
    for sequence, keys in written.items():
        for page, slot in zip(*step.places(sequence, keys), strict=True):
            for pool in (found, kept):
                pool[page, slot * layout.row_words : (slot + 1) * layout.row_words] = 0
                pool[page, layout.scales_word + slot] = 0
    np.testing.assert_array_equal(found, kept)


def test_positions_beyond_the_block_table_are_not_written() -> None:
    rng = np.random.default_rng(6)
    layout = _layout("f32", 8, 2)
    step = make_step(rng, [2, 1], [3, 0], page_size=P)
    inputs = {**_inputs(rng, step, layout, norm=False), "block_table": step.inputs["block_table"][:, :1]}
    found = run_op(OP, inputs, **_attributes(layout))["kv_cache_out"]
    np.testing.assert_array_equal(found, reference(OP, inputs, **_attributes(layout))["kv_cache_out"])
    assert (found != inputs["kv_cache"]).any(axis=1).sum() == 2


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rope_pairs(interleaved: int) -> None:
    rng = np.random.default_rng(7)
    layout = _layout("f32", 4, 4)
    step = make_step(rng, [1], [0], page_size=P)
    inputs = _inputs(rng, step, layout, norm=False, heads=1)
    angle = np.array([[0.3, 1.1]])
    inputs["cos"], inputs["sin"] = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    inputs["query_rope"][:] = inputs["rope_key"] = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
    found = run_op(OP, inputs, **_attributes(layout), rope_interleaved=interleaved)
    pairs = (1 + 2j, 3 + 4j) if interleaved else (1 + 3j, 2 + 4j)
    rotated = np.array(pairs) * np.exp(1j * angle[0])
    expected = np.stack([rotated.real, rotated.imag], axis=1 if interleaved else 0).reshape(4)
    assert_close(found["query_rope_out"][0, 0], expected, 1e-6)
    assert_close(layout.read(found["kv_cache_out"], *step.places(0, [0]))[1][0], expected, 1e-6)


def test_rope_rows_choose_and_clamp_the_table_row() -> None:
    rng = np.random.default_rng(8)
    layout = _layout("bf16", 16, 8)
    step = make_step(rng, [4], [0], page_size=P)
    inputs = _inputs(rng, step, layout, norm=False)
    inputs["cos"], inputs["sin"] = (rng.uniform(-1, 1, (6, 4)).astype(np.float32) for _ in range(2))
    inputs["rope_rows"] = np.array([5, 2, 99, -3], np.int32)
    found, expected = run_op(OP, inputs, **_attributes(layout)), reference(OP, inputs, **_attributes(layout))
    np.testing.assert_array_equal(found["kv_cache_out"], expected["kv_cache_out"])
    assert_close(found["query_rope_out"], expected["query_rope_out"], 1e-6)
    inputs["rope_rows"] = np.array([5, 2, 5, 0], np.int32)
    np.testing.assert_array_equal(run_op(OP, inputs, **_attributes(layout))["kv_cache_out"], found["kv_cache_out"])


def test_pages_are_copied_before_rows_are_written() -> None:
    rng = np.random.default_rng(9)
    layout = _layout("fp8", 32, 16)
    step = make_step(rng, [1], [1], page_size=P, spare=4)
    home = int(step.inputs["block_table"][0, 0])
    other, third, fourth = step.free[:3]
    inputs = _inputs(rng, step, layout, norm=False)
    pairs = [(other, home), (home, third), (-1, fourth), (fourth, step.pages), (2**31 - 1, -1)]
    inputs["page_copies"] = np.array(pairs, np.int32)
    found = run_op(OP, inputs, **_attributes(layout))["kv_cache_out"]
    np.testing.assert_array_equal(found, reference(OP, inputs, **_attributes(layout))["kv_cache_out"])
    np.testing.assert_array_equal(found[third], inputs["kv_cache"][home])
    np.testing.assert_array_equal(found[fourth], inputs["kv_cache"][fourth])
    np.testing.assert_array_equal(found[home][: layout.row_words], inputs["kv_cache"][other][: layout.row_words])
    inputs["page_copies"] = np.zeros((0, 2), np.int32)
    found = run_op(OP, inputs, **_attributes(layout))["kv_cache_out"]
    np.testing.assert_array_equal(found, reference(OP, inputs, **_attributes(layout))["kv_cache_out"])


def _rounding_borders() -> np.ndarray:
    """Every e4m3 value, every midpoint of two, their f32 neighbours, and values that saturate; of both signs."""
    values = decode_e4m3(np.arange(0x7F, dtype=np.uint8))
    exact = np.concatenate([values, (values[1:] + values[:-1]) / 2, [448.0, 464.0, 480.0, 1e4, 3e38, 1e-9]])
    exact = exact.astype(np.float32)
    near = np.concatenate([exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(np.inf))])
    return np.concatenate([near, -near])


@pytest.mark.parametrize("row_format", ["fp8_flat", "bf16"])
def test_rounding_at_every_border(row_format: str) -> None:
    borders = _rounding_borders()
    if row_format == "bf16":
        borders = np.concatenate([borders, (borders.view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32)])
    layout = KvLayout(page_size=1, row_format=row_format, kv_lora_rank=len(borders), qk_rope_head_dim=0)
    rng = np.random.default_rng(10)
    step = make_step(rng, [1], [0], page_size=1)
    inputs = {**_inputs(rng, step, layout, norm=False), "latent": borders[None]}
    found = run_op(OP, inputs, **_attributes(layout))["kv_cache_out"]
    page = int(step.inputs["block_table"][0, 0])
    dtype = ml_dtypes.float8_e4m3fn if row_format == "fp8_flat" else ml_dtypes.bfloat16
    limit = 448.0 if row_format == "fp8_flat" else np.inf
    expected = np.clip(borders, -limit, limit).astype(dtype)
    codes = found[page].view(np.uint8)[: expected.nbytes].view(expected.dtype)
    np.testing.assert_array_equal(codes.view(np.uint8), expected.view(np.uint8))


def test_zero_latents_get_the_smallest_scale() -> None:
    rng = np.random.default_rng(11)
    layout = _layout("fp8", 32, 16)
    step = make_step(rng, [1], [0], page_size=P)
    inputs = _inputs(rng, step, layout, norm=False)
    inputs["latent"] = np.zeros_like(inputs["latent"])
    found = run_op(OP, inputs, **_attributes(layout))["kv_cache_out"]
    page = int(step.inputs["block_table"][0, 0])
    assert found[page, layout.scales_word : layout.scales_word + 1].view(np.float32)[0] == np.float32(1e-6)
    np.testing.assert_array_equal(found, reference(OP, inputs, **_attributes(layout))["kv_cache_out"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_inputs_are_computed_in_f32(dtype: type) -> None:
    rng = np.random.default_rng(12)
    layout = _layout("fp8", 32, 16)
    step = make_step(rng, *STEPS["ragged"][:2], page_size=P)
    inputs = _inputs(rng, step, layout, norm=False)
    for name in ("query_rope", "latent", "rope_key"):
        inputs[name] = inputs[name].astype(dtype)
    found, expected = run_op(OP, inputs, **_attributes(layout)), reference(OP, inputs, **_attributes(layout))
    np.testing.assert_array_equal(found["kv_cache_out"], expected["kv_cache_out"])
    if dtype is np.float16:
        assert found["query_rope_out"].dtype == np.float16
    assert_close(found["query_rope_out"], expected["query_rope_out"], 1e-3 if dtype is np.float16 else 8e-3)


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_any_page_size(page_size: int) -> None:
    rng = np.random.default_rng(13)
    layout = _layout("fp8", 32, 16, page_size)
    step = make_step(rng, [5, 1], [page_size, 2 * page_size - 1], page_size=page_size)
    inputs = _inputs(rng, step, layout, norm=False)
    found, expected = run_op(OP, inputs, **_attributes(layout)), reference(OP, inputs, **_attributes(layout))
    np.testing.assert_array_equal(found["kv_cache_out"], expected["kv_cache_out"])
