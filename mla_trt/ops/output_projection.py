"""MlaOutputProjection: what attention gives times a layer's last weight. `mla-trt build --weights fp8` puts it in place of that product.

Inputs: ``attended`` F ``[T, H, Dv]``; ``w_o`` F ``[H, Dv, C]``, C the width of the hidden states, or e4m3, with ``w_o_scale`` f32
``[ceil(H Dv / 128), ceil(C / 128)]`` (optional) of its blocks of 128 rows (of all heads) x 128 columns. Codes lie in tiles as
MlaInputProjections has them; those that are not numbers may count as any.

Output: ``hidden`` F ``[T, C]``, summed in f32. (The weight is W^O of the DeepSeek-V2 report, transposed.)
"""

from __future__ import annotations

from collections.abc import Mapping

from mla_trt.ops.body import Body, Value
from mla_trt.ops.projection_weights import check_codes, matrix, matrix_reference
from mla_trt.ops.schema import F32, WEIGHT, Array, Attributes, Dimensions, F, Input, Op, Output, TensorType


def emit(body: Body, attributes: Attributes, inputs: dict[str, Value]) -> dict[str, Value]:
    """Append the op's nodes."""
    attended = inputs["attended"]
    rows = attended.reshape(attended.dim(0), attended.dim(1) * attended.dim(2))
    return {"hidden": rows @ matrix(inputs, "w_o", 3, row_axes=2)}


def reference(attributes: Attributes, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """In float64."""
    attended, weight = inputs["attended"].astype("f8"), matrix_reference(inputs, "w_o", row_axes=2)
    return {"hidden": attended.reshape(len(attended), len(weight)) @ weight}


def _bind(dims: Dimensions, types: Mapping[str, TensorType]) -> None:
    check_codes(types, ("w_o",))


OP = Op(
    name="MlaOutputProjection",
    doc=__doc__,
    inputs=(
        Input("attended", F, "T H Dv"),
        Input("w_o", WEIGHT, "H Dv C"),
        Input("w_o_scale", F32, "ceil(H*Dv/128) ceil(C/128)", optional=True),
    ),
    outputs=(Output("hidden", F, "T C"),),
    attributes=(),
    emit=emit,
    reference=reference,
    bind=_bind,
    plugin_version="2",  # codes lie in tiles
)
