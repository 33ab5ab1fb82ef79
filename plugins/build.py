"""Compiles the kernels, and the TensorRT plugins over them, into one library with nvcc.

Objects are kept in a cache under a name made from everything that went into them, so that a second build compiles only what
changed. The TensorRT library itself is not needed: a stand-in with its soname is linked instead.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import mla_trt
from mla_trt.errors import PluginLibraryError, UsageError
from mla_trt.plugins import library
from mla_trt.plugins.toolchain import Nvcc, TensorRtHeaders, find_nvcc, find_tensorrt_headers

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
KERNELS = HERE / "kernels"
TENSORRT = HERE / "tensorrt"
EXPORTS = TENSORRT / "exports.map"
STUB = TENSORRT / "stub" / "nvinfer.cpp"

DEFAULT_ARCHITECTURES = ("80", "90a")
OLDEST_ARCHITECTURE = 80
KEPT_OBJECTS = 8  # of each source, the newest ones

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_ERROR = re.compile(r"^.*\b(?:error|fatal|undefined reference)\b.*$", re.IGNORECASE | re.MULTILINE)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class BuildOptions:
    """``architectures`` as nvcc names them, such as 80 or 90a; ``output`` None: where `find_library` looks."""

    output: Path | None = None
    architectures: tuple[str, ...] = DEFAULT_ARCHITECTURES
    kernels_only: bool = False
    tensorrt_include: Path | None = None
    nvcc: Path | None = None
    jobs: int | None = None


@dataclass(frozen=True)
class _Unit:
    source: Path
    content: str  # a digest of the source and what it includes
    command: list[str]  # without the compiler and the output
    object: Path

    @property
    def messages(self) -> Path:
        return self.object.with_suffix(".txt")


def parse_architectures(text: str) -> tuple[str, ...]:
    """``"90a,80"`` as ``("80", "90a")``: compute capabilities without the point, in ascending order."""
    names = [part.strip().removeprefix("sm_").replace(".", "") for part in text.split(",") if part.strip()]
    for name in names:
        found = re.fullmatch(r"(\d{2,3})[af]?", name)
        if found is None:
            raise UsageError(f"--arch is '{text}': give compute capabilities with commas between, such as 80,90a")
        if int(found[1]) < OLDEST_ARCHITECTURE:
            raise UsageError(f"--arch names sm_{name}, but the kernels need sm_{OLDEST_ARCHITECTURE} or newer")
    if not names:
        raise UsageError("--arch is empty: give compute capabilities with commas between, such as 80,90a")
    return tuple(sorted(set(names), key=lambda name: (int(name.rstrip("af")), name)))


def build(options: BuildOptions, progress: Progress | None = None) -> library.Library:
    """Compiles what is not in the cache, links, and writes the library.

    What the compiler says of sources that compile is logged as a warning, at every build.

    Raises:
        PluginLibraryError: compiler or headers are missing, or a source does not compile.
    """
    report = progress or (lambda text: None)
    nvcc = find_nvcc(options.nvcc)
    if shutil.which("g++") is None:
        raise PluginLibraryError("g++ was not found: nvcc needs it; on Debian and Ubuntu: apt-get install g++")
    headers = None if options.kernels_only else find_tensorrt_headers(options.tensorrt_include)
    output = options.output or library.default_path(library.KERNELS if options.kernels_only else library.PLUGINS)
    objects = library.cache_folder() / "objects"
    for folder in (objects, output.parent):
        _make_folder(folder)
    log.info("nvcc: %s", nvcc.path)
    if headers is not None:
        log.info("TensorRT headers: %s, version %d.%d", headers.folder, *headers.version)

    with (objects / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second build would compile the same
        units = list(_units(nvcc, headers, options.architectures, objects))
        _compile_all(nvcc, units, options.jobs or os.cpu_count() or 1, len(options.architectures), report)
        for unit in units:
            if messages := unit.messages.read_text():
                log.warning("%s:\n%s", unit.source.name, messages)
        report(f"link {output.name}")
        _link(nvcc, headers, [unit.object for unit in units], output)
        _prune(objects)
    return library.describe(output)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PluginLibraryError(f"the folder '{folder}' cannot be made: {error.strerror}") from error


def _units(nvcc: Nvcc, headers: TensorRtHeaders | None, architectures: Sequence[str], objects: Path) -> Iterator[_Unit]:
    common = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    device = [*common, *_code_flags(architectures)]
    names = " ".join(f"sm_{name}" for name in architectures)
    build_name = f'-DMLA_BUILD="{mla_trt.__version__} {names}"'
    for source in sorted(KERNELS.glob("*.cu")):
        yield _unit(nvcc, source, device, objects)
    for source in sorted(KERNELS.glob("*.cpp")):
        yield _unit(nvcc, source, [*common, build_name] if source.name == "api.cpp" else common, objects)
    if headers is not None:
        for source in sorted(TENSORRT.glob("*.cpp")):
            yield _unit(nvcc, source, common, objects, headers)


def _code_flags(architectures: Sequence[str]) -> list[str]:
    """Machine code for each architecture, and PTX of the newest one that later GPUs can take."""
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    portable = [name for name in architectures if name.isdigit()]
    if portable:
        flags.append(f"-gencode=arch=compute_{portable[-1]},code=compute_{portable[-1]}")
    return flags


def _unit(nvcc: Nvcc, source: Path, flags: list[str], objects: Path, headers: TensorRtHeaders | None = None) -> _Unit:
    """Where files lie does not go into the object's name: copies of the source tree share the cache."""
    content = _content(source)
    facts = (nvcc.version, *flags, headers.version_text if headers is not None else "", content)
    key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:20]
    folders = [f"-I{KERNELS}", *(headers.flags() if headers is not None else [])]
    target = objects / f"{source.parent.name}-{source.stem}-{key}.o"
    return _Unit(source, content, [*flags, *folders, "-c", str(source)], target)


def _content(source: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(_closure(source), key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _closure(source: Path) -> set[Path]:
    """The source and the files of ours that it includes, directly or not."""
    found: set[Path] = set()
    pending = [source]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found.add(path)
        for name in _INCLUDE.findall(path.read_text()):
            pending += [candidate for candidate in (path.parent / name, KERNELS / name) if candidate.is_file()][:1]
    return found


def _compile_all(nvcc: Nvcc, units: Sequence[_Unit], jobs: int, architectures: int, report: Progress) -> None:
    missing = [unit for unit in units if not (unit.object.is_file() and unit.messages.is_file())]
    if not missing:
        return
    threads = min(architectures, max(1, jobs // len(missing)))
    done = len(units) - len(missing)
    report(f"compile {len(missing)} of {len(units)} sources")
    with ThreadPoolExecutor(jobs) as pool:
        # the longest first, so that none of them is left alone at the end
        ordered = sorted(missing, key=lambda unit: -unit.source.stat().st_size)
        futures = {pool.submit(_compile, nvcc, unit, threads): unit for unit in ordered}
        try:
            for future in as_completed(futures):
                future.result()
                done += 1
                report(f"compiled {done} of {len(units)}: {futures[future].source.name}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _compile(nvcc: Nvcc, unit: _Unit, threads: int) -> None:
    with tempfile.TemporaryDirectory(dir=unit.object.parent) as folder:
        made = Path(folder) / unit.object.name
        command = [str(nvcc.path), *unit.command, f"--threads={threads}", "-o", str(made)]
        messages = _run(command, f"{unit.source.name} does not compile")
        if _content(unit.source) != unit.content:
            raise PluginLibraryError(
                f"{unit.source.name} or what it includes changed while it was compiled: build again"
            )
        text = made.with_suffix(".txt")
        text.write_text(messages)
        os.replace(text, unit.messages)
        os.replace(made, unit.object)


def _link(nvcc: Nvcc, headers: TensorRtHeaders | None, objects: Sequence[Path], output: Path) -> None:
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder) / output.name
        inputs = [str(path) for path in objects]
        if headers is not None:
            inputs.append(str(_make_stub(nvcc, headers, Path(folder))))
        linker = f"-Xlinker=--version-script={EXPORTS},-z,defs,--no-as-needed"
        command = [str(nvcc.path), "-shared", "-cudart=static", linker, *nvcc.library_flags(), "-o", str(made), *inputs]
        _run(command, f"{output.name} does not link")
        os.replace(made, output)


def _make_stub(nvcc: Nvcc, headers: TensorRtHeaders, folder: Path) -> Path:
    path = folder / "libnvinfer.so"
    soname = f"-Xlinker=-soname={path.name}.{headers.version[0]}"
    command = [str(nvcc.path), "-shared", "-cudart=none", "-Xcompiler=-fPIC", soname]
    _run([*command, "-o", str(path), str(STUB)], "the stand-in for libnvinfer does not link")
    return path


def _run(command: list[str], failure: str) -> str:
    log.debug("%s", " ".join(command))
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if result.returncode != 0:
        log.info("%s", result.stdout)
        first = _ERROR.search(result.stdout)
        reason = first[0].strip() if first else f"exit status {result.returncode}"
        raise PluginLibraryError(f"{failure}: {reason} (-v shows all that the compiler says)")
    return result.stdout.strip()


def _prune(objects: Path) -> None:
    """Leaves the newest objects of each source."""
    by_source: dict[str, list[tuple[float, Path]]] = {}
    for path in objects.glob("*.o"):
        by_source.setdefault(path.name.rpartition("-")[0], []).append((path.stat().st_mtime, path))
    for entries in by_source.values():
        for _, path in sorted(entries, reverse=True)[KEPT_OBJECTS:]:
            path.unlink(missing_ok=True)
            path.with_suffix(".txt").unlink(missing_ok=True)
