"""The report of a lowering: what was found, layer by layer, what was assumed, what each pass did, what the verification measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One attention core of the export. The fields after `reason` are None where it is not matched."""

    index: int
    matched: bool
    reason: str | None = None
    at: str | None = None
    kind: str | None = None
    cache: str | None = None
    num_heads: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    scale: float | None = None
    sinks: bool | None = None
    absorbed: bool | None = None
    top_k: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "matched": self.matched,
            "kind": self.kind,
            "cache": self.cache,
            "num_heads": self.num_heads,
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "v_head_dim": self.v_head_dim,
            "kv_lora_rank": self.kv_lora_rank,
            "q_lora_rank": self.q_lora_rank,
            "scale": self.scale,
            "sinks": self.sinks,
            "absorbed": self.absorbed,
            "top_k": self.top_k,
            "reason": self.reason,
            "at": self.at,
        }


@dataclass(frozen=True)
class PassReport:
    """What one pass changed, and how long it took."""

    name: str
    changed: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "changed": self.changed, "seconds": round(self.seconds, 4)}


@dataclass
class Report:
    """The whole report; `to_json` is what `report.json` holds."""

    layers: list[LayerReport] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    passes: list[PassReport] = field(default_factory=list)
    verification: dict[str, Any] | None = None
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def matched(self) -> int:
        return sum(layer.matched for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        return {
            "attention_cores": len(self.layers),
            "matched": self.matched,
            "assumptions": self.assumptions,
            "notes": self.notes,
            "layers": [layer.to_json() for layer in self.layers],
            "verification": self.verification,
            "passes": [entry.to_json() for entry in self.passes],
            "model": self.model,
        }
