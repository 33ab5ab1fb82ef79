"""The command: exit statuses, one-line errors, and nothing written on failure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mla_trt.cli import main
from mla_trt.errors import BadModelError, UsageError
from mla_trt.loading import load_model
from mla_trt.writing import check_writable

EXAMPLES = Path(__file__).resolve().parent.parent / "models" / "examples"
EXAMPLE = EXAMPLES / "deepseek_v3__dynamo_op20__eager__dec.onnx"


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `lower` on a path, checks that it fails with one line and writes nothing, and returns the line."""

    def run(path: Path, *options: str, status: int = 2) -> str:
        output = tmp_path / "output"
        before = sorted(tmp_path.iterdir())
        assert main(["lower", str(path), "-o", str(output), *options]) == status
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.strip().splitlines()) == 1
        assert captured.err.startswith("mla-trt: ")
        assert sorted(tmp_path.iterdir()) == before
        return captured.err

    return run


def test_lower_writes_model_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a" / "b"
    assert main(["lower", str(EXAMPLE), "-o", str(output)]) == 0
    assert {file.name for file in output.iterdir()} == {"model.onnx", "report.json"}
    report = json.loads((output / "report.json").read_text())
    assert set(report) >= {"attention_cores", "matched", "assumptions", "layers", "verification", "passes"}
    assert all(set(entry) == {"name", "changed", "seconds"} for entry in report["passes"])
    assert "2 of 2" in capsys.readouterr().out
    assert main(["verify", str(EXAMPLE), str(output)]) == 0


def test_resident_pages_are_an_option_of_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lower", str(EXAMPLE), "-o", str(tmp_path / "out"), "--cache", "resident"]) == 2
    assert "give 'mla-trt build' --cache resident" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_run_generates_what_other_batches_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "lowered"
    assert main(["lower", str(EXAMPLE), "-o", str(output), "--quiet"]) == 0
    capsys.readouterr()
    together = ["run", str(output), "--prompt-ids", "1,5,9", "--prompt-ids", "3,4", "--max-new-tokens", "5", "--json"]
    assert main(together) == 0
    both = json.loads(capsys.readouterr().out)["sequences"]
    for prompt, expected in (("1,5,9", both[0]), ("3,4", both[1])):
        assert main(["run", str(output), "--prompt-ids", prompt, "--max-new-tokens", "5", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["sequences"] == [expected]


def test_run_draws_the_same_tokens_with_the_same_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "lowered"
    assert main(["lower", str(EXAMPLE), "-o", str(output), "--quiet", "--no-verify"]) == 0

    def tokens(*options: str) -> list[list[int]]:
        capsys.readouterr()
        prompts = ["--prompt-ids", "1,5,9", "--prompt-ids", "1,5,9"]
        assert main(["run", str(output), *prompts, "--max-new-tokens", "12", "--json", *options]) == 0
        return [sequence["tokens"] for sequence in json.loads(capsys.readouterr().out)["sequences"]]

    drawn = tokens("--temperature", "1.5", "--top-k", "40", "--top-p", "0.95", "--seed", "3")
    assert drawn == tokens("--temperature", "1.5", "--top-k", "40", "--top-p", "0.95", "--seed", "3")
    assert drawn[0] != drawn[1]
    assert drawn[1] == tokens("--temperature", "1.5", "--top-k", "40", "--top-p", "0.95", "--seed", "4")[0]
    assert tokens("--temperature", "1.5", "--top-k", "1") == tokens() != drawn
    assert main(["run", str(output), "--prompt-ids", "1,5,9", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"0: {token}" for token in tokens()[0][:3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt-ids", ""], "prompt 0: the prompt is empty"),
        (["--prompt-ids", "1,64"], "prompt 0: token 64 of the prompt is not in the vocabulary"),
        (["--prompt-ids", "1", "--pages", "1", "--max-new-tokens", "65"], "the pool of pages holds 64"),
        (["--prompt-ids", "1", "--seed", "4"], "give --temperature too"),
        (["--prompt-ids", "1", "--temperature", "-1"], "the temperature is -1.0"),
        (["--prompt-ids", "1", "--temperature", "1", "--top-p", "2"], "top-p is 2.0"),
    ],
)
def test_run_refuses_what_makes_no_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    output = tmp_path / "lowered"
    assert main(["lower", str(EXAMPLE), "-o", str(output), "--quiet", "--no-verify"]) == 0
    assert main(["run", str(output), *options]) == 2
    assert message in capsys.readouterr().err


def test_inspect_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(EXAMPLES / "deepseek_v4__dynamo_op20__eager__pre.onnx")]) == 3
    assert "is not lowered: " in capsys.readouterr().out
    assert main(["inspect", str(EXAMPLE), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["matched"] == 2


def test_not_an_onnx_file(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_text("this is no model\n" * 50)
    assert "cannot be read as an ONNX model" in refused(file) or "no complete ONNX model" in refused(file)


@pytest.mark.parametrize("name", ["model.json", "model.onnxtxt", "model.textproto"])
def test_a_text_file_by_whatever_name(refused: Callable[..., str], tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text('{"architectures": ["DeepseekV3ForCausalLM"]}')
    assert "cannot be read as an ONNX model" in refused(file)


def test_missing_file(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere.onnx")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_file(refused: Callable[..., str], tmp_path: Path, share: float) -> None:
    data = EXAMPLE.read_bytes()
    file = tmp_path / "model.onnx"
    file.write_bytes(data[: int(len(data) * share)])
    refused(file)


def test_a_file_cut_between_its_opsets(refused: Callable[..., str], tmp_path: Path) -> None:
    model = onnx.load(EXAMPLES / "deepseek_v3__dynamo_op20__sdpa__dec__post_ort_extended.onnx")
    kept = [entry for entry in model.opset_import if entry.domain != "com.microsoft"]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    assert "is the file complete?" in refused(_save(model, tmp_path))


def test_a_damaged_name(refused: Callable[..., str], tmp_path: Path) -> None:
    data = EXAMPLE.read_bytes()
    name = next(node.name for node in onnx.load(EXAMPLE).graph.node if node.op_type == "Softmax").encode()
    (tmp_path / "model.onnx").write_bytes(
        data.replace(b"\x1a" + bytes([len(name)]) + name, b"\x1a" + bytes([len(name)]) + b"\xf7" * len(name), 1)
    )
    assert "damaged" in refused(tmp_path / "model.onnx")


def test_missing_and_short_external_data(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx.save_model(onnx.load(EXAMPLE), str(file), save_as_external_data=True, location="weights.bin", size_threshold=0)
    weights = tmp_path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-64])
    assert "cut short" in refused(file)
    weights.unlink()
    assert "weights.bin" in refused(file)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ({"location": "../weights.bin"}, "outside the model's folder"),
        ({"location": "weights.bin", "offset": "next"}, "do not fit together"),
        ({"location": "weights.bin", "offset": "-64"}, "do not fit together"),
        ({"location": "weights.bin", "length": "12"}, "do not fit together"),
        ({"location": "weights.bin", "offset": "1000"}, "cut short"),  # without a length, its type and shape tell
    ],
)
def test_external_data_in_impossible_places(
    refused: Callable[..., str], tmp_path: Path, place: dict[str, str], reason: str
) -> None:
    model = onnx.load(EXAMPLE)
    tensor = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [48, 160])
    (tmp_path / "weights.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in place.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    (tmp_path / "below").mkdir()
    if place["location"] == "weights.bin":
        (tmp_path / "weights.bin").rename(tmp_path / "below" / "weights.bin")
    onnx.save(model, tmp_path / "below" / "model.onnx")
    assert reason in refused(tmp_path / "below" / "model.onnx")


def test_external_data_is_lowered_like_inline_data(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx.save_model(onnx.load(EXAMPLE), str(file), save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert main(["lower", str(file), "-o", str(tmp_path / "out"), "--quiet"]) == 0
    assert main(["verify", str(file), str(tmp_path / "out"), "--quiet"]) == 0


def _save(model: onnx.ModelProto, tmp_path: Path) -> Path:
    file = tmp_path / "model.onnx"
    onnx.save(model, file)
    return file


def test_unknown_op_inside_an_attention(refused: Callable[..., str], tmp_path: Path) -> None:
    model = onnx.load(EXAMPLE)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    softmax.input[0], old = "twisted", softmax.input[0]
    index = list(model.graph.node).index(softmax)
    model.graph.node.insert(index, helper.make_node("Twist", [old], ["twisted"], name="twist", domain="com.acme"))
    model.opset_import.append(helper.make_opsetid("com.acme", 1))
    assert "com.acme::Twist" in refused(_save(model, tmp_path))


def test_contradictory_shapes(refused: Callable[..., str], tmp_path: Path) -> None:
    model = onnx.load(EXAMPLE)
    weight = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [48, 160])
    weight.CopyFrom(numpy_helper.from_array(np.zeros((47, 160), np.float32), weight.name))
    refused(_save(model, tmp_path))


def test_dynamic_rank(refused: Callable[..., str], tmp_path: Path) -> None:
    model = onnx.load(EXAMPLE)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    assert "rank" in refused(_save(model, tmp_path))


def test_cycle(refused: Callable[..., str], tmp_path: Path) -> None:
    model = onnx.load(EXAMPLE)
    adds = [node for node in model.graph.node if node.op_type == "Add"]
    adds[-2].input[0] = adds[-1].output[0]
    refused(_save(model, tmp_path))


def test_a_model_without_attention(refused: Callable[..., str], tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "S", 8])
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "S", 8])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [value], [result], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert "no attention" in refused(_save(model, tmp_path), status=3)


def test_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "occupied"
    file.write_text("")
    assert main(["lower", str(EXAMPLE), "-o", str(file)]) == 2
    assert main(["lower", str(EXAMPLE), "-o", str(file / "below")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert file.read_text() == ""


@pytest.mark.parametrize(
    "command",
    [
        ["lower", str(EXAMPLE), "-o", "LONG"],
        ["lower", "LONG", "-o", "out"],
        ["inspect", "LONG"],
        ["verify", "LONG", "out"],
        ["verify", str(EXAMPLE), "LONG"],
        ["run", "LONG", "--prompt-ids", "1"],
    ],
    ids=lambda command: command[0],
)
def test_a_path_that_the_system_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["x" * 300 if word == "LONG" else word for word in command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mla-trt: '{'x' * 300}")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_may_not_be_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # root may search all
        patch.setattr(Path, "exists", raises(PermissionError(13, "Permission denied", "ro/y")))
        with pytest.raises(UsageError, match=r"^'ro/y' cannot be written: Permission denied$"):
            check_writable(Path("ro/y"))
        with pytest.raises(BadModelError, match=r"^'ro/y' cannot be read: Permission denied$"):
            load_model(Path("ro/y"))


@pytest.mark.parametrize(
    "command", [["lower", str(EXAMPLE), "-o", ""], ["inspect", ""], ["bench", "kernels", "-o", ""]]
)
def test_an_empty_path_is_not_this_folder(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 2
    assert "the path is empty" in capsys.readouterr().err


def piped(output: int, *command: str, **variables: str) -> tuple[int, str]:
    """Runs a command with a standard output; returns its status and what it said to standard error."""
    arguments = [sys.executable, "-m", "mla_trt", *command]
    done = subprocess.run(arguments, stdout=output, stderr=subprocess.PIPE, text=True, env={**os.environ, **variables})
    return done.returncode, done.stderr


def test_a_reader_that_goes_away_changes_no_status(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert piped(writer, "lower", str(EXAMPLE), "-o", str(tmp_path / "out"), "--no-verify") == (0, "")
        assert piped(writer, "inspect", str(EXAMPLE)) == (0, "")
        assert piped(writer, "inspect", str(EXAMPLES / "deepseek_v4__dynamo_op20__eager__pre.onnx")) == (3, "")
        assert piped(writer, "run", str(tmp_path / "out"), "--prompt-ids", "1") == (0, "")
    finally:
        os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    "command", [["inspect", str(EXAMPLE)], ["inspect", str(EXAMPLE), "--json"], ["export", "--list"]]
)
def test_output_that_cannot_be_written(command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        said = "mla-trt: standard output cannot be written: No space left on device\n"
        assert piped(full.fileno(), *command) == (1, said)


def test_characters_that_the_terminal_lacks(tmp_path: Path) -> None:
    written = tmp_path / "written"
    with written.open("w") as output:
        command = ["lower", str(EXAMPLE), "-o", str(tmp_path / "ö"), "--no-verify"]
        assert piped(output.fileno(), *command, PYTHONIOENCODING="ascii") == (0, "")
    assert "\\xf6/model.onnx" in written.read_text()


def raises(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mla_trt.pipeline.write_json", raises(OSError(28, "No space left on device")))
    assert main(["lower", str(EXAMPLE), "-o", str(tmp_path / "new" / "out"), "--no-verify"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["lower", "verify_models", "write_model", "write_json"])
def test_an_interrupt_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    monkeypatch.setattr(f"mla_trt.pipeline.{step}", raises(KeyboardInterrupt()))
    options = [] if step == "verify_models" else ["--no-verify"]
    assert main(["lower", str(EXAMPLE), "-o", str(tmp_path / "new" / "out"), *options]) == 130
    assert capsys.readouterr().err == "mla-trt: interrupted; nothing was written\n"
    assert not list(tmp_path.iterdir())


def test_a_refused_model_leaves_no_new_folders(tmp_path: Path) -> None:
    model = EXAMPLES / "deepseek_v4__dynamo_op20__eager__pre.onnx"
    assert main(["lower", str(model), "-o", str(tmp_path / "a" / "b" / "c")]) == 3
    assert not list(tmp_path.iterdir())


def test_an_output_folder_on_another_file_system(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    with tempfile.TemporaryDirectory(dir=memory) as elsewhere:
        (tmp_path / "out").symlink_to(elsewhere)
        assert main(["lower", str(EXAMPLE), "-o", str(tmp_path / "out"), "--no-verify", "--quiet"]) == 0
        assert {"model.onnx", "report.json"} <= {file.name for file in Path(elsewhere).iterdir()}


def test_a_folder_where_a_file_must_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / "report.json").mkdir(parents=True)
    assert main(["lower", str(EXAMPLE), "-o", str(tmp_path / "out"), "--no-verify"]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]


def test_a_model_that_is_there_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    arguments = ["lower", str(EXAMPLE), "-o", str(output), "--no-verify", "--quiet"]
    assert main(arguments) == 0
    before = {file: file.read_bytes() for file in output.iterdir()}
    move = os.replace

    def fail_at_the_last(source: Path, target: Path) -> None:
        if target == output / "report.json" and source.name == target.name:
            raise OSError(5, "Input/output error")
        move(source, target)

    monkeypatch.setattr("mla_trt.writing.os.replace", fail_at_the_last)
    assert main([*arguments, "--kv-format", "bf16"]) == 2
    assert {file: file.read_bytes() for file in output.iterdir()} == before
    monkeypatch.undo()
    assert main([*arguments, "--kv-format", "bf16"]) == 0
    assert (output / "model.onnx").read_bytes() != before[output / "model.onnx"]


def test_an_export_is_not_written_over_by_whatever_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(EXAMPLE, tmp_path / "model.onnx")
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "export.onnx"
    link.symlink_to("../model.onnx")
    assert main(["lower", str(link), "-o", str(tmp_path), "--no-verify"]) == 2
    assert "over the export itself" in capsys.readouterr().err
    assert (tmp_path / "model.onnx").read_bytes() == EXAMPLE.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        ["--kv-format", "fp7"],
        ["--weights", "int3"],
        ["--page-size", "0"],
        ["--target", "tensorrt-9"],
        ["--logits", "some"],
        ["--kv-scale", "0"],
    ],
)
def test_options_without_sense(refused: Callable[..., str], options: list[str]) -> None:
    assert options[0] in refused(EXAMPLE, *options)


def test_help_has_examples() -> None:
    for command in ("lower", "inspect", "verify", "build", "run", "export"):
        text = subprocess.run(
            [sys.executable, "-m", "mla_trt", command, "--help"], capture_output=True, text=True, check=True
        ).stdout
        assert f"mla-trt {command} " in text.split("examples:")[1]


@pytest.mark.parametrize("row_format", ["f32", "bf16", "fp8", "fp8_ds_mla", "fp8_flat"])
@pytest.mark.parametrize("weights", ["keep", "fp8"])
def test_every_format_verifies(tmp_path: Path, row_format: str, weights: str) -> None:
    arguments = [
        "lower",
        str(EXAMPLE),
        "-o",
        str(tmp_path / "out"),
        "--quiet",
        "--kv-format",
        row_format,
        "--weights",
        weights,
    ]
    assert main([*arguments, "--page-size", "16", "--logits", "last"]) == 0
