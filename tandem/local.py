"""A cluster on this machine: the supervisor's processes, and whether the router says that they serve."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from tandem.client import AsyncClient
from tandem.errors import TandemError
from tandem.supervisor import (
    ChildSpec,
    Died,
    Event,
    GaveUp,
    Left,
    Outcome,
    RestartPolicy,
    Started,
    Stopped,
    Supervisor,
)
from trust.tls import PLAINTEXT, TlsFiles

ROUTER = "router"

#: How often the router is asked who is ready: while somebody is not, and while all are.
_ASK_LOADING_S = 0.1
_ASK_READY_S = 1.0


class State(Enum):
    WAITING = "waiting"
    LOADING = "loading"
    READY = "ready"
    DEAD = "dead"
    LEFT = "left"
    GIVEN_UP = "given up"
    STOPPED = "stopped"


#: A process in one of these is not waited for.
_SETTLED = (State.READY, State.LEFT, State.GIVEN_UP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A process serves, `took_s` after it was started."""

    name: str
    took_s: float
    #: 1 for its first start.
    attempt: int


class Member:
    """What is known of one process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = State.WAITING
        self.pid = 0
        self.attempt = 0
        #: When its state last changed, by the monotonic clock.
        self.since = time.monotonic()
        #: From its start to its being ready, the last time it was.
        self.took_s = 0.0

    def become(self, state: State) -> None:
        self.state = state
        self.since = time.monotonic()


class LocalCluster:
    """`run` once, in the event loop it is created in. Events are the supervisor's, and Ready."""

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        policy: RestartPolicy,
        address: str,
        on_event: Callable[[Event | Ready], None],
        operator_key: str | None = None,
        tls: TlsFiles = PLAINTEXT,
    ) -> None:
        self.address = address
        self._tls = tls
        self._operator_key = operator_key
        self.members = {spec.name: Member(spec.name) for spec in specs}
        self._on_event = on_event
        self._supervisor = Supervisor(specs, policy, self._on_supervisor_event)
        self._settled = asyncio.Event()

    async def run(self) -> Outcome:
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(self._ask(), name="ask who is ready")
            outcome = await self._supervisor.run()
            asking.cancel()
        return outcome

    async def wait_ready(self) -> None:
        """Until every process serves, but for those that were given up or have left."""
        await self._settled.wait()

    def stop(self) -> None:
        self._supervisor.stop()

    def kill(self) -> None:
        self._supervisor.kill()

    def is_stopping(self) -> bool:
        return self._supervisor.is_stopping()

    def last_line(self, name: str) -> str:
        return self._supervisor.last_line(name)

    def _on_supervisor_event(self, event: Event) -> None:
        member = self.members[event.name]
        match event:
            case Started():
                member.pid, member.attempt = event.pid, event.attempt
                member.become(State.LOADING)
            case Died():
                member.become(State.DEAD)
            case Left():
                member.become(State.LEFT)
            case GaveUp():
                member.become(State.GIVEN_UP)
            case Stopped():
                member.become(State.STOPPED)
        self._on_event(event)
        self._see_whether_settled()

    async def _ask(self) -> None:
        async with AsyncClient(self.address, api_key=self._operator_key, tls=self._tls) as client:
            while not self.is_stopping():
                try:
                    status = await client.status(timeout_s=2.0)
                except TandemError:
                    pass  # starting, or dead: its process says which
                else:
                    self._became_ready(ROUTER)
                    for worker in status.workers:
                        member = self.members.get(worker.worker_id)
                        # By pid, since a router may not have noticed yet that an earlier process is gone.
                        if member is not None and worker.state == "ready" and worker.pid == member.pid:
                            self._became_ready(worker.worker_id)
                await asyncio.sleep(_ASK_READY_S if self._is_settled() else _ASK_LOADING_S)

    def _became_ready(self, name: str) -> None:
        member = self.members[name]
        if member.state is not State.LOADING:
            return
        member.took_s = time.monotonic() - member.since
        member.become(State.READY)
        self._supervisor.mark_ready(name)
        self._on_event(Ready(name=name, took_s=member.took_s, attempt=member.attempt))
        self._see_whether_settled()

    def _is_settled(self) -> bool:
        return all(member.state in _SETTLED for member in self.members.values())

    def _see_whether_settled(self) -> None:
        if self._is_settled():
            self._settled.set()


class PortRefused(Exception):
    """Nobody can listen there: taken, not allowed, not an address of this machine."""


def choose_port(host: str, port: int) -> int:
    """`port` if it can be listened on, any free one for 0. Raises PortRefused."""
    if port:
        _try_port(host, port)
        return port
    # Below the range that outgoing connections draw from, so that a restarted router finds its port still free.
    start = time.monotonic_ns() % 10_000
    for step in range(100):
        candidate = 20_000 + (start + step) % 10_000
        try:
            _try_port(host, candidate)
        except PortRefused as error:
            refused = error
        else:
            return candidate
    raise refused


def _try_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)  # SO_REUSEADDR alone would let two bind
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be listened on ({error.strerror})"
            raise PortRefused(f"{host}:{port} {why}") from None
