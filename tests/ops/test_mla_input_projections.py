"""MlaInputProjections' body against its reference, and that against sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper
from op_harness import Array, assert_close, decoded_by_hand, e4m3_matrix, reference, run_op

from mla_trt.errors import BadModelError, UsageError
from mla_trt.ops import OPS, TensorType, infer_shapes, make_node
from mla_trt.ops.input_projections import CODED, OUTPUT_OF

OP = "MlaInputProjections"
INDEXER = ("w_index_query", "w_index_key", "w_index_weights", "index_weights_factor")
PARTS: dict[str, tuple[str, ...]] = {
    "the query of the hidden states": (),
    "latent and rope key, query of the hidden states": ("w_dkv", "w_kr"),
    "the query of its latent": ("w_dq",),
    "the query of its latent with a norm": ("w_dq", "query_norm_weight"),
    "no indexer": ("w_dq", "query_norm_weight", "w_dkv", "w_kr"),
    "no rope key": ("w_dq", "w_dkv"),
    "all": ("w_dq", "query_norm_weight", "w_dkv", "w_kr", *INDEXER),
    "all, no norm, no factor": ("w_dq", "w_dkv", "w_kr", *INDEXER[:-1]),
    "indexer and no latent of the query": ("w_dkv", *INDEXER),
    "index weights alone": ("w_index_weights",),
}
BLOCKS = (3, 130, 140, 3, 50, 129, 2, 5, 30)
"""Sizes of matrices that have more than one block of 128 either way, and the heads' borders are not theirs."""
# T, C, Q, H, M, R, Dr, Hi, Di
SIZES = {
    "odd": (5, 7, 3, 3, 4, 9, 2, 5, 6),
    "one of each": (1, 1, 1, 1, 1, 1, 1, 1, 1),
    "no tokens": (0, 4, 3, 2, 2, 5, 2, 3, 4),
    "no heads": (3, 6, 4, 0, 2, 5, 2, 0, 4),
    "no outputs": (3, 6, 4, 2, 0, 0, 0, 3, 0),
    "no columns": (3, 0, 4, 2, 2, 5, 2, 3, 4),
}


def _inputs(sizes: tuple[int, ...], parts: tuple[str, ...], dtype: type = np.float32) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    letters = dict(zip(("T", "C", "Q", "H", "M", "R", "Dr", "Hi", "Di"), sizes, strict=True))
    if "w_dq" not in parts:
        letters["Q"] = letters["C"]
    return {
        formal.name: rng.standard_normal([letters[word] for word in str(formal.shape).split()]).astype(dtype)
        for formal in OPS[OP].inputs
        if not formal.optional or formal.name in parts
    }


def _coded(inputs: dict[str, Array], weights: tuple[str, ...]) -> dict[str, Array]:
    """The inputs with other weights, which are e4m3."""
    rng = np.random.default_rng(1)
    made = dict(inputs)
    for name in weights:
        made[name], made[f"{name}_scale"] = e4m3_matrix(rng, *inputs[name].shape)
    return made


def _decoded(inputs: dict[str, Array]) -> dict[str, Array]:
    """The inputs with weights in float64 in place of codes and scales."""
    return {
        name: decoded_by_hand(values, inputs.get(f"{name}_scale")) if name in CODED else values
        for name, values in inputs.items()
        if not name.endswith("_scale")
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_body_equals_reference(sizes: tuple[int, ...], parts: tuple[str, ...], dtype: type) -> None:
    inputs = _inputs(sizes, parts, dtype)
    for epsilon in (1e-6, 0.7):
        expected = reference(OP, inputs, epsilon=epsilon)
        assert set(expected) == {"query", *(OUTPUT_OF[part] for part in parts if part in OUTPUT_OF)}
        found = run_op(OP, inputs, list(expected), epsilon=epsilon)
        for name, values in found.items():
            assert values.dtype == (np.float32 if name == "index_weights" else dtype)
            assert_close(values, expected[name], 1e-3 if values.dtype == np.float16 else 1e-5)


@pytest.mark.parametrize("epsilon", [1e-6, 0.7])
def test_reference_is_what_sums_by_hand_give(epsilon: float) -> None:
    inputs = _inputs(SIZES["odd"], PARTS["all"])
    found = reference(OP, inputs, epsilon=epsilon)
    given = {name: values.astype(np.float64) for name, values in inputs.items()}
    epsilon = float(np.float32(epsilon))
    for token, hidden in enumerate(given["hidden"]):
        latent = np.array([sum(hidden * column) for column in given["w_dq"].T])
        latent = latent / (sum(latent**2) / len(latent) + epsilon) ** 0.5 * given["query_norm_weight"]
        for source, weight, output in (
            (latent, "w_uq", "query"),
            (latent, "w_index_query", "index_query"),
        ):
            for head in range(given[weight].shape[1]):
                for i, value in enumerate(found[output][token, head]):
                    np.testing.assert_allclose(value, sum(source * given[weight][:, head, i]))
        for weight, output in (("w_dkv", "latent"), ("w_kr", "rope_key"), ("w_index_key", "index_key")):
            for i, value in enumerate(found[output][token]):
                np.testing.assert_allclose(value, sum(hidden * given[weight][:, i]))
        for head, value in enumerate(found["index_weights"][token]):
            product = sum(hidden * given["w_index_weights"][:, head])
            np.testing.assert_allclose(value, product * given["index_weights_factor"][head])


CODES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "blocks": (BLOCKS, CODED),
    "some": (BLOCKS, ("w_dq", "w_kr", "w_index_query")),
    "the others": (BLOCKS, ("w_uq", "w_dkv", "w_index_key")),
    **{name: (sizes, CODED) for name, sizes in SIZES.items()},
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("sizes", "weights"), CODES.values(), ids=CODES.keys())
def test_weights_may_be_codes(sizes: tuple[int, ...], weights: tuple[str, ...], dtype: type) -> None:
    inputs = _coded(_inputs(sizes, PARTS["all"], dtype), weights)
    inputs["hidden"] = (inputs["hidden"] / 256).astype(dtype)  # float16 has no more than products of codes alone
    expected, by_hand = reference(OP, inputs), reference(OP, _decoded(inputs))
    found = run_op(OP, inputs)
    for name, values in expected.items():
        np.testing.assert_allclose(values, by_hand[name], rtol=1e-12, atol=1e-12, err_msg=name)
        assert found[name].dtype == (np.float32 if name == "index_weights" else dtype)
        assert_close(found[name], values, 1e-3 if found[name].dtype == np.float16 else 1e-5)


def test_queries_of_the_hidden_states_may_have_codes() -> None:
    inputs = _coded(_inputs(BLOCKS, ()), ("w_uq",))
    expected = reference(OP, inputs)["query"]
    np.testing.assert_allclose(expected, reference(OP, _decoded(inputs))["query"], rtol=1e-12, atol=1e-12)
    assert_close(run_op(OP, inputs, ["query"])["query"], expected)


def test_what_an_absent_part_leaves_is_as_it_is_with_it() -> None:
    whole = _inputs(SIZES["odd"], PARTS["all"])
    expected = reference(OP, whole)
    for name, output in OUTPUT_OF.items():
        left = {other: values for other, values in whole.items() if other != name}
        if name == "w_index_weights":
            del left["index_weights_factor"]
        found = reference(OP, left)
        assert set(found) == set(expected) - {output}
        for other, values in found.items():
            np.testing.assert_array_equal(values, expected[other])


def test_rows_of_zeros_are_zeros() -> None:
    inputs = _inputs(SIZES["odd"], PARTS["all"])
    inputs["hidden"][2] = 0
    for name, values in run_op(OP, inputs).items():
        assert not values[2].any(), name
        assert values[1].all(), name


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("w_dkv", "query_norm_weight"), "the input query_norm_weight needs w_dq"),
        (("w_dq", "index_weights_factor"), "the input index_weights_factor needs w_index_weights"),
        *(((f"{name}_scale",), f"the input {name}_scale needs {name}") for name in CODED if name != "w_uq"),
    ],
)
def test_inputs_that_say_nothing_without_others_are_refused(parts: tuple[str, ...], message: str) -> None:
    given = {name: name for name in ("hidden", "w_uq", *parts)}
    with pytest.raises(UsageError, match=message):
        make_node(OP, given, ["query"])


def test_queries_of_the_hidden_states_have_their_width() -> None:
    node = make_node(OP, {"hidden": "hidden", "w_uq": "w_uq"}, ["query"])
    hidden, fits, narrow = (TensorType(TensorProto.FLOAT, shape) for shape in ((3, 8), (8, 2, 4), (6, 2, 4)))
    kinds = {"hidden": hidden, "w_uq": fits}
    assert infer_shapes(node, [kinds.get(name) for name in node.input])[0].shape == (3, 2, 4)
    kinds["w_uq"] = narrow
    with pytest.raises(BadModelError, match="w_uq gives Q = 6, but it is 8"):
        infer_shapes(node, [kinds.get(name) for name in node.input])


def _types(inputs: dict[str, Array]) -> dict[str, TensorType]:
    return {name: TensorType(helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for name, a in inputs.items()}


@pytest.mark.parametrize("name", CODED)
def test_codes_have_scales_and_other_weights_none(name: str) -> None:
    types = _types(_coded(_inputs(BLOCKS, PARTS["all"]), CODED))
    node = make_node(OP, {name: name for name in types}, ["query"])
    floats = {**types, name: TensorType(TensorProto.FLOAT, types[name].shape)}
    with pytest.raises(BadModelError, match=f"{name} has scales, so it must be e4m3"):
        infer_shapes(node, [floats.get(name) for name in node.input])
    del types[f"{name}_scale"]
    node = make_node(OP, {name: name for name in types}, ["query"])
    with pytest.raises(BadModelError, match=f"{name} is e4m3, so it needs {name}_scale"):
        infer_shapes(node, [types.get(name) for name in node.input])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", CODED)
def test_scales_are_of_blocks_of_the_whole_matrix(name: str, axis: int) -> None:
    types = _types(_coded(_inputs(BLOCKS, PARTS["all"]), CODED))
    node = make_node(OP, {name: name for name in types}, ["query"])
    assert infer_shapes(node, [types.get(name) for name in node.input])[0].shape == (3, 3, 50)
    scale = types[f"{name}_scale"]
    shape = [size + (place == axis) for place, size in enumerate(scale.shape)]
    types[f"{name}_scale"] = TensorType(scale.dtype, tuple(shape))
    with pytest.raises(BadModelError, match=f"{name}_scale has {shape[axis]} along ceil.*, expected {shape[axis] - 1}"):
        infer_shapes(node, [types.get(name) for name in node.input])


@pytest.mark.parametrize("name", ["hidden", "w_index_weights", "query_norm_weight"])
def test_other_inputs_are_no_codes(name: str) -> None:
    types = _types(_inputs(SIZES["odd"], PARTS["all"]))
    types[name] = TensorType(TensorProto.FLOAT8E4M3FN, types[name].shape)
    node = make_node(OP, {name: name for name in types}, ["query"])
    with pytest.raises(BadModelError, match=f"{name} is FLOAT8E4M3FN"):
        infer_shapes(node, [types.get(name) for name in node.input])
