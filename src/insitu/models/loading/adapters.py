"""Adapters of PEFT: a repository that has what was trained of a model, and names the model.

They are put into the model by Transformers' own methods, so its tree keeps its paths, and the
adapter's layers are in it. A learnt prompt has no layers to be put in: there PEFT wraps the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from insitu.graph.errors import LoadError
from insitu.graph.location import Location
from insitu.models.loading.new_weights import new_adapter_weights

_NAME = "default"  # of an adapter that Transformers loads


class Adapter(NamedTuple):
    """An adapter in files.

    Attributes:
        place: the folder or repository that has it.
        base: the folder or repository of the model that it was trained on.
        where: arguments that say where files are.
    """

    place: str
    base: str
    where: Mapping[str, Any]

    def put_into(self, tree: Any) -> Any:
        """Returns a tree without weights, with the adapter's layers in it."""
        from peft import PeftConfig, get_peft_model

        config = PeftConfig.from_pretrained(self.place, **self.where)
        if config.is_prompt_learning:  # it wraps the model and leaves its layers as they are
            return get_peft_model(tree, config)
        tree.add_adapter(config, adapter_name=_NAME)
        return tree

    def load_into(self, module: Any) -> tuple[Any, list[str]]:
        """Returns a model with the adapter's layers in it, and which of their weights are new."""
        from peft import PeftConfig, PeftModel

        config = PeftConfig.from_pretrained(self.place, **self.where)
        if config.is_prompt_learning:
            module = PeftModel.from_pretrained(module, self.place, **self.where)
            anew: list[str] = []  # a prompt that its file lacks is an error already
        else:
            kwargs = dict(self.where)
            module.load_adapter(self.place, adapter_name=_NAME, adapter_kwargs=kwargs)
            anew = new_adapter_weights(module, self.place, self.where, _NAME)
        return module.eval(), anew


def find_adapter(place: str, where: Mapping[str, Any], location: Location) -> Adapter | None:
    """Returns the adapter that a folder or repository has, None if it has none.

    Args:
        place: the folder or repository.
        where: arguments that say where files are.
        location: the user's line.

    Raises:
        LoadError: if there is one and PEFT is not installed, or it names no model.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    where = {name: value for name, value in where.items() if name != "trust_remote_code"}
    try:
        found = find_adapter_config_file(place, **where)
    except Exception:  # there is no such repository: what it is asked for next says so
        return None
    if found is None:
        return None
    if find_spec("peft") is None:
        raise LoadError(
            f"{place!r} has an adapter, and adapters need PEFT: `pip install peft`.", location
        )
    base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if Path(place, "config.json").exists():  # the model lies beside its adapter
        base = place
    if not base:
        raise LoadError(
            f"{place!r} has an adapter that does not name its model ('base_model_name_or_path' in "
            "its adapter_config.json): load the model and the adapter with PEFT, and give the "
            "model in memory.",
            location,
        )
    return Adapter(place, base, where)
