"""Turns a float32 or float16 model into one that multiplies in bfloat16.

What costs memory and time becomes bfloat16: products with weights (their weights, what they are multiplied with, their
results), embedding tables, the float tensors of the fused ops, and whatever only moves such values about. Everything
else stays as it is: norms, activations, the residual stream, softmaxes, products of two activations, recurrent states,
and all that does not depend on tokens (rope tables, positions). So do routers from their product on, and the
indexer's head weights: a rounded score selects another expert or key. Graph inputs and outputs keep their types.

The model stays strongly typed: there is a Cast wherever the type changes, one for each tensor at most.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from mla_trt.errors import BadModelError
from mla_trt.metadata import LoweredMetadata
from mla_trt.ops import DOMAIN, OPS
from mla_trt.ops.schema import WEIGHT, F
from mla_trt.weight_file import WeightFile

BFLOAT16 = TensorProto.BFLOAT16
WIDE: dict[int, str] = {TensorProto.FLOAT: "<f4", TensorProto.FLOAT16: "<f2"}
"""Types that hold a value more exactly than bfloat16 does, as they lie in files."""

PRODUCTS = ("MatMul", "Gemm", "Einsum")
# Ops whose results hold values of their first inputs (Concat: of all), unchanged.
MOVES = {
    "Concat",
    "Expand",
    "Flatten",
    "Gather",
    "GatherElements",
    "GatherND",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
}
# Ops that choose by comparing: what leads to them is not rounded.
CHOICES = ("TopK", "ArgMax")


def to_bfloat16(model: onnx.ModelProto, base_dir: Path | None = None, weight_file: WeightFile | None = None) -> int:
    """Converts a lowered model in place.

    Args:
        model: a lowered model with its function bodies.
        base_dir: folder of its external data.
        weight_file: where the converted copies of external weights go, one weight at a time. None: into the model.

    Returns:
        how many tensors are bfloat16 now.

    Raises:
        BadModelError: the model is not a lowered one, or its types contradict each other.
    """
    tokens = LoweredMetadata.of(model).token_input
    return _Conversion(model, tokens, _Weights(base_dir, weight_file)).run()


class _Weights:
    """Makes bfloat16 copies of weights."""

    def __init__(self, base_dir: Path | None, weight_file: WeightFile | None) -> None:
        self._base_dir = base_dir or Path()
        self._file = weight_file

    def convert(self, tensor: TensorProto, name: str) -> TensorProto:
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16), name)
        info = ExternalDataInfo(tensor)
        count = int(np.prod(tensor.dims, dtype=np.int64))
        with (self._base_dir / info.location).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            values = np.frombuffer(mapped, WIDE[tensor.data_type], count, info.offset or 0).reshape(tuple(tensor.dims))
            rounded = values.astype(ml_dtypes.bfloat16)
            del values
            mapped.close()
        return self._file.add_array(name, rounded) if self._file else numpy_helper.from_array(rounded, name)


class _Conversion:
    def __init__(self, model: onnx.ModelProto, tokens: str, weights: _Weights) -> None:
        self._graph = model.graph
        self._weights = weights
        self._types = element_types(model)
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._producers = {name: node for node in model.graph.node for name in node.output if name}
        self._data = _dependent(model.graph.node, {tokens})
        self._constants = set(self._initializers)
        self._weightlike = set(self._initializers)
        for node in model.graph.node:
            given = [name for name in node.input if name]
            if not _subgraphs(node) and all(name in self._constants for name in given) and node.domain != DOMAIN:
                self._constants.update(node.output)
            if all(name in self._constants for name in node.output) or (
                node.op_type in MOVES and all(name in self._weightlike for name in _moved(node))
            ):
                self._weightlike.update(node.output)
        self._exact = self._leading_to_choices()
        self._read_narrow = self._only_read_narrow()
        self._narrow: dict[str, str] = {}  # wide tensor: its bfloat16 version
        self._only_narrow: set[str] = set()
        self._taken = set(self._types)
        self._nodes: list[onnx.NodeProto] = []
        self._added: list[TensorProto] = []

    def run(self) -> int:
        for node in self._graph.node:
            inputs = list(node.input)
            narrow = self._narrow_inputs(node)
            for index, name in enumerate(inputs):
                if node.op_type == "Cast" and name in self._only_narrow:
                    inputs[index] = self._narrow[name]  # from any type, and float16 has less range
                elif self._is_wide(name):
                    inputs[index] = self._bfloat16(name) if index in narrow else self._as_it_was(name)
            for inner in _subgraphs(node):
                for name in _read_by(inner):
                    self._as_it_was(name)
            outputs = list(node.output)
            if narrow:
                for index in self._narrow_outputs(node):
                    if self._is_wide(outputs[index]):
                        outputs[index] = self._made_narrow(outputs[index])
            del node.input[:], node.output[:]
            node.input.extend(inputs)
            node.output.extend(outputs)
            self._nodes.append(node)
        for output in self._graph.output:
            self._as_it_was(output.name)
        self._write()
        return len(self._narrow)

    def _is_wide(self, name: str) -> bool:
        return self._types.get(name) in WIDE

    def _narrow_inputs(self, node: onnx.NodeProto) -> set[int]:
        """Which wide inputs of a node it takes as bfloat16."""
        floats = {index for index, name in enumerate(node.input) if self._is_wide(name)}
        if node.domain == DOMAIN:
            return self._narrow_in_fused(node)
        if node.op_type in PRODUCTS:
            return floats if self._multiplies_weights(node) and node.output[0] not in self._exact else set()
        if node.op_type in MOVES:
            moved = _moved(node)
            if all(name in self._only_narrow or name in self._initializers for name in moved) and (
                any(name in self._only_narrow for name in moved) or self._read_narrow.issuperset(node.output)
            ):
                return {index for index in floats if node.input[index] in moved}
            if node.op_type.startswith("Gather") and node.input[1] in self._data and self._is_table(node.input[0]):
                return {0} & floats
        return set()

    def _narrow_in_fused(self, node: onnx.NodeProto) -> set[int]:
        """Which inputs a fused op takes as bfloat16. The first float one decides what its results are: an op of bfloat16 keeps
        a float32 weight as it is."""
        kinds = [formal.kind for formal in OPS[node.op_type].inputs]
        given = [index for index, name in enumerate(node.input) if name]
        first = next((index for index in given if kinds[index] == F), None)
        if first is None or not self._is_wide(node.input[first]):
            return set()
        return {index for index in given if kinds[index] in (F, WEIGHT) and self._is_wide(node.input[index])}

    def _narrow_outputs(self, node: onnx.NodeProto) -> list[int]:
        if node.domain == DOMAIN:
            formals = OPS[node.op_type].outputs
            return [index for index, name in enumerate(node.output) if name and formals[index].kind == F]
        return [index for index, name in enumerate(node.output) if name]

    def _only_read_narrow(self) -> set[str]:
        """Wide tensors that every reader takes as bfloat16: a weight that is only moved on its way to a product is then
        rounded as it is stored."""
        read: set[str] = {output.name for output in self._graph.output}
        found: set[str] = set()
        for node in reversed(self._graph.node):
            wanted: set[str] = set()
            if node.domain == DOMAIN:
                wanted = {node.input[index] for index in self._narrow_in_fused(node)}
            elif node.op_type in PRODUCTS and self._multiplies_weights(node) and node.output[0] not in self._exact:
                wanted = set(node.input)
            elif node.op_type in MOVES and found.issuperset(name for name in node.output if name):
                wanted = set(_moved(node))
            others = set(node.input) - wanted
            others.update(name for inner in _subgraphs(node) for name in _read_by(inner))
            read |= others
            found |= wanted - read
            found -= others
        return found

    def _is_table(self, name: str) -> bool:
        """A weight matrix, of which data chooses rows: an embedding, or the weights of experts."""
        tensor = self._initializers.get(name)
        return tensor is not None and len(tensor.dims) >= 2

    def _multiplies_weights(self, node: onnx.NodeProto) -> bool:
        factors = node.input[:2] if node.op_type == "Gemm" else node.input
        return (
            self._is_wide(node.output[0])
            and any(name in self._weightlike for name in factors)
            and any(name in self._data and name not in self._weightlike for name in factors)
        )

    def _leading_to_choices(self) -> set[str]:
        """The products whose results are compared, by routers, or weigh the heads of an indexer."""
        waiting: list[str] = []
        for node in self._graph.node:
            if node.op_type in CHOICES and not node.domain:
                waiting.append(node.input[0])
            if node.domain == DOMAIN:
                waiting += [
                    name for formal, name in OPS[node.op_type].given_inputs(node).items() if formal == "index_weights"
                ]
        found: set[str] = set()
        seen: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name in seen or name not in self._data or name not in self._producers:
                continue
            seen.add(name)
            node = self._producers[name]
            if node.op_type in PRODUCTS and self._multiplies_weights(node):
                found.add(node.output[0])
            elif node.domain != DOMAIN:
                waiting += node.input
        return found

    def _bfloat16(self, name: str) -> str:
        if name not in self._narrow:
            narrow = self._new_name(name)
            if name in self._initializers:
                self._added.append(self._weights.convert(self._initializers[name], narrow))
            else:
                self._cast(name, narrow, BFLOAT16)
            self._narrow[name] = narrow
        return self._narrow[name]

    def _as_it_was(self, name: str) -> str:
        if name in self._only_narrow:
            self._cast(self._narrow[name], name, self._types[name])
            self._only_narrow.remove(name)
        return name

    def _made_narrow(self, name: str) -> str:
        self._narrow[name] = self._new_name(name)
        self._only_narrow.add(name)
        return self._narrow[name]

    def _cast(self, source: str, target: str, element: int) -> None:
        self._nodes.append(helper.make_node("Cast", [source], [target], name=f"{target}/cast", to=element))

    def _new_name(self, name: str) -> str:
        candidate = f"{name}.bf16"
        while candidate in self._taken:
            candidate += "_"
        self._taken.add(candidate)
        return candidate

    def _write(self) -> None:
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self._nodes]
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input}
        used |= {name for node in nodes for inner in _subgraphs(node) for name in _read_by(inner)}
        used |= {output.name for output in self._graph.output}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in used]
        if len(kept) < len(self._graph.initializer):
            copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
            del self._graph.initializer[:]
            self._graph.initializer.extend(copies)
        self._graph.initializer.extend(self._added)
        del self._graph.value_info[:]


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """The ONNX element type of every tensor of a model that carries the functions of its own ops.

    Raises:
        BadModelError: the types contradict each other.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise BadModelError(f"the model's types contradict each other: {error}") from None
    types = {tensor.name: tensor.data_type for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        types[value.name] = value.type.tensor_type.elem_type
    return types


def _moved(node: onnx.NodeProto) -> list[str]:
    return list(node.input) if node.op_type == "Concat" else list(node.input[:1])


def _dependent(nodes: Iterable[onnx.NodeProto], sources: set[str]) -> set[str]:
    """Tensors whose values depend on the sources' values, not only on their shapes."""
    found = set(sources)
    for node in nodes:
        if node.op_type in ("Shape", "Size") or (node.domain == DOMAIN and node.op_type == "MlaPlan"):
            continue
        reads = [*node.input, *(name for inner in _subgraphs(node) for name in _read_by(inner))]
        if not found.isdisjoint(reads):
            found.update(name for name in node.output if name)
    return found


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [
        graph
        for attribute in node.attribute
        for graph in ((attribute.g,) if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs)
    ]


def _read_by(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that a subgraph and those in it read."""
    for node in graph.node:
        yield from node.input
        for inner in _subgraphs(node):
            yield from _read_by(inner)
    for output in graph.output:
        yield output.name
