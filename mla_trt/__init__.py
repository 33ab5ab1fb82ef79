"""mla-trt: lowers multi-head latent attention in ONNX models to fused ops over a paged latent cache."""

from pathlib import Path

__version__ = "0.1.0"

# In the source tree the parts `passes`, `plugins` and `models` lie beside the package: it works from there uninstalled.
_tree = Path(__file__).resolve().parent.parent
if (_tree / "plugins" / "op_table.py").is_file():
    __path__.append(str(_tree))
