"""Recognises caches that have all their rows from the beginning, as Transformers' StaticCache makes them: each step writes the rows of its tokens
into them at the tokens' positions, and a mask hides the others.

How an export writes (ScatterND, ScatterElements, TensorScatter, Where, products with one-hot rows) does not matter. Its outputs are evaluated: one
that holds an input's own entries in all rows but some is that input's next value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt import interface as roles
from mla_trt.errors import MlaTrtError
from mla_trt.interface import Axis, ModelInput, ModelInterface
from mla_trt.passes.attention_core import NoMatch
from mla_trt.passes.free_rows import FEW_ROWS, free_rows
from mla_trt.passes.identify_inputs import (
    data_dependent,
    describe,
    is_only_compared,
    make_interface,
    side_role,
    static_size,
)
from mla_trt.passes.probe import ZERO, Linear, Probe, ProbeError, Sizes

_MAY_BE_CACHES = (roles.STATE, roles.SCORE_MASK, roles.ROPE_COS, roles.ROPE_SIN)
_MASKS = (roles.ATTENTION_MASK, roles.SCORE_MASK)
# Sizes of the step that is evaluated, where the export leaves them free. So short a context is within any cache.
_SEQUENCES, _NEW, _CACHED, _ROWS = 2, 3, 1, 7


@dataclass(frozen=True)
class _Written:
    """A cache's next value, and the axis along which some of its rows are other ones."""

    output: str
    axis: int
    rows: int


def find_full_caches(graph: gs.Graph, interface: ModelInterface, base_dir: Path | None) -> ModelInterface:
    """The interface with such caches among its roles.

    Args:
        interface: what `identify_inputs` found. It takes these caches for states that keep their size, or for inputs without a next value.
        base_dir: folder of the model's external data.
    """
    caches = [
        tensor
        for tensor, entry in zip(graph.inputs, interface.inputs, strict=True)
        if entry.role in _MAY_BE_CACHES and any(_may_follow(tensor, output) for output in graph.outputs)
    ]
    if not caches or interface.by_role(roles.CACHE):
        return interface
    search = _Search(graph, interface, caches, base_dir)
    for many in (*search.large_sizes(), None):
        probe, found = search.run("T", many, _ROWS)
        if found and len(found) < len(caches):
            # A mask of another length than was thought keeps what is behind the first attention from being evaluated.
            rows = _ROWS if many is not None else max(written.rows for written in found.values())
            probe, found = max((probe, found), search.run("L", many, rows), key=lambda attempt: len(attempt[1]))
        if len(found) == len(caches):
            break
    # Layers of sliding windows have shorter caches, which do not hold all tokens.
    longest = max((written.rows for written in found.values()), default=0)
    found = {name: written for name, written in found.items() if written.rows == longest}
    return search.describe(probe, found) if found else interface


def with_lengths(graph: gs.Graph, interface: ModelInterface) -> ModelInterface | None:
    """The interface with what may be numbers of tokens, instead of first positions, as such; None where there is nothing of the kind."""
    caches = (roles.TOKENS, roles.SECOND_TOKENS, roles.CACHE, roles.STATE)
    sources = [tensor for tensor, entry in zip(graph.inputs, interface.inputs, strict=True) if entry.role in caches]
    data = data_dependent(graph, sources)
    inputs = tuple(
        replace(entry, role=roles.LENGTHS)
        if entry.role == roles.POSITIONS and "S" not in entry.axes and is_only_compared(tensor, data)
        else entry
        for tensor, entry in zip(graph.inputs, interface.inputs, strict=True)
    )
    return replace(interface, inputs=inputs) if interface.has_full_caches and inputs != interface.inputs else None


class _Search:
    """One step of an export in which everything that may be a cache is taken for one."""

    def __init__(
        self, graph: gs.Graph, interface: ModelInterface, caches: list[gs.Tensor], base_dir: Path | None
    ) -> None:
        self.graph = graph
        self.interface = interface
        self.caches = caches
        self.base_dir = base_dir
        self.tokens = next(tensor for tensor in graph.inputs if tensor.name == interface.tokens.name)
        ids = (roles.TOKENS, roles.SECOND_TOKENS)
        self.ids = [tensor for tensor, entry in zip(graph.inputs, interface.inputs, strict=True) if entry.role in ids]

    def large_sizes(self) -> list[int]:
        """Sizes that may be the number of rows of all caches, and are so large that fewer are read faster."""
        common = set.intersection(*({static_size(size) or 0 for size in tensor.shape} for tensor in self.caches))
        return sorted((size for size in common if size > FEW_ROWS), reverse=True)

    def run(self, mask_length: str, many: int | None, rows: int) -> tuple[Probe, dict[str, _Written]]:
        """Evaluates the step.

        Args:
            mask_length: "T" or "L", the axis of masks where it is neither fixed nor that of a cache.
            many: a size to be taken for a number of rows, of which there are to be fewer.
            rows: the number of rows where it is free.

        Returns:
            the case, and the next value of each cache that has one, by name.
        """
        data = data_dependent(self.graph, [*self.ids, *self.caches])
        lengths: set[int | str] = {size for tensor in self.caches for size in tensor.shape if isinstance(size, str)}
        lengths |= {many} if many is not None else set()
        entries = []
        for tensor, entry in zip(self.graph.inputs, self.interface.inputs, strict=True):
            if any(tensor is cache for cache in self.caches):
                entries.append(replace(entry, role=roles.CACHE, axes=self._cache_axes(tensor, many)))
            elif any(tensor is ids for ids in self.ids):
                entries.append(entry)
            else:
                described = describe(tensor, side_role(tensor, data), None, None, self.tokens)
                entries.append(_with_mask_length(described, tensor, lengths, mask_length))
        fixed = {letter: size for letter, size in self.interface.fixed.items() if letter in "BS"}
        new = fixed.get("S", _NEW)
        rows = max(rows, new + 2 * _CACHED)
        sizes = Sizes(fixed.get("B", _SEQUENCES), new, _CACHED, rows)
        overrides = free_rows(self.graph, many, rows, self.base_dir) if many is not None else {}
        probe = Probe(self.graph, ModelInterface(tuple(entries), (), fixed), data, sizes, self.base_dir, overrides)
        found: dict[str, _Written] = {}
        for output in self.graph.outputs:
            source = self._source(probe, output)
            if source is not None and source[0] not in found:
                found[source[0]] = source[1]
            probe.forget_data()
        return probe, found

    def _cache_axes(self, tensor: gs.Tensor, many: int | None) -> tuple[Axis, ...]:
        sizes = [static_size(dim) for dim in tensor.shape]
        axes: list[Axis] = ["L" if size is None else size for size in sizes]
        batched = "B" in self.interface.tokens.axes and "B" not in self.interface.fixed
        if batched and "L" in axes:
            sequences = self.tokens.shape[0]
            axes[tensor.shape.index(sequences) if sequences in tensor.shape else axes.index("L")] = "B"
        if many is not None and many in sizes:
            axes[sizes.index(many)] = "L"
        return tuple(axes)

    def _source(self, probe: Probe, output: gs.Tensor) -> tuple[str, _Written] | None:
        """The cache whose next value an output is."""
        if not any(_may_follow(cache, output) for cache in self.caches):
            return None
        try:
            linear = probe.linear(output)
            numbers = {int(number) for term in linear.terms for number in np.unique(probe.owners(term.codes)[0])}
            for number in sorted(numbers - {0}):
                cache = next((cache for cache in self.caches if probe.owner(number) is cache), None)
                if cache is None or probe.shape(cache) != linear.shape:
                    continue
                axis = _written_axis(linear, probe.atoms(cache))
                if axis is not None:
                    rows = static_size(cache.shape[axis])
                    return cache.name, _Written(output.name, axis, linear.shape[axis] if rows is None else rows)
        except MlaTrtError:
            pass
        return None

    def describe(self, probe: Probe, found: dict[str, _Written]) -> ModelInterface:
        """The interface with the caches that were found, and with the outputs that count on what positions say."""
        caches = [tensor for tensor in self.graph.inputs if tensor.name in found]
        states = [
            tensor
            for tensor, entry in zip(self.graph.inputs, self.interface.inputs, strict=True)
            if entry.role == roles.STATE and tensor.name not in found
        ]
        data = data_dependent(self.graph, [*self.ids, *caches, *states])
        lengths = {tensor.shape[found[tensor.name].axis] for tensor in caches}
        assumed = {entry.name: entry.axes[-1] for entry in probe.interface.inputs if entry.role in _MASKS}
        entries: list[ModelInput] = []
        for tensor, entry in zip(self.graph.inputs, self.interface.inputs, strict=True):
            if tensor.name in found:
                written = found[tensor.name]
                entries.append(describe(tensor, roles.CACHE, written.output, written.axis, self.tokens, "L"))
            elif any(tensor is ids for ids in self.ids) or entry.role == roles.STATE:
                entries.append(entry)
            else:
                described = describe(tensor, side_role(tensor, data), None, None, self.tokens)
                entries.append(_with_mask_length(described, tensor, lengths, str(assumed.get(tensor.name, "T"))))
        return make_interface(self.graph, self._with_counters(probe, entries, data))

    def _with_counters(self, probe: Probe, entries: list[ModelInput], data: set[int]) -> list[ModelInput]:
        """Pairs positions of first tokens with the outputs that are those of the next step's."""
        taken: set[str] = set()
        for place, (tensor, entry) in enumerate(zip(self.graph.inputs, entries, strict=True)):
            if entry.role != roles.POSITIONS or "S" in entry.axes:
                continue
            reached = data_dependent(self.graph, [tensor])
            for output in self.graph.outputs:
                if id(output) in data or id(output) not in reached or output.name in taken:
                    continue
                try:
                    value = probe.known(output)
                except ProbeError:
                    continue
                if value.size and (value == probe.sizes.cached + probe.sizes.new).all():
                    entries[place] = replace(entry, output=output.name)
                    taken.add(output.name)
                    break
        return entries


def check_full_caches(probe: Probe) -> None:
    """Checks that full-length caches are given the new tokens' rows at their positions, and nothing else.

    Raises:
        NoMatch: a cache is written elsewhere, or from its start again when it is full.
    """
    sizes = probe.sizes
    # The first layer's is enough where those behind it cannot be evaluated so far out.
    later = replace(sizes, cached=sizes.rows + 1)
    beyond = Probe(probe.graph, probe.interface, probe.data, later, probe.base_dir, probe.overrides)
    for entry in probe.interface.by_role(roles.CACHE):
        axis = entry.axes.index("L")
        expected = np.arange(sizes.cached, sizes.cached + sizes.new)
        if not np.array_equal(_written_rows(probe, entry, axis), expected):
            raise NoMatch(f"the cache '{entry.name}' is not written at the new tokens' positions")
        try:
            again = _written_rows(beyond, entry, axis)
        except ProbeError:
            continue
        if len(again) and not np.array_equal(again, [sizes.rows - 1]):
            raise NoMatch(
                f"the cache '{entry.name}' is written from its start again when all its rows are full: a ring buffer"
            )


def _written_rows(probe: Probe, entry: ModelInput, axis: int) -> np.ndarray:
    """The rows of a cache's next value that are not its own."""
    cache = next(tensor for tensor in probe.graph.inputs if tensor.name == entry.name)
    output = next(tensor for tensor in probe.graph.outputs if tensor.name == entry.output)
    changed = _changed(probe.linear(output), probe.atoms(cache))
    probe.forget_data()
    return np.flatnonzero(changed.any(axis=tuple(other for other in range(changed.ndim) if other != axis)))


def _may_follow(tensor: gs.Tensor, output: gs.Tensor) -> bool:
    """Whether an output may be an input's next value, of the same shape. Exporters may not know an output's sizes."""
    if output.dtype != tensor.dtype or output.shape is None or len(tensor.shape) < 2:
        return False
    sizes = [tuple(map(static_size, shape)) for shape in (tensor.shape, output.shape)]
    return len(sizes[0]) == len(sizes[1]) and all(after in (before, None) for before, after in zip(*sizes, strict=True))


def _with_mask_length(entry: ModelInput, tensor: gs.Tensor, lengths: set[int | str], otherwise: str) -> ModelInput:
    """A mask over the rows of the caches, where its last axis is as long as they are."""
    if entry.role not in _MASKS or entry.axes[-1:] != ("T",):
        return entry
    size = tensor.shape[-1]
    if size in lengths or (static_size(size) is not None and not lengths):
        letter: Axis = "L"
    elif (fixed := static_size(size)) is not None:
        letter = "L" if fixed in {static_size(length) for length in lengths} else fixed
    else:
        letter = otherwise if otherwise in ("T", "L") else "T"
    return replace(entry, axes=(*entry.axes[:-1], letter))


def _written_axis(linear: Linear, own: Linear) -> int | None:
    """The axis along which some rows differ from a cache's own and the others do not; None where there is none."""
    changed = _changed(linear, own)
    for axis in range(changed.ndim):
        others = tuple(other for other in range(changed.ndim) if other != axis)
        rows = changed.any(axis=others, keepdims=True)
        if 0 < rows.sum() < rows.size and np.array_equal(changed, np.broadcast_to(rows, changed.shape)):
            return axis
    return None


def _changed(linear: Linear, own: Linear) -> np.ndarray:
    """Which elements of a cache's next value are not the cache's own."""
    codes = own.terms[0].codes
    present = [(term.codes != ZERO) & (term.coefficients != 0) for term in linear.terms]
    same = [
        there & (term.codes == codes) & (term.coefficients == 1)
        for there, term in zip(present, linear.terms, strict=True)
    ]
    return ~(np.any(same, axis=0) & (np.sum(present, axis=0) == 1))
