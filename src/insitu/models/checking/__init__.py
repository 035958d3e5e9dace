"""Whether a model is what it seems: found in a forward without data, verified in a run."""

from insitu.models.checking.verification import check

__all__ = ["check"]
