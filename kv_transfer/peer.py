"""KvPeer, the control side between two nodes: who are you, and this lease may end. No KV byte passes here.

Every call is authenticated with the cluster secret: Describe by a MAC over a nonce both ways, Release and Extend by
the handle they carry. That keeps strangers out; it does not hide anything from who can listen. For that, give both
sides TLS; without it a node should listen on a loopback or private address only.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable
from typing import NoReturn

import grpc

from kv_transfer import wire
from kv_transfer.handle import Handle, HandleRefused
from kv_transfer.threads import DaemonThreads
from kv_transfer.wire import PeerFacts
from protos import kv_pb2, kv_pb2_grpc
from trust.tls import Tls

log = logging.getLogger(__name__)

#: Back-off outlives a channel unless its pool of subchannels is its own, and a restarted peer must be met at once.
_CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
#: Without it two nodes could be given the same port, each receiving half of the other's calls.
_SERVER_OPTIONS = (("grpc.so_reuseport", 0),)
#: More are refused; a caller whose Release is refused lets the lease expire.
_CALLS_AT_ONCE = 256


class PeerUnreachable(Exception):
    """No answer within the deadline, or none that can be trusted."""


class PeerRefused(Exception):
    """The peer, or its answer, was refused: another cluster's secret, another node at the address."""


class PeerServer:
    """Serves KvPeer for one node. `release` and `extend` get handles whose MAC is right."""

    def __init__(
        self,
        *,
        host: str,
        port: int,
        secret: bytes,
        facts: PeerFacts,
        release: Callable[[Handle], bool],
        extend: Callable[[Handle, float], int | None],
        tls: Tls | None,
        threads: int,
    ) -> None:
        self._threads = DaemonThreads(threads, "kv-peer")
        self._server = grpc.server(
            self._threads,  # type: ignore[arg-type]  # an Executor is all it needs
            options=_SERVER_OPTIONS,
            maximum_concurrent_rpcs=_CALLS_AT_ONCE,
        )
        kv_pb2_grpc.add_KvPeerServicer_to_server(_Servicer(secret, facts, release, extend), self._server)
        if tls is None:
            port = self._server.add_insecure_port(f"{host}:{port}")
        else:
            port = self._server.add_secure_port(f"{host}:{port}", tls.server_credentials())
        self.address = f"{host}:{port}"
        self._server.start()

    def stop(self, grace_s: float) -> None:
        self._server.stop(grace_s).wait()
        self._threads.shutdown()


class _Servicer(kv_pb2_grpc.KvPeerServicer):
    def __init__(
        self,
        secret: bytes,
        facts: PeerFacts,
        release: Callable[[Handle], bool],
        extend: Callable[[Handle, float], int | None],
    ) -> None:
        self._secret = secret
        self._facts = facts
        self._release = release
        self._extend = extend

    def Describe(self, request: kv_pb2.DescribeRequest, context: grpc.ServicerContext) -> kv_pb2.PeerDescription:
        if not wire.is_authentic(request, self._secret):
            _deny(context, "the call's MAC is wrong: made with another cluster's secret")
        return wire.answer(self._facts, request.nonce, self._secret)

    def Release(self, request: kv_pb2.ReleaseRequest, context: grpc.ServicerContext) -> kv_pb2.ReleaseResponse:
        return kv_pb2.ReleaseResponse(held=self._release(self._handle(request.handle, context)))

    def Extend(self, request: kv_pb2.ExtendRequest, context: grpc.ServicerContext) -> kv_pb2.ExtendResponse:
        deadline_ms = self._extend(self._handle(request.handle, context), request.ttl_s)
        return kv_pb2.ExtendResponse(held=deadline_ms is not None, deadline_ms=deadline_ms or 0)

    def _handle(self, message: kv_pb2.KvHandle, context: grpc.ServicerContext) -> Handle:
        try:
            return wire.unseal(message, self._secret)
        except HandleRefused as refused:
            _deny(context, str(refused))


def _deny(context: grpc.ServicerContext, why: str) -> NoReturn:
    context.abort(grpc.StatusCode.PERMISSION_DENIED, why)
    raise AssertionError("abort raises")


class PeerClient:
    """Calls one peer. Thread-safe."""

    def __init__(self, address: str, *, secret: bytes, tls: Tls | None) -> None:
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        else:
            options = (*_CHANNEL_OPTIONS, *tls.channel_options())
            self._channel = grpc.secure_channel(address, tls.channel_credentials(), options=options)
        self._address = address
        self._secret = secret
        self._stub = kv_pb2_grpc.KvPeerStub(self._channel)
        self._lock = threading.Lock()
        self._outstanding = 0
        self._closing = False

    def describe(self, caller: str, timeout_s: float) -> PeerFacts:
        nonce = secrets.token_bytes(16)
        try:
            message = self._stub.Describe(wire.ask(caller, nonce, self._secret), timeout=timeout_s)
        except grpc.RpcError as error:
            detail = f"{self._address}: {error.details()}"
            if error.code() is grpc.StatusCode.PERMISSION_DENIED:
                raise PeerRefused(detail) from error
            raise PeerUnreachable(detail) from error
        facts = wire.read_answer(message, nonce, self._secret)
        if facts is None:
            raise PeerRefused(f"{self._address}: the answer's MAC is wrong: made with another cluster's secret")
        return facts

    def release(self, handle: bytes, timeout_s: float, done: Callable[[bool], None]) -> bool:
        """Sends and returns; `done` is told, from another thread, whether the owner got it. False: closed already, and
        nobody is told anything."""
        request = kv_pb2.ReleaseRequest(handle=kv_pb2.KvHandle.FromString(handle))
        return self._send(lambda: self._stub.Release.future(request, timeout=timeout_s), done)

    def extend(self, handle: bytes, ttl_s: float, timeout_s: float) -> None:
        """Sends and returns. If it gets lost, the lease ends when it would have."""
        request = kv_pb2.ExtendRequest(handle=kv_pb2.KvHandle.FromString(handle), ttl_s=ttl_s)
        self._send(lambda: self._stub.Extend.future(request, timeout=timeout_s), lambda arrived: None)

    def _send(self, call: Callable[[], grpc.Future], done: Callable[[bool], None]) -> bool:
        with self._lock:
            if self._closing:
                return False
            self._outstanding += 1
        try:
            sent = call()
        except BaseException:
            with self._lock:
                self._outstanding -= 1
            raise
        sent.add_done_callback(lambda future: self._sent(future, done))
        return True

    def _sent(self, call: grpc.Future, done: Callable[[bool], None]) -> None:
        with self._lock:
            self._outstanding -= 1
            close = self._closing and not self._outstanding
        done(not call.cancelled() and call.exception() is None)
        if close:
            self._close_channel()

    def close(self) -> None:
        """Lets calls under way end first, without waiting for them."""
        with self._lock:
            close = not self._closing and not self._outstanding
            self._closing = True
        if close:
            self._channel.close()

    def _close_channel(self) -> None:
        # Channel.close waits for the thread that runs callbacks, which is the one we are in.
        threading.Thread(target=self._channel.close, name="kv-peer-close", daemon=True).start()
