"""Reads what keys and values are made of: the latent that all heads share, its up-projections, and the queries that meet it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt.passes.attention_core import AttentionCore, NoMatch, ScorePart
from mla_trt.passes.features import (
    Features,
    Projected,
    UpProjection,
    is_input,
    locate,
    projected_by,
    refuse_constants,
    refuse_states,
    shared_heads,
    single_term,
    take,
)
from mla_trt.passes.graph import producer
from mla_trt.passes.match_query import QueryGroup
from mla_trt.passes.norms import RmsNorm, recognise_rms_norm
from mla_trt.passes.probe import ZERO, Linear, Probe, Term


class NormOverCache(NoMatch):
    """The export caches latents before their norm and norms all of them in every step."""

    def __init__(self, tensor: gs.Tensor, norm: RmsNorm, node: gs.Node) -> None:
        super().__init__("the latents are normed after they are cached", node)
        self.tensor = tensor
        self.norm = norm


@dataclass(frozen=True)
class Latent:
    """What keys and values are made of.

    Attributes:
        number: owner of the new tokens' latents; `index`, `factor` [R] its entries.
        new: columns of the core that hold new tokens; `token` int64 [B, len(new)] which ones.
        cached: columns that come from a cache input.
        expanded: the graph multiplies the latent by the up-projection.
        values: entries of the core's values that are not padding: zeros that make them as wide as the keys.
    """

    number: int
    index: np.ndarray
    factor: np.ndarray
    new: np.ndarray
    token: np.ndarray
    cached: np.ndarray
    cached_expanded: bool
    expanded: bool
    values: np.ndarray


def read_latent(probe: Probe, core: AttentionCore, rows: np.ndarray) -> tuple[Latent, UpProjection | None]:
    node = core.softmax
    group = core.value_group[rows]
    if not (group == group[:, :1]).all():
        raise NoMatch("different query tokens of one head meet different values", node)
    values = take(core.value, (group[:, 0],))
    if (
        len(values.terms) > 1
        and len(np.unique([np.unique(probe.owners(term.codes)[0]).max() for term in values.terms])) == 1
    ):
        raise NoMatch(
            "the values are rotated by position like the keys: keys and values are one tensor (multi-query attention), not "
            "projections of a latent",
            node,
        )
    value = single_term(values, "the values", node)  # [B, H, C, Dv]
    kept = np.flatnonzero((value.codes != ZERO).any(axis=(0, 1, 2)))
    if len(kept):
        value = Term(value.codes[..., kept], value.coefficients[..., kept])
    numbers = probe.owners(value.codes)[0]
    column_owner = numbers[0, 0, :, 0]
    if not (numbers == column_owner[None, None, :, None]).all():
        raise NoMatch("the values of one key come from several tensors", node)
    seen = core.visible.any(axis=0)
    if (seen & (column_owner == 0)).any():
        raise NoMatch(
            "the cache is baked into the model as a constant, so its update is lost: export the model with the cache as inputs and outputs",
            node,
        )
    refuse_states(probe, column_owner, node)
    from_input = np.array([is_input(probe, int(number)) for number in column_owner])
    made = np.flatnonzero(~from_input & (column_owner > 0))
    if not len(made):
        raise NoMatch("the values of the new tokens do not reach the attention", node)
    shared = bool((value.codes == value.codes[:, :1]).all()) and rows.shape[2] > 1
    projected = None if shared else projected_by(probe, value.codes[:, :, made])
    if projected is None and not shared:
        raise NoMatch(
            f"the heads have values of their own that are no projection of a shared latent: this is {shared_heads(values)}",
            producer(probe.owner(int(column_owner[made[0]]))),
        )
    if projected is None:
        latent = _latent_entries(
            probe, Term(value.codes[:, 0], value.coefficients[:, 0]), np.arange(len(column_owner)), node
        )
        return _finish_latent(latent, kept, expanded=False, cached_expanded=False, cached=None), None
    column, group_at = _weight_places(projected, node)
    source = single_term(
        take(projected.data, (projected.group[:, 0, :, 0], projected.row[:, 0, :, 0])), "the latents", node
    )  # [B, C', R]
    latent = _latent_entries(probe, source, made, node)
    factor = value.coefficients[0, :, made[-1], :]
    up = UpProjection(
        projected.weight,
        projected.view,
        projected.right,
        group_at[:, :, None],
        column[:, :, None],
        np.arange(source.codes.shape[-1])[None, None, :],
        factor[:, :, None],
    )
    old = np.flatnonzero(from_input)
    return _finish_latent(latent, kept, expanded=True, cached_expanded=bool(len(old)), cached=old), up


def _weight_places(projected: Projected, node: gs.Node) -> tuple[np.ndarray, np.ndarray]:
    """Weight column and group [H, outputs] of atoms [B, H, C, outputs], which must not depend on the token."""
    column, group = projected.column, projected.group
    if not (column == column[:1, :, :1]).all():
        raise NoMatch("the up-projection differs from token to token", node)
    head_group = group if projected.per_head else np.zeros_like(group)
    if projected.per_head and not (head_group == head_group[:1, :, :1]).all():
        raise NoMatch("the up-projection differs from token to token", node)
    if not (projected.row == projected.row[:, :1, :, :1]).all():
        raise NoMatch("the heads do not share one latent", node)
    return column[0, :, 0], head_group[0, :, 0]


@dataclass(frozen=True)
class _Entries:
    number: int
    index: np.ndarray
    factor: np.ndarray
    new: np.ndarray
    token: np.ndarray
    cached: np.ndarray


def _latent_entries(probe: Probe, term: Term, columns: np.ndarray, node: gs.Node) -> _Entries:
    """Reads the latent's owner and entries from atoms [B, columns, R]."""
    numbers = probe.owners(term.codes)[0]
    owner = numbers[0, :, 0]
    if not (numbers == owner[None, :, None]).all():
        raise NoMatch("the latent of one token comes from several tensors", node)
    if (owner == 0).any():
        raise NoMatch(
            "the cache is baked into the model as a constant, so its update is lost: export the model with the cache as inputs and outputs",
            node,
        )
    refuse_states(probe, owner, node)
    cached = np.array([is_input(probe, int(number)) for number in owner])
    fresh = np.flatnonzero(~cached)
    makers = np.unique(owner[fresh])
    if len(makers) != 1:
        raise NoMatch(
            "the new tokens' latents come from several tensors"
            if len(makers)
            else "no new token's latent reaches the attention",
            node,
        )
    place = locate(probe, Term(term.codes[:, fresh], term.coefficients[:, fresh]))
    if (place.token < 0).any() and not len(np.flatnonzero(cached)):
        tensor = probe.owner(int(makers[0]))
        norm = recognise_rms_norm(probe, tensor)
        if norm is not None:
            raise NormOverCache(tensor, norm, node)
    if (place.token < 0).any() or not (place.token == place.token[:, :, :1]).all():
        raise NoMatch("the latent is not laid out with the tokens first", node)
    index, factor = place.entry[0, 0], place.factor[0, 0]
    if not (place.entry == index).all() or not np.allclose(place.factor, factor, rtol=1e-6):
        raise NoMatch("the latent is scaled differently from token to token", node)
    return _Entries(
        int(makers[0]), index, factor, columns[fresh], place.token[:, :, 0], columns[np.flatnonzero(cached)]
    )


def _finish_latent(
    entries: _Entries, values: np.ndarray, *, expanded: bool, cached_expanded: bool, cached: np.ndarray | None
) -> Latent:
    old = entries.cached if cached is None or not len(cached) else np.union1d(entries.cached, cached)
    return Latent(
        entries.number,
        entries.index,
        entries.factor,
        entries.new,
        entries.token,
        old,
        cached_expanded,
        expanded,
        values,
    )


def new_keys(probe: Probe, part: ScorePart, rows: np.ndarray, latent: Latent) -> Linear:
    """The new tokens' keys of a part, [B, H, new, width]."""
    group = part.group[rows]
    if not (group == group[:, :1]).all():
        raise NoMatch("different query tokens of one head meet different keys", part.node)
    return take(take(part.key, (group[:, 0],)), (slice(None), slice(None), latent.new))


def divide_key(probe: Probe, part: ScorePart, keys: Linear, latent: Latent) -> tuple[np.ndarray, np.ndarray]:
    """Dimensions of a part that are made from the latent, and the others."""
    refuse_constants(keys, "keys", part.node)
    first = np.zeros(keys.shape, np.int64)
    for term in reversed(keys.terms):
        first = np.where(term.codes != ZERO, term.codes, first)
    numbers = probe.owners(first[:1, :1, :1])[0].reshape(-1)
    used = np.flatnonzero(numbers > 0)
    nope = []
    for number in dict.fromkeys(numbers[used].tolist()):
        dims = used[numbers[used] == number]
        if latent.expanded:
            projected = projected_by(probe, first[:, :, :, dims])
            one_term = all((term.codes[..., dims] == ZERO).all() or term is keys.terms[0] for term in keys.terms)
            if projected is not None and one_term and _is_latent(probe, projected, latent):
                nope.append(dims)
        elif number == latent.number:
            nope.append(dims)
    chosen = np.sort(np.concatenate(nope)) if nope else np.zeros(0, np.int64)
    return chosen, np.setdiff1d(used, chosen)


def _is_latent(probe: Probe, projected: Projected, latent: Latent) -> bool:
    """Whether what a projection multiplies is the latent that the values are made from."""
    source = take(projected.data, (projected.group[0, 0, 0, :1], projected.row[0, 0, 0, :1]))
    numbers = np.unique(probe.owners(source.terms[0].codes)[0])
    return len(source.terms) == 1 and len(numbers) == 1 and int(numbers[0]) == latent.number


@dataclass(frozen=True)
class NopePart:
    """`token_scale` as that of the rope part."""

    query: Features
    token_scale: np.ndarray
    scale: float
    up: UpProjection | None


def split_scale(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors [B, S, H] as one for each token, [B, S, 1], times one for each head, [H]; where they are no such product, as they are, times ones."""
    heads = scale / np.where(scale[:, :, :1] == 0, 1, scale[:, :, :1])
    if np.allclose(heads, heads[:1, :1], rtol=1e-5):
        return scale[:, :, :1], heads[0, 0]
    return scale, np.ones(scale.shape[2])


def read_nope(
    probe: Probe,
    part: ScorePart,
    dims: np.ndarray,
    keys: Linear,
    rows: np.ndarray,
    latent: Latent,
    groups: list[QueryGroup],
) -> NopePart:
    """The part of the scores that the latent makes: queries, W_UK and scale."""
    key_entries = take(keys, (slice(None), slice(None), slice(None), dims))
    if not latent.expanded and len(key_entries.terms) > 1:
        raise NoMatch(
            "all heads share one value, and the key that is made beside it is rotated as a whole: this is multi-query attention, "
            "not a latent",
            part.node,
        )
    key = single_term(key_entries, "the keys", part.node)
    group = next((group for group in groups if group.part is part and np.isin(dims, group.dims).all()), None)
    if group is None:
        raise NoMatch("the queries that meet the latent come from several tensors", part.node)
    inside = np.searchsorted(group.dims, dims)
    if latent.expanded:
        if group.projected is not None:
            raise NoMatch("queries and keys are both multiplied by per-head weights", part.node)
        projected = projected_by(probe, key.codes)
        assert projected is not None
        column, group_at = _weight_places(projected, part.node)
        source = single_term(
            take(projected.data, (projected.group[:, 0, :, 0], projected.row[:, 0, :, 0])), "the latents", part.node
        )
        order = _latent_order(probe, source, latent, part.node)
        key_factor = key.coefficients[0, :, 0]
        up: UpProjection | None = UpProjection(
            projected.weight,
            projected.view,
            projected.right,
            group_at[:, :, None],
            column[:, :, None],
            order[None, None, :],
            np.ones((1, 1, 1)),
        )
        query, token_scale, scale = _read_query(
            probe, take(group.source, (slice(None), inside)), rows, part, key_factor
        )
        return NopePart(query, token_scale, scale, up)
    if not (key.codes == key.codes[:, :1]).all():
        raise NoMatch("the heads do not share one latent", part.node)
    place = locate(probe, Term(key.codes[:, 0], key.coefficients[:, 0]))
    order = _order_of(place.entry[0, 0], latent.index, part.node)  # dims[order[r]] meets latent entry r
    key_factor = (place.factor[0, 0][order] / latent.factor)[None, :]
    if group.projected is None:
        query, token_scale, scale = _read_query(
            probe, take(group.source, (slice(None), inside[order])), rows, part, key_factor
        )
        return NopePart(query, token_scale, scale, None)
    projected = group.projected
    head_rows = rows[0, 0]
    columns = projected.column[head_rows][:, inside[order]]  # [H, R]
    groups_at = projected.group[head_rows, 0]
    if (
        not (projected.group[rows, 0] == groups_at).all()
        or not (projected.column[rows][..., inside[order]] == columns).all()
    ):
        raise NoMatch("W_UK differs from token to token", part.node)
    if not np.allclose(key_factor, key_factor[:, :1]):
        raise NoMatch("the keys scale the latent's entries differently from the values", part.node)
    width = group.source.shape[1]
    query, token_scale, _ = _read_query(probe, group.source, rows, part, np.full((1, width), key_factor[0, 0]))
    outer = part.query.terms[0].coefficients[rows][..., dims]
    if not np.allclose(outer, outer[..., :1]):
        raise NoMatch("the absorbed queries are scaled differently from entry to entry", part.node)
    token_scale = token_scale * outer[:, :, :1, 0]
    up = UpProjection(
        projected.weight,
        projected.view,
        projected.right,
        groups_at[:, None, None],
        columns[:, None, :],
        np.arange(width)[None, :, None],
        np.ones((1, 1, 1)),
    )
    return NopePart(query, token_scale, float(token_scale[0, 0, 0]), up)


def _latent_order(probe: Probe, source: Term, latent: Latent, node: gs.Node) -> np.ndarray:
    """Position in a projection's summed axis of each latent entry."""
    place = locate(probe, Term(source.codes[:, :1], source.coefficients[:, :1]))
    order = _order_of(place.entry[0, 0], latent.index, node)
    if not np.allclose(place.factor[0, 0][order], latent.factor, rtol=1e-5):
        raise NoMatch("keys and values are made from differently scaled latents", node)
    return order


def _order_of(entries: np.ndarray, wanted: np.ndarray, node: gs.Node) -> np.ndarray:
    if not np.array_equal(np.sort(entries), np.sort(wanted)):
        raise NoMatch("keys and values are made from different entries of the latent", node)
    return np.argsort(entries)[np.argsort(np.argsort(wanted))]


def _read_query(
    probe: Probe, source: Linear, rows: np.ndarray, part: ScorePart, key_factor: np.ndarray
) -> tuple[Features, np.ndarray, float]:
    """Queries [rows, width] as entries of a tensor; factors are split into one for each token (and head, if need be), one for all, and what
    remains for each entry."""
    term = single_term(take(source, (rows,)), "the queries", part.node)  # [B, S, H, width]
    place = locate(probe, term)
    numbers = np.unique(place.number)
    if len(numbers) != 1 or (place.entry < 0).any() or not (place.entry == place.entry[:1, :1]).all():
        raise NoMatch("the queries are no entries of one projection", part.node)
    factor = place.factor * part.scale[rows][..., None] * np.broadcast_to(key_factor, place.factor.shape[2:])
    token_scale, _ = split_scale(factor[..., 0])
    remaining = factor / np.where(token_scale == 0, 1, token_scale)[..., None]
    if not np.allclose(remaining, remaining[:1, :1], rtol=1e-5) or not np.isfinite(remaining).all():
        raise NoMatch("the queries' entries are scaled differently from token to token", part.node)
    scale = float(token_scale[0, 0, 0])
    return Features(probe.owner(int(numbers[0])), place.entry[0, 0], remaining[0, 0]), token_scale, scale
