"""What a GPU reaches at most: a device copy, and matrix products."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from statistics import median
from typing import Any

from mla_trt.bench.kernels_report import Ceilings
from mla_trt.cuda import Memory, Stream, milliseconds, properties


def measure_ceilings() -> Ceilings:
    """Device copy by cudaMemcpy; matrix products through torch, where it is installed."""
    return Ceilings(*measure_copy(), *_matrix_products())


def measure_copy() -> tuple[str, float]:
    """Name of the GPU, and bytes/s of a device copy, read and written."""
    gpu = properties()
    name = gpu.name.decode().rstrip("\0")
    size = min(4 << 30, gpu.totalGlobalMem // 8)
    source, target = Memory(size), Memory(size)
    source.fill(1)
    stream, times = Stream(), []
    for _ in range(6):
        start = stream.record()
        stream.copy(target.address, source.address, size)
        end = stream.record()
        stream.synchronize()
        times.append(milliseconds(start, end))
    for memory in (source, target):
        memory.close()
    stream.close()
    return name, 2 * size / (1e-3 * median(times[1:]))


def _matrix_products() -> tuple[float | None, float | None]:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None, None
    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    eights = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device="cuda")

    def rate(product: Callable[[], Any]) -> float:
        for _ in range(3):
            product()
        times = []
        for _ in range(10):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            product()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return float(2 * size**3 / (1e-3 * median(times)))

    bf16 = rate(lambda: left @ right)
    try:
        fp8 = rate(lambda: torch._scaled_mm(*eights, scale_a=one, scale_b=one, out_dtype=torch.bfloat16))
    except (RuntimeError, TypeError):
        fp8 = None
    return bf16, fp8
