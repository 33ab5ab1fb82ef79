"""Does a lowered model compute what its original computes? Both run short sessions on ONNX Runtime, token by token the
same.

Three questions are answered apart:

- the rewrite: the lowered model over f32 rows and pages of 4 tokens against the original. Equal up to rounding.
- the formats: the model as it was written against the original. How much its row formats cost is a property of the
weights, so this
  is reported, and has to be finite.
- the ops: each op as it was written against its numpy reference on the same bytes. Equal up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mla_trt.engine_onnxruntime import OnnxRuntimeEngine, embedded_vocabulary, load_structure
from mla_trt.engine_recorder import RecordingEngine
from mla_trt.errors import MlaTrtError, NoSessionError
from mla_trt.float32 import has_half_types, to_float32
from mla_trt.interface import ModelInterface
from mla_trt.metadata import LoweredMetadata
from mla_trt.ops import DOMAIN
from mla_trt.original import Limits, OriginalModel
from mla_trt.selection import force_selection, show_selection, top_k
from mla_trt.session import Session
from mla_trt.verification_cases import Script, Step, cases_for, run_step, script_for
from mla_trt.verification_ops import OPS_TOLERANCE, OpResult, check_ops

FLOAT32_TOLERANCE = 1e-4
HALF_TOLERANCE = 1e-3
LONGEST_SELECTION = 256
LEAST_BOUND = 48
SPARE_PAGES = 6
TINY = 1e-30


@dataclass(frozen=True)
class CaseResult:
    """One session. Errors are relative to the largest absolute value of the original's result.

    Attributes:
        name: what it is about.
        tokens: tokens whose results were compared.
        rewrite_max_error: of the model over f32 rows.
        format_max_error: of the model as it was written.
    """

    name: str
    tokens: int
    rewrite_max_error: float
    format_max_error: float


@dataclass(frozen=True)
class VerificationReport:
    """What a verification measured.

    Attributes:
        judged: whether the rewrite's error decides. It does not where the export rounds activations in ways that
            lowering drops.
        tolerance: most that the rewrite may differ by.
        cases: the sessions.
        ops: one node of each variant of each op.
        selection_overlap: share of the keys selected by the f32 model that the model as written selects, over tokens
            that see more keys than are selected; None where there are none.
        notes: what could not be tried.
        failures: why the model fails, one line each.
    """

    judged: bool
    tolerance: float
    cases: tuple[CaseResult, ...]
    ops: tuple[OpResult, ...]
    selection_overlap: float | None
    notes: tuple[str, ...]
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the model may be used."""
        return not self.failures

    @property
    def rewrite_max_error(self) -> float:
        """The largest of all sessions."""
        return max((case.rewrite_max_error for case in self.cases), default=math.nan)

    @property
    def format_max_error(self) -> float:
        """The largest of all sessions."""
        return max((case.format_max_error for case in self.cases), default=math.nan)

    def to_json(self) -> dict[str, Any]:
        """The entry `verification` of `report.json`. Errors that are not finite become null."""
        return {
            "passed": self.passed,
            "judged": self.judged,
            "rewrite_max_error": _json_number(self.rewrite_max_error),
            "rewrite_tolerance": self.tolerance,
            "format_max_error": _json_number(self.format_max_error),
            "ops_max_error": _json_number(max((result.error for result in self.ops), default=math.nan)),
            "selection_overlap": self.selection_overlap,
            "cases": [
                {
                    "name": case.name,
                    "tokens": case.tokens,
                    "rewrite_max_error": _json_number(case.rewrite_max_error),
                    "format_max_error": _json_number(case.format_max_error),
                }
                for case in self.cases
            ],
            "ops": [{"op": result.op, "node": result.node, "error": _json_number(result.error)} for result in self.ops],
            "notes": list(self.notes),
            "failures": list(self.failures),
        }


def verify(
    original: onnx.ModelProto | Path | str,
    interface: ModelInterface,
    rewritten: onnx.ModelProto,
    written: onnx.ModelProto,
    *,
    base_dir: Path | None = None,
    judged: bool = True,
    seed: int = 0,
) -> VerificationReport:
    """Compares a lowered model with its original.

    Half-precision models are compared in float32 copies: in their own types, rounding would hide mistakes.

    Args:
        original: the export, or its path.
        interface: roles and axes of its inputs.
        rewritten: the lowered model over f32 rows and f32 index rows in pages of 4 tokens, with weights as exported.
        written: the lowered model as it is to be used.
        base_dir: folder of the external data of the models in memory.
        judged: False where the export rounds activations, which lowering does not repeat: errors are stated then, not
            judged.
        seed: of the random tokens.

    Raises:
        BadModelError: ONNX Runtime cannot load the original.
        NoSessionError: the original refuses an empty cache, and nothing can be put in its place.
    """
    structure = original if isinstance(original, onnx.ModelProto) else load_structure(original)
    folder = base_dir if isinstance(original, onnx.ModelProto) else Path(original).parent
    half = has_half_types(structure)
    if half:
        original = to_float32(structure, folder)
        rewritten, written = _lowered_in_float32(rewritten, base_dir), _lowered_in_float32(written, base_dir)
    rope_dim = next((layer.get("qk_rope_head_dim") for layer in LoweredMetadata.of(written).layers), None)
    export = OriginalModel(original, interface, base_dir=folder, rope_dim=rope_dim)
    return _Verification(export, rewritten, written, base_dir, seed).run(
        HALF_TOLERANCE if half else FLOAT32_TOLERANCE, judged
    )


class _Verification:
    """The models, open, and what they gave so far."""

    def __init__(
        self,
        export: OriginalModel,
        rewritten: onnx.ModelProto,
        written: onnx.ModelProto,
        base_dir: Path | None,
        seed: int,
    ) -> None:
        self.export = export
        self.base_dir = base_dir
        self.seed = seed
        self.written = written
        self.rewritten, self.shown = show_selection(rewritten)
        self.forced, self.forced_inputs, self.own = force_selection(written)
        self.selected = top_k(written)
        self.notes: list[str] = []
        self.failures: list[str] = []
        self.overlaps: list[float] = []

    def run(self, tolerance: float, judged: bool) -> VerificationReport:
        cases: list[CaseResult] = []
        ops: list[OpResult] = []
        try:
            cases = list(self._sessions())
            self._judge(cases, tolerance, judged)
            ops = check_ops(self.written, base_dir=self.base_dir, seed=self.seed)
            for result in ops:
                if not result.error <= OPS_TOLERANCE:
                    self.failures.append(
                        f"{result.op} '{result.node}' differs from its reference by {result.error:.2g}"
                    )
        except NoSessionError:
            raise
        except MlaTrtError as error:
            self.failures.append(str(error))
        overlap = float(np.mean(self.overlaps)) if self.overlaps else None
        return VerificationReport(
            judged, tolerance, tuple(cases), tuple(ops), overlap, tuple(self.notes), tuple(self.failures)
        )

    def _sessions(self) -> Iterator[CaseResult]:
        scripts = self._scripts()
        rewritten, forced = (self._lane(model, scripts) for model in (self.rewritten, self.forced))
        for script in scripts:
            for lane in (rewritten, forced):
                lane.begin(script)
            for step, spans in script.case.spans():
                rewritten.step(step, spans)
                selections = [rewritten.engine.outputs[name] for name in self.shown]
                forced.step(step, spans, dict(zip(self.forced_inputs, selections, strict=True)))
                for name, selection in zip(self.own, selections, strict=True):
                    self.overlaps += overlaps(selection, forced.engine.outputs[name])
            yield CaseResult(script.case.name, rewritten.compared(), rewritten.error(), forced.error())

    def _scripts(self) -> list[Script]:
        metadata = LoweredMetadata.of(self.rewritten)
        exceeded = self.selected if self.selected and self.selected <= LONGEST_SELECTION else None
        if self.selected and not exceeded:
            self.notes.append(f"no context grew past the {self.selected} selected keys")
        limits = self.export.find_limits(max(LEAST_BOUND, (exceeded or 0) + LEAST_BOUND // 2))
        self._note_limits(limits)
        if metadata.max_position is not None and metadata.max_position < limits.total:
            limits = replace(limits, total=metadata.max_position)
        if exceeded and limits.total <= exceeded:
            self.notes.append(
                f"no context grew past the {exceeded} selected keys: the export takes {limits.total} tokens at most"
            )
        vocabulary = embedded_vocabulary(self.written, metadata.token_input) or self.export.count_ids(limits)
        cases = cases_for(packed=metadata.packed, top_k=exceeded, limits=limits)
        return [
            script_for(case, self.export, limits, vocabulary=vocabulary, seed=self.seed + index)
            for index, case in enumerate(cases)
        ]

    def _note_limits(self, limits: Limits) -> None:
        """Says what could not be tried because the export does not begin with an empty cache.

        Raises:
            NoSessionError: it can not be driven at all.
        """
        exactly = f"exactly {limits.past}" if self.export.fixed_past is not None else f"at least {limits.past}"
        if not limits.can_begin:
            raise NoSessionError(
                f"the export takes {exactly} cached tokens, and none of its inputs hides those that are not there yet, so "
                "no session can begin: export it with a free number of cached tokens or with an attention mask as an "
                "input, or lower it unverified with --no-verify"
            )
        if limits.window:
            self.notes.append(
                f"the export takes {exactly} cached tokens: those not there yet were hidden by its mask, and no session "
                f"has more than {limits.total} tokens"
            )
        if limits.made:
            self.notes.append(
                f"the export takes {exactly} cached tokens and cannot hide any: only results after the first {limits.made} "
                f"tokens were compared, up to {limits.total} tokens"
            )

    def _lane(self, model: onnx.ModelProto, scripts: list[Script]) -> _Lane:
        page_size = LoweredMetadata.of(model).page_size
        needed = [sum(-(-len(tokens) // page_size) for tokens in script.tokens.values()) for script in scripts]
        return _Lane(model, OnnxRuntimeEngine(model, pages=max(needed) + SPARE_PAGES, base_dir=self.base_dir))

    def _judge(self, cases: list[CaseResult], tolerance: float, judged: bool) -> None:
        for case in cases:
            if not case.tokens:
                self.failures.append(f"{case.name}: there is no token of which both models gave a result")
            elif judged and not case.rewrite_max_error <= tolerance:
                self.failures.append(
                    f"{case.name}: differs from the original by {case.rewrite_max_error:.2g}, not {tolerance:g}"
                )
            elif not math.isfinite(case.rewrite_max_error) or not math.isfinite(case.format_max_error):
                self.failures.append(f"{case.name}: the lowered model gives results that are not finite")


class _Lane:
    """A lowered model on its way through scripts, and the rows that it gave in the latest."""

    def __init__(self, model: onnx.ModelProto, engine: OnnxRuntimeEngine) -> None:
        self.engine = RecordingEngine(engine)
        self._model = model

    def begin(self, script: Script) -> None:
        self._script = script
        self._session = Session(self.engine)
        self._numbers: dict[str, int] = {}
        self._rows: dict[str, dict[str, np.ndarray]] = {
            sequence: {name: np.full(rows.shape, np.nan) for name, rows in results.items()}
            for sequence, results in script.expected.items()
        }
        self._given = {sequence: np.zeros(len(tokens), bool) for sequence, tokens in script.tokens.items()}
        self.engine.poison(tuple(range(self.engine.pages)))

    def step(
        self, step: Step, spans: dict[str, tuple[int, int]], extra_inputs: dict[str, np.ndarray] | None = None
    ) -> None:
        session = self._session
        for child, parent in step.forked:
            self._numbers[child] = session.fork(self._numbers[parent])
        for sequence in step.freed:
            session.free(self._numbers.pop(sequence))
        for sequence in spans:
            if sequence not in self._numbers:
                self._numbers[sequence] = session.create()
        # What ended sequences left in their pages must not matter.
        self.engine.poison(session.free_pages)
        batch = {self._numbers[name]: self._script.tokens[name][start:end] for name, (start, end) in spans.items()}
        found = run_step(session, self._model, step, batch, spans, extra_inputs)
        for sequence, (start, end) in spans.items():
            for name, rows in found[self._numbers[sequence]].items():
                if name in self._rows[sequence] and end > start:
                    first = end - len(rows)
                    self._rows[sequence][name][first:end] = rows
                    self._given[sequence][first:end] = True

    def compared(self) -> int:
        """Tokens of which both models gave results."""
        expected = self._script.expected
        return sum(int((known_rows(rows) & self._given[sequence]).sum()) for sequence, rows in expected.items())

    def error(self) -> float:
        """The largest error of the session; infinite where a result is not finite or of another shape."""
        worst = 0.0
        scales = self._script.scales()
        for sequence, results in self._script.expected.items():
            compared = known_rows(results) & self._given[sequence]
            for name, expected in results.items():
                difference = np.abs(self._rows[sequence][name][compared] - expected[compared])
                if not np.isfinite(difference).all():
                    return math.inf
                worst = max(worst, float(difference.max(initial=0.0)) / max(scales[name], TINY))
        return worst


def known_rows(results: dict[str, np.ndarray]) -> np.ndarray:
    """The tokens of which every result is finite, bool [n]; bool [] (False) where there is no result at all."""
    if not results:
        return np.array(False)
    return np.all([np.isfinite(rows).all(axis=tuple(range(1, rows.ndim))) for rows in results.values()], axis=0)


def overlaps(expected: np.ndarray, actual: np.ndarray) -> list[float]:
    """Share of the expected keys that were selected, of each token whose list is full.

    Args:
        expected, actual: lists of keys, i32 [T, top_k]; -1 stands for none.
    """
    full = (expected >= 0).all(axis=1)
    return [
        len(np.intersect1d(left, right)) / len(left) for left, right in zip(expected[full], actual[full], strict=True)
    ]


def _lowered_in_float32(model: onnx.ModelProto, base_dir: Path | None) -> onnx.ModelProto:
    """A float32 copy of a lowered model. The bodies of its ops serve any type and stay as they are."""
    without_bodies = onnx.ModelProto()
    without_bodies.CopyFrom(model)
    bodies = [function for function in model.functions if function.domain == DOMAIN]
    others = [function for function in model.functions if function.domain != DOMAIN]
    del without_bodies.functions[:]
    without_bodies.functions.extend(others)
    copy = to_float32(without_bodies, base_dir)
    copy.functions.extend(bodies)
    return copy


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None
