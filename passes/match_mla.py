"""Decides whether an attention core is multi-head latent attention, and gathers its parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt.passes.attention_core import AttentionCore, NoMatch, ScorePart
from mla_trt.passes.contraction import contraction, operands
from mla_trt.passes.features import Features, UpProjection, locate, take
from mla_trt.passes.graph import is_empty, producer
from mla_trt.passes.match_cache import check_cached_rows
from mla_trt.passes.match_exits import Exit, read_exits
from mla_trt.passes.match_latent import Latent, divide_key, new_keys, read_latent, read_nope
from mla_trt.passes.match_mask import check_far_mask, check_mask
from mla_trt.passes.match_query import query_groups, sort_heads
from mla_trt.passes.match_rope import Rotation, balance, collect_factors, read_rope
from mla_trt.passes.norms import RmsNorm, recognise_layer_norm, recognise_rms_norm
from mla_trt.passes.probe import ONE, Linear, Probe, Term


@dataclass(frozen=True)
class MlaMatch:
    """One attention layer that is MLA. Shapes as in the op set.

    `latent` is before its norm where there is one (`norm_weight`, with `epsilon`), and rope key and queries are before their rotation.
    `selection` is the TopK output that picks the layer's keys, if any.
    """

    softmax: gs.Node
    num_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    q_lora_rank: int | None
    scale: float
    query_nope: Features
    query_rope: Features
    query_token_scale: np.ndarray | None
    latent: Features
    norm_weight: np.ndarray | None
    epsilon: float
    rope_key: Features | None
    rotation: Rotation
    w_uk: UpProjection | None
    w_uv: UpProjection | None
    sinks: np.ndarray | None
    exits: tuple[Exit, ...]
    cache: str
    absorbed: bool
    selection: gs.Tensor | None


def match_mla(probe: Probe, core: AttentionCore, norm_over_cache: RmsNorm | None = None) -> MlaMatch:
    """Reads a core as MLA.

    Args:
        norm_over_cache: the norm that the export applies to cached and new latents alike, which `probe` sees through.

    Raises:
        NormOverCache: there is such a norm, and `probe` does not see through it yet.
        NoMatch: it is another attention; the reason says which property is missing.
    """
    node = core.softmax
    groups = [group for part in core.parts for group in query_groups(probe, part)]
    rows = sort_heads(probe, core, groups)
    latent, w_uv = read_latent(probe, core, rows)
    nope_dims: list[tuple[ScorePart, np.ndarray, Linear]] = []
    rope_dims: list[tuple[ScorePart, np.ndarray, Linear]] = []
    for part in core.parts:
        keys = new_keys(probe, part, rows, latent)
        nope_here, rope_here = divide_key(probe, part, keys, latent)
        if len(nope_here):
            nope_dims.append((part, nope_here, keys))
        if len(rope_here):
            rope_dims.append((part, rope_here, keys))
    if len(rope_dims) > 1:
        raise NoMatch("more than one product of queries and keys is left beside the latent's", rope_dims[1][0].node)
    rope = read_rope(probe, rope_dims[0][0], rope_dims[0][1], rope_dims[0][2], rows, latent) if rope_dims else None
    if len(nope_dims) != 1:
        shared = "" if latent.expanded else ": all heads share one value, as in multi-query attention"
        raise NoMatch(f"keys and values are not made from one shared latent{shared}", node)
    nope = read_nope(probe, *nope_dims[0], rows, latent, groups)
    owner = probe.owner(latent.number)
    norm = recognise_rms_norm(probe, owner)
    _check_low_rank(probe, owner if norm is None else norm.source, node)
    latent_source, norm_weight, epsilon = _before_norm(probe, latent, owner, norm, norm_over_cache)
    selection = check_mask(probe, core, rows, latent)
    _check_caches(probe, core, rows, latent)
    check_far_mask(probe, node, selection)
    exits, w_uv_after = read_exits(probe, core, rows, latent)
    w_uv = w_uv or w_uv_after
    if (nope.up is None) != (w_uv is None):
        which = "keys" if nope.up is None else "values"
        raise NoMatch(
            f"only one up-projection is a product of its own: that of the {which} has been merged into a neighbour",
            node,
        )
    sinks = None
    if core.sinks is not None:
        sinks = core.sinks[rows]
        if not np.allclose(sinks, sinks[:1, :1]):
            raise NoMatch("the attention sink differs from token to token", node)
        sinks = sinks[0, 0]
    query_rope = Features(nope.query.tensor, np.zeros((rows.shape[2], 0), np.int64), np.ones((rows.shape[2], 0)))
    none = np.zeros((probe.sizes.new, 0))
    rotation = Rotation(True, none, none, collect_factors(probe, [nope_dims[0][0].query_tensor]), True)
    if rope is not None:
        ratio = rope.token_scale / nope.token_scale
        if not np.allclose(ratio, ratio[0, 0, 0], rtol=1e-4):
            raise NoMatch("rope and latent scores are scaled differently from token to token", node)
        query_rope = rope.query
        rotation = balance(rope.rotation, float(ratio[0, 0, 0]), node)
    token_scale = None if np.allclose(nope.token_scale, nope.scale, rtol=1e-6) else nope.token_scale / nope.scale
    cache = "none" if not len(latent.cached) else "expanded" if latent.cached_expanded else "latent"
    heads, rank = rows.shape[2], len(latent.index)
    return MlaMatch(
        softmax=node,
        num_heads=heads,
        qk_nope_head_dim=nope.query.index.shape[1],
        qk_rope_head_dim=query_rope.index.shape[1],
        v_head_dim=w_uv.shape[1] if w_uv is not None else rank,
        kv_lora_rank=rank,
        q_lora_rank=_q_lora_rank(probe, nope.query.tensor),
        scale=nope.scale,
        query_nope=nope.query,
        query_rope=query_rope,
        query_token_scale=token_scale,
        latent=latent_source,
        norm_weight=norm_weight,
        epsilon=epsilon,
        rope_key=rope.key if rope is not None else None,
        rotation=rotation,
        w_uk=nope.up,
        w_uv=w_uv,
        sinks=sinks,
        exits=exits,
        cache=cache,
        absorbed=not latent.expanded,
        selection=selection,
    )


def _before_norm(
    probe: Probe, latent: Latent, owner: gs.Tensor, norm: RmsNorm | None, over_cache: RmsNorm | None
) -> tuple[Features, np.ndarray | None, float]:
    """The latent before its norm, the norm's weight [R] and its epsilon; the latent as it is where no norm is recognised."""
    count = len(latent.index)
    if over_cache is not None:
        return Features(owner, latent.index, np.ones(count)), latent.factor, over_cache.epsilon
    width = probe.shape(owner)[-1]
    if norm is None or not np.array_equal(np.sort(latent.index), np.arange(width)):
        return Features(owner, latent.index, latent.factor), None, 0.0
    weight = norm.weight[latent.index] * latent.factor
    source = Features(norm.source, latent.index, np.ones(count))
    terms = [term for term in probe.linear(norm.source).terms if (term.codes > ONE).any()]
    if len(terms) == 1 and np.allclose(terms[0].coefficients, 1):
        # The norm's input is usually a slice of a projection's output: taking it from there leaves the slice to the op's own inputs.
        place = locate(probe, Term(terms[0].codes.reshape(-1, width), np.ones((1, 1))))
        tokens = np.arange(probe.batch * probe.sizes.new)
        if (
            (place.number == place.number[0, 0]).all()
            and np.array_equal(place.token[:, 0], tokens)
            and (place.entry == place.entry[0]).all()
        ):
            source = Features(probe.owner(int(place.number[0, 0])), place.entry[0][latent.index], np.ones(count))
    return source, weight, norm.epsilon


def _check_caches(probe: Probe, core: AttentionCore, rows: np.ndarray, latent: Latent) -> None:
    sides = [(core.value, core.value_group[rows][:, 0])]
    sides += [(part.key, part.group[rows][:, 0]) for part in core.parts]
    for linear, group in sides:
        check_cached_rows(probe, take(linear, (group,)), latent.cached, latent.new, latent.token, core.softmax)


def _source_is_projection(probe: Probe, tensor: gs.Tensor) -> bool:
    """Whether a tensor is (part of) a projection's output, with or without a bias, quantised or not."""
    seen = 0
    terms = [term for term in probe.linear(tensor).terms if (term.codes > ONE).any()]
    numbers = np.unique(probe.owners(np.stack([term.codes for term in terms]))[0]) if terms else np.zeros(1, np.int64)
    if len(numbers) != 1 or numbers[0] == 0:
        return False
    node = producer(probe.owner(int(numbers[0])))
    while node is not None and seen < 8:
        pair = operands(node)
        if pair is not None:
            return any(probe.is_known(item) for item in pair)
        data = [item for item in node.inputs if not is_empty(item) and not probe.is_known(item)]
        if len(data) != 1 or not (node.op in ("Add", "Sub", "Sum") or probe.is_transparent(node)):
            return False
        node = producer(data[0])
        seen += 1
    return False


def _check_low_rank(probe: Probe, source: gs.Tensor, node: gs.Node) -> None:
    # A latent with a LayerNorm is taken as that gives it, without a norm of the op's.
    other = recognise_layer_norm(probe, source)
    if not _source_is_projection(probe, source if other is None else other.source):
        raise NoMatch(
            "keys and values are projected from the hidden state itself, not from a low-rank latent (a projection of it, or a norm of one): "
            "this is ordinary attention, or MLA whose latent has another norm",
            node,
        )


def _q_lora_rank(probe: Probe, query: gs.Tensor) -> int | None:
    """Width of the query's own latent; None where the query is projected from the hidden state."""
    node = producer(query)
    while node is not None and node.op in ("Add", "Cast", "Mul"):
        data = next((item for item in node.inputs if not probe.is_known(item)), None)
        node = producer(data) if data is not None else None
    view = contraction(probe, node) if node is not None else None
    if view is None:
        return None
    data = next((item for item in (view.left, view.right) if not probe.is_known(item)), None)
    if data is None:
        return None
    codes = probe.linear(data).terms[0].codes
    numbers = probe.owners(codes)[0]
    entries: set[int] = set()  # of the projection's output: one may enter both as it is and normed
    for number in np.unique(numbers[numbers > 0]):
        owner = probe.owner(int(number))
        norm = recognise_rms_norm(probe, owner)
        if _source_is_projection(probe, norm.source if norm is not None else owner):
            source = probe.linear(norm.source).terms[0].codes if norm is not None else codes[numbers == number]
            entries.update(source.reshape(-1).tolist())
    return len(entries) // max(probe.batch * probe.sizes.new, 1) or None
