"""Runs the plan of an engine: TensorRT's runtime, the pools in device memory, CUDA graphs for steps that recur."""

from __future__ import annotations

import logging
import mmap
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from mla_trt.cuda import DeviceBuffer, Graph, Memory, PinnedBuffer, Stream, find_gpu
from mla_trt.engines.engine_file import PROFILES, RESIDENT, EngineDescription
from mla_trt.engines.tensorrt_api import Messages, check_fits, load_plugins, load_tensorrt, start
from mla_trt.errors import BadModelError, MlaTrtError

log = logging.getLogger("mla_trt.tensorrt")

MOST_RECORDINGS = 32
MOST_REMEMBERED = 1024
WORD = 4

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass
class _Recording:
    """A step of certain shapes that recurs. It has a context of its own: a graph refers to what its context holds.

    Attributes:
        context: the context, its shapes set.
        addresses: what the graph reads and writes, in the order of the engine's tensors.
        graph: None before it was recorded.
    """

    context: Any
    addresses: tuple[int, ...] = ()
    graph: Graph | None = None


class TensorRtRunner:
    """Runs the plan of an engine; see `mla_trt.engines.engine_tensorrt.Runner`.

    Args:
        path: the plan.
        description: what it was built with and for.
        pages: pages of each pool.
        plugins: the plugin library; None: the one that is found.

    Raises:
        MlaTrtError: there is no GPU or TensorRT, the engine was made for another one, or memory does not suffice.
    """

    def __init__(self, path: Path, description: EngineDescription, *, pages: int, plugins: Path | None = None) -> None:
        gpu = find_gpu()
        trt = load_tensorrt()
        build = load_plugins(plugins, gpu, trt.__version__)
        check_fits(
            description.tensorrt,
            description.compute_capability,
            description.gpu,
            description.plugins,
            version=trt.__version__,
            gpu=gpu,
            loaded=build,
        )
        self._trt = trt
        self._pages = pages
        self._messages = Messages()
        self._logger = start(trt, self._messages)
        self._runtime = trt.Runtime(self._logger)
        with path.open("rb") as file:
            plan = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BadModelError(f"TensorRT cannot load '{path}': {self._messages.take()}")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        described = {tensor.name for tensor in (*description.inputs, *description.outputs)}
        self._resident = description.cache == RESIDENT
        caches = () if self._resident else description.metadata.caches
        kept = {tensor.name for tensor in description.outputs} | {cache.name for cache in caches}
        # TensorRT may leave out inputs that reach no output.
        if not kept <= set(names) <= described:
            raise BadModelError(f"'{path}' and its description name different inputs and outputs: build it again")
        if description.weight_streaming:
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        self._names = names
        self._dtypes = {name: numpy_dtype(trt, self._engine.get_tensor_dtype(name)) for name in names}
        self._described = {tensor.name: tensor.numpy_dtype for tensor in (*description.inputs, *description.outputs)}
        self._stream = Stream()
        self._words = {cache.name: cache.page_words for cache in caches}
        self._pools = {name: Memory(pages * words * WORD) for name, words in self._words.items()}
        for pool in self._pools.values():
            self._stream.clear(pool.address, pool.size)
        pools = {name: pool.address for name, pool in self._pools.items()}
        next_values = {cache.output: pools[cache.name] for cache in caches}
        self._fixed = pools | next_values
        self._results = [tensor.name for tensor in description.outputs if tensor.name not in next_values]
        self._device = {name: DeviceBuffer(self._stream) for name in names if name not in self._fixed}
        self._host = {name: PinnedBuffer(self._stream) for name in self._device}
        self._scratch = Memory(max(1, int(self._engine.device_memory_size_v2)))
        self._contexts: dict[str, Any] = {}
        self._recordings: OrderedDict[tuple[str, Shapes], _Recording] = OrderedDict()
        self._records = True
        self._met: set[Shapes] = set()
        self._stream.synchronize()

    def run(self, profile: str, inputs: Mapping[str, np.ndarray], *, recurring: bool) -> dict[str, np.ndarray]:
        """Runs one step; see `mla_trt.engines.engine_tensorrt.Runner.run`."""
        inputs = {name: value for name, value in inputs.items() if name in self._device}
        shapes: Shapes = tuple(sorted((name, value.shape) for name, value in inputs.items()))
        for name, value in inputs.items():
            staged = self._host[name].array(value.shape, self._dtypes[name])
            staged[...] = value
            self._stream.copy(self._device[name].reserve(staged.nbytes), self._host[name].address, staged.nbytes)
        sizes = self._run_recurring(profile, shapes) if recurring and self._recurs(shapes) else None
        if sizes is None:
            context = self._context(profile)
            self._set_shapes(context, shapes)
            sizes = self._reserve_results(context)
            self._set_addresses(context)
            self._execute(context)
        results = {}
        for name, shape in sizes.items():
            staged = self._host[name].array(shape, self._dtypes[name])
            self._stream.copy(self._host[name].address, self._device[name].address, staged.nbytes)
            results[name] = staged
        self._stream.synchronize()
        return {name: value.astype(self._described[name]) for name, value in results.items()}

    def copy_pages(self, page_copies: np.ndarray) -> None:
        """Copies (from, to) pages, int32 [n, 2], in every pool."""
        self._check_reachable()
        for name, pool in self._pools.items():
            size = self._words[name] * WORD
            for source, target in page_copies.tolist():
                self._stream.copy(pool.address + target * size, pool.address + source * size, size)

    def read_pages(self, cache: str) -> np.ndarray:
        """A copy of a pool, int32 [pages, page_words]."""
        self._check_reachable()
        pages = np.empty((self._pages, self._words[cache]), np.int32)
        self._stream.copy(pages.ctypes.data, self._pools[cache].address, pages.nbytes)
        self._stream.synchronize()
        return pages

    def write_pages(self, cache: str, pages: np.ndarray) -> None:
        """Replaces a pool."""
        self._check_reachable()
        if pages.shape != (self._pages, self._words[cache]):
            raise MlaTrtError(f"the pool '{cache}' is [{self._pages}, {self._words[cache]}], not {list(pages.shape)}")
        self._stream.copy(self._pools[cache].address, pages.ctypes.data, pages.nbytes)
        self._stream.synchronize()

    @property
    def recordings(self) -> int | None:
        """How many sizes of steps run as a CUDA graph; None where the engine cannot be recorded, because it waits for
        results while it runs."""
        return sum(entry.graph is not None for entry in self._recordings.values()) if self._records else None

    def close(self) -> None:
        """Gives the memory back: graphs before their contexts, contexts before the engine."""
        self._stream.synchronize()
        self._forget_all()
        self._contexts.clear()
        self._engine = None
        self._runtime = None
        for buffer in self._device.values():
            buffer.free()
        for pinned in self._host.values():
            pinned.free()
        for memory in (*self._pools.values(), self._scratch):
            memory.close()
        self._stream.close()

    def _check_reachable(self) -> None:
        if self._resident:
            raise MlaTrtError(
                "the engine's plugins hold its pages, which cannot be read or replaced: build it with --cache io"
            )

    def _new_context(self, profile: str) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise MlaTrtError(f"TensorRT cannot prepare the engine to run: {self._messages.take()}")
        # All contexts work in the same memory, one after the other on one stream.
        context.set_device_memory(self._scratch.address, self._scratch.size)
        index = 0 if self._resident else PROFILES.index(profile)
        if not context.set_optimization_profile_async(index, self._stream.handle):
            raise MlaTrtError(f"TensorRT does not take the {profile} profile: {self._messages.take()}")
        return context

    def _context(self, profile: str) -> Any:
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile)
        return self._contexts[profile]

    def _recording(self, profile: str, shapes: Shapes) -> _Recording:
        key = (profile, shapes)
        if key in self._recordings:
            self._recordings.move_to_end(key)
            return self._recordings[key]
        if len(self._recordings) >= MOST_RECORDINGS:
            self._stream.synchronize()
            self._forget(self._recordings.popitem(last=False)[1])
        recording = _Recording(self._new_context(profile))
        self._set_shapes(recording.context, shapes)
        self._recordings[key] = recording
        return recording

    def _recurs(self, shapes: Shapes) -> bool:
        """Whether shapes were met before, so that a context of their own pays."""
        if not self._records or shapes in self._met:
            return self._records
        if len(self._met) >= MOST_REMEMBERED:
            self._met.clear()
        self._met.add(shapes)
        return False

    def _run_recurring(self, profile: str, shapes: Shapes) -> dict[str, tuple[int, ...]] | None:
        """Runs a step that recurs; shapes of its results, None where it has not run because it cannot be recorded.

        In a context of its own the first step runs as it is, which TensorRT needs before a recording; the next is
        recorded.
        """
        recording = self._recording(profile, shapes)
        sizes = self._reserve_results(recording.context)
        addresses = self._addresses()
        if recording.addresses != addresses:
            self._drop_graph(recording)
            self._set_addresses(recording.context)
            self._execute(recording.context)
            recording.addresses = addresses
            return sizes
        if recording.graph is None:
            recording.graph = self._record(recording.context)
        if recording.graph is None:
            # What a failed recording leaves in a context is not known.
            self._forget_all()
            self._records = False
            return None
        self._stream.launch(recording.graph)
        return sizes

    def _record(self, context: Any) -> Graph | None:
        """The graph of a step; None where the engine cannot be recorded."""
        try:
            return self._stream.capture(lambda: self._execute(context))
        except MlaTrtError as error:
            log.info("steps run without a CUDA graph: %s", error)
            return None

    def _set_shapes(self, context: Any, shapes: Shapes) -> None:
        for name, shape in shapes:
            if not context.set_input_shape(name, shape):
                raise MlaTrtError(f"TensorRT does not take {list(shape)} for '{name}': {self._messages.take()}")
        for name, words in self._words.items():
            if not context.set_input_shape(name, (self._pages, words)):
                raise MlaTrtError(f"TensorRT does not take {self._pages} pages: {self._messages.take()}")
        try:
            unknown = context.infer_shapes()
        except RuntimeError as error:
            reason = self._messages.take() if self._messages.errors else " ".join(str(error).split())
            raise MlaTrtError(f"TensorRT cannot tell the shapes of the step's results: {reason}") from None
        if unknown:
            raise MlaTrtError(f"TensorRT also needs the shapes of {', '.join(unknown)}")

    def _reserve_results(self, context: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of the results, for which there is memory then."""
        shapes = {}
        for name in self._results:
            shape = tuple(context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise MlaTrtError(
                    f"the shape of the result '{name}' is known only after a step, which is not supported"
                )
            size = int(np.prod(shape, dtype=np.int64)) * self._dtypes[name].itemsize
            self._device[name].reserve(size)
            shapes[name] = shape
        return shapes

    def _addresses(self) -> tuple[int, ...]:
        return tuple(self._fixed.get(name) or self._device[name].address for name in self._names)

    def _set_addresses(self, context: Any) -> None:
        for name, address in zip(self._names, self._addresses(), strict=True):
            if not context.set_tensor_address(name, address):
                raise MlaTrtError(f"TensorRT does not take the memory of '{name}': {self._messages.take()}")

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.handle):
            raise MlaTrtError(f"TensorRT cannot run the step: {self._messages.take()}")

    def _drop_graph(self, recording: _Recording) -> None:
        if recording.graph is not None:
            self._stream.synchronize()
            recording.graph.close()
            recording.graph = None

    def _forget(self, recording: _Recording) -> None:
        self._drop_graph(recording)
        recording.context = None

    def _forget_all(self) -> None:
        for recording in self._recordings.values():
            self._forget(recording)
        self._recordings.clear()


def numpy_dtype(trt: Any, dtype: Any) -> np.dtype:
    """The numpy type (with ml_dtypes) of a type of TensorRT.

    Raises:
        BadModelError: there is none that inputs and outputs can have.
    """
    elements = {
        trt.DataType.FLOAT: TensorProto.FLOAT,
        trt.DataType.HALF: TensorProto.FLOAT16,
        trt.DataType.BF16: TensorProto.BFLOAT16,
        trt.DataType.INT8: TensorProto.INT8,
        trt.DataType.INT32: TensorProto.INT32,
        trt.DataType.INT64: TensorProto.INT64,
        trt.DataType.BOOL: TensorProto.BOOL,
        trt.DataType.UINT8: TensorProto.UINT8,
    }
    if dtype not in elements:
        raise BadModelError(f"the engine has an input or output of type {dtype}, which is not supported")
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elements[dtype]))
