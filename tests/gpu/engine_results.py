"""What became of the engines: judged, kept in files while the run goes on, and carried over to later runs.

A run on a GPU may end before all engines were tried, or be killed. So `Results` writes its files after every case, and a
later run begins with those of an earlier one: cases that gave what they should are not run again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from engine_sessions import HALF_OUTLIERS, HALF_TOLERANCE, ROOT, VARIANTS

from mla_trt.plugins.library import find_library

Result = dict[str, Any]
Case = tuple[str, str]
"""An export and a variant."""


def interleaved(cases: Iterable[Case]) -> list[Case]:
    """The cases in an order whose beginning has something of everything: exports of all families (what stands before
    "__") take turns, and so do the variants within a family."""
    families: dict[str, dict[str, list[Case]]] = defaultdict(lambda: defaultdict(list))
    for case in sorted(cases):
        families[case[0].split("__")[0]][case[0]].append(case)
    queues = []
    for index, exports in enumerate(families.values()):
        turned = [_turned(found, index + place) for place, found in enumerate(exports.values())]
        queues.append([case for turn in zip_longest(*turned) for case in turn if case is not None])
    return [case for turn in zip_longest(*queues) for case in turn if case is not None]


def _turned(cases: list[Case], by: int) -> list[Case]:
    by %= len(cases)
    return cases[by:] + cases[:by]


def kernels_commit() -> str:
    """Names the kernels that are tested: the last commit that changed them, or else a hash of the library."""
    command = ["git", "log", "-1", "--format=%h", "--", "plugins"]
    try:
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    return commit or hashlib.sha256(find_library().path.read_bytes()).hexdigest()[:8]


MADE_BY = """
Made by `python -m pytest tests/gpu/test_engines.py` from the records of `tests/gpu/prepare_engines.py`; `kernels` is the commit of the
kernels' sources that an engine ran with.
"""


class Results:
    """Results of the cases, in files that are whole at any time.

    Args:
        cases: all cases.
        folder: of the files, engines.json and engines.md.
        kernels: names the kernels that new results are of.
        say: is told of every result, in one line.
    """

    def __init__(self, cases: Sequence[Case], folder: Path, kernels: str, say: Callable[[str], None]) -> None:
        self.found: dict[Case, Result] = {}
        self._cases = cases
        self._folder = folder
        self._kernels = kernels
        self._say = say
        self._started = time.monotonic()
        self._lock = threading.Lock()

    def load(self, path: Path) -> None:
        """Takes over what an earlier run wrote."""
        for result in json.loads(path.read_text()):
            self.found[result["export"], result["variant"]] = result

    def remaining(self) -> list[Case]:
        """The cases to run, in order: those without a result, then those that failed."""
        order = interleaved(self._cases)
        failed = [case for case in order if case in self.found and failure(self.found[case]) is not None]
        return [case for case in order if case not in self.found] + failed

    def add(self, case: Case, result: Result) -> None:
        """Takes a result and writes the files."""
        with self._lock:
            self.found[case] = result | {"kernels": self._kernels}
            self.write()
            outcome = failure(result) or f"equal, {result['max_error']:.1e}"
            done, seconds = sum(case in self.found for case in self._cases), time.monotonic() - self._started
            taken = f" in {result['seconds']:.0f} s" if "seconds" in result else ""
            self._say(f"{seconds:4.0f} s  {done}/{len(self._cases)}  {case[0]} {case[1]}{taken}: {outcome[:160]}")

    def write(self) -> None:
        """Writes the files as they are now."""
        self._folder.mkdir(parents=True, exist_ok=True)
        found = [self.found[case] for case in sorted(self.found)]
        _replace(self._folder / "engines.json", "[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
        _replace(self._folder / "engines.md", table(self._cases, self.found) + MADE_BY)


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}")
    draft.write_text(text)
    os.replace(draft, path)


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


def table(cases: Sequence[Case], found: dict[Case, Result]) -> str:
    """One line for each export and variant."""
    passed = sum(case in found and failure(found[case]) is None for case in cases)
    lines = [
        f"{passed} of {len(cases)} engines give what they should. Errors are relative to the largest value that the original "
        "gives: of the engine against the original, of the format alone (the lowered model on ONNX Runtime against the "
        "original), and of the engine against ONNX Runtime in the same format (median and largest).",
        "",
        "| export | variant | parsed, built | build s | tokens | max error | format error | median to ORT | max to ORT | graphs "
        "| kernels | outcome |",
        "|" + "---|" * 12,
    ]
    for case in cases:
        result = found.get(case)
        if result is None:
            lines.append("| " + " | ".join(case) + " |" + " |" * 9 + " not run |")
            continue
        built = f"{result['build_seconds']:.1f}" if "build_seconds" in result else ""
        numbers = [
            f"{result[key]:.1e}" if key in result else ""
            for key in ("max_error", "format_error", "between_median", "between_max")
        ]
        recorded = result.get("graphs", "")
        cells = (
            *case,
            "yes" if built else "no",
            built,
            str(result.get("tokens", "")),
            *numbers,
            "refused" if recorded is None else str(recorded),
            result.get("kernels", ""),
            (failure(result) or "equal").replace("|", "/"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
