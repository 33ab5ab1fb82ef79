"""Attention over a paged cache in float64, a sequence at a time: the op set's references for cases with many keys.

``tests/gpu/test_large_reference.py`` compares it with those references.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mla_trt.formats import KvLayout

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


def layout_of(attributes: Mapping[str, Any]) -> KvLayout:
    """The pages that a node's attributes describe."""
    names = ("page_size", "row_format", "kv_lora_rank", "qk_rope_head_dim", "kv_scale")
    return KvLayout(**{name: attributes[name] for name in names if name in attributes})


def places(inputs: Mapping[str, Array], pages: int, page_size: int, sequence: int, keys: Array) -> tuple[Array, Array]:
    """Page of each key of a sequence, -1 where the block table has none in the pool; and slot."""
    row = inputs["block_table"][sequence].astype(np.int64)
    column = keys.astype(np.int64) // page_size
    page = np.full(len(keys), -1, np.int64)
    inside = column < len(row)
    page[inside] = row[column[inside]]
    page[(page < 0) | (page >= pages)] = -1
    return page, keys % page_size


def attention(
    inputs: Mapping[str, Array], attributes: Mapping[str, Any], query: Array | None = None
) -> dict[str, Float64]:
    """``output`` and ``lse`` of MlaDecoding and MlaPrefillSparse.

    Args:
        inputs: the op's.
        attributes: the op's.
        query: instead of ``inputs["query"]``, for one that was rounded.
    """
    layout = layout_of(attributes)
    pool = inputs["kv_cache"]
    query = (inputs["query"] if query is None else query).astype(np.float64)
    tokens, heads, _ = query.shape
    output = np.zeros((tokens, heads, layout.kv_lora_rank))
    lse = np.full((tokens, heads), -np.inf)
    sinks = inputs.get("sinks")
    sequence_of = inputs["token_sequence"]
    for sequence in np.unique(sequence_of[sequence_of >= 0]).tolist():
        members = np.flatnonzero(sequence_of == sequence)
        positions = inputs["positions"][members].astype(np.int64)
        keys = np.arange(positions.max() + 1)
        page, slot = places(inputs, len(pool), layout.page_size, sequence, keys)
        present = page >= 0
        latent, rope = layout.read(pool, page[present], slot[present])
        rows = np.concatenate([latent, rope], axis=1).astype(np.float64)
        row_of = np.cumsum(present) - 1
        for token, position in zip(members.tolist(), positions.tolist(), strict=True):
            if "indices" in inputs:
                listed = inputs["indices"][token].astype(np.int64)
                if "index_lengths" in inputs:
                    listed = listed[: max(int(inputs["index_lengths"][token]), 0)]
                listed = listed[(listed >= 0) & (listed <= position)]
                chosen = rows[row_of[listed[present[listed]]]]
            else:
                chosen = rows[: int(present[: position + 1].sum())]
            if not len(chosen):
                continue
            scores = attributes["softmax_scale"] * (query[token] @ chosen.T)
            top = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - top)
            total = weights.sum(axis=1)
            lse[token] = np.log(total) + top[:, 0]
            if sinks is not None:
                with np.errstate(over="ignore"):
                    total = total + np.exp(sinks.astype(np.float64) - top[:, 0])
            output[token] = weights @ chosen[:, : layout.kv_lora_rank] / total[:, None]
    return {"output": output, "lse": lse}
