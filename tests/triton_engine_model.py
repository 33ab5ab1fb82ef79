"""A stand-in for Triton's TensorRT backend: `model.py` of a model that takes what an engine with resident pages takes, holds
the pages, and runs the lowered model beside it on ONNX Runtime."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import triton_python_backend_utils as pb_utils

from mla_trt.engines.engine import PAGE_COPIES
from mla_trt.engines.engine_file import PREFILL, read_description
from mla_trt.engines.engine_onnxruntime import OnnxRuntimeEngine
from mla_trt.engines.engine_tensorrt import pool_pages
from mla_trt.engines.profiles import read_sizes


class TritonPythonModel:
    """Runs steps one after the other."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Opens the lowered model, with as many pages as the engine has."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self._held = folder / "held"
        self._description = read_description(folder / "model.plan")
        self._engine = OnnxRuntimeEngine(folder / "model.onnx", pages=pool_pages(self._description, None))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers as the backend does, but not while there is a file `held` beside the plan."""
        while self._held.exists():
            time.sleep(0.01)
        responses = []
        for request in requests:
            try:
                inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                self._check(inputs)
                outputs = self._engine.run(inputs, inputs.pop(PAGE_COPIES))
                tensors = [
                    make_tensor(tensor.name, outputs[tensor.name].astype(tensor.numpy_dtype))
                    for tensor in self._description.outputs
                ]
                responses.append(pb_utils.InferenceResponse(tensors))
            except Exception as error:
                responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))))
        return responses

    def _check(self, inputs: Mapping[str, Any]) -> None:
        """Sizes must be those of the plan's profile, and types those of its inputs."""
        most = {axis: size.most for axis, size in self._description.profiles[PREFILL].items()}
        for axis, size in read_sizes(self._description.inputs, inputs).items():
            if not 1 <= size <= most[axis]:
                raise ValueError(f"{axis} is {size}, the profile has 1 to {most[axis]}")
        for tensor in self._description.inputs:
            if inputs[tensor.name].dtype != tensor.numpy_dtype:
                raise ValueError(f"'{tensor.name}' is {inputs[tensor.name].dtype}, must be {tensor.numpy_dtype}")


def make_tensor(name: str, value: np.ndarray) -> Any:
    """A tensor of Triton's, of bfloat16 too, which the backend takes through DLPack only."""
    if value.dtype != ml_dtypes.bfloat16:
        return pb_utils.Tensor(name, value)
    shape = (ctypes.c_int64 * value.ndim)(*value.shape)
    managed = DlManagedTensor(
        value.ctypes.data, 1, 0, value.ndim, 4, 16, 1, shape, None, 0, None, ctypes.cast(RELEASE, ctypes.c_void_p)
    )
    address = ctypes.addressof(managed)
    HELD[address] = value, shape, managed
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return pb_utils.Tensor.from_dlpack(name, make(address, b"dltensor", None))


class DlManagedTensor(ctypes.Structure):
    """`DLManagedTensor` of DLPack's dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


HELD: dict[int, tuple[Any, ...]] = {}
RELEASE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda address: HELD.pop(address))
