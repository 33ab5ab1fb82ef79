"""The engine loop: whatever runs together, every request gets the tokens that it gets alone, and no page is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import SPARSE, Config, interface, lowered, original
from tensorrt_stand_in import stand_in, with_known_axes

from mla_trt import models
from mla_trt.engines.engine import Engine
from mla_trt.engines.engine_onnxruntime import OnnxRuntimeEngine
from mla_trt.engines.engine_recorder import RecordingEngine
from mla_trt.errors import MlaTrtError, QueueFullError, UsageError
from mla_trt.loading import load_model
from mla_trt.lowering import LowerOptions, inspect
from mla_trt.pipeline import lower_file
from mla_trt.serving.loop import EngineLoop
from mla_trt.serving.request import Event, Request
from mla_trt.serving.sampling import Sampling
from mla_trt.session import Session
from mla_trt.verification.original import OriginalModel

CONFIG = Config()
PAGE = 4


@dataclass
class Result:
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None


class Results(dict[int, Result]):
    """Tokens and end of each request, from its events."""

    def add(self, events: list[Event]) -> None:
        for event in events:
            result = self.setdefault(event.request_id, Result())
            assert result.finish is None, "an event after the last one"
            result.tokens.extend(event.tokens)
            result.finish, result.error = event.finish, event.error


def finish(loop: EngineLoop, results: Results | None = None) -> Results:
    """Steps until nothing is left to do."""
    results = Results() if results is None else results
    for _ in range(5000):
        if loop.idle:
            return results
        results.add(loop.step())
    raise AssertionError("the loop does not come to an end")


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return lowered(CONFIG)


def alone_of(config: Config) -> Callable[[Request], list[int]]:
    """What the export itself says to a prompt, step by step with its own cache."""
    export = OriginalModel(original(config), interface(config))

    def alone(request: Request) -> list[int]:
        run = export.start()
        logits = run.feed(np.array(request.prompt)[None])["logits"]
        tokens: list[int] = []
        while True:
            tokens.append(int(logits[0, -1].argmax()))
            if len(tokens) == request.max_new_tokens or tokens[-1] in request.stop_ids:
                return tokens
            logits = run.feed(np.array([tokens[-1:]]))["logits"]

    return alone


@pytest.fixture(scope="module")
def alone() -> Callable[[Request], list[int]]:
    return alone_of(CONFIG)


def ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, CONFIG.vocabulary, length).tolist()


class Poisoner(RecordingEngine):
    """Before each step it fills every free page with NaN bits: whoever reads what is not theirs shows."""

    session: Session

    def run(self, inputs: Mapping[str, np.ndarray], page_copies: np.ndarray) -> dict[str, np.ndarray]:
        self.poison(self.session.free_pages)
        return super().run(inputs, page_copies)


def poisoned(engine: Engine) -> Session:
    poisoner = Poisoner(engine)
    poisoner.session = Session(poisoner)
    return poisoner.session


def random_requests(seed: int, count: int = 64) -> list[Request]:
    random = np.random.default_rng(seed)
    stems = [ids(12, 100 + stem) for stem in range(3)]
    requests = []
    for _ in range(count):
        stem = stems[random.integers(3)][: random.integers(13)] if random.random() < 0.7 else []
        prompt = [*stem, *random.integers(0, CONFIG.vocabulary, random.integers(1, 16)).tolist()]
        stop_ids = random.integers(0, CONFIG.vocabulary, random.integers(4)).tolist()
        requests.append(Request(prompt, int(random.integers(1, 16)), stop_ids, priority=int(random.integers(3))))
    return requests


@pytest.mark.parametrize(
    ("config", "tensorrt", "seed"),
    [
        (CONFIG, False, 1),
        (CONFIG, False, 2),
        (CONFIG, True, 3),
        (SPARSE, False, 4),
        (replace(CONFIG, sinks=True), False, 5),
    ],
    ids=["dense", "dense again", "engine's limits", "sparse", "sinks"],
)
def test_64_random_requests_get_what_each_gets_alone(config: Config, tensorrt: bool, seed: int) -> None:
    pages = 14
    small = with_known_axes(lowered(config))
    if tensorrt:
        engine, _ = stand_in(small, pages, max_batch=5, max_tokens=9, max_length=44)
        session, batch_limit, token_limit = Session(engine), 5, 9
    else:
        session, batch_limit, token_limit = poisoned(OnnxRuntimeEngine(small, pages=pages)), 7, 11
    loop = EngineLoop(session, max_batch=7, max_step_tokens=11, prefix_sources=4)
    random = np.random.default_rng(seed)
    requests = random_requests(seed)
    numbers: dict[int, Request] = {}
    cancelled = set()
    results = Results()
    while len(numbers) < len(requests) or not loop.idle:
        for request in requests[len(numbers) : len(numbers) + int(random.poisson(0.8))]:
            numbers[loop.submit(request)] = request
        if numbers and random.random() < 0.15:
            number = int(random.choice(list(numbers)))
            if loop.cancel(number):
                cancelled.add(number)
        results.add(loop.step())
        stats = loop.stats()
        assert stats.batch <= batch_limit
        assert stats.step_tokens <= token_limit
        assert stats.pages_in_use + stats.pages_free == pages
    alone = alone_of(config)
    for number, request in numbers.items():
        wanted, result = alone(request), results[number]
        if number in cancelled:
            assert result.finish == "cancelled"
            assert result.tokens == wanted[: len(result.tokens)]
        else:
            assert result.finish == ("stop" if wanted[-1] in request.stop_ids else "length")
            assert result.tokens == wanted
    assert len(cancelled) > 3
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    assert sum(stats.finished.values()) == 64
    loop.drop_prefixes()
    assert sorted(session.free_pages) == list(range(pages))
    assert session.sequences == ()


@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v3__dynamo_op20__eager__dec",
        "deepseek_v32__dynamo_op20__eager__dec",
        "minicpm3__ts_op17__eager__dec__post_onnxslim",
    ],
)
def test_lowered_exports_give_the_tokens_of_the_exports(name: str, tmp_path: Path) -> None:
    file = Path(models.__path__[0]) / "examples" / f"{name}.onnx"
    lower_file(
        file, tmp_path, LowerOptions(kv_format="f32", index_format="f32", page_size=PAGE, logits="last"), verify=False
    )
    session = Session(tmp_path / "model.onnx", pages=12)
    loop = EngineLoop(session, max_batch=5, max_step_tokens=9)
    requests = [Request([*ids(9)[: 4 * (seed % 3)], *ids(1 + seed, seed)], 6) for seed in range(10)]
    numbers = [loop.submit(request) for request in requests]
    results = finish(loop)
    loaded = load_model(file)
    export = OriginalModel(file, inspect(loaded.proto, loaded.base_dir).interface)
    for number, request in zip(numbers, requests, strict=True):
        run = export.start()
        logits = next(iter(run.feed(np.array(request.prompt)[None]).values()))
        wanted = [int(logits[0, -1].argmax())]
        while len(wanted) < request.max_new_tokens:
            wanted.append(int(next(iter(run.feed(np.array([wanted[-1:]])).values()))[0, -1].argmax()))
        assert results[number].tokens == wanted
    loop.drop_prefixes()
    assert len(session.free_pages) == 12


@pytest.mark.parametrize("logits", ["all", "last"])
def test_a_prompt_in_chunks_beside_decoding_gives_what_it_gives_whole(
    logits: str, alone: Callable[[Request], list[int]]
) -> None:
    loop = EngineLoop(Session(lowered(CONFIG, logits=logits), pages=30), max_batch=3, max_step_tokens=4)
    first, second = Request(ids(2), 20), Request(ids(30, 1), 6, priority=1)
    results = Results()
    one = loop.submit(first)
    results.add(loop.step())
    two = loop.submit(second)
    results.add(loop.step())
    assert loop.stats().step_tokens == 4
    assert len(results[one].tokens) == 2, "who decodes does not wait for a prompt"
    finish(loop, results)
    assert results[one].tokens == alone(first)
    assert results[two].tokens == alone(second)
    # The first step, then 10 chunks of 3 beside the first request, whose other tokens come with those of the second.
    assert loop.stats().steps == 20


def test_requests_join_and_leave_at_any_step(model: onnx.ModelProto) -> None:
    loop = EngineLoop(Session(model, pages=30), max_batch=2)
    short, long, waiting = (loop.submit(Request(ids(3, seed), count)) for seed, count in ((0, 2), (1, 5), (2, 3)))
    told = [{event.request_id: event.finish for event in loop.step()} for _ in range(5)]
    assert told == [
        {short: None, long: None},
        {short: "length", long: None},
        {long: None, waiting: None},
        {long: None, waiting: None},
        {long: "length", waiting: "length"},
    ]
    assert loop.idle
    assert loop.step() == []


def test_no_more_requests_run_than_the_engine_takes(model: onnx.ModelProto) -> None:
    engine, runner = stand_in(with_known_axes(model), 40, max_batch=2, max_tokens=8, max_length=16)
    loop = EngineLoop(Session(engine))
    for seed in range(4):
        loop.submit(Request(ids(3, seed), 6))
    assert {result.finish for result in finish(loop).values()} == {"length"}
    assert max(rows for _, _, rows, *_ in runner.steps) == 2
    narrow = EngineLoop(Session(model, pages=40), max_batch=8, max_step_tokens=2)
    for seed in range(4):
        narrow.submit(Request(ids(1, seed), 3))
    narrow.step()
    narrow.step()
    assert (narrow.stats().running, narrow.stats().waiting) == (2, 2)


def test_a_request_does_not_begin_without_room_for_its_next_token(model: onnx.ModelProto) -> None:
    loop = EngineLoop(Session(model, pages=5), prefix_sources=0)
    first, second = loop.submit(Request(ids(8), 3)), loop.submit(Request(ids(8, 1), 3))
    order = [event.request_id for _ in range(6) for event in loop.step()]
    assert order == [first] * 3 + [second] * 3
    assert loop.stats().preemptions == 0


def test_a_shared_prefix_is_computed_once(model: onnx.ModelProto, alone: Callable[[Request], list[int]]) -> None:
    session = Session(model, pages=30)
    loop = EngineLoop(session)
    stem = ids(4 * PAGE + 1)
    first, second = Request([*stem, 7], 12), Request([*stem, 9, 9], 5)
    one = loop.submit(first)
    results = Results()
    results.add(loop.step())
    before = loop.stats()
    two = loop.submit(second)  # shares with a request that runs
    results.add(loop.step())
    after = loop.stats()
    assert (after.prefix_hits, after.prefix_tokens) == (1, 16)
    assert after.computed_tokens - before.computed_tokens == 1 + 3
    finish(loop, results)
    third = Request([*stem, 7, *alone(first)[:4], 3], 4)  # goes on from what the first, which has ended, said
    three = loop.submit(third)
    finish(loop, results)
    assert loop.stats().prefix_tokens == 16 + 20
    assert [results[number].tokens for number in (one, two, three)] == [alone(first), alone(second), alone(third)]
    assert loop.stats().pages_cached == loop.stats().pages_in_use > 0
    loop.drop_prefixes()
    assert len(session.free_pages) == 30
    assert loop.stats().pages_cached == 0


def test_a_whole_prompt_that_is_cached_still_gives_its_first_token(
    model: onnx.ModelProto, alone: Callable[[Request], list[int]]
) -> None:
    loop = EngineLoop(Session(model, pages=30))
    request = Request(ids(2 * PAGE), 3)
    for hits in (0, 1, 2):
        number = loop.submit(request)
        assert finish(loop)[number].tokens == alone(request)
        assert loop.stats().prefix_hits == hits
    assert loop.stats().prefix_tokens == 2 * PAGE, "one token has to be computed, so only one page can be shared"


def test_few_sources_are_kept_and_give_way(model: onnx.ModelProto, alone: Callable[[Request], list[int]]) -> None:
    session = Session(model, pages=10)
    loop = EngineLoop(session, prefix_sources=2)
    requests = [Request(ids(9, seed), 2) for seed in range(3)]
    for request in requests:
        loop.submit(request)
        finish(loop)
    assert loop.stats().pages_cached == 2 * 2
    for request, hits in ((requests[0], 0), (requests[2], 1)):
        loop.submit(request)
        finish(loop)
        assert loop.stats().prefix_hits == hits
    for large in (Request(ids(20, 7), 20), Request(ids(36, 8), 4)):  # needs their pages when it grows, and to begin
        number = loop.submit(large)
        assert finish(loop)[number].tokens == alone(large)
    assert loop.stats().preemptions == 0
    nothing = EngineLoop(Session(model, pages=10), prefix_sources=0)
    nothing.submit(requests[0])
    finish(nothing)
    assert nothing.stats().pages_in_use == 0


def test_who_is_preempted_says_the_same_as_ever(model: onnx.ModelProto) -> None:
    requests = [Request(ids(6, seed), 14, sampling=Sampling(1.0, 20, 0.9, seed=seed)) for seed in range(4)]

    def tokens(pages: int) -> tuple[list[list[int]], int]:
        loop = EngineLoop(Session(model, pages=pages), prefix_sources=0)
        numbers = [loop.submit(request) for request in requests]
        results = finish(loop)
        return [results[number].tokens for number in numbers], loop.stats().preemptions

    plenty, none = tokens(40)
    scarce, some = tokens(9)
    assert (none, some > 0) == (0, True)
    assert scarce == plenty


def test_a_seed_gives_the_same_tokens_in_any_company(model: onnx.ModelProto) -> None:
    request = Request(ids(5), 10, sampling=Sampling(0.9, top_p=0.95, seed=11))
    streams = []
    for others in (0, 5):
        loop = EngineLoop(Session(model, pages=60))
        for seed in range(others):
            loop.submit(Request(ids(7, seed), 10, sampling=Sampling(1.0, seed=seed)))
        number = loop.submit(request)
        streams.append(finish(loop)[number].tokens)
    assert streams[0] == streams[1]
    loop.submit(replace(request, sampling=Sampling(0.9, top_p=0.95, seed=12)))
    assert next(iter(finish(loop).values())).tokens != streams[0]


def test_the_larger_priority_goes_first_then_arrival(model: onnx.ModelProto) -> None:
    loop = EngineLoop(Session(model, pages=30), max_batch=1)
    numbers = [loop.submit(Request(ids(3), 1, priority=priority)) for priority in (0, 1, 0, 2, 1)]
    order = [event.request_id for _ in numbers for event in loop.step()]
    assert order == [numbers[index] for index in (3, 1, 4, 0, 2)]


def test_a_larger_priority_displaces_a_smaller_one_and_equals_wait(
    model: onnx.ModelProto, alone: Callable[[Request], list[int]]
) -> None:
    loop = EngineLoop(Session(model, pages=8), max_batch=2)
    requests = [Request(ids(9, 1), 6, priority=1), Request(ids(8, 2), 6), Request(ids(8, 3), 3, priority=1)]
    numbers = [loop.submit(request) for request in requests[:2]]
    results = Results()
    results.add(loop.step())
    numbers.append(loop.submit(requests[2]))
    results.add(loop.step())
    assert [len(results[number].tokens) for number in numbers] == [2, 1, 1]
    assert loop.stats().preemptions == 1
    numbers.append(loop.submit(Request(ids(8, 4), 1, priority=1)))
    results.add(loop.step())
    assert numbers[3] not in results
    assert loop.stats().preemptions == 1
    finish(loop, results)
    for number, request in zip(numbers, requests, strict=False):
        assert results[number].tokens == alone(request)


def test_deadlines_end_what_waits_and_what_runs(model: onnx.ModelProto) -> None:
    now = 100.0
    session = Session(model, pages=30)
    loop = EngineLoop(session, max_batch=1, clock=lambda: now)
    running, waiting, patient = (loop.submit(Request(ids(3), 9, deadline=at)) for at in (103.0, 102.0, None))
    results = Results()
    results.add(loop.step())
    now = 102.5
    results.add(loop.step())
    assert (results[running].finish, results[waiting].finish) == (None, "deadline")
    assert results[waiting].tokens == []
    now = 103.0
    finish(loop, results)
    assert (results[running].finish, len(results[running].tokens)) == ("deadline", 2)
    assert results[patient].finish == "length"
    loop.drop_prefixes()
    assert len(session.free_pages) == 30


def test_cancelling_frees_pages_and_ends_only_once(model: onnx.ModelProto) -> None:
    session = Session(model, pages=30)
    loop = EngineLoop(session, max_batch=1)
    running, waiting = loop.submit(Request(ids(3), 50)), loop.submit(Request(ids(3), 50))
    results = Results()
    results.add(loop.step())
    assert session.free_count == 29
    assert loop.cancel(running)
    assert not loop.cancel(running)
    assert loop.cancel(waiting)
    assert not loop.cancel(77)
    results.add(loop.step())
    assert {result.finish for result in results.values()} == {"cancelled"}
    assert loop.idle
    assert session.free_count == 30
    assert not loop.cancel(running)


def test_a_full_queue_refuses_until_there_is_room(model: onnx.ModelProto) -> None:
    loop = EngineLoop(Session(model, pages=30), max_waiting=2)
    first = loop.submit(Request(ids(3), 2))
    loop.submit(Request(ids(3), 2))
    with pytest.raises(QueueFullError, match="2 requests wait already: try again later"):
        loop.submit(Request(ids(3), 2))
    loop.cancel(first)
    loop.submit(Request(ids(3), 2))
    loop.step()
    loop.submit(Request(ids(3), 2))
    assert [result.finish for result in finish(loop).values()].count("length") == 3


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 1), "the prompt is empty"),
        (Request([[1, 2]], 1), "must be a list of token ids"),
        (Request([1.5], 1), "must be a list of token ids"),
        (Request(["a"], 1), "must be a list of token ids"),
        (Request([[1], [2, 3]], 1), "must be a list of token ids"),
        (Request([2**70], 1), "must be a list of token ids"),
        (
            Request([0, CONFIG.vocabulary], 1),
            "token 50 of the prompt is not in the vocabulary; the model has ids 0 to 49",
        ),
        (Request([-1], 1), "token -1 of the prompt"),
        (Request([1], 0), "max_new_tokens is 0"),
        (
            Request([1] * 30, 12),
            "30 tokens of the prompt and 12 new ones need 41 positions, the pool of pages holds 40",
        ),
        (Request([1], 10**9), "the pool of pages holds 40"),
    ],
)
def test_bad_requests_are_refused_with_a_reason(model: onnx.ModelProto, request_: Request, message: str) -> None:
    loop = EngineLoop(Session(model, pages=10))
    with pytest.raises(UsageError, match=message):
        loop.submit(request_)
    assert loop.idle


def test_requests_may_be_as_long_as_everything_allows(model: onnx.ModelProto) -> None:
    pool = EngineLoop(Session(model, pages=4))
    assert len(finish(pool, Results())) == 0
    number = pool.submit(Request(ids(10), 7))  # the last token takes no place
    assert len(finish(pool)[number].tokens) == 7
    short = EngineLoop(Session(lowered(CONFIG, max_position=12), pages=9))
    short.submit(Request(ids(8), 5))
    with pytest.raises(UsageError, match="need 13 positions, the model has 12"):
        short.submit(Request(ids(8), 6))
    engine, _ = stand_in(with_known_axes(model), 40, max_batch=2, max_tokens=8, max_length=16)
    with pytest.raises(UsageError, match="need 17 positions, the engine takes 16"):
        EngineLoop(Session(engine)).submit(Request(ids(8), 10))


class Failing(RecordingEngine):
    """Fails in some of its steps."""

    steps = 0
    failures: Mapping[int, Exception]

    def run(self, inputs: Mapping[str, np.ndarray], page_copies: np.ndarray) -> dict[str, np.ndarray]:
        self.steps += 1
        if self.steps in self.failures:
            raise self.failures[self.steps]
        return super().run(inputs, page_copies)


@pytest.mark.parametrize(
    ("error", "message"),
    [(MlaTrtError("the GPU\nis gone"), "the GPU is gone"), (ValueError("odd"), "ValueError odd")],
)
def test_an_engine_error_ends_the_requests_of_its_step_only(
    model: onnx.ModelProto, alone: Callable[[Request], list[int]], error: Exception, message: str
) -> None:
    engine = Failing(OnnxRuntimeEngine(model, pages=30))
    engine.failures = {3: error}
    session = Session(engine)
    loop = EngineLoop(session, max_batch=2)
    requests = [Request(ids(9, seed), 6) for seed in range(4)]
    numbers = [loop.submit(request) for request in requests]
    results = finish(loop)
    for number in numbers[:2]:
        assert (results[number].finish, results[number].error) == ("error", message)
        assert len(results[number].tokens) == 2
    for number, request in zip(numbers[2:], requests[2:], strict=True):
        assert results[number].tokens == alone(request)
    assert loop.stats().finished == {"error": 2, "length": 2}
    loop.drop_prefixes()
    assert len(session.free_pages) == 30


def test_logits_that_are_not_finite_end_their_request_only(model: onnx.ModelProto) -> None:
    class Broken(RecordingEngine):
        def run(self, inputs: Mapping[str, np.ndarray], page_copies: np.ndarray) -> dict[str, np.ndarray]:
            found = super().run(inputs, page_copies)
            logits = found["logits"].copy()
            logits[:, np.asarray(inputs["input_ids"])[0] == 49] = np.nan
            return found | {"logits": logits}

    session = Session(Broken(OnnxRuntimeEngine(model, pages=30)))
    loop = EngineLoop(session)
    good, bad = loop.submit(Request([1, 2], 1)), loop.submit(Request([1, 49], 1))
    results = finish(loop)
    assert (results[good].finish, results[bad].finish) == ("length", "error")
    assert "not finite" in str(results[bad].error)
    assert len(session.free_pages) == 30


def test_aborting_ends_everything_with_an_error(model: onnx.ModelProto) -> None:
    session = Session(model, pages=30)
    loop = EngineLoop(session, max_batch=1)
    for seed in range(3):
        loop.submit(Request(ids(9, seed), 9))
    loop.step()
    loop.abort("shutting down")
    assert [(event.finish, event.error) for event in loop.step()] == [("error", "shutting down")] * 3
    assert loop.idle
    assert len(session.free_pages) == 30


def weighted_sums() -> onnx.ModelProto:
    """A model of [B, S] tokens whose state is the sum of all tokens, each times its position counted from 1; the next token
    is that sum modulo 47."""
    model = onnx.parser.parse_model(
        """<ir_version: 11, opset_import: ["" : 26]>
        sums (int64[B, S] ids, int32[offsets] query_offsets, int32[B] cache_lengths, int32[B, columns] block_table,
              float[B, T] mask, float[B, 1] past)
            => (float[B, S, V] logits, float[B, 1] present) {
            values = Cast<to: int = 1>(ids)
            one = Constant<value: tensor = int64[1] {1}>()
            unit = Constant<value: tensor = float[1] {1.0}>()
            last = Constant<value: tensor = int64[1] {-1}>()
            ones = CastLike(ids, unit)
            none = Sub(ones, ones)
            all_ones = Add(none, unit)
            axis = Constant<value: tensor = int64 {1}>()
            counted = CumSum(all_ones, axis)
            lengths = Cast<to: int = 1>(cache_lengths)
            before = Unsqueeze(lengths, one)
            positions = Add(counted, before)
            terms = Mul(values, positions)
            sums = CumSum(terms, axis)
            totals = Add(sums, past)
            whole = Cast<to: int = 7>(totals)
            size = Constant<value: tensor = int64[1] {47}>()
            next = Mod(whole, size)
            depth = Constant<value: tensor = int64 {50}>()
            off_on = Constant<value: tensor = float[2] {0.0, 1.0}>()
            logits = OneHot(next, depth, off_on)
            count = Shape(ids)
            length = Slice(count, one, end)
            from = Sub(length, one)
            present = Gather<axis: int = 1>(totals, from)
            end = Constant<value: tensor = int64[1] {2}>()
        }"""
    )
    end = next(node for node in model.graph.node if node.output[0] == "end")
    model.graph.node.remove(end)
    model.graph.node.insert(0, end)
    facts = {
        "version": 1,
        "token_input": "ids",
        "token_axes": ["B", "S"],
        "logits": "all",
        "page_size": PAGE,
        "row_format": "f32",
        "index_format": "f32",
        "vocabulary": 50,
        "caches": [],
        "side_inputs": [
            {"name": "mask", "role": "attention_mask", "dtype": 1, "axes": ["B", "T"]},
            {"name": "past", "role": "state", "dtype": 1, "axes": ["B", 1], "output": "present"},
        ],
    }
    onnx.helper.set_model_props(model, {"mla_trt": json.dumps(facts)})
    return model


def test_a_recurrent_model_runs_equal_lengths_together_and_the_others_in_turn() -> None:
    def says(request: Request) -> list[int]:
        tokens = list(request.prompt)
        for _ in range(request.max_new_tokens):
            tokens.append(sum(token * (index + 1) for index, token in enumerate(tokens)) % 47)
        return tokens[len(request.prompt) :]

    session = Session(weighted_sums(), pages=12)
    loop = EngineLoop(session, max_batch=6, max_step_tokens=10)
    requests = [Request(ids(length, seed), 8) for seed, length in enumerate((5, 5, 5, 17, 2, 9, 9, 1, 5, 5))]
    numbers = [loop.submit(request) for request in requests]
    results, batches = Results(), []
    while not loop.idle:
        results.add(loop.step())
        batches.append(loop.stats().batch)
        assert loop.stats().step_tokens <= 10
    for number, request in zip(numbers, requests, strict=True):
        assert results[number].tokens == says(request)
    assert max(batches) >= 2
    assert loop.stats().preemptions > 0
    assert loop.stats().prefix_hits == 0
    assert len(session.free_pages) == 12


def test_models_that_the_loop_cannot_serve_are_refused(model: onnx.ModelProto) -> None:
    for name in ("max_batch", "max_step_tokens", "max_waiting"):
        with pytest.raises(UsageError, match=f"{name} is 0"):
            EngineLoop(Session(model, pages=4), **{name: 0})
    session = Session(model, pages=4)
    session.create()
    with pytest.raises(UsageError, match="has sequences already"):
        EngineLoop(session)
    embeddings = RecordingEngine(OnnxRuntimeEngine(model, pages=4))
    embeddings.token_features, embeddings.token_dtype = (24,), np.dtype(np.float32)
    with pytest.raises(UsageError, match="takes no token ids"):
        EngineLoop(Session(embeddings))
    tables = weighted_sums()
    facts = json.loads(tables.metadata_props[0].value)
    facts["side_inputs"][0]["role"] = "rope_cos"
    tables.metadata_props[0].value = json.dumps(facts)
    with pytest.raises(UsageError, match="also needs the inputs mask, which no request can give"):
        EngineLoop(Session(tables, pages=4))


def test_statistics_follow_the_clock(model: onnx.ModelProto) -> None:
    now = 0.0
    loop = EngineLoop(Session(model, pages=30), clock=lambda: now)
    assert loop.stats().tokens_per_second == 0
    loop.submit(Request(ids(3), 20))
    loop.submit(Request(ids(3), 20))
    for _ in range(20):
        loop.step()
        now += 0.5
    stats = loop.stats()
    assert (stats.tokens, stats.steps, stats.running, stats.waiting) == (40, 20, 0, 0)
    assert stats.tokens_per_second == 4
    now += 60
    assert loop.stats().tokens_per_second == 0
