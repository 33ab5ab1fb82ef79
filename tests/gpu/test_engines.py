"""Every lowered export as a TensorRT engine: it parses, builds, and gives the original's results.

    python tests/gpu/prepare_engines.py EXPORTS -o build/engines       # once, without a GPU
    python -m pytest tests/gpu/test_engines.py                         # with one

$MLA_TRT_ENGINES names the folder of the records (default: build/engines; its archive build/engines.tar.xz will do),
$MLA_TRT_VARIANTS the variants (default: all), $MLA_TRT_SECONDS the time after which no case is begun any more (default:
270). The table is written to $OUT/engines.md (default: build/engines.md), everything that was measured to engines.json
beside it, both after every case. $MLA_TRT_RESULTS names the engines.json of an earlier run: what passed there is kept and
not run again.

Builds of small models wait rather than compute. Processes take turns on a GPU, so that each of many waits longer for
every tactic that it times: $MLA_TRT_WORKERS (default: 4) do, on the GPUs of $CUDA_VISIBLE_DEVICES in turn (default: 0).
$MLA_TRT_LEVEL is the level of optimisation; at 0 (the default) TensorRT times nothing. At others the first engine of each
variant is built alone, to fill the timing cache that all of them share.
"""

from __future__ import annotations

import functools
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
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import pytest
from engine_results import Case, Result, Results, failure, interleaved, kernels_commit, table
from engine_sessions import ROOT, VARIANTS, records_folder

pytestmark = pytest.mark.engines

RECORDS = records_folder()
OUT = Path(os.environ.get("OUT", ROOT / "build"))
CHOSEN = os.environ.get("MLA_TRT_VARIANTS", ",".join(VARIANTS)).split(",")
WORKERS = int(os.environ.get("MLA_TRT_WORKERS", 4))
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
LEVEL = int(os.environ.get("MLA_TRT_LEVEL", 0))
SECONDS = float(os.environ.get("MLA_TRT_SECONDS", 270))
EARLIER = os.environ.get("MLA_TRT_RESULTS")
CASE_SECONDS = 400  # a Kimi Linear takes 140 s to build on a quiet machine
RESULT = "RESULT "

EXPORTS = sorted(path.parent.name for path in RECORDS.glob("*/sessions.json"))


def _exports_of(variant: str) -> list[str]:
    starts = VARIANTS[variant].exports
    first = [next((name for name in EXPORTS if name.startswith(start)), None) for start in starts]
    return [name for name in first if name is not None] if starts else EXPORTS


CASES = [(export, variant) for variant in CHOSEN for export in _exports_of(variant)]


def _reason() -> str | None:
    """Why nothing can be run here."""
    from mla_trt.cuda import NoGpuError, find_gpu
    from mla_trt.engines.tensorrt_api import load_tensorrt
    from mla_trt.errors import MlaTrtError

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

    def __init__(
        self,
        cases: queue.SimpleQueue[Case],
        gpu: str,
        scratch: Path,
        deadline: float,
        done: Callable[[Case, Result], None],
    ) -> None:
        self._cases = cases
        self._environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        self._scratch = scratch
        self._deadline = deadline
        self._done = done
        self._process: subprocess.Popen[str] | None = None
        self._messages = tempfile.NamedTemporaryFile("w+", dir=scratch, suffix=".stderr")  # noqa: SIM115

    def run(self) -> None:
        """Until there are no more cases, or no more time."""
        while time.monotonic() < self._deadline:
            try:
                case = self._cases.get_nowait()
            except queue.Empty:
                break
            self._done(case, self._run_case(*case))
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait(timeout=30)

    def _run_case(self, export: str, variant: str) -> Result:
        if self._process is None:
            command = [sys.executable, str(Path(__file__).with_name("engine_worker.py")), str(self._scratch)]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._messages,
                text=True,
                cwd=ROOT,
                env=self._environment,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(CASE_SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(
                json.dumps({"folder": str(RECORDS / export), "variant": variant, "level": LEVEL}) + "\n"
            )
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


def _run(cases: Sequence[Case], workers: int, scratch: Path, deadline: float, results: Results) -> None:
    """Runs cases in processes beside each other."""
    waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in cases:
        waiting.put(case)
    threads = [
        threading.Thread(target=_Worker(waiting, GPUS[index % len(GPUS)], scratch, deadline, results.add).run)
        for index in range(min(workers, len(cases)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@functools.cache
def _nodes(export: str) -> int:
    """Of its model: the more there are, the longer TensorRT builds, and the longest build should not begin last."""
    return len(onnx.load(RECORDS / export / "model.onnx", load_external_data=False).graph.node)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[Case, Result]:
    """What became of every case."""
    reason = _reason()
    if reason is not None:
        pytest.skip(reason)
    found = Results(CASES, OUT, kernels_commit(), lambda line: print(line, flush=True))
    if EARLIER:
        found.load(Path(EARLIER))
    cases = found.remaining()
    deadline = time.monotonic() + SECONDS
    shown = request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled
    with shown(), tempfile.TemporaryDirectory() as scratch:
        print(f"\n{len(CASES) - len(cases)} of {len(CASES)} engines passed before", flush=True)
        if LEVEL > 0:
            first = list({variant: (export, variant) for export, variant in reversed(cases)}.values())
            _run(first, 1, Path(scratch), deadline, found)
            cases = [case for case in cases if case not in first]
        cases = sorted(cases, key=lambda case: -_nodes(case[0]))
        _run(cases, WORKERS, Path(scratch), deadline, found)
    found.write()
    return found.found


@pytest.mark.parametrize(("export", "variant"), CASES or [pytest.param("none", "none")])
def test_engine_gives_what_the_original_gives(export: str, variant: str, results: dict[Case, Result]) -> None:
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
    lines = table([("x", "fp8"), ("y", "f32")], {("x", "fp8"): done}).splitlines()
    assert lines[0].startswith("1 of 2 engines")
    assert lines[4].endswith("| equal |")
    assert lines[5].endswith("| not run |")
    assert len({line.count("|") for line in lines[2:]}) == 1


@pytest.mark.cpu
def test_the_first_cases_have_something_of_everything() -> None:
    exports = ["a__1", "a__2", "a__3", "a__4", "b__1", "c__1", "c__2"]
    cases = [(export, variant) for variant in VARIANTS for export in exports]
    order = interleaved(cases)
    assert sorted(order) == sorted(cases)
    assert {export[0] for export, _ in order[:3]} == {"a", "b", "c"}
    assert len({variant for _, variant in order[:3]}) == 3
    of_a = [case for case in order if case[0][0] == "a"]
    assert [export for export, _ in of_a[:4]] == exports[:4]
    assert len({variant for _, variant in of_a[:3]}) == 3


@pytest.mark.cpu
def test_results_are_kept_from_run_to_run(tmp_path: Path) -> None:
    cases = [("x", "f32"), ("y", "f32"), ("z", "f32")]
    passed: Result = {"stage": "done", "half": False, "sparse": False, "max_error": 1e-6, "between": [1e-6]}
    lines: list[str] = []
    first = Results(cases, tmp_path, "1234567", lines.append)
    assert first.remaining() == cases
    first.add(cases[0], {"export": "x", "variant": "f32", **passed})
    first.add(cases[1], {"export": "y", "variant": "f32", "stage": "build", "error": "no"})
    assert lines[0].endswith("1/3  x f32: equal, 1.0e-06")
    assert lines[1].endswith("2/3  y f32: build: no")
    second = Results(cases, tmp_path, "89abcde", lines.append)
    second.load(tmp_path / "engines.json")
    assert second.remaining() == [cases[2], cases[1]]
    second.add(cases[1], {"export": "y", "variant": "f32", **passed})
    kept = {entry["export"]: entry["kernels"] for entry in json.loads((tmp_path / "engines.json").read_text())}
    assert kept == {"x": "1234567", "y": "89abcde"}
    assert "| z | f32 |" in (tmp_path / "engines.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engines.json", "engines.md"]
