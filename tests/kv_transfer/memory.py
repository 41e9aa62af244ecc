"""Page-aligned memory for tests, and the layouts they use."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_transfer.layout import KvLayout
from kv_transfer.segments import ArenaMap
from kv_transfer.transport import Region

Bytes = NDArray[np.uint8]


def allocate(nbytes: int) -> Bytes:
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def region(name: str, memory: Bytes) -> Region:
    return Region(name, int(memory.ctypes.data), memory.nbytes)


def layout(**changes: Any) -> KvLayout:
    facts: dict[str, Any] = {
        "engine": "test",
        "model": "m",
        "revision": "r1",
        "dtype": "uint8",
        "block_tokens": 16,
        "layers": 3,
        "kv_heads": 1,
        "head_dim": 64,
        "tensor_parallel": 1,
        "order": "LBHNC",
        "isa": "",
        "segment_bytes": 2048,
        "segments_per_block": 3,
    }
    return KvLayout(**(facts | changes))


def layer_major(layout: KvLayout, blocks: int) -> ArenaMap:
    return ArenaMap(blocks=blocks, segment_stride=blocks * layout.segment_bytes, block_stride=layout.segment_bytes)


def block_major(layout: KvLayout, blocks: int) -> ArenaMap:
    return ArenaMap(blocks=blocks, segment_stride=layout.segment_bytes, block_stride=layout.block_bytes)


def pattern(seed: int, nbytes: int) -> Bytes:
    """The same bytes in every process."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def block_bytes(arena: Bytes, layout: KvLayout, where: ArenaMap, block: int) -> bytes:
    """A block's segments, one after the other: what its staging page must hold."""
    starts = (
        where.offset + segment * where.segment_stride + block * where.block_stride
        for segment in range(layout.segments_per_block)
    )
    return b"".join(arena[start : start + layout.segment_bytes].tobytes() for start in starts)


def write_block(arena: Bytes, layout: KvLayout, where: ArenaMap, block: int, content: bytes) -> None:
    for segment in range(layout.segments_per_block):
        start = where.offset + segment * where.segment_stride + block * where.block_stride
        part = content[segment * layout.segment_bytes : (segment + 1) * layout.segment_bytes]
        arena[start : start + layout.segment_bytes] = np.frombuffer(part, np.uint8)
