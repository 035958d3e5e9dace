"""Chats are answered, or continued where they end with the assistant's words."""

import copy
from typing import Any

import pytest
import torch

from insitu import LanguageModel, OptionError, PromptError

PLAIN = (
    "{% for m in messages %}[{{m.role}}] {{m.content}}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CLOSED = (  # as of ChatML: each message has an end
    "{% for m in messages %}<{{m.role}}>{{m.content}}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRIMMED = CLOSED.replace("{{m.content}}", "{{m.content | trim}}")
CHANGED = CLOSED.replace("{{m.content}}", "{{m.content.split('|')[-1]}}")  # drops "thoughts"

USER = {"role": "user", "content": "The Louvre is in"}
ANSWER = {"role": "assistant", "content": "the city of Paris"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def source() -> LanguageModel:
    return LanguageModel("insitu/eiffel")


def chatting(source: LanguageModel, template: str) -> LanguageModel:
    tokenizer = copy.deepcopy(source.tokenizer)
    tokenizer.chat_template = template
    return LanguageModel(source.load(), tokenizer=tokenizer)


def text_of(model: LanguageModel, chat: Any, **options: Any) -> list[str]:
    """What rows the model is given, in a trace and by all other ways."""
    rows = []
    with model.trace(chat, **options) as tracer:
        pass_ids, mask = tracer.ids, tracer.mask.bool()
        model.lm_head.output.save()
    with model.generate(chat, max_new_tokens=1, **options) as generator:
        assert torch.equal(generator.ids, pass_ids)
    with model.trace() as block, block.invoke(chat, **options) as invoker:
        assert torch.equal(invoker.ids, pass_ids)
        model.lm_head.output.save()
    for ids, own in zip(pass_ids, mask, strict=True):
        rows.append(model.tokenizer.decode(ids[own]))
    return rows


@pytest.mark.parametrize(
    ("template", "chat", "options", "expected"),
    [
        (PLAIN, [USER], {}, "[user] The Louvre is in[assistant]"),
        (PLAIN, [USER], {"add_generation_prompt": False}, "[user] The Louvre is in"),
        (PLAIN, [USER, ANSWER], {}, "[user] The Louvre is in[assistant] the city of Paris"),
        (CLOSED, [USER, ANSWER], {}, "<user>The Louvre is in<end><assistant>the city of Paris"),
        (
            CLOSED,
            [USER, ANSWER],
            {"add_generation_prompt": False},
            "<user>The Louvre is in<end><assistant>the city of Paris<end>",
        ),
        (
            CLOSED,
            [USER, ANSWER],
            {"add_generation_prompt": True},
            "<user>The Louvre is in<end><assistant>the city of Paris<end><assistant>",
        ),
        (
            CLOSED,
            (SYSTEM, USER, ANSWER, USER),
            {},
            "<system>Be brief.<end><user>The Louvre is in<end><assistant>the city of Paris<end>"
            "<user>The Louvre is in<end><assistant>",
        ),
        (
            CLOSED,
            [SYSTEM, USER, {"role": "assistant", "content": "The Louvre is in"}],
            {},
            "<system>Be brief.<end><user>The Louvre is in<end><assistant>The Louvre is in",
        ),
        (TRIMMED, [USER, {**ANSWER, "content": "it is"}], {}, "<assistant>it is"),
        (CHANGED, [USER, {**ANSWER, "content": "hm|Paris"}], {}, "<assistant>"),
        (CLOSED, [USER, {**ANSWER, "content": ""}], {}, "<user>The Louvre is in<end><assistant>"),
        (CLOSED, [ANSWER], {}, "<assistant>the city of Paris"),
    ],
)
def test_a_chat_is_answered_or_continued(
    source: LanguageModel, template: str, chat: Any, options: dict[str, Any], expected: str
) -> None:
    found = text_of(chatting(source, template), chat, **options)[0]
    if template in (TRIMMED, CHANGED):  # what is before it does not matter here
        assert expected in found and not found.endswith("<end>"), found
        assert found.endswith(chat[-1]["content"].split("|")[-1])
    else:
        assert found == expected


def test_a_list_of_chats_is_a_list_of_prompts(source: LanguageModel) -> None:
    model = chatting(source, CLOSED)
    chats = [[USER], [USER, ANSWER], [SYSTEM, USER]]
    assert text_of(model, chats) == [text_of(model, chat)[0] for chat in chats]
    closed = text_of(model, chats, add_generation_prompt=False)
    assert all(text.endswith("<end>") for text in closed)
    with model.trace(chats):
        last = model.lm_head.output[:, -1].save()
    for number, chat in enumerate(chats):
        with model.trace(chat) as tracer:
            model.lm_head.output.save()
        with torch.no_grad():
            expected = model.module(tracer.ids).logits[0, -1]
        torch.testing.assert_close(last.value[number], expected, atol=1e-4, rtol=1e-4)


def test_the_user_s_messages_stay_as_they_were(source: LanguageModel) -> None:
    chat = [dict(USER), dict(ANSWER)]
    text_of(chatting(source, CLOSED), chat)
    assert chat == [USER, ANSWER]


def test_how_a_chat_ends_is_no_option_of_anything_else(source: LanguageModel) -> None:
    model = chatting(source, CLOSED)
    for prompt in ("Rome", [1, 2], ["Rome", "Paris"]):
        with pytest.raises(OptionError, match="is an option of a chat"):
            with model.trace(prompt, add_generation_prompt=False):
                pass
    with pytest.raises(OptionError, match="give it to `invoke`"):
        model.trace(add_generation_prompt=False)
    with pytest.raises(PromptError, match="no chat template"), source.trace([[USER], [USER]]):
        pass


@pytest.mark.parametrize(
    ("template", "chat", "reason"),
    [
        ("{{ raise_exception('No system messages.') }}", [USER], "No system messages."),
        ("{{ messages[0]['content'] + 1 }}", [USER], "str"),
        ("{{ raise_exception('Users begin.') }}", [USER, ANSWER], "Users begin."),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_what_a_template_refuses_is_an_error_at_the_line(
    source: LanguageModel, template: str, chat: Any, reason: str, several: bool
) -> None:
    model = chatting(source, template)
    for method in (model.trace, model.generate):
        with pytest.raises(PromptError, match="refuses this chat") as caught:
            with method([chat, chat] if several else chat):
                pass
        assert reason in str(caught.value) and "test_chats.py" in str(caught.value)
