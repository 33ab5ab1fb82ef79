"""Quantised weights and activations for parsers that know only symmetric int8 and e4m3 with one scale a tensor or a channel, and int4 in blocks.

What is beyond that becomes arithmetic on what they know, with the same values:

- Scales in blocks of any shape, zero points and casts: DequantizeLinear with the scale 1 gives the values of the codes, from which the
  real zero points are subtracted, and the real scales multiplied on. No weight is read for it.
- uint8 and uint4 weights, and tables that are looked up in, become int8 and int4, zero point and all shifted by half their range.
- Weights of other types (e5m2, int16, int32, …) are expanded to the float type of the graph.
- Fake quantisation of activations with a zero point is spelt out: round, clip, subtract, multiply.

Weights that must be read are read one at a time, and kept in `weight_file` where there is one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from mla_trt.passes.graph import constant_value, element_count, is_empty, producer
from mla_trt.passes.legalize_constants import MAX_FOLDED_ELEMENTS, lazy_constant
from mla_trt.passes.legalize_rules import Rewriter
from mla_trt.passes.legalize_types import FLOAT8, FLOATS, element_type, to_dtype, type_name
from mla_trt.weight_file import WeightFile

E4M3, INT4, INT8 = TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.INT8
KNOWN_CODES = (INT8, E4M3, INT4)
_SIGNED: dict[int, tuple[np.dtype, int]] = {
    TensorProto.UINT8: (np.dtype(np.int8), 128),
    TensorProto.UINT4: (np.dtype(ml_dtypes.int4), 8),
}
_RANGES: dict[int, tuple[int, int]] = {
    TensorProto.UINT8: (0, 255),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT16: (0, 65535),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT4: (-8, 7),
}
_MOVES_DATA = (
    *("Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice", "Split"),
    *("Squeeze", "Transpose", "Unsqueeze"),
)


@dataclass
class Quantized:
    """Rewrites what is quantised in one graph.

    Attributes:
        base_dir: folder of the external weights.
        weight_file: where weights of another type go; into the model where there is none.
        recoded: counts weights that were read to change their type, by what became of them.
    """

    rewriter: Rewriter
    base_dir: Path | None
    weight_file: WeightFile | None = None
    recoded: Counter[str] = field(default_factory=Counter)
    _values_of: dict[tuple[str, int], gs.Tensor] = field(default_factory=dict)
    _signed_of: dict[str, gs.Constant] = field(default_factory=dict)

    def apply(self, nodes: list[gs.Node]) -> int:
        """Rewrites the quantised nodes among `nodes`, which are in topological order; returns how many it changed."""
        rules = {"QuantizeLinear": self._quantize, "DequantizeLinear": self._dequantize, "Cast": self._cast}
        rules |= dict.fromkeys(_MOVES_DATA, self._move)
        return sum(rules[node.op](node) for node in nodes if node.op in rules and not node.domain)

    # -- casts and movement ----------------------------------------------------------------------------------------

    def _cast(self, node: gs.Node) -> bool:
        """Casts from and to e4m3 are a DequantizeLinear and a QuantizeLinear with the scale 1."""
        source, to = element_type(node.inputs[0]), node.attrs["to"]
        if source in FLOAT8 and to in FLOATS and self._has_values(node.inputs[0]):
            self.rewriter.become(node, "Identity", [self._values(node.inputs[0], to)])
            return True
        if to == E4M3 and source in FLOATS and node.attrs.get("saturate", 1):
            wish = node.outputs[0].name
            one = self.rewriter.scalar(f"{wish}.one", 1.0, source)
            zero = self.rewriter.scalar(f"{wish}.zero", 0.0, E4M3)
            self.rewriter.become(node, "QuantizeLinear", [node.inputs[0], one, zero])
            node.outputs[0].dtype = E4M3
            return True
        return False

    def _move(self, node: gs.Node) -> bool:
        """Moves the values of float8 data instead of its codes."""
        data = node.inputs if node.op == "Concat" else node.inputs[:1]
        if element_type(node.inputs[0]) not in FLOAT8 or not all(map(self._has_values, data)):
            return False
        for index in range(len(data)):
            node.inputs[index] = self._values(node.inputs[index], TensorProto.FLOAT)
        for output in node.outputs:
            output.dtype = np.dtype(np.float32)
        return True

    @staticmethod
    def _has_values(codes: gs.Tensor) -> bool:
        """Whether the numbers that codes are can be had at run time, or now."""
        return isinstance(codes, gs.Constant) or element_type(codes) in (*FLOATS, *KNOWN_CODES)

    def _values(self, codes: gs.Tensor, element: int) -> gs.Tensor:
        """The numbers that codes are, in a float type. Any of int4, int8 and float8 is exact in every float type."""
        kind = element_type(codes)
        if kind in FLOATS:
            return self.rewriter.cast(codes, element, f"{codes.name}.values")
        key = codes.name, element
        if key not in self._values_of:
            if kind in KNOWN_CODES:
                one = self.rewriter.scalar(f"{codes.name}.one", 1.0, element)
                made = self.rewriter.emitter.node(
                    "DequantizeLinear", [codes, one], f"{codes.name}.values", dtype=to_dtype(element)
                )
                made.shape = codes.shape
                self._values_of[key] = made
            else:
                assert isinstance(codes, gs.Constant)
                self._values_of[key] = self._expanded(codes, self._read(codes), element)
        return self._values_of[key]

    # -- weights that are read -------------------------------------------------------------------------------------

    def _read(self, tensor: gs.Constant) -> np.ndarray:
        return np.asarray(constant_value(tensor, self.base_dir)).astype(np.float32)

    def _stored(self, wish: str, values: np.ndarray) -> gs.Constant:
        name = self.rewriter.emitter.names.new(wish)
        constant = lazy_constant(name, values)
        if self.weight_file is None or values.size <= MAX_FOLDED_ELEMENTS:
            return constant
        proto = constant._values.tensor
        self.weight_file.move_out(proto)
        return gs.Constant(name, LazyValues(proto))

    def _expanded(self, source: gs.Constant, values: np.ndarray, element: int) -> gs.Constant:
        self.recoded[f"{type_name(element_type(source))} to {type_name(element)}"] += 1
        return self._stored(f"{source.name}.expanded", values.astype(helper.tensor_dtype_to_np_dtype(element)))

    def _less_half(self, tensor: gs.Constant) -> np.ndarray:
        """Unsigned codes, or their zero point, less half of their range."""
        dtype, half = _SIGNED[element_type(tensor)]
        return (np.asarray(constant_value(tensor, self.base_dir)).astype(np.int16) - half).astype(dtype)

    # -- QuantizeLinear --------------------------------------------------------------------------------------------

    def _quantize(self, node: gs.Node) -> bool:
        """Keeps symmetric int8 and e4m3; anything else is spelt out in floats, for the DequantizeLinear behind it to read."""
        kind, point = element_type(node.outputs[0]), self._zero_point(node)
        if kind in (INT8, E4M3) and point is None:
            return self._name_axis(node)
        bounds = _RANGES.get(kind)
        only_read_back = all(reader.op == "DequantizeLinear" for reader in node.outputs[0].outputs)
        if bounds is None or element_type(node.inputs[0]) not in FLOATS or not only_read_back:
            return False
        e, wish, element = self.rewriter.emitter, node.outputs[0].name, TensorProto.FLOAT
        factors = [None if item is None else self._spread(node, item, element) for item in (node.inputs[1], point)]
        if factors[0] is None or (point is not None and factors[1] is None):
            return False
        shape = node.inputs[0].shape
        x = self.rewriter.cast(node.inputs[0], element, f"{wish}.wide")
        steps: gs.Tensor = e.node("Round", [e.node("Div", [x, factors[0]], f"{wish}.ratio")], f"{wish}.steps")
        if factors[1] is not None:
            steps = e.node("Add", [steps, factors[1]], f"{wish}.shifted")
        self.rewriter.become(
            node, "Clip", [steps, *(self.rewriter.scalar(f"{wish}.bound", bound, element) for bound in bounds)]
        )
        node.outputs[0].dtype, node.outputs[0].shape = to_dtype(element), shape
        return True

    @staticmethod
    def _name_axis(node: gs.Node) -> bool:
        """Names the channel axis, which the parser takes to be 0 where it is absent (ONNX: 1)."""
        shape = node.inputs[1].shape
        if "axis" in node.attrs or (shape is not None and (len(shape) == 0 or list(shape) == [1])):
            return False
        node.attrs["axis"] = 1
        return True

    def _zero_point(self, node: gs.Node) -> gs.Tensor | None:
        """The zero point, where there is one that is not zero."""
        if len(node.inputs) < 3 or is_empty(node.inputs[2]):
            return None
        point = node.inputs[2]
        return None if isinstance(point, gs.Constant) and not self._read(point).any() else point

    # -- DequantizeLinear ------------------------------------------------------------------------------------------

    def _dequantize(self, node: gs.Node) -> bool:
        element = element_type(node.inputs[1])
        result = node.attrs.get("output_dtype", 0) or element
        if element not in FLOATS or result not in FLOATS:
            return False
        changed = self._make_signed(node)
        table = self._looked_up(node)
        if table is not None and isinstance(table.inputs[0], gs.Constant) and element_type(table.inputs[0]) == INT8:
            table.inputs[0] = self._values(table.inputs[0], element)  # parsers look up numbers, not codes
            table.outputs[0].dtype = to_dtype(element)
            changed = True
        codes, kind, point = node.inputs[0], element_type(node.inputs[0]), self._zero_point(node)
        if point is None and result == element and self._is_plain(node, kind):
            return self._tidy(node) or changed
        if kind in (*FLOATS, *KNOWN_CODES) and not (kind == INT4 and codes.shape[-1] % 2):
            return self._multiply(node, result, point) or changed
        if isinstance(codes, gs.Constant):
            values = (self._read(codes) - self._array(node, 2)) * self._array(node, 1)
            self.rewriter.become(node, "Identity", [self._expanded(codes, values, result)])
            return True
        return changed

    def _make_signed(self, node: gs.Node) -> bool:
        reader = self._looked_up(node) or node  # of the codes
        codes, kind = reader.inputs[0], element_type(reader.inputs[0])
        if kind not in _SIGNED or not isinstance(codes, gs.Constant):
            return False
        dtype, half = _SIGNED[kind]
        if len(node.inputs) < 3 or is_empty(node.inputs[2]):
            zero = np.full(node.inputs[1].shape, -half).astype(dtype)
        elif isinstance(node.inputs[2], gs.Constant):
            zero = self._less_half(node.inputs[2])
        else:
            return False
        if codes.name not in self._signed_of:
            self.recoded[f"{type_name(kind)} to {dtype.name}"] += 1
            self._signed_of[codes.name] = self._stored(f"{codes.name}.signed", self._less_half(codes))
        point = lazy_constant(self.rewriter.emitter.names.new(f"{codes.name}.zero"), zero)
        reader.inputs[0] = self._signed_of[codes.name]
        if reader is not node:
            reader.outputs[0].dtype = dtype
        node.inputs = [node.inputs[0], node.inputs[1], point]
        return True

    def _looked_up(self, node: gs.Node) -> gs.Node | None:
        """The Gather that picks rows of a table for this node alone, as for embeddings."""
        codes = node.inputs[0]
        maker = producer(codes)
        if maker is None or maker.op != "Gather" or maker.domain or len(codes.outputs) != 1:
            return None
        return None if any(codes is output for output in self.rewriter.emitter.graph.outputs) else maker

    def _is_plain(self, node: gs.Node, kind: int) -> bool:
        """Whether the parser takes a symmetric DequantizeLinear as it is."""
        codes, scale = node.inputs[:2]
        if kind not in KNOWN_CODES or not isinstance(scale, gs.Constant) or not (self._read(scale) > 0).all():
            return False
        block, axis = node.attrs.get("block_size", 0), node.attrs.get("axis", 1)
        if kind == INT4:
            if not isinstance(codes, gs.Constant) or codes.shape[-1] % 2:
                return False
            return element_count(scale) == 1 or bool(block and len(codes.shape) == 2 and codes.shape[axis] % block == 0)
        return not block and len(scale.shape) <= 1

    def _tidy(self, node: gs.Node) -> bool:
        """Leaves the attributes that the parser reads as ONNX means them; it takes the channel axis to be 0 unless it is named."""
        blocks = node.attrs.get("block_size", 0)
        attrs = {"axis": node.attrs.get("axis", 1)} if element_count(node.inputs[1]) > 1 else {}
        if blocks and attrs:
            attrs["block_size"] = blocks
        if node.attrs == attrs and len(node.inputs) == 2:
            return False
        self.rewriter.become(node, "DequantizeLinear", node.inputs[:2], **attrs)
        return True

    def _multiply(self, node: gs.Node, result: int, point: gs.Tensor | None) -> bool:
        """(values - zero point) * scale."""
        wish, e, block = node.outputs[0].name, self.rewriter.emitter, node.attrs.get("block_size", 0)
        factors = [None if item is None else self._spread(node, item, result) for item in (node.inputs[1], point)]
        if factors[0] is None or (point is not None and factors[1] is None):
            return False
        shape = node.inputs[0].shape
        values = self._values(node.inputs[0], result)
        if block:
            values = e.reshape(values, self._block_shape(node), f"{wish}.blocks")
        if factors[1] is not None:
            values = e.node("Sub", [values, factors[1]], f"{wish}.shifted")
        if block:
            scaled = e.node("Mul", [values, factors[0]], f"{wish}.scaled")
            target = e.constant(f"{wish}.shape", list(shape), np.int64)
            self.rewriter.become(node, "Reshape", [scaled, target], allowzero=0)
        else:
            self.rewriter.become(node, "Mul", [values, factors[0]])
        return True

    @staticmethod
    def _block_shape(node: gs.Node) -> list[int]:
        """The shape of the data with its blocked axis cut in two; one long block where the last one is shorter."""
        shape, block = list(node.inputs[0].shape), node.attrs["block_size"]
        axis = node.attrs.get("axis", 1) % len(shape)
        cut = [shape[axis] // block, block] if shape[axis] % block == 0 else [shape[axis], 1]
        return [*shape[:axis], *cut, *shape[axis + 1 :]]

    def _spread(self, node: gs.Node, factor: gs.Tensor, element: int) -> gs.Tensor | None:
        """A scale or a zero point as floats that broadcast over the node's data, or over its blocks; None where that needs an unknown size."""
        e, wish = self.rewriter.emitter, f"{node.outputs[0].name}.{factor.name}"
        if element_type(factor) not in FLOATS:
            if not isinstance(factor, gs.Constant):
                return None
            factor = self._stored(wish, self._read(factor).astype(helper.tensor_dtype_to_np_dtype(element)))
        factor = self.rewriter.cast(factor, element, wish)
        shape, axis, data = factor.shape, node.attrs.get("axis", 1), node.inputs[0].shape
        if node.attrs.get("block_size", 0):
            sizes = None if data is None or shape is None else [size for size in data if isinstance(size, int)]
            if sizes is None or len(sizes) != len(shape):
                return None
            axis %= len(sizes)
            if sizes[axis] % node.attrs["block_size"]:
                factor = e.gather(factor, np.arange(sizes[axis]) // node.attrs["block_size"], axis, wish)
            return e.node("Unsqueeze", [factor, e.constant(f"{wish}.axis", [axis + 1], np.int64)], wish)
        if shape is None or len(shape) != 1 or shape[0] == 1:
            return None if shape is None else factor
        after = -axis - 1 if axis < 0 else len(data) - axis - 1 if data is not None else None
        if not after:
            return None if after is None else factor
        return e.node("Unsqueeze", [factor, e.constant(f"{wish}.axes", list(range(1, after + 1)), np.int64)], wish)

    def _array(self, node: gs.Node, index: int) -> np.ndarray:
        """A node's constant scale or zero point, to broadcast over its constant data."""
        if index >= len(node.inputs) or is_empty(node.inputs[index]):
            return np.zeros((), np.float32)
        array, shape = self._read(node.inputs[index]), node.inputs[0].shape
        axis, block = node.attrs.get("axis", 1), node.attrs.get("block_size", 0)
        if array.size == 1:
            return array.reshape(())
        if block:
            return np.take(array, np.arange(shape[axis]) // block, axis)
        if array.ndim == 1:
            return array.reshape([-1 if index == axis % len(shape) else 1 for index in range(len(shape))])
        return array
