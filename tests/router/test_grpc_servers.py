"""A router on our gRPC server and on gRPC's own: what clients, operators and workers meet is the same.

All of these tests run on gRPC's own with TANDEM_TEST_GRPC_SERVER=grpcio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from protos import control_pb2, control_pb2_grpc, inference_pb2
from protos.compat import kserve_pb2
from router.config import AuthConfig, RouterConfig
from tests.certificates import Authority
from tests.router.running import JOIN_KEY, MODEL, MODEL_DIR, WAIT_S, Router, running
from trust.tls import Tls, TlsFiles

ANSWER = tuple(range(5, 45))
SERVERS = ("tandem", "grpcio")


@pytest.fixture(params=SERVERS)
async def router(request: pytest.FixtureRequest) -> AsyncIterator[Router]:
    async with running(grpc_server=request.param) as router:
        yield router


def generate(
    router: Router, timeout: float = WAIT_S
) -> grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]:
    sampling = inference_pb2.Sampling(max_tokens=len(ANSWER))
    return router.generate(timeout=timeout, text="x", sampling=sampling, return_token_ids=True)


async def test_an_answer_is_streamed(router: Router) -> None:
    worker = await router.worker("w", answer=ANSWER)
    replies = [reply async for reply in generate(router)]
    assert tuple(token for reply in replies for token in reply.delta.token_ids) == ANSWER
    assert len(replies) > 2
    await router.leave(worker)


async def test_who_cancels_leaves_nothing_behind(router: Router) -> None:
    worker = await router.worker("w", answer=ANSWER)
    worker.pause_at = 10
    call = generate(router)
    await call.read()
    call.cancel()
    await router.is_idle()
    await router.leave(worker)


async def test_a_deadline(router: Router) -> None:
    worker = await router.worker("w", answer=ANSWER)
    worker.pause_at = 10
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        [reply async for reply in generate(router, 0.3)]
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await router.is_idle()
    await router.leave(worker)


async def test_a_refusal_has_its_details(router: Router) -> None:
    worker = await router.worker("w", answer=ANSWER)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        [reply async for reply in router.generate(text="")]
    await router.leave(worker)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(refused.value)
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    assert info.reason


async def test_kserve_both_ways(router: Router) -> None:
    worker = await router.worker("w", answer=ANSWER)
    request = kserve_pb2.ModelInferRequest(model_name=MODEL, id="7")
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x=1")
    request.inputs.add(name="max_tokens", datatype="INT32", shape=[1]).contents.int_contents.append(len(ANSWER))
    request.inputs.add(name="stream", datatype="BOOL", shape=[1]).contents.bool_contents.append(True)
    method = router.channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        request_serializer=kserve_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=kserve_pb2.ModelStreamInferResponse.FromString,
    )
    replies = [reply async for reply in method(iter([request, request]), timeout=WAIT_S)]
    assert len(replies) > 4
    assert not any(reply.error_message for reply in replies)
    await router.leave(worker)


async def test_health_is_watched(router: Router) -> None:
    watch = health_pb2_grpc.HealthStub(router.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    worker = await router.worker("w", answer=ANSWER)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    await router.leave(worker)


async def test_services_are_reflected(router: Router) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(router.channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    (listed,) = [reply async for reply in stub.ServerReflectionInfo(iter([asked]))]
    names = {service.name for service in listed.list_services_response.service}
    assert {"tandem.v1.Inference", "inference.GRPCInferenceService", "vllm.grpc.engine.VllmEngine"} <= names


@pytest.mark.parametrize("server", SERVERS)
async def test_tls_from_both_sides(server: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    files = authority.issue("router", require_client_cert=True)
    async with running(grpc_server=server, tls=files) as router:
        tls, plain = Tls(authority.issue("w")), router.channel
        address, options = f"127.0.0.1:{router.bound.port}", tls.channel_options()
        async with grpc.aio.secure_channel(address, tls.channel_credentials(), options) as router.channel:
            worker = await router.worker("w", answer=ANSWER)
            status = await control_pb2_grpc.ControlStub(router.channel).GetStatus(control_pb2.GetStatusRequest())
            assert [one.worker_id for one in status.workers] == ["w"]
            await router.leave(worker)
        router.channel = plain


def test_grpcs_own_asks_for_certificates_only_if_it_insists(tmp_path: Path) -> None:
    """Else nobody would be known by one."""
    authority = Authority(tmp_path / "ca")
    (tmp_path / "tenants.toml").write_text('[tenants.acme]\ncertificates = ["spiffe://tests/acme"]\n')

    def config(files: TlsFiles) -> RouterConfig:
        return RouterConfig(
            model_dir=str(MODEL_DIR),
            model_name=MODEL,
            join_key=JOIN_KEY,
            grpc_server="grpcio",
            tls=files,
            tenants_file=str(tmp_path / "tenants.toml"),
            auth=AuthConfig(mode="certificates"),
        )

    config(authority.issue("router", require_client_cert=True))
    with pytest.raises(ValueError, match="require_client_cert: must be true"):
        config(authority.issue("router"))
