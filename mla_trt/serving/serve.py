"""`mla-trt serve`: a tritonserver with one model, and a web page that uses it."""

from __future__ import annotations

import logging
import math
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path

from rich.console import Console

from mla_trt.engines.engine_file import is_engine, read_description
from mla_trt.engines.engine_onnxruntime import embedded_vocabulary, load_structure
from mla_trt.errors import ServerError, UsageError
from mla_trt.metadata import LoweredMetadata
from mla_trt.serving.page_server import About, PageServer
from mla_trt.serving.text import TOKENIZER, Tokenizer, stop_ids_of
from mla_trt.serving.triton_repository import MODEL, Settings, default_name, write_repository
from mla_trt.serving.tritonserver import (
    Address,
    TritonServer,
    choose_ports,
    find_installation,
    python_version,
    resolve,
)
from mla_trt.signals import ENDING, Ended, Flag, handled

log = logging.getLogger(__name__)

EXIT_SECONDS = 10
"""What tritonserver gets beyond the time in which requests may go on."""
POLL_SECONDS = 0.2
SIGNALS = (signal.SIGINT, *ENDING)


@dataclass(frozen=True)
class ServeOptions:
    """How to serve.

    Attributes:
        host: address or name that everything listens on.
        port: of the page; None: there is no page.
        http_port, grpc_port, metrics_port: of tritonserver. A port of 0 is any free one.
        name: of the model in Triton; None: that of the folder or engine.
        repository: folder of a model repository to write; None: a temporary one, which has links to the model.
        environment: the Python environment that runs the model; None: the one that runs this.
        plugins: TensorRT's plugin library; None: the one that is found.
        tokenizer: a tokenizer.json; None: the one beside the model, if any.
        stop_ids: of requests that do not say; None: those of the generation_config.json beside the model, if any.
        load_seconds: how long tritonserver may take until the model can be asked.
    """

    host: str = "127.0.0.1"
    port: int | None = 8080
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    name: str | None = None
    repository: Path | None = None
    environment: Path | None = None
    plugins: Path | None = None
    tokenizer: Path | None = None
    stop_ids: tuple[int, ...] | None = None
    load_seconds: float = 600.0


def serve(model: Path, settings: Settings, options: ServeOptions, *, quiet: bool = False) -> int:
    """Serves until SIGINT, SIGTERM or SIGHUP comes; a second one ends what still runs.

    Args:
        model: the folder that `mla-trt lower` wrote, the model in it, or the engine that `mla-trt build` wrote.
        settings: of the model.
        options: of the server.
        quiet: do not say what goes on.

    Returns:
        the exit status: 0, or 1 where tritonserver had to be killed.

    Raises:
        MlaTrtError: the model or an option cannot be used.
        ServerError: there is no tritonserver, or it ended by itself.
    """
    folder = model if model.is_dir() else model.parent
    stop_ids = options.stop_ids if options.stop_ids is not None else stop_ids_of(folder)
    settings = replace(settings, stop_ids=stop_ids)
    tokenizer = _open_tokenizer(folder, options.tokenizer) if options.port is not None else None
    name = options.name or default_name(model)
    installation = find_installation(options.environment)
    host = resolve(options.host)
    address, page_port = _addresses(host, options)
    console = Console(stderr=True, quiet=quiet)
    with ExitStack() as stack:
        signals = _Signals()
        stack.enter_context(handled(SIGNALS, signals.note))
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mla-trt-serve-")))
        repository = options.repository or work / "repository"
        write_repository(
            model,
            repository,
            settings,
            name=name,
            plugins=options.plugins,
            environment=options.environment,
            link=options.repository is None,
        )
        about = _about(model, name, settings, tokenizer is not None, f"{address.reached_at}:{address.grpc}")
        signals.armed = True
        exit_seconds = math.ceil(settings.drain_seconds) + EXIT_SECONDS
        server = TritonServer(
            installation,
            repository,
            address,
            work / "stop",
            options=installation.options(python_version(options.environment), work / "backends"),
            path=Path(sys.executable).parent if options.environment is None else None,
            exit_seconds=exit_seconds,
            on_line=lambda line: log.info("tritonserver: %s", line),
        )
        in_order = False
        try:
            with console.status(f"tritonserver loads '{name}'"):
                ready = server.wait_ready(name, options.load_seconds, signals.stopped)
            if ready:
                if page_port is not None:
                    stack.callback(_start_page(host, page_port, address, about, tokenizer).close)
                _announce(address, page_port, about, quiet=quiet)
            while not signals.stopped.wait(POLL_SECONDS):
                if server.exit_status is not None:
                    raise server.death()
            console.print(
                f"ending: requests that run have {settings.drain_seconds:g} s (Ctrl-C: none)", highlight=False
            )
        except ServerError:
            if server.reason is None:
                print(*server.last_lines(), sep="\n", file=sys.stderr)
            raise
        finally:
            in_order = server.stop(exit_seconds + EXIT_SECONDS, signals.hurry)
    if not in_order:
        log.error("tritonserver did not end in order, and was killed if it was still there")
    return 0 if in_order else 1


def _start_page(host: str, port: int, address: Address, about: About, tokenizer: Tokenizer | None) -> PageServer:
    try:
        page = PageServer(host, port, address, about, tokenizer)
    except OSError as error:
        raise UsageError(f"port {port} of {host} cannot be used ({error.strerror}): give another --port") from None
    page.start()
    return page


class _Signals:
    """What SIGINT, SIGTERM and SIGHUP do.

    Attributes:
        armed: False: they raise `Ended`; True: the first one sets `stopped`, the next one `hurry`.
    """

    def __init__(self) -> None:
        self.armed = False
        self.stopped, self.hurry = Flag(), Flag()

    def note(self, number: int, frame: object) -> None:
        if not self.armed:
            raise Ended(number)
        (self.hurry if self.stopped.is_set() else self.stopped).set()


def _addresses(host: str, options: ServeOptions) -> tuple[Address, int | None]:
    wanted = {
        "--http-port": options.http_port,
        "--grpc-port": options.grpc_port,
        "--metrics-port": options.metrics_port,
    }
    if options.port is not None:
        wanted["--port"] = options.port
    ports = choose_ports(host, wanted)
    address = Address(host, ports["--http-port"], ports["--grpc-port"], ports["--metrics-port"])
    return address, ports.get("--port")


def _open_tokenizer(folder: Path, path: Path | None) -> Tokenizer | None:
    if path is not None:
        return Tokenizer(path)
    if not (folder / TOKENIZER).is_file():
        return None
    try:
        return Tokenizer(folder / TOKENIZER)
    except UsageError as error:
        log.warning("the page takes token ids, not text: %s", error)
        return None


def _about(model: Path, name: str, settings: Settings, text: bool, grpc: str) -> About:
    if is_engine(model):
        description = read_description(model)
        metadata, vocabulary = description.metadata, description.vocabulary
        engine = f"TensorRT {description.tensorrt}"
    else:
        structure = load_structure(model / MODEL if model.is_dir() else model)
        metadata = LoweredMetadata.of(structure)
        vocabulary = metadata.vocabulary or embedded_vocabulary(structure, metadata.token_input)
        engine = "ONNX Runtime"
    return About(
        name=name,
        engine=engine,
        vocabulary=vocabulary,
        page_size=metadata.page_size,
        max_batch=settings.max_batch,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=settings.stop_ids,
        text=text,
        grpc=grpc,
    )


def _announce(address: Address, page_port: int | None, about: About, *, quiet: bool) -> None:
    if not ip_address(address.host).is_loopback:
        print(
            f"mla-trt: WARNING: listening on {address.host}: whoever reaches this machine over the network can use the model, "
            "and nothing is encrypted or asks for a password",
            file=sys.stderr,
        )
    base = f"http://{address.reached_at}"
    url = f"{base}:{address.http}/v2/models/{about.name}/generate_stream"
    rows = {
        "model": f"{about.name}, on {about.engine}",
        "page": f"{base}:{page_port}" if page_port is not None else None,
        "HTTP": url,
        "gRPC": about.grpc,
        "metrics": f"{base}:{address.metrics}/metrics",
        "try": f"curl -N {url} -d '{{\"input_ids\": [1, 5, 9]}}'",
        "end": "Ctrl-C",
    }
    for what, value in rows.items():
        if value is not None and not quiet:
            print(f"{what:8} {value}", flush=True)
