"""The engine loop: continuous batching of requests over one session."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mla_trt.serving.request import Event, Finish, Request
from mla_trt.session import Session


@dataclass(frozen=True)
class Stats:
    """Figures of a loop; those without 'now' count from its beginning.

    Attributes:
        running, waiting: requests now.
        batch, step_tokens: sequences and tokens of the last step.
        pages: pages of the pool.
        pages_in_use, pages_free: now; pages that only prefix sources hold count as in use.
        pages_cached: pages that only prefix sources hold now, which any request can have.
        tokens_per_second: tokens given out, over the last seconds.
        steps: steps run.
        tokens: tokens given out.
        prompt_tokens: tokens of prompts that were computed, those computed again included.
        prefix_hits: requests that began with pages of another sequence.
        prefix_tokens: tokens that need not be computed because of it.
        preemptions: requests whose pages were taken, to be computed again later.
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
    prompt_tokens: int
    prefix_hits: int
    prefix_tokens: int
    preemptions: int
    finished: Mapping[Finish, int]


class EngineLoop:
    """Runs requests together, step by step. `step` is for one thread; everything else may be called from any.

    Args:
        session: over a model of token ids. The loop owns it: nobody else may touch its sequences.
        max_batch: most sequences of a step, and so of requests that run at a time.
        max_step_tokens: most tokens of a step.
        max_waiting: most requests that wait; more are refused.
        prefix_sources: most ended sequences whose pages are kept for prompts that begin alike; 0: nothing is shared.
        clock: seconds, for deadlines and rates.

    Raises:
        UsageError: a limit below 1, or a model that takes more than token ids.
    """

    def __init__(
        self,
        session: Session,
        *,
        max_batch: int = 16,
        max_step_tokens: int = 512,
        max_waiting: int = 256,
        prefix_sources: int = 64,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        raise NotImplementedError

    @property
    def idle(self) -> bool:
        """Whether `step` has nothing to do and nothing to tell."""
        raise NotImplementedError

    def submit(self, request: Request) -> int:
        """Queues a request; returns its id.

        Raises:
            UsageError: no prompt, ids outside the vocabulary, or more tokens than the model or the pool takes.
            QueueFullError: as many requests wait as may.
        """
        raise NotImplementedError

    def cancel(self, request_id: int) -> bool:
        """Ends a request; the next step tells so. Returns False where there is none of that id (any more)."""
        raise NotImplementedError

    def abort(self, message: str) -> None:
        """Ends every request with an error, which the next step tells."""
        raise NotImplementedError

    def step(self) -> list[Event]:
        """Runs one step; returns what is new, at most one event a request. An engine's error is an event of each
        request of the step, never raised."""
        raise NotImplementedError

    def drop_prefixes(self) -> None:
        """Frees the pages that are kept for prompts to come."""
        raise NotImplementedError

    def stats(self) -> Stats:
        """What the loop does now and did so far."""
        raise NotImplementedError
