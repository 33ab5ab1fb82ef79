"""The kernels' C interface through ctypes: attributes and tensors by name, sizing calls, errors."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

from mla_trt.ops import OPS
from mla_trt.plugins.op_table import as_number, attributes

MAX_RANK = 4
OK, BAD_CALL, UNSUPPORTED, CUDA = range(4)
OP_NUMBERS = {name: number for number, name in enumerate(OPS)}


class Attributes(ctypes.Structure):
    """MlaAttributes of op_table.h."""

    _fields_ = [(a.name, ctypes.c_float if a.kind is float else ctypes.c_int32) for a in attributes().values()]


class Tensor(ctypes.Structure):
    """MlaTensor of api.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * MAX_RANK),
    ]


def make_attributes(values: Mapping[str, int | float | str]) -> Attributes:
    """The structure; what is not named is 0."""
    known = attributes()
    return Attributes(**{name: as_number(known[name], value) for name, value in values.items()})


def make_tensor(dtype: int, shape: Sequence[int]) -> Tensor:
    """A tensor of an ``onnx.TensorProto`` type without memory. Only the first 4 sizes are kept, the rank is all of them."""
    return Tensor(None, dtype, len(shape), (ctypes.c_int64 * MAX_RANK)(*shape[:MAX_RANK]))


ABSENT = Tensor(None, 0, -1)


class Kernels:
    """The library of kernels."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.mla_last_error.restype = ctypes.c_char_p
        self.library.mla_build.restype = ctypes.c_char_p

    def build(self) -> str:
        return str(self.library.mla_build().decode())

    def page_words(self, values: Mapping[str, int | float | str], index: bool = False) -> int:
        """Words of a page of the latent cache, or of the index cache."""
        words = ctypes.c_int64()
        function = self.library.mla_index_page_words if index else self.library.mla_kv_page_words
        assert function(ctypes.byref(make_attributes(values)), ctypes.byref(words)) == OK
        return words.value

    def workspace(
        self,
        op: str | int,
        values: Mapping[str, int | float | str],
        inputs: Mapping[str, tuple[int, Sequence[int]]],
        outputs: Mapping[str, tuple[int, Sequence[int]]],
    ) -> tuple[int, str]:
        """Status and error of a sizing call; tensors are (type, shape) by formal name."""
        definition = OPS[op] if isinstance(op, str) else OPS["MlaPlan"]
        arrays = []
        for formals, given in ((definition.inputs, inputs), (definition.outputs, outputs)):
            tensors = [make_tensor(*given[f.name]) if f.name in given else ABSENT for f in formals]
            arrays.append((Tensor * len(tensors))(*tensors))
        size = ctypes.c_size_t()
        number = OP_NUMBERS[op] if isinstance(op, str) else op
        status = self.library.mla_workspace_bytes(
            number, ctypes.byref(make_attributes(values)), *arrays, ctypes.byref(size)
        )
        return status, self.library.mla_last_error().decode()
