"""Last pass over the graph: what is left of the export outside of the fused ops, in ops and attributes that the target's parser takes.

The numbers stay: data movement is bitwise the same, arithmetic differs by rounding only. ONNX Runtime runs the result, which is
what verification runs. What the parsers take is in `legalize_table.py`, the rewriting rules are in `legalize_rules.py` (one an op),
`legalize_quantized.py` and `legalize_constants.py`; docs/tensorrt-support.md tells where the facts come from.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import onnx_graphsurgeon as gs
from onnx import TensorProto

from mla_trt.ops import DOMAIN
from mla_trt.passes.graph import Emitter, Names, is_empty, remove_dead_nodes, small_constant, subgraphs, topological
from mla_trt.passes.legalize_constants import fold_constants, to_single_precision
from mla_trt.passes.legalize_quantized import Quantized
from mla_trt.passes.legalize_rules import RULES, Rewriter, trim
from mla_trt.passes.legalize_table import DECIDING_INPUT, TARGETS, Target
from mla_trt.passes.legalize_types import element_type, infer_types, type_name
from mla_trt.weight_file import WeightFile

log = logging.getLogger(__name__)

STANDARD_DOMAINS = (None, "", "ai.onnx")
_NEEDS_CONSTANT = {
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"), 1),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "CumSum", "Squeeze", "Unsqueeze"), 1),
    "OneHot": 1,
    "Slice": 3,
    "Pad": 3,
}


@dataclass(frozen=True)
class IllegalNode:
    """A node that the target's parser refuses.

    Attributes:
        name: the node's name, or that of its first result.
        reason: what the parser does not take.
    """

    name: str
    op: str
    reason: str


def legalize(
    graph: gs.Graph,
    target: str,
    base_dir: Path | None = None,
    weight_file: WeightFile | None = None,
    notes: list[str] | None = None,
) -> int:
    """Rewrites, in place, what the target's parser refuses; nodes of the fused ops are left alone.

    Args:
        graph: the lowered graph, opset 26.
        target: a key of `legalize_table.TARGETS`.
        base_dir: folder of the external weights, of which only those that must change their type are read.
        weight_file: where those go; into the model itself where there is none.
        notes: takes a sentence for the report about each kind of weight that changed its type.

    Returns:
        How many nodes were changed.
    """
    parser = TARGETS[target]
    if parser is None:
        return 0
    legalizer = _Legalizer(parser, Names(graph), base_dir, weight_file)
    changed = legalizer.run(graph)
    for kinds, count in sorted(legalizer.recoded.items()):
        note = f"{count} weights went from {kinds}, as {parser.name} takes them"
        if notes is None:
            log.warning("%s", note)
        else:
            notes.append(note)
    return changed


@dataclass
class _Legalizer:
    """The rules over a graph and the graphs in it."""

    target: Target
    names: Names
    base_dir: Path | None
    weight_file: WeightFile | None
    recoded: Counter[str] = field(default_factory=Counter)

    def run(self, graph: gs.Graph) -> int:
        """Rewrites a graph and those in it; the nodes of the outermost are left out of order."""
        nodes = topological(graph.nodes)
        infer_types(nodes)
        changed = _name_no_numbers(graph) + to_single_precision(graph, Emitter(graph, self.names), self.base_dir)
        return changed + self._rewrite(graph, nodes)

    def _rewrite(self, graph: gs.Graph, nodes: list[gs.Node]) -> int:
        rewriter = Rewriter(self.target, Emitter(graph, self.names))
        infer_types(nodes)
        changed = sum(self._rewrite_inner(inner) for node in nodes for inner in subgraphs(node))
        changed += fold_constants(graph, nodes)
        remove_dead_nodes(graph)
        nodes = [node for node in nodes if node.outputs]
        changed += Quantized(rewriter, self.base_dir, self.weight_file, self.recoded).apply(nodes)
        for node in nodes:
            if node.domain in STANDARD_DOMAINS:
                trimmed = trim(node)
                rule = None if _is_taken(node, self.target) else RULES.get(node.op)
                changed += bool(rule is not None and rule(node, rewriter)) or trimmed
        remove_dead_nodes(graph)
        return changed

    def _rewrite_inner(self, graph: gs.Graph) -> int:
        changed = self._rewrite(graph, topological(graph.nodes))
        graph.nodes[:] = topological(graph.nodes)
        return changed


def _name_no_numbers(graph: gs.Graph) -> int:
    """Sizes of the graph's inputs and outputs that are written as names ("192") become sizes: TensorRT takes a name to be any size."""
    changed = 0
    for tensor in (*graph.inputs, *graph.outputs):
        if tensor.shape is not None and any(isinstance(size, str) and size.isdigit() for size in tensor.shape):
            tensor.shape = [int(size) if isinstance(size, str) and size.isdigit() else size for size in tensor.shape]
            changed += 1
    return changed


def _is_taken(node: gs.Node, target: Target) -> bool:
    """Whether a node is of an op that only other targets lack."""
    return node.op in ("RMSNormalization", "Swish") and node.op in target.ops


def illegal_nodes(graph: gs.Graph, target: str) -> list[IllegalNode]:
    """The nodes, of subgraphs too, that the target's parser refuses, each with the reason.

    Call it after `legalize`, which has written down the element types; a type that is unknown passes.
    """
    parser = TARGETS[target]
    if parser is None:
        return []
    found = []
    for node in graph.nodes:
        reason = _refusal(node, parser)
        if reason is not None:
            found.append(IllegalNode(node.name or node.outputs[0].name, node.op, reason))
        for inner in subgraphs(node):
            found.extend(illegal_nodes(inner, target))
    return found


def _refusal(node: gs.Node, target: Target) -> str | None:
    """Why the target refuses a node; None where it does not."""
    if node.domain == DOMAIN:
        return None
    if node.domain not in STANDARD_DOMAINS:
        return f"{target.name} has no ops of the domain '{node.domain}'"
    types = target.ops.get(node.op)
    if types is None:
        return f"{target.name} does not know the op"
    deciding = DECIDING_INPUT.get(node.op, 0)
    kind = element_type(node.inputs[deciding]) if deciding < len(node.inputs) else TensorProto.UNDEFINED
    if kind and kind not in types and node.op not in ("Shape", "Size") and not _is_float64_edge(node):
        return f"{target.name} does not take {type_name(kind)}"
    return _attribute_refusal(node, target) or _operand_refusal(node, target)


def _is_float64_edge(node: gs.Node) -> bool:
    """Casts at the graph's edge keep its float64 interface, which the parser makes float32."""
    return node.op == "Cast" and TensorProto.DOUBLE in (element_type(node.inputs[0]), node.attrs.get("to"))


def _attribute_refusal(node: gs.Node, target: Target) -> str | None:
    reduction = node.attrs.get("reduction")
    if node.op == "ScatterND" and reduction is not None and not (reduction == "none" and target.takes_reduction_none):
        return f"the attribute reduction='{reduction}'"
    if node.op == "ScatterElements" and reduction not in (None, "none") and not _scatters_whole_rows(node):
        return f"reduction='{reduction}' of a part of the other axes, which TensorRT computes wrongly"
    if node.op == "Cast" and node.attrs["to"] not in target.cast_types and not _is_float64_edge(node):
        return f"a cast to {type_name(node.attrs['to'])}"
    if node.op == "LayerNormalization" and any(not is_empty(output) for output in node.outputs[1:]):
        return "results other than the first"
    if node.op == "Einsum" and any(
        operand.count(letter) > 1
        for operand in node.attrs["equation"].split("->")[0].split(",")
        for letter in operand.strip(" .")
    ):
        return "a diagonal"
    return None


def _scatters_whole_rows(node: gs.Node) -> bool:
    """Whether a ScatterElements surely has as many indices as its data has elements along the axes other than its own."""
    data, indices = (tensor.shape for tensor in node.inputs[:2])
    if data is None or indices is None:
        return False
    axis = node.attrs.get("axis", 0) % len(data)
    return all(left == right for place, (left, right) in enumerate(zip(data, indices, strict=True)) if place != axis)


def _operand_refusal(node: gs.Node, target: Target) -> str | None:
    index = _NEEDS_CONSTANT.get(node.op)
    if (
        index is not None
        and len(node.inputs) > index
        and not is_empty(node.inputs[index])
        and not isinstance(node.inputs[index], gs.Constant)
    ):
        return f"operand {index} must be an initializer"
    if (node.op == "Squeeze" and len(node.inputs) < 2) or (node.op == "Slice" and len(node.inputs) < 4):
        return "the axes must be named"
    if node.op == "TopK":
        count = small_constant(node.inputs[1])
        if count is not None and int(count.reshape(-1)[0]) > target.max_k:
            return f"more than {target.max_k} of the largest"
    if (
        node.op == "DequantizeLinear"
        and node.attrs.get("block_size", 0)
        and element_type(node.inputs[0]) != TensorProto.INT4
    ):
        return f"blocks of {type_name(element_type(node.inputs[0]))}"
    if node.op == "DequantizeLinear" and len(node.inputs) > 2:
        zero = small_constant(node.inputs[2])
        if zero is None or zero.astype(float).any():
            return "a zero point other than 0"
    return None
