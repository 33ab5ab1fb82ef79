"""Reads the indexer behind a TopK that picks an attention's keys: score[t, j] = sum over heads of weight[t, h] relu(q[t, h] . k[j])."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt import interface as roles
from mla_trt.passes.attention_core import HIDDEN_SCORE, NoMatch, ScorePart, filled_columns, read_part, sort_terms
from mla_trt.passes.contraction import Contraction, contraction
from mla_trt.passes.features import Features, locate, near, projected_by, single_term, take
from mla_trt.passes.graph import producer
from mla_trt.passes.match_cache import check_cached_rows
from mla_trt.passes.match_rope import Rotation, collect_factors, read_rotation, rotation_matrix
from mla_trt.passes.norms import LayerNorm, recognise_layer_norm
from mla_trt.passes.probe import Linear, Probe, ProbeError, Sizes, Term, case_sizes

FAR = (
    1 << 16,
    1 << 12,
    1 << 8,
)  # cached tokens of the cases on which a TopK's k is read, of which not every export takes the longest


class SelectsAllKeys(NoMatch):
    """The TopK's k is the number of keys, whatever that is: the attention is dense. Some exporters trace it so."""


@dataclass(frozen=True)
class IndexerMatch:
    """An indexer, with everything that scales its scores folded into `weights`.

    Attributes:
        query: [Hi, Di] entries of each token, the rotated ones first; `key` [Di] likewise, before the norm if there is one.
        weights: [Hi].
        rope_dim: how many leading entries are rotated.
        hadamard: queries and keys are both turned by a Walsh-Hadamard transform, which leaves the scores as they are but for quantisation.
        top_k: keys selected at most.
        query_scale: factors [B, S, Hi] of the queries that depend on the token or are not positive; None: there are none.
        key_rows: the keys as the scores meet them, [B, S, Di], and before the transform, in the probe's atoms.
    """

    node: gs.Node
    heads: int
    head_dim: int
    rope_dim: int
    query: Features
    key: Features
    norm: LayerNorm | None
    weights: Features
    rotation: Rotation
    hadamard: bool
    top_k: int
    query_scale: np.ndarray | None
    key_rows: tuple[Linear, ...] = ()


def match_indexer(probe: Probe, selection: gs.Tensor) -> IndexerMatch:
    """Reads the indexer that makes a TopK's indices.

    Raises:
        NoMatch: the scores are made in another way.
    """
    node = producer(selection)
    assert node is not None
    top_k = _top_k(probe, node)
    scores = probe.linear(node.inputs[0])
    axis = node.attrs.get("axis", -1) % len(scores.shape)
    if not node.attrs.get("largest", 1):
        raise NoMatch("the indexer keeps the keys of the lowest scores", node)
    columns = filled_columns(probe, scores.shape[axis])

    def as_rows(array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array, axis, -1).reshape(-1, scores.shape[axis])

    constant, products = sort_terms(
        probe, node, [Term(as_rows(term.codes), as_rows(term.coefficients)) for term in scores.terms]
    )
    if len(products) != 1:
        raise NoMatch("the index scores are not one weighted sum over heads", node)
    (number, (flat, factor)), *_ = products.items()
    if (constant[:, columns:] > HIDDEN_SCORE).any():
        raise NoMatch("the indexer may select rows of the caches that hold no token yet", node)
    flat, factor, constant = flat[:, :columns], factor[:, :columns], constant[:, :columns]
    visible = (flat >= 0) & (constant > HIDDEN_SCORE)
    if (np.abs(constant[visible]) > 1e-6).any():
        raise NoMatch("a bias is added to the index scores", node)
    tokens = probe.batch * probe.sizes.new
    if visible.shape[0] != tokens:
        raise NoMatch("the index scores do not have one row for each token", node)
    new, cached = probe.sizes.new, columns - probe.sizes.new
    if not np.array_equal(
        visible, np.arange(columns)[None] <= (np.tile(np.arange(new), probe.batch) + cached)[:, None]
    ):
        raise NoMatch("the index scores are not masked causally", node)
    part = read_part(probe, node, number, flat, factor, visible)
    weights, rectified = _weights_and_scores(probe, part, node)
    token_order = np.arange(tokens).reshape(probe.batch, new)
    view, query, key, scale = _query_and_key(probe, rectified, token_order, cached, node)
    met = key
    query, key, turned, hadamard, sources = _undo_transform(probe, query, key, [view.left, view.right])
    found = _read_parts(
        probe, node, view.node, weights, query, key, scale * turned, part.scale, hadamard, sources, top_k
    )
    return replace(found, key_rows=(met, key))


def _weights_and_scores(probe: Probe, part: ScorePart, node: gs.Node) -> tuple[Linear, Linear]:
    """The head weights [rows, Hi] and the rectified scores [rows, columns, Hi]."""
    weights = part.query
    scores = take(part.key, (part.group,))
    owner = probe.owner_of(int(single_term(scores, "the index scores", node).codes.max()))
    maker = producer(owner) if owner is not None else None
    if maker is None or maker.op not in ("Relu", "Max", "Clip"):
        raise NoMatch("the index scores of a head are not rectified (ReLU) before they are summed", maker or node)
    return weights, scores


def _query_and_key(
    probe: Probe, rectified: Linear, token_order: np.ndarray, cached: int, node: gs.Node
) -> tuple[Contraction, Linear, Linear, float]:
    """Behind the ReLU: the product, its queries [rows, Hi, width] and keys of the new tokens [B, S, width], and its factor."""
    term = single_term(rectified, "the index scores", node)
    numbers, flat = probe.owners(term.codes)
    relu = producer(probe.owner(int(numbers.reshape(-1)[0])))
    assert relu is not None
    if not (numbers == numbers.reshape(-1)[0]).all():
        raise NoMatch("the index scores come from several tensors", node)
    before = single_term(probe.linear(relu.inputs[0]), "the index scores", relu)
    codes, factors = before.codes.reshape(-1)[flat], before.coefficients.reshape(-1)[flat] * term.coefficients
    owners, product_flat = probe.owners(codes)
    product_node = producer(probe.owner(int(owners.reshape(-1)[0]))) if owners.reshape(-1)[0] else None
    view = contraction(probe, product_node) if product_node is not None else None
    if view is None or product_node is None or not (owners == owners.reshape(-1)[0]).all():
        raise NoMatch("the index scores are no product of queries and keys", relu)
    if not np.allclose(factors, factors.reshape(-1)[0], rtol=1e-5) or factors.reshape(-1)[0] <= 0:
        raise NoMatch("the index scores are scaled differently from key to key or by a negative factor", relu)
    group, left, right = view.unravel(product_flat)  # [rows, columns, Hi]
    for query_left in (True, False):
        row_index, key_index = (left, right) if query_left else (right, left)
        if (
            (row_index == row_index[:, :1]).all()
            and (group == group[:, :1]).all()
            and (key_index == key_index[..., :1]).all()
        ):
            break
    else:
        raise NoMatch("the index scores are not laid out as queries by keys", product_node)
    left_linear, right_linear = view.left_linear(probe.linear(view.left)), view.right_linear(probe.linear(view.right))
    query_side, key_side = (left_linear, right_linear) if query_left else (right_linear, left_linear)
    query = take(query_side, (group[:, 0], row_index[:, 0]))
    first_rows = token_order[:, 0]
    keys = take(key_side, (group[first_rows, cached:, 0], key_index[first_rows, cached:, 0]))
    for head in range(group.shape[2]):
        other = take(key_side, (group[first_rows, cached:, head], key_index[first_rows, cached:, head]))
        if not all(np.array_equal(a.codes, b.codes) for a, b in zip(keys.terms, other.terms, strict=True)):
            raise NoMatch("the indexer's heads do not share one key", product_node)
    every = take(key_side, (group[first_rows, :, :1].swapaxes(1, 2), key_index[first_rows, :, :1].swapaxes(1, 2)))
    columns = np.arange(group.shape[1])
    check_cached_rows(probe, every, columns[:cached], columns[cached:], token_order, product_node)
    return view, query, keys, float(factors.reshape(-1)[0])


def _undo_transform(
    probe: Probe, query: Linear, key: Linear, sources: list[gs.Tensor]
) -> tuple[Linear, Linear, float, bool, list[gs.Tensor]]:
    """Looks behind one orthogonal matrix that queries [rows, Hi, width] and keys [B, S, width] are both multiplied with.

    Returns:
        queries and keys before it, the factor by which it scaled their products, whether it was a Walsh-Hadamard
        transform, and the tensors it was applied to (`sources` where there is none).
    """
    if len(query.terms) != 1 or len(key.terms) != 1:
        return query, key, 1.0, False, sources
    sides = []
    before = []
    for linear in (query, key):
        term = linear.terms[0]
        made = projected_by(probe, term.codes)
        if made is None or made.per_head or not np.allclose(term.coefficients, term.coefficients.reshape(-1)[0]):
            return query, key, 1.0, False, sources
        width = term.codes.shape[-1]
        if sorted(probe.shape(made.weight), reverse=True)[:2] != [width, width]:
            return query, key, 1.0, False, sources
        operand = (made.view.right_array if made.right else made.view.left_array)(
            np.asarray(probe.known(made.weight), np.float64)
        )
        columns = made.column.reshape(-1, width)
        if (
            operand.shape[1:] != (width, width)
            or not (columns == columns[0]).all()
            or not (made.row == made.row[..., :1]).all()
        ):
            return query, key, 1.0, False, sources
        before.append(made.view.left if made.right else made.view.right)
        sides.append(
            (
                operand[0][columns[0]],
                take(made.data, (made.group[..., 0], made.row[..., 0])),
                float(term.coefficients.reshape(-1)[0]),
            )
        )
    (query_matrix, query_before, query_factor), (key_matrix, key_before, key_factor) = sides
    gram = query_matrix @ query_matrix.T
    size = gram[0, 0]
    if not np.allclose(query_matrix, key_matrix) or not np.allclose(
        gram, size * np.eye(len(gram)), atol=1e-4 * abs(size)
    ):
        return query, key, 1.0, False, sources
    transform = np.ones((1, 1))
    while len(transform) < len(gram):
        transform = np.block([[transform, transform], [transform, -transform]])
    hadamard = transform.shape == query_matrix.shape and np.allclose(
        query_matrix / np.sqrt(size) * np.sqrt(len(gram)), transform, atol=1e-3
    )
    return query_before, key_before, size * query_factor * key_factor, bool(hadamard), before


def _read_parts(
    probe: Probe,
    node: gs.Node,
    product_node: gs.Node,
    weights: Linear,
    query: Linear,
    key: Linear,
    scale: float,
    row_scale: np.ndarray,
    hadamard: bool,
    sources: list[gs.Tensor],
    top_k: int,
) -> IndexerMatch:
    new, batch = probe.sizes.new, probe.batch
    key_number, key_token, key_entries, key_matrix = rotation_matrix(
        probe, key, "index keys", product_node
    )  # [B, S, width, Di]
    if not np.array_equal(key_token, np.arange(batch * new).reshape(batch, new)):
        raise NoMatch("the index keys are not laid out with the tokens first", product_node)
    heads, width = query.shape[1], query.shape[2]
    if len(key_entries) != width or not np.allclose(key_matrix, key_matrix[:1], rtol=1e-6):
        raise NoMatch("the index keys are not a rotation of one vector a token", product_node)
    matrix = key_matrix[0]  # [S, width, Di]
    rotated = np.flatnonzero((np.abs(matrix).max(axis=0) > 0).sum(axis=0) > 1)
    plain = np.setdiff1d(np.arange(width), rotated)
    rows_rotated = (
        np.flatnonzero(np.abs(matrix[:, :, rotated]).max(axis=(0, 2)) > 0) if len(rotated) else np.zeros(0, np.int64)
    )
    if len(rotated):
        cos, sin, interleaved, fixed = read_rotation(matrix[:, rows_rotated][:, :, rotated], product_node)
        if fixed:
            raise NoMatch("the index keys' rotation is none", product_node)
    else:
        cos, sin, interleaved, fixed = np.zeros((new, 0)), np.zeros((new, 0)), True, True
    key_size = np.abs(matrix[0][:, plain]).max() if len(plain) else 1.0
    # What scales all entries alike goes to the weights; cos and sin keep what the rotated entries have beyond that.
    cos, sin = cos / key_size, sin / key_size
    order = np.concatenate([rotated, plain])
    query_number, token, entries, query_matrix = rotation_matrix(
        probe, query, "index queries", product_node, by_head=True
    )  # [tokens, Hi, width, Di]
    if not (token == np.arange(batch * new)[:, None]).all() or entries.shape[1] != width:
        raise NoMatch("the index queries are not laid out with the tokens first", product_node)
    reference = np.tile(matrix, (batch, 1, 1))[:, None]
    ratios = (query_matrix * reference).sum(axis=(2, 3)) / (reference**2).sum(axis=(2, 3))
    tolerance = 1e-6 * np.abs(reference).max()
    if not near(query_matrix, ratios[:, :, None, None] * reference, rtol=1e-4, atol=tolerance):
        raise NoMatch("index queries and index keys are rotated differently", product_node)
    # The ReLU behind the product lets a positive factor of all pass, to the weights; others stay with the queries.
    passes = bool(np.allclose(ratios, ratios[0, 0], rtol=1e-5)) and ratios[0, 0] > 0
    of_head = ratios[0] if not passes and np.allclose(ratios, ratios[:1], rtol=1e-5) else np.ones(heads)
    varies = not passes and not np.allclose(ratios, ratios[:1], rtol=1e-5)
    owner = probe.owner(key_number)
    norm = recognise_layer_norm(probe, owner)
    key_features = Features(owner, key_entries[order], np.ones(width))
    if norm is not None and np.array_equal(np.sort(key_entries), np.arange(probe.shape(owner)[-1])):
        source = norm.source
        key_features = replace(key_features, tensor=source)
        norm = replace(norm, weight=norm.weight[key_entries[order]], bias=norm.bias[key_entries[order]])
    else:
        norm = None
    weight_term = single_term(weights, "the index weights", node)
    place = locate(probe, weight_term)
    numbers = np.unique(place.number)
    if (
        len(numbers) != 1
        or not (place.entry == place.entry[:1]).all()
        or not np.array_equal(place.token[:, 0], np.arange(batch * new))
    ):
        raise NoMatch("the index weights are no entries of one projection", node)
    # The plain entries' own factor is part of both sides of the product, the rotation's is part of cos and sin.
    total = place.factor * (row_scale * scale * (ratios[0, 0] if passes else 1.0))[:, None] * key_size**2
    if not np.allclose(total, total[:1], rtol=1e-5):
        raise NoMatch("the index weights are scaled differently from token to token", node)
    rotation = Rotation(interleaved, cos, sin, collect_factors(probe, sources), fixed)
    return IndexerMatch(
        node,
        heads,
        width,
        len(rotated),
        Features(probe.owner(query_number), entries[:, order], np.repeat(of_head[:, None], width, axis=1)),
        key_features,
        norm,
        Features(probe.owner(int(numbers[0])), place.entry[0], total[0]),
        rotation,
        hadamard,
        top_k,
        ratios.reshape(batch, new, heads) if varies else None,
    )


def _top_k(probe: Probe, node: gs.Node) -> int:
    """The largest number of keys that the TopK returns, however long the context."""
    cache = bool(probe.interface.by_role(roles.CACHE))
    full = probe.interface.has_full_caches
    fixed = ("L" if full else "P" if cache else "S") in probe.fixed
    if full and fixed:
        count = int(np.asarray(probe.of_sizes(probe.sizes).known(node.inputs[1])).reshape(-1)[0])
        if count >= probe.fixed["L"]:
            raise SelectsAllKeys("the indexer selects all keys", node)
        return count
    for cached in () if fixed else FAR if cache else FAR[1:]:
        sizes = case_sizes(probe.interface, 1, probe.sizes.new, cached) if cache else Sizes(1, cached, 0)
        far = probe.of_sizes(sizes)
        try:
            count = int(np.asarray(far.known(node.inputs[1])).reshape(-1)[0])
        except ProbeError:
            continue
        if count >= cached:
            raise SelectsAllKeys("the indexer selects all keys", node)
        return count
    count = int(np.asarray(probe.known(node.inputs[1])).reshape(-1)[0])
    if not fixed and count >= probe.sizes.cached + probe.sizes.new:
        raise NoMatch("how many keys the indexer selects in long contexts cannot be read", node)
    return count
