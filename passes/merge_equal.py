"""Nodes that compute the same from the same become one, so that what an exporter wrote down twice is one tensor to the matchers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from mla_trt.passes.graph import is_empty, remove_dead_nodes, replace_uses, small_constant

_DIFFERENT_EACH_TIME = (
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
    "Dropout",
)
_WITH_GRAPHS = ("If", "Loop", "Scan", "SequenceMap")
_SMALL = 256  # elements; larger constants are the same only where they are one tensor


def merge_equal(graph: gs.Graph) -> int:
    """Merges equal nodes, in one pass in the order in which they stand; returns how many went."""
    kept_outputs = {id(tensor) for tensor in graph.outputs}
    first: dict[Any, gs.Node] = {}
    constants: dict[int, Any] = {}
    merged = 0
    for node in graph.nodes:
        if node.op in _DIFFERENT_EACH_TIME or node.op in _WITH_GRAPHS:
            continue
        key = (
            node.op,
            node.domain or "",
            len(node.outputs),
            tuple(sorted((name, _attribute_key(value)) for name, value in node.attrs.items())) if node.attrs else (),
            tuple(_input_key(tensor, constants) for tensor in node.inputs),
        )
        other = first.setdefault(key, node)
        if other is node or any(id(tensor) in kept_outputs for tensor in node.outputs):
            continue
        for mine, its in zip(node.outputs, other.outputs, strict=True):
            if is_empty(its) and not is_empty(mine):
                break
        else:
            for mine, its in zip(list(node.outputs), list(other.outputs), strict=True):
                if not is_empty(mine):
                    replace_uses(graph, mine, its)
            merged += 1
    if merged:
        remove_dead_nodes(graph)
    return merged


def _attribute_key(value: Any) -> Any:
    if isinstance(value, gs.Tensor):
        values = small_constant(value, _SMALL)
        return id(value) if values is None else _array_key(values)
    if isinstance(value, np.ndarray):
        return _array_key(value)
    if isinstance(value, (list, tuple)):
        return tuple(_attribute_key(item) for item in value)
    return type(value).__name__, str(value)


def _input_key(tensor: gs.Tensor, constants: dict[int, Any]) -> Any:
    if is_empty(tensor):
        return ""
    if not isinstance(tensor, gs.Constant):
        return id(tensor)
    if id(tensor) not in constants:
        small = math.prod(tensor.shape) <= _SMALL and _is_plain(tensor)
        values = small_constant(tensor, _SMALL) if small else None
        constants[id(tensor)] = id(tensor) if values is None else _array_key(values)
    return constants[id(tensor)]


def _is_plain(tensor: gs.Constant) -> bool:
    """Whether a constant is dense: sparse ones are refused where they are needed."""
    return not isinstance(tensor._values, LazyValues) or hasattr(tensor._values.tensor, "data_location")


def _array_key(values: np.ndarray) -> tuple[np.dtype, tuple[int, ...], bytes]:
    return values.dtype, values.shape, values.tobytes()
