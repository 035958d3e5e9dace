"""What fails in a server without a user's fault: it is noted in the log, and tasks go on.

The log says what kind of error it was and where it was raised. What an error says may be from a
prompt.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable

from insitu.graph.errors import InsituError
from insitu.remote.problems import Problem, ProblemError, problem_of
from insitu.server.storage.data_folder import StorageError

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 1.0


def kept_up(what: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
    """Does something until it returns, or until the task is cancelled.

    Args:
        what: what it is, for the log.
        work: does it. After an error it is called again.
    """

    async def keep_up() -> None:
        while True:
            try:
                await work()
                return
            except Exception as error:
                note(what, error)
            await asyncio.sleep(_PAUSE_SECONDS)

    return asyncio.create_task(keep_up(), name=what)


def note(what: str, error: BaseException) -> None:
    """Logs that something has failed which nobody waits for.

    Args:
        what: what has failed.
        error: how.
    """
    if isinstance(error, StorageError):
        logger.warning("%s: the disk is full", what)
        return
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s has failed with %s:\n%s", what, type(error).__name__, where)


def noted(what: str, error: BaseException) -> Problem:
    """Returns an error as a problem, and logs it if it is a fault of the server's own.

    Args:
        what: what has failed.
        error: how.
    """
    if isinstance(error, InsituError | ProblemError):
        return problem_of(error)
    note(what, error)
    return problem_of(error, 500)
