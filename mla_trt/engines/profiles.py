"""Which sizes an engine takes, which of its two profiles a step uses, and how a step is padded to sizes that recur.

A CUDA graph serves one set of shapes. Steps that decode are therefore padded to a few sizes: sequences without tokens,
tokens behind the last sequence and columns of the block table without pages, all of which the lowered model ignores by
contract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mla_trt.engines.engine_file import (
    COLUMNS,
    COPIES,
    DECODE,
    IO,
    NEW,
    OFFSETS,
    PAGES,
    PREFILL,
    PROFILES,
    SEQUENCES,
    TOKENS,
    TOTAL,
    EngineDescription,
    EngineTensor,
    Range,
)
from mla_trt.errors import MlaTrtError, UsageError
from mla_trt.metadata import LoweredMetadata
from mla_trt.pages import UNASSIGNED

DECODE_TOKENS = 8
"""Most new tokens of a sequence in a step that decodes (docs/design.md: up to here the absorbed kernel is the better one)."""
DEFAULT_LENGTH = 32768
DEFAULT_BATCH = 16
DEFAULT_TOKENS = 2048
TENSOR_LIMIT = 2**31 - 1
"""Elements that a tensor of TensorRT may have."""
TUNED_PAGES = 256
LEAST_LIMIT, SPARE = 4096, 4
"""Most pages of pools whose size is left open: this many, or this many times what the largest batch of the longest
sequences holds. TensorRT times its choices with memory for the largest."""

Sizes = dict[str, int]

_OPTIONS = {
    TOKENS: ("tokens", "--max-tokens"),
    NEW: ("new tokens of a sequence", "--max-tokens"),
    SEQUENCES: ("sequences", "--max-batch"),
    COLUMNS: ("pages of a sequence", "--max-length"),
    TOTAL: ("tokens of a sequence", "--max-length"),
    COPIES: ("pages to copy", "--max-batch"),
}


def make_profiles(
    metadata: LoweredMetadata,
    *,
    max_batch: int | None = None,
    max_tokens: int | None = None,
    max_length: int | None = None,
    pages: int | None = None,
) -> dict[str, dict[str, Range]]:
    """Ranges of the axes of an engine's inputs, for its decode and its prefill profile.

    Args:
        metadata: of the lowered model.
        max_batch: most sequences of a step.
        max_tokens: most tokens of a step.
        max_length: most tokens of a sequence; the model's number of positions is the default, up to 32768.
        pages: fixed number of pages in the pools, None: any up to a multiple of what one batch holds.

    Raises:
        UsageError: a limit below 1, or beyond what the model or a tensor of TensorRT can have.
    """
    # Recurrent layers that were exported for one sequence, or one token of each, take no more.
    alone, single = (not metadata.packed and axis not in metadata.token_axes for axis in ("B", "S"))
    if alone and max_batch is not None and max_batch > 1:
        raise UsageError(f"--max-batch is {max_batch}: the model was exported for one sequence at a time")
    batch = (1 if alone else DEFAULT_BATCH) if max_batch is None else max_batch
    length = min(metadata.max_position or DEFAULT_LENGTH, DEFAULT_LENGTH) if max_length is None else max_length
    tokens = max(batch, min(DEFAULT_TOKENS, batch * length)) if max_tokens is None else max_tokens
    for option, value in (("--max-batch", batch), ("--max-tokens", tokens), ("--max-length", length)):
        if value < 1:
            raise UsageError(f"{option} is {value}: it must be at least 1")
    if metadata.max_position is not None and length > metadata.max_position:
        raise UsageError(f"--max-length is {length}: the model has {metadata.max_position} positions")
    if tokens < batch:
        raise UsageError(f"--max-tokens is {tokens}: a step of {batch} sequences (--max-batch) has at least {batch}")
    most_pages = TENSOR_LIMIT // max((cache.page_words for cache in metadata.caches), default=1)
    if pages is not None and not 1 <= pages <= most_pages:
        raise UsageError(f"--pages is {pages}: this model's pools can have 1 to {most_pages} pages")
    columns = metadata.max_pages or -(-length // metadata.page_size)
    if pages is None:
        most_pages = min(most_pages, max(LEAST_LIMIT, SPARE * batch * columns))
    decode_tokens = min(DECODE_TOKENS * batch, tokens)
    found = {}
    for profile, most, sequences in ((DECODE, decode_tokens, batch), (PREFILL, tokens, 1)):
        best = batch if profile == DECODE else tokens
        new = (1, 1, DECODE_TOKENS) if profile == DECODE else (1, min(tokens, length), min(tokens, length))
        new = (1, 1, 1) if single else new
        found[profile] = {
            TOKENS: Range(1, best, most),
            SEQUENCES: Range(1, sequences, batch),
            OFFSETS: Range(2, sequences + 1, batch + 1),
            COLUMNS: Range(metadata.max_pages or 1, columns, columns),
            PAGES: Range(pages or 1, pages or min(TUNED_PAGES, most_pages), pages or most_pages),
            COPIES: Range(1, 1, batch),
            NEW: Range(*new),
            TOTAL: Range(1, length, length),
        }
    return found


def plan_profiles(profiles: Mapping[str, Mapping[str, Range]], cache: str) -> list[Mapping[str, Range]]:
    """The optimization profiles that a plan has, in order.

    With resident pages it is one that takes what any of `profiles` takes and is tuned for decode: of a plan with two
    TensorRT may make each plugin twice, and each would have pages of its own.
    """
    if cache == IO:
        return [profiles[name] for name in PROFILES]
    sizes = {axis: [profiles[name][axis] for name in PROFILES] for axis in profiles[DECODE]}
    return [
        {
            axis: Range(min(size.least for size in each), each[0].best, max(size.most for size in each))
            for axis, each in sizes.items()
        }
    ]


def input_range(tensor: EngineTensor, ranges: Mapping[str, Range]) -> tuple[list[int], list[int], list[int]]:
    """Least, best and largest shape of an input in a profile."""
    sizes = [ranges[axis] if isinstance(axis, str) else Range(axis, axis, axis) for axis in tensor.axes]
    return [size.least for size in sizes], [size.best for size in sizes], [size.most for size in sizes]


def read_sizes(tensors: Sequence[EngineTensor], inputs: Mapping[str, np.ndarray]) -> Sizes:
    """The size of each axis, from the inputs of a step.

    Raises:
        UsageError: an input is not of its shape, or two inputs contradict each other.
    """
    sizes: Sizes = {}
    for tensor in tensors:
        if tensor.name not in inputs:
            continue
        shape = inputs[tensor.name].shape
        wanted = [
            sizes.setdefault(axis, size) if isinstance(axis, str) else axis
            for axis, size in zip(tensor.axes, shape, strict=False)
        ]
        if len(shape) != len(tensor.axes) or list(shape) != wanted:
            axes = ", ".join(f"{axis} = {sizes[axis]}" if axis in sizes else str(axis) for axis in tensor.axes)
            raise UsageError(f"the input '{tensor.name}' is {list(shape)}, must be [{axes}]")
    return sizes


def choose_profile(description: EngineDescription, sizes: Sizes) -> str:
    """The profile that a step uses: decode where it fits and no sequence has many new tokens on average.

    Raises:
        UsageError: the step is larger than the engine takes.
    """
    few = sizes.get(TOKENS, 0) <= DECODE_TOKENS * sizes[SEQUENCES] and sizes.get(NEW, 0) <= DECODE_TOKENS
    for profile in (DECODE, PREFILL) if few else (PREFILL,):
        ranges = description.profiles[profile]
        if all(size <= ranges[axis].most for axis, size in sizes.items() if axis in ranges):
            return profile
    most = {axis: size.most for axis, size in description.profiles[PREFILL].items()}
    axis = next(axis for axis in (*_OPTIONS, *sizes) if axis in sizes and sizes[axis] > most[axis])
    what, option = _OPTIONS.get(axis, (axis, "--pages"))
    raise UsageError(
        f"the step has {sizes[axis]} {what}, the engine takes {most[axis]}: "
        f"give less at once, or build the engine with a larger {option}"
    )


def bucket(size: int, limit: int) -> int:
    """The smallest recurring size that holds `size`: powers of two, from 16 on also halfway between; at most `limit`."""
    power = 1 << max(0, size - 1).bit_length()
    halfway = power - power // 4
    return min(halfway if power > 16 and size <= halfway else power, limit)


def bucketed(sizes: Sizes, ranges: Mapping[str, Range]) -> Sizes:
    """The recurring sizes that a step which decodes is padded to."""
    sequences = bucket(sizes[SEQUENCES], ranges[SEQUENCES].most)
    each = -(-sizes[TOKENS] // max(1, sizes[SEQUENCES]))
    tokens = max(sizes[TOKENS], min(each * sequences, ranges[TOKENS].most))
    padded = {SEQUENCES: sequences, OFFSETS: sequences + 1, TOKENS: tokens}
    if COLUMNS in sizes:
        padded[COLUMNS] = bucket(sizes[COLUMNS], ranges[COLUMNS].most)
    return sizes | padded


def at_least(sizes: Sizes, ranges: Mapping[str, Range]) -> Sizes:
    """The smallest sizes of a profile that hold a step."""
    return {axis: max(size, ranges[axis].least) if axis in ranges else size for axis, size in sizes.items()}


def pad(tensor: EngineTensor, value: np.ndarray, sizes: Sizes) -> np.ndarray:
    """An input padded to sizes: offsets repeat, entries of the block table stand for no page, the rest is 0."""
    shape = [sizes[axis] if isinstance(axis, str) else axis for axis in tensor.axes]
    if list(value.shape) == shape:
        return value
    if tensor.name == "query_offsets":
        fill = value[-1]
    else:
        fill = UNASSIGNED if COLUMNS in tensor.axes or COPIES in tensor.axes else 0
    padded = np.full(shape, fill, value.dtype)
    padded[tuple(slice(0, size) for size in value.shape)] = value
    return padded


def can_unpad(tensor: EngineTensor) -> bool:
    """Whether it is known which part of a result is that of padding."""
    return any(axis in (TOKENS, SEQUENCES) for axis in tensor.axes)


def unpad(tensor: EngineTensor, value: np.ndarray, sizes: Sizes) -> np.ndarray:
    """A result without the rows of padding.

    Raises:
        MlaTrtError: it has other axes than the description says.
    """
    if value.ndim != len(tensor.axes):
        raise MlaTrtError(
            f"the result '{tensor.name}' is {list(value.shape)}, the engine's description says {list(tensor.axes)}"
        )
    return value[tuple(slice(0, sizes[axis]) if axis in (TOKENS, SEQUENCES) else slice(None) for axis in tensor.axes)]
