"""Shows which keys the sparse layers of a lowered model select, and makes them attend to given ones instead.

A model over fp8 rows selects other keys than one over f32 rows, and then its output differs by much more than rounding.
To tell the one from the other, verification runs the model as it was written over the keys that the f32 model selected.
"""

from __future__ import annotations

import onnx
from onnx import helper

from mla_trt.ops import OPS, make_node

SPARSE = "MlaSparseAttention"
INDEXER = "MlaIndexer"
FORCED = "forced_indices"


def sparse_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The sparse layers that have an indexer, in graph order."""
    return [
        node for node in model.graph.node if node.op_type == SPARSE and "index_query" in OPS[SPARSE].given_inputs(node)
    ]


def top_k(model: onnx.ModelProto) -> int | None:
    """The largest number of selected keys, None in a dense model."""
    return max((OPS[SPARSE].node_attributes(node).integer("top_k") for node in sparse_nodes(model)), default=None)


def show_selection(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of a model that also outputs the selection of each indexer, i32 [T, top_k], and the names of these
    outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    shown = []
    for node in sparse_nodes(copy):
        position = [output.name for output in OPS[SPARSE].outputs].index("indices")
        if len(node.output) <= position or not node.output[position]:
            node.output.extend([""] * (position + 1 - len(node.output)))
            node.output[position] = f"{node.output[0]}.indices"
            _attach_function(copy, node)
        shown.append(node.output[position])
        if all(output.name != shown[-1] for output in copy.graph.output):
            copy.graph.output.append(helper.make_tensor_value_info(shown[-1], onnx.TensorProto.INT32, ["T", None]))
    return copy, shown


def force_selection(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str], list[str]]:
    """A copy of a model whose sparse layers attend to keys that are given from outside.

    Returns:
        the copy, the names of its new inputs (i32 [T, top_k], one for each indexer), and those of its new outputs: what
        each indexer would have selected, in the same order.
    """
    copy, shown = show_selection(model)
    forced = {name: f"{FORCED}.{index}" for index, name in enumerate(shown)}
    nodes = []
    for node in copy.graph.node:
        if node.op_type != SPARSE:
            nodes.append(node)
            continue
        op = OPS[SPARSE]
        inputs, outputs, attributes = op.given_inputs(node), op.given_outputs(node), op.node_attributes(node)
        if "indices" in inputs:
            selection = forced[inputs["indices"]]
        else:
            selection = forced[outputs["indices"]]
            indexer = OPS[INDEXER]
            known = {attribute.name for attribute in indexer.attributes}
            taken = {formal.name: inputs[formal.name] for formal in indexer.inputs if formal.name in inputs}
            made = {"indices": outputs["indices"], "indexer_cache_out": outputs["indexer_cache_out"]}
            kept = {name: value for name, value in attributes.items() if name in known}
            nodes.append(make_node(INDEXER, taken, made, f"{node.name}.indexer", **kept))
            shared = {formal.name for formal in OPS["MlaAttention"].inputs}
            inputs = {name: value for name, value in inputs.items() if name in shared}
        inputs["indices"] = selection
        attended = {name: outputs[name] for name in ("output", "kv_cache_out")}
        nodes.append(make_node(SPARSE, inputs, attended, node.name, **attributes))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del copy.graph.node[:]
    copy.graph.node.extend(copies)
    for node in copy.graph.node:
        if node.op_type in (SPARSE, INDEXER) and not node.overload:
            _attach_function(copy, node)
    for name in forced.values():
        copy.graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.INT32, ["T", None]))
    return copy, list(forced.values()), shown


def _attach_function(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    """Adds the function of one node's variant. The bodies that the model carries stay: they are what is verified."""
    op = OPS[node.op_type]
    node.overload = op.variant(node)
    if all((function.name, function.overload) != (node.op_type, node.overload) for function in model.functions):
        model.functions.append(op.function(node))
