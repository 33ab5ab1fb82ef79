"""Whether a kernel that is measured is right: some tokens alone, over copies of their sequence's pages, against the op's reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper

from mla_trt.bench.case_data import PLACES, CaseData, bytes_of, shape_of
from mla_trt.bench.cases import Case, Pool
from mla_trt.formats import IndexLayout
from mla_trt.ops import OPS

Array = npt.NDArray[Any]

SAMPLED_HEADS = 3


def relative_error(found: Array, expected: Array) -> float:
    """Frobenius norm of the difference over that of ``expected``; infinite where anything is NaN."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    error = float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-30))
    return error if math.isfinite(error) else math.inf


class Checker:
    """Compares tokens of a set that has run with the op's reference."""

    def __init__(self, case: Case, data: CaseData) -> None:
        self.case, self.data, self.op = case, data, OPS[case.op_type]
        step = {name: content for name, content in case.inputs.items() if isinstance(content, np.ndarray)}
        if "positions" in step:
            self.sequence_of, self.positions, self.table = (
                step[name] for name in ("token_sequence", "positions", "block_table")
            )
            self.tokens = len(self.positions)
        else:  # an op without a cache: its first input has the tokens
            self.tokens = shape_of(data.kinds[self.op.inputs[0].name])[0]

    def error(self, token: int) -> float:
        """The largest error of the checked outputs of one token."""
        given, heads = self._one_token(token)
        attributes = dict(self.case.attributes)
        expected = self.op.reference(self.op.complete(attributes, self.case.op_type), given)
        shapes = {output.name: output.shape for output in self.op.outputs}
        errors = []
        for name in self.case.checked:
            if name.removesuffix("_out") in PLACES:
                errors.append(self._row_error(name, token, expected[name]))
                continue
            found = self._slice(name, shapes[name].split(), token, heads)
            if name == "indices":
                chosen, wanted = (set(lists.reshape(-1).tolist()) - {-1} for lists in (found, expected[name]))
                others = self._different_keys(given, wanted - chosen) + self._different_keys(given, chosen - wanted)
                errors.append(others / max(len(wanted), 1) / 2)
            else:
                errors.append(relative_error(found, expected[name]))
        return max(errors)

    def _different_keys(self, given: Mapping[str, Array], keys: set[int]) -> int:
        """Keys, equal cached ones counted once. The pool repeats its pages, so that a key stands in it several times with one score:
        where another's is within rounding of that, all of its places are listed or none."""
        content, cache = self.case.inputs["indexer_cache"], given["indexer_cache"]
        assert isinstance(content, Pool)
        assert isinstance(content.layout, IndexLayout)
        size = content.layout.page_size
        cached = [key for key in sorted(keys) if 0 <= key < len(cache) * size]
        rows = content.layout.read(cache, *np.divmod(np.array(cached, int), size))
        return len(np.unique(rows, axis=0)) + len(keys) - len(cached)

    def _one_token(self, token: int) -> tuple[dict[str, Array], Array | None]:
        shapes = {formal.name: formal.shape for formal in self.op.inputs}
        if "positions" not in self.case.inputs:  # sums over heads, or scales that several share
            slices = {name: self._slice(name, (shapes[name] or "").split(), token, None) for name in self.case.inputs}
            return slices, None
        heads = self._sampled_heads(shapes)
        sequence, position = int(self.sequence_of[token]), int(self.positions[token])
        used = self.table[sequence, : position // self.case.attributes["page_size"] + 1]
        replaced: dict[str, Array] = {
            "query_offsets": np.array([0, 1], np.int32),
            "cache_lengths": np.array([position], np.int32),
            "token_sequence": np.zeros(1, np.int32),
            "positions": np.array([position], np.int32),
            "block_table": np.arange(len(used), dtype=np.int32)[None],
        }
        given: dict[str, Array] = {}
        for name in self.case.inputs:
            if name in PLACES:
                given[name] = self._gather(name, used)
            elif name in replaced:
                given[name] = replaced[name]
            else:
                given[name] = self._slice(name, (shapes[name] or "").split(), token, heads)
        return given, heads

    def _sampled_heads(self, shapes: Mapping[str, str | None]) -> Array:
        for name in self.case.inputs:
            words = (shapes[name] or "").split()
            if "H" in words:
                count = shape_of(self.data.kinds[name])[words.index("H")]
                return np.unique(np.linspace(0, count - 1, SAMPLED_HEADS).astype(int))
        return np.zeros(0, int)

    def _slice(self, name: str, words: Sequence[str], token: int, heads: Array | None) -> Array:
        """The part of a tensor that belongs to the token and the sampled heads; None: to all heads."""
        kind, memory = self.data.kinds[name], self.data.memory[name]
        shape, dtype = shape_of(kind), helper.tensor_dtype_to_np_dtype(kind.dtype)
        if words[0] in ("T", "N", "index_N"):  # cos and sin have a row for each token
            row = bytes_of(kind) // shape[0]
            values = memory.read(token * row, row).view(dtype).reshape(1, *shape[1:])
        else:
            values = memory.read().view(dtype).reshape(shape)
        return values.take(heads, axis=words.index("H")) if heads is not None and "H" in words else values

    def _gather(self, name: str, used: Array) -> Array:
        words = shape_of(self.data.kinds[name])[1]
        pages = [self.data.memory[name].read(4 * words * int(page), 4 * words) for page in used]
        return np.stack(pages).view(np.int32)

    def _row_error(self, name: str, token: int, expected: Array) -> float:
        """Of the row that the token wrote."""
        content = self.case.inputs[name.removesuffix("_out")]
        assert isinstance(content, Pool)
        layout, position = content.layout, int(self.positions[token])
        used = self.table[int(self.sequence_of[token]), : position // layout.page_size + 1]
        found = self._gather(name, used)
        place = np.array([len(used) - 1]), np.array([position % layout.page_size])
        rows = [layout.read(pool, *place) for pool in (found, expected)]  # type: ignore[attr-defined]
        values = [np.concatenate(row, axis=1) if isinstance(row, tuple) else row for row in rows]
        return relative_error(*values)


def largest_error(case: Case, data: CaseData) -> float:
    """Of the first, the middle and the last token of a set that has run."""
    checker = Checker(case, data)
    return max(checker.error(token) for token in {0, checker.tokens // 2, checker.tokens - 1})
