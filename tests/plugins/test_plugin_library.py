"""The TensorRT plugins against the op set, for each set of TensorRT's headers, without TensorRT and without a GPU."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from libraries import Probe
from onnx import TensorProto

import mla_trt
from mla_trt.formats import IndexLayout, KvLayout
from mla_trt.ops import OPS, TensorType, infer_shapes, make_node
from mla_trt.ops.schema import ANY, E4M3, F32, I32, TABLE, WEIGHT, Dimensions, F, Input, Op
from mla_trt.plugins import library
from mla_trt.plugins.library import Library
from mla_trt.plugins.toolchain import find_tensorrt_headers

# nvinfer1::DataType of each element type, and nvinfer1::PluginFieldType of each kind of attribute
TRT_TYPES = {
    TensorProto.FLOAT: 0,
    TensorProto.FLOAT16: 1,
    TensorProto.INT32: 3,
    TensorProto.FLOAT8E4M3FN: 6,
    TensorProto.BFLOAT16: 7,
    TensorProto.INT64: 8,
}
FIELD_TYPES: dict[type, int] = {int: 5, float: 1, str: 6}
ALL_TYPES = [0, 1, 2, 3, 6, 7, 8]
TYPES_OF_KINDS = {F: [0, 1, 7], F32: [0], TABLE: [0, 1, 7], I32: [3], WEIGHT: [0, 1, 6, 7], E4M3: [6], ANY: ALL_TYPES}
ALIASES = {"kv_cache_out": "kv_cache", "indexer_cache_out": "indexer_cache"}

OTHER_FIELDS = [["rows", 6, None], ["batched", 6, None], ["resident", 6, None], ["resident_pages", 5, None]]

ATTRIBUTES: dict[str, int | float | str] = {
    "num_partitions": 24,
    "page_size": 16,
    "kv_lora_rank": 160,
    "qk_rope_head_dim": 18,
    "row_format": "fp8_ds_mla",
    "kv_scale": 0.5,
    "epsilon": 1e-5,
    "rope_interleaved": 0,
    "softmax_scale": 0.0721,
    "query_terms": 1,
    "index_head_dim": 64,
    "index_rope_dim": 10,
    "index_rope_interleaved": 1,
    "index_norm_epsilon": 1e-4,
    "index_hadamard": 1,
    "index_format": "f32",
    "index_scale_ue8m0": 1,
    "top_k": 48,
    "num_heads": 6,
    "qk_nope_head_dim": 136,
    "v_head_dim": 40,
}
LETTERS: dict[str, int] = {
    "T": 11,
    "B": 3,
    "H": 6,
    "R": 160,
    "Dr": 18,
    "Dn": 136,
    "Dv": 40,
    "K": 48,
    "N": 77,
    "P": 16,
    "Hi": 5,
    "Di": 64,
    "Dri": 10,
    "C": 12,
    "Q": 12,  # C, where there is no w_dq
    "M": 14,
    "index_N": 78,
    "copies": 2,
    "max_pages": 9,
    "pages": 30,
    "page_words": KvLayout(16, "fp8_ds_mla", 160, 18).page_words,
    "index_pages": 31,
    "index_page_words": IndexLayout(16, "f32", 64).page_words,
    "units": 25,
}


@dataclass(frozen=True)
class Case:
    """A node with some of its op's inputs and outputs, all floats of one type."""

    op: Op
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    float_type: int = TensorProto.BFLOAT16
    weight_type: int = TensorProto.BFLOAT16
    named: bool = True
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    resident: tuple[str, ...] = ()

    @property
    def attributes(self) -> dict[str, int | float | str]:
        return {attribute.name: ATTRIBUTES[attribute.name] for attribute in self.op.attributes}

    def input_type(self, formal: Input) -> TensorType:
        """The tensor of a formal input."""
        kinds = {F: self.float_type, F32: TensorProto.FLOAT, TABLE: TensorProto.FLOAT, I32: TensorProto.INT32}
        kinds[WEIGHT] = self.weight_type
        kinds |= {E4M3: TensorProto.FLOAT8E4M3FN, ANY: TensorProto.INT64}
        dims = Dimensions("case")
        for letter, size in LETTERS.items():
            dims.bind(letter, size, "case")
        words = ["1", "T"] if formal.shape is None else formal.shape.split()
        shape = self.shapes.get(formal.name, tuple(dims.evaluate(word) for word in words))
        return TensorType(kinds[formal.kind], shape)

    def _all_inputs(self) -> list[str]:
        """Those that the op has, resident pools among them."""
        return [formal.name for formal in self.op.inputs if formal.name in (*self.inputs, *self.resident)]

    def input_types(self) -> list[TensorType | None]:
        """One for each formal input, None for those that are absent."""
        given = self._all_inputs()
        return [self.input_type(formal) if formal.name in given else None for formal in self.op.inputs]

    def expected(self) -> list[TensorType]:
        """Types of the outputs that are given, as the op set infers them."""
        node = make_node(
            self.op.name,
            {name: name for name in self._all_inputs()},
            {formal.name: f"{formal.name}_" for formal in self.op.outputs},
            **self.attributes,
        )
        inferred = infer_shapes(node, self.input_types()[: len(node.input)])
        return [inferred[[o.name for o in self.op.outputs].index(name)] for name in self.outputs]

    def text(self) -> str:
        """The node as the probe reads it."""
        lines = [f"op {self.op.name}"]
        kinds: dict[type, str] = {int: "int", float: "float", str: "text"}
        for attribute in self.op.attributes:
            lines.append(f"{kinds[attribute.kind]} {attribute.name} {self.attributes[attribute.name]}")
        if self.named:
            lines.append(f"text inputs {' '.join(self.inputs)}")
            lines.append(f"text outputs {' '.join(self.outputs)}")
        if self.resident:
            lines += [f"text resident {' '.join(self.resident)}", f"int resident_pages {LETTERS['pages']}"]
        for formal in self.op.inputs:
            if formal.name in self.inputs:
                tensor = self.input_type(formal)
                lines.append(" ".join(map(str, ("input", TRT_TYPES[tensor.dtype], *tensor.shape))))
        return "\n".join(lines) + "\n"


def _of(op: str) -> Case:
    """An op with all of its inputs. Those of projections have scales of codes alone."""
    everything = tuple(i.name for i in OPS[op].inputs)
    of_codes = op in ("MlaInputProjections", "MlaOutputProjection")
    weight = TensorProto.FLOAT8E4M3FN if of_codes else TensorProto.BFLOAT16
    return Case(OPS[op], everything, tuple(o.name for o in OPS[op].outputs), weight_type=weight)


def _cases() -> Iterator[Any]:
    """Each op with all its inputs, with only those that it needs, and some between."""
    indexer = [i.name for i in OPS["MlaSparseAttention"].inputs if i.name.startswith("index")]
    for op in OPS.values():
        everything = tuple(i.name for i in op.inputs)
        needed = tuple(i.name for i in op.inputs if not i.optional)
        outputs = tuple(o.name for o in op.outputs)
        needed_outputs = tuple(o.name for o in op.outputs if not o.optional)
        if op.name == "MlaSparseAttention":
            # with an indexer, and with another layer's selection
            own = tuple(name for name in everything if name != "indices")
            taken = tuple(name for name in everything if name not in indexer or name == "indices")
            yield pytest.param(Case(op, own, outputs), id=f"{op.name}-indexer")
            yield pytest.param(Case(op, own, ("output", "kv_cache_out", "indexer_cache_out")), id=f"{op.name}-no-list")
            yield pytest.param(Case(op, taken, ("output", "kv_cache_out")), id=f"{op.name}-taken")
            yield pytest.param(Case(op, taken, ("output", "kv_cache_out", "indices")), id=f"{op.name}-passed-on")
            yield pytest.param(_resident(Case(op, own, outputs)), id=f"{op.name}-resident")
            yield pytest.param(_resident(Case(op, taken, ("output", "kv_cache_out"))), id=f"{op.name}-taken-resident")
            continue
        if op.name == "MlaAttention":
            needed += ("w_uk", "w_uv")
            needed = tuple(name for name in everything if name in needed)
        yield pytest.param(_of(op.name), id=f"{op.name}-all")
        yield pytest.param(Case(op, needed, needed_outputs), id=f"{op.name}-needed")
        if op.name in ("MlaAttention", "MlaDecodeBranchFp8"):
            yield pytest.param(_resident(Case(op, everything, outputs)), id=f"{op.name}-resident")
        yield pytest.param(replace(_of(op.name), named=False), id=f"{op.name}-unnamed")
        for dtype in (TensorProto.FLOAT, TensorProto.FLOAT16):
            case = Case(op, everything, outputs, dtype, TensorProto.FLOAT8E4M3FN)
            yield pytest.param(case, id=f"{op.name}-{TensorProto.DataType.Name(dtype)}")


# Inputs with other axes than the op's and the same numbers, and outputs with an axis of 1 before the others.
OTHER_AXES = {
    "MlaPlan": ({"tokens": (1, LETTERS["T"], 7)}, "token_sequence"),
    "MlaInputProjections": ({"hidden": (1, LETTERS["T"], LETTERS["C"])}, "query latent"),
    "MlaOutputProjection": ({}, "hidden"),
    "MlaFusedRopeRmsNormQuantization": ({"cos": (7, 11, 9), "sin": (77, 1, 20), "latent": (1, LETTERS["T"], 160)}, ""),
    "MlaIndexer": ({"index_cos": (2, 39, 5), "index_sin": (78, 5), "index_key": (LETTERS["T"], 1, 64)}, "indices"),
}


def _resident(case: Case) -> Case:
    """The node with its pools in the plugin."""
    held = tuple(name for name in ALIASES.values() if name in case.inputs)
    return replace(
        case,
        inputs=tuple(name for name in case.inputs if name not in held),
        outputs=tuple(name for name in case.outputs if ALIASES.get(name) not in held),
        resident=held,
    )


CASES = list(_cases())


def test_compiles_without_warnings(plugin_build: tuple[Library, list[str]]):
    assert plugin_build[1] == []


def test_library_says_what_it_was_built_from_and_for(plugin_library: Library, tensorrt_headers: Path):
    assert plugin_library.version == mla_trt.__version__
    assert plugin_library.architectures == ("sm_80", "sm_90a")
    assert plugin_library.tensorrt == find_tensorrt_headers(tensorrt_headers).version[0]
    assert library.find_library(plugin_library.path) == plugin_library


def test_library_exports_its_interfaces_and_nothing_else(plugin_library: Library):
    exported = _symbols(plugin_library.path, "--defined-only")
    assert exported == {
        "getCreators",
        "setLoggerFinder",
        "mla_build",
        "mla_enqueue",
        "mla_index_page_words",
        "mla_kv_page_words",
        "mla_last_error",
        "mla_workspace_bytes",
    }


def test_library_needs_only_libnvinfer_and_the_system(plugin_library: Library):
    dynamic = subprocess.run(
        ["readelf", "--dynamic", "--wide", plugin_library.path], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    nvinfer = f"libnvinfer.so.{plugin_library.tensorrt}"
    assert nvinfer in needed
    system = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libdl.so.2", "librt.so.1"}
    assert needed - {nvinfer} <= system | {"libpthread.so.0", "ld-linux-x86-64.so.2"}
    unversioned = {name for name in _symbols(plugin_library.path, "--undefined-only") if "@" not in name}
    assert unversioned - {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"} == {
        "getPluginRegistry",
        "getLogger",
    }


def _symbols(path: Path, which: str) -> set[str]:
    listed = subprocess.run(["nm", "--dynamic", which, path], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in listed.splitlines()}


def test_every_op_has_a_creator_with_its_attributes(probe: Probe):
    creators = {creator["name"]: creator for creator in probe.run("creators")}
    assert list(creators) == list(OPS)
    for op in OPS.values():
        creator = creators[op.name]
        assert (creator["version"], creator["namespace"]) == (op.plugin_version, "mla_trt")
        assert creator["interface"] == "PLUGIN CREATOR_V3ONE"
        attributes = [[attribute.name, FIELD_TYPES[attribute.kind], None] for attribute in op.attributes]
        assert creator["fields"] == [*attributes, ["inputs", 6, None], ["outputs", 6, None], *OTHER_FIELDS]


@pytest.mark.parametrize("case", CASES)
def test_plugin_has_the_outputs_of_its_op(probe: Probe, case: Case):
    answer = probe.run("node", text=case.text())
    assert answer["created"], answer
    assert answer["inferred"], answer
    assert answer["outputs"] == [[TRT_TYPES[t.dtype], list(t.shape)] for t in case.expected()]
    assert answer["aliases"] == [case.inputs.index(ALIASES[name]) if name in ALIASES else -1 for name in case.outputs]


@pytest.mark.parametrize("case", CASES)
def test_plugin_takes_the_types_of_its_op(probe: Probe, case: Case):
    answer = probe.run("node", text=case.text())
    inputs = [TYPES_OF_KINDS[formal.kind] for formal in case.op.inputs if formal.name in case.inputs]
    assert answer["formats"] == [*inputs, *([TRT_TYPES[t.dtype]] for t in case.expected())]
    assert answer["takes_only_linear"]


@pytest.mark.parametrize("case", CASES)
def test_plugin_read_from_its_fields_is_the_same(probe: Probe, case: Case):
    answer = probe.run("node", text=case.text())
    expected: dict[str, Any] = {**case.attributes}
    expected |= {"inputs": " ".join(case.inputs), "outputs": " ".join(case.outputs)}
    if case.resident:
        expected |= {"resident": " ".join(case.resident), "resident_pages": LETTERS["pages"]}
    fields = {name: value for name, _, value in answer["fields_of_configured"]}
    for name, value in expected.items():
        assert fields[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name
    assert fields.keys() == expected.keys()
    assert answer["fields_of_read"] == answer["fields_of_configured"]
    assert answer["shape_change"] == 0


@pytest.mark.parametrize("op", OTHER_AXES)
def test_tensors_as_models_have_them(probe: Probe, op: str):
    shapes, batched = OTHER_AXES[op]
    case = _of(op)
    plain = probe.run("node", text=case.text())
    fields = f"text rows {' '.join(shapes)}\n" * bool(shapes) + f"text batched {batched}\n" * bool(batched)
    answer = probe.run("node", text=replace(case, shapes=shapes).text() + fields)
    assert len(answer["messages"]) == len(plain["messages"]) == 1  # of a call that contradicts the op
    wanted = [
        [kind, [1, *sizes] if name in batched.split() else sizes]
        for name, (kind, sizes) in zip(case.outputs, plain["outputs"], strict=True)
    ]
    assert answer["outputs"] == wanted
    assert (answer["configured"], answer["shape_change"]) == (0, 0)
    given = {name: value for name, _, value in answer["fields"]}
    assert (given.get("rows", ""), given.get("batched", "")) == (" ".join(shapes), batched)
    assert answer["fields_of_read"] == answer["fields_of_configured"]
    assert answer["timing_cache_id"] != plain["timing_cache_id"]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("text rows query", "'rows' names 'query', which is no rows but [T H Dn+Dr]"),
        ("text rows key", "'rows' names 'key', which the op does not have"),
        ("text batched latent", "'batched' names 'latent', which the op does not have"),
    ],
)
def test_other_axes_without_sense_are_refused(probe: Probe, field: str, message: str):
    answer = probe.run("node", text=_of("MlaAttention").text() + field + "\n")
    assert not answer["created"]
    assert answer["messages"] == [f"mla_trt: MlaAttention: node 'probed': attribute {message}"]


def test_a_table_may_have_longer_rows_but_no_shorter_ones(probe: Probe):
    longer = probe.run("node", text=replace(_of("MlaFusedRopeRmsNormQuantization"), shapes={"cos": (77, 18)}).text())
    assert longer["configured"] == 0
    shorter = probe.run("node", text=replace(_of("MlaFusedRopeRmsNormQuantization"), shapes={"cos": (77, 8)}).text())
    assert shorter["configured"] != 0
    assert any("cos has 8 along ceil(Dr/2), expected 9" in text for text in shorter["messages"])


@pytest.mark.parametrize("op", OPS)
def test_call_that_contradicts_the_op_is_logged_and_launches_nothing(probe: Probe, op: str):
    answer = probe.run("node", text=_of(op).text() if op != "MlaSparseAttention" else _sparse().text())
    assert answer["wrong_enqueue"] != 0
    assert answer["messages"][-1].startswith(f"mla_trt: {op}: ")


def test_pools_in_the_plugin_are_of_engines_and_not_of_builds(probe: Probe):
    answer = probe.run("node", text=_of("MlaAttention").text())
    assert answer["attached"]
    answer = probe.run("node", text=_resident(_of("MlaAttention")).text())
    assert answer["timed"] == 0
    if not answer["attached"]:  # without a GPU
        failed = re.compile(r"mla_trt: MlaAttention: no (stream|memory) for (the|a) page pool")
        assert any(failed.match(message) for message in answer["messages"]), answer["messages"]


def test_an_op_that_only_reads_a_pool_cannot_hold_it(probe: Probe):
    answer = probe.run("node", text=_resident(_of("MlaDecoding")).text())
    assert not answer["created"]
    assert answer["messages"][0].endswith("'resident' names 'kv_cache', which is no pool that the op updates")


@pytest.mark.parametrize(
    ("line", "replaced", "message"),
    [
        (
            r"text resident .*",
            "text resident latent",
            "'resident' names 'latent', which is no pool that the op updates",
        ),
        (r"text resident .*", "text resident kv_cache kv_cache", "'resident' names 'kv_cache' twice"),
        (r"text resident .*", "text resident indexer_cache", "'inputs' lacks 'kv_cache', which the op needs"),
        (r"int resident_pages .*", "int resident_pages 0", "'resident_pages' is less than 1"),
        (r"int resident_pages .*\n", "", "'resident_pages' is missing, which a node with resident pools needs"),
        (r"text inputs ", "text inputs kv_cache ", "'inputs' names 'kv_cache', which the plugin holds"),
        (r"text outputs ", "text outputs kv_cache_out ", "'outputs' names 'kv_cache_out', which the plugin holds"),
    ],
)
def test_resident_pools_without_sense_are_refused(probe: Probe, line: str, replaced: str, message: str):
    text, count = re.subn(line, replaced, _resident(_sparse()).text())
    assert count == 1
    answer = probe.run("node", text=text)
    assert not answer["created"]
    assert answer["messages"] == [f"mla_trt: MlaSparseAttention: node 'probed': attribute {message}"]


def _sparse() -> Case:
    case = _of("MlaSparseAttention")
    return replace(case, inputs=tuple(name for name in case.inputs if name != "indices"))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"positions": (12,)}, "positions has 12 along T, expected 11"),
        ({"kv_cache": (30, LETTERS["page_words"] + 32)}, "a page of kv_cache has"),
        ({"w_uk": (6, 160, 135)}, "w_uk has 135 along Dn, expected 136"),
    ],
)
def test_shapes_that_contradict_each_other_end_the_build(probe: Probe, shapes: dict[str, Any], message: str):
    answer = probe.run("node", text=replace(_of("MlaAttention"), shapes=shapes).text())
    assert answer["configured"] != 0
    assert any(message in text for text in answer["messages"]), answer["messages"]


def test_input_of_another_rank_is_refused_where_shapes_are_inferred(probe: Probe):
    answer = probe.run("node", text=replace(_of("MlaAttention"), shapes={"latent": (1, 11, 160)}).text())
    assert answer["created"]
    assert not answer["inferred"]
    assert answer["messages"] == [
        "mla_trt: MlaAttention: the input 'latent' has 3 dimensions, expected [T R]",
    ]


@pytest.mark.parametrize(
    ("line", "replaced", "message"),
    [
        (r"int kv_lora_rank .*\n", "", "attribute 'kv_lora_rank' is missing"),
        (
            r"text row_format .*",
            "text row_format fp4",
            "attribute 'row_format' is 'fp4', expected one of: f32 bf16 fp8",
        ),
        (r"int top_k .*", "float top_k 4", "attribute 'top_k' is not an integer"),
        (r"float softmax_scale .*", "int softmax_scale 1", "attribute 'softmax_scale' is not a float"),
        (r"text row_format .*", "int row_format 1", "attribute 'row_format' is not text"),
        (r"text inputs query", "text inputs key", "attribute 'inputs' names 'key', which the op does not have"),
        (r"text inputs query", "text inputs query query", "attribute 'inputs' names 'query' twice"),
        (r"text inputs query ", "text inputs ", "attribute 'inputs' lacks 'query', which the op needs"),
        (r"text outputs output ", "text outputs ", "attribute 'outputs' lacks 'output', which the op needs"),
    ],
)
def test_node_that_is_no_node_of_its_op_is_refused_with_its_name(probe: Probe, line: str, replaced: str, message: str):
    text, count = re.subn(line, replaced, _sparse().text())
    assert count == 1
    answer = probe.run("node", text=text)
    assert not answer["created"]
    assert len(answer["messages"]) == 1
    assert answer["messages"][0].startswith(f"mla_trt: MlaSparseAttention: node 'probed': {message}")


def test_attributes_that_are_left_out_have_the_defaults_of_the_op_set(probe: Probe):
    case = _sparse()
    defaults = {a.name: a.default for a in case.op.attributes if a.default is not None}
    lines = [line for line in case.text().splitlines() if len(line.split()) < 2 or line.split()[1] not in defaults]
    fields = {name: value for name, _, value in probe.run("node", text="\n".join(lines))["fields"]}
    assert {name: fields[name] for name in defaults} == {
        name: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value for name, value in defaults.items()
    }


def test_nodes_that_differ_have_timings_of_their_own(probe: Probe):
    case = _of("MlaDecoding")
    ids = [
        probe.run("node", text=text)["timing_cache_id"]
        for text in (
            case.text(),
            case.text(),
            case.text().replace("page_size 16", "page_size 32"),
            case.text().replace("softmax_scale 0.0721", "softmax_scale 0.07210001"),
            replace(case, inputs=tuple(name for name in case.inputs if name != "sinks")).text(),
        )
    ]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 4


STEPS = [
    # Triton, ctypes
    ("dlopen get", ["opened", "found"]),
    ("dlopen get dlclose get", ["opened", "found", "closed", "absent"]),
    # trtexec --dynamicPlugins, IPluginRegistry::loadLibrary
    ("load get", ["loaded", "found"]),
    ("load get unload get", ["loaded", "found", "unloaded", "absent"]),
    ("load unload load get", ["loaded", "unloaded", "loaded", "found"]),
    ("load load get", ["loaded", "refused", "found"]),
    # both in one process
    ("dlopen load get", ["opened", "loaded", "found"]),
    ("dlopen load unload get", ["opened", "loaded", "unloaded", "absent"]),
    ("load dlopen get", ["loaded", "opened", "found"]),
    ("load unload dlopen get", ["loaded", "unloaded", "opened", "found"]),
    ("dlopen dlclose load get", ["opened", "closed", "loaded", "found"]),
    # two copies: the first one serves
    ("dlopen load-copy get", ["opened", "refused", "found"]),
    ("load load-copy get", ["loaded", "refused", "found"]),
    ("load load-copy unload get load-copy get", ["loaded", "refused", "unloaded", "absent", "loaded", "found"]),
]


@pytest.mark.parametrize(("steps", "results"), STEPS, ids=[steps for steps, _ in STEPS])
def test_library_can_be_loaded_in_every_way(probe: Probe, steps: str, results: list[str]):
    assert probe.run("steps", *steps.split()) == results


@pytest.mark.parametrize(("steps", "results"), STEPS, ids=[steps for steps, _ in STEPS])
def test_library_can_be_loaded_in_every_way_by_tensorrt(
    probe: Probe, real_nvinfer: Path, steps: str, results: list[str]
):
    assert replace(probe, nvinfer=real_nvinfer).run("steps", *steps.split()) == results
