"""Writes an ONNX graph node by node, in the way of PyTorch's exporter: equal constants and equal shape arithmetic are
made once, weights of matrix products are transposed and nameless, and each node tells the module that it is from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mla_trt.models.weights import WeightStore

SCOPES_KEY = "pkg.torch.onnx.name_scopes"


class GraphWriter:
    """A graph in the making. Values are their names."""

    def __init__(self, weights: WeightStore, dtype: int) -> None:
        self.weights = weights
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._shared: dict[tuple[Any, ...], str] = {}
        self._scopes: list[str] = [""]
        self._count = 0

    def fresh(self, hint: str = "val") -> str:
        """A name that no other value has."""
        self._count += 1
        return f"{hint}_{self._count}"

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes made inside the block are said to be from the module of this name."""
        parent = self._scopes[-1]
        self._scopes.append(f"{parent}.{name}" if parent else name)
        try:
            yield
        finally:
            self._scopes.pop()

    def node(self, op: str, *inputs: str, output: str | None = None, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; returns its output, or a list of them when there are several."""
        names = [output] if output is not None else [self.fresh(op.lower()) for _ in range(outputs)]
        made = helper.make_node(op, inputs, names, name=f"node_{op}_{len(self.nodes)}", **attributes)
        scopes = self._scopes[-1].split(".") if self._scopes[-1] else []
        made.metadata_props.append(onnx.StringStringEntryProto(key=SCOPES_KEY, value=str([".".join(scopes), names[0]])))
        self.nodes.append(made)
        return names[0] if len(names) == 1 else names

    def shared(self, op: str, *inputs: str, **attributes: Any) -> str:
        """As `node`, but made once for equal arguments: what depends on shapes and positions is alike in all layers."""
        key = (op, inputs, tuple(sorted((name, str(value)) for name, value in attributes.items())))
        if key not in self._shared:
            self._shared[key] = self.node(op, *inputs, **attributes)
        return self._shared[key]

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A constant; equal ones are one initializer."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.fresh()
            self._constants[key] = name
            self.initializers.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    def parameter(self, name: str, shape: Sequence[int], *, norm: bool = False) -> str:
        """A weight under its own name."""
        self.initializers.append(self.weights.weight(name, tuple(shape), self.dtype, norm=norm))
        return name

    def linear(self, x: str, rows: int, columns: int, **options: Any) -> str:
        """x times a weight [rows, columns], which is nameless, as the exporter leaves it after folding its
        transposition."""
        name = self.fresh()
        self.initializers.append(self.weights.weight(name, (rows, columns), self.dtype))
        return self.node("MatMul", x, name, **options)

    def cast(self, x: str, to: int) -> str:
        """x in another type."""
        return self.node("Cast", x, to=to)

    def to_float(self, x: str) -> str:
        """x in f32, which it may be already."""
        return x if self.dtype == TensorProto.FLOAT else self.cast(x, TensorProto.FLOAT)

    def from_float(self, x: str) -> str:
        """x, in f32, in the type of the graph."""
        return x if self.dtype == TensorProto.FLOAT else self.cast(x, self.dtype)

    def input(self, name: str, dtype: int, axes: Sequence[str | int]) -> str:
        """A graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(axes)))
        return name

    def output(self, name: str, dtype: int, axes: Sequence[str | int]) -> None:
        """A graph output; a node has made it."""
        self.outputs.append(helper.make_tensor_value_info(name, dtype, list(axes)))

    def model(self, opset: int) -> onnx.ModelProto:
        """The finished model."""
        graph = onnx.GraphProto(name="main_graph")
        graph.node.extend(self.nodes)
        graph.initializer.extend(self.initializers)
        graph.input.extend(self.inputs)
        graph.output.extend(self.outputs)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10, producer_name="mla-trt"
        )
