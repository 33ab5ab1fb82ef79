"""MlaPlan: where each token of a step belongs, and how the step's work is cut into equal parts.

Once a step; its outputs are inputs of every layer.

Inputs: ``tokens`` (any type, T elements), ``query_offsets`` i32 ``[B+1]``, ``cache_lengths`` i32 ``[B]``.

Outputs:

- ``token_sequence`` i32 ``[T]``: the sequence of each token, -1 for padding (tokens at or past ``query_offsets[B]``).
- ``positions`` i32 ``[T]``: ``cache_lengths`` of its sequence + its index there; 0 for padding.
- ``schedule`` i32 ``[num_partitions + 1, 2]``: a sequence with new tokens has ceil((cached + new) / P) work units
  (sequence, page), in order; row p is the unit numbered floor(p N / num_partitions) of all N, where part p starts. The
  last row is (B, 0).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mla_trt.formats import ceil_div
from mla_trt.ops.body import INT32, INT64, Body, Value
from mla_trt.ops.common import CACHE_LENGTHS, PAGE_SIZE, QUERY_OFFSETS
from mla_trt.ops.schema import ANY, I32, Array, Attribute, Attributes, Dimensions, Input, Op, Output, TensorType


def emit(body: Body, attributes: Attributes, inputs: dict[str, Value]) -> dict[str, Value]:
    """Append the op's nodes."""
    page_size, parts = attributes.integer("page_size"), attributes.integer("num_partitions")
    offsets = inputs["query_offsets"].cast(INT64)
    cached = inputs["cache_lengths"].cast(INT64)
    sequences = cached.dim(0)
    starts, ends = offsets.slice(0, 0, sequences), offsets.slice(0, 1, sequences + 1)

    # a token's sequence is the number of sequences that end before it; B is padding, so the lengths get an entry for B
    token = body.range(inputs["tokens"].size())
    sequence = (ends.unsqueeze(0) <= token.unsqueeze(1)).cast(INT64).sum(1, keep=False)
    padding = sequence >= sequences
    position = body.concat(0, cached, body.constant([0], INT64)).gather(sequence) + token - offsets.gather(sequence)

    new = ends - starts
    units = body.where(new > 0, (cached + new + (page_size - 1)) // page_size, 0)
    unit_starts = body.concat(0, body.constant([0], INT64), body.op("CumSum", units, body.constant(0, INT64)))
    count = unit_starts.gather(sequences)
    first = body.constant(list(range(parts + 1)), INT64) * count // parts
    unit_ends = unit_starts.slice(0, 1, sequences + 1)
    unit_sequence = (unit_ends.unsqueeze(0) <= first.unsqueeze(1)).cast(INT64).sum(1, keep=False)
    page = first - unit_starts.gather(unit_sequence)
    return {
        "token_sequence": body.where(padding, -1, sequence).cast(INT32),
        "positions": body.where(padding, 0, position).cast(INT32),
        "schedule": body.concat(1, unit_sequence.unsqueeze(1), page.unsqueeze(1)).cast(INT32),
    }


def reference(attributes: Attributes, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The same by loops over sequences and tokens."""
    offsets, cached = inputs["query_offsets"], inputs["cache_lengths"]
    tokens = inputs["tokens"].size
    token_sequence = np.full(tokens, -1, np.int32)
    positions = np.zeros(tokens, np.int32)
    units: list[tuple[int, int]] = []
    for sequence in range(len(cached)):
        start, end = int(offsets[sequence]), int(offsets[sequence + 1])
        for token in range(start, min(end, tokens)):
            token_sequence[token] = sequence
            positions[token] = int(cached[sequence]) + token - start
        if end > start:
            length = int(cached[sequence]) + end - start
            units += [(sequence, page) for page in range(ceil_div(length, attributes.integer("page_size")))]
    units.append((len(cached), 0))
    parts = attributes.integer("num_partitions")
    schedule = np.array([units[part * (len(units) - 1) // parts] for part in range(parts + 1)], np.int32)
    return {"token_sequence": token_sequence, "positions": positions, "schedule": schedule}


def _bind(dims: Dimensions, types: Mapping[str, TensorType]) -> None:
    if "tokens" not in types:
        return
    sizes = [dim for dim in types["tokens"].shape if dim != 1]
    if all(isinstance(dim, int) for dim in sizes):
        dims.bind("T", int(np.prod([int(dim or 0) for dim in sizes])), "tokens")
    elif len(sizes) == 1:
        dims.bind("T", sizes[0], "tokens")


OP = Op(
    name="MlaPlan",
    doc=__doc__,
    inputs=(Input("tokens", ANY, None), QUERY_OFFSETS, CACHE_LENGTHS),
    outputs=(
        Output("token_sequence", I32, "T"),
        Output("positions", I32, "T"),
        Output("schedule", I32, "num_partitions+1 2"),
    ),
    attributes=(Attribute("num_partitions", int, 128, letter="num_partitions", minimum=1), PAGE_SIZE),
    emit=emit,
    reference=reference,
    bind=_bind,
)
