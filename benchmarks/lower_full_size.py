"""Time and memory of lowering full-size DeepSeek graphs, by number of layers.

Writes each graph with sparse weights, lowers it in a process of its own without verification, and prints a Markdown
table:

    python benchmarks/lower_full_size.py --layers 1 4 16 61 --output benchmarks/results

CPU seconds are those of the process, and tell its own time from that which it waits for others on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console

from mla_trt.models.full_size import KINDS, write_full_size

COMMAND = f"{shlex.quote(sys.executable)} -m mla_trt.cli lower {{model}} -o {{output}} --no-verify"
KIBIBYTE = 1024


@dataclass(frozen=True)
class Measurement:
    """One lowering.

    Attributes:
        kind: the model.
        layers: its layers.
        weight_gigabytes: size of its weights.
        nodes: nodes of the graph.
        lowered_nodes: nodes of the lowered graph; None where there is none.
        seconds: wall-clock time of the whole command.
        cpu_seconds: processor time of the command, of the system on its behalf too.
        peak_gigabytes: its largest resident set.
        exit_status: of the command.
    """

    kind: str
    layers: int
    weight_gigabytes: float
    nodes: int
    lowered_nodes: int | None
    seconds: float
    cpu_seconds: float
    peak_gigabytes: float
    exit_status: int


def measure(kind: str, layers: int, command: str, directory: Path, dtype: str, routing: str, log: Path) -> Measurement:
    """Writes a graph into a directory, lowers it there and measures the command."""
    written = _in_own_process(
        write_full_size, kind, directory / "model.onnx", layers=layers, dtype=dtype, routing=routing
    )
    lowered = directory / "lowered"
    words = [word.format(model=written.path, output=lowered) for word in shlex.split(command)]
    started = time.perf_counter()
    exit_status, usage = _run(words, log)
    seconds = time.perf_counter() - started
    result = lowered / "model.onnx"
    nodes = _in_own_process(_count_nodes, result) if result.exists() else None
    return Measurement(
        kind,
        layers,
        written.weight_bytes / 1e9,
        written.nodes,
        nodes,
        seconds,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * KIBIBYTE / 1e9,
        exit_status,
    )


def _in_own_process(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls a function elsewhere: Linux counts what this process has ever held as the peak of each command that it
    starts."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **options).result()


def _count_nodes(path: Path) -> int:
    return len(onnx.load(path, load_external_data=False).graph.node)


def _run(words: list[str], log: Path) -> tuple[int, resource.struct_rusage]:
    """Exit status and resource usage of a command, whose output goes to a file."""
    with log.open("ab") as stream:
        actions = [(os.POSIX_SPAWN_DUP2, stream.fileno(), 1), (os.POSIX_SPAWN_DUP2, stream.fileno(), 2)]
        process = os.posix_spawnp(words[0], words, os.environ, file_actions=actions)
        _, status, usage = os.wait4(process, 0)
    return os.waitstatus_to_exitcode(status), usage


def markdown(measurements: Sequence[Measurement]) -> str:
    """The table of all measurements."""
    lines = [
        "| model | layers | weights, GB | nodes | lowered nodes | seconds | CPU seconds | peak memory, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for m in measurements:
        lowered = (
            f"failed ({m.exit_status})" if m.exit_status else "-" if m.lowered_nodes is None else str(m.lowered_nodes)
        )
        cells = (
            m.kind,
            m.layers,
            f"{m.weight_gigabytes:.1f}",
            m.nodes,
            lowered,
            f"{m.seconds:.1f}",
            f"{m.cpu_seconds:.1f}",
            f"{m.peak_gigabytes:.2f}",
        )
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def page(measurements: Sequence[Measurement], arguments: Sequence[str]) -> str:
    """The table with the command that made it and the machine."""
    command = shlex.join(["python", "benchmarks/lower_full_size.py", *arguments])
    return f"    {command}\n\nOn {os.cpu_count()} cores ({platform.machine()}), without verification.\n\n{markdown(measurements)}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. The exit status is 1 when a lowering failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["deepseek-v3", "deepseek-v3.2"])
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 4, 16, 61])
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--routing", default="gather", choices=("gather", "mask"))
    parser.add_argument(
        "--command", default=COMMAND, help="what to measure; {model} and {output} are replaced (default: mla-trt lower)"
    )
    parser.add_argument(
        "--work", type=Path, help="directory for the graphs, which needs sparse files (default: a temporary one)"
    )
    parser.add_argument("--output", type=Path, help="writes lower_full_size.md and .json into this directory")
    options = parser.parse_args(arguments)
    measurements: list[Measurement] = []
    log = Path(options.output or tempfile.gettempdir()) / "lower_full_size.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    with Console(stderr=True).status("") as status:
        for kind in options.kinds:
            for layers in options.layers:
                status.update(f"{kind}, {layers} layers")
                with tempfile.TemporaryDirectory(dir=options.work) as directory:
                    measured = measure(
                        kind, layers, options.command, Path(directory), options.dtype, options.routing, log
                    )
                measurements.append(measured)
    table = markdown(measurements)
    print(table)
    if options.output:
        (options.output / "lower_full_size.md").write_text(page(measurements, arguments), encoding="utf-8")
        results = [asdict(measurement) for measurement in measurements]
        (options.output / "lower_full_size.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    failed = [measurement for measurement in measurements if measurement.exit_status]
    if failed:
        print(f"{len(failed)} of {len(measurements)} failed; the output is in {log}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
