"""Rows and pages of both caches: every size and offset, and numpy code that packs and unpacks them.

A page holds ``page_size`` rows, one for each token, and, in formats with one scale for each row, then the scales. Rows
are padded to a multiple of 16 bytes, pages to a multiple of 128 bytes; the padding of a row that is written is zero.
Pages are little-endian int32 words, so that no 8-bit type passes an interface. Rounding is to nearest, ties to even;
e4m3 saturates at +-448.

========== ================================= ==============================================================
kv format  bytes of a row before padding     content
========== ================================= ==============================================================
f32        4 (R + Dr)                        latent, rope
bf16       2 (R + Dr)                        latent, rope
fp8        R + 2 Dr; 4 behind the rows       e4m3 of latent / s, bf16 of rope / s; s = max(amax(latent) / 448, 1e-6)
fp8_ds_mla R + 4 ceil(R / 128) + 2 Dr        e4m3 of latent / s, f32 s of each 128 values, bf16 rope
fp8_flat   R + Dr                            e4m3 of value / kv_scale
========== ================================= ==============================================================

R is the latent rank (``kv_lora_rank``), Dr the rope head size (``qk_rope_head_dim``). Index rows are Di values in
``f32``, or in ``fp8`` Di e4m3 codes with the scale s = max(amax / 448, 1e-10) behind the rows, rounded up to a power of
two where ``scale_ue8m0`` is set.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mla_trt.errors import UsageError

ROW_FORMATS = ("f32", "bf16", "fp8", "fp8_ds_mla", "fp8_flat")
INDEX_FORMATS = ("f32", "fp8")
DEFAULT_PAGE_SIZE = 64

E4M3_MAX = 448.0
KV_SCALE_FLOOR = 1e-6
INDEX_SCALE_FLOOR = 1e-10
SCALE_GROUP = 128  # latent values that share a scale in fp8_ds_mla

ROW_ALIGNMENT = 16
PAGE_ALIGNMENT = 128
WORD_BYTES = 4

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int32] | npt.NDArray[np.int64]


def ceil_div(value: int, divisor: int) -> int:
    """``value / divisor`` rounded up."""
    return -(-value // divisor)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``value``."""
    return ceil_div(value, multiple) * multiple


def encode_e4m3(values: npt.ArrayLike) -> ByteArray:
    """Codes (uint8) of ``values`` (f32, any shape), clamped to +-448."""
    clamped = np.clip(np.asarray(values, np.float32), -E4M3_MAX, E4M3_MAX)
    return clamped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def decode_e4m3(codes: npt.ArrayLike) -> FloatArray:
    """Values (f32) of e4m3 ``codes`` (uint8, any shape)."""
    values: FloatArray = np.asarray(codes, np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return values


def e4m3_table() -> FloatArray:
    """The values of the codes 0..255, f32 ``[256]``."""
    return decode_e4m3(np.arange(256, dtype=np.uint8))


def amax_scale(values: npt.ArrayLike, floor: float) -> FloatArray:
    """max(amax / 448, floor) over the last axis of ``values``, f32 ``[..., 1]``."""
    amax = np.abs(np.asarray(values, np.float32)).max(axis=-1, keepdims=True, initial=0.0)
    scales: FloatArray = np.maximum(amax / np.float32(E4M3_MAX), np.float32(floor))
    return scales


def round_up_to_power_of_two(scales: npt.ArrayLike) -> FloatArray:
    """The smallest power of two not below each of ``scales`` (f32, positive, normal)."""
    bits = np.asarray(scales, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFFFF)) & np.uint32(0xFF800000)).view(np.float32)


def _bytes(values: npt.NDArray[np.generic]) -> ByteArray:
    """The bytes of each row of ``values`` ``[N, n]``, little-endian, uint8 ``[N, n * itemsize]``."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), values.shape[1] * values.itemsize)


def _bf16_bytes(values: npt.ArrayLike) -> ByteArray:
    return _bytes(np.asarray(values, np.float32).astype(ml_dtypes.bfloat16))


def _bf16_values(row_bytes: ByteArray) -> FloatArray:
    values: FloatArray = np.ascontiguousarray(row_bytes).view(ml_dtypes.bfloat16).astype(np.float32)
    return values


@dataclass(frozen=True)
class PageLayout:
    """What the pages of both caches share. ``page_size`` counts tokens."""

    page_size: int

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise UsageError(f"page size {self.page_size}: a page holds at least one token")

    @property
    def content_bytes(self) -> int:
        """Bytes of a row that carry values."""
        raise NotImplementedError

    @property
    def has_page_scales(self) -> bool:
        """Whether one f32 scale for each row lies behind the rows of a page."""
        raise NotImplementedError

    @property
    def row_bytes(self) -> int:
        """Bytes from one row to the next."""
        return round_up(self.content_bytes, ROW_ALIGNMENT)

    @property
    def row_words(self) -> int:
        """int32 words from one row to the next."""
        return self.row_bytes // WORD_BYTES

    @property
    def scales_offset(self) -> int:
        """Byte in the page at which the rows end and, where there are any, the scales of the rows begin."""
        return self.page_size * self.row_bytes

    @property
    def scales_word(self) -> int:
        """``scales_offset`` in words."""
        return self.scales_offset // WORD_BYTES

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        scales = 4 * self.page_size if self.has_page_scales else 0
        return round_up(self.scales_offset + scales, PAGE_ALIGNMENT)

    @property
    def page_words(self) -> int:
        """int32 words of a page: the last dimension of a cache tensor."""
        return self.page_bytes // WORD_BYTES

    def empty(self, pages: int) -> npt.NDArray[np.int32]:
        """A pool of zeros, int32 ``[pages, page_words]``."""
        return np.zeros((pages, self.page_words), np.int32)

    def _store(
        self,
        pages: npt.NDArray[np.int32],
        page: IntArray,
        slot: IntArray,
        content: ByteArray,
        scales: FloatArray | None,
    ) -> None:
        rows = np.zeros((content.shape[0], self.row_bytes), np.uint8)
        rows[:, : self.content_bytes] = content
        words = np.asarray(slot, np.int64)[:, None] * self.row_words + np.arange(self.row_words)
        pages[np.asarray(page)[:, None], words] = rows.view(np.int32)
        if scales is not None:
            pages[page, self.scales_word + np.asarray(slot, np.int64)] = scales.reshape(-1).view(np.int32)

    def _load(self, pages: npt.NDArray[np.int32], page: IntArray, slot: IntArray) -> tuple[ByteArray, FloatArray]:
        words = np.asarray(slot, np.int64)[:, None] * self.row_words + np.arange(self.row_words)
        content = np.ascontiguousarray(pages[np.asarray(page)[:, None], words]).view(np.uint8)[:, : self.content_bytes]
        if not self.has_page_scales:
            return content, np.ones((len(content), 1), np.float32)
        scales = pages[page, self.scales_word + np.asarray(slot, np.int64)]
        return content, np.ascontiguousarray(scales).view(np.float32)[:, None]


@dataclass(frozen=True)
class KvLayout(PageLayout):
    """Pages of the latent cache. ``kv_scale`` is the static scale of ``fp8_flat``.

    Raises:
        UsageError: unknown row format, or a dimension that has no sense.
    """

    row_format: str
    kv_lora_rank: int
    qk_rope_head_dim: int
    kv_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_format not in ROW_FORMATS:
            raise UsageError(f"unknown row format '{self.row_format}': use one of {', '.join(ROW_FORMATS)}")
        if self.kv_lora_rank < 1 or self.qk_rope_head_dim < 0:
            raise UsageError(
                f"a cache row of {self.kv_lora_rank} latent and {self.qk_rope_head_dim} rope values has no sense"
            )

    @property
    def width(self) -> int:
        """Values of a row: R + Dr."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def group_scales(self) -> int:
        """f32 scales inside a row (``fp8_ds_mla``), one for each 128 latent values."""
        return ceil_div(self.kv_lora_rank, SCALE_GROUP) if self.row_format == "fp8_ds_mla" else 0

    @property
    def latent_bytes(self) -> int:
        """Bytes of a row's latent values, which are its first."""
        return self.kv_lora_rank * {"f32": 4, "bf16": 2}.get(self.row_format, 1)

    @property
    def rope_offset(self) -> int:
        """Byte of the row at which the rope values begin."""
        return self.latent_bytes + 4 * self.group_scales

    @property
    def content_bytes(self) -> int:
        return self.rope_offset + self.qk_rope_head_dim * {"f32": 4, "fp8_flat": 1}.get(self.row_format, 2)

    @property
    def has_page_scales(self) -> bool:
        return self.row_format == "fp8"

    def write(
        self, pages: npt.NDArray[np.int32], page: IntArray, slot: IntArray, latent: npt.ArrayLike, rope: npt.ArrayLike
    ) -> None:
        """Write N rows in place.

        Args:
            pages: int32 ``[pages, page_words]``.
            page, slot: int ``[N]``, the page of each row and its place there.
            latent, rope: ``[N, R]`` and ``[N, Dr]``, taken as f32.
        """
        latent = np.asarray(latent, np.float32)
        rope = np.asarray(rope, np.float32)
        scales: FloatArray | None = None
        if self.row_format == "f32":
            parts = [_bytes(latent), _bytes(rope)]
        elif self.row_format == "bf16":
            parts = [_bf16_bytes(latent), _bf16_bytes(rope)]
        elif self.row_format == "fp8":
            scales = amax_scale(latent, KV_SCALE_FLOOR)
            parts = [encode_e4m3(latent / scales), _bf16_bytes(rope / scales)]
        elif self.row_format == "fp8_ds_mla":
            padded = np.zeros((len(latent), self.group_scales * SCALE_GROUP), np.float32)
            padded[:, : self.kv_lora_rank] = latent
            groups = padded.reshape(len(latent), self.group_scales, SCALE_GROUP)
            group_scales = amax_scale(groups, KV_SCALE_FLOOR)
            codes = encode_e4m3(groups / group_scales).reshape(padded.shape)[:, : self.kv_lora_rank]
            parts = [codes, _bytes(group_scales[..., 0]), _bf16_bytes(rope)]
        else:
            scale = np.float32(self.kv_scale)
            parts = [encode_e4m3(latent / scale), encode_e4m3(rope / scale)]
        self._store(pages, page, slot, np.concatenate(parts, axis=1), scales)

    def read(self, pages: npt.NDArray[np.int32], page: IntArray, slot: IntArray) -> tuple[FloatArray, FloatArray]:
        """The values of N rows, f32 ``[N, R]`` and ``[N, Dr]``. Arguments as in :meth:`write`."""
        content, scales = self._load(pages, page, slot)
        latent_bytes, rope_bytes = content[:, : self.latent_bytes], content[:, self.rope_offset :]
        if self.row_format == "f32":
            return np.ascontiguousarray(latent_bytes).view(np.float32), np.ascontiguousarray(rope_bytes).view(
                np.float32
            )
        if self.row_format == "bf16":
            return _bf16_values(latent_bytes), _bf16_values(rope_bytes)
        if self.row_format == "fp8":
            return decode_e4m3(latent_bytes) * scales, _bf16_values(rope_bytes) * scales
        if self.row_format == "fp8_ds_mla":
            group_scales = np.ascontiguousarray(content[:, self.latent_bytes : self.rope_offset]).view(np.float32)
            columns = np.arange(self.kv_lora_rank) // SCALE_GROUP
            return decode_e4m3(latent_bytes) * group_scales[:, columns], _bf16_values(rope_bytes)
        scale = np.float32(self.kv_scale)
        return decode_e4m3(latent_bytes) * scale, decode_e4m3(rope_bytes) * scale


@dataclass(frozen=True)
class IndexLayout(PageLayout):
    """Pages of the index cache (keys of the sparse indexer).

    Raises:
        UsageError: unknown index format, or a head size below 1.
    """

    index_format: str
    index_head_dim: int
    scale_ue8m0: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.index_format not in INDEX_FORMATS:
            raise UsageError(f"unknown index format '{self.index_format}': use one of {', '.join(INDEX_FORMATS)}")
        if self.index_head_dim < 1:
            raise UsageError(f"an index row of {self.index_head_dim} values has no sense")

    @property
    def content_bytes(self) -> int:
        return self.index_head_dim * (4 if self.index_format == "f32" else 1)

    @property
    def has_page_scales(self) -> bool:
        return self.index_format == "fp8"

    def scale(self, values: npt.ArrayLike) -> FloatArray:
        """The scale of each vector along the last axis of ``values``, f32 ``[..., 1]``."""
        scales = amax_scale(values, INDEX_SCALE_FLOOR)
        return round_up_to_power_of_two(scales) if self.scale_ue8m0 else scales

    def write(self, pages: npt.NDArray[np.int32], page: IntArray, slot: IntArray, keys: npt.ArrayLike) -> None:
        """Write N rows in place: ``keys`` ``[N, Di]``, taken as f32; the rest as in :meth:`KvLayout.write`."""
        keys = np.asarray(keys, np.float32)
        if self.index_format == "f32":
            self._store(pages, page, slot, _bytes(keys), None)
        else:
            scales = self.scale(keys)
            self._store(pages, page, slot, encode_e4m3(keys / scales), scales)

    def read(self, pages: npt.NDArray[np.int32], page: IntArray, slot: IntArray) -> FloatArray:
        """The values of N rows, f32 ``[N, Di]``."""
        content, scales = self._load(pages, page, slot)
        if self.index_format == "f32":
            return np.ascontiguousarray(content).view(np.float32)
        return decode_e4m3(content) * scales
