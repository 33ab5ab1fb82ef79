"""Exports whose caches have all their rows from the beginning (Transformers' StaticCache): lowered as growing ones are, whichever way they write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper
from small_models import SPARSE, Builder, Config, FullCaches, ints, original, rotate, weights

from mla_trt import interface as roles
from mla_trt.errors import NoMlaError
from mla_trt.lowering import Lowered, LowerOptions, inspect, lower
from mla_trt.passes.free_rows import free_rows
from mla_trt.pipeline import lower_file
from mla_trt.report import Report
from mla_trt.verification.original import Limits, OriginalModel, RefusedLengthError

DENSE = Config()
ROWS = 24


# -- ways to write the rows of new tokens [B, S, d] at positions [S] into caches [B, L, d] -------------------------------


def scatter_nd(b: Builder, past: str, new: str, position: str) -> str:
    turned = b.op("Transpose", past, perm=[1, 0, 2])
    written = b.op("ScatterND", turned, b.op("Unsqueeze", position, ints(1)), b.op("Transpose", new, perm=[1, 0, 2]))
    return b.op("Transpose", written, perm=[1, 0, 2])


def scatter_elements(b: Builder, past: str, new: str, position: str) -> str:
    places = b.op("Expand", b.op("Unsqueeze", position, ints(0, 2)), b.op("Shape", new))
    return b.op("ScatterElements", past, places, new, axis=1)


def tensor_scatter(b: Builder, past: str, new: str, position: str, mode: str = "linear") -> str:
    first = b.op("Slice", position, ints(0), ints(1), ints(0))
    starts = b.op("Expand", first, b.op("Shape", new, start=0, end=1))
    return b.op("TensorScatter", past, new, starts, axis=1, mode=mode)


def _is_position(b: Builder, past: str, position: str) -> str:
    """bool [L, S]"""
    rows = b.op("Range", np.array(0), b.op("Squeeze", b.op("Shape", past, start=1, end=2)), np.array(1))
    return b.op("Equal", b.op("Unsqueeze", rows, ints(1)), b.op("Unsqueeze", position, ints(0)))


def one_hot_product(b: Builder, past: str, new: str, position: str) -> str:
    hot = b.op("Cast", _is_position(b, past, position), to=TensorProto.FLOAT)
    others = b.op("Sub", np.array(1, np.float32), b.op("ReduceSum", hot, ints(1)))
    return b.op("Add", b.op("Mul", past, others), b.op("MatMul", hot, new))


def chosen_by_where(b: Builder, past: str, new: str, position: str) -> str:
    chosen = _is_position(b, past, position)
    token = b.op("ArgMax", b.op("Cast", chosen, to=TensorProto.INT64), axis=1, keepdims=0)
    used = b.op("Cast", b.op("ReduceMax", b.op("Cast", chosen, to=TensorProto.INT64), ints(1)), to=TensorProto.BOOL)
    return b.op("Where", used, b.op("Gather", new, token, axis=1), past)


WRITERS = [scatter_nd, scatter_elements, tensor_scatter, one_hot_product, chosen_by_where]


def lowered_and_verified(
    model: onnx.ModelProto, folder: Path, *, cache: str = "latent", **options: str
) -> tuple[onnx.ModelProto, Report]:
    onnx.save(model, folder / "export.onnx")
    report = lower_file(folder / "export.onnx", folder / "lowered", LowerOptions(**options))
    assert report.verification is not None
    assert report.verification["passed"]
    assert report.verification["rewrite_max_error"] < 1e-5
    assert sum(case["tokens"] for case in report.verification["cases"]) > 50
    assert [layer.cache for layer in report.layers] == [cache, cache]
    return onnx.load(folder / "lowered" / "model.onnx"), report


@pytest.mark.parametrize("write", WRITERS)
def test_a_cache_is_lowered_however_it_is_written(write: Callable[..., str], tmp_path: Path) -> None:
    model, report = lowered_and_verified(original(DENSE, full=FullCaches(write, ROWS)), tmp_path)
    names = [value.name for value in model.graph.input]
    assert {"cache_position", "position_ids"}.isdisjoint(names)
    assert {"query_offsets", "cache_lengths", "block_table", "kv_cache.0", "kv_cache.1"} <= set(names)
    assert [value.name for value in model.graph.output] == ["logits", "kv_cache_out.0", "kv_cache_out.1"]
    assert not {node.op_type for node in model.graph.node} & {"Softmax", "ScatterND", "TensorScatter", "Where"}
    assert report.model["max_position"] == ROWS


@pytest.mark.parametrize("rows", [ROWS, 300, None])
def test_indexers_select_among_the_rows_that_hold_tokens(rows: int | None, tmp_path: Path) -> None:
    _, report = lowered_and_verified(original(SPARSE, full=FullCaches(scatter_nd, rows)), tmp_path)
    assert [layer.top_k for layer in report.layers] == [SPARSE.top_k] * 2


@pytest.mark.parametrize(("rows", "positions"), [(ROWS, ROWS), (300, 64), (None, 64)])
def test_positions_end_with_the_rows_or_with_the_rope_tables(rows: int | None, positions: int, tmp_path: Path) -> None:
    _, report = lowered_and_verified(original(DENSE, full=FullCaches(scatter_nd, rows)), tmp_path)
    assert report.model["max_position"] == positions
    assert any("longer caches" in note for note in report.notes) == (positions == ROWS)


@pytest.mark.parametrize("batch", [1, 2, None])
@pytest.mark.parametrize("new", [1, 3, None])
def test_fixed_numbers_of_sequences_and_tokens(batch: int | None, new: int | None, tmp_path: Path) -> None:
    full = FullCaches(scatter_elements, ROWS, fixed_batch=batch, fixed_new=new)
    lowered_and_verified(original(DENSE, full=full), tmp_path)


@pytest.mark.parametrize("position", ["first", "counted", "column"])
def test_the_first_token_s_position_is_enough(position: str, tmp_path: Path) -> None:
    model, _ = lowered_and_verified(
        original(DENSE, full=FullCaches(scatter_nd, ROWS, position=position)), tmp_path, kv_format="f32"
    )
    assert [value.name for value in model.graph.output] == ["logits", "kv_cache_out.0", "kv_cache_out.1"]


@pytest.mark.parametrize("mask", ["rows", "tokens", "scores"])
def test_masks_given_from_outside(mask: str, tmp_path: Path) -> None:
    model, report = lowered_and_verified(original(DENSE, full=FullCaches(scatter_nd, ROWS, mask=mask)), tmp_path)
    assert "mask" not in [value.name for value in model.graph.input]
    assert bool(report.assumptions) == (mask == "scores")


def test_layers_are_verified_apart(tmp_path: Path) -> None:
    onnx.save(original(SPARSE, full=FullCaches(scatter_nd, 100, position="counted")), tmp_path / "export.onnx")
    report = lower_file(tmp_path / "export.onnx", tmp_path / "lowered", LowerOptions(), verify_memory=1)
    assert report.verification is not None
    assert report.verification["mode"] == "layers"
    assert report.verification["passed"]


def with_attention_op(rows: int, *, given: bool) -> onnx.ModelProto:
    """An export of opset 24 as its `Attention` is meant to be used: caches of keys and values for each head, written by TensorScatter, and the
    number of rows that belong to tokens. Where writing starts, and that number, are `given` or follow from positions."""
    c, b = DENSE, Builder()
    b.weights = {name: value for name, value in weights(c).items() if not name.startswith(("index", "sinks"))}
    heads, head_dim = c.num_heads, c.qk_nope_head_dim + c.qk_rope_head_dim

    def turned(value: str) -> str:
        return b.op("Transpose", value, perm=[0, 2, 1, 3])

    x = b.op("Gather", "embedding", "input_ids")
    starts, lengths = "write_indices", "lengths"
    if not given:
        first = b.op("Slice", "cache_position", ints(0), ints(1), ints(0))
        starts = b.op("Expand", first, b.op("Shape", "input_ids", start=0, end=1))
        lengths = b.op("Add", starts, b.op("Shape", "input_ids", start=1))
    caches: list[tuple[str, int]] = []
    for layer in range(c.layers):
        normed = b.op("RMSNormalization", x, f"norm.{layer}", axis=-1, epsilon=c.epsilon)
        query = b.op("Reshape", b.op("MatMul", normed, f"q.{layer}"), ints(0, 0, heads, -1))
        q_nope, q_rope = b.split("Split", 2, query, ints(c.qk_nope_head_dim, c.qk_rope_head_dim), axis=3)
        kv = b.op("MatMul", normed, f"kv_a.{layer}")
        latent, k_rope = b.split("Split", 2, kv, ints(c.kv_lora_rank, c.qk_rope_head_dim), axis=2)
        latent = b.op("RMSNormalization", latent, f"kv_norm.{layer}", axis=-1, epsilon=c.epsilon)
        k_rope = rotate(b, c, b.op("Reshape", k_rope, ints(0, 0, 1, c.qk_rope_head_dim)), c.interleaved)
        k_rope = b.op("Expand", k_rope, ints(1, 1, heads, 1))
        expanded = b.op("Reshape", b.op("MatMul", latent, f"kv_b.{layer}"), ints(0, 0, heads, -1))
        k_nope, values = b.split("Split", 2, expanded, ints(c.qk_nope_head_dim, c.v_head_dim), axis=3)
        parts = {"key": b.op("Concat", k_nope, k_rope, axis=3), "value": values}
        for name, new in parts.items():
            past, present = f"past_{name}.{layer}", f"present_{name}.{layer}"
            b.op("TensorScatter", past, turned(new), starts, output=present, axis=2)
            caches.append((f"{name}.{layer}", head_dim if name == "key" else c.v_head_dim))
        query = turned(b.op("Concat", q_nope, rotate(b, c, q_rope, c.interleaved), axis=3))
        present = [f"present_{name}.{layer}" for name in parts]
        attended = b.op("Attention", query, *present, "", "", "", lengths, scale=c.scale, is_causal=1)
        x = b.op("Add", x, b.op("MatMul", b.op("Reshape", turned(attended), ints(0, 0, -1)), f"o.{layer}"))
    b.op("MatMul", b.op("RMSNormalization", x, "norm", axis=-1, epsilon=c.epsilon), "lm_head", output="logits")
    info = helper.make_tensor_value_info
    inputs = [info("input_ids", TensorProto.INT64, ["B", "S"]), info("position_ids", TensorProto.INT64, ["B", "S"])]
    sides = [("write_indices", "B"), ("lengths", "B")] if given else [("cache_position", "S")]
    inputs += [info(name, TensorProto.INT64, [axis]) for name, axis in sides]
    inputs += [info(f"past_{name}", TensorProto.FLOAT, ["B", heads, rows, width]) for name, width in caches]
    outputs = [info("logits", TensorProto.FLOAT, ["B", "S", c.vocabulary])]
    outputs += [info(f"present_{name}", TensorProto.FLOAT, ["B", heads, rows, width]) for name, width in caches]
    return b.model(inputs, outputs, 24)


@pytest.mark.parametrize("given", [True, False])
def test_expanded_caches_under_the_attention_op(given: bool, tmp_path: Path) -> None:
    model, report = lowered_and_verified(with_attention_op(ROWS, given=given), tmp_path, cache="expanded")
    assert report.model["max_position"] == ROWS
    names = [value.name for value in model.graph.input]
    assert {"position_ids", "cache_position", "write_indices", "lengths"}.isdisjoint(names)


# -- what is not such a cache --------------------------------------------------------------------------------------------


def refusal(full: FullCaches, config: Config = DENSE) -> str:
    with pytest.raises(NoMlaError) as raised:
        lower(original(config, full=full), LowerOptions())
    return str(raised.value)


def one_row_on(b: Builder, past: str, new: str, position: str) -> str:
    return scatter_nd(b, past, new, b.op("Add", position, ints(1)))


def always_first_rows(b: Builder, past: str, new: str, position: str) -> str:
    return scatter_nd(b, past, new, b.op("Sub", position, b.op("Slice", position, ints(0), ints(1), ints(0))))


def backwards(b: Builder, past: str, new: str, position: str) -> str:
    return scatter_nd(b, past, new, b.op("Slice", position, ints(-1), ints(-1000), ints(0), ints(-1)))


def ring(b: Builder, past: str, new: str, position: str) -> str:
    rows = b.op("Shape", past, start=1, end=2)
    return scatter_nd(b, past, new, b.op("Mod", position, rows))


def circular(b: Builder, past: str, new: str, position: str) -> str:
    return tensor_scatter(b, past, new, position, mode="circular")


def rolled(b: Builder, past: str, new: str, _position: str) -> str:
    """The window of a sliding StaticCache that is full: the oldest rows leave at the front."""
    count = b.op("Shape", new, start=1, end=2)
    return b.op("Concat", b.op("Slice", past, count, ints(2**62), ints(1)), new, axis=1)


def doubled(b: Builder, past: str, new: str, position: str) -> str:
    return scatter_nd(b, b.op("Mul", past, np.array(2, np.float32)), new, position)


@pytest.mark.parametrize("write", [one_row_on, always_first_rows])
def test_rows_that_are_written_elsewhere_than_at_their_positions(write: Callable[..., str]) -> None:
    assert "the cache 'past_latent.0' is not written at the new tokens' positions" in refusal(FullCaches(write, ROWS))


def test_rows_that_are_written_in_another_order() -> None:
    assert refusal(FullCaches(backwards, ROWS))


@pytest.mark.parametrize("write", [ring, circular])
@pytest.mark.parametrize("rows", [ROWS, 300, None])
def test_ring_buffers(write: Callable[..., str], rows: int | None) -> None:
    assert "a ring buffer" in refusal(FullCaches(write, rows))


def test_windows_that_move_on() -> None:
    assert "a window, or a ring buffer" in refusal(FullCaches(rolled, ROWS))


def test_rows_that_change_while_they_are_kept() -> None:
    assert refusal(FullCaches(doubled, ROWS))


@pytest.mark.parametrize("rows", [ROWS, 300])
@pytest.mark.parametrize("window", [3, 18, 24, 299, 300, 5000])
def test_windows_in_the_mask(rows: int, window: int) -> None:
    assert "window" in refusal(FullCaches(scatter_nd, rows, window=window))


def test_a_mask_that_shows_rows_without_tokens() -> None:
    assert "hold no token yet" in refusal(FullCaches(scatter_nd, ROWS, hides=False))


# -- the export as a session ---------------------------------------------------------------------------------------------


def opened(full: FullCaches, model: onnx.ModelProto | None = None) -> OriginalModel:
    model = model or original(DENSE, full=full)
    return OriginalModel(model, inspect(model).interface)


@pytest.mark.parametrize("mask", [None, "rows"])
@pytest.mark.parametrize("position", ["given", "counted"])
def test_sessions_keep_their_rows_and_count_them(mask: str | None, position: str) -> None:
    model = opened(FullCaches(scatter_nd, ROWS, position=position, mask=mask))
    limits = model.find_limits(64)
    assert limits == Limits(1, 1, 1, ROWS)
    tokens = np.random.default_rng(3).integers(0, DENSE.vocabulary, ROWS)
    whole = model.results_by_token(tokens, [ROWS], limits)["logits"]
    steps = model.results_by_token(tokens, [5, 1, 1, 9, *[1] * 8], limits)["logits"]
    np.testing.assert_allclose(steps, whole, atol=1e-5)
    growing = original(DENSE)
    expected = OriginalModel(growing, inspect(growing).interface).start().feed(tokens[None])["logits"]
    np.testing.assert_allclose(whole, expected[0], atol=1e-5)


def test_no_call_goes_beyond_the_last_row() -> None:
    run = opened(FullCaches(scatter_nd, ROWS)).start()
    run.feed([[1] * 20])
    with pytest.raises(RefusedLengthError, match="have 24 rows, not 25"):
        run.feed([[1] * 5])
    assert run.length == 20


def test_as_many_rows_as_are_tried_where_their_number_is_free() -> None:
    assert opened(FullCaches(scatter_nd, None)).find_limits(40) == Limits(1, 1, 1, 40)


# -- roles ---------------------------------------------------------------------------------------------------------------


def test_roles_and_axes() -> None:
    found = inspect(original(DENSE, full=FullCaches(scatter_nd, ROWS, position="counted", mask="rows"))).interface
    described = {entry.name: (entry.role, entry.axes, entry.output) for entry in found.inputs}
    assert described["past_latent.1"] == (roles.CACHE, ("B", "L", 16), "present_latent.1")
    assert described["first_position"] == (roles.POSITIONS, (), "next_position")
    assert described["mask"] == (roles.ATTENTION_MASK, ("B", "L"), None)
    assert found.fixed == {"L": ROWS}
    assert found.results == ("logits",)


def test_growing_caches_keep_their_roles() -> None:
    entries = inspect(original(DENSE)).interface.by_role(roles.CACHE)
    assert [entry.axes for entry in entries] == [("B", "P", 16), ("B", "P", 8)] * 2


def test_fewer_rows_are_read_where_their_number_is_spelt_out() -> None:
    """Shapes, ranges, masks and indices name rows; tables and weights that are as long keep their values."""
    random = np.random.default_rng(0)
    b = Builder()
    causal = np.where(np.tri(96, dtype=bool), np.float32(0), np.float32(-1e9))
    constants = {
        "shape": ints(1, 96, 8),
        "range": np.arange(96),
        "steps": np.arange(96, dtype=np.float32)[None],
        "mask": causal,
        "table": random.standard_normal((96, 8)).astype(np.float32),
        "other": ints(5, 8),
    }
    nodes = [helper.make_node("Identity", [name], [f"out_{name}"]) for name in constants]
    b.weights, b.nodes = constants, nodes
    outputs = [helper.make_empty_tensor_value_info(f"out_{name}") for name in constants]
    graph = gs.import_onnx(b.model([], outputs, 20))
    tensors = graph.tensors()
    found = free_rows(graph, 96, 14, None)
    named = {name: found[id(tensors[name])] for name in constants if id(tensors[name]) in found}
    assert sorted(named) == ["mask", "range", "shape", "steps"]
    np.testing.assert_array_equal(named["shape"], [1, 14, 8])
    np.testing.assert_array_equal(named["range"], np.arange(14))
    np.testing.assert_array_equal(named["steps"], np.arange(14)[None])
    np.testing.assert_array_equal(named["mask"], causal[:14, :14])


def test_a_lowered_model_says_nothing_of_rows(tmp_path: Path) -> None:
    def of(rows: int | None) -> Lowered:
        return lower(original(DENSE, full=FullCaches(scatter_nd, rows)), LowerOptions())

    free, fixed = of(None).model, of(300).model
    assert [node.op_type for node in free.graph.node] == [node.op_type for node in fixed.graph.node]
