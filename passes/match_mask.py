"""Proves by evaluation that a mask shows what the fused ops show: every key up to the query's position, or a TopK's list of them."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt import interface as roles
from mla_trt.passes.attention_core import HIDDEN_SCORE, AttentionCore, NoMatch, filled_columns
from mla_trt.passes.graph import element_count, producer
from mla_trt.passes.match_latent import Latent
from mla_trt.passes.probe import ONE, Probe, ProbeError, Sizes

# Tokens of the cases on which windows show (many cached) and prefixes that everybody sees (many new, none cached). Not every export takes the
# longest: rope tables and baked masks end earlier. Scores grow with the square of the new tokens.
FAR_CACHED = (1 << 15, 1 << 12, 1 << 8, 1 << 5)
FAR_NEW = (1 << 9, 1 << 6, 1 << 5)
MAX_SCORES = 1 << 24
# A position that no cache has a row for. There a window shows that is no shorter than the cache.
BEYOND = 1 << 20


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


def check_far_mask(probe: Probe, softmax: gs.Node, selection: gs.Tensor | None) -> None:
    """Checks on a long context, and on a long prompt, that the mask does nothing that short ones do not show.

    Layers that share a mask are checked once. Where the export takes no other lengths than the probe's, there is nothing to check.

    Raises:
        NoMatch: the mask hides keys far from the query, or shows keys after it.
    """
    frontier = _mask_tensors(probe, softmax)
    if not frontier or frontier in probe.masks_checked:
        return
    for cases in far_cases(probe):
        _check_longest(probe, softmax, selection, cases)
    probe.masks_checked.add(frontier)


def far_cases(probe: Probe) -> list[list[Sizes]]:
    """Long contexts and long prompts, each from the longest to the shortest: of each list, the first that the export takes is to be tried. Of
    full-length caches, positions behind their last row too."""
    fixed = probe.fixed
    batch, step = fixed.get("B", 1), fixed.get("S", 1)
    contexts = [Sizes(batch, step, length, length + step) for length in FAR_CACHED]
    prompts = [Sizes(batch, length, 0, length) for length in FAR_NEW]
    if "L" in fixed:
        rows = fixed["L"]
        contexts = [Sizes(batch, step, rows - step, rows)]
        prompts = [Sizes(batch, length, 0, rows) for length in (rows, *FAR_NEW) if length <= rows]
    if not probe.interface.by_role(roles.CACHE):
        return [] if "S" in fixed else [prompts]
    if "P" in fixed:
        return []
    cases = [contexts] if "S" in fixed else [contexts, prompts]
    if probe.interface.has_full_caches:
        cases.append([Sizes(batch, step, BEYOND, fixed.get("L", probe.sizes.rows))])
    return cases


def _check_longest(probe: Probe, softmax: gs.Node, selection: gs.Tensor | None, cases: list[Sizes]) -> None:
    """Checks the first case that the export takes."""
    for sizes in cases:
        far = probe.of_sizes(sizes)
        try:
            if int(np.prod(far.shape(softmax.inputs[0]))) > MAX_SCORES:
                continue
            visible = _visible(far, softmax)
        except ProbeError:
            continue
        _compare(far, softmax, visible, selection)
        return


def _mask_tensors(probe: Probe, softmax: gs.Node) -> frozenset[int]:
    """Ids of the tensors free of data that are added to the scores or choose among them. Single numbers, such as what hides, are none."""
    found: set[int] = set()
    seen: set[int] = set()
    stack = [softmax.inputs[0]]
    while stack:
        tensor = stack.pop()
        node = producer(tensor)
        if id(tensor) in seen or node is None or probe.is_known(tensor) or not probe.is_transparent(node):
            continue
        seen.add(id(tensor))
        if node.op in ("Add", "Where", "Sub"):
            found.update(id(item) for item in node.inputs if probe.is_known(item) and not _is_number(item))
        stack.extend(node.inputs)
    return frozenset(found)


def _is_number(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and element_count(tensor) == 1


def _visible(probe: Probe, softmax: gs.Node) -> np.ndarray:
    """bool [rows, keys]: scores that no mask hides. A sink's column has no key."""
    scores = probe.linear(softmax.inputs[0])
    axis = softmax.attrs.get("axis", -1) % len(scores.shape)
    constant = np.zeros(scores.shape)
    present = np.zeros(scores.shape, bool)
    for term in scores.terms:
        constant += np.where(term.codes == ONE, term.coefficients, 0)
        present |= term.codes > ONE
    constant = np.moveaxis(constant, axis, -1).reshape(-1, scores.shape[axis])
    present = np.moveaxis(present, axis, -1).reshape(-1, scores.shape[axis])
    sink = ~present.any(axis=0) & (constant > HIDDEN_SCORE).all(axis=0)
    return (present & (constant > HIDDEN_SCORE))[:, ~sink]


def _compare(far: Probe, softmax: gs.Node, visible: np.ndarray, selection: gs.Tensor | None) -> None:
    rows, columns = visible.shape
    filled = filled_columns(far, columns)
    if visible[:, filled:].any():
        raise NoMatch("in long contexts the mask shows rows of the caches that hold no token yet", softmax)
    new, cached = far.sizes.new, filled - far.sizes.new
    if cached < 0:
        return
    counts = visible.sum(axis=1)
    if far.sizes.cached >= columns:
        shown = far.selections[id(selection)].shape[-1] if id(selection) in far.selections else columns
        if (counts != shown).any():
            raise NoMatch("the mask hides the first keys once the cache is full: a window", softmax)
        return
    if selection is not None:
        lists = far.selections.get(id(selection))
        # Whatever the order of the rows, no row can show more keys than its list has, and every key it shows must be in some list.
        shown = np.flatnonzero(visible.any(axis=0))
        if lists is None or not np.isin(shown, lists).all() or (counts > lists.shape[-1]).any() or (counts == 0).any():
            raise NoMatch("in long contexts the mask shows other keys than those selected", softmax)
        return
    if rows % (far.batch * new):
        return
    expected = np.sort(np.tile(np.arange(new) + cached + 1, rows // new))
    if not np.array_equal(np.sort(counts), expected):
        raise NoMatch(
            "in long contexts the mask differs from causal attention: a window, blocks, or a prefix that every query sees",
            softmax,
        )
