"""Blocks that are read while they are computed: what arrives, what ends it in mid-stream, and that nothing is left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from kv_transfer import wire
from kv_transfer.api import Fetched, FetchError, NodeLimits, OfferRefused, Outcome
from kv_transfer.inproc import ReadEvent
from kv_transfer.reading import Pace
from kv_transfer.registry import make_transports
from kv_transfer.transport import ARENA, BOARD, PeerGone
from kv_transfer.turn import Cancel
from tests.kv_transfer.nodes import SECRET, Party, World, eventually, open_party
from tests.kv_transfer.processes import PeerProcess, peer_process

BLOCKS = (3, 4, 9, 2, 11)
TOKENS = 16 * 4 + 5


@pytest.fixture
def owner(world: World) -> Party:
    return world.open("p")


@pytest.fixture
def reader(world: World) -> Party:
    return world.open("d", limits=NodeLimits(piece_bytes=4096, self_test_bytes=1))


def stream(owner: Party, transfer_id: str = "t", ttl_s: float = 30.0) -> bytes:
    return owner.node.stream(transfer_id=transfer_id, tenant="acme", reader="d", tokens=TOKENS, ttl_s=ttl_s)


@dataclass
class Reader:
    """A fetch in a thread of its own."""

    party: Party
    handle: bytes
    ahead: bool = True
    cancel: Cancel = field(default_factory=Cancel)

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(1)
        self.bytes_read = 0
        self.looks = 0
        self.party.inproc.hook = self._count
        self.future: Future[Fetched] = self._threads.submit(
            self.party.node.fetch, self.handle, 60.0, self.cancel, ahead=self.ahead
        )
        self._threads.shutdown(wait=False)

    def _count(self, event: ReadEvent) -> None:
        if event.done and event.segments.remote_region == ARENA:
            self.bytes_read += event.segments.nbytes
        self.looks += event.done and event.segments.remote_region == BOARD

    def has_read(self, blocks: int) -> None:
        eventually(lambda: self.bytes_read == blocks * self.party.layout.block_bytes)

    def fails(self, outcome: Outcome) -> str:
        with pytest.raises(FetchError) as raised:
            self.future.result(60)
        assert raised.value.outcome is outcome, raised.value
        stats = self.party.node.stats()
        assert (stats.staged_pages, stats.fetches_in_flight) == (0, 0)
        return raised.value.detail

    def succeeds(self) -> Fetched:
        return self.future.result(60)


def met(owner: Party, reader: Party) -> None:
    reader.node.connect(peer="p", address=owner.node.address)


def test_blocks_are_read_as_they_become_whole(owner, reader):
    met(owner, reader)
    handle = stream(owner)
    assert wire.unseal(handle, SECRET).block_ids == ()
    reading = Reader(reader, handle)
    assert owner.node.publish("t", BLOCKS, 30)  # a block and a part of the next
    reading.has_read(1)
    assert owner.node.publish("t", BLOCKS, 64)
    reading.has_read(4)
    assert not reading.future.done()
    assert owner.node.publish("t", BLOCKS, TOKENS)
    fetched = reading.succeeds()
    assert reader.staged(fetched.staged_id) == [owner.block(block) for block in BLOCKS]
    assert (fetched.tokens, fetched.nbytes) == (TOKENS, 5 * owner.layout.block_bytes)
    eventually(lambda: owner.node.take_ended() == ["t"])
    reader.node.discard(fetched.staged_id)


def test_a_block_that_changes_before_it_is_whole_arrives_whole(owner, reader):
    met(owner, reader)
    reading = Reader(reader, stream(owner))
    owner.node.publish("t", BLOCKS, 31)
    reading.has_read(1)
    owner.overwrite(4)
    owner.node.publish("t", BLOCKS, TOKENS)
    fetched = reading.succeeds()
    assert reader.staged(fetched.staged_id)[1] == bytes(owner.layout.block_bytes)
    reader.node.discard(fetched.staged_id)


def test_block_ids_may_become_known_as_they_are_needed(owner, reader):
    met(owner, reader)
    reading = Reader(reader, stream(owner))
    for blocks in range(1, 5):
        owner.node.publish("t", BLOCKS[:blocks], 16 * blocks)
        reading.has_read(blocks)
    owner.node.publish("t", BLOCKS, TOKENS)
    fetched = reading.succeeds()
    assert reader.staged(fetched.staged_id) == [owner.block(block) for block in BLOCKS]
    reader.node.discard(fetched.staged_id)


def test_a_stream_that_is_complete_is_fetched_like_any_lease(owner, reader):
    handle = stream(owner)
    owner.node.publish("t", BLOCKS, TOKENS)
    fetched = reader.node.fetch(handle, 20.0)
    assert reader.staged(fetched.staged_id) == [owner.block(block) for block in BLOCKS]
    reader.node.discard(fetched.staged_id)
    eventually(lambda: owner.node.take_ended() == ["t"])


def test_a_lease_expires_after_it_is_complete_and_not_before(owner, reader):
    met(owner, reader)
    handle = stream(owner, ttl_s=0.05)
    assert wire.unseal(handle, SECRET).deadline_ms == 0
    owner.node.publish("t", BLOCKS, 64)
    with pytest.raises(FetchError, match="deadline"):
        reader.node.fetch(handle, 0.3, ahead=True)
    assert owner.node.stats().leases_held == 1
    owner.node.publish("t", BLOCKS, TOKENS)
    eventually(lambda: owner.node.take_ended() == ["t"])
    with pytest.raises(FetchError) as raised:
        reader.node.fetch(handle, 20.0)
    assert raised.value.outcome is Outcome.STALE


def test_a_stream_withdrawn_in_mid_read_is_stale_and_its_blocks_free_at_once(owner, reader):
    met(owner, reader)
    reading = Reader(reader, stream(owner))
    owner.node.publish("t", BLOCKS, 40)
    reading.has_read(2)
    assert owner.node.withdraw("t")
    owner.overwrite(3)
    assert "ended before its bytes were in" in reading.fails(Outcome.STALE)
    assert owner.node.take_ended() == []
    assert not owner.node.publish("t", BLOCKS, TOKENS)
    assert owner.node.stats().leases_held == 0


def test_a_block_reused_after_its_read_makes_the_whole_fetch_stale(owner, reader):
    """The word is read after the last byte, so the first are held to the same standard."""
    met(owner, reader)
    handle = stream(owner)
    reading = Reader(reader, handle)
    owner.node.publish("t", BLOCKS, 64)
    reading.has_read(4)
    owner.node.withdraw("t")
    owner.overwrite(3)
    again = owner.node.stream(transfer_id="t", tenant="acme", reader="d", tokens=TOKENS, ttl_s=30)
    assert wire.unseal(again, SECRET).row == wire.unseal(handle, SECRET).row
    owner.node.publish("t", BLOCKS, TOKENS)
    reading.fails(Outcome.STALE)
    owner.node.withdraw("t")


def test_a_cancelled_read_stops_between_two_looks(owner, reader):
    met(owner, reader)
    reading = Reader(reader, stream(owner))
    owner.node.publish("t", BLOCKS, 16)
    reading.has_read(1)
    reading.cancel.set()
    assert reading.fails(Outcome.FAILED) == "cancelled"
    assert owner.node.stats().leases_held == 1, "its prefill goes on"
    owner.node.withdraw("t")


def test_an_owner_that_closes_ends_the_read(owner, reader):
    met(owner, reader)
    reading = Reader(reader, stream(owner))
    owner.node.publish("t", BLOCKS, 16)
    reading.has_read(1)
    owner.node.close()
    with pytest.raises(FetchError):
        reading.future.result(60)
    assert not owner.node.publish("t", BLOCKS, 32)


# -- ahead


def test_a_read_ahead_that_fails_costs_nothing_but_its_time(owner, reader):
    met(owner, reader)
    handle = stream(owner)
    owner.node.publish("t", BLOCKS, 32)

    def broken(event: ReadEvent) -> None:
        raise PeerGone("as asked")

    reading = Reader(reader, handle)
    reading.has_read(2)
    reader.inproc.hook = broken
    reading.fails(Outcome.FAILED)
    reader.inproc.hook = None
    owner.node.publish("t", BLOCKS, TOKENS)
    fetched = reader.node.fetch(handle, 20.0)
    assert reader.staged(fetched.staged_id) == [owner.block(block) for block in BLOCKS]
    reader.node.discard(fetched.staged_id)
    eventually(lambda: owner.node.take_ended() == ["t"])


def test_what_was_read_ahead_and_discarded_is_stale_for_the_next(owner, reader):
    handle = stream(owner)
    owner.node.publish("t", BLOCKS, TOKENS)
    reader.node.discard(reader.node.fetch(handle, 5.0, ahead=True).staged_id)
    eventually(lambda: owner.node.take_ended() == ["t"])
    with pytest.raises(FetchError) as raised:
        reader.node.fetch(handle, 20.0)
    assert raised.value.outcome is Outcome.STALE


def test_a_fetch_waits_for_the_end_of_what_was_given_up(owner, reader):
    """Whoever dropped the first may be asked for the second at once."""
    met(owner, reader)
    handle = stream(owner)
    reading = Reader(reader, handle)
    owner.node.publish("t", BLOCKS, 16)
    reading.has_read(1)
    with ThreadPoolExecutor(1) as threads:
        wanted = threads.submit(reader.node.fetch, handle, 60.0)
        eventually(lambda: reader.node._changed._waiters)
        owner.node.publish("t", BLOCKS, 32)
        reading.cancel.set()
        owner.node.publish("t", BLOCKS, TOKENS)
        fetched = wanted.result(60)
    assert reader.staged(fetched.staged_id) == [owner.block(block) for block in BLOCKS]
    reader.node.discard(fetched.staged_id)
    with pytest.raises(FetchError, match="cancelled"):
        reading.future.result(60)


def test_a_fetch_waits_for_the_discard_of_what_was_staged_ahead(owner, reader):
    handle = stream(owner)
    owner.node.publish("t", BLOCKS, TOKENS)
    staged = reader.node.fetch(handle, 5.0, ahead=True)
    eventually(lambda: not owner.node.stats().leases_held)
    with ThreadPoolExecutor(1) as threads:
        wanted = threads.submit(reader.node.fetch, handle, 60.0)
        eventually(lambda: len(reader.node._changed._waiters) > 1)
        reader.node.discard(staged.staged_id)
        with pytest.raises(FetchError) as raised:
            wanted.result(60)
    assert raised.value.outcome is Outcome.STALE, "its lease was released when the bytes were in"


def test_a_fetch_does_not_wait_for_ever_for_one_that_goes_on(owner, reader):
    met(owner, reader)
    handle = stream(owner)
    reading = Reader(reader, handle)
    eventually(lambda: reading.looks)
    with pytest.raises(FetchError, match="does not end") as raised:
        reader.node.fetch(handle, 0.1)
    assert raised.value.outcome is Outcome.FAILED
    owner.node.withdraw("t")
    reading.fails(Outcome.STALE)


def test_reads_ahead_leave_half_of_the_pages(owner, reader):
    handles = [stream(owner, name) for name in ("t", "u")]
    met(owner, reader)
    reading = Reader(reader, handles[0])
    eventually(lambda: reading.looks)
    with pytest.raises(FetchError) as raised:
        reader.node.fetch(handles[1], 5.0, ahead=True)
    assert raised.value.outcome is Outcome.FULL
    owner.node.withdraw("t"), owner.node.withdraw("u")
    reading.fails(Outcome.STALE)


def test_who_is_waited_for_comes_in_between_two_pieces_of_what_streams(owner, reader):
    met(owner, reader)
    handle, wanted = stream(owner), owner.offer("wanted", blocks=(20,))
    owner.node.publish("t", BLOCKS, 64)
    blocks_read: list[int] = []
    reading, go_on = threading.Event(), threading.Event()

    def note(event: ReadEvent) -> None:
        if event.done and event.segments.remote_region == ARENA:
            size = owner.layout.segment_bytes
            blocks_read.append(int(event.segments.remote[0]) % (32 * size) // size)
            reading.set()
            go_on.wait(60)

    reader.inproc.hook = note
    with ThreadPoolExecutor(2) as threads:
        ahead = threads.submit(reader.node.fetch, handle, 60.0, ahead=True)
        assert reading.wait(60)
        asked = threads.submit(reader.node.fetch, wanted, 60.0)
        wire_ = reader.node._roster.wires[0]
        eventually(lambda: len(wire_.turn._queue) == 2)
        go_on.set()
        reader.node.discard(asked.result(60).staged_id)
        owner.node.publish("t", BLOCKS, TOKENS)
        reader.node.discard(ahead.result(60).staged_id)
    order = list(dict.fromkeys(blocks_read))
    assert order.index(20) == 1, order


def test_a_fetch_waits_for_the_pages_of_a_cancelled_one(owner, reader):
    met(owner, reader)
    reading = Reader(reader, stream(owner))
    owner.node.publish("t", BLOCKS, 16)
    reading.has_read(1)
    in_mid_piece, go_on = threading.Event(), threading.Event()

    def stop() -> None:
        in_mid_piece.set()
        go_on.wait(60)

    reader.during_read(stop)
    owner.node.publish("t", BLOCKS, 32)
    assert in_mid_piece.wait(60)
    reading.cancel.set()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(reader.node.fetch, owner.offer("wanted", blocks=range(12)), 60.0)
        eventually(lambda: reader.node._changed._waiters)
        reader.inproc.hook = None
        go_on.set()
        fetched = waiting.result(60)
    with pytest.raises(FetchError, match="cancelled"):
        reading.future.result(60)
    reader.node.discard(fetched.staged_id)
    owner.node.withdraw("t")


# -- between processes


@pytest.fixture(params=["shm", "tcp", "nixl"])
def reader_there(request: pytest.FixtureRequest) -> Iterator[Party]:
    if request.param == "nixl":
        pytest.importorskip("nixl_cu12")
    party = open_party("d", make_transports([request.param]), limits=NodeLimits(piece_bytes=4096, self_test_bytes=1))
    yield party
    party.node.check_integrity()
    party.node.close()


def begun(reader: Party, owner: PeerProcess) -> Future[Fetched]:
    """A fetch of a stream of which two blocks are there, and in."""
    assert not reader.node.connect(peer="p1", address=owner.hello["address"]).refusal
    order = {"transfer_id": "t", "tenant": "acme", "reader": "d", "tokens": TOKENS, "ttl_s": 30.0}
    handle = bytes.fromhex(owner.call(do="stream", **order))
    owner.call(do="publish", transfer_id="t", block_ids=BLOCKS, tokens_ready=32)
    threads = ThreadPoolExecutor(1)
    fetch = threads.submit(reader.node.fetch, handle, 60.0, ahead=True)
    threads.shutdown(wait=False)
    first = [bytes.fromhex(owner.hello["blocks"][block]) for block in BLOCKS[:2]]
    transfers = reader.node._transfers._transfers

    def is_in() -> bool:
        pages = [page for transfer in list(transfers.values()) for page in transfer.pages[:2]]
        size = reader.layout.block_bytes
        return [reader.staging[page * size : (page + 1) * size].tobytes() for page in pages] == first

    eventually(is_in)
    return fetch


def test_a_stream_is_read_out_of_another_process(reader_there):
    with peer_process("node", reader_there.transports[0].name) as owner:
        fetch = begun(reader_there, owner)
        owner.call(do="publish", transfer_id="t", block_ids=BLOCKS, tokens_ready=TOKENS)
        fetched = fetch.result(60)
        blocks = [bytes.fromhex(owner.hello["blocks"][block]) for block in BLOCKS]
        assert reader_there.staged(fetched.staged_id) == blocks
        reader_there.node.discard(fetched.staged_id)
        eventually(lambda: owner.call(do="take_ended") == ["t"])


def test_an_owner_killed_while_it_computes_fails_the_fetch(reader_there):
    with peer_process("node", reader_there.transports[0].name) as owner:
        fetch = begun(reader_there, owner)
        owner.kill()
        with pytest.raises(FetchError) as raised:
            fetch.result(60)
        assert raised.value.outcome is Outcome.FAILED
    stats = reader_there.node.stats()
    assert (stats.staged_pages, stats.staging_pages_free + stats.quarantined_pages) == (0, 16)


# -- rows


def test_a_stream_that_no_row_has_room_for_is_refused(world):
    owner = world.open("p", limits=NodeLimits(blocks_per_row=4))
    with pytest.raises(OfferRefused, match="5 blocks"):
        stream(owner)


def test_a_reader_with_shorter_rows_says_so(world, owner):
    reader = world.open("d", limits=NodeLimits(blocks_per_row=4))
    with pytest.raises(FetchError, match="do not fit in a row") as raised:
        reader.node.fetch(stream(owner), 5.0)
    assert raised.value.outcome is Outcome.REFUSED
    owner.node.withdraw("t")


def test_a_row_that_names_blocks_outside_the_arena_is_not_followed(owner, reader):
    met(owner, reader)
    handle = stream(owner)
    owner.node._leases.publish(0.0, "t", [99, 4], 32)
    with pytest.raises(FetchError, match="block 99 of an arena with 32") as raised:
        reader.node.fetch(handle, 20.0)
    assert raised.value.outcome is Outcome.FAILED
    owner.node.withdraw("t")


def test_a_chunk_that_is_foretold_for_after_the_deadline_is_not_waited_for(owner, reader, monkeypatch):
    met(owner, reader)
    handle = stream(owner)
    owner.node.publish("t", BLOCKS, 32)
    monkeypatch.setattr(Pace, "pause_s", lambda self, now: 3600.0)
    with pytest.raises(FetchError, match="deadline"):
        reader.node.fetch(handle, 0.2, ahead=True)
    owner.node.withdraw("t")


# -- how often it looks


@pytest.fixture
def pace() -> Pace:
    """Of a row that has grown by 8 blocks at 10.0, and at 10.4."""
    pace = Pace()
    pace.looked(10.0, 8, 100)
    pace.looked(10.4, 8, 92)
    return pace


def test_it_looks_seldom_while_a_chunk_is_computed_and_often_when_one_is_due(pace: Pace) -> None:
    assert pace.pause_s(10.4) == pytest.approx(0.4 * 15 / 16)
    assert pace.pause_s(10.79) == pytest.approx(0.4 / 128)
    assert pace.pause_s(14.0) == 0.05, "a chunk that is late is waited for with less haste"


def test_a_look_that_found_several_chunks_does_not_make_it_look_less_often(pace: Pace) -> None:
    pace.looked(11.2, 16, 76)
    assert pace.pause_s(11.2) == pytest.approx(0.4 * 15 / 16)


def test_a_look_that_came_late_does_not_make_the_next_one_late(pace: Pace) -> None:
    pace.looked(11.0, 8, 84)
    assert pace.pause_s(11.0) == pytest.approx(0.2 - 0.4 / 16)


def test_chunks_that_take_longer_are_foretold_from_the_last(pace: Pace) -> None:
    pace.looked(10.84, 0, 92)
    pace.looked(10.841, 8, 84)
    assert pace.pause_s(10.84) == pytest.approx(0.44 * 15 / 16)


def test_chunks_that_take_less_are_found_out(pace: Pace) -> None:
    """The engine has twice the speed from here on."""
    grew_at = now = 10.4
    late_s: list[float] = []
    while len(late_s) < 10:
        now += pace.pause_s(now)
        chunks = int((now - grew_at) / 0.2)
        pace.looked(now, 8 * chunks, 84)
        grew_at += 0.2 * chunks
        late_s += [now - grew_at] if chunks else []
    assert max(late_s[-3:]) < 0.01


def test_a_chunk_that_was_held_up_does_not_hold_up_the_next(pace: Pace) -> None:
    pace.looked(11.99, 0, 92)
    pace.looked(12.0, 8, 84)
    assert pace.pause_s(12.0) <= 0.4 * 1.25


def test_a_stall_before_the_second_chunk_does_not_put_off_the_third() -> None:
    pace = Pace()
    pace.looked(10.0, 8, 100)
    pace.looked(40.0, 8, 92)
    assert pace.pause_s(40.0) <= 1.0


def test_the_last_chunk_is_due_earlier_when_it_is_small(pace: Pace) -> None:
    pace.looked(10.8, 8, 2)
    assert pace.pause_s(10.8) == pytest.approx(0.1 - 0.4 / 16)


def test_it_never_spins():
    pace = Pace()
    assert all(pace.pause_s(now / 1000) >= 0.00025 for now in range(100))
    pace.looked(1.0, 1, 10)
    pace.looked(1.000001, 1, 9)
    assert all(pace.pause_s(1.0 + now / 1e6) >= 0.00025 for now in range(100))


def test_it_looks_often_at_first_and_then_less():
    pace = Pace()
    pauses = [pace.pause_s(0.0) for _ in range(20)]
    assert pauses == sorted(pauses)
    assert 0.001 <= pauses[0] < 0.002
    assert pauses[-1] <= 0.05
