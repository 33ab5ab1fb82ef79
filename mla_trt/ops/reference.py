"""What the numpy references share: plain loops over sequences, tokens and heads, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mla_trt.formats import IndexLayout, KvLayout, PageLayout
from mla_trt.ops.schema import Array

Float64 = npt.NDArray[np.float64]
Words = npt.NDArray[np.int32]


def copied_pages(cache: Array, page_copies: Array | None) -> Words:
    """A copy of ``cache`` after the copies of whole pages; pairs with a page outside the pool are skipped."""
    copied = cache.astype(np.int32, copy=True)
    for source, target in () if page_copies is None else page_copies.tolist():
        if 0 <= source < len(cache) and 0 <= target < len(cache):
            copied[target] = cache[source]
    return copied


def page_of(block_table: Array, sequence: int, position: int, pages: int, page_size: int) -> int | None:
    """The page of a position, None when the block table has none in the pool."""
    column = position // page_size
    if column >= block_table.shape[1]:
        return None
    page = int(block_table[sequence, column])
    return page if 0 <= page < pages else None


def new_row_places(inputs: Mapping[str, Array], pages: int, page_size: int) -> Iterator[tuple[int, int, int]]:
    """(token, page, slot) of each new row that is written."""
    for token, sequence in enumerate(inputs["token_sequence"].tolist()):
        position = int(inputs["positions"][token])
        page = None if sequence < 0 else page_of(inputs["block_table"], sequence, position, pages, page_size)
        if page is not None:
            yield token, page, position % page_size


def present_keys(
    layout: PageLayout, cache: Array, block_table: Array, sequence: int, keys: Sequence[int]
) -> tuple[list[int], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Those of ``keys`` whose page is in the pool, with page and slot of each."""
    places = [(key, page_of(block_table, sequence, key, len(cache), layout.page_size)) for key in keys]
    found = [(key, page) for key, page in places if page is not None]
    present = [key for key, _ in found]
    return present, np.array([page for _, page in found], np.int64), np.array(present, np.int64) % layout.page_size


def read_latents(
    layout: KvLayout, cache: Array, block_table: Array, sequence: int, keys: Sequence[int]
) -> tuple[Float64, Float64]:
    """Latent ``[n, R]`` and rope key ``[n, Dr]`` of those of ``keys`` whose page is in the pool."""
    _, page, slot = present_keys(layout, cache, block_table, sequence, keys)
    latent, rope = layout.read(cache.astype(np.int32, copy=False), page, slot)
    return latent.astype(np.float64), rope.astype(np.float64)


def read_index_keys(
    layout: IndexLayout, cache: Array, block_table: Array, sequence: int, keys: Sequence[int]
) -> tuple[list[int], Float64]:
    """Those of ``keys`` whose page is in the pool, and their values ``[n, Di]``."""
    present, page, slot = present_keys(layout, cache, block_table, sequence, keys)
    return present, layout.read(cache.astype(np.int32, copy=False), page, slot).astype(np.float64)


def attended_keys(position: int, indices: Array | None, limit: int | None) -> list[int]:
    """The keys of one token: 0..position, or those entries of its list (the first ``limit``) that lie there."""
    if indices is None:
        return list(range(position + 1))
    counted = indices.tolist()[: None if limit is None else max(limit, 0)]
    return [key for key in counted if 0 <= key <= position]


def attend(scores: Float64, values: Float64, sink: float | None) -> tuple[Float64, float]:
    """Softmax of ``scores`` ``[n]`` applied to ``values`` ``[n, width]``, and the log of the sum without the sink.

    Zeros and -inf when n is 0.
    """
    if not len(scores):
        return np.zeros(values.shape[1]), -np.inf
    top = float(scores.max())
    weights = np.exp(scores - top)
    total = float(weights.sum())
    with np.errstate(over="ignore"):  # a huge sink takes all the weight
        share = 0.0 if sink is None else float(np.exp(np.float64(sink) - top))
    return weights @ values / (total + share), float(np.log(total) + top)


def dequantized(weight: Array, scale: Array | None) -> Float64:
    """Weight ``[H, m, n]`` times the scale of each 128 x 128 block."""
    values = weight.astype(np.float64)
    if scale is None:
        return values
    rows, columns = np.arange(values.shape[1]) // 128, np.arange(values.shape[2]) // 128
    return values * scale.astype(np.float64)[:, rows][:, :, columns]
