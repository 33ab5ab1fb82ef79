"""Runs a lowered model on ONNX Runtime on the CPU, by the function bodies that it carries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from mla_trt.engines.engine import PAGE_COPIES
from mla_trt.engines.onnxruntime_session import RuntimeErrors, input_dtype, one_line, open_session
from mla_trt.errors import BadModelError, MlaTrtError
from mla_trt.metadata import LoweredMetadata


class OnnxRuntimeEngine:
    """The engine of a CPU. See `mla_trt.engines.engine.Engine` for its attributes.

    Args:
        model: a lowered model, or its path.
        pages: pages in the pool of each cache.
        base_dir: folder of the external data of a model in memory.

    Raises:
        BadModelError: the model is not a lowered one, or cannot be loaded.
    """

    def __init__(self, model: onnx.ModelProto | Path | str, *, pages: int, base_dir: Path | None = None) -> None:
        graph_only = model if isinstance(model, onnx.ModelProto) else load_structure(model)
        self.metadata = LoweredMetadata.of(graph_only)
        self.pages = pages
        self.max_tokens: int | None = None
        self.max_sequences: int | None = None
        self.max_length: int | None = None
        self.vocabulary = self.metadata.vocabulary or embedded_vocabulary(graph_only, self.metadata.token_input)
        self._session = open_session(model, base_dir=base_dir)
        inputs = {entry.name: entry for entry in self._session.get_inputs()}
        outputs = [entry.name for entry in self._session.get_outputs()]
        token_input = inputs.get(self.metadata.token_input)
        if token_input is None or any(
            cache.name not in inputs or cache.output not in outputs for cache in self.metadata.caches
        ):
            raise BadModelError(
                "the model's mla_trt metadata names inputs or outputs that it does not have: lower it again"
            )
        self.token_dtype = input_dtype(token_input)
        # Ids have no axes but those of tokens; embeddings have one more.
        features = token_input.shape[len(token_input.shape) - (self.token_dtype.kind not in "iu") :]
        self.token_features = tuple(int(size) for size in features)
        self._inputs = inputs.keys() - {cache.name for cache in self.metadata.caches}
        next_values = {cache.output for cache in self.metadata.caches} | {
            entry.output for entry in self.metadata.side_inputs
        }
        self.results = tuple(name for name in outputs if name not in next_values)
        self._outputs = outputs
        # Held as ONNX Runtime's own tensors: what one step gives, the next takes, without a copy between.
        self._caches = {
            cache.name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((pages, cache.page_words), np.int32))
            for cache in self.metadata.caches
        }

    def run(self, inputs: Mapping[str, np.ndarray], page_copies: np.ndarray) -> dict[str, np.ndarray]:
        """Runs one step on the pool; see `mla_trt.engines.engine.Engine.run`.

        Raises:
            MlaTrtError: ONNX Runtime fails, or an input is missing. The pool is as before.
        """
        feeds = dict(inputs)
        if PAGE_COPIES in self._inputs:
            feeds[PAGE_COPIES] = page_copies
        elif len(page_copies):
            self._copy_pages(page_copies)
        missing = sorted(self._inputs - feeds.keys())
        if missing:
            raise MlaTrtError(
                f"the model also needs the inputs {', '.join(missing)}: give them as extra inputs of the step"
            )
        values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)) for name, value in feeds.items()
        }
        try:
            found = self._session.run_with_ort_values(self._outputs, values | self._caches)
        except RuntimeErrors as error:
            raise MlaTrtError(f"ONNX Runtime cannot run the step: {one_line(error)}") from None
        outputs = dict(zip(self._outputs, found, strict=True))
        self._caches = {cache.name: outputs.pop(cache.output) for cache in self.metadata.caches}
        return {name: value.numpy() for name, value in outputs.items()}

    def read_pages(self, cache: str) -> np.ndarray:
        """A copy of the pages of one cache, int32 [pages, page_words]."""
        return self._caches[cache].numpy().copy()

    def write_pages(self, cache: str, pages: np.ndarray) -> None:
        """Replaces the pages of one cache."""
        self._caches[cache] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(pages, np.int32))

    def _copy_pages(self, page_copies: np.ndarray) -> None:
        for name in self._caches:
            pages = self.read_pages(name)
            pages[page_copies[:, 1]] = pages[page_copies[:, 0]]
            self.write_pages(name, pages)


def load_structure(path: Path | str) -> onnx.ModelProto:
    """Reads a model file, leaving external data where it is.

    Raises:
        BadModelError: the file is missing or no ONNX model.
    """
    try:
        return onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise BadModelError(f"cannot read '{path}': {error.strerror}") from None
    except Exception as error:  # protobuf has no error class of its own that all of its versions share
        raise BadModelError(f"'{path}' is not an ONNX model: {one_line(error)}") from None


def embedded_vocabulary(model: onnx.ModelProto, token_input: str) -> int | None:
    """Rows of the embedding table that token ids look up, where the look-up is the first thing done with them."""
    tables = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 2}
    decoded: dict[str, int] = {}  # of tables of codes
    names = {token_input}
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[1] in names:
            return tables.get(node.input[0]) or decoded.get(node.input[0])
        if node.op_type == "DequantizeLinear" and node.input[0] in tables:
            decoded[node.output[0]] = tables[node.input[0]]
        if node.op_type in ("Cast", "Mul", "Reshape") and node.input[0] in decoded:  # scaled block by block
            decoded[node.output[0]] = decoded[node.input[0]]
        if node.op_type in ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze") and node.input[0] in names:
            names.add(node.output[0])
    return None
