"""Models of the op set: making nodes, type inference, attaching and stripping functions, moving to other pages."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from mla_trt.errors import BadModelError, UsageError
from mla_trt.formats import KvLayout
from mla_trt.ops import (
    DOMAIN,
    OPS,
    Op,
    TensorType,
    attach_functions,
    infer_shapes,
    make_node,
    mla_nodes,
    retarget,
    strip_functions,
)
from mla_trt.ops.schema import Dim, Dimensions

STEP_INPUTS = ("query_offsets", "cache_lengths", "block_table")
PLAN_OUTPUTS = ("token_sequence", "positions", "schedule")
SIZES: dict[str, Any] = {
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "num_heads": 4,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "softmax_scale": 0.158,
}
LAYER_INPUTS = ("query", "latent", "rope_key", "norm_weight", "cos", "sin", "w_uk", "w_uv", *STEP_INPUTS, *PLAN_OUTPUTS)


def _layer(layer: int, **more: Any) -> onnx.NodeProto:
    inputs = {name: name for name in LAYER_INPUTS} | {"kv_cache": f"kv_cache.{layer}"}
    outputs = {"output": f"output.{layer}", "kv_cache_out": f"kv_cache_out.{layer}"}
    return make_node("MlaAttention", inputs, outputs, name=f"layer{layer}", **SIZES, **more)


def _model(layers: int, opset: int = 26, page_words: int = 10) -> onnx.ModelProto:
    """MlaPlan and dense layers that all read the same activations."""
    plan_inputs = {"tokens": "tokens", **{name: name for name in STEP_INPUTS[:2]}}
    nodes = [make_node("MlaPlan", plan_inputs, PLAN_OUTPUTS), *(_layer(layer) for layer in range(layers))]
    floats: dict[str, list[Any]] = {
        "query": ["T", 4, 40],
        "latent": ["T", 32],
        "rope_key": ["T", 16],
        "norm_weight": [32],
        "cos": ["T", 8],
        "sin": ["T", 8],
        "w_uk": [4, 32, 24],
        "w_uv": [4, 20, 32],
    }
    caches = {f"kv_cache.{layer}": ["pages", page_words] for layer in range(layers)}
    integers: dict[str, list[Any]] = {
        "query_offsets": [None],
        "cache_lengths": ["B"],
        "block_table": ["B", "max_pages"],
        **caches,
    }
    inputs = [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["T"])]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in floats.items()]
    inputs += [helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name, shape in integers.items()]
    outputs = [helper.make_tensor_value_info(f"output.{i}", TensorProto.FLOAT, ["T", 4, 20]) for i in range(layers)]
    outputs += [
        helper.make_tensor_value_info(f"kv_cache_out.{i}", TensorProto.INT32, ["pages", page_words])
        for i in range(layers)
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "model", inputs, outputs),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=13,
    )
    metadata = model.metadata_props.add()
    metadata.key = "mla_trt"
    cache_facts = [{"name": f"kv_cache.{i}", "layer": i, "kind": "kv", "page_words": page_words} for i in range(layers)]
    facts = {"version": 1, "page_size": 64, "row_format": "fp8", "index_format": "fp8", "caches": cache_facts}
    metadata.value = json.dumps(facts)
    return model


def test_every_variant_has_one_function_that_the_checker_takes() -> None:
    model = _model(3)
    model.graph.node[-1].CopyFrom(_layer(2, epsilon=1e-5))
    attach_functions(model)
    onnx.checker.check_model(model, full_check=True)
    overloads = [node.overload for node in mla_nodes(model)]
    assert overloads[1] == overloads[2] != overloads[3]
    assert overloads[1].startswith("fp8_p64_h4_r32_")
    assert {(f.name, f.overload) for f in model.functions} == {(n.op_type, n.overload) for n in mla_nodes(model)}
    assert len(model.functions) == 3
    for function in model.functions:
        assert {"plugin_version", "plugin_namespace"} <= set(function.attribute)
        assert set(function.attribute) == {
            attribute.name for node in mla_nodes(model) for attribute in node.attribute if node.op_type == function.name
        }
        assert all(not node.domain for node in function.node)


def test_attaching_twice_changes_nothing_and_stripping_undoes_it() -> None:
    model = _model(2)
    other = helper.make_function(
        "other", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], [helper.make_opsetid("", 26)]
    )
    model.functions.append(other)
    bare = model.SerializeToString(deterministic=True)
    attach_functions(model)
    attached = model.SerializeToString(deterministic=True)
    attach_functions(model)
    assert model.SerializeToString(deterministic=True) == attached
    strip_functions(model)
    assert [function.name for function in model.functions] == ["Twice"]
    assert all(not node.overload for node in mla_nodes(model))
    del model.opset_import[-1]
    assert model.SerializeToString(deterministic=True) == bare


def test_attaching_replaces_functions_of_other_variants() -> None:
    model = _model(1)
    attach_functions(model)
    first = model.functions[-1].overload
    for attribute in model.graph.node[-1].attribute:
        if attribute.name == "page_size":
            attribute.i = 16
    attach_functions(model)
    assert len(model.functions) == 2
    assert model.functions[-1].overload.startswith("fp8_p16_")
    assert model.functions[-1].overload != first


def test_nodes_in_subgraphs_get_functions_too() -> None:
    model = _model(1)
    node = model.graph.node.pop()
    identity = helper.make_node("Identity", ["latent"], ["output.0"])
    branches = {
        "then_branch": helper.make_graph([node], "then", [], list(model.graph.output)),
        "else_branch": helper.make_graph(
            [identity, helper.make_node("Identity", ["kv_cache.0"], ["kv_cache_out.0"])],
            "else",
            [],
            list(model.graph.output),
        ),
    }
    model.graph.node.append(helper.make_node("If", ["condition"], ["output.0", "kv_cache_out.0"], **branches))
    model.graph.input.append(helper.make_tensor_value_info("condition", TensorProto.BOOL, []))
    attach_functions(model)
    assert [node.op_type for node in mla_nodes(model)] == ["MlaPlan", "MlaAttention"]
    assert {function.name for function in model.functions} == {"MlaPlan", "MlaAttention"}


def test_a_deep_model_is_quick() -> None:
    model = _model(61)
    start = time.perf_counter()
    attach_functions(model)
    assert time.perf_counter() - start < 1.0
    assert len(model.functions) == 2


def test_older_opsets_are_refused() -> None:
    with pytest.raises(BadModelError, match="opset 25"):
        attach_functions(_model(1, opset=25))


def test_unknown_ops_are_refused() -> None:
    model = _model(1)
    model.graph.node[-1].op_type = "MlaAttenton"
    with pytest.raises(BadModelError, match="no op MlaAttenton"):
        attach_functions(model)


def test_make_node_orders_inputs_and_gives_every_attribute() -> None:
    node = _layer(0)
    op = OPS["MlaAttention"]
    assert node.domain == DOMAIN
    assert [name.split(".")[0] for name in node.input if name] == [
        i.name for i in op.inputs if i.name in (*LAYER_INPUTS, "kv_cache")
    ]
    assert node.input[-1]  # absent ones at the end are left out
    assert [len(node.input), list(node.output)] == [19, ["output.0", "kv_cache_out.0"]]
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert set(values) == {a.name for a in op.attributes} | {"plugin_version", "plugin_namespace"}
    assert (values["plugin_version"], values["plugin_namespace"]) == (b"1", b"mla_trt")
    assert (values["page_size"], values["row_format"]) == (64, b"fp8")
    assert op.node_attributes(node)["epsilon"] == np.float32(1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": {"querry": "x"}}, "has no input querry"),
        ({"inputs": {"kv_cache": ""}}, "needs the input kv_cache"),
        ({"inputs": {"w_uv": ""}}, "w_uk and w_uv must be given together"),
        ({"inputs": {"w_uk": "", "w_uv": ""}}, "must be kv_lora_rank"),
        ({"inputs": {"w_uk": "", "w_uv": "", "w_uk_scale": "s"}}, "w_uk_scale is given without w_uk"),
        ({"outputs": {"out": "x"}}, "has no output out"),
        ({"outputs": {"output": ""}}, "needs the output output"),
        ({"attributes": {"page_sise": 3}}, "has no attribute page_sise"),
        ({"attributes": {"softmax_scale": None}}, "softmax_scale must be float"),
        ({"attributes": {"row_format": "fp4"}}, "row_format is 'fp4'"),
        ({"attributes": {"page_size": 0}}, "page_size is 0, must be at least 1"),
        ({"attributes": {"rope_interleaved": 2}}, "rope_interleaved is 2"),
        ({"attributes": {"num_heads": "4"}}, "num_heads must be int"),
    ],
)
def test_make_node_refuses(change: dict[str, Any], message: str) -> None:
    inputs = {name: name for name in (*LAYER_INPUTS, "kv_cache")} | change.get("inputs", {})
    outputs = {"output": "y", "kv_cache_out": "c"} | change.get("outputs", {})
    with pytest.raises(UsageError, match=message):
        make_node("MlaAttention", inputs, outputs, name="layer", **SIZES | change.get("attributes", {}))


def test_make_node_refuses_missing_attributes_and_unknown_ops() -> None:
    inputs = {name: name for name in (*LAYER_INPUTS, "kv_cache")}
    with pytest.raises(UsageError, match="needs the attribute num_heads"):
        make_node("MlaAttention", inputs, ["y", "c"], **{k: v for k, v in SIZES.items() if k != "num_heads"})
    with pytest.raises(UsageError, match="no op MlaNothing"):
        make_node("MlaNothing", {}, [])
    with pytest.raises(UsageError, match="has 2 outputs, not 3"):
        make_node("MlaAttention", inputs, ["a", "b", "c"], **SIZES)


def test_sparse_layers_have_an_indexer_or_a_selection() -> None:
    inputs = {name: name for name in (*LAYER_INPUTS, "kv_cache")}
    sizes = {**SIZES, "index_head_dim": 16, "top_k": 8}
    with pytest.raises(UsageError, match=r"missing: index_cos.*indexer_cache"):
        make_node("MlaSparseAttention", inputs, ["y", "c", "i"], **sizes)
    both = {**inputs, "indices": "i", "index_key": "k"}
    with pytest.raises(UsageError, match="index_key is given too"):
        make_node("MlaSparseAttention", both, ["y", "c", "i"], **sizes)


def _types(**changes: TensorType) -> list[TensorType | None]:
    f32, i32 = TensorProto.FLOAT, TensorProto.INT32
    types = {
        "query": TensorType(TensorProto.FLOAT16, ("T", 4, 40)),
        "latent": TensorType(TensorProto.FLOAT16, ("T", 32)),
        "rope_key": TensorType(TensorProto.FLOAT16, (None, 16)),
        "norm_weight": TensorType(TensorProto.FLOAT16, (32,)),
        "cos": TensorType(f32, ("T", 8)),
        "sin": TensorType(f32, ("T", 8)),
        "w_uk": TensorType(TensorProto.FLOAT16, (4, 32, 24)),
        "w_uv": TensorType(TensorProto.FLOAT16, (4, 20, 32)),
        "query_offsets": TensorType(i32, ("B+1",)),
        "cache_lengths": TensorType(i32, ("B",)),
        "block_table": TensorType(i32, ("B", 7)),
        "token_sequence": TensorType(i32, ("T",)),
        "positions": TensorType(i32, ("T",)),
        "schedule": TensorType(i32, (129, 2)),
        "kv_cache.0": TensorType(i32, ("pages", 2592)),
        **changes,
    }
    return [types[name] if name else None for name in _layer(0).input]


def test_inference_keeps_names_and_the_type_of_the_query() -> None:
    output, cache = infer_shapes(_layer(0), _types())
    assert output == TensorType(TensorProto.FLOAT16, ("T", 4, 20))
    assert cache == TensorType(TensorProto.INT32, ("pages", 2592))


def test_inference_of_the_plan() -> None:
    node = make_node("MlaPlan", {name: name for name in ("tokens", *STEP_INPUTS[:2])}, PLAN_OUTPUTS, num_partitions=9)
    ids = TensorType(TensorProto.INT64, (1, "tokens"))
    assert [kind.shape for kind in infer_shapes(node, [ids, None, None])] == [("tokens",), ("tokens",), (10, 2)]
    fixed = TensorType(TensorProto.INT64, (6, 1))
    assert [kind.shape for kind in infer_shapes(node, [fixed, None, None])] == [(6,), (6,), (10, 2)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": TensorType(TensorProto.FLOAT, ("T", 4, 48))}, "query has 48 along Dn\\+Dr, expected 40"),
        ({"query": TensorType(TensorProto.FLOAT, ("T", 5, 40))}, "query gives H = 5, but it is 4"),
        ({"query": TensorType(TensorProto.FLOAT, ("T", 40))}, "query has 2 dimensions"),
        ({"query": TensorType(TensorProto.INT32, ("T", 4, 40))}, "query is INT32"),
        ({"w_uk": TensorType(TensorProto.FLOAT, (4, 24, 32))}, "w_uk gives R = 24, but it is 32"),
        ({"positions": TensorType(TensorProto.INT64, ("T",))}, "positions is INT64"),
        ({"cos": TensorType(TensorProto.FLOAT, ("T", 16))}, "cos has 16 along"),
    ],
)
def test_inference_refuses_contradictions(changes: dict[str, TensorType], message: str) -> None:
    with pytest.raises(BadModelError, match=message):
        infer_shapes(_layer(0), _types(**changes))


@pytest.mark.parametrize(
    ("word", "size"),
    [
        ("H", 3),
        ("H+M", 53),
        ("ceil(M/128)", 1),
        ("ceil(H*M/128)", 2),
        ("ceil(M*H/16)+H+1", 14),
        ("T", "tokens"),
        ("T+H", None),
        ("ceil(T/128)", None),
        ("ceil(T*H/128)", None),
        ("ceil(H*T/128)", None),
        ("ceil(H*unknown/128)", None),
        ("unknown", None),
    ],
)
def test_words_of_shapes(word: str, size: Dim) -> None:
    dims = Dimensions("a node")
    for letter, dim in (("H", 3), ("M", 50), ("T", "tokens")):
        dims.bind(letter, dim, "an input")
    assert dims.evaluate(word) == size


def test_a_word_of_a_product_is_checked_once_its_letters_are_known() -> None:
    dims = Dimensions("a node")
    dims.unify("ceil(H*M/128)", (3,), "scale")
    dims.unify("H M", (3, 50), "weight")
    with pytest.raises(BadModelError, match=r"scale has 3 along ceil\(H\*M/128\), expected 2"):
        dims.unify("ceil(H*M/128)", (3,), "scale")


@pytest.mark.parametrize("row_format", ["f32", "fp8_ds_mla"])
def test_retarget(row_format: str) -> None:
    model = _model(
        2, page_words=KvLayout(page_size=64, row_format="fp8", kv_lora_rank=32, qk_rope_head_dim=16).page_words
    )
    attach_functions(model)
    before = model.SerializeToString(deterministic=True)
    moved = retarget(model, row_format=row_format, page_size=4)
    assert model.SerializeToString(deterministic=True) == before
    layout = KvLayout(page_size=4, row_format=row_format, kv_lora_rank=32, qk_rope_head_dim=16)
    for info in (*moved.graph.input, *moved.graph.output):
        if info.name.startswith("kv_cache"):
            assert info.type.tensor_type.shape.dim[1].dim_value == layout.page_words
            assert info.type.tensor_type.shape.dim[0].dim_param == "pages"
    facts = json.loads(moved.metadata_props[0].value)
    assert (facts["row_format"], facts["page_size"], facts["index_format"]) == (row_format, 4, "fp8")
    assert [cache["page_words"] for cache in facts["caches"]] == [layout.page_words] * 2
    for node in mla_nodes(moved):
        assert OPS[node.op_type].node_attributes(node)["page_size"] == 4
    assert len(moved.functions) == 2
    onnx.checker.check_model(moved, full_check=True)
    onnxruntime.InferenceSession(moved.SerializeToString(), providers=["CPUExecutionProvider"])


def test_retarget_moves_index_caches() -> None:
    index_inputs = ("index_query", "index_key", "index_weights", "index_cos", "index_sin", "indexer_cache")
    inputs = {name: name for name in (*LAYER_INPUTS, "kv_cache", *index_inputs)}
    outputs = ["output", "kv_cache_out", "indices", "indexer_cache_out"]
    node = make_node("MlaSparseAttention", inputs, outputs, **SIZES, index_head_dim=16, top_k=8)
    cache = helper.make_tensor_value_info("indexer_cache", TensorProto.INT32, ["pages", 320])
    result = helper.make_tensor_value_info("indexer_cache_out", TensorProto.INT32, ["pages", 320])
    graph = helper.make_graph([node], "sparse", [cache], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 26)], ir_version=13)
    moved = retarget(model, index_format="f32")
    assert moved.graph.input[0].type.tensor_type.shape.dim[1].dim_value == 64 * 16
    assert moved.graph.output[0].type.tensor_type.shape.dim[1].dim_value == 64 * 16
    assert OPS["MlaSparseAttention"].node_attributes(moved.graph.node[0])["row_format"] == "fp8"


def test_retarget_refuses_unknown_formats() -> None:
    with pytest.raises(UsageError, match="row format 'fp4'"):
        retarget(_model(1), row_format="fp4")
    with pytest.raises(UsageError, match="index format 'bf16'"):
        retarget(_model(1), index_format="bf16")
    with pytest.raises(UsageError, match="page_size is 0"):
        retarget(_model(1), page_size=0)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_every_op_documents_its_inputs_and_outputs(op: Op) -> None:
    assert op.doc.startswith(f"{op.name}: ")
    own = {
        "MlaPrefillSparse": ("index_lengths",),
        "MlaSparseAttention": ("index_query", "indices", "indexer_cache_out"),
    }
    for name in own.get(op.name, [formal.name for formal in op.outputs]):
        assert f"``{name}``" in op.doc
