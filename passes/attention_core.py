"""Reads one attention core off a probe: which products make the scores, what is masked, what the probabilities multiply.

A core is a softmax whose input is made of products of two data tensors and whose output multiplies a third. Rows are the softmax's
rows (a query token and a head), columns are what it sums over (keys).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt.passes.contraction import contraction, operands
from mla_trt.passes.graph import producer
from mla_trt.passes.probe import ONE, Linear, Probe, Term

# A score at or below this is hidden: -1e4 was the mask of many early exporters, finfo.min and -inf are today's.
HIDDEN_SCORE = -9e3


class NoMatch(Exception):
    """Why an attention core is not lowered, in words for a person, and the node at which that shows."""

    def __init__(self, reason: str, node: gs.Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.at = (node.name or (node.outputs[0].name if node.outputs else node.op)) if node is not None else None


@dataclass(frozen=True)
class ScorePart:
    """One product of queries and keys that the scores sum up.

    Attributes:
        query: Linear [rows, width].
        key: Linear [groups, columns, width].
        group: int64 [rows], the key group that each row meets.
        scale: float64 [rows], factor of the product.
    """

    node: gs.Node
    query_tensor: gs.Tensor
    key_tensor: gs.Tensor
    query: Linear
    key: Linear
    group: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True)
class AttentionCore:
    """A softmax with its products, on one probe.

    Attributes:
        visible: bool [rows, columns].
        sinks: float64 [rows], or None.
        value: Linear [groups, columns, width] and `value_group` int64 [rows].
        output: the product's tensor; `output_place` int64 [rows, width] are flat indices into it.
    """

    softmax: gs.Node
    parts: tuple[ScorePart, ...]
    visible: np.ndarray
    sinks: np.ndarray | None
    value: Linear
    value_tensor: gs.Tensor
    value_group: np.ndarray
    output: gs.Tensor
    output_place: np.ndarray


def find_softmaxes(graph: gs.Graph, data: set[int]) -> list[gs.Node]:
    """Softmax nodes that look like attention: one product of two data tensors before them, one after."""
    return [
        node
        for node in graph.nodes
        if node.op == "Softmax"
        and id(node.inputs[0]) in data
        and _reaches_product(node.inputs[0], data, forward=False)
        and _reaches_product(node.outputs[0], data, forward=True)
    ]


_LOCAL = {
    "Mul",
    "Div",
    "Add",
    "Sub",
    "Where",
    "Cast",
    "CastLike",
    "Concat",
    "Slice",
    "Reshape",
    "Transpose",
    "Unsqueeze",
    "Squeeze",
    "Identity",
    "Clip",
    "Min",
    "Max",
    "Tanh",
    "Expand",
    "Neg",
    "Split",
    "Dropout",
    "ScatterElements",
    "ScatterND",
    "Gather",
    "GatherND",
    "GatherElements",
    "Pad",
    "Sum",
    "Flatten",
    "Tile",
    "Trilu",
}


def _reaches_product(start: gs.Tensor, data: set[int], *, forward: bool) -> bool:
    seen: set[int] = set()
    stack = [start]
    while stack:
        tensor = stack.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        nodes = tensor.outputs if forward else ([producer(tensor)] if producer(tensor) is not None else [])
        for node in nodes:
            assert node is not None
            pair = operands(node)
            if pair is not None and all(id(item) in data for item in pair):
                return True
            if node.op in _LOCAL or node.domain not in (None, "", "ai.onnx"):
                stack.extend(item for item in (node.outputs if forward else node.inputs) if id(item) in data)
    return False


def read_core(probe: Probe, softmax: gs.Node) -> AttentionCore:
    """Reads the core around a softmax.

    Raises:
        NoMatch: it is not an attention of a form that can be lowered.
    """
    scores = probe.linear(softmax.inputs[0])
    axis = softmax.attrs.get("axis", -1) % len(scores.shape)
    columns = scores.shape[axis]

    def as_rows(array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array, axis, -1).reshape(-1, columns)

    constant, products = sort_terms(
        probe, softmax, [Term(as_rows(term.codes), as_rows(term.coefficients)) for term in scores.terms]
    )
    if not products:
        raise NoMatch("the scores are not a product of queries and keys", softmax)
    present = np.logical_or.reduce([flat >= 0 for flat, _ in products.values()])
    sinks, every = _split_off_sink(softmax, constant, present)
    keys = every[: filled_columns(probe, len(every))]
    if (constant[:, every[len(keys) :]] > HIDDEN_SCORE).any():
        raise NoMatch(
            "the mask shows rows of the caches that hold no token yet, those of positions after the query's", softmax
        )
    constant, present = constant[:, keys], present[:, keys]
    if np.isnan(constant).any():
        raise NoMatch("the mask is not a number somewhere", softmax)
    visible = present & (constant > HIDDEN_SCORE)
    if (np.abs(constant[visible]) > 1e-6).any():
        raise NoMatch("a bias that is no mask is added to the scores", softmax)
    parts = tuple(
        read_part(probe, softmax, number, flat[:, keys], factor[:, keys], visible)
        for number, (flat, factor) in products.items()
    )
    shape = tuple(size for index, size in enumerate(scores.shape) if index != axis)
    return _read_values(probe, softmax, axis, shape, every, parts, visible, sinks)


def filled_columns(probe: Probe, columns: int) -> int:
    """How many of the keys belong to tokens: full-length caches have rows for later ones behind them."""
    return min(probe.sizes.cached + probe.sizes.new, columns) if probe.interface.has_full_caches else columns


def sort_terms(
    probe: Probe, softmax: gs.Node, terms: list[Term]
) -> tuple[np.ndarray, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Splits scores into a constant and products; each product has its flat index (-1 where absent) and its factor for every score."""
    shape = terms[0].codes.shape
    constant = np.zeros(shape)
    products: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for term in terms:
        constant = np.where(term.codes == ONE, constant + term.coefficients, constant)
        numbers, flat = probe.owners(term.codes)
        for number in np.unique(numbers):
            if number == 0:
                continue
            node = producer(probe.owner(int(number)))
            if node is None or contraction(probe, node) is None:
                _refuse_scores(probe.owner(int(number)), node)
            chosen = numbers == number
            index, factor = products.get(int(number), (np.full(shape, -1, np.int64), np.zeros(shape)))
            if (chosen & (index >= 0)).any():
                raise NoMatch("a product enters the scores twice", node)
            products[int(number)] = np.where(chosen, flat, index), np.where(chosen, term.coefficients, factor)
    return constant, products


def _refuse_scores(tensor: gs.Tensor, node: gs.Node | None) -> None:
    if node is None:
        raise NoMatch(f"the scores contain the input '{tensor.name}' itself")
    if node.op == "Tanh":
        raise NoMatch("the scores are soft-capped by a Tanh before the softmax", node)
    operator = f"{node.domain}::{node.op}" if node.domain else node.op
    raise NoMatch(f"the scores come from '{operator}', which is neither a product of queries and keys nor a mask", node)


def _split_off_sink(
    softmax: gs.Node, constant: np.ndarray, present: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray]:
    """A column that no product reaches and no mask hides is an attention sink."""
    empty = ~present.any(axis=0)
    sink_columns = np.flatnonzero(empty & (constant > HIDDEN_SCORE).all(axis=0))
    keys = np.setdiff1d(np.arange(constant.shape[1]), sink_columns)
    if len(sink_columns) > 1:
        raise NoMatch(f"{len(sink_columns)} columns of the scores belong to no key", softmax)
    return (constant[:, sink_columns[0]] if len(sink_columns) else None), keys


def read_part(
    probe: Probe, softmax: gs.Node, number: int, flat: np.ndarray, factor: np.ndarray, visible: np.ndarray
) -> ScorePart:
    node = producer(probe.owner(number))
    assert node is not None
    view = contraction(probe, node)
    assert view is not None
    present = flat >= 0
    if (visible & ~present).any():
        raise NoMatch("a product of queries and keys reaches only some of the visible scores", node)
    group, left, right = view.unravel(np.where(present, flat, 0))
    for query_is_left in (True, False):
        row_index, column_index = (left, right) if query_is_left else (right, left)
        rows, constant_row = _constant_along(row_index, present, axis=1)
        groups, constant_group = _constant_along(group, present, axis=1)
        columns, constant_column = _constant_along(column_index, present, axis=0)
        if constant_row and constant_group and constant_column:
            break
    else:
        raise NoMatch("the scores are not laid out as queries by keys", node)
    scales, constant_scale = _constant_along(factor, present & visible, axis=1)
    if not constant_scale:
        raise NoMatch("the scores of one query are scaled differently from key to key", node)
    query_tensor, key_tensor = (view.left, view.right) if query_is_left else (view.right, view.left)
    query = (view.left_linear if query_is_left else view.right_linear)(probe.linear(query_tensor))
    key = (view.right_linear if query_is_left else view.left_linear)(probe.linear(key_tensor))
    unmet = np.flatnonzero(~present.any(axis=0))
    if len(unmet):
        # Keys that a selection hides from all queries of the case are those that are left, in order.
        left_over = np.setdiff1d(np.arange(key.shape[1]), np.delete(columns, unmet))
        columns[unmet[: len(left_over)]] = left_over[: len(unmet)]
    query = Linear(
        (len(rows), query.shape[2]),
        tuple(Term(term.codes[groups, rows], term.coefficients[groups, rows]) for term in query.terms),
    )
    key = Linear(
        (key.shape[0], len(columns), key.shape[2]),
        tuple(Term(term.codes[:, columns], term.coefficients[:, columns]) for term in key.terms),
    )
    return ScorePart(node, query_tensor, key_tensor, query, key, groups, scales)


def _constant_along(array: np.ndarray, present: np.ndarray, axis: int) -> tuple[np.ndarray, bool]:
    """The value that an array has along an axis wherever it is present, and whether there is one."""
    first = np.argmax(present, axis=axis)
    value = np.take_along_axis(array, np.expand_dims(first, axis), axis)
    return np.squeeze(value, axis), bool(np.isclose(array, value, rtol=1e-6, atol=0)[present].all())


def _read_values(
    probe: Probe,
    softmax: gs.Node,
    axis: int,
    row_shape: tuple[int, ...],
    keys: np.ndarray,
    parts: tuple[ScorePart, ...],
    visible: np.ndarray,
    sinks: np.ndarray | None,
) -> AttentionCore:
    node = _find_value_product(probe, softmax)
    view = contraction(probe, node)
    if view is None:
        raise NoMatch("the probabilities meet the values in a product that is not understood", node)
    base = probe.atoms(softmax.outputs[0]).terms[0].codes.reshape(-1)[0] if probe.shape(softmax.outputs[0]) else 0
    probabilities_left = _owned_by(probe, view.left, softmax.outputs[0])
    tensor = view.right if probabilities_left else view.left
    weights = probe.linear(view.left if probabilities_left else view.right)
    weights = (view.left_linear if probabilities_left else view.right_linear)(weights)
    value = (view.right_linear if probabilities_left else view.left_linear)(probe.linear(tensor))
    term = weights.terms[0]
    size = math.prod(probe.shape(softmax.outputs[0]))
    only_probabilities = bool(((term.codes >= base) & (term.codes < base + size)).all())
    if len(weights.terms) > 1 or not only_probabilities or not np.allclose(term.coefficients, 1):
        raise NoMatch("the probabilities are changed before they meet the values", node)
    place = np.unravel_index(term.codes - base, probe.shape(softmax.outputs[0]))
    column = place[axis]
    row = (
        np.ravel_multi_index([index for position, index in enumerate(place) if position != axis], row_shape)
        if row_shape
        else np.zeros_like(column)
    )
    if not ((row == row[:, :, :1]).all() and (column == column[:1, :1]).all()):
        raise NoMatch("the probabilities are rearranged between keys before they meet the values", node)
    order = column[0, 0]
    if not np.array_equal(np.sort(order), keys):
        raise NoMatch("the probabilities of some keys do not meet a value", node)
    groups, per_group = row.shape[0], row.shape[1]
    row_at = row[:, :, 0].reshape(-1)
    place_of_row = np.full(math.prod(row_shape), -1, np.int64)
    place_of_row[row_at] = np.arange(groups * per_group)
    if (place_of_row < 0).any():
        raise NoMatch("some rows of the probabilities do not meet the values", node)
    kept = np.argsort(order)[: visible.shape[1]]
    value = Linear(
        (value.shape[0], len(kept), value.shape[1]),
        tuple(
            Term(*(np.moveaxis(array[:, :, kept], 1, 2) for array in (item.codes, item.coefficients)))
            for item in value.terms
        ),
    )
    width = value.shape[2]
    inverse = np.empty(view.place.size, np.int64)
    inverse[view.place.reshape(-1)] = np.arange(view.place.size)
    group_of_row, index_of_row = place_of_row // per_group, place_of_row % per_group
    if probabilities_left:
        output_place = inverse[((group_of_row * per_group + index_of_row) * width)[:, None] + np.arange(width)]
    else:
        output_place = inverse[
            (group_of_row * width)[:, None] * per_group + np.arange(width) * per_group + index_of_row[:, None]
        ]
    return AttentionCore(softmax, parts, visible, sinks, value, tensor, group_of_row, node.outputs[0], output_place)


def _owned_by(probe: Probe, tensor: gs.Tensor, owner: gs.Tensor) -> bool:
    codes = probe.linear(tensor).terms[0].codes.reshape(-1)
    return codes.size > 0 and probe.owner_of(int(codes.max())) is owner


def _find_value_product(probe: Probe, softmax: gs.Node) -> gs.Node:
    found: list[gs.Node] = []
    queue = deque([softmax.outputs[0]])
    seen: set[int] = set()
    while queue:
        tensor = queue.popleft()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor in probe.graph.outputs:
            raise NoMatch("the attention's probabilities are an output of the model", softmax)
        for node in tensor.outputs:
            pair = operands(node)
            if node.op == "Mul" and len(node.outputs[0].outputs) == 1 and node.outputs[0].outputs[0].op == "ReduceSum":
                queue.append(node.outputs[0])
            elif pair is not None and not any(probe.is_known(item) for item in pair):
                found.append(node)
            elif node.op in ("Shape", "Size", "IsNaN"):
                continue
            elif probe.is_transparent(node):
                queue.extend(node.outputs)
            else:
                raise NoMatch(f"the probabilities pass through '{node.op}' before they meet the values", node)
    if len(set(map(id, found))) != 1:
        raise NoMatch(
            "the probabilities meet no values"
            if not found
            else "the probabilities meet more than one tensor of values",
            softmax,
        )
    return found[0]


_FARTHEST = 400


def unknown_op_near(probe: Probe, softmax: gs.Node) -> gs.Node | None:
    """A node of an unknown domain between an attention's projections and its result, if there is one."""
    seen: set[int] = set()
    forward = [softmax.outputs[0]]
    backward = [softmax.inputs[0]]
    while (forward or backward) and len(seen) < _FARTHEST:
        ahead = bool(forward)
        tensor = forward.pop(0) if ahead else backward.pop(0)
        nodes = tensor.outputs if ahead else [producer(tensor)]
        for node in nodes:
            if node is None or id(node) in seen:
                continue
            seen.add(id(node))
            if node.domain not in (None, "", "ai.onnx"):
                return node
            pair = operands(node)
            if pair is not None and any(probe.is_known(item) for item in pair):
                continue
            backward.extend(node.inputs)
            if ahead:
                forward.extend(node.outputs)
    return None
