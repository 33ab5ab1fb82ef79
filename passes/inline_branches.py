"""Replaces an If by the branch it takes where the condition does not depend on data (TorchScript writes a squeeze so)."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt.passes.graph import Names, remove_dead_nodes, replace_uses
from mla_trt.passes.probe import Probe, ProbeError


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
