"""MlaDecoding: absorbed attention over the paged latent cache, over all keys of a sequence or each token's own list.

Inputs:

- ``query`` F ``[T, H, R + Dr]``: nope part times W_UK, then the rotated rope part
- ``query_offsets`` i32 ``[B+1]``, ``cache_lengths`` i32 ``[B]``, ``block_table`` i32 ``[B, max_pages]``,
  ``token_sequence``, ``positions`` i32 ``[T]``, ``schedule`` i32 (MlaPlan's; the body does not need it)
- ``kv_cache`` i32 ``[pages, page_words]``, with the rows of the new tokens
- ``indices`` i32 ``[T, K]``, optional: the keys of each token; entries outside 0..position are masked, an entry twice
  counts twice
- ``sinks`` f32 ``[H]``, optional

Outputs: ``output`` F ``[T, H, R]``, ``lse`` f32 ``[T, H]`` (natural log, without the sink; -inf when nothing is
attended).

score = softmax_scale * query . row; output = sum_j e^score_j latent_j / (sum_j e^score_j + e^sink), over the keys
0..position of the token's sequence or those of its list. Keys on pages outside the pool are masked. Nothing attended,
or a padding token: output 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mla_trt.ops.body import FLOAT, INT64, Body, Value
from mla_trt.ops.common import INDICES, KV_ATTRIBUTES, KV_CACHE, QUERY_TERMS, SINKS, SOFTMAX_SCALE, STEP, softmax
from mla_trt.ops.pages import Batch, read_kv_list, read_kv_sequences
from mla_trt.ops.reference import attend, attended_keys, read_latents
from mla_trt.ops.schema import F32, Array, Attributes, F, Input, Op, Output


def emit(body: Body, attributes: Attributes, inputs: dict[str, Value]) -> dict[str, Value]:
    """Append the op's nodes."""
    return (_emit_lists if "indices" in inputs else _emit_dense)(body, attributes, inputs)


def _emit_dense(body: Body, attributes: Attributes, inputs: dict[str, Value]) -> dict[str, Value]:
    layout = attributes.kv_layout()
    query = inputs["query"]
    tokens, heads = query.dim(0), query.dim(1)
    batch = Batch.build(body, inputs["query_offsets"], inputs["cache_lengths"])
    stored = read_kv_sequences(body, layout, inputs["kv_cache"], inputs["block_table"], batch)
    rows = batch.slots * heads
    padded = batch.pad(query).reshape(batch.sequences, rows, layout.width)
    scores = padded @ stored.rows.transpose(0, 2, 1) * attributes.number("softmax_scale")
    scores = scores.reshape(batch.sequences, batch.slots, heads, stored.keys)
    result = softmax(body, scores, 3, stored.causal(body, batch).unsqueeze(2), _sinks(inputs))
    latent = stored.rows.slice(2, 0, layout.kv_lora_rank)
    slots = batch.sequences * batch.slots
    output = result.weights.reshape(batch.sequences, rows, stored.keys) @ latent
    output = output.reshape(slots, heads, layout.kv_lora_rank) / result.denominator.reshape(slots, heads, 1)
    return {
        "output": batch.pack(output, body.fill(0.0, FLOAT, tokens, heads, layout.kv_lora_rank)),
        "lse": batch.pack(result.lse.reshape(slots, heads), body.fill(float("-inf"), FLOAT, tokens, heads)),
    }


def _emit_lists(body: Body, attributes: Attributes, inputs: dict[str, Value]) -> dict[str, Value]:
    layout = attributes.kv_layout()
    query, keys = inputs["query"], inputs["indices"].cast(INT64)
    sequence = inputs["token_sequence"].cast(INT64)
    position = inputs["positions"].cast(INT64).unsqueeze(1)
    column = body.range(keys.dim(1)).unsqueeze(0)
    wanted = (keys >= 0) & (keys <= position) & (sequence >= 0).unsqueeze(1)
    if "index_lengths" in inputs:
        wanted = wanted & (column < inputs["index_lengths"].cast(INT64).unsqueeze(1))
    # lists of short sequences end early: read no further than the last column that any token uses
    listed = body.where(wanted, column + 1, 0).reshape(keys.dim(0) * keys.dim(1)).max(0).maximum(0)
    listed = body.where(inputs["kv_cache"].dim(0) > 0, listed, 0)
    keys, wanted = keys.slice(1, 0, listed), wanted.slice(1, 0, listed)
    rows, present = read_kv_list(body, layout, inputs["kv_cache"], inputs["block_table"], sequence, keys, wanted)
    scores = query @ rows.transpose(0, 2, 1) * attributes.number("softmax_scale")
    result = softmax(body, scores, 2, present.unsqueeze(1), _sinks(inputs))
    output = result.weights @ rows.slice(2, 0, layout.kv_lora_rank) / result.denominator
    return {"output": output, "lse": result.lse.squeeze(2)}


def _sinks(inputs: dict[str, Value]) -> Value | None:
    sinks = inputs.get("sinks")
    return None if sinks is None else sinks.unsqueeze(1)


def reference(attributes: Attributes, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Token by token, head by head."""
    layout = attributes.kv_layout()
    scale = attributes.number("softmax_scale")
    query = inputs["query"].astype(np.float64)
    tokens, heads, _ = query.shape
    sinks = inputs.get("sinks")
    output = np.zeros((tokens, heads, layout.kv_lora_rank))
    lse = np.full((tokens, heads), -np.inf)
    for token, sequence in enumerate(inputs["token_sequence"].tolist()):
        if sequence < 0:
            continue
        indices = inputs["indices"][token] if "indices" in inputs else None
        limit = int(inputs["index_lengths"][token]) if "index_lengths" in inputs else None
        keys = attended_keys(int(inputs["positions"][token]), indices, limit)
        latent, rope = read_latents(layout, inputs["kv_cache"], inputs["block_table"], sequence, keys)
        rows = np.concatenate([latent, rope], axis=1)
        for head in range(heads):
            sink = None if sinks is None else float(sinks[head])
            output[token, head], lse[token, head] = attend(scale * (rows @ query[token, head]), latent, sink)
    return {"output": output, "lse": lse}


OP = Op(
    name="MlaDecoding",
    doc=__doc__,
    inputs=(Input("query", F, "T H R+Dr"), *STEP, KV_CACHE, INDICES, SINKS),
    outputs=(Output("output", F, "T H R"), Output("lse", F32, "T H", optional=True)),
    attributes=(*KV_ATTRIBUTES, SOFTMAX_SCALE, QUERY_TERMS),
    emit=emit,
    reference=reference,
)
