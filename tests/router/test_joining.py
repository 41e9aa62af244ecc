"""Who may be a worker: a real router, and strangers who try."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
import pytest_asyncio

from protos import control_pb2, inference_pb2, worker_link_pb2
from protos import worker_link_pb2_grpc as link_grpc
from router import links
from router.config import AuthConfig
from router.core.errors import Unauthenticated
from router.core.request import Lane
from router.edge import keys
from router.edge.identity import Scope
from router.refusals import Refusals, source_of
from tests.certificates import Authority
from tests.router.running import BOTH, WAIT_S, Message, Order, Router, hello, proven, running
from trust import join
from trust.tls import Tls

Link = grpc.aio.StreamStreamCall[Message, Order]


@pytest_asyncio.fixture
async def router() -> AsyncIterator[Router]:
    async with running() as router:
        yield router


def link(router: Router, metadata: tuple[tuple[str, str], ...] = ()) -> Link:
    return link_grpc.WorkerLinkStub(router.channel).Connect(timeout=WAIT_S, metadata=metadata)


def introduction(nonce: bytes | None = None) -> worker_link_pb2.Introduction:
    return worker_link_pb2.Introduction(worker_id="w", incarnation="i0", nonce=nonce or join.nonce())


async def refusal(router: Router, call: Link) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(call))
    assert not (await router.status()).workers
    return caught.value


def metrics(router: Router) -> str:
    with urlopen(f"http://127.0.0.1:{router.bound.metrics_port}/metrics", timeout=WAIT_S) as page:
        return str(page.read(), "utf-8")


def is_stranger(error: grpc.aio.AioRpcError, words: str) -> None:
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert words in (error.details() or "")


class TestStrangers:
    async def test_without_a_proof(self, router: Router) -> None:
        call = link(router)
        await call.write(Message(hello=hello("w", BOTH)))
        is_stranger(await refusal(router, call), "must prove")

    async def test_with_an_introduction_and_no_proof(self, router: Router) -> None:
        call = link(router)
        said = await proven(call, hello("w", BOTH))
        said.ClearField("proof")
        await call.write(Message(hello=said))
        is_stranger(await refusal(router, call), "must prove")

    async def test_with_another_clusters_secret(self, router: Router) -> None:
        call = link(router)
        await call.write(Message(hello=await proven(call, hello("w", BOTH), b"another cluster's")))
        is_stranger(await refusal(router, call), "not made with this cluster's secret")

    async def test_with_what_was_overheard_of_a_good_one(self, router: Router) -> None:
        good, again = link(router), link(router)
        said = await proven(good, hello("w", BOTH))
        await good.write(Message(hello=said))
        assert (await anext(aiter(good))).HasField("welcome")
        await router.until(lambda status: len(status.workers) == 1)
        good.cancel()
        await router.until(lambda status: not status.workers)
        await again.write(Message(introduction=introduction()))
        assert (await anext(aiter(again))).HasField("challenge")
        await again.write(Message(hello=said))
        is_stranger(await refusal(router, again), "not made with this cluster's secret")

    async def test_with_the_routers_own_proof(self, router: Router) -> None:
        call = link(router)
        await call.write(Message(introduction=introduction()))
        said = hello("w", BOTH)
        said.proof = (await anext(aiter(call))).challenge.proof
        await call.write(Message(hello=said))
        is_stranger(await refusal(router, call), "not made with this cluster's secret")

    async def test_with_another_workers_proof(self, router: Router) -> None:
        call = link(router)
        said = await proven(call, hello("w", BOTH))
        said.worker_id = "somebody else"
        await call.write(Message(hello=said))
        assert (await refusal(router, call)).code() is grpc.StatusCode.INVALID_ARGUMENT

    async def test_with_a_short_nonce(self, router: Router) -> None:
        call = link(router)
        await call.write(Message(introduction=introduction(b"short")))
        is_stranger(await refusal(router, call), "must have 32 bytes")

    async def test_with_a_tenants_or_even_an_operators_key(self, tmp_path: Path) -> None:
        store, pepper = tmp_path / "keys.json", tmp_path / "pepper"
        with keys.editing(store, pepper) as editor:
            made, _, key = editor.store.create(
                editor.pepper, "acme", 0.0, scopes=frozenset(Scope), lane_max=Lane.REALTIME
            )
            editor.save(made)
        tenants = tmp_path / "tenants.toml"
        tenants.write_text("[tenants.acme]\n")
        auth = AuthConfig(mode="keys", keys_file=str(store))
        async with running(auth=auth, tenants_file=str(tenants)) as router:
            credential = (("authorization", f"Bearer {key}"),)
            await router.control.GetStatus(control_pb2.GetStatusRequest(), metadata=credential)
            call = link(router, credential)
            await call.write(Message(hello=hello("w", BOTH)))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(call))
            is_stranger(caught.value, "credentials don't count")

    async def test_they_are_counted_and_told_once(self, caplog: pytest.LogCaptureFixture) -> None:
        async with running(metrics_port=0) as router:
            for _ in range(5):
                call = link(router)
                await call.write(Message(hello=await proven(call, hello("w\nx", BOTH), b"wrong")))
                is_stranger(await refusal(router, call), "")
            assert caplog.text.count("joining refused from 127.0.0.1 as 'w\\nx': JOIN_PROOF_WRONG") == 1
            page = await asyncio.to_thread(metrics, router)
            assert 'tandem_refused_total{reason="JOIN_PROOF_WRONG",what="joins"} 5.0' in page


async def test_strangers_that_say_nothing_fill_a_queue_of_their_own(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "_JOINING_MAX", 1)
    silent = link(router)
    await silent.write(Message(introduction=introduction()))
    assert (await anext(aiter(silent))).HasField("challenge")
    assert (await refusal(router, link(router))).code() is grpc.StatusCode.UNAVAILABLE
    silent.cancel()


class TestCertificates:
    async def test_a_workers_name_in_a_certificate_needs_no_secret_and_other_names_do(self, tmp_path: Path) -> None:
        authority = Authority(tmp_path)
        files = authority.issue("router", require_client_cert=True)
        async with running(tls=files, join_key=b"", worker_certificates=("spiffe://c/worker",)) as router:
            for name, joins in (("spiffe://c/tenant", False), ("spiffe://c/worker", True)):
                tls = Tls(authority.issue("w", name))
                address = f"127.0.0.1:{router.bound.port}"
                options = [("grpc.use_local_subchannel_pool", 1)]
                async with grpc.aio.secure_channel(address, tls.channel_credentials(), options=options) as channel:
                    plain, router.channel = router.channel, channel
                    call = link(router)
                    await call.write(Message(hello=hello("w", BOTH)))
                    if joins:
                        assert (await anext(aiter(call))).HasField("welcome")
                    else:
                        with pytest.raises(grpc.aio.AioRpcError) as caught:
                            await anext(aiter(call))
                        is_stranger(caught.value, "no name in the certificate is a worker's")
                    router.channel = plain


async def test_whoever_has_no_secret_on_a_laptop_may_join_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    async with running(join_key=b"") as router:
        call = link(router)
        await call.write(Message(hello=hello("w", BOTH)))
        assert (await anext(aiter(call))).HasField("welcome")
    assert caplog.text.count("OPEN TO WORKERS") == 1


class TestRefusals:
    def test_a_source_is_slowed_down_and_comes_back_with_time_and_others_are_not(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        now = 0.0
        refusals = Refusals("credentials", burst=2, per_s=0.5, clock=lambda: now)
        error = Unauthenticated("KEY_UNKNOWN", "no such key")
        assert [refusals.note("a", error) for _ in range(4)] == [0.0, 0.0, 2.0, 2.0]
        assert refusals.note("b", error) == 0.0
        now = 2.0
        assert refusals.note("a", error) == 0.0
        assert refusals.told() == {"KEY_UNKNOWN": 6}
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 4
        assert lines[-1] == (
            "credentials refused from a: KEY_UNKNOWN: no such key (and 2 before it that were not told)"
        )

    def test_it_remembers_so_many_sources(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.CRITICAL)
        refusals = Refusals("credentials", burst=1, per_s=1, clock=lambda: 0.0)
        error = Unauthenticated("KEY_UNKNOWN", "no such key")
        for number in range(10_000):
            refusals.note(f"10.0.{number // 256}.{number % 256}", error)
        assert len(refusals._sources) <= 4096
        assert refusals.note("10.0.39.15", error) > 0, "a recent one is remembered"

    @pytest.mark.parametrize(
        ("peer", "source"),
        [
            ("ipv4:10.1.2.3:4000", "10.1.2.3"),
            ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:4000", "2001:db8:1:2::/64"),
            ("ipv6:[::1]:4000", "::/64"),
            ("10.1.2.3", "10.1.2.3"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
            ("unix:/tmp/x", "unix"),
            ("", "unknown"),
        ],
    )
    def test_a_source_is_an_address_without_its_port(self, peer: str, source: str) -> None:
        assert source_of(peer) == source


async def test_who_presents_bad_keys_is_told_to_come_later_and_good_keys_pass(tmp_path: Path) -> None:
    store, pepper = tmp_path / "keys.json", tmp_path / "pepper"
    with keys.editing(store, pepper) as editor:
        made, _, key = editor.store.create(editor.pepper, "acme", 0.0)
        editor.save(made)
    tenants = tmp_path / "tenants.toml"
    tenants.write_text("[tenants.acme]\n")
    auth = AuthConfig(mode="keys", keys_file=str(store))
    async with running(auth=auth, tenants_file=str(tenants)) as router:
        codes = []
        for _ in range(40):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.inference.ListModels(inference_pb2.ListModelsRequest(), metadata=(("x-api-key", "bad"),))
            codes.append(caught.value.code())
        assert codes[0] is grpc.StatusCode.UNAUTHENTICATED
        assert codes[-1] is grpc.StatusCode.RESOURCE_EXHAUSTED
        await router.inference.ListModels(inference_pb2.ListModelsRequest(), metadata=(("x-api-key", key),))


def test_what_a_router_knows_is_not_what_signs_handles() -> None:
    assert join.join_key(b"secret") != b"secret"
    assert join.join_key(b"secret") == join.join_key(b"secret") != join.join_key(b"other")
