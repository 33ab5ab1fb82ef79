"""ONNX Runtime's own operators compute the same in the standard ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import small_models
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from mla_trt.errors import BadModelError
from mla_trt.lowering import LowerOptions
from mla_trt.passes.standardize import RUNTIME_DOMAIN, forbid_rounded_activations, standardize
from mla_trt.pipeline import lower_file


@pytest.mark.parametrize("batch_b", [0, 1])
@pytest.mark.parametrize("batch_a", [0, 1])
@pytest.mark.parametrize("turned_b", [0, 1])
@pytest.mark.parametrize("turned_a", [0, 1])
def test_a_fused_matmul_with_any_operand_turned(turned_a: int, turned_b: int, batch_a: int, batch_b: int) -> None:
    sizes = {"m": 2, "k": 3, "n": 4, "b": 5}
    rows, columns = ("km" if turned_a else "mk"), ("nk" if turned_b else "kn")
    axes = [f"{pair[0]}b{pair[1]}" if moved else f"b{pair}" for pair, moved in ((rows, batch_a), (columns, batch_b))]
    random = np.random.default_rng(0)
    feeds = {
        name: random.standard_normal([sizes[axis] for axis in order]).astype(np.float32)
        for name, order in zip("ab", axes, strict=True)
    }
    attributes = {"transA": turned_a, "transB": turned_b, "transBatchA": batch_a, "transBatchB": batch_b, "alpha": 0.5}
    node = helper.make_node("FusedMatMul", ["a", "b"], ["c"], domain=RUNTIME_DOMAIN, **attributes)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in feeds.items()]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("c", TensorProto.FLOAT, [5, 2, 4])])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(RUNTIME_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    fused = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]
    standard = onnxruntime.InferenceSession(standardize(model).SerializeToString()).run(None, feeds)[0]
    np.testing.assert_allclose(standard, fused, rtol=1e-5)


def product_of_integers(
    of_a: list[int], of_b: list[int], of_y: list[int], element: type
) -> tuple[onnx.ModelProto, dict[str, np.ndarray], np.ndarray]:
    """A QLinearMatMul whose scales have these shapes, what it is given, and its result. Scales are powers of two, so that nothing but the result is
    rounded, whatever sums are made in."""
    random, limits = np.random.default_rng(0), np.iinfo(element)
    codes = {
        name: random.integers(limits.min, limits.max + 1, shape).astype(element)
        for name, shape in (("a", (2, 3, 8)), ("b", (8, 5)))
    }
    scales, points, exact = {}, {}, {}
    for name, shape in (("a", of_a), ("b", of_b), ("y", of_y)):
        scales[name] = (2.0 ** random.integers(-4, 0, shape) * (64.0 if name == "y" else 1.0)).astype(np.float32)
        points[name] = np.asarray(random.integers(-3 if limits.min else 120, 4 if limits.min else 127, shape)).astype(
            element
        )
        wide = (..., None) if name != "b" and len(shape) == 1 else ...
        exact[name] = (scales[name].astype(np.float64)[wide], points[name].astype(np.float64)[wide])
    product = np.matmul(*((codes[name] - exact[name][1]) * exact[name][0] for name in "ab"))
    expected = np.clip(np.rint(product / exact["y"][0]) + exact["y"][1], limits.min, limits.max).astype(element)
    inputs = ["a", "a_scale", "a_point", "b", "b_scale", "b_point", "y_scale", "y_point"]
    code = helper.np_dtype_to_tensor_dtype(np.dtype(element))
    graph = helper.make_graph(
        [helper.make_node("QLinearMatMul", inputs, ["y"])],
        "g",
        [helper.make_tensor_value_info("a", code, (2, 3, 8))],
        [helper.make_tensor_value_info("y", code, (2, 3, 5))],
        [numpy_helper.from_array(codes["b"], "b")]
        + [numpy_helper.from_array(values, f"{name}_scale") for name, values in scales.items()]
        + [numpy_helper.from_array(values, f"{name}_point") for name, values in points.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model, {"a": codes["a"]}, expected


@pytest.mark.parametrize("element", [np.int8, np.uint8])
@pytest.mark.parametrize(
    ("of_a", "of_b", "of_y"),
    [([], [], []), ([1], [1], [1]), ([], [5], []), ([3], [5], [3])],
    ids=["scalars", "one each", "columns", "rows and columns"],
)
def test_a_product_of_integers(of_a: list[int], of_b: list[int], of_y: list[int], element: type) -> None:
    model, feeds, expected = product_of_integers(of_a, of_b, of_y, element)
    standard = standardize(model)
    assert [node.op_type for node in standard.graph.node] == [
        "DequantizeLinear",
        "DequantizeLinear",
        "MatMul",
        "QuantizeLinear",
    ]
    sizes = {tensor.name: list(tensor.dims) for tensor in standard.graph.initializer}
    scales = [sizes[node.input[1]] for node in standard.graph.node if node.op_type != "MatMul"]
    assert scales == [[] if shape == [1] else shape for shape in (of_a, of_b, of_y)]  # [1] would be of an axis
    found = onnxruntime.InferenceSession(standard.SerializeToString()).run(None, feeds)[0]
    assert len(np.unique(expected)) > 10
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("change", ["a scale that is data", "scales of more than rows"])
def test_other_products_of_integers_stay(change: str) -> None:
    model, _, _ = product_of_integers([], [], [], np.int8)
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "a_scale")
    if change == "a scale that is data":
        model.graph.initializer.remove(scale)
        model.graph.input.append(helper.make_tensor_value_info("a_scale", TensorProto.FLOAT, []))
    else:
        scale.CopyFrom(numpy_helper.from_array(np.ones((2, 3, 1), np.float32), "a_scale"))
    assert [node.op_type for node in standardize(model).graph.node] == ["QLinearMatMul"]


def test_an_op_of_another_domain_that_a_tool_wrote_as_a_standard_one() -> None:
    """onnxscript's fusions do so, and import nothing of it; ONNX Runtime takes them."""
    node = helper.make_node("SimplifiedLayerNormalization", ["x", "w"], ["n"], axis=-1, epsilon=1e-6, stash_type=1)
    product = helper.make_node("Mul", ["n", "n"], ["y"])
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in {"x": [2, 8], "w": [8], "y": [2, 8]}.items()
    }
    graph = helper.make_graph([node, product], "g", [values["x"], values["w"]], [values["y"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in (("x", (2, 8)), ("w", (8,)))}
    fused = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]
    standard = onnxruntime.InferenceSession(standardize(model).SerializeToString()).run(None, feeds)[0]
    np.testing.assert_allclose(standard, fused, rtol=1e-5)


N, K, BLOCK = 6, 80, 32
BLOCKS = -(-K // BLOCK)
RANDOM = np.random.default_rng(0)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes as bytes, along the last axis."""
    if bits == 8:
        return codes
    even = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return even[..., ::2] | even[..., 1::2] << 4


def blocks_of(bits: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Weights and scales of a MatMulNBits [K, N], of which the last block is half empty."""
    codes = RANDOM.integers(0, 1 << bits, (N, BLOCKS, BLOCK)).astype(np.uint8)
    return {"B": packed(codes, bits), "scales": RANDOM.uniform(0.05, 0.2, (N, BLOCKS)).astype(dtype)}


def block_product(
    given: dict[str, np.ndarray], bits: int, *, as_nodes: bool = False, **attributes: int
) -> onnx.ModelProto:
    """x [3, K] times block-quantised weights, which are initializers or Constant nodes."""
    dtype = helper.np_dtype_to_tensor_dtype(given["scales"].dtype)
    names = [name if name in given else "" for name in ("B", "scales", "zero_points", "g_idx", "bias")]
    attributes |= {"K": K, "N": N, "bits": bits, "block_size": BLOCK}
    node = helper.make_node("MatMulNBits", ["x", *names], ["y"], domain=RUNTIME_DOMAIN, **attributes)
    tensors = [numpy_helper.from_array(value, name) for name, value in given.items()]
    constants = [helper.make_node("Constant", [], [name], value=numpy_helper.from_array(given[name])) for name in given]
    graph = helper.make_graph(
        [*constants, node] if as_nodes else [node],
        "g",
        [helper.make_tensor_value_info("x", dtype, [3, K])],
        [helper.make_tensor_value_info("y", dtype, [3, N])],
        [] if as_nodes else tensors,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(RUNTIME_DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def product(model: onnx.ModelProto | Path) -> np.ndarray:
    """What ONNX Runtime computes."""
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[session.get_inputs()[0].type]
    return session.run(None, {"x": np.random.default_rng(1).standard_normal((3, K)).astype(kind)})[0]


def with_points(points: str, bits: int, dtype: type) -> dict[str, np.ndarray]:
    given = blocks_of(bits, dtype)
    if points == "packed":
        given["zero_points"] = packed(RANDOM.integers(0, 1 << bits, (N, BLOCKS)).astype(np.uint8), bits)
    elif points != "none":
        given["zero_points"] = RANDOM.uniform(0, 15, N * BLOCKS).astype(points)
    return given


@pytest.mark.parametrize("as_nodes", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("bits", "points", "groups"),
    [(bits, points, 0) for bits in (4, 8) for points in ("none", "packed")]
    # ONNX Runtime has the rest on CPUs for 4 bits only.
    + [(4, points, groups) for points in ("float16", "float32") for groups in (0, K, BLOCKS * BLOCK)]
    + [(4, "none", groups) for groups in (K, BLOCKS * BLOCK)],
)
def test_weights_quantised_in_blocks(bits: int, points: str, groups: int, dtype: type, as_nodes: bool) -> None:
    given = with_points(points, bits, dtype)
    if groups:
        given["g_idx"] = RANDOM.integers(0, BLOCKS, groups).astype(np.int32)
    given["bias"] = RANDOM.standard_normal(N).astype(dtype)
    model = block_product(given, bits, as_nodes=as_nodes)
    fused = product(model)
    standard = standardize(model)
    assert all(not node.domain for node in standard.graph.node)
    tolerance = 1e-5 if dtype == np.float32 else 4e-3
    np.testing.assert_allclose(product(standard), fused, rtol=tolerance, atol=tolerance * float(np.abs(fused).max()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("zero_points", np.zeros((N, 2), np.uint8), "g_idx.* and packed zero points"),
        ("zero_points", np.zeros((N, BLOCKS), np.int32), "zero points of int32"),
        ("g_idx", np.full(K, BLOCKS, np.int32), "one of 3 groups for each of 80 rows"),
        ("g_idx", np.zeros(K - 1, np.int32), "one of 3 groups for each of 80 rows"),
    ],
)
def test_weights_quantised_in_blocks_that_have_no_one_meaning(name: str, value: np.ndarray, message: str) -> None:
    given = blocks_of(4) | {"g_idx": np.zeros(K, np.int32)} | {name: value}
    with pytest.raises(BadModelError, match=message):
        standardize(block_product(given, 4))


@pytest.mark.parametrize("name", ["B", "scales", "zero_points", "g_idx"])
def test_weights_quantised_in_blocks_must_be_constant(name: str) -> None:
    given = with_points("float32", 4, np.float32) | {"g_idx": np.zeros(K, np.int32)}
    model = block_product(given, 4)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    model.graph.initializer.remove(tensor)
    with pytest.raises(BadModelError, match="MatMulNBits needs constant"):
        standardize(model)


@pytest.mark.parametrize("name", ["zero_points", "g_idx"])
def test_external_data_is_that_beside_the_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = with_points("packed" if name == "zero_points" else "none", 4, np.float32)
    if name == "g_idx":
        given["g_idx"] = RANDOM.integers(0, BLOCKS, K).astype(np.int32)
    path = tmp_path / "folder" / "model.onnx"
    path.parent.mkdir()
    onnx.save(block_product(given, 4), path, save_as_external_data=True, location="model.data", size_threshold=0)
    expected = product(path)
    (tmp_path / "model.data").write_bytes(bytes((path.parent / "model.data").stat().st_size))
    monkeypatch.chdir(tmp_path)
    standard = standardize(onnx.load(path, load_external_data=False), path.parent)
    onnx.save(standard, path.with_name("standard.onnx"))
    np.testing.assert_allclose(product(path.with_name("standard.onnx")), expected, rtol=1e-5, atol=1e-5)
    (path.parent / "model.data").unlink()
    with pytest.raises(BadModelError, match=f"'{name}' cannot be read"):
        standardize(onnx.load(path, load_external_data=False), path.parent)


def test_the_permission_to_round_activations_is_taken_back() -> None:
    levels = [block_product(blocks_of(4), 4, accuracy_level=level) for level in (0, 1, 4)]
    assert [forbid_rounded_activations(model) for model in levels] == [0, 0, 1]
    branches = {
        name: helper.make_graph([levels[1].graph.node[0]], name, [], [helper.make_empty_tensor_value_info("y")])
        for name in ("then_branch", "else_branch")
    }
    branches["then_branch"].node[0].attribute.extend([helper.make_attribute("accuracy_level", 4)])
    nested = helper.make_graph([helper.make_node("If", ["condition"], ["y"], **branches)], "g", [], [])
    assert forbid_rounded_activations(helper.make_model(nested)) == 1


def test_an_export_that_lets_activations_be_rounded_is_compared_without(tmp_path: Path) -> None:
    model = small_models.original(small_models.Config())
    head = next(node for node in model.graph.node if "lm_head" in node.input)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "lm_head")
    rows, columns = weight.dims
    codes = RANDOM.integers(0, 16, (columns, -(-rows // 16), 16)).astype(np.uint8)
    scales = np.full(codes.shape[:2], 0.1, np.float32)
    attributes = {"K": rows, "N": columns, "bits": 4, "block_size": 16, "accuracy_level": 4}
    inputs = [head.input[0], "codes", "lm_scales"]
    head.CopyFrom(helper.make_node("MatMulNBits", inputs, list(head.output), domain=RUNTIME_DOMAIN, **attributes))
    for name, values in (("codes", packed(codes, 4)), ("lm_scales", scales)):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    model.graph.initializer.remove(weight)
    model.opset_import.append(helper.make_opsetid(RUNTIME_DOMAIN, 1))
    onnx.save(model, tmp_path / "export.onnx")
    report = lower_file(tmp_path / "export.onnx", tmp_path / "lowered", LowerOptions())
    assert report.verification is not None
    assert report.verification["judged"]
    assert report.verification["rewrite_max_error"] < 1e-4
    (note,) = (note for note in report.notes if "accuracy_level" in note)
    assert note.startswith("1 MatMulNBits")


@pytest.mark.parametrize("opset", [23, 26])
def test_stated_types_that_are_wrong(opset: int) -> None:
    """ONNX Runtime's float16 converter leaves such of weights and results that it does not convert."""
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal((16, 4)).astype(np.float32) for name in ("cos", "sin")}
    feeds = {"x": random.standard_normal((2, 3, 4, 8)).astype(np.float32), "positions": random.integers(0, 16, (2, 4))}
    nodes = [
        helper.make_node("Neg", ["x"], ["turned"]),
        helper.make_node("RotaryEmbedding", ["turned", "cos", "sin", "positions"], ["y"]),
    ]
    kinds = {"x": TensorProto.FLOAT, "positions": TensorProto.INT64}
    inputs = [helper.make_tensor_value_info(name, kind, feeds[name].shape) for name, kind in kinds.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, feeds["x"].shape)
    weights = [numpy_helper.from_array(value, name) for name, value in arrays.items()]
    graph = helper.make_graph(nodes, "g", inputs, [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    expected = ReferenceEvaluator(model).run(None, feeds)[0]
    for name, shape in (("turned", (2, 3, 4, 8)), ("cos", (16, 4))):
        model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape))
    standard = ReferenceEvaluator(standardize(model)).run(None, feeds)[0]
    np.testing.assert_allclose(standard, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", [23, 26])
def test_stated_types_of_what_unknown_ops_make_are_used(opset: int) -> None:
    shape = [2, 3, 4, 8]
    nodes = [
        helper.make_node("Strange", ["x"], ["keys"], domain="other"),
        helper.make_node("Attention", ["x", "keys", "keys"], ["y"]),
    ]
    x, keys, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "keys", "y"))
    graph = helper.make_graph(nodes, "g", [x], [y], value_info=[keys])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("other", 1)]
    model = standardize(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    assert "Attention" not in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("element", [TensorProto.INT4, TensorProto.UINT4])
@pytest.mark.parametrize("with_points", [False, True])
def test_a_table_of_embeddings_in_blocks(element: int, with_points: bool) -> None:
    rng = np.random.default_rng(0)
    low = 0 if element == TensorProto.UINT4 else -8
    codes, points = (rng.integers(low, low + 16, shape) for shape in ((10, 64), (10, 2)))
    scales = rng.standard_normal((10, 2)).astype(np.float32)
    constants = [
        helper.make_tensor("codes", element, codes.shape, codes.reshape(-1).tolist()),
        numpy_helper.from_array(scales, "scales"),
        helper.make_tensor("points", element, points.shape, points.reshape(-1).tolist()),
    ]
    names = ["codes", "ids", "scales", *(["points"] if with_points else [])]
    node = helper.make_node("GatherBlockQuantized", names, ["y"], domain="com.microsoft", block_size=32)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["S"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["S", 64])],
        constants,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    feed = {"ids": np.array([3, 0, 9, 3])}
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)
    shifts = np.repeat(points, 32, axis=1) if with_points else 0
    np.testing.assert_allclose(expected, ((codes - shifts) * np.repeat(scales, 32, axis=1))[feed["ids"]], rtol=1e-6)
    standard = standardize(model)
    assert all(entry.domain == "" for entry in standard.graph.node)
    (found,) = onnxruntime.InferenceSession(standard.SerializeToString()).run(None, feed)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
