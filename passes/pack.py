"""Makes what is left around the lowered layers run on packed tokens: inputs, results, and shapes that the export read from caches or fixed."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt import interface as roles
from mla_trt.errors import NoMlaError
from mla_trt.interface import Axis
from mla_trt.passes.graph import (
    Emitter,
    from_constants,
    is_empty,
    outer_inputs,
    producer,
    remove_dead_nodes,
    replace_uses,
    topological,
)
from mla_trt.passes.identify_inputs import static_size
from mla_trt.passes.positions import (
    BY_SEQUENCE,
    ELEMENTWISE_OPS,
    UNPACKED,
    CannotRebuild,
    PackedPositions,
    packed_sizes,
)
from mla_trt.passes.probe import Probe, ProbeError

_FEEDS_LOGITS = ("MatMul", "Gemm", "Einsum")


def drop_old_caches(graph: gs.Graph, probe: Probe, others: set[str]) -> None:
    """Takes the next values of caches and of counted positions, and `others`, off the outputs, and with them what only they needed."""
    gone = others | {entry.output for entry in probe.interface.inputs if entry.role in (roles.CACHE, roles.POSITIONS)}
    graph.outputs[:] = [tensor for tensor in graph.outputs if tensor.name not in gone]
    remove_dead_nodes(graph)


def check_results(results: list[gs.Tensor], probes: list[Probe]) -> None:
    """Refuses results that packed tokens cannot have, such as scores, which have a row for each pair of tokens.

    Logits, whose shape tells that they are rows, are not looked at: their size on a case costs a pass through all layers.

    Raises:
        NoMlaError: a result's size is no multiple of the number of tokens or sequences.
    """
    for tensor in results:
        if tensor.shape is not None and len(tensor.shape) in (2, 3) and static_size(tensor.shape[-1]) is not None:
            continue
        try:
            sizes = [math.prod(probe.shape(tensor)) for probe in probes]
        except ProbeError:
            continue
        tokens = {Fraction(size, probe.batch * probe.sizes.new) for size, probe in zip(sizes, probes, strict=True)}
        sequences = {Fraction(size, probe.batch) for size, probe in zip(sizes, probes, strict=True)}
        if len(tokens) > 1 and len(sequences) > 1:
            raise NoMlaError(
                f"the result '{tensor.name}' does not have one row of a fixed size for each token: export the model without it"
            )


def check_mixed_tokens(graph: gs.Graph, probe: Probe) -> None:
    """Refuses convolutions over tokens in a model that takes no state: packed, the sequences of a batch would run into each other.

    Raises:
        NoMlaError: there is one.
    """
    if probe.interface.by_role(roles.STATE):
        return
    for node in graph.nodes:
        if node.op != "Conv" or node.domain or id(node.inputs[0]) not in probe.data:
            continue
        try:
            sequences, kernel = probe.shape(node.inputs[0])[0], probe.shape(node.inputs[1])[2:]
        except ProbeError:
            continue
        if sequences == probe.batch and max(kernel, default=1) > 1:
            raise NoMlaError(
                f"node '{node.name}' (Conv) mixes neighbouring tokens, as recurrent layers do, and the recurrent state is neither an input nor "
                "an output of the model: export it with that state, as for decoding"
            )


def keep_all_tokens(graph: gs.Graph, probe: Probe, emitter: Emitter) -> int:
    """Removes what picks one token's row, or those that an input names, before the results; returns how many such nodes there were."""
    removed = 0
    named = _named_tokens(graph, probe)
    for node in list(graph.nodes):
        if (
            node.op not in ("Gather", "Slice", "GatherND", "GatherElements")
            or node.domain
            or probe.is_known(node.inputs[0])
            or not probe.is_known(node.inputs[1])
        ):
            continue
        if any(id(item) in named for item in node.inputs[1:]) and _keeps_all(probe, node):
            replace_uses(graph, node.outputs[0], node.inputs[0])
            removed += 1
            continue
        if probe.sizes.new < 2:
            continue
        try:
            before, after = probe.shape(node.inputs[0]), probe.shape(node.outputs[0])
        except ProbeError:
            continue
        tokens = probe.batch * probe.sizes.new
        if (
            len(before) < 2
            or math.prod(before[:-1]) != tokens
            or math.prod(after) != probe.batch * before[-1]
            or after[-1] != before[-1]
        ):
            continue
        codes = probe.linear(node.outputs[0]).terms[0].codes.reshape(probe.batch, -1)
        source = probe.linear(node.inputs[0]).terms[0].codes.reshape(probe.batch, probe.sizes.new, -1)
        if not np.array_equal(codes, source[:, -1]):
            continue
        kept = (
            node.inputs[0]
            if len(after) == len(before)
            else emitter.reshape(node.inputs[0], [-1, before[-1]], f"{node.outputs[0].name}.all_tokens")
        )
        shapes = _later_shapes(node.outputs[0], probe)
        replace_uses(graph, node.outputs[0], kept)
        for reader, shape in shapes:
            rows = shape.index(probe.batch)
            target = [-1 if axis == rows else size for axis, size in enumerate(shape)]
            reader.inputs[1] = emitter.constant(f"{reader.outputs[0].name}.all_tokens", target, np.int64)
            reader.attrs["allowzero"] = 0
        removed += 1
    return removed


def _later_shapes(rows: gs.Tensor, probe: Probe) -> list[tuple[gs.Node, tuple[int, ...]]]:
    """The Reshapes behind one row for each sequence, with their results' shapes, where those keep rows and features apart."""
    found = []
    width = probe.shape(rows)[-1]
    for reader in rows.outputs:
        if reader.op == "Reshape" and reader.inputs[0] is rows and probe.is_known(reader.inputs[1]):
            shape = probe.shape(reader.outputs[0])
            if shape[-1] == width and probe.batch in shape[:-1]:
                found += [(reader, shape), *_later_shapes(reader.outputs[0], probe)]
    return found


def _named_tokens(graph: gs.Graph, probe: Probe) -> set[int]:
    """Ids of what is made from the inputs that name tokens, before it meets data."""
    chosen = {entry.name for role in (roles.TOKEN_INDEX, roles.TOKEN_COUNT) for entry in probe.interface.by_role(role)}
    stack = [tensor for tensor in graph.inputs if tensor.name in chosen]
    found = {id(tensor) for tensor in stack}
    while stack:
        for node in stack.pop().outputs:
            for output in node.outputs:
                if probe.is_known(output) and id(output) not in found:
                    found.add(id(output))
                    stack.append(output)
    return found


def _keeps_all(probe: Probe, node: gs.Node) -> bool:
    try:
        before, after = probe.linear(node.inputs[0]), probe.linear(node.outputs[0])
    except ProbeError:
        return False
    return before.shape == after.shape and np.array_equal(before.terms[0].codes, after.terms[0].codes)


def keep_last_tokens(
    graph: gs.Graph, probe: Probe, emitter: Emitter, query_offsets: gs.Tensor, results: list[gs.Tensor]
) -> None:
    """Makes the results those of each sequence's last token; rows of empty sequences become 0."""
    e = emitter
    ends = _slice(e, query_offsets, 1, np.iinfo(np.int64).max, 0, "sequence_ends")
    starts = _slice(e, query_offsets, 0, -1, 0, "sequence_starts")
    empty = e.node("Equal", [ends, starts], "sequence_is_empty", dtype=np.dtype(np.bool_))
    last = e.node("Sub", [ends, e.constant("one_token", [1], np.int32)], "last_tokens")
    last = e.node("Max", [last, e.constant("first_token", [0], np.int32)], "last_tokens")
    places = [(result, *_last_projection(probe, result), len(probe.shape(result))) for result in results]
    for result, source, axis, rank in places:
        picked = e.node("Gather", [source, last], f"{source.name}.last", axis=axis)
        for reader in list(source.outputs):
            if reader.op in _FEEDS_LOGITS and _reaches(reader, result):
                reader.inputs[0] = picked
        mask = e.reshape(empty, [-1 if index == axis else 1 for index in range(rank)], f"{result.name}.empty")
        zero = e.node(
            "CastLike",
            [e.constant(f"{result.name}.zero", 0.0, np.float32), result],
            f"{result.name}.zero",
            dtype=result.dtype,
        )
        position = graph.outputs.index(result)
        name, result.name = result.name, e.names.new(f"{result.name}.last")
        masked = gs.Variable(name, dtype=result.dtype, shape=result.shape)
        graph.nodes.append(
            gs.Node("Where", e.names.new(f"{name}/Where"), inputs=[mask, zero, result], outputs=[masked])
        )
        graph.outputs[position] = masked


def _slice(e: Emitter, tensor: gs.Tensor, start: int, end: int, axis: int, wish: str) -> gs.Tensor:
    return e.node(
        "Slice", [tensor, *(e.constant(f"{wish}.bound", [value], np.int64) for value in (start, end, axis))], wish
    )


def _last_projection(probe: Probe, result: gs.Tensor) -> tuple[gs.Tensor, int]:
    """What enters the projection that makes a result, and its packed token axis."""
    tensor = result
    for _ in range(32):
        node = producer(tensor)
        if node is None:
            break
        data = [item for item in node.inputs if not is_empty(item) and not probe.is_known(item)]
        if len(data) != 1:
            break
        tensor = data[0]
        if node.op in _FEEDS_LOGITS:
            return tensor, len(probe.shape(tensor)) - 2
    raise NoMlaError(f"--logits last: no projection is found before the result '{result.name}': use --logits all")


def _reaches(node: gs.Node, result: gs.Tensor) -> bool:
    stack = list(node.outputs)
    seen: set[int] = set()
    while stack:
        tensor = stack.pop()
        if tensor is result:
            return True
        if id(tensor) not in seen and len(seen) < 64:
            seen.add(id(tensor))
            stack.extend(output for reader in tensor.outputs for output in reader.outputs)
    return False


def rebuild_side_tensors(graph: gs.Graph, probe: Probe, packed: PackedPositions, stays: frozenset[str]) -> int:
    """Gives packed positions to what still depends on positions beside the attention (a scale by position, say); returns how many."""
    moved = (roles.POSITIONS, roles.LENGTHS, roles.ATTENTION_MASK, roles.SCORE_MASK)
    tainted = {
        id(tensor)
        for tensor, entry in zip(graph.inputs, probe.interface.inputs, strict=False)
        if entry.role in moved and entry.role not in stays
    }
    changed = 0
    for node in topological(graph.nodes):
        if node.domain == "mla_trt" or node.op in ("Shape", "Size"):
            continue
        if node.op in ELEMENTWISE_OPS and not all(probe.is_known(output) for output in node.outputs):
            # What is made from ranges and sizes alone follows positions too, though no input tells so.
            tainted.update(id(item) for item in node.inputs if _follows_tokens(item, probe, packed))
        if not any(id(item) in tainted for item in outer_inputs(node)):
            continue
        if all(probe.is_known(output) for output in node.outputs):
            tainted.update(id(output) for output in node.outputs)
            continue
        for index, item in enumerate(node.inputs):
            if id(item) in tainted:
                try:
                    node.inputs[index] = packed.rebuild(item)
                except CannotRebuild as error:
                    raise NoMlaError(
                        f"node '{node.name}' ({node.op}) outside the attention uses '{item.name}', which packed tokens do not have: {error}"
                    ) from None
                changed += 1
    for tensor in graph.outputs:
        if id(tensor) in tainted:
            raise NoMlaError(
                f"the result '{tensor.name}' is made from positions or masks alone, which packed tokens do not have: export the model without it"
            )
    return changed


def _follows_tokens(tensor: gs.Tensor, probe: Probe, packed: PackedPositions) -> bool:
    return (
        not is_empty(tensor)
        and probe.is_known(tensor)
        and producer(tensor) is not None
        and not from_constants(tensor)
        and packed.varies(tensor)
    )


def replace_lost_shapes(
    graph: gs.Graph, probe: Probe, emitter: Emitter, tokens: gs.Tensor, stays: frozenset[str]
) -> int:
    """Sizes that the export read off caches, positions or masks are read off the tokens; returns how many there were."""
    gone = {entry.name: entry for entry in probe.interface.inputs if entry.role not in stays}
    count = 0
    for node in list(graph.nodes):
        if node.op != "Shape" or node.domain or node.inputs[0].name not in gone or node.inputs[0] not in graph.inputs:
            continue
        axes = gone[node.inputs[0].name].axes[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
        # Around the attention nothing is cached: T and L are S, P is 0, and the sequences of an input without that axis are one.
        known = probe.interface.tokens.axes
        nearby: dict[Axis, Axis] = {"T": "S", "L": "S", "P": 0}
        axes = tuple(nearby.get(axis, axis) for axis in axes)
        axes = tuple(1 if isinstance(axis, str) and axis not in known else axis for axis in axes)
        replace_uses(
            graph,
            node.outputs[0],
            packed_sizes(emitter, tokens, probe.interface, axes, f"{node.outputs[0].name}.packed"),
        )
        count += 1
    remove_dead_nodes(graph)
    return count


def free_fixed_shapes(graph: gs.Graph, probe: Probe, emitter: Emitter, layout: str) -> int:
    """Where the export fixed its token axes, target shapes and constants that spell them out let them vary; returns how many were changed."""
    fixed = probe.interface.fixed
    if layout == UNPACKED or ("S" not in fixed and "B" not in fixed):
        return 0
    token_sizes = (-1, 1) if layout == BY_SEQUENCE else (1, -1)
    changed = 0
    for node in list(graph.nodes):
        if node.domain or not any(id(output) in probe.data for output in node.outputs):
            continue
        try:
            if node.op in ("Reshape", "Expand"):
                changed += _free_target(node, probe, emitter, token_sizes)
            elif node.op in ("ScatterElements", "ScatterND"):
                changed += sum(_free_scattered(node, index, probe, emitter) for index in (0, 2))
            elif node.op in ELEMENTWISE_OPS:
                changed += sum(_free_operand(node, index, probe, emitter) for index in range(len(node.inputs)))
        except ProbeError:
            continue
    return changed


def _free_target(node: gs.Node, probe: Probe, emitter: Emitter, token_sizes: tuple[int, int]) -> int:
    """Lets the token axes of a Reshape's or Expand's target vary."""
    if len(node.inputs) < 2 or not probe.is_known(node.inputs[1]) or id(node.outputs[0]) not in probe.data:
        return 0
    tokens = probe.batch * probe.sizes.new
    before, after = list(probe.shape(node.inputs[0])), list(probe.shape(node.outputs[0]))
    target = _free(after, probe.batch, probe.sizes.new, token_sizes)
    if target is None and node.op == "Reshape":
        target = _free_merged(before, after, probe.batch, probe.sizes.new)
    if target is None or math.prod(probe.shape(node.inputs[0])) % max(tokens, 1):
        return 0
    if node.op == "Expand":
        target = [1 if size == -1 else size for size in target]
    node.inputs[1] = emitter.constant(f"{node.outputs[0].name}.packed_shape", target, np.int64)
    if node.op == "Reshape":
        node.attrs["allowzero"] = 0
    return 1


def _free_scattered(node: gs.Node, index: int, probe: Probe, emitter: Emitter) -> int:
    """A scatter's constant data or updates, the same for every token, are expanded to as many tokens as the indices have."""
    tensor, indices = node.inputs[index], node.inputs[1]
    if not probe.is_known(tensor) or probe.is_known(indices):
        return 0
    values = np.asarray(probe.known(tensor))
    if (
        not values.ndim
        or values.shape[0] != probe.batch * probe.sizes.new
        or probe.shape(indices)[0] != values.shape[0]
        or (values != values[:1]).any()
    ):
        return 0
    wish = f"{node.outputs[0].name}.for_each_token"
    row = emitter.constant(f"{wish}.row", values[:1])
    count = emitter.node("Shape", [indices], f"{wish}.count", dtype=np.dtype(np.int64), start=0, end=1)
    shape = emitter.node(
        "Concat", [count, emitter.constant(f"{wish}.rest", list(values.shape[1:]), np.int64)], f"{wish}.shape", axis=0
    )
    node.inputs[index] = emitter.node("Expand", [row, shape], wish)
    return 1


def _free_operand(node: gs.Node, index: int, probe: Probe, emitter: Emitter) -> int:
    """A constant that spells out one row for each token, all alike, is one row that broadcasts."""
    tensor = node.inputs[index]
    if is_empty(tensor) or not probe.is_known(tensor):
        return 0
    shape = probe.shape(tensor)
    tokens = probe.batch * probe.sizes.new
    axes = (
        1
        if shape and shape[0] == tokens
        else 2
        if len(shape) > 1 and shape[:2] == (probe.batch, probe.sizes.new)
        else 0
    )
    if not axes or tokens == 1 or math.prod(shape) > 1 << 20 or len(shape) < 2:
        return 0
    values = np.asarray(probe.known(tensor))
    first = values[:1] if axes == 1 else values[:1, :1]
    if (values != first).any():
        return 0
    node.inputs[index] = emitter.constant(f"{tensor.name}.row", first)
    return 1


def _free(shape: list[int], batch: int, new: int, token_sizes: tuple[int, int]) -> list[int] | None:
    """A shape that starts with the token axes, with those free."""
    if len(shape) >= 2 and shape[0] == batch and shape[1] == new:
        return [*token_sizes, *shape[2:]]
    if shape and shape[0] == batch * new:
        return [-1, *shape[1:]]
    if len(shape) >= 3 and shape[0] == batch and shape[2] == new:
        return [token_sizes[0], shape[1], token_sizes[1], *shape[3:]]
    return None


def _free_merged(before: list[int], after: list[int], batch: int, new: int) -> list[int] | None:
    """The shape after leading token axes were merged with what follows them (each token's experts, say), with that axis free."""
    leading = 2 if before[:2] == [batch, new] else 1
    if len(before) <= leading or not after or math.prod(before[:leading]) != batch * new:
        return None
    merged = {math.prod(before[:count]) for count in range(leading + 1, len(before) + 1)}
    return [-1, *after[1:]] if after[0] in merged else None


def drop_inputs(graph: gs.Graph, probe: Probe, stays: frozenset[str]) -> None:
    """Removes the inputs that the lowered model does not have.

    Raises:
        NoMlaError: something outside the lowered layers still reads one.
    """
    used = {id(item): node for node in graph.nodes for item in outer_inputs(node)}
    roles_by_name = {entry.name: entry.role for entry in probe.interface.inputs}
    for tensor in list(graph.inputs):
        role = roles_by_name.get(tensor.name)
        if role is None or (role in stays and (role != roles.ATTENTION_MASK or id(tensor) in used)):
            continue
        if id(tensor) in used:
            node = used[id(tensor)]
            raise NoMlaError(
                f"node '{node.name}' ({node.op}) outside the attention uses '{tensor.name}', which the lowered model does not have"
            )
        graph.inputs.remove(tensor)
