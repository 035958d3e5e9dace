"""Blocks as the user holds them: what `model.trace()` and `model.generate()` give.

A tracer gives names to what a block has: its prompts, steps, output, plan and job. How it is
entered, recorded and run is in `block.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from insitu.batching.procedure import Subject
from insitu.batching.summary import Planned
from insitu.graph.errors import BlockError, InsituError, NoValueError, PathError
from insitu.graph.given import copied
from insitu.graph.location import here, mark
from insitu.graph.node import EVERY, Graph
from insitu.graph.tracebacks import shortened
from insitu.habits import OF_BLOCKS, habit
from insitu.tracing.block import Block, BlockContext
from insitu.tracing.invocation import Invocation, innermost
from insitu.tracing.planning import explained
from insitu.tracing.session import Session
from insitu.tracing.steps import AtStep, Logits, StepPicker, Tokens, each_step, next_step

if TYPE_CHECKING:
    from insitu.engine.job import Job

_INTERNAL = frozenset(["block", "is_open", "only_invocation"])
"""What other parts of Insitu use of a tracer; not in `dir`."""


def _is_sent(block: Block) -> bool:
    """Whether a block has ended and a server runs it."""
    session = block.recording.session
    of_session = session.away if isinstance(session, Session) else None
    away = block.away or block.model.away or of_session
    return block.ran is not None and not block.is_dry and away is not None


class Tracer(BlockContext):
    """A block of recorded lines."""

    if not TYPE_CHECKING:  # to checkers, what is not declared is not there

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            there = [own for own in dir(type(self)) if not own.startswith("_")]
            raise PathError(f"A block has no `{name}`{habit(name, OF_BLOCKS, there)}.", here())

    def __getitem__(self, key: object) -> NoReturn:
        raise BlockError(
            "A block is no output: write `with model.generate(prompt) as generator:`, and after it "
            "`generator.output`.",
            here(),
        )

    @property
    def model(self) -> Subject:
        """The model that will run."""
        return self.block.model

    @property
    def graph(self) -> Graph:
        """The recorded graph."""
        return self.block.recording.graph

    @property
    def is_open(self) -> bool:
        """Whether the `with` block is being executed."""
        return self.block.is_open

    def __repr__(self) -> str:
        block, nodes = self.block, len(self.graph)
        if block.ran is not None and block.ran.passes:
            return f"<Block that ran: {nodes} nodes, {len(block.ran.passes)} passes>"
        if _is_sent(block):
            return f"<Block that was sent to a server: {nodes} nodes>"
        if block.is_open or block.is_done:
            return f"<Block that {'is open' if block.is_open else 'did not run'}: {nodes} nodes>"
        generates = block.promises_output
        name, tracer = ("generate", "generator") if generates else ("trace", "tracer")
        return (
            f"<Block that was not entered, so nothing has run: write "
            f"`with model.{name}(prompt) as {tracer}:`, and lines in it>"
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__()} - _INTERNAL)

    @property
    def job(self) -> Job:
        """The block as data: all that another process needs to run it on such a model.

        There once the block has ended. Tensors are taken as they are now.

        Raises:
            BlockError: while the block is open, if it has raised, or if it uses values of earlier
                blocks of its session, whose job is `session.job`.
        """
        return self.block.job

    @property
    def remote_job(self) -> Any:
        """The job that the block has sent to a server, with `wait=False`: a `RemoteJob`.

        Raises:
            NoValueError: if it has sent none.
        """
        sent = self.block.sent
        if sent is None:
            raise NoValueError(
                "The block has sent no job: with `remote=` and `wait=False` it does, when it ends.",
                here(),
            )
        return sent

    @property
    def plan(self) -> Planned:
        """How the block ran: its passes, and what each of them left out.

        Raises:
            NoValueError: before the block has ended, and if a server ran it.
        """
        ran = self.block.ran
        if ran is None or not ran.passes:
            raise NoValueError(f"`tracer.plan` {self._why_no_plan()}.", here())
        return explained(ran)

    def _why_no_plan(self) -> str:
        """Why there is no plan, as the end of a sentence."""
        block = self.block
        if block.raised is not None:
            return f"is not there: the block raised {block.raised}, so nothing was planned"
        if _is_sent(block):
            return (
                "stays on the server that ran the block. `model.scan` with the same lines plans "
                "them here, and `Connection(url).plan(tracer.job)` asks the server"
            )
        if block.ran is not None:
            return "is not there: the run failed before it was planned"
        return f"is made when the {'session' if block.is_done else 'block'} ends"

    def invoke(self, *args: Any, **kwargs: Any) -> Invocation:
        """Adds a prompt, and gives the context in which sites mean its values.

        Args:
            args: the prompt, in any form that the model takes.
            kwargs: options for this prompt.

        Raises:
            PromptError: if the model cannot process the prompt.
            PromptTypeError: if it is no prompt.
            BlockError: outside of the block, or where the block was given a prompt itself.
        """
        block = self.block
        if block.prompt is not None or not block.is_open:
            raise BlockError(
                "`invoke` belongs inside its block: write `with model.trace() as tracer:` first."
                if block.prompt is None
                else "This block was given its prompt already: give it none, and each prompt to an "
                "`invoke`.",
                here(),
            )
        if block.in_steps:
            raise BlockError(
                "An invocation that begins among lines of a step would mean another step itself: "
                "say which step lines mean inside of the invocation, "
                "`with generator.invoke(prompt) as invoker:` and `with invoker.step(1):`.",
                here(),
            )
        try:
            return block.add(*copied(args, kwargs), mark())
        except InsituError as error:
            shortened(error)
            raise

    @property
    def output(self) -> Any:
        """What the model returned.

        In a generation, what one `generate` of the model on all prompts returns: token ids
        `(rows, position)`, there once the model has run. In a trace a proxy, as `invoker.output`.

        Raises:
            NoValueError: in a generation, before the model has run.
            BlockError: in a trace, outside of the invocations of a block that has its prompts in
                them.
        """
        block = self.block
        if not block.promises_output:
            if block.is_done:
                raise BlockError(
                    "`tracer.output` is a value of the run: read and save it inside the block.",
                    here(),
                )
            return self.only_invocation().output
        ran = block.ran
        if ran is None or ran.outputs is None or ran.outputs.whole is None:
            reason = "its run failed" if block.is_done else "the model runs when the block ends"
            if not (block.is_done or block.is_open):
                reason = (
                    "its block was never entered: write `with model.generate(...) as generator:`"
                )
            if ran is not None and ran.is_stopped:
                reason = "`stop` ended the run"
            if block.sent is not None:
                reason = "its job was not waited for: `generator.remote_job.result()` has it"
            raise NoValueError(f"`generator.output` has no value: {reason}.", here())
        return ran.outputs.whole

    @property
    def ids(self) -> torch.Tensor:
        """The token ids of the prompt, `(rows, position)`: see `invoker.ids`.

        Raises:
            PromptError: if it was given as embeddings.
            BlockError: outside of the invocations of a block that has its prompts in them.
        """
        return self._request().token_ids

    @property
    def mask(self) -> torch.Tensor:
        """Which positions of `ids` hold tokens and which padding, `(rows, position)`."""
        return self._request().visible_mask

    @property
    def step(self) -> StepPicker:
        """`generator.step(2)` or `generator.step[2]`: a context whose lines mean step 2.

        In an invocation it is `invoker.step`. Outside it holds for all invocations so far.
        """
        return StepPicker(self._meant(), self._most_steps)

    @property
    def steps(self) -> Iterator[int]:
        """The numbers of all steps, for a loop in whose rounds lines mean that step."""
        return each_step(self._meant(), self._most_steps, mark())

    def every_step(self) -> AtStep:
        """Returns a context whose lines are recorded once and run in every step."""
        return AtStep(self._meant(), EVERY)

    def next(self) -> int:
        """Lets the lines that come now mean the step after the present one; returns its number."""
        return next_step(self._meant(), self._most_steps, mark())

    @property
    def tokens(self) -> Tokens:
        """The token ids that steps choose: see `invoker.tokens`.

        Raises:
            BlockError: outside of the invocations of a block that has its prompts in them.
        """
        return self.only_invocation().tokens

    @property
    def logits(self) -> Logits:
        """The logits for the next token: see `invoker.logits`.

        Raises:
            BlockError: outside of the invocations of a block that has its prompts in them.
        """
        return self.only_invocation().logits

    @property
    def _most_steps(self) -> int | None:
        """How many steps each of those may have, None if that differs or is not known."""
        found = {invocation.most_steps for invocation in self._meant()}
        if not found:
            return self.block.procedure.steps
        return found.pop() if len(found) == 1 else None

    def _current(self) -> Invocation | None:
        """The invocation that the user's line means, None outside of those of a block."""
        block = self.block
        if block.alone is not None or not block.is_open:
            return block.alone
        current, _ = innermost(block.model, 2)
        return current if current is not None and current.block is block else None

    def _meant(self) -> list[Invocation]:
        """The same as a list; outside of one, all that there are so far."""
        current = self._current()
        return self.block.invocations if current is None else [current]

    def _request(self) -> Any:
        """What the one prompt that is meant became, also after the block."""
        if self.block.request is not None:
            return self.block.request
        return self.only_invocation().request

    def only_invocation(self) -> Invocation:
        """Returns the invocation around the user's line, or the one of a block that has one.

        Raises:
            BlockError: outside of the invocations of a block that has its prompts in them.
        """
        block = self.block
        if not (block.is_done or block.is_open):
            raise BlockError(
                "The block was never entered: write `with model.trace(prompt) as tracer:`.", here(3)
            )
        current = self._current()
        if current is None:
            raise BlockError(
                "This block has its prompts in invocations, and the line stands in none of them: "
                "ask the `invoker` of `with generator.invoke(prompt) as invoker:`.",
                here(3),
            )
        return current
