"""What a worker must bear, done to it from inside; which of it, says a folder of files that a test writes.

`install` wraps what kv_transfer and decode offer before anything else imports them. Without a file nothing is changed:

    hold         reads of KV stop in the middle while this is there; each says so in `held/`
    ttl          leases last at most so many seconds
    scramble     releases are sent again, late and out of order, some before the read they belong to
    handles      every fetch is preceded by attempts with handles that must be refused, see `_attack`
    swap         decode legs wait for each other and get each other's handles, until this is gone
    blind        readers take every lease word for the right one: what the tests must then find out
    ports/NAME   where the KvPeer of that worker listened in its former life, and will again
    expired/NAME the lease of this transfer has ended because its time was over
    log/         what came of it: a file for each process, a word in each line
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kv_transfer import registry, wire
from kv_transfer.api import FetchError
from kv_transfer.board import Board, RowHeader
from kv_transfer.lease import Lease, LeaseEvent, LeaseTable
from kv_transfer.node import KvNode
from kv_transfer.peer import PeerClient
from kv_transfer.reading import Reading
from kv_transfer.segments import pieces
from kv_transfer.transport import ARENA, Forwarding, ReadTimedOut, Segments, Transport
from protos import kv_pb2

_LOOK_EVERY_S = 0.002
_LATE_S_MAX = 0.4
#: Of the fetches of a process, one in so many has its lease ended before it begins.
_OVERTAKEN_EVERY = 3

#: `transfer` of the read that this thread is at; what peers read when they meet is not of any.
_reading = threading.local()


class Folder:
    """The files between the test and the workers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbers = itertools.count()
        for name in ("held", "ports", "log", "handles-seen", "expired"):
            (path / name).mkdir(exist_ok=True)

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def text(self, name: str) -> str | None:
        try:
            return (self.path / name).read_text()
        except FileNotFoundError:
            return None

    def say(self, word: str) -> None:
        with (self.path / "log" / str(os.getpid())).open("a") as log:
            log.write(word + "\n")

    @contextmanager
    def held(self, owner: str, reader: str, transfer: str) -> Iterator[None]:
        name = f"{os.getpid()}-{next(self._numbers)}"
        marker = self.path / "held" / name
        writing = self.path / f"{name}.writing"
        writing.write_text(json.dumps({"owner": owner, "reader": reader, "transfer": transfer}))
        writing.rename(marker)
        try:
            yield
        finally:
            marker.unlink(missing_ok=True)  # the test clears up after the killed


class Stopping(Forwarding):
    """A transport whose reads of KV stop in the middle while the test wants them to."""

    def __init__(self, transport: Transport, folder: Folder) -> None:
        super().__init__(transport)
        self._folder = folder

    def read(self, peer: str, segments: Segments, timeout_s: float) -> None:
        transfer = getattr(_reading, "transfer", "")
        if segments.remote_region != ARENA or not transfer or not self._folder.has("hold"):
            return super().read(peer, segments, timeout_s)
        deadline = time.monotonic() + timeout_s
        first, *rest = pieces(segments, max(1, segments.nbytes // 2))
        super().read(peer, first, timeout_s)
        with self._folder.held(peer, os.environ.get("FAULTS_READER", ""), transfer):
            while self._folder.has("hold"):
                if time.monotonic() > deadline:
                    raise ReadTimedOut(f"the read from {peer} is past its deadline")
                time.sleep(_LOOK_EVERY_S)
        for piece in rest:
            if time.monotonic() > deadline:
                raise ReadTimedOut(f"the read from {peer} is past its deadline")
            super().read(peer, piece, deadline - time.monotonic())


def install(path: str) -> None:
    folder = Folder(Path(path))
    _stop_reads(folder)
    _name_reads()
    _shorten_leases(folder)
    _keep_ports(folder)
    _scramble_releases(folder)
    _attack_fetches(folder)
    _swap_handles(folder)
    _blind_readers(folder)


def _stop_reads(folder: Folder) -> None:
    make = registry.make_transports

    def make_transports(names: Sequence[str], **more: Any) -> list[Transport]:
        return [Stopping(transport, folder) for transport in make(names, **more)]

    registry.make_transports = make_transports


def _name_reads() -> None:
    run = Reading.run

    @functools.wraps(run)
    def run_named(self: Reading, bytes_in: Callable[[], None]) -> None:
        _reading.transfer = self.handle.transfer_id
        try:
            run(self, bytes_in)
        finally:
            del _reading.transfer

    Reading.run = run_named  # type: ignore[method-assign]


def _shorten_leases(folder: Folder) -> None:
    end = LeaseTable._end

    @functools.wraps(end)
    def end_and_tell(self: LeaseTable, lease: Lease, event: LeaseEvent) -> bool:
        ended = end(self, lease, event)
        if ended and event is LeaseEvent.EXPIRE:
            (folder.path / "expired" / lease.transfer_id.replace("/", ":")).touch()
        return ended

    LeaseTable._end = end_and_tell  # type: ignore[method-assign]

    def get(self: LeaseTable) -> float:
        told = folder.text("ttl")
        return float(told) if told else self.__dict__["_ttl_s_max"]

    def put(self: LeaseTable, value: float) -> None:
        self.__dict__["_ttl_s_max"] = value

    LeaseTable._ttl_s_max = property(get, put)  # type: ignore[assignment]


def _keep_ports(folder: Folder) -> None:
    make, open_ = KvNode.__init__, KvNode.open

    @functools.wraps(make)
    def init(self: KvNode, **arguments: Any) -> None:
        former = folder.text(f"ports/{arguments['name']}")
        if former and _is_free(int(former)):
            arguments["port"] = int(former)
            folder.say("same-port")
        make(self, **arguments)

    @functools.wraps(open_)
    def open_and_tell(self: KvNode, **arguments: Any) -> None:
        open_(self, **arguments)
        os.environ["FAULTS_READER"] = self.name
        (folder.path / "ports" / self.name).write_text(self.address.rpartition(":")[2])

    KvNode.__init__ = init  # type: ignore[method-assign]
    KvNode.open = open_and_tell  # type: ignore[method-assign]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _scramble_releases(folder: Folder) -> None:
    release, fetch = PeerClient.release, KvNode.fetch
    fetches = itertools.count()

    @functools.wraps(release)
    def release_again(self: PeerClient, handle: bytes, timeout_s: float, done: Callable[[bool], None]) -> bool:
        sent = release(self, handle, timeout_s, done)
        if not folder.has("scramble"):
            return sent
        for _ in range(2):
            _later(random.uniform(0, _LATE_S_MAX), lambda: release(self, handle, timeout_s, lambda _: None))
            _later(random.uniform(0, _LATE_S_MAX), lambda: _extend(self, handle))
        folder.say("scrambled")
        return sent

    @functools.wraps(fetch)
    def fetch_overtaken(self: KvNode, handle: bytes, *more: Any, **named: Any) -> Any:
        if folder.has("scramble") and next(fetches) % _OVERTAKEN_EVERY == 0:
            owner = PeerClient(wire.parse_handle(handle).owner_address, secret=self._secret, tls=None)
            owner._stub.Release(kv_pb2.ReleaseRequest(handle=wire.parse_handle(handle)), timeout=2.0)
            owner.close()
            folder.say("overtaken")
        return fetch(self, handle, *more, **named)

    PeerClient.release = release_again  # type: ignore[method-assign]
    KvNode.fetch = fetch_overtaken  # type: ignore[method-assign]


def _later(seconds: float, what: Callable[[], object]) -> None:
    def run() -> None:
        try:
            what()
        except Exception:  # the owner may be gone by then
            return

    timer = threading.Timer(seconds, run)
    timer.daemon = True
    timer.start()


def _extend(client: PeerClient, handle: bytes) -> None:
    client._stub.Extend(kv_pb2.ExtendRequest(handle=wire.parse_handle(handle), ttl_s=30.0), timeout=2.0)


def _attack_fetches(folder: Folder) -> None:
    fetch = KvNode.fetch

    def attempt(node: KvNode, what: str, handle: bytes) -> None:
        """Must not end well."""
        try:
            fetched = fetch(node, handle, 0.1)
        except FetchError as error:
            folder.say(f"{what}-{error.outcome.name}")
        else:
            folder.say(f"{what}-STAGED")
            node.discard(fetched.staged_id)

    @functools.wraps(fetch)
    def fetch_attacked(self: KvNode, handle: bytes, *more: Any, **named: Any) -> Any:
        if not folder.has("handles"):
            return fetch(self, handle, *more, **named)
        bit = random.randrange(8 * len(handle))
        changed = bytearray(handle)
        changed[bit // 8] ^= 1 << bit % 8
        attempt(self, "tampered", bytes(changed))
        for stranger in _seen_by_others(folder, self.name):
            attempt(self, "stranger", stranger)
        (folder.path / "handles-seen" / self.name).write_bytes(handle)
        fetched = fetch(self, handle, *more, **named)
        attempt(self, "replayed", handle)
        return fetched

    KvNode.fetch = fetch_attacked  # type: ignore[method-assign]


def _seen_by_others(folder: Folder, name: str) -> list[bytes]:
    """Handles that another reader was given."""
    return [path.read_bytes() for path in (folder.path / "handles-seen").iterdir() if path.name != name]


def _swap_handles(folder: Folder) -> None:
    from decode.service import DecodeOrder, DecodeService

    serve = DecodeService.serve
    waiting: list[tuple[DecodeOrder, asyncio.Future[bytes]]] = []

    async def swapped(order: DecodeOrder) -> DecodeOrder:
        """With the handle of another leg whose prompt is as long."""
        for entry in waiting:
            other, future = entry
            if other.leg.prompt_tokens == order.leg.prompt_tokens and not future.done():
                waiting.remove(entry)
                future.set_result(order.handle)
                folder.say("swapped")
                return dataclasses.replace(order, handle=other.handle)
        future = asyncio.get_running_loop().create_future()
        entry = (order, future)
        waiting.append(entry)
        try:
            while folder.has("swap") and not future.done():
                await asyncio.wait((future,), timeout=_LOOK_EVERY_S)
        finally:
            if entry in waiting:
                waiting.remove(entry)
        return dataclasses.replace(order, handle=future.result()) if future.done() else order

    @functools.wraps(serve)
    async def serve_swapped(self: DecodeService, order: DecodeOrder, *more: Any, **named: Any) -> None:
        if folder.has("swap") and order.handle:
            order = await swapped(order)
        await serve(self, order, *more, **named)

    DecodeService.serve = serve_swapped  # type: ignore[method-assign]


def _blind_readers(folder: Folder) -> None:
    fetch, header = KvNode.fetch, Board.scratch_header
    fetching = threading.local()

    @functools.wraps(fetch)
    def fetch_blindly(self: KvNode, handle: bytes, *more: Any, **named: Any) -> Any:
        fetching.word = wire.parse_handle(handle).word if folder.has("blind") else 0
        return fetch(self, handle, *more, **named)

    def scratch_header(self: Board, slot: int) -> RowHeader:
        found = header(self, slot)
        return dataclasses.replace(found, word=fetching.word) if getattr(fetching, "word", 0) else found

    KvNode.fetch = fetch_blindly  # type: ignore[method-assign]
    Board.scratch_header = scratch_header  # type: ignore[method-assign]
