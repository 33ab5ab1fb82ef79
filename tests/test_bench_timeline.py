"""`mla-trt bench layer --timeline`: steps out of a profiler's trace. The traces have the form that torch 2.9's has."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla_trt.bench import timeline
from mla_trt.bench.timeline import CALLS, LAUNCHES, Kernel, Timeline, kernels_of, median_step, short_name, trace
from mla_trt.cli import main
from mla_trt.errors import MlaTrtError, UsageError

ATTEND = (
    "void mla::(anonymous namespace)::attend_hopper_fp8_kernel<mla::hopper::Form<64, 1, (mla::hopper::Keys)0, false> >"
    "(CUtensorMap_st, CUtensorMap_st, CUtensorMap_st, mla::Attend, mla::Partials)"
)
PLAN = "mla::(anonymous namespace)::plan_kernel(int const*, int const*, long)"


def event(
    name: str, begin: float, us: float, grid: tuple[int, ...] = (4, 2, 1), kind: str = "kernel"
) -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": us, "args": {"grid": list(grid)}}


def step_events(start: float, late: float = 0.0) -> list[dict[str, Any]]:
    """Of a step that begins at `start`; what is behind its first kernel is `late`."""
    return [
        event(PLAN, start, 3.0, (2, 1, 1)),
        event(ATTEND, start + 2.0 + late, 10.0),
        event(PLAN, start + 14.0 + late, 1.0, (1, 1, 1)),
    ]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (ATTEND, "attend_hopper_fp8_kernel<Form<64, 1, (Keys)0, false>>"),
        (PLAN, "plan_kernel"),
        (
            "void mla::(anonymous namespace)::linear_codes_kernel<mla::(anonymous namespace)::CodesBlock<16, 3> >(int)",
            "linear_codes_kernel<CodesBlock<16, 3>>",
        ),
        ("__myl_MovResSli_0xa4b43cad00dc0a6e8d8943f52fc3202b_com", "__myl_MovResSli_com"),
        ("sm90_xmma_gemm_bf16bf16_execute_kernel_trt", "sm90_xmma_gemm_bf16bf16_execute_kernel_trt"),
    ],
)
def test_names(name: str, short: str) -> None:
    assert short_name(name) == short


def test_what_runs_on_the_gpu() -> None:
    events = [
        event("Memcpy DtoD", 7.0, 1.0, (), "gpu_memcpy") | {"args": {"bytes": 4}},
        event("cudaGraphLaunch", 1.0, 2.0, kind="cuda_runtime"),
        event(PLAN, 5.0, 1.5, (3, 2, 2)),
        {"ph": "s", "cat": "ac2g", "name": "flow", "ts": 4},
    ]
    assert kernels_of(events) == [Kernel("plan_kernel", 12, 5.0, 6.5), Kernel("Memcpy DtoD", 0, 7.0, 8.0)]


def test_the_first_launch_of_a_call_does_not_count() -> None:
    kernels = []
    for number in range(6):  # two calls of three
        kernels += kernels_of(step_events(100.0 * number, late=50.0 if number % 3 == 0 else number))
    first, attend, last = median_step(kernels, 2, 3)
    assert first == Kernel("plan_kernel", 2, 0.0, 3.0)
    assert attend == Kernel("attend_hopper_fp8_kernel<Form<64, 1, (Keys)0, false>>", 8, 5.0, 15.0)  # of 1, 2, 4, 5 late
    assert last == Kernel("plan_kernel", 1, 17.0, 18.0)


def test_kernels_beside_each_other_may_begin_in_any_order() -> None:
    kernels = []
    for number in range(4):
        swapped = number % 2
        start = 100.0 * number
        kernels += kernels_of(
            [event("a", start, 1.0), event("b", start + 2 + swapped, 5.0), event("c", start + 2.5, 4.0)]
        )
    assert [(kernel.name, kernel.begin) for kernel in median_step(kernels, 1, 4)] == [
        ("a", 0.0),
        ("c", 2.5),
        ("b", 3.0),
    ]


@pytest.mark.parametrize(
    "lose",
    [
        lambda kernels: kernels[:-1],
        lambda kernels: [],
        lambda kernels: [*kernels[:-1], Kernel("another", 1, kernels[-1].begin, kernels[-1].end)],
    ],
)
def test_lost_kernels_are_no_timeline(lose: Callable[[list[Kernel]], list[Kernel]]) -> None:
    kernels = [kernel for number in range(4) for kernel in kernels_of(step_events(100.0 * number))]
    with pytest.raises(MlaTrtError, match="not the same ones of each"):
        median_step(lose(kernels), 2, 2)


class Profiler:
    """As `torch.profiler`; what is launched under it takes 100 us."""

    ProfilerActivity = types.SimpleNamespace(CUDA="cuda")

    def __init__(self) -> None:
        self.launched = 0
        self.events: list[dict[str, Any]] | None = None

    def profile(self, activities: list[str]) -> Profiler:
        assert activities == ["cuda"]
        return self

    def __enter__(self) -> Profiler:
        self.events = []
        return self

    def __exit__(self, *_: object) -> None: ...

    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_text(json.dumps({"traceEvents": self.events}))

    def launch(self, count: int) -> float:
        for _ in range(count):
            if self.events is not None:
                self.events += step_events(100.0 * self.launched)
            self.launched += 1
        return 100.0


def test_a_trace() -> None:
    profiler = Profiler()
    kernels = trace(profiler, profiler.launch)
    assert [kernel.begin for kernel in kernels] == [0.0, 2.0, 14.0]
    assert profiler.launched == LAUNCHES * (CALLS + 1)  # the first ones warm


TIMELINE = Timeline("b4-32k", "ours fp8:1", (Kernel("a|b", 12, 0.0, 3.25), Kernel("copy", 0, 2.0, 4.0)))


def test_tables_and_files(tmp_path: Path) -> None:
    timeline.write_timelines(tmp_path, "mla-trt bench layer --timeline", [TIMELINE])
    text = (tmp_path / "timeline.md").read_text()
    assert text.startswith("    mla-trt bench layer --timeline\n\n")
    assert "## b4-32k, ours fp8:1\n" in text
    assert "| 0.0 | 3.2 | 3.2 | 12 | `a\\|b` |\n| 2.0 | 4.0 | 2.0 |  | `copy` |\n" in text
    content = json.loads((tmp_path / "timeline.json").read_text())
    assert content["timelines"][0]["kernels"][0] == {"name": "a|b", "blocks": 12, "begin": 0.0, "end": 3.25}


def test_the_plot(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    timeline.plot(importlib.import_module("matplotlib.pyplot"), tmp_path / "timeline.png", [TIMELINE, TIMELINE])
    assert (tmp_path / "timeline.png").stat().st_size > 5000


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(timeline.importlib, "import_module", missing)
    with pytest.raises(UsageError, match="--timeline needs torch"):
        timeline.load_profiler()


def test_it_is_of_the_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--timeline"]) == 2
    assert "'mla-trt bench layer' shows" in capsys.readouterr().err


def test_the_process_ends_with_what_was_printed() -> None:
    code = "import atexit, mla_trt.bench.timeline as t; atexit.register(print, 'late'); print('done'); t.end_process(4)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (4, "done\n")
