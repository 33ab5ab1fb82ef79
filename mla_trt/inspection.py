"""What the passes find in an export, and hand from one to the next."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from mla_trt.interface import ModelInterface
from mla_trt.passes.match_indexer import IndexerMatch
from mla_trt.passes.match_mla import MlaMatch
from mla_trt.passes.probe import Probe
from mla_trt.passes.static_quantization import Rounding
from mla_trt.report import Report


@dataclass
class Inspection:
    """What was found in an export.

    Attributes:
        cache_outputs: outputs that hold what attentions would cache, of an export that takes no caches.
        roundings: of data, taken out of the graph.
    """

    graph: gs.Graph
    interface: ModelInterface
    probes: list[Probe]
    matches: list[MlaMatch | None]
    indexers: dict[int, IndexerMatch]
    report: Report
    cache_outputs: set[str] = field(default_factory=set)
    roundings: list[Rounding] = field(default_factory=list)
