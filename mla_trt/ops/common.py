"""Inputs and attributes that several ops share, and the parts of attention that their bodies share."""

from __future__ import annotations

from dataclasses import dataclass

from mla_trt.formats import DEFAULT_PAGE_SIZE, INDEX_FORMATS, ROW_FORMATS
from mla_trt.ops.body import Body, Value
from mla_trt.ops.schema import F32, I32, TABLE, WEIGHT, Attribute, F, Input

PAGE_SIZE = Attribute("page_size", int, DEFAULT_PAGE_SIZE, letter="P", minimum=1)

KV_ATTRIBUTES = (
    Attribute("kv_lora_rank", int, letter="R", minimum=1),
    Attribute("qk_rope_head_dim", int, letter="Dr", minimum=0),
    PAGE_SIZE,
    Attribute("row_format", str, "fp8", choices=ROW_FORMATS),
    Attribute("kv_scale", float, 1.0),
)
ROPE_ATTRIBUTES = (
    Attribute("epsilon", float, 1e-6),
    Attribute("rope_interleaved", int, 1, choices=(0, 1)),
)
SOFTMAX_SCALE = Attribute("softmax_scale", float)
QUERY_TERMS = Attribute("query_terms", int, 2, choices=(0, 1, 2))  # says how exact kernels must be; bodies are exact
TOP_K = Attribute("top_k", int, letter="K", minimum=1)
INDEX_ATTRIBUTES = (
    Attribute("index_head_dim", int, letter="Di", minimum=0),
    Attribute("index_rope_dim", int, 0, letter="Dri", minimum=0),
    Attribute("index_rope_interleaved", int, 0, choices=(0, 1)),
    Attribute("index_norm_epsilon", float, 1e-6),
    Attribute("index_hadamard", int, 0, choices=(0, 1)),
    Attribute("index_format", str, "fp8", choices=INDEX_FORMATS),
    Attribute("index_scale_ue8m0", int, 0, choices=(0, 1)),
    TOP_K,
)

QUERY_OFFSETS = Input("query_offsets", I32, "B+1")
CACHE_LENGTHS = Input("cache_lengths", I32, "B")
BLOCK_TABLE = Input("block_table", I32, "B max_pages")
TOKEN_SEQUENCE = Input("token_sequence", I32, "T")
POSITIONS = Input("positions", I32, "T")
SCHEDULE = Input("schedule", I32, "units 2")
KV_CACHE = Input("kv_cache", I32, "pages page_words")
PAGE_COPIES = Input("page_copies", I32, "copies 2", optional=True)
INDICES = Input("indices", I32, "T K", optional=True)
SINKS = Input("sinks", F32, "H", optional=True)

# query_offsets to schedule: what says where each token belongs
STEP = (QUERY_OFFSETS, CACHE_LENGTHS, BLOCK_TABLE, TOKEN_SEQUENCE, POSITIONS, SCHEDULE)

# the new token's part of the latent, and its rope table
NEW_LATENT = (
    Input("latent", F, "T R"),
    Input("rope_key", F, "T Dr"),
    Input("norm_weight", F, "R", optional=True),
    Input("cos", TABLE, "N ceil(Dr/2)"),
    Input("sin", TABLE, "N ceil(Dr/2)"),
    Input("rope_rows", I32, "T", optional=True),
)

# order of MlaPrefill and MlaAttention
UP_PROJECTIONS = (
    Input("w_uk", WEIGHT, "H R Dn"),
    Input("w_uk_scale", F32, "H ceil(R/128) ceil(Dn/128)", optional=True),
    Input("w_uv", WEIGHT, "H Dv R"),
    Input("w_uv_scale", F32, "H ceil(Dv/128) ceil(R/128)", optional=True),
)


@dataclass(frozen=True)
class Softmax:
    """Softmax along the last axis, not yet divided.

    ``weights`` has the shape of the scores; ``denominator`` and ``lse`` have size 1 along that axis.
    """

    weights: Value
    denominator: Value
    lse: Value


def softmax(body: Body, scores: Value, axis: int, allowed: Value, sinks: Value | None) -> Softmax:
    """Softmax of ``scores`` (f32 ``[..., keys]``) over the keys that are ``allowed`` (bool, broadcast).

    e^sink (``sinks`` broadcasts to ``[..., 1]``) joins the denominator but not ``lse``. With no key allowed the weights
    are 0 and ``lse`` -inf.
    """
    scores = body.where(allowed, scores, float("-inf"))
    top = scores.max(axis)
    top = body.where(top.equal(float("-inf")), 0.0, top)
    weights = (scores - top).unary("Exp")
    total = weights.sum(axis)
    lse = total.unary("Log") + top
    if sinks is not None:
        total = total + (sinks - top).unary("Exp")
    return Softmax(weights, body.where(total > 0.0, total, 1.0), lse)


def per_head(values: Value, weights: Value) -> Value:
    """Multiply each head by its own matrix: ``[T, H, n]`` and ``[H, m, n]`` to ``[T, H, m]``.

    The weight is the left operand, so that it is used as it lies in the model: a transposed one would be kept as a
    second copy.
    """
    columns = values.transpose(1, 2, 0)
    # ONNX Runtime fuses a transposition of the batch axis into MatMul, and that kernel divides by zero when T is 0:
    # keep them apart
    columns = columns.reshape(values.dim(1), values.dim(2), values.dim(0))
    return (weights @ columns).transpose(2, 0, 1)


def dequantize_weight(body: Body, weight: Value, scale: Value | None) -> Value:
    """f32 weight ``[H, m, n]`` times its scale of each 128 x 128 block, f32 ``[H, ceil(m / 128), ceil(n / 128)]``."""
    if scale is None:
        return weight
    for axis in (1, 2):
        scale = scale.gather(body.range(weight.dim(axis)) // 128, axis=axis)
    return weight * scale
