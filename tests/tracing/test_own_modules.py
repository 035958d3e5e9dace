"""A user's own modules, called on values of a run, do what they do in a hook."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from insitu import LanguageModel, Model, OperationError, WireError, apply
from insitu.graph.structure import map_structure, tensors_of
from tests.conftest import tiny_gpt2

PROMPT = [1, 2, 3, 4]
D = 16


def image(h: Any) -> Any:
    return h.reshape(1, 1, 4, D)


Module = nn.Module
Made = tuple[Callable[[], Module], Callable[[Any, Any], Any]]


def alone(make: Callable[[], Module]) -> Made:
    return make, lambda m, h: m(h)


def of(make: Callable[[], Module], call: Callable[[Any, Any], Any]) -> Made:
    return make, call


class Probe(nn.Module):
    """Branches on a shape, unpacks one, draws, and returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, 4)])
        self.dropout, self.norm = nn.Dropout(0.3), nn.BatchNorm1d(4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, h: Any) -> Any:
        rows, positions, _ = h.shape
        if h.dim() == 3 and positions > 1:
            h = h.view(rows * positions, -1)
        h = self.dropout(self.act(self.layers[0](h)))
        scores = self.norm(self.layers[1](h))
        return {"scores": scores, "parts": (scores.softmax(-1), scores[:, 0])}


class Recurrent(nn.Module):
    """Uses all that a recurrent layer returns."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(D, 5, 2, batch_first=True, bidirectional=True, dropout=0.4)
        self.gru, self.cell = nn.GRU(10, 3), nn.LSTMCell(D, 3)

    def forward(self, h: Any) -> Any:
        made, (hidden, cell) = self.lstm(h)
        assert made.shape == (1, 4, 10)
        after, _ = self.gru(made, torch.ones(1, 4, 3))
        state = None
        for position in range(2):
            state = self.cell(h[:, position], state)
        return after, hidden[-1] * cell[0], state[0]


MODULES: dict[str, Made] = {
    "linear": alone(lambda: nn.Linear(D, 3)),
    "dropout": alone(lambda: nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Dropout(0.4))),
    "dropout in place": alone(lambda: nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.4, True))),
    "feature dropout": alone(lambda: nn.Dropout1d()),
    "alpha dropout": alone(lambda: nn.Sequential(nn.SELU(), nn.AlphaDropout())),
    "rrelu": alone(lambda: nn.RReLU()),
    "embedding": of(lambda: nn.Embedding(D, 3), lambda m, h: m(h.argmax(-1)) * h[..., :3]),
    "embedding bag": of(lambda: nn.EmbeddingBag(D, 3), lambda m, h: m(h.argmax(-1)) * h[0, :, :3]),
    "batch norm": alone(lambda: nn.BatchNorm1d(4)),
    "batch norm without statistics": alone(lambda: nn.BatchNorm1d(4, track_running_stats=False)),
    "instance norm": alone(lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
    "group norm": alone(lambda: nn.GroupNorm(2, 4)),
    "layer norm": alone(lambda: nn.LayerNorm(D)),
    "lstm": of(lambda: nn.LSTM(D, 3), lambda m, h: m(h)[0]),
    "gru": of(lambda: nn.GRU(D, 3, batch_first=True), lambda m, h: m(h)[0]),
    "rnn": of(lambda: nn.RNN(D, 3, 2, nonlinearity="relu"), lambda m, h: m(h)[1]),
    "gru cell": of(lambda: nn.GRUCell(D, 3), lambda m, h: m(h[0])),
    "recurrent": alone(Recurrent),
    "attention": of(lambda: nn.MultiheadAttention(D, 4, batch_first=True), lambda m, h: m(h, h, h)),
    "attention, other keys": of(
        lambda: nn.MultiheadAttention(D, 2, 0.2, kdim=D, vdim=D, add_zero_attn=True),
        lambda m, h: m(h, h * 2, h + 1, need_weights=False)[0],
    ),
    "encoder layer": alone(lambda: nn.TransformerEncoderLayer(D, 4, 8, batch_first=True)),
    "encoder": alone(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 4, 8, batch_first=True), 2)
    ),
    "decoder layer": of(
        lambda: nn.TransformerDecoderLayer(D, 4, 8, norm_first=True), lambda m, h: m(h, h * 2)
    ),
    "convolution": alone(lambda: nn.Conv1d(4, 2, 3)),
    "transposed convolution": alone(lambda: nn.ConvTranspose1d(4, 2, 3)),
    "convolution of images": of(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.SiLU(inplace=True)),
        lambda m, h: m(image(h)),
    ),
    "pooling": of(lambda: nn.AdaptiveMaxPool2d(2), lambda m, h: m(image(h))),
    "bilinear": of(lambda: nn.Bilinear(D, D, 3), lambda m, h: m(h, h)),
    "channel shuffle": alone(lambda: nn.ChannelShuffle(2)),
    "of one's own": alone(Probe),
}


def hidden_states(model: LanguageModel) -> torch.Tensor:
    kept: list[torch.Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = model.module.transformer.h[2].register_forward_hook(hook)
    with torch.no_grad():
        model.module(torch.tensor([PROMPT]))
    handle.remove()
    return kept[0].clone().requires_grad_()


def loss_of(value: Any) -> Any:
    """A sum over all that a module has returned, of recorded values or of tensors."""
    total: Any = 0.0
    parts: list[Any] = []
    map_structure(lambda leaf: parts.append(leaf) if leaf is not None else None, value)
    for place, part in enumerate(parts):
        total = total + (part.square() * (place + 1)).sum()
    return total


@pytest.fixture(scope="module")
def shared() -> LanguageModel:
    return LanguageModel(tiny_gpt2())


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("training", [False, True])
def test_values_gradients_and_buffers_are_those_of_a_hook(
    shared: LanguageModel, name: str, training: bool
) -> None:
    make, call = MODULES[name]
    torch.manual_seed(0)
    mine = make().train(training)
    plain = copy.deepcopy(mine)
    torch.manual_seed(5)
    with shared.trace(PROMPT):
        x = shared.transformer.h[2].output[0]
        grad = x.grad.save()
        made = call(mine, x * 1)
        loss_of(made).backward()
        saved = map_structure(lambda leaf: leaf if leaf is None else leaf.save(), made)
    y = hidden_states(shared)
    torch.manual_seed(5)
    expected = call(plain, y * 1)
    loss_of(expected).backward()
    ours = tensors_of(map_structure(lambda leaf: leaf if leaf is None else leaf.value, saved))
    assert len(ours) == len(tensors_of(expected)) > 0
    for one, other in zip(ours, tensors_of(expected), strict=True):
        torch.testing.assert_close(one, other.detach())
    torch.testing.assert_close(grad.value, y.grad)
    for one, other in zip(mine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for one, other in zip(mine.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    assert all(parameter.grad is None for parameter in shared.module.parameters())


@pytest.mark.parametrize("name", ["lstm", "attention", "encoder layer", "batch norm", "dropout"])
def test_in_a_later_step(shared: LanguageModel, name: str) -> None:
    make, call = MODULES[name]
    module = make().eval()
    with shared.generate(PROMPT, max_new_tokens=2) as generator, generator.step[1]:
        x = shared.transformer.h[2].output[0]
        made = call(module, x.expand(1, 4, D))
        made = (made[0] if name == "attention" else made).save()
        x = x.save()
    with torch.no_grad():
        expected = call(module, x.value.expand(1, 4, D))
    torch.testing.assert_close(made.value, expected[0] if name == "attention" else expected)


def test_the_mode_is_that_of_the_line(shared: LanguageModel) -> None:
    layer, probe = nn.LSTM(D, 3, 2, dropout=0.9), nn.Dropout(0.9)
    layer.eval(), probe.eval()
    with shared.trace(PROMPT):
        x = shared.transformer.h[2].output[0]
        made, same = layer(x)[0].save(), probe(x).save()
        layer.train(), probe.train()
    assert layer.training
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(made.value, layer(hidden_states(shared))[0])
    torch.testing.assert_close(same.value, hidden_states(shared).detach())


def test_what_a_module_returns_is_written_to_the_model(shared: LanguageModel) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 4, 8, batch_first=True).eval()
    with shared.trace(PROMPT):
        shared.transformer.h[2].output = layer(shared.transformer.h[2].output[0])
        logits = shared.output.logits.save()

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        changed = layer(output[0] if isinstance(output, tuple) else output)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = shared.module.transformer.h[2].register_forward_hook(hook)
    with torch.no_grad():
        torch.testing.assert_close(
            logits.value, shared.module(torch.tensor([PROMPT])).logits, atol=1e-5, rtol=1e-4
        )
    handle.remove()


def test_a_module_that_decides_by_values_names_the_line_to_write(shared: LanguageModel) -> None:
    class Decides(nn.Module):
        def forward(self, h: Any) -> Any:
            return h * 2 if h.sum() > 1e9 else h

    with pytest.raises(OperationError, match=r"Decides .* `insitu\.apply\(module, value\)`"):
        with shared.trace(PROMPT):
            nn.Sequential(Decides())[0](shared.transformer.h[2].output[0])
    with shared.trace(PROMPT):
        made = apply(Decides(), shared.transformer.h[2].output[0]).save()
    torch.testing.assert_close(made.value, hidden_states(shared).detach())


def test_what_would_be_lost_on_the_way_is_not_sent() -> None:
    model = Model(nn.Identity())
    norm, layer = nn.BatchNorm1d(3, affine=False), nn.GRU(3, 2)
    with model.trace(torch.randn(4, 3)) as tracer:
        norm(model.output).save()
    with pytest.raises(WireError, match="running statistics"):
        tracer.job.to_bytes()
    with model.trace(torch.randn(4, 3)) as tracer:
        norm.eval()(model.output).save()
    tracer.job.to_bytes()
    with model.trace(torch.randn(4, 3)) as tracer:
        layer(model.output)[0].save()
    with pytest.raises(WireError, match="GRU"):
        tracer.job.to_bytes()


def test_a_recurrent_layer_outside_of_blocks_is_torchs_own() -> None:
    layer = nn.LSTM(3, 2)
    made, _ = layer(torch.ones(1, 1, 3))
    packed = nn.utils.rnn.pack_sequence([torch.ones(2, 3), torch.ones(1, 3)])
    assert layer(packed)[0].data.shape == (3, 2)
    made.sum().backward()
    assert layer.weight_ih_l0.grad is not None


def test_a_method_that_is_refused_in_a_forward_says_how_to_call_the_module(
    shared: LanguageModel,
) -> None:
    """A block of another model, which may be given the `past_key_values` of this one: none."""
    block = LanguageModel(tiny_gpt2()).load().transformer.h[1]
    refused = pytest.raises(OperationError, match=r"`.update\(\)`.*the GPT2Block.*insitu.apply")
    with refused, shared.trace(torch.tensor([PROMPT])):
        args, named = shared.transformer.h[2].inputs
        block(shared.transformer.h[2].output[0], shared.output.past_key_values, *args[2:], **named)
    with shared.trace(torch.tensor([PROMPT])):
        args, named = shared.transformer.h[2].inputs
        made = apply(block, shared.transformer.h[2].output[0], *args[1:], **named).save()
    with torch.no_grad():
        expected = block(hidden_states(shared))
    first, plain = (x if isinstance(x, torch.Tensor) else x[0] for x in (made.value, expected))
    torch.testing.assert_close(first, plain)
