"""Exports whose products are quantised as data flows: read as products with the dequantised weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import small_models
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from mla_trt.cli import main
from mla_trt.engines.onnxruntime_session import open_session
from mla_trt.errors import BadModelError
from mla_trt.passes.dynamic_quantization import undo_dynamic_quantization
from mla_trt.passes.simplify import simplify
from mla_trt.passes.standardize import standardize

FUSED = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
INTEGER = {"DynamicQuantizeLinear", "MatMulInteger", *FUSED}


def ops(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def quantised(folder: Path, *, per_channel: bool, unsigned: bool, fused: bool) -> onnx.ModelProto:
    """The small model with its projections quantised by ONNX Runtime, and its products fused, too, if wanted. Codes have seven bits: pairs of
    products of eight exceed 16 bits, at which ONNX Runtime cuts them off on CPUs without VNNI."""
    source, result = folder / "float.onnx", folder / "export.onnx"
    onnx.save(small_models.original(small_models.Config()), source)
    kind = QuantType.QUInt8 if unsigned else QuantType.QInt8
    quantize_dynamic(
        source,
        result,
        op_types_to_quantize=["MatMul"],
        per_channel=per_channel,
        reduce_range=True,
        weight_type=kind,
    )
    if fused:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(folder / "fused.onnx")
        onnxruntime.InferenceSession(result, options, providers=["CPUExecutionProvider"])
        (folder / "fused.onnx").replace(result)
    return onnx.load(result)


def dequantised(model: onnx.ModelProto) -> onnx.ModelProto:
    """The small model with the weights that the codes of its quantised form stand for."""
    plain = small_models.original(small_models.Config())
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for tensor in plain.graph.initializer:
        if f"{tensor.name}_quantized" in stored:
            codes, scale, point = (stored[f"{tensor.name}_{part}"] for part in ("quantized", "scale", "zero_point"))
            values = (codes.astype(np.float32) - point.astype(np.float32)) * scale
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    return plain


def results(model: onnx.ModelProto) -> np.ndarray:
    c = small_models.Config()
    random = np.random.default_rng(0)
    feeds = {"input_ids": random.integers(0, c.vocabulary, (2, 4)), "position_ids": np.arange(4)[None].repeat(2, 0) + 3}
    for layer in range(c.layers):
        for name, size in (("latent", c.kv_lora_rank), ("rope", c.qk_rope_head_dim)):
            feeds[f"past_{name}.{layer}"] = random.standard_normal((2, 3, size)).astype(np.float32)
    return open_session(model).run(["logits"], feeds)[0]


def undone(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    graph = gs.import_onnx(standardize(model))
    simplify(graph)
    count = undo_dynamic_quantization(graph, None)
    exported = gs.export_onnx(graph, do_type_check=False)
    exported.ir_version = 10
    return exported, count


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_products_are_those_of_the_dequantised_weights(
    per_channel: bool, unsigned: bool, fused: bool, tmp_path: Path
) -> None:
    model = quantised(tmp_path, per_channel=per_channel, unsigned=unsigned, fused=fused)
    assert bool(ops(model) & FUSED) == fused
    expected = results(dequantised(model))
    rewritten, count = undone(model)
    assert count == 9  # four projections in each of two layers, and the logits'
    assert not ops(rewritten) & INTEGER
    np.testing.assert_allclose(results(rewritten), expected, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_an_export_quantised_as_data_flows_is_lowered_and_its_errors_are_stated(fused: bool, tmp_path: Path) -> None:
    model = quantised(tmp_path, per_channel=True, unsigned=False, fused=fused)
    assert main(["lower", str(tmp_path / "export.onnx"), "-o", str(tmp_path / "lowered"), "--quiet"]) == 0
    report = json.loads((tmp_path / "lowered" / "report.json").read_text())
    assert report["matched"] == report["attention_cores"] == 2
    assert report["verification"]["passed"]
    assert not report["verification"]["judged"]
    assert 0 < report["verification"]["rewrite_max_error"] < 0.2
    assert any("quantises activations" in line for line in report["assumptions"])
    lowered = onnx.load(tmp_path / "lowered" / "model.onnx")
    assert not ops(lowered) & INTEGER
    codes = {tensor.name: tensor.raw_data for tensor in lowered.graph.initializer}
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert codes["lm_head_quantized"] == before["lm_head_quantized"].tobytes()


@pytest.mark.parametrize(
    ("product", "count"),
    [
        ("y = Mul(float, factor)", 1),
        ("first = Mul(b_scale, float)  y = Mul(first, a_scale)", 1),
        ("factor2 = Mul(a_scale, a_scale)  y = Mul(float, factor2)", 0),
        ("half = Mul(factor, a_scale)  y = Mul(float, half)", 0),
    ],
)
def test_only_the_scales_of_both_operands_make_a_product(product: str, count: int) -> None:
    """Both operands are data here."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> small (float[3, 4] a, float[4, 5] b) => (float[3, 5] y) {'
        "  a_codes, a_scale, a_point = DynamicQuantizeLinear(a)  b_codes, b_scale, b_point = DynamicQuantizeLinear(b)"
        "  integers = MatMulInteger(a_codes, b_codes, a_point, b_point)  float = Cast<to: int = 1>(integers)"
        f"  factor = Mul(a_scale, b_scale)  {product} }}"
    )
    rewritten, found = undone(model)
    assert found == count
    assert ("MatMulInteger" in ops(rewritten)) == (count == 0)


@pytest.mark.parametrize(("shape", "count"), [((), 1), ((5,), 1), ((1, 5), 1), ((5, 1), 0), ((1, 1, 1), 0)])
def test_scales_of_rows_are_left_as_they_are(shape: tuple[int, ...], count: int) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> small (float[5, 4] x) => (float[M, N] y) {'
        "  codes, scale, point = DynamicQuantizeLinear(x)  integers = MatMulInteger(codes, w, point)"
        "  float = Cast<to: int = 1>(integers)  factor = Mul(scale, w_scale)  y = Mul(float, factor) }"
    )
    random = np.random.default_rng(0)
    codes = random.integers(-128, 128, (4, 5)).astype(np.int8)
    weights = {"w": codes, "w_scale": random.uniform(0.5, 1, shape).astype(np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    assert undone(model)[1] == count


def test_another_zero_point_is_left_as_it_is() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> small (float[3, 4] a, float[4, 5] b) => (float[3, 5] y) {'
        "  a_codes, a_scale, a_point = DynamicQuantizeLinear(a)  b_codes, b_scale, b_point = DynamicQuantizeLinear(b)"
        "  integers = MatMulInteger(a_codes, b_codes, b_point, b_point)  float = Cast<to: int = 1>(integers)"
        "  factor = Mul(a_scale, b_scale)  y = Mul(float, factor) }"
    )
    assert undone(model)[1] == 0


def test_an_attention_that_no_runtime_loads_is_refused() -> None:
    node = helper.make_node("QAttention", ["x"] * 5, ["y"], name="attention", domain="com.microsoft", is_causal=1)
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2, 3]) for name in "xy"]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "small", values[:1], values[1:]), opset_imports=imports)
    with pytest.raises(BadModelError, match="op_types_to_quantize"):
        standardize(model)
