"""Weights as e4m3 codes with a scale for each block: how far they are from what they were, and that codes stay what they are."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from mla_trt.engines.coded_weights import encode
from mla_trt.ops.projection_weights import from_tiles, to_tiles

SHAPES = [(1, 1), (8, 16), (128, 128), (130, 150), (127, 257), (256, 384)]
LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)


def decoded(values: np.ndarray) -> np.ndarray:
    """What the codes and scales of a bf16 matrix give, in float32."""
    encoded = encode(values)
    assert encoded is not None
    return _times_scales(*encoded)


def _times_scales(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    rows, columns = (np.arange(size) // 128 for size in codes.shape)
    return codes.astype(np.float32) * scales[rows][:, columns]


def _blocks(values: np.ndarray) -> list[tuple[tuple[int, int], np.ndarray]]:
    starts = [(row, column) for row in range(0, values.shape[0], 128) for column in range(0, values.shape[1], 128)]
    return [((row // 128, column // 128), values[row : row + 128, column : column + 128]) for row, column in starts]


def _matrix(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random values, in each block of another size."""
    random = np.random.default_rng(seed)
    values = random.normal(size=shape)
    for _, block in _blocks(values):
        block *= np.exp2(random.integers(-20, 20))
    return values.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_the_nearest_in_each_block(shape: tuple[int, int]) -> None:
    values = _matrix(shape)
    encoded = encode(values)
    assert encoded is not None
    codes, scales = encoded
    assert (codes.dtype, codes.shape) == (ml_dtypes.float8_e4m3fn, shape)
    assert (scales.dtype, scales.shape) == (np.float32, (-(-shape[0] // 128), -(-shape[1] // 128)))
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    for (place, block), (_, chosen) in zip(_blocks(values), _blocks(codes), strict=True):
        wide, scale = block.astype(np.float64), float(scales[place])
        np.testing.assert_allclose(scale, np.abs(wide).max() / 448, rtol=1e-7)
        least = np.full(block.shape, np.inf)
        for code in every[np.isfinite(every)]:
            least = np.minimum(least, np.abs(code * scale - wide))
        error = np.abs(chosen.astype(np.float64) * scale - wide)
        assert (error <= least + 1e-4 * scale).all()  # value / scale is rounded to float32


@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_codes_is_the_same_codes(shape: tuple[int, int]) -> None:
    """As DeepSeek's weights, in bf16 as a checkpoint's are when they are decoded."""
    random = np.random.default_rng(1)
    codes = random.normal(scale=100, size=shape).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    for _, block in _blocks(codes):
        block[tuple(random.integers(size) for size in block.shape)] = -448
    codes.view(np.uint8)[codes == 0] = 0x80  # each -0
    scales = random.uniform(1e-5, 1e-2, [-(-size // 128) for size in shape]).astype(np.float32)
    encoded = encode(_times_scales(codes, scales).astype(ml_dtypes.bfloat16))
    assert encoded is not None
    np.testing.assert_array_equal(encoded[0].view(np.uint8), codes.view(np.uint8))
    np.testing.assert_allclose(encoded[1], scales, rtol=2**-8)


def test_a_transposed_matrix_has_its_own_blocks() -> None:
    values = _matrix((130, 300))
    np.testing.assert_array_equal(decoded(values.T), decoded(np.ascontiguousarray(values.T)))


def test_a_block_of_zeros_has_the_scale_1() -> None:
    values = _matrix((256, 256))
    values[128:, :128] = 0
    values[128, 0] = -0.0
    encoded = encode(values)
    assert encoded is not None
    codes, scales = encoded
    assert scales[1, 0] == 1
    assert (scales != 1).sum() == 3
    assert not codes[128:, :128].astype(np.float32).any()
    assert codes.view(np.uint8)[128, :2].tolist() == [0x80, 0]


@pytest.mark.parametrize("largest", [LARGEST, 1e38, 1e-38, 1e-40, 0.0])
def test_values_at_the_ends_of_the_range(largest: float) -> None:
    values = (np.array([[1, -1, 0.5, 0.26, 0.0, -0.0]] * 2) * largest).astype(ml_dtypes.bfloat16)
    found = decoded(values)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, values.astype(np.float32), rtol=2**-4)
    assert np.signbit(found[0]).tolist() == [False, True, False, False, False, True]


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", [(0, 0), (129, 149)])
def test_what_is_not_finite_has_no_codes(value: float, place: tuple[int, int]) -> None:
    values = _matrix((130, 150))
    values[place] = value
    assert encode(values) is None


@pytest.mark.parametrize("shape", [*SHAPES, (0, 16), (3, 0), (128, 16), (300, 40)])
def test_tiles_are_of_16_columns_of_128_rows(shape: tuple[int, int]) -> None:
    codes = np.arange(shape[0] * shape[1]).reshape(shape)
    tiles = [
        codes[row : row + 128, column : column + 16].reshape(-1)
        for row in range(0, shape[0], 128)
        for column in range(0, shape[1], 16)
    ]
    moved = codes.copy()
    to_tiles(moved)
    np.testing.assert_array_equal(moved.reshape(-1), np.concatenate([np.empty(0, int), *tiles]))
    np.testing.assert_array_equal(from_tiles(moved), codes)
