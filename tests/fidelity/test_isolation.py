"""What an invocation sees in a batch, against plain hooks on a forward of its prompt alone."""

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from insitu import LanguageModel
from tests.fidelity.architectures import MAKERS, make

LENGTHS = (1, 40, 7, 23, 2, 16, 31, 5)
EVERY = ["eiffel", *MAKERS]

# Where a part of a batch is not what it would be alone: inside of expert layers, where tokens lie
# in the order of the experts; where OPT is told the mask instead of being left to think of one;
# and what is longer than its prompt. There prompts run one by one.
RUN_ALONE = (".experts.", ".embed_positions", ".conv1d")

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


def hooked(module: nn.Module, **kwargs: Any) -> dict[Site, Any]:
    """The oracle: what plain hooks see at every call of every module."""
    seen: dict[Site, Any] = {}
    calls: defaultdict[str, int] = defaultdict(int)
    handles = []
    for path, part in module.named_modules(remove_duplicate=False):

        def before(part: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            names = [n for n in inspect.signature(part.forward).parameters if n in kwargs]
            first = args[0] if args else kwargs[names[0]] if names else None
            seen[path, "input", calls[path]] = copied(first)

        def after(part: nn.Module, args: Any, output: Any, path: str = path) -> None:
            seen[path, "output", calls[path]] = copied(output)
            calls[path] += 1

        handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(part.register_forward_hook(after))
    try:
        with torch.no_grad():
            module(**kwargs)
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


def alone(model: LanguageModel, ids: torch.Tensor) -> dict[Site, list[torch.Tensor]]:
    """The oracle's values of a prompt alone; of a block, its hidden states."""
    seen = hooked(model.module, **arguments_of(model, ids))
    blocks = model.block_views[False]
    return {
        site: value[:1] if site[0] in blocks and site[1] == "output" else value
        for site, value in seen.items()
        if value
    }


def place(model: LanguageModel, site: Site) -> Any:
    path, kind, call = site
    found: Any = model
    for name in path.split(".") if path else ():
        found = found[name]
    return getattr(found.call(call) if call else found, kind)


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


def apart(model: LanguageModel, sites: list[Site]) -> list[Site]:
    """The sites for whose sake prompts of different length do not share a pass."""
    if not sites:
        return []
    with model.scan() as tracer:
        for ids in prompts_of(model, (3, 5)):
            with tracer.invoke(ids):
                for site in sites:
                    place(model, site).save()
    if len(tracer.plan.passes) == 1:
        return []
    if len(sites) == 1:
        return sites
    half = len(sites) // 2
    return apart(model, sites[:half]) + apart(model, sites[half:])


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


@pytest.mark.parametrize("name", EVERY)
def test_every_site_is_as_if_its_prompt_ran_alone(name: str) -> None:
    model = make(name)
    prompts = prompts_of(model)
    expected = [alone(model, ids) for ids in prompts]
    every = sorted(set().union(*expected))
    own_pass = apart(model, every)
    assert all(any(part in path for part in RUN_ALONE) for path, *_ in own_pass)
    for chosen, passes in ((set(every) - set(own_pass), 1), (set(own_pass), len(prompts))):
        sites = [[site for site in own if site in chosen] for own in expected]
        if not any(sites):
            continue
        values, count = read_all(model, prompts, sites)
        assert count == passes
        for number, own in enumerate(values):
            for site, value in own.items():
                assert_equal(value, expected[number][site], (number, *site))
