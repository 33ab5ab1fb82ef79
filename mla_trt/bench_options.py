"""The options of `mla-trt bench`, apart from what they start, which loads slowly."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, and where the results go."""
    parser.add_argument("what", choices=("kernels",), help="kernels: each op, beside FlashMLA, DeepGEMM and cuDNN")
    parser.add_argument("--cases", default="", metavar="REGEX", help="only cases whose name has this")
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="do not run other people's kernels")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="write bench.md, bench.json and, with matplotlib, bench.png there",
    )
