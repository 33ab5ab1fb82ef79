"""What the GPU tests share: the package from a bare source tree, a GPU or a skip, and a summary of what was measured."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent.parent
# op_harness; what stands for a GPU; mla_trt, where it is not installed
sys.path[:0] = [str(TESTS / "ops"), str(TESTS / "emulator"), str(TESTS), str(TESTS.parent)]


import harness  # noqa: E402
from emulated_gpu import EmulatedGpu  # noqa: E402

from mla_trt.cuda import CudaError, NoGpuError, check_usable, find_gpu  # noqa: E402
from mla_trt.errors import MlaTrtError  # noqa: E402
from mla_trt.plugins.library import KERNELS, find_library  # noqa: E402
from mla_trt.plugins.toolchain import find_nvcc  # noqa: E402

_lost: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("GPU tests")
    group.addoption("--results", type=Path, help="folder for gpu-tests.json and gpu-tests.md (default: $OUT, if set)")
    group.addoption(
        "--no-guards", action="store_true", help="allocate exactly the tensors' bytes, for compute-sanitizer to watch"
    )
    group.addoption(
        "--emulator", action="store_true", help="run all kernels on this CPU, slowly, not the small cases alone"
    )
    group.addoption(
        "--early", action="store_true", help="what the emulator else does as late as it may, it does at once"
    )
    group.addoption("--portable", action="store_true", help="the emulated GPU has no kernels of its own architecture")
    group.addoption("--part", metavar="I/N", help="only every N-th case, from the I-th on: parts run beside each other")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu: runs without a GPU")
    config.addinivalue_line("markers", "engines: has engines, and says itself what it lacks: of ours the plugins alone")
    config.addinivalue_line("markers", "small: small enough for compute-sanitizer and the emulator")
    config.addinivalue_line("markers", "multiprocessors(count): of the emulated GPU; how work is cut depends on it")
    if config.getoption("--no-guards"):
        harness.guard_bytes = 0


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """By now only the cases are left that -m and -k choose."""
    part = config.getoption("--part")
    if part is None:
        return
    number, slash, count = part.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise pytest.UsageError(f"--part {part}: it is I/N, as 1/12")
    chosen = items[int(number) - 1 :: int(count)]
    kept = {id(item) for item in chosen}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = chosen


@functools.cache
def _has_gpu() -> bool:
    try:
        find_gpu()
    except NoGpuError:
        return False
    return True


@functools.cache
def _why_not() -> str | None:
    """Why the cases cannot run on a GPU."""
    try:
        check_usable()
        find_library(name=KERNELS)
    except MlaTrtError as error:
        return str(error)
    return None


@functools.cache
def _emulated_gpu(early: bool, portable: bool) -> EmulatedGpu | str:
    """Or why there is none."""
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        return "kernels run on a CPU only on x86-64 (with AVX2) and where g++ is installed"
    try:
        find_nvcc()  # CUDA's headers are beside it
    except MlaTrtError as error:
        return str(error)
    return EmulatedGpu(early=early, hopper=not portable)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cpu") is not None:
        return
    engines = item.get_closest_marker("engines") is not None
    emulate = item.config.getoption("--emulator") and not engines
    if not emulate and not engines and (reason := _why_not()) is not None:
        # where there is a GPU, a library that is missing must not be stood in for
        if _has_gpu() or item.get_closest_marker("small") is None:
            pytest.skip(reason)
        emulate = True
    if emulate:
        gpu = _emulated_gpu(item.config.getoption("--early"), item.config.getoption("--portable"))
        if isinstance(gpu, str):
            pytest.skip(gpu)
        size = item.get_closest_marker("multiprocessors")
        gpu.install(*(size.args if size is not None else ()))
        harness.emulated = gpu.library
        item.user_properties.append(("emulated", True))
    if _lost:
        pytest.skip(f"{_lost[0]} broke the GPU's context: run the rest without it (--deselect)")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if harness.emulated is not None:
        harness.emulated = None
        gpu = _emulated_gpu(item.config.getoption("--early"), item.config.getoption("--portable"))
        assert isinstance(gpu, EmulatedGpu)
        gpu.remove()


@pytest.fixture(autouse=True)
def _measurements(request: pytest.FixtureRequest) -> Iterator[None]:
    harness.record_to(request.node.user_properties)
    yield
    harness.record_to([])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    if outcome.excinfo is not None and issubclass(outcome.excinfo[0], CudaError):
        _lost.append(item.nodeid)


def _reports(terminalreporter: Any) -> list[pytest.TestReport]:
    return [
        report
        for key in ("passed", "failed", "error")
        for report in terminalreporter.stats.get(key, [])
        if isinstance(report, pytest.TestReport) and "tests/gpu/" in report.nodeid.replace(os.sep, "/")
    ]


def _message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join((crash.message if crash else str(report.longrepr)).split())[:600]


def _is_emulated(report: pytest.TestReport) -> bool:
    return any(name == "emulated" for name, _ in report.user_properties)


def _worst(report: pytest.TestReport) -> dict[str, Any] | None:
    """The comparison of a test that came nearest to its tolerance, or went farthest beyond it."""
    measured = [value for name, value in report.user_properties if name == "measured" and value["tolerance"] > 0]
    return max(measured, key=lambda value: value["error"] / value["tolerance"], default=None)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = _reports(terminalreporter)
    if not any(report.user_properties for report in reports) and not any(report.failed for report in reports):
        return
    failed = [report for report in reports if report.failed]
    if failed:
        terminalreporter.section("failed GPU cases")
    for report in failed:
        terminalreporter.write_line(f"{report.nodeid.rpartition('/')[2]}: {_message(report)}")
    folder = config.getoption("--results") or os.environ.get("OUT")
    if not folder:
        return
    results = [
        {
            "case": report.nodeid,
            "outcome": report.outcome,
            "emulated": _is_emulated(report),
            "seconds": round(report.duration, 3),
            "message": _message(report) if report.failed else "",
            "measured": [value for name, value in report.user_properties if name == "measured"],
        }
        for report in reports
    ]
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "gpu-tests.json").write_text(json.dumps(results, indent=1))
    (Path(folder) / "gpu-tests.md").write_text(_markdown(reports))


def _markdown(reports: list[pytest.TestReport]) -> str:
    failed = sum(report.failed for report in reports)
    emulated = sum(map(_is_emulated, reports))
    lines = [f"{len(reports) - failed} cases passed, {failed} failed; {emulated} of all on an emulated GPU.", ""]
    lines += ["| case | outcome | worst comparison | error / tolerance | s |", "|---|---|---|---|---|"]
    for report in sorted(reports, key=lambda report: (report.passed, report.nodeid)):
        worst = _worst(report)
        what = "" if worst is None else worst["what"]
        ratio = "" if worst is None else f"{worst['error']:.2e} / {worst['tolerance']:.2e}"
        outcome = "passed" if report.passed else f"failed: {_message(report)}"
        cells = (report.nodeid.rpartition("/")[2], outcome, what, ratio, f"{report.duration:.2f}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
