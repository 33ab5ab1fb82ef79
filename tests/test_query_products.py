"""MlaLinear in place of the products that make the queries: which are taken, and that the model computes what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import SPARSE, Config, lowered
from test_plugin_model import expand, logits_of

from mla_trt.cuda import Gpu
from mla_trt.engines import query_products
from mla_trt.engines.bfloat16 import to_bfloat16
from mla_trt.engines.plugin_model import compact
from mla_trt.engines.query_products import is_faster, take_query_products
from mla_trt.float32 import to_float32
from mla_trt.ops import OPS, attach_functions, make_node, mla_nodes
from mla_trt.weight_file import WeightFile

HEADS, WIDTH, COLUMNS = 4, 24, 16


@pytest.fixture(autouse=True)
def _small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_products, "LEAST_BYTES", 0)


def _products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "MlaLinear"]


def _in_bfloat16(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    to_bfloat16(model, folder, WeightFile(folder / "bf16.data"))
    onnx.load_external_data_for_model(model, str(folder))
    return model


@pytest.mark.parametrize("config", [Config(num_heads=4), Config(num_heads=4, sinks=True)], ids=["dense", "sinks"])
def test_a_model_computes_what_it_did(config: Config, tmp_path: Path) -> None:
    model = _in_bfloat16(lowered(config), tmp_path)
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    assert take_query_products(model) == len(_products(model)) > 0
    compact(model)
    expand(model)
    attach_functions(plain)
    np.testing.assert_allclose(logits_of(to_float32(model)), logits_of(to_float32(plain)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("capability", "plugins", "faster"),
    [("9.0", "0.1.0 sm_80 sm_90a", True), ("9.0", "0.1.0 sm_80", False), ("8.0", "0.1.0 sm_80 sm_90a", False)],
)
def test_only_hopper_has_a_kernel_for_it(capability: str, plugins: str, faster: bool) -> None:
    assert is_faster(Gpu("GPU", capability, 1 << 37), plugins) is faster


def test_queries_beside_an_indexer_stay(tmp_path: Path) -> None:
    model = _in_bfloat16(lowered(replace(SPARSE, num_heads=4)), tmp_path)
    layers = [node for node in mla_nodes(model) if node.op_type == "MlaSparseAttention"]
    assert layers
    assert all("index_query" in OPS[node.op_type].given_inputs(node) for node in layers)
    assert take_query_products(model) == 0


def test_weights_of_other_types_stay() -> None:
    assert take_query_products(lowered(Config(num_heads=4))) == 0  # f32


def _layer() -> onnx.ModelProto:
    """A product, the shape of its queries and a layer that reads them."""
    inputs = ("latent", "rope_key", "cos", "sin", "w_uk", "w_uv", "query_offsets", "cache_lengths", "block_table")
    names = {name: name for name in (*inputs, "token_sequence", "positions", "schedule", "kv_cache")}
    sizes = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "num_heads": HEADS, "qk_nope_head_dim": 16, "v_head_dim": 16}
    weight = helper.make_tensor(
        "weight", TensorProto.BFLOAT16, [COLUMNS, HEADS * WIDTH], bytes(2 * COLUMNS * HEADS * WIDTH), raw=True
    )
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("Reshape", ["product", "shape"], ["query"]),
        make_node(
            "MlaAttention", {"query": "query", **names}, ["output", "kv_cache_out"], "layer", **sizes, softmax_scale=1.0
        ),
    ]
    constants = [weight, numpy_helper.from_array(np.array([-1, HEADS, WIDTH]), "shape")]
    x = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [1, "T", COLUMNS])
    output = helper.make_tensor_value_info("output", TensorProto.BFLOAT16, ["T", HEADS, 16])
    return helper.make_model(helper.make_graph(nodes, "layer", [x], [output], constants))


def test_the_weight_is_seen_by_heads_under_its_name() -> None:
    model = _layer()
    assert take_query_products(model) == 1
    (product,) = _products(model)
    assert list(product.output) == ["query"]
    assert product.input[1] == "weight"
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "weight")
    assert list(weight.dims) == [COLUMNS, HEADS, WIDTH]
    (rows,) = (node for node in model.graph.node if node.output[0] == product.input[0])
    assert (rows.op_type, rows.input[0]) == ("Reshape", "x")
    assert not any(node.op_type == "MatMul" for node in model.graph.node)


def test_a_weight_that_others_read_stays_beside() -> None:
    model = _layer()
    model.graph.node.add(op_type="Identity", input=["weight"], output=["other"])
    assert take_query_products(model) == 1
    dims = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    assert dims["weight"] == [COLUMNS, HEADS * WIDTH]
    assert dims[_products(model)[0].input[1]] == [COLUMNS, HEADS, WIDTH]


def _read_elsewhere(model: onnx.ModelProto) -> None:
    model.graph.node.add(op_type="Identity", input=["product"], output=["other"])


def _result(model: onnx.ModelProto) -> None:
    model.graph.output.add(name="query")


def _shape(*sizes: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.array(sizes), "shape"))

    return change


def _weight_of_the_step(model: onnx.ModelProto) -> None:
    del model.graph.initializer[0]


def _too_narrow(model: onnx.ModelProto) -> None:
    weight = helper.make_tensor(
        "weight", TensorProto.BFLOAT16, [12, HEADS * WIDTH], bytes(24 * HEADS * WIDTH), raw=True
    )
    model.graph.initializer[0].CopyFrom(weight)


CHANGES = {
    "read elsewhere": _read_elsewhere,
    "a result": _result,
    "an axis that is kept": _shape(0, HEADS, WIDTH),
    "other axes": _shape(1, -1, HEADS * WIDTH),
    "four axes": _shape(-1, 2, HEADS, WIDTH // 2),
    "no constant": _weight_of_the_step,
    "no multiple of 8": _too_narrow,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_stays(change: Callable[[onnx.ModelProto], None]) -> None:
    model = _layer()
    change(model)
    before = model.SerializeToString()
    assert take_query_products(model) == 0
    assert model.SerializeToString() == before


def test_small_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_products, "LEAST_BYTES", 2 * COLUMNS * HEADS * WIDTH + 1)
    assert take_query_products(_layer()) == 0
