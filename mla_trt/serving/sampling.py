"""From logits to the next token: greedy, or drawn at random after temperature, top-k and top-p, in this order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mla_trt.errors import MlaTrtError, UsageError

FIRST_CANDIDATES, GROWTH = 256, 8
"""How many of the likeliest tokens top-p sorts at first, and how many times more where their share is too small."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen. Filters apply in this order: temperature, top-k, top-p.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token, whatever the filters and the seed are.
        top_k: only so many of the likeliest tokens can be drawn; 0: all.
        top_p: of those, only the fewest likeliest whose probabilities, of a softmax over what top-k left, add up to at
            least this.
        seed: of the random numbers, at least 0; None: another one each time.

    Raises:
        UsageError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"the temperature is {self.temperature}: it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UsageError(f"top-k is {self.top_k}: it must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}: it must be more than 0 and at most 1 (all tokens)")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"the seed is {self.seed}: it must be 0 or more")


class Sampler:
    """Chooses the tokens of one request. Each drawn token takes one number of the request's own generator, so that the
    stream depends on the seed and the logits, never on what runs beside it."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: np.ndarray) -> int:
        """The next token. Of equal logits the smaller id counts as the likelier.

        Args:
            logits: [vocabulary], any float type. -inf stands for a token that cannot come.

        Raises:
            MlaTrtError: a logit is NaN or +inf, or all are -inf.
        """
        logits = np.asarray(logits, np.float32)
        best = int(np.argmax(logits))  # the first NaN where there is one
        if not np.isfinite(logits[best]):
            raise MlaTrtError(f"the model gave logits that are not finite ({logits[best]} for token {best})")
        if self._sampling.temperature == 0:
            return best
        scaled = (logits - logits[best]).astype(np.float64) / self._sampling.temperature
        ids: np.ndarray | None = None
        if 0 < self._sampling.top_k < len(scaled):
            ids = largest(scaled, self._sampling.top_k)
            scaled = scaled[ids]
        weights = np.exp(scaled)
        if self._sampling.top_p < 1:
            kept = _nucleus(weights, self._sampling.top_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        sums = np.cumsum(weights)
        # Rounding can bring the product up to the sum itself; the last token that can come is the first of that sum.
        drawn = min(np.searchsorted(sums, self._random.random() * sums[-1], "right"), np.searchsorted(sums, sums[-1]))
        return int(drawn if ids is None else ids[drawn])


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest values, descending, of equal ones the smaller index first. int64 [count]."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > least)
    found = np.concatenate([above, np.flatnonzero(values == least)[: count - len(above)]])
    return found[np.argsort(-values[found], kind="stable")]


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices of the fewest largest weights that have a share of at least `top_p` of all, descending."""
    wanted = top_p * weights.sum()
    count = FIRST_CANDIDATES
    while True:
        order = largest(weights, count)
        sums = np.cumsum(weights[order])
        if sums[-1] >= wanted or count >= len(weights):
            return order[: int(np.searchsorted(sums, wanted)) + 1]
        count *= GROWTH
