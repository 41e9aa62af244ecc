"""What a worker and an operator see: one real router, scripted workers, real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import control_pb2, worker_link_pb2
from protos import worker_link_pb2_grpc as link_grpc
from router import wire
from router.core.events import StepOutputs
from router.core.limits import CoreLimits
from tests.router.running import BOTH, DECODE, PREFILL, STOP, WAIT_S, Message, Router, hello, proven, running

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest_asyncio.fixture
async def router() -> AsyncIterator[Router]:
    async with running() as router:
        yield router


async def refusal(router: Router, first: Message) -> grpc.aio.AioRpcError:
    call = link_grpc.WorkerLinkStub(router.channel).Connect(timeout=WAIT_S)
    if first.HasField("hello"):
        first = Message(hello=await proven(call, first.hello))
    await call.write(first)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


class TestHello:
    async def test_a_worker_is_welcomed_and_listed(self, router: Router) -> None:
        worker = await router.worker("w", PREFILL, labels={"zone": "a"})
        (welcome,) = await worker.wait_for("welcome")
        assert welcome.welcome.router_id == "router"
        assert welcome.welcome.load_report_interval_s == 0.05
        (listed,) = (await router.status()).workers
        assert (listed.worker_id, listed.state, listed.engine, listed.pid) == ("w", "ready", "scripted 1", 1)
        assert (listed.role, dict(listed.labels)) == (PREFILL, {"zone": "a"})

    async def test_hello_must_come_first(self, router: Router) -> None:
        error = await refusal(router, Message(draining=worker_link_pb2.Draining()))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT

    @pytest.mark.parametrize(
        ("change", "names"),
        [
            ({"model": {"revision": "r1"}}, "model.revision: r0 in the pool, r1 offered"),
            ({"model": {"name": "other"}}, "this router serves nano"),
            ({"model": {"vocab_size": 9}}, "model.vocab_size"),
            ({"kv": {"layout": {"dtype": "bf16"}}}, "kv.layout.dtype: f32 in the pool, bf16 offered"),
            ({"capacity": {"block_tokens": 32}}, "capacity.block_tokens: 16 in the pool, 32 offered"),
        ],
    )
    async def test_a_worker_that_does_not_fit_is_told_the_difference(
        self, router: Router, change: dict[str, object], names: str
    ) -> None:
        await router.worker("w", DECODE)
        error = await refusal(router, Message(hello=hello("x", PREFILL, **change)))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert names in (error.details() or "")
        assert [worker.worker_id for worker in (await router.status()).workers] == ["w"]

    @pytest.mark.parametrize("field", ["worker_id", "incarnation", "role", "model.vocab_size", "capacity.block_tokens"])
    async def test_a_hello_without_facts_is_refused_naming_the_field(self, router: Router, field: str) -> None:
        said = hello("w", BOTH)
        *path, last = field.split(".")
        (getattr(said, path[0]) if path else said).ClearField(last)
        error = await refusal(router, Message(hello=said))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field in (error.details() or "")


class TestLinks:
    async def test_a_newer_stream_of_the_same_worker_replaces_the_older(self, router: Router) -> None:
        old = await router.worker("b")
        call = router.generate(text="x", sampling={"max_tokens": 2})
        (first,) = await old.wait_for("decode")
        new = await router.worker("b", incarnation="i1")
        await old.over.wait()
        (again,) = await new.wait_for("decode")
        assert again.decode.leg_id != first.decode.leg_id
        output = {"leg_id": again.decode.leg_id, "token_ids": [9, 9], "finish_reason": STOP}
        await new.send(step={"outputs": [output]})
        assert [message async for message in call][-1].finished.route.retries == 1
        (listed,) = (await router.status()).workers
        assert listed.incarnation == "i1"

    async def test_a_broken_link_moves_its_requests_at_once(self, router: Router) -> None:
        first = await router.worker("b1")
        call = router.generate(text="x", sampling={"max_tokens": 2})
        await first.wait_for("decode")
        second = await router.worker("b2")
        await router.leave(first)
        await second.wait_for("decode")
        call.cancel()
        await router.is_idle()

    async def test_a_worker_that_closes_its_half_has_left(self, router: Router) -> None:
        worker = await router.worker("b")
        await worker.call.done_writing()
        await router.until(lambda status: not status.workers)
        async with asyncio.timeout(WAIT_S):
            await worker.over.wait()

    async def test_a_worker_that_falls_silent_is_let_go(self) -> None:
        async with running(limits=CoreLimits(silence_s_max=0.4)) as router:
            worker = await router.worker("b")
            async with asyncio.timeout(WAIT_S):
                await worker.over.wait()
            assert not (await router.status()).workers

    async def test_decode_workers_are_told_of_prefill_workers(self, router: Router) -> None:
        decode = await router.worker("d", DECODE)
        await router.worker("p", PREFILL)
        (peers,) = await decode.wait_for("peers")
        assert [(peer.worker_id, peer.kv.address) for peer in peers.peers.peers] == [("p", "p:1")]

    async def test_load_and_lanes_are_shown(self, router: Router) -> None:
        _, decode = await router.pair()
        await decode.send(load={"kv_blocks_free": 7, "kv_blocks_total": 9})
        await decode.send(peer_lane={"peer": "p", "transport": "shm", "gigabytes_per_s": 3.5})
        status = await router.until(lambda status: any(worker.lanes for worker in status.workers))
        listed = next(worker for worker in status.workers if worker.worker_id == "d")
        assert (listed.load.kv_blocks_free, listed.load.kv_blocks_total) == (7, 9)
        assert (listed.lanes[0].peer, listed.lanes[0].transport, listed.lanes[0].gigabytes_per_s) == ("p", "shm", 3.5)

    async def test_open_requests_are_shown_with_where_they_are(self, router: Router) -> None:
        prefill, _ = await router.pair()
        call = router.generate(token_ids={"ids": [5, 6]}, request_id="mine")
        await prefill.wait_for("prefill")
        status = await router.status()
        (request,) = status.requests
        assert (request.request_id, request.state, request.prompt_tokens) == ("mine", "prefilling", 2)
        assert (request.prefill_worker, request.decode_worker) == ("p", "d")
        assert status.requests_running == 1
        call.cancel()
        await router.is_idle()


def test_of_a_step_what_begins_answers_is_told_first_and_alone() -> None:
    outputs = [worker_link_pb2.StepOutput(leg_id=name, token_ids=[number]) for number, name in enumerate("abc")]

    def told(firsts: int, count: int = 3) -> list[list[str]]:
        step = worker_link_pb2.StepOutputs(outputs=outputs[:count], firsts=firsts)
        events = wire.events("w", Message(step=step))
        return [[output.leg_id for output in event.outputs] for event in events if isinstance(event, StepOutputs)]

    assert told(firsts=2) == [["a", "b"], ["c"]]
    for firsts in (0, 3, 9):
        assert told(firsts) == [["a", "b", "c"]]
    assert told(firsts=1, count=0) == [[]]


class TestOperators:
    async def test_a_drain_reaches_the_worker_and_nothing_new_does(self, router: Router) -> None:
        first = await router.worker("b1")
        await router.control.DrainWorker(control_pb2.DrainWorkerRequest(worker_id="b1"))
        await first.wait_for("drain")
        second = await router.worker("b2")
        call = router.generate(text="x")
        await second.wait_for("decode")
        states = {worker.worker_id: worker.state for worker in (await router.status()).workers}
        assert states == {"b1": "draining", "b2": "ready"}
        call.cancel()

    async def test_a_role_order_reaches_the_worker_and_counts_when_it_is_done(self, router: Router) -> None:
        worker = await router.worker("w", PREFILL)
        await router.control.SetWorkerRole(control_pb2.SetWorkerRoleRequest(worker_id="w", role=DECODE))
        (order,) = await worker.wait_for("set_role")
        assert order.set_role.role == DECODE
        assert (await router.status()).workers[0].role == PREFILL
        await worker.send(role_changed={"role": DECODE})
        await router.until(lambda status: status.workers[0].role == DECODE)

    async def test_what_is_not_there_is_not_found_and_no_role_is_no_role(self, router: Router) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.control.DrainWorker(control_pb2.DrainWorkerRequest(worker_id="ghost"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        await router.worker("w")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.control.SetWorkerRole(control_pb2.SetWorkerRoleRequest(worker_id="w"))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    async def test_reflection_lists_and_describes_every_service(self, router: Router) -> None:
        stub = reflection_pb2_grpc.ServerReflectionStub(router.channel)
        names = {"tandem.v1.Inference", "tandem.v1.Control", "tandem.v1.WorkerLink", "grpc.health.v1.Health"}
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            *(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in sorted(names)),
        ]
        listed, *files = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
        assert {service.name for service in listed.list_services_response.service} >= names
        for answer in files:
            assert FileDescriptorProto.FromString(answer.file_descriptor_response.file_descriptor_proto[0]).service


async def health(router: Router, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(router.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def until_health(router: Router, wanted: int) -> None:
    watch = health_pb2_grpc.HealthStub(router.channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
    async for state in watch:
        if state.status == wanted:
            watch.cancel()
            return


class TestHealthAndShutdown:
    async def test_serving_means_that_a_request_could_be_served(self, router: Router) -> None:
        assert await health(router) == NOT_SERVING
        assert await health(router, "tandem.v1.WorkerLink") == SERVING
        await router.worker("p", PREFILL)
        assert await health(router, "tandem.v1.Inference") == NOT_SERVING
        decode = await router.worker("d", DECODE)
        await until_health(router, SERVING)
        await router.leave(decode)
        await until_health(router, NOT_SERVING)

    async def test_what_runs_may_finish_and_what_comes_is_refused(self) -> None:
        async with running(shutdown_grace_s=WAIT_S) as router:
            worker = await router.worker("b")
            call = router.generate(text="x", sampling={"max_tokens": 2})
            (order,) = await worker.wait_for("decode")
            states = aiter(health_pb2_grpc.HealthStub(router.channel).Watch(health_pb2.HealthCheckRequest()))
            assert (await anext(states)).status == SERVING
            router.stop.set()
            assert (await anext(states)).status == NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(router.generate(text="x")))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            output = {"leg_id": order.decode.leg_id, "token_ids": [9, 9], "finish_reason": STOP}
            await worker.send(step={"outputs": [output]})
            assert [message async for message in call][-1].HasField("finished")
            await router.served
            async with asyncio.timeout(WAIT_S):
                await worker.over.wait()

    async def test_what_does_not_finish_in_time_is_told_so(self) -> None:
        async with running(shutdown_grace_s=0.1) as router:
            worker = await router.worker("b")
            call = router.generate(text="x")
            await worker.wait_for("decode")
            router.stop.set()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(call))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "shutting down" in (caught.value.details() or "")
            await worker.wait_for("cancel")
