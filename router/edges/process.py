"""One edge's process: every protocol for clients, in front of a core that is elsewhere.

The core's process starts it and says when it stops; signals that reach the whole group of processes are the core's to
act on. When the socket to the core ends, everybody is told UNAVAILABLE and the process ends.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket

from router.access import Access, InForce, open_access
from router.config import RouterConfig
from router.edge.orca import LoadReports
from router.edges import wire
from router.edges.far import FarCore
from router.edges.link import Link
from router.front import Front
from router.process import is_up

_log = logging.getLogger(__name__)


class _ToldReports(LoadReports):
    """Made by the core."""

    def __init__(self, core: FarCore) -> None:
        self._core = core

    def report(self) -> bytes:
        return self._core.load_report


class _Orders:
    """What the core wants of this process."""

    def __init__(self, core: FarCore, access: Access) -> None:
        self._core = core
        self._access = access
        self.draining = asyncio.Event()
        self.over = asyncio.Event()
        #: Not by the core's word.
        self.lost = False

    def take(self, message: wire.FromCore) -> None:
        match message:
            case wire.Turn():
                self._core.take(message)
            case wire.Now():
                self._core.now_is(message)
            case wire.Draining():
                self.draining.set()
            case wire.Stop():
                self.over.set()

    async def answer(self, question: wire.Question) -> object:
        match question:
            case wire.GetRefused():
                return self._access.authenticator.refusals.told()
            case wire.LookAgain():
                await self._access.look()
                return None
        raise wire.Malformed(f"{type(question).__name__} is not for an edge")

    def is_lost(self, why: str) -> None:
        self._core.told.set()
        if not self.over.is_set():
            _log.error("the core is lost: %s", why)
            self.lost = True
        self._core.lost()
        self.over.set()


async def serve(config: RouterConfig, in_force: InForce, to_core: socket.socket, began: float) -> bool:
    """Until the core says so (True), or is gone. Raises AccessRefused, PortTaken."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: None)
    access = open_access(config, in_force)
    core = FarCore(stream_tokens_max=config.requests.stream_tokens_max, book=lambda: access.book)
    orders = _Orders(core, access)
    link = Link(wire.FromCore, orders.take, orders.answer, lost=orders.is_lost, after_read=core.deliver)
    core.attach(link)
    front = Front(
        config,
        access,
        core,
        _ToldReports(core),
        began=began,
        metrics_page=core.metrics_page,
        everywhere=core.look_again,
        shared=True,
    )
    core.on_workers_changed = front.changed
    await loop.create_unix_connection(lambda: link, sock=to_core)
    try:
        await core.told.wait()  # else those who come at once would hear that there are no workers
        await front.open()
        await front.start()
        is_up()
        await access.look()  # of what changes meanwhile, the core tells those that serve alone
        link.say(wire.Serving())
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(front.run()),
                tasks.create_task(access.watch()),
                tasks.create_task(_drain(front, orders.draining)),
            ]
            await orders.over.wait()
            for task in background:
                task.cancel()
        await front.drain()
        await front.stop()
    finally:
        await front.close()
    return not orders.lost


async def _drain(front: Front, told: asyncio.Event) -> None:
    await told.wait()
    await front.drain()
