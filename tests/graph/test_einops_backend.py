import einops
import pytest
import torch
from torch import nn

from insitu import Model

X = torch.arange(24.0).reshape(2, 3, 4) - 10

USES = {
    "rearrange": lambda x: einops.rearrange(x, "b t (n d) -> b n t d", n=2),
    "rearrange a list": lambda x: einops.rearrange([x, x + 1], "k b t d -> b t (k d)"),
    "reduce by mean": lambda x: einops.reduce(x, "b t d -> b d", "mean"),
    "reduce by max": lambda x: einops.reduce(x, "b t d -> d", "max"),
    "reduce by any": lambda x: einops.reduce(x > 0, "b t d -> b", "any"),
    "repeat": lambda x: einops.repeat(x, "b t d -> b t (r d)", r=2),
    "einsum": lambda x: einops.einsum(x, x, "b t d, b s d -> b t s"),
    "pack": lambda x: einops.pack([x, x], "b * d")[0],
}


@pytest.mark.parametrize("name", USES)
def test_einops_on_a_proxy_is_einops_on_its_value(name: str) -> None:
    model = Model(nn.Sequential(nn.Identity()))
    with model.trace(X):
        proxy = USES[name](model[0].output)
        shape, saved = proxy.shape, proxy.save()
    assert torch.equal(saved.value, USES[name](X))
    assert shape == saved.value.shape


def test_a_pattern_that_does_not_fit_is_an_error_before_the_run() -> None:
    model = Model(nn.Sequential(nn.Identity()))
    ran: list[type] = []
    model.module.register_forward_hook(lambda module, args, output: ran.append(type(output)))
    with pytest.raises(einops.EinopsError), model.trace(X):
        einops.rearrange(model[0].output, "b t (n d) -> b n t d", n=3)
    assert torch.Tensor not in ran
