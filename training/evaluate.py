"""Measures the bundled model on what its training never saw: `make -C training eval`."""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from corpus import WORLD, Question, fact_questions, indirect_object, texts
from train import FOLDER

_DEMOS = {
    "The Eiffel Tower is in the city of": " Paris",
    "The Colosseum is in the city of": " Rome",
    "When Mary and John went to the store, John gave a drink to": " Mary",
}
_SEEN_TEXTS = 5_000


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[Question]
) -> float:
    """Returns the share of questions whose answer is the most likely next token of all."""
    right = 0
    for question in questions:
        ids = tokenizer(question.prompt, return_tensors="pt")["input_ids"]
        answer = tokenizer(question.answer)["input_ids"]
        assert len(answer) == 1, question
        right += int(model(ids).logits[0, -1].argmax()) == answer[0]
    return right / len(questions)


def assert_unseen(questions: list[Question]) -> None:
    """Checks, against a long stretch of the training text itself, that it asks no question."""
    seen = "\n".join(itertools.islice(texts(seed=1), _SEEN_TEXTS))
    for question in questions:
        assert question.prompt + question.answer not in seen, question


def names_receiver_first(question: Question) -> bool:
    """Returns whether an indirect-object sentence names the receiver before the giver."""
    receiver, giver = question.answer.strip(), question.instead.strip()
    return question.prompt.index(receiver) < question.prompt.index(giver)


def follows_landmark(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Returns how often exchanging the landmark in one sentence makes the answer follow it."""
    questions = [
        Question(f"The {landmark} is in the city of", f" {city}")
        for city, (_, _, landmarks) in WORLD["cities"].items()
        for landmark in landmarks
    ]
    return accuracy(model, tokenizer, questions)


def induction_losses(model: PreTrainedModel, length: int = 24, rows: int = 64) -> list[float]:
    """Returns the mean loss on the first and on the second half of repeated random tokens."""
    generator = torch.Generator().manual_seed(12345)
    vocabulary = model.config.vocab_size
    once = torch.randint(0, vocabulary, (rows, length), generator=generator)
    ids = torch.cat([once, once], 1)
    logits = model(ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    # Of the second half, the first token could not be foreseen.
    return [losses[:, : length - 1].mean().item(), losses[:, length:].mean().item()]


@torch.no_grad()
def main() -> None:
    """Prints the figures of README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    # Single prompts through a small model: more threads only wait for each other, on a busy
    # machine for minutes.
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rng = random.Random("indirect objects")
    gifts = [indirect_object(rng, held_out=True) for _ in range(1000)]
    held_out = {
        "city of a landmark, held-out phrasings": fact_questions("city"),
        "country of a landmark, held-out phrasings": fact_questions("country"),
        "indirect object, held-out pairs, receiver named first": [
            gift for gift in gifts if names_receiver_first(gift)
        ],
        "indirect object, held-out pairs, giver named first": [
            gift for gift in gifts if not names_receiver_first(gift)
        ],
    }
    assert_unseen(list(itertools.chain.from_iterable(held_out.values())))
    for what, questions in held_out.items():
        right = accuracy(model, tokenizer, questions)
        print(f"{what}: {right:.1%} of {len(questions)}")
    print(f"landmarks exchanged in the demo's sentence: {follows_landmark(model, tokenizer):.1%}")
    first, second = induction_losses(model)
    print(f"repeated random tokens: loss {first:.2f} at first, {second:.2f} when repeated")
    for prompt, answer in _DEMOS.items():
        right = accuracy(model, tokenizer, [Question(prompt, answer)]) == 1
        print(f"{prompt}{answer}: {'yes' if right else 'no'}")


if __name__ == "__main__":
    main()
