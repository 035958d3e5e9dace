"""Work in a thread of its own, before or behind another: a bounded queue between the two.

An error in the thread reaches the caller, and a caller that ends early ends the thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Generic, TypeVar

from insitu.graph.location import context_for_thread

Item = TypeVar("Item")

_LOOKS = 0.1  # seconds after which a thread that waits looks whether it is still wanted


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()


@contextmanager
def made_ahead(items: Iterable[Item], most: int) -> Generator[Generator[Item]]:
    """Makes items in a thread, ahead of those who take them.

    Args:
        items: the items, made as they are iterated over.
        most: how many are made that nobody has taken.

    Returns:
        A context manager that gives an iterator of them.
    """
    waiting: queue.Queue[object] = queue.Queue(most)
    ended = threading.Event()

    def put(item: object) -> bool:
        while not ended.is_set():
            try:
                waiting.put(item, timeout=_LOOKS)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_END)
        except BaseException as error:
            put(_Raised(error))

    def taken() -> Generator[Item]:
        while (item := waiting.get()) is not _END:
            if isinstance(item, _Raised):
                raise item.error
            yield item  # pyright: ignore[reportReturnType]

    context = context_for_thread()
    thread = threading.Thread(target=context.run, args=(work,), name="insitu-ahead", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        ended.set()
        thread.join()


class Behind(Generic[Item]):
    """Does something with items in a thread, behind those who make them.

    At most one item waits and one is worked on: `give` waits before there are more.

    Args:
        work: called with each of them, in their order.
    """

    def __init__(self, work: Callable[[Item], object]) -> None:
        self._work = work
        self._waiting: queue.Queue[object] = queue.Queue()
        self._room = threading.Semaphore(1)
        self._error: BaseException | None = None
        context = context_for_thread()
        self._thread = threading.Thread(
            target=context.run, args=(self._run,), name="insitu-behind", daemon=True
        )
        self._thread.start()

    def give(self, item: Item) -> None:
        """Gives an item. Waits until the one before it is done.

        Raises:
            BaseException: what the work on an earlier one has raised.
        """
        self._room.acquire()
        self._raise()
        self._waiting.put(item)

    def finish(self) -> None:
        """Waits until all is done that was given.

        Raises:
            BaseException: as of `give`.
        """
        self._waiting.put(_END)
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        while (item := self._waiting.get()) is not _END:
            try:
                if self._error is None:
                    self._work(item)  # pyright: ignore[reportArgumentType]
            except BaseException as error:
                self._error = error
            finally:
                del item
                self._room.release()
