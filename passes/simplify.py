"""Second pass: data movement and softmax in one form. Removes what computes nothing and rewrites the few idioms that hide an
attention's softmax or split: explicit softmax, shifted softmax, sequences."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from mla_trt.passes.graph import (
    Names,
    constant_value,
    is_empty,
    producer,
    remove_dead_nodes,
    replace_uses,
    small_constant,
)
from mla_trt.passes.merge_equal import merge_equal


def simplify(graph: gs.Graph) -> int:
    """Simplifies the graph in place; returns how many nodes went."""
    before = len(graph.nodes)
    _lift_constants(graph)
    remove_dead_nodes(graph)
    names = Names(graph)
    for rule in (
        _split_sequences,
        _cast_by_type,
        _drop_identities,
        _shapes_behind_casts,
        _einsum_as_transpose,
        _einsum_as_matmul,
        _merge,
        _slice_before_product,
        _explicit_softmax,
        _shifted_softmax,
        _drop_tests_for_infinity,
        _drop_row_guards,
    ):
        if rule(graph, names):
            remove_dead_nodes(graph)
    return before - len(graph.nodes)


def _lift_constants(graph: gs.Graph) -> None:
    for node in graph.nodes:
        if node.op != "Constant" or node.domain:
            continue
        (key, value), *_ = node.attrs.items()
        output = node.outputs[0]
        if key == "value" and isinstance(value, gs.Tensor):
            values = value._values if isinstance(value, gs.Constant) else value
        elif key in ("value_float", "value_floats"):
            values = np.asarray(value, np.float32)
        elif key in ("value_int", "value_ints"):
            values = np.asarray(value, np.int64)
        else:
            continue
        constant = gs.Constant(output.name, values)
        output.name = f"{output.name}.lifted"
        node.outputs.clear()
        replace_uses(graph, output, constant)
    graph.nodes[:] = [node for node in graph.nodes if node.op != "Constant" or node.outputs]


# Rules return how many nodes they changed.


def _split_sequences(graph: gs.Graph, names: Names) -> int:
    """SplitToSequence and SequenceAt with constants are a Split; where parts are equally long but for the last, Slices."""
    changed = 0
    for node in [node for node in graph.nodes if node.op == "SplitToSequence"]:
        readers = [reader for reader in node.outputs[0].outputs if reader.op == "SequenceAt"]
        if len(readers) != len(node.outputs[0].outputs):
            continue
        indices = [small_constant(reader.inputs[1]) for reader in readers]
        sizes = small_constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if any(index is None for index in indices) or sizes is None:
            continue
        parts = [int(index.item()) for index in indices if index is not None]
        if sizes.ndim:
            _split(graph, names, node, readers, parts, sizes.size)
        elif min(parts, default=0) >= 0:
            for reader, part in zip(readers, parts, strict=True):
                _slice_part(graph, names, node, reader, part * int(sizes), (part + 1) * int(sizes))
        else:
            continue
        changed += 1
    return changed


def _split(graph: gs.Graph, names: Names, node: gs.Node, readers: list[gs.Node], parts: list[int], count: int) -> None:
    outputs = [
        gs.Variable(names.new(f"{node.outputs[0].name}_part{part}"), dtype=node.inputs[0].dtype)
        for part in range(count)
    ]
    for reader, part in zip(readers, parts, strict=True):
        replace_uses(graph, reader.outputs[0], outputs[part])
    attributes = {"axis": node.attrs.get("axis", 0)}
    graph.nodes.append(gs.Node("Split", names.new(f"{node.name}/Split"), attributes, list(node.inputs), outputs))


def _slice_part(graph: gs.Graph, names: Names, node: gs.Node, reader: gs.Node, start: int, end: int) -> None:
    output = gs.Variable(names.new(f"{reader.outputs[0].name}_part"), dtype=node.inputs[0].dtype)
    bounds = [
        gs.Constant(names.new(f"{reader.outputs[0].name}_{name}"), np.array([value], np.int64))
        for name, value in (("start", start), ("end", end), ("axis", node.attrs.get("axis", 0)))
    ]
    graph.nodes.append(gs.Node("Slice", names.new(f"{node.name}/Slice"), {}, [node.inputs[0], *bounds], [output]))
    replace_uses(graph, reader.outputs[0], output)


def _cast_by_type(graph: gs.Graph, names: Names) -> int:
    """CastLike is a Cast wherever the type is known."""
    changed = 0
    for node in graph.nodes:
        if node.op == "CastLike" and node.inputs[1].dtype is not None:
            dtype = node.inputs[1].dtype
            node.op, node.attrs = (
                "Cast",
                {"to": dtype if isinstance(dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))},
            )
            node.outputs[0].dtype = dtype
            del node.inputs[1]
            changed += 1
    return changed


def _drop_identities(graph: gs.Graph, names: Names) -> int:
    changed = 0
    inputs = {id(tensor) for tensor in graph.inputs}
    outputs = {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        same = node.op == "Identity" or (node.op == "Dropout" and (len(node.inputs) < 3 or is_empty(node.inputs[2])))
        if node.op == "Cast" and node.inputs[0].dtype is not None and node.outputs[0].dtype == node.inputs[0].dtype:
            same = True
        if (
            not same
            or node.domain
            or (
                id(node.outputs[0]) in outputs
                and (id(node.inputs[0]) in inputs | outputs or isinstance(node.inputs[0], gs.Constant))
            )
        ):
            continue
        replace_uses(graph, node.outputs[0], node.inputs[0])
        changed += 1
    return changed


def _einsum_as_transpose(graph: gs.Graph, names: Names) -> int:
    """An Einsum of one operand that keeps every axis is a Transpose."""
    changed = 0
    for node in graph.nodes:
        if node.op != "Einsum" or len(node.inputs) != 1:
            continue
        left, _, right = str(node.attrs["equation"]).replace(" ", "").partition("->")
        if left.isalpha() and len(set(left)) == len(left) and sorted(left) == sorted(right):
            node.op, node.attrs = "Transpose", {"perm": [left.index(letter) for letter in right]}
            changed += 1
    return changed


def _is_reduction(tensor: gs.Tensor, op: str, of: gs.Tensor) -> int | None:
    """The axis over which `tensor` is a keepdims reduction of `of`, else None."""
    node = producer(tensor)
    if (
        node is None
        or node.op != op
        or node.inputs[0] is not of
        or not node.attrs.get("keepdims", 1)
        or len(node.inputs) < 2
    ):
        return None
    axes = node.inputs[1]
    values = constant_value(axes, None) if isinstance(axes, gs.Constant) else None
    return int(values.reshape(-1)[0]) if values is not None and values.size == 1 else None


def _explicit_softmax(graph: gs.Graph, names: Names) -> int:
    """Exp(x) divided by ReduceSum(Exp(x)), or multiplied with its reciprocal, is Softmax(x), and so are Exp(LogSoftmax(x)) and
    Exp(x - ReduceLogSumExp(x))."""
    changed = 0
    for node in [node for node in graph.nodes if node.op in ("Div", "Mul", "Exp")]:
        if node.op == "Exp":
            exponential, axis = node, None
            logarithm = producer(node.inputs[0])
            if logarithm is not None and logarithm.op == "LogSoftmax":
                exponential, axis = logarithm, logarithm.attrs.get("axis", -1)
            elif logarithm is not None and logarithm.op == "Sub":
                exponential, axis = (
                    logarithm,
                    _is_reduction(logarithm.inputs[1], "ReduceLogSumExp", logarithm.inputs[0]),
                )
        else:
            exponential, axis = _normalised(node)
        if exponential is None or axis is None:
            continue
        output = gs.Variable(
            names.new(f"{node.outputs[0].name}_softmax"), dtype=node.outputs[0].dtype, shape=node.outputs[0].shape
        )
        graph.nodes.append(
            gs.Node("Softmax", names.new(f"{node.name}/Softmax"), {"axis": axis}, [exponential.inputs[0]], [output])
        )
        replace_uses(graph, node.outputs[0], output)
        changed += 1
    return changed


def _normalised(node: gs.Node) -> tuple[gs.Node | None, int | None]:
    """The Exp that a Div or Mul divides by its own sum, and the axis of that sum; None where it does something else."""
    for powers, total in (node.inputs, node.inputs[::-1]) if node.op == "Mul" else (node.inputs,):
        exponential, inverse = producer(powers), producer(total)
        if node.op == "Mul":
            if inverse is None or inverse.op != "Reciprocal":
                continue
            total = inverse.inputs[0]
        if exponential is not None and exponential.op == "Exp":
            return exponential, _is_reduction(total, "ReduceSum", powers)
    return None, None


def _einsum_as_matmul(graph: gs.Graph, names: Names) -> int:
    """An Einsum that multiplies the last two axes is a MatMul, with a turned operand perhaps: its ellipses may stand for different numbers of
    axes only there."""
    changed = 0
    for node in [node for node in graph.nodes if node.op == "Einsum" and len(node.inputs) == 2]:
        equation = node.attrs["equation"]
        text = (equation.decode() if isinstance(equation, bytes) else str(equation)).replace(" ", "")
        turned = {
            "...mk,...kn->...mn": (),
            "...mk,...nk->...mn": (1,),
            "...km,...kn->...mn": (0,),
            "...km,...nk->...mn": (0, 1),
        }
        operands = turned.get(text)
        if operands is None or any(node.inputs[index].shape is None for index in operands):
            continue
        for index in operands:
            source = node.inputs[index]
            rank = len(source.shape)
            output = gs.Variable(names.new(f"{node.outputs[0].name}_turned"), dtype=source.dtype)
            perm = [*range(rank - 2), rank - 1, rank - 2]
            graph.nodes.append(
                gs.Node("Transpose", names.new(f"{node.name}/Transpose"), {"perm": perm}, [source], [output])
            )
            node.inputs[index] = output
        node.op, node.attrs = "MatMul", {}
        changed += 1
    return changed


def _merge(graph: gs.Graph, names: Names) -> int:
    return merge_equal(graph)


def _slice_before_product(graph: gs.Graph, names: Names) -> int:
    """A product of two tensors of which only some last columns are read is one with these columns of its right operand: where values are whole
    cached rows, it is the latent's part of the result that is wanted."""
    changed = 0
    outputs = {id(tensor) for tensor in graph.outputs}
    for node in [node for node in graph.nodes if node.op == "MatMul"]:
        right = node.inputs[1]
        if right.shape is None or len(right.shape) < 2 or any(isinstance(item, gs.Constant) for item in node.inputs):
            continue  # a vector has no columns
        passed, tensor = [], node.outputs[0]
        while tensor.shape is not None and len(tensor.outputs) == 1 and id(tensor) not in outputs:
            passed.append(tensor)
            (reader,) = tensor.outputs
            if (part := _last_columns(reader, len(tensor.shape))) is not None:
                if not any(id(item) in outputs for item in reader.outputs):
                    _multiply_columns(graph, names, node, passed, *part)
                    changed += 1
                break
            if reader.op != "Transpose" or reader.attrs.get("perm", [])[-1:] != [len(tensor.shape) - 1]:
                break
            tensor = reader.outputs[0]
    return changed


def _last_columns(node: gs.Node, rank: int) -> tuple[gs.Tensor, list[int]] | None:
    """What a Slice leaves of the last axis of its input, or a Split of which one part is read, and that part's start, end and step; None where the
    node is something else."""
    numbers = [small_constant(item) for item in node.inputs[1:] if not is_empty(item)]
    if any(number is None for number in numbers):
        return None
    values = [number.reshape(-1).tolist() for number in numbers if number is not None]
    last = ([-1], [rank - 1])
    if node.op == "Slice" and len(values) >= 3 and values[2] in last:
        start, end, step = values[0][0], values[1][0], values[3][0] if len(values) > 3 else 1
        return node.outputs[0], [start, end, step]
    if node.op == "Split" and len(values) == 1 and [node.attrs.get("axis", 0)] in last:
        read = [place for place, part in enumerate(node.outputs) if part.outputs]
        if len(read) == 1:
            start = sum(values[0][: read[0]])
            return node.outputs[read[0]], [start, start + values[0][read[0]], 1]
    return None


def _multiply_columns(
    graph: gs.Graph, names: Names, product: gs.Node, passed: list[gs.Tensor], part: gs.Tensor, bounds: list[int]
) -> None:
    """Cuts the right operand instead of what is behind the product; `passed`: the tensors until there."""
    start, end, step, axis = (
        gs.Constant(names.new(f"{part.name}_{name}"), np.array([value], np.int64))
        for name, value in zip(("start", "end", "step", "axis"), [*bounds, -1], strict=True)
    )
    right = product.inputs[1]
    columns = gs.Variable(names.new(f"{right.name}_columns"), dtype=right.dtype)
    graph.nodes.append(
        gs.Node("Slice", names.new(f"{product.name}/Slice"), {}, [right, start, end, axis, step], [columns])
    )
    product.inputs[1] = columns
    for tensor in passed:
        tensor.shape = None if part.shape is None else [*tensor.shape[:-1], part.shape[-1]]
    replace_uses(graph, part, passed[-1])


def _shifted_softmax(graph: gs.Graph, names: Names) -> int:
    """Softmax(x - ReduceMax(x)) is Softmax(x)."""
    changed = 0
    for node in graph.nodes:
        if node.op != "Softmax":
            continue
        shift = producer(node.inputs[0])
        if (
            shift is not None
            and shift.op == "Sub"
            and _is_reduction(shift.inputs[1], "ReduceMax", shift.inputs[0]) is not None
        ):
            node.inputs[0] = shift.inputs[0]
            changed += 1
    return changed


def _shapes_behind_casts(graph: gs.Graph, names: Names) -> int:
    """The shape of a cast tensor is that of the tensor itself, which may be an input that only its shape is wanted of."""
    changed = 0
    for node in graph.nodes:
        if node.op == "Shape":
            cast = producer(node.inputs[0])
            while cast is not None and cast.op == "Cast":
                node.inputs[0] = cast.inputs[0]
                cast = producer(node.inputs[0])
                changed += 1
    return changed


def _drop_tests_for_infinity(graph: gs.Graph, names: Names) -> int:
    """Probabilities lie between 0 and 1 or are no numbers: what a test for infinity would choose instead (nan_to_num) never comes."""
    changed = 0
    for node in graph.nodes:
        softmax = producer(node.inputs[0]) if node.op in ("IsInf", "Equal") else None
        if softmax is None or softmax.op != "Softmax":
            continue
        if node.op == "Equal":
            other = small_constant(node.inputs[1])
            if other is None or other.dtype.kind != "f" or not np.isinf(other).all():
                continue
        never = [node.outputs[0]]
        while never:
            test = never.pop()
            for reader in list(test.outputs):
                if reader.op == "And":
                    never.append(reader.outputs[0])
                elif (
                    reader.op == "Where" and reader.inputs[0] is test and not isinstance(reader.inputs[2], gs.Constant)
                ):
                    replace_uses(graph, reader.outputs[0], reader.inputs[2])
                    changed += 1
    return changed


_ROW_TESTS = (
    "Equal", "IsInf", "IsNaN", "Not", "And", "Or", "Cast", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceProd", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual", "Expand", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Shape",
)  # fmt: skip


def _drop_row_guards(graph: gs.Graph, names: Names) -> int:
    """Where(test of x, Softmax(x), 0) blanks rows in which every score is hidden; the fused ops answer those with 0 anyway."""
    changed = 0
    for node in graph.nodes:
        if node.op != "Where":
            continue
        for probabilities, other in ((node.inputs[1], node.inputs[2]), (node.inputs[2], node.inputs[1])):
            softmax = producer(probabilities)
            while softmax is not None and softmax.op == "Cast":
                softmax = producer(softmax.inputs[0])
            if softmax is None or softmax.op != "Softmax" or not _is_zero(other):
                continue
            if _tests_only(node.inputs[0], softmax.inputs[0]):
                replace_uses(graph, node.outputs[0], probabilities)
                changed += 1
                break
    return changed


def _is_zero(tensor: gs.Tensor) -> bool:
    """Whether every element of a tensor is the constant 0, as far as that shows without evaluating anything."""
    node = producer(tensor)
    if node is not None and node.op in ("Expand", "Cast", "Identity"):
        return _is_zero(node.inputs[0])
    if node is not None and node.op == "ConstantOfShape":
        value = node.attrs.get("value")
        return value is None or not np.any(np.asarray(value.values))
    values = small_constant(tensor)
    return values is not None and not values.any()


def _tests_only(condition: gs.Tensor, scores: gs.Tensor) -> bool:
    """Whether a condition is made from the scores and constants by comparisons and reductions."""
    seen: set[int] = set()
    stack = [condition]
    while stack:
        tensor = stack.pop()
        if tensor is scores or isinstance(tensor, gs.Constant) or id(tensor) in seen or is_empty(tensor):
            continue
        seen.add(id(tensor))
        node = producer(tensor)
        if node is None or node.op not in _ROW_TESTS or len(seen) > len(_ROW_TESTS):
            return False
        if node.op != "Shape":
            stack.extend(node.inputs[:1] if node.op in ("Expand", "Reshape", "Squeeze", "Unsqueeze") else node.inputs)
    return True
