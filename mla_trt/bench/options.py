"""The options of `mla-trt bench`, apart from what they start, which loads slowly."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from mla_trt.errors import UsageError


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, and where the results go."""
    parser.add_argument(
        "what",
        choices=("kernels", "layer"),
        help="kernels: each op, beside FlashMLA, DeepGEMM and cuDNN; layer: an attention layer of DeepSeek-V3 as an engine, "
        "beside engines without plugins",
    )
    parser.add_argument("--cases", default="", metavar="REGEX", help="only cases whose name has this")
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="measure ours only")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE.so",
        help="kernels: another build of them, which is measured in place of peers: does a change make them faster?",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="write bench.md, bench.json and, with matplotlib, bench.png there; of the layer, layer.md and layer.json, and with --timeline "
        "timeline.md, timeline.json and, with matplotlib, timeline.png",
    )
    layer = parser.add_argument_group("layer")
    layer.add_argument(
        "--formats",
        default="fp8,bf16",
        help="row formats of the cache of ours (default fp8,bf16); fp8:1 is fp8 as 'mla-trt build --query-terms 1' builds it, "
        "and with /fp8 behind it weights are e4m3, as --weights fp8 has them",
    )
    layer.add_argument(
        "--timeline",
        action="store_true",
        help="show too when each kernel of a step begins and ends (by torch's profiler): what runs beside what, and what is waited for",
    )
    layer.add_argument("--optimization-level", type=int, default=3, metavar="0-5", help="of TensorRT (default 3)")
    layer.add_argument("--plugins", type=Path, metavar="FILE.so", help="the plugin library (default: found by itself)")


def command_line() -> str:
    """What was given to the shell, for files of figures: with `mla-trt`, or where only the source tree is."""
    program = ["mla-trt"] if sys.argv[1:2] == ["bench"] else ["python", "-m", "mla_trt.bench"]
    return shlex.join([*program, *sys.argv[1:]])


def choose_cases(options: argparse.Namespace, cases: Iterable[str]) -> list[str]:
    """The names that `--cases` has chosen.

    Raises:
        UsageError: it is no regular expression, or no name has it; or `--against` is given for the layer, or `--timeline` for kernels.
    """
    if options.what == "kernels" and options.timeline:
        raise UsageError("--timeline is of the layer: 'mla-trt bench layer' shows what its kernels wait for")
    if options.what == "layer" and options.against is not None:
        raise UsageError("--against is of kernels: 'mla-trt bench kernels' measures two builds beside each other")
    try:
        names = [name for name in cases if re.search(options.cases, name)]
    except re.error as error:
        raise UsageError(f"--cases '{options.cases}' is not a regular expression: {error}") from None
    if not names:
        raise UsageError(f"no case matches '{options.cases}': --list shows them")
    return names
