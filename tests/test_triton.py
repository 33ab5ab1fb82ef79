"""A model repository in a real tritonserver, asked by real clients: what comes is what a session gives alone, whatever happens beside it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

from mla_trt.cli import main
from mla_trt.generation import generate
from mla_trt.session import Session

triton_server = pytest.importorskip("triton_server", reason="tritonclient is not installed")
from triton_server import Answer, TritonServer, assert_each_got_its_own, missing  # noqa: E402

EXAMPLE = Path(__file__).resolve().parent.parent / "models" / "examples" / "deepseek_v3__dynamo_op20__eager__dec.onnx"
PAGE, PAGES = 4, 400
LONG = 1200

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "lowered"
    arguments = ["lower", str(EXAMPLE), "-o", str(folder), "--kv-format", "f32", "--page-size", str(PAGE)]
    assert main([*arguments, "--no-verify", "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def repository(lowered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of several settings; moved after it was written."""
    folder = tmp_path_factory.mktemp("written") / "repository"
    common = ["--drain-seconds", "1", "--quiet"]
    pages = ["--pages", str(PAGES), *common]
    long = ["--pages", str(20 * PAGES), *common]  # for a stream that does not end by itself while others are looked at
    write = ["triton", str(lowered), "-o", str(folder)]
    assert main([*write, "--name", "many", "--max-batch", "8", *pages]) == 0
    assert main([*write, "--name", "one", "--max-batch", "1", "--max-waiting", "2", *long]) == 0
    assert main([*write, "--name", "stops", "--max-new-tokens", "20", "--stop-ids", "45", *pages]) == 0
    return Path(shutil.move(folder, tmp_path_factory.mktemp("moved") / "models"))


@pytest.fixture(scope="module")
def alone(lowered: Path) -> Callable[[list[int], int], list[int]]:
    session = Session(lowered / "model.onnx", pages=PAGES)
    return lambda prompt, count: [token for _, token in generate(session, [prompt], max_new_tokens=count)]


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with TritonServer(repository, tmp_path_factory.mktemp("server")) as started:
        started.load("many")
        yield started


@pytest.fixture
def healthy(server: TritonServer, alone: Callable[[list[int], int], list[int]]) -> Iterator[None]:
    """Afterwards the model answers as ever, and the pool is whole."""
    yield
    assert Answer(server, "many", [1, 5, 9], max_new_tokens=6).wait().tokens == alone([1, 5, 9], 6)
    assert_whole(server)


def assert_whole(server: TritonServer) -> None:
    values = server.wait_for(running=0, waiting=0)
    assert values["mla_trt_pages"] == PAGES
    assert values["mla_trt_pages_in_use"] == values["mla_trt_pages_cached"]


@pytest.mark.usefixtures("healthy")
def test_clients_that_share_batches_get_what_each_gets_alone(
    server: TritonServer, alone: Callable[[list[int], int], list[int]]
) -> None:
    draw = random.Random(0)
    asked = [([draw.randrange(64) for _ in range(draw.randint(1, 40))], draw.randint(1, 40)) for _ in range(16)]
    before = server.values()
    together = threading.Barrier(sum(case % 5 == 0 for case in range(len(asked))), timeout=60)

    def ask(case: int) -> Answer:
        time.sleep(case % 4 * 0.02)
        prompt, count = asked[case]
        answer = Answer(server, "many", prompt, max_new_tokens=count if case % 5 else LONG)
        if case % 5:
            return answer.wait()
        while len(answer.tokens) < 3:
            answer.read()
        together.wait()
        answer.vanish()
        return answer

    with ThreadPoolExecutor(len(asked)) as clients:
        answers = list(clients.map(ask, range(len(asked))))
    assert_each_got_its_own(answers, asked, alone)
    values = server.wait_for(running=0)
    steps, given = (values[name] - before[name] for name in ("mla_trt_steps_total", "mla_trt_tokens_total"))
    assert 0 < steps < given  # a step of one sequence gives one token at most
    assert values["mla_trt_batch"] > 0
    assert given >= sum(len(answer.tokens) for answer in answers)
    assert values["mla_trt_computed_tokens_total"] > 0
    assert values["mla_trt_tokens_per_second"] > 0


@pytest.mark.usefixtures("healthy")
def test_sampling_depends_on_the_seed_alone(server: TritonServer) -> None:
    def draw(seed: int) -> list[int]:
        inputs = {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "seed": seed}
        return Answer(server, "many", [7, 8], max_new_tokens=24, **inputs).wait().tokens

    first = draw(3)
    assert len(first) == 24
    assert draw(3) == first
    assert draw(4) != first


def test_stop_ids_and_length_come_from_the_repository_unless_a_request_says(
    server: TritonServer, alone: Callable[[list[int], int], list[int]]
) -> None:
    server.load("stops")
    wanted = alone([1, 5, 9], 20)
    end = wanted.index(45) + 1
    answer = Answer(server, "stops", [1, 5, 9]).wait()
    assert (answer.tokens, answer.finish) == (wanted[:end], "stop")
    answer = Answer(server, "stops", [1, 5, 9], stop_ids=[63, wanted[1]]).wait()
    assert (answer.tokens, answer.finish) == (wanted[:2], "stop")
    server.client.unload_model("stops")


@pytest.mark.usefixtures("healthy")
def test_a_client_that_vanishes_gives_its_pages_back(server: TritonServer) -> None:
    before = server.values()["mla_trt_tokens_total"]
    answer = Answer(server, "many", [3, 1, 4], max_new_tokens=LONG)
    answer.read()
    assert server.wait_for(running=1)["mla_trt_pages_in_use"] > 0
    answer.vanish()
    assert_whole(server)
    assert server.values()["mla_trt_tokens_total"] - before < LONG


@pytest.mark.usefixtures("healthy")
def test_a_timeout_ends_a_request(server: TritonServer) -> None:
    answer = Answer(server, "many", [3, 1, 4], max_new_tokens=LONG, timeout_us=200_000).wait()
    assert answer.finish == "deadline"
    assert answer.error is None
    assert len(answer.tokens) < LONG


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize(
    ("prompt", "inputs", "reason"),
    [
        ([1, 64, 2], {}, "token 64 of the prompt is not in the vocabulary; the model has ids 0 to 63"),
        ([1, -1], {}, "token -1 of the prompt is not in the vocabulary"),
        ([1] * (PAGE * PAGES + 1), {}, f"the pool of pages holds {PAGE * PAGES}"),
        ([1], {"max_new_tokens": PAGE * PAGES + 1}, f"the pool of pages holds {PAGE * PAGES}"),
        ([], {}, "the prompt is empty"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"temperature": np.nan}, "the temperature is nan"),
        ([1], {"top_p": 1.5}, "top-p is 1.5"),
        ([1], {"stop_ids": [0] * 2000}, "there are 2000 stop ids"),
        ([1], {"max_new_tokens": [1, 2]}, "unexpected shape"),
        (np.array([1, 2], np.int64), {}, "data-type is 'INT64'"),
        (np.array([[1, 2]], np.int32), {}, "unexpected shape"),
    ],
)
def test_what_makes_no_sense_is_an_error_of_that_request(
    server: TritonServer, prompt: list[int] | np.ndarray, inputs: dict[str, object], reason: str
) -> None:
    beside = Answer(server, "many", [2, 7], max_new_tokens=30)
    answer = Answer(server, "many", prompt, **inputs).wait()
    assert reason in str(answer.error)
    assert answer.tokens == []
    assert beside.wait().finish == "length"


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize("size", [0, 1, 4, 11, 13, 4000])
def test_a_tensor_of_other_bytes_than_its_shape_says_is_refused(server: TritonServer, size: int) -> None:
    prompt = triton_server.tritonclient.grpc.InferInput("input_ids", [3], "INT32")
    prompt.set_data_from_numpy(np.array([1, 5, 9], np.int32))
    prompt._raw_content = bytes(size)
    answer = Answer(server, "many", prompt).wait()
    assert "size" in str(answer.error)
    assert answer.tokens == []


def test_one_at_a_time_the_larger_priority_goes_first_and_a_full_queue_refuses(server: TritonServer) -> None:
    server.load("one")
    running = Answer(server, "one", [1], max_new_tokens=19 * PAGE * PAGES, priority=9)
    running.read()
    done: list[str] = []

    def wait(name: str, answer: Answer) -> None:
        assert answer.wait().finish == "length"
        done.append(name)

    with ThreadPoolExecutor(2) as clients:
        low = Answer(server, "one", [2], max_new_tokens=100)
        server.wait_for(model="one", waiting=1, running=1)
        high = Answer(server, "one", [3], max_new_tokens=20, priority=5)
        server.wait_for(model="one", waiting=2, running=1)
        refused = Answer(server, "one", [4]).wait()
        running.vanish()
        waits = [clients.submit(wait, *case) for case in (("low", low), ("high", high))]
        for entry in waits:
            entry.result()
    assert "2 requests wait already" in str(refused.error)
    assert done == ["high", "low"]
    server.client.unload_model("one")


def test_http_clients_see_health_and_get_tokens(
    server: TritonServer, alone: Callable[[list[int], int], list[int]]
) -> None:
    import tritonclient.http

    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.http}")
    assert client.is_server_live()
    assert client.is_model_ready("many")
    assert not client.is_model_ready("nothing")
    body = json.dumps({"input_ids": [1, 5, 9], "max_new_tokens": 6}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.http}/v2/models/many/generate_stream", body)
    with urllib.request.urlopen(request, timeout=30) as answer:
        events = [json.loads(line[5:]) for line in answer.read().decode().splitlines() if line.startswith("data:")]
    tokens = []
    for event in events:
        found = event.get("token_ids", [])
        tokens += found if isinstance(found, list) else [found]
    assert tokens == alone([1, 5, 9], 6)
    assert events[-1]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "1" / "model.onnx").unlink(), "model.onnx' does not exist"),
        (lambda folder: cut(folder / "1" / "model.onnx"), "is not an ONNX model"),
        (lambda folder: other_version(folder / "1" / "model.onnx"), "version"),
        (lambda folder: change(folder / "config.pbtxt", f'"{PAGES}"', '"0"'), "pages is 0"),
        (
            lambda folder: change(folder / "config.pbtxt", f'"{PAGES}"', '"all"'),
            "'pages' of config.pbtxt cannot be read",
        ),
        (
            lambda folder: change(folder / "config.pbtxt", '"model.onnx"', '"../../many/1/model.onnx"'),
            "beside model.py",
        ),
        (lambda folder: old_engine(folder), "has version 0; this program reads"),
        (lambda folder: without_plugins(folder), "libmla_trt_plugins.so' does not exist: write the repository again"),
    ],
    ids=["missing", "truncated", "version", "pages", "parameter", "outside", "engine", "plugins"],
)
def test_a_model_that_cannot_be_loaded_says_why(
    server: TritonServer, repository: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    folder = repository / "spoilt"
    shutil.copytree(repository / "many", folder)
    try:
        change(folder / "config.pbtxt", 'name: "many"', 'name: "spoilt"')
        spoil(folder)
        with pytest.raises(triton_server.InferenceServerException) as caught:
            server.load("spoilt")
        assert reason in str(caught.value)
        assert server.client.is_model_ready("many")
    finally:
        shutil.rmtree(folder)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def other_version(file: Path) -> None:
    model = onnx.load(file)
    entry = next(entry for entry in model.metadata_props if "token_input" in entry.value)
    entry.value = json.dumps(json.loads(entry.value) | {"version": 99})
    onnx.save(model, file)


def old_engine(folder: Path) -> None:
    change(folder / "config.pbtxt", '"model.onnx"', '"model.engine"')
    (folder / "1" / "model.engine").write_bytes(b"plan")
    (folder / "1" / "model.engine.json").write_text('{"version": 0}')


def without_plugins(folder: Path) -> None:
    old_engine(folder)
    with (folder / "config.pbtxt").open("a") as config:
        config.write('parameters { key: "plugins" value { string_value: "libmla_trt_plugins.so" } }')


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="these tests run with numpy 1")
def test_numpy_2_in_the_models_environment_is_a_load_error(repository: Path, tmp_path: Path) -> None:
    with TritonServer(repository, tmp_path, python=Path(sys.executable).parent) as server:
        with pytest.raises(triton_server.InferenceServerException) as caught:
            server.load("many")
        assert "install 'numpy<2' into the Python environment of the model" in str(caught.value)


@pytest.mark.parametrize("how", ["unload", "sigterm"])
def test_requests_that_run_end_with_an_error_when_the_server_does(repository: Path, tmp_path: Path, how: str) -> None:
    server = TritonServer(repository, tmp_path)
    try:
        server.load("many")
        long = [Answer(server, "many", [case], max_new_tokens=LONG) for case in range(6)]
        for answer in long:
            answer.read()
        began = time.monotonic()
        if how == "sigterm":
            server.process.send_signal(signal.SIGTERM)
        else:
            server.client.unload_model("many")
        for answer in long:
            answer.wait()
            assert answer.finish == "length" or "shutting down" in str(answer.error)
        assert time.monotonic() - began < 20
        assert any(answer.error for answer in long)
    finally:
        assert server.stop() == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(server.process.pid, 0)
