"""Sessions recorded from an export, and their replay on an engine.

A record is a folder: `model.onnx` (lowered, f32 rows), `sessions.json` (the steps) and `sessions.npz` (tokens, what the
original gives, and what the lowered model gives on ONNX Runtime in each format). It needs neither the export nor the
passes to be replayed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("mla_trt") is None:
    sys.path.insert(0, str(ROOT))
import mla_trt  # noqa: E402

if importlib.util.find_spec("mla_trt.plugins") is None:
    mla_trt.__path__.append(str(ROOT))  # a bare source tree: parts of the package lie beside it

from mla_trt.engines.engine import Engine  # noqa: E402
from mla_trt.engines.engine_file import IO, RESIDENT  # noqa: E402
from mla_trt.engines.engine_recorder import RecordingEngine  # noqa: E402
from mla_trt.ops import retarget, strip_functions  # noqa: E402
from mla_trt.passes.quantize import quantize_blocks  # noqa: E402
from mla_trt.session import Session  # noqa: E402
from mla_trt.verification.cases import Case, Script, Step, run_step  # noqa: E402

LEAST_VALUES = 1024
"""Of a matrix that is a weight, and not a table or a constant of the graph."""
SPARE_PAGES = 6
MOST_FILLED = 32

Rows = dict[str, dict[str, np.ndarray]]
"""Results of each sequence by name, [n, ...]; NaN where there is none."""


def rounded_to_codes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with matrices whose values e4m3 codes with a scale for each block of 128 x 128 stand for."""
    rounded = onnx.ModelProto()
    rounded.CopyFrom(model)
    for weight in rounded.graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or len(weight.dims) != 2 or math.prod(weight.dims) < LEAST_VALUES:
            continue
        values = numpy_helper.to_array(weight)
        rows, columns = values.shape
        codes, scales = quantize_blocks(values, 128)
        factors = np.repeat(np.repeat(scales, 128, 0), 128, 1)[:rows, :columns]
        weight.CopyFrom(numpy_helper.from_array(codes.astype(np.float32) * factors, weight.name))
    return rounded


@dataclass(frozen=True)
class Variant:
    """One way to build a lowered model.

    Attributes:
        name: names it in files and tables.
        row_format, index_format: of its caches.
        page_size: tokens in a page; small ones meet more borders.
        dtype: of `mla-trt build`.
        tolerance: what the engine's results may differ by from those on ONNX Runtime in the same format, relative to the
            largest result.
        outliers: share of the tokens that may differ by more, because rounding makes a router choose otherwise.
        sparse_outliers: the same where there are indexers too, whose choices reach later tokens through the cache.
        cache: of `mla-trt build`.
        like: the variant whose results on ONNX Runtime are this one's too, where it is another.
        streamed: built so that weights can stay in host memory; TensorRT decides how much of them does.
        refitted: the engine is built with other weights, and gets those of the model afterwards.
        weights: of `mla-trt build`; with "fp8" the model's matrices are what e4m3 codes stand for, but where it has columns of one apart.
        exports: the first export whose name begins with each of these; none: all exports.
    """

    name: str
    row_format: str
    index_format: str
    page_size: int
    dtype: str
    tolerance: float
    outliers: float
    sparse_outliers: float
    cache: str = IO
    like: str | None = None
    streamed: bool = False
    refitted: bool = False
    weights: str = "keep"
    exports: tuple[str, ...] = ()

    def model(self, lowered: onnx.ModelProto) -> onnx.ModelProto:
        """The lowered model over this variant's pages."""
        model = retarget(lowered, row_format=self.row_format, index_format=self.index_format, page_size=self.page_size)
        return rounded_to_codes(model) if self.weights == "fp8" else model


_F32 = Variant("f32", "f32", "f32", 4, "keep", 2e-4, 0.0, 0.0)
_BF16 = Variant("bf16", "bf16", "fp8", 32, "bf16", 5e-2, 0.1, 0.45)
_DEEPSEEK = ("deepseek_v3__", "deepseek_v32__")
_SEVERAL_CACHES = (*_DEEPSEEK, "kimi_linear__", "packed2d_absorb_cat__")
_FAMILIES = (
    *(*_SEVERAL_CACHES, "axk2__", "deepseek_v2__", "dsref_v32_ref__", "dsref_v3_absorb__", "dsref_v3_naive__"),
    *("glm_moe_dsa__", "hub_deepseek_v2_orig__", "minicpm3__", "packed2d_gemm_mm__"),
)
VARIANTS = {
    variant.name: variant
    for variant in (
        _F32,
        Variant("fp8", "fp8", "fp8", 16, "keep", 3e-2, 0.1, 0.4),
        _BF16,
        replace(_F32, name="resident", like="f32", cache=RESIDENT, exports=_SEVERAL_CACHES),
        replace(_BF16, name="streamed", like="bf16", streamed=True, exports=_DEEPSEEK),
        replace(_BF16, name="refitted", like="bf16", refitted=True, exports=_DEEPSEEK),
        replace(_BF16, name="fp8weights", weights="fp8", exports=_FAMILIES),
    )
}
HALF_TOLERANCE, HALF_OUTLIERS = 1e-2, 0.1
"""What replaces smaller ones where the export is half precision, which ONNX Runtime ran in float32."""


@dataclass
class Record:
    """What a folder holds.

    Attributes:
        name: of the export.
        model: the lowered model over f32 rows.
        half: whether the export is half precision.
        scripts: the sessions, with what the original gives.
        given: by variant, what the lowered model gives on ONNX Runtime in each session.
    """

    name: str
    model: onnx.ModelProto
    half: bool
    scripts: list[Script]
    given: dict[str, list[Rows]]

    def save(self, folder: Path) -> None:
        """Writes the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        bare = onnx.ModelProto()
        bare.CopyFrom(self.model)
        strip_functions(bare)  # most of a small model; whoever moves it to a variant's pages attaches them again
        onnx.save(bare, folder / "model.onnx")
        arrays: dict[str, np.ndarray] = {}
        for index, script in enumerate(self.scripts):
            for sequence, tokens in script.tokens.items():
                arrays[f"{index}/tokens/{sequence}"] = tokens
            _put(arrays, f"{index}/expected", script.expected)
            for variant, rows in self.given.items():
                _put(arrays, f"{index}/{variant}", rows[index])
        np.savez_compressed(folder / "sessions.npz", **arrays)
        cases = [asdict(script.case) for script in self.scripts]
        data = {"name": self.name, "half": self.half, "variants": list(self.given), "cases": cases}
        (folder / "sessions.json").write_text(json.dumps(data))

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Reads the folder."""
        data = json.loads((folder / "sessions.json").read_text())
        with np.load(folder / "sessions.npz") as file:
            arrays = dict(file)
        scripts, given = [], {variant: [] for variant in data["variants"]}
        for index, case in enumerate(data["cases"]):
            steps = tuple(
                Step(**{key: _tuples(value) if isinstance(value, list) else value for key, value in step.items()})
                for step in case["steps"]
            )
            tokens = {key.split("/")[2]: value for key, value in arrays.items() if key.startswith(f"{index}/tokens/")}
            scripts.append(Script(Case(case["name"], steps), tokens, _get(arrays, f"{index}/expected")))
            for variant in given:
                given[variant].append(_get(arrays, f"{index}/{variant}"))
        return cls(data["name"], onnx.load(folder / "model.onnx"), data["half"], scripts, given)


def records_folder() -> Path:
    """The folder of the records, $MLA_TRT_ENGINES or build/engines, unpacked from the archive beside it if need be."""
    folder = Path(os.environ.get("MLA_TRT_ENGINES", ROOT / "build" / "engines"))
    archive = packed(folder)
    if not folder.is_dir() and archive.is_file():
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    return folder


def pack(folder: Path) -> Path:
    """Packs a folder of records; exports share many weights, so the archive is about half as large."""
    archive = packed(folder)
    with tarfile.open(archive, "w:xz", preset=7) as file:
        file.add(folder, ".")
    return archive


def packed(folder: Path) -> Path:
    """The archive of a folder of records."""
    return folder.with_name(folder.name + ".tar.xz")


def _put(arrays: dict[str, np.ndarray], prefix: str, rows: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    for sequence, results in rows.items():
        for name, values in results.items():
            arrays[f"{prefix}/{sequence}/{name}"] = np.asarray(values, np.float32)


def _get(arrays: Mapping[str, np.ndarray], prefix: str) -> Rows:
    found: Rows = {}
    for key, values in arrays.items():
        if key.startswith(f"{prefix}/"):
            sequence, name = key.removeprefix(f"{prefix}/").split("/", 1)
            found.setdefault(sequence, {})[name] = values
    return found


def _tuples(value: list) -> tuple:
    return tuple(_tuples(entry) if isinstance(entry, list) else entry for entry in value)


def pages_needed(scripts: Sequence[Script], page_size: int) -> int:
    """Pages of a pool that holds any one of the sessions, with some to spare."""
    needed = [sum(-(-len(tokens) // page_size) for tokens in script.tokens.values()) for script in scripts]
    return max(needed, default=0) + SPARE_PAGES


def replay(engine: Engine, model: onnx.ModelProto, script: Script, *, beside: Engine | None = None) -> Rows:
    """Runs a session on an engine, with NaN in every page that no sequence holds.

    Args:
        engine: the engine.
        model: the lowered model that it runs.
        script: the session.
        beside: where pages cannot be written, the same plan loaded once more: between the steps it fills its own with
            other tokens, which must not show.

    Returns:
        the results.
    """
    recorder = RecordingEngine(engine)
    session = Session(recorder)
    numbers: dict[str, int] = {}
    rows: Rows = {
        sequence: {name: np.full(values.shape, np.nan) for name, values in results.items()}
        for sequence, results in script.expected.items()
    }
    if beside is None:
        recorder.poison(tuple(range(engine.pages)))
    for step, spans in script.case.spans():
        for child, parent in step.forked:
            numbers[child] = session.fork(numbers[parent])
        for sequence in step.freed:
            session.free(numbers.pop(sequence))
        for sequence in spans:
            if sequence not in numbers:
                numbers[sequence] = session.create()
        if beside is None:
            recorder.poison(session.free_pages)
        else:
            _fill(beside, model, script)
        batch = {numbers[name]: script.tokens[name][start:end] for name, (start, end) in spans.items()}
        found = run_step(session, model, step, batch, spans)
        for sequence, (start, end) in spans.items():
            for name, values in found[numbers[sequence]].items():
                if name in rows[sequence] and end > start:
                    # NaN stands for tokens that a sequence did not get itself, as those of its parent.
                    rows[sequence][name][end - len(values) : end] = np.where(np.isfinite(values), values, np.inf)
    return rows


def _fill(engine: Engine, model: onnx.ModelProto, script: Script) -> None:
    tokens = next(iter(script.tokens.values()))[:MOST_FILLED][::-1]
    session = Session(engine)
    run_step(session, model, Step(new=(("x", len(tokens)),)), {session.create(): tokens}, {"x": (0, len(tokens))})


def errors(script: Script, rows: Rows, reference: Rows | None = None) -> np.ndarray:
    """The error of each token of a session, relative to the largest value that the original gives; infinite where a
    result is not finite. Tokens of which one of the two has nothing are left out.

    Args:
        script: the session.
        rows: results.
        reference: what they are compared with; None: with the original's.
    """
    scales = script.scales()
    found = []
    for sequence, results in (script.expected if reference is None else reference).items():
        for name, expected in results.items():
            axes = tuple(range(1, expected.ndim))
            given = np.asarray(rows[sequence][name], np.float64)
            known = np.isfinite(expected).all(axis=axes) & ~np.isnan(given).any(axis=axes)
            difference = np.abs(given[known] - expected[known]).max(axis=axes, initial=0.0) / max(scales[name], 1e-30)
            found.append(np.where(np.isfinite(difference), difference, np.inf))
    return np.concatenate(found) if found else np.zeros(0)
