"""Checks that what an attention reads from its caches is what the model stores there: the same rows and entries, in the same order and scale.

The lowered model has one cache of its own, so that an export which turns or scales its caches between two steps would become another model.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt import interface as roles
from mla_trt.interface import ModelInput
from mla_trt.passes.attention_core import NoMatch
from mla_trt.passes.features import Projected, is_input, projected_by, refuse_states, take
from mla_trt.passes.probe import ZERO, Linear, Probe, ProbeError


def check_cached_rows(
    probe: Probe, linear: Linear, cached: np.ndarray, new: np.ndarray, token: np.ndarray, node: gs.Node
) -> None:
    """Checks rows that an attention reads, directly or behind one projection.

    Args:
        linear: [B, H, columns, width]; columns are keys.
        cached, new: which columns hold cached and new keys.
        token: int64 [B, len(new)], the token (of all sequences) of each new key.

    Raises:
        NoMatch: the cache holds something else than is read.
    """
    if not len(cached) or not len(new):
        return
    numbers = probe.owners(_first_codes(linear)[:1, :1, cached[:1]])[0].reshape(-1)
    for number in dict.fromkeys(numbers[numbers > 0].tolist()):
        part = take(linear, (slice(None), slice(None), slice(None), np.flatnonzero(numbers == number)))
        if is_input(probe, number):
            _check_input(probe, part, cached, new, token, node)
            continue
        made = projected_by(probe, part.terms[0].codes) if len(part.terms) == 1 else None
        if made is not None and _is_by_row(made):
            rows = take(made.data, (made.group[:, :, :, 0], made.row[:, :, :, 0]))
            source = probe.owners(_first_codes(rows)[:1, :1, cached[:1]])[0].reshape(-1)
            if all(is_input(probe, int(item)) for item in source):
                _check_input(probe, rows, cached, new, token, node)


def _one_of_equal_heads(linear: Linear) -> Linear:
    """[B, 1, ...] where all heads read the same, else `linear`: a hundred heads need not be compared a hundred times."""
    alike = all((array == array[:, :1]).all() for term in linear.terms for array in (term.codes, term.coefficients))
    return take(linear, (slice(None), slice(0, 1))) if alike else linear


def _first_codes(linear: Linear) -> np.ndarray:
    first = np.zeros(linear.shape, np.int64)
    for term in reversed(linear.terms):
        first = np.where(term.codes != ZERO, term.codes, first)
    return first


def _is_by_row(made: Projected) -> bool:
    return bool((made.row == made.row[..., :1]).all() and (made.group == made.group[..., :1]).all())


def _check_input(
    probe: Probe, linear: Linear, cached: np.ndarray, new: np.ndarray, token: np.ndarray, node: gs.Node
) -> None:
    linear = _one_of_equal_heads(linear)
    read = take(linear, (slice(None), slice(None), cached))
    if len(read.terms) != 1:
        raise NoMatch("cached keys or values are added up", node)
    codes, factor = read.terms[0].codes, read.terms[0].coefficients
    numbers, flat = probe.owners(codes)
    cache = probe.owner(int(numbers.reshape(-1)[0]))
    refuse_states(probe, numbers, node)
    entry = next((item for item in probe.interface.by_role(roles.CACHE) if item.name == cache.name), None)
    if entry is None or entry.output is None or not (numbers == numbers.reshape(-1)[0]).all():
        return
    batch, position, place = _split(probe, entry, cache, flat)
    rows = np.arange(codes.shape[0])[:, None, None, None]
    if not (
        (batch == (rows if "B" in entry.axes else 0)).all()
        and (position == np.arange(len(cached))[None, None, :, None]).all()
        and (place == place[:1, :, :1]).all()
        and np.allclose(factor, factor[:1, :, :1], rtol=1e-5)
    ):
        raise NoMatch(f"the attention reads the cache '{cache.name}' in another order or scale than it has there", node)
    stored = _stored(probe, entry, cache)
    if stored is None:
        return
    at = probe.sizes.cached + token % probe.sizes.new
    _compare(
        take(stored, (rows if "B" in entry.axes else 0, at[:, None, :, None], place[:1, :, :1])),
        take(linear, (slice(None), slice(None), new)),
        factor[:1, :, :1],
        f"the cache '{cache.name}' is not given what the attention reads of the new tokens: it is stored in another order or scale",
        node,
    )
    kept = (slice(None), np.arange(probe.sizes.cached))
    expected, now = take(_in_rows(probe, entry, probe.atoms(cache)), kept), take(stored, kept)
    _compare(now, expected, np.ones(1), f"the cache '{cache.name}' does not keep its rows as they are", node)


def _split(
    probe: Probe, entry: ModelInput, cache: gs.Tensor, flat: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequence, position and place among the other axes of flat indices into a cache."""
    shape = probe.shape(cache)
    index = np.unravel_index(flat, shape)
    place = np.zeros_like(flat)
    for axis, letter in enumerate(entry.axes):
        if letter not in ("B", "P", "L"):
            place = place * shape[axis] + index[axis]
    batch = index[entry.axes.index("B")] if "B" in entry.axes else np.zeros_like(flat)
    return batch, index[row_axis(entry)], place


def row_axis(entry: ModelInput) -> int:
    """The axis of a cache's rows."""
    return entry.axes.index("L" if "L" in entry.axes else "P")


def _in_rows(probe: Probe, entry: ModelInput, linear: Linear) -> Linear:
    """A cache as [B, positions, entries]."""
    lead = [entry.axes.index(letter) for letter in ("B", "P", "L") if letter in entry.axes]
    order = [*lead, *(axis for axis in range(len(entry.axes)) if axis not in lead)]
    batch = probe.batch if "B" in entry.axes else 1
    length = linear.shape[row_axis(entry)]

    def arrange(array: np.ndarray) -> np.ndarray:
        return array.transpose(order).reshape(batch, length, -1)

    terms = tuple(type(term)(arrange(term.codes), arrange(term.coefficients)) for term in linear.terms)
    return Linear(terms[0].codes.shape, terms)


def _stored(probe: Probe, entry: ModelInput, cache: gs.Tensor) -> Linear | None:
    """What the model gives as the cache's next value, as [B, positions, entries]; None where that cannot be followed."""
    output = next(tensor for tensor in probe.graph.outputs if tensor.name == entry.output)
    try:
        linear = probe.linear(output)
    except ProbeError:
        return None
    expected = list(probe.shape(cache))
    if "L" not in entry.axes:
        expected[row_axis(entry)] += probe.sizes.new
    return _in_rows(probe, entry, linear) if list(linear.shape) == expected else None


def _compare(stored: Linear, read: Linear, factor: np.ndarray, reason: str, node: gs.Node) -> None:
    """Raises NoMatch unless what is read is what is stored, times a factor."""
    left, right = _sorted_terms(stored), _sorted_terms(read)
    count = max(len(left[0]), len(right[0]))
    (left_codes, left_factors), (right_codes, right_factors) = (_padded(side, count) for side in (left, right))
    if left_codes.shape != right_codes.shape:
        left_codes, right_codes = np.broadcast_arrays(left_codes, right_codes)
        left_factors, right_factors = np.broadcast_arrays(left_factors, right_factors)
    if not (left_codes == right_codes).all() or not np.allclose(left_factors * factor, right_factors, rtol=1e-5):
        raise NoMatch(reason, node)


def _sorted_terms(linear: Linear) -> tuple[np.ndarray, np.ndarray]:
    codes = np.stack([np.where(term.coefficients == 0, ZERO, term.codes) for term in linear.terms])
    factors = np.stack([np.where(term.codes == ZERO, 0.0, term.coefficients) for term in linear.terms])
    order = np.argsort(-codes, axis=0, kind="stable")
    return np.take_along_axis(codes, order, 0), np.take_along_axis(factors, order, 0)


def _padded(side: tuple[np.ndarray, np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    missing = [(0, count - len(side[0]))] + [(0, 0)] * (side[0].ndim - 1)
    return np.pad(side[0], missing), np.pad(side[1], missing)
