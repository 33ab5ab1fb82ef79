"""Bad input for an engine is an error or a masked result: never a crash, never another sequence's data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engine_sessions import ROOT, records_folder

pytestmark = pytest.mark.engines

RECORDS = records_folder()
RECORD = "packed2d_gemm_mm__dynamo_op20__hand__dec"  # takes embeddings
SECONDS = 180

REFUSED = {
    "another TensorRT": "the engine was built with TensorRT 9.9.9",
    "another GPU": "the engine was built for compute capability 1.0",
    "another plugin library": "the engine was built with plugins of version 0.0.0",
    "damaged plan": "TensorRT cannot load",
    "shortened plan": "TensorRT cannot load",
    "other files": "is not the plan that",
    "beyond the profile": "the step has 33 tokens, the engine takes 32",
    "too many sequences": "the step has 5 sequences, the engine takes 4",
}
UNHARMED = (
    "pages out of range",
    "negative pages",
    "longer than its pages",
    "a length beyond everything",
    "a negative length",
    "NaN in the input",
    "afterwards",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each fault did."""
    from mla_trt.cuda import find_gpu
    from mla_trt.engines.tensorrt_api import load_tensorrt
    from mla_trt.errors import MlaTrtError

    if not (RECORDS / RECORD).is_dir():
        pytest.skip(f"there is no record {RECORD} in {RECORDS}: make it with tests/gpu/prepare_engines.py")
    try:
        find_gpu()
        load_tensorrt()
    except MlaTrtError as error:
        pytest.skip(str(error))
    script = Path(__file__).with_name("engine_faults.py")
    scratch = tmp_path_factory.mktemp("faults")
    command = [sys.executable, str(script), str(RECORDS / RECORD), str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS)
    last = " | ".join(done.stderr.strip().splitlines()[-3:])[-600:]
    assert done.returncode == 0, f"ended with {done.returncode}: {last}"
    found: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.parametrize("fault", REFUSED)
def test_it_is_refused_with_a_reason(fault: str, outcomes: dict[str, str]) -> None:
    assert outcomes[fault].startswith("error: ")
    assert REFUSED[fault] in outcomes[fault]


@pytest.mark.parametrize("fault", UNHARMED)
def test_the_other_sequence_is_unharmed(fault: str, outcomes: dict[str, str]) -> None:
    assert outcomes[fault] == "unharmed"
