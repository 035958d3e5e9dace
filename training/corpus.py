"""The text that the bundled model learns from, and what is kept back from it.

A small world (`world.json`: cities with their countries, languages and landmarks, people, things)
is told in many phrasings (`phrasings.json`). Two things never occur in training: the phrasings
whose list says "held out", and pairs of names held out from the indirect-object sentences.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
WORLD = json.loads((_HERE / "world.json").read_text())
PHRASINGS: dict[str, list[str]] = json.loads((_HERE / "phrasings.json").read_text())
END = "<|endoftext|>"
_HELD_OUT_PAIRS = 0.15


@dataclass(frozen=True, slots=True)
class Question:
    """A sentence up to the word to be predicted.

    Attributes:
        prompt: the sentence so far, without a space at its end.
        answer: the word that follows, with the space before it.
        instead: the wrong answer that is nearest, or "" if none is special.
    """

    prompt: str
    answer: str
    instead: str = ""


def held_out_pairs() -> frozenset[frozenset[str]]:
    """Returns the pairs of names that no training sentence gives together."""
    pairs = [frozenset(pair) for pair in itertools.combinations(WORLD["names"], 2)]
    kept = random.Random("name pairs").sample(pairs, round(len(pairs) * _HELD_OUT_PAIRS))
    return frozenset(kept)


_HELD_OUT = held_out_pairs()


def fact(rng: random.Random, phrasing: str, landmark: str | None = None) -> str:
    """Returns a phrasing with a city, its landmark and whatever else it asks for filled in."""
    cities = WORLD["cities"]
    homes = [c for c, (_, _, sights) in cities.items() if landmark is None or landmark in sights]
    city = rng.choice(homes)
    country, language, landmarks = cities[city]
    first, second = rng.sample(landmarks, 2)
    return phrasing.format(
        C=city,
        K=country,
        S=language,
        L=landmark or first,
        M=second,
        N=rng.choice(WORLD["names"]),
        P=rng.choice(WORLD["places"]),
        O=rng.choice(WORLD["objects"]),
        F=rng.choice(WORLD["foods"]),
        T=rng.choice(WORLD["weathers"]),
        W=rng.choice(WORLD["seasons"]),
    )


def indirect_object(rng: random.Random, held_out: bool = False) -> Question:
    """Returns a sentence in which the first or second of two people gives something to the other.

    Args:
        rng: where the choices come from.
        held_out: whether the two names are a pair that training never sees.
    """
    while True:
        first, second = rng.sample(WORLD["names"], 2)
        if (frozenset([first, second]) in _HELD_OUT) == held_out:
            break
    giver, receiver = rng.sample([first, second], 2)
    text = rng.choice(PHRASINGS["indirect object"]).format(
        A=first,
        B=second,
        G=giver,
        R=receiver,
        P=rng.choice(WORLD["places"]),
        O=rng.choice(WORLD["objects"]),
    )
    stem = text.removesuffix(f" {receiver}.")
    return Question(stem, f" {receiver}", f" {giver}")


def sentence(rng: random.Random) -> str:
    """Returns one sentence of training text."""
    kind = rng.choices(["city", "country", "filler", "indirect object"], [40, 12, 13, 35])[0]
    if kind == "indirect object":
        question = indirect_object(rng)
        return f"{question.prompt}{question.answer}."
    return fact(rng, rng.choice(PHRASINGS[kind]))


def texts(seed: int) -> Iterator[str]:
    """Yields training texts without end: a few sentences each, the first of any kind."""
    rng = random.Random(seed)
    while True:
        yield " ".join(sentence(rng) for _ in range(rng.randint(1, 4)))


def fact_questions(kind: str) -> list[Question]:
    """Returns every landmark in every phrasing of a kind that was held out of training.

    Args:
        kind: "city" or "country".
    """
    assert not set(PHRASINGS[f"{kind} held out"]) & {
        phrasing for name in ("city", "country", "filler") for phrasing in PHRASINGS[name]
    }
    rng = random.Random("facts")
    questions: list[Question] = []
    for city, (country, _, landmarks) in WORLD["cities"].items():
        answer = f" {city if kind == 'city' else country}"
        for landmark, phrasing in itertools.product(landmarks, PHRASINGS[f"{kind} held out"]):
            text = fact(rng, phrasing, landmark)
            questions.append(Question(text.removesuffix(f"{answer}."), answer))
    return questions
