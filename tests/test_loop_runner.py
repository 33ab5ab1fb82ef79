"""The thread around the engine loop: streams from many threads, cancellation, shutting down, and failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx
import pytest
from small_models import Config, lowered

from mla_trt.engines.engine_onnxruntime import OnnxRuntimeEngine
from mla_trt.engines.engine_recorder import RecordingEngine
from mla_trt.errors import MlaTrtError, QueueFullError, RequestFailedError, UsageError
from mla_trt.generation import generate
from mla_trt.serving.loop import EngineLoop
from mla_trt.serving.request import Event, Request
from mla_trt.serving.runner import LoopRunner
from mla_trt.session import Session

CONFIG = Config()
PAGES = 24
WAIT = 60.0


class Gate(RecordingEngine):
    """Runs a step when it is let through."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(OnnxRuntimeEngine(model, pages=PAGES))
        self.open = threading.Event()
        self.reached = threading.Event()

    def run(self, inputs: Mapping[str, np.ndarray], page_copies: np.ndarray) -> dict[str, np.ndarray]:
        self.reached.set()
        assert self.open.wait(WAIT)
        return super().run(inputs, page_copies)


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return lowered(CONFIG)


@pytest.fixture
def gate(model: onnx.ModelProto) -> Gate:
    return Gate(model)


@pytest.fixture
def run(model: onnx.ModelProto) -> Iterator[Callable[..., LoopRunner]]:
    """Makes runners, and closes them with the test."""
    runners = []

    def make(session: Session | None = None, **limits: int) -> LoopRunner:
        runners.append(LoopRunner(EngineLoop(session or Session(model, pages=PAGES), **limits)))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


def ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, CONFIG.vocabulary, length).tolist()


def test_clients_on_many_threads_get_their_own_tokens(model: onnx.ModelProto, run: Callable[..., LoopRunner]) -> None:
    session = Session(model, pages=PAGES)
    runner = run(session, max_batch=8, max_step_tokens=16)
    requests = [Request(ids(1 + seed % 13, seed), 3 + seed % 9) for seed in range(24)]
    found: dict[int, list[int]] = {}

    def client(index: int) -> None:
        stream = runner.submit(requests[index])
        if index % 4 == 3:
            found[index] = [next(stream)]
            stream.cancel()
            found[index].extend(stream)
            assert stream.finish in ("cancelled", "length")
        else:
            found[index] = list(stream)
            assert stream.finish == "length"

    threads = [threading.Thread(target=client, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert runner.close(drain_seconds=WAIT)
    assert sorted(session.free_pages) == list(range(PAGES))
    alone = Session(model, pages=PAGES)
    for index, request in enumerate(requests):
        wanted = [token for _, token in generate(alone, [request.prompt], max_new_tokens=request.max_new_tokens)]
        assert found[index] == (wanted if index % 4 != 3 else wanted[: len(found[index])])


def test_submitting_and_cancelling_do_not_wait_for_a_step(gate: Gate, run: Callable[..., LoopRunner]) -> None:
    runner = run(Session(gate), max_batch=1, max_waiting=1)
    first = runner.submit(Request(ids(3), 5))
    assert gate.reached.wait(WAIT)
    second = runner.submit(Request(ids(3), 5))
    with pytest.raises(QueueFullError):
        runner.submit(Request(ids(3), 5))
    with pytest.raises(UsageError, match="the prompt is empty"):
        runner.submit(Request([], 5))
    assert (runner.loop.stats().running, runner.loop.stats().waiting) == (1, 1)
    with pytest.raises(TimeoutError, match=r"no token came within 0.01 s"):
        first.next_event(timeout=0.01)
    first.cancel()
    gate.open.set()
    assert list(first) == []
    assert first.finish == "cancelled"
    assert len(list(second)) == 5
    assert second.next_event() is None


def test_events_go_to_a_callback_and_one_that_fails_ends_its_own_request(
    run: Callable[..., LoopRunner], caplog: pytest.LogCaptureFixture
) -> None:
    runner = run()
    events: list[Event] = []
    done = threading.Event()

    def gone(event: Event) -> None:
        raise BrokenPipeError("the client is gone")

    def keep(event: Event) -> None:
        events.append(event)
        if event.finish:
            done.set()

    runner.submit(Request(ids(3), 40), on_event=gone)
    runner.submit(Request(ids(3), 5), on_event=keep)
    assert done.wait(WAIT)
    assert [event.finish for event in events] == [None] * 4 + ["length"]
    assert sum(len(event.tokens) for event in events) == 5
    assert runner.close(drain_seconds=WAIT)
    assert runner.loop.stats().finished == {"cancelled": 1, "length": 1}
    assert "cannot be delivered" in caplog.text


def test_closing_lets_requests_finish_or_ends_them_with_an_error(model: onnx.ModelProto, gate: Gate) -> None:
    patient = LoopRunner(EngineLoop(Session(model, pages=PAGES)))
    streams = [patient.submit(Request(ids(3, seed), 9)) for seed in range(3)]
    assert patient.close(drain_seconds=WAIT)
    assert [len(list(stream)) for stream in streams] == [9] * 3
    with pytest.raises(MlaTrtError, match="shutting down"):
        patient.submit(Request(ids(3), 1))
    assert patient.close()

    session = Session(gate)
    hasty = LoopRunner(EngineLoop(session, max_batch=1))
    streams = [hasty.submit(Request(ids(3, seed), 9)) for seed in range(2)]
    assert gate.reached.wait(WAIT)
    threading.Timer(0.1, gate.open.set).start()
    began = time.monotonic()
    assert not hasty.close(drain_seconds=0.0)
    assert time.monotonic() - began < WAIT
    for stream in streams:
        with pytest.raises(RequestFailedError, match="the server is shutting down"):
            list(stream)
        assert stream.finish == "error"
    assert len(session.free_pages) == PAGES


def test_nobody_waits_when_the_loop_itself_fails(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = EngineLoop(Session(model, pages=PAGES))
    runner = LoopRunner(loop)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(loop, "step", lambda: 1 // 0)
    stream = runner.submit(Request(ids(3), 5))
    with pytest.raises(RequestFailedError, match="the engine loop failed: ZeroDivisionError"):
        next(stream)
    with pytest.raises(MlaTrtError, match="the engine loop failed"):
        runner.submit(Request(ids(3), 5))
    runner.close(drain_seconds=WAIT)


def test_where_pages_may_go_none_are_kept_while_nothing_runs(model: onnx.ModelProto) -> None:
    told = threading.Event()
    session = Session(model, pages=PAGES)
    runner = LoopRunner(EngineLoop(session), told.set)
    try:
        prompt = list(range(1, 12))
        first, second = (runner.submit(Request(prompt, 8)) for _ in range(2))
        assert list(first) == list(second)
        assert told.wait(WAIT)
        assert session.free_count == PAGES
        stats = runner.loop.stats()
        assert (stats.pages_cached, stats.running, stats.waiting) == (0, 0, 0)
    finally:
        runner.close()
