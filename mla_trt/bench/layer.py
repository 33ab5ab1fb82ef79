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
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from onnx import TensorProto

from mla_trt.bench.ceilings import measure_copy
from mla_trt.bench.check import relative_error
from mla_trt.bench.layer_forms import SELECTION, Build, Runnable, TensorRtForms, lowered_layer
from mla_trt.bench.layer_report import FormResult, Machine, markdown, write_results
from mla_trt.bench.layer_step import (
    ABSORBED,
    EXPORTED,
    GROWING,
    OURS,
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
from mla_trt.bench.timeline import Timeline, end_process, load_profiler, trace
from mla_trt.bench.timeline import markdown as timelines_markdown
from mla_trt.engines.profiles import TENSOR_LIMIT
from mla_trt.errors import MlaTrtError, UsageError
from mla_trt.formats import ROW_FORMATS
from mla_trt.models.attention_layer import LayerDimensions, random_weights
from mla_trt.ops.common import QUERY_TERMS
from mla_trt.signals import exit_status
from mla_trt.writing import check_writable

TOLERANCE = 3e-2
ONE_TERM_TOLERANCE = 6e-2  # docs/gpu-testing.md
ROUNDS = 15
SECONDS = 1.5  # of alternating rounds
ROUND_MILLISECONDS = 4.0  # of a form
MOST_LAUNCHES = 50
WRONG = 4  # exit status
CODES = ("fp8", "fp8_flat")
"""Row formats that query terms say something of."""
INDEX_HEADS = 64

CASES = {
    # At 4096 keys the export's expanded keys and values have 2^31 elements, one more than TensorRT takes.
    "b16-4k": LayerCase(16, 4088),
    "b128-4k": LayerCase(128, 4096),
    "b4-32k": LayerCase(4, 32768),
    "b1-32k": LayerCase(1, 32768),
    "b64-128k": LayerCase(64, 131072, sparse=True),
}


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
    if not status and any(result.note and not result.note.startswith("not run") for result in results):
        status = WRONG
    if profiler is not None:
        end_process(status)
    return status
