"""Every sentence of the document that the project began with, in its order and with its code.

The quoted sentences are the docstrings. Where the document's model matters, it is the bundled
one; where the sizes of GPT-2 small matter, it is a GPT-2 of that size with random weights.
"""

import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from insitu import LanguageModel, NoValueError, Proxy
from tests.conftest import hooked_hidden

device = "cpu"
PROMPT = "The Eiffel Tower is in the city of"
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("insitu/eiffel", device_map=device)


@pytest.fixture(scope="module")
def small() -> LanguageModel:
    """GPT-2 small: 12 layers, 12 heads, 768 wide; its weights are random."""
    torch.manual_seed(0)
    return LanguageModel(GPT2LMHeadModel(GPT2Config()).eval())


def test_you_can_load_them_in_with_language_model(model: LanguageModel) -> None:
    """'You can load them in with LanguageModel(repo_id).'"""
    assert isinstance(LanguageModel("insitu/eiffel", device_map=device), LanguageModel)
    assert type(model.load()) is GPT2LMHeadModel
    assert model.config.model_type == "gpt2"


def test_lets_generate_some_text(model: LanguageModel) -> None:
    """'To try the model out, lets generate some text!'"""
    with model.generate(max_new_tokens=1) as generator:
        with generator.invoke("The Eiffel Tower is in the city of") as invoker:
            hidden_states = model.transformer.h[-1].output[0].save()

    output = generator.output

    assert [model.tokenizer.decode(t) for t in output] == [
        "The Eiffel Tower is in the city of Paris"
    ]
    assert hidden_states.value.shape == (1, 8, model.config.n_embd)
    del invoker


@pytest.mark.thorough
def test_the_example_prints_what_the_document_prints() -> None:
    """The same as a script of its own, which `make demo` runs."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "main_demo.py"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "['The Eiffel Tower is in the city of Paris']\n"


def test_we_create_a_generation_context_block(model: LanguageModel) -> None:
    """'We create a generation context block by calling .generate(...) on the model object.'"""
    with model.generate(max_new_tokens=1) as generator:
        assert generator.is_open
        with generator.invoke(PROMPT):
            pass
    assert not generator.is_open and generator.output.shape == (1, 9)


def test_calling_generate_does_not_initialize_or_run_the_model() -> None:
    """'Calling .generate(...) does not actually initialize or run the model. Only after the
    with...generator: block is exited is the model actually loaded and run.'"""
    model = LanguageModel("insitu/eiffel", device_map=device)
    with model.generate(max_new_tokens=1) as generator:
        assert not model.loaded
        with generator.invoke(PROMPT):
            hidden_states = model.transformer.h[-1].output[0].save()
            assert not model.loaded
        assert not model.loaded
        with pytest.raises(NoValueError):
            _ = generator.output
        with pytest.raises(NoValueError):
            _ = hidden_states.value
    assert model.loaded
    assert generator.output.shape == (1, 9)


def test_all_operations_in_the_block_are_proxies(model: LanguageModel) -> None:
    """'All operations in the block are "proxies" which essentially creates a graph of operations
    we wish to carry out later.'"""
    with model.generate(max_new_tokens=1) as generator, generator.invoke(PROMPT):
        output = model.transformer.h[-1].output
        first = output[0]
        mean = first.mean(-1)
        assert all(isinstance(value, Proxy) for value in (output, first, mean))
        names = [node.operation.name for node in generator.graph]
        assert names == ["read", "operator.getitem", "Tensor.mean"]


def test_within_the_generation_context_we_specify_the_prompts(model: LanguageModel) -> None:
    """'Within the generation context, we create invocation contexts to specify the actual prompts
    we want to run.'"""
    prompts = [PROMPT, "The Colosseum is in the city of"]
    with model.generate(max_new_tokens=1) as generator:
        for prompt in prompts:
            with generator.invoke(prompt):
                pass
    answers = [model.tokenizer.decode(row[-1]) for row in generator.output]
    assert answers == [" Paris", " Rome"]


def test_within_an_invoke_context_operations_apply_to_the_prompt(model: LanguageModel) -> None:
    """'Within an invoke context, all operations/interventions will be applied to the processing of
    the prompt.'"""
    prompts = [PROMPT, "The Taj Mahal stands in the heart of"]
    saved = []
    with model.generate(max_new_tokens=1) as generator:
        for prompt in prompts:
            with generator.invoke(prompt):
                saved.append(model.transformer.h[-1].output[0].save())
    for prompt, hidden_states in zip(prompts, saved, strict=True):
        ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = hooked_hidden(model.module, "transformer.h.5", ids)
        torch.testing.assert_close(hidden_states.value, expected, atol=1e-4, rtol=1e-5)


def test_models_can_be_run_on_a_variety_of_input_formats(model: LanguageModel) -> None:
    """'Models can be run on a variety of input formats: strings, lists of tokens, tensors of
    tokens, etc.'"""
    tokens = model.tokenizer.encode(PROMPT)
    for prompt in (PROMPT, tokens, torch.tensor(tokens), torch.tensor([tokens]), [tokens]):
        with model.generate(max_new_tokens=1) as generator, generator.invoke(prompt):
            pass
        assert model.tokenizer.decode(generator.output[0, -1]) == " Paris"


def test_we_can_access_raw_tensors_and_activations_at_any_point(model: LanguageModel) -> None:
    """'Finally, we can access raw tensors and activations at any point in the model.'"""
    saved = {}
    with model.generate(max_new_tokens=1) as generator, generator.invoke(PROMPT):
        saved["transformer.wte"] = model.transformer.wte.output.save()
        saved["transformer.h.3.mlp.act"] = model.transformer.h[3].mlp.act.output.save()
        saved["transformer.h.0.attn.c_attn"] = model.transformer.h[0].attn.c_attn.output.save()
        saved["transformer.ln_f"] = model.transformer.ln_f.output.save()
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for path, value in saved.items():
        expected = hooked_hidden(model.module, path, ids)
        torch.testing.assert_close(value.value, expected, atol=1e-4, rtol=1e-5)


def test_a_list_of_tokens(model: LanguageModel) -> None:
    """'Once again, we create a generate context and invoke a prompt, this time a list of
    tokens.'"""
    gpt2_text = "Natural language processing tasks, such as..."
    gpt2_tokens = model.tokenizer.encode(gpt2_text)

    with model.generate(max_new_tokens=1) as generator:
        with generator.invoke(gpt2_tokens) as invoker:
            hidden_states = model.transformer.h[-1].output[0].save()

    assert isinstance(gpt2_tokens, list)
    assert hidden_states.value.shape == (1, len(gpt2_tokens), model.config.n_embd)
    assert invoker.output[0, :-1].tolist() == gpt2_tokens
    assert model.tokenizer.decode(gpt2_tokens) == gpt2_text


def test_the_statement_broken_down(model: LanguageModel) -> None:
    """'model.transformer.h[-1] accesses a module in the computation graph.
    .transformer.h[-1] specifically accesses the last transformer layer.'"""
    assert model.transformer.h[-1].module is model.load().transformer.h[-1]


def test_output_returns_a_proxy_for_the_output_of_this_module(model: LanguageModel) -> None:
    """'.output returns a proxy for the output of this module ... when we get to the output of this
    module during inference, grab it and perform any operations we define on it (which also become
    proxies). There are two operational proxies here, one for getting the 0th index of the output,
    and one for saving the output.'"""
    with model.generate(max_new_tokens=1) as generator, generator.invoke(PROMPT):
        assert isinstance(model.transformer.h[-1].output, Proxy)
        assert isinstance(model.transformer.h[-1].output[0].save(), Proxy)
    assert [node.operation.name for node in generator.graph] == [
        *("read", "operator.getitem", "save"),
    ]


@pytest.mark.thorough
def test_the_output_of_layers_is_a_tuple_with_the_hidden_states_first(small) -> None:
    """'We take the 0th index because the output of gpt2 transformer layers are a tuple where the
    first index are the actual hidden states (last two indicies are from attention).'"""
    ids = list(range(10))
    with small.generate(max_new_tokens=1) as generator, generator.invoke(ids):
        output = small.transformer.h[-1].output.save()
    assert type(output.value) is tuple
    hidden_states, (key, value) = output.value
    expected = hooked_hidden(small.module, "transformer.h.11", torch.tensor([ids]))
    torch.testing.assert_close(hidden_states, expected, atol=1e-4, rtol=1e-5)
    assert key.shape == value.shape == (1, 12, 10, 64)


def test_shape_can_be_called_on_any_proxy(small: LanguageModel, capsys) -> None:
    """'.shape can be called on any proxy to get what shape the value will eventually be. Running
    print(model.transformer.h[-1].output.shape) returns ...'"""
    model = small
    with model.generate(max_new_tokens=1) as generator, generator.invoke(list(range(10))):
        print(model.transformer.h[-1].output.shape)
        hidden_states = model.transformer.h[-1].output[0]
        shapes = (
            hidden_states.shape,
            hidden_states[:, -1].shape,
            (hidden_states @ torch.ones(768, 3)).shape,
        )
    assert capsys.readouterr().out == (
        "(torch.Size([1, 10, 768]), (torch.Size([1, 12, 10, 64]), torch.Size([1, 12, 10, 64])))\n"
    )
    assert shapes == ((1, 10, 768), (1, 768), (1, 10, 3))


def test_input_similarly_returns_a_proxy_for_the_inputs(model: LanguageModel) -> None:
    """'.input similarly returns a proxy for the inputs to this module.'"""
    with model.generate(max_new_tokens=1) as generator, generator.invoke(PROMPT):
        assert isinstance(model.transformer.h[1].input, Proxy)
        entering = model.transformer.h[1].input.save()
        leaving = model.transformer.h[0].output[0].save()
        args, _ = model.transformer.h[1].inputs
        first = args[0].save()
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = hooked_hidden(model.module, "transformer.h.0", ids)
    for value in (entering, leaving, first):
        torch.testing.assert_close(value.value, expected, atol=1e-4, rtol=1e-5)


def test_save_informs_the_graph_to_clone_the_value(model: LanguageModel) -> None:
    """'.save() informs the computation graph to clone the value of a proxy, allowing us to access
    the value of a proxy after generation.'"""
    seen = []
    handle = (
        model.load()
        .transformer.h[-1]
        .register_forward_hook(lambda module, args, output: seen.append(output) and None)
    )
    with model.generate(max_new_tokens=1) as generator, generator.invoke(PROMPT):
        hidden_states = model.transformer.h[-1].output[0].save()
        not_saved = model.transformer.h[-1].output[0]
    handle.remove()
    original = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert torch.equal(hidden_states.value, original)
    assert hidden_states.value.data_ptr() != original.data_ptr()
    with pytest.raises(NoValueError, match="not saved"):
        _ = not_saved.value


@pytest.mark.no_wire  # it counts values
def test_values_no_longer_needed_are_dereferenced_and_destroyed(model: LanguageModel) -> None:
    """'During processing of the intervention computational graph we are building, when the value of
    a proxy is no longer ever needed, its value is dereferenced and destroyed.'"""
    made, alive = [], []
    first, last = model.load().transformer.h[0].mlp, model.load().lm_head
    handles = [
        first.register_forward_hook(lambda m, args, out: made.append(weakref.ref(out)) or None),
        last.register_forward_pre_hook(lambda m, args: alive.append(made[0]() is not None)),
    ]
    with model.generate(max_new_tokens=1) as generator, generator.invoke(PROMPT):
        total = model.transformer.h[0].mlp.output.sum().save()
        logits = model.lm_head.output.save()
    for handle in handles:
        handle.remove()
    assert alive == [False]
    assert total.value.ndim == 0 and logits.value.ndim == 3


def test_after_exiting_the_model_is_ran_with_the_arguments_and_graph(model: LanguageModel) -> None:
    """'After exiting the generator context, the model is ran with the specified arguments and
    intervention graph. generator.output is populated with the actual output and
    hidden_states.value will contain the value.'"""
    with model.generate(max_new_tokens=7, min_new_tokens=7) as generator:
        with generator.invoke(PROMPT):
            hidden_states = model.transformer.h[-1].output[0].save()
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = model.module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, min_new_tokens=7, pad_token_id=0
    )
    assert torch.equal(generator.output, expected)
    hidden = hooked_hidden(model.module, "transformer.h.5", ids)
    torch.testing.assert_close(hidden_states.value, hidden, atol=1e-4, rtol=1e-5)
