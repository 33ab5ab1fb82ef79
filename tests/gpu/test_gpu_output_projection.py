"""MlaOutputProjection on the GPU: weights of every type, few tokens and many, sizes that are multiples of nothing."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import pytest
from cases import HALF_TYPES
from harness import Array, compare, library, run_op
from onnx import TensorProto

from mla_trt.formats import ceil_div
from mla_trt.ops.projection_weights import matrix_reference
from mla_trt.ops.schema import Attributes
from mla_trt.plugins.kernel_library import DeviceTensor, KernelError

OP = "MlaOutputProjection"
TOLERANCE = {"f32": 1e-5, "f16": 2**-10, "bf16": 2**-8}
CODE_ROUNDING = 2**-9
"""Of weights that are codes, which become bf16 where that is what they are multiplied with and the GPU has a kernel for it."""
# T, H, Dv, C
SIZES = {
    "tiles": (2, 64, 256),
    "eights and sixteens": (1, 8, 16),
    "not tiles": (3, 40, 80),
    "many columns": (9, 136, 272),
    "one column": (1, 1, 16),
    "no multiple of sixteen": (2, 64, 24),
}


def _inputs(
    seed: int, tokens: int, sizes: tuple[int, int, int], dtype: str = "bf16", weight: str = "codes"
) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    heads, value, width = sizes
    rows = max(heads * value, 1)
    inputs: dict[str, Array] = {
        "attended": rng.standard_normal((tokens, heads, value), np.float32).astype(HALF_TYPES[dtype])
    }
    if weight != "codes":
        values = rng.standard_normal((heads, value, width), np.float32) * np.float32(rows**-0.5)
        return {**inputs, "w_o": values.astype(HALF_TYPES[weight])}
    codes = rng.integers(0, 256, (heads, value, width), np.uint8)
    inputs["w_o"] = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.25, 2.0, (ceil_div(heads * value, 128), ceil_div(width, 128))) / 150 * rows**-0.5
    return {**inputs, "w_o_scale": scale.astype(np.float32)}


def _expected(inputs: dict[str, Array]) -> Array:
    """As the op's reference, by BLAS."""
    weight = matrix_reference(inputs, "w_o", row_axes=2).astype(np.float32)
    attended = inputs["attended"].astype(np.float32)
    return attended.reshape(len(attended), len(weight)) @ weight


def _check(inputs: dict[str, Array], **options: int | bool) -> None:
    dtype = next(name for name, kind in HALF_TYPES.items() if inputs["attended"].dtype == kind)
    found = run_op(OP, inputs, ["hidden"], **{"repeat": 2, **options})
    codes = dtype == "bf16" and inputs["w_o"].dtype == ml_dtypes.float8_e4m3fn
    compare("hidden", found["hidden"], _expected(inputs), TOLERANCE[dtype] + (CODE_ROUNDING if codes else 0))


@pytest.mark.small
@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 16, 17, 64, 65, 128, 129, 300])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_sizes(sizes: tuple[int, int, int], tokens: int) -> None:
    _check(_inputs(1, tokens, sizes))


@pytest.mark.small
@pytest.mark.parametrize("power", [-100, 0, 100])
@pytest.mark.parametrize("rows", [(1, 16), (1, 64), (2, 64), (3, 40)])
def test_weights_are_what_bf16_holds_of_code_times_scale(rows: tuple[int, int], power: int) -> None:
    """Each token is one row of the weight. Of more than 64 the scale has two terms of bf16, so that few of the values may be the one beside the
    nearest."""
    inputs = _inputs(8, 0, (*rows, 256))
    count = rows[0] * rows[1]
    inputs["w_o_scale"] *= np.float32(2.0**power)
    inputs["attended"] = np.eye(count, dtype=np.float32).astype(HALF_TYPES["bf16"]).reshape(count, *rows)
    found = run_op(OP, inputs, ["hidden"])["hidden"]
    bits, nearest = (
        values.astype(HALF_TYPES["bf16"]).view(np.int16).astype(np.int64) for values in (found, _expected(inputs))
    )
    away = np.abs(bits - nearest)
    assert away.max() <= (1 if count > 64 else 0)
    assert (away > 0).mean() < 0.005


@pytest.mark.small
@pytest.mark.parametrize("tokens", [1, 8, 16, 17])
@pytest.mark.parametrize("power", [-126, -120, -40, 0, 90, 110])
def test_rows_of_any_scale(power: int, tokens: int) -> None:
    """Each token is compared by itself, and each 128 of its values are of another scale than those beside them."""
    inputs = _inputs(10, tokens, (6, 64, 256))
    scales = np.exp2(np.random.default_rng(10).integers(-6, 1, (tokens, 3, 1)))
    rows = inputs["attended"].astype(np.float64).reshape(tokens, 3, 128)
    rows *= scales / np.abs(rows).max(axis=2, keepdims=True) * 2.0**power
    inputs["attended"] = rows.reshape(inputs["attended"].shape).astype(HALF_TYPES["bf16"])
    inputs["w_o_scale"] *= np.float32(2.0**-power)
    found = run_op(OP, inputs, ["hidden"], repeat=2)["hidden"]
    expected = _expected(inputs)
    units = np.broadcast_to(np.abs(expected).max(axis=1, keepdims=True), expected.shape)
    compare("hidden", found, expected, TOLERANCE["bf16"] + CODE_ROUNDING, units=units)


@pytest.mark.small
@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_small_values_beside_a_large_one(tokens: int) -> None:
    """One value of 128 is 2^12 times as large as the others, and the weights' rows that it meets are zero."""
    inputs = _inputs(11, tokens, (2, 64, 256))
    inputs["attended"][:, :, 5] = np.float32(2.0**12)
    inputs["w_o"][:, 5] = 0
    _check(inputs)


@pytest.mark.small
@pytest.mark.parametrize("tokens", [5, 70])
@pytest.mark.parametrize("weight", [*HALF_TYPES, "codes"])
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_types(dtype: str, weight: str, tokens: int) -> None:
    _check(_inputs(2, tokens, (3, 40, 80), dtype, weight))


@pytest.mark.small
@pytest.mark.parametrize("sizes", [(0, 16, 32), (2, 0, 32), (2, 16, 0)])
def test_sizes_of_zero(sizes: tuple[int, int, int]) -> None:
    _check(_inputs(3, 5, sizes))


@pytest.mark.small
@pytest.mark.parametrize(
    "count", [pytest.param(count, marks=pytest.mark.multiprocessors(count)) for count in (1, 2, 4, 8, 24)]
)
@pytest.mark.parametrize("tokens", [3, 40, 200])
def test_columns_that_blocks_share(tokens: int, count: int) -> None:
    """Of 144 outputs and so many multiprocessors one to eight blocks share the columns."""
    del count
    _check(_inputs(4, tokens, (17, 64, 144)))


@pytest.mark.small
@pytest.mark.multiprocessors(4)
@pytest.mark.parametrize("width", [496, 1008, 1024])
@pytest.mark.parametrize("tokens", [3, 40, 200])
def test_wide_blocks(tokens: int, width: int) -> None:
    """On so few multiprocessors blocks have 256 outputs, as those of a model's have on a GPU's, and not 192."""
    _check(_inputs(9, tokens, (17, 64, width)))


@pytest.mark.small
@pytest.mark.parametrize("tokens", [1, 100])
def test_calls_in_a_row(tokens: int) -> None:
    _check(_inputs(5, tokens, (8, 128, 528)), in_a_row=3)


@pytest.mark.small
@pytest.mark.parametrize("tokens", [6, 14, 70])
def test_what_is_not_a_number_stays_in_its_token(tokens: int) -> None:
    inputs = _inputs(6, tokens, (3, 40, 80))
    last = tokens - 2
    inputs["attended"][3, 1, 5], inputs["attended"][last, 2, 39] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        expected = _expected(inputs)
    found = run_op(OP, inputs, ["hidden"])["hidden"]
    there = np.delete(np.arange(tokens), [3, last])
    compare("hidden", found[there], expected[there], TOLERANCE["bf16"] + CODE_ROUNDING)
    assert np.isnan(found[3]).all()
    assert not np.isfinite(found[last]).any()


@functools.lru_cache(1)
def _of_model() -> tuple[dict[str, Array], Array]:
    inputs = _inputs(7, 2048, (128, 128, 7168))
    return inputs, _expected(inputs)


@pytest.mark.parametrize("tokens", [1, 8, 16, 17, 64, 65, 128, 200, 257, 2048])
def test_deepseek_v3(tokens: int) -> None:
    inputs, expected = _of_model()
    first = {**inputs, "attended": inputs["attended"][:tokens]}
    found = run_op(OP, first, ["hidden"], repeat=2)
    compare("hidden", found["hidden"], expected[:tokens], TOLERANCE["bf16"])


@pytest.mark.parametrize("tokens", [1, 128, 300])
def test_a_thousand_repeats(tokens: int) -> None:
    inputs, expected = _of_model()
    first = {**inputs, "attended": inputs["attended"][:tokens]}
    found = run_op(OP, first, ["hidden"], repeat=1000, graph=True)
    compare("hidden", found["hidden"], expected[:tokens], TOLERANCE["bf16"])


@pytest.mark.small
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT8E4M3FN, TensorProto.BFLOAT16])
def test_codes_have_scales_and_other_weights_none(dtype: int) -> None:
    given = {
        "attended": DeviceTensor(256, TensorProto.BFLOAT16, (3, 2, 8)),
        "w_o": DeviceTensor(256, dtype, (2, 8, 16)),
    }
    codes = dtype == TensorProto.FLOAT8E4M3FN
    if not codes:
        given["w_o_scale"] = DeviceTensor(256, TensorProto.FLOAT, (1, 1))
    call = library().call(OP, Attributes(), given, {"hidden": DeviceTensor(256, TensorProto.BFLOAT16, (3, 16))})
    with pytest.raises(
        KernelError, match="w_o is e4m3, so it needs scales" if codes else "w_o has scales, so it must be"
    ):
        call.workspace_bytes()
