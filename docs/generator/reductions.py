"""The map of reductions: which technique, under which setting, is exactly which other one, as an SVG.

Every connected part of the graph is laid out in layers from the general (left) to the special (right), after Sugiyama,
Tagawa and Toda: layers by the longest path, invisible points where an arrow passes a layer, order within a layer by the
neighbours' mean position. The parts stand below each other. Sizes are in SVG pixels.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape

HEIGHT, PADDING = 34, 12  # of a box, and the space left and right of its text
WIDE, NARROW = 9.0, 7.2  # capitals, and other letters
LAYER_GAP, BOX_GAP, POINT_GAP, PART_GAP = 70, 10, 14, 34
SWEEPS = 12


@dataclass(frozen=True)
class Reduction:
    """``source``, under ``setting``, is exactly ``target``."""

    source: str
    target: str
    setting: str


@dataclass(frozen=True)
class Box:
    """What a node of the map shows: a name, a line below it, where it leads ("" for nowhere), and its CSS class."""

    name: str
    below: str
    href: str
    kind: str


@dataclass
class _Node:
    name: str  # "" for a point at which an arrow passes a layer
    layer: int
    y: float = 0.0

    @property
    def room(self) -> float:
        return HEIGHT + BOX_GAP if self.name else POINT_GAP


@dataclass(frozen=True)
class _Part:
    layers: list[list[_Node]]
    paths: dict[tuple[str, str], list[_Node]]  # arrow -> the nodes that it passes

    @property
    def nodes(self) -> list[_Node]:
        return [node for layer in self.layers for node in layer]


def connected_parts(edges: Iterable[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Groups arrows into connected parts, the largest first."""
    part_of: dict[str, list[tuple[str, str]]] = {}
    for edge in edges:
        first, second = (part_of.get(name, []) for name in edge)
        merged = first + [e for e in second if second is not first] + [edge]
        for name in {name for e in merged for name in e}:
            part_of[name] = merged
    parts = {id(part): part for part in part_of.values()}
    return sorted(parts.values(), key=lambda part: (-len(part), min(part)))


def layers_of(edges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Name -> layer, such that arrows lead to higher layers; of two that lead in a circle one leads back.

    A node without a predecessor stands one layer before its first successor.
    """
    after: dict[str, list[str]] = defaultdict(list)
    before: dict[str, list[str]] = defaultdict(list)
    for source, target in edges:
        after[source].append(target)
        before[target].append(source)
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        seen.add(name)
        for target in sorted(after[name]):
            if target not in seen:
                visit(target)
        order.append(name)

    names = sorted({*after, *before})
    for name in sorted(names, key=lambda name: (len(before[name]), name)):
        if name not in seen:
            visit(name)
    rank = {name: i for i, name in enumerate(reversed(order))}
    layer = dict.fromkeys(names, 0)
    for name in reversed(order):
        for target in after[name]:
            if rank[target] > rank[name]:
                layer[target] = max(layer[target], layer[name] + 1)
    for name in order:
        if not before[name]:
            layer[name] = min(layer[target] for target in after[name]) - 1
    least = min(layer.values())
    return {name: number - least for name, number in layer.items()}


def _lay_out(edges: list[tuple[str, str]]) -> _Part:
    layer = layers_of(edges)
    layers: list[list[_Node]] = [[] for _ in range(max(layer.values()) + 1)]
    nodes = {name: _Node(name, number) for name, number in sorted(layer.items())}
    for node in nodes.values():
        layers[node.layer].append(node)
    paths = {}
    for source, target in edges:
        start, end = nodes[source], nodes[target]
        step = 1 if end.layer > start.layer else -1
        points = [_Node("", number) for number in range(start.layer + step, end.layer, step)]
        for point in points:
            layers[point.layer].append(point)
        paths[source, target] = [start, *points, end]
    part = _Part(layers, paths)
    _order(part)
    _place(part)
    return part


def _neighbours(part: _Part) -> dict[int, list[_Node]]:
    found: dict[int, list[_Node]] = defaultdict(list)
    for path in part.paths.values():
        for one, other in itertools.pairwise(path):
            found[id(one)].append(other)
            found[id(other)].append(one)
    return found


def _mean(neighbours: list[_Node], default: float) -> float:
    return sum(n.y for n in neighbours) / len(neighbours) if neighbours else default


def _order(part: _Part) -> None:
    """Sorts each layer by the mean position of the neighbours in the layer before, then after, several times."""
    neighbours = _neighbours(part)
    for layer in part.layers:
        for i, node in enumerate(layer):
            node.y = i
    count = len(part.layers)
    for sweep in range(SWEEPS):
        for number in range(1, count) if sweep % 2 == 0 else range(count - 2, -1, -1):
            side = number - 1 if sweep % 2 == 0 else number + 1
            layer = part.layers[number]
            layer.sort(key=lambda n: _mean([m for m in neighbours[id(n)] if m.layer == side], n.y))
            for i, node in enumerate(layer):
                node.y = i


def _place(part: _Part) -> None:
    """Gives each node its height: as near to its neighbours as the order and the space between boxes allow."""
    neighbours = _neighbours(part)
    for layer in part.layers:
        _spread(layer, [0.0] * len(layer))
    for _ in range(SWEEPS):
        for layer in [*part.layers, *reversed(part.layers)]:
            _spread(layer, [_mean(neighbours[id(node)], node.y) for node in layer])
    top = min(node.y - HEIGHT / 2 for node in part.nodes)
    for node in part.nodes:
        node.y -= top


def _spread(layer: list[_Node], wanted: list[float]) -> None:
    """Least-squares heights in the given order with enough room between neighbours (pool adjacent violators)."""
    offsets = [0.0]
    for above, below in itertools.pairwise(layer):
        offsets.append(offsets[-1] + (above.room + below.room) / 2)
    blocks: list[tuple[float, int]] = []  # sum of what the members want, number of members
    for wish, offset in zip(wanted, offsets, strict=True):
        total, count = wish - offset, 1
        while blocks and blocks[-1][0] / blocks[-1][1] >= total / count:
            total, count = total + blocks[-1][0], count + blocks[-1][1]
            blocks.pop()
        blocks.append((total, count))
    heights = [total / count for total, count in blocks for _ in range(count)]
    for node, height, offset in zip(layer, heights, offsets, strict=True):
        node.y = height + offset


def draw(reductions: Iterable[Reduction], boxes: Mapping[str, Box]) -> str:
    """Draws the map.

    Args:
        reductions: the arrows; several between the same two are drawn once.
        boxes: name of a node -> what it shows.

    Returns:
        An ``<svg>`` element without colours: those come from the style sheet, through the classes of the boxes.
    """
    settings: dict[tuple[str, str], str] = {}
    for reduction in reductions:
        edge = (reduction.source, reduction.target)
        settings[edge] = "; ".join(filter(None, [settings.get(edge, ""), reduction.setting]))
    top, width = 2.0, 0.0
    drawn: list[str] = []
    for edges in connected_parts(settings):
        part = _lay_out(edges)
        left = _lefts(part, boxes)
        for (source, target), path in part.paths.items():
            title = f"{boxes[source].name} is {boxes[target].name}: {settings[source, target]}"
            drawn.append(_arrow(path, left, boxes, top, title))
        for node in part.nodes:
            if node.name:
                drawn.append(_box(boxes[node.name], left[node.layer], node.y + top))
        top += max(node.y for node in part.nodes) + HEIGHT / 2 + PART_GAP
        width = max(width, left[-1] - LAYER_GAP)
    height = max(top - PART_GAP, 0) + 2
    head = (
        f'<svg class="reductions" xmlns="http://www.w3.org/2000/svg" role="figure" aria-label="Map of reductions" '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="-2 0 {width + 4:.0f} {height:.0f}">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0.5 8 4 0 7.5z"/></marker></defs>'
    )
    return head + "".join(drawn) + "</svg>"


def _width(box: Box) -> float:
    # Wide enough for DejaVu, which is wider than most fonts that a reader may have.
    name = sum(WIDE if letter.isupper() else NARROW for letter in box.name)
    return max(name, len(box.below) * NARROW * 0.8) + 2 * PADDING


def _lefts(part: _Part, boxes: Mapping[str, Box]) -> list[float]:
    """The left edge of each layer, and last that of the one that would come next."""
    lefts = [0.0]
    for layer in part.layers:
        lefts.append(lefts[-1] + max(_width(boxes[node.name]) for node in layer if node.name) + LAYER_GAP)
    return lefts


def _arrow(path: list[_Node], left: list[float], boxes: Mapping[str, Box], top: float, title: str) -> str:
    forward = path[-1].layer > path[0].layer
    sides = [(left[node.layer], left[node.layer + 1] - LAYER_GAP) for node in path]
    stations = [(*(side if forward else side[::-1]), node.y + top) for side, node in zip(sides, path, strict=True)]
    # From the box to the end of its layer, straight through each layer on the way, and from the end of the last to the
    # box: curves stay in the gaps between layers, where there are no boxes.
    start, end = path[0], path[-1]
    line = f"M{left[start.layer] + (_width(boxes[start.name]) if forward else 0):.1f} {stations[0][2]:.1f}"
    for (_, x, y), (enter, _, next_y) in itertools.pairwise(stations):
        middle = (x + enter) / 2
        line += f"H{x:.1f}C{middle:.1f} {y:.1f} {middle:.1f} {next_y:.1f} {enter:.1f} {next_y:.1f}"
    if not forward:
        line += f"H{left[end.layer] + _width(boxes[end.name]):.1f}"
    title = escape(title).replace("$", "&#36;")  # here it is text, not a formula
    return f'<path class="arrow" marker-end="url(#tip)" d="{line}"><title>{title}</title></path>'


def _box(box: Box, x: float, y: float) -> str:
    shape = f'<rect x="{x:.1f}" y="{y - HEIGHT / 2:.1f}" width="{_width(box):.1f}" height="{HEIGHT}" rx="5"/>'
    baseline = y - 2 if box.below else y + 4
    shape += f'<text x="{x + PADDING:.1f}" y="{baseline:.1f}">{escape(box.name)}</text>'
    if box.below:
        shape += f'<text class="below" x="{x + PADDING:.1f}" y="{y + 11:.1f}">{escape(box.below)}</text>'
    if box.href:
        shape = f'<a href="{escape(box.href)}">{shape}</a>'
    return f'<g class="box {box.kind}">{shape}</g>'
