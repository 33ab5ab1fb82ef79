"""Puts MlaOutputProjection in place of the products with what attention gives, in the model that TensorRT's parser gets, to read their weights as
codes (`mla_trt.engines.coded_weights`). In bf16 TensorRT's own kernels stay.

They are the largest of a layer: in DeepSeek-V3 235 MB."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mla_trt.engines.coded_weights import coded_weight
from mla_trt.engines.input_projections import LAYERS, LEAST_BYTES
from mla_trt.engines.unused import remove_unused
from mla_trt.engines.weight_products import Product, WeightProducts
from mla_trt.loading import ModelOnDisk
from mla_trt.ops import OPS, make_node, mla_nodes
from mla_trt.ops.projection_weights import scale_of
from mla_trt.weight_file import WeightFile


def take_output_projections(model: ModelOnDisk, weight_file: WeightFile | None = None) -> int:
    """Replaces the products, in place; their results keep their names and shapes, so that whatever reads them does not change.

    A product is taken whose rows are a layer's outputs, all heads of a token in each, if its weight is a whole bf16 matrix of the model that can
    become codes, and at most one axis of its result is not fixed.

    Args:
        model: a lowered model, and where its weights are.
        weight_file: where the codes of external weights go, one weight at a time. None: into the model.

    Returns:
        how many were taken.
    """
    changes = _Changes(model, weight_file)
    made = [changes.replacement(node) for node in model.proto.graph.node]
    if any(made):
        changes.write(made)
    return sum(bool(nodes) for nodes in made)


class _Changes:
    """A graph, and the nodes that come in place of others."""

    def __init__(self, model: ModelOnDisk, weight_file: WeightFile | None) -> None:
        self._graph = model.proto.graph
        self._file = weight_file
        self._found = WeightProducts(model)
        layers = [node for node in mla_nodes(model.proto) if node.op_type in LAYERS]
        self._attended = {OPS[node.op_type].given_outputs(node)["output"] for node in layers}

    def replacement(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """What comes in place of a node; nothing: it stays."""
        if node.op_type not in ("MatMul", "Gemm"):
            return []
        attended = self._found.rows(node.input[0], any_width=True)  # reshapes leave the numbers in their order
        product = self._found.of_rows(node.output[0]) if attended in self._attended else None
        if product is None or 2 * product.weight.rows * product.columns < LEAST_BYTES:
            return []
        sizes, shape = self._found.probe.dims(attended) or (), self._shape(product)
        heads = [size for size in sizes[1:] if size is not None]
        if math.prod(heads) != product.weight.rows or shape is None:
            return []
        return self._nodes(attended, heads, product, shape)

    def write(self, made: list[list[onnx.NodeProto]]) -> None:
        """Puts the new nodes into the graph; what makes nothing any more goes."""
        nodes = [new for node, instead in zip(self._graph.node, made, strict=True) for new in instead or [node]]
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        remove_unused(self._graph)

    def _shape(self, product: Product) -> list[int] | None:
        """Of a product's result, -1 for an axis that is not fixed; None where more are not."""
        dims = self._found.probe.dims(product.node.output[0]) or ()
        return None if dims.count(None) > 1 else [-1 if size is None else size for size in dims]

    def _nodes(self, attended: str, heads: list[int], product: Product, shape: list[int]) -> list[onnx.NodeProto]:
        """The op, and a Reshape to what its rows were."""
        result = product.node.output[0]
        made = coded_weight(self._found, product, f"{result}/weight", self._file)
        if made is None:
            return []
        codes, scales = made
        codes.dims[:] = [*heads, product.columns]
        self._graph.initializer.extend(made)
        rows = result if len(shape) == 2 else f"{result}/rows"
        given = {"attended": attended, "w_o": codes.name, scale_of("w_o"): scales.name}
        nodes = [make_node("MlaOutputProjection", given, {"hidden": rows}, f"{result}/projection")]
        if rows != result:
            self._graph.initializer.append(numpy_helper.from_array(np.array(shape), f"{rows}.shape"))
            nodes.append(helper.make_node("Reshape", [rows, f"{rows}.shape"], [result], f"{result}/from_rows"))
        return nodes
