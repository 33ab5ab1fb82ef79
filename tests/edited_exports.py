"""Changed examples of exports, lowered and verified by the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
from model_editor import Editor

from mla_trt.cli import main

EXAMPLES = Path(__file__).resolve().parent.parent / "models" / "examples"
DENSE = "deepseek_v3__dynamo_op20__eager__dec"
SPARSE = "deepseek_v32__dynamo_op20__eager__dec"
EXPANDED = "hub_deepseek_v2_orig__dynamo_op20__eager__dec"


def edit(name: str) -> Editor:
    return Editor(onnx.load(EXAMPLES / f"{name}.onnx"), seed=0)


def fix_sizes(editor: Editor, *, cached: int, new: int = 1, batch: int | None = None) -> None:
    """Makes of DENSE an export that takes `new` tokens behind `cached` ones, of any number of sequences or of so many."""
    for value in editor.graph.input:
        sizes = {1: new} if value.name in ("input_ids", "position_ids") else {1: cached + new}
        if value.name.startswith("past"):
            sizes = {2: cached}
        if batch is not None:
            sizes[0] = batch
        for axis, size in sizes.items():
            value.type.tensor_type.shape.dim[axis].dim_value = size
    for value in editor.graph.output:
        value.type.tensor_type.ClearField("shape")


def lower_and_verify(editor: Editor, folder: Path) -> tuple[dict[str, Any], onnx.ModelProto]:
    """The report and the lowered model of an edited export, verified by the command."""
    onnx.save(editor.finish(), folder / "export.onnx")
    assert main(["lower", str(folder / "export.onnx"), "-o", str(folder / "lowered"), "--quiet"]) == 0
    report = json.loads((folder / "lowered" / "report.json").read_text())
    assert report["matched"] == report["attention_cores"] == 2
    assert report["verification"]["passed"]
    assert report["verification"]["rewrite_max_error"] <= 1e-4
    return report, onnx.load(folder / "lowered" / "model.onnx")
