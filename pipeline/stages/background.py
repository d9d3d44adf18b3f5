"""Work of this machine in one thread, while the nodes of a cluster compile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from pipeline.errors import HostError
from pipeline.progress import Progress

END_S = 10.0
"""Wait for work that was cancelled."""

Result = TypeVar("Result")


class Pending(Generic[Result]):
    """The result of work that may still run."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work, self._ended = work, threading.Event()
        self._result: Result | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Do the work."""
        try:
            self._result = self._work()
        except BaseException as error:  # raised again in the thread that asks for the result
            self.error = error
        self._ended.set()

    def __call__(self) -> Result:
        """Wait for the end, and return the result or raise the error."""
        self._ended.wait()
        if self.error is not None:
            raise self.error
        return self._result  # type: ignore[return-value] # the work has ended


class Background:
    """Does one piece of work after the other in a thread, which ends with the block."""

    def __init__(self) -> None:
        self._todo: SimpleQueue[Pending[Any] | None] = SimpleQueue()
        self._all: list[Pending[Any]] = []
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="background", daemon=True)

    def start(self, work: Callable[[Progress], Result]) -> Pending[Result]:
        """Do work later; it calls the progress callback that it is given, by which it is cancelled."""
        pending: Pending[Result] = Pending(lambda: work(self._progress))
        self._all.append(pending)
        self._todo.put(pending)
        return pending

    def check(self) -> None:
        """Raise the error of work that failed."""
        for pending in self._all:
            if pending.error is not None:
                raise pending.error

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        """End the thread; work that has not ended is cancelled."""
        self._cancelled.set()
        self._todo.put(None)
        self._thread.join(END_S)

    def _progress(self, _task: str, _done: float, _total: float) -> None:
        if self._cancelled.is_set():
            raise HostError("cancelled", where="build", fix="run the same command again: what is finished is kept")

    def _run(self) -> None:
        while (pending := self._todo.get()) is not None:
            pending.run()
