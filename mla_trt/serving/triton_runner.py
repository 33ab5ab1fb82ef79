"""Runs the steps of an engine that Triton's TensorRT backend holds: business-logic scripting of the Python backend.

Like `mla_trt.serving.triton_model`, only the backend's own process can import this module.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
import triton_python_backend_utils as pb_utils

from mla_trt.engines.engine_file import EngineDescription
from mla_trt.errors import MlaTrtError

NOT_SERVED = ("not ready", "unknown model", "no available versions")
"""In what Triton answers when it ends, and when a model is unloaded or was never loaded."""


class TritonRunner:
    """Runs steps by requests to a model of this Triton; see `mla_trt.engines.engine_tensorrt.Runner`.

    The model's plugins hold the pages, which are gone when it is unloaded. So once it was not served every step is an error,
    until `forget` tells that nobody wants them back. An engine that was replaced is not used at all.

    Args:
        description: of the engine.
        model: its name in Triton.
        version: its version there.
        files: of the engine. Where they change, Triton may replace it without a moment in which none is served.
    """

    def __init__(self, description: EngineDescription, model: str, version: int, files: Sequence[Path]) -> None:
        self._description = description
        self._model = model
        self._version = version
        self._files = files
        self._stamps = self._read_stamps()
        self._dtypes = {output.name: output.numpy_dtype for output in description.outputs}
        self._missing: str | None = None

    def run(self, profile: str, inputs: Mapping[str, np.ndarray], *, recurring: bool) -> dict[str, np.ndarray]:
        """Runs one step; see `mla_trt.engines.engine_tensorrt.Runner.run`.

        Raises:
            MlaTrtError: the engine is not served, was not served since the last `forget`, was replaced, or fails.
        """
        if self._read_stamps() != self._stamps:
            raise MlaTrtError(
                f"the files of the model '{self._model}' were replaced: load it and then this model again"
            )
        if self._missing is not None:
            raise MlaTrtError(self._missing)
        request = pb_utils.InferenceRequest(
            model_name=self._model,
            model_version=self._version,
            requested_output_names=list(self._dtypes),
            inputs=[pb_utils.Tensor(name, value) for name, value in inputs.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
        )
        found = request.exec()
        if not found.has_error():
            return {
                tensor.name(): read_tensor(tensor, self._dtypes[tensor.name()]) for tensor in found.output_tensors()
            }
        message = found.error().message()
        if not tells_not_served(message):
            raise MlaTrtError(f"the model '{self._model}' cannot run the step: {message}")
        self._missing = (
            f"Triton does not serve the model '{self._model}' ({message}): it needs TensorRT {self._description.tensorrt}, a GPU "
            f"of compute capability {self._description.compute_capability} and the plugin library; Triton's log says what is wrong"
        )
        raise MlaTrtError(self._missing)

    def forget(self) -> None:
        """Tells that no page that was written before will be read."""
        self._missing = None

    def copy_pages(self, page_copies: np.ndarray) -> None:
        """Never needed: such an engine has the input `page_copies`."""
        self._refuse()

    def read_pages(self, cache: str) -> np.ndarray:
        """Cannot be done."""
        self._refuse()

    def write_pages(self, cache: str, pages: np.ndarray) -> None:
        """Cannot be done."""
        self._refuse()

    def close(self) -> None:
        """Does nothing: the engine is Triton's."""

    @property
    def recordings(self) -> int | None:
        """None: Triton runs the engine as it likes."""
        return None

    def _read_stamps(self) -> list[tuple[int, int] | None]:
        return [_stamp(file) for file in self._files]

    def _refuse(self) -> NoReturn:
        raise MlaTrtError(f"the plugins of '{self._model}' hold its pages, which cannot be read or replaced")


def tells_not_served(message: str) -> bool:
    """Whether an error of Triton's says that it does not serve the model at all."""
    return any(reason in message for reason in NOT_SERVED)


def read_tensor(tensor: Any, dtype: np.dtype) -> np.ndarray:
    """A copy of a tensor of Triton's.

    Args:
        tensor: in host memory.
        dtype: its type, which it does not tell itself.
    """
    # There is no bfloat16 for as_numpy, and numpy reads none through DLPack.
    values: np.ndarray = _read_dlpack(tensor.to_dlpack(), dtype) if dtype == ml_dtypes.bfloat16 else tensor.as_numpy()
    return values


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


class _DlTensor(ctypes.Structure):
    """`DLTensor` of DLPack's dlpack.h, with which a capsule named "dltensor" begins."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _read_dlpack(capsule: Any, dtype: np.dtype) -> np.ndarray:
    """A copy of a contiguous tensor in host memory."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _DlTensor.from_address(pointer(capsule, b"dltensor"))
    values = np.empty(tensor.shape[: tensor.ndim], dtype)
    ctypes.memmove(values.ctypes.data, (tensor.data or 0) + tensor.byte_offset, values.nbytes)
    return values
