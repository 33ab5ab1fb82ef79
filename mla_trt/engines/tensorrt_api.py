"""TensorRT's Python package and our plugin library, loaded when they are needed and not before.

Every error that has a cause outside of this program is one line that names the cause: no driver, no package, a plugin
library that does not load, was built from another version, or for other GPUs.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_trt.cuda import Gpu
from mla_trt.errors import BadModelError, MlaTrtError

if TYPE_CHECKING:
    from mla_trt.plugins.library import Library

log = logging.getLogger("mla_trt.tensorrt")

LONGEST_MESSAGE = 600


def load_tensorrt() -> Any:
    """The module `tensorrt`, or the bindings below it.

    Raises:
        MlaTrtError: neither can be loaded.
    """
    reasons = []
    for name in ("tensorrt", "tensorrt_bindings"):
        try:
            module = importlib.import_module(name)
        except Exception as error:  # the package raises whatever its libraries give
            reasons.append(" ".join(str(error).split()))
            continue
        if hasattr(module, "Builder"):
            return module
    raise MlaTrtError(
        f"TensorRT's Python package cannot be loaded ({reasons[0] if reasons else 'it is empty'}): pip install tensorrt "
        "from NVIDIA's index, or use NVIDIA's TensorRT container"
    )


class Messages:
    """What TensorRT said was wrong, in order."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def add(self, level: int, text: str) -> None:
        """Takes a message of a level of `logging`."""
        text = " ".join(text.split())
        if level >= logging.ERROR:
            self.errors.append(text)
        log.log(min(level, logging.INFO) if level < logging.WARNING else logging.DEBUG, "%s", text)

    def take(self) -> str:
        """The errors since the last call, in one line."""
        found = list(dict.fromkeys(self.errors))
        self.errors.clear()
        line = "; ".join(found) or "TensorRT gave no reason"
        return line if len(line) <= LONGEST_MESSAGE else line[:LONGEST_MESSAGE] + " ..."


def make_logger(trt: Any, messages: Messages) -> Any:
    """A logger of TensorRT that keeps errors and passes the rest on to `logging`."""
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.INFO,
        severity.VERBOSE: logging.DEBUG,
    }

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            messages.add(levels.get(severity, logging.DEBUG), msg)

    return Logger()


def start(trt: Any, messages: Messages) -> Any:
    """A logger, with which TensorRT's own plugins are registered too: its parser makes some ONNX ops of them.

    Raises:
        MlaTrtError: they cannot be.
    """
    logger = make_logger(trt, messages)
    if not trt.init_libnvinfer_plugins(logger, ""):
        raise MlaTrtError(f"TensorRT's own plugins (libnvinfer_plugin) cannot be loaded: {messages.take()}")
    return logger


def load_plugins(path: Path | None, gpu: Gpu, version: str) -> str:
    """Loads the plugin library, which registers its plugins with TensorRT.

    Args:
        path: the library; None: the one that `mla-trt plugins build` made.
        gpu: the GPU that it must have code for.
        version: of the TensorRT that is loaded.

    Returns:
        what it was built from and for: package version and architectures, such as "0.1.0 sm_80 sm_90a".

    Raises:
        MlaTrtError: there is none, it does not load, or it does not fit this package, the GPU or TensorRT.
    """
    from mla_trt.plugins.library import find_library

    library = find_library(path)
    check_plugins(library, gpu, version)
    try:
        ctypes.CDLL(str(library.path.resolve()))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise MlaTrtError(f"the plugin library '{library.path}' cannot be loaded: {reason}") from None
    return " ".join((library.version, *(f"{name}" for name in library.architectures)))


def check_plugins(library: Library, gpu: Gpu, version: str) -> None:
    """Checks that a plugin library was built for the TensorRT and the GPU that are here.

    Raises:
        MlaTrtError: it was not.
    """
    major = int(version.split(".")[0])
    if library.tensorrt != major:
        built = "without TensorRT" if library.tensorrt is None else f"for TensorRT {library.tensorrt}"
        raise MlaTrtError(
            f"the plugin library '{library.path}' was built {built}, and this is TensorRT {version}: run "
            f"'mla-trt plugins build' with the headers of TensorRT {major} (--tensorrt-include)"
        )
    if not any(serves(architecture, gpu.compute_capability) for architecture in library.architectures):
        wanted = gpu.compute_capability.replace(".", "")
        raise MlaTrtError(
            f"the plugin library '{library.path}' has code for {', '.join(library.architectures)}, and this GPU "
            f"({gpu.name}) needs sm_{wanted}: run 'mla-trt plugins build --arch {wanted}'"
        )


def serves(architecture: str, compute_capability: str) -> bool:
    """Whether a library for an architecture runs on a GPU. For the newest portable architecture it has PTX, which later
    GPUs take too; sm_90a is for 9.0 alone, sm_100f for 10.x.

    Args:
        architecture: such as "sm_80".
        compute_capability: such as "9.0".
    """
    number = architecture.removeprefix("sm_")
    major, minor = divmod(int(number.rstrip("af")), 10)
    has = tuple(int(part) for part in compute_capability.split("."))
    if number.endswith("a"):
        return (major, minor) == has
    return (major, minor) <= has and (major == has[0] or not number.endswith("f"))


def check_fits(
    tensorrt: str, compute_capability: str, built_on: str, plugins: str, *, version: str, gpu: Gpu, loaded: str
) -> None:
    """Checks that an engine runs with what is here.

    Args:
        tensorrt, compute_capability, built_on, plugins: what it was built with, by its description.
        version: of the TensorRT here.
        gpu: the GPU here.
        loaded: build of the plugin library here.

    Raises:
        BadModelError: it does not.
    """
    if version != tensorrt:
        raise BadModelError(
            f"the engine was built with TensorRT {tensorrt}, and this is {version}: build it again, or install tensorrt=={tensorrt}"
        )
    if gpu.compute_capability != compute_capability:
        raise BadModelError(
            f"the engine was built for compute capability {compute_capability} ({built_on}), and this GPU is a {gpu.name} of "
            f"{gpu.compute_capability}: build it again here"
        )
    if loaded.split()[:1] != plugins.split()[:1]:
        raise BadModelError(
            f"the engine was built with plugins of version {plugins.split()[0] if plugins else 'unknown'}, and the plugin "
            f"library is of {loaded.split()[0] if loaded else 'unknown'}: build the engine again"
        )
    if gpu.name != built_on:
        log.warning(
            "the engine was built on a %s and runs on a %s: it may be slower than one built here", built_on, gpu.name
        )
