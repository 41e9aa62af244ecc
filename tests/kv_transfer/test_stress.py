"""Many hand-offs at once, by real threads, with an owner that reuses blocks the moment it may."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from kv_transfer.api import FetchError, NodeLimits, OfferRefused, Outcome
from kv_transfer.inproc import ReadEvent
from kv_transfer.turn import Cancel
from tests.kv_transfer.memory import write_block
from tests.kv_transfer.nodes import Party, World, eventually

BLOCKS, HAND_OFFS, READERS = 32, 420, 6


class Prefill:
    """An engine that writes fresh bytes into every block it gets, and hands them off."""

    def __init__(self, party: Party, random_: random.Random) -> None:
        self.party = party
        self.random = random_
        self.lock = threading.Lock()
        self.free = list(range(BLOCKS))
        self.leased: dict[str, list[int]] = {}
        self.number = 0

    def step(self) -> None:
        """Blocks whose lease has ended are free, and written over at once."""
        with self.lock:
            for transfer_id in self.party.node.take_ended():
                for block in self.leased.pop(transfer_id):
                    assert block not in self.free, "freed twice"
                    self.free.append(block)
                    self.party.overwrite(block)

    def hand_off(self) -> tuple[bytes, list[bytes]] | None:
        """A handle and what its blocks hold; None when there is no room just now."""
        self.step()
        with self.lock:
            count = self.random.randint(1, 5)
            if len(self.free) < count:
                return None
            self.number += 1
            blocks = [self.free.pop(self.random.randrange(len(self.free))) for _ in range(count)]
            content = [self.random.randbytes(self.party.layout.block_bytes) for _ in blocks]
            for block, bytes_ in zip(blocks, content, strict=True):
                write_block(self.party.arena, self.party.layout, self.party.where, block, bytes_)
            name = f"t{self.number}"
            try:
                handle = self.party.offer(name, blocks, ttl_s=self.random.choice([0.005, 0.05, 5.0]))
            except OfferRefused:
                self.free += blocks
                return None
            self.leased[name] = blocks
        if self.random.random() < 0.15:
            self.party.node.cancel(name)
        return handle, content


def test_no_wrong_byte_is_staged_and_nothing_leaks(world: World) -> None:
    seed = 20261121
    owner = world.open("p", blocks=BLOCKS, limits=NodeLimits(rows=16))
    reader = world.open("d", pages=24, limits=NodeLimits(piece_bytes=2048, fetches=5))
    reader.node.connect(peer="p", address=owner.node.address)
    prefill = Prefill(owner, random.Random(seed))
    reader.inproc.hook = _slow_down(random.Random(seed + 1))
    outcomes: Counter[Outcome] = Counter()
    wrong: list[str] = []

    def work(number: int) -> None:
        random_ = random.Random(seed + 2 + number)
        for _ in range(HAND_OFFS // READERS):
            while (offered := prefill.hand_off()) is None:
                time.sleep(0.001)
            handle, content = offered
            outcomes[_fetch(reader, handle, content, random_, wrong)] += 1

    with ThreadPoolExecutor(READERS) as threads:
        for done in [threads.submit(work, number) for number in range(READERS)]:
            done.result()
    reader.inproc.hook = None
    assert not wrong
    assert {Outcome.STAGED, Outcome.STALE, Outcome.FAILED} <= set(outcomes), outcomes

    def all_free() -> bool:
        prefill.step()
        return len(prefill.free) == BLOCKS

    eventually(all_free)
    stats = reader.node.stats()
    assert (stats.staging_pages_free, stats.fetches_in_flight) == (24, 0)
    assert owner.node.stats().leases_held == 0


def _fetch(reader: Party, handle: bytes, content: list[bytes], random_: random.Random, wrong: list[str]) -> Outcome:
    cancel = Cancel()
    if random_.random() < 0.2:
        timer = threading.Timer(random_.random() * 0.02, cancel.set)
        timer.start()
    try:
        fetched = reader.node.fetch(handle, random_.choice([0.02, 5.0]), cancel)
    except FetchError as error:
        return error.outcome
    pages = reader.node.claim(fetched.staged_id)
    if random_.random() < 0.3:
        reader.node.discard(fetched.staged_id)  # crosses the engine's copy
    size = reader.layout.block_bytes
    if [reader.staging[page * size : (page + 1) * size].tobytes() for page in pages] != content:
        wrong.append(fetched.staged_id)
    reader.node.consumed(fetched.staged_id)
    return Outcome.STAGED


def _slow_down(random_: random.Random) -> Callable[[ReadEvent], None]:
    def hook(event: ReadEvent) -> None:
        if not event.done and random_.random() < 0.3:
            time.sleep(random_.random() * 0.004)

    return hook


def test_waiting_fetches_are_served_in_the_order_they_came(world: World) -> None:
    owner = world.open("p")
    reader = world.open("d")
    reader.node.connect(peer="p", address=owner.node.address)
    order: list[int] = []
    first_in, go_on = threading.Event(), threading.Event()

    def hook(event: ReadEvent) -> None:
        if event.done or event.segments.remote_region != "arena":
            return
        order.append(int(event.segments.remote[0]) // owner.layout.segment_bytes)
        if not first_in.is_set():
            first_in.set()
            go_on.wait(60)

    reader.inproc.hook = hook
    with ThreadPoolExecutor(5) as threads:
        fetches = []
        for block in (9, 3, 7, 1):
            fetches.append(threads.submit(reader.node.fetch, owner.offer(f"t{block}", [block]), 10.0))
            eventually(lambda: len(reader.node._roster.wires[0].turn._queue) == len(fetches))  # noqa: B023
        assert first_in.wait(60)
        go_on.set()
        for fetch in fetches:
            reader.node.discard(fetch.result().staged_id)
    assert order == [9, 3, 7, 1]
