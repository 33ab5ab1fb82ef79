"""Nodes and models of the op set: making nodes, attaching and stripping function bodies, moving to other pages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import onnx
from onnx import helper

from mla_trt.errors import BadModelError, UsageError
from mla_trt.formats import INDEX_FORMATS, ROW_FORMATS
from mla_trt.ops import (
    attention,
    decode_branch_fp8,
    decoding,
    fused_rope_rms_norm_quantization,
    indexer,
    input_projections,
    output_projection,
    plan,
    prefill,
    prefill_sparse,
    sparse_attention,
)
from mla_trt.ops.body import OPSET
from mla_trt.ops.schema import DOMAIN, DOMAIN_VERSION, Attributes, Op, TensorType

_MODULES = (
    plan,
    fused_rope_rms_norm_quantization,
    decoding,
    prefill,
    prefill_sparse,
    decode_branch_fp8,
    indexer,
    attention,
    sparse_attention,
    input_projections,
    output_projection,
)
OPS: dict[str, Op] = {module.OP.name: module.OP for module in _MODULES}

_METADATA = "mla_trt"
_OVERLOAD_IR_VERSION = 10  # the first IR version with overloads


def _op(node: onnx.NodeProto) -> Op:
    if node.op_type not in OPS:
        raise BadModelError(
            f"node '{node.name}': the domain {DOMAIN} has no op {node.op_type}; it has {', '.join(OPS)}"
        )
    return OPS[node.op_type]


def make_node(
    op_type: str,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str] | Sequence[str],
    name: str = "",
    **attributes: int | float | str,
) -> onnx.NodeProto:
    """A node of the op set.

    Args:
        inputs: formal input name: value name. Optional inputs may be left out or be "".
        outputs: formal output name: value name, or the value names in order. Optional outputs may be left out.
        attributes: the op's; those with a default may be left out. The node gets every attribute, and TensorRT's plugin
            attributes.

    Raises:
        UsageError: an op, input, output or attribute that does not exist, is missing, or has a value that is not
            allowed.
    """
    if op_type not in OPS:
        raise UsageError(f"the domain {DOMAIN} has no op {op_type}; it has {', '.join(OPS)}")
    op = OPS[op_type]
    where = f"node '{name}'" if name else "node"
    if not isinstance(outputs, Mapping):
        if len(outputs) > len(op.outputs):
            raise UsageError(f"{where}: {op_type} has {len(op.outputs)} outputs, not {len(outputs)}")
        outputs = {formal.name: value for formal, value in zip(op.outputs, outputs, strict=False)}
    for kind, formals, given in (("input", op.inputs, inputs), ("output", op.outputs, outputs)):
        names = [formal.name for formal in formals]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise UsageError(f"{where}: {op_type} has no {kind} {', '.join(unknown)}; it has {', '.join(names)}")
    missing = [formal.name for formal in op.outputs if not formal.optional and not outputs.get(formal.name)]
    if missing:
        raise UsageError(f"{where}: {op_type} needs the output {', '.join(missing)}")
    complete = op.complete(attributes, where)
    op.validate(complete, frozenset(formal for formal, value in inputs.items() if value), where)
    node = helper.make_node(
        op_type,
        _positional([formal.name for formal in op.inputs], inputs),
        _positional([formal.name for formal in op.outputs], outputs),
        name=name or None,
        domain=DOMAIN,
    )
    _set_attributes(node, op, complete)
    return node


def _set_attributes(node: onnx.NodeProto, op: Op, attributes: Attributes) -> None:
    del node.attribute[:]
    node.attribute.extend(
        helper.make_attribute(name, value) for name, value in {**attributes, **op.plugin_attributes}.items()
    )


def _positional(formals: Sequence[str], given: Mapping[str, str]) -> list[str]:
    names = [given.get(formal, "") for formal in formals]
    while names and not names[-1]:
        names.pop()
    return names


def infer_shapes(node: onnx.NodeProto, input_types: Sequence[TensorType | None]) -> list[TensorType]:
    """Types of the outputs of a node of the op set, in order; see :meth:`mla_trt.ops.schema.Op.infer`."""
    return _op(node).infer(node, input_types)


def mla_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The nodes of the op set in ``model``, those in subgraphs too, in graph order."""
    yield from _graph_nodes(model.graph)


def _graph_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        if node.domain == DOMAIN:
            yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graph_nodes(attribute.g)
            for graph_attribute in attribute.graphs:
                yield from _graph_nodes(graph_attribute)


def attach_functions(model: onnx.ModelProto) -> None:
    """Give every node of the op set the ``overload`` of its variant, and the model the function of each variant.

    Functions and overloads from before are replaced.

    Raises:
        BadModelError: the model is not of opset 26, or has an op that does not exist.
        UsageError: a node's attributes or inputs break its op's contract.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < OPSET:
        raise BadModelError(
            f"the model is of opset {opset}; function bodies of {DOMAIN} need opset {OPSET}: convert it first"
        )
    strip_functions(model)
    functions: dict[tuple[str, str], onnx.FunctionProto] = {}
    for node in mla_nodes(model):
        op = _op(node)
        node.overload = op.variant(node)
        if (node.op_type, node.overload) not in functions:
            functions[node.op_type, node.overload] = op.function(node)
    model.functions.extend(functions.values())
    if functions and not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    model.ir_version = max(model.ir_version, _OVERLOAD_IR_VERSION)


def strip_functions(model: onnx.ModelProto) -> None:
    """Remove the functions of the op set and the overloads of its nodes; other functions stay."""
    kept = [function for function in model.functions if function.domain != DOMAIN]
    if len(kept) < len(model.functions):
        del model.functions[:]
        model.functions.extend(kept)
    for node in mla_nodes(model):
        node.ClearField("overload")


def retarget(
    model: onnx.ModelProto,
    row_format: str | None = None,
    index_format: str | None = None,
    page_size: int | None = None,
) -> onnx.ModelProto:
    """The same model over other pages; what is None stays. Attributes, cache shapes, metadata and functions follow.

    Raises:
        UsageError: a format that does not exist, or a page size below 1.
    """
    if row_format is not None and row_format not in ROW_FORMATS:
        raise UsageError(f"unknown row format '{row_format}': use one of {', '.join(ROW_FORMATS)}")
    if index_format is not None and index_format not in INDEX_FORMATS:
        raise UsageError(f"unknown index format '{index_format}': use one of {', '.join(INDEX_FORMATS)}")
    changes = {"row_format": row_format, "index_format": index_format, "page_size": page_size}
    changes = {name: value for name, value in changes.items() if value is not None}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    page_words: dict[str, int] = {}
    for node in mla_nodes(result):
        op = _op(node)
        attributes = op.node_attributes(node)
        changed = op.complete(
            {**attributes, **{k: v for k, v in changes.items() if k in attributes}}, f"node '{node.name}'"
        )
        _set_attributes(node, op, changed)
        values = {**op.given_inputs(node), **op.given_outputs(node)}
        for formal, layout in (("kv_cache", changed.kv_layout), ("indexer_cache", changed.index_layout)):
            for value in (values.get(formal), values.get(f"{formal}_out")):
                if value is not None:
                    page_words[value] = layout().page_words
    for info in (*result.graph.input, *result.graph.output, *result.graph.value_info):
        if info.name in page_words:
            info.type.tensor_type.shape.dim[1].dim_value = page_words[info.name]
    for entry in result.metadata_props:
        if entry.key == _METADATA:
            metadata = json.loads(entry.value)
            metadata.update({name: value for name, value in changes.items() if name in metadata})
            for cache in metadata.get("caches", []):
                cache["page_words"] = page_words.get(cache["name"], cache["page_words"])
            entry.value = json.dumps(metadata)
    attach_functions(result)
    return result
