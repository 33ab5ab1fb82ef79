"""Device memory, streams and graphs through cuda-python, with every return code checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mla_trt.errors import MlaTrtError

try:
    from cuda.bindings import runtime
except ImportError:
    runtime = None


class CudaError(MlaTrtError):
    """A call of the CUDA runtime failed."""


def checked(result: tuple[Any, ...]) -> Any:
    """The value of a call of ``cuda.bindings.runtime``, which returns its status first. Raises CudaError."""
    status, *values = result
    if status != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(status)
        raise CudaError(f"CUDA: {text.decode()} ({status.name})")
    return values[0] if len(values) == 1 else tuple(values)


def why_unavailable() -> str | None:
    """Why there is no GPU to use; None when there is one."""
    if runtime is None:
        return "cuda-python is not installed: pip install cuda-bindings"
    status, count = runtime.cudaGetDeviceCount()
    if status != runtime.cudaError_t.cudaSuccess:
        return f"no CUDA GPU ({status.name})"
    return None if count else "no CUDA GPU"


class Stream:
    """A CUDA stream of its own."""

    def __init__(self) -> None:
        self._stream = checked(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        self.handle = int(self._stream)

    def close(self) -> None:
        """Destroy it."""
        checked(runtime.cudaStreamDestroy(self._stream))

    def synchronize(self) -> None:
        """Wait for all work on the stream; raises CudaError for what failed in it."""
        checked(runtime.cudaStreamSynchronize(self._stream))

    def capture(self, work: Callable[[], None]) -> Graph:
        """The work that ``work`` puts on this stream, as a graph."""
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        checked(runtime.cudaStreamBeginCapture(self._stream, mode))
        try:
            work()
        finally:
            graph = checked(runtime.cudaStreamEndCapture(self._stream))
        return Graph(graph)

    def launch(self, graph: Graph) -> None:
        """Put a graph's work on the stream."""
        checked(runtime.cudaGraphLaunch(graph.executable, self._stream))

    def record(self) -> Any:
        """An event at this point of the stream."""
        event = checked(runtime.cudaEventCreate())
        checked(runtime.cudaEventRecord(event, self._stream))
        return event


def milliseconds(start: Any, end: Any) -> float:
    """Device time between two events that have passed; destroys them."""
    elapsed = float(checked(runtime.cudaEventElapsedTime(start, end)))
    for event in (start, end):
        checked(runtime.cudaEventDestroy(event))
    return elapsed


class Graph:
    """A captured graph, ready to launch."""

    def __init__(self, graph: Any) -> None:
        self.executable = checked(runtime.cudaGraphInstantiate(graph, 0))
        checked(runtime.cudaGraphDestroy(graph))

    def close(self) -> None:
        """Free it."""
        checked(runtime.cudaGraphExecDestroy(self.executable))


class Memory:
    """Device memory, aligned to 256 bytes; freed on :meth:`close`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = int(checked(runtime.cudaMalloc(max(size, 1))))

    def close(self) -> None:
        """Free it."""
        checked(runtime.cudaFree(self.address))

    def fill(self, byte: int, start: int = 0, size: int | None = None) -> None:
        """Set ``size`` bytes (None: all from ``start``)."""
        count = self.size - start if size is None else size
        if count:
            checked(runtime.cudaMemset(self.address + start, byte, count))

    def write(self, values: npt.NDArray[Any], start: int = 0) -> None:
        """Copy an array to ``start``."""
        values = np.ascontiguousarray(values)
        if values.nbytes:
            kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
            checked(runtime.cudaMemcpy(self.address + start, values.ctypes.data, values.nbytes, kind))

    def read(self, start: int = 0, size: int | None = None) -> npt.NDArray[np.uint8]:
        """``size`` bytes (None: all from ``start``)."""
        values = np.empty(self.size - start if size is None else size, np.uint8)
        if values.nbytes:
            kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
            checked(runtime.cudaMemcpy(values.ctypes.data, self.address + start, values.nbytes, kind))
        return values

    def copy(self, source: int, start: int, size: int) -> None:
        """Copy ``size`` bytes from the device address ``source`` to ``start``."""
        if size:
            kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
            checked(runtime.cudaMemcpy(self.address + start, source, size, kind))
