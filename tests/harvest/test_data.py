"""What data may be, how it is cut, what is skipped, and how many tokens there are."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from insitu import LanguageModel
from insitu.graph.errors import (
    LimitError,
    LoadError,
    MissingPackageError,
    OptionError,
    PromptError,
)
from insitu.harvest import harvest, live
from insitu.harvest.data.ranges import Progress, batches, ranges
from insitu.harvest.data.sequences import Cutting, sequences
from insitu.harvest.data.tokenising import Tokenised
from insitu.harvest.layout import Place, Skipped
from insitu.harvest.running import ranges_run
from tests.conftest import tiny_gpt2
from tests.harvest.folders import each_sequence, manifest, whole
from tests.thinning import sampled

TEXTS = ["The Louvre is in Paris", "The Kremlin is in the city of Moscow", "Paris"]
SITE = "residual_out:1"


@pytest.fixture(scope="module")
def eiffel() -> LanguageModel:
    return LanguageModel("insitu/eiffel")


def stored(folder: Path) -> list[int]:
    return whole(folder)["token_ids"].tolist()


@pytest.mark.thorough
def test_every_form_of_texts_gives_the_same(eiffel: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS) + "\n\n")
    rows = "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    ids = [eiffel.tokenizer(text)["input_ids"] for text in TEXTS]
    forms = {
        "list": TEXTS, "tuple": tuple(TEXTS), "ids": ids, "tensors": [*map(torch.tensor, ids)],
        "iterable": iter(TEXTS), "txt": tmp_path / "a.txt", "text path": str(tmp_path / "a.txt"),
        "jsonl": tmp_path / "a.jsonl", "strings": tmp_path / "b.jsonl",
    }  # fmt: skip
    for name, data in forms.items():
        harvest(eiffel, data, SITE, to=tmp_path / name)
        assert stored(tmp_path / name) == [one for row in ids for one in row], name
        documents = whole(tmp_path / name)["document"]
        assert documents.bincount().tolist() == [len(row) for row in ids]


@pytest.mark.thorough
def test_tables_and_data_sets_give_the_same(eiffel: LanguageModel, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    ids = [one for text in TEXTS for one in eiffel.tokenizer(text)["input_ids"]]
    table = datasets.Dataset.from_dict({"text": TEXTS, "number": [1, 2, 3]})
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    table.to_json(tmp_path / "folder" / "a.jsonl")
    forms = {
        "parquet": tmp_path / "a.parquet", "set": table, "stream": table.to_iterable_dataset(),
        "dictionary": datasets.DatasetDict({"train": table}), "id": str(tmp_path / "folder"),
    }  # fmt: skip
    for name, data in forms.items():
        harvest(eiffel, data, SITE, to=tmp_path / name)
        assert stored(tmp_path / name) == ids, name
    harvest(eiffel, str(tmp_path / "folder"), SITE, to=tmp_path / "far", stream=True)
    assert stored(tmp_path / "far") == ids
    with pytest.raises(OptionError, match=r"no column 'texts' \(nearest: 'text'\)"):
        harvest(eiffel, table, SITE, to=tmp_path / "no", column="texts")
    with pytest.raises(OptionError, match="has the splits train, test: name one"):
        both = datasets.DatasetDict({"train": table, "test": table})
        harvest(eiffel, both, SITE, to=tmp_path / "no")
    with pytest.raises(LoadError, match="cannot be opened"):
        harvest(eiffel, "no/such-set-anywhere", SITE, to=tmp_path / "no")


def test_a_byte_order_mark_is_no_text(eiffel: LanguageModel, tmp_path: Path) -> None:
    texts = ["the Louvre", "Paris"]
    written = {"txt": "\n".join(texts), "jsonl": "\n".join(map(json.dumps, texts))}
    for kind, text in written.items():
        (tmp_path / f"a.{kind}").write_text(text, encoding="utf-8-sig")
        harvest(eiffel, tmp_path / f"a.{kind}", SITE, to=tmp_path / kind)
        assert eiffel.tokenizer.decode(whole(tmp_path / kind)["token_ids"]) == "".join(texts)


def test_padding_of_a_table_is_left_out(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {
        "input_ids": [[5, 6, 0, 0], [0, 0, 0, 7], [8, 0, 9, 1], [2, 3, 4, 5]],
        "attention_mask": [[1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1]],
    }
    table = datasets.Dataset.from_dict(columns)
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.to_json(str(tmp_path / "a.jsonl"))
    model = LanguageModel(tiny_gpt2())
    files = [tmp_path / "a.parquet", tmp_path / "a.jsonl"]
    for number, data in enumerate([table, table.to_iterable_dataset(), *files]):
        folder = tmp_path / str(number)
        harvested = harvest(model, data, SITE, to=folder, max_skipped=1)
        assert [one.document for one in harvested.skipped] == [3]
        found = [one["token_ids"].tolist() for one in each_sequence(folder)]
        assert found == [[5, 6], [7], [8, 0, 9, 1]]
        assert whole(folder)["position"].tolist() == [0, 1, 0, 0, 1, 2, 3]


def test_a_data_set_goes_on_without_being_read_again(
    eiffel: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [[1 + number % 50] * 10 for number in range(60)]
    table = datasets.Dataset.from_dict({"input_ids": rows})
    short = {"shard_tokens": 50, "to": tmp_path}
    stops = iter([False] * 6 + [True])

    class StopError(Exception):
        pass

    def stop(now: object) -> None:
        if next(stops, False):
            raise StopError

    monkeypatch.setattr("insitu.harvest.progress._EVERY", 0)
    with pytest.raises(StopError):
        harvest(eiffel, table, SITE, progress=stop, **short)
    there = len(manifest(tmp_path))
    assert 2 < there < 12
    changed = datasets.Dataset.from_dict({"input_ids": [[3] * 10, *rows[1:]]})
    with pytest.raises(LoadError, match="The data has changed"):
        harvest(eiffel, changed, SITE, **short)
    began = []
    tokenised = ranges_run.tokenised
    monkeypatch.setattr(
        ranges_run,
        "tokenised",
        lambda rows, first, how: began.append(first) or tokenised(rows, first, how),
    )
    harvest(eiffel, table, SITE, **short)
    # The first and the last shard that were there are compared, and nothing between them is read.
    assert began == [0, 5 * (there - 1), 5 * there]
    assert stored(tmp_path) == [one for row in rows for one in row]


def test_packages_that_are_missing_are_named(
    eiffel: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for data in ("some/data", tmp_path / "a.parquet"):
        with pytest.raises(MissingPackageError, match=r'pip install "insitu\[harvest\]"'):
            harvest(eiffel, data, SITE, to=tmp_path / "no")


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        (5, OptionError, "not a int"),
        ({"a": 1}, OptionError, "not a dict"),
        (torch.ones(3), OptionError, "Token ids are integers"),
        ([], PromptError, "no document that can be used"),
        ("no-such.txt", LoadError, "cannot be read"),
        (["a.txt", 3], LimitError, "it is a int"),
    ],
)
def test_what_is_no_data_is_refused(
    eiffel: LanguageModel, tmp_path: Path, data: object, error: type, said: str
) -> None:
    with pytest.raises(error, match=said):
        harvest(eiffel, data, SITE, to=tmp_path)


def test_token_ids_may_be_numbers_of_numpy(tmp_path: Path) -> None:
    harvest(LanguageModel(tiny_gpt2()), [[*np.array([5, 6])], np.array([7])], SITE, to=tmp_path)
    assert whole(tmp_path)["token_ids"].tolist() == [5, 6, 7]
    with pytest.raises(LimitError, match="no token ids"):
        harvest(LanguageModel(tiny_gpt2()), [[True, False]], SITE, to=tmp_path / "no")


def test_a_table_is_refused_and_its_column_is_taken(eiffel: LanguageModel, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"text": ["the Louvre", "Paris"], "place": [1, 2]})
    with pytest.raises(OptionError, match="give one of its columns"):
        harvest(eiffel, table, SITE, to=tmp_path)
    harvest(eiffel, table["text"], SITE, to=tmp_path)
    assert eiffel.tokenizer.decode(whole(tmp_path)["token_ids"]) == "the LouvreParis"


def test_rows_that_cannot_be_used_are_listed(eiffel: LanguageModel, tmp_path: Path) -> None:
    data = ["Paris", "", None, 3.5, [1, 2], [5, 99999], [], [1.5], "half \ud800", "Moscow", ""]
    with pytest.raises(LimitError, match=r"of 11 rows of the data cannot be used") as raised:
        harvest(eiffel, data, SITE, to=tmp_path)
    assert raised.value.limit == "max_skipped"
    harvested = harvest(eiffel, data, SITE, to=tmp_path, max_skipped=1.0)
    reasons = {one.document: one.reason for one in harvested.skipped}
    assert reasons.keys() == {1, 2, 3, 5, 6, 7, 8, 10}
    assert reasons[2] == "it is missing" and "99999" in reasons[5] and reasons[6] == "it is empty"
    assert whole(tmp_path)["document"].unique().tolist() == [0, 4, 9]


def test_errors_of_data_name_the_users_line(tmp_path: Path) -> None:
    model = LanguageModel(tiny_gpt2())
    for use in (
        lambda: harvest(model, [[]], SITE, to=tmp_path),
        lambda: next(iter(live(model, [[]], SITE, 4))),
    ):
        with pytest.raises(LimitError) as raised:
            use()
        location = raised.value.location
        assert location.file == __file__ and location.text in inspect.getsource(use)


def test_too_many_skipped_end_it_and_what_is_written_stays(
    eiffel: LanguageModel, tmp_path: Path
) -> None:
    data = [[1, 2, 3]] * 2000 + [[]] * 200 + [[1, 2]] * 500
    given = {"to": tmp_path, "shard_tokens": 900, "batch_tokens": 4096}
    with pytest.raises(LimitError, match="3 of 2003 rows"):
        harvest(eiffel, data, SITE, **given)
    assert len(manifest(tmp_path)) >= 5
    harvested = harvest(eiffel, data, SITE, max_skipped=0.1, **given)
    assert len(harvested.skipped) == 200 and harvested.tokens == 7000


@pytest.mark.parametrize("tokens", sampled([1, 13, 20, 37], [20]))
@pytest.mark.parametrize("pack", sampled([False, True], [True]))
def test_exactly_so_many_tokens(tokens: int, pack: bool, tmp_path: Path) -> None:
    model, data = LanguageModel(tiny_gpt2()), [[7] * 9, [8] * 6, [9] * 30]
    options = {"context": 8, "pack": pack, "separator": False if pack else None}
    harvested = harvest(model, data, SITE, to=tmp_path, tokens=tokens, shard_tokens=16, **options)
    whole_data = [one for row in data for one in row]
    assert harvested.tokens == harvested.rows == tokens and not harvested.ran_out
    assert stored(tmp_path) == whole_data[:tokens]


def test_data_that_is_too_short_is_said(tmp_path: Path) -> None:
    harvested = harvest(LanguageModel(tiny_gpt2()), [[1, 2, 3]], SITE, to=tmp_path, tokens=10)
    assert harvested.ran_out and "3 of 10 (the data ended) tokens" in str(harvested)


def test_packed_sequences_are_full(tmp_path: Path) -> None:
    data = [[1] * 5, [2] * 3, [3] * 11]
    model = LanguageModel(tiny_gpt2())
    harvest(model, data, SITE, to=tmp_path, context=8, pack=True, separator=50)
    rows = whole(tmp_path)
    expected = [*[1] * 5, 50, *[2] * 3, 50, *[3] * 11, 50]
    assert rows["token_ids"].tolist() == expected
    assert rows["sequence"].bincount().tolist() == [8, 8, 6]
    assert rows["document"].bincount().tolist() == [6, 4, 12]
    assert rows["position"].tolist() == [*range(8), *range(8), *range(6)]


@pytest.mark.parametrize("pack", [False, True])
def test_a_first_token_is_not_put_twice(pack: bool, tmp_path: Path) -> None:
    data = [[0, 5, 6, 7, 8, 9], [5, 6], [0]]  # as tokenizers give them, whose first token is 0
    options = {"bos": True, "context": 4, "pack": pack, "separator": 3 if pack else None}
    harvest(LanguageModel(tiny_gpt2()), data, SITE, to=tmp_path, shard_tokens=4, **options)
    found = [one["token_ids"].tolist() for one in each_sequence(tmp_path)]
    counts = whole(tmp_path)["document"].bincount().tolist()
    if pack:
        assert found == [[0, 5, 6, 7], [0, 8, 9, 3], [0, 5, 6, 3], [0, 3]] and counts == [8, 4, 2]
    else:
        assert found == [[0, 5, 6, 7], [0, 8, 9], [0, 5, 6], [0]] and counts == [7, 3, 1]


def test_a_first_token_is_one_of_the_context(eiffel: LanguageModel, tmp_path: Path) -> None:
    harvest(eiffel, [[5] * 7, [6] * 2], SITE, to=tmp_path / "a", context=4, bos=True)
    rows = whole(tmp_path / "a")
    assert rows["token_ids"].tolist() == [0, 5, 5, 5, 0, 5, 5, 5, 0, 5, 0, 6, 6]
    assert rows["document"].tolist() == [0] * 10 + [1] * 3
    options = {"context": 4, "bos": True, "pack": True, "separator": False}
    harvest(eiffel, [[5] * 7, [6] * 2], SITE, to=tmp_path / "b", **options)
    rows = whole(tmp_path / "b")
    assert rows["token_ids"].tolist() == [0, 5, 5, 5, 0, 5, 5, 5, 0, 5, 6, 6]
    assert rows["document"].tolist() == [0] * 10 + [1] * 2


LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=12)


@pytest.mark.thorough
@settings(deadline=None, max_examples=200)
@given(LENGTHS, st.integers(2, 7), st.booleans(), st.booleans(), st.integers(1, 20), st.data())
def test_ranges_are_cut_the_same_from_any_place(
    lengths: list[int], context: int, pack: bool, bos: bool, shard_tokens: int, data: st.DataObject
) -> None:
    documents = [
        Tokenised(number, [number] * size) if size else Skipped(number, "it is empty")
        for number, size in enumerate(lengths)
    ]
    cutting = Cutting(context, pack, 99 if bos else None, 98 if pack else None)

    def read(place: Place) -> object:
        return sequences(iter(documents[place.document :]), cutting, place)

    if not any(lengths):
        with pytest.raises(PromptError):
            next(ranges(read, Progress(), shard_tokens, None, 1.0))
        return
    tokens = data.draw(st.none() | st.integers(1, sum(lengths)))
    found = [*ranges(read, Progress(), shard_tokens, tokens, 1.0)]
    assert [one.last for one in found] == [False] * (len(found) - 1) + [True]
    now = Progress()
    for number, one in enumerate(found):
        assert next(ranges(read, now, shard_tokens, tokens, 1.0)) == one
        assert one.shard == number and one.tokens <= shard_tokens + context
        now = now.behind(one)
    skipped = [one.document for each in found for one in each.skipped]
    if tokens is None:
        assert skipped == [number for number, size in enumerate(lengths) if not size]
    else:
        assert now.tokens <= tokens and skipped == sorted(set(skipped))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 60))
def test_batches_hold_each_sequence_once(lengths: list[int], batch_tokens: int) -> None:
    found = batches(lengths, batch_tokens)
    places = [place for batch in found for group in batch for place in group]
    assert sorted(places) == [*range(len(lengths))]
    for batch in found:
        own = [lengths[place] for group in batch for place in group]
        assert len(own) * max(own) <= batch_tokens or len(own) == 1
        assert all(len({lengths[place] for place in group}) == 1 for group in batch)
