"""The measured engines over a stand-in for TensorRT and CUDA: host memory, ONNX Runtime, recordings that repeat a call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from mla_trt.bench import step_engine as bench_engine
from mla_trt.bench.step_engine import StepEngine, build_static
from mla_trt.errors import BadModelError, MlaTrtError
from mla_trt.models.attention_layer import LayerDimensions, absorbed_layer, random_weights

SMALL = LayerDimensions(hidden=48, heads=4, query_rank=40, rank=32, nope=24, rope=16, value=20)
BATCH, KEYS = 2, 5
MODEL = absorbed_layer(SMALL, random_weights(SMALL, TensorProto.FLOAT), batch=BATCH, total=KEYS)


class HostMemory:
    """Stands in for `mla_trt.cuda.Memory`."""

    alive = 0

    def __init__(self, size: int) -> None:
        self.values = np.zeros(size, np.uint8)
        self.address = self.values.ctypes.data
        HostMemory.alive += 1

    def fill(self, byte: int) -> None:
        self.values[:] = byte

    def write(self, values: np.ndarray, start: int = 0) -> None:
        self.values[start : start + values.nbytes] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)

    def read(self) -> np.ndarray:
        return self.values.copy()

    def close(self) -> None:
        HostMemory.alive -= 1


class HostStream:
    """Stands in for `mla_trt.cuda.Stream`."""

    handle = 7
    launched = 0

    def synchronize(self) -> None:
        pass

    def capture(self, work: Callable[[], None]) -> Any:
        return SimpleNamespace(work=work, close=lambda: None)

    def launch(self, graph: Any) -> None:
        self.launched += 1
        graph.work()

    def record(self) -> int:
        return self.launched


class Engine:
    """Stands in for an engine and its execution context: runs the model on what lies at its addresses."""

    def __init__(self, free_batch: bool) -> None:
        self.session = onnxruntime.InferenceSession(MODEL.SerializeToString(), providers=["CPUExecutionProvider"])
        self.inputs = {entry.name: tuple(entry.shape) for entry in self.session.get_inputs()}
        self.outputs = {entry.name: tuple(entry.shape) for entry in self.session.get_outputs()}
        self.names = [*self.outputs, *self.inputs]
        self.num_io_tensors = len(self.names)
        self.free_batch = free_batch
        self.given: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> str:
        return "float"

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.inputs else "out"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.outputs:
            unknown = self.free_batch and not self.given.keys() >= self.inputs.keys()
            return (-1, *self.outputs[name][1:]) if unknown else self.outputs[name]
        return (-1, *self.inputs[name][1:]) if self.free_batch else self.inputs[name]

    def create_execution_context(self) -> Engine:
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.free_batch
        self.given[name] = shape
        return shape == self.inputs[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == HostStream.handle
        values = {name: self._array(name, shape) for name, shape in self.inputs.items()}
        for name, value in zip(self.outputs, self.session.run(list(self.outputs), values), strict=True):
            self._array(name, value.shape)[...] = value
        return True

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        memory = (ctypes.c_float * int(np.prod(shape))).from_address(self.addresses[name])
        return np.ctypeslib.as_array(memory).reshape(shape)


def tensorrt(engine: Engine | None) -> Any:
    types = ("HALF", "BF16", "INT8", "INT32", "INT64", "BOOL", "UINT8")
    return SimpleNamespace(
        DataType=SimpleNamespace(FLOAT="float", **{name: name for name in types}),
        TensorIOMode=SimpleNamespace(INPUT="in"),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine),
    )


@pytest.fixture(autouse=True)
def _on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    HostMemory.alive = 0
    monkeypatch.setattr(bench_engine, "Memory", HostMemory)
    monkeypatch.setattr(bench_engine, "start", lambda trt, messages: "logger")
    monkeypatch.setattr(bench_engine, "milliseconds", lambda begin, end: 0.004 * (end - begin))
    monkeypatch.setattr(bench_engine, "synchronize", lambda: None)


@pytest.fixture
def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"hidden_states": (BATCH, 48), "cos": (BATCH, 16), "sin": (BATCH, 16), "cache": (BATCH, KEYS, 48)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan"
    path.write_bytes(b"plan")
    return path


@pytest.mark.parametrize("free_batch", [False, True])
def test_a_step_is_run_and_recorded(plan: Path, inputs: dict[str, np.ndarray], free_batch: bool) -> None:
    stream = HostStream()
    engine = StepEngine(tensorrt(Engine(free_batch)), plan, inputs, {}, stream)  # type: ignore[arg-type]
    assert np.isnan(engine.read("attn_out")).all()
    session = onnxruntime.InferenceSession(MODEL.SerializeToString(), providers=["CPUExecutionProvider"])
    engine.run()
    np.testing.assert_array_equal(engine.read("attn_out"), session.run(["attn_out"], inputs)[0])
    row = np.full(48, 2.0)
    engine.write("cache", row, (KEYS + 1) * 48)
    inputs["cache"][1, 1] = row
    engine.record()
    assert engine.time(3) == pytest.approx(4.0)
    assert stream.launched == 3
    np.testing.assert_array_equal(engine.read("attn_out"), session.run(["attn_out"], inputs)[0])
    engine.close()
    assert HostMemory.alive == 0


def test_an_output_lies_where_its_input_does(plan: Path, inputs: dict[str, np.ndarray]) -> None:
    fake = Engine(False)
    engine = StepEngine(tensorrt(fake), plan, inputs, {"attn_out": "hidden_states"}, HostStream())  # type: ignore[arg-type]
    assert fake.addresses["attn_out"] == fake.addresses["hidden_states"]
    engine.close()
    assert HostMemory.alive == 0


def test_what_does_not_fit_is_said_and_leaves_no_memory(plan: Path, inputs: dict[str, np.ndarray]) -> None:
    with pytest.raises(MlaTrtError, match="cannot load the engine"):
        StepEngine(tensorrt(None), plan, inputs, {}, HostStream())  # type: ignore[arg-type]
    wrong = {**inputs, "cache": inputs["cache"].astype(np.float16)}
    with pytest.raises(MlaTrtError, match="'cache' is float16, must be float32"):
        StepEngine(tensorrt(Engine(False)), plan, wrong, {}, HostStream())  # type: ignore[arg-type]
    larger = {**inputs, "hidden_states": np.zeros((3, 48), np.float32)}
    with pytest.raises(MlaTrtError, match=r"does not take \[3, 48\] for 'hidden_states'"):
        StepEngine(tensorrt(Engine(True)), plan, larger, {}, HostStream())  # type: ignore[arg-type]
    assert HostMemory.alive == 0


class Builder:
    """Stands in for TensorRT's builder, network, parser and configuration."""

    def __init__(self, parses: bool = True, builds: bool = True) -> None:
        self.parses, self.builds = parses, builds
        self.caches: list[bytes] = []
        self.builder_optimization_level = 0
        self.num_errors = 1

    def module(self) -> Any:
        return SimpleNamespace(
            Builder=lambda logger: self,
            OnnxParser=lambda network, logger: self,
            NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        )

    def create_network(self, flags: int) -> Builder:
        assert flags == 2
        return self

    def parse_from_file(self, path: str) -> bool:
        assert onnx.load(path, load_external_data=False).graph.node
        return self.parses

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(node_name=lambda: "n", node_operator=lambda: "MatMul", desc=lambda: "no such type")

    def create_builder_config(self) -> Builder:
        return self

    def create_timing_cache(self, data: bytes) -> Builder:
        self.caches.append(data)
        return self

    def set_timing_cache(self, cache: Builder, ignore_mismatch: bool) -> bool:
        return True

    def build_serialized_network(self, network: Builder, config: Builder) -> bytes | None:
        return b"engine" if self.builds else None

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"times")


def test_a_model_of_fixed_sizes_is_built(tmp_path: Path) -> None:
    builder, model, cache = Builder(), tmp_path / "model.onnx", tmp_path / "times"
    model.write_bytes(MODEL.SerializeToString())
    for _ in range(2):
        build_static(builder.module(), model, tmp_path / "plan", optimization_level=2, timing_cache=cache)
    assert (tmp_path / "plan").read_bytes() == b"engine"
    assert builder.caches == [b"", b"times"]
    assert builder.builder_optimization_level == 2


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        (Builder(parses=False), r"does not take node 'n' \(MatMul\): no such type"),
        (Builder(builds=False), "cannot build the engine"),
    ],
)
def test_what_tensorrt_does_not_build_is_said(tmp_path: Path, builder: Builder, message: str) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(MODEL.SerializeToString())
    with pytest.raises(BadModelError, match=message):
        build_static(builder.module(), model, tmp_path / "plan", optimization_level=2, timing_cache=tmp_path / "times")
    assert not (tmp_path / "plan").exists()
