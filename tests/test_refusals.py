"""Graphs that look like MLA and are not quite, or that contradict themselves: refused with the reason that is true of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import small_models
from edited_exports import DENSE, EXAMPLES, EXPANDED, SPARSE, edit, fix_sizes
from model_editor import Editor
from onnx import TensorProto, helper, numpy_helper
from small_models import ints

from mla_trt.errors import BadModelError, MlaTrtError, NoMlaError
from mla_trt.lowering import LowerOptions, lower
from mla_trt.passes.einsum import einsum_shape
from mla_trt.passes.merge_equal import merge_equal
from mla_trt.passes.simplify import simplify

LAST = np.iinfo(np.int64).max


def refusal(editor: Editor, error: type[MlaTrtError] = NoMlaError) -> str:
    """Why a model is refused."""
    with pytest.raises(error) as raised:
        lower(editor.finish(), LowerOptions())
    return str(raised.value)


def rolled(editor: Editor, name: str, axis: int) -> str:
    """A tensor with its entries along an axis one on."""
    parts = [
        editor.emit("Slice", name, *(editor.constant([value], np.int64) for value in (start, end, axis)))
        for start, end in ((1, LAST), (0, 1))
    ]
    return editor.emit("Concat", *parts, axis=axis)


def doubled(editor: Editor, name: str, _axis: int) -> str:
    return editor.emit("Mul", name, editor.constant(np.float32(2)))


# -- caches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [rolled, doubled])
@pytest.mark.parametrize(
    ("model", "cache", "axis"),
    [
        (DENSE, "past_0.keys", 3),
        (DENSE, "past_1.values", 3),
        (DENSE, "past_0.keys", 2),
        (SPARSE, "past_0.indexer_keys", 2),
        (EXPANDED, "past_key_values.1.value", 3),
    ],
)
def test_a_cache_that_is_read_otherwise_than_it_is_stored(
    model: str, cache: str, axis: int, change: Callable[[Editor, str, int], str]
) -> None:
    editor = edit(model)
    uses = [use for use in editor.uses[cache] if use.node.op_type != "Shape"]
    changed = change(editor, cache, axis)
    for use in uses:
        editor.rewire(use, changed)
    assert f"the cache '{cache}'" in refusal(editor)


@pytest.mark.parametrize("change", [rolled, doubled])
def test_a_cache_that_is_stored_otherwise_than_it_is_read(change: Callable[[Editor, str, int], str]) -> None:
    editor = edit(DENSE)
    maker = editor.producers["present_0.keys"]
    maker.output[0] = "read"
    editor.refresh()
    for use in list(editor.uses.get("present_0.keys", [])):
        editor.rewire(use, "read")
    changed = change(editor, "read", 3)
    editor.producers[changed].output[0] = "present_0.keys"
    assert "the cache 'past_0.keys'" in refusal(editor)


# -- scores and results --------------------------------------------------------------------------------------------


def test_a_number_added_to_the_keys() -> None:
    editor = edit(DENSE)
    joined = editor.producers["present_0.values"]
    use = next(use for use in editor.uses[joined.input[1]] if use.node is joined)
    editor.rewire(use, editor.emit("Add", use.name, editor.constant(np.float32(0.3))))
    assert "numbers are added" in refusal(editor)


def test_a_result_whose_tokens_and_features_change_places() -> None:
    editor = edit(DENSE)
    product = editor.nodes("Softmax")[0]
    (reader,) = [use.node for use in editor.uses[product.output[0]] if use.node.op_type == "MatMul"]
    (turned,) = [use.node for use in editor.uses[reader.output[0]] if use.node.op_type == "Transpose"]
    turned.attribute[0].ints[:] = [2, 0, 1, 3]
    assert "in a layout that is not understood" in refusal(editor)


def test_probabilities_and_values_in_each_others_place() -> None:
    editor = edit(DENSE)
    product = editor.nodes("Softmax")[0]
    (reader,) = [use.node for use in editor.uses[product.output[0]] if use.node.op_type == "MatMul"]
    reader.input[0], reader.input[1] = reader.input[1], reader.input[0]
    editor.refresh()
    assert refusal(editor)


def as_result(editor: Editor, name: str, shape: list[str]) -> None:
    result = editor.emit("Cast", name, to=TensorProto.FLOAT)
    editor.graph.output.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, shape))


@pytest.mark.parametrize("batch", [None, 2])
def test_a_rotation_that_is_that_of_one_position(batch: int | None) -> None:
    """The export was traced with positions as numbers: its rotation does not follow them."""
    editor = edit(DENSE)
    fix_sizes(editor, cached=6, batch=batch)
    angles = 6 * np.exp2(-np.arange(8.0))
    for name, values in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
        (use,) = editor.uses[name]
        use.node.input[0] = editor.constant(np.tile(values, 2).reshape(1, 1, 16), np.float32)
    editor.refresh()
    assert "of the rotation is that of one position" in refusal(editor)


def test_scores_as_a_result() -> None:
    editor = edit(DENSE)
    as_result(editor, editor.producers[editor.nodes("Softmax")[0].input[0]].input[0], ["b", "h", "s", "t"])
    assert "does not have one row of a fixed size for each token" in refusal(editor)


def test_positions_as_a_result() -> None:
    editor = edit(DENSE)
    as_result(editor, "position_ids", ["b", "s"])
    assert "made from positions or masks alone" in refusal(editor)


# -- other attentions and other layers -----------------------------------------------------------------------------


def other_attention(kv_heads: int, *, fused: bool = False, bias: bool = False, learned: bool = False) -> Editor:
    """One layer of attention with four heads of queries and some of keys and values, without MLA, and with caches.

    Args:
        fused: one projection makes queries, keys and values.
        bias: values have one.
        learned: positions are looked up in a table of embeddings instead of rotating queries and keys.
    """
    heads, hidden = 4, 24
    c, b = small_models.Config(), small_models.Builder()
    size = c.qk_rope_head_dim
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.standard_normal((rows, columns)).astype(np.float32)

    x = b.op("Gather", matrix(c.vocabulary, hidden), "input_ids")
    if learned:
        x = b.op("Add", x, b.op("Gather", matrix(c.positions, hidden), "position_ids"))
    normed = b.op("RMSNormalization", x, np.ones(hidden, np.float32), axis=-1)
    widths = [heads * size, kv_heads * size, kv_heads * size]
    if fused:
        projected = b.split("Split", 3, b.op("MatMul", normed, matrix(hidden, sum(widths))), ints(*widths), axis=2)
    else:
        projected = [b.op("MatMul", normed, matrix(hidden, width)) for width in widths]
    if bias:
        projected[2] = b.op("Add", projected[2], matrix(1, widths[2])[0])
    q, k, v = (b.op("Reshape", value, ints(0, 0, -1, size)) for value in projected)
    if not learned:
        q, k = (small_models.rotate(b, c, value, True) for value in (q, k))
    rows = []
    for name, value in (("key", k), ("value", v)):
        value = b.op("Concat", f"past_{name}", value, output=f"present_{name}", axis=1)
        value = b.op("Unsqueeze", value, ints(3))
        value = b.op("Expand", value, ints(1, 1, 1, heads // kv_heads, 1))
        rows.append(b.op("Reshape", value, ints(0, 0, heads, size)))
    scores = b.op("Einsum", q, rows[0], equation="bshd,bthd->bhst")
    total, new = (b.op("Shape", name, start=1, end=2) for name in ("present_key", "input_ids"))
    zero, one = ints(0).reshape(()), ints(1).reshape(())
    keys = b.op("Range", zero, b.op("Squeeze", total), one)
    queries = b.op("Add", b.op("Range", zero, b.op("Squeeze", new), one), b.op("Sub", total, new))
    visible = b.op("LessOrEqual", keys, b.op("Unsqueeze", queries, ints(1)))
    scores = b.op("Where", visible, scores, np.array(-np.inf, np.float32))
    attended = b.op("Einsum", b.op("Softmax", scores, axis=-1), rows[1], equation="bhst,bthd->bshd")
    x = b.op("Add", x, b.op("MatMul", b.op("Reshape", attended, ints(0, 0, -1)), matrix(heads * size, hidden)))
    b.op("MatMul", x, matrix(hidden, c.vocabulary), output="logits")

    def value_info(name: str, kind: int, *shape: str | int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [value_info(name, TensorProto.INT64, "B", "S") for name in ("input_ids", "position_ids")]
    inputs += [value_info(f"past_{name}", TensorProto.FLOAT, "B", "P", kv_heads, size) for name in ("key", "value")]
    outputs = [value_info("logits", TensorProto.FLOAT, "B", "S", c.vocabulary)]
    outputs += [value_info(f"present_{name}", TensorProto.FLOAT, "B", "T", kv_heads, size) for name in ("key", "value")]
    return Editor(b.model(inputs, outputs, 23), seed=0)


@pytest.mark.parametrize(
    ("editor", "kind"),
    [
        (other_attention(4), "ordinary multi-head attention"),
        (other_attention(2), "grouped-query attention, 2 heads of keys and values for 4 of queries"),
        (other_attention(2, bias=True), "grouped-query attention, 2 heads"),
        (other_attention(4, bias=True, learned=True), "ordinary multi-head attention"),
        (other_attention(1), "multi-query attention"),
        (other_attention(1, fused=True), "multi-query attention"),
    ],
)
def test_other_attentions_are_called_what_they_are(editor: Editor, kind: str) -> None:
    assert kind in refusal(editor)


def test_a_second_input_of_token_ids() -> None:
    editor = edit(DENSE)
    (looked_up,) = [use.node for use in editor.uses["input_ids"] if use.node.op_type == "Gather"]
    shape = [dim.dim_param for dim in editor.graph.input[0].type.tensor_type.shape.dim]
    editor.graph.input.append(helper.make_tensor_value_info("next_ids", TensorProto.INT64, shape))
    following = editor.emit("Gather", looked_up.input[0], "next_ids")
    scale = editor.constant(np.ones(64, np.float32))
    following = editor.emit("LayerNormalization", following, scale, axis=-1)
    product = editor.producers["logits"]
    product.input[0] = editor.emit("Add", product.input[0], following)
    assert "'next_ids' is looked up in a table of embeddings beside 'input_ids'" in refusal(editor)


def test_a_convolution_over_tokens_whose_state_is_kept_nowhere() -> None:
    editor = edit(DENSE)
    product = editor.producers["logits"]
    columns = editor.emit("Transpose", product.input[0], perm=[0, 2, 1])
    kernel = editor.constant(np.ones((64, 1, 4), np.float32))
    mixed = editor.emit("Conv", columns, kernel, group=64, pads=[3, 0], kernel_shape=[4])
    product.input[0] = editor.emit("Transpose", mixed, perm=[0, 2, 1])
    assert "recurrent state is neither an input nor an output" in refusal(editor)


def test_a_convolution_of_each_token_alone_is_no_recurrence() -> None:
    editor = edit(DENSE)
    product = editor.producers["logits"]
    columns = editor.emit("Transpose", product.input[0], perm=[0, 2, 1])
    kernel = editor.constant(np.ones((64, 1, 1), np.float32))
    alone = editor.emit("Conv", columns, kernel, group=64, kernel_shape=[1])
    product.input[0] = editor.emit("Transpose", alone, perm=[0, 2, 1])
    assert lower(editor.finish(), LowerOptions()).report.matched == 2


# -- models that contradict themselves -----------------------------------------------------------------------------


def test_a_split_with_another_number_of_outputs_than_it_says() -> None:
    """onnx's shape inference ends the process over it."""
    editor = edit(DENSE)
    node = editor.nodes("Split")[0]
    del node.input[1:]
    node.attribute.append(helper.make_attribute("num_outputs", len(node.output) - 1))
    assert "(Split) has" in refusal(editor, BadModelError)


def test_nodes_of_an_older_opset_than_the_model_says() -> None:
    editor = edit(DENSE)
    node = editor.nodes("ReduceMean")[0]
    del node.input[1:]
    node.attribute.append(helper.make_attribute("axes", [-1]))
    assert "says a newer opset than its nodes are of" in refusal(editor, BadModelError)


@pytest.mark.parametrize("op", ["Expand", "Tile", "ConstantOfShape"])
def test_an_enormous_tensor_is_not_evaluated(op: str) -> None:
    editor = edit(DENSE)
    sizes = editor.constant([1 << 20, 1 << 14], np.int64)
    if op == "ConstantOfShape":
        wide = editor.emit(op, sizes, value=numpy_helper.from_array(np.array([0.5], np.float32)))
    else:
        wide = editor.emit(op, editor.constant(np.full((1, 1), 0.5, np.float32)), sizes)
    index = editor.constant(0, np.int64)
    one = editor.emit("Gather", editor.emit("Gather", wide, index), index)
    scaled = next(use for use in editor.uses[editor.nodes("Softmax")[0].input[0]])
    editor.rewire(scaled, editor.emit("Mul", scaled.name, one))
    assert "elements of a small case" in refusal(editor)


# -- the graph itself ----------------------------------------------------------------------------------------------


def graph_of(nodes: list[onnx.NodeProto], shapes: dict[str, list[int | str]]) -> gs.Graph:
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [values[name] for name in shapes], [output])
    return gs.import_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 26)]))


def test_ellipses_for_different_numbers_of_axes_become_a_matmul() -> None:
    """As an Einsum, ONNX Runtime does not survive it."""
    node = helper.make_node("Einsum", ["a", "b"], ["y"], equation="...mk,...nk->...mn")
    graph = graph_of([node], {"a": ["T", 64], "b": [8, 80, 64]})
    simplify(graph)
    assert sorted(node.op for node in graph.nodes) == ["MatMul", "Transpose"]


@pytest.mark.parametrize("case", ["columns", "a vector", "the other part is a result"])
def test_columns_of_a_product(case: str) -> None:
    """Only a matrix has columns, and of the product nothing else may be wanted."""
    right = [6] if case == "a vector" else [6, 5]
    nodes = [
        helper.make_node("MatMul", ["a", "b"], ["product"]),
        helper.make_node("Split", ["product", "sizes"], ["wanted", "other"], axis=-1),
        helper.make_node("Neg", ["wanted"], ["result"]),
    ]
    results = ["result", "other"] if case == "the other part is a result" else ["result"]
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "columns",
        [helper.make_tensor_value_info("a", floats, [5, 6]), helper.make_tensor_value_info("b", floats, right)],
        [helper.make_tensor_value_info(name, floats, None) for name in results],
        [numpy_helper.from_array(np.array([2, 3]), "sizes")],
    )
    model = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    given = {name: np.random.default_rng(0).standard_normal(size) for name, size in (("a", [5, 6]), ("b", right))}
    given = {name: values.astype(np.float32) for name, values in given.items()}
    before = onnx.reference.ReferenceEvaluator(model).run(None, given)
    simplified = gs.import_onnx(model)
    simplify(simplified)
    assert ("Slice" in {node.op for node in simplified.nodes}) == (case == "columns")
    after = onnx.reference.ReferenceEvaluator(gs.export_onnx(simplified.toposort())).run(None, given)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_equal_nodes_become_one() -> None:
    nodes = [
        helper.make_node("Mul", ["a", "a"], ["square"]),
        helper.make_node("Mul", ["a", "a"], ["again"]),
        helper.make_node("Sqrt", ["square"], ["left"]),
        helper.make_node("Sqrt", ["again"], ["right"]),
        helper.make_node("Sub", ["left", "right"], ["y"]),
    ]
    graph = graph_of(nodes, {"a": [2, 3]})
    assert merge_equal(graph) == 2
    assert [node.op for node in graph.nodes] == ["Mul", "Sqrt", "Sub"]


@pytest.mark.parametrize(
    ("equation", "shapes", "expected"),
    [
        ("...ij,...jk->...ik", [(2, 5, 3, 4), (4, 6)], (2, 5, 3, 6)),
        ("...ij,...jk->...ik", [(3, 4), (2, 1, 4, 6)], (2, 1, 3, 6)),
        ("bshd->bhsd", [(1, 2, 3, 4)], (1, 3, 2, 4)),
        ("ij,jk", [(3, 4), (4, 5)], (3, 5)),
        ("...ij", [(2, 3, 4)], (2, 3, 4)),
    ],
)
def test_the_shape_of_an_einsum(equation: str, shapes: list[tuple[int, ...]], expected: tuple[int, ...]) -> None:
    assert einsum_shape(equation, shapes) == expected


@pytest.mark.parametrize(
    ("equation", "shapes"), [("ij,jk->ik", [(3, 4), (5, 6)]), ("ij->ik", [(3, 4)]), ("ij,jk->ik", [(3, 4)])]
)
def test_an_einsum_that_does_not_fit(equation: str, shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(BadModelError):
        einsum_shape(equation, shapes)


def test_a_lowered_model_is_not_lowered_again() -> None:
    lowered = lower(onnx.load(EXAMPLES / f"{DENSE}.onnx"), LowerOptions()).model
    with pytest.raises(NoMlaError, match="has been lowered already: give its folder to 'mla-trt run'"):
        lower(lowered, LowerOptions())
