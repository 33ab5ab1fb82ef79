"""The driver: an export in, a lowered model and a report out. The passes run in the order in which they stand in `lower`."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from mla_trt import __version__
from mla_trt import interface as roles
from mla_trt.errors import BadModelError, NoMlaError, UsageError
from mla_trt.formats import INDEX_FORMATS, ROW_FORMATS
from mla_trt.inspection import Inspection
from mla_trt.interface import ModelInterface
from mla_trt.layer_plan import LayerPlan, plan_layers
from mla_trt.ops import attach_functions
from mla_trt.passes import pack
from mla_trt.passes.attention_core import AttentionCore, NoMatch, find_softmaxes, read_core, unknown_op_near
from mla_trt.passes.dynamic_quantization import undo_dynamic_quantization
from mla_trt.passes.free_rows import FEW_ROWS, free_rows
from mla_trt.passes.full_caches import check_full_caches, find_full_caches, with_lengths
from mla_trt.passes.graph import OPSET, Emitter, Names, topological
from mla_trt.passes.identify_inputs import data_dependent, identify_inputs, static_size
from mla_trt.passes.inline_branches import inline_branches
from mla_trt.passes.legalize import IllegalNode, illegal_nodes, legalize
from mla_trt.passes.lower import CacheFormat, Lowerer, token_layout
from mla_trt.passes.match_indexer import SelectsAllKeys, match_indexer
from mla_trt.passes.match_latent import NormOverCache
from mla_trt.passes.match_mla import MlaMatch, match_mla
from mla_trt.passes.match_outputs import cache_outputs
from mla_trt.passes.positions import BY_SEQUENCE, PACKED, UNPACKED
from mla_trt.passes.probe import Linear, Probe, ProbeError, case_sizes
from mla_trt.passes.simplify import simplify
from mla_trt.passes.standardize import forbid_rounded_activations, standardize
from mla_trt.passes.static_quantization import put_back_roundings, take_out_roundings
from mla_trt.report import LayerReport, PassReport, Report
from mla_trt.weight_file import WeightFile

log = logging.getLogger(__name__)

TARGETS = ("tensorrt-10.6", "tensorrt-11", "onnx")
IR_VERSION = 10
ROUNDED_ACTIVATIONS = (
    "the export quantises activations, and the lowered model does not round all of them: errors are stated, not judged"
)


@dataclass(frozen=True)
class LowerOptions:
    """What the command's options say.

    Attributes:
        kv_format: row format of the latent cache.
        index_format: row format of the index cache.
        weights: "keep" the export's types of W_UK and W_UV, or "fp8" (e4m3 with 128x128 scales).
        page_size: tokens in a page.
        logits: results of "all" tokens or of each sequence's "last".
        target: parser whose ops the lowered model may use.
        strict: refuse what rests on an assumption.
        kv_scale: static scale of `fp8_flat` rows.
    """

    kv_format: str = "fp8"
    index_format: str = "fp8"
    weights: str = "keep"
    page_size: int = 64
    logits: str = "all"
    target: str = "tensorrt-10.6"
    strict: bool = False
    kv_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("--kv-format", self.kv_format, ROW_FORMATS),
            ("--index-format", self.index_format, INDEX_FORMATS),
            ("--weights", self.weights, ("keep", "fp8")),
            ("--logits", self.logits, ("all", "last")),
            ("--target", self.target, TARGETS),
        ):
            if value not in allowed:
                raise UsageError(f"{name} is '{value}': choose one of {', '.join(allowed)}")
        if self.page_size < 1:
            raise UsageError(f"--page-size is {self.page_size}: it must be at least 1")
        if not self.kv_scale > 0:
            raise UsageError(f"--kv-scale is {self.kv_scale}: it must be positive")


@dataclass
class Lowered:
    """A lowered model, not yet verified.

    Attributes:
        model: with function bodies and metadata.
        interface: roles of the export's inputs.
        quantised_activations: the export rounds activations, which the lowered attention does not repeat.
        plan: where the export's layers begin and end, if that was asked for.
    """

    model: onnx.ModelProto
    interface: ModelInterface
    report: Report
    quantised_activations: bool = False
    plan: LayerPlan | None = None


Progress = Callable[[str], None]


class _Stages:
    """Times the passes and tells about them."""

    def __init__(self, report: Report, progress: Progress) -> None:
        self.report = report
        self.progress = progress

    @contextmanager
    def run(self, name: str) -> Iterator[list[int]]:
        self.progress(name)
        changed = [0]
        start = time.perf_counter()
        yield changed
        entry = PassReport(name, changed[0], time.perf_counter() - start)
        self.report.passes.append(entry)
        log.info("%s: %d changed, %.2f s", name, entry.changed, entry.seconds)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pauses Python's cyclic garbage collector, which would go through all of a graph's objects again and again: they stay to the end."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_collector()
def inspect(
    model: onnx.ModelProto,
    base_dir: Path | None = None,
    progress: Progress = lambda _: None,
    *,
    tie_break: bool = False,
) -> Inspection:
    """Finds the attention layers of an export and says of each whether it is MLA, and if not, why.

    Raises:
        BadModelError: the model cannot be read.
    """
    report = Report()
    stages = _Stages(report, progress)
    with stages.run("standardize") as changed:
        permitted = forbid_rounded_activations(model)
        model = standardize(model, base_dir)
        changed[0] = len(model.graph.node)
    with stages.run("import") as changed:
        graph = gs.import_onnx(model)
        changed[0] = len(graph.nodes)
    with stages.run("take_out_roundings") as changed:
        roundings = take_out_roundings(graph)
        changed[0] = len(roundings)
    with stages.run("simplify") as changed:
        topological(graph.nodes)
        changed[0] = simplify(graph)
    with stages.run("undo_dynamic_quantization") as changed:
        changed[0] = undone = undo_dynamic_quantization(graph, base_dir)
    with stages.run("identify_inputs") as changed:
        interface = find_full_caches(graph, identify_inputs(graph), base_dir)
        changed[0] = len(interface.inputs)
    with stages.run("inline_branches") as changed:
        data = _data(graph, interface)
        if any(node.op == "If" for node in graph.nodes):
            changed[0] = inline_branches(graph, make_probes(graph, interface, data, base_dir))
            simplify(graph)
            data = _data(graph, interface)
    with stages.run("match") as changed:
        cores = find_softmaxes(graph, data)
        first: tuple[Inspection, list[LayerReport]] | None = None
        for reading, all_rows in _readings(graph, interface):
            report.layers.clear()
            probes = make_probes(graph, reading, data, base_dir, all_rows=all_rows)
            found = _match_all(graph, reading, probes, cores, report)
            if all(found.matches):
                break
            first = first or (found, list(report.layers))
        else:
            assert first is not None
            found, report.layers[:] = first
        changed[0] = report.matched
        _drop_cache_outputs(found)
    for entry in interface.by_role(roles.SCORE_MASK):
        report.assumptions.append(
            f"the input '{entry.name}' is added to the scores: it is assumed to be the causal mask"
        )
    for entry in (*interface.by_role(roles.TOKEN_INDEX), *interface.by_role(roles.TOKEN_COUNT)):
        report.notes.append(f"the input '{entry.name}' chooses tokens: the lowered model gives results of all")
    if permitted:
        report.notes.append(
            f"{permitted} MatMulNBits of the export let ONNX Runtime round activations to int8 (accuracy_level 4), which the lowered model does not: "
            "it is compared with the export without that rounding"
        )
    found.roundings = roundings
    if undone or roundings or rounds_activations(found):
        report.assumptions.append(ROUNDED_ACTIVATIONS)
    return found


def _drop_cache_outputs(found: Inspection) -> None:
    """Takes outputs that are cache rows out of the results: the lowered model keeps such rows in its pages."""
    dropped = [name for name in found.interface.results if name in found.cache_outputs]
    if not dropped or len(dropped) == len(found.interface.results):
        return
    results = tuple(name for name in found.interface.results if name not in found.cache_outputs)
    found.interface = replace(found.interface, results=results)
    for probe in found.probes:
        probe.interface = found.interface
    found.report.notes.append(
        f"the outputs {', '.join(dropped)} hold what the attention caches: the lowered model keeps it in its pages"
    )


def rounds_activations(found: Inspection) -> bool:
    """Whether the graph quantises data as it flows, not only weights."""
    data = found.probes[0].data
    return any(
        node.op in ("QuantizeLinear", "DynamicQuantizeLinear") and id(node.inputs[0]) in data
        for node in found.graph.nodes
    )


def _data(graph: gs.Graph, interface: ModelInterface, *, selections: bool = False) -> set[int]:
    sources = (roles.TOKENS, roles.SECOND_TOKENS, roles.CACHE, roles.STATE)
    tensors = [tensor for tensor, entry in zip(graph.inputs, interface.inputs, strict=False) if entry.role in sources]
    return data_dependent(graph, tensors, selections=selections)


def make_probes(
    graph: gs.Graph, interface: ModelInterface, data: set[int], base_dir: Path | None, *, all_rows: bool = False
) -> list[Probe]:
    """Two cases of different sizes, none of which equals another size by accident more often than must be.

    Args:
        all_rows: full-length caches have as many rows as the export says; otherwise only as many as the cases need.
    """
    cached = bool(interface.by_role(roles.CACHE))
    exported, rows = interface, interface.fixed.get("L", 0)
    if rows > FEW_ROWS and not all_rows:
        fixed = {letter: size for letter, size in interface.fixed.items() if letter != "L"}
        interface = replace(interface, fixed=fixed)
    cases = ((2, 3, 5), (3, 2, 9)) if cached else ((2, 6, 0), (3, 5, 0))
    first, second = (case_sizes(interface, *case) for case in cases)
    if interface.has_full_caches and second.cached == first.cached > 1:
        second = replace(second, cached=second.cached - 1)  # in a short cache
    return [
        Probe(
            graph,
            interface,
            data,
            sizes,
            base_dir,
            free_rows(graph, rows, sizes.rows, base_dir) if interface is not exported else {},
            exported,
        )
        for sizes in (first, second)
    ]


def _readings(graph: gs.Graph, interface: ModelInterface) -> Iterator[tuple[ModelInterface, bool]]:
    """What an export's inputs may be, and whether its caches are read with all their rows: the first that makes sense of all cores is right."""
    yield interface, False
    if (other := with_lengths(graph, interface)) is not None:
        yield other, False
    if interface.fixed.get("L", 0) > FEW_ROWS:
        yield interface, True


def _match_all(
    graph: gs.Graph, interface: ModelInterface, probes: list[Probe], cores: list[gs.Node], report: Report
) -> Inspection:
    found = Inspection(graph, interface, probes, [], {}, report)
    fault = _fault_of_caches(probes)
    for node in cores:
        _match(found, node, fault)
    return found


def _fault_of_caches(probes: list[Probe]) -> NoMatch | ProbeError | None:
    """Why full-length caches are not what the cores may read; None where they are, or where there are none."""
    if not probes[0].interface.has_full_caches:
        return None
    for probe in probes:
        try:
            check_full_caches(probe)
        except NoMatch as error:
            return error
        except ProbeError as error:
            if probe is probes[0]:  # not every export takes other sizes
                return error
    return None


def _match(found: Inspection, node: gs.Node, fault: NoMatch | ProbeError | None) -> None:
    """Matches one core, unless the caches have a fault, and adds its line to the report."""
    probe = found.probes[0]
    index = len(found.matches)
    label = node.name or node.outputs[0].name
    try:
        if fault is not None:
            raise fault
        match: MlaMatch | None
        match, core = _read(probe, node)
        top_k = None
        index_keys: tuple[Linear, ...] = ()
        if match.selection is not None:
            try:
                if id(match.selection) not in found.indexers:
                    found.indexers[id(match.selection)] = match_indexer(probe, match.selection)
                    index_keys = found.indexers[id(match.selection)].key_rows
                top_k = found.indexers[id(match.selection)].top_k
            except SelectsAllKeys:
                log.warning(
                    "attention core %d (%s) selects all keys, as it was traced: it is lowered as dense", index, label
                )
                match = replace(match, selection=None)
        found.report.layers.append(
            LayerReport(
                index,
                True,
                None,
                label,
                "mla" if match.selection is None else "mla_sparse",
                match.cache,
                match.num_heads,
                match.qk_nope_head_dim,
                match.qk_rope_head_dim,
                match.v_head_dim,
                match.kv_lora_rank,
                match.q_lora_rank,
                match.scale,
                match.sinks is not None,
                match.absorbed,
                top_k,
            )
        )
        if not probe.interface.by_role(roles.CACHE):
            found.cache_outputs.update(cache_outputs(probe, core, index_keys))
    except (NoMatch, ProbeError) as error:
        unknown = unknown_op_near(probe, node)
        if unknown is not None:
            operator = f"{unknown.domain}::{unknown.op}"
            raise BadModelError(
                f"the attention at '{label}' contains node '{unknown.name}' of the unknown op {operator}: "
                "export without it, or as a model function"
            ) from None
        match = None
        reason = error.reason if isinstance(error, NoMatch) else str(error)
        at = error.at if isinstance(error, NoMatch) else (error.node.name if error.node is not None else None)
        found.report.layers.append(LayerReport(index, False, reason, at or label))
        log.info("attention core %d (%s) is not MLA: %s", index, label, reason)
    found.matches.append(match)
    probe.forget_data()


def _read(probe: Probe, node: gs.Node) -> tuple[MlaMatch, AttentionCore]:
    """Reads a core; where the export norms cached and new latents together, a second time through that norm."""
    core = read_core(probe, node)
    try:
        return match_mla(probe, core), core
    except NormOverCache as found:
        probe.forget_data()
        probe.seen_through[id(found.tensor)] = found.norm.source, found.norm.weight
        core = read_core(probe, node)
        return match_mla(probe, core, found.norm), core


@_without_collector()
def lower(
    model: onnx.ModelProto,
    options: LowerOptions,
    base_dir: Path | None = None,
    progress: Progress = lambda _: None,
    *,
    weight_file: WeightFile | None = None,
    plan: bool = False,
) -> Lowered:
    """Lowers an export.

    Args:
        base_dir: folder of its external data.
        progress: told the name of each pass.
        weight_file: where W_UK and W_UV go; into the model itself where there is none.
        plan: find out where the layers can be cut off, too.

    Raises:
        BadModelError: the model cannot be read.
        NoMlaError: it has no MLA, or cannot be lowered whole.
    """
    if any(node.domain == "mla_trt" for node in model.graph.node):
        raise NoMlaError(
            "the model has been lowered already: give its folder to 'mla-trt run' or 'mla-trt build', or lower the export anew"
        )
    shaped = {node.input[0] for node in model.graph.node if node.op_type in ("Shape", "Size") and plan}
    found = inspect(model, base_dir, progress)
    report, graph, probe = found.report, found.graph, found.probes[0]
    stages = _Stages(report, progress)
    check_lowerable(found, options)
    layer_plan = plan_layers(found, shaped) if plan else None
    with stages.run("lower") as changed:
        # Around the attention what a TopK picks (experts) is data like any other.
        surroundings = Probe(
            graph, found.interface, _data(graph, found.interface, selections=True), probe.sizes, base_dir
        )
        emitter = Emitter(graph, Names(graph))
        tokens = next(tensor for tensor in graph.inputs if tensor.name == found.interface.tokens.name)
        cache_format = CacheFormat(options.kv_format, options.index_format, options.page_size, options.kv_scale)
        results = [tensor for tensor in graph.outputs if tensor.name in found.interface.results]
        pack.check_results(results, found.probes)
        lowerer = Lowerer(
            emitter, found.probes, tokens, cache_format, fp8_weights=options.weights == "fp8", weight_file=weight_file
        )
        for layer, match in enumerate(found.matches):
            if match is not None:
                try:
                    lowerer.lower(layer, match, found.indexers.get(id(match.selection)))
                except NoMatch as error:
                    raise NoMlaError(f"attention core {layer} cannot be lowered: {error.reason}") from None
                changed[0] += 1
    with stages.run("pack") as changed:
        stays = frozenset(
            {roles.TOKENS, roles.STATE, roles.ROPE_COS, roles.ROPE_SIN}
            | ({roles.ATTENTION_MASK} if lowerer.layout == UNPACKED else set())
        )
        changed[0] += pack.keep_all_tokens(graph, surroundings, emitter)
        changed[0] += pack.free_fixed_shapes(graph, surroundings, emitter, lowerer.layout)
        if options.logits == "last":
            pack.keep_last_tokens(graph, surroundings, emitter, lowerer.query_offsets, results)
        lowerer.finish()
        pack.drop_old_caches(graph, surroundings, found.cache_outputs - set(found.interface.results))
        changed[0] += pack.rebuild_side_tensors(graph, surroundings, lowerer.packed, stays)
        changed[0] += pack.replace_lost_shapes(graph, surroundings, emitter, tokens, stays)
        pack.drop_inputs(graph, surroundings, stays)
        token_axes = _pack_tokens(tokens, found.interface, lowerer.layout)
    with stages.run("put_back_roundings") as changed:
        changed[0] = put_back_roundings(graph, found.roundings)
        if changed[0] < len(found.roundings):
            report.notes.append(
                f"{len(found.roundings) - changed[0]} of the {len(found.roundings)} places where the export rounds data with a constant scale "
                "(QuantizeLinear and DequantizeLinear) went with its attention, masks and positions: the lowered model does not round there"
            )
    with stages.run("legalize") as changed:
        changed[0] = legalize(graph, options.target, base_dir, weight_file, report.notes)
        report.notes.extend(_refusal_notes(illegal_nodes(graph, options.target), options.target))
    with stages.run("export") as changed:
        lowered = _export(graph, lowerer, found, options, token_axes)
        changed[0] = len(lowered.graph.node)
    return Lowered(lowered, found.interface, report, ROUNDED_ACTIVATIONS in report.assumptions, layer_plan)


def _refusal_notes(nodes: list[IllegalNode], target: str) -> list[str]:
    """One sentence for each op and reason: what is wrong in one expert is wrong in all."""
    groups: dict[tuple[str, str], list[str]] = {}
    for node in nodes:
        groups.setdefault((node.op, node.reason), []).append(node.name)
    return [
        f"node '{names[0]}' ({op}){f' and {len(names) - 1} more like it' if len(names) > 1 else ''} may be refused by {target}: {reason}"
        for (op, reason), names in groups.items()
    ]


def _check_recurrent_sizes(interface: ModelInterface) -> None:
    """Recurrent layers stay as they were exported: for one sequence, or one token of each, but not for other fixed numbers."""
    most = {"B": (1, "sequences"), "S": (1, "new tokens"), "P": (0, "cached tokens")}
    fixed = [
        f"{size} {most[axis][1]}" for axis, size in interface.fixed.items() if axis in most and size > most[axis][0]
    ]
    if fixed and token_layout(interface) == UNPACKED:
        raise NoMlaError(
            f"the model has recurrent layers and was exported for exactly {', '.join(fixed)}: export it with free numbers of them, "
            "or for one sequence, or one new token"
        )


def check_lowerable(found: Inspection, options: LowerOptions) -> None:
    """Raises NoMlaError where nothing can be lowered, or only a part of what must be lowered whole."""
    report = found.report
    if not report.layers:
        raise NoMlaError("no attention was found in the model: nothing to lower")
    refused = [layer for layer in report.layers if not layer.matched]
    if refused:
        first = refused[0]
        which = (
            "no attention core is MLA"
            if not report.matched
            else f"{len(refused)} of {len(report.layers)} attention cores are not MLA, and the cache changes shape in all or none"
        )
        raise NoMlaError(f"{which}; core {first.index} (at '{first.at}'): {first.reason}")
    for entry in found.interface.by_role(roles.SECOND_TOKENS):
        raise NoMlaError(
            f"the input '{entry.name}' is looked up in a table of embeddings beside '{found.interface.tokens.name}', as the following tokens of "
            "an MTP head are: a lowered model has one token input, so export the model without that head"
        )
    pack.check_mixed_tokens(found.graph, found.probes[0])
    _check_recurrent_sizes(found.interface)
    if options.strict and report.assumptions:
        raise NoMlaError(f"--strict: {report.assumptions[0]}")


def _pack_tokens(tokens: gs.Tensor, interface: ModelInterface, layout: str) -> list[int | str]:
    packed: dict[str, dict[str, int | str]] = {
        PACKED: {"B": 1, "S": "T"},
        BY_SEQUENCE: {"B": "T", "S": 1},
        UNPACKED: {axis: size for axis, size in interface.fixed.items() if axis in ("B", "S")},
    }
    letters = packed[layout]
    axes = [letters.get(axis, axis) if isinstance(axis, str) else axis for axis in interface.tokens.axes]
    tokens.shape = axes
    return axes


def _export(
    graph: gs.Graph, lowerer: Lowerer, found: Inspection, options: LowerOptions, token_axes: list[int | str]
) -> onnx.ModelProto:
    results = {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        for tensor in node.outputs:
            if id(tensor) not in results:
                tensor.shape = None
    for tensor in graph.outputs:
        if tensor.name in found.interface.results:
            tensor.shape = _result_shape(tensor.shape, token_axes, "B" if options.logits == "last" else "T")
    graph.nodes[:] = topological(graph.nodes)
    staying = {tensor.name for tensor in graph.inputs}
    lowerer.claim_names()
    graph.opset = OPSET
    graph.import_domains = [helper.make_opsetid("", OPSET), helper.make_opsetid("mla_trt", 1)] + [
        entry for entry in (graph.import_domains or []) if entry.domain not in ("", "ai.onnx", "mla_trt")
    ]
    model = gs.export_onnx(graph, do_type_check=False)
    model.ir_version = max(model.ir_version, IR_VERSION)
    model.producer_name, model.producer_version = "mla-trt", __version__
    metadata = {
        "version": 1,
        "token_input": found.interface.tokens.name,
        "token_axes": [str(axis) for axis in token_axes],
        "logits": options.logits,
        "page_size": options.page_size,
        "max_pages": None,
        "row_format": options.kv_format,
        "index_format": options.index_format,
        "max_position": _max_position(lowerer.packed.max_position, found),
        "target": options.target,
        "vocabulary": None,
        "caches": [
            {"name": cache.name, "layer": cache.layer, "kind": cache.kind, "page_words": cache.page_words}
            for cache in lowerer.caches
        ],
        "layers": [layer.to_json() for layer in found.report.layers],
        "side_inputs": [
            {
                "name": entry.name,
                "role": entry.role,
                "dtype": entry.dtype,
                "axes": list(entry.axes),
                "output": entry.output,
            }
            for entry in found.interface.inputs
            if entry.name in staying and entry.role != roles.TOKENS
        ],
    }
    found.report.model = {
        key: metadata[key]
        for key in (
            "token_input",
            "token_axes",
            "page_size",
            "row_format",
            "index_format",
            "max_position",
            "target",
            "logits",
        )
    }
    entry = model.metadata_props.add()
    entry.key, entry.value = "mla_trt", json.dumps(metadata)
    attach_functions(model)
    return model


def _max_position(table: int | None, found: Inspection) -> int | None:
    """Positions that the export has: those of its shortest table, and those that its full-length caches have rows for."""
    rows = found.interface.fixed.get("L")
    if rows is None or (table is not None and table <= rows):
        return table
    found.report.notes.append(
        f"the export's caches hold {rows} tokens, which bounds the lowered model too (max_position): export it with longer caches for more"
    )
    return rows


def _result_shape(exported: list[int | str] | None, token_axes: list[int | str], tokens: str) -> list[int | str] | None:
    """Shape of a result for packed tokens: [1, T, features] or, where the export had no axis for them, [T, features]."""
    if exported is None or len(exported) not in (2, 3) or static_size(exported[-1]) is None:
        return None
    leading = token_axes[:2] if len(exported) == 3 else ["T"]
    return [tokens if axis == "T" else axis for axis in leading] + [static_size(exported[-1]) or 0]
