"""Finds NVIDIA's tritonserver, and runs it as a child process."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mla_trt.errors import ServerError, UsageError
from mla_trt.serving.triton_repository import STOP_FILE
from mla_trt.signals import Flag

CONTAINER = Path("/opt/tritonserver/bin/tritonserver")
KEPT_LINES = 200
POLL_SECONDS = 0.1
READ_SECONDS = 5.0
"""How long the last lines of a server that has ended may take: a model that outlives it holds its output open."""
RESTRICTED = "shared-memory,model-repository,trace,logging"
"""Parts of Triton's interface that nobody needs who asks for tokens, and that reach beyond them: into memory and files of the machine."""
LOAD_FAILURE = re.compile(r"failed to load '[^']+' version \d+: (.*)")
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Installation:
    """A tritonserver.

    Attributes:
        binary: the program.
        stubs: folder with a stub of the Python backend for each version of Python, beside the backends: so nvidia-pytriton
            ships them; None: the backends are complete.
    """

    binary: Path
    stubs: Path | None = None

    def options(self, python: str, folder: Path) -> list[str]:
        """What must be added to the program's options.

        Args:
            python: version of the Python that runs models, such as "3.12".
            folder: an empty folder for a complete backend.

        Raises:
            UsageError: there is no stub for this Python.
        """
        if self.stubs is None:
            return []
        stub = self.stubs / python / "triton_python_backend_stub"
        if not stub.exists():
            known = ", ".join(sorted((entry.name for entry in self.stubs.iterdir()), key=_numbers))
            raise UsageError(f"nvidia-pytriton has no stub for Python {python}, but for {known}: use one of those")
        backend = folder / "python"
        backend.mkdir(parents=True)
        for file in (self.stubs.parent / "backends" / "python").iterdir():
            if file.name != stub.name:
                (backend / file.name).symlink_to(file)
        (backend / stub.name).symlink_to(stub)
        return [f"--backend-directory={folder}"]


def find_installation(environment: Path | None = None) -> Installation:
    """The tritonserver of a Python environment, on PATH, of NVIDIA's container, or of this Python's nvidia-pytriton.

    Args:
        environment: the folder of a Python environment to look into first.

    Raises:
        ServerError: there is none.
    """
    package = importlib.util.find_spec("pytriton")
    packages = [Path(folder) for folder in (package.submodule_search_locations or ())] if package is not None else []
    named = [] if environment is None else [*environment.resolve().glob("lib/python3*/site-packages/pytriton")]
    on_path = shutil.which("tritonserver")
    candidates = [
        *(folder / "tritonserver" / "bin" / "tritonserver" for folder in named),
        *([Path(on_path)] if on_path is not None else []),
        CONTAINER,
        *(folder / "tritonserver" / "bin" / "tritonserver" for folder in packages),
    ]
    for binary in candidates:
        if binary.exists():
            stubs = binary.resolve().parent.parent / "python_backend_stubs"
            return Installation(binary, stubs if stubs.is_dir() else None)
    raise ServerError(
        "there is no tritonserver on PATH, in /opt/tritonserver or in this Python environment: pip install 'mla-trt[triton]' "
        "into an environment of its own (or name one with --environment), or use NVIDIA's container nvcr.io/nvidia/tritonserver"
    )


def python_version(environment: Path | None) -> str:
    """The version, such as "3.12", of the Python that runs models: that of the environment, or this one."""
    if environment is None or not environment.is_dir():
        return f"{sys.version_info.major}.{sys.version_info.minor}"
    program = environment / "bin" / "python3"
    command = [str(program), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(f"the environment '{environment}' has no Python that runs: {error}") from None


@dataclass(frozen=True)
class Address:
    """Where a tritonserver listens: an IPv4 address, and the ports of its three services."""

    host: str
    http: int
    grpc: int
    metrics: int

    @property
    def reached_at(self) -> str:
        """The address that this machine reaches it at."""
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host


def resolve(host: str) -> str:
    """The IPv4 address of a name.

    Raises:
        UsageError: it has none.
    """
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0])
    except OSError:
        raise UsageError(f"--host is '{host}', which is no IPv4 address of this machine") from None


def choose_ports(host: str, wanted: dict[str, int]) -> dict[str, int]:
    """The ports, all different; 0 becomes a free one.

    Args:
        host: IPv4 address.
        wanted: port by the name of its option.

    Raises:
        UsageError: a port is taken, or the address is not of this machine.
    """
    with contextlib.ExitStack() as held:
        chosen = {}
        for option, port in wanted.items():
            probe = held.enter_context(socket.socket())
            # A port of which only ended connections are left is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                probe.listen(1)
            except (OSError, OverflowError) as error:
                reason = error.strerror if isinstance(error, OSError) else "no such port"
                raise UsageError(
                    f"port {port} of {host} cannot be used ({reason}): give another {option}, or 0 for a free one"
                ) from None
            chosen[option] = probe.getsockname()[1]
        return chosen


class TritonServer:
    """A tritonserver that runs, of which this process is the parent: where this one is killed, it ends too.

    Args:
        installation: which.
        repository: the model repository; models are loaded at the start, and no others later.
        address: where it listens.
        stop_file: a file that does not exist; it tells the model that the server is about to end.
        options: further options.
        path: folder whose `python3` runs models that name no environment; None: whatever PATH says.
        exit_seconds: after SIGTERM, how long it lets requests go on.
        on_line: gets each line that it prints, on another thread.
    """

    def __init__(
        self,
        installation: Installation,
        repository: Path,
        address: Address,
        stop_file: Path,
        *,
        options: Sequence[str] = (),
        path: Path | None = None,
        exit_seconds: int = 30,
        on_line: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.address = address
        self._stop_file = stop_file
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        secret = secrets.token_hex()
        command = [
            str(installation.binary),
            f"--model-repository={repository}",
            *(f"--{what}-address={address.host}" for what in ("http", "grpc", "metrics")),
            f"--http-port={address.http}",
            f"--grpc-port={address.grpc}",
            f"--metrics-port={address.metrics}",
            f"--exit-timeout-secs={exit_seconds}",
            f"--http-restricted-api={RESTRICTED}:mla-trt={secret}",
            f"--grpc-restricted-protocol={RESTRICTED}:mla-trt={secret}",
            *options,
        ]
        environment = os.environ | {STOP_FILE: str(stop_file)}
        if path is not None:
            environment["PATH"] = f"{path}{os.pathsep}{environment.get('PATH', '')}"
        libc = ctypes.CDLL(None)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which then ends the server in order
                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
            )
        except OSError as error:
            raise ServerError(f"'{installation.binary}' cannot be started: {error.strerror}") from None
        self._reader = threading.Thread(target=self._read, args=(on_line,), name="tritonserver's output", daemon=True)
        self._reader.start()

    @property
    def exit_status(self) -> int | None:
        """None as long as it runs."""
        return self._process.poll()

    def wait_ready(self, model: str, seconds: float, stopped: Flag) -> bool:
        """Waits until a model can be asked; returns False where `stopped` was set before.

        Raises:
            ServerError: the model cannot be loaded, the server ended for another reason, or it takes too long.
        """
        url = f"http://{self.address.reached_at}:{self.address.http}/v2/models/{model}/ready"
        deadline = time.monotonic() + seconds
        while not stopped.wait(POLL_SECONDS):
            if self.exit_status is not None:
                raise self.death()
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
                return True
            if time.monotonic() > deadline:
                raise ServerError(f"tritonserver did not load '{model}' within {seconds:g} s (--load-seconds)")
        return False

    def death(self) -> ServerError:
        """Why the server has ended by itself: what our model said, or else its status."""
        self._reader.join(READ_SECONDS)
        if self.reason is not None:
            return ServerError(f"tritonserver cannot load the model: {self.reason}")
        status = self.exit_status
        how = f"was killed by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"
        return ServerError(f"tritonserver {how}; what it said last is above")

    @property
    def reason(self) -> str | None:
        """Why a model cannot be loaded, where that was so."""
        for line in list(self._lines):
            found = LOAD_FAILURE.search(line)
            if found is not None:
                # Triton writes a traceback behind the message, with \\n for the ends of lines.
                return found[1].rpartition("mla-trt: ")[2].partition("\\n")[0].rstrip('"')
        return None

    def last_lines(self, count: int = 20) -> list[str]:
        """What it printed last, without its tables."""
        return [line for line in self._lines if line and line[0] not in "+|"][-count:]

    def stop(self, seconds: float, hurry: Flag) -> bool:
        """Ends it: SIGTERM, and SIGKILL to it and its models after some seconds or when `hurry` is set. Returns whether it ended in order."""
        deadline = time.monotonic() + seconds
        if self.exit_status is None:
            self._stop_file.touch()
            self._process.terminate()
        while self.exit_status is None and time.monotonic() < deadline and not hurry.wait(POLL_SECONDS):
            pass
        in_order = self.exit_status == 0
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return in_order

    def _read(self, on_line: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode(errors="replace").rstrip()
            self._lines.append(line)
            on_line(line)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]
