"""`mla-trt triton --backend tensorrt` in a real tritonserver: the model asks a stand-in for the engine, which holds the pages and
runs the lowered model on ONNX Runtime, by the configuration and the requests that the engine itself would get."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from tensorrt_stand_in import describe, write_engine

from mla_trt.cli import main
from mla_trt.engines.engine_file import RESIDENT
from mla_trt.generation import generate
from mla_trt.session import Session

triton_server = pytest.importorskip("triton_server", reason="tritonclient is not installed")
from triton_server import Answer, TritonServer, assert_each_got_its_own, missing  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import serving  # noqa: E402

EXAMPLE = Path(__file__).resolve().parent.parent / "models" / "examples" / "deepseek_v3__dynamo_op20__eager__dec.onnx"
STAND_IN = Path(__file__).with_name("triton_engine_model.py")
PAGE, PAGES = 4, 60
LONG = 200

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "lowered"
    arguments = ["lower", str(EXAMPLE), "-o", str(folder), "--kv-format", "f32", "--page-size", str(PAGE)]
    assert main([*arguments, "--no-verify", "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def written(lowered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the models `small` and `narrow`, the latter with logits in bfloat16. Their engines are stand-ins."""
    repository = tmp_path_factory.mktemp("written") / "repository"
    model = onnx.load(lowered / "model.onnx")
    limits = {"max_batch": 6, "max_tokens": 48, "max_length": 240, "pages": PAGES}
    description = describe(model, RESIDENT, **limits)
    logits, *others = description.outputs
    narrow = replace(description, outputs=(replace(logits, dtype=onnx.TensorProto.BFLOAT16), *others))
    options = ["--backend", "tensorrt", "--max-batch", "8", "--drain-seconds", "1", "--quiet"]
    for name, described in (("small", description), ("narrow", narrow)):
        engine = write_engine(tmp_path_factory.mktemp("engine"), described, model)
        assert main(["triton", str(engine), "-o", str(repository), "--name", name, *options]) == 0
        folder = repository / f"{name}_engine"
        shutil.copy(STAND_IN, folder / "1" / "model.py")
        for file in lowered.glob("model.*"):
            shutil.copy(file, folder / "1")
        change(folder / "config.pbtxt", 'backend: "tensorrt"\nplatform: "tensorrt_plan"', 'backend: "python"')
        change(folder / "config.pbtxt", "kind: KIND_GPU count: 1 gpus: [ 0 ]", "kind: KIND_CPU count: 1")
    return repository


@pytest.fixture
def repository(written: Path, tmp_path: Path) -> Path:
    """One of the test's own."""
    return Path(shutil.copytree(written, tmp_path / "repository"))


@pytest.fixture(scope="module")
def alone(lowered: Path) -> Callable[[list[int], int], list[int]]:
    session = Session(lowered / "model.onnx", pages=PAGES)
    return lambda prompt, count: [token for _, token in generate(session, [prompt], max_new_tokens=count)]


@pytest.fixture(scope="module")
def server(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with TritonServer(written, tmp_path_factory.mktemp("server")) as started:
        started.load("small_engine")
        started.load("small")
        yield started


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@contextmanager
def held_engine(repository: Path) -> Iterator[None]:
    """Lets no step of the engine end meanwhile."""
    file = repository / "small_engine" / "1" / "held"
    file.touch()
    try:
        yield
    finally:
        file.unlink()


def assert_whole(server: TritonServer) -> None:
    values = server.wait_for(running=0, waiting=0)
    assert values["mla_trt_pages"] == PAGES
    assert values["mla_trt_pages_in_use"] == values["mla_trt_pages_cached"]


def test_clients_that_share_batches_and_pages_get_what_each_gets_alone(
    server: TritonServer, written: Path, alone: Callable[[list[int], int], list[int]]
) -> None:
    draw = random.Random(0)
    beginning = [draw.randrange(64) for _ in range(12)]
    asked = []
    for case in range(14):
        prompt = (beginning if case % 2 else []) + [draw.randrange(64) for _ in range(draw.randint(1, 40))]
        asked.append((prompt, draw.randint(20, 60)))

    def ask(case: int) -> Answer:
        prompt, count = asked[case]
        answer = Answer(server, "small", prompt, max_new_tokens=count)
        if case % 5:
            return answer.wait()
        while len(answer.tokens) < 3:
            answer.read()
        answer.vanish()
        return answer

    # The pool is too small for all: pages are shared, and taken from some to be computed again. All requests are there before
    # the engine ends its first step, however busy the machine is.
    with ThreadPoolExecutor(len(asked)) as clients:
        with held_engine(written):
            asking = [clients.submit(ask, 0)]
            server.wait_for(running=1)
            asking += [clients.submit(ask, case) for case in range(1, len(asked))]
            server.wait_for(running=1, waiting=len(asked) - 1)
        answers = [answer.result() for answer in asking]
    assert_each_got_its_own(answers, asked, alone)
    assert_whole(server)
    values = server.values()
    assert values["mla_trt_prefix_tokens_total"] > 0
    assert values["mla_trt_preemptions_total"] > 0


def test_bfloat16_logits_are_read(server: TritonServer, lowered: Path) -> None:
    server.load("narrow_engine")
    server.load("narrow")
    session = Session(lowered / "model.onnx", pages=PAGES)
    sequence, logits = session.prefill([1, 5, 9])
    tokens: list[int] = []
    for _ in range(20):
        tokens.append(int(np.argmax(logits.astype(ml_dtypes.bfloat16).astype(np.float32))))
        logits = session.decode({sequence: tokens[-1]})[sequence]
    assert Answer(server, "narrow", [1, 5, 9], max_new_tokens=20).wait().tokens == tokens


def test_the_benchmark_measures_a_server(server: TritonServer, tmp_path: Path) -> None:
    options = [
        "--server",
        f"127.0.0.1:{server.grpc}",
        "--model",
        "small",
        "--vocabulary",
        "64",
        "--max-step-tokens",
        "48",
    ]
    cases = ["--batches", "1", "3", "--contexts", "20", "--steps", "8", "-o", str(tmp_path)]
    assert serving.main([*options, *cases]) == 0
    found = json.loads((tmp_path / "serving.json").read_text())["results"]
    assert [entry["batch"] for entry in found] == [1, 3]
    assert all(entry["tokens_per_second"] > 0 for entry in found)
    assert_whole(server)


def test_the_benchmark_says_that_nobody_listens(tmp_path: Path) -> None:
    cases = ["--batches", "2", "--contexts", "20", "--steps", "8", "--vocabulary", "64", "-o", str(tmp_path)]
    assert serving.main(["--server", "127.0.0.1:9", "--model", "small", *cases]) == 1
    (entry,) = json.loads((tmp_path / "serving.json").read_text())["results"]
    assert entry["note"].startswith("127.0.0.1:9: ")


def test_a_request_beyond_the_engine_is_refused(server: TritonServer) -> None:
    answer = Answer(server, "small", [1] * 200, max_new_tokens=41 + 1).wait()
    assert "the engine takes 240" in str(answer.error)
    assert_whole(server)


def test_an_engine_that_is_not_loaded_is_an_error_that_says_what_it_needs(
    repository: Path, tmp_path: Path, alone: Callable[[list[int], int], list[int]]
) -> None:
    with TritonServer(repository, tmp_path) as server:
        server.load("small")
        answer = Answer(server, "small", [1, 5, 9], max_new_tokens=4).wait()
        assert "Triton does not serve the model 'small_engine'" in str(answer.error)
        assert "it needs TensorRT 10.6.0, a GPU of compute capability 9.0" in str(answer.error)
        server.load("small_engine")
        assert Answer(server, "small", [1, 5, 9], max_new_tokens=4).wait().tokens == alone([1, 5, 9], 4)


def test_pages_of_an_engine_that_was_loaded_again_are_not_read(
    repository: Path, tmp_path: Path, alone: Callable[[list[int], int], list[int]]
) -> None:
    prompt = list(range(1, 20))
    with TritonServer(repository, tmp_path) as server:
        server.load("small_engine")
        server.load("small")
        assert Answer(server, "small", prompt, max_new_tokens=4).wait().tokens == alone(prompt, 4)
        server.client.unload_model("small_engine")
        server.load("small_engine")
        assert Answer(server, "small", prompt, max_new_tokens=4).wait().tokens == alone(prompt, 4)
        server.wait_for(running=0)  # the last answer may be there before this
        with held_engine(repository):
            running = [Answer(server, "small", [0], max_new_tokens=LONG)]
            server.wait_for(running=1)
            running.append(Answer(server, "small", [1], max_new_tokens=LONG))
            server.wait_for(running=1, waiting=1)
            server.client.unload_model("small_engine")
        for answer in running:
            assert "does not serve the model 'small_engine'" in str(answer.wait().error)
        server.load("small_engine")
        assert Answer(server, "small", prompt, max_new_tokens=4).wait().tokens == alone(prompt, 4)


@pytest.mark.parametrize("file", ["1/model.plan", "config.pbtxt"])
def test_an_engine_that_was_replaced_is_not_used(server: TritonServer, written: Path, file: str) -> None:
    changed = written / "small_engine" / file
    before = changed.stat().st_mtime_ns
    os.utime(changed)
    try:
        answer = Answer(server, "small", [1, 5, 9], max_new_tokens=4).wait()
        assert "the files of the model 'small_engine' were replaced" in str(answer.error)
    finally:
        os.utime(changed, ns=(before, before))
    assert Answer(server, "small", [1, 5, 9], max_new_tokens=4).wait().finish == "length"


def test_another_plan_than_was_written_is_a_load_error(repository: Path, tmp_path: Path) -> None:
    (repository / "small_engine" / "1" / "model.plan").write_bytes(b"plan of another engine")
    with TritonServer(repository, tmp_path) as server:
        with pytest.raises(triton_server.InferenceServerException) as caught:
            server.load("small")
        assert "is not the plan that" in str(caught.value)


@pytest.mark.parametrize("how", ["unload", "sigterm"])
def test_requests_that_run_end_when_the_server_does(repository: Path, tmp_path: Path, how: str) -> None:
    server = TritonServer(repository, tmp_path)
    try:
        server.load("small_engine")
        server.load("small")
        long = [Answer(server, "small", [case], max_new_tokens=LONG) for case in range(4)]
        for answer in long:
            answer.read()
        began = time.monotonic()
        if how == "sigterm":
            server.process.send_signal(signal.SIGTERM)
        else:
            server.client.unload_model("small")
        for answer in long:
            answer.wait()
            assert answer.finish == "length" or answer.error is not None
        assert time.monotonic() - began < 20
    finally:
        assert server.stop() == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(server.process.pid, 0)
