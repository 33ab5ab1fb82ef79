"""MlaDecoding and MlaPrefillSparse on the GPU against float64 references on the same bytes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import (
    HALF_TYPES,
    compare_attention,
    decoding_case,
    key_lists,
    layout,
    long_pool,
    step_of,
)
from harness import Array, compare, compare_exactly, run_op
from op_harness import behind_a_page_of_nan, make_step

from mla_trt.formats import ROW_FORMATS, KvLayout

HEADS = (1, 16, 64, 128)

STEPS = {
    "ragged": ([3, 1, 5], [4, 7, 0], 0),
    "page borders": ([1, 1, 1, 1, 2], [62, 63, 64, 127, 63], 0),
    "padding": ([2, 0, 2], [1, 3, 80], 3),
    "empty sequences": ([0, 0, 1, 0], [5, 0, 0, 2], 0),
    "no sequence": ([], [], 0),
    "padding only": ([], [], 2),
    "no new tokens": ([0, 0], [5, 6], 2),
    "speculative": ([2, 4, 7, 16, 1], [62, 500, 57, 0, 1023], 1),
}
# 0 keys (no new token), 1, and around the borders of pages and tiles
LENGTHS = (0, 1, 63, 64, 65, 127, 128, 129, 255, 257, 4096)

# of sequences that decode a token each, and heads: what the cut of a step's keys (attend_plan.cu) depends on
RAGGED = {
    "one long, few short": ([6000, *range(1, 24)], 16),
    "one long, many short": ([*range(1, 301), 9000, *range(1, 301)], 4),  # more sequences than a block has threads
    "ascending": (list(range(100, 8000, 501)), 128),
    "a few more than multiprocessors": ([700] * 70, 128),
    "a third of a wave": ([1500] * 88, 128),
    "empty ones between": ([0, 2000, 0, 0, 3, 1300, 0], 128),
    "all of one key": ([1] * 150, 16),
    # of 16 multiprocessors; of more they are cut otherwise
    "shares and rests": ([4869, 514, 1077, 1421, 1089, 4807, 5215, 3493], 128),
    "rests that do not fit": ([4358, 5658, 5288, 3068, 5642, 5857, 5821, 485], 128),
    "shares and rests of 132 multiprocessors": (np.random.default_rng(3).integers(1, 8192, 50).tolist(), 128),
}


def _lengths_step(rng: np.random.Generator) -> Any:
    return step_of(rng, [min(length, 1) for length in LENGTHS], [max(length - 1, 0) for length in LENGTHS])


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_lengths(row_format: str, heads: int) -> None:
    rng = np.random.default_rng(1)
    inputs, attributes = decoding_case(rng, _lengths_step(rng), layout(row_format), heads)
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


def ragged_step(rng: np.random.Generator, lengths: list[int]) -> Any:
    """A token of each sequence that has keys, and two of none."""
    return step_of(rng, [min(length, 1) for length in lengths], [max(length - 1, 0) for length in lengths], padding=2)


@pytest.mark.parametrize("case", RAGGED.values(), ids=RAGGED.keys())
@pytest.mark.parametrize("row_format", ["f32", "bf16", "fp8_flat"])
def test_ragged_steps(row_format: str, case: tuple[list[int], int]) -> None:
    rng = np.random.default_rng(23)
    lengths, heads = case
    inputs, attributes = decoding_case(rng, ragged_step(rng, lengths), layout(row_format, 64, 16), min(heads, 32))
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@pytest.mark.small
@pytest.mark.parametrize("seed", range(16))
def test_any_lengths(seed: int) -> None:
    """However a step's keys are cut, each of them counts once: lengths of one kind or another, some tokens of each sequence."""
    rng = np.random.default_rng(seed)
    sequences = int(rng.integers(2, 24))
    lengths = [
        rng.integers(1, 6000, sequences),
        np.where(np.arange(sequences) == 0, 20000, 300),
        np.exp(rng.normal(6.5, 1.5, sequences)).astype(int) + 1,
        np.where(rng.random(sequences) < 0.3, 5000, 700),
    ][seed % 4]
    new = rng.integers(0, 4, sequences)
    step = step_of(rng, new.tolist(), np.maximum(lengths - new, 0).tolist(), padding=1)
    inputs, attributes = decoding_case(rng, step, layout("bf16", 32, 8), int(rng.choice([4, 24])))
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@pytest.mark.small
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("row_format", ROW_FORMATS)
@pytest.mark.parametrize("listed", [False, True], ids=["dense", "listed"])
def test_steps(listed: bool, row_format: str, case: tuple[list[int], list[int], int]) -> None:
    rng = np.random.default_rng(2)
    step = step_of(rng, *case[:2], padding=case[2])
    inputs, attributes = decoding_case(rng, step, layout(row_format), 16)
    if listed:
        inputs["indices"] = key_lists(rng, step, 70)
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@pytest.mark.parametrize(
    ("row_format", "heads"), [*((row_format, 16) for row_format in ROW_FORMATS), ("bf16", 128), ("fp8", 128)]
)
def test_131072_keys(row_format: str, heads: int) -> None:
    rng = np.random.default_rng(3)
    step, pages = step_of(rng, [1, 1], [131071, 40]), layout(row_format)
    inputs, attributes = decoding_case(rng, step, pages, heads, pool=long_pool(rng, step, pages))
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@pytest.mark.parametrize("row_format", ["bf16", "fp8", "fp8_ds_mla"])
def test_flat_attention_over_many_keys_with_a_common_offset(row_format: str) -> None:
    """What an accumulator with few bits loses: a long sum of values of one sign."""
    rng = np.random.default_rng(4)
    step, pages = step_of(rng, [1], [131071]), layout(row_format)
    pool = long_pool(rng, step, pages, mean=1.0, spread=0.1)
    inputs, attributes = decoding_case(rng, step, pages, 16, pool=pool)
    inputs["query"] *= np.float32(0.01)
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@pytest.mark.parametrize("heads", [2, 3, 8, 17, 40, 96, 192])
@pytest.mark.parametrize("row_format", ["f32", "bf16", "fp8"])
def test_any_number_of_heads(row_format: str, heads: int) -> None:
    rng = np.random.default_rng(5)
    step = step_of(rng, [1, 3, 2], [200, 62, 0])
    inputs, attributes = decoding_case(rng, step, layout(row_format), heads)
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@pytest.mark.parametrize("page_size", [1, 3, 4, 16, 64, 128])
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_page_sizes(row_format: str, page_size: int) -> None:
    rng = np.random.default_rng(6)
    step = step_of(rng, [2, 1, 1, 1], [page_size - 1, 2 * page_size, 0, 300], page_size)
    inputs, attributes = decoding_case(rng, step, layout(row_format, page_size=page_size), 16)
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)
    inputs["indices"] = key_lists(rng, step, 33)
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes, "listed")


@pytest.mark.small
@pytest.mark.parametrize(
    ("rank", "rope"), [(32, 16), (37, 6), (24, 0), (96, 32), (128, 64), (160, 2), (256, 32), (512, 0), (512, 64)]
)
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_dimensions(row_format: str, rank: int, rope: int) -> None:
    rng = np.random.default_rng(7)
    step = step_of(rng, [2, 1, 1], [5, 130, 63])
    inputs, attributes = decoding_case(rng, step, layout(row_format, rank, rope), 4)
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)
    inputs["indices"] = key_lists(rng, step, 9)
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes, "listed")


@pytest.mark.parametrize("listed", [False, True], ids=["dense", "listed"])
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_types(row_format: str, dtype: str, listed: bool) -> None:
    rng = np.random.default_rng(8)
    step = step_of(rng, [2, 1, 1], [5, 0, 300], padding=1)
    inputs, attributes = decoding_case(rng, step, layout(row_format), 16, dtype)
    if listed:
        inputs["indices"] = key_lists(rng, step, 40)
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@pytest.mark.parametrize("listed", [False, True], ids=["dense", "listed"])
@pytest.mark.parametrize("row_format", ["f32", "bf16", "fp8"])
def test_sinks(row_format: str, listed: bool) -> None:
    rng = np.random.default_rng(9)
    step = step_of(rng, [2, 0, 3, 1], [5, 1, 0, 1000], padding=1)
    inputs, attributes = decoding_case(rng, step, layout(row_format), 5)
    inputs["sinks"] = np.array([0.5, -40, 3, 200, -np.inf], np.float32)
    if listed:
        inputs["indices"] = key_lists(rng, step, 40)
    found = run_op("MlaDecoding", inputs, **attributes)
    compare_attention(found, inputs, attributes)
    compare_exactly("output under an all-taking sink", found["output"][:, 3], np.zeros_like(found["output"][:, 3]))


@pytest.mark.parametrize("width", [1, 63, 64, 65, 512, 2048])
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("row_format", ["f32", "bf16", "fp8", "fp8_ds_mla"])
def test_list_widths(row_format: str, heads: int, width: int) -> None:
    rng = np.random.default_rng(10)
    step = step_of(rng, [1, 2, 1, 1], [3000, 62, 0, 5000])
    inputs, attributes = decoding_case(rng, step, layout(row_format), heads)
    inputs["indices"] = key_lists(rng, step, width)
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@pytest.mark.parametrize("row_format", ["f32", "fp8"])
def test_lists_of_one_key_again_and_again(row_format: str) -> None:
    rng = np.random.default_rng(11)
    step = step_of(rng, [1, 1], [300, 5])
    inputs, attributes = decoding_case(rng, step, layout(row_format), 16)
    inputs["indices"] = np.tile(np.array([[4]], np.int32), (2, 130))
    inputs["indices"][1, ::2] = -1
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@pytest.mark.small
@pytest.mark.parametrize("listed", [False, True], ids=["dense", "listed"])
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_pages_outside_the_pool_are_masked(row_format: str, listed: bool) -> None:
    rng = np.random.default_rng(12)
    step = step_of(rng, [2, 1, 1], [200, 130, 3])
    table = step.inputs["block_table"]
    table[0, 1], table[1, 0], table[2, 0] = -1, step.pages, -(2**31)
    inputs, attributes = decoding_case(rng, step, layout(row_format), 16)
    if listed:
        inputs["indices"] = np.tile(np.arange(210, dtype=np.int32), (step.tokens, 1))
    for what, given in (("", inputs), ("behind a page of NaN", behind_a_page_of_nan(inputs, "kv_cache"))):
        found = run_op("MlaDecoding", given, **attributes)
        compare_attention(found, given, attributes, what)
        compare_exactly("output without a page", found["output"][3], np.zeros_like(found["output"][3]))


@pytest.mark.parametrize("listed", [False, True], ids=["dense", "listed"])
def test_block_table_narrower_than_the_sequence(listed: bool) -> None:
    rng = np.random.default_rng(13)
    step = step_of(rng, [2, 1], [200, 130])
    inputs, attributes = decoding_case(rng, step, layout("fp8"), 16)
    if listed:
        inputs["indices"] = np.tile(np.arange(202, dtype=np.int32), (step.tokens, 1))
    for width in (2, 0):
        inputs["block_table"] = np.ascontiguousarray(step.inputs["block_table"][:, :width])
        compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes, f"{width} columns")


@pytest.mark.parametrize("listed", [False, True], ids=["dense", "listed"])
@pytest.mark.parametrize("row_format", ["f32", "fp8"])
def test_empty_pool(row_format: str, listed: bool) -> None:
    rng = np.random.default_rng(14)
    step, pages = step_of(rng, [2], [1]), layout(row_format)
    inputs, attributes = decoding_case(rng, step, pages, 16)
    inputs["kv_cache"] = pages.empty(0)
    if listed:
        inputs["indices"] = np.zeros((step.tokens, 3), np.int32)
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@pytest.mark.parametrize("partitions", [1, 4, 131, 132, 1000])
@pytest.mark.parametrize("row_format", ["f32", "bf16", "fp8"])
def test_schedules(row_format: str, partitions: int) -> None:
    """However the work is cut, the result is the same up to the order of its sums."""
    rng = np.random.default_rng(15)
    step = step_of(rng, [1, 2, 0, 1, 1], [700, 62, 90, 0, 9000], partitions=partitions)
    inputs, attributes = decoding_case(rng, step, layout(row_format), 64)
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@pytest.mark.parametrize("row_format", ["bf16", "fp8", "fp8_flat", "fp8_ds_mla"])
def test_peaked_attention(row_format: str) -> None:
    """Scores of spread 4: a few keys take the weight."""
    rng = np.random.default_rng(16)
    step = step_of(rng, [1, 2], [3000, 62])
    inputs, attributes = decoding_case(rng, step, layout(row_format), 64, "bf16", scale=4 * 576**-0.5)
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


def _saturated(pages: KvLayout, rng: np.random.Generator, step: Any, pool: Array) -> None:
    """Rows whose codes are +-448 for the most part, with scales from the smallest to large."""
    count = int(step.inputs["positions"].max()) + 1
    latent = np.where(rng.random((count, pages.kv_lora_rank)) < 0.5, -448.0, 448.0).astype(np.float32)
    latent *= np.float32(10.0) ** rng.integers(-9, 1, (count, 1)).astype(np.float32)
    latent[::11] = 0
    rope = rng.standard_normal((count, pages.qk_rope_head_dim), np.float32)
    pages.write(pool, *step.places(0, range(count)), latent, rope)


@pytest.mark.parametrize("row_format", ["fp8", "fp8_ds_mla", "fp8_flat"])
def test_saturated_rows(row_format: str) -> None:
    rng = np.random.default_rng(17)
    step, pages = step_of(rng, [1], [500]), layout(row_format)
    inputs, attributes = decoding_case(rng, step, pages, 16, "bf16", scale=1e-3)
    _saturated(pages, rng, step, inputs["kv_cache"])
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@pytest.mark.parametrize("listed", [False, True], ids=["dense", "listed"])
@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("row_format", ["fp8", "fp8_ds_mla", "fp8_flat"])
def test_subnormal_codes(row_format: str, heads: int, listed: bool) -> None:
    """Codes below e4m3's smallest normal number, which no writer makes most of a row of."""
    rng = np.random.default_rng(26)
    step, pages = step_of(rng, [1, 2], [300, 62]), layout(row_format)
    inputs, attributes = decoding_case(rng, step, pages, heads, "bf16")
    if listed:
        inputs["indices"] = key_lists(rng, step, 100)
    pool = inputs["kv_cache"].view(np.uint8).reshape(step.pages, -1)
    rows = pool[:, : pages.page_size * pages.row_bytes].reshape(step.pages, pages.page_size, pages.row_bytes)
    rank = pages.kv_lora_rank
    codes = rng.integers(1, 8, (*rows.shape[:2], rank)) | rng.choice([0, 0x80], (*rows.shape[:2], rank))
    rows[..., :rank] = codes.astype(np.uint8)
    scale = np.full((*rows.shape[:2], 4), 8.0, np.float32).view(np.uint8)
    if row_format == "fp8_ds_mla":
        rows[..., rank : rank + 16] = scale
    elif row_format == "fp8":
        start = pages.page_size * pages.row_bytes
        pool[:, start : start + 4 * pages.page_size] = np.full((step.pages, pages.page_size), 8.0, np.float32).view(
            np.uint8
        )
        rope = rng.standard_normal((*rows.shape[:2], 64), np.float32) / 8
        rows[..., rank : rank + 128] = rope.astype(ml_dtypes.bfloat16).view(np.uint8)
    compare_attention(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


def test_lse_may_be_left_out() -> None:
    rng = np.random.default_rng(18)
    step = step_of(rng, [2, 1], [3, 700])
    for row_format in ("f32", "fp8"):
        inputs, attributes = decoding_case(rng, step, layout(row_format), 16)
        found = run_op("MlaDecoding", inputs, ["output"], **attributes)
        compare_attention(found, inputs, attributes, row_format)


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_runs_are_bitwise_equal(row_format: str, heads: int) -> None:
    rng = np.random.default_rng(19)
    step = step_of(rng, [1] * 8 + [3], [1000, 1, 63, 64, 65, 4000, 200, 31, 500])
    inputs, attributes = decoding_case(rng, step, layout(row_format), heads, "bf16")
    run_op("MlaDecoding", inputs, repeat=100, **attributes)


@pytest.mark.parametrize("listed", [False, True], ids=["dense", "listed"])
@pytest.mark.parametrize("row_format", ["f32", "bf16", "fp8"])
def test_a_graph_gives_the_same_bits(row_format: str, listed: bool) -> None:
    rng = np.random.default_rng(20)
    step = step_of(rng, [1, 2, 1], [1000, 62, 0])
    inputs, attributes = decoding_case(rng, step, layout(row_format), 64)
    if listed:
        inputs["indices"] = key_lists(rng, step, 100)
    plain = run_op("MlaDecoding", inputs, **attributes)
    captured = run_op("MlaDecoding", inputs, graph=True, repeat=3, **attributes)
    for name in ("output", "lse"):
        compare_exactly(f"{name} of the graph", captured[name].view(np.int32), plain[name].view(np.int32))


@pytest.mark.small
@pytest.mark.parametrize("listed", [False, True], ids=["dense", "listed"])
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_garbage_is_survived(row_format: str, listed: bool) -> None:
    """An engine builder times kernels on inputs of any content: nothing outside the tensors is touched."""
    rng = np.random.default_rng(21)
    step = make_step(rng, [1, 3, 2], [200, 62, 5], 64)
    inputs, attributes = decoding_case(rng, step, layout(row_format), 16)
    if listed:
        inputs["indices"] = key_lists(rng, step, 40)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for name, values in inputs.items():
            if values.dtype == np.int32 and name != "kv_cache":
                inputs[name] = rng.integers(-(2**31), 2**31, values.shape).astype(np.int32)
        run_op("MlaDecoding", inputs, **attributes)
        for name in ("query_offsets", "cache_lengths", "token_sequence", "positions", "schedule"):
            inputs[name] = rng.integers(-2, 300, inputs[name].shape).astype(np.int32)
        run_op("MlaDecoding", inputs, **attributes)


@pytest.mark.parametrize("with_lengths", [False, True], ids=["whole lists", "with lengths"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_sparse_prefill(row_format: str, heads: int, with_lengths: bool) -> None:
    rng = np.random.default_rng(22)
    step = step_of(rng, [40, 0, 7, 1], [300, 9, 0, 4095], padding=3)
    inputs, attributes = decoding_case(rng, step, layout(row_format), heads, "bf16" if heads > 16 else "f32")
    inputs["indices"] = key_lists(rng, step, 200)
    if with_lengths:
        inputs["index_lengths"] = rng.integers(-1, 230, step.tokens).astype(np.int32)
        inputs["sinks"] = rng.standard_normal(heads).astype(np.float32)
    compare_attention(run_op("MlaPrefillSparse", inputs, **attributes), inputs, attributes)


@pytest.mark.parametrize("row_format", ["bf16", "fp8"])
def test_sparse_prefill_of_2048_keys(row_format: str) -> None:
    rng = np.random.default_rng(23)
    step = step_of(rng, [64], [6000])
    inputs, attributes = decoding_case(rng, step, layout(row_format), 128, "bf16")
    order = np.argsort(rng.random((step.tokens, 6000)), axis=1)[:, :2048]
    inputs["indices"] = np.sort(order, axis=1).astype(np.int32)
    compare_attention(run_op("MlaPrefillSparse", inputs, **attributes), inputs, attributes)


@pytest.mark.small
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
def test_sparse_prefill_steps(case: tuple[list[int], list[int], int]) -> None:
    rng = np.random.default_rng(24)
    step = step_of(rng, *case[:2], padding=case[2])
    inputs, attributes = decoding_case(rng, step, layout("fp8"), 4)
    inputs["indices"] = key_lists(rng, step, 11)
    inputs["index_lengths"] = rng.integers(-1, 14, step.tokens).astype(np.int32)
    compare_attention(run_op("MlaPrefillSparse", inputs, **attributes), inputs, attributes)


def test_sparse_prefill_and_decoding_over_the_same_lists_agree() -> None:
    rng = np.random.default_rng(25)
    step = step_of(rng, [5, 1], [300, 90])
    inputs, attributes = decoding_case(rng, step, layout("fp8"), 64, "bf16")
    inputs["indices"] = key_lists(rng, step, 128)
    decoded, prefilled = (run_op(op, inputs, **attributes) for op in ("MlaDecoding", "MlaPrefillSparse"))
    compare("output", prefilled["output"], decoded["output"], 4e-3)
