"""What kv_verify costs: hashing blocks, and a whole hand-off with and without it.

Digests are made of memory laid out as engines do it: a block in one segment, or in one per layer. A hand-off is an
offer and the fetch of it between two nodes of this process, whose lane is a copy in memory: so whatever digests add is
seen against the fastest lane that there is. The two kinds take turns.

    make bench-verify
"""

from __future__ import annotations

import argparse
import mmap
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Check, Row, environment, report
from kv_transfer.digest import BlockDigests, page_map
from kv_transfer.inproc import InprocHub, InprocTransport
from kv_transfer.layout import KvLayout
from kv_transfer.node import KvNode
from kv_transfer.segments import ArenaMap
from kv_transfer.transport import ARENA, STAGING, Region

MiB = 1 << 20
MEMORY_BYTES = 64 * MiB
BLOCK_BYTES = 64 << 10
SEGMENTS_BYTES = (BLOCK_BYTES, 16 << 10, 2 << 10)
HAND_OFFS = (MiB, 16 * MiB, 64 * MiB)


def allocate(seed: int) -> NDArray[np.uint8]:
    """Every page of it touched."""
    memory = np.frombuffer(mmap.mmap(-1, MEMORY_BYTES), np.uint8)
    memory[:] = np.random.default_rng(seed).integers(0, 256, MEMORY_BYTES, np.uint8)
    return memory


def layout(segment_bytes: int) -> KvLayout:
    return KvLayout(
        engine="bench",
        model="m",
        revision="r",
        dtype="bfloat16",
        block_tokens=32,
        layers=4,
        kv_heads=2,
        head_dim=64,
        tensor_parallel=1,
        order="BLHNC",
        isa="",
        segment_bytes=segment_bytes,
        segments_per_block=BLOCK_BYTES // segment_bytes,
    )


def region(name: str, memory: NDArray[np.uint8]) -> Region:
    return Region(name, int(memory.ctypes.data), memory.nbytes)


def took_s(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def hashing(arena: NDArray[np.uint8], rounds: int) -> list[Row]:
    rows: list[Row] = []
    for segment_bytes in SEGMENTS_BYTES:
        lay = layout(segment_bytes)
        blocks = MEMORY_BYTES // BLOCK_BYTES
        digests = BlockDigests(region(ARENA, arena), lay, page_map(lay, blocks))
        each = [took_s(partial(digests.of, range(blocks))) for _ in range(rounds)]
        rows.append(
            {"what": f"digests, segments of {segment_bytes >> 10} KiB", "ms_per_GB": median(each) * 1e12 / MEMORY_BYTES}
        )
    return rows


def pair(verify: bool) -> tuple[KvNode, KvNode]:
    lay, hub, blocks = layout(BLOCK_BYTES), InprocHub(), MEMORY_BYTES // BLOCK_BYTES
    nodes = []
    for name in ("owner", "reader"):
        node = KvNode(
            name=name,
            incarnation="1",
            layout=lay,
            model="m",
            secret=b"bench",
            transports=[InprocTransport(hub)],
            verify=verify,
        )
        arena, staging = allocate(1), allocate(2)
        where = ArenaMap(blocks=blocks, segment_stride=BLOCK_BYTES, block_stride=BLOCK_BYTES)
        node.open(arena=region(ARENA, arena), arena_map=where, staging=region(STAGING, staging), staging_pages=blocks)
        _kept.append((arena, staging))
        nodes.append(node)
    nodes[1].connect(peer="owner", address=nodes[0].address)
    return nodes[0], nodes[1]


#: The nodes' memory, which must outlive them.
_kept: list[object] = []


def hand_offs(rounds: int) -> list[Row]:
    pairs = {verify: pair(verify) for verify in (False, True)}
    found: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    number = 0
    for _ in range(rounds + 1):
        for nbytes in HAND_OFFS:
            for verify, (owner, reader) in pairs.items():
                number += 1
                found.setdefault((nbytes, verify), []).append(_hand_off(owner, reader, nbytes, f"t{number}"))
    for nodes in pairs.values():
        for node in nodes:
            node.close()
    rows: list[Row] = []
    for nbytes in HAND_OFFS:
        figures: dict[str, float] = {}
        for verify, word in ((False, "off"), (True, "on")):
            each = found[nbytes, verify][1:]
            figures[f"offer_ms_{word}"] = median(offer for offer, _ in each) * 1e3
            figures[f"fetch_ms_{word}"] = median(fetch for _, fetch in each) * 1e3
        rows.append({"what": f"hand-off of {nbytes // MiB} MiB", **figures})
    return rows


def _hand_off(owner: KvNode, reader: KvNode, nbytes: int, name: str) -> tuple[float, float]:
    blocks = range(nbytes // BLOCK_BYTES)
    began = time.perf_counter()
    handle = owner.offer(transfer_id=name, tenant="", reader="", block_ids=blocks, tokens=32 * len(blocks), ttl_s=30.0)
    offered = time.perf_counter()
    fetched = reader.fetch(handle, 10.0)
    ended = time.perf_counter()
    reader.discard(fetched.staged_id)
    while not owner.take_ended():
        time.sleep(0.001)
    return offered - began, ended - offered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    env = environment()
    rows = [*hashing(allocate(1), arguments.rounds), *hand_offs(arguments.rounds)]
    no_promises: list[Check] = []
    report("verify", rows, no_promises, env)


if __name__ == "__main__":
    main()
