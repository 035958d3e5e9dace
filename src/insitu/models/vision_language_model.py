"""`VisionLanguageModel`: a Hugging Face language model that takes images with its text."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from insitu.graph.errors import LoadError
from insitu.graph.location import here
from insitu.models.language_model import LanguageModel


class VisionLanguageModel(LanguageModel):
    """A language model of Hugging Face that takes images, video or sound with its text.

    A prompt is text with images, `model.trace("<image> What is it?", images=image)`, or a chat
    whose messages have the images in them. Its processor brings both to what the model takes.
    All else is as with a `LanguageModel`: `trace`, `generate`, `invoke`, and weights that are
    loaded by the first run. Invocations of text alone share passes; one with images has a pass for
    itself.

    Args:
        model: a repo id, a folder, or a Transformers model in memory.
        processor: a processor to use in place of the model's own.
        allow_new_weights: as of `LanguageModel`.
        kwargs: keyword arguments for `from_pretrained`: `device_map`, `dtype`, `revision`,
            `quantization_config` and all others that it takes.

    Raises:
        LoadError: if there is no such model. `load()` and the first run raise it if the files lack
            weights.
        OptionError: if it takes nothing but text, or has no language.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        processor: Any = None,
        *,
        allow_new_weights: bool = False,
        **kwargs: Any,
    ) -> None:
        from insitu.models.loading import opened as loading

        location = here()
        if isinstance(model, nn.Module):
            given = {"allow_new_weights": True} if allow_new_weights else {}
            opened = loading.opened_language_module(model, {**given, **kwargs}, location)
        else:
            from insitu.models.loading.tasks import vision_language_class

            choose = vision_language_class
            opened, source = loading.opened_language_files(
                os.fspath(model), kwargs, choose, location, allow_new_weights, False
            )
            if processor is None:
                processor = source.processor()
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None and not isinstance(processor, Exception):
            # Where there are no files of a processor, Transformers gives what else there is.
            tokenizer, processor = processor, LoadError("it was given without `processor=`.")
        if isinstance(processor, Exception):
            tokenizer = tokenizer or processor
        self._open(opened, tokenizer, processor)

    @property
    def processor(self) -> Any:
        """The model's processor, Hugging Face's own object, never changed.

        Raises:
            LoadError: if the model came without one.
        """
        if isinstance(self._processor, Exception):
            raise LoadError(f"The model has no processor: {self._processor}", here())
        return self._processor
