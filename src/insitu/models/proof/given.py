"""Which names a model is given: those that a proof holds for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from insitu.graph.errors import UnknownShapeError
from insitu.models.proof.outcome import Proof
from insitu.models.proof.remembered import key_of, merged, recall, remember
from insitu.models.proof.small import SmallModelError, quiet, random_copy, small_model
from insitu.models.samples import sample_call

if TYPE_CHECKING:
    from insitu.models.architectures import Description
    from insitu.models.body import Body
    from insitu.models.parts import Block
    from insitu.models.wrapped_module import WrappedModule

NAMES = (
    *("residual_in", "residual_mid", "residual_out", "block_out", "attention_out"),
    *(
        "cross_attention_out",
        "mixer_out",
        "extra_out",
        "mlp_out",
        "attention",
        "cross_attention",
        "mlp",
        "experts",
    ),
)
"""All names on a block that others hang on."""

_UNPROVEN = (
    "it could not be proven on a small model of this kind ({why}), and the weights are not there "
    "yet: call `model.load()` first."
)
_FAILED = "it could not be proven, because a small run of the model fails ({why})."


def prove(model: WrappedModule, description: Description) -> Proof:
    """Proves the names of a model: see `proof.py`, which is loaded only where a proof is made."""
    from insitu.models.proof import proof

    return proof.prove(model, description)


class Proofs:
    """The proofs of a model's names, made when they are first asked for.

    Args:
        body: what was found of the model's parts.
        wrap: makes a model of a module.
        recalling: whether what was proven before counts.
    """

    def __init__(
        self,
        body: Body,
        wrap: Callable[[nn.Module], WrappedModule],
        recalling: bool = True,
    ) -> None:
        self._body, self._wrap = body, wrap
        self._recalling = recalling
        self._known: Proof | None = None
        self._blocks: dict[str, Mapping[str, str]] = {}
        self._whole: Mapping[str, str] | None = None
        self._stacks: Mapping[str, int] = {}
        self._showing: Mapping[str, Any] | None = None
        self._failure = ""
        self._attempts: Iterator[Proof] | None = None

    def of_block(self, kind: str) -> Mapping[str, str] | str:
        """Returns why names of a block are refused, by name; or why none could be proven.

        Args:
            kind: the kind of the block: see `signature.py`.
        """
        while kind not in self._blocks and self._further():
            pass
        return self._blocks[kind] if kind in self._blocks else self._why_not()

    def applied(self, block: Block, kind: str) -> Block:
        """Returns a block without its refused names.

        Args:
            block: what was found of it.
            kind: as of `of_block`.
        """
        refused = self.of_block(kind)
        return block.without(dict.fromkeys(NAMES, refused) if isinstance(refused, str) else refused)

    def small(self) -> WrappedModule | str:
        """Returns a small random model of the class, with as many blocks; or why there is none."""
        try:
            return self._wrapped(None, narrow=True)
        except SmallModelError as error:
            return str(error)

    def of_whole(self) -> Mapping[str, str] | str:
        """Returns the same of the names of the model itself."""
        while self._whole is None and self._further():
            pass
        return self._why_not() if self._whole is None else self._whole

    def stack(self, name: str) -> int | str | None:
        """Returns which list of blocks has a name; why none has, None if there is none.

        Args:
            name: "blocks" or "encoder_blocks".
        """
        refused = self.of_whole()
        if isinstance(refused, str):
            return refused
        return self._stacks.get(name, refused.get(name))

    def showing(self) -> Mapping[str, Any] | None:
        """Returns with which options the model was proven, None if it was not."""
        self.of_whole()
        return self._showing

    def made(self) -> Proof | None:
        """Returns what was proven on small models, None if nothing was."""
        return self._known

    def _why_not(self) -> str:
        loaded = self._body.model.loaded
        why = self._failure or "no block of it computes as this one does"
        return (_FAILED if loaded else _UNPROVEN).format(why=why)

    def _further(self) -> bool:
        """Makes one more proof, and returns whether there was one more to make."""
        if self._attempts is None:
            self._attempts = self._made()
        try:
            proof = next(self._attempts, None)
        except BaseException:
            self._attempts = None  # it may be known later
            raise
        if proof is None:
            return False
        self._blocks = {**proof.blocks, **self._blocks}
        if self._whole is None:
            self._whole, self._stacks, self._showing = proof.whole, proof.stacks, proof.showing
        return True

    def _made(self) -> Iterator[Proof]:
        """Proofs on ever larger models, and on the model itself where its weights are there."""
        model = self._body.model
        key = key_of(model.module, model.modules, self._body.description)
        known = recall(key) if key is not None and self._recalling else None
        if known is not None:
            yield known
        least = self._depth()
        for depth, narrow in ((least, True), (None, True), (least, False)):
            try:
                proof = self._small(depth, narrow)
            except Exception as error:  # whatever a class makes of a config, or of a run
                self._fail(error)
                continue
            known = self._known = proof if known is None else merged(known, proof)
            if key is not None:
                remember(key, known)
            yield proof
        if not model.loaded:
            return
        for itself in (False, True):
            try:
                with quiet():
                    proof = prove(model, self._body.description) if itself else self._copied()
            except Exception as error:
                self._fail(error)
            else:
                yield proof  # not within `quiet`, which would silence the caller's warnings

    def _copied(self) -> Proof:
        """The proof on a copy of the model with random weights, as the model is now."""
        model = self._wrap(random_copy(self._body.model.module))
        return prove(model, self._body.description)

    def _small(self, depth: int | None, narrow: bool) -> Proof:
        small = self._wrapped(depth, narrow)
        with quiet():
            return prove(small, self._body.description)

    def _wrapped(self, depth: int | None, narrow: bool) -> WrappedModule:
        """A small model, whose own changes to its tree are done."""
        if not hasattr(type(self._body.model.module), "config_class"):
            raise SmallModelError("it has no config")
        with quiet():
            small = self._wrap(small_model(self._body.model.module, depth, narrow))
            call = sample_call(small.module, small.module.config)
            if call is not None:
                small.settle(call)
            return small

    def _depth(self) -> int:
        """How many blocks it takes to have one of each kind."""
        depth = 2
        try:
            kinds = self._body.kinds({})
        except UnknownShapeError:  # it runs with data only, and so does the small one
            return depth
        for stack in self._body.stacks:
            seen: set[str] = set()
            for number, path in enumerate(stack):
                kind = kinds.get(path, "")
                if kind not in seen:
                    seen.add(kind)
                    depth = max(depth, number + 1)
        return depth

    def _fail(self, error: Exception) -> None:
        said = next(iter(str(error).splitlines()), "")
        self._failure = f"{type(error).__name__}: {said}" if said else type(error).__name__
