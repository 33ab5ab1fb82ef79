"""MlaAttention, MlaSparseAttention and MlaDecodeBranchFp8 on the GPU.

Cache rows are compared with the reference's bytes. The output is compared with float64 attention over the rows that the
kernels wrote: a norm's last bit may move a code, and what it moves in the output is no error of attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from cases import DIMENSIONS, HALF_TYPES, branch_case, compare_branch, layer_case, saturating, step_of
from cases import TOLERANCE as ATTENDED_TOLERANCE
from harness import Array, compare, compare_exactly, run_op
from large_reference import E4M3_SUMS, F32_SUMS, append, attention, layout_of, projected
from op_harness import CODE_STEP, Step, assert_rows_close, garbage_pool, reference

from mla_trt.formats import ROW_FORMATS, IndexLayout
from mla_trt.ops import OPS

STEPS = {
    "ragged": ([3, 1, 5], [4, 70, 0], 0),
    "page borders": ([1, 1, 1, 2], [62, 63, 64, 63], 0),
    "padding": ([2, 0, 2], [1, 3, 80], 3),
    "no sequence": ([], [], 0),
    "padding only": ([], [], 2),
    "no new tokens": ([0, 0], [5, 6], 2),
    "decode": ([1] * 9, [0, 1, 62, 63, 64, 500, 129, 4095, 33], 0),
    # above 8 tokens a sequence long prompts and others take different kernels
    "a prompt": ([40], [3], 0),
    "a prompt beside few": ([1, 70, 2, 0, 9, 8], [70, 5, 64, 7, 0, 3], 4),
    "prompts and padding": ([20, 30], [0, 200], 30),
}
SMALL = DIMENSIONS["small"]
# Not in f32: the query before and after W_UK, both weights, P, the output before W_UV are rounded to bf16.
TOLERANCE = 1.5e-2
F32_TOLERANCE = 2e-5


def _expected_output(
    inputs: Mapping[str, Array], attributes: Mapping[str, Any], appended: Mapping[str, Array], cache: Array
) -> Array:
    """Absorbed attention in float64 over ``cache``."""
    nope = inputs["query"].astype(np.float64)[:, :, : attributes["qk_nope_head_dim"]]
    if "w_uk" in inputs:
        nope = projected(nope, inputs["w_uk"], inputs.get("w_uk_scale"))
    query = np.concatenate([nope, appended["query_rope_out"]], axis=2)
    output = attention({**inputs, "kv_cache": cache}, attributes, query)["output"]
    if "w_uv" in inputs:
        output = projected(output, inputs["w_uv"], inputs.get("w_uv_scale"))
    return output


def _check_cache(
    inputs: Mapping[str, Array], attributes: Mapping[str, Any], step: Step, found: Array, expected: Array
) -> None:
    if "norm_weight" in inputs:
        row_format = attributes["row_format"]
        assert_rows_close(layout_of(attributes), found, expected, step.new_places(), CODE_STEP[row_format])
    else:
        compare_exactly("kv_cache_out", found, expected)


def _check(
    inputs: dict[str, Array],
    attributes: dict[str, Any],
    step: Step,
    op_type: str = "MlaAttention",
    outputs: list[str] | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> dict[str, Array]:
    found = run_op(op_type, inputs, outputs, **options, **attributes)
    appended = append({**inputs, "query_rope": inputs["query"][:, :, attributes["qk_nope_head_dim"] :]}, attributes)
    _check_cache(inputs, attributes, step, found["kv_cache_out"], appended["kv_cache_out"])
    selection = {"indices": found["indices"]} if "indices" in found else {}
    expected = _expected_output({**inputs, **selection}, attributes, appended, found["kv_cache_out"])
    if tolerance is None:
        tolerance = F32_TOLERANCE if attributes["row_format"] == "f32" else TOLERANCE
    rounding = {np.dtype(np.float32): 0.0, np.dtype(np.float16): 2**-10}.get(inputs["query"].dtype, 2**-8)
    compare("output", found["output"], expected, tolerance + rounding)
    return found


@pytest.mark.small
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_steps(row_format: str, case: tuple[list[int], list[int], int]) -> None:
    rng = np.random.default_rng(1)
    step = step_of(rng, *case[:2], padding=case[2])
    found = _check(*layer_case(rng, step, row_format), step)
    padding = found["output"][step.inputs["token_sequence"] < 0]
    compare_exactly("output of padding", padding, np.zeros_like(padding))


@pytest.mark.parametrize("dimensions", DIMENSIONS.values(), ids=DIMENSIONS.keys())
@pytest.mark.parametrize("weights", ["f32", "f16", "bf16", "e4m3"])
@pytest.mark.parametrize("row_format", ["f32", "bf16", "fp8"])
def test_weights(row_format: str, weights: str, dimensions: tuple[int, int, int, int, int]) -> None:
    rng = np.random.default_rng(2)
    step = step_of(rng, [3, 1], [4, 200])
    _check(*layer_case(rng, step, row_format, dimensions, weights=weights), step)


@pytest.mark.small
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_types(row_format: str, dtype: str) -> None:
    rng = np.random.default_rng(3)
    step = step_of(rng, [3, 1, 1], [4, 200, 0], padding=1)
    _check(*layer_case(rng, step, row_format, DIMENSIONS["deepseek of 8 GPUs"], weights=dtype, dtype=dtype), step)


@pytest.mark.small
@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 17, 64, 65, 128, 300])
@pytest.mark.parametrize("weights", ["bf16", "e4m3"])
def test_token_counts(weights: str, tokens: int) -> None:
    rng = np.random.default_rng(4)
    step = step_of(rng, [1] * tokens, rng.integers(0, 200, tokens).tolist())
    _check(*layer_case(rng, step, "fp8", DIMENSIONS["deepseek of 8 GPUs"], weights=weights, dtype="bf16"), step)


@pytest.mark.small
@pytest.mark.parametrize("dimensions", DIMENSIONS.values(), ids=DIMENSIONS.keys())
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("tokens", [20, 70])
def test_codes_of_many_tokens(tokens: int, dtype: str, dimensions: tuple[int, int, int, int, int]) -> None:
    rng = np.random.default_rng(5)
    step = step_of(rng, [5] * (tokens // 5), rng.integers(0, 90, tokens // 5).tolist(), padding=1)
    _check(*layer_case(rng, step, "fp8", dimensions, weights="e4m3", dtype=dtype), step)


# The product with W_UV of up to eight tokens merges the parts of their keys, or of their lists, itself.
FEW_TOKENS = {
    "a token": ([1], [700], 0),
    "two": ([2], [700], 0),
    "three": ([3], [700], 0),
    "a token and padding": ([1], [700], 1),
    "no new token": ([0], [700], 2),
    "two sequences": ([1, 1], [700, 2100], 0),
    "four, of which not all are in parts": ([1, 1, 1, 1], [0, 2100, 63, 700], 0),
    "new tokens and padding": ([3, 0, 2], [1500, 70, 5], 2),
    "eight": ([1] * 8, [1023, 3, 64, 0, 500, 2, 1000, 63], 0),
    "nine": ([1] * 9, [1023, 3, 64, 0, 500, 2, 1000, 63, 700], 0),
}
MANY_PARTS = ([1], [6100], 0)  # of 64 keys: more than a warp has lanes
E4M3_PRODUCTS = 5e-2


@pytest.mark.small
@pytest.mark.parametrize("case", [*FEW_TOKENS.values(), MANY_PARTS], ids=[*FEW_TOKENS, "many parts"])
@pytest.mark.parametrize("weights", ["bf16", "e4m3"])
@pytest.mark.parametrize(
    ("row_format", "terms"), [*((row_format, 0) for row_format in ROW_FORMATS), ("fp8", 2), ("fp8_flat", 2)]
)
def test_few_tokens(row_format: str, terms: int, weights: str, case: tuple[list[int], list[int], int]) -> None:
    rng = np.random.default_rng(17)
    step = step_of(rng, *case[:2], padding=case[2])
    dimensions = DIMENSIONS["deepseek of 8 GPUs"]
    inputs, attributes = layer_case(rng, step, row_format, dimensions, weights=weights, dtype="bf16")
    attributes |= {"query_terms": terms, "kv_scale": 0.01}
    inputs["sinks"] = rng.standard_normal(inputs["query"].shape[1]).astype(np.float32)
    tolerance = E4M3_PRODUCTS if terms else None
    found = _check(inputs, attributes, step, tolerance=tolerance, repeat=3)
    padding = found["output"][step.inputs["token_sequence"] < 0]
    compare_exactly("output of padding", padding, np.zeros_like(padding))
    inputs["indices"] = rng.integers(-1, 702, (step.tokens, 300)).astype(np.int32)
    attributes |= {"index_head_dim": 0, "top_k": 300}
    _check(inputs, attributes, step, "MlaSparseAttention", ["output", "kv_cache_out"], tolerance)


@pytest.mark.small
@pytest.mark.parametrize("weights", ["bf16", "e4m3"])
def test_few_tokens_whose_parts_are_cut_again(weights: str) -> None:
    """By a plan for the emulated GPU's 16 multiprocessors, of three parts each."""
    rng = np.random.default_rng(21)
    step = step_of(rng, [1] * 6, [2111] * 6)
    _check(*layer_case(rng, step, "bf16", DIMENSIONS["deepseek of 8 GPUs"], weights=weights, dtype="bf16"), step)


@pytest.mark.small
@pytest.mark.parametrize(
    "dimensions", [(20, 128, 64, 72, 512), (12, 192, 64, 256, 512), (128, 64, 64, 40, 512)], ids=str
)
@pytest.mark.parametrize("weights", ["bf16", "e4m3"])
def test_few_tokens_of_any_dimensions(weights: str, dimensions: tuple[int, int, int, int, int]) -> None:
    """Of heads whose outputs blocks share, and whose number is no multiple of what a product of a warp has."""
    rng = np.random.default_rng(20)
    step = step_of(rng, [1, 2, 1], [700, 70, 1300])
    _check(*layer_case(rng, step, "bf16", dimensions, weights=weights, dtype="bf16"), step, repeat=3)


@pytest.mark.small
@pytest.mark.parametrize("sizes", [(-20, -20), (17, 17), (17, -20), (-20, 0)], ids=str)
@pytest.mark.parametrize("row_format", ["bf16", "fp8_ds_mla"])
def test_one_sequence_of_any_size(row_format: str, sizes: tuple[int, int]) -> None:
    """Parts that float16 does not hold are f32, and the product with W_UV that merges them reads them so."""
    rng = np.random.default_rng(19)
    step = step_of(rng, [1], [1023])
    dimensions = DIMENSIONS["deepseek of 8 GPUs"]
    inputs, attributes = layer_case(rng, step, row_format, dimensions, weights="bf16", dtype="bf16")
    pages = layout_of(attributes)
    for half, size in enumerate(sizes):
        tokens = np.arange(512 * half, min(512 * (half + 1), 1023))  # the new token's is written by the op
        latent = 2.0**size * rng.standard_normal((len(tokens), pages.kv_lora_rank), np.float32)
        rope = np.zeros((len(tokens), pages.qk_rope_head_dim), np.float32)
        pages.write(inputs["kv_cache"], *step.places(0, tokens), latent, rope)
    inputs["latent"] = (inputs["latent"].astype(np.float32) * 2.0 ** sizes[1]).astype(inputs["latent"].dtype)
    _check(inputs, {**attributes, "softmax_scale": 2.0 ** -(max(sizes) + 5)}, step, repeat=3)


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_norm(row_format: str) -> None:
    rng = np.random.default_rng(5)
    step = step_of(rng, [3, 1], [4, 2])
    for dimensions in (SMALL, DIMENSIONS["deepseek of 8 GPUs"]):
        inputs, attributes = layer_case(rng, step, row_format, dimensions, norm=True)
        _check(inputs, {**attributes, "epsilon": 0.1}, step)


@pytest.mark.parametrize("row_format", ["f32", "fp8"])
def test_absorbed_export_has_no_weights(row_format: str) -> None:
    rng = np.random.default_rng(6)
    step = step_of(rng, [3, 1], [4, 2], padding=1)
    _check(*layer_case(rng, step, row_format, (4, 32, 16, 32, 32), weights="none"), step)
    _check(*layer_case(rng, step, row_format, (16, 512, 64, 512, 512), weights="none", dtype="bf16"), step)


@pytest.mark.parametrize("row_format", ["f32", "fp8"])
@pytest.mark.parametrize("interleaved", [0, 1])
def test_sinks_rope_rows_and_page_copies(interleaved: int, row_format: str) -> None:
    rng = np.random.default_rng(7)
    step = step_of(rng, [3, 0, 2], [4, 2, 0], padding=1)
    inputs, attributes = layer_case(rng, step, row_format)
    attributes["rope_interleaved"] = interleaved
    inputs["sinks"] = np.array([0.5, -3, 100, -np.inf], np.float32)
    inputs["cos"], inputs["sin"] = (rng.uniform(-1, 1, (9, 8)).astype(np.float32) for _ in range(2))
    inputs["rope_rows"] = rng.integers(0, 9, step.tokens).astype(np.int32)
    # a fork: the first page of sequence 0 was shared, and is now copied to a page of its own
    home, source = int(step.inputs["block_table"][0, 0]), step.free[0]
    inputs["kv_cache"][[home, source]] = inputs["kv_cache"][[source, home]]
    inputs["page_copies"] = np.array([[source, home], [-1, 0]], np.int32)
    for in_place in (False, True):
        _check(inputs, attributes, step, in_place=in_place, repeat=3)


def test_in_a_graph() -> None:
    rng = np.random.default_rng(8)
    step = step_of(rng, [1] * 5, [4, 200, 64, 0, 700])
    for row_format in ("f32", "bf16", "fp8"):
        inputs, attributes = layer_case(rng, step, row_format, DIMENSIONS["deepseek of 8 GPUs"], weights="bf16")
        _check(inputs, attributes, step, graph=True, repeat=3)


@pytest.mark.parametrize("dimensions", ["small", "deepseek of 8 GPUs"])
@pytest.mark.parametrize("row_format", ["f32", "fp8", "fp8_ds_mla"])
def test_sparse_with_the_selection_of_another_layer(row_format: str, dimensions: str) -> None:
    rng = np.random.default_rng(9)
    step = step_of(rng, [3, 1, 2], [4, 900, 0], padding=1)
    inputs, attributes = layer_case(rng, step, row_format, DIMENSIONS[dimensions])
    attributes |= {"index_head_dim": 0, "top_k": 50}
    inputs["indices"] = rng.integers(-1, 700, (step.tokens, 50)).astype(np.int32)
    found = _check(inputs, attributes, step, "MlaSparseAttention", ["output", "kv_cache_out", "indices"])
    compare_exactly("indices", found["indices"], inputs["indices"])
    _check(inputs, attributes, step, "MlaSparseAttention", ["output", "kv_cache_out"])


@pytest.mark.parametrize("row_format", ["f32", "fp8"])
def test_a_long_prompt_over_lists(row_format: str) -> None:
    """More tokens than are held absorbed at a time."""
    rng = np.random.default_rng(13)
    step = step_of(rng, [1100, 3], [4, 90], padding=2)
    inputs, attributes = layer_case(rng, step, row_format, DIMENSIONS["small"])
    attributes |= {"index_head_dim": 0, "top_k": 20}
    inputs["indices"] = rng.integers(-1, step.inputs["positions"][:, None] + 2, (step.tokens, 20)).astype(np.int32)
    _check(inputs, attributes, step, "MlaSparseAttention", ["output", "kv_cache_out"])


def _add_indexer(
    rng: np.random.Generator,
    step: Step,
    inputs: dict[str, Array],
    attributes: dict[str, Any],
    heads: int,
    **indexer: Any,
) -> None:
    """What an indexer of this many heads of 128 values takes, and keys of it in the cache."""
    attributes |= {"index_head_dim": 128, "index_rope_dim": 64, **indexer}
    pages = IndexLayout(page_size=64, index_format=attributes["index_format"], index_head_dim=128)
    cache = garbage_pool(rng, pages, step.pages)
    for sequence, length in enumerate(step.inputs["cache_lengths"].tolist()):
        pages.write(cache, *step.places(sequence, range(length)), rng.standard_normal((length, 128), np.float32))
    inputs |= {
        "index_query": rng.standard_normal((step.tokens, heads, 128), np.float32),
        "index_key": rng.standard_normal((step.tokens, 128), np.float32),
        "index_weights": rng.standard_normal((step.tokens, heads), np.float32),
        "index_cos": rng.uniform(-1, 1, (step.tokens, 32)).astype(np.float32),
        "index_sin": rng.uniform(-1, 1, (step.tokens, 32)).astype(np.float32),
        "indexer_cache": cache,
    }


@pytest.mark.parametrize("heads", [8, 64])
@pytest.mark.parametrize("index_format", ["f32", "fp8"])
@pytest.mark.parametrize("row_format", ["f32", "fp8", "fp8_ds_mla"])
def test_sparse_with_an_indexer(row_format: str, index_format: str, heads: int) -> None:
    rng = np.random.default_rng(10)
    step = step_of(rng, [3, 1, 2], [4, 900, 0], padding=1)
    inputs, attributes = layer_case(rng, step, row_format, DIMENSIONS["deepseek of 8 GPUs"])
    _add_indexer(rng, step, inputs, attributes, heads, index_format=index_format, top_k=64)
    found = _check(inputs, attributes, step, "MlaSparseAttention")
    expected = reference("MlaSparseAttention", inputs, **attributes)
    compare_exactly("indexer_cache_out", found["indexer_cache_out"], expected["indexer_cache_out"])
    # scores that are equal up to their last bits may change places at the threshold
    for token in range(step.tokens):
        chosen, wanted = (set(lists["indices"][token].tolist()) - {-1} for lists in (found, expected))
        assert len(chosen) == len(wanted), f"token {token}: {len(chosen)} keys selected, expected {len(wanted)}"
        assert len(chosen - wanted) <= 1, f"token {token}: {sorted(chosen - wanted)} for {sorted(wanted - chosen)}"


@pytest.mark.parametrize(
    ("new", "top_k"),
    [
        pytest.param([1, 1, 1], 40, marks=pytest.mark.small),
        pytest.param([5, 0, 30], 40, marks=pytest.mark.small),
        pytest.param([0, 0], 4, marks=pytest.mark.small),
        pytest.param([], 400, marks=pytest.mark.small),
        pytest.param([2, 1], 400, marks=pytest.mark.small),
        ([1100, 3], 20),
    ],
)
def test_the_layer_is_its_parts(new: list[int], top_k: int) -> None:
    """Rows and queries are made beside the index scores, in windows too: what comes out is what the indexer and then a layer over
    its lists give, to the bit."""
    rng = np.random.default_rng(15)
    step = step_of(rng, new, [70, 300, 4][: len(new)], padding=2)
    inputs, attributes = layer_case(rng, step, "fp8", DIMENSIONS["small"])
    without = {**attributes, "index_head_dim": 0, "top_k": top_k}
    layer_inputs = dict(inputs)
    _add_indexer(rng, step, inputs, attributes, 64, index_format="fp8", top_k=top_k)
    found = run_op("MlaSparseAttention", inputs, graph=True, repeat=3, in_a_row=2, **attributes)
    index_inputs = {name: inputs[name] for name in (i.name for i in OPS["MlaIndexer"].inputs) if name in inputs}
    index_attributes = {
        name: attributes[name] for name in (a.name for a in OPS["MlaIndexer"].attributes) if name in attributes
    }
    lists = run_op("MlaIndexer", index_inputs, **index_attributes)
    after = run_op(
        "MlaSparseAttention", {**layer_inputs, "indices": lists["indices"]}, ["output", "kv_cache_out"], **without
    )
    compare_exactly("indices", found["indices"], lists["indices"])
    compare_exactly("indexer_cache_out", found["indexer_cache_out"], lists["indexer_cache_out"])
    for name in ("output", "kv_cache_out"):
        compare_exactly(name, found[name], after[name])


def _check_branch(
    inputs: dict[str, Array],
    attributes: dict[str, Any],
    sums: float = F32_SUMS,
    attended: float = ATTENDED_TOLERANCE,
    **options: Any,
) -> dict[str, Array]:
    found = run_op("MlaDecodeBranchFp8", inputs, **options, **attributes)
    compare_branch(
        found, inputs, attributes, lambda given, known: run_op("MlaDecoding", given, **known), sums, attended
    )
    return found


@pytest.mark.small
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
def test_decode_branch_steps(case: tuple[list[int], list[int], int]) -> None:
    rng = np.random.default_rng(11)
    _check_branch(*branch_case(rng, step_of(rng, *case[:2], padding=case[2]), SMALL))


@pytest.mark.parametrize("dimensions", DIMENSIONS.values(), ids=DIMENSIONS.keys())
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_decode_branch_dimensions(dtype: str, dimensions: tuple[int, int, int, int, int]) -> None:
    rng = np.random.default_rng(12)
    _check_branch(*branch_case(rng, step_of(rng, [1, 2], [70, 3]), dimensions, dtype))


@pytest.mark.parametrize("dimensions", ["small", "deepseek of 8 GPUs"])
def test_decode_branch_saturates(dimensions: str) -> None:
    """Values above 1200 are taken as 1200."""
    rng = np.random.default_rng(16)
    _check_branch(*saturating(*branch_case(rng, step_of(rng, [1, 2], [70, 3]), DIMENSIONS[dimensions])))


@pytest.mark.small
@pytest.mark.parametrize("tokens", [1, 8, 17, 128])
def test_decode_branch_token_counts(tokens: int) -> None:
    rng = np.random.default_rng(13)
    step = step_of(rng, [1] * tokens, rng.integers(0, 200, tokens).tolist())
    on_codes = tokens > 16  # products of the codes themselves, on SM90
    case = branch_case(rng, step, DIMENSIONS["deepseek of 8 GPUs"], "bf16", unit=0.5 if on_codes else 2.0**-9)
    _check_branch(*case, sums=E4M3_SUMS if on_codes else F32_SUMS, repeat=3)


@pytest.mark.small
@pytest.mark.parametrize("terms", [0, 2])
@pytest.mark.parametrize("case", [*FEW_TOKENS.values(), MANY_PARTS], ids=[*FEW_TOKENS, "many parts"])
def test_decode_branch_of_few_tokens(case: tuple[list[int], list[int], int], terms: int) -> None:
    rng = np.random.default_rng(18)
    step = step_of(rng, *case[:2], padding=case[2])
    inputs, attributes = branch_case(rng, step, DIMENSIONS["deepseek of 8 GPUs"], "bf16")
    attended = E4M3_PRODUCTS if terms else ATTENDED_TOLERANCE
    _check_branch(inputs, attributes | {"query_terms": terms}, attended=attended, repeat=3)


def test_decode_branch_over_lists_with_sinks_and_page_copies() -> None:
    rng = np.random.default_rng(14)
    step = step_of(rng, [1, 2], [6, 3])
    inputs, attributes = branch_case(rng, step, SMALL)
    inputs["indices"] = np.array([[0, 4, -1], [2, 3, 9], [-1, -1, -1]], np.int32)
    inputs["sinks"] = np.array([0.5, -3, 1, -np.inf], np.float32)
    inputs["page_copies"] = np.array([[step.free[0], step.free[1]]], np.int32)
    for in_place in (False, True):
        found = _check_branch(inputs, attributes, in_place=in_place)
        compare_exactly("output of nothing attended", found["output"][2], np.zeros_like(found["output"][2]))


def test_decode_branch_in_a_graph() -> None:
    rng = np.random.default_rng(15)
    step = step_of(rng, [1, 1], [70, 3])
    _check_branch(*branch_case(rng, step, DIMENSIONS["deepseek of 8 GPUs"], "bf16"), graph=True, repeat=3)
