"""What is legalised computes what it did, and is what the target's parser takes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from exports import FOLDER, load, needs_exports
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented

from mla_trt.errors import NoMlaError
from mla_trt.lowering import LowerOptions, lower
from mla_trt.passes.graph import topological
from mla_trt.passes.legalize import IllegalNode, illegal_nodes, legalize
from mla_trt.weight_file import WeightFile

TARGET = "tensorrt-10.6"
RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 8)).astype(np.float32)
E4M3 = ml_dtypes.float8_e4m3fn


@dataclass
class Case:
    """A small model.

    Attributes:
        nodes: (op, inputs, outputs, attributes), the inputs and outputs as words.
        inputs: given at run time.
        constants: initializers.
        legal: whether the target takes it as it is, so that nothing may change.
    """

    nodes: list[tuple[str, str, str, dict[str, Any]]]
    inputs: dict[str, np.ndarray]
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    legal: bool = False
    dynamic: bool = True

    def model(self) -> onnx.ModelProto:
        """The model, whose inputs' sizes are not known where `dynamic`."""
        nodes = [
            helper.make_node(
                op, [word.replace("-", "") for word in reads.split()], makes.split(), name=f"{op}_{index}", **attrs
            )
            for index, (op, reads, makes, attrs) in enumerate(self.nodes)
        ]
        used = {word for _, reads, _, _ in self.nodes for word in reads.split()}
        outputs = [word for _, _, makes, _ in self.nodes for word in makes.split() if word not in used]
        graph = helper.make_graph(
            nodes,
            "case",
            [
                helper.make_tensor_value_info(
                    name,
                    helper.np_dtype_to_tensor_dtype(array.dtype),
                    [f"{name}_{axis}" if self.dynamic else size for axis, size in enumerate(array.shape)],
                )
                for name, array in self.inputs.items()
            ],
            [helper.make_empty_tensor_value_info(name) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 26)], ir_version=10)
        inferred = onnx.shape_inference.infer_shapes(model)
        types = {value.name: value for value in inferred.graph.output}
        for output in model.graph.output:
            element = types[output.name].type.tensor_type.elem_type
            output.CopyFrom(helper.make_tensor_value_info(output.name, element, None))
        return model


def one(
    op: str, inputs: dict[str, Any], constants: dict[str, Any] | None = None, legal: bool = False, **attrs: Any
) -> Case:
    """A single node with one result, reading the inputs and then the constants."""
    constants = constants or {}
    return Case([(op, " ".join([*inputs, *constants]), "y", attrs)], inputs, constants, legal)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def dequantised(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None, legal: bool = False, **attrs: Any
) -> Case:
    """x @ DequantizeLinear(codes)."""
    zeros = {} if zero is None else {"zero": zero}
    rows = codes.shape[0]
    return Case(
        [("DequantizeLinear", " ".join(["codes", "scale", *zeros]), "w", attrs), ("MatMul", "x w", "y", {})],
        {"x": RNG.standard_normal((3, rows)).astype(scale.dtype)},
        {"codes": codes, "scale": scale, **zeros},
        legal,
    )


def random_codes(dtype: Any, rows: int = 8, columns: int = 6) -> np.ndarray:
    values = (
        RNG.integers(-7, 8, (rows, columns))
        if "u" not in np.dtype(dtype).name
        else RNG.integers(0, 16, (rows, columns))
    )
    return values.astype(dtype)


def scales(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return (RNG.uniform(0.01, 0.1, shape)).astype(dtype)


FLAGS = RNG.integers(0, 2, (3, 8)).astype(np.bool_)
BITS = {"x": FLAGS}
COUNTS = {"x": RNG.integers(-9, 9, (3, 8)).astype(np.int64)}
FLOATS = {"x": X}
HALVES = {"x": X.astype(np.float16)}
WEIGHT = RNG.standard_normal((8, 8)).astype(np.float32).astype(E4M3)

CASES: dict[str, Case] = {
    # Norms and activations.
    "RMSNormalization": one("RMSNormalization", FLOATS, {"w": X[0]}, axis=-1, epsilon=1e-6),
    "RMSNormalization from an axis": one("RMSNormalization", FLOATS, {"w": X}, axis=0),
    "RMSNormalization of float16": one("RMSNormalization", HALVES, {"w": X[0].astype(np.float16)}, axis=-1),
    "Swish": one("Swish", FLOATS),
    "Swish with alpha": one("Swish", FLOATS, alpha=1.5),
    "LayerNormalization": one("LayerNormalization", FLOATS, {"w": X[0], "b": X[1]}, legal=True),
    "Gelu": one("Gelu", FLOATS, legal=True, approximate="tanh"),
    # Scatters.
    "ScatterND none": one("ScatterND", FLOATS, {"i": np.array([[1], [0]], np.int64), "u": X[:2] + 1}, reduction="none"),
    "ScatterElements none": one(
        "ScatterElements",
        FLOATS,
        {"i": np.array([[1, 0, 2]], np.int64), "u": X[:1, :3]},
        legal=True,
        reduction="none",
        axis=0,
    ),
    "ScatterND of booleans": one(
        "ScatterND", BITS, {"i": np.array([[1]], np.int64), "u": ~FLAGS[:1]}, reduction="none"
    ),
    # Booleans and integers.
    "ReduceMax of booleans": one("ReduceMax", BITS, {"axes": i64(1)}, keepdims=0),
    "ReduceMin of booleans": one("ReduceMin", BITS, {"axes": i64(0)}, keepdims=1),
    "Equal of booleans": Case([("Not", "x", "n", {}), ("Equal", "x n", "y", {})], BITS, legal=True),
    "Pow with an integer exponent": one("Pow", FLOATS, {"e": np.array(2, np.int64)}),
    "Pow with a varying integer exponent": one("Pow", {**FLOATS, "e": i64(0, 1, 2, 3, 2, 1, 0, 3)}),
    "Pow of integers, squared": one("Pow", COUNTS, {"e": np.array(2, np.int64)}),
    "Pow of integers, squared by a matrix": one("Pow", {"x": i64(1, 2, 3)}, {"e": np.array([[2]], np.int64)}),
    "Pow of integers": one("Pow", COUNTS, {"e": np.array(3, np.int64)}),
    "Mod of integers": one("Mod", COUNTS, {"d": i64(5)}, legal=True),
    "Mod of floats": one("Mod", FLOATS, {"d": np.array([0.7], np.float32)}, legal=True, fmod=1),
    "Clip of integers": one("Clip", COUNTS, {"low": np.array(-3, np.int64), "high": np.array(3, np.int64)}, legal=True),
    "CumSum": one("CumSum", FLOATS, {"a": np.array(1, np.int64)}, legal=True),
    "CumSum of integers": one("CumSum", COUNTS, {"a": np.array(1, np.int64)}, legal=True),
    "NonZero": one("NonZero", BITS, legal=True),
    "Compress": one("Compress", FLOATS, {"c": np.array([True, False, True])}, axis=0),
    "Compress by data": one("Compress", {**FLOATS, "c": np.array([True, False, True])}, axis=0),
    "Compress of all": one("Compress", FLOATS, {"c": np.array([True, False, True, True])}),
    "IsInf of float16": one("IsInf", {"x": np.array([np.inf, -np.inf, 0], np.float16)}, detect_negative=0),
    "Pow of float16 by float32": one("Pow", HALVES, {"e": np.array(2, np.float32)}),
    "Mean": one("Mean", {"x": X, "z": X + 1}, legal=True),
    "Mean of float16": one("Mean", {"x": HALVES["x"], "z": HALVES["x"] + 1, "w": HALVES["x"]}),
    "Trilu": one("Trilu", FLOATS),
    "Trilu of booleans": one("Trilu", BITS, {"k": np.array(1, np.int64)}, legal=True, upper=0),
    "IsInf": one("IsInf", {"x": np.array([np.inf, -np.inf, 0], np.float32)}, legal=True, detect_negative=0),
    # Choices.
    "TopK, unsorted": Case([("TopK", "x k", "v i", {"sorted": 0, "largest": 1})], FLOATS, {"k": i64(3)}),
    "TopK": Case([("TopK", "x k", "v i", {})], FLOATS, {"k": i64(3)}, legal=True),
    "OneHot of constants": one("OneHot", {}, {"i": i64(0, 2, -1), "d": np.array(3, np.int64), "v": i64(5, 7)}, axis=0),
    "OneHot of constants with varying values": Case(
        [("OneHot", "i d v", "y", {"axis": 1})], {"v": i64(5, 7)}, {"i": i64(0, 2, -1), "d": np.array(4, np.int64)}
    ),
    "OneHot": one("OneHot", {"i": i64(0, 2, 1)}, {"d": np.array(3, np.int64), "v": i64(0, 1)}, legal=True),
    "Tile by a shape that OneHot makes": Case(
        [
            ("Shape", "x", "n", {"start": 0, "end": 1}),
            ("Concat", "unit n", "v", {"axis": 0}),
            ("OneHot", "i d v", "h", {}),
            ("Reshape", "h flat", "repeats", {}),
            ("Tile", "x repeats", "y", {}),
        ],
        FLOATS,
        {"i": i64(0), "d": np.array(2, np.int64), "unit": i64(1), "flat": i64(-1)},
    ),
    # Shapes and operands that must be constants.
    "axes that are computed": Case(
        [("Concat", "a b", "axes", {"axis": 0}), ("ReduceSum", "x axes", "y", {"keepdims": 0})],
        FLOATS,
        {"a": i64(0), "b": i64(1)},
    ),
    "axes of a shape of a constant": Case(
        [("Shape", "w", "s", {}), ("Unsqueeze", "x s", "y", {})], FLOATS, {"w": np.zeros(2, np.float32)}
    ),
    "Squeeze of one size": Case([("Shape", "x", "s", {"start": 1, "end": 2}), ("Squeeze", "s", "y", {})], FLOATS),
    "Shape of no axes": Case(
        [
            ("Shape", "x", "s", {"start": 0, "end": 0}),
            ("Concat", "s rest", "t", {"axis": 0}),
            ("Expand", "one t", "y", {}),
        ],
        FLOATS,
        {"rest": i64(2, 3), "one": np.ones((), np.float32)},
    ),
    "Slice without axes": one("Slice", FLOATS, {"s": i64(1), "e": i64(3)}),
    "Slice with steps, without axes": Case(
        [("Slice", "x s e - t", "y", {})], FLOATS, {"s": i64(0, 1), "e": i64(2, 7), "t": i64(1, 2)}
    ),
    "absent operands": Case([("Clip", "x low -", "y", {})], FLOATS, {"low": np.array(0, np.float32)}),
    "Split in a number": Case([("Split", "x", "a b c", {"num_outputs": 3, "axis": 1})], FLOATS, legal=True),
    "parts of a sequence of one size": Case(
        [("SplitToSequence", "x n", "s", {"axis": 1}), ("SequenceAt", "s i", "y", {}), ("SequenceAt", "s j", "z", {})],
        FLOATS,
        {"n": np.array(3, np.int64), "i": np.array(1, np.int64), "j": np.array(2, np.int64)},
    ),
    "parts of a sequence of several sizes": Case(
        [("SplitToSequence", "x n", "s", {"axis": 1}), ("SequenceAt", "s i", "y", {}), ("SequenceAt", "s j", "z", {})],
        FLOATS,
        {"n": i64(5, 3), "i": np.array(0, np.int64), "j": np.array(-1, np.int64)},
    ),
    "Einsum with capitals": one("Einsum", {"x": X, "z": X}, equation="Ab,cb->Ac"),
    "Einsum without a result": one("Einsum", {"x": X, "z": X.T.copy()}, equation="bZ,Za"),
    "Einsum without a result, in lower case": one("Einsum", {"x": X, "z": X.T.copy()}, equation="ba, ac", legal=True),
    "Einsum with an ellipsis": one("Einsum", {"x": X, "z": X.T.copy()}, equation="...mk,...kn->...mn", legal=True),
    # float64.
    "float64 constants": Case(
        [
            ("Cast", "x", "d", {"to": TensorProto.DOUBLE}),
            ("Mul", "d c", "m", {}),
            ("Cast", "m", "y", {"to": TensorProto.FLOAT}),
        ],
        FLOATS,
        {"c": np.array(1 / 3, np.float64)},
    ),
    "float64 beyond float32": Case(
        [
            ("Cast", "x", "d", {"to": TensorProto.DOUBLE}),
            ("Max", "d c", "m", {}),
            ("Cast", "m", "y", {"to": TensorProto.FLOAT}),
        ],
        FLOATS,
        {"c": np.array(-1.7e308, np.float64)},
    ),
    "float64 interface": Case(
        [("Mul", "x c", "m", {}), ("Sqrt", "m", "y", {})], {"x": np.abs(X).astype(np.float64)}, {"c": np.array(2.0)}
    ),
    "float64 of a shape": Case(
        [
            ("Shape", "x", "s", {}),
            ("ConstantOfShape", "s", "f", {"value": numpy_helper.from_array(np.array([2.5]))}),
            ("Cast", "f", "y", {"to": TensorProto.FLOAT}),
        ],
        FLOATS,
    ),
    # Quantised weights.
    "float8 cast": Case(
        [("Cast", "w", "f", {"to": TensorProto.FLOAT}), ("Mul", "f s", "m", {}), ("MatMul", "x m", "y", {})],
        FLOATS,
        {"w": WEIGHT, "s": scales(8, 1)},
    ),
    "float8 cast to float16": Case(
        [("Cast", "w", "f", {"to": TensorProto.FLOAT16}), ("MatMul", "x f", "y", {})], HALVES, {"w": WEIGHT}
    ),
    "float8 e5m2": Case(
        [("Cast", "w", "f", {"to": TensorProto.FLOAT}), ("MatMul", "x f", "y", {})],
        FLOATS,
        {"w": WEIGHT.astype(np.float32).astype(ml_dtypes.float8_e5m2)},
    ),
    "float8 moved": Case(
        [
            ("Transpose", "w", "t", {"perm": [1, 0]}),
            ("Reshape", "t shape", "r", {}),
            ("Cast", "r", "f", {"to": TensorProto.FLOAT}),
            ("MatMul", "x f", "y", {}),
        ],
        FLOATS,
        {"w": WEIGHT, "shape": i64(8, 8)},
    ),
    "float8 moved and dequantised": Case(
        [("Transpose", "w", "t", {"perm": [1, 0]}), ("DequantizeLinear", "t s", "f", {}), ("MatMul", "x f", "y", {})],
        FLOATS,
        {"w": WEIGHT, "s": scales()},
    ),
    "float8 with one scale": dequantised(random_codes(E4M3), scales(), legal=True),
    "float8 with a zero point": dequantised(random_codes(E4M3), scales(), np.zeros((), E4M3)),
    "float8 with a scale a column": dequantised(random_codes(E4M3), scales(6), legal=True, axis=1),
    "float8 in blocks": dequantised(random_codes(E4M3), scales(2, 6), axis=0, block_size=4),
    "float8 in ragged blocks": dequantised(random_codes(E4M3), scales(3, 6), axis=0, block_size=3),
    "float8 in blocks of float16": dequantised(
        random_codes(E4M3), scales(2, 6, dtype=np.float16), axis=0, block_size=4
    ),
    "float8 in blocks of 4 x 3": Case(
        [
            ("Unsqueeze", "s two", "s3", {}),
            ("Expand", "s3 shape3", "s4", {}),
            ("Reshape", "s4 shape2", "s5", {}),
            ("DequantizeLinear", "w s5", "f", {"axis": 0, "block_size": 4}),
            ("MatMul", "x f", "y", {}),
        ],
        FLOATS,
        {"w": random_codes(E4M3), "s": scales(2, 2), "two": i64(2), "shape3": i64(2, 2, 3), "shape2": i64(2, 6)},
    ),
    "int8 with one scale": dequantised(random_codes(np.int8), scales(), legal=True),
    "int8 with a zero": dequantised(random_codes(np.int8), scales(), np.zeros((), np.int8)),
    "int8 with a scale a column by default": dequantised(random_codes(np.int8), scales(6)),
    "int8 with a scale a row": dequantised(random_codes(np.int8), scales(8), np.zeros(8, np.int8), axis=0),
    "int8 with a zero point": dequantised(random_codes(np.int8), scales(), np.array(3, np.int8)),
    "int8 with zero points a row": dequantised(random_codes(np.int8), scales(8), np.arange(8, dtype=np.int8), axis=0),
    "int8 with a scale of 0": dequantised(
        random_codes(np.int8), np.array([0, 0.1, 0.2, 0.1, 0.3, 0.1], np.float32), axis=1
    ),
    "int8 in blocks": dequantised(random_codes(np.int8), scales(2, 6), axis=0, block_size=4),
    "uint8 in blocks": dequantised(
        random_codes(np.uint8), scales(2, 6), np.full((2, 6), 8, np.uint8), axis=0, block_size=4
    ),
    "uint4 in blocks": dequantised(
        random_codes(ml_dtypes.uint4), scales(8, 2), np.full((8, 2), 8).astype(ml_dtypes.uint4), axis=1, block_size=3
    ),
    "int4 in blocks": dequantised(random_codes(ml_dtypes.int4), scales(2, 6), legal=True, axis=0, block_size=4),
    "int4 in blocks with zeros": dequantised(
        random_codes(ml_dtypes.int4),
        scales(2, 6),
        np.zeros((2, 6), np.int8).astype(ml_dtypes.int4),
        axis=0,
        block_size=4,
    ),
    "int4 in blocks with zero points": dequantised(
        random_codes(ml_dtypes.int4),
        scales(8, 2),
        RNG.integers(-8, 8, (8, 2)).astype(ml_dtypes.int4),
        axis=1,
        block_size=3,
    ),
    "int4 in ragged blocks": dequantised(random_codes(ml_dtypes.int4), scales(8, 2), axis=1, block_size=4),
    "int4 in blocks of rank 3": Case(
        [("DequantizeLinear", "w s", "f", {"axis": 1, "block_size": 4}), ("MatMul", "x f", "y", {})],
        FLOATS,
        {"w": random_codes(ml_dtypes.int4)[None], "s": scales(1, 2, 6)},
    ),
    "int4 with a scale a row": dequantised(random_codes(ml_dtypes.int4), scales(8), axis=0),
    "int4 of an odd width": dequantised(random_codes(ml_dtypes.int4, 8, 5), scales(2, 5), axis=0, block_size=4),
    "uint4 in blocks with zero points": dequantised(
        random_codes(ml_dtypes.uint4),
        scales(8, 2),
        RNG.integers(0, 16, (8, 2)).astype(ml_dtypes.uint4),
        axis=1,
        block_size=3,
    ),
    "uint8 with a scale a row": dequantised(random_codes(np.uint8), scales(8), np.arange(8, dtype=np.uint8), axis=0),
    "uint8 without a zero point": dequantised(random_codes(np.uint8), scales()),
    "int16": dequantised(random_codes(np.int16), scales(6), axis=1),
    "int32 biases": Case(
        [("DequantizeLinear", "b s", "f", {}), ("Add", "x f", "y", {})],
        FLOATS,
        {"b": np.arange(8, dtype=np.int32), "s": scales()},
    ),
    # Quantised activations.
    "int8 activations": Case(
        [("QuantizeLinear", "x s z", "q", {}), ("DequantizeLinear", "q s z", "y", {})],
        FLOATS,
        {"s": np.array(0.02, np.float32), "z": np.array(0, np.int8)},
    ),
    "uint8 rows of a table": Case(
        [("Gather", "codes ids", "rows", {}), ("DequantizeLinear", "rows scale zero", "y", {})],
        {"ids": np.array([[3, 0, 7], [1, 1, 2]])},
        {"codes": random_codes(np.uint8), "scale": scales(), "zero": np.array(113, np.uint8)},
    ),
    "uint8 rows of a table without a zero point": Case(
        [("Gather", "codes ids", "rows", {}), ("DequantizeLinear", "rows scale", "y", {})],
        {"ids": np.array([[3, 0, 7], [1, 1, 2]])},
        {"codes": random_codes(np.uint8), "scale": scales()},
    ),
    "uint8 activations": Case(
        [("QuantizeLinear", "x s z", "q", {}), ("DequantizeLinear", "q s z", "y", {})],
        FLOATS,
        {"s": np.array(0.02, np.float32), "z": np.array(120, np.uint8)},
    ),
    "uint8 activations without a zero point": Case(
        [("QuantizeLinear", "x s", "q", {}), ("DequantizeLinear", "q s", "y", {})],
        FLOATS,
        {"s": np.array(0.02, np.float32)},
    ),
    "uint8 activations by column": Case(
        [("QuantizeLinear", "x s z", "q", {"axis": 1}), ("DequantizeLinear", "q s z", "y", {"axis": 1})],
        FLOATS,
        {"s": scales(8), "z": np.arange(100, 108, dtype=np.uint8)},
    ),
    "uint8 activations of float16": Case(
        [("QuantizeLinear", "x s z", "q", {}), ("DequantizeLinear", "q s z", "y", {})],
        HALVES,
        {"s": np.array(0.02, np.float16), "z": np.array(120, np.uint8)},
    ),
    "int8 activations by column": Case(
        [("QuantizeLinear", "x s", "q", {"output_dtype": TensorProto.INT8}), ("DequantizeLinear", "q s", "y", {})],
        FLOATS,
        {"s": scales(8)},
    ),
    "float8 activations": Case(
        [("Cast", "x", "q", {"to": TensorProto.FLOAT8E4M3FN}), ("Cast", "q", "y", {"to": TensorProto.FLOAT})],
        {"x": X * 300},
    ),
}

# Bitwise equal: nothing is computed, or nothing is rounded.
EXACT = (
    *(
        "Compress",
        "Equal",
        "NonZero",
        "OneHot",
        "Reduce",
        "Scatter",
        "Shape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "TopK",
    ),
    *("Trilu", "axes", "parts"),
)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Results on ONNX Runtime, as written; of ops that it lacks, by ONNX's reference implementation."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except NotImplemented:
        return list(ReferenceEvaluator(model).run(None, feeds))
    return list(session.run(None, feeds))


def exported(graph: gs.Graph, model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph as a model, with the functions of the model that it is from."""
    graph.nodes[:] = topological(graph.nodes)
    result = gs.export_onnx(graph, do_type_check=False)
    result.functions.extend(model.functions)
    result.ir_version = model.ir_version
    del result.graph.value_info[:]
    return result


def legalized(model: onnx.ModelProto, target: str = TARGET) -> tuple[onnx.ModelProto, int, list[IllegalNode]]:
    """The legalised model, how many nodes changed, and what is still illegal."""
    graph = gs.import_onnx(model)
    changed = legalize(graph, target)
    return exported(graph, model), changed, illegal_nodes(graph, target)


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_stay_and_nothing_illegal_is_left(name: str) -> None:
    case = CASES[name]
    model = case.model()
    expected = run(model, case.inputs)
    result, changed, illegal = legalized(model)
    assert illegal == []
    assert bool(changed) != case.legal
    for got, want in zip(run(result, case.inputs), expected, strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        if name == "TopK, unsorted":
            got, want = np.sort(got), np.sort(want)
        if name.startswith(EXACT):
            np.testing.assert_array_equal(got, want)
        else:
            tolerance = 2e-3 if want.dtype == np.float16 else 1e-6
            np.testing.assert_allclose(
                got.astype(np.float64), want.astype(np.float64), rtol=tolerance, atol=tolerance * np.abs(X).max()
            )


def test_constants_of_rank_0_keep_their_rank() -> None:
    case = Case([("Squeeze", "c a", "s", {}), ("Gather", "x s", "y", {})], FLOATS, {"c": i64(1), "a": i64(0)})
    result, _, _ = legalized(case.model())
    assert run(result, case.inputs)[0].shape == (8,)


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_newer_targets_keep_what_they_know() -> None:
    model = Case(
        [
            ("RMSNormalization", "x w", "n", {}),
            ("Swish", "n", "s", {}),
            ("ScatterND", "s i u", "y", {"reduction": "none"}),
        ],
        FLOATS,
        {"w": X[0], "i": np.array([[1]], np.int64), "u": X[:1]},
    ).model()
    assert ops(legalized(model, "tensorrt-11")[0]) == ops(model)
    assert legalized(model, "tensorrt-11")[1:] == (0, [])
    assert legalized(model, "onnx")[1:] == (0, [])
    assert "Swish" not in ops(legalized(model)[0])


def test_what_cannot_be_rewritten_is_named_with_its_reason() -> None:
    cases = {
        "does not know the op": Case([("BitCast", "x", "y", {"to": TensorProto.INT32})], FLOATS),
        "does not take int64": one("MatMul", {"x": COUNTS["x"], "z": COUNTS["x"].T.copy()}),
        "more than 3840": Case([("TopK", "x k", "v i", {})], {"x": np.zeros((1, 5000), np.float32)}, {"k": i64(4000)}),
        "operand 1 must be an initializer": Case(
            [("Shape", "x", "s", {"start": 0, "end": 1}), ("Sub", "s three", "a", {}), ("ReduceSum", "x a", "y", {})],
            FLOATS,
            {"three": i64(2)},
        ),
        "results other than the first": Case([("LayerNormalization", "x w", "y m", {})], FLOATS, {"w": X[0]}),
        "a diagonal": one("Einsum", {"x": X[:, :3]}, equation="ii->i"),
        "reduction='add'": one("ScatterND", FLOATS, {"i": np.array([[1]], np.int64), "u": X[:1]}, reduction="add"),
        "reduction='mul'": one(
            "ScatterElements", FLOATS, {"i": np.array([[1, 0, 2]], np.int64), "u": X[:1, :3]}, reduction="mul", axis=0
        ),
        "a cast to int16": Case([("Cast", "x", "y", {"to": TensorProto.INT16})], FLOATS),
        "the axes must be named": Case([("Squeeze", "x", "y", {})], {"x": X[:1]}),
        "domain 'com.microsoft'": Case([("Relu", "x", "y", {})], FLOATS),
    }
    for reason, case in cases.items():
        model = case.model()
        if "domain" in reason:
            model.graph.node[0].domain = "com.microsoft"
        illegal = legalized(model)[2]
        assert [entry.op for entry in illegal] == [model.graph.node[-1].op_type], reason
        assert reason in illegal[0].reason
        assert illegal[0].name == model.graph.node[-1].name


def test_subgraphs_are_legalised_too() -> None:
    def branch(op: str, **attrs: Any) -> onnx.GraphProto:
        node = helper.make_node(op, ["x", "w"], [f"{op}_y"], name=op, **attrs)
        return helper.make_graph([node], op, [], [helper.make_tensor_value_info(f"{op}_y", TensorProto.FLOAT, None)])

    node = helper.make_node(
        "If", ["c"], ["y"], then_branch=branch("RMSNormalization", axis=-1), else_branch=branch("Mul")
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "main",
        [value("c", TensorProto.BOOL, []), value("x", TensorProto.FLOAT, [3, 8])],
        [value("y", TensorProto.FLOAT, [3, 8])],
        [numpy_helper.from_array(X[0], "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 26)], ir_version=10)
    assert [entry.op for entry in illegal_nodes(gs.import_onnx(model), TARGET)] == ["RMSNormalization"]
    result, changed, illegal = legalized(model)
    assert changed
    assert illegal == []
    for taken in (True, False):
        feeds = {"c": np.array(taken), "x": X}
        np.testing.assert_allclose(run(result, feeds)[0], run(model, feeds)[0], rtol=1e-6, atol=1e-6)


def test_sizes_that_are_written_as_names_become_sizes() -> None:
    model = Case([("Relu", "x", "y", {})], FLOATS).model()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "8"
    result = legalized(model)[0]
    assert [dim.dim_value for dim in result.graph.input[0].type.tensor_type.shape.dim] == [0, 8]


def stored_outside(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model with every initializer in an external file."""
    file = WeightFile(folder / "weights.bin")
    for tensor in model.graph.initializer:
        file.move_out(tensor)
    return model


def test_weights_are_not_read_unless_their_type_must_change(tmp_path: Path) -> None:
    case = Case(
        [
            ("Cast", "w", "f", {"to": TensorProto.FLOAT}),
            ("MatMul", "x f", "m", {}),
            ("RMSNormalization", "m n", "y", {"axis": -1}),
        ],
        FLOATS,
        {"w": WEIGHT, "n": X[0]},
    )
    model = stored_outside(case.model(), tmp_path)
    (tmp_path / "weights.bin").unlink()
    graph = gs.import_onnx(model)
    notes: list[str] = []
    assert legalize(graph, TARGET, tmp_path, notes=notes) == 2
    assert illegal_nodes(graph, TARGET) == []
    assert notes == []


def test_weights_that_change_their_type_go_to_the_weight_file(tmp_path: Path) -> None:
    rows, columns = 512, 256
    codes = RNG.integers(0, 16, (rows, columns)).astype(ml_dtypes.uint4)
    case = dequantised(codes, scales(rows, 8), np.full((rows, 8), 8).astype(ml_dtypes.uint4), axis=1, block_size=32)
    expected = run(case.model(), case.inputs)
    graph = gs.import_onnx(stored_outside(case.model(), tmp_path))
    notes: list[str] = []
    legalize(graph, TARGET, tmp_path, WeightFile(tmp_path / "model.data"), notes)
    assert notes == ["1 weights went from uint4 to int4, as TensorRT 10.6 takes them"]
    assert (tmp_path / "model.data").stat().st_size == rows * columns // 2
    result = exported(graph, case.model())
    onnx.save(result, tmp_path / "model.onnx")
    onnx.load_external_data_for_model(result, str(tmp_path))
    np.testing.assert_array_equal(run(result, case.inputs)[0], expected[0])


def test_time_is_linear_in_the_nodes() -> None:
    def seconds(layers: int) -> float:
        nodes: list[tuple[str, str, str, dict[str, Any]]] = []
        for layer in range(layers):
            nodes += [
                ("Concat", "zero one", f"b{layer}", {"axis": 0}),
                ("ReduceSum", f"x{layer} b{layer}", f"r{layer}", {"keepdims": 1}),
                ("RMSNormalization", f"x{layer} w", f"n{layer}", {"axis": -1}),
                ("ScatterND", f"n{layer} i u", f"u{layer}", {"reduction": "none"}),
                ("Add", f"u{layer} r{layer}", f"x{layer + 1}", {}),
            ]
        constants = {"w": X[0], "zero": i64(0), "one": i64(1), "i": np.array([[1]], np.int64), "u": X[:1]}
        model = Case(nodes, {"x0": X}, constants).model()
        graph = gs.import_onnx(model)
        start = time.process_time()
        legalize(graph, TARGET)
        return time.process_time() - start

    seconds(100)
    # A quadratic pass would take a hundred times as long for ten times the nodes.
    assert seconds(3000) < 40 * max(seconds(300), 0.05)


SIZES = {"T": 5, "B": 1, "B + 1": 2, "max_pages": 2, "pages": 3}


def feeds_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """One sequence of five tokens, nothing cached."""
    feeds = {}
    for entry in model.graph.input:
        kind = entry.type.tensor_type
        names = [dim.dim_param or str(dim.dim_value) for dim in kind.shape.dim]
        batch = {"S": 5} if entry.name in ("input_ids", "attention_mask") else {}
        shape = [int(name) if name.isdigit() else {**SIZES, **batch}.get(name, 1) for name in names]
        if entry.name == "attention_mask":
            shape = [1, 5]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if np.issubdtype(dtype, np.floating):
            feeds[entry.name] = np.random.default_rng(1).standard_normal(shape).astype(dtype)
        else:
            feeds[entry.name] = np.zeros(shape, dtype)
    feeds["query_offsets"][1] = 5
    feeds["block_table"][0, :] = [0, 1]
    for name in ("input_ids", "tokens", "attention_mask"):
        if name in feeds:
            feeds[name][:] = np.arange(5).reshape(feeds[name].shape) if name != "attention_mask" else 1
    return feeds


@cache
def names_of_exports() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.onnx"))


@needs_exports
@pytest.mark.parametrize("name", names_of_exports())
def test_every_example_is_legal_and_computes_the_same(name: str) -> None:
    try:
        model = lower(load(name), LowerOptions(kv_format="f32", index_format="f32", target="onnx")).model
    except NoMlaError as error:
        pytest.skip(f"not lowered: {error}")
    result, _, illegal = legalized(model)
    assert illegal == []
    feeds = feeds_of(model)
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    tolerance = 5e-3 if TensorProto.FLOAT16 in kinds.values() or "fp16" in name else 1e-5
    for got, want, output in zip(run(result, feeds), run(model, feeds), kinds, strict=True):
        got, want = (array.view(np.float32) if array.dtype == np.int32 else array for array in (got, want))
        error = np.abs(got.astype(np.float64) - want).max() / np.abs(want).max()
        assert error <= tolerance, output
