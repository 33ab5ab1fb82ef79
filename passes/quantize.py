"""Weights as e4m3 with one scale for each block of 128 x 128."""

from __future__ import annotations

import ml_dtypes
import numpy as np

E4M3_MAX = 448.0


def quantize_blocks(weights: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantises the last two axes in blocks; the last block of an axis may be smaller.

    Args:
        weights: [..., rows, columns].
        block: size of a block along both axes.

    Returns:
        e4m3 codes of the same shape, and float32 scales [..., ceil(rows / block), ceil(columns / block)] so that code * scale is the weight.
    """
    values = np.asarray(weights, np.float32)
    rows, columns = values.shape[-2:]
    blocks = -(-rows // block), -(-columns // block)
    padded = np.zeros((*values.shape[:-2], blocks[0] * block, blocks[1] * block), np.float32)
    padded[..., :rows, :columns] = values
    tiles = padded.reshape(*values.shape[:-2], blocks[0], block, blocks[1], block)
    scales = np.abs(tiles).max(axis=(-3, -1)) / np.float32(E4M3_MAX)
    scales = np.where(scales == 0, np.float32(1), scales)
    codes = np.clip(tiles / scales[..., :, None, :, None], -E4M3_MAX, E4M3_MAX)
    return codes.reshape(padded.shape)[..., :rows, :columns].astype(ml_dtypes.float8_e4m3fn), scales
