"""Where the attention layers of an export begin and end, so that each, and what lies between two, can be cut out and run
alone.

A layer begins at the nearest tensor on which its queries, its latents and rope keys and its indexer all depend, other
than through positions, masks and caches: usually the output of the norm before its projections. It ends where its
result leaves, before the output projection.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from mla_trt import interface as roles
from mla_trt.inspection import Inspection
from mla_trt.passes.contraction import operands
from mla_trt.passes.graph import is_empty, outer_inputs, producer, topological
from mla_trt.passes.identify_inputs import data_dependent, static_size
from mla_trt.passes.match_exits import Exit
from mla_trt.passes.match_mla import MlaMatch
from mla_trt.passes.probe import Probe, ProbeError

MOST_BEGINNINGS = 4
LONGEST_WAY_OUT = 16  # nodes that only move an attention's result

TOKENS = "BS"
"""The letter of an axis of all sequences' new tokens, beside those of `mla_trt.interface`."""

Axes = tuple[str | int, ...]


@dataclass(frozen=True)
class Boundary:
    """A tensor at which a layer is cut off.

    Attributes:
        name: name in the export.
        dtype: ONNX element type.
        axes: letters of `mla_trt.interface` and `TOKENS`, or sizes.
        order: how to transpose it so that tokens come first, then heads, then their values; () where they do.
    """

    name: str
    dtype: int
    axes: Axes
    order: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Features of a token."""
        return math.prod(axis for axis in self.axes if isinstance(axis, int))


@dataclass(frozen=True)
class LayerPart:
    """One attention core.

    Attributes:
        layer: its number.
        beginnings: where it may begin, the nearest first.
        exits: where its result leaves, those first that need no transposing.
    """

    layer: int
    beginnings: tuple[Boundary, ...]
    exits: tuple[Boundary, ...]


@dataclass(frozen=True)
class Between:
    """What lies between two attention cores, before the first or after the last.

    Attributes:
        layer: the core before it; None before the first.
        way_in: the result of that core.
        streams: where what goes past that core (the residual stream) may be cut off, the nearest first; the tokens before
            the first core; () where nothing goes past.
        ends: the beginning of the next core, or the export's results.
    """

    layer: int | None
    way_in: Boundary | None
    streams: tuple[Boundary, ...]
    ends: tuple[Boundary, ...]

    @property
    def label(self) -> str:
        return "before layer 0" if self.layer is None else f"after layer {self.layer}"


@dataclass(frozen=True)
class LayerPlan:
    """Every attention core of an export.

    Attributes:
        groups: cores that share a selection of keys are in one group: only the first of them has the indexer.
        axes: axes of the tensors whose sizes the export reads, by name.
        between: what is around the cores, as far as it has borders.
    """

    groups: tuple[tuple[LayerPart, ...], ...]
    axes: Mapping[str, Axes]
    between: tuple[Between, ...] = ()


def plan_layers(found: Inspection, shaped: Iterable[str]) -> LayerPlan:
    """Finds the borders of the layers, all of which are matched.

    Args:
        found: the inspected export, before anything is lowered.
        shaped: names of tensors whose sizes are read in the export's file.
    """
    data = found.probes[0].data
    order = {id(node): place for place, node in enumerate(topological(found.graph.nodes))}
    groups: dict[int, list[LayerPart]] = {}
    borders: list[tuple[gs.Tensor | None, list[gs.Tensor]]] = []
    for layer, match in enumerate(found.matches):
        assert match is not None
        key = id(match.selection) if match.selection is not None else -1 - layer
        anchors = _anchors(found, match, owner=key not in groups)
        beginnings = []
        for tensor in _common_sources(anchors, data, order):
            if (boundary := _boundary(found.probes, tensor)) is not None and _tokens_lead(boundary):
                beginnings.append((tensor, boundary))
            if len(beginnings) == MOST_BEGINNINGS:
                break
        # Projections, with their biases, belong to the layer.
        beginnings.sort(key=lambda pair: _is_projected(found.probes[0], pair[0]))
        ways_out = _used_exits(found.graph, match.exits)
        borders.append((beginnings[0][0] if beginnings else None, [way_out.tensor for way_out in match.exits]))
        exits = [found_exit for way_out in ways_out if (found_exit := _exit(found.probes, way_out)) is not None]
        exits.sort(key=lambda boundary: boundary.order)
        groups.setdefault(key, []).append(
            LayerPart(
                layer,
                tuple(boundary for _, boundary in beginnings),
                tuple(exits),
            )
        )
    tensors = found.graph.tensors()
    names = {*shaped, *(node.inputs[0].name for node in found.graph.nodes if node.op in ("Shape", "Size"))}
    axes: dict[str, Axes] = {entry.name: entry.axes for entry in found.interface.inputs}
    for name in sorted(names - axes.keys()):
        tensor = tensors.get(name)
        if tensor is not None and id(tensor) in data and (sizes := symbolic_axes(found.probes, tensor)) is not None:
            axes[name] = _leading_letters(found.probes[0], sizes)
    parts = {part.layer: part for group in groups.values() for part in group}
    between = _between(found, borders, [parts[layer] for layer in range(len(borders))], order)
    return LayerPlan(tuple(tuple(group) for group in groups.values()), axes, tuple(between))


def symbolic_axes(probes: list[Probe], tensor: gs.Tensor) -> Axes | None:
    """The axes of a tensor by its shapes on two probes; None where they follow from no sizes of the case."""
    try:
        shapes = [probe.shape(tensor) for probe in probes]
    except ProbeError:
        return None
    if len({len(shape) for shape in shapes}) != 1:
        return None
    sizes = {
        letter: tuple(size[letter] for size in ([_case_sizes(probe) for probe in probes]))
        for letter in ("B", "S", "P", "T", "L", TOKENS)
    }
    axes: list[str | int] = []
    for pair in zip(*shapes, strict=True):
        varying = [letter for letter, value in sizes.items() if value == pair and len(set(value)) > 1]
        if not varying and len(set(pair)) > 1:
            return None
        axes.append(varying[0] if varying else pair[0])
    return tuple(axes)


def _case_sizes(probe: Probe) -> dict[str, int]:
    sizes = {"B": probe.batch, "S": probe.axis_size("S"), "P": probe.axis_size("P"), "L": probe.sizes.rows}
    return sizes | {"T": sizes["P"] + sizes["S"], TOKENS: sizes["B"] * sizes["S"]}


def _anchors(found: Inspection, match: MlaMatch, *, owner: bool) -> list[gs.Tensor]:
    """The outputs of the layer's projections."""
    anchors = [match.query_nope.tensor, match.query_rope.tensor, match.latent.tensor]
    if match.rope_key is not None:
        anchors.append(match.rope_key.tensor)
    indexer = found.indexers.get(id(match.selection)) if match.selection is not None and owner else None
    if indexer is not None:
        anchors += [indexer.query.tensor, indexer.key.tensor, indexer.weights.tensor]
    return anchors


def _between(
    found: Inspection,
    borders: list[tuple[gs.Tensor | None, list[gs.Tensor]]],
    parts: list[LayerPart],
    order: Mapping[int, int],
) -> Iterator[Between]:
    """What is around the cores, whose beginnings and exits are given."""
    by_name = {tensor.name: tensor for tensor in (*found.graph.inputs, *found.graph.outputs)}
    tokens = by_name[found.interface.tokens.name]
    states = (*found.interface.by_role(roles.CACHE), *found.interface.by_role(roles.STATE))
    # Which experts a TopK picks is data here.
    data = data_dependent(found.graph, [tokens, *(by_name[entry.name] for entry in states)], selections=True)
    exits = {id(tensor): layer for layer, (_, tensors) in enumerate(borders) for tensor in tensors}
    for layer in range(-1, len(borders)):
        last = layer + 1 == len(borders)
        ends = [by_name[name] for name in found.interface.results] if last else [borders[layer + 1][0]]
        start = tokens if layer < 0 else borders[layer][0]
        described = [None if end is None else _boundary(found.probes, end) or _declared(end) for end in ends]
        if start is None or any(boundary is None for boundary in described) or any(end is start for end in ends):
            continue
        inputs = {id(start), id(tokens)}
        hit, passing = _crossing([end for end in ends if end is not None], start, exits, data, order, inputs)
        way_in = None
        if layer >= 0:
            if hit != {layer} or not parts[layer].exits or parts[layer].exits[0].order:
                continue
            way_in = parts[layer].exits[0]
        elif hit or passing != [tokens]:
            continue
        entry = found.interface.tokens
        streams = [
            Boundary(entry.name, entry.dtype, entry.axes) if tensor is tokens else _boundary(found.probes, tensor)
            for tensor in passing
        ]
        kept = tuple(boundary for boundary in streams if boundary is not None)
        if kept or not passing:
            layer_before = layer if layer >= 0 else None
            yield Between(layer_before, way_in, kept, tuple(end for end in described if end is not None))


def _crossing(
    ends: list[gs.Tensor],
    start: gs.Tensor,
    exits: Mapping[int, int],
    data: set[int],
    order: Mapping[int, int],
    inputs: set[int],
) -> tuple[set[int], list[gs.Tensor]]:
    """The cores whose results some tensors depend on directly, and tensors, no later than `start`, on each of which all
    that goes past these cores depends: the nearest first, none where nothing goes past. Only the graph inputs in `inputs`
    count."""

    def place(tensor: gs.Tensor) -> int:
        node = producer(tensor)
        return -1 if node is None else order[id(node)]

    hit: set[int] = set()
    passing: list[gs.Tensor] = []
    seen = {id(tensor): tensor for tensor in ends}
    waiting = [(-place(tensor), key) for key, tensor in seen.items()]
    heapq.heapify(waiting)
    while waiting:
        tensor = seen[waiting[0][1]]
        if len(waiting) == 1 and place(tensor) <= place(start) and id(tensor) not in exits:
            passing.append(tensor)
        if len(passing) == MOST_BEGINNINGS or (passing and id(tensor) in exits):
            break
        heapq.heappop(waiting)
        node = producer(tensor)
        if id(tensor) in exits:
            hit.add(exits[id(tensor)])
        elif node is not None:
            for item in outer_inputs(node):
                # States of recurrent layers stay inputs.
                state = producer(item) is None and id(item) not in inputs
                if id(item) in data and id(item) not in seen and not state and node.op not in ("Shape", "Size"):
                    seen[id(item)] = item
                    heapq.heappush(waiting, (-place(item), id(item)))
    return hit, passing


def _common_sources(anchors: list[gs.Tensor], data: set[int], order: Mapping[int, int]) -> Iterator[gs.Tensor]:
    """Tensors that every path of data from the inputs to the anchors goes through, the nearest first."""

    def place(tensor: gs.Tensor) -> int:
        node = producer(tensor)
        return -1 if node is None else order[id(node)]

    seen = {id(tensor): tensor for tensor in anchors}
    ends = frozenset(seen)
    waiting = [(-place(tensor), key) for key, tensor in seen.items()]
    heapq.heapify(waiting)
    while waiting:
        _, key = heapq.heappop(waiting)
        tensor = seen[key]
        node = producer(tensor)
        if not waiting and (key not in ends or node is None):
            yield tensor
        if node is None:
            return
        for item in node.inputs:
            if not is_empty(item) and id(item) in data and id(item) not in seen:
                seen[id(item)] = item
                heapq.heappush(waiting, (-place(item), id(item)))


def _boundary(probes: list[Probe], tensor: gs.Tensor) -> Boundary | None:
    """A tensor as a border; None where it does not hold floats or its axes are not known."""
    if tensor.dtype is None:
        return None
    dtype = (
        tensor.dtype if isinstance(tensor.dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    )
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    if dtype not in (onnx.TensorProto.FLOAT, *halves):
        return None
    axes = symbolic_axes(probes, tensor)
    return None if axes is None else Boundary(tensor.name, dtype, _leading_letters(probes[0], axes))


def _declared(tensor: gs.Tensor) -> Boundary | None:
    """A result whose shape depends on data somewhere before it, by the shape that the export declares."""
    width = static_size(tensor.shape[-1]) if tensor.shape else None
    if tensor.dtype != np.float32 or width is None:
        return None
    return Boundary(tensor.name, onnx.TensorProto.FLOAT, (TOKENS, width))


def _exit(probes: list[Probe], way_out: Exit) -> Boundary | None:
    """A way out as a border; None where its axes cannot be transposed into place."""
    boundary = _boundary(probes, way_out.tensor)
    if boundary is None or "".join(way_out.axes) == "bshd":
        return boundary
    if any(len(names) > 1 for names in way_out.axes):
        return None
    order = sorted(range(len(way_out.axes)), key=lambda axis: "bshd".find(way_out.axes[axis] or "d"))
    return replace(boundary, order=tuple(order))


def _used_exits(graph: gs.Graph, exits: Sequence[Exit]) -> list[Exit]:
    """Exits without those that are only on the way to another and of which nothing but the shape is used."""
    ends = {id(way_out.tensor) for way_out in exits}
    on_the_way = set(ends)
    for way_out in exits:
        tensor, steps = way_out.tensor, 0
        while (node := producer(tensor)) is not None and node.inputs and steps < LONGEST_WAY_OUT:
            tensor, steps = node.inputs[0], steps + 1
            on_the_way.add(id(tensor))
    results = {id(tensor) for tensor in graph.outputs}
    return [
        way_out
        for way_out in exits
        if id(way_out.tensor) in results
        or any(
            node.op not in ("Shape", "Size") and id(node.outputs[0]) not in on_the_way
            for node in way_out.tensor.outputs
        )
    ]


def _leading_letters(probe: Probe, axes: Axes) -> Axes:
    """Axes of a data tensor with letters for its leading token axes, where their sizes do not vary from case to case too."""
    sizes = _case_sizes(probe)
    batched = "B" in probe.interface.tokens.axes
    pattern = ("B", "S") if batched else ("S",)
    named = tuple(
        letter if axis in (letter, sizes[letter]) else axis for letter, axis in zip(pattern, axes, strict=False)
    )
    if named == pattern:
        return (*pattern, *axes[len(pattern) :])
    # The cases may have as many tokens: what tells their axis from one of a fixed size is that no other is left.
    if batched and axes and axes[0] in (TOKENS, sizes[TOKENS]) and not {"B", "S"} & set(axes):
        return (TOKENS, *axes[1:])
    return axes


def _tokens_lead(boundary: Boundary) -> bool:
    """Whether a border is a matrix or a batch of them: tokens first, then their features."""
    leading = boundary.axes[:-1]
    return leading in (("B", "S"), ("S",), (TOKENS,)) and isinstance(boundary.axes[-1], int)


def _is_projected(probe: Probe, tensor: gs.Tensor) -> bool:
    node = producer(tensor)
    if node is None:
        return False
    pair = operands(node)
    return (pair is not None and any(probe.is_known(item) for item in pair)) or (
        node.op == "Add" and any(isinstance(item, gs.Constant) for item in node.inputs)
    )
