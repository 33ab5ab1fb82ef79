"""Draws one attention layer of an export before and after lowering: `python docs/draw_graphs.py [EXPORT.onnx]`.

Left in before_after.svg, every node between the first layer's input norm and its output projection, with the mask and
rope subgraphs that feed them; right, the same stretch of the lowered graph. Nodes are counted without constants.
"""

import sys
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np
from onnx import GraphProto, NodeProto, load

from mla_trt.lowering import LowerOptions, lower
from mla_trt.ops import OPS

EXAMPLE = Path(__file__).parents[1] / "models/examples/deepseek_v3__dynamo_op20__eager__dec.onnx"
WIDTH, HEIGHT, TOP, BOTTOM = 1200, 1180, 66, 52
NORM_OPS = ("Pow", "ReduceMean", "RMSNormalization", "SimplifiedLayerNormalization")
SMALL, CHARACTER = 9.5, 0.63  # letters of a port's name; width of a character, in font sizes
BOLD, DASHED, START = ' font-weight="bold"', ' stroke-dasharray="3 2"', ' text-anchor="start"'
KINDS = {  # legend, fill, border
    "projection": ("projection MatMul", "#c9dcfa", "#3f74c9"),
    "norm": ("norm", "#d6ebcf", "#5b9a49"),
    "rope": ("rope arithmetic", "#fde0bd", "#d08a2c"),
    "cache": ("cache concat", "#f6c5cc", "#c64a5a"),
    "mask": ("mask", "#e6d3f3", "#8f5bb5"),
    "scores": ("scores, softmax", "#fbefa0", "#b39a17"),
    "movement": ("K assembly, data movement", "#c8ebe9", "#3f9c98"),
    "shape": ("shape arithmetic", "#e1e4e9", "#8b929d"),
    "fused": ("mla-trt op", "#24509c", "#16356b"),
    "end": ("input, output", "#ffffff", "#9aa1ac"),
}


@dataclass(eq=False)
class Box:
    """A node, an end of the stretch, or (no label) a bend of an edge; `x`, `y` are its centre."""

    label: str = ""
    kind: str = ""
    width: float = 2.0
    height: float = 0.0
    level: int = 0
    x: float = 0.0
    y: float = 0.0
    ports: dict[str, float] = field(default_factory=dict)  # how far from the centre each named input enters
    notes: list[str] = field(default_factory=list)  # text under the label


Edge = tuple[Box, Box, float]  # from the bottom of one to the top of another, so far beside its centre


def stretch(graph: GraphProto, start: str, end: str) -> list[NodeProto]:
    """The nodes that `end` needs when `start` is given: in graph order, without constants."""
    needed, found = {end}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output) and start not in node.output and node.op_type != "Constant":
            needed.update(node.input)
            found.append(node)
    return found[::-1]


def bounds(original: GraphProto, lowered: GraphProto) -> tuple[str, str, str]:
    """The first layer's normed input, and what its o_proj reads in the original and in the lowered graph."""
    producers = {name: node for node in lowered.node for name in node.output}
    attention = next(node for node in lowered.node if node.op_type in ("MlaAttention", "MlaSparseAttention"))
    down, o_proj = producers[attention.input[1]], attention
    while down.op_type != "MatMul":
        down = producers[down.input[0]]
    while o_proj.op_type != "MatMul":
        o_proj = next(node for node in lowered.node if o_proj.output[0] in node.input)
    ends = [node.input[0] for node in original.node if node.name == o_proj.name]
    if not ends or all(down.input[0] not in node.output for node in original.node):
        raise SystemExit("the layer's ends have other names in the lowered graph: cannot line the two up")
    return down.input[0], ends[0], o_proj.input[0]


def classify(graph: GraphProto, nodes: list[NodeProto], start: str) -> list[str]:
    """The kind of each node."""
    inputs, weights = {i.name for i in graph.input}, {i.name for i in graph.initializer if len(i.dims) == 2}
    producers = {name: i for i, node in enumerate(nodes) for name in node.output}
    before = [[producers[name] for name in node.input if name in producers] for node in nodes]
    after = [[j for j, sources in enumerate(before) if i in sources] for i in range(len(nodes))]
    kinds, data = [""] * len(nodes), [start in node.input for node in nodes]
    for i, node in enumerate(nodes):
        above, op, data[i] = {kinds[j] for j in before[i]}, node.op_type, data[i] or any(data[j] for j in before[i])
        rules = {
            "fused": node.domain == "mla_trt",
            "projection": op == "MatMul" and node.input[1] in weights,
            "scores": op in ("MatMul", "Softmax", "Attention") or ("scores" in above and op in ("Mul", "Div", "Add")),
            "cache": op == "Concat" and not inputs.isdisjoint(node.input),
            "norm": op in NORM_OPS or ("norm" in above and op in ("Add", "Sqrt", "Reciprocal", "Div", "Mul")),
            "shape": op == "Shape" or (above == {"shape"} and op != "ConstantOfShape"),
            "rope": op in ("Cos", "Sin") or above == {"rope"} or ("rope" in above and op in ("Mul", "Add", "Sub")),
        }
        kinds[i] = next((kind for kind, holds in rules.items() if holds), "movement")
    for i in reversed(range(len(nodes))):  # what only the mask, the angles or the rotation needs
        below = {kinds[j] for j in after[i]}
        if kinds[i] in ("movement", "shape") and not data[i] and below in ({"mask"}, {"scores"}):
            kinds[i] = "mask"
        elif kinds[i] == "movement" and below == {"rope"} and (not data[i] or nodes[i].op_type == "Slice"):
            kinds[i] = "rope"
    return kinds


def build(graph: GraphProto, start: str, end: str, size: float) -> tuple[list[Box], list[Edge], int]:
    """Boxes and edges of a stretch in letters of `size`, with the number of its nodes."""
    nodes = stretch(graph, start, end)
    inputs, outputs = {item.name for item in graph.input}, {item.name for item in graph.output}
    boxes: list[Box] = []  # each after what it reads
    edges: list[Edge] = []

    def add(label: str, kind: str) -> Box:
        boxes.append(Box(label, kind, len(label) * size * CHARACTER + 0.9 * size, 1.75 * size))
        return boxes[-1]

    made = {start: add("output of the input norm", "end")}
    for node, kind in zip(nodes, classify(graph, nodes, start), strict=True):
        attention = kind == "fused" and node.op_type.endswith("Attention")
        made |= {name: add(name, "end") for name in node.input if name in inputs - made.keys() and not attention}
        box = add(node.op_type, kind)
        if attention:  # named inputs; those that other nodes make are drawn, the others written
            formal = {item.name: name for item, name in zip(OPS[node.op_type].inputs, node.input, strict=False) if name}
            drawn = [name for name, value in formal.items() if value in made.keys() - inputs]
            widths = np.array([len(name) * SMALL * CHARACTER + 9 for name in drawn])
            box.width, box.height = float(widths.sum()) + 8, 96
            box.ports = dict(zip(drawn, (np.cumsum(widths) - widths / 2 - widths.sum() / 2).tolist(), strict=True))
            given = [name for name, value in formal.items() if value in inputs]
            box.notes = ["weights: " + ", ".join(name for name in formal if name not in drawn + given)]
            box.notes.append("inputs of the model: " + ", ".join(given))
            edges += [(made[formal[name]], box, shift) for name, shift in box.ports.items()]
        else:
            edges += dict.fromkeys((made[name], box, 0.0) for name in node.input if name in made)
        made |= dict.fromkeys(node.output, box)
        edges += [(box, add(name, "end"), 0.0) for name in node.output if name in outputs]
    edges.append((made[end], add("o_proj", "end"), 0.0))
    early = {boxes[0]}  # what comes from the layer's input lies as high as it can; mask, angles and shapes as low
    for box in boxes:
        sources = [source for source, target, _ in edges if target is box]
        box.level = 1 + max((source.level for source in sources), default=-1)
        early |= {box} if early.intersection(sources) else set()
    for box in (box for box in reversed(boxes) if box not in early):
        box.level = min((target.level - 1 for source, target, _ in edges if source is box), default=box.level)
    return boxes, edges, len(nodes)


def place(boxes: list[Box], edges: list[Edge], left: float, right: float, gap: float) -> list[list[Edge]]:
    """Places the boxes between `left` and `right`; each edge comes back in pieces, from level to level."""
    routes = []
    for source, target, shift in edges:  # bends where an edge passes a level
        stops = [source, *(Box(level=level) for level in range(source.level + 1, target.level)), target]
        routes.append([(a, b, shift if b is target else 0.0) for a, b in pairwise(stops)])
        boxes += stops[1:-1]
    levels = [[box for box in boxes if box.level == i] for i in range(1 + max(box.level for box in boxes))]
    pieces = [piece for route in routes for piece in route]
    up = {box: [(source, -shift) for source, target, shift in pieces if target is box] for box in boxes}
    down = {box: [(target, shift) for source, target, shift in pieces if source is box] for box in boxes}
    heights = np.array([max(box.height for box in level) for level in levels])
    space = (HEIGHT - TOP - BOTTOM - heights.sum()) / (len(levels) - 1)
    rows = TOP + np.arange(len(levels)) * space + np.cumsum(heights) - heights / 2
    for box in boxes:
        box.x, box.y = levels[box.level].index(box) * 40.0, float(rows[box.level])
    for turn in range(240):  # barycentres: from above and below in turn to find an order, then from both to straighten
        for level in levels if turn % 2 else levels[::-1]:
            sides = (up, down) if turn > 60 or turn % 8 > 5 else (up,) if turn % 2 else (down,)
            near = [[other.x + shift for side in sides for other, shift in side[box]] or [box.x] for box in level]
            wish = {box: float(np.mean(each)) for box, each in zip(level, near, strict=True)}
            level.sort(key=lambda box: box.x if turn > 60 else wish[box])
            _settle(level, [wish[box] for box in level], left, right, gap)
    return routes


def _settle(level: list[Box], wish: list[float], left: float, right: float, gap: float) -> None:
    """Places a level's boxes in their order, without overlap, with the least squared distance from their wishes."""
    widths = np.array([box.width for box in level])
    offsets = np.concatenate([[0], np.cumsum((widths[:-1] + widths[1:]) / 2 + gap)])
    blocks: list[tuple[float, int]] = []  # pool adjacent violators
    for value in np.array(wish) - offsets:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((a * m + b * n) / (m + n), m + n)]
    shifted = np.repeat([value for value, _ in blocks], [count for _, count in blocks])
    low, high = left + widths[0] / 2, right - widths[-1] / 2 - offsets[-1]
    for box, x in zip(level, np.clip(shifted, low, max(low, high)) + offsets, strict=True):
        box.x = float(x)


def text(x: float, y: float, size: float, content: str, fill: str = "#1c2430", extra: str = "") -> str:
    """One line of text, centred."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"{extra}>{escape(content)}</text>'


def rect(x: float, y: float, width: float, height: float, fill: str, border: str, extra: str = "") -> str:
    """A rounded box."""
    shape = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="4"'
    return f'<rect {shape} fill="{fill}" stroke="{border}"{extra}/>'


def draw(boxes: list[Box], routes: list[list[Edge]], size: float) -> list[str]:
    """The SVG of a placed stretch."""
    lines = ['<g fill="none" stroke="#8a93a1" stroke-width="0.8">']
    for route in routes:
        points = [(route[0][0].x, route[0][0].y + route[0][0].height / 2)]
        points += [(target.x + shift, target.y - target.height / 2) for _, target, shift in route]
        slopes = [0.0, *((c[0] - a[0]) / (c[1] - a[1]) for a, c in zip(points, points[2:], strict=False)), 0.0]
        path = "M{:.1f} {:.1f}".format(*points[0])
        for ((x, y), m), ((x2, y2), m2) in pairwise(zip(points, slopes, strict=True)):
            h = (y2 - y) / 2.5
            path += f"C{x + m * h:.1f} {y + h:.1f} {x2 - m2 * h:.1f} {y2 - h:.1f} {x2:.1f} {y2:.1f}"
        lines.append(f'<path d="{path}"/>')
    lines.append("</g>")
    for box in filter(lambda box: box.label, boxes):
        top, (_, fill, border) = box.y - box.height / 2, KINDS[box.kind]
        ink, dashed = "#ffffff" if box.kind == "fused" else "#1c2430", DASHED if box.kind == "end" else ""
        label_y, label_size = (top + 43, size + 5) if box.notes else (box.y + size * 0.36, size)
        lines.append(rect(box.x - box.width / 2, top, box.width, box.height, fill, border, dashed))
        lines.append(text(box.x, label_y, label_size, box.label, ink, BOLD if box.kind == "fused" else ""))
        lines += [text(box.x + shift, top + 14, SMALL, name, ink) for name, shift in box.ports.items()]
        lines += [text(box.x, top + y, 10.5, note, ink) for note, y in zip(box.notes, (66, 82), strict=False)]
    return lines


def main() -> None:
    """Writes docs/before_after.svg."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else EXAMPLE
    original, lowered = load(path).graph, lower(load(path), LowerOptions(), path.parent).model.graph
    start, end, lowered_end = bounds(original, lowered)
    family = 'font-family="\'DejaVu Sans\', Verdana, Helvetica, Arial, sans-serif" text-anchor="middle"'
    frame = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" {frame} {family}>', rect(0, 0, WIDTH, HEIGHT, "#fff", "none")]
    sides = ("As exported", original, end, 9.5, 14, 650), ("Lowered", lowered, lowered_end, 11.5, 672, 1186)
    for title, graph, last, size, left, right in sides:
        boxes, edges, count = build(graph, start, last, size)
        caption = text((left + right) / 2, 38, 19, f"{title}: {count} nodes", extra=BOLD)
        svg += [rect(left, 10, right - left, HEIGHT - BOTTOM + 2, "#fafbfc", "#dfe3e8"), caption]
        svg += draw(boxes, place(boxes, edges, left + 10, right - 10, 7), size)
    x = 30.0
    for legend, fill, border in KINDS.values():
        svg += [rect(x, HEIGHT - 26, 12, 12, fill, border), text(x + 17, HEIGHT - 16, 9.5, legend, extra=START)]
        x += 40 + len(legend) * 9.5 * 0.58
    Path(__file__).with_name("before_after.svg").write_text("\n".join([*svg, "</svg>", ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
