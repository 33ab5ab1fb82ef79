"""The steps of validate.py: each in its time, and what was seen is written whatever comes later."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import validate

from mla_trt.cuda import NoGpuError

pytestmark = pytest.mark.cpu


def step(program: str) -> list[str]:
    return [sys.executable, "-c", program]


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "about", lambda: "a GPU")


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


def test_a_step_whose_tests_are_all_skipped_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = tmp_path / "test_nothing.py"
    test.write_text("import pytest\n\ndef test_it():\n    pytest.skip('no record')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    monkeypatch.setattr(validate, "STEPS", {"skips": command})
    assert validate.main(["-o", str(tmp_path), "skips"]) == 1
    assert outcomes(tmp_path) == {"skips": "failed"}
    test.write_text("def test_it():\n    pass\n")
    assert validate.main(["-o", str(tmp_path), "skips"]) == 0


def test_results_go_to_the_steps_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import pathlib, sys; pathlib.Path(sys.argv[1], 'made').touch()"
    monkeypatch.setattr(validate, "STEPS", {"kernels": [*step(program), validate.FOLDER]})
    assert validate.main(["-o", str(tmp_path), "kernels"]) == 0
    assert (tmp_path / "kernels" / "made").exists()


def test_nothing_begins_without_what_a_step_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> str:
        raise NoGpuError("there is no NVIDIA driver on this machine")

    for variable in validate.NEEDED.values():
        monkeypatch.delenv(variable, raising=False)
    for name, variable in validate.NEEDED.items():
        with pytest.raises(SystemExit, match="2"):
            validate.main(["-o", str(tmp_path / "out"), "cases", name])
        assert f"{name} needs ${variable}" in capsys.readouterr().err
    monkeypatch.setattr(validate, "about", missing)
    with pytest.raises(SystemExit, match="2"):
        validate.main(["-o", str(tmp_path / "out"), "cases"])
    assert "no NVIDIA driver" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_times_are_shared() -> None:
    assert validate.shares(["cases", "memcheck:100", "kernels"], 500) == {"cases": 200, "memcheck": 100, "kernels": 200}
    for steps, reason in (
        (["case"], "no step 'case'"),
        (["cases:x"], "a number of seconds"),
        (["cases:600"], "more than --seconds"),
    ):
        with pytest.raises(SystemExit, match=reason):
            validate.shares(steps, 500)


def test_what_a_sanitizer_says_behind_the_tests_does_not_hide_that_they_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = tmp_path / "test_one.py"
    test.write_text("def test_it():\n    pass\n")
    command = f"{sys.executable} -m pytest -q -p no:cacheprovider {test}; echo ========= ERROR SUMMARY: 0 errors"
    monkeypatch.setattr(validate, "STEPS", {"memcheck": ["sh", "-c", command, "pytest"]})
    assert validate.main(["-o", str(tmp_path), "memcheck"]) == 0
    table = (tmp_path / "validation.md").read_text()
    assert "| memcheck | passed |" in table
    assert "1 passed in" in table
    assert "ERROR SUMMARY: 0 errors" in table


def test_a_step_runs_in_parts_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = Path(__file__).with_name("conftest.py")
    (tmp_path / "conftest.py").write_text(
        f"import importlib.util, sys\nsys.path.append({str(hooks.parent)!r})\n"
        f"found = importlib.util.spec_from_file_location('hooks', {str(hooks)!r})\n"
        "hooks = importlib.util.module_from_spec(found)\n"
        "found.loader.exec_module(hooks)\n"
        "pytest_addoption, pytest_collection_modifyitems = hooks.pytest_addoption, hooks.pytest_collection_modifyitems\n"
    )
    cases = [f"def test_{i}():\n    assert {i} != wrong\n" for i in range(10)]
    test = tmp_path / "test_ten.py"
    test.write_text("wrong = -1\n" + "\n".join(cases))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test), "--part", validate.PART]
    monkeypatch.setattr(validate, "STEPS", {"memcheck": command})
    monkeypatch.setattr(validate, "PARTS", 3)
    assert validate.main(["-o", str(tmp_path / "out"), "memcheck"]) == 0
    assert "| memcheck | passed |" in (tmp_path / "out" / "validation.md").read_text()
    assert "10 passed in 3 processes" in (tmp_path / "out" / "validation.md").read_text()
    for part, count in ((1, 4), (2, 3), (3, 3)):
        assert f"{count} passed, {10 - count} deselected" in (tmp_path / "out" / f"memcheck-{part}.log").read_text()
    test.write_text("wrong = 4\n" + "\n".join(cases))
    assert validate.main(["-o", str(tmp_path / "out"), "memcheck"]) == 1
    table = (tmp_path / "out" / "validation.md").read_text()
    assert "| memcheck | failed |" in table
    assert "9 passed in 3 processes; memcheck-2: 1 failed, 2 passed" in table
