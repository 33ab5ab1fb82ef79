"""Finds out what each graph input is: tokens, positions, masks, caches, other state, rope tables.

The role follows from where an input's values go, never from its name; names only break the tie between a cosine and a sine input.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from mla_trt import interface as roles
from mla_trt.errors import BadModelError
from mla_trt.interface import Axis, ModelInput, ModelInterface
from mla_trt.passes.graph import from_constants, is_empty, subgraphs

# Ops whose outputs hold the same values elsewhere; the number of leading inputs whose values move (the others are shapes and indices).
MOVES = {
    "Identity": 1,
    "Cast": 1,
    "CastLike": 1,
    "Reshape": 1,
    "Transpose": 1,
    "Unsqueeze": 1,
    "Squeeze": 1,
    "Slice": 1,
    "Expand": 1,
    "Gather": 1,
    "Split": 1,
    "Flatten": 1,
    "Tile": 1,
    "Pad": 1,
    "GatherND": 1,
    "GatherElements": 1,
    "SplitToSequence": 1,
    "SequenceAt": 1,
    "Trilu": 1,
}
JOINS = {"Concat", "ScatterND", "ScatterElements", "Where", "TensorScatter"}
NORM_STARTS = {
    "Pow",
    "ReduceMean",
    "ReduceSumSquare",
    "ReduceL2",
    "RMSNormalization",
    "LayerNormalization",
    "LpNormalization",
}
PRODUCTS = {"MatMul", "Gemm", "Einsum", "MatMulInteger", "QuantizeLinear", "DynamicQuantizeLinear", "Conv"}
# What they give does not depend on their input's values (IsNaN: on no values that a run without a mistake has).
_FREE_OF_DATA = ("Shape", "Size", "IsNaN")
ELEMENTWISE = {"Mul", "Add", "Sub", "Div"}
_PICKS = ("Gather", "GatherND", "GatherElements", "Slice")


def identify_inputs(graph: gs.Graph) -> ModelInterface:
    """Returns the role and the axes of every graph input.

    Raises:
        BadModelError: no input is recognised as the tokens, or an input has no rank.
    """
    for tensor in graph.inputs:
        if tensor.shape is None:
            raise BadModelError(f"input '{tensor.name}' has no rank: export it with the number of its dimensions")
    tokens = next((tensor for lenient in (False, True) for tensor in graph.inputs if _is_tokens(tensor, lenient)), None)
    if tokens is None:
        raise BadModelError(
            "no input is token ids or embeddings: none is looked up in an embedding table or enters a norm or a projection"
        )
    growing = {
        tensor.name: found for tensor in graph.inputs if tensor is not tokens and (found := _next_value(graph, tensor))
    }
    growing |= _recurrent_states(graph, tokens, growing)
    states = [tensor for tensor in graph.inputs if tensor.name in growing]
    data = data_dependent(graph, [tokens, *states])
    second = [tensor for tensor in graph.inputs if tensor is not tokens and _is_second_tokens(tensor, tokens, data)]
    data |= data_dependent(graph, second)
    inputs = []
    for tensor in graph.inputs:
        if tensor is tokens:
            role, output, length_axis = roles.TOKENS, None, None
        elif any(tensor is item for item in second):
            role, output, length_axis = roles.SECOND_TOKENS, None, None
        elif tensor.name in growing:
            output, length_axis = growing[tensor.name]
            role = roles.STATE if length_axis is None else roles.CACHE
        else:
            role, output, length_axis = side_role(tensor, data), None, None
        inputs.append(describe(tensor, role, output, length_axis, tokens))
    return make_interface(graph, inputs)


def make_interface(graph: gs.Graph, inputs: list[ModelInput]) -> ModelInterface:
    """The interface of a graph whose inputs are described."""
    inputs = _tell_cos_from_sin(inputs)
    next_values = {entry.output for entry in inputs if entry.output}
    fixed: dict[str, int] = {}
    for entry, tensor in zip(inputs, graph.inputs, strict=True):
        if entry.role in (roles.TOKENS, roles.CACHE):
            for letter, size in zip(entry.axes, tensor.shape, strict=True):
                if isinstance(letter, str) and (value := static_size(size)) is not None:
                    fixed[letter] = value
    inputs = [_with_own_length(entry, tensor, fixed) for entry, tensor in zip(inputs, graph.inputs, strict=True)]
    return ModelInterface(
        tuple(inputs), tuple(tensor.name for tensor in graph.outputs if tensor.name not in next_values), fixed
    )


def _with_own_length(entry: ModelInput, tensor: gs.Tensor, fixed: dict[str, int]) -> ModelInput:
    """A mask that is as long as it always is, where that is not the number of all tokens."""
    size = static_size(tensor.shape[-1]) if tensor.shape else None
    if size is None or entry.role not in (roles.ATTENTION_MASK, roles.SCORE_MASK) or entry.axes[-1] != "T":
        return entry
    if "S" in fixed and size == fixed["S"] + fixed.get("P", 0):
        return entry
    return replace(entry, axes=(*entry.axes[:-1], size))


def static_size(size: int | str | None) -> int | None:
    """The size of a dimension where it is fixed. Some exporters write constants as text ("32")."""
    if isinstance(size, str):
        return int(size) if size.isdigit() else None
    return int(size) if size is not None and size >= 0 else None


def data_dependent(graph: gs.Graph, sources: list[gs.Tensor], *, selections: bool = False) -> set[int]:
    """Ids of the tensors whose values depend on the values of `sources`. Shapes do not count.

    Args:
        selections: whether the indices of a TopK count. Which keys are selected is data, but what a mask does with any selection is
            not: to read masks, they are left out.
    """
    found = {id(tensor) for tensor in sources}
    queue = deque(sources)
    while queue:
        tensor = queue.popleft()
        for node in tensor.outputs:
            if node.op in _FREE_OF_DATA or (node.op == "CastLike" and node.inputs[0] is not tensor):
                continue
            outputs = node.outputs[:1] if node.op == "TopK" and not selections else node.outputs
            for output in outputs:
                if id(output) not in found:
                    found.add(id(output))
                    queue.append(output)
    for node in graph.nodes:
        for inner in subgraphs(node):
            outer = [tensor for tensor in inner.tensors().values() if id(tensor) in found]
            if outer:
                for output in node.outputs:
                    if id(output) not in found:
                        found |= data_dependent(graph, [output], selections=selections)
    return found


def _is_integer(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and not isinstance(tensor.dtype, int) and np.issubdtype(tensor.dtype, np.integer)


def _is_tokens(tensor: gs.Tensor, lenient: bool) -> bool:
    """Whether a tensor is token ids or embeddings; leniently, embeddings may be summed with others first (learned positions)."""
    if not _is_integer(tensor):
        return tensor.dtype != np.bool_ and len(tensor.shape) >= 2 and _enters_layer(tensor, lenient)
    seen: set[int] = set()
    stack = [tensor]
    while stack:
        current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for node in current.outputs:
            if node.op == "Gather" and len(node.inputs) > 1 and node.inputs[1] is current and _is_table(node.inputs[0]):
                if _enters_layer(node.outputs[0], lenient):
                    return True
            elif (
                node.op in ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Clip", "Flatten")
                and node.inputs[0] is current
            ):
                stack.extend(node.outputs)
    return False


def _is_second_tokens(tensor: gs.Tensor, tokens: gs.Tensor, data: set[int]) -> bool:
    """Whether an input is looked up in a table of embeddings as token ids are, and does nothing else."""
    return (
        _is_integer(tensor)
        and len(tensor.shape) == len(tokens.shape) - (not _is_integer(tokens))
        and _is_tokens(tensor, lenient=True)
        and side_role(tensor, data) == roles.ATTENTION_MASK
        and not any(node.op in ("CumSum", "Equal") for _, node in _descendants(tensor, data))
    )


def _is_table(tensor: gs.Tensor) -> bool:
    while (
        isinstance(tensor, gs.Variable)
        and tensor.inputs
        and tensor.inputs[0].op in ("Identity", "Cast", "DequantizeLinear", "Transpose", "Constant", "Mul")
    ):
        node = tensor.inputs[0]
        if node.op == "Constant":
            return True
        tensor = node.inputs[0]
    return isinstance(tensor, gs.Constant)


def _enters_layer(tensor: gs.Tensor, lenient: bool) -> bool:
    """Whether values enter a norm or a projection as they are, but for casts, scales and changes of shape."""
    seen: set[int] = set()
    stack = [tensor]
    while stack:
        current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for node in current.outputs:
            others = [item for item in node.inputs if item is not current and not is_empty(item)]
            if node.op in NORM_STARTS:
                return True
            if node.op in PRODUCTS and all(from_constants(item) for item in others):
                return True
            if node.op in ("Mul", "Add", "Div", "Sub", "DequantizeLinear") and all(map(from_constants, others)):
                if not others:
                    return True
                stack.extend(node.outputs)
            elif (MOVES.get(node.op) and node.inputs[0] is current) or (lenient and node.op == "Add"):
                stack.extend(node.outputs)
    return False


def _next_value(graph: gs.Graph, tensor: gs.Tensor) -> tuple[str, int | None] | None:
    """The output that is this input's next value, and the axis along which it grows (None: it keeps its size)."""
    if _is_integer(tensor) or tensor.dtype == np.bool_:
        return None
    outputs = {id(output): output for output in graph.outputs}
    seen: set[int] = set()
    stack: list[tuple[gs.Tensor, tuple[int, ...], bool]] = [(tensor, (), False)]
    found: tuple[gs.Tensor, tuple[int, ...], bool] | None = None
    while stack:
        current, joined, cut = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if id(current) in outputs and current is not tensor and (found is None or not found[1]):
            found = current, joined, cut
        for node in current.outputs:
            if node.op in JOINS:
                position = next(index for index, item in enumerate(node.inputs) if item is current)
                if node.op == "Concat":
                    rank = len(tensor.shape)
                    stack.append((node.outputs[0], (*joined, node.attrs["axis"] % rank), cut))
                elif position == 0 or node.op == "Where":
                    stack.append((node.outputs[0], joined, cut))
            elif (
                MOVES.get(node.op)
                and node.inputs[0] is current
                and node.op not in ("Gather", "GatherND", "GatherElements")
            ):
                stack.extend((output, joined, cut or (bool(joined) and node.op == "Slice")) for output in node.outputs)
            elif node.op in (*ELEMENTWISE, "Neg") and all(
                item is current or from_constants(item) for item in node.inputs
            ):
                stack.append((node.outputs[0], joined, cut))
    return None if found is None else (found[0].name, _growing_axis(tensor, *found))


def _growing_axis(tensor: gs.Tensor, output: gs.Tensor, joined: tuple[int, ...], cut: bool) -> int | None:
    """The axis along which an input grows to its next value: one along which the graph joins it with something (`joined`) and whose size is not
    fixed to be the same, or, where axes were moved around before the join, the only one that changes its name. What is of fixed size and
    cut behind the join stays as long as it is: the window of a convolution."""
    if not joined or (cut and all(static_size(tensor.shape[axis]) is not None for axis in joined)):
        return None
    if output.shape is None or len(output.shape) != len(tensor.shape):
        return joined[0]
    sizes = list(zip(tensor.shape, output.shape, strict=True))
    free = [
        axis
        for axis, (before, after) in enumerate(sizes)
        if static_size(before) is None or static_size(before) != static_size(after)
    ]
    changed = [axis for axis in free if sizes[axis][0] != sizes[axis][1]]
    for candidates in ([axis for axis in joined if axis in changed], [axis for axis in joined if axis in free]):
        if candidates:
            return candidates[0]
    return changed[0] if len(changed) == 1 else None


def _recurrent_states(
    graph: gs.Graph, tokens: gs.Tensor, found: dict[str, tuple[str, int | None]]
) -> dict[str, tuple[str, int | None]]:
    """Float inputs of fixed size paired, in order, with the float outputs of the same size that depend on them; where the graph has other states,
    with outputs whose size is not said, too."""
    pairs = _pairs_of_states(graph, tokens, found, exactly=True)
    if any(axis is None for _, axis in (found | pairs).values()):
        pairs |= _pairs_of_states(graph, tokens, found | pairs, exactly=False)
    return pairs


def _pairs_of_states(
    graph: gs.Graph, tokens: gs.Tensor, found: dict[str, tuple[str, int | None]], *, exactly: bool
) -> dict[str, tuple[str, int | None]]:
    taken = {output for output, _ in found.values()}
    pairs: dict[str, tuple[str, int | None]] = {}
    for tensor in graph.inputs:
        if (
            tensor is tokens
            or tensor.name in found
            or _is_integer(tensor)
            or tensor.dtype == np.bool_
            or len(tensor.shape) < 2
        ):
            continue
        sizes = [static_size(size) for size in tensor.shape[1:]]
        if None in sizes:
            continue
        reached = data_dependent(graph, [tensor])
        for output in graph.outputs:
            if output.name in taken or id(output) not in reached or output.shape is None:
                continue
            after = [static_size(size) for size in output.shape[1:]]
            if after == sizes or (
                not exactly
                and len(after) == len(sizes)
                and all(size in (None, before) for size, before in zip(after, sizes, strict=True))
            ):
                pairs[tensor.name] = (output.name, None)
                taken.add(output.name)
                break
    return pairs


def _descendants(tensor: gs.Tensor, data: set[int]) -> Iterator[tuple[gs.Tensor, gs.Node]]:
    """(tensor, consumer) pairs reachable without passing data: what an input of positions or masks does before it meets data."""
    seen: set[int] = set()
    stack = [tensor]
    while stack:
        current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for node in current.outputs:
            yield current, node
            if node.op not in ("Shape", "Size"):
                stack.extend(output for output in node.outputs if id(output) not in data)


def side_role(tensor: gs.Tensor, data: set[int]) -> str:
    """The role of an input that is no data (`data`: ids of the tensors that are)."""
    uses = [(current, node) for current, node in _descendants(tensor, data) if node.op not in ("Shape", "Size")]
    if not uses:
        return roles.UNUSED
    products = ("Mul", "MatMul", "Einsum")  # of rotation matrices the latter
    multiplies = any(node.op in products and any(id(item) in data for item in node.inputs) for _, node in uses)
    integer = _is_integer(tensor)
    if integer and (picks := _picks_results(uses, data)):
        return picks
    if not integer and tensor.dtype != np.bool_:
        return roles.ROPE_COS if multiplies else roles.SCORE_MASK
    if tensor.dtype == np.bool_:
        return roles.ATTENTION_MASK if len(tensor.shape) <= 2 else roles.SCORE_MASK
    if any(node.op == "CumSum" for _, node in uses) or _zeroes_data(tensor, data):
        return roles.ATTENTION_MASK
    if multiplies or any(node.op in ("Cos", "Sin") or _chooses_rows(current, node, data) for current, node in uses):
        return roles.POSITIONS
    if len(tensor.shape) > 2:
        return roles.SCORE_MASK
    first = [node for node in tensor.outputs if node.op not in ("Shape", "Size")]
    as_truth = any(_becomes_truth(tensor, node) for node in first)
    compared = any(node.op in ("LessOrEqual", "Less", "Greater", "GreaterOrEqual") for _, node in uses)
    return roles.POSITIONS if compared and not as_truth else roles.ATTENTION_MASK


def _picks_results(uses: list[tuple[gs.Tensor, gs.Node]], data: set[int]) -> str | None:
    """The role of an input that does nothing but choose tokens behind the last attention; None for any other."""
    meets = [(current, node) for current, node in uses if any(id(output) in data for output in node.outputs)]
    if not meets or any(node.op not in _PICKS or current is node.inputs[0] for current, node in meets):
        return None
    if any(_reaches_softmax(node) for _, node in meets):
        return None  # a length that cuts a cache to size, say
    return roles.TOKEN_COUNT if all(node.op == "Slice" for _, node in meets) else roles.TOKEN_INDEX


def _reaches_softmax(start: gs.Node) -> bool:
    seen: set[int] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if node.op in ("Softmax", "Attention"):
            return True
        if id(node) not in seen:
            seen.add(id(node))
            stack.extend(reader for output in node.outputs for reader in output.outputs)
    return False


def _zeroes_data(tensor: gs.Tensor, data: set[int]) -> bool:
    """Whether the values multiply data as they are: a mask that blanks padding tokens."""
    stack = [tensor]
    while stack:
        for node in (current := stack.pop()).outputs:
            if node.op == "Mul" and any(id(item) in data for item in node.inputs):
                return True
            if MOVES.get(node.op) and node.inputs[0] is current:
                stack.extend(node.outputs)
    return False


def is_only_compared(tensor: gs.Tensor, data: set[int]) -> bool:
    """Whether nothing is rotated by the values or written where they say: they tell how far a mask reaches."""
    return not any(
        node.op in ("Cos", "Sin") or _chooses_rows(current, node, data) for current, node in _descendants(tensor, data)
    )


def _chooses_rows(tensor: gs.Tensor, node: gs.Node, data: set[int]) -> bool:
    """Whether a node writes data where the values say."""
    if node.op in ("ScatterND", "ScatterElements"):
        return node.inputs[1] is tensor and id(node.inputs[2]) in data
    if node.op == "TensorScatter":
        return len(node.inputs) > 2 and node.inputs[2] is tensor
    return node.op == "Where" and node.inputs[0] is tensor and all(id(item) in data for item in node.inputs[1:])


def _becomes_truth(tensor: gs.Tensor, node: gs.Node) -> bool:
    """Whether a consumer uses the values as truth values or as numbers 0 and 1."""
    if node.op == "Cast":
        return node.attrs["to"] in (
            onnx.TensorProto.BOOL,
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.FLOAT16,
            onnx.TensorProto.BFLOAT16,
        )
    if node.op in ("Identity", "Unsqueeze", "Reshape", "Slice", "Expand", "Squeeze"):
        return any(_becomes_truth(node.outputs[0], inner) for inner in node.outputs[0].outputs)
    return node.op in ("Equal", "Not", "Where")


def describe(
    tensor: gs.Tensor, role: str, output: str | None, length_axis: int | None, tokens: gs.Tensor, length: str = "P"
) -> ModelInput:
    """An input with its axes.

    Args:
        tensor: the input.
        role: its role.
        output: name of the output that holds its next value.
        length_axis: the axis of a cache's rows; None where it is no cache.
        tokens: the input of the tokens.
        length: letter of the axis of a cache's rows.
    """
    batched = len(tokens.shape) - (not _is_integer(tokens)) == 2
    shape = [static_size(size) if static_size(size) is not None else size for size in tensor.shape]
    rank = len(shape)
    axes: list[Axis] = [size if isinstance(size, int) else "?" for size in shape]
    if role in (roles.TOKENS, roles.SECOND_TOKENS):
        letters = ["B", "S"] if batched else ["S"]
        axes[: len(letters)] = letters
    elif role == roles.UNUSED:  # but its shape may be read: of token ids beside embeddings
        known = dict(zip(tokens.shape, ["B", "S"] if batched else ["S"], strict=False))
        axes = [size if isinstance(size, int) else known.get(size, "?") for size in shape]
    elif role == roles.POSITIONS and rank:
        axes[-1] = _positions_axis(tensor, tokens, batched)
        if rank >= 2:
            axes[-2] = 1 if shape[-2] == 1 else "B"
    elif role == roles.ATTENTION_MASK and rank:
        axes[-1] = "T"
        if rank >= 2:
            axes[-2] = 1 if shape[-2] == 1 else "B"
    elif role == roles.TOKEN_INDEX and rank and not isinstance(shape[-1], int):
        axes[-1] = "B" if batched and shape[-1] == tokens.shape[0] else "S"
    elif role == roles.SCORE_MASK and rank >= 2:
        axes[-2:] = ["S", "T"]
        if rank >= 3:
            axes[0] = 1 if shape[0] == 1 else "B"
            axes[1:-2] = [size if isinstance(size, int) else 1 for size in shape[1:-2]]
    elif role == roles.ROPE_COS and rank >= 2:
        width = (
            max(index for index in range(rank) if isinstance(shape[index], int))
            if any(isinstance(s, int) for s in shape)
            else rank - 1
        )
        free = [index for index in range(rank) if index != width and shape[index] != 1]
        if free:
            axes[free[-1]] = "S"
            for index in free[:-1]:
                axes[index] = "B"
    elif role in (roles.CACHE, roles.STATE) and rank:
        if batched:
            candidates = [axis for axis in range(rank) if axis != length_axis]
            varying = [axis for axis in candidates if not isinstance(shape[axis], int)]
            if candidates:
                axes[(varying or candidates)[0]] = "B"
        if length_axis is not None:
            axes[length_axis] = length
    dtype = (
        tensor.dtype if isinstance(tensor.dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    )
    return ModelInput(tensor.name, role, dtype, tuple(axes), output)


def _positions_axis(tensor: gs.Tensor, tokens: gs.Tensor, batched: bool) -> Axis:
    """The last axis of positions: that of the new tokens, or another where only the first one's position is given."""
    size = tensor.shape[-1]
    sequences, new = (tokens.shape[0], tokens.shape[1]) if batched else (None, tokens.shape[0])
    if static_size(size) == 1 and static_size(new) != 1:
        return 1
    return "B" if len(tensor.shape) == 1 and size == sequences and size != new else "S"


def _tell_cos_from_sin(inputs: list[ModelInput]) -> list[ModelInput]:
    tables = [entry for entry in inputs if entry.role == roles.ROPE_COS]
    named = [entry for entry in tables if "sin" in entry.name.lower()]
    sines = {entry.name for entry in named} if named else {entry.name for entry in tables[1::2]}
    return [
        ModelInput(entry.name, roles.ROPE_SIN, entry.dtype, entry.axes, entry.output) if entry.name in sines else entry
        for entry in inputs
    ]
