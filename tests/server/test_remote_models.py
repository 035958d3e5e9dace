"""Blocks of a model that a server has: what they give, and what they raise, is as it is here."""

import copy
import json
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from insitu import (
    Cancel,
    CancelledError,
    Job,
    JobError,
    LanguageModel,
    LoadError,
    MemorySink,
    Model,
    NoValueError,
    OptionError,
    RemoteError,
    ShapeError,
    VisionLanguageModel,
    WireError,
    cancellable,
    cond,
    listening,
    saving_to,
)
from insitu.cli import app
from insitu.engine.events import PassEnded, TokensChosen, ValueSaved
from insitu.methods import (
    SparseAutoencoder,
    activation_patching,
    attention_patterns,
    logit_difference,
    logit_lens,
    sae_features,
    train_tuned_lens,
    tuned_lens,
    use_sae,
)
from insitu.remote import Connection, RemoteJob, remote_job
from insitu.remote.protocol import ENDS
from insitu.tracing import away

EIFFEL = "The Eiffel Tower is in the city of"
LOUVRE = "The Louvre is in the city of"


@pytest.fixture
def here() -> LanguageModel:
    return LanguageModel("insitu/eiffel")


def hooked(model: LanguageModel, text: str, layer: int) -> torch.Tensor:
    """What a plain hook sees behind a block."""
    module, seen = model.load(), list[torch.Tensor]()
    handle = module.transformer.h[layer].register_forward_hook(
        lambda _, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        module(**model.tokenizer(text, return_tensors="pt"))
    handle.remove()
    return seen[0]


def test_a_trace_gives_what_a_hook_sees(there: LanguageModel, here: LanguageModel) -> None:
    with there.trace(EIFFEL):
        hidden = there.transformer.h[3].output[0].save()
    torch.testing.assert_close(hidden.value, hooked(here, EIFFEL, 3), rtol=1e-5, atol=1e-5)
    assert not there.loaded


def test_a_generation_gives_tokens_and_values_of_steps(
    there: LanguageModel, here: LanguageModel
) -> None:
    with there.generate(max_new_tokens=3) as generator:
        with generator.invoke(EIFFEL) as first:
            with generator.every_step():
                norms = there.transformer.h[1].output[0].norm().save()
        with generator.invoke(LOUVRE) as second:
            pass
    module = here.load()
    for invoker, text in ((first, EIFFEL), (second, LOUVRE)):
        ids = here.tokenizer(text, return_tensors="pt")
        expected = module.generate(**ids, max_new_tokens=3, do_sample=False)
        assert invoker.output.tolist() == expected.tolist()
    assert len(norms) == first.output.shape[1] - first.ids.shape[1]
    assert generator.output.shape[0] == 2


def test_outputs_of_models_have_attributes_keys_and_places(
    there: LanguageModel, here: LanguageModel
) -> None:
    found = []
    options = {"return_dict_in_generate": True, "output_scores": True, "use_cache": False}
    for model in (there, here):
        with model.trace(EIFFEL):
            output = model.output.save()
        with model.generate(EIFFEL, max_new_tokens=2, **options) as generator:
            pass
        generated = generator.output
        assert output.hidden_states is None and generated.logits is None
        found.append([type(output.value), output.logits, output["logits"], output[0], *output])
        found[-1] += [type(generated), generated.sequences, generated["scores"], generated[0]]
    assert str(found[0]) == str(found[1])


def test_a_cache_that_a_generation_returns_stays_on_the_server(there: LanguageModel) -> None:
    with there.generate(EIFFEL, max_new_tokens=2, return_dict_in_generate=True) as generator:
        logits = there.lm_head.output[0, -1].save()
    assert logits.shape == (1336,) and generator.output.sequences.shape == (1, 10)
    with pytest.raises(NoValueError, match=r"DynamicCache.*stayed(.|\n)*test_remote_models\.py"):
        generator.output.past_key_values.get_seq_length()


def test_a_session_is_one_job(there: LanguageModel, here: LanguageModel) -> None:
    found = []
    for model in (there, here):
        with model.session():
            with model.trace(EIFFEL):
                donor = model.transformer.h[2].output[0][:, -1]
            with model.trace(LOUVRE):
                model.transformer.h[2].output[0][:, -1] = donor
                found.append(model.lm_head.output[0, -1].save())
    torch.testing.assert_close(found[0].value, found[1].value, rtol=1e-5, atol=1e-5)


def test_edits_travel(there: LanguageModel, here: LanguageModel) -> None:
    found = []
    for model in (there, here):
        with model.edit() as edited:
            edited.transformer.h[2].output[0][:] = 0
        with edited.trace(EIFFEL):
            found.append(edited.lm_head.output.save())
    torch.testing.assert_close(found[0].value, found[1].value, rtol=1e-5, atol=1e-5)


def test_gradients_of_sites(there: LanguageModel, here: LanguageModel) -> None:
    found = []
    for model in (there, here):
        with model.trace(EIFFEL):
            hidden = model.transformer.h[2].output[0]
            model.lm_head.output[0, -1].max().backward()
            found.append(hidden.grad.save())
    torch.testing.assert_close(found[0].value, found[1].value, rtol=1e-5, atol=1e-5)


def test_what_is_trained_gets_its_gradient_back(there: LanguageModel, here: LanguageModel) -> None:
    found = []
    for model in (there, here):
        # Two that are equal, one that is made of another, and one that nothing is made of.
        one, other = torch.zeros(128, requires_grad=True), torch.nn.Parameter(torch.zeros(128))
        source = torch.ones(128, requires_grad=True)
        scaled = source * 0.01
        with model.trace(EIFFEL):
            model.transformer.h[2].output[0][:, -1] += one + 2 * other + scaled
            model.lm_head.output[0, -1].log_softmax(-1)[5].backward()
        found.append([one.grad, other.grad, source.grad])
    for mine, theirs in zip(*found, strict=True):
        assert mine is not None and mine.abs().sum() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_frozen_module_of_ones_own_is_sent(there: LanguageModel, here: LanguageModel) -> None:
    encoder = torch.nn.Linear(128, 1024).requires_grad_(False)  # so large that it goes apart
    found = []
    for model in (there, here):
        with model.trace(EIFFEL):
            found.append(encoder(model.transformer.h[2].output[0]).relu().save())
    torch.testing.assert_close(found[0].value, found[1].value, rtol=1e-4, atol=1e-4)


def test_gradients_of_tensors_of_ones_own_that_a_backward_pass_names(
    there: LanguageModel, here: LanguageModel
) -> None:
    found = []
    for model in (there, here):
        vector, probe = torch.ones(128, requires_grad=True), torch.nn.Linear(128, 128)
        torch.nn.init.eye_(probe.weight)
        torch.nn.init.zeros_(probe.bias)
        with model.trace(EIFFEL):
            hidden = model.transformer.h[2].output[0]
            hidden[:, -1] = probe(hidden[:, -1] + vector)
            logit = model.lm_head.output[0, -1, 5]
            named = [vector, hidden, *probe.parameters()]
            given = [grad.save() for grad in torch.autograd.grad(logit, named, retain_graph=True)]
            (accumulated,) = logit.backward(inputs=vector)
            accumulated.save()
        assert probe.weight.grad is None and vector.grad is not None
        found.append([one.value for one in (*given, accumulated)] + [vector.grad])
    for mine, theirs in zip(*found, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_an_error_is_at_the_line_that_was_written_here(there: LanguageModel) -> None:
    with pytest.raises(ShapeError) as caught:
        with there.trace() as tracer:
            with tracer.invoke(EIFFEL):
                good = there.lm_head.output.save()
            with tracer.invoke(EIFFEL):
                large = there.transformer.h[0].output[0].flatten()
                bad = large[(large > 1e9).nonzero()[0]].save()  # no value is so large
    assert __file__ in str(caught.value) and "no value is so large" in str(caught.value)
    assert caught.value.location is not None and caught.value.location.file == __file__
    assert good.shape[0] == 1
    with pytest.raises(NoValueError):
        _ = bad.value


def test_what_does_not_travel_is_refused_at_its_line(there: LanguageModel) -> None:
    from insitu import apply

    with pytest.raises(WireError, match="Python function") as caught:
        with there.trace(EIFFEL):
            apply(lambda value: value * 2, there.transformer.h[0].output[0]).save()
    assert __file__ in str(caught.value)


def test_a_history_for_autograd_is_refused_before_it_is_sent(there: LanguageModel) -> None:
    with pytest.raises(WireError, match="make the loss in the block") as caught:
        with there.trace(EIFFEL):
            there.lm_head.output[0, -1].save(keep_graph=True)
    assert "save(keep_graph=True)" in str(caught.value) and __file__ in str(caught.value)


def test_weights_are_not_here(there: LanguageModel) -> None:
    with pytest.raises(LoadError, match="are on the server"):
        there.load()
    with pytest.raises(LoadError, match="are on the server"):
        _ = there.W_U


WEIGHTS = {
    "a parameter": lambda m, x: x @ m.transformer.h[0].mlp.c_fc.module.weight,
    "a view": lambda m, x: x * m.transformer.ln_f.module.weight[None],
    "a shared weight": lambda m, x: x @ m.transformer.wte.module.weight.T,
    "a function of torch": lambda m, x: torch.nn.functional.linear(x, m.lm_head.module.weight),
    "a module's call": lambda m, x: m.module.lm_head(x),
    "a branch": lambda m, x: cond(x.sum() > 0, lambda y: y @ m.lm_head.module.weight.T, abs, x),
}
CALLS = {
    "a parameter": "model.transformer.h[0].mlp.c_fc(value)",
    "a view": "model.transformer.ln_f(value)",
}


@pytest.mark.parametrize("how", WEIGHTS)
def test_a_line_with_a_weight_says_which_module_to_call(there: LanguageModel, how: str) -> None:
    with pytest.raises(LoadError, match="the weights are on the server") as caught:
        with there.trace(EIFFEL):
            WEIGHTS[how](there, there.transformer.h[2].output[0]).save()
    assert f"`{CALLS.get(how, 'model.lm_head(value)')}`" in str(caught.value)
    assert caught.value.location is not None and caught.value.location.file == __file__


def test_a_job_with_a_copy_of_a_weight_is_refused(there: LanguageModel) -> None:
    unembedding: Any = there.lm_head.module
    for waits in (True, False):
        with pytest.raises(LoadError, match=r"shape \(128, 1336\) on the meta device"):
            with there.trace(EIFFEL, wait=waits):
                hidden = there.transformer.h[2].output[0]
                (hidden @ unembedding.weight.detach().T).save()


def test_a_module_that_is_called_instead_of_its_weight(
    there: LanguageModel, here: LanguageModel
) -> None:
    with there.trace(EIFFEL):
        found = there.lm_head(there.transformer.h[3].output[0]).save()
    module: Any = here.load()
    expected = hooked(here, EIFFEL, 3) @ module.lm_head.weight.detach().T
    torch.testing.assert_close(found.value, expected, rtol=1e-4, atol=1e-4)


def test_the_plan_of_a_block_stays_on_the_server(
    there: LanguageModel, here: LanguageModel, url: str
) -> None:
    with there.trace(EIFFEL) as own:
        there.logits.save()
        with pytest.raises(NoValueError, match="made when the block ends"):
            _ = own.plan
    with there.session(), there.trace(EIFFEL) as of_session:
        there.logits.save()
    with here.trace(EIFFEL, remote=url) as sent:
        here.logits.save()
    with there.generate(EIFFEL, max_new_tokens=1, wait=False) as not_waited_for:
        there.logits.save()
    for tracer in (own, of_session, sent, not_waited_for):
        with pytest.raises(NoValueError, match=r"stays on the server(.|\n)*`model\.scan`"):
            _ = tracer.plan
        assert "sent to a server" in repr(tracer)
    with there.scan(EIFFEL) as tracer:
        there.logits.save()
    assert len(tracer.plan.passes) == 1
    assert Connection(url).plan(own.job).passes == 1


def test_a_generation_without_an_output_says_why(there: LanguageModel) -> None:
    with there.generate(EIFFEL, max_new_tokens=3) as generator:
        with generator.step(1):
            there.transformer.h[1].stop()
    with pytest.raises(NoValueError, match="`stop` ended the run"):
        _ = generator.output
    with there.session(), there.generate(EIFFEL, max_new_tokens=3) as generator:
        there.transformer.h[1].stop()
    with pytest.raises(NoValueError, match="`stop` ended the run"):
        _ = generator.output
    with there.generate(EIFFEL, max_new_tokens=1, wait=False) as generator:
        pass
    with pytest.raises(NoValueError, match="not waited for(.|\n)*remote_job"):
        _ = generator.output
    assert generator.remote_job.result().output.shape == (1, 9)


def test_a_job_that_is_not_waited_for(there: LanguageModel, url: str) -> None:
    with there.generate(EIFFEL, max_new_tokens=2, wait=False) as generator:
        logits = there.lm_head.output[0, -1].save("logits")
    job = generator.remote_job
    results = job.result(60)
    assert results["logits"].shape == (1336,)
    assert [event.kind for event in job.events()].count("token") >= 1
    assert RemoteJob.attach(job.id, url).result(10)["logits"].equal(results["logits"])
    assert job.status.state == "done" and job.cancel().state == "done"
    with pytest.raises(NoValueError, match="remote_job"):
        _ = logits.value


def test_waiting_takes_a_server(here: LanguageModel) -> None:
    with pytest.raises(OptionError, match="remote"):
        here.trace(EIFFEL, wait=False)


def test_a_block_of_a_model_that_is_here_can_be_sent(here: LanguageModel, url: str) -> None:
    with here.trace(EIFFEL, remote=url):
        sent = here.lm_head.output[0, -1].save()
    assert not here.loaded
    with here.session(remote=url), here.trace(EIFFEL):
        again = here.lm_head.output[0, -1].save()
    with here.trace(EIFFEL):
        own = here.lm_head.output[0, -1].save()
    torch.testing.assert_close(sent.value, own.value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.value, own.value, rtol=1e-5, atol=1e-5)


def test_the_url_of_the_environment(
    here: LanguageModel, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match="INSITU_REMOTE is not set"):
        here.trace(EIFFEL, remote=True)
    monkeypatch.setenv("INSITU_REMOTE", url)
    with here.trace(EIFFEL, remote=True):
        logits = here.lm_head.output.save()
    assert logits.shape[-1] == 1336


@pytest.mark.parametrize("remote", [1, "", b"http://x", 2.5])
def test_what_is_no_server(here: LanguageModel, remote: Any) -> None:
    with pytest.raises(OptionError, match="`remote` is the URL"):
        here.trace(EIFFEL, remote=remote)


def test_options_of_loading_are_the_servers(url: str) -> None:
    name = "insitu/eiffel"
    with pytest.raises(OptionError, match="dtype"):
        LanguageModel(name, remote=url, dtype="float16")
    with pytest.raises(RemoteError):
        LanguageModel(name, remote="http://127.0.0.1:9")


def test_a_scan_runs_nothing(there: LanguageModel) -> None:
    with there.scan(EIFFEL) as tracer:
        logits = there.logits.save("logits")
    assert logits.shape == (1, 8, 1336)
    job = Job.from_bytes(tracer.job.to_bytes())
    results = there.run(job)
    assert results["logits"].shape == (1, 8, 1336)
    with pytest.raises(OptionError, match="limits"):
        from insitu import Limits

        there.run(job, limits=Limits(nodes=1))


def test_large_tensors_go_once(there: LanguageModel, here: LanguageModel) -> None:
    encoder = torch.randn(128, 1024)  # 512 KB
    for _ in range(2):
        with there.trace(EIFFEL):
            code = (there.transformer.h[2].output[0] @ encoder).relu().sum().save()
    with here.trace(EIFFEL):
        own = (here.transformer.h[2].output[0] @ encoder).relu().sum().save()
    torch.testing.assert_close(code.value, own.value, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:Attention scores")
def test_methods_work_with_a_remote_model(there: LanguageModel, here: LanguageModel) -> None:
    metric = logit_difference(" Paris", " Moscow")
    clean, corrupted = "The Louvre is in the city of", "The Kremlin is in the city of"
    for method in (
        lambda model: logit_lens(model, EIFFEL),
        lambda model: attention_patterns(model, EIFFEL),
        lambda model: activation_patching(model, clean, corrupted, metric, layers=[0, 3]),
    ):
        mine, theirs = method(there), method(here)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-5)
    assert not there.loaded


def small_encoder() -> SparseAutoencoder:
    draw = torch.Generator().manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(64, 128, generator=draw), dim=-1)
    weights = {"W_enc": decoder.T.contiguous(), "b_enc": torch.full((64,), -0.5)}
    return SparseAutoencoder(
        architecture="standard",
        weights={**weights, "W_dec": decoder, "b_dec": torch.zeros(128)},
        hook_name="blocks.3.hook_resid_post",
        centred=False,
        normalisation="none",
        k=0,
        by_norm=False,
        told={},
    )


def test_a_sparse_autoencoder_runs_on_the_server(there: LanguageModel, here: LanguageModel) -> None:
    sae, found = small_encoder(), []
    expected = sae.encode(hooked(here, EIFFEL, 3))
    features = sae_features(there, EIFFEL, sae, top=3)
    torch.testing.assert_close(features.values, expected[0].topk(3).values, rtol=1e-5, atol=1e-5)
    for model in (there, here):
        with model.trace(EIFFEL):
            spliced = use_sae(model, sae)
            read = spliced.features.save()
            spliced.features[..., 3] += 20
            found.append(model.lm_head.output.save())
        torch.testing.assert_close(read.value, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0].value, found[1].value, rtol=1e-4, atol=1e-4)
    assert not there.loaded


@pytest.mark.thorough
def test_a_tuned_lens_runs_on_the_server_and_is_trained_elsewhere(
    there: LanguageModel, here: LanguageModel
) -> None:
    with pytest.raises(LoadError, match="weights of the model, which are on a server") as caught:
        train_tuned_lens(there, [EIFFEL], epochs=1)
    assert caught.value.location is not None and caught.value.location.file == __file__
    lens = train_tuned_lens(here, [EIFFEL, LOUVRE], epochs=1, progress=False)
    mine, theirs = (tuned_lens(model, EIFFEL, lens, positions=-1) for model in (there, here))
    torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-5)
    assert mine.texts == theirs.texts and not there.loaded


def test_who_listens_hears_of_passes_and_tokens(there: LanguageModel) -> None:
    told: list[Any] = []
    with listening(told.append), there.generate(EIFFEL, max_new_tokens=2):
        there.lm_head.output[0, -1].save("logits")
    kinds = [type(event).__name__ for event in told]
    assert kinds.count("TokensChosen") >= 1 and kinds.count("PassEnded") == 1
    assert next(event for event in told if type(event) is PassEnded).done == 1


def test_a_function_is_given_tokens_as_they_come(there: LanguageModel) -> None:
    told: list[TokensChosen] = []
    with there.generate(EIFFEL, max_new_tokens=3, on_token=told.append) as generator:
        pass
    assert [event.ids[0] for event in told] == generator.output[0, -3:].tolist()
    with pytest.raises(OptionError, match=r"remote_job\.events"):
        there.generate(EIFFEL, max_new_tokens=3, wait=False, on_token=told.append)


def test_who_listens_hears_in_which_block_of_a_session_it_is(there: LanguageModel) -> None:
    told: list[Any] = []
    with listening(told.append), there.session():
        with there.trace(EIFFEL):
            hidden = there.transformer.h[0].output[0].save("hidden")
        with there.trace(LOUVRE):
            there.transformer.h[0].output[0][:, 0] = hidden[:, 0]
            there.lm_head.output.save("logits")
    saved = [event.key for event in told if isinstance(event, ValueSaved)]
    assert [(key.name, key.block) for key in saved] == [("hidden", 0), ("logits", 1)]
    assert [event.block for event in told if isinstance(event, PassEnded)] == [0, 1]


def test_a_run_can_be_cancelled(there: LanguageModel) -> None:
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(CancelledError):
        with cancellable(cancel), there.trace(EIFFEL):
            there.lm_head.output.save()


def test_a_sink_is_for_runs_here(there: LanguageModel) -> None:
    with pytest.raises(OptionError, match="saving_to"):
        with saving_to(MemorySink()), there.trace(EIFFEL):
            there.lm_head.output.save()


def test_other_models_are_on_no_server(url: str) -> None:
    for kind in (Model.from_pretrained, VisionLanguageModel):
        with pytest.raises(OptionError, match="`remote`"):
            kind("insitu/eiffel", remote=url)
    with pytest.raises(OptionError, match="what it is called there"):
        LanguageModel(LanguageModel("insitu/eiffel").load(), remote=url)


async def traced(model: LanguageModel) -> torch.Tensor:
    async with model.trace(EIFFEL):
        logits = model.lm_head.output[0, -1].save()
    return logits.value


def test_async_blocks(there: LanguageModel) -> None:
    import asyncio

    async def both() -> list[torch.Tensor]:
        return await asyncio.gather(traced(there), traced(there))

    one, other = asyncio.run(both())
    torch.testing.assert_close(one, other)


def test_a_plan_says_what_a_job_would_take(there: LanguageModel, url: str) -> None:
    with there.scan(EIFFEL) as tracer:
        there.logits.save("logits")
    plan = Connection(url).plan(tracer.job)
    assert (plan.passes, plan.results[0].bytes) == (1, 8 * 1336 * 4)


def sent(there: LanguageModel, leaf: torch.Tensor) -> RemoteJob:
    """A job that trains a leaf, on its way."""
    with there.trace(EIFFEL, wait=False) as tracer:
        there.transformer.h[2].output[0][:, -1] += leaf
        there.lm_head.output[0, -1, 5].backward()
    return tracer.remote_job


def test_gradients_come_back_also_if_nobody_has_waited(there: LanguageModel) -> None:
    leaf = torch.zeros(128, requires_grad=True)
    job = sent(there, leaf)
    job.result()
    assert leaf.grad is not None
    before = leaf.grad.clone()
    job.result()
    assert leaf.grad.equal(before) and before.abs().sum() > 0


def test_many_leaves_may_be_equal(there: LanguageModel) -> None:
    leaves = [torch.zeros(128, requires_grad=True) for _ in range(24)]
    with there.trace(EIFFEL):
        for leaf in leaves:
            there.transformer.h[2].output[0][:, -1] += leaf
        there.lm_head.output[0, -1, 5].backward()
    first = leaves[0].grad
    assert first is not None and all(
        leaf.grad is not None and leaf.grad.equal(first) for leaf in leaves
    )


def test_weights_of_a_model_that_is_here_are_not_trained_by_a_server(
    here: LanguageModel, url: str
) -> None:
    weight = here.load().lm_head.weight
    with pytest.raises(OptionError, match="detach"):
        with here.trace(EIFFEL, remote=url):
            (here.transformer.h[0].output[0] @ weight.T).sum().backward()
    assert weight.grad is None


def test_blocks_of_a_session_may_save_by_the_same_names(there: LanguageModel) -> None:
    with there.session():
        with there.trace(EIFFEL):
            one = there.lm_head.output[0, -1].save("logits")
        with there.trace(LOUVRE):
            other = there.lm_head.output[0, -1].save("logits")
    assert one.shape == other.shape and not one.value.equal(other.value)


def test_a_block_of_a_session_is_not_sent_by_itself(there: LanguageModel, url: str) -> None:
    for options in ({"remote": url}, {"wait": False}):
        with pytest.raises(OptionError, match="session"), there.session():
            with there.trace(EIFFEL, **options):
                there.lm_head.output.save()


def test_any_of_several_cancels_ends_a_run(there: LanguageModel) -> None:
    first, second = Cancel(), Cancel()
    second.cancel()
    with pytest.raises(CancelledError), cancellable(first), cancellable(second):
        with there.trace(EIFFEL):
            there.lm_head.output.save()


def test_large_results_are_said_before_they_are_sent(
    there: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(away, "LARGE_BYTES", 30_000)
    with pytest.warns(UserWarning, match=r"42,752 bytes(.|\n)*too many logits"):
        with there.trace(EIFFEL):
            there.lm_head.output.save()  # too many logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with there.trace(EIFFEL):
            there.lm_head.output[0, -1].save()


@pytest.mark.parametrize(
    "args",
    [
        ("lens", LOUVRE, "--layers", "1,5"),
        pytest.param(("attention", LOUVRE, "--layers", "2"), marks=pytest.mark.thorough),
        pytest.param(
            (
                "patch",
                EIFFEL,
                LOUVRE,
                "--answer",
                "Paris",
                "--instead",
                "Rome",
                "--positions",
                "-1",
            ),
            marks=pytest.mark.thorough,
        ),
    ],
    ids=lambda args: args[0],
)
def test_commands_take_a_server(url: str, args: tuple[str, ...]) -> None:
    command, *others = args
    found = [
        CliRunner().invoke(app, [command, "insitu/eiffel", *others, "--json", *remote])
        for remote in ([], ["--remote", url])
    ]
    assert [one.exit_code for one in found] == [0, 0], [one.output for one in found]
    own, sent = (numbers(json.loads(one.stdout)) for one in found)
    assert own and torch.allclose(torch.tensor(own), torch.tensor(sent), rtol=1e-4, atol=1e-5)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [one for item in value.values() for one in numbers(item)]
    if isinstance(value, list):
        return [one for item in value for one in numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


def test_what_loads_a_model_means_nothing_with_a_server(url: str) -> None:
    found = CliRunner().invoke(
        app, ["lens", "insitu/eiffel", "The", "--remote", url, "--dtype", "float16"]
    )
    assert found.exit_code == 2 and "dtype" in found.output


def test_a_name_that_the_server_does_not_have_is_refused_with_those_that_it_has(url: str) -> None:
    for name in ("meta-llama/Llama-3.1-70B", "gpt2", "insitu/eifel", ""):
        with pytest.raises(OptionError, match="Its models: 'insitu/eiffel'") as caught:
            LanguageModel(name, remote=url)
        assert caught.value.location is not None and caught.value.location.file == __file__
        assert ("nearest: 'insitu/eiffel'" in str(caught.value)) == (name == "insitu/eifel")


def test_no_name_means_the_only_model_of_a_server(url: str, here: LanguageModel) -> None:
    model = LanguageModel(remote=url)
    with model.trace(EIFFEL):
        hidden = model.transformer.h[3].output[0].save()
    torch.testing.assert_close(hidden.value, hooked(here, EIFFEL, 3), rtol=1e-5, atol=1e-5)


def test_weights_other_than_those_of_the_server_are_refused(here: LanguageModel, url: str) -> None:
    module = copy.deepcopy(here.load())
    own = LanguageModel(module, tokenizer=here.tokenizer)
    with own.trace(EIFFEL, remote=url):  # in memory, with the server's weights
        hidden = own.transformer.h[3].output[0].save()
    torch.testing.assert_close(hidden.value, hooked(here, EIFFEL, 3), rtol=1e-5, atol=1e-5)
    torch.nn.init.normal_(module.transformer.h[0].mlp.c_fc.weight)
    with pytest.raises(OptionError, match="other values") as caught:
        own.trace(EIFFEL, remote=url)
    line = f"LanguageModel('insitu/eiffel', remote='{url}')"
    assert line in str(caught.value) and __file__ in str(caught.value)
    with pytest.raises(OptionError, match="other values"):
        own.session(remote=url)


def test_a_model_without_weights_and_name_of_the_server_is_not_sent(
    here: LanguageModel, url: str, tmp_path: Path
) -> None:
    here.load().save_pretrained(tmp_path / "copied")
    here.tokenizer.save_pretrained(tmp_path / "copied")
    copied = LanguageModel(tmp_path / "copied")
    with pytest.raises(OptionError, match=r"model\.load\(\)"):
        copied.trace(EIFFEL, remote=url)
    copied.load()
    with copied.trace(EIFFEL, remote=url):
        hidden = copied.transformer.h[3].output[0].save()
    torch.testing.assert_close(hidden.value, hooked(here, EIFFEL, 3), rtol=1e-5, atol=1e-5)


def test_an_error_of_the_whole_job_is_at_the_users_line(url: str) -> None:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=1336)
    small = LanguageModel(GPT2LMHeadModel(config).eval())
    with pytest.raises(JobError, match="another model") as caught:
        with small.trace([1, 2, 3], remote=url):
            small.lm_head.output.save()
    assert caught.value.location is not None and caught.value.location.file == __file__
    assert "runpy" not in str(caught.value)


def test_settings_of_generations_that_the_server_does_not_have_are_said(
    there: LanguageModel, here: LanguageModel, url: str
) -> None:
    config: Any = here.load().generation_config
    config.suppress_tokens = [750]
    with (
        pytest.warns(UserWarning, match=r"generation_config\.suppress_tokens` is None.*750"),
        here.generate(EIFFEL, max_new_tokens=2, remote=url),
    ):
        pass
    config = there.module.generation_config
    config.eos_token_id = 14
    with (
        pytest.warns(UserWarning, match=r"generation_config\.eos_token_id"),
        there.generate(EIFFEL, max_new_tokens=2),
    ):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with here.trace(EIFFEL, remote=url):
            here.logits.save()
        options: Any = {"eos_token_id": 14, "max_new_tokens": 2}
        with there.generate(EIFFEL, **options):
            pass


def test_hooks_and_training_of_a_model_that_is_here_are_not_the_servers(
    here: LanguageModel, url: str
) -> None:
    module: Any = here.load()
    handle = module.transformer.h[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="hang on modules"), here.trace(EIFFEL, remote=url):
        here.logits.save()
    handle.remove()
    module.train()
    with pytest.warns(UserWarning, match="training mode"), here.trace(EIFFEL, remote=url):
        here.logits.save()
    module.eval()


def test_gradients_come_once_if_several_threads_wait(
    there: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, added = remote_job._add_gradients, list[Any]()

    def slowly(*given: Any) -> None:
        time.sleep(0.2)  # each thread is here by then, if none waits for another
        added.append(given)
        add(*given)

    monkeypatch.setattr(remote_job, "_add_gradients", slowly)
    leaf = torch.zeros(128, requires_grad=True)
    job = sent(there, leaf)
    while job.status.state not in ENDS:
        time.sleep(0.01)
    threads = [threading.Thread(target=job.result) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(added) == 1 and leaf.grad is not None
