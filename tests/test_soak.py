"""Many clients at once for a while: every stream is what its sequence gives alone, no page is lost, and memory stays.

`make soak` runs two minutes and prints what it saw; MLA_TRT_SOAK_SECONDS sets how long. MLA_TRT_SOAK_ENGINE names an engine, which
then answers instead of the lowered model on ONNX Runtime, as on a GPU:

    mla-trt lower models/examples/deepseek_v3__dynamo_op20__eager__dec.onnx -o build/soak --kv-format f32 --page-size 4
    mla-trt build build/soak -o build/soak.engine --pages 160 --max-batch 16 --max-tokens 96 --max-length 640
    MLA_TRT_SOAK_ENGINE=build/soak.engine MLA_TRT_SOAK_SECONDS=120 python -m pytest -n 0 tests/test_soak.py
"""

from __future__ import annotations

import http.client
import json
import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from mla_trt.cli import main
from mla_trt.engines.opening import open_engine
from mla_trt.generation import generate
from mla_trt.session import Session

triton_server = pytest.importorskip("triton_server", reason="tritonclient is not installed")
from triton_server import Answer, TritonServer, missing, process_tree  # noqa: E402

EXAMPLE = Path(__file__).resolve().parent.parent / "models" / "examples" / "deepseek_v3__dynamo_op20__eager__dec.onnx"
SECONDS = float(os.environ.get("MLA_TRT_SOAK_SECONDS", "15"))
ENGINE = os.environ.get("MLA_TRT_SOAK_ENGINE")
CLIENTS = 64
PAGE, PAGES = 4, 160
PROMPTS = 160
LONGEST_PROMPT, LONGEST_ANSWER = 48, 64
SHARED = 3
"""Beginnings that half of the prompts have in common, so that pages are shared."""
LONG_SECONDS = 60
MOST_GROWTH = 0.03 if SECONDS >= LONG_SECONDS else 0.1
WARM_SHARE = 1 / 3
"""Of the time, after which memory must not grow any more."""

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is served: an engine, or the folder of a lowered model."""
    if ENGINE is not None:
        return Path(ENGINE).resolve()
    folder = tmp_path_factory.mktemp("model") / "lowered"
    arguments = ["lower", str(EXAMPLE), "-o", str(folder), "--kv-format", "f32", "--page-size", str(PAGE)]
    assert main([*arguments, "--no-verify", "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("repository")
    limits = ["--pages", str(PAGES), "--max-batch", "16", "--max-step-tokens", "96"]
    assert main(["triton", str(model), "-o", str(repository), "--name", "soak", *limits, "--quiet"]) == 0
    # After cancelled streams it may use up all of this time (docs/triton.md).
    with TritonServer(repository, tmp_path_factory.mktemp("server"), "--exit-timeout-secs=5") as started:
        started.load("soak")
        yield started


@dataclass
class Seen:
    """What the clients saw; written from all of their threads."""

    wrong: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client:
    """Asks again and again until the time is over.

    Args:
        number: of the client, which its random choices depend on.
        server: whom it asks.
        known: prompts, and what each gives alone.
        seen: what it adds to.
    """

    def __init__(self, number: int, server: TritonServer, known: list[tuple[list[int], list[int]]], seen: Seen) -> None:
        self._draw = random.Random(number)
        self._server, self._known, self._seen = server, known, seen
        self._http = number % 4 == 0

    def run(self, until: float) -> None:
        while time.monotonic() < until:
            time.sleep(self._draw.expovariate(1 / 0.2))
            prompt, wanted = self._draw.choice(self._known)
            count = self._draw.randint(1, LONGEST_ANSWER)
            ask = self._ask_http if self._http else self._ask_grpc
            # Some go away after so many tokens.
            leave = self._draw.randrange(count) if self._draw.random() < 0.25 else None
            began = time.monotonic()
            tokens, end, first = ask(prompt, count, leave)
            complete = end == "length"
            with self._seen.lock:
                self._seen.ends[end] += 1
                self._seen.tokens += len(tokens)
                if first is not None:
                    self._seen.first.append(first - began)
                if tokens != wanted[: len(tokens)] or (complete and len(tokens) != count) or "error" in end:
                    self._seen.wrong.append(f"{prompt}, {count} tokens: {tokens}, {end}; alone {wanted[:count]}")

    def _ask_grpc(self, prompt: list[int], count: int, leave: int | None) -> tuple[list[int], str, float | None]:
        timeout = 30_000 if leave is None and self._draw.random() < 0.1 else None
        answer = Answer(self._server, "soak", prompt, max_new_tokens=count, timeout_us=timeout)
        first = None
        while leave is None or len(answer.tokens) < leave:
            last = answer.read()
            if answer.tokens and first is None:
                first = time.monotonic()
            if last:
                answer.close()
                return answer.tokens, f"error {answer.error}" if answer.error else answer.finish, first
        answer.vanish()
        return answer.tokens, "left", first

    def _ask_http(self, prompt: list[int], count: int, leave: int | None) -> tuple[list[int], str, float | None]:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.http, timeout=60)
        tokens: list[int] = []
        first = None
        try:
            body = json.dumps({"input_ids": prompt, "max_new_tokens": count})
            connection.request("POST", "/v2/models/soak/generate_stream", body)
            if leave == 0:
                return tokens, "left", first
            answer = connection.getresponse()
            for line in answer:
                if not line.startswith(b"data:"):
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    return tokens, f"error {event['error']}", first
                tokens += np.atleast_1d(event.get("token_ids", [])).tolist()
                first = first or time.monotonic()
                if event["finish_reason"]:
                    return tokens, event["finish_reason"], first
                if leave is not None and len(tokens) >= leave:
                    answer.close()
                    return tokens, "left", first
            return tokens, "error: the stream has no end", first
        finally:
            connection.close()


def resident_bytes(processes: list[int]) -> int:
    """Memory of processes, what they share counted once each."""
    pages = (int(Path(f"/proc/{process}/statm").read_text().split()[1]) for process in processes)
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def test_64_clients_get_what_each_gets_alone_and_nothing_is_lost(
    model: Path, server: TritonServer, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    beginnings = [[draw.randrange(64) for _ in range(24)] for _ in range(SHARED)]
    session = Session(open_engine(model, pages=PAGES))
    known = []
    for number in range(PROMPTS):
        prompt = [draw.randrange(64) for _ in range(draw.randint(1, LONGEST_PROMPT))]
        if number % 2:
            prompt = beginnings[number % SHARED] + prompt[:24]
        known.append((prompt, [token for _, token in generate(session, [prompt], max_new_tokens=LONGEST_ANSWER)]))

    seen = Seen()
    processes = [server.process.pid, *process_tree(server.process.pid)]
    memory: list[tuple[float, int]] = []
    most: Counter[str] = Counter()
    began = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as clients:
        waits = [clients.submit(Client(number, server, known, seen).run, began + SECONDS) for number in range(CLIENTS)]
        while not all(wait.done() for wait in waits):
            time.sleep(0.25)
            memory.append((time.monotonic() - began, resident_bytes(processes)))
            for name, value in server.values().items():
                most[name.removeprefix("mla_trt_")] = max(most[name.removeprefix("mla_trt_")], int(value))
        for wait in waits:
            wait.result()
    took = time.monotonic() - began

    values = server.wait_for(running=0, waiting=0)
    assert values["mla_trt_pages_in_use"] == values["mla_trt_pages_cached"]
    # Every page can be had: a request that needs them all gets them.
    prompt = known[0][0]
    whole = Answer(server, "soak", prompt, max_new_tokens=PAGE * PAGES - len(prompt)).wait()
    alone = [token for _, token in generate(session, [prompt], max_new_tokens=PAGE * PAGES - len(prompt))]
    assert (whole.tokens, whole.finish, whole.error) == (alone, "length", None)

    warm = [size for at, size in memory if at > SECONDS * WARM_SHARE]
    early, late = (statistics.median(part) for part in (warm[: len(warm) // 3], warm[-len(warm) // 3 :]))
    first = np.percentile(np.array(seen.first) * 1000, [50, 95])
    with capsys.disabled():
        print(
            f"\n{CLIENTS} clients, {took:.0f} s: {sum(seen.ends.values())} streams ({dict(seen.ends)}), "
            f"{seen.tokens} tokens, {seen.tokens / took:.0f} a second; first token after {first[0]:.0f} ms (p50), "
            f"{first[1]:.0f} ms (p95); at most {most['batch']} in a batch, {most['waiting']} waiting, "
            f"{most['pages_in_use']} of {PAGES} pages in use; {values['mla_trt_preemptions_total']:.0f} preemptions, "
            f"{values['mla_trt_prefix_tokens_total']:.0f} prompt tokens from shared pages; memory {early / 1e6:.1f} MB "
            f"after a third of the time, {late / 1e6:.1f} MB at the end; {len(seen.wrong)} streams differ from the "
            "sequence alone; memory over the time: "
            + ", ".join(f"{size / 1e6:.0f}" for _, size in memory[:: max(1, len(memory) // 12)])
        )
    assert seen.wrong == []
    assert late < early * (1 + MOST_GROWTH)
    # It was a test of what it should test. A short run beside other tests may be too slow a client to fill the server.
    assert seen.ends["length"] > CLIENTS
    assert seen.ends["left"] > CLIENTS / 4
    assert values["mla_trt_prefix_tokens_total"] > 0
    assert most["batch"] > 1
    if SECONDS >= LONG_SECONDS:
        assert most["batch"] == 16
        assert most["waiting"] > 0
        assert values["mla_trt_preemptions_total"] > 0
