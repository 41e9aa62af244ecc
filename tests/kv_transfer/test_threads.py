"""An executor whose threads do not keep the process from exiting."""

from __future__ import annotations

import threading

import pytest

from kv_transfer.threads import DaemonThreads


def test_work_runs_in_as_many_threads_as_it_needs_and_no_more_than_allowed() -> None:
    threads = DaemonThreads(3, "test")
    meeting = threading.Barrier(3)
    assert [future.result(10) for future in [threads.submit(meeting.wait, 10) for _ in range(3)]]
    results = [threads.submit(threading.get_ident) for _ in range(50)]
    assert len({future.result(10) for future in results}) <= 3
    threads.shutdown()


def test_one_thread_serves_work_that_comes_one_after_the_other() -> None:
    threads = DaemonThreads(8, "test")
    first = threads.submit(threading.get_ident).result(10)
    assert threads.submit(lambda: threading.current_thread().daemon).result(10)
    threads.shutdown()
    assert first


def test_errors_reach_the_future_and_the_thread_goes_on() -> None:
    threads = DaemonThreads(1, "test")
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 // 0).result(10)
    assert threads.submit(lambda: 7).result(10) == 7
    threads.shutdown()


def test_shutdown_ends_what_was_submitted_and_refuses_more() -> None:
    threads = DaemonThreads(1, "test")
    gate = threading.Event()
    waiting, queued = threads.submit(gate.wait, 10), threads.submit(lambda: 7)
    threads.shutdown(wait=False)
    gate.set()
    threads.shutdown()
    assert waiting.result(0)
    assert queued.result(0) == 7
    with pytest.raises(RuntimeError, match="after shutdown"):
        threads.submit(lambda: 7)


def test_a_thread_that_cannot_be_started_is_told_and_the_next_one_may(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threads, ran = DaemonThreads(1, "test"), threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_more)
        with pytest.raises(RuntimeError, match="new thread"):
            threads.submit(ran.set)
    assert threads.submit(lambda: 7).result(10) == 7
    threads.shutdown()
    assert not ran.is_set(), "what was refused must not be done"


def test_cancelled_work_does_not_run() -> None:
    threads = DaemonThreads(1, "test")
    gate, ran = threading.Event(), threading.Event()
    threads.submit(gate.wait, 10)
    cancelled = threads.submit(ran.set)
    assert cancelled.cancel()
    gate.set()
    threads.shutdown()
    assert not ran.is_set()
