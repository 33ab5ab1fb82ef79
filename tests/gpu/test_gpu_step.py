"""A step as an engine enqueues it: ops one behind the other without a pause, whose kernels begin beside those before."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import DIMENSIONS, layer_case, step_of
from harness import Array, compare_exactly, run_chain, run_op

from mla_trt.ops import OPS

PLANNED = ("token_sequence", "positions", "schedule")
PROJECTED = ("query", "latent", "rope_key")
HIDDEN, QUERY_RANK = 136, 200


def _weight(rng: np.random.Generator, *shape: int) -> Array:
    return (shape[0] ** -0.5 * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)


@pytest.mark.small
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("row_format", ["fp8", "bf16"])
@pytest.mark.parametrize("new", [[1], [1] * 3, [2] * 40, [40, 1]], ids=["one", "three", "eighty", "a prompt"])
@pytest.mark.parametrize("dimensions", ["small", "deepseek of 8 GPUs"])
def test_layers(dimensions: str, new: list[int], row_format: str, layers: int) -> None:
    """Once or twice the same layer, in the same memory: each of its results is what its op alone makes of what there was before, to the bit.
    Once, what comes too early finds nothing; twice, what comes too early spoils what is still read."""
    rng = np.random.default_rng(1)
    step = step_of(rng, new, [70] * len(new))
    arrays, attributes = layer_case(
        rng, step, row_format, DIMENSIONS[dimensions], norm=True, weights="bf16", dtype="bf16"
    )
    heads, width = arrays["query"].shape[1:]
    for name in (*PLANNED, *PROJECTED):
        del arrays[name]
    arrays["tokens"] = np.zeros((1, step.tokens), np.int64)
    arrays["hidden"] = rng.standard_normal((step.tokens, HIDDEN), np.float32).astype(ml_dtypes.bfloat16)
    arrays["w_dq"], arrays["w_uq"] = _weight(rng, HIDDEN, QUERY_RANK), _weight(rng, QUERY_RANK, heads, width)
    arrays["w_dkv"] = _weight(rng, HIDDEN, attributes["kv_lora_rank"])
    arrays["w_kr"] = _weight(rng, HIDDEN, attributes["qk_rope_head_dim"])
    arrays["query_norm_weight"] = rng.uniform(0.5, 1.5, QUERY_RANK).astype(ml_dtypes.bfloat16)
    layer: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        ("MlaInputProjections", PROJECTED, {}),
        ("MlaAttention", ("output", "kv_cache_out"), attributes),
    ]
    plan: tuple[str, tuple[str, ...], dict[str, Any]] = (
        "MlaPlan",
        PLANNED,
        {"page_size": step.page_size, "num_partitions": 128},
    )
    found = run_chain(arrays, [plan, *layers * layer])

    known = dict(arrays)
    for op_type, outputs, given in (plan, *layer):
        inputs = {formal.name: known[formal.name] for formal in OPS[op_type].inputs if formal.name in known}
        alone = run_op(op_type, inputs, outputs, **given)
        for name in outputs:
            compare_exactly(name, found[name], alone[name])
            known[name] = alone[name].astype(ml_dtypes.bfloat16) if name in PROJECTED else alone[name]
    assert np.isfinite(known["output"]).all()  # no kernel, no numbers
