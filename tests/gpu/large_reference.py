"""The op set's references for large cases: whole arrays at a time instead of loops over tokens, heads and pairs.

``tests/gpu/test_large_reference.py`` compares them with the op set's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mla_trt.formats import KvLayout
from mla_trt.ops import OPS
from mla_trt.ops.decode_branch_fp8 import _quantized_reference
from mla_trt.ops.reference import copied_pages, dequantized

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


def layout_of(attributes: Mapping[str, Any]) -> KvLayout:
    """The pages that a node's attributes describe."""
    names = ("page_size", "row_format", "kv_lora_rank", "qk_rope_head_dim", "kv_scale")
    return KvLayout(**{name: attributes[name] for name in names if name in attributes})


def places(inputs: Mapping[str, Array], pages: int, page_size: int, sequence: int, keys: Array) -> tuple[Array, Array]:
    """Page of each key of a sequence, -1 where the block table has none in the pool; and slot."""
    row = inputs["block_table"][sequence].astype(np.int64)
    column = keys.astype(np.int64) // page_size
    page = np.full(len(keys), -1, np.int64)
    inside = column < len(row)
    page[inside] = row[column[inside]]
    page[(page < 0) | (page >= pages)] = -1
    return page, keys % page_size


def _cached(inputs: Mapping[str, Array], layout: KvLayout, sequence: int, count: int) -> tuple[Array, Float64, Float64]:
    """Which of a sequence's first ``count`` keys are on pages of the pool; and of those latent ``[n, R]`` and rope ``[n, Dr]``."""
    page, slot = places(inputs, len(inputs["kv_cache"]), layout.page_size, sequence, np.arange(count))
    present = page >= 0
    latent, rope = layout.read(inputs["kv_cache"], page[present], slot[present])
    return present, latent.astype(np.float64), rope.astype(np.float64)


def attention(
    inputs: Mapping[str, Array], attributes: Mapping[str, Any], query: Array | None = None
) -> dict[str, Float64]:
    """``output`` and ``lse`` of MlaDecoding and MlaPrefillSparse.

    Args:
        inputs: the op's.
        attributes: the op's.
        query: instead of ``inputs["query"]``; its heads may be those of the op several times over.
    """
    layout = layout_of(attributes)
    query = (inputs["query"] if query is None else query).astype(np.float64)
    tokens, heads, _ = query.shape
    output = np.zeros((tokens, heads, layout.kv_lora_rank))
    lse = np.full((tokens, heads), -np.inf)
    sinks = np.resize(inputs["sinks"], heads) if "sinks" in inputs else None
    sequence_of = inputs["token_sequence"]
    for sequence in np.unique(sequence_of[sequence_of >= 0]).tolist():
        members = np.flatnonzero(sequence_of == sequence)
        positions = inputs["positions"][members].astype(np.int64)
        present, latent, rope = _cached(inputs, layout, sequence, int(positions.max()) + 1)
        rows = np.concatenate([latent, rope], axis=1)
        row_of = np.cumsum(present) - 1
        for token, position in zip(members.tolist(), positions.tolist(), strict=True):
            if "indices" in inputs:
                listed = inputs["indices"][token].astype(np.int64)
                if "index_lengths" in inputs:
                    listed = listed[: max(int(inputs["index_lengths"][token]), 0)]
                listed = listed[(listed >= 0) & (listed <= position)]
                chosen = rows[row_of[listed[present[listed]]]]
            else:
                chosen = rows[: int(present[: position + 1].sum())]
            if not len(chosen):
                continue
            scores = float(np.float32(attributes["softmax_scale"])) * (query[token] @ chosen.T)
            top = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - top)
            total = weights.sum(axis=1)
            lse[token] = np.log(total) + top[:, 0]
            if sinks is not None:
                with np.errstate(over="ignore"):
                    total = total + np.exp(sinks.astype(np.float64) - top[:, 0])
            output[token] = weights @ chosen[:, : layout.kv_lora_rank] / total[:, None]
    return {"output": output, "lse": lse}


def prefill(inputs: Mapping[str, Array], attributes: Mapping[str, Any]) -> dict[str, Float64]:
    """``output`` and ``lse`` of MlaPrefill."""
    layout = layout_of(attributes)
    query = inputs["query"].astype(np.float64)
    w_uk = dequantized(inputs["w_uk"], inputs.get("w_uk_scale"))
    w_uv = dequantized(inputs["w_uv"], inputs.get("w_uv_scale"))
    tokens, heads, _ = query.shape
    nope = w_uk.shape[2]
    output = np.zeros((tokens, heads, w_uv.shape[1]))
    lse = np.full((tokens, heads), -np.inf)
    sequence_of = inputs["token_sequence"]
    for sequence in np.unique(sequence_of[sequence_of >= 0]).tolist():
        members = np.flatnonzero(sequence_of == sequence)
        positions = inputs["positions"][members]
        present, latent, rope = _cached(inputs, layout, sequence, int(positions.max()) + 1)
        visible = np.flatnonzero(present) <= positions[:, None]
        for head in range(heads) if len(latent) else ():
            own = query[members, head]
            scores = own[:, :nope] @ (latent @ w_uk[head]).T + own[:, nope:] @ rope.T
            scores = np.where(visible, attributes["softmax_scale"] * scores, -np.inf)
            top = scores.max(axis=1)
            top[~visible.any(axis=1)] = 0
            weights = np.exp(scores - top[:, None])
            total = weights.sum(axis=1)
            with np.errstate(divide="ignore", over="ignore"):  # no key; a sink that takes all
                lse[members, head] = np.log(total) + top
                share = np.exp(float(inputs["sinks"][head]) - top) if "sinks" in inputs else 0.0
            output[members, head] = weights @ (latent @ w_uv[head].T) / np.where(total > 0, total + share, 1)[:, None]
    return {"output": output, "lse": lse}


def _rotated(values: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """``values`` ``[T, ..., Dr]`` rotated in their own arithmetic; cos and sin ``[T, Dr/2]``."""
    shape = (len(values), *[1] * (values.ndim - 2), cos.shape[1])
    cos, sin = cos.reshape(shape).astype(values.dtype), sin.reshape(shape).astype(values.dtype)
    half = cos.shape[-1]
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    rotated = np.empty_like(values)
    a, b = values[..., first], values[..., second]
    rotated[..., first] = a * cos - b * sin
    rotated[..., second] = a * sin + b * cos
    return rotated


def append(
    inputs: Mapping[str, Array], attributes: Mapping[str, Any], query_type: type[np.floating[Any]] = np.float64
) -> dict[str, Array]:
    """``query_rope_out`` (rotated in ``query_type``) and ``kv_cache_out`` of MlaFusedRopeRmsNormQuantization."""
    op = OPS["MlaFusedRopeRmsNormQuantization"]
    known = {attribute.name for attribute in op.attributes}
    complete = op.complete({name: value for name, value in attributes.items() if name in known}, op.name)
    pages = complete.kv_layout()
    query = inputs["query_rope"].astype(query_type)
    key = inputs["rope_key"].astype(np.float32)
    latent = inputs["latent"].astype(np.float64)
    if "norm_weight" in inputs:
        mean = np.mean(latent**2, axis=1, keepdims=True)
        latent = latent / np.sqrt(mean + complete.number("epsilon")) * inputs["norm_weight"].astype(np.float64)
    tokens = len(query)
    if pages.qk_rope_head_dim and tokens:
        rows = np.clip(inputs.get("rope_rows", np.arange(tokens)), 0, len(inputs["cos"]) - 1)
        cos, sin = inputs["cos"][rows], inputs["sin"][rows]
        interleaved = bool(complete.integer("rope_interleaved"))
        query, key = (_rotated(values, cos, sin, interleaved) for values in (query, key))
    cache = copied_pages(inputs["kv_cache"], inputs.get("page_copies"))
    page, slot = np.full(tokens, -1, np.int64), np.zeros(tokens, np.int64)
    for sequence in np.unique(inputs["token_sequence"]).tolist():
        members = inputs["token_sequence"] == sequence
        if sequence >= 0:
            keys = inputs["positions"][members]
            page[members], slot[members] = places(inputs, len(cache), pages.page_size, sequence, keys)
    kept = page >= 0
    pages.write(cache, page[kept], slot[kept], latent[kept], key[kept])
    return {"query_rope_out": query, "kv_cache_out": cache}


def projected(values: Array, weight: Array, scale: Array | None) -> Float64:
    """Each head ``[T, H, n]`` times its own matrix ``[H, m, n]``, with a scale of each 128 x 128 block or without."""
    heads_first = np.ascontiguousarray(values.astype(np.float64).transpose(1, 0, 2))
    product: Float64 = heads_first @ dequantized(weight, scale).transpose(0, 2, 1)
    return product.transpose(1, 0, 2)


# Of the magnitudes of a sum's terms: how far tensor cores may be from it, which cut each of up to four partial sums of 64
# terms off at 24 bits.
F32_SUMS = 2.0**-21
# The same where SM90 sums products of e4m3 codes: each of 32 terms is cut off at 14 bits of the largest, four times in a group. Twice
# what 20000 sums of normal values were off by, in a model of that; sums of one sign would be off by 18 times as much.
E4M3_SUMS = 2.0**-13


def to_bf16(values: Array) -> Float64:
    """The values that bf16 has for these."""
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def branch_query(
    inputs: Mapping[str, Array], attributes: Mapping[str, Any], rounded: Callable[[Array], Array] = to_bf16
) -> Array:
    """First part of MlaDecodeBranchFp8, ``[T, H, R + Dr]``: the query's codes times W_UK, and its rope part rotated in f32."""
    nope, rope = np.split(inputs["query"], [inputs["query"].shape[2] - attributes["qk_rope_head_dim"]], axis=2)
    absorbed = projected(_quantized_reference(nope.astype(np.float64)), inputs["w_uk"], inputs["w_uk_scale"])
    rotated = append({**inputs, "query_rope": rope}, attributes, query_type=np.float32)["query_rope_out"]
    return np.concatenate([rounded(absorbed), rounded(rotated)], axis=2)


def branch_output(inputs: Mapping[str, Array], latent: Array, sums: float = F32_SUMS) -> tuple[Float64, Float64]:
    """Last part of MlaDecodeBranchFp8, ``[T, H, Dv]``: codes of ``latent`` ``[T, H, R]`` times W_UV; and the error that its sums
    may have, ``sums`` of their terms' magnitudes."""
    codes = _quantized_reference(latent.astype(np.float64))
    magnitudes = np.abs(inputs["w_uv"].astype(np.float32))
    return (
        projected(codes, inputs["w_uv"], inputs["w_uv_scale"]),
        sums * projected(np.abs(codes), magnitudes, inputs["w_uv_scale"]),
    )
