"""Rounding of data by constant scales (QDQ: ONNX Runtime's quantize_static, NVIDIA's Model Optimizer) is taken out while attention is
recognised, and put back where nodes of the export stay.

    DequantizeLinear(QuantizeLinear(x, s, z), s, z)

is x, rounded to eight bits: no sum of what x is made of, which is what the matcher reads. The lowered attention does not repeat such roundings;
the products around it do, so that an engine multiplies their codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs

from mla_trt.passes.graph import (
    Emitter,
    Names,
    from_constants,
    is_empty,
    outer_inputs,
    producer,
    remove_dead_nodes,
    replace_uses,
    small_constant,
    subgraphs,
)

_SIZES = ("Shape", "Size")
_PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class Reader:
    """An input of a node that got rounded data, and the node's op."""

    node: gs.Node
    index: int
    op: str

    def current(self, data: gs.Tensor) -> gs.Tensor | None:
        """What the node reads there now, if that stands for the data: the same tensor, or what a product has in its place by now. None else, and for
        who reads a size alone."""
        inputs = self.node.inputs
        if self.node.op != self.op or self.op in _SIZES or self.index >= len(inputs):
            return None
        found = inputs[self.index]
        replaced = self.op in _PRODUCTS and not isinstance(found, gs.Constant)
        return found if found is data or replaced else None


@dataclass(frozen=True)
class Half:
    """A node of a pair, apart from the graph: its constants are the inputs behind the first, `name` and `dtype` are its output's."""

    op: str
    attrs: dict[str, Any]
    constants: tuple[gs.Tensor, ...]
    name: str
    dtype: Any

    @classmethod
    def of(cls, node: gs.Node) -> Half:
        """Reads a node."""
        made = node.outputs[0]
        return cls(node.op, dict(node.attrs), tuple(node.inputs[1:]), made.name, made.dtype)

    def emit(self, emitter: Emitter, data: gs.Tensor) -> gs.Tensor:
        """The same of other data."""
        return emitter.node(self.op, [data, *self.constants], self.name, dtype=self.dtype, **self.attrs)


@dataclass(frozen=True)
class Rounding:
    """A pair that was taken out, what it rounded, and who read its result: nodes, and outputs of the graph, by name."""

    data: gs.Tensor
    quantize: Half
    dequantize: Half
    readers: tuple[Reader, ...]
    outputs: tuple[str, ...]

    def emit(self, emitter: Emitter, data: gs.Tensor) -> gs.Tensor:
        """Other data, rounded alike."""
        return self.dequantize.emit(emitter, self.quantize.emit(emitter, data))


def take_out_roundings(graph: gs.Graph) -> list[Rounding]:
    """Makes whoever reads data rounded with one constant scale read it as it was; returns what `put_back_roundings` needs.

    What branches read stays rounded.
    """
    branching = [node for node in graph.nodes if any(True for _ in subgraphs(node))]
    kept = {id(tensor) for node in branching for tensor in outer_inputs(node)}
    found = []
    for node in list(graph.nodes):
        quantize = _quantize_before(node)
        if quantize is None or id(node.outputs[0]) in kept:
            continue
        rounded, data = node.outputs[0], quantize.inputs[0]
        # a node is among a tensor's readers as often as it reads it
        nodes = list({id(reader): reader for reader in rounded.outputs}.values())
        readers = tuple(
            Reader(reader, index, reader.op)
            for reader in nodes
            for index, tensor in enumerate(reader.inputs)
            if tensor is rounded
        )
        outputs = tuple(tensor.name for tensor in graph.outputs if tensor is rounded)
        found.append(Rounding(data, Half.of(quantize), Half.of(node), readers, outputs))
        replace_uses(graph, rounded, data)
    remove_dead_nodes(graph)
    return found


def put_back_roundings(graph: gs.Graph, roundings: list[Rounding]) -> int:
    """Rounds again what nodes read that are still in the graph, and its outputs; returns how many roundings have a reader."""
    alive = {id(node) for node in graph.nodes}
    emitter = Emitter(graph, Names(graph))
    count = 0
    for rounding in roundings:
        rounded: dict[int, gs.Tensor] = {}
        for reader in rounding.readers:
            data = reader.current(rounding.data) if id(reader.node) in alive else None
            if data is None:
                continue
            if id(data) not in rounded:
                rounded[id(data)] = rounding.emit(emitter, data)
            reader.node.inputs[reader.index] = rounded[id(data)]
        results = [
            index for index, output in enumerate(graph.outputs) if output.name in rounding.outputs and output.inputs
        ]
        for index in results:
            graph.outputs[index] = _rounded_output(emitter, rounding, graph.outputs[index])
        count += bool(rounded or results)
    return count


def _rounded_output(emitter: Emitter, rounding: Rounding, output: gs.Tensor) -> gs.Tensor:
    """The rounded tensor, which takes over the output's name."""
    name = output.name
    output.name = emitter.names.new(f"{name}.exact")
    result = rounding.emit(emitter, output)
    result.name, result.shape = name, output.shape
    return result


def _quantize_before(node: gs.Node) -> gs.Node | None:
    """The QuantizeLinear whose codes of data a DequantizeLinear reads with the same constant scale and zero point; None if it is none."""
    if node.op != "DequantizeLinear" or node.domain or not node.outputs:
        return None
    quantize = producer(node.inputs[0])
    if quantize is None or quantize.op != "QuantizeLinear" or quantize.domain:
        return None
    scale, *numbers = _numbers(quantize)
    other_scale, *others = _numbers(node)
    if scale is None or scale != other_scale or None in (*numbers, *others) or (numbers or [0.0]) != (others or [0.0]):
        return None
    return None if from_constants(quantize.inputs[0]) else quantize


def _numbers(node: gs.Node) -> list[float | None]:
    """The scale and the zero point, if there is one; None for what is not one constant number."""
    found = [small_constant(tensor, 1) for tensor in node.inputs[1:] if not is_empty(tensor)]
    return [None if values is None or values.size != 1 else float(values.reshape(-1)[0]) for values in found]
