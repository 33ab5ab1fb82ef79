"""Finds the example exports, and writes their interfaces down from the names of their inputs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from mla_trt import interface as roles
from mla_trt.interface import Axis, ModelInput, ModelInterface

FOLDER = Path(os.environ.get("MLA_TRT_EXPORTS", Path(__file__).resolve().parents[2] / "shared" / "exports"))

needs_exports = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"the example exports are not in {FOLDER}; MLA_TRT_EXPORTS names their folder"
)

SIDE_INPUTS: dict[str, tuple[str, tuple[Axis, ...]]] = {
    "input_ids": (roles.TOKENS, ("B", "S")),
    "tokens": (roles.TOKENS, ("B", "S")),
    "hidden": (roles.TOKENS, ("S", 64)),
    "hidden_states": (roles.TOKENS, ("B", "S", 64)),
    "position_ids": (roles.POSITIONS, ("B", "S")),
    "positions": (roles.POSITIONS, ("S",)),
    "mask": (roles.SCORE_MASK, ("S", "T")),
    "cos": (roles.ROPE_COS, ("B", "S", 16)),
    "sin": (roles.ROPE_SIN, ("B", "S", 16)),
}


def load(name: str) -> onnx.ModelProto:
    """An example export, without any folder or ending in its name."""
    return onnx.load(FOLDER / f"{name}.onnx")


def interface_of(model: onnx.ModelProto) -> ModelInterface:
    """The interface of an example export."""
    results = [output for output in model.graph.output if "present" not in output.name and "past" not in output.name]
    states = iter([output for output in model.graph.output if output not in results])
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = [entry for entry in model.graph.input if entry.name not in initializers]
    entries = tuple(_describe(entry, states) for entry in inputs)
    tokens = next(zip_entry for zip_entry in zip(entries, inputs, strict=True) if zip_entry[0].role == roles.TOKENS)
    fixed = {
        letter: int(dim.dim_value or dim.dim_param)
        for letter, dim in zip(tokens[0].axes, tokens[1].type.tensor_type.shape.dim, strict=True)
        if isinstance(letter, str) and (dim.dim_value or dim.dim_param.isdigit())
    }
    return ModelInterface(entries, tuple(output.name for output in results), fixed)


def _describe(entry: onnx.ValueInfoProto, states: Iterator[onnx.ValueInfoProto]) -> ModelInput:
    kind, dims = entry.type.tensor_type.elem_type, entry.type.tensor_type.shape.dim
    sizes: list[Axis] = [dim.dim_value or (int(dim.dim_param) if dim.dim_param.isdigit() else "?") for dim in dims]
    if "past" in entry.name:
        output = next(states).name
        if "_states" in entry.name:
            return ModelInput(entry.name, roles.STATE, kind, ("B", *sizes[1:]), output)
        if len(sizes) == 2:
            return ModelInput(entry.name, roles.CACHE, kind, ("P", sizes[1]), output)
        length_axis = next(index for index in range(1, len(sizes)) if sizes[index] == "?")
        return ModelInput(
            entry.name, roles.CACHE, kind, ("B", *sizes[1:length_axis], "P", *sizes[length_axis + 1 :]), output
        )
    if entry.name == "attention_mask":
        if len(sizes) == 4:
            return ModelInput(entry.name, roles.SCORE_MASK, kind, ("B", 1, "S", "T"))
        return ModelInput(entry.name, roles.ATTENTION_MASK, kind, ("B", "T"))
    role, axes = SIDE_INPUTS[entry.name]
    return ModelInput(entry.name, role, kind, axes)
