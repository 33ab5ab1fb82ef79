"""Evaluates a graph on one small concrete case, keeping apart what depends on data and what does not.

Everything that depends only on constants, positions, masks and shapes is computed outright: a mask, a rope table or a shape is then a
plain array, however it was spelt. Data stays symbolic: each element of a data tensor is a sum of `coefficient * atom`, an atom being one
element of a tensor that data movement, scaling and adding cannot explain (a projection's output, a norm's, a cache input). So a chain
of reshapes, slices, scatters, rotations and scales between a projection and the attention's scores comes out as one array of
atoms and coefficients, which the matcher reads.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper
from onnx.reference.ops import load_op

from mla_trt import interface as roles
from mla_trt.errors import MlaTrtError
from mla_trt.interface import ModelInterface
from mla_trt.passes.bounds import MAX_DATA, MAX_ELEMENTS, ProbeError, check_scatter, check_size
from mla_trt.passes.einsum import einsum_shape
from mla_trt.passes.graph import OPSET, constant_value, from_constants, is_empty, outer_inputs, producer, to_proto

MAX_TERMS = 8
MAX_MATRIX = 1 << 20  # elements of a constant that may turn out to move data; larger ones are weights
ZERO, ONE = 0, 1  # atom codes: no term; the number one (its coefficient is the value)


class TooManyTermsError(ProbeError):
    """An element sums up more atoms than are told apart."""


@dataclass(frozen=True)
class Term:
    """One summand for every element: `codes` (int64) and `coefficients` (float64) of the tensor's shape."""

    codes: np.ndarray
    coefficients: np.ndarray


@dataclass(frozen=True)
class Linear:
    """A data tensor: the sum of its terms."""

    shape: tuple[int, ...]
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a case: `sequences` B, `new` S, `cached` P, and `rows` L of caches that have all of them from the beginning."""

    sequences: int
    new: int
    cached: int
    rows: int = 0

    def of(self, letter: str) -> int:
        return {
            "B": self.sequences,
            "S": self.new,
            "P": self.cached,
            "T": self.cached + self.new,
            "L": self.rows,
        }[letter]


_SPARE_ROWS = 6  # of a full-length cache beyond a case's tokens


def case_sizes(interface: ModelInterface, sequences: int, new: int, cached: int) -> Sizes:
    """The sizes of a case, as near to those asked for as what the export fixed allows. A full-length cache keeps a row for no token, if it can."""
    fixed = interface.fixed
    new = fixed.get("S", new)
    rows = fixed.get("L", new + cached + _SPARE_ROWS)
    if interface.has_full_caches:
        if "S" not in fixed:
            new = max(min(new, rows // 3), 1)
        cached = max(min(cached, rows - new - 1), min(1, rows - new))
    return Sizes(fixed.get("B", sequences), new, fixed.get("P", cached), rows)


Value = np.ndarray | Linear

_MOVES_DATA = {
    "Identity": 1,
    "Reshape": 1,
    "Transpose": 1,
    "Unsqueeze": 1,
    "Squeeze": 1,
    "Slice": 1,
    "Expand": 1,
    "Gather": 1,
    "Split": 1,
    "Flatten": 1,
    "Tile": 1,
    "GatherND": 1,
    "GatherElements": 1,
    "Pad": 1,
    "Trilu": 1,
    "DepthToSpace": 1,
    "SpaceToDepth": 1,
}
_PARAMETER_TYPES = (np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.bool_))
# Casts to these types keep values but for their rounding.
_ROUNDING_TYPES = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E5M2,
)
# A pair of them rounds activations; what is read through it is what the model meant before it was quantised.
_FAKE_QUANTISATION = ("QuantizeLinear", "DequantizeLinear")
_SAME_SHAPE = {
    "Sqrt",
    "Reciprocal",
    "Exp",
    "Log",
    "Sigmoid",
    "Tanh",
    "Relu",
    "Softmax",
    "LogSoftmax",
    "Erf",
    "Gelu",
    "Softplus",
    "Cos",
    "Sin",
    "Abs",
    "Sign",
    "Floor",
    "Ceil",
    "Round",
    "Neg",
    "Not",
    "IsNaN",
    "IsInf",
    "LayerNormalization",
    "RMSNormalization",
    "LpNormalization",
    "Cast",
    "Identity",
    "Clip",
    "Elu",
    "Silu",
    "Swish",
    "CumSum",
    "HardSigmoid",
    "LeakyRelu",
    "Hardmax",
    "DequantizeLinear",
    "QuantizeLinear",
    "ScatterND",
    "ScatterElements",
    "TensorScatter",
    "Trilu",
    "Dropout",
    "CastLike",
}
_BROADCASTS = {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "And",
    "Or",
    "Xor",
    "Equal",
    "Less",
    "LessOrEqual",
    "Greater",
    "GreaterOrEqual",
    "Where",
    "Max",
    "Min",
    "Mod",
    "Sum",
    "Mean",
    "PRelu",
}


@dataclass
class Probe:
    """Values of a graph's tensors on one case, computed on demand and remembered.

    Attributes:
        data: ids of the tensors that depend on data (`identify_inputs.data_dependent`).
        overrides: constants, by id, that this case reads as others than they are.
        exported: the interface with all that the export fixed, where this case does not keep to that.
        opaque: ids of data tensors whose elements are to be taken as atoms although they could be explained.
        seen_through: data tensors, by id, that are to be read as another tensor times a vector: a norm without its division.
        selection_size: number of distinct keys in the random lists that stand for a TopK's indices.
    """

    graph: gs.Graph
    interface: ModelInterface
    data: set[int]
    sizes: Sizes
    base_dir: Path | None
    overrides: dict[int, np.ndarray] = field(default_factory=dict)
    exported: ModelInterface | None = None
    selection_size: int = 3
    opaque: set[int] = field(default_factory=set)
    seen_through: dict[int, tuple[gs.Tensor, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._values: dict[int, Value] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._failures: dict[tuple[str, int], ProbeError] = {}
        self._start_atoms()
        self._kernels: dict[int, Callable[..., tuple[np.ndarray, ...]]] = {}
        self._others: dict[Sizes, Probe] = {}
        self._matrices: dict[int, tuple[np.ndarray, bool] | None] = {}
        self.selections: dict[int, np.ndarray] = {}
        self.masks_checked: set[frozenset[int]] = set()
        self.selection_tensors: dict[int, gs.Tensor] = {}
        for model_input, tensor in zip(self.interface.inputs, self.graph.inputs, strict=True):
            shape = tuple(self.axis_size(axis) for axis in model_input.axes)
            self._shapes[id(tensor)] = shape
            if id(tensor) not in self.data:
                self._values[id(tensor)] = widen(self._input_value(model_input, shape))

    def _start_atoms(self) -> None:
        self._atom_starts: list[int] = [2]
        self._atom_tensors: list[gs.Tensor | None] = [None]
        self._atom_base: dict[int, int] = {}
        self._next_code = 2

    # -- the case ------------------------------------------------------------------------------------------------

    @property
    def fixed(self) -> dict[str, int]:
        """Sizes that the export fixed, by letter."""
        return (self.exported or self.interface).fixed

    def of_sizes(self, sizes: Sizes) -> Probe:
        """The same graph, as the export is, on a case of other sizes, without values: of what was asked before, only shapes are remembered, so that
        each layer costs what the first one does."""
        if sizes not in self._others:
            interface = self.exported or self.interface
            self._others[sizes] = Probe(self.graph, interface, self.data, sizes, self.base_dir)
        other = self._others[sizes]
        other.forget_values()
        return other

    def axis_size(self, axis: str | int) -> int:
        if isinstance(axis, int):
            return axis
        return self.interface.fixed.get(axis, self.sizes.of(axis)) if axis in "BSPTL" and axis else 1

    @property
    def batch(self) -> int:
        """Sequences of the case; 1 where the model has no axis for them."""
        return self.axis_size("B") if "B" in self.interface.tokens.axes else 1

    @property
    def positions(self) -> np.ndarray:
        """Position of each new token, int64 [S]."""
        return np.arange(self.sizes.new, dtype=np.int64) + self.sizes.cached

    def _input_value(self, model_input: roles.ModelInput, shape: tuple[int, ...]) -> np.ndarray:
        dtype = helper.tensor_dtype_to_np_dtype(model_input.dtype)
        if model_input.role == roles.POSITIONS:
            if "S" not in model_input.axes:
                return np.full(shape, self.sizes.cached, dtype)
            return np.ascontiguousarray(np.broadcast_to(self.positions, shape)).astype(dtype)
        if model_input.role == roles.LENGTHS:
            return np.full(shape, self.sizes.cached + self.sizes.new, dtype)
        if model_input.role == roles.ATTENTION_MASK and model_input.axes[-1:] == ("L",):
            filled = np.arange(shape[-1]) < self.sizes.cached + self.sizes.new
            return np.ascontiguousarray(np.broadcast_to(filled, shape)).astype(dtype)
        if model_input.role == roles.TOKEN_INDEX:
            return roles.token_index(model_input, shape, self.sizes.new).astype(dtype)
        if model_input.role == roles.TOKEN_COUNT:
            return np.full(shape, self.sizes.new, dtype)
        if model_input.role == roles.SCORE_MASK:
            allowed = np.arange(shape[-1])[None, :] <= (np.arange(shape[-2]) + self.sizes.cached)[:, None]
            if dtype == np.bool_:
                return np.ascontiguousarray(np.broadcast_to(allowed, shape))
            low = -65504.0 if dtype == np.float16 else -3.3895e38
            return np.ascontiguousarray(np.broadcast_to(np.where(allowed, 0.0, low), shape)).astype(dtype)
        if model_input.role in (roles.ROPE_COS, roles.ROPE_SIN):
            # Any angles will do, different for each position and pair: the rotation is read back from the coefficients.
            width = shape[-1]
            half = max(width // 2, 1)
            axis = model_input.axes.index("S") if "S" in model_input.axes else 0
            angle = (self.positions + 1)[:, None] / (np.arange(half)[None, :] + 1.7)
            table = np.cos(angle) if model_input.role == roles.ROPE_COS else np.sin(angle)
            if _is_doubled(model_input, self.interface):
                table = np.concatenate([table, table], axis=-1)
            view = [1] * len(shape)
            view[axis], view[-1] = table.shape[0], table.shape[1]
            return np.ascontiguousarray(np.broadcast_to(table.reshape(view), shape)).astype(dtype)
        return np.ones(shape, dtype)

    # -- atoms ---------------------------------------------------------------------------------------------------

    def atoms(self, tensor: gs.Tensor) -> Linear:
        """The tensor as atoms of its own."""
        shape = self.shape(tensor)
        base = self._atom_base.get(id(tensor))
        size = math.prod(shape)
        if size > MAX_DATA:
            raise ProbeError(f"'{tensor.name}' has {size} elements in a small case", producer(tensor))
        if base is None:
            base = self._next_code
            self._next_code += max(size, 1)
            self._atom_base[id(tensor)] = base
            self._atom_starts.append(base)
            self._atom_tensors.append(tensor)
        codes = np.arange(base, base + size, dtype=np.int64).reshape(shape)
        return Linear(shape, (Term(codes, np.ones(shape)),))

    def owners(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each code, the number of the tensor that owns it (0: none or the number one) and its flat index there."""
        starts = np.asarray(self._atom_starts)
        numbers = np.searchsorted(starts, codes, side="right") - 1
        numbers = np.where(codes < 2, 0, numbers)
        return numbers, np.where(numbers > 0, codes - starts[numbers], 0)

    def owner(self, number: int) -> gs.Tensor:
        """The tensor of an owner number."""
        tensor = self._atom_tensors[number]
        assert tensor is not None
        return tensor

    def owner_of(self, code: int) -> gs.Tensor | None:
        return self._atom_tensors[bisect_right(self._atom_starts, code) - 1] if code >= 2 else None

    # -- evaluation ----------------------------------------------------------------------------------------------

    def is_known(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor does not depend on data."""
        return id(tensor) not in self.data

    def known(self, tensor: gs.Tensor) -> np.ndarray:
        """The array of a tensor that does not depend on data."""
        value = self.value(tensor)
        assert isinstance(value, np.ndarray)
        return value

    def linear(self, tensor: gs.Tensor) -> Linear:
        """A tensor as sums of atoms; one that does not depend on data becomes multiples of the number one."""
        return as_linear(self.value(tensor))

    def value(self, tensor: gs.Tensor) -> Value:
        """The value of a tensor on this case.

        Raises:
            ProbeError: a node on the way cannot be evaluated.
        """
        if id(tensor) not in self._values:
            self._run(("value", tensor))
        return self._values[id(tensor)]

    def shape(self, tensor: gs.Tensor) -> tuple[int, ...]:
        """The shape of a tensor on this case.

        Raises:
            ProbeError: the shape depends on data.
        """
        if id(tensor) not in self._shapes:
            self._run(("shape", tensor))
        return self._shapes[id(tensor)]

    def _have(self, want: tuple[str, gs.Tensor]) -> bool:
        kind, tensor = want
        return id(tensor) in (self._values if kind == "value" else self._shapes)

    def _run(self, goal: tuple[str, gs.Tensor]) -> None:
        """Depth first without recursion: graphs are thousands of nodes deep. What failed once is not tried again."""
        stack = [goal]
        pending: set[tuple[str, int]] = set()
        while stack:
            want = stack[-1]
            kind, tensor = want
            key = kind, id(tensor)
            if self._have(want):
                stack.pop()
                continue
            try:
                if key in self._failures:
                    raise self._failures[key]
                if key not in pending:
                    pending.add(key)
                    stack.extend(need for need in self._needs(kind, tensor) if not self._have(need))
                    continue
                self._compute(kind, tensor)
                if not self._have(want):
                    raise ProbeError(f"'{tensor.name}' could not be evaluated", producer(tensor))
            except ProbeError as error:
                # Of what is on the stack, only what waits for this tensor fails with it.
                self._failures.update({(kind, id(tensor)): error for kind, tensor in self._waiting(stack, pending)})
                raise
            stack.pop()

    @staticmethod
    def _waiting(stack: list[tuple[str, gs.Tensor]], pending: set[tuple[str, int]]) -> list[tuple[str, gs.Tensor]]:
        return [want for want in stack if (want[0], id(want[1])) in pending]

    def _needs(self, kind: str, tensor: gs.Tensor) -> list[tuple[str, gs.Tensor]]:
        node = producer(tensor)
        if node is None:
            return []
        inputs = [item for item in node.inputs if not is_empty(item)]
        if node.op == "CastLike":
            inputs = inputs[:1]
        if kind == "shape" and self._has_value_for_shape(tensor):
            return [("value", tensor)]
        if node.op in ("Shape", "Size") or (node.op == "IsNaN" and not self.is_known(inputs[0])):
            return [("shape", inputs[0])]
        if kind == "value" and (self.is_known(tensor) and node.op != "TopK"):
            return [("value", item) for item in (inputs if not node.attrs.get("then_branch") else outer_inputs(node))]
        if kind == "value" and id(tensor) in self.seen_through:
            return [("value", self.seen_through[id(tensor)][0])]
        if kind == "value" and self._is_transparent(node, tensor):
            return [("value", item) for item in inputs]
        if kind == "value":
            return [("shape", tensor)]
        if node.op in _SAME_SHAPE:
            return [("shape", inputs[0])]
        if node.op in _BROADCASTS:
            return [("shape", item) for item in inputs]
        return [("value" if self._has_value_for_shape(item) else "shape", item) for item in inputs]

    def _has_value_for_shape(self, tensor: gs.Tensor) -> bool:
        """Whether a shape is found through the tensor's values: those of parameters are, those of weights (gigabytes) are not."""
        return self.is_known(tensor) and (tensor.dtype is None or tensor.dtype in _PARAMETER_TYPES)

    def _is_transparent(self, node: gs.Node, tensor: gs.Tensor) -> bool:
        """Whether a data tensor's elements are sums of its inputs' elements."""
        if id(tensor) in self.opaque:
            return False
        known = [is_empty(item) or self.is_known(item) for item in node.inputs]
        op = node.op
        if op == "Cast":
            return node.attrs["to"] in _ROUNDING_TYPES
        if op in ("CastLike", "Dropout", *_FAKE_QUANTISATION) or op in _MOVES_DATA:
            return op == "CastLike" or all(known[1:])
        if op == "MatMul":
            return self._moving_matrix(node) is not None
        if op in ("Neg", "Concat", "Sub", "Add", "Sum"):
            return op not in ("Add", "Sub", "Sum") or not self._adds_bias(node)
        if op in ("Mul", "Div"):
            return (known[1] or (known[0] and op == "Mul")) and not self._applies_weight(node)
        if op == "Where":
            return known[0]
        if op in ("ScatterND", "ScatterElements"):
            return known[1] and node.attrs.get("reduction", "none") in ("none", b"none")
        if op == "TensorScatter":
            return all(known[2:])
        return False

    def is_transparent(self, node: gs.Node) -> bool:
        """Whether a node only moves, scales or adds elements of the data that enters it."""
        return self._is_transparent(node, node.outputs[0])

    def _applies_weight(self, node: gs.Node) -> bool:
        """A constant vector of different sizes that multiplies the last axis is a weight, as a norm's; what multiplies data in a
        rotation depends on positions, or only changes signs."""
        for item in node.inputs:
            if isinstance(item, gs.Constant) and len(item.shape) and item.shape[-1] > 1:
                if int(np.prod(item.shape, dtype=np.int64)) != item.shape[-1]:
                    continue
                sizes = np.abs(np.asarray(widen(constant_value(item, self.base_dir)), np.float64)).reshape(-1)
                if not np.allclose(sizes, sizes[0], rtol=1e-6):
                    return True
        return False

    def _adds_bias(self, node: gs.Node) -> bool:
        """A constant vector added to data is a bias (part of a projection), unless it hides scores, or is a mask that hides none."""
        for item in node.inputs:
            if not is_empty(item) and self.is_known(item) and from_constants(item):
                try:
                    size = math.prod(self.shape(item))
                    if size > MAX_MATRIX:
                        return True
                    values = self.known(item).astype(np.float64)
                    if size > 1 and values.any() and not (values < -1e4).any():
                        return True
                except ProbeError:
                    continue
        return False

    @np.errstate(all="ignore")
    def _compute(self, kind: str, tensor: gs.Tensor) -> None:
        node = producer(tensor)
        try:
            if id(tensor) in self.overrides:
                self._store(tensor, self.overrides[id(tensor)])
            elif node is None:
                self._compute_source(kind, tensor)
            elif self.is_known(tensor) and (kind == "value" or self._has_value_for_shape(tensor)):
                self._compute_known(node, tensor)
            elif kind == "value" and id(tensor) in self.seen_through:
                source, weight = self.seen_through[id(tensor)]
                self._store(tensor, scale(self.linear(source), weight))
            elif kind == "value" and self._is_transparent(node, tensor):
                try:
                    moved = self._move(node)
                except TooManyTermsError:  # a residual stream: what it sums up is of no interest
                    moved = [self.atoms(output) for output in node.outputs]
                for output, value in zip(node.outputs, moved, strict=False):
                    self._store(output, value)
            elif kind == "value":
                self._values[id(tensor)] = self.atoms(tensor)
            else:
                self._infer_shapes(node)
        except ProbeError:
            raise
        except MlaTrtError:
            raise
        except Exception as error:
            label = f"node '{node.name or node.op}' ({node.op})" if node is not None else f"'{tensor.name}'"
            raise ProbeError(
                f"{label} cannot be evaluated: {str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__}",
                node,
            ) from error

    def _store(self, tensor: gs.Tensor, value: Value) -> None:
        self._values[id(tensor)] = value
        if not isinstance(value, list):
            self._shapes[id(tensor)] = tuple(value.shape)

    def _compute_source(self, kind: str, tensor: gs.Tensor) -> None:
        if isinstance(tensor, gs.Constant):
            self._shapes[id(tensor)] = tuple(int(size) for size in tensor.shape)
            if kind == "value":
                self._values[id(tensor)] = widen(constant_value(tensor, self.base_dir))
        elif kind == "value":
            self._values[id(tensor)] = self.atoms(tensor)
        else:
            raise ProbeError(f"'{tensor.name}' has no producer")

    def _compute_known(self, node: gs.Node, tensor: gs.Tensor) -> None:
        if node.op == "TopK" and not (self.is_known(node.inputs[0])):
            self._store(tensor, self._select(node, tensor))
            return
        if node.op == "Shape":
            shape = self._shapes[id(node.inputs[0])]
            self._store(tensor, np.array(shape[slice(node.attrs.get("start", 0), node.attrs.get("end"))], np.int64))
            return
        if node.op == "IsNaN" and not self.is_known(node.inputs[0]):
            # Guards against rows that attend to nothing, which the fused ops answer with 0: no other data is not a number.
            self._store(tensor, np.zeros(self._shapes[id(node.inputs[0])], np.bool_))
            return
        if node.op == "Size":
            self._store(tensor, np.array(math.prod(self._shapes[id(node.inputs[0])]), np.int64))
            return
        if node.op == "If":
            branch = node.attrs[
                "then_branch" if bool(np.asarray(self.known(node.inputs[0])).reshape(-1)[0]) else "else_branch"
            ]
            for output, value in zip(node.outputs, self._run_branch(branch), strict=True):
                self._store(output, value)
            return
        if node.op == "CastLike" or (
            node.op == "Cast" and node.attrs["to"] in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
        ):
            value = self.known(node.inputs[0])
            self._store(tensor, value if value.dtype.kind == "f" else value.astype(np.float32))
            return
        arguments = [None if is_empty(item) else self.known(item) for item in node.inputs]
        check_size(node, arguments, MAX_ELEMENTS, elementwise=node.op in _BROADCASTS)
        check_scatter(node, arguments)
        for output, value in zip(node.outputs, self._kernel(node)(*arguments), strict=False):
            self._store(output, widen(np.asarray(value)))

    def _run_branch(self, branch: gs.Graph) -> list[Value]:
        return [self.value(tensor) for tensor in branch.outputs]

    def _select(self, node: gs.Node, tensor: gs.Tensor) -> np.ndarray:
        """Random distinct indices in place of a TopK's: what a mask makes of them must not depend on which they are."""
        shape = list(self.shape(node.inputs[0]))
        axis = node.attrs.get("axis", -1) % len(shape)
        keys = shape[axis]
        asked = int(np.asarray(self.known(node.inputs[1])).reshape(-1)[0]) if len(node.inputs) > 1 else keys
        count = max(min(self.selection_size, asked, keys), min(1, keys))
        generator = np.random.default_rng(keys * 1009 + len(self.selections))
        moved = [size for index, size in enumerate(shape) if index != axis]
        visible_to_all = max(min(self.sizes.cached + 1, keys), 1)
        lists = np.empty((math.prod(moved), count), np.int64)
        if count:
            lists[:, 0] = generator.integers(visible_to_all, size=len(lists))  # no row may be left without a key
            others = _distinct(generator, len(lists), count - 1, keys - 1)
            lists[:, 1:] = others + (others >= lists[:, :1])
        lists = np.moveaxis(lists.reshape([*moved, count]), -1, axis).astype(np.int64)
        self.selections[id(tensor)] = lists
        self.selection_tensors[id(tensor)] = tensor
        return lists

    def _kernel(self, node: gs.Node) -> Callable[..., tuple[np.ndarray, ...]]:
        """ONNX's reference implementation of a node."""
        found = self._kernels.get(id(node))
        if found is None:
            if node.domain not in (None, "", "ai.onnx"):
                raise ProbeError(f"node '{node.name}' is of the unknown op {node.domain}::{node.op}", node)
            proto = to_proto(node)
            kernel = load_op("", node.op, OPSET)(
                proto, {"log": lambda *_: None, "opsets": {"": OPSET}, "verbose": 0, "new_ops": None}
            )
            found = kernel.run
            self._kernels[id(node)] = found
        return found

    # -- data ----------------------------------------------------------------------------------------------------

    def _move(self, node: gs.Node) -> list[Value]:
        op = node.op
        if op in ("Cast", "CastLike", "Dropout", "Identity", *_FAKE_QUANTISATION):
            return [self.linear(node.inputs[0])]
        if op == "MatMul":
            return [self._move_by_matrix(node)]
        values = [None if is_empty(item) else self.value(item) for item in node.inputs]
        sizes = [np.broadcast_to(0, value.shape) if isinstance(value, Linear) else value for value in values]
        check_size(node, sizes, MAX_DATA, elementwise=op in _BROADCASTS)
        check_scatter(node, sizes)
        if op in ("Neg", "Add", "Sub", "Sum", "Mul", "Div"):
            return [self._arithmetic(op, [value for value in values if value is not None])]
        moving = self._moving_inputs(node, len(values))
        linears = {
            index: as_linear(value) for index, value in enumerate(values) if index in moving and value is not None
        }
        if op == "Pad" and len(values) > 2 and values[2] is not None:
            if not isinstance(values[2], np.ndarray) or (values[2] != 0).any():
                raise ProbeError(f"node '{node.name}' pads data with a value", node)
            values[2] = None
        count = max(len(linear.terms) for linear in linears.values())
        kernel = self._kernel(node)
        outputs: list[list[Term]] = [[] for _ in node.outputs]
        for term in range(count):
            codes_in: list[np.ndarray | None] = []
            coefficients_in: list[np.ndarray | None] = []
            for index, value in enumerate(values):
                if index in linears:
                    linear = linears[index]
                    if term < len(linear.terms):
                        codes_in.append(linear.terms[term].codes)
                        coefficients_in.append(linear.terms[term].coefficients)
                    else:
                        codes_in.append(np.zeros(linear.shape, np.int64))
                        coefficients_in.append(np.zeros(linear.shape))
                else:
                    codes_in.append(value)  # type: ignore[arg-type]
                    coefficients_in.append(value)  # type: ignore[arg-type]
            for output, codes, coefficients in zip(outputs, kernel(*codes_in), kernel(*coefficients_in), strict=False):
                output.append(Term(np.asarray(codes), np.asarray(coefficients)))
        return [Linear(tuple(terms[0].codes.shape), tuple(terms)) for terms in outputs if terms]

    def _moving_matrix(self, node: gs.Node) -> tuple[np.ndarray, bool] | None:
        """A known operand of a MatMul that only moves and scales data, each result being made of two entries at most, and whether it is the
        right one: a permutation, a rotate_half, a rotation, one-hot rows."""
        if id(node) in self._matrices:
            return self._matrices[id(node)]
        found = None
        for operand, other in (node.inputs, node.inputs[::-1]):
            if not self.is_known(operand) or self.is_known(other):
                continue
            right = operand is node.inputs[1]
            try:
                shape = self.shape(operand)
                if len(shape) < 2 or math.prod(shape) > MAX_MATRIX or math.prod(shape[-2:]) < 2:
                    continue
                selects = not from_constants(operand)
                if min(shape[-2:]) > 1 or selects:
                    matrix = np.asarray(self.known(operand), np.float64)
                    used = np.count_nonzero(matrix, axis=-2 if right else -1)
                    one_hot = selects and used.max(initial=0) <= 1 and np.isin(matrix, (0, 1)).all()
                    moves = one_hot or (min(shape[-2:]) > 1 and used.min(initial=1) > 0 and used.max(initial=0) <= 2)
                    found = (matrix, right) if moves else None
            except ProbeError:
                found = None
        self._matrices[id(node)] = found
        return found

    def _move_by_matrix(self, node: gs.Node) -> Linear:
        moving = self._moving_matrix(node)
        assert moving is not None
        matrix, right = moving
        data = self.linear(node.inputs[0 if right else 1])
        if len(data.shape) < 2:
            raise ProbeError(f"node '{node.name}' (MatMul) multiplies a vector", node)
        weights = matrix if right else matrix.swapaxes(-1, -2)  # [..., summed, results]
        order = np.argsort(weights == 0, axis=-2, kind="stable")[..., :2, :]
        batch = np.broadcast_shapes(data.shape[:-2], weights.shape[:-2])
        parts = []
        for place in range(order.shape[-2]):
            index = order[..., place : place + 1, :]
            factor = np.take_along_axis(weights, index, axis=-2)
            terms = []
            for term in data.terms:
                codes, coefficients = (
                    np.take_along_axis(
                        np.broadcast_to(array, (*batch, *array.shape[-2:])),
                        np.broadcast_to(index, (*batch, array.shape[-2], index.shape[-1])),
                        axis=-1,
                    )
                    for array in (side if right else side.swapaxes(-1, -2) for side in (term.codes, term.coefficients))
                )
                terms.append(Term(codes, coefficients))
            parts.append(scale(Linear(terms[0].codes.shape, tuple(terms)), factor))
        total = add(parts)
        if right:
            return total
        terms = [Term(term.codes.swapaxes(-1, -2), term.coefficients.swapaxes(-1, -2)) for term in total.terms]
        return Linear(terms[0].codes.shape, tuple(terms))

    @staticmethod
    def _moving_inputs(node: gs.Node, count: int) -> set[int]:
        if node.op == "Concat":
            return set(range(count))
        if node.op in ("ScatterND", "ScatterElements"):
            return {0, 2}
        if node.op == "TensorScatter":
            return {0, 1}
        if node.op == "Where":
            return {1, 2}
        return {0}

    def _arithmetic(self, op: str, values: Sequence[Value]) -> Linear:
        if op == "Neg":
            return scale(as_linear(values[0]), np.array(-1.0))
        if op in ("Mul", "Div"):
            data = values[0] if isinstance(values[0], Linear) else values[1]
            other = values[1] if data is values[0] else values[0]
            if not isinstance(other, np.ndarray):
                raise ProbeError("a product of two data tensors")
            factor = np.asarray(other, np.float64)
            return scale(as_linear(data), 1.0 / factor if op == "Div" else factor)
        linears = [as_linear(value) for value in values]
        if op == "Sub":
            linears[1] = scale(linears[1], np.array(-1.0))
        return add(linears)

    def _infer_shapes(self, node: gs.Node) -> None:
        """Shapes of a data node's outputs, by quick rules where they are enough, else by ONNX's shape inference."""
        if node.op in _SAME_SHAPE:
            for output in node.outputs:
                self._shapes[id(output)] = self._shapes[id(node.inputs[0])]
            return
        shapes = [() if is_empty(item) else self._shapes[id(item)] for item in node.inputs]
        if node.op in _BROADCASTS:
            self._shapes[id(node.outputs[0])] = tuple(np.broadcast_shapes(*shapes))
            return
        if node.op == "MatMul" and len(shapes[0]) >= 2 and len(shapes[1]) >= 2:
            if shapes[0][-1] != shapes[1][-2]:
                raise ProbeError(
                    f"node '{node.name}' (MatMul) multiplies {list(shapes[0])} with {list(shapes[1])}", node
                )
            batch = np.broadcast_shapes(shapes[0][:-2], shapes[1][:-2])
            self._shapes[id(node.outputs[0])] = (*batch, shapes[0][-2], shapes[1][-1])
            return
        if node.op == "Einsum":
            self._shapes[id(node.outputs[0])] = einsum_shape(node.attrs["equation"], shapes)
            return
        if node.domain not in (None, "", "ai.onnx"):
            # Nothing is known of the op. Fused MLPs and norms keep the shape of what they are given; if this one does
            # not, what is read behind it contradicts itself.
            for output in node.outputs:
                self._shapes[id(output)] = shapes[0]
            return
        types, data = {}, {}
        for item, shape in zip(node.inputs, shapes, strict=True):
            if is_empty(item):
                continue
            value = self._values.get(id(item))
            element = _element_type(item, value)
            types[item.name] = helper.make_tensor_type_proto(element, list(shape))
            if isinstance(value, np.ndarray) and value.dtype in (np.int64, np.int32) and value.size < 1024:
                data[item.name] = numpy_helper.from_array(value, item.name)
        schema = onnx.defs.get_schema(node.op, OPSET, node.domain or "")
        inferred = onnx.shape_inference.infer_node_outputs(
            schema, to_proto(node), types, data, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=11
        )
        for output in node.outputs:
            if output.name in inferred:
                dims = inferred[output.name].tensor_type.shape.dim
                if any(not dim.HasField("dim_value") for dim in dims) or not inferred[output.name].tensor_type.HasField(
                    "shape"
                ):
                    raise ProbeError(
                        f"the shape of '{output.name}' depends on data (node '{node.name}', {node.op})", node
                    )
                self._shapes[id(output)] = tuple(dim.dim_value for dim in dims)

    def forget(self, tensors: Sequence[gs.Tensor]) -> None:
        """Drops the values of tensors that are no longer needed; their shapes stay."""
        for tensor in tensors:
            self._values.pop(id(tensor), None)

    def forget_values(self) -> None:
        """Drops the values of all tensors but the graph's inputs, and what was read off them; shapes stay."""
        inputs = {id(tensor) for tensor in self.graph.inputs}
        self._values = {key: value for key, value in self._values.items() if key in inputs}
        self.selections.clear()
        self.selection_tensors.clear()
        self.forget_data()

    def forget_data(self) -> None:
        """Drops all atoms, which one layer needs and the next does not; what was read off them before has no meaning any more."""
        self._values = {key: value for key, value in self._values.items() if isinstance(value, np.ndarray)}
        self._start_atoms()


def _distinct(generator: np.random.Generator, rows: int, count: int, limit: int) -> np.ndarray:
    """Random numbers below `limit`, int64 [rows, count], no two of a row equal (Floyd's algorithm)."""
    chosen = np.full((rows, count), -1, np.int64)
    for column in range(count):
        last = limit - count + column
        number = generator.integers(last + 1, size=rows)
        taken = (chosen == number[:, None]).any(axis=1)
        chosen[:, column] = np.where(taken, last, number)
    return chosen


def widen(array: np.ndarray) -> np.ndarray:
    """Half precision as float32: what is read off a half-precision export is what it would compute without the rounding."""
    return array.astype(np.float32) if array.dtype in (np.float16, ml_dtypes.bfloat16) else array


def _element_type(tensor: gs.Tensor, value: Value | None) -> int:
    if isinstance(value, np.ndarray):
        return helper.np_dtype_to_tensor_dtype(value.dtype)
    if tensor.dtype is None:
        return TensorProto.FLOAT
    return tensor.dtype if isinstance(tensor.dtype, int) else helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))


def _is_doubled(model_input: roles.ModelInput, interface: ModelInterface) -> bool:
    return isinstance(model_input.axes[-1], int) and model_input.axes[-1] % 2 == 0 and model_input.axes[-1] >= 2


def as_linear(value: Value) -> Linear:
    """A value as sums of atoms: a known array is a multiple of the number one."""
    if isinstance(value, Linear):
        return value
    array = np.asarray(value).astype(np.float64)
    codes = np.where(array == 0, ZERO, ONE).astype(np.int64)
    return Linear(tuple(array.shape), (Term(codes, array),))


def scale(linear: Linear, factor: np.ndarray) -> Linear:
    """Multiplies by a known array, broadcasting."""
    shape = tuple(np.broadcast_shapes(linear.shape, factor.shape))
    gone = factor == 0
    terms = tuple(
        Term(
            np.where(gone, ZERO, term.codes) if gone.any() else np.broadcast_to(term.codes, shape),
            np.where(term.codes == ZERO, 0.0, np.multiply(term.coefficients, factor)),
        )
        for term in linear.terms
    )
    return Linear(shape, terms)


def add(linears: Sequence[Linear]) -> Linear:
    """The sum, broadcasting; equal atoms are merged.

    Raises:
        TooManyTermsError: more than `MAX_TERMS` different atoms in one element.
    """
    shape = tuple(np.broadcast_shapes(*(linear.shape for linear in linears)))
    terms: list[Term] = []
    for linear in linears:
        for term in linear.terms:
            codes = np.broadcast_to(term.codes, shape)
            coefficients = np.broadcast_to(term.coefficients, shape)
            if not (codes != ZERO).any():
                continue
            for index, present in enumerate(terms):
                same = (codes == present.codes) | (codes == ZERO) | (present.codes == ZERO)
                if same.all():
                    terms[index] = Term(
                        np.where(present.codes == ZERO, codes, present.codes), present.coefficients + coefficients
                    )
                    break
            else:
                terms.append(Term(codes, coefficients))
    if len(terms) > MAX_TERMS:
        raise TooManyTermsError(f"a sum of more than {MAX_TERMS} terms")
    if not terms:
        terms = [Term(np.zeros(shape, np.int64), np.zeros(shape))]
    return Linear(shape, tuple(terms))
