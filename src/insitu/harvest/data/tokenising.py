"""Documents as token ids, and those that are none with the reason."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.harvest.data.documents import Document, Unusable
from insitu.harvest.layout import Skipped
from insitu.models.language_model import LanguageModel
from insitu.models.tokens import vocabulary_of

_TOGETHER = 64  # documents that the tokenizer is given in one call, which takes threads of its own


class Tokenised(NamedTuple):
    """A document as token ids.

    Attributes:
        document: which row of the data.
        ids: its token ids.
    """

    document: int
    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Tokenising:
    """How documents become token ids.

    Attributes:
        tokenizer: what reads text; None if the model has nothing.
        missing: why it has nothing.
        vocabulary: how many token ids the model has.
        bos: the token that each sequence begins with; None for none.
        separator: the token behind each document, of packed ones; None for none.
        digest: the digest of the tokenizer; None if there is none.
    """

    tokenizer: Any
    missing: str
    vocabulary: int
    bos: int | None
    separator: int | None
    digest: str | None


def tokenising_of(
    model: LanguageModel, pack: bool, bos: bool | None, separator: int | bool | None
) -> Tokenising:
    """Returns how documents become token ids of a model.

    Args:
        model: the model.
        pack: whether documents are put one behind the other.
        bos: whether each sequence begins with the model's own first token; None for where its
            tokenizer puts one.
        separator: the token behind each document, of packed ones; None for the end of a text that
            the model has, False for none.

    Raises:
        OptionError: if the model has no such token.
    """
    tokenizer, missing = model.traits.tokenizer, ""
    if tokenizer is None or isinstance(tokenizer, Exception):
        tokenizer, missing = None, str(tokenizer or "it was given in memory, without `tokenizer=`.")
    vocabulary = vocabulary_of(model.module, model.config)
    first = _first_token(model, tokenizer)
    if bos is None:
        bos = tokenizer is not None and first is not None and _puts(tokenizer, first)
    if bos and first is None:
        raise OptionError("The model has no first token, so `bos=True` means nothing.", here())
    if separator is True or (separator is not None and not pack and separator is not False):
        raise OptionError(
            "`separator` is the token id between packed documents: give it with `pack=True`.",
            here(),
        )
    if pack and separator is None:
        separator = _last_token(model, tokenizer)
    if type(separator) is int and not 0 <= separator < vocabulary:
        raise OptionError(f"`separator={separator}` is no token: there are {vocabulary}.", here())
    return Tokenising(
        tokenizer,
        missing,
        vocabulary,
        first if bos else None,
        separator if type(separator) is int and pack else None,
        None if tokenizer is None else _digest(tokenizer),
    )


def tokenised(
    documents: Iterator[Document], first: int, how: Tokenising
) -> Iterator[Tokenised | Skipped]:
    """Yields documents as token ids, in their order.

    Args:
        documents: the documents.
        first: the row of the first of them.
        how: how they become token ids.

    Raises:
        OptionError: if there is text, and the model has no tokenizer.
    """
    for group in _groups(documents, first):
        texts = [one for _, one in group if isinstance(one, str)]
        read = iter(_read(texts, how))
        for number, one in group:
            found = next(read) if isinstance(one, str) else one
            found = found if isinstance(found, Unusable) else _checked(found, how.vocabulary)
            if isinstance(found, Unusable):
                yield Skipped(number, found.reason)
            else:
                yield Tokenised(number, found)


def _groups(documents: Iterator[Document], first: int) -> Iterator[list[tuple[int, Document]]]:
    """Some documents at a time, with their numbers."""
    group = list[tuple[int, Document]]()
    try:
        for one in enumerate(documents, first):
            group.append(one)
            if len(group) == _TOGETHER:
                yield group
                group = []
    except Exception:  # of the data: what came before it is there all the same
        yield group
        raise
    yield group


def _read(texts: list[str], how: Tokenising) -> list[Sequence[int] | Unusable]:
    """The token ids of texts."""
    if not texts:
        return []
    if how.tokenizer is None:
        raise OptionError(f"The model has no tokenizer to read text with: {how.missing}", here())
    try:
        # Not `verbose`: that documents are longer than a context is no news here.
        found = how.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return list(found)
    except Exception as error:  # whatever a tokenizer raises for a text, such as half a character
        if len(texts) == 1:
            return [Unusable(f"the tokenizer cannot read it ({type(error).__name__})")]
        return [one for text in texts for one in _read([text], how)]


def _checked(ids: Sequence[int], vocabulary: int) -> Sequence[int] | Unusable:
    if not len(ids):
        return Unusable("it is empty")
    if min(ids) < 0 or max(ids) >= vocabulary:
        wrong = next(one for one in ids if not 0 <= one < vocabulary)
        return Unusable(f"it has the token id {wrong}, and the model has {vocabulary}")
    return ids


def _first_token(model: LanguageModel, tokenizer: Any) -> int | None:
    """The token that texts begin with. Some tokenizers call it the token of the class."""
    for name in ("bos_token_id", "cls_token_id"):
        found = getattr(tokenizer, name, None)
        if found is None and tokenizer is None:
            found = getattr(model.config, name, None)
        if isinstance(found, int):
            return found
    return None


def _last_token(model: LanguageModel, tokenizer: Any) -> int | None:
    for name in ("eos_token_id", "sep_token_id"):
        for where in (tokenizer, model.config if tokenizer is None else None):
            found = getattr(where, name, None)
            found = found[0] if isinstance(found, list) and found else found
            if isinstance(found, int):
                return found
    return None


def _puts(tokenizer: Any, first: int) -> bool:
    """Whether a tokenizer puts a token before every text."""
    ids = tokenizer("a")["input_ids"]
    return len(ids) > 1 and ids[0] == first


def _digest(tokenizer: Any) -> str:
    """The digest of all that a tokenizer does, where that can be told, else of its words."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    told = inner.to_str() if inner is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()
