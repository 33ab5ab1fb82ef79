"""The kernel library's C interface (``kernels/api.h``) for Python: ops by name, tensors by device address.

Nothing here touches the GPU; :mod:`mla_trt.cuda` has memory, streams and graphs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_trt.errors import MlaTrtError, UsageError
from mla_trt.ops import OPS
from mla_trt.ops.schema import Attributes
from mla_trt.plugins.op_table import as_number, attributes

MAX_RANK = 4
BAD_CALL, UNSUPPORTED, CUDA = 1, 2, 3  # what a function of the library returns when it is not 0


class MlaTensor(ctypes.Structure):
    """``MlaTensor`` of api.h; an absent tensor has no data and rank -1."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * MAX_RANK),
    )


class MlaAttributes(ctypes.Structure):
    """``MlaAttributes`` of op_table.h: the attributes of all ops, each 4 bytes."""

    _fields_ = tuple(
        (attribute.name, ctypes.c_float if attribute.kind is float else ctypes.c_int32)
        for attribute in attributes().values()
    )


class KernelError(MlaTrtError):
    """The library refused a call or CUDA failed in it. ``status`` is BAD_CALL, UNSUPPORTED or CUDA."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class DeviceTensor:
    """A contiguous tensor in device memory: address, element type (``onnx.TensorProto.FLOAT``, ...) and shape."""

    address: int
    dtype: int
    shape: tuple[int, ...]

    def as_struct(self) -> MlaTensor:
        """The tensor as the library takes it."""
        return MlaTensor(self.address, self.dtype, len(self.shape), (ctypes.c_int64 * MAX_RANK)(*self.shape))


def attributes_struct(values: Attributes) -> MlaAttributes:
    """The attributes of a node as the library takes them; those that the op does not have stay 0."""
    known = attributes()
    return MlaAttributes(**{name: as_number(known[name], value) for name, value in values.items()})


@dataclass(frozen=True)
class Call:
    """One call of one op, made by :meth:`KernelLibrary.call`."""

    library: ctypes.CDLL
    op: int
    attributes: MlaAttributes
    inputs: ctypes.Array[MlaTensor]
    outputs: ctypes.Array[MlaTensor]

    def workspace_bytes(self) -> int:
        """Bytes of scratch memory that :meth:`enqueue` needs. Raises KernelError."""
        size = ctypes.c_size_t()
        _check(
            self.library,
            self.library.mla_workspace_bytes(
                self.op, ctypes.byref(self.attributes), self.inputs, self.outputs, ctypes.byref(size)
            ),
        )
        return size.value

    def enqueue(self, workspace: int, workspace_bytes: int, stream: int) -> None:
        """Put the work on a stream. ``workspace`` is a device address, ``stream`` a cudaStream_t. Raises KernelError."""
        status = self.library.mla_enqueue(
            self.op, ctypes.byref(self.attributes), self.inputs, self.outputs, workspace, workspace_bytes, stream
        )
        _check(self.library, status)


class KernelLibrary:
    """A loaded ``libmla_trt_kernels.so``."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise UsageError(f"cannot load {path}: {error}") from None
        self.path = path
        self._library.mla_workspace_bytes.argtypes = [ctypes.c_int32, *[ctypes.c_void_p] * 4]
        self._library.mla_enqueue.argtypes = [
            ctypes.c_int32,
            *[ctypes.c_void_p] * 4,
            ctypes.c_size_t,
            ctypes.c_void_p,
        ]
        self._library.mla_last_error.restype = ctypes.c_char_p
        self._library.mla_build.restype = ctypes.c_char_p

    @property
    def build(self) -> str:
        """Package version and architectures that the library was built from and for."""
        return str(self._library.mla_build().decode())

    def kv_page_words(self, attributes: Attributes) -> int:
        """int32 words of a page of the latent cache that these attributes describe."""
        return self._words(self._library.mla_kv_page_words, attributes)

    def index_page_words(self, attributes: Attributes) -> int:
        """int32 words of a page of the index cache that these attributes describe."""
        return self._words(self._library.mla_index_page_words, attributes)

    def _words(self, function: Any, attributes: Attributes) -> int:
        words = ctypes.c_int64()
        _check(self._library, function(ctypes.byref(attributes_struct(attributes)), ctypes.byref(words)))
        return words.value

    def call(
        self,
        op_type: str,
        attributes: Attributes,
        inputs: Mapping[str, DeviceTensor],
        outputs: Mapping[str, DeviceTensor],
    ) -> Call:
        """A call of an op. ``inputs`` and ``outputs`` are by formal name; optional ones may be missing."""
        op = OPS[op_type]
        return Call(
            self._library,
            list(OPS).index(op_type),
            attributes_struct(attributes),
            _structs([formal.name for formal in op.inputs], inputs),
            _structs([formal.name for formal in op.outputs], outputs),
        )


def _structs(names: list[str], tensors: Mapping[str, DeviceTensor]) -> ctypes.Array[MlaTensor]:
    absent = MlaTensor(None, 0, -1)
    return (MlaTensor * len(names))(*(tensors[name].as_struct() if name in tensors else absent for name in names))


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        raise KernelError(status, library.mla_last_error().decode())
