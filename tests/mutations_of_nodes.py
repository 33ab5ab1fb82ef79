"""Changes that keep the meaning: a node, or a few, in other words."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx.version_converter
from model_editor import FLOATS, Editor
from mutation_kinds import is_ranked_float, keeps
from onnx import TensorProto, helper

INT64_MAX = np.iinfo(np.int64).max


def _shapes_known(editor: Editor, node: onnx.NodeProto) -> bool:
    return all(editor.facts(name).rank >= 0 for name in (*node.input, *node.output) if name)


def _axis(node: onnx.NodeProto, default: int = 0) -> int:
    return next((item.i for item in node.attribute if item.name == "axis"), default)


def _attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


@keeps
def swap_commutative(editor: Editor) -> bool:
    nodes = [node for node in editor.nodes("Add", "Mul", "And", "Or", "Equal", "Max", "Min") if len(node.input) == 2]
    for node in editor.shuffled(nodes)[:8]:
        node.input[0], node.input[1] = node.input[1], node.input[0]
    editor.refresh()
    return bool(nodes)


@keeps
def reassociate(editor: Editor) -> bool:
    """(a + b) + c as a + (b + c), and so for products."""
    for node in editor.shuffled(editor.nodes("Add", "Mul")):
        inner = editor.producers.get(node.input[0])
        if inner is not None and inner.op_type == node.op_type and editor.facts(node.output[0]).element in FLOATS:
            right = editor.emit(node.op_type, inner.input[1], node.input[1])
            editor.replace(node, editor.emit(node.op_type, inner.input[0], right))
            return True
    return False


@keeps
def sum_in_one(editor: Editor) -> bool:
    """Two additions as a Sum."""
    for node in editor.shuffled(editor.nodes("Add")):
        if editor.facts(node.output[0]).element not in FLOATS:
            continue
        inner = editor.producers.get(node.input[0])
        terms = list(inner.input) if inner is not None and inner.op_type == "Add" else [node.input[0]]
        editor.replace(node, editor.emit("Sum", *terms, node.input[1]))
        return True
    return False


@keeps
def subtract_by_negation(editor: Editor) -> bool:
    node = editor.chosen(node for node in editor.nodes("Sub") if editor.facts(node.output[0]).element in FLOATS)
    if node is None:
        return False
    minus = (
        editor.emit("Neg", node.input[1])
        if editor.random.random() < 0.5
        else editor.emit("Mul", node.input[1], editor.like(node.output[0], -1))
    )
    editor.replace(node, editor.emit("Add", node.input[0], minus))
    return True


@keeps
def negate_by_arithmetic(editor: Editor) -> bool:
    node = editor.chosen(node for node in editor.nodes("Neg") if editor.facts(node.output[0]).element in FLOATS)
    if node is None:
        return False
    kind = editor.random.randrange(3)
    if kind == 0:
        new = editor.emit("Mul", node.input[0], editor.like(node.output[0], -1))
    elif kind == 1:
        new = editor.emit("Sub", editor.like(node.output[0], 0), node.input[0])
    else:
        new = editor.emit("Div", node.input[0], editor.like(node.output[0], [-1]))
    editor.replace(node, new)
    return True


@keeps
def divide_by_product(editor: Editor) -> bool:
    """x / y as x * (1 / y), and x * c as x / (1 / c)."""
    for node in editor.shuffled(editor.nodes("Div", "Mul")):
        if editor.facts(node.output[0]).element not in FLOATS:
            continue
        value = editor.array(node.input[1])
        if value is not None and value.size == 1 and 1e-3 < abs(value.reshape(-1)[0]) < 1e3:
            other = "Mul" if node.op_type == "Div" else "Div"
            editor.replace(node, editor.emit(other, node.input[0], editor.like(node.output[0], 1 / value)))
            return True
        if node.op_type == "Div" and value is None:
            editor.replace(node, editor.emit("Mul", node.input[0], editor.emit("Reciprocal", node.input[1])))
            return True
    return False


def _scales(editor: Editor) -> list[tuple[onnx.NodeProto, int, float]]:
    """Products with one positive number: the node, its other input and the number."""
    found = []
    for node in editor.nodes("Mul"):
        for index in (0, 1):
            value = editor.array(node.input[index])
            if (
                value is not None
                and value.size == 1
                and value.dtype.kind == "f"
                and 1e-3 < value.reshape(-1)[0] < 1e3
                and not editor.is_constant(node.input[1 - index])
                and editor.facts(node.output[0]).element in FLOATS
                and editor.facts(node.output[0]).rank == editor.facts(node.input[1 - index]).rank
            ):
                found.append((node, 1 - index, float(value.reshape(-1)[0])))
    return found


@keeps
def split_scale(editor: Editor) -> bool:
    """x * c as (x * sqrt c) * sqrt c."""
    found = editor.chosen(_scales(editor))
    if found is None:
        return False
    node, data, factor = found
    root = editor.like(node.output[0], np.sqrt(factor))
    editor.replace(node, editor.emit("Mul", editor.emit("Mul", node.input[data], root), root))
    return True


@keeps
def scale_before_product(editor: Editor) -> bool:
    """(a b) * c as (a * c) b, a (b * c) or (a * sqrt c)(b * sqrt c)."""
    for node, data, factor in editor.shuffled(_scales(editor)):
        product = editor.producers.get(node.input[data])
        if product is None or product.op_type != "MatMul":
            continue
        left, right = product.input
        kind = editor.random.randrange(3)
        if kind != 1:
            left = editor.emit("Mul", left, editor.like(node.output[0], factor if kind == 0 else np.sqrt(factor)))
        if kind != 0:
            right = editor.emit("Mul", right, editor.like(node.output[0], factor if kind == 1 else np.sqrt(factor)))
        editor.replace(node, editor.emit("MatMul", left, right))
        return True
    return False


@keeps
def scale_after_product(editor: Editor) -> bool:
    """(a * c) b as (a b) * c."""
    for node in editor.shuffled(editor.nodes("MatMul")):
        for index in (0, 1):
            maker = editor.producers.get(node.input[index])
            found = next((item for item in _scales(editor) if item[0] is maker), None) if maker is not None else None
            if found is None:
                continue
            operands = list(node.input)
            operands[index] = found[0].input[found[1]]
            factor = editor.like(node.output[0], found[2])
            editor.replace(node, editor.emit("Mul", editor.emit("MatMul", *operands), factor))
            return True
    return False


@keeps
def matmul_as_einsum(editor: Editor) -> bool:
    nodes = [node for node in editor.nodes("MatMul") if _shapes_known(editor, node) and _is_matrix(editor, node)]
    for node in editor.shuffled(nodes)[: editor.random.randrange(1, 4)]:
        ranks = [editor.facts(name).rank for name in node.input]
        if ranks[0] == ranks[1] and editor.random.random() < 0.5:
            equation = "...ij,...jk->...ik"
        elif any(_broadcasts(editor, node)):
            continue  # letters do not broadcast, and ellipses stand for equally many axes
        else:
            letters = "abcdefgh"
            batch = letters[: max(ranks) - 2]
            equation = f"{batch[len(batch) - ranks[0] + 2 :]}ij,{batch[len(batch) - ranks[1] + 2 :]}jk->{batch}ik"
        editor.replace(node, editor.emit("Einsum", *node.input, equation=equation))
    return bool(nodes)


def _is_matrix(editor: Editor, node: onnx.NodeProto) -> bool:
    return all(editor.facts(name).rank >= 2 for name in node.input) and editor.facts(node.output[0]).element in FLOATS


def _broadcasts(editor: Editor, node: onnx.NodeProto) -> list[bool]:
    """Of each batch axis that both operands have, whether one of them has size 1 there."""
    left, right = (editor.facts(name).shape or () for name in node.input)
    return [(a == 1) != (b == 1) for a, b in zip(left[:-2][::-1], right[:-2][::-1], strict=False)]


@keeps
def matmul_transposed(editor: Editor) -> bool:
    """a b as (b' a')'."""
    node = editor.chosen(node for node in editor.nodes("MatMul") if _is_matrix(editor, node))
    if node is None:
        return False

    def turned(name: str, rank: int) -> str:
        return editor.emit("Transpose", name, perm=[*range(rank - 2), rank - 1, rank - 2])

    ranks = [editor.facts(name).rank for name in node.input]
    right, left = turned(node.input[1], ranks[1]), turned(node.input[0], ranks[0])
    editor.replace(node, turned(editor.emit("MatMul", right, left), max(ranks)))
    return True


@keeps
def matmul_as_gemm(editor: Editor) -> bool:
    """A projection as Gemm over all tokens, perhaps with a turned weight."""
    for node in editor.shuffled(editor.nodes("MatMul")):
        weight, facts = editor.array(node.input[1]), editor.facts(node.input[0])
        if weight is None or weight.ndim != 2 or facts.rank < 2 or facts.element not in FLOATS:
            continue
        flat = editor.emit("Reshape", node.input[0], editor.constant([-1, weight.shape[0]], np.int64))
        if editor.random.random() < 0.5:
            product = editor.emit("Gemm", flat, editor.constant(weight.T), transB=1)
        else:
            product = editor.emit("Gemm", flat, node.input[1])
        shape = editor.constant([*([0] * (facts.rank - 1)), weight.shape[1]], np.int64)
        if facts.rank == 2:
            editor.replace(node, editor.emit("Reshape", product, editor.constant([-1, weight.shape[1]], np.int64)))
            return True
        lead = editor.emit(
            "Slice",
            editor.emit("Shape", node.input[0]),
            editor.constant([0], np.int64),
            editor.constant([-1], np.int64),
        )
        shape = editor.emit("Concat", lead, editor.constant([weight.shape[1]], np.int64), axis=0)
        editor.replace(node, editor.emit("Reshape", product, shape))
        return True
    return False


@keeps
def matmul_by_hand(editor: Editor) -> bool:
    """a b as a sum of products of a small pair."""
    if editor.opset < 13:
        return False
    for node in editor.shuffled(editor.nodes("MatMul")):
        ranks = [editor.facts(name).rank for name in node.input]
        if not _is_matrix(editor, node) or any(editor.is_constant(name) for name in node.input):
            continue
        left = editor.emit("Unsqueeze", node.input[0], editor.constant([ranks[0]], np.int64))
        right = editor.emit("Unsqueeze", node.input[1], editor.constant([-3], np.int64))
        total = editor.emit("Mul", left, right)
        editor.replace(node, editor.emit("ReduceSum", total, editor.constant([-2], np.int64), keepdims=0))
        return True
    return False


@keeps
def weight_turned(editor: Editor) -> bool:
    """A weight as the transpose of a constant."""
    return _reweigh(editor, lambda values: editor.emit("Transpose", editor.constant(values.T.copy()), perm=[1, 0]))


@keeps
def weight_in_two(editor: Editor) -> bool:
    """A weight as a Concat of two constants."""

    def build(values: np.ndarray) -> str:
        axis = editor.random.randrange(2)
        at = editor.random.randrange(1, values.shape[axis])
        parts = np.split(values, [at], axis=axis)
        return editor.emit("Concat", *(editor.constant(part) for part in parts), axis=axis)

    return _reweigh(editor, build)


@keeps
def weight_in_half(editor: Editor) -> bool:
    """A weight that is stored in half precision, where that is exact, or else in doubles."""

    def build(values: np.ndarray) -> str:
        exact = np.array_equal(values.astype(np.float16).astype(values.dtype), values)
        stored = values.astype(np.float16 if exact else np.float64)
        return editor.emit("Cast", editor.constant(stored), to=helper.np_dtype_to_tensor_dtype(values.dtype))

    return _reweigh(editor, build)


@keeps
def weight_quantised(editor: Editor) -> bool:
    """A weight through int8. It becomes another, but stays a weight: the mutated model is the original then."""
    if editor.opset < 13:
        return False

    def build(values: np.ndarray) -> str:
        scales = (np.abs(values).max(axis=0) / 127 + 1e-9).astype(values.dtype)
        codes = np.clip(np.round(values / scales), -127, 127).astype(np.int8)
        if values.dtype != np.float32 and editor.opset < 19:
            return editor.constant(values)
        zero = editor.constant(np.zeros(scales.shape, np.int8))
        return editor.emit("DequantizeLinear", editor.constant(codes), editor.constant(scales), zero, axis=1)

    return _reweigh(editor, build)


def _reweigh(editor: Editor, build: Callable[[np.ndarray], str]) -> bool:
    for node in editor.shuffled(editor.nodes("MatMul")):
        values = editor.array(node.input[1])
        if values is not None and values.ndim == 2 and values.dtype.kind == "f" and min(values.shape) > 1:
            editor.rewire(
                next(use for use in editor.uses[node.input[1]] if use.node is node and use.index == 1), build(values)
            )
            return True
    return False


@keeps
def softmax_by_hand(editor: Editor) -> bool:
    if editor.opset < 18:
        return False
    for node in editor.shuffled(editor.nodes("Softmax")):
        axis = editor.constant([_axis(node, -1)], np.int64)
        data = node.input[0]
        if editor.facts(data).element not in FLOATS:
            continue
        kind = editor.random.randrange(3)
        if kind == 2:
            editor.replace(node, editor.emit("Exp", editor.emit("LogSoftmax", data, axis=_axis(node, -1))))
            return True
        largest = editor.emit("ReduceMax", data, axis, keepdims=1)
        powers = editor.emit("Exp", editor.emit("Sub", data, largest))
        total = editor.emit("ReduceSum", powers, axis, keepdims=1)
        if kind == 0:
            editor.replace(node, editor.emit("Div", powers, total))
        else:
            editor.replace(node, editor.emit("Mul", powers, editor.emit("Reciprocal", total)))
        return True
    return False


@keeps
def norm_by_hand(editor: Editor) -> bool:
    """An RMSNormalization in one of its spellings, or an unfused norm's parts in others."""
    if editor.opset < 18:
        return False
    options = [
        (node, rewrite)
        for op, rewrite in (
            ("RMSNormalization", _spell_norm),
            ("Pow", _spell_square),
            ("ReduceMean", _spell_mean),
            ("Sqrt", _spell_root),
            ("Reciprocal", _spell_inverse),
        )
        for node in editor.nodes(op)
        if editor.facts(node.output[0]).element in FLOATS
    ]
    return any(rewrite(editor, node) for node, rewrite in editor.shuffled(options)[:8])


def _spell_norm(editor: Editor, node: onnx.NodeProto) -> bool:
    source, weight = node.input
    epsilon = float(_attributes(node).get("epsilon", 1e-5))  # type: ignore[arg-type]
    width = (editor.facts(source).shape or (None,))[-1]
    if width is None or _axis(node, -1) not in (-1, editor.facts(source).rank - 1):
        return False
    axis = editor.constant([-1], np.int64)
    square = [
        lambda: editor.emit("ReduceMean", editor.emit("Mul", source, source), axis),
        lambda: editor.emit("ReduceMean", editor.emit("Pow", source, editor.constant(2.0, np.float32)), axis),
        lambda: editor.emit("Div", editor.emit("ReduceSumSquare", source, axis), editor.like(source, width)),
        lambda: editor.emit(
            "Mul",
            editor.emit("Pow", editor.emit("ReduceL2", source, axis), editor.like(source, 2)),
            editor.like(source, 1 / width),
        ),
    ]
    total = editor.emit("Add", editor.random.choice(square)(), editor.like(source, epsilon))
    ways = [
        lambda: editor.emit("Div", source, editor.emit("Sqrt", total)),
        lambda: editor.emit("Mul", source, editor.emit("Reciprocal", editor.emit("Sqrt", total))),
        lambda: editor.emit("Mul", editor.emit("Pow", total, editor.like(source, -0.5)), source),
        lambda: editor.emit("Mul", source, editor.emit("Sqrt", editor.emit("Reciprocal", total))),
    ]
    editor.replace(node, editor.emit("Mul", weight, editor.random.choice(ways)()))
    return True


def _spell_square(editor: Editor, node: onnx.NodeProto) -> bool:
    exponent = editor.array(node.input[1])
    if exponent is None or exponent.size != 1 or exponent.reshape(-1)[0] != 2:
        return False
    editor.replace(node, editor.emit("Mul", node.input[0], node.input[0]))
    return True


def _spell_mean(editor: Editor, node: onnx.NodeProto) -> bool:
    width = (editor.facts(node.input[0]).shape or (None,))[-1]
    axes = editor.array(node.input[1]) if len(node.input) > 1 else None
    keepdims = int(_attributes(node).get("keepdims", 1))  # type: ignore[call-overload]
    if axes is None or width is None or axes.tolist() not in ([-1], [editor.facts(node.input[0]).rank - 1]):
        return False
    square = editor.producers.get(node.input[0])
    total = editor.emit("ReduceSum", node.input[0], node.input[1], keepdims=keepdims)
    if square is not None and square.op_type == "Pow" and editor.random.random() < 0.5:
        total = editor.emit("ReduceSumSquare", square.input[0], node.input[1], keepdims=keepdims)
    editor.replace(node, editor.emit("Div", total, editor.like(node.output[0], width)))
    return True


def _spell_root(editor: Editor, node: onnx.NodeProto) -> bool:
    editor.replace(node, editor.emit("Pow", node.input[0], editor.like(node.output[0], 0.5)))
    return True


def _spell_inverse(editor: Editor, node: onnx.NodeProto) -> bool:
    kind = editor.random.randrange(2)
    if kind == 0:
        editor.replace(node, editor.emit("Div", editor.like(node.output[0], 1), node.input[0]))
    else:
        editor.replace(node, editor.emit("Pow", node.input[0], editor.like(node.output[0], -1)))
    return True


def _split_sizes(editor: Editor, node: onnx.NodeProto) -> list[int] | None:
    sizes = editor.array(node.input[1]) if len(node.input) > 1 and node.input[1] else None
    if sizes is not None:
        return [int(size) for size in sizes]
    shape = editor.facts(node.input[0]).shape
    width = shape[_axis(node)] if shape else None
    return None if width is None or width % len(node.output) else [width // len(node.output)] * len(node.output)


@keeps
def split_by_parts(editor: Editor) -> bool:
    """A Split as Slices or Gathers."""
    if editor.opset < 13:
        return False
    for node in editor.shuffled(editor.nodes("Split")):
        sizes = _split_sizes(editor, node)
        if sizes is None or len(sizes) != len(node.output):
            continue
        ends = np.cumsum(sizes)
        parts = []
        gathers = editor.random.random() < 0.5
        for size, end in zip(sizes, ends, strict=True):
            if gathers:
                rows = editor.constant(np.arange(end - size, end), np.int64)
                parts.append(editor.emit("Gather", node.input[0], rows, axis=_axis(node)))
            else:
                bounds = [editor.constant([value], np.int64) for value in (end - size, end, _axis(node))]
                parts.append(editor.emit("Slice", node.input[0], *bounds))
        editor.replace(node, *parts)
        return True
    return False


@keeps
def split_as_sequence(editor: Editor) -> bool:
    return _split_as_sequence(editor, lambda sizes: np.array(sizes))


@keeps
def split_as_sequence_of_equal_parts(editor: Editor) -> bool:
    """All parts but the last are as long as the first, which is then said once."""

    def equal(sizes: list[int]) -> np.ndarray | None:
        return np.array(sizes[0]) if {*sizes[:-1]} <= {sizes[0]} and sizes[-1] <= sizes[0] else None

    return _split_as_sequence(editor, equal)


def _split_as_sequence(editor: Editor, said: Callable[[list[int]], np.ndarray | None]) -> bool:
    for node in editor.shuffled(editor.nodes("Split")):
        sizes = _split_sizes(editor, node)
        if sizes is None or len(sizes) != len(node.output) or (lengths := said(sizes)) is None:
            continue
        sequence = editor.emit("SplitToSequence", node.input[0], editor.constant(lengths, np.int64), axis=_axis(node))
        parts = [editor.emit("SequenceAt", sequence, editor.constant(part, np.int64)) for part in range(len(sizes))]
        editor.replace(node, *parts)
        return True
    return False


@keeps
def slice_by_other(editor: Editor) -> bool:
    """A Slice with constant bounds as Gather, as Split, or with bounds counted from the end."""
    for node in editor.shuffled(editor.nodes("Slice")):
        values = [editor.array(name) for name in node.input[1:]]
        facts = editor.facts(node.input[0])
        if len(values) < 3 or any(value is None or value.size != 1 for value in values) or facts.shape is None:
            continue
        start, end, axis, step = [int(value.reshape(-1)[0]) for value in values if value is not None] + [1] * (
            4 - len(values)
        )
        width = facts.shape[axis]
        if width is None:
            continue
        rows = np.arange(width)[slice(start, end, step) if end > -INT64_MAX or step > 0 else slice(start, None, step)]
        kind = editor.random.randrange(3)
        if not len(rows) or step != 1:
            kind = 0
        if kind == 0:
            new = editor.emit("Gather", node.input[0], editor.constant(rows, np.int64), axis=axis)
        elif kind == 1 and len(rows) < width and editor.opset >= 13:
            first, last = int(rows[0]), int(rows[-1])
            sizes = [size for size in (first, len(rows), width - last - 1) if size]
            parts = editor.emit("Split", node.input[0], editor.constant(sizes, np.int64), outputs=len(sizes), axis=axis)
            new = parts[1 if first else 0]
        else:
            stop = int(rows[-1]) + 1
            bounds = (
                int(rows[0]) - width,
                stop - width if stop < width else INT64_MAX,
                axis - facts.rank if axis >= 0 else axis,
            )
            new = editor.emit("Slice", node.input[0], *(editor.constant([value], np.int64) for value in bounds))
        editor.replace(node, new)
        return True
    return False


@keeps
def concat_by_sum(editor: Editor) -> bool:
    """A Concat along the last axis as a sum of padded parts."""
    for node in editor.shuffled(editor.nodes("Concat")):
        facts = [editor.facts(name) for name in node.input]
        if any(not is_ranked_float(item) or item.shape is None or item.shape[-1] is None for item in facts):
            continue
        if _axis(node) not in (-1, facts[0].rank - 1) or len(facts) < 2:
            continue
        widths = [int((item.shape or (0,))[-1] or 0) for item in facts]
        padded = []
        for index, name in enumerate(node.input):
            pads = [0] * (2 * facts[index].rank)
            pads[facts[index].rank - 1], pads[-1] = sum(widths[:index]), sum(widths[index + 1 :])
            padded.append(editor.emit("Pad", name, editor.constant(pads, np.int64)))
        total = padded[0]
        for other in padded[1:]:
            total = editor.emit("Add", total, other)
        editor.replace(node, total)
        return True
    return False


@keeps
def concat_in_steps(editor: Editor) -> bool:
    for node in editor.shuffled(editor.nodes("Concat")):
        if len(node.input) > 2:
            first = editor.emit("Concat", *node.input[:2], axis=_axis(node))
            editor.replace(node, editor.emit("Concat", first, *node.input[2:], axis=_axis(node)))
            return True
    return False


@keeps
def concat_by_scatter(editor: Editor) -> bool:
    """A Concat along the last axis as ScatterElements into zeros, or as ScatterND of turned tensors."""
    for node in editor.shuffled(editor.nodes("Concat")):
        facts = [editor.facts(name) for name in node.input]
        if any(not is_ranked_float(item) or item.shape is None or item.shape[-1] is None for item in facts):
            continue
        if _axis(node) not in (-1, facts[0].rank - 1) or len(facts) != 2:
            continue
        rank = facts[0].rank
        turn = [rank - 1, *range(1, rank - 1), 0] if rank > 1 else [0]
        first, second = (int((item.shape or (0,))[-1] or 0) for item in facts)
        pads = [0] * (2 * rank)
        pads[-1] = second
        base = editor.emit("Pad", node.input[0], editor.constant(pads, np.int64))
        rows = editor.constant(np.arange(first, first + second)[:, None], np.int64)
        turned = editor.emit("Transpose", base, perm=turn)
        written = editor.emit("ScatterND", turned, rows, editor.emit("Transpose", node.input[1], perm=turn))
        editor.replace(node, editor.emit("Transpose", written, perm=turn))
        return True
    return False


@keeps
def moved_by_matrix(editor: Editor) -> bool:
    """A Slice, Gather or rotate_half along the last axis as a product with a constant matrix of 0, 1 and -1."""
    for node in editor.shuffled(editor.nodes("Concat")):
        parts = [editor.producers.get(name) for name in node.input]
        shape = editor.facts(node.output[0]).shape
        if len(parts) != 2 or parts[0] is None or parts[0].op_type != "Neg" or not shape or shape[-1] is None:
            continue
        if _axis(node) not in (-1, len(shape) - 1) or shape[-1] % 2:
            continue
        half = shape[-1] // 2
        halves = [parts[0].input[0], node.input[1]]
        if any((editor.facts(name).shape or (None,))[-1] != half for name in halves):
            continue
        joined = editor.emit("Concat", halves[1], halves[0], axis=-1)
        matrix = np.zeros((2 * half, 2 * half))
        matrix[np.arange(half), np.arange(half) + half] = 1
        matrix[np.arange(half) + half, np.arange(half)] = -1
        editor.replace(node, editor.emit("MatMul", joined, editor.like(node.output[0], matrix)))
        return True
    return False


@keeps
def transpose_by_einsum(editor: Editor) -> bool:
    node = editor.chosen(
        node for node in editor.nodes("Transpose") if is_ranked_float(editor.facts(node.output[0])) and node.attribute
    )
    if node is None:
        return False
    perm = list(node.attribute[0].ints)
    letters = "abcdefgh"[: len(perm)]
    equation = f"{letters}->{''.join(letters[axis] for axis in perm)}"
    editor.replace(node, editor.emit("Einsum", node.input[0], equation=equation))
    return True


@keeps
def unsqueeze_by_reshape(editor: Editor) -> bool:
    for node in editor.shuffled(editor.nodes("Unsqueeze", "Squeeze")):
        shape = editor.facts(node.output[0]).shape
        if shape is None or sum(size is None for size in shape) > 1 or editor.facts(node.input[0]).shape is None:
            continue
        target = editor.constant([-1 if size is None else size for size in shape], np.int64)
        editor.replace(node, editor.emit("Reshape", node.input[0], target))
        return True
    return False


@keeps
def expand_by_product(editor: Editor) -> bool:
    for node in editor.shuffled(editor.nodes("Expand")):
        if not is_ranked_float(editor.facts(node.output[0])):
            continue
        element = editor.facts(node.output[0]).element
        value = helper.make_tensor("value", element, [1], [1.0])
        editor.replace(
            node, editor.emit("Mul", node.input[0], editor.emit("ConstantOfShape", node.input[1], value=value))
        )
        return True
    return False


@keeps
def comparison_turned(editor: Editor) -> bool:
    """a <= b as b >= a or as not a > b."""
    mirror = {"Less": "Greater", "Greater": "Less", "LessOrEqual": "GreaterOrEqual", "GreaterOrEqual": "LessOrEqual"}
    opposite = {"Less": "GreaterOrEqual", "Greater": "LessOrEqual", "LessOrEqual": "Greater", "GreaterOrEqual": "Less"}
    node = editor.chosen(editor.nodes(*mirror))
    if node is None:
        return False
    if editor.random.random() < 0.5:
        editor.replace(node, editor.emit(mirror[node.op_type], node.input[1], node.input[0]))
    else:
        editor.replace(node, editor.emit("Not", editor.emit(opposite[node.op_type], *node.input)))
    return True


@keeps
def where_turned(editor: Editor) -> bool:
    node = editor.chosen(editor.nodes("Where"))
    if node is None:
        return False
    condition = editor.emit("Not", node.input[0])
    editor.replace(node, editor.emit("Where", condition, node.input[2], node.input[1]))
    return True


@keeps
def and_by_product(editor: Editor) -> bool:
    node = editor.chosen(editor.nodes("And"))
    if node is None:
        return False
    kind = editor.random.choice((TensorProto.INT32, TensorProto.FLOAT, TensorProto.INT64))
    both = editor.emit("Mul", *(editor.emit("Cast", name, to=kind) for name in node.input))
    editor.replace(node, editor.emit("Cast", both, to=TensorProto.BOOL))
    return True


@keeps
def mask_of_another_size(editor: Editor) -> bool:
    """A mask's -inf or finfo.min as another number that hides."""
    for node in editor.shuffled(editor.nodes("Where")):
        for index in (1, 2):
            value = editor.array(node.input[index])
            if value is None or value.size != 1 or not value.reshape(-1)[0] < -1e4 or value.dtype != np.float32:
                continue
            use = next(use for use in editor.uses[node.input[index]] if use.node is node and use.index == index)
            editor.rewire(use, editor.constant(np.full(value.shape, editor.random.choice((-1e9, -1e30)), np.float32)))
            return True
    return False


@keeps
def indices_in_int32(editor: Editor) -> bool:
    """A Gather's indices as int32."""
    nodes = [node for node in editor.nodes("Gather") if editor.facts(node.input[1]).element == TensorProto.INT64]
    node = editor.chosen(nodes)
    if node is None:
        return False
    use = next(use for use in editor.uses[node.input[1]] if use.node is node and use.index == 1)
    values = editor.array(node.input[1])
    editor.rewire(
        use,
        editor.constant(values, np.int32)
        if values is not None
        else editor.emit("Cast", use.name, to=TensorProto.INT32),
    )
    return True


@keeps
def gather_by_slice(editor: Editor) -> bool:
    """A Gather of one index as Slice and Squeeze."""
    if editor.opset < 13:
        return False
    for node in editor.shuffled(editor.nodes("Gather")):
        index = editor.array(node.input[1])
        if index is None or index.ndim != 0 or editor.facts(node.input[0]).element == 0:
            continue
        start = int(index)
        bounds = (start, start + 1 if start != -1 else INT64_MAX, _axis(node))
        part = editor.emit("Slice", node.input[0], *(editor.constant([value], np.int64) for value in bounds))
        editor.replace(node, editor.emit("Squeeze", part, editor.constant([_axis(node)], np.int64)))
        return True
    return False
