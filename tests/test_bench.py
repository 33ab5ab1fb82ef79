"""The kernels' benchmark without a GPU: its checks against references, its tables and its cases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import TensorProto, helper

from mla_trt.bench import case_data
from mla_trt.bench import cases as bench_cases
from mla_trt.bench import kernels as bench
from mla_trt.bench.check import Checker
from mla_trt.bench.kernels_report import Ceilings, Result, markdown, write_results
from mla_trt.bench.options import command_line
from mla_trt.cli import main
from mla_trt.ops import OPS
from mla_trt.ops.schema import Attributes
from mla_trt.plugins.kernel_library import DeviceTensor

Array = npt.NDArray[Any]


class HostMemory:
    """`mla_trt.cuda.Memory`, on the host; its address is its number."""

    made: list[HostMemory]

    def __init__(self, size: int) -> None:
        self.size, self.content = size, np.zeros(size, np.uint8)
        self.address = len(self.made)
        self.made.append(self)

    def fill(self, byte: int) -> None:
        self.content[:] = byte

    def write(self, values: Array, start: int = 0) -> None:
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self.content[start : start + len(content)] = content

    def read(self, start: int = 0, size: int | None = None) -> Array:
        return self.content[start : self.size if size is None else start + size].copy()

    def copy(self, source: int, start: int, size: int) -> None:
        self.content[start : start + size] = self.made[source].content[:size]

    def close(self) -> None:
        pass


class ReferenceLibrary:
    """A kernel library that runs the ops' references."""

    def call(
        self,
        op_type: str,
        attributes: Attributes,
        inputs: Mapping[str, DeviceTensor],
        outputs: Mapping[str, DeviceTensor],
    ) -> ReferenceCall:
        return ReferenceCall(op_type, attributes, inputs, outputs)


class ReferenceCall:
    def __init__(self, op_type: str, attributes: Attributes, inputs: Any, outputs: Any) -> None:
        self.op_type, self.attributes, self.inputs, self.outputs = op_type, attributes, inputs, outputs

    def workspace_bytes(self) -> int:
        return 0

    def enqueue(self, *_: Any) -> None:
        given = {}
        for name, tensor in self.inputs.items():
            dtype = helper.tensor_dtype_to_np_dtype(tensor.dtype)
            given[name] = HostMemory.made[tensor.address].read().view(dtype).reshape(tensor.shape)
        results = OPS[self.op_type].reference(self.attributes, given)
        for name, tensor in self.outputs.items():
            if name not in results:
                assert 0 in tensor.shape, name  # there is no weight for it
                continue
            dtype = helper.tensor_dtype_to_np_dtype(tensor.dtype)
            HostMemory.made[tensor.address].write(results[name].astype(dtype))


class AnyStream:
    handle = 0


@pytest.fixture(autouse=True)
def _on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    HostMemory.made = []
    monkeypatch.setattr(case_data, "Memory", HostMemory)
    for name, value in {"INDEX_HEADS": 4, "TOP_K": 24}.items():
        monkeypatch.setattr(bench_cases, name, value)


SMALL = {
    "decoding": lambda: bench_cases.decoding("fp8", 2, 3, 128),
    "speculative decoding": lambda: bench_cases.decoding("bf16", 2, 4, 128, 2),
    "sparse decoding": lambda: bench_cases.sparse_decoding("fp8_ds_mla", 2, 4, keys=128),
    "sparse prefill": lambda: bench_cases.sparse_prefill(2, 6, 128),
    "prefill": lambda: bench_cases.prefill(2, 4, 2),
    "uneven decode": lambda: bench_cases.uneven_decoding("fp8", 3, [130, 1, 65], 2, "decode-fp8-b128-h128-4k"),
    "uneven prefill": lambda: bench_cases.uneven_prefill([5, 1, 3], 2, "prefill-b4-2k"),
    "index decode": lambda: bench_cases.indexer(2, 1, 128),
    "index prompt": lambda: bench_cases.indexer(1, 6, 128),
    "append": lambda: bench_cases.append("fp8", 2, 3, 4),
    "decode branch": lambda: bench_cases.composed(3, codes=True, heads=4),
    "projections": lambda: bench_cases.projections(3, indexer=False, columns=40, rank=24, heads=2),
    "projections, indexer": lambda: bench_cases.projections(3, indexer=True, columns=40, rank=24, heads=5),
    "projections, indexer, codes": lambda: bench_cases.projections(
        3, indexer=True, codes=True, columns=140, rank=24, heads=5
    ),
    "output projection": lambda: bench_cases.output_projection(3, heads=2, width=48),
    "attention of a layer": lambda: bench_cases.composed(3, 70, codes=False, heads=4),
}


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL.keys())
def test_a_token_is_checked_against_the_reference_of_that_token(make: Any) -> None:
    case = make()
    data = case_data.CaseData(ReferenceLibrary(), case, 0)  # type: ignore[arg-type]
    checker = Checker(case, data)
    tokens = range(checker.tokens)
    assert min(checker.error(token) for token in tokens) > 0.4  # nothing has run
    data.enqueue(AnyStream())  # type: ignore[arg-type]
    assert max(checker.error(token) for token in tokens) <= case.tolerance / 2
    for name in case.checked:  # and it is this token's part of the output that is looked at
        memory = data.memory[name]
        row = memory.size // len(tokens) if not name.startswith("kv_cache") else memory.size
        memory.content[-row:] = 0
        assert checker.error(tokens[-1]) > case.tolerance


def test_places_of_one_key_that_are_not_listed_are_one_error_and_other_keys_one_each() -> None:
    case = bench_cases.indexer(1, 1, 64 * (case_data.DISTINCT_PAGES + 3))  # the pool has three pages twice
    data = case_data.CaseData(ReferenceLibrary(), case, 0)  # type: ignore[arg-type]
    checker = Checker(case, data)
    data.enqueue(AnyStream())  # type: ignore[arg-type]
    assert checker.error(0) == 0
    given, _ = checker._one_token(0)
    rows = given["indexer_cache"].reshape(case_data.DISTINCT_PAGES + 3, -1)
    first, again = next((i, j) for j in range(len(rows)) for i in range(j) if np.array_equal(rows[i], rows[j]))
    assert checker._different_keys(given, {64 * first + 5, 64 * again + 5}) == 1
    assert checker._different_keys(given, {64 * first + 5, 64 * again + 6, 64 * first + 7}) == 3
    assert checker._different_keys(given, {-5, 64 * len(rows), 64 * first}) == 3  # two that there are not
    indices = data.memory["indices"]
    lists = indices.content.view(np.int32)
    unlisted = next(key for key in range(64 * len(rows)) if key not in lists)
    lists[0] = unlisted
    assert checker.error(0) == 1 / bench_cases.TOP_K


def test_every_case_can_be_made_and_moves_no_less_than_it_says() -> None:
    for name, make in bench_cases.CASES.items():
        if "128k" in name or "16k" in name or "32k" in name:
            continue  # as the shorter ones, and slow
        case = make()
        kinds = {name: case_data.kind_of(content) for name, content in case.inputs.items()}
        op = OPS[case.op_type]
        op.complete(case.attributes, name)
        assert {formal.name for formal in op.inputs if not formal.optional} <= set(kinds), name
        assert case.bytes > 0
        assert all(isinstance(dim, int) and dim > 0 for kind in kinds.values() for dim in kind.shape), name


def test_content_repeats_through_large_tensors() -> None:
    rng = np.random.default_rng(0)
    memory = case_data.filled(rng, bench_cases.Random((3, 700_001), TensorProto.FLOAT))
    values = memory.read().view(np.float32)
    np.testing.assert_array_equal(values[case_data.DISTINCT :], values[: len(values) - case_data.DISTINCT])
    assert 0.99 < values.std() < 1.01
    weights = case_data.filled(rng, bench_cases.Random((2, 512, 128), TensorProto.FLOAT8E4M3FN)).read()
    assert not (weights & 0x7F == 0x7F).any()  # no NaN


BUILD = "0.1.0 sm_90a"
COMMAND = "mla-trt bench kernels --cases decode"
CEILINGS = Ceilings("NVIDIA H200", 4.29e12, 7.5e14, None)
RESULTS = [
    Result("decode-a", 1e-3, 100.0, 0.01, 650.0, 2.7, 0.9, "FlashMLA", 110.0, 1.1, 120.0),
    Result("decode-b", 1e-3, 50.0, 0.01, 650.0, 2.7, 0.9, peer_note="flash_mla: No module named 'flash_mla'"),
    Result("decode-c", 0.5, note="wrong: error 5.0e-01 > 1e-02"),
]


def test_a_wrong_kernel_has_no_figure() -> None:
    rows = markdown(COMMAND, BUILD, CEILINGS, RESULTS).splitlines()
    assert rows[0] == f"    {COMMAND}"
    assert rows[2].startswith("NVIDIA H200: copy 4.29 TB/s, matrix product bf16 750 TFLOP/s, fp8 not measured.")
    assert rows[6] == "| decode-a | 100.0 | 1.0% | 650 | 2.70 | 90% | 1.0e-03 | FlashMLA | 110.0 | 1.10 | 120.0; 1.20 |"
    assert rows[7].endswith("| flash_mla: No module named 'flash_mla' |  |  |  |")
    assert rows[8].startswith("| decode-c | wrong: error 5.0e-01 > 1e-02 |")
    assert len({row.count("|") for row in rows[4:]}) == 1


def test_results_are_written(tmp_path: Any) -> None:
    write_results(tmp_path / "results", COMMAND, BUILD, CEILINGS, RESULTS)
    content = json.loads((tmp_path / "results" / "bench.json").read_text())
    assert content["command"] == COMMAND
    assert content["build"] == BUILD
    assert [result["ratio"] for result in content["results"]] == [1.1, None, None]
    assert (tmp_path / "results" / "bench.md").read_text() == markdown(COMMAND, BUILD, CEILINGS, RESULTS)


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["bench", "kernels", "--cases", "^(a|b)"], "mla-trt bench kernels --cases '^(a|b)'"),
        (["kernels", "-o", "results"], "python -m mla_trt.bench kernels -o results"),
    ],
)
def test_figures_have_the_command_that_made_them(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], command: str
) -> None:
    monkeypatch.setattr("sys.argv", ["program", *arguments])
    assert command_line() == command


def test_the_ratio_and_the_ceiling() -> None:
    case = bench_cases.Case("MlaDecoding", {}, {}, flops=7.5e14 * 1e-4, bytes=1.0)
    result = bench._result(
        "x", case, CEILINGS, 0.0, [200.0, 198.0, 230.0], "FlashMLA", [[300.0], [320.0, 310.0, 330.0]], ""
    )
    assert result.us == 200.0
    assert result.of_ceiling == pytest.approx(0.5)
    assert result.ratio == pytest.approx(1.5)
    assert result.planning_us == 320.0
    assert result.spread == pytest.approx(0.16)
    alone = bench._result("x", case, CEILINGS, 0.0, [200.0], "", [], "none")
    assert (alone.peer_us, alone.ratio, alone.planning_us) == (None, None, None)


def test_uneven_cases_are_compared_with_even_ones_by_their_share_of_the_ceiling() -> None:
    for name, make in bench_cases.CASES.items():
        if name.startswith("uneven"):
            assert make().neighbour in bench_cases.CASES, name
    case = bench_cases.Case("MlaDecoding", {}, {}, flops=7.5e14 * 1e-4, bytes=1.0)
    beside = object.__new__(bench._Beside)
    beside.name, beside.case = "even", replace(case, flops=2 * case.flops)
    result = bench._beside("x", case, beside, CEILINGS, 0.0, [200.0], [250.0])
    assert (result.peer, result.peer_us) == ("even", 250.0)
    assert result.ratio == pytest.approx(0.5 / 0.8)


class Build(ReferenceLibrary):
    """A build whose kernels take ``us``, and give zeros where it is ``broken``."""

    def __init__(self, us: float, *, broken: bool = False) -> None:
        self.us, self.broken = us, broken

    def call(self, *arguments: Any) -> ReferenceCall:
        call = super().call(*arguments)
        call.build = self  # type: ignore[attr-defined]
        return call


class TimedSets:
    """`bench._Ours` without a GPU."""

    def __init__(self, sets: Any) -> None:
        self.build = sets[0].call.build
        for data in sets:
            data.enqueue(AnyStream())
            if self.build.broken:
                data.memory["output"].fill(0)

    def time(self) -> float:
        return float(self.build.us)

    def close(self) -> None:
        pass


def test_a_build_is_measured_against_another_which_must_be_right_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_Ours", TimedSets)
    monkeypatch.setattr(bench, "_sets_of", lambda _: 1)
    monkeypatch.setattr(bench, "synchronize", lambda: None)
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    monkeypatch.setattr(bench, "CASES", {"small": SMALL["decoding"]})

    def measure(build: Build, other: Build) -> Result:
        return bench.bench_case("small", build, CEILINGS, against=("before.so", other))  # type: ignore[arg-type]

    result = measure(Build(10.0), Build(15.0))
    assert (result.us, result.peer, result.peer_us) == (10.0, "before.so", 15.0)
    assert result.ratio == pytest.approx(1.5)
    assert measure(Build(10.0, broken=True), Build(15.0)).note.startswith("wrong: error")
    wrong = measure(Build(10.0), Build(15.0, broken=True))
    assert (wrong.us, wrong.ratio) == (None, None)
    assert wrong.note.startswith("before.so is wrong: error")


def test_what_was_measured_is_written_when_the_rest_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(name: str, *rest: object) -> Result:
        if name == "append-bf16-4096":
            raise KeyboardInterrupt
        return replace(RESULTS[0], name=name)

    monkeypatch.setattr(bench, "check_usable", lambda: None)
    monkeypatch.setattr(bench, "find_library", lambda **_: SimpleNamespace(path=tmp_path))
    monkeypatch.setattr(bench, "KernelLibrary", lambda _: SimpleNamespace(build=BUILD))
    monkeypatch.setattr(bench, "measure_ceilings", lambda: CEILINGS)
    monkeypatch.setattr(bench, "bench_case", measure)
    assert main(["bench", "kernels", "--cases", "^append", "-o", str(tmp_path)]) == 130
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert [result["us"] for result in results] == [RESULTS[0].us, None]
    assert results[1]["note"] == "interrupted; the rest was not run"


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--list", "--cases", "^append"]) == 0
    assert capsys.readouterr().out.split() == [
        "append-bf16-128",
        "append-bf16-4096",
        "append-fp8-128",
        "append-fp8-4096",
    ]
    assert main(["bench", "kernels", "--cases", "nothing like it"]) == 2
    assert "--list shows them" in capsys.readouterr().err
    assert main(["bench", "kernels", "--cases", "("]) == 2
    assert "not a regular expression" in capsys.readouterr().err
    assert main(["bench", "layer", "--against", "before.so"]) == 2
    assert "--against is of kernels" in capsys.readouterr().err
