"""What TensorRT's parser gets: plugin nodes without bodies, and bfloat16 where it was asked for."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import SPARSE, Config, lowered
from tensorrt_stand_in import with_known_axes

from mla_trt.cli import main
from mla_trt.engines.bfloat16 import element_types, to_bfloat16
from mla_trt.engines.engine_file import EngineTensor, engine_tensors, without_pools
from mla_trt.engines.plugin_model import compact, fix_pages, hold_pages, name_axes, set_query_terms, write_plugin_model
from mla_trt.errors import BadModelError, UsageError
from mla_trt.float32 import to_float32
from mla_trt.metadata import LoweredMetadata
from mla_trt.ops import DOMAIN, OPS, attach_functions, mla_nodes
from mla_trt.ops.schema import WEIGHT, F
from mla_trt.session import Session
from mla_trt.weight_file import WeightFile

CONFIG = Config()
EXAMPLES = Path(__file__).resolve().parent.parent / "models" / "examples"
FLOAT, BFLOAT16 = TensorProto.FLOAT, TensorProto.BFLOAT16


def expand(model: onnx.ModelProto) -> None:
    """The inverse of `compact`: inputs and outputs at the places of their formal names."""
    for node in mla_nodes(model):
        op = OPS[node.op_type]
        named = {}
        for attribute in list(node.attribute):
            if attribute.name in ("inputs", "outputs"):
                named[attribute.name] = attribute.s.decode().split()
                node.attribute.remove(attribute)
        for key, formals, values in (("inputs", op.inputs, node.input), ("outputs", op.outputs, node.output)):
            given = dict(zip(named[key], list(values), strict=True))
            del values[:]
            values.extend(given.get(formal.name, "") for formal in formals)
            while values and not values[-1]:
                values.pop()
    attach_functions(model)


def logits_of(model: onnx.ModelProto) -> np.ndarray:
    """Results of a short session: a prompt of two sequences, and three tokens after it."""
    session = Session(model, pages=12)
    first, second = session.create(), session.create()
    steps = [{first: [3, 1, 4, 1, 5], second: [9, 2, 6]}, {second: [5, 3], first: [5]}]
    return np.concatenate([session.step(step)[sequence]["logits"] for step in steps for sequence in (first, second)])


@pytest.mark.parametrize("config", [CONFIG, Config(sinks=True), SPARSE], ids=["dense", "sinks", "sparse"])
def test_a_compact_node_names_what_it_has(config: Config) -> None:
    model = lowered(config)
    wanted = logits_of(model)
    compact(model)
    assert not model.functions
    for node in mla_nodes(model):
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert all(node.input)
        assert all(node.output)
        assert not node.overload
        assert len(attributes["inputs"].split()) == len(node.input)
        assert len(attributes["outputs"].split()) == len(node.output)
        assert attributes["plugin_namespace"] == b"mla_trt"
        assert "w_uk_scale" not in attributes["inputs"].decode().split()
    expand(model)
    np.testing.assert_array_equal(logits_of(model), wanted)


@pytest.mark.parametrize("config", [CONFIG, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("page_copies", [False, True])
def test_pools_move_into_the_plugins(config: Config, page_copies: bool, tmp_path: Path) -> None:
    model = with_known_axes(lowered(config, page_copies=page_copies))
    (tmp_path / "lowered").mkdir()
    (tmp_path / "plugins").mkdir()
    onnx.save(model, tmp_path / "lowered" / "model.onnx")
    write_plugin_model(tmp_path / "lowered" / "model.onnx", tmp_path / "plugins", pages=12, resident=True)
    written = onnx.load(tmp_path / "plugins" / "model.onnx")
    metadata = LoweredMetadata.of(written)
    expected = without_pools(*engine_tensors(model, metadata), metadata)
    assert engine_tensors(written, metadata) == expected
    assert not any("cache" in tensor.name and "." in tensor.name for each in expected for tensor in each)
    held = []
    for node in mla_nodes(written):
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if "resident" not in attributes:
            assert node.op_type == "MlaPlan"
            continue
        assert attributes["resident_pages"] == 12
        held += attributes["resident"].decode().split()
        named = dict(zip(attributes["inputs"].decode().split(), node.input, strict=True))
        assert named["page_copies"] == "page_copies"
        assert not {"kv_cache", "indexer_cache"} & named.keys()
        assert len(attributes["outputs"].decode().split()) == len(node.output)
    assert len(held) == len(metadata.caches)


def test_pools_that_nodes_share_stay_where_they_are() -> None:
    model = lowered(CONFIG)
    compact(model)
    model.graph.node.add(op_type="Identity", input=["kv_cache.0"], output=["copy"])
    with pytest.raises(BadModelError, match=r"the pages 'kv_cache\.0' of the node .* are not its own alone"):
        hold_pages(model, 12)


def test_pools_of_a_fixed_number_of_pages() -> None:
    model = lowered(SPARSE)
    fix_pages(model, 12)
    pools = [
        value for value in (*model.graph.input, *model.graph.output) if "cache" in value.name and "." in value.name
    ]
    assert len(pools) == 8
    assert {value.type.tensor_type.shape.dim[0].dim_value for value in pools} == {12}


def test_axes_of_inputs_get_the_names_that_the_engine_has_for_them() -> None:
    model = with_known_axes(lowered(CONFIG))
    model.graph.input.append(helper.make_tensor_value_info("state", FLOAT, ["s10", 4, "s11"]))
    known = [EngineTensor("state", FLOAT, ("B", 4, "T"))]
    name_axes(model, [*engine_tensors(with_known_axes(lowered(CONFIG)), LoweredMetadata.of(model))[0], *known])
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    assert shapes["state"] == ["B", 4, "T"]
    assert shapes["block_table"] == ["B", "max_pages"]


@pytest.mark.parametrize("config", [CONFIG, SPARSE], ids=["dense", "sparse"])
def test_query_terms_reach_every_op_that_has_them(config: Config) -> None:
    model = lowered(config)
    for terms in (1, 0):  # the second replaces the first
        set_query_terms(model, terms)
        given = {
            node.op_type: [attribute.i for attribute in node.attribute if attribute.name == "query_terms"]
            for node in mla_nodes(model)
        }
        assert given["MlaSparseAttention" if config is SPARSE else "MlaAttention"] == [terms]
        assert given["MlaPlan"] == []


def rounded_weights(model: onnx.ModelProto) -> set[str]:
    return {tensor.name for tensor in model.graph.initializer if tensor.data_type == BFLOAT16}


@pytest.mark.parametrize("config", [CONFIG, SPARSE], ids=["dense", "sparse"])
def test_bfloat16_is_where_products_are_and_nowhere_else(config: Config) -> None:
    model = lowered(config)
    wanted = logits_of(model)
    assert to_bfloat16(model) > 0
    types = element_types(model)
    producers = {name: node for node in model.graph.node for name in node.output}
    names = rounded_weights(model)
    for layer in range(config.layers):
        assert {f"q.{layer}.bf16", f"kv_a.{layer}.bf16", f"o.{layer}.bf16", f"kv_norm.{layer}.bf16"} <= names
    assert {"lm_head.bf16", "embedding.bf16"} <= names
    assert not any(name.startswith(("norm", "cos", "sin", "index_weights")) for name in names)
    for node in model.graph.node:
        found = {types[name] for name in node.input if types.get(name) in (FLOAT, BFLOAT16)}
        if node.domain == DOMAIN:
            for formal, name in OPS[node.op_type].given_inputs(node).items():
                kind = next(entry.kind for entry in OPS[node.op_type].inputs if entry.name == formal)
                assert kind not in (F, WEIGHT) or types[name] == BFLOAT16
        elif node.op_type == "MatMul":
            exact = any(name.startswith("index_weights") for name in node.input)
            assert found == {FLOAT if exact else BFLOAT16}
        elif node.op_type in ("RMSNormalization", "Add"):
            assert found == {FLOAT}
        elif node.op_type == "Cast":
            source = producers.get(node.input[0])
            assert source is None or source.op_type != "Cast", "a pair of casts"
    assert types["logits"] == FLOAT
    # Rounded weights in float32 arithmetic: bfloat16 has 8 bits.
    rounded = to_float32(without_bodies(model))
    attach_functions(rounded)
    error = np.abs(logits_of(rounded) - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < error < (0.3 if config.top_k else 0.05)


def without_bodies(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.functions[:]
    return copy


def test_products_on_the_way_to_a_choice_are_not_rounded(tmp_path: Path) -> None:
    example = EXAMPLES / "deepseek_v32__dynamo_op20__eager__dec.onnx"
    assert main(["lower", str(example), "-o", str(tmp_path), "--no-verify", "--quiet"]) == 0
    model = onnx.load(tmp_path / "model.onnx")
    wanted = logits_of(model)
    to_bfloat16(model)
    types = element_types(model)
    exact = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and types[node.output[0]] == FLOAT]
    # One router, and the head weights of two indexers.
    assert len(exact) == 3
    assert all(types[name] == FLOAT for node in exact for name in node.input)
    assert {types[name] for node in model.graph.node if node.op_type == "TopK" for name in node.input[:1]} == {FLOAT}
    assert {types[node.input[0]] for node in model.graph.node if node.op_type in ("Cos", "Sin", "Sigmoid")} == {FLOAT}
    rounded = to_float32(without_bodies(model))
    attach_functions(rounded)
    assert logits_of(rounded).shape == wanted.shape


@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v3__dynamo_op23__sdpa__dec__realdims_fp16__q_dq_blk_oi_t",
        "deepseek_v3__optimum0.1.0_tf4.57.6_op17__sdpa__dec__fp16",
    ],
)
def test_a_half_precision_model_multiplies_in_bfloat16_too(name: str, tmp_path: Path) -> None:
    assert main(["lower", str(EXAMPLES / f"{name}.onnx"), "-o", str(tmp_path), "--no-verify", "--quiet"]) == 0
    model = onnx.load(tmp_path / "model.onnx")
    before, interface = element_types(model), [value.name for value in (*model.graph.input, *model.graph.output)]
    exact = to_float32(without_bodies(model))
    assert to_bfloat16(model) > 0
    types = element_types(model)
    assert {name: types[name] for name in interface} == {name: before[name] for name in interface}
    fused = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type != "MlaPlan"]
    assert fused
    for node in fused:
        for formal, tensor in OPS[node.op_type].given_inputs(node).items():
            kind = next(entry.kind for entry in OPS[node.op_type].inputs if entry.name == formal)
            assert kind not in (F, WEIGHT) or types[tensor] in (BFLOAT16, TensorProto.FLOAT8E4M3FN)
    weights = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    assert [types[node.output[0]] for node in products].count(BFLOAT16) >= 3
    # what lies between products is as it was, and a result goes to float32 without the smaller range of float16 in between
    assert any(types[node.output[0]] == TensorProto.FLOAT16 for node in model.graph.node if node.op_type == "Mul")
    producers = {tensor: node for node in model.graph.node for tensor in node.output}
    for node in model.graph.node:
        source = producers.get(node.input[0]) if node.op_type == "Cast" and types[node.output[0]] == FLOAT else None
        assert source is None or source.op_type != "Cast" or types[source.input[0]] != BFLOAT16
    rounded = to_float32(without_bodies(model))
    for converted in (exact, rounded):
        attach_functions(converted)
    results = [result_of(converted) for converted in (exact, rounded)]
    errors = np.abs(results[1] - results[0]) / np.abs(results[0]).max()
    assert 1e-5 < np.median(errors) < 5e-3
    assert errors.max() < 0.3  # where a router chooses another expert


def result_of(model: onnx.ModelProto) -> np.ndarray:
    """The first output of a prompt of two sequences."""
    session = Session(model, pages=12)
    first, second = session.create(), session.create()
    given = session.step({first: [3, 1, 4, 1, 5], second: [9, 2, 6]})
    return np.concatenate([next(iter(given[sequence].values())) for sequence in (first, second)])


def test_weights_on_disk_stay_there_and_converted_ones_are_rounded_to_even(tmp_path: Path) -> None:
    model = lowered(Config(vocabulary=500))  # small tensors are read in any case
    wanted = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    source = tmp_path / "lowered"
    source.mkdir()
    onnx.save_model(model, source / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    kept, converted = tmp_path / "kept", tmp_path / "converted"
    kept.mkdir()
    converted.mkdir()
    assert write_plugin_model(source / "model.onnx", kept).functions
    assert (kept / "weights").is_symlink()
    assert {path.name for path in kept.iterdir()} == {"model.onnx", "weights"}
    write_plugin_model(source / "model.onnx", converted, dtype="bf16", pages=5)
    found = onnx.load(converted / "model.onnx", load_external_data=False)
    locations = {
        entry.value for tensor in found.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert locations == {"bf16.0.data"}
    (tensor,) = (tensor for tensor in found.graph.initializer if tensor.name == "lm_head.bf16")
    data = {entry.key: entry.value for entry in tensor.external_data}
    raw = (converted / data["location"]).read_bytes()[int(data["offset"]) :][: int(data["length"])]
    values = np.frombuffer(raw, ml_dtypes.bfloat16).reshape(tuple(tensor.dims))
    np.testing.assert_array_equal(values, wanted["lm_head"].astype(ml_dtypes.bfloat16))
    with pytest.raises(UsageError, match="--dtype is 'fp4'"):
        write_plugin_model(source / "model.onnx", converted, dtype="fp4")


def test_half_precision_weights_on_disk_are_rounded_as_such(tmp_path: Path) -> None:
    model = lowered(Config(vocabulary=500))  # small tensors are read in any case
    values = next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == "lm_head")
    half = values.astype(np.float16)
    last = next(node for node in model.graph.node if "lm_head" in node.input)
    place = list(model.graph.node).index(last)
    for tensor in model.graph.initializer:
        if tensor.name == "lm_head":
            tensor.CopyFrom(numpy_helper.from_array(half, "lm_head"))
    result = last.output[0]
    narrow = helper.make_node("Cast", [last.input[0]], ["narrow"], name="narrow", to=TensorProto.FLOAT16)
    wide = helper.make_node("Cast", ["product"], [result], name="wide", to=FLOAT)
    last.input[0], last.output[0] = "narrow", "product"
    model.graph.node.insert(place + 1, wide)
    model.graph.node.insert(place, narrow)
    source, converted = tmp_path / "source", tmp_path / "converted"
    source.mkdir()
    converted.mkdir()
    onnx.save_model(model, source / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    write_plugin_model(source / "model.onnx", converted, dtype="bf16")
    found = onnx.load(converted / "model.onnx", load_external_data=False).graph
    (tensor,) = (tensor for tensor in found.initializer if tensor.name == "lm_head.bf16")
    data = {entry.key: entry.value for entry in tensor.external_data}
    raw = (converted / data["location"]).read_bytes()[int(data["offset"]) :][: int(data["length"])]
    np.testing.assert_array_equal(np.frombuffer(raw, ml_dtypes.bfloat16), half.astype(ml_dtypes.bfloat16).reshape(-1))
    (cast,) = (node for node in found.node if node.name == "wide")
    assert list(cast.input) == ["product.bf16"]


def test_a_branch_reads_what_became_bfloat16() -> None:
    model = lowered(CONFIG)
    branch = helper.make_graph(
        [helper.make_node("Identity", ["attended.0"], ["taken"])],
        "then",
        [],
        [helper.make_tensor_value_info("taken", FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["attended.0"], ["negated"])],
        "else",
        [],
        [helper.make_tensor_value_info("negated", FLOAT, None)],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    index = next(index for index, node in enumerate(model.graph.node) if "attended.0" in node.input)
    model.graph.node[index].input[0] = "chosen"
    model.graph.node.insert(
        index, helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=other, name="if")
    )
    to_bfloat16(model, weight_file=WeightFile(Path("unused")))
    types = element_types(model)
    assert types["attended.0.bf16"] == BFLOAT16
    assert types["attended.0"] == FLOAT
    assert types["chosen"] == FLOAT


def test_a_weight_that_is_moved_on_its_way_to_a_product_is_rounded_as_it_is_stored() -> None:
    model = lowered(CONFIG)
    last = model.graph.node[-2]
    assert last.op_type == "MatMul"
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == last.input[1])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).T.copy(), "stored"))
    node = helper.make_node("Transpose", ["stored"], ["turned"], name="turn", perm=[1, 0])
    last.input[1] = "turned"
    model.graph.node.insert(0, node)
    to_bfloat16(model)
    assert "stored.bf16" in rounded_weights(model)
    assert all(tensor.name != "stored" for tensor in model.graph.initializer)
    turn = next(node for node in model.graph.node if node.name == "turn")
    assert list(turn.input) == ["stored.bf16"]
    assert element_types(model)["turned.bf16"] == BFLOAT16
