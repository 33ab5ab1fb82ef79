"""How MlaDecodeBranchFp8 is compared on the GPU, on the CPU: right arithmetic passes, small mistakes do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from cases import DIMENSIONS, branch_case, compare_branch, saturating, step_of
from harness import Array
from large_reference import append, attention, branch_output, branch_query, projected, to_bf16
from op_harness import assert_close, reference

from mla_trt.formats import E4M3_MAX, decode_e4m3, encode_e4m3
from mla_trt.ops.decode_branch_fp8 import _quantized_reference

pytestmark = pytest.mark.cpu


@dataclass(frozen=True)
class Machine:
    """MlaDecodeBranchFp8 as the kernels compute it: f32 sums of ``chunk`` terms, each scaled, and bf16 between the parts.

    The other attributes are mistakes, which are not made by default.
    """

    chunk: int = 64
    group: int = 128
    bound: float = 1200.0
    query_gain: float = 1.0
    softmax_gain: float = 1.0
    rope_gain: float = 1.0
    last_head_gain: float = 1.0
    last_latent_gain: float = 1.0
    sink_shift: float = 0.0
    skipped_columns: int = 0
    codes: Callable[[Array], Array] = encode_e4m3
    query_rounded: Callable[[Array], Array] = to_bf16
    latent_rounded: Callable[[Array], Array] = to_bf16

    def run(self, inputs: Mapping[str, Array], attributes: Mapping[str, Any]) -> dict[str, Array]:
        """The op's outputs."""
        rank = attributes["kv_lora_rank"]
        nope, rope = np.split(inputs["query"], [inputs["query"].shape[2] - attributes["qk_rope_head_dim"]], axis=2)
        appended = append({**inputs, "query_rope": rope}, attributes, query_type=np.float32)
        absorbed = self.product(nope.astype(np.float32), inputs["w_uk"], inputs["w_uk_scale"]) * self.query_gain
        rotated = appended["query_rope_out"] * self.rope_gain
        query = np.concatenate([self.query_rounded(absorbed), self.query_rounded(rotated)], axis=2)
        given = {**inputs, "kv_cache": appended["kv_cache_out"]}
        if "sinks" in inputs:
            given["sinks"] = inputs["sinks"] + self.sink_shift
        softmax_scale = attributes["softmax_scale"] * self.softmax_gain
        latent = attention(given, {**attributes, "softmax_scale": softmax_scale}, query)["output"]
        latent = self.latent_rounded(latent * np.where(np.arange(rank) == rank - 1, self.last_latent_gain, 1.0))
        output = self.product(latent.astype(np.float32), inputs["w_uv"], inputs["w_uv_scale"])
        output[:, -1] *= self.last_head_gain
        return {"output": output.astype(inputs["query"].dtype), "kv_cache_out": appended["kv_cache_out"]}

    def product(self, values: Array, weight: Array, weight_scale: Array) -> Array:
        """``values`` ``[T, H, n]`` as codes times ``[H, m, n]``."""
        tokens, heads, width = values.shape
        rows = weight.shape[1]
        product = np.zeros((tokens, heads, rows), np.float32)
        for columns, codes, scale in self._groups(values):
            blocks = weight_scale[:, np.arange(rows) // 128, columns.start // 128]
            for start in range(columns.start, columns.stop, self.chunk):
                part = slice(start, min(start + self.chunk, columns.stop, width - self.skipped_columns))
                sums = np.einsum(
                    "thn,hrn->thr",
                    codes[:, :, part.start - columns.start : part.stop - columns.start],
                    weight[:, :, part].astype(np.float32),
                )
                product += scale * blocks * sums
        return product

    def _groups(self, values: Array) -> Iterator[tuple[slice, Array, Array]]:
        """Columns of each group, their codes' values and its scale ``[T, H, 1]``."""
        for start in range(0, values.shape[2], self.group):
            columns = slice(start, min(start + self.group, values.shape[2]))
            group = values[..., columns]
            amax = np.abs(group).max(axis=2, keepdims=True, initial=0)
            scale = np.minimum(amax, np.float32(self.bound)) / np.float32(E4M3_MAX)
            yield columns, decode_e4m3(self.codes(group / np.where(scale > 0, scale, np.float32(1)))), scale


def _attend(inputs: Mapping[str, Array], attributes: Mapping[str, Any]) -> dict[str, Array]:
    return {"output": to_bf16(attention(inputs, attributes)["output"])}


def _towards_zero(values: Array) -> Array:
    return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _case(size: str, new: list[int], cached: list[int], dtype: str = "f32", padding: int = 0) -> Any:
    rng = np.random.default_rng(1)
    return branch_case(rng, step_of(rng, new, cached, padding=padding), DIMENSIONS[size], dtype)


@pytest.mark.parametrize("size", ["small", "one head", "no rope", "minicpm3", "deepseek of 8 GPUs", "glm"])
def test_without_rounding_the_parts_make_the_op(size: str) -> None:
    inputs, attributes = _case(size, [2, 1], [9, 3], padding=1)
    inputs["sinks"] = np.linspace(-1, 1, inputs["query"].shape[1]).astype(np.float32)
    expected = reference("MlaDecodeBranchFp8", inputs, **attributes)
    query = branch_query(inputs, attributes, rounded=np.asarray)
    latent = attention({**inputs, "kv_cache": expected["kv_cache_out"]}, attributes, query)["output"]
    assert_close(branch_output(inputs, latent)[0], expected["output"], 1e-5)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("size", ["small", "one head", "no rope", "minicpm3", "deepseek of 8 GPUs", "glm"])
def test_sums_in_f32_pass(size: str, dtype: str) -> None:
    inputs, attributes = _case(size, [1, 2], [70, 3], dtype, padding=1)
    compare_branch(Machine().run(inputs, attributes), inputs, attributes, _attend)


def test_no_tokens_pass() -> None:
    inputs, attributes = _case("small", [0, 0], [5, 6])
    compare_branch(Machine().run(inputs, attributes), inputs, attributes, _attend)


MISTAKES = {
    "W_UK": {"query_gain": 1.01},
    "W_UV of one head": {"last_head_gain": 1.01},
    "one column of the latent": {"last_latent_gain": 1.02},
    "softmax scale": {"softmax_gain": 1.01},
    "sinks": {"sink_shift": 0.02},
    "rope": {"rope_gain": 1.01},
    "last column": {"skipped_columns": 1},
    "saturation": {"bound": 1212.0},
    "groups": {"group": 16},
    "codes cut off": {"codes": lambda values: encode_e4m3(values * (1 - 2**-4))},
    "query cut off": {"query_rounded": _towards_zero},
    "latent cut off": {"latent_rounded": _towards_zero},
    "query not rounded": {"query_rounded": np.asarray},
    "latent not rounded": {"latent_rounded": np.asarray},
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
@pytest.mark.parametrize("size", ["small", "deepseek of 8 GPUs"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_small_mistakes_are_seen(dtype: str, size: str, mistake: dict[str, Any]) -> None:
    inputs, attributes = _case(size, [1, 2, 1], [70, 3, 200], dtype)
    inputs["sinks"] = np.full(inputs["query"].shape[1], 0.5, np.float32)
    if "bound" in mistake:
        inputs, attributes = saturating(inputs, attributes)
    compare_branch(Machine().run(inputs, attributes), inputs, attributes, _attend)
    with pytest.raises(AssertionError, match="output"):
        compare_branch(replace(Machine(), **mistake).run(inputs, attributes), inputs, attributes, _attend)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("size", DIMENSIONS)
def test_the_query_is_the_same_in_any_order_of_sums(size: str, dtype: str) -> None:
    inputs, attributes = _case(size, [1, 2], [70, 3], dtype)
    nope = inputs["query"][..., : inputs["query"].shape[2] - attributes["qk_rope_head_dim"]].astype(np.float32)
    expected = branch_query(inputs, attributes)[..., : attributes["kv_lora_rank"]]
    for chunk in (16, 64, 128):
        found = Machine(chunk=chunk).product(nope, inputs["w_uk"], inputs["w_uk_scale"])
        np.testing.assert_array_equal(to_bf16(found), expected)
    np.testing.assert_array_equal(
        found, projected(_quantized_reference(nope.astype(np.float64)), inputs["w_uk"], inputs["w_uk_scale"])
    )
