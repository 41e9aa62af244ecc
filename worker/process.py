"""One worker process from start to end.

    LOADING --engine ready--> SERVING --told to leave--> DRAINING --> (closed) exit 0
       |                         |                          |
       |  told to leave: 0       +------ engine died -------+--> legs failed, exit 3
       +--engine did not start: 4

Readiness is said twice: to routers by the hello, which is sent only now, and to probes by the health service.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from enum import IntEnum
from random import Random
from typing import TypeVar

from engine.base import Engine, EngineInfo
from trust.join import join_key
from trust.tls import Tls
from worker.config import WorkerConfig
from worker.health import Health, serve_health
from worker.link import RouterLink, Trust
from worker.metrics import WorkerMetrics, serve_metrics
from worker.service import Identity, WorkerService

log = logging.getLogger(__name__)

T = TypeVar("T")


class ExitCode(IntEnum):
    LEFT = 0
    #: A fault of this program; the log has the traceback.
    FAULT = 1
    ENGINE_DIED = 3
    ENGINE_DID_NOT_START = 4
    #: sysexits.h EX_CONFIG: starting again changes nothing.
    BAD_CONFIG = 78


class _Over(Exception):
    """Ends the scope of everything that runs beside the worker's end."""


async def serve(
    config: WorkerConfig, engine: Engine, stop: asyncio.Event, ending: Callable[[ExitCode], None]
) -> ExitCode:
    """Runs the worker until it leaves: `stop` is set, a router says so, or the engine dies. The engine is stopped.

    `ending` is called once, when it is known how this will end and all that is left is to let go of things.
    """
    metrics = WorkerMetrics(config.worker_id)
    with serve_metrics(metrics, config.metrics_address) as metrics_port:
        async with serve_health(config.health_address) as health:
            log.info("loading %s; health port %d, metrics port %d", config.engine, health.port, metrics_port)
            try:
                info = await _loaded(engine, stop)
                if isinstance(info, ExitCode):
                    ending(info)
                    return info
                return await _serve_loaded(config, engine, info, stop, health, metrics, ending)
            finally:
                await _stop(engine, config.stop_timeout_s)


async def _loaded(engine: Engine, stop: asyncio.Event) -> EngineInfo | ExitCode:
    try:
        info = await first(engine.start(), _none(stop.wait()))
    except Exception as error:
        log.exception("the engine did not start: %s", error)
        return ExitCode.ENGINE_DID_NOT_START
    if info is None:
        log.info("told to leave before the engine was ready")
        return ExitCode.LEFT
    return info


async def _serve_loaded(
    config: WorkerConfig,
    engine: Engine,
    info: EngineInfo,
    stop: asyncio.Event,
    health: Health,
    metrics: WorkerMetrics,
    ending: Callable[[ExitCode], None],
) -> ExitCode:
    options = config.engine_options
    trust = Trust(join_key(options.cluster_secret), Tls(options.tls) if options.tls.dials else None)
    identity = Identity(worker_id=config.worker_id, incarnation=secrets.token_hex(8), info=info)
    code = ExitCode.LEFT
    try:
        async with asyncio.TaskGroup() as scope:
            worker = WorkerService(config, identity, engine, metrics, scope, stop)
            metrics.show(worker.snapshot)
            scope.create_task(worker.run(), name="housekeeping")
            links = [
                RouterLink(address, config.link, trust, worker, Random(f"{identity.incarnation} {address}"))
                for address in config.routers
            ]
            linked = [scope.create_task(link.run(), name=link.address) for link in links]
            if config.engine_listen:
                await _serve_engine(config, info, worker, health, scope)
            await health.ready(True)
            log.info("ready as %s: %s %s, %d KV blocks", worker.role.value, info.kind, info.model.name, info.kv_blocks)

            died = await first(engine.wait_dead(), _none(_leave(worker, health, stop, config.drain_grace_s)))

            await health.ready(False)
            if died is not None:
                code = ExitCode.ENGINE_DIED
                log.error("the engine died: %s", died)
            ending(code)
            # What is still open, because the engine died or grace is over, is for another worker to do.
            worker.fail_all("the worker left before the leg was done" if died is None else f"engine died: {died}")
            for link in links:
                link.close()
            await asyncio.wait(linked, timeout=2 * config.link.close_timeout_s)
            raise _Over
    except* _Over:
        pass
    return code


async def _serve_engine(
    config: WorkerConfig, info: EngineInfo, worker: WorkerService, health: Health, scope: asyncio.TaskGroup
) -> None:
    # Here, as few workers need it.
    from worker.vllm_engine import EnginePort

    engine = EnginePort(config, info, worker, health)
    port = await engine.start()
    log.info("vLLM's engine API on %s:%d", config.engine_listen.rpartition(":")[0], port)
    scope.create_task(engine.run(), name="engine API")


async def _leave(worker: WorkerService, health: Health, stop: asyncio.Event, grace_s: float) -> None:
    """Waits until the worker is told to leave, then drains it, for as long as grace lasts."""
    await stop.wait()
    log.info("draining: no new legs; %s", worker.remains())
    worker.announce_drain()
    await health.ready(False)
    try:
        async with asyncio.timeout(grace_s):
            await worker.drained()
    except TimeoutError:
        log.warning("leaving after %.1f s of grace with %s", grace_s, worker.remains())
    else:
        log.info("drained")


async def _stop(engine: Engine, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await engine.stop()
    except TimeoutError:
        log.error("the engine did not stop within %.1f s", timeout_s)


async def first(*coroutines: Coroutine[object, object, T]) -> T:
    """The result of the one that ends first, or what it raised; the others are cancelled. Earlier ones win a tie."""
    try:
        async with asyncio.TaskGroup() as scope:
            tasks = [scope.create_task(coroutine) for coroutine in coroutines]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return next(task.result() for task in tasks if not task.cancelled())


async def _none(awaitable: Awaitable[object]) -> None:
    await awaitable
