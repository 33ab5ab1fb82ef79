"""The op set as a C++ header: what the kernels and the TensorRT plugins know of the ops, taken from `mla_trt.ops`.

    python -m mla_trt.plugins.op_table     # writes plugins/kernels/op_table.h

The header is kept in the repository, so that the kernels compile without Python; a test compares it with the ops.
"""

from __future__ import annotations

import re
from pathlib import Path

from mla_trt.ops import OPS
from mla_trt.ops.schema import ANY, E4M3, F32, I32, TABLE, WEIGHT, Attribute, F, Op

HEADER = Path(__file__).parent / "kernels" / "op_table.h"

KINDS = {
    F: "Kind::any_float",
    F32: "Kind::f32",
    TABLE: "Kind::table",
    I32: "Kind::i32",
    WEIGHT: "Kind::weight",
    E4M3: "Kind::e4m3",
    ANY: "Kind::any",
}


def attributes() -> dict[str, Attribute]:
    """Every attribute of the op set by name. An attribute means the same in every op that has it."""
    found: dict[str, Attribute] = {}
    for op in OPS.values():
        for attribute in op.attributes:
            found.setdefault(attribute.name, attribute)
    return found


def enum_name(op_type: str) -> str:
    """``MlaFusedRopeRmsNormQuantization`` as ``fused_rope_rms_norm_quantization``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", op_type.removeprefix("Mla")).lower()


def header() -> str:
    """The text of the header."""
    lines = [
        "// The op set of mla_trt/ops. Made by `python -m mla_trt.plugins.op_table`: do not edit.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "",
        "/* The attributes of all ops; an op reads its own. Text attributes are numbers of their choices, in order. */",
        'extern "C" {',
        "typedef struct MlaAttributes {",
    ]
    for attribute in attributes().values():
        kind = "float" if attribute.kind is float else "int32_t"
        choices = f" /* {', '.join(map(str, attribute.choices))} */" if attribute.kind is str else ""
        lines.append(f"    {kind} {attribute.name};{choices}")
    lines += ["} MlaAttributes;", "}", "", "namespace mla {", ""]
    for attribute in attributes().values():
        if attribute.kind is str:
            words = ", ".join(f"{choice}" for choice in attribute.choices)
            lines.append(f"namespace {attribute.name} {{ enum : int32_t {{ {words} }}; }}")
    lines += ["", "namespace op {"]
    lines.append(f"enum : int32_t {{ {', '.join(map(enum_name, OPS))}, count }};")
    lines.append("}  // namespace op")
    lines.append("")
    for op in OPS.values():
        lines += _indices(op)
    lines += [
        "enum class Kind { any_float, f32, table, i32, weight, e4m3, any };",
        "",
        "struct TensorSpec {",
        "    const char* name;",
        "    Kind kind;",
        "    const char* shape;  // words, null where any shape will do",
        "    bool optional;",
        "};",
        "",
        "struct AttributeSpec {",
        "    const char* name;",
        "    enum { integer, number, text } kind;",
        "    int32_t offset;  // bytes into MlaAttributes",
        "    const char* letter;  // the dimension that it fixes, or null",
        "    const char* choices;  // of a text attribute, separated by spaces",
        "    double default_value;  // meaningless when required; for a text attribute the number of its choice",
        "    bool required;",
        "};",
        "",
        "struct OpSpec {",
        "    const char *name, *version;",
        "    int32_t inputs, outputs, attributes;",
        "    const TensorSpec* input;",
        "    const TensorSpec* output;",
        "    const AttributeSpec* attribute;",
        "};",
        "",
        "namespace table {",
    ]
    for op in OPS.values():
        lines += _tables(op)
    lines.append("}  // namespace table")
    lines.append("")
    lines.append("constexpr OpSpec ops[] = {")
    for name, op in OPS.items():
        short = enum_name(name)
        counts = f"{len(op.inputs)}, {len(op.outputs)}, {len(op.attributes)}"
        lines.append(
            f'    {{"{name}", "{op.plugin_version}", {counts}, table::{short}_inputs, table::{short}_outputs, table::{short}_attributes}},'
        )
    lines += ["};", "", "}  // namespace mla", ""]
    return "\n".join(lines)


def _indices(op: Op) -> list[str]:
    lines = [f"namespace {enum_name(op.name)} {{"]
    for role, formals in (("in", op.inputs), ("out", op.outputs)):
        names = ", ".join(formal.name for formal in formals)
        lines.append(f"namespace {role} {{ enum : int {{ {names}, count }}; }}")
    return [*lines, "}", ""]


def _tables(op: Op) -> list[str]:
    short = enum_name(op.name)
    lines = [f"constexpr TensorSpec {short}_inputs[] = {{"]
    for formal in op.inputs:
        shape = "nullptr" if formal.shape is None else f'"{formal.shape}"'
        lines.append(f'    {{"{formal.name}", {KINDS[formal.kind]}, {shape}, {_bool(formal.optional)}}},')
    lines += ["};", f"constexpr TensorSpec {short}_outputs[] = {{"]
    for output in op.outputs:
        lines.append(f'    {{"{output.name}", {KINDS[output.kind]}, "{output.shape}", {_bool(output.optional)}}},')
    lines.append("};")
    if not op.attributes:
        return [*lines, f"constexpr const AttributeSpec* {short}_attributes = nullptr;"]
    lines.append(f"constexpr AttributeSpec {short}_attributes[] = {{")
    order = list(attributes())
    for attribute in op.attributes:
        kind = {int: "integer", float: "number", str: "text"}[attribute.kind]
        offset = 4 * order.index(attribute.name)
        letter = "nullptr" if attribute.letter is None else f'"{attribute.letter}"'
        choices = f'"{" ".join(map(str, attribute.choices))}"' if attribute.kind is str else "nullptr"
        lines.append(
            f'    {{"{attribute.name}", AttributeSpec::{kind}, {offset}, {letter}, {choices}, '
            f"{default_number(attribute)!r}, {_bool(attribute.default is None)}}},"
        )
    return [*lines, "};"]


def default_number(attribute: Attribute) -> int | float:
    """The default as it stands in MlaAttributes; 0 where there is none."""
    if attribute.default is None:
        return 0
    return as_number(attribute, attribute.default)


def as_number(attribute: Attribute, value: int | float | str) -> int | float:
    """A value of an attribute as it stands in MlaAttributes: text becomes the number of its choice."""
    return attribute.choices.index(value) if isinstance(value, str) else value


def _bool(value: bool) -> str:
    return "true" if value else "false"


if __name__ == "__main__":
    HEADER.write_text(header())
