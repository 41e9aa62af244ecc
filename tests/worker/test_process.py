"""A worker from loading to its end, without the signals: those are in test_main.py."""

import asyncio
import re
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.base import FailureKind, LegError
from protos import worker_link_pb2 as pb
from tests.worker.running import RunningWorker, running_worker, worker_config
from tests.worker.scripted_engine import ScriptedEngine
from tests.worker.scripted_router import Link, ScriptedRouter, scripted_router
from worker.config import Role
from worker.process import ExitCode, first


@pytest.fixture
async def engine() -> ScriptedEngine:
    return ScriptedEngine()


Serving = tuple[RunningWorker, Link, ScriptedRouter]


@asynccontextmanager
async def serving(engine: ScriptedEngine, **config: Any) -> AsyncIterator[Serving]:
    async with scripted_router() as router, running_worker(worker_config(router.address, **config), engine) as worker:
        yield worker, await router.link(), router


async def drain_announced(worker: RunningWorker, link: Link) -> None:
    worker.stop.set()
    assert (await link.next()).HasField("draining")


async def test_an_idle_worker_leaves_at_once(engine: ScriptedEngine) -> None:
    async with serving(engine) as (worker, link, _):
        await drain_announced(worker, link)
        assert await worker.exit_code() is ExitCode.LEFT
        assert worker.endings == [ExitCode.LEFT]
        assert engine.stopped
        await asyncio.wait_for(link.over.wait(), 60)


async def test_a_router_can_send_a_worker_away(engine: ScriptedEngine) -> None:
    async with serving(engine) as (worker, link, _):
        link.send(drain=pb.Drain())
        assert (await link.next()).HasField("draining")
        assert await worker.exit_code() is ExitCode.LEFT


async def test_a_draining_worker_finishes_its_legs_and_takes_no_more(engine: ScriptedEngine) -> None:
    async with serving(engine) as (worker, link, _):
        engine.held.add("prefill")
        link.prefill("a/1/p")
        link.decode("b/1/d")
        await engine.until("begun prefill a/1/p")
        await engine.until("begun decode b/1/d")
        await drain_announced(worker, link)
        link.prefill("c/1/p")
        failed = (await link.next()).leg_failed
        assert (failed.leg_id, failed.failure, failed.detail) == ("c/1/p", pb.FAILURE_REJECTED, "draining")
        await engine.let_go("prefill")
        assert (await link.next()).prefill_done.leg_id == "a/1/p"
        engine.push("b/1/d", 5)
        engine.push("b/1/d", 6, end=True)
        assert await link.outputs("b/1/d") == [5, 6]
        assert await worker.exit_code() is ExitCode.LEFT


async def test_a_drain_waits_for_pinned_leases(engine: ScriptedEngine) -> None:
    async with serving(engine, role=Role.PREFILL) as (worker, link, _):
        link.prefill("a/1/p", hand_off=True)
        assert (await link.next()).HasField("prefill_done")
        await drain_announced(worker, link)
        await link.settled()
        await asyncio.sleep(0.1)
        assert not worker.task.done()
        assert not engine.stopped
        engine.leases.clear()  # the reader has released it
        assert await worker.exit_code() is ExitCode.LEFT


async def test_what_is_open_when_grace_ends_is_for_another_worker(engine: ScriptedEngine) -> None:
    async with serving(engine, role=Role.DECODE, drain_grace_s=0.05) as (worker, link, _):
        link.decode("a/1/d")
        await engine.until("begun decode a/1/d")
        await drain_announced(worker, link)
        failed = (await link.next()).leg_failed
        assert (failed.leg_id, failed.failure) == ("a/1/d", pb.FAILURE_ENGINE)
        assert await worker.exit_code() is ExitCode.LEFT
        assert engine.aborted == ["decode a/1/d"]


async def test_a_router_that_links_to_a_draining_worker_is_told(engine: ScriptedEngine) -> None:
    async with serving(engine) as (worker, link, router):
        link.decode("a/1/d")
        await engine.until("begun decode a/1/d")
        engine.leases.add(b"someone else's")
        await drain_announced(worker, link)
        link.close()
        again = await router.link()
        assert (await again.next()).HasField("draining")
        engine.leases.clear()
        assert await worker.exit_code() is ExitCode.LEFT


async def test_a_worker_leaves_without_any_router(engine: ScriptedEngine) -> None:
    async with running_worker(worker_config("127.0.0.1:1"), engine) as worker:
        await engine.until("done start")
        worker.stop.set()
        assert await worker.exit_code() is ExitCode.LEFT


async def test_a_worker_told_to_leave_while_it_loads_leaves(engine: ScriptedEngine) -> None:
    engine.held.add("start")
    async with running_worker(worker_config("127.0.0.1:1"), engine) as worker:
        await engine.until("begun start")
        worker.stop.set()
        assert await worker.exit_code() is ExitCode.LEFT
        assert engine.aborted == ["start"]
        assert engine.stopped


async def test_an_engine_that_does_not_start_ends_the_worker(
    engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.failing["start"] = FileNotFoundError("no such model: /m")
    async with running_worker(worker_config("127.0.0.1:1"), engine) as worker:
        assert await worker.exit_code() is ExitCode.ENGINE_DID_NOT_START
        assert "no such model: /m" in caplog.text
        assert engine.stopped


async def test_no_router_hears_of_a_worker_that_loads(engine: ScriptedEngine) -> None:
    engine.held.add("start")
    async with scripted_router() as router, running_worker(worker_config(router.address), engine):
        await engine.until("begun start")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(router.link(), 0.1)
        await engine.let_go("start")
        await router.link()


async def test_when_the_engine_dies_every_leg_is_failed_and_the_worker_ends(
    engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(engine) as (worker, link, _):
        engine.held.add("prefill")
        link.prefill("a/1/p")
        link.decode("b/1/d")
        await engine.until("begun prefill a/1/p")
        await engine.until("begun decode b/1/d")
        engine.die("device lost")
        failures = {(await link.next()).leg_failed.leg_id, (await link.next()).leg_failed.leg_id}
        assert failures == {"a/1/p", "b/1/d"}
        assert {message.leg_failed.failure for message in link.received if message.HasField("leg_failed")} == {
            pb.FAILURE_ENGINE
        }
        assert await worker.exit_code() is ExitCode.ENGINE_DIED
        assert worker.endings == [ExitCode.ENGINE_DIED]
        assert "the engine died: device lost" in caplog.text
        assert [link.terminals(leg) for leg in ("a/1/p", "b/1/d")] == [1, 1]


async def test_an_engine_that_dies_during_a_drain_is_noticed(engine: ScriptedEngine) -> None:
    async with serving(engine) as (worker, link, _):
        link.decode("b/1/d")
        await engine.until("begun decode b/1/d")
        await drain_announced(worker, link)
        engine.failing["load"] = LegError(FailureKind.ENGINE, "device lost")
        engine.push("b/1/d", 5, end=True)
        assert await link.outputs("b/1/d") == [5]
        await asyncio.sleep(0.1)
        engine.die("device lost")
        assert await worker.exit_code() is ExitCode.ENGINE_DIED


async def test_an_engine_that_does_not_stop_is_left(engine: ScriptedEngine, caplog: pytest.LogCaptureFixture) -> None:
    engine.held.add("stop")
    async with serving(engine, stop_timeout_s=0.05) as (worker, link, _):
        await drain_announced(worker, link)
        assert await worker.exit_code() is ExitCode.LEFT
        assert "the engine did not stop within" in caplog.text


async def test_a_router_that_does_not_hang_up_cannot_keep_a_worker(engine: ScriptedEngine) -> None:
    async with serving(engine) as (worker, link, _):
        link.reading.clear()
        worker.stop.set()
        assert await worker.exit_code() is ExitCode.LEFT


async def test_health_follows_the_worker(engine: ScriptedEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    engine.held |= {"start", "stop"}
    async with scripted_router() as router:
        config = worker_config(router.address, health_address="127.0.0.1:0")
        async with running_worker(config, engine) as worker:
            await engine.until("begun start")
            async with grpc.aio.insecure_channel(f"127.0.0.1:{ports(caplog)[0]}") as channel:
                stub = health_pb2_grpc.HealthStub(channel)

                async def serving(service: str) -> bool:
                    reply = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
                    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

                assert not await serving("readiness")
                assert await serving("liveness")
                await engine.let_go("start")
                await router.link()
                assert await serving("readiness")
                assert await serving("")
                worker.stop.set()
                await engine.until("begun stop")
                assert not await serving("readiness")
                assert not await serving("")
                assert await serving("liveness")
                await engine.let_go("stop")
            assert await worker.exit_code() is ExitCode.LEFT


async def test_metrics_tell_what_became_of_legs(engine: ScriptedEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with serving(engine, metrics_address="127.0.0.1:0") as (_worker, link, _):
        link.prefill("a/1/p")
        link.decode("b/1/d", handle=b"h")
        await engine.until("begun decode b/1/d")
        await link.settled()
        text = await asyncio.to_thread(scrape, ports(caplog)[1])
        for line in (
            'tandem_worker_legs_ended_total{outcome="served",role="prefill",worker="w0"} 1.0',
            'tandem_worker_fetched_bytes_total{transport="scripted",worker="w0"} 48.0',
            'tandem_worker_fetch_seconds_count{transport="scripted",worker="w0"} 1.0',
            'tandem_worker_decode_legs{worker="w0"} 1.0',
            'tandem_worker_links{worker="w0"} 1.0',
            'tandem_worker_kv_blocks_free{worker="w0"} 100.0',
        ):
            assert line in text.splitlines()


def ports(caplog: pytest.LogCaptureFixture) -> tuple[int, int]:
    """Of health and metrics, as the worker says at its start."""
    [found] = re.findall(r"health port (\d+), metrics port (\d+)", caplog.text)
    return int(found[0]), int(found[1])


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
        return str(reply.read().decode())


async def test_first_returns_the_first_and_cancels_the_rest() -> None:
    ended: list[str] = []

    async def run(name: str, seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
        finally:
            ended.append(name)
        return name

    assert await first(run("slow", 60), run("fast", 0)) == "fast"
    assert ended == ["fast", "slow"]


async def test_first_raises_what_the_first_raised() -> None:
    async def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        await first(fail(), asyncio.sleep(60))
