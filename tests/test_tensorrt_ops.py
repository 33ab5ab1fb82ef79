"""Exports with FP8 ops of TensorRT's own, as NVIDIA's quantizers write them."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
import small_models
from onnx import TensorProto, helper, numpy_helper

from mla_trt.cli import main
from mla_trt.engines.onnxruntime_session import open_session
from mla_trt.errors import BadModelError
from mla_trt.loading import load_model
from mla_trt.passes.tensorrt_ops import spell_fp8_ops

CONFIG = small_models.Config()
ONE_NODE = """<ir_version: 10, opset_import: ["" : {opset}, "trt" : 1]> small (float[2, 4] x) => (float[2, 4] y)
<float[1] s = {{0.25}}, float t = {{0.25}}> {{ q = trt.TRT_FP8QuantizeLinear(x, {scale}) y = trt.TRT_FP8DequantizeLinear(q, {scale}) }}"""


def e4m3(values: np.ndarray) -> np.ndarray:
    return np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


@pytest.mark.parametrize("scale", ["s", "t"])
@pytest.mark.parametrize("opset", [17, 19, 23])
def test_data_is_rounded_to_e4m3(opset: int, scale: str) -> None:
    model = onnx.parser.parse_model(ONE_NODE.format(opset=opset, scale=scale))
    model.graph.value_info.append(helper.make_tensor_value_info("q", TensorProto.UINT8, [2, 4]))
    model = spell_fp8_ops(model)
    assert [node.op_type for node in model.graph.node] == ["QuantizeLinear", "DequantizeLinear"]
    x = np.array([[0.3, -0.013, 1e5, -1e5], [111.9, 0, 27.1, -3e-5]], np.float32)
    (y,) = open_session(model).run(None, {"x": x})
    np.testing.assert_array_equal(y, e4m3(x / 0.25) * 0.25)
    assert spell_fp8_ops(model) is model


@pytest.mark.parametrize("data_type", [TensorProto.UINT8, TensorProto.INT8, TensorProto.FLOAT8E4M3FN])
def test_codes_are_held_as_bytes_or_as_e4m3(data_type: int) -> None:
    model = onnx.parser.parse_model(ONE_NODE.format(opset=20, scale="s"))
    del model.graph.node[0]
    codes = np.arange(-0x40, 0x40, 16).astype(np.int8).reshape(2, 4)
    model.graph.initializer.append(helper.make_tensor("q", data_type, [2, 4], codes.tobytes(), raw=True))
    model = spell_fp8_ops(model)
    (y,) = open_session(model).run(None, {"x": np.zeros((2, 4), np.float32)})
    np.testing.assert_array_equal(y, codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * 0.25)


def test_a_node_without_a_scale_stays() -> None:
    model = onnx.parser.parse_model(ONE_NODE.format(opset=17, scale="s"))
    del model.graph.node[0].input[1]
    assert [node.op_type for node in spell_fp8_ops(model).graph.node] == ["TRT_FP8QuantizeLinear", "DequantizeLinear"]


@pytest.mark.parametrize(
    ("op", "inputs"), [("NoSuchOp", ["y"]), ("Squeeze", []), ("Upsample", ["y"])], ids=["unknown", "inputs", "gone"]
)
def test_what_cannot_be_converted_is_refused(op: str, inputs: list[str], tmp_path: Path) -> None:
    model = onnx.parser.parse_model(ONE_NODE.format(opset=17, scale="s"))
    model.graph.node.append(helper.make_node(op, inputs, ["z"], name="odd"))
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(BadModelError):
        load_model(tmp_path / "odd.onnx")


def quantised() -> onnx.ModelProto:
    """A small export whose products with weights have both operands rounded, each by its scale."""
    model = small_models.original(CONFIG)
    for entry in model.opset_import:
        assert entry.domain or entry.version >= 19
    model.opset_import.append(helper.make_opsetid("trt", 1))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            largest = float(np.abs(numpy_helper.to_array(weights[node.input[1]])).max())
            for index, scale in enumerate((1 / 16, largest / 448)):
                name = f"{node.output[0]}/{index}"
                value = numpy_helper.from_array(np.float32([scale] if index else scale))
                nodes += [
                    helper.make_node("Constant", [], [f"{name}/s"], value=value),
                    helper.make_node(
                        "TRT_FP8QuantizeLinear", [node.input[index], f"{name}/s"], [f"{name}/q"], domain="trt"
                    ),
                    helper.make_node(
                        "TRT_FP8DequantizeLinear", [f"{name}/q", f"{name}/s"], [f"{name}/d"], domain="trt"
                    ),
                ]
                node.input[index] = f"{name}/d"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def test_an_export_is_lowered_and_verified(tmp_path: Path) -> None:
    onnx.save(quantised(), tmp_path / "export.onnx")
    assert main(["lower", str(tmp_path / "export.onnx"), "-o", str(tmp_path / "lowered"), "--quiet"]) == 0
    report = json.loads((tmp_path / "lowered" / "report.json").read_text())
    assert report["matched"] == report["attention_cores"] == CONFIG.layers
    assert report["verification"]["passed"]
    lowered = onnx.load(tmp_path / "lowered" / "model.onnx")
    assert any(node.op_type == "QuantizeLinear" for node in lowered.graph.node)
    assert not any(node.domain == "trt" for node in lowered.graph.node)
