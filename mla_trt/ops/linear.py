"""MlaLinear: a product with a weight, as MatMul's. What `mla-trt build` puts in place of the products that make the queries.

Inputs: ``x`` F ``[T, C]``, ``weight`` F ``[C, H, M]``.

Output: ``output`` F ``[T, H, M]``: x times the weight as a matrix of H M columns, sums in f32.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mla_trt.ops.body import Body, Value
from mla_trt.ops.schema import Array, Attributes, F, Input, Op, Output


def emit(body: Body, attributes: Attributes, inputs: dict[str, Value]) -> dict[str, Value]:
    """Append the op's nodes."""
    weight = inputs["weight"]
    columns, heads, width = (weight.dim(axis) for axis in range(3))
    product = inputs["x"] @ weight.reshape(columns, heads * width)
    return {"output": product.reshape(inputs["x"].dim(0), heads, width)}


def reference(attributes: Attributes, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """In float64."""
    product = np.einsum("tc,chm->thm", inputs["x"].astype(np.float64), inputs["weight"].astype(np.float64))
    return {"output": product}


OP = Op(
    name="MlaLinear",
    doc=__doc__,
    inputs=(Input("x", F, "T C"), Input("weight", F, "C H M")),
    outputs=(Output("output", F, "T H M"),),
    attributes=(),
    emit=emit,
    reference=reference,
)
