"""Who holds which KV block: reference counts, the prefix cache, the order of reuse.

A block is in exactly one place:

    free, plain   --take-->  held (1 or more references)  --give_back-->  free, plain      when it has no digest
    free, cached  --take-->  (evicted: its digest is forgotten)           free, cached     when it has one
    free, cached  --hold-->  held

A *digest* names a full block's tokens and all before them, and the cache salt. Only full blocks are published, so a
partly filled last block is never shared. Cached blocks are evicted least recently used first, a sequence's last
blocks before its first, and only when no plain one is left.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class BlockOwner:
    """For whom a block's bytes were made. Blocks are found by salt only, so a salt's tenants may share them."""

    tenant: str
    cache_salt: str


def root_digest(cache_salt: str) -> bytes:
    return hashlib.blake2b(cache_salt.encode(), digest_size=16, person=b"tandem-sim").digest()


def extend_digests(digests: list[bytes], root: bytes, token_ids: NDArray[np.uint32], block_tokens: int) -> None:
    """Appends a digest for each full block of `token_ids` that has none yet."""
    for index in range(len(digests), len(token_ids) // block_tokens):
        tokens = token_ids[index * block_tokens : (index + 1) * block_tokens]
        digests.append(hashlib.blake2b(tokens.data, digest_size=16, key=digests[-1] if digests else root).digest())


class BlockPool:
    def __init__(self, blocks: int) -> None:
        self.total = blocks
        #: Zero exactly when the block is in one of the two free lists.
        self._references = [0] * blocks
        self._plain = list(range(blocks - 1, -1, -1))
        #: Least recently used first; each has a digest.
        self._cached: OrderedDict[int, None] = OrderedDict()
        #: One to one with the entries of `_digests` that are not None.
        self._by_digest: dict[bytes, int] = {}
        self._digests: list[bytes | None] = [None] * blocks
        #: Who wrote the block last; it stays when the block is freed, until another takes it.
        self._owners: list[BlockOwner | None] = [None] * blocks

    @property
    def free(self) -> int:
        return len(self._plain) + len(self._cached)

    def owner(self, block: int) -> BlockOwner | None:
        return self._owners[block]

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """Cached blocks of the longest known prefix. They are not held yet."""
        found = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def can_take(self, count: int, beside: Sequence[int] = ()) -> bool:
        """Whether `count` blocks are free when those of `beside` are held."""
        return count + sum(1 for block in beside if not self._references[block]) <= self.free

    def hold(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if not self._references[block]:
                del self._cached[block]
            self._references[block] += 1

    def take(self, count: int, owner: BlockOwner) -> tuple[list[int], list[int]]:
        """`count` blocks (see `can_take`), and those of them that hold another owner's bytes."""
        taken = [self._take_one() for _ in range(count)]
        strangers = []
        for block in taken:
            former = self._owners[block]
            if former != owner:
                self._owners[block] = owner
                if former is not None:
                    strangers.append(block)
        return taken, strangers

    def _take_one(self) -> int:
        if self._plain:
            block = self._plain.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            digest = self._digests[block]
            assert digest is not None
            del self._by_digest[digest]
            self._digests[block] = None
        self._references[block] = 1
        return block

    def publish(self, block: int, digest: bytes) -> None:
        """A held block is full: others may share it. Ignored when the same prefix is published by another block."""
        if digest not in self._by_digest and self._digests[block] is None:
            self._by_digest[digest] = block
            self._digests[block] = digest

    def give_back(self, blocks: Sequence[int]) -> None:
        """Drops one reference to each of a sequence's blocks, given first to last."""
        for block in reversed(blocks):
            left = self._references[block] - 1
            if left < 0:
                raise AssertionError(f"block {block} given back twice")
            self._references[block] = left
            if left:
                continue
            if self._digests[block] is None:
                self._plain.append(block)
            else:
                self._cached[block] = None

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """`holders`: the blocks of everyone who should hold some."""
        expected = Counter(block for blocks in holders for block in blocks)
        assert expected == Counter({b: n for b, n in enumerate(self._references) if n}), "references and holders differ"
        free = [*self._plain, *self._cached]
        assert len(set(free)) == len(free), "a block is free twice"
        assert set(free) == {b for b, n in enumerate(self._references) if not n}, "free lists and references differ"
        assert {d: b for b, d in enumerate(self._digests) if d is not None} == self._by_digest
        assert all(self._digests[b] is None for b in self._plain)
        assert all(self._digests[b] is not None for b in self._cached)
        assert all(self._owners[b] is not None for b in expected)
