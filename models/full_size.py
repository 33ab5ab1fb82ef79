"""Full-size DeepSeek graphs without PyTorch and without their weights: what lowering meets at its largest.

The weights are sparse files, so that a model of 1.3 TB takes a few hundred megabytes of disk:

    python -m mla_trt.models.full_size deepseek-v3.2 -o MODEL.onnx --layers 4
    python -m mla_trt.models.full_size deepseek-v3 -o MODEL.onnx --layers 1 --random
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from mla_trt.errors import MlaTrtError, UsageError
from mla_trt.models.configs import Size, get_config
from mla_trt.models.decoder import DecoderSettings, Routing, build_decoder
from mla_trt.models.weights import RandomWeights, SparseWeights

KINDS = ("deepseek-v3", "deepseek-v3.2", "kimi-k2")
DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class FullSizeModel:
    """What was written.

    Attributes:
        path: the ONNX file.
        nodes: number of nodes.
        weight_bytes: size of the weights; in sparse files they take no space.
        weight_files: the sparse files; none when the weights are in the model.
    """

    path: Path
    nodes: int
    weight_bytes: int
    weight_files: tuple[Path, ...]


def write_full_size(
    kind: str,
    output: str | Path,
    *,
    layers: int | None = None,
    experts: int | None = None,
    dtype: str = "bfloat16",
    size: Size = "full",
    routing: Routing = "gather",
    seed: int = 0,
    random: bool = False,
) -> FullSizeModel:
    """Writes one decoder step with latent caches.

    Args:
        kind: one of `KINDS`.
        output: the `.onnx` file.
        layers: number of layers; None for all.
        experts: number of routed experts in a layer; None for all.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`.
        size: `"full"` with weights in sparse files, which are zeros but for norms; `"small"` with random ones in the model, to be run.
        routing: how experts get their tokens, `"gather"` or `"mask"`.
        seed: of a small model's random weights.
        random: random weights in the files of a full-size model too, which then take their space.

    Raises:
        UsageError: the arguments do not go together.
    """
    if kind not in KINDS:
        raise UsageError(f"no full-size graph of {kind!r}: choose one of {', '.join(KINDS)}")
    if dtype not in DTYPES:
        raise UsageError(f"no graphs of type {dtype!r}: choose one of {', '.join(DTYPES)}")
    fields = _fields(kind, size, layers, experts)
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = DecoderSettings(fields, routing, DTYPES[dtype])
    if size == "small":
        model = build_decoder(settings, RandomWeights(seed))
        onnx.save(model, output)
        weight_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
        return FullSizeModel(output, len(model.graph.node), weight_bytes, ())
    weights = SparseWeights(output.parent, output.name, random)
    model = build_decoder(settings, weights)
    onnx.save(model, output)
    return FullSizeModel(output, len(model.graph.node), weights.total, tuple(weights.write()))


def _fields(kind: str, size: Size, layers: int | None, experts: int | None) -> dict[str, Any]:
    fields = get_config(kind).fields(size, layers)
    if experts is not None:
        group, least = fields["n_group"], fields["num_experts_per_tok"]
        if experts < least or experts % group:
            raise UsageError(f"experts must be a multiple of the {group} groups and at least {least}, not {experts}")
        fields["n_routed_experts"] = experts
    if fields["n_routed_experts"] // fields["n_group"] < 2:
        raise UsageError("a group needs two experts at least")
    return fields


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mla_trt.models.full_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="MODEL.onnx")
    parser.add_argument("--layers", type=int, help="number of layers (default: all)")
    parser.add_argument("--experts", type=int, help="routed experts in a layer (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--size", choices=("full", "small"), default="full", help="small: reduced dimensions, random weights inside"
    )
    parser.add_argument(
        "--routing", choices=("gather", "mask"), default="gather", help="each expert on its own tokens, or on all"
    )
    parser.add_argument(
        "--random", action="store_true", help="random weights in full size, to be run: the files then take their space"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random weights of a small model")
    options = parser.parse_args(arguments)
    try:
        written = write_full_size(
            options.kind,
            options.output,
            layers=options.layers,
            experts=options.experts,
            dtype=options.dtype,
            size=options.size,
            routing=options.routing,
            seed=options.seed,
            random=options.random,
        )
    except MlaTrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    kind = "" if options.random else "sparse "
    files = f" in {len(written.weight_files)} {kind}file(s)" if written.weight_files else ""
    print(f"{written.path}: {written.nodes} nodes, {written.weight_bytes / 1e9:.3f} GB of weights{files}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
