"""MlaOutputProjection's body against its reference, and that against sums by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto
from op_harness import Array, assert_close, decoded_by_hand, e4m3_matrix, reference, run_op

from mla_trt.errors import BadModelError, UsageError
from mla_trt.ops import TensorType, infer_shapes, make_node

OP = "MlaOutputProjection"
# T, H, Dv, C
SIZES = {
    "odd": (5, 3, 4, 7),
    "one of each": (1, 1, 1, 1),
    "more than a block": (3, 3, 50, 130),
    "blocks": (2, 4, 64, 256),
    "no tokens": (0, 3, 4, 7),
    "no heads": (3, 0, 4, 7),
    "no columns": (3, 2, 4, 0),
}
WEIGHTS = ("float", "codes")
TOLERANCE = {np.float32: 1e-5, np.float16: 1e-3, ml_dtypes.bfloat16: 2**-8}


def _inputs(sizes: tuple[int, ...], weights: str, dtype: type = np.float32) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    tokens, heads, width, columns = sizes
    inputs = {"attended": (rng.standard_normal((tokens, heads, width)) / 16).astype(dtype)}
    if weights == "float":
        inputs["w_o"] = rng.standard_normal((heads, width, columns)).astype(dtype)
        return inputs
    inputs["w_o"], inputs["w_o_scale"] = e4m3_matrix(rng, heads, width, columns, row_axes=2)
    return inputs


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_body_equals_reference(sizes: tuple[int, ...], weights: str, dtype: type) -> None:
    inputs = _inputs(sizes, weights, dtype)
    found = run_op(OP, inputs)["hidden"]
    assert found.dtype == (np.float16 if dtype == np.float16 else np.float32)  # the harness widens bfloat16
    assert_close(found, reference(OP, inputs)["hidden"], TOLERANCE[dtype])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("sizes", [SIZES["odd"], SIZES["more than a block"]], ids=["odd", "more than a block"])
def test_reference_is_what_sums_by_hand_give(sizes: tuple[int, ...], weights: str) -> None:
    inputs = _inputs(sizes, weights)
    weight = decoded_by_hand(inputs["w_o"], inputs.get("w_o_scale"), row_axes=2)
    found = reference(OP, inputs)["hidden"]
    for token, heads in enumerate(inputs["attended"].astype(np.float64)):
        for column, value in enumerate(found[token]):
            products = [sum(values * weight[head, :, column]) for head, values in enumerate(heads)]
            np.testing.assert_allclose(value, sum(products), rtol=1e-9, atol=1e-12)


def test_rows_of_zeros_are_zeros() -> None:
    inputs = _inputs(SIZES["more than a block"], "codes")
    inputs["attended"][1] = 0
    found = run_op(OP, inputs)["hidden"]
    assert not found[1].any()
    assert found[0].all()


def test_scales_need_codes() -> None:
    with pytest.raises(UsageError, match="MlaOutputProjection needs the input w_o"):
        make_node(OP, {"attended": "x", "w_o_scale": "s"}, ["hidden"])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("w_o_scale", (3, 2), "w_o_scale has 3 along ceil.H.Dv/128., expected 2"),
        ("w_o_scale", (2, 1), "w_o_scale has 1 along ceil.C/128., expected 2"),
        ("w_o_scale", (3, 1, 2), "w_o_scale has 3 dimensions"),
        ("w_o", (3, 49, 130), "w_o gives Dv = 49, but it is 50"),
        ("w_o", (150, 130), "w_o has 2 dimensions"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    types = {
        "attended": TensorType(TensorProto.BFLOAT16, ("T", 3, 50)),
        "w_o": TensorType(TensorProto.FLOAT8E4M3FN, (3, 50, 130)),
        "w_o_scale": TensorType(TensorProto.FLOAT, (2, 2)),
    }
    node = make_node(OP, {name: name for name in types}, ["hidden"])
    assert infer_shapes(node, list(types.values())) == [TensorType(TensorProto.BFLOAT16, ("T", 130))]
    types[name] = TensorType(types[name].dtype, shape)
    with pytest.raises(BadModelError, match=message):
        infer_shapes(node, list(types.values()))
