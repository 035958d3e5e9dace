"""What draws itself in a notebook: graphs, plans, and what a model wrote under some strengths."""

from html import escape

import torch
from torch import nn

from insitu import Model
from insitu.display.graph_picture import graph_svg
from insitu.display.rows import rows_html
from insitu.methods import Continuation, Steered


def test_rows_are_a_table_and_their_text_is_text() -> None:
    html = rows_html(("n", "text"), [("1", "<b>&")], {"text"}, "a < b")
    assert html.count("<tr>") == 2 and "&lt;b&gt;&amp;" in html and "a &lt; b" in html
    assert "<b>" not in html


def test_graphs_and_plans_draw_themselves_in_notebooks() -> None:
    model = Model(nn.Sequential(nn.Linear(3, 5), nn.ReLU()))
    with model.trace(torch.ones(2, 3)) as tracer:
        (model[0].output * 2).save()
    assert tracer.graph._repr_html_() == graph_svg(tracer.graph)
    assert tracer.graph._repr_html_().startswith("<svg")
    html = tracer.plan._repr_html_()
    assert html.startswith("<table>") and escape(tracer.plan.passes[0].reason) in html
    for name in ("pass", "invocations", "why"):
        assert f">{name}</th>" in html


def test_what_a_model_wrote_is_a_table_of_texts() -> None:
    ids = torch.tensor([1])
    both = Steered(
        tuple(Continuation(p, s, ids, f" <{p}> {s}") for p in (0, 1) for s in (0.0, 2.0)),
        (0.0, 2.0),
    )
    html = both._repr_html_()
    assert html.count("<tr>") == 5 and ">prompt</th>" in html
    assert all(escape(repr(one.text)) in html for one in both)
    assert ">prompt</th>" not in both.of(prompt=1)._repr_html_()
