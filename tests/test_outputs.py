"""What goes in and out beside logits and caches: caches that a prefill gives without taking any, inputs that choose tokens, ids as results, and
inputs and rope tables read in unusual ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from model_editor import Editor
from onnx import TensorProto, helper

from mla_trt.cli import main

EXAMPLES = Path(__file__).resolve().parent.parent / "models" / "examples"
DENSE = "deepseek_v3__dynamo_op20__eager__dec"
SPARSE = "deepseek_v32__dynamo_op20__eager__dec"
EXPANDED = "hub_deepseek_v2_orig__dynamo_op20__eager__dec"


def edit(name: str) -> Editor:
    return Editor(onnx.load(EXAMPLES / f"{name}.onnx"), seed=0)


def lower_and_verify(editor: Editor, folder: Path) -> tuple[dict[str, Any], onnx.ModelProto]:
    """The report and the lowered model of an edited export, verified by the command."""
    onnx.save(editor.finish(), folder / "export.onnx")
    assert main(["lower", str(folder / "export.onnx"), "-o", str(folder / "lowered"), "--quiet"]) == 0
    report = json.loads((folder / "lowered" / "report.json").read_text())
    assert report["matched"] == report["attention_cores"] == 2
    assert report["verification"]["passed"]
    assert report["verification"]["rewrite_max_error"] <= 1e-4
    return report, onnx.load(folder / "lowered" / "model.onnx")


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
