"""What a gateway that speaks vLLM's engine API sees of a cluster: a real router, scripted workers, real gRPC."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import zipfile
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
import pytest_asyncio

from protos.compat import smg_common_pb2 as common
from protos.compat import vllm_engine_pb2 as pb
from protos.compat import vllm_engine_pb2_grpc as pb_grpc
from tandem.errors import error_from_rpc
from tests.router.running import CONTEXT, MODEL, STOP, VOCAB, WAIT_S, Router, running
from tests.router.test_edge import ANSWER, TEXT
from tests.router.test_identity import Files, files

__all__ = ["files"]

PROMPT = (5, 6, 7)


@pytest_asyncio.fixture
async def router() -> AsyncIterator[Router]:
    async with running() as router:
        yield router


def stub(router: Router) -> pb_grpc.VllmEngineAsyncStub:
    return pb_grpc.VllmEngineStub(router.channel)


def request(*, stream: bool = True, **sampling: object) -> pb.GenerateRequest:
    said = pb.SamplingParams(**{"max_tokens": len(ANSWER), "temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return pb.GenerateRequest(tokenized={"input_ids": PROMPT}, sampling_params=said, stream=stream)


async def generate(
    router: Router, message: pb.GenerateRequest
) -> tuple[list[pb.GenerateStreamChunk], pb.GenerateComplete]:
    responses = [response async for response in stub(router).Generate(message, timeout=WAIT_S)]
    *chunks, last = responses
    assert all(one.HasField("chunk") for one in chunks)
    return [one.chunk for one in chunks], last.complete


async def failure(router: Router, message: pb.GenerateRequest, **how: object) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub(router).Generate(message, timeout=WAIT_S, **how):  # type: ignore[arg-type]
            pass
    return caught.value


class TestGenerate:
    async def test_chunks_carry_deltas_and_the_end_carries_it_all(self, router: Router) -> None:
        await router.pair(ANSWER)
        chunks, complete = await generate(router, request())
        assert len(chunks) > 2
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == ANSWER
        assert sum(chunk.completion_tokens for chunk in chunks) == len(ANSWER)
        assert {chunk.prompt_tokens for chunk in chunks} == {len(PROMPT)}
        assert tuple(complete.output_ids) == ANSWER
        assert (complete.finish_reason, complete.prompt_tokens) == ("length", len(PROMPT))
        assert (complete.completion_tokens, complete.cached_tokens) == (len(ANSWER), 2)

    async def test_without_stream_there_is_only_the_end(self, router: Router) -> None:
        await router.pair(ANSWER)
        chunks, complete = await generate(router, request(stream=False))
        assert chunks == []
        assert tuple(complete.output_ids) == ANSWER

    async def test_text_and_stop_strings_are_the_clusters_to_handle(self, router: Router) -> None:
        await router.worker("b", answer=ANSWER)
        message = request(stop=["urn '"])
        message.text = "x = 1"
        _, complete = await generate(router, message)
        assert complete.finish_reason == "stop"
        assert complete.matched_stop_str == "urn '"
        assert complete.prompt_tokens == len(TEXT.encode("x = 1"))
        assert 0 < len(complete.output_ids) < len(ANSWER)

    async def test_zeros_that_mean_unset_and_zeros_that_do_not(self, router: Router) -> None:
        worker = await router.worker("b")
        call = stub(router).Generate(pb.GenerateRequest(tokenized={"input_ids": PROMPT}), timeout=WAIT_S)
        (order,) = await worker.wait_for("decode")
        said = order.decode.sampling
        assert (said.temperature, said.top_p, said.repetition_penalty, said.top_k, said.min_p) == (1.0, 1.0, 1.0, 0, 0)
        assert said.max_tokens == 256
        call.cancel()
        await router.is_idle()

    async def test_several_answers_each_with_its_index_and_seed(self, router: Router) -> None:
        worker = await router.worker("b")
        call = asyncio.ensure_future(_responses(router, request(n=3, seed=11, temperature=1.0)))
        orders = await worker.wait_for("decode", 3)
        assert sorted(order.decode.sampling.seed for order in orders) == [11, 12, 13]
        for order in orders:
            await worker.decode_all(order.decode, ANSWER)
        responses = await call
        ends = [one.complete for one in responses if one.HasField("complete")]
        assert sorted(end.index for end in ends) == [0, 1, 2]
        for index in range(3):
            tokens = [one.chunk.token_ids for one in responses if one.HasField("chunk") and one.chunk.index == index]
            assert tuple(token for some in tokens for token in some) == ANSWER

    async def test_forms_and_biases_reach_an_engine_that_can(self, router: Router) -> None:
        features = {"name": MODEL, "revision": "r0", "max_model_len": CONTEXT, "vocab_size": VOCAB}
        worker = await router.worker("b", model={**features, "features": ["structure", "logit_bias"]})
        call = stub(router).Generate(request(regex="a+", logit_bias={7: -1.5}), timeout=WAIT_S)
        (order,) = await worker.wait_for("decode")
        assert (order.decode.sampling.structure.regex, dict(order.decode.sampling.logit_bias)) == ("a+", {7: -1.5})
        call.cancel()
        await router.is_idle()

    async def test_log_probabilities_come_beside_their_tokens(self, router: Router) -> None:
        worker = await router.worker("b")
        call = asyncio.ensure_future(_responses(router, request(logprobs=1)))
        (order,) = await worker.wait_for("decode")
        entry = {"sampled": {"token_id": 9, "logprob": -0.5}, "top": [{"token_id": 8, "logprob": -0.25}]}
        step = {"leg_id": order.decode.leg_id, "token_ids": [9, 9], "logprobs": [entry] * 2, "finish_reason": STOP}
        await worker.send(step={"outputs": [step]})
        chunk, complete = await call
        for said in (chunk.chunk.output_logprobs, complete.complete.output_logprobs):
            assert list(said.token_logprobs) == [-0.5, -0.5]
            assert [list(top.token_ids) for top in said.top_logprobs] == [[8], [8]]

    async def test_abort_ends_a_request_by_its_id(self, router: Router) -> None:
        worker = await router.worker("b")
        message = request()
        message.request_id = "mine"
        call = asyncio.ensure_future(failure(router, message))
        await worker.wait_for("decode")
        await stub(router).Abort(pb.AbortRequest(request_ids=["of-nobody", "mine"]))
        assert (await call).code() is grpc.StatusCode.CANCELLED
        await worker.wait_for("cancel")
        await router.is_idle()

    async def test_a_client_that_goes_frees_its_legs(self, router: Router) -> None:
        worker = await router.worker("b")
        call = stub(router).Generate(request(n=2), timeout=WAIT_S)
        await worker.wait_for("decode", 2)
        call.cancel()
        await worker.wait_for("cancel", 2)
        await router.is_idle()


async def _responses(router: Router, message: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    return [response async for response in stub(router).Generate(message, timeout=WAIT_S)]


#: (what is wrong, the field at fault)
BAD: list[tuple[Callable[[pb.GenerateRequest], object], str]] = [
    (lambda message: message.ClearField("tokenized"), "tokenized.input_ids"),
    (lambda message: message.tokenized.input_ids.append(VOCAB), "tokenized.input_ids[3]"),
    (lambda message: message.tokenized.input_ids.extend([1] * CONTEXT), "tokenized.input_ids"),
    (lambda message: setattr(message.sampling_params, "max_tokens", 0), "sampling.max_tokens"),
    (lambda message: setattr(message.sampling_params, "temperature", -1), "sampling.temperature"),
    (lambda message: setattr(message.sampling_params, "n", 65), "n"),
    (lambda message: setattr(message.sampling_params, "logprobs", -1), "sampling.logprobs"),
    (lambda message: setattr(message.sampling_params, "seed", -1), "sampling.seed"),
    (lambda message: setattr(message.sampling_params, "structural_tag", "{}"), "sampling_params.structural_tag"),
    (lambda message: message.sampling_params.choice.choices.append("a"), "sampling_params.choice"),
    # Of what not every engine can do.
    (lambda message: setattr(message.sampling_params, "json_object", True), "sampling.structure"),
    (lambda message: message.sampling_params.logit_bias.update({1: 2.0}), "sampling.logit_bias"),
    (lambda message: message.sampling_params.logit_bias.update({-1: 2.0}), "sampling_params.logit_bias"),
    (lambda message: setattr(message.sampling_params, "prompt_logprobs", 1), "sampling_params.prompt_logprobs"),
    (lambda message: message.mm_inputs.SetInParent(), "mm_inputs"),
    (lambda message: setattr(message, "data_parallel_rank", 1), "data_parallel_rank"),
    (
        lambda message: setattr(message, "kv_transfer_params_json", '{"do_remote_decode": true}'),
        "kv_transfer_params_json",
    ),
    (lambda message: setattr(message, "request_id", "a/b"), "request_id"),
]


@pytest_asyncio.fixture(scope="class", loop_scope="class")
async def serving() -> AsyncIterator[Router]:
    async with running() as router:
        await router.worker("b", answer=ANSWER)
        yield router
        await generate(router, request())
        await router.is_idle()


@pytest.mark.asyncio(loop_scope="class")
class TestBadInput:
    @pytest.mark.parametrize(("spoil", "field"), BAD)
    async def test_the_field_is_named(
        self, serving: Router, spoil: Callable[[pb.GenerateRequest], object], field: str
    ) -> None:
        message = request()
        spoil(message)
        error = await failure(serving, message)
        assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE)
        assert error_from_rpc(error).field == field


class TestAboutTheCluster:
    async def test_health_follows_the_pool(self, router: Router) -> None:
        engine = stub(router)
        assert not (await engine.HealthCheck(pb.HealthCheckRequest())).healthy
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await engine.GetModelInfo(pb.GetModelInfoRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await router.worker("b", answer=ANSWER)
        assert (await engine.HealthCheck(pb.HealthCheckRequest())).healthy

    async def test_what_a_gateway_needs_to_know(self, router: Router) -> None:
        await router.worker("b", answer=ANSWER)
        engine = stub(router)
        model = await engine.GetModelInfo(pb.GetModelInfoRequest())
        assert (model.served_model_name, model.max_context_length, model.vocab_size) == (MODEL, CONTEXT, VOCAB)
        assert (list(model.eos_token_ids), list(model.architectures)) == ([0], ["LlamaForCausalLM"])
        assert json.loads(model.default_sampling_params_json) == {}
        assert "/" not in model.model_path + model.tokenizer_path, "a path of the server's was told"
        server = await engine.GetServerInfo(pb.GetServerInfoRequest())
        assert (server.server_type, server.kv_connector, server.max_num_seqs) == ("vllm-grpc", "", 8)
        assert server.uptime_seconds > 0
        (load,) = (await engine.GetLoads(pb.GetLoadsRequest())).loads
        assert (load.num_running_reqs, load.num_waiting_reqs, load.max_running_requests) == (0, 0, 8)

    async def test_the_tokenizer_comes_as_an_archive(self, router: Router) -> None:
        chunks = [chunk async for chunk in stub(router).GetTokenizer(common.GetTokenizerRequest())]
        data = b"".join(chunk.data for chunk in chunks)
        assert [bool(chunk.sha256) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
        names = set(zipfile.ZipFile(io.BytesIO(data)).namelist())
        assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= names
        assert not any(name.endswith(".safetensors") for name in names)

    async def test_what_there_is_nothing_for_is_refused_by_name(self, router: Router) -> None:
        engine = stub(router)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await engine.Embed(pb.EmbedRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "Embed" in str(caught.value.details())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in engine.SubscribeKvEvents(common.SubscribeKvEventsRequest()):
                pass
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


class TestCallers:
    async def test_one_tenant_cannot_abort_anothers_request(self, files: Files) -> None:
        mine, theirs = ((("x-api-key", files.create(tenant)),) for tenant in ("acme", "third"))
        async with running(tenants_file=str(files.tenants), auth=files.auth()) as router:
            worker = await router.worker("b")
            message = request()
            message.request_id = "same"
            call = asyncio.ensure_future(failure(router, message, metadata=mine))
            (order,) = await worker.wait_for("decode")
            assert order.decode.tenant == "acme"
            await stub(router).Abort(pb.AbortRequest(request_ids=["same"]), metadata=theirs)
            assert len(await worker.wait_for("decode")) == 1
            assert not call.done()
            other = asyncio.ensure_future(failure(router, message, metadata=theirs))  # of the same id, beside it
            await worker.wait_for("decode", 2)
            await stub(router).Abort(pb.AbortRequest(request_ids=["same"]), metadata=mine)
            assert (await call).code() is grpc.StatusCode.CANCELLED
            assert not other.done()
            await stub(router).Abort(pb.AbortRequest(request_ids=["same"]), metadata=theirs)
            assert (await other).code() is grpc.StatusCode.CANCELLED

    async def test_without_a_key_only_health_is_told(self, files: Files) -> None:
        async with running(tenants_file=str(files.tenants), auth=files.auth()) as router:
            engine = stub(router)
            await engine.HealthCheck(pb.HealthCheckRequest())
            assert (await failure(router, request())).code() is grpc.StatusCode.UNAUTHENTICATED
            for call in (
                engine.GetModelInfo(pb.GetModelInfoRequest()),
                engine.GetServerInfo(pb.GetServerInfoRequest()),
                engine.GetLoads(pb.GetLoadsRequest()),
                engine.Abort(pb.AbortRequest()),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
