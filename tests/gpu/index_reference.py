"""MlaIndexer in float64, a token at a time but not a head or a key: the op set's reference for cases with many keys.

``tests/gpu/test_indexer.py`` compares it with that reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mla_trt.formats import IndexLayout, decode_e4m3, encode_e4m3
from mla_trt.ops.indexer import hadamard

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


def layout_of(attributes: Mapping[str, Any]) -> IndexLayout:
    """The pages that a node's attributes describe."""
    return IndexLayout(
        page_size=attributes["page_size"],
        index_format=attributes["index_format"],
        index_head_dim=attributes["index_head_dim"],
        scale_ue8m0=bool(attributes.get("index_scale_ue8m0", 0)),
    )


def page_and_slot(inputs: Mapping[str, Array], page_size: int, sequence: int, keys: Array) -> tuple[Array, Array]:
    """Page of each key of a sequence, -1 where the block table has none in the pool; and slot."""
    row = np.append(inputs["block_table"][sequence].astype(np.int64), -1)
    page = row[np.minimum(keys.astype(np.int64) // page_size, len(row) - 1)]
    return np.where((page >= 0) & (page < len(inputs["indexer_cache"])), page, -1), keys % page_size


def transformed(inputs: Mapping[str, Array], attributes: Mapping[str, Any], values: Float32) -> Float32:
    """Rope and Hadamard transform of ``values`` f32 ``[T, n, Di]``."""
    size, rope = attributes["index_head_dim"], attributes.get("index_rope_dim", 0)
    values = values.copy()
    if rope and len(values):
        rows = np.arange(len(values)) if "rope_rows" not in inputs else inputs["rope_rows"].astype(np.int64)
        rows = np.clip(rows, 0, len(inputs["index_cos"]) - 1)
        cos, sin = inputs["index_cos"][rows][:, None], inputs["index_sin"][rows][:, None]
        interleaved = attributes.get("index_rope_interleaved", 0)
        first = slice(0, rope, 2) if interleaved else slice(0, rope // 2)
        second = slice(1, rope, 2) if interleaved else slice(rope // 2, rope)
        a, b = values[..., first].copy(), values[..., second].copy()
        values[..., first], values[..., second] = a * cos - b * sin, a * sin + b * cos
    if attributes.get("index_hadamard", 0):
        values = (values.astype(np.float64) @ hadamard(size).astype(np.float64) / np.sqrt(size)).astype(np.float32)
    return values


def cache_after(inputs: Mapping[str, Array], attributes: Mapping[str, Any]) -> Array:
    """``indexer_cache_out``."""
    layout = layout_of(attributes)
    cache = inputs["indexer_cache"].copy()
    for source, target in inputs["page_copies"].tolist() if "page_copies" in inputs else ():
        if 0 <= source < len(cache) and 0 <= target < len(cache):
            cache[target] = inputs["indexer_cache"][source]
    keys = inputs["index_key"].astype(np.float32)
    if "index_norm_weight" in inputs:
        wide = keys.astype(np.float64)
        wide = wide - wide.mean(axis=1, keepdims=True)
        wide /= np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + attributes["index_norm_epsilon"])
        bias = inputs["index_norm_bias"].astype(np.float64) if "index_norm_bias" in inputs else 0.0
        keys = (wide * inputs["index_norm_weight"].astype(np.float64) + bias).astype(np.float32)
    keys = transformed(inputs, attributes, keys[:, None])[:, 0]
    sequences = inputs["token_sequence"]
    for sequence in np.unique(sequences[sequences >= 0]).tolist():
        tokens = np.flatnonzero(sequences == sequence)
        page, slot = page_and_slot(inputs, layout.page_size, sequence, inputs["positions"][tokens])
        layout.write(cache, page[page >= 0], slot[page >= 0], keys[tokens[page >= 0]])
    return cache


class Scores:
    """The scores of every token over the rows of ``cache``."""

    def __init__(self, inputs: Mapping[str, Array], attributes: Mapping[str, Any], cache: Array) -> None:
        self.inputs, self.cache, self.layout = inputs, cache, layout_of(attributes)
        self.weights = inputs["index_weights"].astype(np.float64)
        query = transformed(inputs, attributes, inputs["index_query"].astype(np.float32))
        if self.layout.index_format == "fp8":
            scales = self.layout.scale(query)
            with np.errstate(invalid="ignore"):
                query = decode_e4m3(encode_e4m3(query / scales)) * scales
        self.query = query.astype(np.float64)
        self._sequence = -1
        self._keys = self._rows = np.empty(0)

    def of(self, token: int) -> tuple[Array, Float64, Float64]:
        """The keys visible to a token, their scores, and the sums of the scores' absolute terms, ``[n]`` each."""
        sequence, position = int(self.inputs["token_sequence"][token]), int(self.inputs["positions"][token])
        if sequence < 0:
            return np.empty(0, np.int64), np.empty(0), np.empty(0)
        if sequence != self._sequence:
            last = int(self.inputs["positions"][self.inputs["token_sequence"] == sequence].max())
            keys = np.arange(last + 1)
            page, slot = page_and_slot(self.inputs, self.layout.page_size, sequence, keys)
            self._sequence, self._keys = sequence, keys[page >= 0]
            self._rows = self.layout.read(self.cache, page[page >= 0], slot[page >= 0]).astype(np.float64)
        count = int(np.searchsorted(self._keys, position, side="right"))
        products = np.maximum(self.query[token] @ self._rows[:count].T, 0)
        return self._keys[:count], self.weights[token] @ products, np.abs(self.weights[token]) @ products


def best(keys: Array, scores: Float64, top_k: int) -> Array:
    """i32 ``[top_k]``: the highest scores' keys, ties to the smaller, ascending, then -1."""
    chosen = np.sort(keys[np.lexsort((keys, -scores))[:top_k]])
    return np.concatenate([chosen, np.full(top_k - len(chosen), -1)]).astype(np.int32)
