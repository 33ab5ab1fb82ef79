"""Small cases run over the emulator where there is no GPU, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

SMALL = Path(__file__).parent / "test_gpu_plan.py"
ENGINES = Path(__file__).parent / "test_engine_faults.py"
WITH_A_GPU = """
import sys, pytest
from mla_trt import cuda
cuda.find_gpu = lambda: cuda.Gpu("NVIDIA H200", "9.0", 141 << 30)
cuda._runtime = lambda: None
sys.exit(pytest.main(sys.argv[1:]))
"""


def _said_beside_a_gpu(cases: Path, kernels: Path, records: Path) -> str:
    """What pytest says where there seems to be a GPU."""
    environment = {**os.environ, "MLA_TRT_KERNELS": str(kernels), "MLA_TRT_ENGINES": str(records)}
    environment["PYTHONPATH"] = str(SMALL.parents[2])
    command = [sys.executable, "-c", WITH_A_GPU, "-q", "-rs", "-p", "no:cacheprovider", str(cases)]
    return subprocess.run(command, capture_output=True, text=True, env=environment).stdout.strip()


def test_a_library_that_is_missing_beside_a_gpu_is_not_stood_in_for(tmp_path: Path) -> None:
    """What passed then would look as if it had run on the GPU."""
    said = _said_beside_a_gpu(SMALL, tmp_path / "none.so", tmp_path)
    assert "skipped" in said.splitlines()[-1], said
    assert "passed" not in said.splitlines()[-1]
    assert "none.so': run 'mla-trt plugins build --kernels-only' first" in said


def test_engines_do_not_need_that_library(tmp_path: Path) -> None:
    """Theirs is the plugins': they skip for what they lack, here records."""
    said = _said_beside_a_gpu(ENGINES, tmp_path / "none.so", tmp_path)
    assert "there is no record" in said, said
    assert "kernels-only" not in said
