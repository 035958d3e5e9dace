"""Prompts: every form in which one can be given, brought to token ids."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch

from insitu.graph.errors import PromptError, PromptTypeError
from insitu.graph.location import Location, Mark
from insitu.graph.recorded import Recorded
from insitu.graph.structure import map_structure
from insitu.models.media import MEDIA, is_chat, processed

Side = Literal["left", "right"]

_FORMS = (
    "A prompt is a string, a list of strings, a list of token ids, a list of such lists, a tensor "
    "of token ids of shape (position,) or (rows, position), what a tokenizer returns, or a chat "
    "(a list of dictionaries with 'role' and 'content')"
)


_NOTHING: Mapping[str, Any] = {}


class Prompt(NamedTuple):
    """One invocation's prompt.

    Attributes:
        ids: token ids `(rows, position)`, int64.
        mark: the user's line.
        mask: 1 for tokens and 0 for padding, of the same shape; None if there is no padding.
        extras: whatever else a tokenizer or a processor returned for the model.
        seed: where the sampling of this invocation starts, or None.
    """

    ids: torch.Tensor
    mark: Mark
    mask: torch.Tensor | None = None
    extras: Mapping[str, Any] = _NOTHING
    seed: int | None = None

    @property
    def visible_mask(self) -> torch.Tensor:
        """The mask, of ones where there is no padding."""
        return torch.ones_like(self.ids) if self.mask is None else self.mask


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model can process.

    Attributes:
        vocabulary: how many token ids it has, from 0.
        context: the most positions, or None if there is no such number.
    """

    vocabulary: int | None
    context: int | None


class Reader:
    """Brings prompts to token ids.

    Args:
        tokenizer: the user's tokenizer, never changed; or the error with which loading it failed;
            or None if there is none.
        limits: what the model can process.
        pad_id: the id that fills padding. It is masked, so any id does.
        lookups_check: whether the model's own lookup of an id that it does not know is an error
            that can be caught, as on the CPU. On a GPU it would be the end of the process.
        processor: of a model that takes more than text: its processor, never changed, or the
            error with which loading it failed. The dtype of what it returns is that of the
            model.
        dtype: the dtype of that model.

    Attributes:
        media: what can go with a prompt, by name.
    """

    def __init__(
        self,
        tokenizer: Any,
        limits: Limits,
        pad_id: int,
        lookups_check: bool,
        processor: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.lookups_check = lookups_check
        self.media: Collection[str] = () if processor is None else MEDIA
        self._processor, self._dtype = processor, dtype
        self._tokenizer = tokenizer
        self.limits = limits
        self._pad_id = pad_id

    def read(
        self, prompt: Any, side: Side, mark: Mark, media: Mapping[str, Any] = _NOTHING
    ) -> Prompt:
        """Returns a prompt as token ids.

        Args:
            prompt: in any of the forms.
            side: where prompts of different length, given as one, are padded.
            mark: the user's line.
            media: what goes with it, by the names in `media`.

        Raises:
            PromptTypeError: if it is of no known form.
            PromptError: if it is empty, too long, has ids that the model does not know, or is
                text and there is no tokenizer.
        """
        if isinstance(prompt, Recorded):
            prompt = prompt.result(Location(*mark))
        if media:
            media = {name: value for name, value in media.items() if value is not None}
        if media or (self._processor is not None and is_chat(prompt)):
            read = self._processed(prompt, side, mark, media)
        elif isinstance(prompt, torch.Tensor):
            plain = prompt.dtype is torch.int64 and prompt.ndim == 2
            read = Prompt(prompt if plain else _as_ids(prompt, mark), mark)
            if not self.lookups_check:
                self.check_ids(read)
        elif isinstance(prompt, Mapping) and "input_ids" in prompt:
            read = self._encoding(cast("Mapping[str, Any]", prompt), side, mark)
            if not self.media:  # placeholders of images need not be in the vocabulary
                self.check_ids(read)
        else:
            rows = self._rows(prompt, mark)
            read = Prompt(*_padded(rows, side, self._pad_id, mark))
            self.check_ids(read)
        context = self.limits.context
        rows, length = read.ids.shape
        if not rows or not length:
            raise PromptError("The prompt is empty: it has no tokens.", Location(*mark))
        if context is not None and length > context:
            self.check_length(read)
        return read

    def check_length(self, prompt: Prompt, steps: int = 1) -> None:
        """Checks that the model's context holds a prompt.

        Args:
            prompt: the prompt.
            steps: how many tokens are generated; the last of them is not processed.

        Raises:
            PromptError: if it does not.
        """
        length, context = prompt.ids.shape[1], self.limits.context
        if context is not None and length + steps - 1 > context:
            more = f" and {steps} are to be generated" if steps > 1 else ""
            raise PromptError(
                f"The prompt has {length} tokens{more}, but the model's context is {context}.",
                Location(*prompt.mark),
            )

    def check_ids(self, prompt: Prompt) -> None:
        """Checks that the model knows the ids.

        Tensors on the CPU are not checked when they are read, because looking into one takes
        half as long as all else that we do for a trace. There the embedding itself refuses an id
        that it does not know, and then this finds out which.

        Raises:
            PromptError: if it does not.
        """
        if self.limits.vocabulary is None or not prompt.ids.numel():
            return
        least, most = (bound.item() for bound in prompt.ids.aminmax())
        if least < 0 or most >= self.limits.vocabulary:
            raise PromptError(
                f"The prompt has the token id {least if least < 0 else most}, but the model's ids "
                f"go from 0 to {self.limits.vocabulary - 1}.",
                Location(*prompt.mark),
            )

    def _rows(self, prompt: Any, mark: Mark) -> list[list[int]]:
        """Token ids of each row of a prompt that is no tensor."""
        if isinstance(prompt, str):
            return [self._encoded(prompt, mark)]
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise PromptTypeError(f"{_FORMS}; this is {_kind(prompt)}.", Location(*mark))
        items = list(cast("Sequence[Any]", prompt))
        if all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            return [items] if items else []
        if all(isinstance(item, str) for item in items):
            return [self._encoded(item, mark) for item in items]
        if is_chat(items):
            return [self._chat(items, mark)]
        if all(isinstance(item, Sequence) and not isinstance(item, str | bytes) for item in items):
            rows = [list(item) for item in items]
            if all(isinstance(i, int) and not isinstance(i, bool) for row in rows for i in row):
                if not all(rows):
                    raise PromptError("One of the prompts has no tokens.", Location(*mark))
                return rows
        kinds = ", ".join(sorted({_kind(item) for item in items}))
        raise PromptTypeError(f"{_FORMS}; this is {_kind(prompt)} of {kinds}.", Location(*mark))

    def _encoded(self, text: str, mark: Mark) -> list[int]:
        ids = list(self._needed(mark)(text)["input_ids"])
        if not ids:
            raise PromptError("The prompt is empty: it has no tokens.", Location(*mark))
        return ids

    def _chat(self, messages: list[Any], mark: Mark) -> list[int]:
        tokenizer = self._needed(mark)
        if not getattr(tokenizer, "chat_template", None):
            raise PromptError(
                "The prompt is a chat, but the model's tokenizer has no chat template: give the "
                "text itself.",
                Location(*mark),
            )
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _needed(self, mark: Mark) -> Any:
        if self._tokenizer is None or isinstance(self._tokenizer, Exception):
            reason = f" Loading one failed: {self._tokenizer}" if self._tokenizer else ""
            raise PromptError(
                "The prompt is text, but the model has no tokenizer: pass `tokenizer=` to "
                f"`LanguageModel`, or give token ids.{reason}",
                Location(*mark),
            )
        return self._tokenizer

    def _encoding(self, encoding: Mapping[str, Any], side: Side, mark: Mark) -> Prompt:
        """What a tokenizer returned: lists, or tensors."""
        ids = encoding["input_ids"]
        if not isinstance(ids, torch.Tensor):
            rows = self._rows(ids, mark)
            if len({len(row) for row in rows}) > 1:  # not padded by the tokenizer, so we do
                return Prompt(*_padded(rows, side, self._pad_id, mark))
            ids = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1)
        ids = _as_ids(ids, mark)
        mask: torch.Tensor | None = None
        extras: dict[str, Any] = {}
        for name, value in encoding.items():
            if name == "attention_mask":
                given = torch.as_tensor(value).reshape(ids.shape)
                mask = None if bool(given.all()) else given.long()
            elif isinstance(value, torch.Tensor) and name != "input_ids":
                flat = value.ndim == 1 and value.numel() == ids.numel()
                extras[name] = value.reshape(ids.shape) if flat else value
            elif name == "token_type_ids":
                types = torch.tensor(value, dtype=torch.int64).reshape(ids.shape)
                if types.any():  # else they are what a model takes them to be
                    extras[name] = types
            elif name != "input_ids" and self.media:
                extras[name] = value
        return Prompt(ids, mark, mask, extras)

    def _processed(self, prompt: Any, side: Side, mark: Mark, media: Mapping[str, Any]) -> Prompt:
        """What a processor makes of a prompt, with numbers in the dtype of the model."""

        def leaf(item: Any) -> Any:
            floats = isinstance(item, torch.Tensor) and item.is_floating_point()
            return item.to(self._dtype) if floats else item

        encoding = processed(self._processor, prompt, media, side, mark)
        read = self._encoding(encoding, side, mark)
        return read._replace(extras=map_structure(leaf, dict(read.extras)))


def _as_ids(tensor: torch.Tensor, mark: Mark) -> torch.Tensor:
    """A tensor of ids as int64 with two axes."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
        raise PromptTypeError(
            f"Token ids are integers, but this tensor is {tensor.dtype}. To give embeddings, "
            "write to the embedding's output.",
            Location(*mark),
        )
    if tensor.ndim not in (1, 2):
        raise PromptTypeError(
            "Token ids have the shape (position,) or (rows, position), but this tensor has the "
            f"shape {tuple(tensor.shape)}.",
            Location(*mark),
        )
    ids = tensor if tensor.dtype is torch.int64 else tensor.long()
    return ids[None] if ids.ndim == 1 else ids


def _padded(
    rows: list[list[int]], side: Side, pad_id: int, mark: Mark
) -> tuple[torch.Tensor, Mark, torch.Tensor | None]:
    """Rows of ids as one tensor, and the mask if they had to be padded."""
    length = max(map(len, rows), default=0)
    if all(len(row) == length for row in rows):
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length), mark, None
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        here = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[place, here] = torch.tensor(row)
        mask[place, here] = 1
    return ids, mark, mask


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
