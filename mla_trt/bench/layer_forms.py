"""The forms of the layer that `mla-trt bench layer` measures, as engines."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper

from mla_trt.bench.layer_step import (
    EXPORTED,
    GROWING,
    INDEX_CACHE,
    KV_CACHE,
    OURS,
    PAGE,
    SPARSE,
    LayerStep,
    query_terms_of,
    row_format_of,
    weights_of,
)
from mla_trt.models.attention_layer import (
    LayerDimensions,
    LayerWeights,
    absorbed_layer,
    exported_layer,
    save_layer,
)

KV_CACHE_OUT = "kv_cache_out.0"
INDEX_CACHE_OUT = "indexer_cache_out.0"
SELECTION = "selection"


class Runnable(Protocol):
    """An engine with the tensors of a step; see `mla_trt.bench.step_engine.StepEngine`."""

    def run(self) -> None:
        """Runs the step."""

    def record(self) -> None:
        """Records it."""

    def time(self, launches: int) -> float:
        """us of a launch of the recording."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The value of a tensor."""
        ...

    def write(self, name: str, values: np.ndarray, start: int) -> None:
        """Replaces values of a tensor from an element on."""

    def close(self) -> None:
        """Gives the memory back."""


Build = Callable[[str, str, LayerStep], tuple[Runnable, float]]
"""Makes the engine of a form (its name, the case's name, the step); returns it with the seconds that its building took."""


class TensorRtForms:
    """Builds the engines of the forms in a folder.

    Args:
        folder: for weights, models and engines; about 2 GB.
        trt: the module `tensorrt`.
        stream: that engines run on.
        dimensions, weights: of the layer; the weights lie in the folder.
        optimization_level: TensorRT's.
        plugins: the plugin library; None: the one that is found.
    """

    def __init__(
        self,
        folder: Path,
        trt: Any,
        stream: Any,
        dimensions: LayerDimensions,
        weights: LayerWeights,
        *,
        optimization_level: int,
        plugins: Path | None,
    ) -> None:
        self._folder, self._trt, self._stream = folder, trt, stream
        self._dimensions, self._weights = dimensions, weights
        self._level, self._plugins = optimization_level, plugins
        self._cache = folder / "timing.cache"
        self.plugin_build = ""

    def build(self, form: str, name: str, step: LayerStep) -> tuple[Runnable, float]:
        """See `Build`."""
        from mla_trt.bench.step_engine import StepEngine, build_static

        plan = self._folder / "plan"
        started = time.monotonic()
        inputs: dict[str, np.ndarray]
        aliases: dict[str, str] = {}
        if form.startswith(OURS):
            row_format = row_format_of(form)
            dimensions = self._dimensions if form.startswith(SPARSE) else replace(self._dimensions, index_heads=0)
            self._build_ours(form, dimensions, step, plan)
            inputs = step.for_sparse(row_format) if form.startswith(SPARSE) else step.for_lowered(row_format)
            aliases = {KV_CACHE_OUT: KV_CACHE} | ({INDEX_CACHE_OUT: INDEX_CACHE} if form.startswith(SPARSE) else {})
        else:
            batch, keys = step.case.batch, step.case.keys
            dimensions = replace(self._dimensions, index_heads=0)
            if form == EXPORTED:
                model = exported_layer(dimensions, self._weights, batch=batch, new=1, past=keys - 1)
                inputs = step.for_exported()
            else:
                grows = form == GROWING
                model = absorbed_layer(dimensions, self._weights, batch=batch, total=keys, grows=grows)
                inputs = step.for_growing() if grows else step.for_absorbed()
            path = save_layer(model, self._folder / "peer.onnx")
            build_static(self._trt, path, plan, optimization_level=self._level, timing_cache=self._cache)
        seconds = time.monotonic() - started
        engine = StepEngine(self._trt, plan, inputs, aliases, self._stream)
        plan.unlink()
        return engine, seconds

    def _build_ours(self, form: str, dimensions: LayerDimensions, step: LayerStep, plan: Path) -> None:
        from mla_trt.engines.building import BuildOptions, build_file

        options = BuildOptions(
            max_batch=step.case.batch,
            max_tokens=step.case.batch,
            max_length=step.case.keys,
            pages=step.pages,
            query_terms=query_terms_of(form),
            weights=weights_of(form),
            optimization_level=self._level,
            timing_cache=self._cache,
            plugins=self._plugins,
        )
        lowered = lowered_layer(self._folder, row_format_of(form), dimensions, self._weights, weights_of(form))
        description, _ = build_file(lowered, plan, options)
        self.plugin_build = description.plugins


def lowered_layer(
    folder: Path, row_format: str, dimensions: LayerDimensions, weights: LayerWeights, kind: str = "keep"
) -> Path:
    """The layer as `mla-trt lower` writes it, in a folder that holds its weights; made when it is asked for first. With an indexer its
    selection is an output too. `kind`: the option `--weights`."""
    from mla_trt.lowering import LowerOptions
    from mla_trt.pipeline import lower_file

    output = folder / f"lowered-{'sparse-' if dimensions.index_heads else ''}{row_format}-{kind}"
    if not output.exists():
        export = save_layer(exported_layer(dimensions, weights), folder / "export.onnx")
        lower_file(export, output, LowerOptions(kv_format=row_format, page_size=PAGE, weights=kind), verify=False)
        if dimensions.index_heads:
            _show_selection(output / "model.onnx", dimensions.top_k)
    return output


def _show_selection(path: Path, top_k: int) -> None:
    model = onnx.load(path, load_external_data=False)
    (node,) = (node for node in model.graph.node if node.op_type == "MlaSparseAttention")
    place = list(node.output).index(next(name for name in node.output if name.endswith("indices")))
    node.output[place] = SELECTION
    tokens = next(value for value in model.graph.input if value.name == "hidden_states").type.tensor_type.shape.dim[1]
    model.graph.output.append(helper.make_tensor_value_info(SELECTION, TensorProto.INT32, [tokens.dim_param, top_k]))
    path.write_bytes(model.SerializeToString())
