"""Load reports, health and reflection: what generic gRPC clients ask of a router, over real gRPC."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from protos import inference_pb2, inference_pb2_grpc
from protos.compat import (
    kserve_pb2,
    kserve_pb2_grpc,
    orca_service_pb2,
    orca_service_pb2_grpc,
    vllm_engine_pb2,
    vllm_engine_pb2_grpc,
)
from protos.compat.orca_report_pb2 import OrcaLoadReport
from router.core.lifecycle import State
from router.core.snapshot import Snapshot
from router.edge.orca import LoadReports
from tests.router.running import DECODE, PREFILL, WAIT_S, Router, running
from tests.router.test_edge import ANSWER, sampling
from tests.router.test_kserve import asked, stub
from tests.router.test_vllm_engine import request as engine_request

SERVICES = ("", "tandem.v1.Inference", "inference.GRPCInferenceService", "vllm.grpc.engine.VllmEngine")
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest_asyncio.fixture
async def router() -> AsyncIterator[Router]:
    async with running() as router:
        yield router


class TestLoad:
    async def test_reports_follow_what_runs(self, router: Router) -> None:
        stream = reports(router)
        empty = await anext(stream)
        assert empty.application_utilization == 1.0, "without a worker nothing can be served"
        decode = await router.worker("d", DECODE)
        await router.worker("p", PREFILL, answer=ANSWER)
        idle = await until(stream, lambda report: report.application_utilization == 0)
        assert dict(idle.named_metrics) == {
            "prefill_utilization": 0,
            "decode_utilization": 0,
            "kv_utilization": idle.named_metrics["kv_utilization"],
        }
        call = router.generate(text="x", sampling=sampling())
        await decode.wait_for("decode")
        busy = await until(stream, lambda report: report.named_metrics["decode_utilization"] > 0)
        assert busy.application_utilization == busy.named_metrics["decode_utilization"] == 1 / 8
        call.cancel()

    @pytest.mark.parametrize("protocol", ["native", "kserve", "kserve stream", "vllm engine"])
    async def test_weighted_round_robin_sends_less_to_who_has_more_to_do(self, protocol: str) -> None:
        """By the reports that come with answers. gRPC's client keeps them to itself, so its choices have to show it."""
        async with running() as idle, running() as busy:
            held = []
            for router, count in ((idle, 1), (busy, 6)):
                worker = await router.worker("b")
                held += [router.generate(text="x", sampling=sampling()) for _ in range(count)]
                await worker.wait_for("decode", count)
                worker.answer, worker.serving = ANSWER, True
            async with balanced(idle, busy) as channel, asyncio.timeout(WAIT_S):
                done: list[int] = []
                while not (len(done) > 1 and done[0] > 30 and done[0] > 3 * done[1]):
                    before = await finished(idle), await finished(busy)
                    for _ in range(40):
                        await ask(channel, protocol)
                    done = [
                        now - then
                        for now, then in zip((await finished(idle), await finished(busy)), before, strict=True)
                    ]
            for call in held:
                call.cancel()

    def test_rates_are_per_second_of_what_ended_and_what_ended_badly(self) -> None:
        now = 0.0
        outcomes = dict.fromkeys(State, 0)

        def snapshot() -> Snapshot:
            return Snapshot(workers=(), queued=3, running=0, queued_tokens=0, requests=(), outcomes=dict(outcomes))

        loads = LoadReports(snapshot, clock=lambda: now)
        loads.report()
        outcomes[State.FINISHED], outcomes[State.REFUSED], outcomes[State.CANCELLED] = 6, 3, 1
        now = 2.0
        report = OrcaLoadReport.FromString(loads.report())
        assert (report.rps_fractional, report.eps) == (5.0, 1.5)
        outcomes[State.FINISHED] = 1000
        now = 2.05
        assert OrcaLoadReport.FromString(loads.report()) == report, "made anew at every call"


@asynccontextmanager
async def balanced(*routers: Router) -> AsyncIterator[grpc.aio.Channel]:
    policy = {"blackoutPeriod": "0s", "weightUpdatePeriod": "0.1s", "enableOobLoadReport": False}
    config = json.dumps({"loadBalancingConfig": [{"weighted_round_robin": policy}]})
    options = [("grpc.service_config", config), ("grpc.use_local_subchannel_pool", 1)]
    target = "ipv4:" + ",".join(f"127.0.0.1:{router.bound.port}" for router in routers)
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        yield channel


async def finished(router: Router) -> int:
    return (await router.status()).outcomes["finished"]


async def ask(channel: grpc.aio.Channel, protocol: str) -> None:
    """For one answer, read to its end."""
    kserve = kserve_pb2_grpc.GRPCInferenceServiceStub(channel)
    calls: dict[str, Callable[[], AsyncIterable[object]]] = {
        "native": lambda: inference_pb2_grpc.InferenceStub(channel).Generate(
            inference_pb2.GenerateRequest(text="x", sampling=sampling())
        ),
        "kserve stream": lambda: kserve.ModelStreamInfer(iter([asked()])),
        "vllm engine": lambda: vllm_engine_pb2_grpc.VllmEngineStub(channel).Generate(engine_request()),
    }
    if protocol == "kserve":
        await kserve.ModelInfer(asked())
    else:
        async for _ in calls[protocol]():
            pass


async def until(stream: AsyncIterator[OrcaLoadReport], holds: object) -> OrcaLoadReport:
    async with asyncio.timeout(WAIT_S):
        async for report in stream:
            if holds(report):  # type: ignore[operator]
                return report
    raise AssertionError("the stream ended")


async def reports(router: Router) -> AsyncIterator[OrcaLoadReport]:
    request = orca_service_pb2.OrcaLoadReportRequest()
    request.report_interval.nanos = 1_000_000
    async for report in orca_service_pb2_grpc.OpenRcaServiceStub(router.channel).StreamCoreMetrics(request):
        yield report


class TestHealth:
    async def test_each_service_serves_while_its_requests_could_be(self, router: Router) -> None:
        assert await health(router) == dict.fromkeys(SERVICES, NOT_SERVING)
        worker = await router.worker("b", answer=ANSWER)
        assert await health(router) == dict.fromkeys(SERVICES, SERVING)
        await router.leave(worker)
        await router.until(lambda status: not status.workers)
        assert await health(router) == dict.fromkeys(SERVICES, NOT_SERVING)

    async def test_a_router_that_stops_says_so_first(self) -> None:
        async with running(shutdown_grace_s=WAIT_S) as router:
            await router.worker("b")
            watch = health_pb2_grpc.HealthStub(router.channel).Watch(health_pb2.HealthCheckRequest(service=SERVICES[2]))
            call = stub(router).ModelStreamInfer(iter([asked()]), timeout=WAIT_S)
            await router.until(lambda status: len(status.requests) == 1)
            seen = aiter(watch)
            assert (await anext(seen)).status == SERVING
            router.stop.set()
            assert (await anext(seen)).status == NOT_SERVING
            call.cancel()


async def health(router: Router) -> dict[str, int]:
    check = health_pb2_grpc.HealthStub(router.channel).Check
    return {name: (await check(health_pb2.HealthCheckRequest(service=name))).status for name in SERVICES}


class TestReflection:
    async def test_a_generic_client_finds_every_service_and_its_messages(self, router: Router) -> None:
        def look() -> tuple[set[str], dict[str, int]]:
            with grpc.insecure_channel(f"127.0.0.1:{router.bound.port}") as channel:
                database = ProtoReflectionDescriptorDatabase(channel)
                pool = descriptor_pool.DescriptorPool(database)
                services = set(database.get_services())
                methods = {
                    name: len(pool.FindServiceByName(name).methods)
                    for name in services - {"grpc.reflection.v1alpha.ServerReflection"}
                }
                request = pool.FindMessageTypeByName("inference.ModelInferRequest")
                assert request.fields_by_name["raw_input_contents"].number == 7
                return services, methods

        services, methods = await asyncio.to_thread(look)
        assert {*SERVICES[1:], "tandem.v1.Control", "tandem.v1.WorkerLink", "grpc.health.v1.Health"} <= services
        assert "xds.service.orca.v3.OpenRcaService" in services
        assert methods["inference.GRPCInferenceService"] == 20
        assert methods["vllm.grpc.engine.VllmEngine"] == 12

    async def test_the_newer_name_has_the_same_behind_it(self, router: Router) -> None:
        def ask(service: str) -> list[bytes]:
            with grpc.insecure_channel(f"127.0.0.1:{router.bound.port}") as channel:
                call: Any = channel.stream_stream(f"/{service}/ServerReflectionInfo")
                asked = (
                    reflection_pb2.ServerReflectionRequest(list_services="*"),
                    reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService"),
                )
                return list(call(iter([one.SerializeToString() for one in asked]), timeout=WAIT_S))

        newer = await asyncio.to_thread(ask, "grpc.reflection.v1.ServerReflection")
        assert len(newer) == 2
        assert newer == await asyncio.to_thread(ask, "grpc.reflection.v1alpha.ServerReflection")

    async def test_what_is_unknown_is_not_found(self, router: Router) -> None:
        ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Thing")
        call = reflection_pb2_grpc.ServerReflectionStub(router.channel).ServerReflectionInfo(iter([ask]))
        (response,) = [response async for response in call]
        assert response.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


async def test_our_services_answer_every_method_they_list(router: Router) -> None:
    """gRPC's own refusal of a method that nobody registered would name nothing."""
    await router.worker("b", answer=ANSWER)
    for service in (kserve_pb2.DESCRIPTOR, vllm_engine_pb2.DESCRIPTOR):
        for name, described in service.services_by_name.items():
            for method in described.methods:
                generic: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
                generic = router.channel.stream_stream(f"/{service.package}.{name}/{method.name}")
                call = generic(iter([b""]), timeout=WAIT_S)
                with suppress(grpc.aio.AioRpcError):
                    async for _ in call:
                        pass
                assert "Method not found" not in str(await call.details()), method.name
