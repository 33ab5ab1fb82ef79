"""Changes to ONNX models that change their meaning: the mistakes and the variants that a matcher must not overlook."""

from __future__ import annotations

import numpy as np
import onnx
from model_editor import FLOATS, Editor, Use
from mutation_kinds import changes
from onnx import helper, numpy_helper


@changes
def rewire_one(editor: Editor) -> bool:
    """An input reads another tensor of the same type and shape."""
    by_kind: dict[tuple[int, tuple[int | None, ...]], list[str]] = {}
    for name in (*editor.producers, *editor.inputs):
        facts = editor.facts(name)
        if facts.element and facts.shape is not None:
            by_kind.setdefault((facts.element, facts.shape), []).append(name)
    uses = [use for uses in editor.uses.values() for use in uses if not editor.is_constant(use.name)]
    for use in editor.shuffled(uses)[:40]:
        facts = editor.facts(use.name)
        if facts.shape is None:
            continue
        others = [name for name in by_kind.get((facts.element, facts.shape), []) if name != use.name]
        for other in editor.shuffled(others)[:10]:
            if other not in use.node.output and not any(
                _depends(editor, other, name) for name in use.node.output if name
            ):
                editor.rewire(use, other)
                return True
    return False


def _depends(editor: Editor, name: str, on: str) -> bool:
    maker = editor.producers.get(name)
    return maker is not None and (on in maker.input or editor.reaches(on, maker))


def _replace_constant(editor: Editor, use: Use, values: np.ndarray) -> bool:
    editor.rewire(use, editor.constant(values))
    return True


def _constant_uses(editor: Editor, kind: str, most: int) -> list[tuple[Use, np.ndarray]]:
    found = []
    for name in {use.name for uses in editor.uses.values() for use in uses}:
        values = editor.array(name) if editor.is_constant(name) else None
        if values is not None and values.dtype.kind == kind and 0 < values.size <= most:
            found += [(use, values) for use in editor.uses[name]]
    return sorted(found, key=lambda item: (item[0].node.name, item[0].name, item[0].index))


@changes
def other_number(editor: Editor) -> bool:
    """One scale, epsilon or limit."""
    found = editor.chosen(_constant_uses(editor, "f", 1))
    if found is None:
        return False
    use, values = found
    factor = editor.random.choice((0.5, 1.01, 2.0, -1.0, 0.0))
    return _replace_constant(editor, use, (values * factor + (factor == 0)).astype(values.dtype))


@changes
def other_index(editor: Editor) -> bool:
    """One Slice bound, index, axis or size."""
    found = editor.chosen(_constant_uses(editor, "i", 64))
    if found is None:
        return False
    use, values = found
    changed = values.copy().reshape(-1)
    at = editor.random.randrange(changed.size)
    changed[at] += editor.random.choice((-1, 1, 2, -2))
    return _replace_constant(editor, use, changed.reshape(values.shape))


@changes
def other_split(editor: Editor) -> bool:
    """A Split at another place."""
    for node in editor.shuffled(editor.nodes("Split")):
        sizes = editor.array(node.input[1]) if len(node.input) > 1 else None
        if sizes is None or sizes.size < 2:
            continue
        changed = sizes.copy()
        if editor.random.random() < 0.5:
            changed = changed[::-1].copy()
        else:
            changed[0] += 2
            changed[1] -= 2
        if (changed > 0).all() and (changed != sizes).any():
            return _replace_constant(editor, Use(node, 1), changed)
    return False


@changes
def other_order(editor: Editor) -> bool:
    """A Transpose with another order of axes."""
    for node in editor.shuffled(editor.nodes("Transpose")):
        if not node.attribute or len(node.attribute[0].ints) < 2:
            continue
        perm = list(node.attribute[0].ints)
        first, second = editor.random.sample(range(len(perm)), 2)
        perm[first], perm[second] = perm[second], perm[first]
        node.attribute[0].ints[:] = perm
        return True
    return False


@changes
def other_weights(editor: Editor) -> bool:
    """Two weights of the same shape change places."""
    kinds: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, tensor in editor.constants.items():
        if editor.uses.get(name) and int(np.prod(tensor.dims, dtype=np.int64)) > 1:
            kinds.setdefault((str(tensor.data_type), tuple(tensor.dims)), []).append(name)
    pairs = [sorted(names) for names in kinds.values() if len(names) > 1]
    if not pairs:
        return False
    first, second = editor.random.sample(editor.random.choice(pairs), 2)
    for one, other in zip(list(editor.uses[first]), list(editor.uses[second]), strict=False):
        editor.rewire(one, second)
        editor.rewire(other, first)
    return True


@changes
def other_weight_entry(editor: Editor) -> bool:
    """One entry of a table, a norm weight or a mask."""
    found = editor.chosen(_constant_uses(editor, "f", 4096))
    if found is None:
        return False
    use, values = found
    changed = values.copy().reshape(-1)
    changed[editor.random.randrange(changed.size)] += 1
    return _replace_constant(editor, use, changed.reshape(values.shape))


@changes
def other_comparison(editor: Editor) -> bool:
    names = ("Less", "LessOrEqual", "Greater", "GreaterOrEqual")
    node = editor.chosen(editor.nodes(*names))
    if node is None:
        return False
    node.op_type = editor.random.choice([name for name in names if name != node.op_type])
    return True


@changes
def other_op(editor: Editor) -> bool:
    """An operator in place of another of the same kind."""
    kinds = (
        ("Add", "Sub", "Mul", "Div"),
        ("Cos", "Sin"),
        ("And", "Or", "Xor"),
        ("Max", "Min"),
        ("Sqrt", "Reciprocal", "Neg", "Exp", "Sigmoid", "Relu", "Tanh"),
        ("ReduceMean", "ReduceMax", "ReduceSum", "ReduceL2"),
    )
    nodes = [(node, kind) for kind in kinds for node in editor.nodes(*kind)]
    found = editor.chosen(nodes)
    if found is None:
        return False
    node, kind = found
    node.op_type = editor.random.choice([name for name in kind if name != node.op_type])
    return True


@changes
def operands_turned(editor: Editor) -> bool:
    """Operands of an op that does not commute change places."""
    nodes = [
        node
        for node in editor.nodes("Sub", "Div", "Where", "Concat", "Less", "LessOrEqual", "Pow", "MatMul")
        if len(node.input) >= 2 and editor.facts(node.input[-1]).element == editor.facts(node.input[-2]).element
    ]
    node = editor.chosen(nodes)
    if node is None:
        return False
    node.input[-1], node.input[-2] = node.input[-2], node.input[-1]
    editor.refresh()
    return True


@changes
def drop_node(editor: Editor) -> bool:
    """A node's input goes on in place of its output."""
    for node in editor.shuffled(editor.graph.node):
        if len(node.output) != 1 or node.output[0] in editor.outputs or not node.input:
            continue
        facts = editor.facts(node.output[0])
        same = [name for name in node.input if name and editor.facts(name) == facts and not editor.is_constant(name)]
        if facts.element and facts.shape is not None and same:
            source = editor.random.choice(same)
            for use in list(editor.uses.get(node.output[0], [])):
                editor.rewire(use, source)
            return True
    return False


@changes
def something_between(editor: Editor) -> bool:
    """A function between a tensor and its reader."""
    use = editor.chosen(editor.edges(lambda facts: facts.element in FLOATS and facts.rank >= 1))
    if use is None:
        return False
    op = editor.random.choice(("Tanh", "Relu", "Softmax", "Abs", "Mul", "Add", "CumSum", "Clip", "Round"))
    if op in ("Mul", "Add"):
        new = editor.emit(op, use.name, editor.like(use.name, editor.random.choice((0.3, -1.0, 1.7))))
    elif op == "CumSum":
        new = editor.emit(op, use.name, editor.constant(editor.random.choice((0, -1)), np.int64))
    elif op == "Clip":
        new = editor.emit(op, use.name, editor.like(use.name, -0.1), editor.like(use.name, 0.1))
    else:
        new = editor.emit(op, use.name)
    editor.rewire(use, new)
    return True


@changes
def scale_one_axis(editor: Editor) -> bool:
    """Each entry of the last axis times a number of its own."""
    use = editor.chosen(
        editor.edges(lambda facts: facts.element in FLOATS and facts.rank >= 1 and bool((facts.shape or (0,))[-1]))
    )
    if use is None:
        return False
    width = (editor.facts(use.name).shape or (0,))[-1]
    factors = np.linspace(0.5, 1.5, int(width or 1))
    editor.rewire(
        use, editor.emit(editor.random.choice(("Mul", "Add", "Div")), use.name, editor.like(use.name, factors))
    )
    return True


@changes
def shift_axis(editor: Editor) -> bool:
    """The entries of an axis one on, in a circle: of heads, tokens, sequences or features."""
    use = editor.chosen(editor.edges(lambda facts: facts.element in FLOATS and facts.rank >= 1))
    if use is None:
        return False
    axis = editor.random.randrange(editor.facts(use.name).rank)

    def part(start: int, end: int) -> str:
        return editor.emit("Slice", use.name, *(editor.constant([value], np.int64) for value in (start, end, axis)))

    editor.rewire(use, editor.emit("Concat", part(1, np.iinfo(np.int64).max), part(0, 1), axis=axis))
    return True


@changes
def other_attribute(editor: Editor) -> bool:
    """A number among a node's attributes."""
    found = [
        attribute
        for node in editor.graph.node
        for attribute in node.attribute
        if attribute.type in (onnx.AttributeProto.INT, onnx.AttributeProto.FLOAT)
        and attribute.name not in ("to", "dtype")
    ]
    attribute = editor.chosen(found)
    if attribute is None:
        return False
    if attribute.type == onnx.AttributeProto.INT:
        attribute.i = attribute.i + editor.random.choice((-1, 1)) if attribute.i not in (0, 1) else 1 - attribute.i
    else:
        attribute.f = attribute.f * editor.random.choice((0.5, 2.0, -1.0))
    return True


@changes
def window(editor: Editor) -> bool:
    """A comparison of positions holds only for those within some distance: a sliding window."""
    if editor.opset < 13:
        return False
    nodes = [
        node
        for node in editor.nodes("LessOrEqual", "GreaterOrEqual", "Less", "Greater")
        if editor.facts(node.input[0]).element in (1, 6, 7)
    ]
    node = editor.chosen(nodes)
    if node is None:
        return False
    reach = editor.random.choice((1, 4, 16, 64, 1000))
    distance = editor.emit("Abs", editor.emit("Sub", node.input[0], node.input[1]))
    near = editor.emit("Less", distance, editor.like(node.input[0], reach))
    twin = editor.emit(node.op_type, *node.input)
    editor.replace(node, editor.emit("And", twin, near))
    return True


@changes
def function_of_data_as_output(editor: Editor) -> bool:
    """A tensor from anywhere as one more result."""
    use = editor.chosen(editor.edges(lambda facts: facts.element in FLOATS and facts.rank >= 1))
    if use is None:
        return False
    facts = editor.facts(use.name)
    result = editor.emit("Identity", use.name)
    shape = [size if size is not None else f"{result}_{axis}" for axis, size in enumerate(facts.shape or ())]
    editor.graph.output.append(helper.make_tensor_value_info(result, facts.element, shape))
    return True


@changes
def input_fixed(editor: Editor) -> bool:
    """A dimension that varies gets a size, or another name."""
    dims = [
        (value, dim)
        for value in (*editor.graph.input, *editor.graph.output)
        for dim in value.type.tensor_type.shape.dim
        if dim.dim_param
    ]
    found = editor.chosen(dims)
    if found is None:
        return False
    name, kind = found[1].dim_param, editor.random.choice((1, 2, 0, -1))
    for _, dim in dims:
        if dim.dim_param == name:
            if kind > 0:
                dim.dim_value = kind
            elif kind == 0:
                dim.dim_param = f"renamed_{name}"
            else:
                dim.Clear()
    return True


@changes
def huge_side_branch(editor: Editor) -> bool:
    """An enormous tensor beside the path of data, of which one entry is used."""
    if editor.opset < 13:
        return False
    use = editor.chosen(editor.edges(lambda facts: facts.element == 1 and facts.rank >= 1))
    if use is None:
        return False
    value = numpy_helper.from_array(np.array([0.5], np.float32))
    wide = editor.emit("ConstantOfShape", editor.constant([1 << 20, 1 << 14], np.int64), value=value)
    one = editor.emit("Gather", editor.emit("Gather", wide, editor.constant(0, np.int64)), editor.constant(0, np.int64))
    editor.rewire(use, editor.emit("Mul", use.name, one))
    return True
