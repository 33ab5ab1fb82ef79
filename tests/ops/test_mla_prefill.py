"""MlaPrefill's body against its reference, and against MlaDecoding with the weights absorbed by hand."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from op_harness import Step, assert_close, e4m3_weight, latent_pool, make_step, reference, run_op

from mla_trt.formats import ROW_FORMATS, KvLayout

P = 4
STEPS = {
    "ragged": ([3, 1, 5], [4, 7, 0], 0),
    "page borders": ([P - 1, P, P + 1], [1, 0, P], 0),
    "padding": ([2, 0, 2], [1, 3, 8], 3),
    "no sequence": ([], [], 0),
    "padding only": ([], [], 2),
    "no new tokens": ([0, 0], [5, 6], 2),
}
# H, Dn, Dr, Dv, R
DIMENSIONS = {
    "small": (4, 24, 16, 20, 32),
    "one head": (1, 8, 2, 5, 37),
    "no rope": (2, 16, 0, 16, 24),
    "glm": (2, 192, 64, 256, 512),
}


def _case(
    rng: np.random.Generator, step: Step, row_format: str, dimensions: tuple[int, int, int, int, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    heads, nope, rope, value, rank = dimensions
    layout = KvLayout(page_size=P, row_format=row_format, kv_lora_rank=rank, qk_rope_head_dim=rope, kv_scale=0.01)
    query = rng.standard_normal((step.tokens, heads, nope + rope), np.float32)
    query[step.inputs["token_sequence"] < 0] = np.nan
    inputs = {
        "query": query,
        **step.inputs,
        "kv_cache": latent_pool(rng, layout, step, with_new=True),
        "w_uk": rng.standard_normal((heads, rank, nope), np.float32) / np.float32(rank**0.5),
        "w_uv": rng.standard_normal((heads, value, rank), np.float32) / np.float32(rank**0.5),
    }
    attributes = {
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rope,
        "page_size": P,
        "row_format": row_format,
        "kv_scale": 0.01,
        "softmax_scale": (nope + rope) ** -0.5,
    }
    return inputs, attributes


def _compare(inputs: dict[str, Any], attributes: dict[str, Any], tolerance: float = 1e-5) -> None:
    found, expected = run_op("MlaPrefill", inputs, **attributes), reference("MlaPrefill", inputs, **attributes)
    assert_close(found["output"], expected["output"], tolerance)
    assert_close(found["lse"], expected["lse"])


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_steps(row_format: str, case: tuple[list[int], list[int], int]) -> None:
    rng = np.random.default_rng(1)
    new, cached, padding = case
    step = make_step(rng, new, cached, page_size=P, padding=padding)
    _compare(*_case(rng, step, row_format, DIMENSIONS["small"]))


@pytest.mark.parametrize("dimensions", DIMENSIONS.values(), ids=DIMENSIONS.keys())
@pytest.mark.parametrize("weights", ["f32", "f16", "bf16", "e4m3", "e4m3 without scale"])
def test_weights(weights: str, dimensions: tuple[int, int, int, int, int]) -> None:
    rng = np.random.default_rng(2)
    heads, nope, _, value, rank = dimensions
    inputs, attributes = _case(rng, make_step(rng, [3, 1], [4, 2], page_size=P), "fp8", dimensions)
    if weights == "e4m3":
        inputs["w_uk"], inputs["w_uk_scale"] = e4m3_weight(rng, heads, rank, nope)
        inputs["w_uv"], inputs["w_uv_scale"] = e4m3_weight(rng, heads, value, rank)
    else:
        types = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
        for name in ("w_uk", "w_uv"):
            inputs[name] = inputs[name].astype(types.get(weights, ml_dtypes.float8_e4m3fn))
    _compare(inputs, attributes)


def test_sinks() -> None:
    rng = np.random.default_rng(3)
    inputs, attributes = _case(rng, make_step(rng, [3, 0, 1], [4, 1, 2], page_size=P), "bf16", DIMENSIONS["small"])
    inputs["sinks"] = np.array([0.5, -3, 100, -np.inf], np.float32)
    _compare(inputs, attributes)
    assert (run_op("MlaPrefill", inputs, **attributes)["output"][:, 2] == 0).all()


def test_keys_on_pages_outside_the_pool_are_masked() -> None:
    rng = np.random.default_rng(4)
    step = make_step(rng, [2, 1], [9, 3], page_size=P)
    step.inputs["block_table"][0, 1] = -1
    step.inputs["block_table"][1, 0] = step.pages
    inputs, attributes = _case(rng, step, "fp8", DIMENSIONS["small"])
    _compare(inputs, attributes)
    assert (run_op("MlaPrefill", inputs, **attributes)["output"][2] == 0).all()


def test_f16_queries() -> None:
    rng = np.random.default_rng(5)
    inputs, attributes = _case(rng, make_step(rng, [3, 1], [4, 2], page_size=P), "fp8", DIMENSIONS["small"])
    for name in ("query", "w_uk", "w_uv"):
        inputs[name] = inputs[name].astype(np.float16)
    assert run_op("MlaPrefill", inputs, **attributes)["output"].dtype == np.float16
    _compare(inputs, attributes, 1e-3)


def test_equals_absorbed_decoding() -> None:
    rng = np.random.default_rng(6)
    inputs, attributes = _case(rng, make_step(rng, [3, 1], [4, 2], page_size=P), "fp8_ds_mla", DIMENSIONS["small"])
    found = run_op("MlaPrefill", inputs, **attributes)
    absorbed = np.einsum("thn,hrn->thr", inputs["query"][..., :24], inputs["w_uk"])
    decoding = {name: value for name, value in inputs.items() if not name.startswith("w_")}
    decoding["query"] = np.concatenate([absorbed, inputs["query"][..., 24:]], axis=2)
    decoded = run_op("MlaDecoding", decoding, **attributes)
    assert_close(found["output"], np.einsum("thr,hvr->thv", decoded["output"], inputs["w_uv"]))
    assert_close(found["lse"], decoded["lse"])
