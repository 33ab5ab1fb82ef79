"""Masks are recognised by what they show, near the query and far from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mla_trt.errors import NoMlaError
from mla_trt.lowering import LowerOptions, inspect, lower

EXAMPLE = Path(__file__).resolve().parent.parent / "models" / "examples" / "deepseek_v3__dynamo_op20__eager__dec.onnx"


def with_window(window: int) -> onnx.ModelProto:
    """The example with attention to the last `window` keys only."""
    model = onnx.load(EXAMPLE)
    graph = model.graph
    causal = next(node for node in graph.node if node.op_type == "LessOrEqual")
    keys, queries = causal.input
    reader = next(node for node in graph.node if causal.output[0] in node.input)
    graph.initializer.append(numpy_helper.from_array(np.array(window, np.int64), "window"))
    index = list(graph.node).index(reader)
    for offset, node in enumerate(
        (
            helper.make_node("Sub", [queries, "window"], ["oldest"]),
            helper.make_node("Greater", [keys, "oldest"], ["near"]),
            helper.make_node("And", [causal.output[0], "near"], ["windowed"]),
        )
    ):
        graph.node.insert(index + offset, node)
    reader.input[list(reader.input).index(causal.output[0])] = "windowed"
    return model


@pytest.mark.parametrize("window", [1, 4, 7, 100, 4096, 30000])
def test_a_window_of_any_width_is_refused(window: int) -> None:
    report = inspect(with_window(window)).report
    assert not any(layer.matched for layer in report.layers)
    assert "window" in str(report.layers[0].reason)
    with pytest.raises(NoMlaError, match="window"):
        lower(with_window(window), LowerOptions())


def test_a_mask_without_causality_is_refused() -> None:
    model = onnx.load(EXAMPLE)
    causal = next(node for node in model.graph.node if node.op_type == "LessOrEqual")
    causal.op_type = "GreaterOrEqual"
    assert "after its own position" in str(inspect(model).report.layers[0].reason)


def test_a_causal_mask_off_by_one_is_refused() -> None:
    for op in ("Less", "Greater"):
        model = onnx.load(EXAMPLE)
        next(node for node in model.graph.node if node.op_type == "LessOrEqual").op_type = op
        assert not inspect(model).report.layers[0].matched
