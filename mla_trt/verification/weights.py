"""Are the attention layers of a model with quantised weights those of the model with weights as exported?

Sessions judge the latter; of the former they only show that quantisation costs something, which does not tell a wrong
weight from a rough one. So the two are compared node by node.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from mla_trt.loading import ModelOnDisk
from mla_trt.ops import DOMAIN, OPS

LAYER_OPS = ("MlaAttention", "MlaSparseAttention")
PAGES = {"row_format", "index_format", "page_size", "kv_scale"}
SCALES = {"w_uk_scale", "w_uv_scale"}
BLOCK = 128
E4M3_ERROR = 1 / 16  # of a value, to the nearest
E4M3_LEAST = 2.0**-10  # half of the smallest code
ROUNDING = 1e-5  # scales are float32


def compare_attentions(exact: ModelOnDisk, written: ModelOnDisk) -> list[str]:
    """What differs between the attention layers of two lowered models, one line each.

    Pages may differ, and weights by what e4m3 costs.

    Args:
        exact: with weights as exported.
        written: with weights that may be quantised.
    """
    layers, others = _attentions(exact.proto), _attentions(written.proto)
    if layers.keys() != others.keys():
        return ["the model has other attention layers than the one with weights as exported"]
    failures = []
    weights, other_weights = _Weights(exact), _Weights(written)
    for cache, node in layers.items():
        other = others[cache]
        label = f"{other.op_type} '{other.name}'"
        given, found = OPS[node.op_type].given_inputs(node), OPS[other.op_type].given_inputs(other)
        if (
            node.op_type != other.op_type
            or _facts(node) != _facts(other)
            or given.keys() - SCALES != found.keys() - SCALES
        ):
            failures.append(f"{label} has other attributes or inputs than with weights as exported")
            continue
        for formal in given.keys() - SCALES:
            scale = f"{formal}_scale"
            if not _alike(
                weights.read(given[formal], given.get(scale)), other_weights.read(found[formal], found.get(scale))
            ):
                failures.append(f"'{formal}' of {label} differs from the weights as exported")
    return failures


def has_quantised_weights(model: onnx.ModelProto) -> bool:
    """Whether the W_UK or W_UV of a lowered model are e4m3 with scales."""
    return any(SCALES & OPS[node.op_type].given_inputs(node).keys() for node in _attentions(model).values())


def _attentions(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The attention layers, by the name of their cache."""
    return {
        OPS[node.op_type].given_inputs(node)["kv_cache"]: node
        for node in model.graph.node
        if node.domain == DOMAIN and node.op_type in LAYER_OPS
    }


def _facts(node: onnx.NodeProto) -> dict[str, object]:
    return {name: value for name, value in OPS[node.op_type].node_attributes(node).items() if name not in PAGES}


class _Weights:
    """The constants of a model, read one at a time."""

    def __init__(self, model: ModelOnDisk) -> None:
        self._model = model
        self._tensors = {tensor.name: tensor for tensor in model.proto.graph.initializer}

    def read(self, name: str, scale: str | None) -> tuple[np.ndarray, np.ndarray] | None:
        """A constant in float64 and the largest error that its type makes of each value; None where it is no constant."""
        if name not in self._tensors:
            return None
        values = self._array(name)
        if scale is None or scale not in self._tensors:
            return values, np.zeros(())
        factors = self._array(scale)
        for axis in (-2, -1):
            factors = np.repeat(factors, BLOCK, axis).take(range(values.shape[axis]), axis)
        return values * factors, factors * np.maximum(np.abs(values) * E4M3_ERROR, E4M3_LEAST)

    def _array(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        return numpy_helper.to_array(tensor, str(self._model.folder_of(tensor) or "")).astype(np.float64)


def _alike(expected: tuple[np.ndarray, np.ndarray] | None, actual: tuple[np.ndarray, np.ndarray] | None) -> bool:
    if expected is None or actual is None:
        return expected is actual
    if expected[0].shape != actual[0].shape:
        return False
    return bool((np.abs(expected[0] - actual[0]) <= (expected[1] + actual[1]) * (1 + ROUNDING)).all())
