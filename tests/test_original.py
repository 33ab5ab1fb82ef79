"""Exports driven as sessions: what they accept is found out, and chunks give what the whole gives."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from exports import interface_of, load, needs_exports
from onnx import TensorProto, helper, numpy_helper

from mla_trt import interface as roles
from mla_trt.errors import BadModelError, UsageError
from mla_trt.float32 import has_half_types, to_float32
from mla_trt.interface import ModelInput, ModelInterface
from mla_trt.verification.original import Limits, OriginalModel, RefusedLengthError, causal_mask, rope_input

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64

EXPORTS = {
    "deepseek_v3__dynamo_op20__eager__dec": Limits(1, 1, 1, 64),
    "deepseek_v3__dynamo_op23__sdpa__dec1__s1": Limits(1, 1, 1, 64),
    "deepseek_v3__ts_op17__eager__dec__post_ort_extended": Limits(1, 1, 1, 64),
    "deepseek_v3__optimum0.1.0_tf4.57.6_op20__sdpa__dec__op20": Limits(1, 1, 1, 64),
    "deepseek_v3__optimum0.1.0_tf4.57.6_op17__sdpa__dec__fp16": Limits(1, 1, 1, 64),
    "deepseek_v3__dynamo_op23__sdpa__dec__realdims__q_dq_blk_oi_t": Limits(1, 1, 1, 64),
    "deepseek_v3__dynamo_op23__sdpa__dec__realdims__q_qdq_pertensor_act": Limits(1, 1, 1, 64),
    "deepseek_v3__dynamo_op20__eager__pre__idsonly": Limits(1, 1, 0, 64),
    "deepseek_v3_attnonly__dynamo_op20__eager__dec": Limits(1, 1, 1, 64),
    "deepseek_v32__dynamo_op23__sdpa__dec": Limits(1, 1, 1, 64),
    "deepseek_v32__ts_op17__eager__pre": Limits(4, 1, 0, 64),
    "dsref_v3_absorb__ts_op17__ref__dec__io_realrope": Limits(1, 1, 1, 32),
    "dsref_v3_naive__dynamo_op23__ref__dec__io_realrope_realdims_fp8": Limits(1, 1, 1, 64),
    "dsref_v3_absorb__dynamo_op20__ref__pre__raw_complex": Limits(5, 1, 0, 5, only=5),
    "glm_moe_dsa__ts_op17__sdpa__dec": Limits(4, 1, 3, 64),
    "hub_deepseek_v2_orig__dynamo_op20__eager__dec": Limits(1, 1, 1, 64),
    "kimi_linear__dynamo_op20__eager__dec": Limits(1, 1, 1, 64),
    "packed2d_absorb_cat__dynamo_op20__hand__dec": Limits(1, 1, 1, 64),
}


def some_tokens(model: OriginalModel, sequences: int, length: int) -> np.ndarray:
    random = np.random.default_rng(7)
    if model.feature_axes:
        return random.standard_normal((sequences, length, *model.feature_axes)).astype(np.float32)
    return random.integers(0, 64, (sequences, length))


@needs_exports
@pytest.mark.parametrize("name", EXPORTS)
def test_limits_are_found_and_chunks_give_what_the_whole_gives(name: str) -> None:
    proto = load(name)
    model = OriginalModel(to_float32(proto) if has_half_types(proto) else proto, interface_of(proto))
    limits = model.find_limits(64)
    assert limits == EXPORTS[name]

    length = min(limits.total, 13)
    tokens = some_tokens(model, 1, length)[0]
    (main,) = model.results
    whole = model.results_by_token(tokens, [length], limits)[main]
    chunked = model.results_by_token(tokens, [5, *[1] * (length - 5)], limits)[main]
    told = ~np.isnan(whole).any(axis=tuple(range(1, whole.ndim)))
    assert told[-1]
    np.testing.assert_allclose(chunked[told], whole[told], atol=1e-5 * np.abs(whole[told]).max())


@needs_exports
def test_sequences_of_a_batch_are_as_alone() -> None:
    proto = load("deepseek_v3__dynamo_op20__eager__dec")
    model = OriginalModel(proto, interface_of(proto))
    tokens = some_tokens(model, 3, 6)
    run = model.start(3)
    together = np.concatenate([run.feed(tokens[:, :4])["logits"], run.feed(tokens[:, 4:])["logits"]], axis=1)
    for index in range(3):
        alone = model.start().feed(tokens[index : index + 1])["logits"]
        np.testing.assert_allclose(together[index], alone[0], atol=1e-5)


@needs_exports
def test_a_fixed_number_of_sequences_is_filled_with_copies() -> None:
    proto = load("dsref_v3_absorb__dynamo_op20__ref__pre__raw_complex")
    model = OriginalModel(proto, interface_of(proto))
    tokens = some_tokens(model, 2, 5)
    both = model.start(2).feed(tokens)[model.results[0]]
    alone = model.start().feed(tokens[1:])[model.results[0]]
    assert alone.shape == (1, 1, 64)
    np.testing.assert_allclose(alone[0], both[1], atol=1e-5)
    with pytest.raises(UsageError, match="takes 2 sequences at once, not 3"):
        model.start(3)
    with pytest.raises(RefusedLengthError):
        model.start().feed(tokens[:1, :4])


def small_model(text: str, weights: dict[str, np.ndarray] | None = None) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in (weights or {}).items())
    return model


IDS = ModelInput("ids", roles.TOKENS, INT64, ("B", "S"))


def running_sum_proto(first_rows: int = 0) -> onnx.ModelProto:
    """Gives, of the last token only, the sum of all tokens; asks for `first_rows` cached rows at least."""
    return small_model(
        """running_sum (int64[B, S] ids, float[B, P, 1] past) => (float[B, 1, 1] logits, float[B, T, 1] present) {
            values = Cast<to: int = 1>(ids)
            column = Unsqueeze(values, minus_one)
            present = Concat<axis: int = 1>(past, column)
            needed = Gather<axis: int = 1>(past, row)
            total = ReduceSum<keepdims: int = 1>(present, one)
            nothing = Mul(needed, zero)
            logits = Add(total, nothing)
        }"""
        if first_rows
        else """running_sum (int64[B, S] ids, float[B, P, 1] past) => (float[B, 1, 1] logits, float[B, T, 1] present) {
            values = Cast<to: int = 1>(ids)
            column = Unsqueeze(values, minus_one)
            present = Concat<axis: int = 1>(past, column)
            logits = ReduceSum<keepdims: int = 1>(present, one)
        }""",
        {
            "minus_one": np.array([-1]),
            "one": np.array([1]),
            "row": np.array([first_rows - 1]),
            "zero": np.zeros(1, np.float32),
        },
    )


RUNNING_SUM = ModelInterface((IDS, ModelInput("past", roles.CACHE, FLOAT, ("B", "P", 1), "present")), ("logits",))


def running_sum(first_rows: int = 0) -> OriginalModel:
    return OriginalModel(running_sum_proto(first_rows), RUNNING_SUM)


def test_results_of_the_last_token_only_are_known_at_the_end_of_each_chunk() -> None:
    model = running_sum()
    rows = model.results_by_token(np.array([1, 2, 3, 4, 5]), [2, 1, 2], model.find_limits(16))["logits"]
    np.testing.assert_array_equal(rows[:, 0], [np.nan, 3, 6, np.nan, 15])


def test_an_export_that_refuses_an_empty_cache_is_found_out() -> None:
    limits = running_sum(first_rows=3).find_limits(16)
    assert limits == Limits(first=None, step=1, past=3, total=16)


def masked_sum(*, cached: int | str = "P", new: int | str = "S", hides: bool = True) -> OriginalModel:
    """Gives the sum of the tokens that the mask shows, of each call's last token; the cache may have a fixed length."""
    total = cached + new if isinstance(cached, int) and isinstance(new, int) else "T"
    shown = "Mul(present, weights)" if hides else "Identity(present)"
    model = small_model(
        f"""masked_sum (int64[B, {new}] ids, int64[B, {total}] mask, float[B, {cached}] past)
            => (float[B, 1, 1] logits, float[B, {total}] present) {{
            values = Cast<to: int = 1>(ids)
            present = Concat<axis: int = 1>(past, values)
            weights = Cast<to: int = 1>(mask)
            needed = Gather<axis: int = 1>(past, nought)
            shown = {shown}
            nothing = Mul(needed, zero)
            sums = ReduceSum<keepdims: int = 1>(shown, one)
            sum = Add(sums, nothing)
            logits = Unsqueeze(sum, one)
        }}""",
        {"one": np.array([1]), "nought": np.array([0]), "zero": np.zeros(1, np.float32)},
    )
    entries = (
        IDS,
        ModelInput("mask", roles.ATTENTION_MASK, INT64, ("B", "T")),
        ModelInput("past", roles.CACHE, FLOAT, ("B", "P"), "present"),
    )
    fixed = {letter: size for letter, size in (("P", cached), ("S", new)) if isinstance(size, int)}
    return OriginalModel(model, ModelInterface(entries, ("logits",), fixed))


@pytest.mark.parametrize(
    ("cached", "new", "expected"),
    [
        (4, "S", Limits(1, 1, 4, 5, window=4)),
        (4, 1, Limits(1, 1, 4, 5, window=4)),
        (5, 2, Limits(2, 2, 5, 6, window=5)),
        ("P", "S", Limits(1, 1, 1, 15, window=1)),
    ],
)
def test_rows_that_are_not_there_yet_are_hidden_by_the_mask(
    cached: int | str, new: int | str, expected: Limits
) -> None:
    model = masked_sum(cached=cached, new=new)
    limits = model.find_limits(16)
    assert limits == expected
    tokens = np.arange(1, min(limits.total, 9) + 1)
    rows = model.results_by_token(tokens, [1] * len(tokens), limits)["logits"]
    sums = np.cumsum(tokens).astype(float)
    known = np.arange(1, len(tokens) + 1) % limits.step == 0
    np.testing.assert_array_equal(rows[:, 0], np.where(known, sums, np.nan))


def test_a_mask_that_hides_nothing_is_found_out() -> None:
    limits = masked_sum(cached=4, hides=False).find_limits(16)
    assert not limits.can_begin
    assert limits.past == 4


def test_no_call_goes_beyond_a_fixed_number_of_cached_tokens() -> None:
    model = masked_sum(cached=3)
    run = model.start(window=3)
    assert run.feed([[1, 2, 3, 4]])["logits"].item() == 10
    with pytest.raises(RefusedLengthError, match="takes 3 cached tokens, not 4"):
        run.feed([[5]])


def test_rows_of_first_tokens_are_made_beside_others_where_they_do_not_depend_on_them() -> None:
    without_rope = OriginalModel(running_sum_proto(3), RUNNING_SUM, rope_dim=0)
    limits = without_rope.find_limits(16)
    assert limits == Limits(first=None, step=1, past=3, total=16, made=3)
    rows = without_rope.results_by_token(np.array([1, 2, 3, 4, 5, 6]), [2, 2, 1, 1], limits)["logits"]
    np.testing.assert_array_equal(rows[:, 0], [np.nan, np.nan, np.nan, 10, 15, 21])
    assert without_rope.results_by_token(np.array([1, 2, 3]), [3], limits) == {}


def test_rows_that_depend_on_others_are_not_made_beside_them() -> None:
    model = small_model(
        """total_of_totals (int64[B, S] ids, float[B, 3, 1] past) => (float[B, 1, 1] logits, float[B, T, 1] present) {
            values = Cast<to: int = 1>(ids)
            column = Unsqueeze(values, minus_one)
            before = ReduceSum<keepdims: int = 1>(past, one)
            row = Add(column, before)
            present = Concat<axis: int = 1>(past, row)
            logits = ReduceSum<keepdims: int = 1>(present, one)
        }""",
        {"minus_one": np.array([-1]), "one": np.array([1])},
    )
    cache = ModelInput("past", roles.CACHE, FLOAT, ("B", "P", 1), "present")
    interface = ModelInterface((IDS, cache), ("logits",), {"P": 3})
    limits = OriginalModel(model, interface, rope_dim=0).find_limits(16)
    assert not limits.can_begin


def test_a_cache_that_must_be_empty_carries_nothing() -> None:
    model = small_model(
        """sum_of_all (int64[B, S] ids, float[B, 0, 1] past) => (float[B, 1, 1] logits, float[B, T, 1] present) {
            values = Cast<to: int = 1>(ids)
            column = Unsqueeze(values, minus_one)
            present = Concat<axis: int = 1>(past, column)
            logits = ReduceSum<keepdims: int = 1>(present, one)
        }""",
        {"minus_one": np.array([-1]), "one": np.array([1])},
    )
    cache = ModelInput("past", roles.CACHE, FLOAT, ("B", "P", 1), "present")
    export = OriginalModel(model, ModelInterface((IDS, cache), ("logits",), {"P": 0}))
    limits = export.find_limits(16)
    assert limits == Limits(1, 1, 0, 16)
    rows = export.results_by_token(np.array([1, 2, 3]), [2, 1], limits)["logits"]
    np.testing.assert_array_equal(rows[:, 0], [np.nan, 3, 6])


def test_an_export_without_a_cache_runs_everything_again() -> None:
    model = small_model(
        """prefix_sum (int64[B, S] ids) => (float[B, S, 1] logits) {
            values = Cast<to: int = 1>(ids)
            sums = CumSum(values, axis)
            logits = Unsqueeze(sums, minus_one)
        }""",
        {"axis": np.array(1), "minus_one": np.array([-1])},
    )
    run = OriginalModel(model, ModelInterface((IDS,), ("logits",))).start(2)
    run.feed([[1, 2], [3, 4]])
    assert run.feed([[5], [6]])["logits"].tolist() == [[[8.0]], [[13.0]]]
    assert run.length == 3
    with pytest.raises(UsageError, match=r"tokens must be \[2, n\], not \[1, 2\]"):
        run.feed([[1, 2]])


def test_a_model_that_runs_with_no_length_is_reported() -> None:
    model = small_model(
        """broken (int64[B, S] ids) => (float[B, S] logits) {
            wrong = Reshape(ids, shape)
            logits = Cast<to: int = 1>(wrong)
        }""",
        {"shape": np.array([977, -1])},
    )
    with pytest.raises(BadModelError, match="none of the lengths"):
        OriginalModel(model, ModelInterface((IDS,), ("logits",))).find_limits()


def test_masks_are_causal_in_every_type() -> None:
    floats = causal_mask((1, 1, 2, 4), 2, np.dtype(np.float32))
    assert (floats[0, 0] == 0).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert floats.min() == np.finfo(np.float32).min
    assert causal_mask((2, 2), 0, np.dtype(np.bool_)).tolist() == [[True, False], [True, True]]
    assert causal_mask((2, 2), 0, np.dtype(np.int64)).tolist() == [[1, 0], [1, 1]]
    assert causal_mask((2, 4), 2, np.dtype(np.int64), hidden=1).tolist() == [[0, 1, 1, 0], [0, 1, 1, 1]]
    assert np.isfinite(causal_mask((2, 2), 0, np.dtype(ml_dtypes.bfloat16)).astype(np.float32)).all()


@pytest.mark.parametrize("rope_dim", [8, 16])
def test_rope_tables_have_the_width_and_layout_of_their_input(rope_dim: int) -> None:
    entry = ModelInput("sin", roles.ROPE_SIN, FLOAT, ("B", 1, "S", 8))
    table = rope_input(entry, np.array([3, 4]), (2, 1, 2, 8), rope_dim)
    assert table.shape == (2, 1, 2, 8)
    half = rope_dim // 2
    angles = 4 * 10000.0 ** (-np.arange(half) * 2 / rope_dim)
    np.testing.assert_allclose(table[1, 0, 1], np.sin(np.tile(angles, 8 // half)))


def test_a_float32_copy_has_no_half_precision_left_and_keeps_the_values() -> None:
    half = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Cast", ["x"], ["wide"], to=FLOAT),
                helper.make_node("Cast", ["wide"], ["narrow"], to=TensorProto.FLOAT16),
                helper.make_node("If", ["flag"], ["chosen"], then_branch=_branch(3.0), else_branch=_branch(5.0)),
                helper.make_node("Twice", ["narrow"], ["twice"], domain="local"),
                helper.make_node("Mul", ["twice", "chosen"], ["scaled"]),
                helper.make_node("Add", ["scaled", "bias"], ["y"]),
            ],
            "half",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["N"]),
                helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
            ],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["N"])],
            [numpy_helper.from_array(np.array([0.1], np.float16), "bias")],
            value_info=[helper.make_tensor_value_info("scaled", TensorProto.FLOAT16, ["N"])],
        ),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("local", 1)],
        ir_version=10,
        functions=[
            helper.make_function(
                "local",
                "Twice",
                ["a"],
                ["b"],
                [
                    helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.array([2], np.float16))),
                    helper.make_node("Mul", ["a", "two"], ["b"]),
                ],
                [helper.make_opsetid("", 20)],
            )
        ],
    )
    assert has_half_types(half)
    copy = to_float32(half)
    assert not has_half_types(copy)
    assert has_half_types(half)
    interface = ModelInterface(
        (
            ModelInput("x", roles.TOKENS, TensorProto.FLOAT16, ("S", 1)),
            ModelInput("flag", roles.UNUSED, TensorProto.BOOL, ()),
        ),
        ("y",),
    )
    model = OriginalModel(copy, interface)
    assert model.token_dtype == np.float32
    onnx.checker.check_model(copy)
    bias = numpy_helper.to_array(copy.graph.initializer[0])
    assert bias.dtype == np.float32
    assert bias[0] == np.float32(np.float16(0.1))


def _branch(value: float) -> onnx.GraphProto:
    filled = helper.make_node(
        "ConstantOfShape", ["one"], ["out"], value=numpy_helper.from_array(np.array([value], np.float16))
    )
    one = helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.array([1])))
    return helper.make_graph(
        [one, filled], "branch", [], [helper.make_tensor_value_info("out", TensorProto.FLOAT16, [1])]
    )
