"""What the op tests share: random steps over a paged pool, and one op on ONNX Runtime, as a model with its function."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from mla_trt.formats import KvLayout, PageLayout
from mla_trt.ops import OPS, TensorType, attach_functions, infer_shapes, make_node

Array = npt.NDArray[Any]

BAD_PAGES = (-1, -7, 2**31 - 1, -(2**31))


@dataclass(frozen=True)
class Step:
    """New tokens of some sequences, and where their pages are.

    ``inputs`` has query_offsets, cache_lengths, block_table, token_sequence, positions and schedule; ``free`` are pages
    of no sequence.
    """

    inputs: dict[str, Array]
    tokens: int
    pages: int
    page_size: int
    free: tuple[int, ...]

    def places(self, sequence: int, keys: Sequence[int]) -> tuple[Array, Array]:
        """Page and slot of each of ``keys``."""
        positions = np.asarray(keys, np.int64)
        return self.inputs["block_table"][sequence, positions // self.page_size], positions % self.page_size

    def new_places(self) -> tuple[Array, Array]:
        """Page and slot of each new token that has a page."""
        pages, slots = [], []
        for sequence, position in zip(self.inputs["token_sequence"], self.inputs["positions"], strict=True):
            if sequence < 0:
                continue
            page, slot = self.places(sequence, [position])
            if 0 <= page[0] < self.pages:
                pages.append(page[0])
                slots.append(slot[0])
        return np.array(pages, np.int64), np.array(slots, np.int64)


def make_step(
    rng: np.random.Generator,
    new: Sequence[int],
    cached: Sequence[int],
    page_size: int = 4,
    padding: int = 0,
    spare: int = 3,
) -> Step:
    """Sequences with ``cached`` tokens and ``new`` ones, on random pages.

    Entries of the block table that no token needs name no page.
    """
    lengths = [old + count for old, count in zip(cached, new, strict=True)]
    needed = [-(-length // page_size) for length in lengths]
    pages = sum(needed) + spare
    order = rng.permutation(pages).tolist()
    width = max(needed, default=0) + 1
    table = np.resize(np.array([*BAD_PAGES, pages], np.int64), (len(new), width))
    for sequence, count in enumerate(needed):
        for column in range(count):
            table[sequence, column] = order.pop()
    offsets = np.concatenate([[0], np.cumsum(new)])
    tokens = int(offsets[-1]) + padding
    inputs: dict[str, Array] = {
        "query_offsets": offsets.astype(np.int32),
        "cache_lengths": np.array(cached, np.int32),
        "block_table": table.astype(np.int32),
    }
    plan = OPS["MlaPlan"]
    tokens_input = {"tokens": np.zeros(tokens, np.int64), **inputs}
    inputs.update(plan.reference(plan.complete({"page_size": page_size, "num_partitions": 4}, ""), tokens_input))
    return Step(inputs, tokens, pages, page_size, tuple(order))


def garbage_pool(rng: np.random.Generator, layout: PageLayout, pages: int) -> Array:
    """Pages of random bits, among them every NaN pattern."""
    pool = rng.integers(-(2**31), 2**31, (pages, layout.page_words)).astype(np.int32)
    pool[rng.random(pool.shape) < 0.2] = -1
    return pool


def latent_pool(rng: np.random.Generator, layout: KvLayout, step: Step, with_new: bool) -> Array:
    """Garbage, but for the rows of the cached tokens and, if wanted, of the new ones."""
    pool = garbage_pool(rng, layout, step.pages)
    for sequence, (length, count) in enumerate(
        zip(step.inputs["cache_lengths"].tolist(), np.diff(step.inputs["query_offsets"]).tolist(), strict=True)
    ):
        total = length + (count if with_new else 0)
        page, slot = step.places(sequence, range(total))
        kept = (page >= 0) & (page < step.pages)
        rope = rng.standard_normal((total, layout.qk_rope_head_dim), np.float32)
        latent = rng.standard_normal((total, layout.kv_lora_rank), np.float32)
        layout.write(pool, page[kept], slot[kept], latent[kept], rope[kept])
    return pool


def behind_a_page_of_nan(inputs: Mapping[str, Array], cache: str) -> dict[str, Array]:
    """The same step with one page more, page 0: no sequence has it, and all its bits are set."""
    table, pool = inputs["block_table"].astype(np.int64), inputs[cache]
    inside = (table >= 0) & (table < len(pool))
    shifted = np.where(inside | (table == len(pool)), table + 1, table).astype(np.int32)
    return {**inputs, "block_table": shifted, cache: np.concatenate([np.full_like(pool[:1], -1), pool])}


def run_op(
    op_type: str, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None, **attributes: Any
) -> dict[str, Array]:
    """The outputs by name, of a checked model of one node on ONNX Runtime.

    Types that numpy alone does not know become initializers, and bf16 outputs come back as f32. Shapes and types are
    compared with what ``infer_shapes`` says.
    """
    op = OPS[op_type]
    names = [output.name for output in op.outputs] if outputs is None else list(outputs)
    values = {name: f"{name}_result" for name in names}
    node = make_node(op_type, {name: name for name in inputs}, values, name="tested", **attributes)
    types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in inputs.items()}
    fed = {
        name: array
        for name, array in inputs.items()
        if array.dtype.kind != "V" and array.dtype.type.__module__ == "numpy"
    }
    ordered = [TensorType(types[name], inputs[name].shape) if name else None for name in node.input]
    inferred = {name: kind for name, kind in zip(node.output, infer_shapes(node, ordered), strict=True) if name}
    nodes, results = [node], {}
    for name, kind in inferred.items():
        results[name] = name
        if kind.dtype == TensorProto.BFLOAT16:
            results[name] = f"{name}_f32"
            nodes.append(helper.make_node("Cast", [name], [results[name]], to=TensorProto.FLOAT))
    graph = helper.make_graph(
        nodes,
        "op",
        [helper.make_tensor_value_info(name, types[name], [None] * array.ndim) for name, array in fed.items()],
        [
            helper.make_tensor_value_info(
                results[name],
                TensorProto.FLOAT if kind.dtype == TensorProto.BFLOAT16 else kind.dtype,
                [None] * len(kind.shape),
            )
            for name, kind in inferred.items()
        ],
        [numpy_helper.from_array(array, name) for name, array in inputs.items() if name not in fed],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 26)], ir_version=13)
    attach_functions(model)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # more would spin on the cores of the other tests' processes
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = dict(zip(inferred, session.run(list(results.values()), fed), strict=True))
    for name, kind in inferred.items():
        assert found[name].shape == kind.shape, (name, found[name].shape, kind.shape)
    return {name: found[value] for name, value in values.items()}


def reference(op_type: str, inputs: Mapping[str, Array], **attributes: Any) -> dict[str, Array]:
    """The op's float64 reference."""
    op = OPS[op_type]
    return op.reference(op.complete(attributes, op_type), inputs)


def assert_close(actual: Array, expected: Array, tolerance: float = 1e-5) -> None:
    """Equal infinities, and finite values within ``tolerance`` of the largest one expected."""
    assert actual.shape == expected.shape
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    scale = max(float(np.abs(expected[finite]).max(initial=0.0)), 1e-30)
    error = float(np.abs(actual[finite] - expected[finite]).max(initial=0.0)) / scale
    assert error <= tolerance, f"error {error:.2e}"


def assert_rows_close(
    layout: PageLayout, actual: Array, expected: Array, places: tuple[Array, Array], step: float
) -> None:
    """Pools that differ at most in the rows at ``places``, by one code there, and that for 2% of the values only.

    For rows that went through a norm: the last bit of its result is not defined, and it may decide a rounding. ``step``
        is a code's
    distance to the next relative to its value; small values count against the largest of their row.
    """
    actual, expected = actual.copy(), expected.copy()
    found, wanted = (_read(layout, pool, places) for pool in (actual, expected))
    difference = np.abs(found - wanted)
    floor = 5e-6 * np.abs(wanted).max(axis=1, keepdims=True)
    assert (difference <= step * np.abs(wanted) + floor).all()
    assert np.mean(difference > 1e-5 * np.abs(wanted) + floor) <= 0.02
    for pool in (actual, expected):
        _erase(layout, pool, places)
    np.testing.assert_array_equal(actual, expected)


def _read(layout: PageLayout, pool: Array, places: tuple[Array, Array]) -> Array:
    rows = layout.read(pool, *places)  # type: ignore[attr-defined]
    return np.concatenate(rows, axis=1) if isinstance(rows, tuple) else rows


def _erase(layout: PageLayout, pool: Array, places: tuple[Array, Array]) -> None:
    for page, slot in zip(*places, strict=True):
        pool[page, slot * layout.row_words : (slot + 1) * layout.row_words] = 0
        if layout.has_page_scales:
            pool[page, layout.scales_word + slot] = 0


CODE_STEP = {"f32": 2e-6, "bf16": 2**-7, "fp8": 2**-3 + 1e-6, "fp8_ds_mla": 2**-3 + 1e-6, "fp8_flat": 2**-3 + 1e-6}


def e4m3_weight(rng: np.random.Generator, *shape: int) -> tuple[Array, Array]:
    """A random e4m3 weight ``[H, m, n]`` and its scale of each 128 x 128 block."""
    weight = rng.uniform(-448, 448, shape).astype(ml_dtypes.float8_e4m3fn)
    blocks = (shape[0], -(-shape[1] // 128), -(-shape[2] // 128))
    return weight, (rng.uniform(0.5, 2.0, blocks) / 2000).astype(np.float32)


def e4m3_matrix(rng: np.random.Generator, *shape: int, row_axes: int = 1) -> tuple[Array, Array]:
    """A random e4m3 weight that is a matrix, with the first axes as its rows, and the scale of each 128 x 128 block of that."""
    weight = rng.uniform(-448, 448, shape).astype(ml_dtypes.float8_e4m3fn)
    sizes = math.prod(shape[:row_axes]), math.prod(shape[row_axes:])
    return weight, (rng.uniform(0.5, 2.0, [-(-size // 128) for size in sizes]) / 2000).astype(np.float32)


def decoded_by_hand(weight: Array, scale: Array | None, row_axes: int = 1) -> Array:
    """Each value of such a weight in float64; of codes, which lie in tiles, times the scale of its block, one after the other."""
    if scale is None:
        return weight.astype(np.float64)
    rows, columns = math.prod(weight.shape[:row_axes]), math.prod(weight.shape[row_axes:])
    values = np.empty((rows, columns))
    codes = iter(weight.reshape(-1).astype(np.float64).tolist())
    for first_row, first_column in itertools.product(range(0, rows, 128), range(0, columns, 16)):
        for row in range(first_row, min(first_row + 128, rows)):
            for column in range(first_column, min(first_column + 16, columns)):
                values[row, column] = next(codes) * float(scale[row // 128, column // 128])
    return values.reshape(weight.shape)
