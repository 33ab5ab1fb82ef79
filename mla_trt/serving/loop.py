"""The engine loop: continuous batching of requests over one session.

Every step runs the next tokens of some requests: the latest token of one that decodes, the next part of a prompt. A request
whose pages were taken is one whose prompt has become longer by what it said so far, so that nothing is done in two ways.
"""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mla_trt import interface as roles
from mla_trt.errors import MlaTrtError, QueueFullError, UsageError
from mla_trt.serving.prefixes import PrefixIndex, extend_digests
from mla_trt.serving.request import Event, Finish, Request
from mla_trt.serving.sampling import Sampler
from mla_trt.serving.statistics import Counts, Rate, Stats
from mla_trt.session import Session


@dataclass(eq=False)
class _Entry:
    """A request that has not ended.

    Attributes:
        tokens: prompt and what was added, all but the first `length` of which still have to go through the model.
        sequence: of the session, while the request runs.
        digests: of full pages of `tokens`, as far as they were needed.
        ending: why it ends at the beginning of the next step.
        stepped: the last step that it was part of.
    """

    request_id: int
    request: Request
    sampler: Sampler
    tokens: list[int]
    sequence: int | None = None
    digests: list[bytes] = field(default_factory=list)
    ending: tuple[Finish, str | None] | None = None
    stepped: int = -1

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first: larger priority, then earlier arrival."""
        return -self.request.priority, self.request_id

    @property
    def added(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


class _Batch:
    """What the next step runs.

    Attributes:
        new: new tokens of each request.
        tokens: all of them.
        pages: free pages that they take.
    """

    def __init__(self) -> None:
        self.new: dict[_Entry, int] = {}
        self.tokens = 0
        self.pages = 0
        self._pages: dict[_Entry, int] = {}

    def add(self, entry: _Entry, new: int, pages: int) -> None:
        self.new[entry], self._pages[entry] = new, pages
        self.tokens += new
        self.pages += pages

    def discard(self, entry: _Entry) -> None:
        self.tokens -= self.new.pop(entry, 0)
        self.pages -= self._pages.pop(entry, 0)


class EngineLoop:
    """Runs requests together, step by step. `step` is for one thread; everything else may be called from any.

    Args:
        session: over a model of token ids. The loop owns it: nobody else may touch its sequences.
        max_batch: most sequences of a step, and so of requests that run at a time; the engine may allow fewer.
        max_step_tokens: most tokens of a step; the engine may allow fewer.
        max_waiting: most requests that wait; more are refused.
        prefix_sources: most ended sequences whose full pages are kept for prompts that begin alike.
        clock: seconds, for deadlines and rates.

    Raises:
        UsageError: a limit below 1, a session with sequences, or a model that takes more than token ids.
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
        limits = (("max_batch", max_batch), ("max_step_tokens", max_step_tokens), ("max_waiting", max_waiting))
        for name, value in limits:
            if value < 1:
                raise UsageError(f"{name} is {value}: it must be at least 1")
        if session.sequences:
            raise UsageError("the session has sequences already: the engine loop needs one of its own")
        engine, metadata = session.engine, session.metadata
        if engine.token_features or engine.token_dtype.kind not in "iu":
            raise UsageError(f"the model's input '{metadata.token_input}' takes no token ids: it cannot generate text")
        extra = [entry.name for entry in metadata.side_inputs if entry.role not in (roles.ATTENTION_MASK, roles.STATE)]
        if extra:
            raise UsageError(f"the model also needs the inputs {', '.join(extra)}, which no request can give")
        self._session = session
        self._page_size = metadata.page_size
        self._equal_only = not metadata.packed
        self._shares = metadata.packed and not any(entry.role == roles.STATE for entry in metadata.side_inputs)
        self._max_waiting = max_waiting
        self._prefix_sources = prefix_sources if self._shares else 0
        self._clock = clock
        self._max_tokens = max_step_tokens
        self._max_chunk = max_step_tokens if engine.max_tokens is None else min(max_step_tokens, engine.max_tokens)
        if metadata.packed:
            self._max_tokens = self._max_chunk
        elif "S" not in metadata.token_axes:
            self._max_chunk = 1
        # Every running request may have a token in each step.
        self._max_batch = min(max_batch, self._max_tokens, engine.max_sequences or max_batch)
        if self._equal_only and "B" not in metadata.token_axes:
            self._max_batch = 1
        self._entries: dict[int, _Entry] = {}
        self._waiting: list[_Entry] = []
        self._running: list[_Entry] = []
        self._prefixes = PrefixIndex()
        self._sources: dict[int, None] = {}
        """Ended sequences whose pages are kept, the one that was of use last at the end."""
        self._cached: Counter[int] = Counter()
        """In how many of them each page is."""
        self._submitted = 0
        self._counts = Counts()
        self._rate = Rate()
        self._lock = threading.RLock()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do and nothing to tell."""
        return not self._entries

    def submit(self, request: Request) -> int:
        """Queues a request; returns its id.

        Raises:
            UsageError: no prompt, ids outside the vocabulary, or more tokens than the model or the pool takes.
            QueueFullError: as many requests wait as may.
        """
        tokens = self._checked(request)
        with self._lock:
            if sum(entry.ending is None for entry in self._waiting) >= self._max_waiting:
                raise QueueFullError(f"{self._max_waiting} requests wait already: try again later")
            entry = _Entry(self._submitted, request, Sampler(request.sampling), tokens)
            self._submitted += 1
            self._entries[entry.request_id] = entry
            insort(self._waiting, entry, key=_rank)
            return entry.request_id

    def cancel(self, request_id: int) -> bool:
        """Ends a request; the next step tells so. Returns False where it has ended, or never began."""
        return self._end_soon(request_id, "cancelled", None)

    def abort(self, message: str) -> None:
        """Ends every request with an error, which the next step tells."""
        with self._lock:
            for request_id in self._entries:
                self._end_soon(request_id, "error", message)

    def step(self) -> list[Event]:
        """Runs one step; returns what is new, at most one event a request. What fails in it is an event of each request
        that was part of it, and is never raised."""
        began = self._clock()
        with self._lock:
            events = self._end_due(began)
            plan = self._plan_equal(events) if self._equal_only else self._plan(events)
        batch = plan.new
        if not batch:
            return events
        chunks = {}
        for entry, new in batch.items():
            cached = self._length(entry)
            chunks[_sequence(entry)] = np.array(entry.tokens[cached : cached + new])
        # Without the lock: a step can take long, and who submits or cancels need not wait for it.
        try:
            results = self._session.step(chunks)
        except Exception as error:
            message = " ".join(f"{'' if isinstance(error, MlaTrtError) else type(error).__name__} {error}".split())
            with self._lock:
                return events + [self._end(entry, "error", error=message) for entry in batch]
        main = self._session.engine.results[0]
        with self._lock:
            counts = self._counts
            counts.batch, counts.step_tokens = len(batch), plan.tokens
            counts.computed_tokens += counts.step_tokens
            given = counts.tokens
            for entry in batch:
                entry.stepped = counts.steps
                self._share(entry)
                if entry.ending is None and self._length(entry) == len(entry.tokens):
                    events.append(self._advance(entry, results[_sequence(entry)][main][-1]))
            counts.steps += 1
            self._rate.add(began, counts.tokens - given)
        return events

    def drop_prefixes(self) -> None:
        """Frees the pages that are kept for prompts to come. Not while a step runs."""
        with self._lock:
            while self._sources:
                self._drop_source()

    def stats(self) -> Stats:
        """What the loop does now and did so far."""
        with self._lock:
            counts, pages, free = self._counts, self._session.engine.pages, self._session.free_count
            return Stats(
                running=len(self._running),
                waiting=len(self._waiting),
                batch=counts.batch,
                step_tokens=counts.step_tokens,
                pages=pages,
                pages_in_use=pages - free,
                pages_free=free,
                pages_cached=len(self._cached),
                tokens_per_second=self._rate.per_second(self._clock()),
                steps=counts.steps,
                tokens=counts.tokens,
                computed_tokens=counts.computed_tokens,
                prefix_hits=counts.prefix_hits,
                prefix_tokens=counts.prefix_tokens,
                preemptions=counts.preemptions,
                finished=dict(counts.finished),
            )

    def _checked(self, request: Request) -> list[int]:
        if not len(request.prompt):
            raise UsageError("the prompt is empty: give at least one token id")
        try:
            tokens = np.asarray(request.prompt)
        except ValueError:  # rows of different lengths
            tokens = np.empty(0)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise UsageError("the prompt must be a list of token ids, which are integers")
        if request.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {request.max_new_tokens}: it must be at least 1")
        engine, metadata = self._session.engine, self._session.metadata
        limit = np.iinfo(engine.token_dtype).max if engine.vocabulary is None else engine.vocabulary
        outside = tokens[(tokens < 0) | (tokens >= limit)]
        if outside.size:
            known = "" if engine.vocabulary is None else f"; the model has ids 0 to {limit - 1}"
            raise UsageError(f"token {outside[0]} of the prompt is not in the vocabulary{known}")
        # The last token goes out without going through the model.
        positions = len(tokens) + request.max_new_tokens - 1
        for most, what in (
            (metadata.max_position, "the model has"),
            (metadata.max_pages and metadata.max_pages * self._page_size, "the block table holds"),
            (engine.max_length, "the engine takes"),
            (engine.pages * self._page_size, "the pool of pages holds"),
        ):
            if most is not None and positions > most:
                raise UsageError(
                    f"{len(tokens)} tokens of the prompt and {request.max_new_tokens} new ones need {positions} positions, "
                    f"{what} {most}: shorten the prompt or ask for fewer"
                )
        found: list[int] = tokens.tolist()
        return found

    def _end_soon(self, request_id: int, finish: Finish, error: str | None) -> bool:
        with self._lock:
            entry = self._entries.get(request_id)
            if entry is None or entry.ending is not None:
                return False
            entry.ending = finish, error
            return True

    def _end_due(self, now: float) -> list[Event]:
        """Ends what was cancelled or is over its time."""
        events = []
        for entry in list(self._entries.values()):
            deadline = entry.request.deadline
            if entry.ending is not None:
                events.append(self._end(entry, entry.ending[0], error=entry.ending[1]))
            elif deadline is not None and now >= deadline:
                events.append(self._end(entry, "deadline"))
        return events

    def _plan(self, events: list[Event]) -> _Batch:
        """The next step: first the requests that decode, then prompts that were begun, then new ones."""
        batch = _Batch()
        for entry in sorted(self._running, key=lambda entry: (self._missing(entry) > 1, entry.rank)):
            if entry.sequence is not None and batch.tokens < self._max_tokens:
                self._add(entry, min(self._missing(entry), self._max_tokens - batch.tokens), batch)
        while batch.tokens < self._max_tokens and (admitted := self._admit_next(batch, events)):
            self._add(admitted, min(self._missing(admitted), self._max_tokens - batch.tokens), batch)
        return batch

    def _plan_equal(self, events: list[Event]) -> _Batch:
        """The same for a model whose sequences must have as many cached and as many new tokens each: the requests that are
        equal to the one that waits longest for its turn, of those of the highest priority."""
        batch = _Batch()
        while self._admit_next(batch, events):
            pass
        while self._running and not batch.new:
            head = min(self._running, key=lambda entry: (-entry.request.priority, entry.stepped, entry.request_id))
            sizes = self._length(head), min(self._missing(head), self._max_chunk)
            equal = [
                entry
                for entry in sorted(self._running, key=_rank)
                if entry is not head and sizes == (self._length(entry), min(self._missing(entry), self._max_chunk))
            ]
            for entry in [head, *equal][: max(1, self._max_tokens // sizes[1])]:
                if entry.sequence is not None:
                    self._add(entry, sizes[1], batch)
        return batch

    def _admit_next(self, batch: _Batch, events: list[Event]) -> _Entry | None:
        """Lets the first waiting request run; returns it, None where there is no room."""
        while self._waiting:
            entry = self._waiting[0]
            if self._admit(entry, batch):
                return entry
            if self._running:
                return None
            events.append(self._end(entry, "error", error="the pool has no room, though nothing else runs"))
        return None

    def _admit(self, entry: _Entry, batch: _Batch) -> bool:
        """Lets the first waiting request run where there is a place, and pages for all of its tokens. Those of smaller
        priority give theirs up for it."""
        lower = [other for other in self._running if other.request.priority < entry.request.priority]
        if len(self._running) >= self._max_batch and not lower:
            return False
        source, shared = None, 0
        if self._shares:
            # One token has to go through the model at least.
            extend_digests(entry.digests, entry.tokens, self._page_size, (len(entry.tokens) - 1) // self._page_size)
            source, shared = self._prefixes.longest(entry.digests) or (None, 0)
        wanted = min(self._pages(len(entry.tokens) + 1), self._session.engine.pages) - shared
        if not self._can_free(wanted, entry, lower, () if source is None else self._session.pages_of(source)[:shared]):
            return False
        if source is None:
            entry.sequence = self._session.create()
        else:
            entry.sequence = self._session.fork(source)
            self._session.truncate(entry.sequence, shared * self._page_size)
            self._prefixes.update(entry.sequence, entry.digests[:shared])
            if source in self._sources:
                self._sources[source] = self._sources.pop(source)
        if len(self._running) >= self._max_batch:
            self._preempt(max(lower, key=_rank), batch)
        while self._unpromised() < wanted:
            lower = [other for other in self._running if other.request.priority < entry.request.priority]
            if self._sources:
                self._drop_source()
            elif lower:
                self._preempt(max(lower, key=_rank), batch)
            else:
                self._free(entry.sequence)
                entry.sequence = None
                return False
        if source is not None:
            self._counts.prefix_hits += 1
            self._counts.prefix_tokens += shared * self._page_size
        self._waiting.remove(entry)
        self._running.append(entry)
        return True

    def _can_free(self, wanted: int, entry: _Entry, lower: list[_Entry], kept: tuple[int, ...]) -> bool:
        """Whether giving up sources and requests of smaller priority can make room. It may still not, where they share."""
        short = wanted - self._unpromised()
        if short <= 0:
            return True
        held = set(kept).union(*(self._session.pages_of(_sequence(other)) for other in self._running))
        return short <= len(self._cached.keys() - held) + sum(self._pages(len(other.tokens)) for other in lower)

    def _unpromised(self) -> int:
        """Free pages but those that running requests need for the tokens they have and the next one."""
        promised = sum(self._pages(len(entry.tokens) + 1) - self._pages(self._length(entry)) for entry in self._running)
        return self._session.free_count - promised

    def _add(self, entry: _Entry, new: int, batch: _Batch) -> None:
        """Adds the next tokens of a running request to a step. Where pages are missing, the last of all requests loses its
        own; if it is this one, it is not part of the step."""
        length = self._length(entry)
        wanted = self._pages(length + new) - self._pages(length)
        while batch.pages + wanted > self._session.free_count:
            if self._sources:
                self._drop_source()
                continue
            last = max(self._running, key=_rank)
            self._preempt(last, batch)
            if last is entry:
                return
        batch.add(entry, new, wanted)

    def _preempt(self, entry: _Entry, batch: _Batch) -> None:
        batch.discard(entry)
        self._free(_sequence(entry))
        entry.sequence = None
        self._running.remove(entry)
        insort(self._waiting, entry, key=_rank)
        self._counts.preemptions += 1

    def _advance(self, entry: _Entry, logits: np.ndarray) -> Event:
        """Gives a request its next token."""
        try:
            token = entry.sampler.choose(logits)
        except MlaTrtError as error:
            return self._end(entry, "error", error=str(error))
        entry.tokens.append(token)
        self._counts.tokens += 1
        if token in entry.request.stop_ids:
            return self._end(entry, "stop", (token,))
        if entry.added >= entry.request.max_new_tokens:
            return self._end(entry, "length", (token,))
        return Event(entry.request_id, (token,))

    def _end(self, entry: _Entry, finish: Finish, tokens: tuple[int, ...] = (), error: str | None = None) -> Event:
        del self._entries[entry.request_id]
        self._counts.finished[finish] += 1
        if entry.sequence is None:
            self._waiting.remove(entry)
        else:
            self._running.remove(entry)
            if finish == "error":
                self._free(entry.sequence)
            else:
                self._keep(entry)
        return Event(entry.request_id, tokens, finish, error)

    def _share(self, entry: _Entry) -> None:
        """Makes the full pages of a running request known."""
        if self._shares:
            full = self._length(entry) // self._page_size
            extend_digests(entry.digests, entry.tokens, self._page_size, full)
            self._prefixes.update(_sequence(entry), entry.digests[:full])

    def _keep(self, entry: _Entry) -> None:
        """Makes the sequence of an ended request a source, unless another one has all its pages."""
        sequence, full = _sequence(entry), self._length(entry) // self._page_size
        if not full or not self._prefix_sources:
            self._free(sequence)
            return
        holders = self._prefixes.holders(entry.digests[full - 1])
        same = next((source for source in holders if source in self._sources), None)
        if same is not None:
            self._free(sequence)
            return
        self._session.truncate(sequence, full * self._page_size)
        self._sources[sequence] = None
        self._cached.update(self._session.pages_of(sequence))
        if len(self._sources) > self._prefix_sources:
            self._drop_source()

    def _drop_source(self) -> None:
        """Frees the source that was of no use for longest."""
        source = next(iter(self._sources))
        del self._sources[source]
        self._cached.subtract(self._session.pages_of(source))
        self._cached = +self._cached
        self._free(source)

    def _free(self, sequence: int) -> None:
        self._prefixes.remove(sequence)
        self._session.free(sequence)

    def _length(self, entry: _Entry) -> int:
        return self._session.length(_sequence(entry))

    def _missing(self, entry: _Entry) -> int:
        return len(entry.tokens) - self._length(entry)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size)


def _rank(entry: _Entry) -> tuple[int, int]:
    return entry.rank


def _sequence(entry: _Entry) -> int:
    assert entry.sequence is not None, "only running requests have a sequence"
    return entry.sequence
