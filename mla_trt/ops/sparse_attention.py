"""MlaSparseAttention: an MLA layer that attends to the keys that an indexer selects.

What the lowering passes emit, one for each sparse layer.

Inputs: those of MlaAttention, then ``index_query``, ``index_key``, ``index_weights``, ``index_norm_weight`` (optional),
``index_norm_bias`` (optional), ``index_cos``, ``index_sin``, ``indexer_cache`` as in MlaIndexer - all absent in a layer
that takes another layer's selection -, and ``indices`` i32 ``[T, top_k]``: that selection, absent in a layer with an
indexer. ``rope_rows`` and ``page_copies`` serve both caches.

Outputs: ``output`` F ``[T, H, Dv]``, ``kv_cache_out``, ``indices`` i32 ``[T, top_k]`` (the selection that was used),
``indexer_cache_out`` (absent in a layer without an indexer).

MlaIndexer, then MlaAttention over each token's list.
"""

from __future__ import annotations

from collections.abc import Mapping

from mla_trt.errors import UsageError
from mla_trt.ops import attention, indexer
from mla_trt.ops.body import Body, Value
from mla_trt.ops.common import INDEX_ATTRIBUTES, INDICES
from mla_trt.ops.schema import I32, Array, Attributes, Input, Op, Output

_INDEX_INPUTS = tuple(
    Input(i.name, i.kind, i.shape, optional=True) for i in (*indexer.INDEX_TENSORS, indexer.INDEXER_CACHE)
)
_REQUIRED_INDEX_INPUTS = {i.name for i in (*indexer.INDEX_TENSORS, indexer.INDEXER_CACHE) if not i.optional}


def emit(body: Body, attributes: Attributes, inputs: dict[str, Value]) -> dict[str, Value]:
    """Append the op's nodes."""
    selection = {"indices": inputs["indices"]} if "indices" in inputs else indexer.emit(body, attributes, inputs)
    results = attention.emit(body, attributes, {**inputs, "indices": selection["indices"]})
    return {**results, **selection}


def reference(attributes: Attributes, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """MlaIndexer's reference, then MlaAttention's over the lists."""
    selection = {"indices": inputs["indices"]} if "indices" in inputs else indexer.reference(attributes, inputs)
    results = attention.reference(attributes, {**inputs, "indices": selection["indices"]})
    return {**results, **selection}


def check(attributes: Attributes, given: frozenset[str]) -> None:
    """Either the indexer's inputs or a selection."""
    attention.check(attributes, given)
    found = sorted(given & {i.name for i in _INDEX_INPUTS})
    if "indices" in given:
        if found:
            raise UsageError(f"indices is given, so the layer has no indexer, but {', '.join(found)} is given too")
        return
    missing = sorted(_REQUIRED_INDEX_INPUTS - given)
    if missing:
        raise UsageError(f"without indices the indexer's inputs are needed; missing: {', '.join(missing)}")
    indexer.check(attributes, given)


OP = Op(
    name="MlaSparseAttention",
    doc=__doc__,
    inputs=(*attention.INPUTS, *_INDEX_INPUTS, INDICES),
    outputs=(
        *attention.OP.outputs,
        Output("indices", I32, "T K", optional=True),
        Output("indexer_cache_out", I32, "index_pages index_page_words", optional=True),
    ),
    attributes=(*attention.ATTRIBUTES, *INDEX_ATTRIBUTES),
    emit=emit,
    reference=reference,
    check=check,
)
