"""Who may do what: a real router, scripted workers, real gRPC, and credentials of every sort."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import grpc
import pytest
import pytest_asyncio

from protos import control_pb2, inference_pb2
from router.access import AccessRefused, open_access
from router.config import AuthConfig, RouterConfig
from router.core import errors
from router.core.request import Lane
from router.core.tenant import Tenant
from router.edge import keys
from router.edge.errors import http_status
from router.edge.identity import Caller, Identity, Presented, Scope
from router.edge.keys import KeysRefused, KeyStore, KeyVerifier
from tandem.errors import PermissionDenied, TandemError, Unauthenticated, error_from_rpc
from tests.router.running import JOIN_KEY, MODEL, MODEL_DIR, WAIT_S, Router, running
from trust.tls import TlsFiles

TENANTS = """
[tenants.acme]
lanes = ["standard", "batch"]
[tenants.other]
models = ["another"]
[tenants.third]
"""
ANSWER = (5, 6, 7)
NOW = 1_000_000.0


@dataclass
class Files:
    """A tenants' file and a key file."""

    folder: Path

    @property
    def tenants(self) -> Path:
        return self.folder / "tenants.toml"

    @property
    def keys(self) -> Path:
        return self.folder / "auth" / "keys.json"

    def auth(self) -> AuthConfig:
        return AuthConfig(mode="keys", keys_file=str(self.keys))

    def create(self, tenant: str, **how: object) -> str:
        with keys.editing(self.keys, self.keys.with_name("pepper")) as editor:
            now = float(how.pop("now", time.time()))  # type: ignore[arg-type]
            store, _, key = editor.store.create(editor.pepper, tenant, now, **how)  # type: ignore[arg-type]
            editor.save(store)
        return key

    def revoke(self, key: str) -> None:
        parts = keys.parse(key)
        assert parts is not None
        with keys.editing(self.keys, self.keys.with_name("pepper")) as editor:
            editor.save(editor.store.revoke(parts.id, time.time()))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    files = Files(tmp_path)
    files.tenants.write_text(TENANTS)
    files.create("acme", env="first")
    return files


@pytest_asyncio.fixture
async def router(files: Files) -> AsyncIterator[Router]:
    async with running(tenants_file=str(files.tenants), auth=files.auth()) as router:
        yield router


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


def generate(
    router: Router, metadata: tuple[tuple[str, str], ...] = (), **request: object
) -> grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]:
    sampling = inference_pb2.Sampling(max_tokens=len(ANSWER), temperature=0.0)
    values = {"token_ids": {"ids": [1, 2, 3]}, "sampling": sampling, **request}
    return router.inference.Generate(
        inference_pb2.GenerateRequest(**values),  # type: ignore[arg-type]
        timeout=WAIT_S,
        metadata=metadata,
    )


async def works(call: AsyncIterable[inference_pb2.GenerateResponse]) -> bool:
    messages = [message async for message in call]
    return messages[-1].HasField("finished")


async def failure(call: AsyncIterable[object]) -> TandemError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return error_from_rpc(caught.value)


async def status(router: Router, metadata: tuple[tuple[str, str], ...] = ()) -> control_pb2.Status:
    return await router.control.GetStatus(control_pb2.GetStatusRequest(requests=True), metadata=metadata)


async def refused(router: Router, metadata: tuple[tuple[str, str], ...] = ()) -> TandemError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await status(router, metadata)
    return error_from_rpc(caught.value)


async def until(look: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await look():  # type: ignore[misc]  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # what is watched lies behind a file and an RPC


class TestKeys:
    @pytest.mark.parametrize("header", ["authorization", "x-api-key"])
    async def test_a_key_is_its_tenant(self, router: Router, files: Files, header: str) -> None:
        key = files.create("third") if header == "x-api-key" else files.create("acme")
        worker = await router.worker("w", answer=ANSWER)
        metadata = ((header, f"Bearer {key}" if header == "authorization" else key),)
        await until(lambda: _known(router, metadata))
        assert await works(generate(router, metadata))
        (order, *_) = await worker.wait_for("decode")
        assert order.decode.tenant == ("acme" if header == "authorization" else "third")

    async def test_without_a_key_nothing_is_said(self, router: Router) -> None:
        for error in (await failure(generate(router)), await refused(router)):
            assert isinstance(error, Unauthenticated)
            assert error.reason == "CREDENTIALS_MISSING"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.inference.ListModels(inference_pb2.ListModelsRequest())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    async def test_a_typing_error_is_told_from_a_wrong_key(self, router: Router, files: Files) -> None:
        key = files.create("acme")
        typo = key[:30] + ("a" if key[30] != "a" else "b") + key[31:]
        body = f"tdm_live_{'A' * 12}_{'B' * 43}"
        assert (await failure(generate(router, bearer(typo)))).reason == "KEY_MALFORMED"
        assert (await failure(generate(router, bearer(key[:-1])))).reason == "KEY_MALFORMED"
        assert (await failure(generate(router, bearer(f"{body}_{keys.checksum(body)}")))).reason == "KEY_UNKNOWN"
        assert (await failure(generate(router, bearer("sk-123")))).reason == "CREDENTIALS_INVALID"
        assert (await failure(generate(router, (("authorization", "Basic abc"),)))).reason == "CREDENTIALS_INVALID"
        two = (*bearer(key), ("x-api-key", typo))
        assert (await failure(generate(router, two))).reason == "CREDENTIALS_AMBIGUOUS"

    async def test_two_keys_live_while_callers_move_over(self, router: Router, files: Files) -> None:
        await router.worker("w", answer=ANSWER)
        old, new = files.create("third", env="old"), files.create("third", env="new")
        await until(lambda: _known(router, bearer(new)))
        assert await works(generate(router, bearer(old)))
        assert await works(generate(router, bearer(new)))
        files.revoke(old)
        await until(lambda: _is_refused(router, bearer(old), "KEY_REVOKED"))
        assert await works(generate(router, bearer(new)))

    async def test_an_expired_key_says_so(self, router: Router, files: Files) -> None:
        key = files.create("acme", now=NOW, expires=NOW + 1)
        await until(lambda: _is_refused(router, bearer(key), "KEY_EXPIRED"))

    async def test_a_key_of_no_tenant_may_not_generate(self, router: Router, files: Files) -> None:
        key = files.create("gone")
        await until(lambda: _is_refused(router, bearer(key), "TENANT_UNKNOWN"))
        assert isinstance(await failure(generate(router, bearer(key))), PermissionDenied)

    async def test_operators_calls_need_their_scope(self, router: Router, files: Files) -> None:
        user = files.create("acme")
        operator = files.create("ops", scopes=frozenset({Scope.ADMIN}))
        await until(lambda: _is_refused(router, bearer(operator), "SCOPE_MISSING"))
        error = await refused(router, bearer(user))
        assert isinstance(error, PermissionDenied)
        assert error.reason == "SCOPE_MISSING"
        assert (await status(router, bearer(operator))).router_id
        assert (await failure(generate(router, bearer(operator)))).reason == "SCOPE_MISSING"

    async def test_asking_for_a_higher_lane_gets_the_highest_there_is(self, router: Router, files: Files) -> None:
        """The core refuses lanes that are not the tenant's: that it serves shows that it was asked for another."""
        await router.worker("w", answer=ANSWER)
        key = files.create("acme")
        await until(lambda: _known(router, bearer(key)))
        for lane in ("realtime", "standard", "batch", ""):
            assert await works(generate(router, bearer(key), lane=lane))
        files.tenants.write_text('[tenants.high]\nlanes = ["realtime"]\n')
        low = files.create("high", lane_max=Lane.BATCH)
        await until(lambda: _known(router, bearer(low)))
        error = await failure(generate(router, bearer(low), lane="realtime"))
        assert error.reason == "LANE_DENIED"

    async def test_salts_are_the_clusters_own_and_differ_between_tenants(self, router: Router, files: Files) -> None:
        one, two = files.create("acme"), files.create("third")
        worker = await router.worker("w", answer=ANSWER)
        await until(lambda: _known(router, bearer(two)))
        for key in (one, one, two):
            assert await works(generate(router, bearer(key)))
        orders = [order.decode for order in await worker.wait_for("decode", 3)]
        salts = {(order.tenant, order.cache_salt) for order in orders}
        assert len(salts) == len({salt for _, salt in salts}) == 2
        assert all(salt for _, salt in salts)

    async def test_models_of_others_are_not_listed(self, router: Router, files: Files) -> None:
        await router.worker("w", answer=ANSWER)
        key = files.create("other")
        await until(lambda: _known(router, bearer(key)))
        listed = await router.inference.ListModels(inference_pb2.ListModelsRequest(), metadata=bearer(key))
        assert not listed.models


async def _known(router: Router, metadata: tuple[tuple[str, str], ...]) -> bool:
    try:
        await router.inference.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata)
    except grpc.aio.AioRpcError:
        return False
    return True


async def _is_refused(router: Router, metadata: tuple[tuple[str, str], ...], reason: str) -> bool:
    try:
        await router.inference.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error).reason == reason
    return False


@pytest.mark.parametrize(
    ("lanes", "default", "lane_max", "asked", "got"),
    [
        ("realtime standard batch", None, "realtime", "realtime", "realtime"),
        ("realtime standard batch", None, "realtime", None, "standard"),
        ("realtime standard batch", "batch", "realtime", None, "batch"),
        ("realtime standard batch", "realtime", "standard", None, "standard"),
        ("realtime standard batch", None, "batch", "realtime", "batch"),
        ("standard batch", None, "realtime", "realtime", "standard"),
        ("realtime batch", None, "realtime", "standard", "batch"),
        ("realtime", None, "realtime", "batch", "realtime"),
        ("realtime", None, "batch", "batch", None),
        ("realtime standard", None, "batch", None, None),
    ],
)
def test_the_lane_is_the_least_of_what_is_asked_and_allowed(
    lanes: str, default: str | None, lane_max: str, asked: str | None, got: str | None
) -> None:
    tenant = Tenant(id="a", lanes=frozenset(map(Lane, lanes.split())), default_lane=Lane(default) if default else None)
    caller = Caller(Identity(tenant="a", lane_max=Lane(lane_max)), tenant)
    if got is None:
        with pytest.raises(errors.PermissionDenied):
            caller.lane(Lane(asked) if asked else None)
    else:
        assert caller.lane(Lane(asked) if asked else None) is Lane(got)


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/completions", "/tokenize"])
async def test_http_asks_for_the_same_keys(files: Files, path: str) -> None:
    key, operator = files.create("third"), files.create("ops", scopes=frozenset({Scope.ADMIN}))
    async with running(tenants_file=str(files.tenants), auth=files.auth(), http_port=0) as router:
        await router.worker("w", answer=ANSWER)
        url = f"http://127.0.0.1:{router.bound.http_port}{path}"
        body = {"/v1/completions": {"prompt": [1, 2, 3], "max_tokens": len(ANSWER)}, "/tokenize": {"prompt": "x"}}.get(
            path
        )
        right, wrong = (operator, key) if path == "/metrics" else (key, operator)
        got = [await asyncio.to_thread(http, url, body, one) for one in ("", key[:-1], wrong, right)]
        assert got == [401, 401, 403, 200]
        assert await asyncio.to_thread(http, f"http://127.0.0.1:{router.bound.http_port}/health", None, "") == 200


def http(url: str, body: object, key: str) -> int:
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", **({"x-api-key": key} if key else {})}
    try:
        with urlopen(Request(url, data, headers), timeout=WAIT_S) as response:
            return response.status
    except HTTPError as error:
        error.close()
        return error.code


class TestTheFileOfTenants:
    async def test_a_change_comes_into_force_without_dropping_a_request(self, router: Router, files: Files) -> None:
        first = files.create("acme")
        later = files.create("later")
        worker = await router.worker("w")
        await until(lambda: _is_refused(router, bearer(later), "TENANT_UNKNOWN"))
        running_on = generate(router, bearer(first))
        await worker.wait_for("decode")
        files.tenants.write_text("[tenants.later]\nweight = -1\n")
        files.tenants.write_text(TENANTS + "[tenants.later]\n")
        await until(lambda: _known(router, bearer(later)))
        (order,) = await worker.wait_for("decode")
        worker.answer, worker.serving = ANSWER, True
        await worker.obey(order)
        assert await works(running_on)
        assert await works(generate(router, bearer(later)))


class TestWithoutAuthentication:
    async def test_it_says_so_loudly_and_once(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            async with running() as router:
                await router.worker("w", answer=ANSWER)
                assert await works(generate(router))
                assert await works(generate(router, bearer("anything")))
                assert (await status(router)).router_id
        assert caplog.text.count("UNAUTHENTICATED") == 1

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "router.example"])
    def test_it_is_refused_where_others_could_come(self, host: str) -> None:
        values = {"model_dir": str(MODEL_DIR), "model_name": MODEL, "host": host}
        with pytest.raises(ValueError, match=r"auth\.mode: is none, and .* can be reached from other machines"):
            RouterConfig(**values)  # type: ignore[arg-type]
        asked_for = {"tls": TlsFiles(insecure=True), "join_key": JOIN_KEY}
        RouterConfig(**values, **asked_for, auth=AuthConfig(allow_unauthenticated=True))  # type: ignore[arg-type]

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
    def test_this_machine_is_fine(self, host: str) -> None:
        RouterConfig(model_dir=str(MODEL_DIR), model_name=MODEL, host=host)

    def test_keys_need_their_files(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is not a file") as caught:
            RouterConfig(
                model_dir=str(MODEL_DIR),
                model_name=MODEL,
                auth=AuthConfig(mode="keys", keys_file=str(tmp_path / "keys.json")),
            )
        found = str(caught.value).splitlines()
        assert [line.partition(":")[0] for line in found] == [
            "auth.keys_file",
            "auth.pepper_file",
            "tenants_file",
            "join_key",
        ]


def test_a_router_does_not_start_on_a_file_that_it_cannot_trust(files: Files) -> None:
    config = RouterConfig(
        model_dir=str(MODEL_DIR),
        model_name=MODEL,
        tenants_file=str(files.tenants),
        auth=files.auth(),
        join_key=JOIN_KEY,
    )
    assert open_access(config).book.tenant("acme")
    files.keys.chmod(0o604)
    with pytest.raises(AccessRefused, match="chmod 600"):
        open_access(config)


class TestTheKeyFile:
    def test_it_holds_no_secret_and_is_private(self, files: Files) -> None:
        key = files.create("third")
        parts = keys.parse(key)
        assert parts is not None
        text = files.keys.read_text()
        assert parts.secret not in text
        assert parts.id in text
        for path in (files.keys, files.keys.with_name("pepper")):
            assert path.stat().st_mode & 0o777 == 0o600
        assert files.keys.parent.stat().st_mode & 0o777 == 0o700

    def test_a_file_that_everybody_may_read_is_refused(self, files: Files) -> None:
        pepper = files.keys.with_name("pepper")
        pepper.chmod(0o644)
        with pytest.raises(KeysRefused, match="chmod 600"):
            keys.read_pepper(pepper)

    def test_a_third_live_key_is_refused_until_one_is_revoked(self) -> None:
        store, first, _ = KeyStore().create(b"p" * 32, "a", NOW)
        store, _, _ = store.create(b"p" * 32, "a", NOW)
        with pytest.raises(KeysRefused, match="has 2 live keys"):
            store.create(b"p" * 32, "a", NOW)
        store, _, _ = store.revoke(first.id, NOW).create(b"p" * 32, "a", NOW)
        assert [key.state(NOW) for key in store.keys] == ["revoked", "live", "live"]

    def test_dead_keys_are_forgotten_in_the_end(self) -> None:
        store = KeyStore()
        for _ in range(keys.DEAD_KEYS_KEPT + 5):
            store, stored, _ = store.create(b"p" * 32, "a", NOW)
            store = store.revoke(stored.id, NOW)
        assert len(store.keys) <= keys.DEAD_KEYS_KEPT + 1

    def test_without_its_pepper_it_is_worth_nothing(self, files: Files) -> None:
        pepper = files.keys.with_name("pepper")
        pepper.unlink()
        with pytest.raises(KeysRefused, match="is missing"):
            files.create("third")

    def test_what_is_no_key_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "keys.json"
        for content in ("{", '{"version": 2}', json.dumps({"version": 1, "keys": [{"id": "a"}]})):
            path.write_text(content)
            path.chmod(0o600)
            with pytest.raises(KeysRefused):
                keys.read_store(path)

    async def test_another_pepper_opens_nothing(self) -> None:
        store, _, key = KeyStore().create(b"p" * 32, "a", NOW)
        assert await KeyVerifier(store, b"p" * 32).identify(Presented(key), NOW) is not None
        with pytest.raises(errors.Unauthenticated):
            await KeyVerifier(store, b"q" * 32).identify(Presented(key), NOW)

    def test_over_http_it_is_401_and_403(self) -> None:
        unknown = http_status(errors.Unauthenticated("KEY_EXPIRED", "x"))
        assert (unknown.status, dict(unknown.headers)[b"www-authenticate"]) == (401, b"Bearer")
        assert http_status(errors.PermissionDenied("SCOPE_MISSING", "x")).status == 403
