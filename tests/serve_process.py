"""Runs `mla-trt serve` as a user does, for tests."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from triton_server import ENVIRONMENT, is_alive, process_tree

START_SECONDS = 90
END_SECONDS = 60


class ServeProcess:
    """`mla-trt serve`, on free ports.

    Args:
        model: what it serves.
        folder: where its temporary folder and what it prints go.
        options: further options.
        python: what runs it; models run in .venv-triton.
        port: of the page; 0 is a free one.
    """

    def __init__(
        self, model: Path, folder: Path, *options: str, python: Path = Path(sys.executable), port: int = 0
    ) -> None:
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self._output = folder / "output.txt"
        self._errors = folder / "errors.txt"
        ports = [f"--{what}port={number}" for what, number in (("", port), ("http-", 0), ("grpc-", 0), ("metrics-", 0))]
        environment = [] if python.parent == ENVIRONMENT / "bin" else ["--environment", str(ENVIRONMENT)]
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [str(python), "-m", "mla_trt.cli", "serve", str(model), *ports, *environment, *options],
                stdout=output,
                stderr=errors,
                env=os.environ | {"TMPDIR": str(self.temporary)},
            )

    def __enter__(self) -> ServeProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.end()

    def ready(self) -> ServeProcess:
        """Waits until it says where it listens."""
        deadline = time.monotonic() + START_SECONDS
        while "\nend " not in self._output.read_text():
            assert self.process.poll() is None, self.errors
            assert time.monotonic() < deadline, self.errors
            time.sleep(0.05)
        rows = (line.split(maxsplit=1) for line in self._output.read_text().splitlines())
        self.places = dict(rows)
        return self

    @property
    def port(self) -> int:
        """Of the page."""
        return int(self.places["page"].rpartition(":")[2])

    @property
    def errors(self) -> str:
        """What it printed to stderr."""
        return self._errors.read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal; returns the exit status, with everything gone."""
        children = process_tree(self.process.pid)
        self.process.send_signal(number)
        status = self.process.wait(END_SECONDS)
        assert not any(map(is_alive, children))
        return status

    def metrics(self) -> dict[str, float]:
        """The figures that the page shows."""
        status, answer = self.ask("GET", "/api/metrics")
        assert status == 200, answer
        return answer

    def wait_for(self, seconds: float = 20.0, **wanted: float) -> dict[str, float]:
        """The figures, once some of them have these values."""
        deadline = time.monotonic() + seconds
        while True:
            values = self.metrics()
            if all(values[name] == value for name, value in wanted.items()):
                return values
            assert time.monotonic() < deadline, f"{wanted} does not come: {values}"
            time.sleep(0.05)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """The status and the JSON of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def generate(self, **request: Any) -> PageStream:
        """What the page does at Start."""
        return PageStream(self.port, request)


class PageStream:
    """A stream of the page's server."""

    def __init__(self, port: int, request: dict[str, Any]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._connection.request(
            "POST", "/api/generate", json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
        self.status: int | None = None
        self.tokens: list[int] = []
        self.text = ""
        self.times: list[float] = []
        self.finish = ""
        self.error: str | None = None
        self._answer: http.client.HTTPResponse | None = None

    def events(self) -> Iterator[dict[str, Any]]:
        """The events, as they come."""
        self._answer = answer = self._connection.getresponse()
        self.status = answer.status
        if answer.status != 200:
            self.error = json.loads(answer.read())["error"]
            return
        for line in answer:
            if line.startswith(b"data:"):
                event = json.loads(line[5:])
                self.tokens += event.get("token_ids", [])
                self.text += event.get("text", "")
                self.times += [event["ms"]] if "ms" in event else []
                self.finish = event.get("finish_reason", "")
                self.error = event.get("error")
                yield event

    def wait(self) -> PageStream:
        """Takes all events."""
        for _ in self.events():
            pass
        self._connection.close()
        return self

    def vanish(self) -> None:
        """Closes the connection."""
        if self._answer is not None:
            self._answer.close()
        self._connection.close()
