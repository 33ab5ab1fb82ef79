"""Element types of the tensors of a graph, which the rules of `legalize` ask for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from mla_trt.errors import BadModelError
from mla_trt.ops import OPS
from mla_trt.passes.graph import is_empty, subgraphs

HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
FLOATS = (TensorProto.FLOAT, *HALF)
FLOAT8 = (
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E4M3FNUZ,
    TensorProto.FLOAT8E5M2,
    TensorProto.FLOAT8E5M2FNUZ,
)
INTEGERS = (TensorProto.INT32, TensorProto.INT64)

_BOOLEAN_RESULT = {
    "And",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "IsInf",
    "IsNaN",
    "Less",
    "LessOrEqual",
    "Not",
    "Or",
    "Xor",
}
_INDEX_RESULT = {"ArgMax", "ArgMin", "NonZero", "SequenceLength", "Shape", "Size"}
# The input that has the result's type, where that is not the first.
_TYPED_BY = {"Where": 1, "OneHot": 2, "CastLike": 1, "DequantizeLinear": 1}
_TYPE_ATTRIBUTES = {"Cast": "to", "BitCast": "to", "DequantizeLinear": "output_dtype", "EyeLike": "dtype"}


def type_name(element: int) -> str:
    """The ONNX name of an element type, in lower case."""
    return TensorProto.DataType.Name(element).lower()


def to_dtype(element: int) -> Any:
    """What graphsurgeon keeps for an element type: a numpy type, or the ONNX number where numpy has none."""
    if element in (TensorProto.BFLOAT16, *FLOAT8, TensorProto.INT4, TensorProto.UINT4):
        return element
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(element))
    except KeyError:
        raise BadModelError(f"a node asks for the element type {element}, which ONNX does not have") from None


def element_type(tensor: gs.Tensor) -> int:
    """The ONNX element type of a tensor; 0 (undefined) where it is unknown."""
    if is_empty(tensor):
        return TensorProto.UNDEFINED
    dtype = tensor.dtype
    if dtype is None:
        return TensorProto.UNDEFINED
    return dtype if isinstance(dtype, int) else int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def infer_types(nodes: Iterable[gs.Node]) -> None:
    """Writes the element types of results down where they are unknown and follow from what the node reads.

    Args:
        nodes: in topological order.
    """
    for node in nodes:
        for index, output in enumerate(node.outputs):
            if is_empty(output) or output.dtype is not None:
                continue
            found = _result_type(node, index)
            if found:
                output.dtype = to_dtype(found)


def _result_type(node: gs.Node, index: int) -> int:
    if node.domain == "mla_trt":
        return _fused_type(node, index)
    if node.op in _BOOLEAN_RESULT:
        return TensorProto.BOOL
    if node.op in _INDEX_RESULT or (node.op == "TopK" and index == 1) or (node.op == "Unique" and index):
        return TensorProto.INT64
    if node.op in ("Dropout", "MaxPool") and index == 1:
        return TensorProto.BOOL if node.op == "Dropout" else TensorProto.INT64
    named = node.attrs.get(_TYPE_ATTRIBUTES.get(node.op, ""), 0)
    if named:
        return int(named)
    if node.op == "ConstantOfShape":
        value = node.attrs.get("value")
        return element_type(value) if isinstance(value, gs.Tensor) else TensorProto.FLOAT
    if node.op == "QuantizeLinear":
        return (
            element_type(node.inputs[2]) if len(node.inputs) > 2 else int(node.attrs.get("output_dtype", 0))
        ) or TensorProto.UINT8
    inner = next(iter(subgraphs(node)), None)
    if inner is not None:
        if node.op != "If":
            return TensorProto.UNDEFINED
        infer_types(inner.nodes)
        return element_type(inner.outputs[index])
    typed_by = _TYPED_BY.get(node.op, 0)
    return element_type(node.inputs[typed_by]) if typed_by < len(node.inputs) else TensorProto.UNDEFINED


def _fused_type(node: gs.Node, index: int) -> int:
    """The type of a fused op's result: integers for plans, pages and lists; else that of its first float input."""
    op = OPS.get(node.op)
    if op is None or index >= len(op.outputs):
        return TensorProto.UNDEFINED
    name = op.outputs[index].name
    if name == "lse":
        return TensorProto.FLOAT
    if name in ("output", "query_rope_out"):
        return next((kind for kind in map(element_type, node.inputs) if kind in FLOATS), TensorProto.UNDEFINED)
    return TensorProto.INT32
