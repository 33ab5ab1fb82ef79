"""What a model computes from constants alone: weights that are dequantised, transposed or cut before they are multiplied with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from mla_trt.float32 import to_float32
from mla_trt.loading import ModelOnDisk, external_file, is_small, load_tensor

DECODES = {
    *("Add", "Cast", "Concat", "Constant", "ConstantOfShape", "DequantizeLinear", "Div", "Expand", "Flatten", "Gather"),
    *(
        "Identity",
        "Mul",
        "Neg",
        "Reshape",
        "Shape",
        "Slice",
        "Split",
        "Squeeze",
        "Sub",
        "Tile",
        "Transpose",
        "Unsqueeze",
    ),
}
"""What makes weights of codes, scales and zero points, and moves them about."""


class ConstantValues:
    """The constant tensors of a graph as it is now.

    Args:
        model: the model, and where its weights are.
        makers: the node that makes each tensor.
    """

    def __init__(self, model: ModelOnDisk, makers: Mapping[str, onnx.NodeProto]) -> None:
        self._model = model
        self._makers = makers
        self._initializers = {tensor.name for tensor in model.proto.graph.initializer}
        self._constant: dict[str, bool] = {}
        self._last: tuple[str, np.ndarray] | None = None

    def __contains__(self, name: str) -> bool:
        """Whether a tensor is an initializer, or made of such alone as weights are."""
        waiting = [name]
        while waiting:
            tensor = waiting[-1]
            if tensor not in self._constant:
                node = self._makers.get(tensor)
                if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in DECODES:
                    self._constant[tensor] = tensor in self._initializers
                else:
                    given = [read for read in node.input if read]
                    unknown = [read for read in given if read not in self._constant]
                    if unknown:
                        waiting += unknown
                        continue
                    self._constant[tensor] = all(self._constant[read] for read in given)
            waiting.pop()
        return self._constant[name]

    @cached_property
    def types(self) -> dict[str, int]:
        """The element types of those that nodes make, where ONNX can tell."""
        graph = self._model.proto.graph
        nodes = [node for node in graph.node if all(name in self for name in node.output)]
        read = {name for node in nodes for name in node.input}
        small, large = [], []
        for tensor in graph.initializer:
            if tensor.name in read and is_small(tensor):
                small.append(self._loaded(tensor))
            elif tensor.name in read:
                large.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        part = self._part(nodes, large, [], small)
        inferred = onnx.shape_inference.infer_shapes(part).graph
        return {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}

    def array(self, name: str) -> np.ndarray:
        """A constant's values, half precision as float32: not rounded where the graph only rounds in between. The last one is kept."""
        if self._last is None or self._last[0] != name:
            self._last = name, self._compute(name)
        return self._last[1]

    def _compute(self, name: str) -> np.ndarray:
        needed, waiting = {name}, [name]
        while waiting:
            node = self._makers.get(waiting.pop())
            new = {read for read in node.input if read} - needed if node is not None else set()
            needed |= new
            waiting += new
        graph = self._model.proto.graph
        nodes = [node for node in graph.node if needed.intersection(node.output)]
        given = [self._loaded(tensor) for tensor in graph.initializer if tensor.name in needed]
        result = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        (values,) = ReferenceEvaluator(to_float32(self._part(nodes, [], [result], given))).run(None, {})
        return np.asarray(values, np.float32)

    def _part(
        self,
        nodes: Sequence[onnx.NodeProto],
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        initializers: Sequence[TensorProto],
    ) -> onnx.ModelProto:
        opsets = [entry for entry in self._model.proto.opset_import if entry.domain in ("", "ai.onnx")]
        return helper.make_model(
            helper.make_graph(nodes, "constants", inputs, outputs, initializers), opset_imports=opsets
        )

    def _loaded(self, tensor: TensorProto) -> TensorProto:
        copy = TensorProto()
        copy.CopyFrom(tensor)
        folder = self._model.folder_of(copy)
        if external_file(copy) is not None and folder is not None:
            load_tensor(copy, folder)
        return copy
