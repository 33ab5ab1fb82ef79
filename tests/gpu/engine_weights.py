"""Weights that replace an engine's."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from engine_sessions import LEAST_VALUES
from onnx import TensorProto, numpy_helper

from mla_trt.engines.building import BuildOptions
from mla_trt.engines.engine_tensorrt import TensorRtEngine
from mla_trt.engines.plugin_model import write_plugin_model

CUT_QUERIES = ("axk2__",)
"""Exports whose queries are cut from wider ones, which MlaInputProjections does not make."""
KINDS = {TensorProto.FLOAT: "FLOAT", TensorProto.BFLOAT16: "BF16", TensorProto.FLOAT16: "HALF"}


def other_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the rows of all its matrices in another order."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    for weight in other.graph.initializer:
        if weight.data_type in KINDS and len(weight.dims) > 1 and math.prod(weight.dims) >= LEAST_VALUES:
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[::-1].copy(), weight.name))
    return other


def coded_ops(name: str, source: Path, folder: Path, options: BuildOptions) -> list[str]:
    """The ops of the projections in the model that TensorRT's parser gets, each of which must have weights in e4m3.

    Args:
        name: of the export.
        source: the lowered model.
        folder: none yet.
        options: that the engine is built with.

    Raises:
        ValueError: an op has none, or there are other ops of the two than the export has.
    """
    wanted = {"MlaOutputProjection"} if name.startswith(CUT_QUERIES) else {"MlaInputProjections", "MlaOutputProjection"}
    folder.mkdir(parents=True)
    write_plugin_model(source, folder, dtype=options.dtype, input_projections=True, weights=options.weights)
    graph = onnx.load(folder / "model.onnx").graph
    codes = {weight.name for weight in graph.initializer if weight.data_type == TensorProto.FLOAT8E4M3FN}
    found = [node for node in graph.node if node.op_type in ("MlaInputProjections", "MlaOutputProjection")]
    bare = [node.name for node in found if codes.isdisjoint(node.input)]
    if bare:
        raise ValueError(f"no weights in e4m3: {bare}")
    if {node.op_type for node in found} != wanted:
        raise ValueError(f"the ops are {[node.op_type for node in found]}, must be {sorted(wanted)}")
    return [node.op_type for node in found]


def refit(engine: TensorRtEngine, model: onnx.ModelProto, folder: Path, options: BuildOptions) -> list[str]:
    """Gives an engine the weights of the model that TensorRT's parser would get of this one.

    Args:
        engine: built with `options.refit`.
        model: the lowered model.
        folder: an empty one, or none yet.
        options: that the engine was built with.

    Returns:
        the names of the weights.

    Raises:
        ValueError: the engine wants weights that the model does not have, or does not take those that it has.
    """
    runner = engine._runner
    trt = runner._trt
    source, parsed = folder / "lowered", folder / "parsed"
    for path in (source, parsed):
        path.mkdir(parents=True, exist_ok=True)
    onnx.save(model, source / "model.onnx")
    write_plugin_model(source / "model.onnx", parsed, dtype=options.dtype, input_projections=True)
    refitter = trt.Refitter(runner._engine, runner._logger)
    wanted = set(refitter.get_all_weights())
    names, kept = [], []
    for weight in onnx.load(parsed / "model.onnx").graph.initializer:
        if weight.name not in wanted or weight.data_type not in KINDS:
            continue
        values = np.frombuffer(weight.raw_data or numpy_helper.to_array(weight).tobytes(), np.uint8)
        kept.append(values)  # until the engine has them
        kind = getattr(trt.DataType, KINDS[weight.data_type])
        if not refitter.set_named_weights(weight.name, trt.Weights(kind, values.ctypes.data, math.prod(weight.dims))):
            raise ValueError(f"the engine does not take the weight '{weight.name}'")
        names.append(weight.name)
    missing = refitter.get_missing_weights()
    if missing:
        raise ValueError(f"the model does not have {missing}")
    if not refitter.refit_cuda_engine():
        raise ValueError("TensorRT cannot refit the engine")
    return names
