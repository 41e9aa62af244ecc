"""The Python client, synchronous and asynchronous.

    with Client("127.0.0.1:50051") as client:
        for delta in client.generate("def add(a, b):", max_tokens=64):
            print(delta.text, end="")

A generation begins when `generate` is called. Leaving the loop early, closing the generation or dropping it cancels it
at the server. Failures are the exceptions of `tandem.errors`. What a later try may cure (a server that is away, a limit
whose refusal says when to come back) is tried again, `retries` times at most, as long as nothing of the answer has
arrived and the wait fits into the time left.

A client is one connection; more clients are more connections. An API key, or a token, goes along with every call;
without one, that of TANDEM_API_KEY.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeAlias, TypeVar, Unpack

import grpc

from protos import control_pb2_grpc, inference_pb2_grpc
from tandem import wire
from tandem.errors import Cancelled, InternalError, TandemError, error_from_rpc
from tandem.retry import RETRIES, wait_before_retry
from tandem.values import (
    ClusterStatus,
    Delta,
    Finished,
    KeyFacts,
    Model,
    RequestStory,
    Result,
    Role,
    SamplingOptions,
    TenantFields,
    TokenLogprobs,
)
from trust.tls import Tls, TlsFiles, is_loopback

Q = TypeVar("Q")
A = TypeVar("A")

DEFAULT_ADDRESS = "127.0.0.1:50051"
API_KEY_VARIABLE = "TANDEM_API_KEY"
#: What the command line takes for `ca`, `cert`, `key` and `tls=False`.
CA_VARIABLE, CERT_VARIABLE, KEY_VARIABLE = "TANDEM_CA", "TANDEM_CERT", "TANDEM_KEY"
INSECURE_VARIABLE = "TANDEM_INSECURE_PLAINTEXT"

#: For the calls that answer at once.
_CONTROL_TIMEOUT_S = 10.0

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A long answer may be silent for a while (queue, prefill); pings tell that from a peer that is gone.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # gRPC's own defaults wait up to two minutes after a router restarts.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Answers come in small messages, but one with logprobs of a long step is not 4 MiB for certain.
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    # Two clients in one process are two connections, not one shared by accident.
    ("grpc.use_local_subchannel_pool", 1),
)


_Metadata = tuple[tuple[str, str], ...]


def _credentials(api_key: str | None) -> _Metadata:
    key = os.environ.get(API_KEY_VARIABLE, "") if api_key is None else api_key
    return (("authorization", f"Bearer {key}"),) if key else ()


def _is_here(address: str) -> bool:
    """The address may have a scheme of gRPC's: dns:///router.example:50051"""
    target = address.rpartition("/")[2]
    host, colon, _ = target.rpartition(":")
    return is_loopback(host if colon else target) or address.startswith("unix:")


def _transport(
    address: str, tls: bool | TlsFiles | None, files: TlsFiles
) -> tuple[grpc.ChannelCredentials | None, list[tuple[str, int | str]]]:
    """What a channel is made with; no credentials for plaintext. Raises TlsRefused."""
    if isinstance(tls, TlsFiles):
        files, tls = tls, tls.dials
    elif tls is None:
        tls = files.dials or not _is_here(address)
    if not tls:
        return None, [*_CHANNEL_OPTIONS]
    at_hand = Tls(files)
    return at_hand.channel_credentials(), [*_CHANNEL_OPTIONS, *at_hand.channel_options()]


class _Call(Protocol):
    """What a generation needs of a gRPC call."""

    def __iter__(self) -> Iterator[wire.GenerateResponse]: ...
    def cancel(self) -> bool: ...


_AsyncCall: TypeAlias = "grpc.aio.UnaryStreamCall[wire.GenerateRequest, wire.GenerateResponse]"


class _Answer:
    """What has arrived of one answer."""

    def __init__(self, timeout_s: float | None, retries: int) -> None:
        self.request_id = ""
        self.finished: Finished | None = None
        #: How often the request was asked for again.
        self.retried = 0
        self._retries = retries
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._text)

    def _take(self, response: wire.GenerateResponse) -> Delta | None:
        self.request_id = response.request_id
        match wire.event(response):
            case Delta() as delta:
                self._text.append(delta.text)
                self._token_ids += delta.token_ids
                self._logprobs += delta.logprobs
                return delta
            case Finished() as finished:
                self.finished = finished
        return None

    def _left_s(self) -> float | None:
        return None if self._deadline is None else self._deadline - time.monotonic()

    def _wait_before_retry(self, error: TandemError) -> float:
        """Raises the error if it is the end."""
        begun = bool(self.request_id)
        wait_s = wait_before_retry(error, retried=self.retried, retries=self._retries, left_s=self._left_s())
        if begun or wait_s is None:
            raise error from None
        self.retried += 1
        return wait_s

    def _result(self) -> Result:
        if self.finished is None:
            raise InternalError("the server ended the stream without finishing the answer")
        return Result(
            request_id=self.request_id,
            text=self.text,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            finished=self.finished,
        )


class Generation(_Answer):
    """One answer on its way. Iterate it once for its deltas, or call `result` for the whole."""

    def __init__(self, start: Callable[[float | None], _Call], timeout_s: float | None, retries: int) -> None:
        """`start` makes the call, with the time it has left."""
        super().__init__(timeout_s, retries)
        self._start = start
        self._call = start(timeout_s)
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[Delta]:
        try:
            while self.finished is None:
                try:
                    for response in self._call:
                        if (delta := self._take(response)) is not None:
                            yield delta
                    break
                except grpc.RpcError as error:
                    if self._closed.wait(self._wait_before_retry(error_from_rpc(error))):
                        raise Cancelled("the generation was closed") from None
                self._call = self._start(self._left_s())
        finally:
            self.close()
        self._result()

    def result(self) -> Result:
        """Waits for the end; also fine after some deltas were taken."""
        for _ in self:
            pass
        return self._result()

    def close(self) -> None:
        """Cancels the request if it still runs."""
        self._closed.set()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncGeneration(_Answer):
    """One answer on its way. Iterate it once for its deltas, or await `result` for the whole."""

    def __init__(self, start: Callable[[float | None], _AsyncCall], timeout_s: float | None, retries: int) -> None:
        """`start` makes the call, with the time it has left."""
        super().__init__(timeout_s, retries)
        self._start = start
        self._call = start(timeout_s)
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            while self.finished is None:
                try:
                    async for response in self._call:
                        if (delta := self._take(response)) is not None:
                            yield delta
                    break
                except grpc.RpcError as error:
                    await asyncio.sleep(self._wait_before_retry(error_from_rpc(error)))
                if self._closed:
                    raise Cancelled("the generation was closed")
                self._call = self._start(self._left_s())
        except asyncio.CancelledError:
            # gRPC raises this for a call that was closed, too; that must not look like the task's own cancellation.
            task = asyncio.current_task()
            if self._closed and not (task and task.cancelling()):
                raise Cancelled("the generation was closed") from None
            raise
        finally:
            self.close()
        self._result()

    async def result(self) -> Result:
        """Waits for the end; also fine after some deltas were taken."""
        async for _ in self:
            pass
        return self._result()

    def close(self) -> None:
        """Cancels the request if it still runs."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """May be shared by threads."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        retries: int = RETRIES,
        tls: bool | TlsFiles | None = None,
        ca: str = "",
        cert: str = "",
        key: str = "",
    ) -> None:
        """`api_key`: None takes that of the environment, "" none. `retries` are a generation's; 0 reports every
        refusal. `tls`: None speaks plaintext to this machine only, False wherever it is. `ca` is a PEM file of who
        vouches for the router, by default the system's; `cert` and `key` are for routers that want a certificate.
        Raises trust.tls.TlsRefused for files that can't be used."""
        self.address = address
        self._retries = retries
        self._metadata = _credentials(api_key)
        credentials, options = _transport(address, tls, TlsFiles(ca=ca, cert=cert, key=key))
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            self._channel = grpc.secure_channel(address, credentials, options=options)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str = "",
        timeout_s: float | None = None,
        request_id: str = "",
        lane: str = "",
        return_token_ids: bool = False,
        traceparent: str = "",
        **sampling: Unpack[SamplingOptions],
    ) -> Generation:
        """Begins one generation. `prompt` is text or token ids; an empty `model` means the only one served; past
        `timeout_s` the generation ends with DeadlineExceeded, wherever it is. `traceparent` is that of the caller's
        W3C trace context; `tandem why` tells the trace."""
        request = wire.generate_request(
            prompt, sampling, model=model, request_id=request_id, lane=lane, return_token_ids=return_token_ids
        )
        metadata = (*self._metadata, ("traceparent", traceparent)) if traceparent else self._metadata

        def start(left_s: float | None) -> _Call:
            return self._inference.Generate(request, timeout=left_s, metadata=metadata)

        return Generation(start, timeout_s, self._retries)

    def models(self, timeout_s: float = _CONTROL_TIMEOUT_S) -> tuple[Model, ...]:
        return wire.models(self._ask(self._inference.ListModels, wire.list_models_request(), timeout_s))

    def status(self, *, requests: bool = False, timeout_s: float = _CONTROL_TIMEOUT_S) -> ClusterStatus:
        found = self._ask(self._control.GetStatus, wire.get_status_request(requests=requests), timeout_s)
        return wire.cluster_status(found)

    def explain(self, request_id: str, tenant: str = "", timeout_s: float = _CONTROL_TIMEOUT_S) -> RequestStory:
        """Why a request of this client's tenant was served as it was: open, or ended not long ago. Operators may ask
        about any, and name the tenant where several have a request of this id; else it is the latest."""
        return wire.request_story(self._ask(self._control.Explain, wire.explain_request(request_id, tenant), timeout_s))

    def drain(self, worker_id: str, timeout_s: float = _CONTROL_TIMEOUT_S) -> None:
        """Asks a worker to finish what it has and take no more. Returns when the order is given."""
        self._ask(self._control.DrainWorker, wire.drain_worker_request(worker_id), timeout_s)

    def set_role(self, worker_id: str, role: Role, timeout_s: float = _CONTROL_TIMEOUT_S) -> None:
        self._ask(self._control.SetWorkerRole, wire.set_worker_role_request(worker_id, role), timeout_s)

    # Tenants and keys, for operators: changes to the router's own files, in force when the call returns.

    def tenants(self, timeout_s: float = _CONTROL_TIMEOUT_S) -> tuple[TenantFields, ...]:
        found = self._ask(self._control.ListTenants, wire.list_tenants_request(), timeout_s)
        return tuple(wire.tenant_fields(tenant) for tenant in found.tenants)

    def add_tenant(self, name: str, fields: Mapping[str, str], timeout_s: float = _CONTROL_TIMEOUT_S) -> TenantFields:
        """`fields`: values as TOML, plain words and words with commas, as `tandem tenant add` takes them."""
        return wire.tenant_fields(self._ask(self._control.AddTenant, wire.add_tenant_request(name, fields), timeout_s))

    def set_tenant(self, name: str, fields: Mapping[str, str], timeout_s: float = _CONTROL_TIMEOUT_S) -> TenantFields:
        """As `add_tenant`; an empty value is the default."""
        return wire.tenant_fields(self._ask(self._control.SetTenant, wire.set_tenant_request(name, fields), timeout_s))

    def remove_tenant(self, name: str, timeout_s: float = _CONTROL_TIMEOUT_S) -> None:
        self._ask(self._control.RemoveTenant, wire.remove_tenant_request(name), timeout_s)

    def keys(self, tenant: str = "", timeout_s: float = _CONTROL_TIMEOUT_S) -> tuple[KeyFacts, ...]:
        """Of a tenant, or all."""
        found = self._ask(self._control.ListKeys, wire.list_keys_request(tenant), timeout_s)
        return tuple(wire.key_facts(key) for key in found.keys)

    def create_key(
        self,
        tenant: str,
        *,
        scopes: Sequence[str] = (),
        lane_max: str = "",
        expires_in_s: float | None = None,
        env: str = "",
        timeout_s: float = _CONTROL_TIMEOUT_S,
    ) -> tuple[KeyFacts, str]:
        """The key, and what its user has to know: that is not shown again."""
        request = wire.create_key_request(tenant, scopes, lane_max, expires_in_s, env)
        made = self._ask(self._control.CreateKey, request, timeout_s)
        return wire.key_facts(made.key), made.secret

    def revoke_key(self, key_id: str, timeout_s: float = _CONTROL_TIMEOUT_S) -> None:
        self._ask(self._control.RevokeKey, wire.revoke_key_request(key_id), timeout_s)

    def _ask(self, method: grpc.UnaryUnaryMultiCallable[Q, A], request: Q, timeout_s: float) -> A:
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None

    def close(self) -> None:
        """Generations that still run are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """Belongs to the event loop it is created in."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        retries: int = RETRIES,
        tls: bool | TlsFiles | None = None,
        ca: str = "",
        cert: str = "",
        key: str = "",
    ) -> None:
        """As `Client`."""
        self.address = address
        self._retries = retries
        self._metadata = _credentials(api_key)
        credentials, options = _transport(address, tls, TlsFiles(ca=ca, cert=cert, key=key))
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=options)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str = "",
        timeout_s: float | None = None,
        request_id: str = "",
        lane: str = "",
        return_token_ids: bool = False,
        traceparent: str = "",
        **sampling: Unpack[SamplingOptions],
    ) -> AsyncGeneration:
        """As `Client.generate`."""
        request = wire.generate_request(
            prompt, sampling, model=model, request_id=request_id, lane=lane, return_token_ids=return_token_ids
        )
        metadata = (*self._metadata, ("traceparent", traceparent)) if traceparent else self._metadata

        def start(left_s: float | None) -> _AsyncCall:
            return self._inference.Generate(request, timeout=left_s, metadata=metadata)

        return AsyncGeneration(start, timeout_s, self._retries)

    async def models(self, timeout_s: float = _CONTROL_TIMEOUT_S) -> tuple[Model, ...]:
        try:
            response = await self._inference.ListModels(
                wire.list_models_request(), timeout=timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
        return wire.models(response)

    async def status(self, *, requests: bool = False, timeout_s: float = _CONTROL_TIMEOUT_S) -> ClusterStatus:
        try:
            response = await self._control.GetStatus(
                wire.get_status_request(requests=requests), timeout=timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
        return wire.cluster_status(response)

    async def explain(self, request_id: str, tenant: str = "", timeout_s: float = _CONTROL_TIMEOUT_S) -> RequestStory:
        """As `Client.explain`."""
        try:
            response = await self._control.Explain(
                wire.explain_request(request_id, tenant), timeout=timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
        return wire.request_story(response)

    async def drain(self, worker_id: str, timeout_s: float = _CONTROL_TIMEOUT_S) -> None:
        """As `Client.drain`."""
        try:
            await self._control.DrainWorker(
                wire.drain_worker_request(worker_id), timeout=timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None

    async def set_role(self, worker_id: str, role: Role, timeout_s: float = _CONTROL_TIMEOUT_S) -> None:
        try:
            await self._control.SetWorkerRole(
                wire.set_worker_role_request(worker_id, role), timeout=timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None

    async def close(self) -> None:
        """Generations that still run are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
