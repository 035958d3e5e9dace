"""Python's own formatting and rounding of proxies, and what may stand for a skipped module."""

from typing import Any

import pytest
import torch
from torch import nn

from insitu import InsituError, Model

PLAIN = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
MODEL = Model(PLAIN)
X = torch.randn(2, 3)


@pytest.mark.parametrize("spec", [".2f", "e", "d", "+.1%"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_proxy_cannot_be_formatted_as_a_number(spec: str, saved: bool) -> None:
    with pytest.raises(InsituError, match="format the saved value"), MODEL.trace(X):
        value = MODEL[0].output[0, 0]
        format(value.save() if saved else value, spec)


def test_a_proxy_is_formatted_as_text_and_its_value_as_a_number() -> None:
    with MODEL.trace(X):
        value = MODEL[0].output[0, 0].save()
        assert f"{value:>40}" == f"{value!s:>40}"
    assert f"{value:.2f}" == f"{PLAIN[0](X)[0, 0].item():.2f}"


@pytest.mark.parametrize("digits", [None, 0, 2])
def test_rounding_is_recorded(digits: int | None) -> None:
    with MODEL.trace(X):
        value = MODEL[0].output
        rounded = (round(value) if digits is None else round(value, digits)).save()
    expected = torch.round(PLAIN[0](X), decimals=digits or 0)
    torch.testing.assert_close(rounded.value, expected.detach())


@pytest.mark.parametrize("value", [None, "zero", 0.0, (), (None, None), [1, 2]])
def test_what_stands_for_a_skipped_module_has_a_tensor(value: Any) -> None:
    with pytest.raises(InsituError, match="skip"), MODEL.trace(X):
        MODEL[1].skip(value)


def test_edits_have_no_option_in_place() -> None:
    with pytest.raises(InsituError, match="as edited"):
        MODEL.edit(inplace=True)
