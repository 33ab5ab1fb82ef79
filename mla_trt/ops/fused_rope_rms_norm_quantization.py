"""MlaFusedRopeRmsNormQuantization: rotates queries and new keys, normalises the new latents, writes the cache rows.

Inputs:

- ``query_rope`` F ``[T, H, Dr]``, ``latent`` F ``[T, R]``, ``rope_key`` F ``[T, Dr]``
- ``norm_weight`` F ``[R]``, optional: without it the latent is taken as it is
- ``cos``, ``sin`` f32 ``[N, Dr/2]``; ``rope_rows`` i32 ``[T]``, optional: their row for each token, clamped to 0..N-1;
  without it N = T
- ``token_sequence``, ``positions`` i32 ``[T]``; ``block_table`` i32 ``[B, max_pages]``; ``kv_cache`` i32 ``[pages,
  page_words]``
- ``page_copies`` i32 ``[n, 2]``, optional: pages (from, to) that are copied first. All are read before any is written;
  a pair with a page outside the pool is skipped.

Outputs: ``query_rope_out`` F ``[T, H, Dr]`` (the layout stays), ``kv_cache_out`` like ``kv_cache``.

With the pair (a, b) - (2j, 2j+1) when ``rope_interleaved``, else (j, j + Dr/2) - a' = a cos - b sin, b' = a sin + b
cos. The normed latent is latent / sqrt(mean(latent^2) + epsilon) * norm_weight. A row is written for each token with a
sequence whose page is in the pool; all other words of the cache stay as they are. Rope and quantisation are done in
f32, in the order of the formulas, so that the bytes are defined.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mla_trt.ops.body import Body, Value
from mla_trt.ops.common import (
    BLOCK_TABLE,
    KV_ATTRIBUTES,
    KV_CACHE,
    NEW_LATENT,
    PAGE_COPIES,
    POSITIONS,
    ROPE_ATTRIBUTES,
    TOKEN_SEQUENCE,
)
from mla_trt.ops.pages import copy_pages, write_kv_rows
from mla_trt.ops.reference import copied_pages, new_row_places
from mla_trt.ops.rope import rotate, rotate_reference, table_row, table_rows
from mla_trt.ops.schema import I32, Array, Attributes, F, Input, Op, Output


def emit(body: Body, attributes: Attributes, inputs: dict[str, Value]) -> dict[str, Value]:
    """Append the op's nodes."""
    layout = attributes.kv_layout()
    query, latent = inputs["query_rope"], inputs["latent"]
    key: Value | None = None
    if layout.qk_rope_head_dim:
        cos, sin = (table_rows(inputs[name], inputs.get("rope_rows")) for name in ("cos", "sin"))
        interleaved = bool(attributes.integer("rope_interleaved"))
        query = rotate(body, query, cos, sin, interleaved)
        key = rotate(body, inputs["rope_key"].unsqueeze(1), cos, sin, interleaved).squeeze(1)
    if "norm_weight" in inputs:
        spread = ((latent * latent).mean(1) + attributes.number("epsilon")).unary("Sqrt")
        latent = latent / spread * inputs["norm_weight"]
    cache = copy_pages(inputs["kv_cache"], inputs.get("page_copies"))
    places = (inputs["block_table"], inputs["token_sequence"], inputs["positions"])
    return {"query_rope_out": query, "kv_cache_out": write_kv_rows(body, layout, cache, *places, latent, key)}


def reference(attributes: Attributes, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Token by token; the queries in float64, what is stored rounded to f32 before rope and quantisation."""
    layout = attributes.kv_layout()
    interleaved = bool(attributes.integer("rope_interleaved"))
    query = inputs["query_rope"].astype(np.float64)
    latent = inputs["latent"].astype(np.float64)
    rope_key = inputs["rope_key"].astype(np.float32)
    cos, sin, rows = inputs["cos"], inputs["sin"], inputs.get("rope_rows")
    if "norm_weight" in inputs:
        mean = np.mean(latent**2, axis=1, keepdims=True)
        latent = latent / np.sqrt(mean + attributes.number("epsilon")) * inputs["norm_weight"].astype(np.float64)
    query_out = query.copy()
    cache = copied_pages(inputs["kv_cache"], inputs.get("page_copies"))
    for token in range(len(query)):
        if layout.qk_rope_head_dim:
            cos_row, sin_row = table_row(cos, rows, token), table_row(sin, rows, token)
            query_out[token] = rotate_reference(query[token], cos_row, sin_row, interleaved)
            rope_key[token] = rotate_reference(rope_key[token], cos_row, sin_row, interleaved)
    for token, page, slot in new_row_places(inputs, len(cache), layout.page_size):
        layout.write(cache, np.array([page]), np.array([slot]), latent[token : token + 1], rope_key[token : token + 1])
    return {"query_rope_out": query_out, "kv_cache_out": cache}


OP = Op(
    name="MlaFusedRopeRmsNormQuantization",
    doc=__doc__,
    inputs=(
        Input("query_rope", F, "T H Dr"),
        *NEW_LATENT,
        TOKEN_SEQUENCE,
        POSITIONS,
        BLOCK_TABLE,
        KV_CACHE,
        PAGE_COPIES,
    ),
    outputs=(Output("query_rope_out", F, "T H Dr"), Output("kv_cache_out", I32, "pages page_words")),
    attributes=(*KV_ATTRIBUTES, *ROPE_ATTRIBUTES),
    emit=emit,
    reference=reference,
)
