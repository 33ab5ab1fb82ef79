"""What the ONNX parsers of the targets take: facts about them, one table a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnx import TensorProto

from mla_trt.passes.legalize_types import FLOATS, INTEGERS

_F = frozenset(FLOATS)
_I = frozenset(INTEGERS)
_B = frozenset({TensorProto.BOOL})
_Q = frozenset({TensorProto.INT8, TensorProto.FLOAT8E4M3FN, TensorProto.INT4})
_N = _F | _I
_A = _N | _B
_C = _A | {TensorProto.INT8}

# Types of the operand that decides (see DECIDING_INPUT), from docs/operators.md of onnx-tensorrt 10.6 and its importers.
_OPS_10_6: dict[str, frozenset[int]] = {
    **dict.fromkeys(
        [
            "Acos",
            "Acosh",
            "Asin",
            "Asinh",
            "Atan",
            "Atanh",
            "Ceil",
            "Celu",
            "Conv",
            "ConvTranspose",
            "Cos",
            "Cosh",
            "Elu",
            "Erf",
            "Exp",
            "Floor",
            "Gelu",
            "Gemm",
            "GlobalAveragePool",
            "GroupNormalization",
            "HardSigmoid",
            "HardSwish",
            "Hardmax",
            "InstanceNormalization",
            "IsInf",
            "LayerNormalization",
            "LeakyRelu",
            "Log",
            "LogSoftmax",
            "LpNormalization",
            "MatMul",
            "MeanVarianceNormalization",
            "PRelu",
            "Pow",
            "QuantizeLinear",
            "Reciprocal",
            "Relu",
            "Round",
            "Selu",
            "Sigmoid",
            "Sin",
            "Sinh",
            "Softmax",
            "Softplus",
            "Softsign",
            "Sqrt",
            "Tan",
            "Tanh",
            "ThresholdedRelu",
            "BatchNormalization",
            "AveragePool",
            "MaxPool",
            "Mish",
            "Dropout",
            "Einsum",
            "RandomNormalLike",
            "RandomUniformLike",
            "Resize",
        ],
        _F,
    ),
    **dict.fromkeys(
        [
            "Abs",
            "Add",
            "ArgMax",
            "ArgMin",
            "Clip",
            "CumSum",
            "DepthToSpace",
            "Div",
            "Greater",
            "GreaterOrEqual",
            "IsNaN",
            "Less",
            "LessOrEqual",
            "Max",
            "Mean",
            "Min",
            "Mod",
            "Mul",
            "Neg",
            "Range",
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSum",
            "ReduceSumSquare",
            "Shrink",
            "Sign",
            "SpaceToDepth",
            "Sub",
            "Sum",
            "TopK",
        ],
        _N,
    ),
    **dict.fromkeys(
        [
            "CastLike",
            "Concat",
            "Constant",
            "ConstantOfShape",
            "Equal",
            "Expand",
            "EyeLike",
            "Flatten",
            "Gather",
            "GatherElements",
            "GatherND",
            "Identity",
            "NonZero",
            "OneHot",
            "Pad",
            "Reshape",
            "ReverseSequence",
            "Scatter",
            "ScatterElements",
            "ScatterND",
            "Shape",
            "Size",
            "Slice",
            "Split",
            "Squeeze",
            "Tile",
            "Transpose",
            "Trilu",
            "Unsqueeze",
            "Where",
        ],
        _A,
    ),
    **dict.fromkeys(["And", "Or", "Not", "Xor"], _B),
    **dict.fromkeys(["If", "Loop", "Scan"], _A),
    "Cast": _C,
    "DequantizeLinear": _Q,
}
_OPS_11: dict[str, frozenset[int]] = {
    **_OPS_10_6,
    **dict.fromkeys(["RMSNormalization", "RotaryEmbedding", "Swish"], _F),
}

# Which input's type decides, where that is not the first.
DECIDING_INPUT = {"Where": 1, "OneHot": 2, "Range": 1}


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        ops: standard ops that it knows, with the element types that it takes.
        cast_types: types that Cast may name.
        max_k: TopK picks at most as many.
        takes_reduction_none: whether ScatterND may say `reduction="none"`.
    """

    name: str
    ops: Mapping[str, frozenset[int]] = field(repr=False)
    cast_types: frozenset[int] = _C
    max_k: int = 3840
    takes_reduction_none: bool = False


TARGETS: dict[str, Target | None] = {
    "tensorrt-10.6": Target("TensorRT 10.6", _OPS_10_6),
    "tensorrt-11": Target("TensorRT 11", _OPS_11, takes_reduction_none=True),
    "onnx": None,
}
