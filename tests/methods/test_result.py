import json
import math
from dataclasses import replace
from pathlib import Path
from time import process_time

import numpy as np
import pytest
import torch

from insitu import LoadError, OptionError, ShapeError
from insitu.methods import Axis, Cell, Result

TOWER = ("The", " E", "iff", "el", " Tower")
LOUVRE = ("The", " Lou", "vre")


def counted(name: str, count: int) -> Axis:
    return Axis.of(name, range(count))


@pytest.fixture
def patching() -> Result:
    """Of one prompt: two layers by five positions, with what each number says."""
    values = torch.arange(10.0).reshape(2, 5) - 4
    texts = tuple(f"text {n}" for n in range(10))
    axes = (counted("layer", 2), Axis("position", TOWER))
    return Result(
        "Patching", "logits", values, axes, (TOWER,), texts, {"clean": torch.ones(3)}, 0.0
    )


@pytest.fixture
def ragged() -> Result:
    """Of two prompts, the second of which has three positions."""
    values = torch.arange(20.0).reshape(2, 2, 5)
    values[1, :, 3:] = math.nan
    axes = (counted("prompt", 2), counted("layer", 2), counted("position", 5))
    return Result("Lens", "nats", values, axes, (TOWER, LOUVRE))


def test_an_index_takes_the_axis_away_and_several_keep_it(patching: Result) -> None:
    row = patching.select(layer=-1)
    assert [axis.name for axis in row.axes] == ["position"]
    assert row.values.tolist() == [1, 2, 3, 4, 5]
    assert row.texts == ("text 5", "text 6", "text 7", "text 8", "text 9")
    some = patching.select(position=[4, 0], layer=slice(0, 1))
    assert some.values.tolist() == [[0, -4]]
    assert some.axis("position").labels == (" Tower", "The")
    assert some.texts == ("text 4", "text 0")
    assert some.sizes == {"layer": 1, "position": 2}


def test_labels_select_too(patching: Result) -> None:
    assert patching.select(position=" E").values.tolist() == [-3, 2]
    assert patching.select(position="iff", layer="1").values.item() == 3
    assert patching.select(position=[" Tower", 0]).values.tolist() == [[0, -4], [5, 1]]


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"head": 0}, "no axis 'head'"),
        ({"layer": 2}, "There is no layer 2: there are 0, 1"),
        ({"position": 5}, "has 5 entries: there is no 5"),
        ({"layer": [0, -3]}, r"there is no -3"),
        ({"layer": True}, "a number, a label, a slice or several of them, not True"),
        ({"position": torch.tensor([True, False])}, "or several of them, not True"),
        ({"layer": 1.5}, "a number, a label, a slice or several of them, not 1.5"),
        ({"position": " Twer"}, r"no position ' Twer' \(nearest: ' Tower'"),
    ],
)
def test_what_there_is_not_is_said(patching: Result, chosen: dict, said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        patching.select(**chosen)
    assert "test_result.py" in str(caught.value)


def test_what_is_counted_goes_by_its_own_numbers() -> None:
    axes = (Axis("layer", ("embedding", "3", "5")), Axis("position", ("1", "0")))
    result = Result("a", "b", torch.arange(6.0).reshape(3, 2), axes)
    assert result.select(layer=5).values.tolist() == [4, 5]
    assert result.select(layer=[5, "embedding"]).values.tolist() == [[4, 5], [0, 1]]
    assert result.select(layer=-1).values.tolist() == [4, 5]
    assert result.select(layer=slice(0, 2)).axes[0].labels == ("embedding", "3")
    assert result.select(position=0).values.tolist() == [0, 2, 4]  # its token says 1
    assert result.at(layer=0, position=1).values.item() == 1
    assert result.at(layer=-1).values.tolist() == [4, 5]
    with pytest.raises(OptionError, match="There is no layer 0: there are embedding, 3, 5"):
        result.select(layer=0)
    for wrong in (3, -4, "3", [0], slice(0, 1)):
        with pytest.raises(OptionError, match="axis 'layer' has 3 entries: there is none at"):
            result.at(layer=wrong)  # pyright: ignore


def test_places_tell_layers_apart_that_were_chosen_twice() -> None:
    result = Result("a", "b", torch.tensor([1.0, 2.0]), (Axis("layer", ("4", "4")),))
    assert [result.at(layer=place).values.item() for place in (0, 1, -1)] == [1, 2, 2]


def test_a_label_that_is_there_twice_is_no_choice() -> None:
    result = Result("a", "b", torch.zeros(2), (Axis("position", (" x", " x")),))
    with pytest.raises(OptionError, match="more than one position ' x'"):
        result.select(position=" x")


def test_a_prompt_alone_has_its_own_positions_with_its_tokens(ragged: Result) -> None:
    second = ragged.select(prompt=1)
    assert second.sizes == {"layer": 2, "position": 3}
    assert second.axis("position").labels == LOUVRE
    assert second.values.tolist() == [[10, 11, 12], [15, 16, 17]]
    assert second.tokens == (LOUVRE,)
    assert ragged.select(position=1, prompt=0).values.tolist() == [1, 6]
    assert ragged.select(prompt=1, position=" Lou").values.tolist() == [11, 16]


def test_positions_that_were_chosen_before_a_prompt_keep_their_tokens(ragged: Result) -> None:
    assert ragged.select(position=[2, 3]).select(prompt=1).axis("position").labels == ("vre",)
    both = ragged.select(prompt=[1])
    assert both.tokens == (LOUVRE,)
    assert both.select(prompt=1).axis("position").labels == LOUVRE
    assert both.select(prompt=1).values.tolist() == [[10, 11, 12], [15, 16, 17]]


def test_positions_that_a_method_was_asked_for_are_labelled_with_their_tokens() -> None:
    values = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    tokens = ((TOWER[3], TOWER[1]), (LOUVRE[2], LOUVRE[1]))
    for labels in (("3", "1"), ("1", "0"), ("-1", "-2")):
        axes = (counted("prompt", 2), Axis("position", labels))
        found = Result("Lens", "nats", values, axes, tokens)
        second = found.select(prompt=1)
        assert second.axis("position").labels == second.tokens[0] == tokens[1]
        assert second.values.tolist() == [2, 3]
        turned = found.select(position=[1, 0]).select(prompt=0)
        assert turned.axis("position").labels == (TOWER[1], TOWER[3])
        assert turned.values.tolist() == [1, 0]


def test_labels_and_numbers_of_other_libraries_choose_too(patching: Result) -> None:
    for chosen in (["1", "0"], [1, 0], torch.tensor([1, 0])):
        assert patching.select(layer=chosen, position=4).values.tolist() == [5, 0]
    assert patching.select(layer=torch.tensor(1), position=0).values.item() == 1


def test_details_are_cut_and_averaged_with_the_axes_that_they_have(ragged: Result) -> None:
    details = {
        "ids": torch.arange(60).reshape(2, 2, 5, 3),
        "clean": torch.tensor([1.0, 3.0]),
        "scale": torch.tensor(7.0),
    }
    result = replace(ragged, details=details)
    second = result.select(prompt=1)
    assert torch.equal(second.details["ids"], details["ids"][1, :, :3])
    assert (second.details["clean"], second.details["scale"]) == (3, 7)
    last = result.select(layer=-1, position=[2, 0])
    assert torch.equal(last.details["ids"], details["ids"][:, 1][:, [2, 0]])
    assert torch.equal(last.details["clean"], details["clean"])
    mean = result.mean("prompt")
    assert (mean.details["clean"], mean.details["scale"]) == (2, 7)
    assert "ids" not in mean.details and "ids" not in result.mean("layer").details
    assert torch.equal(result.mean("layer").details["clean"], details["clean"])


def test_a_mean_over_layers_leaves_each_prompt_its_tokens(ragged: Result) -> None:
    second = ragged.mean("layer").select(prompt=1)
    assert second.axis("position").labels == LOUVRE
    assert second.values.tolist() == [12.5, 13.5, 14.5]


def test_whole_numbers_have_a_mean_and_a_top() -> None:
    counts = Result("Counts", "n", torch.tensor([1, 4]), (counted("layer", 2),))
    assert counts.mean("layer").values.item() == 2.5
    assert [cell.value for cell in counts.top(1)] == [4] and counts.top(0) == []


def test_cells_of_many_numbers_take_no_time_for_each_other() -> None:
    values = torch.zeros(300, 400).T  # not contiguous
    many = Result("Zeros", "", values, (counted("a", 400), counted("b", 300)))
    begun = process_time()
    assert sum(1 for _ in many.cells()) == 120_000
    assert process_time() - begun < 5  # ten seconds where each cell copies all


def test_tokens_that_are_digits_do_not_mix_with_words_in_a_column() -> None:
    tokens = ("In", "3", "4")
    found = Result("Lens", "", torch.zeros(3), (Axis("position", tokens),), (tokens,))
    assert found.to_dataframe()["position"].tolist() == list(tokens)


def test_a_table_tells_positions_of_the_same_token_apart() -> None:
    tokens = ("a", "b", "a")
    axes = (Axis("query", tokens), Axis.of("layer", [3, 5]), Axis("key", tokens))
    values = torch.arange(18.0).reshape(3, 2, 3)
    values[1] = math.nan
    table = Result("", "", values, axes, (tokens,)).to_dataframe()
    assert [*table.columns] == ["query", "query_number", "layer", "key", "key_number", "value"]
    assert len(table) == 12
    for row in table.itertuples():
        place = row.query_number, [3, 5].index(row.layer), row.key_number
        assert values[place].item() == row.value
        assert (row.query, row.key) == (tokens[row.query_number], tokens[row.key_number])


def test_a_mean_is_of_the_values_that_are_there(ragged: Result) -> None:
    mean = ragged.mean("prompt")
    assert mean.values.tolist() == [[5, 6, 7, 3, 4], [10, 11, 12, 8, 9]]
    assert mean.tokens == ()
    assert ragged.mean("position").values.tolist() == [[2, 7], [11, 16]]
    assert [axis.name for axis in ragged.mean("layer").axes] == ["prompt", "position"]
    with pytest.raises(OptionError, match="no axis 'layr'.*nearest: 'layer'"):
        ragged.mean("layr")


def test_top_gives_the_largest_first_and_by_size_those_far_below_too(patching: Result) -> None:
    first, second = patching.top(2)
    assert first == Cell({"layer": "1", "position": " Tower"}, 5.0, "text 9")
    assert second.value == 4
    assert [cell.value for cell in patching.top(3, by_size=True)] in ([5, -4, 4], [5, 4, -4])
    assert len(patching.top(99)) == 10


def test_what_is_missing_is_neither_at_the_top_nor_a_cell(ragged: Result) -> None:
    assert len(ragged.top(99)) == 16
    assert len([*ragged.cells()]) == 16
    assert all(not math.isnan(cell.value) for cell in ragged.cells())
    lowest = ragged.top(99)[-1]
    assert lowest.value == 0


def test_a_table_has_a_row_for_each_number(ragged: Result, patching: Result) -> None:
    table = ragged.to_dataframe()
    assert list(table.columns) == ["prompt", "layer", "position", "position_number", "value"]
    assert table[table.prompt == 1].groupby("layer").value.mean().tolist() == [11, 16]
    table = patching.to_dataframe()
    assert table[table.position == " Tower"].text.tolist() == ["text 4", "text 9"]
    assert table.layer.dtype.kind == "i"


def test_a_dictionary_is_json(ragged: Result, patching: Result) -> None:
    told = json.loads(json.dumps(ragged.to_dict(), allow_nan=False))
    assert told["values"][1][0] == [10, 11, 12, None, None]
    assert told["axes"][1] == ["layer", ["0", "1"]]
    assert patching.to_dict()["details"] == {"clean": [1, 1, 1]}


def test_a_file_gives_back_what_was_written(patching: Result, tmp_path: Path) -> None:
    path = tmp_path / "patching.safetensors"
    patching.save(path)
    read = Result.load(path)
    assert torch.equal(read.values, patching.values)
    assert torch.equal(read.details["clean"], patching.details["clean"])
    for name in ("title", "quantity", "axes", "tokens", "texts", "centre"):
        assert getattr(read, name) == getattr(patching, name)


def test_a_file_keeps_what_is_not_there(ragged: Result, tmp_path: Path) -> None:
    ragged.save(tmp_path / "lens")
    read = Result.load(tmp_path / "lens")
    assert torch.equal(read.values.isnan(), ragged.values.isnan())
    assert read.centre is None


def test_something_else_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(b"no tensors")
    with pytest.raises(LoadError, match="cannot be read"):
        Result.load(path)


def test_values_and_axes_belong_together() -> None:
    with pytest.raises(ShapeError, match=r"\(2, 3\) do not have the axes layer 2, head 4") as said:
        Result("a", "b", torch.zeros(2, 3), (counted("layer", 2), counted("head", 4)))
    assert "test_result.py" in str(said.value)
    with pytest.raises(ShapeError, match="1 texts for 2 values"):
        Result("a", "b", torch.zeros(2), (counted("layer", 2),), texts=("one",))


def test_its_repr_is_a_line_that_says_what_there_is(patching: Result) -> None:
    assert repr(patching) == "<Patching: logits, layer 2 x position 5, from -4 to 5>"


def test_a_picture_of_what_it_cannot_be_is_refused(patching: Result) -> None:
    with pytest.raises(OptionError, match=r"no kind 'bar' of picture \(nearest: 'bars'"):
        patching.plot("bar")  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="no axis 'head' to draw"):
        patching.plot(x="head")
    with pytest.raises(OptionError, match="An axis has one place"):
        patching.plot(x="layer", y="layer")
    for left in ("layer", "position"):
        with pytest.raises(OptionError, match=f"beside that of its panels, '{left}'"):
            patching.plot(grid=left)
    with pytest.raises(OptionError, match="two axes or more"):
        patching.select(layer=0).plot("heat map")
    with pytest.raises(OptionError, match="no numbers to draw"):
        patching.select(layer=[]).plot()
    with pytest.raises(OptionError, match="one axis or two, and there are 3"):
        Result("a", "b", torch.zeros(1, 1, 1), tuple(counted(n, 1) for n in "xyz")).plot("bars")


def test_without_plotly_it_is_said_what_to_install(patching: Result, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r"insitu\[plot\]"):
        patching.plot()
    assert "text·3" in patching._repr_html_()  # a table, then


def test_without_chromium_it_is_said_what_to_do(patching: Result, monkeypatch, tmp_path) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", broken)
    with pytest.raises(RuntimeError, match="BROWSER_PATH"):
        patching.to_png(tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_numpy_gets_the_values(patching: Result) -> None:
    found = np.asarray(patching)
    assert found.shape == tuple(patching.values.shape) and found.dtype == np.float32
    assert np.array_equal(found, patching.values.numpy())
    assert np.asarray(patching, dtype=np.float64).dtype == np.float64
    assert np.shares_memory(found, patching.values.numpy())
    assert not np.shares_memory(np.array(patching), found)


def test_numpy_gets_numbers_that_it_has_no_type_for(patching: Result) -> None:
    found = np.asarray(replace(patching, values=patching.values.bfloat16()))
    assert found.dtype == np.float32
    assert np.array_equal(found, patching.values.bfloat16().float().numpy())
