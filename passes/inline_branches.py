"""Replaces an If by the branch it takes where the condition does not depend on data (TorchScript writes a squeeze so)."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from mla_trt.passes.graph import Names, remove_dead_nodes, replace_uses
from mla_trt.passes.probe import Probe, ProbeError


def inline_constant_branches(model: onnx.ModelProto) -> int:
    """Inlines every If whose condition is a constant, before anything else is read off the model; returns how many."""
    count = 0
    while (found := _constant_if(model.graph)) is not None:
        position, node, taken = found
        branch = next(item.g for item in node.attribute if item.name == ("then_branch" if taken else "else_branch"))
        prefix = f"{node.name or node.output[0]}/"
        names = {name: prefix + name for inner in branch.node for name in inner.output if name}
        names |= {tensor.name: prefix + tensor.name for tensor in branch.initializer}
        nodes = [_renamed(inner, names) for inner in branch.node]
        for tensor in branch.initializer:
            copy = model.graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = names[tensor.name]
        nodes += [
            onnx.helper.make_node("Identity", [names.get(made.name, made.name)], [outer], name=f"{prefix}{outer}")
            for made, outer in zip(branch.output, node.output, strict=True)
        ]
        rest = [onnx.NodeProto.FromString(item.SerializeToString()) for item in model.graph.node[position + 1 :]]
        del model.graph.node[position:]
        model.graph.node.extend([*nodes, *rest])
        count += 1
    return count


def _constant_if(graph: onnx.GraphProto) -> tuple[int, onnx.NodeProto, bool] | None:
    if all(node.op_type != "If" for node in graph.node):
        return None
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {
        node.output[0]: node.attribute[0].t
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    for position, node in enumerate(graph.node):
        if node.op_type == "If" and node.domain in ("", "ai.onnx") and node.input[0] in constants:
            return position, node, bool(numpy_helper.to_array(constants[node.input[0]]).reshape(-1)[0])
    return None


def _renamed(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto.FromString(node.SerializeToString())
    copy.input[:] = [names.get(name, name) for name in copy.input]
    copy.output[:] = [names.get(name, name) for name in copy.output]
    for attribute in copy.attribute:
        for graph in (attribute.g, *attribute.graphs):
            inner = [_renamed(item, names) for item in graph.node]
            del graph.node[:]
            graph.node.extend(inner)
            for value in graph.output:
                value.name = names.get(value.name, value.name)
        if attribute.type != onnx.AttributeProto.GRAPH:
            attribute.ClearField("g")
    return copy


def inline_branches(graph: gs.Graph, probes: list[Probe]) -> int:
    """Inlines every If whose condition has the same value on all probes; returns how many.

    The lowered graph runs on shapes that the export has too (one sequence of T tokens, or T sequences of one), so the branch stays right.
    """
    names = Names(graph)
    count = 0
    for node in [node for node in graph.nodes if node.op == "If" and not node.domain]:
        taken = set()
        for probe in probes:
            try:
                taken.add(
                    bool(np.asarray(probe.known(node.inputs[0])).reshape(-1)[0])
                    if probe.is_known(node.inputs[0])
                    else None
                )
            except ProbeError:
                taken.add(None)
        if len(taken) != 1 or None in taken:
            continue
        branch = node.attrs["then_branch" if taken.pop() else "else_branch"]
        for inner in branch.nodes:
            inner.name = names.new(f"{node.name}/{inner.name or inner.op}")
            for output in inner.outputs:
                output.name = names.new(f"{node.name}/{output.name}")
        graph.nodes.extend(branch.nodes)
        for outer, made in zip(list(node.outputs), list(branch.outputs), strict=True):
            replace_uses(graph, outer, made)
        count += 1
    remove_dead_nodes(graph)
    return count
