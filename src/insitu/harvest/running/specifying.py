"""From what a harvest was asked for to its specification, and to how it is run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import msgspec
import torch
import transformers

from insitu.about import installed_version
from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import here
from insitu.harvest.data.documents import Documents
from insitu.harvest.data.given_data import documents_of
from insitu.harvest.data.sequences import Cutting
from insitu.harvest.data.tokenising import Tokenising, tokenising_of
from insitu.harvest.folder.shard_file import DTYPES, bytes_of
from insitu.harvest.running.batch import Taking, check_reduction, keeps_rows_apart
from insitu.harvest.running.metrics import Metric, metric_of
from insitu.harvest.running.shapes import shapes_of
from insitu.harvest.running.sites import AnySite, HarvestSite, sites_of
from insitu.harvest.specification import Reduction, SiteSpecification, Specification
from insitu.methods.sae import SparseAutoencoder
from insitu.models.fingerprints import described, structure_of
from insitu.models.language_model import LanguageModel
from insitu.models.weights_digest import weights_digest

_CONTEXT = 128
_BATCH_TOKENS = {"cpu": 2048, "remote": 2048}
_LARGE_BATCH_TOKENS = 16_384  # of an accelerator, which is idle with fewer
_SHARD_BYTES = 256 * 2**20
_SHARD_TOKENS = 1 << 16  # more than that is lost too much of when a process is killed


@dataclass(frozen=True, slots=True)
class Options:
    """What a harvest was asked for, beside model, data and sites: arguments of `harvest`."""

    tokens: int | None = None
    dtype: str | torch.dtype | None = None
    context: int | None = None
    pack: bool = False
    reduce: Any = None
    split: str | None = None
    column: str | None = None
    revision: str | None = None
    stream: bool = False
    bos: bool | None = None
    separator: int | bool | None = None
    batch_tokens: int | None = None
    shard_tokens: int | None = None
    max_skipped: float = 0.001
    metric: Metric | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """A harvest that is ready to run.

    Attributes:
        specification: what its numbers depend on.
        documents: the data.
        tokenising: how it becomes token ids.
        cutting: how these become sequences.
        taking: runs a forward and keeps its values.
        max_skipped: which share of documents may be skipped.
    """

    specification: Specification
    documents: Documents
    tokenising: Tokenising
    cutting: Cutting
    taking: Taking
    max_skipped: float


def ordered(
    model: LanguageModel, data: Any, sites: AnySite | Sequence[AnySite], options: Options
) -> Order:
    """Returns a harvest that is ready to run. Weights are loaded.

    Args:
        model: the model.
        data: the data.
        sites: the sites.
        options: the rest.

    Raises:
        InsituError: if one of them is wrong, with the reason.
    """
    _check_numbers(model, options)
    context = options.context or min(_CONTEXT, model.traits.reader.limits.context or _CONTEXT)
    reduce, metric = check_reduction(options.reduce), metric_of(options.metric)
    found = sites_of(model, sites)
    if any(site.gradient for site in found) != (metric is not None):
        raise OptionError(
            "Sites such as 'grad.residual_out:6' are gradients of a metric: they and `metric=` "
            "go together. `metric='loss'` is that of next tokens.",
            here(),
        )
    if options.metric == "loss" and not _predicts_next(model):
        raise OptionError(
            "The model looks ahead, so there is no loss of next tokens: give a metric of your own.",
            here(),
        )
    documents = documents_of(data, options.split, options.column, options.revision, options.stream)
    tokenising = tokenising_of(model, options.pack, options.bos, options.separator)
    if tokenising.bos is not None and context == 1:
        raise OptionError(
            "`context` is 1, and each sequence begins with the model's first token: that leaves no "
            "place for another. Give a longer context, or `bos=False`.",
            here(),
        )
    if model.is_training:
        raise OptionError(
            "The model is in training mode, so that its values are drawn at random: call "
            "`model.load().eval()` first.",
            here(),
        )
    away = model.away is not None
    if not away:
        model.load()
    shapes = shapes_of(model, found)
    stored = {
        site.label: _stored(options.dtype, site, shapes[site.label][1], reduce) for site in found
    }
    sites_told = tuple(
        _told(site, shapes[site.label], stored[site.label], metric) for site in found
    )
    device = "remote" if away else model.device.type
    row_bytes = sum(_bytes(site) for site in sites_told)
    by_size = 1 << max(10, (_SHARD_BYTES // max(row_bytes, 1)).bit_length() - 1)
    specification = Specification(
        model=_job_model(model).name or type(model.module).__name__,
        model_fingerprint=_fingerprint(model),
        tokenizer=tokenising.digest,
        data=documents.specification,
        sites=sites_told,
        context=context,
        pack=options.pack,
        bos=tokenising.bos is not None,
        separator=tokenising.separator,
        reduce=reduce,
        tokens=options.tokens,
        batch_tokens=options.batch_tokens or _BATCH_TOKENS.get(device, _LARGE_BATCH_TOKENS),
        shard_tokens=options.shard_tokens or min(_SHARD_TOKENS, by_size),
        insitu=installed_version(),
        torch=str(torch.__version__),
        transformers=transformers.__version__,
        device=device,
    )
    apart = away or not keeps_rows_apart(model, found)
    function = None if metric is None else metric[0]
    taking = Taking(model, found, stored, reduce, function, specification.batch_tokens, apart)
    cutting = Cutting(context, options.pack, tokenising.bos, tokenising.separator)
    return Order(specification, documents, tokenising, cutting, taking, options.max_skipped)


def row_bytes(specification: Specification) -> int:
    """Returns how many bytes a row has in a shard, with where it comes from.

    Args:
        specification: of the harvest.
    """
    return 24 + sum(map(_bytes, specification.sites))  # two int32 and two int64


def _check_numbers(model: LanguageModel, options: Options) -> None:
    if not isinstance(model, LanguageModel):
        raise OptionError(
            f"A harvest takes a `LanguageModel`, not a {type(model).__name__}.", here()
        )
    for name in ("tokens", "context", "batch_tokens", "shard_tokens"):
        value = getattr(options, name)
        if value is not None and (type(value) is not int or value < 1):
            raise OptionError(f"`{name}` is a number of at least 1, not {value!r}.", here())
    limit = model.traits.reader.limits.context
    if limit is not None and (options.context or 0) > limit:
        raise OptionError(
            f"`context={options.context}` is more than the {limit} positions of the model.", here()
        )
    if not 0 <= options.max_skipped <= 1:
        raise OptionError(
            f"`max_skipped` is a share from 0 to 1, not {options.max_skipped}.", here()
        )


def _stored(
    given: str | torch.dtype | None, site: HarvestSite, own: torch.dtype, reduce: Reduction
) -> torch.dtype:
    """The dtype in which values of a site are stored: integers stay what they are."""
    own = own if site.sae is None else site.sae.weights["W_enc"].dtype
    if reduce == "mean" and not (own.is_floating_point or own.is_complex):
        own = torch.float32  # a mean of integers is none
    if own not in DTYPES and (given is None or not own.is_floating_point):
        name = str(own).removeprefix("torch.")
        raise OptionError(
            f"Values of {site.label!r} are {name}, which a folder cannot hold.", here()
        )
    if given is None or not own.is_floating_point:
        return own
    name = str(given).removeprefix("torch.")
    dtype = getattr(torch, name, None)
    floating = ("float32", "bfloat16", "float16", "float64")
    if not isinstance(dtype, torch.dtype) or name not in floating:
        raise OptionError(
            f"There is no dtype {name!r} of activations{nearest(name, floating)}: write float32, "
            "bfloat16 or float16.",
            here(),
        )
    return dtype


def _told(
    site: HarvestSite,
    seen: tuple[tuple[int, ...], torch.dtype],
    stored: torch.dtype,
    metric: tuple[Any, str] | None,
) -> SiteSpecification:
    shape, own = seen
    return SiteSpecification(
        label=site.label,
        shape=shape if site.sae is None else (site.k,),
        dtype=str(stored).removeprefix("torch."),
        model_dtype=str(own).removeprefix("torch."),
        features=None if site.sae is None else site.sae.n_features,
        dictionary=None if site.sae is None else _dictionary(site.sae),
        metric=metric[1] if site.gradient and metric is not None else None,
    )


def _bytes(site: SiteSpecification) -> int:
    """How many bytes a row of a site has."""
    size = prod(site.shape) * getattr(torch, site.dtype).itemsize
    return size if site.features is None else size + 4 * prod(site.shape)


def _predicts_next(model: LanguageModel) -> bool:
    """Whether logits are of the next token."""
    heads = ("ForMaskedLM", "ForPreTraining")
    return not (model.traits.is_encoder_decoder or type(model.module).__name__.endswith(heads))


def _job_model(model: LanguageModel) -> Any:
    return described(model, model._origin, structure_of(model))


def _fingerprint(model: LanguageModel) -> str:
    """The digest of a model's structure, of its edits, and of its weights where they are here."""
    told = _job_model(model)
    digest = hashlib.sha256(msgspec.json.encode([told.edits, told.fingerprint]))
    if model.away is None:
        digest.update(weights_digest(model.module, whole=True).encode())
    return digest.hexdigest()


def _dictionary(sae: SparseAutoencoder) -> str:
    """The digest of a sparse autoencoder."""
    kind = [sae.architecture, sae.centred, sae.normalisation, sae.k, sae.by_norm]
    digest = hashlib.sha256(repr(kind).encode())
    for name, weight in sorted(sae.weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(bytes_of(weight.detach().cpu().contiguous()))
    return digest.hexdigest()
