"""Pictures, looked at as they are drawn by a browser."""

import io
from collections.abc import Sequence
from pathlib import Path

import plotly
import plotly.io
import pytest
import torch
from PIL import Image

from insitu.display import Axis, circuit_figure, graph_svg
from insitu.display.circuit_picture import Arrow, Node
from insitu.display.labels import visible
from insitu.methods import Result
from tests.display.gallery import LOUVRE, ODD, TOWER, pictures, results
from tests.display.pages import Drawn, drawn, dumped, needs_chromium

pytestmark = needs_chromium

NODES = (
    Node("embedding", 0, "embedding"),
    *(Node(f"{layer}.head.{head}", layer + 1, "head") for layer in range(4) for head in range(3)),
    *(Node(f"{layer}.mlp", layer + 1, "mlp") for layer in range(4)),
    Node("logits", 5, "logits"),
)
PAIRS = [(a, b) for a in NODES for b in NODES if a.layer < b.layer][::4]
EDGES = (
    *(Arrow(a.name, b.name, (at * 7 % 11 - 5) / 5) for at, (a, b) in enumerate(PAIRS)),
    Arrow("2.head.1", "2.mlp", 1.0),
)


def recorded():
    from insitu import LanguageModel
    from tests.conftest import tiny_gpt2

    model = LanguageModel(tiny_gpt2())
    with model.trace() as tracer:
        with tracer.invoke([1, 2, 3]):
            late = model.transformer.h[2].output[0]
            (late.norm(dim=-1) / model.transformer.h[0].output[0].norm(dim=-1)).save()
        with tracer.invoke([4, 5, 6]):
            model.transformer.h[2].output[0][:, -1] = late[:, -1]
            (model.lm_head.output[0, -1] < 3).sum().save()
    return tracer.graph


@pytest.fixture(scope="module")
def figures():
    return {**pictures(), "circuit": circuit_figure(NODES, EDGES, title="A circuit of a model")}


@pytest.fixture(scope="module")
def seen(figures, tmp_path_factory) -> dict[str, Drawn]:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "plotly.js").write_text(plotly.offline.get_plotlyjs())
    parts = {
        name: figure.to_html(include_plotlyjs=False, full_html=False)
        for name, figure in figures.items()
    }
    parts["graph"] = graph_svg(recorded())
    return drawn(parts, folder, '<script src="plotly.js"></script>')


NAMES = [*results(), *("attention_text", "head_text", "signed_text", "long_text", "lines")]
NAMES += ["grouped", "sized", "narrow", "circuit", "graph"]


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_cut_off(seen, name: str) -> None:
    assert len(seen[name].texts) > 2
    assert seen[name].outside() == []


@pytest.mark.parametrize("name", NAMES)
def test_no_text_lies_on_another(seen, name: str) -> None:
    assert seen[name].overlapping() == []


def test_labels_are_tokens_with_their_spaces_also_those_that_are_there_twice(seen) -> None:
    shown = seen["patching"].said()
    for token in TOWER:
        assert visible(token) in shown
    repeated = seen["long_prompt"].said()
    assert repeated.count("↵") > 10


def test_what_looks_like_markup_is_text(seen) -> None:
    shown = seen["odd"].said()
    for token in ODD[2:]:
        assert visible(token) in shown
    assert "Odd <i>tokens</i> &amp; $x$ $y$" in shown
    assert "a < b & c" in shown


def test_texts_stand_in_the_cells_of_a_lens(seen) -> None:
    assert seen["lens"].said().count("·Paris") == 8
    assert "·Paris" not in seen["patching"].said()


def luminance(colour: Sequence[float]) -> float:
    """The relative luminance of red, green and blue from 0 to 255, by WCAG 2."""
    parts = [part / 255 for part in colour]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def channels(colour: str) -> list[float]:
    return [float(int(colour[at : at + 2], 16)) for at in (1, 3, 5)]


def test_texts_in_cells_stand_out_from_every_colour(figures) -> None:
    (cells,), axis = figures["lens"].data, figures["lens"].layout.coloraxis
    colours = torch.tensor([channels(colour) for _, colour in axis.colorscale])
    for texts, values in zip(cells.text, cells.z.tolist(), strict=True):
        for text, value in zip(texts, values, strict=True):
            place = (value - axis.cmin) / (axis.cmax - axis.cmin) * (len(colours) - 1)
            below = min(int(place), len(colours) - 2)
            behind = torch.lerp(colours[below], colours[below + 1], place - below).tolist()
            before = channels(text.removeprefix('<span style="color:'))
            dark, light = sorted([luminance(behind), luminance(before)])
            assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG's least for text of this size


def test_a_heat_map_says_infinite_numbers_as_the_table_does() -> None:
    inf = float("inf")
    axes = (Axis.of("layer", range(2)), Axis.of("head", range(2)))
    values = torch.tensor([[1.0, inf], [-inf, float("nan")]])
    (cells,) = Result("Logits", "logit", values, axes).plot().data
    assert [text.rpartition(" ")[2] for row in cells.hovertext for text in row] == [
        *("1", "inf"),
        *("-inf", ""),
    ]
    assert [cells.text[0][1], *cells.text[1]] == ["inf", "-inf", ""]
    assert [number == number for number in cells.z.ravel().tolist()] == [True, False, False, False]


def test_a_bar_of_colours_has_several_numbers() -> None:
    values = torch.tensor([[22.4, 23.0], [17.6, 16.2]])
    axes = Axis.of("layer", (4, 5)), Axis.of("head", (0, 1))
    bar = Result("Heads", "logit difference", values, axes).plot().layout.coloraxis.colorbar
    assert len(bar.tickvals) >= 3


def test_many_strengths_have_few_ticks_which_lie_flat() -> None:
    strengths = Axis.of("strength", [step / 10 for step in range(-5, 16)])
    axis = Result("Steering", "probability", torch.rand(21), (strengths,)).plot().layout.xaxis
    assert axis.tickangle == 0 and axis.tickvals is None


def test_titles_quantities_and_axes_are_written(seen) -> None:
    shown = " ".join(seen["patching"].said())
    assert "Activation patching of residual_in" in shown.replace("  ", " ")
    assert {"layer", "position"} <= set(seen["patching"].said())
    assert {"query", "key", "head 0", "head 6"} <= set(seen["head_grid"].said())
    assert {"residual_in", "attention_out", "mlp_out"} <= set(seen["sites"].said())
    assert "norm of the gradient" in seen["tokens"].said()


def test_layers_go_up_and_queries_go_down(seen) -> None:
    def middle(name: str, text: str, at: int = 0) -> float:
        box = [t for t in seen[name].texts if t.text == text and t.is_tick][at]
        return sum(y for _, y in box.corners) / 4

    assert middle("patching", "11") < middle("patching", "0")
    assert middle("attention", "The") < middle("attention", "·city")


def test_the_prompts_of_a_menu_are_shown_with_their_own_tokens(figures) -> None:
    buttons = figures["prompt_menu"].layout.updatemenus[0].buttons
    assert [button.label[:19] for button in buttons] == [
        "prompt 0: The Eiffe",
        "prompt 1: The Louvr",
        "prompt 2: The Eiffe",
    ]
    change = buttons[1].args[1]
    assert list(change["xaxis.ticktext"]) == [visible(token) for token in LOUVRE]
    assert list(change["xaxis.range"]) == [-0.5, 7.5]
    assert list(buttons[1].args[0]["visible"]) == [False, True, False]
    assert figures["prompt_menu"].data[1].z.shape == (6, 8)


def test_sizes_that_are_asked_for_are_kept(seen) -> None:
    assert (seen["sized"].width, seen["sized"].height) == (900, 500)
    assert seen["narrow"].width == 640


@pytest.mark.thorough
def test_a_page_needs_no_network(tmp_path: Path) -> None:
    path = tmp_path / "lens.html"
    results()["lens"].to_html(path)
    assert "cdn" not in path.read_text().partition("<script")[2][:200]
    page = dumped(path)
    assert page.count('class="main-svg"') >= 1
    assert ">·Paris<" in page


@pytest.mark.thorough
def test_pngs_have_their_size_and_something_in_them(figures, tmp_path: Path) -> None:
    path = tmp_path / "patching.png"
    results()["patching"].to_png(path, scale=2, width=700, height=400)
    image = Image.open(io.BytesIO(path.read_bytes()))
    assert image.size == (1400, 800)
    colours = image.convert("RGB").getcolors(2**24)
    assert len(colours) > 50
    assert max(count for count, _ in colours) < 0.8 * 1400 * 800


@pytest.mark.thorough
def test_every_kind_of_picture_can_be_a_png(figures, tmp_path: Path) -> None:
    chosen = ("lens", "head_grid", "curve", "parts", "attention_text", "circuit")
    drawn_ = [figures[name] for name in chosen]
    plotly.io.write_images(
        fig=drawn_,
        file=[tmp_path / f"{name}.png" for name in chosen],
        width=[figure.layout.width for figure in drawn_],
        height=[figure.layout.height for figure in drawn_],
    )
    for name, figure in zip(chosen, drawn_, strict=True):
        image = Image.open(io.BytesIO((tmp_path / f"{name}.png").read_bytes()))
        assert image.size == (figure.layout.width, figure.layout.height)
        assert len(image.convert("RGB").getcolors(2**24)) > 20
