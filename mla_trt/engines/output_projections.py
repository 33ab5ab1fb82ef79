"""Puts MlaOutputProjection in place of the products with what attention gives, in the model that TensorRT's parser gets, to read their weights as
codes (`mla_trt.engines.coded_weights`). In bf16 TensorRT's own kernels stay.

They are the largest of a layer: in DeepSeek-V3 235 MB."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mla_trt.engines.coded_weights import coded_weight
from mla_trt.engines.input_projections import LAYERS, LEAST_BYTES
from mla_trt.engines.unused import remove_unused
from mla_trt.engines.weight_products import RESHAPES, Product, WeightProducts
from mla_trt.loading import ModelOnDisk
from mla_trt.ops import OPS, make_node, mla_nodes
from mla_trt.ops.projection_weights import scale_of
from mla_trt.weight_file import WeightFile


def take_output_projections(model: ModelOnDisk, weight_file: WeightFile | None = None) -> int:
    """Replaces the products, in place; their results keep their names and shapes, so that whatever reads them does not change.

    A product is taken whose rows are a layer's outputs, or these times gates, all heads of a token in each, if its weight is a whole bf16 matrix
    of the model that can become codes.

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
        rows = self._found.rows(node.input[0], any_width=True)  # reshapes leave the numbers in their order
        attended = self._behind(node.input[0])
        product = self._found.of_rows(node.output[0]) if attended is not None else None
        if attended is None or product is None or 2 * product.weight.rows * product.columns < LEAST_BYTES:
            return []
        heads = [size for size in (self._found.probe.dims(attended) or ())[1:] if size is not None]
        if math.prod(heads) != product.weight.rows:
            return []
        if rows == attended:
            return self._nodes(attended, heads, product)
        gated, shape = f"{node.output[0]}/attended", f"{node.output[0]}/attended.shape"
        made = self._nodes(gated, heads, product)
        if made:
            self._graph.initializer.append(numpy_helper.from_array(np.array([-1, *heads]), shape))
            made.insert(0, helper.make_node("Reshape", [node.input[0], shape], [gated], f"{node.output[0]}/to_heads"))
        return made

    def write(self, made: list[list[onnx.NodeProto]]) -> None:
        """Puts the new nodes into the graph; what makes nothing any more goes."""
        nodes = [new for node, instead in zip(self._graph.node, made, strict=True) for new in instead or [node]]
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        remove_unused(self._graph)

    def _behind(self, tensor: str, gates: int = 1) -> str | None:
        """The layer's output that a tensor comes of by what moves or casts it, and by so many products with gates."""
        while tensor not in self._attended:
            node = self._found.makers.get(tensor)
            if node is not None and node.op_type == "Mul" and gates > 0:
                factors = (self._behind(name, gates - 1) for name in node.input)
                return next((name for name in factors if name is not None), None)
            if node is None or node.op_type not in (*RESHAPES, "Cast"):
                return None
            tensor = node.input[0]
        return tensor

    def _nodes(self, attended: str, heads: list[int], product: Product) -> list[onnx.NodeProto]:
        """The op, and a Reshape to what its rows were."""
        result = product.node.output[0]
        made = coded_weight(self._found, product, f"{result}/weight", self._file)
        if made is None:
            return []
        codes, scales = made
        codes.dims[:] = [*heads, product.columns]
        self._graph.initializer.extend(made)
        dims = self._found.probe.dims(result)
        rows = result if dims is not None and len(dims) == 2 else f"{result}/rows"
        given = {"attended": attended, "w_o": codes.name, scale_of("w_o"): scales.name}
        op = make_node("MlaOutputProjection", given, {"hidden": rows}, f"{result}/projection")
        return [op] if rows == result else [op, *self._reshape(rows, product, dims)]

    def _reshape(self, rows: str, product: Product, dims: Sequence[int | None] | None) -> list[onnx.NodeProto]:
        """What gives rows the axes that a product's result had. Where more than one is not fixed, they are those that its rows had before."""
        result, shape = product.node.output[0], f"{rows}.shape"
        reshape = helper.make_node("Reshape", [rows, shape], [result], f"{result}/from_rows")
        if dims is not None and dims.count(None) <= 1:
            sizes = np.array([-1 if size is None else size for size in dims])
            self._graph.initializer.append(numpy_helper.from_array(sizes, shape))
            return [reshape]
        axes, columns = f"{rows}.axes", f"{rows}.columns"
        self._graph.initializer.append(numpy_helper.from_array(np.array([product.columns]), columns))
        return [
            helper.make_node("Shape", [product.node.input[0]], [axes], f"{result}/axes", start=0, end=-1),
            helper.make_node("Concat", [axes, columns], [shape], f"{result}/shape", axis=0),
            reshape,
        ]
