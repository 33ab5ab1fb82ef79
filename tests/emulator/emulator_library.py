"""Compiles the kernels for a CPU: the sources of plugins/kernels with the headers in `include` in place of those with instructions.

What C++ does not know of CUDA C++ is rewritten: launches, and declarations of shared memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mla_trt.plugins.build import KERNELS
from mla_trt.plugins.library import cache_folder
from mla_trt.plugins.toolchain import find_nvcc

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
FLAGS = [
    "-std=c++20",
    "-march=x86-64-v3",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fwrapv",
    "-fPIC",
    "-fvisibility=hidden",
    "-w",
]


class EmulatorError(Exception):
    """The kernels do not compile for this CPU, or do what no GPU does well: nobody can run, threads part, a barrier that is none."""


_LAUNCH = re.compile(r"([\w:]+)<<<(.+?)>>>\(", re.DOTALL)
_DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")
_STATIC = re.compile(r"\b__shared__ ([^;=(]+);")


def rewrite(source: str) -> str:
    """CUDA C++ as C++ over `emulator.h`."""
    source = _DYNAMIC.sub(r"\1* const \2 = static_cast<\1*>(emulator::dynamic_shared());", source)
    source = _STATIC.sub(_static, source)
    source = _LAUNCH.sub(r"emulator::Launch(\1, \2)(", source)
    return source.replace("defined(__CUDACC__)", "1").replace("defined(__CUDA_ARCH_FEAT_SM90_ALL)", "1")


def _static(match: re.Match[str]) -> str:
    """Variables of the block, each found by the address of a constant that belongs to its declaration."""
    kind, variables = re.fullmatch(r"([\w:]+(?:<[^>]*>)?) (.+)", match[1], re.DOTALL).groups()
    made = []
    for variable in variables.split(", "):
        name, sizes = re.fullmatch(r"(\w+)(.*)", variable, re.DOTALL).groups()
        made.append(
            f"using {name}_kind = {kind}{sizes}; static const char {name}_declared = 0; auto& {name} = "
            f"*static_cast<{name}_kind*>(emulator::static_shared(&{name}_declared, sizeof({name}_kind), alignof({name}_kind)));"
        )
    return " ".join(made)


@contextlib.contextmanager
def built(sources: Path = KERNELS) -> Iterator[Path]:
    """The library of a folder's sources, which may include the kernels' headers; from the cache where nothing has changed. It is there until
    the context ends, then a process with other sources may remove it, which who has loaded it does not notice.

    Raises:
        EmulatorError: a source does not compile.
        PluginLibraryError: CUDA's headers are not here.
    """
    toolkit = find_nvcc().path.parent.parent / "include"
    folder = cache_folder() / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for path in sorted({*_files(KERNELS), *_files(sources), *_files(HERE), *_files(INCLUDE), Path(__file__)}):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    library = folder / f"{sources.name}-{digest.hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes need the same
        if not library.is_file():
            for old in folder.glob(f"{sources.name}-*.so"):
                old.unlink()
            with tempfile.TemporaryDirectory(dir=folder) as work:
                os.replace(_compile(Path(work), sources, toolkit), library)
        yield library


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in {".cu", ".cuh", ".h", ".cpp"}]


def _compile(work: Path, sources: Path, toolkit: Path) -> Path:
    """The library, in the folder ``work``, which gets the rewritten sources."""
    replaced = {path.name for path in _files(INCLUDE)}
    for path in {*_files(KERNELS), *_files(sources)}:
        if path.name not in replaced:
            (work / path.name).write_text(rewrite(path.read_text()))
    units = [work / path.name for path in _files(sources) if path.suffix in {".cu", ".cpp"}]
    units += HERE.glob("*.cpp")

    def compile_one(source: Path) -> Path:
        target = work / f"{source.name}.o"
        level = "-O3" if source.parent == HERE else "-O1"  # the kernels are many templates
        folders = [f"-I{INCLUDE}", f"-I{work}", "-isystem", str(toolkit)]
        _run(
            [
                "g++",
                *FLAGS,
                level,
                *folders,
                "-x",
                "c++",
                "-include",
                "emulator.h",
                "-c",
                str(source),
                "-o",
                str(target),
            ]
        )
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sorted(units, key=lambda path: -path.stat().st_size)))
    library = work / "library.so"
    _run(["g++", "-shared", "-o", str(library), *map(str, objects)])
    return library


def _run(command: list[str]) -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise EmulatorError(f"{' '.join(command)}\n{result.stdout}")
