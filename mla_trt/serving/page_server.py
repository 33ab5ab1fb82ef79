"""The web page of `mla-trt serve`: an HTTP server for its files and for what it asks, which it passes on to a tritonserver.

A client can GET the files of the page and three things under /api/, and POST a prompt to /api/generate. Files are read when the server starts;
nothing that a client sends names one. Other web sites cannot use the server through a visitor's browser: what is posted must be JSON, which a
browser asks for first and gets refused, and on loopback the Host must be this machine.
"""

from __future__ import annotations

import http.client
import json
import logging
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from ipaddress import ip_address
from typing import Any

from mla_trt.errors import UsageError
from mla_trt.serving.text import Tokenizer
from mla_trt.serving.tritonserver import Address

log = logging.getLogger(__name__)

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
MAX_BODY_BYTES = 1 << 20
MAX_CONNECTIONS = 128
IDLE_SECONDS = 30.0
"""How long a client may take to send a request, or to take what it is sent."""
LINGER_SECONDS = 2.0
METRICS_SECONDS = 5.0
LOOK_SECONDS = 0.2
"""How often clients are looked at whether they are still there."""
SETTINGS: Mapping[str, type] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "seed": int,
    "priority": int,
}
"""What a request may say beside its prompt and stop_ids; `mla_trt.serving.triton_repository.CONFIG` has the types."""
RANGES = {"max_new_tokens": 31, "top_k": 31, "priority": 31, "seed": 64}
"""Bits of whole numbers that Triton would cut off without a word."""
METRIC = re.compile(r"^mla_trt_(\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class About:
    """What the page says of the model.

    Attributes:
        name: in Triton.
        engine: what runs it, such as "ONNX Runtime".
        vocabulary: number of token ids, None where it is not known.
        page_size: tokens in a page.
        max_batch: most sequences of a step.
        max_new_tokens, stop_ids: of requests that do not say.
        text: whether prompts may be text.
        grpc: where Triton's clients connect.
    """

    name: str
    engine: str
    vocabulary: int | None
    page_size: int
    max_batch: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    text: bool
    grpc: str


class PageServer(ThreadingHTTPServer):
    """The server; `start` and `close` it.

    Args:
        host, port: where it listens.
        triton: the tritonserver that it asks.
        about: the model.
        tokenizer: of the model, None: prompts are ids.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int, triton: Address, about: About, tokenizer: Tokenizer | None) -> None:
        folder = resources.files("mla_trt.serving") / "page"
        self.files = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}
        self.triton = triton
        self.about = about
        self.tokenizer = tokenizer
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._streams: dict[socket.socket, socket.socket] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        super().__init__((host, port), Handler)
        self.hosts = {host, "127.0.0.1", "localhost"} if ip_address(host).is_loopback else None

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])

    def start(self) -> None:
        """Serves, on threads of its own."""
        threading.Thread(target=self.serve_forever, args=(0.1,), name="page", daemon=True).start()
        threading.Thread(target=self._look, name="page's clients", daemon=True).start()

    def close(self) -> None:
        """Takes no more requests and ends those that run."""
        self._closed.set()
        self.shutdown()
        with self._lock:
            for upstream in self._streams.values():
                _shut(upstream)
        self.server_close()

    @contextmanager
    def watched(self, client: socket.socket, upstream: socket.socket) -> Iterator[None]:
        """Within it, the connection to Triton ends as soon as the client has gone, even where there is nothing to send to it."""
        with self._lock:
            self._streams[client] = upstream
        try:
            yield
        finally:
            with self._lock:
                del self._streams[client]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Takes a connection, if it is not one too many."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serves a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Notes what went wrong with a connection; clients that go away are nothing to talk about."""
        log.debug("the page's connection to %s ended", client_address, exc_info=True)

    def _look(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            with self._lock:
                for client, upstream in self._streams.items():
                    if _is_gone(client):
                        _shut(upstream)


class RefusedError(Exception):
    """A request that gets an error: its HTTP status, and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """One connection of a browser."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "mla-trt", ""
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """A file of the page, the model or its metrics."""
        path = self.path.partition("?")[0]
        if path in self.server.files:
            self._answer(lambda: self.server.files[path])
        elif path == "/api/model":
            self._answer(lambda: (_json(asdict(self.server.about)), "application/json"))
        elif path == "/api/metrics":
            self._answer(lambda: (_json(self._metrics()), "application/json"))
        else:
            self._answer(_not_found)

    def do_POST(self) -> None:
        """Generates."""
        self.close_connection = True
        self._answer(self._generate if self.path == "/api/generate" else _not_found)
        self._linger()

    def _answer(self, make: Callable[[], tuple[bytes, str] | None]) -> None:
        """Sends what `make` gives, a body and its type, or the error that it raises; None was sent already."""
        status = 200
        try:
            if (
                self.server.hosts is not None
                and self.headers.get("Host", "").partition(":")[0] not in self.server.hosts
            ):
                raise RefusedError(HTTPStatus.FORBIDDEN, "this server is for 127.0.0.1 and localhost")
            made = make()
            if made is None:
                return
            body, kind = made
        except RefusedError as error:
            status, kind, body = error.status, "application/json", _json({"error": str(error)})
        except UsageError as error:
            status, kind, body = HTTPStatus.BAD_REQUEST, "application/json", _json({"error": str(error)})
        self._begin(status, kind, len(body))
        self.wfile.write(body)

    def _linger(self) -> None:
        """Reads what is left of a request that was refused before its end: closing at once would take the answer from the client."""
        left = 16 * MAX_BODY_BYTES
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER_SECONDS)
            while left > 0 and (part := self.rfile.read1(1 << 16)):
                left -= len(part)

    def _begin(self, status: int, kind: str, length: int | None) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _metrics(self) -> dict[str, float]:
        address = self.server.triton
        connection = http.client.HTTPConnection(address.reached_at, address.metrics, timeout=METRICS_SECONDS)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode(errors="replace")
        except (OSError, http.client.HTTPException):
            raise RefusedError(HTTPStatus.BAD_GATEWAY, "tritonserver does not answer") from None
        finally:
            connection.close()
        label = f'model="{self.server.about.name}"'
        return {name: float(value) for name, labels, value in METRIC.findall(text) if label in labels.split(",")}

    def _generate(self) -> None:
        began = time.monotonic()
        body = read_prompt(self._body(), self.server.tokenizer)
        address = self.server.triton
        # There is no limit to how long a request may wait in the queue.
        connection = http.client.HTTPConnection(address.reached_at, address.http)
        try:
            connection.connect()
            with self.server.watched(self.connection, connection.sock):
                connection.request(
                    "POST",
                    f"/v2/models/{self.server.about.name}/generate_stream",
                    _json(body),
                    {"Content-Type": "application/json"},
                )
                self._pass_on(connection.getresponse(), body["input_ids"], began)
        except (ConnectionError, http.client.HTTPException):
            raise RefusedError(HTTPStatus.BAD_GATEWAY, "tritonserver does not answer") from None
        finally:
            connection.close()

    def _pass_on(self, response: http.client.HTTPResponse, prompt: list[int], began: float) -> None:
        if response.status != HTTPStatus.OK:
            event = next(_events(response), {})
            raise RefusedError(response.status, str(event.get("error", "tritonserver gives no reason")))
        text_of = self.server.tokenizer.stream(prompt) if self.server.tokenizer is not None else None
        try:
            self._begin(HTTPStatus.OK, "text/event-stream", None)
            self._send({"prompt_tokens": len(prompt)})
            for event in _events(response):
                if "error" in event:
                    self._send({"error": event["error"]})
                    return
                # Triton writes a tensor of one element without brackets, and none of no elements.
                ids = event.get("token_ids", [])
                ids = ids if isinstance(ids, list) else [ids]
                # A browser that draws takes tokens late, so it does not measure.
                milliseconds = round((time.monotonic() - began) * 1000, 2)
                said: dict[str, Any] = {"token_ids": ids, "ms": milliseconds}
                said["finish_reason"] = event.get("finish_reason", "")
                if text_of is not None:
                    said["text"] = text_of(ids)
                self._send(said)
                if said["finish_reason"]:
                    return
            self._send({"error": "tritonserver ended before the answer was complete"})
        except (OSError, http.client.HTTPException) as error:
            # The client has gone, does not take what it is sent, or Triton ended; nobody is left to be told.
            log.debug("a stream of the page ended: %s", error)

    def _send(self, event: Mapping[str, Any]) -> None:
        self.wfile.write(b"data: " + _json(event) + b"\n\n")

    def _body(self) -> Any:
        if self.headers.get_content_type() != "application/json":
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,12}", length):
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "send a Content-Length")
        if int(length) > MAX_BODY_BYTES:
            raise RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the request has {length} bytes: send at most {MAX_BODY_BYTES}"
            )
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the request is no JSON") from None

    def log_message(self, format: str, *args: Any) -> None:
        """Notes a request."""
        log.debug("%s %s", self.address_string(), format % args)


def read_prompt(asked: Any, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What a client asks for, as Triton's inputs.

    Args:
        asked: its JSON.
        tokenizer: of the model; None: prompts are ids.

    Raises:
        UsageError: it is not what it should be.
    """
    if not isinstance(asked, dict):
        raise UsageError("the request is no JSON object")
    inputs: dict[str, Any] = {}
    for name, value in asked.items():
        if name == "text":
            if tokenizer is None:
                raise UsageError("this model has no tokenizer: give input_ids")
            if not isinstance(value, str):
                raise UsageError("'text' is no string")
            inputs["input_ids"] = tokenizer.encode(value)
        elif name in ("input_ids", "stop_ids"):
            if not isinstance(value, list) or not all(_is_whole(item, 31) for item in value):
                raise UsageError(f"'{name}' is not a list of token ids")
            inputs[name] = value
        elif name in SETTINGS:
            whole = SETTINGS[name] is int
            if not _is_whole(value, RANGES[name]) if whole else not _is_number(value):
                raise UsageError(f"'{name}' is not a {'whole ' if whole else ''}number that can be used")
            inputs[name] = value
        else:
            raise UsageError(f"there is no setting '{str(name)[:40]}'")
    if ("text" in asked) == ("input_ids" in asked):
        raise UsageError("give either text or input_ids" if tokenizer is not None else "give input_ids")
    if not inputs["input_ids"]:
        raise UsageError("the prompt is empty")
    return inputs


def _is_whole(value: Any, bits: int) -> bool:
    least = 0 if bits == 64 else -(1 << bits)
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << bits


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a stream of Triton's; an error that is no event is one too."""
    for line in response:
        text = line.removeprefix(b"data:").strip()
        if text:
            with suppress(ValueError):
                event = json.loads(text)
                if isinstance(event, dict):
                    yield event


def _is_gone(client: socket.socket) -> bool:
    poll = select.poll()
    poll.register(client, select.POLLIN)
    try:
        return bool(poll.poll(0)) and client.recv(1, socket.MSG_PEEK) == b""
    except OSError:
        return True


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _not_found() -> None:
    raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such thing")


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
