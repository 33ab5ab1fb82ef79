"""Random changes to example exports: what keeps the meaning must be lowered, what changes it is lowered rightly or refused with a reason.

MLA_TRT_FUZZ_EXAMPLES=200 runs that many random cases of each kind and model instead of the few fixed ones.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_editor import Editor
from mutations import CHANGING, KEEPING, Mutation, mutate

from mla_trt.errors import MlaTrtError, VerificationError
from mla_trt.lowering import LowerOptions
from mla_trt.pipeline import lower_file

EXAMPLES = Path(__file__).resolve().parent.parent / "models" / "examples"
MODELS = (
    "deepseek_v3__dynamo_op20__eager__dec",
    "deepseek_v3__dynamo_op23__sdpa__dec",
    "deepseek_v3__dynamo_op20__sdpa__dec__post_ort_extended",
    "deepseek_v32__dynamo_op20__eager__dec",
    "dsref_v3_absorb__ts_op17__ref__dec__io_realrope",
    "hub_deepseek_v2_orig__dynamo_op20__eager__dec",
    "minicpm3__ts_op17__eager__dec__post_onnxslim",
    "packed2d_absorb_cat__dynamo_op20__hand__dec",
)
MANY = os.environ.get("MLA_TRT_FUZZ_EXAMPLES")
SECONDS = 60  # that one model may take; a hang shows as more
FUZZ = settings(
    max_examples=int(MANY or 4),
    derandomize=MANY is None,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SEEDS = st.integers(0, (1 << 30) - 1)

# The mutated original cannot be run, or its results are not finite or are not rows of tokens: there is nothing that a matcher could have seen.
NOTHING_TO_COMPARE = (
    "runs the export with none of the lengths",
    "cannot run the step",
    "gives no result",
    "the export refuses",
    "there is no token of which both models gave a result",
    "not finite",
    "differs from the original by inf",
    "does not have one row of a fixed size for each token",
)
# They can make tokens depend on each other outside the attention, which only running both models shows.
MIXES_TOKENS = {
    "shift_axis",
    "other_attribute",
    "other_order",
    "operands_turned",
    "something_between",
    "rewire_one",
    "other_index",
}


class Outcome(NamedTuple):
    """Exit status of the command and what it says."""

    status: int
    reason: str


def lowered(model: onnx.ModelProto) -> Outcome:
    """What `mla-trt lower` makes of a model. Anything but an error made on purpose is raised."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated.onnx"
        onnx.save(model, path)
        try:
            report = lower_file(path, Path(folder) / "lowered", LowerOptions())
        except MlaTrtError as error:
            assert not (Path(folder) / "lowered").exists()
            outcome = Outcome(error.exit_status, str(error))
        else:
            assert report.verification is not None
            assert report.verification["passed"]
            outcome = Outcome(0, "")
    assert time.monotonic() - start < SECONDS
    return outcome


def mutated(model: onnx.ModelProto, mutations: Sequence[Mutation], seed: int) -> tuple[onnx.ModelProto, list[str]]:
    """The model after those mutations that found something to change, and their names."""
    applied = []
    for count, mutation in enumerate(mutations):
        changed = mutate(model, mutation, seed + count)
        if changed is not None:
            model = changed
            applied.append(mutation.name)
    return model, applied


def load(name: str) -> onnx.ModelProto:
    return onnx.load(EXAMPLES / f"{name}.onnx")


@pytest.mark.parametrize("name", sorted(KEEPING))
def test_another_spelling_is_lowered(name: str) -> None:
    for base in MODELS:
        model = mutate(load(base), KEEPING[name], seed=1)
        if model is not None:
            assert lowered(model) == Outcome(0, "")
            return
    pytest.skip("no example has anything that this mutation changes")


@pytest.mark.parametrize("base", MODELS)
def test_changes_that_keep_the_meaning(base: str) -> None:
    model = load(base)
    outcomes: Counter[str] = Counter()

    @FUZZ
    @given(st.lists(st.sampled_from(sorted(KEEPING)), min_size=2, max_size=6), SEEDS)
    def check(names: list[str], seed: int) -> None:
        changed, applied = mutated(model, [KEEPING[name] for name in names], seed)
        status, reason = lowered(changed)
        assert status in (0, 2, 3), (applied, reason)
        assert_is_reason(reason, status)
        outcomes["refused" if status else "lowered"] += 1

    check()
    # Some sequences spell a thing in a way that is not read yet. They may be refused, with a reason, but few are.
    assert outcomes["refused"] <= max(1, outcomes.total() // 10), outcomes


@pytest.mark.parametrize("base", MODELS)
def test_changes_that_change_the_meaning(base: str) -> None:
    model = load(base)

    @FUZZ
    @given(st.lists(st.sampled_from(sorted(KEEPING)), max_size=1), st.sampled_from(sorted(CHANGING)), SEEDS)
    def check(names: list[str], change: str, seed: int) -> None:
        changed, applied = mutated(model, [*(KEEPING[name] for name in names), CHANGING[change]], seed)
        status, reason = lowered(changed)
        assert_is_reason(reason, status)
        if status == VerificationError.exit_status and change not in MIXES_TOKENS:
            # Only verification caught it: the matcher was wrong, unless there was nothing to see.
            assert any(text in reason for text in NOTHING_TO_COMPARE), (applied, reason)

    check()


def test_an_attention_without_rope_leaves_its_indexer_with_one() -> None:
    """Rows of a rope table serve both, so that those of the attention's one-row table must not be the indexer's."""
    editor = Editor(load("deepseek_v32__dynamo_op20__eager__dec"), seed=0)
    softmax = editor.nodes("Softmax")[-1]
    behind = [softmax.input[0]]
    while (node := editor.producers[behind[-1]]).op_type != "MatMul":
        behind.append(node.input[0])
    keys = editor.producers[node.input[1]]
    while keys.op_type != "ScatterND":
        keys = editor.producers[keys.input[0]]
    for use in list(editor.uses[keys.output[0]]):
        editor.rewire(use, keys.input[0])
    assert lowered(editor.finish()) == Outcome(0, "")


def test_index_scores_may_be_multiplied_by_hand() -> None:
    """Queries and keys of the indexer are those that Mul multiplies, not what ReduceSum is given."""
    editor = Editor(load("deepseek_v32__dynamo_op20__eager__dec"), seed=0)
    for relu in editor.nodes("Relu"):
        product = editor.producers[relu.input[0]]
        while product.op_type != "MatMul":
            product = editor.producers[product.input[0]]
        queries = editor.emit("Unsqueeze", product.input[0], editor.constant([-1], np.int64))
        keys = editor.emit("Unsqueeze", product.input[1], editor.constant([-3], np.int64))
        products = editor.emit("Mul", queries, keys)
        editor.replace(product, editor.emit("ReduceSum", products, editor.constant([-2], np.int64), keepdims=0))
    assert lowered(editor.finish()) == Outcome(0, "")


def test_a_guard_that_blanks_first_tokens_is_no_guard() -> None:
    """A first token sees itself; that a row sees nothing, which the lowered attention answers with 0 by itself, is another condition."""
    editor = Editor(load("deepseek_v3__dynamo_op20__eager__dec"), seed=0)
    for softmax in editor.nodes("Softmax")[:2]:
        (use,) = [use for use in editor.uses[softmax.output[0]] if use.node.op_type == "MatMul"]
        first = editor.emit("LessOrEqual", "position_ids", editor.constant(0, np.int64))
        first = editor.emit("Unsqueeze", first, editor.constant([1, 3], np.int64))
        readers = list(editor.uses[use.node.output[0]])
        guarded = editor.emit("Where", first, editor.constant(np.float32(0)), use.node.output[0])
        for reader in readers:
            editor.rewire(reader, guarded)
    outcome = lowered(editor.finish())
    assert outcome.status == 0 or "outside the attention uses" in outcome.reason


def assert_is_reason(reason: str, status: int) -> None:
    """Every refusal has its reason, which says something."""
    assert bool(reason) == bool(status)
    if status:
        assert len(reason.split()) > 3
