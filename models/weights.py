"""Weights of a generated model: random values inside the model when it is small, sparse files beside it when it is
large."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from mla_trt.errors import UsageError

ALIGNMENT = 4096  # of each tensor in a file, so that it can be mapped
RANDOM_PART = 1 << 24  # values that are made at a time
NUMPY_TYPES: dict[int, np.dtype] = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


class WeightStore(Protocol):
    """Makes the initializer of each weight."""

    def weight(self, name: str, shape: tuple[int, ...], dtype: int, *, norm: bool = False) -> TensorProto:
        """The initializer of one weight. `norm` marks a norm's, which lies around 1."""


class RandomWeights:
    """Random values kept in the model: for models that fit in memory and are run."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)

    def weight(self, name: str, shape: tuple[int, ...], dtype: int, *, norm: bool = False) -> TensorProto:
        """Random values of a size that keeps activations near 1."""
        if norm:
            return numpy_helper.from_array(norm_weight(self._random, shape, dtype), name)
        scale = 1.0 if len(shape) == 1 else math.sqrt(1.0 / shape[0])
        values = self._random.standard_normal(shape) * scale
        return numpy_helper.from_array(values.astype(NUMPY_TYPES[dtype]), name)


def norm_weight(random: np.random.Generator, shape: tuple[int, ...], dtype: int) -> np.ndarray:
    """Random values around 1."""
    return random.uniform(0.5, 1.5, shape).astype(NUMPY_TYPES[dtype])


@dataclass
class SparseWeights:
    """Weights as external data in files of their full sizes. They are sparse, read as zeros and take no space on disk; only norms have
    values, because a norm by zeros leaves nothing of what comes before it. Or all weights get random values.

    One file is used where the file system allows one of that size, else as many as it takes.

    Attributes:
        directory: where the files lie, beside the model.
        stem: start of their names.
        random: whether all weights get random values.
        largest_file: bytes that one file may have; found out when 0.
        total: bytes of all weights so far.
    """

    directory: Path
    stem: str
    random: bool = False
    largest_file: int = 0
    total: int = 0
    _sizes: list[int] = field(default_factory=lambda: [0])
    _norms: list[tuple[int, int, np.ndarray]] = field(default_factory=list)  # file, offset, values
    _others: list[tuple[int, int, tuple[int, ...], int]] = field(default_factory=list)  # file, offset, shape, type

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(0)
        self.largest_file = self.largest_file or largest_file(self.directory)

    def weight(self, name: str, shape: tuple[int, ...], dtype: int, *, norm: bool = False) -> TensorProto:
        """The place of one weight, which is zeros unless it is a norm's."""
        length = math.prod(shape) * NUMPY_TYPES[dtype].itemsize
        if length > self.largest_file:
            raise UsageError(
                f"{self.directory} takes files of {self.largest_file} bytes at most, too small for {name}: use another"
            )
        offset = -(-self._sizes[-1] // ALIGNMENT) * ALIGNMENT
        if offset + length > self.largest_file:
            self._sizes.append(0)
            offset = 0
        self._sizes[-1] = offset + length
        self.total += length
        if norm:
            self._norms.append((len(self._sizes) - 1, offset, norm_weight(self._random, shape, dtype)))
        else:
            self._others.append((len(self._sizes) - 1, offset, shape, dtype))
        tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
        place = {"location": self._file_name(len(self._sizes) - 1), "offset": str(offset), "length": str(length)}
        tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in place.items())
        return tensor

    def write(self) -> list[Path]:
        """Makes the files, as sparse ones, and returns them."""
        paths = [self.directory / self._file_name(index) for index in range(len(self._sizes))]
        for path, size in zip(paths, self._sizes, strict=True):
            path.unlink(missing_ok=True)
            path.touch()
            os.truncate(path, size)
        for index, offset, values in self._norms:
            with paths[index].open("r+b") as file:
                file.seek(offset)
                file.write(values.tobytes())
        if self.random:
            for index, offset, shape, dtype in self._others:
                with paths[index].open("r+b") as file:
                    file.seek(offset)
                    self._write_random(file, shape, dtype)
        return paths

    def _write_random(self, file: BinaryIO, shape: tuple[int, ...], dtype: int) -> None:
        """Random values of a size that keeps activations near 1, a part at a time."""
        scale = np.float32(1.0 if len(shape) == 1 else math.sqrt(1.0 / shape[-2]))
        count = math.prod(shape)
        for start in range(0, count, RANDOM_PART):
            values = self._random.standard_normal(min(RANDOM_PART, count - start), np.float32) * scale
            file.write(values.astype(NUMPY_TYPES[dtype]).tobytes())

    def _file_name(self, index: int) -> str:
        return f"{self.stem}.data" if index == 0 else f"{self.stem}.data.{index}"


def largest_file(directory: Path) -> int:
    """The largest power of two, up to 16 TiB, that a sparse file in a directory may have."""
    with tempfile.NamedTemporaryFile(dir=directory) as probe:
        for exponent in range(44, 30, -1):
            try:
                os.truncate(probe.name, 2**exponent)
            except OSError:
                continue
            return 2**exponent
    raise UsageError(f"{directory} does not take sparse files of 2 GiB: use another file system")
