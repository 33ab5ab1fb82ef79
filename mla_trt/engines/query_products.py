"""Puts MlaLinear in place of the products that make the queries, in the model that TensorRT's parser gets.

Their weights are the largest before attention: 75 MB in DeepSeek-V3, which a step that decodes reads at the memory's speed at best. TensorRT
10.6's kernels miss that by more than MlaLinear does where many sequences decode (docs/engines.md).
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mla_trt.cuda import Gpu
from mla_trt.ops import OPS, make_node, mla_nodes

LAYERS = ("MlaAttention", "MlaSparseAttention")
LEAST_BYTES = 4 << 20
"""Smaller weights are read faster than a kernel begins."""


def is_faster(gpu: Gpu, plugins: str) -> bool:
    """Whether MlaLinear has a kernel of its own for the GPU; its other one is for want of better.

    Args:
        gpu: that the engine is for.
        plugins: what the plugin library was built from and for, such as "0.1.0 sm_80 sm_90a".
    """
    return gpu.compute_capability == "9.0" and "sm_90a" in plugins.split()


def take_query_products(model: onnx.ModelProto) -> int:
    """Replaces the products, in place; the weights' bytes stay where they are.

    Those of a bf16 matrix of the model, from which a layer's queries come by a Reshape alone. Queries beside an indexer's stay TensorRT's,
    which makes one product of both.

    Args:
        model: a lowered model.

    Returns:
        how many there were.
    """
    graph = _Graph(model.graph)
    for node in mla_nodes(model):
        inputs = OPS[node.op_type].given_inputs(node)
        if node.op_type in LAYERS and "index_query" not in inputs:
            graph.take(inputs["query"])
    graph.rewrite()
    return graph.products


class _Graph:
    """A graph, and the nodes that come in place of others."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.products = 0
        self._graph = graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._producers = {name: node for node in graph.node for name in node.output}
        self._uses = Counter(name for node in graph.node for name in node.input)
        self._uses.update(value.name for value in graph.output)
        self._replaced: dict[int, list[onnx.NodeProto]] = {}

    def take(self, query: str) -> None:
        """Replaces the product that gives `query` as [T, H, M], if it is one that can be."""
        reshape = self._maker(query, "Reshape")
        product = self._maker(reshape.input[0], "MatMul") if reshape else None
        if reshape is None or product is None:
            return
        weight, shape = self._constants.get(product.input[1]), self._constants.get(reshape.input[1])
        if weight is None or shape is None or not _fits(weight, shape):
            return
        rows, sizes = f"{query}/rows", f"{query}/rows.shape"
        by_head = weight  # under its name, where no other reads it: a refitter knows it by that
        if self._uses[weight.name] > 1:
            by_head = self._graph.initializer.add()
            by_head.CopyFrom(weight)
            by_head.name = f"{query}/weight"
            self._uses[weight.name] -= 1
        by_head.dims[:] = [weight.dims[0], *_sizes(shape)[1:]]
        self._graph.initializer.append(numpy_helper.from_array(np.array([-1, weight.dims[0]]), sizes))
        self._replaced[id(product)] = [
            helper.make_node("Reshape", [product.input[0], sizes], [rows], f"{query}/to_rows")
        ]
        self._replaced[id(reshape)] = [
            make_node("MlaLinear", {"x": rows, "weight": by_head.name}, [query], f"{query}/product")
        ]
        self.products += 1

    def rewrite(self) -> None:
        """Puts the new nodes where the others were."""
        nodes = [made for node in self._graph.node for made in self._replaced.get(id(node), [node])]
        del self._graph.node[:]
        self._graph.node.extend(nodes)

    def _maker(self, name: str, op_type: str) -> onnx.NodeProto | None:
        """The node whose result only one other reads, if it is of that type."""
        node = self._producers.get(name)
        return (
            node
            if node is not None and (node.domain, node.op_type) == ("", op_type) and self._uses[name] == 1
            else None
        )


def _sizes(shape: onnx.TensorProto) -> list[int]:
    return [int(size) for size in numpy_helper.to_array(shape)]


def _fits(weight: onnx.TensorProto, shape: onnx.TensorProto) -> bool:
    """Whether the weight is what the kernel for Hopper takes, and worth it; the shape [-1, H, M], so that axes before do not matter."""
    if weight.data_type != TensorProto.BFLOAT16 or len(weight.dims) != 2 or shape.data_location == TensorProto.EXTERNAL:
        return False
    rows, columns = weight.dims
    sizes = _sizes(shape)
    return (
        len(sizes) == 3
        and sizes[0] == -1
        and sizes[1] * sizes[2] == columns
        and rows % 8 == 0
        and columns % 8 == 0
        and 2 * rows * columns >= LEAST_BYTES
    )
