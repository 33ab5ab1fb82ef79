"""MlaFusedRopeRmsNormQuantization on the GPU: what is stored equals the reference byte for byte, but for a norm's last bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import HALF_TYPES, TABLES, kv_attributes, layout, step_of, with_tables
from harness import Array, compare, compare_exactly, run_op
from large_reference import append
from op_harness import CODE_STEP, Step, assert_rows_close, garbage_pool

from mla_trt.formats import ROW_FORMATS, KvLayout, decode_e4m3
from mla_trt.plugins.kernel_library import KernelError

OP = "MlaFusedRopeRmsNormQuantization"

STEPS = {
    "ragged": ([3, 1, 5], [4, 7, 0], 0),
    "page borders": ([1, 1, 1, 2], [62, 63, 64, 63], 0),
    "padding": ([2, 0, 2], [1, 3, 80], 3),
    "no sequence": ([], [], 0),
    "padding only": ([], [], 2),
    "no new tokens": ([0, 0], [5, 6], 0),
    "decode of 128": ([1] * 128, list(range(0, 128 * 7, 7)), 0),  # every place of a page
    "prompt": ([300, 1], [0, 131071], 0),
}
QUERY_TOLERANCE = {"f32": 1e-6, "f16": 2**-10, "bf16": 2**-7}


def _inputs(
    rng: np.random.Generator, step: Step, pages: KvLayout, heads: int = 3, norm: bool = False, dtype: str = "f32"
) -> dict[str, Array]:
    tokens, rank, rope = step.tokens, pages.kv_lora_rank, pages.qk_rope_head_dim
    inputs: dict[str, Array] = {
        "query_rope": rng.standard_normal((tokens, heads, rope), np.float32),
        "latent": 3 * rng.standard_normal((tokens, rank), np.float32),
        "rope_key": rng.standard_normal((tokens, rope), np.float32),
    }
    if norm:
        inputs["norm_weight"] = rng.uniform(0.5, 1.5, rank).astype(np.float32)
    inputs = {name: values.astype(HALF_TYPES[dtype]) for name, values in inputs.items()}
    inputs |= {name: rng.uniform(-1, 1, (tokens, rope // 2)).astype(np.float32) for name in ("cos", "sin")}
    inputs["kv_cache"] = garbage_pool(rng, pages, step.pages)
    return inputs | {name: step.inputs[name] for name in ("token_sequence", "positions", "block_table")}


def _check(
    inputs: Mapping[str, Array], pages: KvLayout, dtype: str = "f32", repeat: int = 2, **attributes: Any
) -> dict[str, Array]:
    attributes = {**kv_attributes(pages), **attributes}
    expected = append(inputs, attributes)
    found: dict[str, Array] = {}
    for in_place in (False, True):
        found = run_op(OP, inputs, in_place=in_place, repeat=repeat, **attributes)
        place = "in place" if in_place else "in a new pool"
        compare_exactly(f"kv_cache_out {place}", found["kv_cache_out"], expected["kv_cache_out"])
        compare(f"query_rope_out {place}", found["query_rope_out"], expected["query_rope_out"], QUERY_TOLERANCE[dtype])
    return found


@pytest.mark.small
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_steps(row_format: str, case: tuple[list[int], list[int], int]) -> None:
    rng = np.random.default_rng(1)
    pages, step = layout(row_format, 160, 32), step_of(rng, *case[:2], padding=case[2])
    _check(_inputs(rng, step, pages), pages)


@pytest.mark.parametrize(
    ("rank", "rope", "heads"),
    [(32, 16, 1), (37, 6, 2), (24, 0, 3), (128, 64, 16), (160, 2, 5), (256, 32, 64), (512, 64, 128), (512, 0, 128)],
)
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_dimensions_and_types(row_format: str, dtype: str, rank: int, rope: int, heads: int) -> None:
    rng = np.random.default_rng(2)
    pages, step = layout(row_format, rank, rope), step_of(rng, [3, 1, 5], [4, 63, 0], padding=2)
    _check(_inputs(rng, step, pages, heads, dtype=dtype), pages, dtype)


@pytest.mark.parametrize("rank", [37, 160, 512])
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_norm(row_format: str, dtype: str, rank: int) -> None:
    rng = np.random.default_rng(3)
    pages, step = layout(row_format, rank, 64), step_of(rng, [30, 1, 5], [4, 63, 0], padding=2)
    inputs = _inputs(rng, step, pages, 16, norm=True, dtype=dtype)
    for epsilon in (1e-6, 0.7):
        attributes = {**kv_attributes(pages), "epsilon": epsilon}
        found, expected = run_op(OP, inputs, repeat=2, **attributes), append(inputs, attributes)
        pools = found["kv_cache_out"], expected["kv_cache_out"]
        assert_rows_close(pages, *pools, step.new_places(), CODE_STEP[row_format])
        compare("query_rope_out", found["query_rope_out"], expected["query_rope_out"], QUERY_TOLERANCE[dtype])


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("row_format", ["f32", "bf16", "fp8"])
def test_rope_rows_choose_and_clamp_the_table_row(row_format: str, interleaved: int) -> None:
    rng = np.random.default_rng(4)
    pages, step = layout(row_format), step_of(rng, [6, 2], [0, 100])
    inputs = _inputs(rng, step, pages, 16)
    inputs["cos"], inputs["sin"] = (rng.uniform(-1, 1, (6, 32)).astype(np.float32) for _ in range(2))
    inputs["rope_rows"] = np.array([5, 2, 99, -3, 2**31 - 1, -(2**31), 0, 1], np.int32)
    _check(inputs, pages, rope_interleaved=interleaved)
    del inputs["rope_rows"]
    inputs["cos"], inputs["sin"] = (rng.uniform(-1, 1, (step.tokens, 32)).astype(np.float32) for _ in range(2))
    _check(inputs, pages, rope_interleaved=interleaved)


@pytest.mark.small
@pytest.mark.parametrize("rope", [6, 64])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("kind", TABLES)
def test_tables_as_models_have_them(kind: str, interleaved: int, rope: int) -> None:
    rng = np.random.default_rng(14)
    pages, step = layout("fp8", 160, rope), step_of(rng, [3, 1], [62, 5])
    given, plain = with_tables(rng, _inputs(rng, step, pages, 5), kind)
    given["rope_rows"] = plain["rope_rows"] = np.array([3, 0, 99, 1], np.int32)
    attributes = {**kv_attributes(pages), "rope_interleaved": interleaved}
    expected, found = append(plain, attributes), run_op(OP, given, repeat=2, **attributes)
    compare_exactly("kv_cache_out", found["kv_cache_out"], expected["kv_cache_out"])
    compare("query_rope_out", found["query_rope_out"], expected["query_rope_out"], QUERY_TOLERANCE["f32"])


@pytest.mark.small
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_tokens_without_a_page_are_not_written(row_format: str) -> None:
    rng = np.random.default_rng(5)
    pages, step = layout(row_format, 64, 16), step_of(rng, [2, 2, 2], [63, 63, 63])
    table = step.inputs["block_table"]
    table[0, 1], table[1, 0], table[2, 1] = -1, step.pages, 2**31 - 1
    inputs = _inputs(rng, step, pages)
    _check(inputs, pages)
    inputs["block_table"] = np.ascontiguousarray(table[:, :1])
    _check(inputs, pages)
    inputs["block_table"] = np.ascontiguousarray(table[:, :0])
    _check(inputs, pages)


@pytest.mark.small
@pytest.mark.parametrize("row_format", ["f32", "fp8"])
def test_pages_are_copied_before_rows_are_written(row_format: str) -> None:
    rng = np.random.default_rng(6)
    pages, step = layout(row_format), step_of(rng, [1, 4], [65, 3])
    home = int(step.inputs["block_table"][0, 0])
    other, third, fourth = step.free[:3]
    inputs = _inputs(rng, step, pages)
    # home is copied from and to: all pages are read before any is written
    pairs = [(other, home), (home, third), (-1, fourth), (fourth, step.pages), (2**31 - 1, -1)]
    inputs["page_copies"] = np.array(pairs, np.int32)
    found = _check(inputs, pages, repeat=20)
    compare_exactly("the copy of a page", found["kv_cache_out"][third], inputs["kv_cache"][home])
    inputs["page_copies"] = np.array([(other, third), (third, other)], np.int32)
    _check(inputs, pages, repeat=20)
    inputs["page_copies"] = np.zeros((0, 2), np.int32)
    _check(inputs, pages)


def test_many_page_copies() -> None:
    rng = np.random.default_rng(7)
    pages, step = layout("fp8"), step_of(rng, [1] * 40, [200] * 40)
    inputs = _inputs(rng, step, pages)
    order = rng.permutation(step.pages)
    inputs["page_copies"] = np.stack([np.roll(order, 1), order], axis=1)[:100].astype(np.int32)
    _check(inputs, pages)


def _rounding_borders() -> Array:
    """Every e4m3 value, every midpoint of two, their f32 neighbours, and values that saturate; of both signs."""
    values = decode_e4m3(np.arange(0x7F, dtype=np.uint8))
    exact = np.concatenate([values, (values[1:] + values[:-1]) / 2, [448.0, 464.0, 480.0, 1e4, 3e38, 1e-9, 1e-40]])
    exact = exact.astype(np.float32)
    near = np.concatenate([exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(np.inf))])
    bf16 = (near.view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32)
    return np.concatenate([near, -near, bf16, -bf16])


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_rounding_at_every_border(row_format: str) -> None:
    rng = np.random.default_rng(8)
    borders = _rounding_borders()
    borders = borders[np.abs(borders) < 3e38]
    rows = np.resize(borders, (-(-len(borders) // 512), 512))
    if row_format == "fp8":  # the scale of these rows is 1
        rows = np.where(np.arange(512) == 7, np.float32(448), np.clip(rows, -448, 448))
    elif row_format == "fp8_ds_mla":
        rows = np.where(np.arange(512) % 128 == 7, np.float32(448), np.clip(rows, -448, 448))
    pages, step = layout(row_format, kv_scale=1.0), step_of(rng, [len(rows)], [60])
    inputs = _inputs(rng, step, pages)
    inputs["latent"] = rows
    inputs["rope_key"] = np.ascontiguousarray(rows[:, 100:164])
    inputs["cos"], inputs["sin"] = np.ones_like(inputs["cos"]), np.zeros_like(inputs["sin"])
    _check(inputs, pages)


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_scales_from_zero_to_large(row_format: str) -> None:
    rng = np.random.default_rng(9)
    pages, step = layout(row_format), step_of(rng, [40], [0])
    inputs = _inputs(rng, step, pages)
    inputs["latent"] *= np.float32(10.0) ** np.linspace(-40, 30, 40).astype(np.float32)[:, None]
    inputs["latent"][::7] = 0
    inputs["latent"][1::7, 128:256] = 0
    _check(inputs, pages)


@pytest.mark.parametrize("page_size", [1, 3, 4, 16, 128])
@pytest.mark.parametrize("row_format", ["f32", "fp8", "fp8_ds_mla"])
def test_page_sizes(row_format: str, page_size: int) -> None:
    rng = np.random.default_rng(10)
    step = step_of(rng, [5, 1, 2 * page_size], [page_size, 2 * page_size - 1, 0], page_size)
    pages = layout(row_format, 64, 16, page_size)
    _check(_inputs(rng, step, pages), pages)


@pytest.mark.parametrize("row_format", ["bf16", "fp8", "fp8_ds_mla"])
def test_4096_tokens(row_format: str) -> None:
    rng = np.random.default_rng(11)
    pages, step = layout(row_format), step_of(rng, [4000, 90, 6], [0, 3, 1000])
    inputs = _inputs(rng, step, pages, 16, dtype="bf16")
    _check(inputs, pages, "bf16")


@pytest.mark.parametrize("row_format", ["f32", "fp8"])
def test_a_graph_gives_the_same_bytes(row_format: str) -> None:
    rng = np.random.default_rng(12)
    pages, step = layout(row_format), step_of(rng, [3, 1], [62, 10])
    inputs = _inputs(rng, step, pages, 16)
    inputs["page_copies"] = np.array([[step.free[0], step.free[1]]], np.int32)
    expected = append(inputs, kv_attributes(pages))
    for in_place in (False, True):
        found = run_op(OP, inputs, in_place=in_place, graph=True, repeat=3, **kv_attributes(pages))
        compare_exactly("kv_cache_out", found["kv_cache_out"], expected["kv_cache_out"])


@pytest.mark.small
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_garbage_is_survived(row_format: str) -> None:
    """An engine builder times kernels on inputs of any content: nothing outside the tensors is touched."""
    pages = layout(row_format, 64, 16)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        step = step_of(rng, [3, 1], [62, 10])
        inputs = _inputs(rng, step, pages)
        inputs["page_copies"] = np.zeros((4, 2), np.int32)
        inputs["rope_rows"] = np.zeros(step.tokens, np.int32)
        for name in ("token_sequence", "positions", "block_table", "page_copies", "rope_rows"):
            inputs[name] = rng.integers(-(2**31), 2**31, inputs[name].shape).astype(np.int32)
        run_op(OP, inputs, **kv_attributes(pages))
        for name in ("token_sequence", "positions", "block_table", "page_copies", "rope_rows"):
            inputs[name] = rng.integers(-2, 9, inputs[name].shape).astype(np.int32)
        for name in ("latent", "rope_key", "query_rope"):
            inputs[name] = np.frombuffer(rng.bytes(inputs[name].nbytes), np.float32).reshape(inputs[name].shape)
        run_op(OP, inputs, **kv_attributes(pages))


def test_16_bit_rows_of_16_bit_latents_are_their_bits() -> None:
    rng = np.random.default_rng(13)
    pages, step = layout("bf16"), step_of(rng, [4], [10])
    inputs = _inputs(rng, step, pages, dtype="bf16")
    found = run_op(OP, inputs, **kv_attributes(pages))["kv_cache_out"]
    for token in range(4):
        page, slot = step.places(0, [10 + token])
        stored = found[page[0]].view(np.uint16)[slot[0] * 576 :][:512]
        compare_exactly("latent bits", stored, inputs["latent"][token].astype(ml_dtypes.bfloat16).view(np.uint16))


@pytest.mark.small
def test_tables_that_cannot_be_are_refused() -> None:
    rng = np.random.default_rng(15)
    pages, step = layout("fp8", 64, 16), step_of(rng, [1, 1], [3, 4])
    inputs = _inputs(rng, step, pages)
    for name, table, message in (
        ("cos", inputs["cos"][:, :7], "cos has 7 along ceil\\(Dr/2\\), expected 8"),
        ("sin", inputs["sin"].astype(ml_dtypes.float8_e4m3fn), "sin has the type 17"),
        ("sin", inputs["sin"][:1], "sin has 1 along N, expected 2"),
        ("cos", inputs["cos"][None], "cos has 2 along ceil\\(Dr/2\\), expected 8"),
    ):
        with pytest.raises(KernelError, match=message):
            run_op(OP, {**inputs, name: table}, **kv_attributes(pages))
