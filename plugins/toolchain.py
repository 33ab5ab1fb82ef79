"""What compiles the kernels and the plugins: nvcc and TensorRT's headers, where they are on this machine."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mla_trt.errors import PluginLibraryError

OLDEST_TENSORRT = (10, 6)  # the oldest that the plugins were compiled and run with
SYSTEM_TOOLKIT = Path("/usr/local/cuda")
TENSORRT_FOLDERS = (
    Path("/usr/include/x86_64-linux-gnu"),
    Path("/usr/include/aarch64-linux-gnu"),
    Path("/usr/include"),
    Path("/usr/local/include"),
    Path("/usr/local/tensorrt/include"),
    Path("/usr/local/TensorRT/include"),
    Path("/opt/tensorrt/include"),
)
# The compiler searches these anyway; named again as -isystem they would hide the C++ library's own headers.
COMPILER_FOLDERS = (Path("/usr/include"), Path("/usr/local/include"), Path("/usr/include/x86_64-linux-gnu"))


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler. ``version`` is all that it says of itself."""

    path: Path
    version: str

    def library_flags(self) -> list[str]:
        """Where its static runtime lies; PyPI's packages keep it in ``lib``, which nvcc itself does not search."""
        return [f"-L{folder}" for folder in (self.path.parent.parent / "lib",) if folder.is_dir()]


@dataclass(frozen=True)
class TensorRtHeaders:
    """A folder with NvInferRuntime.h. ``version_text`` is the file that says which version it is, to the last number."""

    folder: Path
    version: tuple[int, int]
    version_text: str

    def flags(self) -> list[str]:
        """Compiler flags that find the headers, without warnings for what they contain."""
        return [] if self.folder in COMPILER_FOLDERS else ["-isystem", str(self.folder)]


def find_nvcc(named: Path | None = None) -> Nvcc:
    """The compiler named, else that of CUDA_HOME or CUDA_PATH, PATH, the system's toolkit, PyPI's packages."""
    if named is not None:
        if not named.is_file():
            raise PluginLibraryError(f"--nvcc is '{named}': there is no such file")
        return _nvcc(named)
    for candidate in _nvcc_candidates():
        if candidate.is_file():
            return _nvcc(candidate)
    raise PluginLibraryError(
        "nvcc was not found: install a CUDA toolkit (tried: 13.0) and set CUDA_HOME, or pip install 'mla-trt[kernels]'"
    )


def _nvcc_candidates() -> list[Path]:
    candidates = [
        Path(os.environ[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)
    ]
    on_path = shutil.which("nvcc")
    if on_path is not None:
        candidates.append(Path(on_path))
    candidates.append(SYSTEM_TOOLKIT / "bin" / "nvcc")
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        candidates += sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)
    return candidates


def _nvcc(path: Path) -> Nvcc:
    try:
        result = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PluginLibraryError(f"'{path}' does not run: {error}") from error
    return Nvcc(path.resolve(), result.stdout.strip())


def find_tensorrt_headers(named: Path | None = None) -> TensorRtHeaders:
    """The folder named, else TENSORRT_ROOT/include, else one of the system's usual folders."""
    if named is not None:
        if not _has_headers(named):
            raise PluginLibraryError(f"--tensorrt-include is '{named}': there is no NvInferRuntime.h in it")
        return _headers(named)
    root = os.environ.get("TENSORRT_ROOT")
    folders = [Path(root) / "include"] if root else []
    for folder in (*folders, *TENSORRT_FOLDERS):
        if _has_headers(folder):
            return _headers(folder)
    raise PluginLibraryError(
        "TensorRT's headers were not found: install libnvinfer-headers-dev of your TensorRT's version (or unpack include/ of "
        "github.com/NVIDIA/TensorRT at that version) and give --tensorrt-include DIR or set TENSORRT_ROOT"
    )


def _has_headers(folder: Path) -> bool:
    return (folder / "NvInferRuntime.h").is_file() and (folder / "NvInferVersion.h").is_file()


def _headers(folder: Path) -> TensorRtHeaders:
    folder = folder.resolve()
    text = (folder / "NvInferVersion.h").read_text(errors="replace")
    defined: dict[str, str] = dict(re.findall(r"^#define\s+(\w+)\s+(\w+)", text, re.MULTILINE))

    def number(macro: str) -> int:
        value = defined.get(macro, "")
        value = defined.get(value, value)  # 11.x names the number through a second macro
        if not value.isdigit():
            raise PluginLibraryError(f"'{folder / 'NvInferVersion.h'}' does not say which version of TensorRT it is")
        return int(value)

    version = (number("NV_TENSORRT_MAJOR"), number("NV_TENSORRT_MINOR"))
    if version < OLDEST_TENSORRT:
        oldest = ".".join(map(str, OLDEST_TENSORRT))
        found = ".".join(map(str, version))
        raise PluginLibraryError(f"'{folder}' has TensorRT {found}, but the plugins need {oldest} or newer")
    return TensorRtHeaders(folder, version, text)
