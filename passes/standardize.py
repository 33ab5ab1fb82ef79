"""First pass: one dialect. Model functions are inlined, ONNX Runtime's fused ops become standard ones, everything is opset 26, and
`Attention` and `RotaryEmbedding` are spelt out by ONNX's own function bodies, so that later passes see plain tensor arithmetic only."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from onnx import TensorProto, helper, numpy_helper

from mla_trt.errors import BadModelError, MlaTrtError
from mla_trt.passes.graph import OPSET
from mla_trt.passes.inline_branches import inline_constant_branches

STANDARD_DOMAINS = ("", "ai.onnx")
RUNTIME_DOMAIN = "com.microsoft"
# Written by ONNX Runtime into the standard domain although no standard opset has them.
MISPLACED = (
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "FusedMatMul",
    "QuickGelu",
    "MatMulNBits",
)
SPELT_OUT = ("Attention", "RotaryEmbedding")
ROUNDED_TO_INT8 = 4  # a value of MatMulNBits' accuracy_level
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def standardize(model: onnx.ModelProto, base_dir: Path | None = None) -> onnx.ModelProto:
    """Returns the model in opset 26, of standard ops as far as they are known here.

    Args:
        model: an export; it is changed as well.
        base_dir: folder of its external data, of which only what must be written differently is read.

    Raises:
        BadModelError: the opset cannot be converted, types and shapes contradict each other, or external data cannot be read.
    """
    with readable():
        return _standardize(model, base_dir)


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Whatever onnx finds wrong with a model becomes a BadModelError."""
    try:
        yield
    except MlaTrtError:
        raise
    except Exception as error:  # onnx's own errors have no common base
        raise BadModelError(f"the model contradicts itself: {' '.join(str(error).split())[:300]}") from None


def forbid_rounded_activations(model: onnx.ModelProto) -> int:
    """Takes the permission to round activations to int8 from every MatMulNBits, in place; returns how many had it.

    The permission is no part of what the op computes, and whether ONNX Runtime uses it depends on the processor.
    """
    return _forbid_rounding(model.graph.node) + sum(_forbid_rounding(function.node) for function in model.functions)


def _forbid_rounding(nodes: Iterable[onnx.NodeProto]) -> int:
    count = 0
    for node in nodes:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level" and attribute.i == ROUNDED_TO_INT8:
                attribute.i = 0
                count += 1
            count += sum(_forbid_rounding(graph.node) for graph in (attribute.g, *attribute.graphs))
    return count


def _standardize(model: onnx.ModelProto, base_dir: Path | None) -> onnx.ModelProto:
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        _check_splits(nodes)
    _check_attributes(model)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    for node in model.graph.node:
        if node.domain == "ai.onnx":
            node.domain = ""
        if node.domain == "" and node.op_type in MISPLACED:
            node.domain = RUNTIME_DOMAIN
            if all(entry.domain != RUNTIME_DOMAIN for entry in model.opset_import):
                model.opset_import.append(helper.make_opsetid(RUNTIME_DOMAIN, 1))
    inline_constant_branches(model)
    model = convert_opset(model, OPSET)
    _expand_fused_ops(model, base_dir)
    model = _spell_out(model)
    del model.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(model)


def _check_splits(nodes: Iterable[onnx.NodeProto]) -> None:
    """A Split that contradicts itself is refused here, because onnx's shape inference ends the process over it."""
    for node in nodes:
        for attribute in node.attribute:
            if node.op_type == "Split" and attribute.name == "num_outputs" and attribute.i != len(node.output):
                raise BadModelError(
                    f"node '{node.name or node.output[0]}' (Split) has {len(node.output)} outputs, but says that they are {attribute.i}"
                )
            for graph in (attribute.g, *attribute.graphs):
                _check_splits(graph.node)


def _check_attributes(model: onnx.ModelProto) -> None:
    """Refuses nodes of an older opset than the model says: tools that only raise the number leave them so, and no runtime loads them."""
    version = _opset(model)
    known: dict[str, set[str] | None] = {}
    for node in model.graph.node:
        if node.domain not in STANDARD_DOMAINS or not node.attribute:
            continue
        if node.op_type not in known:
            known[node.op_type] = _attributes(node.op_type, version)
        names = known[node.op_type]
        strange = [] if names is None else [item.name for item in node.attribute if item.name not in names]
        if strange:
            raise BadModelError(
                f"node '{node.name or node.output[0]}' ({node.op_type}) has the attribute '{strange[0]}', which opset {version} does not know: "
                "the model says a newer opset than its nodes are of; convert it to that opset (onnx.version_converter) before quantising it"
            )


def _attributes(op: str, version: int) -> set[str] | None:
    """Names of the attributes of a standard op; None where it is not one of that opset."""
    try:
        return set(onnx.defs.get_schema(op, version).attributes)
    except onnx.defs.SchemaError:
        return None


def _opset(model: onnx.ModelProto) -> int:
    version = next((entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS), None)
    if version is None:
        raise BadModelError("the model imports no ONNX opset: is it complete?")
    return version


def convert_opset(model: onnx.ModelProto, wanted: int) -> onnx.ModelProto:
    """The model in another opset; the one given is changed as well.

    Raises:
        BadModelError: it cannot be converted.
    """
    version = _opset(model)
    if version == wanted:
        return model
    try:
        try:
            return onnx.version_converter.convert_version(model, wanted)
        except onnx.shape_inference.InferenceError:
            _forget_types(model)
            return onnx.version_converter.convert_version(model, wanted)
    except (RuntimeError, ValueError, onnx.version_converter.ConvertError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise BadModelError(f"opset {version} cannot be converted to opset {wanted}: {reason}") from None


def _forget_types(model: onnx.ModelProto) -> None:
    """Removes the element types, not the shapes, that a model states of its inner tensors, where they contradict its nodes: ONNX Runtime's float16
    converter leaves some as they were. In any other model they stay, since those of what unknown ops make are found nowhere else."""
    for info in model.graph.value_info:
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.elem_type = TensorProto.UNDEFINED


class _Rewriter:
    """Nodes that take the place of one node."""

    def __init__(
        self, node: onnx.NodeProto, constants: dict[str, TensorProto], graph: onnx.GraphProto, base_dir: Path | None
    ) -> None:
        self.node = node
        self.nodes: list[onnx.NodeProto] = []
        self.constants = constants
        self.graph = graph
        self.base_dir = base_dir
        self.attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}

    def has(self, index: int) -> bool:
        return index < len(self.node.input) and bool(self.node.input[index])

    def emit(self, op: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        output = output or f"{self.node.output[0]}/std_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(
                op, inputs, [output], name=f"{self.node.name or output}/{op}_{len(self.nodes)}", **attributes
            )
        )
        return output

    def constant(self, values: np.ndarray, label: str) -> str:
        name = f"{self.node.output[0]}/{label}"
        self.add_initializer(numpy_helper.from_array(values, name))
        return name

    def add_initializer(self, tensor: TensorProto) -> None:
        self.graph.initializer.append(tensor)
        self.constants[tensor.name] = tensor

    def given(self, index: int, what: str) -> TensorProto:
        """A constant input, not read.

        Raises:
            BadModelError: it is no constant.
        """
        tensor = self.constants.get(self.node.input[index])
        if tensor is None:
            raise BadModelError(f"node '{self.label}': {self.node.op_type} needs constant {what}")
        return tensor

    def read(self, tensor: TensorProto) -> np.ndarray:
        """The values of a constant.

        Raises:
            BadModelError: its external data is missing or too short.
        """
        try:
            return numpy_helper.to_array(tensor, str(self.base_dir or ""))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise BadModelError(f"the weights of '{tensor.name or self.label}' cannot be read: {error}") from None

    def reinterpreted(self, index: int, what: str, shape: list[int], element: int | None = None) -> str:
        """A constant input with another shape, and another element type if one is given; its bytes stay what and where they are."""
        name = f"{self.node.input[index]}/blocks"
        source = self.given(index, what)
        if name not in self.constants:
            tensor = TensorProto()
            tensor.CopyFrom(source)
            tensor.name = name
            tensor.data_type = element or source.data_type
            tensor.dims[:] = shape
            self.add_initializer(tensor)
        return name

    @property
    def label(self) -> str:
        return self.node.name or self.node.output[0]


def _rms_norm(rw: _Rewriter) -> None:
    epsilon = rw.attributes.get("epsilon", 1e-5)
    axis = rw.attributes.get("axis", -1)
    rw.emit("RMSNormalization", list(rw.node.input[:2]), rw.node.output[0], axis=axis, epsilon=epsilon)


def _skip_norm(rw: _Rewriter) -> None:
    total = rw.emit("Add", list(rw.node.input[:2]))
    simplified = rw.node.op_type == "SkipSimplifiedLayerNormalization"
    bias = 3 if simplified else 4
    if rw.has(bias):
        total = rw.emit("Add", [total, rw.node.input[bias]])
    if len(rw.node.output) > 3 and rw.node.output[3]:
        total = rw.emit("Identity", [total], rw.node.output[3])
    epsilon = rw.attributes.get("epsilon", 1e-12 if not simplified else 1e-6)
    scale = [total, rw.node.input[2]]
    if simplified:
        rw.emit("RMSNormalization", scale, rw.node.output[0], axis=-1, epsilon=epsilon)
    else:
        rw.emit(
            "LayerNormalization",
            scale + ([rw.node.input[3]] if rw.has(3) else []),
            rw.node.output[0],
            axis=-1,
            epsilon=epsilon,
        )


def _fused_matmul(rw: _Rewriter) -> None:
    """FusedMatMul becomes an Einsum, which needs no rank to transpose the last two axes."""
    rows, columns = (
        ("km" if rw.attributes.get("transA", 0) else "mk"),
        ("nk" if rw.attributes.get("transB", 0) else "kn"),
    )
    # A transposed batch has the first of the two axes before the batch's.
    left = f"{rows[0]}...{rows[1]}" if rw.attributes.get("transBatchA", 0) else f"...{rows}"
    right = f"{columns[0]}...{columns[1]}" if rw.attributes.get("transBatchB", 0) else f"...{columns}"
    alpha = rw.attributes.get("alpha", 1.0)
    plain = (left, right) == ("...mk", "...kn")
    op, attributes = ("MatMul", {}) if plain else ("Einsum", {"equation": f"{left},{right}->...mn"})
    operands = list(rw.node.input[:2])
    if alpha == 1.0:
        rw.emit(op, operands, rw.node.output[0], **attributes)
        return
    product = rw.emit(op, operands, **attributes)
    factor = rw.emit("CastLike", [rw.constant(np.array(alpha, np.float32), "alpha"), product])
    rw.emit("Mul", [product, factor], rw.node.output[0])


def _fused_gemm(rw: _Rewriter) -> None:
    activation = rw.attributes.get("activation", b"").decode()
    if activation not in ("Relu", "Sigmoid", "Tanh"):
        raise BadModelError(
            f"node '{rw.node.name}': FusedGemm with activation '{activation}' is not supported: export without that fusion"
        )
    attributes = {name: rw.attributes[name] for name in ("alpha", "beta", "transA", "transB") if name in rw.attributes}
    rw.emit(activation, [rw.emit("Gemm", list(rw.node.input), **attributes)], rw.node.output[0])


def _quick_gelu(rw: _Rewriter) -> None:
    x = rw.node.input[0]
    alpha = rw.attributes.get("alpha", 1.702)
    scaled = x
    if alpha != 1.0:
        scaled = rw.emit("Mul", [x, rw.emit("CastLike", [rw.constant(np.array(alpha, np.float32), "alpha"), x])])
    rw.emit("Mul", [x, rw.emit("Sigmoid", [scaled])], rw.node.output[0])


def _gelu(rw: _Rewriter) -> None:
    x = rw.node.input[0]
    if rw.has(1):
        x = rw.emit("Add", [x, rw.node.input[1]])
    approximate = "tanh" if rw.node.op_type == "FastGelu" else "none"
    rw.emit("Gelu", [x], rw.node.output[0], approximate=approximate)


def _matmul_nbits(rw: _Rewriter) -> None:
    """Block-quantised weights become DequantizeLinear + MatMul; the packed bytes are reinterpreted, not copied."""
    columns, rows = int(rw.attributes["K"]), int(rw.attributes["N"])
    bits, block = int(rw.attributes.get("bits", 4)), int(rw.attributes["block_size"])
    if bits not in (4, 8):
        raise BadModelError(f"node '{rw.label}': MatMulNBits with {bits} bits is not supported (4 or 8 are)")
    blocks = -(-columns // block)
    kind = TensorProto.UINT4 if bits == 4 else TensorProto.UINT8
    codes = rw.reinterpreted(1, "weights", [rows, blocks * block], kind)
    scales = rw.reinterpreted(2, "scales", [rows, blocks])
    points = rw.given(3, "zero points") if rw.has(3) else None
    if points is not None and points.data_type not in (TensorProto.UINT8, *FLOATS):
        found = TensorProto.DataType.Name(points.data_type).lower()
        raise BadModelError(f"node '{rw.label}': MatMulNBits with zero points of {found} is not supported: use uint8")
    has_floats = points is not None and points.data_type in FLOATS
    if has_floats or rw.has(4):
        dense = _with_groups(rw, codes, scales)
    else:
        shifts = np.full((rows, blocks), 1 << (bits - 1), np.uint8)
        if points is not None:
            shifts = rw.read(points).reshape(rows, -1)
            if bits == 4:
                shifts = np.stack([shifts & 15, shifts >> 4], axis=-1).reshape(rows, -1)[:, :blocks]
        zero_name = f"{rw.node.output[0]}/zero_point"
        rw.add_initializer(helper.make_tensor(zero_name, kind, shifts.shape, shifts.reshape(-1).tolist()))
        dense = _first_columns(rw, rw.emit("DequantizeLinear", [codes, scales, zero_name], axis=1, block_size=block))
    transposed = rw.emit("Transpose", [dense], perm=[1, 0])
    if rw.has(5):
        rw.emit("Add", [rw.emit("MatMul", [rw.node.input[0], transposed]), rw.node.input[5]], rw.node.output[0])
    else:
        rw.emit("MatMul", [rw.node.input[0], transposed], rw.node.output[0])


def _first_columns(rw: _Rewriter, dense: str) -> str:
    """The columns [N, K] of a weight whose last block is longer than K."""
    columns = int(rw.attributes["K"])
    if columns % int(rw.attributes["block_size"]) == 0:
        return dense
    bounds = [
        rw.constant(np.array([value], np.int64), f"slice_{key}")
        for key, value in (("start", 0), ("end", columns), ("axis", 1))
    ]
    return rw.emit("Slice", [dense, *bounds])


def _with_groups(rw: _Rewriter, codes: str, scales: str) -> str:
    """The weight [N, K] of a MatMulNBits as (codes - zero points) * scales: no DequantizeLinear has fractions as zero points, or groups
    that are not blocks."""
    columns, block = int(rw.attributes["K"]), int(rw.attributes["block_size"])
    source = rw.constants[scales]
    one = rw.constant(np.ones((), helper.tensor_dtype_to_np_dtype(source.data_type)), "one")
    groups = np.arange(columns) // block
    if rw.has(4):
        groups = rw.read(rw.given(4, "group indices")).reshape(-1)[:columns]
        if groups.size != columns or groups.min() < 0 or groups.max() >= source.dims[1]:
            raise BadModelError(
                f"node '{rw.label}': the group indices (g_idx) of MatMulNBits must be one of {source.dims[1]} groups for each of {columns} rows"
            )
    places = rw.constant(groups.astype(np.int64), "groups")
    if rw.has(3):
        stated = rw.given(3, "zero points")
        if stated.data_type == TensorProto.UINT8:
            # On CPUs, ONNX Runtime leaves out the zero points then: nothing could be compared with what it computes.
            raise BadModelError(
                f"node '{rw.label}': MatMulNBits with group indices (g_idx) and packed zero points is not supported, since ONNX Runtime computes it "
                "differently on CPUs and GPUs: export zero points of the scales' type, or quantise symmetrically or without reordering (act_order)"
            )
        points = rw.reinterpreted(3, "zero points", list(source.dims))
        if stated.data_type != source.data_type:
            points = rw.emit("CastLike", [points, scales])
        values = _first_columns(rw, rw.emit("DequantizeLinear", [codes, one]))
        values = rw.emit("Sub", [values, rw.emit("Gather", [points, places], axis=1)])
    else:
        middle = f"{rw.node.output[0]}/zero_point"
        bits = int(rw.attributes.get("bits", 4))
        rw.add_initializer(helper.make_tensor(middle, rw.constants[codes].data_type, (), [1 << (bits - 1)]))
        values = _first_columns(rw, rw.emit("DequantizeLinear", [codes, one, middle]))
    return rw.emit("Mul", [values, rw.emit("Gather", [scales, places], axis=1)])


def _gather_block_quantized(rw: _Rewriter) -> None:
    """A lookup in a table of codes with a scale for each block of a row: the table is decoded, as a constant is."""
    found = TensorProto.DataType.Name(rw.given(0, "codes").data_type).lower()
    if found not in ("int4", "uint4"):
        raise BadModelError(
            f"node '{rw.label}': GatherBlockQuantized with codes in {found} is not supported: use int4 or uint4"
        )
    points = [rw.node.input[3]] if rw.has(3) else []
    axis, block = int(rw.attributes.get("quantize_axis", 1)), int(rw.attributes.get("block_size", 128))
    table = rw.emit("DequantizeLinear", [rw.node.input[0], rw.node.input[2], *points], axis=axis, block_size=block)
    rw.emit("Gather", [table, rw.node.input[1]], rw.node.output[0], axis=int(rw.attributes.get("gather_axis", 0)))


def _dynamic_quantize_matmul(rw: _Rewriter) -> None:
    """DynamicQuantizeMatMul (A, B, b_scale, b_zero_point, bias) as quantize_dynamic writes it before it is fused."""
    a, b, b_scale = rw.node.input[:3]
    codes, scale, point = (f"{rw.node.output[0]}/{label}" for label in ("quantized", "scale", "zero_point"))
    name = f"{rw.node.name or rw.node.output[0]}/DynamicQuantizeLinear"
    rw.nodes.append(helper.make_node("DynamicQuantizeLinear", [a], [codes, scale, point], name=name))
    points = [point, rw.node.input[3]] if rw.has(3) else [point]
    _scaled_product(rw, [codes, b, *points], [scale, b_scale], 4)


def _matmul_integer_to_float(rw: _Rewriter) -> None:
    """MatMulIntegerToFloat (A, B, a_scale, b_scale, a_zero_point, b_zero_point, bias) as MatMulInteger times both scales."""
    a, b, *scales = rw.node.input[:4]
    points = [rw.node.input[index] if rw.has(index) else "" for index in (4, 5)]
    _scaled_product(rw, [a, b, *points], scales, 6)


def _quantized_product(rw: _Rewriter) -> None:
    """QLinearMatMul (a, b and y, each with scale and zero point) as a product of dequantised operands whose result is quantised.

    It sums integers: where a result is half way between two codes, the float32 sum may give the other one. A node whose scales are no
    constants, or are of more than the rows of a and y and the columns of b, stays.
    """
    scales = (1, 4, 6)
    if any(
        name not in rw.constants or len(rw.constants[name].dims) > 1 for name in (rw.node.input[at] for at in scales)
    ):
        rw.nodes.append(rw.node)
        return
    a = _of_codes(rw, "DequantizeLinear", rw.node.input[0], 1, axis=-2)
    b = _of_codes(rw, "DequantizeLinear", rw.node.input[3], 4, axis=-1)
    _of_codes(rw, "QuantizeLinear", rw.emit("MatMul", [a, b]), 6, axis=-2, output=rw.node.output[0])


def _of_codes(rw: _Rewriter, op: str, data: str, scale: int, *, axis: int, output: str | None = None) -> str:
    """The data de- or quantised by a constant scale and zero point, which are inputs `scale` and the next; several scales are of the axis."""
    parameters = list(rw.node.input[scale : scale + 2])
    shape = list(rw.constants[parameters[0]].dims)
    if shape == [1]:
        parameters = [rw.reinterpreted(scale, "scale", []), rw.reinterpreted(scale + 1, "zero point", [])]
    attributes = {"axis": axis} if shape not in ([], [1]) else {}
    return rw.emit(op, [data, *parameters], output, **attributes)


def _scaled_product(rw: _Rewriter, integers: list[str], scales: list[str], bias: int) -> None:
    while not integers[-1]:
        integers.pop()
    factor = rw.emit("Mul", scales)
    product = [rw.emit("CastLike", [rw.emit("MatMulInteger", integers), factor]), factor]
    if rw.has(bias):
        rw.emit("Add", [rw.emit("Mul", product), rw.node.input[bias]], rw.node.output[0])
    else:
        rw.emit("Mul", product, rw.node.output[0])


def _quantized_attention(rw: _Rewriter) -> None:
    """QAttention with the inputs of ONNX's Attention, which quantize_dynamic makes of it and no runtime knows; any other stays."""
    if "num_heads" in rw.attributes:
        rw.nodes.append(rw.node)
        return
    raise BadModelError(
        f"node '{rw.node.name}' (QAttention) lacks num_heads, as quantize_dynamic writes it for ONNX's Attention: no runtime loads that; "
        "quantise again with op_types_to_quantize=['MatMul', 'Gather']"
    )


def _rotary(rw: _Rewriter) -> None:
    """ONNX Runtime's RotaryEmbedding: (x, position_ids, cos, sin) with a per-batch offset or per-token positions."""
    x, positions, cos, sin = rw.node.input[:4]
    attributes = {"interleaved": rw.attributes.get("interleaved", 0)}
    for ours, theirs in (("num_heads", "num_heads"), ("rotary_embedding_dim", "rotary_embedding_dim")):
        if rw.attributes.get(theirs, 0):
            attributes[ours] = rw.attributes[theirs]
    rw.emit("RotaryEmbedding", [x, cos, sin, positions], rw.node.output[0], **attributes)


def _multi_head_attention(rw: _Rewriter) -> None:
    """ONNX Runtime's MultiHeadAttention over separate queries, keys and values."""
    unsupported = {3: "a bias of its own", 4: "a key padding mask"}
    for index, what in unsupported.items():
        if rw.has(index):
            raise BadModelError(
                f"node '{rw.node.name}': MultiHeadAttention with {what} is not supported: export without that fusion"
            )
    if not rw.has(1) or not rw.has(2):
        raise BadModelError(
            f"node '{rw.node.name}': MultiHeadAttention with packed inputs is not supported: export without that fusion"
        )
    inputs = [*rw.node.input[:3], *(rw.node.input[index] if rw.has(index) else "" for index in (5, 6, 7))]
    while not inputs[-1]:
        inputs.pop()
    heads = int(rw.attributes["num_heads"])
    attributes: dict[str, Any] = {
        "q_num_heads": heads,
        "kv_num_heads": heads,
        "is_causal": int(rw.attributes.get("unidirectional", 0)),
    }
    if rw.attributes.get("scale", 0.0):
        attributes["scale"] = rw.attributes["scale"]
    name = rw.node.name or rw.node.output[0]
    rw.nodes.append(helper.make_node("Attention", inputs, list(rw.node.output), name=f"{name}/Attention", **attributes))


_RUNTIME_OPS = {
    "SimplifiedLayerNormalization": _rms_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
    "SkipLayerNormalization": _skip_norm,
    "FusedMatMul": _fused_matmul,
    "FusedGemm": _fused_gemm,
    "QuickGelu": _quick_gelu,
    "Gelu": _gelu,
    "BiasGelu": _gelu,
    "FastGelu": _gelu,
    "MatMulNBits": _matmul_nbits,
    "GatherBlockQuantized": _gather_block_quantized,
    "DynamicQuantizeMatMul": _dynamic_quantize_matmul,
    "MatMulIntegerToFloat": _matmul_integer_to_float,
    "QAttention": _quantized_attention,
    "RotaryEmbedding": _rotary,
    "MultiHeadAttention": _multi_head_attention,
}
_STANDARD_OPS = {"QLinearMatMul": _quantized_product}
_RENAMED = ("DequantizeLinear", "QuantizeLinear", "GatherND", "Trilu", "Range")


def constants_of(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    """Initializers and the tensors of Constant nodes, by name."""
    constants = {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    return constants | {tensor.name: tensor for tensor in graph.initializer}


def _expand_fused_ops(model: onnx.ModelProto, base_dir: Path | None) -> None:
    """Rewrites ONNX Runtime's fused ops and fused standard ones, in place. Ops without a rule stay; they matter only if an attention reaches them."""
    graph = model.graph
    constants = constants_of(graph)
    nodes: list[onnx.NodeProto] = []
    changed = False
    for node in graph.node:
        if node.domain == RUNTIME_DOMAIN and node.op_type in _RENAMED:
            node.domain = ""
        rules = {RUNTIME_DOMAIN: _RUNTIME_OPS, "": _STANDARD_OPS}.get(node.domain, {})
        rule = rules.get(node.op_type)
        if rule is None:
            nodes.append(node)
            continue
        rewriter = _Rewriter(node, constants, graph, base_dir)
        rule(rewriter)
        nodes.extend(copy.copy(emitted) for emitted in rewriter.nodes)
        changed = True
    if changed:
        nodes = [copy.deepcopy(node) for node in nodes]
        del graph.node[:]
        graph.node.extend(nodes)


def _spell_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replaces `Attention` and `RotaryEmbedding` by ONNX's function bodies."""
    wanted = [node for node in model.graph.node if (not node.domain and node.op_type in SPELT_OUT)]
    if not wanted:
        return model
    types = _tensor_types(model)
    for count, node in enumerate(wanted):
        schema = onnx.defs.get_schema(node.op_type, OPSET)
        missing = [name for name in node.input if name and name not in types]
        if missing:
            raise BadModelError(
                f"node '{node.name}' ({node.op_type}): the type of '{missing[0]}' is unknown: run shape inference on the model first"
            )
        input_types = [
            types[name].SerializeToString() if name else onnx.TypeProto().SerializeToString() for name in node.input
        ]
        function = onnx.FunctionProto()
        function.ParseFromString(
            schema.get_context_dependent_function(  # type: ignore[attr-defined]
                node.SerializeToString(), input_types
            )
        )
        function.name, function.domain = f"{node.op_type}{count}", "mla_trt.internal"
        del function.opset_import[:]
        function.opset_import.append(helper.make_opsetid("", OPSET))
        function.ClearField("overload")
        node.op_type, node.domain = function.name, function.domain
        model.functions.append(function)
    if model.functions:
        model.opset_import.append(helper.make_opsetid("mla_trt.internal", 1))
        model = onnx.inliner.inline_local_functions(model)
        kept = [entry for entry in model.opset_import if entry.domain != "mla_trt.internal"]
        del model.opset_import[:]
        model.opset_import.extend(kept)
    return model


def _tensor_types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except onnx.shape_inference.InferenceError:
        _forget_types(model)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    types = {
        info.name: info.type for info in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    }
    for tensor in model.graph.initializer:
        types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
    return types
