"""A lowered model as `mla_trt.passes.norms` reads it: shapes from inference, values from the initializers."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper

from mla_trt.loading import ModelOnDisk
from mla_trt.ops import infer_shapes, mla_nodes
from mla_trt.passes.probe import widen

SOME = 2
"""What a size counts as that is not fixed."""


class StaticProbe:
    """Shapes and constants of a model as it is now; what is changed in it later does not show.

    Args:
        model: the model, and where its weights are.
    """

    def __init__(self, model: ModelOnDisk) -> None:
        self._model = model
        self._constants = {tensor.name: tensor for tensor in model.proto.graph.initializer}
        graph = onnx.shape_inference.infer_shapes(_told(model.proto)).graph
        values = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}
        self._dtypes = {name: kind.elem_type for name, kind in values.items()}
        self._dims = {
            name: tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
            for name, kind in values.items()
            if kind.HasField("shape")
        }

    @cached_property
    def _tensors(self) -> dict[str, gs.Tensor]:
        tensors: dict[str, gs.Tensor] = gs.import_onnx(self._model.proto).tensors()
        return tensors

    def dims(self, name: str) -> tuple[int | None, ...] | None:
        """The sizes of a tensor, None where one is not fixed; None where not even their number is known."""
        return self._dims.get(name)

    def dtype(self, name: str) -> int | None:
        """The ONNX type of a tensor that is made of the model's inputs; what comes of ops may be said to be float32. None where nothing is
        known of it."""
        return self._dtypes.get(name)

    def array(self, name: str) -> np.ndarray | None:
        """A constant's values, read anew each time; None for what is none."""
        if name not in self._constants:
            return None
        tensor = TensorProto()
        tensor.CopyFrom(self._constants[name])  # older ONNX keeps in it what it reads from a file
        return numpy_helper.to_array(tensor, str(self._model.folder_of(tensor) or ""))

    def tensor(self, name: str) -> gs.Tensor:
        """A tensor in the graph that `mla_trt.passes` reads."""
        return self._tensors[name]

    def shape(self, tensor: gs.Tensor) -> tuple[int, ...]:
        """The shape of a tensor; () where it is not known."""
        return tuple(SOME if size is None else size for size in self._dims.get(tensor.name, ()))

    def is_known(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is a constant."""
        return tensor.name in self._constants

    def known(self, tensor: gs.Tensor) -> np.ndarray:
        """A constant's values, in a type that numpy has."""
        values = self.array(tensor.name)
        assert values is not None
        return widen(values)

    def is_transparent(self, node: gs.Node) -> bool:
        """Norms in lowered models have no nodes but their own."""
        return False


def _told(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that says which shapes the results of the op set have, which ONNX does not know. Their types are as they come: nothing here needs
    them, and the graph's outputs have none that could contradict them."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.functions[:]
    for value in copy.graph.output:
        value.type.tensor_type.elem_type = TensorProto.UNDEFINED
    for node in mla_nodes(copy):
        for name, result in zip(node.output, infer_shapes(node, [None] * len(node.input)), strict=True):
            sizes = [size if isinstance(size, int) else None for size in result.shape]
            if name:
                copy.graph.value_info.append(helper.make_tensor_value_info(name, result.dtype, sizes))
    return copy
