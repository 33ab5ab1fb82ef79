"""Rotary embedding: the nodes, and the reference in the arithmetic of its arguments."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mla_trt.ops.body import INT64, Body, Value

Real = TypeVar("Real", np.float32, np.float64)


def table_rows(table: Value, rows: Value | None) -> Value:
    """The row of ``table`` (f32 ``[N, Dr/2]``) of each token.

    ``rows`` (i32 ``[T]``) is clamped to the table; without it token t has row t.
    """
    if rows is None:
        return table
    return table.gather(rows.cast(INT64).minimum(table.dim(0) - 1).maximum(0))


def rotate(body: Body, values: Value, cos: Value, sin: Value, interleaved: bool) -> Value:
    """Rotate pairs of the last axis of ``values``, f32 ``[T, n, Dr]``, by ``cos`` and ``sin``, f32 ``[T, Dr/2]``.

    Pair (a, b) becomes (a cos - b sin, a sin + b cos). Pairs are neighbours when ``interleaved``, else (j, j + Dr/2).
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    tokens, heads, half = values.dim(0), values.dim(1), cos.dim(2)
    pairs = values.reshape(tokens, heads, half, 2) if interleaved else values.reshape(tokens, heads, 2, half)
    axis = 3 if interleaved else 2
    first, second = pairs.gather(0, axis=axis), pairs.gather(1, axis=axis)
    rotated = (first * cos - second * sin, first * sin + second * cos)
    return body.concat(axis, *(part.unsqueeze(axis) for part in rotated)).reshape(tokens, heads, half * 2)


def rotate_reference(
    values: npt.NDArray[Real], cos: npt.NDArray[np.float32], sin: npt.NDArray[np.float32], interleaved: bool
) -> npt.NDArray[Real]:
    """The same for ``values`` ``[..., Dr]`` and one row of cos and sin ``[Dr/2]``, in the arithmetic of ``values``."""
    cos, sin = cos.astype(values.dtype), sin.astype(values.dtype)
    half = len(cos)
    rotated = np.empty_like(values)
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        rotated[..., a] = values[..., a] * cos[pair] - values[..., b] * sin[pair]
        rotated[..., b] = values[..., a] * sin[pair] + values[..., b] * cos[pair]
    return rotated


def table_row(
    table: npt.NDArray[np.generic], rows: npt.NDArray[np.generic] | None, token: int
) -> npt.NDArray[np.float32]:
    """The table row of one token, clamped as :func:`table_rows` does."""
    row = token if rows is None else int(rows[token])
    values: npt.NDArray[np.float32] = table[min(max(row, 0), len(table) - 1)].astype(np.float32)
    return values
