"""What checkers and editors know of the modules of a model: their sites, and their standard names.

`model.blocks[3]` is a `TransformerBlock` to them, and `model.blocks[3].attention` an `Attention`.
These declare names; what a name gives is looked up by a `Handle`, which is what all of them are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from insitu.tracing.sites import Call

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import overload

    import torch
    from torch import nn

    from insitu.graph.proxy import Proxy
    from insitu.tracing.inside import Operations

    class NamedSite:
        """A standard name for a site: it is read as a proxy, and any value may be assigned."""

        @overload
        def __get__(self, instance: None, owner: object) -> NamedSite: ...
        @overload
        def __get__(self, instance: object, owner: object) -> Proxy: ...
        def __get__(self, instance: object, owner: object) -> Any: ...
        def __set__(self, instance: object, value: Any) -> None: ...


class ModuleSites(Call):
    """What the handle of every module has, also of one that stands for a part of a block."""

    if TYPE_CHECKING:

        @property
        def path(self) -> str:
            """The dotted path of the module in the tree."""
            ...

        @property
        def module(self) -> nn.Module:
            """The module itself: on the meta device until the weights are loaded."""
            ...

        @property
        def ops(self) -> Operations:
            """The torch functions that the module's own forward calls."""
            ...

        @property
        def role(self) -> Any:
            """The standard names of the module, also those that a child of its own is called by."""
            ...

        def call(self, number: int) -> Call:
            """Returns one call of a module that runs several times in a forward."""
            ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Applies the module to values of the run, outside of the model's flow."""
            ...

        def __getitem__(self, key: Any, /) -> Any: ...
        def __len__(self) -> int: ...
        def __iter__(self) -> Iterator[Any]: ...


class Attention(ModuleSites):
    """An attention: `model.blocks[3].attention`, or `cross_attention`.

    The names stand for values of a run, and those of weights for tensors. The modules in it, by the
    names that the architecture gives them, are its items: `attention["c_proj"]`.
    """

    q: NamedSite
    """Queries as they meet the keys, `(batch, head, position, d_head)`."""
    k: NamedSite
    """Keys, `(batch, key's head, position, d_head)`."""
    v: NamedSite
    """Values, `(batch, key's head, position, d_head)`."""
    scores: NamedSite
    """The input of the softmax, `(batch, head, query, key)`."""
    pattern: NamedSite
    """The output of the softmax, `(batch, head, query, key)`."""
    z: NamedSite
    """The output of each head, before the output projection: `(batch, head, position, d_head)`."""
    result: NamedSite
    """The output projection, applied to each head alone: `(batch, head, position, d_model)`."""
    W_Q: torch.Tensor
    """Weights, `(head, d_model, d_head)`."""
    W_K: torch.Tensor
    """Weights, `(key's head, d_model, d_head)`."""
    W_V: torch.Tensor
    """Weights, `(key's head, d_model, d_head)`."""
    W_O: torch.Tensor
    """Weights of the output projection, `(head, d_head, d_model)`."""


class Experts(ModuleSites):
    """The experts of a block: `model.blocks[3].experts`."""

    router: NamedSite
    """The scores of all experts, `(batch, position, expert)`."""
    weights: NamedSite
    """The weights of the chosen experts, `(batch, position, chosen)`."""


class MLP(Experts):
    """The MLP of a block: `model.blocks[3].mlp`. If it consists of experts, it has their names."""

    pre: NamedSite
    """The input of the nonlinearity, `(batch, position, d_mlp)`."""
    post: NamedSite
    """The input of the last layer, `(batch, position, d_mlp)`."""
    W_in: torch.Tensor
    """Weights, `(d_model, d_mlp)`."""
    W_gate: torch.Tensor
    """Weights of the gate, `(d_model, d_mlp)`."""
    W_out: torch.Tensor
    """Weights of the last layer, `(d_mlp, d_model)`."""


class TransformerBlock(ModuleSites):
    """A transformer block, or a layer of another kind: `model.blocks[3]`.

    Not every block has every name: an error says why one is missing. The modules in it, by the
    names that the architecture gives them, are its items: `block["self_attn"]`.
    """

    residual_in: NamedSite
    """The residual stream before the block, `(batch, position, d_model)`."""
    residual_mid: NamedSite
    """The residual stream between attention and MLP, `(batch, position, d_model)`."""
    residual_out: NamedSite
    """The residual stream after the block, `(batch, position, d_model)`."""
    block_out: NamedSite
    """The hidden states that the block returns, `(batch, position, d_model)`."""
    attention_out: NamedSite
    """The output of the attention, as it is added: `(batch, position, d_model)`."""
    cross_attention_out: NamedSite
    """The output of the attention to an encoder, as it is added: `(batch, position, d_model)`."""
    mlp_out: NamedSite
    """The output of the MLP, as it is added: `(batch, position, d_model)`."""
    mixer_out: NamedSite
    """The output of a state-space layer, as it is added: `(batch, position, d_model)`."""
    extra_out: NamedSite
    """Further additions behind the MLP, `(batch, position, d_model)`."""

    if TYPE_CHECKING:

        @property
        def attention(self) -> Attention:
            """The attention to the positions of the prompt.

            A child that the architecture calls so comes first: see `role`.
            """
            ...

        @property
        def cross_attention(self) -> Attention:
            """The attention to the states of an encoder."""
            ...

        @property
        def mlp(self) -> MLP:
            """The MLP."""
            ...

        @property
        def experts(self) -> Experts:
            """The experts."""
            ...

        @property
        def norm_1(self) -> ModuleSites:
            """The first norm."""
            ...

        @property
        def norm_2(self) -> ModuleSites:
            """The last norm."""
            ...


class ModelNames:
    """The standard names of a whole model of Transformers: `model.logits`."""

    logits: NamedSite
    """The logits, `(batch, position, vocabulary)`."""
    W_E: torch.Tensor
    """The embedding of tokens, `(vocabulary, d_model)`."""
    W_U: torch.Tensor
    """The weights of the unembedding, `(d_model, vocabulary)`."""
    n_layers: int
    """How many blocks there are."""
    n_heads: int
    """How many heads an attention has."""
    d_model: int
    """The width of the residual stream."""
    d_head: int
    """The width of a head."""
    d_mlp: int
    """The width of an MLP between its layers."""
    vocab_size: int
    """How many tokens there are."""
