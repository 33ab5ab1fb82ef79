"""The runner of plans over a stand-in for TensorRT and CUDA: host memory, ONNX Runtime, and recordings that repeat a call.

What it shows is that buffers, addresses, contexts and recordings fit together; that TensorRT does what the stand-in does
is for the tests on a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from cuda_stand_in import GUARD, HostRuntime
from small_models import SPARSE, Config, lowered
from tensorrt_stand_in import describe, with_known_axes

from mla_trt.cuda import Gpu
from mla_trt.engines.engine_file import CACHES, IO, RESIDENT, EngineDescription
from mla_trt.engines.engine_onnxruntime import OnnxRuntimeEngine
from mla_trt.engines.engine_tensorrt import TensorRtEngine
from mla_trt.engines.profiles import plan_profiles
from mla_trt.engines.tensorrt_runner import TensorRtRunner
from mla_trt.errors import BadModelError, MlaTrtError
from mla_trt.session import Session

CONFIG = Config()
PAGES = 24
LIMITS = {"max_batch": 4, "max_tokens": 64, "max_length": 64}


class Context:
    """Stands in for an execution context: runs the model on the arrays at its addresses."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile: int | None = None

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory in self.engine.cuda.blocks
        assert size >= self.engine.device_memory_size_v2

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert index < len(plan_profiles(self.engine.description.profiles, self.engine.description.cache))
        self.profile = index
        return stream == self.engine.cuda.STREAM

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        return sorted(self.engine.inputs - self.shapes.keys())

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes: dict[str, int] = {}
        for tensor in self.engine.description.inputs:
            sizes |= {
                axis: size
                for axis, size in zip(tensor.axes, self.shapes[tensor.name], strict=True)
                if isinstance(axis, str)
            }
        (found,) = (tensor for tensor in self.engine.description.outputs if tensor.name == name)
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in found.axes)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return memory != 0

    def execute_async_v3(self, stream: int) -> bool:
        cuda = self.engine.cuda
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        if cuda.recording is not None and cuda.refuses:
            return not self.engine.notices
        cuda.put(lambda: self.engine.compute(shapes, addresses))
        return stream == cuda.STREAM


class Engine:
    """Stands in for an engine."""

    device_memory_size_v2 = 100
    notices = True  # that it cannot be recorded; otherwise CUDA does

    def __init__(self, model: onnx.ModelProto, description: EngineDescription, cuda: HostRuntime) -> None:
        self.description = description
        self.cuda = cuda
        self.tensors = [*description.inputs, *description.outputs]
        self.inputs = {tensor.name for tensor in description.inputs}
        self.num_io_tensors = len(self.tensors)
        self.contexts: list[Context] = []
        self.onnx = OnnxRuntimeEngine(model, pages=PAGES)

    def get_tensor_name(self, index: int) -> str:
        return self.tensors[index].name

    def get_tensor_dtype(self, name: str) -> int:
        return next(tensor.dtype for tensor in self.tensors if tensor.name == name)

    def create_execution_context(self, strategy: str) -> Context:
        assert strategy == "user managed"
        self.contexts.append(Context(self))
        return self.contexts[-1]

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        """The step that lies at the addresses, on the pools that lie there."""
        held = self.description.cache == RESIDENT
        caches = () if held else self.description.metadata.caches
        for cache in caches:
            assert addresses[cache.output] == addresses[cache.name]
            self.onnx.write_pages(cache.name, self.array(cache.name, shapes[cache.name], addresses[cache.name]))
        values = {name: self.array(name, shape, addresses[name]) for name, shape in shapes.items()}
        copies = values.pop("page_copies", np.zeros((0, 2), np.int32))
        given = {name: value for name, value in values.items() if "cache." not in name}
        results = self.onnx.run(given, copies)
        for name, value in results.items():
            self.array(name, value.shape, addresses[name])[...] = value
        for cache in caches:
            self.array(cache.name, shapes[cache.name], addresses[cache.name])[...] = self.onnx.read_pages(cache.name)

    def array(self, name: str, shape: tuple[int, ...], address: int) -> np.ndarray:
        (tensor,) = (tensor for tensor in self.tensors if tensor.name == name)
        size = int(np.prod(shape)) * tensor.numpy_dtype.itemsize
        memory = (ctypes.c_ubyte * size).from_address(address)
        return np.ctypeslib.as_array(memory).view(tensor.numpy_dtype).reshape(shape)


class Logger:
    """Stands in for TensorRT's."""

    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)


@pytest.fixture
def open_runner(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., tuple[TensorRtEngine, HostRuntime, Engine]]]:
    """Opens a model as if it were an engine; gives the engine, and what stands in for CUDA and TensorRT."""
    opened: list[tuple[TensorRtEngine, HostRuntime]] = []

    def open_model(
        model: onnx.ModelProto, loadable: bool = True, cache: str = IO
    ) -> tuple[TensorRtEngine, HostRuntime, Engine]:
        cuda, description = HostRuntime(), describe(model, cache, **LIMITS)
        engine = Engine(model, description, cuda)
        kinds = SimpleNamespace(FLOAT=1, UINT8=2, INT8=3, INT32=6, INT64=7, BOOL=9, HALF=10, BF16=16)
        trt = SimpleNamespace(
            __version__="10.6.0",
            DataType=kinds,
            ILogger=Logger,
            init_libnvinfer_plugins=lambda *_: True,
            ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
            Runtime=lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _: engine if loadable else None),
        )
        module = "mla_trt.engines.tensorrt_runner"
        monkeypatch.setattr(f"{module}.find_gpu", lambda: Gpu("NVIDIA H200", "9.0", 1 << 37))
        monkeypatch.setattr(f"{module}.load_tensorrt", lambda: trt)
        monkeypatch.setattr(f"{module}.load_plugins", lambda *_: "0.1.0 sm_80 sm_90a")
        monkeypatch.setattr("mla_trt.cuda._runtime", lambda: cuda)
        plan = tmp_path / "plan"
        plan.write_bytes(b"plan")
        opened_engine = TensorRtEngine(description, TensorRtRunner(plan, description, pages=PAGES), PAGES)
        opened.append((opened_engine, cuda))
        return opened_engine, cuda, engine

    yield open_model
    for engine, cuda in opened:
        engine.close()
        assert (cuda.blocks, cuda.graphs, cuda.streams) == ({}, [], 0)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("config", [CONFIG, SPARSE], ids=["dense", "sparse"])
def test_sessions_run_and_recurring_steps_are_recorded(
    config: Config, cache: str, open_runner: Callable[..., tuple[TensorRtEngine, HostRuntime, Engine]]
) -> None:
    model = with_known_axes(lowered(config, page_copies=True))
    engine, cuda, _ = open_runner(model, cache=cache)
    sessions = [Session(engine), Session(OnnxRuntimeEngine(model, pages=PAGES))]
    prompts = [[1, 2, 3, 4, 5], [6, 7], [8]]
    numbers = [[session.prefill(prompt)[0] for prompt in prompts] for session in sessions]
    for step in range(14):
        if step == 5:
            for session, sequences in zip(sessions, numbers, strict=True):
                sequences.append(session.fork(sequences[0]))
        found = [
            session.decode({sequence: (3 * step + place) % 50 for place, sequence in enumerate(sequences)})
            for session, sequences in zip(sessions, numbers, strict=True)
        ]
        for left, right in zip(found[0].values(), found[1].values(), strict=True):
            np.testing.assert_allclose(left, right, atol=2e-5)
    assert engine.recordings
    assert cuda.launched >= 3


@pytest.mark.parametrize("notices", [True, False])
def test_what_cannot_be_recorded_runs_as_it_is(
    notices: bool, open_runner: Callable[..., tuple[TensorRtEngine, HostRuntime, Engine]]
) -> None:
    model = with_known_axes(lowered(CONFIG))
    engine, cuda, stand_in = open_runner(model)
    cuda.refuses, stand_in.notices = True, notices
    sessions = [Session(engine), Session(OnnxRuntimeEngine(model, pages=PAGES))]
    (first, second) = (session.prefill([1, 2, 3])[0] for session in sessions)
    for token in range(9):
        found = [
            session.decode({sequence: token})[sequence]
            for session, sequence in zip(sessions, (first, second), strict=True)
        ]
        np.testing.assert_allclose(found[0], found[1], atol=2e-5)
    assert engine.recordings is None
    assert cuda.launched == 0
    assert len(stand_in.contexts) <= 3


def test_pages_are_read_written_and_copied(
    open_runner: Callable[..., tuple[TensorRtEngine, HostRuntime, Engine]],
) -> None:
    model = with_known_axes(lowered(CONFIG))
    engine, _, _ = open_runner(model)
    name = engine.metadata.caches[0].name
    pages = engine.read_pages(name)
    assert not pages.any()
    pages[3] = 5
    engine.write_pages(name, pages)
    np.testing.assert_array_equal(engine.read_pages(name), pages)
    engine._runner.copy_pages(np.array([[3, 7]], np.int32))
    assert (engine.read_pages(name)[7] == 5).all()
    with pytest.raises(MlaTrtError, match=r"the pool 'kv_cache\.0' is"):
        engine.write_pages(name, pages[1:])


def test_pages_that_the_plugins_hold_are_out_of_reach(
    open_runner: Callable[..., tuple[TensorRtEngine, HostRuntime, Engine]],
) -> None:
    engine, cuda, stand_in = open_runner(with_known_axes(lowered(CONFIG)), cache=RESIDENT)
    assert [len(block) - GUARD for block in cuda.blocks.values()] == [stand_in.device_memory_size_v2]  # no pools
    Session(engine).prefill([1, 2, 3])
    assert engine.pages == PAGES
    name = engine.metadata.caches[0].name
    for use in (lambda: engine.read_pages(name), lambda: engine.write_pages(name, np.zeros((PAGES, 1), np.int32))):
        with pytest.raises(MlaTrtError, match="the engine's plugins hold its pages, which cannot be read"):
            use()


def test_a_plan_that_does_not_load_is_an_error(
    open_runner: Callable[..., tuple[TensorRtEngine, HostRuntime, Engine]],
) -> None:
    with pytest.raises(BadModelError, match=r"TensorRT cannot load .*: TensorRT gave no reason"):
        open_runner(with_known_axes(lowered(CONFIG)), loadable=False)
