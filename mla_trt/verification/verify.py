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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from mla_trt.engines.engine_onnxruntime import OnnxRuntimeEngine, embedded_vocabulary, load_structure
from mla_trt.engines.engine_recorder import RecordingEngine
from mla_trt.errors import MlaTrtError, NoSessionError
from mla_trt.float32 import HALF_TYPES, has_half_types, to_float32
from mla_trt.interface import ModelInterface
from mla_trt.metadata import LoweredMetadata, set_facts
from mla_trt.ops import DOMAIN
from mla_trt.selection import force_selection, show_selection, sparse_nodes, top_k
from mla_trt.session import Session
from mla_trt.verification.cases import Script, Step, cases_for, run_step, script_for
from mla_trt.verification.ops import OPS_TOLERANCE, OpResult, check_ops
from mla_trt.verification.original import Limits, OriginalModel

FLOAT32_TOLERANCE = 1e-4
HALF_TOLERANCE = 1e-3
LONGEST_SELECTION = 256
LEAST_BOUND = 48
SPARE_PAGES = 6
VERIFICATION_PAGE_SIZE = 4  # so small that sessions cross page borders early
WHOLE, LAYERS = "whole", "layers"
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
        mode: whether the model was run "whole" or its attention "layers" alone.
    """

    judged: bool
    tolerance: float
    cases: tuple[CaseResult, ...]
    ops: tuple[OpResult, ...]
    selection_overlap: float | None
    notes: tuple[str, ...]
    failures: tuple[str, ...]
    mode: str = WHOLE

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
            "mode": self.mode,
            "judged": self.judged,
            "rewrite_max_error": _json_number(self.rewrite_max_error),
            "rewrite_tolerance": _json_number(self.tolerance),
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
    original_dir: Path | None = None,
    judged: bool = True,
    seed: int = 0,
    ops: bool = True,
) -> VerificationReport:
    """Compares a lowered model with its original.

    Half-precision models are compared in float32 copies: in their own types, rounding would hide mistakes.

    Args:
        original: the export, or its path.
        interface: roles and axes of its inputs.
        rewritten: the lowered model over f32 rows and f32 index rows in pages of 4 tokens, with weights as exported.
        written: the lowered model as it is to be used.
        base_dir: folder of the external data of the models in memory.
        original_dir: that of an original in memory, where it is another.
        judged: False where the export rounds activations, which lowering does not repeat: errors are stated then, not
            judged.
        seed: of the random tokens.
        ops: whether each op is compared with its reference too.

    Raises:
        BadModelError: ONNX Runtime cannot load the original.
        NoSessionError: the original refuses an empty cache, and nothing can be put in its place.
    """
    structure = original if isinstance(original, onnx.ModelProto) else load_structure(original)
    folder = original_dir or base_dir if isinstance(original, onnx.ModelProto) else Path(original).parent
    half = has_half_types(structure)
    verification = _Verification(written, base_dir, seed, half=half)
    rope_dim = next((layer.get("qk_rope_head_dim") for layer in verification.metadata.layers), None)
    export = OriginalModel(
        to_float32(structure, folder) if half else original, interface, base_dir=folder, rope_dim=rope_dim
    )
    verification.run_original(export)
    # Models may be half as large as memory: one is open at a time.
    del structure, export, original
    verification.run_lowered(rewritten, judged=judged, ops=ops)
    return verification.report(judged)


def with_failures(report: VerificationReport, failures: Sequence[str]) -> VerificationReport:
    """A report with more failures."""
    return replace(report, failures=(*report.failures, *failures))


class _Verification:
    """What was found out so far."""

    def __init__(self, written: onnx.ModelProto, base_dir: Path | None, seed: int, *, half: bool) -> None:
        self.written = written
        self.metadata = LoweredMetadata.of(written)
        self.base_dir = base_dir
        self.seed = seed
        self.half = half
        self.tolerance = HALF_TOLERANCE if half else FLOAT32_TOLERANCE
        self.scripts: list[Script] = []
        self.cases: list[CaseResult] = []
        self.ops: list[OpResult] = []
        self.overlaps: list[float] = []
        self.notes: list[str] = []
        self.failures: list[str] = []

    def report(self, judged: bool) -> VerificationReport:
        return VerificationReport(
            judged,
            self.tolerance,
            tuple(self.cases),
            tuple(self.ops),
            float(np.mean(self.overlaps)) if self.overlaps else None,
            tuple(self.notes),
            tuple(self.failures),
        )

    def run_original(self, export: OriginalModel) -> None:
        """Draws the sessions and what the original gives in them."""
        try:
            selected = top_k(self.written)
            exceeded = selected if selected and selected <= LONGEST_SELECTION else None
            if selected and not exceeded:
                self.notes.append(f"no context grew past the {selected} selected keys")
            limits = export.find_limits(max(LEAST_BOUND, (exceeded or 0) + LEAST_BOUND // 2))
            self._note_limits(export, limits)
            if self.metadata.max_position is not None and self.metadata.max_position < limits.total:
                limits = replace(limits, total=self.metadata.max_position)
            if exceeded and limits.total <= exceeded:
                self.notes.append(
                    f"no context grew past the {exceeded} selected keys: the export takes {limits.total} tokens at most"
                )
            vocabulary = embedded_vocabulary(self.written, self.metadata.token_input) or export.count_ids(limits)
            cases = cases_for(token_axes=self.metadata.token_axes, top_k=exceeded, limits=limits)
            self.scripts = [
                script_for(case, export, limits, vocabulary=vocabulary, seed=self.seed + index)
                for index, case in enumerate(cases)
            ]
            if not any(scale for script in self.scripts for scale in script.scales().values()):
                self.notes.append("the original gives nothing but zeros, with which anything agrees")
        except NoSessionError:
            raise
        except MlaTrtError as error:
            self.failures.append(str(error))

    def run_lowered(self, rewritten: onnx.ModelProto, *, judged: bool, ops: bool) -> None:
        """Runs the sessions again: over f32 rows, then over rows as written, with the keys that the former selected."""
        if self.failures:
            return
        try:
            exact = self._in_float32(rewritten)
            shown: list[str] = []
            if sparse_nodes(exact):
                exact, shown = show_selection(exact)
            rewrites = self._play(exact, shown)
            del exact
            written = self._in_float32(self.written)
            forced, inputs, own = force_selection(written) if shown else (written, [], [])
            formats = self._play(forced, own, [dict(zip(inputs, step, strict=True)) for step in rewrites.shown])
            del forced
            for expected, actual in zip(rewrites.shown, formats.shown, strict=True):
                for left, right in zip(expected, actual, strict=True):
                    self.overlaps += overlaps(left, right)
            self.cases = [
                CaseResult(script.case.name, compared, rewrite, formatted)
                for script, compared, rewrite, formatted in zip(
                    self.scripts, rewrites.compared, rewrites.errors, formats.errors, strict=True
                )
            ]
            self._judge(judged)
            if ops:
                self._check_ops(written)
        except MlaTrtError as error:
            self.failures.append(str(error))

    def _in_float32(self, model: onnx.ModelProto) -> onnx.ModelProto:
        return _lowered_in_float32(model, self.base_dir) if self.half else model

    def _play(
        self, model: onnx.ModelProto, shown: list[str], extra: Sequence[dict[str, np.ndarray]] | None = None
    ) -> _Trace:
        """Runs a lowered model through all sessions.

        Args:
            model: the model.
            shown: outputs to keep, of each step.
            extra: more inputs of each step.
        """
        page_size = LoweredMetadata.of(model).page_size
        needed = [sum(-(-len(tokens) // page_size) for tokens in script.tokens.values()) for script in self.scripts]
        lane = _Lane(
            model, OnnxRuntimeEngine(model, pages=max(needed, default=0) + SPARE_PAGES, base_dir=self.base_dir)
        )
        trace = _Trace([], [], [])
        for script in self.scripts:
            lane.begin(script)
            for step, spans in script.case.spans():
                lane.step(step, spans, extra[len(trace.shown)] if extra is not None else None)
                trace.shown.append([lane.engine.outputs[name] for name in shown])
            trace.compared.append(lane.compared())
            trace.errors.append(lane.error())
        return trace

    def _check_ops(self, written: onnx.ModelProto) -> None:
        self.ops = check_ops(written, base_dir=self.base_dir, seed=self.seed)
        for result in self.ops:
            if not result.error <= OPS_TOLERANCE:
                self.failures.append(f"{result.op} '{result.node}' differs from its reference by {result.error:.2g}")

    def _note_limits(self, export: OriginalModel, limits: Limits) -> None:
        """Says what could not be tried because the export does not begin with an empty cache.

        Raises:
            NoSessionError: it can not be driven at all.
        """
        exactly = f"exactly {limits.past}" if export.fixed_past is not None else f"at least {limits.past}"
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

    def _judge(self, judged: bool) -> None:
        for case in self.cases:
            if not case.tokens:
                self.failures.append(f"{case.name}: there is no token of which both models gave a result")
            elif judged and not case.rewrite_max_error <= self.tolerance:
                self.failures.append(
                    f"{case.name}: differs from the original by {case.rewrite_max_error:.2g}, not {self.tolerance:g}"
                )
            elif not math.isfinite(case.rewrite_max_error) or not math.isfinite(case.format_max_error):
                self.failures.append(f"{case.name}: the lowered model gives results that are not finite")


@dataclass(frozen=True)
class _Trace:
    """What one lowered model gave: for each session the tokens that can be compared and the error, for each step the
    outputs that were asked for."""

    compared: list[int]
    errors: list[float]
    shown: list[list[np.ndarray]]


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
    sides = [
        replace(entry, dtype=TensorProto.FLOAT) if entry.dtype in HALF_TYPES else entry
        for entry in LoweredMetadata.of(model).side_inputs
    ]
    set_facts(copy, side_inputs=[asdict(entry) for entry in sides])
    return copy


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None
