"""Nodes for tests: memory, transports and a KvNode, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kv_transfer.api import NodeLimits
from kv_transfer.inproc import InprocHub, InprocTransport, ReadEvent
from kv_transfer.layout import KvLayout
from kv_transfer.node import KvNode
from kv_transfer.segments import ArenaMap
from kv_transfer.transport import ARENA, BOARD, STAGING, Transport
from tests.kv_transfer.memory import Bytes, allocate, block_bytes, layer_major, layout, pattern, region, write_block
from trust.tls import Tls

SECRET = b"the cluster's secret"


def eventually(holds: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Waits for what other threads will bring about: less than leases live here, which end by themselves then."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


@dataclass
class Party:
    node: KvNode
    layout: KvLayout
    where: ArenaMap
    arena: Bytes
    staging: Bytes
    transports: Sequence[Transport]

    @property
    def inproc(self) -> InprocTransport:
        assert isinstance(self.transports[0], InprocTransport)
        return self.transports[0]

    def offer(self, transfer_id: str = "t", blocks: Sequence[int] = (3, 4, 9), **changes: object) -> bytes:
        order = {"tenant": "acme", "reader": "", "tokens": len(blocks) * self.layout.block_tokens, "ttl_s": 30.0}
        return self.node.offer(transfer_id=transfer_id, block_ids=blocks, **(order | changes))  # type: ignore[arg-type]

    def block(self, block: int) -> bytes:
        return block_bytes(self.arena, self.layout, self.where, block)

    def overwrite(self, block: int) -> None:
        write_block(self.arena, self.layout, self.where, block, bytes(self.layout.block_bytes))

    def staged(self, staged_id: str) -> list[bytes]:
        size = self.layout.block_bytes
        return [self.staging[page * size : (page + 1) * size].tobytes() for page in self.node.pages(staged_id)]

    def word(self, row: int) -> int:
        return self.node._board.word(row)

    def during_read(self, act: Callable[[], None], *, after_piece: int = 1, region: str = ARENA) -> None:
        """Runs `act` once, in the reading thread, when that many pieces of the next reads are in."""
        pieces = 0

        def hook(event: ReadEvent) -> None:
            nonlocal pieces
            if event.done and event.segments.remote_region == region:
                pieces += 1
                if pieces == after_piece:
                    act()

        self.inproc.hook = hook

    def corrupt_one_byte(self) -> None:
        """Flips one byte of the next read's first segment after it has landed."""
        done = False

        def hook(event: ReadEvent) -> None:
            nonlocal done
            if event.done and event.segments.remote_region == ARENA and not done:
                done = True
                event.destination(0)[7] ^= 0xFF

        self.inproc.hook = hook


def open_party(
    name: str,
    transports: Sequence[Transport],
    *,
    incarnation: str = "i1",
    lay: KvLayout | None = None,
    where: Callable[[KvLayout, int], ArenaMap] = layer_major,
    blocks: int = 32,
    pages: int = 16,
    secret: bytes = SECRET,
    limits: NodeLimits | None = None,
    port: int = 0,
    on_ended: Callable[[], None] | None = None,
    verify: bool = False,
    tls: Tls | None = None,
) -> Party:
    lay = lay or layout()
    arena_map = where(lay, blocks)
    arena = allocate(blocks * lay.block_bytes)
    arena[:] = pattern(sum(name.encode() + incarnation.encode()), arena.nbytes)
    staging = allocate(max(pages, 1) * lay.block_bytes)
    node = KvNode(
        name=name,
        incarnation=incarnation,
        layout=lay,
        model=lay.model,
        secret=secret,
        transports=transports,
        port=port,
        limits=limits,
        verify=verify,
        tls=tls,
    )
    node.open(
        arena=region(ARENA, arena),
        arena_map=arena_map,
        staging=region(STAGING, staging),
        staging_pages=pages,
        on_ended=on_ended,
    )
    return Party(node, lay, arena_map, arena, staging, transports)


class World:
    """Opens nodes that reach each other in this process, and closes them."""

    def __init__(self) -> None:
        self.hub = InprocHub()
        self.parties: list[Party] = []

    def open(self, name: str, **options: object) -> Party:
        party = open_party(name, [InprocTransport(self.hub)], **options)  # type: ignore[arg-type]
        self.parties.append(party)
        return party

    def close(self) -> None:
        for party in self.parties:
            if not party.node.closed:
                eventually(lambda party=party: not party.node.stats().fetches_in_flight)  # type: ignore[misc]
                party.node.check_integrity()
                party.node.close()


@contextmanager
def world() -> Iterator[World]:
    opened = World()
    try:
        yield opened
    finally:
        opened.close()


__all__ = ["ARENA", "BOARD", "SECRET", "Party", "World", "eventually", "open_party", "world"]
