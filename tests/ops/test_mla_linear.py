"""MlaLinear's body against its reference."""

from __future__ import annotations

import numpy as np
import pytest
from op_harness import reference, run_op


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(5, 7, 3, 4), (1, 8, 1, 8), (0, 4, 2, 2), (3, 6, 2, 0)])
def test_body_equals_reference(shape: tuple[int, int, int, int], dtype: type) -> None:
    rng = np.random.default_rng(0)
    tokens, columns, heads, width = shape
    inputs = {
        "x": rng.standard_normal((tokens, columns)).astype(dtype),
        "weight": rng.standard_normal((columns, heads, width)).astype(dtype),
    }
    found, expected = run_op("MlaLinear", inputs)["output"], reference("MlaLinear", inputs)["output"]
    assert found.dtype == dtype
    assert found.shape == (tokens, heads, width)
    np.testing.assert_allclose(
        found, expected, rtol=1e-2 if dtype == np.float16 else 1e-5, atol=1e-2 if dtype == np.float16 else 1e-5
    )
    for head in range(heads):
        by_hand = inputs["x"].astype(np.float64) @ inputs["weight"][:, head].astype(np.float64)
        np.testing.assert_allclose(expected[:, head], by_hand)
