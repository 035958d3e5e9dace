"""Prompts in every form in which one can be given, brought to token ids or embeddings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch

from insitu.graph.errors import OptionError, PromptError, PromptTypeError
from insitu.graph.location import Location, Mark
from insitu.graph.recorded import AnyRecorded
from insitu.graph.structure import map_structure
from insitu.models.chats import CHOICE, are_chats, is_chat, rendered
from insitu.models.given_caches import PAST, cached_length
from insitu.models.media import MEDIA, processed
from insitu.models.prompts import (
    PROMPTS,
    Limits,
    Prompt,
    Side,
    as_ids,
    check_lengths,
    kind_of,
    laid_out,
    masked,
    padded,
)

_FORMS = (
    "A prompt is a string, a list of strings, a list of token ids, a list of such lists, a tensor "
    "of token ids of shape (position,) or (rows, position), what a tokenizer returns, a chat "
    "(a list of dictionaries with 'role' and 'content'), a list of chats, or embeddings "
    "(`inputs_embeds=`)"
)
# What tokenizers return for others than the model.
_FOR_OTHERS = (
    *("special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "length"),
    *("overflowing_tokens", "num_truncated_tokens"),
)
_NOTHING: Mapping[str, Any] = {}
_PLAIN = (*Prompt._field_defaults.values(),)  # what a prompt of ids alone has beside them
_TENSOR, _IDS = torch.Tensor, torch.int64


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
        takes_types: tells whether the model takes `token_type_ids`.

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
        takes_types: Callable[[], bool] = lambda: True,
    ) -> None:
        self._takes_types = takes_types
        self.lookups_check = lookups_check
        self.media: Collection[str] = () if processor is None else MEDIA
        self._processor, self._dtype = processor, dtype
        self._tokenizer = tokenizer
        self.limits = limits
        self._pad_id = pad_id

    def read(
        self,
        prompt: Any,
        side: Side | Callable[[], Side],
        mark: Mark,
        beside: Mapping[str, Any] = _NOTHING,
    ) -> Prompt:
        """Returns a prompt as token ids.

        Args:
            prompt: in any of the forms; None if it is given by keyword.
            side: where prompts of different length, given as one, are padded. A function is asked
                if there are any.
            mark: the user's line.
            beside: what goes with it by keyword: `media`, `add_generation_prompt`, and arguments
                of the model's forward, the prompt itself among them.

        Raises:
            PromptTypeError: if it is of no known form.
            PromptError: if it is empty, too long, of unknown ids, or text without a tokenizer.
            OptionError: if what goes with it does not belong to such a prompt.
        """
        if isinstance(prompt, AnyRecorded):
            return self.read(prompt.result(Location(*mark)), side, mark, beside)
        elif beside:
            read = self._read_with(prompt, side, mark, beside)
        else:
            read = self._read(prompt, side, mark, _NOTHING, None)
        context = self.limits.context
        rows, length = read.ids.shape
        if not rows or not length:
            raise PromptError("The prompt is empty: it has no tokens.", Location(*mark))
        if read.extras:
            check_lengths(read)
        if context is not None and length > context:
            self.check_length(read)
        return read

    def read_plain(self, prompt: Any, mark: Mark) -> Prompt | None:
        """Does what `read` does with what loops give most often, and returns None for the rest.

        Args:
            prompt: as of `read`.
            mark: as of `read`.
        """
        if type(prompt) is not _TENSOR or not self.lookups_check or prompt.dtype is not _IDS:
            return None
        shape = prompt.shape
        if len(shape) != 2:
            return None
        rows, length = shape
        context = self.limits.context
        if not rows or not length or (context is not None and length > context):
            return None  # `read` raises
        # `Prompt(prompt, mark)`, in a third of the time.
        return tuple.__new__(Prompt, (prompt, mark, *_PLAIN))

    def _read(
        self,
        prompt: Any,
        side: Side | Callable[[], Side],
        mark: Mark,
        media: Mapping[str, Any],
        choice: bool | None,
    ) -> Prompt:
        """A prompt with the media that go with it, and how it ends if it is a chat."""
        if media or (self._processor is not None and (is_chat(prompt) or are_chats(prompt))):
            return self._processed(prompt, side, mark, media, choice)
        if isinstance(prompt, torch.Tensor):
            if prompt.is_floating_point() and self._is_embedding(prompt):
                return self._embedded(prompt, mark)
            read = Prompt(prompt if _is_plain(prompt) else as_ids(prompt, mark), mark)
            if not self.lookups_check:
                self.check_ids(read)
        elif isinstance(prompt, Mapping) and "input_ids" in prompt:
            read = self._encoding(cast("Mapping[str, Any]", prompt), side, mark)
            if not self.media:  # placeholders of images need not be in the vocabulary
                self.check_ids(read)
        elif isinstance(prompt, Mapping) and "inputs_embeds" in prompt:
            return self._read_with(None, side, mark, cast("Mapping[str, Any]", prompt))
        else:
            rows = self._rows(prompt, mark, choice)
            read = padded(rows, side, self._pad_id, mark)
            self.check_ids(read)
        return read

    def _read_with(
        self,
        prompt: Any,
        side: Side | Callable[[], Side],
        mark: Mark,
        beside: Mapping[str, Any],
    ) -> Prompt:
        """A prompt with what goes with it by keyword."""
        location = Location(*mark)
        given = {
            name: value.result(location) if isinstance(value, AnyRecorded) else value
            for name, value in beside.items()
            if value is not None
        }
        choice = given.pop(CHOICE, None)
        media = {name: given.pop(name) for name in MEDIA if name in given}
        named = [name for name in PROMPTS if name in given]
        if prompt is not None and named:
            raise OptionError(
                f"The prompt is given twice: by place, and as `{named[0]}=`.", location
            )
        if choice is not None and not is_chat(prompt) and not are_chats(prompt):
            raise OptionError(
                f"`{CHOICE}` is an option of a chat, a list of dictionaries with 'role' and "
                f"'content', and this prompt is {kind_of(prompt)}.",
                location,
            )
        if not named:
            read = self._read(prompt, side, mark, media, choice)
        elif "input_ids" in given:
            read = self._read({"input_ids": given.pop("input_ids")}, side, mark, media, None)
            if "inputs_embeds" in given:
                raise PromptError(
                    "The prompt is given twice: as `input_ids=`, and as `inputs_embeds=`.",
                    location,
                )
        else:
            read = self._embedded(given.pop("inputs_embeds"), mark)
        if "attention_mask" in given:
            read = masked(read, given.pop("attention_mask"), cached_length(given.get(PAST)))
        for name, value in given.items():
            if name == "token_type_ids" and not isinstance(value, torch.Tensor):
                given[name] = laid_out(read._replace(mask=None), name, value)
        return read._replace(extras={**read.extras, **given}) if given else read

    def _is_embedding(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor of floats has the shape of what the embedding gives for tokens."""
        width = self.limits.width
        return tensor.ndim in (2, 3) and (width is None or tensor.shape[-1] == width)

    def _embedded(self, embeddings: Any, mark: Mark) -> Prompt:
        """A prompt of embeddings, `(rows, position, d_model)` or of one row without an axis."""
        if not isinstance(embeddings, torch.Tensor) or not embeddings.is_floating_point():
            raise PromptTypeError(
                f"`inputs_embeds` is a tensor of floats, not {kind_of(embeddings)}.",
                Location(*mark),
            )
        if not self._is_embedding(embeddings):
            raise PromptTypeError(
                "Embeddings have the shape (rows, position, d_model) or (position, d_model)"
                f"{f' with d_model={self.limits.width}' if self.limits.width else ''}, but this "
                f"tensor has the shape {tuple(embeddings.shape)}.",
                Location(*mark),
            )
        whole = embeddings if embeddings.ndim == 3 else embeddings[None]
        ids = torch.full(whole.shape[:2], self._pad_id, device=whole.device)
        return Prompt(ids, mark, None, {"inputs_embeds": whole})

    def check(self, prompts: Sequence[Prompt], steps: int = 1) -> None:
        """Raises the error behind an `IndexError` of the model, if the prompts are to blame.

        Args:
            prompts: what the model was called with.
            steps: how many tokens it was to generate.

        Raises:
            PromptError: if an id is unknown, or the model's context too short.
        """
        for prompt in prompts:
            self.check_ids(prompt)
            self.check_length(prompt, steps)

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

    def _rows(self, prompt: Any, mark: Mark, choice: bool | None = None) -> list[list[int]]:
        """Token ids of each row of a prompt that is no tensor."""
        if isinstance(prompt, str):
            return [self._encoded(prompt, mark)]
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise PromptTypeError(f"{_FORMS}; this is {kind_of(prompt)}.", Location(*mark))
        items = list(cast("Sequence[Any]", prompt))
        if all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            return [items] if items else []
        if all(isinstance(item, str) for item in items):
            return [self._encoded(item, mark) for item in items]
        if is_chat(items):
            return [self._chat(items, mark, choice)]
        if are_chats(items):
            return [self._chat(chat, mark, choice) for chat in items]
        if all(isinstance(item, Sequence) and not isinstance(item, str | bytes) for item in items):
            rows = [list(item) for item in items]
            if all(isinstance(i, int) and not isinstance(i, bool) for row in rows for i in row):
                if not all(rows):
                    raise PromptError("One of the prompts has no tokens.", Location(*mark))
                return rows
        kinds = ", ".join(sorted({kind_of(item) for item in items}))
        raise PromptTypeError(f"{_FORMS}; this is {kind_of(prompt)} of {kinds}.", Location(*mark))

    def _encoded(self, text: str, mark: Mark) -> list[int]:
        ids = list(self._needed(mark)(text)["input_ids"])
        if not ids:
            raise PromptError("The prompt is empty: it has no tokens.", Location(*mark))
        return ids

    def _chat(self, messages: Sequence[Any], mark: Mark, choice: bool | None) -> list[int]:
        tokenizer = self._needed(mark)
        if not getattr(tokenizer, "chat_template", None):
            raise PromptError(
                "The prompt is a chat, but the model's tokenizer has no chat template: give the "
                "text itself.",
                Location(*mark),
            )
        try:
            text = rendered(tokenizer.apply_chat_template, messages, choice)
        except Exception as error:  # templates raise what they like, of Jinja's or of Python's
            raise PromptError(
                "The chat template of the model's tokenizer refuses this chat: "
                f"{str(error) or type(error).__name__}",
                Location(*mark),
            ) from error
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

    def _encoding(
        self, encoding: Mapping[str, Any], side: Side | Callable[[], Side], mark: Mark
    ) -> Prompt:
        """What a tokenizer returned: lists, or tensors."""
        ids = encoding["input_ids"]
        if isinstance(ids, torch.Tensor):
            read = Prompt(as_ids(ids, mark), mark)
        else:  # perhaps not padded by the tokenizer, then here
            read = padded(self._rows(ids, mark), side, self._pad_id, mark)
        extras: dict[str, Any] = {}
        for name, value in encoding.items():
            if name in ("input_ids", "attention_mask", *_FOR_OTHERS) or value is None:
                continue
            types = name == "token_type_ids"
            if isinstance(value, torch.Tensor):
                flat = value.ndim == 1 and value.numel() == read.ids.numel()
                extras[name] = value.reshape(read.ids.shape) if flat else value
            else:
                extras[name] = value if self.media and not types else laid_out(read, name, value)
            if types and not self._takes_types() and not extras[name].any():
                del extras[name]  # many tokenizers make them for any model
        mask, read = encoding.get("attention_mask"), read._replace(extras=extras)
        if mask is None:
            return read
        if read.mask is None:
            return masked(read, mask)
        return read._replace(mask=laid_out(read, "attention_mask", mask))

    def _processed(
        self,
        prompt: Any,
        side: Side | Callable[[], Side],
        mark: Mark,
        media: Mapping[str, Any],
        choice: bool | None,
    ) -> Prompt:
        """What a processor makes of a prompt, with numbers in the dtype of the model."""

        def leaf(item: Any) -> Any:
            floats = isinstance(item, torch.Tensor) and item.is_floating_point()
            return item.to(self._dtype) if floats else item

        encoding = processed(self._processor, prompt, media, side, mark, choice)
        read = self._encoding(encoding, side, mark)
        read = read._replace(extras=map_structure(leaf, dict(read.extras)))
        if read.mask is not None:
            read = read._replace(padded=side() if callable(side) else side)
        return read


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is token ids as a model takes them, `(rows, position)`."""
    return tensor.dtype is torch.int64 and tensor.ndim == 2
