"""Figures of an engine loop."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from mla_trt.serving.request import Finish

RATE_SECONDS = 10.0


@dataclass(frozen=True)
class Stats:
    """Figures of a loop; what is not said to be of now counts from its beginning.

    Attributes:
        running, waiting: requests now.
        batch, step_tokens: sequences and tokens of the last step.
        pages: pages of the pool.
        pages_in_use, pages_free: now.
        pages_cached: of those in use, what ended sequences hold for prompts to come; any request can have them.
        tokens_per_second: tokens given out, over the last 10 seconds.
        steps: steps run.
        tokens: tokens given out.
        computed_tokens: tokens that went through the model, those computed again included.
        prefix_hits: times that a request began with pages of another sequence.
        prefix_tokens: tokens that were not computed because of it.
        preemptions: times that the pages of a request were taken, to be computed again later.
        finished: requests that ended, by reason.
    """

    running: int
    waiting: int
    batch: int
    step_tokens: int
    pages: int
    pages_in_use: int
    pages_free: int
    pages_cached: int
    tokens_per_second: float
    steps: int
    tokens: int
    computed_tokens: int
    prefix_hits: int
    prefix_tokens: int
    preemptions: int
    finished: Mapping[Finish, int]


@dataclass
class Counts:
    """What a loop counts; see `Stats`."""

    batch: int = 0
    step_tokens: int = 0
    steps: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    prefix_hits: int = 0
    prefix_tokens: int = 0
    preemptions: int = 0
    finished: Counter[Finish] = field(default_factory=Counter)


class Rate:
    """Tokens a second over the last `RATE_SECONDS`."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque()

    def add(self, began: float, tokens: int) -> None:
        """Notes a step that began at a time and gave tokens out."""
        self._steps.append((began, tokens))
        self._forget(began)

    def per_second(self, now: float) -> float:
        """The rate at a time."""
        self._forget(now)
        tokens = sum(tokens for _, tokens in self._steps)
        return tokens / max(now - self._steps[0][0], 1e-9) if tokens else 0.0

    def _forget(self, now: float) -> None:
        while self._steps and self._steps[0][0] < now - RATE_SECONDS:
            self._steps.popleft()
