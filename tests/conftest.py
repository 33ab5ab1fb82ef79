"""What all tests share."""

from __future__ import annotations

import os

# Each process of `pytest -n` has its share of the cores. With more threads than that, products of matrices take several times as long: a
# thread spins while it waits for another, whose core runs the tests of another process. NumPy asks once, when it is first imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(threads, 1)))
