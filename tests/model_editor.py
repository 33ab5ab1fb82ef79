"""Edits ONNX models in place: what tests of mutated models need to find tensors, put nodes in, and take nodes out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
INTEGERS = (TensorProto.INT64, TensorProto.INT32)
LARGE = 1 << 16  # elements; larger constants are not rewritten


@dataclass(frozen=True)
class TensorFacts:
    """What shape inference knows of a tensor: element type, and sizes (None where they vary), or None without a rank."""

    element: int
    shape: tuple[int | None, ...] | None

    @property
    def rank(self) -> int:
        return -1 if self.shape is None else len(self.shape)


@dataclass(frozen=True)
class Use:
    """An input of a node."""

    node: onnx.NodeProto
    index: int

    @property
    def name(self) -> str:
        return self.node.input[self.index]


class Editor:
    """A copy of a model under edit. Nodes may be appended in any order: `finish` sorts them.

    Attributes:
        random: every choice comes from it.
    """

    def __init__(self, model: onnx.ModelProto, seed: int) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.graph = self.model.graph
        self.random = random.Random(seed)
        self._count = 0
        self.refresh()

    def refresh(self) -> None:
        """Reads the tables anew, after changes that went around the methods."""
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producers = {name: node for node in self.graph.node for name in node.output if name}
        self.uses: dict[str, list[Use]] = {}
        for node in self.graph.node:
            for index, name in enumerate(node.input):
                if name:
                    self.uses.setdefault(name, []).append(Use(node, index))
        self.inputs = {value.name for value in self.graph.input} - set(self.constants)
        self.outputs = {value.name for value in self.graph.output}
        self._names = set(self.constants) | set(self.producers) | self.inputs | {node.name for node in self.graph.node}
        self._facts: dict[str, TensorFacts] | None = None

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def opset(self) -> int:
        return next((entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), 1)

    def facts(self, name: str) -> TensorFacts:
        """What is known of a tensor; its element type is 0 where nothing is."""
        if self._facts is None:
            self._facts = _infer(self.model)
        return self._facts.get(name, TensorFacts(0, None))

    def array(self, name: str) -> np.ndarray | None:
        """The values of a constant that is not large, else None."""
        tensor = self.constants.get(name)
        if tensor is None:
            node = self.producers.get(name)
            if node is None or node.op_type != "Constant" or node.attribute[0].name != "value":
                return None
            tensor = node.attribute[0].t
        if tensor.data_location == TensorProto.EXTERNAL or int(np.prod(tensor.dims, dtype=np.int64)) > LARGE:
            return None
        return numpy_helper.to_array(tensor)

    def is_constant(self, name: str) -> bool:
        maker = self.producers.get(name)
        return name in self.constants or (maker is not None and maker.op_type == "Constant")

    def nodes(self, *ops: str) -> list[onnx.NodeProto]:
        """Nodes of the standard domain with one of these ops."""
        return [node for node in self.graph.node if node.op_type in ops and node.domain in ("", "ai.onnx")]

    def edges(self, accept: Callable[[TensorFacts], bool]) -> list[Use]:
        """Inputs of nodes whose tensors are acceptable. Where a node wants constants, they are left alone."""
        return [
            use
            for uses in self.uses.values()
            for use in uses
            if not self.is_constant(use.name) and accept(self.facts(use.name))
        ]

    def chosen(self, items: Iterable[Any]) -> Any:
        """One of the items, None where there are none."""
        found = list(items)
        return self.random.choice(found) if found else None

    def shuffled(self, items: Iterable[Any]) -> list[Any]:
        found = list(items)
        self.random.shuffle(found)
        return found

    # -- edits ---------------------------------------------------------------------------------------------------

    def fresh(self, wish: str = "t") -> str:
        """A name that is not taken."""
        while True:
            self._count += 1
            name = f"{wish}_m{self._count}"
            if name not in self._names:
                self._names.add(name)
                return name

    def constant(self, values: Any, dtype: Any = None) -> str:
        """A new constant, as an initializer or as a node."""
        tensor = numpy_helper.from_array(np.array(values, dtype, order="C"), self.fresh("c"))
        if self.random.random() < 0.5:
            self.graph.initializer.append(tensor)
            self.constants[tensor.name] = self.graph.initializer[-1]
            return tensor.name
        return self._append(helper.make_node("Constant", [], [tensor.name], value=tensor))[0]

    def like(self, name: str, values: Any) -> str:
        """A constant of the element type of a tensor."""
        return self.constant(np.asarray(values).astype(helper.tensor_dtype_to_np_dtype(self.facts(name).element)))

    def emit(self, op: str, *inputs: str, outputs: int | list[str] = 1, **attributes: Any) -> Any:
        """Appends a node; returns the name of its output, or the list of their names."""
        names = [self.fresh(op.lower()) for _ in range(outputs)] if isinstance(outputs, int) else outputs
        made = self._append(helper.make_node(op, list(inputs), names, name=self.fresh(op), **attributes))
        return made[0] if len(made) == 1 else made

    def _append(self, node: onnx.NodeProto) -> list[str]:
        self.graph.node.append(node)
        node = self.graph.node[-1]
        for name in node.output:
            self.producers[name] = node
        for index, name in enumerate(node.input):
            if name:
                self.uses.setdefault(name, []).append(Use(node, index))
        return list(node.output)

    def rewire(self, use: Use, name: str) -> None:
        """Makes an input read another tensor."""
        self.uses[use.name].remove(use)
        use.node.input[use.index] = name
        self.uses.setdefault(name, []).append(use)

    def replace(self, old: onnx.NodeProto, *outputs: str) -> None:
        """Takes a node out; outputs of new nodes take the names of its own."""
        names = list(old.output)
        self.remove(old)
        for name, new in zip(names, outputs, strict=True):
            self._rename(new, name)

    def _rename(self, old: str, new: str) -> None:
        maker = self.producers.pop(old)
        maker.output[list(maker.output).index(old)] = new
        moved = self.uses.pop(old, [])
        for use in moved:
            use.node.input[use.index] = new
        self.uses.setdefault(new, []).extend(moved)
        self.producers[new] = maker

    def remove(self, node: onnx.NodeProto) -> None:
        """Takes a node out; what it made must be made by another before the end."""
        position = next(index for index, item in enumerate(self.graph.node) if item is node)
        del self.graph.node[position]
        facts = self._facts
        self.refresh()
        self._facts = facts

    def reaches(self, start: str, goal: onnx.NodeProto) -> bool:
        """Whether a node depends on a tensor."""
        seen: set[str] = set()
        stack = [start]
        while stack:
            for use in self.uses.get(stack.pop(), []):
                if use.node is goal:
                    return True
                for name in use.node.output:
                    if name not in seen:
                        seen.add(name)
                        stack.append(name)
        return False

    def finish(self) -> onnx.ModelProto:
        """The model, its nodes in an order in which each follows those it reads from."""
        nodes = sorted_nodes(self.graph, lambda ready: ready.pop())
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(copies)
        del self.graph.value_info[:]
        return self.model


def inner_names(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those of its subgraphs among them."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
            for inner in graph.node:
                yield from inner_names(inner)
            yield from (value.name for value in graph.output)


def sorted_nodes(
    graph: onnx.GraphProto, take: Callable[[list[onnx.NodeProto]], onnx.NodeProto]
) -> list[onnx.NodeProto]:
    """A topological order; `take` removes one of the nodes that may come next from a list and returns it. Nodes in a cycle come last."""
    nodes = list(graph.node)
    maker = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    needs = [{maker[name] for name in inner_names(node) if name in maker} for node in nodes]
    followers: dict[int, list[int]] = {}
    for index, makers in enumerate(needs):
        for other in makers:
            followers.setdefault(other, []).append(index)
    waiting = [len(makers) for makers in needs]
    index_of = {id(node): index for index, node in enumerate(nodes)}
    ready = [node for node, count in zip(reversed(nodes), reversed(waiting), strict=True) if not count]
    ordered: list[onnx.NodeProto] = []
    while ready:
        node = take(ready)
        ordered.append(node)
        for follower in reversed(followers.get(index_of[id(node)], [])):
            waiting[follower] -= 1
            if not waiting[follower]:
                ready.append(nodes[follower])
    placed = {id(node) for node in ordered}
    return ordered + [node for node in nodes if id(node) not in placed]


def _infer(model: onnx.ModelProto) -> dict[str, TensorFacts]:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    copy.graph.node.extend(sorted_nodes(model.graph, lambda ready: ready.pop()))
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    except Exception:
        inferred = copy.graph
    found = {
        tensor.name: TensorFacts(tensor.data_type, tuple(int(size) for size in tensor.dims))
        for tensor in model.graph.initializer
    }
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.tensor_type
        sizes = tuple(_size(dim) for dim in kind.shape.dim) if kind.HasField("shape") else None
        found[value.name] = TensorFacts(kind.elem_type, sizes)
    return found


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | None:
    return dim.dim_value if dim.HasField("dim_value") else None
