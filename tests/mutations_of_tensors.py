"""Changes that keep the meaning: what changes nothing is put between a tensor and one of its readers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from model_editor import Editor, TensorFacts, Use
from mutation_kinds import is_float, is_plain, is_ranked_float, keeps
from onnx import TensorProto

INT64_MAX = np.iinfo(np.int64).max


def _around(editor: Editor, accept: Callable[[TensorFacts], bool], build: Callable[[Use, TensorFacts], str]) -> bool:
    """Puts something that changes nothing before an input of a node."""
    use = editor.chosen(editor.edges(accept))
    if use is None:
        return False
    editor.rewire(use, build(use, editor.facts(use.name)))
    return True


@keeps
def identity(editor: Editor) -> bool:
    return _around(editor, is_plain, lambda use, _: editor.emit("Identity", use.name))


@keeps
def cast_to_own_type(editor: Editor) -> bool:
    return _around(editor, is_plain, lambda use, facts: editor.emit("Cast", use.name, to=facts.element))


@keeps
def cast_there_and_back(editor: Editor) -> bool:
    wider = {TensorProto.FLOAT: TensorProto.DOUBLE, TensorProto.FLOAT16: TensorProto.FLOAT}

    def build(use: Use, facts: TensorFacts) -> str:
        return editor.emit("Cast", editor.emit("Cast", use.name, to=wider[facts.element]), to=facts.element)

    return _around(editor, is_float, build)


@keeps
def transpose_twice(editor: Editor) -> bool:
    def build(use: Use, facts: TensorFacts) -> str:
        perm = editor.shuffled(range(facts.rank))
        return editor.emit(
            "Transpose", editor.emit("Transpose", use.name, perm=perm), perm=[int(axis) for axis in np.argsort(perm)]
        )

    return _around(editor, is_ranked_float, build)


@keeps
def reshape_to_own_shape(editor: Editor) -> bool:
    def build(use: Use, facts: TensorFacts) -> str:
        kind = editor.random.randrange(3)
        if kind == 0:
            shape = editor.emit("Shape", use.name)
        elif kind == 1:
            shape = editor.constant([0] * facts.rank, np.int64)
        else:
            shape = editor.constant([-1 if axis == facts.rank - 1 else 0 for axis in range(facts.rank)], np.int64)
        return editor.emit("Reshape", use.name, shape)

    return _around(editor, is_ranked_float, build)


@keeps
def reshape_apart_and_back(editor: Editor) -> bool:
    """The last axis in two, and together again."""

    def build(use: Use, facts: TensorFacts) -> str:
        assert facts.shape is not None
        width = facts.shape[-1]
        assert width is not None
        factor = editor.random.choice([size for size in range(1, width + 1) if width % size == 0])
        lead = [0] * (facts.rank - 1)
        apart = editor.emit("Reshape", use.name, editor.constant([*lead, factor, width // factor], np.int64))
        return editor.emit("Reshape", apart, editor.constant([*lead, -1], np.int64))

    return _around(editor, lambda facts: is_ranked_float(facts) and bool(facts.shape and facts.shape[-1]), build)


@keeps
def flatten_and_back(editor: Editor) -> bool:
    def build(use: Use, facts: TensorFacts) -> str:
        flat = editor.emit("Flatten", use.name, axis=editor.random.randrange(facts.rank))
        return editor.emit("Reshape", flat, editor.emit("Shape", use.name))

    return _around(editor, is_ranked_float, build)


@keeps
def unsqueeze_and_squeeze(editor: Editor) -> bool:
    if editor.opset < 13:
        return False

    def build(use: Use, facts: TensorFacts) -> str:
        axis = editor.constant([editor.random.randrange(-facts.rank - 1, facts.rank + 1)], np.int64)
        return editor.emit("Squeeze", editor.emit("Unsqueeze", use.name, axis), axis)

    return _around(editor, lambda facts: is_plain(facts) and facts.rank >= 0, build)


@keeps
def times_one(editor: Editor) -> bool:
    def build(use: Use, _: TensorFacts) -> str:
        op, values = editor.random.choice([("Mul", 1), ("Div", 1), ("Add", 0), ("Sub", 0), ("Pow", 1), ("Sum", 0)])
        operand = editor.like(use.name, values if editor.random.random() < 0.5 else [values])
        if op in ("Mul", "Add") and editor.random.random() < 0.5:
            return editor.emit(op, operand, use.name)
        return editor.emit(op, use.name, operand)

    return _around(editor, lambda facts: is_float(facts) and facts.rank >= 1, build)


@keeps
def negate_twice(editor: Editor) -> bool:
    return _around(editor, is_float, lambda use, _: editor.emit("Neg", editor.emit("Neg", use.name)))


@keeps
def invert_twice(editor: Editor) -> bool:
    def is_truth(facts: TensorFacts) -> bool:
        return facts.element == TensorProto.BOOL

    return _around(editor, is_truth, lambda use, _: editor.emit("Not", editor.emit("Not", use.name)))


@keeps
def slice_all(editor: Editor) -> bool:
    def build(use: Use, facts: TensorFacts) -> str:
        bounds = (editor.constant([value], np.int64) for value in (0, INT64_MAX, editor.random.randrange(facts.rank)))
        return editor.emit("Slice", use.name, *bounds)

    return _around(editor, lambda facts: is_plain(facts) and facts.rank >= 1, build)


@keeps
def gather_all(editor: Editor) -> bool:
    def build(use: Use, facts: TensorFacts) -> str:
        assert facts.shape is not None
        kind = editor.random.choice((np.int32, np.int64))
        return editor.emit("Gather", use.name, editor.constant(np.arange(facts.shape[-1]), kind), axis=-1)

    return _around(editor, lambda facts: is_ranked_float(facts) and bool(facts.shape and facts.shape[-1]), build)


@keeps
def split_and_concat(editor: Editor) -> bool:
    if editor.opset < 13:
        return False

    def build(use: Use, facts: TensorFacts) -> str:
        assert facts.shape is not None
        width = facts.shape[-1]
        assert width is not None
        first = editor.random.randrange(1, width)
        parts = editor.emit("Split", use.name, editor.constant([first, width - first], np.int64), outputs=2, axis=-1)
        return editor.emit("Concat", *parts, axis=facts.rank - 1)

    return _around(
        editor, lambda facts: is_ranked_float(facts) and bool(facts.shape and (facts.shape[-1] or 0) > 1), build
    )


@keeps
def concat_alone(editor: Editor) -> bool:
    return _around(editor, is_ranked_float, lambda use, facts: editor.emit("Concat", use.name, axis=facts.rank - 1))


@keeps
def pad_with_nothing(editor: Editor) -> bool:
    def build(use: Use, facts: TensorFacts) -> str:
        return editor.emit("Pad", use.name, editor.constant([0] * 2 * facts.rank, np.int64))

    return _around(editor, is_ranked_float, build)


@keeps
def pad_and_slice(editor: Editor) -> bool:
    """Zeros behind the last axis, and off again."""

    def build(use: Use, facts: TensorFacts) -> str:
        assert facts.shape is not None
        pads = [0] * (2 * facts.rank)
        pads[-1] = 3
        wide = editor.emit("Pad", use.name, editor.constant(pads, np.int64))
        bounds = [editor.constant([value], np.int64) for value in (0, facts.shape[-1], facts.rank - 1)]
        return editor.emit("Slice", wide, *bounds)

    return _around(editor, lambda facts: is_ranked_float(facts) and bool(facts.shape and facts.shape[-1]), build)


@keeps
def expand_to_own_shape(editor: Editor) -> bool:
    return _around(
        editor, is_ranked_float, lambda use, _: editor.emit("Expand", use.name, editor.emit("Shape", use.name))
    )


@keeps
def tile_once(editor: Editor) -> bool:
    return _around(
        editor,
        is_ranked_float,
        lambda use, facts: editor.emit("Tile", use.name, editor.constant([1] * facts.rank, np.int64)),
    )


@keeps
def drop_nothing(editor: Editor) -> bool:
    return _around(editor, is_float, lambda use, _: editor.emit("Dropout", use.name))


@keeps
def where_true(editor: Editor) -> bool:
    return _around(
        editor, is_ranked_float, lambda use, _: editor.emit("Where", editor.constant([True]), use.name, use.name)
    )


@keeps
def add_and_take_away(editor: Editor) -> bool:
    """x + x - x, of a product's result: a mask's -inf would not stay what it is."""
    uses = [
        use
        for use in editor.edges(is_ranked_float)
        if use.name in editor.producers and editor.producers[use.name].op_type in ("MatMul", "Gemm", "Split")
    ]
    use = editor.chosen(uses)
    if use is None:
        return False
    editor.rewire(use, editor.emit("Sub", editor.emit("Add", use.name, use.name), use.name))
    return True


@keeps
def halve_and_double(editor: Editor) -> bool:
    def build(use: Use, _: TensorFacts) -> str:
        halved = editor.emit("Mul", use.name, editor.like(use.name, 0.5))
        return editor.emit("Div", halved, editor.like(use.name, 0.5))

    return _around(editor, is_ranked_float, build)


@keeps
def reverse_twice(editor: Editor) -> bool:
    """The last axis backwards, and again."""

    def build(use: Use, facts: TensorFacts) -> str:
        def backwards(name: str) -> str:
            values = (-1, -INT64_MAX, -1, -1)
            return editor.emit("Slice", name, *(editor.constant([value], np.int64) for value in values))

        return backwards(backwards(use.name))

    return _around(editor, is_ranked_float, build)


@keeps
def scatter_over_itself(editor: Editor) -> bool:
    """ScatterND of all rows of the first axis where it has a fixed size."""

    def build(use: Use, facts: TensorFacts) -> str:
        assert facts.shape is not None
        rows = editor.constant(np.arange(facts.shape[0])[:, None], np.int64)
        return editor.emit("ScatterND", use.name, rows, use.name)

    return _around(editor, lambda facts: is_ranked_float(facts) and bool(facts.shape and facts.shape[0]), build)
