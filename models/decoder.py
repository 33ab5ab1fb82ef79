"""A DeepSeek-V3 or V3.2 decoder step as an ONNX graph, node for node in the idiom of PyTorch's dynamo exporter at
opset 20 with eager attention and latent caches; only the experts are unrolled, one by one, as exports with a module
for each expert have them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto

from mla_trt.errors import UsageError
from mla_trt.models.graph_writer import GraphWriter
from mla_trt.models.weights import NUMPY_TYPES, WeightStore

OPSET = 20
Routing = Literal["gather", "mask"]
_TO_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class DecoderSettings:
    """Dimensions and choices of a decoder.

    Attributes:
        fields: configuration fields under Transformers' names, as `ModelConfig.fields` gives them.
        routing: `gather` runs each expert on its own tokens (NonZero, Gather, ScatterND); `mask` runs each on all
            tokens and weighs the results.
        dtype: ONNX type of weights and activations.
    """

    fields: dict[str, Any]
    routing: Routing = "gather"
    dtype: int = TensorProto.FLOAT

    @property
    def is_sparse(self) -> bool:
        """Whether an indexer selects the keys of each token."""
        return "index_topk" in self.fields

    @property
    def softmax_scale(self) -> float:
        """Scale of the scores, with YaRN's correction."""
        rope = self.fields["rope_parameters"]
        scale = (self.fields["qk_nope_head_dim"] + self.fields["qk_rope_head_dim"]) ** -0.5
        if rope.get("rope_type") != "yarn" or rope["factor"] <= 1:
            return scale
        return scale * (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0) ** 2


def inverse_frequencies(dim: int, rope: dict[str, Any]) -> np.ndarray:
    """Rotary frequencies [dim / 2], f32. YaRN's (Peng et al., 2023, section 3.2): low frequencies are divided by
    `factor`, high ones kept, with a linear ramp between the dimensions that turn `beta_slow` and `beta_fast` times
    over the original length."""
    base, exponents = rope["rope_theta"], np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    plain = 1.0 / (base**exponents)
    if rope.get("rope_type") != "yarn":
        return plain.astype(np.float32)

    def dimension_of(turns: float) -> float:
        return dim * math.log(rope["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension_of(rope["beta_fast"])), 0)
    high = min(math.ceil(dimension_of(rope["beta_slow"])), dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    return (plain / rope["factor"] * ramp + plain * (1 - ramp)).astype(np.float32)


def build_decoder(settings: DecoderSettings, weights: WeightStore) -> onnx.ModelProto:
    """The model of one step: `input_ids`, `attention_mask`, `position_ids` and `past_{l}.*` in, `logits` and
    `present_{l}.*` out.

    Raises:
        UsageError: a part of the configuration is none that the generator writes.
    """
    if settings.fields["q_lora_rank"] is None or "first_k_dense_replace" not in settings.fields:
        raise UsageError(
            "full-size graphs are written for the configurations of deepseek-v3 and those that share its architecture"
        )
    return _Decoder(settings, weights).build()


class _Decoder:
    def __init__(self, settings: DecoderSettings, weights: WeightStore) -> None:
        self.settings = settings
        self.s = SimpleNamespace(**settings.fields)
        self.g = GraphWriter(weights, settings.dtype)
        self.numpy_type = NUMPY_TYPES[settings.dtype]

    def build(self) -> onnx.ModelProto:
        s, g = self.s, self.g
        ids = g.input("input_ids", TensorProto.INT64, ["batch", "sequence"])
        self.attention_mask = g.input("attention_mask", TensorProto.INT64, ["batch", "total"])
        self.position_ids = g.input("position_ids", TensorProto.INT64, ["batch", "sequence"])
        for layer in range(s.num_hidden_layers):
            g.input(f"past_{layer}.keys", g.dtype, ["batch", 1, "past", s.kv_lora_rank])
            g.input(f"past_{layer}.values", g.dtype, ["batch", 1, "past", s.qk_rope_head_dim])
            if self.settings.is_sparse:
                g.input(f"past_{layer}.indexer_keys", g.dtype, ["batch", "past", s.index_head_dim])
        with g.scope("model"):
            self._shapes(ids)
            table = g.parameter("model.embed_tokens.weight", (s.vocab_size, s.hidden_size))
            hidden = g.node("Gather", table, ids, axis=0)
            self.mask = self._causal_mask()
            self.cos, self.sin = self._rope_angles()
            for layer in range(s.num_hidden_layers):
                with g.scope(f"layers.{layer}"):
                    hidden = self._layer(layer, hidden)
            hidden = self._norm(hidden, "model.norm.weight", s.hidden_size)
        g.linear(hidden, s.hidden_size, s.vocab_size, output="logits")
        g.output("logits", g.dtype, ["batch", "sequence", s.vocab_size])
        for layer in range(s.num_hidden_layers):
            g.output(f"present_{layer}.keys", g.dtype, ["batch", 1, "total", s.kv_lora_rank])
            g.output(f"present_{layer}.values", g.dtype, ["batch", 1, "total", s.qk_rope_head_dim])
            if self.settings.is_sparse:
                g.output(f"present_{layer}.indexer_keys", g.dtype, ["batch", "total", s.index_head_dim])
        return g.model(OPSET)

    # What depends on shapes and positions only, made once.

    def _shapes(self, ids: str) -> None:
        g = self.g
        self.sequence_1d = g.node("Shape", ids, start=1, end=2)
        self.sequence = g.node("Squeeze", self.sequence_1d)
        past = g.node("Squeeze", g.node("Shape", "past_0.keys", start=2, end=3))
        self.past = past
        self.batch_1d = g.node("Shape", "past_0.values", start=0, end=1)
        self.batch = g.node("Squeeze", self.batch_1d)
        self.total = g.node("Add", past, self.sequence)
        self.total_1d = g.node("Reshape", self.total, g.constant([-1]), allowzero=0)

    def _shape_of(self, *parts: str | int) -> str:
        """A shape from one-element values and numbers."""
        values = [part if isinstance(part, str) else self.g.constant([part]) for part in parts]
        return self.g.shared("Concat", *values, axis=0)

    def _reshape(self, x: str, *parts: str | int) -> str:
        return self.g.node("Reshape", x, self._shape_of(*parts), allowzero=1)

    def _causal_mask(self) -> str:
        g = self.g
        zero, one = g.constant(0), g.constant(1)
        rows = g.node("Range", zero, self.batch, one)
        queries = g.node("Add", g.node("Range", zero, self.sequence, one), self.past)
        keys = g.node("Range", zero, self.total, one)
        rows = g.node("Unsqueeze", g.node("Unsqueeze", rows, g.constant([1, 2])), g.constant([3]))
        queries = g.node("Unsqueeze", g.node("Unsqueeze", queries, g.constant([0, 1])), g.constant([3]))
        keys = g.node("Unsqueeze", g.node("Unsqueeze", keys, g.constant([0, 1])), g.constant([2]))
        causal = g.node("And", g.constant(True, np.bool_), g.node("LessOrEqual", keys, queries))
        common = g.node("Shape", g.node("Max", rows, keys), start=0)
        index = [g.node("Unsqueeze", g.node("Expand", axis, common), g.constant([-1])) for axis in (rows, keys)]
        kept = g.node("Cast", self.attention_mask, to=TensorProto.BOOL)
        padding = g.node("GatherND", kept, g.node("Concat", *index, axis=-1), batch_dims=0)
        visible = g.node(
            "Expand", g.node("And", causal, padding), self._shape_of(self.batch_1d, 1, self.sequence_1d, self.total_1d)
        )
        return g.node("Where", visible, g.constant(0.0, self.numpy_type), self._lowest())

    def _lowest(self) -> str:
        lowest = ml_dtypes.finfo(self.numpy_type).min
        return self.g.constant(lowest, self.numpy_type)

    def _rope_angles(self) -> tuple[str, str]:
        g, s = self.g, self.s
        positions = g.cast(g.node("Unsqueeze", self.position_ids, g.constant([2])), TensorProto.FLOAT)
        frequencies = g.constant(inverse_frequencies(s.qk_rope_head_dim, s.rope_parameters), np.float32)
        half = g.node("Mul", positions, frequencies)
        angles = g.node("Concat", half, half, axis=-1)
        return g.from_float(g.node("Cos", angles)), g.from_float(g.node("Sin", angles))

    # Parts of a layer.

    def _norm(self, x: str, name: str, width: int) -> str:
        g, s = self.g, self.s
        exact = g.to_float(x)
        mean = g.node("ReduceMean", g.node("Pow", exact, g.constant(2.0, np.float32)), g.constant([-1]), keepdims=1)
        root = g.node("Sqrt", g.node("Add", mean, g.constant(s.rms_norm_eps, np.float32)))
        normed = g.from_float(g.node("Mul", exact, g.node("Reciprocal", root)))
        return g.node("Mul", g.parameter(name, (width,), norm=True), normed)

    def _layer(self, layer: int, hidden: str) -> str:
        g, s = self.g, self.s
        name = f"model.layers.{layer}"
        normed = self._norm(hidden, f"{name}.input_layernorm.weight", s.hidden_size)
        with g.scope("self_attn"):
            attention = self._attention(layer, normed)
        hidden = g.node("Add", hidden, attention)
        normed = self._norm(hidden, f"{name}.post_attention_layernorm.weight", s.hidden_size)
        with g.scope("mlp"):
            if layer < s.first_k_dense_replace:
                update = self._gated_mlp(normed, s.intermediate_size)
            else:
                update = self._experts(f"{name}.mlp", normed)
        return g.node("Add", hidden, update)

    def _attention(self, layer: int, x: str) -> str:
        g, s = self.g, self.s
        name = f"model.layers.{layer}.self_attn"
        heads, nope, rope, value, rank = (
            s.num_attention_heads,
            s.qk_nope_head_dim,
            s.qk_rope_head_dim,
            s.v_head_dim,
            s.kv_lora_rank,
        )
        q_latent = self._norm(g.linear(x, s.hidden_size, s.q_lora_rank), f"{name}.q_a_layernorm.weight", s.q_lora_rank)
        query = g.linear(q_latent, s.q_lora_rank, heads * (nope + rope))
        query = g.node(
            "Transpose", self._reshape(query, self.batch_1d, self.sequence_1d, -1, nope + rope), perm=[0, 2, 1, 3]
        )
        q_nope, q_rope = g.node("Split", query, g.constant([nope, rope]), outputs=2, axis=3)
        compressed = g.linear(x, s.hidden_size, rank + rope)
        latent, rope_key = g.node("Split", compressed, g.constant([rank, rope]), outputs=2, axis=2)
        latent = self._norm(latent, f"{name}.kv_a_layernorm.weight", rank)
        latent = self._reshape(latent, self.batch_1d, 1, self.sequence_1d, rank)
        rope_key = self._reshape(rope_key, self.batch_1d, 1, self.sequence_1d, rope)
        q_rope, rope_key = self._rope_interleaved([q_rope, rope_key])
        latents = g.node("Concat", f"past_{layer}.keys", latent, output=f"present_{layer}.keys", axis=-2)
        rope_keys = g.node("Concat", f"past_{layer}.values", rope_key, output=f"present_{layer}.values", axis=-2)
        query = g.node("Concat", q_nope, q_rope, axis=-1)
        expanded = g.linear(latents, rank, heads * (nope + value))
        expanded = g.node(
            "Transpose", self._reshape(expanded, self.batch_1d, self.total_1d, -1, nope + value), perm=[0, 2, 1, 3]
        )
        k_nope, values = g.node("Split", expanded, g.constant([nope, value]), outputs=2, axis=3)
        keys = self._assemble_keys(k_nope, rope_keys)
        mask = self._selection(layer, q_latent, x) if self.settings.is_sparse else self.mask
        scores = g.node("Mul", g.node("MatMul", query, keys), g.constant(self.settings.softmax_scale, self.numpy_type))
        weights = g.node("Softmax", g.node("Add", scores, mask), axis=-1)
        output = g.node("Transpose", g.node("MatMul", weights, values), perm=[0, 2, 1, 3])
        output = self._reshape(output, self.batch_1d, self.sequence_1d, -1)
        return g.linear(output, heads * value, s.hidden_size)

    def _slice(self, x: str, start: int, end: int, axis: int, step: int = 1, *, shared: bool = False) -> str:
        add = self.g.shared if shared else self.g.node
        return add("Slice", x, *(self.g.constant([value]) for value in (start, end, axis, step)))

    def _rope_interleaved(self, inputs: list[str]) -> list[str]:
        """Rotates pairs (2j, 2j + 1) of each input [B, heads, S, Dr]; the results have the two halves apart."""
        g, half = self.g, self.s.qk_rope_head_dim // 2
        cos, sin = (
            g.shared("Unsqueeze", self._slice(table, 0, half, 2, shared=True), g.constant([1]))
            for table in (self.cos, self.sin)
        )
        rotated = []
        for x in inputs:
            even, odd = self._slice(x, 0, _TO_END, 3, 2), self._slice(x, 1, _TO_END, 3, 2)
            first = g.node("Sub", g.node("Mul", even, cos), g.node("Mul", odd, sin))
            second = g.node("Add", g.node("Mul", odd, cos), g.node("Mul", even, sin))
            rotated.append(g.node("Concat", first, second, axis=-1))
        return rotated

    def _assemble_keys(self, k_nope: str, rope_keys: str) -> str:
        """Keys [B, H, Dn + Dr, T]: the exporter writes both parts into zeros, along a last axis that it has turned to
        the front."""
        g, s = self.g, self.s
        heads, nope, width = s.num_attention_heads, s.qk_nope_head_dim, s.qk_nope_head_dim + s.qk_rope_head_dim
        turned = [3, 1, 2, 0]
        rope = g.node("Expand", rope_keys, g.constant([1, heads, 1, 1]))
        zeros = g.shared(
            "ConstantOfShape", self._shape_of(self.batch_1d, heads, self.total_1d, width), value=self._zero()
        )
        front = self._last_axis_rows(zeros, 0, nope, shared=True)
        zeros = g.shared("Transpose", zeros, perm=turned)
        keys = g.node(
            "Transpose", g.node("ScatterND", zeros, front, g.node("Transpose", k_nope, perm=turned)), perm=turned
        )
        back = self._last_axis_rows(keys, nope, _TO_END)
        rope = g.node("Transpose", rope, perm=turned)
        keys = g.node("ScatterND", g.node("Transpose", keys, perm=turned), back, rope)
        return g.node("Transpose", keys, perm=[3, 1, 0, 2])

    def _last_axis_rows(self, x: str, start: int, end: int, *, shared: bool = False) -> str:
        """Indices [n, 1] of a range of the last of four axes, from the shape in the graph."""
        g = self.g
        add = g.shared if shared else g.node
        size = add("Gather", add("Shape", x, start=0), g.constant(3), axis=0)
        every = add("Range", g.constant(0), size, g.constant(1))
        return add("Unsqueeze", self._slice(every, start, end, 0, shared=shared), g.constant([-1]))

    def _zero(self) -> TensorProto:
        return onnx.numpy_helper.from_array(np.zeros(1, self.numpy_type))

    def _selection(self, layer: int, q_latent: str, x: str) -> str:
        """The mask without the keys that the indexer does not choose."""
        g, s = self.g, self.s
        name = f"model.layers.{layer}.self_attn.indexer"
        heads, width, rope = s.index_n_heads, s.index_head_dim, s.qk_rope_head_dim
        with g.scope("indexer"):
            query = self._reshape(
                g.linear(q_latent, s.q_lora_rank, heads * width), self.batch_1d, self.sequence_1d, heads, width
            )
            q_rope, q_rest = g.node("Split", query, g.constant([rope, width - rope]), outputs=2, axis=3)
            scale = g.parameter(f"{name}.k_norm.weight", (width,), norm=True)
            bias = g.parameter(f"{name}.k_norm.bias", (width,))
            key = g.linear(x, s.hidden_size, width)
            key = g.node("LayerNormalization", key, scale, bias, axis=-1, epsilon=1e-6, stash_type=1)
            key = g.node("Unsqueeze", key, g.constant([2]))
            k_rope, k_rest = g.node("Split", key, g.constant([rope, width - rope]), outputs=2, axis=3)
            q_rope, k_rope = self._rope_halves([q_rope, k_rope])
            query = g.node("Concat", q_rope, q_rest, axis=-1)
            key = g.node("Squeeze", g.node("Concat", k_rope, k_rest, axis=-1), g.constant([2]))
            keys = g.node("Concat", f"past_{layer}.indexer_keys", key, output=f"present_{layer}.indexer_keys", axis=1)
            keys = g.node("Unsqueeze", g.to_float(g.node("Transpose", keys, perm=[0, 2, 1])), g.constant([1]))
            scores = g.node("Mul", g.node("MatMul", g.to_float(query), keys), g.constant(width**-0.5, np.float32))
            weights = g.to_float(g.linear(x, s.hidden_size, heads))
            weights = g.node("Unsqueeze", g.node("Mul", weights, g.constant(heads**-0.5, np.float32)), g.constant([-2]))
            scores = g.node("Squeeze", g.node("MatMul", weights, g.node("Relu", scores)), g.constant([-2]))
            causal = g.to_float(g.shared("Gather", self.mask, g.constant(0), axis=1))
            count = g.shared("Min", g.constant(s.index_topk), self.total)
            count = g.shared("Reshape", count, g.constant([-1]), allowzero=0)
            _, chosen = g.node("TopK", g.node("Add", scores, causal), count, outputs=2, axis=-1, largest=1, sorted=1)
            chosen = g.cast(chosen, TensorProto.INT32)
            ones = g.shared(
                "Expand", g.constant(1.0, np.float32), self._shape_of(self.batch_1d, self.sequence_1d, self.total_1d)
            )
            ones = g.shared("Cast", ones, to=TensorProto.BOOL)
            chosen = g.cast(chosen, TensorProto.INT64)
            false = onnx.numpy_helper.from_array(np.zeros(1, np.bool_))
            updates = g.node("ConstantOfShape", g.node("Shape", chosen, start=0), value=false)
            hidden = g.node("ScatterElements", ones, chosen, updates, axis=-1)
        return g.node("Where", g.node("Unsqueeze", hidden, g.constant([1])), self._lowest(), self.mask)

    def _rope_halves(self, inputs: list[str]) -> list[str]:
        """Rotates pairs (j, j + Dr/2) of each input [B, S, heads, Dr]."""
        g, half = self.g, self.s.qk_rope_head_dim // 2
        cos, sin = (g.shared("Unsqueeze", table, g.constant([2])) for table in (self.cos, self.sin))
        rotated = []
        for x in inputs:
            first, second = self._slice(x, 0, half, 3), self._slice(x, half, _TO_END, 3)
            turned = g.node("Concat", g.node("Neg", second), first, axis=-1)
            rotated.append(g.node("Add", g.node("Mul", x, cos), g.node("Mul", turned, sin)))
        return rotated

    def _gated_mlp(self, x: str, width: int) -> str:
        g, hidden = self.g, self.s.hidden_size
        gate = g.linear(x, hidden, width)
        gate = g.node("Mul", gate, g.node("Sigmoid", gate))
        return g.linear(g.node("Mul", gate, g.linear(x, hidden, width)), width, hidden)

    # Mixture of experts.

    def _experts(self, name: str, x: str) -> str:
        g, s = self.g, self.s
        tokens = g.node("Reshape", x, g.constant([-1, s.hidden_size]), allowzero=1)
        with g.scope("gate"):
            chosen, weights = self._route(name, tokens)
        with g.scope("experts"):
            mixed = (
                self._gathered_experts(tokens, chosen, weights)
                if self.settings.routing == "gather"
                else self._masked_experts(tokens, chosen, weights)
            )
        mixed = self._reshape(mixed, self.batch_1d, self.sequence_1d, s.hidden_size)
        with g.scope("shared_experts"):
            shared = self._gated_mlp(x, s.moe_intermediate_size * s.n_shared_experts)
        return g.node("Add", mixed, shared)

    def _route(self, name: str, tokens: str) -> tuple[str, str]:
        """Indices and weights [tokens, experts per token] of each token's experts."""
        g, s = self.g, self.s
        groups, per_group = s.n_group, s.n_routed_experts // s.n_group
        router = g.parameter(f"{name}.gate.weight", (s.n_routed_experts, s.hidden_size))
        logits = g.node("Gemm", g.to_float(tokens), g.to_float(router), transB=1)
        scores = g.node("Sigmoid", logits)
        bias = g.parameter(f"{name}.gate.e_score_correction_bias", (s.n_routed_experts,))
        biased = g.node("Add", scores, g.to_float(bias))
        grouped = g.node("Reshape", biased, g.constant([-1, groups, per_group]), allowzero=1)
        best, _ = g.node("TopK", grouped, g.constant([2]), outputs=2, axis=-1)
        group_scores = g.node("ReduceSum", best, g.constant([-1]), keepdims=0)
        _, best_groups = g.node("TopK", group_scores, g.constant([s.topk_group]), outputs=2, axis=-1, sorted=0)
        zeros = g.node("Expand", g.constant(0.0, np.float32), g.node("Shape", group_scores, start=0))
        one = onnx.numpy_helper.from_array(np.ones(1, np.float32))
        ones = g.node("ConstantOfShape", g.node("Shape", best_groups, start=0), value=one)
        kept = g.node("Unsqueeze", g.node("ScatterElements", zeros, best_groups, ones, axis=1), g.constant([-1]))
        kept = g.node(
            "Reshape",
            g.node("Expand", kept, g.constant([1, 1, per_group])),
            g.constant([-1, s.n_routed_experts]),
            allowzero=1,
        )
        dropped = g.node("Not", g.cast(kept, TensorProto.BOOL))
        biased = g.node("Where", dropped, g.constant(-np.inf, np.float32), biased)
        _, chosen = g.node("TopK", biased, g.constant([s.num_experts_per_tok]), outputs=2, axis=-1, sorted=0)
        weights = g.node("GatherElements", scores, chosen, axis=1)
        weights = g.node("Div", weights, g.node("ReduceSum", weights, g.constant([-1]), keepdims=1))
        return chosen, g.from_float(g.node("Mul", weights, g.constant(s.routed_scaling_factor, np.float32)))

    def _gathered_experts(self, tokens: str, chosen: str, weights: str) -> str:
        g, s = self.g, self.s
        hot = g.node("OneHot", chosen, g.constant(s.n_routed_experts), g.constant([0, 1]), axis=-1)
        hot = g.node("Transpose", hot, perm=[2, 0, 1])
        mixed = g.node("Expand", g.constant(0.0, self.numpy_type), g.node("Shape", tokens, start=0))
        for expert in range(s.n_routed_experts):
            with g.scope(str(expert)):
                places = g.node("NonZero", g.node("Gather", hot, g.constant(expert), axis=0))
                rows = g.node("Gather", places, g.constant(0), axis=0)
                output = self._gated_mlp(g.node("Gather", tokens, rows, axis=0), s.moe_intermediate_size)
                weight = g.node("GatherND", weights, g.node("Transpose", places, perm=[1, 0]))
                output = g.node("Mul", output, g.node("Unsqueeze", weight, g.constant([-1])))
                mixed = g.node("ScatterND", mixed, g.node("Unsqueeze", rows, g.constant([-1])), output, reduction="add")
        return mixed

    def _masked_experts(self, tokens: str, chosen: str, weights: str) -> str:
        g, s = self.g, self.s
        rows = g.node("Shape", tokens, start=0, end=1)
        zeros = g.node(
            "Expand", g.constant(0.0, self.numpy_type), g.node("Concat", rows, g.constant([s.n_routed_experts]), axis=0)
        )
        weights = g.node("ScatterElements", zeros, chosen, weights, axis=1)
        mixed = ""
        for expert in range(s.n_routed_experts):
            with g.scope(str(expert)):
                weight = g.node("Gather", weights, g.constant([expert]), axis=1)
                output = g.node("Mul", self._gated_mlp(tokens, s.moe_intermediate_size), weight)
                mixed = g.node("Add", mixed, output) if mixed else output
        return mixed
