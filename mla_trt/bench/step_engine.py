"""Engines that are measured: built without ranges of sizes where the model has none, run on device memory, recorded as CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mla_trt.cuda import Graph, Memory, Stream, milliseconds, synchronize
from mla_trt.engines.building import parser_error
from mla_trt.engines.tensorrt_api import Messages, start
from mla_trt.engines.tensorrt_runner import numpy_dtype
from mla_trt.errors import BadModelError, MlaTrtError


def build_static(trt: Any, model: Path, plan: Path, *, optimization_level: int, timing_cache: Path) -> None:
    """Builds the plan of a model whose sizes are all fixed.

    Args:
        trt: the module `tensorrt`.
        model: strongly typed ONNX model.
        plan: file to write.
        optimization_level: TensorRT's.
        timing_cache: file of measured times, read and written.

    Raises:
        BadModelError: TensorRT does not take it; the message names node and cause.
    """
    messages = Messages()
    logger = start(trt, messages)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise BadModelError(parser_error(errors) if errors else f"TensorRT's parser fails: {messages.take()}")
    config = builder.create_builder_config()
    config.builder_optimization_level = optimization_level
    cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.exists() else b"")
    kept = cache is not None and config.set_timing_cache(cache, False)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BadModelError(f"TensorRT cannot build the engine: {messages.take()}")
    with plan.open("wb") as file:
        file.write(memoryview(serialized))
    if kept:
        timing_cache.write_bytes(bytes(memoryview(config.get_timing_cache().serialize())))


class StepEngine:
    """An engine with one step's tensors in device memory.

    Args:
        trt: the module `tensorrt`.
        plan: the engine.
        inputs: value of each input; its shape is the input's.
        aliases: outputs that lie where an input does: output to input.
        stream: to run on.

    Raises:
        MlaTrtError: TensorRT does not load the engine or take a tensor, or memory does not suffice.
    """

    def __init__(
        self, trt: Any, plan: Path, inputs: Mapping[str, np.ndarray], aliases: Mapping[str, str], stream: Stream
    ) -> None:
        self._messages = Messages()
        self._stream = stream
        self._memory: dict[str, Memory] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, np.dtype] = {}
        self._graph: Graph | None = None
        self._context: Any = None
        self._logger = start(trt, self._messages)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise MlaTrtError(f"TensorRT cannot load the engine: {self._messages.take()}")
        try:
            self._prepare(trt, inputs, aliases)
        except BaseException:
            self.close()
            raise

    def _prepare(self, trt: Any, inputs: Mapping[str, np.ndarray], aliases: Mapping[str, str]) -> None:
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise MlaTrtError(f"TensorRT cannot prepare the engine to run: {self._messages.take()}")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        for name in names:
            self._dtypes[name] = numpy_dtype(trt, self._engine.get_tensor_dtype(name))
            if self._engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT:
                continue
            value = np.ascontiguousarray(inputs[name])
            if value.dtype != self._dtypes[name]:
                raise MlaTrtError(f"the input '{name}' is {value.dtype}, must be {self._dtypes[name]}")
            fixed = tuple(self._engine.get_tensor_shape(name)) == value.shape
            if not fixed and not self._context.set_input_shape(name, value.shape):
                raise MlaTrtError(f"TensorRT does not take {list(value.shape)} for '{name}': {self._messages.take()}")
            self._memory[name] = Memory(value.nbytes)
            self._memory[name].write(value)
            self._shapes[name] = value.shape
        for name in names:
            if name not in self._memory:
                self._shapes[name] = shape = tuple(self._context.get_tensor_shape(name))
                if min(shape, default=0) < 0:
                    raise MlaTrtError(f"TensorRT does not know the shape of '{name}' before the step")
                if name in aliases:
                    self._memory[name] = self._memory[aliases[name]]
                else:
                    self._memory[name] = Memory(math.prod(self._shapes[name]) * self._dtypes[name].itemsize)
                    self._memory[name].fill(0xFF)  # NaN
            if not self._context.set_tensor_address(name, self._memory[name].address):
                raise MlaTrtError(f"TensorRT does not take the memory of '{name}': {self._messages.take()}")

    def run(self) -> None:
        """Runs the step and waits for it."""
        synchronize()  # for the copies, which are on another stream
        self._enqueue()
        self._stream.synchronize()

    def record(self) -> None:
        """Records the step, which has run before."""
        self._graph = self._stream.capture(self._enqueue)

    def time(self, launches: int) -> float:
        """us of a launch of the recording, over several in a row."""
        assert self._graph is not None
        begin = self._stream.record()
        for _ in range(launches):
            self._stream.launch(self._graph)
        end = self._stream.record()
        self._stream.synchronize()
        return 1e3 * milliseconds(begin, end) / launches

    def read(self, name: str) -> np.ndarray:
        """The value of a tensor."""
        return self._memory[name].read().view(self._dtypes[name]).reshape(self._shapes[name])

    def write(self, name: str, values: np.ndarray, start: int) -> None:
        """Replaces values of a tensor from an element on."""
        values = np.ascontiguousarray(values, self._dtypes[name])
        self._memory[name].write(values, start * values.itemsize)

    def close(self) -> None:
        """Gives the memory back."""
        if self._graph is not None:
            self._graph.close()
        self._graph = self._context = self._engine = self._runtime = None
        for memory in {id(memory): memory for memory in self._memory.values()}.values():
            memory.close()
        self._memory.clear()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise MlaTrtError(f"TensorRT cannot run the step: {self._messages.take()}")
