"""Descriptions of architectures, a file a family, by the `model_type` of their configs."""

from collections.abc import Mapping

from insitu.models.architectures import rwkv
from insitu.models.architectures.description import Description

_FAMILIES = (rwkv,)
DESCRIPTIONS: Mapping[str, Description] = {
    model_type: family.DESCRIPTION for family in _FAMILIES for model_type in family.MODEL_TYPES
}

__all__ = ["DESCRIPTIONS", "Description"]
