"""Products of data that is quantised as it flows (ONNX Runtime's quantize_dynamic) become products of the numbers that were quantised.

    q, s, z = DynamicQuantizeLinear(x);  Cast(MatMulInteger(q, W, z, w_z)) * (s * w_s)

is the product of x, rounded to 8 bits, and of DequantizeLinear(W, w_s, w_z). The rounding goes, the codes of the weight stay. The scale of the
rounding is that of all tokens which run together, and a lowered model runs other tokens together: it could not repeat it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from mla_trt.passes.graph import (
    Emitter,
    Names,
    constant_value,
    element_count,
    is_empty,
    producer,
    remove_dead_nodes,
)


class _Product(NamedTuple):
    """The MatMulInteger whose result, times scales, a Mul gives."""

    node: gs.Node
    scales: list[gs.Tensor]


def undo_dynamic_quantization(graph: gs.Graph, base_dir: Path | None) -> int:
    """Rewrites such products in place; returns how many there were. Integer products of any other form stay as they are.

    Raises:
        BadModelError: scales or zero points in external data cannot be read.
    """
    emitter = Emitter(graph, Names(graph))
    weights: dict[tuple[int, int], gs.Tensor] = {}
    changed = 0
    for node in [node for node in graph.nodes if node.op == "Mul"]:
        product = _product(node)
        if product is None:
            continue
        operands = _operands(product, emitter, weights, base_dir)
        if operands is not None:
            node.op, node.inputs = "MatMul", operands
            changed += 1
    remove_dead_nodes(graph)
    return changed


def _product(node: gs.Node) -> _Product | None:
    """Reads a Mul as an integer product times two scales, in whatever order they are multiplied."""
    products: list[gs.Node] = []
    scales: list[gs.Tensor] = []
    stack = list(node.inputs)
    while stack and len(scales) <= 2:
        tensor = stack.pop()
        maker = producer(tensor)
        if maker is not None and maker.op == "Mul":
            stack += maker.inputs
        elif maker is not None and maker.op == "Cast" and _is_op(producer(maker.inputs[0]), "MatMulInteger"):
            products.append(producer(maker.inputs[0]))
        else:
            scales.append(tensor)
    return _Product(products[0], scales) if len(products) == 1 and len(scales) == 2 and not stack else None


def _is_op(node: gs.Node | None, op: str) -> bool:
    return node is not None and node.op == op and not node.domain


def _operands(
    product: _Product, emitter: Emitter, weights: dict[tuple[int, int], gs.Tensor], base_dir: Path | None
) -> list[gs.Tensor] | None:
    """What the integers of both operands stand for; None unless each scale belongs to one of them."""
    node, scales = product.node, list(product.scales)
    points = [node.inputs[index] if index < len(node.inputs) else None for index in (2, 3)]
    points = [None if point is None or is_empty(point) else point for point in points]
    found: list[gs.Tensor | None] = [None, None]
    for side, (codes, point) in enumerate(zip(node.inputs[:2], points, strict=True)):
        maker = producer(codes)
        if maker is None or not _is_op(maker, "DynamicQuantizeLinear"):
            continue
        x, (_, scale, zero) = maker.inputs[0], maker.outputs
        if point is not zero or not any(item is scale for item in scales):
            return None
        scales.remove(scale)
        found[side] = x
    if found[0] is None:
        return None
    if found[1] is None:
        found[1] = _weight(node.inputs[1], scales[0], points[1], emitter, weights, base_dir)
    return None if found[1] is None else [found[0], found[1]]


def _weight(
    codes: gs.Tensor,
    scale: gs.Tensor,
    point: gs.Tensor | None,
    emitter: Emitter,
    weights: dict[tuple[int, int], gs.Tensor],
    base_dir: Path | None,
) -> gs.Tensor | None:
    """DequantizeLinear of the codes, int8 or uint8 [..., K, N], with one scale and zero point for all or for each column; None for other scales."""
    constants = [codes, scale] if point is None else [codes, scale, point]
    if not all(isinstance(item, gs.Constant) for item in constants):
        return None
    if not all(_is_by_column(item, codes) for item in constants[1:]):
        return None
    key = id(codes), id(scale)
    if key not in weights:
        factors = [constant_value(item, base_dir).reshape(-1) for item in constants[1:]]
        size = max(len(item) for item in factors)
        shaped = [np.broadcast_to(item, size) if size > 1 else item.reshape(()) for item in factors]
        stored = [
            emitter.constant(f"{codes.name}.{label}", item)
            for label, item in zip(("scale", "point"), shaped, strict=False)
        ]
        axis: dict[str, Any] = {"axis": len(codes.shape) - 1} if size > 1 else {}
        made = emitter.node(
            "DequantizeLinear", [codes, *stored], f"{codes.name}.dequantized", dtype=scale.dtype, **axis
        )
        made.shape = codes.shape
        weights[key] = made
    return weights[key]


def _is_by_column(factor: gs.Constant, codes: gs.Constant) -> bool:
    """Whether a scale or zero point is one for all codes [..., K, N] or one for each column, and adds no axes to a product."""
    count = element_count(factor)
    return len(factor.shape) <= len(codes.shape) and (count == 1 or count == codes.shape[-1] == factor.shape[-1])
