"""MlaIndexer: appends the new index keys, scores all cached ones for each token, and lists the best of them.

Inputs:

- ``index_query`` F ``[T, Hi, Di]``, ``index_key`` F ``[T, Di]``: both before norm and rope; ``index_weights`` f32 ``[T,
  Hi]``
- ``index_norm_weight``, ``index_norm_bias`` F ``[Di]``, optional: LayerNorm of the key over Di; without the weight no
  norm
- ``index_cos``, ``index_sin`` f32 ``[N, Dri/2]``; ``rope_rows`` i32 ``[T]``, optional: their row for each token,
  clamped to 0..N-1; without it N = T
- ``query_offsets``, ``cache_lengths``, ``block_table``, ``token_sequence``, ``positions`` as in MlaDecoding
- ``indexer_cache`` i32 ``[pages, page_words]``, ``page_copies`` i32 ``[n, 2]`` (optional) as in
  MlaFusedRopeRmsNormQuantization

Outputs: ``indices`` i32 ``[T, top_k]``, ``indexer_cache_out`` like ``indexer_cache``.

Query and key are rotated in their first Dri (``index_rope_dim``) values - pairs (2j, 2j+1) when
``index_rope_interleaved``, else (j, j + Dri/2) - and, with ``index_hadamard``, multiplied by the Walsh-Hadamard matrix
of Di points (a power of two; entry (i, j) is -1 to the number of common bits of i and j) times Di^-1/2. In the format
``fp8`` the query is quantised for each (token, head) as the key rows are.

score[t, j] = sum_h index_weights[t, h] * relu(query[t, h] . key[j]). Visible to t: keys 0..position on a page of the
pool. The list has the min(top_k, visible) keys of the highest scores, of equal ones those of smaller index, in
ascending order of index; -1 after the last. Padding tokens have -1 only.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mla_trt.errors import UsageError
from mla_trt.formats import decode_e4m3, encode_e4m3
from mla_trt.ops.body import FLOAT, INT32, INT64, Body, Value
from mla_trt.ops.codec import clamp_e4m3, index_scale, round_e4m3
from mla_trt.ops.common import (
    BLOCK_TABLE,
    CACHE_LENGTHS,
    INDEX_ATTRIBUTES,
    PAGE_COPIES,
    PAGE_SIZE,
    POSITIONS,
    QUERY_OFFSETS,
    TOKEN_SEQUENCE,
)
from mla_trt.ops.pages import Batch, copy_pages, read_index_sequences, write_index_rows
from mla_trt.ops.reference import copied_pages, new_row_places, read_index_keys
from mla_trt.ops.rope import rotate, rotate_reference, table_row, table_rows
from mla_trt.ops.schema import F32, I32, TABLE, Array, Attributes, F, Input, Op, Output

INDEXER_CACHE = Input("indexer_cache", I32, "index_pages index_page_words")
INDEX_TENSORS = (
    Input("index_query", F, "T Hi Di"),
    Input("index_key", F, "T Di"),
    Input("index_weights", F32, "T Hi"),
    Input("index_norm_weight", F, "Di", optional=True),
    Input("index_norm_bias", F, "Di", optional=True),
    Input("index_cos", TABLE, "index_N ceil(Dri/2)"),
    Input("index_sin", TABLE, "index_N ceil(Dri/2)"),
)


def emit(body: Body, attributes: Attributes, inputs: dict[str, Value]) -> dict[str, Value]:
    """Append the op's nodes."""
    layout = attributes.index_layout()
    top_k = attributes.integer("top_k")
    key = _normed(attributes, inputs).unsqueeze(1)
    query, key = (_transformed(body, attributes, inputs, values) for values in (inputs["index_query"], key))
    if layout.index_format == "fp8":
        scales = index_scale(layout, query, 2)
        query = round_e4m3(body, clamp_e4m3(query / scales)) * scales
    cache = copy_pages(inputs["indexer_cache"], inputs.get("page_copies"))
    places = (inputs["block_table"], inputs["token_sequence"], inputs["positions"])
    cache = write_index_rows(body, layout, cache, *places, key.squeeze(1))

    tokens, heads = query.dim(0), query.dim(1)
    batch = Batch.build(body, inputs["query_offsets"], inputs["cache_lengths"])
    stored = read_index_sequences(body, layout, cache, inputs["block_table"], batch)
    padded = batch.pad(query).reshape(batch.sequences, batch.slots * heads, layout.index_head_dim)
    products = (padded @ stored.rows.transpose(0, 2, 1)).unary("Relu")
    slots = batch.sequences * batch.slots
    products = products.reshape(slots, heads, stored.keys)
    weights = batch.pad(inputs["index_weights"]).unsqueeze(1)
    visible = stored.causal(body, batch).reshape(slots, stored.keys)
    scores = body.where(visible, (weights @ products).squeeze(1), float("-inf"))

    # TopK prefers the smaller index among equal scores. What it takes beyond the visible keys is moved behind all keys,
    # then becomes -1.
    listed = stored.keys.minimum(top_k)
    _, best = body.top_k(scores, listed, largest=True)
    best = body.where(body.op("GatherElements", visible, best, axis=1), best, stored.keys)
    ascending, _ = body.top_k(best, listed, largest=False)
    ascending = body.where(ascending < stored.keys, ascending, -1).cast(INT32)
    indices = body.concat(1, ascending, body.fill(-1, INT32, slots, body.constant([top_k], INT64) - listed))
    return {"indices": batch.pack(indices, body.fill(-1, INT32, tokens, top_k)), "indexer_cache_out": cache}


def _normed(attributes: Attributes, inputs: dict[str, Value]) -> Value:
    key = inputs["index_key"]
    if "index_norm_weight" not in inputs:
        return key
    centred = key - key.mean(1)
    spread = ((centred * centred).mean(1) + attributes.number("index_norm_epsilon")).unary("Sqrt")
    key = centred / spread * inputs["index_norm_weight"]
    return key + inputs["index_norm_bias"] if "index_norm_bias" in inputs else key


def _transformed(body: Body, attributes: Attributes, inputs: dict[str, Value], values: Value) -> Value:
    """Rope and Hadamard transform of f32 ``[T, n, Di]``."""
    size, rope_dim = attributes.integer("index_head_dim"), attributes.integer("index_rope_dim")
    if rope_dim:
        cos, sin = (table_rows(inputs[name], inputs.get("rope_rows")) for name in ("index_cos", "index_sin"))
        rotated = rotate(
            body, values.slice(2, 0, rope_dim), cos, sin, bool(attributes.integer("index_rope_interleaved"))
        )
        values = body.concat(2, rotated, values.slice(2, rope_dim, size)) if rope_dim < size else rotated
    if attributes.integer("index_hadamard"):
        values = values @ body.constant(hadamard(size), FLOAT) * size**-0.5
    return values


def hadamard(size: int) -> npt.NDArray[np.float32]:
    """Walsh-Hadamard matrix in natural order, entries +-1, ``[size, size]``; ``size`` is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def reference(attributes: Attributes, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Token by token. What is stored or quantised is rounded to f32 first; scores in float64."""
    layout = attributes.index_layout()
    top_k = attributes.integer("top_k")
    tokens, heads, _ = inputs["index_query"].shape
    keys = inputs["index_key"].astype(np.float32)
    if "index_norm_weight" in inputs:
        wide = keys.astype(np.float64)
        wide = wide - wide.mean(axis=1, keepdims=True)
        wide /= np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + attributes.number("index_norm_epsilon"))
        bias = inputs["index_norm_bias"].astype(np.float64) if "index_norm_bias" in inputs else 0.0
        keys = (wide * inputs["index_norm_weight"].astype(np.float64) + bias).astype(np.float32)
    queries = _transformed_reference(attributes, inputs, inputs["index_query"].astype(np.float32))
    keys = _transformed_reference(attributes, inputs, keys[:, None])[:, 0]
    if layout.index_format == "fp8":
        scales = layout.scale(queries)
        queries = decode_e4m3(encode_e4m3(queries / scales)) * scales
    cache = copied_pages(inputs["indexer_cache"], inputs.get("page_copies"))
    for token, page, slot in new_row_places(inputs, len(cache), layout.page_size):
        layout.write(cache, np.array([page]), np.array([slot]), keys[token : token + 1])
    indices = np.full((tokens, top_k), -1, np.int32)
    for token, sequence in enumerate(inputs["token_sequence"].tolist()):
        if sequence < 0:
            continue
        visible, values = read_index_keys(
            layout, cache, inputs["block_table"], sequence, range(int(inputs["positions"][token]) + 1)
        )
        scores = np.zeros(len(visible))
        for head in range(heads):
            products = values @ queries[token, head].astype(np.float64)
            scores += float(inputs["index_weights"][token, head]) * np.maximum(products, 0.0)
        best = sorted(range(len(visible)), key=lambda entry: (-scores[entry], visible[entry]))[:top_k]
        indices[token, : len(best)] = sorted(visible[entry] for entry in best)
    return {"indices": indices, "indexer_cache_out": cache}


def _transformed_reference(
    attributes: Attributes, inputs: Mapping[str, Array], values: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    size, rope_dim = attributes.integer("index_head_dim"), attributes.integer("index_rope_dim")
    interleaved = bool(attributes.integer("index_rope_interleaved"))
    result = values.copy()
    for token in range(len(values) if rope_dim else 0):
        cos, sin = (table_row(inputs[name], inputs.get("rope_rows"), token) for name in ("index_cos", "index_sin"))
        result[token, :, :rope_dim] = rotate_reference(values[token, :, :rope_dim], cos, sin, interleaved)
    if attributes.integer("index_hadamard"):
        result = (_walsh_hadamard(result.astype(np.float64)) / np.sqrt(size)).astype(np.float32)
    return result


def _walsh_hadamard(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Butterflies along the last axis."""
    size = values.shape[-1]
    if size == 1:
        return values
    low, high = _walsh_hadamard(values[..., : size // 2]), _walsh_hadamard(values[..., size // 2 :])
    return np.concatenate([low + high, low - high], axis=-1)


def check(attributes: Attributes, given: frozenset[str]) -> None:
    """The bias needs the weight; the rotated values must exist in pairs; Hadamard needs a power of two."""
    size, rope_dim = attributes.integer("index_head_dim"), attributes.integer("index_rope_dim")
    if "index_norm_bias" in given and "index_norm_weight" not in given:
        raise UsageError("index_norm_bias is given without index_norm_weight")
    if size < 1 or rope_dim > size or rope_dim % 2:
        raise UsageError(
            f"index_head_dim {size} with index_rope_dim {rope_dim}: the latter must be even and not above the former"
        )
    if attributes.integer("index_hadamard") and size & (size - 1):
        raise UsageError(f"index_hadamard needs an index_head_dim that is a power of two, not {size}")


OP = Op(
    name="MlaIndexer",
    doc=__doc__,
    inputs=(
        *INDEX_TENSORS,
        Input("rope_rows", I32, "T", optional=True),
        QUERY_OFFSETS,
        CACHE_LENGTHS,
        BLOCK_TABLE,
        TOKEN_SEQUENCE,
        POSITIONS,
        INDEXER_CACHE,
        PAGE_COPIES,
    ),
    outputs=(Output("indices", I32, "T K"), Output("indexer_cache_out", I32, "index_pages index_page_words")),
    attributes=(*INDEX_ATTRIBUTES, PAGE_SIZE),
    emit=emit,
    reference=reference,
    check=check,
)
