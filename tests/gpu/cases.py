"""Random cases for the attention ops, and the tolerances of each row format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from harness import Array, compare, compare_exactly
from large_reference import F32_SUMS, append, attention, branch_output, branch_query
from op_harness import Step, e4m3_weight, latent_pool, make_step

from mla_trt.formats import KvLayout
from mla_trt.ops import OPS, Op

HALF_TYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
# H, Dn, Dr, Dv, R
DIMENSIONS = {
    "small": (4, 24, 16, 20, 32),
    "one head": (1, 8, 2, 5, 37),
    "no rope": (2, 16, 0, 16, 24),
    "minicpm3": (40, 64, 32, 64, 256),
    "deepseek": (128, 128, 64, 128, 512),
    "deepseek of 8 GPUs": (16, 128, 64, 128, 512),
    "glm": (8, 192, 64, 256, 512),
}

# Rows of f32 are computed in f32. Else the query and the weights P are rounded to bf16 (8 bits, relative error up to
# 2^-8 each), and a peak of the softmax carries the error of its score into the output: 1e-2 of the largest output
# covers a spread of the scores of 5. The rounded query is known, so that it can be given to the reference: what is left
# is P (averaged over keys) and, in a bf16 output, its own 2^-9.
F32_TOLERANCE = 1e-5
TOLERANCE = 1e-2
ROUNDED_TOLERANCE = 5e-3


# Of the rows of cos and of sin: their type, and how many values they have behind those of the pairs.
TABLES = {
    "f32, longer": (("f32", 3), ("f32", 3)),
    "bf16, twice": (("bf16", 32), ("bf16", 32)),
    "f16": (("f16", 0), ("f16", 0)),
    "of two types": (("f16", 1), ("bf16", 8)),
}


def with_tables(
    rng: np.random.Generator, inputs: Mapping[str, Array], kind: str, prefix: str = ""
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The inputs with new tables of cos and sin, as rows of `TABLES`, NaN behind the pairs; and with f32 tables of the same values."""
    given, plain = dict(inputs), dict(inputs)
    for name, (dtype, more) in zip(("cos", "sin"), TABLES[kind], strict=True):
        rows, pairs = inputs[prefix + name].shape
        table = np.full((rows, pairs + more), np.nan, HALF_TYPES[dtype])
        table[:, :pairs] = rng.uniform(-1, 1, (rows, pairs)).astype(HALF_TYPES[dtype])
        given[prefix + name], plain[prefix + name] = table, table[:, :pairs].astype(np.float32)
    return given, plain


def step_of(
    rng: np.random.Generator,
    new: Sequence[int],
    cached: Sequence[int],
    page_size: int = 64,
    padding: int = 0,
    partitions: int = 128,
) -> Step:
    """``op_harness.make_step`` with as many parts in the schedule as an engine has."""
    step = make_step(rng, new, cached, page_size, padding)
    plan = OPS["MlaPlan"]
    given = {"tokens": np.zeros(step.tokens, np.int64), **step.inputs}
    attributes = plan.complete({"page_size": page_size, "num_partitions": partitions}, "")
    step.inputs["schedule"] = plan.reference(attributes, given)["schedule"]
    return step


def layout(row_format: str, rank: int = 512, rope: int = 64, page_size: int = 64, kv_scale: float = 0.0123) -> KvLayout:
    """Pages of the latent cache."""
    return KvLayout(
        page_size=page_size, row_format=row_format, kv_lora_rank=rank, qk_rope_head_dim=rope, kv_scale=kv_scale
    )


def kv_attributes(pages: KvLayout) -> dict[str, Any]:
    """The attributes that say what ``pages`` are."""
    names = ("kv_lora_rank", "qk_rope_head_dim", "page_size", "row_format", "kv_scale")
    return {name: getattr(pages, name) for name in names}


def long_pool(rng: np.random.Generator, step: Step, pages: KvLayout, mean: float = 0.0, spread: float = 1.0) -> Array:
    """Rows of all tokens among set bits. Full pages repeat 127 of them: rows of many keys take long to encode."""
    page, slot = np.divmod(np.arange(127 * pages.page_size), pages.page_size)
    latent = mean + spread * rng.standard_normal((len(page), pages.kv_lora_rank), np.float32)
    rope = spread * rng.standard_normal((len(page), pages.qk_rope_head_dim), np.float32)
    distinct = pages.empty(127)
    pages.write(distinct, page, slot, latent, rope)
    pool = np.full((step.pages, pages.page_words), -1, np.int32)
    lengths = step.inputs["cache_lengths"] + np.diff(step.inputs["query_offsets"])
    for sequence, length in enumerate(lengths.tolist()):
        full, rest = divmod(length, pages.page_size)
        pool[step.inputs["block_table"][sequence, :full]] = distinct[np.arange(full) % 127]
        tail = full * pages.page_size + np.arange(rest)
        pages.write(pool, *step.places(sequence, tail), latent[:rest], rope[:rest])
    return pool


def decoding_case(
    rng: np.random.Generator,
    step: Step,
    pages: KvLayout,
    heads: int,
    dtype: str = "f32",
    scale: float | None = None,
    pool: Array | None = None,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Inputs and attributes of MlaDecoding.

    Args:
        scale: of the softmax (None: scores of spread 1).
        pool: the pages (None: random rows among garbage).
    """
    query = rng.standard_normal((step.tokens, heads, pages.width), np.float32).astype(HALF_TYPES[dtype])
    query[step.inputs["token_sequence"] < 0] = np.nan  # padding may hold anything
    cache = latent_pool(rng, pages, step, with_new=True) if pool is None else pool
    inputs = {"query": query, **step.inputs, "kv_cache": cache}
    softmax_scale = pages.width**-0.5 if scale is None else scale
    return inputs, {**kv_attributes(pages), "softmax_scale": softmax_scale, "query_terms": 0}


def layer_case(
    rng: np.random.Generator,
    step: Step,
    row_format: str = "fp8",
    dimensions: tuple[int, int, int, int, int] = DIMENSIONS["small"],
    norm: bool = False,
    weights: str = "f32",
    dtype: str = "f32",
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Inputs and attributes of MlaAttention; ``dimensions`` are H, Dn, Dr, Dv, R."""
    heads, nope, rope, value, rank = dimensions
    pages = layout(row_format, rank, rope, step.page_size)
    attributes = {
        **kv_attributes(pages),
        "num_heads": heads,
        "qk_nope_head_dim": nope,
        "v_head_dim": value,
        "softmax_scale": (nope + rope) ** -0.5,
        "query_terms": 0,
    }
    tokens = step.tokens
    inputs: dict[str, Array] = {
        "query": rng.standard_normal((tokens, heads, nope + rope), np.float32),
        "latent": rng.standard_normal((tokens, rank), np.float32),
        "rope_key": rng.standard_normal((tokens, rope), np.float32),
    }
    if norm:
        inputs["norm_weight"] = rng.uniform(0.5, 1.5, rank).astype(np.float32)
    inputs = {name: values.astype(HALF_TYPES[dtype]) for name, values in inputs.items()}
    inputs |= {name: rng.uniform(-1, 1, (tokens, rope // 2)).astype(np.float32) for name in ("cos", "sin")}
    inputs |= step.inputs
    inputs["kv_cache"] = latent_pool(rng, pages, step, with_new=False)
    for name, shape in (("w_uk", (heads, rank, nope)), ("w_uv", (heads, value, rank))):
        if weights == "e4m3":
            inputs[name], inputs[f"{name}_scale"] = e4m3_weight(rng, *shape)
        elif weights != "none":
            spread = np.float32(shape[2] ** -0.5)
            inputs[name] = (spread * rng.standard_normal(shape, np.float32)).astype(HALF_TYPES[weights])
    return inputs, attributes


def branch_case(
    rng: np.random.Generator,
    step: Step,
    dimensions: tuple[int, int, int, int, int],
    dtype: str = "f32",
    unit: float = 2.0**-9,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Inputs and attributes of MlaDecodeBranchFp8.

    Products of the query's codes with W_UK are exact in f32 in any order, so that nothing is left open in what attention is
    asked: scales are powers of two (the largest of each group is 448 of them), codes multiples of 1/4, weights integers. The
    query's values are multiples of ``unit``: of 1/2, sums have no more than 13 bits.
    """
    heads, nope, _, _, rank = dimensions
    inputs, attributes = layer_case(rng, step, "fp8", dimensions, weights="e4m3", dtype=dtype)
    query = np.clip(np.round(rng.standard_normal((step.tokens, heads, nope)) / unit) * unit, -3.5, 3.5)
    for start in range(0, nope, 128):
        largest = rng.integers(start, min(start + 128, nope), (step.tokens, heads, 1))
        np.put_along_axis(query, largest, rng.choice([-3.5, 3.5], largest.shape), axis=2)
    inputs["query"][..., :nope] = query
    inputs["query"][:1, :1] = 0  # a group of scale 0
    inputs["w_uk"] = rng.integers(-8, 9, (heads, rank, nope)).astype(ml_dtypes.float8_e4m3fn)
    inputs["w_uk_scale"] = rng.choice([2.0**-6, 2.0**-5], inputs["w_uk_scale"].shape).astype(np.float32)
    return inputs, _known(OPS["MlaDecodeBranchFp8"], attributes)


def saturating(inputs: Mapping[str, Array], attributes: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    """A case of MlaDecodeBranchFp8 with queries beyond 1200, scores of a spread near 1, and sums that stay exact."""
    query = inputs["query"].copy()
    query[..., :3] *= 5000
    # the scale is 1200 / 448: sums of more than 64 terms would depend on where it is multiplied in
    query[..., 64 : query.shape[2] - attributes["qk_rope_head_dim"]] = 0
    return {**inputs, "query": query}, {**attributes, "softmax_scale": 1e-3 * attributes["kv_lora_rank"] ** -0.5}


def key_lists(rng: np.random.Generator, step: Step, width: int) -> Array:
    """Lists ``[T, width]`` with keys of the sequence, later ones, -1 anywhere, nonsense and duplicates; some are empty."""
    positions = step.inputs["positions"][:, None].astype(np.int64)
    lists = rng.integers(0, positions + 3, (step.tokens, width))
    lists[rng.random(lists.shape) < 0.1] = -1
    lists[rng.random(lists.shape) < 0.02] = 2**31 - 1
    lists[rng.random(lists.shape) < 0.02] = -(2**31)
    lists[::5, width // 3 :] = -1
    lists[3::7] = -1
    return lists.astype(np.int32)


def compare_attention(
    found: Mapping[str, Array], inputs: Mapping[str, Array], attributes: Mapping[str, Any], what: str = ""
) -> None:
    """``output`` and, where it is there, ``lse`` against the float64 reference on the same bytes."""
    prefix = f"{what} " if what else ""
    output_rounding = {np.dtype(np.float16): 2**-11, np.dtype(ml_dtypes.bfloat16): 2**-8}
    coarse = output_rounding.get(inputs["query"].dtype, 0.0)
    if attributes["row_format"] == "f32":
        exact = attention(inputs, attributes)
        compare(f"{prefix}output", found["output"], exact["output"], F32_TOLERANCE + coarse)
        if "lse" in found:
            compare(f"{prefix}lse", found["lse"], exact["lse"], 1e-4, absolute=True)
        return
    query = inputs["query"].astype(np.float32)
    rounded = query.astype(ml_dtypes.bfloat16).astype(np.float32)
    # both queries as heads of one call: the rows are read once
    both = attention(inputs, attributes, np.concatenate([query, rounded], axis=1))
    exact, bf16 = ({name: value[:, half] for name, value in both.items()} for half in _halves(query.shape[1]))
    compare(f"{prefix}output", found["output"], exact["output"], TOLERANCE)
    # rows of fp8_ds_mla are rounded to bf16 once their scales are in
    row_rounding = 2**-8 if attributes["row_format"] == "fp8_ds_mla" else 0.0
    tolerance = ROUNDED_TOLERANCE + coarse / 2 + row_rounding
    compare(f"{prefix}output (bf16 query)", found["output"], bf16["output"], tolerance)
    if "lse" in found:
        tolerance = 2e-2 if attributes["row_format"] == "fp8_ds_mla" else 2e-3
        compare(f"{prefix}lse (bf16 query)", found["lse"], bf16["lse"], tolerance, absolute=True)


def compare_branch(
    found: Mapping[str, Array],
    inputs: Mapping[str, Array],
    attributes: Mapping[str, Any],
    attend: Callable[[Mapping[str, Array], Mapping[str, Any]], Mapping[str, Array]],
    sums: float = F32_SUMS,
    attended: float = TOLERANCE,
) -> None:
    """The outputs of MlaDecodeBranchFp8, whose parts are compared each on what the part before gave.

    bf16 lies between the parts, and codes are functions of it. The query is exact (`branch_case`), so that with the latent
    that the same kernels make of it nothing is left but the error of sums.

    Args:
        attend: outputs of MlaDecoding from its inputs and attributes, by the kernels that made ``found``.
        sums: see `branch_output`.
        attended: tolerance of what attention gives.
    """
    query_rope = inputs["query"][:, :, inputs["query"].shape[2] - attributes["qk_rope_head_dim"] :]
    cache = append({**inputs, "query_rope": query_rope}, attributes)["kv_cache_out"]
    compare_exactly("kv_cache_out", found["kv_cache_out"], cache)
    query = branch_query(inputs, attributes)
    op = OPS["MlaDecoding"]
    given = {**inputs, "query": query.astype(ml_dtypes.bfloat16), "kv_cache": cache}
    given = {formal.name: given[formal.name] for formal in op.inputs if formal.name in given}
    known = _known(op, attributes)
    latent = attend(given, known)["output"]
    compare("attended latent", latent, attention(given, known)["output"], attended)
    expected, error = branch_output(inputs, latent, sums)
    rounding = {np.dtype(np.float32): 2**-24, np.dtype(np.float16): 2**-11}.get(inputs["query"].dtype, 2**-8)
    units = error + rounding * np.abs(expected)
    compare("output (of the error that sums and its type explain)", found["output"], expected, 1.0, units=units)


def _known(op: Op, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``attributes`` that ``op`` has."""
    names = {attribute.name for attribute in op.attributes}
    return {name: value for name, value in attributes.items() if name in names}


def _halves(heads: int) -> tuple[slice, slice]:
    return slice(0, heads), slice(heads, 2 * heads)
