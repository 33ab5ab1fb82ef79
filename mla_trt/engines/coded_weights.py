"""Weights in bf16 as e4m3 codes with a scale for each block of 128 x 128, as DeepSeek's checkpoints have theirs: half the bytes to read in each
step. Codes have four significant bits where bf16 has eight, so that only the user can want them (`mla-trt build --weights fp8`); those of weights
that were such codes before are the same again."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from onnx import TensorProto

from mla_trt.engines.weight_products import Product, WeightProducts
from mla_trt.formats import ceil_div
from mla_trt.ops.projection_weights import to_tiles
from mla_trt.passes.quantize import quantize_blocks
from mla_trt.weight_file import WeightFile, beside

BLOCK = 128
MULTIPLE = 16
"""Of which the kernel for Hopper takes the columns of codes."""


def encode(values: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Codes and scales of a matrix, of which one row of blocks at a time is copied.

    Args:
        values: bf16 [rows, columns].

    Returns:
        e4m3 codes of the same shape and f32 scales [ceil(rows / 128), ceil(columns / 128)], so that code * scale is the weight; None where a
        value is not finite.
    """
    codes = np.empty(values.shape, ml_dtypes.float8_e4m3fn)
    scales = np.empty([ceil_div(size, BLOCK) for size in values.shape], np.float32)
    for block in range(len(scales)):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        wide = values[rows].astype(np.float32)
        if not np.isfinite(wide).all():
            return None
        codes[rows], scales[block : block + 1] = quantize_blocks(wide, BLOCK)
    return codes, scales


def coded_weight(
    found: WeightProducts, product: Product, name: str, weight_file: WeightFile | None
) -> tuple[TensorProto, TensorProto] | None:
    """The codes, [rows, columns] in tiles, and the scales of a product's weight, under names of their own: a refitter has no bf16 weights for codes.

    Args:
        found: where the product was found.
        product: the product.
        name: what the two names begin with.
        weight_file: where the codes go if the weight is in a file. None: into the model.

    Returns:
        both, or None where the kernel for Hopper does not take such codes, or a value is not finite.
    """
    if product.columns % MULTIPLE:
        return None
    encoded = encode(found.values(product))
    if encoded is None:
        return None
    codes, scales = encoded
    to_tiles(codes)
    tensor = product.weight.tensor
    return beside(tensor, f"{name}/codes", codes, weight_file), beside(tensor, f"{name}/scales", scales, None)
