"""Every example export behaves as its manifest says, through the command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest

from mla_trt.cli import main
from mla_trt.ops import DOMAIN

CARRIED = Path(__file__).resolve().parent.parent / "models" / "examples"
OTHERS = Path(os.environ.get("MLA_TRT_EXPORTS", Path(__file__).resolve().parents[2] / "shared" / "exports"))


def _records() -> list[Any]:
    found = {record["file"]: (CARRIED, record) for record in json.loads((CARRIED / "manifest.json").read_text())}
    if (OTHERS / "manifest.json").exists():
        for record in json.loads((OTHERS / "manifest.json").read_text()):
            found.setdefault(record["file"], (OTHERS, record))
    return [
        pytest.param(folder / name, record, id=name.removesuffix(".onnx")) for name, (folder, record) in found.items()
    ]


@pytest.mark.parametrize(("path", "record"), _records())
def test_export_is_lowered_as_its_manifest_says(path: Path, record: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "lowered"
    status = main(["lower", str(path), "-o", str(output), "--quiet"])
    if record["expect"] == "refuse" or (record["expect"] == "either" and status):
        assert status == 3
        assert not output.exists()
        return
    assert status == 0
    report = json.loads((output / "report.json").read_text())
    assert report["matched"] == report["attention_cores"] == record["n_mla_layers"]
    for layer in report["layers"]:
        assert layer["matched"]
        assert layer["kind"] == ("mla_sparse" if record["dsa"] else "mla")
        assert layer["num_heads"] == record["heads"]
        assert layer["qk_nope_head_dim"] == record["qk_nope"]
        assert layer["qk_rope_head_dim"] == record["qk_rope"]
        assert layer["v_head_dim"] == record["v_dim"]
        assert layer["kv_lora_rank"] == record["kv_lora"]
        assert layer["q_lora_rank"] == record["q_lora"]
        assert layer["sinks"] == record["sinks"]
        if record["expect"] == "lower":
            assert layer["cache"] == record["cache"]
    verification = report["verification"]
    assert verification["passed"]
    if verification["judged"]:
        half = record["dtype"] in ("float16", "bfloat16")
        assert verification["rewrite_max_error"] <= (1e-3 if half else 1e-4)
    model = onnx.load(output / "model.onnx")
    onnx.checker.check_model(model, full_check=False)
    onnxruntime.InferenceSession(str(output / "model.onnx"))
    assert _attentions(model) == _attentions(onnx.load(path)) - record["n_mla_layers"]


def _attentions(model: onnx.ModelProto) -> int:
    """Softmaxes, among them those of routers, and attentions that have theirs inside."""
    return sum(node.op_type in ("Softmax", "Attention") for node in model.graph.node if node.domain != DOMAIN)


def test_the_repository_carries_a_dozen_examples() -> None:
    assert len(json.loads((CARRIED / "manifest.json").read_text())) >= 12
