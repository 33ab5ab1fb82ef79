"""`mla-trt triton`: what is written, and what is refused with nothing written. tests/test_triton.py serves it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto
from small_models import SPARSE, Config, lowered
from tensorrt_stand_in import describe, with_known_axes, write_engine

from mla_trt.cli import main
from mla_trt.engines.engine_file import IO, RESIDENT
from mla_trt.errors import UsageError
from mla_trt.serving.triton_repository import Settings, write_repository


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    onnx.save_model(
        lowered(Config()), folder / "model.onnx", save_as_external_data=True, location="w.data", size_threshold=0
    )
    return folder


def test_the_repository_has_all_that_the_model_needs(model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    assert main(["triton", str(model), "-o", str(repository), "--pages", "9", "--stop-ids", "1,2"]) == 0
    files = {str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file()}
    assert files == {"small/config.pbtxt", *(f"small/1/{name}" for name in ("model.py", "model.onnx", "w.data"))}
    assert (repository / "small/1/w.data").read_bytes() == (model / "w.data").read_bytes()
    config = (repository / "small/config.pbtxt").read_text()
    assert 'key: "pages" value { string_value: "9" }' in config
    assert 'key: "stop_ids" value { string_value: "[1, 2]" }' in config
    assert str(tmp_path) not in config
    assert main(["triton", str(model / "model.onnx"), "-o", str(repository), "--name", "b-2"]) == 0
    assert {folder.name for folder in repository.iterdir()} == {"small", "b-2"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--name", "../x"], "is no name for a model"),
        (["--max-batch", "0"], "max_batch is 0"),
        (["--drain-seconds", "nan"], "drain_seconds is nan"),
        (["--plugins", "x.so"], "takes no TensorRT plugins"),
        (["--environment", "nowhere"], "'nowhere' does not exist"),
    ],
)
def test_refusals(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    assert main(["triton", str(model), "-o", str(tmp_path / "repository"), *options]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "repository").exists()


def test_the_plugin_library_of_an_engine_must_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = with_known_axes(lowered(Config()))
    engine = write_engine(tmp_path, describe(small), small)
    missing = tmp_path / "libmla_trt_plugins.so"
    arguments = ["triton", str(engine), "-o", str(tmp_path / "repository"), "--plugins", str(missing)]
    assert main(arguments) == 2
    assert f"the plugin library '{missing}' does not exist" in capsys.readouterr().err
    assert not (tmp_path / "repository").exists()
    missing.write_bytes(b"library")
    assert main(arguments) == 0
    assert (tmp_path / "repository" / "model" / "1" / missing.name).read_bytes() == b"library"


def test_links_in_place_of_copies(model: Path, tmp_path: Path) -> None:
    folder = write_repository(model, tmp_path / "repository", Settings(), link=True)
    assert (folder / "1" / "model.onnx").resolve() == model / "model.onnx"
    assert (folder / "1" / "w.data").resolve() == model / "w.data"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "model.onnx").unlink(), "does not exist"),
        (lambda folder: (folder / "w.data").unlink(), "which has weights of"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"\xff" * 9), "is not an ONNX model"),
        (lambda folder: point_outside(folder / "model.onnx"), "weights outside of its folder"),
    ],
    ids=["no model", "no weights", "no ONNX", "outside"],
)
def test_models_that_are_not_whole(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil, reason
) -> None:
    spoil(model)
    assert main(["triton", str(model), "-o", str(tmp_path / "repository")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "repository").exists()


def point_outside(file: Path) -> None:
    model = onnx.load(file, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "../w.data"
    file.write_bytes(model.SerializeToString())


def test_settings_survive_the_configuration() -> None:
    settings = Settings(pages=7, stop_ids=(3, 4), drain_seconds=1.5, plugins="a b.so", engine_model="x_engine")
    assert Settings.parse(settings.parameters() | {"EXECUTION_ENV_PATH": "/x"}) == settings
    for parameters in (
        {"pages": '"many"'},
        {"stop_ids": "1"},
        {"model": "../x.onnx"},
        {"engine_model": ".."},
        {"max_batch": "[]"},
    ):
        with pytest.raises(UsageError):
            Settings.parse(parameters)


def make_engine(folder: Path, cache: str = RESIDENT, **changes: Any) -> Path:
    model = with_known_axes(lowered(SPARSE))
    folder.mkdir()
    return write_engine(folder, replace(describe(model, cache, max_batch=4, pages=40), **changes), model, b"the plan")


def write_library(file: Path, version: str, tensorrt: int) -> Path:
    """What is read of a plugin library without loading it."""
    file.write_bytes(f"\0{version} sm_80 sm_90a\0libnvinfer.so.{tensorrt}\0".encode())
    return file


def test_an_engine_of_the_tensorrt_backend_is_a_model_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")
    from google.protobuf import text_format

    engine = make_engine(tmp_path / "engine")
    library = write_library(tmp_path / "libmla_trt_plugins.so", "0.1.0", 10)
    repository = tmp_path / "repository"
    options = ["--name", "small", "--backend", "tensorrt", "--plugins", str(library)]
    assert main(["triton", str(engine), "-o", str(repository), *options]) == 0
    assert capsys.readouterr().out == f"written: {repository}/small, {repository}/small_engine\n"
    files = {str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file()}
    held = ("model.plan", "model.plan.json", "libmla_trt_plugins.so")
    assert files == {
        "small/config.pbtxt",
        "small/1/model.py",
        "small_engine/config.pbtxt",
        *(f"small_engine/1/{name}" for name in held),
    }
    assert (repository / "small_engine/1/model.plan").read_bytes() == b"the plan"

    own = text_format.Parse((repository / "small/config.pbtxt").read_text(), config_pb2.ModelConfig())
    settings = Settings.parse({name: value.string_value for name, value in own.parameters.items()})
    assert (settings.engine_model, settings.model, settings.plugins) == ("small_engine", "model.plan", None)

    text = (repository / "small_engine/config.pbtxt").read_text()
    config = text_format.Parse(text, config_pb2.ModelConfig())
    assert (config.name, config.backend, config.platform) == ("small_engine", "tensorrt", "tensorrt_plan")
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    (group,) = config.instance_group
    assert (group.kind, group.count, list(group.gpus)) == (config_pb2.ModelInstanceGroup.KIND_GPU, 1, [0])
    found = {
        entry.name: (config_pb2.DataType.Name(entry.data_type), list(entry.dims))
        for entry in (*config.input, *config.output)
    }
    assert found == {
        "input_ids": ("TYPE_INT64", [1, -1]),
        "query_offsets": ("TYPE_INT32", [-1]),
        "cache_lengths": ("TYPE_INT32", [-1]),
        "block_table": ("TYPE_INT32", [-1, -1]),
        "page_copies": ("TYPE_INT32", [-1, 2]),
        "logits": ("TYPE_FP32", [1, -1, 50]),
    }


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({"cache": IO}, [], "has its pages as inputs and outputs"),
        ({}, ["--pages", "41"], "take exactly 40 pages, not 41"),
        ({"plugins": "0.2.0 sm_90a"}, ["--plugins", "LIBRARY"], "plugins of version 0.2.0 for TensorRT 10"),
        ({"tensorrt": "11.1.0"}, ["--plugins", "LIBRARY"], "is of 0.1.0 for 10: build the engine again"),
        ({}, ["--plugins", "nothing.so"], "'nothing.so' cannot be read"),
        ({}, ["--backend", "vllm"], "choose one of python, tensorrt"),
    ],
)
def test_engines_that_the_tensorrt_backend_cannot_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], options: list[str], reason: str
) -> None:
    engine = make_engine(tmp_path / "engine", **changes)
    library = str(write_library(tmp_path / "library.so", "0.1.0", 10))
    given = [library if option == "LIBRARY" else option for option in options]
    output = tmp_path / "repository"
    assert main(["triton", str(engine), "-o", str(output), "--backend", "tensorrt", *given]) == 2
    assert reason in capsys.readouterr().err
    assert not output.exists()


def test_the_tensorrt_backend_runs_no_lowered_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["triton", str(model), "-o", str(tmp_path / "repository"), "--backend", "tensorrt"]) == 2
    assert "is no engine, and Triton's TensorRT backend runs nothing else" in capsys.readouterr().err


def test_bfloat16_inputs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = with_known_axes(lowered(Config()))
    described = describe(model, RESIDENT, pages=40)
    first, *others = described.inputs
    narrow = replace(described, inputs=(replace(first, dtype=TensorProto.BFLOAT16), *others))
    (tmp_path / "engine").mkdir()
    engine = write_engine(tmp_path / "engine", narrow, model)
    assert main(["triton", str(engine), "-o", str(tmp_path / "repository"), "--backend", "tensorrt"]) == 2
    assert "has bfloat16 inputs (input_ids)" in capsys.readouterr().err
