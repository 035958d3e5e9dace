"""Recorded graphs and circuits as text and as pictures."""

import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from insitu import LanguageModel, OptionError
from insitu.display import circuit_figure, graph_mermaid, graph_svg, graph_text, write_graph
from insitu.display.circuit_picture import Arrow, Node
from insitu.display.layered import layers_of, place
from tests.display.pages import needs_chromium


@pytest.fixture
def graph(gpt2: LanguageModel):
    with gpt2.trace() as tracer:
        with tracer.invoke([1, 2, 3]):
            late = gpt2.transformer.h[2].output[0]
            late.norm(dim=-1).save()
        with tracer.invoke([4, 5, 6]):
            gpt2.transformer.h[2].output[0][:, -1] = late[:, -1]
            gpt2.transformer.h[3].output = late * 2
            (gpt2.lm_head.output[0, -1] < 3).sum().save()
    return tracer.graph


def test_a_line_a_node_says_what_it_does_with_which(graph) -> None:
    shown = [
        re.sub(r" +# test_graph_picture.py:\d+$", "", line)
        for line in graph_text(graph).split("\n")
    ]
    assert len(shown) == len(graph)
    shown = [line.strip() for line in shown]
    assert shown[:4] == [
        "%0 = invocation 0: transformer.h[2].output",
        "%1 = %0[0]",
        "%2 = %1.norm(dim=-1)",
        "%3 = %2.save()",
    ]
    assert shown[4:8] == [
        "%4 = %1[:, -1]",
        "%5 = invocation 1: transformer.h[2].output",
        "%6 = %5[0]",
        "%7: %5[0][:, -1] = %4",
    ]
    assert any(re.fullmatch(r"%\d+: %\d+ = %\d+", line) for line in shown)
    numbers = [int(n) for n in re.findall(r"# test_graph_picture.py:(\d+)", graph_text(graph))]
    assert numbers == [node.location.line for node in graph]


def test_mermaid_has_every_node_and_edge_once_and_no_bare_quotes(graph) -> None:
    lines = graph_mermaid(graph).split("\n")
    assert lines[0] == "flowchart TD"
    nodes = [line for line in lines if "[" in line]
    assert len(nodes) == len(graph)
    edges = {tuple(map(int, re.findall(r"n(\d+)", line))) for line in lines if "-->" in line}
    assert edges == {(source, at) for at, node in enumerate(graph) for source in node.inputs}
    for line in nodes:
        assert re.fullmatch(r'    n\d+\["[^"<>]*"\]:::\w+', line)
    assert any("#lt; 3" in line for line in nodes)


def test_the_picture_is_xml_with_a_box_for_every_node(graph) -> None:
    root = ElementTree.fromstring(graph_svg(graph))
    names = {"svg": "http://www.w3.org/2000/svg"}
    texts = [text.text for text in root.findall(".//svg:g/svg:text", names)]
    assert len(texts) == len(graph)
    assert "%0 = invocation 0: transformer.h[2].output" in texts
    assert any("< 3" in str(text) for text in texts)
    assert len(root.findall("svg:path", names)) == sum(len(set(n.inputs)) for n in graph)
    titles = [title.text for title in root.findall(".//svg:g/svg:title", names)]
    assert any("late.norm(dim=-1).save()" in str(title) for title in titles)


def test_of_a_large_graph_the_first_nodes_are_drawn(graph) -> None:
    drawn = graph_svg(graph, most=4)
    assert drawn.count("<g>") == 4
    assert f"and {len(graph) - 4} more" in drawn


def test_an_empty_graph_is_nothing_but_that(gpt2: LanguageModel) -> None:
    with gpt2.trace([1]) as tracer:
        pass
    assert graph_text(tracer.graph) == ""
    assert graph_mermaid(tracer.graph) == "flowchart TD"
    ElementTree.fromstring(graph_svg(tracer.graph))


def test_layers_let_every_edge_go_down_and_nodes_do_not_touch() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = torch.triu(torch.rand(30, 30, generator=generator) < 0.08, 1).nonzero().tolist()
    edges = [(a, b) for a, b in pairs]
    layers = layers_of(30, edges)
    assert all(layers[a] < layers[b] for a, b in edges)
    widths = [20.0 + 3 * n for n in range(30)]
    layout = place(layers, edges, widths, 10)
    for layer in set(layers):
        row = sorted((n for n in range(30) if layers[n] == layer), key=lambda n: layout.x[n])
        for a, b in pairwise(row):
            assert layout.x[b] - layout.x[a] >= (widths[a] + widths[b]) / 2 + 10 - 1e-6
    for (a, b), route in zip(edges, layout.routes, strict=True):
        assert (route[0], route[-1]) == (layout.x[a], layout.x[b])
        assert len(route) == layers[b] - layers[a] + 1
    assert min(layout.x[n] - widths[n] / 2 for n in range(30)) >= -1e-6
    assert max(layout.x[n] + widths[n] / 2 for n in range(30)) <= layout.width + 1e-6


def test_nodes_are_put_in_an_order_without_crossings_where_there_is_one() -> None:
    edges = [(0, 5), (1, 4), (2, 3)]
    layout = place([0, 0, 0, 1, 1, 1], edges, [10.0] * 6, 10)
    ends = sorted(edges, key=lambda edge: layout.x[edge[0]])
    assert sorted(ends, key=lambda edge: layout.x[edge[1]]) == ends


NODES = [Node("in", 0), Node("head", 1, "head"), Node("mlp", 1, "mlp"), Node("out", 2)]


def test_parts_that_lead_to_each_other_in_a_layer_stand_above_each_other() -> None:
    figure = circuit_figure(
        NODES, [Arrow("in", "head"), Arrow("head", "mlp"), Arrow("mlp", "out", -2)]
    )
    rows = {note.text: note.y for note in figure.layout.annotations if note.yref != "paper"}
    assert rows == {"in": 0, "head": 1, "mlp": 2, "out": 3}
    names = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert names == ["positive", "negative", "head", "mlp"]


def test_of_many_edges_the_strongest_are_drawn_and_that_is_said() -> None:
    edges = [Arrow("in", "head", 0.1), Arrow("head", "out", -3.0), Arrow("in", "out", 1.0)]
    figure = circuit_figure(NODES, edges, most=2)
    hovers = figure.data[-3].hovertext
    assert list(hovers) == ["head → out: score -3", "in → out: score 1"]
    assert "the 2 strongest of 3 edges" in figure.layout.annotations[-1].text.replace("<br>", " ")


@pytest.mark.parametrize(
    ("edges", "said"),
    [
        ([Arrow("in", "nowhere")], "names 'nowhere', which is no part"),
        ([Arrow("out", "in")], "from 'out' to 'in' goes back"),
        ([Arrow("head", "mlp"), Arrow("mlp", "head")], "go in a circle"),
    ],
)
def test_edges_that_are_none_of_a_circuit_are_refused(edges, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        circuit_figure(NODES, edges)
    with pytest.raises(OptionError, match="a name each"):
        circuit_figure([NODES[0], NODES[0]], [])


def test_a_graph_is_written_in_the_form_that_the_name_ends_in(graph, tmp_path: Path) -> None:
    forms = {".txt": graph_text, ".mmd": graph_mermaid, ".svg": graph_svg}
    for ending, form in forms.items():
        write_graph(graph, tmp_path / f"graph{ending}")
        assert (tmp_path / f"graph{ending}").read_text() == form(graph)
    write_graph(graph, tmp_path / "graph.html")
    assert graph_svg(graph) in (tmp_path / "graph.html").read_text()
    with pytest.raises(OptionError, match=r"ends in '.txt', .* or '.png', not '.gif'"):
        write_graph(graph, tmp_path / "graph.gif")


@pytest.mark.thorough
@needs_chromium
def test_a_graph_is_written_as_a_png_of_its_size(graph, tmp_path: Path) -> None:
    write_graph(graph, tmp_path / "graph.png")
    drawn = ElementTree.fromstring(graph_svg(graph))
    with Image.open(tmp_path / "graph.png") as image:
        assert image.size == (2 * int(drawn.attrib["width"]), 2 * int(drawn.attrib["height"]))
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20  # boxes and text
