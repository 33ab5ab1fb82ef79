"""A stand-in for `cuda.bindings.runtime`: host memory, and recordings that repeat a call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

GUARD = 64


class Status(IntEnum):
    """Of cudaError_t, what the stand-in returns."""

    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureInvalidated = 901


class HostRuntime:
    """While a recording is made, work is kept instead of done, and nothing else may be.

    Attributes:
        blocks: what is allocated, by address.
        graphs: recordings that live, instantiated or not.
        refuses: recordings fail.
        fails: status of what is synchronised next.
        capacity: largest allocation.
        launched: recordings launched so far.
        pending: an error that cudaGetLastError has not given yet.
    """

    cudaError_t = Status
    cudaStreamNonBlocking = 1
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)
    STREAM = 7

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.graphs: list[list[Callable[[], None]]] = []
        self.streams = 0
        self.refuses = False
        self.fails = Status.cudaSuccess
        self.capacity = 1 << 30
        self.launched = 0
        self.pending = Status.cudaSuccess

    def put(self, work: Callable[[], None]) -> None:
        """What a kernel's launch does."""
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def cudaMalloc(self, size: int) -> tuple[Status, int]:
        assert self.recording is None
        if size > self.capacity:
            return self._failed(Status.cudaErrorMemoryAllocation), 0
        block = (ctypes.c_ubyte * (size + GUARD))()
        ctypes.memset(block, 0xFF, size)
        self.blocks[ctypes.addressof(block)] = block
        return Status.cudaSuccess, ctypes.addressof(block)

    def cudaFree(self, address: int) -> tuple[Status]:
        del self.blocks[address]
        return (Status.cudaSuccess,)

    cudaMallocHost, cudaFreeHost = cudaMalloc, cudaFree

    def cudaMemset(self, address: int, byte: int, size: int) -> tuple[Status]:
        assert self.recording is None
        ctypes.memset(address, byte, size)
        return (Status.cudaSuccess,)

    def cudaMemsetAsync(self, address: int, byte: int, size: int, stream: int) -> tuple[Status]:
        assert stream == self.STREAM
        return self.cudaMemset(address, byte, size)

    def cudaMemcpy(self, target: int, source: int, size: int, kind: int) -> tuple[Status]:
        assert self.recording is None
        assert kind == self.cudaMemcpyKind.cudaMemcpyDefault
        ctypes.memmove(target, source, size)
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[Status]:
        assert stream == self.STREAM
        return self.cudaMemcpy(target, source, size, kind)

    def cudaDeviceSynchronize(self) -> tuple[Status]:
        assert self.recording is None
        return (self._failed(self.fails),)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Status, int]:
        assert flags == self.cudaStreamNonBlocking
        self.streams += 1
        return Status.cudaSuccess, self.STREAM

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:
        self.streams -= 1
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:
        return self.cudaDeviceSynchronize()

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Status]:
        assert self.recording is None
        self.recording = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Status, Any]:
        recording, self.recording = self.recording, None
        assert recording is not None
        if self.refuses:
            return self._failed(Status.cudaErrorStreamCaptureInvalidated), None
        self.graphs.append(recording)
        return Status.cudaSuccess, recording

    def cudaGraphInstantiate(self, graph: list[Callable[[], None]], flags: int) -> tuple[Status, Any]:
        self.graphs.append(list(graph))
        return Status.cudaSuccess, self.graphs[-1]

    def cudaGraphLaunch(self, graph: list[Callable[[], None]], stream: int) -> tuple[Status]:
        self.launched += 1
        for work in graph:
            work()
        return (Status.cudaSuccess,)

    def cudaGraphDestroy(self, graph: list[Callable[[], None]]) -> tuple[Status]:
        (place,) = (place for place, known in enumerate(self.graphs) if known is graph)
        del self.graphs[place]
        return (Status.cudaSuccess,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGetErrorString(self, status: Status) -> tuple[Status, bytes]:
        return Status.cudaSuccess, f"text of {int(status)}".encode()

    def cudaGetLastError(self) -> tuple[Status]:
        status, self.pending = self.pending, Status.cudaSuccess
        return (status,)

    def _failed(self, status: Status) -> Status:
        if status:
            self.pending = status
        return status
