"""Weights that are matrices whatever axes they have, and may be e4m3 codes with a scale for each block of 128 x 128: of the ops of projections."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mla_trt.errors import UsageError
from mla_trt.ops.body import Value
from mla_trt.ops.common import dequantize_weight
from mla_trt.ops.reference import Float64, dequantized
from mla_trt.ops.schema import Array


def scale_of(weight: str) -> str:
    """The input that has the scales of a weight."""
    return f"{weight}_scale"


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
    blocks = scale.unsqueeze(0)
    return dequantize_weight(weight.body, weight.reshape(1, rows, columns), blocks).reshape(rows, columns)


def matrix_reference(inputs: Mapping[str, Array], name: str, row_axes: int = 1) -> Float64:
    """The same in float64."""
    weight = inputs[name]
    flat = weight.reshape(1, math.prod(weight.shape[:row_axes]), math.prod(weight.shape[row_axes:]))
    scale = inputs.get(scale_of(name))
    return dequantized(flat, None if scale is None else scale[None])[0]


def check_scales(given: frozenset[str], weights: tuple[str, ...]) -> None:
    """Raises UsageError for the scales of a weight that is absent."""
    for name in weights:
        if scale_of(name) in given and name not in given:
            raise UsageError(f"the input {scale_of(name)} needs {name}")
