"""KV memory whose bytes are the simulated model.

**Chain.** Position i of a sequence has a 64-bit value chained from the one before and the token there:

    chain(i) = chain(i-1) * M + hash(token(i))   mod 2^64,   chain(-1) = hash(model revision, cache salt)

A chunk's values are a cumulative sum in this form, so numpy computes them at once, and every split into chunks gives
the same values. Nothing keeps them but the KV memory: each step reads chain(i-1) back from there.

**Bytes.** A token's slot is `bytes_per_token` long, its block's slots follow each other, block after block. Of a
slot's 64-bit words, one in `stamp_step` is a *stamp*: stamp k holds chain XOR pattern(k), pattern(0) = 0. Up to 4 KiB
per token every word is a stamp, so a wrong byte anywhere shows. Up to 64 KiB every page has one, and past that every
64 KiB: memory that a real model would fill is then mostly never touched, and still no run of bytes that long can be
missing or misplaced unseen.

**Token.** The token after position p is a function of chain(p) and of one word out of every 16 positions before it,
all as they stand in memory at that step. Which word changes with p, so a long answer reads everything. What came over
a transport is compared whole with what its tokens should have made, once, when it is admitted; a difference taints
the sequence's every token. Thus a block that is missing, stale, misplaced, corrupt or written under another salt makes
wrong tokens, and right memory makes the same tokens whatever the block size, batch, chunking and bytes per token.
"""

from __future__ import annotations

import hashlib
import mmap
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

_MASK = (1 << 64) - 1
_MULTIPLIER = 0xD1342543DE82EF95
_PROBE_STRIDE = 16
#: Chain values computed at once; longer runs go in pieces.
_PIECE = 4096
#: What a block holds after it left one owner for another.
POISON = 0xDEADDEADDEADDEAD


def lazy_bytes(nbytes: int, *, sparse: bool) -> NDArray[np.uint8]:
    """Zeroed memory that costs nothing until it is written, also where it exceeds the machine's. `sparse`: a write
    shall take no more than the page it falls in."""
    noreserve = 0x4000 if sys.platform == "linux" else 0
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve)
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_NOHUGEPAGE if sparse else mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


def mix(values: U64) -> U64:
    """Every output bit depends on every input bit (the finalizer of SplitMix64). Returns a new array."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def mix_int(value: int) -> int:
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _stream(label: str, count: int) -> U64:
    """A fixed pseudo-random sequence per label, the same on every machine."""
    start = np.uint64(int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little"))
    return mix(start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


class Chain:
    """The chain's arithmetic for one model revision."""

    def __init__(self, revision: str, vocab_size: int) -> None:
        self._key = hashlib.sha256(revision.encode()).digest()
        self._token_hash = _stream("token", vocab_size)
        powers = np.full(_PIECE + 1, _MULTIPLIER, dtype=np.uint64)
        inverses = np.full(_PIECE + 1, pow(_MULTIPLIER, -1, 1 << 64), dtype=np.uint64)
        powers[0] = inverses[0] = 1
        self._powers = np.multiply.accumulate(powers)
        self._inverses = np.multiply.accumulate(inverses)

    def check_tokens(self, token_ids: NDArray[np.uint32]) -> None:
        """Raises ValueError with the first token id that the vocabulary lacks."""
        outside = token_ids >= len(self._token_hash)
        if outside.any():
            raise ValueError(str(token_ids[outside.argmax()]))

    def seed(self, cache_salt: str) -> int:
        """chain(-1)."""
        salted = hashlib.blake2b(cache_salt.encode(), digest_size=8, key=self._key)
        return int.from_bytes(salted.digest(), "little")

    def run(self, before: int, token_ids: NDArray[np.uint32]) -> U64:
        """chain(i)... for tokens i..., given chain(i-1)."""
        hashes = self._token_hash[token_ids]
        out = np.empty_like(hashes)
        for start in range(0, len(hashes), _PIECE):
            piece = hashes[start : start + _PIECE]
            sums = np.cumsum(piece * self._inverses[1 : len(piece) + 1], dtype=np.uint64)
            sums += np.array([before], dtype=np.uint64)
            np.multiply(sums, self._powers[1 : len(piece) + 1], out=out[start : start + len(piece)])
            before = int(out[start + len(piece) - 1])
        return out

    def next(self, before: U64, token_ids: I64) -> U64:
        """One step of many chains."""
        return before * np.uint64(_MULTIPLIER) + self._token_hash[token_ids]


class ChainMemory:
    """The KV arena of one engine. Whoever calls says which blocks; this class knows what bytes mean."""

    def __init__(self, *, blocks: int, block_tokens: int, bytes_per_token: int) -> None:
        if bytes_per_token < 8 or bytes_per_token % 8:
            raise ValueError(f"kv_bytes_per_token must be a multiple of 8, got {bytes_per_token}")
        self.block_tokens = block_tokens
        self.block_bytes = block_tokens * bytes_per_token
        self._slot_words = bytes_per_token // 8
        self._stamp_step = 1 if bytes_per_token <= 4 << 10 else 512 if bytes_per_token <= 64 << 10 else 8192
        self.arena = self.pages(blocks)
        self._flat = self.arena.view(np.uint64)
        self._stamps = self.stamps_of(self.arena)
        self._pattern = _stream("pattern", self._stamps.shape[2])
        self._pattern[0] = 0
        self._weights = np.empty(0, dtype=np.uint64)
        self._scratch = np.empty((block_tokens, self._stamps.shape[2]), dtype=np.uint64)

    def pages(self, count: int) -> NDArray[np.uint8]:
        """Memory for `count` blocks, of the arena or of staging."""
        return lazy_bytes(count * self.block_bytes, sparse=self._stamp_step > 1)

    def stamps_of(self, memory: NDArray[np.uint8]) -> U64:
        """The stamps of whole blocks that lie in `memory` one after the other: [block, slot, stamp]."""
        words = memory.view(np.uint64).reshape(-1, self.block_tokens, self._slot_words)
        return words[:, :, :: self._stamp_step]

    def scrub(self, blocks: Sequence[int]) -> None:
        """Leaves nothing of a former owner to read or to send."""
        for block in blocks:
            self._stamps[block] = np.uint64(POISON)

    def write(self, blocks: Sequence[int], start: int, values: U64) -> None:
        """Writes positions `start`... of a sequence that lies in `blocks`."""
        size = self.block_tokens
        column = values[:, None]
        done = 0
        while done < len(values):
            index, slot = divmod(start + done, size)
            count = min(size - slot, len(values) - done)
            np.bitwise_xor(
                column[done : done + count], self._pattern, out=self._stamps[blocks[index], slot : slot + count]
            )
            done += count

    def write_each(self, blocks: I64, slots: I64, values: U64) -> None:
        """Writes one position in each of many blocks."""
        self._stamps[blocks, slots] = values[:, None] ^ self._pattern

    def read_each(self, blocks: I64, slots: I64) -> U64:
        return self._stamps[blocks, slots, 0]

    def read(self, blocks: Sequence[int], position: int) -> int:
        index, slot = divmod(position, self.block_tokens)
        return int(self._stamps[blocks[index], slot, 0])

    def copy_in(self, blocks: Sequence[int], staging: U64, pages: Sequence[int]) -> None:
        """Takes whole blocks from staging memory (`stamps_of` it)."""
        for block, page in zip(blocks, pages, strict=True):
            self._stamps[block] = staging[page]

    def difference(self, blocks: Sequence[int], start: int, expected: U64) -> int:
        """Zero when positions `start`... hold exactly what the `expected` values make, else a hash of what differs."""
        size = self.block_tokens
        taint = 0
        done = 0
        while done < len(expected):
            index, slot = divmod(start + done, size)
            count = min(size - slot, len(expected) - done)
            held = self._stamps[blocks[index], slot : slot + count]
            right = self._scratch[:count]
            np.bitwise_xor(expected[done : done + count, None], self._pattern, out=right)
            if not np.array_equal(held, right):
                found = hashlib.blake2b((held ^ right).tobytes(), digest_size=8, salt=index.to_bytes(16, "little"))
                taint = (taint ^ int.from_bytes(found.digest(), "little")) or 1
            done += count
        return taint

    def attend(self, tables: NDArray[np.int32], rows: I64, positions: I64) -> U64:
        """What the model reads to choose the token after `positions[i]` of the sequence whose blocks are in
        `tables[rows[i]]`: that position itself, and one stamp out of every stride of 16 before it."""
        choice = mix(positions.astype(np.uint64))
        offset_in_stride = (choice % np.uint64(_PROBE_STRIDE)).astype(np.int64)
        stamp = ((choice >> np.uint64(32)) % np.uint64(len(self._pattern))).astype(np.int64)

        strides = positions // _PROBE_STRIDE
        ends = np.cumsum(strides)
        total = int(ends[-1])
        owner = np.repeat(np.arange(len(rows)), strides)
        stride = np.arange(total) - (ends - strides)[owner]
        probed = stride * _PROBE_STRIDE + offset_in_stride[owner]
        index = probed // self.block_tokens
        word = probed - index * self.block_tokens
        word += tables[rows[owner], index].astype(np.int64) * self.block_tokens
        word *= self._slot_words
        word += (stamp * self._stamp_step)[owner]
        values = self._flat[word]
        values ^= self._pattern[stamp][owner]
        values *= self._weights_for(int(strides.max()))[stride]
        sums = np.zeros(total + 1, dtype=np.uint64)
        np.cumsum(values, out=sums[1:])
        folded = sums[ends] - sums[ends - strides]

        index = positions // self.block_tokens
        last = self.read_each(tables[rows, index].astype(np.int64), positions - index * self.block_tokens)
        return mix(last) + folded

    def _weights_for(self, strides: int) -> U64:
        if len(self._weights) < strides:
            self._weights = _stream("weight", max(256, 2 * strides)) | np.uint64(1)
        return self._weights
