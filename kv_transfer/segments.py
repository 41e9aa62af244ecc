"""Which bytes make up a list of blocks, as numpy arrays: built once per fetch, merged, cut into pieces, checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kv_transfer.layout import KvLayout
from kv_transfer.transport import ARENA, STAGING, Segments, TransportError


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaMap:
    """Where blocks lie in an arena: segment s of block b at `offset + s * segment_stride + b * block_stride`."""

    blocks: int
    segment_stride: int
    block_stride: int
    offset: int = 0

    def end(self, layout: KvLayout) -> int:
        """The first byte past the last block."""
        last = (layout.segments_per_block - 1) * self.segment_stride + (self.blocks - 1) * self.block_stride
        return self.offset + last + layout.segment_bytes

    def difference(self, layout: KvLayout, arena_bytes: int) -> str:
        """Names why this map can't be right for an arena of that size; empty when it can."""
        if self.blocks < 1 or self.offset < 0 or self.block_stride < layout.segment_bytes:
            return f"{self} for segments of {layout.segment_bytes} bytes"
        of_one_block = (layout.segments_per_block - 1) * self.segment_stride + layout.segment_bytes
        of_one_segment = (self.blocks - 1) * self.block_stride + layout.segment_bytes
        nested = self.block_stride >= of_one_block or self.segment_stride >= of_one_segment
        if layout.segments_per_block > 1 and (self.segment_stride < layout.segment_bytes or not nested):
            return f"{self}: {layout.segments_per_block} segments of {layout.segment_bytes} bytes overlap"
        if self.end(layout) > arena_bytes:
            return f"{self.blocks} blocks end at byte {self.end(layout)} of an arena of {arena_bytes} bytes"
        return ""


def block_segments(layout: KvLayout, arena: ArenaMap, block_ids: Sequence[int], pages: Sequence[int]) -> Segments:
    """The read of `block_ids` out of a peer's arena into staging `pages`, in that order, merged."""
    segment = np.arange(layout.segments_per_block, dtype=np.uint64)[:, None]
    blocks = np.asarray(block_ids, np.uint64)[None, :]
    page = np.asarray(pages, np.uint64)[None, :]
    remote = (
        np.uint64(arena.offset) + segment * np.uint64(arena.segment_stride) + blocks * np.uint64(arena.block_stride)
    )
    local = segment * np.uint64(layout.segment_bytes) + page * np.uint64(layout.block_bytes)
    # Blocks innermost where layers are outermost in the arena, so that neighbours in memory are neighbours here.
    order: Literal["C", "F"] = "C" if arena.segment_stride >= arena.block_stride else "F"
    remote, local = remote.ravel(order), local.ravel(order)
    return merge(Segments(ARENA, STAGING, remote, local, np.full(remote.size, layout.segment_bytes, np.uint64)))


def one_segment(remote_region: str, remote: int, local_region: str, local: int, nbytes: int) -> Segments:
    def one(value: int) -> NDArray[np.uint64]:
        return np.array([value], np.uint64)

    return Segments(remote_region, local_region, one(remote), one(local), one(nbytes))


def merge(segments: Segments) -> Segments:
    """Joins neighbours that are adjacent on both sides: descriptors cost about a microsecond each, bytes far less."""
    if segments.sizes.size < 2:
        return segments
    remote, local, sizes = segments.remote, segments.local, segments.sizes
    adjacent = (remote[:-1] + sizes[:-1] == remote[1:]) & (local[:-1] + sizes[:-1] == local[1:])
    first = np.flatnonzero(np.concatenate(([True], ~adjacent)))
    return Segments(
        segments.remote_region, segments.local_region, remote[first], local[first], np.add.reduceat(sizes, first)
    )


def pieces(segments: Segments, nbytes_max: int) -> Iterator[Segments]:
    """Cuts a read into reads of at most `nbytes_max` bytes, so that none keeps a cancel waiting for long."""
    segments = _cut(segments, nbytes_max)
    ends = np.cumsum(segments.sizes)
    start = 0
    while start < ends.size:
        done = ends[start - 1] if start else np.uint64(0)
        stop = max(start + 1, int(np.searchsorted(ends, done + np.uint64(nbytes_max), side="right")))
        yield Segments(
            segments.remote_region,
            segments.local_region,
            segments.remote[start:stop],
            segments.local[start:stop],
            segments.sizes[start:stop],
        )
        start = stop


def _cut(segments: Segments, nbytes_max: int) -> Segments:
    """The same read with no segment longer than `nbytes_max`."""
    limit = np.uint64(nbytes_max)
    if not (segments.sizes > limit).any():
        return segments
    parts = ((segments.sizes + limit - np.uint64(1)) // limit).astype(np.int64)
    owner = np.repeat(np.arange(parts.size), parts)
    within = (np.arange(owner.size) - np.repeat(np.cumsum(parts) - parts, parts)).astype(np.uint64) * limit
    return Segments(
        segments.remote_region,
        segments.local_region,
        segments.remote[owner] + within,
        segments.local[owner] + within,
        np.minimum(limit, segments.sizes[owner] - within),
    )


def check_bounds(segments: Segments, remote: Mapping[str, int], local: Mapping[str, int]) -> None:
    """Raises TransportError unless every byte lies inside the regions, given as sizes by name."""
    _check_side("peer's", segments.remote_region, segments.remote, segments.sizes, remote)
    _check_side("own", segments.local_region, segments.local, segments.sizes, local)


def _check_side(
    side: str, region: str, offsets: NDArray[np.uint64], sizes: NDArray[np.uint64], regions: Mapping[str, int]
) -> None:
    if region not in regions:
        raise TransportError(f"the {side} region {region!r} is not registered")
    if offsets.shape != sizes.shape or offsets.dtype != np.uint64 or sizes.dtype != np.uint64:
        raise TransportError(f"{side} offsets and sizes must be uint64 arrays of one length")
    nbytes = np.uint64(regions[region])
    # Written so that no sum can wrap around.
    bad = np.flatnonzero((sizes > nbytes) | (offsets > nbytes - np.minimum(sizes, nbytes)))
    if bad.size:
        i = int(bad[0])
        raise TransportError(
            f"{int(sizes[i])} bytes at {int(offsets[i])} lie outside the {side} {region!r} of {int(nbytes)} bytes"
        )
