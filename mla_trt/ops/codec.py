"""Nodes that convert f32 values to the bits of cache rows and back, bit for bit as :mod:`mla_trt.formats` does.

8-bit floats are handled as integers: ONNX Runtime has no BitCast, Gather or Scatter of float8 on the CPU.
"""

from __future__ import annotations

from mla_trt.formats import (
    E4M3_MAX,
    INDEX_SCALE_FLOOR,
    KV_SCALE_FLOOR,
    SCALE_GROUP,
    IndexLayout,
    KvLayout,
    e4m3_table,
)
from mla_trt.ops.body import FLOAT, INT32, UINT32, Body, Value

_E4M3_MIN_NORMAL = 2.0**-6
_E4M3_SUBNORMALS = 512.0  # codes below 8 count multiples of 2^-9
_SIGN = 0x80000000


def clamp_e4m3(values: Value) -> Value:
    """``values`` clamped to +-448."""
    return values.minimum(E4M3_MAX).maximum(-E4M3_MAX)


def round_e4m3(body: Body, values: Value) -> Value:
    """The nearest e4m3 value (ties to even) of each of ``values``, which lie within +-448."""
    bits = values.bits(UINT32)
    tie = ((bits >> 20) & 1).bits(INT32)  # f32 keeps 20 more mantissa bits than e4m3
    rounded = (bits.bits(INT32) + 0x7FFFF + tie).bits(UINT32) & 0xFFF00000
    subnormal = (values * _E4M3_SUBNORMALS).unary("Round") / _E4M3_SUBNORMALS
    return body.where(values.unary("Abs") < _E4M3_MIN_NORMAL, subnormal, rounded.bits(FLOAT))


def encode_e4m3(body: Body, values: Value) -> Value:
    """e4m3 codes (uint32, below 256) of ``values``, saturating."""
    rounded = round_e4m3(body, clamp_e4m3(values))
    magnitude = rounded.unary("Abs")
    normal = (magnitude.bits(UINT32) >> 20).bits(INT32) - ((127 - 7) << 3)  # exponent bias of f32 to that of e4m3
    code = body.where(magnitude < _E4M3_MIN_NORMAL, (magnitude * _E4M3_SUBNORMALS).cast(INT32), normal)
    sign = (values.bits(UINT32) & _SIGN) >> 24  # not of the rounded value: Round makes 0 of -0
    return code.bits(UINT32) | sign


def decode_e4m3(body: Body, codes: Value) -> Value:
    """f32 values of e4m3 ``codes`` (uint32, below 256)."""
    return body.constant(e4m3_table(), FLOAT).gather(codes.bits(INT32))


def encode_bf16(values: Value) -> Value:
    """bf16 bits (uint32, below 65536) of f32 ``values``."""
    bits = values.bits(UINT32)
    tie = ((bits >> 16) & 1).bits(INT32)
    return (bits.bits(INT32) + 0x7FFF + tie).bits(UINT32) >> 16


def words_to_bytes(words: Value) -> Value:
    """``[N, w]`` uint32 words to ``[N, 4 w]`` bytes (as uint32), little-endian."""
    parts = (words.unsqueeze(2) >> [0, 8, 16, 24]) & 0xFF
    return parts.reshape(words.dim(0), words.dim(1) * 4)


def bytes_to_words(body: Body, content: Value, used: int, row_bytes: int) -> Value:
    """``[N, used]`` bytes (as uint32), padded with zeros to ``row_bytes``, to ``[N, row_bytes / 4]`` int32 words."""
    rows = content.dim(0)
    if row_bytes > used:
        content = body.concat(1, content, body.fill(0, UINT32, rows, row_bytes - used))
    parts = content.reshape(rows, row_bytes // 4, 4) << [0, 8, 16, 24]
    word = parts.gather(0, axis=2)
    for position in (1, 2, 3):
        word = word | parts.gather(position, axis=2)
    return word.bits(INT32)


def _split16(body: Body, halves: Value, width: int) -> Value:
    """``[N, width]`` 16-bit patterns to ``[N, 2 width]`` bytes, both as uint32."""
    return ((halves.unsqueeze(2) >> [0, 8]) & 0xFF).reshape(halves.dim(0), 2 * width)


def _join16(content: Value, width: int) -> Value:
    """``[N, 2 width]`` bytes to ``[N, width]`` f32 values of the bf16 patterns."""
    pairs = content.reshape(content.dim(0), width, 2) << [16, 24]
    return (pairs.gather(0, axis=2) | pairs.gather(1, axis=2)).bits(FLOAT)


def _split32(body: Body, words: Value, width: int) -> Value:
    return words_to_bytes(words).reshape(words.dim(0), 4 * width)


def _join32(content: Value, width: int) -> Value:
    """``[N, 4 width]`` bytes to ``[N, width]`` f32 values of the patterns."""
    parts = content.reshape(content.dim(0), width, 4) << [0, 8, 16, 24]
    low = parts.gather(0, axis=2) | parts.gather(1, axis=2)
    return (low | parts.gather(2, axis=2) | parts.gather(3, axis=2)).bits(FLOAT)


def amax_scale(values: Value, axis: int, floor: float) -> Value:
    """max(amax / 448, floor) along ``axis``, kept with size 1."""
    return (values.unary("Abs").max(axis) / E4M3_MAX).maximum(floor)


def round_up_to_power_of_two(scales: Value) -> Value:
    """The smallest power of two not below each of ``scales`` (f32, positive, normal)."""
    return ((scales.bits(INT32) + 0x7FFFFF).bits(UINT32) & 0xFF800000).bits(FLOAT)


def group_columns(body: Body, values: Value) -> Value:
    """f32 ``[N, width]`` to ``[N, ceil(width / 128), 128]``; zeros follow the last value."""
    width = values.dim(1)
    groups = (width + (SCALE_GROUP - 1)) // SCALE_GROUP
    zeros = body.fill(0.0, FLOAT, values.dim(0), groups * SCALE_GROUP - width)
    return body.concat(1, values, zeros).reshape(values.dim(0), groups, SCALE_GROUP)


def encode_kv_rows(body: Body, layout: KvLayout, latent: Value, rope: Value | None) -> tuple[Value, Value | None]:
    """Rows of the latent cache.

    Args:
        latent: f32 ``[N, R]``.
        rope: f32 ``[N, Dr]``; None when Dr is 0.

    Returns:
        int32 words ``[N, row_words]``, and the scales f32 ``[N, 1]`` that lie behind the rows of the page (None: the
        format has none).
    """
    rank, rope_dim = layout.kv_lora_rank, layout.qk_rope_head_dim
    count = latent.dim(0)
    scales: Value | None = None
    if layout.row_format == "f32":
        values = latent if rope is None else body.concat(1, latent, rope)
        words = values.bits(INT32)
        if layout.row_words > layout.width:
            words = body.concat(1, words, body.fill(0, INT32, count, layout.row_words - layout.width))
        return words, None
    if layout.row_format == "bf16":
        parts = [_split16(body, encode_bf16(latent), rank)]
        rope_bits = None if rope is None else encode_bf16(rope)
    elif layout.row_format == "fp8":
        scales = amax_scale(latent, 1, KV_SCALE_FLOOR)
        parts = [encode_e4m3(body, latent / scales)]
        rope_bits = None if rope is None else encode_bf16(rope / scales)
    elif layout.row_format == "fp8_ds_mla":
        groups = group_columns(body, latent)
        group_scales = amax_scale(groups, 2, KV_SCALE_FLOOR)
        padded = layout.group_scales * SCALE_GROUP
        codes = encode_e4m3(body, groups / group_scales).reshape(count, padded)
        parts = [_columns(codes, padded, 0, rank)]
        parts.append(_split32(body, group_scales.squeeze(2).bits(UINT32), layout.group_scales))
        rope_bits = None if rope is None else encode_bf16(rope)
    else:
        parts = [encode_e4m3(body, latent / layout.kv_scale)]
        if rope is not None:
            parts.append(encode_e4m3(body, rope / layout.kv_scale))
        rope_bits = None
    if rope_bits is not None:
        parts.append(_split16(body, rope_bits, rope_dim))
    return bytes_to_words(body, body.concat(1, *parts), layout.content_bytes, layout.row_bytes), scales


def decode_kv_rows(body: Body, layout: KvLayout, words: Value, scales: Value | None) -> Value:
    """The values f32 ``[N, R + Dr]`` of rows.

    ``words`` is int32 ``[N, row_words]``, ``scales`` f32 ``[N, 1]`` from behind the rows of the page (None: the format
    has none).
    """
    rank, rope_dim, width = layout.kv_lora_rank, layout.qk_rope_head_dim, layout.width
    if layout.row_format == "f32":
        return _columns(words, layout.row_words, 0, width).bits(FLOAT)
    if layout.row_format == "bf16":
        halves = (words.bits(UINT32).unsqueeze(2) << [16, 0]) & 0xFFFF0000
        values = halves.reshape(words.dim(0), 2 * layout.row_words).bits(FLOAT)
        return _columns(values, 2 * layout.row_words, 0, width)
    content = words_to_bytes(words.bits(UINT32))
    if layout.row_format == "fp8_flat":
        return decode_e4m3(body, _columns(content, layout.row_bytes, 0, width)) * layout.kv_scale
    latent = decode_e4m3(body, _columns(content, layout.row_bytes, 0, rank))
    if layout.row_format == "fp8_ds_mla":
        group_scales = _join32(content.slice(1, layout.latent_bytes, layout.rope_offset), layout.group_scales)
        latent = latent * group_scales.gather([column // SCALE_GROUP for column in range(rank)], axis=1)
    values = latent
    if rope_dim:
        values = body.concat(1, latent, _join16(content.slice(1, layout.rope_offset, layout.content_bytes), rope_dim))
    return values if scales is None else values * scales


def index_scale(layout: IndexLayout, values: Value, axis: int) -> Value:
    """The scale of index vectors (keys and queries) along ``axis``, kept with size 1."""
    scales = amax_scale(values, axis, INDEX_SCALE_FLOOR)
    return round_up_to_power_of_two(scales) if layout.scale_ue8m0 else scales


def encode_index_rows(body: Body, layout: IndexLayout, keys: Value) -> tuple[Value, Value | None]:
    """Rows of the index cache from ``keys`` f32 ``[N, Di]``; returns as :func:`encode_kv_rows`."""
    if layout.index_format == "f32":
        padding = layout.row_words - layout.index_head_dim
        words = keys.bits(INT32)
        return (body.concat(1, words, body.fill(0, INT32, keys.dim(0), padding)) if padding else words), None
    scales = index_scale(layout, keys, 1)
    codes = encode_e4m3(body, keys / scales)
    return bytes_to_words(body, codes, layout.content_bytes, layout.row_bytes), scales


def decode_index_rows(body: Body, layout: IndexLayout, words: Value, scales: Value | None) -> Value:
    """The values f32 ``[N, Di]`` of rows; arguments as in :func:`decode_kv_rows`."""
    if layout.index_format == "f32":
        return _columns(words, layout.row_words, 0, layout.index_head_dim).bits(FLOAT)
    values = decode_e4m3(body, _columns(words_to_bytes(words.bits(UINT32)), layout.row_bytes, 0, layout.index_head_dim))
    return values if scales is None else values * scales


def _columns(values: Value, width: int, start: int, stop: int) -> Value:
    return values if (start, stop) == (0, width) else values.slice(1, start, stop)
