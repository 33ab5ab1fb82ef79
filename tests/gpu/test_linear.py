"""MlaLinear on the GPU: products of few tokens and many, of sizes that are multiples of nothing."""

from __future__ import annotations

import numpy as np
import pytest
from cases import HALF_TYPES
from harness import Array, compare, run_op

OP = "MlaLinear"
TOLERANCE = {"f32": 1e-5, "f16": 2**-10, "bf16": 2**-8}  # of the output's type: sums are in f32


def _inputs(
    seed: int, tokens: int, columns: int, outputs: int, dtype: str = "bf16", heads: int = 1
) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    spread = max(columns, 1) ** -0.5
    return {
        "x": rng.standard_normal((tokens, columns), np.float32).astype(HALF_TYPES[dtype]),
        "weight": (spread * rng.standard_normal((columns, heads, outputs // heads), np.float32)).astype(
            HALF_TYPES[dtype]
        ),
    }


def _expected(inputs: dict[str, Array]) -> Array:
    x, weight = (inputs[name].astype(np.float32) for name in ("x", "weight"))
    return (x @ weight.reshape(len(weight), weight.shape[1] * weight.shape[2])).reshape(len(x), *weight.shape[1:])


def _check(inputs: dict[str, Array], dtype: str = "bf16", **options: int) -> None:
    compare("output", run_op(OP, inputs, repeat=2, **options)["output"], _expected(inputs), TOLERANCE[dtype])


@pytest.mark.small
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 128, 129, 300])
@pytest.mark.parametrize(("columns", "outputs"), [(64, 64), (8, 8), (72, 200), (136, 264)])
def test_sizes(tokens: int, columns: int, outputs: int) -> None:
    _check(_inputs(1, tokens, columns, outputs, heads=4))


@pytest.mark.small
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize(("tokens", "columns", "outputs"), [(5, 64, 64), (70, 37, 45), (3, 0, 8), (2, 8, 0)])
def test_any_type_and_size(dtype: str, tokens: int, columns: int, outputs: int) -> None:
    _check(_inputs(2, tokens, columns, outputs, dtype), dtype)


@pytest.mark.small
def test_an_output_that_is_not_aligned() -> None:
    _check(_inputs(3, 5, 64, 64), shift=2)


@pytest.mark.parametrize("tokens", [1, 16, 64, 65, 128, 200, 256, 257, 2048])
@pytest.mark.parametrize(
    ("columns", "outputs"), [(1536, 24576), (1536, 8192), (1536, 32768), (16384, 7168), (2048, 12288), (1544, 3080)]
)
def test_sizes_of_models(tokens: int, columns: int, outputs: int) -> None:
    _check(_inputs(4, tokens, columns, outputs))


@pytest.mark.parametrize("tokens", [1, 64, 128, 300])
def test_a_thousand_repeats(tokens: int) -> None:
    inputs = _inputs(5, tokens, 1536, 4096)
    found = run_op(OP, inputs, repeat=1000, graph=True)["output"]
    compare("output", found, _expected(inputs), TOLERANCE["bf16"])


@pytest.mark.small
@pytest.mark.parametrize("tokens", [1, 100])
def test_calls_in_a_row(tokens: int) -> None:
    """A call may begin beside the one before; where a block does not wait for it, the emulator says so."""
    _check(_inputs(6, tokens, 200, 520), in_a_row=3)


@pytest.mark.small
def test_what_is_not_a_number_stays_in_its_token() -> None:
    inputs = _inputs(7, 70, 136, 72)
    inputs["x"][3, 5], inputs["x"][68, 100] = np.nan, np.inf
    found = run_op(OP, inputs)["output"]
    expected = _expected(inputs)
    there = np.delete(np.arange(70), [3, 68])
    compare("output", found[there], expected[there], TOLERANCE["bf16"])
    assert np.isnan(found[3]).all()
    assert not np.isfinite(found[68]).any()
