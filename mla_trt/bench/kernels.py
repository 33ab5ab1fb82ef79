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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from mla_trt.bench import peers
from mla_trt.bench.cases import CASES, Case, Content, Pool, Random
from mla_trt.bench.kernels_report import Ceilings, Result, markdown, write_results
from mla_trt.bench.options import add_bench_arguments, choose_cases
from mla_trt.cuda import CudaError, Memory, Stream, check_usable, milliseconds, properties, synchronize
from mla_trt.errors import MlaTrtError, UsageError
from mla_trt.formats import IndexLayout, KvLayout, PageLayout
from mla_trt.ops import OPS, TensorType, infer_shapes, make_node
from mla_trt.plugins.kernel_library import Call, DeviceTensor, KernelLibrary
from mla_trt.plugins.library import KERNELS, find_library

Array = npt.NDArray[Any]

DISTINCT = (
    1_000_003  # normal values that are drawn; a prime, so that their repetition has no period in common with shapes
)
DISTINCT_PAGES = 61
GRAPH_MILLISECONDS = 4.0
MOST_LAUNCHES = 100
ROUNDS = 15
SECONDS = 1.5  # of alternating rounds
SAMPLED_HEADS = 3
WRONG, INTERRUPTED = 4, 130  # exit statuses

PLACES = {"kv_cache", "indexer_cache"}


class _Set:
    """One set of a case's tensors and the call over them."""

    def __init__(self, library: KernelLibrary, case: Case, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.memory: dict[str, Memory] = {}
        self.kinds = {name: _kind(content) for name, content in case.inputs.items()}
        for name, content in case.inputs.items():
            self.memory[name] = _filled(rng, content)
        op = OPS[case.op_type]
        outputs = {output.name: f"{output.name}_result" for output in op.outputs}
        node = make_node(case.op_type, {name: name for name in case.inputs}, outputs, **case.attributes)
        inferred = infer_shapes(node, [self.kinds[name] if name else None for name in node.input])
        results = dict(zip(outputs, inferred, strict=True))
        for name, kind in results.items():
            source = name.removesuffix("_out")
            if source in PLACES:
                self.memory[name] = self.memory[source]
            else:
                self.memory[name] = Memory(_bytes(kind))
                self.memory[name].fill(0xFF)
        self.kinds |= results
        self.call: Call = library.call(
            case.op_type,
            op.complete(case.attributes, case.op_type),
            {name: self._tensor(name) for name in case.inputs},
            {name: self._tensor(name) for name in results},
        )
        self.workspace = Memory(self.call.workspace_bytes())

    def _tensor(self, name: str) -> DeviceTensor:
        return DeviceTensor(self.memory[name].address, self.kinds[name].dtype, _shape(self.kinds[name]))

    def enqueue(self, stream: Stream) -> None:
        self.call.enqueue(self.workspace.address, self.workspace.size, stream.handle)

    def close(self) -> None:
        for memory in {*self.memory.values(), self.workspace}:
            memory.close()


def _shape(kind: TensorType) -> tuple[int, ...]:
    return tuple(int(dim or 0) for dim in kind.shape)


def _bytes(kind: TensorType) -> int:
    return math.prod(_shape(kind)) * int(helper.tensor_dtype_to_np_dtype(kind.dtype).itemsize)


def _kind(content: Content) -> TensorType:
    if isinstance(content, Random):
        return TensorType(content.dtype, content.shape)
    if isinstance(content, Pool):
        return TensorType(TensorProto.INT32, (content.pages, content.layout.page_words))
    return TensorType(helper.np_dtype_to_tensor_dtype(content.dtype), content.shape)


def _filled(rng: np.random.Generator, content: Content) -> Memory:
    """Device memory with the content; large tensors repeat a part of odd length."""
    if isinstance(content, Random):
        count = min(math.prod(content.shape), DISTINCT)
        dtype = helper.tensor_dtype_to_np_dtype(content.dtype)
        spread = 100.0 if content.dtype == TensorProto.FLOAT8E4M3FN else content.spread
        part = (spread * rng.standard_normal(count, np.float32)).clip(-448, 448).astype(dtype)
    elif isinstance(content, Pool):
        part = _pages(rng, content.layout, min(content.pages, DISTINCT_PAGES))
    else:
        part = content
    memory = Memory(_bytes(_kind(content)))
    memory.write(part)
    filled = part.nbytes
    while filled < memory.size:
        more = min(filled, memory.size - filled)
        memory.copy(memory.address, filled, more)
        filled += more
    return memory


def _pages(rng: np.random.Generator, layout: PageLayout, count: int) -> Array:
    pages = layout.empty(count)
    page, slot = np.divmod(np.arange(count * layout.page_size), layout.page_size)
    if isinstance(layout, KvLayout):
        widths = (layout.kv_lora_rank, layout.qk_rope_head_dim)
        layout.write(pages, page, slot, *(rng.standard_normal((len(page), width), np.float32) for width in widths))
    else:
        assert isinstance(layout, IndexLayout)
        layout.write(pages, page, slot, rng.standard_normal((len(page), layout.index_head_dim), np.float32))
    return pages


# what is checked: some tokens alone, over copies of their sequence's pages


def relative_error(found: Array, expected: Array) -> float:
    """Frobenius norm of the difference over that of ``expected``; infinite where anything is NaN."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    error = float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-30))
    return error if math.isfinite(error) else math.inf


class _Checker:
    """Compares tokens of a set that has run with the op's reference."""

    def __init__(self, case: Case, data: _Set) -> None:
        self.case, self.data, self.op = case, data, OPS[case.op_type]
        step = {name: content for name, content in case.inputs.items() if isinstance(content, np.ndarray)}
        self.sequence_of, self.positions, self.table = (
            step[name] for name in ("token_sequence", "positions", "block_table")
        )

    def error(self, token: int) -> float:
        """The largest error of the checked outputs of one token."""
        given, heads = self._one_token(token)
        attributes = dict(self.case.attributes)
        expected = self.op.reference(self.op.complete(attributes, self.case.op_type), given)
        shapes = {output.name: output.shape for output in self.op.outputs}
        errors = []
        for name in self.case.checked:
            if name.removesuffix("_out") in PLACES:
                errors.append(self._row_error(name, token, expected[name]))
                continue
            found = self._slice(name, shapes[name].split(), token, heads)
            if name == "indices":
                chosen, wanted = (set(lists.reshape(-1).tolist()) - {-1} for lists in (found, expected[name]))
                errors.append(len(chosen ^ wanted) / max(len(wanted), 1) / 2)
            else:
                errors.append(relative_error(found, expected[name]))
        return max(errors)

    def _one_token(self, token: int) -> tuple[dict[str, Array], Array]:
        sequence, position = int(self.sequence_of[token]), int(self.positions[token])
        shapes = {formal.name: formal.shape for formal in self.op.inputs}
        heads = self._sampled_heads(shapes)
        used = self.table[sequence, : position // self.case.attributes["page_size"] + 1]
        replaced: dict[str, Array] = {
            "query_offsets": np.array([0, 1], np.int32),
            "cache_lengths": np.array([position], np.int32),
            "token_sequence": np.zeros(1, np.int32),
            "positions": np.array([position], np.int32),
            "block_table": np.arange(len(used), dtype=np.int32)[None],
        }
        given: dict[str, Array] = {}
        for name in self.case.inputs:
            if name in PLACES:
                given[name] = self._gather(name, used)
            elif name in replaced:
                given[name] = replaced[name]
            else:
                given[name] = self._slice(name, (shapes[name] or "").split(), token, heads)
        return given, heads

    def _sampled_heads(self, shapes: Mapping[str, str | None]) -> Array:
        for name in self.case.inputs:
            words = (shapes[name] or "").split()
            if "H" in words:
                count = _shape(self.data.kinds[name])[words.index("H")]
                return np.unique(np.linspace(0, count - 1, SAMPLED_HEADS).astype(int))
        return np.zeros(0, int)

    def _slice(self, name: str, words: Sequence[str], token: int, heads: Array) -> Array:
        """The part of a tensor that belongs to the token and the sampled heads."""
        kind, memory = self.data.kinds[name], self.data.memory[name]
        shape, dtype = _shape(kind), helper.tensor_dtype_to_np_dtype(kind.dtype)
        if words[0] in ("T", "N", "index_N"):  # cos and sin have a row for each token
            row = _bytes(kind) // shape[0]
            values = memory.read(token * row, row).view(dtype).reshape(1, *shape[1:])
        else:
            values = memory.read().view(dtype).reshape(shape)
        return values.take(heads, axis=words.index("H")) if "H" in words else values

    def _gather(self, name: str, used: Array) -> Array:
        words = _shape(self.data.kinds[name])[1]
        pages = [self.data.memory[name].read(4 * words * int(page), 4 * words) for page in used]
        return np.stack(pages).view(np.int32)

    def _row_error(self, name: str, token: int, expected: Array) -> float:
        """Of the row that the token wrote."""
        content = self.case.inputs[name.removesuffix("_out")]
        assert isinstance(content, Pool)
        layout, position = content.layout, int(self.positions[token])
        used = self.table[int(self.sequence_of[token]), : position // layout.page_size + 1]
        found = self._gather(name, used)
        place = np.array([len(used) - 1]), np.array([position % layout.page_size])
        rows = [layout.read(pool, *place) for pool in (found, expected)]  # type: ignore[attr-defined]
        values = [np.concatenate(row, axis=1) if isinstance(row, tuple) else row for row in rows]
        return relative_error(*values)


# timing


class _Ours:
    """Our kernel over all sets, as a graph."""

    def __init__(self, sets: Sequence[_Set]) -> None:
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

    def _pass(self, sets: Sequence[_Set]) -> None:
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

    def __init__(self, peer: peers.Peer) -> None:
        self.torch = importlib.import_module("torch")
        self.peer = peer
        for _ in range(2):
            self._pass()
        self.torch.cuda.synchronize()
        repeats = _repeats(self._timed(self._pass), len(peer.calls))
        self.launches = repeats * len(peer.calls)
        self.graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(self.graph):
            for _ in range(repeats):
                self._pass()
        self.time()

    def _pass(self) -> None:
        for call in self.peer.calls:
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


def measure_ceilings() -> Ceilings:
    """Device copy by cudaMemcpy; matrix products through torch, where it is installed."""
    return Ceilings(*measure_copy(), *_matrix_products())


def measure_copy() -> tuple[str, float]:
    """Name of the GPU, and bytes/s of a device copy, read and written."""
    gpu = properties()
    name = gpu.name.decode().rstrip("\0")
    size = min(4 << 30, gpu.totalGlobalMem // 8)
    source, target = Memory(size), Memory(size)
    source.fill(1)
    stream, times = Stream(), []
    for _ in range(6):
        start = stream.record()
        stream.copy(target.address, source.address, size)
        end = stream.record()
        stream.synchronize()
        times.append(milliseconds(start, end))
    for memory in (source, target):
        memory.close()
    stream.close()
    return name, 2 * size / (1e-3 * median(times[1:]))


def _matrix_products() -> tuple[float | None, float | None]:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None, None
    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    eights = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device="cuda")

    def rate(product: Callable[[], Any]) -> float:
        for _ in range(3):
            product()
        times = []
        for _ in range(10):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            product()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return float(2 * size**3 / (1e-3 * median(times)))

    bf16 = rate(lambda: left @ right)
    try:
        fp8 = rate(lambda: torch._scaled_mm(*eights, scale_a=one, scale_b=one, out_dtype=torch.bfloat16))
    except (RuntimeError, TypeError):
        fp8 = None
    return bf16, fp8


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
    sets: list[_Set] = []
    ours: _Ours | None = None
    beside: _Beside | None = None
    try:
        for seed in range(count):
            sets.append(_Set(library, case, seed))
        synchronize()
        ours = _Ours(sets)
        error = _error(case, sets[-1])
        if error > case.tolerance:
            return Result(name, error, note=f"wrong: error {error:.1e} > {case.tolerance:.0e}")
        if against is not None:
            other, other_library = against
            beside = _Beside(other, other_library, case)
            other_error = _error(case, beside.sets[-1])
            if other_error > case.tolerance:
                return Result(name, error, note=f"{other} is wrong: error {other_error:.1e} > {case.tolerance:.0e}")
        elif case.neighbour is not None:
            beside = _Beside(case.neighbour, library, CASES[case.neighbour]())
        if beside is not None:
            times, even_times = _alternate(ours, beside.ours)
            return _beside(name, case, beside, ceilings, error, times, even_times)
        theirs, peer_note = _make_peer(case, count) if with_peer else (None, "")
        times, peer_times = _alternate(ours, theirs)
        peer = theirs.peer.name if theirs else ""
        return _result(name, case, ceilings, error, times, peer, peer_times, peer_note)
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
    one = sum(_bytes(_kind(content)) for content in case.inputs.values())
    return max(1, min(16, math.ceil(4 * properties().l2CacheSize / max(one, 1))))


def _error(case: Case, data: _Set) -> float:
    """The largest error of some tokens of a set that has run."""
    checker = _Checker(case, data)
    tokens = len(checker.positions)
    return max(checker.error(token) for token in {0, tokens // 2, tokens - 1})


class _Beside:
    """A kernel of ours that a case is compared with: on an even shape, or of another build on the case's own."""

    def __init__(self, name: str, library: KernelLibrary, case: Case) -> None:
        self.name, self.case = name, case
        self.sets = [_Set(library, case, seed) for seed in range(_sets_of(case))]
        synchronize()
        self.ours = _Ours(self.sets)


def _release(sets: Sequence[_Set], ours: _Ours | None) -> None:
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


def _make_peer(case: Case, sets: int) -> tuple[_Theirs | None, str]:
    if case.peer is None:
        return None, ""
    function, arguments = case.peer
    try:
        return _Theirs(getattr(peers, function)(sets, **arguments)), ""
    except (MlaTrtError, RuntimeError, TypeError, AssertionError) as problem:
        return None, " ".join(str(problem).split())[:200]


def _alternate(ours: _Ours, theirs: _Ours | _Theirs | None) -> tuple[list[float], list[float]]:
    times: list[float] = []
    peer_times: list[float] = []
    until = time.monotonic() + SECONDS
    while len(times) < 3 or (len(times) < ROUNDS and time.monotonic() < until):
        times.append(ours.time())
        if theirs is not None:
            peer_times.append(theirs.time())
    return times, peer_times


def _result(
    name: str,
    case: Case,
    ceilings: Ceilings,
    error: float,
    times: Sequence[float],
    peer: str,
    peer_times: Sequence[float],
    peer_note: str,
) -> Result:
    us = median(times)
    rate = ceilings.fp8 if case.precision == "fp8" else ceilings.bf16
    floor = max(case.bytes / ceilings.copy, case.flops / rate if rate else 0.0)
    return Result(
        name,
        error=error,
        us=us,
        spread=(max(times) - min(times)) / us,
        tflops=case.flops / us / 1e6,
        terabytes=case.bytes / us / 1e6,
        of_ceiling=1e6 * floor / us,
        peer=peer,
        peer_us=median(peer_times) if peer_times else None,
        ratio=median(peer_times) / us if peer_times else None,
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
    result = _result(name, case, ceilings, error, times, beside.name, even_times, "")
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
        except KeyboardInterrupt:  # what was measured is written all the same
            results.append(Result(name, note="interrupted; the rest was not run"))
            status = INTERRUPTED
        result = results[-1]
        shown = result.note if result.us is None else f"{result.us:.1f} us, {result.of_ceiling:.0%} of the ceiling"
        versus = f", {result.ratio:.2f} times as fast as {result.peer}" if result.ratio else ""
        print(f"{name}: {shown}{versus}", file=sys.stderr, flush=True)
        if result.note.endswith("was not run"):
            break
    print(markdown(library.build, ceilings, results), end="")
    if options.output is not None:
        write_results(options.output, library.build, ceilings, results)
    return status or (WRONG if any(result.note for result in results) else 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """See mla_trt/bench/__main__.py."""
    parser = argparse.ArgumentParser(prog="python -m mla_trt.bench", description="Measures the kernels.")
    add_bench_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        if options.what == "layer":
            raise UsageError("the layer is measured by 'mla-trt bench layer', which needs all of the package")
        return run(options)
    except MlaTrtError as error:
        print(f"mla-trt: {error}", file=sys.stderr)
        return error.exit_status
