"""Every lowered export as a TensorRT engine: it parses, builds, and gives the original's results.

    python tests/gpu/prepare_engines.py EXPORTS -o build/engines       # once, without a GPU
    python -m pytest tests/gpu/test_engines.py                         # with one

$MLA_TRT_ENGINES names the folder of the records (default: build/engines; its archive build/engines.tar.xz will do),
$MLA_TRT_VARIANTS the variants (default: f32,fp8,bf16), $MLA_TRT_WORKERS the processes, $MLA_TRT_SECONDS the time after
which no case is begun any more. The table is written to $OUT/engines.md (default: build/engines.md), everything that
was measured to engines.json beside it.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from engine_sessions import HALF_OUTLIERS, HALF_TOLERANCE, ROOT, VARIANTS, records_folder

RECORDS = records_folder()
OUT = Path(os.environ.get("OUT", ROOT / "build"))
CHOSEN = os.environ.get("MLA_TRT_VARIANTS", ",".join(VARIANTS)).split(",")
WORKERS = int(os.environ.get("MLA_TRT_WORKERS", max(1, min(8, (os.cpu_count() or 1) // 2))))
SECONDS = float(os.environ.get("MLA_TRT_SECONDS", 270))
CASE_SECONDS = 150
RESULT = "RESULT "

EXPORTS = sorted(path.parent.name for path in RECORDS.glob("*/sessions.json"))
CASES = [(export, variant) for variant in CHOSEN for export in EXPORTS]

Result = dict[str, Any]


def _reason() -> str | None:
    """Why nothing can be run here."""
    from mla_trt.cuda import NoGpuError, find_gpu
    from mla_trt.errors import MlaTrtError
    from mla_trt.tensorrt_api import load_tensorrt

    if not CASES:
        return f"there are no records in {RECORDS}: make them with tests/gpu/prepare_engines.py"
    try:
        find_gpu()
        load_tensorrt()
    except NoGpuError as error:
        return str(error)
    except MlaTrtError as error:
        return str(error)
    return None


class _Worker:
    """Takes cases from a queue and gives them to a process, which is begun anew after a crash."""

    def __init__(self, cases: queue.SimpleQueue[tuple[str, str]], scratch: Path, deadline: float) -> None:
        self._cases = cases
        self._scratch = scratch
        self._deadline = deadline
        self._process: subprocess.Popen[str] | None = None
        self._messages = tempfile.NamedTemporaryFile("w+", dir=scratch, suffix=".stderr")  # noqa: SIM115
        self.results: dict[tuple[str, str], Result] = {}

    def run(self) -> None:
        """Until there are no more cases, or no more time."""
        while time.monotonic() < self._deadline:
            try:
                case = self._cases.get_nowait()
            except queue.Empty:
                break
            self.results[case] = self._run_case(*case)
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait(timeout=30)

    def _run_case(self, export: str, variant: str) -> Result:
        if self._process is None:
            command = [sys.executable, str(Path(__file__).with_name("engine_worker.py")), str(self._scratch)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages, text=True, cwd=ROOT
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(CASE_SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps({"folder": str(RECORDS / export), "variant": variant}) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith(RESULT):
                    result: Result = json.loads(line.removeprefix(RESULT))
                    if "CUDA" in result.get("error", ""):
                        self._process = None  # the process's context may be lost
                        process.kill()
                    return result
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
        self._process = None
        code = process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return {"export": export, "variant": variant, "stage": "crash", "error": f"{how}: {self._last_words()}"}

    def _last_words(self) -> str:
        text = Path(self._messages.name).read_text(errors="replace").strip().splitlines()
        return " | ".join(text[-3:])[-600:]


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, str], Result]:
    """What became of every case."""
    reason = _reason()
    if reason is not None:
        pytest.skip(reason)
    cases: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    for case in CASES:
        cases.put(case)
    with tempfile.TemporaryDirectory() as scratch:
        deadline = time.monotonic() + SECONDS
        workers = [_Worker(cases, Path(scratch), deadline) for _ in range(min(WORKERS, len(CASES)))]
        threads = [threading.Thread(target=worker.run) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = {case: result for worker in workers for case, result in worker.results.items()}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "engines.json").write_text(json.dumps([found[case] for case in CASES if case in found], indent=0))
    (OUT / "engines.md").write_text(table(found))
    return found


def failure(result: Result) -> str | None:
    """Why a case failed, in one line; None where it did not."""
    if result["stage"] != "done":
        where = f" in '{result['session']}'" if result["stage"] == "run" and "session" in result else ""
        return f"{result['stage']}{where}: {result.get('error', 'no reason')}"
    variant = VARIANTS[result["variant"]]
    tolerance = variant.tolerance
    outliers = variant.sparse_outliers if result["sparse"] else variant.outliers
    if result["half"]:
        tolerance, outliers = max(tolerance, HALF_TOLERANCE), max(outliers, HALF_OUTLIERS)
    between = result["between"]
    beyond = sum(not value <= tolerance for value in between)
    if not between:
        return "compare: there is no token of which both have results"
    if not math.isfinite(result["max_error"]):
        return f"compare: results are not finite in '{result['worst_session']}'"
    if beyond > outliers * len(between):
        return (
            f"compare: {beyond} of {len(between)} tokens differ from ONNX Runtime by more than {tolerance:g} "
            f"(median {result['between_median']:.2g}, worst {result['between_max']:.2g}); from the original by "
            f"{result['max_error']:.2g} (the format alone: {result['format_error']:.2g}), most in '{result['worst_session']}'"
        )
    return None


def table(found: dict[tuple[str, str], Result]) -> str:
    """One line for each export and variant."""
    passed = sum(failure(result) is None for result in found.values())
    lines = [
        f"{passed} of {len(CASES)} engines give what they should. Errors are relative to the largest value that the original "
        "gives: of the engine against the original, of the format alone (the lowered model on ONNX Runtime against the "
        "original), and of the engine against ONNX Runtime in the same format (median and largest).",
        "",
        "| export | variant | parsed, built | build s | tokens | max error | format error | median to ORT | max to ORT | graphs | outcome |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for export, variant in CASES:
        result = found.get((export, variant))
        if result is None:
            lines.append(f"| {export} | {variant} | | | | | | | | | not run |")
            continue
        built = f"{result['build_seconds']:.1f}" if "build_seconds" in result else ""
        numbers = [
            f"{result[key]:.1e}" if key in result else ""
            for key in ("max_error", "format_error", "between_median", "between_max")
        ]
        recorded = result.get("graphs", "")
        graphs = "refused" if recorded is None else str(recorded)
        outcome = (failure(result) or "equal").replace("|", "/")
        cells = (
            export,
            variant,
            "yes" if built else "no",
            built,
            str(result.get("tokens", "")),
            *numbers,
            graphs,
            outcome,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("export", "variant"), CASES or [pytest.param("none", "none")])
def test_engine_gives_what_the_original_gives(
    export: str, variant: str, results: dict[tuple[str, str], Result]
) -> None:
    result = results.get((export, variant))
    if result is None:
        pytest.skip(f"not begun within {SECONDS:.0f} s")
    reason = failure(result)
    if reason is not None:
        pytest.fail(reason, pytrace=False)


@pytest.mark.cpu
def test_a_case_fails_where_it_ended_or_where_tokens_differ() -> None:
    done: Result = {
        "export": "x",
        "variant": "fp8",
        "stage": "done",
        "half": False,
        "sparse": False,
        "build_seconds": 2.0,
        "tokens": 10,
        "max_error": 0.5,
        "format_error": 0.6,
        "between": [0.01] * 9 + [0.5],
        "between_median": 0.01,
        "between_max": 0.5,
        "worst_session": "s",
        "graphs": 2,
    }
    assert failure(done) is None
    two = done | {"between": [0.01] * 8 + [0.5] * 2}
    assert "2 of 10 tokens differ" in str(failure(two))
    assert failure(two | {"sparse": True}) is None
    assert "1 of 10 tokens differ" in str(failure(done | {"variant": "f32", "between": [1e-6] * 9 + [1e-3]}))
    assert "not finite in 's'" in str(failure(done | {"max_error": math.inf}))
    assert failure({"stage": "build", "error": "no", "variant": "f32"}) == "build: no"
    lines = table({("x", "fp8"): done}).splitlines()
    assert len(lines) == 4 + len(CASES)
