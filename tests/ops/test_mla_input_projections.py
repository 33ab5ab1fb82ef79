"""MlaInputProjections' body against its reference, and that against sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto
from op_harness import Array, assert_close, reference, run_op

from mla_trt.errors import BadModelError, UsageError
from mla_trt.ops import OPS, TensorType, infer_shapes, make_node
from mla_trt.ops.input_projections import OUTPUT_OF

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
