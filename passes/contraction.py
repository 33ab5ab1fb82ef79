"""One view of everything that multiplies and sums: MatMul, Gemm, two-operand Einsum and ReduceSum of a Mul, as out[g, m, n] = sum over k of
left[g, m, k] right[g, n, k]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt.errors import BadModelError
from mla_trt.passes.einsum import einsum_labels
from mla_trt.passes.graph import producer
from mla_trt.passes.probe import Linear, Probe, Term

BROADCAST = ""  # label of an axis of size 1 that stands for none
_PRODUCTS = ("MatMul", "Gemm", "Einsum")


def operands(node: gs.Node) -> tuple[gs.Tensor, gs.Tensor] | None:
    """The two tensors that a node multiplies and sums over; None where it does something else."""
    if node.domain:
        return None
    if node.op in _PRODUCTS and (node.op != "Einsum" or len(node.inputs) == 2):
        return node.inputs[0], node.inputs[1]
    if node.op == "ReduceSum" and len(node.inputs) == 2:
        product = producer(node.inputs[0])
        if product is not None and product.op == "Mul":
            return product.inputs[0], product.inputs[1]
    return None


@dataclass(frozen=True)
class Contraction:
    """A product with its axes sorted into groups.

    Attributes:
        left_axes, right_axes: for each operand, its axes in the order (group, row, summed); -1 stands for a missing (broadcast) axis.
        groups, rows, columns, summed: sizes of the axes of each kind.
        order: for each axis of the output, its number among (*groups, *rows, *columns).
    """

    node: gs.Node
    left: gs.Tensor
    right: gs.Tensor
    left_axes: tuple[int, ...]
    right_axes: tuple[int, ...]
    groups: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    summed: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def place(self) -> np.ndarray:
        """int64 array of the output's shape: flat indices into [groups, rows, columns]."""
        sizes = (*self.groups, *self.rows, *self.columns)
        return np.arange(math.prod(sizes), dtype=np.int64).reshape(sizes).transpose(self.order)

    def left_array(self, array: np.ndarray) -> np.ndarray:
        """An array of the left operand's shape as [groups, rows, summed]."""
        return _arrange(
            array, self.left_axes, (*self.groups, *self.rows, *self.summed), len(self.groups), len(self.rows)
        )

    def right_array(self, array: np.ndarray) -> np.ndarray:
        """An array of the right operand's shape as [groups, columns, summed]."""
        return _arrange(
            array, self.right_axes, (*self.groups, *self.columns, *self.summed), len(self.groups), len(self.columns)
        )

    def left_linear(self, linear: Linear) -> Linear:
        return _map(linear, self.left_array)

    def right_linear(self, linear: Linear) -> Linear:
        return _map(linear, self.right_array)

    def unravel(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(group, row, column) of flat indices into the output."""
        place = self.place.reshape(-1)[flat]
        columns, rows = math.prod(self.columns), math.prod(self.rows)
        return place // (columns * rows), place // columns % rows, place % columns


def _arrange(array: np.ndarray, axes: tuple[int, ...], sizes: tuple[int, ...], groups: int, rows: int) -> np.ndarray:
    present = [axis for axis in axes if axis >= 0]
    absent = tuple(axis for axis in range(array.ndim) if axis not in present)  # broadcast axes of size 1
    array = np.squeeze(array, absent).transpose(_ranks(present))
    sizes_present = iter(array.shape)
    array = array.reshape([next(sizes_present) if axis >= 0 else 1 for axis in axes])
    array = np.broadcast_to(array, sizes)
    return array.reshape(
        math.prod(sizes[:groups]), math.prod(sizes[groups : groups + rows]), math.prod(sizes[groups + rows :])
    )


def _ranks(axes: list[int]) -> list[int]:
    """Each axis's place among the axes that are there."""
    ordered = sorted(axes)
    return [ordered.index(axis) for axis in axes]


def _map(linear: Linear, change: object) -> Linear:
    terms = tuple(Term(change(term.codes), change(term.coefficients)) for term in linear.terms)  # type: ignore[operator]
    return Linear(tuple(terms[0].codes.shape), terms)


def contraction(probe: Probe, node: gs.Node) -> Contraction | None:
    """The contraction that a node is on this case; None where it is something else (a Gemm with a bias counts as it is without)."""
    pair = operands(node)
    if pair is None:
        return None
    left, right = pair
    left_shape, right_shape, out_shape = probe.shape(left), probe.shape(right), probe.shape(node.outputs[0])
    if node.op == "MatMul":
        if len(left_shape) < 2 or len(right_shape) < 2:
            return None
        batch = [f"b{axis}" for axis in range(len(out_shape) - 2)]
        left_labels = [*batch[len(batch) - len(left_shape) + 2 :], "m", "k"]
        right_labels = [*batch[len(batch) - len(right_shape) + 2 :], "k", "n"]
        out_labels = [*batch, "m", "n"]
    elif node.op == "Gemm":
        left_labels = ["k", "m"] if node.attrs.get("transA", 0) else ["m", "k"]
        right_labels = ["n", "k"] if node.attrs.get("transB", 0) else ["k", "n"]
        out_labels = ["m", "n"]
        if node.attrs.get("alpha", 1.0) != 1.0:
            return None
    elif node.op == "ReduceSum":
        return _summed_product(probe, node, left, right)
    else:
        parsed = _parse_einsum(node.attrs["equation"], len(left_shape), len(right_shape))
        if parsed is None:
            return None
        left_labels, right_labels, out_labels = parsed
    return _sort_axes(node, (left, left_labels, left_shape), (right, right_labels, right_shape), out_labels)


_Operand = tuple[gs.Tensor, list[str], tuple[int, ...]]


def _sort_axes(
    node: gs.Node, left_operand: _Operand, right_operand: _Operand, out_labels: list[str]
) -> Contraction | None:
    """Sorts labelled axes into groups, rows, columns and summed ones."""
    left, left_labels, left_shape = left_operand
    right, right_labels, right_shape = right_operand
    size: dict[str, int] = {}
    for labels, shape in ((left_labels, left_shape), (right_labels, right_shape)):
        for label, extent in zip(labels, shape, strict=True):
            if label == BROADCAST:
                continue
            size[label] = max(size.get(label, 1), extent) if extent != 0 else 0
    # A broadcast axis of size 1 beside a real one is treated as missing.
    left_real = [
        label for label, extent in zip(left_labels, left_shape, strict=True) if label and extent == size[label]
    ]
    right_real = [
        label for label, extent in zip(right_labels, right_shape, strict=True) if label and extent == size[label]
    ]
    groups = [label for label in out_labels if label in left_labels and label in right_labels]
    rows = [label for label in out_labels if label in left_labels and label not in right_labels]
    columns = [label for label in out_labels if label in right_labels and label not in left_labels]
    summed = [label for label in left_labels if label and label in right_labels and label not in out_labels]
    understood = {*groups, *rows, *columns, *summed}
    if (
        len(understood) != len({*out_labels, *left_labels, *right_labels} - {BROADCAST})
        or not set(out_labels) <= understood
    ):
        return None

    def axes(labels: list[str], real: list[str], order: list[str]) -> tuple[int, ...]:
        return tuple(labels.index(label) if label in real else -1 for label in order)

    order = [*groups, *rows, *columns]
    inverse = tuple(order.index(label) for label in out_labels)
    return Contraction(
        node,
        left,
        right,
        axes(left_labels, left_real, [*groups, *rows, *summed]),
        axes(right_labels, right_real, [*groups, *columns, *summed]),
        tuple(size[label] for label in groups),
        tuple(size[label] for label in rows),
        tuple(size[label] for label in columns),
        tuple(size[label] for label in summed),
        inverse,
    )


def _summed_product(probe: Probe, node: gs.Node, left: gs.Tensor, right: gs.Tensor) -> Contraction | None:
    """ReduceSum(Mul(left, right)): an axis that only one operand has (the other is broadcast) is a row or a column."""
    shape = probe.shape(node.inputs[0])
    axes = {int(axis) % len(shape) for axis in np.asarray(probe.known(node.inputs[1])).reshape(-1)}
    names = [f"a{axis}" for axis in range(len(shape))]
    found: list[_Operand] = []
    for tensor in (left, right):
        own = probe.shape(tensor)
        skipped = len(shape) - len(own)
        labels = [
            names[skipped + axis] if extent == shape[skipped + axis] else BROADCAST for axis, extent in enumerate(own)
        ]
        found.append((tensor, labels, own))
    for axis in axes:
        if not all(names[axis] in labels for _, labels, _ in found):
            return None
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    return _sort_axes(node, found[0], found[1], [names[axis] for axis in kept])


def _parse_einsum(
    equation: str | bytes, left_rank: int, right_rank: int
) -> tuple[list[str], list[str], list[str]] | None:
    try:
        (left, right), result = einsum_labels(equation, (left_rank, right_rank))
    except BadModelError:
        return None
    if any(len(set(item)) != len(item) for item in (left, right, result)):
        return None
    return left, right, result
