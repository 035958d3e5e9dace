"""Probes, against scikit-learn on activations that plain hooks see."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from insitu import LanguageModel, LoadError, MissingPackageError, OptionError, PromptError
from insitu.methods import Probe, probe
from tests.conftest import hooked_hidden
from tests.fidelity.zoo import module_of
from tests.thinning import sampled, thinned

draw = torch.Generator().manual_seed(5)
PROMPTS = [
    torch.randint(1, 60, (int(torch.randint(3, 8, (1,), generator=draw)),), generator=draw).tolist()
    for _ in range(60)
]
LENGTHS = [len(ids) for ids in PROMPTS]
LATE = ["late" if ids[-1] > 30 else "early" for ids in PROMPTS]
THIRDS = [ids[-1] // 20 for ids in PROMPTS]
EVEN = [ids[:3] for ids in PROMPTS]


@pytest.fixture(params=["gpt2", "llama", "gpt-neox"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    if request.param == "gpt-neox":
        return LanguageModel(module_of(request.param))
    return request.getfixturevalue(request.param)


def seen(model: LanguageModel, layer: int, prompts: list[list[int]], position: Any) -> np.ndarray:
    path = model.blocks[layer].path
    values = [hooked_hidden(model.module, path, torch.tensor([ids]))[0] for ids in prompts]
    found = [value.mean(0) if position == "mean" else value[position] for value in values]
    return torch.stack(found).double().numpy()


def expected(inputs: np.ndarray, labels: list[Any], regression: Any, seed: int = 0):
    """The oracle: the fitted pipeline, and its scores on prompts held out and of training."""
    stratify = labels if isinstance(regression, LogisticRegression) else None
    train, test = train_test_split(
        list(range(len(labels))), test_size=0.25, random_state=seed, stratify=stratify
    )
    fitted = make_pipeline(StandardScaler(), regression)
    fitted.fit(inputs[train], [labels[n] for n in train])
    scores = [fitted.score(inputs[part], [labels[n] for n in part]) for part in (test, train)]
    return fitted, scores


def test_of_classes_that_are_as_frequent_the_first_is_the_majority(gpt2: LanguageModel) -> None:
    labels = [(8, 1)[number % 2] for number in range(59)]  # 22 of each to train on
    train, test = train_test_split(
        list(range(len(labels))), test_size=0.25, random_state=0, stratify=labels
    )
    dummy = DummyClassifier(strategy="most_frequent")
    dummy.fit([[0]] * len(train), [labels[number] for number in train])
    score = dummy.score([[0]] * len(test), [labels[number] for number in test])
    found = probe(gpt2, PROMPTS[:59], labels, layers=0).scores.details["majority"]
    assert found.tolist() == pytest.approx([score])


def test_a_probe_of_all_positions_takes_prompts_with_as_many(gpt2: LanguageModel) -> None:
    found = probe(gpt2, EVEN, LATE, positions=None)
    for prompts, count in (([7], 1), ([7, 8, 9, 10], 4)):
        with pytest.raises(PromptError, match=f"3 positions, and these prompts have {count}"):
            found.predict(gpt2, prompts)
    alone = probe(gpt2, [ids[:1] for ids in PROMPTS], LATE, positions=None)
    with pytest.raises(PromptError, match="each of 1 positions, and these prompts have 3"):
        alone.outputs(gpt2, EVEN)


@pytest.mark.parametrize(
    "model", sampled(["gpt2", "llama", "gpt-neox"], ["gpt-neox"]), indirect=True
)
@pytest.mark.parametrize("position", thinned([-1, 0, "mean"], [-1]))
@pytest.mark.parametrize(
    "labels", sampled([LATE, THIRDS], [LATE]), ids=["two classes", "three classes"]
)
def test_a_logistic_probe(model: LanguageModel, labels: list[Any], position: Any) -> None:
    found = probe(model, PROMPTS, labels, positions=position, seed=3)
    assert found.scores.sizes == {"layer": model.n_layers} and found.scores.quantity == "accuracy"
    probabilities = found.predict(model, PROMPTS)
    for layer in range(model.n_layers):
        inputs = seen(model, layer, PROMPTS, position)
        fitted, scores = expected(inputs, labels, LogisticRegression(max_iter=10_000), 3)
        assert found.scores.values[layer].item() == pytest.approx(scores[0])
        assert found.scores.details["train"][layer].item() == pytest.approx(scores[1])
        theirs = torch.tensor(fitted.predict_proba(inputs)).amax(-1).float()
        torch.testing.assert_close(
            probabilities.values[:, layer], theirs, atol=1e-4, rtol=1e-4, check_dtype=False
        )
        said = [probabilities.select(prompt=n, layer=layer).texts[0] for n in range(60)]
        clear = theirs > theirs.new_tensor(1 / len(set(labels)) + 1e-3)
        theirs_said = [str(label) for label in fitted.predict(inputs)]
        assert [a for a, c in zip(said, clear, strict=True) if c] == [
            a for a, c in zip(theirs_said, clear, strict=True) if c
        ]


@pytest.mark.parametrize("model", sampled(["gpt2", "llama", "gpt-neox"], ["llama"]), indirect=True)
def test_a_linear_probe(model: LanguageModel) -> None:
    numbers = [float(ids[-1]) for ids in PROMPTS]
    found = probe(model, PROMPTS, numbers, method="linear", penalty=0.5, layers=[0, -1])
    assert found.scores.quantity == "R²" and found.classes == ()
    predicted = found.predict(model, PROMPTS[:7])
    for number, layer in enumerate((0, model.n_layers - 1)):
        inputs = seen(model, layer, PROMPTS, -1)
        fitted, scores = expected(inputs, numbers, Ridge(alpha=0.5))
        assert found.scores.values[number].item() == pytest.approx(scores[0], abs=1e-5)
        assert found.scores.details["train"][number].item() == pytest.approx(scores[1], abs=1e-5)
        theirs = torch.tensor(fitted.predict(inputs[:7])).float()
        torch.testing.assert_close(predicted.values[:, number], theirs, atol=2e-3, rtol=1e-4)
        weights = torch.tensor(fitted[-1].coef_ / fitted[0].scale_)
        direction = found.direction(layer).double()
        torch.testing.assert_close(direction, weights / weights.norm(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["gpt2"]), indirect=True)
@pytest.mark.parametrize("position", sampled([None, [0, -2]], [[0, -2]]))
def test_several_positions_each_by_itself(language_model: LanguageModel, position: Any) -> None:
    found = probe(language_model, EVEN, LATE, positions=position, layers=[1])
    places = [0, 1, 2] if position is None else [0, 1]
    for number, place in enumerate(places):
        _, scores = expected(seen(language_model, 1, EVEN, place), LATE, LogisticRegression())
        assert found.scores.values[0, number].item() == pytest.approx(scores[0])
    assert found.scores.axis("position").labels == ("0", "1", "2")[: len(places)] or (
        found.scores.axis("position").labels == ("0", "-2")
    )
    alone = found.predict(language_model, EVEN[0])
    assert alone.sizes == {"layer": 1, "position": len(places)}
    assert found.direction(1).shape == (len(places), 16)


@pytest.mark.thorough
def test_the_embedding_tells_the_last_token_and_shuffled_labels_are_at_chance(
    gpt2: LanguageModel,
) -> None:
    """The control: with as many prompts and as large a map, nothing is found in noise."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 100, (400, 3), generator=generator).tolist()
    prompts = [[*ids[:2], 7 if ids[2] > 50 else 90] for ids in prompts]
    labels = [ids[-1] == 90 for ids in prompts]
    real = probe(gpt2, prompts, labels)
    order = torch.randperm(400, generator=generator).tolist()
    control = probe(gpt2, prompts, [labels[n] for n in order])
    assert bool((real.scores.values == 1).all())
    assert abs(control.scores.values.mean().item() - 0.5) < 0.12
    most = max(labels.count(True), labels.count(False)) / 400
    assert control.scores.details["majority"].tolist() == pytest.approx([most] * 4, abs=0.01)


@pytest.mark.parametrize("model", sampled(["gpt2", "llama", "gpt-neox"], ["llama"]), indirect=True)
@pytest.mark.parametrize("position", sampled([-1, [0, -2]], [-1]))
def test_several_sites_in_one_experiment(
    model: LanguageModel, position: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each against scikit-learn on what hooks see, widths differing."""
    traces, trace = [], LanguageModel.trace
    monkeypatch.setattr(
        LanguageModel, "trace", lambda *a, **kw: traces.append(1) or trace(*a, **kw)
    )
    found = probe(model, PROMPTS, LATE, sites=["post", "residual_out"], positions=position, seed=2)
    assert len(traces) == 1
    places = [position] if isinstance(position, int) else position
    wide = model.n_layers, len(places)
    sizes = {"site": 2, "layer": wide[0], **({} if position == -1 else {"position": 2})}
    assert found.scores.sizes == sizes and found.sites == ("post", "residual_out")
    values = found.scores.values.reshape(2, *wide)
    train = found.scores.details["train"].reshape(2, *wide)
    down = {"gpt2": "mlp.c_proj", "llama": "mlp.down_proj", "gpt_neox": "mlp.dense_4h_to_h"}
    for layer in range(model.n_layers):
        block = model.module.get_submodule(model.blocks[layer].path)
        owner = block.get_submodule(down[model.module.config.model_type])
        for at, place in enumerate(places):
            for site in (0, 1):
                inputs = seen(model, layer, PROMPTS, place)
                if site == 0:
                    inputs = given_to(model, owner, PROMPTS, place)
                fitted, scores = expected(inputs, LATE, LogisticRegression(max_iter=10_000), 2)
                assert values[site, layer, at].item() == pytest.approx(scores[0])
                assert train[site, layer, at].item() == pytest.approx(scores[1])
                one = found[("post", "residual_out")[site]]
                theirs = torch.tensor(fitted[-1].coef_[0] / fitted[0].scale_)
                ours = one.direction(layer).reshape(len(places), -1)[at].double()
                torch.testing.assert_close(ours, theirs / theirs.norm(), atol=1e-3, rtol=1e-3)


def given_to(
    model: LanguageModel, owner: torch.nn.Module, prompts: list[list[int]], position: int
) -> np.ndarray:
    kept: list[torch.Tensor] = []
    hook = owner.register_forward_pre_hook(lambda _, args: kept.append(args[0][0, position]))
    with torch.no_grad():
        for ids in prompts:
            model.module(torch.tensor([ids]))
    hook.remove()
    return torch.stack(kept).double().numpy()


def test_positions_are_numbers_also_of_numpy(gpt2: LanguageModel) -> None:
    found = probe(gpt2, EVEN, LATE, positions=np.array([0, -2]), layers=1)  # pyright: ignore
    assert found.scores.axis("position").labels == ("0", "-2") and found.positions == (0, -2)
    expected = probe(gpt2, EVEN, LATE, positions=[0, -2], layers=1)
    assert torch.equal(found.weights, expected.weights)
    assert probe(gpt2, EVEN, LATE, positions=np.int64(1), layers=1).positions == 1  # pyright: ignore
    for wrong in ("first", 1.5, [0.5], True, torch.tensor(True), torch.tensor([True, False])):
        with pytest.raises(OptionError, match="position is given|`positions` are"):
            probe(gpt2, EVEN, LATE, positions=wrong)  # pyright: ignore


def test_probes_of_sites_are_those_of_each_by_itself(gpt2: LanguageModel) -> None:
    both = probe(gpt2, PROMPTS, THIRDS, sites=("attention_out", "mlp_out"), layers=[2, 0])
    assert [one.site for one in both] == ["attention_out", "mlp_out"] and len(both) == 2
    assert both.scores.title == "Logistic probe of attention_out, mlp_out"
    alone = probe(gpt2, PROMPTS, THIRDS, sites="mlp_out", layers=[2, 0])
    assert torch.equal(both["mlp_out"].weights, alone.weights)
    part = both.scores.select(site="mlp_out")
    assert torch.equal(part.values, alone.scores.values) and part.axes == alone.scores.axes
    assert torch.equal(part.details["majority"], alone.scores.details["majority"])
    assert probe(gpt2, PROMPTS, THIRDS, sites=["mlp_out"]).scores.sizes == {"site": 1, "layer": 4}
    with pytest.raises(OptionError, match=r"no probe of 'mlp_in' \(nearest: 'mlp_out'\)"):
        both["mlp_in"]
    with pytest.raises(OptionError, match="no probe of 0, but of 'attention_out', 'mlp_out'"):
        both[0]  # pyright: ignore
    assert "mlp_out" in both and "mlp_in" not in both
    for wrong in ([], ["mlp_out", "mlp_out"], ["post", "mlp.post"]):
        with pytest.raises(OptionError, match="each named once"):
            probe(gpt2, PROMPTS, THIRDS, sites=wrong)


@pytest.mark.thorough
def test_layers_without_a_site_are_left_out() -> None:
    model = LanguageModel(module_of("jamba"))
    found = probe(model, PROMPTS, LATE, sites="attention_out")
    assert 0 < found.scores.sizes["layer"] < model.n_layers
    layer = found.layers[0]
    path = f"{model.blocks[layer].path}.self_attn"
    inputs = np.stack(
        [
            hooked_hidden(model.module, path, torch.tensor([ids]))[0, -1].double().numpy()
            for ids in PROMPTS
        ]
    )
    _, scores = expected(inputs, LATE, LogisticRegression(max_iter=10_000))
    assert found.scores.values[0].item() == pytest.approx(scores[0])


def test_directions(gpt2: LanguageModel) -> None:
    two = probe(gpt2, PROMPTS, LATE, layers=2)
    assert two.classes == ("early", "late")
    assert torch.equal(two.direction(2), two.direction(2, "late"))
    assert torch.equal(two.direction(2), -two.direction(2, "early"))
    assert two.direction(2).norm().item() == pytest.approx(1)
    scores = two.outputs(gpt2, PROMPTS)[:, 0, 0]
    late = torch.tensor([label == "late" for label in LATE])
    assert scores[late].mean() > scores[~late].mean()
    three = probe(gpt2, PROMPTS, torch.tensor(THIRDS), layers=2)
    expected = three.weights[0, 1] / three.weights[0, 1].norm()
    torch.testing.assert_close(three.direction(2, 1), expected)
    with pytest.raises(OptionError, match="name one of 0, 1, 2"):
        three.direction(2)
    with pytest.raises(OptionError, match="no class 'never', but 'early', 'late'"):
        two.direction(2, "never")
    with pytest.raises(OptionError, match="no layer 0, but 2"):
        two.direction(0)


@pytest.mark.parametrize("position", sampled([-1, [0, 1], "mean"], [-1]))
def test_saved_and_loaded(llama: LanguageModel, tmp_path: Path, position: Any) -> None:
    found = probe(llama, PROMPTS, LATE, positions=position, layers=[0, 2])
    found.save(tmp_path / "probe.safetensors")
    loaded = Probe.load(tmp_path / "probe.safetensors")
    assert loaded.scores.axes == found.scores.axes and loaded.scores.title == found.scores.title
    assert torch.equal(loaded.scores.values, found.scores.values)
    assert torch.equal(loaded.scores.details["train"], found.scores.details["train"])
    for name in ("method", "site", "layers", "classes"):
        assert getattr(loaded, name) == getattr(found, name)
    ours, theirs = found.predict(llama, PROMPTS), loaded.predict(llama, PROMPTS)
    assert torch.equal(ours.values, theirs.values) and ours.texts == theirs.texts
    with pytest.raises(LoadError, match="holds no probe, but result"):
        found.scores.save(tmp_path / "scores.safetensors")
        Probe.load(tmp_path / "scores.safetensors")


def test_mistakes(gpt2: LanguageModel) -> None:
    with pytest.raises(OptionError, match="59 labels for 60 prompts") as caught:
        probe(gpt2, PROMPTS, LATE[:-1])
    assert "test_probing.py" in str(caught.value)
    with pytest.raises(OptionError, match="one label, 'x'"):
        probe(gpt2, PROMPTS, ["x"] * 60)
    with pytest.raises(OptionError, match="not 'ridge'"):
        probe(gpt2, PROMPTS, LATE, method="ridge")
    with pytest.raises(OptionError, match="numbers as labels"):
        probe(gpt2, PROMPTS, LATE, method="linear")
    with pytest.raises(OptionError, match="`held_out` is a part"):
        probe(gpt2, PROMPTS, LATE, held_out=1.0)
    with pytest.raises(OptionError, match="cannot be divided"):
        probe(gpt2, PROMPTS[:3], ["a", "a", "b"])
    with pytest.raises(OptionError, match="no prompt with the label 'rare' is left to train on"):
        probe(gpt2, PROMPTS, ["rare"] * 2 + LATE[2:], held_out=0.9)
    with pytest.raises(PromptError, match="have 3 to 7"):
        probe(gpt2, PROMPTS, LATE, positions=None)
    with pytest.raises(OptionError, match="not 'first'"):
        probe(gpt2, PROMPTS, LATE, positions="first")
    with pytest.raises(OptionError, match="axes head, query, key"):
        probe(gpt2, PROMPTS, LATE, sites="pattern")


def test_without_scikit_learn(gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'insitu\[probe\]'"):
        probe(gpt2, PROMPTS, LATE)
    with pytest.raises(ImportError):
        probe(gpt2, PROMPTS, LATE)


def test_labels_are_plain_values_also_of_numpy_and_torch(
    gpt2: LanguageModel, tmp_path: Path
) -> None:
    """What scikit-learn makes of them is in a file that has no code, so NumPy's are no labels."""
    numbers = [ids[-1] % 2 for ids in PROMPTS]
    inputs = seen(gpt2, 1, PROMPTS, -1)
    _, scores = expected(inputs, numbers, LogisticRegression(max_iter=10_000))
    given = [np.array(numbers), torch.tensor(numbers), list(np.array(numbers))]
    for labels in (*given, [torch.tensor(number) for number in numbers]):
        found = probe(gpt2, PROMPTS, labels, layers=1)  # pyright: ignore
        assert found.scores.values.item() == pytest.approx(scores[0])
        found.save(tmp_path / "probe.safetensors")
        classes = Probe.load(tmp_path / "probe.safetensors").classes
        assert classes == (0, 1) and [type(label) for label in found.classes] == [int, int]
    texts = probe(gpt2, PROMPTS, np.array(["ab"[n] for n in numbers]), layers=1)  # pyright: ignore
    assert texts.classes == ("a", "b") and type(texts.classes[0]) is str


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"labels": torch.randn(60, 2), "method": "linear"}, "one text, number or truth value"),
        ({"labels": [(0, 1), (1, 0)] * 30}, r"for a prompt, not \(0, 1\)"),
        ({"labels": [None, "a"] * 30}, "for a prompt, not None"),
        ({"labels": [1, "a"] * 30}, "all texts or all numbers"),
        ({"labels": [0.5, 1.5] * 30}, "see `method='linear'`"),
        ({"labels": [float("nan"), 1.0] * 30, "method": "linear"}, "fitted to a label nan"),
        ({"penalty": 0}, "`penalty` is a number above 0"),
        ({"penalty": -1.0, "method": "linear", "labels": [0, 1] * 30}, "not -1.0"),
        ({"penalty": "1"}, "not '1'"),
    ],
)
def test_labels_and_penalties_that_nothing_can_be_fitted_to(
    gpt2: LanguageModel, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(OptionError, match=says):
        probe(gpt2, PROMPTS, **{"labels": LATE, **options})


def test_a_linear_probe_without_a_penalty_is_least_squares(gpt2: LanguageModel) -> None:
    numbers = [float(ids[-1]) for ids in PROMPTS]
    found = probe(gpt2, PROMPTS, numbers, method="linear", penalty=0, layers=2)
    fitted, _ = expected(seen(gpt2, 2, PROMPTS, -1), numbers, LinearRegression())
    weights = torch.tensor(fitted[-1].coef_ / fitted[0].scale_)
    torch.testing.assert_close(
        found.direction(2).double(), weights / weights.norm(), atol=1e-3, rtol=1e-3
    )
