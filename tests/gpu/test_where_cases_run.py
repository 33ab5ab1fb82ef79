"""Small cases run over the emulator where there is no GPU, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

SMALL = Path(__file__).parent / "test_gpu_plan.py"
WITH_A_GPU = """
import sys, pytest
from mla_trt import cuda
cuda.find_gpu = lambda: cuda.Gpu("NVIDIA H200", "9.0", 141 << 30)
cuda._runtime = lambda: None
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_a_library_that_is_missing_beside_a_gpu_is_not_stood_in_for(tmp_path: Path) -> None:
    """What passed then would look as if it had run on the GPU."""
    environment = {**os.environ, "MLA_TRT_KERNELS": str(tmp_path / "none.so"), "PYTHONPATH": str(SMALL.parents[2])}
    command = [sys.executable, "-c", WITH_A_GPU, "-q", "-rs", "-p", "no:cacheprovider", str(SMALL)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    closing = result.stdout.strip().splitlines()[-1]
    assert "skipped" in closing, result.stdout + result.stderr
    assert "passed" not in closing
    assert "none.so': run 'mla-trt plugins build --kernels-only' first" in result.stdout
