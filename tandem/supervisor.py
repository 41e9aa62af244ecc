"""Keeps a set of processes running, and ends them together. Knows nothing of what they do or of terminals.

                 start                      exits
    (waiting) ----------> RUNNING ---------------------> DEAD
        ^                    | stop()                     |  deaths in a row <= restarts_max: wait, longer each time
        +--------------------|----------------------------+
                             v                            |  more, or an exit that a restart cannot cure
                          STOPPED                      GAVE UP

A child that exits with code 0 has left of its own accord, as a drained worker does; it is not started again.

Every child leads a process group of its own: a terminal's Ctrl-C reaches the supervisor alone, which stops the children
in the order of their stages, and whatever a dead child leaves in its group is killed with it. Should the supervisor
itself be killed, `tandem.guard` ends the groups.

A run ends when it is told to, or when one of the children's `group`s has nobody left that could serve.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from tandem import guard

#: Exits by which a child says that it was told wrong, so that starting it again changes nothing: the common code for
#: wrong usage, and EX_CONFIG of sysexits.h.
EXITS_TOLD_WRONG = (2, 78)

_LAST_LINES = 12
_LAST_BYTES = 16 * 1024
_LOG_BYTES_MAX = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    name: str
    argv: tuple[str, ...]
    cwd: Path | None = None
    log: Path
    #: Children of one group stand in for one another.
    group: str
    #: Stages stop one after the other, lowest first.
    stop_stage: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    backoff_first_s: float = 0.5
    backoff_max_s: float = 10.0
    #: Deaths in a row that are answered with a restart. The row ends once a child has been ready for `settled_s`.
    restarts_max: int = 5
    #: The same for a child that has never been ready: more likely a wrong setting than bad luck.
    first_restarts_max: int = 2
    settled_s: float = 10.0
    #: From SIGTERM to SIGKILL, for each stage.
    stop_grace_s: float = 30.0

    def __post_init__(self) -> None:
        found = [
            f"{name}: must not be negative, is {value}"
            for name in (field.name for field in fields(self))
            if not 0 <= (value := getattr(self, name)) < float("inf")
        ]
        if self.backoff_first_s > self.backoff_max_s:
            found.append(f"backoff_first_s: {self.backoff_first_s} is more than backoff_max_s: {self.backoff_max_s}")
        if found:
            raise ValueError("\n".join(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    name: str
    pid: int
    #: 1 for the first start.
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    name: str
    pid: int
    reason: str
    last_lines: tuple[str, ...]
    #: Seconds until it is started again; None when it is not.
    restart_in_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """It ended without being told to by us, and without an error. It is not started again."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GaveUp:
    """Nothing will start this child again. `final` means its group has nobody left, so the run ends."""

    name: str
    deaths: int
    final: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    name: str
    #: It did not end in time and was killed.
    killed: bool


Event = Started | Died | Left | GaveUp | Stopped


class Outcome(Enum):
    STOPPED = "stopped"
    FAILED = "failed"


class Restarts:
    """One child's restart budget. Times are monotonic seconds, passed in."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._ready_since: float | None = None
        self._ever_ready = False
        self.deaths = 0

    def ready(self, now: float) -> None:
        if self._ready_since is None:
            self._ready_since = now
            self._ever_ready = True

    def died(self, now: float) -> float | None:
        """Seconds to wait before the next start, or None when the budget is spent."""
        if self._ready_since is not None and now - self._ready_since >= self._policy.settled_s:
            self.deaths = 0
        self._ready_since = None
        self.deaths += 1
        if self.deaths > (self._policy.restarts_max if self._ever_ready else self._policy.first_restarts_max):
            return None
        return min(self._policy.backoff_first_s * 2.0 ** (self.deaths - 1), self._policy.backoff_max_s)


class _Child:
    def __init__(self, spec: ChildSpec, policy: RestartPolicy) -> None:
        self.spec = spec
        self.restarts = Restarts(policy)
        self.attempts = 0
        #: Set while the process runs, and only then.
        self.process: Process | None = None
        self.killed = False
        #: It will not be started again.
        self.gone = False
        #: Where in the log the present process began to write.
        self.log_start = 0

    def terminate(self) -> None:
        """Asks the child alone: what it has started is its own to end, in its own order."""
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()

    def kill(self) -> None:
        """Ends the child and everything in its group, at once."""
        if self.process is not None:
            _kill_group(self.process.pid)

    def last_lines(self, count: int = _LAST_LINES) -> tuple[str, ...]:
        try:
            with self.spec.log.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(self.log_start, end - _LAST_BYTES))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return ()
        return tuple(line.rstrip() for line in text.splitlines() if line.strip())[-count:]


class Supervisor:
    """`run` once. `stop`, `kill` and the rest are called from the same event loop; `on_event` is, too."""

    def __init__(
        self, specs: Sequence[ChildSpec], policy: RestartPolicy, on_event: Callable[[Event], None] = lambda _: None
    ) -> None:
        assert len({spec.name for spec in specs}) == len(specs), "names must differ"
        self._policy = policy
        self._on_event = on_event
        self._children = {spec.name: _Child(spec, policy) for spec in specs}
        self._stopping = asyncio.Event()
        self._killing = False
        self._outcome = Outcome.STOPPED

    def stop(self) -> None:
        """Ends the run in order: SIGTERM stage by stage, SIGKILL for who takes longer than the grace."""
        self._stopping.set()

    def kill(self) -> None:
        """Ends the run at once."""
        self._killing = True
        self._stopping.set()
        for child in self._children.values():
            child.kill()

    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    def mark_ready(self, name: str) -> None:
        """The child serves. Only ready children earn their restart budget back."""
        self._children[name].restarts.ready(time.monotonic())

    def last_line(self, name: str) -> str:
        """The last thing the present process of this name has logged."""
        return "".join(self._children[name].last_lines(1))

    async def run(self) -> Outcome:
        """Returns when all children have ended and will not start again."""
        async with _guard() as guarding:
            try:
                async with asyncio.TaskGroup() as tasks:
                    keepers = {
                        name: tasks.create_task(self._keep(child, guarding), name=f"keep {name}")
                        for name, child in self._children.items()
                    }
                    await self._stop_or_all_ended(keepers)
                    for stage in sorted({child.spec.stop_stage for child in self._children.values()}):
                        await self._stop_stage(stage, keepers)
            finally:
                for child in self._children.values():
                    child.kill()
        return self._outcome

    async def _stop_or_all_ended(self, keepers: Mapping[str, asyncio.Task[None]]) -> None:
        stop = asyncio.create_task(self._stopping.wait())
        ended = asyncio.create_task(asyncio.wait(keepers.values()))
        try:
            await asyncio.wait([stop, ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            ended.cancel()

    async def _stop_stage(self, stage: int, keepers: Mapping[str, asyncio.Task[None]]) -> None:
        names = [name for name, child in self._children.items() if child.spec.stop_stage == stage]
        for name in names:
            self._children[name].terminate()
        _, late = await asyncio.wait([keepers[name] for name in names], timeout=self._policy.stop_grace_s)
        for name in names:
            if keepers[name] in late:
                self._children[name].killed = True
                self._children[name].kill()

    async def _keep(self, child: _Child, guarding: Process) -> None:
        """Starts a child until it stops, or no start would help."""
        while not self.is_stopping():
            pid, code = await self._run_once(child, guarding)
            if self.is_stopping():
                self._on_event(Stopped(name=child.spec.name, killed=child.killed or self._killing))
                return
            if code == 0:
                child.gone = True
                self._on_event(Left(name=child.spec.name))
                return
            delay_s = None if code in EXITS_TOLD_WRONG else child.restarts.died(time.monotonic())
            self._on_event(
                Died(
                    name=child.spec.name,
                    pid=pid,
                    reason=exit_reason(code),
                    last_lines=child.last_lines(),
                    restart_in_s=delay_s,
                )
            )
            if delay_s is None:
                self._give_up(child)
                return
            await self._sleep_unless_stopped(delay_s)

    async def _run_once(self, child: _Child, guarding: Process) -> tuple[int, int]:
        child.attempts += 1
        with _open_log(child.spec.log) as log:
            child.log_start = log.tell()
            process = await asyncio.create_subprocess_exec(
                *child.spec.argv, cwd=child.spec.cwd, stdin=DEVNULL, stdout=log, stderr=STDOUT, start_new_session=True
            )
        _tell(guarding, f"+{process.pid}\n")
        child.process = process
        try:
            self._on_event(Started(name=child.spec.name, pid=process.pid, attempt=child.attempts))
            if self.is_stopping():  # stop() came while the process was being made
                child.kill() if self._killing else child.terminate()
            return process.pid, await process.wait()
        finally:
            child.kill()  # what is left of its group
            child.process = None
            _tell(guarding, f"-{process.pid}\n")

    def _give_up(self, child: _Child) -> None:
        child.gone = True
        group = [other for other in self._children.values() if other.spec.group == child.spec.group]
        final = all(other.gone for other in group)
        self._on_event(GaveUp(name=child.spec.name, deaths=max(1, child.restarts.deaths), final=final))
        if final:
            self._outcome = Outcome.FAILED
            self.stop()

    async def _sleep_unless_stopped(self, delay_s: float) -> None:
        try:
            async with asyncio.timeout(delay_s):
                await self._stopping.wait()
        except TimeoutError:
            pass


def exit_reason(code: int) -> str:
    """In words, what `Process.returncode` says."""
    if code in EXITS_TOLD_WRONG:
        return f"exited with code {code}: its configuration is wrong"
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (the system kills with it when memory runs out)" if -code == signal.SIGKILL else ""
    return f"killed by {name}{hint}"


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of it has ended
    except PermissionError:
        pass  # macOS says this of a group whose members are all zombies


def _open_log(path: Path) -> BinaryIO:
    if path.exists() and path.stat().st_size > _LOG_BYTES_MAX:
        path.replace(path.with_suffix(path.suffix + ".1"))
    return path.open("ab")


@asynccontextmanager
async def _guard() -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", guard.__file__, stdin=PIPE, start_new_session=True
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


def _tell(guarding: Process, line: str) -> None:
    assert guarding.stdin is not None
    guarding.stdin.write(line.encode())
