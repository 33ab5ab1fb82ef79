"""What happens to a command that is asked to end: nothing is left half-written.

SIGTERM (docker stop, systemd, timeout, Slurm) and SIGHUP (a terminal that closes) end a process where it stands, and drafts as large as the model
would stay. So they raise, as Ctrl-C does. Where they are ignored, as SIGHUP under nohup, they stay so.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

ENDING = (signal.SIGTERM, signal.SIGHUP)
FLAG_SECONDS = 0.02  # how often a flag is looked at


class Ended(KeyboardInterrupt):
    """A signal asked the command to end.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def exit_status(end: KeyboardInterrupt) -> int:
    """As shells have it of a command that a signal ended."""
    return 128 + (end.number if isinstance(end, Ended) else signal.SIGINT)


class Flag:
    """What a signal's handler sets and others wait for. `threading.Event` has a lock, which the very thread may hold that the handler interrupts:
    then `set` never returns."""

    def __init__(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        """Whether it was set."""
        return self._set

    def set(self) -> None:
        """Sets it, for good."""
        self._set = True

    def wait(self, seconds: float) -> bool:
        """Waits until it is set, or for so long; returns whether it is set."""
        deadline = time.monotonic() + seconds
        while not self._set and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, FLAG_SECONDS))
        return self._set


@contextmanager
def handled(numbers: Sequence[int], handler: Callable[[int, object], None]) -> Iterator[None]:
    """Has signals handled within it, but those of ENDING that are ignored. (Shells have SIGINT ignored by all that they start in the background; who
    sends it there means it.) Threads other than the main one get no signals: there it does nothing."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        given = {number: signal.getsignal(number) for number in numbers}
        before = {
            number: how
            for number, how in given.items()
            if how is not None and (how != signal.SIG_IGN or number not in ENDING)
        }
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, how in before.items():
            signal.signal(number, how)


@contextmanager
def ending_raises() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Ended` within it; one that comes a second time ends the process where it stands."""

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Ended(number)

    with handled(ENDING, end):
        yield
