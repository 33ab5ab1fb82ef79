"""Changes that keep the meaning: names, order, constants, copies, functions and branches, opsets, inputs and outputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.version_converter
from model_editor import Editor, sorted_nodes
from mutation_kinds import is_plain, is_ranked_float, keeps
from onnx import TensorProto, helper

INT64_MAX = np.iinfo(np.int64).max


@keeps
def rename_all(editor: Editor) -> bool:
    """Numbers for names, of inputs and outputs too."""
    names: dict[str, str] = {"": ""}

    def renamed(name: str) -> str:
        if name not in names:
            names[name] = f"x{editor.random.randrange(1 << 48)}"
        return names[name]

    def rename(graph: onnx.GraphProto) -> None:
        for value in (*graph.input, *graph.output, *graph.initializer):
            value.name = renamed(value.name)
        for number, node in enumerate(graph.node):
            node.name = "" if number % 3 == 0 else renamed(f"node {node.name} {number}")
            node.input[:] = [renamed(name) for name in node.input]
            node.output[:] = [renamed(name) for name in node.output]
            node.ClearField("metadata_props")
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    rename(attribute.g)

    rename(editor.graph)
    del editor.graph.value_info[:]
    editor.refresh()
    return True


@keeps
def shuffle_nodes(editor: Editor) -> bool:
    nodes = sorted_nodes(editor.graph, lambda ready: ready.pop(editor.random.randrange(len(ready))))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del editor.graph.node[:]
    editor.graph.node.extend(copies)
    editor.refresh()
    return True


@keeps
def constants_as_nodes(editor: Editor) -> bool:
    moved = [tensor for tensor in editor.graph.initializer if tensor.data_location != TensorProto.EXTERNAL]
    listed = editor.outputs | {value.name for value in editor.graph.input}
    moved = [tensor for tensor in moved if editor.random.random() < 0.5 and tensor.name not in listed]
    kept = [tensor for tensor in editor.graph.initializer if all(tensor is not other for other in moved)]
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in moved]
    kept = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del editor.graph.initializer[:]
    editor.graph.initializer.extend(kept)
    editor.graph.node.extend(nodes)
    editor.refresh()
    return bool(nodes)


@keeps
def constants_as_initializers(editor: Editor) -> bool:
    nodes = [node for node in editor.nodes("Constant") if node.attribute[0].name == "value"]
    for node in nodes:
        tensor = onnx.TensorProto.FromString(node.attribute[0].t.SerializeToString())
        tensor.name = node.output[0]
        editor.graph.initializer.append(tensor)
        editor.graph.node.remove(node)
    editor.refresh()
    return bool(nodes)


@keeps
def constants_as_inputs(editor: Editor) -> bool:
    """Initializers listed among the inputs, as IR 3 wanted it."""
    tensors = [tensor for tensor in editor.graph.initializer if tensor.name not in {v.name for v in editor.graph.input}]
    for tensor in tensors:
        editor.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return bool(tensors)


@keeps
def constants_apart(editor: Editor) -> bool:
    """Every use of a small constant gets a copy of its own."""
    changed = False
    for name in list(editor.constants):
        values = editor.array(name)
        uses = editor.uses.get(name, [])
        if values is None or values.size > 64 or len(uses) < 2:
            continue
        for use in uses[1:]:
            editor.rewire(use, editor.constant(values))
            changed = True
    return changed


@keeps
def constants_shared(editor: Editor) -> bool:
    """Equal small constants become one."""
    found: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    changed = False
    for name in list(editor.constants):
        values = editor.array(name)
        if values is None or values.size > 4096:
            continue
        first = found.setdefault((str(values.dtype), values.shape, values.tobytes()), name)
        for use in list(editor.uses.get(name, [])) if first != name else []:
            editor.rewire(use, first)
            changed = True
    return changed


@keeps
def duplicate_behind(editor: Editor) -> bool:
    """A reader of a tensor gets it from copies of the nodes behind it."""
    use = editor.chosen(editor.edges(is_plain))
    if use is None:
        return False
    copies: dict[str, str] = {}
    depth = editor.random.randrange(1, 30)

    def copied(name: str, left: int) -> str:
        node = editor.producers.get(name)
        if node is None or not left or node.op_type == "Constant":
            return name
        if name not in copies:
            inputs = [copied(item, left - 1) if item else "" for item in node.input]
            twin = onnx.NodeProto.FromString(node.SerializeToString())
            twin.name = editor.fresh("twin")
            twin.input[:] = inputs
            twin.output[:] = [editor.fresh("twin") if item else "" for item in node.output]
            editor._append(twin)
            copies.update(zip(node.output, twin.output, strict=True))
        return copies[name]

    editor.rewire(use, copied(use.name, depth))
    return bool(copies)


@keeps
def merge_equal(editor: Editor) -> bool:
    """Nodes that compute the same become one."""
    seen: dict[bytes, onnx.NodeProto] = {}
    changed = False
    for node in sorted_nodes(editor.graph, lambda ready: ready.pop()):
        key = onnx.NodeProto.FromString(node.SerializeToString())
        key.name, key.doc_string = "", ""
        del key.output[:]
        key.ClearField("metadata_props")
        first = seen.setdefault(key.SerializeToString(), node)
        if first is node or any(name in editor.outputs for name in node.output):
            continue
        for mine, other in zip(node.output, first.output, strict=False):
            for use in list(editor.uses.get(mine, [])):
                editor.rewire(use, other)
                changed = True
    return changed


@keeps
def dead_nodes(editor: Editor) -> bool:
    for _ in range(3):
        use = editor.chosen(editor.edges(is_ranked_float))
        if use is None:
            return False
        editor.emit(
            "Sigmoid",
            editor.emit("MatMul", use.name, editor.emit("Transpose", use.name))
            if editor.facts(use.name).rank == 2
            else use.name,
        )
    return True


@keeps
def unused_input(editor: Editor) -> bool:
    kind = editor.random.choice((TensorProto.INT64, TensorProto.FLOAT, TensorProto.BOOL))
    shape = editor.random.choice(([], [1], ["batch", "sequence"], ["batch", 4, "sequence", 8]))
    editor.graph.input.append(helper.make_tensor_value_info(editor.fresh("unused"), kind, shape))
    return True


@keeps
def as_function(editor: Editor) -> bool:
    """A stretch of the graph as a local function."""
    if editor.opset < 15:
        return False
    nodes = sorted_nodes(editor.graph, lambda ready: ready.pop())
    stretch = _stretch(editor, nodes)
    if not stretch:
        return False
    inputs, outputs = _borders(editor, stretch)
    name = editor.fresh("Stretch")
    function = helper.make_function(
        "local",
        name,
        inputs,
        outputs,
        [onnx.NodeProto.FromString(node.SerializeToString()) for node in stretch],
        list(editor.model.opset_import),
    )
    editor.model.functions.append(function)
    if all(entry.domain != "local" for entry in editor.model.opset_import):
        editor.model.opset_import.append(helper.make_opsetid("local", 1))
    editor.model.ir_version = max(editor.model.ir_version, 8)
    for node in stretch:
        editor.graph.node.remove(node)
    editor.graph.node.append(helper.make_node(name, inputs, outputs, domain="local", name=name))
    editor.refresh()
    return True


@keeps
def in_a_branch(editor: Editor) -> bool:
    """A stretch of the graph in the branch that an If always takes."""
    nodes = sorted_nodes(editor.graph, lambda ready: ready.pop())
    stretch = _stretch(editor, nodes)
    if not stretch or any(node.op_type in ("If", "Loop", "Scan") for node in stretch):
        return False
    _, outputs = _borders(editor, stretch)
    if any(editor.facts(name).element == 0 for name in outputs):
        return False
    prefix = editor.fresh("branch")

    def branch(label: str) -> onnx.GraphProto:
        renamed = {name: f"{prefix}_{label}_{name}" for node in stretch for name in node.output if name}
        copies = []
        for node in stretch:
            twin = onnx.NodeProto.FromString(node.SerializeToString())
            twin.input[:] = [renamed.get(name, name) for name in twin.input]
            twin.output[:] = [renamed.get(name, name) for name in twin.output]
            copies.append(twin)
        results = [helper.make_tensor_value_info(renamed[name], editor.facts(name).element, None) for name in outputs]
        return helper.make_graph(copies, f"{prefix}_{label}", [], results)

    then, other = branch("then"), branch("else")
    taken = editor.constant(True)
    for node in stretch:
        editor.graph.node.remove(node)
    editor.graph.node.append(helper.make_node("If", [taken], outputs, name=prefix, then_branch=then, else_branch=other))
    editor.refresh()
    return True


def _stretch(editor: Editor, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Some nodes that follow each other in a topological order, so that nothing outside lies between two of them."""
    count = editor.random.randrange(1, 25)
    start = editor.random.randrange(max(len(nodes) - count, 1))
    return [node for node in nodes[start : start + count] if node.op_type != "Constant"]


def _borders(editor: Editor, stretch: list[onnx.NodeProto]) -> tuple[list[str], list[str]]:
    made = {name for node in stretch for name in node.output if name}
    inside = {id(node) for node in stretch}
    inputs = list(dict.fromkeys(name for node in stretch for name in node.input if name and name not in made))
    outputs = [
        name
        for node in stretch
        for name in node.output
        if name and (name in editor.outputs or any(id(use.node) not in inside for use in editor.uses.get(name, [])))
    ]
    return inputs, outputs


@keeps
def newer_opset(editor: Editor) -> bool:
    """The same model in a newer opset, by ONNX's version converter."""
    versions = [version for version in (18, 20, 21, 22, 23, 24, 25) if version > editor.opset]
    if not versions or editor.model.functions or any(node.domain for node in editor.graph.node):
        return False
    ordered = onnx.ModelProto()
    ordered.CopyFrom(editor.finish())
    try:
        converted = onnx.version_converter.convert_version(ordered, editor.random.choice(versions))
    except (RuntimeError, ValueError, onnx.version_converter.ConvertError):
        return False
    editor.model.CopyFrom(converted)
    editor.model.ir_version = max(editor.model.ir_version, 10)
    editor.graph = editor.model.graph
    editor.refresh()
    return True


@keeps
def intermediate_as_output(editor: Editor) -> bool:
    """One more result: a tensor with a row for each token, from outside the attention."""
    tokens = [value for value in editor.graph.output if editor.facts(value.name).rank == 3]
    if not tokens:
        return False
    lead = [dim.dim_param or dim.dim_value for dim in tokens[0].type.tensor_type.shape.dim[:2]]
    found = [
        (node, name)
        for node in editor.nodes("Add", "Mul", "MatMul", "RMSNormalization")
        for name in node.output[:1]
        if editor.facts(name).rank == 3 and name not in editor.outputs and (editor.facts(name).shape or (0,))[-1]
    ]
    picked = editor.chosen(found)
    if picked is None:
        return False
    facts = editor.facts(picked[1])
    assert facts.shape is not None
    result = editor.emit("Identity", picked[1])
    editor.graph.output.append(helper.make_tensor_value_info(result, facts.element, [*lead, facts.shape[-1]]))
    return True
