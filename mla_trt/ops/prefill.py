"""MlaPrefill: dense causal attention over cached and new tokens with keys and values made from the latents.

Inputs:

- ``query`` F ``[T, H, Dn + Dr]``, not absorbed, rotated
- ``query_offsets`` to ``kv_cache`` as in MlaDecoding
- ``w_uk`` ``[H, R, Dn]``, ``w_uv`` ``[H, Dv, R]``: F, or e4m3 with ``w_uk_scale`` f32 ``[H, ceil(R/128),
  ceil(Dn/128)]`` and ``w_uv_scale`` f32 ``[H, ceil(Dv/128), ceil(R/128)]``, one for each 128 x 128 block
- ``sinks`` f32 ``[H]``, optional

Outputs: ``output`` F ``[T, H, Dv]``, ``lse`` f32 ``[T, H]``.

k_nope = latent W_UK, v = W_UV latent; score = softmax_scale * (query_nope . k_nope + query_rope . rope); the rest as in
MlaDecoding.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mla_trt.ops.body import FLOAT, Body, Value
from mla_trt.ops.common import (
    KV_ATTRIBUTES,
    KV_CACHE,
    SINKS,
    SOFTMAX_SCALE,
    STEP,
    UP_PROJECTIONS,
    dequantize_weight,
    softmax,
)
from mla_trt.ops.pages import Batch, read_kv_sequences
from mla_trt.ops.reference import attend, attended_keys, dequantized, read_latents
from mla_trt.ops.schema import F32, Array, Attributes, F, Input, Op, Output


def emit(body: Body, attributes: Attributes, inputs: dict[str, Value]) -> dict[str, Value]:
    """Append the op's nodes."""
    layout = attributes.kv_layout()
    query = inputs["query"]
    w_uk = dequantize_weight(body, inputs["w_uk"], inputs.get("w_uk_scale"))
    w_uv = dequantize_weight(body, inputs["w_uv"], inputs.get("w_uv_scale"))
    tokens, heads, nope, value_dim = query.dim(0), query.dim(1), w_uk.dim(2), w_uv.dim(1)
    batch = Batch.build(body, inputs["query_offsets"], inputs["cache_lengths"])
    stored = read_kv_sequences(body, layout, inputs["kv_cache"], inputs["block_table"], batch)
    latent = stored.rows.slice(2, 0, layout.kv_lora_rank).reshape(batch.sequences * stored.keys, layout.kv_lora_rank)
    keys, values = (
        (latent @ weight).reshape(heads, batch.sequences, stored.keys, weight.dim(2)).transpose(1, 0, 2, 3)
        for weight in (w_uk, w_uv.transpose(0, 2, 1))
    )
    padded = batch.pad(query).reshape(batch.sequences, batch.slots, heads, query.dim(2)).transpose(0, 2, 1, 3)
    scores = padded.slice(3, 0, nope) @ keys.transpose(0, 1, 3, 2)
    if layout.qk_rope_head_dim:
        rope = stored.rows.slice(2, layout.kv_lora_rank, layout.width).unsqueeze(1)
        scores = scores + padded.slice(3, nope, query.dim(2)) @ rope.transpose(0, 1, 3, 2)
    scores = scores * attributes.number("softmax_scale")
    sinks = inputs["sinks"].unsqueeze(1, 2) if "sinks" in inputs else None
    result = softmax(body, scores, 3, stored.causal(body, batch).unsqueeze(1), sinks)
    output = (result.weights @ values / result.denominator).transpose(0, 2, 1, 3)
    lse = result.lse.transpose(0, 2, 1, 3)
    slots = batch.sequences * batch.slots
    return {
        "output": batch.pack(output.reshape(slots, heads, value_dim), body.fill(0.0, FLOAT, tokens, heads, value_dim)),
        "lse": batch.pack(lse.reshape(slots, heads), body.fill(float("-inf"), FLOAT, tokens, heads)),
    }


def reference(attributes: Attributes, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Token by token, head by head.

    With ``indices``, over each token's list: MlaSparseAttention's reference uses that.
    """
    layout = attributes.kv_layout()
    scale = attributes.number("softmax_scale")
    query = inputs["query"].astype(np.float64)
    w_uk = dequantized(inputs["w_uk"], inputs.get("w_uk_scale"))
    w_uv = dequantized(inputs["w_uv"], inputs.get("w_uv_scale"))
    tokens, heads, _ = query.shape
    nope = w_uk.shape[2]
    sinks = inputs.get("sinks")
    output = np.zeros((tokens, heads, w_uv.shape[1]))
    lse = np.full((tokens, heads), -np.inf)
    for token, sequence in enumerate(inputs["token_sequence"].tolist()):
        if sequence < 0:
            continue
        keys = attended_keys(
            int(inputs["positions"][token]), inputs["indices"][token] if "indices" in inputs else None, None
        )
        latent, rope = read_latents(layout, inputs["kv_cache"], inputs["block_table"], sequence, keys)
        for head in range(heads):
            scores = latent @ w_uk[head] @ query[token, head, :nope] + rope @ query[token, head, nope:]
            sink = None if sinks is None else float(sinks[head])
            output[token, head], lse[token, head] = attend(scale * scores, latent @ w_uv[head].T, sink)
    return {"output": output, "lse": lse}


OP = Op(
    name="MlaPrefill",
    doc=__doc__,
    inputs=(Input("query", F, "T H Dn+Dr"), *STEP, KV_CACHE, *UP_PROJECTIONS, SINKS),
    outputs=(Output("output", F, "T H Dv"), Output("lse", F32, "T H", optional=True)),
    attributes=(*KV_ATTRIBUTES, SOFTMAX_SCALE),
    emit=emit,
    reference=reference,
)
