"""Reads ONNX models and says in one line what is wrong with one that cannot be used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import google.protobuf.message
import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.external_data_helper import load_external_data_for_tensor

from mla_trt.errors import BadModelError
from mla_trt.passes.tensorrt_ops import spell_fp8_ops

SMALL_TENSOR = 4096  # elements
PACKED_BITS: dict[int, int] = {  # of the types that numpy keeps in whole bytes
    TensorProto.UINT4: 4,
    TensorProto.INT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    TensorProto.UINT2: 2,
    TensorProto.INT2: 2,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model as it is on the disk, but for FP8 ops of TensorRT's own domain, which are ONNX's here; external data is not in memory.

    Attributes:
        proto: the model.
        path: its file; external data lies beside it.
    """

    proto: onnx.ModelProto
    path: Path

    @property
    def base_dir(self) -> Path:
        return self.path.parent

    def external_files(self) -> set[Path]:
        """Files that hold weights outside the model."""
        return {
            self.base_dir / location
            for tensor in _tensors(self.proto)
            if (location := external_file(tensor)) is not None
        }


@dataclass(frozen=True)
class ModelOnDisk:
    """A model of which some or all weights are in files.

    Attributes:
        proto: the model.
        folder: where its files are.
        moved: folders of those files that are elsewhere.
    """

    proto: onnx.ModelProto
    folder: Path | None
    moved: Mapping[str, Path] = field(default_factory=dict)

    def folder_of(self, tensor: TensorProto) -> Path | None:
        """The folder of the file that a tensor is in."""
        return self.moved.get(external_file(tensor) or "", self.folder)


def load_model(path: Path) -> LoadedModel:
    """Reads a model without its external data, and checks that it is whole.

    Raises:
        BadModelError: the file is missing, is no ONNX model, is cut short, lacks weights, or contradicts itself.
    """
    try:
        return _load(path)
    except OSError as error:
        raise BadModelError(f"'{error.filename or path}' cannot be read: {error.strerror or error}") from None


def _load(path: Path) -> LoadedModel:
    if not path.exists():
        raise BadModelError(f"'{path}' does not exist")
    if path.is_dir():
        raise BadModelError(f"'{path}' is a folder: give the .onnx file in it")
    try:
        proto = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (google.protobuf.message.DecodeError, ValueError) as error:
        raise BadModelError(
            f"'{path}' cannot be read as an ONNX model (damaged, cut short, or another format): {error}"
        ) from None
    if not proto.ir_version or not proto.opset_import or not proto.graph.node or not proto.graph.output:
        raise BadModelError(f"'{path}' is no complete ONNX model: it has no nodes, no outputs or no opset")
    model = LoadedModel(proto, path)
    _check_external(model)
    for tensor in _tensors(proto):
        if external_file(tensor) is not None and is_small(tensor):
            load_tensor(tensor, model.base_dir)
    _check_names(proto)
    _check_domains(proto)
    return replace(model, proto=spell_fp8_ops(proto))


def load_tensor(tensor: TensorProto, folder: Path) -> None:
    """Reads a tensor's external data into it."""
    load_external_data_for_tensor(tensor, str(folder))
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _tensors(proto: onnx.ModelProto) -> list[TensorProto]:
    return list(proto.graph.initializer) + [
        attribute.t for node in proto.graph.node for attribute in node.attribute if attribute.HasField("t")
    ]


def is_small(tensor: TensorProto) -> bool:
    """Whether a tensor may be an axis, a shape or another parameter, which whoever reads the graph needs."""
    return int(np.prod(tensor.dims, dtype=np.int64)) <= SMALL_TENSOR


def load_from_elsewhere(model: onnx.ModelProto, source: ModelOnDisk, folder: Path | None) -> None:
    """Reads those weights of a model whose files are not in a folder.

    Args:
        model: the model, or a part of it.
        source: where its files are.
        folder: the only one that whoever runs the model will look in.
    """
    for tensor in model.graph.initializer:
        place = source.folder_of(tensor)
        if external_file(tensor) is not None and place is not None and place != folder:
            load_tensor(tensor, place)


def external_file(tensor: TensorProto) -> str | None:
    """Name of the file that a tensor's data is in; None where it is in the model."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def _check_external(model: LoadedModel) -> None:
    sizes: dict[str, int] = {}
    for tensor in _tensors(model.proto):
        location = external_file(tensor)
        if location is None:
            continue
        if location not in sizes:
            file = model.base_dir / location
            if not location or not file.is_file():
                raise BadModelError(
                    f"the weights of '{tensor.name}' are in '{location}', which is not beside '{model.path}': copy it there"
                )
            if not file.resolve().is_relative_to(model.base_dir.resolve()):
                raise BadModelError(f"the weights of '{tensor.name}' are in '{location}', outside the model's folder")
            sizes[location] = file.stat().st_size
        end = _external_end(tensor)
        if end > sizes[location]:
            raise BadModelError(
                f"'{location}' is cut short: '{tensor.name}' ends at byte {end}, the file at {sizes[location]}"
            )


def _external_end(tensor: TensorProto) -> int:
    """Where a tensor's data ends in its file."""
    facts = {entry.key: entry.value for entry in tensor.external_data}
    try:
        needed = _byte_count(tensor)
        offset, length = int(facts.get("offset", 0)), int(facts.get("length", needed))
    except (KeyError, ValueError):
        offset = length = needed = -1
    if offset < 0 or length != needed:
        raise BadModelError(
            f"the weights of '{tensor.name}' cannot be found: its type, shape {list(tensor.dims)} and place {facts} do not fit together"
        )
    return offset + length


def _byte_count(tensor: TensorProto) -> int:
    """Bytes of a tensor's data; types of fewer than eight bits are packed."""
    bits = PACKED_BITS.get(tensor.data_type) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-math.prod(tensor.dims) * bits // 8)


def _check_names(proto: onnx.ModelProto) -> None:
    """Every tensor that is read must be made, and once."""
    known = {tensor.name for tensor in proto.graph.initializer} | {value.name for value in proto.graph.input}
    known |= {tensor.values.name for tensor in proto.graph.sparse_initializer}
    made = {value.name for value in proto.graph.input}
    for node in proto.graph.node:
        # Protobuf gives bytes for what is no UTF-8.
        if not all(isinstance(text, str) for text in (node.name, node.op_type, node.domain, *node.output)):
            raise BadModelError(f"the name of a node is damaged: {node.name!r} ({node.op_type!r})")
        for name in node.output:
            if name and name in made:
                raise BadModelError(f"the tensor '{name}' is made twice (node '{node.name}')")
            made.add(name)
    for node in proto.graph.node:
        for name in node.input:
            if name and name not in known and name not in made:
                raise BadModelError(f"node '{node.name}' ({node.op_type}) reads '{name}', which nothing makes")
    for value in proto.graph.output:
        if value.name not in made and value.name not in known:
            raise BadModelError(f"the output '{value.name}' is made by no node")


def _check_domains(proto: onnx.ModelProto) -> None:
    """The opsets stand behind the graph, so that a file may be cut short between two of them."""
    imported = {entry.domain for entry in proto.opset_import} | {"", "ai.onnx"}
    for node in proto.graph.node:
        if node.domain not in imported:
            raise BadModelError(
                f"node '{node.name}' ({node.op_type}) is of the domain '{node.domain}', of which no opset is imported: is the file complete?"
            )
