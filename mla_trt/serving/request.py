"""What is asked of the engine loop, and what it answers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mla_trt.serving.sampling import Sampling

Finish = Literal["stop", "length", "cancelled", "deadline", "error"]
"""Why a request ended: a stop id came, it has all its tokens, it was cancelled, its time was over, or something failed."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: most tokens to add, at least 1.
        stop_ids: ids that end the request; they are given out as well.
        sampling: how tokens are chosen.
        priority: requests of a larger one go first and may displace those of a smaller one; among equals, arrival decides.
        deadline: when the request ends if it is not done, in seconds of the loop's clock (`time.monotonic`); None: never.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stop_ids: Collection[int] = ()
    sampling: Sampling = field(default_factory=Sampling)
    priority: int = 0
    deadline: float | None = None


@dataclass(frozen=True)
class Event:
    """News of a request.

    Attributes:
        request_id: what `EngineLoop.submit` returned.
        tokens: new tokens, in order; none where the request only ended.
        finish: why the request ended, None while it goes on. Nothing comes after it.
        error: with finish "error", one line that says what is wrong.
    """

    request_id: int
    tokens: tuple[int, ...] = ()
    finish: Finish | None = None
    error: str | None = None
