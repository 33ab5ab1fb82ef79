"""Puts MlaInputProjections in place of the products that make a layer's inputs, in the model that TensorRT's parser gets.

Their weights are the largest before attention: in DeepSeek-V3 75 MB for the queries alone, which a step that decodes reads at the memory's
speed at best. TensorRT 10.6's kernels miss that by more than ours do where many sequences decode (docs/engines.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mla_trt.cuda import Gpu
from mla_trt.engines.coded_weights import coded_weight
from mla_trt.engines.unused import remove_unused
from mla_trt.engines.weight_products import Product, WeightProducts
from mla_trt.loading import ModelOnDisk
from mla_trt.ops import OPS, make_node, mla_nodes
from mla_trt.ops.input_projections import CODED, FROM_LATENT, OUTPUT_OF
from mla_trt.ops.projection_weights import scale_of
from mla_trt.weight_file import WeightFile, beside

LAYERS = ("MlaAttention", "MlaSparseAttention")
LEAST_BYTES = 4 << 20
"""Smaller weights of the queries are read faster than a kernel begins."""
WEIGHT_OF = {"query": "w_uq", **{output: weight for weight, output in OUTPUT_OF.items()}}
"""What a layer reads: the weight that makes it."""


def is_faster(gpu: Gpu, plugins: str) -> bool:
    """Whether MlaInputProjections has a kernel of its own for the GPU; its other one is for want of better.

    Args:
        gpu: that the engine is for.
        plugins: what the plugin library was built from and for, such as "0.1.0 sm_80 sm_90a".
    """
    return gpu.compute_capability == "9.0" and "sm_90a" in plugins.split()


def take_input_projections(model: ModelOnDisk, weight_file: WeightFile | None = None, *, coded: bool = False) -> int:
    """Replaces the products, in place. Weights of which all columns are used stay where they are, unless they become codes.

    A layer has its queries' product taken or none: one with a bf16 matrix of the model, from which they come by a Reshape alone. With it go
    the query's latent (its product and RMS norm), the products that make the latent and the rope key of the same hidden states, and those
    that make an indexer's inputs, each if nothing else needs what it makes.

    Args:
        model: a lowered model, and where its weights are.
        weight_file: where columns and codes of external weights go, one weight at a time. None: into the model.
        coded: make e4m3 codes of the weights that the op takes as such (`mla_trt.engines.coded_weights`): half the bytes, and less exact.

    Returns:
        in how many layers.
    """
    layers = [node for node in mla_nodes(model.proto) if node.op_type in LAYERS]
    changes = _Changes(model, weight_file, coded)
    taken = sum(changes.take(OPS[node.op_type].given_inputs(node)) for node in layers)
    if taken:
        changes.write()
    return taken


class _Changes:
    """A graph, and the nodes that come in place of others."""

    def __init__(self, model: ModelOnDisk, weight_file: WeightFile | None, coded: bool) -> None:
        self._graph = model.proto.graph
        self._file = weight_file
        self._coded = coded
        self._found = WeightProducts(model)
        self._added: dict[int, list[onnx.NodeProto]] = {}  # by the id of the node that they follow; 0: none

    def take(self, inputs: Mapping[str, str]) -> bool:
        """Replaces the products that give these inputs of a layer; returns whether it did."""
        query = self._match("query", inputs["query"])
        if query is None or 2 * query.weight.rows * query.columns < LEAST_BYTES:
            return False
        latent = self._found.source(query)
        for down in (self._found.normed(latent), None):  # without, where others read the latent
            hidden = latent if down is None else self._found.source(down)
            products = self._products(inputs, hidden, latent)
            gone = self._found.without(inputs[name] for name in products)
            if down is None or id(down.node) in gone:
                break
        if "query" not in products:
            return False
        self._put(inputs, hidden, down, products)
        return True

    def write(self) -> None:
        """Puts the new nodes into the graph; what makes nothing any more goes."""
        made = {name for nodes in self._added.values() for node in nodes for name in node.output}
        nodes = list(self._added.get(0, []))
        for node in self._graph.node:
            for place, name in enumerate(node.output):
                if name in made:
                    node.output[place] = f"{name}/before"
            nodes += [node, *self._added.get(id(node), [])]
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        remove_unused(self._graph)

    def _match(self, name: str, tensor: str) -> Product | None:
        """The product that makes an input of a layer, which only the layer reads."""
        if self._found.uses[tensor] != 1:
            return None
        if name in ("query", "index_query"):
            return self._found.by_head(tensor)
        return self._found.scaled(tensor) if name == "index_weights" else self._found.of_rows(tensor)

    def _products(self, inputs: Mapping[str, str], hidden: str, latent: str) -> dict[str, Product]:
        """The products that one node can make in place of theirs, by what they give."""
        found = {}
        for name, weight in WEIGHT_OF.items():
            product = self._match(name, inputs[name]) if name in inputs else None
            if product is not None and self._found.source(product) == (latent if weight in FROM_LATENT else hidden):
                found[name] = product
        while True:  # one that stays may keep another: that of the latent and the rope key is one node
            gone = self._found.without(inputs[name] for name in found)
            left = {name: product for name, product in found.items() if id(product.node) in gone}
            if len(left) == len(found):
                return found
            found = left

    def _put(self, inputs: Mapping[str, str], hidden: str, down: Product | None, products: dict[str, Product]) -> None:
        """Adds the node behind the one that makes the hidden states: before all that read its results."""
        query = inputs["query"]
        weights: dict[str, str] = {}
        epsilon = {}
        if down is not None and down.norm is not None:
            weights |= self._weights("w_dq", down, f"{query}/latent_weight")
            weights["query_norm_weight"] = self._bfloat16(f"{query}/norm_weight", down.norm.weight)
            epsilon["epsilon"] = down.norm.epsilon
        for name, product in products.items():
            weights |= self._weights(WEIGHT_OF[name], product, f"{inputs[name]}/weight")
            if product.factor is not None:
                factor = np.broadcast_to(product.factor, product.sizes)
                weights["index_weights_factor"] = self._bfloat16(f"{inputs[name]}/factor", factor)
        maker = self._found.makers.get(hidden)
        added = self._added.setdefault(0 if maker is None else id(maker), [])
        rows = hidden
        if len(self._found.probe.dims(hidden) or ()) != 2:
            rows, shape = f"{query}/rows", f"{query}/rows.shape"
            columns = (down or products["query"]).weight.rows
            self._graph.initializer.append(numpy_helper.from_array(np.array([-1, columns]), shape))
            added.append(helper.make_node("Reshape", [hidden, shape], [rows], f"{query}/to_rows"))
        outputs = {name: inputs[name] for name in products}
        given = {"hidden": rows, **weights}
        added.append(make_node("MlaInputProjections", given, outputs, f"{query}/projections", **epsilon))

    def _bfloat16(self, name: str, values: np.ndarray) -> str:
        self._graph.initializer.append(numpy_helper.from_array(values.astype(ml_dtypes.bfloat16), name))
        return name

    def _weights(self, formal: str, product: Product, name: str) -> dict[str, str]:
        """An input of the node, and that of its scales where it is codes."""
        made = coded_weight(self._found, product, name, self._file) if self._coded and formal in CODED else None
        if made is None:
            return {formal: self._weight(product, name)}
        codes, scales = made
        codes.dims[:] = [product.weight.rows, *product.sizes]
        self._graph.initializer.extend(made)
        return {formal: codes.name, scale_of(formal): scales.name}

    def _weight(self, product: Product, name: str) -> str:
        """The product's weight, with the axes of its result: the model's own, where that changes it for no other."""
        tensor, rows = product.weight.tensor, product.weight.rows
        as_it_lies = not product.weight.transposed and product.columns == product.weight.columns
        if as_it_lies and (len(product.sizes) == 1 or self._found.uses[tensor.name] == 1):
            tensor.dims[:] = [rows, *product.sizes]  # under its name: a refitter knows it by that
            return tensor.name
        if as_it_lies:
            made = TensorProto()
            made.CopyFrom(tensor)
            made.name = name
        else:
            made = beside(tensor, name, self._found.values(product), self._file)
        made.dims[:] = [rows, *product.sizes]
        self._graph.initializer.append(made)
        return name
