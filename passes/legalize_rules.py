"""One rule an op: rewrites a node that a target refuses into what it takes. Every rule keeps the node's results under their names."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from mla_trt.passes.graph import Emitter, is_empty, producer, small_constant
from mla_trt.passes.legalize_constants import lazy_constant
from mla_trt.passes.legalize_table import Target
from mla_trt.passes.legalize_types import HALF, INTEGERS, element_type, to_dtype


@dataclass(frozen=True)
class Rewriter:
    """What the rules work with: the target, and an emitter for the graph (or subgraph) that the node is in."""

    target: Target
    emitter: Emitter

    def cast(self, tensor: gs.Tensor, element: int, wish: str) -> gs.Tensor:
        """The tensor in another element type; the tensor itself where it has that already."""
        if element_type(tensor) == element:
            return tensor
        made = self.emitter.node("Cast", [tensor], wish, dtype=to_dtype(element), to=element)
        made.shape = None if tensor.shape is None else list(tensor.shape)
        return made

    def scalar(self, wish: str, value: Any, element: int) -> gs.Constant:
        """A constant of rank 0 in any element type."""
        single = np.array(value, np.float32)
        return lazy_constant(self.emitter.names.new(wish), single.astype(helper.tensor_dtype_to_np_dtype(element)))

    @staticmethod
    def become(node: gs.Node, op: str, inputs: list[gs.Tensor], **attrs: Any) -> None:
        """Makes the node another one that has the same results."""
        node.op, node.domain, node.attrs = op, None, dict(attrs)
        node.inputs = inputs


Rule = Callable[[gs.Node, Rewriter], bool]


def rms_normalization(node: gs.Node, rewriter: Rewriter) -> bool:
    """RMSNormalization in the arithmetic of its definition: in `stash_type`, then in the type of the scale."""
    e = rewriter.emitter
    x, scale = node.inputs[:2]
    wish = node.outputs[0].name
    axis = node.attrs.get("axis", -1)
    if axis < 0:
        axes = list(range(axis, 0))
    else:
        normalised = len(x.shape) - axis if x.shape is not None else len(scale.shape) if scale.shape is not None else 0
        if normalised < 1:
            return False
        axes = list(range(-normalised, 0))
    stash = node.attrs.get("stash_type", TensorProto.FLOAT)
    kind = element_type(x) or stash
    wide = rewriter.cast(x, stash, f"{wish}.wide") if kind != stash else x
    square = e.node("Mul", [wide, wide], f"{wish}.square", dtype=to_dtype(stash))
    mean = e.node(
        "ReduceMean",
        [square, e.constant(f"{wish}.axes", axes, np.int64)],
        f"{wish}.mean",
        keepdims=1,
        noop_with_empty_axes=0,
    )
    biased = e.node(
        "Add", [mean, rewriter.scalar(f"{wish}.epsilon", node.attrs.get("epsilon", 1e-5), stash)], f"{wish}.biased"
    )
    normed: gs.Tensor = e.node("Div", [wide, e.node("Sqrt", [biased], f"{wish}.rms")], f"{wish}.normed")
    rewriter.become(node, "Mul", [rewriter.cast(normed, element_type(scale) or kind, f"{wish}.narrow"), scale])
    return True


def swish(node: gs.Node, rewriter: Rewriter) -> bool:
    """x * sigmoid(alpha * x)."""
    e = rewriter.emitter
    x, alpha, wish = node.inputs[0], node.attrs.get("alpha", 1.0), node.outputs[0].name
    scaled = x
    if alpha != 1.0:
        kind = element_type(x)
        if not kind:
            return False
        scaled = e.node("Mul", [x, rewriter.scalar(f"{wish}.alpha", alpha, kind)], f"{wish}.scaled")
    rewriter.become(node, "Mul", [x, e.node("Sigmoid", [scaled], f"{wish}.gate")])
    return True


def scatter(node: gs.Node, rewriter: Rewriter) -> bool:
    """Drops `reduction="none"`, the default, which the parser refuses to read."""
    if node.attrs.get("reduction") != "none" or rewriter.target.takes_reduction_none:
        return False
    del node.attrs["reduction"]
    return True


def _through_integers(node: gs.Node, rewriter: Rewriter) -> None:
    """The node now makes int32; its result is cast back to booleans."""
    e, output = rewriter.emitter, node.outputs[0]
    integers = e.variable(f"{output.name}.integers", np.dtype(np.int32), output.shape)
    node.outputs = [integers]
    name = e.names.new(f"{output.name}/Cast")
    e.graph.nodes.append(gs.Node("Cast", name, {"to": TensorProto.BOOL}, [integers], [output]))


def reduce_booleans(node: gs.Node, rewriter: Rewriter) -> bool:
    """Any and all, written as the largest and the smallest boolean, over integers."""
    if element_type(node.inputs[0]) != TensorProto.BOOL:
        return False
    node.inputs[0] = rewriter.cast(node.inputs[0], TensorProto.INT32, f"{node.outputs[0].name}.booleans")
    _through_integers(node, rewriter)
    return True


def one_hot(node: gs.Node, rewriter: Rewriter) -> bool:
    """OneHot of constant indices picks from `values`; a shape may be computed so, and TensorRT computes no shape with OneHot."""
    indices, depth = small_constant(node.inputs[0]), small_constant(node.inputs[1])
    if indices is None or depth is None or indices.size * int(depth.reshape(-1)[0]) > 1 << 16:
        return False
    count = int(depth.reshape(-1)[0])
    wrapped = np.where(indices < 0, indices + count, indices)
    hot = (np.expand_dims(wrapped, -1) == np.arange(count)).astype(np.int64)
    axis = node.attrs.get("axis", -1)
    hot = np.moveaxis(hot, -1, axis)
    rewriter.become(
        node, "Gather", [node.inputs[2], rewriter.emitter.constant(f"{node.outputs[0].name}.hot", hot)], axis=0
    )
    return True


def top_k(node: gs.Node, rewriter: Rewriter) -> bool:
    """TensorRT sorts always: so that the model says what the engine does, it sorts too."""
    if node.attrs.get("sorted", 1):
        return False
    node.attrs["sorted"] = 1
    return True


def squeeze(node: gs.Node, rewriter: Rewriter) -> bool:
    """Names the axis of a Squeeze of one element; of a larger tensor it must not depend on the sizes of one run."""
    if len(node.inputs) > 1 or not _has_one_element(node.inputs[0]):
        return False
    node.inputs = [node.inputs[0], rewriter.emitter.constant(f"{node.outputs[0].name}.axes", [0], np.int64)]
    return True


def _has_one_element(tensor: gs.Tensor) -> bool:
    """Whether a tensor is surely of shape [1]."""
    maker = producer(tensor)
    if maker is not None and maker.op == "Shape":
        start, end = maker.attrs.get("start", 0), maker.attrs.get("end")
        return (end == start + 1 and end != 0) or (start == -1 and end is None)
    if maker is not None and maker.op == "Reshape":
        target = small_constant(maker.inputs[1])
        return target is not None and target.tolist() == [1]
    if maker is not None and maker.op in ("Gather", "Add", "Sub", "Mul", "Div", "Cast", "Concat"):
        # Arithmetic on sizes: of one element where each operand has one element or none of its own axes.
        if maker.op == "Gather":
            index = small_constant(maker.inputs[1])
            return index is not None and index.shape == (1,) and producer(maker.inputs[0]) is not None
        return len(maker.inputs) == 1 and _has_one_element(maker.inputs[0])
    return False


def power(node: gs.Node, rewriter: Rewriter) -> bool:
    """Pow takes floats of one type: the exponent takes the type of the base, an integer base is squared or computed in float32."""
    base, exponent = (element_type(tensor) for tensor in node.inputs)
    wish = node.outputs[0].name
    if base in INTEGERS:
        value = small_constant(node.inputs[1])
        if value is not None and value.size == 1 and float(value.reshape(-1)[0]) == 2:
            return _square(node, rewriter, value.ndim)
        floats = [rewriter.cast(tensor, TensorProto.FLOAT, f"{wish}.floats") for tensor in node.inputs]
        result = rewriter.emitter.node(
            "Round", [rewriter.emitter.node("Pow", floats, f"{wish}.power")], f"{wish}.rounded"
        )
        rewriter.become(node, "Cast", [result], to=base)
        return True
    if not base or not exponent or base == exponent:
        return False
    value = small_constant(node.inputs[1])
    if value is None:
        node.inputs[1] = rewriter.cast(node.inputs[1], base, f"{wish}.exponent")
    else:
        typed = value.astype(helper.tensor_dtype_to_np_dtype(base))
        node.inputs[1] = lazy_constant(rewriter.emitter.names.new(f"{wish}.exponent"), typed)
    return True


def _square(node: gs.Node, rewriter: Rewriter, rank: int) -> bool:
    """A square; by an exponent of shape [1, …] the result has as many axes at least."""
    base = node.inputs[0]
    if not rank:
        rewriter.become(node, "Mul", [base, base])
        return True
    wish = node.outputs[0].name
    ones = rewriter.emitter.constant(f"{wish}.ones", np.ones([1] * rank), to_dtype(element_type(base)))
    rewriter.become(node, "Mul", [rewriter.emitter.node("Mul", [base, base], f"{wish}.square"), ones])
    return True


def compress(node: gs.Node, rewriter: Rewriter) -> bool:
    """Compress gathers where its condition holds."""
    e, wish = rewriter.emitter, node.outputs[0].name
    source, axis, condition = node.inputs[0], node.attrs.get("axis"), small_constant(node.inputs[1])
    if axis is None:
        source = e.reshape(source, [-1], f"{wish}.flat")
    places: gs.Tensor
    if condition is not None:
        # TensorRT builds no NonZero of a constant.
        places = e.constant(f"{wish}.places", np.flatnonzero(condition))
    else:
        places = e.node("NonZero", [node.inputs[1]], f"{wish}.places", dtype=np.dtype(np.int64))
        places = e.node("Squeeze", [places, e.constant(f"{wish}.first", [0], np.int64)], f"{wish}.places")
    rewriter.become(node, "Gather", [source, places], axis=axis or 0)
    return True


def mean(node: gs.Node, rewriter: Rewriter) -> bool:
    """The parser scales half-precision sums by a wrong number: it writes the float32 bits of 1/n into a constant of 16 bits."""
    kind = element_type(node.inputs[0])
    if kind not in HALF:
        return False
    wish = node.outputs[0].name
    total = rewriter.emitter.node("Sum", list(node.inputs), f"{wish}.sum")
    rewriter.become(node, "Div", [total, rewriter.scalar(f"{wish}.count", len(node.inputs), kind)])
    return True


def slice_axes(node: gs.Node, rewriter: Rewriter) -> bool:
    """Names the axes: where they are absent the parser wants a start for each axis of the data, and none absent before the steps."""
    if len(node.inputs) > 3 and not is_empty(node.inputs[3]):
        return False
    starts = node.inputs[1]
    if starts.shape is None or len(starts.shape) != 1 or not isinstance(starts.shape[0], int):
        return False
    axes = rewriter.emitter.constant(f"{node.outputs[0].name}.axes", np.arange(starts.shape[0]))
    node.inputs = [*node.inputs[:3], axes, *node.inputs[4:]]
    return True


def einsum(node: gs.Node, rewriter: Rewriter) -> bool:
    """The parser takes lower-case letters only."""
    equation = node.attrs["equation"].replace(" ", "")
    letters = sorted(set(equation) & set(string.ascii_letters))
    capitals = [letter for letter in letters if letter.isupper()]
    free = [letter for letter in string.ascii_lowercase if letter not in letters]
    if not capitals or len(capitals) > len(free):
        return False
    operands, arrow, result = equation.partition("->")
    if not arrow:
        # Without a result its letters come in alphabetical order, capitals first, which other letters would change.
        result = ("..." if "..." in operands else "") + "".join(
            letter for letter in letters if operands.count(letter) == 1
        )
    node.attrs["equation"] = f"{operands}->{result}".translate(str.maketrans(dict(zip(capitals, free, strict=False))))
    return True


def sequence_at(node: gs.Node, rewriter: Rewriter) -> bool:
    """A part of a SplitToSequence is a slice."""
    split = producer(node.inputs[0])
    index = small_constant(node.inputs[1])
    if split is None or split.op != "SplitToSequence" or split.domain or index is None:
        return False
    part = int(index.reshape(-1)[0])
    sizes = small_constant(split.inputs[1]) if len(split.inputs) > 1 and not is_empty(split.inputs[1]) else np.array(1)
    if sizes is None or (sizes.ndim == 0 and part < 0):
        return False
    if sizes.ndim:
        edges = np.concatenate([[0], np.cumsum(sizes)])
        start, end = (int(edge) for edge in edges[part % len(sizes) :][:2])
    else:
        start, end = part * int(sizes), (part + 1) * int(sizes)
    e, wish, axis = rewriter.emitter, node.outputs[0].name, split.attrs.get("axis", 0)
    bounds = [
        e.constant(f"{wish}.{label}", [value], np.int64)
        for label, value in (("start", start), ("end", end), ("axis", axis))
    ]
    if len(split.inputs) < 2 and not split.attrs.get("keepdims", 1):
        rewriter.become(node, "Gather", [split.inputs[0], e.constant(f"{wish}.part", part, np.int64)], axis=axis)
    else:
        rewriter.become(node, "Slice", [split.inputs[0], *bounds])
    return True


def triangle(node: gs.Node, rewriter: Rewriter) -> bool:
    """Says `upper`, of which the parser takes another default than ONNX."""
    if "upper" in node.attrs:
        return False
    node.attrs["upper"] = 1
    return True


def infinite(node: gs.Node, rewriter: Rewriter) -> bool:
    """Infinities of one sign are compared with 0 in their own type, which the parser takes to be float32."""
    kind = element_type(node.inputs[0])
    negative, positive = (node.attrs.get(f"detect_{sign}", 1) for sign in ("negative", "positive"))
    if negative == positive or kind not in HALF:
        return False
    e, wish = rewriter.emitter, node.outputs[0].name
    boolean = np.dtype(np.bool_)
    either = e.node("IsInf", [node.inputs[0]], f"{wish}.either", dtype=boolean)
    zero = rewriter.scalar(f"{wish}.zero", 0.0, kind)
    sign = e.node("Greater" if positive else "Less", [node.inputs[0], zero], f"{wish}.sign", dtype=boolean)
    rewriter.become(node, "And", [either, sign])
    return True


def trim(node: gs.Node) -> bool:
    """Takes absent inputs off the end: importers count inputs, whether named or not."""
    changed = False
    while node.inputs and is_empty(node.inputs[-1]):
        node.inputs.pop()
        changed = True
    return changed


RULES: dict[str, Rule] = {
    "RMSNormalization": rms_normalization,
    "Swish": swish,
    "ScatterND": scatter,
    "ReduceMax": reduce_booleans,
    "ReduceMin": reduce_booleans,
    "OneHot": one_hot,
    "TopK": top_k,
    "Squeeze": squeeze,
    "Pow": power,
    "Compress": compress,
    "Mean": mean,
    "Slice": slice_axes,
    "Einsum": einsum,
    "SequenceAt": sequence_at,
    "Trilu": triangle,
    "IsInf": infinite,
}
