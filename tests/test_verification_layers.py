"""Verification a layer at a time passes what is right, catches what is planted, and loads one layer only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import Config, original

from mla_trt import pipeline
from mla_trt.cli import main
from mla_trt.layer_plan import LayerPlan
from mla_trt.loading import ModelOnDisk, load_model
from mla_trt.lowering import Lowered, LowerOptions, lower
from mla_trt.ops import attach_functions
from mla_trt.verification.cutting import CannotCutError, Cutter, Output, Start
from mla_trt.verification.layers import COPIES, half_of_memory, memory_needed, verify_layers
from mla_trt.verification.original import OriginalModel
from mla_trt.verification.verify import VerificationReport
from mla_trt.verification.weights import compare_attentions, has_quantised_weights

EXAMPLES = Path(__file__).resolve().parent.parent / "models" / "examples"
EXPORT = "deepseek_v3__dynamo_op20__eager__dec"
# W_UK and W_UV of equal sizes, so that they can be mixed up.
CONFIG = Config(v_head_dim=10)

Plant = Callable[[onnx.ModelProto], None]


def by_layers(
    export: onnx.ModelProto, plant: Plant | None = None, options: LowerOptions | None = None
) -> VerificationReport:
    """Lowers an export in memory and verifies its layers, with a mistake in the lowered model."""
    again = onnx.ModelProto.FromString(export.SerializeToString())
    lowered = lower(again, options or LowerOptions(), plan=True)
    if plant is not None:
        plant(lowered.model)
        attach_functions(lowered.model)
    return compared(export, lowered)


def compared(export: onnx.ModelProto, lowered: Lowered) -> VerificationReport:
    assert lowered.plan is not None
    model = ModelOnDisk(lowered.model, None)
    return verify_layers(ModelOnDisk(export, None), lowered.interface, lowered.plan, model, model)


TWO_LAYERS = ["layer 0", "layer 1", "before layer 0", "after layer 0", "after layer 1"]


def parts(report: VerificationReport) -> list[str]:
    return list(dict.fromkeys(case.name.split(":")[0] for case in report.cases))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (EXPORT, TWO_LAYERS),
        ("deepseek_v3__dynamo_op20__sdpa__dec__post_ort_extended", TWO_LAYERS),
        ("deepseek_v3__optimum0.1.0_tf4.57.6_op17__sdpa__dec__fp16", TWO_LAYERS),
        ("dsref_v3_absorb__ts_op17__ref__dec__io_realrope", TWO_LAYERS),
        ("glm_moe_dsa__dynamo_op23__sdpa__dec", TWO_LAYERS),
        ("packed2d_absorb_cat__dynamo_op20__hand__dec", ["layer 0", "after layer 0"]),
    ],
)
def test_the_parts_of_an_export_pass(name: str, expected: list[str]) -> None:
    report = by_layers(onnx.load(EXAMPLES / f"{name}.onnx"))
    assert report.failures == ()
    assert report.mode == "layers"
    assert report.rewrite_max_error < 1e-5
    assert parts(report) == expected
    assert all(case.tokens for case in report.cases)
    assert report.notes == ()
    # Layers of one kind share the ops' bodies, which need to be checked but once.
    assert len({result.op for result in report.ops}) == len(report.ops)


def test_layers_that_share_a_selection_are_cut_together() -> None:
    export = onnx.load(EXAMPLES / "deepseek_v32__dynamo_op20__eager__dec.onnx")
    again = onnx.ModelProto.FromString(export.SerializeToString())
    lowered = lower(again, LowerOptions(), plan=True)
    assert lowered.plan is not None
    (first,), (second,) = lowered.plan.groups
    joined = LayerPlan(((first, second),), lowered.plan.axes)
    model = ModelOnDisk(lowered.model, None)
    report = verify_layers(ModelOnDisk(export, None), lowered.interface, joined, model, model)
    assert report.passed
    assert parts(report) == ["layer 0, 1"]
    assert len(report.notes) == 3
    assert report.notes[0] == "not run: what is before layer 0: it has no borders"


def attention(model: onnx.ModelProto, layer: int) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == f"mla_attention.{layer}")


def wrong_scale(model: onnx.ModelProto) -> None:
    (scale,) = (entry for entry in attention(model, 1).attribute if entry.name == "softmax_scale")
    scale.f *= 1.01


def keys_and_values_mixed(model: onnx.ModelProto) -> None:
    node = attention(model, 0)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    up, down = (weights[node.input[index]] for index in (7, 9))
    values = [numpy_helper.to_array(tensor).transpose(0, 2, 1).copy() for tensor in (up, down)]
    up.CopyFrom(numpy_helper.from_array(values[1], up.name))
    down.CopyFrom(numpy_helper.from_array(values[0], down.name))


def norm_of_another_layer(model: onnx.ModelProto) -> None:
    attention(model, 1).input[3] = attention(model, 0).input[3]


def mixed_rope_layout(model: onnx.ModelProto) -> None:
    (layout,) = (entry for entry in attention(model, 0).attribute if entry.name == "rope_interleaved")
    layout.i = 1 - layout.i


def latent_of_other_features(model: onnx.ModelProto) -> None:
    """The op reads its latent one place further on."""
    name = attention(model, 1).input[1]
    maker = next(node for node in model.graph.node if name in node.output)
    bounds = {tensor.name: tensor for tensor in model.graph.initializer}
    for place in (1, 2):
        shifted = numpy_helper.to_array(bounds[maker.input[place]]) + 1
        model.graph.initializer.append(numpy_helper.from_array(shifted, f"shifted.{place}"))
        maker.input[place] = f"shifted.{place}"


def output_weights_of_another_layer(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.input[:] = [{"o.0": "o.1", "o.1": "o.0"}.get(name, name) for name in node.input]


def tokens_mixed(model: onnx.ModelProto) -> None:
    """The result of the last layer goes to the next token."""
    reader = next(node for node in model.graph.node if "lm_head" in node.input)
    model.graph.node.append(helper.make_node("CumSum", [reader.input[0], "second"], ["mixed"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(1), "second"))
    reader.input[0] = "mixed"
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    place = next(place for place, node in enumerate(nodes) if "lm_head" in node.input)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], nodes[-1], *nodes[place:-1]])


@pytest.mark.parametrize(
    ("mistake", "place"),
    [
        (wrong_scale, "layer 1"),
        (keys_and_values_mixed, "layer 0"),
        (norm_of_another_layer, "layer 1"),
        (mixed_rope_layout, "layer 0"),
        (latent_of_other_features, "layer 1"),
        (output_weights_of_another_layer, "after layer 0"),
        (tokens_mixed, "after layer 1"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_mistake_in_the_whole_model_is_caught_where_it_is(mistake: Plant, place: str) -> None:
    report = by_layers(original(CONFIG), mistake)
    assert not report.passed
    assert report.failures[0].startswith(f"{place}: ")
    assert all("differs from the original" in line for line in report.failures)


def test_a_right_model_made_by_hand_passes() -> None:
    report = by_layers(original(CONFIG), options=LowerOptions(kv_format="bf16"))
    assert report.failures == ()
    assert parts(report) == TWO_LAYERS


def test_what_does_not_fit_in_memory_is_named() -> None:
    export = original(CONFIG)
    lowered = lower(onnx.ModelProto.FromString(export.SerializeToString()), LowerOptions(), plan=True)
    assert lowered.plan is not None
    model = ModelOnDisk(lowered.model, None)
    report = verify_layers(
        ModelOnDisk(export, None), lowered.interface, lowered.plan, model, model, memory=COPIES * 4 * 2000
    )
    assert report.passed
    assert parts(report) == ["layer 0", "layer 1", "before layer 0", "after layer 0"]
    assert report.notes == ("not run: what is after layer 1: it needs 0.0 GiB",)


def test_only_the_weights_of_the_layer_are_in_its_part() -> None:
    export = original(CONFIG)
    lowered = lower(onnx.ModelProto.FromString(export.SerializeToString()), LowerOptions(), plan=True)
    assert lowered.plan is not None
    (part,) = lowered.plan.groups[1]
    begin, way_out = part.beginnings[0], part.exits[0]
    cutter = Cutter(export, axes=lowered.plan.axes, tokens="input_ids", caches=["past_latent.0", "past_latent.1"])
    start = Start(begin.name, begin.dtype, ((begin.name, begin.axes),), ("B", "S"))
    caches = {f"past_{kind}.{layer}": f"present_{kind}.{layer}" for kind in ("latent", "rope") for layer in (0, 1)}
    taken = cutter.take([way_out.name], start, grown=caches)
    assert taken.inputs == {"position_ids", "past_latent.1", "past_rope.1"}
    weights = {name for name in taken.initializers if not name.startswith("constant_")}
    assert weights == {"q.1", "kv_a.1", "kv_norm.1", "kv_b.1"}
    model = cutter.build(taken, start, {"result": Output(way_out.name, way_out.width)}, ["present_latent.1"])
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model), full_check=False)
    # How many tokens there are and how many are cached was read off the ids and off the first layer's cache.
    assert {value.name for value in model.graph.input} == {begin.name, "position_ids", "past_latent.1", "past_rope.1"}


def test_what_depends_on_the_tokens_in_another_way_cannot_be_cut() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Cast", ["ids"], ["bias"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["bias", "two"], ["column"]),
        helper.make_node("Add", ["x", "column"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "biased",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["B", "S"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "S", 4])],
        [numpy_helper.from_array(np.zeros((8, 4), np.float32), "table"), numpy_helper.from_array(np.array([2]), "two")],
    )
    cutter = Cutter(helper.make_model(graph), axes={}, tokens="ids", caches=[])
    with pytest.raises(CannotCutError, match="depends on the tokens otherwise than through 'x'"):
        cutter.take(["y"], Start("x", TensorProto.FLOAT, (("x", ("B", "S", 4)),), ("B", "S")))


def test_memory_is_reckoned_from_the_weights_as_float32(tmp_path: Path) -> None:
    tensors = [
        numpy_helper.from_array(np.zeros((100, 10), np.float32), "wide"),
        numpy_helper.from_array(np.zeros((100, 10), np.float16), "half"),
        helper.make_tensor("packed", TensorProto.INT4, [10], list(range(-5, 5))),
    ]
    graph = helper.make_graph([helper.make_node("Identity", ["wide"], ["y"])], "weights", [], [], tensors)
    model = helper.make_model(graph)
    assert memory_needed(model) == COPIES * (4000 + 4000 + 5)
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    assert memory_needed(onnx.load(tmp_path / "m.onnx", load_external_data=False)) == memory_needed(model)
    assert half_of_memory() > 1 << 28


def test_the_command_verifies_a_layer_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = EXAMPLES / f"{EXPORT}.onnx"
    output = tmp_path / "lowered"
    assert main(["lower", str(path), "-o", str(output), "--verify-memory", "1M", "--weights", "fp8"]) == 0
    assert "verification a layer at a time: passed" in capsys.readouterr().out
    assert json.loads((output / "report.json").read_text())["verification"]["mode"] == "layers"
    assert main(["verify", str(path), str(output), "--verify-memory", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mode"] == "layers"
    assert main(["verify", str(path), str(output), "--verify-memory", "2.5 GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mode"] == "whole"
    assert main(["verify", str(path), str(output), "--verify-memory", "much"]) == 2
    assert "--verify-memory is 'much'" in capsys.readouterr().err


def test_external_weights_of_export_and_lowered_model_are_found(tmp_path: Path) -> None:
    path = tmp_path / "export" / "model.onnx"
    path.parent.mkdir()
    onnx.save_model(onnx.load(EXAMPLES / f"{EXPORT}.onnx"), path, save_as_external_data=True, size_threshold=0)
    output = tmp_path / "lowered"
    for memory, weights in (("0", "fp8"), ("8G", "fp8"), ("0", "keep")):
        options = ["--verify-memory", memory, "--quiet"]
        assert main(["lower", str(path), "-o", str(output), "--weights", weights, *options]) == 0
        assert main(["verify", str(path), str(output), *options]) == 0


def test_quantised_weights_are_compared_with_those_of_the_export() -> None:
    exact, written = (
        lower(original(CONFIG), LowerOptions(weights=weights, kv_format="bf16")).model for weights in ("keep", "fp8")
    )
    assert has_quantised_weights(written)
    assert not has_quantised_weights(exact)
    assert compare_attentions(ModelOnDisk(exact, None), ModelOnDisk(written, None)) == []
    node = attention(written, 1)
    node.input[7], node.input[8] = attention(written, 0).input[7], attention(written, 0).input[8]
    assert compare_attentions(ModelOnDisk(exact, None), ModelOnDisk(written, None)) == [
        "'w_uk' of MlaAttention 'mla_attention.1' differs from the weights as exported"
    ]
    wrong_scale(written)
    assert "other attributes" in compare_attentions(ModelOnDisk(exact, None), ModelOnDisk(written, None))[0]


def fixed_past(config: Config, cached: int) -> onnx.ModelProto:
    """The export with a fixed number of cached tokens. It has no mask to hide any."""
    model = original(config)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "P":
                dim.dim_value = cached
    return model


@pytest.mark.parametrize(("layers", "mode"), [(1, "whole"), (2, "layers")])
def test_layers_that_cannot_begin_with_an_empty_cache_are_given_their_rows(
    layers: int, mode: str, tmp_path: Path
) -> None:
    path, output = tmp_path / "export.onnx", tmp_path / "lowered"
    onnx.save(fixed_past(Config(layers=layers), 7), path)
    assert main(["lower", str(path), "-o", str(output), "--quiet"]) == 0
    verification = json.loads((output / "report.json").read_text())["verification"]
    assert verification["mode"] == mode
    assert verification["rewrite_max_error"] < 1e-5
    assert any("exactly 7 cached tokens" in note for note in verification["notes"])
    assert all(case["tokens"] for case in verification["cases"])


def test_an_export_that_cannot_be_driven_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(OriginalModel, "_makes_rows_alone", lambda *_: False)
    path, output = tmp_path / "export.onnx", tmp_path / "lowered"
    onnx.save(fixed_past(Config(layers=1), 7), path)
    assert main(["lower", str(path), "-o", str(output), "--quiet"]) == 4
    message = capsys.readouterr().err
    assert "exactly 7 cached tokens" in message
    assert "--no-verify" in message
    assert not output.exists()
    assert main(["lower", str(path), "-o", str(output), "--quiet", "--no-verify"]) == 0


def test_a_layer_that_cannot_be_cut_fails_with_a_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def uncut(*_: object, **__: object) -> None:
        raise CannotCutError("it is tied up")

    monkeypatch.setattr(Cutter, "take", uncut)
    loaded = load_model(EXAMPLES / f"{EXPORT}.onnx")
    options = LowerOptions()
    lowered = lower(load_model(loaded.path).proto, options, plan=True)
    report = pipeline.verify_models(loaded, lowered, options)
    assert len(report.failures) == 2
    assert report.failures[0].startswith("layer 0: the layer cannot be cut out of the model: it is tied up")
    assert "--verify-memory" in report.failures[0]
    assert report.to_json()["rewrite_tolerance"] is None
