"""Forms in which values of a run are shown by standard names, in recorded operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from insitu.graph.control import call_module
from insitu.graph.location import Mark
from insitu.graph.proxy import Proxy

if TYPE_CHECKING:
    from insitu.tracing.invocation import Invocation


class Form(Protocol):
    """How a value is shown.

    The form that is shown is a view of the value, so a write in place into it reaches the model.
    `Computed` forms are the exception.
    """

    def shown(self, value: Proxy, invocation: Invocation, line: Mark) -> Proxy:
        """Returns the value as it is shown.

        Args:
            value: the value, or its gradient.
            invocation: to whose processing it belongs.
            line: the user's line.
        """
        ...

    def restored(self, value: Any, site: Proxy, invocation: Invocation, line: Mark) -> Any:
        """Returns the value that is to stand at the site, for something else to be shown.

        Args:
            value: the value that is to be shown.
            site: what stands there.
            invocation: as of `shown`.
            line: as of `shown`.
        """
        ...


class Computed:
    """Marks a form in which something is shown that is computed beside the model.

    It is no ABC and no protocol: each read of a name asks `isinstance`, which takes longer there.

    Attributes:
        unwritable: why its gradient cannot be written, and what to write instead.
        gradient: gives the gradient of the shown form for that of the value at the site.
    """

    __slots__ = ()
    unwritable: ClassVar[str]
    gradient: Callable[[Proxy], Proxy]


@dataclass(frozen=True, slots=True)
class Swapped:
    """`(batch, position, head, size)` shown as `(batch, head, position, size)`."""

    def shown(self, value: Proxy, invocation: Invocation, line: Mark) -> Proxy:
        """Returns the value as it is shown."""
        return value.transpose(1, 2)

    def restored(self, value: Any, site: Proxy, invocation: Invocation, line: Mark) -> Any:
        """Returns the value that is to stand at the site."""
        return value.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Split:
    """`(batch, position, head * size)` shown as `(batch, head, position, size)`.

    Attributes:
        heads: how many heads there are.
    """

    heads: int

    def shown(self, value: Proxy, invocation: Invocation, line: Mark) -> Proxy:
        """Returns the value as it is shown."""
        return value.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def restored(self, value: Any, site: Proxy, invocation: Invocation, line: Mark) -> Any:
        """Returns the value that is to stand at the site."""
        return value.transpose(1, 2).flatten(2)


@dataclass(frozen=True, slots=True)
class Batched:
    """`(batch * head, query, key)` shown as `(batch, head, query, key)`.

    Attributes:
        heads: how many heads there are.
    """

    heads: int

    def shown(self, value: Proxy, invocation: Invocation, line: Mark) -> Proxy:
        """Returns the value as it is shown."""
        return value.unflatten(0, (-1, self.heads))

    def restored(self, value: Any, site: Proxy, invocation: Invocation, line: Mark) -> Any:
        """Returns the value that is to stand at the site."""
        return value.flatten(0, 1)


@dataclass(frozen=True, slots=True)
class Rows:
    """`(batch * position, size)` shown as `(batch, position, size)`.

    Attributes:
        block: the path of the block, whose input says how many rows and positions there are.
        size: the length of the last axis.
    """

    block: str
    size: int

    def shown(self, value: Proxy, invocation: Invocation, line: Mark) -> Proxy:
        """Returns the value as it is shown."""
        stream = invocation.read(self.block, "input", line)
        # Some models carry several streams: `(batch, position, stream, d_model)`.
        return value.view_as(stream.flatten(2)[..., :1].expand(-1, -1, self.size))

    def restored(self, value: Any, site: Proxy, invocation: Invocation, line: Mark) -> Any:
        """Returns the value that is to stand at the site."""
        return value.flatten(0, 1)


@dataclass(frozen=True, slots=True)
class WithoutLast:
    """`(batch, head, query, key + others)` shown without the others, which are no positions.

    Attributes:
        others: how many there are.
    """

    others: int

    def shown(self, value: Proxy, invocation: Invocation, line: Mark) -> Proxy:
        """Returns the value as it is shown."""
        return value[..., : -self.others]

    def restored(self, value: Any, site: Proxy, invocation: Invocation, line: Mark) -> Any:
        """Returns the value that is to stand at the site."""
        # The others stay as the model made them: nobody can see them to write them.
        others: Any = site[..., -self.others :]
        return torch.cat([value, others], dim=-1)


@dataclass(frozen=True, slots=True)
class Apart:
    """`(batch, position, head * size)` shown as `(batch, position, head, size)`.

    Attributes:
        heads: how many heads there are.
    """

    heads: int

    def shown(self, value: Proxy, invocation: Invocation, line: Mark) -> Proxy:
        """Returns the value as it is shown."""
        return value.unflatten(-1, (self.heads, -1))

    def restored(self, value: Any, site: Proxy, invocation: Invocation, line: Mark) -> Any:
        """Returns the value that is to stand at the site."""
        return value.flatten(2)


@dataclass(frozen=True, slots=True)
class PerHead(Computed):
    """What an output projection makes of each head alone, `(batch, head, position, d_model)`.

    The site is the projection's output. These are its summands, but for the bias.

    Attributes:
        path: the projection.
        call: which of its calls.
        heads: how many heads there are.
        axis: which axis is that of the heads: 2 for `(batch, position, head, d_model)`.
    """

    unwritable = "it is that of the sum of all heads. Write that of the block's `attention_out`."

    path: str
    call: int
    heads: int
    axis: int = 1

    def shown(self, value: Proxy, invocation: Invocation, line: Mark) -> Proxy:
        """Returns the value as it is shown."""
        z = invocation.read(self.path, "input", line, self.call)
        heads = z.unflatten(-1, (self.heads, -1)).transpose(-1, -2)
        # Each head beside zeros in the place of the others: (batch, position, head, head, size).
        apart = torch.diag_embed(heads).permute(0, 1, 3, 4, 2).flatten(-2)
        # The projection has its bias once, and would add it to each head.
        made = call_module(self.path, (apart,), {}, line) - self._bias(z, line)
        return made.movedim(2, self.axis)

    def restored(self, value: Any, site: Proxy, invocation: Invocation, line: Mark) -> Any:
        """Returns the value that is to stand at the site."""
        z = invocation.read(self.path, "input", line, self.call)
        return value.sum(self.axis) + self._bias(z, line)

    def gradient(self, value: Proxy) -> Proxy:
        """Returns the gradient of the sum, which is that of each summand."""
        heads = value.unsqueeze(self.axis)
        return heads.expand(-1, *(self.heads if axis == self.axis else -1 for axis in (1, 2)), -1)

    def _bias(self, z: Proxy, line: Mark) -> Any:
        first: Any = z[:1, :1]
        return call_module(self.path, (torch.zeros_like(first),), {}, line)
