"""The page table: no page lost, none shared wrongly, nothing changed by a step that does not fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mla_trt.errors import OutOfPagesError, UsageError
from mla_trt.pages import PageTable

PAGES, PAGE_SIZE, MAX_PAGES = 12, 4, 5
EMPTY = -1


class PagedTokens(RuleBasedStateMachine):
    """Carries out every plan on a pool of token numbers, and reads each sequence back through its pages."""

    def __init__(self) -> None:
        super().__init__()
        self.table = PageTable(PAGES, PAGE_SIZE, max_pages=MAX_PAGES)
        self.pool = np.full((PAGES, PAGE_SIZE), EMPTY)
        self.expected: dict[int, list[int]] = {}
        self.next_token = 0

    @precondition(lambda self: len(self.expected) < 6)
    @rule()
    def create(self) -> None:
        self.expected[self.table.create()] = []

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        batch = data.draw(st.permutations(sorted(self.expected)))[: data.draw(st.integers(1, len(self.expected)))]
        counts = {sequence: data.draw(st.integers(0, 7)) for sequence in batch}
        before = (self.table.free_pages, {sequence: self.table.pages_of(sequence) for sequence in self.expected})
        try:
            plan = self.table.plan(counts)
        except (OutOfPagesError, UsageError):
            after = (self.table.free_pages, {sequence: self.table.pages_of(sequence) for sequence in self.expected})
            assert before == after
            return
        sources = [self.pool[source].copy() for source, _ in plan.page_copies]
        for (_, target), source in zip(plan.page_copies, sources, strict=True):
            self.pool[target] = source
        offsets, lengths = plan.query_offsets(), plan.cache_lengths()
        block_table = plan.block_table(MAX_PAGES)
        for row, sequence in enumerate(plan.sequences):
            for index in range(offsets[row + 1] - offsets[row]):
                position = int(lengths[row]) + index
                self.pool[block_table[row, position // PAGE_SIZE], position % PAGE_SIZE] = self.next_token
                self.expected[sequence].append(self.next_token)
                self.next_token += 1
        self.table.commit(plan)

    @precondition(lambda self: 0 < len(self.expected) < 6)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(sorted(self.expected)))
        self.expected[self.table.fork(parent)] = list(self.expected[parent])

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.expected)))
        length = data.draw(st.integers(0, len(self.expected[sequence])))
        self.table.truncate(sequence, length)
        del self.expected[sequence][length:]

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.expected)))
        self.table.free(sequence)
        del self.expected[sequence]

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for sequence, tokens in self.expected.items():
            assert self.table.length(sequence) == len(tokens)
            assert self.pool[list(self.table.pages_of(sequence))].reshape(-1)[: len(tokens)].tolist() == tokens

    @invariant()
    def every_page_is_held_or_free(self) -> None:
        held = {page for sequence in self.expected for page in self.table.pages_of(sequence)}
        free = self.table.free_pages
        assert len(free) == len(set(free))
        assert held.isdisjoint(free)
        assert held | set(free) == set(range(PAGES))

    @invariant()
    def no_sequence_holds_more_pages_than_it_needs(self) -> None:
        for sequence, tokens in self.expected.items():
            assert len(self.table.pages_of(sequence)) == -(-len(tokens) // PAGE_SIZE)


TestPagedTokens = PagedTokens.TestCase
TestPagedTokens.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def append(table: PageTable, counts: dict[int, int]) -> None:
    table.commit(table.plan(counts))


def plan_alone(table: PageTable, tokens: int) -> None:
    table.plan({table.create(): tokens})


def test_a_fork_takes_no_page_until_one_of_both_writes() -> None:
    table = PageTable(4, 4)
    parent = table.create()
    append(table, {parent: 6})
    child = table.fork(parent)
    assert len(table.free_pages) == 2
    plan = table.plan({parent: 1, child: 1})
    assert len(plan.page_copies) == 1  # the second writer has the page for itself by then
    table.commit(plan)
    assert table.pages_of(parent)[0] == table.pages_of(child)[0]
    assert table.pages_of(parent)[1] != table.pages_of(child)[1]


def test_appending_at_a_page_border_copies_nothing() -> None:
    table = PageTable(4, 4)
    parent = table.create()
    append(table, {parent: 8})
    child = table.fork(parent)
    assert table.plan({parent: 1, child: 1}).page_copies == ()


def test_truncating_into_a_shared_full_page_copies_it_before_the_next_write() -> None:
    table = PageTable(4, 4)
    parent = table.create()
    append(table, {parent: 4})
    child = table.fork(parent)
    table.truncate(child, 2)
    (copy,) = table.plan({child: 1}).page_copies
    assert copy[0] == table.pages_of(parent)[0]


def test_a_step_that_does_not_fit_changes_nothing() -> None:
    table = PageTable(3, 4)
    first, second = table.create(), table.create()
    append(table, {first: 4, second: 3})
    with pytest.raises(OutOfPagesError, match="2 more pages of 4 tokens, and 1 of 3 are free"):
        table.plan({second: 2, first: 1})
    assert (table.length(first), table.length(second)) == (4, 3)
    append(table, {second: 2})


def test_unassigned_entries_hold_the_values_asked_for() -> None:
    table = PageTable(3, 4)
    sequence = table.create()
    assert table.plan({sequence: 5}).block_table(5, (-1, 99)).tolist() == [[0, 1, -1, 99, -1]]


def test_lengths_end_at_the_positions_and_pages_that_the_model_has() -> None:
    table = PageTable(8, 4, max_pages=3, max_position=10)
    sequence = table.create()
    append(table, {sequence: 10})
    with pytest.raises(UsageError, match="would have 11 tokens"):
        table.plan({sequence: 1})
    with pytest.raises(UsageError, match="would have 13 tokens"):
        plan_alone(PageTable(8, 4, max_pages=3), 13)


def test_unknown_sequences_and_stale_plans_are_refused() -> None:
    table = PageTable(3, 4)
    sequence = table.create()
    plan = table.plan({sequence: 1})
    table.free(sequence)
    with pytest.raises(UsageError, match="no sequence 0"):
        table.length(sequence)
    with pytest.raises(UsageError, match="changed after this step was planned"):
        table.commit(plan)
    with pytest.raises(UsageError, match="cannot be truncated to 1"):
        table.truncate(table.create(), 1)
