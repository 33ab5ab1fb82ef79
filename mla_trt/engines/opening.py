"""Opens whatever a user names as an engine: a lowered model runs on ONNX Runtime, an engine on TensorRT."""

from __future__ import annotations

from pathlib import Path

from mla_trt.engines.engine import Engine
from mla_trt.engines.engine_file import description_path, is_engine
from mla_trt.errors import BadModelError

DEFAULT_PAGES = 256


def open_engine(path: Path | str, *, pages: int | None = None, plugins: Path | None = None) -> Engine:
    """Opens an engine.

    Args:
        path: the folder that `mla-trt lower` wrote, the model in it, or what `mla-trt build` wrote.
        pages: pages in the pool of each cache; None: as many as the engine was built for, or 256.
        plugins: the plugin library of TensorRT; None: the one that is found.

    Raises:
        BadModelError: it does not exist, is neither, is damaged, or made for another machine.
        MlaTrtError: there is no GPU or TensorRT for an engine.
        UsageError: it takes another number of pages.
    """
    path = Path(path)
    if is_engine(path):
        from mla_trt.engines.engine_tensorrt import TensorRtEngine

        return TensorRtEngine.open(path, pages=pages, plugins=plugins)
    from mla_trt.engines.engine_onnxruntime import OnnxRuntimeEngine

    model = path / "model.onnx" if path.is_dir() else path
    if not model.exists():
        raise BadModelError(
            f"'{model}' does not exist: give the folder that 'mla-trt lower' wrote, or the file that 'mla-trt build' wrote"
        )
    if model.suffix != ".onnx":
        raise BadModelError(
            f"'{model}' is no .onnx file, and there is no '{description_path(model)}' that would say which engine it is"
        )
    return OnnxRuntimeEngine(model, pages=DEFAULT_PAGES if pages is None else pages)
