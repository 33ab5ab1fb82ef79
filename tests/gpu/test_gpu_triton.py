"""Engines in a real tritonserver on a GPU: in Triton's TensorRT backend with the pages in the plugins, and in the Python backend.

    python tests/gpu/prepare_engines.py EXPORTS -o build/engines --only deepseek_v3__dynamo_op18    # once, without a GPU
    MLA_TRT_TRITON_TENSORRT_BACKEND=libtriton_tensorrt.so python -m pytest tests/gpu/test_gpu_triton.py

$MLA_TRT_TRITON_TENSORRT_BACKEND is Triton's TensorRT backend, built from its source for this TensorRT; without it only the
Python backend is tested. What it needs is looked for in $TENSORRT_ROOT/lib, $LD_LIBRARY_PATH, the CUDA toolkit and Python's CUDA
packages. $MLA_TRT_TRITON_ENVIRONMENT is the Python environment with tritonserver (nvidia-pytriton), numpy below 2, and what engines
need (default: .venv-triton). $MLA_TRT_ENGINES as in test_engines.py. Rates go to $OUT/triton.json (default: build/triton.json).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from engine_sessions import ROOT, VARIANTS, Record, records_folder

from mla_trt.engines.building import BuildOptions, build_file
from mla_trt.engines.engine_file import IO, RESIDENT
from mla_trt.engines.engine_onnxruntime import OnnxRuntimeEngine
from mla_trt.plugins.library import find_library
from mla_trt.serving.triton_repository import PYTHON, TENSORRT, Settings, write_repository
from mla_trt.session import Session

sys.path.append(str(ROOT / "tests"))
triton_server = pytest.importorskip("triton_server", reason="tritonclient is not installed")
from triton_server import Answer, TritonServer, missing, tensorrt_backend  # noqa: E402

pytestmark = pytest.mark.engines

RECORD = "deepseek_v3__dynamo_op18__sdpa__dec"
BACKEND = os.environ.get("MLA_TRT_TRITON_TENSORRT_BACKEND")
OUT = Path(os.environ.get("OUT", ROOT / "build"))
PAGES = 120  # of 4 tokens: fewer than the requests below want at a time
LENGTH = 240
TOLERANCE = 2e-4

FORMS = {"held": (PYTHON, IO), "held_resident": (PYTHON, RESIDENT), "asked": (TENSORRT, RESIDENT)}
"""By name of a model: the backend that runs its engine, and where the engine has its pages."""
CHOSEN = [name for name, (backend, _) in FORMS.items() if BACKEND or backend == PYTHON]


def _reason() -> str | None:
    """Why nothing can be run here."""
    from mla_trt.cuda import find_gpu
    from mla_trt.engines.tensorrt_api import load_tensorrt
    from mla_trt.errors import MlaTrtError

    if missing() is not None:
        return missing()
    if not (records_folder() / RECORD).is_dir():
        return f"there is no record {RECORD}: make it with tests/gpu/prepare_engines.py"
    try:
        find_gpu()
        load_tensorrt()
        find_library()
    except MlaTrtError as error:
        return str(error)
    return None


def _library_folders() -> list[Path]:
    named = [Path(os.environ[name]) / "lib" for name in ("TENSORRT_ROOT",) if name in os.environ]
    named += [Path(entry) for entry in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if entry]
    packages = [Path(entry) / "nvidia" / folder / "lib" for entry in sys.path for folder in ("cu13", "cuda_runtime")]
    return [*named, Path("/usr/local/cuda/lib64"), *packages]


def start(repository: Path, folder: Path, *, plugins: Path | None) -> TritonServer:
    """A server with the backends that there are."""
    if BACKEND is None:
        return TritonServer(repository, folder)
    options = [f"--backend-config=tensorrt,plugins={plugins}"] if plugins is not None else []
    backend = Path(BACKEND)
    return TritonServer(
        repository, folder, *options, tensorrt=lambda target: tensorrt_backend(backend, _library_folders(), target)
    )


def load(server: TritonServer, name: str) -> None:
    """Loads a model, and before that its engine where it is a model of its own."""
    if FORMS[name][0] == TENSORRT:
        server.load(f"{name}_engine")
    server.load(name)


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    reason = _reason()
    if reason is not None:
        pytest.skip(reason)
    return VARIANTS["resident"].model(Record.load(records_folder() / RECORD).model)


@pytest.fixture(scope="module")
def repository(model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a model of each form."""
    folder = tmp_path_factory.mktemp("engines")
    onnx.save(model, folder / "model.onnx")
    plugins = find_library().path
    for cache in {cache for _, cache in FORMS.values()}:
        options = BuildOptions(
            cache=cache,
            pages=PAGES,
            max_batch=8,
            max_tokens=64,
            max_length=LENGTH,
            optimization_level=0,
            workspace=1 << 30,
            plugins=plugins,
        )
        build_file(folder, folder / f"{cache}.engine", options)
    settings = Settings(max_batch=8, max_step_tokens=64, drain_seconds=1)
    for name in CHOSEN:
        backend, cache = FORMS[name]
        engine = folder / f"{cache}.engine"
        write_repository(engine, folder / "models", settings, name=name, backend=backend, plugins=plugins)
    return folder / "models"


@pytest.fixture(scope="module")
def reference(model: onnx.ModelProto) -> Callable[[list[int], list[int]], None]:
    """Fails where tokens are not those that the model gives on ONNX Runtime."""
    session = Session(OnnxRuntimeEngine(model, pages=2 * PAGES))
    return lambda prompt, tokens: assert_likeliest(session, prompt, tokens)


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with start(repository, tmp_path_factory.mktemp("server"), plugins=find_library().path) as started:
        yield started


def assert_likeliest(session: Session, prompt: list[int], tokens: list[int]) -> None:
    """Each token has the largest logit of all after what stands before it, but for what rounding may exchange."""
    sequence = session.create()
    given = np.array([*prompt, *tokens[:-1]])
    logits = session.step({sequence: given})[sequence][session.engine.results[0]][len(prompt) - 1 :]
    session.free(sequence)
    chosen = logits[np.arange(len(tokens)), tokens]
    behind = (logits.max(axis=1) - chosen) / np.abs(logits).max()
    worst = int(np.argmax(behind))
    assert behind[worst] <= TOLERANCE, (
        f"token {worst} of {len(tokens)} is {tokens[worst]}, not {logits[worst].argmax()}"
    )


def requests(count: int) -> list[tuple[list[int], int]]:
    """Prompts, half of which begin alike, and how many tokens to add."""
    draw = random.Random(0)
    beginning = [draw.randrange(64) for _ in range(22)]
    return [
        (
            (beginning if case % 2 else []) + [draw.randrange(64) for _ in range(draw.randint(1, 90))],
            draw.randint(20, 90),
        )
        for case in range(count)
    ]


def ask_all(server: TritonServer, name: str, asked: list[tuple[list[int], int]]) -> tuple[list[Answer], float]:
    """All at once but for a few milliseconds; every fifth goes away in the middle. The answers, and the seconds that it took."""

    def ask(case: int) -> Answer:
        time.sleep(case % 8 * 0.01)
        prompt, count = asked[case]
        answer = Answer(server, name, prompt, max_new_tokens=count)
        if case % 5:
            return answer.wait()
        while len(answer.tokens) < 3:
            answer.read()
        answer.vanish()
        return answer

    began = time.monotonic()
    with ThreadPoolExecutor(len(asked)) as clients:
        answers = list(clients.map(ask, range(len(asked))))
    return answers, time.monotonic() - began


@pytest.mark.parametrize("name", FORMS)
def test_clients_that_share_batches_get_the_tokens_of_onnx_runtime(
    server: TritonServer, reference: Callable[[list[int], list[int]], None], name: str
) -> None:
    if name not in CHOSEN:
        pytest.skip("$MLA_TRT_TRITON_TENSORRT_BACKEND names no TensorRT backend of Triton")
    load(server, name)
    try:
        asked = requests(32)
        ask_all(server, name, asked[:4])
        answers, seconds = ask_all(server, name, asked)
        for case, (answer, (prompt, count)) in enumerate(zip(answers, asked, strict=True)):
            assert answer.error is None
            assert not case % 5 or (len(answer.tokens), answer.finish) == (count, "length")
            reference(prompt, answer.tokens)
        values = server.wait_for(running=0, waiting=0)
        assert values["mla_trt_pages"] == PAGES
        assert values["mla_trt_pages_in_use"] == values["mla_trt_pages_cached"]
        assert values["mla_trt_prefix_tokens_total"] > 0
        assert values["mla_trt_preemptions_total"] > 0
        note(name, {"tokens": sum(len(answer.tokens) for answer in answers), "seconds": seconds})
    finally:
        server.client.unload_model(name)


def note(name: str, values: Mapping[str, float]) -> None:
    """Adds what was measured to the file of results."""
    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / "triton.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(found | {name: values}, indent=1) + "\n")


@pytest.mark.skipif(BACKEND is None, reason="$MLA_TRT_TRITON_TENSORRT_BACKEND names no TensorRT backend of Triton")
def test_without_the_plugin_library_the_error_says_what_the_engine_needs(repository: Path, tmp_path: Path) -> None:
    with start(repository, tmp_path, plugins=None) as server:
        with pytest.raises(triton_server.InferenceServerException):
            server.load("asked_engine")
        assert "Mla" in server.log.read_text()  # the plugin that TensorRT does not find
        server.load("asked")
        answer = Answer(server, "asked", [1, 5, 9]).wait()
        assert "Triton does not serve the model 'asked_engine'" in str(answer.error)
        assert "the plugin library" in str(answer.error)


@pytest.mark.parametrize("name", ["held", "asked"])
def test_sigterm_ends_what_runs(repository: Path, tmp_path: Path, name: str) -> None:
    if name not in CHOSEN:
        pytest.skip("$MLA_TRT_TRITON_TENSORRT_BACKEND names no TensorRT backend of Triton")
    server = start(repository, tmp_path, plugins=find_library().path)
    try:
        load(server, name)
        answers = [Answer(server, name, [case], max_new_tokens=LENGTH - 1) for case in range(4)]
        for answer in answers:
            answer.read()
        server.process.send_signal(signal.SIGTERM)
        for answer in answers:
            answer.wait()
            assert answer.finish == "length" or answer.error is not None
    finally:
        assert server.stop() == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(server.process.pid, 0)
