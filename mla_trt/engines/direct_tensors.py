"""Lets plugins read and write tensors as the model has them, in the model that TensorRT's parser gets.

The op set has tokens in rows, and cos and sin of the pairs alone in float32. A model has a batch axis before its tokens, and rope tables of
its own type whose rows hold each value twice. What makes the one of the other is a kernel for each tensor, as TensorRT 10.6 does it, wherever
nothing else is there that it could be part of: 4 us of a layer's 131 (docs/engines.md). Plugins need none of it.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from mla_trt.engines.unused import remove_unused
from mla_trt.engines.weight_products import WeightProducts
from mla_trt.loading import ModelOnDisk
from mla_trt.ops import OPS, mla_nodes
from mla_trt.ops.schema import TABLE

ROWS, BATCHED = "rows", "batched"
"""Attributes of plugin nodes: names of inputs of which all axes but the last count as one, and of outputs with an axis of 1 before the others."""
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def read_directly(model: ModelOnDisk) -> None:
    """Takes out what stands between tensors and plugins only for the op set's sake, in place.

    What `MlaPlan` counts, the hidden states that `MlaInputProjections` reads, tables of cos and sin, and what `MlaOutputProjection` writes.

    Args:
        model: a lowered model, and where its weights are. With these attributes its nodes are those of plugins only.
    """
    graph = model.proto.graph
    found = WeightProducts(model)
    for node in mla_nodes(model.proto):
        _read_inputs(node, found)
    _write_outputs(graph, found)
    remove_unused(graph)


def _read_inputs(node: onnx.NodeProto, found: WeightProducts) -> None:
    rows = []
    for place, formal in enumerate(OPS[node.op_type].inputs[: len(node.input)]):
        name = node.input[place]
        if (node.op_type, formal.name) == ("MlaPlan", "tokens"):
            source = _counted(name, found)
        elif (node.op_type, formal.name) == ("MlaInputProjections", "hidden"):
            source = found.rows(name)
        elif formal.kind == TABLE:
            source = _table(name, found)
        else:
            continue
        dims = found.probe.dims(source)
        if source == name or dims is None:
            continue
        node.input[place] = source
        if len(dims) != 2 or formal.shape is None:
            rows.append(formal.name)
    if rows:
        node.attribute.append(helper.make_attribute(ROWS, " ".join(rows)))


def _counted(tensor: str, found: WeightProducts) -> str:
    """The rows of which a tensor has one value each."""
    node = found.makers.get(tensor)
    if node is None or node.op_type != "Gather":
        return tensor
    index, dims = found.probe.array(node.input[1]), found.probe.dims(node.input[0])
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return node.input[0] if index is not None and index.ndim == 0 and dims and axis in (-1, len(dims) - 1) else tensor


def _table(tensor: str, found: WeightProducts) -> str:
    """The rows of any float type whose first values are those of a float32 tensor."""
    source = tensor
    while True:
        source, start = found.columns(source)
        if start > 0:
            return tensor
        node = found.makers.get(source)
        if node is None or node.op_type != "Cast" or found.probe.dtype(node.input[0]) not in FLOATS:
            return source
        if helper.get_node_attr_value(node, "to") != TensorProto.FLOAT:  # rounds
            return source
        source = node.input[0]


def _write_outputs(graph: onnx.GraphProto, found: WeightProducts) -> None:
    readers = {name: node for node in graph.node for name in node.input}
    columns = {tensor.name: tensor.dims[-1] for tensor in graph.initializer if tensor.dims}
    gone = set()
    for node in graph.node:
        if node.op_type != "MlaOutputProjection":
            continue
        reader = readers.get(node.output[0])
        dims = found.probe.dims(reader.output[0]) if reader is not None else None
        if reader is None or reader.op_type != "Reshape" or found.uses[node.output[0]] != 1 or not dims:
            continue
        weight = OPS[node.op_type].given_inputs(node)["w_o"]
        if len(dims) == 3 and dims[0] == 1 and dims[2] == columns.get(weight):
            gone.add(reader.output[0])
            node.output[0] = reader.output[0]
            node.attribute.append(helper.make_attribute(BATCHED, "hidden"))
    kept = [node for node in graph.node if node.op_type != "Reshape" or node.output[0] not in gone]
    del graph.node[:]
    graph.node.extend(kept)
