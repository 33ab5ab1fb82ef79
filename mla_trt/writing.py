"""Writes results whole or not at all."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from mla_trt.errors import UsageError
from mla_trt.weight_file import WeightFile

log = logging.getLogger(__name__)

# A protobuf message ends at 2 GiB; models above this size keep their weights beside them.
INLINE_LIMIT = 1 << 30
LARGE_TENSOR = 1 << 10
COPY_CHUNK = 1 << 30
DRAFT = f".mla-trt-{re.sub('[^A-Za-z0-9]+', '', platform.node())}-"
"""How the names of this machine's drafts begin: on some shared file systems one machine does not see another one's locks."""
YOUNG_SECONDS = 60
"""A draft that is younger may be one whose maker has not locked it yet."""


@contextmanager
def draft_in(folder: Path) -> Iterator[Path]:
    """Gives a fresh folder inside `folder`, which goes when it is left. What earlier runs on this machine left in `folder` that were killed goes
    first: such a draft may be as large as a model. A run locks its draft; where locks do not work, nothing is taken for abandoned.

    Raises:
        OSError: the folder cannot be written.
    """
    _remove_abandoned(folder)
    draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=folder))
    lock = os.open(draft, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    name = re.compile(re.escape(DRAFT) + "[a-z0-9_]{8}")  # as tempfile makes them
    for place in folder.iterdir():
        if not name.fullmatch(place.name) or place.is_symlink() or not place.is_dir():
            continue
        with suppress(OSError):
            lock = os.open(place, os.O_RDONLY)
            try:
                if time.time() - os.fstat(lock).st_mtime < YOUNG_SECONDS:
                    continue
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                log.warning("'%s' was left by a run that was killed: it is removed", place)
                shutil.rmtree(place)
            finally:
                os.close(lock)


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Gives a fresh folder inside `folder`; on success its files replace those of the same names in `folder`, on failure all is as it was.

    The draft is inside because a folder may be a mount, and files are moved within one file system only.

    Raises:
        UsageError: the folder cannot be written, or the disk is full.
    """
    made: list[Path] = []
    try:
        for place in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
            place.mkdir()
            made.append(place)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        _remove_folders(made)
        raise UsageError(f"'{folder}' cannot be written: {error.strerror or error}") from None
    try:
        with draft_in(folder) as draft:
            yield draft
            _move_files(draft, folder)
        made.clear()
    except OSError as error:
        place = Path(error.filename) if isinstance(error.filename, str) else folder
        what = f"'{folder}' cannot be written" if place.is_relative_to(folder) else f"'{place}' cannot be used"
        raise UsageError(f"{what}: {error.strerror or error}; nothing was written") from None
    finally:
        _remove_folders(made)


def _remove_folders(made: list[Path]) -> None:
    for place in reversed(made):
        with suppress(OSError):
            place.rmdir()


def _move_files(draft: Path, folder: Path) -> None:
    """Moves all files of a draft to the same places in a folder; if one cannot be moved, those that were there come back."""
    files = sorted(path for path in draft.rglob("*") if path.is_file())
    replaced = Path(tempfile.mkdtemp(dir=draft))
    with ExitStack() as undo:
        for number, file in enumerate(files):
            target = folder / file.relative_to(draft)
            if target.is_dir():
                raise UsageError(f"'{target}' is a folder, where a file must be written: choose another folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            old = replaced / str(number)
            undo.callback(_put_back, old if target.exists() else None, target)
            if target.exists():
                os.replace(target, old)
            os.replace(file, target)
        undo.pop_all()


def _put_back(old: Path | None, target: Path) -> None:
    if old is None:
        target.unlink(missing_ok=True)
    elif old.exists():
        os.replace(old, target)


def check_writable(folder: Path) -> None:
    """Finds out before long work that a folder cannot be written.

    Raises:
        UsageError: it cannot.
    """
    place = folder
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"'{folder}' is a file: give a folder to write to")
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UsageError(f"'{folder}' cannot be written: {error.strerror or error}") from None


def write_model(model: onnx.ModelProto, draft: Path, folder: Path, base_dir: Path, weight_file: WeightFile) -> None:
    """Writes `model.onnx` into a draft of `folder`; weights that would make it large go into `weight_file`, which is in the draft.

    Weights that the export keeps in external files are copied file by file, not read: they can be larger than memory. Where `folder` is the
    export's own, they are shared instead. (Links will not do: readers of ONNX refuse external data with more than one name.)
    """
    if folder.resolve() != base_dir.resolve():
        for location in sorted(external_locations(model) - {weight_file.path.name}):
            copy_sparse(base_dir / location, draft / location)
    if model.ByteSize() > INLINE_LIMIT:
        for tensor in model.graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL and len(tensor.raw_data) >= LARGE_TENSOR:
                weight_file.move_out(tensor)
    (draft / "model.onnx").write_bytes(model.SerializeToString())


def weight_file_in(draft: Path, model: onnx.ModelProto) -> WeightFile:
    """A file for new weights, of a name that none of the export's files has."""
    taken = external_locations(model)
    name = next(name for count in itertools.count() if (name := f"model{count or ''}.data") not in taken)
    return WeightFile(draft / name)


def external_locations(model: onnx.ModelProto) -> set[str]:
    """Files, relative to the model, that hold weights."""
    return {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }


def copy_sparse(source: Path, target: Path) -> None:
    """Copies a file; holes stay holes, and file systems that can share blocks do."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("wb") as writer:
        size = os.fstat(reader.fileno()).st_size
        writer.truncate(size)
        end = 0
        while end < size:
            try:
                start = os.lseek(reader.fileno(), end, os.SEEK_DATA)
            except OSError:
                return  # only a hole is left
            end = os.lseek(reader.fileno(), start, os.SEEK_HOLE)
            while start < end:
                copied = os.copy_file_range(
                    reader.fileno(), writer.fileno(), min(end - start, COPY_CHUNK), start, start
                )
                if not copied:
                    raise OSError(f"'{source}' became shorter while it was copied")
                start += copied


def write_json(value: Any, path: Path) -> None:
    """Writes a JSON file that people can read."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
