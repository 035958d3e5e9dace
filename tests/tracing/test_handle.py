import inspect
import re

import pytest
import torch
from torch import nn

from insitu import (
    BlockError,
    IndexOutOfRangeError,
    InsituError,
    LanguageModel,
    Model,
    NeverRanError,
    OperationError,
    PathError,
    cond,
)
from tests.conftest import hooked, hooked_hidden

IDS = torch.tensor([[3, 14, 15, 92, 65]])


def test_the_tree_is_reached_by_attribute_and_index(gpt2: LanguageModel) -> None:
    h = gpt2.transformer.h
    assert len(h) == 4
    assert h[-1] is h[3] and h[-1].path == "transformer.h.3"
    assert [block.path for block in h[1:3]] == ["transformer.h.1", "transformer.h.2"]
    assert [block.path for block in h] == [f"transformer.h.{i}" for i in range(4)]
    assert h[0].attn.c_attn.module is gpt2.module.transformer.h[0].attn.c_attn
    assert gpt2["transformer"] is gpt2.transformer
    assert {"transformer", "lm_head", "trace", "generate", "output"} <= set(dir(gpt2))
    assert {"attn", "mlp", "ln_1"} <= set(dir(h[0]))


def test_a_child_whose_name_is_taken_is_reached_as_an_item(twice: Model) -> None:
    assert isinstance(twice["output"].module, nn.ReLU)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (lambda m: m.transformer.hh, "'h'"),
        (lambda m: m.transformers, "'transformer'"),
        (lambda m: m.wte, "'transformer.wte'"),
        (lambda m: m.transformer.wte.weight, ".module.weight"),
        (lambda m: m["nothing"], "it has: 'transformer', 'lm_head'"),
        (lambda m: m.transformer.h[0].attn.softmax, "c_attn"),
    ],
)
def test_a_wrong_path_names_the_nearest(gpt2: LanguageModel, path, words: str) -> None:
    with pytest.raises(PathError, match=r"test_handle.py") as caught:
        path(gpt2)
    assert isinstance(caught.value, AttributeError) and isinstance(caught.value, InsituError)
    assert words in str(caught.value)


def test_an_index_out_of_range_says_how_many_there_are(gpt2: LanguageModel) -> None:
    with pytest.raises(IndexOutOfRangeError, match=r"`transformer.h` holds 4 modules.*h\[4\]"):
        gpt2.transformer.h[4]
    with pytest.raises(IndexError):
        gpt2.transformer.h[-5]


def test_assigning_to_a_handle_raises(gpt2: LanguageModel) -> None:
    with pytest.raises(PathError, match="cannot be assigned"):
        gpt2.transformer.wte = 1
    with pytest.raises(PathError, match="cannot be assigned"):
        gpt2.anything = 1
    with pytest.raises(BlockError, match="inside a block"):
        gpt2.transformer.h[0].output = torch.zeros(1)


def test_a_site_outside_of_a_block_says_what_to_write(gpt2: LanguageModel) -> None:
    with pytest.raises(BlockError, match=r"`transformer.h\[0\].output`.*inside a block"):
        _ = gpt2.transformer.h[0].output
    with gpt2.trace() as tracer:
        with pytest.raises(BlockError, match="no prompt is around this line.*invoke"):
            _ = gpt2.lm_head.output
        with tracer.invoke(IDS):
            _ = gpt2.lm_head.output


def test_a_handle_of_another_model_is_no_site_of_this_block(gpt2, llama) -> None:
    with gpt2.trace(IDS), pytest.raises(BlockError, match="inside a block of its model"):
        _ = llama.lm_head.output


def test_a_handle_of_another_model_is_not_called_in_this_block(gpt2: LanguageModel) -> None:
    """Its path may be one of this model too, whose module would then be called in its place."""
    torch.manual_seed(1)
    other = LanguageModel(type(gpt2.module)(gpt2.config).eval())
    hidden = hooked_hidden(gpt2.module, "transformer.h.1", IDS)
    with gpt2.trace(IDS):
        stream = gpt2.transformer.h[1].output[0]
        with pytest.raises(OperationError, match=r"`lm_head` is a module of another model.*module"):
            other.lm_head(stream)
        with pytest.raises(OperationError, match="another model"):
            cond(stream.sum() > 0, lambda x: other.transformer.ln_f(x), lambda x: x, stream)
        logits = other.lm_head.module(stream).save()
    assert torch.allclose(logits, other.module.lm_head(hidden), atol=1e-6)
    assert not torch.allclose(logits, gpt2.module.lm_head(hidden), atol=1e-4)
    with gpt2.edit() as edited, pytest.raises(OperationError, match="another model"):
        other.transformer.ln_f(edited.transformer.h[1].output[0])


def test_handles_of_edits_and_of_one_module_wrapped_twice_are_called(gpt2: LanguageModel) -> None:
    hidden = hooked_hidden(gpt2.module, "transformer.h.1", IDS)
    with gpt2.edit() as edited:
        edited.transformer.h[2].mlp.output *= 2
        edited.transformer.ln_f(edited.transformer.h[1].output[0])
    with edited.edit() as twice:
        twice.transformer.h[3].mlp.output *= 2
    again = LanguageModel(gpt2.module)
    for model in (gpt2, edited, twice):
        with model.trace(IDS):
            stream = model.transformer.h[1].output[0]
            found = [one.lm_head(stream).save() for one in (gpt2, edited, twice, again)]
        for logits in found:
            assert torch.allclose(logits, gpt2.module.lm_head(hidden), atol=1e-5)


def test_every_site_is_what_a_hook_sees(language_model: LanguageModel) -> None:
    """All modules that run, their outputs, inputs and all arguments, in one trace, reversed."""
    module = language_model.module
    outputs, arguments = {}, {}

    def post(path):
        def hook(module, args, kwargs, output) -> None:
            outputs.setdefault(path, (args, kwargs, output))

        return hook

    handles = [
        part.register_forward_hook(post(path), with_kwargs=True)
        for path, part in module.named_modules()
    ]
    with torch.no_grad():
        module(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()

    saved = {}
    with language_model.trace(IDS):
        for path in reversed(outputs):
            handle = language_model
            for part in path.split(".") if path else []:
                handle = handle[part] if not part.isdigit() else handle[int(part)]
            arguments[path] = handle.input.save(), handle.inputs.save()
            saved[path] = handle.output.save()

    def same(ours, theirs) -> bool:
        if isinstance(theirs, torch.Tensor):
            return torch.equal(ours, theirs)
        if isinstance(theirs, dict):
            return all(same(ours[key], theirs[key]) for key in theirs)
        if isinstance(theirs, tuple):
            return len(ours) == len(theirs) and all(map(same, ours, theirs))
        return ours is None if theirs is None else type(ours) is type(theirs)

    for path, (args, kwargs, output) in outputs.items():
        ours = saved[path].value
        if path in language_model.traits.block_views[False]:
            hidden = output[0] if isinstance(output, tuple) else output
            assert len(ours) == 1 and torch.equal(ours[0], hidden), path
        else:
            assert same(ours, output), path
        first, everything = arguments[path]
        assert same(everything.value, (args, kwargs)), path
        names = list(inspect.signature(module.get_submodule(path).forward).parameters)
        expected = args[0] if args else kwargs[next(name for name in names if name in kwargs)]
        assert same(first.value, expected), path


def test_a_plain_module_with_keywords_a_dictionary_and_a_module_called_twice(twice: Model) -> None:
    x = torch.randn(2, 4)
    with twice.trace(x=x, scale=2.0) as tracer:
        whole = tracer.output.save()
        second = tracer.output["second"].save()
        attribute = twice.output.second.save()
        shared = twice.shared.output.save()
        inputs = twice.inputs.save()
        rectified = twice["output"].output.save()
    expected = twice.module(x=x, scale=2.0)
    assert torch.equal(shared, hooked(twice.module, "shared", x=x))
    assert torch.equal(whole.value["first"], expected["first"])
    assert torch.equal(second, expected["second"]) and torch.equal(attribute, expected["second"])
    assert torch.equal(rectified * 2.0, expected["second"])
    assert inputs.value[0] == () and torch.equal(inputs.value[1]["x"], x)


def test_a_module_that_never_ran_is_named_with_its_relatives(twice: Model) -> None:
    x = torch.randn(2, 4)
    with pytest.raises(NeverRanError) as caught, twice.trace(x=x):
        twice.unused.output.save()  # the line to find
    message = str(caught.value)
    assert "`unused` was not called" in message
    assert "'shared'" in message and "the line to find" in message
    with twice.trace(x=x):
        again = twice.shared.output.save()
    assert torch.equal(again, hooked(twice.module, "shared", x=x))


def test_hidden_states_of_a_block_are_what_a_hook_sees(language_model: LanguageModel) -> None:
    path = next(iter(language_model.traits.block_views[False]))
    with language_model.trace(IDS):
        handle = language_model
        for part in path.split("."):
            handle = handle[int(part)] if part.isdigit() else handle[part]
        hidden = handle.output[0].save()
    assert torch.equal(hidden, hooked_hidden(language_model.module, path, IDS))


def test_printing_a_model_shows_its_tree(gpt2: LanguageModel) -> None:
    lines = repr(gpt2).splitlines()
    assert lines[0] == "LanguageModel(GPT2LMHeadModel)"
    assert "│   ├── wte: Embedding(100, 16)" in lines
    assert "│   │   └── [0-3]: GPT2Block" in lines
    assert repr(gpt2.transformer.h[0].mlp).splitlines()[0] == "mlp: GPT2MLP"


def test_a_number_means_what_it_means_to_torch(gpt2: LanguageModel) -> None:
    """PyTorch indexes no GPT2MLP: `TypeError: 'GPT2MLP' object is not subscriptable`."""
    for handle, key in ((gpt2.transformer.h[2].mlp, 0), (gpt2.transformer, 0), (gpt2, -1)):
        with pytest.raises(TypeError):
            handle.module[key]
        for use in (lambda h, k: h[k], lambda h, _: h[:1], lambda h, _: len(h), lambda h, _: [*h]):
            with pytest.raises(OperationError) as caught:
                use(handle, key)
            assert isinstance(caught.value, TypeError) and __file__ in str(caught.value)
            (first, *_) = handle.module._modules
            line = f"`{handle._line()}.{first}`"
            assert line in str(caught.value)
            assert eval(line.strip("`"), {"model": gpt2}).module is handle.module._modules[first]


def test_experts_in_one_module_are_not_its_activation() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, vocab_size=32,
    )  # fmt: skip
    model = LanguageModel(MixtralForCausalLM(config))
    experts = model.model.layers[0].mlp.experts
    if isinstance(experts.module, nn.ModuleList):  # as older versions of Transformers have them
        pytest.skip("these experts are a list of modules")
    with pytest.raises(OperationError, match=r"experts\.module\.gate_up_proj"):
        experts[0]


class Own(nn.Module):
    """A class that says itself what a number means."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
        self.named = nn.ModuleDict({"0": nn.Tanh(), "a.b".replace(".", "_"): nn.ReLU()})
        self.numbers = nn.ParameterList([nn.Parameter(torch.ones(2))])

    def __getitem__(self, key: int) -> nn.Module:
        return self.held[-1 - key]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.named["0"](self[0](self[1](x))) * self.numbers[0]


def test_a_class_of_ones_own_says_what_a_number_means() -> None:
    module = Own()
    model = Model(module)
    assert model[0].module is module[0] is module.held[1]
    assert model[0].path == "held.1"
    assert model.held[1] is model[0]
    with model.trace(torch.ones(1, 2)):
        value = model[0].output.save()
    assert torch.equal(value, hooked(module, "held.1", torch.ones(1, 2)))
    with pytest.raises(IndexOutOfRangeError, match="Its modules: 'held', 'named', 'numbers'"):
        model[7]
    assert model.named["0"].module is module.named["0"]
    with pytest.raises(PathError, match=r"Its modules: '0', 'a_b'"):
        model.named[0]  # a KeyError of PyTorch's
    with pytest.raises(PathError, match=r"`model\.numbers\.module\[0\]`"):
        model.numbers[0]
    assert torch.equal(model.numbers.module[0], torch.ones(2))


def test_a_handle_is_reached_by_its_path(gpt2: LanguageModel) -> None:
    mlp = gpt2.transformer.h[2].mlp
    assert gpt2["transformer.h.2.mlp"] is mlp and gpt2["transformer.h[2].mlp"] is mlp
    assert gpt2["transformer.h[-2].mlp"] is mlp and gpt2.transformer["h.2"]["mlp"] is mlp
    with gpt2.trace(IDS):
        by_path = [gpt2[path].output.save() for path in ("transformer.h.2.mlp", "lm_head")]
    assert torch.equal(by_path[0], hooked(gpt2.module, mlp.path, IDS))
    for path, words in (
        ("transformer.h.2.mpl", "nearest: 'mlp'"),
        ("transformer.h.9", "'9'"),
        ("transformer.h[-9]", "'-9'"),
        ("transformer..h", "''"),
    ):
        with pytest.raises(PathError, match=re.escape(words)):
            gpt2[path]
