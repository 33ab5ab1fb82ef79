"""`mla-trt serve` as a process of its own, asked over HTTP as its page asks. tests/test_serve_page.py looks at the page."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers

from mla_trt.cli import main
from mla_trt.errors import BadModelError, UsageError
from mla_trt.generation import generate
from mla_trt.serving import serve as serve_module
from mla_trt.serving.page_server import MAX_BODY_BYTES, About
from mla_trt.serving.text import Tokenizer, stop_ids_of
from mla_trt.serving.tritonserver import Address, Installation, find_installation
from mla_trt.session import Session

triton_server = pytest.importorskip("triton_server", reason="tritonclient is not installed")
from serve_process import ServeProcess  # noqa: E402
from triton_server import ENVIRONMENT, is_alive, missing, process_tree  # noqa: E402

EXAMPLE = Path(__file__).resolve().parent.parent / "models" / "examples" / "deepseek_v3__dynamo_op20__eager__dec.onnx"
PAGE, PAGES = 4, 400
LONG = 1200
JSON = {"Content-Type": "application/json"}

needs_triton = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer of 64 words, w0 to w63."""
    folder = tmp_path_factory.mktemp("model") / "small"
    arguments = ["lower", str(EXAMPLE), "-o", str(folder), "--kv-format", "f32", "--page-size", str(PAGE)]
    assert main([*arguments, "--no-verify", "--quiet"]) == 0
    words = HuggingFaceTokenizer(models.WordLevel({f"▁w{token}": token for token in range(64)}, unk_token="▁w0"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    words.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [45, 46]}')
    return folder


@pytest.fixture(scope="module")
def alone(lowered: Path) -> Callable[[list[int], int], list[int]]:
    session = Session(lowered / "model.onnx", pages=PAGES)
    return lambda prompt, count: [token for _, token in generate(session, [prompt], max_new_tokens=count)]


@pytest.fixture(scope="module")
def server(lowered: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("serve")
    with ServeProcess(lowered, folder, "--pages", str(PAGES), "--max-batch", "2") as process:
        yield process.ready()


@pytest.fixture
def whole(server: ServeProcess) -> Iterator[None]:
    """Afterwards nothing runs, and every page that is in use is a cached one."""
    yield
    values = server.wait_for(running=0, waiting=0)
    assert values["pages"] == PAGES
    assert values["pages_in_use"] == values["pages_cached"]


@needs_triton
@pytest.mark.usefixtures("whole")
def test_ids_and_text_give_what_the_sequence_gives_alone(
    server: ServeProcess, alone: Callable[[list[int], int], list[int]]
) -> None:
    wanted = alone([1, 5, 9], 12)
    asked = {"max_new_tokens": 12, "stop_ids": [], "temperature": 0, "top_k": 0, "top_p": 1}
    streams = [server.generate(input_ids=[1, 5, 9], **asked), server.generate(text="w1 w5 w9", **asked)]
    for stream in streams:
        stream.wait()
        assert (stream.tokens, stream.finish, stream.error) == (wanted, "length", None)
        assert stream.text == "".join(f" w{token}" for token in wanted)
        assert 0 < stream.times[0] < 60_000
        assert stream.times == sorted(stream.times)


@needs_triton
@pytest.mark.usefixtures("whole")
def test_what_a_request_does_not_say_comes_from_the_models_folder(
    server: ServeProcess, alone: Callable[[list[int], int], list[int]]
) -> None:
    wanted = alone([1, 5, 9], 128)
    end = next(place for place, token in enumerate(wanted) if token in (45, 46)) + 1
    stream = server.generate(input_ids=[1, 5, 9]).wait()
    assert (stream.tokens, stream.finish) == (wanted[:end], "stop")
    status, about = server.ask("GET", "/api/model")
    assert status == 200
    assert (about["name"], about["engine"], about["vocabulary"]) == ("small", "ONNX Runtime", 64)
    assert (about["stop_ids"], about["text"], about["page_size"], about["max_batch"]) == ([45, 46], True, PAGE, 2)


@needs_triton
@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("when", ["runs", "waits"])
def test_a_client_that_goes_away_is_cancelled_whether_its_request_runs_or_waits(
    server: ServeProcess, when: str
) -> None:
    asked = {"input_ids": [3, 1, 4], "max_new_tokens": LONG, "stop_ids": []}
    before = server.metrics()["tokens_total"]
    running = [server.generate(**asked) for _ in range(2 if when == "waits" else 1)]
    events = [stream.events() for stream in running]
    for entry in events:
        assert next(entry) == {"prompt_tokens": 3}
    if when == "waits":
        # Triton looks whether an HTTP client is there when it sends to it: this one's request ends when its turn comes.
        waiting = server.generate(**asked)
        server.wait_for(running=2, waiting=1)
        waiting.vanish()
    for stream in running:
        stream.vanish()
    server.wait_for(running=0, waiting=0)
    assert server.metrics()["tokens_total"] - before < LONG


@needs_triton
@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"input_ids": [1, 64]}, 400, "token 64 of the prompt is not in the vocabulary; the model has ids 0 to 63"),
        ({"input_ids": [1] * (PAGE * PAGES + 1)}, 400, f"the pool of pages holds {PAGE * PAGES}"),
        ({"input_ids": [1, 1 << 32]}, 400, "'input_ids' is not a list of token ids"),
        ({"input_ids": [[1], [2]]}, 400, "'input_ids' is not a list of token ids"),
        ({"input_ids": [True]}, 400, "'input_ids' is not a list of token ids"),
        ({"input_ids": []}, 400, "the prompt is empty"),
        ({"text": ""}, 400, "the prompt is empty"),
        ({"text": 5}, 400, "'text' is no string"),
        ({}, 400, "give either text or input_ids"),
        ({"text": "w1", "input_ids": [1]}, 400, "give either text or input_ids"),
        ({"input_ids": [1], "max_new_tokens": 0}, 400, "max_new_tokens is 0"),
        ({"input_ids": [1], "max_new_tokens": 1.5}, 400, "'max_new_tokens' is not a whole number"),
        ({"input_ids": [1], "max_new_tokens": 1 << 31}, 400, "'max_new_tokens' is not a whole number"),
        ({"input_ids": [1], "seed": -1}, 400, "'seed' is not a whole number"),
        ({"input_ids": [1], "temperature": float("nan")}, 400, "'temperature' is not a number"),
        ({"input_ids": [1], "temperature": "1"}, 400, "'temperature' is not a number"),
        ({"input_ids": [1], "top_p": 1.5}, 400, "top-p is 1.5"),
        ({"input_ids": [1], "model": "/etc/passwd"}, 400, "there is no setting 'model'"),
        ([1], 400, "the request is no JSON object"),
        (b"{", 400, "the request is no JSON"),
        (b"[" * 100_000, 400, "the request is no JSON"),
        (b" " * (MAX_BODY_BYTES + 1), 413, f"send at most {MAX_BODY_BYTES}"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(
    server: ServeProcess, body: object, status: int, reason: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    found, answer = server.ask("POST", "/api/generate", content, JSON)
    assert found == status
    assert reason in answer["error"]
    assert server.ask("GET", "/api/model")[0] == 200


@needs_triton
@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/../../../../etc/passwd", {}, 404),
        ("GET", "//etc/passwd", {}, 404),
        ("GET", "/page.js/../../serve.py", {}, 404),
        ("GET", "/serve.py", {}, 404),
        ("GET", "/%2e%2e/serve.py", {}, 404),
        ("GET", "/v2/models/small/config", {}, 404),
        ("GET", "/api/generate", {}, 404),
        ("POST", "/", JSON, 404),
        ("POST", "/v2/repository/index", JSON, 404),
        ("POST", "/api/generate", {"Content-Type": "text/plain"}, 415),
        ("POST", "/api/generate", JSON | {"Content-Length": "-1"}, 411),
        ("GET", "/api/model", {"Host": "attacker.example:80"}, 403),
        ("POST", "/api/generate", JSON | {"Host": "attacker.example"}, 403),
    ],
)
def test_nothing_is_served_but_the_page_and_its_requests(
    server: ServeProcess, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    body = b'{"input_ids": [1]}' if method == "POST" else None
    found, answer = server.ask(method, path, body, headers)
    assert found == status
    assert answer["error"]


@needs_triton
def test_other_methods_are_refused(server: ServeProcess) -> None:
    for method in ("PUT", "DELETE", "HEAD", "OPTIONS"):
        request = urllib.request.Request(f"http://127.0.0.1:{server.port}/", method=method)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        assert caught.value.code == 501


@needs_triton
def test_a_client_that_sends_nothing_holds_up_nobody(server: ServeProcess) -> None:
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    assert server.generate(input_ids=[1], max_new_tokens=3, stop_ids=[]).wait().finish == "length"
    for connection in held:
        connection.close()


@needs_triton
@pytest.mark.parametrize("path", ["/v2/repository/index", "/v2/systemsharedmemory/region/x/register", "/v2/logging"])
def test_tritons_interface_beyond_requests_is_closed(server: ServeProcess, path: str) -> None:
    base = server.places["HTTP"].partition("/v2/")[0]
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(base + path, b"{}"), timeout=10)
    assert caught.value.code == 403


@needs_triton
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_in_order_and_streams_get_to_know(lowered: Path, tmp_path: Path, number: int) -> None:
    options = ("--pages", str(PAGES), "--drain-seconds", "0.3", "--name", "other")
    # As somebody has it who installed mla-trt[triton] into one environment.
    python = ENVIRONMENT / "bin" / "python3"
    with ServeProcess(lowered, tmp_path, *options, python=python) as process:
        process.ready()
        assert process.places["model"] == "other, on ONNX Runtime"
        stream = process.generate(input_ids=[1, 5, 9], max_new_tokens=LONG, stop_ids=[])
        events = stream.events()
        while len(stream.tokens) < 3:
            next(events)
        began = time.monotonic()
        assert process.end(number) == 0
        assert time.monotonic() - began < 20
        for _ in events:
            pass
        assert stream.finish == "length" or "shutting down" in str(stream.error)
    assert list(process.temporary.glob("mla-trt*")) == []
    assert "Traceback" not in process.errors
    assert "the page takes token ids, not text: the library tokenizers is not installed" in process.errors


@needs_triton
def test_a_second_signal_ends_what_still_runs(lowered: Path, tmp_path: Path) -> None:
    options = ("--pages", "4000", "--drain-seconds", "60", "--max-step-tokens", "1", "--no-page")
    with ServeProcess(lowered, tmp_path, *options) as process:
        process.ready()
        body = json.dumps({"input_ids": [1, 5, 9], "max_new_tokens": 15_000, "stop_ids": []}).encode()
        answer = urllib.request.urlopen(process.places["HTTP"], body, timeout=30)
        answer.readline()
        process.process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert process.process.poll() is None
        began = time.monotonic()
        assert process.end() == 1
        assert time.monotonic() - began < 10
        answer.close()


SIGNALLED = """
import os, subprocess, sys, time
from mla_trt.serving.serve import SIGNALS, _Signals
from mla_trt.signals import handled
sender = "import os, signal, sys, time\\nwhile True: os.kill(int(sys.argv[1]), signal.SIGHUP); time.sleep(1e-4)"
signals = _Signals()
with handled(SIGNALS, signals.note):
    signals.armed = True
    child = subprocess.Popen([sys.executable, "-c", sender, str(os.getpid())])
    end = time.monotonic() + 4
    while time.monotonic() < end:
        signals.stopped.wait(1e-5)
        signals.hurry.wait(1e-5)
    child.kill()
    child.wait()
print(signals.stopped.is_set(), signals.hurry.is_set())
"""


def test_signals_may_come_at_any_time() -> None:
    """The handler runs in the thread that waits, wherever that is: a lock that both take would hold it for ever."""
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["True", "True"]


@needs_triton
def test_when_tritonserver_dies_so_does_the_command_with_a_reason(lowered: Path, tmp_path: Path) -> None:
    with ServeProcess(lowered, tmp_path) as process:
        process.ready()
        started = process_tree(process.process.pid)
        stream = process.generate(input_ids=[1, 5, 9], max_new_tokens=900, stop_ids=[])
        events = stream.events()
        next(events)
        os.kill(started[0], signal.SIGKILL)
        assert process.process.wait(20) == 1
        for _ in events:
            pass
        assert not stream.finish
        assert not any(map(is_alive, started))
    assert "tritonserver was killed by signal 9" in process.errors.splitlines()[-1]
    assert "Started HTTPService" in process.errors


@needs_triton
def test_when_the_command_is_killed_tritonserver_ends(lowered: Path, tmp_path: Path) -> None:
    with ServeProcess(lowered, tmp_path) as process:
        process.ready()
        started = process_tree(process.process.pid)
        process.process.kill()
        process.process.wait()
        deadline = time.monotonic() + 30
        while any(map(is_alive, started)):
            assert time.monotonic() < deadline
            time.sleep(0.1)


@needs_triton
def test_a_model_that_cannot_be_loaded_is_one_line(lowered: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(lowered, tmp_path / "copy")
    with (folder / "model.onnx").open("r+b") as file:
        file.seek(200_000)
        file.write(bytes(100_000))
    with ServeProcess(folder, tmp_path) as process:
        assert process.process.wait(60) in (1, 2)
    assert "Traceback" not in process.errors
    assert len(process.errors.strip().splitlines()) == 1


@needs_triton
def test_a_named_repository_is_written_and_stays(lowered: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    with ServeProcess(lowered, tmp_path, "--repository", str(repository), "--no-page", "--quiet") as process:
        deadline = time.monotonic() + 60
        while not (repository / "small" / "config.pbtxt").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # Before it is ready, too, all ends: while the model is written (143), or loaded.
        assert process.end(signal.SIGTERM) in (0, 1, 143)
    assert not (repository / "small" / "1" / "model.onnx").is_symlink()
    assert (repository / "small" / "1" / "model.onnx").read_bytes() == (lowered / "model.onnx").read_bytes()
    assert list(process.temporary.glob("mla-trt*")) == []


def test_without_a_tritonserver_it_says_what_to_install(
    lowered: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("mla_trt.serving.tritonserver.CONTAINER", tmp_path / "nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", str(lowered)]) == 1
    line = capsys.readouterr().err
    assert "there is no tritonserver on PATH" in line
    assert "pip install 'mla-trt[triton]'" in line
    assert line.count("\n") == 1


def test_a_tritonserver_is_found_where_it_may_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    container, on_path = (tmp_path / place / "bin" / "tritonserver" for place in ("container", "path"))
    packaged = tmp_path / "environment/lib/python3.12/site-packages/pytriton/tritonserver/bin/tritonserver"
    for binary in (container, on_path, packaged):
        binary.parent.mkdir(parents=True)
        binary.write_text("#!/bin/sh\n")
        binary.chmod(0o755)
    (packaged.parent.parent / "python_backend_stubs" / "3.9").mkdir(parents=True)
    monkeypatch.setattr("mla_trt.serving.tritonserver.CONTAINER", container)
    monkeypatch.setenv("PATH", str(on_path.parent))
    stubs = packaged.parent.parent / "python_backend_stubs"
    assert find_installation(tmp_path / "environment") == Installation(packaged, stubs)
    assert find_installation() == Installation(on_path)
    monkeypatch.setenv("PATH", "")
    assert find_installation() == Installation(container)
    with pytest.raises(UsageError, match=r"no stub for Python 3\.12, but for 3\.9"):
        Installation(packaged, stubs).options("3.12", tmp_path / "backends")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--host", "no such host"], "which is no IPv4 address"),
        (["--host", "192.0.2.1"], "cannot be used"),
        (["--port", "70000"], "port 70000 of 127.0.0.1 cannot be used"),
        (["--environment", "nowhere"], "'nowhere' does not exist"),
        (["--tokenizer", "nowhere"], "'nowhere' is not a tokenizer"),
        (["--name", "../x"], "is no name for a model"),
        (["--max-batch", "0"], "max_batch is 0"),
        (["--stop-ids", "x"], "give token ids with commas"),
    ],
)
@needs_triton
def test_refusals(
    lowered: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = next(ENVIRONMENT.glob("lib/python3*/site-packages/pytriton/tritonserver/bin"))
    monkeypatch.setenv("PATH", str(installed))
    ports = ["--port", "0", "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    assert main(["serve", str(lowered), *ports, *options]) == 2
    assert reason in capsys.readouterr().err


@needs_triton
def test_a_port_that_is_taken_is_named(
    lowered: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = next(ENVIRONMENT.glob("lib/python3*/site-packages/pytriton/tritonserver/bin"))
    monkeypatch.setenv("PATH", str(installed))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", str(lowered), "--grpc-port", port, "--http-port", "0", "--metrics-port", "0"]) == 2
    assert f"port {port} of 127.0.0.1 cannot be used (Address already in use): give another --grpc-port" in (
        capsys.readouterr().err
    )


def test_listening_on_a_network_is_said_loudly(capsys: pytest.CaptureFixture[str]) -> None:
    about = About("small", "ONNX Runtime", 64, PAGE, 2, 16, (), False, "127.0.0.1:2")
    serve_module._announce(Address("127.0.0.1", 1, 2, 3), 4, about, quiet=False)
    assert capsys.readouterr().err == ""
    serve_module._announce(Address("0.0.0.0", 1, 2, 3), 4, about, quiet=True)
    printed = capsys.readouterr()
    assert "WARNING: listening on 0.0.0.0: whoever reaches this machine" in printed.err
    assert printed.out == ""


def test_text_comes_in_whole_characters(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = HuggingFaceTokenizer(models.BPE({letter: token for token, letter in enumerate(alphabet)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    letters.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    ids = tokenizer.encode("zwölf €")
    assert len(ids) == 10
    text_of = tokenizer.stream(ids[:1])
    pieces = [text_of([token]) for token in ids[1:]]
    assert pieces == ["w", "", "ö", "l", "f", " ", "", "", "€"]


def test_what_lies_beside_a_model_must_be_readable(tmp_path: Path) -> None:
    assert stop_ids_of(tmp_path) == ()
    config = tmp_path / "generation_config.json"
    for text, ids in (('{"eos_token_id": 2}', (2,)), ('{"eos_token_id": null}', ()), ("{}", ())):
        config.write_text(text)
        assert stop_ids_of(tmp_path) == ids
    for text in ("", "[]", '{"eos_token_id": ["</s>"]}'):
        config.write_text(text)
        with pytest.raises(BadModelError, match=r"generation_config\.json' cannot be read"):
            stop_ids_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadModelError, match="is not a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")
