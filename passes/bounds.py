"""What a probe refuses to evaluate: arrays out of all proportion, and what ONNX leaves undefined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt.errors import MlaTrtError
from mla_trt.passes.einsum import einsum_shape

MAX_ELEMENTS = 1 << 28  # of one array: what is larger on a small case is not worth its memory
MAX_DATA = 1 << 26  # the same for data, each element of which takes 16 bytes and more


class ProbeError(MlaTrtError):
    """A tensor cannot be evaluated on this case; the message says which node is in the way."""

    def __init__(self, message: str, node: gs.Node | None = None) -> None:
        super().__init__(message)
        self.node = node


def check_size(node: gs.Node, arguments: Sequence[np.ndarray | None], most: int, *, elementwise: bool) -> None:
    """Checks that a node's result has no more elements than `most`.

    Args:
        node: of a standard op.
        arguments: the values of its inputs; of data, anything of the shape.
        most: limit.
        elementwise: the inputs broadcast to the result.

    Raises:
        ProbeError: the result would be too large.
    """
    shapes = [() if argument is None else argument.shape for argument in arguments]
    size = math.prod(np.broadcast_shapes(*shapes)) if elementwise else _result_size(node, shapes, arguments)
    if size > most:
        raise ProbeError(f"node '{node.name or node.op}' ({node.op}) makes {size} elements of a small case", node)


def _result_size(node: gs.Node, shapes: list[tuple[int, ...]], arguments: Sequence[np.ndarray | None]) -> int:
    """Elements of the result of an op that can make much out of little; 0 for others."""

    def numbers(index: int) -> list[int]:
        return [int(value) for value in np.asarray(arguments[index]).reshape(-1)]

    if node.op == "ConstantOfShape":
        return math.prod(numbers(0))
    if node.op == "Expand":
        return math.prod(max(a, b) for a, b in zip_longest(shapes[0][::-1], numbers(1)[::-1], fillvalue=1))
    if node.op == "Tile":
        return math.prod(shapes[0]) * math.prod(numbers(1))
    if node.op == "Range":
        start, end, step = (
            float(np.asarray(argument).reshape(-1)[0]) for argument in arguments if argument is not None
        )
        return max(math.ceil((end - start) / step), 0) if step else 0
    if node.op == "Gather":
        return math.prod(shapes[0]) // max(shapes[0][node.attrs.get("axis", 0)], 1) * math.prod(shapes[1])
    if node.op == "OneHot":
        return math.prod(shapes[0]) * numbers(1)[0]
    if node.op == "Pad":
        pads = numbers(1)
        axes = numbers(3) if len(shapes) > 3 and arguments[3] is not None else range(len(shapes[0]))
        sizes = list(shapes[0])
        for count, axis in enumerate(axes):
            sizes[axis] += pads[count] + pads[count + len(pads) // 2]
        return math.prod(sizes)
    if node.op == "MatMul" and min(map(len, shapes)) >= 2:
        return math.prod(np.broadcast_shapes(shapes[0][:-2], shapes[1][:-2])) * shapes[0][-2] * shapes[1][-1]
    if node.op == "Einsum":
        return math.prod(einsum_shape(node.attrs["equation"], shapes))
    return 0


def check_scatter(node: gs.Node, arguments: Sequence[np.ndarray | None]) -> None:
    """Checks the shapes of a ScatterND, which the reference implementation broadcasts.

    Raises:
        ProbeError: indices and updates do not fit.
    """
    if node.op != "ScatterND":
        return
    data, indices, updates = (() if argument is None else argument.shape for argument in arguments)
    if updates != (*indices[:-1], *data[indices[-1] :]):
        raise ProbeError(
            f"node '{node.name}' (ScatterND) writes {list(updates)} where indices are {list(indices)} and data is {list(data)}",
            node,
        )
