"""The emulator's own rules: what a GPU does late is late, what it does early is early, and what never ends is said."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from emulator_library import built

ROW = np.arange(256, dtype=np.uint8)
LATE, EARLY = 0, 1


@pytest.fixture(scope="module")
def machine() -> ctypes.CDLL:
    with built(Path(__file__).parent / "cases") as path:
        library = ctypes.CDLL(str(path))
    library.emulator_synchronize.restype = ctypes.c_char_p
    library.run_case.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_bool]
    library.run_product.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_bool]
    return library


def run(machine: ctypes.CDLL, name: str, *, right: bool = True, order: int = LATE) -> tuple[npt.NDArray[np.uint8], str]:
    """What the case wrote, zeros where nothing, and what the emulator said."""
    out = np.zeros(256, np.uint8)
    machine.emulator_set(2, order, 1)
    assert machine.run_case(name.encode(), ROW.ctypes.data, out.ctypes.data, right) == 0
    return out, (machine.emulator_synchronize() or b"").decode()


@pytest.mark.parametrize("order", [LATE, EARLY])
def test_a_copy_that_is_waited_for_is_there(machine: ctypes.CDLL, order: int) -> None:
    out, said = run(machine, "copied_row", order=order)
    assert said == ""
    assert np.array_equal(out[:128], ROW[:128])


def test_a_copy_that_is_not_waited_for_is_late(machine: ctypes.CDLL) -> None:
    out, said = run(machine, "copied_row", right=False)
    assert said == ""
    assert (out[:128] == 0xFF).all()


def test_a_copy_from_behind_the_end_of_the_memory_is_said(machine: ctypes.CDLL) -> None:
    machine.emulator_memory.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    for size, message in ((128, ""), (96, "copy_bytes: reads 32 bytes behind the end of the memory"), (0, "")):
        machine.emulator_memory(ROW.ctypes.data, size)
        _, said = run(machine, "copied_row")
        assert message in said
        assert bool(said) == bool(message)


def test_a_copy_to_a_place_that_is_still_read_is_early(machine: ctypes.CDLL) -> None:
    for right in (True, False):
        out, said = run(machine, "two_rows", right=right, order=EARLY)
        assert said == ""
        assert np.array_equal(out[:128], ROW[:128] if right else ROW[128:])


def test_a_kernel_that_does_not_wait_for_the_one_before_is_first(machine: ctypes.CDLL) -> None:
    for right in (True, False):
        out, said = run(machine, "early", right=right)
        assert said == ""
        assert np.array_equal(out[:128], ROW[:128])
        assert np.array_equal(out[128:], ROW[:128] if right else np.zeros(128))


def test_blocks_of_a_cluster_read_from_each_other(machine: ctypes.CDLL) -> None:
    out, said = run(machine, "cluster")
    assert said == ""
    assert list(out[:5]) == [8, 9, 10, 7, 0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("endless", "nobody can run; 32 of block 0: named barrier 1"),
        ("parted", "lanes of a warp part: __shfl_sync and __syncwarp, block 0 thread (16|48)"),
        ("leaves_early", "block 0 ends while copies to its shared memory are under way"),
        ("never_waits", "block 0 of a kernel that was launched early ends, and did not wait for the kernel before"),
        ("too_large", "a block has 308224 bytes of shared memory, more than there are"),
    ],
)
def test_what_no_gpu_does_well_is_said_and_the_next_launch_is_well(
    machine: ctypes.CDLL, name: str, reason: str
) -> None:
    assert re.search(reason, run(machine, name)[1])
    out, said = run(machine, "copied_row")
    assert said == ""
    assert np.array_equal(out[:128], ROW[:128])


def product(machine: ctypes.CDLL, form: int, a: npt.NDArray, b: npt.NDArray, *, right: bool = True) -> npt.NDArray:
    d = np.zeros((64, 64), np.float32)
    machine.emulator_set(2, LATE, 1)
    assert machine.run_product(form, a.ctypes.data, b.ctypes.data, d.ctypes.data, right) == 0
    assert machine.emulator_synchronize() is None
    return d


def test_sums_of_products_of_codes_keep_14_bits(machine: ctypes.CDLL) -> None:
    a, b = (np.zeros((64, 128), ml_dtypes.float8_e4m3fn) for _ in range(2))
    b[:, 32:64] = 1
    b[:, 32] = 64
    a[:3, 32], a[:3, 33] = [128, 256, -256], [1, 1, -1]  # 2^13 + 1, 2^14 + 1
    a[3, 33:64] = 1  # 31, and no large one
    found = product(machine, 0, a, b)[:4]
    assert np.array_equal(found, np.repeat([[8193], [16384], [-16384], [31]], 64, axis=1))
    b[:, :32] = 0
    b[:, 1] = 1
    # the sum so far is cut off too
    assert np.array_equal(product(machine, 1, a, b)[:4], np.repeat([[8194], [16384], [-16384], [32]], 64, axis=1))


def test_products_of_four_warps(machine: ctypes.CDLL) -> None:
    generator = np.random.default_rng(1)
    a, b = (generator.normal(size=(64, 128)).astype(ml_dtypes.float8_e4m3fn) for _ in range(2))
    left, right = a.astype(np.float32), b.astype(np.float32)
    cut = 34 * 2.0**-9  # no sum is above 2^5
    assert np.allclose(product(machine, 0, a, b), left[:, 32:64] @ right[:, 32:64].T, atol=cut)
    both = left[:, 32:64] @ (right[:, :32] + right[:, 32:64]).T
    assert np.allclose(product(machine, 1, a, b), both, atol=2 * cut)

    a, b = (generator.normal(size=(64, 64)).astype(ml_dtypes.bfloat16) for _ in range(2))
    left, right = a.astype(np.float32), b.astype(np.float32)
    for form in (2, 5):
        assert np.allclose(product(machine, form, a, b), left[:, 16:32] @ right[:, 16:32].T, atol=1e-4)
    for form in (3, 4):
        assert np.allclose(product(machine, form, a, b), left[:, 16:32] @ right[16:32], atol=1e-4)
        assert (product(machine, form, a, b, right=False) == 0).all()
