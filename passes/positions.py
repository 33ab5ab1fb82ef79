"""Moves what depends on positions over to packed tokens.

In an export, positions come from an input, from a range over the new tokens, or from the rows of a table; and they are laid out by
sequence and token. In the lowered model a token's position is one entry of a vector [T]. A tensor that depends on positions (a cosine)
is therefore rebuilt: its own computation is followed back to the first tensor whose values are the positions, or to a table whose
rows they choose, and repeated from there for the packed tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt import interface as roles
from mla_trt.passes.graph import Emitter, from_constants, is_empty, outer_inputs, producer
from mla_trt.passes.probe import Probe, ProbeError

_TABLE_MOVES = ("Slice", "Gather", "GatherND", "GatherElements", "Split", "Squeeze", "Unsqueeze", "Reshape", "Expand")

ELEMENTWISE_OPS = (
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Where",
    "And",
    "Or",
    "Equal",
    "Less",
    "LessOrEqual",
    "Greater",
    "GreaterOrEqual",
    "Max",
    "Min",
    "Sum",
)


# How a lowered graph lays its tokens out: all in one sequence's place [1, T]; one for each sequence's place [T, 1], where the export takes one
# token of each; or as the export does [B, S], where recurrent layers keep sequences apart.
PACKED, BY_SEQUENCE, UNPACKED = "packed", "by_sequence", "unpacked"


_SIZES = (("sequences", "B"), ("new", "S"))


class CannotRebuild(Exception):
    """A tensor depends on something besides positions and constants."""


class PackedPositions:
    """Rebuilds tensors for packed tokens.

    Attributes:
        max_position: number of rows of the shortest table in use, None where positions are unlimited.
    """

    def __init__(
        self, emitter: Emitter, probes: list[Probe], positions: gs.Tensor, tokens: gs.Tensor, *, layout: str
    ) -> None:
        self._emitter = emitter
        self._probes = probes
        self._positions = positions
        self._tokens = tokens
        self._layout = layout
        self._built: dict[int, gs.Tensor] = {}
        self._placed: dict[int, bool] = {}  # of rebuilt tensors
        self._already_packed: set[int] = (
            set()
        )  # ids of tensors that come from inputs which stay, laid out by packed token
        self._cast: dict[tuple[object, tuple[roles.Axis, ...]], gs.Tensor] = {}
        self.max_position: int | None = None

    def rebuild(self, tensor: gs.Tensor) -> gs.Tensor:
        """The same values for the packed tokens: token axes become [1, T] (or [T, 1] where the export takes one token a sequence).

        Raises:
            CannotRebuild: the values depend on more than positions.
        """
        found = self._built.get(id(tensor))
        if found is None:
            found = self._build(tensor)
            self._built[id(tensor)] = found
        return found

    def varies(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor's values differ from token to token or from case to case, so that they can not be used on packed tokens as they are.

        Where sequences stay apart, so do the tokens' places, and nothing has to change.
        """
        if self._layout == UNPACKED:
            return False
        try:
            values = [self._value(probe, tensor) for probe in self._probes]
        except CannotRebuild:
            return False
        first = values[0].reshape(-1)[:1]
        if all((value == first).all() for value in values):
            return False
        return any(not np.array_equal(value, values[0]) for value in values)

    def _build(self, tensor: gs.Tensor) -> gs.Tensor:
        values = [self._value(probe, tensor) for probe in self._probes]
        # A constant is a list of positions only where the export fixed how many tokens come.
        may_be_positions = not isinstance(tensor, gs.Constant) or (
            "S" in self._probes[0].interface.fixed and values[0].size > 1
        )
        if may_be_positions and (axes := self._position_axes(values)) is not None and self._follows_positions(tensor):
            return self._insert_positions(tensor, values[0], axes)
        node = producer(tensor)
        if isinstance(tensor, gs.Constant):
            return self._as_table(tensor, tensor, values) or tensor
        if node is None:
            return self._input(tensor)
        constant = _moved_constant(tensor)
        if constant is not None and (table := self._as_table(tensor, constant, values)) is not None:
            return table
        if node.op in ("Shape", "Size"):
            return self._shape_of(node, values)
        if node.op == "TopK" or node.attrs.get("then_branch") is not None:
            raise CannotRebuild(f"'{tensor.name}' depends on {node.op}")
        inputs = [item if is_empty(item) else self.rebuild(item) for item in node.inputs]
        if all(new is old for new, old in zip(inputs, node.inputs, strict=True)):
            if any(id(item) in self._already_packed for item in inputs):
                self._already_packed.update(id(output) for output in node.outputs)
            else:
                self._check_constant(tensor, values)
            return tensor
        if not node.domain and (node.op in ELEMENTWISE_OPS or node.op == "MatMul"):
            inputs = [
                self._once(node, old, new, values[0].ndim) or new for new, old in zip(inputs, node.inputs, strict=True)
            ]
        outputs = [
            gs.Variable(self._emitter.names.new(f"{output.name}.packed"), dtype=output.dtype) for output in node.outputs
        ]
        name = self._emitter.names.new(f"{node.name or node.op}.packed")
        self._emitter.graph.nodes.append(
            gs.Node(node.op, name, copy.copy(node.attrs), inputs, outputs, domain=node.domain)
        )
        for old, new in zip(node.outputs, outputs, strict=True):
            self._built[id(old)] = new
        return self._built[id(tensor)]

    def is_placed(self, rebuilt: gs.Tensor) -> bool:
        """Whether it is laid out by packed token: made of positions, or of an input that is."""
        if rebuilt is self._positions or id(rebuilt) in self._already_packed:
            return True
        if id(rebuilt) not in self._placed:
            node = producer(rebuilt)
            self._placed[id(rebuilt)] = node is not None and any(
                self.is_placed(item) for item in node.inputs if not is_empty(item)
            )
        return self._placed[id(rebuilt)]

    def _once(self, node: gs.Node, tensor: gs.Tensor, rebuilt: gs.Tensor, rank: int) -> gs.Constant | None:
        """Of an operand that has a row for each of a fixed number of sequences or tokens, all alike whatever the positions, one: packed tokens are of
        any number. `rank`: that of the result."""
        first = self._probes[0]
        if self._layout == UNPACKED or is_empty(tensor) or self.is_placed(rebuilt):
            return None
        values = [self._value(probe, tensor) for probe in self._probes]
        value = values[0]
        if any(not np.array_equal(other, value) for other in values):
            return None
        axes = self._token_axes(node, value) if "S" in first.interface.fixed else set()
        if (
            first.batch > 1
            and "B" in first.interface.fixed
            and 0 < rank == value.ndim
            and value.shape[0] == first.batch
        ):
            axes.add(-rank)
        alike = [axis for axis in axes if (value == value.take([0], axis)).all()]
        for axis in alike:
            value = value.take([0], axis)
        return self._emitter.constant(f"{tensor.name}.row", value) if alike else None

    def _token_axes(self, node: gs.Node, value: np.ndarray) -> set[int]:
        """Axes of an operand, from the last on, that other operands have for tokens: they differ along them."""
        new, axes = self._probes[0].sizes.new, set()
        for other in node.inputs:
            if new == 1 or is_empty(other) or not self.is_placed(self._built.get(id(other), other)):
                continue
            placed = self._value(self._probes[0], other)
            for axis in range(-min(placed.ndim, value.ndim), 0):
                if placed.shape[axis] == value.shape[axis] == new and (placed != placed.take([0], axis)).any():
                    axes.add(axis)
        return axes

    @staticmethod
    def _value(probe: Probe, tensor: gs.Tensor) -> np.ndarray:
        if not probe.is_known(tensor):
            raise CannotRebuild(f"'{tensor.name}' depends on data")
        try:
            return np.asarray(probe.known(tensor))
        except ProbeError as error:
            raise CannotRebuild(str(error)) from None

    def _follows_positions(self, tensor: gs.Tensor) -> bool:
        """Whether values that are the positions on every probe are so by more than chance. Where the export fixed all sizes positions are the same
        on every probe, and a size may be what they are; who has an input of positions takes them from there."""
        first = self._probes[0]
        given = {entry.name for entry in first.interface.inputs if entry.role == roles.POSITIONS}
        if not given or any(not np.array_equal(probe.positions, first.positions) for probe in self._probes):
            return True
        seen: set[int] = set()
        stack = [tensor]
        while stack:
            item = stack.pop()
            if item.name in given:
                return True
            node = producer(item)
            if node is not None and id(node) not in seen and node.op not in ("Shape", "Size"):
                seen.add(id(node))
                stack.extend(outer_inputs(node))
        return False

    def _position_axes(self, values: list[np.ndarray]) -> tuple[int, int] | None:
        """The axes (sequence or -1, token) of values that are the positions on every probe, else None."""
        found: set[tuple[int, int]] = set()
        for probe, value in zip(self._probes, values, strict=True):
            if value.dtype.kind not in "iuf" or value.ndim == 0:
                return None
            new, batch = probe.sizes.new, probe.batch
            axes = None
            for token_axis in range(value.ndim):
                others = [axis for axis in range(value.ndim) if axis != token_axis and value.shape[axis] != 1]
                if value.shape[token_axis] != new or len(others) > 1 or (others and value.shape[others[0]] != batch):
                    continue
                view = [1] * value.ndim
                view[token_axis] = new
                if np.array_equal(value, np.broadcast_to(probe.positions.reshape(view), value.shape)):
                    axes = (others[0] if others else -1), token_axis
                    break
            if axes is None:
                return None
            found.add(axes)
        return found.pop() if len(found) == 1 else None

    def _insert_positions(self, tensor: gs.Tensor, value: np.ndarray, axes: tuple[int, int]) -> gs.Tensor:
        sequence_axis, token_axis = axes
        shape: list[roles.Axis] = [1] * value.ndim
        shape[token_axis] = "S"
        if sequence_axis >= 0:
            shape[sequence_axis] = "B"
        key = (value.dtype, tuple(shape))
        if key not in self._cast:
            positions = (
                self._emitter.cast(self._positions, value.dtype, "packed_positions")
                if value.dtype != np.int32
                else self._positions
            )
            self._cast[key] = self._spread(positions, shape, "packed_positions_in_place")
        return self._cast[key]

    def _spread(self, tensor: gs.Tensor, shape: list[roles.Axis], wish: str) -> gs.Tensor:
        """A tensor [T, ...] in a shape of sizes, of sequences "B" (perhaps missing) and of their tokens "S"."""
        one_sequence = self._probes[0].interface.fixed.get("B") == 1 and "B" not in shape
        if self._layout == UNPACKED and not one_sequence:
            token_axis = shape.index("S")
            if "B" not in shape and (token_axis == 0 or shape[0] != 1):
                raise CannotRebuild("all sequences share their positions, which they cannot where sequences stay apart")
            axes = ["B" if index == 0 and "B" not in shape else size for index, size in enumerate(shape)]
            sizes = packed_sizes(self._emitter, self._tokens, self._probes[0].interface, axes, f"{wish}.shape")
            return self._emitter.node("Reshape", [tensor, sizes], wish, allowzero=0)
        varying = "B" if self._layout == BY_SEQUENCE and "B" in shape else "S"
        target = [size if isinstance(size, int) else -1 if size == varying else 1 for size in shape]
        return self._emitter.reshape(tensor, target, wish)

    def _as_table(self, tensor: gs.Tensor, table: gs.Tensor, values: list[np.ndarray]) -> gs.Tensor | None:
        """A Gather, where the values are rows of a constant chosen by position (the same for every sequence)."""
        rows = np.asarray(self._probes[0].known(table))
        for axis in range(rows.ndim):
            if rows.shape[axis] < 2 or (
                tensor is table and (not self._varies(rows, axis) or math.prod(rows.shape) == rows.shape[axis])
            ):
                continue
            layouts = {
                self._row_layout(probe, value, rows, axis) for probe, value in zip(self._probes, values, strict=True)
            }
            if len(layouts) != 1 or None in layouts:
                continue
            token_axis, sequence_axis = layouts.pop()  # type: ignore[misc]
            length = int(rows.shape[axis])
            self.max_position = min(self.max_position or length, length)
            flat = self._emitter.cast(self._positions, np.dtype(np.int64), "packed_positions")
            gathered = self._emitter.gather(table, flat, axis, f"{tensor.name}.packed")
            shape: list[roles.Axis] = list(values[0].shape)
            shape[token_axis] = "S"
            if sequence_axis >= 0:
                shape[sequence_axis] = "B"
            return self._spread(gathered, shape, f"{tensor.name}.packed")
        return None

    @staticmethod
    def _row_layout(probe: Probe, value: np.ndarray, rows: np.ndarray, axis: int) -> tuple[int, int] | None:
        """The axes (token, sequence or -1) of values that are `rows` taken at the positions along `axis`; None where they are not."""
        if probe.positions.max() >= rows.shape[axis]:
            return None
        chosen = np.take(rows, probe.positions, axis=axis)
        for sequence_axis in (
            -1,
            *(index for index, size in enumerate(value.shape) if size == probe.batch and size > 1),
        ):
            one = value if sequence_axis < 0 else np.take(value, [0], axis=sequence_axis)
            if one.size != chosen.size or [size for size in one.shape if size != 1] != [
                size for size in chosen.shape if size != 1
            ]:
                continue
            if not np.array_equal(one.reshape(chosen.shape), chosen) or not (value == one).all():
                continue
            if probe.sizes.new > 1:
                before = sum(size != 1 for size in chosen.shape[:axis])
                token_axis = [index for index, size in enumerate(one.shape) if size != 1][before]
            else:
                token_axis = (
                    axis
                    if one.ndim == rows.ndim
                    else next(
                        (index for index, size in enumerate(one.shape) if size == 1 and index != sequence_axis), 0
                    )
                )
            return token_axis, sequence_axis
        return None

    @staticmethod
    def _varies(rows: np.ndarray, axis: int) -> bool:
        return bool((rows != np.take(rows, [0], axis=axis)).any())

    def _input(self, tensor: gs.Tensor) -> gs.Tensor:
        model_input = next((entry for entry in self._probes[0].interface.inputs if entry.name == tensor.name), None)
        if model_input is not None and model_input.role in (roles.ROPE_COS, roles.ROPE_SIN):
            packed: dict[str, dict[str, int | str]] = {
                PACKED: {"B": 1, "S": "T"},
                BY_SEQUENCE: {"B": "T", "S": 1},
                UNPACKED: {},
            }
            letters = packed[self._layout]
            tensor.shape = [letters.get(axis, axis) if isinstance(axis, str) else axis for axis in model_input.axes]
            self._already_packed.add(id(tensor))
            return tensor
        raise CannotRebuild(f"it depends on the input '{tensor.name}'")

    def _shape_of(self, node: gs.Node, values: list[np.ndarray]) -> gs.Tensor:
        source = node.inputs[0]
        if source is self._tokens:
            self._already_packed.add(id(node.outputs[0]))
            return node.outputs[0]
        if all(np.array_equal(value, values[0]) for value in values):
            return self._emitter.constant(f"{node.outputs[0].name}.packed", values[0])
        if self._probes[0].is_known(source):
            rebuilt = self.rebuild(source)
            return self._emitter.node(
                "Shape", [rebuilt], f"{node.outputs[0].name}.packed", dtype=np.dtype(np.int64), **node.attrs
            )
        model_input = next((entry for entry in self._probes[0].interface.inputs if entry.name == source.name), None)
        axes = (
            model_input.axes[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
            if model_input is not None
            else self._size_letters(values)
        )
        if node.op == "Shape" and all(
            isinstance(axis, int) or axis in self._probes[0].interface.tokens.axes for axis in axes
        ):
            return packed_sizes(
                self._emitter, self._tokens, self._probes[0].interface, axes, f"{node.outputs[0].name}.packed"
            )
        raise CannotRebuild(f"it depends on the shape {list(self._probes[0].shape(source))} of '{source.name}'")

    def _size_letters(self, values: list[np.ndarray]) -> tuple[roles.Axis, ...]:
        """The axes of a data tensor whose sizes on the probes are given."""
        letters = {tuple(getattr(probe.sizes, size) for probe in self._probes): axis for size, axis in _SIZES}
        axes = (tuple(int(value) for value in sizes) for sizes in zip(*values, strict=True))
        return tuple(sizes[0] if len(set(sizes)) == 1 else letters.get(sizes, "?") for sizes in axes)

    def _check_constant(self, tensor: gs.Tensor, values: list[np.ndarray]) -> None:
        if any(value.shape != values[0].shape or not np.array_equal(value, values[0]) for value in values):
            raise CannotRebuild(f"'{tensor.name}' changes with the case")


def packed_sizes(
    emitter: Emitter, tokens: gs.Tensor, interface: roles.ModelInterface, axes: Sequence[roles.Axis], wish: str
) -> gs.Tensor:
    """Sizes, int64 [len(axes)], of axes that the packed tokens have; fixed ones are constants."""
    letters = list(interface.tokens.axes)
    pieces: list[gs.Tensor] = []
    for axis in axes:
        if isinstance(axis, int):
            pieces.append(emitter.constant(f"{wish}.size", [axis], np.int64))
        else:
            at = letters.index(axis)
            pieces.append(
                emitter.node("Shape", [tokens], f"packed_{axis}", dtype=np.dtype(np.int64), start=at, end=at + 1)
            )
    return pieces[0] if len(pieces) == 1 else emitter.node("Concat", pieces, wish, axis=0)


def _moved_constant(tensor: gs.Tensor) -> gs.Tensor | None:
    """The constant, or what is computed from constants alone (codes that are dequantised), whose entries a tensor rearranges, if it does."""
    source, node = tensor, producer(tensor)
    while node is not None and node.op in _TABLE_MOVES:
        source = node.inputs[0]
        node = producer(source)
    return source if source is not tensor and from_constants(source) else None
