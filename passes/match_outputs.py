"""Finds the outputs that hold what an attention would cache, of an export that takes no caches: a prefill that gives the keys of its prompt.

The lowered model keeps those in pages of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt.passes.attention_core import AttentionCore
from mla_trt.passes.features import is_input, projected_by, take
from mla_trt.passes.norms import recognise_rms_norm
from mla_trt.passes.probe import ONE, ZERO, Linear, Probe, ProbeError


def cache_outputs(probe: Probe, core: AttentionCore, index_keys: Iterable[Linear]) -> set[str]:
    """Names of the outputs that hold nothing but what a core reads as keys and values, or what these are made from.

    Args:
        core: an attention that is MLA.
        index_keys: keys of its indexer.
    """
    read: set[bytes] = set()
    for linear in (core.value, *(part.key for part in core.parts), *index_keys):
        read |= _sums(linear)
        for source in _behind(probe, linear):
            read |= _sums(source)
    found = set()
    for tensor in probe.graph.outputs:
        if tensor.name in probe.interface.results and _holds(probe, tensor, read):
            found.add(tensor.name)
    return found


def _holds(probe: Probe, tensor: gs.Tensor, read: set[bytes]) -> bool:
    if probe.is_known(tensor):
        return False
    try:
        return _sums(probe.linear(tensor)) <= read
    except ProbeError:
        return False


def _behind(probe: Probe, linear: Linear) -> list[Linear]:
    """The latents that keys or values are projected from, as they are and before their norm."""
    first = np.zeros(linear.shape, np.int64)
    for term in reversed(linear.terms):
        first = np.where(term.codes != ZERO, term.codes, first)
    numbers = probe.owners(first)[0]
    found: list[Linear] = []
    for number in np.unique(numbers[numbers > 0]):
        owners = [int(number)]
        entries = np.flatnonzero((numbers == number).reshape(-1, linear.shape[-1]).all(axis=0))
        part = take(linear, (*[slice(None)] * (len(linear.shape) - 1), entries)) if len(entries) else linear
        made = projected_by(probe, part.terms[0].codes) if len(part.terms) == 1 else None
        if made is not None:
            found.append(made.data)
            owners += np.unique(probe.owners(made.data.terms[0].codes)[0]).tolist()
        for owner in owners:
            if owner > 0 and not is_input(probe, owner):
                norm = recognise_rms_norm(probe, probe.owner(owner))
                if norm is not None:
                    found.append(probe.linear(norm.source))
    return found


def _sums(linear: Linear) -> set[bytes]:
    """The atoms that each element sums up, whatever their factors."""
    codes = np.stack(
        [
            np.where((term.coefficients == 0) | (term.codes == ONE), ZERO, term.codes).reshape(-1)
            for term in linear.terms
        ]
    )
    codes = np.unique(np.sort(codes, axis=0)[::-1], axis=1)
    return {column[column != ZERO].tobytes() for column in codes.T}
