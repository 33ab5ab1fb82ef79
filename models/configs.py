"""Public model configurations that use multi-head latent attention, at full size and reduced.

Field names are those of the configuration classes of Transformers 5, so that an `architecture` can be passed to its
class as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from mla_trt.errors import UsageError

Size = Literal["small", "full"]

# The values are the defaults of the Transformers class, which tests compare where it is installed; only rope_parameters
# and max_position_embeddings may be the published model's instead.
CLASS_DEFAULTS = "class defaults"
# Written after the published config.json, without a copy at hand to compare with.
PUBLISHED = "published configuration"

# No two dimensions are equal, so that an exchanged axis shows. Only fields that an architecture has are replaced.
SMALL: MappingProxyType[str, Any] = MappingProxyType(
    {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "ffn_hidden_size": 96,
        "moe_intermediate_size": 40,
        "expert_ffn_hidden_size": 40,
        "num_hidden_layers": 2,
        "num_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 20,
        "kv_lora_rank": 32,
        "q_lora_rank": 48,
        "n_routed_experts": 8,
        "num_local_experts": 8,
        "zero_expert_num": 2,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_topk": 2,
        "first_k_dense_replace": 1,
        "index_topk": 8,
        "index_head_dim": 28,
        "index_n_heads": 16,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "head_dim": 16,
    }
)


@dataclass(frozen=True)
class ModelConfig:
    """One public model.

    Attributes:
        name: the name that `mla-trt export` takes.
        model_class: the causal language model class in Transformers; its configuration class is named alike.
        architecture: full-size fields of the configuration class.
        source: where the values are from, `CLASS_DEFAULTS` or `PUBLISHED`.
        small: fields of the reduced model that differ from `SMALL`.
        layers_field: the field that counts layers.
        attentions_per_layer: attention cores in one layer.
        note: what differs from the published model.
    """

    name: str
    model_class: str
    architecture: dict[str, Any]
    source: str
    small: dict[str, Any] = field(default_factory=dict)
    layers_field: str = "num_hidden_layers"
    attentions_per_layer: int = 1
    note: str = ""

    @property
    def config_class(self) -> str:
        """The configuration class in Transformers."""
        return self.model_class.removesuffix("ForCausalLM") + "Config"

    @property
    def is_sparse(self) -> bool:
        """Whether an indexer selects the keys of each token."""
        return "index_topk" in self.architecture

    def fields(self, size: Size = "small", layers: int | None = None) -> dict[str, Any]:
        """Fields for the configuration class.

        Args:
            size: `"full"` for the published dimensions, `"small"` for the reduced ones.
            layers: number of layers; None for all of the published ones, or 2 when small.

        Raises:
            UsageError: `layers` is less than 1 or more than the model has.
        """
        fields = dict(self.architecture)
        if size == "small":
            fields.update({name: value for name, value in SMALL.items() if fields.get(name) is not None})
            fields.update(self.small)
        if layers is not None:
            published = self.architecture[self.layers_field]
            if not 1 <= layers <= published:
                raise UsageError(f"{self.name} has {published} layers: --layers must be from 1 to {published}")
            fields[self.layers_field] = layers
        return fields


def _yarn(
    factor: float, theta: float = 10000.0, mscale: float = 1.0, original: int = 4096, beta_fast: float = 32.0
) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": beta_fast,
        "beta_slow": 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


_MLA_128: dict[str, Any] = {
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
}

_DEEPSEEK_V3: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    **_MLA_128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_parameters": _yarn(40.0),
}

_CONFIGS = (
    ModelConfig(
        name="deepseek-v2",
        model_class="DeepseekV2ForCausalLM",
        source=PUBLISHED,
        architecture={
            "vocab_size": 102400,
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            **_MLA_128,
            "n_shared_experts": 2,
            "n_routed_experts": 160,
            "num_experts_per_tok": 6,
            "n_group": 8,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
            "norm_topk_prob": False,
            "first_k_dense_replace": 1,
            "max_position_embeddings": 163840,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _yarn(40.0, mscale=0.707),
        },
    ),
    ModelConfig(
        name="deepseek-v2-lite",
        model_class="DeepseekV2ForCausalLM",
        source=PUBLISHED,
        architecture={
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            **_MLA_128,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": False,
            "first_k_dense_replace": 1,
            "max_position_embeddings": 163840,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _yarn(40.0, mscale=0.707),
        },
    ),
    ModelConfig(
        name="deepseek-v3", model_class="DeepseekV3ForCausalLM", source=CLASS_DEFAULTS, architecture=_DEEPSEEK_V3
    ),
    ModelConfig(
        name="deepseek-r1",
        model_class="DeepseekV3ForCausalLM",
        source=CLASS_DEFAULTS,
        architecture=_DEEPSEEK_V3,
        note="the architecture of deepseek-v3",
    ),
    ModelConfig(
        name="deepseek-v3.2",
        model_class="DeepseekV32ForCausalLM",
        source=CLASS_DEFAULTS,
        architecture={**_DEEPSEEK_V3, "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64},
    ),
    ModelConfig(
        name="kimi-k2",
        model_class="DeepseekV3ForCausalLM",
        source=PUBLISHED,
        architecture={
            **_DEEPSEEK_V3,
            "vocab_size": 163840,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "n_routed_experts": 384,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
            "first_k_dense_replace": 1,
            "max_position_embeddings": 131072,
            "rope_parameters": _yarn(32.0, theta=50000.0, beta_fast=1.0),
        },
        note="the language model of kimi-k2.5 has this architecture too",
    ),
    ModelConfig(
        name="moonlight-16b-a3b",
        model_class="DeepseekV3ForCausalLM",
        source=PUBLISHED,
        architecture={
            **_DEEPSEEK_V3,
            "vocab_size": 163840,
            "hidden_size": 2048,
            "intermediate_size": 11264,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.446,
            "first_k_dense_replace": 1,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(50000.0),
        },
    ),
    ModelConfig(
        name="glm-5",
        model_class="GlmMoeDsaForCausalLM",
        source=CLASS_DEFAULTS,
        architecture={
            "vocab_size": 154880,
            "hidden_size": 6144,
            "intermediate_size": 12288,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 78,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "kv_lora_rank": 512,
            "q_lora_rank": 2048,
            "n_shared_experts": 1,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "first_k_dense_replace": 3,
            "index_topk": 2048,
            "index_head_dim": 128,
            "index_n_heads": 32,
            "max_position_embeddings": 202752,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(1000000.0),
        },
    ),
    ModelConfig(
        name="glm-4.7-flash",
        model_class="Glm4MoeLiteForCausalLM",
        source=CLASS_DEFAULTS,
        architecture={
            "vocab_size": 154880,
            "hidden_size": 2048,
            "intermediate_size": 10240,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 47,
            "num_attention_heads": 20,
            "num_key_value_heads": 20,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "kv_lora_rank": 512,
            "q_lora_rank": 768,
            "n_shared_experts": 1,
            "n_routed_experts": 64,
            "num_experts_per_tok": 4,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.8,
            "norm_topk_prob": True,
            "max_position_embeddings": 202752,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(1000000.0),
        },
    ),
    ModelConfig(
        name="minicpm3-4b",
        model_class="MiniCPM3ForCausalLM",
        source=CLASS_DEFAULTS,
        architecture={
            "vocab_size": 73448,
            "hidden_size": 2560,
            "intermediate_size": 6400,
            "num_hidden_layers": 62,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "kv_lora_rank": 256,
            "q_lora_rank": 768,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 256,
            "rope_parameters": _rope(10000.0),
        },
        note="plain rope: the published model scales each frequency (longrope)",
    ),
    ModelConfig(
        name="longcat-flash",
        model_class="LongcatFlashForCausalLM",
        source=CLASS_DEFAULTS,
        layers_field="num_layers",
        attentions_per_layer=2,
        architecture={
            "vocab_size": 131072,
            "hidden_size": 6144,
            "ffn_hidden_size": 12288,
            "expert_ffn_hidden_size": 2048,
            "num_layers": 28,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            **_MLA_128,
            "head_dim": 64,
            "moe_topk": 12,
            "n_routed_experts": 512,
            "zero_expert_num": 256,
            "routed_scaling_factor": 6.0,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(10000000.0),
        },
    ),
    ModelConfig(
        name="mistral-small-4",
        model_class="Mistral4ForCausalLM",
        source=CLASS_DEFAULTS,
        architecture={
            "vocab_size": 131072,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "kv_lora_rank": 256,
            "q_lora_rank": 1024,
            "n_shared_experts": 1,
            "n_routed_experts": 128,
            "num_experts_per_tok": 4,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": True,
            "first_k_dense_replace": 0,
            "max_position_embeddings": 1048576,
            "rms_norm_eps": 1e-6,
        },
    ),
    ModelConfig(
        name="youtu-llm-2b",
        model_class="YoutuForCausalLM",
        source=CLASS_DEFAULTS,
        architecture={
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            **_MLA_128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _rope(1600000.0),
        },
    ),
    ModelConfig(
        name="kimi-linear-48b-a3b",
        model_class="KimiLinearForCausalLM",
        source=CLASS_DEFAULTS,
        architecture={
            "vocab_size": 163840,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "moe_intermediate_size": 1024,
            "num_hidden_layers": 27,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            **_MLA_128,
            "q_lora_rank": None,
            "n_shared_experts": 1,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.446,
            "norm_topk_prob": True,
            "linear_head_dim": 128,
            "linear_num_heads": 32,
            "linear_conv_kernel_dim": 4,
            "max_position_embeddings": 1048576,
            "rms_norm_eps": 1e-5,
        },
        small={"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"]},
        note="three layers of four are linear attention; no rope",
    ),
    ModelConfig(
        name="a.x-k1",
        model_class="AXK1ForCausalLM",
        source=CLASS_DEFAULTS,
        architecture={
            "vocab_size": 163840,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            **_MLA_128,
            "n_shared_experts": 1,
            "n_routed_experts": 192,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
        },
    ),
    ModelConfig(
        name="a.x-k2-light",
        model_class="AXK2ForCausalLM",
        source=CLASS_DEFAULTS,
        architecture={
            "vocab_size": 163840,
            "hidden_size": 2048,
            "intermediate_size": 5120,
            "moe_intermediate_size": 512,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "kv_lora_rank": 128,
            "q_lora_rank": 384,
            "n_shared_experts": 1,
            "n_routed_experts": 128,
            "num_experts_per_tok": 8,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "index_topk": 2048,
            "index_head_dim": 128,
            "index_n_heads": 16,
            "gated_norm_rank": 16,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
        },
    ),
    ModelConfig(
        name="hy-v4",
        model_class="HYV4ForCausalLM",
        source=CLASS_DEFAULTS,
        architecture={
            "vocab_size": 120832,
            "hidden_size": 2816,
            "intermediate_size": 6912,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 34,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "n_shared_experts": 1,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
            "norm_topk_prob": True,
            "index_topk": 2048,
            "index_head_dim": 128,
            "index_n_heads": 16,
            "hc_mult": 4,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
        },
    ),
    ModelConfig(
        name="ling-3",
        model_class="BailingHybridForCausalLM",
        source=CLASS_DEFAULTS,
        architecture={
            "vocab_size": 157184,
            "hidden_size": 2560,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 42,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "kv_lora_rank": 512,
            "n_shared_experts": 1,
            "num_local_experts": 512,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "first_k_dense_replace": 2,
            "head_dim": 128,
            "layer_group_size": 6,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
        },
        small={"layer_group_size": 2},
        note="five layers of six are linear attention",
    ),
)

CONFIGS: dict[str, ModelConfig] = {config.name: config for config in _CONFIGS}


def get_config(name: str) -> ModelConfig:
    """The configuration of a name.

    Raises:
        UsageError: there is none of this name.
    """
    try:
        return CONFIGS[name.lower()]
    except KeyError:
        raise UsageError(f"unknown configuration {name!r}: choose one of {', '.join(CONFIGS)}") from None
