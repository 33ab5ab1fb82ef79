"""A stand-in for Triton's TensorRT backend: `model.py` of a model that takes what an engine with resident pages takes, holds
the pages, and runs the lowered model beside it on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from mla_trt.engine import PAGE_COPIES
from mla_trt.engine_file import PREFILL, read_description
from mla_trt.engine_onnxruntime import OnnxRuntimeEngine
from mla_trt.engine_tensorrt import pool_pages
from mla_trt.profiles import read_sizes


class TritonPythonModel:
    """Runs steps one after the other."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Opens the lowered model, with as many pages as the engine has."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self._description = read_description(folder / "model.plan")
        self._engine = OnnxRuntimeEngine(folder / "model.onnx", pages=pool_pages(self._description, None))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers as the backend does."""
        responses = []
        for request in requests:
            try:
                inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                self._check(inputs)
                outputs = self._engine.run(inputs, inputs.pop(PAGE_COPIES))
                tensors = [pb_utils.Tensor(tensor.name, outputs[tensor.name]) for tensor in self._description.outputs]
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
