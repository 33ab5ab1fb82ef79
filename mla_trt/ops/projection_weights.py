"""Weights that are matrices whatever axes they have, and may be e4m3 codes with a scale for each block of 128 x 128: of the ops of projections.

Codes lie in tiles of 128 rows x 16 columns, and what is left of them at the ends: all tiles of 128 rows follow each other, each row by row. So what
a kernel multiplies at a time is in one piece, which the memory gives faster than rows of 64 to 256 bytes (benchmarks/LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from mla_trt.errors import BadModelError, UsageError
from mla_trt.ops.body import Value
from mla_trt.ops.common import dequantize_weight
from mla_trt.ops.reference import Float64, dequantized
from mla_trt.ops.schema import Array, TensorType

TILE_ROWS, TILE_COLUMNS = 128, 16


def scale_of(weight: str) -> str:
    """The input that has the scales of a weight."""
    return f"{weight}_scale"


def _order(rows: int, columns: int) -> npt.NDArray[np.int64]:
    """Of each code of so many rows, at most a tile's, as they lie in tiles: its place among them row by row."""
    places = np.arange(rows * columns).reshape(rows, columns)
    whole = columns // TILE_COLUMNS * TILE_COLUMNS
    tiles = places[:, :whole].reshape(rows, -1, TILE_COLUMNS).swapaxes(0, 1)
    return np.concatenate([tiles.reshape(-1), places[:, whole:].reshape(-1)])


def to_tiles(codes: Array) -> None:
    """Brings the codes of a contiguous matrix ``[rows, columns]`` into the order of tiles, in place."""
    for first in range(0, len(codes), TILE_ROWS):
        part = codes[first : first + TILE_ROWS]
        part.reshape(-1)[:] = part.reshape(-1)[_order(*part.shape)]


def from_tiles(codes: Array) -> Array:
    """The inverse: a matrix ``[rows, columns]`` of codes in tiles as it is."""
    found = np.empty(codes.shape, codes.dtype)
    for first in range(0, len(codes), TILE_ROWS):
        part = codes[first : first + TILE_ROWS]
        found[first : first + TILE_ROWS].reshape(-1)[_order(*part.shape)] = part.reshape(-1)
    return found


def matrix(inputs: Mapping[str, Value], name: str, axes: int, row_axes: int = 1) -> Value:
    """The weight times its scales, f32 ``[rows, columns]``; its rows are the first ``row_axes`` of its ``axes`` axes."""
    weight = inputs[name]
    rows, columns = weight.dim(0), weight.dim(row_axes)
    for axis in range(1, row_axes):
        rows = rows * weight.dim(axis)
    for axis in range(row_axes + 1, axes):
        columns = columns * weight.dim(axis)
    scale = inputs.get(scale_of(name))
    if scale is None:
        return weight.reshape(rows, columns)
    row, column = weight.body.range(rows).unsqueeze(1), weight.body.range(columns).unsqueeze(0)
    first_row, first_column = row // TILE_ROWS * TILE_ROWS, column // TILE_COLUMNS * TILE_COLUMNS
    tile_rows, tile_columns = (rows - first_row).minimum(TILE_ROWS), (columns - first_column).minimum(TILE_COLUMNS)
    place = first_row * columns + first_column * tile_rows + (row - first_row) * tile_columns + column - first_column
    values = weight.reshape(rows * columns).gather(place).unsqueeze(0)
    return dequantize_weight(weight.body, values, scale.unsqueeze(0)).reshape(rows, columns)


def matrix_reference(inputs: Mapping[str, Array], name: str, row_axes: int = 1) -> Float64:
    """The same in float64."""
    weight = inputs[name]
    flat = weight.reshape(math.prod(weight.shape[:row_axes]), math.prod(weight.shape[row_axes:]))
    scale = inputs.get(scale_of(name))
    if scale is None:
        return flat.astype(np.float64)
    return dequantized(from_tiles(flat)[None], scale[None])[0]


def check_codes(types: Mapping[str, TensorType], weights: tuple[str, ...]) -> None:
    """Raises BadModelError for codes without scales, and for other weights with them."""
    for name in weights:
        if name in types and (types[name].dtype == TensorProto.FLOAT8E4M3FN) != (scale_of(name) in types):
            needed = (
                "has scales, so it must be e4m3"
                if scale_of(name) in types
                else f"is e4m3, so it needs {scale_of(name)}"
            )
            raise BadModelError(f"{name} {needed}")


def check_scales(given: frozenset[str], weights: tuple[str, ...]) -> None:
    """Raises UsageError for the scales of a weight that is absent."""
    for name in weights:
        if scale_of(name) in given and name not in given:
            raise UsageError(f"the input {scale_of(name)} needs {name}")
