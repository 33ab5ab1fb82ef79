"""Records the sessions that tests/gpu/test_engines.py replays: lowers every export of a folder, and runs original and
lowered model on ONNX Runtime. Needs no GPU.

    python tests/gpu/prepare_engines.py EXPORTS -o build/engines [--only NAME ...]

Exports that cannot be lowered are listed with the reason in OUT/skipped.json. What is there already stays. All of it is
packed into OUT.tar.xz for another machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from engine_sessions import VARIANTS, Record, errors, pack, pages_needed, replay

from mla_trt.engines.engine_onnxruntime import OnnxRuntimeEngine, embedded_vocabulary
from mla_trt.errors import MlaTrtError
from mla_trt.float32 import has_half_types, to_float32
from mla_trt.loading import load_model
from mla_trt.lowering import LowerOptions, lower
from mla_trt.metadata import LoweredMetadata
from mla_trt.selection import top_k
from mla_trt.verification.cases import Case, Step, cases_for, script_for
from mla_trt.verification.original import OriginalModel
from mla_trt.verification.verify import LEAST_BOUND, LONGEST_SELECTION, _lowered_in_float32

LONG_PROMPTS = Case(
    "long prompts",
    (
        Step(new=(("a", 19), ("b", 11))),
        Step(new=(("b", 1), ("a", 1)), pad_tokens=1),
        Step(new=(("a", 10), ("b", 9)), pad_columns=1),
        Step(new=(("c", 20), ("b", 1), ("a", 1))),
        Step(new=(("c", 1), ("a", 1), ("b", 1))),
    ),
)
"""What verification lacks: steps with so many new tokens of a sequence that engines take them for prefill."""


def record(path: Path, seed: int) -> Record:
    """Lowers an export and records its sessions."""
    loaded = load_model(path)
    half = has_half_types(loaded.proto)
    lowered = lower(loaded.proto, LowerOptions(kv_format="f32", index_format="f32", page_size=4), loaded.base_dir)
    model = lowered.model
    metadata = LoweredMetadata.of(model)
    rope_dim = next((layer.get("qk_rope_head_dim") for layer in metadata.layers), None)
    fresh = load_model(path).proto
    export = OriginalModel(
        to_float32(fresh, loaded.base_dir) if half else fresh,
        lowered.interface,
        base_dir=loaded.base_dir,
        rope_dim=rope_dim,
    )
    selected = top_k(model)
    exceeded = selected if selected and selected <= LONGEST_SELECTION else None
    limits = export.find_limits(max(LEAST_BOUND, (exceeded or 0) + LEAST_BOUND // 2))
    vocabulary = embedded_vocabulary(model, metadata.token_input) or export.count_ids(limits)
    cases = cases_for(token_axes=metadata.token_axes, top_k=exceeded, limits=limits)
    if metadata.packed and not limits.made:
        cases.append(LONG_PROMPTS)
    scripts = [
        script_for(case, export, limits, vocabulary=vocabulary, seed=seed + index) for index, case in enumerate(cases)
    ]
    given = {}
    for name, variant in VARIANTS.items():
        if variant.like is not None or (variant.exports and not path.stem.startswith(variant.exports)):
            continue
        written = variant.model(model)
        if half:
            written = _lowered_in_float32(written, loaded.base_dir)
        engine = OnnxRuntimeEngine(written, pages=pages_needed(scripts, variant.page_size), base_dir=loaded.base_dir)
        given[name] = [replay(engine, written, script) for script in scripts]
    return Record(path.stem, model, half, scripts, given)


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", type=Path, help="folder of .onnx files")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names")
    options = parser.parse_args()
    skipped_file = options.output / "skipped.json"
    skipped = json.loads(skipped_file.read_text()) if skipped_file.exists() else {}
    options.output.mkdir(parents=True, exist_ok=True)
    for index, path in enumerate(sorted(options.exports.glob("*.onnx"))):
        if options.only and not any(part in path.name for part in options.only):
            continue
        folder = options.output / path.stem
        if (folder / "sessions.json").exists() or path.stem in skipped:
            continue
        start = time.monotonic()
        try:
            found = record(path, seed=10 * index)
        except MlaTrtError as error:
            skipped[path.stem] = str(error)
            skipped_file.write_text(json.dumps(skipped, indent=1))
            print(f"{path.stem}: skipped: {error}", flush=True)
            continue
        found.save(folder)
        worst = {
            name: max(
                (errors(script, rows).max(initial=0.0) for script, rows in zip(found.scripts, given, strict=True)),
                default=0,
            )
            for name, given in found.given.items()
        }
        shown = ", ".join(f"{name} {error:.2g}" for name, error in worst.items())
        print(f"{path.stem}: {time.monotonic() - start:.1f} s, {shown}", flush=True)
    print(f"packed: {pack(options.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
