"""A stand-in for what runs a plan: the lowered model on ONNX Runtime, behind the interface of `TensorRtRunner`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mla_trt.engines.engine_file import (
    IO,
    RESIDENT,
    EngineDescription,
    description_path,
    engine_tensors,
    plan_digest,
    without_pools,
)
from mla_trt.engines.engine_onnxruntime import OnnxRuntimeEngine, embedded_vocabulary
from mla_trt.engines.engine_tensorrt import TensorRtEngine
from mla_trt.engines.profiles import make_profiles
from mla_trt.metadata import LoweredMetadata

PAGE_COPIES = "page_copies"


def with_known_axes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The hand-written small model with its axes named as `mla-trt lower` names them."""
    names = {"offsets": "B + 1", "rows": "T", "n": "copies"}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in (*copy.graph.input, *copy.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    return copy


def describe(model: onnx.ModelProto, cache: str = IO, **limits: int) -> EngineDescription:
    """The description that an engine of a model would have."""
    metadata = LoweredMetadata.of(model)
    inputs, outputs = engine_tensors(model, metadata)
    if cache == RESIDENT:
        inputs, outputs = without_pools(inputs, outputs, metadata)
    return EngineDescription(
        metadata=metadata,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        profiles=make_profiles(metadata, **limits),
        vocabulary=embedded_vocabulary(model, metadata.token_input),
        tensorrt="10.6.0",
        gpu="NVIDIA H200",
        compute_capability="9.0",
        plugins="0.1.0 sm_80 sm_90a",
        dtype="keep",
        cache=cache,
        weight_streaming=False,
        plan_bytes=0,
        plan_digest="",
        mla_trt="0.1.0",
    )


def write_engine(folder: Path, description: EngineDescription, model: onnx.ModelProto, plan: bytes = b"plan") -> Path:
    """The two files of an engine, of which the plan is anything."""
    path = folder / "model.engine"
    path.write_bytes(plan)
    complete = replace(description, plan_bytes=len(plan), plan_digest=plan_digest(path))
    metadata = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "mla_trt"))
    description_path(path).write_text(json.dumps(complete.to_json(metadata)))
    return path


class StandInRunner:
    """Runs steps and keeps their shapes.

    Attributes:
        steps: (profile, shape of the tokens, sequences, columns, whether it recurs) of each step.
        shapes: those of all inputs of each step.
        copied: pages that were copied outside of the model.
    """

    def __init__(self, model: onnx.ModelProto, pages: int) -> None:
        self._engine = OnnxRuntimeEngine(model, pages=pages)
        self.steps: list[tuple[str, tuple[int, ...], int, int, bool]] = []
        self.shapes: list[dict[str, tuple[int, ...]]] = []
        self.copied: list[list[int]] = []
        self.closed = False

    def run(self, profile: str, inputs: Mapping[str, np.ndarray], *, recurring: bool) -> dict[str, np.ndarray]:
        tokens = inputs[self._engine.metadata.token_input]
        self.steps.append((profile, tokens.shape, *inputs["block_table"].shape, recurring))
        self.shapes.append({name: value.shape for name, value in inputs.items()})
        given = dict(inputs)
        copies = given.pop(PAGE_COPIES, np.zeros((0, 2), np.int32))
        return self._engine.run(given, copies)

    def copy_pages(self, page_copies: np.ndarray) -> None:
        self.copied += page_copies.tolist()
        for cache in self._engine.metadata.caches:
            pages = self._engine.read_pages(cache.name)
            pages[page_copies[:, 1]] = pages[page_copies[:, 0]]
            self._engine.write_pages(cache.name, pages)

    def read_pages(self, cache: str) -> np.ndarray:
        return self._engine.read_pages(cache)

    def write_pages(self, cache: str, pages: np.ndarray) -> None:
        self._engine.write_pages(cache, pages)

    def close(self) -> None:
        self.closed = True

    @property
    def recordings(self) -> int | None:
        return 0


def stand_in(model: onnx.ModelProto, pages: int, **limits: Any) -> tuple[TensorRtEngine, StandInRunner]:
    """An engine over a stand-in, and the stand-in."""
    runner = StandInRunner(model, pages)
    return TensorRtEngine(describe(model, **limits), runner, pages), runner
