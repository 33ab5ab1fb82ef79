"""The model of Triton's Python backend: what `1/model.py` of a repository that `mla-trt triton` wrote imports.

Only the backend's own process can import this module, because `triton_python_backend_utils` exists nowhere else. Triton
calls `execute` on one thread; the engine loop has a thread of its own; a third one, the responder, is the only one that
talks to Triton about requests that run: it sends tokens, asks for cancellations and sets the metrics.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from mla_trt.engines.engine import Engine
from mla_trt.engines.engine_file import read_description
from mla_trt.engines.engine_tensorrt import TensorRtEngine, pool_pages
from mla_trt.engines.opening import open_engine
from mla_trt.errors import BadModelError, MlaTrtError, UsageError
from mla_trt.serving.loop import EngineLoop
from mla_trt.serving.request import Event, Request
from mla_trt.serving.runner import LoopRunner
from mla_trt.serving.sampling import Sampling
from mla_trt.serving.triton_repository import STOP_FILE, Settings
from mla_trt.serving.triton_runner import TritonRunner, tells_not_served
from mla_trt.session import Session

POLL_SECONDS = 0.1
"""How often cancellations are asked for and metrics are set."""
MAX_STOP_IDS = 1024


class TritonPythonModel:
    """Streams tokens of many requests that run together. The three methods are the backend's interface."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Opens the model.

        Args:
            args: of the backend: the model's folder, version and configuration.

        Raises:
            TritonModelException: it cannot be opened. Triton gives the message to whoever loads the model.
        """
        try:
            check_tensors()
            parameters = json.loads(args["model_config"]).get("parameters", {})
            self._settings = Settings.parse({name: entry["string_value"] for name, entry in parameters.items()})
            engine, forget = _open(Path(args["model_repository"]), args["model_version"], self._settings)
            loop = EngineLoop(
                Session(engine),
                max_batch=self._settings.max_batch,
                max_step_tokens=self._settings.max_step_tokens,
                max_waiting=self._settings.max_waiting,
            )
        except MlaTrtError as error:
            raise pb_utils.TritonModelException(f"mla-trt: {error}") from None
        self._runner = LoopRunner(loop, forget)
        name, version = args["model_name"], args["model_version"]
        self._responder = Responder(
            Metrics(loop, {"model": name, "version": version}),
            still_served=lambda: _is_served(name),
            on_unload=self._drain_in_background,
        )

    def execute(self, requests: Sequence[Any]) -> None:
        """Takes requests; their responses come later."""
        for request in requests:
            reply = self._responder.begin(request.get_response_sender())
            try:
                stream = self._runner.submit(read_request(request, self._settings), reply.put)
            except UsageError as error:
                reply.fail(str(error), pb_utils.TritonError.INVALID_ARG)
            except MlaTrtError as error:
                reply.fail(str(error), pb_utils.TritonError.UNAVAILABLE)
            except Exception as error:
                reply.fail(f"{type(error).__name__} {error}", pb_utils.TritonError.INTERNAL)
            else:
                reply.cancel = stream.cancel

    def finalize(self) -> None:
        """Ends. Triton calls this when every request has ended, which `Responder` sees to."""
        self._runner.close(self._settings.drain_seconds)
        self._responder.close()
        # Triton's objects must be gone before the interpreter ends: their destructors crash afterwards.
        del self._runner, self._responder
        gc.collect()

    def _drain_in_background(self) -> None:
        threading.Thread(target=self._runner.close, args=(self._settings.drain_seconds,), daemon=True).start()


class Reply:
    """The responses of one request.

    Attributes:
        sender: Triton's.
        cancel: ends the request; None as long as it is not submitted.
    """

    def __init__(self, sender: Any, events: queue.SimpleQueue[tuple[Reply, Event, int] | None]) -> None:
        self.sender = sender
        self.cancel: Callable[[], None] | None = None
        self._events = events

    def put(self, event: Event) -> None:
        """Sends the news of the request, soon."""
        self._events.put((self, event, pb_utils.TritonError.INTERNAL))

    def fail(self, message: str, code: int) -> None:
        """Ends the request with an error, soon."""
        self._events.put((self, Event(-1, finish="error", error=message), code))


class Responder:
    """A thread that sends what the engine loop finds, so that the loop need not wait for Triton.

    Where the loop is faster, the tokens of several steps go out in one response.

    Args:
        metrics: to be kept up to date.
        still_served: whether Triton serves the model. It tells in no other way that it wants to unload the model or to end: it
            waits until all requests are done, and after its exit timeout it kills everything.
        on_unload: called once when that is over.
    """

    def __init__(self, metrics: Metrics, *, still_served: Callable[[], bool], on_unload: Callable[[], None]) -> None:
        self._metrics = metrics
        self._still_served = still_served
        self._on_unload = on_unload
        self._unloading = False
        self._events: queue.SimpleQueue[tuple[Reply, Event, int] | None] = queue.SimpleQueue()
        self._live: dict[Reply, None] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="responder", daemon=True)
        self._thread.start()

    def begin(self, sender: Any) -> Reply:
        """Returns the reply of a new request."""
        reply = Reply(sender, self._events)
        with self._lock:
            self._live[reply] = None
        return reply

    def close(self) -> None:
        """Sends what there is, then ends the thread."""
        self._events.put(None)
        self._thread.join()

    def _run(self) -> None:
        poll_at = 0.0
        while not self._closing:
            for reply, (event, code) in self._collect(max(0.0, poll_at - time.monotonic())).items():
                _log_failure(partial(self._send, reply, event, code))
            if time.monotonic() >= poll_at:
                _log_failure(self._cancel)
                _log_failure(self._metrics.update)
                _log_failure(self._watch)
                poll_at = time.monotonic() + POLL_SECONDS
        _log_failure(self._metrics.update)

    def _collect(self, timeout: float) -> dict[Reply, tuple[Event, int]]:
        """All news of now, as one event a request; waits for the first."""
        found: dict[Reply, tuple[Event, int]] = {}
        try:
            item = self._events.get(timeout=timeout)
            while True:
                if item is None:
                    self._closing = True
                    return found
                reply, event, code = item
                before = found[reply][0].tokens if reply in found else ()
                found[reply] = Event(event.request_id, (*before, *event.tokens), event.finish, event.error), code
                item = self._events.get_nowait()
        except queue.Empty:
            return found

    def _send(self, reply: Reply, event: Event, code: int) -> None:
        final = event.finish is not None
        if final:
            with self._lock:
                del self._live[reply]
        responses = []
        if event.tokens or (final and event.finish not in ("error", "cancelled")):
            ends = event.finish if event.finish not in ("error", "cancelled") else None
            tensors = [
                pb_utils.Tensor("token_ids", np.array(event.tokens, np.int32)),
                pb_utils.Tensor("finish_reason", np.array([(ends or "").encode()], np.object_)),
            ]
            responses.append(pb_utils.InferenceResponse(tensors))
        if event.finish in ("error", "cancelled"):
            error = pb_utils.TritonError(
                event.error or "the request was cancelled",
                code if event.finish == "error" else pb_utils.TritonError.CANCELLED,
            )
            responses.append(pb_utils.InferenceResponse(error=error))
        for index, response in enumerate(responses):
            last = final and index == len(responses) - 1
            reply.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)

    def _watch(self) -> None:
        """Looks whether the model is being unloaded, while that matters."""
        with self._lock:
            if self._unloading or not self._live:
                return
        if not self._still_served():
            self._unloading = True
            self._on_unload()

    def _cancel(self) -> None:
        with self._lock:
            live = list(self._live)
        for reply in live:
            if reply.cancel is not None and reply.sender.is_cancelled():
                reply.cancel()


class Metrics:
    """The figures of a loop on Triton's metrics endpoint.

    Args:
        loop: the loop.
        labels: of every metric.
    """

    def __init__(self, loop: EngineLoop, labels: Mapping[str, str]) -> None:
        self._loop = loop
        counter, gauge = pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.GAUGE
        described = {
            "steps": (counter, "steps run"),
            "tokens": (counter, "tokens given out"),
            "computed_tokens": (counter, "tokens that went through the model"),
            "prefix_tokens": (counter, "tokens that were not computed because their pages were there"),
            "preemptions": (counter, "times that the pages of a request were taken, to be computed again"),
            "tokens_per_second": (gauge, "tokens given out, over the last 10 seconds"),
            "pages": (gauge, "pages of the pool"),
            "pages_in_use": (gauge, "pages of the pool that sequences hold"),
            "pages_cached": (gauge, "of those, pages that are kept for prompts to come only"),
            "waiting": (gauge, "requests in the queue"),
            "running": (gauge, "requests that run"),
            "batch": (gauge, "sequences of the last step"),
        }
        self._metrics = {}
        self._families = []  # a metric does not keep its family alive
        for name, (kind, description) in described.items():
            full = f"mla_trt_{name}" + ("_total" if kind == counter else "")
            family = pb_utils.MetricFamily(name=full, description=description, kind=kind)
            self._families.append(family)
            self._metrics[name] = kind == counter, family.Metric(labels=dict(labels))
        self._last: dict[str, float] = {}

    def update(self) -> None:
        """Sets what changed."""
        stats = self._loop.stats()
        for name, (counts, metric) in self._metrics.items():
            value, last = float(getattr(stats, name)), self._last.get(name)
            if value == last:
                continue
            if counts:
                metric.increment(value - (last or 0.0))
            else:
                metric.set(value)
            self._last[name] = value


def read_request(request: Any, settings: Settings) -> Request:
    """The inputs of a Triton request; `config.pbtxt` says which there are, and Triton has checked types and ranks.

    Raises:
        UsageError: a value that makes no sense.
    """
    given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    one: dict[str, Any] = {}
    for name, value in given.items():
        if name not in ("input_ids", "stop_ids"):
            if value.size != 1:
                raise UsageError(f"'{name}' has {value.size} values: give one")
            one[name] = value.reshape(-1)[0].item()
    stop_ids = given["stop_ids"].tolist() if "stop_ids" in given else settings.stop_ids
    if len(stop_ids) > MAX_STOP_IDS:
        raise UsageError(f"there are {len(stop_ids)} stop ids: give at most {MAX_STOP_IDS}")
    microseconds = request.timeout()
    return Request(
        prompt=given["input_ids"],
        max_new_tokens=one.get("max_new_tokens", settings.max_new_tokens),
        stop_ids=frozenset(stop_ids),
        sampling=Sampling(
            temperature=one.get("temperature", 0.0),
            top_k=one.get("top_k", 0),
            top_p=one.get("top_p", 1.0),
            seed=one.get("seed"),
        ),
        priority=one.get("priority", 0),
        deadline=time.monotonic() + microseconds / 1e6 if microseconds else None,
    )


def check_tensors() -> None:
    """Finds out whether this process can exchange numpy arrays with Triton.

    A stub that was compiled for numpy 1 reads and writes wrong values, without an error, where numpy is 2.

    Raises:
        MlaTrtError: it cannot.
    """
    wanted = np.arange(1, 4, dtype=np.int32)
    found = pb_utils.Tensor.from_dlpack("copy", pb_utils.Tensor("original", wanted)).as_numpy()
    if not np.array_equal(found, wanted):
        raise MlaTrtError(
            f"this tritonserver cannot exchange tensors with numpy {np.__version__}: "
            "install 'numpy<2' into the Python environment of the model"
        )


def _open(folder: Path, version: str, settings: Settings) -> tuple[Engine, Callable[[], None] | None]:
    """The engine of a model, and what is to be called when no page of it will be read any more.

    Args:
        folder: of the model in the repository.
        version: of the model.
        settings: of the model.
    """
    if settings.engine_model is None:
        own = folder / version
        plugins = own / settings.plugins if settings.plugins else None
        if plugins is not None and not plugins.is_file():
            raise BadModelError(f"'{plugins}' does not exist: write the repository again, with --plugins")
        # Where it is a link, the model's other files lie beside what it points to.
        return open_engine((own / settings.model).resolve(), pages=settings.pages, plugins=plugins), None
    other = folder.parent / settings.engine_model
    plan = other / version / settings.model
    description = read_description(plan)
    files = [file for file in other.rglob("*") if file.is_file()]
    runner = TritonRunner(description, settings.engine_model, int(version), files)
    return TensorRtEngine(description, runner, pool_pages(description, settings.pages)), runner.forget


def _is_served(name: str) -> bool:
    """Whether Triton takes requests for a model, and nobody has said that it will soon end.

    It is asked by a request that has no inputs, which Triton refuses in either case: `is_model_ready` now and then ends the
    process with a segmentation fault when the server stops (seen with tritonserver 2.51).
    """
    stop_file = os.environ.get(STOP_FILE)
    if stop_file and os.path.exists(stop_file):
        return False
    request = pb_utils.InferenceRequest(model_name=name, requested_output_names=["token_ids"], inputs=[])
    answers = [answer.error().message() for answer in request.exec(decoupled=True) if answer.has_error()]
    return not any(map(tells_not_served, answers))


def _log_failure(action: Callable[[], None]) -> None:
    """Runs what must not end the thread."""
    try:
        action()
    except Exception as error:
        pb_utils.Logger.log_error(f"mla-trt: {type(error).__name__} {error}")
