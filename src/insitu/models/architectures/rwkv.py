"""RWKV: the first block norms what the embedding gives, and its residual stream begins there."""

from insitu.models.architectures.description import Description

MODEL_TYPES = ("rwkv",)
DESCRIPTION = Description(begins="pre_ln")
