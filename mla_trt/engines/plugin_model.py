"""The form of a lowered model that TensorRT's parser gets: fused ops as plugin nodes, without function bodies.

The parser prefers a function body to a plugin, and passes an absent optional input on as a null tensor, which a plugin
cannot rely on. So bodies go, and each fused node keeps only the inputs and outputs that it has, with their formal names
in the attributes `inputs` and `outputs`, separated by spaces, which the plugins read. With resident pages the plugins
hold the pools that the attribute `resident` names, of `resident_pages` pages each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
from onnx import helper

from mla_trt.engines.bfloat16 import to_bfloat16
from mla_trt.engines.decoded_weights import decode_weights
from mla_trt.engines.direct_tensors import read_directly
from mla_trt.engines.engine import PAGE_COPIES
from mla_trt.engines.engine_file import COPIES, EngineTensor
from mla_trt.engines.input_projections import take_input_projections
from mla_trt.engines.output_projections import take_output_projections
from mla_trt.errors import BadModelError, UsageError
from mla_trt.loading import ModelOnDisk, is_small, load_model
from mla_trt.ops import OPS, mla_nodes, strip_functions
from mla_trt.ops.common import QUERY_TERMS
from mla_trt.weight_file import WeightFile
from mla_trt.writing import external_locations

log = logging.getLogger(__name__)

DTYPES = ("keep", "bf16")
KEEP, FP8 = "keep", "fp8"
WEIGHTS = (KEEP, FP8)
MODEL_FILE = "model.onnx"
POOLS = {"kv_cache": "kv_cache_out", "indexer_cache": "indexer_cache_out"}
"""Formal inputs and outputs of the pools that ops update."""


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


def name_axes(model: onnx.ModelProto, inputs: Sequence[EngineTensor]) -> None:
    """Gives the dynamic axes of a lowered model's inputs the names that they have in the engine, in place.

    Exporters give the batch of states and masks names of their own. TensorRT takes axes of one name to be equal, and needs
    that to build the recurrent layers of Kimi Linear's dynamo export (seen with TensorRT 10.6).
    """
    axes = {tensor.name: tensor.axes for tensor in inputs}
    for value in model.graph.input:
        for dim, axis in zip(value.type.tensor_type.shape.dim, axes.get(value.name, ()), strict=False):
            if isinstance(axis, str) and not dim.HasField("dim_value"):
                dim.dim_param = axis
    del model.graph.value_info[:]  # has the old names


def set_query_terms(model: onnx.ModelProto, terms: int) -> None:
    """Gives the ops that have it the attribute `query_terms`, in place: how exact attention over e4m3 rows must be."""
    for node in mla_nodes(model):
        if any(attribute.name == QUERY_TERMS.name for attribute in OPS[node.op_type].attributes):
            kept = [attribute for attribute in node.attribute if attribute.name != QUERY_TERMS.name]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute(QUERY_TERMS.name, terms)])


def fix_pages(model: onnx.ModelProto, pages: int) -> None:
    """Gives the page pools of a lowered model a fixed number of pages, in place."""
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].dim_param == "pages":
            dims[0].dim_value = pages


def hold_pages(model: onnx.ModelProto, pages: int) -> None:
    """Moves the page pools of a compact model into its plugins, in place: they are neither inputs nor outputs any more.
    Pages can then be copied only by the plugins, so the model gets the input `page_copies` if it has none.

    Args:
        model: as `compact` left it.
        pages: pages of each pool.

    Raises:
        BadModelError: a pool is not that of one node alone.
    """
    for node in mla_nodes(model):
        texts = {entry.name: entry for entry in node.attribute if entry.name in ("inputs", "outputs")}
        inputs = dict(zip(texts["inputs"].s.decode().split(), node.input, strict=True))
        outputs = dict(zip(texts["outputs"].s.decode().split(), node.output, strict=True))
        held = [pool for pool in POOLS if pool in inputs]
        if not held:
            continue
        for pool in held:
            _remove_pool(model, node, inputs.pop(pool), outputs.pop(POOLS[pool], ""))
        inputs.setdefault(PAGE_COPIES, PAGE_COPIES)
        for texted, values, kept in (("inputs", node.input, inputs), ("outputs", node.output, outputs)):
            del values[:]
            values.extend(kept.values())
            texts[texted].s = " ".join(kept).encode()
        node.attribute.append(helper.make_attribute("resident", " ".join(held)))
        node.attribute.append(helper.make_attribute("resident_pages", pages))
    if PAGE_COPIES not in {value.name for value in model.graph.input}:
        copies = helper.make_tensor_value_info(PAGE_COPIES, onnx.TensorProto.INT32, [COPIES, 2])
        model.graph.input.append(copies)


def _remove_pool(model: onnx.ModelProto, node: onnx.NodeProto, before: str, after: str) -> None:
    readers = [name for other in model.graph.node for name in other.input if name in (before, after)]
    given = [value for value in model.graph.input if value.name == before]
    result = [value for value in model.graph.output if value.name == after]
    if readers != [before] or not given or not result:
        raise BadModelError(
            f"--cache resident: the pages '{before}' of the node '{node.name}' ({node.op_type}) are not its own alone: build with --cache io"
        )
    model.graph.input.remove(given[0])
    model.graph.output.remove(result[0])


def write_plugin_model(
    source: Path,
    folder: Path,
    inputs: Sequence[EngineTensor] = (),
    *,
    dtype: str = "keep",
    query_terms: int | None = None,
    pages: int | None = None,
    resident: bool = False,
    keep_codes: bool = False,
    input_projections: bool = False,
    weights: str = KEEP,
    progress: Callable[[int, int], None] | None = None,
) -> onnx.ModelProto:
    """Writes `model.onnx` for the parser into a folder. Weights that stay as they are stay where they are: links lead to
    their files.

    Args:
        source: the lowered model.
        folder: an empty folder.
        inputs: of the engine, for `name_axes`.
        dtype: "bf16" to multiply in bfloat16 what is float32 or float16 in the model, or "keep".
        query_terms: see `set_query_terms`; None: as the model has it.
        pages: fixed number of pages of the pools; None: dynamic.
        resident: the plugins hold the pools, of that number of pages.
        keep_codes: leave weights as codes where the model does, instead of `mla_trt.engines.decoded_weights`.
        input_projections: see `mla_trt.engines.input_projections`.
        weights: "fp8" to make e4m3 codes of the weights before and behind attention that are bf16 then: half the bytes, and less exact (see
            `mla_trt.engines.coded_weights`), with `input_projections` or without; or "keep".
        progress: told how many weights are written anew, and how many there are in all, after each.

    Returns:
        the lowered model as it was, without its external data.

    Raises:
        BadModelError: the model cannot be used.
        UsageError: a dtype or a kind of weights that does not exist.
    """
    for option, value, choices in (("--dtype", dtype, DTYPES), ("--weights", weights, WEIGHTS)):
        if value not in choices:
            raise UsageError(f"{option} is '{value}': choose one of {', '.join(choices)}")
    lowered = load_model(source).proto
    model = onnx.ModelProto()
    model.CopyFrom(lowered)
    before = external_locations(model)
    name = next(name for count in range(len(before) + 1) if (name := f"bf16.{count}.data") not in before)
    large = sum(not is_small(tensor) for tensor in model.graph.initializer)
    told = None if progress is None else lambda done: progress(done, max(done, large))
    weight_file = WeightFile(folder / name, told)
    if dtype == "bf16":
        to_bfloat16(model, source.parent, weight_file)
    on_disk = ModelOnDisk(model, source.parent, {name: folder})
    if not keep_codes:
        decode_weights(on_disk, weight_file)
    name_axes(model, inputs)
    if query_terms is not None:
        set_query_terms(model, query_terms)
    coded = weights == FP8
    taken = take_input_projections(on_disk, weight_file, coded=coded) if input_projections or coded else 0
    if coded and taken + take_output_projections(on_disk, weight_file) == 0:
        log.warning("--weights fp8 changes nothing: no layer has large bfloat16 matrices beside it (see --dtype bf16)")
    read_directly(on_disk)
    compact(model)
    if pages is not None:
        if resident:
            hold_pages(model, pages)
        else:
            fix_pages(model, pages)
    for location in external_locations(model) & before:
        link = folder / location
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((source.parent / location).resolve())
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    return lowered
