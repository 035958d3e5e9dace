"""Measures the bundled model on what its training never saw: `make -C training eval`."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from corpus import WORLD, Question, fact_questions, indirect_object
from train import FOLDER


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
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rng = random.Random("indirect objects")
    gifts = [indirect_object(rng, held_out=True) for _ in range(1000)]
    first, second = induction_losses(model)
    for what, questions in {
        "city of a landmark, held-out phrasings": fact_questions("city"),
        "country of a landmark, held-out phrasings": fact_questions("country"),
        "indirect object, held-out pairs of names": gifts,
    }.items():
        right = accuracy(model, tokenizer, questions)
        print(f"{what}: {right:.1%} of {len(questions)}")
    print(f"landmarks exchanged in the demo's sentence: {follows_landmark(model, tokenizer):.1%}")
    print(f"repeated random tokens: loss {first:.2f} at first, {second:.2f} when repeated")


if __name__ == "__main__":
    main()
