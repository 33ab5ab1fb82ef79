"""The part of the export that needs PyTorch and Transformers: building a model, and tracing one step of it with its
cache as plain tensors."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import DynamicCache

from mla_trt.errors import MlaTrtError, UsageError
from mla_trt.models.configs import ModelConfig
from mla_trt.models.patches import exportable_models

if TYPE_CHECKING:
    from mla_trt.models.export import ExportResult, ExportSettings

# Sizes of the example inputs. All differ and none is 1 or a model dimension, so that the exporter takes no two axes for
# one.
EXAMPLE_BATCH, EXAMPLE_TOKENS, EXAMPLE_PAST = 2, 3, 6


def build_model(config: ModelConfig, fields: dict[str, Any], settings: ExportSettings) -> torch.nn.Module:
    """The model of a configuration with random weights, in evaluation mode.

    Raises:
        UsageError: this version of Transformers does not have the model.
    """
    model_class = getattr(transformers, config.model_class, None)
    if model_class is None:
        raise UsageError(
            f"Transformers {transformers.__version__} has no {config.model_class}: pip install -U transformers"
        )
    # The published token ids would be outside a reduced vocabulary.
    token_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    architecture = getattr(transformers, config.config_class)(
        **fields, **token_ids, attn_implementation=settings.attention
    )
    torch.manual_seed(settings.seed)
    model = model_class(architecture).eval()
    randomize(model)
    # The default implementations group tokens by expert with operators that have no ONNX form.
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")
    return model.to(getattr(torch, settings.dtype))


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Gives every weight random values of a size that keeps activations near 1. Norm weights and biases too: all ones
    or zeros would hide a norm that is wired wrongly."""
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.ndim == 1 and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5)
        elif parameter.ndim < 2:
            parameter.normal_(0.0, 0.1)
        else:
            parameter.normal_(0.0, 1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.05)


def write_model(model: torch.nn.Module, output: Path, settings: ExportSettings) -> ExportResult:
    """Traces one step of a model and writes it."""
    from mla_trt.models.export import ExportResult

    with exportable_models():
        arguments, input_names, axes = example_inputs(model, settings)
    step = Step(model, model.config, settings.cache)
    output_names = ["logits"]
    if settings.cache:
        output_names += [name.replace("past_", "present_", 1) for name in input_names if name.startswith("past_")]
    try:
        with exportable_models(), _quiet(), torch.no_grad():
            _trace(step, arguments, output, input_names, output_names, axes, settings)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = next(
            (line for line in str(error.__cause__ or error).splitlines() if line.strip()), type(error).__name__
        )
        raise MlaTrtError(f"PyTorch's {settings.exporter} exporter failed: {reason}") from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ExportResult(output, tuple(input_names), tuple(output_names), parameters)


def _trace(
    step: Step,
    arguments: tuple[Any, ...],
    output: Path,
    input_names: list[str],
    output_names: list[str],
    axes: dict[str, dict[int, str]],
    settings: ExportSettings,
) -> None:
    common = {"input_names": input_names, "output_names": output_names, "opset_version": settings.opset}
    if settings.exporter == "dynamo":
        torch.onnx.export(
            step,
            arguments,
            output,
            **common,
            dynamo=True,
            dynamic_shapes=_dynamic_shapes(input_names, axes),
            optimize=settings.optimize,
            external_data=_is_large(step),
            verbose=False,
        )
    else:
        dynamic_axes = {name: axis for name, axis in axes.items() if axis}
        torch.onnx.export(
            step,
            arguments,
            output,
            **common,
            dynamo=False,
            dynamic_axes=dynamic_axes,
            do_constant_folding=settings.optimize,
        )


class Step(torch.nn.Module):
    """One step of a causal language model whose cache goes in and out as a list of tensors: no exporter takes
    Transformers' cache classes as they are."""

    def __init__(self, model: torch.nn.Module, config: Any, cache: bool) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.cache = cache

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> Any:
        """Logits of all tokens, then the grown cache tensors in the order of `past`."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if not self.cache:
            return self.model(**inputs, use_cache=False).logits
        cache = restore_cache(self.config, past)
        logits = self.model(**inputs, past_key_values=cache, use_cache=True).logits
        return (logits, *(tensor for _, tensor in cache_tensors(cache)))


def cache_tensors(cache: Any) -> list[tuple[str, torch.Tensor]]:
    """Every tensor of a cache with its name, such as `0.keys` or `1.conv_states.0`."""
    found: list[tuple[str, torch.Tensor]] = []
    for index, layer in enumerate(cache.layers):
        for attribute in ("keys", "values", "indexer_keys"):
            tensor = getattr(layer, attribute, None)
            if tensor is not None:
                found.append((f"{index}.{attribute}", tensor))
        for attribute in ("conv_states", "recurrent_states"):
            for state, tensor in getattr(layer, attribute, {}).items():
                if tensor is not None:
                    found.append((f"{index}.{attribute}.{state}", tensor))
    return found


def restore_cache(config: Any, tensors: list[torch.Tensor]) -> Any:
    """The cache that holds the given tensors, in the order of `cache_tensors`."""
    cache = DynamicCache(config=config)
    shared = _layers_without_indexer(config)
    remaining = iter(tensors)
    for index, layer in enumerate(cache.layers):
        if hasattr(layer, "conv_states"):
            for state in layer.conv_states:
                layer.conv_states[state] = next(remaining)
                layer.conv_kernel_size[state] = layer.conv_states[state].shape[-1]
                layer.is_conv_states_initialized[state] = layer.has_previous_state[state] = True
                layer.dtype, layer.device = layer.conv_states[state].dtype, layer.conv_states[state].device
            for state in layer.recurrent_states:
                layer.recurrent_states[state] = next(remaining)
                layer.is_recurrent_states_initialized[state] = True
            continue
        keys, values = next(remaining), next(remaining)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if hasattr(layer, "indexer_keys") and index not in shared:
            indexer_keys = next(remaining)
            layer.lazy_initialization_indexer(indexer_keys)
            layer.indexer_keys = indexer_keys
    return cache


def _layers_without_indexer(config: Any) -> set[int]:
    """Layers that take the selection of an earlier layer and so cache no index keys."""
    kinds = getattr(config, "indexer_types", None) or []
    return {index for index, kind in enumerate(kinds) if kind == "shared"}


def example_inputs(
    model: torch.nn.Module, settings: ExportSettings
) -> tuple[tuple[Any, ...], list[str], dict[str, dict[int, str]]]:
    """Arguments to trace with, their names, and the name of each dynamic axis of each input and output."""
    batch = settings.batch or EXAMPLE_BATCH
    tokens = settings.tokens or EXAMPLE_TOKENS
    past = (settings.past or EXAMPLE_PAST) if settings.cache else 0
    generator = torch.Generator().manual_seed(settings.seed)
    vocabulary = model.config.vocab_size
    input_ids = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
    attention_mask = torch.ones(batch, past + tokens, dtype=torch.int64)
    position_ids = torch.arange(past, past + tokens).expand(batch, tokens).contiguous()
    names = ["input_ids", "attention_mask", "position_ids"]
    tensors: list[torch.Tensor] = []
    if settings.cache:
        with torch.no_grad():
            prompt = torch.randint(0, vocabulary, (batch, past), generator=generator)
            cache = DynamicCache(config=model.config)
            model(input_ids=prompt, past_key_values=cache, use_cache=True)
        for name, tensor in cache_tensors(cache):
            names.append(f"past_{name}")
            tensors.append(tensor.clone())
    axes = _dynamic_axes(names, settings)
    return (input_ids, attention_mask, position_ids, tensors), names, axes


def _dynamic_axes(names: list[str], settings: ExportSettings) -> dict[str, dict[int, str]]:
    free = {
        "batch": settings.batch is None,
        "sequence": settings.tokens is None,
        "past": settings.past is None and settings.cache,
    }
    free["total"] = free["sequence"] or free["past"]
    axes: dict[str, dict[int, str]] = {}
    for name in names:
        if name == "attention_mask":
            layout = {0: "batch", 1: "total"}
        elif name.endswith("indexer_keys"):
            layout = {0: "batch", 1: "past"}
        elif name.endswith((".keys", ".values")):
            layout = {0: "batch", 2: "past"}
        elif name.startswith("past_"):
            layout = {0: "batch"}
        else:
            layout = {0: "batch", 1: "sequence"}
        axes[name] = {axis: letter for axis, letter in layout.items() if free[letter]}
        if name.startswith("past_"):
            grown = {axis: "total" if letter == "past" else letter for axis, letter in layout.items()}
            axes[name.replace("past_", "present_", 1)] = {
                axis: letter for axis, letter in grown.items() if free[letter]
            }
    axes["logits"] = axes["input_ids"]
    return axes


def _dynamic_shapes(names: list[str], axes: dict[str, dict[int, str]]) -> tuple[Any, ...]:
    plain = tuple(axes[name] for name in names[:3])
    return (*plain, [axes[name] for name in names[3:]])


def _is_large(model: torch.nn.Module) -> bool:
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return math.ceil(size / 2**30) > 1


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters print warnings about their own insides, and whole graphs when they fail."""
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
