"""Digests of blocks: a reader that asks for them finds out when what arrived is not what the owner had.

The lease word says that nothing was reused. It cannot see a transport that drops, misplaces or alters bytes, or memory
that somebody wrote to against the rules: that is what these 64 bits per block are for. They are XXH3's, made against
accidents and not against an adversary, and cost less than copying the bytes.

A digest is over the whole block, all its segments in order, as it lies there when it is offered: what is behind the
last token of a block that is not full is part of it, and as little may change while the lease is held.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import xxhash

from kv_transfer.layout import KvLayout
from kv_transfer.segments import ArenaMap
from kv_transfer.transport import Region


def refusal(regions: Iterable[Region]) -> str:
    """Why there can be no digests of blocks in these regions; empty when there can."""
    elsewhere = [f"{region.name} is on {region.device}" for region in regions if region.device != "cpu"]
    return f"kv_verify: digests are of host memory, {', '.join(elsewhere)}" if elsewhere else ""


class BlockDigests:
    """Of the blocks of one region of host memory, which its owner keeps mapped."""

    def __init__(self, region: Region, layout: KvLayout, where: ArenaMap) -> None:
        self._memory = memoryview((ctypes.c_uint8 * region.nbytes).from_address(region.address)).cast("B")
        self._where = where
        self._segment_bytes = layout.segment_bytes
        self._segments = [where.offset + number * where.segment_stride for number in range(layout.segments_per_block)]

    def of(self, blocks: Sequence[int]) -> list[int]:
        return [self._of_one(int(block) * self._where.block_stride) for block in blocks]

    def _of_one(self, offset: int) -> int:
        digest = xxhash.xxh3_64()
        for segment in self._segments:
            digest.update(self._memory[segment + offset : segment + offset + self._segment_bytes])
        return digest.intdigest()


def page_map(layout: KvLayout, pages: int) -> ArenaMap:
    """Where the segments of staging pages lie."""
    return ArenaMap(blocks=pages, segment_stride=layout.segment_bytes, block_stride=layout.block_bytes)
