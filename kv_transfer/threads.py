"""Threads that serve calls and do not keep the process from exiting.

`ThreadPoolExecutor`'s do: at exit the interpreter first refuses it new work and then waits for its threads. A gRPC
server on it dies of the refusal when a call comes in just then, and a handler that has begun waits for that server for
ever. A process whose engine has crashed must go; these are daemon threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class DaemonThreads(Executor):
    """At most `limit` threads, started as they are needed."""

    def __init__(self, limit: int, name: str) -> None:
        self._limit = limit
        self._name = name
        self._lock = threading.Lock()
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        #: Work that has been submitted and has not ended.
        self._open = 0
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new work after shutdown")
            if len(self._threads) < min(self._open + 1, self._limit):
                thread = threading.Thread(target=self._serve, name=f"{self._name}-{len(self._threads)}", daemon=True)
                thread.start()  # or it raises, and nothing was submitted
                self._threads.append(thread)
            self._open += 1
            self._work.put(lambda: _run(future, fn, *args, **kwargs))
        return future

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work  # what it holds must not live until the next work comes
            with self._lock:
                self._open -= 1

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends when what was submitted before is done; `cancel_futures` is not offered."""
        assert not cancel_futures
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in self._threads:
                    self._work.put(None)
        if wait:
            for thread in self._threads:
                thread.join()


def _run(future: Future[T], fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = fn(*args, **kwargs)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
