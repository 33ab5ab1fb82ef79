"""Memory, streams and graphs over a stand-in for CUDA: what is read is what was written, nothing leaks, every error is said."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from cuda_stand_in import HostRuntime, Status

from mla_trt import cuda
from mla_trt.cuda import (
    LEAST_ALLOCATION,
    CudaError,
    DeviceBuffer,
    Gpu,
    Memory,
    NoGpuError,
    OutOfMemoryError,
    PinnedBuffer,
    Stream,
    check_usable,
    synchronize,
)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> HostRuntime:
    runtime = HostRuntime()
    monkeypatch.setattr(cuda, "_runtime", lambda: runtime)
    return runtime


def test_memory_holds_what_is_written(host: HostRuntime) -> None:
    memory, other = Memory(16), Memory(8)
    memory.fill(7)
    memory.fill(9, 12, 3)
    memory.write(np.array([1, 2], np.int16), 2)
    assert memory.read().tolist() == [7, 7, 1, 0, 2, 0, 7, 7, 7, 7, 7, 7, 9, 9, 9, 7]
    other.copy(memory.address + 2, 3, 4)
    assert other.read(3, 4).tolist() == [1, 0, 2, 0]
    assert other.read(5).tolist() == [2, 0, 255]
    memory.write(np.arange(8, dtype=np.int16).reshape(2, 4).T[::2])  # not contiguous
    assert memory.read(0, 8).view(np.int16).tolist() == [0, 4, 2, 6]
    for each in (memory, other):
        each.close()
    assert not host.blocks


def test_memory_of_no_bytes_has_an_address(host: HostRuntime) -> None:
    memory = Memory(0)
    memory.fill(1)
    memory.write(np.zeros(0))
    assert memory.address in host.blocks
    assert memory.read().size == 0


def test_buffers_grow_and_are_freed(host: HostRuntime) -> None:
    stream = Stream()
    device, pinned = DeviceBuffer(stream), PinnedBuffer(stream)
    small = device.reserve(10)
    assert device.reserve(LEAST_ALLOCATION) == small
    device.reserve(LEAST_ALLOCATION + 1)
    assert sum(len(block) for block in host.blocks.values()) == 2 * LEAST_ALLOCATION + 64
    values = pinned.array((2, 3), np.dtype(np.float32))
    values[...] = np.arange(6).reshape(2, 3)
    stream.copy(device.address, pinned.address, values.nbytes)
    stream.clear(device.address + 4, 4)
    stream.copy(pinned.address, device.address, values.nbytes)
    assert pinned.array((6,), np.dtype(np.float32)).tolist() == [0, 0, 2, 3, 4, 5]
    for buffer in (device, pinned):
        buffer.free()
        buffer.free()
    assert not host.blocks
    stream.close()
    assert host.streams == 0


def test_what_is_captured_runs_when_it_is_launched(host: HostRuntime) -> None:
    stream, done = Stream(), []
    graph = stream.capture(lambda: host.put(lambda: done.append(len(done))))
    assert done == []
    for _ in range(2):
        stream.launch(graph)
    assert done == [0, 1]
    graph.close()
    assert host.graphs == []


@pytest.mark.parametrize("refuses", [False, True])
def test_work_that_fails_leaves_no_capture(host: HostRuntime, refuses: bool) -> None:
    def work() -> None:
        raise ValueError("no such kernel")

    host.refuses = refuses
    stream = Stream()
    with pytest.raises(ValueError, match="no such kernel"):
        stream.capture(work)
    assert (host.recording, host.graphs, host.pending) == (None, [], Status.cudaSuccess)


def test_a_capture_that_cuda_refuses_leaves_no_error(host: HostRuntime) -> None:
    host.refuses = True
    stream = Stream()
    with pytest.raises(CudaError, match=r"^CUDA: cudaStreamEndCapture failed: text of 901 \(cudaErrorStreamCapture"):
        stream.capture(lambda: None)
    assert (host.recording, host.graphs, host.pending) == (None, [], Status.cudaSuccess)


def test_errors_of_work_are_said_where_it_is_waited_for(host: HostRuntime) -> None:
    stream = Stream()
    host.fails = Status.cudaErrorIllegalAddress
    for wait in (stream.synchronize, synchronize):
        with pytest.raises(CudaError, match=r"Synchronize failed: text of 700 \(cudaErrorIllegalAddress\)"):
            wait()


def test_too_large_an_allocation_says_its_size_and_costs_nothing_else(host: HostRuntime) -> None:
    host.capacity = 1 << 20
    stream = Stream()
    for allocate in (
        lambda: Memory(3 << 30),
        lambda: DeviceBuffer(stream).reserve(3 << 30),
        lambda: PinnedBuffer(stream).array((3 << 30,), np.dtype(np.uint8)),
    ):
        with pytest.raises(OutOfMemoryError, match=r"there is not enough memory for 3\.0 GiB more"):
            allocate()
        assert host.pending == Status.cudaSuccess
    Memory(1 << 20).close()
    assert not host.blocks


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_gpu", lambda: Gpu("NVIDIA H200", "9.0", 1 << 37))
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    cuda._runtime.cache_clear()
    with pytest.raises(NoGpuError, match="the Python package cuda-python is not installed: pip install"):
        check_usable()
