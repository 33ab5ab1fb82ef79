"""Which pages of the pool hold which sequence.

Pages are counted, so that sequences can share them: a fork shares all pages of its parent, and the page that both would
write into is copied when the first of them does. Nothing here touches the pages themselves; an engine does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mla_trt.errors import OutOfPagesError, UsageError

UNASSIGNED = -1


@dataclass(frozen=True)
class StepPlan:
    """Where the tokens of one step go.

    Attributes:
        sequences: the sequences of the step, in the order of its batch.
        cached: tokens of each that are cached before the step.
        new: new tokens of each.
        pages: pages of each, those of the new tokens among them.
        page_copies: (from, to) pages to copy before anything is appended.
    """

    sequences: tuple[int, ...]
    cached: tuple[int, ...]
    new: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    page_copies: tuple[tuple[int, int], ...]
    taken: int = field(repr=False)
    made_at: int = field(repr=False)

    def query_offsets(self) -> np.ndarray:
        """Where the tokens of each sequence start, int32 [B + 1]."""
        return np.cumsum([0, *self.new], dtype=np.int32)

    def cache_lengths(self) -> np.ndarray:
        """Tokens cached before the step, int32 [B]."""
        return np.array(self.cached, np.int32)

    def block_table(self, columns: int, unassigned: Sequence[int] = (UNASSIGNED,)) -> np.ndarray:
        """Pages of each sequence, int32 [B, columns]. Entries without a page hold the values of `unassigned` in
        turn."""
        table = np.resize(np.array(unassigned, np.int32), (len(self.sequences), columns))
        for row, pages in zip(table, self.pages, strict=True):
            row[: len(pages)] = pages
        return table


@dataclass
class _Sequence:
    length: int
    pages: list[int]


class PageTable:
    """The sequences of a session and the pages that they hold.

    Args:
        pages: pages in the pool.
        page_size: tokens in a page.
        max_pages: most pages of a sequence, None: as many as there are.
        max_position: most tokens of a sequence, None: no limit.
    """

    def __init__(
        self, pages: int, page_size: int, *, max_pages: int | None = None, max_position: int | None = None
    ) -> None:
        if pages < 1 or page_size < 1:
            raise UsageError(f"a pool of {pages} pages of {page_size} tokens holds nothing")
        self.page_size = page_size
        self.max_length = min(
            (limit for limit in (max_position, max_pages and max_pages * page_size) if limit), default=None
        )
        self._free = list(reversed(range(pages)))
        self._holders = [0] * pages
        self._sequences: dict[int, _Sequence] = {}
        self._created = 0
        self._changes = 0

    @property
    def free_pages(self) -> tuple[int, ...]:
        """Pages that no sequence holds."""
        return tuple(self._free)

    @property
    def free_count(self) -> int:
        """Number of pages that no sequence holds."""
        return len(self._free)

    @property
    def sequences(self) -> tuple[int, ...]:
        """The sequences there are, oldest first."""
        return tuple(self._sequences)

    def create(self) -> int:
        """Returns a new sequence without tokens. A number is never used again."""
        sequence = self._created
        self._created += 1
        self._sequences[sequence] = _Sequence(0, [])
        return sequence

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return self._find(sequence).length

    def pages_of(self, sequence: int) -> tuple[int, ...]:
        """Pages of a sequence, in the order of its tokens."""
        return tuple(self._find(sequence).pages)

    def plan(self, new_tokens: Mapping[int, int]) -> StepPlan:
        """Plans a step that appends tokens. Nothing changes before `commit`.

        Args:
            new_tokens: number of new tokens of each sequence, in the order of the batch.

        Raises:
            UsageError: an unknown sequence, or one that would be longer than the model allows.
            OutOfPagesError: the pool has too few free pages.
        """
        wanted = [(self._find(sequence), new) for sequence, new in new_tokens.items()]
        for (entry, new), sequence in zip(wanted, new_tokens, strict=True):
            if self.max_length is not None and entry.length + new > self.max_length:
                raise UsageError(
                    f"sequence {sequence} would have {entry.length + new} tokens, the model takes {self.max_length}"
                )
        left_by_copying: Counter[int] = Counter()
        pages: list[tuple[int, ...]] = []
        copies: list[tuple[int, int]] = []
        taken = 0
        for entry, new in wanted:
            held = list(entry.pages)
            partial = held[-1] if new and entry.length % self.page_size else None
            copied = partial is not None and self._holders[partial] - left_by_copying[partial] > 1
            missing = -(-(entry.length + new) // self.page_size) - len(held) + copied
            fresh = [
                self._free[-1 - index] if index < len(self._free) else UNASSIGNED
                for index in range(taken, taken + missing)
            ]
            taken += missing
            if copied and partial is not None:
                left_by_copying[partial] += 1
                held[-1] = fresh.pop(0)
                copies.append((partial, held[-1]))
            pages.append((*held, *fresh))
        if taken > len(self._free):
            raise OutOfPagesError(
                f"the step needs {taken} more pages of {self.page_size} tokens, and "
                f"{len(self._free)} of {len(self._holders)} are free: "
                "free or truncate sequences, or open the session with more pages"
            )
        cached = tuple(entry.length for entry, _ in wanted)
        return StepPlan(
            tuple(new_tokens), cached, tuple(new_tokens.values()), tuple(pages), tuple(copies), taken, self._changes
        )

    def commit(self, plan: StepPlan) -> None:
        """Makes a plan real, after the engine ran it.

        Raises:
            UsageError: sequences changed after the plan was made.
        """
        if plan.made_at != self._changes:
            raise UsageError("the sequences changed after this step was planned: plan it again")
        self._changes += 1
        del self._free[len(self._free) - plan.taken :]
        for sequence, new, pages in zip(plan.sequences, plan.new, plan.pages, strict=True):
            entry = self._sequences[sequence]
            for page in pages:
                self._holders[page] += 1
            self._release(entry.pages)
            entry.length += new
            entry.pages = list(pages)

    def fork(self, sequence: int) -> int:
        """Returns a new sequence with the tokens of another. They share every page; one that both may append to is
        copied when one of them does, by the copies of that step."""
        parent = self._find(sequence)
        for page in parent.pages:
            self._holders[page] += 1
        child = self.create()
        self._sequences[child] = _Sequence(parent.length, list(parent.pages))
        self._changes += 1
        return child

    def truncate(self, sequence: int, length: int) -> None:
        """Drops the tokens of a sequence from position `length` on.

        Raises:
            UsageError: the sequence is unknown or shorter than that.
        """
        entry = self._find(sequence)
        if not 0 <= length <= entry.length:
            raise UsageError(f"sequence {sequence} has {entry.length} tokens and cannot be truncated to {length}")
        kept = -(-length // self.page_size)
        self._changes += 1
        self._release(entry.pages[kept:])
        del entry.pages[kept:]
        entry.length = length

    def free(self, sequence: int) -> None:
        """Ends a sequence; pages that no other one holds are free again."""
        entry = self._find(sequence)
        self._changes += 1
        self._release(entry.pages)
        del self._sequences[sequence]

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def _find(self, sequence: int) -> _Sequence:
        try:
            return self._sequences[sequence]
        except KeyError:
            raise UsageError(f"there is no sequence {sequence}: it was freed or never begun") from None
