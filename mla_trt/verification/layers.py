"""Verification a layer at a time, for models that are too large to be run whole.

Each attention layer is cut out twice: from the export, and from the lowered model as it is. Both parts begin at the
same tensor (usually the output of the norm before the layer's projections), with random values in the place of what the
layers before would have given, and end where the attention's result leaves. They are compared as whole models are: over
sessions, with their caches. What lies between the attention layers is cut out and compared likewise, as far as it has
borders and fits in memory; the report says what was not run.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from mla_trt import interface as roles
from mla_trt.errors import BadModelError
from mla_trt.float32 import HALF_TYPES
from mla_trt.interface import ModelInput, ModelInterface
from mla_trt.layer_plan import Between, Boundary, LayerPart, LayerPlan
from mla_trt.loading import ModelOnDisk, load_from_elsewhere
from mla_trt.metadata import METADATA_KEY, LoweredMetadata, set_facts
from mla_trt.ops import DOMAIN, OPS, retarget
from mla_trt.selection import SPARSE
from mla_trt.verification.cutting import PREFIX, SIZE_OPS, CannotCutError, Cutter, Output, Start
from mla_trt.verification.verify import LAYERS, VERIFICATION_PAGE_SIZE, VerificationReport, verify

DENSE = "MlaAttention"
FLOATS = {TensorProto.FLOAT, *HALF_TYPES}
MOVES = ("Cast", "Reshape", "Transpose")
INPUT = "layer_input"
INSTEAD = ": verify the model whole with a larger --verify-memory, or lower it unverified with --no-verify"
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
# One model is open at a time. While ONNX Runtime opens it, its weights are in memory several times over, and those of
# half precision were made float32 before.
COPIES = 6
DRAWS = 3


def memory_needed(model: onnx.ModelProto) -> int:
    """Bytes that verifying a model whole takes, from the sizes of its weights; external ones are not read."""
    tensors = [*model.graph.initializer]
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        tensors += [attribute.t for node in nodes for attribute in node.attribute if attribute.HasField("t")]
    return COPIES * sum(_bytes_in_float32(tensor) for tensor in tensors)


def half_of_memory() -> int:
    """Half of the bytes that the machine, or the container, has."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in CONTAINER_LIMITS:
        try:
            found = min(found, int(limit.read_text()))
        except (OSError, ValueError):  # there is no such file, or it says "max"
            continue
    return found // 2


def _bytes_in_float32(tensor: TensorProto) -> int:
    count = math.prod(tensor.dims)
    if tensor.data_type in HALF_TYPES:
        return 4 * count
    if tensor.data_type == TensorProto.STRING:
        return 0
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return count // 2
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def verify_layers(
    original: ModelOnDisk,
    interface: ModelInterface,
    plan: LayerPlan,
    exact: ModelOnDisk,
    written: ModelOnDisk,
    *,
    judged: bool = True,
    seed: int = 0,
    memory: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> VerificationReport:
    """Compares a lowered model with its original, layer by layer. Only one layer's weights are loaded at a time.

    Args:
        original: the export.
        interface: roles and axes of its inputs.
        plan: where its layers begin and end.
        exact: the lowered model with weights as exported; may be `written`.
        written: the lowered model as it is to be used.
        judged, seed: as for `mla_trt.verification.verify.verify`.
        memory: bytes that what lies between two attention layers may take; what needs more is not run. None: half of the
            machine's memory.
        progress: told which layer comes next.

    Raises:
        NoSessionError: as for `verify`.
    """
    whole = _Layers(original, interface, plan, exact, written, judged, seed)
    reports = []
    for parts in plan.groups:
        label = "layer " + ", ".join(str(part.layer) for part in parts)
        progress(f"verify {label}")
        reports.append((label, whole.verify(parts)))
        gc.collect()
    layers = sum(len(parts) for parts in plan.groups)
    left_out = dict.fromkeys(("before layer 0", *(f"after layer {n}" for n in range(layers))), "it has no borders")
    if plan.groups[0][0].beginnings[:1] and plan.groups[0][0].beginnings[0].name == interface.tokens.name:
        del left_out["before layer 0"]
    for between in plan.between:
        progress(f"verify what is {between.label}")
        try:
            reports.append((between.label, whole.verify_between(between, memory or half_of_memory())))
            del left_out[between.label]
        except CannotCutError as error:
            left_out[between.label] = str(error)
        gc.collect()
    return _joined(reports, left_out, judged)


class _Layers:
    """The models, ready to be cut."""

    def __init__(
        self,
        original: ModelOnDisk,
        interface: ModelInterface,
        plan: LayerPlan,
        exact: ModelOnDisk,
        written: ModelOnDisk,
        judged: bool,
        seed: int,
    ) -> None:
        self.original, self.exact, self.written = original, exact, written
        self.interface = interface
        self.judged = judged
        self.seed = seed
        self._seen: set[tuple[str, str]] = set()
        states = (*interface.by_role(roles.CACHE), *interface.by_role(roles.STATE))
        self._cutter = Cutter(
            original.proto, axes=plan.axes, tokens=interface.tokens.name, caches=[entry.name for entry in states]
        )
        self._written = _LoweredCutter(written, plan, written.folder)
        self._exact = self._written if exact is written else _LoweredCutter(exact, plan, written.folder)

    def verify(self, parts: tuple[LayerPart, ...]) -> VerificationReport:
        """Compares a group of layers."""
        layers = {part.layer: next((way_out.order for way_out in part.exits), ()) for part in parts}
        try:
            start = self._start(parts)
            results = {
                layer: [self._free(f"attention.{layer}.{count}") for count in range(len(self._written.exits(layer)))]
                for layer in layers
            }
            written = self._written.cut(layers, start, results)
            exact = written if self._exact is self._written else self._exact.cut(layers, start, results)
            export, interface = self._cut_original(parts, start, results)
        except CannotCutError as error:
            return _failed(f"the layer cannot be cut out of the model: {error}{INSTEAD}", self.judged)
        try:
            return self._compare(export, interface, exact, written, self.seed)
        except BadModelError as error:
            return _failed(f"the layer does not run by itself: {error}{INSTEAD}", self.judged)

    def verify_between(self, part: Between, memory: int) -> VerificationReport:
        """Compares what lies between two layers.

        Raises:
            CannotCutError: it cannot be separated, or does not fit in memory.
        """
        exits = self._written.exits(part.layer) if part.layer is not None else []
        if len(exits) > 1:
            raise CannotCutError("the attention's result leaves in several forms")
        reason = CannotCutError("it has no borders")
        for stream in part.streams or (None,):
            try:
                return self._verify_between(part, exits, stream, memory)
            except CannotCutError as error:
                reason = error
        raise reason

    def _verify_between(
        self, part: Between, exits: list[str], stream: Boundary | None, memory: int
    ) -> VerificationReport:
        tokens, way_in = self.interface.tokens, part.way_in
        leading = ("B", "S") if "B" in tokens.axes else ("S",)
        if way_in is None:
            assert stream is not None
            name, dtype = stream.name, stream.dtype
        else:
            name, dtype = self._free(INPUT), way_in.dtype
            if stream is not None and stream.dtype not in FLOATS:
                raise CannotCutError(f"it depends on '{stream.name}' too")
        past = ((stream.name, stream.axes),) if stream is not None else ()
        start, written_start = (
            Start(name, dtype, (*(((entry, way_in.axes),) if way_in is not None else ()), *past), leading)
            for entry in ((way_in.name if way_in is not None else ""), *(exits or [""]))
        )
        names = [edge.name for edge in (*part.ends, *([stream] if stream is not None else []))]
        missing = [name for name in names if not (self._cutter.has(name) and self._written.has(name))]
        if missing:
            raise CannotCutError(f"the models do not both have '{missing[0]}'")
        outputs = {self._free(f"result.{count}"): Output(end.name, end.width) for count, end in enumerate(part.ends)}
        states = {entry.name: str(entry.output) for entry in self.interface.by_role(roles.STATE)}
        taken = self._cutter.take([end.name for end in part.ends], start, grown=states)
        entries = [entry for entry in self.interface.inputs if entry.name in taken.inputs]
        if any(entry.role == roles.CACHE for entry in entries):
            raise CannotCutError("it reads a cache")
        export = self._cutter.build(taken, start, outputs, _next_values(entries))
        if (needed := memory_needed(export)) > memory:
            raise CannotCutError(f"it needs {needed / 2**30:.1f} GiB")
        load_from_elsewhere(export, self.original, self.original.folder)
        written = self._written.cut_between(
            written_start, outputs, results=bool({end.name for end in part.ends} & set(self.interface.results))
        )
        first = ModelInput(name, roles.TOKENS, dtype, (*leading, start.features))
        interface = ModelInterface(
            (tokens if name == tokens.name else first, *entries), tuple(outputs), self.interface.fixed
        )
        try:
            for draw in range(DRAWS):
                # Two experts may score so alike that rounding decides: with other tokens it will not.
                report = self._compare(export, interface, written, written, self.seed + draw)
                if report.passed:
                    break
        except BadModelError as error:
            raise CannotCutError(f"it does not run by itself: {error}") from None
        return report

    def _compare(
        self,
        export: onnx.ModelProto,
        interface: ModelInterface,
        exact: onnx.ModelProto,
        written: onnx.ModelProto,
        seed: int,
    ) -> VerificationReport:
        variants = {(node.op_type, node.overload) for node in written.graph.node if node.domain == DOMAIN}
        report = verify(
            export,
            interface,
            retarget(exact, row_format="f32", index_format="f32", page_size=VERIFICATION_PAGE_SIZE),
            written,
            base_dir=self.written.folder,
            original_dir=self.original.folder,
            judged=self.judged,
            seed=seed,
            ops=not variants <= self._seen,
        )
        self._seen |= variants
        return report

    def _cut_original(
        self, parts: tuple[LayerPart, ...], start: Start, results: dict[int, list[str]]
    ) -> tuple[onnx.ModelProto, ModelInterface]:
        caches = {entry.name: entry.output for entry in self.interface.by_role(roles.CACHE) if entry.output is not None}
        outputs: dict[str, Output] = {}
        for part in parts:
            found = [way_out for way_out in part.exits if self._cutter.has(way_out.name)]
            if not found:
                raise CannotCutError("the attention's result is no tensor of the export's file")
            if len({way_out.order for way_out in part.exits}) > 1:
                raise CannotCutError("the attention's result leaves in several layouts")
            # All of them hold the same values, of which the lowered model may use more forms or fewer.
            for count, result in enumerate(results[part.layer]):
                way_out = found[min(count, len(found) - 1)]
                outputs[result] = Output(way_out.name, way_out.width, way_out.order)
        taken = self._cutter.take([output.tensor for output in outputs.values()], start, grown=caches)
        entries = [entry for entry in self.interface.inputs if entry.name in taken.inputs]
        model = self._cutter.build(taken, start, outputs, _next_values(entries))
        load_from_elsewhere(model, self.original, self.original.folder)
        tokens = ModelInput(start.name, roles.TOKENS, start.dtype, (*start.leading, start.features))
        return model, ModelInterface((tokens, *entries), tuple(outputs), self.interface.fixed)

    def _start(self, parts: tuple[LayerPart, ...]) -> Start:
        begun = []
        for part in parts:
            found = next(
                (
                    boundary
                    for boundary in part.beginnings
                    if self._cutter.has(boundary.name)
                    and self._written.has(boundary.name)
                    and self._exact.has(boundary.name)
                ),
                None,
            )
            if found is None:
                raise CannotCutError("no tensor that both models have is all that it depends on")
            begun.append(found)
        axes = self.interface.tokens.axes
        leading = ("B", "S") if "B" in axes else ("S",)
        (first, *_) = begun
        tensors = tuple({boundary.name: boundary.axes for boundary in begun}.items())
        plain = len(tensors) == 1 and first.axes[:-1] == leading
        return Start(first.name if plain else self._free(INPUT), first.dtype, tensors, leading)

    def _free(self, wish: str) -> str:
        """A name that none of the models has."""
        while any(model.has(wish) for model in (self._cutter, self._written, self._exact)):
            wish = f"{PREFIX}{wish}"
        return wish


class _LoweredCutter:
    """A lowered model from which layers are cut. Weights that are in another folder than `folder` are read."""

    def __init__(self, model: ModelOnDisk, plan: LayerPlan, folder: Path | None) -> None:
        self.model = model
        self.folder = folder
        self.metadata = LoweredMetadata.of(model.proto)
        caches = [cache.name for cache in self.metadata.caches]
        self._cutter = Cutter(model.proto, axes=plan.axes, tokens=self.metadata.token_input, caches=caches)
        self._readers = self._cutter.consumers()
        self._results = {value.name for value in model.proto.graph.output}
        self._attentions = {
            OPS[node.op_type].given_inputs(node)["kv_cache"]: node
            for node in model.proto.graph.node
            if node.domain == DOMAIN and node.op_type in (DENSE, SPARSE)
        }

    def has(self, name: str) -> bool:
        """Whether the model makes, takes or holds a tensor."""
        return self._cutter.has(name)

    def cut(
        self, layers: Mapping[int, tuple[int, ...]], start: Start, results: Mapping[int, list[str]]
    ) -> onnx.ModelProto:
        """The lowered layers as a lowered model.

        Args:
            layers: their numbers, with the order of the axes of their results.
            start: where they begin.
            results: names for the results of each, in all forms in which they leave.

        Raises:
            CannotCutError: they depend on other layers otherwise than through the start.
        """
        own = {cache.name: cache.output for cache in self.metadata.caches if cache.layer in layers}
        outputs: dict[str, Output] = {}
        for layer, order in layers.items():
            attributes = OPS[self._attention(layer).op_type].node_attributes(self._attention(layer))
            width = attributes.integer("num_heads") * attributes.integer("v_head_dim")
            for result, name in zip(results[layer], self.exits(layer), strict=True):
                outputs[result] = Output(name, width, order)
        part = self._cutter.take([output.tensor for output in outputs.values()], start, grown=own)
        foreign = sorted(part.inputs & {cache.name for cache in self.metadata.caches} - own.keys())
        if foreign:
            raise CannotCutError(f"the lowered layer reads '{foreign[0]}', the cache of another one")
        model = self._cutter.build(part, start, outputs, own.values())
        self._describe(model, layers, start, part.inputs)
        load_from_elsewhere(model, self.model, self.folder)
        return model

    def cut_between(self, start: Start, outputs: Mapping[str, Output], *, results: bool) -> onnx.ModelProto:
        """What lies between two layers as a lowered model without caches.

        Args:
            start: where it begins.
            outputs: the results by name.
            results: whether these are the model's own.
        """
        states = {
            entry.name: entry.output
            for entry in self.metadata.side_inputs
            if entry.role == roles.STATE and entry.output
        }
        part = self._cutter.take([output.tensor for output in outputs.values()], start, grown=states)
        if part.inputs & {cache.name for cache in self.metadata.caches}:
            raise CannotCutError("it reads a cache")
        kept = [output for name, output in states.items() if name in part.inputs]
        # Sessions give these to every model.
        part.inputs |= {"query_offsets", "cache_lengths", "block_table"}
        model = self._cutter.build(part, start, outputs, kept)
        self._describe(model, (), start, part.inputs)
        if results:
            set_facts(model, logits=self.metadata.logits)
        load_from_elsewhere(model, self.model, self.folder)
        return model

    def _attention(self, layer: int) -> onnx.NodeProto:
        name = next((cache.name for cache in self.metadata.caches if (cache.layer, cache.kind) == (layer, "kv")), "")
        if name not in self._attentions:
            raise CannotCutError(f"the lowered model has no attention over a cache of layer {layer}")
        return self._attentions[name]

    def exits(self, layer: int) -> list[str]:
        """The tensors in which a layer's result leaves: behind all that only moves it."""
        found = []
        waiting = [self._attention(layer).output[0]]
        while waiting:
            name = waiting.pop(0)
            readers = [node for node in self._readers.get(name, []) if node.op_type not in SIZE_OPS]
            moving = [node for node in readers if node.op_type in MOVES and not node.domain and node.input[0] == name]
            if len(moving) < len(readers) or name in self._results:
                found.append(name)
            waiting += [node.output[0] for node in moving]
        if not found:
            raise CannotCutError("nothing in the lowered model uses the layer's result")
        return found

    def _describe(self, model: onnx.ModelProto, layers: Collection[int], start: Start, inputs: set[str]) -> None:
        """Gives a part the metadata of a lowered model."""
        (text,) = (entry.value for entry in self.model.proto.metadata_props if entry.key == METADATA_KEY)
        facts = json.loads(text)
        entry = model.metadata_props.add()
        entry.key, entry.value = METADATA_KEY, text
        axes = self.metadata.token_axes
        set_facts(
            model,
            token_input=start.name,
            token_axes=facts["token_axes"] if start.name == self.metadata.token_input else list(axes),
            logits="all",
            vocabulary=None,
            caches=[cache for cache in facts["caches"] if cache["layer"] in layers],
            layers=[layer for layer in facts.get("layers", []) if layer.get("index") in layers],
            side_inputs=[side for side in facts.get("side_inputs", []) if side["name"] in inputs],
        )


def _next_values(entries: Iterable[ModelInput]) -> list[str]:
    """The outputs that hold the next values of caches and states."""
    return [entry.output for entry in entries if entry.output and entry.role in (roles.CACHE, roles.STATE)]


def _failed(reason: str, judged: bool) -> VerificationReport:
    return VerificationReport(judged, math.nan, (), (), None, (), (reason,), LAYERS)


def _joined(
    reports: list[tuple[str, VerificationReport]], left_out: Mapping[str, str], judged: bool
) -> VerificationReport:
    """One report of all layers.

    Args:
        reports: of each part, with its name.
        left_out: parts that were not run, and why.
        judged: as for `verify`.
    """
    overlaps = [report.selection_overlap for _, report in reports if report.selection_overlap is not None]
    notes = [f"not run: what is {label}: {reason}" for label, reason in left_out.items()]
    notes += [note for _, report in reports for note in report.notes]
    return VerificationReport(
        judged,
        max((report.tolerance for _, report in reports if not math.isnan(report.tolerance)), default=math.nan),
        tuple(replace(case, name=f"{label}: {case.name}") for label, report in reports for case in report.cases),
        tuple(result for _, report in reports for result in report.ops),
        float(np.mean(overlaps)) if overlaps else None,
        tuple(dict.fromkeys(notes)),
        tuple(f"{label}: {failure}" for label, report in reports for failure in report.failures),
        LAYERS,
    )
