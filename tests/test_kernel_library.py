"""The kernel library's C structures as Python lays them out, against the headers' text."""

from __future__ import annotations

import ctypes
import re

import pytest

from mla_trt.ops import OPS
from mla_trt.plugins.kernel_library import DeviceTensor, MlaAttributes, MlaTensor, attributes_struct
from mla_trt.plugins.op_table import HEADER

CTYPES = {"int32_t": ctypes.c_int32, "float": ctypes.c_float}


def _header_fields() -> list[tuple[str, str]]:
    text = HEADER.read_text()
    body = text[text.index("typedef struct MlaAttributes {") : text.index("} MlaAttributes;")]
    return re.findall(r"^\s+(\w+) (\w+);", body, re.MULTILINE)


def test_attributes_lie_where_the_header_puts_them() -> None:
    fields = _header_fields()
    assert [(name, kind) for name, kind in MlaAttributes._fields_] == [(name, CTYPES[kind]) for kind, name in fields]
    assert ctypes.sizeof(MlaAttributes) == 4 * len(fields)
    offsets = re.findall(r'\{"(\w+)", AttributeSpec::\w+, (\d+),', HEADER.read_text())
    assert len(offsets) == sum(len(op.attributes) for op in OPS.values())
    for name, offset in offsets:
        assert getattr(MlaAttributes, name).offset == int(offset), name


def test_tensors_lie_where_api_h_puts_them() -> None:
    text = (HEADER.parent / "api.h").read_text()
    body = text[text.index("typedef struct MlaTensor {") : text.index("} MlaTensor;")]
    assert re.findall(r"(\w+);|(\w+)\[", body) == [("data", ""), ("type", ""), ("rank", ""), ("", "shape")]
    assert [getattr(MlaTensor, name).offset for name in ("data", "type", "rank", "shape")] == [0, 8, 12, 16]
    assert ctypes.sizeof(MlaTensor) == 48
    tensor = DeviceTensor(4096, 16, (3, 5)).as_struct()
    assert (tensor.data, tensor.type, tensor.rank, list(tensor.shape)) == (4096, 16, 2, [3, 5, 0, 0])


def test_values_of_attributes() -> None:
    op = OPS["MlaDecoding"]
    given = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "row_format": "fp8_ds_mla", "softmax_scale": 0.1}
    struct = attributes_struct(op.complete(given, ""))
    assert (struct.kv_lora_rank, struct.page_size, struct.row_format, struct.top_k) == (512, 64, 3, 0)
    assert struct.softmax_scale == pytest.approx(0.1, rel=1e-7)
