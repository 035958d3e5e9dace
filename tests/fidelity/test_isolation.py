"""What an invocation sees in a batch, against plain hooks on a forward of its prompt alone."""

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from insitu import LanguageModel, NeverRanError
from tests.fidelity.architectures import GENERATING, MAKERS, make
from tests.fidelity.test_architectures import UNMASKED
from tests.thinning import sampled, thinned

LENGTHS = (1, 40, 7, 23, 2, 16, 31, 5)
EVERY = ["eiffel", *MAKERS]

# Where a part of a batch is not what it would be alone: inside of expert layers, where tokens lie
# in the order of the experts; where OPT is told the mask instead of being left to think of one;
# and what is longer than its prompt. There prompts run one by one, as for `.inputs`, among which
# are masks that a prompt alone has no need of.
RUN_ALONE = (".experts.", ".embed_positions", ".conv1d")

INNER = ("transformer", "model", "model.decoder", "backbone")
BIT = 1e-6  # what another content of a batch may change: how a product is summed up

pytestmark = pytest.mark.no_wire  # it counts passes, and the values are many

Site = tuple[str, str, int]


def prompts_of(model: LanguageModel, lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    vocabulary = model.config.get_text_config().vocab_size
    return [torch.randint(4, vocabulary, (1, length), generator=draw) for length in lengths]


def arguments_of(model: LanguageModel, ids: torch.Tensor) -> dict[str, Any]:
    """What a plain call of the module is given for a prompt alone."""
    kwargs: dict[str, Any] = {"input_ids": ids}
    if "use_cache" in inspect.signature(model.module.forward).parameters:
        kwargs["use_cache"] = False
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        kwargs["decoder_input_ids"] = torch.full((ids.shape[0], 1), start)
    return kwargs


def hooked(
    module: nn.Module,
    changed: str | None = None,
    change: Any = None,
    call: Any = None,
    **kwargs: Any,
) -> dict[Site, Any]:
    """The oracle: what plain hooks see at every call of every module.

    One module's output, or the first tensor in it, may be changed. What is called may be something
    else than the module.
    """
    seen: dict[Site, Any] = {}
    calls: defaultdict[str, int] = defaultdict(int)
    handles = []
    if changed is not None:

        def put(part: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, torch.Tensor):
                return change(output)
            return (change(output[0]), *output[1:])

        handles.append(module.get_submodule(changed).register_forward_hook(put))
    for path, part in module.named_modules(remove_duplicate=False):

        def before(part: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            names = [n for n in inspect.signature(part.forward).parameters if n in kwargs]
            first = args[0] if args else kwargs[names[0]] if names else None
            seen[path, "input", calls[path]] = copied(first)
            seen[path, "inputs", calls[path]] = copied((args, kwargs))

        def after(part: nn.Module, args: Any, output: Any, path: str = path) -> None:
            seen[path, "output", calls[path]] = copied(output)
            calls[path] += 1

        handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(part.register_forward_hook(after))
    try:
        with torch.no_grad():
            (call or module)(**kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def copied(value: Any) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors(value)]


def alone(
    model: LanguageModel, ids: torch.Tensor, changed: str | None = None, change: Any = None
) -> dict[Site, list[torch.Tensor]]:
    """The oracle's values of a prompt alone; of a block, its hidden states."""
    seen = hooked(model.module, changed, change, **arguments_of(model, ids))
    blocks = model.traits.block_views[False]
    return {
        site: value[:1] if site[0] in blocks and site[1] == "output" else value
        for site, value in seen.items()
        if value
    }


def handle_of(model: LanguageModel, path: str) -> Any:
    found: Any = model
    for name in path.split(".") if path else ():
        found = found[name]
    return found


def place(model: LanguageModel, site: Site) -> Any:
    path, kind, call = site
    handle = handle_of(model, path)
    return getattr(handle.call(call) if call else handle, kind)


def assert_equal(found: Any, expected: list[torch.Tensor], what: object) -> None:
    mine = list(tensors(found))
    assert [x.shape for x in mine] == [x.shape for x in expected], what
    for one, other in zip(mine, expected, strict=True):
        assert one.dtype == other.dtype, what
        if not other.is_floating_point():
            assert torch.equal(one, other), what
            continue
        finite = other.abs() < 1e30  # masks hold the least number that there is
        assert torch.equal(one[~finite], other[~finite]), what
        scale = max(float(other[finite].abs().amax()), 1e-6) if finite.any() else 1.0
        worst = float((one - other)[finite].abs().amax()) if finite.any() else 0.0
        assert worst <= 1e-5 * scale, (what, worst, scale)


def apart(model: LanguageModel, sites: list[Site], run: Any) -> list[Site]:
    """The sites for whose sake prompts of different length do not share a pass."""
    if not sites:
        return []
    with run() as tracer:
        for ids in prompts_of(model, (3, 5)):
            with tracer.invoke(ids):
                for site in sites:
                    place(model, site).save()
    if len(tracer.plan.passes) == 1:
        return []
    if len(sites) == 1:
        return sites
    half = len(sites) // 2
    return apart(model, sites[:half], run) + apart(model, sites[half:], run)


def read_all(
    model: LanguageModel, prompts: list[torch.Tensor], sites: list[list[Site]]
) -> tuple[list[dict[Site, Any]], int]:
    """What the invocations of one block read, and in how many passes."""
    saved: list[dict[Site, Any]] = []
    with model.trace() as tracer:
        for ids, own in zip(prompts, sites, strict=True):
            with tracer.invoke(ids):
                saved.append({site: place(model, site).save() for site in own})
    values = [{site: proxy.value for site, proxy in own.items()} for own in saved]
    return values, len(tracer.plan.passes)


@pytest.mark.thorough
@pytest.mark.parametrize("name", sampled(thinned(EVERY, EVERY[:3]), ["gpt2"]))
def test_every_site_is_as_if_its_prompt_ran_alone(name: str) -> None:
    model = make(name)
    prompts = prompts_of(model)
    expected = [alone(model, ids) for ids in prompts]
    every = sorted(set().union(*expected))
    own_pass = apart(model, every, model.scan)
    for path, kind, _ in own_pass:
        assert kind == "inputs" or any(part in path for part in RUN_ALONE), path
    for chosen, most in ((set(every) - set(own_pass), 3), (set(own_pass), len(prompts))):
        sites = [[site for site in own if site in chosen] for own in expected]
        if not any(sites):
            continue
        values, count = read_all(model, prompts, sites)
        assert count <= most
        for number, own in enumerate(values):
            for site, value in own.items():
                assert_equal(value, expected[number][site], (number, *site))
    # What other prompts come to and this one does not, such as an expert, has no value for it.
    for site in [site for site in every if site not in expected[0]][:3]:
        with pytest.raises(NeverRanError), model.trace() as tracer:
            for ids in prompts[:2]:
                with tracer.invoke(ids):
                    place(model, site).save()


def changed(value: Any) -> Any:
    """What is written: something else in every place."""
    return value * 1.5 + 1


def run_writing(
    model: LanguageModel, prompts: list[torch.Tensor], writer: int | None, path: str, how: str
) -> tuple[list[dict[Site, Any]], int]:
    """What invocations read, and in how many passes, where one of them writes somewhere."""
    read = [("", "output"), ("lm_head", "input"), (path, "output")]
    chosen = [[site for site in alone(model, ids) if site[:2] in read] for ids in prompts]
    returned = hooked_output(model, path, prompts[0])
    in_block = path in model.traits.block_views[False]
    is_tuple = isinstance(returned, tuple) or in_block
    saved: list[dict[Site, Any]] = []
    with model.trace() as tracer:
        for number, (ids, sites) in enumerate(zip(prompts, chosen, strict=True)):
            with tracer.invoke(ids):
                if number == writer:
                    handle = handle_of(model, path)
                    first = handle.output[0] if is_tuple else handle.output
                    if how == "in place":
                        first.copy_(changed(first))
                    elif in_block:
                        handle.output[0] = changed(first)
                    elif is_tuple:
                        rest = [handle.output[at] for at in range(1, len(returned))]
                        handle.output = (changed(first), *rest)
                    else:
                        handle.output = changed(first)
                saved.append({site: place(model, site).save() for site in sites})
    values = [{site: proxy.value for site, proxy in own.items()} for own in saved]
    return values, len(tracer.plan.passes)


def hooked_output(model: LanguageModel, path: str, ids: torch.Tensor) -> Any:
    seen: list[Any] = []
    handle = model.module.get_submodule(path).register_forward_hook(lambda *x: seen.append(x[-1]))
    with torch.no_grad():
        model.module(**arguments_of(model, ids))
    handle.remove()
    return seen[0]


def check_write(model: LanguageModel, path: str, how: str) -> int:
    """Checks that a write in one invocation is that, and nothing in the others."""
    prompts = prompts_of(model, (7, 3, 1, 11))
    untouched, _ = run_writing(model, prompts, None, path, how)
    values, passes = run_writing(model, prompts, 1, path, how)
    for number, ids in enumerate(prompts):
        expected = alone(model, ids, *((path, changed) if number == 1 else ()))
        for site, value in values[number].items():
            assert_equal(value, expected[site], (number, *site))
            if number != 1:
                for one, other in zip(
                    tensors(value), tensors(untouched[number][site]), strict=True
                ):
                    torch.testing.assert_close(
                        one, other, rtol=0, atol=BIT * float(other.abs().max())
                    )
    return passes


@pytest.mark.parametrize("how", ["replaced", "in place"])
@pytest.mark.parametrize("name", sampled(EVERY, ["gpt2", "bert"]))
def test_a_write_reaches_its_own_invocation_alone(name: str, how: str) -> None:
    model = make(name)
    blocks = list(model.traits.block_views[False])
    assert check_write(model, blocks[len(blocks) // 2], how) == 1


@pytest.mark.parametrize("how", sampled(["replaced", "in place"], ["in place"]))
@pytest.mark.parametrize(
    ("name", "path"),
    [
        pytest.param("eiffel", "transformer.wpe", marks=pytest.mark.thorough),
        ("gpt2", "transformer.wpe"),
        pytest.param("llama", "model.rotary_emb", marks=pytest.mark.thorough),
        pytest.param("mixtral", "model.rotary_emb", marks=pytest.mark.thorough),
        ("bert", "bert.embeddings.position_embeddings"),
        pytest.param("opt", "model.decoder.embed_positions", marks=pytest.mark.thorough),
    ],
)
def test_what_all_rows_share_is_written_for_one(name: str, path: str, how: str) -> None:
    assert check_write(make(name), path, how) == 1


@pytest.mark.parametrize("how", sampled(["replaced", "in place"], ["in place"]))
def test_what_has_no_rows_is_written_in_a_pass_of_its_own(how: str) -> None:
    path = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    assert check_write(make("t5"), path, how) == 2


def gradient_alone(model: LanguageModel, ids: torch.Tensor, path: str, end: str) -> torch.Tensor:
    """The oracle: at what a block makes, the gradient of the squares of what the end does."""
    seen: dict[str, torch.Tensor] = {}

    def keep(part: nn.Module, args: Any, output: Any) -> Any:
        first = output if isinstance(output, torch.Tensor) else output[0]
        seen["block"] = first
        first.retain_grad()

    handles = [
        model.module.get_submodule(path).register_forward_hook(keep),
        model.module.get_submodule(end).register_forward_hook(
            lambda part, args, output: seen.update(end=output)
        ),
    ]
    model.module(**arguments_of(model, ids))
    for handle in handles:
        handle.remove()
    (seen["end"] ** 2).sum().backward()
    model.module.zero_grad()
    return seen["block"].grad


@pytest.mark.parametrize("name", sampled(EVERY, ["gpt2", "llama", "mamba", "bert"]))
def test_gradients_are_as_if_each_prompt_ran_alone(name: str) -> None:
    model = make(name)
    prompts = prompts_of(model, (7, 1, 4))
    path, end = list(model.traits.block_views[False])[1], model.traits.unembedding_paths[0]
    saved = []
    with model.trace() as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                saved.append(handle_of(model, path).output[0].grad.save())
                (handle_of(model, end).output ** 2).sum().backward()
    for ids, grad in zip(prompts, saved, strict=True):
        assert_equal(grad.value, [gradient_alone(model, ids, path, end)], path)


@pytest.mark.parametrize("name", sampled(GENERATING, ["llama"]))
def test_a_generation_is_as_if_each_prompt_ran_alone(name: str) -> None:
    model = make(name)
    prompts = prompts_of(model, (7, 1, 12, 4))
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = []
    for ids in prompts:
        kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
        kwargs["pad_token_id"] = model.traits.pad_id
        seen = hooked(model.module, call=model.module.generate, **kwargs)
        expected.append((seen, model.module.generate(**kwargs)))
    blocks = model.traits.block_views[True]
    every = sorted(site for site in set().union(*(seen for seen, _ in expected)) if site[0])
    every = [site for site in every if site[0] not in blocks and site[1] == "output"]
    # Not every prompt comes to each expert.
    every = [site for site in every if site[2] == 0 and ".experts." not in site[0]]
    alone = name in UNMASKED
    own_pass = [] if alone else apart(model, every, lambda: model.generate(max_new_tokens=1))
    for path, *_ in own_pass:  # what the inner model returns has the cache in it
        assert path in INNER or any(part in path for part in RUN_ALONE), path
    chosen = set(every) - set(own_pass)
    saved: list[dict[Site, Any]] = []
    hidden: list[dict[str, Any]] = []
    invokers = []
    with model.generate(**options) as generator:
        for ids in prompts:
            with generator.invoke(ids) as invoker:
                invokers.append(invoker)
                saved.append({site: place(model, site).save() for site in chosen})
                hidden.append({path: handle_of(model, path).output[0].save() for path in blocks})
    assert len(generator.plan.passes) == (len(prompts) if alone else 1)
    for number, (seen, tokens) in enumerate(expected):
        assert torch.equal(invokers[number].output, tokens)
        for site, proxy in saved[number].items():
            assert_equal(proxy.value, seen[site], (number, *site))
        for path, proxy in hidden[number].items():
            assert_equal(proxy.value, seen[path, "output", 0][:1], (number, path))


@pytest.mark.parametrize("name", sampled(["gpt2", "llama", "mixtral", "bert"], ["gpt2", "bert"]))
def test_whatever_else_a_model_returns_is_cut_too(name: str) -> None:
    model = make(name)
    prompts = prompts_of(model, (7, 3, 12))
    saved = []
    with model.trace(output_hidden_states=True) as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                logits = model.output.logits[:, -1].save()  # others need not be computed
                saved.append([logits, model.output.hidden_states[1].save()])
    assert len(tracer.plan.passes) == 1
    for ids, own in zip(prompts, saved, strict=True):
        with torch.no_grad():
            output = model.module(**arguments_of(model, ids), output_hidden_states=True)
        assert_equal(own[0].value, [output.logits[:, -1]], name)
        assert_equal(own[1].value, [output.hidden_states[1]], name)


@pytest.mark.thorough
def test_a_generation_of_an_encoder_and_decoder_is_as_if_each_prompt_ran_alone() -> None:
    model = make("t5")
    prompts = prompts_of(model, (7, 1, 12, 4))
    options = {"max_new_tokens": 6, "do_sample": False}
    invokers, saved = [], []
    with model.generate(**options) as generator:
        for ids in prompts:
            with generator.invoke(ids) as invoker:
                invokers.append(invoker)
                saved.append(model.decoder.block[1].layer[-1].output.save())
    assert len(generator.plan.passes) == 1
    for ids, invoker, proxy in zip(prompts, invokers, saved, strict=True):
        tokens = model.module.generate(input_ids=ids, **options)
        assert torch.equal(invoker.output, tokens)
        seen = hooked(model.module, call=model.module.generate, input_ids=ids, **options)
        assert_equal(proxy.value, seen["decoder.block.1.layer.2", "output", 0], len(tokens[0]))
