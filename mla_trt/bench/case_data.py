"""The tensors of a case of `mla-trt bench kernels` on the GPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from mla_trt.bench.cases import Case, Content, Pool, Random
from mla_trt.cuda import Memory, Stream
from mla_trt.formats import IndexLayout, KvLayout, PageLayout
from mla_trt.ops import OPS, TensorType, infer_shapes, make_node
from mla_trt.plugins.kernel_library import Call, DeviceTensor, KernelLibrary

Array = npt.NDArray[Any]

DISTINCT = (
    1_000_003  # normal values that are drawn; a prime, so that their repetition has no period in common with shapes
)
DISTINCT_PAGES = 61

PLACES = {"kv_cache", "indexer_cache"}


class CaseData:
    """One set of a case's tensors on the GPU, and the call over them."""

    def __init__(self, library: KernelLibrary, case: Case, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.memory: dict[str, Memory] = {}
        self.kinds = {name: kind_of(content) for name, content in case.inputs.items()}
        for name, content in case.inputs.items():
            self.memory[name] = filled(rng, content)
        op = OPS[case.op_type]
        outputs = {output.name: f"{output.name}_result" for output in op.outputs}
        node = make_node(case.op_type, {name: name for name in case.inputs}, outputs, **case.attributes)
        inferred = infer_shapes(node, [self.kinds[name] if name else None for name in node.input])
        results = dict(zip(outputs, inferred, strict=True))
        for name, kind in results.items():
            source = name.removesuffix("_out")
            if source in PLACES:
                self.memory[name] = self.memory[source]
            else:
                self.memory[name] = Memory(bytes_of(kind))
                self.memory[name].fill(0xFF)
        self.kinds |= results
        self.call: Call = library.call(
            case.op_type,
            op.complete(case.attributes, case.op_type),
            {name: self._tensor(name) for name in case.inputs},
            {name: self._tensor(name) for name in results},
        )
        self.workspace = Memory(self.call.workspace_bytes())

    def _tensor(self, name: str) -> DeviceTensor:
        return DeviceTensor(self.memory[name].address, self.kinds[name].dtype, shape_of(self.kinds[name]))

    def enqueue(self, stream: Stream) -> None:
        self.call.enqueue(self.workspace.address, self.workspace.size, stream.handle)

    def close(self) -> None:
        for memory in {*self.memory.values(), self.workspace}:
            memory.close()


def shape_of(kind: TensorType) -> tuple[int, ...]:
    """The dimensions, all of which are known."""
    return tuple(int(dim or 0) for dim in kind.shape)


def bytes_of(kind: TensorType) -> int:
    """Of a tensor of this type."""
    return math.prod(shape_of(kind)) * int(helper.tensor_dtype_to_np_dtype(kind.dtype).itemsize)


def kind_of(content: Content) -> TensorType:
    """Type and shape of the tensor that has this content; pages are words."""
    if isinstance(content, Random):
        return TensorType(content.dtype, content.shape)
    if isinstance(content, Pool):
        return TensorType(TensorProto.INT32, (content.pages, content.layout.page_words))
    return TensorType(helper.np_dtype_to_tensor_dtype(content.dtype), content.shape)


def filled(rng: np.random.Generator, content: Content) -> Memory:
    """Device memory with the content; large tensors repeat a part of odd length."""
    if isinstance(content, Random):
        count = min(math.prod(content.shape), DISTINCT)
        dtype = helper.tensor_dtype_to_np_dtype(content.dtype)
        spread = 100.0 if content.dtype == TensorProto.FLOAT8E4M3FN else content.spread
        part = (spread * rng.standard_normal(count, np.float32)).clip(-448, 448).astype(dtype)
    elif isinstance(content, Pool):
        part = _pages(rng, content.layout, min(content.pages, DISTINCT_PAGES))
    else:
        part = content
    memory = Memory(bytes_of(kind_of(content)))
    memory.write(part)
    filled = part.nbytes
    while filled < memory.size:
        more = min(filled, memory.size - filled)
        memory.copy(memory.address, filled, more)
        filled += more
    return memory


def _pages(rng: np.random.Generator, layout: PageLayout, count: int) -> Array:
    pages = layout.empty(count)
    page, slot = np.divmod(np.arange(count * layout.page_size), layout.page_size)
    if isinstance(layout, KvLayout):
        widths = (layout.kv_lora_rank, layout.qk_rope_head_dim)
        layout.write(pages, page, slot, *(rng.standard_normal((len(page), width), np.float32) for width in widths))
    else:
        assert isinstance(layout, IndexLayout)
        layout.write(pages, page, slot, rng.standard_normal((len(page), layout.index_head_dim), np.float32))
    return pages
