"""Replacements for the parts of Transformers' models that no exporter takes. Each computes what the original
computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from transformers.cache_utils import LinearAttentionLayer
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.longcat_flash import modeling_longcat_flash

_first_conv_state = LinearAttentionLayer.update_conv_state


@contextlib.contextmanager
def exportable_models() -> Iterator[None]:
    """All replacements are in force inside the block."""
    replacements = [
        (LinearAttentionLayer, "update_conv_state", update_conv_state),
        (LinearAttentionLayer, "update_recurrent_state", update_recurrent_state),
        (modeling_deepseek_v2, "apply_rotary_emb", apply_rotary_emb),
        (modeling_deepseek_v2.DeepseekV2RotaryEmbedding, "forward", rotary_embedding),
        (modeling_longcat_flash.LongcatFlashExperts, "forward", longcat_experts),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in replacements:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def update_conv_state(self: Any, conv_states: torch.Tensor, state_idx: int = 0, **options: Any) -> torch.Tensor:
    """Replaces the state; the original writes into it, and here it is a graph input."""
    if not self.has_previous_state[state_idx]:
        return _first_conv_state(self, conv_states, state_idx, **options)
    full = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
    self.conv_states[state_idx] = full[..., -self.conv_kernel_size[state_idx] :]
    return full


def update_recurrent_state(
    self: Any, recurrent_states: torch.Tensor, state_idx: int = 0, **options: Any
) -> torch.Tensor:
    """Replaces the state; the original writes into it, and here it is a graph input."""
    self.recurrent_states[state_idx] = recurrent_states
    return recurrent_states


def rotary_embedding(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Cosines and sines [..., 2] in place of DeepSeek-V2's complex numbers, of which ONNX has none."""
    angles = position_ids[..., None].float() * self.inv_freq
    return torch.stack([angles.cos(), angles.sin()], dim=-1) * self.attention_scaling


def apply_rotary_emb(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The complex product of DeepSeek-V2's rope in real numbers, with the result of `rotary_embedding`."""
    cos, sin = freqs_cis.unsqueeze(1).unbind(-1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).type_as(x)

    return rotate(xq), rotate(xk)


def longcat_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """All experts on all tokens, weighted; the original loops over the experts that were hit, which depends on data.
    Experts past the routed ones pass the token through."""
    weights = torch.zeros(hidden_states.shape[0], self.total_experts, dtype=top_k_weights.dtype)
    weights = weights.scatter_add(1, top_k_index, top_k_weights).to(hidden_states.dtype)
    routed = self.num_routed_experts
    gate, up = torch.matmul(hidden_states, self.gate_up_proj[:routed].transpose(1, 2)).chunk(2, dim=-1)
    outputs = torch.matmul(self.act_fn(gate) * up, self.down_proj.transpose(1, 2))
    mixed = (outputs * weights[:, :routed].T.unsqueeze(-1)).sum(0)
    return mixed + hidden_states * weights[:, routed:].sum(-1, keepdim=True)
