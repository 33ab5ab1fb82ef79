"""A session over a lowered model: sequences that grow token by token, together, over one pool of pages.

    session = Session("lowered/model.onnx", pages=256)
    sequence, logits = session.prefill([1, 5, 9])
    logits = session.decode({sequence: int(logits.argmax())})[sequence]

The session keeps the books (`mla_trt.pages`) and packs batches; an engine (`mla_trt.engines.engine`) holds the pages and runs
the steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import ArrayLike

from mla_trt import interface as roles
from mla_trt.engines.engine import Engine
from mla_trt.engines.engine_onnxruntime import OnnxRuntimeEngine
from mla_trt.engines.opening import DEFAULT_PAGES, open_engine
from mla_trt.errors import BadModelError, UsageError
from mla_trt.interface import ModelInput
from mla_trt.metadata import LoweredMetadata
from mla_trt.pages import UNASSIGNED, PageTable, StepPlan

Results = dict[str, np.ndarray]


class Session:
    """Sequences over a lowered model.

    Args:
        model: a lowered model in memory or its path, run on ONNX Runtime; the path of an engine, run on TensorRT; or an
            engine that is open.
        pages: pages in the pool, where the session opens the engine; None: 256, or as many as it was built for.
        base_dir: folder of the external data of a model in memory.

    Raises:
        BadModelError: the model is not a lowered one, of an unknown metadata version, or cannot be loaded.
    """

    def __init__(
        self,
        model: onnx.ModelProto | Path | str | Engine,
        *,
        pages: int | None = None,
        base_dir: Path | None = None,
    ) -> None:
        if isinstance(model, onnx.ModelProto):
            model = OnnxRuntimeEngine(model, pages=DEFAULT_PAGES if pages is None else pages, base_dir=base_dir)
        elif isinstance(model, Path | str):
            model = open_engine(model, pages=pages)
        self.engine: Engine = model
        self.metadata: LoweredMetadata = model.metadata
        if self.metadata.logits not in ("all", "last"):
            raise BadModelError(
                f"the model's metadata says logits '{self.metadata.logits}', which is neither 'all' nor 'last'"
            )
        self._table = PageTable(
            model.pages,
            self.metadata.page_size,
            max_pages=self.metadata.max_pages,
            max_position=self.metadata.max_position,
        )
        self._state_inputs = tuple(entry for entry in self.metadata.side_inputs if entry.role == roles.STATE)
        self._states: dict[int, dict[str, np.ndarray]] = {}

    @property
    def sequences(self) -> tuple[int, ...]:
        """The sequences there are, oldest first."""
        return self._table.sequences

    @property
    def free_pages(self) -> tuple[int, ...]:
        """Pages that no sequence holds."""
        return self._table.free_pages

    @property
    def free_count(self) -> int:
        """Number of pages that no sequence holds."""
        return self._table.free_count

    def pages_of(self, sequence: int) -> tuple[int, ...]:
        """Pages of a sequence, in the order of its tokens."""
        return self._table.pages_of(sequence)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence.

        Raises:
            UsageError: the sequence is unknown, as everywhere here.
        """
        return self._table.length(sequence)

    def create(self) -> int:
        """Returns a new sequence without tokens."""
        return self._table.create()

    def prefill(self, tokens: ArrayLike) -> tuple[int, np.ndarray]:
        """Begins a sequence with tokens [n, ...].

        Returns:
            the sequence and the logits of its last token, [vocabulary].

        Raises:
            OutOfPagesError: the pool has no room. There is no new sequence then.
        """
        sequence = self.create()
        try:
            return sequence, self._last_logits({sequence: tokens})[sequence]
        except BaseException:
            self.free(sequence)
            raise

    def decode(self, tokens: Mapping[int, ArrayLike]) -> dict[int, np.ndarray]:
        """Appends one token to each of some sequences.

        Args:
            tokens: token of each sequence: an id, or an embedding [hidden size].

        Returns:
            logits of each, [vocabulary].

        Raises:
            OutOfPagesError: the pool has no room. Every sequence is as before then.
        """
        return self._last_logits({sequence: np.asarray(token)[None] for sequence, token in tokens.items()})

    def step(
        self,
        batch: Mapping[int, ArrayLike],
        *,
        extra_inputs: Mapping[str, np.ndarray] | None = None,
        pad_tokens: int = 0,
        pad_sequences: int = 0,
        pad_columns: int = 0,
        unassigned: Sequence[int] = (UNASSIGNED,),
    ) -> dict[int, Results]:
        """Appends tokens to sequences, any number to each.

        Args:
            batch: tokens [n, ...] of each sequence, in the order of the batch; n may be 0.
            extra_inputs: inputs of the model that are neither tokens nor caches, as the model takes them.
            pad_tokens, pad_sequences, pad_columns: tokens behind the last sequence, sequences without tokens and
                columns of the block table to add, as a caller does that always runs the same shapes.
            unassigned: values of the entries of the block table that stand for no page, in turn.

        Returns:
            results of each sequence by name: [n, ...], or [1, ...] in a model that gives those of last tokens only.

        Raises:
            UsageError: tokens of another shape than the model's, ids outside the vocabulary, positions beyond the
                model's last one, different lengths in a model that cannot be packed.
            OutOfPagesError: the pool has no room. Every sequence is as before then.
        """
        chunks = {sequence: self._tokens(sequence, tokens) for sequence, tokens in batch.items()}
        plan = self._table.plan({sequence: len(tokens) for sequence, tokens in chunks.items()})
        if sum(plan.new) + pad_tokens == 0:
            raise UsageError("a step needs at least one token")
        if not self.metadata.packed:
            self._check_equal(plan, pad_tokens, pad_sequences)
        padding = np.zeros((pad_tokens, *self.engine.token_features), self.engine.token_dtype)
        rows = np.concatenate([*chunks.values(), padding])
        columns = self.metadata.max_pages or max((1, *map(len, plan.pages))) + pad_columns
        offsets, lengths = plan.query_offsets(), plan.cache_lengths()
        table = plan.block_table(columns, unassigned)
        if pad_sequences:
            offsets = np.append(offsets, np.repeat(offsets[-1:], pad_sequences))
            lengths = np.append(lengths, np.zeros(pad_sequences, np.int32))
            table = np.append(table, np.resize(np.array(unassigned, np.int32), (pad_sequences, columns)), axis=0)
        inputs = {
            self.metadata.token_input: rows.reshape(self._token_shape(len(rows), len(chunks))),
            "query_offsets": offsets,
            "cache_lengths": lengths,
            "block_table": table,
            **self._side_inputs(plan),
            **(extra_inputs or {}),
        }
        outputs = self.engine.run(inputs, np.array(plan.page_copies, np.int32).reshape(-1, 2))
        self._table.commit(plan)
        self._keep_states(plan, outputs)
        return self._split(plan, outputs, len(rows), len(lengths))

    def fork(self, sequence: int) -> int:
        """Returns a new sequence with the tokens of another, which shares its pages until either writes into them."""
        child = self._table.fork(sequence)
        if sequence in self._states:
            self._states[child] = dict(self._states[sequence])
        return child

    def truncate(self, sequence: int, length: int) -> None:
        """Drops the tokens of a sequence from position `length` on.

        Raises:
            UsageError: the sequence is shorter, or the model has recurrent layers, whose state cannot be taken back.
        """
        if self._state_inputs and 0 < length < self.length(sequence):
            raise UsageError(
                "a model with recurrent layers cannot drop tokens: fork the sequence before appending them"
            )
        self._table.truncate(sequence, length)
        if length == 0:
            self._states.pop(sequence, None)

    def free(self, sequence: int) -> None:
        """Ends a sequence."""
        self._table.free(sequence)
        self._states.pop(sequence, None)

    def _last_logits(self, batch: Mapping[int, ArrayLike]) -> dict[int, np.ndarray]:
        main = self.engine.results[0]
        return {sequence: results[main][-1] for sequence, results in self.step(batch).items()}

    def _tokens(self, sequence: int, tokens: ArrayLike) -> np.ndarray:
        dtype, features = self.engine.token_dtype, self.engine.token_features
        rows = np.asarray(tokens)
        if rows.size == 0:
            rows = rows.reshape(0, *features).astype(dtype)
        if rows.ndim != 1 + len(features) or rows.shape[1:] != features:
            wanted = ", ".join(map(str, ("n", *features)))
            raise UsageError(f"tokens of sequence {sequence} must be [{wanted}], not {list(rows.shape)}")
        if dtype.kind in "iu":
            if rows.dtype.kind not in "iu":
                raise UsageError(f"tokens of sequence {sequence} must be integers, not {rows.dtype}")
            limit = self.engine.vocabulary
            outside = rows[(rows < 0) | (rows >= (limit if limit is not None else np.iinfo(dtype).max))]
            if outside.size:
                known = "" if limit is None else f"; the model has ids 0 to {limit - 1}"
                raise UsageError(f"token {outside[0]} of sequence {sequence} is not in the vocabulary{known}")
        return rows.astype(dtype)

    def _token_shape(self, tokens: int, sequences: int) -> list[int]:
        sizes = {"T": tokens, "B": sequences, "S": tokens // max(1, sequences)}
        leading = [sizes[axis] if axis in sizes else int(axis) for axis in self.metadata.token_axes]
        return [*leading, *self.engine.token_features]

    def _check_equal(self, plan: StepPlan, pad_tokens: int, pad_sequences: int) -> None:
        if len(set(plan.new)) > 1 or len(set(plan.cached)) > 1 or pad_tokens or pad_sequences:
            raise UsageError(
                "a model with recurrent layers takes sequences of equal lengths only, without padding: "
                "run the others in another step"
            )
        for axis, count, what in (("B", len(plan.sequences), "sequence"), ("S", max(plan.new, default=0), "token")):
            if axis not in self.metadata.token_axes and count > 1:
                raise UsageError(
                    f"the model was exported for one {what} at a time, and its recurrent layers take no more"
                )

    def _side_inputs(self, plan: StepPlan) -> dict[str, np.ndarray]:
        if not self.metadata.side_inputs or not plan.sequences:
            return {}
        sizes = {"B": len(plan.sequences), "S": plan.new[0], "P": plan.cached[0], "T": plan.cached[0] + plan.new[0]}
        values = {}
        for entry in self.metadata.side_inputs:
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(entry.dtype))
            if entry.role == roles.ATTENTION_MASK:
                values[entry.name] = np.ones(_shape(entry, sizes), dtype)
            elif entry.role == roles.STATE:
                empty = np.zeros(_shape(entry, sizes | {"B": 1}), dtype)
                rows = [self._states.get(sequence, {}).get(entry.name, empty) for sequence in plan.sequences]
                values[entry.name] = np.concatenate(rows, axis=entry.axes.index("B"))
        return values

    def _keep_states(self, plan: StepPlan, outputs: Results) -> None:
        for entry in self._state_inputs:
            rows = np.split(outputs[str(entry.output)], len(plan.sequences), axis=entry.axes.index("B"))
            for sequence, row in zip(plan.sequences, rows, strict=True):
                self._states.setdefault(sequence, {})[entry.name] = row

    def _split(self, plan: StepPlan, outputs: Results, tokens: int, sequences: int) -> dict[int, Results]:
        """The rows of each sequence, of every result with a row for each token (logits 'last': sequence)."""
        last = self.metadata.logits == "last"
        starts = np.arange(len(plan.sequences) + 1) if last else plan.query_offsets()
        count = sequences if last else tokens
        found: dict[int, Results] = {sequence: {} for sequence in plan.sequences}
        for name in self.engine.results:
            rows = _by_row(outputs[name], count)
            if rows is None:
                if name == self.engine.results[0]:
                    raise BadModelError(
                        f"the result '{name}' of shape {list(outputs[name].shape)} has not {count} rows"
                    )
                continue
            for index, sequence in enumerate(plan.sequences):
                found[sequence][name] = rows[starts[index] : starts[index + 1]]
        return found


def _shape(entry: ModelInput, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in entry.axes)


def _by_row(value: np.ndarray, count: int) -> np.ndarray | None:
    """A result [count, ...], or with two axes that make count together, as [count, ...]; None where it is neither."""
    if value.ndim >= 3 and value.shape[0] * value.shape[1] == count:
        return value.reshape(count, *value.shape[2:])
    return value if value.ndim and value.shape[0] == count else None
