"""Weights written to disk as they are made, so that a model's own never lie in memory all at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

ALIGNMENT = 4096  # so that readers can map every tensor


class WeightFile:
    """One file of external data, written from its beginning to its end.

    Args:
        path: the file; it is made with the first tensor. Tensors name it without its folder.
        told: after each tensor, how many there are.
    """

    def __init__(self, path: Path, told: Callable[[int], None] | None = None) -> None:
        self.path = path
        self._told = told
        self._end = self._count = 0

    def add(self, name: str, data: bytes | memoryview, element: int, shape: tuple[int, ...]) -> TensorProto:
        """Appends a tensor's bytes; returns a tensor that refers to them."""
        offset = -(-self._end // ALIGNMENT) * ALIGNMENT
        with self.path.open("r+b" if self._end else "wb") as file:
            file.seek(offset)
            file.write(data)
        size = memoryview(data).nbytes
        self._end = offset + size
        self._count += 1
        if self._told is not None:
            self._told(self._count)
        tensor = TensorProto(name=name, data_type=element, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.path.name), ("offset", offset), ("length", size)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        return tensor

    def add_array(self, name: str, values: np.ndarray) -> TensorProto:
        """Appends an array, of any type that ONNX has."""
        array = np.ascontiguousarray(values)
        element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        return self.add(name, array.reshape(-1).view(np.uint8).data, element, array.shape)

    def move_out(self, tensor: TensorProto) -> None:
        """Moves a tensor's bytes from the model to the file."""
        moved = self.add(tensor.name, tensor.raw_data, tensor.data_type, tuple(tensor.dims))
        tensor.CopyFrom(moved)


def beside(tensor: TensorProto, name: str, values: np.ndarray, weight_file: WeightFile | None) -> TensorProto:
    """A tensor made of another one's values: in the file, if there is one and the other is in a file, or else in the model."""
    if weight_file is not None and tensor.data_location == TensorProto.EXTERNAL:
        return weight_file.add_array(name, values)
    return numpy_helper.from_array(values, name)
