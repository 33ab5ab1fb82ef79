"""Builds ONNX function bodies: values with numpy's operators that append standard nodes of opset 26.

Every dimension is a 1-element int64 :class:`Value`, so that shapes stay dynamic. All operators keep the element type of
their left operand; Python numbers and numpy arrays become constants of that type.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 26

BOOL = TensorProto.BOOL
FLOAT = TensorProto.FLOAT
INT32 = TensorProto.INT32
INT64 = TensorProto.INT64
UINT32 = TensorProto.UINT32

_NUMPY_TYPES: dict[int, type[np.generic]] = {
    BOOL: np.bool_,
    FLOAT: np.float32,
    INT32: np.int32,
    INT64: np.int64,
    UINT32: np.uint32,
}

Number = int | float | bool
Attribute = int | str | list[int]


class Value:
    """A tensor inside a body: its name there and its element type."""

    def __init__(self, body: Body, name: str, dtype: int) -> None:
        self.body = body
        self.name = name
        self.dtype = dtype

    def _binary(self, op_type: str, other: Operand, dtype: int | None = None) -> Value:
        return self.body.op(op_type, self, self.body.lift(other, self.dtype), dtype=dtype)

    def __add__(self, other: Operand) -> Value:
        return self._binary("Add", other)

    def __sub__(self, other: Operand) -> Value:
        return self._binary("Sub", other)

    def __mul__(self, other: Operand) -> Value:
        return self._binary("Mul", other)

    def __truediv__(self, other: Operand) -> Value:
        return self._binary("Div", other)

    def __floordiv__(self, other: Operand) -> Value:
        """Quotient of integers that are not negative (ONNX truncates)."""
        return self._binary("Div", other)

    def __mod__(self, other: Operand) -> Value:
        return self._binary("Mod", other)

    def __matmul__(self, other: Value) -> Value:
        return self._binary("MatMul", other)

    def __lt__(self, other: Operand) -> Value:
        return self._binary("Less", other, BOOL)

    def __le__(self, other: Operand) -> Value:
        return self._binary("LessOrEqual", other, BOOL)

    def __gt__(self, other: Operand) -> Value:
        return self._binary("Greater", other, BOOL)

    def __ge__(self, other: Operand) -> Value:
        return self._binary("GreaterOrEqual", other, BOOL)

    def equal(self, other: Operand) -> Value:
        return self._binary("Equal", other, BOOL)

    def __and__(self, other: Operand) -> Value:
        return self._binary("And" if self.dtype == BOOL else "BitwiseAnd", other)

    def __or__(self, other: Operand) -> Value:
        return self._binary("Or" if self.dtype == BOOL else "BitwiseOr", other)

    def __lshift__(self, other: Operand) -> Value:
        return self.body.op("BitShift", self, self.body.lift(other, self.dtype), direction="LEFT")

    def __rshift__(self, other: Operand) -> Value:
        return self.body.op("BitShift", self, self.body.lift(other, self.dtype), direction="RIGHT")

    def minimum(self, other: Operand) -> Value:
        return self._binary("Min", other)

    def maximum(self, other: Operand) -> Value:
        return self._binary("Max", other)

    def cast(self, dtype: int) -> Value:
        """The values in another type."""
        return self if dtype == self.dtype else self.body.op("Cast", self, dtype=dtype, to=dtype)

    def bits(self, dtype: int) -> Value:
        """The same bits read as a type of the same width."""
        return self if dtype == self.dtype else self.body.op("BitCast", self, dtype=dtype, to=dtype)

    def dim(self, axis: int) -> Value:
        """Size along ``axis``, int64 ``[1]``."""
        return self.body.op("Shape", self, dtype=INT64, start=axis, end=axis + 1)

    def size(self) -> Value:
        """Number of elements, int64 ``[1]``."""
        return self.body.op("Size", self, dtype=INT64).unsqueeze(0)

    def reshape(self, *dims: Operand) -> Value:
        """The same elements in the given shape; empty tensors are fine, -1 is not used."""
        return self.body.op("Reshape", self, self.body.shape(dims), allowzero=1)

    def expand(self, *dims: Operand) -> Value:
        return self.body.op("Expand", self, self.body.shape(dims))

    def transpose(self, *perm: int) -> Value:
        return self.body.op("Transpose", self, perm=list(perm))

    def unsqueeze(self, *axes: int) -> Value:
        return self.body.op("Unsqueeze", self, self.body.constant(list(axes), INT64))

    def squeeze(self, *axes: int) -> Value:
        return self.body.op("Squeeze", self, self.body.constant(list(axes), INT64))

    def slice(self, axis: int, start: Operand, stop: Operand) -> Value:
        """Elements ``start`` to ``stop`` (exclusive) along ``axis``."""
        bounds = [self.body.shape([start]), self.body.shape([stop])]
        return self.body.op("Slice", self, *bounds, self.body.constant([axis], INT64))

    def gather(self, indices: Operand, axis: int = 0) -> Value:
        """``numpy.take``; the indices must lie in the tensor."""
        return self.body.op("Gather", self, self.body.lift(indices, INT64), axis=axis)

    def compress(self, condition: Value, axis: int = 0) -> Value:
        """The slices along ``axis`` at which ``condition`` (bool, 1-D) holds."""
        return self.body.op("Compress", self, condition, axis=axis)

    def sum(self, axis: int, keep: bool = True) -> Value:
        return self._reduce("ReduceSum", axis, keep)

    def max(self, axis: int, keep: bool = True) -> Value:
        """Maximum along ``axis``; over nothing, the lowest value of the type."""
        return self._reduce("ReduceMax", axis, keep)

    def mean(self, axis: int, keep: bool = True) -> Value:
        return self._reduce("ReduceMean", axis, keep)

    def _reduce(self, op_type: str, axis: int, keep: bool) -> Value:
        assert axis >= 0  # ONNX Runtime 1.31 leaves an empty axis in place when it is counted from the end
        return self.body.op(op_type, self, self.body.constant([axis], INT64), keepdims=int(keep))

    def unary(self, op_type: str) -> Value:
        """An element-wise op without attributes, such as ``Exp``."""
        return self.body.op(op_type, self)

    def scatter(self, rows: Value, updates: Value) -> Value:
        """A copy in which the slices along axis 0 at ``rows`` (int64 ``[n]``) are ``updates``."""
        return self.body.op("ScatterND", self, rows.unsqueeze(1), updates)


Operand = Value | Number | npt.NDArray[np.generic] | Sequence[int]


class Body:
    """The nodes of one function body, in order."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[int, tuple[int, ...], bytes], Value] = {}
        self._count = 0

    def input(self, name: str, dtype: int) -> Value:
        """A formal input of the function."""
        return Value(self, name, dtype)

    def _new(self, dtype: int) -> Value:
        self._count += 1
        return Value(self, f"v{self._count}", dtype)

    def op(self, op_type: str, *inputs: Value, dtype: int | None = None, **attributes: Attribute) -> Value:
        """Append a node with one output, of element type ``dtype`` (default: that of the first input)."""
        output = self._new(inputs[0].dtype if dtype is None else dtype)
        node = helper.make_node(op_type, [value.name for value in inputs], [output.name])
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        self.nodes.append(node)
        return output

    def top_k(self, values: Value, count: Value, largest: bool) -> tuple[Value, Value]:
        """The ``count`` largest or smallest along the last axis, in order, and their indices (int64).

        ``count`` is int64 ``[1]``. Of equal values the one of smaller index comes first.
        """
        outputs = self._new(values.dtype), self._new(INT64)
        names = [output.name for output in outputs]
        self.nodes.append(helper.make_node("TopK", [values.name, count.name], names, largest=int(largest), sorted=1))
        return outputs

    def constant(self, value: Number | Sequence[int] | npt.NDArray[np.generic], dtype: int) -> Value:
        """A constant; equal ones are made once."""
        array = np.asarray(value, _NUMPY_TYPES[dtype])
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            output = self._new(dtype)
            self.nodes.append(helper.make_node("Constant", [], [output.name], value=numpy_helper.from_array(array)))
            self._constants[key] = output
        return self._constants[key]

    def lift(self, value: Operand, dtype: int) -> Value:
        """``value`` itself, or the constant of type ``dtype``."""
        return value if isinstance(value, Value) else self.constant(value, dtype)

    def shape(self, dims: Sequence[Operand]) -> Value:
        """An int64 vector of dimensions, each a number or a 1-element :class:`Value`."""
        if all(isinstance(dim, int) for dim in dims):
            return self.constant(np.asarray(dims, np.int64), INT64)
        if len(dims) == 1:
            return self.lift(dims[0], INT64)
        vectors = [dim if isinstance(dim, Value) else self.constant(np.asarray([dim]), INT64) for dim in dims]
        return self.concat(0, *vectors)

    def concat(self, axis: int, *values: Value) -> Value:
        return values[0] if len(values) == 1 else self.op("Concat", *values, axis=axis)

    def where(self, condition: Value, then: Operand, otherwise: Operand, dtype: int | None = None) -> Value:
        """``then`` where ``condition`` holds, else ``otherwise``. Give ``dtype`` when both are numbers."""
        known = next((value.dtype for value in (then, otherwise) if isinstance(value, Value)), dtype)
        assert known is not None
        return self.op("Where", condition, self.lift(then, known), self.lift(otherwise, known), dtype=known)

    def range(self, count: Value) -> Value:
        """0..count-1, int64, for a 1-element ``count``."""
        return self.op("Range", self.constant(0, INT64), count.squeeze(0), self.constant(1, INT64))

    def fill(self, value: Number, dtype: int, *dims: Operand) -> Value:
        """A tensor of one value."""
        return self.constant(value, dtype).expand(*dims)

    def finish(self, outputs: dict[str, Value], inputs: set[str]) -> list[onnx.NodeProto]:
        """The nodes, with ``outputs`` (formal name: value) under their formal names.

        A value that is an input of the function or has a formal name already goes through an ``Identity``.
        """
        rename: dict[str, str] = {}
        copies: list[onnx.NodeProto] = []
        for name, value in outputs.items():
            if value.name in inputs or value.name in rename:
                copies.append(helper.make_node("Identity", [rename.get(value.name, value.name)], [name]))
            else:
                rename[value.name] = name
        for node in self.nodes:
            for names in (node.input, node.output):
                for position, name in enumerate(names):
                    if name in rename:
                        names[position] = rename[name]
        return self.nodes + copies
