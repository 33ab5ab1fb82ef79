"""Nodes that find, read and write rows of the page pools.

A page id outside the pool is never used as an index, because ONNX takes negative ones from the end: it is replaced by
page 0 and what comes from there is replaced by zeros, whatever its bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mla_trt.formats import IndexLayout, KvLayout, PageLayout
from mla_trt.ops.body import FLOAT, INT32, INT64, Body, Value
from mla_trt.ops.codec import decode_index_rows, decode_kv_rows, encode_index_rows, encode_kv_rows


@dataclass(frozen=True)
class Batch:
    """The sequences of a step, padded to the longest: B sequences of S slots each.

    Attributes:
        sequences: B, int64 ``[1]``.
        slots: S, int64 ``[1]``.
        token: token of each slot (0 where there is none), int64 ``[B * S]``.
        used: whether the slot holds a token, bool ``[B * S]``.
        position: position of each slot in its sequence, int64 ``[B, S]``.
        lengths: keys of each sequence, cached and new; 0 without new tokens; int64 ``[B]``.
    """

    sequences: Value
    slots: Value
    token: Value
    used: Value
    position: Value
    lengths: Value

    @classmethod
    def build(cls, body: Body, query_offsets: Value, cache_lengths: Value) -> Batch:
        """From the op inputs ``query_offsets`` and ``cache_lengths``."""
        offsets = query_offsets.cast(INT64)
        cached = cache_lengths.cast(INT64)
        sequences = cached.dim(0)
        starts = offsets.slice(0, 0, sequences)
        new = offsets.slice(0, 1, sequences + 1) - starts
        slots = new.max(0).maximum(0)
        slot = body.range(slots).unsqueeze(0)
        used = (slot < new.unsqueeze(1)).reshape(sequences * slots)
        token = (starts.unsqueeze(1) + slot).reshape(sequences * slots)
        return cls(
            sequences=sequences,
            slots=slots,
            token=body.where(used, token, 0),
            used=used,
            position=cached.unsqueeze(1) + slot,
            lengths=body.where(new > 0, cached + new, 0),
        )

    def pad(self, values: Value) -> Value:
        """``[T, ...]`` to ``[B * S, ...]``."""
        return values.gather(self.token)

    def pack(self, padded: Value, empty: Value) -> Value:
        """``[B * S, ...]`` to ``[T, ...]``; tokens of no sequence keep what ``empty`` (``[T, ...]``) has."""
        return empty.scatter(self.token.compress(self.used), padded.compress(self.used))


@dataclass(frozen=True)
class SequenceRows:
    """Rows of every sequence, key 0 first.

    Attributes:
        rows: f32 ``[B, keys, width]``.
        present: whether the key belongs to the sequence and its page is in the pool, bool ``[B, keys]``.
        keys: their number, int64 ``[1]``.
    """

    rows: Value
    present: Value
    keys: Value

    def causal(self, body: Body, batch: Batch) -> Value:
        """Whether a slot may attend to a key, bool ``[B, S, keys]``."""
        key = body.range(self.keys).unsqueeze(0, 1)
        return (key <= batch.position.unsqueeze(2)) & self.present.unsqueeze(1)


def copy_pages(cache: Value, page_copies: Value | None) -> Value:
    """``cache`` after the copies of whole pages (i32 ``[n, 2]``, from and to).

    All are read before any is written; pairs with a page outside the pool are skipped.
    """
    if page_copies is None:
        return cache
    pages = cache.dim(0)
    source, target = (page_copies.cast(INT64).gather(column, axis=1) for column in (0, 1))
    possible = _inside(source, pages) & _inside(target, pages)
    return cache.scatter(target.compress(possible), cache.gather(source.compress(possible)))


def _inside(page: Value, pages: Value) -> Value:
    return (page >= 0) & (page < pages)


def _lookup(
    body: Body, block_table: Value, sequence: Value, key: Value, known: Value, page_size: int, pages: Value
) -> tuple[Value, Value]:
    """Page of each key of each sequence, and whether it is in the pool; where ``known`` is false it is not."""
    columns = block_table.dim(1)
    column = key // page_size
    known = known & (column < columns)
    # one entry more, for the keys that have none: it stands for no page, and makes every index valid
    table = body.concat(0, block_table.cast(INT64).reshape(block_table.dim(0) * columns), body.constant([-1], INT64))
    page = table.gather(body.where(known, sequence * columns + column, block_table.dim(0) * columns))
    return page, _inside(page, pages)


def _chunks(body: Body, layout: PageLayout, page: Value, slot: Value) -> tuple[Value, int]:
    """Where rows (int64 ``[n]``) lie in the pool seen as ``[-1, g]`` words: indices ``[n, row_words / g]``, and g."""
    size = math.gcd(layout.row_words, layout.page_words)
    first = page * (layout.page_words // size) + slot * (layout.row_words // size)
    return first.unsqueeze(1) + list(range(layout.row_words // size)), size


def _pool_words(cache: Value, layout: PageLayout, size: int) -> Value:
    return cache.reshape(cache.dim(0) * (layout.page_words // size), size)


def _write_rows(
    body: Body,
    layout: PageLayout,
    cache: Value,
    block_table: Value,
    sequence: Value,
    position: Value,
    rows: tuple[Value, Value | None],
) -> Value:
    words, scales = rows
    sequence, position = sequence.cast(INT64), position.cast(INT64)
    page, writable = _lookup(body, block_table, sequence, position, sequence >= 0, layout.page_size, cache.dim(0))
    page, slot = page.compress(writable), (position % layout.page_size).compress(writable)
    chunks, size = _chunks(body, layout, page, slot)
    count = page.dim(0) * (layout.row_words // size)
    pool = _pool_words(cache, layout, size).scatter(
        chunks.reshape(count), words.compress(writable).reshape(count, size)
    )
    if scales is not None:
        place = page * layout.page_words + slot + layout.scales_word
        pool = _pool_words(pool.reshape(cache.dim(0), layout.page_words), layout, 1)
        pool = pool.scatter(place, scales.compress(writable).bits(INT32))
    return pool.reshape(cache.dim(0), layout.page_words)


def write_kv_rows(
    body: Body,
    layout: KvLayout,
    cache: Value,
    block_table: Value,
    sequence: Value,
    position: Value,
    latent: Value,
    rope: Value | None,
) -> Value:
    """``cache`` with the rows of the new tokens.

    ``latent`` is f32 ``[T, R]``, ``rope`` f32 ``[T, Dr]`` (None when Dr is 0).
    Tokens without a sequence (-1) and tokens whose page is not in the pool are not written.
    """
    return _write_rows(body, layout, cache, block_table, sequence, position, encode_kv_rows(body, layout, latent, rope))


def write_index_rows(
    body: Body, layout: IndexLayout, cache: Value, block_table: Value, sequence: Value, position: Value, keys: Value
) -> Value:
    """As :func:`write_kv_rows`, for index keys f32 ``[T, Di]``."""
    return _write_rows(body, layout, cache, block_table, sequence, position, encode_index_rows(body, layout, keys))


def _read_sequences(
    body: Body, layout: PageLayout, cache: Value, block_table: Value, batch: Batch
) -> tuple[Value, Value | None, Value, Value]:
    """Words ``[B * keys, row_words]``, scales ``[B * keys, 1]``, presence ``[B, keys]`` and the number of keys."""
    pages = cache.dim(0)
    needed = (batch.lengths.max(0).maximum(0) + (layout.page_size - 1)) // layout.page_size
    columns = needed.minimum(block_table.dim(1))
    columns = body.where(pages > 0, columns, 0)  # page 0 stands in for those that are missing, so there has to be one
    keys = columns * layout.page_size
    table = block_table.slice(1, 0, columns).cast(INT64)
    known = _inside(table, pages)
    content = cache.gather(body.where(known, table, 0))
    present = known.unsqueeze(2).expand(batch.sequences, columns, layout.page_size).reshape(batch.sequences, keys)
    # positions of the sequence only: past its end a page may hold anything
    present = present & (body.range(keys).unsqueeze(0) < batch.lengths.unsqueeze(1))
    count = batch.sequences * keys
    row_present = present.reshape(count, 1)
    rows = content if layout.scales_word == layout.page_words else content.slice(2, 0, layout.scales_word)
    words = body.where(row_present, rows.reshape(count, layout.row_words), 0)
    if not layout.has_page_scales:
        return words, None, present, keys
    scales = content.slice(2, layout.scales_word, layout.scales_word + layout.page_size).reshape(count, 1).bits(FLOAT)
    return words, body.where(row_present, scales, 0.0), present, keys


def read_kv_sequences(body: Body, layout: KvLayout, cache: Value, block_table: Value, batch: Batch) -> SequenceRows:
    """The latent rows of all sequences.

    Rows past a sequence's end or on pages outside the pool are zeros and not present.
    """
    words, scales, present, keys = _read_sequences(body, layout, cache, block_table, batch)
    rows = decode_kv_rows(body, layout, words, scales).reshape(batch.sequences, keys, layout.width)
    return SequenceRows(rows, present, keys)


def read_index_sequences(
    body: Body, layout: IndexLayout, cache: Value, block_table: Value, batch: Batch
) -> SequenceRows:
    """As :func:`read_kv_sequences`, for index keys."""
    words, scales, present, keys = _read_sequences(body, layout, cache, block_table, batch)
    rows = decode_index_rows(body, layout, words, scales).reshape(batch.sequences, keys, layout.index_head_dim)
    return SequenceRows(rows, present, keys)


def read_kv_list(
    body: Body, layout: KvLayout, cache: Value, block_table: Value, sequence: Value, keys: Value, wanted: Value
) -> tuple[Value, Value]:
    """The rows of each token's own list of keys.

    Args:
        sequence: int64 ``[T]``.
        keys: positions, int64 ``[T, K]``.
        wanted: entries that count, bool ``[T, K]``; one at least lies in a pool that has pages, or K is 0.

    Returns:
        f32 ``[T, K, R + Dr]``, zeros where not present, and presence, bool ``[T, K]``.
    """
    page, present = _lookup(body, block_table, sequence.unsqueeze(1), keys, wanted, layout.page_size, cache.dim(0))
    tokens, listed = keys.dim(0), keys.dim(1)
    count = tokens * listed
    row_present = present.reshape(count)
    page = body.where(row_present, page.reshape(count), 0)
    slot = body.where(row_present, (keys % layout.page_size).reshape(count), 0)
    chunks, size = _chunks(body, layout, page, slot)
    words = _pool_words(cache, layout, size).gather(chunks).reshape(count, layout.row_words)
    words = body.where(row_present.unsqueeze(1), words, 0)
    scales: Value | None = None
    if layout.has_page_scales:
        place = page * layout.page_words + slot + layout.scales_word
        scales = _pool_words(cache, layout, 1).gather(place).bits(FLOAT)
        scales = body.where(row_present.unsqueeze(1), scales, 0.0)
    rows = decode_kv_rows(body, layout, words, scales)
    return rows.reshape(tokens, listed, layout.width), present
