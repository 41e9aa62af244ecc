"""KvLocal: a worker drives the KvNode of the engine process beside it, over a Unix socket.

vLLM keeps KV memory in its EngineCore process, so the node lives there, and a fetch asked for in the worker runs there.
Who may open the socket may do all this, so it lies in a folder that no other user can enter.

A fetch whose caller goes away must not leave pages behind, and a cancel can cross the answer. Hence two nets: the
server cancels the fetch, or discards what it staged, when its RPC ends early; and the client, which knows the staged id
from the handle, sends a discard after every fetch whose answer it did not get.
"""

from __future__ import annotations

import asyncio
import logging
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from kv_transfer import wire
from kv_transfer.api import Fetched, FetchError, Lane, Outcome
from kv_transfer.handle import HandleRefused
from kv_transfer.node import KvNode
from kv_transfer.threads import DaemonThreads
from kv_transfer.turn import Cancel
from protos import kv_pb2, kv_pb2_grpc

log = logging.getLogger(__name__)

#: For calls that do not wait for a peer.
_CALL_TIMEOUT_S = 5.0
#: What a fetch's or meeting's own deadline is given on top, to answer in.
_ANSWER_S = 2.0
_MEET_TIMEOUT_S = 10.0
#: Longer paths do not fit a Unix socket's address.
_PATH_BYTES_MAX = 107


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalStats:
    """Fields are those of `StatsResponse` in protos/kv.proto."""

    kv_blocks_free: int
    kv_blocks_total: int
    leases_held: int
    leased_blocks: int
    staged_pages: int
    transfer_bytes_total: int
    transfer_failures_total: int
    leases_expired_total: int
    transfers_corrupt_total: int


class KvLocalServer:
    """Serves a node to the worker process. `blocks` tells how many KV blocks are free and how many there are."""

    def __init__(self, node: KvNode, socket: Path, blocks: Callable[[], tuple[int, int]]) -> None:
        if len(bytes(socket)) > _PATH_BYTES_MAX:
            raise ValueError(f"{socket}: a Unix socket's path has at most {_PATH_BYTES_MAX} bytes")
        if stat.S_IMODE(socket.parent.stat().st_mode) & 0o077:
            raise ValueError(f"{socket.parent} must be private (mode 0700): its socket gives access to KV memory")
        # Fetches block a thread each and are bounded by the node; the others answer at once.
        self._threads = DaemonThreads(node.limits.fetches + 4, "kv-local")
        self._server = grpc.server(self._threads)  # type: ignore[arg-type]  # an Executor is all it needs
        kv_pb2_grpc.add_KvLocalServicer_to_server(_Servicer(node, blocks), self._server)
        self._server.add_insecure_port(f"unix:{socket}")
        self._server.start()

    def close(self) -> None:
        """Before the node's own close: fetches still under way are cancelled."""
        self._server.stop(None).wait()
        self._threads.shutdown()


class _Servicer(kv_pb2_grpc.KvLocalServicer):
    def __init__(self, node: KvNode, blocks: Callable[[], tuple[int, int]]) -> None:
        self._node = node
        self._blocks = blocks

    def Fetch(self, request: kv_pb2.FetchRequest, context: grpc.ServicerContext) -> kv_pb2.FetchResponse:
        cancel = Cancel()
        if not context.add_callback(cancel.set):
            return _failure(Outcome.FAILED, "cancelled")
        try:
            fetched = self._node.fetch(request.handle, request.timeout_s, cancel, ahead=request.ahead)
        except FetchError as error:
            return _failure(error.outcome, error.detail)
        if cancel.is_set():
            self._node.discard(fetched.staged_id)
        return kv_pb2.FetchResponse(
            outcome=kv_pb2.FetchResponse.STAGED,
            staged_id=fetched.staged_id,
            tokens=fetched.tokens,
            transport=fetched.transport,
            bytes=fetched.nbytes,
            fetch_s=fetched.fetch_s,
        )

    def Discard(self, request: kv_pb2.DiscardRequest, context: grpc.ServicerContext) -> kv_pb2.DiscardResponse:
        self._node.discard(request.staged_id)
        return kv_pb2.DiscardResponse()

    def Release(self, request: kv_pb2.ReleaseRequest, context: grpc.ServicerContext) -> kv_pb2.ReleaseResponse:
        return kv_pb2.ReleaseResponse(held=self._node.release(request.handle.SerializeToString()))

    def Connect(self, request: kv_pb2.ConnectRequest, context: grpc.ServicerContext) -> kv_pb2.ConnectResponse:
        lane = self._node.connect(peer=request.peer, address=request.address)
        return kv_pb2.ConnectResponse(
            transport=lane.transport, gigabytes_per_s=lane.gigabytes_per_s, refusal=lane.refusal
        )

    def Stats(self, request: kv_pb2.StatsRequest, context: grpc.ServicerContext) -> kv_pb2.StatsResponse:
        stats = self._node.stats()
        free, total = self._blocks()
        return kv_pb2.StatsResponse(
            kv_blocks_free=free,
            kv_blocks_total=total,
            leases_held=stats.leases_held,
            leased_blocks=stats.leased_blocks,
            staged_pages=stats.staged_pages,
            transfer_bytes_total=stats.transfer_bytes_total,
            transfer_failures_total=stats.transfer_failures_total,
            leases_expired_total=stats.leases_expired_total,
            transfers_corrupt_total=stats.transfers_corrupt_total,
        )


def _failure(outcome: Outcome, detail: str) -> kv_pb2.FetchResponse:
    return kv_pb2.FetchResponse(outcome=outcome.name, detail=detail)


class EngineProcessLost(Exception):
    """The engine process did not answer; it is dead or hangs."""


class AsyncKvClient:
    """The worker's side. Create and use it in one event loop.

    `fetch` raises FetchError; the other calls raise EngineProcessLost.
    """

    def __init__(self, socket: Path) -> None:
        self._channel = grpc.aio.insecure_channel(f"unix:{socket}", options=(("grpc.use_local_subchannel_pool", 1),))
        self._stub: kv_pb2_grpc.KvLocalAsyncStub = kv_pb2_grpc.KvLocalStub(self._channel)
        #: Discards that follow fetches without an answer; no more than there were fetches at once.
        self._discards: set[asyncio.Task[None]] = set()

    async def fetch(self, handle: bytes, timeout_s: float, *, ahead: bool = False) -> Fetched:
        """Like KvNode.fetch. Cancelling the awaiting task stops the read, and nothing stays staged."""
        try:
            staged_id = wire.to_handle(wire.parse_handle(handle)).staged_id
        except HandleRefused as refused:
            raise FetchError(Outcome.REFUSED, str(refused)) from refused
        request = kv_pb2.FetchRequest(handle=handle, timeout_s=timeout_s, ahead=ahead)
        try:
            response = await self._stub.Fetch(request, timeout=timeout_s + _ANSWER_S)
        except grpc.aio.AioRpcError as error:
            self._discard_later(staged_id)
            raise FetchError(Outcome.FAILED, f"the engine process did not answer: {error.details()}") from error
        except BaseException:
            self._discard_later(staged_id)
            raise
        return _fetched(response)

    def _discard_later(self, staged_id: str) -> None:
        task = asyncio.get_running_loop().create_task(self._discard_quietly(staged_id))
        self._discards.add(task)
        task.add_done_callback(self._discards.discard)

    async def _discard_quietly(self, staged_id: str) -> None:
        try:
            await self.discard(staged_id)
        except EngineProcessLost as lost:
            log.info("discard of %s: %s", staged_id, lost)

    async def discard(self, staged_id: str) -> None:
        try:
            await self._stub.Discard(kv_pb2.DiscardRequest(staged_id=staged_id), timeout=_CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise EngineProcessLost(error.details()) from error

    async def release(self, handle: bytes) -> bool:
        """Like KvNode.release."""
        try:
            request = kv_pb2.ReleaseRequest(handle=wire.parse_handle(handle))
            response = await self._stub.Release(request, timeout=_CALL_TIMEOUT_S)
        except HandleRefused:
            return False
        except grpc.aio.AioRpcError as error:
            raise EngineProcessLost(error.details()) from error
        return response.held

    async def connect(self, peer: str, address: str) -> Lane:
        request = kv_pb2.ConnectRequest(peer=peer, address=address)
        try:
            response = await self._stub.Connect(request, timeout=_MEET_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise EngineProcessLost(error.details()) from error
        return Lane(
            peer=peer,
            transport=response.transport,
            gigabytes_per_s=response.gigabytes_per_s,
            refusal=response.refusal,
        )

    async def stats(self) -> LocalStats:
        try:
            response = await self._stub.Stats(kv_pb2.StatsRequest(), timeout=_CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise EngineProcessLost(error.details()) from error
        return LocalStats(
            kv_blocks_free=response.kv_blocks_free,
            kv_blocks_total=response.kv_blocks_total,
            leases_held=response.leases_held,
            leased_blocks=response.leased_blocks,
            staged_pages=response.staged_pages,
            transfer_bytes_total=response.transfer_bytes_total,
            transfer_failures_total=response.transfer_failures_total,
            leases_expired_total=response.leases_expired_total,
            transfers_corrupt_total=response.transfers_corrupt_total,
        )

    async def close(self) -> None:
        if self._discards:
            await asyncio.wait(set(self._discards))
        await self._channel.close()


def _fetched(response: kv_pb2.FetchResponse) -> Fetched:
    outcome = Outcome(response.outcome)
    if outcome is not Outcome.STAGED:
        raise FetchError(outcome, response.detail)
    return Fetched(
        staged_id=response.staged_id,
        tokens=response.tokens,
        transport=response.transport,
        nbytes=response.bytes,
        fetch_s=response.fetch_s,
    )
