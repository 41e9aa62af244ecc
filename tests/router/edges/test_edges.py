"""Two edges' processes before one core: what clients meet at either, what is decided once for both, and what happens
when a process dies. The workers are scripted."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc, worker_link_pb2
from protos.compat import kserve_pb2_grpc, vllm_engine_pb2, vllm_engine_pb2_grpc
from router.config import AuthConfig, RouterConfig, to_json
from router.core.limits import CoreLimits
from router.edge import keys
from router.edge.identity import Scope
from router.edges import fleet
from router.front import PortTaken
from router.main import Bound
from tandem.errors import TandemError, error_from_rpc
from tests.router.edges.processes import WAIT_S, channel_to, edges_of, http_to, is_there, listens, until
from tests.router.http_client import call
from tests.router.running import JOIN_KEY, MODEL, MODEL_DIR, Router, Worker, running
from tests.router.test_edge import ANSWER, SAID
from tests.router.test_kserve import asked as kserve_asked

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = (1, 2, 3)
NEEDS = len(PROMPT) + len(ANSWER)
#: Requests that `few`'s budget is worth.
WORTH = 5
TENANTS = f"""\
[tenants.acme]
requests_per_minute = 100000
[tenants.few]
budgets = [{{ period = "total", tokens = {WORTH * NEEDS} }}]
[tenants.heavy]
weight = 4
[tenants.light]
[tenants.one]
budgets = [{{ period = "total", tokens = {NEEDS} }}]
"""

Metadata = tuple[tuple[str, str], ...]


@dataclass
class Edges:
    """A router with two edges, and a pair of workers."""

    router: Router
    decode: Worker
    #: By whose it is.
    keys: dict[str, str]
    #: Edges of other routers in this process.
    others: frozenset[int]

    @property
    def pids(self) -> list[int]:
        return [pid for pid in edges_of(os.getpid()) if pid not in self.others]

    def channel(self, pid: int) -> AbstractAsyncContextManager[grpc.aio.Channel]:
        return channel_to(pid, self.router.bound.port)

    def by(self, whose: str) -> Metadata:
        return (("authorization", f"Bearer {self.keys[whose]}"),)

    async def back_after(self, *before: int) -> int:
        """What came in place of one of these, once it listens."""
        await until(lambda: any(listens(pid, self.router.bound.port) for pid in self.pids if pid not in before))
        return next(pid for pid in self.pids if pid not in before)

    async def status(self, channel: grpc.aio.Channel) -> control_pb2.Status:
        asked = control_pb2.GetStatusRequest(requests=True)
        return await control_pb2_grpc.ControlStub(channel).GetStatus(asked, metadata=self.by("ops"), timeout=WAIT_S)

    async def until(self, channel: grpc.aio.Channel, holds: Callable[[control_pb2.Status], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not holds(await self.status(channel)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # what is watched lies behind an RPC

    async def is_idle(self, channel: grpc.aio.Channel) -> None:
        def is_idle(status: control_pb2.Status) -> bool:
            return not status.requests and not any(one.prefill_legs or one.decode_legs for one in status.workers)

        await self.until(channel, is_idle)

    async def why(self, channel: grpc.aio.Channel, request_id: str) -> control_pb2.RequestStory:
        asked = control_pb2.ExplainRequest(request_id=request_id)
        return await control_pb2_grpc.ControlStub(channel).Explain(asked, metadata=self.by("ops"), timeout=WAIT_S)

    async def finish(self, request_id: str, after: int) -> None:
        """The decode worker says the rest of a paused answer."""
        order = next(
            order.decode
            for order in reversed(self.decode.orders)
            if order.HasField("decode") and f"/{request_id}/" in f"/{order.decode.leg_id}"
        )
        await self.decode.decode_all(order, ANSWER[after:])


async def make_edges(folder: Path) -> AsyncIterator[Edges]:
    tenants, store = folder / "tenants.toml", folder / "auth" / "keys.json"
    tenants.write_text(TENANTS)
    made = {}
    for tenant in ("acme", "few", "one", "heavy", "light", "ops"):
        scope = Scope.ADMIN if tenant == "ops" else Scope.INFERENCE
        with keys.editing(store, store.with_name("pepper")) as editor:
            changed, _, made[tenant] = editor.store.create(editor.pepper, tenant, 0.0, scopes=frozenset({scope}))
            editor.save(changed)
    auth = AuthConfig(mode="keys", keys_file=str(store))
    others = frozenset(edges_of(os.getpid()))
    limits = CoreLimits(silence_s_max=3600.0)  # scripted workers report no load
    async with running(
        limits, edges=2, http_port=0, metrics_port=0, tenants_file=str(tenants), auth=auth, shutdown_grace_s=WAIT_S
    ) as router:
        _, decode = await router.pair(ANSWER)
        yield Edges(router, decode, made, others)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edges(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Edges]:
    async for made in make_edges(tmp_path_factory.mktemp("edges")):
        yield made


def generate(
    channel: grpc.aio.Channel, by: Metadata, request_id: str = "", *, max_tokens: int = len(ANSWER)
) -> grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]:
    prompt = inference_pb2.TokenIds(ids=PROMPT)
    sampling = inference_pb2.Sampling(max_tokens=max_tokens, temperature=0.0)
    request = inference_pb2.GenerateRequest(
        request_id=request_id, token_ids=prompt, sampling=sampling, return_token_ids=True
    )
    return inference_pb2_grpc.InferenceStub(channel).Generate(request, metadata=by, timeout=WAIT_S)


async def has_said(
    answers: grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse], tokens: int
) -> bool:
    """Once it has."""
    while tokens > 0 and isinstance(answer := await answers.read(), inference_pb2.GenerateResponse):
        tokens -= len(answer.delta.token_ids)
    return tokens == 0


async def text_of(
    answers: grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse],
) -> str:
    """Of what has not been read yet."""
    texts = []
    while isinstance(answer := await answers.read(), inference_pb2.GenerateResponse):
        texts.append(answer.delta.text)
    return "".join(texts)


async def error_of(
    answers: grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse],
) -> TandemError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await text_of(answers)
    return error_from_rpc(failed.value)


class TestClients:
    async def test_every_protocol_answers_at_either_edge(self, edges: Edges) -> None:
        acme = edges.by("acme")
        for pid in edges.pids:
            async with edges.channel(pid) as channel, http_to(pid, edges.router.bound.http_port or 0) as http:
                assert await text_of(generate(channel, acme)) == SAID
                kserve = kserve_pb2_grpc.GRPCInferenceServiceStub(channel)
                inferred = await kserve.ModelInfer(kserve_asked(), metadata=acme, timeout=WAIT_S)
                assert SAID.encode() in inferred.raw_output_contents[0]
                engine = vllm_engine_pb2_grpc.VllmEngineStub(channel)
                info = await engine.GetModelInfo(vllm_engine_pb2.GetModelInfoRequest(), metadata=acme, timeout=WAIT_S)
                assert info.vocab_size == 4096
                asked = {"model": MODEL, "prompt": "x = 1", "max_tokens": len(ANSWER), "temperature": 0}
                await http.send("POST", "/v1/completions", asked, authorization=f"Bearer {edges.keys['acme']}")
                response = await http.response()
                assert response.json["choices"][0]["text"] == SAID
                assert 0 < int(response.headers["x-ratelimit-remaining-requests"]) <= 100_000

    async def test_what_ran_at_one_edge_is_told_at_the_other(self, edges: Edges) -> None:
        first, second = edges.pids
        async with edges.channel(first) as here, edges.channel(second) as there:
            await text_of(generate(here, edges.by("acme"), "told"))
            story = await edges.why(there, "told")
            assert (story.state, story.tenant) == ("finished", "acme")
            here_said, there_said = await edges.status(here), await edges.status(there)
            assert here_said.outcomes == there_said.outcomes
            assert {worker.worker_id for worker in there_said.workers} == {"p", "d"}

    async def test_an_id_in_use_at_one_edge_is_in_use_at_the_other(self, edges: Edges) -> None:
        first, second = edges.pids
        edges.decode.pause_at = 3
        async with edges.channel(first) as here, edges.channel(second) as there:
            held = generate(here, edges.by("acme"), "mine")
            assert await has_said(held, 3)
            error = await error_of(generate(there, edges.by("acme"), "mine"))
            assert error.reason == "REQUEST_ID_IN_USE"
            edges.decode.pause_at = 1_000_000
            await edges.finish("mine", 3)
            await text_of(held)
            await edges.is_idle(there)

    async def test_concurrent_requests_at_all_edges_never_overspend_a_budget(self, edges: Edges) -> None:
        first, second = edges.pids
        async with edges.channel(first) as here, edges.channel(second) as there:
            few = edges.by("few")
            calls = [generate(channel, few) for _ in range(3 * WORTH) for channel in (here, there)]
            answers = await asyncio.gather(*map(text_of, calls), return_exceptions=True)
            assert answers.count(SAID) == WORTH
            refused = [error_from_rpc(error) for error in answers if isinstance(error, grpc.aio.AioRpcError)]
            assert {error.reason for error in refused} == {"BUDGETS_TOTAL_TOKENS"}
            assert len(refused) == len(calls) - WORTH

    async def test_what_an_operator_changes_at_one_edge_is_in_force_at_the_other(self, edges: Edges) -> None:
        first, second = edges.pids
        async with edges.channel(first) as here, edges.channel(second) as there:
            control, ops = control_pb2_grpc.ControlStub(here), edges.by("ops")
            await control.AddTenant(control_pb2.AddTenantRequest(name="new"), metadata=ops, timeout=WAIT_S)
            made = await control.CreateKey(control_pb2.CreateKeyRequest(tenant="new"), metadata=ops, timeout=WAIT_S)
            by_new = (("authorization", f"Bearer {made.secret}"),)
            assert await text_of(generate(there, by_new)) == SAID
            await control.RevokeKey(control_pb2.RevokeKeyRequest(id=made.key.id), metadata=ops, timeout=WAIT_S)
            assert (await error_of(generate(there, by_new))).reason == "KEY_REVOKED"

    async def test_metrics_count_what_every_edge_refused(self, edges: Edges) -> None:
        nobody = (("authorization", "Bearer nobody's"),)
        for pid in edges.pids:
            async with edges.channel(pid) as channel:
                assert (await error_of(generate(channel, nobody))).reason == "CREDENTIALS_INVALID"
        told = 'tandem_refused_total{reason="CREDENTIALS_INVALID",what="credentials"} 2.0'
        page = await call(edges.router.bound.metrics_port or 0, "GET", "/metrics")
        assert told in page.body.decode()
        assert "tandem_edges 2.0" in page.body.decode()
        by_ops = f"Bearer {edges.keys['ops']}"
        page = await call(edges.router.bound.http_port or 0, "GET", "/metrics", authorization=by_ops)
        assert told in page.body.decode()


async def test_tenants_at_different_edges_are_served_by_their_weights(tmp_path: Path) -> None:
    """Both wait before one worker, which takes a request at a time."""
    async for edges in make_edges(tmp_path):
        capacity = worker_link_pb2.Capacity(prefill_legs=1, decode_legs=1, kv_blocks=4096)
        worker = await edges.router.worker("alone", capacity=capacity)
        async with edges.channel(edges.pids[0]) as here, edges.channel(edges.pids[1]) as there:
            control, ops = control_pb2_grpc.ControlStub(here), edges.by("ops")
            for name in ("p", "d"):
                await control.DrainWorker(control_pb2.DrainWorkerRequest(worker_id=name), metadata=ops, timeout=WAIT_S)
            running = [asyncio.create_task(text_of(generate(here, edges.by("acme"))))]
            (order,) = await worker.wait_for("decode")
            heavy, light = edges.by("heavy"), edges.by("light")
            running += [asyncio.create_task(text_of(generate(here, heavy))) for _ in range(40)]
            running += [asyncio.create_task(text_of(generate(there, light))) for _ in range(10)]
            await edges.until(here, lambda status: status.requests_queued == 50)
            worker.answer, worker.serving = ANSWER, True
            await worker.obey(order)
            assert set(await asyncio.gather(*running)) == {SAID}
            served = [order.decode.tenant for order in worker.orders if order.HasField("decode")][1:]
            for end in (10, 25, 50):
                assert abs(served[:end].count("heavy") - 0.8 * end) <= 1


class TestDeath:
    async def test_an_edge_that_dies_takes_its_own_requests_and_no_others_and_comes_back(self, edges: Edges) -> None:
        doomed, other = edges.pids
        edges.decode.pause_at = 3
        cancels = sum(order.HasField("cancel") for order in edges.decode.orders)
        async with edges.channel(doomed) as here, edges.channel(other) as there:
            lost, kept = generate(here, edges.by("one"), "lost"), generate(there, edges.by("acme"), "kept")
            for started in (lost, kept):
                assert await has_said(started, 3)
            small = generate(there, edges.by("one"), max_tokens=2)
            assert (await error_of(small)).reason == "BUDGETS_TOTAL_TOKENS", "it is all reserved"

            os.kill(doomed, signal.SIGKILL)
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await text_of(lost)
            assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
            await edges.decode.wait_for("cancel", cancels + 1)
            edges.decode.pause_at = 1_000_000
            await edges.finish("kept", 3)
            assert (await text_of(kept)).endswith(SAID[-4:])

            await edges.is_idle(there)
            story = await edges.why(there, "lost")
            assert (story.state, story.charge.completion_tokens) == ("cancelled", 3)
            assert await text_of(generate(there, edges.by("one"), max_tokens=2)), "what it did not use is free again"

        async with edges.channel(await edges.back_after(doomed, other)) as channel:
            assert await text_of(generate(channel, edges.by("acme"))) == SAID

    async def test_one_that_starts_while_files_are_broken_has_what_is_in_force(self, tmp_path: Path) -> None:
        async for edges in make_edges(tmp_path):
            doomed, other = edges.pids
            for file in (tmp_path / "tenants.toml", tmp_path / "auth" / "keys.json"):
                file.write_text("half of it [")
            os.kill(doomed, signal.SIGKILL)
            async with edges.channel(await edges.back_after(doomed, other)) as channel:
                assert await text_of(generate(channel, edges.by("acme"))) == SAID

    async def test_edges_do_not_outlive_the_core_and_say_so(self) -> None:
        config = RouterConfig(
            model_dir=str(MODEL_DIR),
            model_name=MODEL,
            port=0,
            edges=2,
            worker_listen="127.0.0.1:0",
            join_key=JOIN_KEY,
            limits=CoreLimits(silence_s_max=3600.0),
        )
        core = await asyncio.create_subprocess_exec(sys.executable, "-m", "router", "-", stdin=PIPE, stdout=PIPE)
        assert core.stdin is not None
        assert core.stdout is not None
        core.stdin.write(to_json(config))
        core.stdin.close()
        try:
            bound = Bound(**json.loads(await core.stdout.readline()))
            ended = asyncio.create_task(core.wait())
            router = Router(bound, asyncio.Event(), ended, edges=2)  # type: ignore[arg-type]
            _, decode = await router.pair(ANSWER)
            decode.pause_at = 3
            edges = edges_of(core.pid)
            async with channel_to(edges[0], bound.port) as channel:
                running = generate(channel, ())
                assert await has_said(running, 3)
                core.kill()
                error = await error_of(running)
                assert error.reason == "CORE_UNREACHABLE"
            await until(lambda: not any(map(is_there, edges)))
            await router.close()
        finally:
            if core.returncode is None:
                core.kill()
            await core.wait()


class TestStopping:
    async def test_a_router_told_to_stop_drains_all_edges(self, tmp_path: Path) -> None:
        async for edges in make_edges(tmp_path):
            pids = edges.pids
            edges.decode.pause_at = 3
            async with edges.channel(pids[0]) as here, edges.channel(pids[1]) as there:
                running = generate(here, edges.by("acme"), "running")
                assert await has_said(running, 3)
                watches = [
                    health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                    for channel in (here, there)
                ]
                for watch in watches:
                    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
                edges.router.stop.set()
                for watch in watches:
                    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
                edges.decode.pause_at = 1_000_000
                await edges.finish("running", 3)
                assert (await text_of(running)).endswith(SAID[-4:])
                await edges.router.served
            assert not any(map(is_there, pids))

    async def test_edges_are_not_told_what_workers_join_by(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[bytes] = []

        def dumps(value: object) -> bytes:
            told.append(pickle.dumps(value))
            return told[-1]

        monkeypatch.setattr(fleet, "pickle", SimpleNamespace(dumps=dumps))
        async with running(edges=2):
            pass
        assert len(told) == 2
        assert not any(JOIN_KEY in data for data in told)

    async def test_ports_of_another_router_are_not_shared(self, edges: Edges) -> None:
        with pytest.raises(PortTaken, match=str(edges.router.bound.port)):
            async with running(edges=2, port=edges.router.bound.port):
                pass
        with pytest.raises(PortTaken):
            async with running(port=edges.router.bound.port):
                pass
