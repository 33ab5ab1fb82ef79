"""What runs the steps of a session: the interface that every backend has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from mla_trt.metadata import LoweredMetadata

PAGE_COPIES = "page_copies"
"""The input of (from, to) pages to copy, which not every model has."""


class Engine(Protocol):
    """A lowered model with the pool of its pages.

    Attributes:
        metadata: what the model says about itself.
        pages: pages in the pool of each cache.
        token_dtype: type of the token input.
        token_features: sizes of its axes behind those of tokens: () for ids, (hidden size,) for embeddings.
        vocabulary: number of token ids, None where it is not known.
        max_tokens: most tokens of a step, in a model that cannot be packed of a sequence in a step; None: no limit.
        max_sequences: most sequences of a step, None where there is no limit.
        max_length: most tokens of a sequence, None where only the model and the pool limit it.
        results: names of the outputs that are neither caches nor states, the main one (logits) first.
    """

    metadata: LoweredMetadata
    pages: int
    token_dtype: np.dtype
    token_features: tuple[int, ...]
    vocabulary: int | None
    max_tokens: int | None
    max_sequences: int | None
    max_length: int | None
    results: tuple[str, ...]

    def run(self, inputs: Mapping[str, np.ndarray], page_copies: np.ndarray) -> dict[str, np.ndarray]:
        """Runs one step on the pool.

        Args:
            inputs: every input but the caches and `page_copies`.
            page_copies: (from, to) pages, int32 [n, 2], to copy before anything is appended.

        Returns:
            every output but the caches, by name.
        """
        ...

    def read_pages(self, cache: str) -> np.ndarray:
        """A copy of the pages of one cache, int32 [pages, page_words]."""
        ...

    def write_pages(self, cache: str, pages: np.ndarray) -> None:
        """Replaces the pages of one cache."""
        ...
