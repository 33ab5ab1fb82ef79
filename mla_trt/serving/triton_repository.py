"""Writes a model repository for Triton Inference Server: `REPO/NAME/config.pbtxt`, `1/model.py` and, beside it, the model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mla_trt.engine_file import description_path, is_engine, read_description
from mla_trt.engine_onnxruntime import load_structure
from mla_trt.errors import BadModelError, UsageError
from mla_trt.metadata import LoweredMetadata
from mla_trt.writing import check_writable, copy_sparse, external_locations, folder_written_whole

MODEL, ENGINE, PLUGINS = "model.onnx", "model.engine", "libmla_trt_plugins.so"

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


@dataclass(frozen=True)
class Settings:
    """What the configuration of a model says to it.

    Attributes:
        model: file of the model beside model.py.
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
                    value = text if entry.name in ("model", "plugins") else json.loads(text)
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
    plugins: Path | None = None,
    environment: Path | None = None,
) -> Path:
    """Writes a model into a repository, which may have others.

    The model is copied, so that the repository can be moved and nothing outside of it is read.

    Args:
        model: the folder that `mla-trt lower` wrote, the model in it, or the engine that `mla-trt build` wrote.
        repository: folder to write to.
        settings: of the model; its files are set here.
        name: of the model in Triton; None: that of the folder or engine.
        plugins: TensorRT's plugin library, to be copied too.
        environment: the Python environment that runs the model: a folder with bin/activate, or an archive of one.

    Returns:
        the model's folder.

    Raises:
        BadModelError: there is no model, or it is not what it should be.
        UsageError: the name is none that Triton takes, or the repository cannot be written.
    """
    engine = is_engine(model)
    if name is None:
        name = _default_name(model, engine)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UsageError(f"'{name}' is no name for a model: give --name with letters, digits, '_', '-' and '.'")
    if plugins is not None and not engine:
        raise UsageError("a lowered model runs on ONNX Runtime, which takes no TensorRT plugins: leave out --plugins")
    if environment is not None and not environment.exists():
        raise UsageError(f"the environment '{environment}' does not exist")
    files = _engine_files(model, plugins) if engine else _model_files(model)
    settings = replace(settings, model=ENGINE if engine else MODEL, plugins=PLUGINS if plugins is not None else None)
    parameters = settings.parameters()
    if environment is not None:
        parameters["EXECUTION_ENV_PATH"] = str(environment.resolve())
    config = CONFIG.format(name=name) + "".join(
        f'parameters {{ key: "{key}" value {{ string_value: {_quoted(value)} }} }}\n'
        for key, value in parameters.items()
    )
    check_writable(repository)
    with folder_written_whole(repository) as draft:
        version = draft / name / "1"
        version.mkdir(parents=True)
        (draft / name / "config.pbtxt").write_text(config)
        (version / "model.py").write_text(MODEL_PY)
        for target, source in files.items():
            copy_sparse(source, version / target)
    return repository / name


def _default_name(model: Path, engine: bool) -> str:
    resolved = model.resolve()
    if engine:
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
