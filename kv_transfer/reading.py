"""Reading one lease's blocks: those that are whole, as they become whole, and at the end the word.

A handle that names its blocks is read at once. One that does not was made while they were being computed: the row of
the owner's board then says how many are whole and which they are. A look at it costs a read of sixteen bytes, so the
reader looks seldom while a chunk is surely being computed, and often when the next one is due.

With `digests` (kv_verify), what has been read is hashed while the next is waited for, and at the end compared with what
the owner's row says.

However long that takes, it is one lease: the word, read after the last byte, says that nothing was reused since the
first. A word that is gone already says at every look that the rest need not be waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kv_transfer.api import FetchError, Outcome
from kv_transfer.board import Board, RowHeader, id_offset
from kv_transfer.digest import BlockDigests
from kv_transfer.handle import Handle
from kv_transfer.layout import KvLayout
from kv_transfer.roster import Peer
from kv_transfer.segments import block_segments, one_segment, pieces
from kv_transfer.transport import BOARD
from kv_transfer.turn import Cancel

#: Between looks at a row.
_PAUSE_MIN_S = 0.00025
_PAUSE_MAX_S = 0.05
#: Of the time that a chunk takes: how long before it is due to begin to look, and how often then. Half of that is
#: what looking adds to a transfer's end; some ten looks for every chunk are what it costs.
_EARLY = 1 / 16
_OFTEN = 1 / 128
#: A chunk is foretold for so long at most: one stall must not put off what comes at once after it.
_FORETOLD_MAX_S = 1.0
#: A chunk that took longer than the last by more than this factor was held up.
_SLOWER_MAX = 1.25
#: While it is not known how long a chunk takes: the pause grows from this by this factor.
_PAUSE_FIRST_S = 0.001
_PAUSE_GROWS = 1.5


class Pace:
    """When to look again at a row that grows. `now` on one monotonic clock.

    What is foretold is when it grows, not when that was seen: a look that came late, on a machine with much to do,
    must not make all that follow late.
    """

    def __init__(self) -> None:
        #: The last look, and when, about, the row grew for the last time.
        self._looked_at = 0.0
        self._grew_at: float | None = None
        #: The fewest blocks by which it has grown: one look may have found several chunks.
        self._chunk_blocks = 0
        self._block_s: float | None = None
        self._left = 0
        self._pause_s = _PAUSE_FIRST_S

    def looked(self, now: float, blocks: int, left: int) -> None:
        """A look at `now` found so many more, or none; so many are still to come."""
        if blocks:
            self._grew(now, blocks)
            self._left = left
        self._looked_at = now

    def _grew(self, now: float, blocks: int) -> None:
        if self._grew_at is None:
            self._grew_at = now
            return
        self._chunk_blocks = min(self._chunk_blocks or blocks, blocks)
        if self._block_s is None:
            self._block_s, self._grew_at = (now - self._grew_at) / blocks, now
            return
        # Some time after the look before. It may have been as foretold, however late this one is.
        grew_at = min(now, max(self._looked_at, self._grew_at + self._block_s * blocks))
        self._block_s = min((grew_at - self._grew_at) / blocks, self._block_s * _SLOWER_MAX)
        self._grew_at = grew_at

    def pause_s(self, now: float) -> float:
        if self._block_s is None or self._grew_at is None:
            self._pause_s = min(self._pause_s * _PAUSE_GROWS, _PAUSE_MAX_S / 4)
            return self._pause_s
        chunk_s = self._block_s * self._chunk_blocks
        # The last chunk may be a small one.
        due = self._grew_at + min(chunk_s, self._block_s * self._left)
        early = min(due - chunk_s * _EARLY - now, _FORETOLD_MAX_S)
        # The later it is, the less a moment more matters.
        often = max(chunk_s * _OFTEN, (now - due) / 8)
        return max(early, min(max(often, _PAUSE_MIN_S), _PAUSE_MAX_S))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Reads into `pages`, one for each block. Raises FetchError, TransportError, Cancelled."""

    peer: Peer
    handle: Handle
    layout: KvLayout
    pages: Sequence[int]
    board: Board
    #: Of `board`: where the owner's row is read into.
    scratch_slot: int
    piece_bytes: int
    deadline: float
    cancel: Cancel
    #: Called before each piece; it may end the read by raising, and ask the owner for more time.
    look_up: Callable[[], None]
    #: Of the staging pages; None compares nothing.
    digests: BlockDigests | None = None

    def run(self, bytes_in: Callable[[], None]) -> None:
        """Returns when everything is there and the lease held; `bytes_in` is called before that is looked at."""
        self._check()
        pace, ids = Pace(), list(self.handle.block_ids)
        here: list[int] = []
        there: list[int] = []
        read = 0
        while True:
            # Not kept while there is nothing to read; while there is, by what streams for one piece at a time, so that
            # those who are waited for come in between.
            with self.peer.wire.turn.hold(self.deadline, self.cancel):
                if read == len(ids):
                    looked_at = time.monotonic()
                    self._learn_ids(ids)
                    pace.looked(looked_at, len(ids) - read, len(self.pages) - len(ids))
                stop = len(ids) if self.handle.block_ids else min(len(ids), read + self._blocks_in_a_piece)
                self._read(ids[read:stop], self.pages[read:stop])
                read = stop
                if read == len(self.pages):
                    self.cancel.check()
                    bytes_in()
                    if self.digests is not None:
                        there = self._read_digests()
                    self._confirm()
            if self.digests is not None:
                here += self.digests.of(self.pages[len(here) : read])
            if read == len(self.pages):
                self._compare(here, there)
                return
            if read == len(ids):
                now = time.monotonic()
                self.cancel.wait(max(0.0, min(pace.pause_s(now), self.deadline - now)))

    @property
    def _blocks_in_a_piece(self) -> int:
        return max(1, self.piece_bytes // self.layout.block_bytes)

    def _check(self) -> None:
        handle, facts, blocks = self.handle, self.peer.facts, len(self.pages)
        if handle.row >= facts.board_rows:
            raise FetchError(Outcome.REFUSED, f"row {handle.row} of a board with {facts.board_rows}")
        self._check_ids(handle.block_ids, Outcome.REFUSED)
        if blocks > self.board.blocks_per_row or id_offset(blocks) > facts.board_row_bytes:
            raise FetchError(Outcome.REFUSED, f"{blocks} blocks do not fit in a row of a board, here or there")

    def _check_ids(self, ids: Sequence[int], outcome: Outcome) -> None:
        if ids and max(ids) >= self.peer.facts.arena.blocks:
            raise FetchError(outcome, f"block {max(ids)} of an arena with {self.peer.facts.arena.blocks}")

    def _look(self) -> RowHeader:
        """The row as it is now. Raises FetchError(STALE) when it is another lease's, or nobody's."""
        header = self.peer.wire.read_row(self.peer.facts, self.handle.row, self.board, self.scratch_slot, self.deadline)
        if header.word != self.handle.word:
            raise FetchError(Outcome.STALE, f"the lease of {self.handle.transfer_id} ended before its bytes were in")
        return header

    def _learn_ids(self, ids: list[int]) -> None:
        """Adds the ids of the blocks that have become whole."""
        known, ready = len(ids), self._look().blocks_ready
        if ready > len(self.pages):
            raise FetchError(Outcome.FAILED, f"{ready} blocks are there of {len(self.pages)}")
        if ready <= known:
            return
        # After the counts, for what they count was written before them.
        there = self.handle.row * self.peer.facts.board_row_bytes + id_offset(known)
        here = self.board.scratch_offset(self.scratch_slot) + id_offset(known)
        segment = one_segment(BOARD, there, BOARD, here, id_offset(ready) - id_offset(known))
        self.peer.wire.read(self.peer.facts.name, segment, self.deadline)
        new = self.board.scratch_ids(self.scratch_slot, known, ready)
        self._check_ids(new, Outcome.FAILED)
        ids += new

    def _read(self, ids: Sequence[int], pages: Sequence[int]) -> None:
        if not ids:
            return
        for piece in pieces(block_segments(self.layout, self.peer.facts.arena, ids, pages), self.piece_bytes):
            self.look_up()
            self.peer.wire.read(self.peer.facts.name, piece, self.deadline)

    def _read_digests(self) -> list[int]:
        there = self.handle.row * self.peer.facts.board_row_bytes + self.peer.facts.board_digests_offset
        here = self.board.scratch_offset(self.scratch_slot) + self.board.digests_offset
        segment = one_segment(BOARD, there, BOARD, here, 8 * len(self.pages))
        self.peer.wire.read(self.peer.facts.name, segment, self.deadline)
        return self.board.scratch_digests(self.scratch_slot, len(self.pages))

    def _compare(self, here: Sequence[int], there: Sequence[int]) -> None:
        wrong = sum(ours != theirs for ours, theirs in zip(here, there, strict=True))
        if wrong:
            peer, lane = self.peer.facts.name, self.peer.wire.transport.name
            detail = f"{wrong} of {len(there)} blocks of {self.handle.transfer_id} are not as {peer} had them ({lane})"
            raise FetchError(Outcome.CORRUPT, detail)

    def _confirm(self) -> None:
        header = self._look()
        if header.tokens_ready < self.handle.tokens:
            raise FetchError(Outcome.FAILED, f"{header.tokens_ready} of {self.handle.tokens} tokens are computed")
