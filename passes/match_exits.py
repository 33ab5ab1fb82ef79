"""Follows an attention's result to where it leaves: through W_UV where the graph applies it afterwards, and through data movement."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt.passes.attention_core import AttentionCore, NoMatch
from mla_trt.passes.contraction import contraction, operands
from mla_trt.passes.features import UpProjection
from mla_trt.passes.graph import from_constants, is_empty, producer
from mla_trt.passes.match_latent import Latent
from mla_trt.passes.match_mask import far_cases
from mla_trt.passes.probe import Probe, ProbeError


@dataclass(frozen=True)
class Exit:
    """A tensor through which the result leaves. `axes` names what each of its axes is made of, in order: b, s, h, d; "" is an axis of size 1."""

    tensor: gs.Tensor
    axes: tuple[str, ...]

    @property
    def order(self) -> str:
        """The order of b, s, h and d."""
        return "".join(self.axes)


def read_exits(
    probe: Probe, core: AttentionCore, rows: np.ndarray, latent: Latent
) -> tuple[tuple[Exit, ...], UpProjection | None]:
    """Follows the result to where it is no longer only moved, through W_UV where the graph applies it after the attention."""
    place = core.output_place[rows][..., latent.values]  # [B, S, H, d]
    exits, products, measured = _follow(probe, core.output)
    if latent.expanded:
        return _describe_exits(probe, exits, measured, core.output, place), None
    up = None
    order = None
    for node in products:
        found = _read_w_uv(probe, node, core.output, place, latent)
        if found is not None:
            if up is not None:
                raise NoMatch("the result meets two different W_UV", node)
            up, order = found, node
    if up is None or order is None:
        return _describe_exits(probe, exits, measured, core.output, place), None
    projection, after = up
    if len(exits) > 1 or any(
        reader is not order for tensor in exits for reader in tensor.outputs if reader.op not in ("Shape", "Size")
    ):
        raise NoMatch("the result before W_UV is used elsewhere too", order)
    later, _, measured = _follow(probe, order.outputs[0])
    return _describe_exits(probe, later, measured, order.outputs[0], after), projection


def _describe_exits(
    probe: Probe, exits: list[gs.Tensor], measured: list[gs.Tensor], result: gs.Tensor, place: np.ndarray
) -> tuple[Exit, ...]:
    """Exits, and tensors on the way of which only the shape is read: it may be needed behind the attention too."""
    found = [_describe_exit(probe, tensor, result, place) for tensor in exits]
    for tensor in measured:
        try:
            found.append(_describe_exit(probe, tensor, result, place))
        except NoMatch:
            continue  # then the shape has to be that of what is dropped, or drop_inputs says what is missing
    return tuple(found)


def _follow(probe: Probe, start: gs.Tensor) -> tuple[list[gs.Tensor], list[gs.Node], list[gs.Tensor]]:
    """Tensors that only move the elements of `start`: those used by something else, the products with constants among their users, and those of
    which nothing but the shape is used."""
    exits: list[gs.Tensor] = []
    products: list[gs.Node] = []
    measured: list[gs.Tensor] = []
    queue = deque([start])
    while queue:
        tensor = queue.popleft()
        leaves = tensor in probe.graph.outputs
        has_size = False
        for node in tensor.outputs:
            if node.op in ("Shape", "Size"):
                has_size = True
                continue
            pair = operands(node)
            if pair is not None and any(probe.is_known(item) for item in pair):
                products.append(node)
                leaves = True
            elif probe.is_transparent(node) and _only_moves(probe, node, start):
                queue.extend(node.outputs)
            else:
                leaves = True
        if leaves:
            exits.append(tensor)
        elif has_size:
            measured.append(tensor)
    return exits, products, measured


def _only_moves(probe: Probe, node: gs.Node, start: gs.Tensor) -> bool:
    if node.op in ("Add", "Sub", "Sum", "Concat", "Cast") and node.op != "Cast":
        return False
    linear = probe.linear(node.outputs[0])
    return (
        len(linear.terms) == 1
        and bool((linear.terms[0].codes >= 2).all())
        and np.allclose(linear.terms[0].coefficients, 1)
        and _lets_pass(probe, node)
    )


def _lets_pass(probe: Probe, node: gs.Node) -> bool:
    """Whether what chooses or scales the result by positions or masks (a guard of rows that see no key) leaves it alone in long contexts and
    prompts too."""
    guards = [item for item in node.inputs if not is_empty(item) and probe.is_known(item) and not from_constants(item)]
    if node.op == "Where":
        guards = [item for item in guards if item is node.inputs[0]]
    elif node.op not in ("Mul", "Div"):
        return True
    for guard in guards:
        passing = probe.known(guard).reshape(-1)[0]
        for cases in far_cases(probe):
            values = next(
                (values for sizes in cases if (values := _known(probe.of_sizes(sizes), guard)) is not None), None
            )
            if values is not None and not np.allclose(values, passing):
                return False
    return True


def _known(probe: Probe, tensor: gs.Tensor) -> np.ndarray | None:
    """A tensor's values; None where the export does not take a case of these sizes."""
    try:
        return probe.known(tensor)
    except ProbeError:
        return None


def _read_w_uv(
    probe: Probe, node: gs.Node, result: gs.Tensor, place: np.ndarray, latent: Latent
) -> tuple[UpProjection, np.ndarray] | None:
    view = contraction(probe, node)
    if view is None or math.prod(view.groups) <= 1:
        return None
    right = probe.is_known(view.right)
    data = probe.linear(view.left if right else view.right)
    arranged = (view.left_linear if right else view.right_linear)(data).terms[0].codes  # [G, M, K]
    numbers, flat = probe.owners(arranged)
    if not (numbers == numbers.reshape(-1)[0]).all() or probe.owner(int(numbers.reshape(-1)[0])) is not result:
        return None
    where = np.full(math.prod(probe.shape(result)), -1, np.int64)
    where[flat.reshape(-1)] = np.arange(flat.size)
    found = where[place]  # [B, S, H, R] flat into [G, M, K]
    _, rows_count, width = arranged.shape
    if (found < 0).any():
        return None
    group, row, summed = found // (rows_count * width), found // width % rows_count, found % width
    if not (
        (group == group[:1, :1, :, :1]).all() and (row == row[..., :1]).all() and (summed == summed[:1, :1, :1]).all()
    ):
        return None
    outputs = math.prod(view.columns if right else view.rows)
    inverse = np.empty(view.place.size, np.int64)
    inverse[view.place.reshape(-1)] = np.arange(view.place.size)
    column = np.arange(outputs)
    if right:
        after = inverse[(group[..., :1] * rows_count + row[..., :1]) * outputs + column]
    else:
        after = inverse[(group[..., :1] * outputs + column) * rows_count + row[..., :1]]
    operand = view.right if right else view.left
    # The value's dimension d is the latent's entry d, in the order in which the latent was read.
    return UpProjection(
        operand,
        view,
        right,
        group[0, 0, :, :1, None],
        column[None, :, None],
        summed[0, 0, 0][None, None, :],
        np.ones((1, 1, 1)),
    ), after


def _describe_exit(probe: Probe, tensor: gs.Tensor, result: gs.Tensor, place: np.ndarray) -> Exit:
    """The layout of an exit: which of the axes b, s, h, d it has in which order."""
    codes = probe.linear(tensor).terms[0].codes
    numbers, flat = probe.owners(codes)
    where = np.full(math.prod(probe.shape(result)), -1, np.int64)
    where[place.reshape(-1)] = np.arange(place.size)
    canonical = where[flat]
    plain = np.arange(place.size).reshape(place.shape)
    if (numbers > 0).all() and probe.owner(int(numbers.reshape(-1)[0])) is result and canonical.size == place.size:
        for order in ("bshd", "bhsd", "hbsd", "sbhd", "bsdh", "bhds", "shbd", "bdsh", "bdhs"):
            moved = plain.transpose(["bshd".index(axis) for axis in order])
            if np.array_equal(moved.reshape(-1), canonical.reshape(-1)):
                axes = _merge(order, dict(zip("bshd", place.shape, strict=True)), codes.shape)
                if axes is not None:
                    return Exit(tensor, axes)
    raise NoMatch(f"the result leaves through '{tensor.name}' in a layout that is not understood", producer(tensor))


def _merge(order: str, sizes: dict[str, int], shape: tuple[int, ...]) -> tuple[str, ...] | None:
    """Which axes were merged into each axis of a shape; None where one of them was cut."""
    left = list(order)
    found = []
    for size in shape:
        merged, names = 1, ""
        while left and merged * sizes[left[0]] <= size and (merged < size or sizes[left[0]] == 1):
            merged *= sizes[left[0]]
            names += left.pop(0)
        if merged != size:
            return None
        found.append(names)
    if any(sizes[axis] != 1 for axis in left):
        return None
    return (*found[:-1], found[-1] + "".join(left)) if found else None
