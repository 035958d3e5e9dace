"""Sites of a harvest: how they are written, and where in a model they are.

- `residual_out:6`: a standard name, and the block; also 4-7, 0,5 or *
- `mlp.post:6`: the same by its key in a block
- `transformer.h.6.mlp.output`: a module by its path; .input too, and a number behind it
- `sae(FOLDER):32@residual_out:6`: the 32 largest features of a sparse autoencoder
- `grad.residual_out:6`: the gradient of the metric
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from insitu.graph.errors import OptionError, PathError
from insitu.graph.location import here
from insitu.methods.sae import SparseAutoencoder
from insitu.methods.sites import Site, chosen, layers_with, site_of
from insitu.models.language_model import LanguageModel

_GRADIENT = "grad."
_SAE = re.compile(r"sae\((?P<folder>.+)\):(?P<k>\d{1,9})@(?P<site>.+)", re.DOTALL)
_NAMED = re.compile(r"(?P<name>[\w.]+):(?P<layers>[-\d,* ]+)")
_PATH = re.compile(r"(?P<path>.+)\.(?P<side>output|input)(?:\.(?P<item>\d{1,4}))?")


@dataclass(frozen=True, slots=True)
class SaeSite:
    """The largest features of a sparse autoencoder at a site.

    Attributes:
        site: where its activations are, such as "residual_out:6".
        sae: the autoencoder.
        k: how many features are kept of each position, the largest.
        name: what the autoencoder is called in the folder.
    """

    site: str
    sae: SparseAutoencoder
    k: int = 32
    name: str = "sae"


AnySite = str | SaeSite
"""What may be given as a site."""


@dataclass(frozen=True, slots=True)
class NamedSite:
    """A value of a block by its standard name.

    Attributes:
        site: which value.
        layer: the number of its block.
    """

    site: Site
    layer: int

    @property
    def label(self) -> str:
        """How it is written."""
        key = self.site.key
        name = self.site.name if site_of(self.site.name).key == key else key
        return f"{name}:{self.layer}"

    def read(self, model: LanguageModel) -> Any:
        """Returns its proxy in an open invocation."""
        return self.site.read(model, self.layer)

    def arranged(self, value: Any) -> Any:
        """Returns a value of it, or a gradient, as `(rows, position, ...)`."""
        axis = self.site.axes.index("position")
        return value if axis == 0 else value.transpose(1, axis + 1)


@dataclass(frozen=True, slots=True)
class ModuleSite:
    """What a module is given or returns.

    Attributes:
        path: the path of the module.
        side: "output" or "input".
        item: which item of a tuple; None if it is a tensor.
    """

    path: str
    side: str
    item: int | None = None

    @property
    def label(self) -> str:
        """How it is written."""
        return f"{self.path}.{self.side}" + ("" if self.item is None else f".{self.item}")

    def read(self, model: LanguageModel) -> Any:
        """Returns its proxy in an open invocation, as it is in the model."""
        handle: Any = model
        for name in self.path.split("."):
            handle = handle[name]
        value = getattr(handle, self.side)
        if self.item is not None:
            return value[self.item]
        # Blocks always return a tuple that begins with the hidden states.
        is_block = self.path in model.traits.block_views[False]
        return value[0] if is_block and self.side == "output" else value

    def arranged(self, value: Any) -> Any:
        """Returns a value of it, or a gradient, as it is in the model."""
        return value


@dataclass(frozen=True, slots=True)
class HarvestSite:
    """A site of a harvest.

    Attributes:
        label: what it is called in the folder.
        place: where it is in the model.
        gradient: whether the gradient is meant and not the value.
        sae: the sparse autoencoder whose features are kept; None for the values themselves.
        k: how many of its features.
    """

    label: str
    place: NamedSite | ModuleSite
    gradient: bool = False
    sae: SparseAutoencoder | None = None
    k: int = 0

    @property
    def reads(self) -> tuple[NamedSite | ModuleSite, bool]:
        """What it takes of a run: sites that take the same share it."""
        return self.place, self.gradient


def sites_of(model: LanguageModel, given: AnySite | Sequence[AnySite]) -> list[HarvestSite]:
    """Returns the sites that are meant, one for each layer.

    Args:
        model: the model.
        given: one or several.

    Raises:
        OptionError: if there is no such site, or none is given, or one twice.
    """
    listed = [given] if isinstance(given, str | SaeSite) else list(given)
    found = [site for one in listed for site in _expanded(model, one)]
    if not found:
        raise OptionError("Name at least one site, such as 'residual_out:6'.", here())
    labels = [site.label for site in found]
    for label in labels:
        if labels.count(label) > 1:
            told = ", or give each `SaeSite` a `name`" if label.startswith("sae(") else ""
            raise OptionError(f"The site {label!r} is there twice: name it once{told}.", here())
    return found


def split_sites(given: str) -> list[str]:
    """Returns the sites of a list with commas: those in parentheses and between layers are not cut.

    Args:
        given: such as "residual_out:4,6,mlp.post:6".
    """
    parts, depth = [""], 0
    for char in given:
        depth += (char == "(") - (char == ")")
        if char == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += char
    joined = list[str]()
    for part in map(str.strip, parts):
        if joined and re.fullmatch(r"-?\d+(\s*-\s*-?\d+)?", part):  # a layer of the one before
            joined[-1] += f",{part}"
        else:
            joined.append(part)
    return joined


def _expanded(model: LanguageModel, given: AnySite) -> Iterator[HarvestSite]:
    if isinstance(given, SaeSite):
        yield from _features(model, given)
        return
    if not isinstance(given, str):
        raise OptionError(
            f"A site is a text such as 'residual_out:6', or a `SaeSite`, not {given!r:.80}.", here()
        )
    features = _SAE.fullmatch(given)
    if features is not None:
        folder = Path(features["folder"])
        sae = SparseAutoencoder.load(folder)
        made = SaeSite(features["site"], sae, int(features["k"]), folder.resolve().name)
        yield from _features(model, made)
        return
    gradient = given.startswith(_GRADIENT)
    for place in _places(model, given.removeprefix(_GRADIENT)):
        yield HarvestSite(_GRADIENT * gradient + place.label, place, gradient)


def _features(model: LanguageModel, given: SaeSite) -> Iterator[HarvestSite]:
    if not 1 <= given.k <= given.sae.n_features:
        raise OptionError(
            f"{given.k} features are to be kept, and the autoencoder has {given.sae.n_features}.",
            here(),
        )
    if given.site.startswith(_GRADIENT) or _SAE.fullmatch(given.site):
        raise OptionError(
            f"An autoencoder takes values such as 'residual_out:6', not {given.site!r}.", here()
        )
    for place in _places(model, given.site):
        label = f"sae({given.name}):{given.k}@{place.label}"
        yield HarvestSite(label, place, sae=given.sae, k=given.k)


def _places(model: LanguageModel, given: str) -> Iterator[NamedSite | ModuleSite]:
    named = _NAMED.fullmatch(given)
    if named is not None:
        site, layers = site_of(named["name"]), _layers(model, named["layers"], given)
        if site.axes.count("position") != 1:
            raise OptionError(
                f"A value of {named['name']!r} has the axes {', '.join(site.axes)}: its size "
                "depends on the length of a sequence, so it has no rows of one shape.",
                here(),
            )
        for layer in layers_with(model, site, layers):
            yield NamedSite(site, layer)
        return
    path = _PATH.fullmatch(given)
    if path is None:
        raise OptionError(
            f"{given!r} is no site: write a standard name and a block, such as 'residual_out:6', "
            "or the path of a module, such as 'transformer.h.6.mlp.output'.",
            here(),
        )
    item = None if path["item"] is None else int(path["item"])
    site = ModuleSite(path["path"], path["side"], item)
    if site.path not in model.modules:
        try:
            site.read(model)  # raises, naming the nearest module
        except PathError:
            raise
        except Exception as error:
            raise OptionError(f"There is no module {site.path!r}: {error}", here()) from None
    yield site


def _layers(model: LanguageModel, given: str, site: str) -> list[int] | None:
    """The layers in "6", "4-7", "0,5" or "-1", None for "*"."""
    if given.strip() == "*":
        return None
    count, found = len(model.blocks), list[int]()
    for part in given.split(","):
        ends = re.fullmatch(r"\s*(-?\d{1,6})(?:\s*-\s*(-?\d{1,6}))?\s*", part)
        if ends is None:
            raise OptionError(
                f"{site!r} names no layers: write a number, '4-7', '0,5' or '*'.", here()
            )
        first = int(ends[1])
        last = int(ends[2] or ends[1])
        first, last = chosen("layer", [first], count)[0], chosen("layer", [last], count)[0]
        if last < first:
            raise OptionError(f"{site!r} names no layers: {part.strip()} ends below.", here())
        found += range(first, last + 1)
    return list(dict.fromkeys(found))
