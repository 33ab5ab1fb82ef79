"""The steps of validate.py: each in its time, and what was seen is written whatever comes later."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import validate

pytestmark = pytest.mark.cpu


def step(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def outcomes(folder: Path) -> dict[str, str]:
    return {entry["step"]: entry["outcome"] for entry in json.loads((folder / "validation.json").read_text())}


def test_every_step_has_its_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = tmp_path / "late"
    child = f"import pathlib, time; time.sleep(3); pathlib.Path({str(late)!r}).touch()"
    long = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    steps = {
        "good": step("import os, pathlib; pathlib.Path(os.environ['OUT'], 'made').touch(); print('3 passed')"),
        "bad": step("print('1 failed'); raise SystemExit(1)"),
        "long": step(long),
        "missing": ["there-is-no-such-program"],
    }
    monkeypatch.setattr(validate, "STEPS", steps)
    monkeypatch.setattr(validate, "CLOSING_SECONDS", 0.5)
    start = time.monotonic()
    assert validate.main(["-o", str(tmp_path), "good", "bad", "long:1", "missing"]) == 1
    assert time.monotonic() - start < 30
    assert outcomes(tmp_path) == {"good": "passed", "bad": "failed", "long": "ended", "missing": "failed"}
    assert (tmp_path / "good" / "made").exists()
    assert "| good | passed | 0 | 3 passed |" in (tmp_path / "validation.md").read_text()
    time.sleep(2.5)
    assert not late.exists(), "what the step began is ended with it"


def test_what_was_seen_is_there_when_a_later_step_is_not_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "STEPS", {"good": step("print('3 passed')"), "broken": step("")})

    def break_off(name: str, *rest: object) -> validate.Outcome:
        if name == "broken":
            raise KeyboardInterrupt
        return run_step(name, *rest)

    run_step = validate.run_step
    monkeypatch.setattr(validate, "run_step", break_off)
    with pytest.raises(KeyboardInterrupt):
        validate.main(["-o", str(tmp_path), "good", "broken"])
    assert outcomes(tmp_path) == {"good": "passed", "broken": "not run"}


def test_times_are_shared() -> None:
    assert validate.shares(["cases", "memcheck:100", "kernels"], 500) == {"cases": 200, "memcheck": 100, "kernels": 200}
    for steps, reason in (
        (["case"], "no step 'case'"),
        (["cases:x"], "a number of seconds"),
        (["cases:600"], "more than --seconds"),
    ):
        with pytest.raises(SystemExit, match=reason):
            validate.shares(steps, 500)
