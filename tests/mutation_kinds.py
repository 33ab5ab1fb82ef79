"""The register of mutations: named changes to a model, each at one random place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx
from model_editor import FLOATS, INTEGERS, Editor, TensorFacts
from onnx import TensorProto

Change = Callable[[Editor], bool]
"""Makes a change through an editor; False where it finds nothing to change."""


@dataclass(frozen=True)
class Mutation:
    """A kind of change."""

    name: str
    change: Change


KEEPING: dict[str, Mutation] = {}
CHANGING: dict[str, Mutation] = {}


def keeps(change: Change) -> Change:
    """Registers a change that keeps the meaning."""
    KEEPING[change.__name__] = Mutation(change.__name__, change)
    return change


def changes(change: Change) -> Change:
    """Registers a change that changes the meaning."""
    CHANGING[change.__name__] = Mutation(change.__name__, change)
    return change


def mutate(model: onnx.ModelProto, mutation: Mutation, seed: int) -> onnx.ModelProto | None:
    """The changed copy of a model; None where the mutation finds nothing to change."""
    editor = Editor(model, seed)
    return editor.finish() if mutation.change(editor) else None


def is_float(facts: TensorFacts) -> bool:
    """Whether a tensor holds floats."""
    return facts.element in FLOATS


def is_ranked_float(facts: TensorFacts) -> bool:
    """Whether a tensor holds floats and has axes."""
    return facts.element in FLOATS and facts.rank >= 1


def is_plain(facts: TensorFacts) -> bool:
    """Whether a tensor is of a type that every op here takes."""
    return facts.element in (*FLOATS, *INTEGERS, TensorProto.BOOL)
