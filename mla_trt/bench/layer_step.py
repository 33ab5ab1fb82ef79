"""What `mla-trt bench layer` runs: the values of a decoding step in the layout of each form of the layer, and what they must give."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mla_trt.bench.check import relative_error
from mla_trt.formats import IndexLayout, KvLayout, ceil_div
from mla_trt.models.attention_layer import LayerDimensions, index_scores, layer_reference, rope_tables
from mla_trt.models.weights import NUMPY_TYPES

PAGE = 64
DISTINCT_PAGES = 61
EXPORTED, ABSORBED, OURS = "as exported", "absorbed by hand", "ours"
SPARSE = f"{OURS} with an indexer"
GROWING = "absorbed by hand, cache from past to present"
KV_CACHE, INDEX_CACHE = "kv_cache.0", "indexer_cache.0"
LEAST_ALIKE = 0.95
"""Of the keys that the reference selects; near the last one rounding decides."""


@dataclass(frozen=True)
class LayerCase:
    """Sequences that decode a token each, and the keys of each, the new token's among them; whether the layer is measured with an indexer
    too."""

    batch: int
    keys: int
    sparse: bool = False


def row_format_of(form: str) -> str:
    """Of a form of ours."""
    return form.split()[-1].partition("/")[0].partition(":")[0]


def query_terms_of(form: str) -> int | None:
    """What a form of ours says behind its row format, as in `fp8:1`; None: the default."""
    terms = form.split()[-1].partition("/")[0].partition(":")[2]
    return int(terms) if terms else None


def weights_of(form: str) -> str:
    """What a form of ours says of its weights at the end, as in `fp8:1/fp8`; "keep" where it does not."""
    return form.split()[-1].partition("/")[2] or "keep"


class LayerStep:
    """The values of a decoding step, in the layout of each form.

    The cached rows repeat a few pages, which lie in another order in each sequence. They are values of the first row format, so
    that its rounding is in all forms and what differs is the computation.

    Args:
        dimensions: of the layer.
        case: sizes of the step.
        dtype: ONNX type of the layer.
        row_format: whose values the cached rows have.
        seed: of the values.
    """

    def __init__(
        self, dimensions: LayerDimensions, case: LayerCase, dtype: int, row_format: str, *, seed: int = 0
    ) -> None:
        self.dimensions, self.case, self.numpy_type = dimensions, case, NUMPY_TYPES[dtype]
        rng = np.random.default_rng(seed)
        d, columns = dimensions, ceil_div(case.keys, PAGE)
        self.hidden = rng.standard_normal((case.batch, d.hidden), np.float32).astype(self.numpy_type)
        self.cos, self.sin = (table.astype(self.numpy_type) for table in rope_tables(d, case.keys - 1))
        self.contents = rng.integers(0, DISTINCT_PAGES, (case.batch, columns))
        self.block_table = rng.permutation(case.batch * columns).reshape(case.batch, columns).astype(np.int32)
        self._row_format = row_format
        self._drawn = rng.standard_normal((DISTINCT_PAGES * PAGE, d.rank + d.rope), np.float32)
        layout = self.layout(row_format)
        pages, places = layout.empty(DISTINCT_PAGES), np.divmod(np.arange(len(self._drawn)), PAGE)
        layout.write(pages, *places, self._drawn[:, : d.rank], self._drawn[:, d.rank :])
        values = np.concatenate(layout.read(pages, *places), axis=1).astype(self.numpy_type)
        self._values = values.reshape(DISTINCT_PAGES, PAGE, d.rank + d.rope)
        if case.sparse:
            drawn = rng.standard_normal((len(self._drawn), d.index_dim), np.float32)
            self._index_pages = self.index_layout.empty(DISTINCT_PAGES)
            self.index_layout.write(self._index_pages, *places, drawn)
            self._index_values = self.index_layout.read(self._index_pages, *places).astype(np.float32)

    @property
    def pages(self) -> int:
        """Pages of the pool, all of them in use."""
        return self.block_table.size

    def layout(self, row_format: str) -> KvLayout:
        """The layout of the pool's pages."""
        return KvLayout(PAGE, row_format, self.dimensions.rank, self.dimensions.rope)

    @property
    def index_layout(self) -> IndexLayout:
        """The layout of the pages of index keys."""
        return IndexLayout(PAGE, "fp8", self.dimensions.index_dim)

    def index_rows(self, sequence: int) -> np.ndarray:
        """The cached index keys of a sequence, f32 [keys - 1, Di]."""
        pages = self._index_values.reshape(DISTINCT_PAGES, PAGE, -1)
        return pages[self.contents[sequence]].reshape(-1, pages.shape[2])[: self.case.keys - 1]

    def rows(self, sequence: int) -> np.ndarray:
        """The cached rows of a sequence, [keys - 1, R + Dr], the halves of the rope apart."""
        rows = self._values[self.contents[sequence]].reshape(-1, self._values.shape[2])
        return rows[: self.case.keys - 1]

    def for_exported(self) -> dict[str, np.ndarray]:
        """Inputs of `exported_layer`."""
        d, batch = self.dimensions, self.case.batch
        rows = np.stack([self.rows(sequence) for sequence in range(batch)])[:, None]
        return {
            "hidden_states": self.hidden[:, None],
            "cos": self._angles(self.cos)[:, None],
            "sin": self._angles(self.sin)[:, None],
            "attention_mask": np.zeros((batch, 1, 1, self.case.keys), self.numpy_type),
            "past_latent": rows[..., : d.rank],
            "past_rope": rows[..., d.rank :],
        }

    def for_absorbed(self) -> dict[str, np.ndarray]:
        """Inputs of `absorbed_layer`; the new token's row is zeros."""
        cache = np.zeros((self.case.batch, self.case.keys, self._values.shape[2]), self.numpy_type)
        for sequence in range(self.case.batch):
            cache[sequence, :-1] = self.rows(sequence)
        return {
            "hidden_states": self.hidden,
            "cos": self._angles(self.cos),
            "sin": self._angles(self.sin),
            "cache": cache,
        }

    def for_growing(self) -> dict[str, np.ndarray]:
        """Inputs of `absorbed_layer` with a cache that grows."""
        inputs = self.for_absorbed()
        return {**inputs, "past": np.ascontiguousarray(inputs.pop("cache")[:, :-1])}

    def for_lowered(self, row_format: str) -> dict[str, np.ndarray]:
        """Inputs of the lowered layer. The rope of its rows has the pairs together."""
        d, batch = self.dimensions, self.case.batch
        layout = self.layout(row_format)
        exact = row_format == self._row_format
        rows = self._drawn if exact else self._values.reshape(self._drawn.shape).astype(np.float32)
        rope = rows[:, d.rank :].reshape(-1, 2, d.rope // 2).transpose(0, 2, 1).reshape(-1, d.rope)
        distinct = layout.empty(DISTINCT_PAGES)
        layout.write(distinct, *np.divmod(np.arange(len(rows)), PAGE), rows[:, : d.rank], rope)
        pool = layout.empty(self.pages)
        pool[self.block_table.reshape(-1)] = distinct[self.contents.reshape(-1)]
        return {
            "hidden_states": self.hidden[None],
            "cos": self._angles(self.cos)[None],
            "sin": self._angles(self.sin)[None],
            "query_offsets": np.arange(batch + 1, dtype=np.int32),
            "cache_lengths": np.full(batch, self.case.keys - 1, np.int32),
            "block_table": self.block_table,
            KV_CACHE: pool,
        }

    def for_sparse(self, row_format: str) -> dict[str, np.ndarray]:
        """Inputs of the lowered layer with an indexer."""
        pool = self.index_layout.empty(self.pages)
        pool[self.block_table.reshape(-1)] = self._index_pages[self.contents.reshape(-1)]
        return {**self.for_lowered(row_format), INDEX_CACHE: pool}

    def least_bytes(self, form: str) -> int:
        """Bytes that a step has to move: weights, and the rows of the cache (ours: in its format)."""
        row_format = row_format_of(form) if form.startswith(OURS) else "bf16"
        layout, d, keys = self.layout(row_format), self.dimensions, self.case.keys
        row = layout.content_bytes + (4 if layout.has_page_scales else 0)
        if not form.startswith(SPARSE):
            return self._weight_bytes(replace(d, index_heads=0), form) + self.case.batch * keys * row
        index = self.index_layout
        index_row = index.content_bytes + (4 if index.has_page_scales else 0)
        return self._weight_bytes(d, form) + self.case.batch * (min(d.top_k, keys) * row + keys * index_row)

    def _weight_bytes(self, dimensions: LayerDimensions, form: str) -> int:
        size = 1 if form.startswith(OURS) and weights_of(form) == "fp8" else self.numpy_type.itemsize
        return sum(math.prod(shape) for shape in dimensions.weight_shapes().values()) * size

    def _angles(self, half: np.ndarray) -> np.ndarray:
        """cos or sin of the new tokens, [batch, Dr]."""
        return np.tile(np.concatenate([half, half]), (self.case.batch, 1))


def references(step: LayerStep, arrays: dict[str, np.ndarray]) -> dict[int, np.ndarray]:
    """Expected outputs of the first and the last sequence.

    Args:
        step: the step.
        arrays: weights in f32.
    """
    cos, sin = step.cos.astype(np.float32), step.sin.astype(np.float32)
    return {
        sequence: layer_reference(
            step.dimensions,
            arrays,
            step.hidden[sequence].astype(np.float32),
            cos,
            sin,
            step.rows(sequence).astype(np.float32),
        )
        for sequence in sorted({0, step.case.batch - 1})
    }


def sparse_errors(step: LayerStep, arrays: dict[str, np.ndarray]) -> Callable[[np.ndarray, np.ndarray], float]:
    """What says the error of the layer with an indexer, of its outputs [batch, hidden] and selections [batch, top_k].

    Args:
        step: the step.
        arrays: weights in f32.
    """
    d, layout = step.dimensions, step.index_layout
    cos, sin = step.cos.astype(np.float32), step.sin.astype(np.float32)

    def quantize(rows: np.ndarray) -> np.ndarray:
        pages, places = layout.empty(len(rows)), (np.arange(len(rows)), np.zeros(len(rows), np.int64))
        layout.write(pages, *places, rows.astype(step.numpy_type).astype(np.float32))
        return layout.read(pages, *places).astype(np.float32)

    def error(output: np.ndarray, selections: np.ndarray) -> float:
        worst = 0.0
        for sequence in sorted({0, step.case.batch - 1}):
            hidden, rows = step.hidden[sequence].astype(np.float32), step.index_rows(sequence)
            scores = index_scores(d, arrays, hidden, cos, sin, rows, quantize)
            chosen = selections[sequence][selections[sequence] >= 0]
            wanted = np.argsort(-scores, kind="stable")[: d.top_k]
            if len(chosen) != len(wanted) or len(np.intersect1d(chosen, wanted)) < LEAST_ALIKE * len(wanted):
                return math.inf
            expected = layer_reference(d, arrays, hidden, cos, sin, step.rows(sequence).astype(np.float32), chosen)
            worst = max(worst, relative_error(output[sequence], expected))
        return worst

    return error
