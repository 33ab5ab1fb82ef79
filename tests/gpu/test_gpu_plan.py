"""MlaPlan on the GPU: every number equal to the reference's."""

from __future__ import annotations

import numpy as np
import pytest
from harness import Array, compare_exactly, run_op
from op_harness import reference

CASES = {
    "ragged": ([3, 1, 5], [4, 7, 0], 0),
    "padding": ([2, 2], [1, 8], 3),
    "empty sequences": ([0, 2, 0, 0, 1, 0], [9, 0, 0, 3, 4, 1], 1),
    "page borders": ([1, 1, 1, 1, 1], [62, 63, 64, 127, 128], 0),
    "no sequence": ([], [], 0),
    "padding only": ([], [], 2),
    "no new tokens": ([0, 0], [5, 6], 2),
    "nothing at all": ([0], [0], 0),
    "one long sequence": ([1], [131071], 0),
    "one long prompt": ([4096], [0], 100),
    "decode of 128": ([1] * 128, list(range(0, 128 * 97, 97)), 0),
    "decode of 1000": ([1] * 1000, [(7919 * n) % 5000 for n in range(1000)], 24),
    "many empty": ([0, 0, 3, 0] * 300, [5, 0, 70, 1] * 300, 7),
}


def _inputs(new: list[int], cached: list[int], padding: int) -> dict[str, Array]:
    offsets = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    tokens = np.zeros((1, int(offsets[-1]) + padding), np.int64)
    return {"tokens": tokens, "query_offsets": offsets, "cache_lengths": np.array(cached, np.int32)}


@pytest.mark.small
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("parts", [1, 5, 128, 1000])
def test_plan(case: tuple[list[int], list[int], int], parts: int) -> None:
    for page_size in (4, 64):
        found = run_op("MlaPlan", _inputs(*case), page_size=page_size, num_partitions=parts, repeat=3)
        expected = reference("MlaPlan", _inputs(*case), page_size=page_size, num_partitions=parts)
        for name, values in expected.items():
            compare_exactly(f"{name} (page size {page_size})", found[name], values)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 6), (2, 3)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.float16])
def test_tokens_may_have_any_shape_and_type(shape: tuple[int, ...], dtype: type) -> None:
    inputs = {**_inputs([4], [2], 2), "tokens": np.zeros(shape, dtype)}
    found = run_op("MlaPlan", inputs, page_size=4)
    compare_exactly("positions", found["positions"], np.array([2, 3, 4, 5, 0, 0], np.int32))


def test_in_a_graph() -> None:
    inputs = _inputs([1, 4, 0, 2], [600, 5, 3, 64], 1)
    found, expected = run_op("MlaPlan", inputs, graph=True, repeat=3), reference("MlaPlan", inputs)
    for name, values in expected.items():
        compare_exactly(name, found[name], values)
