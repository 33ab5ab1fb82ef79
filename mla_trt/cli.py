"""The command `mla-trt`."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console
from rich.table import Table

from mla_trt import __version__
from mla_trt.bench.options import add_bench_arguments
from mla_trt.errors import MlaTrtError, UsageError
from mla_trt.serving.options import add_serve_arguments
from mla_trt.signals import ending_raises, exit_status
from mla_trt.standard_output import Output, OutputError

if TYPE_CHECKING:
    from mla_trt.serving.triton_repository import Settings

log = logging.getLogger("mla_trt")

OUTPUT_STATUS = 1  # not 2: what a command writes may have been written

EPILOGS = {
    "lower": """examples:
  mla-trt lower deepseek-v3.onnx -o lowered/
  mla-trt lower model.onnx -o out --kv-format bf16 --logits last
  mla-trt lower model.onnx -o out --weights fp8 --target onnx --no-verify

DIR gets model.onnx (large weights beside it) and report.json.
exit status: 0 done; 2 bad input or usage; 3 no MLA found; 4 verification failed (nothing is written on 2, 3 and 4).""",
    "inspect": """examples:
  mla-trt inspect model.onnx
  mla-trt inspect model.onnx --json | jq '.layers[] | select(.matched | not) | .reason'

exit status: 0 every attention core is MLA; 2 bad input; 3 some or all are not.""",
    "verify": """examples:
  mla-trt verify deepseek-v3.onnx lowered/

exit status: 0 equal; 2 bad input; 4 they differ.""",
    "build": """examples:
  mla-trt build lowered/ -o model.engine
  mla-trt build lowered/ -o model.engine --dtype bf16 --max-batch 128 --max-length 8192
  mla-trt build lowered/ -o model.engine --dtype bf16 --weights fp8
  mla-trt build lowered/ -o model.engine --pages 4096 --timing-cache none
  mla-trt build lowered/ -o model.engine --cache resident --pages 4096

Writes ENGINE, a plan that TensorRT's own tools load too (with the plugin library), and ENGINE.json, which says what it
holds. Needs a GPU, TensorRT's Python package and the library of 'mla-trt plugins build'.
exit status: 0 done; 2 bad input or usage, no GPU, or TensorRT refuses the model (nothing is written).""",
    "run": """examples:
  mla-trt run lowered/ --prompt-ids 1,5,9 --prompt-ids 3,4 --max-new-tokens 16
  mla-trt run lowered/ --prompt-ids 1,5,9 --stop-ids 2 --json
  mla-trt run lowered/ --prompt-ids 1,5,9 --temperature 0.8 --top-p 0.95 --seed 1
  mla-trt run model.engine --prompt-ids 1,5,9

A folder that 'mla-trt lower' wrote runs on ONNX Runtime, an engine that 'mla-trt build' wrote on TensorRT.""",
    "triton": """examples:
  mla-trt triton lowered/ -o repository --name deepseek
  mla-trt triton model.engine -o repository --max-batch 64 --stop-ids 1
  mla-trt triton model.engine -o repository --backend tensorrt --plugins libmla_trt_plugins.so

Adds the model NAME to REPO: config.pbtxt, model.py and a copy of the model; with --backend tensorrt also NAME_engine.
Requests of all clients run together; tokens come one by one over gRPC. docs/triton.md says what tritonserver needs and how
clients ask.
exit status: 0 done; 2 bad input or usage (nothing is written).""",
    "serve": """examples:
  mla-trt serve lowered/
  mla-trt serve model.engine --max-batch 64 --pages 4096 --stop-ids 1
  mla-trt serve lowered/ --environment served/ --port 0
  mla-trt serve lowered/ --no-page --host 0.0.0.0

Starts NVIDIA's tritonserver with the model and, on http://127.0.0.1:8080, a page that streams tokens and shows batch, pages,
queue and latency. tritonserver is looked for in --environment, on PATH, in /opt/tritonserver and in this Python's
nvidia-pytriton (pip install 'mla-trt[triton]'). Prompts are text where tokenizer.json lies beside the model (and the library
tokenizers is installed: 'mla-trt[text]'), and token ids otherwise.
exit status: 0 ended by Ctrl-C or SIGTERM; 1 there is no tritonserver, or it ended by itself or had to be killed; 2 bad input or usage.""",
    "bench": """examples:
  mla-trt bench kernels -o results
  mla-trt bench kernels --cases '^decode-fp8' --no-peers
  mla-trt bench kernels --cases 'b1-' --against before/libmla_trt_kernels.so
  mla-trt bench layer --cases 'b16-4k|b128-4k' --formats fp8 -o results
  mla-trt bench layer --cases b4-32k --formats fp8 --no-peers --timeline -o results

kernels needs a GPU and the kernel library (mla-trt plugins build --kernels-only). Peers run where flash_mla, flash_mla_vllm,
deep_gemm and torch are importable. layer needs what 'mla-trt build' needs, with --timeline torch too.
exit status: 0 done; 2 nothing to measure with; 4 a kernel or an engine was refused or wrong (it has no figure);
130 interrupted (what was measured by then is written).""",
    "export": """examples:
  mla-trt export deepseek-v3 -o model.onnx
  mla-trt export deepseek-v3.2 -o model.onnx --attention eager --opset 23
  mla-trt export --list

needs PyTorch and Transformers: pip install 'mla-trt[export]'""",
    "plugins build": """examples:
  mla-trt plugins build
  mla-trt plugins build --tensorrt-include /opt/tensorrt/include --arch 90a
  mla-trt plugins build --kernels-only -o libmla_trt_kernels.so

Compiles the CUDA kernels and the TensorRT plugins; what did not change since the last build is not compiled again. Needs
g++, nvcc (of a CUDA toolkit, or pip install 'mla-trt[kernels]') and, for the plugins, TensorRT's headers.
exit status: 0 done; 2 something is missing or does not compile.""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have characters that a terminal does not
    options = _parser().parse_args(arguments)
    level = logging.WARNING - 10 * options.verbose if not options.quiet else logging.ERROR
    logging.basicConfig(level=max(level, logging.DEBUG), format="%(levelname)s %(message)s", stream=sys.stderr)
    _silence_graphsurgeon()
    try:
        # A command that is started with a closed one has none.
        output = redirect_stdout(cast(TextIO, Output(sys.stdout))) if sys.stdout else nullcontext()
        with ending_raises(), output:
            status: int = options.command(options)
            print(end="", flush=True)
        return status
    except (MlaTrtError, OSError) as error:
        if options.verbose > 1:
            log.exception("traceback")
        print(f"mla-trt: {_one_line(error)}", file=sys.stderr)
        return error.exit_status if isinstance(error, MlaTrtError) else UsageError.exit_status
    except KeyboardInterrupt as end:
        status = exit_status(end)
        number = signal.Signals(status - 128)
        how = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
        whole = options.command in (_lower, _build, _export)  # the others write as they go
        print(f"mla-trt: {how}{'; nothing was written' if whole else ''}", file=sys.stderr)
        return status
    except OutputError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in its buffer
        if isinstance(error.__cause__, BrokenPipeError):  # whoever reads, as head does, has enough
            return int(options.verdict)
        print(f"mla-trt: standard output cannot be written: {_one_line(error.__cause__)}", file=sys.stderr)
        return OUTPUT_STATUS


def _one_line(error: BaseException | None) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"'{error.filename}' cannot be used: {error.strerror}"
    return " ".join(text.split())


def _silence_graphsurgeon() -> None:
    # Only lowering needs it; a machine that runs engines may lack it.
    try:
        from onnx_graphsurgeon.logger import G_LOGGER
    except ImportError:
        return
    G_LOGGER.severity = G_LOGGER.ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mla-trt",
        description="Lowers multi-head latent attention in ONNX models to fused ops over a paged latent cache.",
        epilog="'mla-trt COMMAND --help' shows options and examples. The exit status of all of them is 1 where standard output cannot be "
        "written, and 128 and its number where a signal ended them.",
    )
    parser.add_argument("--version", action="version", version=f"mla-trt {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    lower = _command(
        commands, "lower", _lower, "replace MLA in an exported model by fused ops, verify, and write the result"
    )
    lower.add_argument("model", type=Path, metavar="MODEL.onnx", help="the export")
    lower.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    lower.add_argument(
        "--kv-format", default="fp8", help="rows of the latent cache: f32, bf16, fp8 (default), fp8_ds_mla, fp8_flat"
    )
    lower.add_argument("--kv-scale", type=float, default=1.0, help="static scale of fp8_flat rows (default 1)")
    lower.add_argument(
        "--index-format", default="fp8", help="rows of the index cache of sparse models: f32, fp8 (default)"
    )
    lower.add_argument(
        "--weights", default="keep", help="W_UK and W_UV: keep (default), or fp8 with 128x128 block scales"
    )
    lower.add_argument("--page-size", type=int, default=64, help="tokens in a page (default 64)")
    lower.add_argument("--logits", default="all", help="results of all tokens (default), or of each sequence's last")
    lower.add_argument(
        "--cache",
        default="io",
        help="io, the only choice here: pages are inputs and outputs; see 'mla-trt build --cache'",
    )
    lower.add_argument(
        "--target", default="tensorrt-10.6", help="parser to write for: tensorrt-10.6 (default), tensorrt-11, onnx"
    )
    lower.add_argument(
        "--strict", action="store_true", help="refuse what rests on an assumption, such as a mask that is an input"
    )
    lower.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not run original and result side by side"
    )
    _add_verify_memory(lower)

    inspect = _command(
        commands, "inspect", _inspect, "show what was found in an export, layer by layer, and why not where not"
    )
    inspect.add_argument("model", type=Path, metavar="MODEL.onnx")
    inspect.add_argument("--json", action="store_true", help="print the report as JSON")

    verify = _command(commands, "verify", _verify, "compare a lowered model with its original")
    verify.add_argument("original", type=Path, metavar="ORIGINAL.onnx")
    verify.add_argument("lowered", type=Path, metavar="DIR")
    verify.add_argument("--json", action="store_true", help="print the verification as JSON")
    _add_verify_memory(verify)

    build = _command(commands, "build", _build, "build a TensorRT engine from a lowered model")
    build.add_argument("lowered", type=Path, metavar="DIR", help="the folder that 'mla-trt lower' wrote")
    build.add_argument("-o", "--output", type=Path, required=True, metavar="ENGINE", help="file to write")
    build.add_argument(
        "--dtype",
        default="keep",
        help="keep (default) the types of the model, or bf16: multiply in bfloat16 what is float32 or float16; norms, routers, "
        "rope and the residual stream stay",
    )
    build.add_argument(
        "--weights",
        default="keep",
        help="bfloat16 weights of the products before and behind attention: keep (default), or fp8: e4m3 with 128x128 block scales, half "
        "the bytes and less exact; on Hopper only. A float32 or float16 model has them with --dtype bf16",
    )
    build.add_argument(
        "--query-terms",
        type=int,
        metavar="0-2",
        help="attention over e4m3 rows on Hopper: 2 (default) products of e4m3 codes, two for each value of the query; 1: one, faster "
        "and less exact; 0: products of bfloat16, slower and more exact (docs/kernels.md has figures)",
    )
    build.add_argument("--max-batch", type=int, metavar="N", help="most sequences of a step (default 16)")
    build.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of a step (default 2048)")
    build.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="most tokens of a sequence (default: as many as the model has positions, at most 32768)",
    )
    build.add_argument("--pages", type=int, metavar="N", help="fixed number of pages in each pool (default: any)")
    build.add_argument(
        "--cache",
        default="io",
        help="io (default): pages are inputs and outputs; resident: the engine's plugins hold --pages of each cache, for "
        "servers that copy inputs",
    )
    build.add_argument("--plugins", type=Path, metavar="FILE.so", help="the plugin library (default: found by itself)")
    build.add_argument(
        "--timing-cache",
        metavar="FILE",
        help="measured times, kept between builds (default: in the user's cache folder; none: not kept)",
    )
    build.add_argument("--optimization-level", type=int, default=3, metavar="0-5", help="of TensorRT (default 3)")
    build.add_argument("--workspace", metavar="SIZE", help="most memory of a layer beside its tensors, such as 4G")
    build.add_argument(
        "--weight-streaming",
        action="store_true",
        default=None,
        help="keep weights in host memory (default: where they would fill the GPU's)",
    )
    build.add_argument("--refit", action="store_true", help="let weights be replaced in the engine")
    build.add_argument(
        "--keep-codes",
        action="store_true",
        help="leave quantised weights as codes: a smaller engine, which may decode them in every step (default: those of products in "
        "bfloat16 or float16 are decoded now)",
    )
    build.add_argument("--tf32", action="store_true", help="let products in float32 round their factors to 10 bits")
    build.add_argument("--json", action="store_true", help="print the engine's description as JSON")

    run = _command(commands, "run", _run, "generate with a lowered model on ONNX Runtime, or an engine on TensorRT")
    run.add_argument("lowered", type=Path, metavar="DIR|ENGINE")
    run.add_argument(
        "--prompt-ids",
        action="append",
        required=True,
        metavar="ID,ID,...",
        help="token ids of a prompt; give it again for more prompts in one batch",
    )
    run.add_argument("--max-new-tokens", type=int, default=16, help="tokens to add to each prompt (default 16)")
    run.add_argument("--stop-ids", default="", metavar="ID,...", help="ids that end a sequence")
    run.add_argument(
        "--temperature", type=float, default=0.0, help="draw tokens at random; 0 (default) takes the likeliest one"
    )
    run.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens only")
    run.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that make up a share P only",
    )
    run.add_argument(
        "--seed", type=int, metavar="N", help="of the first prompt; that of the next one is N + 1, and so on"
    )
    run.add_argument("--pages", type=int, help="pages in the pool (default 256, or as many as an engine was built for)")
    run.add_argument("--plugins", type=Path, metavar="FILE.so", help="the plugin library (default: found by itself)")
    run.add_argument("--json", action="store_true", help="print one JSON object with all sequences at the end")

    triton = _command(commands, "triton", _triton, "write a model repository for Triton Inference Server")
    triton.add_argument("model", type=Path, metavar="DIR|ENGINE")
    triton.add_argument("-o", "--output", type=Path, required=True, metavar="REPO", help="model repository to write to")
    triton.add_argument("--name", help="the model's name in Triton (default: that of the folder or engine)")
    triton.add_argument(
        "--backend",
        default="python",
        help="python (default): the model holds the engine; tensorrt: Triton's TensorRT backend does (engines with resident "
        "pages)",
    )
    _add_model_settings(triton, drain_seconds=20)
    triton.add_argument(
        "--stop-ids", default="", metavar="ID,...", help="ids that end a sequence, of a request that does not say"
    )
    triton.add_argument(
        "--plugins", type=Path, metavar="FILE.so", help="the plugin library of an engine, to be copied too"
    )
    triton.add_argument(
        "--environment",
        type=Path,
        metavar="PATH",
        help="Python environment that runs the model (default: the python3 that is first on tritonserver's PATH)",
    )

    serve = _command(
        commands, "serve", _serve, "start Triton Inference Server with a model, and a web page that uses it"
    )
    add_serve_arguments(serve)
    _add_model_settings(serve, drain_seconds=5)

    export = _command(commands, "export", _export, "export a public model configuration with random weights")
    export.add_argument("config", nargs="?", metavar="CONFIG", help="such as deepseek-v3; --list shows all")
    export.add_argument("-o", "--output", type=Path, metavar="MODEL.onnx")
    export.add_argument("--list", action="store_true", help="list the configurations")
    export.add_argument("--size", default="small", choices=("small", "full"))
    export.add_argument("--layers", type=int, help="number of layers (default: 2 small, all full)")
    export.add_argument("--exporter", default="dynamo", choices=("dynamo", "torchscript"))
    export.add_argument("--attention", default="eager", choices=("eager", "sdpa"))
    export.add_argument("--opset", type=int, default=20)
    export.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    export.add_argument("--no-cache", dest="with_cache", action="store_false", help="a prefill graph without a cache")

    text = "the CUDA kernels and TensorRT plugins"
    plugins = commands.add_parser("plugins", help="build " + text, description=text)
    actions = plugins.add_subparsers(title="commands", metavar="COMMAND", required=True)
    build = _command(actions, "build", _build_plugins, "compile " + text, epilog=EPILOGS["plugins build"])
    build.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE.so",
        help="the library (default: a file in the user's cache, where engines and sessions find it by themselves)",
    )
    build.add_argument(
        "--tensorrt-include",
        type=Path,
        metavar="DIR",
        help="folder of NvInferRuntime.h (default: TENSORRT_ROOT/include, else the system's usual folders)",
    )
    build.add_argument(
        "--nvcc",
        type=Path,
        metavar="FILE",
        help="the CUDA compiler (default: of CUDA_HOME, PATH, /usr/local/cuda or PyPI's packages)",
    )
    build.add_argument("--arch", default="80,90a", help="GPUs to compile for, such as 90a or 80,90a (the default)")
    build.add_argument(
        "--kernels-only", action="store_true", help="libmla_trt_kernels.so with the C interface, without TensorRT"
    )
    build.add_argument(
        "--jobs", type=int, metavar="N", help="sources compiled at a time (default: this machine's cores)"
    )

    bench = _command(
        commands, "bench", _bench, "measure kernels or an attention layer on this machine's GPU, beside others"
    )
    add_bench_arguments(bench)
    return parser


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], text: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=epilog or EPILOGS[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # verdict: the status where the reader of the output goes away before its end
    parser.set_defaults(command=function, verdict=0)
    parser.register("type", Path, _path)
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say more (-v passes, -vv tracebacks)")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    return parser


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty: give one")
    return Path(text)


def _add_model_settings(parser: argparse.ArgumentParser, *, drain_seconds: int) -> None:
    """Limits and defaults of a model in Triton."""
    parser.add_argument(
        "--pages", type=int, help="pages in the pool (default 256, or as many as an engine was built for)"
    )
    parser.add_argument("--max-batch", type=int, default=16, metavar="N", help="most sequences of a step (default 16)")
    parser.add_argument(
        "--max-step-tokens", type=int, default=512, metavar="N", help="most tokens of a step (default 512)"
    )
    parser.add_argument(
        "--max-waiting", type=int, default=256, metavar="N", help="most requests that wait (default 256)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=128,
        metavar="N",
        help="tokens of a request that does not say (default 128)",
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=drain_seconds,
        metavar="S",
        help=f"time for requests to end when the model does (default {drain_seconds})",
    )


def _add_verify_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify-memory",
        metavar="SIZE",
        help="memory to verify in, such as 8G or 512M (default half of this machine's); a model that needs more is "
        "verified a layer at a time, every model with 0",
    )


def _size(text: str | None, option: str) -> int | None:
    """Bytes, from a number with K, M, G or T (of 1024) behind it or without."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise UsageError(f"{option} is '{text}': give bytes, such as 8G, 512M or 1000000")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


def _ids(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(" ", "").split(",") if part]
    except ValueError:
        raise UsageError(f"{option} is '{text}': give token ids with commas between, such as 1,5,9") from None


def _lower(options: argparse.Namespace) -> int:
    from mla_trt.lowering import LowerOptions
    from mla_trt.pipeline import lower_file

    if options.cache != "io":
        raise UsageError(
            f"--cache is '{options.cache}': a lowered model has its pages as inputs and outputs (io); for an engine "
            "whose plugins hold them give 'mla-trt build' --cache resident"
        )
    lower_options = LowerOptions(
        kv_format=options.kv_format,
        index_format=options.index_format,
        weights=options.weights,
        page_size=options.page_size,
        logits=options.logits,
        target=options.target,
        strict=options.strict,
        kv_scale=options.kv_scale,
    )
    console = Console(stderr=True, quiet=options.quiet)
    with console.status("") as status:
        report = lower_file(
            options.model,
            options.output,
            lower_options,
            verify=options.verify,
            verify_memory=_size(options.verify_memory, "--verify-memory"),
            progress=lambda text: status.update(text),
        )
    for warning in (*report.assumptions, *report.notes):
        log.warning("%s", warning)
    if not options.quiet:
        print_report(Console(), report.to_json())
        print(f"written: {options.output / 'model.onnx'}, {options.output / 'report.json'}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from mla_trt.loading import load_model
    from mla_trt.lowering import inspect

    model = load_model(options.model)
    report = inspect(model.proto, model.base_dir).report
    options.verdict = 0 if report.layers and report.matched == len(report.layers) else 3
    if options.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        print_report(Console(), report.to_json())
    return int(options.verdict)


def _verify(options: argparse.Namespace) -> int:
    from mla_trt.pipeline import verify_files

    console = Console(stderr=True, quiet=options.quiet)
    with console.status("verify") as status:
        report = verify_files(
            options.original,
            options.lowered,
            verify_memory=_size(options.verify_memory, "--verify-memory"),
            progress=lambda text: status.update(text),
        )
    options.verdict = 0 if report.passed else 4
    if options.json:
        print(json.dumps(report.to_json(), indent=1))
    elif not options.quiet:
        print_verification(Console(), report.to_json())
    return int(options.verdict)


def _build(options: argparse.Namespace) -> int:
    from mla_trt.engines.build_progress import shown
    from mla_trt.engines.building import BuildOptions, build_file
    from mla_trt.engines.engine_file import description_path

    build_options = BuildOptions(
        dtype=options.dtype,
        weights=options.weights,
        query_terms=options.query_terms,
        cache=options.cache,
        max_batch=options.max_batch,
        max_tokens=options.max_tokens,
        max_length=options.max_length,
        pages=options.pages,
        optimization_level=options.optimization_level,
        workspace=_size(options.workspace, "--workspace"),
        timing_cache=Path(options.timing_cache) if options.timing_cache not in (None, "none") else None,
        keep_times=options.timing_cache is None,
        weight_streaming=options.weight_streaming,
        refit=options.refit,
        keep_codes=options.keep_codes,
        tf32=options.tf32,
        plugins=options.plugins,
    )
    with shown(Console(stderr=True, quiet=options.quiet)) as phases:
        description, seconds = build_file(options.lowered, options.output, build_options, phases=phases)
    if options.json:
        print(description_path(options.output).read_text(), end="")
    elif not options.quiet:
        limits = ", ".join(f"{most} {name}" for name, most in description.limits().items())
        print(
            f"built in {seconds:.0f} s with TensorRT {description.tensorrt} for {description.gpu}: steps of at most {limits}"
        )
        print(f"written: {options.output}, {description_path(options.output)}")
    return 0


def _run(options: argparse.Namespace) -> int:
    from mla_trt.engines.opening import open_engine
    from mla_trt.generation import generate
    from mla_trt.serving.sampling import Sampling
    from mla_trt.session import Session

    prompts = [_ids(text, "--prompt-ids") for text in options.prompt_ids]
    if options.temperature == 0 and (options.top_k != 0 or options.top_p != 1 or options.seed is not None):
        raise UsageError("--top-k, --top-p and --seed are for tokens drawn at random: give --temperature too")
    samplings = [
        Sampling(options.temperature, options.top_k, options.top_p, None if options.seed is None else options.seed + n)
        for n in range(len(prompts))
    ]
    session = Session(open_engine(options.lowered, pages=options.pages, plugins=options.plugins))
    sequences: list[list[int]] = [[] for _ in prompts]
    for index, token in generate(
        session,
        prompts,
        max_new_tokens=options.max_new_tokens,
        stop_ids=_ids(options.stop_ids, "--stop-ids"),
        samplings=samplings,
    ):
        sequences[index].append(token)
        if not options.json:
            print(f"{index}: {token}", flush=True)
    if options.json:
        print(
            json.dumps(
                {
                    "sequences": [
                        {"prompt": prompt, "tokens": tokens} for prompt, tokens in zip(prompts, sequences, strict=True)
                    ]
                }
            )
        )
    return 0


def _triton(options: argparse.Namespace) -> int:
    from mla_trt.serving.triton_repository import write_repository

    folder = write_repository(
        options.model,
        options.output,
        _model_settings(options, tuple(_ids(options.stop_ids, "--stop-ids"))),
        name=options.name,
        backend=options.backend,
        plugins=options.plugins,
        environment=options.environment,
    )
    if not options.quiet:
        print(f"written: {folder}" + (f", {folder}_engine" if options.backend == "tensorrt" else ""))
    return 0


def _serve(options: argparse.Namespace) -> int:
    from mla_trt.serving.serve import ServeOptions, serve

    stop_ids = None if options.stop_ids is None else tuple(_ids(options.stop_ids, "--stop-ids"))
    serve_options = ServeOptions(
        host=options.host,
        port=options.port if options.page else None,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        name=options.name,
        repository=options.repository,
        environment=options.environment,
        plugins=options.plugins,
        tokenizer=options.tokenizer,
        stop_ids=stop_ids,
        load_seconds=options.load_seconds,
    )
    return serve(options.model, _model_settings(options, ()), serve_options, quiet=options.quiet)


def _model_settings(options: argparse.Namespace, stop_ids: tuple[int, ...]) -> Settings:
    from mla_trt.serving.triton_repository import Settings

    return Settings(
        pages=options.pages,
        max_batch=options.max_batch,
        max_step_tokens=options.max_step_tokens,
        max_waiting=options.max_waiting,
        max_new_tokens=options.max_new_tokens,
        stop_ids=stop_ids,
        drain_seconds=options.drain_seconds,
    )


def _export(options: argparse.Namespace) -> int:
    from mla_trt.models import configs
    from mla_trt.models.export import ExportSettings, export

    if options.list:
        for name in configs.CONFIGS:
            print(name)
        return 0
    if options.config is None or options.output is None:
        raise UsageError("export needs a configuration and -o MODEL.onnx; --list shows the configurations")
    settings = ExportSettings(
        exporter=options.exporter,
        opset=options.opset,
        attention=options.attention,
        cache=options.with_cache,
        dtype=options.dtype,
    )
    result = export(options.config, options.output, layers=options.layers, size=options.size, settings=settings)
    print(f"written: {result.path}")
    return 0


def _build_plugins(options: argparse.Namespace) -> int:
    from mla_trt.plugins.build import BuildOptions, build, parse_architectures

    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs is {options.jobs}: give 1 or more")
    build_options = BuildOptions(
        output=options.output,
        architectures=parse_architectures(options.arch),
        kernels_only=options.kernels_only,
        tensorrt_include=options.tensorrt_include,
        nvcc=options.nvcc,
        jobs=options.jobs,
    )
    console = Console(stderr=True, quiet=options.quiet)
    with console.status("") as status:
        library = build(build_options, progress=lambda text: status.update(text))
    if not options.quiet:
        tensorrt = "" if library.tensorrt is None else f", TensorRT {library.tensorrt}"
        print(f"written: {library.path} ({', '.join(library.architectures)}{tensorrt})")
    return 0


def _bench(options: argparse.Namespace) -> int:
    if options.what == "layer":
        from mla_trt.bench.layer import run as run_layer

        return run_layer(options)
    from mla_trt.bench.kernels import run

    return run(options)


def print_report(console: Console, report: dict[str, Any]) -> None:
    """The layers as a table, why others are not lowered, then what the verification measured."""
    table = Table(title=f"{report['matched']} of {report['attention_cores']} attention cores are MLA")
    for heading in ("core", "kind", "cache", "heads", "dimensions", "scale", "at"):
        table.add_column(heading, overflow="fold")
    for layer in report["layers"]:
        if layer["matched"]:
            query = f", query latent {layer['q_lora_rank']}" if layer["q_lora_rank"] else ""
            sizes = (
                f"nope {layer['qk_nope_head_dim']}, rope {layer['qk_rope_head_dim']}, value {layer['v_head_dim']}, "
                f"latent {layer['kv_lora_rank']}{query}"
            )
            kind = layer["kind"] if layer["top_k"] is None else f"{layer['kind']}, top {layer['top_k']}"
            heads = str(layer["num_heads"]) + (" + sinks" if layer["sinks"] else "")
            table.add_row(str(layer["index"]), kind, layer["cache"], heads, sizes, f"{layer['scale']:.5g}", layer["at"])
    if report["matched"]:
        console.print(table)
    for layer in report["layers"]:
        if not layer["matched"]:
            console.print(
                f"core {layer['index']} (at '{layer['at']}') is not lowered: {layer['reason']}", highlight=False
            )
    if not report["layers"]:
        console.print("no attention was found")
    if report["verification"] is not None:
        print_verification(console, report["verification"])


def print_verification(console: Console, verification: dict[str, Any]) -> None:
    """The sessions that were compared, with their errors."""
    how = "verification" if verification["mode"] == "whole" else "verification a layer at a time"
    table = Table(title=f"{how}: " + ("passed" if verification["passed"] else "FAILED"))
    for heading in ("session", "tokens", "rewrite error", "format error"):
        table.add_column(heading, justify="left" if heading == "session" else "right")
    for case in verification["cases"]:
        table.add_row(
            case["name"], str(case["tokens"]), _number(case["rewrite_max_error"]), _number(case["format_max_error"])
        )
    console.print(table)
    for note in verification.get("notes", []):
        console.print(f"note: {note}", highlight=False)
    for failure in verification.get("failures", []):
        console.print(f"[red]{failure}[/]")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


if __name__ == "__main__":
    sys.exit(main())
