"""The two life cycles of a hand-off: the owner's lease and the reader's transfer. Time is passed in; nothing waits.

The owner's lease. While OFFERED its word stands on the board and its blocks do not change. However it ends, it ends
once, the word goes first, and the engine learns of it once, from `take_ended`; only then may the blocks be reused.

                     .--EXTEND--.
                     v          |
        offer --> OFFERED ------'
                   ^ |------RELEASE--> RELEASED  --.     (the reader has the bytes, or will not come)
          COMPLETE | |------EXPIRE---> EXPIRED   --+--> taken by the engine: blocks and row are free
                   | '------CANCEL---> CANCELLED --'     (the engine gave the request up, or the node closes)
       stream --> STREAMING -------------^
                    | ^
                    '-' PUBLISH, and RELEASE, EXTEND, EXPIRE, which say nothing here

While STREAMING the blocks are being computed, and those that are whole can be read. They belong to the leg that
computes them, so nobody but the engine ends it, and its time begins when it is complete. `withdraw` ends a lease whose
blocks the engine holds anyway: there is nothing to be taken afterwards.

An ended lease absorbs every later event: control messages may be doubled, late or lost. The owner's death needs no
transition: its words die with it, and its incarnation is in every handle.

The reader's transfer. Pages are its own from ROOM on and go back exactly once.

        accept --> ROOM --FOUND--> FETCHING --BYTES_IN--> CONFIRMING --WORD_HELD--> STAGED --CLAIM--> CLAIMED
                    |                 |                     |   '------WORD_GONE--> STALE  |             |
                    '--NONE--> FULL   '-----LOST, CANCEL----'---------------------> FAILED |             |
                                                                                  DISCARD  |    CONSUME  |
                                                                                           v             v
                                                                                       DISCARDED      CONSUMED

LOST is every way for bytes not to arrive (link, deadline, owner gone); CORRUPT, in CONFIRMING, that those which did are
not the owner's, ends as FAILED too. CLAIMED means that the engine is copying: only the engine ends that, so a DISCARD
which crosses it changes nothing.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from types import MappingProxyType
from typing import Protocol

from kv_transfer.api import OfferRefused
from kv_transfer.staging import Staging


class ProtocolError(AssertionError):
    """An event that the life cycle has no answer to: a programming error, with the story so far."""


# ---------------------------------------------------------------------------------------------------------- the owner


class LeaseState(Enum):
    STREAMING = auto()
    OFFERED = auto()
    RELEASED = auto()
    EXPIRED = auto()
    CANCELLED = auto()


class LeaseEvent(Enum):
    #: More blocks are whole; the last of them with COMPLETE. The engine says both, of a lease that streams.
    PUBLISH = auto()
    COMPLETE = auto()
    EXTEND = auto()
    RELEASE = auto()
    EXPIRE = auto()
    CANCEL = auto()


_ENDED = (LeaseState.RELEASED, LeaseState.EXPIRED, LeaseState.CANCELLED)

LEASE_TABLE: Mapping[tuple[LeaseState, LeaseEvent], LeaseState] = MappingProxyType(
    {
        (LeaseState.STREAMING, LeaseEvent.PUBLISH): LeaseState.STREAMING,
        (LeaseState.STREAMING, LeaseEvent.COMPLETE): LeaseState.OFFERED,
        (LeaseState.STREAMING, LeaseEvent.EXTEND): LeaseState.STREAMING,
        (LeaseState.STREAMING, LeaseEvent.RELEASE): LeaseState.STREAMING,
        (LeaseState.STREAMING, LeaseEvent.EXPIRE): LeaseState.STREAMING,
        (LeaseState.STREAMING, LeaseEvent.CANCEL): LeaseState.CANCELLED,
        (LeaseState.OFFERED, LeaseEvent.EXTEND): LeaseState.OFFERED,
        (LeaseState.OFFERED, LeaseEvent.RELEASE): LeaseState.RELEASED,
        (LeaseState.OFFERED, LeaseEvent.EXPIRE): LeaseState.EXPIRED,
        (LeaseState.OFFERED, LeaseEvent.CANCEL): LeaseState.CANCELLED,
        **{(ended, event): ended for ended in _ENDED for event in LeaseEvent},
    }
)


class LeaseBoard(Protocol):
    """What the table needs of kv_transfer.board.Board."""

    rows: int
    blocks_per_row: int

    def publish(
        self, row: int, word: int, block_ids: Sequence[int], tokens: int, digests: Sequence[int] = ()
    ) -> None: ...
    def grow(
        self, row: int, start: int, block_ids: Sequence[int], tokens: int, digests: Sequence[int] = ()
    ) -> None: ...
    def withdraw(self, row: int) -> None: ...
    def word(self, row: int) -> int: ...


@dataclass(slots=True, kw_only=True)
class Lease:
    transfer_id: str
    row: int
    word: int
    #: When it is complete; until then fewer can be read.
    tokens: int
    #: On the board.
    blocks: int
    ttl_s: float
    #: Infinite while it streams.
    deadline: float
    state: LeaseState


@dataclass(slots=True)
class LeaseCounts:
    offered: int = 0
    ended: dict[LeaseState, int] = field(default_factory=lambda: dict.fromkeys(_ENDED, 0))


class LeaseTable:
    """All leases of one owner. A row is taken from offer until the engine has been told of the end, so nothing here
    outgrows the board."""

    def __init__(self, board: LeaseBoard, new_word: Callable[[], int], ttl_s_max: float) -> None:
        self._board = board
        self._new_word = new_word
        self._ttl_s_max = ttl_s_max
        #: By row. The word on the board is the lease's until it has ended, and zero then.
        self._leases: list[Lease | None] = [None] * board.rows
        #: Rows without a lease.
        self._free_rows = list(range(board.rows))
        #: By transfer id: leases not yet taken.
        self._by_id: dict[str, Lease] = {}
        #: Ended leases not yet taken, oldest first.
        self._ended: deque[Lease] = deque()
        #: (deadline, word, row). An entry counts only while it is its lease's current deadline: others are skipped
        #: when they surface, and rebuilt away when they outnumber the leases.
        self._deadlines: list[tuple[float, int, int]] = []
        self.counts = LeaseCounts()

    @property
    def held(self) -> int:
        return len(self._by_id) - len(self._ended)

    @property
    def held_blocks(self) -> int:
        return sum(lease.blocks for lease in self._by_id.values() if lease.state not in _ENDED)

    @property
    def ended_untaken(self) -> int:
        return len(self._ended)

    def offer(
        self,
        now: float,
        transfer_id: str,
        block_ids: Sequence[int],
        tokens: int,
        ttl_s: float,
        digests: Sequence[int] = (),
    ) -> Lease:
        """Puts a lease on finished blocks on the board. Raises OfferRefused, naming the limit."""
        self._check_room(now, transfer_id, len(block_ids))
        lease = self._add(transfer_id, tokens, ttl_s, LeaseState.OFFERED)
        lease.blocks = len(block_ids)
        self._board.publish(lease.row, lease.word, block_ids, tokens, digests)
        self._set_deadline(lease, now + lease.ttl_s)
        return lease

    def stream(self, now: float, transfer_id: str, blocks: int, tokens: int, ttl_s: float) -> Lease:
        """Puts a lease on the board whose blocks, `blocks` in the end, are still to come. Raises OfferRefused."""
        self._check_room(now, transfer_id, blocks)
        lease = self._add(transfer_id, tokens, ttl_s, LeaseState.STREAMING)
        self._board.publish(lease.row, lease.word, (), 0)
        return lease

    def publish(
        self,
        now: float,
        transfer_id: str,
        block_ids: Sequence[int],
        tokens_ready: int,
        digests: Sequence[int] = (),
    ) -> bool:
        """`block_ids`, which begin with those published before, are whole. Complete when that makes all tokens.
        `digests`: of those that are new.

        False when the lease has ended. Raises ProtocolError for a lease that is complete.
        """
        lease = self._by_id.get(transfer_id)
        if lease is None or lease.state in _ENDED:
            return False
        complete = tokens_ready == lease.tokens
        self._step(lease, LeaseEvent.COMPLETE if complete else LeaseEvent.PUBLISH)
        assert lease.blocks <= len(block_ids) <= self._board.blocks_per_row
        assert tokens_ready <= lease.tokens
        self._board.grow(lease.row, lease.blocks, block_ids[lease.blocks :], tokens_ready, digests)
        lease.blocks = len(block_ids)
        if complete:
            self._set_deadline(lease, now + lease.ttl_s)
        return True

    def withdraw(self, transfer_id: str) -> bool:
        """Ends a lease and takes the end at once: the engine holds the blocks itself. False when there was none."""
        lease = self._by_id.get(transfer_id)
        if lease is None:
            return False
        self._end(lease, LeaseEvent.CANCEL)
        self._ended.remove(lease)
        self._take(lease)
        return True

    def find(self, transfer_id: str) -> Lease | None:
        """The lease, until its end is taken."""
        return self._by_id.get(transfer_id)

    def _check_room(self, now: float, transfer_id: str, blocks: int) -> None:
        self.expire(now)
        if transfer_id in self._by_id:
            raise OfferRefused(f"transfer {transfer_id} is offered already")
        if not self._free_rows:
            raise OfferRefused(f"all {self._board.rows} rows of the lease board are taken")
        if not 0 < blocks <= self._board.blocks_per_row:
            raise OfferRefused(f"{blocks} blocks; a row holds 1 to {self._board.blocks_per_row}")

    def _add(self, transfer_id: str, tokens: int, ttl_s: float, state: LeaseState) -> Lease:
        """A lease with a row, on which its word does not stand yet."""
        lease = Lease(
            transfer_id=transfer_id,
            row=self._free_rows.pop(),
            word=self._new_word(),
            tokens=tokens,
            blocks=0,
            ttl_s=min(ttl_s, self._ttl_s_max),
            deadline=math.inf,
            state=state,
        )
        self._leases[lease.row] = lease
        self._by_id[transfer_id] = lease
        self.counts.offered += 1
        return lease

    def extend(self, now: float, row: int, word: int, ttl_s: float) -> float | None:
        """The new deadline, never earlier than the old one; None when the lease has ended."""
        self.expire(now)
        lease = self._find(row, word)
        if lease is None or self._step(lease, LeaseEvent.EXTEND) in _ENDED:
            return None
        if lease.state is LeaseState.OFFERED:
            self._set_deadline(lease, max(lease.deadline, now + min(ttl_s, self._ttl_s_max)))
        return lease.deadline

    def release(self, now: float, row: int, word: int) -> bool:
        """True when this ended the lease; False when it had ended, streams, or never was here."""
        self.expire(now)
        lease = self._find(row, word)
        return lease is not None and self._end(lease, LeaseEvent.RELEASE)

    def cancel(self, transfer_id: str) -> bool:
        lease = self._by_id.get(transfer_id)
        return lease is not None and self._end(lease, LeaseEvent.CANCEL)

    def cancel_all(self) -> None:
        for transfer_id in list(self._by_id):
            self.cancel(transfer_id)

    def expire(self, now: float) -> int:
        """Ends every lease whose deadline has come; how many."""
        expired = 0
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            _, word, row = heapq.heappop(self._deadlines)
            lease = self._find(row, word)
            assert lease is not None
            expired += self._end(lease, LeaseEvent.EXPIRE)
        return expired

    def next_deadline(self) -> float | None:
        """When `expire` will next have something to do."""
        while self._deadlines and not self._is_current(self._deadlines[0]):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def take_ended(self) -> list[str]:
        """Transfer ids whose lease has ended, each once. Their blocks and rows are free from here on."""
        taken = []
        while self._ended:
            lease = self._ended.popleft()
            self._take(lease)
            taken.append(lease.transfer_id)
        return taken

    def _take(self, lease: Lease) -> None:
        self._leases[lease.row] = None
        self._free_rows.append(lease.row)
        del self._by_id[lease.transfer_id]

    def _find(self, row: int, word: int) -> Lease | None:
        lease = self._leases[row] if 0 <= row < len(self._leases) else None
        return lease if lease is not None and lease.word == word else None

    def _step(self, lease: Lease, event: LeaseEvent) -> LeaseState:
        step = LEASE_TABLE.get((lease.state, event))
        if step is None:
            raise ProtocolError(f"lease {lease.transfer_id}: {event.name} in {lease.state.name}")
        lease.state = step
        return step

    def _end(self, lease: Lease, event: LeaseEvent) -> bool:
        """Whether that was its end. The word goes before anybody can hear of it."""
        if lease.state in _ENDED or self._step(lease, event) not in _ENDED:
            return False
        self._board.withdraw(lease.row)
        self.counts.ended[lease.state] += 1
        self._ended.append(lease)
        return True

    def _set_deadline(self, lease: Lease, deadline: float) -> None:
        lease.deadline = deadline
        heapq.heappush(self._deadlines, (deadline, lease.word, lease.row))
        if len(self._deadlines) > 2 * len(self._leases):
            self._deadlines = [entry for entry in self._deadlines if self._is_current(entry)]
            heapq.heapify(self._deadlines)

    def _is_current(self, entry: tuple[float, int, int]) -> bool:
        deadline, word, row = entry
        lease = self._find(row, word)
        return lease is not None and lease.state is LeaseState.OFFERED and lease.deadline == deadline

    def check_integrity(self) -> None:
        for row, lease in enumerate(self._leases):
            held = lease is not None and lease.state not in _ENDED
            assert self._board.word(row) == (lease.word if lease and held else 0), f"row {row}: wrong word"
            if lease is None:
                assert row in self._free_rows, f"row {row} is lost"
                continue
            assert lease.row == row
            assert self._by_id.get(lease.transfer_id) is lease, f"{lease.transfer_id} is not known by its id"
            assert (lease in self._ended) != held, f"{lease.transfer_id}: ended and not to be taken, or the reverse"
            timers = sum(self._is_current(entry) for entry in self._deadlines if entry[2] == row)
            assert bool(timers) == (lease.state is LeaseState.OFFERED), f"{lease.transfer_id}: {timers} timers"
            assert lease.state is not LeaseState.STREAMING or lease.deadline == math.inf
        assert len(self._free_rows) == len(set(self._free_rows)) == len(self._leases) - len(self._by_id)
        assert self.counts.offered == self.held + sum(self.counts.ended.values())


# --------------------------------------------------------------------------------------------------------- the reader


class TransferState(Enum):
    ROOM = auto()
    FETCHING = auto()
    CONFIRMING = auto()
    STAGED = auto()
    CLAIMED = auto()
    CONSUMED = auto()
    DISCARDED = auto()
    FULL = auto()
    STALE = auto()
    FAILED = auto()


class TransferEvent(Enum):
    FOUND = auto()
    NONE = auto()
    BYTES_IN = auto()
    WORD_HELD = auto()
    WORD_GONE = auto()
    CORRUPT = auto()
    LOST = auto()
    CANCEL = auto()
    CLAIM = auto()
    CONSUME = auto()
    DISCARD = auto()


_S, _E = TransferState, TransferEvent

TRANSFER_TABLE: Mapping[tuple[TransferState, TransferEvent], TransferState] = MappingProxyType(
    {
        (_S.ROOM, _E.FOUND): _S.FETCHING,
        (_S.ROOM, _E.NONE): _S.FULL,
        (_S.FETCHING, _E.BYTES_IN): _S.CONFIRMING,
        (_S.FETCHING, _E.WORD_GONE): _S.STALE,  # the owner's new incarnation is known before a byte moves
        (_S.FETCHING, _E.LOST): _S.FAILED,
        (_S.FETCHING, _E.CANCEL): _S.FAILED,
        (_S.CONFIRMING, _E.WORD_HELD): _S.STAGED,
        (_S.CONFIRMING, _E.WORD_GONE): _S.STALE,
        (_S.CONFIRMING, _E.CORRUPT): _S.FAILED,
        (_S.CONFIRMING, _E.LOST): _S.FAILED,
        (_S.CONFIRMING, _E.CANCEL): _S.FAILED,
        (_S.STAGED, _E.CLAIM): _S.CLAIMED,
        (_S.STAGED, _E.DISCARD): _S.DISCARDED,
        (_S.CLAIMED, _E.DISCARD): _S.CLAIMED,
        (_S.CLAIMED, _E.CONSUME): _S.CONSUMED,
    }
)
#: States that hold pages.
_HOLDING = frozenset({_S.FETCHING, _S.CONFIRMING, _S.STAGED, _S.CLAIMED})


class AlreadyUsed(Exception):
    """This handle has been fetched, or is being fetched, here before."""


@dataclass(slots=True, kw_only=True)
class Transfer:
    staged_id: str
    #: Of its own, where its `staged_id` may be tried again.
    read: str
    #: Begun before anybody was sure to want it.
    ahead: bool = False
    state: TransferState = TransferState.ROOM
    pages: tuple[int, ...] = ()
    story: list[str] = field(default_factory=list)


class TransferTable:
    """All transfers of one reader and the staging pages they hold.

    Transfers are known by the id their handle gives them (`Handle.staged_id`), which makes a handle good for one fetch.
    One that is fetched *ahead*, before it is sure to be wanted, is used up only if its pages are consumed.
    """

    def __init__(self, staging: Staging, used_max: int) -> None:
        self.staging = staging
        self._used_max = used_max
        self._reads = itertools.count(1)
        #: Transfers that hold pages, by staged id.
        self._transfers: dict[str, Transfer] = {}
        #: Ids of the handles used most recently, oldest first.
        self._used: OrderedDict[str, None] = OrderedDict()

    @property
    def held_pages(self) -> int:
        return sum(len(transfer.pages) for transfer in self._transfers.values())

    @property
    def ahead_pages(self) -> int:
        return sum(len(transfer.pages) for transfer in self._transfers.values() if transfer.ahead)

    def begin(self, staged_id: str, blocks: int, *, ahead: bool = False) -> Transfer:
        """A transfer in FETCHING with its pages, or in FULL without. Raises AlreadyUsed.

        A handle that met a full staging is not used up. Those fetched ahead have half of the pages at most.
        """
        if staged_id in self._used or staged_id in self._transfers:
            raise AlreadyUsed(staged_id)
        transfer = Transfer(staged_id=staged_id, read=f"{staged_id} {next(self._reads)}", ahead=ahead)
        room = not ahead or 2 * (self.ahead_pages + blocks) <= self.staging.pages
        pages = self.staging.take(blocks) if room else None
        if pages is None:
            self._step(transfer, TransferEvent.NONE)
            return transfer
        transfer.pages = pages
        self._step(transfer, TransferEvent.FOUND)
        self._transfers[staged_id] = transfer
        self._used[staged_id] = None
        while len(self._used) > self._used_max:
            self._used.popitem(last=False)
        return transfer

    def apply(self, transfer: Transfer, event: TransferEvent, *, quiesced: bool = True) -> TransferState:
        """Takes the step; when it ends the transfer, its pages go back, into quarantine unless `quiesced`."""
        state = self._step(transfer, event)
        if state not in _HOLDING:
            del self._transfers[transfer.staged_id]
            if transfer.ahead and state is not TransferState.CONSUMED:
                self._used.pop(transfer.staged_id, None)
            pages, transfer.pages = transfer.pages, ()
            if quiesced:
                self.staging.give_back(pages)
            else:
                self.staging.quarantine(transfer.read, pages)
        return state

    def find(self, staged_id: str) -> Transfer | None:
        """The transfer, while it holds pages."""
        return self._transfers.get(staged_id)

    def _step(self, transfer: Transfer, event: TransferEvent) -> TransferState:
        step = TRANSFER_TABLE.get((transfer.state, event))
        if step is None:
            story = " ".join([*transfer.story, f"{transfer.state.name}? {event.name}"])
            raise ProtocolError(f"transfer {transfer.staged_id}: {story}")
        transfer.story.append(f"{transfer.state.name} {event.name}")
        transfer.state = step
        return step

    def check_integrity(self) -> None:
        held = [page for transfer in self._transfers.values() for page in transfer.pages]
        self.staging.check_integrity(held)
        for staged_id, transfer in self._transfers.items():
            assert transfer.staged_id == staged_id
            assert transfer.state in _HOLDING, f"{staged_id} is over and holds pages"
        assert len(self._used) <= self._used_max
