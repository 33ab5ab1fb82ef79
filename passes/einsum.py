"""Reads Einsum equations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mla_trt.errors import BadModelError


def einsum_labels(equation: str | bytes, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """The labels of each operand's axes and of the result's.

    An ellipsis may stand for different numbers of axes in different operands, which then broadcast from the right.

    Args:
        equation: as ONNX has it, with or without an arrow.
        ranks: of the operands.

    Raises:
        BadModelError: the equation does not fit the ranks.
    """
    text = (equation.decode() if isinstance(equation, bytes) else equation).replace(" ", "")
    left, arrow, right = text.partition("->")
    parts = left.split(",")
    if len(parts) != len(ranks):
        raise BadModelError(f"the Einsum equation '{text}' is for {len(parts)} operands, not {len(ranks)}")
    hidden = [rank - len(part.replace("...", "")) for part, rank in zip(parts, ranks, strict=True)]
    if any(count < 0 or (count and "..." not in part) for part, count in zip(parts, hidden, strict=True)):
        raise BadModelError(f"the Einsum equation '{text}' does not fit operands of {list(ranks)} axes")
    operands = [_spread(part, count) for part, count in zip(parts, hidden, strict=True)]
    if not arrow:
        letters = sorted(set(left) - set(".,"))
        right = ("..." if "..." in left else "") + "".join(letter for letter in letters if left.count(letter) == 1)
    return operands, _spread(right, max(hidden))


def _spread(part: str, hidden: int) -> list[str]:
    """Labels of a part, those behind an ellipsis counted from its right end."""
    if "..." not in part:
        return list(part)
    before, after = part.split("...")
    return [*before, *(f"e{axis}" for axis in range(hidden, 0, -1)), *after]


def einsum_shape(equation: str | bytes, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of an Einsum's result.

    Raises:
        BadModelError: the equation does not fit the shapes.
    """
    operands, result = einsum_labels(equation, [len(shape) for shape in shapes])
    sizes: dict[str, int] = {}
    for labels, shape in zip(operands, shapes, strict=True):
        for label, extent in zip(labels, shape, strict=True):
            try:
                (sizes[label],) = np.broadcast_shapes((sizes.get(label, 1),), (extent,))
            except ValueError:
                raise BadModelError(
                    f"an Einsum meets sizes {sizes[label]} and {extent} of the axis '{label}' of '{equation!s}'"
                ) from None
    if not set(result) <= set(sizes):
        raise BadModelError(f"the Einsum equation '{equation!s}' has result axes of no operand")
    return tuple(sizes[label] for label in result)
