"""Jobs: run from their bytes on another object of the model, against hooks of plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from insitu import (
    BlockError,
    InsituError,
    Job,
    JobError,
    LanguageModel,
    LoadError,
    Model,
    OptionError,
    PromptError,
    Results,
    WireError,
    apply,
)
from tests.conftest import hooked_hidden, tiny_gpt2, tiny_llama

IDS = torch.tensor([[5, 6, 7, 8]])
MADE: dict[str, Callable[[], nn.Module]] = {"gpt2": tiny_gpt2, "llama": tiny_llama}
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers"}


def received(job: Job) -> Job:
    data = job.to_bytes()
    made = Job.from_bytes(data)
    assert made.to_bytes() == data
    return made


def stack(model: LanguageModel, name: str) -> Any:
    found: Any = model
    for part in BLOCKS[name].split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", MADE)
def test_a_job_gives_what_hooks_see(name: str) -> None:
    model, other = LanguageModel(MADE[name]()), LanguageModel(MADE[name]())
    blocks = stack(model, name)
    with model.scan(IDS) as tracer:
        hidden = blocks[1].output[0].save("hidden")
        blocks[2].output[0][:, -1] = blocks[1].output[0][:, 0] * torch.tensor(2.0)
        model.lm_head.output.save("logits")
    assert hidden.value.shape == (1, 4, 16)
    results = other.run(received(tracer.job))
    plain = MADE[name]()
    early = hooked_hidden(plain, f"{BLOCKS[name]}.1", IDS)

    def hook(module: Any, args: Any, output: Any) -> Any:
        first = (output[0] if isinstance(output, tuple) else output).clone()
        first[:, -1] = early[:, 0] * 2
        return (first, *output[1:]) if isinstance(output, tuple) else first

    handle = plain.get_submodule(f"{BLOCKS[name]}.2").register_forward_hook(hook)
    with torch.no_grad():
        logits = plain(IDS, use_cache=False).logits
    handle.remove()
    torch.testing.assert_close(results["hidden"], early)
    torch.testing.assert_close(results["logits"], logits)
    assert results.outputs == [None] and not results.differences
    again = other.run(tracer.job)  # as it is, without bytes
    assert torch.equal(again["logits"], results["logits"])


@pytest.mark.parametrize("name", MADE)
def test_a_generation_that_was_never_run_is_a_job(name: str) -> None:
    model, other = LanguageModel(MADE[name]()), LanguageModel(MADE[name]())
    with model.scan(IDS, generate=True, max_new_tokens=3, eos_token_id=1) as generator:
        model.lm_head.output[0, -1].save("first")
        with generator.step(2):
            model.lm_head.output[0, -1].save("third")
        with generator.every_step():
            stack(model, name)[0].output[0].save("hidden")
    results = other.run(received(generator.job))
    plain = MADE[name]()
    seen: list[torch.Tensor] = []
    hook = plain.lm_head.register_forward_hook(lambda m, a, output: seen.append(output[0, -1]))
    tokens = plain.generate(IDS, max_new_tokens=3, eos_token_id=1, pad_token_id=0)
    hook.remove()
    assert torch.equal(results.output, tokens)
    torch.testing.assert_close(results["first"], seen[0])
    torch.testing.assert_close(results["third"], seen[2])
    assert [tuple(one.shape) for one in results["hidden"]] == [(1, 4, 16), (1, 1, 16), (1, 1, 16)]


def test_sampling_starts_from_the_seeds_in_the_job(gpt2: LanguageModel) -> None:
    with gpt2.generate(max_new_tokens=4, do_sample=True, top_k=None, eos_token_id=1) as generator:
        for seed in (1, 2, 1):
            generator.invoke(IDS, seed=seed).__enter__().__exit__(None, None, None)
    made = received(generator.job)
    torch.manual_seed(99)
    results = LanguageModel(tiny_gpt2()).run(made)
    assert torch.equal(results.output, generator.output)
    assert torch.equal(results.output[0], results.output[2])


def test_later_blocks_of_a_session_use_values_of_earlier_ones(gpt2: LanguageModel) -> None:
    with gpt2.session() as session:
        with gpt2.trace(IDS):
            source = gpt2.transformer.h[1].output[0]
            source.norm().save("norm")
        with gpt2.trace([[9, 9, 9, 9]]):
            gpt2.transformer.h[1].output[0][:, 1:] = source[:, 1:]
            logits = gpt2.lm_head.output.save("logits")
    results = LanguageModel(tiny_gpt2()).run(received(session.job))
    assert torch.equal(results["logits"], logits.value)
    plain = tiny_gpt2()
    early = hooked_hidden(plain, "transformer.h.1", IDS)
    torch.testing.assert_close(results["norm"], early.norm())

    def hook(module: Any, args: Any, output: Any) -> Any:
        first = (output[0] if isinstance(output, tuple) else output).clone()
        first[:, 1:] = early[:, 1:]
        return (first, *output[1:]) if isinstance(output, tuple) else first

    plain.transformer.h[1].register_forward_hook(hook)
    with torch.no_grad():
        wanted = plain(torch.tensor([[9, 9, 9, 9]]), use_cache=False).logits
    torch.testing.assert_close(results["logits"], wanted)


def test_a_session_of_scans_is_a_job(gpt2: LanguageModel) -> None:
    with gpt2.session() as session:
        with gpt2.scan(IDS):
            source = gpt2.transformer.h[1].output[0]
        with gpt2.scan(IDS, generate=True, max_new_tokens=2):
            gpt2.transformer.h[3].output[0][:, -1] = source[:, -1]
            gpt2.lm_head.output.save("logits")
    results = gpt2.run(received(session.job))
    assert results["logits"].shape == (1, 1, 100) and results.output.shape == (1, 6)


def test_one_block_of_a_session_is_a_job_only_if_it_needs_no_other(gpt2: LanguageModel) -> None:
    with gpt2.session() as session:
        with gpt2.trace(IDS) as first:
            source = gpt2.transformer.h[1].output[0]
        with gpt2.trace(IDS) as second:
            (gpt2.transformer.h[2].output[0] + source).save()
        with pytest.raises(BlockError, match="has not ended"):
            session.job  # noqa: B018
    assert len(gpt2.run(first.job)) == 0
    with pytest.raises(BlockError, match=r"`session\.job` is one"):
        second.job  # noqa: B018


def test_there_is_no_job_before_a_block_has_ended_or_if_it_raised(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS) as tracer:
        gpt2.lm_head.output.save()
        with pytest.raises(BlockError, match="once it has ended"):
            tracer.job  # noqa: B018
    with pytest.raises(ZeroDivisionError), gpt2.trace(IDS) as raised:
        gpt2.lm_head.output.save()
        _ = 1 / 0
    with pytest.raises(BlockError, match="raised ZeroDivisionError"):
        raised.job  # noqa: B018


# Names


def test_values_have_the_names_that_they_were_given_or_the_numbers_of_their_places(
    gpt2: LanguageModel,
) -> None:
    with gpt2.trace(IDS) as tracer:
        gpt2.transformer.h[0].output[0].save()
        gpt2.transformer.h[1].output[0].save("second")
        gpt2.transformer.h[2].output[0].save()
        gpt2.blocks[3].residual_out.save("named")
        gpt2.transformer.h[0].output.save("tuple")
    assert list(tracer.job.saves) == ["0", "second", "2", "named", "tuple"]
    assert tracer.job.saves["2"] == "transformer.h[2].output[0]"
    results = gpt2.run(received(tracer.job))
    assert list(results) == ["0", "second", "2", "named", "tuple"] and len(results) == 5
    assert isinstance(results["tuple"], tuple)
    with pytest.raises(KeyError, match="Nothing was saved as 'secnd'.*'second'"):
        results["secnd"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "1 to 200 characters"),
        ("x" * 201, "1 to 200 characters"),
        ("a\nb", "can be printed"),
        ("3", "numbers are the names"),
        (True, r"save\(optional=True\)"),
        (3, "named by a string"),
        ("h", "Another value of this block"),
    ],
)
def test_what_is_no_name_is_refused_at_its_line(gpt2: LanguageModel, name: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught, gpt2.trace(IDS):
        gpt2.transformer.h[0].output[0].save("h")
        gpt2.transformer.h[1].output[0].save(name)
    assert "save(name)" in str(caught.value)


@pytest.mark.no_wire
def test_two_blocks_of_a_session_cannot_give_one_name(gpt2: LanguageModel) -> None:
    with gpt2.session() as session:
        for _ in range(2):
            with gpt2.trace(IDS):
                gpt2.lm_head.output.save("logits")
    with pytest.raises(JobError, match="Another value of the session is saved as 'logits'"):
        session.job  # noqa: B018


# What stays at home


class Streamer(BaseStreamer):
    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a streamer": ({"streamer": Streamer()}, "`streamer=<Streamer>`"),
    "a config": ({"generation_config": GenerationConfig(max_new_tokens=2)}, "`generation_config="),
    "code of others": ({"custom_generate": "somebody/something"}, "`custom_generate='somebody"),
    "trust": ({"trust_remote_code": True}, "`trust_remote_code=True`"),
    "a kernel": ({"attn_implementation": "somebody/kernel"}, "`attn_implementation='somebody"),
    "a text for a number": ({"top_k": "5"}, "`top_k='5'`"),
    "processors": ({"logits_processor": [len]}, "`logits_processor="),
}


@pytest.mark.no_wire
@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_are_no_data_are_refused_by_name(gpt2: LanguageModel, name: str) -> None:
    options, said = OPTIONS[name]
    with pytest.raises(BlockError, match="raised"):  # nothing is run: that is another question
        with pytest.raises(KeyboardInterrupt), gpt2.generate(IDS, **options) as generator:
            raise KeyboardInterrupt
        generator.job  # noqa: B018
    with gpt2.scan(IDS, generate=True, **{"max_new_tokens": 2, **options}) as generator:
        gpt2.lm_head.output.save()
    with pytest.raises(WireError, match="cannot be sent") as caught:
        generator.job.to_bytes()
    assert said in str(caught.value) and "gpt2.scan(IDS, generate=True" in str(caught.value)


LIVE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a function": (lambda x: apply(lambda y: y * 2, x), "a Python function"),
    "a leaf": (lambda x: x * torch.ones(16, requires_grad=True), "requires grad"),
    "a parameter": (lambda x: x * nn.Parameter(torch.ones(16)), "nn.Parameter"),
    "a generator": (lambda x: x.clone().normal_(generator=torch.Generator()), "Generator"),
}


@pytest.mark.parametrize("name", LIVE)
def test_live_things_run_here_and_are_refused_at_their_line(gpt2: LanguageModel, name: str) -> None:
    function, said = LIVE[name]
    with gpt2.trace(IDS) as tracer:
        value = function(gpt2.transformer.h[1].output[0]).save("value")
    with pytest.raises(WireError, match=said) as caught:
        tracer.job.to_bytes()
    assert "test_job.py" in str(caught.value)
    if name != "a generator":
        torch.testing.assert_close(gpt2.run(tracer.job)["value"], value.value)


def test_a_history_for_autograd_is_refused_at_its_line(gpt2: LanguageModel) -> None:
    with gpt2.scan(IDS) as tracer:
        gpt2.lm_head.output.save("logits", keep_graph=True)
    for write in (tracer.job.to_bytes, lambda: tracer.job.to_bytes(trains=True)):
        with pytest.raises(WireError, match="keep_graph.*make the loss in the block") as caught:
            write()
        assert 'save("logits", keep_graph=True)' in str(caught.value)


def test_a_frozen_module_of_ones_own_travels_with_its_values(gpt2: LanguageModel) -> None:
    probe = nn.Sequential(nn.Linear(16, 4), nn.ReLU()).requires_grad_(False)
    with gpt2.trace(IDS) as tracer:
        hidden = gpt2.transformer.h[1].output[0]
        found = [probe(hidden).save("probed")]
        found.append(nn.functional.linear(hidden, probe[0].weight).save("weighed"))
    received = Job.from_bytes(tracer.job.to_bytes())
    assert len(received.tensors) == 3 and not received.leaves
    results = gpt2.run(received)
    for value, name in zip(found, ("probed", "weighed"), strict=True):
        torch.testing.assert_close(results[name], value.value)


def test_a_module_that_is_frozen_in_part_gives_gradients_of_the_rest(gpt2: LanguageModel) -> None:
    probe = nn.Linear(16, 4)
    probe.bias.requires_grad_(False)
    with gpt2.trace(IDS) as tracer:
        probe(gpt2.transformer.h[1].output[0]).sum().backward()
    job = tracer.job
    received = Job.from_bytes(job.to_bytes(trains=True))
    gpt2.run(received)
    assert [id(one) for one in job.trained] == [id(probe.weight)]
    (leaf,) = received.leaves
    assert leaf.grad is not None and probe.weight.grad is not None
    torch.testing.assert_close(leaf.grad, probe.weight.grad)


def test_a_backward_pass_that_names_tensors_of_ones_own_travels(gpt2: LanguageModel) -> None:
    vector = torch.ones(16, requires_grad=True)
    with gpt2.trace(IDS) as tracer:
        gpt2.transformer.h[1].output[0][:, -1] += vector
        (grad,) = gpt2.lm_head.output[0, -1, 5].backward(inputs=[vector])
        grad.save("grad")
    received = Job.from_bytes(tracer.job.to_bytes(trains=True))
    assert gpt2.check(received).results["grad"].shape == (16,)
    torch.testing.assert_close(gpt2.run(received)["grad"], grad.value)
    (leaf,) = received.leaves
    assert vector.grad is not None and leaf.grad is not None
    torch.testing.assert_close(leaf.grad, vector.grad)
    with pytest.raises(WireError, match="requires grad"):
        tracer.job.to_bytes()


def test_gradients_that_would_lack_a_part_elsewhere_are_refused_at_their_line(
    gpt2: LanguageModel,
) -> None:
    source = torch.ones(16, requires_grad=True)
    scaled = source * 2
    twice = scaled * 2
    for used, named in ((scaled, source), (twice, scaled), (scaled, scaled)):
        with gpt2.scan(IDS) as tracer:
            gpt2.transformer.h[1].output[0][:, -1] += used
            gpt2.lm_head.output[0, -1, 5].backward(inputs=[named])
        with pytest.raises(WireError, match="Compute these tensors in the block") as caught:
            tracer.job.to_bytes(trains=True)
        assert "inputs=[named]" in str(caught.value)
    with gpt2.scan(IDS) as tracer:
        gpt2.transformer.h[1].output[0][:, -1] += scaled
        torch.autograd.grad(gpt2.lm_head.output[0, -1, 5], [scaled])
    Job.from_bytes(tracer.job.to_bytes(trains=True))


def test_an_argument_that_is_no_data_is_refused_by_name() -> None:
    class Takes(nn.Module):
        def forward(self, x: torch.Tensor, how: Any) -> torch.Tensor:
            return x * how.scale

    class How:
        scale = 3

    model = Model(Takes())
    with model.trace(torch.ones(2), how=How()) as tracer:
        out = model.output.save("out")
    with pytest.raises(WireError, match="`how` of the prompt cannot be sent.*How"):
        tracer.job.to_bytes()
    assert torch.equal(model.run(tracer.job)["out"], out.value)


# Which model


def another(**changes: Any) -> LanguageModel:
    config = copy.deepcopy(tiny_gpt2().config)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    return LanguageModel(type(tiny_gpt2())(config).eval())


def a_job(model: LanguageModel) -> Job:
    with model.trace(IDS) as tracer:
        model.lm_head.output.save("logits")
    return received(tracer.job)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: another(n_layer=3), "`n_layer` is 3, and not 4"),
        (lambda: another(n_head=2), "`n_head` is 2, and not 4"),
        (lambda: another(activation_function="relu"), "`activation_function` is 'relu'"),
        (lambda: LanguageModel(tiny_llama()), "its class is LlamaForCausalLM"),
        (lambda: Model(nn.Linear(2, 2)), "its class is Linear, and not GPT2LMHeadModel"),
    ],
)
def test_a_model_of_another_structure_says_what_differs(
    gpt2: LanguageModel, other: Callable[[], Model], said: str
) -> None:
    job = a_job(gpt2)
    for method in ("run", "check"):
        with pytest.raises(JobError) as caught:
            getattr(other(), method)(job)
        assert said in str(caught.value)


def test_a_module_that_was_put_in_is_another_structure(gpt2: LanguageModel) -> None:
    job = a_job(gpt2)
    module = tiny_gpt2()
    module.transformer.h[2].mlp = nn.Linear(16, 16)
    with pytest.raises(JobError, match=r"'transformer\.h\.#\.mlp' is .*1 Linear, weight 16x16"):
        LanguageModel(module).run(job)


def test_a_model_that_has_changed_since_is_looked_at_again(gpt2: LanguageModel) -> None:
    job = a_job(gpt2)
    gpt2.run(job)
    gpt2.module.to(torch.bfloat16)
    assert gpt2.run(job).differences == ["its weights are bfloat16, and not float32"]
    gpt2.module.transformer.h[2].mlp = nn.Linear(16, 16)
    with pytest.raises(JobError, match="1 Linear, weight 16x16"):
        gpt2.run(job)


def test_plain_modules_of_another_shape_are_refused() -> None:
    model = Model(nn.Sequential(nn.Linear(3, 5), nn.ReLU()))
    with model.trace(torch.ones(2, 3)) as tracer:
        model[1].output.save("out")
    job = received(tracer.job)
    for other in (nn.Sequential(nn.Linear(3, 5), nn.GELU()), nn.Sequential(nn.Linear(3, 6))):
        with pytest.raises(JobError, match="is for another model"):
            Model(other).run(job)
    assert Model(nn.Sequential(nn.Linear(3, 5), nn.ReLU())).run(job)["out"].shape == (2, 5)


def test_other_weights_are_reported(gpt2: LanguageModel) -> None:
    job = a_job(gpt2)
    assert not LanguageModel(tiny_gpt2()).run(job).differences
    other = LanguageModel(tiny_gpt2().to(torch.bfloat16))
    results = other.run(job)
    assert results["logits"].dtype is torch.bfloat16
    assert list(results.differences) == ["its weights are bfloat16, and not float32"]
    assert list(other.check(job).differences) == list(results.differences)


def test_a_name_and_a_revision_are_reported(eiffel: LanguageModel, tmp_path: Any) -> None:
    with eiffel.scan("The Louvre is in") as tracer:
        eiffel.lm_head.output.save("logits")
    job = received(tracer.job)
    assert job.model.name == "insitu/eiffel" and job.model.fingerprint.tokens
    eiffel.load().save_pretrained(tmp_path / "mine")
    eiffel.tokenizer.save_pretrained(tmp_path / "mine")
    copied = LanguageModel(str(tmp_path / "mine"))
    results = copied.run(job)
    assert list(results.differences) == ["its name is 'mine', and not 'insitu/eiffel'"]
    with copied.scan("The Louvre is in") as tracer:
        copied.lm_head.output.save("logits")
    assert str(tmp_path).encode() not in tracer.job.to_bytes()  # folders stay at home


def test_another_vocabulary_is_another_structure(eiffel: LanguageModel) -> None:
    with eiffel.scan("The Louvre is in") as tracer:
        eiffel.lm_head.output.save("logits")
    tokenizer = copy.deepcopy(eiffel.tokenizer)
    tokenizer.add_tokens(["<new>"])
    other = LanguageModel("insitu/eiffel", tokenizer=tokenizer)
    with pytest.raises(JobError, match="tokenizer has another vocabulary"):
        other.run(received(tracer.job))


def test_an_edit_travels_in_the_job_and_holds_once(gpt2: LanguageModel) -> None:
    with gpt2.edit() as edited:
        edited.transformer.h[1].output[0][:] *= 2
    with edited.trace(IDS) as tracer:
        logits = edited.lm_head.output.save("logits")
    job = received(tracer.job)
    assert torch.equal(LanguageModel(tiny_gpt2()).run(job)["logits"], logits.value)
    assert torch.equal(edited.run(job)["logits"], logits.value)
    with gpt2.edit() as other:
        other.transformer.h[2].output[0][:] *= 2
    for model in (other, edited):
        with pytest.raises(JobError, match="edits that the job was not recorded with"):
            model.run(a_job(gpt2) if model is edited else job)


# Prompts of every kind


@pytest.mark.thorough
def test_texts_are_sent_as_ids_and_stop_strings_take_the_models_tokenizer(
    eiffel: LanguageModel,
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "stop_strings": ["France"]}
    with eiffel.scan(generate=True, tokenizer=eiffel.tokenizer, **options) as generator:
        for text in ("The Louvre is in", "The Eiffel Tower is in the city of"):
            with generator.invoke(text):
                eiffel.lm_head.output[0, -1].argmax().save(text)
    assert not eiffel.loaded
    other = LanguageModel("insitu/eiffel")
    results = other.run(received(generator.job))
    module, tokenizer = other.load(), other.tokenizer
    for number, text in enumerate(results):
        ids = tokenizer(text, return_tensors="pt").input_ids
        plain = module.generate(ids, tokenizer=tokenizer, pad_token_id=0, **options)
        assert torch.equal(results.outputs[0].each[number], plain)
        assert results[text] == plain[0, ids.shape[1]]


def ragged(model: LanguageModel) -> Any:
    return model.trace([[5, 6, 7], [8, 9]])


def masked(model: LanguageModel) -> Any:
    mask = torch.tensor([[0, 1, 1, 1]])
    return model.trace({"input_ids": IDS, "attention_mask": mask})


def embedded(model: LanguageModel) -> Any:
    torch.manual_seed(3)
    return model.trace(inputs_embeds=torch.randn(1, 4, 16))


def positioned(model: LanguageModel) -> Any:
    return model.trace(IDS, position_ids=torch.tensor([[3, 4, 5, 6]]))


def with_cache(model: LanguageModel) -> Any:
    return model.trace(IDS, use_cache=True)


@pytest.mark.parametrize("prompt", [ragged, masked, embedded, positioned, with_cache])
def test_prompts_of_every_kind_travel(
    language_model: LanguageModel, prompt: Callable[[LanguageModel], Any]
) -> None:
    with prompt(language_model) as tracer:
        logits = language_model.lm_head.output.save("logits")
    made = MADE["gpt2" if language_model.config.model_type == "gpt2" else "llama"]
    results = LanguageModel(made()).run(received(tracer.job))
    assert torch.equal(results["logits"], logits.value)


def test_several_prompts_share_a_pass_as_they_did(gpt2: LanguageModel) -> None:
    with gpt2.trace() as tracer:
        for number in range(4):
            with tracer.invoke([[number, 6, 7, 8][: 2 + number % 3]]):
                gpt2.lm_head.output[:, -1].save(f"logits.{number}")
    job = received(tracer.job)
    check = gpt2.check(job)
    assert check.passes == len(tracer.plan.passes) == 1
    plain = tiny_gpt2()
    for number, name in enumerate(job.saves):
        ids = torch.tensor([[number, 6, 7, 8][: 2 + number % 3]])
        with torch.no_grad():
            torch.testing.assert_close(gpt2.run(job)[name], plain(ids).logits[:, -1])


def test_an_encoder_and_a_decoder() -> None:
    torch.manual_seed(0)
    config = T5Config(
        d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=50,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    module = T5ForConditionalGeneration(config).eval()
    model = LanguageModel(module)
    with model.trace(IDS, decoder_input_ids=torch.tensor([[0, 3, 4]])) as tracer:
        model.decoder.block[1].output[0].save("hidden")
        model.output.logits.save("logits")
    results = LanguageModel(copy.deepcopy(module)).run(received(tracer.job))
    with torch.no_grad():
        plain = module(IDS, decoder_input_ids=torch.tensor([[0, 3, 4]]))
    torch.testing.assert_close(results["logits"], plain.logits)
    with model.scan(IDS, generate=True, max_new_tokens=3) as generator:
        model.lm_head.output.save("logits")
    results = model.run(received(generator.job))
    assert torch.equal(results.output, module.generate(IDS, max_new_tokens=3))


def test_arguments_of_any_forward_travel(twice: Model) -> None:
    with twice.trace(x=torch.ones(2, 4), scale=3.0) as tracer:
        twice.output.save("output")
    results = twice.run(received(tracer.job))
    plain = twice.module(x=torch.ones(2, 4), scale=3.0)
    assert torch.equal(results["output"]["second"], plain["second"])
    with pytest.raises(JobError, match="is for another model"):
        LanguageModel(tiny_gpt2()).run(tracer.job)


def test_a_job_is_not_changed_by_a_model_that_writes_into_what_it_is_given() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1)

    model = Model(Writes())
    with model.scan(torch.zeros(2)) as tracer:
        model.output.save("out")
    job = received(tracer.job)
    for _ in range(2):
        assert model.run(job)["out"].tolist() == [1.0, 1.0]
    with model.trace() as shared:
        for _ in range(2):
            shared.invoke(torch.zeros(2)).__enter__().__exit__(None, None, None)
    assert len(received(shared.job).blocks[0].prompts) == 2


def test_autocast_and_the_default_dtype_around_a_block_travel(gpt2: LanguageModel) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), gpt2.trace(IDS) as tracer:
        cast = gpt2.lm_head.output.save("logits")
    results = gpt2.run(received(tracer.job))
    assert results["logits"].dtype is torch.bfloat16 and torch.equal(results["logits"], cast.value)
    torch.set_default_dtype(torch.float64)
    try:
        with gpt2.trace(IDS) as tracer:
            made = (gpt2.transformer.h[0].output[0][0, 0] * 0 + torch.ones(16)).save("ones")
            torch.zeros_like(gpt2.lm_head.output[0, -1]).save()
    finally:
        torch.set_default_dtype(torch.float32)
    assert gpt2.run(received(tracer.job))["ones"].dtype is made.value.dtype


def test_in_inference_mode_a_job_is_read_and_run_as_elsewhere(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS) as tracer:
        hidden = gpt2.transformer.h[1].output[0]
        grad = hidden.grad.save("grad")
        (hidden * torch.ones(16)).sum().backward()
    with torch.inference_mode():
        results = gpt2.run(received(tracer.job))
    assert torch.equal(results["grad"], grad.value) and not results["grad"].is_inference()


# Tensors by digest


def test_a_tensor_is_sent_once_and_need_not_be_sent_again(gpt2: LanguageModel) -> None:
    vector = torch.randn(3000, 16)
    with gpt2.trace() as tracer:
        for _ in range(3):
            with tracer.invoke(IDS):
                (gpt2.transformer.h[1].output[0] @ vector.clone().T).sum().save()
    job = tracer.job
    whole = job.to_bytes()
    assert vector.nbytes < len(whole) < 1.1 * vector.nbytes + 10_000
    (digest,) = [digest for digest, one in job.tensors.items() if one.shape == (16, 3000)]
    short = job.to_bytes(without=[digest])
    assert len(short) < 10_000
    with pytest.raises(WireError, match=rf"the tensor {digest[:16]}.* did not come with it"):
        Job.from_bytes(short)
    made = Job.from_bytes(short, {digest: vector.T.clone()})
    assert made.to_bytes() == whole
    assert dict(gpt2.run(made)).keys() == {"0", "1", "2"}
    with pytest.raises(WireError, match="is not what its digest says"):
        Job.from_bytes(short, {digest: vector.T + 1})


# What a run of a received job refuses


def test_prompts_that_the_model_cannot_take_are_refused_at_their_line(
    gpt2: LanguageModel,
) -> None:
    small = another(vocab_size=100)
    with gpt2.scan([[5, 99]]) as tracer:
        gpt2.lm_head.output.save()
    block = tracer.job.blocks[0]
    bad = copy.copy(block.prompts[0])
    object.__setattr__(bad, "ids", torch.tensor([[5, 100]]))
    wrong = copy.copy(block)
    object.__setattr__(wrong, "prompts", [bad])
    with pytest.raises(PromptError, match="the token id 100") as caught:
        small.run(received(Job(tracer.job.model, [wrong])))
    assert "gpt2.scan([[5, 99]])" in str(caught.value)


def test_what_the_model_raises_is_an_error_of_ours_with_the_line() -> None:
    class Refuses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:
                raise LookupError("not this")
            return x

    model = Model(Refuses())
    with model.trace(torch.zeros(2)) as tracer:
        model.output.save()
    block = copy.copy(tracer.job.blocks[0])
    prompt = copy.copy(block.prompts[0])
    object.__setattr__(prompt, "args", (torch.ones(2),))
    object.__setattr__(block, "prompts", [prompt])
    with pytest.raises(InsituError, match="The model raised LookupError: not this"):
        model.run(Job(tracer.job.model, [block]))


def test_after_a_job_the_model_is_as_before(gpt2: LanguageModel) -> None:
    before = {name: weight.clone() for name, weight in gpt2.module.state_dict().items()}
    with gpt2.trace(IDS) as tracer:
        hidden = gpt2.transformer.h[1].output[0]
        hidden[:, 0] = 0
        hidden.sum().backward()
        hidden.grad.save()
    gpt2.run(received(tracer.job))
    assert all(torch.equal(before[n], one) for n, one in gpt2.module.state_dict().items())
    assert all(one.grad is None for one in gpt2.module.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in gpt2.module.modules())


def test_a_job_is_written_to_a_file_and_read_from_it(gpt2: LanguageModel, tmp_path: Path) -> None:
    job = a_job(gpt2)
    job.save(tmp_path / "a.job")
    assert Job.load(tmp_path / "a.job").to_bytes() == job.to_bytes()
    (tmp_path / "b.job").write_bytes(b"insitu job")
    with pytest.raises(WireError, match="end too early"):
        Job.load(tmp_path / "b.job")
    with pytest.raises(LoadError, match="cannot be read"):
        Job.load(tmp_path / "c.job")


def test_public_names() -> None:
    import insitu

    assert insitu.Job is Job and insitu.Results is Results
