"""What a build is held to on a GPU, one step after the other, each within its time; what was seen stays, whatever comes later.

    python tests/gpu/validate.py -o results cases memcheck racecheck
    python tests/gpu/validate.py -o results --seconds 540 cases:200 engines:300

A step is given as NAME or NAME:SECONDS; without a time it has what --seconds leaves, shared among those that have none. A step that is not
through by then is ended, with all that it began; one that skipped all of its tests has failed. `OUT/NAME.log` is what it said, `OUT/NAME` gets
its results (of a step in several processes `OUT/NAME-1.log` and so on), and
`OUT/validation.md` and `.json` are written anew after each step. Exit status: 1, if any step failed or was ended; 2, if the GPU
or what a step needs is not there, and nothing was begun.

    cases       tests/gpu, without engines
    memcheck    its small cases under compute-sanitizer, which sees the tensors' true ends, in processes beside each other
    racecheck   the same of the portable kernels: $MLA_TRT_PORTABLE is a library of theirs (--arch 90)
    engines     test_engines.py, and faults: test_engine_faults.py
    triton      test_gpu_triton.py
    soak        test_soak.py with $MLA_TRT_SOAK_ENGINE, for $MLA_TRT_SOAK_SECONDS
    kernels     mla-trt bench kernels, and layer: mla-trt bench layer

What each needs: docs/gpu-testing.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS.parent))  # mla_trt, where it is not installed

from mla_trt.cuda import find_gpu  # noqa: E402
from mla_trt.errors import MlaTrtError  # noqa: E402
from mla_trt.plugins.library import KERNELS, find_library  # noqa: E402

GPU_TESTS = str(Path(__file__).parent)
PYTHON = sys.executable
ENGINES = ("test_engines.py", "test_engine_faults.py", "test_gpu_triton.py")
WORKERS = "8"
FOLDER = "FOLDER"  # in a command: where the step's results go
PART = "PART"  # in a command: it runs in processes beside each other, and this becomes the number of one, as I/N
PARTS = 12
"""Processes of such a step: a case under a sanitizer leaves most of a GPU idle."""
VERDICT = r"\b\d+ (passed|failed|skipped|errors?)\b.* in [\d.]+s|ERROR SUMMARY|RACECHECK SUMMARY"
"""The last lines of pytest, and of a sanitizer behind it."""
PASSED = r"\b(\d+) passed\b"
CLOSING_SECONDS = 10
"""After SIGINT, for a step to write what it has."""


def _pytest(*arguments: str) -> list[str]:
    return [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def _sanitized(tool: str, *arguments: str) -> list[str]:
    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "50"]
    engines = (f"--ignore={GPU_TESTS}/{name}" for name in ENGINES)
    return [*sanitizer, *_pytest(GPU_TESTS, "-m", "small", "--no-guards", "--part", PART, *engines, *arguments)]


STEPS: dict[str, list[str]] = {
    "cases": _pytest(GPU_TESTS, "-n", WORKERS, *(f"--ignore={GPU_TESTS}/{name}" for name in ENGINES)),
    "memcheck": _sanitized("memcheck"),
    "racecheck": _sanitized("racecheck", f"--ignore={GPU_TESTS}/test_hopper.py"),
    "engines": _pytest(f"{GPU_TESTS}/test_engines.py"),
    "faults": _pytest(f"{GPU_TESTS}/test_engine_faults.py"),
    "triton": _pytest(f"{GPU_TESTS}/test_gpu_triton.py"),
    "soak": _pytest("-s", f"{TESTS}/test_soak.py"),
    "kernels": [PYTHON, "-m", "mla_trt.bench", "kernels", "-o", FOLDER],
    "layer": [PYTHON, "-m", "mla_trt", "bench", "layer", "-o", FOLDER],
}
NEEDED = {"racecheck": "MLA_TRT_PORTABLE", "soak": "MLA_TRT_SOAK_ENGINE"}
"""Variables without which a step would test something else."""


@dataclass(frozen=True)
class Outcome:
    """``outcome``: passed, failed, ended (at its time) or not run. ``said``: what it ended with."""

    step: str
    outcome: str
    seconds: float = 0.0
    said: str = ""


def run_step(name: str, command: Sequence[str], out: Path, seconds: float) -> Outcome:
    """One step, with all that it begins in process groups of its own."""
    start = time.monotonic()
    parts = [f"{name}-{i + 1}" for i in range(PARTS)] if PART in command else [name]
    runs: list[tuple[str, subprocess.Popen[bytes] | OSError]] = []
    statuses: list[int | None] = []
    try:
        for i, part in enumerate(parts):
            runs.append((part, _begin(name, part, command, f"{i + 1}/{len(parts)}", out)))
        for _, process in runs:
            left = max(start + seconds - time.monotonic(), 0.0)
            try:
                statuses.append(1 if isinstance(process, OSError) else process.wait(left))
            except subprocess.TimeoutExpired:
                statuses.append(None)
    finally:
        for _, process in runs:
            if not isinstance(process, OSError):
                _end(process)
    outcomes = []
    for (part, process), status in zip(runs, statuses, strict=True):
        if isinstance(process, OSError):
            outcomes.append(Outcome(part, "failed", 0.0, str(process)))
        else:
            outcomes.append(_read(part, "pytest" in command, status, out))
    return _joined(name, outcomes, round(time.monotonic() - start, 1))


def _begin(name: str, part: str, command: Sequence[str], number: str, out: Path) -> subprocess.Popen[bytes] | OSError:
    folder = out / part
    folder.mkdir(parents=True, exist_ok=True)
    command = [{FOLDER: str(folder), PART: number}.get(word, word) for word in command]
    environment = {**os.environ, "OUT": str(folder)}
    if name == "racecheck":
        environment["MLA_TRT_KERNELS"] = environment[NEEDED[name]]
    with (out / f"{part}.log").open("w") as text:
        text.write(f"$ {shlex.join(command)}\n")
        text.flush()
        try:
            return subprocess.Popen(
                command, stdout=text, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        except OSError as error:
            return error


def _read(part: str, is_pytest: bool, status: int | None, out: Path) -> Outcome:
    """What a process's log says in the end; ``status``: None where its time was over."""
    log = (out / f"{part}.log").read_text(errors="replace")
    lines = [line.strip("= ") for line in log.splitlines()[1:] if line.strip("= ")]
    verdicts = [line for line in lines[-3:] if re.search(VERDICT, line)] or lines[-1:]
    ran = not is_pytest or any(re.search(PASSED, line) for line in verdicts)
    outcome = "ended" if status is None else "failed" if status or not ran else "passed"
    return Outcome(part, outcome, 0.0, "; ".join(verdicts))


def _joined(name: str, outcomes: Sequence[Outcome], seconds: float) -> Outcome:
    """A step's outcome: that of its worst process."""
    if len(outcomes) == 1:
        return replace(outcomes[0], step=name, seconds=seconds)
    worst = next((kind for kind in ("failed", "ended") if any(entry.outcome == kind for entry in outcomes)), "passed")
    passed = sum(int(found[1]) for entry in outcomes if (found := re.search(PASSED, entry.said)))
    said = [f"{passed} passed in {len(outcomes)} processes"]
    said += [f"{entry.step}: {entry.said}" for entry in outcomes if entry.outcome != "passed"]
    return Outcome(name, worst, seconds, "; ".join(said))


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(CLOSING_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write(outcomes: Sequence[Outcome], about: str, out: Path) -> None:
    """The table, and the same for programs."""
    lines = [about, "", "| step | outcome | s | it said |", "|---|---|---|---|"]
    for entry in outcomes:
        said = entry.said.replace("|", "\\|")
        lines.append(f"| {entry.step} | {entry.outcome} | {entry.seconds:.0f} | {said} |")
    for name, text in (
        ("validation.md", "\n".join(lines) + "\n"),
        ("validation.json", json.dumps([asdict(entry) for entry in outcomes], indent=1) + "\n"),
    ):
        draft = out / f".{name}"
        draft.write_text(text)
        os.replace(draft, out / name)


def about() -> str:
    """The GPU, as the driver names it, and the library under test. Raises MlaTrtError where one is not there."""
    return f"{find_gpu().name}; {find_library(name=KERNELS).path}; {time.strftime('%Y-%m-%d %H:%M')}"


def shares(asked: Sequence[str], seconds: float | None) -> dict[str, float]:
    """Seconds of each step; without a limit a day.

    Raises:
        SystemExit: a step or a time is none.
    """
    given: dict[str, float | None] = {}
    for text in asked:
        name, _, limit = text.partition(":")
        if name not in STEPS:
            raise SystemExit(f"error: there is no step '{name}': choose among {', '.join(STEPS)}")
        try:
            given[name] = float(limit) if limit else None
        except ValueError:
            raise SystemExit(f"error: '{text}': after the colon comes a number of seconds") from None
    left = (seconds if seconds is not None else 86400.0) - sum(limit or 0.0 for limit in given.values())
    free = sum(limit is None for limit in given.values())
    if left < 0 or (free and left <= 0):
        raise SystemExit("error: the steps' times are more than --seconds")
    return {name: left / free if limit is None else limit for name, limit in given.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the steps that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", metavar="NAME[:SECONDS]", help=", ".join(STEPS))
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seconds", type=float, help="for all steps together (default: no limit)")
    options = parser.parse_args(arguments)
    limits = shares(options.steps, options.seconds)
    for name in limits:
        if name in NEEDED and not os.environ.get(NEEDED[name]):
            parser.error(f"{name} needs ${NEEDED[name]}")
    try:
        what = about()
    except MlaTrtError as error:
        parser.error(str(error))
    options.output.mkdir(parents=True, exist_ok=True)
    outcomes = {name: Outcome(name, "not run") for name in limits}
    write(list(outcomes.values()), what, options.output)
    for name, limit in limits.items():
        print(f"{name}: at most {limit:.0f} s", flush=True)
        outcomes[name] = run_step(name, STEPS[name], options.output, limit)
        write(list(outcomes.values()), what, options.output)
        print(f"{name}: {outcomes[name].outcome}, {outcomes[name].seconds:.0f} s: {outcomes[name].said}", flush=True)
    return int(any(entry.outcome != "passed" for entry in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
