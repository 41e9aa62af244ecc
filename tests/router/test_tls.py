"""TLS over loopback: a real router, certificates of an authority made here."""

from __future__ import annotations

import asyncio
import http.client
import shutil
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import grpc
import pytest

from protos import inference_pb2, inference_pb2_grpc
from router.config import AuthConfig, RouterConfig
from router.core.tenant import BookRefused
from router.edge import keys
from router.tenants import book
from tests.certificates import Authority
from tests.router.running import JOIN_KEY, MODEL, MODEL_DIR, WAIT_S, Router, Worker, running
from trust import tls as trust_tls
from trust.tls import Tls, TlsFiles, TlsRefused

ANSWER = (5, 6, 7)
TENANTS = """
[tenants.acme]
certificates = ["spiffe://tests/acme", "Acme.example"]
[tenants.other]
certificates = ["spiffe://tests/other"]
models = ["another"]
"""


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture(autouse=True)
def look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust_tls, "_LOOK_INTERVAL_S", 0.0)


@asynccontextmanager
async def dialled(router: Router, files: TlsFiles) -> AsyncIterator[Router]:
    """The router's calls go by TLS meanwhile."""
    tls, plain = Tls(files), router.channel
    options = [("grpc.use_local_subchannel_pool", 1), *tls.channel_options()]
    address = f"127.0.0.1:{router.bound.port}"
    async with grpc.aio.secure_channel(address, tls.channel_credentials(), options=options) as channel:
        router.channel = channel
        try:
            yield router
        finally:
            router.channel = plain


async def generate(router: Router, metadata: Sequence[tuple[str, str]] = ()) -> list[int]:
    stub = inference_pb2_grpc.InferenceStub(router.channel)
    request = inference_pb2.GenerateRequest(
        text="x", sampling=inference_pb2.Sampling(max_tokens=len(ANSWER)), return_token_ids=True
    )
    call = stub.Generate(request, timeout=WAIT_S, metadata=tuple(metadata))
    return [token for message in [it async for it in call] for token in message.delta.token_ids]


async def refused(router: Router, metadata: Sequence[tuple[str, str]] = ()) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(router, metadata)
    return caught.value


def get(port: int | None, path: str, context: ssl.SSLContext) -> tuple[int, bytes]:
    assert port is not None
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=WAIT_S, context=context)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def believing(ca: Path) -> TlsFiles:
    return TlsFiles(ca=str(ca))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # what is watched is a file or a thread's


class TestAllPorts:
    async def test_clients_workers_and_metrics_are_served(self, authority: Authority) -> None:
        async with running(tls=authority.issue("router"), http_port=0, metrics_port=0) as router:
            context = Tls(believing(authority.ca)).client_context()
            async with dialled(router, believing(authority.ca)):
                worker = await router.worker("w", answer=ANSWER)
                assert await generate(router) == [*ANSWER]
                models = await asyncio.to_thread(get, router.bound.http_port, "/v1/models", context)
                assert models[0] == 200
                _, page = await asyncio.to_thread(get, router.bound.metrics_port, "/metrics", context)
                assert b'tandem_certificate_expiry_timestamp_seconds{port="clients"}' in page
                assert b"tandem_unauthenticated 1.0" in page
                assert b"tandem_joins_open 0.0" in page
                await router.leave(worker)

    async def test_plaintext_gets_nothing(self, authority: Authority) -> None:
        async with running(tls=authority.issue("router"), http_port=0) as router:
            assert (await refused(router)).code() is grpc.StatusCode.UNAVAILABLE
            reader, writer = await asyncio.open_connection("127.0.0.1", router.bound.http_port)
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"200" not in await reader.read()
            writer.close()

    async def test_a_client_that_believes_another_authority_leaves(self, authority: Authority, tmp_path: Path) -> None:
        other = Authority(tmp_path / "other")
        async with running(tls=authority.issue("router"), http_port=0) as router, dialled(router, believing(other.ca)):
            assert (await refused(router)).code() is grpc.StatusCode.UNAVAILABLE
            with pytest.raises(ssl.SSLCertVerificationError):
                await asyncio.to_thread(
                    get, router.bound.http_port, "/health", Tls(believing(other.ca)).client_context()
                )

    async def test_a_certificate_for_another_address_is_not_believed_unless_its_name_is_asked_for(
        self, authority: Authority
    ) -> None:
        files = authority.issue("router", dns=("router.example",), ips=())
        async with running(tls=files) as router:
            async with dialled(router, believing(authority.ca)):
                assert (await refused(router)).code() is grpc.StatusCode.UNAVAILABLE
            async with dialled(router, replace(believing(authority.ca), server_name="router.example")):
                await router.worker("w", answer=ANSWER)
                assert await generate(router) == [*ANSWER]


class TestClientCertificates:
    async def test_where_they_are_required_nobody_comes_without_a_good_one(
        self, authority: Authority, tmp_path: Path
    ) -> None:
        strangers = Authority(tmp_path / "strangers")
        files = authority.issue("router", require_client_cert=True)
        async with running(tls=files, http_port=0) as router:
            for without in (believing(authority.ca), replace(strangers.issue("x"), ca=str(authority.ca))):
                async with dialled(router, without):
                    assert (await refused(router)).code() is grpc.StatusCode.UNAVAILABLE
                with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
                    await asyncio.to_thread(get, router.bound.http_port, "/health", Tls(without).client_context())
            gone = authority.issue("gone", ends=timedelta(hours=-1))
            expired = [Path(file).read_bytes() for file in (gone.ca, gone.key, gone.cert)]  # noqa: ASYNC240
            credentials = grpc.ssl_channel_credentials(*expired)
            async with grpc.aio.secure_channel(f"127.0.0.1:{router.bound.port}", credentials) as channel:
                router.channel, plain = channel, router.channel
                assert (await refused(router)).code() is grpc.StatusCode.UNAVAILABLE
                router.channel = plain

    async def test_they_say_which_tenant_calls_over_grpc_and_http(
        self, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with by_certificate(authority, tmp_path) as router:
            for names in (("spiffe://tests/acme",), ("spiffe://elsewhere/x", "spiffe://tests/acme")):
                async with dialled(router, authority.issue("acme", *names)):
                    assert await generate(router) == [*ANSWER]
            dns = authority.issue("acme", dns=("ACME.example",))
            async with dialled(router, dns):
                assert await generate(router) == [*ANSWER]
            status, page = await asyncio.to_thread(get, router.bound.http_port, "/v1/models", Tls(dns).client_context())
            assert (status, MODEL.encode() in page) == (200, True)
            other = authority.issue("other", "spiffe://tests/other")
            status, page = await asyncio.to_thread(
                get, router.bound.http_port, "/v1/models", Tls(other).client_context()
            )
            assert (status, MODEL.encode() in page) == (200, False), "another tenant's models"

    async def test_unknown_and_ambiguous_ones_are_nobody(self, authority: Authority, tmp_path: Path) -> None:
        async with by_certificate(authority, tmp_path) as router:
            for names, reason in (
                (("spiffe://tests/acme/deeper",), "no name in the certificate is a tenant's"),
                (("spiffe://tests/acme", "spiffe://tests/other"), "names of more than one tenant"),
            ):
                files = authority.issue("x", *names)
                async with dialled(router, files):
                    error = await refused(router)
                    assert (error.code(), reason in (error.details() or "")) == (
                        grpc.StatusCode.UNAUTHENTICATED,
                        True,
                    )
                context = Tls(files).client_context()
                assert (await asyncio.to_thread(get, router.bound.http_port, "/v1/models", context))[0] == 401

    async def test_a_name_in_the_common_name_or_an_email_counts_for_nothing(
        self, authority: Authority, tmp_path: Path
    ) -> None:
        async with by_certificate(authority, tmp_path) as router, dialled(router, authority.issue("acme.example")):
            assert (await refused(router)).code() is grpc.StatusCode.UNAUTHENTICATED

    async def test_a_bad_key_is_not_made_good_by_a_certificate(self, authority: Authority, tmp_path: Path) -> None:
        mine = authority.issue("acme", "spiffe://tests/acme")
        async with by_certificate(authority, tmp_path) as router, dialled(router, mine):
            error = await refused(router, [("x-api-key", "nonsense")])
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED

    async def test_where_they_are_not_required_keys_do_as_well(self, authority: Authority, tmp_path: Path) -> None:
        store = tmp_path / "keys.json"
        with keys.editing(store, tmp_path / "pepper") as editor:
            made, _, key = editor.store.create(editor.pepper, "acme", 0.0)
            editor.save(made)
        async with by_certificate(authority, tmp_path, mode="keys", store=store, required=False) as router:
            async with dialled(router, authority.issue("acme", "spiffe://tests/acme")):
                assert await generate(router) == [*ANSWER]
            async with dialled(router, believing(authority.ca)):
                assert await generate(router, [("x-api-key", key)]) == [*ANSWER]
                assert (await refused(router)).code() is grpc.StatusCode.UNAUTHENTICATED

    async def test_new_certificates_gain_no_new_share(self, authority: Authority, tmp_path: Path) -> None:
        tenants = TENANTS + "[unknown]\nrequests_per_minute = 3\n"
        async with by_certificate(authority, tmp_path, tenants) as router:
            codes = []
            for number in range(8):
                async with dialled(router, authority.issue("new", f"spiffe://tests/new-{number}")):
                    try:
                        await generate(router)
                        codes.append(grpc.StatusCode.OK)
                    except grpc.aio.AioRpcError as error:
                        codes.append(error.code())
            assert codes[0] is grpc.StatusCode.OK
            assert codes[-1] is grpc.StatusCode.RESOURCE_EXHAUSTED, "each had a limit of its own"

    async def test_a_certificate_is_no_operators_credential(self, authority: Authority, tmp_path: Path) -> None:
        mine = authority.issue("acme", "spiffe://tests/acme")
        async with by_certificate(authority, tmp_path) as router, dialled(router, mine):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.call_raw("/tandem.v1.Control/GetStatus", b"")
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@asynccontextmanager
async def by_certificate(
    authority: Authority,
    folder: Path,
    tenants: str = TENANTS,
    *,
    mode: Literal["keys", "certificates"] = "certificates",
    store: Path | None = None,
    required: bool = True,
) -> AsyncIterator[Router]:
    """A router that knows callers by their certificates, and one worker."""
    file = folder / "tenants.toml"
    file.write_text(tenants)
    files = authority.issue("router", require_client_cert=required)
    auth = AuthConfig(mode=mode, keys_file=str(store or ""))
    config = {"tls": files, "auth": auth, "tenants_file": str(file), "http_port": 0}
    async with running(**config) as router, dialled(router, authority.issue("worker")):  # type: ignore[arg-type]
        worker = await router.worker("w", answer=ANSWER)
        yield router
        await router.leave(worker)


class TestRenewal:
    async def test_new_connections_get_the_new_certificate_and_no_request_is_lost(
        self, authority: Authority, tmp_path: Path
    ) -> None:
        files = authority.issue("router")
        context = Tls(believing(authority.ca)).client_context()
        async with running(tls=files, http_port=0) as router, dialled(router, believing(authority.ca)):
            worker = await router.worker("w", answer=ANSWER)
            stop = asyncio.Event()
            answered = 0

            async def long_lived() -> None:
                nonlocal answered
                while not stop.is_set():
                    assert await generate(router) == [*ANSWER]
                    answered += 1

            async def always_new() -> None:
                nonlocal answered
                while not stop.is_set():
                    assert (await asyncio.to_thread(get, router.bound.http_port, "/v1/models", context))[0] == 200
                    options = [("grpc.use_local_subchannel_pool", 1)]
                    credentials = Tls(believing(authority.ca)).channel_credentials()
                    address = f"127.0.0.1:{router.bound.port}"
                    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
                        await inference_pb2_grpc.InferenceStub(channel).ListModels(
                            inference_pb2.ListModelsRequest(), timeout=WAIT_S
                        )
                    answered += 1

            async with asyncio.TaskGroup() as tasks:
                for work in (long_lived, always_new):
                    tasks.create_task(work())
                for _ in range(3):
                    before = answered
                    authority.issue("router")
                    await renewed(router.bound.port, files)
                    await renewed(router.bound.http_port, files)
                    await until(lambda before=before: answered > before + 5)  # type: ignore[misc]
                stop.set()
            await router.leave(worker)

    async def test_a_broken_pair_leaves_the_old_one_in_force_and_says_so(
        self, authority: Authority, caplog: pytest.LogCaptureFixture
    ) -> None:
        files = authority.issue("router")
        async with running(tls=files, http_port=0) as router:
            before = await asyncio.to_thread(shown, router.bound.port)
            stranger = authority.issue("stranger")
            shutil.copy(stranger.key, files.key)
            await until(lambda: "is not the key of the certificate" in caplog.text)
            assert await asyncio.to_thread(shown, router.bound.port) == before
            assert await asyncio.to_thread(shown, router.bound.http_port) == before
            assert caplog.text.count("is not the key of the certificate") == 1
            authority.issue("router")
            await renewed(router.bound.port, files)
            await renewed(router.bound.http_port, files)

    async def test_an_authority_that_is_taken_away_vouches_for_nobody_any_more(
        self, authority: Authority, tmp_path: Path
    ) -> None:
        believed = tmp_path / "believed.pem"
        believed.write_bytes(authority.ca.read_bytes())
        files = replace(authority.issue("router", require_client_cert=True), ca=str(believed))
        async with running(tls=files, http_port=0) as router:
            mine = authority.issue("client")
            context = Tls(mine).client_context()
            async with dialled(router, mine):
                await router.worker("w", answer=ANSWER)
                assert await generate(router) == [*ANSWER]
            assert (await asyncio.to_thread(get, router.bound.http_port, "/health", context))[0] in (200, 503)
            believed.write_bytes(Authority(tmp_path / "next").ca.read_bytes())
            for port, said in beginnings(router).items():
                async with asyncio.timeout(WAIT_S):
                    while not await is_refused(port, context, said):  # noqa: ASYNC110
                        await asyncio.sleep(0.05)  # the router's look at its files
            async with dialled(router, mine):
                assert (await refused(router)).code() is grpc.StatusCode.UNAVAILABLE
            with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
                await asyncio.to_thread(get, router.bound.http_port, "/health", context)

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    async def test_nor_does_a_session_from_before(
        self, authority: Authority, tmp_path: Path, version: ssl.TLSVersion
    ) -> None:
        believed = tmp_path / "believed.pem"
        believed.write_bytes(authority.ca.read_bytes())
        files = replace(authority.issue("router", require_client_cert=True), ca=str(believed))
        async with running(tls=files, http_port=0) as router:
            context = Tls(authority.issue("client")).client_context()
            context.maximum_version = version
            context.set_alpn_protocols(["h2", "http/1.1"])
            ports = beginnings(router)
            before = {port: await asyncio.to_thread(session, port, context, said) for port, said in ports.items()}
            believed.write_bytes(Authority(tmp_path / "next").ca.read_bytes())
            for port, said in ports.items():
                async with asyncio.timeout(WAIT_S):
                    while not await is_refused(port, context, said):  # noqa: ASYNC110
                        await asyncio.sleep(0.05)  # the router's look at its files
                assert await is_refused(port, context, said, before[port])


def beginnings(router: Router) -> dict[int, bytes]:
    """What a client may say first, by port."""
    return {
        router.bound.port: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)),
        router.bound.http_port or 0: b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n",
    }


async def is_refused(port: int, context: ssl.SSLContext, said: bytes, resumed: ssl.SSLSession | None = None) -> bool:
    try:
        await asyncio.to_thread(session, port, context, said, resumed)
    except (ssl.SSLError, ConnectionError):
        return True
    return False


def session(port: int, context: ssl.SSLContext, said: bytes, resumed: ssl.SSLSession | None = None) -> ssl.SSLSession:
    """That a client keeps which says this, hears something and leaves in order; else the server forgets it."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1", session=resumed) as connection,
    ):
        connection.sendall(said)
        if not connection.recv(1000):
            raise ConnectionError
        with suppress(ssl.SSLError):  # it had more to say
            connection.unwrap()
        assert connection.session is not None
        return connection.session


def shown(port: int | None) -> bytes:
    """What a server shows now."""
    assert port is not None
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=WAIT_S).encode()


async def renewed(port: int | None, files: TlsFiles) -> None:
    """Waits until a server shows what is in the file."""
    issued = Path(files.cert).read_bytes()  # noqa: ASYNC240
    async with asyncio.timeout(WAIT_S):
        while await asyncio.to_thread(shown, port) != issued:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # the router's look at its files


class TestWorkersPort:
    async def test_workers_have_a_port_of_their_own_where_clients_find_nothing(self, authority: Authority) -> None:
        files = authority.issue("router", require_client_cert=True)
        async with running(worker_listen="127.0.0.1:0", worker_tls=files) as router:
            with pytest.raises((grpc.aio.AioRpcError, StopAsyncIteration)):
                await router.worker("w", answer=ANSWER)
            tls = Tls(authority.issue("worker"))
            address = f"127.0.0.1:{router.bound.worker_port}"
            clients = router.channel
            async with grpc.aio.secure_channel(address, tls.channel_credentials()) as channel:
                router.channel = channel
                worker: Worker = await router.worker("w", answer=ANSWER)
                assert (await refused(router)).code() is grpc.StatusCode.UNIMPLEMENTED
                router.channel = clients
                assert await generate(router) == [*ANSWER]
                await router.leave(worker)


class TestConfiguration:
    def config(self, **values: object) -> RouterConfig:
        base = {"model_dir": str(MODEL_DIR), "model_name": MODEL, "join_key": JOIN_KEY}
        return RouterConfig(**{**base, **values})  # type: ignore[arg-type]

    def test_plaintext_beyond_this_machine_only_by_name(self, authority: Authority) -> None:
        auth = AuthConfig(allow_unauthenticated=True)
        with pytest.raises(ValueError, match=r"tls\.cert: is not set, and 0\.0\.0\.0 can be reached"):
            self.config(host="0.0.0.0", auth=auth)
        with pytest.raises(ValueError, match=r"worker_tls\.cert: is not set, and 10\.0\.0\.1 can be reached"):
            self.config(worker_listen="10.0.0.1:0", auth=auth)
        self.config(host="0.0.0.0", auth=auth, tls=TlsFiles(insecure=True))
        self.config(host="0.0.0.0", auth=auth, tls=authority.issue("router"))

    def test_workers_elsewhere_need_proof(self, authority: Authority) -> None:
        values = {"host": "0.0.0.0", "auth": AuthConfig(allow_unauthenticated=True), "join_key": b""}
        with pytest.raises(ValueError, match="join_key: must be given"):
            self.config(**{**values, "tls": authority.issue("router")})
        named = {**values, "worker_certificates": ("spiffe://c/w",)}
        with pytest.raises(ValueError, match="worker_certificates: needs a port that knows who vouches for them"):
            self.config(**{**named, "tls": authority.issue("router", ca="")})
        self.config(**{**named, "tls": authority.issue("router")})

    def test_what_cannot_be_used_is_refused_naming_the_file(self, authority: Authority, tmp_path: Path) -> None:
        good, other = authority.issue("good"), authority.issue("other")
        (tmp_path / "text.pem").write_text("hello")
        for files, words in (
            (replace(good, key=other.key), "is not the key of the certificate"),
            (replace(good, key=str(tmp_path / "no")), "cannot be read"),
            (replace(good, cert=str(tmp_path / "text.pem")), "holds no certificate in PEM"),
            (replace(good, key=str(tmp_path / "text.pem")), "everybody on this machine"),
            (replace(good, ca=str(tmp_path / "text.pem")), "holds no certificates in PEM"),
            (replace(good, key=""), "go together"),
            (TlsFiles(require_client_cert=True), "needs cert, key and ca"),
            (authority.issue("old", ends=timedelta(hours=-1)), "is valid from"),
            (authority.issue("young", begins=timedelta(hours=1)), "is valid from"),
        ):
            with pytest.raises(ValueError, match=words):
                self.config(tls=files)

    def test_the_same_of_a_running_process(self, authority: Authority) -> None:
        files = authority.issue("x")
        Path(files.key).chmod(0o644)
        with pytest.raises(TlsRefused, match="chmod 600"):
            Tls(files)

    def test_a_name_can_be_one_tenants_only(self) -> None:
        with pytest.raises(BookRefused, match="'spiffe://a' is 'a''s already"):
            book({"tenants": {"a": {"certificates": ["spiffe://a"]}, "b": {"certificates": ["spiffe://a"]}}})
