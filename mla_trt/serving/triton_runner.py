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

from mla_trt.engine_file import EngineDescription
from mla_trt.errors import MlaTrtError

NOT_SERVED = ("not ready", "unknown model", "no available versions")
"""In what Triton answers when it ends, and when a model is unloaded or was never loaded."""


class TritonRunner:
    """Runs steps by requests to a model of this Triton; see `mla_trt.engine_tensorrt.Runner`.

    The model's plugins hold the pages. They are gone when it is unloaded, and pages that were written before must not be
    read from an engine that was loaded since: after that every step is an error.

    Args:
        description: of the engine.
        model: its name in Triton.
        version: its version there.
        plan: its file; Triton may replace an engine whose file was replaced without a moment in which none is served.
    """

    def __init__(self, description: EngineDescription, model: str, version: int, plan: Path) -> None:
        self._description = description
        self._model = model
        self._version = version
        self._plan = plan
        self._stamp = _stamp(plan)
        self._dtypes = {output.name: output.numpy_dtype for output in description.outputs}
        self._began = False
        self._gone = False

    def run(self, profile: str, inputs: Mapping[str, np.ndarray], *, recurring: bool) -> dict[str, np.ndarray]:
        """Runs one step; see `mla_trt.engine_tensorrt.Runner.run`.

        Raises:
            MlaTrtError: the engine is not served, or fails.
        """
        self._check()
        tensors = [pb_utils.Tensor(name, value) for name, value in inputs.items()]
        try:
            found = self._ask(tensors)
        except pb_utils.TritonModelException as error:
            raise MlaTrtError(f"the model '{self._model}' cannot run the step: {error}") from None
        if found.has_error():
            message = found.error().message()
            if tells_not_served(message):
                self._gone = self._began
                self._check()
                raise MlaTrtError(
                    f"the model '{self._model}' is not loaded ({message}): it needs a Triton with TensorRT "
                    f"{self._description.tensorrt}, a GPU of compute capability {self._description.compute_capability} and the "
                    "plugin library; Triton's log says what is wrong"
                )
            raise MlaTrtError(f"the model '{self._model}' cannot run the step: {message}")
        self._began = True
        return {tensor.name(): read_tensor(tensor, self._dtypes[tensor.name()]) for tensor in found.output_tensors()}

    def watch(self) -> None:
        """Looks whether the engine is still there. To be called often enough to see it being loaded again."""
        if self._began and not self._gone:
            answer = self._ask([])
            unloaded = answer.has_error() and tells_not_served(answer.error().message())
            self._gone = unloaded or _stamp(self._plan) != self._stamp

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

    def _ask(self, tensors: Sequence[Any]) -> Any:
        """The response to a request with these inputs. Without any Triton refuses it, in words that tell whether it serves
        the model."""
        request = pb_utils.InferenceRequest(
            model_name=self._model,
            model_version=self._version,
            requested_output_names=list(self._dtypes),
            inputs=list(tensors),
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
        )
        return request.exec()

    def _check(self) -> None:
        if self._gone:
            raise MlaTrtError(
                f"the model '{self._model}' was unloaded or replaced, and the pages that it held are gone: if the server goes "
                f"on, load '{self._model}' and then this model again"
            )

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
