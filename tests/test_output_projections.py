"""MlaOutputProjection in place of the products with what attention gives: which are taken, and that codes are all that changes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import Config, lowered
from test_coded_weights import decoded
from test_input_projections import BLOCKS, with_decoded
from test_plugin_model import EXAMPLES, expand, logits_of

from mla_trt.cli import main
from mla_trt.engines import input_projections, output_projections
from mla_trt.engines.bfloat16 import to_bfloat16
from mla_trt.engines.output_projections import take_output_projections
from mla_trt.engines.plugin_model import compact, write_plugin_model
from mla_trt.errors import UsageError
from mla_trt.float32 import to_float32
from mla_trt.loading import ModelOnDisk, external_file
from mla_trt.ops import OPS, attach_functions, make_node
from mla_trt.ops.projection_weights import from_tiles
from mla_trt.weight_file import WeightFile

T, H, DV, C = 5, 7, 24, 160
"""Heads of which one lies across the border of two blocks."""
BFLOAT16, FLOAT, INT64 = TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.INT64
LAYER = ("query", "latent", "rope_key", "cos", "sin", "w_uk", "w_uv")
STEP = ("query_offsets", "cache_lengths", "block_table", "token_sequence", "positions", "schedule", "kv_cache")


@pytest.fixture(autouse=True)
def _small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (input_projections, output_projections):
        monkeypatch.setattr(module, "LEAST_BYTES", 0)


class Layer:
    """An attention layer and the product with its output, as the lowering writes it in bf16.

    Attributes:
        nodes: by their result, in order.
        constants: by name.
        outputs: tensors that the graph gives.
    """

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.constants = {"o": random.normal(size=(H * DV, C)).astype(ml_dtypes.bfloat16)}
        self.nodes: dict[str, onnx.NodeProto] = {}
        self.outputs = ["result", "next"]
        self.attention = make_node(
            "MlaAttention",
            {name: name for name in (*LAYER, *STEP)},
            ["attended", "kv_cache_out"],
            "layer",
            kv_lora_rank=32,
            qk_rope_head_dim=8,
            num_heads=H,
            qk_nope_head_dim=16,
            v_head_dim=DV,
            softmax_scale=1.0,
        )
        self.op("flat", "Reshape", "attended", np.array([1, -1, H * DV]))
        self.op("result", "MatMul", "flat", "o")
        self.op("next", "Neg", "result")

    def op(self, output: str, kind: str, *inputs: str | np.ndarray, **attributes: Any) -> None:
        """Sets the node that makes a tensor; where there was one, it stands there."""
        names = [value if isinstance(value, str) else f"{output}.{place}" for place, value in enumerate(inputs)]
        self.constants |= {name: value for name, value in zip(names, inputs, strict=True) if not isinstance(value, str)}
        self.nodes[output] = helper.make_node(kind, names, [output], name=output, **attributes)

    def before(self, output: str, name: str, kind: str, *inputs: str | np.ndarray, **attributes: Any) -> None:
        """The same before another node."""
        later = list(self.nodes)[list(self.nodes).index(output) :]
        moved = {each: self.nodes.pop(each) for each in later}
        self.op(name, kind, *inputs, **attributes)
        self.nodes |= moved

    def model(self) -> onnx.ModelProto:
        """The graph, with what nothing else makes as inputs."""
        nodes = [self.attention, *self.nodes.values()]
        read = {name for node in nodes for name in node.input if name}
        given = [helper.make_tensor_value_info(name, FLOAT, None) for name in (*LAYER, *STEP)]
        if "sizes" in read:
            given.append(helper.make_tensor_value_info("sizes", INT64, [3]))
        graph = helper.make_graph(
            nodes,
            "layer",
            given,
            [helper.make_tensor_value_info(name, BFLOAT16, None) for name in self.outputs],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items() if name in read],
        )
        opsets = [helper.make_opsetid("", 26), helper.make_opsetid("mla_trt", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def _take(model: onnx.ModelProto) -> int:
    return take_output_projections(ModelOnDisk(model, None))


def _taken(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "MlaOutputProjection"]


def _tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _results(model: onnx.ModelProto, names: list[str]) -> dict[str, np.ndarray]:
    """What the graph gives for random outputs of attention, in float32."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    kept = [node for node in model.graph.node if node.op_type != "MlaAttention"]
    del part.graph.node[:], part.graph.output[:], part.graph.input[:]
    part.graph.node.extend(kept)
    part.graph.input.append(helper.make_tensor_value_info("attended", FLOAT, ["T", H, DV]))
    given = {"attended": np.random.default_rng(1).normal(size=(T, H, DV)).astype(np.float32)}
    if any("sizes" in node.input for node in kept):
        part.graph.input.append(helper.make_tensor_value_info("sizes", INT64, [3]))
        given["sizes"] = np.array([T, 1, H * DV])
    part.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in names)
    attach_functions(part)
    session = ort.InferenceSession(to_float32(part).SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(None, given), strict=True))


def _check(layer: Layer, taken: int = 1) -> onnx.ModelProto:
    """Takes so many products; the graph gives what it does with weights that are what their codes give."""
    model = layer.model()
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    for tensor in plain.graph.initializer:
        if tensor.data_type == BFLOAT16 and len(tensor.dims) == 2:
            tensor.CopyFrom(numpy_helper.from_array(decoded(numpy_helper.to_array(tensor)), tensor.name))
    before = _results(plain, layer.outputs)
    assert _take(model) == len(_taken(model)) == taken
    made = {*_tensors(model), *(value.name for value in model.graph.input)}
    for node in model.graph.node:
        assert made.issuperset(filter(None, node.input)), node.name  # which come before
        made.update(node.output)
    for name, values in _results(model, layer.outputs).items():
        np.testing.assert_allclose(values, before[name], rtol=1e-4, atol=1e-4, err_msg=name)
        assert values.shape == before[name].shape
    read = {name for node in model.graph.node for name in node.input}
    assert set(_tensors(model)) <= read
    assert all(read.union(layer.outputs).intersection(node.output) for node in model.graph.node)
    return model


def test_the_op_and_a_reshape_make_what_the_product_did() -> None:
    model = _check(Layer())
    assert [node.op_type for node in model.graph.node] == ["MlaAttention", "MlaOutputProjection", "Reshape", "Neg"]
    (node,) = _taken(model)
    given, tensors = OPS[node.op_type].given_inputs(node), _tensors(model)
    assert given == {"attended": "attended", "w_o": "result/weight/codes", "w_o_scale": "result/weight/scales"}
    codes, scales = tensors[given["w_o"]], tensors[given["w_o_scale"]]
    assert (codes.data_type, list(codes.dims)) == (TensorProto.FLOAT8E4M3FN, [H, DV, C])
    assert (scales.data_type, list(scales.dims)) == (FLOAT, [2, 2])
    assert model.graph.node[2].output[0] == "result"
    assert numpy_helper.to_array(tensors[model.graph.node[2].input[1]]).tolist() == [1, -1, C]


def _two_axes(layer: Layer) -> None:
    layer.op("flat", "Reshape", "attended", np.array([-1, H * DV]))


def _gemm(layer: Layer) -> None:
    _two_axes(layer)
    layer.op("result", "Gemm", "flat", np.ascontiguousarray(layer.constants["o"].T), transB=1)


@pytest.mark.parametrize("change", [_two_axes, _gemm])
def test_results_of_two_axes_need_no_reshape(change: Callable[[Layer], None]) -> None:
    layer = Layer()
    change(layer)
    model = _check(layer)
    assert [node.op_type for node in model.graph.node] == ["MlaAttention", "MlaOutputProjection", "Neg"]
    assert list(_taken(model)[0].output) == ["result"]


def _tokens_first(layer: Layer) -> None:
    layer.op("flat", "Reshape", "attended", np.array([-1, 1, H * DV]))


def _heads_first(layer: Layer) -> None:
    layer.before("flat", "four", "Reshape", "attended", np.array([1, -1, H, DV]))
    layer.op("flat", "Reshape", "four", np.array([0, 0, -1]))


def _other_axes_first(layer: Layer) -> None:
    layer.before("flat", "odd", "Reshape", "attended", np.array([-1, DV, H]))
    layer.op("flat", "Reshape", "odd", np.array([1, -1, H * DV]))


def _squeezed(layer: Layer) -> None:
    layer.before("flat", "rows", "Flatten", "attended", axis=1)
    layer.before("flat", "one", "Unsqueeze", "rows", np.array([0]))
    layer.op("flat", "Identity", "one")


def _fixed(layer: Layer) -> None:
    layer.op("flat", "Reshape", "attended", np.array([1, T, H * DV]))


def _bias_behind(layer: Layer) -> None:
    layer.op("next", "Add", "result", np.arange(C).astype(ml_dtypes.bfloat16))


def _read_more_than_once(layer: Layer) -> None:
    layer.op("more", "Abs", "result")
    layer.op("others", "Identity", "flat")
    layer.outputs += ["more", "others"]


def _two_open_axes(layer: Layer) -> None:
    layer.op("flat", "Reshape", "attended", "sizes")


def _gate(layer: Layer) -> None:
    gates = np.random.default_rng(4).uniform(size=(1, 1, H * DV)).astype(ml_dtypes.bfloat16)
    layer.before("result", "gated", "Mul", "flat", gates)
    layer.op("result", "MatMul", "gated", "o")


def _gate_by_head(layer: Layer) -> None:
    gates = np.random.default_rng(4).uniform(size=(1, H, 1)).astype(ml_dtypes.bfloat16)
    layer.before("flat", "gated", "Mul", gates, "attended")
    layer.op("flat", "Reshape", "gated", np.array([1, -1, H * DV]))


def _gate_in_float32(layer: Layer) -> None:
    layer.before("result", "wide", "Cast", "flat", to=FLOAT)
    layer.before("result", "product", "Mul", np.random.default_rng(4).uniform(size=(1, 1, H * DV)).astype("f4"), "wide")
    layer.before("result", "gated", "Cast", "product", to=BFLOAT16)
    layer.op("result", "MatMul", "gated", "o")


SPELLINGS = {
    "tokens first": _tokens_first,
    "heads first": _heads_first,
    "other axes first": _other_axes_first,
    "squeezed": _squeezed,
    "a fixed number of tokens": _fixed,
    "a bias behind": _bias_behind,
    "read more than once": _read_more_than_once,
    "two axes that are not fixed": _two_open_axes,
    "times gates": _gate,
    "times a gate for each head": _gate_by_head,
    "times gates in float32": _gate_in_float32,
}


@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_spellings_that_are_taken(change: Callable[[Layer], None]) -> None:
    layer = Layer()
    change(layer)
    _check(layer)


def test_two_products_of_a_layer() -> None:
    layer = Layer()
    layer.op("gate", "MatMul", "flat", np.random.default_rng(3).normal(size=(H * DV, 32)).astype(ml_dtypes.bfloat16))
    layer.outputs.append("gate")
    _check(layer, taken=2)


def _weight(shape: tuple[int, ...]) -> Callable[[Layer], None]:
    def change(layer: Layer) -> None:
        layer.constants["o"] = np.ones(shape, ml_dtypes.bfloat16)

    return change


def _by_head(layer: Layer) -> None:
    layer.constants["o"] = np.ones((DV, C), ml_dtypes.bfloat16)
    layer.op("flat", "Reshape", "attended", np.array([-1, DV]))


def _transposed_heads(layer: Layer) -> None:
    layer.before("flat", "turned", "Transpose", "attended", perm=[0, 2, 1])
    layer.op("flat", "Reshape", "turned", np.array([1, -1, H * DV]))


def _activated(layer: Layer) -> None:
    layer.before("result", "active", "Tanh", "flat")
    layer.op("result", "MatMul", "active", "o")


def _float32(layer: Layer) -> None:
    layer.before("result", "wide", "Cast", "flat", to=FLOAT)
    layer.op("result", "MatMul", "wide", layer.constants["o"].astype(np.float32))


def _not_finite(layer: Layer) -> None:
    layer.constants["o"][-1, -1] = np.inf


def _gemm_with(*more: np.ndarray, **attributes: Any) -> Callable[[Layer], None]:
    def change(layer: Layer) -> None:
        _two_axes(layer)
        layer.op("result", "Gemm", "flat", "o", *more, **attributes)

    return change


def _no_constant(layer: Layer) -> None:
    layer.before("result", "other", "RandomNormalLike", "o", seed=1.0)
    layer.op("result", "MatMul", "flat", "other")


STAY = {
    "columns no multiple of 16": _weight((H * DV, 168)),
    "a batch of weights": _weight((1, H * DV, C)),
    "by head": _by_head,
    "transposed heads": _transposed_heads,
    "not its rows": _activated,
    "float32": _float32,
    "not finite": _not_finite,
    "a bias": _gemm_with(np.ones(C, ml_dtypes.bfloat16)),
    "twice the product": _gemm_with(alpha=2.0),
    "no constant": _no_constant,
}


@pytest.mark.parametrize("change", STAY.values(), ids=STAY.keys())
def test_products_that_stay(change: Callable[[Layer], None]) -> None:
    layer = Layer()
    change(layer)
    model = layer.model()
    before = model.SerializeToString()
    assert _take(model) == 0
    assert model.SerializeToString() == before


def test_small_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_projections, "LEAST_BYTES", 2 * H * DV * C + 1)
    assert _take(Layer().model()) == 0
    monkeypatch.setattr(output_projections, "LEAST_BYTES", 2 * H * DV * C)
    assert _take(Layer().model()) == 1


@pytest.mark.parametrize("to_file", [True, False])
def test_codes_of_weights_on_disk(to_file: bool, tmp_path: Path) -> None:
    model = Layer().model()
    values = numpy_helper.to_array(_tensors(model)["o"])
    (tmp_path / "apart").mkdir()
    WeightFile(tmp_path / "apart" / "o.data").move_out(_tensors(model)["o"])
    source = ModelOnDisk(model, tmp_path, {"o.data": tmp_path / "apart"})
    assert take_output_projections(source, WeightFile(tmp_path / "new.data") if to_file else None) == 1
    codes, scales = (_tensors(model)[f"result/weight/{part}"] for part in ("codes", "scales"))
    assert external_file(codes) == ("new.data" if to_file else None)
    assert external_file(scales) is None
    wide = from_tiles(numpy_helper.to_array(codes, str(tmp_path)).reshape(values.shape)).astype(np.float32)
    rows, columns = (np.arange(size) // 128 for size in values.shape)
    np.testing.assert_array_equal(wide * numpy_helper.to_array(scales)[rows][:, columns], decoded(values))


def test_a_model_computes_what_its_codes_say() -> None:
    model = lowered(BLOCKS)
    to_bfloat16(model)
    _check_model(model, {f"o.{layer}.bf16": 144 for layer in (0, 1)})


@pytest.mark.parametrize(
    "name", ["deepseek_v32__dynamo_op20__eager__dec", "dsref_v3_absorb__ts_op17__ref__dec__io_realrope"]
)
def test_an_export_computes_what_its_codes_say(name: str, tmp_path: Path) -> None:
    assert main(["lower", str(EXAMPLES / f"{name}.onnx"), "-o", str(tmp_path), "--no-verify", "--quiet"]) == 0
    model = onnx.load(tmp_path / "model.onnx")
    to_bfloat16(model)
    weights = {
        node.input[1]: 64
        for node in model.graph.node
        if node.op_type == "MatMul" and list(_tensors(model).get(node.input[1], TensorProto()).dims) == [80, 64]
    }
    assert len(weights) == 2
    _check_model(model, weights)


def _check_model(model: onnx.ModelProto, weights: dict[str, int]) -> None:
    plain = with_decoded(model, weights)
    del model.graph.value_info[:]  # as when it is taken
    assert _take(model) == len(_taken(model)) == 2
    assert not weights.keys() & _tensors(model).keys()
    compact(model)
    expand(model)
    attach_functions(plain)
    np.testing.assert_allclose(logits_of(to_float32(model)), logits_of(to_float32(plain)), rtol=1e-4, atol=1e-5)


def _written(model: onnx.ModelProto, folder: Path, **options: Any) -> onnx.ModelProto:
    source, written = folder / "lowered", folder / "plugins"
    source.mkdir()
    written.mkdir()
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save_model(copy, source / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    write_plugin_model(source / "model.onnx", written, pages=12, **options)
    return onnx.load(written / "model.onnx", load_external_data=False)


@pytest.mark.parametrize("input_projections_too", [True, False])
def test_a_model_is_written_with_codes(input_projections_too: bool, tmp_path: Path) -> None:
    model = lowered(BLOCKS)
    written = _written(model, tmp_path, dtype="bf16", weights="fp8", input_projections=input_projections_too)
    tensors = _tensors(written)
    codes = {name: tensor for name, tensor in tensors.items() if tensor.data_type == TensorProto.FLOAT8E4M3FN}
    assert len(codes) == 6  # of queries, latents and results, in two layers
    assert {external_file(tensor) for tensor in codes.values()} == {"bf16.0.data"}
    assert {f"{name.removesuffix('codes')}scales" for name in codes} <= set(tensors)
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    to_bfloat16(plain)
    sizes = {"q": 192, "kv_a": 144, "o": 144}
    plain = with_decoded(plain, {f"{name}.{layer}.bf16": sizes[name] for name in sizes for layer in (0, 1)})
    attach_functions(plain)
    found = onnx.load(tmp_path / "plugins" / "model.onnx")
    expand(found)
    np.testing.assert_allclose(logits_of(to_float32(found)), logits_of(to_float32(plain)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"input_projections": True}])
def test_a_model_is_written_without_codes_unless_told(options: dict[str, bool], tmp_path: Path) -> None:
    written = _written(lowered(BLOCKS), tmp_path, dtype="bf16", **options)
    assert not _taken(written)
    assert TensorProto.FLOAT8E4M3FN not in {tensor.data_type for tensor in written.graph.initializer}


def test_a_model_without_bfloat16_has_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        written = _written(lowered(Config()), tmp_path, weights="fp8")
    assert "--weights fp8 changes nothing" in caplog.text
    assert "--dtype bf16" in caplog.text
    assert not _taken(written)


def test_other_kinds_of_weights_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--weights is 'int4': choose one of keep, fp8"):
        _written(lowered(Config()), tmp_path, weights="int4")
