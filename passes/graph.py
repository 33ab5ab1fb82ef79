"""Small helpers over an onnx-graphsurgeon graph that every pass shares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues

from mla_trt.errors import BadModelError

OPSET = 26


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that makes a tensor; None for inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def attribute(node: gs.Node, name: str, default: Any = None) -> Any:
    """An attribute's value, or a default where the node does not have it."""
    return node.attrs.get(name, default)


def is_empty(tensor: gs.Tensor) -> bool:
    """Whether a tensor stands for an optional input or output that is absent."""
    return not isinstance(tensor, gs.Constant) and not tensor.name


def constant_value(tensor: gs.Constant, base_dir: Path | None) -> np.ndarray:
    """A constant's array. External data is read from beside the model, and is not kept.

    Raises:
        BadModelError: the external data is missing or too short.
    """
    values = tensor._values
    if isinstance(values, LazyValues):
        proto = values.tensor
        if not isinstance(proto, onnx.TensorProto):
            raise BadModelError(f"the sparse initializer '{tensor.name}' is not supported: store it dense")
        try:
            return numpy_helper.to_array(proto, str(base_dir or ""))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise BadModelError(f"the weights of '{tensor.name}' cannot be read: {error}") from None
    return np.asarray(values)


def from_constants(tensor: gs.Tensor, depth: int = 24) -> bool:
    """Whether a tensor is a constant or computed from nothing else, in at most `depth` steps."""
    if isinstance(tensor, gs.Constant):
        return True
    if not tensor.inputs or depth == 0:
        return False
    return all(is_empty(item) or from_constants(item, depth - 1) for item in tensor.inputs[0].inputs)


def element_count(tensor: gs.Constant) -> int:
    """Number of elements of a constant, without loading it."""
    return int(np.prod(tensor.shape, dtype=np.int64))


def small_constant(tensor: gs.Tensor, limit: int = 1 << 16) -> np.ndarray | None:
    """The array of a constant of at most `limit` elements that is held in the model file; otherwise None."""
    if not isinstance(tensor, gs.Constant) or element_count(tensor) > limit:
        return None
    values = tensor._values
    if isinstance(values, LazyValues) and values.tensor.data_location == onnx.TensorProto.EXTERNAL:
        return None
    return constant_value(tensor, None)


def to_proto(node: gs.Node) -> onnx.NodeProto:
    """The node as ONNX writes it."""
    return OnnxExporter.export_node(node)


def replace_uses(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> int:
    """Makes every consumer of `old`, and the graph's outputs, use `new`; returns how many uses there were.

    A graph output keeps its name: `new` takes it over.
    """
    uses = 0
    for node in list(old.outputs):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new
                uses += 1
    for index, tensor in enumerate(graph.outputs):
        if tensor is old:
            if new in graph.outputs or new in graph.inputs or isinstance(new, gs.Constant):
                output = gs.Variable(old.name, dtype=old.dtype, shape=old.shape)
                old.name = f"{old.name}.replaced"
                graph.nodes.append(gs.Node("Identity", f"{output.name}/identity", inputs=[new], outputs=[output]))
                graph.outputs[index] = output
            else:
                new.name, old.name = old.name, f"{old.name}.replaced"
                new.dtype = new.dtype if new.dtype is not None else old.dtype
                graph.outputs[index] = new
            uses += 1
    return uses


def subgraphs(node: gs.Node) -> Iterator[gs.Graph]:
    """Graphs in a node's attributes (If, Loop, Scan)."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            yield value
        elif isinstance(value, list):
            yield from (item for item in value if isinstance(item, gs.Graph))


def outer_inputs(node: gs.Node) -> list[gs.Tensor]:
    """Inputs of a node and the outer tensors that its subgraphs read."""
    tensors = [tensor for tensor in node.inputs if not is_empty(tensor)]
    for graph in subgraphs(node):
        tensors += _captured(graph)
    return tensors


def _captured(graph: gs.Graph) -> list[gs.Tensor]:
    """Tensors from outside that a subgraph reads."""
    made = {id(tensor) for inner in graph.nodes for tensor in inner.outputs}
    made |= {id(tensor) for tensor in graph.inputs}
    tensors = [tensor for inner in graph.nodes for tensor in outer_inputs(inner) if id(tensor) not in made]
    return tensors + [tensor for tensor in graph.outputs if id(tensor) not in made]


def _makers(node: gs.Node) -> list[gs.Node]:
    """The nodes that a node reads from."""
    found = [ends[0] for tensor in node.inputs if (ends := tensor.inputs)]
    if any(isinstance(value, gs.Graph | list) for value in node.attrs.values()):
        for graph in subgraphs(node):
            found += [tensor.inputs[0] for tensor in _captured(graph) if tensor.inputs]
    return found


def remove_dead_nodes(graph: gs.Graph) -> int:
    """Removes nodes that reach no graph output, in time linear in the graph; returns how many.

    graphsurgeon's own `cleanup` is quadratic in the consumers of one tensor.
    """
    stack = [tensor.inputs[0] for tensor in graph.outputs if tensor.inputs]
    alive = {id(node) for node in stack}
    while stack:
        for maker in _makers(stack.pop()):
            if id(maker) not in alive:
                alive.add(id(maker))
                stack.append(maker)
    dead = [node for node in graph.nodes if id(node) not in alive]
    if dead:
        _disconnect(dead)
        graph.nodes[:] = [node for node in graph.nodes if id(node) in alive]
    return len(dead)


def _disconnect(nodes: list[gs.Node]) -> None:
    """Empties the inputs and outputs of nodes, in time linear in their tensors' consumers.

    graphsurgeon's lists look a node up in the consumers of each of its inputs; here, a tensor's consumers are gone through once.
    """
    gone = {id(node) for node in nodes}
    ends = {id(tensor.outputs): tensor.outputs for node in nodes for tensor in node.inputs}
    ends |= {id(tensor.inputs): tensor.inputs for node in nodes for tensor in node.outputs}
    for end in ends.values():
        list.__setitem__(end, slice(None), [node for node in end if id(node) not in gone])
    for node in nodes:
        list.clear(node.inputs)
        list.clear(node.outputs)


def topological(nodes: Iterable[gs.Node]) -> list[gs.Node]:
    """Nodes ordered so that each follows those it reads from; what is in order already stays as it is.

    Raises:
        BadModelError: the graph has a cycle.
    """
    nodes = list(nodes)
    waiting = {id(node) for node in nodes}  # neither in the result nor on the way to it
    begun: set[int] = set()
    ordered = []
    for first in nodes:
        stack = [first]
        while stack:
            node = stack[-1]
            key = id(node)
            if key in waiting:
                waiting.remove(key)
                begun.add(key)
                for maker in _makers(node):
                    if id(maker) in begun:
                        raise BadModelError(f"the graph has a cycle through node '{maker.name or maker.op}'")
                    if id(maker) in waiting:
                        stack.append(maker)
                if stack[-1] is not node:
                    continue
            stack.pop()
            if key in begun:
                begun.remove(key)
                ordered.append(node)
    return ordered


class Names:
    """Unique names for new tensors and nodes."""

    def __init__(self, graph: gs.Graph) -> None:
        self._taken = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
        for node in graph.nodes:
            self._taken.add(node.name)
            self._taken.update(tensor.name for tensor in node.inputs)
            self._taken.update(tensor.name for tensor in node.outputs)

    def new(self, wish: str) -> str:
        """`wish`, or `wish` with a number where it is taken."""
        name, count = wish, 1
        while name in self._taken:
            count += 1
            name = f"{wish}_{count}"
        self._taken.add(name)
        return name


class Emitter:
    """Appends nodes to a graph; every method returns the new tensor."""

    def __init__(self, graph: gs.Graph, names: Names) -> None:
        self.graph = graph
        self.names = names

    def constant(self, wish: str, values: Any, dtype: Any = None) -> gs.Constant:
        return gs.Constant(self.names.new(wish), np.array(values, dtype=dtype, order="C"))

    def variable(self, wish: str, dtype: Any = None, shape: Any = None) -> gs.Variable:
        return gs.Variable(self.names.new(wish), dtype=dtype, shape=shape)

    def node(
        self, op: str, inputs: list[gs.Tensor], wish: str, *, dtype: Any = None, domain: str = "", **attrs: Any
    ) -> gs.Variable:
        """A node with one output, of the type of its first input unless told otherwise."""
        output = self.variable(wish, dtype if dtype is not None else inputs[0].dtype)
        name = self.names.new(f"{wish}/{op}")
        self.graph.nodes.append(gs.Node(op, name, attrs, inputs=list(inputs), outputs=[output], domain=domain or None))
        return output

    def reshape(self, tensor: gs.Tensor, shape: list[int], wish: str) -> gs.Variable:
        maker = producer(tensor)
        if maker is not None and maker.op == "Reshape" and not maker.domain:
            tensor = maker.inputs[0]  # one Reshape does what two do
        return self.node("Reshape", [tensor, self.constant(f"{wish}/shape", shape, np.int64)], wish, allowzero=0)

    def gather(self, tensor: gs.Tensor, indices: Any, axis: int, wish: str) -> gs.Variable:
        if not isinstance(indices, gs.Tensor):
            indices = self.constant(f"{wish}/indices", indices, np.int64)
        return self.node("Gather", [tensor, indices], wish, axis=axis)

    def cast(self, tensor: gs.Tensor, dtype: Any, wish: str) -> gs.Tensor:
        onnx_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) if not isinstance(dtype, int) else dtype
        return self.node("Cast", [tensor], wish, dtype=dtype, to=onnx_type)
