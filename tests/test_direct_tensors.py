"""Plugins that read and write tensors as the model has them: what is taken out, and that the model computes what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_plugin_model import EXAMPLES, expand, logits_of

from mla_trt.bench.layer_forms import lowered_layer
from mla_trt.cli import main
from mla_trt.engines import input_projections, output_projections
from mla_trt.engines.direct_tensors import BATCHED, ROWS, read_directly
from mla_trt.engines.input_projections import take_input_projections
from mla_trt.engines.output_projections import take_output_projections
from mla_trt.engines.plugin_model import compact, write_plugin_model
from mla_trt.float32 import to_float32
from mla_trt.loading import ModelOnDisk
from mla_trt.models.attention_layer import LayerDimensions, random_weights
from mla_trt.ops import OPS, make_node, mla_nodes
from mla_trt.ops.schema import TABLE

BFLOAT16, FLOAT, FLOAT16 = TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.FLOAT16
DIMENSIONS = LayerDimensions(
    hidden=128, heads=2, query_rank=128, rank=64, nope=32, rope=16, value=64, index_dim=32, top_k=4
)
STEP = {
    "query_offsets": np.array([0, 2, 3], np.int32),
    "cache_lengths": np.array([3, 0], np.int32),
    "block_table": np.array([[1, -1], [0, -1]], np.int32),
}


def undo(model: onnx.ModelProto) -> None:
    """Makes of tensors what the op set wants, and of results what the model wants, in front of and behind the nodes that have them otherwise."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "undo.flat"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0), "undo.zero"))
    nodes = list(_undone(model))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _undone(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    def constant(name: str, *values: int) -> str:
        model.graph.initializer.append(numpy_helper.from_array(np.array(values), name))
        return name

    for node in model.graph.node:
        if node.domain != "mla_trt":
            yield node
            continue
        given = {attribute.name: attribute.s.decode().split() for attribute in node.attribute if attribute.type == 3}
        rows, batched = given.get(ROWS, []), given.get(BATCHED, [])
        kinds = {formal.name: formal.kind for formal in OPS[node.op_type].inputs}
        kept = [attribute for attribute in node.attribute if attribute.name not in (ROWS, BATCHED)]
        del node.attribute[:]
        node.attribute.extend(kept)
        for place, formal in enumerate(given["inputs"]):
            source, name = node.input[place], f"{node.name}.{formal}"
            if formal == "tokens" and formal in rows:
                yield helper.make_node("Gather", [source, "undo.zero"], [name], axis=-1)
            elif kinds[formal] == TABLE:
                pairs = {"cos": "qk_rope_head_dim", "sin": "qk_rope_head_dim"}.get(formal, "index_rope_dim")
                half = next(attribute.i for attribute in node.attribute if attribute.name == pairs) // 2
                yield helper.make_node("Cast", [source], [f"{name}.wide"], to=FLOAT)
                ends = constant(f"{name}.start", 0), constant(f"{name}.end", half), constant(f"{name}.axis", -1)
                yield helper.make_node("Slice", [f"{name}.wide", *ends], [f"{name}.cut"])
                yield helper.make_node("Reshape", [f"{name}.cut", constant(f"{name}.shape", -1, half)], [name])
            elif formal in rows:
                yield helper.make_node("Flatten", [source], [name], axis=-1)
            else:
                continue
            node.input[place] = name
        yield node
        for place, formal in enumerate(given["outputs"]):
            if formal in batched:
                result, node.output[place] = node.output[place], f"{node.name}.{formal}"
                yield helper.make_node("Unsqueeze", [node.output[place], "undo.zero"], [result])


@pytest.fixture
def small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_projections, "LEAST_BYTES", 0)
    monkeypatch.setattr(output_projections, "LEAST_BYTES", 0)


def plugins_of(lowered: Path, weights: str = "keep", direct: bool = True) -> onnx.ModelProto:
    """What TensorRT's parser gets of a lowered model, with its weights; or would get without `read_directly`."""
    model = onnx.load(lowered / "model.onnx")
    on_disk = ModelOnDisk(model, Path())
    if weights == "fp8":
        take_input_projections(on_disk, coded=True)
        take_output_projections(on_disk)
    if direct:
        read_directly(on_disk)
    compact(model)
    return model


def step_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Inputs of a step of two sequences, three tokens, all caches with the same values."""
    random = np.random.default_rng(3)
    inputs = dict(STEP)
    for value in model.graph.input:
        if value.name in inputs:
            continue
        sizes = [dim.dim_value or {"T": 3, "pages": 2}[dim.dim_param] for dim in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == TensorProto.INT32:
            inputs[value.name] = np.zeros(sizes, np.int32)
        else:
            inputs[value.name] = random.standard_normal(sizes).astype(np.float32)
    return inputs


def results_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    wide = to_float32(model)
    session = ort.InferenceSession(wide.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in wide.graph.output]
    return dict(zip(names, session.run(None, step_of(wide)), strict=True))


@pytest.mark.usefixtures("small_weights_too")
@pytest.mark.parametrize("indexed", [False, True], ids=["dense", "indexed"])
def test_a_layer_is_its_ops_alone(indexed: bool, tmp_path: Path) -> None:
    dimensions = replace(DIMENSIONS, index_heads=8) if indexed else DIMENSIONS
    weights = random_weights(dimensions, BFLOAT16, tmp_path / "layer.data", of_codes=True)
    lowered = lowered_layer(tmp_path, "fp8", dimensions, weights, "fp8")
    model = plugins_of(lowered, "fp8")
    attention = "MlaSparseAttention" if indexed else "MlaAttention"
    found = {node.op_type: node for node in model.graph.node}
    assert found.keys() == {"MlaPlan", "MlaInputProjections", attention, "MlaOutputProjection"}
    texts = {
        (node.op_type, attribute.name): attribute.s.decode()
        for node in found.values()
        for attribute in node.attribute
        if attribute.name in (ROWS, BATCHED)
    }
    assert texts == {
        ("MlaPlan", ROWS): "tokens",
        ("MlaInputProjections", ROWS): "hidden",
        (attention, ROWS): "cos sin index_cos index_sin" if indexed else "cos sin",
        ("MlaOutputProjection", BATCHED): "hidden",
    }
    (tmp_path / "plugins").mkdir()
    write_plugin_model(lowered / "model.onnx", tmp_path / "plugins", input_projections=True, weights="fp8")
    file = onnx.load(tmp_path / "plugins" / "model.onnx", load_external_data=False)
    assert [node.attribute for node in file.graph.node] == [node.attribute for node in model.graph.node]
    undo(model)
    expand(model)
    plain = plugins_of(lowered, "fp8", direct=False)
    expand(plain)
    wanted = results_of(plain)
    for name, values in results_of(model).items():
        np.testing.assert_array_equal(values, wanted[name], name)


@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v32__dynamo_op20__eager__dec",
        "deepseek_v3__dynamo_op23__sdpa__dec",
        "packed2d_absorb_cat__dynamo_op20__hand__dec",
    ],
)
def test_an_export_computes_what_it_did(name: str, tmp_path: Path) -> None:
    assert (
        main(["lower", str(EXAMPLES / f"{name}.onnx"), "-o", str(tmp_path / "lowered"), "--no-verify", "--quiet"]) == 0
    )
    model = plugins_of(tmp_path / "lowered")
    assert any(attribute.name == ROWS for node in mla_nodes(model) for attribute in node.attribute)
    undo(model)
    expand(model)
    if not name.startswith("packed2d"):  # has no tokens' numbers
        np.testing.assert_array_equal(logits_of(model), logits_of(onnx.load(tmp_path / "lowered" / "model.onnx")))


# What makes cos, f32 [T, 8], of x, [1, T, 16] of a type.
Chain = list[tuple[str, list[str], str, dict[str, int]]]
CONSTANTS = {
    "zero": [0],
    "one": [1],
    "eight": [8],
    "nine": [9],
    "last": [-1],
    "rows": [-1, 8],
    "wide rows": [-1, 16],
    "first": [0, 1, 2, 3, 4, 5, 6, 7],
}
CUT = ("Slice", ["x", "zero", "eight", "last"], "cut", {})
TO_ROWS = ("Reshape", ["cut", "rows"], "narrow", {})
WIDEN = ("Cast", ["narrow"], "cos", {"to": FLOAT})
CAST_FIRST: Chain = [
    ("Cast", ["x"], "wide", {"to": FLOAT}),
    ("Reshape", ["wide", "wide rows"], "flat", {}),
    ("Slice", ["flat", "zero", "eight", "one"], "cos", {}),
]
ROUNDED: Chain = [
    ("Cast", ["x"], "rounded", {"to": FLOAT16}),
    ("Slice", ["rounded", "zero", "eight", "last"], "cut", {}),
    TO_ROWS,
    WIDEN,
]
BEHIND: Chain = [("Slice", ["x", "one", "nine", "last"], "cut", {}), TO_ROWS, WIDEN]
PICKED: Chain = [("Gather", ["x", "first"], "cut", {"axis": -1}), TO_ROWS, WIDEN]
SPLIT: Chain = [("Split", ["x"], "cut", {"axis": -1, "num_outputs": 2}), TO_ROWS, WIDEN]


def attention_of(chain: Chain, dtype: int) -> onnx.ModelProto:
    """An append whose cos is made by a chain."""
    inputs = {
        formal.name: formal.name for formal in OPS["MlaFusedRopeRmsNormQuantization"].inputs if not formal.optional
    }
    op = make_node(
        "MlaFusedRopeRmsNormQuantization",
        inputs,
        {"query_rope_out": "out", "kv_cache_out": "kv_cache_out"},
        kv_lora_rank=32,
        qk_rope_head_dim=16,
    )
    nodes = [helper.make_node(kind, given, [made], **how) for kind, given, made, how in chain]
    for node in nodes:
        if node.op_type == "Split":
            node.output.append("other half")
    values = [helper.make_tensor_value_info("x", dtype, [1, "T", 16])]
    values += [helper.make_tensor_value_info(name, FLOAT, None) for name in inputs if name != "cos"]
    constants = [numpy_helper.from_array(np.array(array), name) for name, array in CONSTANTS.items()]
    graph = helper.make_graph([*nodes, op], "g", values, [helper.make_tensor_value_info("out", FLOAT, None)], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("mla_trt", 1)])


@pytest.mark.parametrize(
    ("chain", "dtype", "source"),
    [
        ([CUT, TO_ROWS, WIDEN], BFLOAT16, "x"),
        ([CUT, TO_ROWS, WIDEN], FLOAT16, "x"),
        (CAST_FIRST, BFLOAT16, "x"),
        (SPLIT, FLOAT16, "x"),
        (ROUNDED, BFLOAT16, "rounded"),
        ([CUT, TO_ROWS, WIDEN], TensorProto.DOUBLE, "narrow"),
        (BEHIND, BFLOAT16, None),
        (PICKED, BFLOAT16, "cut"),
    ],
    ids=["bf16", "f16", "cast first", "split", "rounded", "double", "other columns", "picked"],
)
def test_tables_are_those_whose_first_values_count(chain: Chain, dtype: int, source: str | None) -> None:
    model = attention_of(chain, dtype)
    read_directly(ModelOnDisk(model, Path()))
    (node,) = mla_nodes(model)
    given = OPS[node.op_type].given_inputs(node)
    rows = [attribute.s.decode() for attribute in node.attribute if attribute.name == ROWS]
    if dtype == TensorProto.DOUBLE:  # a plugin takes no such table
        assert given["cos"] == "cos"
        assert rows == []
    elif source is None:
        assert given["cos"] == "cos"
        assert len(model.graph.node) == 4
        assert rows == []
    else:
        assert given["cos"] == source
        assert rows == ["cos"]


def _more(model: onnx.ModelProto) -> None:
    """The result of the product is read by more than the Reshape."""
    model.graph.node.append(helper.make_node("Relu", ["hidden"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", BFLOAT16, None))


def _wider(model: onnx.ModelProto) -> None:
    model.graph.initializer[-1].CopyFrom(numpy_helper.from_array(np.array([1, -1, 8]), "shape"))


def _two_tokens(model: onnx.ModelProto) -> None:
    model.graph.initializer[-1].CopyFrom(numpy_helper.from_array(np.array([2, -1, 16]), "shape"))


@pytest.mark.parametrize("change", [None, _more, _wider, _two_tokens])
def test_results_with_an_axis_of_one_before_them(change: Callable[[onnx.ModelProto], None] | None) -> None:
    op = make_node("MlaOutputProjection", {"attended": "attended", "w_o": "w_o"}, {"hidden": "hidden"})
    nodes = [op, helper.make_node("Reshape", ["hidden", "shape"], ["y"])]
    weight = helper.make_tensor("w_o", BFLOAT16, [2, 8, 16], bytes(512), raw=True)
    constants = [weight, numpy_helper.from_array(np.array([1, -1, 16]), "shape")]
    attended = helper.make_tensor_value_info("attended", BFLOAT16, ["T", 2, 8])
    graph = helper.make_graph(nodes, "g", [attended], [helper.make_tensor_value_info("y", BFLOAT16, None)], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("mla_trt", 1)])
    if change is not None:
        change(model)
    read_directly(ModelOnDisk(model, Path()))
    batched = [attribute.s.decode() for attribute in model.graph.node[0].attribute if attribute.name == BATCHED]
    assert batched == (["hidden"] if change is None else [])
    assert [node.op_type for node in model.graph.node][1:] == {None: [], _more: ["Reshape", "Relu"]}.get(
        change, ["Reshape"]
    )
    assert "y" in [name for node in model.graph.node for name in node.output]


@pytest.mark.parametrize(
    ("axis", "index", "taken"),
    [(-1, np.array(3), True), (2, np.array(0), True), (1, np.array(0), False), (-1, np.array([0]), False)],
)
def test_tokens_are_counted_by_their_rows(axis: int, index: np.ndarray, taken: bool) -> None:
    inputs = {"tokens": "tokens", "query_offsets": "query_offsets", "cache_lengths": "cache_lengths"}
    op = make_node("MlaPlan", inputs, {"token_sequence": "out", "positions": "positions", "schedule": "schedule"})
    values = [helper.make_tensor_value_info("x", BFLOAT16, [1, "T", 16])]
    values += [helper.make_tensor_value_info(name, TensorProto.INT32, None) for name in inputs if name != "tokens"]
    graph = helper.make_graph(
        [helper.make_node("Gather", ["x", "index"], ["tokens"], axis=axis), op],
        "g",
        values,
        [helper.make_tensor_value_info("out", TensorProto.INT32, None)],
        [numpy_helper.from_array(index, "index")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("mla_trt", 1)])
    read_directly(ModelOnDisk(model, Path()))
    (node,) = mla_nodes(model)
    assert node.input[0] == ("x" if taken else "tokens")
    assert [attribute.s for attribute in node.attribute if attribute.name == ROWS] == [b"tokens"] * taken
    assert len(model.graph.node) == 2 - taken
