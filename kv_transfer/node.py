"""KvNode: the memory-owning process's end of every hand-off, as owner and as reader.

As owner it offers leases on blocks of its arena and says when they have ended. As reader it fetches a handle's blocks
into staging pages: check the handle, find room, meet the owner if it is new, read the blocks, read the lease word by
the same transport, compare. Only an equal word makes the pages STAGED; everything else throws them away. What the life
cycles are is in lease.py; this file runs them with threads, a clock and transports.

Threads: `offer`, `take_ended` and the like return at once and are made for an engine's scheduler; `fetch` and `connect`
block their caller. Inside there are the KvPeer server's threads and one that keeps house (ends leases at their
deadlines, pages' quarantine when a hung read is over); idle, none of them runs.

The owner of the memory (arena, staging) must keep it mapped until `close` has returned.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from kv_transfer import wire
from kv_transfer.api import Fetched, FetchError, Lane, NodeLimits, NodeStats, Outcome
from kv_transfer.board import HEADER, Board, RowHeader, new_word
from kv_transfer.handle import Handle, HandleRefused, check_owner, check_reader
from kv_transfer.layout import KvLayout, layout_difference
from kv_transfer.lease import AlreadyUsed, LeaseState, LeaseTable, Transfer, TransferEvent, TransferState, TransferTable
from kv_transfer.peer import PeerClient, PeerCredentials, PeerRefused, PeerServer, PeerUnreachable
from kv_transfer.segments import ArenaMap, block_segments, one_segment, pieces
from kv_transfer.staging import Staging
from kv_transfer.transport import (
    ARENA,
    BOARD,
    STAGING,
    PeerGone,
    ReadTimedOut,
    Region,
    Segments,
    Transport,
    TransportError,
    Unquiesced,
)
from kv_transfer.turn import Cancel, Cancelled, Turn
from kv_transfer.wire import PeerFacts

log = logging.getLogger(__name__)

#: Meetings with different peers run side by side, up to this many.
_MEETINGS = 8
_CLOSE_GRACE_S = 5.0
_LOOK_AT_UNQUIET_S = 0.25


class UnknownStaged(KeyError):
    """Nothing is staged under this id: never was, or it was discarded."""


@dataclass(frozen=True, slots=True)
class _Wire:
    """A transport and whose turn it is. Whoever calls the transport holds the turn."""

    transport: Transport
    turn: Turn


@dataclass(frozen=True, slots=True)
class _Peer:
    """A met peer, its transport connected."""

    facts: PeerFacts
    client: PeerClient
    wire: _Wire
    lane: Lane


@dataclass(frozen=True, slots=True)
class _Unquiet:
    """A failed read that may still be writing."""

    wire: _Wire
    is_quiet: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class _Job:
    """One fetch under way."""

    transfer: Transfer
    cancel: Cancel
    scratch_slot: int
    deadline: float


class KvNode:
    """See the module's text. All methods are thread-safe."""

    def __init__(
        self,
        *,
        name: str,
        incarnation: str,
        layout: KvLayout,
        model: str,
        secret: bytes,
        transports: Sequence[Transport],
        host: str = "127.0.0.1",
        port: int = 0,
        limits: NodeLimits | None = None,
        credentials: PeerCredentials | None = None,
    ) -> None:
        """`transports` best first; they are the node's from here on. `incarnation` is new at every start. `port` is the
        KvPeer service's; 0 takes a free one."""
        if not secret:
            raise ValueError("a node needs the cluster's secret")
        if not transports:
            raise ValueError("a node needs a transport")
        self.name = name
        self.incarnation = incarnation
        self.layout = layout
        self.model = model
        self._layout_digest = layout.digest
        self._layout_fields = MappingProxyType(layout.as_dict())
        self._secret = secret
        self._host = host
        self._port = port
        self._credentials = credentials
        self.limits = limits or NodeLimits()
        self._wires = tuple(_Wire(transport, Turn()) for transport in transports)
        self._meetings = tuple(Turn() for _ in range(_MEETINGS))

        self._board = Board(self.limits.rows, self.limits.blocks_per_row, self.limits.fetches + _MEETINGS)
        #: Guards everything below. Held for microseconds; never while calling a transport, gRPC or a callback.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._leases = LeaseTable(self._board, new_word, self.limits.lease_ttl_s_max)
        self._transfers = TransferTable(Staging(0), self.limits.used_handles)
        self._jobs: dict[str, _Job] = {}
        self._scratch_slots = list(range(self.limits.fetches))
        #: Least recently used first. A name's entry changes only under its wire's turn.
        self._peers: OrderedDict[str, _Peer] = OrderedDict()
        self._refusals: OrderedDict[str, Lane] = OrderedDict()
        self._outcomes: Counter[Outcome] = Counter()
        self._transfer_bytes = 0
        self._releases_in_flight = 0
        self._releases_lost = 0
        #: Reads whose pages are in quarantine, by their staged id. At most one per peer that hangs.
        self._unquiet: dict[str, _Unquiet] = {}
        #: When the housekeeping thread will next look by itself.
        self._looks_at = float("inf")
        self._closed = False

        self._arena: ArenaMap | None = None
        self._server: PeerServer | None = None
        self._on_ended: Callable[[], None] | None = None
        self._housekeeper: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------------ open and close

    def open(
        self,
        *,
        arena: Region,
        arena_map: ArenaMap,
        staging: Region,
        staging_pages: int,
        on_ended: Callable[[], None] | None = None,
    ) -> None:
        """Registers the memory with every transport and starts to listen; `address` is known from here on.

        `on_ended` is called from a thread of this node, without arguments and without a lock held, when leases have
        ended by themselves: `take_ended` will return something. It should only wake the scheduler.
        """
        problem = arena_map.difference(self.layout, arena.nbytes)
        if not problem and staging_pages * self.layout.block_bytes > staging.nbytes:
            problem = f"{staging_pages} pages of {self.layout.block_bytes} bytes in {staging.nbytes} bytes of staging"
        if problem:
            raise ValueError(problem)
        if self._server is not None or self._closed:
            raise RuntimeError("a node is opened once")
        self._arena = arena_map
        self._on_ended = on_ended
        self._transfers = TransferTable(Staging(staging_pages), self.limits.used_handles)
        regions = {
            ARENA: Region(ARENA, arena.address, arena.nbytes, arena.device),
            STAGING: Region(STAGING, staging.address, staging.nbytes, staging.device),
            BOARD: Region(BOARD, self._board.address, self._board.nbytes),
        }
        for wire_ in self._wires:
            wire_.transport.register(regions)
        self._server = PeerServer(
            host=self._host,
            port=self._port,
            secret=self._secret,
            facts=self._facts(arena_map),
            release=self._release_lease,
            extend=self._extend_lease,
            credentials=self._credentials,
            threads=self.limits.server_threads,
        )
        self._housekeeper = threading.Thread(target=self._keep_house, name=f"kv-node-{self.name}", daemon=True)
        self._housekeeper.start()

    def _facts(self, arena_map: ArenaMap) -> PeerFacts:
        return PeerFacts(
            name=self.name,
            incarnation=self.incarnation,
            model=self.model,
            layout=self._layout_fields,
            arena=arena_map,
            board_rows=self._board.rows,
            board_row_bytes=self._board.row_bytes,
            transports={wire_.transport.name: wire_.transport.export() for wire_ in self._wires},
        )

    @property
    def address(self) -> str:
        """host:port of this node's KvPeer service."""
        if self._server is None:
            raise RuntimeError("the node is not open")
        return self._server.address

    def close(self) -> None:
        """Ends every lease and fetch; when it returns, nothing reads or writes the node's memory through it.

        Idempotent. A peer's one-sided read may still be under way: it will find its word gone.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._leases.cancel_all()
            for job in self._jobs.values():
                job.cancel.set()
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: not self._jobs, _CLOSE_GRACE_S):
                log.error("%s: closing with %d fetches that do not stop", self.name, len(self._jobs))
        if self._server is not None:
            self._server.stop(0.5)
        if self._housekeeper is not None:
            self._housekeeper.join()
        for peer in self._known_peers():
            self._forget(peer)
        for wire_ in self._wires:
            with wire_.turn.hold():
                wire_.transport.close()

    @property
    def closed(self) -> bool:
        """True from the moment that `close` is called."""
        return self._closed

    # ------------------------------------------------------------------------------------------------------ the owner

    def offer(
        self, *, transfer_id: str, tenant: str, reader: str, block_ids: Sequence[int], tokens: int, ttl_s: float
    ) -> bytes:
        """Leases finished blocks to `reader` (empty: to any worker of the cluster); the serialized handle.

        The blocks must not change until `take_ended` has returned `transfer_id`. Raises OfferRefused.
        """
        address = self.address
        with self._changed:
            if self._closed:
                raise RuntimeError("the node is closed")
            now = time.monotonic()
            lease = self._leases.offer(now, transfer_id, block_ids, tokens, ttl_s)
            if lease.deadline < self._looks_at:
                self._changed.notify_all()
        handle = Handle(
            transfer_id=transfer_id,
            tenant=tenant,
            model=self.model,
            reader=reader,
            owner=self.name,
            owner_incarnation=self.incarnation,
            owner_address=address,
            row=lease.row,
            word=lease.word,
            tokens=tokens,
            block_ids=tuple(int(block) for block in block_ids),
            layout_digest=self._layout_digest,
            deadline_ms=int((time.time() + lease.deadline - now) * 1000),
        )
        return wire.seal(handle, self._secret)

    def take_ended(self) -> list[str]:
        """Transfer ids whose lease has ended, each exactly once: their blocks may be reused. Call it every step."""
        with self._lock:
            self._leases.expire(time.monotonic())
            return self._leases.take_ended()

    def cancel(self, transfer_id: str) -> bool:
        """Ends a lease from the engine's side; `take_ended` will return it. False when there was none."""
        with self._lock:
            return self._leases.cancel(transfer_id)

    def release(self, handle: bytes) -> bool:
        """Ends the lease of a handle of this node; False when it had ended, or the handle is not (any more) ours."""
        try:
            return self._release_lease(wire.unseal(handle, self._secret))
        except HandleRefused as refused:
            log.warning("%s: release refused: %s", self.name, refused)
            return False

    def _release_lease(self, handle: Handle) -> bool:
        if not self._is_own(handle):
            return False
        with self._lock:
            held = self._leases.release(time.monotonic(), handle.row, handle.word)
        if held:
            self._tell_ended()
        return held

    def _extend_lease(self, handle: Handle, ttl_s: float) -> int | None:
        """The new deadline in ms since the epoch; None when the lease has ended."""
        if not self._is_own(handle):
            return None
        with self._lock:
            now = time.monotonic()
            deadline = self._leases.extend(now, handle.row, handle.word, ttl_s)
        return None if deadline is None else int((time.time() + deadline - now) * 1000)

    def _is_own(self, handle: Handle) -> bool:
        try:
            check_owner(handle, owner=self.name, incarnation=self.incarnation)
        except HandleRefused:
            return False
        return True

    def _keep_house(self) -> None:
        """The node's thread: sleeps until the next deadline, so that a lease ends on time under an idle engine too."""
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                expired = self._leases.expire(now)
                unquiet = list(self._unquiet.items())
                if not expired:
                    self._looks_at = self._next_look(now)
                    self._changed.wait(None if self._looks_at == float("inf") else self._looks_at - now)
            if expired:
                self._tell_ended()
            for read, watched in unquiet:
                self._end_quarantine(read, watched)

    def _next_look(self, now: float) -> float:
        deadline = self._leases.next_deadline()
        look = float("inf") if deadline is None else deadline
        return min(look, now + _LOOK_AT_UNQUIET_S) if self._unquiet else look

    def _end_quarantine(self, read: str, watched: _Unquiet) -> None:
        try:
            with watched.wire.turn.hold(time.monotonic() + _LOOK_AT_UNQUIET_S):
                if not watched.is_quiet():
                    return
        except ReadTimedOut:
            return  # others are reading: look again later
        with self._lock:
            del self._unquiet[read]
            self._transfers.staging.end_quarantine(read)

    def _tell_ended(self) -> None:
        if self._on_ended is not None:
            self._on_ended()

    # ----------------------------------------------------------------------------------------------------- the reader

    def fetch(self, handle: bytes, timeout_s: float, cancel: Cancel | None = None) -> Fetched:
        """Reads a handle's blocks into staging and confirms that the lease held to the end. Raises FetchError.

        Once the owner has been met, its lease is ended there without waiting for it, whatever the outcome; before that
        (most REFUSED, all FULL) it stands. Ends early when `cancel` is set, or `discard` is called with the staged id.
        """
        began = time.monotonic()
        try:
            accepted = self._accept(handle)
            job = self._begin(accepted, cancel or Cancel(), began + timeout_s)
            try:
                peer = self._fetch(accepted, handle, job)
            finally:
                self._end(job)
        except FetchError as error:
            self._count(error.outcome)
            raise
        nbytes = len(accepted.block_ids) * self.layout.block_bytes
        self._count(Outcome.STAGED, nbytes)
        return Fetched(
            staged_id=accepted.staged_id,
            tokens=accepted.tokens,
            transport=peer.wire.transport.name,
            nbytes=nbytes,
            fetch_s=time.monotonic() - began,
        )

    def pages(self, staged_id: str) -> tuple[int, ...]:
        """The staging page of each block, in block order; page i lies at `i * layout.block_bytes`."""
        with self._lock:
            transfer = self._transfers.find(staged_id)
            if transfer is None or transfer.state not in (TransferState.STAGED, TransferState.CLAIMED):
                raise UnknownStaged(staged_id)
            return transfer.pages

    def claim(self, staged_id: str) -> tuple[int, ...]:
        """Like `pages`, for the engine that is about to copy them; empty when nothing is staged under this id.

        From here on only `consumed` gives the pages back: a `discard` from outside that crosses the copy is ignored,
        for the pages would be another fetch's before the copy ends.
        """
        with self._lock:
            transfer = self._transfers.find(staged_id)
            if transfer is None or transfer.state is not TransferState.STAGED:
                return ()
            self._transfers.apply(transfer, TransferEvent.CLAIM)
            return transfer.pages

    def consumed(self, staged_id: str) -> None:
        """The engine has copied what it claimed, or never will. Idempotent; does nothing about unclaimed pages."""
        with self._lock:
            transfer = self._transfers.find(staged_id)
            if transfer is not None and transfer.state is TransferState.CLAIMED:
                self._transfers.apply(transfer, TransferEvent.CONSUME)

    def discard(self, staged_id: str) -> None:
        """Nobody will use this: gives the pages back unless they are claimed, and cancels a fetch still under way.

        Idempotent; unknown ids are ignored.
        """
        with self._lock:
            transfer = self._transfers.find(staged_id)
            if transfer is not None and transfer.state is TransferState.STAGED:
                self._transfers.apply(transfer, TransferEvent.DISCARD)
                return
            job = self._jobs.get(staged_id)
        if job is not None:
            job.cancel.set()

    def _accept(self, raw: bytes) -> Handle:
        try:
            handle = wire.unseal(raw, self._secret)
            check_reader(
                handle,
                reader=self.name,
                model=self.model,
                layout_digest=self._layout_digest,
                block_tokens=self.layout.block_tokens,
            )
        except HandleRefused as refused:
            raise FetchError(Outcome.REFUSED, str(refused)) from refused
        return handle

    def _begin(self, handle: Handle, cancel: Cancel, deadline: float) -> _Job:
        blocks = len(handle.block_ids)
        with self._lock:
            if self._closed:
                raise FetchError(Outcome.FAILED, "the node is closed")
            if not self._scratch_slots:
                raise FetchError(Outcome.FULL, f"{self.limits.fetches} fetches are under way")
            try:
                transfer = self._transfers.begin(handle.staged_id, blocks)
            except AlreadyUsed as used:
                raise FetchError(Outcome.REFUSED, f"the handle of {handle.transfer_id} was used before") from used
            if transfer.state is TransferState.FULL:
                staging = self._transfers.staging
                raise FetchError(Outcome.FULL, f"{blocks} pages; {staging.free} of {staging.pages} are free")
            job = _Job(transfer, cancel, self._scratch_slots.pop(), deadline)
            self._jobs[transfer.staged_id] = job
            return job

    def _end(self, job: _Job) -> None:
        with self._changed:
            del self._jobs[job.transfer.staged_id]
            self._scratch_slots.append(job.scratch_slot)
            self._changed.notify_all()

    def _fetch(self, handle: Handle, raw: bytes, job: _Job) -> _Peer:
        """FETCHING to STAGED. Ended otherwise, it has given its pages back and raises FetchError."""
        peer: _Peer | None = None
        broken = False
        try:
            peer = self._meet(handle.owner, handle.owner_address, handle.owner_incarnation, job.deadline, job.cancel)
            self._read_blocks(peer, handle, job)
            self._settle(job, TransferEvent.WORD_HELD)
        except FetchError as error:
            stale = error.outcome is Outcome.STALE
            self._settle(job, TransferEvent.WORD_GONE if stale else TransferEvent.LOST)
            raise
        except Cancelled as cancelled:
            self._settle(job, TransferEvent.CANCEL)
            raise FetchError(Outcome.FAILED, "cancelled") from cancelled
        except TransportError as error:
            broken = isinstance(error, PeerGone | Unquiesced)
            self._settle(job, TransferEvent.LOST, quiesced=not isinstance(error, Unquiesced))
            if peer is not None and isinstance(error, Unquiesced):
                self._watch(job.transfer.staged_id, peer.wire, error)
            raise FetchError(Outcome.FAILED, str(error)) from error
        except BaseException:
            # A defect. Nothing is known of what still writes where, so the pages stay out of use for good.
            self._settle(job, TransferEvent.LOST, quiesced=False)
            raise
        finally:
            if peer is not None:
                self._tell_owner(peer, raw)
                if broken:
                    self._forget(peer)
        return peer

    def _settle(self, job: _Job, event: TransferEvent, *, quiesced: bool = True) -> None:
        with self._lock:
            # Whoever cancelled will not come for the pages.
            if event is TransferEvent.WORD_HELD and (job.cancel.is_set() or self._closed):
                raise Cancelled
            self._transfers.apply(job.transfer, event, quiesced=quiesced)

    def _watch(self, read: str, wire_: _Wire, error: Unquiesced) -> None:
        """Has the housekeeping thread end the quarantine of `read` when it is over."""
        with self._changed:
            self._unquiet[read] = _Unquiet(wire_, error.is_quiet)
            self._changed.notify_all()

    def _read_blocks(self, peer: _Peer, handle: Handle, job: _Job) -> None:
        """The bytes, then the word. Raises FetchError(STALE) when the word is gone."""
        _check_blocks(handle, peer.facts)
        segments = block_segments(self.layout, peer.facts.arena, handle.block_ids, job.transfer.pages)
        with peer.wire.turn.hold(job.deadline, job.cancel):
            for piece in pieces(segments, self.limits.piece_bytes):
                job.cancel.check()
                self._read(peer, piece, job.deadline)
            job.cancel.check()
            with self._lock:
                self._transfers.apply(job.transfer, TransferEvent.BYTES_IN)
            header = self._read_row(peer, handle.row, job.scratch_slot, job.deadline)
        if header.word != handle.word:
            raise FetchError(Outcome.STALE, f"the lease of {handle.transfer_id} ended before its bytes were in")
        if header.tokens_ready < handle.tokens:
            raise FetchError(Outcome.FAILED, f"{header.tokens_ready} of {handle.tokens} tokens are computed")

    def _read(self, peer: _Peer, segments: Segments, deadline: float) -> None:
        _read(peer.wire.transport, peer.facts.name, segments, deadline)

    def _read_row(self, peer: _Peer, row: int, scratch_slot: int, deadline: float) -> RowHeader:
        return self._row_header(peer.wire.transport, peer.facts, row, scratch_slot, deadline)

    def _row_header(
        self, transport: Transport, facts: PeerFacts, row: int, scratch_slot: int, deadline: float
    ) -> RowHeader:
        remote = row * facts.board_row_bytes
        local = self._board.scratch_offset(scratch_slot)
        _read(transport, facts.name, one_segment(BOARD, remote, BOARD, local, HEADER.size), deadline)
        return self._board.scratch_header(scratch_slot)

    def _tell_owner(self, peer: _Peer, handle: bytes) -> None:
        """Ends the lease at its owner. Off the critical path, and allowed to get lost: then the lease expires."""
        with self._lock:
            room = self._releases_in_flight < self.limits.releases_in_flight
            self._releases_in_flight += room
            self._releases_lost += not room
        if room:
            peer.client.release(handle, self.limits.release_timeout_s, self._owner_told)

    def _owner_told(self, arrived: bool) -> None:
        with self._lock:
            self._releases_in_flight -= 1
            self._releases_lost += not arrived

    def _count(self, outcome: Outcome, nbytes: int = 0) -> None:
        with self._lock:
            self._outcomes[outcome] += 1
            self._transfer_bytes += nbytes

    # -------------------------------------------------------------------------------------------------------- peers

    def connect(self, *, peer: str, address: str) -> Lane:
        """Meets a peer before the first fetch needs it. What keeps the two apart is in the lane's `refusal`."""
        deadline = time.monotonic() + self.limits.meet_timeout_s
        try:
            return self._meet(peer, address, None, deadline, None).lane
        except (FetchError, TransportError) as error:
            refusal = error.detail if isinstance(error, FetchError) else str(error)
        lane = Lane(peer=peer, refusal=refusal)
        with self._lock:
            self._refusals[peer] = lane
            while len(self._refusals) > self.limits.peers:
                self._refusals.popitem(last=False)
        return lane

    def _meet(self, name: str, address: str, incarnation: str | None, deadline: float, cancel: Cancel | None) -> _Peer:
        """The peer, connected; in the given incarnation, if one is given.

        Raises FetchError (REFUSED: never; FAILED: not now; STALE: that incarnation is over), TransportError, Cancelled.
        """
        if (known := self._find_peer(name, incarnation)) is not None:
            return known
        stripe = hash(name) % _MEETINGS
        with self._meetings[stripe].hold(deadline, cancel):
            if (known := self._find_peer(name, incarnation)) is not None:
                return known
            client = PeerClient(address, secret=self._secret, credentials=self._credentials)
            try:
                peer = self._introduce(name, address, incarnation, client, deadline, self.limits.fetches + stripe)
            except BaseException:
                client.close()
                raise
            if peer.client is not client:
                client.close()
            return peer

    def _find_peer(self, name: str, incarnation: str | None) -> _Peer | None:
        with self._lock:
            peer = self._peers.get(name)
            if peer is None or incarnation is None or peer.facts.incarnation != incarnation:
                return None
            self._peers.move_to_end(name)
            return peer

    def _introduce(
        self, name: str, address: str, incarnation: str | None, client: PeerClient, deadline: float, scratch_slot: int
    ) -> _Peer:
        facts = self._describe(name, address, client, deadline)
        if incarnation is not None and facts.incarnation != incarnation:
            raise FetchError(Outcome.STALE, f"{name} has restarted: its incarnation {incarnation} is over")
        if (known := self._find_peer(name, facts.incarnation)) is not None:
            return known
        with self._lock:
            former = self._peers.get(name)
        if former is not None:
            self._forget(former)
        peer = self._wire_up(facts, client, deadline, scratch_slot)
        log.info("%s: met %s, %s at %.2f GB/s", self.name, name, peer.lane.transport, peer.lane.gigabytes_per_s)
        self._forget_oldest()
        return peer

    def _describe(self, name: str, address: str, client: PeerClient, deadline: float) -> PeerFacts:
        timeout_s = min(deadline - time.monotonic(), self.limits.meet_timeout_s)
        try:
            facts = client.describe(self.name, max(timeout_s, 0.001))
        except PeerRefused as error:
            raise FetchError(Outcome.REFUSED, str(error)) from error
        except PeerUnreachable as error:
            raise FetchError(Outcome.FAILED, f"{name} can't be reached: {error}") from error
        if facts.name != name:
            raise FetchError(Outcome.FAILED, f"at {address} there is {facts.name!r}, not {name!r}")
        difference = layout_difference(self._layout_fields, facts.layout)
        if difference:
            raise FetchError(Outcome.REFUSED, f"the layout of {name} differs: {difference}")
        return facts

    def _wire_up(self, facts: PeerFacts, client: PeerClient, deadline: float, scratch_slot: int) -> _Peer:
        """Connects by the first transport that works; `self._peers` knows the peer afterwards."""
        ours = [wire_ for wire_ in self._wires if wire_.transport.name in facts.transports]
        if not ours:
            here = ", ".join(wire_.transport.name for wire_ in self._wires)
            there = ", ".join(sorted(facts.transports))
            raise FetchError(Outcome.REFUSED, f"no transport in common with {facts.name}: {here} here, {there} there")
        failures = []
        for wire_ in ours:
            transport = wire_.transport
            with wire_.turn.hold(deadline):
                try:
                    transport.connect(facts.name, facts.incarnation, facts.transports[transport.name])
                    speed = self._self_test(wire_, facts, scratch_slot, deadline)
                except TransportError as error:
                    transport.disconnect(facts.name)
                    failures.append(f"{transport.name}: {error}")
                    continue
                lane = Lane(peer=facts.name, transport=transport.name, gigabytes_per_s=speed)
                peer = _Peer(facts, client, wire_, lane)
                with self._lock:
                    self._peers[facts.name] = peer
                    self._refusals.pop(facts.name, None)
                return peer
        raise FetchError(Outcome.FAILED, f"{facts.name} can't be read: {'; '.join(failures)}")

    def _self_test(self, wire_: _Wire, facts: PeerFacts, scratch_slot: int, deadline: float) -> float:
        """Reads the peer's board and some of its arena, as every fetch will; GB/s, or 0 without staging room for it.

        The pages are a transfer's that is never confirmed.
        """
        self._row_header(wire_.transport, facts, 0, scratch_slot, deadline)
        wanted = -(-self.limits.self_test_bytes // self.layout.block_bytes)
        name = f"self-test {facts.name} {facts.incarnation} {time.monotonic_ns()}"
        with self._lock:
            blocks = min(wanted, facts.arena.blocks, self._transfers.staging.free)
            transfer = self._transfers.begin(name, blocks)
        try:
            speed = self._measure(wire_.transport, facts, transfer.pages, deadline) if blocks else 0.0
        except Unquiesced as error:
            with self._lock:
                self._transfers.apply(transfer, TransferEvent.LOST, quiesced=False)
            self._watch(name, wire_, error)
            raise
        except BaseException:
            with self._lock:
                self._transfers.apply(transfer, TransferEvent.LOST)
            raise
        with self._lock:
            self._transfers.apply(transfer, TransferEvent.CANCEL)
        return speed

    def _measure(self, transport: Transport, facts: PeerFacts, pages: Sequence[int], deadline: float) -> float:
        segments = block_segments(self.layout, facts.arena, range(len(pages)), pages)
        took_s = []
        for _ in range(3):  # the first wires the connection up
            began = time.perf_counter()
            for piece in pieces(segments, self.limits.piece_bytes):
                _read(transport, facts.name, piece, deadline)
            took_s.append(time.perf_counter() - began)
        return segments.nbytes / min(took_s) / 1e9

    def _forget(self, peer: _Peer) -> None:
        """Disconnects a peer, unless it has been replaced meanwhile."""
        name = peer.facts.name
        with peer.wire.turn.hold():
            with self._lock:
                if self._peers.get(name) is not peer:
                    return
                del self._peers[name]
            peer.wire.transport.disconnect(name)
        peer.client.close()

    def _forget_oldest(self) -> None:
        with self._lock:
            oldest = next(iter(self._peers.values())) if len(self._peers) > self.limits.peers else None
        if oldest is not None:
            self._forget(oldest)

    def _known_peers(self) -> list[_Peer]:
        with self._lock:
            return list(self._peers.values())

    # -------------------------------------------------------------------------------------------------------- status

    def stats(self) -> NodeStats:
        with self._lock:
            leases, transfers = self._leases, self._transfers
            ended = leases.counts.ended
            return NodeStats(
                leases_held=leases.held,
                leased_blocks=leases.held_blocks,
                leases_ended_untaken=leases.ended_untaken,
                leases_offered_total=leases.counts.offered,
                leases_released_total=ended[LeaseState.RELEASED],
                leases_expired_total=ended[LeaseState.EXPIRED],
                leases_cancelled_total=ended[LeaseState.CANCELLED],
                staging_pages=transfers.staging.pages,
                staging_pages_free=transfers.staging.free,
                staged_pages=transfers.held_pages,
                quarantined_pages=transfers.staging.quarantined,
                fetches_in_flight=len(self._jobs),
                fetch_outcomes=MappingProxyType(dict(self._outcomes)),
                transfer_bytes_total=self._transfer_bytes,
                releases_lost_total=self._releases_lost,
                lanes=(*(peer.lane for peer in self._peers.values()), *self._refusals.values()),
            )

    def check_integrity(self) -> None:
        """Raises AssertionError when an invariant does not hold. Needs no meeting under way. For tests."""
        with self._lock:
            self._leases.check_integrity()
            self._transfers.check_integrity()
            assert len(self._scratch_slots) + len(self._jobs) == self.limits.fetches


def _check_blocks(handle: Handle, facts: PeerFacts) -> None:
    if handle.row >= facts.board_rows:
        raise FetchError(Outcome.REFUSED, f"row {handle.row} of a board with {facts.board_rows}")
    if max(handle.block_ids) >= facts.arena.blocks:
        raise FetchError(Outcome.REFUSED, f"block {max(handle.block_ids)} of an arena with {facts.arena.blocks}")


def _read(transport: Transport, peer: str, segments: Segments, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise ReadTimedOut("the deadline passed before all bytes were in")
    transport.read(peer, segments, left)
