"""CUDA for Python: the GPU that there is, memory, streams and graphs. Every return code is checked.

`cuda.bindings` is imported when a GPU is used, never before.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mla_trt.errors import MlaTrtError

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
LEAST_ALLOCATION = 256


class NoGpuError(MlaTrtError):
    """This machine has no GPU that can be used."""


class CudaError(MlaTrtError):
    """CUDA failed, which often ends the process's use of the GPU."""


class OutOfMemoryError(MlaTrtError):
    """An allocation does not fit. Nothing else is lost."""


@dataclass(frozen=True)
class Gpu:
    """The GPU that is used: the first that CUDA shows.

    Attributes:
        name: such as "NVIDIA H200".
        compute_capability: such as "9.0".
        memory: bytes.
    """

    name: str
    compute_capability: str
    memory: int


def find_gpu() -> Gpu:
    """The GPU, by the driver alone. TensorRT ends the process where there is none, so this is asked first.

    Raises:
        NoGpuError: there is no driver, or it shows no GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise NoGpuError(
            "there is no NVIDIA driver on this machine (libcuda.so.1 was not found): engines are built and run on a GPU; "
            "on a CPU, 'mla-trt run' takes the folder that 'mla-trt lower' wrote"
        ) from None
    count, major, minor, device = (ctypes.c_int() for _ in range(4))
    memory = ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        raise NoGpuError(
            f"the NVIDIA driver shows no GPU (CUDA error {status}): see what nvidia-smi says, and CUDA_VISIBLE_DEVICES"
        )
    status = (
        driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    )
    if status:
        raise NoGpuError(f"the NVIDIA driver does not describe the GPU (CUDA error {status}): see what nvidia-smi says")
    return Gpu(name.value.decode(), f"{major.value}.{minor.value}", memory.value)


def check_usable() -> None:
    """Asks for all that the rest of this module needs.

    Raises:
        NoGpuError: there is no GPU, or cuda-python is not installed.
    """
    find_gpu()
    _runtime()


@functools.cache
def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise NoGpuError("the Python package cuda-python is not installed: pip install cuda-python") from None
    return runtime


def _call(function: str, *arguments: Any) -> Any:
    runtime = _runtime()
    error, *values = getattr(runtime, function)(*arguments)
    if int(error):
        if error == runtime.cudaError_t.cudaErrorMemoryAllocation:
            runtime.cudaGetLastError()
            size = f"{arguments[0] / 2**30:.1f} GiB more" if function.startswith("cudaMalloc") else "what CUDA needs"
            raise OutOfMemoryError(
                f"there is not enough memory for {size} ({function}): an engine takes less with fewer --pages, "
                "or built with smaller limits"
            )
        text = runtime.cudaGetErrorString(error)[1]
        raise CudaError(f"CUDA: {function} failed: {text.decode()} ({error.name})")
    return values[0] if values else None


def properties() -> Any:
    """The GPU's cudaDeviceProp. Raises CudaError, as everything below."""
    return _call("cudaGetDeviceProperties", 0)


def synchronize() -> None:
    """Waits for everything that the GPU has to do."""
    _call("cudaDeviceSynchronize")


class Stream:
    """A CUDA stream that waits for no other.

    Attributes:
        handle: the cudaStream_t.
    """

    def __init__(self) -> None:
        self._stream = _call("cudaStreamCreateWithFlags", _runtime().cudaStreamNonBlocking)
        self.handle = int(self._stream)

    def close(self) -> None:
        """Ends the stream."""
        _call("cudaStreamDestroy", self._stream)

    def synchronize(self) -> None:
        """Waits for everything on the stream; raises CudaError for what failed in it."""
        _call("cudaStreamSynchronize", self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copies bytes from any address to any address."""
        if size:
            kind = _runtime().cudaMemcpyKind.cudaMemcpyDefault
            _call("cudaMemcpyAsync", target, source, size, kind, self._stream)

    def clear(self, address: int, size: int) -> None:
        """Sets device memory to zero."""
        if size:
            _call("cudaMemsetAsync", address, 0, size, self._stream)

    def capture(self, work: Callable[[], None]) -> Graph:
        """The work that ``work`` puts on this stream, as a graph.

        Raises:
            CudaError: it cannot be captured. As when ``work`` raises, the stream is then as it was before.
        """
        mode = _runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            status, graph = _runtime().cudaStreamEndCapture(self._stream)
            if not int(status):
                _call("cudaGraphDestroy", graph)
            _runtime().cudaGetLastError()  # is met by the next launch otherwise
            raise
        try:
            return Graph(_call("cudaStreamEndCapture", self._stream))
        except CudaError:
            _runtime().cudaGetLastError()
            raise

    def launch(self, graph: Graph) -> None:
        """Puts a graph's work on the stream."""
        _call("cudaGraphLaunch", graph.executable, self._stream)

    def record(self) -> Any:
        """An event at this point of the stream."""
        event = _call("cudaEventCreate")
        _call("cudaEventRecord", event, self._stream)
        return event


def milliseconds(start: Any, end: Any) -> float:
    """Device time between two events that have passed; destroys them."""
    elapsed = float(_call("cudaEventElapsedTime", start, end))
    for event in (start, end):
        _call("cudaEventDestroy", event)
    return elapsed


class Graph:
    """A captured graph, ready to launch."""

    def __init__(self, graph: Any) -> None:
        try:
            self.executable = _call("cudaGraphInstantiate", graph, 0)
        finally:
            _call("cudaGraphDestroy", graph)

    def close(self) -> None:
        """Frees it."""
        _call("cudaGraphExecDestroy", self.executable)


class Memory:
    """Device memory, aligned to 256 bytes. What is read and written is there when the method returns.

    Raises:
        OutOfMemoryError: it does not fit.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = int(_call("cudaMalloc", max(size, 1)))

    def close(self) -> None:
        """Frees it."""
        _call("cudaFree", self.address)

    def fill(self, byte: int, start: int = 0, size: int | None = None) -> None:
        """Sets ``size`` bytes (None: all from ``start``)."""
        count = self.size - start if size is None else size
        if count:
            _call("cudaMemset", self.address + start, byte, count)

    def write(self, values: npt.NDArray[Any], start: int = 0) -> None:
        """Copies an array to ``start``."""
        values = np.ascontiguousarray(values)
        self._copy(self.address + start, values.ctypes.data, values.nbytes)

    def read(self, start: int = 0, size: int | None = None) -> npt.NDArray[np.uint8]:
        """``size`` bytes (None: all from ``start``)."""
        values = np.empty(self.size - start if size is None else size, np.uint8)
        self._copy(values.ctypes.data, self.address + start, values.nbytes)
        return values

    def copy(self, source: int, start: int, size: int) -> None:
        """Copies ``size`` bytes from the device address ``source`` to ``start``."""
        self._copy(self.address + start, source, size)

    def _copy(self, target: int, source: int, size: int) -> None:
        if size:
            _call("cudaMemcpy", target, source, size, _runtime().cudaMemcpyKind.cudaMemcpyDefault)


class _Buffer:
    """Memory that grows. Its address changes when it does.

    Args:
        stream: what works on the memory.
    """

    _allocate: str
    _free: str

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._size = 0
        self.address = 0

    def reserve(self, size: int) -> int:
        """The address of at least ``size`` bytes. What was there before is lost if it had to grow."""
        if size > self._size or not self.address:
            self.free()
            size = grown(size)
            self.address = int(_call(self._allocate, size))
            self._size = size
        return self.address

    def free(self) -> None:
        """Gives the memory back."""
        if self.address:
            self._stream.synchronize()
            _call(self._free, self.address)
            self.address, self._size = 0, 0


class DeviceBuffer(_Buffer):
    """Device memory that grows. Its address changes when it does."""

    _allocate, _free = "cudaMalloc", "cudaFree"


class PinnedBuffer(_Buffer):
    """Host memory that grows and that the GPU reads and writes directly, as arrays."""

    _allocate, _free = "cudaMallocHost", "cudaFreeHost"

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array over the memory's beginning. It is of no use after the next one was asked for."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        address = self.reserve(size)
        memory = (ctypes.c_ubyte * self._size).from_address(address)
        return np.ctypeslib.as_array(memory)[:size].view(dtype).reshape(shape)


def grown(size: int) -> int:
    """A size to allocate where ``size`` is needed now and a little more soon."""
    return max(LEAST_ALLOCATION, 1 << max(0, size - 1).bit_length()) if size < 1 << 28 else size
