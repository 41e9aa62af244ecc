"""The peers a node has met: how they are met, by which transport they are read, and when they are forgotten.

Two nodes meet once, before the first fetch or at it: ask who is there, compare layouts, connect the first transport
that both have and that works, and read some of the peer's memory as every fetch will, which wires the connection up and
measures it. A peer is forgotten when it is gone, when its successor is met, and when too many others were used since.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from kv_transfer.api import FetchError, Lane, NodeLimits, Outcome
from kv_transfer.board import HEADER, Board, RowHeader
from kv_transfer.layout import KvLayout, layout_difference
from kv_transfer.peer import PeerClient, PeerRefused, PeerUnreachable
from kv_transfer.segments import block_segments, one_segment, pieces
from kv_transfer.transport import BOARD, ReadTimedOut, Segments, Transport, TransportError
from kv_transfer.turn import Cancel, Turn
from kv_transfer.wire import PeerFacts
from trust.tls import Tls

log = logging.getLogger(__name__)

#: Meetings with different peers run side by side, up to this many.
MEETINGS = 8


@dataclass(frozen=True, slots=True)
class Wire:
    """A transport and whose turn it is. Whoever calls the transport holds the turn."""

    transport: Transport
    turn: Turn

    def read(self, peer: str, segments: Segments, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ReadTimedOut("the deadline passed before all bytes were in")
        self.transport.read(peer, segments, left)

    def read_row(self, facts: PeerFacts, row: int, board: Board, scratch_slot: int, deadline: float) -> RowHeader:
        """What stands in a row of the peer's board now."""
        there, here = row * facts.board_row_bytes, board.scratch_offset(scratch_slot)
        self.read(facts.name, one_segment(BOARD, there, BOARD, here, HEADER.size), deadline)
        return board.scratch_header(scratch_slot)


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer that was met, its transport connected."""

    facts: PeerFacts
    client: PeerClient
    wire: Wire
    lane: Lane


#: Staging pages to read into and forget: as many as asked for, or fewer.
LendPages = Callable[[Wire, int], AbstractContextManager[Sequence[int]]]


class Roster:
    """Thread-safe. `scratch_slots` are MEETINGS slots of `board` for nobody else."""

    def __init__(
        self,
        *,
        name: str,
        layout: KvLayout,
        transports: Sequence[Transport],
        secret: bytes,
        tls: Tls | None,
        limits: NodeLimits,
        board: Board,
        scratch_slots: range,
        lend_pages: LendPages,
    ) -> None:
        self.wires = tuple(Wire(transport, Turn()) for transport in transports)
        self._name = name
        self._layout = layout
        self._layout_fields = layout.as_dict()
        self._secret = secret
        self._tls = tls
        self._limits = limits
        self._board = board
        self._scratch_slots = scratch_slots
        self._lend_pages = lend_pages
        #: One meeting with a peer at a time.
        self._meetings = tuple(Turn() for _ in range(MEETINGS))
        #: Guards what follows.
        self._lock = threading.Lock()
        #: Least recently used first. An entry is made and removed under its wire's turn.
        self._peers: OrderedDict[str, Peer] = OrderedDict()
        #: What came of meetings that failed, oldest first; a peer is here or there.
        self._refusals: OrderedDict[str, Lane] = OrderedDict()

    @property
    def lanes(self) -> tuple[Lane, ...]:
        with self._lock:
            return (*(peer.lane for peer in self._peers.values()), *self._refusals.values())

    def connect(self, name: str, address: str, deadline: float) -> Lane:
        """Meets a peer; what keeps the two apart is in the lane's `refusal`."""
        try:
            return self.meet(name, address, None, deadline).lane
        except FetchError as error:
            refusal = error.detail
        except TransportError as error:
            refusal = str(error)
        lane = Lane(peer=name, refusal=refusal)
        with self._lock:
            self._refusals[name] = lane
            while len(self._refusals) > self._limits.peers:
                self._refusals.popitem(last=False)
        return lane

    def meet(
        self, name: str, address: str, incarnation: str | None, deadline: float, cancel: Cancel | None = None
    ) -> Peer:
        """The peer: in that incarnation, or, with None, in the one that is there now.

        Raises FetchError (REFUSED: the two can't exchange blocks; STALE: the incarnation is over; FAILED: not now),
        TransportError, Cancelled.
        """
        if (known := self._find(name, incarnation)) is not None:
            return known
        meeting = hash(name) % MEETINGS
        with self._meetings[meeting].hold(deadline, cancel):
            if (known := self._find(name, incarnation)) is not None:
                return known
            client = PeerClient(address, secret=self._secret, tls=self._tls)
            peer = None
            try:
                peer = self._introduce(name, address, incarnation, client, deadline, self._scratch_slots[meeting])
            finally:
                if peer is None or peer.client is not client:
                    client.close()
        self._forget_oldest()
        return peer

    def _find(self, name: str, incarnation: str | None) -> Peer | None:
        with self._lock:
            peer = self._peers.get(name)
            if peer is None or peer.facts.incarnation != incarnation:
                return None
            self._peers.move_to_end(name)
            return peer

    def _introduce(
        self, name: str, address: str, incarnation: str | None, client: PeerClient, deadline: float, scratch_slot: int
    ) -> Peer:
        facts = self._describe(name, address, client, deadline)
        if incarnation is not None and facts.incarnation != incarnation:
            raise FetchError(Outcome.STALE, f"{name} has restarted: its incarnation {incarnation} is over")
        if (known := self._find(name, facts.incarnation)) is not None:
            return known
        with self._lock:
            former = self._peers.get(name)
        if former is not None:
            self.forget(former)
        peer = self._wire_up(facts, client, deadline, scratch_slot)
        log.info("%s met %s: %s at %.2f GB/s", self._name, name, peer.lane.transport, peer.lane.gigabytes_per_s)
        return peer

    def _describe(self, name: str, address: str, client: PeerClient, deadline: float) -> PeerFacts:
        timeout_s = min(deadline - time.monotonic(), self._limits.meet_timeout_s)
        try:
            facts = client.describe(self._name, max(timeout_s, 0.001))
        except PeerRefused as error:
            raise FetchError(Outcome.REFUSED, str(error)) from error
        except PeerUnreachable as error:
            raise FetchError(Outcome.FAILED, f"{name} can't be reached: {error}") from error
        if facts.name != name:
            raise FetchError(Outcome.FAILED, f"at {address} there is {facts.name!r}, not {name!r}")
        difference = layout_difference(self._layout_fields, facts.layout)
        if difference:
            raise FetchError(Outcome.REFUSED, f"the layout of {name} differs: {difference}")
        if self._board.digests_offset and not facts.board_digests_offset:
            raise FetchError(Outcome.REFUSED, f"{name} makes no digests: kv_verify is on here, off there")
        return facts

    def _wire_up(self, facts: PeerFacts, client: PeerClient, deadline: float, scratch_slot: int) -> Peer:
        """Connects by the first transport that works; the peer is in the roster afterwards."""
        common = [wire for wire in self.wires if wire.transport.name in facts.transports]
        if not common:
            here = ", ".join(wire.transport.name for wire in self.wires)
            there = ", ".join(sorted(facts.transports))
            raise FetchError(Outcome.REFUSED, f"no transport in common with {facts.name}: {here} here, {there} there")
        failures = []
        for wire in common:
            with wire.turn.hold(deadline):
                try:
                    lane = self._connect(wire, facts, deadline, scratch_slot)
                except TransportError as error:
                    wire.transport.disconnect(facts.name)
                    failures.append(f"{wire.transport.name}: {error}")
                    continue
                peer = Peer(facts, client, wire, lane)
                with self._lock:
                    self._peers[facts.name] = peer
                    self._refusals.pop(facts.name, None)
                return peer
        raise FetchError(Outcome.FAILED, f"{facts.name} can't be read: {'; '.join(failures)}")

    def _connect(self, wire: Wire, facts: PeerFacts, deadline: float, scratch_slot: int) -> Lane:
        transport = wire.transport
        transport.connect(facts.name, facts.incarnation, facts.transports[transport.name])
        wire.read_row(facts, 0, self._board, scratch_slot, deadline)
        wanted = -(-self._limits.self_test_bytes // self._layout.block_bytes)
        with self._lend_pages(wire, min(wanted, facts.arena.blocks)) as pages:
            speed = self._measure(wire, facts, pages, deadline)
        return Lane(peer=facts.name, transport=transport.lane(facts.name), gigabytes_per_s=speed)

    def _measure(self, wire: Wire, facts: PeerFacts, pages: Sequence[int], deadline: float) -> float:
        """GB/s; 0 when there was no page to read into."""
        segments = block_segments(self._layout, facts.arena, range(len(pages)), pages)
        took_s = []
        for _ in range(3):  # the first wires the connection up
            began = time.perf_counter()
            for piece in pieces(segments, self._limits.piece_bytes):
                wire.read(facts.name, piece, deadline)
            took_s.append(time.perf_counter() - began)
        return segments.nbytes / min(took_s) / 1e9

    def forget(self, peer: Peer) -> None:
        """Disconnects a peer, unless it has been forgotten or replaced meanwhile."""
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
            oldest = next(iter(self._peers.values())) if len(self._peers) > self._limits.peers else None
        if oldest is not None:
            self.forget(oldest)

    def close(self) -> None:
        """Forgets everyone and closes the transports."""
        with self._lock:
            peers = list(self._peers.values())
        for peer in peers:
            self.forget(peer)
        for wire in self.wires:
            with wire.turn.hold():
                wire.transport.close()
