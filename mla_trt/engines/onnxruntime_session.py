"""Opens a model on ONNX Runtime, from a file or from memory, with the settings that every user of it in this package
needs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import google.protobuf.message
import numpy as np
import onnx
import onnxruntime

from mla_trt.errors import BadModelError

# Above this, protobuf refuses to serialise a message.
PROTOBUF_LIMIT = 2**31 - 2**20


def open_session(model: onnx.ModelProto | Path | str, *, base_dir: Path | None = None) -> onnxruntime.InferenceSession:
    """Returns a CPU session of a model.

    Args:
        model: a path, or a model in memory.
        base_dir: folder of the external data of a model in memory.

    Raises:
        BadModelError: ONNX Runtime cannot load the model, not even without optimising it.
    """
    reason = ""
    # ONNX Runtime's optimiser makes invalid graphs of fp8 QuantizeLinear and DequantizeLinear pairs; as written, they
    # run.
    for level in (
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.log_severity_level = 4  # what fails is raised as well
        # Fused with their neighbours, dequantised weights would meet activations rounded to 8 bits, which no model asks for.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        # Threads that spin while they wait cost more than they give in the short steps of a session.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            return _open(model, base_dir, options)
        except RuntimeErrors as error:
            reason = one_line(error)
    raise BadModelError(f"ONNX Runtime cannot load the model: {reason}")


def _open(
    model: onnx.ModelProto | Path | str, base_dir: Path | None, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    providers = ["CPUExecutionProvider"]
    if not isinstance(model, onnx.ModelProto):
        return onnxruntime.InferenceSession(str(model), options, providers=providers)
    data = _serialised(model)
    if data is None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            onnx.save_model(copy, path, save_as_external_data=True, location="model.data")
            return onnxruntime.InferenceSession(str(path), options, providers=providers)
    if base_dir is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(base_dir))
    return onnxruntime.InferenceSession(data, options, providers=providers)


def _serialised(model: onnx.ModelProto) -> bytes | None:
    """The model as bytes; None where it is larger than protobuf writes. (Asking for its size would write it too.)"""
    try:
        data = model.SerializeToString()
    except (google.protobuf.message.EncodeError, ValueError):
        return None
    return data if len(data) < PROTOBUF_LIMIT else None


def one_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _error_classes() -> tuple[type[Exception], ...]:
    # They have no common base class of their own.
    module = onnxruntime.capi.onnxruntime_pybind11_state
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*found, RuntimeError)


RuntimeErrors: tuple[type[Exception], ...] = _error_classes()
"""Everything that ONNX Runtime raises when it loads or runs a model."""


def input_dtype(entry: onnxruntime.NodeArg) -> np.dtype:
    """The numpy type (of ml_dtypes where numpy has none) of an input or output of a session.

    Raises:
        BadModelError: it is no tensor.
    """
    kind = str(entry.type).removeprefix("tensor(").removesuffix(")")
    try:
        return np.dtype({"float": "float32", "double": "float64"}.get(kind, kind))
    except TypeError:
        raise BadModelError(f"'{entry.name}' is a {entry.type}, which is not supported") from None
