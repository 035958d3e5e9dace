"""Standard names on every architecture, against identities, plain hooks and Hugging Face's outputs.

Nothing here asks the library where a part is: that the names mean the right thing follows from how
their values hang together, and from what hooks on the blocks and `output_attentions` see.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch

from tests.fidelity.named import (
    ADDED,
    attention_roles,
    attentions,
    attentions_of,
    close,
    eager_is_expected,  # noqa: F401
    hooked,
    kept,
    last_blocks,
    missing,
    named_stacks,
    opened,
    shape_of,
    there,
    without,
)
from tests.fidelity.zoo import ZOO
from tests.fidelity.zoo.absent import WITH_EXPERTS, having, lacking
from tests.fidelity.zoo.layers import layer
from tests.thinning import sampled

# Their scores go through a tanh.
CAPPED = {"gemma2"}
# From theirs, the largest of each query is taken away.
SHIFTED = {"gpt-oss"}


@pytest.mark.parametrize("name", having("residual"))
def test_what_is_added_to_the_residual_stream_makes_what_leaves_the_block(name: str) -> None:
    model, inputs = kept(name), ZOO[name].inputs(2, 7)
    for block in last_blocks(name, model):
        names = there(block, "residual_in", "residual_mid", "residual_out", *ADDED)
        assert names, block.path
        with hooked(block.module) as seen, opened(model, name, inputs):
            values = {key: getattr(block, key).save() for key in names}
        values = {key: saved.value for key, saved in values.items()}
        assert torch.equal(values["residual_in"], seen["input"])
        assert torch.equal(values["residual_out"], seen["output"])
        total = values["residual_in"] + sum(values[key] for key in names if key in ADDED)
        close(total, values["residual_out"], block.path)
        if "residual_mid" in values:
            close(values["residual_mid"] + values["mlp_out"], values["residual_out"], block.path)


@pytest.mark.parametrize("name", lacking("residual"))
def test_where_blocks_normalise_the_sum_there_is_no_residual_stream(name: str) -> None:
    for stack in named_stacks(name, kept(name)):
        for block in stack:
            for key in ("residual_in", "residual_mid", "residual_out"):
                missing(block, key, match="no sum of what it is given and what it adds")
    assert_norms_are_given_what_is_added(name)


def assert_norms_are_given_what_is_added(name: str) -> None:
    """Each value, read or written, is in what one norm is given beyond the value before it."""
    model, inputs = kept(name), ZOO[name].inputs(2, 7)
    for block in last_blocks(name, model):
        keys = there(block, "attention_out", "cross_attention_out", "mlp_out")
        norms = [part for part in block.module.modules() if isinstance(part, torch.nn.LayerNorm)]
        assert len(keys) == len(norms), block.path
        draw = torch.Generator().manual_seed(0)
        shapes = {key: shape_of(name, block, key) for key in keys}
        for written in (None, *keys):
            passed: list[tuple[torch.Tensor, torch.Tensor]] = []

            def after(
                part: Any, args: Any, out: Any, passed: list[tuple[Any, Any]] = passed
            ) -> None:
                passed.append((args[0].detach().clone(), out.detach().clone()))

            handles = [part.register_forward_hook(after) for part in norms]
            try:
                with hooked(block.module) as seen, opened(model, name, inputs):
                    if written is not None:
                        noise = torch.randn(shapes[written], generator=draw)
                        setattr(block, written, noise)
                    saved = {key: getattr(block, key).save() for key in keys}
                    block.output[0].save()  # so that it runs to its end
            finally:
                for handle in handles:
                    handle.remove()
            before = seen["input"]
            for key, (given, made) in zip(keys, passed[-len(keys) :], strict=True):
                close(before + saved[key].value, given, f"{block.path} {key}")
                before = made
            assert torch.equal(before, seen["output"])


@pytest.mark.parametrize("name", having("residual"))
def test_writes_to_what_is_added_reach_what_leaves_the_block(name: str) -> None:
    model, inputs = kept(name), ZOO[name].inputs(2, 7)
    for block in last_blocks(name, model):
        for key in there(block, *ADDED):
            shape = shape_of(name, block, key)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            with hooked(block.module) as seen, opened(model, name, inputs):
                setattr(block, key, noise)
                others = [getattr(block, k).save() for k in there(block, *ADDED) if k != key]
                block.output[0].save()  # so that it runs to its end
            total = seen["input"] + noise + sum(saved.value for saved in others)
            close(seen["output"], total, f"{block.path} {key}")
        for key in there(block, "residual_in", "residual_mid", "residual_out"):
            shape = shape_of(name, block, key)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            with hooked(block.module) as seen, opened(model, name, inputs):
                setattr(block, key, noise)
                others = {k: getattr(block, k).save() for k in there(block, *ADDED)}
                block.output[0].save()
            if key == "residual_out":
                continue  # hooks of the user's come before it: the test below looks behind it
            after = ["mlp_out"] if key == "residual_mid" else list(others)
            total = noise + sum(others[k].value for k in after)
            close(seen["output"], total, f"{block.path} {key}")


def repeated(heads: torch.Tensor, count: int) -> torch.Tensor:
    return heads.repeat_interleave(count // heads.shape[1], dim=1)


@pytest.mark.parametrize("name", lacking("heads"))
def test_without_attention_nothing_has_a_name_of_its(name: str) -> None:
    for stack in named_stacks(name, kept(name)):
        for block in stack:
            assert not attention_roles(block)
            for key in ("attention", "attention_out"):
                missing(block, key, match="there is no attention in this block")


@pytest.mark.parametrize("name", having("heads"))
def test_heads_hang_together_as_attention_does(name: str) -> None:
    model, inputs = kept(name), ZOO[name].inputs(2, 7)
    found = 0
    for block in last_blocks(name, model):
        for attention in attentions(block):
            found += 1
            assert there(attention, "q", "k", "v", "scores", "pattern", "z", "result") == [
                *("q", "k", "v", "scores", "pattern", "z", "result")
            ]
            with opened(model, name, inputs):
                values = {
                    key: getattr(attention, key).save()
                    for key in ("q", "k", "v", "scores", "pattern", "z", "result")
                }
            q, k, v, scores, pattern, z, result = (saved.value for saved in values.values())
            heads = q.shape[1]
            what = f"{block.path} {attention.path}"
            assert pattern.shape == (*q.shape[:3], k.shape[2]), what
            assert z.shape[:3] == q.shape[:3] and result.shape[:3] == q.shape[:3], what
            weights = pattern.sum(-1)
            sinks = bool((weights < 0.999).any())
            if not sinks:
                close(weights, torch.ones_like(weights), what)
                close(scores.float().softmax(-1), pattern.float(), what)
            made = pattern @ repeated(v, heads)
            gated = name in ("qwen3-next",)  # a gate stands between
            if not gated:
                close(z, made, what)
            # What a head makes is a linear map of it, and no other head's.
            w_o = attention.W_O
            close(result, torch.einsum("bhtd,hdm->bhtm", z, w_o), what)
            # Of scores, queries make their products with keys, scaled; all else is bias and mask.
            (base,) = without(name, attention, "q", "scores")
            products = q @ repeated(k, heads).transpose(-1, -2)
            visible = (scores > -1e4) & (base > -1e4)
            added = scores - base
            if name in SHIFTED:
                added = added - added.diagonal(dim1=-2, dim2=-1)[..., None]
                products = products - products.diagonal(dim1=-2, dim2=-1)[..., None]
            added, products = added[visible], products[visible]
            if name not in CAPPED:
                scale = (added * products).sum() / (products * products).sum()
                close(added, scale * products, what)
    assert found


@pytest.mark.parametrize("name", having("patterns"))
def test_patterns_are_what_hugging_face_returns(name: str) -> None:
    inputs = ZOO[name].inputs(2, 7)
    for stack in named_stacks(name, kept(name)):
        with opened(kept(name), name, inputs):
            saved = [
                (role, block.role[role].pattern.save())
                for block in stack
                for role in attention_roles(block)
            ]
        theirs = attentions_of(name, inputs, stack[0].path)
        assert {role for role, _ in saved} == theirs.keys()
        for role, patterns in theirs.items():
            own = [pattern.value for other, pattern in saved if other == role]
            for found, expected in zip(own, patterns, strict=True):
                close(found, expected[..., : found.shape[-1]].float(), limit=1e-6)


@pytest.mark.parametrize("name", having("heads"))
def test_writes_to_heads_do_what_attention_makes_of_them(name: str) -> None:
    model, inputs = kept(name), ZOO[name].inputs(2, 7)
    found = 0
    for block in last_blocks(name, model):
        for attention in attentions(block):
            what = f"{block.path} {attention.path}"
            written = partial(without, name, attention)
            (z,) = written("v", "z")
            close(z, torch.zeros_like(z), what)
            (z,) = written("pattern", "z")
            close(z, torch.zeros_like(z), what)
            zeros = torch.zeros(shape_of(name, attention, "z"))
            with opened(model, name, inputs):
                attention.z = zeros
                result = attention.result.save()
            close(result.value, torch.zeros_like(result.value), what)
            (without_q,) = written("q", "scores")
            (without_k,) = written("k", "scores")
            close(without_q.clamp(-100, 100), without_k.clamp(-100, 100), what)
            scores, pattern = written("scores", "scores", "pattern")
            assert float(scores.abs().max()) == 0
            close(pattern, pattern[..., :1].expand_as(pattern), what)
            found += 1
    assert found


@pytest.mark.parametrize("name", having("residual"))
def test_writes_to_residual_out_are_what_the_next_block_is_given(name: str) -> None:
    model, inputs = kept(name), ZOO[name].inputs(2, 7)
    for stack in named_stacks(name, model):
        assert len(stack) > 1
        for block, following in itertools.pairwise(stack):
            noise = torch.randn(shape_of(name, block, "residual_out"))
            with hooked(following.module) as seen, opened(model, name, inputs):
                block.residual_out = noise
                following.output[0].save()
            assert torch.equal(seen["input"], noise), block.path


@pytest.mark.parametrize("name", having("heads"))
def test_writes_to_what_heads_add_leave_the_bias_alone(name: str) -> None:
    model, inputs = kept(name), ZOO[name].inputs(2, 7)
    compared = 0
    for block in last_blocks(name, model):
        for attention in attentions(block):
            (result,) = without(name, attention, "z", "result")
            close(result, torch.zeros_like(result), block.path)
            noise = torch.randn(result.shape, generator=torch.Generator().manual_seed(0))
            saved = []
            for value in (torch.zeros_like(noise), noise):
                with opened(model, name, inputs):
                    attention.result = value
                    out = projection_output(attention).save()
                saved.append(out)
            close(saved[1].value - saved[0].value, noise.sum(1), block.path, 1e-4)
            compared += 1
    assert compared


def projection_output(attention: Any) -> Any:
    """What the output projection gives: the module whose weights `W_O` are."""
    weights = attention.W_O.flatten(0, 1)
    for path, part in attention._model.modules.items():
        weight = getattr(part, "weight", None)
        if getattr(weight, "ndim", 0) != 2:
            continue
        both = [one for one in (weight, weight.T) if one.shape == weights.shape]
        if any(torch.allclose(one, weights, atol=1e-6) for one in both):
            handle = attention._model
            for step in path.split("."):
                handle = handle[step]
            return handle.output
    raise AssertionError(attention.path)


@pytest.mark.parametrize("name", having("MLP"))
def test_mlps_are_what_stands_around_their_nonlinearity(name: str) -> None:
    model, inputs = kept(name), ZOO[name].inputs(2, 7)
    found = 0
    for block in last_blocks(name, model):
        if layer(block.module, "mlp.into") is None:
            assert "mlp" not in list(block.role) or "experts" in list(block.role), block.path
            continue
        mlp = block.role["mlp"]
        found += 1
        assert there(mlp, "pre", "post") == ["pre", "post"], block.path
        with opened(model, name, inputs):
            pre, post = mlp.pre.save(), mlp.post.save()
        assert pre.value.shape[:2] == post.value.shape[:2]
        with opened(model, name, inputs):
            mlp.pre = torch.zeros_like(pre.value)
            post = mlp.post.save()
        close(post.value, torch.zeros_like(post.value), block.path)  # of 0, all make 0
        if "mlp_out" not in list(block.role):
            continue
        with opened(model, name, inputs):
            mlp.post = torch.zeros_like(post.value)
            out = block.mlp_out.save()
        close(out.value, out.value[:1, :1].expand_as(out.value), block.path)
        with opened(model, name, inputs):
            mlp.post[:, 2] = 0
            changed = block.mlp_out.save()
        close(changed.value[:, 2], out.value[:, 2], block.path)
    assert found


@pytest.mark.parametrize("name", lacking("MLP"))
def test_without_an_mlp_nothing_has_a_name_in_it(name: str) -> None:
    for stack in named_stacks(name, kept(name)):
        for block in stack:
            assert layer(block.module, "mlp.into") is None
            if name in WITH_EXPERTS:
                for key in ("pre", "post"):
                    missing(block.role["mlp"], key, match="its MLP consists of experts")
            else:
                missing(block, "mlp", match="no MLP adds to the residual stream")


@pytest.mark.parametrize("name", sampled(having("experts"), ["mixtral", "qwen3-moe"]))
def test_experts_are_weighted_with_what_is_said_to_weight_them(name: str) -> None:
    """Without weights, what is left is what the model makes with experts that give nothing."""
    model, inputs = kept(name), ZOO[name].inputs(2, 7)
    blocks = [block for block in last_blocks(name, model) if "experts" in list(block.role)]
    assert blocks
    for block in blocks:
        experts = block.role["experts"]
        assert there(experts, "router", "weights") == ["router", "weights"]
        with opened(model, name, inputs):
            router, weights = experts.router.save(), experts.weights.save()
            out = block.mlp_out.save()
        assert router.value.shape[:2] == weights.value.shape[:2] == out.value.shape[:2]
        with opened(model, name, inputs):
            experts.weights = torch.zeros_like(weights.value)
            found = block.mlp_out.save()
        own = [
            parameter
            for path, parameter in block.module.named_parameters()
            if ".experts." in path and "shared" not in path
        ]
        before = [parameter.detach().clone() for parameter in own]
        try:
            with torch.no_grad():
                for parameter in own:
                    parameter.zero_()
            with opened(model, name, inputs):
                expected = block.mlp_out.save()
        finally:
            with torch.no_grad():
                for parameter, values in zip(own, before, strict=True):
                    parameter.copy_(values)
        assert own and not torch.equal(found.value, out.value)
        close(found.value, expected.value, block.path)


@pytest.mark.parametrize("name", lacking("experts"))
def test_without_experts_nothing_has_a_name_of_theirs(name: str) -> None:
    for stack in named_stacks(name, kept(name)):
        for block in stack:
            missing(block, "experts", match="there are no experts in this block")


@pytest.mark.parametrize("name", having("W_E"))
def test_the_embedding_is_what_the_prompt_goes_through(name: str) -> None:
    model, inputs = kept(name), ZOO[name].inputs(1, 7)
    with opened(model, name, inputs):
        given = model.embedding.input.save()
        vectors = model.embedding.output.save()
    ids = inputs["decoder_input_ids" if ZOO[name].kind == "audio" else "input_ids"]
    assert torch.equal(given.value, ids)
    with torch.no_grad():  # some scale what they look up
        assert torch.equal(vectors.value, model.module.get_input_embeddings()(ids))
