"""Finds the products with bf16 weights that make the tensors of a lowered model, through what only moves their results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from mla_trt.engines.static_probe import StaticProbe
from mla_trt.engines.unused import reads
from mla_trt.loading import ModelOnDisk
from mla_trt.passes.norms import RmsNorm, recognise_rms_norm

MULTIPLE = 8
"""Of which the kernel for Hopper takes the sizes of its weights."""
RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")


@dataclass(frozen=True)
class Weight:
    """A matrix in bf16 that a product reads.

    Attributes:
        tensor: the model's.
        transposed: whether the product reads its columns as rows.
    """

    tensor: TensorProto
    transposed: bool

    @property
    def rows(self) -> int:
        """Of what the product reads."""
        return int(self.tensor.dims[1 if self.transposed else 0])

    @property
    def columns(self) -> int:
        """Of what the product reads."""
        return int(self.tensor.dims[0 if self.transposed else 1])


@dataclass(frozen=True)
class Product:
    """A product with columns of a weight.

    Attributes:
        node: the MatMul or Gemm.
        weight: of which it reads columns.
        start: the first of the columns.
        sizes: (columns,), or (heads, width).
        factor: what the result is multiplied by, float64, one number or one for each column; None: nothing.
        norm: of the result.
    """

    node: onnx.NodeProto
    weight: Weight
    start: int
    sizes: tuple[int, ...]
    factor: np.ndarray | None = None
    norm: RmsNorm | None = None

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return math.prod(self.sizes)


class WeightProducts:
    """The products of a model as it is now.

    Args:
        model: a lowered model.
    """

    def __init__(self, model: ModelOnDisk) -> None:
        graph = model.proto.graph
        self.probe = StaticProbe(model)
        self.makers = {name: node for node in graph.node for name in node.output if name}
        self.uses = Counter(reads(graph))
        self._weights = {tensor.name: tensor for tensor in graph.initializer}

    def of_rows(self, tensor: str) -> Product | None:
        """The product of which a tensor has columns, in rows as they come."""
        columns = self.width(tensor)
        source, start = self.columns(tensor)
        node = self.makers.get(source)
        if columns is None or columns % MULTIPLE != 0 or node is None or node.op_type not in ("MatMul", "Gemm"):
            return None
        weight = self._weight(node)
        return Product(node, weight, start, (columns,)) if weight else None

    def columns(self, tensor: str) -> tuple[str, int]:
        """The tensor of which a tensor has columns, in rows as they come, and the first of them."""
        start = 0
        while (node := self.makers.get(tensor)) is not None and (first := self._first_column(node, tensor)) is not None:
            start, tensor = start + first, node.input[0]
        return tensor, start

    def by_head(self, tensor: str) -> Product | None:
        """The product that makes a tensor [T, H, M] by a Reshape to [-1, H, M], so that axes before do not matter."""
        node = self.makers.get(tensor)
        shape = self.probe.array(node.input[1]) if node is not None and node.op_type == "Reshape" else None
        if node is None or shape is None or len(shape) != 3 or shape[0] != -1:
            return None
        sizes = int(shape[1]), int(shape[2])
        product = self.of_rows(self.rows(node.input[0], any_width=True))
        return replace(product, sizes=sizes) if product is not None and product.columns == math.prod(sizes) else None

    def scaled(self, tensor: str) -> Product | None:
        """The product that makes a tensor in f32 which is multiplied by constants, in any order, that are one in bf16."""
        factor, columns = np.ones(1), self.width(tensor)
        while (node := self.makers.get(tensor)) is not None:
            if node.op_type == "Cast" and helper.get_node_attr_value(node, "to") == TensorProto.FLOAT:
                tensor = node.input[0]
            elif node.op_type == "Mul":
                constant = 0 if node.input[0] in self._weights else 1
                values = self.probe.array(node.input[constant])
                one_each = values is not None and (values.size, values.shape[-1:]) == (columns, (columns,))
                if values is None or not (one_each or values.size == 1):
                    return None
                factor = factor * values.astype(np.float64).reshape(-1)
                tensor = node.input[1 - constant]
            elif (moved := self.rows(tensor)) != tensor:
                tensor = moved
            else:
                break
        product = self.of_rows(tensor)
        if product is None or (factor.astype(ml_dtypes.bfloat16) != factor).any():
            return None
        return product if (factor == 1).all() else replace(product, factor=factor)

    def normed(self, tensor: str) -> Product | None:
        """The product of which a tensor is the RMS norm."""
        norm = recognise_rms_norm(self.probe, self.probe.tensor(tensor))
        product = self.of_rows(norm.source.name) if norm is not None else None
        return replace(product, norm=norm) if product is not None else None

    def rows(self, tensor: str, any_width: bool = False) -> str:
        """The tensor that a tensor is but for other axes before the last; with `any_width`, for any axes."""
        while (node := self.makers.get(tensor)) is not None and node.op_type in RESHAPES:
            if not any_width and self._first_column(node, tensor) is None:
                break
            tensor = node.input[0]
        return tensor

    def source(self, product: Product) -> str:
        """What a product multiplies, whatever axes are before its last."""
        return self.rows(product.node.input[0])

    def width(self, tensor: str) -> int | None:
        """The size of the last axis."""
        dims = self.probe.dims(tensor)
        return dims[-1] if dims else None

    def values(self, product: Product) -> np.ndarray:
        """The columns of its weight, bf16 [rows, columns]."""
        values = self.probe.array(product.weight.tensor.name)
        assert values is not None
        return (values.T if product.weight.transposed else values)[:, product.start : product.start + product.columns]

    def without(self, outputs: Iterable[str]) -> set[int]:
        """The ids of the nodes that make nothing any more once the outputs come from nowhere."""
        left = dict.fromkeys(outputs, 0)
        waiting, gone = list(left), set()
        while waiting:
            node = self.makers.get(waiting.pop())
            if node is None or id(node) in gone or any(left.get(name, self.uses[name]) for name in node.output):
                continue
            gone.add(id(node))
            for name in node.input:
                left[name] = left.get(name, self.uses[name]) - 1
                waiting.append(name)
        return gone

    def _weight(self, node: onnx.NodeProto) -> Weight | None:
        """What a MatMul or Gemm multiplies with, and nothing else; None where the kernel for Hopper does not take it."""
        transposed = False
        if node.op_type == "Gemm":
            given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
            if given.get("transA", 0) or given.get("alpha", 1.0) != 1.0 or any(node.input[2:]):
                return None
            transposed = bool(given.get("transB", 0))
        tensor = self._weights.get(node.input[1])
        if tensor is None or tensor.data_type != TensorProto.BFLOAT16 or len(tensor.dims) != 2:
            return None
        weight = Weight(tensor, transposed)
        return weight if weight.rows % MULTIPLE == 0 else None

    def _first_column(self, node: onnx.NodeProto, result: str) -> int | None:
        """Where in the last axis of its input the result of a node begins; None for other nodes than Slice, Split and what only changes the
        axes before."""
        whole, dims = self.width(node.input[0]), self.probe.dims(result)
        if whole is None or not dims:
            return None
        if node.op_type in RESHAPES:
            return 0 if dims[-1] == whole else None
        if node.op_type == "Split":
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            before = [self.width(name) for name in node.output[: list(node.output).index(result)]]
            known = [width for width in before if width is not None]
            return sum(known) if axis % len(dims) == len(dims) - 1 and len(known) == len(before) else None
        if node.op_type == "Slice":
            read = [self.probe.array(name) for name in node.input[1:]]
            given = [int(array[0]) for array in read if array is not None and array.size == 1]
            if len(given) < max(len(read), 3) or given[3:] not in ([], [1]) or given[2] % len(dims) != len(dims) - 1:
                return None
            return given[0] if given[0] >= 0 else max(given[0] + whole, 0)
        return None
