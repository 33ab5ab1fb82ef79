"""An engine that remembers the last step, for those who compare steps rather than use them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mla_trt.engines.engine import PAGE_COPIES, Engine

POISON = np.int32(-1)
"""Every bit set: NaN in each of the formats of rows and scales."""


class RecordingEngine:
    """Passes everything on to an engine.

    Attributes:
        inputs: those of the last step, the caches as they were before it among them where `keep_caches` is set.
        outputs: those of the last step, likewise.
    """

    def __init__(self, engine: Engine, *, keep_caches: bool = False) -> None:
        self.metadata = engine.metadata
        self.pages = engine.pages
        self.token_dtype = engine.token_dtype
        self.token_features = engine.token_features
        self.vocabulary = engine.vocabulary
        self.max_tokens = engine.max_tokens
        self.max_sequences = engine.max_sequences
        self.max_length = engine.max_length
        self.results = engine.results
        self.inputs: dict[str, np.ndarray] = {}
        self.outputs: dict[str, np.ndarray] = {}
        self._engine = engine
        self._kept = [cache for cache in engine.metadata.caches if keep_caches]

    def run(self, inputs: Mapping[str, np.ndarray], page_copies: np.ndarray) -> dict[str, np.ndarray]:
        """Runs one step."""
        before = {cache.name: self.read_pages(cache.name) for cache in self._kept}
        self.inputs = {**inputs, PAGE_COPIES: page_copies, **before}
        found = self._engine.run(inputs, page_copies)
        self.outputs = found | {cache.output: self.read_pages(cache.name) for cache in self._kept}
        return found

    def read_pages(self, cache: str) -> np.ndarray:
        """A copy of the pages of one cache."""
        return self._engine.read_pages(cache)

    def write_pages(self, cache: str, pages: np.ndarray) -> None:
        """Replaces the pages of one cache."""
        self._engine.write_pages(cache, pages)

    def poison(self, pages: tuple[int, ...]) -> None:
        """Fills pages of every cache with NaN bits, so that whoever reads what is not theirs shows."""
        for cache in self.metadata.caches:
            values = self.read_pages(cache.name)
            values[list(pages)] = POISON
            self.write_pages(cache.name, values)
