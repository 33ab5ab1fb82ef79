"""MlaPrefill's kernels against the float64 reference of large_reference.py, and of a long prompt some rows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from harness import Array, compare, compare_exactly, run_op
from large_reference import prefill
from op_harness import Step, behind_a_page_of_nan, e4m3_weight, latent_pool, make_step

from mla_trt.formats import ROW_FORMATS, KvLayout

PRECISE = 3e-6  # f32 on plain cores
PRODUCTS = 1.5e-2  # of bf16 queries, keys, weights and values, relative to the largest output
LSE = 5e-3  # of the largest, 4 at least: scores are sums of such products

# H, Dn, Dr, Dv, R
SMALL = (3, 24, 16, 20, 32)
DIMENSIONS = {
    "small": SMALL,
    "one head, odd sizes": (1, 7, 2, 5, 37),
    "no rope": (2, 16, 0, 16, 24),
    "deepseek": (2, 128, 64, 128, 512),
    "deepseek, latent of 500": (2, 128, 64, 128, 500),
    "glm": (2, 192, 64, 256, 512),
    "minicpm": (5, 64, 32, 64, 256),
    "wide values": (2, 40, 8, 272, 96),
    "wide keys": (1, 100, 1500, 12, 48),
    "many heads": (128, 16, 8, 16, 32),
}

KERNELS = ["small", "deepseek"]  # dimensions of those that every architecture has, and of Hopper's

# new tokens, cached tokens, padding
STEPS = {
    "one token": ([1], [0], 0),
    "one token, long prefix": ([1], [1000], 0),
    "tile of queries": ([128], [0], 0),
    "a token more than a tile": ([129], [63], 0),
    "prefix one tile": ([65], [64], 0),
    "prefix a tile and a token": ([64], [65], 0),
    "ragged": ([9, 300, 1, 64, 65], [0, 1, 63, 64, 65], 0),
    "ragged, padding": ([3, 0, 70, 0], [65, 7, 1000, 0], 5),
    "no sequence": ([], [], 0),
    "padding only": ([], [], 3),
    "no new tokens": ([0, 0], [5, 6], 2),
}


def _case(
    rng: np.random.Generator,
    step: Step,
    row_format: str,
    dimensions: tuple[int, int, int, int, int] = SMALL,
    dtype: Any = np.float32,
) -> tuple[dict[str, Any], dict[str, Any]]:
    heads, nope, rope, value, rank = dimensions
    layout = KvLayout(step.page_size, row_format, rank, rope, 0.01)
    query = rng.standard_normal((step.tokens, heads, nope + rope), np.float32)
    query[step.inputs["token_sequence"] < 0] = np.nan
    inputs = {
        "query": query.astype(dtype),
        **step.inputs,
        "kv_cache": latent_pool(rng, layout, step, with_new=True),
        "w_uk": (rng.standard_normal((heads, rank, nope), np.float32) / np.float32(rank**0.5)).astype(dtype),
        "w_uv": (rng.standard_normal((heads, value, rank), np.float32) / np.float32(rank**0.5)).astype(dtype),
    }
    attributes = {
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rope,
        "page_size": step.page_size,
        "row_format": row_format,
        "kv_scale": 0.01,
        "softmax_scale": (nope + rope) ** -0.5,
    }
    return inputs, attributes


def _compare(inputs: dict[str, Any], attributes: dict[str, Any]) -> dict[str, Array]:
    found, expected = run_op("MlaPrefill", inputs, **attributes), prefill(inputs, attributes)
    precise = attributes["row_format"] == "f32" and inputs["query"].dtype == np.float32
    compare("output", found["output"], expected["output"], PRECISE if precise else PRODUCTS)
    finite = np.abs(expected["lse"][np.isfinite(expected["lse"])])
    tolerance = max(4.0, float(finite.max(initial=0.0))) * (PRECISE if precise else LSE)
    compare("lse", found["lse"], expected["lse"], tolerance, absolute=True)
    padding = inputs["token_sequence"] < 0
    assert (found["output"][padding] == 0).all()
    return found


@pytest.mark.small
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("row_format", ROW_FORMATS)
@pytest.mark.parametrize("dimensions", KERNELS)
def test_steps(dimensions: str, row_format: str, case: tuple[list[int], list[int], int]) -> None:
    rng = np.random.default_rng(1)
    new, cached, padding = case
    inputs, attributes = _case(
        rng, make_step(rng, new, cached, page_size=64, padding=padding), row_format, DIMENSIONS[dimensions]
    )
    _compare(inputs, attributes)


@pytest.mark.small
@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
def test_page_sizes(page_size: int) -> None:
    rng = np.random.default_rng(2)
    _compare(*_case(rng, make_step(rng, [70, 5], [3, 200], page_size=page_size), "fp8"))


@pytest.mark.small
@pytest.mark.parametrize("dimensions", DIMENSIONS.values(), ids=DIMENSIONS.keys())
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_dimensions(row_format: str, dimensions: tuple[int, int, int, int, int]) -> None:
    rng = np.random.default_rng(3)
    new = [40, 3] if dimensions[0] < 10 else [5, 1]
    _compare(*_case(rng, make_step(rng, new, [70, 0], page_size=16), row_format, dimensions))


@pytest.mark.small
@pytest.mark.parametrize("dimensions", ["small", "deepseek", "deepseek, latent of 500", "glm"])
@pytest.mark.parametrize("weights", ["f32", "f16", "bf16", "e4m3", "e4m3 without scale"])
@pytest.mark.parametrize("row_format", ["f32", "fp8"])
def test_weights(row_format: str, weights: str, dimensions: str) -> None:
    rng = np.random.default_rng(4)
    heads, nope, _, value, rank = DIMENSIONS[dimensions]
    inputs, attributes = _case(rng, make_step(rng, [20, 1], [50, 2]), row_format, DIMENSIONS[dimensions])
    if weights == "e4m3":
        inputs["w_uk"], inputs["w_uk_scale"] = e4m3_weight(rng, heads, rank, nope)
        inputs["w_uk_scale"] *= np.float32(6 * rank**-0.5)  # scores of a few units
        inputs["w_uv"], inputs["w_uv_scale"] = e4m3_weight(rng, heads, value, rank)
    else:
        types = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
        for name in ("w_uk", "w_uv"):
            inputs[name] = inputs[name].astype(types.get(weights, ml_dtypes.float8_e4m3fn))
    _compare(inputs, attributes)


@pytest.mark.small
@pytest.mark.parametrize("dimensions", ["small", "one head, odd sizes", "deepseek"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("row_format", ["f32", "bf16"])
def test_types(row_format: str, dtype: Any, dimensions: str) -> None:
    rng = np.random.default_rng(5)
    _compare(*_case(rng, make_step(rng, [66, 1], [30, 2]), row_format, DIMENSIONS[dimensions], dtype))


@pytest.mark.small
@pytest.mark.parametrize("row_format", ["f32", "fp8"])
@pytest.mark.parametrize("dimensions", [SMALL, DIMENSIONS["deepseek"]], ids=KERNELS)
def test_sinks(dimensions: tuple[int, ...], row_format: str) -> None:
    rng = np.random.default_rng(6)
    inputs, attributes = _case(rng, make_step(rng, [70, 0, 1], [4, 1, 2]), row_format, (5, *dimensions[1:]))
    inputs["sinks"] = np.array([0.5, -3, 100, -np.inf, 1e4], np.float32)
    found = _compare(inputs, attributes)
    assert (np.abs(found["output"][:, 2]) < 1e-20).all()
    assert (found["output"][:, 4] == 0).all()
    np.testing.assert_array_equal(
        found["lse"], run_op("MlaPrefill", {k: v for k, v in inputs.items() if k != "sinks"}, **attributes)["lse"]
    )


@pytest.mark.small
@pytest.mark.parametrize("row_format", ROW_FORMATS)
@pytest.mark.parametrize("dimensions", KERNELS)
def test_keys_on_pages_outside_the_pool_are_masked(dimensions: str, row_format: str) -> None:
    rng = np.random.default_rng(7)
    step = make_step(rng, [70, 1, 3], [9, 3, 130], page_size=16)
    table = step.inputs["block_table"]
    table[0, 1], table[0, 4], table[1, 0], table[2, 7] = -1, step.pages, 2**31 - 1, -(2**31)
    inputs, attributes = _case(rng, step, row_format, DIMENSIONS[dimensions])
    found = _compare(inputs, attributes)
    assert (found["output"][70] == 0).all()
    assert (found["lse"][70] == -np.inf).all()
    poisoned = run_op("MlaPrefill", behind_a_page_of_nan(inputs, "kv_cache"), **attributes)
    compare_exactly("output beside a page of NaN", poisoned["output"], found["output"])


@pytest.mark.small
@pytest.mark.parametrize("row_format", ["f32", "bf16"])
@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
@pytest.mark.parametrize("dimensions", KERNELS)
def test_softmax_scales(dimensions: str, row_format: str, scale: float) -> None:
    rng = np.random.default_rng(8)
    inputs, attributes = _case(rng, make_step(rng, [70], [4]), row_format, DIMENSIONS[dimensions])
    attributes["softmax_scale"] = scale
    expected = prefill(inputs, attributes)
    found = run_op("MlaPrefill", inputs, **attributes)
    compare("output", found["output"], expected["output"], 10 * PRECISE if row_format == "f32" else 5 * PRODUCTS)


@pytest.mark.small
@pytest.mark.parametrize("levels", ["none", "rising", "rising slowly", "rising once", "falling"])
@pytest.mark.parametrize("hidden", [0, 3, 7])
@pytest.mark.parametrize("dimensions", KERNELS)
def test_references(dimensions: str, hidden: int, levels: str) -> None:
    """Kernels take powers of scores less a reference of the row: it must rise where scores do, and be there where the first keys are not.
    A level is 1.2 nats, for two of three queries."""
    rng = np.random.default_rng(14)
    step = make_step(rng, [200], [700], page_size=64)
    inputs, attributes = _case(rng, step, "bf16", DIMENSIONS[dimensions], ml_dtypes.bfloat16)
    _, nope, rope_size, _, rank = DIMENSIONS[dimensions]
    inputs["query"][:, :, nope] = np.where(np.arange(200) % 3 == 0, 0, 1.2 / attributes["softmax_scale"])[:, None]
    tile = np.arange(900) // 128
    level = {
        "none": 0,
        "rising": 20 * tile,
        "rising slowly": 7 * tile,
        "rising once": 30 * (tile == 4),
        "falling": 140 - 20 * tile,
    }
    layout, places = KvLayout(64, "bf16", rank, rope_size, 0.01), step.places(0, range(900))
    latent, rope = layout.read(inputs["kv_cache"], *places)
    rope[:, 0] = level[levels]
    layout.write(inputs["kv_cache"], *places, latent, rope)
    inputs["block_table"][0, :hidden] = -1
    _compare(inputs, attributes)


@pytest.mark.small
@pytest.mark.parametrize("row_format", ["f32", "bf16"])
@pytest.mark.parametrize("dimensions", KERNELS)
def test_no_pages(dimensions: str, row_format: str) -> None:
    rng = np.random.default_rng(9)
    inputs, attributes = _case(rng, make_step(rng, [2, 1], [3, 0]), row_format, DIMENSIONS[dimensions])
    inputs["block_table"] = inputs["block_table"][:, :0]
    found = run_op("MlaPrefill", inputs, **attributes)
    assert (found["output"] == 0).all()
    assert (found["lse"] == -np.inf).all()


@pytest.mark.small
@pytest.mark.parametrize("row_format", ["f32", "fp8"])
@pytest.mark.parametrize("dimensions", KERNELS)
def test_garbage_lengths_are_survived(dimensions: str, row_format: str) -> None:
    rng = np.random.default_rng(10)
    inputs, attributes = _case(rng, make_step(rng, [40, 3], [70, 5]), row_format, DIMENSIONS[dimensions])
    for name in ("query_offsets", "cache_lengths", "token_sequence", "positions", "block_table"):
        inputs[name] = rng.integers(-(2**31), 2**31, inputs[name].shape).astype(np.int32)
    run_op("MlaPrefill", inputs, **attributes)
    _compare(*_case(rng, make_step(rng, [40, 3], [70, 5]), row_format, DIMENSIONS[dimensions]))


def _vectorised(
    inputs: dict[str, Any], attributes: dict[str, Any], latent: Array, rope: Array, cached: int, rows: Array
) -> Array:
    """Output of some rows of one sequence in f64, head by head."""
    query = inputs["query"][rows].astype(np.float64)
    nope = inputs["w_uk"].shape[2]
    output = np.zeros((len(rows), query.shape[1], inputs["w_uv"].shape[1]))
    hidden = np.arange(len(latent))[None] > cached + rows[:, None]
    for head in range(query.shape[1]):
        keys = latent @ inputs["w_uk"][head].astype(np.float64)
        scores = query[:, head, :nope] @ keys.T + query[:, head, nope:] @ rope.T
        scores = np.where(hidden, -np.inf, scores * attributes["softmax_scale"])
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        values = latent @ inputs["w_uv"][head].astype(np.float64).T
        output[:, head] = weights @ values / weights.sum(axis=1, keepdims=True)
    return output


@pytest.mark.parametrize(
    ("heads", "new", "cached"), [(4, 8192, 0), (2, 1000, 40000), (64, 2100, 30000), (128, 5000, 0)]
)
def test_long_prompts(heads: int, new: int, cached: int) -> None:
    """Keys of several chunks, so that units keep their state in between; 64 heads are two groups. Of 128 heads one chunk's are more than
    there is room for at once."""
    rng = np.random.default_rng(11)
    step = make_step(rng, [new], [cached], page_size=64)
    inputs, attributes = _case(rng, step, "fp8", (heads, 128, 64, 128, 512), ml_dtypes.bfloat16)
    layout = KvLayout(64, "fp8", 512, 64, 0.01)
    latent, rope = layout.read(inputs["kv_cache"], *step.places(0, range(new + cached)))
    rows = np.unique(np.concatenate([[0, 1, 127, 128, new - 1], rng.integers(0, new, 20)]))
    found = run_op("MlaPrefill", inputs, **attributes)["output"]
    expected = _vectorised(inputs, attributes, latent.astype(np.float64), rope.astype(np.float64), cached, rows)
    compare("output", found[rows], expected, PRODUCTS)


@pytest.mark.parametrize(
    ("heads", "new", "cached"), [(128, 300, 0), (128, 5000, 0), (64, 2100, 3000), (4, 1000, 40000)]
)
def test_runs_are_bitwise_equal(heads: int, new: int, cached: int) -> None:
    rng = np.random.default_rng(12)
    step = make_step(rng, [new], [cached], page_size=64)
    inputs, attributes = _case(rng, step, "fp8", (heads, 128, 64, 128, 512), ml_dtypes.bfloat16)
    found = run_op("MlaPrefill", inputs, repeat=30, **attributes)
    assert np.isfinite(found["output"].astype(np.float32)).all()  # all of it was written
