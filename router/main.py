"""One router process: the core and its shell, the port for clients, operators and workers, health, metrics.

The first SIGTERM or SIGINT stops it in order: health turns NOT_SERVING, what comes is refused, what runs may finish
within the grace, what is left is told UNAVAILABLE. A second signal exits at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from protos import worker_link_pb2_grpc
from router.access import open_access
from router.config import RouterConfig
from router.core import events as ev
from router.core.core import Core
from router.core.snapshot import Snapshot
from router.core.stats import Stats
from router.edge.http_server import HttpServer
from router.edge.metrics import MetricsEdge
from router.edge.orca import LoadReports
from router.edges.fleet import Fleet
from router.front import LAST_WORDS_S, Front, bind, grpc_server, listen
from router.front import PortTaken as PortTaken
from router.grpc_server.server import GrpcServer
from router.grpc_server.stock import StockServer
from router.joining import Gate
from router.links import Links
from router.metering.keeper import Keeper
from router.metrics import RouterCollector, access_metrics, edge_metrics, exposition
from router.shell import Shell
from trust.tls import expires

_METRICS_WAIT_S = 5.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bound:
    """Where a router listens."""

    port: int
    metrics_port: int | None
    http_port: int | None = None
    #: Where workers have one of their own.
    worker_port: int | None = None


async def serve(
    config: RouterConfig,
    on_ready: Callable[[Bound], None] = lambda bound: None,
    *,
    asked_to_stop: asyncio.Event | None = None,
) -> None:
    """Runs until a signal, and returns when it has stopped in order. Raises PortTaken, AccessRefused, JournalError.

    Given an event, it runs until that is set and leaves the process's signals alone.
    """
    loop = asyncio.get_running_loop()
    began = time.monotonic()
    if asked_to_stop is None:
        asked_to_stop = asyncio.Event()
        _on_signals(loop, asked_to_stop)
    access = open_access(config)
    keeper = Keeper(config.budget_journal, config.usage_ledger)
    core = Core(
        now=began,
        limits=config.limits,
        step=config.step,
        models=(config.model_name,),
        book=access.book,
        cache_secret=access.cache_secret,
        wall_offset_s=time.time() - began,
        records=keeper.records,
        recorded=keeper.recorded,
    )
    shell = Shell(core, stream_tokens_max=config.requests.stream_tokens_max)
    shell.on_fault = asked_to_stop.set
    gate = Gate(config.router_id, config.join_key, config.worker_certificates)
    links = Links(shell, gate, router_id=config.router_id, load_report_interval_s=config.load_report_interval_s)
    shell.on_record, shell.on_usage = keeper.on_record, keeper.on_usage
    shell.attach(links)
    access.on_book = lambda book: shell.handle(ev.TenantsChanged(book))
    loads = LoadReports(shell.seen)

    async def read() -> tuple[Stats, Snapshot]:
        await face.count()
        return core.stats, shell.seen()

    page = exposition(
        RouterCollector(
            lambda: asyncio.run_coroutine_threadsafe(read(), loop).result(_METRICS_WAIT_S),
            lambda: chain(
                access_metrics(
                    is_open=access.authenticator.is_open,
                    joins_are_open=gate.is_open,
                    refused={"credentials": face.refused(), "joins": links.refusals.told()},
                    expires={"clients": expires(access.tls), "workers": expires(access.worker_tls)},
                ),
                edge_metrics(serving=face.serving_count, restarts=face.restarts),
            ),
        )
    )
    face: Front | Fleet
    welcoming = None
    if config.edges == 1:
        face = front = Front(config, access, shell, loads, began=began, metrics_page=page, after_read=shell.deliver)
        welcoming = front.server
    else:
        face = Fleet(
            config,
            shell,
            loads,
            began=began,
            look=access.look,
            in_force=access.in_force,
            metrics_page=lambda: asyncio.to_thread(page),
            on_fault=asked_to_stop.set,
        )
    shell.on_workers_changed = face.changed
    workers, worker_port, metrics = None, None, None
    try:
        await face.open()
        if config.worker_listen:
            welcoming = workers = grpc_server(config, shell.deliver)
            face.health.add_to(workers)
            host, _, asked = config.worker_listen.rpartition(":")
            worker_port = bind(workers, "worker_listen", host, int(asked), access.worker_tls)
        assert welcoming is not None, "several edges have no port for workers"
        worker_link_pb2_grpc.add_WorkerLinkServicer_to_server(links, welcoming)  # type: ignore[arg-type]  # takes what registers handlers
        if config.metrics_port is not None:
            metrics = HttpServer(MetricsEdge(page), config.http, access.tls)
            await listen(metrics, "metrics_port", config.host, config.metrics_port)
        if gate.is_open:
            _log.warning(
                "OPEN TO WORKERS: whoever reaches %s may join and be given prompts; join_key changes that", config.host
            )
        await face.start()
        if workers is not None:
            await workers.start()
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(work)
                for work in (face.run(), keeper.run(core.rewritten_journal), access.watch(), face.serving())
            ]
            stopping = tasks.create_task(asked_to_stop.wait())
            await asyncio.wait((background[-1], stopping), return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done():
                on_ready(Bound(face.port, metrics.port if metrics else None, face.http_port, worker_port))
            await stopping
            for task in background:
                task.cancel()
        await _stop(face, workers, shell, links, core, config.shutdown_grace_s)
    finally:
        if metrics is not None:
            await metrics.close(LAST_WORDS_S)
        if workers is not None:
            await workers.stop(None)
        await face.close()
        shell.stop()
        keeper.close()


async def _stop(
    face: Front | Fleet,
    workers: GrpcServer | StockServer | None,
    shell: Shell,
    links: Links,
    core: Core,
    grace_s: float,
) -> None:
    await face.drain()
    if (fault := shell.fault or face.fault) is not None:
        raise fault
    _log.info("stopping: %d requests open, %.0f s for them to finish", len(core.state.requests), grace_s)
    shell.handle(ev.ShutdownRequested())
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(grace_s):
            await shell.idle()
    shell.handle(ev.ShutdownRequested(final=True))
    links.close_all("the router stops")
    await face.stop()
    if workers is not None:
        await workers.stop(LAST_WORDS_S)


def _on_signals(loop: asyncio.AbstractEventLoop, asked_to_stop: asyncio.Event) -> None:
    def stop() -> None:
        if asked_to_stop.is_set():
            os._exit(1)
        asked_to_stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
