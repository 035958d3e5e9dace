"""From a repo id or a folder to a config, a tokenizer, a tree without weights, and weights.

Everything goes through Hugging Face's own `from_pretrained`. Transformers is imported here, when
a language model is made, and nowhere at import of the package.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from insitu import zoo
from insitu.graph.errors import LoadError
from insitu.graph.location import Location

# Arguments of `from_pretrained` that say where files are, so config and tokenizer need them too.
_WHERE = frozenset(
    (
        *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder"),
        *("token", "trust_remote_code"),
    )
)


class Source:
    """Where a model comes from, and how it is to be loaded.

    Args:
        name: a repo id, a folder, or the name of a bundled model.
        kwargs: keyword arguments for `from_pretrained`.
    """

    def __init__(self, name: str, kwargs: dict[str, Any]) -> None:
        self.name = name
        self._place = zoo.folder(name) or name
        self._kwargs = kwargs
        self._where = {key: kwargs[key] for key in kwargs.keys() & _WHERE}

    def config(self, location: Location) -> Any:
        """Returns the model's config.

        Raises:
            LoadError: if there is none to be had.
        """
        from transformers import AutoConfig

        given = self._kwargs.get("config")
        if given is not None:
            return given
        try:
            return AutoConfig.from_pretrained(self._place, **self._where)
        except Exception as error:
            raise LoadError(
                f"{self.name!r} cannot be loaded: it is no folder with a model, no bundled model "
                f"({', '.join(map(repr, zoo.names()))}), and no repository that can be reached. "
                f"{_first_line(error)}",
                location,
            ) from error

    def tokenizer(self) -> Any:
        """Returns the tokenizer, or the error with which loading it failed."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._place, **self._where)
        except Exception as error:  # only text needs a tokenizer; it is reported then
            return LoadError(_first_line(error))
        # Transformers 5 makes an empty one where there are no files.
        return tokenizer if len(tokenizer) > 1 else LoadError(f"{self.name!r} has no tokenizer.")

    def tree(self, config: Any) -> nn.Module:
        """Returns the module tree on the meta device: no weights, no memory."""
        from transformers import AutoModelForCausalLM

        kwargs = {
            key: self._kwargs[key]
            for key in ("attn_implementation", "trust_remote_code")
            if key in self._kwargs
        }
        with torch.device("meta"):
            tree = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=self._dtype(config), **kwargs
            )
        return tree.eval()

    def weights(self, location: Location | None) -> nn.Module:
        """Returns the model with its weights.

        Raises:
            LoadError: if the files cannot be read.
        """
        from transformers import AutoModelForCausalLM

        try:
            return AutoModelForCausalLM.from_pretrained(self._place, **self._kwargs)
        except Exception as error:
            raise LoadError(
                f"The weights of {self.name!r} cannot be loaded: {type(error).__name__}: "
                f"{_first_line(error)}",
                location,
            ) from error

    def _dtype(self, config: Any) -> torch.dtype:
        """The dtype that `from_pretrained` will give the weights."""
        import transformers

        asked = self._kwargs.get("dtype", self._kwargs.get("torch_dtype"))
        if asked is None and int(transformers.__version__.partition(".")[0]) < 5:
            return torch.get_default_dtype()
        if asked is None or asked == "auto":
            asked = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        if isinstance(asked, str):
            asked = getattr(torch, asked)
        return asked or torch.get_default_dtype()


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
