"""Numbers on a terminal."""

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from insitu.display import Axis
from insitu.display.colours import DIVERGING, SEQUENTIAL, on, scale_of
from insitu.display.labels import alike, number, shortened, visible, width, wrapped
from insitu.display.table import kept
from insitu.methods import Result
from tests.display.gallery import ODD, TOWER, counted, results


def lines(result: Result, room: int) -> list[str]:
    console = Console(width=room, color_system=None)
    with console.capture() as captured:
        console.print(result)
    return [line.rstrip() for line in captured.get().splitlines()]


@pytest.mark.parametrize("room", [32, 60, 80, 140])
@pytest.mark.parametrize("name", [*results()])
def test_no_line_is_wider_than_the_terminal_or_folded(name: str, room: int) -> None:
    shown = lines(results()[name], room)
    assert max(cell_len(line) for line in shown) <= room
    result = results()[name]
    if len(result.axes) == 2:
        rows = min(len(result.axes[0]), 40)
        assert len([line for line in shown if line]) <= rows + 10


def test_a_table_says_what_it_left_out() -> None:
    shown = lines(results()["long_prompt"], 60)
    assert shown[-1].startswith("shown: ")
    assert shown[-1].endswith(" of 150 positions")
    assert lines(results()["neurons"], 80)[-1] == "and 492 more"
    assert lines(results()["head_grid"], 80)[-1] == "the largest of 700 numbers"
    assert not any("shown" in line for line in lines(results()["attention"], 100))


def test_axes_of_one_entry_stand_in_the_title() -> None:
    values = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    axes = (Axis("layer", ("4",)), Axis("head", ("7",)), counted("query", 2), counted("key", 2))
    assert [line.split() for line in lines(Result("T", "q", values, axes), 60)] == [
        ["T,", "layer", "4,", "head", "7"],
        ["q"],
        ["query", "0", "1"],
        ["0", "1.00", "2.00"],
        ["1", "3.00", "4.00"],
    ]


def test_layers_go_up_and_every_number_is_in_its_place() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    result = Result("T", "q", values, (counted("layer", 2), Axis("position", ("a", " b"))))
    assert [line.split() for line in lines(result, 60)[2:]] == [
        ["layer", "a", "·b"],
        ["1", "3.00", "4.00"],
        ["0", "1.00", "2.00"],
    ]
    turned = Result("T", "q", values.T, result.axes[::-1])
    assert lines(turned, 60) == lines(result, 60)


def test_one_axis_is_ranked_with_those_far_below_the_centre_too() -> None:
    values = torch.tensor([0.5, -2.0, float("nan"), 1.0])
    result = Result("T", "q", values, (Axis("position", TOWER[:4]),), centre=0.0)
    shown = [line.split() for line in lines(result, 60)[2:]]
    assert [row[2] for row in shown] == ["el", "The", "·E"]
    assert len(shown[2][4]) > len(shown[0][4]) > len(shown[1][4])


def test_the_top_of_many_axes_is_where_the_numbers_are() -> None:
    values = torch.zeros(2, 3, 4)
    values[1, 2, 3], values[0, 1, 2] = 9.0, 7.0
    axes = (counted("layer", 2), counted("head", 3), Axis("position", TOWER[:4]))
    shown = [line.split() for line in lines(Result("T", "q", values, axes), 60)[2:]]
    assert shown[:3] == [
        ["layer", "head", "position"],
        ["1", "2", "3", "el", "9"],
        ["0", "1", "2", "iff", "7"],
    ]


def test_tokens_are_no_markup_and_no_control_characters() -> None:
    axes = (counted("layer", 2), Axis("position", ("[bold]", "\x1b[31m", "[/]")))
    shown = "\n".join(lines(Result("[red]T", "q", torch.rand(2, 3), axes), 100))
    assert "\x1b" not in shown
    assert "[bold]" in shown
    assert "[red]T" in shown


def test_what_is_kept_of_many_is_the_beginning_and_the_end() -> None:
    assert kept(3, 3) == [0, 1, 2]
    assert kept(9, 5) == [0, 1, None, 7, 8]
    assert kept(9, 1) == [0, None]


def test_numbers_of_a_table_have_as_many_decimals_each() -> None:
    write = alike([0.5, -12.34, float("nan")])
    assert [write(v) for v in (0.5, -12.34, -0.001, float("nan"))] == ["0.5", "-12.3", "0.0", ""]
    assert alike([0.02])(0.0123) == "0.012"
    assert alike([1234.0])(12.3) == "12"
    assert alike([1e9])(1e9) == number(1e9) == "1.00e9"
    assert alike([])(0.0) == "0.00"


def test_labels_show_what_is_in_them() -> None:
    assert [visible(token) for token in (" a b", "\n", "\x00", "")] == ["·a·b", "↵", "\\x00", "''"]
    assert shortened("abcdef", 4) == "abc…"
    assert shortened("東京都", 4) == "東…"
    assert [width(text) for text in ("abc", "東京", "e\u0301")] == [3, 4, 1]
    assert wrapped("one two three", 7) == ["one two", "three"]
    assert all(visible(token).isprintable() for token in ODD)


def test_a_scale_turns_at_its_centre_and_runs_as_far_to_both_sides() -> None:
    scale = scale_of([-1.0, 3.0, float("inf")], 0.0)
    assert (scale.low, scale.high) == (-3.0, 3.0)
    assert scale.colour(0.0) == DIVERGING[4]
    assert scale.colour(-9.0) == DIVERGING[0]
    plain = scale_of([2.0, 4.0], None)
    assert (plain.colour(2.0), plain.colour(4.0)) == (SEQUENTIAL[0], SEQUENTIAL[-1])
    assert scale_of([0.0], 0.0).colour(0.0) == DIVERGING[4]
    assert scale_of([float("nan")], None).high > scale_of([float("nan")], None).low
    assert plain.ticks(4) == [2.0, 2.5, 3.0, 3.5, 4.0]


@pytest.mark.parametrize("colours", [SEQUENTIAL, DIVERGING])
def test_text_can_be_read_on_every_colour(colours) -> None:
    def luminance(channels) -> float:
        linear = [
            c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in colours:
        text = luminance((0, 0, 0) if on(colour) == "#000000" else (255, 255, 255))
        light, dark = sorted((luminance(colour), text), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # of WCAG 2, level AA
