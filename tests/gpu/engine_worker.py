"""Builds engines and replays recorded sessions on them: one case for each line of stdin, one JSON result for each on
stdout. A process of its own, so that a crash costs one case.

    python tests/gpu/engine_worker.py SCRATCH        a line: {"folder": "build/engines/NAME", "variant": "f32", "level": 0}
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from engine_sessions import VARIANTS, Record, errors, pages_needed, replay
from engine_weights import coded_ops, other_weights, refit

from mla_trt.engines import input_projections, output_projections
from mla_trt.engines.building import BuildOptions, build_file
from mla_trt.engines.engine_file import RESIDENT
from mla_trt.engines.engine_tensorrt import TensorRtEngine
from mla_trt.metadata import LoweredMetadata
from mla_trt.selection import top_k

input_projections.LEAST_BYTES = output_projections.LEAST_BYTES = 0  # the exports' weights are small

RESULT = "RESULT "
LONGEST = 256


def run_case(folder: Path, variant_name: str, level: int, scratch: Path) -> dict[str, Any]:
    """Builds and replays one case; the result says how far it came."""
    record = Record.load(folder)
    variant = VARIANTS[variant_name]
    result: dict[str, Any] = {"export": record.name, "variant": variant_name, "stage": "lower", "half": record.half}
    result["sparse"] = top_k(record.model) is not None
    start = time.monotonic()
    engine: TensorRtEngine | None = None
    beside: TensorRtEngine | None = None
    try:
        model = variant.model(record.model)
        source = scratch / f"{record.name}.{variant_name}"
        source.mkdir(exist_ok=True)
        onnx.save(other_weights(model) if variant.refitted else model, source / "model.onnx")
        pages = pages_needed(record.scripts, variant.page_size)
        on_cpu = record.given[variant.like or variant_name]
        longest = LoweredMetadata.of(model).max_position or LONGEST
        options = BuildOptions(
            dtype=variant.dtype,
            weights=variant.weights,
            cache=variant.cache,
            pages=pages if variant.cache == RESIDENT else None,
            max_batch=8,
            max_tokens=64,
            max_length=min(longest, LONGEST),
            optimization_level=level,
            timing_cache=scratch / "timing.cache",
            workspace=1 << 30,
            weight_streaming=variant.streamed,
            refit=variant.refitted,
        )
        result["stage"] = "build"
        path = scratch / f"{record.name}.{variant_name}.engine"
        _, result["build_seconds"] = build_file(source, path, options)
        result["stage"] = "load"
        engine = TensorRtEngine.open(path, pages=pages)
        if variant.cache == RESIDENT:
            beside = TensorRtEngine.open(path)
        if variant.streamed and engine._runner._engine.streamable_weights_size == 0:
            raise ValueError("no weight of the engine can be streamed")
        if variant.weights == "fp8":
            parsed = scratch / f"{record.name}.{variant_name}.parsed"
            result["coded"] = coded_ops(record.name, source / "model.onnx", parsed, options)
        if variant.refitted:
            result["refitted"] = refit(engine, model, scratch / f"{record.name}.{variant_name}.weights", options)
        result["stage"] = "run"
        given = []
        for script in record.scripts:
            result["session"] = script.case.name
            given.append(replay(engine, model, script, beside=beside))
        result["graphs"] = engine.recordings
        result["stage"] = "compare"
        pairs = list(zip(record.scripts, given, strict=True))
        found = np.concatenate([errors(script, rows) for script, rows in pairs])
        formats = np.concatenate([errors(script, rows) for script, rows in zip(record.scripts, on_cpu, strict=True)])
        triples = zip(record.scripts, given, on_cpu, strict=True)
        between = np.concatenate([errors(script, rows, reference) for script, rows, reference in triples])
        result |= {
            "tokens": len(found),
            "max_error": float(found.max(initial=0.0)),
            "format_error": float(formats.max(initial=0.0)),
            "between_median": float(np.median(between)) if len(between) else math.nan,
            "between_max": float(between.max(initial=0.0)),
            "between": [float(f"{value:.3g}") for value in between],
            "worst_session": record.scripts[
                int(np.argmax([errors(script, rows).max(initial=0.0) for script, rows in pairs]))
            ].case.name,
            "stage": "done",
        }
        path.unlink()
    except Exception as error:  # whatever it is, the table says so
        result["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:800]
    finally:
        for opened in (engine, beside):
            if opened is not None:
                opened.close()
    result["seconds"] = time.monotonic() - start
    return result


def main() -> None:
    """Serves until stdin ends."""
    scratch = Path(sys.argv[1])
    for line in sys.stdin:
        case = json.loads(line)
        print(RESULT + json.dumps(run_case(Path(case["folder"]), case["variant"], case["level"], scratch)), flush=True)


if __name__ == "__main__":
    main()
