"""Sessions: batches, forks, truncation and shortage of pages give what each sequence gives alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import SPARSE, Config, interface, lowered, original

from mla_trt.engines.engine_onnxruntime import OnnxRuntimeEngine
from mla_trt.errors import BadModelError, MlaTrtError, OutOfPagesError, UsageError
from mla_trt.generation import generate
from mla_trt.session import Session
from mla_trt.verification.original import OriginalModel

CONFIG = Config()
CLOSE = 2e-5


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return lowered(CONFIG)


@pytest.fixture(scope="module")
def expected() -> Callable[[np.ndarray], np.ndarray]:
    export = OriginalModel(original(CONFIG), interface(CONFIG))
    return lambda tokens: export.start().feed(np.asarray(tokens)[None])["logits"][0]


def random_tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocabulary, length)


def assert_close(actual: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(actual, wanted, atol=CLOSE * np.abs(wanted).max())


@pytest.mark.parametrize(
    "config", [CONFIG, Config(sinks=True, interleaved=False), SPARSE], ids=["dense", "sinks", "sparse"]
)
@pytest.mark.parametrize("page_size", [1, 4, 64])
def test_a_session_gives_what_the_export_gives(config: Config, page_size: int) -> None:
    tokens = random_tokens(23)
    wanted = OriginalModel(original(config), interface(config)).start().feed(tokens[None])["logits"][0]
    session = Session(lowered(config, page_size=page_size), pages=40)
    sequence, logits = session.prefill(tokens[:9])
    assert_close(logits, wanted[8])
    for position in range(9, 14):
        assert_close(session.decode({sequence: tokens[position]})[sequence], wanted[position])
    assert_close(session.step({sequence: tokens[14:]})[sequence]["logits"], wanted[14:])
    assert session.length(sequence) == 23


def test_a_ragged_batch_with_padding_gives_what_each_sequence_gives_alone(
    model: onnx.ModelProto, expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    session = Session(model, pages=20)
    first, second, third = (session.create() for _ in range(3))
    tokens = {sequence: random_tokens(12, seed=sequence) for sequence in (first, second, third)}
    session.step({first: tokens[first][:5], second: tokens[second][:3]})
    results = session.step(
        {third: tokens[third][:7], second: tokens[second][3:4], first: []},
        pad_tokens=3,
        pad_sequences=2,
        pad_columns=2,
        unassigned=(-1, 20, 2**31 - 1),
    )
    assert results[first]["logits"].shape == (0, CONFIG.vocabulary)
    assert_close(results[third]["logits"], expected(tokens[third][:7]))
    assert_close(results[second]["logits"], expected(tokens[second][:4])[3:])
    results = session.step({second: tokens[second][4:], first: tokens[first][5:]})
    assert_close(results[first]["logits"], expected(tokens[first])[5:])
    assert_close(results[second]["logits"], expected(tokens[second])[4:])


@pytest.mark.parametrize("page_copies", [False, True], ids=["engine copies", "model copies"])
def test_forks_share_pages_and_go_their_own_ways(
    page_copies: bool, expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    session = Session(lowered(CONFIG, page_copies=page_copies), pages=8)
    prompt, left, right = random_tokens(10), random_tokens(3, 1), random_tokens(3, 2)
    parent, _ = session.prefill(prompt)
    free = len(session.free_pages)
    child = session.fork(parent)
    assert len(session.free_pages) == free
    results = session.step({parent: left, child: right})
    assert_close(results[parent]["logits"], expected(np.concatenate([prompt, left]))[10:])
    assert_close(results[child]["logits"], expected(np.concatenate([prompt, right]))[10:])
    # Three pages of ten tokens, of which the first two stay shared; both sequences fill two of their own.
    assert len(session.free_pages) == 8 - 2 - 2 * 2
    session.free(parent)
    session.truncate(child, 10)
    assert_close(session.decode({child: left[0]})[child], expected(np.append(prompt, left[0]))[-1])
    session.free(child)
    assert len(session.free_pages) == 8


def test_pages_of_ended_sequences_serve_others(
    model: onnx.ModelProto, expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    session = Session(model, pages=4)
    for seed in range(3):
        tokens = random_tokens(15, seed)
        sequence, logits = session.prefill(tokens)
        assert_close(logits, expected(tokens)[-1])
        session.free(sequence)


def test_without_room_every_sequence_stays_whole(
    model: onnx.ModelProto, expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    session = Session(model, pages=4)
    tokens = random_tokens(13)
    first, _ = session.prefill(tokens[:6])
    second, _ = session.prefill(tokens[:7])
    with pytest.raises(OutOfPagesError, match="2 more pages of 4 tokens, and 0 of 4 are free"):
        session.step({first: tokens[6:9], second: tokens[7:9]})
    with pytest.raises(OutOfPagesError):
        session.prefill(tokens)
    assert session.sequences == (first, second)
    session.free(first)
    assert_close(session.step({second: tokens[7:13]})[second]["logits"], expected(tokens)[7:])


def test_a_failed_step_leaves_every_sequence_whole(
    model: onnx.ModelProto, expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    session = Session(model, pages=8)
    tokens = random_tokens(9)
    sequence, _ = session.prefill(tokens[:6])
    with pytest.raises(MlaTrtError, match="ONNX Runtime cannot run the step"):
        session.step({sequence: tokens[6:]}, extra_inputs={"cache_lengths": np.zeros((2, 2), np.int32)})
    assert session.length(sequence) == 6
    assert_close(session.step({sequence: tokens[6:]})[sequence]["logits"], expected(tokens)[6:])


def test_logits_of_last_tokens_only_have_one_row_a_sequence(expected: Callable[[np.ndarray], np.ndarray]) -> None:
    session = Session(lowered(CONFIG, logits="last"), pages=20)
    sequences = [session.create() for _ in range(3)]
    tokens = [random_tokens(length, length) for length in (4, 1, 6)]
    results = session.step(dict(zip(sequences, tokens, strict=True)), pad_sequences=1, pad_tokens=2)
    for sequence, chunk in zip(sequences, tokens, strict=True):
        assert results[sequence]["logits"].shape == (1, CONFIG.vocabulary)
        assert_close(results[sequence]["logits"][0], expected(chunk)[-1])


def test_misuse_gets_one_line_that_says_what_is_wrong(model: onnx.ModelProto) -> None:
    session = Session(lowered(CONFIG, max_position=12), pages=8)
    sequence, _ = session.prefill(random_tokens(10))
    with pytest.raises(UsageError, match="would have 13 tokens, the model takes 12"):
        session.step({sequence: [1, 2, 3]})
    with pytest.raises(UsageError, match="there is no sequence 7"):
        session.decode({7: 1})
    with pytest.raises(UsageError, match=r"token 50 of sequence 0 is not in the vocabulary; the model has ids 0 to 49"):
        session.decode({sequence: 50})
    with pytest.raises(UsageError, match="token -1 of sequence 0"):
        session.decode({sequence: -1})
    with pytest.raises(UsageError, match="must be integers, not float64"):
        session.decode({sequence: 1.5})
    with pytest.raises(UsageError, match=r"must be \[n\], not \[1, 2\]"):
        session.step({sequence: [[1, 2]]})
    with pytest.raises(UsageError, match="at least one token"):
        session.step({sequence: []})
    with pytest.raises(UsageError, match="has 10 tokens and cannot be truncated to 11"):
        session.truncate(sequence, 11)
    assert session.length(sequence) == 10


def with_metadata(model: onnx.ModelProto, **changes: object) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    facts = json.loads(copy.metadata_props[0].value) | changes
    copy.metadata_props[0].value = json.dumps({name: value for name, value in facts.items() if value is not ...})
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "has version 2; this program reads 1"),
        ({"page_size": ...}, "cannot be read: KeyError 'page_size'"),
        ({"logits": "some"}, "says logits 'some'"),
        ({"token_input": "tokens"}, "names inputs or outputs that it does not have"),
    ],
)
def test_models_that_say_wrong_things_are_refused(
    model: onnx.ModelProto, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(BadModelError, match=message):
        Session(with_metadata(model, **changes))


def test_models_that_are_not_lowered_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModelError, match="not a lowered one"):
        Session(original(CONFIG))
    with pytest.raises(BadModelError, match="does not exist"):
        Session(tmp_path / "missing.onnx")
    (tmp_path / "noise.onnx").write_bytes(b"\x00not a model")
    with pytest.raises(BadModelError, match="is not an ONNX model"):
        Session(tmp_path / "noise.onnx")


def test_a_model_file_and_an_engine_serve_as_well(
    model: onnx.ModelProto, tmp_path: Path, expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    # Saving moves the weights out of the model in memory as well.
    onnx.save_model(lowered(CONFIG), tmp_path / "model.onnx", save_as_external_data=True, location="weights")
    assert (tmp_path / "weights").is_file()
    tokens = random_tokens(7)
    for session in (Session(tmp_path / "model.onnx", pages=4), Session(OnnxRuntimeEngine(model, pages=4))):
        assert_close(session.prefill(tokens)[1], expected(tokens)[-1])


def greedy(expected: Callable[[np.ndarray], np.ndarray], prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(expected(np.array(tokens))[-1].argmax()))
    return tokens[len(prompt) :]


def test_generation_streams_what_the_export_would_say(
    model: onnx.ModelProto, expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    prompts = [[3, 1, 4, 1, 5, 9, 2], [6, 5]]
    wanted = [greedy(expected, prompt, 6) for prompt in prompts]
    session = Session(model, pages=16)
    stream = generate(session, prompts, max_new_tokens=6, max_step_tokens=3)
    assert next(stream) == (0, wanted[0][0])
    found: list[list[int]] = [wanted[0][:1], []]
    for index, token in stream:
        found[index].append(token)
    assert found == wanted
    assert session.sequences == ()


def test_generation_ends_at_a_stop_id_and_frees_its_pages(
    model: onnx.ModelProto, expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    prompt = [3, 1, 4]
    wanted = greedy(expected, prompt, 8)
    stop = wanted[2]
    session = Session(model, pages=16)
    tokens = [token for _, token in generate(session, [prompt], max_new_tokens=8, stop_ids={stop})]
    assert tokens == wanted[: wanted.index(stop) + 1]
    stream = generate(session, [prompt], max_new_tokens=8)
    next(stream)
    stream.close()
    assert len(session.free_pages) == 16
    with pytest.raises(UsageError, match="prompt 0: the prompt is empty"):
        next(generate(session, [[]], max_new_tokens=1))
    assert list(generate(session, [prompt], max_new_tokens=0)) == []


def test_a_model_of_equal_lengths_carries_its_states_along() -> None:
    session = Session(running_products(), pages=8)
    first, second = session.create(), session.create()
    results = session.step({first: [2, 3], second: [5, 7]})
    assert results[first]["logits"][:, 0].tolist() == [6.0, 6.0]
    child = session.fork(second)
    assert session.step({child: [2], first: [4]})[child]["logits"][0, 0] == 70
    assert session.step({second: [3]})[second]["logits"][0, 0] == 105
    with pytest.raises(UsageError, match="equal lengths only"):
        session.step({first: [1], second: [1, 2]})
    with pytest.raises(UsageError, match="cannot drop tokens"):
        session.truncate(first, 1)
    session.truncate(first, 0)
    assert session.step({first: [9]})[first]["logits"][0, 0] == 9


def running_products() -> onnx.ModelProto:
    """A model of [B, S] tokens with a state: the product of all tokens (a state of 0 stands for none)."""
    model = onnx.parser.parse_model(
        """<ir_version: 11, opset_import: ["" : 26]>
        products (int64[B, S] ids, int32[offsets] query_offsets, int32[B] cache_lengths, int32[B, columns] block_table,
                  float[B, T] mask, float[B, 1] past)
            => (float[B, S, 1] logits, float[B, 1] present) {
            values = Cast<to: int = 1>(ids)
            one = Constant<value: tensor = int64[1] {1}>()
            product = ReduceProd<keepdims: int = 1>(values, one)
            began = Cast<to: int = 9>(past)
            unit = Constant<value: tensor = float {1.0}>()
            factor = Where(began, past, unit)
            present = Mul(product, factor)
            spread = Mul(present, unit)
            shape = Shape(ids)
            wide = Expand(spread, shape)
            axis = Constant<value: tensor = int64[1] {-1}>()
            logits = Unsqueeze(wide, axis)
        }"""
    )
    facts = {
        "version": 1,
        "token_input": "ids",
        "token_axes": ["B", "S"],
        "logits": "all",
        "page_size": 4,
        "row_format": "f32",
        "index_format": "f32",
        "vocabulary": 100,
        "caches": [],
        "side_inputs": [
            {"name": "mask", "role": "attention_mask", "dtype": 1, "axes": ["B", "T"]},
            {"name": "past", "role": "state", "dtype": 1, "axes": ["B", 1], "output": "present"},
        ],
    }
    onnx.helper.set_model_props(model, {"mla_trt": json.dumps(facts)})
    return model


def test_missing_side_inputs_are_named() -> None:
    model = running_products()
    with pytest.raises(MlaTrtError, match="also needs the inputs mask, past"):
        Session(with_metadata(model, side_inputs=[]), pages=8).prefill([1])


def test_embeddings_serve_as_tokens() -> None:
    config = replace(CONFIG, layers=1)
    model = lowered(config)
    weights = onnx.numpy_helper.to_array(
        next(tensor for tensor in model.graph.initializer if tensor.name == "embedding")
    )
    plan, gather, squeeze = model.graph.node[:3]
    squeeze.input[0] = "input_ids"
    # The plan only counts tokens.
    gather.CopyFrom(onnx.helper.make_node("ReduceMax", ["input_ids", "last_axis"], ["counted"], keepdims=0))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2]), "last_axis"))
    plan.input[0] = "counted"
    nodes = [gather, plan, squeeze, *model.graph.node[3:]]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    model.graph.input[0].type.tensor_type.shape.dim.add().dim_value = config.hidden
    tokens = random_tokens(6)
    ids, embeddings = Session(lowered(config), pages=4), Session(model, pages=4)
    assert_close(embeddings.prefill(weights[tokens])[1], ids.prefill(tokens)[1])
    assert_close(embeddings.decode({0: weights[5]})[0], ids.decode({0: 5})[0])
    with pytest.raises(UsageError, match=r"must be \[n, 24\], not \[2\]"):
        embeddings.prefill([1, 2])
