"""Other people's kernels on the shapes of the benchmark's cases: FlashMLA, vLLM's fork of it, DeepGEMM, cuDNN and
cuBLAS.

Each function makes data of its own, checks one sequence against float32 arithmetic, and returns what calls the kernel.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mla_trt.errors import MlaTrtError

WIDTH, RANK, PAGE, TOP_K = 576, 512, 64, 2048
SCALE = 192**-0.5
INDEX_HEADS, INDEX_DIM = 64, 128

Calls = list[Callable[..., Any]]


class NoPeerError(MlaTrtError):
    """The peer is not installed, or what it computed is wrong."""


@dataclass(frozen=True)
class Peer:
    """A peer's kernel on as many sets of data as it was asked for.

    Attributes:
        name: of the kernel.
        calls: one for each set.
        error: relative (Frobenius) of what was checked.
        planning: the same, each of which makes a plan of the sequences' lengths first; none where there is no plan.
    """

    name: str
    calls: Calls
    error: float
    planning: Calls = field(default_factory=list)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise NoPeerError(f"{name}: {' '.join(str(error).split())[:120]}") from None


def _peer(name: str, calls: Calls, error: float, tolerance: float, planning: Calls | None = None) -> Peer:
    if not error <= tolerance:
        raise NoPeerError(f"{name} is off by {error:.1e}")
    return Peer(name, calls, error, planning or [])


def _relative(found: Any, expected: Any) -> float:
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(difference.item())


def _causal_attention(torch: Any, query: Any, rows: Any, new: int) -> Any:
    """``query`` ``[new, H, 576]``, ``rows`` ``[keys, 576]``; f32 ``[new, H, 512]``."""
    scores = torch.einsum("thd,kd->thk", query.float(), rows) * SCALE
    keys = torch.arange(len(rows), device=rows.device)
    last = len(rows) - new + torch.arange(new, device=rows.device)
    scores.masked_fill_(keys[None, None] > last[:, None, None], float("-inf"))
    return scores.softmax(-1) @ rows[:, :RANK]


def _paged(torch: Any, batch: int, keys: int) -> tuple[Any, Any]:
    pages = batch * keys // PAGE
    table = torch.randperm(pages, device="cuda").view(batch, keys // PAGE).to(torch.int32)
    return table, torch.full((batch,), keys, device="cuda", dtype=torch.int32)


def flash_mla_dense(sets: int, batch: int, heads: int, keys: int, new: int) -> Peer:
    """FlashMLA's dense decode over bf16 rows. A plan is made by the first call that has it."""
    torch, flash_mla = _module("torch"), _module("flash_mla")
    calls: Calls = []
    planning: Calls = []
    error = 0.0
    for number in range(sets):
        query = torch.randn(batch, new, heads, WIDTH, device="cuda", dtype=torch.bfloat16)
        table, lengths = _paged(torch, batch, keys)
        cache = torch.randn(table.numel(), PAGE, 1, WIDTH, device="cuda", dtype=torch.bfloat16)
        plan, _ = flash_mla.get_mla_metadata()

        def call(q: Any = query, kv: Any = cache, t: Any = table, n: Any = lengths, p: Any = plan) -> Any:
            return flash_mla.flash_mla_with_kvcache(q, kv, t, n, RANK, p, None, SCALE, causal=True)

        def plan_and_call(call: Callable[..., Any] = call) -> Any:
            return call(p=flash_mla.get_mla_metadata()[0])

        calls.append(call)
        planning.append(plan_and_call)
        if number == 0:
            rows = cache[table[-1].long()].view(keys, WIDTH).float()
            error = _relative(call()[0][-1], _causal_attention(torch, query[-1], rows, new))
    return _peer("FlashMLA", calls, error, 6e-3, planning)


def vllm_flash_mla_dense_fp8(sets: int, batch: int, heads: int, keys: int, new: int) -> Peer:
    """vLLM's fork of FlashMLA over fp8 rows; query, rows and weights in fp8."""
    torch, fork = _module("torch"), _module("flash_mla_vllm")
    e4m3, one = torch.float8_e4m3fn, torch.ones(1, device="cuda")
    calls: Calls = []
    planning: Calls = []
    error = 0.0
    for number in range(sets):
        query = torch.randn(batch, new, heads, WIDTH, device="cuda", dtype=torch.bfloat16).to(e4m3)
        table, lengths = _paged(torch, batch, keys)
        cache = torch.randn(table.numel(), PAGE, 1, WIDTH, device="cuda", dtype=torch.bfloat16).to(e4m3)
        plan, splits = fork.get_mla_metadata_dense_fp8(lengths, new * heads, 1)

        def call(
            q: Any = query, kv: Any = cache, t: Any = table, n: Any = lengths, p: Any = plan, s: Any = splits
        ) -> Any:
            return fork.flash_mla_with_kvcache_fp8(q, kv, t, n, RANK, p, s, SCALE, True, one, one)

        def plan_and_call(call: Callable[..., Any] = call, n: Any = lengths) -> Any:
            plan, splits = fork.get_mla_metadata_dense_fp8(n, new * heads, 1)
            return call(p=plan, s=splits)

        calls.append(call)
        planning.append(plan_and_call)
        if number == 0:
            rows = cache[table[-1].long()].view(keys, WIDTH).float()
            error = _relative(call()[0][-1], _causal_attention(torch, query[-1], rows, new))
    return _peer("vLLM's FlashMLA", calls, error, 6e-2, planning)  # its weights are rounded to fp8


def _ds_mla_rows(torch: Any, pages: int) -> Any:
    """Pages of fp8_ds_mla rows, u8 ``[pages, 64, 1, 656]``, their scales 1."""
    rows = torch.empty(pages, PAGE, 1, 656, device="cuda", dtype=torch.uint8)
    step = 8192
    for start in range(0, pages, step):
        part = rows[start : start + step]
        latent = torch.randn(*part.shape[:3], RANK, device="cuda", dtype=torch.bfloat16)
        part[..., :RANK].view(torch.float8_e4m3fn)[:] = latent.to(torch.float8_e4m3fn)
        part[..., RANK : RANK + 16].view(torch.float32)[:] = 1.0
        part[..., RANK + 16 :].view(torch.bfloat16)[:] = torch.randn(
            *part.shape[:3], 64, device="cuda", dtype=torch.bfloat16
        )
    return rows


def flash_mla_sparse_decode(sets: int, batch: int, heads: int, keys: int) -> Peer:
    """FlashMLA's sparse decode over fp8_ds_mla rows."""
    torch, flash_mla = _module("torch"), _module("flash_mla")
    calls: Calls = []
    error = 0.0
    for number in range(sets):
        query = torch.randn(batch, 1, heads, WIDTH, device="cuda", dtype=torch.bfloat16)
        cache = _ds_mla_rows(torch, batch * keys // PAGE)
        lists = [torch.randperm(keys, device="cuda")[:TOP_K] + row * keys for row in range(batch)]
        indices = torch.stack(lists).view(batch, 1, TOP_K).to(torch.int32)
        plan, _ = flash_mla.get_mla_metadata()

        def call(q: Any = query, kv: Any = cache, i: Any = indices, p: Any = plan) -> Any:
            return flash_mla.flash_mla_with_kvcache(
                q, kv, None, None, RANK, p, None, SCALE, causal=False, is_fp8_kvcache=True, indices=i
            )

        calls.append(call)
        if number == 0:
            chosen = cache.view(-1, 656)[indices[-1, 0].long()]
            latent = chosen[:, :RANK].view(torch.float8_e4m3fn).float()
            rows = torch.cat([latent, chosen[:, RANK + 16 :].view(torch.bfloat16).float()], 1)
            expected = (query[-1, 0].float() @ rows.T * SCALE).softmax(-1) @ latent
            error = _relative(call()[0][-1, 0], expected)
    return _peer("FlashMLA (fp8_ds_mla)", calls, error, 8e-3)


def flash_mla_sparse_prefill(sets: int, tokens: int, heads: int, keys: int) -> Peer:
    """FlashMLA's sparse prefill over bf16 rows that lie in one piece."""
    torch, flash_mla = _module("torch"), _module("flash_mla")
    calls: Calls = []
    error = 0.0
    for number in range(sets):
        query = torch.randn(tokens, heads, WIDTH, device="cuda", dtype=torch.bfloat16) / 10
        rows = torch.randn(keys, 1, WIDTH, device="cuda", dtype=torch.bfloat16) / 10
        lists = torch.stack([torch.randperm(keys - tokens, device="cuda")[:TOP_K] for _ in range(64)])
        indices = lists[torch.arange(tokens, device="cuda") % 64].view(tokens, 1, TOP_K).to(torch.int32)

        def call(q: Any = query, kv: Any = rows, i: Any = indices) -> Any:
            return flash_mla.flash_mla_sparse_fwd(q, kv, i, SCALE, RANK)

        calls.append(call)
        if number == 0:
            chosen = rows[indices[-1, 0].long(), 0].float()
            expected = (query[-1].float() @ chosen.T * SCALE).softmax(-1) @ chosen[:, :RANK]
            error = _relative(call()[0][-1], expected)
    return _peer("FlashMLA", calls, error, 8e-3)


def cudnn_prefill(sets: int, batch: int, heads: int, tokens: int) -> Peer:
    """cuDNN through torch's scaled_dot_product_attention, over keys and values that are already expanded."""
    torch, attention = _module("torch"), _module("torch.nn.attention")
    calls: Calls = []
    error = 0.0
    for number in range(sets):
        query, key = (torch.randn(batch, heads, tokens, 192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        value = torch.randn(batch, heads, tokens, 128, device="cuda", dtype=torch.bfloat16)

        def call(q: Any = query, k: Any = key, v: Any = value) -> Any:
            with attention.sdpa_kernel(attention.SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)

        calls.append(call)
        if number == 0:
            scores = query[-1, -1, -64:].float() @ key[-1, -1].float().T * SCALE
            last = tokens - 64 + torch.arange(64, device="cuda")
            scores.masked_fill_(torch.arange(tokens, device="cuda")[None] > last[:, None], float("-inf"))
            error = _relative(call()[-1, -1, -64:], scores.softmax(-1) @ value[-1, -1].float())
    return _peer("cuDNN (expanded)", calls, error, 1e-2)


def torch_projections(sets: int, tokens: int, columns: int, rank: int, beside: int, outputs: int) -> Peer:
    """cuBLAS's products of the hidden states and of the query's latent, each with its weights side by side in one, and torch's norm of
    the latent between them. The indexer's factor is left out."""
    torch = _module("torch")
    rms_norm = _module("torch.nn.functional").rms_norm
    calls: Calls = []
    error = 0.0
    for number in range(sets):
        hidden = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        first = torch.randn(columns, rank + beside, device="cuda", dtype=torch.bfloat16) * columns**-0.5
        second = torch.randn(rank, outputs, device="cuda", dtype=torch.bfloat16) * rank**-0.5
        norm = torch.randn(rank, device="cuda", dtype=torch.bfloat16)

        def call(x: Any = hidden, w: Any = first, n: Any = norm, u: Any = second) -> Any:
            made = torch.mm(x, w)
            return made, torch.mm(rms_norm(made[:, :rank], (rank,), n, 1e-6), u)

        calls.append(call)
        if number == 0:
            of_hidden, of_latent = call()
            expected = hidden[-1].float() @ first.float()
            latent = expected[:rank] / (expected[:rank].square().mean() + 1e-6).sqrt() * norm.float()
            error = max(_relative(of_hidden[-1], expected), _relative(of_latent[-1], latent @ second.float()))
    return _peer("torch.mm, rms_norm, torch.mm", calls, error, 1e-2)


def torch_product(sets: int, tokens: int, columns: int, outputs: int) -> Peer:
    """cuBLAS's product in bf16."""
    torch = _module("torch")
    calls: Calls = []
    error = 0.0
    for number in range(sets):
        x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(columns, outputs, device="cuda", dtype=torch.bfloat16) * columns**-0.5
        calls.append(functools.partial(torch.mm, x, weight))
        if number == 0:
            error = _relative(calls[0]()[-1], x[-1].float() @ weight.float())
    return _peer("torch.mm", calls, error, 1e-2)


def _with_scales(torch: Any, values: Any) -> tuple[Any, Any]:
    """Rows in e4m3, and the f32 scale of each."""
    scales = values.abs().float().amax(-1).clamp_min(1e-4) / 448
    return (values / scales[..., None]).to(torch.float8_e4m3fn), scales


def deep_gemm_logits(sets: int, tokens: int, keys: int) -> Peer:
    """DeepGEMM's index scores of a prompt's end, causal, and torch.topk of them."""
    torch, deep_gemm = _module("torch"), _module("deep_gemm")
    calls: Calls = []
    error = 0.0
    for number in range(sets):
        query = torch.randn(tokens, INDEX_HEADS, INDEX_DIM, device="cuda").to(torch.float8_e4m3fn)
        rows = _with_scales(torch, torch.randn(keys, INDEX_DIM, device="cuda"))
        weights = torch.randn(tokens, INDEX_HEADS, device="cuda")
        first = torch.zeros(tokens, device="cuda", dtype=torch.int32)
        end = torch.arange(tokens, device="cuda", dtype=torch.int32) + (keys - tokens + 1)

        def call(q: Any = query, kv: Any = rows, w: Any = weights, a: Any = first, b: Any = end) -> Any:
            logits = deep_gemm.fp8_mqa_logits(q, kv, w, a, b, clean_logits=True)
            return logits, torch.topk(logits, TOP_K)

        calls.append(call)
        if number == 0:
            key = rows[0].float() * rows[1][:, None]
            expected = ((query[-1].float() @ key.T).relu() * weights[-1][:, None]).sum(0)
            error = _relative(call()[0][-1][:keys], expected)
    return _peer("DeepGEMM, torch.topk", calls, error, 2e-3)


def deep_gemm_paged_logits(sets: int, batch: int, keys: int) -> Peer:
    """DeepGEMM's index scores of one token a sequence, and torch.topk of them."""
    torch, deep_gemm = _module("torch"), _module("deep_gemm")
    calls: Calls = []
    error = 0.0
    for number in range(sets):
        table, _ = _paged(torch, batch, keys)
        pages = table.numel()
        query = torch.randn(batch, 1, INDEX_HEADS, INDEX_DIM, device="cuda").to(torch.float8_e4m3fn)
        weights = torch.randn(batch, INDEX_HEADS, device="cuda")
        codes, scales = _with_scales(torch, torch.randn(pages, PAGE, INDEX_DIM, device="cuda", dtype=torch.bfloat16))
        parts = [codes.view(pages, -1).view(torch.uint8), scales.view(torch.uint8)]
        cache = torch.cat(parts, 1).view(pages, PAGE, 1, INDEX_DIM + 4)
        lengths = torch.full((batch, 1), keys, device="cuda", dtype=torch.int32)
        plan = deep_gemm.get_paged_mqa_logits_metadata(lengths, PAGE, deep_gemm.get_num_sms())

        def call(
            q: Any = query, kv: Any = cache, w: Any = weights, n: Any = lengths, t: Any = table, p: Any = plan
        ) -> Any:
            logits = deep_gemm.fp8_paged_mqa_logits(q, kv, w, n, t, p, keys, clean_logits=False)  # all keys are there
            return logits, torch.topk(logits, TOP_K)

        calls.append(call)
        if number == 0:
            key = (codes.float()[table[-1].long()] * scales[table[-1].long()][..., None]).view(keys, INDEX_DIM)
            expected = ((query[-1, 0].float() @ key.T).relu() * weights[-1][:, None]).sum(0)
            error = _relative(call()[0][-1][:keys], expected)
    return _peer("DeepGEMM, torch.topk", calls, error, 2e-3)
