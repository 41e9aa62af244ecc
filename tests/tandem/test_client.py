import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from protos import control_pb2, worker_link_pb2
from tandem import (
    AsyncClient,
    Cancelled,
    Client,
    DeadlineExceeded,
    FinishReason,
    InternalError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Result,
    Role,
    TandemError,
    Unavailable,
)
from tests.tandem.scripted_server import Script, refusal, serving


@pytest.fixture
def server() -> Iterator[Script]:
    with serving(Script()) as script:
        yield script


Generate = Callable[..., Result]


@pytest.fixture(params=["sync", "async"])
def generate(request: pytest.FixtureRequest, server: Script) -> Generate:
    """One whole answer by either client."""

    def with_client(prompt: str | Sequence[int] = "hi", **options: object) -> Result:
        with Client(server.address) as client:
            return client.generate(prompt, **options).result()  # type: ignore[arg-type]

    def with_async_client(prompt: str | Sequence[int] = "hi", **options: object) -> Result:
        async def run() -> Result:
            async with AsyncClient(server.address) as client:
                return await client.generate(prompt, **options).result()  # type: ignore[arg-type]

        return asyncio.run(run())

    return with_client if request.param == "sync" else with_async_client


def test_a_result_holds_the_whole_answer(generate: Generate) -> None:
    result = generate()
    assert result.request_id == "r-1"
    assert result.text == "one two"
    assert result.token_ids == (3, 4)
    assert result.finished.reason is FinishReason.STOP
    assert result.finished.stop_match == "END"
    assert result.finished.usage.completion_tokens == 2
    assert result.finished.timings.ttft_s == 0.25
    assert result.finished.route.prefill_worker == "p-0"


def test_only_the_options_given_are_sent(generate: Generate, server: Script) -> None:
    generate("hi", model="nano", max_tokens=5, temperature=0.0, stop=["END"], seed=None, return_token_ids=True)
    (request,) = server.requests
    assert (request.text, request.model, request.return_token_ids) == ("hi", "nano", True)
    assert request.sampling.max_tokens == 5
    assert request.sampling.HasField("temperature")
    assert list(request.sampling.stop) == ["END"]
    assert not request.sampling.HasField("seed")
    assert not request.sampling.HasField("top_p")


@pytest.mark.parametrize("prompt", [[5, 6, 7], []])
def test_token_ids_are_a_prompt_too(generate: Generate, server: Script, prompt: list[int]) -> None:
    generate(prompt)
    assert server.requests[0].WhichOneof("prompt") == "token_ids"
    assert list(server.requests[0].token_ids.ids) == prompt


def test_an_option_that_does_not_exist_is_the_programmers_error(generate: Generate) -> None:
    with pytest.raises(TypeError, match="temprature"):
        generate("hi", temprature=1.0)


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([-1], {}, "token_ids"),
        ("hi", {"max_tokens": 2**40}, "sampling.max_tokens"),
        ("hi", {"temperature": "hot"}, "sampling.temperature"),
        ("hi", {"stop_token_ids": [-1]}, "sampling.stop_token_ids"),
        ("\ud800", {}, "text"),
    ],
)
def test_what_cannot_be_sent_is_an_invalid_argument_that_names_the_field(
    generate: Generate, prompt: str | list[int], options: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidArgument, match=field) as caught:
        generate(prompt, **options)
    assert caught.value.field == field


def test_details_of_a_refusal_are_read(generate: Generate, server: Script) -> None:
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="sampling.top_p", description="must be in (0, 1]")
    info = error_details_pb2.ErrorInfo(reason="OUT_OF_RANGE", domain="tandem", metadata={"limit": "1"})
    server.refuse = refusal(grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p: must be in (0, 1]", bad, info)

    with pytest.raises(InvalidArgument, match="top_p") as caught:
        generate()

    assert caught.value.field == "sampling.top_p"
    assert caught.value.reason == "OUT_OF_RANGE"
    assert caught.value.metadata == {"limit": "1"}
    assert caught.value.retry_after_s is None


def test_a_refusal_says_when_to_try_again(generate: Generate, server: Script) -> None:
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=40, nanos=500_000_000))
    server.refuse = refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full", retry)
    with pytest.raises(ResourceExhausted) as caught:
        generate(timeout_s=20)
    assert caught.value.retry_after_s == 40.5


def wait_of(seconds: float) -> error_details_pb2.RetryInfo:
    return error_details_pb2.RetryInfo(retry_delay=timedelta(seconds=seconds))


def test_a_refusal_with_a_time_is_tried_again_after_it(generate: Generate, server: Script) -> None:
    server.refuse, server.refusals = refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "rate", wait_of(0.2)), 2
    began = time.monotonic()
    assert generate().text == "one two"
    assert len(server.requests) == 3
    assert time.monotonic() - began >= 0.4


def test_a_server_that_is_away_is_tried_again(generate: Generate, server: Script) -> None:
    server.refuse, server.refusals = refusal(grpc.StatusCode.UNAVAILABLE, "restarting"), 1
    assert generate().text == "one two"


@pytest.mark.parametrize(
    ("code", "detail", "options"),
    [
        pytest.param(grpc.StatusCode.RESOURCE_EXHAUSTED, None, {}, id="waiting does not help"),
        pytest.param(grpc.StatusCode.INVALID_ARGUMENT, None, {}, id="wrong now, wrong again"),
        pytest.param(grpc.StatusCode.UNAVAILABLE, wait_of(30), {"timeout_s": 20}, id="not in the time left"),
        pytest.param(grpc.StatusCode.RESOURCE_EXHAUSTED, wait_of(40), {"timeout_s": 20}, id="limit past the time"),
    ],
)
def test_what_a_retry_would_not_cure_is_reported_at_once(
    generate: Generate,
    server: Script,
    code: grpc.StatusCode,
    detail: error_details_pb2.RetryInfo | None,
    options: dict[str, object],
) -> None:
    server.refuse = refusal(code, "no", *([detail] if detail else []))
    with pytest.raises(TandemError) as caught:
        generate(**options)
    assert caught.value.code == code.name
    assert len(server.requests) == 1


def test_retries_end(server: Script) -> None:
    server.refuse = refusal(grpc.StatusCode.UNAVAILABLE, "away", wait_of(0.01))
    with Client(server.address, retries=3) as client, pytest.raises(Unavailable):
        client.generate("hi").result()
    assert len(server.requests) == 4


def test_an_answer_that_has_begun_is_never_asked_for_again(server: Script) -> None:
    server.break_off = grpc.StatusCode.UNAVAILABLE
    with Client(server.address) as client:
        generation = client.generate("hi")
        with pytest.raises(Unavailable):
            generation.result()
    assert generation.text == "one two"
    assert len(server.requests) == 1


def test_closing_ends_the_wait_for_a_retry(server: Script) -> None:
    server.refuse = refusal(
        grpc.StatusCode.UNAVAILABLE, "away", error_details_pb2.RetryInfo(retry_delay={"seconds": 50})
    )
    with Client(server.address) as client:
        generation = client.generate("hi")
        threading.Timer(0.3, generation.close).start()
        with pytest.raises(Cancelled):
            generation.result()


def test_a_status_without_details_is_typed_by_its_code(generate: Generate, server: Script) -> None:
    server.refuse = refusal(grpc.StatusCode.DATA_LOSS, "gone")
    with pytest.raises(TandemError) as caught:
        generate()
    assert (caught.value.code, caught.value.message, caught.value.field) == ("DATA_LOSS", "gone", "")


def test_a_stream_that_ends_without_an_end_is_an_error(generate: Generate, server: Script) -> None:
    server.finish = False
    with pytest.raises(InternalError):
        generate()


def test_past_its_time_a_generation_ends(generate: Generate, server: Script) -> None:
    server.hang = True
    with pytest.raises(DeadlineExceeded):
        generate(timeout_s=3.0)
    assert server.ended.wait(30)


def test_nobody_there_is_unavailable() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(Unavailable):
        client.status()


def test_leaving_the_loop_cancels(server: Script) -> None:
    server.hang = True
    with Client(server.address) as client:
        for delta in client.generate("hi"):
            assert delta.text == "one"
            break
        assert server.ended.wait(30)


def test_closing_cancels_and_keeps_what_has_arrived(server: Script) -> None:
    server.hang = True
    with Client(server.address) as client:
        with client.generate("hi") as generation:
            deltas = iter(generation)
            next(deltas), next(deltas)
        assert server.ended.wait(30)
        assert generation.text == "one two"
        with pytest.raises(Cancelled):
            next(deltas)


async def test_leaving_the_async_loop_cancels(server: Script) -> None:
    server.hang = True
    async with AsyncClient(server.address) as client:
        async with client.generate("hi") as generation:
            async for delta in generation:
                assert delta.text == "one"
                break
        assert await asyncio.to_thread(server.ended.wait, 30)


async def test_closing_an_async_generation_is_not_mistaken_for_cancelling_the_task(server: Script) -> None:
    server.hang = True
    async with AsyncClient(server.address) as client:
        generation = client.generate("hi")
        asyncio.get_running_loop().call_later(0.1, generation.close)
        with pytest.raises(Cancelled):
            await generation.result()


async def test_cancelling_the_task_cancels_the_request(server: Script) -> None:
    server.hang = True
    async with AsyncClient(server.address) as client:
        asking = asyncio.create_task(client.generate("hi").result())
        while not server.requests:  # noqa: ASYNC110  another thread's
            await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert await asyncio.to_thread(server.ended.wait, 30)


async def test_both_clients_speak_to_operators_alike(server: Script) -> None:
    def ask() -> tuple[object, ...]:
        with Client(server.address) as client:
            client.drain("p-0")
            client.set_role("p-0", Role.DECODE)
            return client.status(), client.status(requests=True), client.models()

    async with AsyncClient(server.address) as client:
        await client.drain("p-0")
        await client.set_role("p-0", Role.DECODE)
        status, with_requests, models = await client.status(), await client.status(requests=True), await client.models()
        with pytest.raises(NotFound, match="nobody"):
            await client.drain("nobody")

    assert await asyncio.to_thread(ask) == (status, with_requests, models)
    (worker,) = status.workers
    assert (worker.worker_id, worker.role, worker.load.kv_blocks_free) == ("p-0", Role.PREFILL, 10)
    assert worker.lanes[0].transport == "nixl"
    assert status.outcomes == {"finished": 3}
    assert status.requests == ()
    assert with_requests.requests[0].state == "decoding"
    assert models[0].name == "nano"
    order = control_pb2.SetWorkerRoleRequest(worker_id="p-0", role=worker_link_pb2.ROLE_DECODE)
    assert server.orders.count(order) == 2


def test_importing_the_client_is_light() -> None:
    code = "import sys, tandem; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split())
    assert "tandem" in loaded
    assert not loaded & {"torch", "vllm", "numpy", "typer", "rich", "router", "worker", "engine"}
