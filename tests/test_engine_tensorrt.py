"""The engine over TensorRT as far as a CPU can see: profiles, padding, limits, what belongs to what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import SPARSE, Config, lowered
from tensorrt_stand_in import describe, stand_in, with_known_axes, write_engine

from mla_trt.cuda import Gpu, NoGpuError, find_gpu
from mla_trt.engines.engine_file import (
    CACHES,
    IO,
    RESIDENT,
    EngineTensor,
    Range,
    description_path,
    is_engine,
    read_description,
)
from mla_trt.engines.engine_onnxruntime import OnnxRuntimeEngine
from mla_trt.engines.engine_tensorrt import TensorRtEngine, pool_pages
from mla_trt.engines.opening import open_engine
from mla_trt.engines.profiles import (
    at_least,
    bucket,
    bucketed,
    input_range,
    make_profiles,
    pad,
    plan_profiles,
    read_sizes,
)
from mla_trt.engines.tensorrt_api import Messages, check_fits, check_plugins, serves
from mla_trt.errors import BadModelError, MlaTrtError, UsageError
from mla_trt.generation import generate
from mla_trt.plugins.library import Library
from mla_trt.session import Session
from mla_trt.verification.cases import FORKED, TOGETHER, Case, run_step

CONFIG = Config()
H200 = Gpu("NVIDIA H200", "9.0", 141 << 30)
PAGES = 40


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return with_known_axes(lowered(CONFIG))


def play(session: Session, model: onnx.ModelProto, case: Case) -> list[Mapping[int, Mapping[str, np.ndarray]]]:
    """The results of each step of a case."""
    random = np.random.default_rng(1)
    numbers: dict[str, int] = {}
    found = []
    for step, spans in case.spans():
        for child, parent in step.forked:
            numbers[child] = session.fork(numbers[parent])
        for name in step.freed:
            session.free(numbers.pop(name))
        for name in spans:
            if name not in numbers:
                numbers[name] = session.create()
        batch = {
            numbers[name]: random.integers(0, CONFIG.vocabulary, end - start) for name, (start, end) in spans.items()
        }
        found.append(run_step(session, model, step, batch, spans))
    return found


@pytest.mark.parametrize("case", [TOGETHER, FORKED], ids=["ragged", "forked"])
@pytest.mark.parametrize("page_copies", [False, True], ids=["copied outside", "copied inside"])
@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize("config", [CONFIG, SPARSE], ids=["dense", "sparse"])
def test_padded_steps_give_what_plain_ones_give(config: Config, logits: str, page_copies: bool, case: Case) -> None:
    small = with_known_axes(lowered(config, page_copies=page_copies, logits=logits))
    if logits == "last":
        small.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "B"
    engine, runner = stand_in(small, PAGES, max_batch=6, max_tokens=40, max_length=64)
    expected = play(Session(OnnxRuntimeEngine(small, pages=PAGES)), small, case)
    actual = play(Session(engine), small, case)
    for wanted, given in zip(expected, actual, strict=True):
        assert wanted.keys() == given.keys()
        for sequence, results in wanted.items():
            np.testing.assert_allclose(given[sequence]["logits"], results["logits"], atol=2e-5)
    assert any(recurring for *_, recurring in runner.steps)
    assert (runner.copied != []) == (case is FORKED and not page_copies)


def test_decoding_steps_recur_in_few_sizes(model: onnx.ModelProto) -> None:
    engine, runner = stand_in(model, PAGES, max_batch=8, max_tokens=64, max_length=64)
    session = Session(engine)
    sequences = [session.prefill([1, 2, 3])[0] for _ in range(6)]
    runner.steps.clear()
    for count in (6, 5, 3, 5, 1):
        for _ in range(3):
            session.decode(dict.fromkeys(sequences[:count], 7))
    sizes = {(shape, rows) for _, shape, rows, _, _ in runner.steps}
    assert sizes == {((1, 8), 8), ((1, 4), 4), ((1, 1), 1)}
    assert {columns for _, _, _, columns, _ in runner.steps} <= {1, 2, 4, 8}
    assert all(recurring for *_, recurring in runner.steps)
    session.step({sequences[0]: [7, 8], sequences[1]: [7]})
    assert not runner.steps[-1][-1]
    session.step({sequences[0]: [7, 8], sequences[1]: [7, 8]})
    assert runner.steps[-1][-1]


def test_copied_pages_make_no_sizes_of_their_own() -> None:
    engine, runner = stand_in(
        with_known_axes(lowered(CONFIG, page_copies=True)), PAGES, max_batch=4, max_tokens=64, max_length=64
    )
    session = Session(engine)
    parent, _ = session.prefill([1, 2, 3])
    children = [session.fork(parent) for _ in range(3)]
    runner.shapes.clear()
    for several in (children[:1], children[1:], children):  # who writes to a shared page copies it: one, two, none
        session.decode(dict.fromkeys(several, 7))
    assert {shapes["page_copies"] for shapes in runner.shapes} == {(4, 2)}


def test_a_long_prompt_takes_the_prefill_profile_as_it_is(model: onnx.ModelProto) -> None:
    engine, runner = stand_in(model, PAGES, max_batch=4, max_tokens=64, max_length=64)
    Session(engine).prefill(list(range(1, 31)))
    assert runner.steps == [("prefill", (1, 30), 1, 8, False)]


def test_generation_gives_an_engine_no_more_than_it_takes(model: onnx.ModelProto) -> None:
    engine, runner = stand_in(model, PAGES, max_batch=4, max_tokens=5, max_length=64)
    prompt = list(range(1, 14))
    found = list(generate(Session(engine), [prompt], max_new_tokens=3))
    assert found == list(generate(Session(model, pages=PAGES), [prompt], max_new_tokens=3))
    assert max(shape[1] for _, shape, *_ in runner.steps) == 5


def test_a_step_without_sequences_is_padded_to_one(model: onnx.ModelProto) -> None:
    engine, runner = stand_in(model, PAGES, max_batch=4)
    assert Session(engine).step({}, pad_tokens=3) == {}
    assert runner.steps[0][2] == 1


@pytest.mark.parametrize(
    ("limits", "batch", "message"),
    [
        ({"max_tokens": 8}, [9], "the step has 9 tokens, the engine takes 8: .* --max-tokens"),
        ({"max_batch": 2}, [1, 1, 1], "the step has 3 sequences, the engine takes 2: .* --max-batch"),
        ({"max_length": 8}, [9], "the step has 3 pages of a sequence, the engine takes 2: .* --max-length"),
    ],
)
def test_a_step_beyond_the_engine_is_refused_and_changes_nothing(
    model: onnx.ModelProto, limits: dict[str, int], batch: list[int], message: str
) -> None:
    engine, runner = stand_in(model, PAGES, **{"max_batch": 4, "max_tokens": 64, **limits})
    session = Session(engine)
    sequences = [session.create() for _ in batch]
    with pytest.raises(UsageError, match=message):
        session.step({sequence: [1] * count for sequence, count in zip(sequences, batch, strict=True)})
    assert runner.steps == []
    assert [session.length(sequence) for sequence in sequences] == [0] * len(batch)
    assert len(session.free_pages) == PAGES


def test_a_missing_or_misshapen_input_is_named(model: onnx.ModelProto) -> None:
    engine, _ = stand_in(model, PAGES)
    with pytest.raises(MlaTrtError, match="also needs the inputs block_table, cache_lengths"):
        engine.run({"input_ids": np.ones((1, 1), np.int64), "query_offsets": np.zeros(2, np.int32)}, no_copies())
    inputs = {
        "input_ids": np.ones((2, 3), np.int64),
        "query_offsets": np.zeros(2, np.int32),
        "cache_lengths": np.zeros(1, np.int32),
        "block_table": np.zeros((1, 1), np.int32),
    }
    with pytest.raises(UsageError, match=r"'input_ids' is \[2, 3\], must be \[1, T = 3\]"):
        engine.run(inputs, no_copies())
    with pytest.raises(UsageError, match=r"'block_table' is \[2, 1\], must be \[B = 1, "):
        engine.run(
            inputs | {"input_ids": np.ones((1, 3), np.int64), "block_table": np.zeros((2, 1), np.int32)}, no_copies()
        )


def no_copies() -> np.ndarray:
    return np.zeros((0, 2), np.int32)


def test_buckets_hold_every_size_and_are_few() -> None:
    sizes = [bucket(size, 128) for size in range(1, 129)]
    assert all(found >= size for size, found in enumerate(sizes, 1))
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]
    assert bucket(100, 100) == 100
    assert bucket(90, 90) == 90


def test_a_step_of_several_tokens_each_keeps_its_number_of_tokens_each() -> None:
    ranges = make_profiles(describe(with_known_axes(lowered(CONFIG))).metadata, max_batch=16, max_tokens=256)["decode"]
    sizes = {"T": 15, "B": 5, "B + 1": 6, "max_pages": 3}
    assert bucketed(sizes, ranges) == {"T": 24, "B": 8, "B + 1": 9, "max_pages": 4}


def test_padding_means_nothing_by_contract() -> None:
    sizes = {"T": 5, "B": 3, "B + 1": 4, "max_pages": 2, "copies": 2}
    offsets = pad(EngineTensor("query_offsets", 6, ("B + 1",)), np.array([0, 2, 3]), sizes)
    assert offsets.tolist() == [0, 2, 3, 3]
    table = pad(EngineTensor("block_table", 6, ("B", "max_pages")), np.array([[4], [5]]), sizes)
    assert table.tolist() == [[4, -1], [5, -1], [-1, -1]]
    copies = pad(EngineTensor("page_copies", 6, ("copies", 2)), np.array([[1, 2]]), sizes)
    assert copies.tolist() == [[1, 2], [-1, -1]]
    tokens = pad(EngineTensor("input_ids", 7, (1, "T")), np.array([[1, 2, 3]]), sizes)
    assert tokens.tolist() == [[1, 2, 3, 0, 0]]
    assert at_least({"B": 0, "B + 1": 1}, {"B": Range(1, 1, 4), "B + 1": Range(2, 2, 5)}) == {"B": 1, "B + 1": 2}


def test_profiles_follow_the_model_and_the_options(model: onnx.ModelProto) -> None:
    metadata = describe(model).metadata
    positions = replace(metadata, max_position=50)
    assert make_profiles(positions)["prefill"]["max_pages"] == Range(1, 13, 13)
    assert make_profiles(metadata, pages=9)["decode"]["pages"] == Range(9, 9, 9)
    most = make_profiles(metadata)["decode"]["pages"].most
    assert most * max(cache.page_words for cache in metadata.caches) < 2**31
    assert make_profiles(metadata, max_batch=4, max_tokens=20)["decode"]["T"] == Range(1, 4, 20)
    for limits, message in (
        ({"max_batch": 0}, "--max-batch is 0"),
        ({"max_batch": 9, "max_tokens": 8}, "--max-tokens is 8"),
        ({"pages": 2**31}, "--pages is"),
    ):
        with pytest.raises(UsageError, match=message):
            make_profiles(metadata, **limits)
    with pytest.raises(UsageError, match="the model has 50 positions"):
        make_profiles(positions, max_length=51)
    shapes = input_range(EngineTensor("kv_cache.0", 6, ("pages", 48)), make_profiles(metadata, pages=9)["decode"])
    assert shapes == ([9, 48], [9, 48], [9, 48])


def test_profiles_of_a_model_that_was_exported_for_one_at_a_time(model: onnx.ModelProto) -> None:
    metadata = describe(model).metadata
    one_sequence = replace(metadata, token_axes=("1", "S"))
    for profile in make_profiles(one_sequence, max_tokens=20).values():
        assert (profile["B"].most, profile["B + 1"].most) == (1, 2)
    with pytest.raises(UsageError, match="--max-batch is 2: the model was exported for one sequence at a time"):
        make_profiles(one_sequence, max_batch=2)
    for profile in make_profiles(replace(metadata, token_axes=("B", "1")), max_batch=4).values():
        assert (profile["S"], profile["B"].most) == (Range(1, 1, 1), 4)


def test_a_plan_that_holds_its_pages_has_one_profile_for_every_step(model: onnx.ModelProto) -> None:
    profiles = make_profiles(describe(model).metadata, max_batch=4, max_tokens=20, max_length=64, pages=9)
    assert plan_profiles(profiles, IO) == [profiles["decode"], profiles["prefill"]]
    (found,) = plan_profiles(profiles, RESIDENT)
    for ranges in profiles.values():
        for axis, size in ranges.items():
            assert found[axis].least <= size.least
            assert found[axis].most >= size.most
    assert found["T"] == Range(1, 4, 20)


def test_sizes_are_read_from_all_inputs() -> None:
    tensors = [EngineTensor("a", 6, ("B",)), EngineTensor("b", 6, ("B", "T", 3))]
    assert read_sizes(tensors, {"a": np.zeros(2), "b": np.zeros((2, 5, 3))}) == {"B": 2, "T": 5}


@pytest.mark.parametrize("cache", CACHES)
def test_a_description_comes_back_as_it_was(model: onnx.ModelProto, tmp_path: Path, cache: str) -> None:
    description = describe(model, cache)
    path = write_engine(tmp_path, description, model)
    found = read_description(path)
    assert replace(found, plan_bytes=0, plan_digest="") == description
    assert is_engine(path)
    assert not is_engine(tmp_path)


def test_engines_say_which_weights_are_codes(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = write_engine(tmp_path, replace(describe(model), weights="fp8"), model)
    assert read_description(path).weights == "fp8"
    data = json.loads(description_path(path).read_text())
    del data["weights"]  # as before there were any
    description_path(path).write_text(json.dumps(data))
    assert read_description(path).weights == "keep"


def test_files_that_do_not_belong_together_are_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = write_engine(tmp_path, describe(model), model)
    path.write_bytes(b"plam")
    with pytest.raises(BadModelError, match="is not the plan that"):
        read_description(path)
    text = description_path(path).read_text()
    description_path(path).write_text(text[:-40])
    with pytest.raises(BadModelError, match="cannot be read"):
        read_description(path)
    description_path(path).write_text(text.replace('"version": 2', '"version": 7', 1))
    with pytest.raises(BadModelError, match="has version 7"):
        read_description(path)
    description_path(path).unlink()
    with pytest.raises(BadModelError, match="an engine is two files"):
        read_description(path)


def test_the_number_of_pages_is_what_the_engine_takes(model: onnx.ModelProto) -> None:
    fixed = describe(model, pages=12)
    assert pool_pages(fixed, None) == 12
    with pytest.raises(UsageError, match="exactly 12 pages, not 13"):
        pool_pages(fixed, 13)
    assert pool_pages(describe(model), 1000) == 1000


def test_an_engine_for_other_parts_is_refused() -> None:
    built = ("10.6.0", "9.0", "NVIDIA H200", "0.1.0 sm_90a")
    check_fits(*built, version="10.6.0", gpu=H200, loaded="0.1.0 sm_80")
    with pytest.raises(BadModelError, match=r"built with TensorRT 10\.6\.0, and this is 10\.7\.0"):
        check_fits(*built, version="10.7.0", gpu=H200, loaded="0.1.0")
    with pytest.raises(
        BadModelError, match=r"compute capability 9\.0 \(NVIDIA H200\), and this GPU is a NVIDIA L4 of 8\.9"
    ):
        check_fits(*built, version="10.6.0", gpu=Gpu("NVIDIA L4", "8.9", 1), loaded="0.1.0")
    with pytest.raises(BadModelError, match=r"plugins of version 0\.1\.0, and the plugin library is of 0\.2\.0"):
        check_fits(*built, version="10.6.0", gpu=H200, loaded="0.2.0 sm_90a")


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("sm_80", "8.0", True),
        ("sm_80", "8.9", True),
        ("sm_80", "9.0", True),
        ("sm_90", "8.9", False),
        ("sm_90a", "9.0", True),
        ("sm_90a", "10.0", False),
        ("sm_100f", "10.3", True),
        ("sm_100f", "12.0", False),
    ],
)
def test_machine_code_and_gpus(architecture: str, capability: str, runs: bool) -> None:
    assert serves(architecture, capability) == runs


def test_a_plugin_library_for_other_parts_is_refused() -> None:
    library = Library(Path("p.so"), "0.1.0", ("sm_90a",), 10)
    check_plugins(library, H200, "10.6.0")
    with pytest.raises(MlaTrtError, match=r"built for TensorRT 10, and this is TensorRT 11\.1\.0"):
        check_plugins(library, H200, "11.1.0")
    with pytest.raises(MlaTrtError, match=r"--arch 89"):
        check_plugins(library, Gpu("NVIDIA L4", "8.9", 1), "10.6.0")
    with pytest.raises(MlaTrtError, match="built without TensorRT"):
        check_plugins(replace(library, tensorrt=None), H200, "10.6.0")


def test_messages_become_one_line() -> None:
    messages = Messages()
    messages.add(40, "first\nline")
    messages.add(40, "second")
    messages.add(40, "second")
    messages.add(20, "only information")
    assert messages.take() == "first line; second"
    assert messages.take() == "TensorRT gave no reason"


def has_gpu() -> bool:
    try:
        find_gpu()
    except NoGpuError:
        return False
    return True


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_driver_an_engine_says_so(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = write_engine(tmp_path, describe(model), model)
    with pytest.raises(MlaTrtError, match="no NVIDIA driver on this machine"):
        open_engine(path)
    with pytest.raises(MlaTrtError, match="no NVIDIA driver on this machine"):
        TensorRtEngine.open(path)


def test_a_path_that_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModelError, match="does not exist: give the folder that 'mla-trt lower' wrote, or the file"):
        open_engine(tmp_path / "nowhere")
    (tmp_path / "model.engine").write_bytes(b"plan")
    with pytest.raises(BadModelError, match=r"no \.onnx file, and there is no .*model\.engine\.json"):
        open_engine(tmp_path / "model.engine")
