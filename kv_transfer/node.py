"""KvNode: the memory-owning process's end of every hand-off, as owner and as reader.

As owner it offers leases on blocks of its arena and says when they have ended. As reader it fetches a handle's blocks
into staging pages: check the handle, find room, meet the owner if it is new, read the blocks, read the lease word by
the same transport, compare. Only an equal word makes the pages STAGED; everything else throws them away. What the life
cycles are is in lease.py; this file runs them with threads, a clock and transports.

Threads: `offer`, `take_ended` and the like return at once and are made for an engine's scheduler; `fetch` and `connect`
block their caller. Inside there are the KvPeer server's threads, one that keeps house (ends leases at their deadlines,
and the quarantine of pages when a hung read is over) and one that sends releases; idle, none of them runs.

The owner of the memory (arena, staging) must keep it mapped until `close` has returned.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType

from kv_transfer import wire
from kv_transfer.api import Fetched, FetchError, Lane, NodeLimits, NodeStats, Outcome
from kv_transfer.board import Board, new_word
from kv_transfer.digest import BlockDigests, page_map
from kv_transfer.digest import refusal as digests_refusal
from kv_transfer.handle import Handle, HandleRefused, check_owner, check_reader
from kv_transfer.layout import KvLayout
from kv_transfer.lease import (
    AlreadyUsed,
    Lease,
    LeaseState,
    LeaseTable,
    Transfer,
    TransferEvent,
    TransferState,
    TransferTable,
)
from kv_transfer.peer import PeerClient, PeerServer
from kv_transfer.reading import Reading
from kv_transfer.roster import MEETINGS, Peer, Roster, Wire
from kv_transfer.segments import ArenaMap
from kv_transfer.staging import Staging
from kv_transfer.threads import DaemonThreads
from kv_transfer.transport import (
    ARENA,
    BOARD,
    STAGING,
    PeerGone,
    ReadTimedOut,
    Region,
    Transport,
    TransportError,
    Unquiesced,
)
from kv_transfer.turn import Cancel, Cancelled
from kv_transfer.wire import PeerFacts
from trust.tls import Tls

log = logging.getLogger(__name__)

_CLOSE_GRACE_S = 5.0
_LOOK_AT_UNQUIET_S = 0.25
#: Between the end of a fetch and its release. Whoever waits for the bytes goes first: an engine in this process needs
#: the interpreter for its first step with them, which takes some milliseconds.
_GIVE_WAY_S = 0.01

_EVENTS = {Outcome.STALE: TransferEvent.WORD_GONE, Outcome.CORRUPT: TransferEvent.CORRUPT}


class UnknownStaged(KeyError):
    """Nothing is staged under this id: never was, or it was discarded."""


@dataclass(slots=True, eq=False)
class _Job:
    """One fetch under way."""

    transfer: Transfer
    cancel: Cancel
    #: Where the owner's row is read into.
    scratch_slot: int
    deadline: float
    #: When the owner is asked for more time.
    extend_at: float


@dataclass(frozen=True, slots=True)
class _Unquiet:
    """A failed read that may still be writing: into pages, which are in quarantine, or into a scratch slot."""

    wire: Wire
    is_quiet: Callable[[], bool]
    scratch_slot: int | None = None


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
        tls: Tls | None = None,
        verify: bool = False,
    ) -> None:
        """`transports` best first; they are the node's from here on. `incarnation` is new at every start. `port` is the
        KvPeer service's; 0 takes a free one. `verify` makes digests of what is offered and compares what is fetched
        with those of its owner, which must make them too (digest.py)."""
        if not secret:
            raise ValueError("a node needs the cluster's secret")
        if not transports:
            raise ValueError("a node needs a transport")
        self.name = name
        self.incarnation = incarnation
        self.layout = layout
        self.model = model
        self.limits = limits or NodeLimits()
        self._layout_digest = layout.digest
        self._secret = secret
        self._host = host
        self._port = port
        self._tls = tls
        fetches = self.limits.fetches
        self._verify = verify
        self._board = Board(
            self.limits.rows, self.limits.blocks_per_row, scratch_slots=fetches + MEETINGS, digests=verify
        )
        self._roster = Roster(
            name=name,
            layout=layout,
            transports=transports,
            secret=secret,
            tls=tls,
            limits=self.limits,
            board=self._board,
            scratch_slots=range(fetches, fetches + MEETINGS),
            lend_pages=self._lend_pages,
        )
        #: Ends leases at their owners, so that no fetch waits for it.
        self._courier = DaemonThreads(1, f"kv-courier-{name}")
        #: Guards everything below. Held for microseconds; never while calling a transport, gRPC or a callback.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._leases = LeaseTable(self._board, new_word, self.limits.lease_ttl_s_max)
        self._transfers = TransferTable(Staging(0), self.limits.used_handles)
        self._jobs: dict[str, _Job] = {}
        self._scratch_slots = list(range(fetches))
        self._self_tests = itertools.count(1)
        self._outcomes: Counter[Outcome] = Counter()
        self._transfer_bytes = 0
        self._releases_in_flight = 0
        self._releases_lost = 0
        #: By staged id; at most one for each peer that hangs.
        self._unquiet: dict[str, _Unquiet] = {}
        #: When the housekeeping thread will next look by itself.
        self._looks_at = float("inf")
        self._closed = False

        #: Of arena and staging; None unless they are verified.
        self._arena_digests: BlockDigests | None = None
        self._page_digests: BlockDigests | None = None
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
        if not problem and self._verify:
            problem = digests_refusal((arena, staging))
        if problem:
            raise ValueError(problem)
        if self._server is not None or self._closed:
            raise RuntimeError("a node is opened once")
        self._on_ended = on_ended
        self._transfers = TransferTable(Staging(staging_pages), self.limits.used_handles)
        regions = {
            ARENA: Region(ARENA, arena.address, arena.nbytes, arena.device),
            STAGING: Region(STAGING, staging.address, staging.nbytes, staging.device),
            BOARD: Region(BOARD, self._board.address, self._board.nbytes),
        }
        if self._verify:
            self._arena_digests = BlockDigests(arena, self.layout, arena_map)
            self._page_digests = BlockDigests(staging, self.layout, page_map(self.layout, staging_pages))
        for wire_ in self._roster.wires:
            wire_.transport.register(regions)
        self._server = PeerServer(
            host=self._host,
            port=self._port,
            secret=self._secret,
            facts=self._facts(arena_map),
            release=self._release_lease,
            extend=self._extend_lease,
            tls=self._tls,
            threads=self.limits.server_threads,
        )
        self._housekeeper = threading.Thread(target=self._keep_house, name=f"kv-node-{self.name}", daemon=True)
        self._housekeeper.start()

    def _facts(self, arena_map: ArenaMap) -> PeerFacts:
        return PeerFacts(
            name=self.name,
            incarnation=self.incarnation,
            model=self.model,
            layout=self.layout.as_dict(),
            arena=arena_map,
            board_rows=self._board.rows,
            board_row_bytes=self._board.row_bytes,
            board_digests_offset=self._board.digests_offset,
            transports={wire_.transport.name: wire_.transport.export() for wire_ in self._roster.wires},
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
        self._courier.shutdown()
        self._roster.close()

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
        digests = self._digests_of(block_ids)
        with self._changed:
            self._check_open()
            now = time.monotonic()
            lease = self._leases.offer(now, transfer_id, block_ids, tokens, ttl_s, digests)
            self._look_in_time(lease)
        return self._seal(lease, tenant, reader, tuple(int(block) for block in block_ids))

    def stream(self, *, transfer_id: str, tenant: str, reader: str, tokens: int, ttl_s: float) -> bytes:
        """Leases blocks that are still being computed; the handle, good for all `tokens` of them. Raises OfferRefused.

        What is whole is told with `publish`, until everything is; from then on it is as if it had been offered, and
        `ttl_s` begins to count. Before that nobody but the engine ends the lease, and it must, by `withdraw`, before it
        lets anything else into the blocks it has published: because the request was aborted, preempted or failed.
        """
        blocks = -(-tokens // self.layout.block_tokens)
        with self._lock:
            self._check_open()
            lease = self._leases.stream(time.monotonic(), transfer_id, blocks, tokens, ttl_s)
        return self._seal(lease, tenant, reader, ())

    def publish(self, transfer_id: str, block_ids: Sequence[int], tokens_ready: int) -> bool:
        """The KV of a stream's first `tokens_ready` tokens is in `block_ids`, in memory, and will not change.

        `block_ids` may go on beyond that, and begin as they did before. With all the tokens, the stream is complete.
        False when the lease has ended: the node is closed, or the stream was withdrawn.
        """
        with self._lock:
            lease = self._leases.find(transfer_id)
        if lease is None:
            return False
        tokens = self.layout.block_tokens
        whole = tokens_ready // tokens if tokens_ready < lease.tokens else -(-tokens_ready // tokens)
        # Only this caller adds blocks to the lease, so they can be hashed without the lock.
        digests = self._digests_of(block_ids[lease.blocks : whole])
        with self._changed:
            published = self._leases.publish(time.monotonic(), transfer_id, block_ids[:whole], tokens_ready, digests)
            self._look_in_time(lease)
        return published

    def withdraw(self, transfer_id: str) -> bool:
        """Ends a lease whose blocks the engine holds itself: they may be reused at once, and `take_ended` will not
        name it. False when there was none."""
        with self._lock:
            return self._leases.withdraw(transfer_id)

    def _digests_of(self, block_ids: Sequence[int]) -> list[int]:
        return self._arena_digests.of(block_ids) if self._arena_digests is not None else []

    def _check_open(self) -> None:
        if self._closed or self._server is None:
            raise RuntimeError("the node is not open")

    def _look_in_time(self, lease: Lease) -> None:
        if lease.deadline < self._looks_at:
            self._changed.notify_all()

    def _seal(self, lease: Lease, tenant: str, reader: str, block_ids: tuple[int, ...]) -> bytes:
        handle = Handle(
            transfer_id=lease.transfer_id,
            tenant=tenant,
            model=self.model,
            reader=reader,
            owner=self.name,
            owner_incarnation=self.incarnation,
            owner_address=self.address,
            row=lease.row,
            word=lease.word,
            tokens=lease.tokens,
            block_ids=block_ids,
            layout_digest=self._layout_digest,
            deadline_ms=_epoch_ms(lease.deadline),
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
        return None if deadline is None else _epoch_ms(deadline)

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
            if watched.scratch_slot is not None:
                self._scratch_slots.append(watched.scratch_slot)

    def _tell_ended(self) -> None:
        if self._on_ended is None:
            return
        try:
            self._on_ended()
        except Exception:  # leases must go on ending, also for a scheduler that is gone
            log.exception("%s: on_ended failed", self.name)

    # ----------------------------------------------------------------------------------------------------- the reader

    def fetch(self, handle: bytes, timeout_s: float, cancel: Cancel | None = None, *, ahead: bool = False) -> Fetched:
        """Reads a handle's blocks into staging and confirms that the lease held to the end. Raises FetchError.

        Blocks that are still being computed are read as they become whole. Ends early when `cancel` is set, or
        `discard` is called with the staged id. The owner's lease is ended there without waiting for it, whatever the
        outcome, but for a handle that is refused for what it says, and for FULL.

        `ahead`: nobody has said yet that the blocks will be wanted. Then there is room for it only while such fetches
        have less than half of the staging pages; and if it fails, or is discarded, the handle is as good as before: the
        owner is told nothing and it may be fetched again.
        """
        began = time.monotonic()
        try:
            accepted = self._accept(handle)
            job = self._begin(accepted, cancel or Cancel(), began + timeout_s, ahead)
            try:
                peer = self._fetch(accepted, handle, job)
            finally:
                self._end(job)
        except FetchError as error:
            self._count(error.outcome)
            raise
        nbytes = self._blocks(accepted) * self.layout.block_bytes
        self._count(Outcome.STAGED, nbytes)
        return Fetched(
            staged_id=accepted.staged_id,
            tokens=accepted.tokens,
            transport=peer.lane.transport,
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
        with self._changed:
            transfer = self._transfers.find(staged_id)
            if transfer is not None and transfer.state is TransferState.STAGED:
                self._transfers.apply(transfer, TransferEvent.DISCARD)
                self._changed.notify_all()
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

    def _blocks(self, handle: Handle) -> int:
        return -(-handle.tokens // self.layout.block_tokens)

    def _begin(self, handle: Handle, cancel: Cancel, deadline: float, ahead: bool) -> _Job:
        blocks = self._blocks(handle)
        with self._changed:
            while True:
                if self._closed:
                    raise FetchError(Outcome.FAILED, "the node is closed")
                if not self._scratch_slots:
                    raise FetchError(Outcome.FULL, f"{self.limits.fetches} fetches are under way")
                try:
                    transfer = self._transfers.begin(handle.staged_id, blocks, ahead=ahead)
                except AlreadyUsed as used:
                    if self._wait_for_ahead(handle.staged_id, deadline):
                        continue
                    raise FetchError(Outcome.REFUSED, f"the handle of {handle.transfer_id} was used before") from used
                if transfer.state is not TransferState.FULL:
                    break
                if not self._wait_for_pages(deadline):
                    staging = self._transfers.staging
                    raise FetchError(Outcome.FULL, f"{blocks} pages; {staging.free} of {staging.pages} are free")
            extend_at = time.monotonic() + self.limits.extend_after_s
            job = _Job(transfer, cancel, self._scratch_slots.pop(), deadline, extend_at)
            self._jobs[transfer.staged_id] = job
            return job

    def _wait_for_ahead(self, staged_id: str, deadline: float) -> bool:
        """Until what was fetched ahead under this id, and given up, is gone; False when there is nothing like that."""
        transfer = self._transfers.find(staged_id)
        if transfer is None or not transfer.ahead or transfer.state is TransferState.CLAIMED:
            return False
        if not self._changed.wait(deadline - time.monotonic()):
            raise FetchError(Outcome.FAILED, f"{transfer.read} does not end")
        return True

    def _wait_for_pages(self, deadline: float) -> bool:
        """Until a fetch that was cancelled has given its pages back; False when none will."""
        if not any(job.cancel.is_set() for job in self._jobs.values()):
            return False
        return self._changed.wait(deadline - time.monotonic())

    def _fetch(self, handle: Handle, raw: bytes, job: _Job) -> Peer:
        """FETCHING to STAGED. Ended otherwise, it has given its pages back and raises FetchError."""
        peer: Peer | None = None
        staged = broken = False
        try:
            peer = self._roster.meet(
                handle.owner, handle.owner_address, handle.owner_incarnation, job.deadline, job.cancel
            )
            self._reading(peer, handle, raw, job).run(lambda: self._bytes_in(job))
            self._settle(job, TransferEvent.WORD_HELD)
            staged = True
        except FetchError as error:
            self._settle(job, _EVENTS.get(error.outcome, TransferEvent.LOST))
            if error.outcome is Outcome.CORRUPT:
                log.error("%s: %s", self.name, error.detail)
            raise
        except Cancelled as cancelled:
            self._settle(job, TransferEvent.CANCEL)
            raise FetchError(Outcome.FAILED, "cancelled") from cancelled
        except TransportError as error:
            broken = isinstance(error, PeerGone | Unquiesced)
            if peer is not None and isinstance(error, Unquiesced):
                self._abandon(job, _Unquiet(peer.wire, error.is_quiet, job.scratch_slot))
            else:
                self._settle(job, TransferEvent.LOST)
            raise FetchError(Outcome.FAILED, str(error)) from error
        except BaseException:
            # A defect. Nothing is known of what still writes where, so the memory stays out of use for good.
            self._abandon(job, None)
            raise
        finally:
            if staged or not job.transfer.ahead:
                self._tell_owner(handle, raw, peer)
            if peer is not None and broken:
                self._roster.forget(peer)
        return peer

    def _reading(self, peer: Peer, handle: Handle, raw: bytes, job: _Job) -> Reading:
        return Reading(
            peer=peer,
            handle=handle,
            layout=self.layout,
            pages=job.transfer.pages,
            board=self._board,
            scratch_slot=job.scratch_slot,
            piece_bytes=self.limits.piece_bytes,
            deadline=job.deadline,
            cancel=job.cancel,
            look_up=lambda: self._look_up(peer, raw, job),
            digests=self._page_digests,
        )

    def _look_up(self, peer: Peer, raw: bytes, job: _Job) -> None:
        """Between two pieces. A fetch that takes long, as in a queue of others, asks for all the time it may take."""
        job.cancel.check()
        now = time.monotonic()
        if now >= job.extend_at:
            job.extend_at = now + self.limits.extend_after_s
            with suppress(RuntimeError):  # no thread: as if it got lost
                self._courier.submit(peer.client.extend, raw, job.deadline - now, self.limits.release_timeout_s)

    def _bytes_in(self, job: _Job) -> None:
        with self._lock:
            self._transfers.apply(job.transfer, TransferEvent.BYTES_IN)

    def _settle(self, job: _Job, event: TransferEvent) -> None:
        """The fetch's last step: nothing of it writes any more."""
        with self._lock:
            # Whoever cancelled will not come for the pages.
            if event is TransferEvent.WORD_HELD and (job.cancel.is_set() or self._closed):
                raise Cancelled
            self._transfers.apply(job.transfer, event)
            self._scratch_slots.append(job.scratch_slot)

    def _abandon(self, job: _Job, unquiet: _Unquiet | None) -> None:
        """The fetch's last step when something of it may still write. The housekeeping thread will see when not."""
        with self._changed:
            self._transfers.apply(job.transfer, TransferEvent.LOST, quiesced=False)
            if unquiet is not None:
                self._unquiet[job.transfer.read] = unquiet
                self._changed.notify_all()

    def _end(self, job: _Job) -> None:
        with self._changed:
            del self._jobs[job.transfer.staged_id]
            self._changed.notify_all()

    def _tell_owner(self, handle: Handle, raw: bytes, peer: Peer | None) -> None:
        """Ends the lease at its owner. Off the critical path, and allowed to get lost: then the lease expires."""
        with self._lock:
            room = self._releases_in_flight < self.limits.releases_in_flight
            self._releases_in_flight += room
            self._releases_lost += not room
        if not room:
            return
        try:
            self._courier.submit(self._release_there, handle, raw, peer, time.monotonic() + _GIVE_WAY_S)
        except RuntimeError:  # the node was closed before this fetch came to its end, or there is no thread
            self._owner_told(False)

    def _release_there(self, handle: Handle, raw: bytes, peer: Peer | None, due: float) -> None:
        time.sleep(max(0.0, due - time.monotonic()))
        try:
            if peer is not None and peer.client.release(raw, self.limits.release_timeout_s, self._owner_told):
                return
            # Never met, or forgotten since the read failed; it may be within reach of a call.
            client = PeerClient(handle.owner_address, secret=self._secret, tls=self._tls)
            client.release(raw, self.limits.release_timeout_s, self._owner_told)
        except Exception:
            log.exception("%s: the release of %s was not sent", self.name, handle.transfer_id)
            self._owner_told(False)
        else:
            client.close()

    def _owner_told(self, arrived: bool) -> None:
        with self._lock:
            self._releases_in_flight -= 1
            self._releases_lost += not arrived

    def _count(self, outcome: Outcome, nbytes: int = 0) -> None:
        with self._lock:
            self._outcomes[outcome] += 1
            self._transfer_bytes += nbytes

    def connect(self, *, peer: str, address: str) -> Lane:
        """Meets a peer before the first fetch needs it. What keeps the two apart is in the lane's `refusal`."""
        return self._roster.connect(peer, address, time.monotonic() + self.limits.meet_timeout_s)

    @contextmanager
    def _lend_pages(self, wire_: Wire, wanted: int) -> Iterator[Sequence[int]]:
        """Pages for a self-test: those of a transfer that is never confirmed. Most are left for fetches."""
        with self._lock:
            count = min(wanted, self._transfers.staging.free // 4)
            transfer = self._transfers.begin(f"self-test {next(self._self_tests)}", count)
        try:
            yield transfer.pages
        except Unquiesced as error:
            with self._changed:
                self._transfers.apply(transfer, TransferEvent.LOST, quiesced=False)
                self._unquiet[transfer.read] = _Unquiet(wire_, error.is_quiet)
                self._changed.notify_all()
            raise
        except BaseException:
            with self._lock:
                self._transfers.apply(transfer, TransferEvent.LOST)
            raise
        with self._lock:
            self._transfers.apply(transfer, TransferEvent.CANCEL)

    # -------------------------------------------------------------------------------------------------------- status

    def stats(self) -> NodeStats:
        lanes = self._roster.lanes
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
                lanes=lanes,
            )

    def check_integrity(self) -> None:
        """Raises AssertionError when an invariant does not hold. Needs no meeting under way. For tests."""
        with self._lock:
            self._leases.check_integrity()
            self._transfers.check_integrity()
            assert len(set(self._scratch_slots)) == len(self._scratch_slots), "two fetches with one scratch slot"


def _epoch_ms(deadline: float) -> int:
    """Of a moment on the monotonic clock; 0 for never."""
    return 0 if deadline == math.inf else int((time.time() + deadline - time.monotonic()) * 1000)
