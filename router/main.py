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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from protos import worker_link_pb2_grpc
from router.access import open_access
from router.config import RouterConfig
from router.core import events as ev
from router.core.core import Core
from router.core.snapshot import Snapshot
from router.core.stats import Stats
from router.edge import control, kserve, native, orca, reflection, vllm_engine
from router.edge.chat import ChatTemplate
from router.edge.control import ControlEdge
from router.edge.generate import Generator
from router.edge.http_server import HttpServer
from router.edge.kserve import KServeEdge
from router.edge.metrics import MetricsEdge
from router.edge.native import NativeEdge
from router.edge.openai import OpenAIEdge
from router.edge.orca import LoadReports, OrcaEdge
from router.edge.text import ModelText
from router.edge.vllm_engine import VllmEngineEdge
from router.edge.vllm_engine_wire import Model
from router.grpc_server.connection import ConnectionLimits
from router.grpc_server.server import GrpcServer
from router.grpc_server.stock import StockServer
from router.joining import Gate
from router.links import Links
from router.metering.keeper import Keeper
from router.metrics import RouterCollector, access_metrics, exposition
from router.shell import Shell
from trust.tls import Tls, expires

LINK = "tandem.v1.WorkerLink"
#: Services that generate.
CLIENTS = (native.SERVICE, kserve.SERVICE, vllm_engine.SERVICE)

_METRICS_WAIT_S = 5.0
#: For the handlers of requests that were ended to tell their clients so.
_LAST_WORDS_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bound:
    """Where a router listens."""

    port: int
    metrics_port: int | None
    http_port: int | None = None
    #: Where workers have one of their own.
    worker_port: int | None = None


class PortTaken(Exception):
    """Something else listens there."""


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
    model_dir = Path(config.model_dir)
    text = ModelText(model_dir)
    texts = {config.model_name: text}
    access = open_access(config)
    keeper = Keeper(config.budget_journal, config.usage_ledger)
    core = Core(
        now=began,
        limits=config.limits,
        step=config.step,
        models=texts,
        book=access.book,
        cache_secret=access.cache_secret,
        wall_offset_s=time.time() - began,
        records=keeper.records,
        recorded=keeper.recorded,
    )
    shell = Shell(core, stream_tokens_max=config.requests.stream_tokens_max)
    gate = Gate(config.router_id, config.join_key, config.worker_certificates)
    links = Links(shell, gate, router_id=config.router_id, load_report_interval_s=config.load_report_interval_s)
    shell.on_record, shell.on_usage = keeper.on_record, keeper.on_usage
    shell.attach(links)
    access.on_book = lambda book: shell.handle(ev.TenantsChanged(book))
    generator = Generator(shell, texts, config.requests, access.authenticator)
    loads = LoadReports(shell.snapshot)
    edge = NativeEdge(generator, loads)
    operators = ControlEdge(
        shell,
        access.authenticator,
        access.admin(),
        router_id=config.router_id,
        uptime_s=lambda: time.monotonic() - began,
    )
    foreign = (
        KServeEdge(
            generator,
            access.authenticator,
            loads,
            lambda: shell.stats,
            version=version("tandem"),
            streamed_at_once=config.requests.answers_max,
        ),
        VllmEngineEdge(
            generator,
            access.authenticator,
            loads,
            shell.snapshot,
            Model(model_dir),
            version=version("tandem"),
            answers_max=config.requests.answers_max,
            uptime_s=lambda: time.monotonic() - began,
        ),
        OrcaEdge(loads),
    )
    health = health_aio.HealthServicer()

    server = _grpc_server(config, shell)
    server.add_generic_rpc_handlers((edge.handlers(), operators.handlers(), *(one.handlers() for one in foreign)))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.add_to(server, (*CLIENTS, control.SERVICE, orca.SERVICE, LINK, "grpc.health.v1.Health"))
    port = _bind(server, "port", config.host, config.port, access.tls)
    servers, worker_port = [server], None
    if config.worker_listen:
        servers.append(_grpc_server(config, shell))
        health_pb2_grpc.add_HealthServicer_to_server(health, servers[-1])
        host, _, asked = config.worker_listen.rpartition(":")
        worker_port = _bind(servers[-1], "worker_listen", host, int(asked), access.worker_tls)
    worker_link_pb2_grpc.add_WorkerLinkServicer_to_server(links, servers[-1])  # type: ignore[arg-type]  # takes what registers handlers
    collector = RouterCollector(
        lambda: _read_on(loop, shell),
        lambda: access_metrics(
            is_open=access.authenticator.is_open,
            joins_are_open=gate.is_open,
            refused={"credentials": access.authenticator.refusals.told(), "joins": links.refusals.told()},
            expires={"clients": expires(access.tls), "workers": expires(access.worker_tls)},
        ),
    )
    metrics = http = None
    if config.metrics_port is not None:
        metrics = HttpServer(MetricsEdge(exposition(collector)), config.http, access.tls)
        await _listen(metrics, "metrics_port", config.host, config.metrics_port)
    if config.http_port is not None:
        app = OpenAIEdge(
            generator,
            access.authenticator,
            {config.model_name: ChatTemplate(text, model_dir)},
            requests=config.requests,
            http=config.http,
            version=version("tandem"),
            metrics=exposition(collector),
        )
        http = HttpServer(app, config.http, access.tls, age_s_max=config.connection_age_s_max)
        await _listen(http, "http_port", config.host, config.http_port)

    if asked_to_stop is None:
        asked_to_stop = asyncio.Event()
        _on_signals(loop, asked_to_stop)
    shell.on_fault = asked_to_stop.set
    pages = [one for one in (http, metrics) if one is not None]
    if gate.is_open:
        _log.warning(
            "OPEN TO WORKERS: whoever reaches %s may join and be given prompts; join_key changes that", config.host
        )
    for one in servers:
        await one.start()
    try:
        on_ready(Bound(port, metrics.port if metrics else None, http.port if http else None, worker_port))
        async with asyncio.TaskGroup() as tasks:
            reporter = tasks.create_task(_report_health(health, shell, core, config.model_name))
            kept = tasks.create_task(keeper.run(core.rewritten_journal))
            background = [reporter, kept, tasks.create_task(access.watch())]
            await asked_to_stop.wait()
            for task in background:
                task.cancel()
        await _stop(servers, health, shell, links, core, config.shutdown_grace_s)
    finally:
        for page in pages:
            await page.close(_LAST_WORDS_S)
        shell.stop()
        generator.close()
        keeper.close()


def _grpc_server(config: RouterConfig, shell: Shell) -> GrpcServer | StockServer:
    message_bytes_max, age_s_max = config.requests.message_bytes_max, config.connection_age_s_max
    if config.grpc_server == "grpcio":
        return StockServer(message_bytes_max=message_bytes_max, age_s_max=age_s_max)
    return GrpcServer(
        message_bytes_max=message_bytes_max, limits=ConnectionLimits(age_s_max=age_s_max), after_read=shell.deliver
    )


def _bind(server: GrpcServer | StockServer, key: str, host: str, port: int, tls: Tls | None) -> int:
    try:
        return server.bind(host, port, tls)
    except OSError as error:
        raise PortTaken(f"{key}: {host}:{port} can't be listened on; is another router up there? ({error})") from None


async def _listen(http: HttpServer, key: str, host: str, port: int) -> None:
    try:
        await http.listen(host, port)
    except OSError as error:
        raise PortTaken(f"{key}: {host}:{port} can't be listened on: {error}") from None


def _read_on(loop: asyncio.AbstractEventLoop, shell: Shell) -> tuple[Stats, Snapshot]:
    """The exporter's thread asks the loop, which owns the core."""

    async def read() -> tuple[Stats, Snapshot]:
        return shell.stats, shell.snapshot()

    return asyncio.run_coroutine_threadsafe(read(), loop).result(_METRICS_WAIT_S)


async def _report_health(health: health_aio.HealthServicer, shell: Shell, core: Core, model: str) -> None:
    """SERVING while a request for the model could be served. Workers need the link before that."""
    changed = asyncio.Event()
    shell.on_workers_changed = changed.set
    await health.set(LINK, health_pb2.HealthCheckResponse.SERVING)
    await health.set(control.SERVICE, health_pb2.HealthCheckResponse.SERVING)
    while True:
        serving = health_pb2.HealthCheckResponse.ServingStatus.Value("SERVING" if core.serves(model) else "NOT_SERVING")
        for name in ("", *CLIENTS):
            await health.set(name, serving)
        await changed.wait()
        changed.clear()


async def _stop(
    servers: Sequence[GrpcServer | StockServer],
    health: health_aio.HealthServicer,
    shell: Shell,
    links: Links,
    core: Core,
    grace_s: float,
) -> None:
    await health.enter_graceful_shutdown()
    if shell.fault is not None:
        raise shell.fault
    _log.info("stopping: %d requests open, %.0f s for them to finish", len(core.state.requests), grace_s)
    shell.handle(ev.ShutdownRequested())
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(grace_s):
            await shell.idle()
    shell.handle(ev.ShutdownRequested(final=True))
    links.close_all("the router stops")
    for server in servers:
        await server.stop(_LAST_WORDS_S)


def _on_signals(loop: asyncio.AbstractEventLoop, asked_to_stop: asyncio.Event) -> None:
    def stop() -> None:
        if asked_to_stop.is_set():
            os._exit(1)
        asked_to_stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
