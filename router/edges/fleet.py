"""The core's side of edges in processes of their own: starts them, starts again those that die, and carries what they
ask for to the shell.

An edge belongs to its socket: when that ends, however it ends, its requests are cancelled, as if all its clients had
left; and its process is ended, if it has not ended before. An edge in turn ends when the socket does.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from router.access import InForce
from router.config import RouterConfig, with_absolute_paths
from router.core import events as ev
from router.core.effects import ClientEvent, Failed, Finished, Tokens
from router.core.errors import AlreadyExists, TandemError
from router.edge.orca import LoadReports
from router.edges import wire
from router.edges.far import LOOK_S_MAX
from router.edges.link import Link
from router.front import LAST_WORDS_S, PortTaken
from router.health import Health
from router.port import ModelView
from router.shell import Shell

#: From being started to serving, and from being asked to answering: slower ones are ended.
_START_S_MAX = 60.0
_SILENCE_S_MAX = 30.0
#: Between telling an edge how the pools are, and asking what it counted, where nothing else is to be said.
_BEAT_S = 1.0
#: For what edges counted; then what they said before counts.
_COUNT_S_MAX = 3.0
#: Before an edge that died is started again; doubled from the first to the second while it does not live long.
_BACKOFF_FIRST_S = 0.1
_BACKOFF_MAX_S = 5.0
_SETTLED_S = 10.0

#: In place of what workers join by, which is no edge's business.
_NOT_TOLD = b"of the core alone"

_ROOT = Path(__file__).resolve().parents[2]
_log = logging.getLogger(__name__)


class EdgeFailed(Exception):
    """An edge did not come up when the router started."""


class _Stream:
    """A request's, whose reader is in another process. Implements router.shell's Sink."""

    __slots__ = ("_edge", "_number", "key")

    def __init__(self, edge: Edge, number: int, key: str) -> None:
        self._edge = edge
        self._number = number
        self.key = key

    def put(self, event: ClientEvent) -> None:
        self._edge.put(self._number, event)

    def arrived(self) -> None:
        self._edge.link.flush()


class Edge:
    """One edge's process, as long as it lives."""

    def __init__(
        self,
        process: Process,
        shell: Shell,
        loads: LoadReports,
        answer: Callable[[Edge, wire.Question], Awaitable[object]],
    ) -> None:
        self.process = process
        self._shell = shell
        self._loads = loads
        #: Of requests that it submitted and that have not ended.
        self._streams: dict[int, _Stream] = {}
        #: Of this turn of the loop.
        self._said: list[wire.Said] = []
        self._ended: list[wire.Ended] = []
        #: As the edge knows them.
        self._models: list[ModelView] = []
        self._load_report = b""
        self.serving = asyncio.Event()
        #: Credentials that it refused, by reason, when it was last asked.
        self.refused: dict[str, int] = {}
        self.link = Link(
            wire.FromEdge,
            self._take,
            lambda question: answer(self, question),
            lost=self._lost,
            after_read=shell.deliver,
            last=self._turn,
        )

    def say_now(self) -> None:
        self._models, self._load_report = self._shell.models(), self._loads.report()
        self.link.say(wire.Now(self._models, self._load_report))

    def changed(self) -> None:
        """Workers came, went or changed."""
        if self._shell.models() != self._models:
            self.say_now()

    async def count(self, timeout_s: float) -> None:
        """Raises TandemError."""
        self.refused = await self.link.ask(wire.GetRefused(), dict[str, int], timeout_s)

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it has ended
            self.process.kill()

    # To the edge.

    def put(self, number: int, event: ClientEvent) -> None:
        if isinstance(event, Tokens):
            self._said.append(wire.Said(number, event.token_ids, event.logprobs))
        else:
            del self._streams[number]
            finished = event if isinstance(event, Finished) else None
            self._ended.append(wire.Ended(number, finished, event.error if isinstance(event, Failed) else None))
        self.link.will_flush()

    def _turn(self) -> wire.Turn | None:
        said, self._said = self._said, []
        ended, self._ended = self._ended, []
        if not said and not ended:
            return None
        report = b""
        if ended and (newest := self._loads.report()) != self._load_report:
            self._load_report = report = newest  # each answer's end tells it
        return wire.Turn(said, ended, report)

    # From the edge.

    def _take(self, message: wire.FromEdge) -> None:
        match message:
            case wire.Submit():
                self._submit(message)
            case wire.Serving():
                self.serving.set()
            case wire.Cancel() | wire.StopMatched() | wire.Overrun() if message.stream in self._streams:
                self._shell.handle(_event(message, self._streams[message.stream].key))

    def _submit(self, message: wire.Submit) -> None:
        stream = _Stream(self, message.stream, message.request.key)
        self._streams[message.stream] = stream
        try:
            self._shell.open(message.request, stream)
        except AlreadyExists as error:
            stream.put(Failed(error))

    def _lost(self, why: str) -> None:
        if self._streams:
            _log.warning("edge %d is lost (%s) with %d requests", self.process.pid, why, len(self._streams))
        for stream in tuple(self._streams.values()):
            self._shell.handle(ev.Cancel(stream.key))
        self.kill()


def _event(message: wire.Cancel | wire.StopMatched | wire.Overrun, key: str) -> ev.Event:
    match message:
        case wire.Cancel():
            return ev.Cancel(key)
        case wire.StopMatched():
            return ev.StopMatched(key, message.completion_tokens)
        case wire.Overrun():
            return ev.Overrun(key)


class Fleet:
    """All edges of a router. Stands where a `router.front.Front` does."""

    def __init__(
        self,
        config: RouterConfig,
        shell: Shell,
        loads: LoadReports,
        *,
        began: float,
        look: Callable[[], Awaitable[None]],
        in_force: Callable[[], InForce],
        metrics_page: Callable[[], Awaitable[bytes]],
        on_fault: Callable[[], None],
    ) -> None:
        """`look` returns when changed files are in force here. `on_fault` is called when an edge does not come up at
        all; `fault` then says why."""
        self._config = config
        self._shell = shell
        self._loads = loads
        self._began = began
        self._look = look
        self._in_force = in_force
        self._metrics_page = metrics_page
        self._on_fault = on_fault
        self.fault: Exception | None = None
        self.port = 0
        self.http_port: int | None = None
        #: They keep the ports ours while no edge listens.
        self._held: list[socket.socket] = []
        self._edges: dict[int, Edge] = {}
        self._refused_before: Counter[str] = Counter()
        self.restarts = 0
        self._are_serving = asyncio.Event()
        #: For the core's own ports.
        self.health = Health(shell, config.model_name)

    @property
    def serving_count(self) -> int:
        return sum(edge.serving.is_set() for edge in tuple(self._edges.values()))

    async def open(self) -> None:
        """Takes the ports. Raises PortTaken."""
        config = self._config
        self.port = self._hold("port", config.port)
        if config.http_port is not None:
            self.http_port = self._hold("http_port", config.http_port)
        join_key = _NOT_TOLD if config.join_key else b""
        changed = replace(config, port=self.port, http_port=self.http_port, join_key=join_key)
        self._config = with_absolute_paths(changed)

    def _hold(self, key: str, port: int) -> int:
        host = self._config.host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            if port:  # edges share theirs with whoever asks to, so ask whether another router has it
                socket.create_server((host, port), family=family).close()
            held = socket.socket(family, socket.SOCK_STREAM)
            self._held.append(held)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind((host, port))  # and never listens
        except OSError as error:
            raise PortTaken(f"{key}: {host}:{port} can't be listened on ({error})") from None
        return int(held.getsockname()[1])

    async def start(self) -> None:
        """`run` does."""

    async def serving(self) -> None:
        """Returns when all serve."""
        await self._are_serving.wait()

    async def run(self) -> None:
        """Until cancelled; edges live on, but are not started again."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.health.run())
            for place in range(self._config.edges):
                tasks.create_task(self._keep(place))

    async def _keep(self, place: int) -> None:
        backoff_s = _BACKOFF_FIRST_S
        while True:
            began = time.monotonic()
            try:
                why = await self._live(place)
            except OSError as error:
                why = f"could not be started: {error}"
            if not self._are_serving.is_set():
                self.fault = EdgeFailed(f"an edge {why}, while the router started")
                self._on_fault()
                return
            if time.monotonic() - began > _SETTLED_S:
                backoff_s = _BACKOFF_FIRST_S
            _log.error("an edge %s; another starts in %g s", why, backoff_s)
            self.restarts += 1
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _BACKOFF_MAX_S)

    async def _live(self, place: int) -> str:
        """One edge, from its start to its end: how that was. Raises OSError."""
        edge = await self._start(place)
        async with asyncio.TaskGroup() as tasks:
            beating = tasks.create_task(self._beat(edge))
            code = await edge.process.wait()
            beating.cancel()
        edge.link.cut("its process ended")
        self._refused_before.update(edge.refused)
        del self._edges[place]
        return f"(process {edge.process.pid}) ended with code {code}"

    async def _start(self, place: int) -> Edge:
        ours, theirs = socket.socketpair()
        number = theirs.fileno()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "router.edges", str(number), str(self._began)),
                    cwd=_ROOT,
                    stdin=PIPE,
                    stdout=DEVNULL,  # where ports are told
                    pass_fds=(number,),
                )
        except BaseException:
            ours.close()
            raise
        assert process.stdin is not None
        process.stdin.write(pickle.dumps((self._config, self._in_force())))
        process.stdin.close()
        edge = self._edges[place] = Edge(process, self._shell, self._loads, self._answer)
        await asyncio.get_running_loop().create_unix_connection(lambda: edge.link, sock=ours)
        edge.say_now()
        return edge

    async def _beat(self, edge: Edge) -> None:
        try:
            async with asyncio.timeout(_START_S_MAX):
                await edge.serving.wait()
            _log.info("edge %d serves", edge.process.pid)
            if self.serving_count == self._config.edges:
                self._are_serving.set()
            while True:
                await edge.count(_SILENCE_S_MAX)
                await asyncio.sleep(_BEAT_S)
                edge.say_now()
        except (TandemError, TimeoutError):
            if not edge.link.lost_because:
                edge.link.cut("it does not answer")

    async def _answer(self, edge: Edge, question: wire.Question) -> object:
        match question:
            case wire.GetRates(tenant):
                return await self._shell.rates(tenant)
            case wire.GetSnapshot(requests):
                return await self._shell.snapshot(requests=requests)
            case wire.GetStats():
                return await self._shell.stats()
            case wire.GetMetrics():
                return await self._metrics_page()
            case wire.Explain(request_id, tenant):
                return await self._shell.explain(request_id, tenant)
            case wire.Drain(worker_id):
                await self._shell.drain(worker_id)
            case wire.SetRole(worker_id, role):
                await self._shell.set_role(worker_id, role)
            case wire.LookAgain():
                await self._look()
                await self._of_all(lambda other: other.link.ask(question, None, LOOK_S_MAX), but=edge)
            case _:
                raise wire.Malformed(f"{type(question).__name__} is not for the core")
        return None

    async def _of_all(self, ask: Callable[[Edge], Awaitable[object]], *, but: Edge | None = None) -> None:
        """One that dies meanwhile holds up nothing."""
        asked = [ask(edge) for edge in self._edges.values() if edge is not but and edge.serving.is_set()]
        await asyncio.gather(*asked, return_exceptions=True)

    def changed(self) -> None:
        """Workers came, went or changed."""
        self.health.changed()
        for edge in self._edges.values():
            edge.changed()

    def refused(self) -> dict[str, int]:
        return dict(sum((Counter(edge.refused) for edge in tuple(self._edges.values())), self._refused_before))

    async def count(self) -> None:
        await self._of_all(lambda edge: edge.count(_COUNT_S_MAX))

    async def drain(self) -> None:
        await self.health.drain()
        for edge in self._edges.values():
            edge.link.say(wire.Draining())

    async def stop(self) -> None:
        for edge in self._edges.values():
            edge.link.flush()  # what was said to requests, first
            edge.link.say(wire.Stop())
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * LAST_WORDS_S + 1):
                await asyncio.gather(*(edge.process.wait() for edge in self._edges.values()))

    async def close(self) -> None:
        for edge in self._edges.values():
            edge.kill()
            await edge.process.wait()
        for held in self._held:
            held.close()
