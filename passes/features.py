"""Follows atoms back to what they are entries of: tokens of a projection's output, weights of a constant operand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from mla_trt import interface as roles
from mla_trt.passes.attention_core import NoMatch
from mla_trt.passes.contraction import Contraction, contraction
from mla_trt.passes.graph import constant_value, producer
from mla_trt.passes.probe import ONE, ZERO, Linear, Probe, Term


@dataclass(frozen=True)
class Features:
    """Values of each token: chosen entries of a tensor whose leading axes are the tokens.

    Attributes:
        tensor: the source, seen as [tokens, width].
        index: int64, which entries.
        factor: float64 of the same shape.
    """

    tensor: gs.Tensor
    index: np.ndarray
    factor: np.ndarray


@dataclass(frozen=True)
class UpProjection:
    """Where the weights of an up-projection lie in a constant operand.

    Attributes:
        operand: the constant; `view` arranges it as [groups, columns, summed] (`right`: as the product's right operand).
        group, column, summed: int64, broadcast to [H, outputs, R]; the three indices of every weight.
        factor: float64, broadcast likewise.
    """

    operand: gs.Tensor
    view: Contraction
    right: bool
    group: np.ndarray
    column: np.ndarray
    summed: np.ndarray
    factor: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return np.broadcast_shapes(self.group.shape, self.column.shape, self.summed.shape)

    def weights(self, probe: Probe) -> np.ndarray:
        """The weights [H, outputs, R]: in the export's type, or float32 where they are scaled."""
        # A constant is read as it is stored: in float32 it would be as large again, once for each layer.
        stored = isinstance(self.operand, gs.Constant)
        operand = constant_value(self.operand, probe.base_dir) if stored else probe.known(self.operand)
        array = (self.view.right_array if self.right else self.view.left_array)(operand)
        result = self._gather(array)
        if not np.allclose(_without_repeats(self.factor), 1, rtol=1e-9):
            return (result.astype(np.float64) * self.factor).astype(np.float32)
        exported = self.operand.dtype
        dtype = helper.tensor_dtype_to_np_dtype(exported) if isinstance(exported, int) else exported or np.float32
        return result.astype(dtype, copy=False)

    def _gather(self, array: np.ndarray) -> np.ndarray:
        """The chosen entries of [group, column, summed], in any memory order."""
        last = self.summed.ndim - 1
        by_row = _repeats(self.group, range(last, last + 1)) and _repeats(self.column, range(last, last + 1))
        if not by_row or not _repeats(self.summed, range(last)):
            return array[self.group, self.column, self.summed]
        # Rows of what is summed, taken in the order in which the weight lies in memory: a stored [in, out] weight would
        # otherwise be read entry by entry, each from a cache line of its own.
        groups, columns, summed = array.shape
        rows = (self.group[..., 0] * columns + self.column[..., 0]).ravel()
        chosen = np.take(array.transpose(2, 0, 1).reshape(summed, groups * columns), rows, axis=1)
        order = self.summed[(0,) * last]
        if not np.array_equal(order, np.arange(summed)):
            chosen = chosen[order]
        return chosen.reshape(len(order), *self.shape[:last]).transpose(*range(1, last + 1), 0)


def _repeats(array: np.ndarray, axes: range) -> bool:
    """Whether an array is only broadcast along some axes."""
    return all(array.strides[axis] == 0 or array.shape[axis] == 1 for axis in axes)


def _without_repeats(array: np.ndarray) -> np.ndarray:
    """The array with one entry along each axis that is only broadcast."""
    return array[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)]


@dataclass(frozen=True)
class Place:
    """Where atoms lie: owner number, token, entry of the token, factor."""

    number: np.ndarray
    token: np.ndarray
    entry: np.ndarray
    factor: np.ndarray


def locate(probe: Probe, term: Term) -> Place:
    """Where the atoms of a term lie in their tensors, seen as [tokens, width]; -1 where a tensor has no axes of tokens."""
    numbers, flat = probe.owners(term.codes)
    token = np.full(numbers.shape, -1, np.int64)
    entry = np.full(numbers.shape, -1, np.int64)
    for number in np.unique(numbers[numbers > 0]):
        shape = probe.shape(probe.owner(int(number)))
        order = tokens_first(probe, shape)
        if order is None:
            continue
        chosen = numbers == number
        place = (
            np.arange(math.prod(shape))
            .reshape([shape[axis] for axis in order])
            .transpose(np.argsort(order))
            .reshape(-1)[flat[chosen]]
        )
        width = math.prod(shape) // (probe.batch * probe.sizes.new)
        token[chosen], entry[chosen] = place // width, place % width
    return Place(numbers, token, entry, term.coefficients)


def tokens_first(probe: Probe, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The order of axes that puts sequences and their tokens first; None where there are no such axes."""
    batch, new = probe.batch, probe.sizes.new
    axes = list(range(len(shape)))
    leading = 1
    for count in range(len(shape) + 1):
        if leading == batch * new and (count == 0 or leading > 1 or count >= 2):
            return tuple(axes)
        if count < len(shape):
            leading *= shape[count]
    for sequence in [axis for axis in axes if shape[axis] == batch] if batch > 1 else [None]:
        for tokens in [axis for axis in axes if shape[axis] == new and axis != sequence]:
            first = [axis for axis in (sequence, tokens) if axis is not None]
            return tuple(first + [axis for axis in axes if axis not in first])
    return None


def single_term(linear: Linear, what: str, node: gs.Node | None) -> Term:
    terms = [term for term in linear.terms if (term.codes != ZERO).any()]
    if len(terms) != 1:
        raise NoMatch(f"{what} are sums of several tensors", node)
    return terms[0]


def refuse_constants(linear: Linear, what: str, node: gs.Node | None) -> None:
    """Raises NoMatch where numbers are added to data."""
    if any(((term.codes == ONE) & (term.coefficients != 0)).any() for term in linear.terms):
        raise NoMatch(f"numbers are added to the {what} or stand among them", node)


def shared_heads(linear: Linear) -> str:
    """What attention it is whose keys or values [B, H, ...] are these, by how many of its heads have their own."""
    heads = linear.shape[1]
    codes = np.stack([term.codes[0].reshape(heads, -1) for term in linear.terms], axis=1)
    own = len(np.unique(codes, axis=0))
    if own == heads:
        return "ordinary multi-head attention"
    if own == 1:
        return "multi-query attention"
    return f"grouped-query attention, {own} heads of keys and values for {heads} of queries"


def take(linear: Linear, index: tuple[np.ndarray | slice | int, ...]) -> Linear:
    """Some elements of a tensor; terms that are absent from all of them are left out."""
    terms = [Term(term.codes[index], term.coefficients[index]) for term in linear.terms]
    kept = [term for term in terms if (term.codes != ZERO).any()] or terms[:1]
    return Linear(tuple(kept[0].codes.shape), tuple(kept))


def near(values: np.ndarray, expected: np.ndarray, *, rtol: float, atol: float) -> bool:
    """As `numpy.allclose` for finite numbers, with a third of its temporary arrays: rotations of all heads are millions of numbers."""
    error = np.subtract(values, expected)
    allowed = np.abs(expected)
    allowed *= rtol
    allowed += atol
    return bool((np.abs(error, out=error) <= allowed).all())


def is_input(probe: Probe, number: int) -> bool:
    return number > 0 and producer(probe.owner(number)) is None


def refuse_states(probe: Probe, numbers: np.ndarray, node: gs.Node | None) -> None:
    """Raises NoMatch where an owner is an input that keeps its size and is no cache with a row for every token."""
    for number in np.unique(numbers[numbers > 0]):
        name = probe.owner(int(number)).name
        if is_input(probe, int(number)) and any(name == entry.name for entry in probe.interface.by_role(roles.STATE)):
            raise NoMatch(
                f"the attention reads '{name}', which neither grows nor has a row for every token: a window, or a ring buffer",
                node,
            )


@dataclass(frozen=True)
class Projected:
    """Atoms that all come out of one product with constant weights: the data row and the weight column behind each."""

    view: Contraction
    weight: gs.Tensor
    right: bool
    data: Linear
    group: np.ndarray
    row: np.ndarray
    column: np.ndarray

    @property
    def per_head(self) -> bool:
        return math.prod(self.view.groups) > 1


def projected_by(probe: Probe, codes: np.ndarray) -> Projected | None:
    """How one product with constant weights made these atoms; None where they come from elsewhere."""
    numbers, flat = probe.owners(codes)
    distinct = np.unique(numbers)
    node = producer(probe.owner(int(distinct[0]))) if len(distinct) == 1 and distinct[0] > 0 else None
    view = contraction(probe, node) if node is not None else None
    if node is None or view is None or (node.op == "Gemm" and len(node.inputs) > 2):
        return None
    right = probe.is_known(view.right)
    if right == probe.is_known(view.left):
        return None
    group, left_row, right_row = view.unravel(flat)
    if right:
        return Projected(view, view.right, True, view.left_linear(probe.linear(view.left)), group, left_row, right_row)
    return Projected(view, view.left, False, view.right_linear(probe.linear(view.right)), group, right_row, left_row)
