import random
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from reductions import HEIGHT, Box, Reduction, _lay_out, _spread, connected_parts, draw, layers_of

CHAIN = [("a", "b"), ("b", "c"), ("a", "c"), ("d", "c")]


def test_connected_parts_are_found_whatever_the_order() -> None:
    edges = [("a", "b"), ("x", "y"), ("c", "d"), ("b", "c"), ("y", "z"), ("p", "q")]
    for seed in range(10):
        random.Random(seed).shuffle(edges)
        parts = connected_parts(edges)
        assert [len(part) for part in parts] == [3, 2, 1]
        assert [{name for e in part for name in e} for part in parts] == [set("abcd"), set("xyz"), set("pq")]
        assert sorted(e for part in parts for e in part) == sorted(edges)


def test_layers_are_longest_paths_and_sources_stand_next_to_their_target() -> None:
    assert layers_of(CHAIN) == {"a": 0, "b": 1, "c": 2, "d": 1}


def test_a_circle_has_one_arrow_that_leads_back() -> None:
    edges = [("a", "b"), ("b", "c"), ("c", "a"), ("x", "a")]
    layer = layers_of(edges)
    assert sum(layer[target] < layer[source] for source, target in edges) == 1
    assert all(layer[target] != layer[source] for source, target in edges)


def _random_edges(seed: int, nodes: int, count: int) -> list[tuple[str, str]]:
    generator = random.Random(seed)
    pairs = [tuple(sorted(generator.sample(range(nodes), 2))) for _ in range(count)]
    return [(f"n{a}", f"n{b}") for a, b in dict.fromkeys(pairs)]


@pytest.mark.parametrize("seed", range(5))
def test_no_boxes_overlap_and_arrows_pass_every_layer(seed: int) -> None:
    for edges in connected_parts(_random_edges(seed, nodes=60, count=80)):
        part = _lay_out(edges)
        assert set(part.paths) == set(edges)
        for layer in part.layers:
            assert all(below.y - above.y >= (above.room + below.room) / 2 - 1e-6 for above, below in pairwise(layer))
        for path in part.paths.values():
            assert [node.layer for node in path] == list(range(path[0].layer, path[-1].layer + 1))
        assert min(node.y for node in part.nodes) == pytest.approx(HEIGHT / 2)


def test_a_star_is_drawn_around_its_centre() -> None:
    part = _lay_out([(f"s{i}", "hub") for i in range(5)])
    heights = [node.y for node in part.layers[0]]
    assert part.layers[1][0].y == pytest.approx(sum(heights) / 5)


def test_a_tree_has_no_crossings() -> None:
    edges = [(f"leaf{i}{j}", f"branch{i}") for i in range(4) for j in range(3)] + [
        (f"branch{i}", "root") for i in range(4)
    ]
    random.Random(0).shuffle(edges)
    part = _lay_out(edges)
    for left, right in pairwise(part.layers):
        spans = [(p.y, q.y) for path in part.paths.values() for p, q in pairwise(path) if p in left and q in right]
        assert all((a[0] - b[0]) * (a[1] - b[1]) >= 0 for a in spans for b in spans)


def test_spread_moves_as_little_as_possible() -> None:
    part = _lay_out([(f"s{i}", "hub") for i in range(3)])
    layer = part.layers[0]
    _spread(layer, [0.0, 0.0, 1000.0])
    room = layer[0].room
    assert [node.y for node in layer] == pytest.approx([-room / 2, room / 2, 1000.0])


def _boxes(edges: list[tuple[str, str]]) -> dict[str, Box]:
    return {name: Box(f"<{name}>", "area", f"{name}.html", "implemented") for edge in edges for name in edge}


@pytest.mark.parametrize("edges", [CHAIN, [("a", "b"), ("b", "a")], _random_edges(0, nodes=90, count=110)])
def test_the_drawing_is_xml_with_every_box_and_arrow_inside_its_frame(edges: list[tuple[str, str]]) -> None:
    svg = ET.fromstring(draw([Reduction(a, b, "p < 1 & $x$") for a, b in edges], _boxes(edges)))
    space = "{http://www.w3.org/2000/svg}"
    left, _, width, height = map(float, svg.attrib["viewBox"].split())
    rects = svg.findall(f".//{space}rect")
    assert len(rects) == len({name for edge in edges for name in edge})
    assert sorted(a.attrib["href"] for a in svg.iter(f"{space}a")) == sorted(f"{n}.html" for n in _boxes(edges))
    for rect in rects:
        x, y, w, h = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
        assert left <= x
        assert x + w <= left + width
        assert y >= 0
        assert y + h <= height
    arrows = svg.findall(f"{space}path[@class='arrow']")
    assert len(arrows) == len(set(edges))
    assert all("p < 1 & $x$" in (arrow.findtext(f"{space}title") or "") for arrow in arrows)


def test_an_arrow_begins_at_its_source_and_ends_at_its_target() -> None:
    svg = draw([Reduction("a", "b", "s")], _boxes([("a", "b")]))
    (x1, w1), (x2, _) = [
        (float(x), float(w)) for x, w in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)
    ]
    path = re.search(r'marker-end="[^"]+" d="M([\d.]+) [\d.]+H[\d.]+C.* ([\d.]+) [\d.]+"', svg)
    assert path is not None
    assert float(path[1]) == pytest.approx(x1 + w1, abs=0.11)
    assert float(path[2]) == pytest.approx(x2, abs=0.11)


def test_settings_between_the_same_two_share_an_arrow() -> None:
    svg = draw([Reduction("a", "b", "first"), Reduction("a", "b", "second")], _boxes([("a", "b")]))
    assert svg.count('class="arrow"') == 1
    assert "first; second" in svg


def test_the_source_is_text_that_no_formula_is_looked_for_in() -> None:
    assert "$" not in draw([Reduction("a", "b", "$x$")], _boxes([("a", "b")]))
