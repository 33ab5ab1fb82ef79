"""Decides whether an attention core is multi-head latent attention, and gathers its parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt.passes.attention_core import AttentionCore, NoMatch, ScorePart
from mla_trt.passes.contraction import contraction, operands
from mla_trt.passes.features import Features, UpProjection
from mla_trt.passes.graph import producer
from mla_trt.passes.match_exits import Exit, read_exits
from mla_trt.passes.match_latent import Latent, divide_key, new_keys, read_latent, read_nope
from mla_trt.passes.match_query import query_groups, sort_heads
from mla_trt.passes.match_rope import Rotation, balance, read_rope
from mla_trt.passes.norms import RmsNorm, recognise_rms_norm
from mla_trt.passes.probe import Linear, Probe


@dataclass(frozen=True)
class MlaMatch:
    """One attention layer that is MLA. Shapes as in the op set; `selection` is the TopK output that picks its keys, if any."""

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
    norm: RmsNorm | None
    rope_key: Features | None
    rotation: Rotation
    w_uk: UpProjection | None
    w_uv: UpProjection | None
    sinks: np.ndarray | None
    exits: tuple[Exit, ...]
    cache: str
    absorbed: bool
    selection: gs.Tensor | None


def check_mask(probe: Probe, core: AttentionCore, rows: np.ndarray, latent: Latent) -> gs.Tensor | None:
    """Checks that exactly the keys up to the query's position are visible, or those of a TopK's list among them; returns that TopK's output."""
    new = probe.sizes.new
    expected = np.zeros_like(core.visible)
    position = np.full((probe.batch, core.visible.shape[1]), -1, np.int64)
    position[:, latent.cached] = np.arange(len(latent.cached))
    position[:, latent.new] = latent.token % new + len(latent.cached)
    if not (latent.token // new == np.arange(probe.batch)[:, None]).all():
        raise NoMatch("queries meet keys of another sequence", core.softmax)
    for b in range(probe.batch):
        for s in range(new):
            expected[rows[b, s]] = (position[b] >= 0) & (position[b] <= len(latent.cached) + s)
    if np.array_equal(core.visible, expected):
        return None
    for tensor, lists in probe.selections.items():
        chosen = lists.reshape(-1, lists.shape[-1])
        if len(chosen) != probe.batch * new:
            continue
        wanted = np.zeros_like(expected)
        for b in range(probe.batch):
            for s in range(new):
                wanted[rows[b, s]] = expected[rows[b, s]] & np.isin(position[b], chosen[b * new + s])
        if np.array_equal(core.visible, wanted):
            return probe.selection_tensors[tensor]
    if (core.visible & ~expected).any():
        raise NoMatch("a query sees keys after its own position: the attention is not causal", core.softmax)
    raise NoMatch(
        "the mask hides keys that causal attention shows (a window, blocks, or a selection of another kind)",
        core.softmax,
    )


def match_mla(probe: Probe, core: AttentionCore) -> MlaMatch:
    """Reads a core as MLA.

    Raises:
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
        raise NoMatch("keys and values are not made from one shared latent", node)
    nope = read_nope(probe, *nope_dims[0], rows, latent, groups)
    owner = probe.owner(latent.number)
    norm = recognise_rms_norm(probe, owner)
    _check_low_rank(probe, owner if norm is None else norm.source, node)
    selection = check_mask(probe, core, rows, latent)
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
    rotation = Rotation(True, np.zeros((probe.sizes.new, 0)), np.zeros((probe.sizes.new, 0)), (), True)
    if rope is not None:
        ratio = rope.token_scale / nope.token_scale
        if not np.allclose(ratio, ratio[0, 0], rtol=1e-4):
            raise NoMatch("rope and latent scores are scaled differently from token to token", node)
        query_rope = rope.query
        rotation = balance(rope.rotation, float(ratio[0, 0]), node)
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
        latent=Features(owner, latent.index, latent.factor),
        norm=norm,
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


def _source_is_projection(probe: Probe, tensor: gs.Tensor) -> bool:
    """Whether a tensor is (part of) a projection's output, with or without a bias, quantised or not."""
    seen = 0
    numbers = np.unique(probe.owners(probe.linear(tensor).terms[0].codes)[0])
    if len(numbers) != 1 or numbers[0] == 0:
        return False
    node = producer(probe.owner(int(numbers[0])))
    while node is not None and seen < 8:
        pair = operands(node)
        if pair is not None:
            return any(probe.is_known(item) for item in pair)
        if (node.op == "Add" and any(isinstance(item, gs.Constant) for item in node.inputs)) or node.op in (
            "Cast",
            "DequantizeLinear",
            "QuantizeLinear",
            "Reshape",
            "Mul",
            "Div",
        ):
            data = next((item for item in node.inputs if not probe.is_known(item)), None)
        else:
            return False
        node = producer(data) if data is not None else None
        seen += 1
    return False


def _check_low_rank(probe: Probe, source: gs.Tensor, node: gs.Node) -> None:
    if not _source_is_projection(probe, source):
        raise NoMatch(
            "keys and values are projected from the hidden state itself, not from a low-rank latent: this is ordinary attention",
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
