"""What a client of KServe's protocol sees, Triton's streaming included: a real router, scripted workers, real gRPC."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Iterable
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from protos.compat import kserve_pb2 as pb
from protos.compat import kserve_pb2_grpc as pb_grpc
from router.config import RequestLimits
from router.core.errors import Invalid
from router.edge import kserve_wire as wire
from router.edge import tensors
from tandem.errors import error_from_rpc
from tests.router.running import CONTEXT, MODEL, STOP, VOCAB, WAIT_S, Router, running
from tests.router.test_edge import ANSWER, SAID, TEXT
from tests.router.test_identity import Files, files

__all__ = ["files"]

#: Name, datatype, elements.
Input = tuple[str, str, list[object]]
Call = grpc.aio.StreamStreamCall[pb.ModelInferRequest, pb.ModelStreamInferResponse]

PROMPT: Input = ("text_input", "BYTES", [b"x = 1"])
STREAM: Input = ("stream", "BOOL", [True])
MAX_TOKENS: Input = ("max_tokens", "INT32", [len(ANSWER)])
FINAL = "triton_final_response"


@pytest_asyncio.fixture
async def router() -> AsyncIterator[Router]:
    async with running() as router:
        yield router


@pytest_asyncio.fixture
async def serving(router: Router) -> Router:
    await router.pair(ANSWER)
    return router


def stub(router: Router) -> pb_grpc.GRPCInferenceServiceAsyncStub:
    return pb_grpc.GRPCInferenceServiceStub(router.channel)


def request(*inputs: Input, raw: bool = True, batched: bool = False, **fields: object) -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(model_name=MODEL, **fields)  # type: ignore[arg-type]
    for name, datatype, elements in inputs:
        shape = [1, len(elements)] if batched else [len(elements)]
        tensor = made.inputs.add(name=name, datatype=datatype, shape=shape)
        if raw:
            made.raw_input_contents.append(tensors.to_raw(datatype, elements))  # type: ignore[arg-type]
        else:
            field = {"BYTES": "bytes", "BOOL": "bool", "INT32": "int", "FP32": "fp32", "UINT64": "uint64"}[datatype]
            getattr(tensor.contents, f"{field}_contents").extend(elements)
    return made


def asked(*more: Input, prompt: Input = PROMPT, **fields: object) -> pb.ModelInferRequest:
    return request(prompt, MAX_TOKENS, *more, **fields)  # type: ignore[arg-type]


def output(response: pb.ModelInferResponse, name: str = "text_output") -> list[object]:
    """An output's elements, whichever way they came."""
    at, tensor = next((at, one) for at, one in enumerate(response.outputs) if one.name == name)
    if response.raw_output_contents:
        raw = response.raw_output_contents[at]
        return list(tensors.from_raw(name, tensor.datatype, tensor.shape, raw).elements)
    (field,) = tensor.contents.ListFields()
    assert len(field[1]) == tensor.shape[0]
    return list(field[1])


def text(response: pb.ModelInferResponse) -> str:
    (found,) = output(response)
    assert isinstance(found, bytes)
    return found.decode()


async def infer(router: Router, message: pb.ModelInferRequest) -> pb.ModelInferResponse:
    return await stub(router).ModelInfer(message, timeout=WAIT_S)


async def stream(router: Router, *messages: pb.ModelInferRequest) -> list[pb.ModelStreamInferResponse]:
    """All that comes for these, on one stream that the client closes after the last."""
    call = stub(router).ModelStreamInfer(iter(messages), timeout=WAIT_S)
    return [response async for response in call]


async def rest(call: Call) -> list[pb.ModelStreamInferResponse]:
    """All that is still to come on a stream that was written to."""
    responses = []
    while isinstance(response := await call.read(), pb.ModelStreamInferResponse):
        responses.append(response)
    return responses


def joined(responses: Iterable[pb.ModelStreamInferResponse], request_id: str = "") -> str:
    assert not any(response.error_message for response in responses)
    mine = [one.infer_response for one in responses if one.infer_response.id == request_id]
    return "".join(text(response) for response in mine if response.outputs)


class TestWholeAnswers:
    async def test_the_answer_follows_the_prompt_unless_it_is_excluded(self, serving: Router) -> None:
        whole = await infer(serving, asked(id="7"))
        assert text(whole) == "x = 1" + SAID
        assert (whole.model_name, whole.model_version, whole.id) == (MODEL, "1", "7")
        assert text(await infer(serving, asked(("exclude_input_in_output", "BOOL", [True])))) == SAID

    @pytest.mark.parametrize("batched", [False, True])
    @pytest.mark.parametrize("raw", [True, False])
    async def test_elements_go_the_way_they_came(self, serving: Router, raw: bool, batched: bool) -> None:
        whole = await infer(serving, asked(raw=raw, batched=batched))
        assert text(whole) == "x = 1" + SAID
        assert bool(whole.raw_output_contents) is raw

    async def test_the_options_of_tensorrt_llms_clients(self, router: Router) -> None:
        worker = await router.worker("b")
        options: list[Input] = [
            ("temperature", "FP32", [0.5]),
            ("top_k", "INT32", [7]),
            ("top_p", "FP32", [0.25]),
            ("random_seed", "UINT64", [11]),
            ("repetition_penalty", "FP32", [1.5]),
            ("presence_penalty", "FP32", [0.5]),
            ("frequency_penalty", "FP32", [-0.5]),
            ("min_length", "INT32", [2]),
            ("stop_words", "BYTES", [b"urn '", b""]),
            ("bad_words", "BYTES", [b""]),
            ("end_id", "INT32", [9]),
            ("pad_id", "INT32", [1]),
            ("beam_width", "INT32", [1]),
        ]
        call = asyncio.ensure_future(infer(router, asked(*options, batched=True)))
        (order,) = await worker.wait_for("decode")
        said = order.decode.sampling
        assert (said.temperature, said.top_k, said.top_p, said.seed) == (0.5, 7, 0.25, 11)
        assert (said.repetition_penalty, said.presence_penalty, said.frequency_penalty) == (1.5, 0.5, -0.5)
        assert (said.min_tokens, said.max_tokens, list(said.stop_token_ids)) == (2, len(ANSWER), [9])
        step = {"leg_id": order.decode.leg_id, "token_ids": ANSWER, "finish_reason": STOP}
        await worker.send(step={"outputs": [step]})
        assert text(await call) == "x = 1" + SAID[: SAID.index("urn '")]

    async def test_the_options_of_vllms_backend_and_numbers_as_texts(self, router: Router) -> None:
        worker = await router.worker("b")
        options = {"temperature": "0.5", "top_p": "0.25", "max_tokens": "3", "seed": 4, "stop": None, "n": 1}
        message = request(PROMPT, ("sampling_parameters", "BYTES", [json.dumps(options).encode()]))
        message.parameters["top_k"].int64_param = 7
        message.parameters["temperature"].string_param = "1.5"
        message.parameters["of-somebody-else"].string_param = "x"
        call = asyncio.ensure_future(infer(router, message))
        (order,) = await worker.wait_for("decode")
        said = order.decode.sampling
        assert (said.temperature, said.top_p, said.max_tokens, said.seed, said.top_k) == (0.5, 0.25, 3, 4, 7)
        call.cancel()

    async def test_token_ids_in_and_out(self, serving: Router) -> None:
        ids: Input = ("input_ids", "INT32", [5, 6, 7])
        whole = await infer(serving, asked(("input_lengths", "INT32", [3]), prompt=ids))
        assert tuple(output(whole, "output_ids")) == ANSWER
        assert text(whole) == SAID

    async def test_outputs_that_are_asked_for(self, serving: Router) -> None:
        names = ["finish_reason", "num_input_tokens", "num_output_tokens", "sequence_length", "output_ids"]
        whole = await infer(serving, asked(outputs=[{"name": name} for name in names]))
        assert [one.name for one in whole.outputs] == names
        assert output(whole, "finish_reason") == [b"length"]
        assert output(whole, "num_input_tokens") == [len(TEXT.encode("x = 1"))]
        assert output(whole, "num_output_tokens") == output(whole, "sequence_length") == [len(ANSWER)]
        flagged = await infer(serving, asked(("return_finish_reason", "BOOL", [True])))
        assert [one.name for one in flagged.outputs] == ["text_output", "finish_reason"]

    async def test_log_probabilities(self, router: Router) -> None:
        worker = await router.worker("b")
        flags: list[Input] = [("return_logprobs", "BOOL", [True]), ("return_log_probs", "BOOL", [True])]
        call = asyncio.ensure_future(infer(router, asked(*flags, ("logprobs", "INT32", [2]))))
        (order,) = await worker.wait_for("decode")
        assert order.decode.sampling.logprobs == 2
        top = [{"token_id": 8, "logprob": -0.25}, {"token_id": 9, "logprob": -0.5}]
        entry = {"sampled": {"token_id": 9, "logprob": -0.5}, "top": top}
        step = {"leg_id": order.decode.leg_id, "token_ids": [9, 9], "logprobs": [entry] * 2, "finish_reason": STOP}
        await worker.send(step={"outputs": [step]})
        whole = await call
        assert output(whole, "output_log_probs") == [-0.5, -0.5]
        assert output(whole, "cum_log_probs") == [-1.0]
        (said,) = output(whole, "logprobs")
        assert isinstance(said, bytes)
        best, sampled = {"logprob": -0.25, "rank": 1}, {"logprob": -0.5, "rank": 2}
        assert json.loads(said) == [{"9": sampled, "8": best}] * 2

    async def test_timeout_in_microseconds_is_a_deadline(self, router: Router) -> None:
        await router.worker("b")
        message = asked()
        message.parameters["timeout"].int64_param = 50_000
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await infer(router, message)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await router.is_idle()

    async def test_a_cancelled_call_frees_its_legs(self, router: Router) -> None:
        worker = await router.worker("b")
        call = asyncio.ensure_future(infer(router, asked()))
        await worker.wait_for("decode")
        call.cancel()
        await worker.wait_for("cancel")
        await router.is_idle()


class TestStreams:
    async def test_deltas_make_the_answer(self, serving: Router) -> None:
        responses = await stream(serving, asked(STREAM, id="a"))
        assert len(responses) > 2
        assert joined(responses, "a") == SAID
        assert not any(FINAL in response.infer_response.parameters for response in responses)

    async def test_the_prompt_comes_first_when_asked_for(self, serving: Router) -> None:
        responses = await stream(serving, asked(STREAM, ("exclude_input_in_output", "BOOL", [False])))
        assert joined(responses) == "x = 1" + SAID

    async def test_without_stream_one_response_has_it_all(self, serving: Router) -> None:
        (response,) = await stream(serving, asked())
        assert text(response.infer_response) == "x = 1" + SAID

    @pytest.mark.parametrize("raw", [True, False])
    async def test_the_last_response_says_so_when_asked_to(self, serving: Router, raw: bool) -> None:
        message = asked(STREAM, id="a", raw=raw)
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        *some, last = [response.infer_response for response in await stream(serving, message)]
        assert [one.parameters[FINAL].bool_param for one in some] == [False] * len(some)
        assert last.parameters[FINAL].bool_param
        assert (last.id, len(last.outputs)) == ("a", 0)
        assert "".join(text(one) for one in some) == SAID

    async def test_the_finish_reason_comes_with_the_last_response(self, serving: Router) -> None:
        message = asked(STREAM, ("return_finish_reason", "BOOL", [True]), ("return_num_output_tokens", "BOOL", [True]))
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        *some, last = [response.infer_response for response in await stream(serving, message)]
        assert {bytes(*output(one, "finish_reason")) for one in some} == {b""}
        assert output(last, "finish_reason") == [b"length"]
        assert last.parameters[FINAL].bool_param
        counts = [output(one, "num_output_tokens")[0] for one in (*some, last)]
        assert sum(int(str(count)) for count in counts) == len(ANSWER)

    async def test_requests_of_one_stream_are_served_at_the_same_time(self, router: Router) -> None:
        worker = await router.worker("b")
        call = stub(router).ModelStreamInfer(timeout=WAIT_S)
        for request_id in ("slow", "quick"):
            await call.write(asked(STREAM, id=request_id))
        await call.done_writing()
        slow, quick = [order.decode for order in await worker.wait_for("decode", 2)]
        await worker.decode_all(quick, ANSWER)
        first = await call.read()
        assert isinstance(first, pb.ModelStreamInferResponse)
        assert first.infer_response.id == "quick"
        await worker.decode_all(slow, ANSWER)
        responses = [first, *await rest(call)]
        assert joined(responses, "quick") == joined(responses, "slow") == SAID

    async def test_an_id_says_nothing_beyond_its_stream(self, serving: Router) -> None:
        both = await asyncio.gather(*(stream(serving, asked(STREAM, id="1")) for _ in range(2)))
        assert [joined(responses, "1") for responses in both] == [SAID, SAID]

    async def test_more_than_may_run_at_once_wait_to_be_read(self) -> None:
        async with running(requests=RequestLimits(answers_max=2)) as router:
            worker = await router.worker("b")
            call = stub(router).ModelStreamInfer(timeout=WAIT_S)
            for number in range(3):
                await call.write(asked(STREAM, id=str(number)))
            await call.done_writing()
            first, _ = await worker.wait_for("decode", 2)
            assert len((await router.status()).requests) == 2
            worker.answer = ANSWER
            await worker.decode(first.decode)
            _, second, third = await worker.wait_for("decode", 3)
            await worker.decode(second.decode)
            await worker.decode(third.decode)
            responses = await rest(call)
            assert [joined(responses, str(number)) for number in range(3)] == [SAID] * 3

    async def test_what_fails_does_not_end_the_stream(self, serving: Router) -> None:
        bad = asked(STREAM, ("temperature", "FP32", [3.0]), id="bad")
        responses = await stream(serving, bad, asked(STREAM, id="good"))
        (failed,) = [one for one in responses if one.error_message]
        assert failed.infer_response.id == "bad"
        said = json.loads(failed.error_message)
        assert (said["code"], said["reason"], said["field"]) == ("INVALID_ARGUMENT", "INVALID_FIELD", "temperature")
        assert joined([one for one in responses if not one.error_message], "good") == SAID

    async def test_a_client_may_ask_for_a_status_instead(self, serving: Router) -> None:
        call = stub(serving).ModelStreamInfer(
            iter([request(STREAM)]), timeout=WAIT_S, metadata=(("triton_grpc_error", "true"),)
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "text_input" in str(caught.value.details())

    async def test_bytes_that_are_no_request_are_told_in_the_stream(self, serving: Router) -> None:
        method: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
        method = serving.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        call = method(iter([b"\xff\xff", b"\x1a\x02\xff\xfe", asked(STREAM).SerializeToString()]), timeout=WAIT_S)
        responses = [pb.ModelStreamInferResponse.FromString(data) async for data in call]
        fields = {json.loads(one.error_message)["field"] for one in responses if one.error_message}
        assert fields == {"request", "id"}
        assert joined([one for one in responses if not one.error_message]) == SAID

    async def test_a_cancelled_stream_takes_all_of_its_requests_with_it(self, router: Router) -> None:
        worker = await router.worker("b")
        call = stub(router).ModelStreamInfer(timeout=WAIT_S)
        for number in range(3):
            await call.write(asked(STREAM, id=str(number)))
        await worker.wait_for("decode", 3)
        call.cancel()
        await worker.wait_for("cancel", 3)
        await router.is_idle()

    async def test_an_idle_stream_ends_when_the_client_closes_it(self, serving: Router) -> None:
        assert await stream(serving) == []


#: (inputs, the tensor at fault, what the refusal says)
BAD: list[tuple[list[Input], str, str]] = [
    ([], "text_input", "must be given"),
    ([("text_input", "BYTES", [])], "text_input", "one element"),
    ([("text_input", "BYTES", [b"a", b"b"])], "text_input", "has 2"),
    ([("text_input", "BYTES", [b""])], "text_input", "empty"),
    ([("text_input", "BYTES", [b"\xff"])], "text_input", "UTF-8"),
    ([("text_input", "INT32", [1])], "text_input", "text"),
    ([PROMPT, ("input_ids", "INT32", [1])], "input_ids", "beside"),
    ([("input_ids", "INT32", [1, -2])], "input_ids", "-2"),
    ([("input_ids", "INT32", [1, VOCAB])], "input_ids[1]", str(VOCAB)),
    ([("input_ids", "INT32", [1]), ("input_lengths", "INT32", [2])], "input_lengths", "has 1"),
    ([("input_ids", "INT32", [1] * CONTEXT)], "input_ids", str(CONTEXT)),
    ([PROMPT, ("max_tokens", "INT32", [0])], "max_tokens", "1"),
    ([PROMPT, ("max_tokens", "INT32", [CONTEXT])], "max_tokens", str(CONTEXT)),
    ([PROMPT, ("max_tokens", "FP32", [1.5])], "max_tokens", "whole"),
    ([PROMPT, ("max_tokens", "BYTES", [b"many"])], "max_tokens", "many"),
    ([PROMPT, ("max_tokens", "INT32", [1, 2])], "max_tokens", "2"),
    ([PROMPT, ("max_tokens", "BOOL", [True])], "max_tokens", "whole"),
    ([PROMPT, ("request_output_len", "INT32", [-1])], "request_output_len", "-1"),
    ([PROMPT, ("temperature", "FP32", [2.5])], "temperature", "2"),
    ([PROMPT, ("temperature", "FP32", [float("nan")])], "temperature", "nan"),
    ([PROMPT, ("runtime_top_p", "FP32", [1.5])], "runtime_top_p", "1"),
    ([PROMPT, ("random_seed", "UINT64", [2**64 - 1])], "random_seed", "from 0 to"),
    ([PROMPT, ("stop_words", "BYTES", [b"x" * 257])], "stop_words[0]", "256"),
    ([PROMPT, ("stream", "BYTES", [b"maybe"])], "stream", "maybe"),
    ([PROMPT, ("beam_width", "INT32", [4])], "beam_width", "not supported"),
    ([PROMPT, ("timeout", "INT32", [-1])], "timeout", "negative"),
    ([PROMPT, ("bad_words", "BYTES", [b"darn"])], "bad_words", "not supported"),
    ([PROMPT, ("prompt_embedding_table", "FP32", [0.0])], "prompt_embedding_table", "not known"),
    ([PROMPT, ("sampling_parameters", "BYTES", [b"{"])], "sampling_parameters", "JSON"),
    ([PROMPT, ("sampling_parameters", "BYTES", [b"[]"])], "sampling_parameters", "JSON"),
    ([PROMPT, ("sampling_parameters", "BYTES", [b'{"tmp": 1}'])], "sampling_parameters.tmp", "not known"),
    ([PROMPT, ("sampling_parameters", "BYTES", [b'{"stop": {"a": 1}}'])], "sampling_parameters.stop", "text"),
    ([PROMPT, ("sampling_parameters", "BYTES", [b'{"top_k": -9}'])], "sampling_parameters.top_k", "0"),
    ([PROMPT, ("no_such", "COMPLEX", [])], "no_such", "COMPLEX"),
]


@pytest_asyncio.fixture(scope="class", loop_scope="class")
async def long_serving() -> AsyncIterator[Router]:
    """One router for all bad input, which must be up at the end."""
    async with running() as router:
        await router.worker("b", answer=ANSWER)
        yield router
        assert text(await infer(router, asked())) == "x = 1" + SAID
        await router.is_idle()


@pytest.mark.asyncio(loop_scope="class")
class TestBadInput:
    @pytest.mark.parametrize(("inputs", "field", "says"), BAD)
    async def test_the_tensor_and_the_limit_are_named(
        self, long_serving: Router, inputs: list[Input], field: str, says: str
    ) -> None:
        message = pb.ModelInferRequest(model_name=MODEL)
        for name, datatype, elements in inputs:
            message.inputs.add(name=name, datatype=datatype, shape=[len(elements)])
            raw = b"" if datatype == "COMPLEX" else tensors.to_raw(datatype, elements)  # type: ignore[arg-type]
            message.raw_input_contents.append(raw)
        error = await self.refused(long_serving, message)
        assert error.field == field  # type: ignore[attr-defined]
        assert says in str(error)

    @pytest.mark.parametrize(
        ("shape", "raw", "says"),
        [
            ([2], tensors.to_raw("BYTES", [b"x"]), "2 elements, has 1"),
            ([1], tensors.to_raw("BYTES", [b"x", b"y"]), "1 elements, has 2"),
            ([1], b"\xff\xff\xff\x7fx", "length"),
            ([1], b"\x01", "length"),
            ([-1], b"", "negative"),
            ([1 << 40, 1 << 40], b"", "at most"),
        ],
    )
    async def test_raw_bytes_that_are_not_what_the_shape_says(
        self, long_serving: Router, shape: list[int], raw: bytes, says: str
    ) -> None:
        message = pb.ModelInferRequest(inputs=[{"name": "text_input", "datatype": "BYTES", "shape": shape}])
        message.raw_input_contents.append(raw)
        error = await self.refused(long_serving, message)
        assert error.field == "text_input"  # type: ignore[attr-defined]
        assert says in str(error)

    async def test_other_mistakes(self, long_serving: Router) -> None:
        twice = request(PROMPT, PROMPT)
        fewer = request(PROMPT, MAX_TOKENS)
        del fewer.raw_input_contents[1]
        both = request(PROMPT)
        both.inputs[0].contents.bytes_contents.append(b"x")
        short = request(PROMPT, ("max_tokens", "INT32", [1]))
        short.raw_input_contents[1] = b"\0"
        cases = {
            "inputs[1].name": twice,
            "raw_input_contents": fewer,
            "text_input": both,
            "max_tokens": short,
            "outputs[0].name": request(PROMPT, outputs=[{"name": "no_such"}]),
            "stream": request(PROMPT, STREAM),
            "lane": request(PROMPT, ("lane", "BYTES", [b"fast"])),
        }
        for field, message in cases.items():
            error = await self.refused(long_serving, message)
            assert error.field == field  # type: ignore[attr-defined]

    @pytest.mark.parametrize(("model", "version"), [("no-such", ""), (MODEL, "2")])
    async def test_what_is_not_served_is_not_found(self, long_serving: Router, model: str, version: str) -> None:
        message = asked(model_version=version)
        message.model_name = model
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await infer(long_serving, message)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    async def refused(self, router: Router, message: pb.ModelInferRequest) -> Exception:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await infer(router, message)
        assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE)
        return error_from_rpc(caught.value)


class TestAboutTheServer:
    async def test_live_at_once_and_ready_with_a_worker(self, router: Router) -> None:
        server = stub(router)
        assert (await server.ServerLive(pb.ServerLiveRequest())).live
        assert not (await server.ServerReady(pb.ServerReadyRequest())).ready
        assert not (await server.ModelReady(pb.ModelReadyRequest(name=MODEL))).ready
        (listed,) = (await server.RepositoryIndex(pb.RepositoryIndexRequest())).models
        assert (listed.name, listed.state) == (MODEL, "UNAVAILABLE")
        assert not (await server.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))).models
        await router.worker("b", answer=ANSWER)
        assert (await server.ServerReady(pb.ServerReadyRequest())).ready
        assert (await server.ModelReady(pb.ModelReadyRequest(name=MODEL, version="1"))).ready
        assert not (await server.ModelReady(pb.ModelReadyRequest(name="no-such"))).ready
        assert (await server.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))).models[0].state == "READY"

    async def test_metadata_and_configuration_tell_of_a_stream_of_tokens(self, serving: Router) -> None:
        server = stub(serving)
        assert (await server.ServerMetadata(pb.ServerMetadataRequest())).name == "tandem"
        metadata = await server.ModelMetadata(pb.ModelMetadataRequest(name=MODEL))
        assert {"text_input", "stream", "sampling_parameters", "max_tokens"} <= {one.name for one in metadata.inputs}
        assert metadata.outputs[0].name == "text_output"
        config = (await server.ModelConfig(pb.ModelConfigRequest(name=MODEL))).config
        assert config.model_transaction_policy.decoupled
        assert [one.name for one in config.input if not one.optional] == ["text_input"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.ModelConfig(pb.ModelConfigRequest(name="no-such"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    async def test_every_named_input_is_taken(self, serving: Router) -> None:
        metadata = await stub(serving).ModelMetadata(pb.ModelMetadataRequest(name=MODEL))
        values: dict[str, object] = {
            "text_input": b"x",
            "sampling_parameters": b"{}",
            "stop_words": b"no such text",
            "top_p": 0.5,
            "max_tokens": len(ANSWER),
        }
        for one in metadata.inputs:
            if one.name not in ("stream", "input_ids"):
                element = values.get(one.name, {"BOOL": True, "FP32": 1.0}.get(one.datatype, 1))
                message = request(PROMPT) if one.name != "text_input" else request()
                message.inputs.add(name=one.name, datatype=one.datatype, shape=[1])
                message.raw_input_contents.append(tensors.to_raw(one.datatype, [element]))  # type: ignore[list-item]
                if one.name != "max_tokens":
                    message.inputs.add(name="max_tokens", datatype="INT32", shape=[1])
                    message.raw_input_contents.append(tensors.to_raw("INT32", [len(ANSWER)]))
                assert text(await infer(serving, message))

    async def test_statistics_count_answers(self, serving: Router) -> None:
        await infer(serving, asked())
        (found,) = (await stub(serving).ModelStatistics(pb.ModelStatisticsRequest(name=MODEL))).model_stats
        assert (found.name, found.inference_count, found.inference_stats.success.count) == (MODEL, 1, 1)
        stats = found.inference_stats
        parts = (stats.compute_input, stats.compute_infer, stats.compute_output)
        assert {part.count for part in parts} == {1}  # perf_analyzer ends itself unless they are counted alike
        assert 0 < sum(part.ns for part in parts) <= stats.success.ns

    async def test_what_triton_has_and_a_cluster_has_not(self, serving: Router) -> None:
        server = stub(serving)
        assert not (await server.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest())).regions
        assert not (await server.CudaSharedMemoryStatus(pb.CudaSharedMemoryStatusRequest())).regions
        assert not (await server.TraceSetting(pb.TraceSettingRequest())).settings
        assert not (await server.LogSettings(pb.LogSettingsRequest())).settings
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.SystemSharedMemoryRegister(pb.SystemSharedMemoryRegisterRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "SystemSharedMemoryRegister" in str(caught.value.details())


class TestCallers:
    @pytest.mark.parametrize("header", ["authorization", "x-api-key"])
    async def test_a_key_is_its_tenant(self, files: Files, header: str) -> None:
        key = files.create("acme")
        metadata = ((header, f"Bearer {key}" if header == "authorization" else key),)
        async with running(tenants_file=str(files.tenants), auth=files.auth()) as router:
            worker = await router.worker("b")
            call = stub(router).ModelStreamInfer(iter([asked(STREAM)]), timeout=WAIT_S, metadata=metadata)
            (order,) = await worker.wait_for("decode")
            assert order.decode.tenant == "acme"
            assert order.decode.cache_salt
            call.cancel()

    async def test_without_one_only_health_is_told(self, files: Files) -> None:
        async with running(tenants_file=str(files.tenants), auth=files.auth()) as router:
            server = stub(router)
            assert (await server.ServerLive(pb.ServerLiveRequest())).live
            await server.ServerReady(pb.ServerReadyRequest())
            calls: list[Awaitable[object]] = [
                server.ModelInfer(asked()),
                server.ModelMetadata(pb.ModelMetadataRequest(name=MODEL)),
                server.RepositoryIndex(pb.RepositoryIndexRequest()),
                server.ModelStatistics(pb.ModelStatisticsRequest()),
            ]
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            # Nothing is sent: a write that meets the refusal on its way is told as the client's own fault.
            stream = server.ModelStreamInfer(timeout=WAIT_S)
            assert await stream.code() is grpc.StatusCode.UNAUTHENTICATED

    async def test_statistics_are_an_operators(self, files: Files) -> None:
        metadata = (("x-api-key", files.create("acme")),)
        async with running(tenants_file=str(files.tenants), auth=files.auth()) as router:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub(router).ModelStatistics(pb.ModelStatisticsRequest(), metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64", "INT8", "INT16", "INT64", "UINT8", "UINT16", "UINT32"])
def test_raw_numbers_come_back_as_they_went(datatype: str) -> None:
    values = [0, 1, 100]
    assert tensors.from_raw("t", datatype, [3], tensors.to_raw(datatype, values)).elements == values


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("say_final", [True, False])
@pytest.mark.parametrize("request_id", ["", "1", "x" * 300, "x" * 20_000])
def test_a_piece_of_text_is_the_message_that_protobuf_makes(raw: bool, say_final: bool, request_id: str) -> None:
    request = pb.ModelInferRequest(id=request_id, raw_input_contents=[b"x"] if raw else [])

    def reply() -> wire.Reply:
        return wire.Reply(request, MODEL, [wire.Output("text_output", "BYTES")], say_final=say_final)

    ours, protobufs = reply(), reply()
    for text in ("a", "", "größe", "x" * 123, "x" * 124, "漢" * 41, "漢" * 42, "b"):
        assert ours.text(text) == protobufs.streamed(((text.encode(),),))


def test_our_messages_load_beside_those_of_a_clients_library() -> None:
    """In a process of its own: what is loaded stays."""
    program = """
from google.protobuf import descriptor_pb2, descriptor_pool
file = descriptor_pb2.FileDescriptorProto(name="grpc_service.proto", package="inference", syntax="proto3")
file.message_type.add(name="ServerLiveRequest")
descriptor_pool.Default().Add(file)
from protos.compat import kserve_pb2, orca_service_pb2, vllm_engine_pb2
assert kserve_pb2.ServerLiveResponse.FromString(kserve_pb2.ServerLiveResponse(live=True).SerializeToString()).live
"""
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True, timeout=60)


def test_a_raw_tensor_of_no_known_datatype_is_refused() -> None:
    with pytest.raises(Invalid, match="BF16"):
        tensors.from_raw("t", "BF16", [1], b"\0\0")
