"""Sorts an attention core's rows by token and head, and its score products by where their queries come from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_trt.passes.attention_core import AttentionCore, NoMatch, ScorePart
from mla_trt.passes.features import Projected, locate, projected_by, take
from mla_trt.passes.probe import ZERO, Linear, Probe


@dataclass(frozen=True)
class QueryGroup:
    """Some of the score product's dimensions whose queries come from one tensor.

    Attributes:
        dims: int64, positions in the product's width.
        source: Linear [rows, inputs]: the dimensions themselves or, behind per-head weights (`projected`), what those multiply.
    """

    part: ScorePart
    dims: np.ndarray
    source: Linear
    projected: Projected | None


def query_groups(probe: Probe, part: ScorePart) -> list[QueryGroup]:
    first = np.zeros(part.query.shape, np.int64)
    for term in reversed(part.query.terms):
        first = np.where(term.codes != ZERO, term.codes, first)
    numbers = probe.owners(first)[0]
    if not (numbers == numbers[:1]).all():
        raise NoMatch("the queries of different rows come from different tensors", part.node)
    groups = []
    for number in dict.fromkeys(numbers[0].tolist()):
        dims = np.flatnonzero(numbers[0] == number)
        source = take(part.query, (slice(None), dims))
        projected = projected_by(probe, source.terms[0].codes) if len(source.terms) == 1 else None
        if projected is not None and projected.per_head:
            if not (
                (projected.group == projected.group[:, :1]).all() and (projected.row == projected.row[:, :1]).all()
            ):
                raise NoMatch("a query mixes rows of a product", part.node)
            groups.append(
                QueryGroup(part, dims, take(projected.data, (projected.group[:, 0], projected.row[:, 0])), projected)
            )
        else:
            groups.append(QueryGroup(part, dims, source, None))
    return groups


def sort_heads(probe: Probe, core: AttentionCore, groups: list[QueryGroup]) -> np.ndarray:
    """Rows of the core as int64 [B, S, H]."""
    rows = core.visible.shape[0]
    token = np.full(rows, -1, np.int64)
    for group in groups:
        for term in group.source.terms:
            place = locate(probe, term)
            for column in range(place.token.shape[1]):
                here = place.token[:, column]
                if not (((here == token) | (token < 0) | (here < 0)).all()):
                    raise NoMatch("a query is made from more than one token", group.part.node)
                token = np.where(token < 0, here, token)
    if (token < 0).any():
        raise NoMatch("the queries are not laid out with the tokens first", core.softmax)
    tokens = probe.batch * probe.sizes.new
    heads = rows // tokens
    if heads * tokens != rows or not (np.bincount(token, minlength=tokens) == heads).all():
        raise NoMatch("the tokens do not all have the same number of heads", core.softmax)
    return np.argsort(token, kind="stable").reshape(probe.batch, probe.sizes.new, heads)
