"""Each op of a lowered model, as it was written, against its numpy reference on the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mla_trt.engines.engine_onnxruntime import OnnxRuntimeEngine
from mla_trt.engines.engine_recorder import RecordingEngine
from mla_trt.formats import IndexLayout, KvLayout
from mla_trt.metadata import LoweredMetadata
from mla_trt.ops import DOMAIN, OPS, Attributes
from mla_trt.selection import show_selection, top_k
from mla_trt.session import Session
from mla_trt.verification.cases import Case, Step, run_step
from mla_trt.verification.original import Limits

OPS_TOLERANCE = 1e-4
SPARE_PAGES = 4
LONGEST_CONTEXT = 300
FEWEST_IDS = 2
NO_LIMIT = 1 << 30
DRAWS = 3
TINY = 1e-30
# Largest step between neighbours of a format, relative to the value: what a value on the border of two may differ by.
E4M3_STEP, BF16_STEP = 1 / 8, 1 / 128
LATENT_STEPS = {"f32": 0.0, "bf16": BF16_STEP, "fp8": E4M3_STEP, "fp8_ds_mla": E4M3_STEP, "fp8_flat": E4M3_STEP}
ROPE_STEPS = {"f32": 0.0, "bf16": BF16_STEP, "fp8": BF16_STEP, "fp8_ds_mla": BF16_STEP, "fp8_flat": E4M3_STEP}
MOST_ON_A_BORDER = 0.01


@dataclass(frozen=True)
class OpResult:
    """One node against its reference; the error is relative to the reference's largest absolute value."""

    op: str
    node: str
    error: float


def check_ops(model: onnx.ModelProto, *, base_dir: Path | None = None, seed: int = 0) -> list[OpResult]:
    """Runs a short session and compares one node of each variant with its reference.

    Op and reference round to 8 bits after computing in float32 and float64. A value on the border of two codes may
    become either, and, where it decides which keys are selected, change much. So if an op differs, other tokens are
    drawn, twice at most.

    Args:
        model: a lowered model, in float32.
        base_dir: folder of its external data.
        seed: of the random numbers.
    """
    shown, _ = show_selection(model)
    nodes = _one_of_each_variant(shown)
    initializers = {tensor.name: tensor for tensor in shown.graph.initializer}
    known = initializers.keys() | {entry.name for entry in (*shown.graph.input, *shown.graph.output)}
    wanted = {name for node in nodes for name in (*node.input, *node.output) if name} - known
    shown.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in sorted(wanted))
    metadata = LoweredMetadata.of(shown)
    case = _case(top_k(shown), metadata.page_size, token_axes=metadata.token_axes).within(
        Limits(1, 1, 1, metadata.max_position or NO_LIMIT)
    )
    pages = sum(-(-sum(counts) // metadata.page_size) for counts in case.chunks().values()) + SPARE_PAGES
    engine = RecordingEngine(OnnxRuntimeEngine(shown, pages=pages, base_dir=base_dir), keep_caches=True)
    read = {name for node in nodes for name in node.input}
    weights = {
        name: numpy_helper.to_array(tensor, str(base_dir or ""))
        for name, tensor in initializers.items()
        if name in read
    }
    results: list[OpResult] = []
    for draw in range(DRAWS):
        _run(engine, shown, case, seed + draw)
        values = weights | engine.inputs | engine.outputs
        results = [OpResult(node.op_type, node.name, _error(node, values)) for node in nodes]
        if all(result.error <= OPS_TOLERANCE for result in results):
            break
    return results


def _one_of_each_variant(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    variants = {(node.op_type, node.overload): node for node in model.graph.node if node.domain == DOMAIN}
    return list(variants.values())


def _case(selected: int | None, page_size: int, *, token_axes: Sequence[str]) -> Case:
    """Two steps: the second, which is compared, decodes, continues and begins sequences, beside padding.

    One context is longer than the selection and crosses into its second page, where these are not too large.
    """
    wanted = [6, (selected or 0) + 3, page_size - 2]
    before = max(length for length in wanted if length <= LONGEST_CONTEXT)
    if "T" not in token_axes:
        sequences = ("a", "b") if "B" in token_axes else ("a",)
        case = Case("ops", tuple(Step(new=tuple((name, count) for name in sequences)) for count in (before, 4)))
        return case if "S" in token_axes else case.by_single_tokens()
    return Case(
        "ops",
        (
            Step(new=(("a", before), ("b", 5))),
            Step(new=(("b", 1), ("a", 6), ("c", 7)), pad_tokens=2, pad_sequences=1, pad_columns=1),
        ),
    )


def _run(engine: RecordingEngine, model: onnx.ModelProto, case: Case, seed: int) -> None:
    random = np.random.default_rng(seed)
    session = Session(engine)
    engine.poison(tuple(range(engine.pages)))
    numbers = {sequence: session.create() for sequence in case.chunks()}
    for step, spans in case.spans():
        batch = {}
        for sequence, (start, end) in spans.items():
            shape = (end - start, *engine.token_features)
            ids = engine.token_dtype.kind in "iu"
            drawn = random.integers(0, engine.vocabulary or FEWEST_IDS, shape) if ids else random.standard_normal(shape)
            batch[numbers[sequence]] = drawn.astype(engine.token_dtype)
        run_step(session, model, step, batch, spans)


def _error(node: onnx.NodeProto, values: Mapping[str, np.ndarray]) -> float:
    op = OPS[node.op_type]
    attributes = op.node_attributes(node)
    inputs = {formal: values[name] for formal, name in op.given_inputs(node).items()}
    outputs = {formal: values[name] for formal, name in op.given_outputs(node).items()}
    if node.op_type in ("MlaAttention", "MlaSparseAttention"):
        expected = _attention_reference(attributes, inputs, outputs)
    else:
        expected = op.reference(attributes, inputs)
    return max(_difference(name, attributes, value, expected[name]) for name, value in outputs.items())


def _attention_reference(
    attributes: Attributes, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """References of the parts of a layer. Each part gets what the op's part before it stored or selected: the same
    bytes."""
    nope, rope = np.split(inputs["query"].astype(np.float64), [attributes.integer("qk_nope_head_dim")], axis=2)
    appended = OPS["MlaFusedRopeRmsNormQuantization"].reference(attributes, {**inputs, "query_rope": rope})
    query = np.concatenate([nope, appended["query_rope_out"]], axis=2)
    attending = {**inputs, "query": query, "kv_cache": outputs["kv_cache_out"]}
    expected = {"kv_cache_out": appended["kv_cache_out"]}
    if "indices" in outputs:
        attending["indices"] = outputs["indices"]
        expected |= (
            {"indices": inputs["indices"]} if "indices" in inputs else OPS["MlaIndexer"].reference(attributes, inputs)
        )
    attend = OPS["MlaPrefill" if "w_uk" in inputs else "MlaDecoding"].reference
    return {**expected, "output": attend(attributes, attending)["output"]}


def _difference(name: str, attributes: Attributes, actual: np.ndarray, expected: np.ndarray) -> float:
    if name == "kv_cache_out":
        kv = attributes.kv_layout()
        latent, rope = (
            rows_difference(left, right, steps[kv.row_format])
            for left, right, steps in zip(
                _rows(kv, actual), _rows(kv, expected), (LATENT_STEPS, ROPE_STEPS), strict=True
            )
        )
        return max(latent, rope)
    if name == "indexer_cache_out":
        index = attributes.index_layout()
        (left,), (right,) = _rows(index, actual), _rows(index, expected)
        return rows_difference(left, right, E4M3_STEP if index.index_format == "fp8" else 0.0)
    if actual.dtype.kind in "iu":
        return 0.0 if np.array_equal(actual, expected) else float("inf")
    return relative_error(actual, expected)


def _rows(layout: KvLayout | IndexLayout, pages: np.ndarray) -> tuple[np.ndarray, ...]:
    """The values of every row of a pool."""
    page, slot = (grid.reshape(-1) for grid in np.mgrid[: len(pages), : layout.page_size])
    found = layout.read(pages.astype(np.int32, copy=False), page, slot)
    return found if isinstance(found, tuple) else (found,)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest expected absolute value; infinite where only one of both is
    finite."""
    finite = np.isfinite(expected)
    if not np.array_equal(actual[~finite], expected[~finite], equal_nan=True) or not np.isfinite(actual[finite]).all():
        return float("inf")
    difference = np.abs(actual[finite].astype(np.float64) - expected[finite]).max(initial=0.0)
    return float(difference / max(np.abs(expected[finite]).max(initial=0.0), TINY))


def rows_difference(actual: np.ndarray, expected: np.ndarray, step: float) -> float:
    """`relative_error` of stored rows, in which few values may be one step of their format apart."""
    both = np.isfinite(actual) & np.isfinite(expected)
    distance = np.where(both, np.abs(actual - np.where(both, expected, 0)), 0)
    scale = np.abs(expected[both]).max(initial=0.0)
    apart = distance > OPS_TOLERANCE * scale
    near = distance <= step * np.maximum(np.abs(actual), np.abs(expected)) * (1 + OPS_TOLERANCE)
    excused = apart & near
    if excused.sum() > max(1.0, MOST_ON_A_BORDER * both.sum()):
        excused[:] = False
    return relative_error(np.where(excused, expected, actual), expected)
