"""ONNX Runtime's own operators compute the same in the standard ones."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from mla_trt.passes.standardize import RUNTIME_DOMAIN, standardize


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
