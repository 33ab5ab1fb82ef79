"""The options of `mla-trt serve`, apart from what they start, which loads slowly."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """What is served, where, and with what."""
    parser.add_argument("model", type=Path, metavar="DIR|ENGINE")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="what everything listens on (default 127.0.0.1: this machine only); 0.0.0.0 is every network",
    )
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="of the page (default 8080); 0: a free one")
    parser.add_argument("--no-page", dest="page", action="store_false", help="only tritonserver")
    for what, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        parser.add_argument(
            f"--{what}-port",
            type=int,
            default=port,
            metavar="N",
            help=f"of tritonserver (default {port}); 0: a free one",
        )
    parser.add_argument("--name", help="the model's name in Triton (default: that of the folder or engine)")
    parser.add_argument(
        "--repository",
        type=Path,
        metavar="REPO",
        help="write the model repository there, with a copy of the model (default: a temporary one that links to it); "
        "other models in it are served too",
    )
    parser.add_argument(
        "--environment",
        type=Path,
        metavar="PATH",
        help="Python environment that runs the model, and perhaps has a tritonserver (default: the one of this command)",
    )
    parser.add_argument("--plugins", type=Path, metavar="FILE.so", help="the plugin library of an engine")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json (default: the one beside the model, if any)"
    )
    parser.add_argument(
        "--stop-ids",
        metavar="ID,...",
        help="ids that end a sequence, of a request that does not say (default: those of the generation_config.json beside "
        "the model, if any)",
    )
    parser.add_argument(
        "--load-seconds",
        type=float,
        default=600,
        metavar="S",
        help="time for tritonserver to load the model (default 600)",
    )
