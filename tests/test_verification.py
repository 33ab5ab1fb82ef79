"""Verification passes what is right and catches every mistake that is planted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from exports import interface_of, load, needs_exports
from onnx import TensorProto, helper, numpy_helper
from small_models import SPARSE, Config, interface, lowered, original

from mla_trt.engines.engine_onnxruntime import OnnxRuntimeEngine
from mla_trt.lowering import LowerOptions, lower
from mla_trt.ops import DOMAIN, attach_functions, retarget
from mla_trt.selection import force_selection, show_selection, top_k
from mla_trt.session import Session
from mla_trt.verification.cases import ALONE, FORKED, TOGETHER, beyond_top_k
from mla_trt.verification.ops import OPS_TOLERANCE, check_ops, relative_error, rows_difference
from mla_trt.verification.original import Limits
from mla_trt.verification.verify import VerificationReport, overlaps, verify

# W_UK and W_UV of equal sizes, so that they can be mixed up.
CONFIG = Config(v_head_dim=10, sinks=True)
WRITTEN = {"row_format": "fp8", "index_format": "fp8", "page_size": 64}

Plant = Callable[[onnx.ModelProto], None]


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def checked(
    config: Config,
    *,
    graph: Plant | None = None,
    rewritten_body: Plant | None = None,
    written_body: Plant | None = None,
) -> VerificationReport:
    """Verifies the hand-lowered model, with a mistake in its graph or in the function bodies of one of its forms."""
    written = lowered(config, **WRITTEN)  # type: ignore[arg-type]
    if graph is not None:
        graph(written)
        attach_functions(written)
    rewritten = retarget(written, "f32", "f32", 4)
    if rewritten_body is not None:
        rewritten_body(rewritten)
    if written_body is not None:
        written_body(written)
    return verify(original(config), interface(config), rewritten, written)


@pytest.mark.parametrize(
    "config",
    [Config(), Config(sinks=True, interleaved=False), SPARSE, replace(SPARSE, sinks=True, layers=1)],
    ids=["dense", "sinks", "sparse", "sparse with sinks"],
)
@pytest.mark.parametrize(
    "form",
    [
        WRITTEN,
        {"row_format": "f32", "page_size": 3, "page_copies": True},
        {"row_format": "bf16", "logits": "last"},
        {"row_format": "fp8_ds_mla"},
        {"row_format": "fp8_flat", "max_position": 64},
    ],
    ids=lambda form: form["row_format"],
)
def test_a_right_model_passes(config: Config, form: dict[str, object]) -> None:
    written = lowered(config, **form)  # type: ignore[arg-type]
    report = verify(original(config), interface(config), retarget(written, "f32", "f32", 4), written)
    assert report.failures == ()
    assert report.passed
    assert report.rewrite_max_error < 5e-6
    assert report.format_max_error < 0.2
    assert {result.op for result in report.ops} >= {"MlaPlan"}
    assert all(result.error < 1e-5 for result in report.ops)
    assert (report.selection_overlap is not None) == bool(config.top_k)
    if config.top_k:
        assert report.selection_overlap is not None
        assert report.selection_overlap > 0.9


def test_the_report_is_json_with_numbers_or_null() -> None:
    report = checked(Config(layers=1))
    facts = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert facts["passed"] is True
    assert facts["rewrite_max_error"] == report.rewrite_max_error
    assert [case["name"] for case in facts["cases"]] == ["one sequence", "ragged batch", "forked sequences"]
    assert sum(case["tokens"] for case in facts["cases"]) > 80
    broken = replace(report, cases=(replace(report.cases[0], format_max_error=math.inf),), ops=())
    assert json.loads(json.dumps(broken.to_json(), allow_nan=False))["format_max_error"] is None


def test_only_tokens_that_were_compared_are_counted() -> None:
    counts = []
    for logits in ("all", "last"):
        written = lowered(CONFIG, logits=logits)
        report = verify(original(CONFIG), interface(CONFIG), retarget(written, "f32", "f32", 4), written)
        counts.append([case.tokens for case in report.cases])
    assert counts == [[18, 54, 24], [6, 17, 10]]


def attention(model: onnx.ModelProto, layer: int = 0) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == f"attention.{layer}")


def set_attribute(node: onnx.NodeProto, name: str, value: float | int) -> None:
    (attribute,) = (attribute for attribute in node.attribute if attribute.name == name)
    attribute.CopyFrom(helper.make_attribute(name, value))


def use_instead(
    model: onnx.ModelProto, node: onnx.NodeProto, old: str, change: Callable[[str], onnx.NodeProto]
) -> None:
    """Makes a node read a changed form of one of its inputs."""
    changed = change(old)
    nodes: list[onnx.NodeProto] = []
    for existing in model.graph.node:
        if existing.name == node.name:
            nodes.append(changed)
        nodes.append(onnx.NodeProto.FromString(existing.SerializeToString()))
        if existing.name == node.name:
            for index, value in enumerate(nodes[-1].input):
                if value == old:
                    nodes[-1].input[index] = changed.output[0]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def shifted(model: onnx.ModelProto, old: str, by: int) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([by], np.int32), "shift"))
    use_instead(
        model, attention(model), old, lambda name: helper.make_node("Add", [name, "shift"], [f"{name}.shifted"])
    )


def wrong_scale(model: onnx.ModelProto) -> None:
    set_attribute(attention(model), "softmax_scale", CONFIG.scale * 1.01)


def swapped_norms(model: onnx.ModelProto) -> None:
    names = {"kv_norm.0": "kv_norm.1", "kv_norm.1": "kv_norm.0"}
    for layer in range(2):
        node = attention(model, layer)
        node.input[:] = [names.get(name, name) for name in node.input]


def missing_norm(model: onnx.ModelProto) -> None:
    attention(model).input[3] = ""


def other_epsilon(model: onnx.ModelProto) -> None:
    set_attribute(attention(model), "epsilon", 1e-2)


def mixed_rope_layout(model: onnx.ModelProto) -> None:
    set_attribute(attention(model), "rope_interleaved", int(not CONFIG.interleaved))


def cos_and_sin_mixed(model: onnx.ModelProto) -> None:
    node = attention(model)
    node.input[4], node.input[5] = node.input[5], node.input[4]


def rope_by_sequence(model: onnx.ModelProto) -> None:
    """The table's rows are chosen by something else than positions."""
    attention(model).input[6] = "token_sequence"


def rope_by_place_in_the_batch(model: onnx.ModelProto) -> None:
    """Right as long as a sequence is alone and new: rope is blind to a shift of all its positions."""
    range_node = helper.make_node("CumSum", ["ones", "axis"], ["counted"])
    start = [
        helper.make_node("Mul", ["token_sequence", "nought"], ["noughts"]),
        helper.make_node("Add", ["noughts", "one"], ["ones"]),
        range_node,
    ]
    for name, value in (("nought", 0), ("one", 1), ("axis", 0)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int32), name))
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend([nodes[0], *start, *nodes[1:]])
    attention(model).input[6] = "counted"


def keys_and_values_mixed(model: onnx.ModelProto) -> None:
    node = attention(model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    up, down = (
        numpy_helper.to_array(weights[name]).transpose(0, 2, 1).copy() for name in (node.input[7], node.input[9])
    )
    weights[node.input[7]].CopyFrom(numpy_helper.from_array(down, node.input[7]))
    weights[node.input[9]].CopyFrom(numpy_helper.from_array(up, node.input[9]))


def dropped_sink(model: onnx.ModelProto) -> None:
    node = attention(model, 1)
    node.input[11] = ""


def sinks_of_another_layer(model: onnx.ModelProto) -> None:
    attention(model, 1).input[11] = attention(model, 0).input[11]


def causal_mask_shows_the_next_token(model: onnx.ModelProto) -> None:
    shifted(model, "cache_lengths", 1)


def causal_mask_hides_the_latest_token(model: onnx.ModelProto) -> None:
    shifted(model, "cache_lengths", -1)


def rows_written_one_place_further(model: onnx.ModelProto) -> None:
    shifted(model, "positions", 1)


def sequences_mixed_up(model: onnx.ModelProto) -> None:
    """Every token's row goes to the first sequence: right as long as a sequence is alone."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int32), "shift"))
    use_instead(
        model,
        attention(model),
        "token_sequence",
        lambda name: helper.make_node("Min", [name, "shift"], [f"{name}.first"]),
    )


GRAPH_MISTAKES: list[Plant] = [
    wrong_scale,
    swapped_norms,
    missing_norm,
    other_epsilon,
    mixed_rope_layout,
    cos_and_sin_mixed,
    rope_by_sequence,
    rope_by_place_in_the_batch,
    keys_and_values_mixed,
    dropped_sink,
    sinks_of_another_layer,
    causal_mask_shows_the_next_token,
    causal_mask_hides_the_latest_token,
    rows_written_one_place_further,
    sequences_mixed_up,
]


@pytest.mark.parametrize("mistake", GRAPH_MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_the_graph_is_caught(mistake: Plant) -> None:
    report = checked(CONFIG, graph=mistake)
    assert not report.passed
    assert any("differs from the original" in line or "not finite" in line for line in report.failures)


def body(model: onnx.ModelProto) -> onnx.FunctionProto:
    layers = ("MlaAttention", "MlaSparseAttention")
    return next(function for function in model.functions if function.domain == DOMAIN and function.name in layers)


def producer(function: onnx.FunctionProto, name: str) -> onnx.NodeProto:
    return next(node for node in function.node if name in node.output)


def strict_causal_mask(model: onnx.ModelProto) -> None:
    compared = [node for node in body(model).node if node.op_type == "LessOrEqual"]
    assert compared
    for node in compared:
        node.op_type = "Less"


def stale_cache_row(model: onnx.ModelProto) -> None:
    """Attention reads the pages as they were before the new rows."""
    for node in body(model).node:
        node.input[:] = ["kv_cache" if name == "kv_cache_out" else name for name in node.input]


def page_border_one_token_late(model: onnx.ModelProto) -> None:
    """The first token of a page is written to the page before."""
    function = body(model)
    divided = next(
        node
        for node in function.node
        if node.op_type == "Div" and producer(function, node.input[0]).input[:1] == ["positions"]
    )
    one = helper.make_node("Constant", [], ["planted_one"], value=numpy_helper.from_array(np.array(1)))
    before = helper.make_node("Sub", [divided.input[0], "planted_one"], ["planted_before"])
    clamped = helper.make_node("Max", ["planted_before", "planted_zero"], ["planted_clamped"])
    zero = helper.make_node("Constant", [], ["planted_zero"], value=numpy_helper.from_array(np.array(0)))
    divided.input[0] = "planted_clamped"
    index = next(i for i, node in enumerate(function.node) if node.output == divided.output)
    nodes = [*function.node[:index], one, zero, before, clamped, *function.node[index:]]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del function.node[:]
    function.node.extend(copies)


def rope_not_rotated(model: onnx.ModelProto) -> None:
    """New keys are stored as they come: right at position 0 only."""
    function = body(model)
    stored = next(node for node in function.node if node.op_type == "Concat" and _is_key(function, node))
    stored.input[1] = next(node.output[0] for node in function.node if list(node.input) == ["rope_key"])


def _is_key(function: onnx.FunctionProto, node: onnx.NodeProto) -> bool:
    return len(node.input) == 2 and any(
        user.op_type == "BitCast" and user.input[0] == node.output[0] for user in function.node
    )


BODY_MISTAKES: list[Plant] = [strict_causal_mask, stale_cache_row, page_border_one_token_late]


@pytest.mark.parametrize("mistake", [*BODY_MISTAKES, rope_not_rotated], ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_a_body_of_the_rewritten_model_is_caught(mistake: Plant) -> None:
    report = checked(CONFIG, rewritten_body=mistake)
    assert not report.passed
    assert not report.rewrite_max_error <= 1e-3


@pytest.mark.parametrize("mistake", BODY_MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_a_body_of_the_written_model_is_caught_by_its_reference(mistake: Plant) -> None:
    report = checked(replace(CONFIG, layers=1), written_body=mistake)
    assert not report.passed
    assert any("MlaAttention 'attention.0' differs from its reference" in line for line in report.failures)
    assert report.rewrite_max_error < 1e-5


def smallest_scores_selected(model: onnx.ModelProto) -> None:
    chosen = next(node for node in body(model).node if node.op_type == "TopK")
    (largest,) = (attribute for attribute in chosen.attribute if attribute.name == "largest")
    largest.i = 0


@pytest.mark.parametrize("mistake", [*BODY_MISTAKES, smallest_scores_selected], ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_a_sparse_body_is_caught(mistake: Plant) -> None:
    report = checked(SPARSE, rewritten_body=mistake)
    assert any("differs from the original" in line or "not finite" in line for line in report.failures)
    report = checked(replace(SPARSE, layers=1), written_body=mistake)
    assert any("MlaSparseAttention 'attention.0' differs from its reference" in line for line in report.failures)


def test_errors_of_an_export_that_rounds_activations_are_stated_but_not_judged() -> None:
    written = lowered(CONFIG)
    wrong_scale(written)
    attach_functions(written)
    rewritten = retarget(written, "f32", "f32", 4)
    report = verify(original(CONFIG), interface(CONFIG), rewritten, written, judged=False)
    assert report.passed
    assert not report.judged
    assert report.rewrite_max_error > report.tolerance


def test_a_lowered_model_that_does_not_run_fails() -> None:
    written = lowered(CONFIG)
    broken = copy_of(written)
    next(tensor for tensor in broken.graph.initializer if tensor.name == "o.0").dims[:] = [
        CONFIG.hidden,
        CONFIG.num_heads * CONFIG.v_head_dim,
    ]
    report = verify(original(CONFIG), interface(CONFIG), broken, written)
    assert not report.passed
    assert "ONNX Runtime cannot" in report.failures[0]


def test_an_export_of_half_precision_is_compared_in_float32() -> None:
    halves = {TensorProto.FLOAT: TensorProto.FLOAT16}
    config = replace(CONFIG, scale=0.3125, sinks=False)  # the scale is the same in half precision
    export, written = original(config), lowered(config, row_format="bf16")
    for model in (export, written):
        for tensor in model.graph.initializer:
            is_rope_table = list(tensor.dims[:1]) == [config.positions]
            if tensor.data_type == TensorProto.FLOAT and not is_rope_table:
                values = numpy_helper.to_array(tensor).astype(np.float16)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        for value in (*model.graph.input, *model.graph.output):
            kind = value.type.tensor_type
            kind.elem_type = halves.get(kind.elem_type, kind.elem_type)
    report = verify(export, interface(config), retarget(written, "f32", "f32", 4), written)
    assert report.tolerance == 1e-3
    assert report.failures == ()
    assert report.rewrite_max_error < 1e-5


def test_selections_are_shown_and_forced() -> None:
    model = lowered(SPARSE)
    assert top_k(model) == 6
    assert top_k(lowered(CONFIG)) is None
    shown, names = show_selection(model)
    forced, inputs, own = force_selection(model)
    assert names == own == ["indices.0", "indices.1"]
    tokens = np.random.default_rng(0).integers(0, SPARSE.vocabulary, 12)
    engine = OnnxRuntimeEngine(shown, pages=6)
    session = Session(engine)
    selected = session.step({session.create(): tokens})[0]
    given = {name: selected[shown_name] for name, shown_name in zip(inputs, names, strict=True)}
    assert (selected["indices.0"][3] == [0, 1, 2, 3, -1, -1]).all()

    free = Session(forced, pages=6)
    same = free.step({free.create(): tokens}, extra_inputs=given)[0]
    np.testing.assert_allclose(same["logits"], selected["logits"], atol=1e-5)
    latest = {name: np.where(rows >= 0, rows, -1)[:, ::-1].copy() for name, rows in given.items()}
    for rows in latest.values():
        rows[:, 1:] = -1
    changed = Session(forced, pages=6)
    other = changed.step({changed.create(): tokens}, extra_inputs=latest)[0]
    assert np.abs(other["logits"] - selected["logits"]).max() > 0.01


def test_overlaps_are_of_full_lists_only() -> None:
    expected = np.array([[0, 1, 2], [0, 1, -1], [3, 4, 5]])
    actual = np.array([[0, 1, 2], [0, 1, -1], [1, 4, 5]])
    assert overlaps(expected, actual) == [1.0, 2 / 3]


def test_values_on_the_border_of_two_codes_are_excused_if_few() -> None:
    expected = np.linspace(0.1, 1, 500, dtype=np.float32)
    one_apart = expected.copy()
    one_apart[7] *= 1.1
    assert rows_difference(one_apart, expected, 1 / 8) < OPS_TOLERANCE
    assert rows_difference(one_apart, expected, 0.0) > OPS_TOLERANCE
    assert rows_difference(expected * 1.1, expected, 1 / 8) > OPS_TOLERANCE
    far = expected.copy()
    far[7] *= 2
    assert rows_difference(far, expected, 1 / 8) > OPS_TOLERANCE
    assert relative_error(np.array([np.nan, 1]), np.array([np.nan, 1])) == 0
    assert relative_error(np.array([np.nan, 1]), np.array([0.0, 1])) == math.inf
    assert relative_error(np.array([0.0, 1]), np.array([-np.inf, 1])) == math.inf


def test_cases_are_cut_to_what_the_original_accepts() -> None:
    short = TOGETHER.within(Limits(1, 1, 1, 5))
    assert max(sum(counts) for counts in short.chunks().values()) == 5
    assert all(sum(count for _, count in step.new) for step in short.steps)
    late = ALONE.within(Limits(9, 1, 9, 64))
    assert late.chunks()["a"][0] == 9
    tiny = FORKED.within(Limits(1, 1, 1, 1))
    assert list(tiny.chunks()) == ["a", "b"]
    assert max(sum(counts) for counts in beyond_top_k(30).chunks().values()) > 40


def test_each_op_agrees_with_its_reference() -> None:
    for config in (CONFIG, SPARSE):
        results = check_ops(lowered(config, **WRITTEN))  # type: ignore[arg-type]
        assert {result.op for result in results} == {
            "MlaPlan",
            "MlaSparseAttention" if config.top_k else "MlaAttention",
        }
        assert all(result.error <= OPS_TOLERANCE for result in results)


@needs_exports
@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v3__dynamo_op20__eager__dec",
        "deepseek_v3__optimum0.1.0_tf4.57.6_op17__sdpa__dec__fp16",
        "deepseek_v3_attnonly__dynamo_op23__sdpa__dec",
        "deepseek_v32__dynamo_op23__sdpa__dec",
        "dsref_v3_absorb__ts_op17__ref__dec__io_realrope",
        "glm_moe_dsa__ts_op17__sdpa__dec",
        "kimi_linear__dynamo_op20__eager__dec",
        "packed2d_absorb_cat__dynamo_op20__hand__dec",
    ],
)
def test_lowered_exports_pass(name: str, tmp_path: Path) -> None:
    export = load(name)
    written = lower(copy_of(export), LowerOptions()).model
    path = tmp_path / "export.onnx"
    onnx.save(export, path)
    report = verify(path, interface_of(export), retarget(written, "f32", "f32", 4), written)
    assert report.failures == ()
    assert report.rewrite_max_error < 1e-4


@needs_exports
@pytest.mark.parametrize("name", ["deepseek_v3__dynamo_op23__sdpa__dec1__s1", "glm_moe_dsa__dynamo_op20__eager__dec"])
def test_a_slightly_wrong_scale_in_a_lowered_export_is_caught(name: str) -> None:
    export = load(name)
    written = lower(copy_of(export), LowerOptions()).model
    nodes = [node for node in written.graph.node if node.op_type in ("MlaAttention", "MlaSparseAttention")]
    (scale,) = (attribute for attribute in nodes[-1].attribute if attribute.name == "softmax_scale")
    set_attribute(nodes[-1], "softmax_scale", scale.f * 1.01)
    attach_functions(written)
    report = verify(export, interface_of(export), retarget(written, "f32", "f32", 4), written)
    assert any("differs from the original" in line for line in report.failures)
