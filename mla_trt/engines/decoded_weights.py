"""Weights that a model computes from codes, or moves about, in every step become what they are before TensorRT sees them, which may leave that
to every step (docs/tensorrt-support.md)."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from onnx import TensorProto, numpy_helper

from mla_trt.engines.constant_values import ConstantValues
from mla_trt.engines.unused import reads_of, remove_unused
from mla_trt.loading import SMALL_TENSOR, ModelOnDisk
from mla_trt.weight_file import WeightFile

HALF: dict[int, np.dtype] = {
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    TensorProto.FLOAT16: np.dtype(np.float16),
}


def decode_weights(model: ModelOnDisk, weight_file: WeightFile | None = None) -> int:
    """Computes the weights in half precision that a model makes of constants, in place and under their names. What is smaller than any
    weight stays; what is float32, which would have four bytes for one of its codes; and what is read as a DequantizeLinear gives it: for
    some of these TensorRT has products of their own.

    Args:
        model: a lowered model, and where its weights are.
        weight_file: where the weights go, one at a time. None: into the model.

    Returns:
        how many there were.
    """
    graph = model.proto.graph
    makers = {name: node for node in graph.node for name in node.output if name}
    constants = ConstantValues(model, makers)
    read = {
        name for node in graph.node if any(name not in constants for name in node.output) for name in reads_of(node)
    }
    decoded = 0
    for name in [name for name in constants.types if name in read]:
        kind, maker = HALF.get(constants.types[name]), makers[name]
        if kind is None or maker.op_type == "DequantizeLinear":
            continue
        values = constants.array(name).astype(kind)
        if values.ndim < 2 or values.size <= SMALL_TENSOR:
            continue
        maker.output[list(maker.output).index(name)] = f"{name}/computed"
        graph.initializer.append(
            numpy_helper.from_array(values, name) if weight_file is None else weight_file.add_array(name, values)
        )
        decoded += 1
    if decoded:
        remove_unused(graph)
    return decoded
