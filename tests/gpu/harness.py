"""One op on the GPU, with every byte around and under its results watched; and comparisons that say where and by how much.

``run_op`` has the interface of ``tests/ops/op_harness.run_op``, so that a case runs on ONNX Runtime and on the GPU alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from mla_trt.cuda import Memory, Stream, synchronize
from mla_trt.ops import OPS, TensorType, infer_shapes, make_node
from mla_trt.ops.schema import TABLE
from mla_trt.plugins.kernel_library import Call, DeviceTensor, KernelLibrary
from mla_trt.plugins.library import KERNELS, find_library

Array = npt.NDArray[Any]

# outputs that an op updates in place, and the input each one is
CACHES = {"kv_cache_out": "kv_cache", "indexer_cache_out": "indexer_cache"}

POISON = 0xFF  # NaN in every float type, -1 in i32: what nobody wrote
GUARD = 0xA5
guard_bytes = 4096  # before and after each tensor; 0 lets compute-sanitizer see the tensors' true ends

_measured: list[tuple[str, Any]] = []


def record_to(properties: list[tuple[str, Any]]) -> None:
    """Let comparisons add what they measure to ``properties``, as ("measured", dict)."""
    global _measured
    _measured = properties


emulated: KernelLibrary | None = None  # in place of the GPU's


def library() -> KernelLibrary:
    """The kernel library under test."""
    return emulated or _library()


@functools.cache
def _library() -> KernelLibrary:
    return KernelLibrary(find_library(name=KERNELS).path)


class Guarded:
    """A tensor's memory between two guards, which hold ``guard`` bytes, ``shift`` bytes behind where it would begin."""

    def __init__(self, name: str, size: int, guard: int, shift: int = 0) -> None:
        self.name, self.size, self.guard, self.margin = name, size, guard, guard_bytes + shift
        self.memory = Memory(size + self.margin + guard_bytes)
        self.memory.fill(guard, 0, self.margin)
        self.memory.fill(guard, self.margin + size, guard_bytes)
        self.address = self.memory.address + self.margin

    def poison(self) -> None:
        self.memory.fill(POISON, self.margin, self.size)

    def write(self, values: Array) -> None:
        self.memory.write(values, self.margin)

    def read(self) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, behind `check`."""
        self.check()
        return self.memory.read(self.margin, self.size)

    def check(self) -> None:
        """An AssertionError names the first guard byte that changed."""
        for where, guard in (
            ("before", self.memory.read(0, self.margin)[::-1]),
            ("after", self.memory.read(self.margin + self.size)),
        ):
            touched = np.flatnonzero(guard != self.guard)
            assert not touched.size, (
                f"{self.name}: {touched.size} bytes {where} its {self.size} were written, "
                f"the nearest {int(touched[0]) + 1} away"
            )


def run_op(
    op_type: str,
    inputs: Mapping[str, Array],
    outputs: Sequence[str] | None = None,
    *,
    in_place: bool = True,
    repeat: int = 1,
    graph: bool = False,
    in_a_row: int = 1,
    shift: int = 0,
    **attributes: Any,
) -> dict[str, Array]:
    """The outputs by name, of the kernel library; bf16 outputs come back as f32.

    Outputs and workspace are NaN before each run. Bytes beside the outputs and the workspace, and all inputs, must stay
    as they were.

    Args:
        inputs: by formal name; ml_dtypes arrays for bf16 and e4m3.
        outputs: those that the node has; None: all.
        in_place: the caches' outputs are the memory of their inputs, as in an engine; else memory of their own.
        repeat: run this often from the same inputs; all runs must give the same bits.
        graph: launch a captured graph instead of enqueueing.
        in_a_row: calls of each run, over the same memory and without a pause: kernels of one may begin beside those of
            the one before. For ops that give the same when they are done again.
        shift: bytes behind an aligned address at which outputs begin that have memory of their own.
        attributes: of the op; defaults for those not given.

    Raises:
        KernelError: the library refused the call; UNSUPPORTED among the reasons.
        CudaError: the kernels failed; the process cannot use the GPU any more.
        AssertionError: stray writes, changed inputs, or runs that differ.
    """
    op = OPS[op_type]
    names = [output.name for output in op.outputs] if outputs is None else list(outputs)
    node = make_node(op_type, {name: name for name in inputs}, {name: f"{name}_result" for name in names}, **attributes)
    kinds = {
        name: TensorType(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape) for name, array in inputs.items()
    }
    tables = [
        formal.name for formal in op.inputs if formal.kind == TABLE
    ]  # kernels take more of them than the op set has
    inferred = infer_shapes(node, [kinds[name] if name and name not in tables else None for name in node.input])
    results = {name.removesuffix("_result"): kind for name, kind in zip(node.output, inferred, strict=True) if name}
    run = _Run(inputs, kinds, results, in_place, shift)
    try:
        call = library().call(
            op_type,
            op.complete(attributes, op_type),
            {name: _device_tensor(memory, kinds[name]) for name, memory in run.inputs.items()},
            {name: _device_tensor(memory, results[name]) for name, memory in run.outputs.items()},
        )
        return run.repeated(call, repeat, graph, in_a_row)
    finally:
        run.close()


def run_chain(
    arrays: Mapping[str, Array], links: Sequence[tuple[str, Sequence[str], Mapping[str, Any]]]
) -> dict[str, Array]:
    """Ops one behind the other on one stream without a pause, as an engine enqueues them: kernels of one may begin beside those of the one
    before. All have one workspace.

    Args:
        arrays: inputs by formal name, which means the same in all ops that have it.
        links: op type, outputs and attributes of each; what is no array comes from the last link before that makes it, and what several
            make lies in one place.

    Returns:
        the outputs, by formal name.
    """
    kinds = {
        name: TensorType(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape) for name, array in arrays.items()
    }
    memory = {name: Guarded(name, array.nbytes, POISON) for name, array in arrays.items()}
    for name, array in arrays.items():
        memory[name].write(np.ascontiguousarray(array))
    made: dict[str, TensorType] = {}
    calls = []
    stream = Stream()
    try:
        for op_type, outputs, attributes in links:
            op = OPS[op_type]
            given = [formal.name for formal in op.inputs if formal.name in kinds]
            node = make_node(op_type, {name: name for name in given}, {name: name for name in outputs}, **attributes)
            inferred = infer_shapes(node, [kinds[name] if name else None for name in node.input])
            for name, kind in zip(node.output, inferred, strict=True):
                if not name:
                    continue
                count = int(np.prod([int(dim or 0) for dim in kind.shape])) * _numpy_type(kind.dtype).itemsize
                if name not in memory:
                    memory[name] = memory[CACHES[name]] if name in CACHES else Guarded(name, count, GUARD)
                made[name] = kinds[name] = kind
            tensors = [
                {name: _device_tensor(memory[name], kinds[name]) for name in names} for names in (given, outputs)
            ]
            calls.append(library().call(op_type, op.complete(attributes, op_type), *tensors))
        workspace = memory["the workspace"] = Guarded("the workspace", max(c.workspace_bytes() for c in calls), GUARD)
        for name in (*(name for name in made if name not in CACHES), "the workspace"):
            memory[name].poison()
        synchronize()
        for call in calls:
            call.enqueue(workspace.address, workspace.size, stream.handle)
        stream.synchronize()
        workspace.check()
        return {name: _array(memory[name].read(), kind) for name, kind in made.items()}
    finally:
        for guarded in {*memory.values()}:
            guarded.memory.close()
        stream.close()


def _array(content: npt.NDArray[np.uint8], kind: TensorType) -> Array:
    values = content.view(_numpy_type(kind.dtype)).reshape([int(dim or 0) for dim in kind.shape])
    return values.astype(np.float32) if kind.dtype == TensorProto.BFLOAT16 else values


def _device_tensor(memory: Guarded, kind: TensorType) -> DeviceTensor:
    return DeviceTensor(memory.address, kind.dtype, tuple(int(dim or 0) for dim in kind.shape))


def _numpy_type(dtype: int) -> np.dtype[Any]:
    return helper.tensor_dtype_to_np_dtype(dtype)


class _Run:
    """The memory of one call."""

    def __init__(
        self,
        arrays: Mapping[str, Array],
        kinds: Mapping[str, TensorType],
        results: Mapping[str, TensorType],
        in_place: bool,
        shift: int,
    ) -> None:
        self.arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        self.results = results
        # reads beyond an input find NaN, or the index -1
        self.inputs = {name: Guarded(name, array.nbytes, POISON) for name, array in self.arrays.items()}
        self.shared = {name: CACHES[name] for name in results if in_place and name in CACHES}
        self.outputs: dict[str, Guarded] = {}
        for name, kind in results.items():
            if name in self.shared:
                self.outputs[name] = self.inputs[self.shared[name]]
                continue
            count = int(np.prod([int(dim or 0) for dim in kind.shape]))
            self.outputs[name] = Guarded(name, count * _numpy_type(kind.dtype).itemsize, GUARD, shift)
        self.workspace: Guarded | None = None
        self.stream = Stream()
        for name, memory in self.inputs.items():
            memory.write(self.arrays[name])

    def close(self) -> None:
        for memory in {*self.inputs.values(), *self.outputs.values(), *filter(None, [self.workspace])}:
            memory.memory.close()
        self.stream.close()

    def repeated(self, call: Call, repeat: int, graph: bool, in_a_row: int) -> dict[str, Array]:
        size = call.workspace_bytes()
        self.workspace = Guarded("the workspace", size, GUARD)
        address = self.workspace.address

        def enqueue() -> None:
            for _ in range(in_a_row):
                call.enqueue(address, size, self.stream.handle)

        captured = self.stream.capture(enqueue) if graph else None
        launch: Callable[[], None] = enqueue if captured is None else lambda: self.stream.launch(captured)
        first: dict[str, npt.NDArray[np.uint8]] = {}
        for number in range(repeat):
            self._prepare(restore=number > 0)
            launch()
            self.stream.synchronize()
            found = {name: memory.read() for name, memory in self.outputs.items()}
            self.workspace.check()
            if number == 0:
                first = found
            for name, content in found.items():
                different = np.flatnonzero(content != first[name])
                assert not different.size, (
                    f"{name}: run {number + 1} of {repeat} differs from the first in {different.size} bytes, "
                    f"the first at byte {int(different[0])}"
                )
        if captured is not None:
            captured.close()
        self._check_inputs()
        return {name: _array(content, self.results[name]) for name, content in first.items()}

    def _prepare(self, restore: bool) -> None:
        for name, memory in self.outputs.items():
            if name not in self.shared:
                memory.poison()
            elif restore:
                memory.write(self.arrays[self.shared[name]])
        assert self.workspace is not None
        self.workspace.poison()
        synchronize()

    def _check_inputs(self) -> None:
        for name, memory in self.inputs.items():
            if name in self.shared.values():
                continue
            expected = self.arrays[name].reshape(-1).view(np.uint8)
            changed = np.flatnonzero(memory.read() != expected)
            assert not changed.size, f"the input {name} was changed in {changed.size} bytes, first {int(changed[0])}"


@dataclass(frozen=True)
class Measured:
    """How far a result is from what was expected.

    Attributes:
        what: the tensor, and what it was compared with.
        error: the largest difference, in units of ``scale``.
        tolerance: what ``error`` may be.
        scale: the largest magnitude expected, 1 for absolute errors, or the unit there.
        index: where the largest difference is.
        found, expected: the values there.
        wrong: values beyond the tolerance.
        of: values compared.
    """

    what: str
    error: float
    tolerance: float
    scale: float
    index: tuple[int, ...]
    found: float
    expected: float
    wrong: int
    of: int

    def __str__(self) -> str:
        return (
            f"{self.what}: error {self.error:.3g} > {self.tolerance:.3g} (of {self.scale:.4g}) at {list(self.index)}: "
            f"found {self.found:.8g}, expected {self.expected:.8g}; {self.wrong} of {self.of} values are wrong"
        )


def compare(
    what: str,
    found: Array,
    expected: Array,
    tolerance: float,
    *,
    absolute: bool = False,
    units: Array | None = None,
) -> Measured:
    """Infinities alike, and finite values within ``tolerance`` of the largest one expected (or absolutely, or times each
    value's own unit).

    The measurement goes to the results; where it is not within the tolerance, an AssertionError is its one line.
    """
    assert found.shape == expected.shape, f"{what}: found the shape {found.shape}, expected {expected.shape}"
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    scale = 1.0 if absolute else max(float(np.abs(expected[finite]).max(initial=0.0)), 1e-30)
    scales = np.full(expected.shape, scale) if units is None else np.maximum(units, 1e-30)
    with np.errstate(invalid="ignore"):
        error = np.abs(found - expected) / scales
    error = np.where(finite, error, np.where(found == expected, 0.0, np.inf))
    error[np.isnan(error)] = np.inf  # unwritten, or computed from unwritten
    at = np.unravel_index(int(error.argmax()), error.shape) if error.size else ()
    measured = Measured(
        what,
        float(error[at]) if error.size else 0.0,
        tolerance,
        float(scales[at]) if error.size else scale,
        tuple(int(axis) for axis in at),
        float(found[at]) if error.size else 0.0,
        float(expected[at]) if error.size else 0.0,
        int((error > tolerance).sum()),
        int(error.size),
    )
    _measured.append(("measured", asdict(measured)))
    assert measured.error <= tolerance, str(measured)
    return measured


def compare_exactly(what: str, found: Array, expected: Array) -> None:
    """All elements equal; integers, or bits."""
    assert found.shape == expected.shape, f"{what}: found the shape {found.shape}, expected {expected.shape}"
    different = np.argwhere(found != expected)
    measured = {"what": what, "error": float(len(different)), "tolerance": 0.0, "of": int(found.size)}
    _measured.append(("measured", measured))
    if len(different):
        at = tuple(different[0])
        raise AssertionError(
            f"{what}: {len(different)} of {found.size} differ, the first at {[int(axis) for axis in at]}: "
            f"found {found[at]}, expected {expected[at]}"
        )
