"""The kernels' C interface on a machine without a GPU: layouts, and the checks before anything is launched."""

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
from onnx import TensorProto

import mla_trt
from mla_trt.formats import INDEX_FORMATS, ROW_FORMATS, IndexLayout, KvLayout
from mla_trt.ops import OPS, Attributes
from mla_trt.plugins import library
from mla_trt.plugins.kernel_library import BAD_CALL, CUDA, Call, DeviceTensor, KernelError, KernelLibrary
from mla_trt.plugins.library import Library

F32, F16, BF16, I32 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT32

DECODING = Attributes(
    kv_lora_rank=32, qk_rope_head_dim=16, page_size=8, row_format="bf16", kv_scale=1.0, softmax_scale=0.1
)
WORDS = KvLayout(8, "bf16", 32, 16).page_words
INPUTS = {
    "query": (BF16, (5, 4, 48)),
    "query_offsets": (I32, (3,)),
    "cache_lengths": (I32, (2,)),
    "block_table": (I32, (2, 7)),
    "token_sequence": (I32, (5,)),
    "positions": (I32, (5,)),
    "schedule": (I32, (129, 2)),
    "kv_cache": (I32, (20, WORDS)),
}
OUTPUTS = {"output": (BF16, (5, 4, 32)), "lse": (F32, (5, 4))}


def test_library_says_what_it_was_built_from_and_for(kernels_library: Library, kernels: KernelLibrary):
    assert kernels.build == f"{mla_trt.__version__} sm_80 sm_90a"
    assert library.describe(kernels_library.path) == kernels_library
    assert kernels_library.version == mla_trt.__version__
    assert kernels_library.architectures == ("sm_80", "sm_90a")
    assert kernels_library.tensorrt is None


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_pages_of_the_latent_cache_have_the_size_of_formats(kernels: KernelLibrary, row_format: str):
    for rank, rope, page in itertools.product((1, 7, 32, 127, 128, 129, 256, 512), (0, 2, 16, 64), (1, 3, 16, 64, 128)):
        values = Attributes(page_size=page, row_format=row_format, kv_lora_rank=rank, qk_rope_head_dim=rope)
        assert kernels.kv_page_words(values) == KvLayout(page, row_format, rank, rope).page_words, values


@pytest.mark.parametrize("index_format", INDEX_FORMATS)
def test_pages_of_the_index_cache_have_the_size_of_formats(kernels: KernelLibrary, index_format: str):
    for head, page in itertools.product((1, 15, 16, 32, 64, 100, 128), (1, 3, 16, 64, 128)):
        values = Attributes(page_size=page, index_format=index_format, index_head_dim=head)
        assert kernels.index_page_words(values) == IndexLayout(page, index_format, head).page_words, values


def decoding(kernels: KernelLibrary, inputs: dict[str, Any], outputs: dict[str, Any]) -> Call:
    """A call of MlaDecoding; tensors are (type, shape), or None where absent."""
    tensors = [
        {name: DeviceTensor(0, *tensor) for name, tensor in given.items() if tensor is not None}
        for given in (inputs, outputs)
    ]
    return kernels.call("MlaDecoding", DECODING, *tensors)


EMPTY: dict[str, Any] = {
    "query": (F32, (0, 4, 48)),
    "query_offsets": (I32, (1,)),
    "cache_lengths": (I32, (0,)),
    "block_table": (I32, (0, 0)),
    "token_sequence": (I32, (0,)),
    "positions": (I32, (0,)),
    "kv_cache": (I32, (0, WORDS)),
}


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ({}, {}),
        ({}, {"lse": None}),
        ({"indices": (I32, (5, 9)), "sinks": (F32, (4,))}, {}),
        (EMPTY, {"output": (F32, (0, 4, 32)), "lse": None}),
    ],
    ids=["given", "without-lse", "optional", "empty"],
)
def test_call_that_keeps_the_contract_is_no_bad_call(
    kernels: KernelLibrary, inputs: dict[str, Any], outputs: dict[str, Any]
):
    call = decoding(kernels, {**INPUTS, **inputs}, {**OUTPUTS, **outputs})
    try:
        assert call.workspace_bytes() >= 0
    except KernelError as error:
        if error.status != CUDA:  # sizing may ask for the GPU, which is not here
            raise


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": (I32, (5, 4, 48))}, "query has the type 6"),
        ({"kv_cache": (F32, (20, WORDS))}, "kv_cache has the type 1"),
        ({"sinks": (F16, (4,))}, "sinks has the type 10"),
        ({"query": (BF16, (5, 4))}, "query has 2 dimensions, expected [T H R+Dr]"),
        ({"query": (BF16, (5, 4, 48, 1))}, "query has 4 dimensions, expected [T H R+Dr]"),
        ({"query": (BF16, (5, 4, 47))}, "query has 47 along R+Dr, expected 48"),
        ({"query_offsets": (I32, (4,))}, "query_offsets has 4 along B+1, expected 3"),
        ({"cache_lengths": (I32, (3,))}, "along B"),
        ({"positions": (I32, (6,))}, "positions has 6 along T, expected 5"),
        ({"positions": (I32, (-1,))}, "positions has a negative size along axis 0"),
        ({"indices": (I32, (4, 9))}, "indices has 4 along T, expected 5"),
        ({"sinks": (F32, (3,))}, "sinks has 3 along H, expected 4"),
        ({"kv_cache": (I32, (20, WORDS + 32))}, f"a page of kv_cache has {WORDS + 32} words"),
        ({"kv_cache": None}, "the input kv_cache is missing"),
        ({"schedule": None}, "the input schedule is missing"),
    ],
)
def test_inputs_that_contradict_the_op_are_a_bad_call(kernels: KernelLibrary, changed: dict[str, Any], message: str):
    with pytest.raises(KernelError, match=f"^MlaDecoding: .*{re.escape(message)}") as error:
        decoding(kernels, {**INPUTS, **changed}, OUTPUTS).workspace_bytes()
    assert error.value.status == BAD_CALL


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"output": None}, "the output output is missing"),
        ({"output": (BF16, (5, 4, 48))}, "output has 48 along R, expected 32"),
        ({"output": (I32, (5, 4, 32))}, "output has the type 6"),
        ({"lse": (BF16, (5, 4))}, "lse has the type 16"),
    ],
)
def test_outputs_that_contradict_the_op_are_a_bad_call(kernels: KernelLibrary, changed: dict[str, Any], message: str):
    with pytest.raises(KernelError, match=f"^MlaDecoding: {re.escape(message)}") as error:
        decoding(kernels, INPUTS, {**OUTPUTS, **changed}).workspace_bytes()
    assert error.value.status == BAD_CALL


def test_tensor_of_more_dimensions_than_there_is_room_for_is_a_bad_call(kernels: KernelLibrary):
    call = decoding(kernels, INPUTS, OUTPUTS)
    call.inputs[0].rank = 5
    with pytest.raises(KernelError, match="query has 5 dimensions, at most 4 are possible"):
        call.workspace_bytes()


@pytest.mark.parametrize("number", [-1, len(OPS)])
def test_number_of_no_op_is_a_bad_call(kernels: KernelLibrary, number: int):
    with pytest.raises(KernelError, match=f"^there is no op {number}$") as error:
        replace(decoding(kernels, INPUTS, OUTPUTS), op=number).workspace_bytes()
    assert error.value.status == BAD_CALL
