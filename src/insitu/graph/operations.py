"""The registry: the explicit list of operations that can be recorded.

Every operation here reads its arguments and returns a value, or writes into the first of them. Some
draw random numbers, from the generator of the process in which they run and in the order in which
they run. Not in the list is what touches files or other global state, looks at storage or strides,
or returns uninitialised memory. A recorded operation may later travel to a process that trusts
nothing but this list.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional

from insitu.graph.bounds import (
    DIVIDING,
    OPERATORS,
    SHAPING,
    check_entries,
    divided,
    is_container,
    items,
    shaped,
)
from insitu.graph.called_modules import apart_from_weights, pulled_back
from insitu.graph.put import put
from insitu.graph.structure import attribute, copied, item, kept
from insitu.graph.writing import fitted, replaced, standing_in


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """An operation with the name under which it is recorded.

    Attributes:
        name: such as "torch.softmax", "Tensor.mean" or "operator.add".
        function: what computes it.
        in_place: whether it writes into its first argument, which it also returns.
        casts: whether `torch.autocast` may have something to do with it.
    """

    name: str
    function: Callable[..., Any]
    in_place: bool = False
    casts: bool = True

    @property
    def short(self) -> str:
        """The name's last part, as one would write it after a dot."""
        return self.name.rpartition(".")[2]


def _read(site: object) -> Any:
    raise AssertionError(f"{site} is filled by a pass, not computed")


def _apply(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = function(*args, **kwargs)
    if isinstance(function, torch.nn.Module):
        if is_container(result):
            check_entries(result)
        result = apart_from_weights(function, result)
    return result


def _cond(
    pred: Any, then: Callable[..., Any], otherwise: Callable[..., Any], *operands: Any
) -> Any:
    return then(*operands) if pred else otherwise(*operands)


def _fold(function: Callable[..., Any], carry: Any, xs: Any, *captured: Any) -> Any:
    with items(xs, function):
        for x in xs:
            carry = function(carry, x, *captured)
    return carry


def _gradient(value: torch.Tensor, backward: object = None) -> torch.Tensor:
    """Stands for the gradient of a value, maybe of one backward pass, while shapes are looked up.

    Args:
        value: the value.
        backward: what that pass returns.
    """
    return torch.empty_like(value)


def _backward(
    *losses: torch.Tensor,
    gradient: object = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Sequence[torch.Tensor] | None = None,
    accumulate: bool = True,
    allow_unused: bool = False,
    materialize_grads: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Stands for a backward pass while shapes are looked up.

    Args:
        *losses: where it starts.
        gradient: what it starts with, one for each loss; None where a loss is one number.
        retain_graph: as of `torch.autograd.grad`, and so are the other options.
        create_graph: as of `torch.autograd.grad`.
        inputs: weights of the model and tensors of the user's whose gradients it returns; None for
            none, and then the user's tensors that require gradients accumulate them.
        accumulate: whether the user's tensors among `inputs` accumulate them too.
        allow_unused: as of `torch.autograd.grad`.
        materialize_grads: as of `torch.autograd.grad`.
    """
    return tuple(map(torch.empty_like, inputs or ()))


def _put(base: Any, steps: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Returns a value with one part of it written in place; the value itself stays as it is.

    Args:
        base: a tensor, or a tuple, list or dictionary with tensors in it.
        steps: the views that lead to the part: `insitu.graph.put.Step`.
        name: the operation that writes in place.
        *args: its arguments behind the first one.
        **kwargs: its keyword arguments.
    """
    return put(base, steps, _taken(name, True), args, kwargs, _taken)


@cache
def put_into(same: int) -> Operation:
    """Returns what runs in the place of `PUT` where nobody else needs the copy of an earlier one.

    Args:
        same: how many of its first steps are those of the earlier one.
    """
    return Operation("put", partial(_put_into, same))


def _put_into(same: int, base: Any, steps: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:
    return put(base, steps, _taken(name, True), args, kwargs, _taken, reuse=same)


def _taken(name: str, in_place: bool = False) -> Callable[..., Any]:
    """Returns what computes an operation; bytes from anybody name no other function."""
    operation = BY_NAME.get(name)
    if operation is None or operation.in_place is not in_place:
        raise ValueError(f"{name!r} is no operation of a write")
    return operation.function


READ = Operation("read", _read)
PUT = Operation("put", _put)
SAVE = Operation("save", copied)
ATTRIBUTE = Operation("attribute", attribute, casts=False)
WRITE = Operation("write", fitted)
REPLACE = Operation("replace", replaced)
SKIP = Operation("skip", standing_in)
GRAD = Operation("grad", _gradient)
BACKWARD = Operation("backward", _backward)
KEEP = Operation("keep", kept)
INPUT = Operation("input", _read)
APPLY = Operation("apply", _apply)
PULL_BACK = Operation("pull_back", pulled_back)
COND = Operation("cond", _cond)
FOLD = Operation("fold", _fold)

_SPECIAL = (
    *(READ, SAVE, ATTRIBUTE, WRITE, REPLACE, SKIP, GRAD, BACKWARD, KEEP),
    *(INPUT, APPLY, PULL_BACK, COND, FOLD, PUT),
)

_OPERATORS = """
    abs add and_ eq floordiv ge getitem gt invert le lshift lt matmul mod mul ne neg or_ pos pow
    rshift sub truediv xor
"""

# What `torch.autocast` leaves alone on every device. That it is told apart saves looking: these are
# what is recorded most.
_NEVER_CAST = """
    abs add and_ argmax argmin chunk clamp clone contiguous detach eq expand flatten flip float
    floordiv ge getitem gt invert item le lt masked_fill max mean min mod mul ne neg or_
    permute pos relu repeat reshape rshift lshift select size split squeeze sub to transpose truediv
    unbind unsqueeze view where xor zeros_like
"""

# Of `torch` and of `torch.Tensor` alike.
_SHARED = """
    abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr adjoint all allclose
    amax amin aminmax angle any arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax
    argmin argsort argwhere asin asinh atan atan2 atanh baddbmm bincount bitwise_and
    bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bmm broadcast_to
    ceil cholesky_inverse chunk clamp clamp_max clamp_min clip clone conj conj_physical copysign
    corrcoef cos cosh count_nonzero cov cross cummax cummin cumprod cumsum deg2rad det detach
    diag diag_embed diagflat diagonal diagonal_scatter diff digamma dist div divide dot dsplit
    eq equal erf erfc erfinv exp exp2 expm1 fix flatten flip fliplr flipud float_power floor
    floor_divide fmax fmin fmod frac frexp gather gcd ge greater greater_equal gt hardshrink
    heaviside histc hsplit hypot i0 igamma igammac imag index_add index_copy index_fill
    index_put index_reduce index_select inner inverse is_complex is_floating_point isclose
    isfinite isinf isnan isneginf isposinf isreal kron kthvalue lcm ldexp le lerp less
    less_equal lgamma log log10 log1p log2 log_softmax logaddexp logaddexp2 logcumsumexp logdet
    logical_and logical_not logical_or logical_xor logit logsumexp lt masked_fill masked_scatter
    masked_select matmul matrix_exp matrix_power max maximum mean median min minimum mm mode
    moveaxis movedim msort mul multiply mv mvlgamma nan_to_num nanmean nanmedian nanquantile
    nansum narrow ne neg negative nextafter nonzero norm not_equal numel orgqr outer permute
    pinverse polygamma positive pow prelu prod quantile rad2deg ravel real reciprocal relu
    remainder renorm repeat_interleave reshape roll rot90 round rsqrt scatter scatter_add
    scatter_reduce select select_scatter sgn sigmoid sign signbit sin sinc sinh slice_scatter
    slogdet softmax sort split split_with_sizes sqrt square squeeze std sub subtract sum
    swapaxes swapdims t take take_along_dim tan tanh tensor_split tile topk trace transpose tril
    triu true_divide trunc unbind unflatten unique_consecutive unsqueeze var vdot vsplit where
    xlogy
"""

_TORCH = """
    atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors bucketize cartesian_prod cat
    channel_shuffle
    cdist celu column_stack combinations complex concat concatenate constant_pad_nd
    cosine_similarity cumulative_trapezoid dstack einsum full_like gradient hstack isin meshgrid
    narrow_copy ones_like pairwise_distance polar row_stack searchsorted selu stack std_mean
    tensordot trapezoid trapz tril_indices unravel_index var_mean view_as_complex view_as_real
    vstack zeros_like
"""

_TENSOR = """
    bfloat16 bool byte char contiguous cpu cuda dim double element_size expand expand_as float half
    int is_signed item long ndimension nelement new_full new_ones new_zeros repeat reshape_as short
    size sum_to_size to tolist type_as unfold unique view view_as
"""

_FUNCTIONAL = """
    adaptive_avg_pool1d adaptive_avg_pool2d avg_pool1d avg_pool2d binary_cross_entropy
    binary_cross_entropy_with_logits celu conv1d conv2d cosine_embedding_loss cosine_similarity
    cross_entropy elu gaussian_nll_loss gelu glu group_norm hardshrink hardsigmoid hardswish
    hardtanh hinge_embedding_loss huber_loss interpolate kl_div l1_loss layer_norm leaky_relu linear
    local_response_norm log_softmax logsigmoid margin_ranking_loss max_pool1d max_pool2d mish
    mse_loss multi_margin_loss multilabel_margin_loss nll_loss normalize one_hot pad
    pairwise_distance pixel_shuffle pixel_unshuffle poisson_nll_loss prelu relu relu6 rms_norm
    scaled_dot_product_attention selu sigmoid silu smooth_l1_loss soft_margin_loss softmax softmin
    softplus softshrink softsign tanh tanhshrink threshold triplet_margin_loss unfold
"""

# What draws random numbers, of `torch` and of `torch.Tensor` alike, of one of them, and in place.
_RANDOM_SHARED = "bernoulli multinomial"
_RANDOM_TORCH = """
    alpha_dropout binomial dropout feature_alpha_dropout feature_dropout normal poisson rand_like
    randint_like randn_like rrelu
"""
_RANDOM_FUNCTIONAL = """
    alpha_dropout dropout dropout1d dropout2d dropout3d feature_alpha_dropout
    fractional_max_pool2d fractional_max_pool3d gumbel_softmax rrelu
"""
_RANDOM_IN_PLACE = "bernoulli cauchy exponential geometric log_normal normal random uniform"

# What the modules of `torch.nn` call; some draw random numbers in training mode.
_LAYERS = """
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d affine_grid
    avg_pool3d batch_norm bilinear conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    cosine_embedding_loss ctc_loss embedding embedding_bag fold grid_sample instance_norm lp_pool1d
    lp_pool2d lp_pool3d max_pool3d max_unpool1d max_unpool2d max_unpool3d
    multi_head_attention_forward multilabel_soft_margin_loss pdist upsample
"""

_LINALG = """
    cholesky cross det diagonal eigh eigvalsh inv lstsq matmul matrix_norm matrix_power matrix_rank
    multi_dot norm pinv qr slogdet solve svd svdvals vander vecdot vector_norm
"""


# Writes into the first argument: what `torch.Tensor` has of these names with an underscore.
_IN_PLACE = """
    abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr arccos arccosh arcsin
    arcsinh arctan arctan2 arctanh asin asinh atan atan2 atanh baddbmm bitwise_and
    bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil clamp clamp_max
    clamp_min clip conj_physical copy copysign cos cosh cumprod cumsum deg2rad digamma div divide
    eq erf erfc erfinv exp exp2 expm1 fill fill_diagonal fix float_power floor floor_divide fmod
    frac gcd ge greater greater_equal gt heaviside hypot i0 igamma igammac index_add index_copy
    index_fill index_put index_reduce lcm ldexp le lerp less less_equal lgamma log log10 log1p log2
    logical_and logical_not logical_or logical_xor logit lt masked_fill masked_scatter mul multiply
    mvlgamma nan_to_num ne neg negative nextafter not_equal polygamma pow rad2deg reciprocal relu
    remainder renorm round rsqrt scatter scatter_add scatter_reduce sgn sigmoid sign sin sinc sinh
    sqrt square sub subtract tan tanh tril triu true_divide trunc xlogy zero
"""
_AUGMENTED = "iadd iand ifloordiv ilshift imod imul ior ipow irshift isub itruediv ixor setitem"


def _set(target: Any, key: Any, value: Any) -> Any:
    """Does `target[key] = value` and returns the target."""
    if not isinstance(target, torch.Tensor):
        raise TypeError(
            f"a {type(target).__name__} cannot be written to: assign a whole new one to its site"
        )
    target[key] = value
    return target


def _writing() -> dict[str, Operation]:
    """Operations that write in place."""
    listed = {
        f"operator.{name}": Operation(f"operator.{name}", getattr(operator, name), True, False)
        for name in _AUGMENTED.split()
    }
    listed["operator.setitem"] = Operation("operator.setitem", _set, True)
    for name in (_IN_PLACE + _RANDOM_IN_PLACE).split():
        if hasattr(torch.Tensor, f"{name}_"):
            full = f"Tensor.{name}_"
            listed[full] = Operation(full, getattr(torch.Tensor, f"{name}_"), True)
        if hasattr(torch, f"{name}_"):
            full = f"torch.{name}_"
            listed[full] = Operation(full, getattr(torch, f"{name}_"), True)
    return listed


def _listed(prefix: str, namespace: Any, names: str) -> dict[str, Operation]:
    """Operations of one namespace.

    Names that the installed torch does not have, or that are no functions there, are left out.
    """
    never_cast = _NEVER_CAST.split()
    listed: dict[str, Operation] = {}
    for name in names.split():
        function = getattr(namespace, name, None)
        if not callable(function):
            continue
        if namespace is operator:
            function = item if name == "getitem" else OPERATORS.get(name, function)
        elif name in DIVIDING:
            function = divided(name, function)
        elif name in SHAPING:
            function = shaped(function)
        full = f"{prefix}.{name}"
        listed[full] = Operation(full, function, casts=name not in never_cast)
    return listed


BY_NAME: Mapping[str, Operation] = MappingProxyType(
    {operation.name: operation for operation in _SPECIAL}
    | _listed("operator", operator, _OPERATORS)
    | _listed("torch", torch, _SHARED + _TORCH + _RANDOM_SHARED + " " + _RANDOM_TORCH)
    | _listed("Tensor", torch.Tensor, _SHARED + _TENSOR + _RANDOM_SHARED)
    | _listed("functional", torch.nn.functional, _FUNCTIONAL + _RANDOM_FUNCTIONAL + _LAYERS)
    | _listed("linalg", torch.linalg, _LINALG)
    | _writing()
)

TENSOR_METHODS: tuple[Operation, ...] = tuple(
    operation for name, operation in BY_NAME.items() if name.startswith("Tensor.")
)

# A tensor on the left of an operator hands over under the name of its own method.
_OPERATOR_METHODS = {
    getattr(torch.Tensor, f"__{name.strip('_')}__"): BY_NAME[f"operator.{name}"]
    for name in _OPERATORS.split()
    if hasattr(torch.Tensor, f"__{name.strip('_')}__")
}

ARITHMETIC: frozenset[Operation] = frozenset(
    operation
    for operation in BY_NAME.values()
    if operation.short in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow")
)
"""What makes, of a tensor and a number, a tensor in memory of its own."""

_DRAWING = frozenset(
    [
        *f"{_RANDOM_SHARED} {_RANDOM_TORCH} {_RANDOM_FUNCTIONAL}".split(),
        *(f"{name}_" for name in _RANDOM_IN_PLACE.split()),
    ]
)

RANDOM = frozenset(name for name in BY_NAME if name.rpartition(".")[2] in _DRAWING)
"""The names of the operations that draw random numbers."""

GETITEM = BY_NAME["operator.getitem"]
SETITEM = BY_NAME["operator.setitem"]
COPY = BY_NAME["Tensor.copy_"]


def unbounded(operation: Operation) -> Callable[..., Any]:
    """Returns what an operation is outside of runs, where values may be of any size.

    Args:
        operation: the operation.
    """
    name = operation.short
    if operation.name.startswith("operator.") and (name in OPERATORS or operation is GETITEM):
        return getattr(operator, name)
    return getattr(operation.function, "__wrapped__", operation.function)


BY_FUNCTION: Mapping[Callable[..., Any], Operation] = MappingProxyType(
    _OPERATOR_METHODS | {unbounded(operation): operation for operation in BY_NAME.values()}
)
