"""What goes in and out beside logits and caches: caches that a prefill gives without taking any, inputs that choose tokens, ids as results, and
inputs and rope tables read in unusual ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from edited_exports import DENSE, EXAMPLES, EXPANDED, SPARSE, edit, lower_and_verify
from model_editor import Editor
from onnx import TensorProto, helper

from mla_trt import interface as roles
from mla_trt.cli import main
from mla_trt.engines.engine_onnxruntime import embedded_vocabulary
from mla_trt.passes.identify_inputs import identify_inputs


def add_input(editor: Editor, name: str, dims: list[str]) -> None:
    editor.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, dims))


def result_projection(editor: Editor) -> onnx.NodeProto:
    """The product that makes the logits."""
    return next(node for node in editor.graph.node if "logits" in node.output)


def without_past(name: str) -> Editor:
    """An export whose caches are empty, so that it gives those of a prompt and takes none."""
    editor = edit(name)
    sequences = editor.emit("Shape", "input_ids", start=0, end=1)
    for value in [value for value in editor.graph.input if value.name.startswith("past_")]:
        rest = editor.constant([dim.dim_value for dim in value.type.tensor_type.shape.dim][1:], np.int64)
        empty = editor.emit("ConstantOfShape", editor.emit("Concat", sequences, rest, axis=0))
        for use in editor.uses[value.name]:
            use.node.input[use.index] = empty
        editor.graph.input.remove(value)
    editor.refresh()
    return editor


@pytest.mark.parametrize("name", [DENSE, SPARSE, EXPANDED])
def test_caches_that_a_prefill_gives_are_no_results(name: str, tmp_path: Path) -> None:
    report, lowered = lower_and_verify(without_past(name), tmp_path)
    assert {layer["cache"] for layer in report["layers"]} == {"none"}
    assert not any("present" in value.name for value in lowered.graph.output)
    assert "logits" in {value.name for value in lowered.graph.output}
    assert any(("present_0" in note or "present.0" in note) and "caches" in note for note in report["notes"])


def test_a_hidden_state_that_a_prefill_gives_stays_a_result(tmp_path: Path) -> None:
    editor = without_past(DENSE)
    hidden = result_projection(editor).input[0]
    editor.graph.node.append(helper.make_node("Identity", [hidden], ["hidden"]))
    editor.graph.output.append(helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "sequence", 64]))
    _, lowered = lower_and_verify(editor, tmp_path)
    assert {"logits", "hidden"} <= {value.name for value in lowered.graph.output}


def test_an_input_that_names_tokens_gives_way_to_all(tmp_path: Path) -> None:
    editor = edit(DENSE)
    add_input(editor, "wanted", ["kept"])
    node = result_projection(editor)
    node.input[0] = editor.emit("Gather", node.input[0], "wanted", axis=1)
    report, lowered = lower_and_verify(editor, tmp_path)
    assert "wanted" not in {value.name for value in lowered.graph.input}
    assert any("'wanted'" in note for note in report["notes"])


def test_an_input_that_counts_the_last_tokens_gives_way_to_all(tmp_path: Path) -> None:
    editor = edit(DENSE)
    add_input(editor, "count", [])
    node = result_projection(editor)
    start = editor.emit("Unsqueeze", editor.emit("Neg", "count"), editor.constant([0], np.int64))
    bounds = [editor.constant([number], np.int64) for number in (np.iinfo(np.int64).max, 1)]
    node.input[0] = editor.emit("Slice", node.input[0], start, *bounds)
    _, lowered = lower_and_verify(editor, tmp_path)
    assert "count" not in {value.name for value in lowered.graph.input}


def test_an_input_that_names_one_token_of_each_sequence_gives_way_to_all(tmp_path: Path) -> None:
    editor = edit(DENSE)
    batch = editor.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    add_input(editor, "last", [batch])
    node = result_projection(editor)
    index = editor.emit("Unsqueeze", "last", editor.constant([1], np.int64))
    node.input[0] = editor.emit("GatherND", node.input[0], index, batch_dims=1)
    del editor.graph.output[0].type.tensor_type.shape.dim[1]
    lower_and_verify(editor, tmp_path)


def test_a_mask_that_finds_the_last_token_of_flat_rows_gives_way_to_all(tmp_path: Path) -> None:
    """As TorchScript exports logits[arange(batch), attention_mask.sum(-1) - 1]."""
    editor = without_past(DENSE)
    one, zero = editor.constant(1, np.int64), editor.constant(0, np.int64)
    hidden = result_projection(editor).input[0]
    batch, length = (editor.emit("Shape", hidden, start=axis, end=axis + 1) for axis in (0, 1))
    sequences = editor.emit("Range", zero, editor.emit("Squeeze", batch), one)
    counted = editor.emit("ReduceSum", "attention_mask", editor.constant([1], np.int64), keepdims=0)
    places = editor.emit("Add", editor.emit("Sub", counted, one), editor.emit("Mul", sequences, length))
    picked = editor.emit("Gather", editor.emit("Flatten", hidden, axis=2), places, axis=0)
    width = editor.constant([64], np.int64)
    row = editor.emit("Reshape", picked, editor.emit("Concat", editor.constant([-1], np.int64), width, axis=0))
    shape = editor.emit("Concat", editor.emit("Shape", places), width, axis=0)
    result_projection(editor).input[0] = editor.emit("Reshape", row, shape)
    del editor.graph.output[0].type.tensor_type.shape.dim[1]
    _, lowered = lower_and_verify(editor, tmp_path)
    assert "attention_mask" not in {value.name for value in lowered.graph.input}


def test_the_likeliest_ids_are_a_result(tmp_path: Path) -> None:
    editor = edit(DENSE)
    last = editor.emit("Gather", "logits", editor.constant(-1, np.int64), axis=1)
    editor.graph.node.append(helper.make_node("ArgMax", [last], ["next"], axis=-1, keepdims=0))
    editor.graph.output.append(helper.make_tensor_value_info("next", TensorProto.INT64, ["batch"]))
    lower_and_verify(editor, tmp_path)


def test_a_rope_table_may_take_its_shape_from_data(tmp_path: Path) -> None:
    editor = edit(DENSE)
    embedded = next(node for node in editor.nodes("Gather") if node.input[1] == "input_ids").output[0]
    sizes = editor.emit("Shape", embedded, start=0, end=2)
    shape = editor.emit("Concat", sizes, editor.constant([-1], np.int64), axis=0)
    for node in editor.nodes("Cos", "Sin"):
        uses = list(editor.uses[node.output[0]])
        shaped = editor.emit("Reshape", node.output[0], shape)
        for use in uses:
            use.node.input[use.index] = shaped
    lower_and_verify(editor, tmp_path)


def test_embeddings_may_be_quantised_in_their_table(tmp_path: Path) -> None:
    editor = edit(DENSE)
    node = next(node for node in editor.nodes("Gather") if node.input[1] == "input_ids")
    table = editor.array(node.input[0])
    assert table is not None
    scale = np.float32(np.abs(table).max() / 127)
    node.input[0] = editor.constant(np.round(table / scale).astype(np.int8))
    uses = list(editor.uses[node.output[0]])
    values = editor.emit("DequantizeLinear", node.output[0], editor.constant(scale))
    for use in uses:
        use.node.input[use.index] = values
    lower_and_verify(editor, tmp_path)


# Names that lowered models have for their inputs and outputs, in the export.


def rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.name == old:
            value.name = new


def renamed(folder: Path, old: str, new: str) -> Path:
    model = onnx.load(EXAMPLES / f"{DENSE}.onnx")
    names = [value.name for value in (*model.graph.input, *model.graph.output)]
    old = next((name for name in names if name.startswith(old)), old)
    rename(model, old, new)
    assert new in [*(value.name for value in (*model.graph.input, *model.graph.output)), *model.graph.node[0].output]
    onnx.save(model, folder / "export.onnx")
    return folder / "export.onnx"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("past", "kv_cache.0"),
        ("attention_mask", "block_table"),
        ("attention_mask", "kv_cache_out.1"),
        ("present", "kv_cache_out.0"),
        ("first node's", "cache_lengths"),
    ],
)
def test_names_of_what_goes_are_free(old: str, new: str, tmp_path: Path) -> None:
    model = onnx.load(EXAMPLES / f"{DENSE}.onnx")
    if old == "first node's":
        old = model.graph.node[0].output[0]
    export = renamed(tmp_path, old, new)
    assert main(["lower", str(export), "-o", str(tmp_path / "lowered"), "--quiet"]) == 0
    lowered = onnx.load(tmp_path / "lowered" / "model.onnx")
    given = {value.name for value in lowered.graph.input}
    assert {"query_offsets", "cache_lengths", "block_table", "kv_cache.0", "kv_cache.1"} <= given
    assert {"kv_cache_out.0", "kv_cache_out.1"} <= {value.name for value in lowered.graph.output}


def test_a_result_with_such_a_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = renamed(tmp_path, "logits", "kv_cache_out.0")
    assert main(["lower", str(export), "-o", str(tmp_path / "lowered"), "--quiet"]) == 3
    assert "the model's 'kv_cache_out.0' has a name that a lowered model has" in capsys.readouterr().err
    assert not (tmp_path / "lowered").exists()


# Fixed numbers of sequences.


@pytest.mark.parametrize("sizes", [(2, 1), (3, 4)], ids=str)
@pytest.mark.parametrize("name", [DENSE, "deepseek_v3__optimum0.1.0_tf4.57.6_op17__sdpa__dec__fp16"])
def test_a_fixed_number_of_sequences(name: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    model = onnx.load(EXAMPLES / f"{name}.onnx")
    (tokens,) = (value for value in model.graph.input if value.name == "input_ids")
    letters = [dim.dim_param for dim in tokens.type.tensor_type.shape.dim]
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in letters:
                dim.dim_value = sizes[letters.index(dim.dim_param)]
    onnx.save(model, tmp_path / "export.onnx")
    assert main(["lower", str(tmp_path / "export.onnx"), "-o", str(tmp_path / "lowered"), "--quiet"]) == 0


def test_token_ids_of_which_only_the_shape_is_read(tmp_path: Path) -> None:
    editor = edit(DENSE)
    (lookup,) = (node for node in editor.graph.node if node.op_type == "Gather" and "input_ids" in node.input)
    (tokens,) = (value for value in editor.graph.input if value.name == "input_ids")
    dims = [dim.dim_param for dim in tokens.type.tensor_type.shape.dim]
    width = editor.constants[lookup.input[0]].dims[1]
    editor.graph.node.remove(lookup)
    editor.graph.input.append(helper.make_tensor_value_info(lookup.output[0], TensorProto.FLOAT, [*dims, width]))
    assert any(node.op_type == "Shape" and node.input[0] == "input_ids" for node in editor.graph.node)
    editor.refresh()
    _, lowered = lower_and_verify(editor, tmp_path)
    assert "input_ids" not in [value.name for value in lowered.graph.input]


def test_a_table_of_embeddings_in_blocks_of_codes(tmp_path: Path) -> None:
    editor = edit(DENSE)
    (lookup,) = (node for node in editor.graph.node if node.op_type == "Gather" and "input_ids" in node.input)
    rows, width = editor.constants[lookup.input[0]].dims
    rng = np.random.default_rng(0)
    codes = helper.make_tensor("codes", TensorProto.INT4, (rows, width), rng.integers(-8, 8, rows * width).tolist())
    editor.graph.initializer.append(codes)
    scales = editor.constant(rng.uniform(0.05, 0.2, (rows, width // 32)), np.float32)
    lookup.input[:] = ["codes", "input_ids", scales]
    lookup.op_type, lookup.domain = "GatherBlockQuantized", "com.microsoft"
    del lookup.attribute[:]
    lookup.attribute.append(helper.make_attribute("block_size", 32))
    editor.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    editor.refresh()
    _, lowered = lower_and_verify(editor, tmp_path)
    assert embedded_vocabulary(lowered, "input_ids") == rows


@pytest.mark.parametrize("product", ["Einsum", "MatMul"])
def test_what_chooses_rotation_matrices_are_positions(product: str) -> None:
    rows = gs.Variable("rows", np.float32)
    graph = gs.Graph(
        inputs=[gs.Variable("ids", np.int64, ["B", "S"]), gs.Variable("at", np.int64, ["B", "S"])],
        outputs=[gs.Variable("turned", np.float32)],
    )
    table = gs.Constant("table", np.zeros((9, 4, 4), np.float32))
    weight = gs.Constant("weight", np.zeros((4, 4), np.float32))
    embedded, matrices = gs.Variable("embedded", np.float32), gs.Variable("matrices", np.float32)
    graph.nodes = [
        gs.Node(
            "Gather",
            "lookup",
            {},
            [gs.Constant("embeddings", np.zeros((7, 4), np.float32)), graph.inputs[0]],
            [embedded],
        ),
        gs.Node("MatMul", "projection", {}, [embedded, weight], [rows]),
        gs.Node("Gather", "choice", {}, [table, graph.inputs[1]], [matrices]),
        gs.Node(product, "rotation", {}, [matrices, rows], graph.outputs),
    ]
    (found,) = (entry for entry in identify_inputs(graph).inputs if entry.name == "at")
    assert (found.role, found.axes) == (roles.POSITIONS, ("B", "S"))
