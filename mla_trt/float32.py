"""Copies of half-precision models in float32, in which rounding does not hide or excuse a mistake."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

HALF_TYPES = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
# Attributes whose value is an element type, of standard ops and of ONNX Runtime's.
TYPE_ATTRIBUTES = {"to", "dtype", "output_dtype", "softmax_precision", "stash_type"}


def has_half_types(model: onnx.ModelProto) -> bool:
    """Whether any input, initializer or conversion of a model is fp16 or bf16."""
    graphs = list(_graphs(model.graph))
    tensors = (tensor for graph in graphs for tensor in graph.initializer)
    inputs = (value.type.tensor_type.elem_type for value in model.graph.input)
    nodes = [node for part in (*graphs, *model.functions) for node in part.node]
    attributes = [attribute for node in nodes for attribute in node.attribute]
    return (
        any(tensor.data_type in HALF_TYPES for tensor in tensors)
        or any(element_type in HALF_TYPES for element_type in inputs)
        or any(attribute.name in TYPE_ATTRIBUTES and attribute.i in HALF_TYPES for attribute in attributes)
        or any(attribute.t.data_type in HALF_TYPES for attribute in attributes)
    )


def to_float32(model: onnx.ModelProto, base_dir: Path | None = None) -> onnx.ModelProto:
    """Returns a copy of a model in which every fp16 and bf16 tensor is float32.

    Values stay what they are: weights keep their rounding, and masks of finfo.min of the half type keep that value.

    Args:
        model: any model; functions and subgraphs are converted as well.
        base_dir: folder of its external data, of which half-precision tensors are read into the copy.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _convert_graph(copy.graph, base_dir)
    for function in copy.functions:
        del function.value_info[:]
        _convert_nodes(function.node, base_dir)
    return copy


def _graphs(graph: onnx.GraphProto) -> Iterable[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for inner in _inner_graphs(node):
            yield from _graphs(inner)


def _inner_graphs(node: onnx.NodeProto) -> Iterable[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _convert_graph(graph: onnx.GraphProto, base_dir: Path | None) -> None:
    for tensor in graph.initializer:
        _convert_tensor(tensor, base_dir)
    for value in (*graph.input, *graph.output):
        _convert_type(value.type)
    del graph.value_info[:]
    _convert_nodes(graph.node, base_dir)


def _convert_nodes(nodes: Iterable[onnx.NodeProto], base_dir: Path | None) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name in TYPE_ATTRIBUTES and attribute.i in HALF_TYPES:
                attribute.i = TensorProto.FLOAT
            if attribute.type == onnx.AttributeProto.TENSOR:
                _convert_tensor(attribute.t, base_dir)
            for tensor in attribute.tensors:
                _convert_tensor(tensor, base_dir)
            if attribute.type == onnx.AttributeProto.TYPE_PROTO:
                _convert_type(attribute.tp)
        for inner in _inner_graphs(node):
            _convert_graph(inner, base_dir)


def _convert_tensor(tensor: onnx.TensorProto, base_dir: Path | None) -> None:
    if tensor.data_type not in HALF_TYPES:
        return
    values = numpy_helper.to_array(tensor, str(base_dir or "")).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _convert_type(type_proto: onnx.TypeProto) -> None:
    kind = type_proto.WhichOneof("value")
    if kind in ("tensor_type", "sparse_tensor_type"):
        tensor_type = getattr(type_proto, kind)
        if tensor_type.elem_type in HALF_TYPES:
            tensor_type.elem_type = TensorProto.FLOAT
    elif kind in ("sequence_type", "optional_type"):
        _convert_type(getattr(type_proto, kind).elem_type)
