"""Starts one worker in this process and ends it by signals.

The first SIGTERM or SIGINT lets the worker drain; the second ends it at once, with whatever processes the engine has.
Neither depends on the event loop being free: an engine that loads may keep it busy for long.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import uvloop

from engine.build import build_engine
from worker.config import WorkerConfig
from worker.log import start_logging
from worker.process import ExitCode, serve

log = logging.getLogger(__name__)


def run(config: WorkerConfig) -> ExitCode:
    """Runs the worker until it has left. Call it from the main thread of a process that is the worker's own: it keeps
    the signals, so that the process can still be ended while the interpreter shuts down."""
    start_logging(config.log, config.worker_id)
    try:
        engine = build_engine(config.engine, config.engine_options)
    except ValueError as error:
        log.error("configuration: %s", error)
        return ExitCode.BAD_CONFIG
    _collect_rarely()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stop = asyncio.Event()
        signals = _Signals(runner.get_loop(), stop)
        signals.take_over()
        # Links close and the engine stops, each within its own bound; what hangs beyond is ended hard.
        patience_s = config.stop_timeout_s + 3 * config.link.close_timeout_s
        try:
            return runner.run(serve(config, engine, stop, lambda code: signals.end_hard_after(patience_s, code)))
        except Exception:
            log.exception("a fault ended the worker")
            return ExitCode.FAULT


def _collect_rarely() -> None:
    """Little of what a worker drops is garbage in cycles, and all its answers wait while it is looked for: by the
    collector's defaults up to 30 ms, every few minutes."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


class _Signals:
    def __init__(self, loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
        self._loop = loop
        self._stop = stop
        self._asked = False
        self._code_hard = ExitCode.FAULT

    def take_over(self) -> None:
        signal.signal(signal.SIGTERM, self._asked_to_stop)
        signal.signal(signal.SIGINT, self._asked_to_stop)
        signal.signal(signal.SIGALRM, self._out_of_patience)

    def end_hard_after(self, seconds: float, code: ExitCode) -> None:
        self._code_hard = code
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def _asked_to_stop(self, number: int, _frame: FrameType | None) -> None:
        if self._asked or self._loop.is_closed():
            end_hard(128 + number)
        self._asked = True
        self._loop.call_soon_threadsafe(self._stop.set)

    def _out_of_patience(self, _number: int, _frame: FrameType | None) -> None:
        end_hard(self._code_hard)


def end_hard(code: int) -> NoReturn:
    """Ends this process and all below it, now. Nothing is flushed or freed; peers learn it from broken connections."""
    for pid in descendants(os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(code)


def descendants(root: int) -> list[int]:
    """Children before grandchildren. Empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (name) state ppid ...; the name may hold anything, parentheses too.
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]
