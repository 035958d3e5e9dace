"""What `insitu check` verifies, of models of all kinds and of some that are not what they seem."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block, GPT2Model

from insitu import LanguageModel, Model, OptionError
from insitu.display.report import Check, Report
from insitu.models.checking import blocks, check, logits
from insitu.models.proof import identities
from tests.around import Around
from tests.conftest import tiny_gpt2
from tests.fidelity.zoo import ZOO, module_of
from tests.thinning import sampled

pytestmark = pytest.mark.no_wire  # what is sent does not depend on what is read


def report_of(name: str) -> Report:
    module = module_of(name)
    return check(LanguageModel(module) if ZOO[name].takes_text else Model(module), name)


def of(report: Report, name: str) -> list[Check]:
    return [one for one in report.checks if one.name == name]


@pytest.mark.parametrize("name", ZOO)
def test_no_architecture_is_found_to_differ_from_what_it_seems(name: str) -> None:
    report = report_of(name)
    assert report.ok, [one for one in report.checks if one.outcome == "differs"]
    assert any(one.outcome == "ok" for one in report.checks)
    assert len({part.title for part in report.parts}) == len(report.parts)


def test_every_block_is_checked_and_the_shapes_are_those_of_the_values() -> None:
    report = report_of("gpt2")
    assert {one.outcome for one in report.checks} == {"ok"}
    names = (blocks.SUMS, blocks.MIDDLE, blocks.PATTERNS, blocks.WEIGHTED, blocks.HEADS)
    for name in names:
        assert len(of(report, name)) == 3
    assert len(of(report, logits.LOGITS)) == 1
    model, block = report.parts
    assert (model.title, block.title, block.path) == (
        *("model", "transformer.h[0-2]", "transformer.h[0]"),
    )
    found = {one.name: one for one in (*model.names, *block.names)}
    assert found["attention.q"].shape == (2, 4, 7, 4)
    assert found["attention.pattern"].shape == (2, 4, 7, 7)
    assert found["attention.result"].shape == (2, 4, 7, 16)
    assert found["attention.W_Q"].shape == (4, 16, 4)
    assert found["mlp.post"].shape == (2, 7, 40)
    assert found["residual_mid"].shape == (2, 7, 16)
    assert found["logits"].shape == (2, 7, 100)
    assert found["logits"].stands_for == "lm_head.output"
    assert found["final_norm"].stands_for == "transformer.ln_f: LayerNorm"
    assert found["experts"].missing == "there are no experts in this block."
    assert report.sizes == {
        **{"n_layers": 3, "n_heads": 4, "d_model": 16},
        **{"d_head": 4, "d_mlp": 40, "vocab_size": 100},
    }


def test_blocks_of_each_kind_are_shown_once() -> None:
    report = report_of("jamba")
    assert [part.title for part in report.parts] == [
        *("model", "model.layers[0, 2]", "model.layers[1]"),
    ]


def test_what_stands_between_a_pattern_and_the_heads_is_taken_into_account() -> None:
    (gated,) = of(report_of("qwen3-next"), blocks.WEIGHTED)
    assert (gated.outcome, gated.note) == ("ok", "behind a gate")


@pytest.mark.thorough
def test_what_is_done_to_logits_is_said() -> None:
    (scaled,) = of(report_of("t5"), logits.LOGITS)
    assert (scaled.outcome, scaled.note) == ("ok", "scaled by 0.25 before it is unembedded")
    (capped,) = of(report_of("gemma2"), logits.LOGITS)
    assert (capped.outcome, capped.note) == ("ok", "scaled or capped afterwards")


def test_what_cannot_be_checked_says_why() -> None:
    report = report_of("bert")
    assert {one.outcome for one in of(report, blocks.SUMS)} == {"not checked"}
    assert "is no sum of" in of(report, blocks.SUMS)[0].note
    (last,) = of(report, logits.LOGITS)
    assert last.outcome == "not checked" and "cls.predictions.transform.dense" in last.note


@pytest.mark.parametrize(
    "dtype", sampled([torch.float64, torch.bfloat16, torch.float16], [torch.bfloat16])
)
def test_rounding_is_not_taken_for_a_difference(dtype: torch.dtype) -> None:
    report = check(LanguageModel(tiny_gpt2().to(dtype)))
    assert {one.outcome for one in report.checks} == {"ok"}


# Models that do in a run what they do not do without data.


def lying(kind: type[nn.Module], lie: Any) -> type[nn.Module]:
    """A subclass whose output is another one as soon as there are numbers in it."""

    class Lying(kind):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            first = output if isinstance(output, torch.Tensor) else output[0]
            if not isinstance(first, FakeTensor):
                with torch.no_grad():
                    first.copy_(lie(first.clone()))
            return output

    return Lying


def broken(kind: type[nn.Module], lie: Any) -> Report:
    module = tiny_gpt2()
    part: Any = next(part for part in module.transformer.h[1].modules() if type(part) is kind)
    part.__class__ = lying(kind, lie)
    return check(LanguageModel(module))


def differing(report: Report) -> dict[str, Check]:
    return {one.name: one for one in report.checks if one.outcome == "differs"}


def refused(report: Report) -> dict[str, str]:
    return {one.where: one.note for one in report.checks if one.outcome == "refused"}


@pytest.mark.thorough
def test_the_names_of_a_block_that_lies_about_its_sum_are_refused() -> None:
    report = broken(GPT2Block, lambda hidden: hidden + 0.01)
    (where,) = refused(report)
    assert where == "transformer.h[1]"
    assert "residual_in + attention_out + mlp_out is not residual_out" in refused(report)[where]
    sums = {one.where: one.outcome for one in of(report, blocks.SUMS)}
    assert sums.pop(where) == "not checked" and set(sums.values()) == {"ok"}


def test_a_single_number_that_is_wrong_is_found() -> None:
    def lie(hidden: torch.Tensor) -> torch.Tensor:
        hidden[0, 2, 5] += 0.001
        return hidden

    assert "`residual_out`" in refused(broken(GPT2Block, lie))["transformer.h[1]"]


def test_what_holds_in_a_proof_and_not_in_this_run_differs() -> None:
    """A block that is what it seems whenever it was proven, and later is not."""
    module = tiny_gpt2()
    model = LanguageModel(module)
    assert model.blocks[1].path == "transformer.h.1" and "residual_in" in list(model.blocks[1].role)
    lie = module.transformer.h[1].register_forward_hook
    lie(
        lambda part, args, output: (
            (output[0] + 0.01, *output[1:]) if type(output) is tuple else output + 0.01
        )
    )
    report = check(model)
    found = differing(report)
    assert not report.ok and set(found) == {blocks.SUMS, blocks.MIDDLE}
    one = found[blocks.SUMS]
    assert one.where == "transformer.h[1]"
    assert one.note == "residual_in + attention_out + mlp_out is not residual_out"
    assert one.difference is not None and one.allowed is not None
    assert one.difference > 100 * one.allowed


@pytest.mark.thorough
def test_numbers_that_are_none_are_found() -> None:
    report = broken(GPT2MLP, lambda hidden: hidden * float("nan"))
    assert "`mlp_out`" in refused(report)["transformer.h[1]"]
    assert logits.LOGITS in differing(report)


@pytest.mark.thorough
def test_a_part_that_lies_to_all_is_as_it_seems() -> None:
    assert broken(GPT2Attention, lambda hidden: hidden * 1.5).ok


def test_logits_that_are_not_of_the_last_residual_are_found() -> None:
    module: Any = tiny_gpt2()
    module.transformer.__class__ = lying(GPT2Model, lambda hidden: hidden.flip(-1))
    assert list(differing(check(LanguageModel(module)))) == [logits.LOGITS]


@pytest.mark.thorough
def test_a_site_that_cannot_be_read_is_said() -> None:
    def hidden(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return mlp(x) if isinstance(x, FakeTensor) else x * 0

    module: Any = tiny_gpt2()
    module.transformer.h[1].mlp = Around(module.transformer.h[1].mlp, hidden).eval()
    report = check(LanguageModel(module))
    assert list(refused(report)) == ["transformer.h[1]"]
    assert "`mlp.pre`, `mlp.post`" in refused(report)["transformer.h[1]"]


def test_the_module_is_left_as_it_was() -> None:
    module = tiny_gpt2()
    before = module.config._attn_implementation
    check(LanguageModel(module))
    assert module.config._attn_implementation == before
    for part in module.modules():
        assert not part._forward_hooks and not part._forward_pre_hooks


def test_a_module_of_no_known_kind_is_refused() -> None:
    with pytest.raises(OptionError, match="no Transformers model"):
        check(Model(nn.Linear(2, 2)))


def test_a_model_that_is_being_trained_is_refused() -> None:
    with pytest.raises(OptionError, match="training mode"):
        check(LanguageModel(tiny_gpt2().train()))


# The identities themselves.


def test_shapes_that_do_not_go_together_differ() -> None:
    ones = torch.ones
    assert identities.summed([ones(1, 2, 3), ones(1, 2, 4)], ones(1, 2, 3)).largest == math.inf
    assert identities.attended(ones(1, 3, 2, 2), ones(1, 2, 2, 4), ones(1, 3, 2, 4)).largest == (
        math.inf
    )
    assert identities.reassembled(ones(1, 2, 3, 4), ones(4), ones(1, 3, 5)).largest == math.inf


def test_patterns_have_no_negative_weights_and_may_leave_a_part_to_sinks() -> None:
    half = torch.full((1, 1, 2, 2), 0.25)
    assert not identities.normalised(half, sinks=False).is_rounding
    assert identities.normalised(half, sinks=True).is_rounding
    assert not identities.normalised(half * 4, sinks=True).is_rounding
    assert not identities.normalised(torch.tensor([[[[2.0, -1.0]]]]), sinks=False).is_rounding


def test_what_scales_or_caps_keeps_the_order() -> None:
    made = torch.randn(1, 2, 9, generator=torch.Generator().manual_seed(0))
    assert identities.rising(made.tanh() * 3, made).is_rounding
    assert not identities.rising(-made, made).is_rounding
