"""Arguments of wrong kinds are refused at the user's line, with a short traceback."""

import inspect
import math
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch

import insitu.methods
from insitu import InsituError, LanguageModel
from insitu.methods import Axis, Metric, Result, SteeringVector, logit_difference, steer

FUNCTIONS = [
    getattr(insitu.methods, name)
    for name in insitu.methods.__all__
    if inspect.isfunction(getattr(insitu.methods, name))
]
RESULT = Result("r", "n", torch.arange(3.0), (Axis.of("layer", range(3)),))


def _vector() -> SteeringVector:
    return SteeringVector("residual_out", (0, 1), torch.ones(2, 4))


def _refused(function: Callable[[], Any]) -> InsituError:
    """The error of a call, which is of ours, at the line of the call, and short."""
    with pytest.raises(InsituError) as caught:
        function()
    files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
    library = os.path.dirname(insitu.__file__)
    assert sum(file.startswith(library) for file in files) <= 1, files
    assert "test_boundary.py" in str(caught.value)
    return caught.value


ON_MODELS = [one for one in FUNCTIONS if "model" in inspect.signature(one).parameters]


@pytest.mark.parametrize("function", ON_MODELS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("wrong", [1.5, object(), math.nan])
def test_every_function_refuses_what_is_no_model(function: Any, wrong: object) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    needed = [p for p in parameters if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
    named = {p.name: wrong for p in parameters if p.default is p.empty and p.kind == p.KEYWORD_ONLY}
    _refused(lambda: function(*[wrong] * len(needed), **named))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_function_names_an_option_that_it_has_not(function: Any) -> None:
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
        return
    assert "no_such_option" in str(_refused(lambda: function(no_such_option=1)))


@pytest.mark.parametrize(
    "call",
    [
        lambda: RESULT.top(1.5),  # pyright: ignore
        lambda: RESULT.top(-1),
        lambda: RESULT.top("a"),  # pyright: ignore
        lambda: RESULT.select(rows=1),
        lambda: RESULT.plot(3),  # pyright: ignore
        lambda: RESULT.save(3),  # pyright: ignore
        lambda: Result.load(None),  # pyright: ignore
        lambda: _vector() * "a",  # pyright: ignore
        lambda: "a" * _vector(),  # pyright: ignore
        lambda: _vector() * None,  # pyright: ignore
        lambda: _vector() * math.nan,
        lambda: _vector()["a"],  # pyright: ignore
        lambda: _vector().select([]),
        lambda: _vector().select("x"),  # pyright: ignore
        lambda: _vector().save(None),  # pyright: ignore
        lambda: SteeringVector.load(3),  # pyright: ignore
        lambda: logit_difference(" Paris", answre=" Rome"),  # pyright: ignore
    ],
)
def test_methods_of_results_and_vectors_refuse_wrong_kinds(call: Callable[[], Any]) -> None:
    _refused(call)


@pytest.mark.parametrize(
    "options",
    [
        {"strengths": math.nan},
        {"strengths": [1.0, math.nan]},
        {"strengths": "a"},
        {"strengths": None},
        {"strengths": []},
        {"layers": "x"},
        {"layers": [0.5]},
        {"layers": []},
        {"layers": 99},
        {"positions": "first"},
        {"max_new_tokens": "2"},
        {"max_new_tokens": 1.5},
    ],
)
def test_options_of_steering_are_checked(tiny: LanguageModel, options: dict[str, Any]) -> None:
    _refused(lambda: steer(tiny, [1, 2, 3], _vector(), **options))


def test_an_unknown_option_is_told_with_the_nearest(tiny: LanguageModel) -> None:
    error = _refused(lambda: insitu.methods.logit_lens(tiny, [1, 2], layer=1))  # pyright: ignore
    assert "'layers'" in str(error)


@pytest.mark.parametrize(("wrong", "right"), [("coefficient", "strengths"), ("layer", "layers")])
def test_an_option_that_goes_to_a_generation_is_told_with_the_methods_own_word(
    tiny: LanguageModel, wrong: str, right: str
) -> None:
    error = _refused(lambda: steer(tiny, [1, 2, 3], _vector(), **{wrong: 1}))
    assert f"`steer` has no argument `{wrong}` (nearest: '{right}')" in str(error)
    assert "generation takes none" in str(error)


def test_functions_and_results_of_methods_can_be_pickled() -> None:
    for function in FUNCTIONS:
        assert pickle.loads(pickle.dumps(function)) is function
    assert isinstance(logit_difference(" a", " b"), Metric)


def test_errors_of_the_users_own_metric_are_the_users(tiny: LanguageModel) -> None:
    with pytest.raises(ZeroDivisionError):
        insitu.methods.activation_patching(
            tiny,
            [1, 2, 3],
            [1, 2, 4],
            metric=lambda logits: logits[0, -1, 1 // 0],  # pyright: ignore
        )


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=4, n_layer=2, n_head=2)
    torch.manual_seed(0)
    return LanguageModel(transformers.GPT2LMHeadModel(config).eval())


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_truth_value_is_no_number(function: Any) -> None:
    """In Python `True` is 1, so a flag in the wrong place would be taken for a count."""
    parameters = inspect.signature(function).parameters.values()
    kinds = ("int", "int | None", "float", "float | None", "float | Sequence[float]")
    numbers = [p.name for p in parameters if str(p.annotation) in kinds]
    needed = {p.name: None for p in parameters if p.default is p.empty and p.kind <= p.KEYWORD_ONLY}
    for name in numbers:
        for wrong in (True, False):
            error = _refused(lambda given={**needed, name: wrong}: function(**given))
            assert f"`{name}`" in str(error)


@pytest.mark.parametrize(
    "call",
    [
        lambda: RESULT.top(True),
        lambda: RESULT.at(layer=True),
        lambda: RESULT.select(layer=True),
        lambda: _vector()[True],
        lambda: _vector().select(True),
        lambda: _vector().select([True]),
        lambda: insitu.methods.Circuit("c", "n", (), 1).top(True),
        lambda: insitu.methods.Circuit("c", "n", (), 1).plot(most=True),
    ],
)
def test_a_truth_value_is_no_number_of_results_vectors_and_circuits(
    call: Callable[[], Any],
) -> None:
    _refused(call)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, m: insitu.methods.causal_tracing(
            model, [1, 2], [0], metric=m, window={"mlp_out": True}
        ),
        lambda model, m: insitu.methods.edge_attribution(model, [1, 2], [1, 3], m, steps=-1),
        lambda model, m: insitu.methods.edge_attribution(model, [1, 2], [1, 3], m, steps=1.0),  # pyright: ignore
        lambda model, m: insitu.methods.edge_attribution(model, [1, 2], [1, 3], m, steps=True),
        lambda model, m: insitu.methods.discover_circuit(
            model, [1, 2], [1, 3], m, edges=3, steps=True
        ),
        lambda model, m: insitu.methods.integrated_gradients(model, [1, 2], m, steps=True),
    ],
)
def test_counts_are_whole_numbers(
    tiny: LanguageModel, call: Callable[[LanguageModel, Metric], Any]
) -> None:
    _refused(lambda: call(tiny, logit_difference(1, 2)))
