"""MlaAttention: a dense MLA layer between its projections. What the lowering passes emit, one for each layer.

Inputs:

- ``query`` F ``[T, H, Dn + Dr]`` (nope, then rope; not rotated), ``latent`` F ``[T, R]``, ``rope_key`` F ``[T, Dr]``,
  ``norm_weight`` F ``[R]`` (optional), ``cos``, ``sin`` f32 ``[N, Dr/2]``, ``rope_rows`` i32 ``[T]`` (optional): as in
  MlaFusedRopeRmsNormQuantization
- ``w_uk`` ``[H, R, Dn]``, ``w_uk_scale``, ``w_uv`` ``[H, Dv, R]``, ``w_uv_scale``: as in MlaPrefill. Both weights
  absent: the export had multiplied them into its neighbours; then Dn = Dv = R.
- ``sinks`` f32 ``[H]`` (optional), ``query_offsets`` to ``schedule``, ``kv_cache``, ``page_copies`` (optional)

Outputs: ``output`` F ``[T, H, Dv]``, ``kv_cache_out`` like ``kv_cache``.

Absorbed: query_nope W_UK, MlaFusedRopeRmsNormQuantization, MlaDecoding over the new cache, times W_UV.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mla_trt.errors import UsageError
from mla_trt.ops import decoding, fused_rope_rms_norm_quantization, prefill
from mla_trt.ops.body import Body, Value
from mla_trt.ops.common import (
    KV_ATTRIBUTES,
    KV_CACHE,
    NEW_LATENT,
    PAGE_COPIES,
    QUERY_TERMS,
    ROPE_ATTRIBUTES,
    SINKS,
    SOFTMAX_SCALE,
    STEP,
    UP_PROJECTIONS,
    dequantize_weight,
    per_head,
)
from mla_trt.ops.schema import I32, Array, Attribute, Attributes, F, Input, Op, Output

OPTIONAL_UP_PROJECTIONS = tuple(Input(i.name, i.kind, i.shape, optional=True) for i in UP_PROJECTIONS)

INPUTS = (Input("query", F, "T H Dn+Dr"), *NEW_LATENT, *OPTIONAL_UP_PROJECTIONS, SINKS, *STEP, KV_CACHE, PAGE_COPIES)
ATTRIBUTES = (
    *KV_ATTRIBUTES,
    Attribute("num_heads", int, letter="H", minimum=1),
    Attribute("qk_nope_head_dim", int, letter="Dn", minimum=1),
    Attribute("v_head_dim", int, letter="Dv", minimum=1),
    *ROPE_ATTRIBUTES,
    SOFTMAX_SCALE,
    QUERY_TERMS,
)


def emit(body: Body, attributes: Attributes, inputs: dict[str, Value]) -> dict[str, Value]:
    """Append the op's nodes; with ``indices`` among the inputs, over each token's list of keys."""
    nope_dim = attributes.integer("qk_nope_head_dim")
    query = inputs["query"]
    nope = query.slice(2, 0, nope_dim)
    rope = query.slice(2, nope_dim, nope_dim + attributes.integer("qk_rope_head_dim"))
    if "w_uk" in inputs:
        nope = per_head(nope, dequantize_weight(body, inputs["w_uk"], inputs.get("w_uk_scale")))
    appended = fused_rope_rms_norm_quantization.emit(body, attributes, {**inputs, "query_rope": rope})
    absorbed = body.concat(2, nope, appended["query_rope_out"])
    attended = decoding.emit(body, attributes, {**inputs, "query": absorbed, "kv_cache": appended["kv_cache_out"]})
    output = attended["output"]
    if "w_uv" in inputs:
        output = per_head(output, dequantize_weight(body, inputs["w_uv"], inputs.get("w_uv_scale")))
    return {"output": output, "kv_cache_out": appended["kv_cache_out"]}


def reference(attributes: Attributes, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Not absorbed: keys and values of each head are made from the stored latents."""
    nope_dim = attributes.integer("qk_nope_head_dim")
    nope, rope = np.split(inputs["query"].astype(np.float64), [nope_dim], axis=2)
    appended = fused_rope_rms_norm_quantization.reference(attributes, {**inputs, "query_rope": rope})
    rotated = np.concatenate([nope, appended["query_rope_out"]], axis=2)
    attend = prefill.reference if "w_uk" in inputs else decoding.reference
    attended = attend(attributes, {**inputs, "query": rotated, "kv_cache": appended["kv_cache_out"]})
    return {"output": attended["output"], "kv_cache_out": appended["kv_cache_out"]}


def check(attributes: Attributes, given: frozenset[str]) -> None:
    """W_UK and W_UV come together, a scale with its weight; without them all head sizes are the rank."""
    if ("w_uk" in given) != ("w_uv" in given):
        raise UsageError("w_uk and w_uv must be given together")
    for name in ("w_uk", "w_uv"):
        if f"{name}_scale" in given and name not in given:
            raise UsageError(f"{name}_scale is given without {name}")
    sizes = {attributes.integer(name) for name in ("qk_nope_head_dim", "v_head_dim", "kv_lora_rank")}
    if "w_uk" not in given and len(sizes) > 1:
        raise UsageError(
            f"without w_uk and w_uv, qk_nope_head_dim and v_head_dim must be kv_lora_rank, found {sorted(sizes)}"
        )


OP = Op(
    name="MlaAttention",
    doc=__doc__,
    inputs=INPUTS,
    outputs=(Output("output", F, "T H Dv"), Output("kv_cache_out", I32, "pages page_words")),
    attributes=ATTRIBUTES,
    emit=emit,
    reference=reference,
    check=check,
)
