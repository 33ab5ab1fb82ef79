"""The sessions that verification runs: which sequence gets how many tokens in which step.

They are made so that mistakes show: sequences change their place in the batch, lengths are ragged, steps end before, on
and behind page borders, sequences join, leave, fork and take over each other's pages, and there is padding of every
kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper

from mla_trt import interface as roles
from mla_trt.metadata import LoweredMetadata
from mla_trt.pages import UNASSIGNED
from mla_trt.session import Results, Session
from mla_trt.verification.original import Limits, OriginalModel, rope_input


@dataclass(frozen=True)
class Step:
    """One step of a session.

    Attributes:
        new: (sequence, number of new tokens), in the order of the batch.
        freed: sequences that end before the step.
        forked: (new sequence, its parent), before the step.
        pad_tokens, pad_sequences, pad_columns: as for `mla_trt.session.Session.step`.
    """

    new: tuple[tuple[str, int], ...]
    freed: tuple[str, ...] = ()
    forked: tuple[tuple[str, str], ...] = ()
    pad_tokens: int = 0
    pad_sequences: int = 0
    pad_columns: int = 0


@dataclass(frozen=True)
class Case:
    """A session from its first step."""

    name: str
    steps: tuple[Step, ...]

    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(sum(chunks) for chunks in self.chunks().values())

    def chunks(self) -> dict[str, list[int]]:
        """The numbers of tokens that each sequence gets, in order; a fork begins with those of its parent."""
        found: dict[str, list[int]] = {}
        for step in self.steps:
            for child, parent in step.forked:
                found[child] = list(found[parent])
            for sequence, count in step.new:
                found.setdefault(sequence, []).append(count)
        return found

    def spans(self) -> Iterator[tuple[Step, dict[str, tuple[int, int]]]]:
        """Each step with the (first, behind last) position of the tokens that each of its sequences gets."""
        lengths: dict[str, int] = {}
        for step in self.steps:
            for child, parent in step.forked:
                lengths[child] = lengths[parent]
            found = {}
            for sequence, count in step.new:
                start = lengths.get(sequence, 0)
                found[sequence] = (start, start + count)
                lengths[sequence] = start + count
            yield step, found

    def by_single_tokens(self) -> Case:
        """The same tokens in steps of one for each sequence, for models that take no more."""
        steps: list[Step] = []
        for step in self.steps:
            for turn in range(max(count for _, count in step.new)):
                new = tuple((sequence, 1) for sequence, count in step.new if turn < count)
                steps.append(replace(step, new=new) if turn == 0 else replace(step, new=new, freed=(), forked=()))
        return replace(self, steps=tuple(steps))

    def within(self, limits: Limits) -> Case:
        """The case with first chunks that the original accepts and no sequence longer than it takes."""
        lengths: dict[str, int] = {}
        steps: list[Step] = []
        freed: tuple[str, ...] = ()
        forked: tuple[tuple[str, str], ...] = ()
        for step in self.steps:
            for child, parent in step.forked:
                lengths[child] = lengths[parent]
            freed, forked = freed + step.freed, forked + step.forked
            new = []
            for sequence, count in step.new:
                length = lengths.get(sequence, 0)
                wanted = count if length else max(count, limits.first or 1)
                taken = min(wanted, limits.total - length)
                lengths[sequence] = length + taken
                new.append((sequence, taken))
            if any(count for _, count in new):
                steps.append(replace(step, new=tuple(new), freed=freed, forked=forked))
                freed, forked = (), ()
        return replace(self, steps=tuple(steps))


def _single(*counts: int) -> tuple[Step, ...]:
    return tuple(Step(new=(("a", count),)) for count in counts)


ALONE = Case("one sequence", _single(6, 1, 1, 1, 8, 1))

TOGETHER = Case(
    "ragged batch",
    (
        Step(new=(("a", 3), ("b", 5))),
        Step(new=(("b", 1), ("a", 1)), pad_tokens=3),
        Step(new=(("c", 6), ("b", 2), ("a", 1)), pad_columns=2),
        Step(new=(("b", 1), ("c", 8)), freed=("a",), pad_sequences=2, pad_tokens=1),
        Step(new=(("d", 9), ("c", 1), ("b", 0))),
        Step(new=(("c", 1), ("d", 1), ("b", 8)), pad_columns=1),
        Step(new=(("d", 4), ("b", 1), ("c", 1)), pad_tokens=2),
    ),
)

FORKED = Case(
    "forked sequences",
    (
        Step(new=(("a", 6), ("b", 4))),
        Step(new=(("c", 1), ("a", 1), ("b", 1)), forked=(("c", "a"),)),
        Step(new=(("d", 5), ("c", 3)), forked=(("d", "b"),), freed=("a",)),
        Step(new=(("b", 1), ("d", 1), ("c", 1))),
    ),
)

EQUAL = Case(
    "equal lengths",
    (
        Step(new=(("a", 5), ("b", 5))),
        Step(new=(("b", 1), ("a", 1))),
        Step(new=(("a", 3), ("b", 3))),
        Step(new=(("b", 1), ("c", 1)), forked=(("c", "a"),)),
        Step(new=(("a", 8),)),
    ),
)


def beyond_top_k(top_k: int) -> Case:
    """Contexts that grow past the number of selected keys, by one token and by eight."""
    before = max(2, top_k - 2)
    return Case(
        f"contexts beyond the {top_k} selected keys",
        (
            Step(new=(("a", before), ("b", before + 3))),
            Step(new=(("b", 1), ("a", 1))),
            *(Step(new=(("a", 1), ("b", 1))) for _ in range(4)),
            Step(new=(("b", 8), ("a", 8)), pad_tokens=2),
            Step(new=(("a", 1), ("b", 1))),
        ),
    )


def after(tokens: int, step: int) -> Case:
    """Sequences of which results are known only after their first tokens, and which end with the step after those.

    Args:
        tokens: how many come first.
        step: tokens of the step after them.
    """
    return Case(
        f"{step} after {tokens} cached tokens",
        (
            Step(new=(("a", tokens - 1), ("b", tokens))),
            Step(new=(("b", step), ("a", 1)), pad_tokens=1),
            Step(new=(("a", step),), freed=("b",)),
        ),
    )


def cases_for(*, token_axes: Sequence[str], top_k: int | None, limits: Limits) -> list[Case]:
    """The cases that a model is verified with.

    Args:
        token_axes: of the lowered model, as in its metadata.
        top_k: number of selected keys of a sparse model, where it is small enough to be exceeded.
        limits: what the original accepts.
    """
    if "T" not in token_axes:
        cases = [ALONE, EQUAL] if "B" in token_axes else [ALONE]
        return cases if "S" in token_axes else [case.by_single_tokens() for case in cases]
    if limits.made:
        cases = [after(limits.made, limits.step)]
        return [*cases, *(case for case in (ALONE, TOGETHER, FORKED) if case.longest() > limits.made)]
    return [ALONE, TOGETHER, FORKED, *([beyond_top_k(top_k)] if top_k else [])]


@dataclass(frozen=True)
class Script:
    """A case with its tokens, and what the original gives for them.

    Attributes:
        case: the case.
        tokens: of each sequence, [n, ...].
        expected: results of each sequence by name, [n, ...] in float64; NaN where the original gives none.
    """

    case: Case
    tokens: dict[str, np.ndarray]
    expected: dict[str, dict[str, np.ndarray]]

    def scales(self) -> dict[str, float]:
        """The largest absolute value of each result."""
        scales: dict[str, float] = {}
        for results in self.expected.values():
            for name, rows in results.items():
                known = rows[~np.isnan(rows)]
                scales[name] = max(scales.get(name, 0.0), float(np.abs(known).max(initial=0.0)))
        return scales


def script_for(case: Case, original: OriginalModel, limits: Limits, *, vocabulary: int, seed: int) -> Script:
    """Draws the tokens of a case and runs the original over each sequence alone.

    Args:
        case: the case; it is cut to what the original accepts.
        original: the export.
        limits: what it accepts.
        vocabulary: number of token ids to draw from.
        seed: of the random numbers.
    """
    case = case.within(limits)
    random = np.random.default_rng(seed)
    chunks = {sequence: [count for count in counts if count] for sequence, counts in case.chunks().items()}
    tokens = {}
    for sequence, counts in chunks.items():
        shape = (sum(counts), *original.feature_axes)
        tokens[sequence] = (
            random.standard_normal(shape) if original.feature_axes else random.integers(0, vocabulary, shape)
        )
    shared: dict[str, int] = {}
    for step in case.steps:
        for child, parent in step.forked:
            tokens[child][: shared[parent]] = tokens[parent][: shared[parent]]
            shared[child] = shared[parent]
        for sequence, count in step.new:
            shared[sequence] = shared.get(sequence, 0) + count
    tokens = {sequence: values.astype(original.token_dtype) for sequence, values in tokens.items()}
    expected = {sequence: original.results_by_token(tokens[sequence], chunks[sequence], limits) for sequence in tokens}
    return Script(case, tokens, expected)


def run_step(
    session: Session,
    model: onnx.ModelProto,
    step: Step,
    batch: Mapping[int, np.ndarray],
    spans: Mapping[str, tuple[int, int]],
    extra_inputs: Mapping[str, np.ndarray] | None = None,
) -> dict[int, Results]:
    """Runs a step with its padding, with entries of the block table that stand for no page, and with rope tables where
    the model takes them.

    Args:
        session: a session over the model.
        model: the lowered model.
        step: the step.
        batch: tokens of each sequence of the session.
        spans: their positions, in the same order.
        extra_inputs: more inputs.
    """
    positions = np.concatenate([*(np.arange(*span) for span in spans.values()), np.zeros(step.pad_tokens, np.int64)])
    pages = session.engine.pages
    return session.step(
        batch,
        extra_inputs={**rope_inputs(model, session.metadata, positions), **(extra_inputs or {})},
        pad_tokens=step.pad_tokens,
        pad_sequences=step.pad_sequences,
        pad_columns=step.pad_columns,
        unassigned=(UNASSIGNED, pages, -7, np.iinfo(np.int32).max, pages + 5),
    )


def rope_inputs(model: onnx.ModelProto, metadata: LoweredMetadata, positions: np.ndarray) -> dict[str, np.ndarray]:
    """Cosines and sines of packed tokens, for models that take them: as `mla_trt.verification.original` gives them to the export."""
    found = {}
    for entry in metadata.side_inputs:
        if entry.role not in (roles.ROPE_COS, roles.ROPE_SIN):
            continue
        (value,) = (value for value in model.graph.input if value.name == entry.name)
        dims = [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]
        packed = replace(entry, axes=tuple("S" if dim is None else dim for dim in dims))
        shape = [len(positions) if dim is None else dim for dim in dims]
        rope_dim = next((layer.get("qk_rope_head_dim") for layer in metadata.layers), None)
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        found[entry.name] = rope_input(packed, positions, shape, rope_dim).astype(dtype)
    return found
