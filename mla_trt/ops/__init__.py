"""The op set of the domain ``mla_trt``, version 1.

``OPS`` maps op types to :class:`~mla_trt.ops.schema.Op`. The passes use :func:`make_node` and :func:`infer_shapes`;
whoever writes a model calls :func:`attach_functions`; engine builders call :func:`strip_functions`.
"""

from __future__ import annotations

from mla_trt.ops.model import OPS, attach_functions, infer_shapes, make_node, mla_nodes, retarget, strip_functions
from mla_trt.ops.schema import DOMAIN, DOMAIN_VERSION, PLUGIN_ATTRIBUTES, Attributes, Op, TensorType

__all__ = [
    "DOMAIN",
    "DOMAIN_VERSION",
    "OPS",
    "PLUGIN_ATTRIBUTES",
    "Attributes",
    "Op",
    "TensorType",
    "attach_functions",
    "infer_shapes",
    "make_node",
    "mla_nodes",
    "retarget",
    "strip_functions",
]
