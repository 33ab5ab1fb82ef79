"""Reads the rope parts of queries and keys: their sources, the pairs that are rotated, cosines and sines."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt.passes.attention_core import NoMatch, ScorePart
from mla_trt.passes.features import Features, locate, near, refuse_constants, shared_heads, take
from mla_trt.passes.graph import producer
from mla_trt.passes.match_latent import Latent, split_scale
from mla_trt.passes.probe import ZERO, Linear, Probe

TOLERANCE = 2e-3  # scales of half-precision exports are rounded to 11 bits


@dataclass(frozen=True)
class Rotation:
    """The rotation of the rope parts on one probe.

    Attributes:
        interleaved: pairs are (2j, 2j + 1); otherwise (j, j + Dr / 2).
        cos, sin: float64 [S, Dr / 2], what the keys of the new tokens are multiplied with.
        factors: tensors free of data that multiply data between the projections and the scores.
        fixed: nothing is rotated (cos 1, sin 0 everywhere).
    """

    interleaved: bool
    cos: np.ndarray
    sin: np.ndarray
    factors: tuple[gs.Tensor, ...]
    fixed: bool


@dataclass(frozen=True)
class RopePart:
    """`token_scale` [B, S, 1], or [B, S, H] where the heads' ratios vary from token to token: what multiplies the scores."""

    key: Features
    query: Features
    rotation: Rotation
    token_scale: np.ndarray
    scale: float


def rotation_matrix(
    probe: Probe, linear: Linear, what: str, node: gs.Node, *, by_head: bool = False
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """A rotated part [..., dims] as owner, tokens [...], entries [Dr] and a matrix [..., dims, Dr].

    Args:
        by_head: the last leading axis is one of heads; each has entries of its own, which lie in the same pattern. Entries are then [H, Dr].
    """
    refuse_constants(linear, f"rope part of the {what}", node)
    places = [locate(probe, term) for term in linear.terms if (term.codes != ZERO).any()]
    numbers = np.unique(np.concatenate([place.number[place.number > 0] for place in places]))
    if len(numbers) != 1:
        raise NoMatch(f"the rope part of the {what} comes from several tensors", node)
    lead = linear.shape[:-1]
    token = np.full(lead, -1, np.int64)
    for place in places:
        token = np.maximum(token, place.token.max(axis=-1))
        if ((place.number > 0) & (place.token != token[..., None])).any():
            raise NoMatch(f"the rope part of the {what} is not laid out with the tokens first", node)
    start = np.zeros((1, 1), np.int64)
    if by_head:
        least = [np.where(place.number > 0, place.entry, np.iinfo(np.int64).max) for place in places]
        start = np.min([found.min(axis=(*range(len(lead) - 1), -1)) for found in least], axis=0)[:, None]
    relative = [place.entry - start for place in places]
    entries = np.unique(
        np.concatenate([found[place.number > 0] for found, place in zip(relative, places, strict=True)])
    )
    matrix = np.zeros((*lead, linear.shape[-1], len(entries)))
    at = np.indices(linear.shape)
    for place, found in zip(places, relative, strict=True):
        there = place.number > 0
        column = np.searchsorted(entries, found[there])
        np.add.at(matrix, (*(axis[there] for axis in at), column), place.factor[there])
    return int(numbers[0]), token, start + entries if by_head else entries, matrix


def read_rope(
    probe: Probe, part: ScorePart, dims: np.ndarray, keys: Linear, rows: np.ndarray, latent: Latent
) -> RopePart:
    node = part.node
    key = take(keys, (slice(None), slice(None), slice(None), dims))
    if not all((term.codes == term.codes[:, :1]).all() for term in key.terms):
        raise NoMatch(
            "the keys differ from head to head beyond what one shared latent and one shared rope key explain: "
            f"this is {shared_heads(key)}",
            node,
        )
    key = take(key, (slice(None), 0))
    number, token, entries, key_matrix = rotation_matrix(probe, key, "keys", node)  # [B, new, dims, Dr]
    if not (token == latent.token).all():
        raise NoMatch("the rope key and the latent of a key belong to different tokens", node)
    if len(entries) != len(dims):
        raise NoMatch(f"the rope keys have {len(dims)} entries made from {len(entries)}", node)
    new = probe.sizes.new
    by_token = np.zeros((probe.batch, new, len(dims), len(entries)))
    np.put_along_axis(
        by_token.reshape(probe.batch, new, -1), (token % new)[:, :, None], key_matrix.reshape(*token.shape, -1), axis=1
    )
    if not np.allclose(by_token, by_token[:1], rtol=1e-6):
        raise NoMatch("the rotation differs between sequences at the same position", node)
    cos, sin, interleaved, fixed = read_rotation(by_token[0], node)

    query_number, token, query_entries, query_matrix = rotation_matrix(
        probe, take(part.query, (rows[..., None], dims)), "queries", node, by_head=True
    )  # [B, S, H, dims, Dr]
    if not (token.reshape(-1, rows.shape[2]) == np.arange(probe.batch * new)[:, None]).all():
        raise NoMatch("the rope part and the rest of a query belong to different tokens", node)
    if query_entries.shape[1] != len(entries):
        raise NoMatch("queries and keys have rope parts of different sizes", node)
    reference = by_token[:, :, None]
    energy = (reference**2).sum(axis=(-1, -2))
    if not energy.all():
        raise NoMatch("the rope part of the keys is multiplied by zero", node)
    ratio = (query_matrix * reference).sum(axis=(-1, -2)) / energy
    if not near(query_matrix, ratio[..., None, None] * reference, rtol=1e-4, atol=1e-6 * np.abs(reference).max()):
        raise NoMatch("queries and keys are rotated differently", node)
    token_scale = ratio * part.scale[rows]
    common, head_scale = split_scale(token_scale)
    count = len(entries)
    rotation = Rotation(interleaved, cos, sin, collect_factors(probe, [part.key_tensor, part.query_tensor]), fixed)
    key_features = Features(probe.owner(number), entries, np.ones(count))
    head_factor = np.repeat(head_scale[:, None], count, axis=1)
    query_features = Features(probe.owner(query_number), query_entries, head_factor)
    return RopePart(key_features, query_features, rotation, common, float(common[0, 0, 0]))


def read_rotation(matrix: np.ndarray, node: gs.Node) -> tuple[np.ndarray, np.ndarray, bool, bool]:
    """cos and sin [S, Dr/2] and the layout of a rotation [S, dims, Dr] whose rows may come in any order.

    The rows of a pair are [c, -s] and [s, c] up to a common orthogonal change, which queries and keys share and which therefore
    cancels in the scores.
    """
    count = matrix.shape[2]
    used = np.abs(matrix).max(axis=0) > 0
    if (used.sum(axis=1) <= 1).all():
        if not np.allclose(np.abs(matrix), np.abs(matrix[:1]), rtol=1e-6) or count % 2:
            raise NoMatch("the rope part is scaled from position to position instead of rotated", node)
        size = np.abs(matrix).max()
        if not np.allclose(np.abs(matrix).sum(axis=1), size, rtol=1e-5):
            raise NoMatch("the entries of the part that is not rotated are scaled differently", node)
        return np.full((matrix.shape[0], count // 2), size), np.zeros((matrix.shape[0], count // 2)), True, True
    partner: dict[int, int] = {}
    rows_of: dict[int, list[int]] = {}
    for row in range(matrix.shape[1]):
        pair = np.flatnonzero(used[row])
        if (
            len(pair) == 1
        ):  # sin is 0 at every position of the probe: the partner is known from the pair's other row, if at all
            raise NoMatch("a pair of the rope part is not rotated", node)
        if len(pair) != 2:
            raise NoMatch(f"an entry of the rope part mixes {len(pair)} entries: no rotation of pairs", node)
        partner[int(pair[0])] = int(pair[1])
        rows_of.setdefault(int(pair[0]), []).append(row)
    firsts = sorted(partner)
    half = count // 2
    if firsts == list(range(0, count, 2)) and all(partner[first] == first + 1 for first in firsts):
        interleaved = True
    elif firsts == list(range(half)) and all(partner[first] == first + half for first in firsts):
        interleaved = False
    else:
        raise NoMatch("the rope part rotates pairs that are neither neighbours nor half the width apart", node)
    cos, sin = np.zeros((matrix.shape[0], half)), np.zeros((matrix.shape[0], half))
    for pair_number, first in enumerate(firsts):
        rows = rows_of[first]
        if len(rows) != 2:
            raise NoMatch("a pair of the rope part does not have two entries", node)
        block = matrix[:, rows][:, :, [first, partner[first]]]  # [S, 2, 2]
        for candidate in (block, block[:, ::-1], block * [[1], [-1]], block[:, ::-1] * [[1], [-1]]):
            if np.allclose(candidate[:, 0, 0], candidate[:, 1, 1], rtol=1e-5, atol=1e-9) and np.allclose(
                candidate[:, 0, 1], -candidate[:, 1, 0], rtol=1e-5, atol=1e-9
            ):
                cos[:, pair_number], sin[:, pair_number] = candidate[:, 0, 0], candidate[:, 1, 0]
                break
        else:
            raise NoMatch("a pair of the rope part is changed by something that is no rotation", node)
    return cos, sin, interleaved, False


def collect_factors(probe: Probe, tensors: list[gs.Tensor]) -> tuple[gs.Tensor, ...]:
    """Tensors free of data that multiply data behind `tensors`, as far as data is only moved, scaled and added."""
    found: dict[int, gs.Tensor] = {}
    seen: set[int] = set()
    stack = list(tensors)
    while stack:
        tensor = stack.pop()
        node = producer(tensor)
        if id(tensor) in seen or probe.is_known(tensor) or node is None or not probe.is_transparent(node):
            continue
        seen.add(id(tensor))
        for item in node.inputs:
            if node.op in ("Mul", "Div") and probe.is_known(item):
                found[id(item)] = item
        stack.extend(node.inputs)
    return tuple(found.values())


def balance(rotation: Rotation, ratio: float, node: gs.Node) -> Rotation:
    """Moves the rope scores' own scale into cos and sin, which queries and keys are both multiplied with: an export that splits the
    scale over queries and keys has it there already, YaRN's factor belongs there."""
    if math.isclose(ratio, 1.0, rel_tol=TOLERANCE):
        return rotation
    if ratio <= 0:
        raise NoMatch("the rope scores are subtracted from the latent's", node)
    return replace(rotation, cos=rotation.cos * math.sqrt(ratio), sin=rotation.sin * math.sqrt(ratio))
