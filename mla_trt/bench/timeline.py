"""`mla-trt bench layer --timeline`: when the kernels of a step begin and end, which of them run beside each other, and what they wait for.

CUPTI says so, by way of torch's profiler, of launches of a recorded graph that follow each other. With it a step takes some microseconds
longer: how long steps take, the rounds without it say.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

from mla_trt.errors import MlaTrtError, UsageError
from mla_trt.writing import write_json

CALLS, LAUNCHES = 4, 8  # launches of a call follow each other; the first one follows nothing, and does not count
KINDS = ("kernel", "gpu_memcpy", "gpu_memset")  # of events on the GPU
NAMESPACES = re.compile(r"\(anonymous namespace\)::|\b(?:mla|hopper|linear_tiles)::")
HASH = re.compile(r"_0x[0-9a-f]{8,}")


@dataclass(frozen=True)
class Kernel:
    """A kernel, or a copy on the GPU, of a step.

    Attributes:
        name: the function's, with its template's arguments.
        blocks: of the grid; 0 of a copy.
        begin, end: us; of a step from its first kernel's beginning on.
    """

    name: str
    blocks: int
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The kernels of a step of one form in one case, by their beginnings; medians of several steps."""

    case: str
    form: str
    kernels: tuple[Kernel, ...]


def load_profiler() -> Any:
    """The module `torch.profiler`.

    Raises:
        UsageError: torch is not installed.
    """
    try:
        return importlib.import_module("torch.profiler")
    except (ImportError, OSError) as error:
        raise UsageError(
            f"--timeline needs torch, whose profiler says when kernels run ('pip install torch'): {error}"
        ) from None


def end_process(status: int) -> NoReturn:
    """Ends the process as it is, when all has been written.

    Of seven processes with torch's profiler beside TensorRT 10.6, on an H200, two crashed behind their last line, as none without it did. Where
    is not known.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def trace(profiler: Any, launch: Callable[[int], object]) -> tuple[Kernel, ...]:
    """The kernels of a step.

    Args:
        profiler: the module `torch.profiler`.
        launch: launches the step so many times in a row, and waits for them.

    Raises:
        MlaTrtError: the profiler did not see as many kernels of each launch.
    """
    launch(LAUNCHES)
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(CALLS):
            launch(LAUNCHES)
    with tempfile.TemporaryDirectory(prefix="mla-trt-timeline-") as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return median_step(kernels_of(events), CALLS, LAUNCHES)


def kernels_of(events: Iterable[dict[str, Any]]) -> list[Kernel]:
    """What runs on the GPU of the events of a trace (Chrome's format, times in us), by their beginnings."""
    found = []
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in KINDS:
            blocks = 1
            for size in event.get("args", {}).get("grid", [0]):
                blocks *= int(size)
            begin = float(event["ts"])
            found.append(Kernel(short_name(event["name"]), blocks, begin, begin + float(event["dur"])))
    return sorted(found, key=lambda kernel: kernel.begin)


def median_step(kernels: Sequence[Kernel], calls: int, launches: int) -> tuple[Kernel, ...]:
    """One step of `calls` times `launches`, of which the first of each call does not count.

    Kernels that run beside each other need not begin in the same order in all steps: they are known by their names.

    Raises:
        MlaTrtError: they do not have the same kernels.
    """
    count, rest = divmod(len(kernels), calls * launches)
    steps = [kernels[start * count : (start + 1) * count] for start in range(calls * launches)]
    names = Counter(kernel.name for kernel in steps[0])
    if count == 0 or rest or any(Counter(kernel.name for kernel in step) != names for step in steps):
        raise MlaTrtError(
            f"the profiler saw {len(kernels)} kernels of {calls * launches} launches, and not the same ones of each: no timeline"
        )
    counted = [step for number, step in enumerate(steps) if number % launches]
    columns: dict[tuple[str, int], list[Kernel]] = {}
    for step in counted:
        seen: Counter[str] = Counter()
        for kernel in step:
            first = step[0].begin
            moved = Kernel(kernel.name, kernel.blocks, kernel.begin - first, kernel.end - first)
            columns.setdefault((kernel.name, seen[kernel.name]), []).append(moved)
            seen[kernel.name] += 1
    medians = (
        Kernel(name, same[0].blocks, median(one.begin for one in same), median(one.end for one in same))
        for (name, _), same in columns.items()
    )
    return tuple(sorted(medians, key=lambda kernel: kernel.begin))


def short_name(name: str) -> str:
    """A kernel's name without result, parameters, our namespaces and TensorRT's hashes."""
    name = NAMESPACES.sub("", HASH.sub("", name.removeprefix("void ")))
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:place]
            break
    return name.replace("> >", ">>").strip()


def markdown(timelines: Sequence[Timeline]) -> str:
    """A table for each form."""
    lines = [
        "Kernels of a step, us from the first one's beginning (CUPTI, medians). One that begins before the one above it has ended runs beside it, or "
        "waits for it there.",
    ]
    for timeline in timelines:
        lines += [
            "",
            f"## {timeline.case}, {timeline.form}",
            "",
            "| begin | end | us | blocks | kernel |",
            "|---|---|---|---|---|",
        ]
        for kernel in timeline.kernels:
            name = kernel.name.replace("|", "\\|")
            figures = f"{kernel.begin:.1f} | {kernel.end:.1f} | {kernel.end - kernel.begin:.1f} | {kernel.blocks or ''}"
            lines.append(f"| {figures} | `{name}` |")
    return "\n".join(lines) + "\n"


def write_timelines(folder: Path, command: str, timelines: Sequence[Timeline]) -> None:
    """`timeline.md` and `timeline.json`, and `timeline.png` where matplotlib is installed."""
    (folder / "timeline.md").write_text(f"    {command}\n\n{markdown(timelines)}")
    content = {"command": command, "timelines": [asdict(timeline) for timeline in timelines]}
    write_json(content, folder / "timeline.json")
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return
    plot(pyplot, folder / "timeline.png", timelines)


def plot(pyplot: Any, path: Path, timelines: Sequence[Timeline]) -> None:
    """A bar for each kernel from its beginning to its end, the forms below each other on axes of the same length."""
    heights = [len(timeline.kernels) + 2 for timeline in timelines]
    figure, axes = pyplot.subplots(
        len(timelines),
        1,
        figsize=(14, 0.26 * sum(heights)),
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for axis, timeline in zip(axes[:, 0], timelines, strict=True):
        for row, kernel in enumerate(timeline.kernels):
            color = "tab:gray" if kernel.name.startswith(("__myl", "sm80_", "sm90_")) else "tab:blue"
            axis.barh(row, kernel.end - kernel.begin, left=kernel.begin, color=color)
            axis.text(kernel.end, row, f" {kernel.name[:48]}  {kernel.end - kernel.begin:.1f}", va="center", fontsize=7)
        axis.set_title(f"{timeline.case}, {timeline.form}", fontsize=9, loc="left")
        axis.set_yticks([])
        axis.invert_yaxis()
        axis.margins(x=0.3)
    axes[-1, 0].set_xlabel("us from the first kernel's beginning; gray: TensorRT's own kernels")
    axes[-1, 0].set_xlim(left=0)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
