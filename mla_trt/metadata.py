"""What a lowered model says about itself: ``metadata_props["mla_trt"]``, which every tool that runs the model reads
instead of the graph."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import onnx

from mla_trt.errors import BadModelError
from mla_trt.interface import ModelInput

METADATA_KEY = "mla_trt"
METADATA_VERSION = 1


@dataclass(frozen=True)
class CacheInfo:
    """One paged cache: the graph input that holds its pages, int32 [pages, page_words].

    Attributes:
        name: name of the input.
        layer: attention core that it belongs to.
        kind: "kv" or "indexer".
        page_words: int32 words of a page.
    """

    name: str
    layer: int
    kind: str
    page_words: int

    @property
    def output(self) -> str:
        """Name of the output that holds the pages after a step: kv_cache.0 becomes kv_cache_out.0."""
        prefix, _, index = self.name.rpartition(".")
        return f"{prefix}_out.{index}"


def set_facts(model: onnx.ModelProto, **facts: object) -> None:
    """Changes entries of a lowered model's metadata, by their names in its JSON."""
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = json.dumps(json.loads(entry.value) | facts)


@dataclass(frozen=True)
class LoweredMetadata:
    """The facts that a lowered model carries.

    Attributes:
        token_input: name of the token input.
        token_axes: its axes without those of features: "T" packed tokens, "1", or "B" and "S", sequences and their new
            tokens, in models that cannot be packed.
        logits: "all" (results of every token) or "last" (of each sequence's last one).
        page_size: tokens in a page.
        max_pages: columns of the block table where they are fixed.
        row_format, index_format: formats of the rows of the caches.
        max_position: number of positions that the model has (rope tables), None where there is no limit.
        vocabulary: number of token ids, None where it is not known or tokens are embeddings.
        target: what the model was legalised for.
        caches: the paged caches.
        layers: the report's layer objects.
        side_inputs: inputs that remain beside tokens and caches: attention masks and states of recurrent layers, rope
            tables.
    """

    token_input: str
    token_axes: tuple[str, ...]
    logits: str
    page_size: int
    max_pages: int | None
    row_format: str
    index_format: str
    max_position: int | None
    vocabulary: int | None
    target: str
    caches: tuple[CacheInfo, ...]
    layers: tuple[dict[str, Any], ...] = ()
    side_inputs: tuple[ModelInput, ...] = ()

    @property
    def packed(self) -> bool:
        """Whether tokens of all sequences lie along one axis, so that sequences may get different numbers of tokens."""
        return "T" in self.token_axes

    @classmethod
    def of(cls, model: onnx.ModelProto) -> LoweredMetadata:
        """Reads the metadata of a lowered model.

        Raises:
            BadModelError: the model is not a lowered one, or of a version that this program does not know.
        """
        text = next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)
        if text is None:
            raise BadModelError(
                "the model is not a lowered one: it has no mla_trt metadata; make one with 'mla-trt lower'"
            )
        return cls.parse(text)

    @classmethod
    def parse(cls, text: str) -> LoweredMetadata:
        """Reads the JSON text. Errors as in `of`."""
        try:
            data = json.loads(text)
            version = data["version"]
            if version != METADATA_VERSION:
                raise BadModelError(
                    f"the model's metadata has version {version}; this program reads {METADATA_VERSION}: lower it again"
                )
            return cls(
                token_input=data["token_input"],
                token_axes=tuple(str(axis) for axis in data["token_axes"] if str(axis) in ("1", "T", "B", "S")),
                logits=data["logits"],
                page_size=int(data["page_size"]),
                max_pages=data.get("max_pages"),
                row_format=data["row_format"],
                index_format=data["index_format"],
                max_position=data.get("max_position"),
                vocabulary=data.get("vocabulary"),
                target=data.get("target", ""),
                caches=tuple(
                    CacheInfo(entry["name"], entry["layer"], entry["kind"], entry["page_words"])
                    for entry in data["caches"]
                ),
                layers=tuple(data.get("layers", ())),
                side_inputs=tuple(
                    ModelInput(entry["name"], entry["role"], entry["dtype"], tuple(entry["axes"]), entry.get("output"))
                    for entry in data.get("side_inputs", ())
                ),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadModelError(
                f"the model's mla_trt metadata cannot be read: {type(error).__name__} {error}"
            ) from None
