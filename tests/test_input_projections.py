"""MlaInputProjections in place of the products that make a layer's inputs: which are taken, and that the model computes what it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import SPARSE, Config, lowered
from test_coded_weights import decoded
from test_plugin_model import EXAMPLES, expand, logits_of

from mla_trt.cli import main
from mla_trt.cuda import Gpu
from mla_trt.engines import decoded_weights, input_projections
from mla_trt.engines.bfloat16 import to_bfloat16
from mla_trt.engines.decoded_weights import decode_weights
from mla_trt.engines.input_projections import is_faster, take_input_projections
from mla_trt.engines.plugin_model import compact, write_plugin_model
from mla_trt.float32 import to_float32
from mla_trt.loading import ModelOnDisk, external_file
from mla_trt.ops import OPS, attach_functions, make_node
from mla_trt.ops.projection_weights import from_tiles
from mla_trt.weight_file import WeightFile

C, Q, H, M, R, DR, HI, DI = 16, 24, 4, 24, 32, 8, 8, 16
EPSILON = 1e-5
BFLOAT16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT
NAMES = ("query", "latent", "rope_key", "index_query", "index_key", "index_weights")
STEP = ("query_offsets", "cache_lengths", "block_table", "token_sequence", "positions", "schedule", "kv_cache")
TABLES = ("cos", "sin", "w_uk", "w_uv", "index_cos", "index_sin", "indexer_cache")
ALL = {
    *("hidden", "w_dq", "query_norm_weight", "w_uq", "w_dkv", "w_kr"),
    *("w_index_query", "w_index_key", "w_index_weights", "index_weights_factor"),
}
HEAD_WEIGHTS = {"w_index_weights", "index_weights_factor"}


@pytest.fixture(autouse=True)
def _small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_projections, "LEAST_BYTES", 0)


class Layer:
    """An attention layer and what makes its inputs, as the lowering writes it in bf16.

    Attributes:
        nodes: by their first result, in order.
        constants: by name.
    """

    def __init__(self) -> None:
        random = np.random.default_rng(0)

        def weight(*shape: int) -> np.ndarray:
            return random.normal(size=shape).astype(ml_dtypes.bfloat16)

        self.constants = {
            "q_a": weight(C, Q),
            "q_norm": weight(Q),
            "q_b": weight(Q, H * M),
            "kv_a": weight(C, R + DR),
            "index_q": weight(Q, HI * DI),
            "index_k": weight(C, DI),
            "index_w": weight(C, HI),
            "factor": weight(HI),
            "two": np.array(2, np.float32),
            "epsilon": np.array(EPSILON, np.float32),
        }
        self.nodes: dict[str, onnx.NodeProto] = {}
        self.outputs = ["output"]
        self.op("hidden", "Relu", "x")
        self.op("down", "MatMul", "hidden", "q_a")
        self.op("wide", "Cast", "down", to=FLOAT)
        self.op("square", "Pow", "wide", "two")
        self.op("mean", "ReduceMean", "square", np.array([-1]))
        self.op("shifted", "Add", "mean", "epsilon")
        self.op("root", "Sqrt", "shifted")
        self.op("scaled", "Div", "wide", "root")
        self.op("narrow", "Cast", "scaled", to=BFLOAT16)
        self.op("normed", "Mul", "q_norm", "narrow")
        self.op("up", "MatMul", "normed", "q_b")
        self.op("query", "Reshape", "up", np.array([-1, H, M]))
        self.op("kv", "MatMul", "hidden", "kv_a")
        self.op("kv_rows", "Reshape", "kv", np.array([-1, R + DR]))
        self.op("latent", "Slice", "kv_rows", *_range(0, R, 1))
        self.op("rope_key", "Slice", "kv_rows", *_range(-DR, 1 << 40, -1), np.array([1]))
        self.op("index_up", "MatMul", "normed", "index_q")
        self.op("index_query", "Reshape", "index_up", np.array([-1, HI, DI]))
        self.op("keys", "MatMul", "hidden", "index_k")
        self.op("index_key", "Reshape", "keys", np.array([-1, DI]))
        self.op("heads", "MatMul", "hidden", "index_w")
        self.op("head_rows", "Reshape", "heads", np.array([-1, HI]))
        self.op("weighed", "Mul", "head_rows", "factor")
        self.op("index_weights", "Cast", "weighed", to=FLOAT)
        self.nodes["output"] = self._attention(NAMES)

    def op(self, output: str, kind: str, *inputs: str | np.ndarray, **attributes: Any) -> None:
        """Sets the node that makes a tensor; where there was one, it stands there."""
        names = [value if isinstance(value, str) else f"{output}.{place}" for place, value in enumerate(inputs)]
        self.constants |= {name: value for name, value in zip(names, inputs, strict=True) if not isinstance(value, str)}
        self.nodes[output] = helper.make_node(kind, names, [output], name=output, **attributes)

    def also(self, tensor: str) -> None:
        """Reads a tensor elsewhere."""
        self.op(f"{tensor}.also", "Identity", tensor)
        self.outputs.append(f"{tensor}.also")

    def _needed(self) -> list[onnx.NodeProto]:
        """The nodes that something reads."""
        nodes, read, count = list(self.nodes.values()), {"up", *self.outputs}, 0  # a branch may read "up"
        while count < len(read):
            count = len(read)
            read.update(name for node in nodes if read.intersection(node.output) for name in node.input)
        return [node for node in nodes if read.intersection(node.output)]

    def _attention(self, names: tuple[str, ...]) -> onnx.NodeProto:
        sizes = {
            "kv_lora_rank": R,
            "qk_rope_head_dim": DR,
            "num_heads": H,
            "qk_nope_head_dim": M - DR,
            "v_head_dim": 16,
        }
        index = {"index_head_dim": DI, "index_rope_dim": 8, "top_k": 4}
        given = {name: name for name in (*names, *STEP, *TABLES)}
        outputs = ["output", "kv_cache_out", "indices", "indexer_cache_out"]
        return make_node("MlaSparseAttention", given, outputs, "layer", **sizes, **index, softmax_scale=1.0)

    def model(self, shape: tuple[int | str, ...] = (1, "T", C)) -> onnx.ModelProto:
        """The graph of [1, T] tokens."""
        made, waiting, nodes = {"x", *STEP, *TABLES, *self.constants}, self._needed(), []
        while waiting:  # what was set later may be read earlier
            node = next(node for node in waiting if made.issuperset(filter(None, node.input)))
            waiting.remove(node)
            nodes.append(node)
            made.update(node.output)
        constants = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        read = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes,
            "layer",
            [
                helper.make_tensor_value_info("x", BFLOAT16, shape),
                *(helper.make_tensor_value_info(name, FLOAT, None) for name in (*STEP, *TABLES)),
            ],
            [helper.make_tensor_value_info(name, BFLOAT16, None) for name in self.outputs],
            [tensor for tensor in constants if tensor.name in read],
        )
        opsets = [helper.make_opsetid("", 26), helper.make_opsetid("mla_trt", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def _range(start: int, end: int, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.array([start]), np.array([end]), np.array([axis])


def _take(model: onnx.ModelProto, coded: bool = False) -> int:
    return take_input_projections(ModelOnDisk(model, None), coded=coded)


def with_decoded(model: onnx.ModelProto, weights: Mapping[str, int]) -> onnx.ModelProto:
    """The model in float32 with weights that are what their codes give in so many first columns."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    for tensor in plain.graph.initializer:
        if tensor.name in weights:
            values, columns = numpy_helper.to_array(tensor), weights[tensor.name]
            wide = values.astype(np.float32)
            wide[:, :columns] = decoded(values[:, :columns])
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    return plain


def _taken(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "MlaInputProjections"]


def _given(model: onnx.ModelProto) -> dict[str, str]:
    (node,) = _taken(model)
    return OPS[node.op_type].given_inputs(node)


def _dims(model: onnx.ModelProto) -> dict[str, list[int]]:
    return {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}


def _layer_inputs(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """What the layer reads, for random hidden states, in float32."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    kept = [node for node in model.graph.node if node.op_type != "MlaSparseAttention"]
    del part.graph.node[:], part.graph.output[:], part.graph.input[1:]
    part.graph.node.extend(kept)
    part.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in NAMES)
    attach_functions(part)
    session = ort.InferenceSession(to_float32(part).SerializeToString(), providers=["CPUExecutionProvider"])
    shape = [dim if isinstance(dim, int) else 5 for dim in session.get_inputs()[0].shape]
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return dict(zip(NAMES, session.run(None, {"x": x}), strict=True))


def _check(layer: Layer, wanted: set[str], *, decoded: int = 0, **options: Any) -> onnx.ModelProto:
    """Takes what is wanted, no more, and the layer reads what it did; so many weights are decoded first."""
    model = layer.model(**options)
    before = _layer_inputs(model)
    assert decode_weights(ModelOnDisk(model, None)) == decoded
    assert _take(model) == 1
    assert set(_given(model)) == wanted
    made = {*_dims(model), *(value.name for value in model.graph.input)}
    for node in model.graph.node:
        assert made.issuperset(filter(None, node.input)), node.name  # which come before
        made.update(node.output)
    for name, values in _layer_inputs(model).items():
        np.testing.assert_allclose(values, before[name], rtol=1e-4, atol=1e-4, err_msg=name)
    read = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read
    assert all(read.union(layer.outputs).intersection(node.output) for node in model.graph.node)
    return model


def test_one_node_makes_all_that_a_layer_reads() -> None:
    model = _check(Layer(), ALL)
    assert [node.op_type for node in model.graph.node] == [
        "Relu",
        "Reshape",
        "MlaInputProjections",
        "MlaSparseAttention",
    ]
    (node,) = _taken(model)
    assert OPS[node.op_type].given_outputs(node) == {name: name for name in NAMES}
    assert OPS[node.op_type].node_attributes(node).number("epsilon") == np.float32(EPSILON)
    given, dims = _given(model), _dims(model)
    assert {name: (value, dims[value]) for name, value in given.items() if name != "hidden"} == {
        "w_dq": ("q_a", [C, Q]),
        "query_norm_weight": ("query/norm_weight", [Q]),
        "w_uq": ("q_b", [Q, H, M]),
        "w_dkv": ("latent/weight", [C, R]),
        "w_kr": ("rope_key/weight", [C, DR]),
        "w_index_query": ("index_q", [Q, HI, DI]),
        "w_index_key": ("index_k", [C, DI]),
        "w_index_weights": ("index_w", [C, HI]),
        "index_weights_factor": ("index_weights/factor", [HI]),
    }
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {types[value] for name, value in given.items() if name != "hidden"} == {BFLOAT16}


def test_hidden_states_of_two_axes_need_no_reshape() -> None:
    model = _check(Layer(), ALL, shape=("T", C))
    assert _given(model)["hidden"] == "hidden"
    assert not any(node.op_type == "Reshape" for node in model.graph.node)


def test_the_hidden_states_may_be_an_input() -> None:
    layer = Layer()
    for node in layer.nodes.values():
        for place, name in enumerate(node.input):
            node.input[place] = "x" if name == "hidden" else name
    del layer.nodes["hidden"]
    model = _check(layer, ALL)
    assert model.graph.node[0].input[0] == "x"


def _split(layer: Layer) -> None:
    layer.constants["sizes"] = np.array([R, DR])
    layer.nodes["latent"] = helper.make_node("Split", ["kv_rows", "sizes"], ["latent", "rope_key"], axis=-1)
    del layer.nodes["rope_key"]


def _split_with_a_rest(layer: Layer) -> None:
    layer.constants["wider"] = np.concatenate([layer.constants["kv_a"], layer.constants["kv_a"][:, :8]], axis=1)
    layer.constants["sizes"] = np.array([R, DR, 8])
    layer.op("kv", "MatMul", "hidden", "wider")
    layer.op("kv_rows", "Reshape", "kv", np.array([-1, R + DR + 8]))
    layer.nodes["latent"] = helper.make_node("Split", ["kv_rows", "sizes"], ["latent", "rope_key", "rest"], axis=-1)
    del layer.nodes["rope_key"]


def _split_before_the_rows(layer: Layer) -> None:
    layer.constants["sizes"] = np.array([R, DR])
    layer.nodes["kv_rows"] = helper.make_node("Split", ["kv", "sizes"], ["kv_rows", "rest"], axis=2)
    layer.op("latent", "Reshape", "kv_rows", np.array([-1, R]))
    layer.op("rope_key", "Reshape", "rest", np.array([-1, DR]))


def _products_of_their_own(layer: Layer) -> None:
    for name, columns in (("latent", slice(0, R)), ("rope_key", slice(R, R + DR))):
        layer.op(f"{name}.product", "MatMul", "hidden", np.ascontiguousarray(layer.constants["kv_a"][:, columns]))
        layer.op(name, "Reshape", f"{name}.product", np.array([-1, columns.stop - columns.start]))


def _packed_latents(layer: Layer) -> None:
    layer.op("all", "MatMul", "hidden", np.concatenate([layer.constants["q_a"], layer.constants["kv_a"]], axis=1))
    layer.op("down", "Slice", "all", *_range(0, Q, 2))
    layer.op("kv", "Slice", "all", *_range(Q, Q + R + DR, 2))


def _rows_before(layer: Layer) -> None:
    layer.op("tokens", "Reshape", "hidden", np.array([-1, C]))
    layer.op("down", "MatMul", "tokens", "q_a")
    layer.op("keys", "MatMul", "tokens", "index_k")
    layer.op("apart", "Unsqueeze", "normed", np.array([1]))
    layer.op("index_up", "MatMul", "apart", "index_q")


def _heads_twice(layer: Layer) -> None:
    layer.op("four", "Reshape", "up", np.array([0, -1, H, M]))
    layer.op("query", "Reshape", "four", np.array([-1, H, M]))


def _cast_first(layer: Layer) -> None:
    layer.op("head_rows", "Cast", "heads", to=FLOAT)
    layer.op("weighed", "Mul", layer.constants["factor"].astype(np.float32), "head_rows")
    layer.op("halved", "Mul", "weighed", np.array(0.5, np.float32))
    layer.op("index_weights", "Reshape", "halved", np.array([-1, HI]))


def _norm_op(layer: Layer) -> None:
    layer.op("normed", "RMSNormalization", "down", "q_norm", epsilon=EPSILON, axis=-1)


def _one_factor(layer: Layer) -> None:
    layer.op("weighed", "Mul", "head_rows", np.array(0.375, ml_dtypes.bfloat16))


def _turned(weight: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(weight.T)


def _gemms(layer: Layer) -> None:
    layer.op("tokens", "Reshape", "hidden", np.array([-1, C]))
    layer.op("down", "Gemm", "tokens", _turned(layer.constants["q_a"]), transB=1)
    layer.op("up", "Gemm", "normed", _turned(layer.constants["q_b"]), transB=1, beta=0.5)
    layer.op("kv", "Gemm", "tokens", "kv_a")
    layer.op("index_up", "Gemm", "normed", "index_q", alpha=1.0)
    layer.op("keys", "Gemm", "tokens", _turned(layer.constants["index_k"]), transB=1)
    layer.op("heads", "Gemm", "tokens", "index_w")


SPELLINGS = {
    "split": _split,
    "split with a rest that nothing reads": _split_with_a_rest,
    "split before the rows": _split_before_the_rows,
    "products of their own": _products_of_their_own,
    "packed latents": _packed_latents,
    "rows before": _rows_before,
    "heads twice": _heads_twice,
    "cast first": _cast_first,
    "norm op": _norm_op,
    "one factor": _one_factor,
    "gemms": _gemms,
}


@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_spellings_that_are_taken_whole(change: Callable[[Layer], None]) -> None:
    layer = Layer()
    change(layer)
    model = _check(layer, ALL)
    assert _dims(model)[_given(model)["index_weights_factor"]] == [HI]


def _transposed(layer: Layer) -> None:
    for output, rows, weight in (("down", "hidden", "q_a"), ("up", "normed", "q_b"), ("kv", "hidden", "kv_a")):
        layer.op(f"{weight}.turned", "Transpose", _turned(layer.constants[weight]), perm=[1, 0])
        layer.op(output, "MatMul", rows, f"{weight}.turned")


def _dequantised(layer: Layer) -> None:
    """As DeepSeek's own weights: codes, and a scale for each block of eight by eight."""
    random = np.random.default_rng(1)
    kinds = {"q_b": ml_dtypes.float8_e4m3fn, "kv_a": np.int8}
    for (weight, kind), output, rows in zip(kinds.items(), ("up", "kv"), ("normed", "hidden"), strict=True):
        columns, count = layer.constants[weight].shape[::-1]
        codes = random.integers(-7, 8, (columns, count)).astype(kind)
        scales = np.exp2(random.integers(-4, -1, (columns // 8, count // 8))).astype(np.float32)
        layer.op(f"{weight}.codes", "DequantizeLinear", codes, np.array(1, np.float32))
        layer.op(f"{weight}.tall", "Expand", scales.reshape(columns // 8, 1, count // 8, 1), np.array([1, 8, 1, 8]))
        layer.op(f"{weight}.scales", "Reshape", f"{weight}.tall", np.array([columns, count]))
        layer.op(f"{weight}.scaled", "Mul", f"{weight}.codes", f"{weight}.scales")
        layer.op(f"{weight}.turned", "Transpose", f"{weight}.scaled", perm=[1, 0])
        layer.op(f"{weight}.rounded", "Cast", f"{weight}.turned", to=BFLOAT16)
        layer.op(output, "MatMul", rows, f"{weight}.rounded")


@pytest.mark.parametrize(("change", "decoded"), [(_transposed, 3), (_dequantised, 2)])
def test_weights_that_are_decoded_before(
    change: Callable[[Layer], None], decoded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded_weights, "SMALL_TENSOR", 0)
    layer = Layer()
    change(layer)
    _check(layer, ALL, decoded=decoded)


def test_no_factor() -> None:
    layer = Layer()
    layer.op("index_weights", "Cast", "head_rows", to=FLOAT)
    _check(layer, ALL - {"index_weights_factor"})


def _no_norm(layer: Layer) -> None:
    layer.op("normed", "Tanh", "narrow")


def _another_norm(layer: Layer) -> None:
    layer.op("square", "Abs", "wide")


def _norm_of_another(layer: Layer) -> None:
    layer.op("bent", "Tanh", "down")
    layer.op("wide", "Cast", "bent", to=FLOAT)


def _other_index_query(layer: Layer) -> None:
    layer.op("index_up", "MatMul", "hidden", layer.constants["index_q"][:C])


def _index_query_moved(layer: Layer) -> None:
    layer.op("index_up.more", "Neg", "index_up")
    layer.op("index_query", "Reshape", "index_up.more", np.array([-1, HI, DI]))


def _latent_moved(layer: Layer) -> None:
    layer.op("latent.whole", "Slice", "kv_rows", *_range(0, R, 1))
    layer.op("latent", "Neg", "latent.whole")


def _slice(start: int, end: int, axis: int, *step: int) -> Callable[[Layer], None]:
    def change(layer: Layer) -> None:
        layer.op("latent", "Slice", "kv_rows", *_range(start, end, axis), *(np.array([each]) for each in step))

    return change


def _split_tokens(layer: Layer) -> None:
    layer.nodes["latent"] = helper.make_node("Split", ["kv_rows"], ["latent", "later"], axis=0, num_outputs=2)


def _columns_over_tokens(layer: Layer) -> None:
    layer.op("pairs", "Reshape", "kv", np.array([-1, 2, (R + DR) // 2]))
    layer.op("halves", "Slice", "pairs", *_range(0, R // 2, 2))
    layer.op("latent", "Reshape", "halves", np.array([-1, R]))


def _other_hidden(layer: Layer) -> None:
    layer.op("other", "Neg", "hidden")
    layer.op("kv", "MatMul", "other", "kv_a")


def _factor(values: np.ndarray) -> Callable[[Layer], None]:
    def change(layer: Layer) -> None:
        layer.op("head_rows.wide", "Cast", "heads", to=FLOAT)
        layer.op("head_rows", "Reshape", "head_rows.wide", np.array([-1, HI]))
        layer.op("index_weights", "Mul", "head_rows", values)

    return change


def _factor_of_the_step(layer: Layer) -> None:
    layer.op("sign", "Sign", "head_rows")
    layer.op("weighed", "Mul", "head_rows", "sign")


def _through_float16(layer: Layer) -> None:
    layer.op("halves", "Cast", "weighed", to=TensorProto.FLOAT16)
    layer.op("index_weights", "Cast", "halves", to=FLOAT)


def _packed_with_another(layer: Layer) -> None:
    _packed_latents(layer)
    layer.also("all")


def _read(tensor: str) -> Callable[[Layer], None]:
    return lambda layer: layer.also(tensor)


WITHOUT_NORM = {"hidden", "w_uq", "w_index_query"}
PARTS = {
    "the norm is read elsewhere": (_read("normed"), WITHOUT_NORM),
    "within the norm": (_read("wide"), WITHOUT_NORM),
    "the query's latent is read elsewhere": (_read("down"), WITHOUT_NORM),
    "the latents' product is read elsewhere": (_packed_with_another, WITHOUT_NORM),
    "no norm": (_no_norm, WITHOUT_NORM),
    "another norm": (_another_norm, WITHOUT_NORM),
    "norm of no product": (_norm_of_another, WITHOUT_NORM),
    "index query of no product": (_index_query_moved, {"hidden", "w_uq"}),
    "index query read elsewhere": (_read("index_query"), {"hidden", "w_uq"}),
    "index query of the hidden states": (_other_index_query, ALL - {"w_index_query"}),
    "latent and rope key read elsewhere": (_read("kv"), ALL - {"w_dkv", "w_kr"}),
    "latent read elsewhere": (_read("latent"), ALL - {"w_dkv", "w_kr"}),
    "latent of no product": (_latent_moved, ALL - {"w_dkv", "w_kr"}),
    "latent and rope key of others": (_other_hidden, ALL - {"w_dkv", "w_kr"}),
    "every other column": (_slice(0, R, 1, 2), ALL - {"w_dkv", "w_kr"}),
    "12 columns": (_slice(0, 12, -1), ALL - {"w_dkv", "w_kr"}),
    "rows": (_slice(0, R, 0), ALL - {"w_dkv", "w_kr"}),
    "rows of a split": (_split_tokens, ALL - {"w_dkv", "w_kr"}),
    "columns of other rows": (_columns_over_tokens, ALL - {"w_dkv", "w_kr"}),
    "index key read elsewhere": (_read("keys"), ALL - {"w_index_key"}),
    "head weights read elsewhere": (_read("heads"), ALL - HEAD_WEIGHTS),
    "a factor that bf16 does not have": (_factor(np.float32(1 / 3)), ALL - HEAD_WEIGHTS),
    "a factor for each token": (_factor(np.ones((5, 1), np.float32) / 2), ALL - HEAD_WEIGHTS),
    "as many tokens as heads": (_factor(np.ones((HI, 1), np.float32) / 2), ALL - HEAD_WEIGHTS),
    "a factor for each number": (_factor(np.ones((5, HI), np.float32) / 2), ALL - HEAD_WEIGHTS),
    "a factor of the step": (_factor_of_the_step, ALL - HEAD_WEIGHTS),
    "through float16": (_through_float16, ALL - HEAD_WEIGHTS),
}


@pytest.mark.parametrize(("change", "wanted"), PARTS.values(), ids=PARTS.keys())
def test_parts_that_stay(change: Callable[[Layer], None], wanted: set[str]) -> None:
    layer = Layer()
    change(layer)
    tokens = HI if "index_weights.1" in layer.constants and layer.constants["index_weights.1"].size == HI else 5
    _check(layer, wanted, shape=(1, tokens, C))


def _result(layer: Layer) -> None:
    layer.outputs.append("query")


def _in_a_branch(layer: Layer) -> None:
    taken = helper.make_tensor_value_info("taken", BFLOAT16, None)
    branches = {
        f"{name}_branch": helper.make_graph([helper.make_node("Neg", ["up"], ["taken"])], name, [], [taken])
        for name in ("then", "else")
    }
    layer.op("branch", "If", np.array(True), **branches)
    layer.outputs.append("branch")
    layer.nodes = {"up": layer.nodes.pop("up"), **layer.nodes}  # which the branch reads


def _heads(*sizes: int) -> Callable[[Layer], None]:
    return lambda layer: layer.op("query", "Reshape", "up", np.array(sizes))


def _not_by_heads(layer: Layer) -> None:
    layer.op("up.more", "Neg", "up")
    layer.op("query", "Reshape", "up.more", np.array([-1, H, M]))


def _weight_of_the_step(layer: Layer) -> None:
    layer.op("largest", "ReduceMax", "hidden", keepdims=0)
    layer.op("q_b.step", "Mul", "q_b", "largest")
    layer.op("up", "MatMul", "normed", "q_b.step")


def _random_weight(layer: Layer) -> None:
    layer.op("q_b.other", "RandomNormalLike", "q_b", seed=1.0)
    layer.op("up", "MatMul", "normed", "q_b.other")


def _gemm(*more: np.ndarray, **attributes: Any) -> Callable[[Layer], None]:
    def change(layer: Layer) -> None:
        layer.op("rows", "Reshape", "normed", np.array([-1, Q]))
        if attributes.get("transA"):
            layer.op("columns", "Transpose", "rows")
        layer.op("up", "Gemm", "columns" if attributes.get("transA") else "rows", "q_b", *more, **attributes)

    return change


def _float32(layer: Layer) -> None:
    layer.op("up", "MatMul", "normed", layer.constants["q_b"].astype(np.float32))


def _batched(layer: Layer) -> None:
    layer.op("up", "MatMul", "normed", np.stack([layer.constants["q_b"]] * 8))


def _rows_not_of_8(layer: Layer) -> None:
    layer.op("down", "MatMul", "hidden", layer.constants["q_a"][:, :20])
    layer.constants["q_norm"] = layer.constants["q_norm"][:20]
    layer.op("up", "MatMul", "normed", layer.constants["q_b"][:20])
    layer.op("index_up", "MatMul", "normed", layer.constants["index_q"][:20])


QUERIES = {
    "product read elsewhere": _read("up"),
    "product read in a branch": _in_a_branch,
    "a result": _result,
    "an axis that is kept": _heads(0, H, M),
    "other axes": _heads(1, -1, H * M),
    "two axes": _heads(-1, H * M),
    "four axes": _heads(-1, 2, H, M // 2),
    "another number of heads": _heads(-1, H, M // 2),
    "changed before it has heads": _not_by_heads,
    "no constant": _weight_of_the_step,
    "another one each time": _random_weight,
    "a bias": _gemm(np.ones(H * M, ml_dtypes.bfloat16)),
    "twice the product": _gemm(alpha=2.0),
    "rows that are columns": _gemm(transA=1),
    "float32": _float32,
    "a batch of weights": _batched,
    "rows no multiple of 8": _rows_not_of_8,
}


@pytest.mark.parametrize("change", QUERIES.values(), ids=QUERIES.keys())
def test_nothing_is_taken_without_the_query(change: Callable[[Layer], None]) -> None:
    layer = Layer()
    change(layer)
    model = layer.model()
    before = model.SerializeToString()
    assert _take(model) == 0
    assert model.SerializeToString() == before


def test_small_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_projections, "LEAST_BYTES", 2 * Q * H * M + 1)
    assert _take(Layer().model()) == 0
    monkeypatch.setattr(input_projections, "LEAST_BYTES", 2 * Q * H * M)
    assert _take(Layer().model()) == 1


def test_weights_that_others_read_stay_beside() -> None:
    layer = Layer()
    for name in ("q_b", "kv_a", "index_k"):
        layer.also(name)
    model = _check(layer, ALL)
    given, dims = _given(model), _dims(model)
    assert given["w_uq"] == "query/weight"
    assert dims["query/weight"] == [Q, H, M]
    assert given["w_index_key"] == "index_k"
    assert (dims["q_b"], dims["kv_a"], dims["index_k"]) == ([Q, H * M], [C, R + DR], [C, DI])


@pytest.mark.parametrize("to_file", [True, False])
def test_columns_of_weights_on_disk(to_file: bool, tmp_path: Path) -> None:
    layer = Layer()
    layer.also("kv_a")
    model = layer.model()
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, folder in {"kv_a": tmp_path / "apart", "q_norm": tmp_path}.items():
        folder.mkdir(exist_ok=True)
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        WeightFile(folder / f"{name}.data").move_out(tensor)
    source = ModelOnDisk(model, tmp_path, {"kv_a.data": tmp_path / "apart"})
    assert take_input_projections(source, WeightFile(tmp_path / "new.data") if to_file else None) == 1
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    assert not found["kv_a"].raw_data
    for name, wanted in (("latent", values["kv_a"][:, :R]), ("rope_key", values["kv_a"][:, R:])):
        tensor = found[f"{name}/weight"]
        assert external_file(tensor) == ("new.data" if to_file else None)
        np.testing.assert_array_equal(numpy_helper.to_array(tensor, str(tmp_path)), wanted)
    np.testing.assert_array_equal(numpy_helper.to_array(found["query/norm_weight"]), values["q_norm"])


def test_columns_of_weights_in_the_model_stay_in_it(tmp_path: Path) -> None:
    model = Layer().model()
    assert take_input_projections(ModelOnDisk(model, tmp_path), WeightFile(tmp_path / "new.data")) == 1
    assert not list(tmp_path.iterdir())


CODES = {"w_dq": C * Q, "w_uq": Q * H * M, "w_dkv": C * R, "w_index_query": Q * HI * DI, "w_index_key": C * DI}
"""The layer's weights that become codes, and how many there are."""


def _wide_latent(layer: Layer) -> None:
    """With a query's latent of 32, as codes want it."""
    random = np.random.default_rng(2)
    for name, shape in {"q_a": (C, 32), "q_b": (32, H * M), "index_q": (32, HI * DI), "q_norm": (32,)}.items():
        layer.constants[name] = random.normal(size=shape).astype(ml_dtypes.bfloat16)


def test_weights_become_codes() -> None:
    layer = Layer()
    _wide_latent(layer)
    model = layer.model()
    plain = with_decoded(model, {"q_a": 32, "q_b": H * M, "kv_a": R, "index_q": HI * DI, "index_k": DI})
    before = _layer_inputs(plain)
    assert _take(model, coded=True) == 1
    given, dims = _given(model), _dims(model)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert set(given) == ALL | {f"{name}_scale" for name in CODES}  # the rope key has 8 columns
    assert {name: (given[name], dims[given[name]]) for name in CODES} == {
        "w_dq": ("query/latent_weight/codes", [C, 32]),
        "w_uq": ("query/weight/codes", [32, H, M]),
        "w_dkv": ("latent/weight/codes", [C, R]),
        "w_index_query": ("index_query/weight/codes", [32, HI, DI]),
        "w_index_key": ("index_key/weight/codes", [C, DI]),
    }
    for name in CODES:
        codes, scales = given[name], given[f"{name}_scale"]
        assert scales == f"{codes.removesuffix('codes')}scales"
        assert (types[codes], types[scales], dims[scales]) == (TensorProto.FLOAT8E4M3FN, FLOAT, [1, 1])
    assert (types["rope_key/weight"], types["index_w"]) == (BFLOAT16, BFLOAT16)
    assert {"q_a", "q_b", "kv_a", "index_q", "index_k"}.isdisjoint(dims)
    for name, values in _layer_inputs(model).items():
        np.testing.assert_allclose(values, before[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_codes_of_any_spelling_are_near(change: Callable[[Layer], None]) -> None:
    layer = Layer()
    change(layer)
    model = layer.model()
    before = _layer_inputs(model)
    assert _take(model, coded=True) == 1
    assert {"w_uq_scale", "w_dkv_scale", "w_index_query_scale", "w_index_key_scale"} <= set(_given(model))
    for name, values in _layer_inputs(model).items():
        error = np.linalg.norm(values - before[name]) / np.linalg.norm(before[name])
        assert error < 0.06, name
        assert error > 1e-3 or name in ("rope_key", "index_weights"), name


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_weights_that_are_not_finite_stay(value: float) -> None:
    layer = Layer()
    layer.constants["q_b"][3, 5] = value
    model = layer.model()
    assert _take(model, coded=True) == 1
    given = _given(model)
    assert given["w_uq"] == "q_b"
    assert {name for name in given if name.endswith("_scale")} == {
        "w_dkv_scale",
        "w_index_query_scale",
        "w_index_key_scale",
    }


def test_head_weights_are_no_codes() -> None:
    layer = Layer()
    for name, shape in {"index_w": (C, 16), "factor": (16,)}.items():
        layer.constants[name] = np.ones(shape, ml_dtypes.bfloat16)
    layer.op("head_rows", "Reshape", "heads", np.array([-1, 16]))
    layer.op("index_query", "Reshape", "index_up", np.array([-1, 16, HI * DI // 16]))
    model = layer.model()
    assert _take(model, coded=True) == 1
    assert _given(model)["w_index_weights"] == "index_w"


def test_codes_of_weights_that_others_read_are_beside_them() -> None:
    layer = Layer()
    layer.also("q_b")
    model = layer.model()
    assert _take(model, coded=True) == 1
    assert _given(model)["w_uq"] == "query/weight/codes"
    assert _dims(model)["q_b"] == [Q, H * M]


@pytest.mark.parametrize("to_file", [True, False])
def test_codes_of_weights_on_disk(to_file: bool, tmp_path: Path) -> None:
    model = Layer().model()
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "q_b")
    values = numpy_helper.to_array(tensor)
    WeightFile(tmp_path / "q_b.data").move_out(tensor)
    file = WeightFile(tmp_path / "new.data") if to_file else None
    assert take_input_projections(ModelOnDisk(model, tmp_path), file, coded=True) == 1
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    codes, scales = found["query/weight/codes"], found["query/weight/scales"]
    assert external_file(codes) == ("new.data" if to_file else None)
    assert external_file(scales) is None
    assert external_file(found["latent/weight/codes"]) is None
    matrix = from_tiles(numpy_helper.to_array(codes, str(tmp_path)).reshape(Q, H * M))
    np.testing.assert_array_equal(matrix.astype(np.float32) * numpy_helper.to_array(scales), decoded(values))


@pytest.mark.parametrize(
    "config",
    [
        Config(num_heads=4),
        Config(num_heads=4, sinks=True),
        replace(SPARSE, num_heads=4, index_heads=8, index_head_dim=16),
    ],
    ids=["dense", "sinks", "sparse"],
)
def test_a_model_computes_what_it_did(config: Config) -> None:
    model = lowered(config)
    to_bfloat16(model)
    _check_model(model, layers=2)


@pytest.mark.parametrize(
    "name", ["deepseek_v32__dynamo_op20__eager__dec", "kimi_linear__dynamo_op20__eager__dec__fullonly"]
)
def test_an_export_computes_what_it_did(name: str, tmp_path: Path) -> None:
    assert main(["lower", str(EXAMPLES / f"{name}.onnx"), "-o", str(tmp_path), "--no-verify", "--quiet"]) == 0
    model = onnx.load(tmp_path / "model.onnx")
    for tensor in model.graph.initializer:  # as if trained in bf16: norms' weights become so
        if tensor.data_type == FLOAT and len(tensor.dims) == 1:
            rounded = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    to_bfloat16(model)
    _check_model(model, layers=2)
    for node in _taken(model):
        given = {"w_uq", "w_dkv", "w_kr", *({"w_dq", "w_index_query", "w_index_key"} if "v32" in name else ())}
        texts = {attribute.name: attribute.s.decode() for attribute in node.attribute}
        assert given <= set(texts.get("inputs", "").split()) | set(OPS[node.op_type].given_inputs(node))


def _check_model(model: onnx.ModelProto, layers: int) -> None:
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    del model.graph.value_info[:]  # as when it is taken
    assert _take(model) == len(_taken(model)) == layers
    compact(model)
    expand(model)
    attach_functions(plain)
    np.testing.assert_allclose(logits_of(to_float32(model)), logits_of(to_float32(plain)), rtol=1e-4, atol=1e-5)


BLOCKS = Config(hidden=144, num_heads=4, qk_nope_head_dim=40, kv_lora_rank=144, v_head_dim=36)
"""Of which all but the rope key's weights have more than one block."""


@pytest.mark.parametrize("top_k", [0, 6], ids=["dense", "sparse"])
def test_a_model_computes_what_its_codes_say(top_k: int) -> None:
    model = lowered(replace(BLOCKS, top_k=top_k, index_heads=10, index_head_dim=16))
    to_bfloat16(model)
    columns = {"q": 192, "kv_a": 144, **({"index_q": 160, "index_k": 16} if top_k else {})}
    plain = with_decoded(model, {f"{name}.{layer}.bf16": size for name, size in columns.items() for layer in (0, 1)})
    assert _take(model, coded=True) == 2
    for node in _taken(model):
        given = OPS[node.op_type].given_inputs(node)
        assert {"w_uq_scale", "w_dkv_scale", *(("w_index_query_scale", "w_index_key_scale") if top_k else ())} == {
            name for name in given if name.endswith("_scale")
        }
        assert _dims(model)[given["w_uq_scale"]] == [2, 2]
    compact(model)
    expand(model)
    attach_functions(plain)
    np.testing.assert_allclose(logits_of(to_float32(model)), logits_of(to_float32(plain)), rtol=1e-4, atol=1e-5)


def test_float32_weights_stay() -> None:
    assert _take(lowered(Config(num_heads=4))) == 0
    assert _take(lowered(Config(num_heads=4)), coded=True) == 0


@pytest.mark.parametrize(
    ("capability", "plugins", "faster"),
    [("9.0", "0.1.0 sm_80 sm_90a", True), ("9.0", "0.1.0 sm_80", False), ("8.0", "0.1.0 sm_80 sm_90a", False)],
)
def test_only_hopper_has_a_kernel_for_it(capability: str, plugins: str, faster: bool) -> None:
    assert is_faster(Gpu("GPU", capability, 1 << 37), plugins) is faster


def test_what_is_taken_from_converted_weights_lies_beside_them(tmp_path: Path) -> None:
    model = lowered(Config(num_heads=4, vocabulary=500, hidden=256))  # small tensors are read in any case
    wanted = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    source, folder = tmp_path / "lowered", tmp_path / "plugins"
    source.mkdir()
    folder.mkdir()
    onnx.save_model(model, source / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    write_plugin_model(source / "model.onnx", folder, dtype="bf16", pages=5, input_projections=True)
    written = onnx.load(folder / "model.onnx", load_external_data=False)
    found = {tensor.name: tensor for tensor in written.graph.initializer}
    assert len(_taken(written)) == 2
    for layer, node in enumerate(_taken(written)):
        latent = found[node.input[2]]
        assert external_file(latent) == "bf16.0.data"
        columns = wanted[f"kv_a.{layer}"][:, : latent.dims[1]].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(numpy_helper.to_array(latent, str(folder)), columns)


def test_a_model_is_written_without_them_unless_told(tmp_path: Path) -> None:
    onnx.save(lowered(Config(num_heads=4)), tmp_path / "model.onnx")
    (tmp_path / "plugins").mkdir()
    write_plugin_model(tmp_path / "model.onnx", tmp_path / "plugins", dtype="bf16")
    assert not _taken(onnx.load(tmp_path / "plugins" / "model.onnx"))
