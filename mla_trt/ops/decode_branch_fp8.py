"""MlaDecodeBranchFp8: the whole decode branch with FP8 up-projections.

Inputs: ``query`` F ``[T, H, Dn + Dr]`` (not rotated), ``latent`` to ``rope_rows`` as in MlaAttention, ``w_uk`` e4m3
``[H, R, Dn]`` with ``w_uk_scale`` f32 ``[H, ceil(R/128), ceil(Dn/128)]``, ``w_uv`` e4m3 ``[H, Dv, R]`` with
``w_uv_scale`` f32 ``[H, ceil(Dv/128), ceil(R/128)]``, ``sinks`` (optional), ``query_offsets`` to ``kv_cache``,
``indices`` i32 ``[T, K]`` (optional), ``page_copies`` (optional).

Outputs: ``output`` F ``[T, H, Dv]``, ``kv_cache_out`` like ``kv_cache``.

Query nope, quantised for each (token, head, 128 values), times W_UK; MlaFusedRopeRmsNormQuantization; MlaDecoding; its
output, quantised for each (token, head, 128 values of R), times W_UV. Quantised: s = min(amax, 1200) / 448,
e4m3(clamp(x / s)), zeros where s is 0; both products summed in f32 with the scales of both operands.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mla_trt.formats import E4M3_MAX, SCALE_GROUP, decode_e4m3, encode_e4m3
from mla_trt.ops import decoding, fused_rope_rms_norm_quantization
from mla_trt.ops.body import Body, Value
from mla_trt.ops.codec import clamp_e4m3, group_columns, round_e4m3
from mla_trt.ops.common import (
    INDICES,
    KV_ATTRIBUTES,
    KV_CACHE,
    NEW_LATENT,
    PAGE_COPIES,
    QUERY_TERMS,
    ROPE_ATTRIBUTES,
    SINKS,
    SOFTMAX_SCALE,
    STEP,
    dequantize_weight,
    per_head,
)
from mla_trt.ops.reference import dequantized
from mla_trt.ops.schema import E4M3, F32, I32, Array, Attributes, F, Input, Op, Output

AMAX_BOUND = 1200.0  # larger values saturate


def emit(body: Body, attributes: Attributes, inputs: dict[str, Value]) -> dict[str, Value]:
    """Append the op's nodes."""
    query = inputs["query"]
    rope_start = query.dim(2) - attributes.integer("qk_rope_head_dim")
    nope = _quantized(body, query.slice(2, 0, rope_start))
    nope = per_head(nope, dequantize_weight(body, inputs["w_uk"], inputs["w_uk_scale"]))
    rope = query.slice(2, rope_start, query.dim(2))
    appended = fused_rope_rms_norm_quantization.emit(body, attributes, {**inputs, "query_rope": rope})
    absorbed = body.concat(2, nope, appended["query_rope_out"])
    attended = decoding.emit(body, attributes, {**inputs, "query": absorbed, "kv_cache": appended["kv_cache_out"]})
    latent = _quantized(body, attended["output"])
    output = per_head(latent, dequantize_weight(body, inputs["w_uv"], inputs["w_uv_scale"]))
    return {"output": output, "kv_cache_out": appended["kv_cache_out"]}


def _quantized(body: Body, values: Value) -> Value:
    """The values, f32 ``[T, H, n]``, that the codes of ``values`` and their scales stand for."""
    tokens, heads, width = (values.dim(axis) for axis in range(3))
    groups = group_columns(body, values.reshape(tokens * heads, width))
    scales = groups.unary("Abs").max(2).minimum(AMAX_BOUND) / E4M3_MAX
    divisors = body.where(scales > 0.0, scales, 1.0)
    rounded = round_e4m3(body, clamp_e4m3(groups / divisors)) * scales
    padded = groups.dim(1) * SCALE_GROUP
    return rounded.reshape(tokens, heads, padded).slice(2, 0, width)


def reference(attributes: Attributes, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Group by group; quantisation in f32, everything else in float64."""
    query = inputs["query"].astype(np.float64)
    nope, rope = np.split(query, [query.shape[2] - attributes.integer("qk_rope_head_dim")], axis=2)
    w_uk = dequantized(inputs["w_uk"], inputs["w_uk_scale"])
    w_uv = dequantized(inputs["w_uv"], inputs["w_uv_scale"])
    absorbed = np.einsum("thn,hrn->thr", _quantized_reference(nope), w_uk)
    appended = fused_rope_rms_norm_quantization.reference(attributes, {**inputs, "query_rope": rope})
    rotated = np.concatenate([absorbed, appended["query_rope_out"]], axis=2)
    attended = decoding.reference(attributes, {**inputs, "query": rotated, "kv_cache": appended["kv_cache_out"]})
    output = np.einsum("thr,hvr->thv", _quantized_reference(attended["output"].astype(np.float64)), w_uv)
    return {"output": output, "kv_cache_out": appended["kv_cache_out"]}


def _quantized_reference(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    quantized = np.zeros_like(values)
    for start in range(0, values.shape[2], SCALE_GROUP):
        group = values[..., start : start + SCALE_GROUP].astype(np.float32)
        amax = np.abs(group).max(axis=2, keepdims=True)
        scale = np.minimum(amax, np.float32(AMAX_BOUND)) / np.float32(E4M3_MAX)
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = encode_e4m3(np.where(scale > 0, group / scale, 0))
        quantized[..., start : start + SCALE_GROUP] = decode_e4m3(codes).astype(np.float64) * scale
    return quantized


OP = Op(
    name="MlaDecodeBranchFp8",
    doc=__doc__,
    inputs=(
        Input("query", F, "T H Dn+Dr"),
        *NEW_LATENT,
        Input("w_uk", E4M3, "H R Dn"),
        Input("w_uk_scale", F32, "H ceil(R/128) ceil(Dn/128)"),
        Input("w_uv", E4M3, "H Dv R"),
        Input("w_uv_scale", F32, "H ceil(Dv/128) ceil(R/128)"),
        SINKS,
        *STEP,
        KV_CACHE,
        INDICES,
        PAGE_COPIES,
    ),
    outputs=(Output("output", F, "T H Dv"), Output("kv_cache_out", I32, "pages page_words")),
    attributes=(*KV_ATTRIBUTES, *ROPE_ATTRIBUTES, SOFTMAX_SCALE, QUERY_TERMS),
    emit=emit,
    reference=reference,
)
