"""Sampling: what each filter leaves, how often each token comes, and that seeds repeat."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from mla_trt.errors import MlaTrtError, UsageError
from mla_trt.serving.sampling import Sampler, Sampling, largest

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32))


def draw(sampling: Sampling, logits: np.ndarray = LOGITS, count: int = 4000) -> np.ndarray:
    """How often each token comes, as a share."""
    sampler = Sampler(sampling)
    return np.bincount([sampler.choose(logits) for _ in range(count)], minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(1.0, seed=0), [0.05, 0.4, 0.1, 0.3, 0.15]),
        (Sampling(0.5, seed=0), np.square([0.05, 0.4, 0.1, 0.3, 0.15]) / 0.285),
        (Sampling(1.0, top_k=2, seed=0), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(1.0, top_k=9, seed=0), [0.05, 0.4, 0.1, 0.3, 0.15]),
        (Sampling(1.0, top_p=0.69, seed=0), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(1.0, top_p=0.71, seed=0), [0, 8 / 17, 0, 6 / 17, 3 / 17]),
        # The share of top-p is one of what top-k leaves: 0.4 / 0.7 is enough for 0.55, and 0.4 alone is not.
        (Sampling(1.0, top_k=2, top_p=0.55, seed=0), [0, 1, 0, 0, 0]),
        (Sampling(1.0, top_p=1e-9, seed=0), [0, 1, 0, 0, 0]),
        (Sampling(1e-6, seed=0), [0, 1, 0, 0, 0]),
        (Sampling(0.0, top_k=3, top_p=0.5, seed=0), [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_the_filters_say(sampling: Sampling, shares: np.ndarray) -> None:
    found = draw(sampling)
    np.testing.assert_allclose(found, shares, atol=0.03)
    assert not found[np.asarray(shares) == 0].any()


def test_a_seed_repeats_and_others_differ() -> None:
    logits = np.random.default_rng(0).standard_normal((20, 300)).astype(np.float32)

    def stream(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(1.0, top_k=100, top_p=0.9, seed=seed))
        return [sampler.choose(row) for row in logits]

    assert stream(7) == stream(7)
    assert len({tuple(stream(seed)) for seed in (7, 8, None, None)}) == 4


def test_of_equal_logits_the_smaller_id_is_the_likelier() -> None:
    flat = np.zeros(600, np.float32)
    assert Sampler(Sampling()).choose(flat) == 0
    assert set(np.flatnonzero(draw(Sampling(1.0, top_k=3, seed=0), flat, 300))) == {0, 1, 2}
    assert set(np.flatnonzero(draw(Sampling(1.0, top_p=5 / 600, seed=0), flat, 300))) == {0, 1, 2, 3, 4}
    assert largest(np.array([1.0, 3.0, 2.0, 3.0, 2.0, 2.0]), 4).tolist() == [1, 3, 2, 4]


def test_top_p_takes_as_many_tokens_as_it_needs() -> None:
    logits = np.random.default_rng(0).permutation(np.linspace(0, 1, 5000)).astype(np.float32)
    weights = np.sort(np.exp(logits.astype(np.float64)))[::-1]
    count = int(np.searchsorted(np.cumsum(weights), 0.8 * weights.sum())) + 1
    assert count > 3000
    drawn = np.flatnonzero(draw(Sampling(1.0, top_p=0.8, seed=0), logits, 3000))
    assert logits[drawn].min() >= np.sort(logits)[-count]
    assert logits[drawn].min() < np.sort(logits)[-count + 100]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_logits_of_any_float_type_serve(dtype: type) -> None:
    assert Sampler(Sampling()).choose(LOGITS.astype(dtype)) == 1
    assert draw(Sampling(1.0, top_k=1, seed=0), LOGITS.astype(dtype), 3)[1] == 1


def test_tokens_that_cannot_come_do_not_come() -> None:
    logits = np.full(40, -np.inf, np.float32)
    logits[[5, 39]] = 0
    for sampling in (Sampling(1.0, seed=0), Sampling(1.0, top_k=4, seed=0), Sampling(1.0, top_p=0.999, seed=0)):
        assert set(np.flatnonzero(draw(sampling, logits, 200))) == {5, 39}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value: float, temperature: float) -> None:
    logits = np.full(5, value if value == -np.inf else 0, np.float32)
    logits[3] = value
    with pytest.raises(MlaTrtError, match="not finite"):
        Sampler(Sampling(temperature)).choose(logits)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top-k is -1"),
        ({"top_p": 0.0}, "top-p is 0"),
        ({"top_p": 1.1}, "top-p is 1.1"),
        ({"top_p": float("nan")}, "top-p is nan"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_values_outside_their_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**values)
