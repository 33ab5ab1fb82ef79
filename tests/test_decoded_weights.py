"""Weights that a model computes in every step are computed once: which, and that they are what the model would compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from mla_trt.engines.decoded_weights import decode_weights
from mla_trt.engines.plugin_model import write_plugin_model
from mla_trt.float32 import to_float32
from mla_trt.loading import ModelOnDisk, external_file
from mla_trt.weight_file import WeightFile

K, N, BLOCK = 96, 64, 32
BFLOAT16, FLOAT16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT
RANDOM = np.random.default_rng(0)
CODES = RANDOM.integers(-8, 8, (N, K))
SCALES = np.exp2(RANDOM.integers(-3, 3, (N // BLOCK, K // BLOCK))).astype(np.float32)
WANTED = (CODES * np.kron(SCALES, np.ones((BLOCK, BLOCK)))).T.astype(np.float32)


class Graph:
    """x [T, K] times a weight [K, N]."""

    def __init__(self, kind: int = BFLOAT16) -> None:
        self.kind = kind
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.outputs = {"y": kind}

    def op(self, output: str, kind: str, *inputs: str | np.ndarray, **attributes: Any) -> str:
        """Adds a node."""
        names = [value if isinstance(value, str) else f"{output}.{place}" for place, value in enumerate(inputs)]
        self.constants |= {name: value for name, value in zip(names, inputs, strict=True) if not isinstance(value, str)}
        self.nodes.append(helper.make_node(kind, names, [output], name=output, **attributes))
        return output

    def blocks(self, kind: type = ml_dtypes.float8_e4m3fn) -> str:
        """The weight as codes with a scale for each block, turned and rounded last."""
        codes = self.op("codes", "DequantizeLinear", CODES.astype(kind), np.array(1, np.float32))
        tall = self.op("tall", "Expand", SCALES[:, None, :, None], np.array([1, BLOCK, 1, BLOCK]))
        scales = self.op("scales", "Reshape", tall, np.array([N, K]))
        turned = self.op("turned", "Transpose", self.op("scaled", "Mul", codes, scales), perm=[1, 0])
        return self.op("weight", "Cast", turned, to=self.kind)

    def model(self) -> onnx.ModelProto:
        """The graph as it is now."""
        value = helper.make_tensor_value_info
        outputs = [value(name, kind, None) for name, kind in self.outputs.items()]
        initializers = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "graph", [value("x", self.kind, ["T", K])], outputs, initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def _results(model: onnx.ModelProto) -> list[np.ndarray]:
    plain = to_float32(model)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(plain.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).normal(size=(5, K)).astype(np.float32)
    return session.run(None, {"x": x} if session.get_inputs() else {})


def _check(graph: Graph, decoded: int) -> dict[str, TensorProto]:
    """Decodes so many weights, and the graph computes what it did; returns its initializers."""
    model = graph.model()
    before = _results(model)
    assert decode_weights(ModelOnDisk(model, None)) == decoded
    for found, wanted in zip(_results(model), before, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    return {tensor.name: tensor for tensor in model.graph.initializer}


@pytest.mark.parametrize("codes", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int8, ml_dtypes.int4])
@pytest.mark.parametrize("kind", [BFLOAT16, FLOAT16])
def test_codes_with_scales_of_blocks(codes: type, kind: int) -> None:
    graph = Graph(kind)
    graph.op("y", "MatMul", "x", graph.blocks(codes))
    (weight,) = _check(graph, 1).values()
    assert (weight.name, weight.data_type) == ("weight", kind)
    if codes is not ml_dtypes.float8_e5m2:  # has fewer bits than the codes
        np.testing.assert_array_equal(numpy_helper.to_array(weight).astype(np.float32), WANTED)


def test_what_is_only_moved_is_moved_now() -> None:
    graph = Graph()
    halves = np.split(WANTED.T.astype(ml_dtypes.bfloat16), 2)
    turned = [graph.op(f"turned.{i}", "Transpose", half, perm=[1, 0]) for i, half in enumerate(halves)]
    graph.op("y", "MatMul", "x", graph.op("weight", "Concat", *turned, axis=1))
    assert list(_check(graph, 1)) == ["weight"]


def test_a_weight_of_two_products_is_decoded_once() -> None:
    graph = Graph()
    weight = graph.blocks()
    graph.op("y", "MatMul", "x", weight)
    graph.op("z", "MatMul", graph.op("more", "Neg", "x"), weight)
    graph.outputs["z"] = BFLOAT16
    assert list(_check(graph, 1)) == ["weight"]


def test_what_else_is_made_of_the_codes_keeps_them() -> None:
    graph = Graph()
    graph.op("y", "MatMul", "x", graph.blocks())
    graph.outputs["scaled"] = FLOAT
    assert {"weight", "codes.0", "tall.0"} <= set(_check(graph, 1))


def _float32(graph: Graph) -> None:
    graph.blocks()
    graph.op("wide", "Cast", "x", to=FLOAT)
    graph.op("product", "MatMul", "wide", "turned")
    graph.op("y", "Cast", "product", to=BFLOAT16)


def _of_the_step(graph: Graph) -> None:
    largest = graph.op("largest", "Cast", graph.op("most", "ReduceMax", "x", keepdims=0), to=FLOAT)
    codes = graph.op("codes", "DequantizeLinear", CODES.T.astype(np.int8), np.array(1, np.float32))
    weight = graph.op("weight", "Cast", graph.op("scaled", "Mul", codes, largest), to=BFLOAT16)
    graph.op("y", "MatMul", "x", weight)


def _as_it_lies(graph: Graph) -> None:
    graph.op("y", "MatMul", "x", WANTED.astype(ml_dtypes.bfloat16))


def _small(graph: Graph) -> None:
    few = graph.op("few", "Cast", np.ones((K, 8), np.float32), to=BFLOAT16)
    graph.op("y", "MatMul", "x", few)


def _codes_alone(graph: Graph) -> None:
    scale = np.array(0.5, ml_dtypes.bfloat16)
    graph.op("y", "MatMul", "x", graph.op("weight", "DequantizeLinear", CODES.T.astype(np.int8), scale))


def _result(graph: Graph) -> None:
    graph.blocks()
    graph.op("y", "MatMul", "x", WANTED.astype(ml_dtypes.bfloat16))
    graph.outputs["weight"] = BFLOAT16


@pytest.mark.parametrize("change", [_float32, _of_the_step, _as_it_lies, _small, _codes_alone, _result])
def test_what_stays(change: Callable[[Graph], None]) -> None:
    graph = Graph()
    change(graph)
    model = graph.model()
    before = model.SerializeToString()
    assert decode_weights(ModelOnDisk(model, None)) == 0
    assert model.SerializeToString() == before


def test_weights_on_disk(tmp_path: Path) -> None:
    graph = Graph()
    graph.op("y", "MatMul", "x", graph.blocks())
    model = graph.model()
    for tensor in model.graph.initializer:
        if tensor.name == "codes.0":
            WeightFile(tmp_path / "codes").move_out(tensor)
    assert decode_weights(ModelOnDisk(model, tmp_path), WeightFile(tmp_path / "new")) == 1
    (weight,) = model.graph.initializer
    assert external_file(weight) == "new"
    np.testing.assert_array_equal(numpy_helper.to_array(weight, str(tmp_path)).astype(np.float32), WANTED)


@pytest.mark.parametrize("keep", [True, False])
def test_a_model_for_the_parser(keep: bool, tmp_path: Path) -> None:
    graph = Graph()
    graph.op("y", "MatMul", "x", graph.blocks())
    onnx.save(graph.model(), tmp_path / "model.onnx")
    (tmp_path / "plugins").mkdir()
    told: list[tuple[int, int]] = []
    write_plugin_model(
        tmp_path / "model.onnx", tmp_path / "plugins", keep_codes=keep, progress=lambda *counts: told.append(counts)
    )
    assert told == ([] if keep else [(1, 1)])
    written = onnx.load(tmp_path / "plugins" / "model.onnx")
    assert ("DequantizeLinear" in {node.op_type for node in written.graph.node}) is keep
    assert [path.name for path in (tmp_path / "plugins").iterdir() if path.name != "model.onnx"] == (
        [] if keep else ["bf16.0.data"]
    )
