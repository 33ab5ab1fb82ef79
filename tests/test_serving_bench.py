"""benchmarks/serving.py: its figures from known times, and on a small model in the engine loop."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import Config, lowered

from mla_trt.errors import MlaTrtError
from mla_trt.session import Session

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import serving


def test_only_what_comes_while_all_decode_counts() -> None:
    # The first request is faster before the second one decodes, and the second one goes on when the first has ended.
    second = [2.2 + 0.2 * index for index in range(40)]
    first = [0.1 * index for index in range(20)] + second[:30]
    result = serving.evaluate(serving.Case(2, 7), [first, second])
    assert result.tokens_per_second == pytest.approx(10)
    assert (result.p50, result.p99) == (pytest.approx(200), pytest.approx(200))
    assert result.first == pytest.approx(np.mean([0.0, second[0]]))


def test_requests_that_did_not_meet_run_again_with_more_tokens() -> None:
    asked: list[int] = []

    def run(prompts: Sequence[np.ndarray], new: int) -> list[list[float]]:
        """Each request begins as many tokens after the one before as its prompt says."""
        asked.append(new)
        return [[(int(prompt[0]) + index) / 10 for index in range(new)] for prompt in prompts]

    case = serving.Case(2, 1)
    result = serving.run_together(case, run, [np.array([0]), np.array([50])], 20)
    assert asked == [20, 40, 80]
    assert result.tokens_per_second == pytest.approx(20)
    with pytest.raises(MlaTrtError, match="not all requests run at a time"):
        serving.run_together(case, run, [np.array([0]), np.array([500])], 20)
    assert asked[3:] == [20, 40, 80, 160]


def test_two_tokens_at_least_come_while_all_decode() -> None:
    first = [0.1 * index for index in range(20)] + [10.0]
    second = [9.9 - 0.01 * index for index in reversed(range(serving.WARM))] + [11.0]
    with pytest.raises(serving.ApartError):
        serving.evaluate(serving.Case(2, 7), [first, second])


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return lowered(Config(positions=512), max_position=512)


def test_every_request_has_its_tokens_while_all_decode(model: onnx.ModelProto) -> None:
    session = Session(model, pages=200)
    prompts = [np.arange(30) + case for case in range(5)]
    case = serving.Case(5, 30)
    times = serving.run_on_loop(session, prompts, serving.new_tokens(case, 6, 16), 6, 16)
    assert [len(each) for each in times] == sorted((len(each) for each in times), reverse=True)
    assert len(times[-1]) == serving.WARM + 6
    # In the steps that count all of them get a token together.
    assert len({tuple(each[-6:]) for each in times}) == 1
    assert not session.sequences
    assert session.free_count == 200


def test_a_pool_that_is_too_small_for_all_gives_no_figures(model: onnx.ModelProto) -> None:
    session = Session(model, pages=20)
    prompts = [np.arange(30) + case for case in range(4)]
    with pytest.raises(MlaTrtError, match="at a time"):
        serving.run_on_loop(session, prompts, 40, 6, 16)
    assert session.free_count == 20


def test_the_results_are_written(model: onnx.ModelProto, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(model, tmp_path / "model.onnx")
    options = [
        "--batches",
        "1",
        "3",
        "--contexts",
        "8",
        "600",
        "--steps",
        "4",
        "--pages",
        "200",
        "--max-step-tokens",
        "32",
    ]
    output = tmp_path / "results"
    assert serving.main([str(tmp_path / "model.onnx"), *options, "-o", str(output)]) == 1
    page = (output / "serving.md").read_text()
    assert page == capsys.readouterr().out
    lines = page.splitlines()
    assert lines[0].startswith("    python benchmarks/serving.py")
    assert {line.count("|") for line in lines[4:]} == {9}
    found = json.loads((output / "serving.json").read_text())["results"]
    assert [(entry["batch"], entry["context"]) for entry in found] == [(1, 8), (3, 8), (1, 600), (3, 600)]
    for entry in found[:2]:
        assert 0 < entry["p50"] <= entry["p90"] <= entry["p99"]
        # One token of each request every p50 milliseconds, but for steps that were slower.
        assert entry["tokens_per_second"] <= 1.5e3 * entry["batch"] / entry["p50"]
    assert all("positions" in entry["note"] for entry in found[2:])
