"""The lease board: registered host memory in which an owner says, without being asked, which leases hold.

A reader reads a lease's blocks and then, by the same transport, its row's word. The word still there means that the
lease held all the while: a seqlock across machines, which costs the owner no instruction.

    row:  word u64 | tokens_ready u32 | blocks_ready u32 | block ids u32 x blocks_per_row | digests u64 x blocks_per_row

(digests only with kv_verify). Write order is the protocol. On offer: ids and digests, counts, then the word. While
blocks are still being computed the row grows: their bytes, then ids and digests, then the counts, so that a reader who
reads the counts first and the ids afterwards finds whole blocks only, whose bytes will not change. On end: the word
goes to zero *first*; only after `withdraw` has returned may anyone reuse the lease's blocks. Between the two lies at
least one hand-over of KvNode's lock, which is the barrier that processors with weaker ordering than x86 need. Words are
random and 63 bits, so a row's next lease, or another process at the same address, never shows a word that an old handle
names.
"""

from __future__ import annotations

import mmap
import secrets
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HEADER = struct.Struct("<QII")
_LINE = 64


@dataclass(frozen=True, slots=True)
class RowHeader:
    """The first bytes of a row, as a reader sees them."""

    word: int
    tokens_ready: int
    blocks_ready: int

    @classmethod
    def parse(cls, raw: bytes) -> RowHeader:
        return cls(*HEADER.unpack(raw))


def new_word() -> int:
    """63 random bits, never zero: zero is a row without a lease."""
    return secrets.randbits(63) or 1


class Board:
    """The rows, and behind them scratch slots of one row each into which this process reads other nodes' rows."""

    def __init__(self, rows: int, blocks_per_row: int, scratch_slots: int, *, digests: bool = False) -> None:
        self.rows = rows
        self.blocks_per_row = blocks_per_row
        ids_end = HEADER.size + 4 * blocks_per_row
        #: In a row; 0 when there are none.
        self.digests_offset = -(-ids_end // 8) * 8 if digests else 0
        used = self.digests_offset + 8 * blocks_per_row if digests else ids_end
        self.row_bytes = -(-used // _LINE) * _LINE
        self.nbytes = self.row_bytes * (rows + scratch_slots)
        # Anonymous pages: zero, page-aligned, and not touched before they are used.
        self._memory: NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, self.nbytes), np.uint8)
        by_row = self._memory.reshape(rows + scratch_slots, self.row_bytes)
        self._words = by_row[:, :8].view(np.uint64)[:, 0]
        self._counts = by_row[:, 8:16].view(np.uint32)
        self._ids = by_row[:, HEADER.size : ids_end].view(np.uint32)
        self._digests = by_row[:, used - 8 * blocks_per_row : used].view(np.uint64) if digests else None
        self._fence = threading.Lock()

    @property
    def address(self) -> int:
        return int(self._memory.ctypes.data)

    def publish(self, row: int, word: int, block_ids: Sequence[int], tokens: int, digests: Sequence[int] = ()) -> None:
        assert self._words[row] == 0, "a row is withdrawn before it is published again"
        self._write(row, 0, block_ids, digests)
        self._counts[row] = (tokens, len(block_ids))
        self._words[row] = word

    def grow(self, row: int, start: int, block_ids: Sequence[int], tokens: int, digests: Sequence[int] = ()) -> None:
        """More of a published row: blocks `start`..., whose bytes are there, and how many tokens that makes."""
        assert self._words[row], "a row that was withdrawn does not grow"
        self._write(row, start, block_ids, digests)
        # Taken and given back twice, a lock is a barrier for stores on every processor.
        for _ in range(2):
            with self._fence:
                pass
        self._counts[row, 1] = start + len(block_ids)
        self._counts[row, 0] = tokens

    def _write(self, row: int, start: int, block_ids: Sequence[int], digests: Sequence[int]) -> None:
        stop = start + len(block_ids)
        self._ids[row, start:stop] = block_ids
        if self._digests is not None:
            self._digests[row, start:stop] = digests

    def withdraw(self, row: int) -> None:
        self._words[row] = 0

    def word(self, row: int) -> int:
        return int(self._words[row])

    def row_offset(self, row: int) -> int:
        return row * self.row_bytes

    def scratch_offset(self, slot: int) -> int:
        return (self.rows + slot) * self.row_bytes

    def scratch_header(self, slot: int) -> RowHeader:
        start = self.scratch_offset(slot)
        return RowHeader.parse(self._memory[start : start + HEADER.size].tobytes())

    def scratch_ids(self, slot: int, start: int, stop: int) -> list[int]:
        ids: list[int] = self._ids[self.rows + slot, start:stop].tolist()
        return ids

    def scratch_digests(self, slot: int, count: int) -> list[int]:
        assert self._digests is not None
        digests: list[int] = self._digests[self.rows + slot, :count].tolist()
        return digests


def id_offset(index: int) -> int:
    """Where in a row the id of its lease's block `index` stands."""
    return HEADER.size + 4 * index
