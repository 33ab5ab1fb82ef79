"""A thread that drives an engine loop, for callers that wait for their own tokens only."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator

from mla_trt.errors import MlaTrtError, RequestFailedError
from mla_trt.serving.loop import EngineLoop
from mla_trt.serving.request import Event, Finish, Request

log = logging.getLogger(__name__)

CLOSED = "the server is shutting down"


class Stream:
    """The tokens of one request, as they come. For one reader.

    Attributes:
        request_id: of the loop.
        finish: why it ended, None as long as the reader has not seen its end.
        error: what went wrong where finish is "error".
    """

    def __init__(self, loop: EngineLoop, request_id: int) -> None:
        self.request_id = request_id
        self.finish: Finish | None = None
        self.error: str | None = None
        self._loop = loop
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._tokens: list[int] = []

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        """The next token.

        Raises:
            RequestFailedError: the request ended with an error.
        """
        while not self._tokens:
            event = self.next_event()
            if event is None:
                if self.finish == "error":
                    raise RequestFailedError(self.error)
                raise StopIteration
            self._tokens.extend(event.tokens)
        return self._tokens.pop(0)

    def next_event(self, timeout: float | None = None) -> Event | None:
        """The next event; None after the last one.

        Raises:
            TimeoutError: none came within `timeout` seconds.
        """
        if self.finish is not None:
            return None
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"no token came within {timeout} s") from None
        self.finish, self.error = event.finish, event.error
        return event

    def cancel(self) -> None:
        """Ends the request. The stream ends with finish "cancelled" unless it was done before."""
        self._loop.cancel(self.request_id)


class LoopRunner:
    """Runs a loop on a thread of its own, which sleeps while there is nothing to do.

    Args:
        loop: nobody else may call its `step`.
        forget: called when nothing runs, after the pages that were kept for prompts to come were freed. None: they stay.
    """

    def __init__(self, loop: EngineLoop, forget: Callable[[], None] | None = None) -> None:
        self.loop = loop
        self._forget = forget
        self._callbacks: dict[int, Callable[[Event], None]] = {}
        self._condition = threading.Condition()
        self._closing = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine loop", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Stream:
        """Queues a request.

        Args:
            request: the request.
            on_event: gets each event on the runner's thread, in place of the stream; it must be quick. Where it
                raises, the request is cancelled.

        Raises:
            UsageError, QueueFullError: as `EngineLoop.submit`.
            MlaTrtError: the runner is closed.
        """
        with self._condition:
            if self._closing or self._failure:
                raise MlaTrtError(self._failure or CLOSED)
            stream = Stream(self.loop, self.loop.submit(request))
            self._callbacks[stream.request_id] = on_event or stream._events.put
            self._condition.notify_all()
        return stream

    def close(self, drain_seconds: float = 0.0) -> bool:
        """Takes no more requests, lets those there are go on for some seconds, and ends the rest with an error. The thread
        has ended and the pool is whole afterwards. Returns whether all were done in time."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
            drained = self._condition.wait_for(lambda: not self._callbacks, drain_seconds)
        self.loop.abort(CLOSED)
        self._thread.join()
        return drained

    def _run(self) -> None:
        try:
            while self._wait():
                events = self.loop.step()
                with self._condition:
                    told = [(self._callbacks[event.request_id], event) for event in events]
                    for _, event in told:
                        if event.finish is not None:
                            del self._callbacks[event.request_id]
                for callback, event in told:
                    self._tell(callback, event)
                if self._forget is not None and self.loop.idle:
                    # A request that is submitted meanwhile has no pages before the next step.
                    self.loop.drop_prefixes()
                    self._forget()
                with self._condition:
                    self._condition.notify_all()
            self.loop.drop_prefixes()
        except Exception as error:
            # Whatever it was: nobody may wait for tokens that no thread will make.
            with self._condition:
                self._failure = f"the engine loop failed: {type(error).__name__} {error}"
                callbacks, self._callbacks = self._callbacks, {}
                self._condition.notify_all()
            for request_id, callback in callbacks.items():
                self._tell(callback, Event(request_id, finish="error", error=self._failure))
            raise

    def _tell(self, callback: Callable[[Event], None], event: Event) -> None:
        try:
            callback(event)
        except Exception:
            # One client's fault must not end the others' streams.
            log.exception("request %d is cancelled: its tokens cannot be delivered", event.request_id)
            self.loop.cancel(event.request_id)

    def _wait(self) -> bool:
        """Waits for work; returns False when there will be none any more."""
        with self._condition:
            self._condition.wait_for(lambda: self._closing or not self.loop.idle)
            return not self.loop.idle
