"""A GPU for the tests of tests/gpu where there is none: the kernels' sources, compiled for this CPU, and memory of the host."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from cuda_stand_in import HostRuntime, Status
from emulator_library import EmulatorError, built

from mla_trt import cuda
from mla_trt.plugins.kernel_library import Call, KernelLibrary

ALIGNMENT = 256


class EmulatedRuntime(HostRuntime):
    """The stand-in for CUDA, whose addresses are aligned as a GPU's. Kernels run when they are waited for, or memory is touched: those of
    calls in a row all together, as on a stream.

    Args:
        run: runs what is on the machine's stream.
        tell: is told where memory begins and how much of it there is; 0: no more.
    """

    def __init__(self, run: Callable[[], None], tell: Callable[[int, int], None]) -> None:
        super().__init__()
        self._run, self._tell = run, tell

    def cudaMemset(self, address: int, byte: int, size: int) -> tuple[Status]:
        self._run()
        return super().cudaMemset(address, byte, size)

    def cudaMemcpy(self, target: int, source: int, size: int, kind: int) -> tuple[Status]:
        self._run()
        return super().cudaMemcpy(target, source, size, kind)

    def cudaDeviceSynchronize(self) -> tuple[Status]:
        self._run()
        return super().cudaDeviceSynchronize()

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:
        self._run()
        return super().cudaStreamSynchronize(stream)

    def cudaMalloc(self, size: int) -> tuple[Status, int]:
        status, address = super().cudaMalloc(size + ALIGNMENT)
        if status:
            return status, address
        aligned = -(-address // ALIGNMENT) * ALIGNMENT
        self.blocks[aligned] = self.blocks.pop(address)
        self._tell(aligned, size)
        return status, aligned

    def cudaFree(self, address: int) -> tuple[Status]:
        self._run()
        self._tell(address, 0)
        return super().cudaFree(address)


class EmulatedGpu:
    """Kernels and memory, in place of the GPU's between `install` and `remove`.

    Args:
        early: copies and products are done at once, and kernels in their order; else all of it comes as late, and the next
            kernel as early, as the kernels allow.
        hopper: the kernels for sm_90a are there, else the portable ones alone.

    Attributes:
        library: the kernels.

    Raises:
        EmulatorError: a source does not compile.
        PluginLibraryError: CUDA's headers are not here.
    """

    def __init__(self, *, early: bool = False, hopper: bool = True) -> None:
        with built() as path:
            self.library = KernelLibrary(path)
            self._machine = ctypes.CDLL(str(path))
        self._machine.emulator_synchronize.restype = ctypes.c_char_p
        self._early, self._hopper = early, hopper
        self._machine.emulator_memory.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        self._runtime = EmulatedRuntime(self._run, self._machine.emulator_memory)
        self._before: tuple[Any, Any] | None = None

    def install(self, multiprocessors: int = 16) -> None:
        """From now on this process has this GPU. As many blocks of a kernel live at a time as it has multiprocessors,
        but 16 at most."""
        self._machine.emulator_set(multiprocessors, int(self._early), int(self._hopper))
        enqueue = Call.enqueue

        def put(call: Call, *arguments: Any) -> None:
            self._runtime.put(lambda: enqueue(call, *arguments))

        self._before = cuda._runtime, enqueue
        cuda._runtime = lambda: self._runtime
        Call.enqueue = put  # type: ignore[method-assign]

    def remove(self) -> None:
        """From now on it has what it had before."""
        if self._before is not None:
            cuda._runtime, Call.enqueue = self._before  # type: ignore[method-assign]
        self._before = None

    def _run(self) -> None:
        if message := self._machine.emulator_synchronize():
            raise EmulatorError(message.decode())
