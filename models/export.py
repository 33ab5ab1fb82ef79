"""Exports a public model configuration to ONNX, with random weights, through PyTorch and Transformers.

PyTorch is imported only when something is exported: the rest of the package works without it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mla_trt.errors import UsageError
from mla_trt.models.configs import ModelConfig, Size, get_config
from mla_trt.writing import check_writable, folder_written_whole

Exporter = Literal["dynamo", "torchscript"]
Attention = Literal["eager", "sdpa"]
Dtype = Literal["float32", "float16", "bfloat16"]

OPSETS = {"dynamo": range(18, 26), "torchscript": range(14, 21)}
REQUIRED = ("torch", "transformers", "onnxscript")


@dataclass(frozen=True)
class ExportSettings:
    """How to export.

    Attributes:
        exporter: PyTorch's exporter: `dynamo` (torch.export) or the older `torchscript`.
        opset: ONNX opset of the export.
        attention: implementation that Transformers uses for the attention core.
        cache: with a cache (`past_{i}.*` inputs, `present_{i}.*` outputs), or a prefill without one.
        dtype: type of weights and activations.
        batch, tokens, past: fixed sizes of the batch, the new tokens and the cached tokens; None leaves the axis
            dynamic. All three fixed give a graph without dynamic axes.
        optimize: constant folding and clean-up by the exporter.
        seed: of the random weights.
    """

    exporter: Exporter = "dynamo"
    opset: int = 20
    attention: Attention = "eager"
    cache: bool = True
    dtype: Dtype = "float32"
    batch: int | None = None
    tokens: int | None = None
    past: int | None = None
    optimize: bool = True
    seed: int = 0


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        path: the ONNX file.
        inputs: names of its inputs, in order.
        outputs: names of its outputs, in order.
        parameters: number of weights.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: int = field(default=0)


def export(
    config: str | ModelConfig,
    output: str | Path,
    *,
    layers: int | None = None,
    size: Size = "small",
    settings: ExportSettings | None = None,
) -> ExportResult:
    """Writes one model as ONNX.

    Args:
        config: a configuration or the name of one, such as `"deepseek-v3"`.
        output: the `.onnx` file; weights beyond 2 GB go beside it.
        layers: number of layers; None for all of the published ones, or 2 when small.
        size: `"small"` for reduced dimensions, `"full"` for the published ones (all weights are held in memory once).
        settings: how to export; the defaults of `ExportSettings` when None.

    Raises:
        UsageError: PyTorch or Transformers is not installed, the settings do not go together, or the output cannot be written.
        MlaTrtError: PyTorch cannot export it. Nothing was written, as on every error.
    """
    output = Path(output)
    settings = settings or ExportSettings()
    config = get_config(config) if isinstance(config, str) else config
    fields = config.fields(size, layers)
    _check(config, settings)
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"exporting needs {', '.join(missing)}: pip install 'mla-trt[export]'")
    check_writable(output.parent)
    if output.exists() and not output.is_file():
        raise UsageError(f"'{output}' is a folder or a device: give a file to write the model to")
    from mla_trt.models.torch_export import build_model, write_model

    try:
        model = build_model(config, fields, settings)
    except ValueError as error:
        raise UsageError(
            f"Transformers refuses {config.name} with these settings: {str(error).splitlines()[0]}"
        ) from error
    with folder_written_whole(output.parent) as draft:
        result = write_model(model, draft / output.name, settings)
    return replace(result, path=output)


def _check(config: ModelConfig, settings: ExportSettings) -> None:
    opsets = OPSETS[settings.exporter]
    if settings.opset not in opsets:
        raise UsageError(
            f"the {settings.exporter} exporter writes opsets {opsets.start} to {opsets.stop - 1}, not {settings.opset}"
        )
    if settings.exporter == "torchscript" and config.is_sparse:
        raise UsageError(
            f"{config.name} selects keys with operators that the torchscript exporter lacks: use the dynamo exporter"
        )
    for name in ("batch", "tokens", "past"):
        size = getattr(settings, name)
        if size is not None and size < 1:
            raise UsageError(f"a fixed size of {name} must be 1 or more, not {size}")
    if settings.past is not None and not settings.cache:
        raise UsageError("a number of cached tokens makes no sense without a cache")
