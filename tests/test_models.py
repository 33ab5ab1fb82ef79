"""Model configurations, the exporter's front, the examples, and the generator of full-size graphs."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from mla_trt.cli import main as command
from mla_trt.errors import MlaTrtError, UsageError
from mla_trt.lowering import LowerOptions
from mla_trt.models import export as export_module
from mla_trt.models.configs import CLASS_DEFAULTS, CONFIGS, ModelConfig, get_config
from mla_trt.models.decoder import inverse_frequencies
from mla_trt.models.export import ExportResult, ExportSettings, export
from mla_trt.models.full_size import KINDS, main, write_full_size
from mla_trt.models.graph_writer import SCOPES_KEY
from mla_trt.models.weights import SparseWeights, largest_file
from mla_trt.pipeline import lower_file

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "models" / "examples"
MANIFEST: list[dict[str, Any]] = json.loads((EXAMPLES / "manifest.json").read_text())
HAS_TORCH = all(importlib.util.find_spec(name) for name in export_module.REQUIRED)
needs_torch = pytest.mark.skipif(
    not HAS_TORCH, reason="PyTorch, Transformers and onnxscript are not installed: pip install 'mla-trt[export]'"
)


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def first_step(model: onnxruntime.InferenceSession, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of a first step: all caches are empty."""
    batch, count = tokens.shape
    feed = {
        "input_ids": tokens,
        "attention_mask": np.ones((batch, count), np.int64),
        "position_ids": np.tile(np.arange(count), (batch, 1)),
    }
    for value in model.get_inputs():
        if value.name.startswith("past_"):
            sizes = {"batch": batch, "past": 0}
            feed[value.name] = np.zeros([sizes.get(axis, axis) for axis in value.shape], np.float32)
    return feed


def next_step(feed: dict[str, np.ndarray], outputs: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of the step after one."""
    past = feed["attention_mask"].shape[1]
    batch, count = tokens.shape
    following = {
        name.replace("present_", "past_"): value for name, value in outputs.items() if name.startswith("present_")
    }
    following["input_ids"] = tokens
    following["attention_mask"] = np.ones((batch, past + count), np.int64)
    following["position_ids"] = np.tile(np.arange(past, past + count), (batch, 1))
    return following


def run(model: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [value.name for value in model.get_outputs()]
    return dict(zip(names, model.run(names, feed), strict=True))


# Configurations.


@pytest.mark.parametrize("config", CONFIGS.values(), ids=lambda config: config.name)
def test_small_models_keep_the_architecture_and_lose_the_size(config: ModelConfig) -> None:
    full, small = config.fields("full"), config.fields("small")
    assert set(full) <= set(small)
    assert full[config.layers_field] > small[config.layers_field]
    dimensions = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank")
    sizes = [small[name] for name in dimensions if small.get(name)]
    assert len(set(sizes)) == len(sizes)
    for name in set(full) - set(config.small):
        assert (full[name] is None) == (small[name] is None)


def test_names_are_looked_up_without_regard_to_case() -> None:
    assert get_config("DeepSeek-V3") is CONFIGS["deepseek-v3"]


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown configuration 'gpt-9': choose one of deepseek-v2"):
        get_config("gpt-9")


@pytest.mark.parametrize("layers", [0, 62])
def test_a_number_of_layers_that_the_model_does_not_have_is_refused(layers: int) -> None:
    with pytest.raises(UsageError, match="must be from 1 to 61"):
        get_config("deepseek-v3").fields("full", layers)


@needs_torch
@pytest.mark.parametrize(
    "config", [c for c in CONFIGS.values() if c.source == CLASS_DEFAULTS], ids=lambda config: config.name
)
def test_full_sizes_are_the_defaults_of_the_classes(config: ModelConfig) -> None:
    import transformers

    defaults = getattr(transformers, config.config_class)()
    published = {"rope_parameters", "max_position_embeddings"}
    if config.name == "ling-3":
        published.add("head_dim")  # the class replaces it by the rope's
    differing = {name for name, value in config.architecture.items() if getattr(defaults, name) != value}
    assert differing <= published


# Export.


def test_export_without_pytorch_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'mla-trt\[export\]'"):
        export("deepseek-v3", tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("deepseek-v3", ExportSettings(opset=13), "opsets 18 to 25, not 13"),
        ("deepseek-v3", ExportSettings(exporter="torchscript", opset=23), "opsets 14 to 20, not 23"),
        ("deepseek-v3.2", ExportSettings(exporter="torchscript", opset=17), "use the dynamo exporter"),
        ("deepseek-v3", ExportSettings(batch=0), "batch must be 1 or more"),
        ("deepseek-v3", ExportSettings(cache=False, past=3), "makes no sense without a cache"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    name: str, settings: ExportSettings, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        export(name, tmp_path / "model.onnx", settings=settings)


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for what needs PyTorch: writes a model in two files, of which the first may be all that it can."""

    def write_model(model: object, output: Path, settings: ExportSettings) -> ExportResult:
        Path(f"{output}.data").write_text("weights")
        if exporter.error is not None:
            raise exporter.error
        output.write_text("graph")
        return ExportResult(output, (), ())

    exporter = SimpleNamespace(error=None, built=0, write_model=write_model)

    def build_model(*_: object) -> None:
        exporter.built += 1

    exporter.build_model = build_model
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "mla_trt.models.torch_export", exporter)
    return exporter


def test_an_export_is_written_with_its_weights(exporter: SimpleNamespace, tmp_path: Path) -> None:
    output = tmp_path / "new" / "model.onnx"
    assert export("deepseek-v3", output).path == output
    assert {file.name: file.read_text() for file in output.parent.iterdir()} == {
        "model.onnx": "graph",
        "model.onnx.data": "weights",
    }


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(28, "No space left on device"), 2, "cannot be written: No space left on device; nothing was written"),
        (MlaTrtError("the exporter failed"), 2, "the exporter failed"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
    ],
)
def test_an_export_that_fails_leaves_nothing_new(
    exporter: SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    exporter.error = error
    (tmp_path / "model.onnx").write_text("before")
    for output in (tmp_path / "model.onnx", tmp_path / "new" / "model.onnx"):
        assert command(["export", "deepseek-v3", "-o", str(output)]) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(message)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("model.onnx", "before")]


@pytest.mark.parametrize("output", [".", "pipe", "/proc/model.onnx", "file/model.onnx", "x" * 300])
def test_an_output_that_cannot_be_is_refused_before_the_export(
    exporter: SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    output: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    os.mkfifo("pipe")
    exporter.error = MlaTrtError("this is too late")
    assert command(["export", "deepseek-v3", "-o", output]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not exporter.built


@needs_torch
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("deepseek-v3", ExportSettings()),
        ("deepseek-v3", ExportSettings(exporter="torchscript", opset=17, attention="sdpa")),
        ("deepseek-v3.2", ExportSettings(opset=23, attention="sdpa")),
        ("longcat-flash", ExportSettings(batch=1, tokens=1, past=4)),
    ],
)
def test_exports_run(name: str, settings: ExportSettings, tmp_path: Path) -> None:
    result = export(name, tmp_path / "model.onnx", settings=settings)
    model = session(result.path)
    sizes = {"batch": settings.batch or 2, "sequence": settings.tokens or 3, "past": settings.past or 4}
    sizes["total"] = sizes["past"] + sizes["sequence"]
    feed = {}
    for value in model.get_inputs():
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in value.shape]
        feed[value.name] = np.zeros(shape, np.float32) if value.name.startswith("past_") else np.ones(shape, np.int64)
    outputs = run(model, feed)
    assert set(outputs) == set(result.outputs)
    assert all(np.isfinite(value).all() for value in outputs.values())


# Examples.


def test_the_manifest_lists_the_examples() -> None:
    assert sorted(entry["file"] for entry in MANIFEST) == sorted(path.name for path in EXAMPLES.glob("*.onnx"))


@pytest.mark.parametrize("entry", MANIFEST, ids=lambda entry: entry["file"].removesuffix(".onnx"))
def test_examples_are_as_the_manifest_says(entry: dict[str, Any]) -> None:
    path = EXAMPLES / entry["file"]
    assert path.stat().st_size < 1_300_000
    model = onnx.load(path)
    assert next(opset.version for opset in model.opset_import if opset.domain == "") == entry["opset"]
    assert entry["expect"] == ("lower" if entry["mla"] else "refuse")
    assert entry["cache"] in ("latent", "expanded", "none")


# Full-size graphs.


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    directory = tmp_path_factory.mktemp("generated")
    written = {}
    for kind, routing in itertools.product(KINDS, ("gather", "mask")):
        path = directory / f"{kind}-{routing}.onnx"
        write_full_size(kind, path, size="small", dtype="float32", routing="mask" if routing == "mask" else "gather")
        written[kind, routing] = path
    return written


@pytest.mark.parametrize("kind", KINDS)
def test_small_generated_models_are_valid_and_finite(kind: str, generated: dict[tuple[str, str], Path]) -> None:
    path = generated[kind, "gather"]
    onnx.checker.check_model(path, full_check=True)
    model = session(path)
    outputs = run(model, first_step(model, np.arange(10).reshape(2, 5)))
    assert outputs["logits"].shape == (2, 5, 64)
    assert all(np.isfinite(value).all() for value in outputs.values())
    assert outputs["logits"].std() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_of_routing_give_the_same(kind: str, generated: dict[tuple[str, str], Path]) -> None:
    tokens = np.arange(12).reshape(2, 6)
    logits = []
    for routing in ("gather", "mask"):
        model = session(generated[kind, routing])
        logits.append(run(model, first_step(model, tokens))["logits"])
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_steps_gives_what_it_gives_at_once(kind: str, generated: dict[tuple[str, str], Path]) -> None:
    tokens = np.random.default_rng(0).integers(0, 64, (2, 11))
    model = session(generated[kind, "gather"])
    whole = run(model, first_step(model, tokens))
    feed = first_step(model, tokens[:, :6])
    outputs = run(model, feed)
    np.testing.assert_allclose(outputs["logits"], whole["logits"][:, :6], atol=2e-5)
    for start in range(6, 11):
        feed = next_step(feed, outputs, tokens[:, start : start + 1])
        outputs = run(model, feed)
        np.testing.assert_allclose(outputs["logits"][:, 0], whole["logits"][:, start], atol=2e-5)
    for name in whole:
        if name.startswith("present_"):
            np.testing.assert_allclose(outputs[name], whole[name], atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "example"),
    [
        ("deepseek-v3", "deepseek_v3__dynamo_op20__eager__dec.onnx"),
        ("deepseek-v3.2", "deepseek_v32__dynamo_op20__eager__dec.onnx"),
    ],
)
def test_attention_has_the_nodes_of_a_real_export(
    kind: str, example: str, generated: dict[tuple[str, str], Path]
) -> None:
    def operators(path: Path) -> Counter[str]:
        found: Counter[str] = Counter()
        for node in onnx.load(path).graph.node:
            if node.op_type == "Split":  # a real export does not say where its Splits are from
                continue
            scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES_KEY), "")
            if "layers.1.self_attn" in scopes:
                found[node.op_type] += 1
        return found

    ours, real = operators(generated[kind, "gather"]), operators(EXAMPLES / example)
    assert ours == real


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_graphs_of_narrow_types_are_valid(dtype: str, tmp_path: Path) -> None:
    written = write_full_size("deepseek-v3.2", tmp_path / "model.onnx", size="small", dtype=dtype)
    onnx.checker.check_model(written.path, full_check=True)


def test_full_size_weights_take_no_space(tmp_path: Path) -> None:
    written = write_full_size("deepseek-v3.2", tmp_path / "model.onnx", layers=1)
    assert sum(path.stat().st_size for path in written.weight_files) >= written.weight_bytes > 4e9
    assert sum(path.stat().st_blocks * 512 for path in written.weight_files) < 1e6
    model = onnx.load(written.path, load_external_data=False)
    sizes = {path.name: path.stat().st_size for path in written.weight_files}
    taken: dict[str, int] = dict.fromkeys(sizes, 0)
    total = 0
    for tensor in model.graph.initializer:
        if not tensor.external_data:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        start, length = int(place["offset"]), int(place["length"])
        assert start >= taken[place["location"]]
        taken[place["location"]] = start + length
        assert length == 2 * np.prod(tensor.dims)
        total += length
    assert taken == sizes
    assert total == written.weight_bytes


def test_large_files_can_have_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_trt.models.weights.RANDOM_PART", 1000)
    store = SparseWeights(tmp_path, "model", random=True)
    tensors = [store.weight(name, (64, 70), onnx.TensorProto.BFLOAT16, norm=False) for name in "ab"]
    store.weight("norm", (64,), onnx.TensorProto.FLOAT, norm=True)
    (path,) = store.write()
    assert path.stat().st_size == store._sizes[0]
    values = []
    for tensor in tensors:
        onnx.external_data_helper.load_external_data_for_tensor(tensor, str(tmp_path))
        values.append(onnx.numpy_helper.to_array(tensor).astype(np.float64))
    for one in values:
        assert 0.9 < one.std() * 8 < 1.1
    assert abs(np.corrcoef(values[0].ravel(), values[1].ravel())[0, 1]) < 0.1


def test_a_full_size_graph_reads_from_its_sparse_file(tmp_path: Path) -> None:
    written = write_full_size("deepseek-v3", tmp_path / "model.onnx", layers=1)
    model = onnx.load(written.path, load_external_data=False)
    weights = [tensor for tensor in model.graph.initializer if tensor.external_data]
    norm = next(tensor for tensor in weights if tensor.name.endswith("kv_a_layernorm.weight"))
    values = onnx.numpy_helper.to_array(norm, str(tmp_path)).astype(np.float32)
    assert values.min() >= 0.5
    assert values.max() <= 1.5
    projection = min((tensor for tensor in weights if len(tensor.dims) == 2), key=lambda tensor: np.prod(tensor.dims))
    assert not onnx.numpy_helper.to_array(projection, str(tmp_path)).astype(np.float32).any()


@pytest.mark.parametrize("kind", ["deepseek-v3", "deepseek-v3.2"])
def test_a_full_size_graph_is_lowered(kind: str, tmp_path: Path) -> None:
    written = write_full_size(kind, tmp_path / "model.onnx", layers=2)
    report = lower_file(written.path, tmp_path / "lowered", LowerOptions(), verify=False)
    assert [(layer.matched, layer.num_heads, layer.kv_lora_rank) for layer in report.layers] == [(True, 128, 512)] * 2
    model = onnx.load(tmp_path / "lowered" / "model.onnx", load_external_data=False)
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    assert weights["mla_attention.1.w_uk"] == (128, 512, 128)
    assert weights["mla_attention.1.w_uv"] == (128, 128, 512)


def test_what_is_wrong_in_every_expert_is_said_once(tmp_path: Path) -> None:
    written = write_full_size("deepseek-v3", tmp_path / "model.onnx", size="small", dtype="float32")
    report = lower_file(written.path, tmp_path / "lowered", LowerOptions(), verify=False)
    assert len(report.notes) == len({note.split(": ", 1)[1] for note in report.notes}), report.notes


def test_weights_go_on_in_another_file_when_one_is_full(tmp_path: Path) -> None:
    weights = SparseWeights(tmp_path, "model.onnx", largest_file=10_000)
    tensors = [weights.weight(f"w{index}", (30, 50), onnx.TensorProto.FLOAT) for index in range(3)]
    locations = [next(entry.value for entry in tensor.external_data if entry.key == "location") for tensor in tensors]
    assert locations == ["model.onnx.data", "model.onnx.data.1", "model.onnx.data.2"]
    assert [path.stat().st_size for path in weights.write()] == [6000, 6000, 6000]


def test_a_weight_larger_than_any_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too small for w"):
        SparseWeights(tmp_path, "model.onnx", largest_file=100).weight("w", (30, 50), onnx.TensorProto.FLOAT)


def test_the_largest_file_is_found(tmp_path: Path) -> None:
    assert largest_file(tmp_path) >= 2**31
    assert not list(tmp_path.iterdir())


def test_yarn_keeps_high_frequencies_and_divides_low_ones() -> None:
    rope = get_config("deepseek-v3").fields("full")["rope_parameters"]
    scaled = inverse_frequencies(64, rope)
    plain = inverse_frequencies(64, {"rope_type": "default", "rope_theta": rope["rope_theta"]})
    ratio = plain / scaled
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(rope["factor"])
    assert (np.diff(ratio) >= -1e-5).all()


def test_the_generator_answers_mistakes_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deepseek-v3", "-o", str(tmp_path / "m.onnx"), "--experts", "3"]) == 2
    assert capsys.readouterr().err.startswith("error: experts must be a multiple of the 8 groups")


def test_the_generator_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["deepseek-v3", "-o", str(tmp_path / "m.onnx"), "--size", "small", "--dtype", "float32", "--layers", "1"])
        == 0
    )
    assert "nodes" in capsys.readouterr().out


def test_the_benchmark_measures_any_command(tmp_path: Path) -> None:
    code = "import os, shutil, sys; os.mkdir(sys.argv[2]); shutil.copy(sys.argv[1], sys.argv[2])"
    stub = f"{sys.executable} -c '{code}' {{model}} {{output}}"
    script = ROOT / "benchmarks" / "lower_full_size.py"
    options = [
        "--kinds",
        "deepseek-v3",
        "--layers",
        "1",
        "--work",
        str(tmp_path),
        "--output",
        str(tmp_path / "results"),
        "--command",
        stub,
    ]
    subprocess.run([sys.executable, str(script), *options], check=True, stdout=subprocess.DEVNULL)
    (result,) = json.loads((tmp_path / "results" / "lower_full_size.json").read_text())
    assert result["exit_status"] == 0
    assert result["lowered_nodes"] == result["nodes"] > 100
    assert result["peak_gigabytes"] > 0
    assert result["cpu_seconds"] > 0


# Packaging.


def test_every_package_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    directories = {
        name: ROOT / setuptools["package-dir"].get(name, name.replace(".", "/")) for name in setuptools["packages"]
    }
    found = {
        path.parent for top in ("mla_trt", "passes", "plugins", "models") for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(directories.values()) == found
