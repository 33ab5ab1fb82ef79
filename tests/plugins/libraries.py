"""The compiled libraries for tests: TensorRT's headers, what was built with them, and a probe that asks a plugin library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mla_trt.plugins.toolchain import find_nvcc, find_tensorrt_headers

SOURCES = Path(__file__).parent
ENVIRONMENT = "MLA_TRT_TENSORRT_INCLUDE"
FOLDER = Path(os.environ.get(ENVIRONMENT, Path(__file__).resolve().parents[3] / "shared" / "tensorrt-headers"))


def header_folders() -> list[Path]:
    """Folders with TensorRT's headers: the one that is named, or those in it, one for each version."""
    return [folder for folder in (FOLDER, *sorted(FOLDER.glob("*"))) if (folder / "NvInferRuntime.h").is_file()]


def header_params() -> Iterator[Any]:
    """Parameters of tests that run for every set of headers; without any, one that is skipped."""
    for folder in header_folders():
        version = find_tensorrt_headers(folder).version
        yield pytest.param(folder, id="tensorrt-" + ".".join(map(str, version)))
    if not header_folders():
        reason = (
            f"TensorRT's headers are not in {FOLDER}; {ENVIRONMENT} names their folder, or one with a folder a version"
        )
        yield pytest.param(None, id="tensorrt", marks=pytest.mark.skip(reason=reason))


@dataclass(frozen=True)
class Probe:
    """A plugin library beside a libnvinfer, asked what TensorRT would ask."""

    program: Path
    nvinfer: Path
    plugins: Path

    def run(self, action: str, *arguments: str, text: str = "") -> Any:
        """What the probe prints, read from JSON. Fails where it crashes."""
        result = subprocess.run(
            [self.program, self.nvinfer, self.plugins, action, *arguments],
            input=text,
            capture_output=True,
            text=True,
            env={**os.environ, "LD_LIBRARY_PATH": str(self.nvinfer.parent)},
        )
        assert result.returncode == 0, f"exit status {result.returncode}: {result.stderr}"
        return json.loads(result.stdout)


def make_probe(headers: Path, plugins: Path, folder: Path) -> Probe:
    """Compiles the probe, and a libnvinfer of nothing but a registry, against these headers; copies the plugin library."""
    major = find_tensorrt_headers(headers).version[0]
    nvinfer = folder / f"libnvinfer.so.{major}"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Wno-deprecated-declarations"]
    flags += ["-isystem", str(headers), "-isystem", str(find_nvcc().path.parent.parent / "include")]
    shared = ["-fPIC", "-shared", f"-Wl,-soname,{nvinfer.name}"]
    for source, output, more in (("fake_nvinfer.cpp", nvinfer, shared), ("probe.cpp", folder / "probe", [])):
        command = ["g++", *flags, *more, str(SOURCES / source), "-o", str(output), "-ldl"]
        subprocess.run(command, check=True)
    plugins = Path(shutil.copy(plugins, folder))
    shutil.copy(plugins, f"{plugins}.copy")
    return Probe(folder / "probe", nvinfer, plugins)
