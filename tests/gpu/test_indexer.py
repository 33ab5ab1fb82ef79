"""MlaIndexer on the GPU against its float64 reference.

Small whole numbers are stored and multiplied without rounding, so that every score is exact and the lists must be equal,
ties included. With random numbers a list may differ where scores are within rounding of the last one listed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import TABLES, with_tables
from harness import compare, compare_exactly, run_op
from index_reference import Array, Scores, best, cache_after, layout_of
from op_harness import CODE_STEP, Step, assert_rows_close, behind_a_page_of_nan, make_step, reference

from mla_trt.formats import INDEX_FORMATS

OP = "MlaIndexer"
SCORE_TOLERANCE = 1e-5  # of the sum of a score's absolute terms
SHORT_SUMS = 2.0**-11  # the same where Hopper multiplies codes: its sums of e4m3 products keep 14 bits
HALF_TYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}

P = 64
STEPS = {
    "ragged": ([3, 1, 5], [4, 170, 0], 0),
    "page borders": ([1, 1, 1, 1, 1, 2], [0, P - 2, P - 1, P, 3 * P - 1, P - 1], 0),
    "padding": ([2, 0, 2], [100, 3, 218], 3),
    "no sequence": ([], [], 0),
    "padding only": ([], [], 2),
    "no new tokens": ([0, 0], [5, 6], 2),
    "tile borders": ([1] * 9, [30, 31, 32, 254, 255, 256, 257, 511, 512], 0),
    "prompts": ([70, 33, 1, 129], [0, 300, 0, 511], 5),
}


def attributes_of(
    index_format: str = "fp8", size: int = 128, top_k: int = 32, page_size: int = P, **more: Any
) -> dict[str, Any]:
    return {
        "index_head_dim": size,
        "page_size": page_size,
        "index_format": index_format,
        "top_k": top_k,
        "index_rope_dim": 0,
        "index_norm_epsilon": 1e-6,
        **more,
    }


def whole(rng: np.random.Generator, *shape: int) -> Array:
    """-7..7, with 7 in front: the scale of such a row is 1/64 and its codes are exact."""
    values = rng.integers(-7, 8, shape).astype(np.float32)
    values[..., 0] = 7
    return values


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


def case(
    rng: np.random.Generator, step: Step, attributes: Mapping[str, Any], heads: int = 8, exact: bool = True
) -> dict[str, Any]:
    """Inputs of a step: cached rows are written, all other bits of the pool are set (NaN codes, NaN scales)."""
    layout, values = layout_of(attributes), whole if exact else normal
    size, rope = layout.index_head_dim, attributes["index_rope_dim"]
    cache = np.full((step.pages, layout.page_words), -1, np.int32)
    for sequence, length in enumerate(step.inputs["cache_lengths"].tolist()):
        page, slot = step.places(sequence, range(length))
        layout.write(cache, page, slot, values(rng, length, size))
    query = values(rng, step.tokens, heads, size)
    weights = rng.integers(-2, 4, (step.tokens, heads)).astype(np.float32) if exact else normal(rng, step.tokens, heads)
    padding = step.inputs["token_sequence"] < 0
    query[padding] = weights[padding] = np.nan
    angles = rng.uniform(-3, 3, (step.tokens, rope // 2))
    return {
        "index_query": query,
        "index_key": values(rng, step.tokens, size),
        "index_weights": weights,
        "index_cos": np.cos(angles).astype(np.float32),
        "index_sin": np.sin(angles).astype(np.float32),
        **{name: value for name, value in step.inputs.items() if name != "schedule"},
        "indexer_cache": cache,
    }


def tolerance_of(inputs: Mapping[str, Any], attributes: Mapping[str, Any]) -> float:
    """Of scores: `index_takes_hopper` in plugins/kernels/index_score_hopper.cu says which heads are multiplied as codes."""
    heads, size = inputs["index_query"].shape[1:]
    padded = -(-heads // 16) * 16
    pages = attributes["page_size"]
    codes = attributes["index_format"] == "fp8" and size in (64, 128) and padded % 32 == 0 and pages >= 16
    codes = codes and pages & (pages - 1) == 0
    return SHORT_SUMS if codes else SCORE_TOLERANCE


def check_lists(found: Array, scores: Scores, top_k: int, tolerance: float = SCORE_TOLERANCE) -> None:
    """Ascending lists of the right length whose keys are among the best, within rounding."""
    worst = 0.0
    for token, indices in enumerate(found):
        keys, values, magnitudes = scores.of(token)
        count = min(top_k, len(keys))
        listed = indices[:count]
        assert (indices[count:] == -1).all(), f"token {token}: {indices[count:]} after {count} keys"
        assert (np.diff(listed) > 0).all(), f"token {token}: not ascending: {listed}"
        chosen = np.isin(keys, listed)
        assert chosen.sum() == count, f"token {token}: lists keys that it cannot see: {np.setdiff1d(listed, keys)}"
        if count == 0 or count == len(keys):
            continue
        last = np.argsort(-values, kind="stable")[count - 1]
        scale = max(float(magnitudes[last]), 1e-30)
        missed = float(values[~chosen].max() - values[last]) / scale
        false = float(values[last] - values[chosen].min()) / scale
        worst = max(worst, missed, false)
        assert max(missed, false) <= tolerance, (
            f"token {token}, {len(keys)} keys: misses key {keys[~chosen][values[~chosen].argmax()]} (above the k-th score by "
            f"{missed:.2e} of it), lists key {keys[chosen][values[chosen].argmin()]} (below by {false:.2e})"
        )
    compare("scores around the last one listed", np.array([worst]), np.zeros(1), tolerance, absolute=True)


def check(
    inputs: Mapping[str, Any], attributes: Mapping[str, Any], exact: bool = True, normed: Step | None = None, **how: Any
) -> dict[str, Array]:
    """Run the op and compare cache and lists. ``normed``: the step of rows that went through a norm."""
    found = run_op(OP, inputs, **how, **attributes)
    cache, expected = found["indexer_cache_out"], cache_after(inputs, attributes)
    if normed is None:
        compare_exactly("indexer_cache_out", cache, expected)
    else:
        layout = layout_of(attributes)
        assert_rows_close(layout, cache, expected, normed.new_places(), CODE_STEP[layout.index_format])
    scores, top_k = Scores(inputs, attributes, cache), attributes["top_k"]
    if exact:
        lists = [best(*scores.of(token)[:2], top_k) for token in range(len(found["indices"]))]
        compare_exactly("indices", found["indices"], np.array(lists, np.int32).reshape(-1, top_k))
    else:
        check_lists(found["indices"], scores, top_k, tolerance_of(inputs, attributes))
    return found


@pytest.mark.cpu
@pytest.mark.parametrize("index_format", INDEX_FORMATS)
@pytest.mark.parametrize("hadamard", [0, 1])
@pytest.mark.parametrize("interleaved", [0, 1])
def test_reference_equals_the_op_sets(interleaved: int, hadamard: int, index_format: str) -> None:
    rng = np.random.default_rng(1)
    step = make_step(rng, [3, 0, 2, 4], [30, 3, 9, 0], page_size=4, padding=2)
    attributes = attributes_of(
        index_format, 32, 6, 4, index_rope_dim=16, index_rope_interleaved=interleaved, index_hadamard=hadamard
    )
    inputs = case(rng, step, attributes, exact=False)
    step.inputs["block_table"][0, 1], step.inputs["block_table"][2, 0] = -1, step.pages
    inputs["rope_rows"] = rng.integers(-3, step.tokens + 3, step.tokens).astype(np.int32)
    inputs["page_copies"] = np.array([[step.free[0], step.free[1]], [step.pages, 0], [0, -1]], np.int32)
    inputs["index_norm_weight"], inputs["index_norm_bias"] = normal(rng, 32), normal(rng, 32)
    cache, expected = cache_after(inputs, attributes), reference(OP, inputs, **attributes)
    assert_rows_close(
        layout_of(attributes), cache, expected["indexer_cache_out"], step.new_places(), CODE_STEP[index_format]
    )
    scores = Scores(inputs, attributes, expected["indexer_cache_out"])
    lists = [best(*scores.of(token)[:2], 6) for token in range(step.tokens)]
    np.testing.assert_array_equal(lists, expected["indices"])
    check_lists(expected["indices"], scores, 6)


@pytest.mark.parametrize(
    ("top_k", "steps"),
    [
        # of prompts one key takes the path that 40 take, and long: without a GPU it is left to the other steps
        pytest.param(
            top_k, steps, id=f"{top_k}-{name}", marks=() if (top_k, name) == (1, "prompts") else pytest.mark.small
        )
        for top_k in (1, 40, 1000)
        for name, steps in STEPS.items()
    ],
)
@pytest.mark.parametrize("index_format", INDEX_FORMATS)
@pytest.mark.parametrize("heads", [8, 64])
def test_steps(heads: int, index_format: str, top_k: int, steps: tuple[list[int], list[int], int]) -> None:
    rng = np.random.default_rng(2)
    step = make_step(rng, *steps[:2], page_size=P, padding=steps[2])
    attributes = attributes_of(index_format, top_k=top_k)
    check(case(rng, step, attributes, heads), attributes, repeat=3)


@pytest.mark.parametrize("new", [[1, 5, 2], [1, 1, 1]], ids=["several", "one each"])
@pytest.mark.parametrize("heads", [1, 2, 8, 15, 16, 17, 32, 64, 96, 128, 192, 300])
@pytest.mark.parametrize("index_format", INDEX_FORMATS)
def test_heads(index_format: str, heads: int, new: list[int]) -> None:
    rng = np.random.default_rng(3)
    step = make_step(rng, new, [700, 333, 64], page_size=P)
    attributes = attributes_of(index_format)
    check(case(rng, step, attributes, heads), attributes)
    check(case(rng, step, attributes, heads, exact=False), attributes, exact=False)


@pytest.mark.parametrize("size", [1, 8, 16, 20, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("index_format", INDEX_FORMATS)
def test_head_sizes(index_format: str, size: int) -> None:
    rng = np.random.default_rng(4)
    step = make_step(rng, [1, 6, 2], [400, 777, 0], page_size=P, padding=1)
    attributes = attributes_of(index_format, size)
    for heads in (4, 64):
        check(case(rng, step, attributes, heads), attributes)
    check(case(rng, step, attributes, 20, exact=False), attributes, exact=False)
    one_each = make_step(rng, [1, 0, 1], [400, 5, 700], page_size=P, padding=1)
    for heads in (32, 64):
        check(case(rng, one_each, attributes, heads), attributes)


def test_more_heads_than_shared_memory_holds() -> None:
    rng = np.random.default_rng(5)
    step = make_step(rng, [1, 3], [400, 300], page_size=P)
    attributes = attributes_of(size=256)
    check(case(rng, step, attributes, 1000), attributes)


@pytest.mark.parametrize("page_size", [1, 2, 7, 16, 100, 128, 256])
@pytest.mark.parametrize("index_format", INDEX_FORMATS)
def test_page_sizes(index_format: str, page_size: int) -> None:
    rng = np.random.default_rng(6)
    lengths = [0, 1, page_size - 1, page_size, page_size + 1, 600]
    step = make_step(rng, [1, 2, 1, 1, 1, 4], lengths, page_size=page_size)
    attributes = attributes_of(index_format, page_size=page_size)
    for heads in (8, 64):
        check(case(rng, step, attributes, heads), attributes)


@pytest.mark.parametrize("size", [16, 24, 128])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("rope", ["part", "all"])
@pytest.mark.parametrize("index_format", INDEX_FORMATS)
def test_rope(index_format: str, rope: str, interleaved: int, size: int) -> None:
    rng = np.random.default_rng(7)
    step = make_step(rng, [5, 3, 1], [40, 90, 200], page_size=P)
    rope_dim = size // 2 if rope == "part" else size
    attributes = attributes_of(index_format, size, index_rope_dim=rope_dim, index_rope_interleaved=interleaved)
    inputs = case(rng, step, attributes, exact=False)
    check(inputs, attributes, exact=False)
    inputs["rope_rows"] = np.array([4, 0, 2, 99, -5, 2**31 - 1, -(2**31), 1, 8], np.int32)
    check(inputs, attributes, exact=False)


@pytest.mark.small
@pytest.mark.parametrize("size", [24, 128, 256])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("kind", TABLES)
def test_tables_as_models_have_them(kind: str, interleaved: int, size: int) -> None:
    rng = np.random.default_rng(27)
    step = make_step(rng, [3, 1], [90, 40], page_size=P)
    attributes = attributes_of("fp8", size, index_rope_dim=size // 4 * 2, index_rope_interleaved=interleaved, top_k=7)
    given, plain = with_tables(rng, case(rng, step, attributes, exact=False), kind, "index_")
    expected = check(plain, attributes, exact=False)
    for name, found in run_op(OP, given, **attributes).items():
        compare_exactly(name, found, expected[name])


@pytest.mark.parametrize("ue8m0", [0, 1])
@pytest.mark.parametrize("size", [1, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("index_format", INDEX_FORMATS)
def test_hadamard(index_format: str, size: int, ue8m0: int) -> None:
    rng = np.random.default_rng(8)
    step = make_step(rng, [5, 3, 1], [40, 90, 200], page_size=P)
    attributes = attributes_of(
        index_format, size, index_hadamard=1, index_scale_ue8m0=ue8m0, index_rope_dim=size // 4 * 2
    )
    check(case(rng, step, attributes, exact=False), attributes, exact=False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [24, 128, 256])
@pytest.mark.parametrize("index_format", INDEX_FORMATS)
def test_norm(index_format: str, size: int, bias: bool) -> None:
    rng = np.random.default_rng(9)
    step = make_step(rng, [30, 3, 1], [40, 90, 200], page_size=P, padding=2)
    attributes = attributes_of(index_format, size, index_norm_epsilon=1e-3, index_rope_dim=8)
    inputs = case(rng, step, attributes, exact=False)
    inputs["index_norm_weight"] = rng.uniform(0.5, 1.5, size).astype(np.float32)
    if bias:
        inputs["index_norm_bias"] = normal(rng, size)
    check(inputs, attributes, exact=False, normed=step)


@pytest.mark.parametrize("ue8m0", [0, 1])
def test_scales(ue8m0: int) -> None:
    rng = np.random.default_rng(10)
    step = make_step(rng, [64], [0], page_size=P)
    attributes = attributes_of(top_k=5, index_scale_ue8m0=ue8m0)
    inputs = case(rng, step, attributes, exact=False)
    inputs["index_key"] *= np.float32(2) ** np.arange(-40, 24)[:, None].astype(np.float32)
    inputs["index_key"][3] = 0
    inputs["index_query"][5] = 0
    check(inputs, attributes, exact=False)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("index_format", INDEX_FORMATS)
def test_16_bit_inputs(index_format: str, dtype: str) -> None:
    rng = np.random.default_rng(11)
    step = make_step(rng, [3, 1], [4, 290], page_size=P)
    attributes = attributes_of(index_format, index_rope_dim=64)
    inputs = case(rng, step, attributes, exact=False)
    inputs["index_norm_weight"], inputs["index_norm_bias"] = normal(rng, 128), normal(rng, 128)
    for name in ("index_query", "index_key", "index_norm_weight", "index_norm_bias"):
        inputs[name] = inputs[name].astype(HALF_TYPES[dtype])
    check(inputs, attributes, exact=False, normed=step)


@pytest.mark.parametrize("index_format", INDEX_FORMATS)
@pytest.mark.parametrize("top_k", [1, 100, 2048, 4096, 5000])
def test_long_sequences(top_k: int, index_format: str) -> None:
    rng = np.random.default_rng(12)
    step = make_step(rng, [1, 2, 1, 1], [20000, 4095, top_k - 1, top_k], page_size=P)
    attributes = attributes_of(index_format, top_k=top_k)
    check(case(rng, step, attributes, 64), attributes, repeat=2)
    check(case(rng, step, attributes, 64, exact=False), attributes, exact=False)


def test_131072_keys() -> None:
    rng = np.random.default_rng(13)
    step = make_step(rng, [1, 1], [131071, 77], page_size=P)
    attributes = attributes_of(top_k=2048)
    check(case(rng, step, attributes, 64, exact=False), attributes, exact=False, repeat=2)


@pytest.mark.parametrize("heads", [2, 64])
def test_many_tokens_with_many_keys(heads: int) -> None:
    """More tokens than half of the multiprocessors: a block has all keys of a token."""
    rng = np.random.default_rng(22)
    step = make_step(rng, [70], [40000], page_size=P)
    attributes = attributes_of(size=64, top_k=700)
    check(case(rng, step, attributes, heads), attributes, repeat=2)


@pytest.mark.parametrize("index_format", INDEX_FORMATS)
@pytest.mark.parametrize("tokens", [1, 70])
def test_lists_that_do_not_fit_into_shared_memory(tokens: int, index_format: str) -> None:
    rng = np.random.default_rng(23)
    step = make_step(rng, [tokens], [61000], page_size=P)
    attributes = attributes_of(index_format, 16, top_k=60000)
    check(case(rng, step, attributes, heads=2), attributes)


def test_one_key_far_above_all_others() -> None:
    rng = np.random.default_rng(24)
    step = make_step(rng, [1, 1], [9000, 300], page_size=P)
    attributes = attributes_of(top_k=100)
    inputs = case(rng, step, attributes, 64)
    layout = layout_of(attributes)
    inputs["index_weights"] = np.abs(inputs["index_weights"])
    far = 2.0**30 * np.abs(inputs["index_query"][0]).max(axis=0, keepdims=True)
    layout.write(inputs["indexer_cache"], *step.places(0, [4567]), far.astype(np.float32))
    check(inputs, attributes)


@pytest.mark.parametrize("index_format", INDEX_FORMATS)
@pytest.mark.parametrize("weight", [1.0, -1.0, 0.0])
def test_ties_go_to_the_smaller_index(weight: float, index_format: str) -> None:
    rng = np.random.default_rng(14)
    step = make_step(rng, [1, 3], [9000, 300], page_size=P)
    layout = layout_of(attributes_of(index_format))
    inputs = case(rng, step, attributes_of(index_format), heads=2)
    for sequence, length in enumerate((9000, 300)):
        keys = np.zeros((length, 128), np.float32)
        keys[:, 0] = 7
        keys[:, 1] = rng.integers(-2, 3, length)  # five different scores, and with relu three
        layout.write(inputs["indexer_cache"], *step.places(sequence, range(length)), keys)
    inputs["index_query"][:] = 0
    inputs["index_query"][:, :, 1] = 7
    inputs["index_weights"][:] = weight
    for top_k in (1, 7, 299, 2048, 5000):
        attributes = attributes_of(index_format, top_k=top_k)
        check(inputs, attributes)


@pytest.mark.parametrize("index_format", INDEX_FORMATS)
@pytest.mark.parametrize("top_k", [20, 5000])
@pytest.mark.parametrize("heads", [8, 64])
def test_keys_on_pages_outside_the_pool_are_not_visible(heads: int, top_k: int, index_format: str) -> None:
    rng = np.random.default_rng(15)
    step = make_step(rng, [1, 1, 2, 1], [900, 40, 200, 2000], page_size=16)
    attributes = attributes_of(index_format, top_k=top_k, page_size=16)
    inputs = case(rng, step, attributes, heads)
    table = step.inputs["block_table"]
    table[0, 1::3] = np.resize(np.array((-1, step.pages, 2**31 - 1, -(2**31)), np.int32), table[0, 1::3].shape)
    table[1] = -7
    table[2, -1] = table[2, 0] = -1
    table[3, :60] = -1
    check(inputs, attributes)
    check(behind_a_page_of_nan(inputs, "indexer_cache"), attributes)


HEIGHTS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "random": lambda rng, count: rng.permutation(count) + 1.0,
    "ascending": lambda rng, count: np.arange(count) + 1.0,
    "descending": lambda rng, count: np.arange(count, 0, -1.0),
    "far above in the last tenth": lambda rng, count: (
        rng.permutation(count) + 1.0 + 1e5 * (np.arange(count) > 0.9 * count)
    ),
    "one far above": lambda rng, count: np.where(np.arange(count) == count // 3, 2.0**20, rng.permutation(count) + 1.0),
    "next to each other": lambda rng, count: 2.0**20 + 16.0 * rng.permutation(count),
    "few values": lambda rng, count: rng.integers(1, 5, count).astype(np.float64),
    "equal": lambda rng, count: np.ones(count),
    "equal but for one": lambda rng, count: np.where(np.arange(count) == count - 5, 2.0, 1.0),
}


def heights_of(
    kind: str, sign: float, lengths: list[int], top_k: int, size: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A step of one token for each sequence: all heads have one query, and all keys are multiples of it, so that scores are those of
    the keys' scales and lists are exact."""
    rng = np.random.default_rng(25)
    step = make_step(rng, [1] * len(lengths), lengths, page_size=P)
    attributes = attributes_of(size=size, top_k=top_k)
    inputs = case(rng, step, attributes, 64 if size == 128 else 32)
    layout = layout_of(attributes)
    inputs["index_query"][:] = 7
    inputs["index_weights"][:] = sign
    for sequence, length in enumerate(lengths):
        heights = HEIGHTS[kind](rng, length)[:, None] * np.ones(size)
        layout.write(inputs["indexer_cache"], *step.places(sequence, range(length)), heights.astype(np.float32))
    return inputs, attributes


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("kind", list(HEIGHTS))
def test_scores_however_they_lie(kind: str, sign: float) -> None:
    """In any order, far from each other, next to each other, equal: what a sample of them says may be of no use."""
    for lengths, top_k in (
        ([6400], 65),
        ([3000, 0, 4100, 2049, 63, 2500], 64),
        ([5500, 9000], 1),
        ([2500, 2500, 2500], 512),
    ):
        inputs, attributes = heights_of(kind, sign, lengths, top_k, 128 if top_k == 65 else 64)
        check(inputs, attributes, repeat=2)


@pytest.mark.parametrize("kind", list(HEIGHTS))
def test_batches_of_scores_however_they_lie(kind: str) -> None:
    inputs, attributes = heights_of(kind, 1.0, [*np.linspace(9000, 30000, 31).astype(int).tolist(), 100], 2048, 128)
    check(inputs, attributes, repeat=2)
    inputs, attributes = heights_of(kind, 1.0, [20000] * 32, 300, 64)
    check(inputs, attributes, graph=True, repeat=3)


@pytest.mark.parametrize("top_k", [100, 700])
@pytest.mark.parametrize("lengths", [[7000], [20000] * 32])
def test_what_is_no_number_or_no_key_among_many(lengths: list[int], top_k: int) -> None:
    rng = np.random.default_rng(26)
    step = make_step(rng, [1] * len(lengths), lengths, page_size=P)
    attributes = attributes_of(top_k=top_k)
    inputs = case(rng, step, attributes, 64, exact=False)
    layout = layout_of(attributes)
    table = step.inputs["block_table"]
    for sequence in range(len(lengths)):
        table[sequence, rng.permutation(lengths[sequence] // P)[:50]] = (-1, step.pages)[sequence % 2]
    if len(lengths) > 2:
        table[2, 5:] = -1  # fewer keys than a list takes
    check(inputs, attributes, exact=False)
    check(behind_a_page_of_nan(inputs, "indexer_cache"), attributes, exact=False)
    # NaN in most rows: they lose against all numbers
    poisoned = rng.permutation(lengths[0])[: 6 * lengths[0] // 7]
    page, slot = step.places(0, poisoned.tolist())
    there = page >= 0
    inputs["indexer_cache"][page[there], slot[there] * layout.row_words + 3] = -1
    found = run_op(OP, inputs, **attributes)["indices"][0]
    keys = Scores(inputs, attributes, cache_after(inputs, attributes)).of(0)[0]
    numbers = ~np.isin(keys, poisoned)
    count = min(top_k, int(numbers.sum()))
    assert np.isin(found, poisoned).sum() == top_k - count
    assert (np.diff(found) > 0).all()


def test_no_visible_keys_where_the_table_is_too_narrow() -> None:
    rng = np.random.default_rng(16)
    step = make_step(rng, [2, 1], [900, 400], page_size=P)
    attributes = attributes_of(top_k=50)
    inputs = case(rng, step, attributes, 64)
    inputs["block_table"] = np.ascontiguousarray(inputs["block_table"][:, :5])
    check(inputs, attributes)


@pytest.mark.parametrize("index_format", INDEX_FORMATS)
def test_nan_loses(index_format: str) -> None:
    rng = np.random.default_rng(17)
    step = make_step(rng, [1], [2000], page_size=P)
    attributes = attributes_of(index_format, top_k=500)
    inputs = case(rng, step, attributes)
    poisoned = rng.permutation(2000)[:300]
    page, slot = step.places(0, poisoned.tolist())
    layout = layout_of(attributes)
    for one, row in zip(page.tolist(), slot.tolist(), strict=True):
        inputs["indexer_cache"][one, row * layout.row_words + 3] = -1
    found = run_op(OP, inputs, **attributes)["indices"][0]
    assert len(np.intersect1d(found, poisoned)) == 0
    keys, values, _ = Scores(inputs, attributes, cache_after(inputs, attributes)).of(0)
    kept = ~np.isin(keys, poisoned)
    compare_exactly("indices", found, best(keys[kept], values[kept], 500))
    everything = run_op(OP, inputs, **{**attributes, "top_k": 1900})["indices"][0]
    assert len(np.intersect1d(everything, poisoned)) == 1900 - 1701


@pytest.mark.parametrize("index_format", INDEX_FORMATS)
def test_many_windows(index_format: str) -> None:
    rng = np.random.default_rng(18)
    step = make_step(rng, [500, 700, 1, 120], [0, 100, 300, 7], page_size=P, padding=20)
    attributes = attributes_of(index_format, 64, top_k=30)
    check(case(rng, step, attributes, 4), attributes)
    # a table that could hold 300,000 keys: windows of a few tokens
    inputs = case(rng, step, attributes, 4)
    unused = np.full((4, 300000 // P), -1, np.int32)
    inputs["block_table"] = np.concatenate([inputs["block_table"], unused], axis=1)
    check(inputs, attributes)


@pytest.mark.parametrize("in_place", [False, True])
def test_pages_are_copied_first(in_place: bool) -> None:
    rng = np.random.default_rng(19)
    step = make_step(rng, [1, 2], [2 * P, P], page_size=P)
    attributes = attributes_of(top_k=9)
    inputs = case(rng, step, attributes)
    first, second = step.inputs["block_table"][0, :2].tolist()
    free = step.free
    # the second page of sequence 0 gets what the first had, and that what sequence 1 had
    other = int(step.inputs["block_table"][1, 0])
    copies = [[first, second], [other, first], [second, free[0]], [first, step.pages], [-1, free[1]]]
    inputs["page_copies"] = np.array(copies, np.int32)
    check(inputs, attributes, in_place=in_place)


def test_empty_pool() -> None:
    rng = np.random.default_rng(20)
    step = make_step(rng, [2, 3], [0, 100], page_size=P)
    attributes = attributes_of(top_k=3)
    inputs = {**case(rng, step, attributes), "indexer_cache": layout_of(attributes).empty(0)}
    found = run_op(OP, inputs, **attributes)
    compare_exactly("indices", found["indices"], np.full((5, 3), -1, np.int32))


def test_decode_batch_in_a_graph() -> None:
    rng = np.random.default_rng(21)
    lengths = rng.integers(0, 6000, 64).tolist()
    step = make_step(rng, [1] * 64, lengths, page_size=P)
    attributes = attributes_of(top_k=2048, index_rope_dim=64, index_hadamard=1, index_scale_ue8m0=1)
    check(case(rng, step, attributes, 64, exact=False), attributes, exact=False, graph=True, repeat=5)
