"""The kernels for SM90: MlaDecoding and MlaPrefillSparse with queries in bfloat16, over fp8 and fp8_flat rows with e4m3 products
(attend_hopper_fp8.cu; 1 or 2 codes for a value of the query), and with bfloat16 products (attend_hopper_bf16.cu) over bf16 rows and
over codes, which it decodes.

References are float64 over the same bytes. What the kernel with e4m3 products rounds: the query to one or two codes a value, and
the weights to codes with 4 bits. So its error is that of a weight, up to 2^-4 of it, averaged over the keys that count, and
with one code for the query that of the scores, which grows with their spread. The other one rounds weights to
bfloat16, and values of fp8_ds_mla with their scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from cases import decoding_case, key_lists, layer_case, layout, long_pool, step_of
from harness import Array, compare, compare_exactly, run_op
from large_reference import attention
from op_harness import behind_a_page_of_nan
from test_gpu_decoding import LENGTHS, RAGGED, STEPS, ragged_step

Kind = int | str
"""Terms of the query over fp8 rows, "flat" with them over fp8_flat rows, or the format of rows whose products are of bfloat16."""
FLAT: dict[Kind, int] = {"flat1": 1, "flat2": 2}
MOST: dict[Kind, float] = {1: 1.5e-1, 2: 4e-2, "bf16": 5e-3, "fp8": 8e-3, "fp8_ds_mla": 1e-2}
"""Of the largest output."""
MEAN: dict[Kind, float] = {1: 6e-2, 2: 2.5e-2, "bf16": 5e-3, "fp8": 5e-3, "fp8_ds_mla": 5e-3}
"""Frobenius, relative."""
LSE: dict[Kind, float] = {1: 3e-1, 2: 7e-2, "bf16": 1e-4, "fp8": 1e-4, "fp8_ds_mla": 8e-3}
"""Absolute; of e4m3 products the sum is of rounded weights."""
BFLOAT16_ROWS = pytest.mark.parametrize("row_format", ["bf16", "fp8", "fp8_ds_mla"])


def _compare(
    found: Mapping[str, Array], inputs: Mapping[str, Array], attributes: Mapping[str, Any], what: str = ""
) -> None:
    expected = attention(inputs, attributes)
    kind: Kind = attributes.get("query_terms", 0) or attributes["row_format"]
    prefix = f"{what} " if what else ""
    compare(f"{prefix}output", found["output"], expected["output"], MOST[kind])
    difference = found["output"].astype(np.float64) - expected["output"]
    mean = np.linalg.norm(difference) / max(float(np.linalg.norm(expected["output"])), 1e-30)
    compare(f"{prefix}output on average", np.array(mean), np.array(0.0), MEAN[kind], absolute=True)
    if "lse" in found:
        compare(f"{prefix}lse", found["lse"], expected["lse"], LSE[kind], absolute=True)


def _case(
    rng: np.random.Generator, step: Any, heads: int, kind: Kind, **more: Any
) -> tuple[dict[str, Array], dict[str, Any]]:
    pages = layout(_row_format(kind), page_size=more.pop("page_size", 64))
    inputs, attributes = decoding_case(rng, step, pages, heads, "bf16", **more)
    return inputs, attributes | {"query_terms": _terms(kind)}


def _terms(kind: Kind) -> int:
    return kind if isinstance(kind, int) else FLAT.get(kind, 0)


def _row_format(kind: Kind) -> str:
    if kind in FLAT:
        return "fp8_flat"
    return kind if isinstance(kind, str) else "fp8"


ALL_KINDS: list[Kind] = [1, 2, "bf16", "fp8", "fp8_ds_mla", *FLAT]
KINDS = pytest.mark.parametrize("kind", ALL_KINDS)
LISTED = pytest.mark.parametrize("listed", [False, True], ids=["dense", "listed"])


@pytest.mark.small
@KINDS
@pytest.mark.parametrize("heads", [1, 8, 16, 17, 32, 40, 48, 64, 72, 96, 128])
def test_lengths(heads: int, kind: Kind) -> None:
    rng = np.random.default_rng(1)
    step = step_of(rng, [min(length, 1) for length in LENGTHS], [max(length - 1, 0) for length in LENGTHS])
    inputs, attributes = _case(rng, step, heads, kind)
    _compare(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@LISTED
@pytest.mark.parametrize("kind", [1, 2, *FLAT])
@pytest.mark.parametrize("heads", [16, 32, 48, 64])
def test_it_is_this_kernel_that_runs(heads: int, kind: Kind, listed: bool) -> None:
    """The portable one would pass every comparison here."""
    rng = np.random.default_rng(16)
    step = step_of(rng, [1, 1], [300, 2000])
    inputs, attributes = _case(rng, step, heads, kind)
    if listed:
        inputs["indices"] = key_lists(rng, step, 200)
    found = run_op("MlaDecoding", inputs, **attributes)["output"]
    portable = run_op("MlaDecoding", inputs, **attributes | {"query_terms": 0})["output"]
    assert not np.array_equal(found, portable)


@LISTED
@BFLOAT16_ROWS
def test_products_of_bfloat16_have_a_kernel_of_their_own(row_format: str, listed: bool) -> None:
    """Queries in float32 take the portable one, which rounds them to what is given here."""
    rng = np.random.default_rng(20)
    step = step_of(rng, [1, 1], [300, 2000])
    inputs, attributes = _case(rng, step, 64, row_format)
    if listed:
        inputs["indices"] = key_lists(rng, step, 200)
    found = run_op("MlaDecoding", inputs, **attributes)["lse"]
    inputs["query"] = inputs["query"].astype(np.float32)
    portable = run_op("MlaDecoding", inputs, **attributes)["lse"]
    compare("lse", found, portable.astype(np.float64), LSE[row_format], absolute=True)
    assert not np.array_equal(found, portable)


@LISTED
@pytest.mark.parametrize(
    ("heads", "kind"),
    [
        # without a GPU not all, for time's sake
        pytest.param(heads, kind, marks=() if heads == 24 or (kind in FLAT and heads != 128) else pytest.mark.small)
        for heads in (4, 16, 24, 128)
        for kind in ALL_KINDS
    ],
)
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
def test_steps(case: tuple[list[int], list[int], int], heads: int, kind: Kind, listed: bool) -> None:
    rng = np.random.default_rng(2)
    step = step_of(rng, *case[:2], padding=case[2])
    inputs, attributes = _case(rng, step, heads, kind)
    if listed:
        inputs["indices"] = key_lists(rng, step, 70)
    _compare(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@KINDS
@pytest.mark.parametrize("case", RAGGED.values(), ids=RAGGED.keys())
def test_ragged_steps(case: tuple[list[int], int], kind: Kind) -> None:
    rng = np.random.default_rng(24)
    lengths, heads = case
    inputs, attributes = _case(rng, ragged_step(rng, lengths), heads, kind)
    inputs["sinks"] = rng.normal(size=heads).astype(np.float32)
    found = run_op("MlaDecoding", inputs, repeat=3, **attributes)
    _compare(found, inputs, attributes)


@KINDS
@pytest.mark.parametrize("heads", [16, 128])
def test_131072_keys(heads: int, kind: Kind) -> None:
    rng = np.random.default_rng(3)
    step = step_of(rng, [1, 1], [131071, 40])
    inputs, attributes = _case(rng, step, heads, kind, pool=long_pool(rng, step, layout(_row_format(kind))))
    _compare(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@KINDS
@pytest.mark.parametrize("heads", [16, 64])
def test_flat_attention_with_a_common_offset_does_not_lose_with_length(heads: int, kind: Kind) -> None:
    """What the 14 bits of e4m3 products' sums would lose, and what the rounding of weights would, were it of one sign."""
    for length in (1000, 131071):
        rng = np.random.default_rng(4)
        step = step_of(rng, [1], [length])
        pool = long_pool(rng, step, layout(_row_format(kind)), mean=1.0, spread=0.1)
        inputs, attributes = _case(rng, step, heads, kind, pool=pool)
        inputs["query"] = (inputs["query"].astype(np.float32) * 0.01).astype(inputs["query"].dtype)
        found, expected = run_op("MlaDecoding", inputs, **attributes), attention(inputs, attributes)
        compare(f"output of {length} keys", found["output"], expected["output"], 5e-3)


@KINDS
@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize(
    ("share", "keys"),
    # without a GPU fewer keys, whose weights are as large a part of all: e^14 / 65536 = e^12.6 / 16384
    [(8.0, 65536), (11.0, 65536), (14.0, 65536), pytest.param(12.6, 16384, marks=pytest.mark.small)],
)
def test_one_heavy_key_and_many_light_ones(share: float, keys: int, heads: int, kind: Kind) -> None:
    """The light ones' weights are far below e4m3's smallest of the heavy one's scale. Blocks have many tiles."""
    rng = np.random.default_rng(5)
    step, pages = step_of(rng, [1], [keys - 1]), layout(_row_format(kind))
    pool = long_pool(rng, step, pages, spread=0.3)
    direction = rng.standard_normal(512, np.float32)
    heavy = direction * np.float32(share * 576**0.5 / float(direction @ direction))
    pages.write(pool, *step.places(0, range(1)), heavy[None], np.zeros((1, 64), np.float32))
    inputs, attributes = _case(rng, step, heads, kind, pool=pool)
    query = inputs["query"].astype(np.float32)
    query[..., :512] += direction
    inputs["query"] = query.astype(inputs["query"].dtype)
    _compare(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@KINDS
@pytest.mark.parametrize("page_size", [64, 128, 256])
def test_page_sizes(page_size: int, kind: Kind) -> None:
    rng = np.random.default_rng(6)
    step = step_of(rng, [2, 1, 1, 1], [page_size - 1, 2 * page_size, 0, 300], page_size)
    inputs, attributes = _case(rng, step, 64, kind, page_size=page_size)
    _compare(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@KINDS
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("scale", [4, 0.05])
def test_peaked_and_flat_attention(scale: float, heads: int, kind: Kind) -> None:
    rng = np.random.default_rng(7)
    inputs, attributes = _case(rng, step_of(rng, [1, 2], [3000, 62]), heads, kind, scale=scale * 576**-0.5)
    found, expected = run_op("MlaDecoding", inputs, **attributes), attention(inputs, attributes)
    terms = _terms(kind)
    compare("output", found["output"], expected["output"], MOST[terms or kind] * (3 if scale > 1 and terms == 1 else 1))


@pytest.mark.small
@pytest.mark.parametrize("scale", [-(576**-0.5), 0.0])
@pytest.mark.parametrize("kind", FLAT)
def test_scores_that_fall_as_products_rise(kind: Kind, scale: float) -> None:
    """Over fp8_flat rows products are compared before they are multiplied."""
    rng = np.random.default_rng(28)
    inputs, attributes = _case(rng, step_of(rng, [1, 2], [300, 62]), 64, kind, scale=scale)
    _compare(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("scale", [0.05, 1, 4])
def test_two_terms_add_less_than_twice_what_the_cache_has_lost(scale: float, heads: int) -> None:
    """Both errors are relative to float64: the kernel's over the cached codes, the cache's over the values that were cached."""
    rng = np.random.default_rng(15)
    length, softmax_scale = 3000, scale * 576**-0.5
    step = step_of(rng, [1], [length - 1])
    latent, rope = (rng.standard_normal((length, width), np.float32) for width in (512, 64))
    pools = {}
    for row_format in ("f32", "fp8"):
        pages = layout(row_format)
        pools[row_format] = pages.empty(step.pages)
        pages.write(pools[row_format], *step.places(0, range(length)), latent, rope)
    inputs, attributes = _case(rng, step, heads, 2, scale=softmax_scale, pool=pools["fp8"])
    exact = attention({**inputs, "kv_cache": pools["f32"]}, attributes | {"row_format": "f32"})["output"]
    cached = attention(inputs, attributes)["output"]
    found = run_op("MlaDecoding", inputs, **attributes)["output"].astype(np.float64)
    lost = np.linalg.norm(cached - exact)
    compare("error", np.array(np.linalg.norm(found - cached) / lost), np.array(0.0), 2.0, absolute=True)


@LISTED
@BFLOAT16_ROWS
def test_large_rows_among_small_ones(row_format: str, listed: bool) -> None:
    """Scales on both sides of 2^7, from where on decoded codes are multiplied otherwise."""
    rng = np.random.default_rng(25)
    step = step_of(rng, [1, 1], [300, 2000])
    pages = layout(row_format)
    pool = long_pool(rng, step, pages)
    for sequence, every in ((0, 1), (1, 37)):
        tokens = np.arange(0, 300, every)
        latent = 2.0**16 * rng.standard_normal((len(tokens), pages.kv_lora_rank), np.float32)
        rope = rng.standard_normal((len(tokens), pages.qk_rope_head_dim), np.float32)
        pages.write(pool, *step.places(sequence, tokens), latent, rope)
    inputs, attributes = _case(rng, step, 64, row_format, pool=pool, scale=2.0**-20)
    if listed:
        inputs["indices"] = key_lists(rng, step, 200)
    _compare(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@KINDS
@pytest.mark.parametrize("listed", [False, pytest.param(True, marks=pytest.mark.small)], ids=["dense", "listed"])
@pytest.mark.parametrize("sizes", [(-20, -20), (17, 17), (17, -20), (-20, 0)], ids=str)
def test_parts_of_any_size(sizes: tuple[int, int], listed: bool, kind: Kind) -> None:
    """One sequence, whose keys are cut into parts: their results have two bytes a value, and f32's four where float16 does not hold them."""
    rng = np.random.default_rng(26)
    step, pages = step_of(rng, [1], [1023]), layout(_row_format(kind))
    pool = long_pool(rng, step, pages)
    for half, size in enumerate(sizes):
        tokens = np.arange(512 * half, 512 * (half + 1))  # whole tiles
        latent = 2.0**size * rng.standard_normal((512, pages.kv_lora_rank), np.float32)
        pages.write(pool, *step.places(0, tokens), latent, np.zeros((512, pages.qk_rope_head_dim), np.float32))
    inputs, attributes = _case(rng, step, 64, kind, pool=pool, scale=2.0 ** -(max(sizes) + 5))
    if listed:
        inputs["indices"] = np.arange(1024, dtype=np.int32)[None]
    _compare(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@pytest.mark.small
@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("sizes", [(17, 0), (0, 17), (-20, 17)], ids=str)
@BFLOAT16_ROWS
def test_parts_whose_halves_differ(row_format: str, sizes: tuple[int, int], sequences: int) -> None:
    """Of the parts' columns float16 holds 256, and the others not; the host cuts the keys of one sequence, a plan those of two."""
    rng = np.random.default_rng(30)
    step, pages = step_of(rng, [1] * sequences, [2047, 63][:sequences]), layout(row_format)
    pool = long_pool(rng, step, pages)
    latent = rng.standard_normal((2048, pages.kv_lora_rank), np.float32)
    latent *= 2.0 ** np.repeat(np.float32(sizes), pages.kv_lora_rank // 2)
    pages.write(pool, *step.places(0, np.arange(2048)), latent, np.zeros((2048, pages.qk_rope_head_dim), np.float32))
    inputs, attributes = _case(rng, step, 64, row_format, pool=pool, scale=2.0**-22)
    _compare(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@pytest.mark.small
@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("kind", [1, 2, *FLAT])
def test_codes_below_the_smallest_normal_one_count(kind: Kind, heads: int) -> None:
    """The weights' sum has those of 127 keys beside one that is 2^14 times as heavy."""
    rng = np.random.default_rng(29)
    step, pages = step_of(rng, [1], [127]), layout(_row_format(kind))
    pool, rope = pages.empty(step.pages), np.zeros((128, pages.qk_rope_head_dim), np.float32)
    rope[0, :2] = 5.0
    pages.write(pool, *step.places(0, range(128)), np.ones((128, pages.kv_lora_rank), np.float32), rope)
    inputs, attributes = _case(rng, step, heads, kind, pool=pool, scale=1.0)
    query = np.zeros(inputs["query"].shape, np.float32)
    query[:, :, 0] = 2.0**-7
    query[:, :, pages.kv_lora_rank : pages.kv_lora_rank + 2] = 1.0
    inputs["query"] = query.astype(inputs["query"].dtype)
    found, expected = run_op("MlaDecoding", inputs, **attributes), attention(inputs, attributes)
    compare("lse", found["lse"], expected["lse"], 2e-3, absolute=True)


@pytest.mark.multiprocessors(2)
@pytest.mark.parametrize("kind", [1, 2, *FLAT, "bf16"])
@pytest.mark.parametrize(
    ("sequences", "heads"), [pytest.param(4, 65, marks=pytest.mark.small), (4, 64), (140, 128), (280, 48)]
)
def test_more_tiles_than_places(sequences: int, heads: int, kind: Kind) -> None:
    """Too many sequences for the multiprocessors, so that none is cut; each of one or two blocks, with 0 to 15 tiles."""
    rng = np.random.default_rng(28)
    lengths = rng.permutation(np.resize([640, 577, 900, 705, 0, 1, 64, 576, 129, 512], sequences)).tolist()
    step = step_of(rng, [min(length, 1) for length in lengths], [max(length - 1, 0) for length in lengths])
    inputs, attributes = _case(rng, step, heads, kind)
    _compare(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@pytest.mark.small
@pytest.mark.multiprocessors(2)
@KINDS
def test_lists_of_more_tiles_than_places(kind: Kind) -> None:
    """Too many tokens for the multiprocessors, so that no list is cut. Rows differ in size, so that none has the scale of another one's place."""
    rng = np.random.default_rng(30)
    step, pages = step_of(rng, [1, 1, 1, 1], [700, 300, 0, 640]), layout(_row_format(kind))
    pool = long_pool(rng, step, pages)
    for sequence, cached in enumerate((700, 300, 0, 640)):
        tokens = np.arange(cached + 1)
        latent = (
            rng.standard_normal((len(tokens), pages.kv_lora_rank), np.float32) * 2.0 ** (tokens % 5 // 2 - 1)[:, None]
        )
        rope = rng.standard_normal((len(tokens), pages.qk_rope_head_dim), np.float32)
        pages.write(pool, *step.places(sequence, tokens), latent.astype(np.float32), rope)
    inputs, attributes = _case(rng, step, 64, kind, pool=pool)
    inputs["indices"] = key_lists(rng, step, 641)
    _compare(run_op("MlaDecoding", inputs, repeat=2, **attributes), inputs, attributes)


@pytest.mark.small
@pytest.mark.multiprocessors(132)
@pytest.mark.parametrize(
    ("new", "cached", "padding", "more_pages", "heads", "terms"),
    [
        (2, 2046, 0, 0, 128, 1),
        (2, 2046, 0, 0, 128, 2),
        (1, 2111, 1, 0, 128, 2),
        (4, 1900, 0, 0, 64, 1),
        (2, 40, 0, 31, 128, 2),
        (0, 500, 2, 24, 128, 1),
        (3, 200, 1, 0, 16, 2),
        (2, 900, 1, 0, 72, 2),
        (3, 500, 0, 20, 40, 1),
    ],
)
def test_one_sequence(new: int, cached: int, padding: int, more_pages: int, heads: int, terms: int) -> None:
    """Its parts are made by clusters where they are many, by the block table: parts may have no key, and blocks no rows. The last token
    of a block's rows may be one of no sequence."""
    rng = np.random.default_rng(27)
    step = step_of(rng, [new], [cached], padding=padding)
    inputs, attributes = _case(rng, step, heads, terms)
    inputs["block_table"] = np.pad(inputs["block_table"], ((0, 0), (0, more_pages)), constant_values=-1)
    inputs["sinks"] = rng.normal(size=heads).astype(np.float32)
    _compare(run_op("MlaDecoding", inputs, repeat=2, **attributes), inputs, attributes)


@pytest.mark.small
@pytest.mark.multiprocessors(132)
@KINDS
@pytest.mark.parametrize(("new", "cached"), [([2], [2046]), ([1, 1], [300, 5])], ids=["one sequence", "two"])
def test_an_output_that_is_not_aligned(new: list[int], cached: list[int], kind: Kind) -> None:
    """These kernels write four values at once, so that another one serves."""
    rng = np.random.default_rng(29)
    inputs, attributes = _case(rng, step_of(rng, new, cached), 128, kind)
    _compare(run_op("MlaDecoding", inputs, shift=4, **attributes), inputs, attributes)


@KINDS
def test_sinks(kind: Kind) -> None:
    rng = np.random.default_rng(8)
    inputs, attributes = _case(rng, step_of(rng, [2, 0, 3, 1], [5, 1, 0, 1000], padding=1), 5, kind)
    inputs["sinks"] = np.array([0.5, -40, 3, 200, -np.inf], np.float32)
    found = run_op("MlaDecoding", inputs, **attributes)
    _compare(found, inputs, attributes)
    compare_exactly("output under an all-taking sink", found["output"][:, 3], np.zeros_like(found["output"][:, 3]))


@KINDS
@pytest.mark.parametrize("heads", [1, 16, 32, 40, 128])
@pytest.mark.parametrize("width", [1, 63, 64, 65, 127, 128, 129, 641, 2048])
def test_list_widths(width: int, heads: int, kind: Kind) -> None:
    rng = np.random.default_rng(17)
    step = step_of(rng, [1, 2, 1, 1], [3000, 62, 0, 5000])
    inputs, attributes = _case(rng, step, heads, kind)
    inputs["indices"] = key_lists(rng, step, width)
    _compare(run_op("MlaDecoding", inputs, **attributes), inputs, attributes)


@KINDS
@pytest.mark.parametrize("heads", [16, 64])
def test_lists_of_one_key_again_and_again_and_of_none(heads: int, kind: Kind) -> None:
    rng = np.random.default_rng(18)
    inputs, attributes = _case(rng, step_of(rng, [1, 1, 1], [300, 5, 70]), heads, kind)
    inputs["indices"] = np.tile(np.array([[4]], np.int32), (3, 260))
    inputs["indices"][1, ::2] = -1
    inputs["indices"][2] = -1
    found = run_op("MlaDecoding", inputs, **attributes)
    _compare(found, inputs, attributes)
    compare_exactly("output without keys", found["output"][2], np.zeros_like(found["output"][2]))


@KINDS
@pytest.mark.parametrize("page_size", [64, 256])
@pytest.mark.parametrize("heads", [5, 128])
def test_sparse_prefill(heads: int, page_size: int, kind: Kind) -> None:
    rng = np.random.default_rng(19)
    step = step_of(rng, [40, 0, 7, 1], [300, 9, 0, 4095], page_size, padding=3)
    inputs, attributes = _case(rng, step, heads, kind, page_size=page_size)
    inputs["indices"] = key_lists(rng, step, 300)
    inputs["index_lengths"] = rng.integers(-1, 330, step.tokens).astype(np.int32)
    inputs["sinks"] = rng.standard_normal(heads).astype(np.float32)
    _compare(run_op("MlaPrefillSparse", inputs, **attributes), inputs, attributes)


@pytest.mark.small
@LISTED
@KINDS
@pytest.mark.parametrize("heads", [16, 64])
def test_pages_outside_the_pool_are_masked(heads: int, kind: Kind, listed: bool) -> None:
    rng = np.random.default_rng(9)
    step = step_of(rng, [2, 1, 1], [200, 130, 3])
    table = step.inputs["block_table"]
    table[0, 1], table[1, 0], table[2, 0] = -1, step.pages, -(2**31)
    inputs, attributes = _case(rng, step, heads, kind)
    if listed:
        inputs["indices"] = np.tile(np.arange(210, dtype=np.int32), (step.tokens, 1))
    for what, given in (("", inputs), ("behind a page of NaN", behind_a_page_of_nan(inputs, "kv_cache"))):
        found = run_op("MlaDecoding", given, **attributes)
        _compare(found, given, attributes, what)
        compare_exactly("output without a page", found["output"][3], np.zeros_like(found["output"][3]))


@KINDS
def test_a_query_that_is_not_a_number_spoils_its_own_row_only(kind: Kind) -> None:
    rng = np.random.default_rng(10)
    inputs, attributes = _case(rng, step_of(rng, [2, 1], [300, 70]), 40, kind)
    clean = run_op("MlaDecoding", inputs, **attributes)["output"]
    inputs["query"][1, 7, 3] = np.nan
    found = run_op("MlaDecoding", inputs, **attributes)["output"]
    assert np.isnan(found[1, 7].astype(np.float32)).any()
    others = np.ones(found.shape[:2], bool)
    others[1, 7] = False
    compare_exactly("the other rows", found[others], clean[others])


@LISTED
@KINDS
@pytest.mark.parametrize("heads", [16, 128])
def test_runs_are_bitwise_equal(heads: int, kind: Kind, listed: bool) -> None:
    rng = np.random.default_rng(11)
    step = step_of(rng, [1] * 8 + [3], [1000, 1, 63, 64, 65, 4000, 200, 31, 500])
    inputs, attributes = _case(rng, step, heads, kind)
    if listed:
        inputs["indices"] = key_lists(rng, step, 700)
    run_op("MlaDecoding", inputs, repeat=1000, **attributes)


@KINDS
def test_a_graph_gives_the_same_bits(kind: Kind) -> None:
    rng = np.random.default_rng(12)
    inputs, attributes = _case(rng, step_of(rng, [1, 2, 1], [1000, 62, 0]), 64, kind)
    plain = run_op("MlaDecoding", inputs, **attributes)
    captured = run_op("MlaDecoding", inputs, graph=True, repeat=3, **attributes)
    compare_exactly("output of the graph", captured["output"].view(np.int16), plain["output"].view(np.int16))


@pytest.mark.small
@LISTED
@KINDS
@pytest.mark.parametrize("cached", [[500], [300, 62, 0]], ids=["one sequence", "three"])
def test_calls_in_a_row_give_the_same_bits(cached: list[int], kind: Kind, listed: bool) -> None:
    """Kernels are launched early: those of a call may begin while the merge of the one before is at work in the same memory."""
    rng = np.random.default_rng(15)
    step = step_of(rng, [1] * len(cached), cached)
    inputs, attributes = _case(rng, step, 128, kind)
    if listed:
        inputs["indices"] = key_lists(rng, step, 300)
    alone = run_op("MlaDecoding", inputs, **attributes)
    found = run_op("MlaDecoding", inputs, graph=True, in_a_row=3, **attributes)
    for name in ("output", "lse"):
        compare_exactly(name, found[name].view(np.int32), alone[name].view(np.int32))


@pytest.mark.small
@LISTED
@KINDS
def test_garbage_is_survived(kind: Kind, listed: bool) -> None:
    rng = np.random.default_rng(13)
    step = step_of(rng, [1, 3, 2], [200, 62, 5])
    inputs, attributes = _case(rng, step, 16, kind)
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


@pytest.mark.parametrize("terms", [1, 2])
def test_in_a_layer(terms: int) -> None:
    """MlaAttention hands its absorbed queries to the kernel."""
    rng = np.random.default_rng(14)
    step = step_of(rng, [1, 2, 1, 1], [300, 62, 0, 1000])
    inputs, attributes = layer_case(rng, step, "fp8", (16, 128, 64, 128, 512), weights="bf16", dtype="bf16")
    exact = run_op("MlaAttention", inputs, **attributes)
    found = run_op("MlaAttention", inputs, **attributes | {"query_terms": terms})
    compare_exactly("kv_cache_out", found["kv_cache_out"], exact["kv_cache_out"])
    compare("output", found["output"], exact["output"].astype(np.float64), MOST[terms])
    assert not np.array_equal(found["output"], exact["output"]), "the other kernel ran"
