"""What nothing reads any more in a model that is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx


def reads(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that are read in a graph and those in it, or are its results, once for each time."""
    for node in graph.node:
        yield from reads_of(node)
    yield from (value.name for value in graph.output)


def reads_of(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, itself or in its graphs, once for each time."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            yield from reads(inner)


def remove_unused(graph: onnx.GraphProto) -> None:
    """Takes nodes and initializers out of a graph whose results nothing reads."""
    uses = Counter(reads(graph))
    nodes: list[onnx.NodeProto] = []  # from the last
    for node in reversed(graph.node):
        if any(uses[name] for name in node.output):
            nodes.append(node)
        else:
            uses.subtract(reads_of(node))
    kept = [tensor for tensor in graph.initializer if uses[tensor.name]]
    if len(nodes) < len(graph.node):
        del graph.node[:]
        graph.node.extend(reversed(nodes))
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)
