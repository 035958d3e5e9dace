"""Which nodes are known to give something other than a tensor or a number, such as a tuple.

Not all that do are: what a module returns, or a function of the user's, is seen in the run only.
"""

from __future__ import annotations

import torch

from insitu.graph.operations import BY_NAME, READ, Operation
from insitu.graph.recording import Recording


def is_structure(recording: Recording, index: int) -> bool:
    """Returns whether a node is known to give neither a tensor nor a number, which passes for one.

    Args:
        recording: where the node is.
        index: the node.
    """
    operation, args, kwargs, _, _, _ = recording.graph.rows[index]
    if operation is READ:
        if args[2] == "inputs":
            return True
    elif operation in _ALWAYS or (
        operation in _WITH_AXIS and ("dim" in kwargs or type(args[-1]) is int)
    ):
        return True
    if not recording.fakes:
        return False
    known = recording.fakes.get(index)
    return known is not None and not isinstance(known, torch.Tensor | bool | int | float | complex)


def _of_names(names: str) -> frozenset[Operation]:
    wanted = set(names.split())
    return frozenset(operation for operation in BY_NAME.values() if operation.short in wanted)


_ALWAYS = _of_names(
    """
    aminmax broadcast_tensors chunk cummax cummin dsplit eigh frexp histogram hsplit kthvalue lstsq
    meshgrid mode qr slogdet sort split split_with_sizes std_mean svd tensor_split tolist topk
    unbind unravel_index unsafe_chunk unsafe_split var_mean vsplit
    """
)
# A pair along an axis, and else one tensor: of all of a tensor, or of two (`torch.max(x, y)`).
_WITH_AXIS = _of_names("max median min nanmedian")
