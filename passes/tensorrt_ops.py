"""TensorRT's own FP8 ops, in ONNX's spelling.

NVIDIA's quantizers (ModelOpt, Transformer Engine) write `TRT_FP8QuantizeLinear` and `TRT_FP8DequantizeLinear` of the domain `trt` into
exports: per tensor, to and from e4m3. They compute what QuantizeLinear and DequantizeLinear do since opset 19, which ONNX Runtime runs, too.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from mla_trt.passes.standardize import STANDARD_DOMAINS, constants_of, convert_opset, readable

DOMAIN = "trt"
QUANTIZE, DEQUANTIZE = "TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear"
FIRST_OPSET = 19
"""With e4m3."""
ZERO = "trt_fp8_zero_point"


def spell_fp8_ops(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with these ops, at its graph's top level, spelt in ONNX's; the one given is changed as well.

    A scale of one value becomes a scalar, as ONNX has it for a whole tensor; codes that are held as bytes become e4m3; an opset without
    e4m3 becomes the first that has it. A node without a scale stays.

    Raises:
        BadModelError: the opset cannot be converted, or types and shapes contradict each other.
    """
    if not _found(model):
        return model
    if any(entry.version < FIRST_OPSET for entry in model.opset_import if entry.domain in STANDARD_DOMAINS):
        with readable():
            model = convert_opset(model, FIRST_OPSET)
    graph, nodes = model.graph, _found(model)
    constants, rounded = constants_of(graph), set()
    for node in nodes:
        codes, scale = node.input[0], constants.get(node.input[1])
        if scale is not None and list(scale.dims) == [1]:
            node.input[1] = _scalar(graph, constants, node.input[1], scale)
        if node.op_type == QUANTIZE:
            node.op_type = "QuantizeLinear"
            node.input.append(ZERO)
            rounded.add(node.output[0])
        else:
            node.op_type = "DequantizeLinear"
            if codes in constants and constants[codes].data_type in (TensorProto.UINT8, TensorProto.INT8):
                constants[codes].data_type = TensorProto.FLOAT8E4M3FN
        node.domain = ""
    for value in graph.value_info:
        if value.name in rounded:  # bytes, as exporters say that do not know e4m3
            value.type.tensor_type.elem_type = TensorProto.FLOAT8E4M3FN
    if ZERO not in constants:
        graph.initializer.append(helper.make_tensor(ZERO, TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True))
    return model


def _found(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    ops = (QUANTIZE, DEQUANTIZE)
    return [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in ops and len(node.input) == 2]


def _scalar(graph: onnx.GraphProto, constants: dict[str, TensorProto], name: str, tensor: TensorProto) -> str:
    scalar = f"{name}/scalar"
    if scalar not in constants:
        constants[scalar] = graph.initializer.add()
        constants[scalar].CopyFrom(tensor)
        constants[scalar].name = scalar
        del constants[scalar].dims[:]
    return scalar
