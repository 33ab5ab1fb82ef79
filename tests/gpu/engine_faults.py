"""Bad input for an engine: what each does, as a line of JSON on stdout. A process of its own, since the claim is that
none of it ends the process.

    python tests/gpu/engine_faults.py RECORD SCRATCH

RECORD is a record of an export that takes embeddings, so that NaN can be put in.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from engine_sessions import VARIANTS, Record

from mla_trt.engines.building import BuildOptions, build_file
from mla_trt.engines.engine_file import description_path, plan_digest
from mla_trt.engines.engine_tensorrt import TensorRtEngine
from mla_trt.errors import MlaTrtError

PAGES = 24
LENGTH = 16
TOLERANCE = 1e-5


def main() -> None:
    """Builds one engine and tries everything on it."""
    folder, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    model = VARIANTS["f32"].model(Record.load(folder).model)
    source = scratch / "faults"
    source.mkdir()
    onnx.save(model, source / "model.onnx")
    path = scratch / "faults.engine"
    build_file(source, path, BuildOptions(max_batch=4, max_tokens=32, max_length=LENGTH, optimization_level=1))
    found = {
        "another TensorRT": _refusal(_with(path, scratch, tensorrt="9.9.9")),
        "another GPU": _refusal(_with(path, scratch, compute_capability="1.0")),
        "another plugin library": _refusal(_with(path, scratch, plugins="0.0.0 sm_90a")),
        "damaged plan": _refusal(_damaged(path, scratch, lambda plan: b"\0" * 64 + plan[64:])),
        "shortened plan": _refusal(_damaged(path, scratch, lambda plan: plan[: len(plan) // 2])),
        "other files": _refusal(_swapped(path, scratch)),
    }
    engine = TensorRtEngine.open(path, pages=PAGES)
    steps = _Steps(engine)
    found["beyond the profile"] = _message(lambda: steps.run(tokens=33))
    found["too many sequences"] = _message(lambda: steps.run(sequences=5))
    plain = steps.run()
    found["pages out of range"] = steps.neighbour(plain, block_table=lambda table: np.full_like(table, 10**6))
    found["negative pages"] = steps.neighbour(plain, block_table=lambda table: np.full_like(table, -(2**31)))
    found["longer than its pages"] = steps.neighbour(plain, cache_lengths=lambda lengths: lengths + 6)
    found["a length beyond everything"] = steps.neighbour(plain, cache_lengths=lambda lengths: lengths + 2**30)
    found["a negative length"] = steps.neighbour(plain, cache_lengths=lambda lengths: lengths - 7)
    found["NaN in the input"] = steps.neighbour(plain, values=lambda values: values * np.nan)
    found["afterwards"] = steps.neighbour(plain)
    engine.close()
    print(json.dumps(found))


class _Steps:
    """One step of two sequences, of which only the first is given nonsense."""

    def __init__(self, engine: TensorRtEngine) -> None:
        self._engine = engine
        self._random = np.random.default_rng(0)
        self._tokens = self._random.standard_normal((6, *engine.token_features)).astype(engine.token_dtype)

    def run(self, *, tokens: int = 6, sequences: int = 2, **changes: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The main result of each token. Pools are zero before."""
        engine = self._engine
        for cache in engine.metadata.caches:
            engine.write_pages(cache.name, np.zeros((PAGES, cache.page_words), np.int32))
        values = np.resize(self._tokens, (tokens, *engine.token_features))
        lengths = np.zeros(sequences, np.int32)
        table = np.arange(2 * sequences, dtype=np.int32).reshape(sequences, 2)
        half = tokens // 2
        if "values" in changes:
            values[:half] = changes["values"](values[:half])
        if "cache_lengths" in changes:
            lengths[:1] = changes["cache_lengths"](lengths[:1])
        if "block_table" in changes:
            table[:1] = changes["block_table"](table[:1])
        offsets = np.array([0, half, *([tokens] * (sequences - 1))], np.int32)
        shape = [{"T": tokens}.get(axis, 1) for axis in engine.metadata.token_axes]
        inputs = {
            engine.metadata.token_input: values.reshape(*shape, *engine.token_features),
            "query_offsets": offsets,
            "cache_lengths": lengths,
            "block_table": table,
        }
        result = engine.run(inputs, np.zeros((0, 2), np.int32))[engine.results[0]]
        return result.reshape(tokens, -1)

    def neighbour(self, plain: np.ndarray, **changes: Any) -> str:
        """Whether the second sequence has the results that it had without nonsense in the first."""
        try:
            found = self.run(**changes)
        except MlaTrtError as error:
            return f"error: {error}"
        difference = float(np.abs(found[3:] - plain[3:]).max()) / float(np.abs(plain).max())
        return "unharmed" if difference <= TOLERANCE else f"differs by {difference:.2g}"


def _message(action: Callable[[], Any]) -> str:
    try:
        action()
    except MlaTrtError as error:
        return f"error: {error}"
    return "no error"


def _refusal(path: Path) -> str:
    return _message(lambda: TensorRtEngine.open(path, pages=PAGES).close())


def _with(path: Path, scratch: Path, **facts: str) -> Path:
    copy = scratch / "changed.engine"
    copy.write_bytes(path.read_bytes())
    description = json.loads(description_path(path).read_text())
    description_path(copy).write_text(json.dumps(description | facts))
    return copy


def _damaged(path: Path, scratch: Path, change: Callable[[bytes], bytes]) -> Path:
    copy = scratch / "damaged.engine"
    copy.write_bytes(change(path.read_bytes()))
    description = json.loads(description_path(path).read_text())
    facts = {"plan_bytes": copy.stat().st_size, "plan_digest": plan_digest(copy)}
    description_path(copy).write_text(json.dumps(description | facts))
    return copy


def _swapped(path: Path, scratch: Path) -> Path:
    copy = scratch / "swapped.engine"
    copy.write_bytes(path.read_bytes()[:-1])
    description_path(copy).write_text(description_path(path).read_text())
    return copy


if __name__ == "__main__":
    main()
