"""What the parts of a model's blocks are."""

from insitu.models.anatomy.block import block_of
from insitu.models.anatomy.reading import Reading

__all__ = ["Reading", "block_of"]
