"""`make demo`: lowers a real export of a small DeepSeek-V3 and generates with it, beside the same tokens from the original."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mla_trt import models
from mla_trt.cli import main as command
from mla_trt.generation import generate
from mla_trt.loading import load_model
from mla_trt.lowering import inspect
from mla_trt.session import Session
from mla_trt.verification.original import OriginalModel

EXAMPLE = "deepseek_v3__dynamo_op20__eager__dec.onnx"
PROMPTS = ([17, 4, 33, 8, 51], [2, 60], [11, 29, 5, 42, 42, 7, 19, 3, 38])
NEW_TOKENS = 8


def main() -> int:
    """Runs the demo; returns the exit status, 1 where original and lowered model disagree."""
    console = Console()
    export = Path(models.__path__[0]) / "examples" / EXAMPLE
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["lower", str(export), "-o", folder, "--kv-format", "f32"]
        console.print(f"$ mla-trt lower models/examples/{EXAMPLE} -o lowered --kv-format f32")
        status = command(arguments)
        if status:
            return status
        console.print(f"\nContinuing {len(PROMPTS)} prompts of different lengths in one batch, token by token:\n")
        session = Session(Path(folder) / "model.onnx", pages=16)
        lowered: list[list[int]] = [[] for _ in PROMPTS]
        for index, token in generate(session, PROMPTS, max_new_tokens=NEW_TOKENS):
            lowered[index].append(token)
            console.print(f"  prompt {index}: {token}", highlight=False)
    loaded = load_model(export)
    original = OriginalModel(export, inspect(loaded.proto, loaded.base_dir).interface)
    alone = [greedy(original, prompt) for prompt in PROMPTS]
    table = Table(title="\nthe lowered model, all together, and the export, each prompt alone")
    for heading in ("prompt", "lowered", "original", "same"):
        table.add_column(heading)
    for prompt, ours, theirs in zip(PROMPTS, lowered, alone, strict=True):
        table.add_row(str(prompt), str(ours), str(theirs), "yes" if ours == theirs else "[red]no[/]")
    console.print(table)
    return 0 if lowered == alone else 1


def greedy(original: OriginalModel, prompt: list[int]) -> list[int]:
    """Continues one prompt with the export itself."""
    run = original.start()
    tokens: list[int] = []
    results = run.feed(np.array(prompt)[None])
    while True:
        logits = next(iter(results.values()))
        tokens.append(int(logits[0, -1].argmax()))
        if len(tokens) == NEW_TOKENS:
            return tokens
        results = run.feed(np.array([[tokens[-1]]]))


if __name__ == "__main__":
    sys.exit(main())
