"""The link to one router: dials it, says hello, and carries orders in and answers out until it breaks; then again.

A link is one bidirectional stream. It begins with both ends proving that they are of one cluster (trust/join.py);
before the router has, a worker says nothing of itself and takes no order. When it breaks, by either end's death or by
the network, both take everything on it as lost at that moment; nothing is resumed. A new stream starts with a new hello
and an empty outbox.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import grpc

from protos import worker_link_pb2_grpc
from trust.join import Side, is_proof, nonce, proof
from trust.tls import Tls
from worker import messages, wire
from worker.backoff import Backoff
from worker.config import LinkSettings
from worker.outbox import Outbox
from worker.service import ProtocolError, WorkerService

if TYPE_CHECKING:
    Stream = grpc.aio.StreamStreamCall[wire.WorkerMessage, wire.RouterMessage]

log = logging.getLogger(__name__)

_REPORT_INTERVAL_DEFAULT_S = 1.0
_REPORT_INTERVAL_MIN_S = 0.02
_REPORT_INTERVAL_MAX_S = 60.0


class LinkLost(Exception):
    """The stream is over, and not because this worker leaves."""


@dataclass(frozen=True, slots=True)
class Trust:
    """By what this worker and its routers know each other."""

    #: See `trust.join.join_key`.
    join_key: bytes = field(repr=False)
    #: None: plaintext.
    tls: Tls | None = None


class RouterLink:
    def __init__(
        self, address: str, settings: LinkSettings, trust: Trust, worker: WorkerService, random: Random
    ) -> None:
        self.address = address
        self._settings = settings
        self._trust = trust
        self._worker = worker
        self._backoff = Backoff(settings.retry_first_s, settings.retry_max_s, random)
        #: Set when this worker leaves: flush what waits, then close instead of dialling again.
        self._closing = asyncio.Event()
        self._outbox: Outbox | None = None

    async def run(self) -> None:
        """Keeps the link up. Returns once `close` was called and what waited has left, or was given up."""
        while not self._closing.is_set():
            try:
                async with self._dial() as stream:
                    await self._serve(stream)
            except* LinkLost as lost:
                log.warning("router %s: %s", self.address, "; ".join(str(error) for error in lost.exceptions))
            _heed_cancel()
            await self._pause(self._backoff.next_s())

    def close(self) -> None:
        self._closing.set()
        if self._outbox:
            self._outbox.wake()

    async def _pause(self, wait_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._closing.wait()

    @asynccontextmanager
    async def _dial(self) -> AsyncIterator[Stream]:
        async with self._channel() as channel:
            stream: Stream = worker_link_pb2_grpc.WorkerLinkStub(channel).Connect()
            try:
                yield stream
            finally:
                stream.cancel()

    def _channel(self) -> grpc.aio.Channel:
        options: list[tuple[str, int | str]] = [*_channel_options(self._settings)]
        tls = self._trust.tls
        if tls is None:
            return grpc.aio.insecure_channel(self.address, options=options)
        options += tls.channel_options()
        # Made anew each time, from what the files hold now.
        return grpc.aio.secure_channel(self.address, tls.channel_credentials(), options=options)

    async def _serve(self, stream: Stream) -> None:
        role_said = self._worker.role
        welcome = await self._greet(stream)
        self._backoff.reset()
        log.info("router %s (%s): linked", self.address, welcome.router_id)
        outbox = self._outbox = Outbox(self._settings.outbox_max)
        self._worker.joined(outbox, role_said)
        try:
            async with asyncio.TaskGroup() as scope:
                receiving = scope.create_task(self._receive(stream, outbox))
                others = [
                    receiving,
                    scope.create_task(self._report(outbox, welcome.load_report_interval_s)),
                    scope.create_task(_watch(outbox)),
                ]
                await self._send(stream, outbox)
                await self._finish(stream, receiving)
                for task in others:
                    task.cancel()
        finally:
            self._outbox = None
            self._worker.left(outbox)

    async def _greet(self, stream: Stream) -> messages.Welcome:
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                proof = await self._know_each_other(stream)
                await _write(stream, self._worker.hello(proof))
                welcome = await _read(stream)
        except TimeoutError:
            raise LinkLost(f"no welcome within {self._settings.connect_timeout_s} s") from None
        if not isinstance(welcome, messages.Welcome):
            raise LinkLost("the router closed" if welcome is None else "the router did not begin with a welcome")
        return welcome

    async def _know_each_other(self, stream: Stream) -> bytes:
        """The worker's proof, once the router has given its own. Raises LinkLost."""
        me, mine = self._worker.identity, nonce()
        await _write(stream, wire.introduction(me.worker_id, me.incarnation, mine))
        challenge = await _read(stream)
        if not isinstance(challenge, messages.Challenge):
            raise LinkLost("the router closed" if challenge is None else "the router did not begin with a challenge")

        def made_by(side: Side) -> bytes:
            return proof(
                self._trust.join_key,
                side,
                worker_id=me.worker_id,
                incarnation=me.incarnation,
                router_id=challenge.router_id,
                worker_nonce=mine,
                router_nonce=challenge.nonce,
            )

        # A router without a proof may be known by its certificate, which was checked while dialling.
        must_prove = bool(challenge.proof) or self._trust.tls is None
        if must_prove and not is_proof(challenge.proof, made_by(Side.ROUTER)):
            raise LinkLost("refused: the router did not prove that it knows the cluster's secret")
        return made_by(Side.WORKER)

    async def _receive(self, stream: Stream, outbox: Outbox) -> None:
        while (message := await _read(stream)) is not None:
            try:
                self._worker.handle(outbox, message)
            except ProtocolError as error:
                raise LinkLost(f"the router broke the protocol: {error}") from error
        if not self._closing.is_set():
            raise LinkLost("the router closed")

    async def _send(self, stream: Stream, outbox: Outbox) -> None:
        """Returns when the link is closing, and all has left that was put in before."""
        closing = False
        while not closing:
            await outbox.wait()
            closing = self._closing.is_set()
            for message in outbox.take():
                try:
                    async with asyncio.timeout(self._settings.dead_after_s):
                        await _write(stream, message)
                except TimeoutError:
                    raise LinkLost(f"the router read nothing for {self._settings.dead_after_s} s") from None

    async def _finish(self, stream: Stream, receiving: asyncio.Task[None]) -> None:
        """Half-closes, and gives the router a moment to read the last messages and close its half."""
        await stream.done_writing()
        await asyncio.wait([receiving], timeout=self._settings.close_timeout_s)

    async def _report(self, outbox: Outbox, interval_s: float) -> None:
        interval_s = interval_s or _REPORT_INTERVAL_DEFAULT_S
        interval_s = min(max(interval_s, _REPORT_INTERVAL_MIN_S), _REPORT_INTERVAL_MAX_S)
        while True:
            await self._worker.report(outbox)
            await asyncio.sleep(interval_s)


def _heed_cancel() -> None:
    """A task group whose child fails as it is cancelled raises the failure alone (before Python 3.13), and the cancel
    would be forgotten."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def _watch(outbox: Outbox) -> None:
    await outbox.overflowed.wait()
    raise LinkLost("the outbox is full: the router does not read")


async def _write(stream: Stream, message: wire.WorkerMessage) -> None:
    try:
        await stream.write(message)
    except (grpc.RpcError, asyncio.InvalidStateError) as error:
        raise LinkLost(_reason(error)) from error


async def _read(stream: Stream) -> messages.Message | None:
    """None when the router has closed."""
    try:
        message = await stream.read()
    except (grpc.RpcError, asyncio.InvalidStateError) as error:
        raise LinkLost(_reason(error)) from error
    return wire.read(message) if isinstance(message, wire.RouterMessage) else None


def _reason(error: grpc.RpcError | asyncio.InvalidStateError) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)


def _channel_options(settings: LinkSettings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.message_bytes_max),
        ("grpc.max_send_message_length", settings.message_bytes_max),
        # Each attempt connects anew; waiting between attempts is ours.
        ("grpc.use_local_subchannel_pool", 1),
        # No probing of the bandwidth: it wakes the router once more for every order.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 1 << 20),
        # The interval is longer than what every gRPC server tolerates without being told. It is not the pings that
        # find a dead router: keepalive makes the kernel drop a connection whose bytes (a load report at least, every
        # second or so) stay unacknowledged for the timeout.
        ("grpc.keepalive_time_ms", 310_000),
        ("grpc.keepalive_timeout_ms", int(settings.dead_after_s * 1000)),
    ]
