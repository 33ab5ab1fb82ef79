"""A small MLA language model, written twice by hand: as an export would be, and lowered.

Both come from the same weights. Tests of sessions and of verification use them: they do not depend on the passes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mla_trt import interface as roles
from mla_trt.formats import IndexLayout, KvLayout
from mla_trt.interface import ModelInput, ModelInterface
from mla_trt.ops import attach_functions, make_node

FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64


@dataclass(frozen=True)
class Config:
    """Sizes, by the names of the op set's attributes; no two that could be mixed up are equal."""

    vocabulary: int = 50
    hidden: int = 24
    layers: int = 2
    num_heads: int = 3
    qk_nope_head_dim: int = 10
    qk_rope_head_dim: int = 8
    v_head_dim: int = 7
    kv_lora_rank: int = 16
    positions: int = 64
    scale: float = 0.31
    epsilon: float = 1e-6
    interleaved: bool = True
    sinks: bool = False
    top_k: int = 0  # 0: dense
    index_heads: int = 4
    index_head_dim: int = 12
    index_rope_dim: int = 8


class Builder:
    """Collects nodes and weights."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}

    def op(self, kind: str, *inputs: str | np.ndarray, output: str | None = None, **attributes: Any) -> str:
        return self.split(kind, 1, *inputs, names=[output] if output else None, **attributes)[0]

    def split(
        self, kind: str, count: int, *inputs: str | np.ndarray, names: list[str] | None = None, **attributes: Any
    ) -> list[str]:
        given = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        outputs = names or [f"{kind.lower()}_{len(self.nodes)}_{index}" for index in range(count)]
        self.nodes.append(helper.make_node(kind, given, outputs, name=outputs[0], **attributes))
        return outputs

    def constant(self, value: np.ndarray) -> str:
        name = f"constant_{len(self.weights)}"
        self.weights[name] = value
        return name

    def model(
        self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto], opset: int
    ) -> onnx.ModelProto:
        tensors = [numpy_helper.from_array(value, name) for name, value in self.weights.items()]
        graph = helper.make_graph(self.nodes, "small", inputs, outputs, tensors)
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("mla_trt", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=11)


def weights(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights; those of layer l end in .l."""
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return random.uniform(0.5, 1.5, size).astype(np.float32)

    c = config
    head = c.qk_nope_head_dim + c.qk_rope_head_dim
    found = {"embedding": random.standard_normal((c.vocabulary, c.hidden)).astype(np.float32), "norm": norm(c.hidden)}
    found["lm_head"] = matrix(c.hidden, c.vocabulary)
    for layer in range(c.layers):
        found |= {
            f"norm.{layer}": norm(c.hidden),
            f"kv_norm.{layer}": norm(c.kv_lora_rank),
            f"q.{layer}": matrix(c.hidden, c.num_heads * head) * 2,
            f"kv_a.{layer}": matrix(c.hidden, c.kv_lora_rank + c.qk_rope_head_dim),
            f"kv_b.{layer}": matrix(c.kv_lora_rank, c.num_heads * (c.qk_nope_head_dim + c.v_head_dim)),
            f"o.{layer}": matrix(c.num_heads * c.v_head_dim, c.hidden),
            f"sinks.{layer}": random.standard_normal(c.num_heads).astype(np.float32),
            f"index_q.{layer}": matrix(c.hidden, c.index_heads * c.index_head_dim),
            f"index_k.{layer}": matrix(c.hidden, c.index_head_dim),
            f"index_weights.{layer}": matrix(c.hidden, c.index_heads),
            f"index_norm.{layer}": norm(c.index_head_dim),
            f"index_bias.{layer}": (norm(c.index_head_dim) - 1) * 0.2,
        }
    return found


def rope_tables(config: Config, width: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, f32 [positions, width / 2]."""
    angles = np.arange(config.positions)[:, None] * 100.0 ** (-np.arange(width // 2) * 2 / width)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    """An int64 constant."""
    return np.array(values, np.int64)


def interface(config: Config) -> ModelInterface:
    """The interface of `original`."""
    inputs = [
        ModelInput("input_ids", roles.TOKENS, INT64, ("B", "S")),
        ModelInput("position_ids", roles.POSITIONS, INT64, ("B", "S")),
    ]
    for layer in range(config.layers):
        for name, size in _cache_sizes(config).items():
            inputs.append(
                ModelInput(f"past_{name}.{layer}", roles.CACHE, FLOAT, ("B", "P", size), f"present_{name}.{layer}")
            )
    return ModelInterface(tuple(inputs), ("logits",))


def _cache_sizes(config: Config) -> dict[str, int]:
    sizes = {"latent": config.kv_lora_rank, "rope": config.qk_rope_head_dim}
    return sizes | {"index": config.index_head_dim} if config.top_k else sizes


@dataclass(frozen=True)
class FullCaches:
    """How `original` keeps caches that have all their rows from the beginning.

    Attributes:
        write: (builder, cache [B, L, d], new rows [B, S, d], positions [S]) -> the cache with them.
        rows: their number L; None leaves it free.
        fixed_batch, fixed_new: numbers of sequences and of new tokens that are fixed.
        position: how positions come in: "given" as cache_position [S], or as that of the "first" token, a scalar, which is also "counted" on, or in a
            "column" [1].
        mask: "rows": a mask [B, L] of ones and zeros is an input; "tokens": [B, T]; "scores": one that is added to the scores, [1, 1, S, L].
        window: keys that a query sees; None: all.
        hides: whether the rows of later tokens are hidden.
    """

    write: Callable[[Builder, str, str, str], str]
    rows: int | None = None
    fixed_batch: int | None = None
    fixed_new: int | None = None
    position: str = "given"
    mask: str | None = None
    window: int | None = None
    hides: bool = True

    def sides(self) -> list[onnx.ValueInfoProto]:
        """Inputs beside tokens, rope positions and caches."""
        length, batch, new = self.rows or "L", self.fixed_batch or "B", self.fixed_new or "S"
        shape = {"given": [new], "first": [], "counted": [], "column": [1]}[self.position]
        name = "cache_position" if self.position == "given" else "first_position"
        found = [helper.make_tensor_value_info(name, INT64, shape)]
        if self.mask is not None:
            kind = FLOAT if self.mask == "scores" else INT64
            axes = {"rows": [batch, length], "tokens": [batch, "T"], "scores": [1, 1, new, length]}[self.mask]
            found.append(helper.make_tensor_value_info("mask", kind, axes))
        return found

    def positions(self, b: Builder) -> str:
        """Of the new tokens, int64 [S]."""
        if self.position == "given":
            return "cache_position"
        new = b.op("Shape", "input_ids", start=1)
        if self.position == "counted":
            b.op("Add", "first_position", b.op("Squeeze", new), output="next_position")
        return b.op("Add", _arange(b, new), "first_position")

    def visible(self, b: Builder, total: str, position: str) -> str:
        """The keys that each new token sees, bool [B or 1, 1, S, L]."""
        rows, query = _arange(b, total), b.op("Unsqueeze", position, ints(1))
        visible = b.op("LessOrEqual", rows, query if self.hides else b.op("Add", query, ints(2)))
        if self.window is not None:
            near = b.op("Greater", rows, b.op("Sub", query, ints(self.window)))
            visible = b.op("And", visible, near)
        visible = b.op("Unsqueeze", visible, ints(0, 1))
        if self.mask in ("rows", "tokens"):
            mask = "mask"
            if self.mask == "tokens":
                missing = b.op("Sub", total, b.op("Shape", mask, start=1))
                mask = b.op("Pad", mask, b.op("Concat", ints(0), missing, axis=0), np.array(0), ints(1))
            visible = b.op("And", visible, b.op("Unsqueeze", b.op("Cast", mask, to=TensorProto.BOOL), ints(1, 2)))
        return visible


def original(config: Config, seed: int = 0, *, full: FullCaches | None = None) -> onnx.ModelProto:
    """The model as an export: [B, S] tokens, caches of latents and rope keys, keys and values of each head.

    Args:
        full: caches that have all their rows, instead of such as grow.
    """
    c, w, b = config, weights(config, seed), Builder()
    b.weights.update({name: value for name, value in w.items() if c.top_k or not name.startswith("index")})
    if not c.sinks:
        b.weights = {name: value for name, value in b.weights.items() if not name.startswith("sinks")}
    x = b.op("Gather", "embedding", "input_ids")
    new = b.op("Shape", "input_ids", start=1)
    cached = b.op("Shape", "past_latent.0", start=1, end=2)
    total = b.op("Add", new, cached)
    queries = b.op("Add", _arange(b, new), cached)
    if full is None:
        visible = b.op("LessOrEqual", _arange(b, total), b.op("Unsqueeze", queries, ints(1)))
    else:
        total, queries = cached, full.positions(b)
        visible = full.visible(b, total, queries)
    outputs = [helper.make_tensor_value_info("logits", FLOAT, ["B", "S", c.vocabulary])]
    for layer in range(c.layers):
        normed = b.op("RMSNormalization", x, f"norm.{layer}", axis=-1, epsilon=c.epsilon)
        q = b.op("Reshape", b.op("MatMul", normed, f"q.{layer}"), ints(0, 0, c.num_heads, -1))
        q_nope, q_rope = b.split("Split", 2, q, ints(c.qk_nope_head_dim, c.qk_rope_head_dim), axis=3)
        kv = b.op("MatMul", normed, f"kv_a.{layer}")
        latent, k_rope = b.split("Split", 2, kv, ints(c.kv_lora_rank, c.qk_rope_head_dim), axis=2)
        latent = b.op("RMSNormalization", latent, f"kv_norm.{layer}", axis=-1, epsilon=c.epsilon)
        k_rope = b.op("Reshape", k_rope, ints(0, 0, 1, c.qk_rope_head_dim))
        q_rope, k_rope = (rotate(b, c, value, c.interleaved) for value in (q_rope, k_rope))
        k_rope = b.op("Squeeze", k_rope, ints(2))
        latents = _cached(b, "latent", layer, latent, queries, full)
        ropes = _cached(b, "rope", layer, k_rope, queries, full)
        keys = b.op("Reshape", b.op("MatMul", latents, f"kv_b.{layer}"), ints(0, 0, c.num_heads, -1))
        k_nope, values = b.split("Split", 2, keys, ints(c.qk_nope_head_dim, c.v_head_dim), axis=3)
        scores = b.op(
            "Add",
            b.op("Einsum", q_nope, k_nope, equation="bshd,bthd->bhst"),
            b.op("Einsum", q_rope, ropes, equation="bshd,btd->bhst"),
        )
        scores = b.op("Mul", scores, np.array(c.scale, np.float32))
        chosen = _selected(b, c, normed, layer, visible, total, queries, full) if c.top_k else visible
        if full is not None and full.mask == "scores":
            scores = b.op("Add", scores, "mask")
        else:
            scores = b.op("Where", chosen, scores, np.array(-np.inf, np.float32))
        if c.sinks:
            column = b.op("Reshape", f"sinks.{layer}", ints(1, c.num_heads, 1, 1))
            row = b.op("ReduceMax", scores, ints(3))
            column = b.op("Add", b.op("Mul", row, np.array(0, np.float32)), column)
            scores = b.op("Concat", scores, column, axis=3)
        probabilities = b.op("Softmax", scores, axis=-1)
        if c.sinks:
            probabilities = b.op("Slice", probabilities, ints(0), ints(-1), ints(3))
        attended = b.op("Einsum", probabilities, values, equation="bhst,bthd->bshd")
        attended = b.op("MatMul", b.op("Reshape", attended, ints(0, 0, -1)), f"o.{layer}")
        x = b.op("Add", x, attended)
        for name, size in _cache_sizes(c).items():
            outputs.append(helper.make_tensor_value_info(f"present_{name}.{layer}", FLOAT, ["B", "T", size]))
    b.op("MatMul", b.op("RMSNormalization", x, "norm", axis=-1, epsilon=c.epsilon), "lm_head", output="logits")
    shapes = {"TOKENS": ["B", "S"], "POSITIONS": ["B", "S"]}
    inputs = [
        helper.make_tensor_value_info(e.name, e.dtype, shapes.get(e.role.upper(), list(e.axes)))
        for e in interface(c).inputs
    ]
    if full is None:
        return b.model(inputs, outputs, 23)
    if full.position == "counted":
        outputs.append(helper.make_tensor_value_info("next_position", INT64, []))
    model = b.model([*inputs, *full.sides()], outputs, 24)
    sizes = {"B": full.fixed_batch, "S": full.fixed_new, "P": full.rows or "L", "T": full.rows or "L"}
    for value in [*model.graph.input[: len(inputs)], *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            size = sizes.get(dim.dim_param)
            if isinstance(size, int):
                dim.dim_value = size
            elif size is not None:
                dim.dim_param = size
    return model


def _cached(b: Builder, name: str, layer: int, new: str, position: str, full: FullCaches | None) -> str:
    """All rows [B, T or L, d] of a cache, the new ones among them."""
    past, present = f"past_{name}.{layer}", f"present_{name}.{layer}"
    if full is None:
        return b.op("Concat", past, new, output=present, axis=1)
    full.write(b, past, new, position)
    b.nodes[-1].output[0] = present
    return present


def _arange(b: Builder, length: str) -> str:
    return b.op("Range", ints(0).reshape(()), b.op("Squeeze", length), ints(1).reshape(()))


def rotate(b: Builder, c: Config, value: str, interleaved: bool) -> str:
    """Rotates [B, S, H, Dr] by the positions of its tokens."""
    width = c.qk_rope_head_dim
    cos, sin = (
        b.op("Unsqueeze", b.op("Gather", table, "position_ids"), ints(2, 4) if interleaved else ints(2, 3))
        for table in rope_tables(c, width)
    )
    axis, shape = (4, ints(0, 0, 0, width // 2, 2)) if interleaved else (3, ints(0, 0, 0, 2, width // 2))
    first, second = b.split("Split", 2, b.op("Reshape", value, shape), axis=axis, num_outputs=2)
    left = b.op("Sub", b.op("Mul", first, cos), b.op("Mul", second, sin))
    right = b.op("Add", b.op("Mul", first, sin), b.op("Mul", second, cos))
    return b.op("Reshape", b.op("Concat", left, right, axis=axis), ints(0, 0, 0, width))


def _selected(
    b: Builder,
    c: Config,
    normed: str,
    layer: int,
    visible: str,
    total: str,
    position: str,
    full: FullCaches | None,
) -> str:
    """The keys that the indexer selects, bool [B, 1, S, T or L]."""
    if full is not None:
        visible = b.op("Squeeze", visible, ints(1))
    q = b.op("Reshape", b.op("MatMul", normed, f"index_q.{layer}"), ints(0, 0, c.index_heads, -1))
    k = b.op("MatMul", normed, f"index_k.{layer}")
    k = b.op("LayerNormalization", k, f"index_norm.{layer}", f"index_bias.{layer}", axis=-1, epsilon=1e-6)
    k = b.op("Unsqueeze", k, ints(2))
    parts = []
    for value in (q, k):
        rope, rest = b.split("Split", 2, value, ints(c.index_rope_dim, c.index_head_dim - c.index_rope_dim), axis=3)
        parts.append(b.op("Concat", rotate(b, c, rope, False), rest, axis=3))
    keys = _cached(b, "index", layer, b.op("Squeeze", parts[1], ints(2)), position, full)
    scores = b.op("Relu", b.op("Einsum", parts[0], keys, equation="bshd,btd->bsht"))
    scores = b.op("Einsum", scores, b.op("MatMul", normed, f"index_weights.{layer}"), equation="bsht,bsh->bst")
    scores = b.op("Where", visible, scores, np.array(-np.inf, np.float32))
    count = b.op("Min", total, ints(c.top_k))
    best = b.split("TopK", 2, scores, count, axis=-1)[1]
    zeros = b.op("Sub", scores, scores)
    zeros = b.op("ConstantOfShape", b.op("Shape", zeros), value=numpy_helper.from_array(np.zeros(1, np.float32)))
    ones = b.op("ConstantOfShape", b.op("Shape", best), value=numpy_helper.from_array(np.ones(1, np.float32)))
    marked = b.op("Cast", b.op("ScatterElements", zeros, best, ones, axis=-1), to=TensorProto.BOOL)
    return b.op("Unsqueeze", b.op("And", marked, visible), ints(1))


def lowered(
    config: Config,
    seed: int = 0,
    *,
    row_format: str = "f32",
    index_format: str = "f32",
    page_size: int = 4,
    page_copies: bool = False,
    logits: str = "all",
    max_position: int | None = None,
) -> onnx.ModelProto:
    """The model lowered: [1, T] tokens and paged caches."""
    c, w, b = config, weights(config, seed), Builder()
    head = c.qk_nope_head_dim + c.qk_rope_head_dim
    kv = KvLayout(
        page_size=page_size, row_format=row_format, kv_lora_rank=c.kv_lora_rank, qk_rope_head_dim=c.qk_rope_head_dim
    )
    index = IndexLayout(page_size=page_size, index_format=index_format, index_head_dim=c.index_head_dim)
    used = ("embedding", "norm", "lm_head", "q.", "kv_a.", "o.", "kv_norm.", *(("index",) if c.top_k else ()))
    b.weights = {name: value for name, value in w.items() if name.startswith(used)}
    b.weights["cos"], b.weights["sin"] = rope_tables(c, c.qk_rope_head_dim)
    step = {name: name for name in ("query_offsets", "cache_lengths", "block_table")}
    planned = {name: name for name in ("token_sequence", "positions", "schedule")}
    b.nodes.append(
        make_node(
            "MlaPlan",
            {"tokens": "input_ids", **{k: step[k] for k in ("query_offsets", "cache_lengths")}},
            planned,
            "plan",
            page_size=page_size,
        )
    )
    x = b.op("Squeeze", b.op("Gather", "embedding", "input_ids"), ints(0))
    caches: list[dict[str, Any]] = []
    for layer in range(c.layers):
        normed = b.op("RMSNormalization", x, f"norm.{layer}", axis=-1, epsilon=c.epsilon)
        q = b.op("Reshape", b.op("MatMul", normed, f"q.{layer}"), ints(-1, c.num_heads, head))
        latent, rope_key = b.split(
            "Split", 2, b.op("MatMul", normed, f"kv_a.{layer}"), ints(c.kv_lora_rank, c.qk_rope_head_dim), axis=1
        )
        kv_b = w[f"kv_b.{layer}"].reshape(c.kv_lora_rank, c.num_heads, -1).transpose(1, 0, 2)
        inputs = {
            "query": q,
            "latent": latent,
            "rope_key": rope_key,
            "norm_weight": f"kv_norm.{layer}",
            "cos": "cos",
            "sin": "sin",
            "rope_rows": "positions",
            "w_uk": b.constant(np.ascontiguousarray(kv_b[:, :, : c.qk_nope_head_dim])),
            "w_uv": b.constant(np.ascontiguousarray(kv_b[:, :, c.qk_nope_head_dim :].transpose(0, 2, 1))),
            **({"sinks": b.constant(w[f"sinks.{layer}"])} if c.sinks else {}),
            **step,
            **planned,
            "kv_cache": f"kv_cache.{layer}",
            **({"page_copies": "page_copies"} if page_copies else {}),
        }
        attributes: dict[str, int | float | str] = {
            "kv_lora_rank": c.kv_lora_rank,
            "qk_rope_head_dim": c.qk_rope_head_dim,
            "qk_nope_head_dim": c.qk_nope_head_dim,
            "v_head_dim": c.v_head_dim,
            "num_heads": c.num_heads,
            "page_size": page_size,
            "row_format": row_format,
            "softmax_scale": c.scale,
            "epsilon": c.epsilon,
            "rope_interleaved": int(c.interleaved),
        }
        outputs = {"output": f"attended.{layer}", "kv_cache_out": f"kv_cache_out.{layer}"}
        caches.append({"name": f"kv_cache.{layer}", "layer": layer, "kind": "kv", "page_words": kv.page_words})
        if c.top_k:
            inputs |= {
                "index_query": b.op(
                    "Reshape", b.op("MatMul", normed, f"index_q.{layer}"), ints(-1, c.index_heads, c.index_head_dim)
                ),
                "index_key": b.op("MatMul", normed, f"index_k.{layer}"),
                "index_weights": b.op("MatMul", normed, f"index_weights.{layer}"),
                "index_norm_weight": f"index_norm.{layer}",
                "index_norm_bias": f"index_bias.{layer}",
                "index_cos": "cos",
                "index_sin": "sin",
                "indexer_cache": f"indexer_cache.{layer}",
            }
            attributes |= {
                "index_head_dim": c.index_head_dim,
                "index_rope_dim": c.index_rope_dim,
                "index_rope_interleaved": 0,
                "index_norm_epsilon": 1e-6,
                "index_format": index_format,
                "top_k": c.top_k,
            }
            outputs |= {"indices": f"indices.{layer}", "indexer_cache_out": f"indexer_cache_out.{layer}"}
            caches.append(
                {"name": f"indexer_cache.{layer}", "layer": layer, "kind": "indexer", "page_words": index.page_words}
            )
        b.nodes.append(
            make_node(
                "MlaSparseAttention" if c.top_k else "MlaAttention", inputs, outputs, f"attention.{layer}", **attributes
            )
        )
        attended = b.op("Reshape", f"attended.{layer}", ints(-1, c.num_heads * c.v_head_dim))
        x = b.op("Add", x, b.op("MatMul", attended, f"o.{layer}"))
    if logits == "last":
        ends = b.op("Slice", "query_offsets", ints(1), ints(2**31 - 1), ints(0))
        x = b.op("Gather", x, b.op("Max", b.op("Sub", ends, np.array([1], np.int32)), np.array([0], np.int32)))
    x = b.op("MatMul", b.op("RMSNormalization", x, "norm", axis=-1, epsilon=c.epsilon), "lm_head")
    b.op("Unsqueeze", x, ints(0), output="logits")
    value_info = helper.make_tensor_value_info
    model = b.model(
        [
            value_info("input_ids", INT64, [1, "T"]),
            value_info("query_offsets", INT32, ["offsets"]),
            value_info("cache_lengths", INT32, ["B"]),
            value_info("block_table", INT32, ["B", "max_pages"]),
            *(value_info(cache["name"], INT32, ["pages", cache["page_words"]]) for cache in caches),
            *([value_info("page_copies", INT32, ["n", 2])] if page_copies else []),
        ],
        [
            value_info("logits", FLOAT, [1, "rows", c.vocabulary]),
            *(
                value_info(f"{cache['kind']}_cache_out.{cache['layer']}", INT32, ["pages", cache["page_words"]])
                for cache in caches
            ),
        ],
        26,
    )
    helper.set_model_props(
        model,
        {
            "mla_trt": json.dumps(
                {
                    "version": 1,
                    "token_input": "input_ids",
                    "token_axes": ["1", "T"],
                    "logits": logits,
                    "page_size": page_size,
                    "max_pages": None,
                    "row_format": row_format,
                    "index_format": index_format,
                    "max_position": max_position,
                    "target": "onnx",
                    "caches": caches,
                    "layers": [],
                }
            )
        },
    )
    attach_functions(model)
    return model


SPARSE = replace(Config(), top_k=6)
