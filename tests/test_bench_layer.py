"""`mla-trt bench layer` on ONNX Runtime in place of TensorRT, at small dimensions."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx import TensorProto

from mla_trt.bench import layer as bench_layer
from mla_trt.bench.layer import CASES, measure_case
from mla_trt.bench.layer_forms import Runnable, lowered_layer
from mla_trt.bench.layer_report import FormResult, Machine, markdown, write_results
from mla_trt.bench.layer_step import (
    ABSORBED,
    EXPORTED,
    GROWING,
    INDEX_CACHE,
    KV_CACHE,
    SPARSE,
    LayerCase,
    LayerStep,
    query_terms_of,
    references,
    row_format_of,
    sparse_errors,
    weights_of,
)
from mla_trt.cli import main
from mla_trt.engines.coded_weights import encode
from mla_trt.engines.engine_onnxruntime import OnnxRuntimeEngine
from mla_trt.loading import load_model
from mla_trt.lowering import LowerOptions
from mla_trt.metadata import LoweredMetadata
from mla_trt.models.attention_layer import (
    LayerDimensions,
    LayerWeights,
    absorbed_layer,
    exported_layer,
    random_weights,
    save_layer,
)
from mla_trt.passes.legalize import illegal_nodes
from mla_trt.pipeline import lower_file
from mla_trt.signals import Ended

SMALL = LayerDimensions(hidden=48, heads=4, query_rank=40, rank=32, nope=24, rope=16, value=20)
CASE = LayerCase(batch=3, keys=150)
INDEXED = replace(SMALL, index_heads=4, index_dim=32, top_k=24)
NO_COPIES = np.zeros((0, 2), np.int32)


class OnEngine:
    """A form on ONNX Runtime; a step takes 8 us."""

    def __init__(
        self, inputs: Mapping[str, np.ndarray], step: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    ) -> None:
        self.values = dict(inputs)
        self.step = step
        self.closed = self.recorded = False

    def run(self) -> None:
        self.values |= self.step(self.values)

    def record(self) -> None:
        self.recorded = True

    def time(self, launches: int) -> float:
        assert self.recorded
        assert launches >= 1
        return 8.0

    def read(self, name: str) -> np.ndarray:
        return self.values[name]

    def write(self, name: str, values: np.ndarray, start: int) -> None:
        self.values[name].reshape(-1)[start : start + values.size] = values

    def close(self) -> None:
        self.closed = True


class Forms:
    """Builds the forms; `spoil` changes the inputs of one."""

    def __init__(self, folder: Path, weights: LayerWeights) -> None:
        self.folder, self.weights = folder, weights
        self.made: list[OnEngine] = []
        self.spoil: Callable[[str, dict[str, np.ndarray]], None] = lambda form, inputs: None

    def build(self, form: str, name: str, step: LayerStep) -> tuple[OnEngine, float]:
        batch, keys = step.case.batch, step.case.keys
        if form == EXPORTED:
            inputs = step.for_exported()
            run = self._on_onnxruntime(exported_layer(SMALL, self.weights, batch=batch, new=1, past=keys - 1))
        elif form in (ABSORBED, GROWING):
            grows = form == GROWING
            inputs = step.for_growing() if grows else step.for_absorbed()
            run = self._on_onnxruntime(absorbed_layer(SMALL, self.weights, batch=batch, total=keys, grows=grows))
        else:
            row_format, sparse = row_format_of(form), form.startswith(SPARSE)
            inputs = step.for_sparse(row_format) if sparse else step.for_lowered(row_format)
            dimensions = INDEXED if sparse else SMALL
            path = lowered_layer(self.folder, row_format, dimensions, self.weights) / "model.onnx"
            engine = OnnxRuntimeEngine(path, pages=step.pages)

            def run(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
                for cache in (KV_CACHE, INDEX_CACHE) if sparse else (KV_CACHE,):
                    engine.write_pages(cache, values[cache])
                names = ("hidden_states", "cos", "sin", "query_offsets", "cache_lengths", "block_table")
                return engine.run({name: values[name] for name in names}, NO_COPIES)

        self.spoil(form, inputs)
        self.made.append(OnEngine(inputs, run))
        return self.made[-1], 1.0

    @staticmethod
    def _on_onnxruntime(model: onnx.ModelProto) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        names, inputs = [entry.name for entry in session.get_outputs()], [entry.name for entry in session.get_inputs()]
        return lambda values: dict(zip(names, session.run(None, {name: values[name] for name in inputs}), strict=True))


@pytest.fixture
def forms(tmp_path: Path) -> Forms:
    return Forms(tmp_path, random_weights(SMALL, TensorProto.FLOAT))


def measured(forms: Forms, row_formats: tuple[str, ...]) -> dict[str, FormResult]:
    step = LayerStep(SMALL, CASE, TensorProto.FLOAT, row_format_of(row_formats[0]))
    names = [EXPORTED, GROWING, ABSORBED, *(f"ours {row_format}" for row_format in row_formats)]
    results = measure_case("small", step, names, forms.build, references(step, forms.weights.arrays), 1e12)
    return {result.form: result for result in results}


@pytest.mark.parametrize("row_formats", [("f32",), ("fp8", "f32"), ("bf16", "fp8_ds_mla")])
def test_all_forms_compute_the_same(forms: Forms, row_formats: tuple[str, ...]) -> None:
    results = measured(forms, row_formats)
    for form in (EXPORTED, ABSORBED):
        assert results[form].error is not None
        assert results[form].error < 1e-5
    first = results[f"ours {row_formats[0]}"]
    # The new token's row alone is rounded otherwise.
    assert first.error is not None
    assert first.error < (1e-5 if row_formats[0] == "f32" else 5e-3)
    assert first.us == 8.0
    assert all(engine.closed for engine in forms.made)


@pytest.mark.parametrize(("allowed", "wrong"), [(1e-5, True), (1e-1, False)])
def test_one_query_term_may_be_less_exact(
    forms: Forms, monkeypatch: pytest.MonkeyPatch, allowed: float, wrong: bool
) -> None:
    monkeypatch.setattr(bench_layer, "ONE_TERM_TOLERANCE", allowed)
    results = measured(forms, ("fp8", "fp8:1"))
    assert results["ours fp8"].us == 8.0
    assert results["ours fp8:1"].note.startswith("wrong") == wrong
    assert results["ours fp8:1"].us == (None if wrong else 8.0)


def measured_with_an_indexer(
    folder: Path, row_format: str, spoil: Callable[[np.ndarray], None] | None = None
) -> FormResult:
    forms = Forms(folder, random_weights(INDEXED, TensorProto.FLOAT))
    if spoil is not None:
        forms.spoil = lambda form, inputs: spoil(inputs[INDEX_CACHE]) if form.startswith(SPARSE) else None
    step = LayerStep(INDEXED, replace(CASE, sparse=True), TensorProto.FLOAT, row_format)
    errors = sparse_errors(step, forms.weights.arrays)
    reference = references(step, forms.weights.arrays)
    names = [f"ours {row_format}", f"{SPARSE} {row_format}"]
    dense, sparse = measure_case("small", step, names, forms.build, reference, 1e12, sparse_error=errors)
    assert dense.us == 8.0
    assert dense.of_copy is not None
    return sparse


@pytest.mark.parametrize("row_format", ["f32", "fp8"])
def test_the_layer_with_an_indexer_attends_to_what_the_reference_selects(row_format: str, tmp_path: Path) -> None:
    result = measured_with_an_indexer(tmp_path, row_format)
    assert result.error is not None
    assert result.error < (1e-5 if row_format == "f32" else 2e-2)
    assert result.us == 8.0


def test_another_selection_has_no_figure(tmp_path: Path) -> None:
    def spoil(pool: np.ndarray) -> None:
        pool[:] = np.roll(pool, 1, axis=0)

    assert measured_with_an_indexer(tmp_path, "f32", spoil).note.startswith("wrong: error inf")


@pytest.mark.parametrize(
    ("form", "name"),
    [(EXPORTED, "past_rope"), (ABSORBED, "cache"), ("ours f32", KV_CACHE), ("ours f32", "block_table")],
)
def test_a_wrong_engine_has_no_figure(forms: Forms, form: str, name: str) -> None:
    def spoil(built: str, inputs: dict[str, np.ndarray]) -> None:
        if built == form:
            inputs[name] = np.roll(inputs[name], 1, axis=-1)

    forms.spoil = spoil
    results = measured(forms, ("f32",))
    assert results[form].note.startswith("wrong: error")
    assert [result.form for result in results.values() if result.us is None] == [form]


def test_forms_with_figures_are_looked_at_when_all_are_measured(forms: Forms) -> None:
    forms.spoil = lambda form, inputs: inputs.update(cache=-inputs["cache"]) if form == ABSORBED else None
    step = LayerStep(SMALL, CASE, TensorProto.FLOAT, "f32")
    reference, seen = references(step, forms.weights.arrays), []

    def look(form: str, engine: Runnable) -> None:
        assert isinstance(engine, OnEngine)
        assert engine.recorded
        assert not any(made.closed for made in forms.made)
        seen.append(form)

    names = [EXPORTED, ABSORBED, "ours f32"]
    measure_case("small", step, names, forms.build, reference, 1e12, look=look)
    assert seen == [EXPORTED, "ours f32"]


def test_a_sequence_between_the_checked_ones_is_compared_with_the_absorbed_form(forms: Forms) -> None:
    def spoil(built: str, inputs: dict[str, np.ndarray]) -> None:
        if built == "ours f32":
            inputs["block_table"][1] = inputs["block_table"][1, ::-1]
            inputs["block_table"][1, -1] = inputs["block_table"][2, -1]

    forms.spoil = spoil
    assert measured(forms, ("f32",))["ours f32"].note.startswith("wrong: error")


def test_what_is_too_large_for_tensorrt_is_said(forms: Forms, monkeypatch: pytest.MonkeyPatch) -> None:
    expanded = CASE.batch * CASE.keys * SMALL.heads * (SMALL.nope + SMALL.value)
    monkeypatch.setattr(bench_layer, "TENSOR_LIMIT", expanded - 1)
    results = measured(forms, ("f32",))
    assert results[EXPORTED].note.startswith(f"not run: a tensor of {expanded} elements")
    assert results["ours f32"].us == 8.0


def test_the_exported_form_fits_where_it_is_compared() -> None:
    full = LayerDimensions()
    fits = {
        name: case.batch * case.keys * full.heads * (full.nope + full.value) <= bench_layer.TENSOR_LIMIT
        for name, case in CASES.items()
    }
    assert fits == {"b16-4k": True, "b128-4k": False, "b4-32k": False, "b1-32k": True, "b64-128k": False}
    assert sum(int(np.prod(shape)) for shape in full.weight_shapes().values()) == 187_107_328


@pytest.mark.parametrize("dimensions", [SMALL, INDEXED], ids=["dense", "with an indexer"])
def test_the_exported_form_is_lowered_and_verified(dimensions: LayerDimensions, tmp_path: Path) -> None:
    weights = random_weights(dimensions, TensorProto.FLOAT)
    export = save_layer(exported_layer(dimensions, weights), tmp_path / "export.onnx")
    report = lower_file(export, tmp_path / "lowered", LowerOptions(kv_format="fp8"))
    assert report.matched == 1
    assert report.verification is not None
    assert report.verification["passed"]


def test_tensorrt_knows_every_op_of_the_peers() -> None:
    weights = random_weights(SMALL, TensorProto.BFLOAT16)
    for model in (
        exported_layer(SMALL, weights, batch=2, new=1, past=4),
        absorbed_layer(SMALL, weights, batch=2, total=5),
        absorbed_layer(SMALL, weights, batch=2, total=5, grows=True),
    ):
        assert illegal_nodes(gs.import_onnx(model), "tensorrt-10.6") == []
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        for value in (*inferred.graph.value_info, *inferred.graph.output):
            assert all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim), value.name


def test_in_bfloat16_the_weights_lie_in_one_file(tmp_path: Path) -> None:
    weights = random_weights(SMALL, TensorProto.BFLOAT16, tmp_path / "layer.data")
    for model in (exported_layer(SMALL, weights), absorbed_layer(SMALL, weights, batch=2, total=5)):
        path = save_layer(model, tmp_path / "model.onnx")
        onnx.checker.check_model(path, full_check=True)
        loaded = onnx.load(path)
        for tensor in loaded.graph.initializer:
            if tensor.name in weights.arrays:
                found = onnx.numpy_helper.to_array(tensor)
                assert np.array_equal(found.view(np.uint16), weights.arrays[tensor.name].view(np.uint16))
    lowered = load_model(lowered_layer(tmp_path, "fp8", SMALL, weights) / "model.onnx").proto
    assert LoweredMetadata.of(lowered).token_input == "hidden_states"
    assert {value.type.tensor_type.elem_type for value in lowered.graph.input} == {
        TensorProto.BFLOAT16,
        TensorProto.INT32,
    }


def test_weights_of_codes_are_the_same_codes_again() -> None:
    """So all forms compute with what ours reads as codes. Blocks of small weights are larger than these."""
    dimensions = replace(SMALL, hidden=136, query_rank=264)
    weights = random_weights(dimensions, TensorProto.BFLOAT16, of_codes=True)
    for name, shape in dimensions.weight_shapes().items():
        values = weights.arrays[name]
        if len(shape) == 1:
            continue
        encoded = encode(values)
        assert encoded is not None
        codes, scales = encoded
        factors = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: shape[0], : shape[1]]
        # as near as bf16 holds them; other values are up to 2^-4 from their codes
        np.testing.assert_allclose(codes.astype("f4") * factors, values.astype("f4"), rtol=2**-7, err_msg=name)
        assert len(np.unique(np.abs(codes.astype(np.float32)))) > 30, name


def test_a_form_says_which_weights_it_has() -> None:
    step = LayerStep(LayerDimensions(), LayerCase(1, 256), TensorProto.BFLOAT16, "fp8")
    kept, coded = "ours fp8:1", "ours fp8:1/fp8"
    for form, weights in ((kept, "keep"), (coded, "fp8"), (GROWING, "keep")):
        assert weights_of(form) == weights
    assert (row_format_of(coded), query_terms_of(coded)) == ("fp8", 1)
    assert step.least_bytes(kept) - step.least_bytes(coded) == 187_107_328


def test_weights_in_e4m3_are_lowered_as_codes(tmp_path: Path) -> None:
    weights = random_weights(SMALL, TensorProto.FLOAT, of_codes=True)
    lowered = load_model(lowered_layer(tmp_path, "fp8", SMALL, weights, "fp8") / "model.onnx").proto
    kinds = [weight.data_type for weight in lowered.graph.initializer]
    assert kinds.count(TensorProto.FLOAT8E4M3FN) == 2  # W_UK and W_UV
    kept = load_model(lowered_layer(tmp_path, "fp8", SMALL, weights) / "model.onnx").proto
    assert all(weight.data_type != TensorProto.FLOAT8E4M3FN for weight in kept.graph.initializer)


MACHINE = Machine("NVIDIA H200", 4.29e12, "10.6.0", "mla-trt bench layer")
RESULTS = [
    FormResult("b16-4k", 16, 4088, EXPORTED, 1e-3, 21000.0, 0.01, 0.01, 9.0),
    FormResult("b16-4k", 16, 4088, ABSORBED, 1e-3, 500.0, 0.01, 0.3, 9.0),
    FormResult("b16-4k", 16, 4088, "ours fp8", 1e-3, 200.0, 0.02, 0.6, 5.0),
    FormResult("b128-4k", 128, 4096, EXPORTED, note="not run: a | b"),
    FormResult("b128-4k", 128, 4096, "ours fp8", 1e-3, 1000.0, 0.02, 0.6, 5.0),
]


def test_the_table() -> None:
    rows = markdown(MACHINE, RESULTS).splitlines()
    assert rows[0] == "    mla-trt bench layer"
    assert rows[2].startswith("NVIDIA H200, copy 4.29 TB/s, TensorRT 10.6.0.")
    assert rows[6] == "| b16-4k | 4088 | as exported | 21000 | 1.0% | 1% | 1.0e-03 | 9.0 | 105.00 |"
    assert rows[8] == "| b16-4k | 4088 | ours fp8 | 200 | 2.0% | 60% | 1.0e-03 | 5.0 |  |"
    assert rows[9] == "| b128-4k | 4096 | as exported | not run: a \\| b |  |  |  |  |  |"
    assert {row.replace("\\|", "").count("|") for row in rows[4:]} == {10}


def test_results_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    for _ in range(2):
        write_results(folder, MACHINE, "0.1.0 sm_90a", RESULTS)
    content = json.loads((folder / "layer.json").read_text())
    assert (content["gpu"], content["plugins"], len(content["results"])) == ("NVIDIA H200", "0.1.0 sm_90a", 5)
    assert (folder / "layer.md").read_text() == markdown(MACHINE, RESULTS)
    assert sorted(path.name for path in folder.iterdir()) == ["layer.json", "layer.md"]


@pytest.mark.parametrize(("end", "status"), [(KeyboardInterrupt(), 130), (Ended(signal.SIGTERM), 143)])
def test_what_was_measured_is_written_when_the_rest_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: KeyboardInterrupt, status: int
) -> None:
    def measure(name: str, *rest: object) -> list[FormResult]:
        if name == "b128-4k":
            raise end
        return RESULTS[:3]

    for place, value in (
        ("mla_trt.cuda.check_usable", lambda: None),
        ("mla_trt.cuda.synchronize", lambda: None),
        ("mla_trt.cuda.Stream", lambda: None),
        ("mla_trt.engines.tensorrt_api.load_tensorrt", lambda: SimpleNamespace(__version__="10.6.0")),
        ("mla_trt.plugins.library.find_library", lambda _: None),
    ):
        monkeypatch.setattr(place, value)
    monkeypatch.setattr(bench_layer, "measure_copy", lambda: ("NVIDIA H200", 4.29e12))
    monkeypatch.setattr(bench_layer, "random_weights", lambda *_, **__: SimpleNamespace(arrays={}))
    for name in ("lowered_layer", "LayerStep", "references"):
        monkeypatch.setattr(bench_layer, name, lambda *_: None)
    monkeypatch.setattr(bench_layer, "measure_case", measure)
    assert main(["bench", "layer", "--cases", "b16-4k|b128-4k|b4", "-o", str(tmp_path)]) == status
    results = json.loads((tmp_path / "layer.json").read_text())["results"]
    assert [result["us"] for result in results] == [21000.0, 500.0, 200.0, None]
    assert (results[3]["case"], results[3]["note"]) == ("b128-4k", "interrupted; the rest was not run")


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "layer", "--list", "--cases", "^b1"]) == 0
    assert capsys.readouterr().out.split() == ["b16-4k", "b128-4k", "b1-32k"]
    for arguments, message in (
        (["--cases", "nothing like it"], "--list shows them"),
        (["--cases", "("], "not a regular expression"),
        (["--formats", "fp7"], "--formats is 'fp7': give some of f32, bf16, fp8"),
        (["--formats", ""], "--formats is ''"),
        (["--formats", "fp8:3"], "may have a number of query terms, as fp8:1"),
        (["--formats", "bf16:1"], "may have a number of query terms"),
        (["--formats", "fp8/fp7"], "each /fp8 behind it, for weights in e4m3"),
        (["--optimization-level", "6"], "it must be 0 to 5"),
    ):
        assert main(["bench", "layer", *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "mla-trt bench layer" in capsys.readouterr().out
