"""Constants for parsers that want them plain: small constant subgraphs become initializers, float64 becomes float32."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, numpy_helper
from onnx.reference.ops import load_op
from onnx_graphsurgeon.ir.tensor import LazyValues

from mla_trt.passes.graph import (
    OPSET,
    Emitter,
    constant_value,
    is_empty,
    small_constant,
    subgraphs,
    to_proto,
)
from mla_trt.passes.legalize_types import element_type

MAX_FOLDED_ELEMENTS = 1 << 16
# Deterministic ops without subgraphs whose reference implementation is exact or rounds as any float32 arithmetic does.
_FOLDED_OPS = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "Cast",
        "Ceil",
        "Clip",
        "Concat",
        "ConstantOfShape",
        "Div",
        "Equal",
        "Exp",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "GatherElements",
        "GatherND",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "Less",
        "LessOrEqual",
        "Log",
        "MatMul",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "NonZero",
        "Not",
        "Or",
        "Pad",
        "Pow",
        "Range",
        "Reciprocal",
        "ReduceMax",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "Reshape",
        "ScatterElements",
        "ScatterND",
        "Shape",
        "Sign",
        "Size",
        "Slice",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tile",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Where",
        "Xor",
    ]
)


def lazy_constant(name: str, values: np.ndarray) -> gs.Constant:
    """A constant that keeps types which numpy itself lacks (bfloat16, float8)."""
    return gs.Constant(name, LazyValues(numpy_helper.from_array(np.array(values, order="C"), name)))


def fold_constants(graph: gs.Graph, nodes: list[gs.Node]) -> int:
    """Replaces results that depend on small constants alone by initializers; returns how many nodes that made dead.

    Weights are not read: a constant in an external file, or of more than `MAX_FOLDED_ELEMENTS`, folds nothing but its shape.

    Args:
        nodes: the nodes of the graph in topological order.
    """
    kept = {id(tensor) for tensor in graph.outputs}
    folded = 0
    for node in nodes:
        if node.op not in _FOLDED_OPS or node.domain or any(id(output) in kept for output in node.outputs):
            continue
        results = _evaluate(node)
        if results is None:
            continue
        for output, values in zip(list(node.outputs), results, strict=True):
            if is_empty(output):
                continue
            constant = lazy_constant(output.name, values)
            output.name = f"{output.name}.folded"
            for reader in list(output.outputs):
                for index, tensor in enumerate(reader.inputs):
                    if tensor is output:
                        reader.inputs[index] = constant
        folded += 1
    return folded


def _evaluate(node: gs.Node) -> list[np.ndarray] | None:
    """The node's results, where they are constant and small."""
    if node.op == "Shape" and element_type(node.inputs[0]):
        shape = _known_shape(node)
        return None if shape is None else [np.array(shape, np.int64)]
    arrays: list[np.ndarray | None] = []
    for tensor in node.inputs:
        values = None if is_empty(tensor) else small_constant(tensor, MAX_FOLDED_ELEMENTS)
        if values is None and not is_empty(tensor):
            return None
        arrays.append(values)
    if _result_elements(node.op, arrays) > MAX_FOLDED_ELEMENTS:
        return None
    try:
        kernel = load_op("", node.op, OPSET)(
            to_proto(node), {"log": lambda *_: None, "opsets": {"": OPSET}, "verbose": 0, "new_ops": None}
        )
        return [np.asarray(result) for result in kernel.run(*arrays)]
    except (RuntimeError, ValueError, TypeError, IndexError):
        # What the reference implementation does not do stays a node, which the target may still take.
        return None


def _known_shape(node: gs.Node) -> list[int] | None:
    """The result of a Shape that does not depend on its input: of a constant, or of no axes at all."""
    start, end = node.attrs.get("start", 0), node.attrs.get("end")
    if isinstance(node.inputs[0], gs.Constant):
        return list(node.inputs[0].shape)[slice(start, end)]
    if end is not None and start >= end and (start < 0) == (end < 0):
        return []
    return None


def _result_elements(op: str, arrays: list[np.ndarray | None]) -> int:
    """An upper bound of the elements of a result, so that a huge one is never made."""
    given = [array for array in arrays if array is not None]
    if op == "ConstantOfShape":
        return math.prod(given[0].tolist())
    if op == "Tile":
        return given[0].size * math.prod(given[1].tolist())
    if op == "Range":
        start, limit, delta = (float(array.reshape(-1)[0]) for array in given)
        return max(0, math.ceil((limit - start) / delta)) if delta else 0
    if op == "Expand":
        return math.prod(np.broadcast_shapes(given[0].shape, tuple(given[1].tolist())))
    if op == "Pad":
        return (given[0].size + 1) * (1 + int(np.abs(given[1]).sum())) ** max(given[0].ndim, 1)
    total = sum(array.size for array in given)
    if op in ("Gather", "GatherElements", "GatherND"):
        return given[0].size * max(given[1].size, 1)
    try:
        return max(total, math.prod(np.broadcast_shapes(*(array.shape for array in given))))
    except ValueError:
        return total


def to_single_precision(graph: gs.Graph, emitter: Emitter, base_dir: Path | None) -> int:
    """Makes float64 arithmetic float32, which is what TensorRT's parser does with it silently; returns how many nodes it touched.

    Inputs and outputs of the graph keep their type. Values beyond float32's range become its largest.
    """
    wide = [tensor for tensor in graph.tensors().values() if element_type(tensor) == TensorProto.DOUBLE]
    touched = {id(node) for tensor in wide for node in (*tensor.inputs, *tensor.outputs)}
    for tensor in wide:
        if isinstance(tensor, gs.Constant):
            tensor.values = _single(constant_value(tensor, base_dir))
    for node in graph.nodes:
        if _narrow_attributes(node):
            touched.add(id(node))
        for inner in subgraphs(node):
            if to_single_precision(inner, Emitter(inner, emitter.names), base_dir):
                touched.add(id(node))
    for tensor in wide:
        if isinstance(tensor, gs.Constant):
            continue
        if any(tensor is item for item in graph.inputs):
            readers = list(tensor.outputs)
            single = emitter.cast(tensor, np.float32, f"{tensor.name}.single")
            for reader in readers:
                reader.inputs = [single if item is tensor else item for item in reader.inputs]
        elif any(tensor is item for item in graph.outputs) and tensor.inputs:
            single = emitter.variable(f"{tensor.name}.single", np.dtype(np.float32))
            maker = tensor.inputs[0]
            for reader in list(tensor.outputs):
                reader.inputs = [single if item is tensor else item for item in reader.inputs]
            maker.outputs = [single if item is tensor else item for item in maker.outputs]
            emitter.graph.nodes.append(
                gs.Node(
                    "Cast", emitter.names.new(f"{tensor.name}/Cast"), {"to": TensorProto.DOUBLE}, [single], [tensor]
                )
            )
        else:
            tensor.dtype = np.dtype(np.float32)
    return len(touched)


def _single(values: np.ndarray) -> np.ndarray:
    limit = np.finfo(np.float32).max
    finite = np.isfinite(values)
    return np.where(finite, np.clip(values, -limit, limit), values).astype(np.float32)


def _narrow_attributes(node: gs.Node) -> bool:
    if node.domain:
        return False
    changed = False
    for name, value in list(node.attrs.items()):
        if isinstance(value, gs.Constant) and value.dtype == np.float64:
            node.attrs[name] = gs.Constant(value.name, _single(np.asarray(value.values)))
            changed = True
        elif name in ("to", "dtype", "output_dtype") and value == TensorProto.DOUBLE:
            node.attrs[name] = TensorProto.FLOAT
            changed = True
    return changed
