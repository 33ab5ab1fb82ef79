"""What `mla-trt bench kernels` measures: one op on one shape, what its inputs hold, and what it must do and move.

Shapes are DeepSeek-V3's: rank 512, rope 64, pages of 64 tokens. Floating-point operations of attention are
2 * heads * (query, key) pairs * (576 + 512) absorbed and * (192 + 128) expanded, those of the expansion besides; bytes are
those of the cache rows that are read and of the other inputs and outputs, each once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from mla_trt.formats import IndexLayout, KvLayout, PageLayout, ceil_div
from mla_trt.ops import OPS
from mla_trt.ops.input_projections import CODED
from mla_trt.ops.projection_weights import scale_of

Array = npt.NDArray[Any]

RANK, ROPE, NOPE, VALUE, PAGE = 512, 64, 128, 128, 64
INDEX_HEADS, INDEX_DIM, TOP_K = 64, 128, 2048
HEADS, QUERY_RANK, HIDDEN = 128, 1536, 7168
SCALE = (NOPE + ROPE) ** -0.5
TOLERANCES = (1e-2, 6e-2, 3e-2)
"""By the terms of the query: of the relative error."""


@dataclass(frozen=True)
class Random:
    """A tensor of normal values of a spread; e4m3 weights take any code that is a number."""

    shape: tuple[int, ...]
    dtype: int = TensorProto.BFLOAT16
    spread: float = 1.0


@dataclass(frozen=True)
class Pool:
    """Pages whose rows hold normal values."""

    layout: PageLayout
    pages: int


Content = Random | Pool | Array


@dataclass(frozen=True)
class Case:
    """One benchmark.

    Attributes:
        op_type, attributes, inputs: the call. Arrays are taken as they are.
        flops, bytes: the least that it must do and move.
        precision: whose matrix units bound it, "bf16" or "fp8".
        tolerance: of the relative error (Frobenius) of sampled tokens; of a selection, the share of other keys, see `Checker`.
        peer: name and arguments of a function of :mod:`mla_trt.bench.peers`.
        neighbour: instead of a peer, the case of an even shape whose rate this one should have.
    """

    op_type: str
    attributes: Mapping[str, Any]
    inputs: Mapping[str, Content]
    flops: float
    bytes: float
    precision: str = "bf16"
    tolerance: float = 1e-2
    peer: tuple[str, Mapping[str, Any]] | None = None
    neighbour: str | None = None
    checked: tuple[str, ...] = field(default=("output",))


def _step(rng: np.random.Generator, batch: int, new: int, keys: int) -> tuple[dict[str, Array], int]:
    """The step of ``batch`` sequences of ``keys`` tokens each, ``new`` of them new; and the pages that they lie on."""
    return _ragged_step(rng, [new] * batch, [keys] * batch)


def _ragged_step(rng: np.random.Generator, new: Sequence[int], keys: Sequence[int]) -> tuple[dict[str, Array], int]:
    """The same where each sequence has its own numbers."""
    batch, columns = len(keys), ceil_div(max(keys), PAGE)
    inputs: dict[str, Array] = {
        "query_offsets": np.concatenate([[0], np.cumsum(new)]).astype(np.int32),
        "cache_lengths": (np.array(keys) - np.array(new)).astype(np.int32),
    }
    plan = OPS["MlaPlan"]
    tokens = {"tokens": np.zeros(sum(new), np.int64)}
    inputs |= plan.reference(plan.complete({"page_size": PAGE}, ""), {**tokens, **inputs})
    inputs["block_table"] = rng.permutation(batch * columns).reshape(batch, columns).astype(np.int32)
    return inputs, batch * columns


def _layout(row_format: str) -> KvLayout:
    return KvLayout(page_size=PAGE, row_format=row_format, kv_lora_rank=RANK, qk_rope_head_dim=ROPE, kv_scale=2.0**-6)


def _row_bytes(pages: PageLayout) -> int:
    return pages.row_bytes + (4 if pages.has_page_scales else 0)


def _kv_attributes(pages: KvLayout) -> dict[str, Any]:
    return {
        "kv_lora_rank": RANK,
        "qk_rope_head_dim": ROPE,
        "page_size": PAGE,
        "row_format": pages.row_format,
        "kv_scale": pages.kv_scale,
    }


def decoding(row_format: str, batch: int, heads: int, keys: int, new: int = 1, terms: int = 0) -> Case:
    """Dense decode, with the query in ``terms`` e4m3 terms. Peers: FlashMLA over bf16 rows, vLLM's fork of it over e4m3
    rows as those of fp8_flat, with the query in one term."""
    step, pages = _step(np.random.default_rng(0), batch, new, keys)
    layout, tokens = _layout(row_format), batch * new
    peer = "flash_mla_dense" if row_format == "bf16" else "vllm_flash_mla_dense_fp8"
    return Case(
        "MlaDecoding",
        {**_kv_attributes(layout), "softmax_scale": SCALE, "query_terms": terms},
        {"query": Random((tokens, heads, RANK + ROPE)), **step, "kv_cache": Pool(layout, pages)},
        flops=2.0 * tokens * heads * keys * (2 * RANK + ROPE),
        bytes=batch * keys * _row_bytes(layout) + 2.0 * tokens * heads * (2 * RANK + ROPE),
        precision="fp8" if terms else "bf16",
        tolerance=TOLERANCES[terms],
        peer=(peer, {"batch": batch, "heads": heads, "keys": keys, "new": new}),
    )


def uneven_decoding(row_format: str, heads: int, keys: Sequence[int], terms: int, neighbour: str) -> Case:
    """Dense decode of sequences of any lengths and any number of heads."""
    step, pages = _ragged_step(np.random.default_rng(0), [1] * len(keys), keys)
    layout, tokens, total = _layout(row_format), len(keys), sum(keys)
    return Case(
        "MlaDecoding",
        {**_kv_attributes(layout), "softmax_scale": SCALE, "query_terms": terms},
        {"query": Random((tokens, heads, RANK + ROPE)), **step, "kv_cache": Pool(layout, pages)},
        flops=2.0 * heads * total * (2 * RANK + ROPE),
        bytes=total * _row_bytes(layout) + 2.0 * tokens * heads * (2 * RANK + ROPE),
        precision="fp8" if terms else "bf16",
        tolerance=TOLERANCES[terms],
        neighbour=neighbour,
    )


def _lists(rng: np.random.Generator, tokens: int, keys: int) -> Array:
    """TOP_K different keys for each token, ascending; the tokens draw from 64 lists."""
    lists = [np.sort(rng.permutation(keys)[:TOP_K]) for _ in range(min(tokens, 64))]
    return np.stack([lists[token % len(lists)] for token in range(tokens)]).astype(np.int32)


def sparse_decoding(row_format: str, batch: int, heads: int, terms: int = 0, keys: int = 32768) -> Case:
    """Decode over 2048 selected keys of each sequence, with the query in ``terms`` e4m3 terms. Peer: FlashMLA over fp8_ds_mla
    rows."""
    rng = np.random.default_rng(0)
    step, pages = _step(rng, batch, 1, keys)
    layout = _layout(row_format)
    return Case(
        "MlaDecoding",
        {**_kv_attributes(layout), "softmax_scale": SCALE, "query_terms": terms},
        {
            "query": Random((batch, heads, RANK + ROPE)),
            **step,
            "kv_cache": Pool(layout, pages),
            "indices": _lists(rng, batch, keys),
        },
        flops=2.0 * batch * heads * TOP_K * (2 * RANK + ROPE),
        bytes=batch * TOP_K * (_row_bytes(layout) + 4) + 2.0 * batch * heads * (2 * RANK + ROPE),
        precision="fp8" if terms else "bf16",
        tolerance=TOLERANCES[terms],
        peer=("flash_mla_sparse_decode", {"batch": batch, "heads": heads, "keys": keys}),
    )


def sparse_prefill(heads: int, tokens: int = 4096, keys: int = 32768) -> Case:
    """Many tokens, each over 2048 selected keys, bf16 rows. Peer: FlashMLA."""
    rng = np.random.default_rng(0)
    step, pages = _step(rng, 1, tokens, keys)
    layout = _layout("bf16")
    return Case(
        "MlaPrefillSparse",
        {**_kv_attributes(layout), "softmax_scale": SCALE},
        {
            "query": Random((tokens, heads, RANK + ROPE)),
            **step,
            "kv_cache": Pool(layout, pages),
            "indices": _lists(rng, tokens, keys - tokens),
        },
        flops=2.0 * tokens * heads * TOP_K * (2 * RANK + ROPE),
        bytes=keys * _row_bytes(layout) + 2.0 * tokens * heads * (2 * RANK + ROPE) + 4.0 * tokens * TOP_K,
        peer=("flash_mla_sparse_prefill", {"tokens": tokens, "heads": heads, "keys": keys}),
    )


def prefill(batch: int, tokens: int, heads: int = 128) -> Case:
    """Causal attention of whole prompts, with the expansion. Peer: cuDNN over keys and values that are already expanded."""
    case = uneven_prefill([tokens] * batch, heads)
    return replace(case, peer=("cudnn_prefill", {"batch": batch, "heads": heads, "tokens": tokens}))


def uneven_prefill(prompts: Sequence[int], heads: int, neighbour: str | None = None) -> Case:
    """The same of prompts of any lengths."""
    step, pages = _ragged_step(np.random.default_rng(0), prompts, prompts)
    layout, count = _layout("bf16"), sum(prompts)
    weights = 2 * heads * RANK * NOPE
    pairs = sum(tokens * (tokens + 1) / 2 for tokens in prompts)
    return Case(
        "MlaPrefill",
        {**_kv_attributes(layout), "softmax_scale": SCALE},
        {
            "query": Random((count, heads, NOPE + ROPE)),
            **step,
            "kv_cache": Pool(layout, pages),
            "w_uk": Random((heads, RANK, NOPE), spread=RANK**-0.5),
            "w_uv": Random((heads, VALUE, RANK), spread=RANK**-0.5),
        },
        flops=2.0 * heads * (pairs * (NOPE + ROPE + VALUE) + count * RANK * (NOPE + VALUE)),
        bytes=count * _row_bytes(layout) + 2.0 * (weights + count * heads * (NOPE + ROPE + VALUE)),
        neighbour=neighbour,
    )


def indexer(batch: int, new: int, keys: int) -> Case:
    """Index scores and selection. Peer: DeepGEMM's scores alone."""
    step, pages = _step(np.random.default_rng(0), batch, new, keys)
    del step["schedule"]
    layout, tokens = IndexLayout(page_size=PAGE, index_format="fp8", index_head_dim=INDEX_DIM), batch * new
    pairs = batch * sum(range(keys - new + 1, keys + 1))
    decode = {"batch": batch, "keys": keys}
    prompt = {"tokens": tokens, "keys": keys}
    return Case(
        "MlaIndexer",
        {"index_head_dim": INDEX_DIM, "index_rope_dim": ROPE, "top_k": TOP_K, "page_size": PAGE},
        {
            "index_query": Random((tokens, INDEX_HEADS, INDEX_DIM)),
            "index_key": Random((tokens, INDEX_DIM)),
            "index_weights": Random((tokens, INDEX_HEADS), TensorProto.FLOAT),
            "index_cos": Random((tokens, ROPE // 2), TensorProto.FLOAT, 0.5),
            "index_sin": Random((tokens, ROPE // 2), TensorProto.FLOAT, 0.5),
            **step,
            "indexer_cache": Pool(layout, pages),
        },
        flops=2.0 * pairs * INDEX_HEADS * INDEX_DIM,
        bytes=batch * keys * _row_bytes(layout) + tokens * (2.0 * INDEX_HEADS * INDEX_DIM + 4.0 * TOP_K),
        precision="fp8",
        tolerance=2e-3,
        peer=("deep_gemm_paged_logits", decode) if new == 1 else ("deep_gemm_logits", prompt),
        checked=("indices",),
    )


def _new_latents(tokens: int) -> dict[str, Content]:
    return {
        "latent": Random((tokens, RANK)),
        "rope_key": Random((tokens, ROPE)),
        "norm_weight": Random((RANK,)),
        "cos": Random((tokens, ROPE // 2), TensorProto.FLOAT, 0.5),
        "sin": Random((tokens, ROPE // 2), TensorProto.FLOAT, 0.5),
    }


def append(row_format: str, batch: int, new: int, heads: int = 128) -> Case:
    """Rope, norm, quantisation and the cache rows of new tokens."""
    step, pages = _step(np.random.default_rng(0), batch, new, 1000 + new)
    layout, tokens = _layout(row_format), batch * new
    places = {name: step[name] for name in ("token_sequence", "positions", "block_table")}
    return Case(
        "MlaFusedRopeRmsNormQuantization",
        _kv_attributes(layout),
        {
            "query_rope": Random((tokens, heads, ROPE)),
            **_new_latents(tokens),
            **places,
            "kv_cache": Pool(layout, pages),
        },
        flops=0,
        bytes=tokens * (2.0 * (2 * heads * ROPE + RANK + ROPE) + 4 * ROPE + _row_bytes(layout)),
        tolerance=2e-2,
        checked=("query_rope_out", "kv_cache_out"),
    )


def composed(batch: int, keys: int = 1, *, codes: bool, branch: bool = False, heads: int = 128) -> Case:
    """A decode step of a whole op over fp8 rows, from the rows that are appended to each head's output. Over one key the products
    with W_UK and W_UV are what is timed. ``codes``: weights in e4m3, else in bf16. ``branch``: MlaDecodeBranchFp8, whose activations
    are e4m3, too; else MlaAttention."""
    step, pages = _step(np.random.default_rng(0), batch, 1, keys)
    layout = _layout("fp8")
    dtype = TensorProto.FLOAT8E4M3FN if codes else TensorProto.BFLOAT16
    blocks = {"w_uk_scale": (heads, RANK // 128, NOPE // 128), "w_uv_scale": (heads, VALUE // 128, RANK // 128)}
    activations = heads * (NOPE + ROPE + VALUE)
    dimensions = {} if branch else {"num_heads": heads, "qk_nope_head_dim": NOPE, "v_head_dim": VALUE}
    return Case(
        "MlaDecodeBranchFp8" if branch else "MlaAttention",
        {**_kv_attributes(layout), **dimensions, "softmax_scale": SCALE},
        {
            "query": Random((batch, heads, NOPE + ROPE)),
            **_new_latents(batch),
            "w_uk": Random((heads, RANK, NOPE), dtype, NOPE**-0.5),
            "w_uv": Random((heads, VALUE, RANK), dtype, RANK**-0.5),
            **({name: np.full(shape, 2.0**-11, np.float32) for name, shape in blocks.items()} if codes else {}),
            **step,
            "kv_cache": Pool(layout, pages),
        },
        flops=2.0 * batch * heads * (RANK * (NOPE + VALUE) + keys * (2 * RANK + ROPE)),
        bytes=heads * RANK * (NOPE + VALUE) * (1 if codes else 2)
        + batch * keys * _row_bytes(layout)
        + 2.0 * batch * (activations + RANK + ROPE),
        tolerance=5e-2,
    )


def sparse_attention(batch: int, keys: int, terms: int) -> Case:
    """A decode step of a whole layer with an indexer, over fp8 rows, from the rows and index keys that are appended to each head's
    output, with the query in ``terms`` e4m3 terms."""
    dense, index = composed(batch, TOP_K, codes=False), indexer(batch, 1, keys)
    step, pages = _step(np.random.default_rng(0), batch, 1, keys)
    cache = Pool(_layout("fp8"), pages)
    return Case(
        "MlaSparseAttention",
        {**index.attributes, **dense.attributes, "query_terms": terms},
        {**dense.inputs, **index.inputs, **step, "kv_cache": cache},
        flops=dense.flops + index.flops,
        bytes=dense.bytes + index.bytes,
        precision="fp8",
        tolerance=TOLERANCES[terms],
    )


def _as_codes(inputs: dict[str, Content]) -> dict[str, Content]:
    """The same with weights in e4m3, where they may be, and of as large values."""
    coded = dict(inputs)
    for name, row_axes in (*((name, 1) for name in CODED), ("w_o", 2)):
        weight = inputs.get(name)
        if isinstance(weight, Random):
            rows, columns = math.prod(weight.shape[:row_axes]), math.prod(weight.shape[row_axes:])
            coded[name] = Random(weight.shape, TensorProto.FLOAT8E4M3FN)
            spread = rows**-0.5 / 150  # of all codes' values
            coded[scale_of(name)] = np.full((ceil_div(rows, 128), ceil_div(columns, 128)), spread, np.float32)
    return coded


def projections(
    tokens: int,
    *,
    indexer: bool,
    codes: bool = False,
    columns: int = HIDDEN,
    rank: int = QUERY_RANK,
    heads: int = HEADS,
) -> Case:
    """What a layer's hidden states of ``columns`` are multiplied by, with the norm of the query's latent of ``rank``; ``indexer``: what an
    indexer gets, too; ``codes``: weights in e4m3. Bytes are without that latent. Peer: torch's products in bf16, which are cuBLAS's."""
    beside = RANK + ROPE + (INDEX_DIM + INDEX_HEADS if indexer else 0)  # the query's latent
    outputs = heads * (NOPE + ROPE) + (INDEX_HEADS * INDEX_DIM if indexer else 0)  # of that latent
    weights = columns * (rank + beside) + rank * outputs
    inputs: dict[str, Content] = {
        "hidden": Random((tokens, columns)),
        "w_dq": Random((columns, rank), spread=columns**-0.5),
        "query_norm_weight": Random((rank,)),
        "w_uq": Random((rank, heads, NOPE + ROPE), spread=rank**-0.5),
        "w_dkv": Random((columns, RANK), spread=columns**-0.5),
        "w_kr": Random((columns, ROPE), spread=columns**-0.5),
    }
    checked: tuple[str, ...] = ("query", "latent", "rope_key")
    if indexer:
        inputs |= {
            "w_index_query": Random((rank, INDEX_HEADS, INDEX_DIM), spread=rank**-0.5),
            "w_index_key": Random((columns, INDEX_DIM), spread=columns**-0.5),
            "w_index_weights": Random((columns, INDEX_HEADS), spread=columns**-0.5),
            "index_weights_factor": Random((INDEX_HEADS,)),
        }
        checked = (*checked, "index_query", "index_key", "index_weights")
    in_bf16 = columns * INDEX_HEADS if indexer else 0
    weight_bytes = weights + in_bf16 if codes else 2 * weights
    return Case(
        "MlaInputProjections",
        {},
        _as_codes(inputs) if codes else inputs,
        flops=2.0 * tokens * weights,
        bytes=weight_bytes + 2.0 * tokens * (columns + beside + outputs + (INDEX_HEADS if indexer else 0)),
        peer=(
            "torch_projections",
            {"tokens": tokens, "columns": columns, "rank": rank, "beside": beside, "outputs": outputs},
        ),
        checked=checked,
    )


def output_projection(tokens: int, *, heads: int = HEADS, width: int = HIDDEN) -> Case:
    """What attention gives times a weight in e4m3. Peer: torch's product in bf16, which is cuBLAS's."""
    rows = heads * VALUE
    inputs: dict[str, Content] = {
        "attended": Random((tokens, heads, VALUE)),
        "w_o": Random((heads, VALUE, width)),
    }
    return Case(
        "MlaOutputProjection",
        {},
        _as_codes(inputs),
        flops=2.0 * tokens * rows * width,
        bytes=rows * width + 2.0 * tokens * (rows + width),
        peer=("torch_product", {"tokens": tokens, "columns": rows, "outputs": width}),
        checked=("hidden",),
    )


def _cases() -> dict[str, Callable[[], Case]]:
    cases: dict[str, Callable[[], Case]] = {}
    shapes = (
        *((128, 128, 4096), (128, 128, 16384), (32, 128, 32768), (128, 64, 4096), (64, 16, 16384)),
        *((128, 128, 1024), (16, 128, 4096), (4, 128, 32768), (1, 128, 32768), (1, 16, 32768)),
    )
    kinds = {"bf16": ("bf16", 0), "fp8": ("fp8", 2), "fp8-1term": ("fp8", 1), "fp8-bf16products": ("fp8", 0)} | {
        "fp8_flat": ("fp8_flat", 2),
        "fp8_flat-1term": ("fp8_flat", 1),
    }
    for kind, (row_format, terms) in kinds.items():
        for batch, heads, keys in shapes:
            name = f"decode-{kind}-b{batch}-h{heads}-{keys // 1024}k"
            cases[name] = functools.partial(decoding, row_format, batch, heads, keys, terms=terms)
        cases[f"decode-{kind}-b128-h128-4k-2tokens"] = functools.partial(decoding, row_format, 128, 128, 4096, 2, terms)
    for kind, (row_format, terms) in {**kinds, "fp8_ds_mla": ("fp8_ds_mla", 0)}.items():
        for batch, heads in ((128, 128), (128, 64), (1, 128)):
            name = f"decode-sparse-{kind}-b{batch}-h{heads}"
            cases[name] = functools.partial(sparse_decoding, row_format, batch, heads, terms)
    for heads in (128, 64):
        cases[f"prefill-sparse-4k-h{heads}"] = functools.partial(sparse_prefill, heads)
    cases["prefill-8k"] = functools.partial(prefill, 1, 8192)
    cases["prefill-16k"] = functools.partial(prefill, 1, 16384)
    cases["prefill-b4-2k"] = functools.partial(prefill, 4, 2048)
    for keys in (32768, 131072):
        cases[f"index-decode-b64-{keys // 1024}k"] = functools.partial(indexer, 64, 1, keys)
    cases["index-prefill-4k-32k"] = functools.partial(indexer, 1, 4096, 32768)
    for row_format in ("bf16", "fp8"):
        for new in (1, 32):
            cases[f"append-{row_format}-{128 * new}"] = functools.partial(append, row_format, 128, new)
    for tokens in (1, 8, 128):
        cases[f"branch-fp8-{tokens}"] = functools.partial(composed, tokens, codes=True, branch=True)
    for batch, keys in ((1, 32), (4, 32), (16, 4), (64, 4), (128, 4)):
        for kind, codes, branch in (
            ("branch-fp8", True, True),
            ("attention", False, False),
            ("attention-codes", True, False),
        ):
            name = f"{kind}-b{batch}-{keys}k"
            cases[name] = functools.partial(composed, batch, keys * 1024, codes=codes, branch=branch)
    for kind, terms in (("sparse-attention", 2), ("sparse-attention-1term", 1)):
        for batch, keys in ((1, 128), (64, 32), (64, 128)):
            cases[f"{kind}-b{batch}-{keys}k"] = functools.partial(sparse_attention, batch, keys * 1024, terms)
    for kind, with_indexer in (("v3", False), ("v32", True)):
        for tokens in (1, 16, 64, 128, 256, 2048):
            cases[f"projections-{kind}-{tokens}"] = functools.partial(projections, tokens, indexer=with_indexer)
    for tokens in (1, 16, 64, 128, 256, 2048):
        for kind, with_indexer in (("v3", False), ("v32", True)):
            name = f"projections-codes-{kind}-{tokens}"
            cases[name] = functools.partial(projections, tokens, indexer=with_indexer, codes=True)
        cases[f"projections-codes-output-{tokens}"] = functools.partial(output_projection, tokens)
    return cases | _uneven_cases()


def _uneven_cases() -> dict[str, Callable[[], Case]]:
    """Shapes that are multiples of nothing, fill no wave of blocks, or have one sequence out of the common, beside even ones."""
    ragged = [int(keys) for keys in np.random.default_rng(1).integers(1, 8192, 128)]
    cases: dict[str, Callable[[], Case]] = {}
    for kind, row_format, terms in (
        *(("bf16", "bf16", 0), ("fp8-1term", "fp8", 1), ("fp8", "fp8", 2)),
        *(("fp8_flat-1term", "fp8_flat", 1), ("fp8_flat", "fp8_flat", 2)),
    ):
        for name, heads, keys, even in (
            ("b127-h128-4099", 128, [4099] * 127, 128),
            ("ragged-h128", 128, ragged, 128),
            ("ragged-h64", 64, ragged, 64),
            ("one-128k-h128", 128, [1024] * 127 + [131072], 128),
            ("b128-h128-2040", 128, [2040] * 128, 128),  # as many keys, shared evenly
            ("b70-h128-4k", 128, [4096] * 70, 128),
            ("b128-h127-4k", 127, [4096] * 128, 128),
            ("b128-h96-4k", 96, [4096] * 128, 128),
            ("b128-h72-4k", 72, [4096] * 128, 128),
            ("b128-h48-4k", 48, [4096] * 128, 64),
        ):
            neighbour = f"decode-{kind}-b128-h{even}-4k"
            cases[f"uneven-{kind}-{name}"] = functools.partial(
                uneven_decoding, row_format, heads, keys, terms, neighbour
            )
    cases["uneven-prefill-8111"] = functools.partial(uneven_prefill, [8111], 128, "prefill-8k")
    prompts = [1531, 2999, 97, 3571]
    cases["uneven-prefill-ragged"] = functools.partial(uneven_prefill, prompts, 128, "prefill-b4-2k")
    cases["uneven-prefill-b4-2k-h100"] = functools.partial(uneven_prefill, [2048] * 4, 100, "prefill-b4-2k")
    return cases


CASES = _cases()
"""Names and makers of the cases."""
