"""What `mla-trt bench kernels` finds, and how it is written: a table, JSON and a plot."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches. Matrix products are None without torch.

    Attributes:
        gpu: its name.
        copy: bytes/s of a device copy, read and written.
        bf16, fp8: FLOP/s of a matrix product of 8192.
    """

    gpu: str
    copy: float
    bf16: float | None
    fp8: float | None


@dataclass(frozen=True)
class Result:
    """One case. Times are medians of a launch in us; ``spread`` is (slowest - fastest) / median of the rounds.

    ``note`` says why there is no figure, ``peer_note`` why there is no peer. ``planning_us`` is a peer's time where it makes a plan of the
    sequences' lengths in each launch, as our op does; in ``peer_us`` it has the plan already.
    """

    name: str
    error: float | None = None
    us: float | None = None
    spread: float | None = None
    tflops: float | None = None
    terabytes: float | None = None
    of_ceiling: float | None = None
    peer: str = ""
    peer_us: float | None = None
    ratio: float | None = None
    planning_us: float | None = None
    peer_note: str = ""
    note: str = ""


def markdown(command: str, build: str, ceilings: Ceilings, results: Sequence[Result]) -> str:
    """The results as a Markdown table under the command and a line about the machine and the library: `build` is what it says of itself."""

    def rate(value: float | None) -> str:
        return "not measured" if value is None else f"{value / 1e12:.0f} TFLOP/s"

    lines = [
        f"    {command}",
        "",
        f"{ceilings.gpu}: copy {ceilings.copy / 1e12:.2f} TB/s, matrix product bf16 {rate(ceilings.bf16)}, fp8 {rate(ceilings.fp8)}. "
        f"Kernels: {build}. Times are medians of a launch in a CUDA graph; spread is slowest minus fastest round. Of the ceiling: the time that "
        "the least bytes or operations take at these rates, over the time taken. The peer of an uneven case is a case of ours of an even "
        "shape: how many times as fast then compares their shares of the ceiling. Our attention plans each step in the op; a peer with a plan of "
        "its own has made it before, and in the last column, with how many times as fast as that we are, makes it in each launch.",
        "",
        "| case | us | spread | TFLOP/s | TB/s | of the ceiling | error | peer | peer us | times as fast | with its plan |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        if result.us is None:
            lines.append(f"| {result.name} | {result.note} |" + " |" * 9)
            continue
        cells = (
            result.name,
            f"{result.us:.1f}",
            f"{result.spread or 0:.1%}",
            f"{result.tflops:.0f}",
            f"{result.terabytes:.2f}",
            f"{result.of_ceiling:.0%}",
            f"{result.error:.1e}",
            result.peer or result.peer_note.replace("|", "\\|"),
            "" if result.peer_us is None else f"{result.peer_us:.1f}",
            "" if result.ratio is None else f"{result.ratio:.2f}",
            "" if result.planning_us is None else f"{result.planning_us:.1f}; {result.planning_us / result.us:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_results(folder: Path, command: str, build: str, ceilings: Ceilings, results: Sequence[Result]) -> None:
    """``bench.json`` and ``bench.md``, and ``bench.png`` where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "command": command,
        "build": build,
        "ceilings": asdict(ceilings),
        "results": [asdict(result) for result in results],
    }
    (folder / "bench.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "bench.md").write_text(markdown(command, build, ceilings, results))
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return
    plot(pyplot, folder / "bench.png", results)


def plot(pyplot: Any, path: Path, results: Sequence[Result]) -> None:
    """Bars: how many times as fast as its peer each case is, and the share of the machine's ceiling that it reaches."""
    measured = [result for result in results if result.us is not None]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 1.5 + 0.28 * max(len(measured), 1)), sharey=True)
    names = [result.name for result in measured]
    columns = (
        ("times as fast as the peer", [result.ratio or 0.0 for result in measured]),
        ("share of the machine's ceiling", [result.of_ceiling or 0.0 for result in measured]),
    )
    for axis, (title, values) in zip(axes, columns, strict=True):
        bars = axis.barh(names, values)
        axis.bar_label(bars, [f"{value:.2f}" if value else "" for value in values], padding=3, fontsize=8)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(title)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
