"""`mla-trt bench kernels`: the kernels and their peers on one GPU, in one process, alternating.

Each case runs as a CUDA graph of several launches that rotate over sets of data larger than the L2 cache. Results are checked
in the same run against the op set's float64 references: a wrong kernel has no figure. The machine's own ceilings, a
device copy and matrix products, are measured first.

    python -m mla_trt.bench kernels --cases decode -o results      # where only the source tree is
"""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

from mla_trt.bench import peers
from mla_trt.bench.case_data import CaseData, bytes_of, kind_of
from mla_trt.bench.cases import CASES, Case
from mla_trt.bench.ceilings import measure_ceilings
from mla_trt.bench.check import largest_error
from mla_trt.bench.kernels_report import Ceilings, Result, markdown, write_results
from mla_trt.bench.options import add_bench_arguments, choose_cases, command_line
from mla_trt.cuda import CudaError, Stream, check_usable, milliseconds, properties, synchronize
from mla_trt.errors import MlaTrtError, UsageError
from mla_trt.plugins.kernel_library import KernelLibrary
from mla_trt.plugins.library import KERNELS, find_library
from mla_trt.signals import ending_raises, exit_status

GRAPH_MILLISECONDS = 4.0
MOST_LAUNCHES = 100
ROUNDS = 15
SECONDS = 1.5  # of alternating rounds
WRONG = 4  # exit status


class _Ours:
    """Our kernel over all sets, as a graph."""

    def __init__(self, sets: Sequence[CaseData]) -> None:
        self.stream = Stream()
        self._pass(sets)
        once = self._timed(lambda: self._pass(sets))
        repeats = _repeats(once, len(sets))
        self.launches = repeats * len(sets)

        def work() -> None:
            for _ in range(repeats):
                for data in sets:
                    data.enqueue(self.stream)

        self.graph = self.stream.capture(work)
        self.time()

    def _pass(self, sets: Sequence[CaseData]) -> None:
        for data in sets:
            data.enqueue(self.stream)
        self.stream.synchronize()

    def _timed(self, work: Callable[[], None]) -> float:
        start = self.stream.record()
        work()
        end = self.stream.record()
        self.stream.synchronize()
        return milliseconds(start, end)

    def time(self) -> float:
        """us of a launch."""
        return 1e3 * self._timed(lambda: self.stream.launch(self.graph)) / self.launches

    def close(self) -> None:
        self.graph.close()
        self.stream.close()


def _repeats(milliseconds_once: float, sets: int) -> int:
    wanted = math.ceil(GRAPH_MILLISECONDS / max(milliseconds_once, 1e-3))
    return max(1, min(wanted, MOST_LAUNCHES // sets))


class _Theirs:
    """A peer's kernel over all sets, as a graph of torch's."""

    def __init__(self, name: str, calls: peers.Calls) -> None:
        self.torch = importlib.import_module("torch")
        self.name, self.calls = name, calls
        for _ in range(2):
            self._pass()
        self.torch.cuda.synchronize()
        repeats = _repeats(self._timed(self._pass), len(calls))
        self.launches = repeats * len(calls)
        self.graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(self.graph):
            for _ in range(repeats):
                self._pass()
        self.time()

    def _pass(self) -> None:
        for call in self.calls:
            call()

    def _timed(self, work: Callable[[], None]) -> float:
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        self.torch.cuda.synchronize()
        return float(start.elapsed_time(end))

    def time(self) -> float:
        """us of a launch."""
        return 1e3 * self._timed(self.graph.replay) / self.launches


def bench_case(
    name: str,
    library: KernelLibrary,
    ceilings: Ceilings,
    with_peer: bool = True,
    against: tuple[str, KernelLibrary] | None = None,
) -> Result:
    """Measures one case. A case that the library refuses, or whose result is wrong, has a note in place of figures.

    Args:
        against: another build and its name, which is measured in place of a peer or neighbour.
    """
    case = CASES[name]()
    count = _sets_of(case)
    sets: list[CaseData] = []
    ours: _Ours | None = None
    beside: _Beside | None = None
    try:
        for seed in range(count):
            sets.append(CaseData(library, case, seed))
        synchronize()
        ours = _Ours(sets)
        error = largest_error(case, sets[-1])
        if error > case.tolerance:
            return Result(name, error, note=f"wrong: error {error:.1e} > {case.tolerance:.0e}")
        if against is not None:
            other, other_library = against
            beside = _Beside(other, other_library, case)
            other_error = largest_error(case, beside.sets[-1])
            if other_error > case.tolerance:
                return Result(name, error, note=f"{other} is wrong: error {other_error:.1e} > {case.tolerance:.0e}")
        elif case.neighbour is not None:
            beside = _Beside(case.neighbour, library, CASES[case.neighbour]())
        if beside is not None:
            times, even_times = _alternate([ours, beside.ours])
            return _beside(name, case, beside, ceilings, error, times, even_times)
        theirs, peer_note = _make_peer(case, count) if with_peer else ([], "")
        times, *peer_times = _alternate([ours, *theirs])
        return _result(name, case, ceilings, error, times, theirs[0].name if theirs else "", peer_times, peer_note)
    except CudaError:
        raise
    except MlaTrtError as problem:
        return Result(name, note=" ".join(str(problem).split()))
    finally:
        _release(sets, ours)
        if beside is not None:
            _release(beside.sets, beside.ours)


def _sets_of(case: Case) -> int:
    """Sets of data that are larger than the L2 cache together."""
    one = sum(bytes_of(kind_of(content)) for content in case.inputs.values())
    return max(1, min(16, math.ceil(4 * properties().l2CacheSize / max(one, 1))))


class _Beside:
    """A kernel of ours that a case is compared with: on an even shape, or of another build on the case's own."""

    def __init__(self, name: str, library: KernelLibrary, case: Case) -> None:
        self.name, self.case = name, case
        self.sets = [CaseData(library, case, seed) for seed in range(_sets_of(case))]
        synchronize()
        self.ours = _Ours(self.sets)


def _release(sets: Sequence[CaseData], ours: _Ours | None) -> None:
    try:
        if ours is not None:
            ours.close()
        for data in sets:
            data.close()
    except CudaError:
        if sys.exc_info()[0] is None:
            raise
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def _make_peer(case: Case, sets: int) -> tuple[list[_Theirs], str]:
    """A peer's kernel, and where it has a plan the same with that, too; or why there is none."""
    if case.peer is None:
        return [], ""
    function, arguments = case.peer
    try:
        peer = getattr(peers, function)(sets, **arguments)
        return [_Theirs(peer.name, calls) for calls in (peer.calls, peer.planning) if calls], ""
    except (MlaTrtError, RuntimeError, TypeError, AssertionError) as problem:
        return [], " ".join(str(problem).split())[:200]


def _alternate(graphs: Sequence[_Ours | _Theirs]) -> list[list[float]]:
    """The times of each."""
    rounds: list[list[float]] = []
    until = time.monotonic() + SECONDS
    while len(rounds) < 3 or (len(rounds) < ROUNDS and time.monotonic() < until):
        rounds.append([graph.time() for graph in graphs])
    return [list(times) for times in zip(*rounds, strict=True)]


def _result(
    name: str,
    case: Case,
    ceilings: Ceilings,
    error: float,
    times: Sequence[float],
    peer: str,
    peer_times: Sequence[Sequence[float]],
    peer_note: str,
) -> Result:
    """``peer_times``: of the peer, and of the same with its plan; as many of them as there are."""
    us = median(times)
    rate = ceilings.fp8 if case.precision == "fp8" else ceilings.bf16
    floor = max(case.bytes / ceilings.copy, case.flops / rate if rate else 0.0)
    peer_us, planning_us, *_ = [*map(median, peer_times), None, None]
    return Result(
        name,
        error=error,
        us=us,
        spread=(max(times) - min(times)) / us,
        tflops=case.flops / us / 1e6,
        terabytes=case.bytes / us / 1e6,
        of_ceiling=1e6 * floor / us,
        peer=peer,
        peer_us=peer_us,
        ratio=None if peer_us is None else peer_us / us,
        planning_us=planning_us,
        peer_note=peer_note,
    )


def _beside(
    name: str,
    case: Case,
    beside: _Beside,
    ceilings: Ceilings,
    error: float,
    times: Sequence[float],
    even_times: Sequence[float],
) -> Result:
    """The result of a case whose peer is ours too: the ratio is that of the shares of the ceiling."""
    result = _result(name, case, ceilings, error, times, beside.name, [even_times], "")
    even = _result(beside.name, beside.case, ceilings, 0.0, even_times, "", [], "")
    assert result.of_ceiling is not None
    assert even.of_ceiling is not None
    return replace(result, ratio=result.of_ceiling / even.of_ceiling)


def run(options: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    names = choose_cases(options, CASES)
    if options.list:
        print("\n".join(names))
        return 0
    check_usable()
    library = KernelLibrary(find_library(name=KERNELS).path)
    against = None if options.against is None else (str(options.against), KernelLibrary(options.against.absolute()))
    ceilings = measure_ceilings()
    results: list[Result] = []
    status = 0
    for name in names:
        try:
            results.append(bench_case(name, library, ceilings, options.peers, against))
        except CudaError as error:  # the process has lost the GPU
            results.append(Result(name, note=f"{error}; the rest was not run"))
        except KeyboardInterrupt as end:  # what was measured is written all the same
            results.append(Result(name, note="interrupted; the rest was not run"))
            status = exit_status(end)
        result = results[-1]
        shown = result.note if result.us is None else f"{result.us:.1f} us, {result.of_ceiling:.0%} of the ceiling"
        versus = f", {result.ratio:.2f} times as fast as {result.peer}" if result.ratio else ""
        print(f"{name}: {shown}{versus}", file=sys.stderr, flush=True)
        if result.note.endswith("was not run"):
            break
    print(markdown(command_line(), library.build, ceilings, results), end="")
    if options.output is not None:
        write_results(options.output, command_line(), library.build, ceilings, results)
    return status or (WRONG if any(result.note for result in results) else 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """See mla_trt/bench/__main__.py."""
    parser = argparse.ArgumentParser(prog="python -m mla_trt.bench", description="Measures the kernels.")
    add_bench_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        if options.what == "layer":
            raise UsageError("the layer is measured by 'mla-trt bench layer', which needs all of the package")
        with ending_raises():
            return run(options)
    except MlaTrtError as error:
        print(f"mla-trt: {error}", file=sys.stderr)
        return error.exit_status
