"""Fixtures that compile something, once for all tests of a process; processes share the compiler's cache."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from libraries import Probe, header_params, make_probe

from mla_trt.plugins.build import BuildOptions, build
from mla_trt.plugins.kernel_library import KernelLibrary
from mla_trt.plugins.library import Library


@pytest.fixture(scope="session")
def kernels_library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The kernels without TensorRT, for sm_80 and sm_90a."""
    path = tmp_path_factory.mktemp("kernels") / "libmla_trt_kernels.so"
    return build(BuildOptions(output=path, kernels_only=True))


@pytest.fixture(scope="session")
def kernels(kernels_library: Library) -> KernelLibrary:
    return KernelLibrary(kernels_library.path)


@pytest.fixture(scope="session", params=list(header_params()))
def tensorrt_headers(request: pytest.FixtureRequest) -> Path:
    """Every set of TensorRT's headers that is here."""
    folder: Path = request.param
    return folder


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture(scope="session")
def plugin_build(tensorrt_headers: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Library, list[str]]:
    """The plugin library against one set of headers, for sm_80 and sm_90a, and the compiler's warnings."""
    path = tmp_path_factory.mktemp("plugins") / "libmla_trt_plugins.so"
    handler = _Messages()
    logger = logging.getLogger("mla_trt.plugins.build")
    logger.addHandler(handler)
    try:
        library = build(BuildOptions(output=path, tensorrt_include=tensorrt_headers))
    finally:
        logger.removeHandler(handler)
    return library, handler.texts


@pytest.fixture(scope="session")
def plugin_library(plugin_build: tuple[Library, list[str]]) -> Library:
    return plugin_build[0]


@pytest.fixture(scope="session")
def probe(tensorrt_headers: Path, plugin_library: Library, tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return make_probe(tensorrt_headers, plugin_library.path, tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="session")
def real_nvinfer(plugin_library: Library) -> Path:
    """A real libnvinfer of the library's major version, where there is one."""
    name = f"libnvinfer.so.{plugin_library.tensorrt}"
    root = os.environ.get("TENSORRT_ROOT")
    path = Path(root) / "lib" / name if root else None
    if path is None or not path.exists():
        pytest.skip(f"there is no {name} in TENSORRT_ROOT/lib")
    return path
