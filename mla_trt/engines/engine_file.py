"""What is known of a TensorRT engine without loading it.

An engine is two files: ENGINE, the plan as TensorRT wrote it, which any tool of TensorRT loads, and ENGINE.json, which
says what the plan holds: the lowered model's metadata, its inputs and outputs, the ranges of its profiles, and what it
was built with. A plan cannot be asked for any of this before TensorRT has loaded it, and loading one that does not fit
the machine ends in messages that nobody can act on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mla_trt.engines.engine import PAGE_COPIES
from mla_trt.errors import BadModelError
from mla_trt.interface import Axis
from mla_trt.metadata import LoweredMetadata

VERSION = 2
DECODE, PREFILL = "decode", "prefill"
PROFILES = (DECODE, PREFILL)
IO, RESIDENT = "io", "resident"
CACHES = (IO, RESIDENT)
DIGESTED = 1 << 20  # bytes at the beginning and at the end of a plan

# Axes of the inputs. Others have a fixed size.
TOKENS, SEQUENCES, OFFSETS, COLUMNS, PAGES, COPIES = "T", "B", "B + 1", "max_pages", "pages", "copies"
NEW, TOTAL = "S", "P + S"  # of models that cannot be packed: new tokens, all tokens of a sequence
AXES = (TOKENS, SEQUENCES, OFFSETS, COLUMNS, PAGES, COPIES, NEW, TOTAL)


@dataclass(frozen=True)
class Range:
    """Sizes of an axis that a profile takes, and the one that it is tuned for."""

    least: int
    best: int
    most: int

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.best <= self.most:
            raise ValueError(f"{self.least} <= {self.best} <= {self.most} does not hold")


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine.

    Attributes:
        name: its name.
        dtype: ONNX element type.
        axes: a letter of `AXES`, another name where the size is not known before a step, or a fixed size.
    """

    name: str
    dtype: int
    axes: tuple[Axis, ...]

    @property
    def numpy_dtype(self) -> np.dtype:
        """The type as numpy (with ml_dtypes) has it."""
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.dtype))


@dataclass(frozen=True)
class EngineDescription:
    """What ENGINE.json says.

    Attributes:
        metadata: the lowered model's own.
        inputs, outputs: in the engine's order, caches among them where `cache` is "io".
        profiles: range of each axis, of each profile.
        vocabulary: number of token ids, None where it is not known.
        tensorrt: version of TensorRT that built the plan, such as "10.6.0".
        gpu: name of the GPU that it was built on.
        compute_capability: of that GPU, such as "9.0".
        plugins: what the plugin library says of its build.
        dtype: "keep" or "bf16".
        cache: "io", pages are inputs and outputs, or "resident", the engine's plugins hold them.
        weight_streaming: whether weights may stay in host memory.
        plan_bytes, plan_digest: size of the plan, and a hash of its beginning and end.
        mla_trt: version of this package.
        weights: "keep" or "fp8"; files of versions before it have none.
    """

    metadata: LoweredMetadata
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    profiles: Mapping[str, Mapping[str, Range]]
    vocabulary: int | None
    tensorrt: str
    gpu: str
    compute_capability: str
    plugins: str
    dtype: str
    cache: str
    weight_streaming: bool
    plan_bytes: int
    plan_digest: str
    mla_trt: str
    weights: str = "keep"

    @property
    def results(self) -> tuple[str, ...]:
        """Outputs that are neither caches nor states, in order."""
        next_values = {cache.output for cache in self.metadata.caches}
        next_values |= {entry.output for entry in self.metadata.side_inputs if entry.output}
        return tuple(output.name for output in self.outputs if output.name not in next_values)

    def limits(self) -> dict[str, int]:
        """The largest step that the engine takes, by what is limited."""
        most = {axis: size.most for axis, size in self.profiles[PREFILL].items()}
        return {
            "tokens": most[TOKENS if self.metadata.packed else NEW],
            "sequences": most[SEQUENCES],
            "tokens of a sequence": most[COLUMNS] * self.metadata.page_size,
        }

    def to_json(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object.

        Args:
            metadata: that of the model, as it stands there.
        """
        data = asdict(self)
        data["metadata"] = dict(metadata)
        return {"version": VERSION, **data}

    @classmethod
    def parse(cls, text: str, where: str) -> EngineDescription:
        """Reads the JSON text.

        Args:
            text: the text.
            where: names the file in errors.

        Raises:
            BadModelError: it is damaged, or of another version.
        """
        try:
            data = json.loads(text)
            if data["version"] != VERSION:
                raise BadModelError(
                    f"'{where}' has version {data['version']}; this program reads {VERSION}: build the engine again"
                )
            inputs, outputs = (
                tuple(EngineTensor(entry["name"], entry["dtype"], tuple(entry["axes"])) for entry in data[key])
                for key in ("inputs", "outputs")
            )
            return cls(
                metadata=LoweredMetadata.parse(json.dumps(data["metadata"])),
                inputs=inputs,
                outputs=outputs,
                profiles={
                    profile: {axis: Range(**sizes) for axis, sizes in data["profiles"][profile].items()}
                    for profile in PROFILES
                },
                weights=data.get("weights", "keep"),
                **{
                    name: data[name]
                    for name in (
                        "vocabulary",
                        "tensorrt",
                        "gpu",
                        "compute_capability",
                        "plugins",
                        "dtype",
                        "cache",
                        "weight_streaming",
                        "plan_bytes",
                        "plan_digest",
                        "mla_trt",
                    )
                },
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadModelError(f"'{where}' cannot be read: {type(error).__name__} {error}") from None


def description_path(engine: Path) -> Path:
    """The file beside an engine that describes it."""
    return engine.with_name(engine.name + ".json")


def is_engine(path: Path) -> bool:
    """Whether a path is that of an engine rather than of a model."""
    return path.is_file() and path.suffix != ".onnx" and description_path(path).is_file()


def read_description(engine: Path) -> EngineDescription:
    """Reads the description of an engine and checks that it belongs to the plan.

    Raises:
        BadModelError: a file is missing, damaged, or belongs to another engine.
    """
    path = description_path(engine)
    for file in (engine, path):
        if not file.is_file():
            raise BadModelError(f"'{file}' does not exist: an engine is two files, ENGINE and ENGINE.json")
    description = EngineDescription.parse(path.read_text(errors="replace"), str(path))
    if (engine.stat().st_size, plan_digest(engine)) != (description.plan_bytes, description.plan_digest):
        raise BadModelError(f"'{engine}' is not the plan that '{path}' describes: copy both files, or build it again")
    return description


def plan_digest(path: Path) -> str:
    """A hash of the first and last MiB of a plan, which can be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(DIGESTED))
        file.seek(max(0, path.stat().st_size - DIGESTED))
        digest.update(file.read())
    return digest.hexdigest()


def engine_tensors(model: onnx.ModelProto, metadata: LoweredMetadata) -> tuple[list[EngineTensor], list[EngineTensor]]:
    """Inputs and outputs of a lowered model with their axes.

    Raises:
        BadModelError: an input has an axis of unknown meaning.
    """
    known = {entry.name: entry.axes for entry in metadata.side_inputs}
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = []
    for value in model.graph.input:
        if value.name in weights:
            continue
        axes = _axes(value)
        for index, axis in enumerate(axes):
            if isinstance(axis, str) and axis not in AXES:
                side = known.get(value.name, ())
                axes[index] = {"T": TOTAL}.get(str(side[index]), side[index]) if index < len(side) else axis
            if value.name == PAGE_COPIES and index == 0:
                axes[index] = COPIES
            if isinstance(axes[index], str) and axes[index] not in AXES:
                raise BadModelError(
                    f"the input '{value.name}' has an axis '{axis}', for which an engine cannot know the sizes"
                )
        inputs.append(EngineTensor(value.name, value.type.tensor_type.elem_type, tuple(axes)))
    outputs = [
        EngineTensor(value.name, value.type.tensor_type.elem_type, tuple(_axes(value))) for value in model.graph.output
    ]
    return inputs, outputs


def without_pools(
    inputs: Sequence[EngineTensor], outputs: Sequence[EngineTensor], metadata: LoweredMetadata
) -> tuple[list[EngineTensor], list[EngineTensor]]:
    """Inputs and outputs of an engine whose plugins hold the pages: no caches, and always `page_copies`."""
    pools = {name for cache in metadata.caches for name in (cache.name, cache.output)}
    kept = [tensor for tensor in inputs if tensor.name not in pools]
    if PAGE_COPIES not in {tensor.name for tensor in kept}:
        kept.append(EngineTensor(PAGE_COPIES, onnx.TensorProto.INT32, (COPIES, 2)))
    return kept, [tensor for tensor in outputs if tensor.name not in pools]


def _axes(value: onnx.ValueInfoProto) -> list[Axis]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims]
