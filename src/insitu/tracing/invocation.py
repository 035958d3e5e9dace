"""Invocations: one prompt, and what is read while the model processes it."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from insitu.graph.errors import BlockError, NoValueError
from insitu.graph.location import Mark, here, mark, user_frame
from insitu.graph.node import Address, Kind, Ref, Site
from insitu.graph.proxy import Proxy, StructureProxy
from insitu.runtime.probe import Probe
from insitu.tracing.scope import Scope

if TYPE_CHECKING:
    from insitu.tracing.tracer import Tracer


class Invocation(Scope):
    """What `tracer.invoke(prompt)` gives: a context in which sites mean this prompt's values.

    Attributes:
        tracer: the block that it belongs to.
        number: its place among the invocations of the block, from 0.
        request: what the model is called with.
    """

    __slots__ = (
        *("_probe", "_reads", "_recording", "_result", "_views"),
        *("number", "request", "tracer"),
    )

    def __init__(self, tracer: Tracer, number: int, request: Any) -> None:
        self._owner = None
        self.model = tracer.model
        self._recording = tracer.recording
        self._views = tracer.procedure.views
        self.tracer = tracer
        self.number = number
        self.request = request
        self._reads: dict[Address, Ref] = tracer.recording.sites
        self._probe: Probe | None = None
        self._result: Any = None

    def __enter__(self) -> Invocation:
        if not self.tracer.is_open:
            raise BlockError(
                "An invocation belongs inside its block: write `with model.trace() as tracer:` "
                "around `with tracer.invoke(prompt):`.",
                here(),
            )
        self.enter(user_frame(2))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.leave()

    def read(self, path: str, kind: Kind, mark: Mark) -> Proxy:
        """Returns a proxy for the value of a module in the processing of this prompt.

        Args:
            path: the module's path.
            kind: which of its values.
            mark: the user's line.
        """
        recording = self._recording
        address = (self.number, path, kind)
        source = self._reads.get(address) or recording.read(address, mark)
        if kind == "output" and path in self._views:
            return StructureProxy(recording, source)
        return Proxy(recording, source)

    def write(self, path: str, kind: Kind, value: Any, mark: Mark) -> None:
        """Puts a value in the place of a module's own, in the processing of this prompt.

        Args:
            path: the module's path.
            kind: which of its values.
            value: recorded values, constants, or containers of both.
            mark: the user's line.
        """
        block = kind == "output" and path in self._views
        self._recording.write((self.number, path, kind), value, block, mark)

    @property
    def output(self) -> Any:
        """What the model returns for this prompt alone, without padding.

        In a trace, a proxy like any other. In a generation, the token ids `(rows, position)` of
        prompt and continuation, there once the model has run.

        Raises:
            NoValueError: in a generation, before the model has run.
        """
        if not self.tracer.promises_output:
            if not self.tracer.is_open:
                raise BlockError(
                    "`invoker.output` is a value of the run: read and save it inside the block.",
                    here(),
                )
            return self.read("", "output", mark())
        if self._result is None:
            raise NoValueError(
                "`invoker.output` has no value yet: the model runs when the outermost `with` block "
                "ends.",
                here(),
            )
        return self._result

    @property
    def ids(self) -> Any:
        """The token ids that the prompt became, `(rows, position)`."""
        return self.request.ids

    @property
    def mask(self) -> Any:
        """Which positions of `ids` hold tokens (1) and which padding (0), `(rows, position)`.

        There is padding only where several prompts of different length were given as one.
        """
        return self.request.visible_mask

    def fake(self, site: Site) -> Any:
        """Returns what will arrive at a site, as fake tensors; one fake run answers for all."""
        if self._probe is None:
            procedure = self.tracer.procedure
            self._probe = self.tracer.model.probe(procedure.example(self.request), procedure.views)
        if (site.path, site.kind) not in self._probe:
            raise self.tracer.never_ran(site, set(self._probe))
        return self._probe[site.path, site.kind]
