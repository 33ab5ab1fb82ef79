"""The little of CUDA that an engine needs: a look for the driver, memory, a stream, graphs.

`cuda.bindings` is imported when a GPU is used, never before.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_trt.errors import MlaTrtError

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
LEAST_ALLOCATION = 256


class NoGpuError(MlaTrtError):
    """This machine has no GPU that can be used."""


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


class Cuda:
    """The CUDA runtime with one stream.

    Raises:
        MlaTrtError: cuda-python is not installed, or CUDA fails; so does every method.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            raise MlaTrtError("the Python package cuda-python is not installed: pip install cuda-python") from None
        self._runtime = runtime
        self.stream = int(self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking))

    def synchronize(self) -> None:
        """Waits for everything on the stream."""
        self._call("cudaStreamSynchronize", self.stream)

    def allocate(self, size: int) -> int:
        """Device memory of at least one byte."""
        return int(self._call("cudaMalloc", max(size, LEAST_ALLOCATION)))

    def free(self, pointer: int) -> None:
        """Frees device memory."""
        self._call("cudaFree", pointer)

    def allocate_pinned(self, size: int) -> int:
        """Host memory that the GPU reads and writes directly."""
        return int(self._call("cudaMallocHost", max(size, LEAST_ALLOCATION)))

    def free_pinned(self, pointer: int) -> None:
        """Frees it."""
        self._call("cudaFreeHost", pointer)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copies bytes from anywhere to anywhere, on the stream."""
        if size:
            kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
            self._call("cudaMemcpyAsync", target, source, size, kind, self.stream)

    def clear(self, pointer: int, size: int) -> None:
        """Sets device memory to zero, on the stream."""
        if size:
            self._call("cudaMemsetAsync", pointer, 0, size, self.stream)

    def begin_capture(self) -> None:
        """What is put on the stream from now on is recorded rather than run."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)

    def end_capture(self) -> Any:
        """Ends the recording and returns it, ready to be launched."""
        graph = self._call("cudaStreamEndCapture", self.stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, executable: Any) -> None:
        """Runs a recording on the stream."""
        self._call("cudaGraphLaunch", executable, self.stream)

    def destroy(self, executable: Any) -> None:
        """Frees a recording."""
        self._call("cudaGraphExecDestroy", executable)

    def forget_error(self) -> None:
        """Takes back an error that does not matter."""
        self._runtime.cudaGetLastError()

    def close(self) -> None:
        """Ends the stream."""
        self._call("cudaStreamDestroy", self.stream)

    def _call(self, function: str, *arguments: Any) -> Any:
        error, *values = getattr(self._runtime, function)(*arguments)
        if int(error):
            if error == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
                raise MlaTrtError(
                    f"there is not enough memory for {arguments[0] / 2**30:.1f} GiB more ({function}): "
                    "use fewer --pages, or build the engine with smaller limits"
                )
            text = self._runtime.cudaGetErrorString(error)[1]
            raise MlaTrtError(f"CUDA: {function} failed: {text.decode()} ({error.name})")
        return values[0] if values else None


class DeviceBuffer:
    """Device memory that grows. Its address changes when it does."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._size = 0
        self.pointer = 0

    def reserve(self, size: int) -> int:
        """The address of at least `size` bytes. What was there before is lost if it had to grow."""
        if size > self._size or not self.pointer:
            self.free()
            size = grown(size)
            self.pointer = self._cuda.allocate(size)
            self._size = size
        return self.pointer

    def free(self) -> None:
        """Gives the memory back."""
        if self.pointer:
            self._cuda.synchronize()
            self._cuda.free(self.pointer)
            self.pointer, self._size = 0, 0


class PinnedBuffer:
    """Pinned host memory that grows, as arrays."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._size = 0
        self.pointer = 0

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array over the memory's beginning. It is of no use after the next one was asked for."""
        count = int(np.prod(shape, dtype=np.int64))
        size = count * dtype.itemsize
        if size > self._size or not self.pointer:
            self.free()
            size = grown(size)
            self.pointer = self._cuda.allocate_pinned(size)
            self._size = size
        memory = (ctypes.c_ubyte * self._size).from_address(self.pointer)
        return np.ctypeslib.as_array(memory)[: count * dtype.itemsize].view(dtype).reshape(shape)

    def free(self) -> None:
        """Gives the memory back."""
        if self.pointer:
            self._cuda.synchronize()
            self._cuda.free_pinned(self.pointer)
            self.pointer, self._size = 0, 0


def grown(size: int) -> int:
    """A size to allocate where `size` is needed now and a little more soon."""
    return max(LEAST_ALLOCATION, 1 << max(0, size - 1).bit_length()) if size < 1 << 28 else size
