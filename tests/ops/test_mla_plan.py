"""MlaPlan's body against its reference, and the reference against written-out cases."""

from __future__ import annotations

import numpy as np
import pytest
from op_harness import reference, run_op

CASES = {
    "ragged": ([3, 1, 5], [4, 7, 0], 0),
    "padding": ([2, 2], [1, 8], 3),
    "empty sequences": ([0, 2, 0, 0, 1, 0], [9, 0, 0, 3, 4, 1], 1),
    "page borders": ([1, 1, 1], [2, 3, 4], 0),
    "no sequence": ([], [], 0),
    "padding only": ([], [], 2),
    "no new tokens": ([0, 0], [5, 6], 2),
    "nothing at all": ([0], [0], 0),
    "more work than parts": ([40], [1000], 0),
}


def _inputs(new: list[int], cached: list[int], padding: int) -> dict[str, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    tokens = np.zeros((1, int(offsets[-1]) + padding), np.int64)
    return {"tokens": tokens, "query_offsets": offsets, "cache_lengths": np.array(cached, np.int32)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("parts", [1, 5])
def test_body_equals_reference(case: tuple[list[int], list[int], int], parts: int) -> None:
    inputs = _inputs(*case)
    found = run_op("MlaPlan", inputs, page_size=4, num_partitions=parts)
    expected = reference("MlaPlan", inputs, page_size=4, num_partitions=parts)
    for name, values in expected.items():
        assert found[name].dtype == np.int32
        np.testing.assert_array_equal(found[name], values, name)


def test_tokens_belong_to_their_sequences() -> None:
    found = run_op("MlaPlan", _inputs([2, 0, 1], [3, 9, 0], 2), page_size=4, num_partitions=3)
    assert found["token_sequence"].tolist() == [0, 0, 2, -1, -1]
    assert found["positions"].tolist() == [3, 4, 0, 0, 0]


def test_schedule_cuts_pages_of_sequences_with_new_tokens() -> None:
    # sequence 0 has 5 keys on 2 pages, sequence 2 has 9 on 3, sequence 1 has no new token: 5 units in 3 parts start at
    # 0, 1, 3
    found = run_op("MlaPlan", _inputs([1, 0, 1], [4, 20, 8], 0), page_size=4, num_partitions=3)
    assert found["schedule"].tolist() == [[0, 0], [0, 1], [2, 1], [3, 0]]


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 6), (2, 3)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32])
def test_tokens_may_have_any_shape_and_type(shape: tuple[int, ...], dtype: type) -> None:
    inputs = {**_inputs([4], [2], 2), "tokens": np.zeros(shape, dtype)}
    found = run_op("MlaPlan", inputs, page_size=4)
    assert found["positions"].tolist() == [2, 3, 4, 5, 0, 0]
    assert found["schedule"].shape == (129, 2)
