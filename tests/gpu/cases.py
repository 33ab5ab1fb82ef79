"""Random cases for the attention ops, and the tolerances of each row format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from harness import Array, compare
from large_reference import attention
from op_harness import Step, latent_pool, make_step

from mla_trt.formats import KvLayout
from mla_trt.ops import OPS

HALF_TYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
DEEPSEEK = (512, 64)

# Rows of f32 are computed in f32. Else the query and the weights P are rounded to bf16 (8 bits, relative error up to
# 2^-9 each), and a peak of the softmax carries the error of its score into the output: 1e-2 of the largest output
# covers a spread of the scores of 5. The rounded query is known, so that it can be given to the reference: what is left
# is P (averaged over keys) and, in a bf16 output, its own 2^-9.
F32_TOLERANCE = 1e-5
TOLERANCE = 1e-2
ROUNDED_TOLERANCE = 5e-3


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
    return inputs, {**kv_attributes(pages), "softmax_scale": softmax_scale}


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


def _halves(heads: int) -> tuple[slice, slice]:
    return slice(0, heads), slice(heads, 2 * heads)
