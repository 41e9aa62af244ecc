"""A worker and a router over real gRPC; the engine does what the test says."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest

from decode.admission import DecodeLimits
from engine.base import FailureKind, LegError
from prefill.admission import PrefillLimits
from protos import worker_link_pb2 as pb
from tests.certificates import Authority
from tests.worker.running import RunningWorker, running_worker, worker_config
from tests.worker.scripted_engine import INFO, ScriptedEngine, transfer_failed
from tests.worker.scripted_router import Link, ScriptedRouter, sampling, scripted_router
from trust.join import join_key
from trust.tls import PLAINTEXT, TlsFiles
from worker import messages
from worker.config import Role, WorkerConfig
from worker.link import RouterLink, Trust
from worker.metrics import WorkerMetrics
from worker.outbox import Outbox
from worker.service import Identity, ProtocolError, WorkerService


@dataclass
class Linked:
    engine: ScriptedEngine
    router: ScriptedRouter
    worker: RunningWorker
    link: Link


@asynccontextmanager
async def linked(role: Role = Role.BOTH, **config: Any) -> AsyncIterator[Linked]:
    engine = ScriptedEngine()
    async with scripted_router() as router:
        config_ = worker_config(router.address, role=role, **config)
        async with running_worker(config_, engine) as worker:
            yield Linked(engine, router, worker, await router.link())


@asynccontextmanager
async def two_routers(engine: ScriptedEngine) -> AsyncIterator[tuple[ScriptedRouter, ScriptedRouter]]:
    async with scripted_router() as one, scripted_router() as two:
        config = worker_config(one.address, two.address)
        async with running_worker(config, engine):
            yield one, two


def failure(message: pb.WorkerMessage) -> tuple[str, str, str]:
    assert message.HasField("leg_failed"), message
    failed = message.leg_failed
    return failed.leg_id, pb.Failure.Name(failed.failure), failed.detail


async def test_hello_says_who_and_what() -> None:
    async with linked(Role.DECODE) as at:
        hello = at.link.hello
        assert (hello.worker_id, hello.role, dict(hello.labels)) == ("w0", pb.ROLE_DECODE, {"zone": "a"})
        assert hello.capacity == pb.Capacity(prefill_legs=4, decode_legs=4, kv_blocks=100, block_tokens=16)
        assert len(hello.incarnation) == 16


async def test_load_is_reported_at_the_interval_the_router_asks() -> None:
    async with linked() as at:
        at.engine.leases.add(b"x")
        await at.link.settled()
        assert (await at.link.next_load()).leases_held == 1


async def test_a_load_report_that_fails_is_left_out() -> None:
    async with linked() as at:
        at.engine.failing["load"] = LegError(FailureKind.ENGINE, "dying")
        at.link.prefill("a/1/p")
        assert (await at.link.next()).HasField("prefill_done")
        del at.engine.failing["load"]
        await at.link.next_load()


async def test_prefill_done_carries_the_handle_and_the_engine_gets_the_whole_order() -> None:
    async with linked(Role.PREFILL) as at:
        at.link.prefill("a/1/p", hand_off=True, reader="d0", cache_salt=b"\x01", timeout_s=3.0)
        done = (await at.link.next()).prefill_done
        assert (done.leg_id, done.token_id, done.handle) == ("a/1/p", 7, b"handle of a/1/p~1")
        leg = at.engine.legs["a/1/p"]
        assert (leg.tenant, leg.token_ids, leg.cache_salt) == ("t", (1, 2, 3), "01")


async def test_decode_tells_the_fetch_then_the_tokens() -> None:
    async with linked(Role.DECODE) as at:
        at.link.decode("a/1/d", handle=b"h")
        fetched = (await at.link.next()).fetched
        assert (fetched.leg_id, fetched.transport, fetched.bytes) == ("a/1/d", "scripted", 48)
        await at.engine.until("begun decode a/1/d")
        at.engine.push("a/1/d", 5)
        at.engine.push("a/1/d", 6, end=True)
        assert await at.link.outputs("a/1/d") == [5, 6]


async def test_one_engine_step_is_one_message() -> None:
    names = [f"{n}/1/d" for n in range(64)]
    async with linked(Role.DECODE, decode=DecodeLimits(legs=64, fetches=1, fetch_timeout_s=5)) as at:
        for name in names:
            at.link.decode(name)
        await at.engine.until(f"begun decode {names[-1]}")
        for step in range(3):
            for name in names:
                at.engine.push(name, step, end=step == 2)
            message = await at.link.next()
            assert [out.leg_id for out in message.step.outputs] == names


async def test_what_cannot_be_done_here_is_rejected_at_once() -> None:
    async with linked(Role.DECODE) as at:
        at.link.prefill("a/1/p")
        assert failure(await at.link.next()) == ("a/1/p", "FAILURE_REJECTED", "the role here is decode")
        for n in range(5):
            at.link.decode(f"{n}/1/d")
        assert failure(await at.link.next()) == ("4/1/d", "FAILURE_REJECTED", "decode is full: 4 of 4 legs")
    async with linked(Role.PREFILL) as at:
        at.link.decode("a/1/d")
        assert failure(await at.link.next()) == ("a/1/d", "FAILURE_REJECTED", "the role here is prefill")
        at.engine.held.add("prefill")
        for n in range(5):
            at.link.prefill(f"{n}/1/p")
        assert failure(await at.link.next()) == ("4/1/p", "FAILURE_REJECTED", "prefill is full: 4 of 4 legs")


async def test_failures_keep_their_kind() -> None:
    async with linked() as at:
        at.link.decode("a/1/d", token_ids=[])
        assert failure(await at.link.next()) == ("a/1/d", "FAILURE_INVALID", "token_ids: empty")
        at.link.decode("b/1/d", sampling=sampling(max_tokens=-1))
        assert failure(await at.link.next())[1] == "FAILURE_INVALID"
        at.link.prefill("c/1/p", timeout_s=0.0)
        assert failure(await at.link.next())[1] == "FAILURE_EXPIRED"
        at.engine.failing["fetch"] = transfer_failed()
        at.link.decode("d/1/d", handle=b"h")
        assert failure(await at.link.next()) == ("d/1/d", "FAILURE_TRANSFER", "the lease did not hold")
        at.engine.failing["prefill"] = LegError(FailureKind.INVALID, "token 5000 is not in the vocabulary")
        at.link.prefill("e/1/p")
        assert failure(await at.link.next())[1] == "FAILURE_INVALID"
        at.engine.failing["prefill"] = ZeroDivisionError("a fault")
        at.link.prefill("f/1/p")
        assert failure(await at.link.next()) == ("f/1/p", "FAILURE_ENGINE", "ZeroDivisionError: a fault")


async def test_tokens_come_before_the_failure_that_ends_their_leg() -> None:
    async with linked() as at:
        at.link.decode("a/1/d")
        await at.engine.until("begun decode a/1/d")
        at.engine.push("a/1/d", 5)
        at.engine.push_error("a/1/d", LegError(FailureKind.ENGINE, "out of memory"))
        assert (await at.link.next()).step.outputs[0].token_ids == [5]
        assert failure(await at.link.next()) == ("a/1/d", "FAILURE_ENGINE", "out of memory")


async def test_an_order_that_expires_in_the_queue_never_reaches_the_engine() -> None:
    async with linked(Role.PREFILL) as at:
        at.engine.held.add("prefill")
        at.link.prefill("a/1/p")
        at.link.prefill("b/1/p")
        await at.engine.until("begun prefill b/1/p")
        at.link.prefill("c/1/p", timeout_s=0.02)
        assert failure(await at.link.next())[:2] == ("c/1/p", "FAILURE_EXPIRED")
        assert "prefill c/1/p" not in at.engine.begun


@pytest.mark.parametrize("step", ["prefill", "fetch"])
async def test_cancel_stops_a_leg_wherever_it_is(step: str) -> None:
    async with linked() as at:
        at.engine.held.add(step)
        leg = {"prefill": at.link.prefill, "fetch": at.link.decode}[step]
        begun = {"prefill": "prefill a/1/x", "fetch": "fetch h"}[step]
        leg("a/1/x", **({"handle": b"h"} if step == "fetch" else {}))
        await at.engine.until(f"begun {begun}")
        at.link.cancel("a/1/x")
        await at.engine.until(f"aborted {begun}")
        await at.link.settled()
        assert at.link.terminals("a/1/x") == 0


async def test_cancel_while_decoding_aborts_in_the_engine() -> None:
    async with linked() as at:
        at.link.decode("a/1/d")
        await at.engine.until("begun decode a/1/d")
        at.engine.push("a/1/d", 5)
        assert (await at.link.next()).HasField("step")
        at.link.cancel("a/1/d")
        await at.engine.until("aborted decode a/1/d")
        await at.link.settled()
        assert at.link.terminals("a/1/d") == 0


async def test_cancel_in_the_queue_gives_the_place_back() -> None:
    async with linked(Role.PREFILL) as at:
        at.engine.held.add("prefill")
        for n in range(4):
            at.link.prefill(f"{n}/1/p")
        await at.engine.until("begun prefill 1/1/p")
        at.link.cancel("3/1/p")
        await at.link.settled()
        at.link.prefill("4/1/p")
        await at.link.settled()
        await at.engine.let_go("prefill")
        await at.engine.until("done prefill 4/1/p")
        assert "prefill 3/1/p" not in at.engine.begun


async def test_a_cancelled_leg_makes_room_at_once_though_not_without_bound() -> None:
    """A router fills a leg's place as soon as it has sent the cancel; the engine may take longer to let go."""
    async with linked(Role.PREFILL, prefill=PrefillLimits(running=2, queued=0, lease_ttl_s=5)) as at:
        at.engine.held |= {"prefill", "abort"}
        at.link.prefill("a/1/p")
        at.link.prefill("b/1/p")
        await at.engine.until("begun prefill b/1/p")
        at.link.cancel("a/1/p")
        at.link.prefill("c/1/p")
        await at.link.settled()
        assert at.link.terminals("c/1/p") == 0
        at.link.cancel("b/1/p")
        at.link.prefill("d/1/p")
        assert failure(await at.link.next())[1:] == ("FAILURE_REJECTED", "2 legs that ended are still in the engine")
        await at.engine.let_go("abort")
        await at.engine.until("begun prefill c/1/p")
        at.link.prefill("e/1/p")
        await at.engine.until("begun prefill e/1/p")


async def test_a_cancel_that_crosses_the_answer_ends_the_lease() -> None:
    async with linked() as at:
        at.link.prefill("a/1/p", hand_off=True)
        assert (await at.link.next()).HasField("prefill_done")
        assert at.engine.leases
        at.link.cancel("a/1/p")
        at.link.cancel("never/1/p")
        await at.link.settled()
        assert not at.engine.leases


async def test_the_router_can_end_a_lease() -> None:
    async with linked() as at:
        at.link.prefill("a/1/p", hand_off=True)
        handle = (await at.link.next()).prefill_done.handle
        at.link.send(release=pb.ReleaseLease(handle=handle))
        await at.link.settled()
        assert at.engine.released == [handle]


async def test_when_the_router_is_lost_its_legs_and_leases_end_and_the_worker_comes_back() -> None:
    async with linked() as at:
        at.link.prefill("done/1/p", hand_off=True)
        assert (await at.link.next()).HasField("prefill_done")
        at.engine.held |= {"prefill", "fetch"}
        at.link.prefill("a/1/p")
        at.link.decode("b/1/d", handle=b"h")
        at.link.decode("c/1/d")
        await at.engine.until("begun prefill a/1/p")
        await at.engine.until("begun fetch h")
        await at.engine.until("begun decode c/1/d")
        at.link.close()
        again = await at.router.link()
        assert again.hello.proof != at.link.hello.proof
        again.hello.proof = at.link.hello.proof
        assert again.hello == at.link.hello
        assert set(at.engine.aborted) == {"prefill a/1/p", "fetch h", "decode c/1/d"}
        await again.settled()
        assert not at.engine.leases
        load = await again.next_load()
        assert (load.prefill_running, load.decode_running) == (0, 0)
        again.prefill("a/1/p")  # the same name as a leg of the link before
        await at.engine.let_go("prefill")
        assert (await again.next()).prefill_done.leg_id == "a/1/p"


async def test_a_router_that_starts_anew_on_its_port_is_found() -> None:
    async with scripted_router() as router:
        engine = ScriptedEngine()
        async with running_worker(worker_config(router.address), engine):
            await router.link()
            port = int(router.address.rpartition(":")[2])
            await router.stop()
            async with scripted_router(port) as anew:
                link = await anew.link()
                link.prefill("a/1/p")
                assert (await link.next()).HasField("prefill_done")


async def test_a_router_that_does_not_say_welcome_is_left() -> None:
    async with scripted_router() as router:
        router.welcoming = False
        async with running_worker(worker_config(router.address), ScriptedEngine()):
            link = await router.link()
            link.prefill("a/1/p")
            await asyncio.wait_for(link.over.wait(), 60)
            router.welcoming = True
            await (await router.link()).next_load()


async def test_a_leg_ordered_twice_breaks_the_link_and_not_the_worker() -> None:
    async with linked() as at:
        for _ in range(2):
            at.link.decode("a/1/d")
        await asyncio.wait_for(at.link.over.wait(), 60)
        await at.router.link()


async def test_a_router_that_does_not_read_is_left_when_the_outbox_is_full(caplog: pytest.LogCaptureFixture) -> None:
    async with linked(outbox_max=64) as at:
        await at.link.next_load()
        at.link.reading.clear()
        wide = "x" * 1500  # an id that fills the stream's window sooner
        while not at.link.over.is_set():
            for n in range(100):
                at.link.decode(f"{n}{wide}", token_ids=[])
            await asyncio.sleep(0.01)
        at.link.reading.set()
        await at.router.link()
        assert "the outbox is full" in caplog.text


async def test_two_routers_do_not_see_each_others_legs() -> None:
    engine = ScriptedEngine()
    async with two_routers(engine) as (one, two):
        links = [await one.link(), await two.link()]
        engine.held.add("prefill")
        for link in links:
            link.prefill("a/1/p", hand_off=True)
            link.prefill("b/1/p")
            await link.settled()
        links[0].cancel("b/1/p")
        await links[0].settled()
        await engine.let_go("prefill")
        handles = [(await link.next()).prefill_done.handle for link in links]
        assert (await links[1].next()).prefill_done.leg_id == "b/1/p"
        assert engine.leases == set(handles)
        assert len(engine.leases) == 2
        links[0].close()
        await one.link()
        await links[1].settled()
        assert engine.leases == {handles[1]}


async def test_peers_are_met_and_their_lanes_told() -> None:
    async with linked() as at:
        endpoint = pb.KvEndpoint(address="h:1", incarnation="i")
        at.link.send(peers=pb.Peers(peers=[pb.Peer(worker_id="w0", kv=endpoint), pb.Peer(worker_id="p0", kv=endpoint)]))
        lane = (await at.link.next()).peer_lane
        assert (lane.peer, lane.transport, lane.gigabytes_per_s) == ("p0", "scripted", 1.5)
        assert at.engine.met == [("p0", "h:1")]


async def test_a_role_changes_without_a_restart() -> None:
    async with linked(Role.PREFILL) as at:
        at.engine.held.add("prefill")
        at.link.prefill("a/1/p")
        await at.engine.until("begun prefill a/1/p")
        at.link.send(set_role=pb.SetRole(role=pb.ROLE_DECODE))
        assert (await at.link.next()).role_changed.role == pb.ROLE_DECODE
        at.link.prefill("b/1/p")
        assert failure(await at.link.next()) == ("b/1/p", "FAILURE_REJECTED", "the role here is decode")
        at.link.decode("c/1/d")
        await at.engine.until("begun decode c/1/d")
        await at.engine.let_go("prefill")
        assert (await at.link.next()).prefill_done.leg_id == "a/1/p"
        at.link.close()
        assert (await at.router.link()).hello.role == pb.ROLE_DECODE


async def test_every_router_hears_of_a_new_role() -> None:
    async with two_routers(ScriptedEngine()) as (one, two):
        links = [await one.link(), await two.link()]
        for link in links:
            await link.next_load()
        links[0].send(set_role=pb.SetRole(role=pb.ROLE_DECODE))
        for link in links:
            assert (await link.next()).role_changed.role == pb.ROLE_DECODE


async def test_a_message_of_a_newer_router_is_ignored() -> None:
    async with linked() as at:
        at.link.send()
        at.link.prefill("a/1/p")
        assert (await at.link.next()).HasField("prefill_done")


async def test_a_prompt_of_the_longest_contexts_fits_a_message() -> None:
    async with linked() as at:
        at.link.prefill("a/1/p", token_ids=[200_000] * 2_000_000)
        assert (await at.link.next()).HasField("prefill_done")
        assert len(at.engine.legs["a/1/p"].token_ids) == 2_000_000


async def test_a_router_that_refuses_the_stream_is_dialled_again() -> None:
    async with scripted_router() as router:
        router.refusing = grpc.StatusCode.CANCELLED
        async with running_worker(worker_config(router.address), ScriptedEngine()):
            await router.link()
            await router.link()
            router.refusing = None
            while True:
                link = await router.link()
                if not link.over.is_set():
                    break
            await link.next_load()


async def test_a_link_that_breaks_as_it_is_cancelled_ends() -> None:
    engine = ScriptedEngine()
    async with scripted_router() as router:
        config = worker_config(router.address)
        task: asyncio.Task[None]

        class Breaking(WorkerService):
            def handle(self, router: Outbox, message: messages.Message) -> None:
                task.cancel()
                raise ProtocolError("at the same moment")

        async with asyncio.TaskGroup() as scope:
            identity = Identity(worker_id="w0", incarnation="i", info=INFO)
            worker = Breaking(config, identity, engine, WorkerMetrics("w0"), scope, asyncio.Event())
            task = scope.create_task(
                RouterLink(router.address, config.link, Trust(router.key), worker, Random(0)).run()
            )
            (await router.link()).cancel("any")
            async with asyncio.timeout(60):
                await asyncio.wait([task])
        assert task.cancelled()


async def test_a_router_without_the_secret_hears_nothing_but_a_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with scripted_router() as rogue:
        rogue.key = b"made up"
        async with running_worker(worker_config(rogue.address), ScriptedEngine()):
            async with asyncio.timeout(60):
                while caplog.text.count("did not prove that it knows the cluster's secret") < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)  # what is watched is a log
            assert not rogue.greeted
            rogue.key = join_key(b"secret")
            assert (await rogue.link()).hello.worker_id == "w0"


async def test_a_router_that_asks_for_no_proof_is_no_router(caplog: pytest.LogCaptureFixture) -> None:
    async with scripted_router() as rogue:
        rogue.key = b""
        async with running_worker(worker_config(rogue.address), ScriptedEngine()):
            async with asyncio.timeout(60):
                while "did not prove" not in caplog.text:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)  # what is watched is a log
            assert not rogue.greeted


async def test_over_tls_the_routers_certificate_must_be_good(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    authority, others = Authority(tmp_path / "ca"), Authority(tmp_path / "others")
    files = authority.issue("router", require_client_cert=True)
    async with scripted_router(tls=files) as router:
        good = authority.issue("worker")
        for wrong in (replace(good, ca=str(others.ca)), PLAINTEXT):
            async with running_worker(tls_config(router.address, wrong), ScriptedEngine()):
                async with asyncio.timeout(60):
                    while f"router {router.address}: UNAVAILABLE" not in caplog.text:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)  # what is watched is a log
            caplog.clear()
            assert not router.greeted
        async with running_worker(tls_config(router.address, good), ScriptedEngine()):
            assert (await router.link()).hello.worker_id == "w0"
        router.key = b""  # its certificate says who it is
        async with running_worker(tls_config(router.address, good), ScriptedEngine()):
            assert (await router.link()).hello.worker_id == "w0"
        router.key = b"made up"
        async with running_worker(tls_config(router.address, good), ScriptedEngine()):
            async with asyncio.timeout(60):
                while "did not prove" not in caplog.text:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)  # what is watched is a log


def tls_config(address: str, tls: TlsFiles) -> WorkerConfig:
    config = worker_config(address)
    return replace(config, engine_options=replace(config.engine_options, tls=tls))
