"""What `mla-trt bench layer` finds, and how it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mla_trt.bench.layer_step import OURS, SPARSE
from mla_trt.bench.timeline import Timeline, write_timelines
from mla_trt.writing import folder_written_whole, write_json


@dataclass(frozen=True)
class FormResult:
    """One form of the layer in one case.

    Attributes:
        case, batch, keys: the case.
        form: the form; ours has its row format behind it.
        error: relative (Frobenius) error of the checked sequences.
        us: median of a step.
        spread: (slowest - fastest) / median of the rounds.
        of_copy: the time that the least bytes take at the speed of a device copy, over the time taken.
        build_seconds: what its engine took to build.
        note: why there are no figures.
    """

    case: str
    batch: int
    keys: int
    form: str
    error: float | None = None
    us: float | None = None
    spread: float | None = None
    of_copy: float | None = None
    build_seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Machine:
    """Where it was measured.

    Attributes:
        gpu: its name.
        copy: bytes/s of a device copy, read and written.
        tensorrt: version.
        command: that was given.
    """

    gpu: str
    copy: float
    tensorrt: str
    command: str


def markdown(machine: Machine, results: Sequence[FormResult]) -> str:
    """The results as a Markdown table under the command and a line about the machine."""
    formats = list(dict.fromkeys(result.form for result in results if result.form.startswith(OURS)))
    ours = {(result.case, result.form): result.us for result in results}
    headings = ("case", "keys", "form", "us", "spread", "of the copy speed", "error", "build s")
    ratios = [f"times as fast: {form}" for form in formats]
    lines = [
        f"    {machine.command}",
        "",
        f"{machine.gpu}, copy {machine.copy / 1e12:.2f} TB/s, TensorRT {machine.tensorrt}. One attention layer of DeepSeek-V3 (hidden 7168, "
        "128 heads, random weights, bf16), a step that decodes a token for each sequence, in a CUDA graph; medians of alternating rounds. "
        "Of the copy speed: the time that weights and cache rows take at it, over the time taken. With an indexer it is a layer of DeepSeek-V3.2 "
        "(64 index heads, 2048 keys selected), and its column says how many times as fast as the dense layer it is. "
        "`fp8:1` is `fp8` built with `--query-terms 1`; with `/fp8` behind it ours is lowered and built with `--weights fp8`, and the weights of all "
        "forms are such as e4m3 codes stand for.",
        "",
        f"| {' | '.join((*headings, *ratios))} |",
        "|---" * (len(headings) + len(ratios)) + "|",
    ]
    for result in results:
        cells = [result.case, str(result.keys), result.form]
        if result.us is None:
            cells += [result.note.replace("|", "\\|"), *[""] * (4 + len(ratios))]
        else:
            cells += [f"{result.us:.0f}", f"{result.spread or 0:.1%}", f"{result.of_copy or 0:.0%}"]
            cells += [f"{result.error:.1e}", f"{result.build_seconds:.1f}"]
            for form in formats:
                us = ours.get((result.case, form))
                other = not result.form.startswith(OURS) or (
                    form.startswith(SPARSE) and not result.form.startswith(SPARSE)
                )
                cells.append(f"{result.us / us:.2f}" if us and other else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_results(
    folder: Path, machine: Machine, plugins: str, results: Sequence[FormResult], timelines: Sequence[Timeline] = ()
) -> None:
    """`layer.md` and `layer.json`, and the timelines where there are any; all or none."""
    with folder_written_whole(folder) as draft:
        (draft / "layer.md").write_text(markdown(machine, results))
        content = {**asdict(machine), "plugins": plugins, "results": [asdict(result) for result in results]}
        write_json(content, draft / "layer.json")
        if timelines:
            write_timelines(draft, machine.command, timelines)
