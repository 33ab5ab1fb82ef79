"""Drives an exported model as a session: token chunks go in, results come out, caches are carried along.

The inputs that exports ask for beside tokens (positions, masks, rope tables, caches) are made here from the roles of
its interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import ArrayLike

from mla_trt import interface as roles
from mla_trt.engines.onnxruntime_session import RuntimeErrors, input_dtype, one_line, open_session
from mla_trt.errors import BadModelError, MlaTrtError, UsageError
from mla_trt.interface import ModelInput, ModelInterface

ROPE_THETA = 10000.0
LONGEST_TRIED_MINIMUM = 16
DEFAULT_ROWS = 64  # of full-length caches that may have any number
SAME = 1e-5  # relative to the largest value: what rounding may make of equal results


class RefusedLengthError(MlaTrtError):
    """The export does not run with these lengths."""


@dataclass(frozen=True)
class Limits:
    """The lengths, in tokens, that an export accepts.

    Attributes:
        first: fewest tokens of a first call, on an empty cache; None where an empty cache is refused.
        step: fewest tokens of a later call. Exports without a cache run everything again, so 1.
        past: fewest cached tokens of a call that is not the first; 0 where the export has no cache.
        total: most tokens that a sequence can have, or the bound of the search.
        only: the one length that an export without a cache takes, where that is fixed.
        window: rows of zeros, hidden by the mask, with which the caches of a sequence begin. Where an export fixes the
            number of cached rows, its tokens take their places one by one; else they come behind them.
        made: first tokens of every sequence that no call can give results of. Their rows in the caches are made by calls
            beside other rows, on which they do not depend.
    """

    first: int | None
    step: int
    past: int
    total: int
    only: int | None = None
    window: int = 0
    made: int = 0

    @property
    def can_begin(self) -> bool:
        """Whether results of sequences can be had that begin with their first token."""
        return self.first is not None or self.made > 0


class OriginalModel:
    """An export, open on ONNX Runtime. It holds no sequence: `start` gives runs that share it.

    Args:
        model: a path, or a model in memory.
        interface: roles and axes of its inputs.
        base_dir: folder of the external data of a model in memory.
        rope_dim: width of the rotated part of a head. Where the export takes cosines and sines, it tells tables of full
            width (each frequency twice, cat(f, f)) from those of half width; without it they are taken to be of full
            width.

    Raises:
        BadModelError: ONNX Runtime cannot load the model.
    """

    def __init__(
        self,
        model: onnx.ModelProto | Path | str,
        interface: ModelInterface,
        *,
        base_dir: Path | None = None,
        rope_dim: int | None = None,
    ) -> None:
        self.interface = interface
        self.results = interface.results
        self.has_cache = bool(interface.by_role(roles.CACHE))
        self.has_state = bool(interface.by_role(roles.STATE))
        self.fixed_batch = interface.fixed.get("B") if "B" in interface.tokens.axes else 1
        self.fixed_new = interface.fixed.get("S")
        self.fixed_past = interface.fixed.get("P")
        self._fixed_rows = interface.fixed.get("L")
        self._rows = self._fixed_rows or DEFAULT_ROWS
        self._rope_dim = rope_dim
        self._session = open_session(model, base_dir=base_dir)
        # Types are those of the model given, which may be a float32 copy of the one that the interface describes.
        self._dtypes = {entry.name: input_dtype(entry) for entry in self._session.get_inputs()}
        self._outputs = [output.name for output in self._session.get_outputs()]

    @property
    def carries(self) -> bool:
        """Whether anything goes from one call to the next. A cache that must be empty carries nothing."""
        return (self.has_cache and self.fixed_past != 0) or self.has_state

    @property
    def _full(self) -> bool:
        return self.interface.has_full_caches

    @property
    def feature_axes(self) -> tuple[int, ...]:
        """Sizes of the last axes of the token input: () for ids, (hidden size,) for embeddings."""
        axes = self.interface.tokens.axes
        return tuple(int(axis) for axis in axes[self._leading :])

    @property
    def token_dtype(self) -> np.dtype:
        """Type of the token input."""
        return self._dtypes[self.interface.tokens.name]

    @property
    def _leading(self) -> int:
        return 2 if "B" in self.interface.tokens.axes else 1

    def start(self, sequences: int = 1, *, window: int = 0) -> OriginalRun:
        """Begins `sequences` sequences of equal lengths.

        Args:
            sequences: their number.
            window: as in `Limits`.

        Raises:
            UsageError: the export has a fixed number of sequences that is smaller.
        """
        if self.fixed_batch is not None and sequences > self.fixed_batch:
            raise UsageError(f"the export takes {self.fixed_batch} sequences at once, not {sequences}")
        return OriginalRun(self, sequences, window)

    def call(
        self, tokens: np.ndarray, past: dict[str, np.ndarray], cached: int, hidden: int = 0
    ) -> dict[str, np.ndarray]:
        """Runs the export once.

        Args:
            tokens: [B, S, ...].
            past: value of each cache and state input, caches of P = hidden + cached rows.
            cached: tokens in the caches: the new ones have the positions from there on.
            hidden: rows before them that belong to no token. Attention masks are 0 there, score masks lowest.

        Returns:
            every output by name; results as [B, S, ...], or [B, 1, ...] where only those of last tokens are given.

        Raises:
            RefusedLengthError: the export does not run with these lengths.
        """
        sequences, new = tokens.shape[:2]
        rows = hidden + cached
        if self._full and rows + new > self._rows:
            raise RefusedLengthError(f"the caches have {self._rows} rows, not {rows + new}")
        sizes = {"B": sequences, "S": new, "P": rows, "T": rows + new, "L": self._rows}
        feeds = {entry.name: self._value(entry, tokens, past, sizes, hidden) for entry in self.interface.inputs}
        try:
            values = self._session.run(self._outputs, feeds)
        except RuntimeErrors as error:
            raise RefusedLengthError(
                f"the export refuses {new} new tokens after {rows} cached ones: {one_line(error)}"
            ) from None
        outputs = dict(zip(self._outputs, values, strict=True))
        for name in self.results:
            outputs[name] = self._normal_result(outputs[name], sequences, new)
            if outputs[name] is None:
                raise RefusedLengthError(
                    f"the export gives no result '{name}' for {new} new tokens after {rows} cached ones"
                )
        for entry in self.interface.by_role(roles.CACHE):
            length, axis = (self._rows, "L") if "L" in entry.axes else (rows + new, "P")
            if entry.output and outputs[entry.output].shape[entry.axes.index(axis)] != length:
                raise RefusedLengthError(f"the cache '{entry.output}' does not hold {rows} + {new} tokens")
        return outputs

    def empty_past(self, sequences: int, cached: int = 0) -> dict[str, np.ndarray]:
        """Caches of `cached` zero rows, or all of their rows where they have these from the beginning, and states of zeros."""
        sizes = {"B": sequences, "S": 0, "P": cached, "T": cached, "L": self._rows}
        entries = (*self.interface.by_role(roles.CACHE), *self.interface.by_role(roles.STATE))
        return {entry.name: np.zeros(_shape(entry, sizes), self._dtypes[entry.name]) for entry in entries}

    def run_batch(self, sequences: int) -> int:
        """Sequences that a call with `sequences` of them really has."""
        return self.fixed_batch or sequences

    def find_limits(self, bound: int = 64) -> Limits:
        """Finds by trial which lengths the export accepts.

        Args:
            bound: longest total length to try.

        Raises:
            BadModelError: no length tried is accepted.
        """
        if not self.carries:
            return self._limits_without_cache(bound)
        if self._full and self._fixed_rows is None:
            self._rows = bound
        sizes = [self.fixed_new] if self.fixed_new else range(1, LONGEST_TRIED_MINIMUM + 1)
        first = next((size for size in sizes if self._accepts(size, 0)), None)
        lowest: Sequence[int] = range(1, LONGEST_TRIED_MINIMUM + 1)
        if first is not None:
            lowest = (first,)
        elif self.fixed_past is not None:
            lowest = (self.fixed_past,)
        found = next(((size, cached) for cached in lowest for size in sizes if self._accepts(size, cached)), None)
        if found is None:
            raise BadModelError("ONNX Runtime runs the export with none of the lengths that were tried")
        step, past = found
        if not self.has_cache:
            return Limits(first, step, past, bound)
        if self.fixed_past is not None:
            total = past + (self.fixed_new or 1)
        else:
            total = _largest(lambda length: self._accepts(step, length - step), past + step, bound)
        if first is None:
            return Limits(None, step, past, total) if self._full else self._limits_without_beginning(step, past, total)
        smallest = next((cached for cached in range(1, past) if self._accepts(step, cached)), past)
        return Limits(first, step, smallest, total)

    def count_ids(self, limits: Limits, most: int = 1024) -> int:
        """A number of token ids that the export accepts: the largest power of two up to `most`."""
        count = most
        new, cached = (limits.step, limits.past) if limits.first is None or limits.window else (limits.first, 0)
        while count > 1 and not self._accepts(new, cached, token=count - 1):
            count //= 2
        return count

    def results_by_token(self, tokens: np.ndarray, chunks: Sequence[int], limits: Limits) -> dict[str, np.ndarray]:
        """Runs one sequence from its first token.

        Args:
            tokens: [n, ...].
            chunks: how many tokens to feed at once, n in all. Chunks that the export refuses are joined to the next.
            limits: what `find_limits` found.

        Returns:
            results by name, [n, ...] in float64; NaN for tokens of which the export gives none.
        """
        rows: dict[str, np.ndarray] = {}
        if self.carries:
            run = self.start(window=limits.window)
            start = end = 0
            if limits.made:
                if len(tokens) <= limits.made:
                    return rows
                run.adopt(tokens[None, : limits.made], self._rows_of(tokens[: limits.made], limits))
                start = limits.made
            for chunk in chunks:
                end += chunk
                fed = end - start - (end - start) % (self.fixed_new or 1)
                if fed < (limits.step if run.length else limits.first or 1):
                    continue
                results = run.feed(tokens[None, start : start + fed])
                start += fed
                _set_rows(rows, results, start, len(tokens))
            return rows
        length = max(limits.first or 1, len(tokens))
        # Later tokens change no earlier result, so that an export of a fixed length gives those of any shorter
        # sequence.
        padded = np.concatenate([tokens, np.repeat(tokens[-1:], length - len(tokens), axis=0)])
        results = self.start().feed(padded[None])
        if all(value.shape[1] == length for value in results.values()):
            _set_rows(
                rows, {name: value[:, : len(tokens)] for name, value in results.items()}, len(tokens), len(tokens)
            )
            return rows
        for end in np.cumsum(chunks):
            if end == limits.only or (limits.only is None and end >= (limits.first or 1)):
                _set_rows(rows, self.start().feed(tokens[None, :end]), int(end), len(tokens))
        return rows

    def _limits_without_cache(self, bound: int) -> Limits:
        sizes = [self.fixed_new] if self.fixed_new else range(1, LONGEST_TRIED_MINIMUM + 1)
        smallest = next((size for size in sizes if self._accepts(size, 0)), None)
        if smallest is None:
            raise BadModelError("ONNX Runtime runs the export with none of the lengths that were tried")
        if self.fixed_new:
            return Limits(smallest, 1, 0, smallest, only=smallest)
        return Limits(smallest, 1, 0, _largest(lambda length: self._accepts(length, 0), smallest, bound))

    def _limits_without_beginning(self, step: int, past: int, total: int) -> Limits:
        """Limits of an export that refuses empty caches: looks for a way to begin sequences all the same."""
        if self._hides(step, past):
            # Calls of a fixed number of tokens may not come to exactly P cached ones, and none can be made beyond.
            beyond = past % step if self.fixed_past is not None else past
            return Limits(step, step, past, total - beyond, window=past)
        # Rows are made beside other rows, so positions must not follow from how many there are.
        given = any(self.interface.by_role(role) for role in (roles.POSITIONS, roles.ROPE_COS))
        if (given or self._rope_dim == 0) and self._makes_rows_alone(step, past):
            return Limits(None, step, past, total, made=past)
        return Limits(None, step, past, total)

    def _hides(self, new: int, cached: int) -> bool:
        """Whether what the mask hides has no influence: tried with caches of which no row belongs to a token."""
        masks = (*self.interface.by_role(roles.ATTENTION_MASK), *self.interface.by_role(roles.SCORE_MASK))
        if not any("T" in mask.axes for mask in masks):
            return False
        with_zeros, with_others = (self._try(past, new, 0, cached) for past in self._different_pasts(cached))
        return all(_same(with_zeros[name], with_others[name]) for name in self.results)

    def _makes_rows_alone(self, new: int, cached: int) -> bool:
        """Whether a call's new rows do not depend on those that are there: so it is before the first attention only."""
        first, second = (self._try(past, new, cached, 0) for past in self._different_pasts(cached))
        return all(
            _same(*(np.take(found[output], range(cached, cached + new), axis) for found in (first, second)))
            for _, output, axis in _grown(self.interface)
        )

    def _different_pasts(self, rows: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        zeros = self.empty_past(self.run_batch(1), rows)
        random = np.random.default_rng(0)
        return zeros, {name: random.standard_normal(value.shape).astype(value.dtype) for name, value in zeros.items()}

    def _try(self, past: dict[str, np.ndarray], new: int, cached: int, hidden: int) -> dict[str, np.ndarray]:
        tokens = self._some_tokens(new)
        if self.feature_axes:
            tokens = np.random.default_rng(1).standard_normal(tokens.shape).astype(tokens.dtype)
        return self.call(tokens, past, cached, hidden)

    def _rows_of(self, tokens: np.ndarray, limits: Limits) -> dict[str, np.ndarray]:
        """Caches that hold the rows of some tokens [n, ...], made apart from each other (see `Limits.made`)."""
        batch, count = self.run_batch(1), len(tokens)
        past = self.empty_past(batch, limits.past)
        pieces: dict[str, list[np.ndarray]] = {name: [] for name in past}
        for start in range(0, count, limits.step):
            chunk = tokens[start : start + limits.step]
            padded = np.concatenate([chunk, np.repeat(chunk[-1:], limits.step - len(chunk), axis=0)])
            outputs = self.call(np.repeat(padded[None], batch, axis=0), past, start, limits.past - start)
            for name, output, axis in _grown(self.interface):
                new = range(limits.past, limits.past + len(chunk))
                pieces[name].append(np.take(outputs[output], new, axis))
        return {name: np.concatenate(pieces[name], axis) for name, _, axis in _grown(self.interface)}

    def _some_tokens(self, new: int, token: int = 0) -> np.ndarray:
        return token + np.zeros((self.run_batch(1), new, *self.feature_axes), self.token_dtype)

    def _accepts(self, new: int, cached: int, *, token: int = 0) -> bool:
        try:
            self.call(self._some_tokens(new, token), self.empty_past(self.run_batch(1), cached), cached)
        except RefusedLengthError:
            return False
        return True

    def _value(
        self, entry: ModelInput, tokens: np.ndarray, past: dict[str, np.ndarray], sizes: dict[str, int], hidden: int
    ) -> np.ndarray:
        dtype = self._dtypes[entry.name]
        if entry.role in (roles.CACHE, roles.STATE):
            return past[entry.name]
        if entry.role == roles.TOKENS:
            return tokens.reshape([sizes["B"], sizes["S"], *self.feature_axes][2 - self._leading :]).astype(dtype)
        shape = _shape(entry, sizes)
        positions = np.arange(sizes["P"], sizes["T"]) - hidden
        if entry.role == roles.POSITIONS:
            return np.broadcast_to(positions if "S" in entry.axes else positions[0], shape).astype(dtype)
        if entry.role == roles.LENGTHS:
            return np.full(shape, sizes["T"] - hidden, dtype)
        if entry.role == roles.ATTENTION_MASK:
            mask = np.ones(shape, dtype)
            if "T" in entry.axes:
                np.moveaxis(mask, entry.axes.index("T"), 0)[:hidden] = 0
            if "L" in entry.axes:
                np.moveaxis(mask, entry.axes.index("L"), 0)[sizes["T"] :] = 0
            return mask
        if entry.role == roles.SCORE_MASK:
            return causal_mask(shape, sizes["P"], dtype, hidden)
        if entry.role == roles.TOKEN_INDEX:
            return roles.token_index(entry, shape, sizes["S"]).astype(dtype)
        if entry.role == roles.TOKEN_COUNT:
            return np.full(shape, sizes["S"], dtype)
        if entry.role in (roles.ROPE_COS, roles.ROPE_SIN):
            return rope_input(entry, positions, shape, self._rope_dim).astype(dtype)
        return np.zeros(shape, dtype)

    def _normal_result(self, value: np.ndarray, sequences: int, new: int) -> np.ndarray | None:
        """A result as [B, S or 1, ...]; None where its sizes are not those of the call."""
        if self._leading == 1:
            value = value[None]
        if value.ndim < 2:  # one number for each token or sequence, such as the id of the likeliest token
            value = value.reshape(sequences, -1) if value.size in (sequences, sequences * new) else value.reshape(0, 0)
        elif value.ndim == 2:
            value = value.reshape(sequences, -1, value.shape[1]) if len(value) == sequences * new else value[:, None]
        good = value.shape[0] == sequences and value.shape[1] in (new, 1) and value.size > 0
        return value if good else None


class OriginalRun:
    """One or several sequences of equal lengths that go through an export together.

    Attributes:
        length: tokens fed so far.
    """

    def __init__(self, model: OriginalModel, sequences: int, window: int = 0) -> None:
        self.length = 0
        self._window = window
        self._model = model
        self._sequences = sequences
        batch = model.run_batch(sequences)
        # An export with a fixed number of sequences computes copies of ours in the places that are left.
        self._places = np.arange(batch) % sequences
        self._past = model.empty_past(batch, window)
        self._history = np.zeros((sequences, 0, *model.feature_axes), model.token_dtype)

    def feed(self, tokens: ArrayLike) -> dict[str, np.ndarray]:
        """Appends tokens to every sequence.

        Exports with a fixed number of new tokens get them in chunks of that; exports without a cache run all tokens
        again.

        Args:
            tokens: [B, n, ...].

        Returns:
            results by name, [B, m, ...]: those of the last m of the n tokens, where m is n, or less where the export
            gives only those of the last token of a call.

        Raises:
            RefusedLengthError: the export does not run with these lengths. Nothing was appended.
            UsageError: the tokens are not for this many sequences.
        """
        chunk = np.asarray(tokens, dtype=self._history.dtype)
        if chunk.shape[0] != self._sequences or chunk.shape[2:] != self._history.shape[2:] or chunk.shape[1] == 0:
            wanted = ", ".join(map(str, (self._sequences, "n", *self._history.shape[2:])))
            raise UsageError(f"tokens must be [{wanted}], not {list(chunk.shape)}")
        results = self._feed_all(chunk) if not self._model.carries else self._feed_chunks(chunk)
        self._history = np.concatenate([self._history, chunk], axis=1)
        self.length += chunk.shape[1]
        return results

    def adopt(self, tokens: np.ndarray, past: dict[str, np.ndarray]) -> None:
        """Takes over rows of the first tokens.

        Args:
            tokens: [B, n, ...].
            past: value of each cache, of n rows.
        """
        self._past, self._history, self.length = past, tokens, tokens.shape[1]

    def _feed_all(self, chunk: np.ndarray) -> dict[str, np.ndarray]:
        tokens = np.concatenate([self._history, chunk], axis=1)
        outputs = self._model.call(tokens[self._places], self._past, 0)
        return {name: outputs[name][: self._sequences, -chunk.shape[1] :] for name in self._model.results}

    def _feed_chunks(self, chunk: np.ndarray) -> dict[str, np.ndarray]:
        size = self._model.fixed_new or chunk.shape[1]
        if chunk.shape[1] % size:
            raise RefusedLengthError(f"the export takes {size} tokens at once, which do not divide {chunk.shape[1]}")
        past, length = self._past, self.length
        found: list[dict[str, np.ndarray]] = []
        for start in range(0, chunk.shape[1], size):
            fixed = self._model.fixed_past
            if fixed is not None and length > fixed:
                raise RefusedLengthError(f"the export takes {fixed} cached tokens, not {length}")
            hidden = self._window if fixed is None else max(self._window - length, 0)
            outputs = self._model.call(chunk[self._places, start : start + size], past, length, hidden)
            past = {name: outputs[output] for name, output in _next_values(self._model.interface)}
            length += size
            if self._window and fixed is not None:
                past |= {
                    name: _last(outputs[output], fixed, axis) for name, output, axis in _grown(self._model.interface)
                }
            found.append(outputs)
        self._past = past
        if all(found[0][name].shape[1] == size for name in self._model.results):
            joined = {
                name: np.concatenate([outputs[name] for outputs in found], axis=1) for name in self._model.results
            }
        else:
            joined = {name: found[-1][name] for name in self._model.results}
        return {name: value[: self._sequences] for name, value in joined.items()}


def _set_rows(rows: dict[str, np.ndarray], results: dict[str, np.ndarray], end: int, total: int) -> None:
    """Puts the results of the last tokens before `end` where they belong."""
    for name, value in results.items():
        kept = rows.setdefault(name, np.full((total, *value.shape[2:]), np.nan))
        if value.shape[1] > end or value.shape[2:] != kept.shape[1:]:
            raise RefusedLengthError(f"the result '{name}' does not have one row of a fixed size for each token")
        kept[end - value.shape[1] : end] = value[0]


def _next_values(interface: ModelInterface) -> Iterable[tuple[str, str]]:
    for entry in (*interface.by_role(roles.CACHE), *interface.by_role(roles.STATE)):
        if entry.output is None:
            raise BadModelError(f"no output holds the next value of '{entry.name}'")
        yield entry.name, entry.output


def _grown(interface: ModelInterface) -> Iterable[tuple[str, str, int]]:
    """Each cache with the output that holds its next value and the axis along which it grows."""
    for entry in interface.by_role(roles.CACHE):
        if entry.output is None:
            raise BadModelError(f"no output holds the next value of '{entry.name}'")
        yield entry.name, entry.output, entry.axes.index("P")


def _last(value: np.ndarray, rows: int, axis: int) -> np.ndarray:
    return np.take(value, range(value.shape[axis] - rows, value.shape[axis]), axis)


def _same(left: np.ndarray, right: np.ndarray) -> bool:
    largest = float(np.abs(left).max(initial=0.0)) + float(np.finfo(np.float32).tiny)
    return np.allclose(left, right, rtol=0, atol=SAME * largest)


def _shape(entry: ModelInput, sizes: dict[str, int]) -> tuple[int, ...]:
    # A letter that is none of ours is an axis about which nothing is known: inputs with one reach no output.
    return tuple(sizes.get(axis, 1) if isinstance(axis, str) else axis for axis in entry.axes)


def causal_mask(shape: Sequence[int], cached: int, dtype: np.dtype, hidden: int = 0) -> np.ndarray:
    """A mask [..., S, T] in which new token i attends to tokens hidden..cached + i: 0 and finfo.min, True and False, or
    1 and 0."""
    queries, keys = shape[-2:]
    columns = np.arange(keys)
    visible = (columns >= hidden) & (columns <= cached + np.arange(queries)[:, None])
    if dtype == np.bool_ or np.issubdtype(dtype, np.integer):
        return np.broadcast_to(visible, shape).astype(dtype)
    return np.broadcast_to(np.where(visible, np.zeros((), dtype), ml_dtypes.finfo(dtype).min), shape).astype(dtype)


def rope_input(entry: ModelInput, positions: np.ndarray, shape: Sequence[int], rope_dim: int | None) -> np.ndarray:
    """Cosines or sines of positions [S] (theta 10000), along the axes of the input they are for.

    Args:
        entry: an input of role ROPE_COS or ROPE_SIN; its axis S is that of the tokens, the last other one of a fixed
            size the width.
        positions: [S].
        shape: the input's shape.
        rope_dim: width of the rotated part of a head; None: tables are of full width.
    """
    token_axis = entry.axes.index("S")
    width_axis = max(index for index, axis in enumerate(entry.axes) if isinstance(axis, int))
    width = shape[width_axis]
    half = width if rope_dim is not None and width * 2 == rope_dim else width // 2
    angles = positions[:, None] * ROPE_THETA ** (-np.arange(half) / half)
    table = (np.cos if entry.role == roles.ROPE_COS else np.sin)(np.tile(angles, width // half))
    if width_axis < token_axis:
        table = table.T
    spread = [1] * len(shape)
    spread[token_axis], spread[width_axis] = len(positions), width
    return np.broadcast_to(table.reshape(spread), shape)


def _largest(accepts: Callable[[int], bool], low: int, high: int) -> int:
    """The largest length up to `high` that is accepted, given that `low` is and that refusals begin at one length."""
    if high <= low or accepts(high):
        return max(low, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if accepts(middle) else (low, middle)
    return low
