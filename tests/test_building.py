"""`mla-trt build` up to where a GPU is needed, and what it says of what TensorRT says."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import onnx
import pytest
from onnx import TensorProto, helper
from rich.console import Console
from small_models import Config, lowered
from tensorrt_stand_in import with_known_axes

from mla_trt.cli import main
from mla_trt.cuda import Gpu, NoGpuError, find_gpu
from mla_trt.engines import building
from mla_trt.engines.build_progress import shown
from mla_trt.engines.building import (
    BuildOptions,
    build_file,
    default_timing_cache,
    make_monitor,
    parser_error,
    weight_bytes,
    weights_phase,
    write_times,
)
from mla_trt.errors import BadModelError, UsageError
from mla_trt.metadata import LoweredMetadata
from mla_trt.signals import Ended

EXAMPLE = Path(__file__).resolve().parent.parent / "models" / "examples" / "deepseek_v3__dynamo_op20__eager__dec.onnx"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a lowered model."""
    place = tmp_path / "lowered"
    place.mkdir()
    model = with_known_axes(lowered(Config()))
    onnx.save(model, place / "model.onnx")
    return place


def has_gpu() -> bool:
    try:
        find_gpu()
    except NoGpuError:
        return False
    return True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "fp16"], "--dtype is 'fp16': choose one of keep, bf16"),
        (["--weights", "int4"], "--weights is 'int4': choose one of keep, fp8"),
        (["--max-batch", "0"], "--max-batch is 0: it must be at least 1"),
        (["--max-tokens", "3"], "--max-tokens is 3: a step of 16 sequences"),
        (["--cache", "disk"], "--cache is 'disk': choose one of io, resident"),
        (["--cache", "resident"], "--cache resident needs --pages N"),
        (["--pages", "0"], "--pages is 0: this model's pools can have 1 to"),
        (["--optimization-level", "6"], "--optimization-level is 6: it must be 0 to 5"),
        (["--workspace", "many"], "--workspace is 'many'"),
    ],
)
def test_options_without_sense(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    engine = folder.parent / "model.engine"
    assert main(["build", str(folder), "-o", str(engine), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["lowered"]


def test_what_is_no_lowered_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = str(tmp_path / "model.engine")
    assert main(["build", str(tmp_path / "nowhere"), "-o", engine]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["build", str(EXAMPLE), "-o", engine]) == 2
    assert "the model is not a lowered one" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_driver_there_is_one_line_and_nothing_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(folder), "-o", str(folder.parent / "model.engine")]) == 2
    error = capsys.readouterr().err
    assert "no NVIDIA driver on this machine" in error
    assert len(error.strip().splitlines()) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["lowered"]


def test_an_axis_of_unknown_meaning_is_named(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "anything"
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(BadModelError, match="the input 'input_ids' has an axis 'anything'"):
        build_file(folder, folder.parent / "model.engine", BuildOptions())
    with pytest.raises(UsageError, match="'/dev/null' is a folder or a device"):
        build_file(folder, Path("/dev/null"), BuildOptions())
    with pytest.raises(UsageError, match="is a folder"):
        build_file(folder, folder.parent, BuildOptions())


def test_a_model_for_another_parser_is_refused(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr("mla_trt.engines.building.find_gpu", lambda: Gpu("NVIDIA H200", "9.0", 1 << 37))
    monkeypatch.setattr("mla_trt.engines.building.load_tensorrt", lambda: SimpleNamespace(__version__="10.6.0"))
    assert LoweredMetadata.of(onnx.load(folder / "model.onnx")).target == "onnx"
    with pytest.raises(
        BadModelError, match=r"lowered for 'onnx', and this is TensorRT 10\.6\.0: .*--target tensorrt-10\.6"
    ):
        build_file(folder, folder.parent / "model.engine", BuildOptions())


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Lets builds come as far as the model for the parser, with a GPU of a compute capability and a plugin library."""

    def stand_in(capability: str, plugins: str) -> None:
        place = "mla_trt.engines.building"
        monkeypatch.setattr(f"{place}.find_gpu", lambda: Gpu("NVIDIA GPU", capability, 1 << 37))
        monkeypatch.setattr(f"{place}.load_tensorrt", lambda: SimpleNamespace(__version__="10.6.0"))
        monkeypatch.setattr(f"{place}._check_target", lambda metadata, version: None)
        monkeypatch.setattr(f"{place}.load_plugins", lambda path, gpu, version: plugins)

    return stand_in


@pytest.mark.parametrize(
    ("capability", "plugins", "message"),
    [
        ("8.0", "0.1.0 sm_80 sm_90a", "is for Hopper, and NVIDIA GPU is another GPU: build with --weights keep"),
        ("10.0", "0.1.0 sm_80 sm_90a", "is for Hopper, and NVIDIA GPU is another GPU: build with --weights keep"),
        (
            "9.0",
            "0.1.0 sm_80",
            "needs a plugin library for sm_90a, and this one is '0.1.0 sm_80': run 'mla-trt plugins build'",
        ),
    ],
)
def test_codes_of_weights_need_kernels_for_them(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    builds: Callable[[str, str], None],
    capability: str,
    plugins: str,
    message: str,
) -> None:
    builds(capability, plugins)
    assert main(["build", str(folder), "-o", str(folder.parent / "model.engine"), "--weights", "fp8"]) == 2
    assert f"--weights fp8 {message}" in capsys.readouterr().err
    assert [path.name for path in folder.parent.iterdir()] == ["lowered"]


@pytest.mark.parametrize(
    ("capability", "options", "weights", "input_projections"),
    [("9.0", ["--weights", "fp8"], "fp8", True), ("9.0", [], "keep", True), ("8.0", [], "keep", False)],
)
def test_the_model_for_the_parser_has_the_weights_that_are_asked_for(
    folder: Path,
    builds: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
    capability: str,
    options: list[str],
    weights: str,
    input_projections: bool,
) -> None:
    given: dict[str, Any] = {}

    def write(*arguments: Any, **named: Any) -> None:
        given.update(named)
        raise UsageError("as far as this")

    builds(capability, "0.1.0 sm_80 sm_90a")
    monkeypatch.setattr("mla_trt.engines.building.write_plugin_model", write)
    assert main(["build", str(folder), "-o", str(folder.parent / "model.engine"), *options]) == 2
    assert (given["weights"], given["input_projections"]) == (weights, input_projections)


@dataclass
class ParserError:
    """As TensorRT's."""

    name: str
    op: str
    text: str

    def node_name(self) -> str:
        return self.name

    def node_operator(self) -> str:
        return self.op

    def desc(self) -> str:
        return self.text


def test_a_parser_error_names_node_op_and_cause() -> None:
    plain = ParserError("node_7", "Unique", "No importer\nregistered")
    assert parser_error([plain]) == "TensorRT's parser does not take node 'node_7' (Unique): No importer registered"
    plugin = ParserError("layer 0", "MlaAttention", "Plugin not found")
    line = parser_error([plugin, plain])
    assert "node 'layer 0' (MlaAttention): Plugin not found: the plugin library has no plugin MlaAttention" in line
    assert line.endswith("(and 1 more)")
    assert parser_error([ParserError("", "", "no file")]) == "TensorRT's parser does not take the model: no file"


def test_phases_are_shown_within_each_other_and_can_be_cancelled() -> None:
    text = io.StringIO()
    ended: list[int] = []
    trt = SimpleNamespace(IProgressMonitor=object)
    with shown(Console(file=text, force_terminal=True, width=100)) as phases:
        monitor = make_monitor(trt, phases, ended)
        monitor.phase_start("Building Engine", None, 4)
        monitor.phase_start("Timing", "Building Engine", 9)
        assert monitor.step_complete("Timing", 2)
        ended.append(signal.SIGTERM)
        assert not monitor.step_complete("Timing", 3)
        monitor.phase_finish("Timing")
        monitor.phase_finish("Building Engine")
        monitor.phase_finish("never begun")
    assert "Building Engine" in text.getvalue()


@pytest.mark.parametrize("count", [0, 3])
def test_a_phase_of_weights_begins_with_the_first(count: int) -> None:
    said: list[tuple[Any, ...]] = []
    phases = SimpleNamespace(
        start=lambda *given: said.append(("start", *given)),
        step=lambda *given: said.append(("step", *given)),
        finish=lambda *given: said.append(("finish", *given)),
    )
    with weights_phase(phases) as progress:
        for done in range(1, count + 1):
            progress(done, 5)
    begun = [("start", "weights", None, 5), *(("step", "weights", done) for done in range(1, 4))]
    assert said == [*(begun if count else []), ("finish", "weights")]
    with weights_phase(None) as progress:
        assert progress is None


def test_times_are_kept_for_each_gpu_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    found = default_timing_cache(Gpu("NVIDIA H200", "9.0", 1), "10.6.0")
    assert found == Path("/somewhere/mla-trt/timing-10.6.0-NVIDIA-H200.cache")


class Times:
    """As TensorRT's timing cache."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def combine(self, other: Times, ignore_mismatch: bool) -> bool:
        fits = ignore_mismatch or other.data[:1] == self.data[:1]
        self.data += other.data[1:] if fits else b""
        return fits

    def serialize(self) -> bytes:
        return self.data


def test_times_of_builds_beside_this_one_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "times" / "cache"
    config = SimpleNamespace(get_timing_cache=lambda: Times(b"Aab"), create_timing_cache=Times)
    for others, expected in ((None, b"Aab"), (b"Acd", b"Aabcd"), (b"Bcd", b"Aab")):
        if others is not None:
            path.write_bytes(others)
        write_times(config, path)
        assert path.read_bytes() == expected
    assert [file.name for file in path.parent.iterdir()] == ["cache"]


def test_weights_count_as_the_engine_gets_them_and_not_as_their_files_do() -> None:
    weights = [
        helper.make_tensor("codes", TensorProto.FLOAT8E4M3FN, [128, 16], bytes(128 * 16), raw=True),
        helper.make_tensor("half", TensorProto.BFLOAT16, [3, 5], bytes(30), raw=True),
        helper.make_tensor("one", TensorProto.INT64, [], [1]),
        helper.make_tensor("none", TensorProto.FLOAT, [0, 7], []),
    ]
    assert weight_bytes(helper.make_model(helper.make_graph([], "weights", [], [], weights))) == 128 * 16 + 30 + 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_build_lets_tensorrt_stop_first(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT is not raised through: it asks its progress monitor, and ends the build itself."""
    steps: list[bool] = []

    class Builder:
        def __init__(self, logger: object) -> None:
            self.progress_monitor: Any = None

        def create_network(self, flags: int) -> None: ...

        def create_builder_config(self) -> Builder:
            return self

        def build_serialized_network(self, network: object, config: Builder) -> None:
            steps.append(config.progress_monitor.step_complete("tactics", 0))
            signal.raise_signal(number)
            steps.append(config.progress_monitor.step_complete("tactics", 1))

    trt = SimpleNamespace(
        Builder=Builder,
        OnnxParser=lambda *_: SimpleNamespace(parse_from_file=lambda _: True),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=0),
        IProgressMonitor=object,
    )
    monkeypatch.setattr(building, "start", lambda *_: None)
    monkeypatch.setattr(building._Build, "_configure", lambda *_: None)
    monkeypatch.setattr(building._Build, "_load_cache", lambda *_: None)
    phases = SimpleNamespace(start=lambda *_: None, step=lambda *_: None, finish=lambda *_: None)
    build = building._Build(trt, BuildOptions(), [], [], cast(Any, phases))
    with pytest.raises(Ended) as ended:
        build.run(tmp_path / "model.onnx", tmp_path / "plan")
    assert ended.value.number == number
    assert steps == [True, False]
    assert not (tmp_path / "plan").exists()
