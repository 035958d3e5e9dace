"""From a repo id or a folder to a config, a tokenizer, a tree without weights, and weights.

Everything goes through Hugging Face's own `from_pretrained`. Transformers is imported here, when
a model is loaded, and nowhere at import of the package.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from insitu import zoo
from insitu.graph.errors import LoadError, OptionError
from insitu.graph.location import Location
from insitu.habits import OF_LOADING, habit
from insitu.models.loading.adapters import find_adapter
from insitu.models.loading.known_options import check_loading
from insitu.models.loading.new_weights import new_weights, refusal
from insitu.models.loading.reachability import without_server

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
        name: a repo id, a folder, or the name of a bundled model. It may have an adapter of PEFT
            in place of a model.
        kwargs: keyword arguments for `from_pretrained`.
        choose: gives the class to load it with, for its config and its place.
        location: the user's line.
        allow_new_weights: whether weights that no file has may be drawn at random.
        asked: whether the user chose the class, and not the config.

    Raises:
        LoadError: if there is no such model.
        OptionError: if there is no such option.
    """

    def __init__(
        self,
        name: str,
        kwargs: dict[str, Any],
        choose: Callable[[Any, Location, str], Any],
        location: Location,
        allow_new_weights: bool = False,
        asked: bool = False,
    ) -> None:
        for option in kwargs:
            if option in OF_LOADING:
                raise OptionError(
                    f"There is no option `{option}` here{habit(option, OF_LOADING)}.", location
                )
        self.name = name
        self._place = zoo.folder(name) or name
        self._kwargs = kwargs
        self._where = {key: kwargs[key] for key in kwargs.keys() & _WHERE}
        self._allow_new_weights, self._asked = allow_new_weights, asked
        self._silence = self._ask()
        self._adapter = find_adapter(self._place, self._where, location)
        if self._adapter is not None:
            self._place = zoo.folder(self._adapter.base) or self._adapter.base
            self._silence = self._silence or self._ask()
        self.config = self._config(location)
        self._class = choose(self.config, location, self._place)
        check_loading(self._class, self.config, kwargs, location)

    @property
    def origin(self) -> tuple[str, str]:
        """What it was loaded by: its name, and the revision that was asked for, or ""."""
        return self.name, str(self._where.get("revision") or "")

    def tokenizer(self) -> Any:
        """Returns the tokenizer, or the error with which loading it failed."""
        from transformers import AutoTokenizer

        return self._reading(AutoTokenizer)

    def processor(self) -> Any:
        """Returns the processor, or the error with which loading it failed."""
        from transformers import AutoProcessor

        return self._reading(AutoProcessor)

    def tree(self) -> nn.Module | None:
        """Returns the module tree on the meta device: no weights, no memory.

        None if the model cannot be made without weights.
        """
        kind = self._class
        dtype = self._dtype(self.config)
        kwargs: dict[str, Any] = {"dtype": dtype}
        if "attn_implementation" in self._kwargs:
            kwargs["attn_implementation"] = self._kwargs["attn_implementation"]
        if hasattr(kind, "from_config"):
            make = kind.from_config
            if "trust_remote_code" in self._kwargs:
                kwargs["trust_remote_code"] = self._kwargs["trust_remote_code"]
        else:
            make = kind._from_config
        try:
            with torch.device("meta"):
                tree = make(copy.deepcopy(self.config), **kwargs)
                _keep_in_float32(tree, dtype)
                if self._adapter is not None:
                    tree = self._adapter.put_into(tree)
        except (NotImplementedError, RuntimeError):
            # Some classes read or copy weights while they are made. On the meta device torch
            # raises NotImplementedError for a copy of data that is not there, and RuntimeError
            # for its `.item()`. The model is then loaded with its weights at once.
            return None
        return tree.eval()

    def weights(self, location: Location | None) -> nn.Module:
        """Returns the model with its weights.

        Raises:
            LoadError: if the files cannot be read.
        """
        try:
            kwargs = {**self._kwargs, "output_loading_info": True}
            if without_server(self._place, self._where) is not None:
                kwargs["local_files_only"] = True
            loaded = self._class.from_pretrained(self._place, **kwargs)
            # A class of a repository's own code may not know the option.
            module, report = loaded if isinstance(loaded, tuple) else (loaded, {})
            anew = new_weights(module, report)
            if self._adapter is not None and self._adapter.base != self._adapter.place:
                module, more = self._adapter.load_into(module)
                anew += more
        except Exception as error:
            raise LoadError(
                f"The weights of {self.name!r} cannot be loaded: {type(error).__name__}: "
                f"{_first_line(error)}",
                location,
            ) from error
        if anew and not self._allow_new_weights:
            kind = type(module).__name__
            raise LoadError(refusal(self.name, kind, anew, self._asked), location)
        return module

    def knows_dtypes(self) -> bool:
        """Returns whether the weights will certainly have the dtypes that they have in the tree.

        Not where they are quantised, or where their dtype stands in their files alone.
        """
        given = self._kwargs.get("quantization_config")
        if given is not None or getattr(self.config, "quantization_config", None) is not None:
            return False
        asked = self._kwargs.get("dtype", self._kwargs.get("torch_dtype"))
        names = ("dtype", "torch_dtype")
        return isinstance(asked, torch.dtype) or any(getattr(self.config, n, None) for n in names)

    def _ask(self) -> str | None:
        """Why the server does not answer, None if it does; then only local files are used."""
        silence = without_server(self._place, self._where)
        if silence is not None:
            self._where["local_files_only"] = True
        return silence

    def _config(self, location: Location) -> Any:
        """The model's config."""
        from transformers import AutoConfig

        given = self._kwargs.get("config")
        if given is not None:
            return given
        try:
            return AutoConfig.from_pretrained(self._place, **self._where)
        except Exception as error:
            name, model = self.name, "it"
            if self._adapter is not None:
                model = f"it has an adapter of {self._adapter.base!r}, which"
            raise LoadError(
                f"{name!r} cannot be loaded: {model} is no folder with a model, no bundled model "
                f"({', '.join(map(repr, zoo.names()))}), and no repository that can be reached. "
                f"{self._silence or _first_line(error)}",
                location,
            ) from error

    def _reading(self, auto: Any) -> Any:
        """What reads prompts, the adapter's own before the model's; or an error."""
        failure = LoadError("")
        places = [self._place] if self._adapter is None else [self._adapter.place, self._place]
        for place in places:
            try:
                reading = auto.from_pretrained(place, **self._where)
            except Exception as error:  # only prompts of text need it; it is reported then
                failure = LoadError(_first_line(error))
                continue
            # Transformers 5 makes an empty tokenizer where there are no files.
            if not hasattr(reading, "__len__") or len(reading) > 1:
                return reading
            failure = LoadError(f"{self.name!r} has no tokenizer.")
        return failure

    def _dtype(self, config: Any) -> torch.dtype:
        """The dtype that `from_pretrained` will give the weights."""
        import transformers

        asked = self._kwargs.get("dtype", self._kwargs.get("torch_dtype"))
        if asked is None and int(transformers.__version__.partition(".")[0]) >= 5:
            asked = "auto"
        if asked == "auto":
            asked = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        if isinstance(asked, str):
            asked = getattr(torch, asked)
        quantisation = self._kwargs.get("quantization_config")
        quantisation = quantisation or getattr(config, "quantization_config", None)
        if quantisation is not None:  # some kinds have a dtype of their own, where none is asked
            from transformers.quantizers.auto import AutoHfQuantizer

            with contextlib.suppress(Exception):  # it is not installed: loading will say so
                quantiser: Any = AutoHfQuantizer.from_config(quantisation)
                update = getattr(quantiser, "update_dtype", None) or quantiser.update_torch_dtype
                asked = update(asked)
        return asked or torch.get_default_dtype()


def _keep_in_float32(tree: Any, dtype: torch.dtype) -> None:
    """Gives weights float32 that `from_pretrained` keeps in it, also if another dtype is asked."""
    import transformers

    patterns: list[str] = []
    if dtype is torch.float16:
        patterns += getattr(tree, "_keep_in_fp32_modules", None) or ()
    if dtype in (torch.float16, torch.bfloat16):
        patterns += getattr(tree, "_keep_in_fp32_modules_strict", None) or ()
    if not patterns:
        return
    if int(transformers.__version__.partition(".")[0]) >= 5:
        kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
    else:  # whole parts of a path
        kept = re.compile("|".join(rf"(^|\.){pattern}($|\.)" for pattern in patterns))
    for name, weight in tree.state_dict(keep_vars=True).items():
        if weight.is_floating_point() and kept.search(name):
            weight.data = weight.data.float()


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
