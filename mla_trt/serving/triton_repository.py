"""Writes a model repository for Triton Inference Server.

`REPO/NAME/config.pbtxt`, `1/model.py` and, beside it, the model; for an engine that Triton's TensorRT backend runs, it is a
model of its own, `REPO/NAME_engine`, which the model NAME asks for each step.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from onnx import TensorProto

from mla_trt.engines.engine_file import (
    RESIDENT,
    EngineDescription,
    EngineTensor,
    description_path,
    is_engine,
    read_description,
)
from mla_trt.engines.engine_onnxruntime import load_structure
from mla_trt.engines.engine_tensorrt import pool_pages
from mla_trt.errors import BadModelError, UsageError
from mla_trt.metadata import LoweredMetadata
from mla_trt.plugins.library import describe
from mla_trt.writing import check_writable, copy_sparse, external_locations, folder_written_whole

MODEL, ENGINE, PLAN, PLUGINS = "model.onnx", "model.engine", "model.plan", "libmla_trt_plugins.so"
PYTHON, TENSORRT = "python", "tensorrt"
BACKENDS = (PYTHON, TENSORRT)
TYPES: dict[int, str] = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
}
"""Names of types in `config.pbtxt`."""
STOP_FILE = "MLA_TRT_STOP_FILE"
"""Environment variable that names a file: when it appears, the server is about to end. Triton by itself lets a model know only after all HTTP
clients have gone, and ends in disorder when its exit timeout is over before."""

MODEL_PY = '''"""The model that Triton's Python backend runs."""

try:
    from mla_trt.serving.triton_model import TritonPythonModel
except ImportError as error:
    raise ImportError(
        f"{error}: the Python environment of the model lacks what it needs. Install mla-trt into the one whose python3 "
        "is first on tritonserver's PATH, or name another one with 'mla-trt triton --environment'"
    ) from error

__all__ = ["TritonPythonModel"]
'''

CONFIG = """name: "{name}"
backend: "python"
max_batch_size: 0  # requests are batched by the engine loop, a step at a time
model_transaction_policy {{ decoupled: true }}
instance_group [ {{ kind: KIND_CPU count: 1 }} ]  # one engine, one pool of pages; the engine itself chooses the GPU
input [
  {{ name: "input_ids" data_type: TYPE_INT32 dims: [ -1 ] }},
  {{ name: "max_new_tokens" data_type: TYPE_INT32 dims: [ 1 ] optional: true }},
  {{ name: "stop_ids" data_type: TYPE_INT32 dims: [ -1 ] optional: true }},
  {{ name: "temperature" data_type: TYPE_FP32 dims: [ 1 ] optional: true }},
  {{ name: "top_k" data_type: TYPE_INT32 dims: [ 1 ] optional: true }},
  {{ name: "top_p" data_type: TYPE_FP32 dims: [ 1 ] optional: true }},
  {{ name: "seed" data_type: TYPE_UINT64 dims: [ 1 ] optional: true }},
  {{ name: "priority" data_type: TYPE_INT32 dims: [ 1 ] optional: true }}
]
output [
  {{ name: "token_ids" data_type: TYPE_INT32 dims: [ -1 ] }},
  {{ name: "finish_reason" data_type: TYPE_STRING dims: [ 1 ] }}
]
"""

ENGINE_CONFIG = """name: "{name}"
backend: "tensorrt"
platform: "tensorrt_plan"
max_batch_size: 0  # a request is a whole step of the engine loop, of sequences that have different numbers of tokens
# One instance on one GPU: each would have pages of its own.
instance_group [ {{ kind: KIND_GPU count: 1 gpus: [ 0 ] }} ]
input [
{inputs}
]
output [
{outputs}
]
"""


@dataclass(frozen=True)
class Settings:
    """What the configuration of a model says to it.

    Attributes:
        model: file of the model beside model.py, or in the version folder of `engine_model`.
        engine_model: the model of Triton's TensorRT backend that runs the steps; None: this model does.
        plugins: file of TensorRT's plugin library beside it, None: the one that is found.
        pages: pages in the pool; None: as many as the engine was built for, or the default.
        max_batch, max_step_tokens, max_waiting: limits of `EngineLoop`.
        max_new_tokens: of requests that do not say.
        stop_ids: of requests that do not say.
        drain_seconds: how long requests may go on when the model is unloaded.

    Raises:
        UsageError: a value outside its range.
    """

    model: str = MODEL
    engine_model: str | None = None
    plugins: str | None = None
    pages: int | None = None
    max_batch: int = 16
    max_step_tokens: int = 512
    max_waiting: int = 256
    max_new_tokens: int = 128
    stop_ids: tuple[int, ...] = ()
    drain_seconds: float = 20.0

    def __post_init__(self) -> None:
        for name in ("pages", "max_batch", "max_step_tokens", "max_waiting", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}: it must be at least 1")
        if not (math.isfinite(self.drain_seconds) and self.drain_seconds >= 0):
            raise UsageError(f"drain_seconds is {self.drain_seconds}: it must be 0 or more")
        for file in (self.model, self.plugins):
            if file is not None and Path(file).name != file:
                raise UsageError(f"'{file}' is not the name of a file beside model.py")
        if self.engine_model is not None and not _is_name(self.engine_model):
            raise UsageError(f"'{self.engine_model}' is no name for a model")

    def parameters(self) -> dict[str, str]:
        """As parameters of `config.pbtxt`: strings as they are, others in JSON; what is None is left out."""
        return {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in asdict(self).items()
            if value is not None
        }

    @classmethod
    def parse(cls, parameters: Mapping[str, str]) -> Settings:
        """Reads the parameters of a configuration; others than these are somebody else's.

        Raises:
            UsageError: a value that cannot be read, or is outside its range.
        """
        values: dict[str, Any] = {}
        for entry in fields(cls):
            if entry.name in parameters:
                text = parameters[entry.name]
                try:
                    value = text if entry.name in ("model", "engine_model", "plugins") else json.loads(text)
                    values[entry.name] = tuple(map(int, value)) if entry.name == "stop_ids" else value
                except (ValueError, TypeError):
                    raise UsageError(f"the parameter '{entry.name}' of config.pbtxt cannot be read: {text}") from None
        try:
            return cls(**values)
        except TypeError as error:
            raise UsageError(f"the parameters of config.pbtxt cannot be read: {error}") from None


def write_repository(
    model: Path,
    repository: Path,
    settings: Settings,
    *,
    name: str | None = None,
    backend: str = PYTHON,
    plugins: Path | None = None,
    environment: Path | None = None,
    link: bool = False,
) -> Path:
    """Writes a model into a repository, which may have others.

    The model is copied, so that the repository can be moved and nothing outside of it is read, unless `link` is set.

    Args:
        model: the folder that `mla-trt lower` wrote, the model in it, or the engine that `mla-trt build` wrote.
        repository: folder to write to.
        settings: of the model; its files are set here.
        name: of the model in Triton; None: that of the folder or engine.
        backend: "python", the model holds the engine itself, or "tensorrt", it asks a model NAME_engine of Triton's TensorRT
            backend. That one copies every input, so the engine must hold its pages.
        plugins: TensorRT's plugin library, to be copied too.
        environment: the Python environment that runs the model: a folder with bin/activate, or an archive of one.
        link: do not copy; the repository has links to the model, for as long as nobody moves either.

    Returns:
        the model's folder.

    Raises:
        BadModelError: there is no model, or it is not what it should be.
        UsageError: the name is none that Triton takes, the backend does not take the model, or the repository cannot be
            written.
    """
    if backend not in BACKENDS:
        raise UsageError(f"--backend is '{backend}': choose one of {', '.join(BACKENDS)}")
    engine = is_engine(model)
    if name is None:
        name = default_name(model)
    if not _is_name(name):
        raise UsageError(f"'{name}' is no name for a model: give --name with letters, digits, '_', '-' and '.'")
    if plugins is not None and not engine:
        raise UsageError("a lowered model runs on ONNX Runtime, which takes no TensorRT plugins: leave out --plugins")
    if environment is not None and not environment.exists():
        raise UsageError(f"the environment '{environment}' does not exist")
    if backend == TENSORRT and not engine:
        raise UsageError(
            f"'{model}' is no engine, and Triton's TensorRT backend runs nothing else: build one with "
            "'mla-trt build' --cache resident --pages N"
        )
    if backend == TENSORRT:
        folders = _with_engine_model(model, settings, name, plugins)
    else:
        files = _engine_files(model, plugins) if engine else _model_files(model)
        used = PLUGINS if plugins is not None else None
        settings = replace(settings, model=ENGINE if engine else MODEL, engine_model=None, plugins=used)
        folders = {name: _Folder(CONFIG.format(name=name), settings.parameters(), MODEL_PY, files)}
    if environment is not None:
        folders[name].parameters["EXECUTION_ENV_PATH"] = str(environment.resolve())
    check_writable(repository)
    with folder_written_whole(repository) as draft:
        for target, folder in folders.items():
            folder.write(draft / target, link=link)
    return repository / name


@dataclass(frozen=True)
class _Folder:
    """A model of the repository.

    Attributes:
        config: its configuration without parameters.
        parameters: those of its configuration.
        script: model.py, None where it has none.
        files: what is copied beside that or linked to, by name.
    """

    config: str
    parameters: dict[str, str]
    script: str | None
    files: Mapping[str, Path]

    def write(self, folder: Path, *, link: bool) -> None:
        version = folder / "1"
        version.mkdir(parents=True)
        parameters = "".join(
            f'parameters {{ key: "{key}" value {{ string_value: {_quoted(value)} }} }}\n'
            for key, value in self.parameters.items()
        )
        (folder / "config.pbtxt").write_text(self.config + parameters)
        if self.script is not None:
            (version / "model.py").write_text(self.script)
        for target, source in self.files.items():
            if link:
                (version / target).symlink_to(source.resolve())
            else:
                copy_sparse(source, version / target)


def _with_engine_model(engine: Path, settings: Settings, name: str, plugins: Path | None) -> dict[str, _Folder]:
    """The model, and that of its engine."""
    description = read_description(engine)
    if description.cache != RESIDENT:
        raise UsageError(
            f"'{engine}' has its pages as inputs and outputs, which Triton's TensorRT backend would copy at every step: build it "
            "with --cache resident --pages N, or leave out --backend tensorrt"
        )
    pool_pages(description, settings.pages)
    narrow = [tensor.name for tensor in description.inputs if tensor.dtype == TensorProto.BFLOAT16]
    if narrow:
        raise UsageError(
            f"'{engine}' has bfloat16 inputs ({', '.join(narrow)}), which a Python model of Triton cannot give: leave out "
            "--backend tensorrt"
        )
    engine_name = f"{name}_engine"
    settings = replace(settings, model=PLAN, engine_model=engine_name, plugins=None)
    files = {PLAN: engine, description_path(Path(PLAN)).name: description_path(engine)}
    if plugins is not None:
        _check_plugins(plugins, description)
        files[PLUGINS] = plugins
    return {
        name: _Folder(CONFIG.format(name=name), settings.parameters(), MODEL_PY, {}),
        engine_name: _Folder(engine_config(engine_name, description), {}, None, files),
    }


def _check_plugins(plugins: Path, description: EngineDescription) -> None:
    """Nobody does when the engine is loaded: TensorRT would take another version as it is, or say little."""
    library = describe(plugins)
    version, major = description.plugins.split()[0], int(description.tensorrt.split(".")[0])
    if (library.version, library.tensorrt) != (version, major):
        raise BadModelError(
            f"the engine was built with plugins of version {version} for TensorRT {major}, and '{plugins}' is of "
            f"{library.version} for {library.tensorrt or 'none'}: build the engine again"
        )


def engine_config(name: str, description: EngineDescription) -> str:
    """`config.pbtxt` of an engine that Triton's TensorRT backend runs."""

    def listed(tensors: Sequence[EngineTensor]) -> str:
        return ",\n".join(
            f"  {{ name: {_quoted(tensor.name)} data_type: TYPE_{TYPES[tensor.dtype]} dims: [ {_dims(tensor)} ] }}"
            for tensor in tensors
        )

    return ENGINE_CONFIG.format(name=name, inputs=listed(description.inputs), outputs=listed(description.outputs))


def _dims(tensor: EngineTensor) -> str:
    return ", ".join(str(-1 if isinstance(axis, str) else axis) for axis in tensor.axes)


def _is_name(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", text) is not None


def default_name(model: Path) -> str:
    """The name of the folder or engine."""
    resolved = model.resolve()
    if is_engine(model):
        return resolved.stem
    return resolved.name if resolved.is_dir() else resolved.parent.name


def _engine_files(engine: Path, plugins: Path | None) -> dict[str, Path]:
    read_description(engine)
    files = {ENGINE: engine, description_path(Path(ENGINE)).name: description_path(engine)}
    if plugins is not None:
        if not plugins.is_file():
            raise UsageError(f"the plugin library '{plugins}' does not exist")
        files[PLUGINS] = plugins
    return files


def _model_files(model: Path) -> dict[str, Path]:
    if model.is_dir():
        model = model / MODEL
    if not model.is_file():
        raise BadModelError(
            f"'{model}' does not exist: give the folder that 'mla-trt lower' wrote, or the file that 'mla-trt build' wrote"
        )
    structure = load_structure(model)
    LoweredMetadata.of(structure)
    files = {MODEL: model}
    for location in sorted(external_locations(structure)):
        source = model.parent / location
        if not source.resolve().is_relative_to(model.parent.resolve()):
            raise BadModelError(f"'{model}' has weights outside of its folder, at '{location}'")
        if not source.is_file():
            raise BadModelError(f"'{source}', which has weights of '{model}', does not exist")
        files[location] = source
    return files


def _quoted(text: str) -> str:
    """A string of protobuf's text format."""
    return (
        '"'
        + "".join(
            f"\\{byte:03o}" if byte < 32 or byte > 126 or chr(byte) in '"\\' else chr(byte) for byte in text.encode()
        )
        + '"'
    )
