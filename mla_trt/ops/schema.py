"""What an op of the domain ``mla_trt`` is: its contract, type inference, function body and reference in one object.

Shapes are written as words: ``"T H Dn+Dr"``. A word is a sum of numbers, dimension letters and ``ceil(X/128)``, where X may be a
product of two letters, ``H*M``. Letters are bound by attributes, then by the input shapes, and give the output shapes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from mla_trt.errors import BadModelError, UsageError
from mla_trt.formats import IndexLayout, KvLayout, ceil_div
from mla_trt.ops.body import FLOAT, OPSET, Body, Value

DOMAIN = "mla_trt"
DOMAIN_VERSION = 1
PLUGIN_ATTRIBUTES = ("plugin_version", "plugin_namespace")
"""Of every node, beside its op's own: by these TensorRT finds the plugin."""

Dim = int | str | None
Array = npt.NDArray[np.generic]

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)

# Kinds of tensors, and the element types that each takes. None: any.
F = "f32, f16 or bf16"
F32 = "f32"
TABLE = "f32 (rows of a table)"
"""In engines of any float type, and its rows may be longer: their first values count."""
I32 = "i32"
WEIGHT = "f32, f16, bf16 or e4m3"
E4M3 = "e4m3"
ANY = "any"
_TYPES: dict[str, tuple[int, ...] | None] = {
    F: _FLOATS,
    F32: (TensorProto.FLOAT,),
    TABLE: (TensorProto.FLOAT,),
    I32: (TensorProto.INT32,),
    WEIGHT: (*_FLOATS, TensorProto.FLOAT8E4M3FN),
    E4M3: (TensorProto.FLOAT8E4M3FN,),
    ANY: None,
}
_FIXED = {F32: FLOAT, TABLE: FLOAT, I32: TensorProto.INT32}


@dataclass(frozen=True)
class TensorType:
    """Element type (``onnx.TensorProto.FLOAT``, ...) and shape; a dimension is a size, a name, or None when unknown."""

    dtype: int
    shape: tuple[Dim, ...]


class Attributes(dict[str, int | float | str]):
    """The attributes of a node by name, all present."""

    def integer(self, name: str) -> int:
        return int(self[name])

    def number(self, name: str) -> float:
        return float(self[name])

    def text(self, name: str) -> str:
        return str(self[name])

    def kv_layout(self) -> KvLayout:
        """Pages of the latent cache that these attributes describe."""
        return KvLayout(
            page_size=self.integer("page_size"),
            row_format=self.text("row_format"),
            kv_lora_rank=self.integer("kv_lora_rank"),
            qk_rope_head_dim=self.integer("qk_rope_head_dim"),
            kv_scale=self.number("kv_scale"),
        )

    def index_layout(self) -> IndexLayout:
        """Pages of the index cache that these attributes describe."""
        return IndexLayout(
            page_size=self.integer("page_size"),
            index_format=self.text("index_format"),
            index_head_dim=self.integer("index_head_dim"),
            scale_ue8m0=bool(self.integer("index_scale_ue8m0")),
        )


@dataclass(frozen=True)
class Input:
    """One formal input. ``shape`` None: any shape."""

    name: str
    kind: str
    shape: str | None
    optional: bool = False


@dataclass(frozen=True)
class Output:
    """One formal output. An output of kind F has the type of the op's first F input."""

    name: str
    kind: str
    shape: str
    optional: bool = False


@dataclass(frozen=True)
class Attribute:
    """One attribute.

    ``kind`` is ``int``, ``float`` or ``str``; without a default it must be given; ``letter`` is the dimension that it
    fixes.
    """

    name: str
    kind: type[int] | type[float] | type[str]
    default: int | float | str | None = None
    letter: str | None = None
    choices: tuple[int | str, ...] = ()
    minimum: int | None = None

    def check(self, value: object, where: str) -> int | float | str:
        """``value`` as this attribute's type, or :class:`UsageError`."""
        if self.kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(np.float32(value))
        if self.kind is int and isinstance(value, (bool, int, np.integer)):
            number = int(value)
            if (self.choices and number not in self.choices) or (self.minimum is not None and number < self.minimum):
                allowed = f"one of {self.choices}" if self.choices else f"at least {self.minimum}"
                raise UsageError(f"{where}: attribute {self.name} is {number}, must be {allowed}")
            return number
        if self.kind is str and isinstance(value, str):
            if self.choices and value not in self.choices:
                raise UsageError(
                    f"{where}: attribute {self.name} is '{value}', must be one of {', '.join(map(str, self.choices))}"
                )
            return value
        raise UsageError(f"{where}: attribute {self.name} must be {self.kind.__name__}, not {value!r}")


class Dimensions:
    """Dimension letters and what they are bound to."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.bound: dict[str, Dim] = {}

    def bind(self, letter: str, dim: Dim, source: str) -> None:
        """Fix ``letter``; a number beats a name. Two different numbers are an error."""
        known = self.bound.get(letter)
        if isinstance(known, int) and isinstance(dim, int) and known != dim:
            raise BadModelError(f"{self.where}: {source} gives {letter} = {dim}, but it is {known}")
        if dim is not None and not isinstance(known, int) and (known is None or isinstance(dim, int)):
            self.bound[letter] = dim

    def evaluate(self, word: str) -> Dim:
        """The size that ``word`` stands for, a name when it is a single unbound-by-number letter, None when unknown."""
        total = 0
        for term in word.split("+"):
            ceiling = re.fullmatch(r"ceil\((\w+)(?:\*(\w+))?/(\d+)\)", term)
            dim: Dim = int(term) if term.isdigit() else self.bound.get(ceiling.group(1) if ceiling else term)
            factor = self.bound.get(ceiling.group(2)) if ceiling and ceiling.group(2) else 1
            if not isinstance(dim, int) or not isinstance(factor, int):
                return dim if term == word and not ceiling else None
            total += ceil_div(dim * factor, int(ceiling.group(3))) if ceiling else dim
        return total

    def unify(self, shape: str, dims: Sequence[Dim], source: str) -> None:
        """Bind the letters of ``shape`` that stand alone, and check the words that can be evaluated."""
        words = shape.split()
        if len(words) != len(dims):
            raise BadModelError(f"{self.where}: {source} has {len(dims)} dimensions, expected [{', '.join(words)}]")
        for word, dim in zip(words, dims, strict=True):
            if word.isidentifier():
                self.bind(word, dim, source)
                continue
            expected = self.evaluate(word)
            if isinstance(expected, int) and isinstance(dim, int) and expected != dim:
                raise BadModelError(f"{self.where}: {source} has {dim} along {word}, expected {expected}")


Emit = Callable[[Body, Attributes, dict[str, Value]], dict[str, Value]]
Reference = Callable[[Attributes, Mapping[str, Array]], dict[str, Array]]
Check = Callable[[Attributes, frozenset[str]], None]
Bind = Callable[[Dimensions, Mapping[str, TensorType]], None]


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        name: op type.
        doc: shapes, types and formulas.
        inputs, outputs, attributes: in order.
        emit: appends the op's nodes to a body; float inputs arrive as f32, float outputs leave as f32.
        reference: numpy, float64; takes attributes and the given inputs by name, gives every output.
        check: raises UsageError for a combination of attributes and given inputs that has no meaning.
        bind: binds letters that no shape word can express.
        plugin_version: another where a plugin of the version before would take the same tensors for something else: TensorRT then refuses
            engines that were built with that.
    """

    name: str
    doc: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    attributes: tuple[Attribute, ...]
    emit: Emit
    reference: Reference
    check: Check | None = None
    bind: Bind | None = None
    plugin_version: str = "1"

    @property
    def plugin_attributes(self) -> dict[str, str]:
        """The values of `PLUGIN_ATTRIBUTES`."""
        return {"plugin_version": self.plugin_version, "plugin_namespace": DOMAIN}

    def complete(self, given: Mapping[str, object], where: str) -> Attributes:
        """``given`` with defaults for what is missing; raises UsageError for what is unknown, missing or wrong."""
        known = {attribute.name for attribute in self.attributes}
        unknown = sorted(set(given) - known - set(PLUGIN_ATTRIBUTES))
        if unknown:
            raise UsageError(
                f"{where}: {self.name} has no attribute {', '.join(unknown)}; it has {', '.join(sorted(known))}"
            )
        missing = [a.name for a in self.attributes if a.default is None and a.name not in given]
        if missing:
            raise UsageError(f"{where}: {self.name} needs the attribute {', '.join(missing)}")
        return Attributes({a.name: a.check(given.get(a.name, a.default), where) for a in self.attributes})

    def node_attributes(self, node: onnx.NodeProto) -> Attributes:
        """All attributes of ``node``."""
        return self.complete({a.name: _attribute_value(a) for a in node.attribute}, _where(node))

    def given_inputs(self, node: onnx.NodeProto) -> dict[str, str]:
        """Formal name: value name, of the inputs that ``node`` has."""
        if len(node.input) > len(self.inputs):
            raise BadModelError(f"{_where(node)}: {len(node.input)} inputs, {self.name} has {len(self.inputs)}")
        return {formal.name: name for formal, name in zip(self.inputs, node.input, strict=False) if name}

    def given_outputs(self, node: onnx.NodeProto) -> dict[str, str]:
        """Formal name: value name, of the outputs that ``node`` has."""
        if len(node.output) > len(self.outputs):
            raise BadModelError(f"{_where(node)}: {len(node.output)} outputs, {self.name} has {len(self.outputs)}")
        return {formal.name: name for formal, name in zip(self.outputs, node.output, strict=False) if name}

    def validate(self, attributes: Attributes, given: frozenset[str], where: str) -> None:
        """Raise UsageError where a required input is missing or the combination has no meaning."""
        missing = [i.name for i in self.inputs if not i.optional and i.name not in given]
        if missing:
            raise UsageError(f"{where}: {self.name} needs the input {', '.join(missing)}")
        if self.check is not None:
            try:
                self.check(attributes, given)
            except UsageError as error:
                raise UsageError(f"{where}: {error}") from None

    def variant(self, node: onnx.NodeProto) -> str:
        """The overload name: the facts that tell variants apart at a glance, and a hash of all of them."""
        attributes = self.node_attributes(node)
        given = frozenset(self.given_inputs(node))
        self.validate(attributes, given, _where(node))
        facts = [dict(sorted(attributes.items())), sorted(given), len(node.output)]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
        shown = [attributes.text(name) for name in ("row_format", "index_format") if name in attributes]
        letters = {"page_size": "p", "num_heads": "h", "kv_lora_rank": "r", "top_k": "k"}
        shown += [f"{letter}{attributes[name]}" for name, letter in letters.items() if name in attributes]
        shown += [name for name in ("indices", "sinks", "page_copies") if name in given]
        return "_".join([*shown, digest])

    def function(self, node: onnx.NodeProto) -> onnx.FunctionProto:
        """The function body of the variant of ``node``. It declares all inputs and uses those that the node gives."""
        attributes = self.node_attributes(node)
        given = frozenset(self.given_inputs(node))
        body = Body()
        values: dict[str, Value] = {}
        first_float: Value | None = None
        for formal in self.inputs:
            if formal.name not in given:
                continue
            value = body.input(formal.name, _FIXED.get(formal.kind, TensorProto.UNDEFINED))
            if formal.kind == F and first_float is None:
                first_float = value
            values[formal.name] = value.cast(FLOAT) if formal.kind in (F, WEIGHT, E4M3) else value
        results = self.emit(body, attributes, values)
        declared = self.outputs[: len(node.output)]
        outputs: dict[str, Value] = {}
        for output in declared:
            result = results[output.name]
            if output.kind == F and first_float is not None:
                result = body.op("CastLike", result, first_float, dtype=first_float.dtype)
            outputs[output.name] = result
        formals = [formal.name for formal in self.inputs]
        # names are unique within a function, and MlaSparseAttention has an input and an output that are both called
        # indices
        outputs = {f"{name}_out" if name in formals else name: value for name, value in outputs.items()}
        return helper.make_function(
            DOMAIN,
            self.name,
            formals,
            list(outputs),
            body.finish(outputs, set(formals)),
            [helper.make_opsetid("", OPSET)],
            attributes=[*(attribute.name for attribute in self.attributes), *PLUGIN_ATTRIBUTES],
            doc_string=self.doc.strip().splitlines()[0],
            overload=self.variant(node),
        )

    def infer(self, node: onnx.NodeProto, input_types: Sequence[TensorType | None]) -> list[TensorType]:
        """Types of the node's outputs, in order.

        Args:
            input_types: one entry for each input of the node; None where the input is absent or its type unknown.

        Raises:
            BadModelError: types or shapes that contradict the contract.
        """
        where = _where(node)
        attributes = self.node_attributes(node)
        self.validate(attributes, frozenset(self.given_inputs(node)), where)
        dims = Dimensions(where)
        for attribute in self.attributes:
            if attribute.letter is not None:
                dims.bind(attribute.letter, attributes.integer(attribute.name), attribute.name)
        types = {f.name: t for f, t in zip(self.inputs, input_types, strict=False) if t is not None}
        first_float: int | None = None
        for formal in self.inputs:
            if formal.name not in types:
                continue
            allowed = _TYPES[formal.kind]
            if allowed is not None and types[formal.name].dtype not in allowed:
                found = TensorProto.DataType.Name(types[formal.name].dtype)
                raise BadModelError(f"{where}: {formal.name} is {found}, must be {formal.kind}")
            if formal.kind == F and first_float is None:
                first_float = types[formal.name].dtype
        if self.bind is not None:
            self.bind(dims, types)
        for _ in range(2):  # a sum of letters can be checked once a later input has bound them
            for formal in self.inputs:
                if formal.name in types and formal.shape is not None:
                    dims.unify(formal.shape, types[formal.name].shape, formal.name)
        results = []
        for output in self.outputs[: len(node.output)]:
            dtype = _FIXED.get(output.kind, FLOAT if first_float is None else first_float)
            results.append(TensorType(int(dtype), tuple(dims.evaluate(word) for word in output.shape.split())))
        return results


def _where(node: onnx.NodeProto) -> str:
    return f"node '{node.name}' ({node.op_type})" if node.name else node.op_type


def _attribute_value(attribute: onnx.AttributeProto) -> object:
    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value
