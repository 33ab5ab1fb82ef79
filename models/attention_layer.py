"""One attention layer of DeepSeek-V3 as ONNX graphs over the same weights: as Transformers' code exports it, which expands
keys and values of all cached tokens, and absorbed by hand (DeepSeek-V2, section 2.1.2: W_UK goes to the query, W_UV to the
output), which attends in the latent space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from mla_trt.models.graph_writer import GraphWriter
from mla_trt.models.weights import NUMPY_TYPES
from mla_trt.passes.quantize import quantize_blocks
from mla_trt.weight_file import WeightFile

OPSET = 20
EPSILON = 1e-6
DISTINCT = (
    1_000_003  # random values that are drawn; a prime, so that their repetition has no period in common with shapes
)
BLOCK = 128  # rows and columns of a weight that have one scale
_TO_END = np.iinfo(np.int64).max
Axis = str | int


@dataclass(frozen=True)
class LayerDimensions:
    """Sizes of the layer, under the names of docs/op-set.md; the defaults are DeepSeek-V3's. With index heads it is DeepSeek-V3.2's, which
    has 64: a token attends to the `top_k` keys that an indexer chooses."""

    hidden: int = 7168
    heads: int = 128
    query_rank: int = 1536
    rank: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128
    index_heads: int = 0
    index_dim: int = 128
    top_k: int = 2048

    @property
    def softmax_scale(self) -> float:
        """Scale of the scores."""
        return float((self.nope + self.rope) ** -0.5)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each weight, [in, out] where it is multiplied with."""
        return {
            "q_a_proj": (self.hidden, self.query_rank),
            "q_a_layernorm": (self.query_rank,),
            "q_b_proj": (self.query_rank, self.heads * (self.nope + self.rope)),
            "kv_a_proj": (self.hidden, self.rank + self.rope),
            "kv_a_layernorm": (self.rank,),
            "kv_b_proj": (self.rank, self.heads * (self.nope + self.value)),
            "o_proj": (self.heads * self.value, self.hidden),
            **(self._index_shapes() if self.index_heads else {}),
        }

    def _index_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "index_q_proj": (self.query_rank, self.index_heads * self.index_dim),
            "index_k_proj": (self.hidden, self.index_dim),
            "index_k_norm": (self.index_dim,),
            "index_k_bias": (self.index_dim,),
            "index_weights_proj": (self.hidden, self.index_heads),
        }


@dataclass(frozen=True)
class LayerWeights:
    """Random weights of a layer.

    Attributes:
        arrays: values by name: those of `LayerDimensions.weight_shapes` and, made of kv_b_proj, w_uk [H, Dn, R] and w_uv [H, R, Dv].
        tensors: the initializers that hold them.
        dtype: their ONNX type.
    """

    arrays: dict[str, np.ndarray]
    tensors: dict[str, TensorProto]
    dtype: int

    def weight(self, name: str, shape: tuple[int, ...], dtype: int, *, norm: bool = False) -> TensorProto:
        """The initializer of one weight."""
        assert shape == self.arrays[name].shape
        assert dtype == self.dtype
        return self.tensors[name]


def random_weights(
    dimensions: LayerDimensions, dtype: int, path: Path | None = None, *, seed: int = 0, of_codes: bool = False
) -> LayerWeights:
    """Weights of sizes that keep activations near 1.

    Args:
        dimensions: of the layer.
        dtype: ONNX type.
        path: file of external data to write them to; None: they are kept in the tensors.
        seed: of the values.
        of_codes: matrices are what e4m3 codes with a scale for each block of 128 x 128 stand for, as DeepSeek's checkpoints have them.
    """
    random = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for name, shape in dimensions.weight_shapes().items():
        if len(shape) == 1:
            arrays[name] = random.uniform(0.5, 1.5, shape).astype(NUMPY_TYPES[dtype])
        else:
            drawn = random.standard_normal(min(DISTINCT, int(np.prod(shape))), np.float32) * shape[0] ** -0.5
            values = np.resize(drawn.astype(NUMPY_TYPES[dtype]), shape)
            arrays[name] = _rounded_to_codes(values) if of_codes else values
    both = arrays["kv_b_proj"].reshape(dimensions.rank, dimensions.heads, dimensions.nope + dimensions.value)
    arrays["w_uk"] = np.ascontiguousarray(both[:, :, : dimensions.nope].transpose(1, 2, 0))
    arrays["w_uv"] = np.ascontiguousarray(both[:, :, dimensions.nope :].transpose(1, 0, 2))
    if path is None:
        tensors = {name: numpy_helper.from_array(array, name) for name, array in arrays.items()}
    else:
        file = WeightFile(path)
        tensors = {name: file.add_array(name, array) for name, array in arrays.items()}
    return LayerWeights(arrays, tensors, dtype)


def _rounded_to_codes(values: np.ndarray) -> np.ndarray:
    for first in range(0, len(values), BLOCK):
        rows = values[first : first + BLOCK]
        codes, scales = quantize_blocks(rows, BLOCK)
        rows[:] = codes.astype(np.float32) * np.repeat(scales, BLOCK, 1)[:, : rows.shape[1]]
    return values


def exported_layer(
    dimensions: LayerDimensions,
    weights: LayerWeights,
    *,
    batch: Axis = "batch",
    new: Axis = "sequence",
    past: Axis = "past",
) -> onnx.ModelProto:
    """The layer as exported: eager attention over keys and values that are expanded from the latents of all tokens.

    Inputs: `hidden_states` [batch, new, hidden], `cos` and `sin` [batch, new, Dr], `attention_mask` [batch, 1, new, past + new],
    `past_latent` [batch, 1, past, R] (normed), `past_rope` [batch, 1, past, Dr] (rotated, both halves of the pairs apart), and with an
    indexer `past_index` [batch, past, Di]. Outputs: `attn_out` and `present_latent`, `present_rope`, `present_index`.
    """
    return _Layer(dimensions, weights).exported(batch, new, past)


def absorbed_layer(
    dimensions: LayerDimensions, weights: LayerWeights, *, batch: Axis, total: int, grows: bool = False
) -> onnx.ModelProto:
    """A decoding step of one token for each sequence, absorbed by hand.

    The cache is read where it lies: the caller puts the new token's row, an output, at its end beforehand, so that nothing is copied.

    Inputs: `hidden_states` [batch, hidden], `cos` and `sin` [batch, Dr], `cache` [batch, total, R + Dr] (latent, then rope as in
    `exported_layer`). Outputs: `attn_out` [batch, hidden] and `row` [batch, R + Dr].

    With ``grows`` the cache is as exporters have it: an input `past` [batch, total - 1, R + Dr], and an output `present`
    [batch, total, R + Dr] that has the new row behind it.
    """
    return _Layer(dimensions, weights).absorbed(batch, total, grows)


class _Layer:
    def __init__(self, dimensions: LayerDimensions, weights: LayerWeights) -> None:
        self.d = dimensions
        self.g = GraphWriter(weights, weights.dtype)
        self.numpy_type = NUMPY_TYPES[weights.dtype]

    def exported(self, batch: Axis, new: Axis, past: Axis) -> onnx.ModelProto:
        d, g = self.d, self.g
        total: Axis = past + new if isinstance(past, int) and isinstance(new, int) else "total"
        x = g.input("hidden_states", g.dtype, [batch, new, d.hidden])
        tables = [g.input(name, g.dtype, [batch, new, d.rope]) for name in ("cos", "sin")]
        mask = g.input("attention_mask", g.dtype, [batch, 1, new, total])
        past_latent = g.input("past_latent", g.dtype, [batch, 1, past, d.rank])
        past_rope = g.input("past_rope", g.dtype, [batch, 1, past, d.rope])

        def heads_first(values: str, width: int) -> str:
            return g.node("Transpose", self._reshape(values, 0, 0, d.heads, width), perm=[0, 2, 1, 3])

        q_latent = self._query_latent(x)
        query = heads_first(g.node("MatMul", q_latent, self._weight("q_b_proj")), d.nope + d.rope)
        q_nope, q_rope = g.node("Split", query, g.constant([d.nope, d.rope]), outputs=2, axis=3)
        latent, rope_key = self._compressed(x, 2)
        latent, rope_key = (g.node("Unsqueeze", part, g.constant([1])) for part in (latent, rope_key))
        cos, sin = (g.node("Unsqueeze", self._slice(table, 0, d.rope // 2, 2), g.constant([1])) for table in tables)
        q_rope, rope_key = self._rotate(q_rope, cos, sin, 3), self._rotate(rope_key, cos, sin, 3)
        latents = g.node("Concat", past_latent, latent, output="present_latent", axis=2)
        rope_keys = g.node("Concat", past_rope, rope_key, output="present_rope", axis=2)
        expanded = g.node("MatMul", g.node("Squeeze", latents, g.constant([1])), self._weight("kv_b_proj"))
        k_nope, values = g.node(
            "Split", heads_first(expanded, d.nope + d.value), g.constant([d.nope, d.value]), outputs=2, axis=3
        )
        rope_keys = g.node("Expand", rope_keys, g.constant([1, d.heads, 1, 1]))
        query, keys = g.node("Concat", q_nope, q_rope, axis=-1), g.node("Concat", k_nope, rope_keys, axis=-1)
        if d.index_heads:
            past_index = g.input("past_index", g.dtype, [batch, past, d.index_dim])
            mask = self._selection(q_latent, x, tables, past_index, mask)
            g.output("present_index", g.dtype, [batch, total, d.index_dim])
        scores = g.node("MatMul", query, g.node("Transpose", keys, perm=[0, 1, 3, 2]))
        scores = g.node("Add", g.node("Mul", scores, g.constant(d.softmax_scale, self.numpy_type)), mask)
        shares = g.from_float(g.node("Softmax", g.to_float(scores), axis=-1))
        output = g.node("Transpose", g.node("MatMul", shares, values), perm=[0, 2, 1, 3])
        output = self._reshape(output, 0, 0, d.heads * d.value)
        g.node("MatMul", output, self._weight("o_proj"), output="attn_out")
        g.output("attn_out", g.dtype, [batch, new, d.hidden])
        g.output("present_latent", g.dtype, [batch, 1, total, d.rank])
        g.output("present_rope", g.dtype, [batch, 1, total, d.rope])
        return g.model(OPSET)

    def _selection(self, q_latent: str, x: str, tables: list[str], past: str, mask: str) -> str:
        """The mask without the keys that the indexer does not choose."""
        d, g = self.d, self.g
        widths = g.constant([d.rope, d.index_dim - d.rope])
        query = self._reshape(
            g.node("MatMul", q_latent, self._weight("index_q_proj")), 0, 0, d.index_heads, d.index_dim
        )
        q_rope, q_rest = g.node("Split", query, widths, outputs=2, axis=3)
        key = g.node("MatMul", x, self._weight("index_k_proj"))
        norm = self._weight("index_k_norm"), self._weight("index_k_bias")
        key = g.node("LayerNormalization", key, *norm, axis=-1, epsilon=EPSILON, stash_type=1)
        k_rope, k_rest = g.node("Split", g.node("Unsqueeze", key, g.constant([2])), widths, outputs=2, axis=3)
        cos, sin = (g.node("Unsqueeze", table, g.constant([2])) for table in tables)
        q_rope, k_rope = (self._rotate_halves(part, cos, sin) for part in (q_rope, k_rope))
        query = g.node("Concat", q_rope, q_rest, axis=-1)
        key = g.node("Squeeze", g.node("Concat", k_rope, k_rest, axis=-1), g.constant([2]))
        keys = g.node("Concat", past, key, output="present_index", axis=1)
        keys = g.node("Unsqueeze", g.to_float(g.node("Transpose", keys, perm=[0, 2, 1])), g.constant([1]))
        scores = g.node("Mul", g.node("MatMul", g.to_float(query), keys), g.constant(d.index_dim**-0.5, np.float32))
        weights = g.to_float(g.node("MatMul", x, self._weight("index_weights_proj")))
        weights = g.node("Mul", weights, g.constant(d.index_heads**-0.5, np.float32))
        weights = g.node("Unsqueeze", weights, g.constant([-2]))
        scores = g.node("Squeeze", g.node("MatMul", weights, g.node("Relu", scores)), g.constant([-2]))
        scores = g.node("Add", scores, g.to_float(g.node("Squeeze", mask, g.constant([1]))))
        total = g.node("Gather", g.node("Shape", scores), g.constant([2]), axis=0)
        count = g.node("Min", g.constant([d.top_k]), total)
        _, chosen = g.node("TopK", scores, count, outputs=2, axis=-1, largest=1, sorted=1)
        lowest = g.constant(float(np.finfo(np.float32).min), np.float32)
        hidden = g.node("Expand", lowest, g.node("Shape", scores))
        shown = g.node("Expand", g.constant(0.0, np.float32), g.node("Shape", chosen))
        chosen_mask = g.node("Unsqueeze", g.node("ScatterElements", hidden, chosen, shown, axis=-1), g.constant([1]))
        return g.node("Add", g.from_float(chosen_mask), mask)

    def _rotate_halves(self, x: str, cos: str, sin: str) -> str:
        """Rotates pairs (j, j + Dr / 2) of the last of four axes."""
        g, half = self.g, self.d.rope // 2
        turned = g.node("Concat", g.node("Neg", self._slice(x, half, _TO_END, 3)), self._slice(x, 0, half, 3), axis=-1)
        return g.node("Add", g.node("Mul", x, cos), g.node("Mul", turned, sin))

    def absorbed(self, batch: Axis, total: int, grows: bool) -> onnx.ModelProto:
        d, g = self.d, self.g
        x = g.input("hidden_states", g.dtype, [batch, d.hidden])
        cos, sin = (self._slice(g.input(name, g.dtype, [batch, d.rope]), 0, d.rope // 2, 1) for name in ("cos", "sin"))
        width = d.rank + d.rope
        latent, rope_key = self._compressed(x, 1)
        row = [latent, self._rotate(rope_key, cos, sin, 1)]
        if grows:
            past = g.input("past", g.dtype, [batch, total - 1, width])
            new = g.node("Unsqueeze", g.node("Concat", *row, axis=-1), g.constant([1]))
            cache = g.node("Concat", past, new, output="present", axis=1)
            g.output("present", g.dtype, [batch, total, width])
        else:
            cache = g.input("cache", g.dtype, [batch, total, width])
            g.node("Concat", *row, output="row", axis=-1)
            g.output("row", g.dtype, [batch, width])
        query = g.node("MatMul", self._query_latent(x), self._weight("q_b_proj"))
        query = self._reshape(query, 0, d.heads, d.nope + d.rope)
        q_nope, q_rope = g.node("Split", query, g.constant([d.nope, d.rope]), outputs=2, axis=2)
        cos_of_heads, sin_of_heads = (g.node("Unsqueeze", table, g.constant([1])) for table in (cos, sin))
        q_rope = self._rotate(q_rope, cos_of_heads, sin_of_heads, 2)
        q_latent = g.node("MatMul", g.node("Transpose", q_nope, perm=[1, 0, 2]), self._weight("w_uk"))
        q_latent = g.node("Transpose", q_latent, perm=[1, 0, 2])
        query = g.node("Concat", q_latent, q_rope, axis=-1)
        query = g.node("Mul", query, g.constant(d.softmax_scale, self.numpy_type))
        shares = g.node("Softmax", g.node("MatMul", query, g.node("Transpose", cache, perm=[0, 2, 1])), axis=-1)
        # Over all 576 columns, since to cut the latents out of the cache would copy it.
        attended = g.node("Transpose", self._slice(g.node("MatMul", shares, cache), 0, d.rank, 2), perm=[1, 0, 2])
        output = g.node("Transpose", g.node("MatMul", attended, self._weight("w_uv")), perm=[1, 0, 2])
        g.node("MatMul", self._reshape(output, 0, d.heads * d.value), self._weight("o_proj"), output="attn_out")
        g.output("attn_out", g.dtype, [batch, d.hidden])
        return g.model(OPSET)

    def _weight(self, name: str) -> str:
        g = self.g
        g.initializers.append(g.weights.weight(name, g.weights.arrays[name].shape, g.dtype))  # type: ignore[attr-defined]
        return name

    def _query_latent(self, x: str) -> str:
        return self._norm(self.g.node("MatMul", x, self._weight("q_a_proj")), "q_a_layernorm")

    def _compressed(self, x: str, axis: int) -> tuple[str, str]:
        """The normed latent and the rope key before its rotation."""
        d, g = self.d, self.g
        both = g.node("MatMul", x, self._weight("kv_a_proj"))
        latent, rope_key = g.node("Split", both, g.constant([d.rank, d.rope]), outputs=2, axis=axis)
        return self._norm(latent, "kv_a_layernorm"), rope_key

    def _norm(self, x: str, name: str) -> str:
        g = self.g
        exact = g.to_float(x)
        mean = g.node("ReduceMean", g.node("Pow", exact, g.constant(2.0, np.float32)), g.constant([-1]), keepdims=1)
        root = g.node("Sqrt", g.node("Add", mean, g.constant(EPSILON, np.float32)))
        normed = g.from_float(g.node("Mul", exact, g.node("Reciprocal", root)))
        return g.node("Mul", self._weight(name), normed)

    def _rotate(self, x: str, cos: str, sin: str, axis: int) -> str:
        """Rotates pairs (2j, 2j + 1) along an axis, the last; the result has the two halves apart."""
        g = self.g
        even, odd = self._slice(x, 0, _TO_END, axis, 2), self._slice(x, 1, _TO_END, axis, 2)
        first = g.node("Sub", g.node("Mul", even, cos), g.node("Mul", odd, sin))
        second = g.node("Add", g.node("Mul", odd, cos), g.node("Mul", even, sin))
        return g.node("Concat", first, second, axis=-1)

    def _slice(self, x: str, start: int, end: int, axis: int, step: int = 1) -> str:
        return self.g.node("Slice", x, *(self.g.constant([value]) for value in (start, end, axis, step)))

    def _reshape(self, x: str, *shape: int) -> str:
        """0 keeps an axis."""
        return self.g.node("Reshape", x, self.g.constant(list(shape)), allowzero=0)


def layer_reference(
    dimensions: LayerDimensions,
    arrays: dict[str, np.ndarray],
    hidden: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    rows: np.ndarray,
    selected: np.ndarray | None = None,
) -> np.ndarray:
    """What the layer gives for the next token of one sequence, in f32 apart from its softmax in f64.

    Args:
        dimensions: of the layer.
        arrays: weights by name, f32, as in `LayerWeights`.
        hidden: the token, [hidden].
        cos, sin: its angles, [Dr / 2].
        rows: cached rows, [past, R + Dr], as `absorbed_layer` has them.
        selected: the keys that it attends to; None: all.

    Returns:
        f32 [hidden].
    """
    d = dimensions

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(np.square(x)) + np.float32(EPSILON)) * arrays[name]

    def rotate(x: np.ndarray) -> np.ndarray:
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.concatenate([even * cos - odd * sin, odd * cos + even * sin], axis=-1)

    query = (norm(hidden @ arrays["q_a_proj"], "q_a_layernorm") @ arrays["q_b_proj"]).reshape(d.heads, -1)
    compressed = hidden @ arrays["kv_a_proj"]
    row = np.concatenate([norm(compressed[: d.rank], "kv_a_layernorm"), rotate(compressed[d.rank :])])
    keys = np.concatenate([rows, row[None]]).astype(np.float32)
    if selected is not None:
        keys = keys[selected]
    q_latent = np.einsum("hn,hnr->hr", query[:, : d.nope], arrays["w_uk"])
    scores = np.concatenate([q_latent, rotate(query[:, d.nope :])], axis=1) @ keys.T * np.float32(d.softmax_scale)
    shares = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    shares = (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)
    output = np.einsum("hr,hrv->hv", shares @ keys[:, : d.rank], arrays["w_uv"])
    result: np.ndarray = output.reshape(-1) @ arrays["o_proj"]
    return result


def index_scores(
    dimensions: LayerDimensions,
    arrays: dict[str, np.ndarray],
    hidden: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    rows: np.ndarray,
    quantize: Callable[[np.ndarray], np.ndarray] = lambda values: values,
) -> np.ndarray:
    """The indexer's scores of all keys of one sequence for its next token (DeepSeek-V3.2, section 2.1).

    Args:
        dimensions, arrays, hidden, cos, sin: as for `layer_reference`.
        rows: cached index keys, [past, Di].
        quantize: what rows of the query and the new key go through, [n, Di].

    Returns:
        f32 [past + 1].
    """
    d = dimensions

    def rotate(x: np.ndarray) -> np.ndarray:
        first, second = x[:, : d.rope // 2], x[:, d.rope // 2 : d.rope]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, x[:, d.rope :]], axis=1)

    latent = hidden @ arrays["q_a_proj"]
    latent = latent / np.sqrt(np.mean(np.square(latent)) + np.float32(EPSILON)) * arrays["q_a_layernorm"]
    query = quantize(rotate((latent @ arrays["index_q_proj"]).reshape(d.index_heads, d.index_dim)))
    key = hidden @ arrays["index_k_proj"]
    key = (key - key.mean()) / np.sqrt(key.var() + np.float32(EPSILON)) * arrays["index_k_norm"] + arrays[
        "index_k_bias"
    ]
    keys = np.concatenate([rows, quantize(rotate(key[None]))])
    weights = hidden @ arrays["index_weights_proj"] * np.float32((d.index_heads * d.index_dim) ** -0.5)
    scores: np.ndarray = weights @ np.maximum(query @ keys.T, 0)
    return scores


def save_layer(model: onnx.ModelProto, path: Path) -> Path:
    """Writes a graph whose weights lie in a file beside it, which stays as it is."""
    path.write_bytes(model.SerializeToString())
    return path


def rope_tables(dimensions: LayerDimensions, position: int, theta: float = 10000.0) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [Dr / 2], f32, of a position."""
    exponents = np.arange(0, dimensions.rope, 2, dtype=np.float64) / dimensions.rope
    angles = position / theta**exponents
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
