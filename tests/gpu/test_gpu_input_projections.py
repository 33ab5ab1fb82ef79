"""MlaInputProjections on the GPU: few tokens and many, all parts and some, sizes that are multiples of nothing."""

from __future__ import annotations

import functools
import math

import ml_dtypes
import numpy as np
import pytest
from cases import HALF_TYPES
from harness import Array, compare, library, run_op
from onnx import helper

from mla_trt.ops import OPS
from mla_trt.ops.input_projections import CODED, FROM_LATENT, OUTPUT_OF
from mla_trt.ops.projection_weights import matrix_reference, scale_of
from mla_trt.plugins.kernel_library import DeviceTensor, KernelError

OP = "MlaInputProjections"
# Sums are in f32, so that of a product of the hidden states the output's type is what is left.
TOLERANCE = {"f32": 1e-5, "f16": 2**-10, "bf16": 2**-8}
# Beside bf16 the query's latent is bf16 too, once the norm's weight is in. Each of its values is off by 2^-9 of itself at most; in a sum of
# many, of either sign, these are 1e-3 of what the sums are like, and of eight (the fewest here) 3.5e-3.
LATENT_ROUNDING = {"f32": 0.0, "f16": 0.0, "bf16": 2**-8}
# index_weights are f32. Tensor cores drop bits of what they add.
SUMS = {"f32": 1e-5, "f16": 1e-5, "bf16": 1e-4}
# Weights that are codes become bf16 where the hidden states are, if the GPU has a kernel for it.
CODE_ROUNDING = 2**-9

LATENT = ("w_dq", "query_norm_weight")
MLA = (*LATENT, "w_dkv", "w_kr")
INDEXER = ("w_index_query", "w_index_key", "w_index_weights", "index_weights_factor")
ALL = (*MLA, *INDEXER)

# C, Q, H, M, R, Dr, Hi, Di; Q where there is w_dq
Sizes = tuple[int, int, int, int, int, int, int, int]
SMALL: dict[str, tuple[Sizes, tuple[str, ...]]] = {
    "tiles": ((64, 64, 4, 32, 64, 64, 64, 64), ALL),
    "eights": ((8, 8, 1, 8, 8, 8, 8, 8), ALL),
    "not tiles": ((136, 72, 5, 40, 40, 8, 8, 72), ALL),
    "many columns": ((1544, 200, 4, 16, 512, 64, 8, 16), MLA),
    "wide latent of the query": ((72, 1536, 3, 24, 40, 64, 8, 8), MLA),
    "query of the hidden states": ((136, 0, 5, 40, 512, 64, 8, 8), ("w_dkv", "w_kr")),
    "query alone": ((200, 72, 5, 24, 8, 8, 8, 8), LATENT),
    "query of the hidden states alone": ((200, 0, 5, 24, 8, 8, 8, 8), ()),
}
MODELS: dict[str, tuple[Sizes, tuple[str, ...]]] = {
    "deepseek v3": ((7168, 1536, 128, 192, 512, 64, 64, 128), MLA),
    "deepseek v3.2": ((7168, 1536, 128, 192, 512, 64, 64, 128), ALL),
    "deepseek v2": ((5120, 1536, 128, 192, 512, 64, 64, 128), MLA),
    "deepseek v2 lite": ((2048, 0, 16, 192, 512, 64, 64, 128), ("w_dkv", "w_kr")),
}


def _inputs(
    seed: int, tokens: int, sizes: Sizes, parts: tuple[str, ...] = ALL, dtype: str = "bf16"
) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    letters = dict(zip(("T", "C", "Q", "H", "M", "R", "Dr", "Hi", "Di"), (tokens, *sizes), strict=True))
    if "w_dq" not in parts:
        letters["Q"] = letters["C"]
    inputs = {}
    for formal in OPS[OP].inputs:
        if formal.optional and formal.name not in parts:
            continue
        shape = [letters[word] for word in str(formal.shape).split()]
        values = rng.standard_normal(shape, np.float32)
        if formal.name in ("query_norm_weight", "index_weights_factor"):
            values = np.sign(values) * (0.5 + np.abs(values))
        elif formal.name != "hidden":
            values *= np.float32(max(shape[0], 1) ** -0.5)
        inputs[formal.name] = values.astype(HALF_TYPES[dtype])
    return inputs


def _coded(inputs: dict[str, Array], seed: int, names: tuple[str, ...] = CODED) -> dict[str, Array]:
    """The same with weights as codes, of as large values: all codes but those that are no numbers."""
    rng = np.random.default_rng(seed)
    coded = dict(inputs)
    for name in set(names) & set(inputs):
        shape = inputs[name].shape
        codes = rng.integers(0, 256, shape, np.uint8)
        coded[name] = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
        blocks = math.ceil(shape[0] / 128), math.ceil(math.prod(shape[1:]) / 128)
        coded[scale_of(name)] = (rng.uniform(0.25, 2.0, blocks) / 150 * max(shape[0], 1) ** -0.5).astype(np.float32)
    return coded


def _expected(inputs: dict[str, Array], epsilon: float = 1e-6) -> dict[str, Array]:
    """As the op's reference, by BLAS."""
    given = {name: values.astype(np.float32) for name, values in inputs.items()}
    for name in CODED:
        if scale_of(name) in inputs:
            given[name] = matrix_reference(inputs, name).reshape(inputs[name].shape).astype(np.float32)
    hidden = latent = given["hidden"]
    if "w_dq" in given:
        latent = hidden @ given["w_dq"]
    if "query_norm_weight" in given:
        mean = np.square(latent, dtype=np.float64).sum(1, keepdims=True) / max(latent.shape[1], 1)
        latent = (latent / np.sqrt(mean + epsilon) * given["query_norm_weight"]).astype(np.float32)
    results = {}
    for name, output in {"w_uq": "query", **OUTPUT_OF}.items():
        if name in given:
            weight, source = given[name], latent if name in FROM_LATENT else hidden
            product = source @ weight.reshape(len(weight), int(np.prod(weight.shape[1:])))
            results[output] = product.reshape(len(source), *weight.shape[1:])
    if "index_weights_factor" in given:
        results["index_weights"] = results["index_weights"] * given["index_weights_factor"]
    return results


def _compare(
    found: dict[str, Array], expected: dict[str, Array], inputs: dict[str, Array], *, by_row: bool = False
) -> None:
    """Relative to the largest value of each output, or of each of its rows."""
    dtype = next(name for name, kind in HALF_TYPES.items() if inputs["hidden"].dtype == kind)
    for name, values in expected.items():
        tolerance = SUMS[dtype] if name == "index_weights" else TOLERANCE[dtype]
        if dtype == "bf16" and any(weight.dtype == ml_dtypes.float8_e4m3fn for weight in inputs.values()):
            tolerance += CODE_ROUNDING
        if "w_dq" in inputs and name in ("query", "index_query"):
            tolerance += LATENT_ROUNDING[dtype]
        units = None
        if by_row:
            largest = np.abs(values).max(axis=tuple(range(1, values.ndim)), keepdims=True, initial=0.0)
            units = np.broadcast_to(largest, values.shape)
        compare(name, found[name], values, tolerance, units=units)


def _check(inputs: dict[str, Array], **options: int) -> None:
    expected = _expected(inputs)
    _compare(run_op(OP, inputs, list(expected), repeat=2, **options), expected, inputs)


@pytest.mark.small
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 128, 129, 300])
@pytest.mark.parametrize(("sizes", "parts"), SMALL.values(), ids=SMALL.keys())
def test_sizes(sizes: Sizes, parts: tuple[str, ...], tokens: int) -> None:
    _check(_inputs(1, tokens, sizes, parts))


@pytest.mark.small
@pytest.mark.multiprocessors(2)
@pytest.mark.parametrize("tokens", [64, 200, 400])
@pytest.mark.parametrize("width", [8, 78, 128, 133])
def test_rounds_of_wide_blocks(width: int, tokens: int) -> None:
    """On few multiprocessors blocks have as many outputs as those of large weights have on a GPU's, and go on from tile to tile."""
    _check(_inputs(12, tokens, (136, 72, 8, width, 264, 64, 8, 16), MLA))


@pytest.mark.small
@pytest.mark.parametrize("tokens", [5, 64, 70, 130])
@pytest.mark.parametrize(
    ("latent", "parts"),
    [
        pytest.param(*case, marks=pytest.mark.multiprocessors(count), id=f"{count} multiprocessors, {case[0]}")
        for count, case in [
            (4, (72, LATENT)),
            (4, (136, (*LATENT, "w_dkv"))),
            (16, (72, LATENT)),
            (24, (72, LATENT)),
            (24, (136, (*LATENT, "w_dkv"))),
        ]
    ],
)
def test_columns_of_few_outputs(latent: int, parts: tuple[str, ...], tokens: int) -> None:
    """Of so many multiprocessors two, four or eight share the columns of one product."""
    _check(_inputs(13, tokens, (1032, latent, 1, 24, 72, 8, 8, 8), parts))


@pytest.mark.small
@pytest.mark.multiprocessors(24)
@pytest.mark.parametrize("tokens", [5, 100])
def test_many_columns_and_few_outputs(tokens: int) -> None:
    """The emulated GPU has as many multiprocessors as eight blocks for each 192 outputs need."""
    _check(_inputs(14, tokens, (7168, 192, 1, 264, 136, 8, 8, 8), (*LATENT, "w_dkv")))


@pytest.mark.small
@pytest.mark.parametrize("tokens", [5, 70])
@pytest.mark.parametrize("left_out", [*ALL, "w_kr w_dkv", "w_index_query w_index_key w_kr", "w_dkv w_kr w_index_key"])
def test_without_parts(left_out: str, tokens: int) -> None:
    needed = {"w_dq": "query_norm_weight", "w_index_weights": "index_weights_factor"}
    without = {*left_out.split(), needed.get(left_out, "")}
    _check(_inputs(2, tokens, (136, 72, 3, 24, 40, 8, 16, 24), tuple(part for part in ALL if part not in without)))


@pytest.mark.small
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("parts", [ALL, INDEXER], ids=["all", "query of the hidden states"])
@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (5, (64, 64, 2, 32, 64, 8, 8, 16)),
        (70, (37, 19, 3, 15, 41, 6, 5, 7)),
        (3, (0, 8, 2, 8, 8, 8, 8, 8)),
        (3, (8, 0, 2, 8, 8, 8, 8, 8)),
        (2, (8, 8, 1, 0, 0, 0, 0, 0)),
        (2, (8, 8, 0, 8, 8, 0, 8, 0)),
    ],
)
def test_any_type_and_size(dtype: str, parts: tuple[str, ...], tokens: int, sizes: Sizes) -> None:
    _check(_inputs(3, tokens, sizes, parts, dtype))


@pytest.mark.small
@pytest.mark.parametrize("others", [("query_norm_weight", "index_weights_factor"), ("w_dq", "w_kr"), ("w_uq",)])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_weights_of_another_type(dtype: str, others: tuple[str, ...]) -> None:
    inputs = _inputs(5, 70, SMALL["not tiles"][0])
    _check(inputs | {name: inputs[name].astype(HALF_TYPES[dtype]) for name in others})


@pytest.mark.small
@pytest.mark.parametrize(("shift", "parts"), [(2, MLA), (4, ALL)])  # index_weights are f32
def test_outputs_that_are_not_aligned(shift: int, parts: tuple[str, ...]) -> None:
    _check(_inputs(6, 5, SMALL["tiles"][0], parts), shift=shift)


@pytest.mark.small
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("epsilon", [1e-6, 0.7])
def test_rows_of_zeros_and_of_any_scale(epsilon: float, dtype: str) -> None:
    """The norm is each row's own; where a row is small, epsilon decides."""
    inputs = _inputs(7, 70, (136, 200, 5, 40, 64, 64, 32, 64), dtype=dtype)
    scales = np.exp2(np.random.default_rng(7).integers(-24, 25, (70, 1))).astype(np.float32)
    scales[::7] = 0
    inputs["hidden"] = (inputs["hidden"] * scales).astype(HALF_TYPES[dtype])
    expected = _expected(inputs, epsilon)
    _compare(run_op(OP, inputs, list(expected), repeat=2, epsilon=epsilon), expected, inputs, by_row=True)


@pytest.mark.small
@pytest.mark.parametrize("codes", [False, True], ids=["bf16", "codes"])
@pytest.mark.parametrize("tokens", [6, 70])
def test_what_is_not_a_number_stays_in_its_token(tokens: int, codes: bool) -> None:
    inputs = _inputs(8, tokens, SMALL["not tiles"][0])
    if codes:
        inputs = _coded(inputs, 8)
    last = tokens - 2
    inputs["hidden"][3, 5], inputs["hidden"][last, 100] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        expected = _expected(inputs)
    found = run_op(OP, inputs, list(expected))
    there = np.delete(np.arange(tokens), [3, last])
    _compare(*({name: values[there] for name, values in which.items()} for which in (found, expected)), inputs)
    for name, values in found.items():
        assert np.isnan(values[3]).all(), name
        assert not np.isfinite(values[last]).any(), name


@pytest.mark.small
@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("case", ["not tiles", "many columns", "query of the hidden states"])
def test_calls_in_a_row(case: str, tokens: int) -> None:
    """A call may begin beside the one before; where a block does not wait for it, the emulator says so."""
    inputs = _inputs(9, tokens, *SMALL[case])
    for given in (inputs, _coded(inputs, 9)):
        _check(given, in_a_row=3)


@pytest.mark.small
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 128, 129, 300])
@pytest.mark.parametrize("case", ["tiles", "many columns", "wide latent of the query", "not tiles"])
def test_codes(case: str, tokens: int) -> None:
    _check(_coded(_inputs(15, tokens, *SMALL[case]), 15))


@pytest.mark.small
@pytest.mark.parametrize("tokens", [5, 70])
@pytest.mark.parametrize("names", [*CODED, "w_dq w_uq", "w_dkv w_index_query"])
def test_some_weights_as_codes(names: str, tokens: int) -> None:
    _check(_coded(_inputs(16, tokens, SMALL["tiles"][0]), 16, tuple(names.split())))


@pytest.mark.small
@pytest.mark.parametrize("tokens", [5, 70])
@pytest.mark.parametrize("columns", [8, 72, 128, 136, 200, 1032, 2056])
def test_codes_of_any_number_of_columns(columns: int, tokens: int) -> None:
    """Steps have 128 columns, and a cluster shares them."""
    _check(_coded(_inputs(17, tokens, (columns, 144, 3, 48, 272, 16, 8, 16), MLA), 17))


@pytest.mark.small
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_codes_beside_any_type(dtype: str) -> None:
    _check(_coded(_inputs(18, 70, SMALL["tiles"][0], dtype=dtype), 18))


@pytest.mark.small
@pytest.mark.parametrize("power", [-100, -20, 20, 100])
def test_codes_of_any_scale(power: int) -> None:
    """Codes become bf16 times 2^-120 first; neither that nor the scale may leave the range of bf16 where their product does not."""
    inputs = _coded(_inputs(19, 5, SMALL["tiles"][0], ()), 19)
    inputs["w_uq_scale"] *= np.float32(2.0**power)
    inputs["hidden"] = (inputs["hidden"].astype(np.float32) * np.float32(2.0 ** (-power * 0.9))).astype(
        HALF_TYPES["bf16"]
    )
    _check(inputs)


@pytest.mark.parametrize("tokens", [1, 16, 64, 128, 300, 600])
def test_a_thousand_repeats(tokens: int) -> None:
    inputs = _inputs(10, tokens, (7168, 1536, 16, 192, 512, 64, 64, 128))
    for given in (inputs, _coded(inputs, 10)):
        expected = _expected(given)
        _compare(run_op(OP, given, list(expected), repeat=1000, graph=True), expected, given)


@functools.lru_cache(1)
def _of_model(name: str, codes: bool) -> tuple[dict[str, Array], dict[str, Array]]:
    inputs = _inputs(11, 2048, *MODELS[name])
    if codes:
        inputs = _coded(inputs, 11)
    return inputs, _expected(inputs)


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 64, 65, 128, 200, 256, 257, 2048])
@pytest.mark.parametrize("codes", [False, True], ids=["bf16", "codes"])
@pytest.mark.parametrize("model", MODELS)
def test_sizes_of_models(model: str, codes: bool, tokens: int) -> None:
    inputs, expected = _of_model(model, codes)
    first = {**inputs, "hidden": inputs["hidden"][:tokens]}
    found = run_op(OP, first, list(expected), repeat=2)
    _compare(found, {name: values[:tokens] for name, values in expected.items()}, first)


@pytest.mark.small
@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("codes", [True, False])
def test_codes_have_scales_and_other_weights_none(codes: bool, name: str) -> None:
    given = _coded(_inputs(20, 3, SMALL["tiles"][0]), 20)
    if codes:
        del given[scale_of(name)]
    else:
        given[name] = given[name].astype(HALF_TYPES["bf16"])
    tensors, results = (
        {
            key: DeviceTensor(256, helper.np_dtype_to_tensor_dtype(values.dtype), values.shape)
            for key, values in arrays.items()
        }
        for arrays in (given, _expected(_inputs(20, 3, SMALL["tiles"][0])))
    )
    call = library().call(OP, OPS[OP].complete({}, OP), tensors, results)
    with pytest.raises(KernelError, match=f"{name} (is e4m3, so it needs|has scales, so it must be e4m3)"):
        call.workspace_bytes()
