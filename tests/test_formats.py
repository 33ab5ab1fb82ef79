"""Rows and pages: sizes, bytes and rounding, against byte strings that are put together here by hand."""

from __future__ import annotations

import struct

import ml_dtypes
import numpy as np
import pytest

from mla_trt.errors import UsageError
from mla_trt.formats import (
    INDEX_FORMATS,
    ROW_FORMATS,
    IndexLayout,
    KvLayout,
    decode_e4m3,
    e4m3_table,
    encode_e4m3,
    round_up_to_power_of_two,
)

E4M3 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16


def _kv(row_format: str, rank: int = 512, rope: int = 64, page_size: int = 64, kv_scale: float = 1.0) -> KvLayout:
    return KvLayout(
        page_size=page_size, row_format=row_format, kv_lora_rank=rank, qk_rope_head_dim=rope, kv_scale=kv_scale
    )


def _index(index_format: str, size: int = 128, page_size: int = 64, ue8m0: bool = False) -> IndexLayout:
    return IndexLayout(page_size=page_size, index_format=index_format, index_head_dim=size, scale_ue8m0=ue8m0)


@pytest.mark.parametrize(
    ("row_format", "row_bytes", "page_words"),
    [
        ("f32", 2304, 36864),
        ("bf16", 1152, 18432),
        ("fp8", 640, 10304),
        ("fp8_ds_mla", 656, 10496),
        ("fp8_flat", 576, 9216),
    ],
)
def test_sizes_of_deepseek_v3(row_format: str, row_bytes: int, page_words: int) -> None:
    layout = _kv(row_format)
    assert (layout.row_bytes, layout.page_words) == (row_bytes, page_words)
    assert layout.page_bytes == 4 * layout.page_words
    assert layout.row_words * 4 == layout.row_bytes
    assert layout.empty(3).shape == (3, page_words)


def test_sizes_of_the_index_cache() -> None:
    assert _index("fp8").page_bytes == 64 * 128 + 64 * 4
    assert _index("f32").page_bytes == 64 * 512
    assert _index("fp8", 20, 3).row_bytes == 32
    assert _index("fp8", 20, 3).page_bytes == 128  # 3 * 32 + 3 * 4 = 108


@pytest.mark.parametrize("row_format", ROW_FORMATS)
@pytest.mark.parametrize("rank", [1, 37, 129, 512])
@pytest.mark.parametrize("rope", [0, 6, 64])
@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_rows_and_pages_are_aligned_and_hold_their_content(
    row_format: str, rank: int, rope: int, page_size: int
) -> None:
    layout = _kv(row_format, rank, rope, page_size)
    per_value = {"f32": 4 * (rank + rope), "bf16": 2 * (rank + rope), "fp8_flat": rank + rope}
    groups = -(-rank // 128) if row_format == "fp8_ds_mla" else 0
    assert layout.content_bytes == per_value.get(row_format, rank + 2 * rope + 4 * groups)
    assert layout.row_bytes % 16 == 0
    assert 0 <= layout.row_bytes - layout.content_bytes < 16
    assert layout.page_bytes % 128 == 0
    used = page_size * (layout.row_bytes + (4 if row_format == "fp8" else 0))
    assert 0 <= layout.page_bytes - used < 128


def _hand_packed(row_format: str, latent: np.ndarray, rope: np.ndarray, kv_scale: float) -> tuple[bytes, bytes]:
    """The bytes of one row, value by value, and of the scale behind the rows."""
    f32 = np.float32

    def code(value: np.float32) -> bytes:
        packed: bytes = f32(np.clip(value, -448, 448)).astype(E4M3).tobytes()
        return packed

    def scale_of(values: np.ndarray) -> np.float32:
        return max(f32(np.abs(values).max() / f32(448)), f32(1e-6))

    if row_format == "f32":
        return b"".join(struct.pack("<f", value) for value in [*latent, *rope]), b""
    if row_format == "bf16":
        return b"".join(value.astype(BF16).tobytes() for value in [*latent, *rope]), b""
    if row_format == "fp8_flat":
        return b"".join(code(value / f32(kv_scale)) for value in [*latent, *rope]), b""
    if row_format == "fp8":
        scale = scale_of(latent)
        codes = b"".join(code(value / scale) for value in latent)
        return codes + b"".join((value / scale).astype(BF16).tobytes() for value in rope), struct.pack("<f", scale)
    scales = [scale_of(latent[start : start + 128]) for start in range(0, len(latent), 128)]
    codes = b"".join(code(value / scales[position // 128]) for position, value in enumerate(latent))
    packed_scales = b"".join(struct.pack("<f", scale) for scale in scales)
    return codes + packed_scales + b"".join(value.astype(BF16).tobytes() for value in rope), b""


@pytest.mark.parametrize("row_format", ROW_FORMATS)
@pytest.mark.parametrize(("rank", "rope"), [(32, 16), (37, 6), (300, 0), (512, 64)])
def test_bytes_of_a_row(row_format: str, rank: int, rope: int) -> None:
    rng = np.random.default_rng(1)
    layout = _kv(row_format, rank, rope, page_size=3, kv_scale=0.01)
    latent, key = 3 * rng.standard_normal((2, rank), np.float32), rng.standard_normal((2, rope), np.float32)
    pages = rng.integers(-(2**31), 2**31, (4, layout.page_words)).astype(np.int32)
    before = pages.copy()
    layout.write(pages, np.array([3, 1]), np.array([2, 0]), latent, key)
    content = pages.view(np.uint8)
    for row, (page, slot) in enumerate(((3, 2), (1, 0))):
        packed, scale = _hand_packed(row_format, latent[row], key[row], 0.01)
        start = slot * layout.row_bytes
        assert content[page, start : start + layout.row_bytes].tobytes() == packed.ljust(layout.row_bytes, b"\0")
        place = layout.scales_offset + 4 * slot
        assert content[page, place : place + len(scale)].tobytes() == scale
        content[page, start : start + layout.row_bytes] = before.view(np.uint8)[page, start : start + layout.row_bytes]
        content[page, place : place + len(scale)] = before.view(np.uint8)[page, place : place + len(scale)]
    np.testing.assert_array_equal(pages, before)  # nothing else was written


@pytest.mark.parametrize("row_format", ROW_FORMATS)
@pytest.mark.parametrize(("rank", "rope"), [(32, 16), (37, 6), (300, 0), (512, 64)])
def test_reading_gives_what_was_written(row_format: str, rank: int, rope: int) -> None:
    rng = np.random.default_rng(2)
    layout = _kv(row_format, rank, rope, page_size=3, kv_scale=0.01)
    latent, key = rng.standard_normal((5, rank), np.float32), rng.standard_normal((5, rope), np.float32)
    pages = layout.empty(4)
    places = np.array([3, 1, 0, 1, 2]), np.array([2, 0, 1, 1, 2])
    layout.write(pages, *places, latent, key)
    found_latent, found_key = layout.read(pages, *places)
    latent_error = {"f32": 0.0, "bf16": 2**-8}.get(row_format, 2**-4)
    key_error = {"f32": 0.0, "fp8_flat": 2**-4}.get(row_format, 2**-8)
    smallest = 0.02 * np.abs(latent).max() / 448 if latent_error == 2**-4 else 0.0
    assert found_latent.shape == latent.shape
    assert (np.abs(found_latent - latent) <= latent_error * np.abs(latent) + smallest).all()
    assert (
        np.abs(found_key - key) <= key_error * np.abs(key) + (0.01 * 2**-10 if row_format == "fp8_flat" else 0)
    ).all()
    again = layout.empty(4)
    layout.write(again, *places, found_latent, found_key)
    if row_format != "fp8":  # what is stored is a fixed point, but for a scale's last bit
        np.testing.assert_array_equal(layout.read(again, *places)[0], found_latent)


def test_no_rows() -> None:
    for row_format in ROW_FORMATS:
        layout = _kv(row_format, 32, 16)
        pages, none = layout.empty(2), np.zeros(0, np.int64)
        layout.write(pages, none, none, np.zeros((0, 32)), np.zeros((0, 16)))
        assert not pages.any()
        latent, rope = layout.read(pages, none, none)
        assert (latent.shape, rope.shape) == ((0, 32), (0, 16))


def test_every_e4m3_code() -> None:
    codes = np.arange(256, dtype=np.uint8)
    values = e4m3_table()
    assert np.isnan(values[[0x7F, 0xFF]]).all()
    finite = np.isfinite(values)
    assert finite.sum() == 254
    np.testing.assert_array_equal(encode_e4m3(values[finite]), codes[finite])
    assert values[[0x01, 0x08, 0x38, 0x7E]].tolist() == [2**-9, 2**-6, 1.0, 448.0]


def test_e4m3_rounds_to_nearest_even_and_saturates() -> None:
    values = decode_e4m3(np.arange(0x7F, dtype=np.uint8))
    middles = (values[1:] + values[:-1]) / 2
    codes = encode_e4m3(middles)
    assert (codes % 2 == 0).all()
    np.testing.assert_array_equal(np.abs(codes.astype(int) - np.arange(126)) <= 1, True)
    np.testing.assert_array_equal(encode_e4m3(np.nextafter(middles, np.float32(np.inf))), np.arange(1, 127))
    np.testing.assert_array_equal(encode_e4m3(np.nextafter(middles, np.float32(0))), np.arange(126))
    assert decode_e4m3(encode_e4m3(np.array([449, 1e30, np.inf, -1e30]))).tolist() == [448, 448, 448, -448]


@pytest.mark.parametrize("index_format", INDEX_FORMATS)
@pytest.mark.parametrize("size", [20, 128])
def test_index_rows(index_format: str, size: int) -> None:
    rng = np.random.default_rng(3)
    layout = _index(index_format, size, page_size=3)
    keys = rng.standard_normal((3, size), np.float32)
    keys[2] = 0
    pages = layout.empty(2)
    places = np.array([1, 1, 0]), np.array([2, 0, 1])
    layout.write(pages, *places, keys)
    found = layout.read(pages, *places)
    if index_format == "f32":
        np.testing.assert_array_equal(found, keys)
        return
    assert np.abs(found - keys).max() < 0.07 * np.abs(keys).max()
    assert (found[2] == 0).all()
    scale = np.abs(keys[0]).max() / np.float32(448)
    offset = layout.scales_offset + 2 * 4
    assert pages.view(np.uint8)[1, offset : offset + 4].tobytes() == struct.pack("<f", scale)
    row = pages.view(np.uint8)[1, 2 * layout.row_bytes : 2 * layout.row_bytes + size]
    assert row.tobytes() == np.clip(keys[0] / scale, -448, 448).astype(E4M3).tobytes()
    assert pages.view(np.float32)[0, layout.scales_word + 1] == np.float32(1e-10)


def test_ue8m0_scales_are_the_next_power_of_two() -> None:
    scales = np.array([1.0, 1.0000001, 0.75, 0.5, 3e-10, 1e-10, 1000], np.float32)
    expected = [1, 2, 1, 0.5, 2.0**-31, 2.0**-33, 1024]
    assert round_up_to_power_of_two(scales).tolist() == expected
    layout = _index("fp8", 16, page_size=1, ue8m0=True)
    pages = layout.empty(1)
    layout.write(pages, np.array([0]), np.array([0]), np.full((1, 16), 3.0))
    assert pages.view(np.float32)[0, layout.scales_word] == 2.0**-7  # 3 / 448 is between 2^-8 and 2^-7


def test_layouts_without_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="row format 'fp4'"):
        _kv("fp4")
    with pytest.raises(UsageError, match="index format 'bf16'"):
        _index("bf16")
    with pytest.raises(UsageError, match="page size 0"):
        _kv("fp8", page_size=0)
    with pytest.raises(UsageError, match="0 latent"):
        _kv("fp8", rank=0)
    with pytest.raises(UsageError, match="index row of 0"):
        _index("fp8", 0)
