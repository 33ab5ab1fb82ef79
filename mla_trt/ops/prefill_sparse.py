"""MlaPrefillSparse: absorbed attention of many tokens, each over its own list of cached keys.

Inputs, outputs and formula are those of MlaDecoding with ``indices``, and ``index_lengths`` i32 ``[T]``, optional:
entries of a token's list from that number on are masked. K is the width of ``indices``.
"""

from __future__ import annotations

from mla_trt.ops.common import KV_ATTRIBUTES, KV_CACHE, QUERY_TERMS, SINKS, SOFTMAX_SCALE, STEP
from mla_trt.ops.decoding import emit, reference
from mla_trt.ops.schema import F32, I32, F, Input, Op, Output

OP = Op(
    name="MlaPrefillSparse",
    doc=__doc__,
    inputs=(
        Input("query", F, "T H R+Dr"),
        *STEP,
        KV_CACHE,
        Input("indices", I32, "T K"),
        SINKS,
        Input("index_lengths", I32, "T", optional=True),
    ),
    outputs=(Output("output", F, "T H R"), Output("lse", F32, "T H", optional=True)),
    attributes=(*KV_ATTRIBUTES, SOFTMAX_SCALE, QUERY_TERMS),
    emit=emit,
    reference=reference,
)
