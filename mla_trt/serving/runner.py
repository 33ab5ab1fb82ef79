"""A thread that drives an engine loop, for callers that wait for their own tokens only."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mla_trt.serving.loop import EngineLoop
from mla_trt.serving.request import Event, Finish, Request


class Stream:
    """The tokens of one request, as they come. For one reader.

    Attributes:
        request_id: of the loop.
        finish: why it ended, None as long as the reader has not seen its end.
        error: what went wrong where finish is "error".
    """

    request_id: int
    finish: Finish | None
    error: str | None

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        """The next token.

        Raises:
            RequestFailedError: the request ended with an error.
        """
        raise NotImplementedError

    def next_event(self, timeout: float | None = None) -> Event | None:
        """The next event; None after the last one.

        Raises:
            TimeoutError: none came within `timeout` seconds.
        """
        raise NotImplementedError

    def cancel(self) -> None:
        """Ends the request; the stream ends with finish "cancelled" unless it was done before."""
        raise NotImplementedError


class LoopRunner:
    """Runs a loop on a thread of its own.

    Args:
        loop: nobody else may call its `step`.
    """

    def __init__(self, loop: EngineLoop) -> None:
        raise NotImplementedError

    def submit(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Stream:
        """Queues a request.

        Args:
            request: the request.
            on_event: is called with each event on the runner's thread, instead of the stream getting it; must be quick.

        Raises:
            UsageError, QueueFullError: as `EngineLoop.submit`.
            MlaTrtError: the runner is closed.
        """
        raise NotImplementedError

    def close(self, drain_seconds: float = 0.0) -> bool:
        """Takes no more requests, lets those there are go on for some seconds, and ends the rest with an error. The
        thread has ended and the pool is whole afterwards. Returns whether all were done in time."""
        raise NotImplementedError
