"""`mla-trt bench layer`: one attention layer of DeepSeek-V3 as TensorRT engines, decoding one token for each sequence.

Four forms of the layer have the same weights and cached rows: lowered, with our plugins; as exported, with expanded keys
and values; absorbed by hand, with a cache from past to present as exporters write it, and with one that is read where it
lies. The last three have fixed sizes, which is the best that TensorRT can be given. Their steps run
as CUDA graphs, alternating in one process. Every result is checked against a float32 reference in the same run, ours against the
absorbed form's over all sequences too: a wrong engine has no figure. Cases with an indexer have DeepSeek-V3.2's layer beside: its
selection is compared with the reference's, and its output with what the selection gives.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper

from mla_trt.bench.ceilings import measure_copy
from mla_trt.bench.check import relative_error
from mla_trt.bench.layer_step import (
    ABSORBED,
    EXPORTED,
    GROWING,
    INDEX_CACHE,
    KV_CACHE,
    OURS,
    PAGE,
    SPARSE,
    LayerCase,
    LayerStep,
    query_terms_of,
    references,
    row_format_of,
    sparse_errors,
    weights_of,
)
from mla_trt.bench.options import choose_cases, command_line
from mla_trt.bench.timeline import Timeline, load_profiler, trace, write_timelines
from mla_trt.bench.timeline import markdown as timelines_markdown
from mla_trt.engines.profiles import TENSOR_LIMIT
from mla_trt.errors import MlaTrtError, UsageError
from mla_trt.formats import ROW_FORMATS
from mla_trt.models.attention_layer import (
    LayerDimensions,
    LayerWeights,
    absorbed_layer,
    exported_layer,
    random_weights,
    save_layer,
)
from mla_trt.ops.common import QUERY_TERMS
from mla_trt.signals import exit_status
from mla_trt.writing import check_writable, folder_written_whole, write_json

TOLERANCE = 3e-2
ONE_TERM_TOLERANCE = 6e-2  # docs/gpu-testing.md
ROUNDS = 15
SECONDS = 1.5  # of alternating rounds
ROUND_MILLISECONDS = 4.0  # of a form
MOST_LAUNCHES = 50
WRONG = 4  # exit status
CODES = ("fp8", "fp8_flat")
"""Row formats that query terms say something of."""
KV_CACHE_OUT = "kv_cache_out.0"
INDEX_CACHE_OUT = "indexer_cache_out.0"
SELECTION = "selection"
INDEX_HEADS = 64


CASES = {
    # At 4096 keys the export's expanded keys and values have 2^31 elements, one more than TensorRT takes.
    "b16-4k": LayerCase(16, 4088),
    "b128-4k": LayerCase(128, 4096),
    "b4-32k": LayerCase(4, 32768),
    "b1-32k": LayerCase(1, 32768),
    "b64-128k": LayerCase(64, 131072, sparse=True),
}


@dataclass(frozen=True)
class FormResult:
    """One form of the layer in one case.

    Attributes:
        case, batch, keys: the case.
        form: the form; ours has its row format behind it.
        error: relative (Frobenius) error of the checked sequences.
        us: median of a step.
        spread: (slowest - fastest) / median of the rounds.
        of_copy: the time that the least bytes take at the speed of a device copy, over the time taken.
        build_seconds: what its engine took to build.
        note: why there are no figures.
    """

    case: str
    batch: int
    keys: int
    form: str
    error: float | None = None
    us: float | None = None
    spread: float | None = None
    of_copy: float | None = None
    build_seconds: float | None = None
    note: str = ""


class Runnable(Protocol):
    """An engine with the tensors of a step; see `mla_trt.bench.step_engine.StepEngine`."""

    def run(self) -> None:
        """Runs the step."""

    def record(self) -> None:
        """Records it."""

    def time(self, launches: int) -> float:
        """us of a launch of the recording."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The value of a tensor."""
        ...

    def write(self, name: str, values: np.ndarray, start: int) -> None:
        """Replaces values of a tensor from an element on."""

    def close(self) -> None:
        """Gives the memory back."""


Build = Callable[[str, str, LayerStep], tuple[Runnable, float]]
"""Makes the engine of a form (its name, the case's name, the step); returns it with the seconds that its building took."""


def measure_case(
    name: str,
    step: LayerStep,
    forms: Sequence[str],
    build: Build,
    reference: Mapping[int, np.ndarray],
    copy: float,
    say: Callable[[str], None] = lambda _: None,
    sparse_error: Callable[[np.ndarray, np.ndarray], float] | None = None,
    look: Callable[[str, Runnable], None] = lambda form, engine: None,
) -> list[FormResult]:
    """Builds the forms of one case, checks them and measures them in turn.

    Args:
        name: of the case.
        step: its values.
        forms: which to measure; the absorbed one, where it is there, is what ours are compared with beside the reference.
        build: makes the engines.
        reference: expected outputs, [hidden], of some sequences.
        copy: bytes/s of a device copy.
        say: told what is done.
        sparse_error: of the output and the selection of the layer with an indexer.
        look: gets each form that has figures, recorded, when all have been measured.
    """
    results: dict[str, FormResult] = {}
    engines: dict[str, Runnable] = {}
    absorbed: np.ndarray | None = None
    with ExitStack() as stack:
        for form in forms:
            case = step.case
            result = FormResult(name, case.batch, case.keys, form)
            try:
                _check_size(form, step)
                say(f"{name}: {form}: build")
                engine, seconds = build(form, name, step)
                stack.callback(_close, engine)
                output = _first_output(engine, form, step)
                if form.startswith(SPARSE):
                    assert sparse_error is not None
                    error = sparse_error(output, engine.read(SELECTION))
                else:
                    error = max(relative_error(output[sequence], wanted) for sequence, wanted in reference.items())
                if form == ABSORBED and error <= TOLERANCE:
                    absorbed = output
                elif form.startswith(OURS) and not form.startswith(SPARSE) and absorbed is not None:
                    error = max(error, relative_error(output, absorbed))
                result = replace(result, error=error, build_seconds=seconds)
                say(f"{name}: {form}: built in {seconds:.1f} s, error {error:.1e}")
                allowed = ONE_TERM_TOLERANCE if query_terms_of(form) == 1 else TOLERANCE
                if error > allowed:
                    result = replace(result, note=f"wrong: error {error:.1e} > {allowed:.0e}")
                else:
                    engine.record()
                    engines[form] = engine
            except (MlaTrtError, RuntimeError, TypeError) as problem:
                result = replace(result, note=" ".join(str(problem).split())[:300])
                say(f"{name}: {form}: {result.note}")
            results[form] = result
        for form, times in _alternate(engines).items():
            us = median(times)
            results[form] = replace(
                results[form],
                us=us,
                spread=(max(times) - min(times)) / us,
                of_copy=1e6 * step.least_bytes(form) / copy / us,
            )
            say(f"{name}: {form}: {us:.0f} us")
        for form, engine in engines.items():
            look(form, engine)
    return list(results.values())


def _check_size(form: str, step: LayerStep) -> None:
    d, case = step.dimensions, step.case
    elements = case.batch * case.keys * (d.heads * (d.nope + d.value) if form == EXPORTED else d.rank + d.rope)
    if form.startswith(OURS):
        elements = step.pages * step.layout(row_format_of(form)).page_words
    if elements > TENSOR_LIMIT:
        raise UsageError(f"not run: a tensor of {elements} elements, and TensorRT takes {TENSOR_LIMIT}")


def _first_output(engine: Runnable, form: str, step: LayerStep) -> np.ndarray:
    """The outputs of all sequences, f32 [batch, hidden]."""
    engine.run()
    if form == ABSORBED:
        rows, width = engine.read("row"), step.dimensions.rank + step.dimensions.rope
        for sequence, row in enumerate(rows):
            engine.write("cache", row, (sequence * step.case.keys + step.case.keys - 1) * width)
        engine.run()
    return engine.read("attn_out").reshape(step.case.batch, -1).astype(np.float32)


def _close(engine: Runnable) -> None:
    # After an illegal access nothing can be freed; what was measured before is worth keeping.
    with suppress(MlaTrtError):
        engine.close()


def _alternate(engines: Mapping[str, Runnable]) -> dict[str, list[float]]:
    """us of each round of each form."""
    launches = {}
    for form, engine in engines.items():
        engine.time(2)
        launches[form] = max(1, min(MOST_LAUNCHES, math.ceil(1e3 * ROUND_MILLISECONDS / engine.time(1))))
    times: dict[str, list[float]] = {form: [] for form in engines}
    until = time.monotonic() + SECONDS
    for done in range(ROUNDS if engines else 0):
        if done >= 3 and time.monotonic() > until:
            break
        for form, engine in engines.items():
            times[form].append(engine.time(launches[form]))
    return times


class TensorRtForms:
    """Builds the engines of the forms in a folder.

    Args:
        folder: for weights, models and engines; about 2 GB.
        trt: the module `tensorrt`.
        stream: that engines run on.
        dimensions, weights: of the layer; the weights lie in the folder.
        optimization_level: TensorRT's.
        plugins: the plugin library; None: the one that is found.
    """

    def __init__(
        self,
        folder: Path,
        trt: Any,
        stream: Any,
        dimensions: LayerDimensions,
        weights: LayerWeights,
        *,
        optimization_level: int,
        plugins: Path | None,
    ) -> None:
        self._folder, self._trt, self._stream = folder, trt, stream
        self._dimensions, self._weights = dimensions, weights
        self._level, self._plugins = optimization_level, plugins
        self._cache = folder / "timing.cache"
        self.plugin_build = ""

    def build(self, form: str, name: str, step: LayerStep) -> tuple[Runnable, float]:
        """See `Build`."""
        from mla_trt.bench.step_engine import StepEngine, build_static

        plan = self._folder / "plan"
        started = time.monotonic()
        inputs: dict[str, np.ndarray]
        aliases: dict[str, str] = {}
        if form.startswith(OURS):
            row_format = row_format_of(form)
            dimensions = self._dimensions if form.startswith(SPARSE) else replace(self._dimensions, index_heads=0)
            self._build_ours(form, dimensions, step, plan)
            inputs = step.for_sparse(row_format) if form.startswith(SPARSE) else step.for_lowered(row_format)
            aliases = {KV_CACHE_OUT: KV_CACHE} | ({INDEX_CACHE_OUT: INDEX_CACHE} if form.startswith(SPARSE) else {})
        else:
            batch, keys = step.case.batch, step.case.keys
            dimensions = replace(self._dimensions, index_heads=0)
            if form == EXPORTED:
                model = exported_layer(dimensions, self._weights, batch=batch, new=1, past=keys - 1)
                inputs = step.for_exported()
            else:
                grows = form == GROWING
                model = absorbed_layer(dimensions, self._weights, batch=batch, total=keys, grows=grows)
                inputs = step.for_growing() if grows else step.for_absorbed()
            path = save_layer(model, self._folder / "peer.onnx")
            build_static(self._trt, path, plan, optimization_level=self._level, timing_cache=self._cache)
        seconds = time.monotonic() - started
        engine = StepEngine(self._trt, plan, inputs, aliases, self._stream)
        plan.unlink()
        return engine, seconds

    def _build_ours(self, form: str, dimensions: LayerDimensions, step: LayerStep, plan: Path) -> None:
        from mla_trt.engines.building import BuildOptions, build_file

        options = BuildOptions(
            max_batch=step.case.batch,
            max_tokens=step.case.batch,
            max_length=step.case.keys,
            pages=step.pages,
            query_terms=query_terms_of(form),
            weights=weights_of(form),
            optimization_level=self._level,
            timing_cache=self._cache,
            plugins=self._plugins,
        )
        lowered = lowered_layer(self._folder, row_format_of(form), dimensions, self._weights, weights_of(form))
        description, _ = build_file(lowered, plan, options)
        self.plugin_build = description.plugins


def lowered_layer(
    folder: Path, row_format: str, dimensions: LayerDimensions, weights: LayerWeights, kind: str = "keep"
) -> Path:
    """The layer as `mla-trt lower` writes it, in a folder that holds its weights; made when it is asked for first. With an indexer its
    selection is an output too. `kind`: the option `--weights`."""
    from mla_trt.lowering import LowerOptions
    from mla_trt.pipeline import lower_file

    output = folder / f"lowered-{'sparse-' if dimensions.index_heads else ''}{row_format}-{kind}"
    if not output.exists():
        export = save_layer(exported_layer(dimensions, weights), folder / "export.onnx")
        lower_file(export, output, LowerOptions(kv_format=row_format, page_size=PAGE, weights=kind), verify=False)
        if dimensions.index_heads:
            _show_selection(output / "model.onnx", dimensions.top_k)
    return output


def _show_selection(path: Path, top_k: int) -> None:
    model = onnx.load(path, load_external_data=False)
    (node,) = (node for node in model.graph.node if node.op_type == "MlaSparseAttention")
    place = list(node.output).index(next(name for name in node.output if name.endswith("indices")))
    node.output[place] = SELECTION
    tokens = next(value for value in model.graph.input if value.name == "hidden_states").type.tensor_type.shape.dim[1]
    model.graph.output.append(helper.make_tensor_value_info(SELECTION, TensorProto.INT32, [tokens.dim_param, top_k]))
    path.write_bytes(model.SerializeToString())


# what is written


@dataclass(frozen=True)
class Machine:
    """Where it was measured.

    Attributes:
        gpu: its name.
        copy: bytes/s of a device copy, read and written.
        tensorrt: version.
        command: that was given.
    """

    gpu: str
    copy: float
    tensorrt: str
    command: str


def markdown(machine: Machine, results: Sequence[FormResult]) -> str:
    """The results as a Markdown table under the command and a line about the machine."""
    formats = list(dict.fromkeys(result.form for result in results if result.form.startswith(OURS)))
    ours = {(result.case, result.form): result.us for result in results}
    headings = ("case", "keys", "form", "us", "spread", "of the copy speed", "error", "build s")
    ratios = [f"times as fast: {form}" for form in formats]
    lines = [
        f"    {machine.command}",
        "",
        f"{machine.gpu}, copy {machine.copy / 1e12:.2f} TB/s, TensorRT {machine.tensorrt}. One attention layer of DeepSeek-V3 (hidden 7168, "
        "128 heads, random weights, bf16), a step that decodes a token for each sequence, in a CUDA graph; medians of alternating rounds. "
        "Of the copy speed: the time that weights and cache rows take at it, over the time taken. With an indexer it is a layer of DeepSeek-V3.2 "
        "(64 index heads, 2048 keys selected), and its column says how many times as fast as the dense layer it is. "
        "`fp8:1` is `fp8` built with `--query-terms 1`; with `/fp8` behind it ours is lowered and built with `--weights fp8`, and the weights of all "
        "forms are such as e4m3 codes stand for.",
        "",
        f"| {' | '.join((*headings, *ratios))} |",
        "|---" * (len(headings) + len(ratios)) + "|",
    ]
    for result in results:
        cells = [result.case, str(result.keys), result.form]
        if result.us is None:
            cells += [result.note.replace("|", "\\|"), *[""] * (4 + len(ratios))]
        else:
            cells += [f"{result.us:.0f}", f"{result.spread or 0:.1%}", f"{result.of_copy or 0:.0%}"]
            cells += [f"{result.error:.1e}", f"{result.build_seconds:.1f}"]
            for form in formats:
                us = ours.get((result.case, form))
                other = not result.form.startswith(OURS) or (
                    form.startswith(SPARSE) and not result.form.startswith(SPARSE)
                )
                cells.append(f"{result.us / us:.2f}" if us and other else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_results(
    folder: Path, machine: Machine, plugins: str, results: Sequence[FormResult], timelines: Sequence[Timeline] = ()
) -> None:
    """`layer.md` and `layer.json`, and the timelines where there are any; all or none."""
    with folder_written_whole(folder) as draft:
        (draft / "layer.md").write_text(markdown(machine, results))
        content = {**asdict(machine), "plugins": plugins, "results": [asdict(result) for result in results]}
        write_json(content, draft / "layer.json")
        if timelines:
            write_timelines(draft, machine.command, timelines)


def run(options: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    names = choose_cases(options, CASES)
    if options.list:
        print("\n".join(names))
        return 0
    formats = [part for part in options.formats.split(",") if part]
    known = [*ROW_FORMATS, *(f"{of_codes}:{terms}" for of_codes in CODES for terms in QUERY_TERMS.choices)]
    if not formats or any(part.removesuffix("/fp8") not in known for part in formats):
        raise UsageError(
            f"--formats is '{options.formats}': give some of {', '.join(ROW_FORMATS)}, with commas between; "
            "fp8 and fp8_flat may have a number of query terms, as fp8:1, and each /fp8 behind it, for weights in e4m3"
        )
    if not 0 <= options.optimization_level <= 5:
        raise UsageError(f"--optimization-level is {options.optimization_level}: it must be 0 to 5")
    if options.output is not None:
        check_writable(options.output)
    return _measure(options, names, formats)


def _measure(options: argparse.Namespace, names: Sequence[str], formats: Sequence[str]) -> int:
    from mla_trt.cuda import CudaError, Stream, check_usable, synchronize
    from mla_trt.engines.tensorrt_api import load_tensorrt
    from mla_trt.plugins.library import find_library

    check_usable()
    trt = load_tensorrt()
    find_library(options.plugins)  # before the long work
    profiler = load_profiler() if options.timeline else None
    peers = [EXPORTED, GROWING, ABSORBED] if options.peers else []
    forms = [*peers, *(f"{OURS} {row_format}" for row_format in formats)]
    dimensions, dtype = LayerDimensions(index_heads=INDEX_HEADS), TensorProto.BFLOAT16
    results: list[FormResult] = []
    timelines: list[Timeline] = []
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="mla-trt-layer-") as place:
        machine = Machine(*measure_copy(), trt.__version__, command_line())
        say(f"{machine.gpu}, copy {machine.copy / 1e12:.2f} TB/s; weights")
        folder = Path(place)
        of_codes = any(weights_of(row_format) != "keep" for row_format in formats)
        weights = random_weights(dimensions, dtype, folder / "layer.data", of_codes=of_codes)
        exact = {name: array.astype(np.float32) for name, array in weights.arrays.items() if name != "kv_b_proj"}
        for row_format, kind in dict.fromkeys((row_format_of(part), weights_of(part)) for part in formats):
            lowered_layer(folder, row_format, replace(dimensions, index_heads=0), weights, kind)
        builder = TensorRtForms(
            folder,
            trt,
            Stream(),
            dimensions,
            weights,
            optimization_level=options.optimization_level,
            plugins=options.plugins,
        )
        status = 0
        for name in names:
            case, note = CASES[name], ""

            def look(form: str, engine: Runnable, name: str = name) -> None:
                if profiler is None:
                    return
                try:
                    timelines.append(Timeline(name, form, trace(profiler, engine.time)))
                except MlaTrtError as problem:
                    say(f"{name}: {form}: {problem}")

            try:
                step = LayerStep(dimensions, case, dtype, row_format_of(formats[0]))
                chosen, sparse_error = forms, None
                if case.sparse:
                    chosen = [*forms, *(f"{SPARSE} {row_format}" for row_format in formats)]
                    sparse_error = sparse_errors(step, exact)
                reference = references(step, exact)
                results += measure_case(
                    name, step, chosen, builder.build, reference, machine.copy, say, sparse_error, look
                )
                synchronize()
            except CudaError as error:
                note = f"{error}; the rest was not run"
            except KeyboardInterrupt as end:  # what was measured is written all the same
                note, status = "interrupted; the rest was not run", exit_status(end)
            if note:
                results.append(FormResult(name, case.batch, case.keys, "all", note=note))
            if options.output is not None:
                write_results(options.output, machine, builder.plugin_build, results, timelines)
            if note:
                break
        print(markdown(machine, results), end="")
        if timelines:
            print(f"\n{timelines_markdown(timelines)}", end="")
    if status:
        return status
    return WRONG if any(result.note and not result.note.startswith("not run") for result in results) else 0
