"""Cuts parts out of ONNX models: the nodes between given tensors, with the inputs and weights that they read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import helper, numpy_helper

from mla_trt.errors import MlaTrtError
from mla_trt.layer_plan import TOKENS, Axes
from mla_trt.ops import DOMAIN

SIZE_OPS = ("Shape", "Size")
PREFIX = "cut."


class CannotCutError(MlaTrtError):
    """A part of a model cannot be separated from the rest."""


@dataclass(frozen=True)
class Start:
    """Where a part begins: one input for all tensors that are cut.

    Attributes:
        name: name of the part's input, [B, S, features] or [S, features]; or of the tokens, which stay as they are.
        dtype: its ONNX element type.
        tensors: name and axes of each tensor that is cut; it becomes a slice of the input's features, in this order.
        leading: letters of the input's axes before the features.
    """

    name: str
    dtype: int
    tensors: tuple[tuple[str, Axes], ...]
    leading: tuple[str, ...]

    @property
    def features(self) -> int:
        """Width of the input."""
        return sum(_width(axes) for _, axes in self.tensors)


@dataclass(frozen=True)
class Output:
    """A result of a part: a tensor, transposed where `order` says how, as [tokens, features]."""

    tensor: str
    features: int
    order: tuple[int, ...] = ()


@dataclass
class Part:
    """The nodes that a cut took, before they are a model.

    Attributes:
        nodes: by their place in the model.
        inputs: names of the model's inputs that are read.
        initializers: names of the weights that are read.
        sizes: nodes that read the size of a tensor which the part does not have.
    """

    nodes: dict[int, onnx.NodeProto] = field(default_factory=dict)
    inputs: set[str] = field(default_factory=set)
    initializers: set[str] = field(default_factory=set)
    sizes: dict[int, onnx.NodeProto] = field(default_factory=dict)


class Cutter:
    """A model from which parts are cut. Functions of it other than those of this package's ops are inlined first.

    Args:
        model: the model; external data stays where it is.
        axes: axes of tensors whose sizes are read, by name.
        tokens: name of its token input.
        caches: names of its caches.
    """

    def __init__(self, model: onnx.ModelProto, *, axes: Mapping[str, Axes], tokens: str, caches: Iterable[str]) -> None:
        if any(function.domain != DOMAIN for function in model.functions):
            if any(function.domain == DOMAIN for function in model.functions):
                raise CannotCutError("the lowered model has functions beside those of its ops")
            model = onnx.inliner.inline_local_functions(model)
        self.model = model
        self.tokens = tokens
        self._axes = axes
        self._inputs = {value.name: value for value in model.graph.input}
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._makers = {name: place for place, node in enumerate(model.graph.node) for name in node.output if name}
        self._data = _dependent(model.graph.node, {tokens, *caches})

    def has(self, name: str) -> bool:
        """Whether the model makes, takes or holds a tensor."""
        return name in self._makers or name in self._inputs or name in self._initializers

    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that read each tensor."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.model.graph.node:
            for name in set(_read(node)):
                found.setdefault(name, []).append(node)
        return found

    def take(self, wanted: Sequence[str], start: Start, *, grown: Mapping[str, str] | None = None) -> Part:
        """The nodes that make some tensors out of the start's.

        Args:
            wanted: names of the tensors.
            start: where the part begins.
            grown: caches with the outputs that hold their next values, which are wanted too where the cache is read.

        Raises:
            CannotCutError: they depend on the tokens, or on caches of other parts, otherwise than through the start.
        """
        part = Part()
        stops = {name for name, _ in start.tensors}
        waiting = list(wanted)
        postponed: dict[int, onnx.NodeProto] = {}
        taken: set[str] = set()
        while waiting or postponed:
            while waiting:
                name = waiting.pop()
                if name in taken or name in stops:
                    continue
                taken.add(name)
                if name in self._initializers:
                    part.initializers.add(name)
                elif name in self._inputs:
                    if name == self.tokens:
                        raise CannotCutError(
                            f"it depends on the tokens otherwise than through '{', '.join(sorted(stops))}'"
                        )
                    part.inputs.add(name)
                    if grown and name in grown:
                        waiting.append(grown[name])
                elif name in self._makers:
                    place = self._makers[name]
                    node = self.model.graph.node[place]
                    if node.op_type in SIZE_OPS and not node.domain:
                        postponed[place] = node
                    elif place not in part.nodes:
                        part.nodes[place] = node
                        # The plan counts tokens, whatever they are: a part that does not begin with them has its own.
                        reads = list(_read(node))
                        waiting += reads[1:] if _is_plan(node) and start.name != self.tokens else reads
                else:
                    raise CannotCutError(f"nothing makes '{name}'")
            # Only now is it known which tensors the part has.
            sizes, postponed = postponed, {}
            for place, node in sizes.items():
                source = node.input[0]
                inside = source in stops or source in taken
                if not inside and (source in self._data or source == self.tokens) and source in self._axes:
                    part.sizes[place] = node
                else:
                    part.nodes[place] = node
                    waiting.append(source)
        return part

    def build(self, part: Part, start: Start, outputs: Mapping[str, Output], kept: Iterable[str]) -> onnx.ModelProto:
        """A model of a part.

        Args:
            part: the nodes.
            start: where it begins.
            outputs: the results by name.
            kept: names of outputs of the model that are outputs of the part as they are.

        Raises:
            CannotCutError: the part needs a size that nothing in it has.
        """
        graph = self.model.graph
        model = onnx.ModelProto(ir_version=self.model.ir_version, producer_name=self.model.producer_name)
        model.opset_import.extend(self.model.opset_import)
        model.functions.extend(self.model.functions)
        made = model.graph
        made.name = f"{PREFIX}{graph.name}"
        builder = _Builder(made, taken=self.has)
        if start.name == self.tokens:
            made.input.append(self._inputs[start.name])
        else:
            # The export's own names for its axes may be the same letters in another sense.
            leading = [f"{PREFIX}{letter}" for letter in start.leading]
            made.input.append(helper.make_tensor_value_info(start.name, start.dtype, [*leading, start.features]))
        made.input.extend(value for value in graph.input if value.name in part.inputs)
        _begin(builder, start)
        sources = self._size_sources(part, start)
        stops = {name for name, _ in start.tensors}
        for place in sorted(part.nodes.keys() | part.sizes.keys()):
            if place in part.sizes:
                self._emit_sizes(builder, part.sizes[place], sources)
                continue
            plans = _is_plan(part.nodes[place]) and start.name != self.tokens
            slots = builder.node("Gather", [start.name, builder.constant(0)], axis=len(start.leading)) if plans else ""
            node = made.node.add()
            node.CopyFrom(part.nodes[place])
            if plans:
                node.input[0] = slots
            # A node may make what the part begins with beside what it needs.
            node.output[:] = [f"{PREFIX}{name}" if name in stops else name for name in node.output]
        for result, output in outputs.items():
            tensor = output.tensor
            if output.order:
                tensor = builder.node("Transpose", [tensor], perm=output.order)
            builder.node("Reshape", [tensor, builder.constant([-1, output.features])], output=result)
            made.output.append(helper.make_empty_tensor_value_info(result))
        wanted = set(kept)
        made.output.extend(value for value in graph.output if value.name in wanted)
        made.initializer.extend(self._initializers[name] for name in sorted(part.initializers))
        return model

    def _size_sources(self, part: Part, start: Start) -> dict[str, tuple[str, int]]:
        """For each letter, a tensor of the part and its axis that has that size."""
        sources = {letter: (start.name, axis) for axis, letter in enumerate(start.leading)}
        for name in sorted(part.inputs):
            for axis, letter in enumerate(self._axes.get(name, ())):
                if letter in ("P", "T", "L") and letter not in sources:
                    sources[letter] = name, axis
        return sources

    def _emit_sizes(self, builder: _Builder, node: onnx.NodeProto, sources: Mapping[str, tuple[str, int]]) -> None:
        """Puts together what Shape or Size would give."""

        def size(axis: str | int) -> str:
            if isinstance(axis, int):
                return builder.constant([axis])
            if axis == TOKENS and TOKENS not in sources:
                return builder.node("Mul", [size("B"), size("S")])
            if axis == "T" and "T" not in sources:
                return builder.node("Add", [size("P"), size("S")])
            if axis not in sources:
                raise CannotCutError(f"node '{node.name}' reads a size that is not known there, of '{node.input[0]}'")
            tensor, place = sources[axis]
            return builder.node("Gather", [builder.node("Shape", [tensor]), builder.constant([place])], axis=0)

        bounds = {attribute.name: attribute.i for attribute in node.attribute}
        axes = self._axes[node.input[0]]
        if node.op_type == "Shape":
            axes = axes[slice(bounds.get("start", 0), bounds.get("end"))]
        pieces = [size(axis) for axis in axes]
        if node.op_type == "Shape":
            builder.node("Concat", pieces or [builder.constant(np.zeros(0, np.int64))], output=node.output[0], axis=0)
            return
        count = builder.constant([1])
        for piece in pieces:
            count = builder.node("Mul", [count, piece])
        builder.node("Reshape", [count, builder.constant(np.zeros(0, np.int64))], output=node.output[0])


class _Builder:
    """Appends nodes and constants of its own names."""

    def __init__(self, graph: onnx.GraphProto, taken: Callable[[str], bool]) -> None:
        self._graph = graph
        self._names = (name for count in itertools.count(1) if not taken(name := f"{PREFIX}{count}"))

    def node(self, op: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        name = output or next(self._names)
        self._graph.node.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def constant(self, values: int | Sequence[int] | np.ndarray) -> str:
        name = next(self._names)
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.int64), name))
        return name


def _begin(builder: _Builder, start: Start) -> None:
    """Makes the tensors that were cut out of the part's input."""
    if [name for name, _ in start.tensors] == [start.name]:
        return
    first = 0
    for name, axes in start.tensors:
        piece = start.name
        if len(start.tensors) > 1:
            columns = builder.constant(np.arange(first, first + _width(axes)))
            piece = builder.node("Gather", [piece, columns], axis=len(start.leading))
        first += _width(axes)
        kept = axes[: len(start.leading)] == start.leading
        sizes = [-1 if axis == TOKENS else 0 if isinstance(axis, str) and kept else axis for axis in axes]
        if any(isinstance(size, str) for size in sizes):
            raise CannotCutError(f"the tokens are not the leading axes of '{name}'")
        builder.node("Reshape", [piece, builder.constant([int(size) for size in sizes])], name)


def _is_plan(node: onnx.NodeProto) -> bool:
    return node.op_type == "MlaPlan" and node.domain == DOMAIN


def _width(axes: Axes) -> int:
    """Features of a token."""
    return math.prod(axis for axis in axes if isinstance(axis, int))


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those that its subgraphs read from outside among them."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else []), *attribute.graphs):
            inside = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            inside |= {name for inner in graph.node for name in inner.output}
            yield from (name for inner in graph.node for name in _read(inner) if name not in inside)
            yield from (value.name for value in graph.output if value.name not in inside)


def _dependent(nodes: Iterable[onnx.NodeProto], sources: set[str]) -> set[str]:
    """Names of the tensors whose values depend on those of `sources`."""
    found = set(sources)
    for node in nodes:
        if node.op_type not in SIZE_OPS and any(name in found for name in _read(node)):
            found.update(name for name in node.output if name)
    return found
