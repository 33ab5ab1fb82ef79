"""Replaces matched attention layers by fused ops over paged caches and turns the graph around them into one over packed tokens."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from mla_trt import interface as roles
from mla_trt.errors import NoMlaError
from mla_trt.formats import IndexLayout, KvLayout
from mla_trt.interface import Axis, ModelInterface
from mla_trt.ops import OPS
from mla_trt.passes.attention_core import NoMatch
from mla_trt.passes.features import Features, tokens_first
from mla_trt.passes.graph import Emitter, replace_uses
from mla_trt.passes.match_exits import Exit
from mla_trt.passes.match_indexer import IndexerMatch
from mla_trt.passes.match_mla import MlaMatch
from mla_trt.passes.match_rope import TOLERANCE, Rotation
from mla_trt.passes.positions import BY_SEQUENCE, PACKED, UNPACKED, CannotRebuild, PackedPositions, packed_sizes
from mla_trt.passes.probe import Probe
from mla_trt.passes.quantize import quantize_blocks
from mla_trt.weight_file import WeightFile

WEIGHT_BLOCK = 128


@dataclass(frozen=True)
class CacheFormat:
    """How the lowered model keeps its caches."""

    row_format: str = "fp8"
    index_format: str = "fp8"
    page_size: int = 64
    kv_scale: float = 1.0


@dataclass(frozen=True)
class LoweredCache:
    """One paged cache of the lowered model (see the metadata)."""

    name: str
    layer: int
    kind: str
    page_words: int


class Lowerer:
    """Emits the lowered layers of one graph.

    Attributes:
        caches: the caches made so far.
    """

    def __init__(
        self,
        emitter: Emitter,
        probes: list[Probe],
        tokens: gs.Tensor,
        cache_format: CacheFormat,
        *,
        fp8_weights: bool = False,
        weight_file: WeightFile | None = None,
    ) -> None:
        self.emitter = emitter
        self.probe = probes[0]
        self.format = cache_format
        self.fp8_weights = fp8_weights
        self.weight_file = weight_file
        self.caches: list[LoweredCache] = []
        self._named: list[tuple[gs.Variable, str]] = []  # inputs and outputs that callers know by name
        self.tokens = tokens
        self.layout = token_layout(self.probe.interface)
        self.graph = emitter.graph
        self.query_offsets = self._input("query_offsets", ["B + 1"])
        self.cache_lengths = self._input("cache_lengths", ["B"])
        self.block_table = self._input("block_table", ["B", "max_pages"])
        self.token_sequence, self.positions, self.schedule = self._plan(tokens)
        self.packed = PackedPositions(emitter, probes, self.positions, tokens, layout=self.layout)
        self._flat: dict[int, gs.Tensor] = {}
        self._results: list[tuple[gs.Tensor, gs.Tensor]] = []
        self._tables: dict[tuple[Any, ...], gs.Tensor] = {}
        self._selections: dict[int, tuple[gs.Tensor, dict[str, Any]]] = {}

    def _input(self, name: str, shape: list[int | str]) -> gs.Variable:
        tensor = self._known(name, shape)
        self.graph.inputs.append(tensor)
        return tensor

    def _known(self, name: str, shape: list[int | str]) -> gs.Variable:
        tensor = gs.Variable(self.emitter.names.new(name), dtype=np.dtype(np.int32), shape=shape)
        self._named.append((tensor, name))
        return tensor

    def claim_names(self) -> None:
        """Gives inputs and outputs the names by which a lowered model's are known, where tensors of the export had these.

        Raises:
            NoMlaError: an input or output of the export that is still there has such a name.
        """
        for tensor, name in self._named:
            if tensor.name == name:
                continue
            if any(other.name == name for other in (*self.graph.inputs, *self.graph.outputs)):
                raise NoMlaError(
                    f"the model's '{name}' has a name that a lowered model has for an input or output of its own: rename it"
                )
            for node in self.graph.nodes:
                for other in (*node.inputs, *node.outputs):
                    if other.name == name:
                        other.name = tensor.name
            tensor.name = name

    def _plan(self, tokens: gs.Tensor) -> list[gs.Variable]:
        batched = "B" in self.probe.interface.tokens.axes
        rank = len(self.probe.interface.tokens.axes)
        if rank > (2 if batched else 1):
            tokens = self.emitter.gather(tokens, np.array(0), rank - 1, "token_slots")
        outputs = [
            gs.Variable(self.emitter.names.new(name), dtype=np.dtype(np.int32))
            for name in ("token_sequence", "positions", "schedule")
        ]
        self._op(
            "MlaPlan",
            "plan",
            {"tokens": tokens, "query_offsets": self.query_offsets, "cache_lengths": self.cache_lengths},
            outputs,
            {"page_size": self.format.page_size},
        )
        return outputs

    def _op(
        self,
        op_type: str,
        wish: str,
        inputs: dict[str, gs.Tensor],
        outputs: list[gs.Tensor],
        attributes: dict[str, Any],
    ) -> None:
        op = OPS[op_type]
        order = [formal.name for formal in op.inputs]
        unknown = set(inputs) - set(order)
        assert not unknown, unknown
        given = [inputs.get(name) or gs.Variable.empty() for name in order]
        while given and not given[-1].name:
            given.pop()
        name = self.emitter.names.new(wish)
        complete = {**op.complete(attributes, name), **op.plugin_attributes}
        self.graph.nodes.append(gs.Node(op_type, name, complete, given, outputs, domain="mla_trt"))

    # -- token features -------------------------------------------------------------------------------------------

    def _tokens_by_width(self, tensor: gs.Tensor) -> tuple[gs.Tensor, int]:
        """A tensor of the export as [T, width]."""
        shape = self.probe.shape(tensor)
        width = math.prod(shape) // (self.probe.batch * self.probe.sizes.new)
        if id(tensor) not in self._flat:
            order = tokens_first(self.probe, shape)
            assert order is not None
            source = (
                tensor
                if order == tuple(range(len(shape)))
                else self.emitter.node("Transpose", [tensor], f"{tensor.name}.tokens_first", perm=list(order))
            )
            self._flat[id(tensor)] = self.emitter.reshape(source, [-1, width], f"{tensor.name}.tokens")
        return self._flat[id(tensor)], width

    def features(self, features: Features, wish: str) -> gs.Tensor:
        """Entries of each token as [T, *index.shape], scaled by their factors."""
        tensor, width = self._tokens_by_width(features.tensor)
        index = features.index
        flat = index.reshape(-1)
        if not np.array_equal(flat, np.arange(width)):
            strided = self._strided(tensor, index, width, wish)
            if strided is not None:
                return self._scaled(strided, features, wish)
            if len(flat) and np.array_equal(flat, np.arange(flat[0], flat[0] + len(flat))):
                tensor = self._slice(tensor, int(flat[0]), int(flat[0]) + len(flat), 1, wish)
            else:
                tensor = self.emitter.gather(tensor, flat, 1, wish)
        if index.ndim > 1:
            tensor = self.emitter.reshape(tensor, [-1, *index.shape], f"{wish}.heads")
        return self._scaled(tensor, features, wish)

    def _strided(self, tensor: gs.Tensor, index: np.ndarray, width: int, wish: str) -> gs.Tensor | None:
        """A slice of every head, where all heads have the same entries of their own stretch."""
        if index.ndim != 2 or not index.shape[1] or width % index.shape[0]:
            return None
        stride = width // index.shape[0]
        start = int(index[0, 0])
        expected = np.arange(index.shape[0])[:, None] * stride + start + np.arange(index.shape[1])
        if not np.array_equal(index, expected) or start + index.shape[1] > stride:
            return None
        heads = self.emitter.reshape(tensor, [-1, index.shape[0], stride], f"{wish}.heads")
        return heads if stride == index.shape[1] else self._slice(heads, start, start + index.shape[1], 2, wish)

    def _slice(self, tensor: gs.Tensor, start: int, end: int, axis: int, wish: str) -> gs.Tensor:
        bounds = [
            self.emitter.constant(f"{wish}.{label}", [value], np.int64)
            for label, value in (("start", start), ("end", end), ("axis", axis))
        ]
        return self.emitter.node("Slice", [tensor, *bounds], wish)

    def _scaled(self, tensor: gs.Tensor, features: Features, wish: str) -> gs.Tensor:
        if np.allclose(features.factor, 1, rtol=1e-9):
            return tensor
        dtype = features.tensor.dtype if features.tensor.dtype is not None else np.dtype(np.float32)
        return self.emitter.node(
            "Mul", [tensor, self._constant(f"{wish}.factor", features.factor, dtype)], f"{wish}.scaled"
        )

    def _constant(self, wish: str, values: np.ndarray, dtype: Any) -> gs.Constant:
        return typed_constant(self.emitter, wish, values, dtype)

    # -- one layer ------------------------------------------------------------------------------------------------

    def lower(self, layer: int, match: MlaMatch, indexer: IndexerMatch | None) -> None:
        """Emits a layer and puts its result in place of the export's.

        Raises:
            NoMatch: a rope table or a scale depends on more than positions.
        """
        name = f"mla_attention.{layer}"
        inputs: dict[str, gs.Tensor] = {
            "query": self._query(match, name),
            "query_offsets": self.query_offsets,
            "cache_lengths": self.cache_lengths,
            "block_table": self.block_table,
            "token_sequence": self.token_sequence,
            "positions": self.positions,
            "schedule": self.schedule,
        }
        self._latent(match, name, inputs)
        self._rope(match, indexer, name, inputs)
        self._weights(match, name, inputs)
        if match.sinks is not None:
            inputs["sinks"] = self.emitter.constant(f"{name}.sinks", match.sinks, np.float32)
        layout = KvLayout(
            page_size=self.format.page_size,
            row_format=self.format.row_format,
            kv_lora_rank=match.kv_lora_rank,
            qk_rope_head_dim=match.qk_rope_head_dim,
            kv_scale=self.format.kv_scale,
        )
        inputs["kv_cache"], cache_out = self._cache("kv", layer, layout.page_words)
        attributes: dict[str, Any] = {
            "kv_lora_rank": match.kv_lora_rank,
            "qk_rope_head_dim": match.qk_rope_head_dim,
            "page_size": self.format.page_size,
            "row_format": self.format.row_format,
            "kv_scale": self.format.kv_scale,
            "num_heads": match.num_heads,
            "qk_nope_head_dim": match.qk_nope_head_dim,
            "v_head_dim": match.v_head_dim,
            "epsilon": match.epsilon,
            "rope_interleaved": int(match.rotation.interleaved),
            "softmax_scale": match.scale,
        }
        result = self.emitter.variable(f"{name}.output", inputs["query"].dtype)
        outputs: list[gs.Tensor] = [result, cache_out]
        op = "MlaAttention"
        if match.selection is not None:
            op = "MlaSparseAttention"
            outputs += self._select(layer, match, indexer, name, inputs, attributes)
        self._op(op, name, inputs, outputs, attributes)
        self._results += [(way_out.tensor, self._leave(result, way_out, match)) for way_out in match.exits]

    def _query(self, match: MlaMatch, name: str) -> gs.Tensor:
        nope, rope = match.query_nope, match.query_rope
        if nope.tensor is rope.tensor or not match.qk_rope_head_dim:
            joined = Features(
                nope.tensor,
                np.concatenate([nope.index, rope.index], axis=1),
                np.concatenate([nope.factor, rope.factor], axis=1),
            )
            query = self.features(joined, f"{name}.query")
        else:
            parts = [self.features(nope, f"{name}.query_nope"), self.features(rope, f"{name}.query_rope")]
            query = self.emitter.node("Concat", parts, f"{name}.query", axis=2)
        if match.query_token_scale is not None:
            query = self._scaled_by_token(
                query, match.query_token_scale, match.rotation, f"{name}.query", match.softmax
            )
        return query

    def _scaled_by_token(
        self, query: gs.Tensor, wanted: np.ndarray, rotation: Rotation, wish: str, node: gs.Node
    ) -> gs.Tensor:
        """Queries [T, H, width] times factors [B, S, H or 1] that a tensor of the export has."""
        scale = self._token_scale(wanted, rotation, f"{wish}_scale", node)
        if query.dtype is not None:
            scale = self.emitter.cast(scale, query.dtype, f"{wish}_scale")
        return self.emitter.node("Mul", [query, scale], f"{wish}_scaled")

    def _token_scale(self, wanted: np.ndarray, rotation: Rotation, wish: str, node: gs.Node) -> gs.Tensor:
        """The tensor that scales each token's queries, as [T, 1, 1], or each head's, as [T, H, 1]."""
        reason = "no tensor holds the factor by which the queries of each token are scaled"
        for tensor in rotation.factors:
            found = _as_token_scale(np.asarray(self.probe.known(tensor), np.float64), wanted)
            if found is None:
                continue
            order, ratio = found
            try:
                scale = self.packed.rebuild(tensor)
            except CannotRebuild as error:
                reason = str(error)
                continue
            if order != sorted(order):
                scale = self.emitter.node("Transpose", [scale], f"{wish}.tokens_first", perm=order)
            scale = self.emitter.reshape(scale, [-1, wanted.shape[2], 1], wish)
            if math.isclose(ratio, 1.0, rel_tol=1e-6):
                return scale
            factor = self._constant(f"{wish}_factor", np.array(ratio), tensor.dtype or np.float32)
            return self.emitter.node("Mul", [scale, factor], wish)
        raise NoMatch(f"the queries are scaled by position, but {reason}", node)

    def _latent(self, match: MlaMatch, name: str, inputs: dict[str, gs.Tensor]) -> None:
        inputs["latent"] = self.features(match.latent, f"{name}.latent")
        if match.norm_weight is not None:
            inputs["norm_weight"] = self.emitter.constant(f"{name}.norm_weight", match.norm_weight, np.float32)
        if match.rope_key is not None:
            inputs["rope_key"] = self.features(match.rope_key, f"{name}.rope_key")
        else:
            inputs["rope_key"] = self._slice(inputs["latent"], 0, 0, 1, f"{name}.rope_key")

    def _rope(self, match: MlaMatch, indexer: IndexerMatch | None, name: str, inputs: dict[str, gs.Tensor]) -> None:
        rotation = match.rotation
        half = match.qk_rope_head_dim // 2
        if rotation.fixed:
            for label, values in (("cos", rotation.cos), ("sin", rotation.sin)):
                row = values[:1] if half else np.zeros((1, 0))
                inputs[label] = self._table_constant(label, row)
            if indexer is None or not indexer.rope_dim or id(match.selection) in self._selections:
                inputs["rope_rows"] = self._zero_rows()
                return
            # Row indices would serve the indexer's tables too, which have a row for each token.
            for label in ("cos", "sin"):
                inputs[label] = self.emitter.gather(inputs[label], self._zero_rows(), 0, f"{name}.{label}")
            return
        for label, wanted in (("cos", rotation.cos), ("sin", rotation.sin)):
            inputs[label] = self._table(rotation, label, wanted, half, match.softmax)

    def _table_constant(self, label: str, row: np.ndarray) -> gs.Tensor:
        key = (label, row.tobytes(), row.shape)
        if key not in self._tables:
            self._tables[key] = self.emitter.constant(f"unrotated.{label}", row, np.float32)
        return self._tables[key]

    def _zero_rows(self) -> gs.Tensor:
        if ("rows",) not in self._tables:
            self._tables[("rows",)] = self.emitter.node("Sub", [self.positions, self.positions], "unrotated.rows")
        return self._tables[("rows",)]

    def _table(self, rotation: Rotation, label: str, wanted: np.ndarray, half: int, node: gs.Node) -> gs.Tensor:
        """cos or sin as f32 [T, Dr/2], rebuilt from the export's own tensor that has these values."""
        reason = f"no tensor holds the {label} of the rotation"
        for tensor in rotation.factors:
            view = _table_view(np.asarray(self.probe.known(tensor), np.float64), wanted)
            if view is None:
                continue
            pick, ratio = view
            key = (label, id(tensor), pick, round(ratio, 6))
            if key in self._tables:
                return self._tables[key]
            try:
                table = self.packed.rebuild(tensor)
            except CannotRebuild as error:
                reason = str(error)
                continue
            if not self.packed.is_placed(table):
                reason = (
                    f"the {label} of the rotation is that of one position, whatever the positions are: export the model with positions as an "
                    "input, or with a free number of cached tokens"
                )
                continue
            wish = f"rope.{label}"
            tolerance = 1e-6 if tensor.dtype in (None, np.dtype(np.float32)) else TOLERANCE
            width = self.probe.shape(tensor)[-1] if pick != "pair" else 1
            if pick.startswith("column"):
                table = self.emitter.reshape(table, [-1, half, 2], wish)
                column = int(pick[-1])
                table = self._slice(table, column, column + 1, 2, wish)
                table = self.emitter.reshape(table, [-1, half], wish)
            elif pick == "pair":
                table = self.emitter.reshape(table, [-1, half], wish)
            else:
                table = self.emitter.reshape(table, [-1, width], wish)
                if pick == "first":
                    table = self._slice(table, 0, half, 1, wish)
                elif pick == "even":
                    table = self.emitter.gather(table, np.arange(0, width, 2), 1, wish)
            if tensor.dtype is not None and tensor.dtype != np.float32:
                table = self.emitter.cast(table, np.dtype(np.float32), wish)
            if not math.isclose(ratio, 1.0, rel_tol=tolerance):
                table = self.emitter.node(
                    "Mul",
                    [table, self.emitter.constant(f"{wish}.factor", ratio, np.float32)],
                    wish,
                    dtype=np.dtype(np.float32),
                )
            self._tables[key] = table
            return table
        raise NoMatch(f"the rotation cannot be given positions of its own: {reason}", node)

    def _weights(self, match: MlaMatch, name: str, inputs: dict[str, gs.Tensor]) -> None:
        if match.w_uk is None or match.w_uv is None:
            return
        for label, up, axes in (("w_uk", match.w_uk, (0, 2, 1)), ("w_uv", match.w_uv, (0, 1, 2))):
            weights = np.ascontiguousarray(up.weights(self.probe).transpose(axes))
            self.probe.forget([up.operand])
            if self.fp8_weights:
                weights, scales = quantize_blocks(weights, WEIGHT_BLOCK)
                inputs[f"{label}_scale"] = self.emitter.constant(f"{name}.{label}_scale", scales, np.float32)
            inputs[label] = self._weight(f"{name}.{label}", weights)

    def _weight(self, wish: str, weights: np.ndarray) -> gs.Constant:
        """A constant whose bytes go to the weight file, where there is one."""
        if self.weight_file is None:
            return typed_constant(self.emitter, wish, weights, weights.dtype)
        tensor = self.weight_file.add_array(self.emitter.names.new(wish), weights)
        return gs.Constant(tensor.name, LazyValues(tensor), data_location=TensorProto.EXTERNAL)

    def _cache(self, kind: str, layer: int, page_words: int) -> tuple[gs.Variable, gs.Variable]:
        prefix = "kv_cache" if kind == "kv" else "indexer_cache"
        name = f"{prefix}.{layer}"
        cache = self._input(name, ["pages", page_words])
        out = self._known(f"{prefix}_out.{layer}", ["pages", page_words])
        self.graph.outputs.append(out)
        self.caches.append(LoweredCache(name, layer, kind, page_words))
        return cache, out

    def _select(
        self,
        layer: int,
        match: MlaMatch,
        indexer: IndexerMatch | None,
        name: str,
        inputs: dict[str, gs.Tensor],
        attributes: dict[str, Any],
    ) -> list[gs.Tensor]:
        """Adds what picks the keys: an indexer of the layer's own, or the indices of an earlier layer."""
        assert match.selection is not None
        indices = self.emitter.variable(f"{name}.indices", np.dtype(np.int32))
        shared = self._selections.get(id(match.selection))
        if shared is not None:
            inputs["indices"], earlier = shared
            attributes.update(earlier)
            return []
        assert indexer is not None
        index_query = self.features(indexer.query, f"{name}.index_query")
        if indexer.query_scale is not None:
            wish = f"{name}.index_query"
            index_query = self._scaled_by_token(index_query, indexer.query_scale, indexer.rotation, wish, indexer.node)
        inputs["index_query"] = index_query
        inputs["index_key"] = self.features(indexer.key, f"{name}.index_key")
        weights = self.features(indexer.weights, f"{name}.index_weights")
        if indexer.weights.tensor.dtype not in (None, np.dtype(np.float32)):
            weights = self.emitter.cast(weights, np.dtype(np.float32), f"{name}.index_weights")
        inputs["index_weights"] = weights
        if indexer.norm is not None:
            inputs["index_norm_weight"] = self.emitter.constant(
                f"{name}.index_norm_weight", indexer.norm.weight, np.float32
            )
            inputs["index_norm_bias"] = self.emitter.constant(f"{name}.index_norm_bias", indexer.norm.bias, np.float32)
        half = indexer.rope_dim // 2
        for label, wanted in (("cos", indexer.rotation.cos), ("sin", indexer.rotation.sin)):
            inputs[f"index_{label}"] = (
                self._table(indexer.rotation, label, wanted, half, indexer.node)
                if half
                else self._table_constant(label, np.zeros((1, 0)))
            )
        layout = IndexLayout(
            page_size=self.format.page_size,
            index_format=self.format.index_format,
            index_head_dim=indexer.head_dim,
            scale_ue8m0=False,
        )
        inputs["indexer_cache"], cache_out = self._cache("indexer", layer, layout.page_words)
        own = {
            "index_head_dim": indexer.head_dim,
            "index_rope_dim": indexer.rope_dim,
            "index_rope_interleaved": int(indexer.rotation.interleaved),
            "index_norm_epsilon": indexer.norm.epsilon if indexer.norm is not None else 0.0,
            "index_hadamard": int(indexer.hadamard),
            "index_format": self.format.index_format,
            "index_scale_ue8m0": 0,
            "top_k": indexer.top_k,
        }
        attributes.update(own)
        self._selections[id(match.selection)] = indices, own
        return [indices, cache_out]

    def finish(self) -> None:
        """Puts the results in place of the export's. Before this the export's own graph is as it was, so that probes still read it."""
        for old, new in self._results:
            replace_uses(self.graph, old, new)

    # -- the result -----------------------------------------------------------------------------------------------

    def _leave(self, result: gs.Tensor, way_out: Exit, match: MlaMatch) -> gs.Tensor:
        """The op's output [T, H, Dv] in the layout in which the export's tensor had it."""
        sizes = {"b": self.probe.batch, "s": self.probe.sizes.new, "h": match.num_heads, "d": match.v_head_dim}
        wish = f"{way_out.tensor.name}.packed"
        wanted = way_out.tensor.dtype
        if wanted is not None and wanted != result.dtype:
            result = self.emitter.cast(result, wanted, wish)
        order = way_out.order
        if order != "bshd":
            result = self._reshape_tokens(result, ["b", "s", match.num_heads, match.v_head_dim], wish)
            result = self.emitter.node("Transpose", [result], wish, perm=["bshd".index(axis) for axis in order])
        varying = {PACKED: "s", BY_SEQUENCE: "b", UNPACKED: "bs"}[self.layout]
        shape: list[int | str] = []
        for names in way_out.axes:
            tokens = "".join(axis for axis in names if axis in "bs")
            extent = math.prod(sizes[axis] for axis in names if axis in "hd")
            if self.layout == UNPACKED and tokens and extent > 1:
                raise NoMatch("the result leaves in a layout that merges tokens and heads", match.softmax)
            shape.append(tokens if set(tokens) & set(varying) or (tokens and extent == 1) else extent)
        return self._reshape_tokens(result, shape, wish)

    def _reshape_tokens(self, tensor: gs.Tensor, shape: list[int | str], wish: str) -> gs.Tensor:
        """Reshape to sizes and token axes: "b" sequences, "s" their tokens, "bs" both in one."""
        if self.layout == UNPACKED and "b" in shape and "s" in shape:
            axes: list[Axis] = [
                {"b": "B", "s": "S"}.get(size, size) if isinstance(size, str) else size for size in shape
            ]
            sizes = packed_sizes(self.emitter, self.tokens, self.probe.interface, axes, f"{wish}.shape")
            return self.emitter.node("Reshape", [tensor, sizes], wish, allowzero=0)
        varying = {"bs", "sb", "b" if self.layout == BY_SEQUENCE else "s"}
        if self.layout == UNPACKED:
            varying = {"bs", "sb", "b", "s"}
        return self.emitter.reshape(
            tensor, [size if isinstance(size, int) else -1 if size in varying else 1 for size in shape], wish
        )


def token_layout(interface: ModelInterface) -> str:
    """How the lowered graph lays its tokens out."""
    if interface.by_role(roles.STATE):
        return UNPACKED
    return BY_SEQUENCE if interface.fixed.get("S") == 1 and "B" in interface.tokens.axes else PACKED


def _table_view(value: np.ndarray, wanted: np.ndarray) -> tuple[str, float] | None:
    """Which part of a tensor is a multiple of `wanted` [S, half], and the multiple."""
    new, half = wanted.shape
    if not half or value.ndim == 0 or value.size % (new * half):
        return None
    views: dict[str, np.ndarray] = {}
    if value.shape[-1] == half:
        views["all"] = value.reshape(-1, half)
    if value.shape[-1] == 2 * half:
        wide = value.reshape(-1, 2 * half)
        views |= {"first": wide[:, :half], "even": wide[:, ::2]}
    if value.ndim > 1 and value.shape[-2:] == (half, 2):
        views |= {f"column{column}": value[..., column].reshape(-1, half) for column in (0, 1)}
    if value.ndim > 1 and value.shape[-2:] == (half, 1):
        views["pair"] = value.reshape(-1, half)
    for pick, view in views.items():
        if view.shape[0] % new:
            continue
        rows = view.reshape(-1, new, half)
        if not (rows == rows[:1]).all():
            continue
        ratio = float((wanted * rows[0]).sum() / max((rows[0] ** 2).sum(), 1e-300))
        if ratio and np.allclose(wanted, ratio * rows[0], rtol=1e-4, atol=1e-6):
            return pick, ratio
    return None


def _as_token_scale(value: np.ndarray, wanted: np.ndarray) -> tuple[list[int], float] | None:
    """The order of axes in which a tensor, times a ratio, is `wanted` [B, S, H]: that order, tokens first, and the ratio."""
    axes = [axis for axis, size in enumerate(value.shape) if size != 1]
    for moved in itertools.permutations(axes):
        sizes = [value.shape[axis] for axis in moved]
        for shape in itertools.product(*((1, size) if at < 2 else (size,) for at, size in enumerate(wanted.shape))):
            if [size for size in shape if size != 1] != sizes:
                continue
            laid_out = np.broadcast_to(
                value.transpose([*moved, *_others(axes, value.ndim)]).reshape(shape), wanted.shape
            )
            ratio = wanted / np.where(laid_out == 0, np.nan, laid_out)
            if np.allclose(ratio, ratio[0, 0, 0], rtol=1e-5):
                return [*moved, *_others(axes, value.ndim)], float(ratio[0, 0, 0])
    return None


def _others(axes: list[int], rank: int) -> list[int]:
    return [axis for axis in range(rank) if axis not in axes]


def typed_constant(emitter: Emitter, wish: str, values: np.ndarray, dtype: Any) -> gs.Constant:
    """A constant of any ONNX type, those that numpy does not have among them."""
    element = dtype if isinstance(dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    name = emitter.names.new(wish)
    array = np.ascontiguousarray(np.asarray(values).astype(onnx.helper.tensor_dtype_to_np_dtype(element)))
    return gs.Constant(name, LazyValues(numpy_helper.from_array(array, name)))
