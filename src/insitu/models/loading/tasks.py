"""The class of Transformers that a model is loaded with, chosen by its config.

Transformers has a table of classes for each task, by the type of the model. A config names the
class that its weights were saved from, and the table that has this class tells the task.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from insitu.graph.errors import OptionError
from insitu.graph.location import Location
from insitu.models.loading.weight_names import fullest, parameters_of


class Task(NamedTuple):
    """What a language model was trained for.

    Attributes:
        name: what it is called here.
        auto: the class of Transformers that loads models for it.
        table: Transformers' table of such models.
        also: other names for it, among them those of Hugging Face.
    """

    name: str
    auto: str
    table: str
    also: Sequence[str]


TASKS = (
    Task(
        "causal",
        "AutoModelForCausalLM",
        "MODEL_FOR_CAUSAL_LM_MAPPING",
        ("causal-lm", "decoder", "text-generation"),
    ),
    Task(
        "encoder-decoder",
        "AutoModelForSeq2SeqLM",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
        ("seq2seq", "seq2seq-lm", "summarization", "text2text-generation", "translation"),
    ),
    Task(
        "masked",
        "AutoModelForMaskedLM",
        "MODEL_FOR_MASKED_LM_MAPPING",
        ("encoder", "fill-mask", "masked-lm"),
    ),
)
_SEEING = (  # tables of models that take images or sound with their text
    ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"),
    ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING"),
)


def language_class(config: Any, location: Location, place: str, asked: str | None = None) -> Any:
    """Returns the class that a language model is loaded with: the one that it was saved from.

    Args:
        config: the model's config.
        location: the user's line.
        place: the folder or repository of its weights.
        asked: the name of a task, None for the one that the weights were saved for.

    Raises:
        OptionError: if there is no such task, or no such model for it.
    """
    import transformers

    if asked is not None:
        return getattr(transformers, _asked(config, asked, location).auto)
    for task in TASKS:
        if _named(config, task.auto, task.table):
            return getattr(transformers, task.auto)
    if any(_named(config, *seeing) for seeing in _SEEING):
        raise OptionError(no_language_model(config), location)
    possible = {
        task.name: task for task in TASKS if type(config) in getattr(transformers, task.table)
    }
    likely = [possible[name] for name in _likely(config) if name in possible]
    if _is_known(config):
        saved = saved_class(config, location)
        heads = [task for task in likely if _has_head(config, saved, task)]
        return getattr(transformers, heads[0].auto) if heads else saved
    if not likely:
        raise OptionError(no_language_model(config), location)
    classes = [
        getattr(transformers, name) for name in (*(task.auto for task in likely), "AutoModel")
    ]
    return fullest(classes, config, place)


def vision_language_class(config: Any, location: Location, place: str) -> Any:
    """Returns the class that a language model with eyes, or ears, is loaded with.

    Args:
        config: the model's config.
        location: the user's line.
        place: the folder or repository of its weights.

    Raises:
        OptionError: if it is no such model.
    """
    import transformers

    for auto, table in _SEEING:
        known = type(config) in getattr(transformers, table, ())
        if known or _named(config, auto, table):
            return getattr(transformers, auto)
    raise OptionError(
        f"{_described(config)} is no vision-language model: load it with `LanguageModel`, or with "
        "`Model.from_pretrained` if it has no language either.",
        location,
    )


def saved_class(config: Any, location: Location, place: str = "") -> Any:
    """Returns the class that a model's weights were saved from.

    Args:
        config: the model's config.
        location: the user's line.
        place: the folder or repository of its weights.
    """
    import transformers

    for name in _architectures(config):
        if isinstance(getattr(transformers, name, None), type):
            return getattr(transformers, name)
        for auto, remote in (getattr(config, "auto_map", None) or {}).items():
            if remote.rpartition(".")[2] == name and hasattr(transformers, auto):
                return getattr(transformers, auto)
    return transformers.AutoModel


def _likely(config: Any) -> Sequence[str]:
    """The tasks of a config that leaves its task open, the likeliest first."""
    if getattr(config, "is_encoder_decoder", False):
        return ("encoder-decoder",)
    return ("causal",) if getattr(config, "is_decoder", False) else ("masked", "causal")


def _asked(config: Any, asked: str, location: Location) -> Task:
    """The task of a name."""
    import transformers

    for task in TASKS:
        if asked in (task.name, *task.also):
            known = type(config) in getattr(transformers, task.table)
            if known or task.auto in (getattr(config, "auto_map", None) or {}):
                return task
            raise OptionError(
                f"Transformers has no {task.name} language model of the type "
                f"{config.model_type!r}, so `task={asked!r}` is not possible.",
                location,
            )
    listed = "; ".join(f"{task.name!r} (or {', '.join(map(repr, task.also))})" for task in TASKS)
    raise OptionError(f"There is no task {asked!r}. The tasks are {listed}.", location)


def _named(config: Any, auto: str, table: str) -> bool:
    """Whether a config names a class of a table."""
    import transformers

    names = _architectures(config)
    remote = (getattr(config, "auto_map", None) or {}).get(auto, "")
    if remote.rpartition(".")[2] in names:
        return True
    return not names.isdisjoint(_classes(getattr(transformers, table, {}), config))


def _classes(table: Any, config: Any) -> Iterator[str]:
    """The names of the classes that a table has for a config."""
    if type(config) in table:
        found = table[type(config)]
        for kind in found if isinstance(found, tuple | list) else (found,):
            yield kind.__name__


def _is_known(config: Any) -> bool:
    """Whether a config names a class that there is."""
    import transformers

    names = _architectures(config)
    remote = (getattr(config, "auto_map", None) or {}).values()
    known = {name for name in names if hasattr(transformers, name)}
    return bool(known) or any(one.rpartition(".")[2] in names for one in remote)


def _has_head(config: Any, saved: Any, task: Task) -> bool:
    """Whether a class with several heads, for pretraining, has the head for a task among them."""
    import transformers

    table = transformers.MODEL_FOR_PRETRAINING_MAPPING
    if _architectures(config).isdisjoint(_classes(table, config)):
        return False
    wanted = parameters_of(getattr(transformers, task.auto), config)
    return wanted is not None and wanted <= (parameters_of(saved, config) or set())


def no_language_model(config: Any) -> str:
    """Returns the message of an error about a model that is none of language.

    Args:
        config: the model's config.
    """
    import transformers

    message = f"{_described(config)} is no language model."
    if any(type(config) in getattr(transformers, table, ()) for _, table in _SEEING):
        return (
            message + " It takes images or sound with its text: load it with `VisionLanguageModel`."
        )
    return message + " Load it with `Model.from_pretrained`."


def _described(config: Any) -> str:
    names = getattr(config, "architectures", None) or ()
    return " or ".join(names) or f"A model of the type {config.model_type!r}"


def _architectures(config: Any) -> set[str]:
    return set(getattr(config, "architectures", None) or ())
