"""`mla-trt triton`: what is written, and what is refused with nothing written. tests/test_triton.py serves it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto
from small_models import Config, lowered

from mla_trt.cli import main
from mla_trt.errors import UsageError
from mla_trt.serving.triton_repository import Settings


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
    settings = Settings(pages=7, stop_ids=(3, 4), drain_seconds=1.5, plugins="a b.so")
    assert Settings.parse(settings.parameters() | {"EXECUTION_ENV_PATH": "/x"}) == settings
    for parameters in ({"pages": '"many"'}, {"stop_ids": "1"}, {"model": "../x.onnx"}, {"max_batch": "[]"}):
        with pytest.raises(UsageError):
            Settings.parse(parameters)
