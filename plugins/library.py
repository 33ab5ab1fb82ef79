"""The compiled libraries: where they lie, and what they were built from and for."""

from __future__ import annotations

import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path

import mla_trt
from mla_trt.errors import PluginLibraryError

PLUGINS = "libmla_trt_plugins.so"
KERNELS = "libmla_trt_kernels.so"

# What mla_build() returns, as it lies in the file. Read there and not through a call: the plugin library loads only beside
# libnvinfer and registers its plugins when it does.
_BUILD = re.compile(r"(\d[\w.+-]*)((?: sm_\d+[af]?)+)")
_LONGEST_VERSION = 64
_ARCHITECTURES = re.compile(rb" sm_[\w ]+\0")
_TENSORRT = re.compile(rb"libnvinfer\.so\.(\d+)\0")


@dataclass(frozen=True)
class Library:
    """A compiled library. ``tensorrt`` is the major version that it loads beside, None for kernels without plugins."""

    path: Path
    version: str
    architectures: tuple[str, ...]
    tensorrt: int | None


def cache_folder() -> Path:
    """What is compiled goes here, as long as no other place is named: one folder a user and version of mla-trt."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mla_trt" / mla_trt.__version__


def default_path(name: str = PLUGINS) -> Path:
    """Where ``mla-trt plugins build`` writes and `find_library` looks."""
    return cache_folder() / name


def describe(path: Path) -> Library:
    """What a library was built from and for.

    Raises:
        PluginLibraryError: the file is not one of ours.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            builds = _builds(content)
            tensorrt = _TENSORRT.search(content)
            major = None if tensorrt is None else int(tensorrt[1])
    except (OSError, ValueError) as error:
        raise PluginLibraryError(f"'{path}' cannot be read: {error}") from error
    if len(builds) != 1:
        raise PluginLibraryError(f"'{path}' is not a library that 'mla-trt plugins build' wrote")
    version, architectures = builds[0].groups()
    return Library(path, version, tuple(architectures.split()), major)


def _builds(content: mmap.mmap) -> list[re.Match[str]]:
    """All texts of the form that mla_build() has. Begins at the architectures, since those are quick to search for."""
    found = []
    for match in _ARCHITECTURES.finditer(content):
        start = content.rfind(b"\0", max(0, match.start() - _LONGEST_VERSION), match.start()) + 1
        text = content[start : match.end() - 1].decode(errors="replace")
        if build := _BUILD.fullmatch(text):
            found.append(build)
    return found


def find_library(path: Path | None = None, name: str = PLUGINS) -> Library:
    """The library at ``path``, else at MLA_TRT_PLUGINS or MLA_TRT_KERNELS, else where ``mla-trt plugins build`` writes it.

    Raises:
        PluginLibraryError: there is none, or it is of another version of mla-trt.
    """
    named = os.environ.get("MLA_TRT_PLUGINS" if name == PLUGINS else "MLA_TRT_KERNELS")
    path = path or (Path(named) if named else default_path(name))
    if not path.is_file():
        option = " --kernels-only" if name == KERNELS else ""
        raise PluginLibraryError(f"there is no '{path}': run 'mla-trt plugins build{option}' first")
    library = describe(path)
    if library.version != mla_trt.__version__:
        raise PluginLibraryError(
            f"'{path}' is of mla-trt {library.version}, but this is {mla_trt.__version__}: run 'mla-trt plugins build' again"
        )
    return library
