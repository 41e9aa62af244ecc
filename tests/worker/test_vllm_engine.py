"""A gateway that is none of ours drives two workers through a hand-off: real gRPC, the simulated engine, real leases.
Its tokens follow from the KV bytes it reads back, so a token that is right came over the right bytes."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from kv_transfer.inproc import InprocHub
from protos.compat import smg_common_pb2 as common
from protos.compat import vllm_engine_pb2 as pb
from protos.compat import vllm_engine_pb2_grpc as pb_grpc
from tests.certificates import Authority
from tests.worker.running import RunningWorker, running_worker
from tests.worker.scripted_router import scripted_router
from tests.worker.test_sim import MODEL, Stepwise, sim_config
from trust.tls import Tls, TlsFiles
from worker.config import Role, WorkerConfig
from worker.stops import load_tokenizer

WAIT_S = 60.0
TEXT = load_tokenizer(MODEL)
PROMPT = tuple(range(5, 105))
TO_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


@dataclass
class Worker:
    engine: Stepwise
    process: RunningWorker
    channel: grpc.aio.Channel
    address: str

    @property
    def stub(self) -> pb_grpc.VllmEngineAsyncStub:
        return pb_grpc.VllmEngineStub(self.channel)

    async def generate(self, message: pb.GenerateRequest) -> list[pb.GenerateResponse]:
        return [response async for response in self.stub.Generate(message, timeout=WAIT_S)]

    async def complete(self, message: pb.GenerateRequest) -> pb.GenerateComplete:
        (response,) = await self.generate(message)
        return response.complete

    async def refusal(self, message: pb.GenerateRequest) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.generate(message)
        return caught.value

    async def at_rest(self) -> None:
        """Until nothing is open, pinned or staged, before leases end by themselves."""
        async with asyncio.timeout(20.0):
            while True:
                load = await self.engine.load()
                if not (load.running or load.waiting or load.leases_held or load.staged_pages):
                    break
                await asyncio.sleep(0.01)
        self.engine.check_integrity(read_memory=True)


@asynccontextmanager
async def running(config: WorkerConfig, hub: InprocHub, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Worker]:
    engine = Stepwise(config.engine_options, hub)
    caplog.set_level(logging.INFO)
    caplog.clear()
    async with running_worker(replace(config, engine_listen="127.0.0.1:0"), engine) as process:
        async with asyncio.timeout(WAIT_S):
            while not (said := [line for line in caplog.messages if line.startswith("vLLM's engine API on")]):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        address = said[0].rpartition(" ")[2]
        async with grpc.aio.insecure_channel(address) as channel:
            yield Worker(engine, process, channel, address)


@dataclass
class Pair:
    p: Worker
    d: Worker


@pytest_asyncio.fixture
async def pair(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Pair]:
    hub = InprocHub()
    async with scripted_router() as router:
        p0 = sim_config(router.address, "p0", Role.PREFILL)
        d0 = sim_config(router.address, "d0", Role.DECODE, speedup=5)  # so that answers take a moment
        async with running(p0, hub, caplog) as p, running(d0, hub, caplog) as d:
            yield Pair(p, d)
            await p.at_rest()
            await d.at_rest()


def request(
    params: object = None, *, stream: bool = False, prompt: tuple[int, ...] = PROMPT, **sampling: object
) -> pb.GenerateRequest:
    said = pb.SamplingParams(**{"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
    message = pb.GenerateRequest(request_id="r", tokenized={"input_ids": prompt}, sampling_params=said, stream=stream)
    if params is not None:
        message.kv_transfer_params_json = params if isinstance(params, str) else json.dumps(params)
    return message


async def prefilled(pair: Pair, **more: object) -> str:
    """What the prefill worker answers, to be passed on."""
    done = await pair.p.complete(request(TO_PREFILL | more, max_tokens=1))
    assert (len(done.output_ids), done.finish_reason, done.prompt_tokens) == (1, "length", len(PROMPT))
    return done.kv_transfer_params_json


async def rest(call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]) -> list[pb.GenerateResponse]:
    """All that is still to come; a failure is the call's to tell."""
    responses = []
    with suppress(grpc.aio.AioRpcError):
        while isinstance(response := await call.read(), pb.GenerateResponse):
            responses.append(response)
    return responses


class TestHandOff:
    async def test_tokens_are_those_of_a_worker_that_computes_all_by_itself(self, pair: Pair) -> None:
        alone = await pair.d.complete(request())
        handed = await prefilled(pair)
        complete = await pair.d.complete(request(handed))
        assert list(complete.output_ids) == list(alone.output_ids)
        assert (complete.finish_reason, complete.completion_tokens) == ("length", 12)
        assert (await pair.d.engine.load()).transfer_bytes_total > 0

    async def test_the_parameters_name_the_peer_as_others_do(self, pair: Pair) -> None:
        said = json.loads(await prefilled(pair))
        assert (said["do_remote_prefill"], said["do_remote_decode"]) == (True, False)
        assert (said["remote_engine_id"], said["remote_host"]) == ("p0", "127.0.0.1")
        assert said["remote_port"] > 0
        await pair.d.complete(request(said))

    async def test_the_prefill_worker_can_stream_its_token_too(self, pair: Pair) -> None:
        chunk, complete = await pair.p.generate(request(TO_PREFILL, stream=True, max_tokens=1))
        assert list(chunk.chunk.token_ids) == list(complete.complete.output_ids)
        await pair.d.complete(request(complete.complete.kv_transfer_params_json))

    async def test_the_answer_streams(self, pair: Pair) -> None:
        *chunks, last = await pair.d.generate(request(await prefilled(pair), stream=True))
        assert [token for one in chunks for token in one.chunk.token_ids] == list(last.complete.output_ids)
        assert {one.chunk.prompt_tokens for one in chunks} == {len(PROMPT)}

    async def test_the_two_calls_may_have_different_names(self, pair: Pair) -> None:
        message = request(await prefilled(pair))
        message.request_id = ""
        assert len((await pair.d.complete(message)).output_ids) == 12

    async def test_only_the_reader_that_was_named_may_fetch(self, pair: Pair) -> None:
        handed = await prefilled(pair, reader="d9")
        error = await pair.d.refusal(request(handed))
        assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE)
        assert "d9" in str(error.details())
        await pair.p.engine.release(base64.b64decode(json.loads(handed)["tandem_handle"]))
        assert len((await pair.d.complete(request(await prefilled(pair, reader="d0")))).output_ids) == 12

    async def test_a_handle_is_used_once(self, pair: Pair) -> None:
        handed = await prefilled(pair)
        await pair.d.complete(request(handed))
        error = await pair.d.refusal(request(handed))
        assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE)

    async def test_another_prompt_is_told_apart_by_its_length(self, pair: Pair) -> None:
        handed = await prefilled(pair)
        error = await pair.d.refusal(request(handed, prompt=PROMPT[:-1]))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "100 tokens" in str(error.details())
        await pair.d.complete(request(handed))

    async def test_a_changed_handle_is_refused(self, pair: Pair) -> None:
        handed = await prefilled(pair)
        said = json.loads(handed)
        said["tandem_handle"] = said["tandem_handle"][:-8] + "AAAAAAA="
        error = await pair.d.refusal(request(said))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "tandem_handle" in str(error.details())
        await pair.d.complete(request(handed))

    async def test_a_prompt_that_nobody_fetches_is_let_go_when_its_call_is_cancelled(self, pair: Pair) -> None:
        call = pair.p.stub.Generate(request(TO_PREFILL, prompt=tuple(range(5, 3000)), max_tokens=1))
        call.cancel()
        await pair.p.at_rest()

    async def test_abort_ends_an_answer_by_its_name(self, pair: Pair) -> None:
        call = pair.d.stub.Generate(request(stream=True, max_tokens=3000), timeout=WAIT_S)
        await call.read()
        await pair.d.stub.Abort(pb.AbortRequest(request_ids=["r", "of-nobody"]))
        await rest(call)
        assert await call.code() is grpc.StatusCode.UNAVAILABLE

    async def test_a_client_that_goes_frees_its_leg(self, pair: Pair) -> None:
        call = pair.d.stub.Generate(request(stream=True, max_tokens=3000), timeout=WAIT_S)
        await call.read()
        call.cancel()
        await pair.d.at_rest()


class TestBesideTheHandOff:
    async def test_a_stop_string_ends_the_answer_with_the_token_that_completes_it(self, pair: Pair) -> None:
        whole = list((await pair.d.complete(request())).output_ids)
        stop = TEXT.decode(whole[4:7])
        assert stop not in TEXT.decode(whole[:6])
        *chunks, last = await pair.d.generate(request(stop=["no such text", stop], max_tokens=3000, stream=True))
        complete = last.complete
        assert (complete.finish_reason, complete.matched_stop_str) == ("stop", stop)
        assert list(complete.output_ids) == whole[:7]
        assert [token for one in chunks for token in one.chunk.token_ids] == whole[:7]
        later = await pair.d.complete(request(stop=[stop], min_tokens=7))
        assert list(later.output_ids) == whole, "looked at before min_tokens"

    async def test_several_answers(self, pair: Pair) -> None:
        responses = await pair.d.generate(request(n=3, seed=7, temperature=1.0))
        assert sorted(one.complete.index for one in responses) == [0, 1, 2]
        assert {len(one.complete.output_ids) for one in responses} == {12}

    async def test_a_prefill_worker_computes_a_prompt_that_is_not_handed_off(self, pair: Pair) -> None:
        complete = await pair.p.complete(request(max_tokens=1))
        assert len(complete.output_ids) == 1
        assert not complete.HasField("kv_transfer_params_json")


#: (what is wrong, what the refusal names)
BAD: list[tuple[Callable[[pb.GenerateRequest], object], str]] = [
    (lambda message: message.ClearField("tokenized"), "text"),
    (lambda message: message.tokenized.ClearField("input_ids"), "tokenized.input_ids"),
    (lambda message: message.tokenized.input_ids.append(4096), "tokenized.input_ids[100]"),
    (lambda message: message.tokenized.input_ids.extend([1] * 4096), "tokenized.input_ids"),
    (lambda message: setattr(message.sampling_params, "max_tokens", 0), "sampling_params.max_tokens"),
    (lambda message: setattr(message.sampling_params, "max_tokens", 4096), "sampling_params.max_tokens"),
    (lambda message: setattr(message.sampling_params, "temperature", -1), "sampling_params.temperature"),
    (lambda message: setattr(message.sampling_params, "temperature", float("nan")), "sampling_params.temperature"),
    (lambda message: setattr(message.sampling_params, "logprobs", 21), "sampling_params.logprobs"),
    (lambda message: setattr(message.sampling_params, "n", 65), "sampling_params.n"),
    (lambda message: message.sampling_params.stop.append(""), "sampling_params.stop"),
    (lambda message: message.MergeFrom(request({"do_remote_prefill": True}, n=2)), "sampling_params.n"),
    (lambda message: setattr(message.sampling_params, "regex", "a+"), "sampling_params.structure"),
    (lambda message: message.sampling_params.stop_token_ids.append(4096), "sampling_params.stop_token_ids[0]"),
    (lambda message: message.kv_transfer_params.SetInParent(), "kv_transfer_params"),
    (lambda message: setattr(message, "kv_transfer_params_json", "[]"), "kv_transfer_params_json"),
    (lambda message: setattr(message, "kv_transfer_params_json", '{"do_remote_prefill": true}'), "tandem_handle"),
    (lambda message: setattr(message, "kv_transfer_params_json", '{"reader": 3}'), "reader"),
]


async def test_bad_input_names_its_field_and_legs_of_the_other_role_go_elsewhere(pair: Pair) -> None:
    for spoil, field in BAD:
        message = request()
        spoil(message)
        error = await pair.d.refusal(message)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, field
        assert field in str(error.details())
    for worker, message in ((pair.d, request(TO_PREFILL)), (pair.p, request())):
        error = await worker.refusal(message)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "the role here is" in str(error.details())


async def test_what_a_gateway_asks_before_it_sends_work(pair: Pair) -> None:
    infos = [await worker.stub.GetServerInfo(pb.GetServerInfoRequest()) for worker in (pair.p, pair.d)]
    assert [(info.kv_role, info.kv_engine_id) for info in infos] == [("kv_producer", "p0"), ("kv_consumer", "d0")]
    assert infos[0].pairing_protocol == infos[1].pairing_protocol != ""
    assert {info.kv_connector for info in infos} == {"NixlConnector"}
    model = await pair.p.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (model.max_context_length, model.vocab_size) == (4096, 4096)
    assert [chunk async for chunk in pair.p.stub.GetTokenizer(common.GetTokenizerRequest())][-1].sha256
    (load,) = (await pair.d.stub.GetLoads(pb.GetLoadsRequest())).loads
    assert load.num_total_reqs == 0
    assert (await pair.p.stub.HealthCheck(pb.HealthCheckRequest())).healthy
    for service in ("", "vllm.grpc.engine.VllmEngine"):
        check = health_pb2_grpc.HealthStub(pair.p.channel).Check(health_pb2.HealthCheckRequest(service=service))
        assert (await check).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pair.p.stub.Embed(pb.EmbedRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    def services() -> list[str]:
        with grpc.insecure_channel(pair.p.address) as channel:
            return list(ProtoReflectionDescriptorDatabase(channel).get_services())

    assert "vllm.grpc.engine.VllmEngine" in await asyncio.to_thread(services)


async def test_a_worker_that_drains_says_so_and_finishes_what_it_has(pair: Pair) -> None:
    call = pair.d.stub.Generate(request(stream=True, max_tokens=300), timeout=WAIT_S)
    await call.read()
    pair.d.engine.hold(after_steps=0)
    pair.d.process.stop.set()
    async with asyncio.timeout(WAIT_S):
        while (await pair.d.stub.HealthCheck(pb.HealthCheckRequest())).healthy:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    error = await pair.d.refusal(request())
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "draining")
    pair.d.engine.go_on()
    *_, last = await rest(call)
    assert len(last.complete.output_ids) == 300


async def test_with_tls_it_takes_those_alone_whom_the_clusters_authority_vouches_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    async with scripted_router() as router:
        config = sim_config(router.address, "w0", Role.BOTH, tls=ours.issue("w0"), transports=("tcp",))
        async with running(config, InprocHub(), caplog) as worker:
            assert await answers(worker.address, ours.issue("gateway"), ours)
            assert not await answers(worker.address, theirs.issue("stranger"), ours)
            assert not await answers(worker.address, TlsFiles(ca=str(ours.ca)), ours), "without a certificate"
            assert not await answers(worker.address, None, ours), "in plaintext"


async def test_of_those_with_a_certificate_it_takes_the_listed_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = Authority(tmp_path)
    async with scripted_router() as router:
        config = sim_config(router.address, "w0", Role.BOTH, tls=ours.issue("w0"), transports=("tcp",))
        config = replace(config, engine_certificates=("spiffe://c/gateway", "Gateway.example"))
        async with running(config, InprocHub(), caplog) as worker:
            assert await answers(worker.address, ours.issue("one", "spiffe://c/gateway"), ours)
            assert await answers(worker.address, ours.issue("two", dns=("gateway.example",)), ours)
            for other in (ours.issue("three", "spiffe://c/tenant"), ours.issue("four")):
                assert not await answers(worker.address, other, ours)
                credentials = Tls(other).channel_credentials()
                async with grpc.aio.secure_channel(worker.address, credentials) as channel:
                    stub = pb_grpc.VllmEngineStub(channel)
                    for call in (stub.Abort(pb.AbortRequest()), stub.Generate(request()).read()):
                        with pytest.raises(grpc.aio.AioRpcError) as caught:
                            await call
                        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def answers(address: str, shown: TlsFiles | None, believed: Authority) -> bool:
    if shown is None:
        channel = grpc.aio.insecure_channel(address)
    else:
        credentials = Tls(replace(shown, ca=str(believed.ca))).channel_credentials()
        channel = grpc.aio.secure_channel(address, credentials)
    async with channel:
        try:
            said = await pb_grpc.VllmEngineStub(channel).HealthCheck(pb.HealthCheckRequest(), timeout=WAIT_S)
        except grpc.aio.AioRpcError:
            return False
    return said.healthy


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "[::]"])
def test_other_machines_need_certificates(host: str) -> None:
    with pytest.raises(ValueError, match="engine_listen: .* takes certificates"):
        replace(sim_config("127.0.0.1:1", "w", Role.BOTH), engine_listen=f"{host}:1")


def test_other_machines_need_a_list_of_names_and_a_list_needs_certificates(tmp_path: Path) -> None:
    config = sim_config("127.0.0.1:1", "w", Role.BOTH, tls=Authority(tmp_path).issue("w"))
    with pytest.raises(ValueError, match="engine_listen: .* names that engine_certificates lists"):
        replace(config, engine_listen="0.0.0.0:1")
    assert replace(config, engine_listen="0.0.0.0:1", engine_certificates=("spiffe://c/g",)).engine_certificates
    with pytest.raises(ValueError, match="engine_certificates: needs"):
        replace(sim_config("127.0.0.1:1", "w", Role.BOTH), engine_certificates=("spiffe://c/g",))
