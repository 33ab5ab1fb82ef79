"""Attention that few exports write so: masks that hide nothing, padded values, queries that each head scales, other norms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from edited_exports import DENSE, EXPANDED, SPARSE, edit, fix_sizes, lower_and_verify
from model_editor import Editor


def test_a_mask_of_zeros_hides_nothing(tmp_path: Path) -> None:
    editor = edit(DENSE)
    for node in [node for node in editor.graph.node if node.op_type == "Softmax"]:
        node.input[0] = editor.emit("Add", node.input[0], editor.constant(np.zeros((1, 4, 1, 1)), np.float32))
    editor.refresh()
    lower_and_verify(editor, tmp_path)


@pytest.mark.parametrize("name", [DENSE, EXPANDED])
def test_values_padded_to_the_width_of_keys(name: str, tmp_path: Path) -> None:
    editor = edit(name)
    for node in [node for node in editor.graph.node if node.op_type == "Softmax"]:
        (use,) = editor.uses[node.output[0]]
        product = use.node
        assert product.op_type == "MatMul"
        width = 20
        padding = editor.constant([0, 0, 0, 0, 0, 0, 0, 40 - width], np.int64)
        product.input[1] = editor.emit("Pad", product.input[1], padding)
        readers = [(reader.node, reader.index) for reader in editor.uses[product.output[0]]]
        bounds = [editor.constant([value], np.int64) for value in (0, width, 3)]
        sliced = editor.emit("Slice", product.output[0], *bounds)
        for reader, index in readers:
            reader.input[index] = sliced
    editor.refresh()
    lower_and_verify(editor, tmp_path)


@pytest.mark.parametrize("cut_by", ["Slice", "Split"])
@pytest.mark.parametrize("behind", ["product", "transpose"])
def test_values_are_part_of_wider_rows(behind: str, cut_by: str, tmp_path: Path) -> None:
    """Keys and values are one tensor, whose rotated part the probabilities meet as well, and of the result only some columns are wanted."""
    editor = edit(DENSE)
    for node in [node for node in editor.graph.node if node.op_type == "Softmax"]:
        (use,) = editor.uses[node.output[0]]
        product, scores = use.node, product_behind(editor, node.input[0])
        assert product.op_type == "MatMul"
        width = 20
        keys = editor.emit("Transpose", scores.input[1], perm=[0, 1, 3, 2])
        product.input[1] = editor.emit("Concat", product.input[1], keys, axis=-1)
        (reader,) = editor.uses[product.output[0]]
        assert reader.node.op_type == "Transpose"
        cut = product if behind == "product" else reader.node
        readers = [(item.node, item.index) for item in editor.uses[cut.output[0]]]
        if cut_by == "Slice":
            bounds = [editor.constant([value], np.int64) for value in (0, width, -1)]
            part = editor.emit("Slice", cut.output[0], *bounds)
        else:
            sizes = editor.constant([width, 40], np.int64)
            part, _ = editor.emit("Split", cut.output[0], sizes, outputs=2, axis=-1)
        for item, index in readers:
            item.input[index] = part
    editor.refresh()
    lower_and_verify(editor, tmp_path)


def test_softmax_by_the_logarithm_of_its_sum(tmp_path: Path) -> None:
    editor = edit(DENSE)
    for node in [node for node in editor.graph.node if node.op_type == "Softmax"]:
        total = editor.emit("ReduceLogSumExp", node.input[0], editor.constant([-1], np.int64), keepdims=1)
        editor.replace(node, editor.emit("Exp", editor.emit("Sub", node.input[0], total)))
    editor.refresh()
    lower_and_verify(editor, tmp_path)


@pytest.mark.parametrize("by", ["IsInf", "Equal"])
def test_probabilities_without_nan_and_infinity(by: str, tmp_path: Path) -> None:
    """What exporters make of torch.nan_to_num."""
    editor = edit(DENSE)
    zero, largest, least = (editor.constant(value, np.float32) for value in (0, 3.4e38, -3.4e38))
    for node in [node for node in editor.graph.node if node.op_type == "Softmax"]:
        name = node.output[0]
        readers = [(use.node, use.index) for use in editor.uses[name]]
        if by == "IsInf":
            infinite = editor.emit("IsInf", name)
            below, above = (editor.emit("And", editor.emit(op, name, zero), infinite) for op in ("Less", "Greater"))
        else:
            below, above = (
                editor.emit("Equal", name, editor.constant(value, np.float32)) for value in (-np.inf, np.inf)
            )
        safe = editor.emit("Where", editor.emit("IsNaN", name), zero, name)
        safe = editor.emit("Where", below, least, safe)
        safe = editor.emit("Where", above, largest, safe)
        for reader, index in readers:
            reader.input[index] = safe
    editor.refresh()
    lower_and_verify(editor, tmp_path)


# Queries that are scaled by position, each head in its own way.


def scaled_queries(
    editor: Editor, product: onnx.NodeProto, heads: int, rng: np.random.Generator, *, heads_last: bool
) -> None:
    """Multiplies the queries [B, H, S, D] (or [B, S, H, D]) of a product by a[h] log(position + 1) + b[h]."""
    logs = editor.emit(
        "Log", editor.emit("Cast", editor.emit("Add", "position_ids", editor.constant(1, np.int64)), to=1)
    )
    axes = editor.constant([2, 3] if heads_last else [1, 3], np.int64)
    logs = editor.emit("Unsqueeze", logs, axes)  # [B, S, 1, 1] or [B, 1, S, 1]
    shape = (heads, 1) if heads_last else (heads, 1, 1)
    slope, start = (editor.constant(rng.standard_normal(shape), np.float32) for _ in range(2))
    factor = editor.emit("Add", editor.emit("Mul", logs, slope), start)
    product.input[0] = editor.emit("Mul", product.input[0], factor)


def product_behind(editor: Editor, name: str) -> onnx.NodeProto:
    makers = {output: node for node in editor.graph.node for output in node.output}
    node = makers[name]
    while node.op_type != "MatMul":
        node = makers[node.input[0]]
    return node


@pytest.mark.parametrize("name", [DENSE, SPARSE])
def test_each_head_is_scaled_by_position(name: str, tmp_path: Path) -> None:
    editor, rng = edit(name), np.random.default_rng(0)
    for node in list(editor.graph.node):
        if node.op_type == "Softmax":
            scaled_queries(editor, product_behind(editor, node.input[0]), 4, rng, heads_last=False)
        if node.op_type == "Relu":
            scaled_queries(editor, product_behind(editor, node.input[0]), 16, rng, heads_last=True)
    editor.refresh()
    _, lowered = lower_and_verify(editor, tmp_path)
    scaled = {output for node in lowered.graph.node if node.op_type == "Mul" for output in node.output}
    for node in lowered.graph.node:
        if node.op_type in ("MlaAttention", "MlaSparseAttention"):
            assert node.input[0] in scaled


@pytest.mark.parametrize("factors", [[-1.0] * 16, [0.5, -2.0] * 8], ids=["all alike", "by head"])
def test_index_queries_have_factors_below_zero(factors: list[float], tmp_path: Path) -> None:
    editor = edit(SPARSE)
    for node in list(editor.graph.node):
        if node.op_type == "Relu":
            product = product_behind(editor, node.input[0])
            row = editor.constant(np.array(factors)[:, None], np.float32)
            product.input[0] = editor.emit("Mul", product.input[0], row)
    editor.refresh()
    lower_and_verify(editor, tmp_path)


def test_latents_with_a_layer_norm(tmp_path: Path) -> None:
    editor = edit(DENSE)
    makers = {output: node for node in editor.graph.node for output in node.output}
    weighted = [node for node in editor.graph.node if any("kv_a_layernorm" in name for name in node.input)]
    assert len(weighted) == 2
    for node in weighted:
        weight, inner = sorted(node.input, key=lambda name: name in makers)
        latent = next(name for name in makers[inner].input if makers[name].op_type != "Reciprocal")
        bias = editor.constant(np.linspace(-1, 1, 32), np.float32)
        normed = editor.emit("LayerNormalization", latent, weight, bias, axis=-1)
        for use in editor.uses[node.output[0]]:
            use.node.input[use.index] = normed
    editor.refresh()
    report, lowered = lower_and_verify(editor, tmp_path)
    assert "LayerNormalization" in {node.op_type for node in lowered.graph.node}
    assert [layer["kv_lora_rank"] for layer in report["layers"]] == [32, 32]


def test_a_size_is_what_the_only_position_is(tmp_path: Path) -> None:
    """The export takes one token behind 16, so that each is at position 16; and cosines are 16 wide, of which it takes half."""
    editor = edit(DENSE)
    fix_sizes(editor, cached=16)
    for name in ("cos", "sin"):
        (use,) = editor.uses[name]
        assert use.node.op_type == "Slice"
        bounds = [editor.constant([value], np.int64) for value in (2, 3, 0)]
        width = editor.emit("Slice", editor.emit("Shape", name), *bounds)
        use.node.input[2] = editor.emit("Div", width, editor.constant([2], np.int64))
    editor.refresh()
    lower_and_verify(editor, tmp_path)


@pytest.mark.parametrize("batch", [None, 1, 2])
def test_factors_for_a_fixed_number_of_tokens(batch: int | None, tmp_path: Path) -> None:
    """What torch.polar leaves of a modulus of one: ones for each of three tokens, times the cosines."""
    editor = edit(DENSE)
    fix_sizes(editor, cached=9, new=3, batch=batch)
    for name in ("cos", "sin"):
        (use,) = editor.uses[name]
        ones = editor.constant(np.ones((batch or 1, 3, 16)), np.float32)
        use.node.input[0] = editor.emit("Mul", ones, name)
    editor.refresh()
    lower_and_verify(editor, tmp_path)
