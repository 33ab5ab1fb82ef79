"""Models with recurrent layers beside attention, as Kimi Linear: their states stay inputs, in the sizes and spellings that exporters write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from model_editor import Editor
from onnx import TensorProto, helper

from mla_trt import interface as roles
from mla_trt.engines.engine_onnxruntime import OnnxRuntimeEngine
from mla_trt.errors import NoMlaError, UsageError
from mla_trt.lowering import LowerOptions, lower
from mla_trt.metadata import LoweredMetadata
from mla_trt.pipeline import lower_file
from mla_trt.session import Session

EXAMPLE = Path(__file__).resolve().parent.parent / "models" / "examples" / "deepseek_v3__dynamo_op20__eager__dec.onnx"
WIDTH, WINDOW = 64, 3
OPTIONS = LowerOptions(kv_format="f32", page_size=4)


def model(
    *, kind: int = TensorProto.FLOAT, said: bool = True, sizes: dict[str, int] | None = None, memory: bool = False
) -> onnx.ModelProto:
    """The example with a causal convolution over tokens before its logits.

    Args:
        kind: element type of the states.
        said: their outputs have the sizes of their inputs; TorchScript writes names of its own.
        sizes: of the example's free axes, where they are fixed.
        memory: a second state, to which every step's sums are added.
    """
    editor = Editor(onnx.load(EXAMPLE), seed=0)
    product = editor.producers["logits"]
    columns = editor.emit("Transpose", product.input[0], perm=[0, 2, 1])
    before = editor.emit("Cast", "window", to=TensorProto.FLOAT)
    joined = editor.emit("Concat", before, columns, axis=2)
    last = [editor.constant([value], np.int64) for value in (-WINDOW, np.iinfo(np.int64).max, 2)]
    after = editor.emit("Slice", joined, *last)
    kernel = editor.constant(np.random.default_rng(0).normal(size=(WIDTH, 1, WINDOW + 1)), np.float32)
    mixed = editor.emit("Conv", joined, kernel, group=WIDTH, kernel_shape=[WINDOW + 1])
    states = [("window", after, (WIDTH, WINDOW))]
    if memory:
        sums = editor.emit("ReduceSum", columns, editor.constant([2], np.int64), keepdims=1)
        rows = editor.emit("Add", editor.emit("Cast", "memory", to=TensorProto.FLOAT), sums)
        mixed = editor.emit("Add", mixed, rows)
        states.append(("memory", rows, (WIDTH, 1)))
    product.input[0] = editor.emit("Transpose", mixed, perm=[0, 2, 1])
    for name, result, shape in states:
        editor.emit("Cast", result, outputs=[f"next_{name}"], to=kind)
        editor.graph.input.append(helper.make_tensor_value_info(name, kind, ["s10", *shape]))
        own = ["s10", *shape] if said else ["s10", *(f"{name}_dim_{axis}" for axis in (1, 2))]
        editor.graph.output.append(helper.make_tensor_value_info(f"next_{name}", kind, own))
    made = editor.finish()
    for value in (*made.graph.input, *made.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in (sizes or {}):
                dim.dim_value = sizes[dim.dim_param]
    return made


def lowered(made: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model as `mla-trt lower` writes it: compared with its original before."""
    onnx.save(made, folder / "export.onnx")
    report = lower_file(folder / "export.onnx", folder / "lowered", OPTIONS)
    assert report.verification is not None
    assert report.verification["passed"]
    return onnx.load(folder / "lowered" / "model.onnx")


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_states_of_any_type(kind: int, tmp_path: Path) -> None:
    metadata = LoweredMetadata.of(lowered(model(kind=kind), tmp_path))
    (state,) = (entry for entry in metadata.side_inputs if entry.role == roles.STATE)
    assert (state.dtype, state.output) == (kind, "next_window")


def test_states_whose_next_sizes_are_not_said(tmp_path: Path) -> None:
    metadata = LoweredMetadata.of(lowered(model(said=False, memory=True), tmp_path))
    states = {entry.name: entry.output for entry in metadata.side_inputs if entry.role == roles.STATE}
    assert states == {"window": "next_window", "memory": "next_memory"}
    assert len(metadata.caches) == 2


@pytest.mark.parametrize(
    ("axis", "token_axes", "what"), [("s10", ("1", "S"), "sequence"), ("s70", ("B", "1"), "token")]
)
def test_one_at_a_time(axis: str, token_axes: tuple[str, ...], what: str, tmp_path: Path) -> None:
    made = lowered(model(sizes={axis: 1}), tmp_path)
    assert LoweredMetadata.of(made).token_axes == token_axes
    session = Session(OnnxRuntimeEngine(made, pages=8))
    first, second = session.create(), session.create()
    tokens = {first: [3], second: [4]} if what == "sequence" else {first: [3, 4]}
    with pytest.raises(UsageError, match=f"exported for one {what} at a time"):
        session.step(tokens)
    session.step({first: [3]})
    assert session.length(first) == 1


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"s10": 2}, "exactly 2 sequences"),
        ({"s70": 4}, "exactly 4 new tokens"),
        ({"s10": 1, "s70": 1, "s15": 5, "s53": 6, "s15 + s70": 6}, "exactly 5 cached tokens"),
    ],
)
def test_other_fixed_sizes_are_refused(sizes: dict[str, int], reason: str) -> None:
    with pytest.raises(NoMlaError, match=f"has recurrent layers and was exported for {reason}"):
        lower(model(sizes=sizes), OPTIONS)
