"""Exports whose data is rounded by constant scales: the attention is recognised through the roundings, the others stay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
import small_models
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from mla_trt.cli import main
from mla_trt.engines.onnxruntime_session import open_session
from mla_trt.passes.graph import Emitter, Names
from mla_trt.passes.standardize import standardize
from mla_trt.passes.static_quantization import put_back_roundings, take_out_roundings

CONFIG = small_models.Config()


class Samples(CalibrationDataReader):
    """Tokens behind cached rows, as a decoder gets them."""

    def __init__(self, count: int = 4) -> None:
        self.left: Iterator[dict[str, np.ndarray]] = iter([feeds(seed) for seed in range(count)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)


def feeds(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    given: dict[str, np.ndarray] = {
        "input_ids": random.integers(0, CONFIG.vocabulary, (2, 4)),
        "position_ids": np.arange(4)[None].repeat(2, 0) + 3,
    }
    for layer in range(CONFIG.layers):
        for name, size in (("latent", CONFIG.kv_lora_rank), ("rope", CONFIG.qk_rope_head_dim)):
            given[f"past_{name}.{layer}"] = random.standard_normal((2, 3, size)).astype(np.float32)
    return given


def quantised(folder: Path, quant_format: QuantFormat = QuantFormat.QDQ, **options: Any) -> Path:
    source, result = folder / "float.onnx", folder / "export.onnx"
    onnx.save(small_models.original(CONFIG), source)
    quantize_static(
        source,
        result,
        Samples(),
        quant_format=quant_format,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True},
        **options,
    )
    return result


def rounded(model: onnx.ModelProto) -> dict[str, list[str]]:
    """The ops that read rounded data, by the scale's name; results of the model are "output"."""
    makers = {name: node for node in model.graph.node for name in node.output}
    outputs = {output.name for output in model.graph.output}
    found: dict[str, list[str]] = {}
    for node in model.graph.node:
        maker = makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if maker is not None and maker.op_type == "QuantizeLinear":
            readers = [other.op_type for other in model.graph.node if node.output[0] in other.input]
            found.setdefault(node.input[1], []).extend(readers + ["output"] * (node.output[0] in outputs))
    return found


def without(model: onnx.ModelProto, scales: set[str]) -> onnx.ModelProto:
    """The model less the roundings by these scales."""
    makers = {name: node for node in model.graph.node for name in node.output}
    exact = {}
    for node in model.graph.node:
        maker = makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if maker is not None and maker.op_type == "QuantizeLinear" and node.input[1] in scales:
            exact[node.output[0]] = maker.input[0]
    outputs = {output.name for output in model.graph.output}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = exact.get(name, name)
    for name in outputs & set(exact):
        makers[name].output[0] = f"{name}.rounded"
        model.graph.node.append(onnx.helper.make_node("Identity", [exact[name]], [name]))
    return model


def rounding(x: str, r: str) -> str:
    return f"{r}_codes = QuantizeLinear({x}, s, z) {r} = DequantizeLinear({r}_codes, s, z)"


def graph_of(body: str, outputs: str = "float[2, 3] y") -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> small (float[2, 4] x, bool c) => ({outputs}) '
        f"<float s = {{0.5}}, float other = {{0.25}}, int8 z = {{3}}> {{ {body} }}"
    )
    random = np.random.default_rng(0)
    values = {
        "w": random.standard_normal((4, 3)).astype(np.float32),
        "many": np.full(4, 0.5, np.float32),
        "points": np.full(4, 3, np.int8),
        "zero": np.zeros((), np.int8),
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    return model


def taken_out(model: onnx.ModelProto) -> tuple[gs.Graph, int]:
    graph = gs.import_onnx(standardize(model))
    return graph, len(take_out_roundings(graph))


def results(graph: gs.Graph) -> list[np.ndarray]:
    model = gs.export_onnx(graph.toposort(), do_type_check=False)
    model.ir_version = 10
    x = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
    given = {"x": x, "c": np.array(True)}
    session = open_session(model)
    return session.run(None, {entry.name: given[entry.name] for entry in session.get_inputs()})


def ops(graph: gs.Graph) -> list[str]:
    return sorted(node.op for node in graph.nodes)


BODIES = {
    "a product": f"{rounding('x', 'r')} y = MatMul(r, w)",
    "two readers, one of them twice": f"{rounding('x', 'r')} p = MatMul(r, w) d = Mul(r, r) m = ReduceSum(d) y = Add(p, m)",
    "behind each other": f"{rounding('x', 'r')} e = Exp(r) {rounding('e', 't')} y = MatMul(t, w)",
    "a zero point of zero, or none": "q = QuantizeLinear(x, s, zero) r = DequantizeLinear(q, s) y = MatMul(r, w)",
    "a result": f"p = MatMul(x, w) {rounding('p', 'y')}",
    "a result that is read": f"p = MatMul(x, w) {rounding('p', 'y')} unused = Exp(y)",
    "an input as a result": f"{rounding('x', 'y')}",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_what_is_taken_out_can_be_put_back(body: str) -> None:
    outputs = "float[2, 4] y" if body is BODIES["an input as a result"] else "float[2, 3] y"
    model = graph_of(body, outputs)
    before = gs.import_onnx(standardize(model))
    graph = gs.import_onnx(standardize(model))
    roundings = take_out_roundings(graph)
    assert roundings
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(ops(graph))
    exact = results(graph)
    put_back_roundings(graph, roundings)
    expected = results(before)
    for found, wanted, unrounded in zip(results(graph), expected, exact, strict=True):
        np.testing.assert_array_equal(found, wanted)
        assert not np.array_equal(unrounded, wanted)
    assert [output.name for output in graph.outputs] == [output.name for output in before.outputs]


KEPT = {
    "scales of columns": "q = QuantizeLinear<axis: int = 1>(x, many, points) r = DequantizeLinear<axis: int = 1>(q, many, points) y = MatMul(r, w)",
    "another scale": "q = QuantizeLinear(x, s, z) r = DequantizeLinear(q, other, z) y = MatMul(r, w)",
    "no zero point": "q = QuantizeLinear(x, s, z) r = DequantizeLinear(q, s) y = MatMul(r, w)",
    "a scale that is data": "m = ReduceMax<keepdims: int = 0>(x) q = QuantizeLinear(x, m, z) r = DequantizeLinear(q, m, z) y = MatMul(r, w)",
    "weights": f"{rounding('w', 'r')} y = MatMul(x, r)",
    "what branches read": (
        f"{rounding('x', 'r')} y = If(c) <then_branch = yes () => (float[2, 3] a) {{ a = MatMul(r, w) }}, "
        "else_branch = no () => (float[2, 3] b) { e = Exp(r) b = MatMul(e, w) }>"
    ),
}


@pytest.mark.parametrize("body", KEPT.values(), ids=KEPT)
def test_other_quantisation_stays(body: str) -> None:
    graph, count = taken_out(graph_of(body))
    assert count == 0
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(ops(graph))


def test_sizes_are_not_rounded() -> None:
    graph = gs.import_onnx(standardize(graph_of(f"{rounding('x', 'r')} y = Shape(r)", "int64[2] y")))
    roundings = take_out_roundings(graph)
    assert put_back_roundings(graph, roundings) == 0
    assert ops(graph) == ["Shape"]


def test_a_node_that_became_another_one_gets_no_rounding() -> None:
    graph = gs.import_onnx(standardize(graph_of(f"{rounding('x', 'r')} p = MatMul(r, w) y = Exp(p)")))
    roundings = take_out_roundings(graph)
    product = next(node for node in graph.nodes if node.op == "MatMul")
    product.op = "Gemm"
    assert put_back_roundings(graph, roundings) == 0


@pytest.mark.parametrize(("op", "count"), [("MatMul", 1), ("Exp", 0)])
def test_what_took_the_place_of_the_data_is_rounded_for_products_alone(op: str, count: int) -> None:
    """Other nodes' inputs may have changed places."""
    reader = "y = MatMul(r, w)" if op == "MatMul" else "e = Exp(r) y = MatMul(e, w)"
    graph = gs.import_onnx(standardize(graph_of(f"{rounding('x', 'r')} {reader}")))
    roundings = take_out_roundings(graph)
    emitter = Emitter(graph, Names(graph))
    node = next(node for node in graph.nodes if node.op == op)
    node.inputs[0] = emitter.node("Identity", [node.inputs[0]], "other")
    assert put_back_roundings(graph, roundings) == count


PRODUCTS: dict[str, Any] = {"op_types_to_quantize": ["MatMul"], "per_channel": True}


@pytest.mark.parametrize(
    "options",
    [{}, PRODUCTS, PRODUCTS | {"quant_format": QuantFormat.QOperator}],
    ids=["all", "products", "products of integers"],
)
def test_an_export_with_constant_scales_is_lowered(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every product is rounded, those of queries and keys too, and all but MatMul by default."""
    export = quantised(tmp_path, **options)
    integers = "quant_format" in options
    assert integers == any(node.op_type == "QLinearMatMul" for node in onnx.load(export).graph.node)

    def source() -> onnx.ModelProto:
        return standardize(onnx.load(export)) if integers else onnx.load(export)

    assert main(["lower", str(export), "-o", str(tmp_path / "lowered"), "--quiet"]) == 0
    report = json.loads((tmp_path / "lowered" / "report.json").read_text())
    assert report["matched"] == report["attention_cores"] == CONFIG.layers
    assert report["verification"]["passed"]
    assert not report["verification"]["judged"]
    assert any("quantises activations" in line for line in report["assumptions"])

    before, after = rounded(source()), rounded(onnx.load(tmp_path / "lowered" / "model.onnx"))
    gone = set(before) - set(after)
    assert gone  # those of the attention itself
    (told,) = (line for line in report["notes"] if "places where the export rounds data" in line)
    if (
        options and not integers
    ):  # else constants are rounded as well, or two products have an operand each of one tensor
        assert told.startswith(f"{len(gone)} of the {len(before)} places")
    assert (
        sum(readers.count("MatMul") for readers in after.values()) >= 2 * CONFIG.layers + 1
    )  # the logits' product as well

    # less these the export is what the lowered model computes
    plain = tmp_path / "plain.onnx"
    onnx.save(without(source(), gone), plain)
    capsys.readouterr()
    assert main(["verify", str(plain), str(tmp_path / "lowered"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rewrite_max_error"] < 1e-5
