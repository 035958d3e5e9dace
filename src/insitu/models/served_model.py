"""A model whose blocks can be run by a server, and tell of their tokens: `remote=`, `on_token=`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.models.model import Model
from insitu.models.weights_digest import have_other_values, weights_digest
from insitu.tracing.block import Block
from insitu.tracing.session import Session, session_of

if TYPE_CHECKING:
    from insitu.engine.events import TokensChosen
    from insitu.remote.away import Remote
    from insitu.tracing.away import Away
    from insitu.tracing.block_types import TransformerBlock
    from insitu.tracing.handle import Submodule
    from insitu.tracing.handles import Handles
    from insitu.tracing.tracer import Tracer


class ServedModel(Model):
    """A model whose blocks and sessions can be run by a server."""

    # What type checkers know of the standard names: a handle looks them up.
    blocks: Handles[TransformerBlock]
    """The blocks, in a model with two stacks the decoder's."""
    encoder_blocks: Handles[TransformerBlock]
    """The blocks of the encoder."""
    embedding: Submodule
    """The embedding of tokens."""
    final_norm: Submodule
    """The norm before the unembedding."""
    unembedding: Submodule
    """What makes logits."""

    def session(self, *, remote: Remote | None = None, **unknown: Any) -> Session:
        """Opens a context for several blocks: as of `Model`.

        Args:
            remote: the server that runs them, as one job; None for where the model is.
            unknown: nothing.

        Raises:
            OptionError: if it is given another option.
        """
        session = super().session(**unknown)
        if remote is not None:
            session.away = self._on_server(remote)
        return session

    def _on_server(self, remote: Remote) -> Away:
        """The model on a server, which has to be the one that is here."""
        from insitu.remote.away import away_at, away_for

        if self.away is not None:  # it has no weights but those of a server
            return away_at(remote, self._origin[0])
        if not self.loaded:
            return away_for(remote, self._origin[0], None)

        def differs(other: str) -> bool:
            # Each time: PyTorch does not count what is written through `weight.data`.
            return have_other_values(weights_digest(self._module), other)

        return away_for(remote, self._origin[0], differs)

    def _send_away(self, block: Block, remote: Remote | None, wait: bool) -> None:
        """Lets a block be run by a server."""
        if (remote is not None or not wait) and session_of(self) is not None:
            raise OptionError(
                "A block of a session runs with it, so that `remote` and `wait` mean nothing to "
                "it: write `model.session(remote=...)`.",
                here(),
            )
        if remote is not None:
            block.away = self._on_server(remote)
        if not wait and block.away is None and self.away is None:
            raise OptionError(
                "`wait=False` is for a block that a server runs: give `remote=` too.", here()
            )
        block.waits = wait

    def _streaming(self, block: Block, on_token: Callable[[TokensChosen], object]) -> Tracer:
        """A block that tells of the tokens of its generation as they come."""
        if session_of(self) is not None or not block.waits:
            instead = "`tracer.remote_job.events()` tells of them"
            if block.waits:
                instead = "write `with insitu.listening(function):` around the session"
            raise OptionError(
                f"`on_token` is for a block that runs when it ends, and this one does not: "
                f"{instead}.",
                here(),
            )
        if not callable(on_token):
            raise OptionError(f"`on_token` is a function, not {on_token!r:.100}.", here())
        from insitu.tracing.streaming import StreamingTracer  # of use only here

        return StreamingTracer(block, on_token)
