"""Recognises RMS and layer norms by what they compute, however they are spelt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_graphsurgeon as gs
from onnx.reference.ops import load_op

from mla_trt.passes.graph import OPSET, is_empty, producer, to_proto

_PARTS = {
    "Mul",
    "Div",
    "Pow",
    "ReduceMean",
    "ReduceSum",
    "ReduceSumSquare",
    "ReduceL2",
    "Sqrt",
    "Reciprocal",
    "Add",
    "Sub",
    "Cast",
    "CastLike",
    "Identity",
    "Abs",
    "LpNormalization",
    "Neg",
    "Clip",
    "Max",
    "Reshape",
    "Unsqueeze",
    "Squeeze",
    "RMSNormalization",
    "LayerNormalization",
    "Expand",
    "Sum",
    "Exp",
    "Log",
}
_MAX_NODES = 40


class Case(Protocol):
    """A graph on a small concrete case, as a `mla_trt.passes.probe.Probe` has it."""

    def shape(self, tensor: gs.Tensor) -> tuple[int, ...]:
        """The shape of a tensor."""
        ...

    def is_known(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor does not depend on data."""
        ...

    def known(self, tensor: gs.Tensor) -> np.ndarray:
        """The array of a tensor that does not depend on data."""
        ...

    def is_transparent(self, node: gs.Node) -> bool:
        """Whether a node only moves, scales or adds elements of the data that enters it."""
        ...


@dataclass(frozen=True)
class RmsNorm:
    """y = x / sqrt(mean(x^2) + epsilon) * weight over the last axis.

    Attributes:
        source: the tensor x.
        weight: float64 [width].
    """

    source: gs.Tensor
    epsilon: float
    weight: np.ndarray


@dataclass(frozen=True)
class LayerNorm:
    """y = (x - mean(x)) / sqrt(var(x) + epsilon) * weight + bias over the last axis; weight and bias float64 [width]."""

    source: gs.Tensor
    epsilon: float
    weight: np.ndarray
    bias: np.ndarray


def recognise_layer_norm(probe: Case, tensor: gs.Tensor) -> LayerNorm | None:
    """The layer norm that makes a tensor, or None."""
    shape = probe.shape(tensor)
    if not shape or shape[-1] < 2:
        return None
    for source in _candidates(probe, tensor, shape):
        cone = _cone(probe, tensor, source)
        if cone is not None and (found := _fit_layer_norm(probe, tensor, source, cone, shape[-1])) is not None:
            return found
    return None


def recognise_rms_norm(probe: Case, tensor: gs.Tensor) -> RmsNorm | None:
    """The RMS norm that makes a tensor, or None."""
    shape = probe.shape(tensor)
    if not shape or shape[-1] < 2:
        return None
    for source in _candidates(probe, tensor, shape):
        cone = _cone(probe, tensor, source)
        if cone is None:
            continue
        found = _fit(probe, tensor, source, cone, shape[-1])
        if found is not None:
            return found
    return None


def _is_part(probe: Case, node: gs.Node) -> bool:
    """Whether a node may belong to a norm. What it computes is found out by evaluating it."""
    return not node.domain and (node.op in _PARTS or probe.is_transparent(node))


def _candidates(probe: Case, tensor: gs.Tensor, shape: tuple[int, ...]) -> list[gs.Tensor]:
    """Data tensors of the same shape behind `tensor`, the furthest last found first."""
    found: list[gs.Tensor] = []
    seen: set[int] = set()
    stack = [tensor]
    while stack and len(seen) < _MAX_NODES:
        node = producer(stack.pop())
        if node is None or id(node) in seen or not _is_part(probe, node):
            continue
        seen.add(id(node))
        for item in node.inputs:
            if not is_empty(item) and not probe.is_known(item):
                if probe.shape(item) == shape and all(item is not other for other in found):
                    found.append(item)
                stack.append(item)
    return found[::-1]


def _cone(probe: Case, tensor: gs.Tensor, source: gs.Tensor) -> list[gs.Node] | None:
    """Nodes from `source` to `tensor` in order, or None where other data enters."""
    ordered: list[gs.Node] = []
    done: set[int] = set()

    def visit(item: gs.Tensor, depth: int) -> bool:
        if item is source or is_empty(item) or probe.is_known(item):
            return True
        node = producer(item)
        if node is None or not _is_part(probe, node) or depth > _MAX_NODES:
            return False
        if id(node) in done:
            return True
        if not all(visit(inner, depth + 1) for inner in node.inputs):
            return False
        done.add(id(node))
        ordered.append(node)
        return True

    return ordered if visit(tensor, 0) and ordered else None


def _evaluate(probe: Case, cone: list[gs.Node], source: gs.Tensor, values: np.ndarray, target: gs.Tensor) -> np.ndarray:
    """The cone in float64 (casts are left out, so that half precision does not blur what is read)."""
    known: dict[int, np.ndarray] = {id(source): values}
    for node in cone:
        if node.op in ("Cast", "CastLike"):
            known[id(node.outputs[0])] = known[id(node.inputs[0])]
            continue
        arguments: list[np.ndarray | None] = []
        for item in node.inputs:
            if is_empty(item):
                arguments.append(None)
            elif id(item) in known:
                arguments.append(known[id(item)])
            else:
                value = probe.known(item)
                arguments.append(value.astype(np.float64) if value.dtype.kind == "f" else value)
        kernel = load_op("", node.op, OPSET)(
            to_proto(node), {"log": lambda *_: None, "opsets": {"": OPSET}, "verbose": 0, "new_ops": None}
        )
        for output, value in zip(node.outputs, kernel.run(*arguments), strict=False):
            known[id(output)] = np.asarray(value)
    return known[id(target)]


def _fit(probe: Case, tensor: gs.Tensor, source: gs.Tensor, cone: list[gs.Node], width: int) -> RmsNorm | None:
    """Reads weight and epsilon off large and small inputs, then checks them on ordinary ones."""
    generator = np.random.default_rng(width)
    shape = probe.shape(source)
    noise = generator.uniform(0.5, 1.5, shape) * generator.choice([-1.0, 1.0], shape)
    try:
        large = _evaluate(probe, cone, source, noise * 1e4, tensor)
        small = _evaluate(probe, cone, source, noise * 1e-4, tensor)
        plain = _evaluate(probe, cone, source, noise, tensor)
    except (ValueError, TypeError, RuntimeError, KeyError, NotImplementedError):
        return None
    mean = np.mean(noise**2, axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        weights = (large / noise * np.sqrt(mean)).reshape(-1, width)
        weight = weights[0]
        if not np.isfinite(weights).all() or not np.allclose(weights, weight, rtol=1e-5):
            return None
        usable = np.abs(weight) > 1e-6
        if not usable.any():
            return None
        ratio = (weight * noise * 1e-4 / small)[..., usable]
        epsilon = float(np.median(ratio**2 - mean * 1e-8))
    epsilon = _nearest_constant(probe, cone, epsilon)
    expected = noise / np.sqrt(mean + epsilon) * weight
    if not np.isfinite(epsilon) or epsilon < 0 or not np.allclose(plain, expected, rtol=1e-5, atol=1e-9):
        return None
    expected_small = noise * 1e-4 / np.sqrt(mean * 1e-8 + epsilon) * weight
    return RmsNorm(source, epsilon, weight) if np.allclose(small, expected_small, rtol=1e-4, atol=1e-12) else None


def _fit_layer_norm(
    probe: Case, tensor: gs.Tensor, source: gs.Tensor, cone: list[gs.Node], width: int
) -> LayerNorm | None:
    """As for RMS norms; the bias is what a negated input leaves unchanged."""
    generator = np.random.default_rng(width)
    shape = probe.shape(source)
    noise = generator.normal(size=shape)
    centred = noise - noise.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    try:
        plus, minus, small, plain = (
            _evaluate(probe, cone, source, noise * size, tensor) for size in (1e4, -1e4, 1e-4, 1.0)
        )
    except (ValueError, TypeError, RuntimeError, KeyError, NotImplementedError):
        return None
    with np.errstate(all="ignore"):
        bias = ((plus + minus) / 2).reshape(-1, width)[0]
        weights = ((plus - bias) / centred * np.sqrt(variance)).reshape(-1, width)
        weight = weights[0]
        usable = np.abs(weight) > 1e-6
        if not np.isfinite(weights).all() or not np.allclose(weights, weight, rtol=1e-4, atol=1e-7) or not usable.any():
            return None
        ratio = (weight * centred * 1e-4 / (small - bias))[..., usable]
        epsilon = _nearest_constant(probe, cone, float(np.median(ratio**2 - variance * 1e-8)))
    if not np.isfinite(epsilon) or epsilon < 0:
        return None
    expected = centred / np.sqrt(variance + epsilon) * weight + bias
    return LayerNorm(source, epsilon, weight, bias) if np.allclose(plain, expected, rtol=1e-5, atol=1e-7) else None


def _nearest_constant(probe: Case, cone: list[gs.Node], value: float) -> float:
    """The constant of the cone that a measured epsilon is; the measured value where there is none."""
    for node in cone:
        if "epsilon" in node.attrs and np.isclose(node.attrs["epsilon"], value, rtol=1e-2):
            return float(node.attrs["epsilon"])
        for item in node.inputs:
            if isinstance(item, gs.Constant) and int(np.prod(item.shape, dtype=np.int64)) == 1:
                constant = float(np.asarray(probe.known(item)).reshape(-1)[0])
                if np.isclose(constant, value, rtol=1e-2):
                    return constant
    return value
