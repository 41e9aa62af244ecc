"""A fault of ours, in each edge and at each stage: the client gets a typed sentence, and nothing of the inside."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from protos import inference_pb2
from protos.compat import kserve_pb2 as kserve_pb
from protos.compat import kserve_pb2_grpc as kserve_grpc
from protos.compat import vllm_engine_pb2 as engine_pb
from protos.compat import vllm_engine_pb2_grpc as engine_grpc
from router.edge import admit, text
from router.shell import Shell
from tests.router.http_client import call
from tests.router.running import MODEL, WAIT_S, Router, running

SECRET = "/srv/tandem/secret.py: tenant-of-somebody-else"
ANSWER = (300, 301, 302, 303)
TOLD = "internal error"


@pytest_asyncio.fixture
async def router() -> AsyncIterator[Router]:
    async with running(http_port=0) as router:
        await router.worker("b", answer=ANSWER)
        yield router


def _raise(*arguments: object, **named: object) -> Any:
    raise RuntimeError(SECRET)


@pytest.fixture(params=["accepting", "submitting", "answering"])
def fault(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where it happens."""
    if request.param == "accepting":
        monkeypatch.setattr(admit.Rules, "sampling", _raise)
    elif request.param == "submitting":
        monkeypatch.setattr(Shell, "submit", _raise)
    else:
        monkeypatch.setattr(text.TextStream, "feed", _raise)
    return str(request.param)


def assert_nothing_of_the_inside(said: str) -> None:
    for word in ("secret", "somebody", "RuntimeError", "Traceback", ".py"):
        assert word not in said


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_over_http(router: Router, fault: str, path: str, stream: bool) -> None:
    assert router.bound.http_port is not None
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": len(ANSWER), "stream": stream}
    del body["messages" if path == "/v1/completions" else "prompt"]
    response = await call(router.bound.http_port, "POST", path, body)
    assert response.status == 500
    assert response.error["type"] == "server_error"
    assert TOLD in response.error["message"]
    assert_nothing_of_the_inside(response.body.decode() + json.dumps(response.headers))
    await router.is_idle()


async def test_over_http_after_the_first_byte(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    assert router.bound.http_port is not None
    monkeypatch.setattr(text.TextStream, "finish", _raise)
    body = {"prompt": "x", "max_tokens": len(ANSWER), "stream": True}
    response = await call(router.bound.http_port, "POST", "/v1/completions", body)
    assert response.status == 200
    assert TOLD in response.events[-1]["error"]["message"]
    assert_nothing_of_the_inside(response.body.decode())
    await router.is_idle()


async def test_over_the_native_protocol(router: Router, fault: str) -> None:
    sampling = inference_pb2.Sampling(max_tokens=len(ANSWER))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        _ = [message async for message in router.generate(text="x", sampling=sampling)]
    assert_is_told(raised.value)
    await router.is_idle()


def assert_is_told(raised: grpc.aio.AioRpcError) -> None:
    assert raised.code() is grpc.StatusCode.INTERNAL
    assert TOLD in (raised.details() or "")
    assert_nothing_of_the_inside(f"{raised.details()} {raised.trailing_metadata()}")


async def test_over_vllms_engine_api(router: Router, fault: str) -> None:
    message = engine_pb.GenerateRequest(
        tokenized={"input_ids": [5, 6]}, sampling_params={"max_tokens": len(ANSWER)}, stream=True
    )
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        _ = [chunk async for chunk in engine_grpc.VllmEngineStub(router.channel).Generate(message, timeout=WAIT_S)]
    assert_is_told(raised.value)
    await router.is_idle()


def infer_request() -> kserve_pb.ModelInferRequest:
    request = kserve_pb.ModelInferRequest(model_name=MODEL, id="7")
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x")
    request.parameters["max_tokens"].int64_param = len(ANSWER)
    return request


async def test_over_kserve(router: Router, fault: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await kserve_grpc.GRPCInferenceServiceStub(router.channel).ModelInfer(infer_request(), timeout=WAIT_S)
    assert_is_told(raised.value)
    await router.is_idle()


async def test_in_a_stream_of_kserve_that_goes_on(router: Router, fault: str) -> None:
    call = kserve_grpc.GRPCInferenceServiceStub(router.channel).ModelStreamInfer(
        iter([infer_request()]), timeout=WAIT_S
    )
    (response,) = [response async for response in call]
    assert TOLD in response.error_message
    assert_nothing_of_the_inside(str(response))
    await router.is_idle()


async def test_of_an_operators_call(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shell, "snapshot", _raise)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await router.status()
    assert_is_told(raised.value)
