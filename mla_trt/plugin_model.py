"""The form of a lowered model that TensorRT's parser gets: fused ops as plugin nodes, without function bodies.

The parser prefers a function body to a plugin, and passes an absent optional input on as a null tensor, which a plugin
cannot rely on. So bodies go, and each fused node keeps only the inputs and outputs that it has, with their formal names
in the attributes `inputs` and `outputs`, separated by spaces, which the plugins read.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from mla_trt.bfloat16 import to_bfloat16
from mla_trt.errors import UsageError
from mla_trt.loading import load_model
from mla_trt.ops import OPS, mla_nodes, strip_functions
from mla_trt.weight_file import WeightFile
from mla_trt.writing import external_locations

DTYPES = ("keep", "bf16")
MODEL_FILE = "model.onnx"


def compact(model: onnx.ModelProto) -> None:
    """Makes the nodes of the op set in a lowered model into plugin nodes, in place."""
    strip_functions(model)
    for node in mla_nodes(model):
        op = OPS[node.op_type]
        inputs, outputs = op.given_inputs(node), op.given_outputs(node)
        del node.input[:], node.output[:]
        node.input.extend(inputs.values())
        node.output.extend(outputs.values())
        node.attribute.append(helper.make_attribute("inputs", " ".join(inputs)))
        node.attribute.append(helper.make_attribute("outputs", " ".join(outputs)))


def fix_pages(model: onnx.ModelProto, pages: int) -> None:
    """Gives the page pools of a lowered model a fixed number of pages, in place."""
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].dim_param == "pages":
            dims[0].dim_value = pages


def write_plugin_model(source: Path, folder: Path, *, dtype: str = "keep", pages: int | None = None) -> onnx.ModelProto:
    """Writes `model.onnx` for the parser into a folder. Weights that stay as they are stay where they are: links lead to
    their files.

    Args:
        source: the lowered model.
        folder: an empty folder.
        dtype: "bf16" to multiply in bfloat16 what is float32 in the model, or "keep".
        pages: fixed number of pages of the pools; None: dynamic.

    Returns:
        the lowered model as it was, without its external data.

    Raises:
        BadModelError: the model cannot be used.
        UsageError: a dtype that does not exist.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype is '{dtype}': choose one of {', '.join(DTYPES)}")
    lowered = load_model(source).proto
    model = onnx.ModelProto()
    model.CopyFrom(lowered)
    before = external_locations(model)
    if dtype == "bf16":
        name = next(name for count in range(len(before) + 1) if (name := f"bf16.{count}.data") not in before)
        to_bfloat16(model, source.parent, WeightFile(folder / name))
    compact(model)
    if pages is not None:
        fix_pages(model, pages)
    for location in external_locations(model) & before:
        link = folder / location
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((source.parent / location).resolve())
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    return lowered
