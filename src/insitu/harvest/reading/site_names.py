"""Which site of a folder a name means: a label, or another spelling of a standard name."""

from __future__ import annotations

from collections.abc import Mapping

from insitu.graph.errors import NotCachedError, nearest
from insitu.graph.location import here
from insitu.harvest.specification import SiteSpecification
from insitu.models.keys import spelled

_GRADIENT = "grad."


def site_called(sites: Mapping[str, SiteSpecification], name: object) -> SiteSpecification:
    """Returns the site that a name means.

    Args:
        sites: the sites of a folder, by their labels.
        name: a label, such as "post:6", or what was asked for, such as "mlp.post:6".

    Raises:
        NotCachedError: if there is no such site.
    """
    if name in sites:
        return sites[str(name)]
    meant = _meant(str(name))
    for label, site in sites.items():
        if meant is not None and _meant(label) == meant:
            return site
    near = nearest(str(name), sites)
    raise NotCachedError(
        f"No site {name!r:.200} was harvested{near}: there are {', '.join(map(repr, sites))}.",
        here(),
    )


def _meant(name: str) -> tuple[bool, str, str] | None:
    """The key in a block and the layer of a standard name, and whether its gradient is meant."""
    key, _, layer = name.removeprefix(_GRADIENT).rpartition(":")
    found = spelled(key)
    return None if found is None else (name.startswith(_GRADIENT), found, layer)
