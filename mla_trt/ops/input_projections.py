"""MlaInputProjections: what an MLA layer's hidden states are multiplied by before attention. `mla-trt build` puts it in place of those
products.

Inputs, C the width of the hidden states, Q that of the query's latent, M = Dn + Dr:

- ``hidden`` F ``[T, C]``
- ``w_dq`` F ``[C, Q]`` (optional): to the query's latent; ``query_norm_weight`` F ``[Q]`` (optional): of its RMS norm, which there is none
  of without
- ``w_uq`` F ``[Q, H, M]``: to the queries. Without ``w_dq`` from the hidden states, and Q = C.
- ``w_dkv`` F ``[C, R]``, ``w_kr`` F ``[C, Dr]`` (optional): to the latent, as its norm gets it, and to the rope key
- ``w_index_query`` F ``[Q, Hi, Di]``, ``w_index_key`` F ``[C, Di]``, ``w_index_weights`` F ``[C, Hi]`` (optional): to what an indexer gets;
  ``index_weights_factor`` F ``[Hi]`` (optional): what its head weights are multiplied by
- these weights may be e4m3, but for ``w_index_weights``: those with ``w_dq_scale`` to ``w_index_key_scale`` f32 (optional), of blocks of 128
  rows x 128 columns (of all heads). Their codes lie in tiles of 128 rows x 16 columns: all tiles of 128 rows follow each other, each row by
  row; what is left at the ends is in smaller tiles. Codes that are not numbers may count as any.

Outputs: ``query`` F ``[T, H, M]``, ``latent`` F ``[T, R]``, ``rope_key`` F ``[T, Dr]``, ``index_query`` F ``[T, Hi, Di]``, ``index_key`` F
``[T, Di]``, ``index_weights`` f32 ``[T, Hi]``; all but the first where there is the weight. Products are summed in f32. (The weights are
W^DQ, W^UQ with W^QR, W^DKV and W^KR of the DeepSeek-V2 report, transposed.)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mla_trt.errors import UsageError
from mla_trt.ops.body import FLOAT, Body, Value
from mla_trt.ops.projection_weights import check_codes, check_scales, matrix, matrix_reference
from mla_trt.ops.schema import F32, WEIGHT, Array, Attribute, Attributes, Dimensions, F, Input, Op, Output, TensorType

OUTPUT_OF = {
    "w_dkv": "latent",
    "w_kr": "rope_key",
    "w_index_query": "index_query",
    "w_index_key": "index_key",
    "w_index_weights": "index_weights",
}
"""Optional weights, and what each makes."""
FROM_LATENT = ("w_uq", "w_index_query")
"""Weights of the query's latent; the others are the hidden states'."""
CODED = ("w_dq", "w_uq", "w_dkv", "w_kr", "w_index_query", "w_index_key")
"""Weights that may be e4m3."""


def emit(body: Body, attributes: Attributes, inputs: dict[str, Value]) -> dict[str, Value]:
    """Append the op's nodes."""
    hidden = latent = inputs["hidden"]
    if "w_dq" in inputs:
        latent = hidden @ matrix(inputs, "w_dq", 2)
    if "query_norm_weight" in inputs:
        mean = (latent * latent).mean(1)
        latent = latent / (mean + attributes.number("epsilon")).unary("Sqrt") * inputs["query_norm_weight"]
    results = {"query": _by_head(latent, inputs, "w_uq")}
    for name, output in OUTPUT_OF.items():
        if name == "w_index_query" and name in inputs:
            results[output] = _by_head(latent, inputs, name)
        elif name in inputs:
            results[output] = hidden @ matrix(inputs, name, 2)
    if "index_weights_factor" in inputs:
        results["index_weights"] = results["index_weights"] * inputs["index_weights_factor"]
    for output in OUTPUT_OF.values():  # a function has all of its outputs
        if output not in results:
            empty = (0, 0) if output == "index_query" else (0,)
            results[output] = body.fill(0.0, FLOAT, hidden.dim(0), *empty)
    return results


def _by_head(x: Value, inputs: Mapping[str, Value], name: str) -> Value:
    weight = inputs[name]
    return (x @ matrix(inputs, name, 3)).reshape(x.dim(0), weight.dim(1), weight.dim(2))


def reference(attributes: Attributes, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """In float64."""
    given = {
        name: matrix_reference(inputs, name).reshape(values.shape)
        if name.startswith("w_")
        else values.astype(np.float64)
        for name, values in inputs.items()
        if not name.endswith("_scale")
    }
    hidden = latent = given["hidden"]
    if "w_dq" in given:
        latent = hidden @ given["w_dq"]
    if "query_norm_weight" in given:
        mean = np.mean(latent**2, axis=-1, keepdims=True)
        latent = latent / np.sqrt(mean + attributes.number("epsilon")) * given["query_norm_weight"]
    results = {"query": np.einsum("tq,qhm->thm", latent, given["w_uq"])}
    for name, output in OUTPUT_OF.items():
        if name in given:
            source = latent if name in FROM_LATENT else hidden
            results[output] = np.tensordot(source, given[name], 1)
    if "index_weights_factor" in given:
        results["index_weights"] = results["index_weights"] * given["index_weights_factor"]
    return results


def check(attributes: Attributes, given: frozenset[str]) -> None:
    """Raises UsageError for inputs that say nothing without others."""
    for name, needed in (("query_norm_weight", "w_dq"), ("index_weights_factor", "w_index_weights")):
        if name in given and needed not in given:
            raise UsageError(f"the input {name} needs {needed}")
    check_scales(given, CODED)


def _bind(dims: Dimensions, types: Mapping[str, TensorType]) -> None:
    """Without w_dq the queries are the hidden states' product: Q = C."""
    check_codes(types, CODED)
    hidden = types.get("hidden")
    if "w_dq" not in types and hidden is not None and len(hidden.shape) == 2:
        dims.bind("Q", hidden.shape[1], "hidden, as there is no w_dq,")


OP = Op(
    name="MlaInputProjections",
    doc=__doc__,
    inputs=(
        Input("hidden", F, "T C"),
        Input("w_dq", WEIGHT, "C Q", optional=True),
        Input("query_norm_weight", F, "Q", optional=True),
        Input("w_uq", WEIGHT, "Q H M"),
        Input("w_dkv", WEIGHT, "C R", optional=True),
        Input("w_kr", WEIGHT, "C Dr", optional=True),
        Input("w_index_query", WEIGHT, "Q Hi Di", optional=True),
        Input("w_index_key", WEIGHT, "C Di", optional=True),
        Input("w_index_weights", F, "C Hi", optional=True),
        Input("index_weights_factor", F, "Hi", optional=True),
        Input("w_dq_scale", F32, "ceil(C/128) ceil(Q/128)", optional=True),
        Input("w_uq_scale", F32, "ceil(Q/128) ceil(H*M/128)", optional=True),
        Input("w_dkv_scale", F32, "ceil(C/128) ceil(R/128)", optional=True),
        Input("w_kr_scale", F32, "ceil(C/128) ceil(Dr/128)", optional=True),
        Input("w_index_query_scale", F32, "ceil(Q/128) ceil(Hi*Di/128)", optional=True),
        Input("w_index_key_scale", F32, "ceil(C/128) ceil(Di/128)", optional=True),
    ),
    outputs=(
        Output("query", F, "T H M"),
        Output("latent", F, "T R", optional=True),
        Output("rope_key", F, "T Dr", optional=True),
        Output("index_query", F, "T Hi Di", optional=True),
        Output("index_key", F, "T Di", optional=True),
        Output("index_weights", F32, "T Hi", optional=True),
    ),
    attributes=(Attribute("epsilon", float, 1e-6),),
    emit=emit,
    reference=reference,
    check=check,
    bind=_bind,
    plugin_version="2",  # codes lie in tiles
)
