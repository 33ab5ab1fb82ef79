"""Starts the real tritonserver of nvidia-pytriton, on loopback, for tests."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = Path(os.environ.get("MLA_TRT_TRITON_ENVIRONMENT", ROOT / ".venv-triton"))
START_SECONDS = 60
LOAD_SECONDS = 180
ANSWER_SECONDS = 60


def missing() -> str | None:
    """Why there is no tritonserver here; None where there is one."""
    if not (ENVIRONMENT / "bin" / "python3").exists():
        return f"there is no {ENVIRONMENT.name}: run the tests with 'make test'"
    if _server_folder() is None:
        error = ENVIRONMENT / "error.txt"
        lines = error.read_text().strip().splitlines() if error.exists() else []
        return "nvidia-pytriton cannot be installed here: " + (
            lines[-1] if lines else "it has no package for this machine"
        )
    return None


def _server_folder() -> Path | None:
    return next(ENVIRONMENT.glob("lib/python3*/site-packages/pytriton/tritonserver"), None)


def backend_folder(folder: Path) -> Path:
    """A backend directory with the stub of the environment's Python, which pytriton keeps apart."""
    server = _server_folder()
    assert server is not None
    version = server.parents[2].name.removeprefix("python")
    target = folder / "python"
    target.mkdir(parents=True)
    for file in (server / "backends" / "python").iterdir():
        if file.is_file() and file.name != "triton_python_backend_stub":
            (target / file.name).symlink_to(file)
    (target / "triton_python_backend_stub").symlink_to(
        server / "python_backend_stubs" / version / "triton_python_backend_stub"
    )
    return folder


def tensorrt_backend(library: Path, libraries: Iterable[Path], folder: Path) -> dict[str, str]:
    """Adds Triton's TensorRT backend to a backend directory.

    Args:
        library: the backend, libtriton_tensorrt.so, as it was built from its source.
        libraries: folders to look for what it needs in: TensorRT and CUDA's runtime.
        folder: the backend directory.

    Returns:
        what the server's environment needs.
    """
    server = _server_folder()
    assert server is not None
    own = server.parents[1] / "nvidia_pytriton.libs"
    target = folder / "tensorrt"
    target.mkdir()
    (target / library.name).symlink_to(library.resolve())
    (target / "libtritonserver.so").symlink_to(next(own.glob("libtritonserver-*.so")))
    needed = re.findall(rb"lib(?:nvinfer|nvinfer_plugin|cudart)\.so\.\d+", library.read_bytes())
    for name in sorted({entry.decode() for entry in needed}):
        found = next((place / name for place in libraries if (place / name).exists()), None)
        assert found is not None, f"there is no {name} in {', '.join(map(str, libraries))}"
        (target / name).symlink_to(found.resolve())
    others = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": os.pathsep.join([str(own), *([others] if others else [])])}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for entry in sockets:
            entry.bind(("127.0.0.1", 0))
        return [entry.getsockname()[1] for entry in sockets]
    finally:
        for entry in sockets:
            entry.close()


def process_tree(root: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):  # it ends meanwhile
        for thread in Path(f"/proc/{root}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                found += map(int, (thread / "children").read_text().split())
    return found + [entry for child in found for entry in process_tree(child)]


def is_alive(process: int) -> bool:
    """Whether a process runs; one that only waits for its parent to look does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


class TritonServer:
    """A tritonserver that loads models when it is told to.

    Args:
        repository: the model repository.
        folder: where its log and its backend directory go.
        options: more options of tritonserver.
        python: folder whose `python3` runs the models.
        tensorrt: adds a TensorRT backend to a backend directory; returns what the server's environment needs.
    """

    def __init__(
        self,
        repository: Path,
        folder: Path,
        *options: str,
        python: Path = ENVIRONMENT / "bin",
        tensorrt: Callable[[Path], dict[str, str]] | None = None,
    ) -> None:
        server = _server_folder()
        assert server is not None
        self.http, self.grpc, self.metrics = _free_ports(3)
        self.log = folder / "tritonserver.log"
        backends = backend_folder(folder / "backends")
        environment = os.environ | (tensorrt(backends) if tensorrt is not None else {})
        command = [
            str(server / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            "--model-control-mode=explicit",
            *(f"--{what}-address=127.0.0.1" for what in ("http", "grpc", "metrics")),
            f"--http-port={self.http}",
            f"--grpc-port={self.grpc}",
            f"--metrics-port={self.metrics}",
            "--metrics-interval-ms=100",
            *options,
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | {"PATH": f"{python}{os.pathsep}{environment['PATH']}"},
                start_new_session=True,
            )
        self.client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{self.grpc}")
        deadline = time.monotonic() + START_SECONDS
        while not self._live():
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.stop()
                raise AssertionError(f"tritonserver does not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def load(self, name: str) -> None:
        """Loads a model."""
        self.client.load_model(name, client_timeout=LOAD_SECONDS)

    def values(self, model: str = "") -> dict[str, float]:
        """Our metrics, by name, as the metrics endpoint has them; of one model where several are served."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except urllib.error.URLError as error:
            ended, said = self.process.poll(), self.log.read_text()[-3000:]
            raise AssertionError(
                f"no metrics ({error}); tritonserver's exit status: {ended}; it said:\n{said}"
            ) from error
        found = re.findall(r"^(mla_trt_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, labels, value in found if not model or f'"{model}"' in labels}

    def wait_for(self, seconds: float = 20.0, model: str = "", **wanted: float) -> dict[str, float]:
        """The metrics, once some of them have these values."""
        deadline = time.monotonic() + seconds
        while True:
            values = self.values(model)
            if all(values[f"mla_trt_{name}"] == value for name, value in wanted.items()):
                return values
            assert time.monotonic() < deadline, f"{wanted} does not come: {values}"
            time.sleep(0.05)

    def stop(self) -> int:
        """SIGTERM; SIGKILL where that does not help. Returns the exit status."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                raise
        return self.process.wait()

    def _live(self) -> bool:
        try:
            return self.client.is_server_live(client_timeout=2)
        except InferenceServerException:
            return False


class Answer:
    """One request on a stream of its own, as a client of its own has it."""

    def __init__(
        self, server: TritonServer, model: str, prompt: Any, *, timeout_us: int | None = None, **inputs: Any
    ) -> None:
        self.client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
        self.tokens: list[int] = []
        self.finish = ""
        self.error: InferenceServerException | None = None
        self._responses: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.client.start_stream(lambda result, error: self._responses.put((result, error)))
        dtypes = {"temperature": np.float32, "top_p": np.float32, "seed": np.uint64}
        tensors = []
        for name, value in {"input_ids": prompt, **inputs}.items():
            if isinstance(value, tritonclient.grpc.InferInput):
                tensors.append(value)
                continue
            array = np.atleast_1d(
                value if isinstance(value, np.ndarray) else np.array(value, dtypes.get(name, np.int32))
            )
            kind = {"i4": "INT32", "i8": "INT64", "f4": "FP32", "u8": "UINT64"}[array.dtype.str[1:]]
            tensors.append(tritonclient.grpc.InferInput(name, list(array.shape), kind))
            tensors[-1].set_data_from_numpy(array)
        self.client.async_stream_infer(model, tensors, timeout=timeout_us, enable_empty_final_response=True)

    def read(self) -> bool:
        """Takes one response; returns whether it was the last."""
        result, error = self._responses.get(timeout=ANSWER_SECONDS)
        if error is not None:
            self.error = error
            return True
        response = result.get_response()
        if response.outputs:
            self.tokens.extend(result.as_numpy("token_ids").tolist())
            self.finish = result.as_numpy("finish_reason")[0].decode()
        return response.parameters["triton_final_response"].bool_param

    def wait(self) -> Answer:
        """Takes all responses and closes the stream."""
        while not self.read():
            pass
        self.client.stop_stream()
        return self

    def close(self) -> None:
        """Closes the stream and the connection."""
        self.client.stop_stream()
        self.client.close()

    def vanish(self) -> None:
        """Ends the connection as a client does that goes away."""
        self.client.stop_stream(cancel_requests=True)
        self.client.close()


def assert_each_got_its_own(
    answers: Sequence[Answer], asked: Sequence[tuple[list[int], int]], alone: Callable[[list[int], int], list[int]]
) -> None:
    """Every stream has the tokens of its prompt alone; every fifth client vanished, so that its stream has the first of them."""
    for case, (answer, (prompt, count)) in enumerate(zip(answers, asked, strict=True)):
        assert answer.error is None, answer.error
        if case % 5:
            assert (answer.tokens, answer.finish) == (alone(prompt, count), "length"), f"stream {case}"
        else:
            assert answer.tokens == alone(prompt, len(answer.tokens)), f"stream {case}"
