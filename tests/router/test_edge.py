"""What a client of the native protocol sees: one real router, scripted workers, real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from protos import inference_pb2
from router.config import RequestLimits
from router.core.limits import CoreLimits
from router.edge.text import ModelText
from tandem.errors import TandemError, error_from_rpc
from tests.router.running import CONTEXT, DECODE, GENERATE, MODEL_DIR, PREFILL, STOP, VOCAB, WAIT_S, Router, running

TEXT = ModelText(MODEL_DIR)
Call = grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]

SAID = "def größe(x):\n    return '😀' + x  # 漢字\n"
ANSWER = TEXT.encode(SAID, special_tokens=False)


@pytest_asyncio.fixture
async def router() -> AsyncIterator[Router]:
    async with running() as router:
        yield router


def sampling(**values: object) -> inference_pb2.Sampling:
    return inference_pb2.Sampling(**{"max_tokens": len(ANSWER), "temperature": 0.0, **values})  # type: ignore[arg-type]


async def collect(call: Call) -> tuple[list[inference_pb2.Delta], inference_pb2.Finished]:
    messages = [message async for message in call]
    assert [message.WhichOneof("event") for message in messages[:-1]] == ["delta"] * (len(messages) - 1)
    assert messages[-1].HasField("finished")
    return [message.delta for message in messages[:-1]], messages[-1].finished


async def failure(call: AsyncIterable[object]) -> TandemError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return error_from_rpc(caught.value)


class TestAnswers:
    async def test_text_streams_through_both_pools_and_ends_with_the_facts(self, router: Router) -> None:
        await router.pair(ANSWER)
        deltas, end = await collect(router.generate(text="x = 1", sampling=sampling()))
        assert "".join(delta.text for delta in deltas) == SAID
        assert not any("\ufffd" in delta.text for delta in deltas)
        assert not any(delta.token_ids for delta in deltas)
        assert end.reason == inference_pb2.FINISH_REASON_LENGTH
        assert end.usage.prompt_tokens == len(TEXT.encode("x = 1"))
        assert end.usage.cached_prompt_tokens == 2
        assert end.usage.completion_tokens == len(ANSWER)
        assert (end.route.prefill_worker, end.route.decode_worker, end.route.transport) == ("p", "d", "memory")
        assert end.route.transfer_bytes == 64
        assert 0 < end.timings.ttft_s <= end.timings.total_s
        await router.is_idle()

    async def test_token_ids_come_when_asked_for(self, router: Router) -> None:
        await router.pair(ANSWER)
        call = router.generate(token_ids={"ids": [5, 6, 7]}, sampling=sampling(), return_token_ids=True)
        deltas, end = await collect(call)
        assert tuple(token_id for delta in deltas for token_id in delta.token_ids) == ANSWER
        assert end.usage.prompt_tokens == 3

    async def test_the_first_token_is_sent_before_the_hand_off(self, router: Router) -> None:
        prefill, decode = await router.pair(ANSWER)
        decode.serving = False
        call = router.generate(text="x", sampling=sampling(), return_token_ids=True)
        first = await anext(aiter(call))
        assert tuple(first.delta.token_ids) == ANSWER[:1]
        (order,) = await decode.wait_for("decode")
        assert tuple(order.decode.token_ids[-1:]) == ANSWER[:1]
        assert order.decode.handle.startswith(b"handle of ")
        assert 0 < order.decode.timeout_s < WAIT_S + 1  # gRPC rounds a timeout up on the wire

    async def test_a_whole_engine_serves_alone(self, router: Router) -> None:
        await router.worker("b", answer=ANSWER)
        deltas, end = await collect(router.generate(text="x", sampling=sampling()))
        assert "".join(delta.text for delta in deltas) == SAID
        assert end.route.local_prefill
        assert end.route.prefill_worker == end.route.decode_worker == "b"

    async def test_a_stop_string_across_tokens_ends_the_answer_before_it(self, router: Router) -> None:
        worker = await router.worker("b", answer=ANSWER)
        worker.pause_at = len(ANSWER) - 1  # it would go on
        deltas, end = await collect(router.generate(text="x", sampling=sampling(stop=["urn '😀'"])))
        assert "".join(delta.text for delta in deltas) == SAID[: SAID.index("urn '😀'")]
        assert end.reason == STOP
        assert end.stop_match == "urn '😀'"
        assert end.usage.completion_tokens < len(ANSWER)
        await worker.wait_for("cancel")
        await router.is_idle()

    async def test_stop_strings_are_not_looked_for_before_min_tokens(self, router: Router) -> None:
        await router.worker("b", answer=ANSWER)
        deltas, end = await collect(router.generate(text="x", sampling=sampling(stop=["def"], min_tokens=4)))
        assert "".join(delta.text for delta in deltas) == SAID
        assert end.stop_match == ""

    async def test_logprobs_come_beside_their_tokens(self, router: Router) -> None:
        worker = await router.worker("b")
        call = router.generate(text="x", sampling=sampling(max_tokens=2, logprobs=1), return_token_ids=True)
        (order,) = await worker.wait_for("decode")
        assert order.decode.sampling.logprobs == 1
        entry = {"sampled": {"token_id": 9, "logprob": -0.5}, "top": [{"token_id": 8, "logprob": -0.25}]}
        output = {"leg_id": order.decode.leg_id, "token_ids": [9, 9], "logprobs": [entry, entry]}
        await worker.send(step={"outputs": [{**output, "finish_reason": STOP}]})
        deltas, _ = await collect(call)
        got = [entry for delta in deltas for entry in delta.logprobs]
        assert [(entry.sampled.token_id, entry.sampled.logprob, entry.top[0].token_id) for entry in got] == [
            (9, -0.5, 8)
        ] * 2

    @pytest.mark.parametrize(
        "structure", [{"json_object": True}, {"json_schema": "{}"}, {"regex": "a"}, {"grammar": "g"}]
    )
    async def test_the_form_of_an_answer_reaches_an_engine_that_can_follow_it(
        self, router: Router, structure: dict[str, object]
    ) -> None:
        facts: dict[str, Any] = {"model": {"features": ["structure", "logit_bias"]}}
        prefill, decode = await router.worker("p", PREFILL, **facts), await router.worker("d", DECODE, **facts)
        await decode.wait_for("peers")
        asked = sampling(structure=structure, logit_bias={5: 0.5}, temperature=1.0)
        call = router.generate(text="x", sampling=asked)
        (order,) = await prefill.wait_for("prefill")
        assert order.prefill.resample, "the decode worker begins the grammar"
        assert order.prefill.sampling.structure == inference_pb2.Structure(**structure)  # type: ignore[arg-type]
        assert dict(order.prefill.sampling.logit_bias) == {5: 0.5}
        assert order.prefill.sampling.HasField("seed"), "it can be replayed"
        call.cancel()

    async def test_a_form_is_refused_by_name_where_the_engine_has_none(self, router: Router) -> None:
        await router.worker("b")
        for asked, field in (
            (sampling(structure={"json_object": True}), "sampling.structure"),
            (sampling(logit_bias={5: 1.0}), "sampling.logit_bias"),
        ):
            error = await failure(router.generate(text="x", sampling=asked))
            assert error.metadata["field"] == field

    async def test_the_request_id_is_the_clients_or_the_servers(self, router: Router) -> None:
        await router.worker("b", answer=ANSWER)
        for asked in ("mine", ""):
            ids = {
                message.request_id async for message in router.generate(text="x", request_id=asked, sampling=sampling())
            }
            (request_id,) = ids
            assert request_id == asked or (not asked and len(request_id) == 32)

    async def test_a_decode_worker_lost_in_mid_stream_does_not_break_the_text(self, router: Router) -> None:
        _, decode = await router.pair(ANSWER)
        decode.pause_at = len(ANSWER) // 2
        call = router.generate(text="x", sampling=sampling())
        stream = aiter(call)
        got = ""
        while len(TEXT.encode(got, special_tokens=False)) < decode.pause_at - 3:
            got += (await anext(stream)).delta.text
        await router.leave(decode)
        await router.worker("d2", DECODE, answer=ANSWER)
        messages = [message async for message in stream]
        assert got + "".join(message.delta.text for message in messages) == SAID
        assert messages[-1].finished.route.decode_worker == "d2"
        assert messages[-1].finished.route.retries == 1

    async def test_models_are_listed_with_what_their_workers_said(self, router: Router) -> None:
        (model,) = (await router.inference.ListModels(inference_pb2.ListModelsRequest())).models
        assert (model.name, model.ready, model.vocab_size) == ("nano", False, 0)
        await router.worker("b")
        (model,) = (await router.inference.ListModels(inference_pb2.ListModelsRequest())).models
        assert (model.ready, model.vocab_size, model.max_model_len) == (True, VOCAB, CONTEXT)


BAD: list[tuple[dict[str, object], str, str, str]] = [
    ({"text": "x", "model": "no-such"}, "NOT_FOUND", "", "no-such"),
    ({}, "INVALID_ARGUMENT", "text", "empty"),
    ({"text": ""}, "INVALID_ARGUMENT", "text", "empty"),
    ({"token_ids": {"ids": []}}, "INVALID_ARGUMENT", "token_ids", "empty"),
    ({"token_ids": {"ids": [5] * CONTEXT}}, "OUT_OF_RANGE", "token_ids", str(CONTEXT)),
    ({"text": "the cat " * CONTEXT}, "OUT_OF_RANGE", "text", str(CONTEXT)),
    ({"text": "x" * 5_000_000}, "OUT_OF_RANGE", "text", str(CONTEXT)),
    ({"token_ids": {"ids": [5, VOCAB]}}, "OUT_OF_RANGE", "token_ids[1]", str(VOCAB)),
    ({"text": "x", "lane": "express"}, "INVALID_ARGUMENT", "lane", "realtime, standard, batch"),
    ({"text": "x", "request_id": "r" * 129}, "INVALID_ARGUMENT", "request_id", "128"),
    ({"text": "x", "request_id": "two\nlines"}, "INVALID_ARGUMENT", "request_id", "printable"),
]
BAD_SAMPLING: list[tuple[dict[str, object], str, str]] = [
    ({"max_tokens": 0}, "max_tokens", "1"),
    ({"max_tokens": -1}, "max_tokens", "1"),
    ({"max_tokens": 2**31 - 1}, "max_tokens", str(CONTEXT)),
    ({"max_tokens": CONTEXT}, "max_tokens", str(CONTEXT)),
    ({"max_tokens": 4, "min_tokens": 5}, "min_tokens", "4"),
    ({"min_tokens": -1}, "min_tokens", "0"),
    ({"temperature": -0.1}, "temperature", "0"),
    ({"temperature": 1e9}, "temperature", "2"),
    ({"temperature": float("nan")}, "temperature", "nan"),
    ({"temperature": float("inf")}, "temperature", "inf"),
    ({"top_p": 0.0}, "top_p", "more than 0"),
    ({"top_p": 1.5}, "top_p", "1"),
    ({"top_p": float("nan")}, "top_p", "nan"),
    ({"top_k": -1}, "top_k", "0"),
    ({"top_k": VOCAB + 1}, "top_k", str(VOCAB)),
    ({"min_p": -0.5}, "min_p", "0"),
    ({"presence_penalty": 3.0}, "presence_penalty", "2"),
    ({"frequency_penalty": -3.0}, "frequency_penalty", "-2"),
    ({"repetition_penalty": 0.0}, "repetition_penalty", "more than 0"),
    ({"repetition_penalty": float("nan")}, "repetition_penalty", "nan"),
    ({"seed": -1}, "seed", "0"),
    ({"logprobs": -1}, "logprobs", "0"),
    ({"logprobs": 21}, "logprobs", "20"),
    ({"stop": ["x"] * 17}, "stop", "16"),
    ({"stop": ["ok", ""]}, "stop[1]", "1"),
    ({"stop": ["x" * 257]}, "stop[0]", "256"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids", "64"),
    ({"stop_token_ids": [3, VOCAB]}, "stop_token_ids[1]", str(VOCAB)),
]
#: (bytes of a GenerateRequest, the field at fault)
NOT_MESSAGES = [
    (b"\x1a\x02\xff\xfe", "text"),
    (b"\x0a\x01\xff", "request_id"),
    (b"\x12\x03a\xc3(", "model"),
    (b"\x2a\x06\x5a\x01a\x5a\x01\xff", "sampling.stop[1]"),
    (b"\xff\xff\xff", "request"),
    (b"\x1a\x7fx", "request"),
]


@pytest_asyncio.fixture(scope="class", loop_scope="class")
async def serving() -> AsyncIterator[Router]:
    """One router for all bad input, which must be up at the end."""
    async with running(requests=RequestLimits(message_bytes_max=8_000_000)) as router:
        await router.worker("b", answer=ANSWER)
        yield router
        await collect(router.generate(text="x", sampling=sampling()))
        status = await router.is_idle()
        assert dict(status.outcomes)["finished"] == 1
        assert sum(status.outcomes.values()) == 1, "bad input never reaches the core"


class TestBadInput:
    @pytest.mark.asyncio(loop_scope="class")
    @pytest.mark.parametrize(("request_", "code", "field", "names"), BAD, ids=lambda value: str(value)[:40])
    async def test_is_refused_naming_field_and_limit(
        self, serving: Router, request_: dict[str, object], code: str, field: str, names: str
    ) -> None:
        error = await failure(serving.generate(**request_))  # type: ignore[arg-type]
        assert error.code == code
        assert error.field == field
        assert names in error.message
        assert error.reason

    @pytest.mark.asyncio(loop_scope="class")
    @pytest.mark.parametrize(("values", "field", "names"), BAD_SAMPLING, ids=lambda value: str(value)[:40])
    async def test_absurd_sampling_is_refused_naming_field_and_limit(
        self, serving: Router, values: dict[str, object], field: str, names: str
    ) -> None:
        call = serving.generate(text="x", sampling=inference_pb2.Sampling(**values))  # type: ignore[arg-type]
        error = await failure(call)
        assert error.code in ("INVALID_ARGUMENT", "OUT_OF_RANGE")
        assert error.field == f"sampling.{field}"
        assert names in error.message

    @pytest.mark.asyncio(loop_scope="class")
    @pytest.mark.parametrize(("data", "field"), NOT_MESSAGES)
    async def test_bytes_that_are_no_message_name_the_field(self, serving: Router, data: bytes, field: str) -> None:
        error = await failure(serving.generate_raw(data))
        assert error.code == "INVALID_ARGUMENT"
        assert error.field == field

    @pytest.mark.asyncio(loop_scope="class")
    @pytest.mark.parametrize("method", ["Inference/ListModels", "Control/GetStatus", "Control/DrainWorker"])
    async def test_other_methods_refuse_them_too(self, serving: Router, method: str) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await serving.call_raw(f"/tandem.v1.{method}", b"\x0a\x7f")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    @pytest.mark.asyncio(loop_scope="class")
    async def test_a_message_past_the_limit_is_refused_with_the_limit(self, serving: Router) -> None:
        error = await failure(serving.generate(text="x" * 9_000_000))
        assert error.code == "RESOURCE_EXHAUSTED"
        assert "8000000" in error.message

    @pytest.mark.asyncio(loop_scope="class")
    async def test_an_unknown_method_is_unimplemented(self, serving: Router) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await serving.call_raw("/tandem.v1.Inference/Guess", b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


class TestEnds:
    @pytest.mark.parametrize("tokens_before", [0, 5])
    async def test_a_client_that_leaves_frees_both_sides(self, router: Router, tokens_before: int) -> None:
        prefill, decode = await router.pair(ANSWER)
        prefill.serving = bool(tokens_before)
        decode.pause_at = 8
        call = router.generate(text="x", sampling=sampling(), return_token_ids=True)
        stream = aiter(call)
        await prefill.wait_for("prefill")
        seen = 0
        while seen < tokens_before:
            seen += len((await anext(stream)).delta.token_ids)
        call.cancel()
        await (decode if tokens_before else prefill).wait_for("cancel")
        status = await router.is_idle()
        assert dict(status.outcomes)["cancelled"] == 1

    async def test_a_client_that_leaves_before_the_fetch_gives_the_lease_back(self, router: Router) -> None:
        prefill, decode = await router.pair(ANSWER)
        decode.serving = False
        call = router.generate(text="x", sampling=sampling())
        (order,) = await decode.wait_for("decode")
        call.cancel()
        (release,) = await prefill.wait_for("release")
        assert release.release.handle == order.decode.handle
        await decode.wait_for("cancel")

    async def test_a_connection_that_breaks_is_a_client_that_leaves(self, router: Router) -> None:
        worker = await router.worker("b")
        channel = grpc.aio.insecure_channel(
            f"127.0.0.1:{router.bound.port}", options=(("grpc.use_local_subchannel_pool", 1),)
        )
        data = inference_pb2.GenerateRequest(text="x").SerializeToString()
        method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(GENERATE)
        call = method(data)
        await worker.wait_for("decode")
        await channel.close(None)
        await worker.wait_for("cancel")
        await router.is_idle()
        call.cancel()

    async def test_the_clients_deadline_ends_it(self, router: Router) -> None:
        worker = await router.worker("b")
        error = await failure(router.generate(text="x", timeout=3.0))
        assert error.code == "DEADLINE_EXCEEDED"
        await worker.wait_for("cancel")
        await router.is_idle()

    async def test_without_a_deadline_the_servers_own_ends_it(self) -> None:
        async with running(requests=RequestLimits(timeout_s_max=1)) as router:
            await router.worker("b")
            error = await failure(router.generate(text="x", timeout=None))
            assert error.code == "DEADLINE_EXCEEDED"
            assert error.reason == "DEADLINE_EXCEEDED"
            assert dict((await router.is_idle()).outcomes)["expired"] == 1

    async def test_an_id_in_use_is_refused_and_its_owner_goes_on(self, router: Router) -> None:
        worker = await router.worker("b")
        first = router.generate(text="x", request_id="same", sampling=sampling(max_tokens=2))
        (order,) = await worker.wait_for("decode")
        error = await failure(router.generate(text="x", request_id="same"))
        assert error.code == "ALREADY_EXISTS"
        output = {"leg_id": order.decode.leg_id, "token_ids": [9, 9], "finish_reason": STOP}
        await worker.send(step={"outputs": [output]})
        _, end = await collect(first)
        assert end.usage.completion_tokens == 2

    async def test_before_the_first_worker_clients_are_told_to_come_again(self, router: Router) -> None:
        error = await failure(router.generate(text="x"))
        assert (error.code, error.reason) == ("UNAVAILABLE", "NO_WORKERS")
        assert error.retry_after_s == 1.0

    async def test_a_full_queue_refuses_with_a_time(self) -> None:
        async with running(limits=CoreLimits(queue_requests_max=1)) as router:
            worker = await router.worker("b", capacity={"decode_legs": 1})
            worker.orders.clear()
            status = await router.status()
            calls = [router.generate(text="x") for _ in range(status.workers[0].capacity.decode_legs + 1)]
            await router.until(lambda status: status.requests_queued == 1)
            call = router.generate(text="x")
            error = await failure(call)
            assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_REQUESTS")
            assert error.retry_after_s == 1.0
            trailers = await call.trailing_metadata()
            assert dict(trailers or ())["grpc-retry-pushback-ms"] == "1000"
            for waiting in calls:
                waiting.cancel()

    async def test_workers_that_fail_it_too_often_make_a_typed_error(self) -> None:
        async with running(limits=CoreLimits(decode_attempts_max=2, rest_s_min=0.01)) as router:
            worker = await router.worker("b")
            call = router.generate(text="x")
            for attempt in (1, 2):
                order = (await worker.wait_for("decode", attempt))[-1]
                failed = {"leg_id": order.decode.leg_id, "failure": "FAILURE_ENGINE", "detail": "at /some/path"}
                await worker.send(leg_failed=failed)
            error = await failure(call)
            assert (error.code, error.reason) == ("UNAVAILABLE", "ATTEMPTS_EXHAUSTED")
            assert "/some/path" not in error.message

    async def test_a_client_that_never_reads_is_cut_off_and_others_are_not(self) -> None:
        answer = (9, 10, 11, 12) * 750
        async with running(requests=RequestLimits(stream_tokens_max=256)) as router:
            worker = await router.worker("b", answer=answer)
            options = (
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.http2.lookahead_bytes", 1024),
                ("grpc.http2.bdp_probe", 0),
            )
            async with grpc.aio.insecure_channel(f"127.0.0.1:{router.bound.port}", options=options) as channel:
                many = inference_pb2.Sampling(max_tokens=len(answer), temperature=0.0, logprobs=20)
                data = inference_pb2.GenerateRequest(text="x", sampling=many, return_token_ids=True)
                method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(GENERATE)
                call = method(data.SerializeToString())
                (order,) = await worker.wait_for("decode")
                status = await router.until(lambda status: not status.requests)
                assert dict(status.outcomes)["failed"] == 1
                error = await failure(call)
                assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "STREAM_BUFFER")

    async def test_an_old_connection_lets_its_calls_finish_and_workers_stay(self) -> None:
        async with running(connection_age_s_max=0.2) as router:
            worker = await router.worker("b", answer=ANSWER)
            worker.pause_at = 2
            call = router.generate(token_ids={"ids": [5]}, sampling=sampling())
            (order,) = await worker.wait_for("decode")
            await asyncio.sleep(0.5)  # as old as it may become
            worker.pause_at = len(ANSWER)
            rest = {"leg_id": order.decode.leg_id, "token_ids": ANSWER[2:], "finish_reason": 2}
            await worker.send(step={"outputs": [rest]})
            assert (await collect(call))[1].usage.completion_tokens == len(ANSWER)
            deltas, _ = await collect(router.generate(text="x", sampling=sampling()))
            assert "".join(delta.text for delta in deltas) == SAID
            assert [worker.worker_id for worker in (await router.status()).workers] == ["b"]

    async def test_many_requests_at_once_each_get_their_own_answer(self, router: Router) -> None:
        await router.pair(ANSWER)

        async def one() -> str:
            deltas, _ = await collect(router.generate(text="x", sampling=sampling()))
            return "".join(delta.text for delta in deltas)

        assert set(await asyncio.gather(*(one() for _ in range(40)))) == {SAID}
        status = await router.is_idle()
        assert dict(status.outcomes)["finished"] == 40
