"""Shows how far a build is: a line for each phase of TensorRT's builder, those within others below them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

MOST_LINES = 6


class ShownPhases:
    """Phases as lines of a rich display; see `mla_trt.engines.building.Phases`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lines: dict[str, TaskID] = {}
        self._depths: dict[str, int] = {}

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of some number of steps begins."""
        depth = self._depths.get(parent or "", -1) + 1
        self._depths[name] = depth
        if len(self._lines) < MOST_LINES:
            self._lines[name] = self._progress.add_task("  " * depth + name, total=max(1, steps))

    def step(self, name: str, done: int) -> None:
        """Some of its steps are done."""
        if name in self._lines:
            self._progress.update(self._lines[name], completed=done)

    def finish(self, name: str) -> None:
        """It ends, with all of its steps or without."""
        self._depths.pop(name, None)
        if name in self._lines:
            self._progress.remove_task(self._lines.pop(name))


@contextmanager
def shown(console: Console) -> Iterator[ShownPhases]:
    """A display of the phases, for as long as the build lasts."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=console.quiet) as progress:
        yield ShownPhases(progress)
