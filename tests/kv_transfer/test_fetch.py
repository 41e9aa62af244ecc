"""A fetch between two nodes: what ends it in which way, and what is left afterwards (nothing)."""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kv_transfer import wire
from kv_transfer.api import FetchError, NodeLimits, Outcome
from kv_transfer.inproc import InprocHub, InprocTransport, ReadEvent
from kv_transfer.node import UnknownStaged
from kv_transfer.transport import ARENA, BOARD, PeerGone, ReadTimedOut, TransportError, Unquiesced
from kv_transfer.turn import Cancel
from tests.kv_transfer.memory import block_major, layout
from tests.kv_transfer.nodes import SECRET, Party, World, eventually, open_party

#: Small enough that a fetch of three blocks is several reads.
PIECES = NodeLimits(piece_bytes=4096, self_test_bytes=1)


@pytest.fixture
def owner(world: World) -> Party:
    return world.open("p")


@pytest.fixture
def reader(world: World) -> Party:
    return world.open("d", limits=PIECES)


def fetch_fails(reader: Party, handle: bytes, outcome: Outcome, timeout_s: float = 20.0) -> str:
    """The detail; nothing may be left of the fetch."""
    with pytest.raises(FetchError) as raised:
        reader.node.fetch(handle, timeout_s)
    assert raised.value.outcome is outcome, raised.value
    stats = reader.node.stats()
    assert (stats.staged_pages, stats.fetches_in_flight) == (0, 0)
    return raised.value.detail


def ended(owner: Party, transfer_id: str = "t") -> None:
    """The engine gets its blocks back, once."""
    taken: list[str] = []

    def is_back() -> bool:
        taken.extend(owner.node.take_ended())
        return bool(taken)

    eventually(is_back)
    assert taken == [transfer_id]
    assert owner.node.take_ended() == []


def pause(reader: Party) -> tuple[threading.Event, threading.Event]:
    """The next read stops in the middle: sets the first event, waits for the second."""
    reading, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        reading.set()
        go_on.wait(60)

    reader.during_read(wait)
    return reading, go_on


# -- staged


def test_the_blocks_arrive_and_the_lease_ends_by_itself(owner, reader):
    fetched = reader.node.fetch(owner.offer(blocks=(3, 4, 9)), 20.0)
    assert reader.staged(fetched.staged_id) == [owner.block(block) for block in (3, 4, 9)]
    assert (fetched.tokens, fetched.transport) == (48, "inproc")
    assert fetched.nbytes == 3 * owner.layout.block_bytes
    ended(owner)
    reader.node.discard(fetched.staged_id)
    stats = reader.node.stats()
    assert (stats.staged_pages, stats.staging_pages_free) == (0, 16)
    assert stats.fetch_outcomes == {Outcome.STAGED: 1}
    assert stats.transfer_bytes_total == fetched.nbytes


def test_a_partial_last_block_is_fetched_whole(owner, reader):
    fetched = reader.node.fetch(owner.offer(blocks=(1, 2), tokens=17), 20.0)
    assert fetched.tokens == 17
    assert reader.staged(fetched.staged_id) == [owner.block(1), owner.block(2)]
    reader.node.discard(fetched.staged_id)


def test_arenas_of_another_size_and_order_exchange_blocks(world):
    owner = world.open("p", blocks=50, where=block_major)
    reader = world.open("d", blocks=20)
    fetched = reader.node.fetch(owner.offer(blocks=(49, 0, 7)), 20.0)
    assert reader.staged(fetched.staged_id) == [owner.block(block) for block in (49, 0, 7)]
    reader.node.discard(fetched.staged_id)


def test_a_node_can_fetch_from_itself(owner):
    fetched = owner.node.fetch(owner.offer(blocks=(5,)), 20.0)
    assert owner.staged(fetched.staged_id) == [owner.block(5)]
    owner.node.discard(fetched.staged_id)


def test_corruption_on_the_way_shows_when_bytes_are_compared(owner, reader):
    reader.node.connect(peer="p", address=owner.node.address)
    reader.corrupt_one_byte()
    fetched = reader.node.fetch(owner.offer(blocks=(3, 4)), 20.0)
    assert reader.staged(fetched.staged_id) != [owner.block(3), owner.block(4)]
    reader.node.discard(fetched.staged_id)


# -- stale


def test_a_lease_that_the_owner_ends_in_mid_read_is_stale(owner, reader):
    handle = owner.offer()
    reader.node.connect(peer="p", address=owner.node.address)

    def reuse() -> None:
        owner.node.cancel("t")
        assert owner.node.take_ended() == ["t"]
        owner.overwrite(9)

    reader.during_read(reuse)
    assert "ended before its bytes were in" in fetch_fails(reader, handle, Outcome.STALE)


def test_a_lease_that_expires_in_mid_read_is_stale(owner, reader):
    reader.node.connect(peer="p", address=owner.node.address)
    reader.during_read(lambda: ended(owner))
    fetch_fails(reader, owner.offer(ttl_s=0.1), Outcome.STALE)


def test_a_lease_that_ends_after_the_last_byte_and_before_the_word_is_stale(owner, reader):
    reader.node.connect(peer="p", address=owner.node.address)
    reader.during_read(lambda: owner.node.cancel("t"), after_piece=5)
    fetch_fails(reader, owner.offer(), Outcome.STALE)


def test_a_lease_that_ends_after_the_word_was_read_was_held(owner, reader):
    reader.node.connect(peer="p", address=owner.node.address)
    reader.during_read(lambda: owner.node.cancel("t"), region=BOARD)
    fetched = reader.node.fetch(owner.offer(), 20.0)
    reader.node.discard(fetched.staged_id)


def test_an_owner_that_cannot_be_read_gets_its_lease_back_all_the_same(owner):
    reader = open_party("d", [InprocTransport(InprocHub())])
    try:
        assert "p is not in this process" in fetch_fails(reader, owner.offer(), Outcome.FAILED)
        ended(owner)
    finally:
        reader.node.close()


def test_a_meeting_leaves_most_pages_to_fetches(world, owner):
    reader = world.open("d")
    lent = []
    reader.during_read(lambda: lent.append(reader.node.stats().staged_pages))
    assert not reader.node.connect(peer="p", address=owner.node.address).refusal
    assert lent == [4], "of 16, where a self-test could use more"


def test_a_fetch_that_takes_long_keeps_the_lease(world, owner):
    limits = NodeLimits(piece_bytes=4096, self_test_bytes=1, extend_after_s=0.01)
    reader = world.open("d", limits=limits)
    reader.node.connect(peer="p", address=owner.node.address)
    reads = 0

    def slow(event: ReadEvent) -> None:
        nonlocal reads
        if not event.done or event.segments.remote_region != ARENA:
            return
        reads += 1
        if reads == 1:
            time.sleep(0.02)  # longer than it keeps quiet
        elif reads == 2:  # it has asked for more time
            eventually(lambda: owner.node._leases.next_deadline() > offered_until)

    reader.inproc.hook = slow
    handle = owner.offer(ttl_s=5.0)
    offered_until = owner.node._leases.next_deadline()
    fetched = reader.node.fetch(handle, 60.0)
    reader.node.discard(fetched.staged_id)
    assert owner.node.stats().leases_expired_total == 0


def test_an_expired_handle_is_stale(owner, reader):
    handle = owner.offer(ttl_s=0.01)
    ended(owner)
    fetch_fails(reader, handle, Outcome.STALE)


def test_the_rows_next_lease_does_not_confirm_the_last_one(world, reader):
    owner = world.open("p", limits=NodeLimits(rows=1))
    first = owner.offer("t")
    owner.node.cancel("t")
    owner.node.take_ended()
    second = owner.offer("u", blocks=(1, 2))
    fetch_fails(reader, first, Outcome.STALE)
    fetched = reader.node.fetch(second, 20.0)
    reader.node.discard(fetched.staged_id)


# -- refused


def test_a_handle_for_another_reader_is_refused_and_its_lease_stands(owner, reader):
    handle = owner.offer(reader="d2")
    assert "made for 'd2', this is 'd'" in fetch_fails(reader, handle, Outcome.REFUSED)
    assert owner.node.stats().leases_held == 1


def test_a_tampered_handle_is_refused(owner, reader):
    handle = bytearray(owner.offer())
    handle[5] ^= 1
    fetch_fails(reader, bytes(handle), Outcome.REFUSED)
    fetch_fails(reader, b"", Outcome.REFUSED)
    assert not owner.node.release(bytes(handle))
    assert owner.node.stats().leases_held == 1


def test_a_handle_is_good_for_one_fetch(owner, reader):
    handle = owner.offer()
    fetched = reader.node.fetch(handle, 20.0)
    with pytest.raises(FetchError, match="used before"):
        reader.node.fetch(handle, 20.0)
    assert reader.staged(fetched.staged_id) == [owner.block(block) for block in (3, 4, 9)]
    reader.node.discard(fetched.staged_id)
    assert "used before" in fetch_fails(reader, handle, Outcome.REFUSED)


@pytest.mark.parametrize(
    ("field", "theirs"),
    [
        ("block_tokens", 32),
        ("dtype", "bfloat16"),
        ("revision", "r2"),
        ("isa", "amx"),
        ("tensor_parallel", 2),
        ("engine", "vllm 0.32.0"),
        ("layers", 6),
        ("kv_heads", 8),
        ("head_dim", 128),
        ("order", "BLHNC"),
        ("segment_bytes", 4096),
    ],
)
def test_nodes_that_cannot_exchange_blocks_are_told_why_when_they_meet(world, owner, field, theirs):
    other = world.open("d", lay=layout(**{field: theirs}))
    lane = other.node.connect(peer="p", address=owner.node.address)
    assert lane.refusal == f"the layout of p differs: {field}: {theirs} here, {getattr(owner.layout, field)} there"
    assert not lane.transport


def test_another_layout_is_refused_by_its_digest_and_named_when_they_meet(world, owner):
    reader = world.open("d", lay=layout(dtype="bfloat16", revision="r2"))
    fetch_fails(reader, owner.offer(), Outcome.REFUSED)
    lane = reader.node.connect(peer="p", address=owner.node.address)
    assert "dtype: bfloat16 here, uint8 there" in lane.refusal
    assert "revision: r2 here, r1 there" in lane.refusal
    assert lane in reader.node.stats().lanes


@pytest.mark.parametrize(
    ("change", "says"), [({"block_ids": (1, 2, 32)}, "block 32 of an arena with 32"), ({"row": 999}, "row 999")]
)
def test_what_the_owner_does_not_have_is_refused(owner, reader, change, says):
    handle = wire.unseal(owner.offer(), SECRET)
    forged = wire.seal(dataclasses.replace(handle, **change), SECRET)
    assert says in fetch_fails(reader, forged, Outcome.REFUSED)


# -- full


def test_a_full_staging_is_said_and_the_handle_stays_good(owner, reader):
    first = reader.node.fetch(owner.offer("t", blocks=range(12)), 20.0)
    second = owner.offer("u", blocks=range(12, 20))
    with pytest.raises(FetchError, match="8 pages; 4 of 16 are free") as raised:
        reader.node.fetch(second, 20.0)
    assert raised.value.outcome is Outcome.FULL
    reader.node.discard(first.staged_id)
    fetched = reader.node.fetch(second, 20.0)
    assert reader.staged(fetched.staged_id)[0] == owner.block(12)
    reader.node.discard(fetched.staged_id)


def test_more_fetches_than_allowed_at_once_are_answered_full(world, owner):
    reader = world.open("d", limits=NodeLimits(fetches=1, self_test_bytes=1))
    reader.node.connect(peer="p", address=owner.node.address)
    reading, go_on = pause(reader)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(reader.node.fetch, owner.offer("t"), 20.0)
        assert reading.wait(60)
        second = owner.offer("u")
        with pytest.raises(FetchError, match="1 fetches are under way"):
            reader.node.fetch(second, 20.0)
        go_on.set()
        reader.node.discard(first.result().staged_id)
    reader.node.discard(reader.node.fetch(second, 20.0).staged_id)


# -- failed


def test_an_owner_that_is_gone_fails_the_fetch(owner, reader):
    handle = owner.offer()
    owner.node.close()
    assert "can't be reached" in fetch_fails(reader, handle, Outcome.FAILED)


def test_an_owner_that_goes_in_mid_read_fails_the_fetch_and_is_forgotten(world, owner, reader):
    reader.node.connect(peer="p", address=owner.node.address)
    reader.during_read(lambda: world.hub.remove(owner.inproc.export()))
    fetch_fails(reader, owner.offer(), Outcome.FAILED)
    assert reader.node.stats().lanes == ()
    ended(owner)


def test_an_owner_that_goes_before_the_word_is_read_fails_the_fetch(world, owner, reader):
    reader.node.connect(peer="p", address=owner.node.address)
    reader.during_read(lambda: world.hub.remove(owner.inproc.export()), after_piece=5)
    fetch_fails(reader, owner.offer(), Outcome.FAILED)


@pytest.mark.parametrize("error", [TransportError("a cable"), PeerGone("gone"), ReadTimedOut("late")])
def test_a_failed_read_ends_the_lease_at_the_owner_at_once(owner, reader, error):
    reader.node.connect(peer="p", address=owner.node.address)

    def fail() -> None:
        raise error

    reader.during_read(fail)
    assert str(error) in fetch_fails(reader, owner.offer(), Outcome.FAILED)
    ended(owner)
    fetched = reader.node.fetch(owner.offer("u"), 20.0)
    reader.node.discard(fetched.staged_id)


def test_a_read_past_its_deadline_fails(owner, reader):
    reader.node.connect(peer="p", address=owner.node.address)
    reader.during_read(lambda: time.sleep(0.2))
    assert "deadline" in fetch_fails(reader, owner.offer(), Outcome.FAILED, timeout_s=0.1)


def test_pages_of_a_read_that_may_go_on_return_when_it_is_over(owner, reader):
    reader.node.connect(peer="p", address=owner.node.address)
    over = threading.Event()

    def hang() -> None:
        raise Unquiesced("hangs", over.is_set)

    reader.during_read(hang)
    fetch_fails(reader, owner.offer(blocks=range(12)), Outcome.FAILED)
    assert reader.node.stats().quarantined_pages == 12
    # Not these pages, but others, from the same peer, met again.
    fetched = reader.node.fetch(owner.offer("u", blocks=range(4)), 20.0)
    reader.node.discard(fetched.staged_id)
    fetch_fails(reader, owner.offer("v", blocks=range(5)), Outcome.FULL)
    over.set()
    eventually(lambda: reader.node.stats().staging_pages_free == 16)
    assert reader.node.stats().quarantined_pages == 0


def test_a_defect_in_a_transport_keeps_the_pages_out_of_use(owner, reader):
    reader.node.connect(peer="p", address=owner.node.address)
    reader.during_read(lambda: [][0])
    with pytest.raises(IndexError):
        reader.node.fetch(owner.offer(), 20.0)
    assert reader.node.stats().quarantined_pages == 3
    ended(owner)


# -- cancelled


def test_a_cancelled_fetch_gives_its_pages_back_after_the_read_and_ends_the_lease(owner, reader):
    reader.node.connect(peer="p", address=owner.node.address)
    cancel, held_meanwhile = Cancel(), []

    def cancel_it() -> None:
        cancel.set()
        held_meanwhile.append(reader.node.stats().staged_pages)

    reader.during_read(cancel_it)
    with pytest.raises(FetchError, match="failed: cancelled"):
        reader.node.fetch(owner.offer(), 5.0, cancel)
    assert held_meanwhile == [3]
    assert reader.node.stats().staging_pages_free == 16
    ended(owner)


def test_a_cancel_that_comes_last_of_all_still_leaves_nothing_staged(owner, reader):
    reader.node.connect(peer="p", address=owner.node.address)
    cancel = Cancel()
    reader.during_read(cancel.set, region=BOARD)
    with pytest.raises(FetchError, match="cancelled"):
        reader.node.fetch(owner.offer(), 5.0, cancel)
    assert reader.node.stats().staged_pages == 0


def test_a_fetch_that_waits_for_its_turn_is_cancelled_at_once(owner, reader):
    reader.node.connect(peer="p", address=owner.node.address)
    reading, go_on = pause(reader)
    cancel = Cancel()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(reader.node.fetch, owner.offer("t"), 60.0)
        assert reading.wait(60)
        second = threads.submit(reader.node.fetch, owner.offer("u"), 10.0, cancel)
        eventually(lambda: reader.node.stats().fetches_in_flight == 2)
        cancel.set()
        with pytest.raises(FetchError, match="cancelled"):
            second.result(5)
        assert not first.done()
        go_on.set()
        reader.node.discard(first.result().staged_id)


def test_a_fetch_that_waits_for_its_turn_too_long_fails(owner, reader):
    reader.node.connect(peer="p", address=owner.node.address)
    reading, go_on = pause(reader)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(reader.node.fetch, owner.offer("t"), 60.0)
        assert reading.wait(60)
        with pytest.raises(FetchError, match="other transfers were under way"):
            reader.node.fetch(owner.offer("u"), 0.05)
        go_on.set()
        reader.node.discard(first.result().staged_id)


def test_discarding_what_is_being_fetched_cancels_it(owner, reader):
    handle = owner.offer()
    staged_id = wire.unseal(handle, SECRET).staged_id
    reader.node.connect(peer="p", address=owner.node.address)
    reader.during_read(lambda: reader.node.discard(staged_id))
    assert "cancelled" in fetch_fails(reader, handle, Outcome.FAILED)


# -- after it is staged


def test_only_who_claimed_the_pages_gives_them_back(owner, reader):
    fetched = reader.node.fetch(owner.offer(), 20.0)
    pages = reader.node.claim(fetched.staged_id)
    assert pages == reader.node.pages(fetched.staged_id)
    assert reader.node.claim(fetched.staged_id) == (), "claimed once"
    reader.node.discard(fetched.staged_id)
    assert reader.node.stats().staged_pages == 3
    reader.node.consumed(fetched.staged_id)
    reader.node.consumed(fetched.staged_id)
    assert reader.node.stats().staging_pages_free == 16


def test_discard_may_come_twice_or_for_nothing(owner, reader):
    fetched = reader.node.fetch(owner.offer(), 20.0)
    reader.node.consumed(fetched.staged_id)
    assert reader.node.stats().staged_pages == 3, "not claimed, so not the engine's to give back"
    reader.node.discard(fetched.staged_id)
    reader.node.discard(fetched.staged_id)
    reader.node.discard("never was")
    with pytest.raises(UnknownStaged):
        reader.node.pages(fetched.staged_id)
    assert reader.node.claim(fetched.staged_id) == ()


# -- peers


def test_a_restarted_owner_is_met_again_and_its_former_handles_are_stale(world, reader):
    owner = world.open("p")
    port = int(owner.node.address.rpartition(":")[2])
    former = owner.offer("t")
    reader.node.discard(reader.node.fetch(owner.offer("u"), 20.0).staged_id)
    owner.node.close()
    again = world.open("p", incarnation="i2", port=port)
    fetched = reader.node.fetch(again.offer("t"), 20.0)
    assert reader.staged(fetched.staged_id) == [again.block(block) for block in (3, 4, 9)]
    reader.node.discard(fetched.staged_id)
    assert "has restarted" in fetch_fails(reader, former, Outcome.STALE)
    assert len(reader.node.stats().lanes) == 1
    assert not again.node.release(former)


def test_the_peer_used_least_recently_is_forgotten_and_met_again(world):
    reader = world.open("d", limits=NodeLimits(peers=1))
    owners = [world.open(name) for name in ("p1", "p2")]
    for round_ in range(3):
        for owner in owners:
            fetched = reader.node.fetch(owner.offer(f"t{round_}"), 20.0)
            reader.node.discard(fetched.staged_id)
            assert [lane.peer for lane in reader.node.stats().lanes] == [owner.node.name]


def test_meeting_measures_the_lane(owner, reader):
    lane = reader.node.connect(peer="p", address=owner.node.address)
    assert (lane.transport, lane.refusal) == ("inproc", "")
    assert lane.gigabytes_per_s > 0
    assert reader.node.stats().lanes == (lane,)
    assert reader.node.connect(peer="p", address=owner.node.address) == lane


def test_meeting_works_without_any_staging_room(world, owner):
    reader = world.open("d", pages=0)
    assert reader.node.connect(peer="p", address=owner.node.address).transport == "inproc"


@pytest.mark.parametrize(
    ("options", "peer", "says"),
    [
        ({"secret": b"other"}, "p", "another cluster's secret"),
        ({}, "p2", "there is 'p', not 'p2'"),
    ],
)
def test_a_peer_that_is_not_who_it_should_be_is_refused_with_the_reason(world, owner, options, peer, says):
    reader = world.open("d", **options)
    assert says in reader.node.connect(peer=peer, address=owner.node.address).refusal


def test_nobody_at_the_address_is_said(world, reader):
    assert "can't be reached" in reader.node.connect(peer="p", address="127.0.0.1:9").refusal


def test_a_refusal_is_forgotten_when_the_two_meet_after_all(world, reader):
    owner = world.open("p")
    reader.node.connect(peer="p", address="127.0.0.1:9")
    reader.node.connect(peer="p", address=owner.node.address)
    assert [lane.refusal for lane in reader.node.stats().lanes] == [""]


class Renamed(InprocTransport):
    def __init__(self, world: World, name: str, broken: bool = False) -> None:
        super().__init__(world.hub)
        self.name = name
        self.broken = broken

    def connect(self, peer: str, incarnation: str, exported: bytes) -> None:
        if self.broken:
            raise TransportError("no such cable")
        super().connect(peer, incarnation, exported)


def _open_with(world: World, name: str, *transports: Renamed) -> Party:
    from tests.kv_transfer.nodes import open_party

    party = open_party(name, transports)
    world.parties.append(party)
    return party


def test_the_first_transport_in_common_is_used_and_the_next_when_it_fails(world):
    owner = _open_with(world, "p", Renamed(world, "b"), Renamed(world, "a"), Renamed(world, "c"))
    first = _open_with(world, "d1", Renamed(world, "x"), Renamed(world, "a"), Renamed(world, "b"))
    assert first.node.connect(peer="p", address=owner.node.address).transport == "a"
    second = _open_with(world, "d2", Renamed(world, "a", broken=True), Renamed(world, "b"))
    assert second.node.connect(peer="p", address=owner.node.address).transport == "b"
    third = _open_with(world, "d3", Renamed(world, "a", broken=True))
    assert "a: no such cable" in third.node.connect(peer="p", address=owner.node.address).refusal
    fourth = _open_with(world, "d4", Renamed(world, "x"))
    assert "x here, a, b, c there" in fourth.node.connect(peer="p", address=owner.node.address).refusal


def test_a_read_of_the_board_is_all_that_a_fetch_adds(owner, reader):
    """The order is the protocol: every byte of the blocks, then the word, and nothing after it."""
    reader.node.connect(peer="p", address=owner.node.address)
    regions: list[str] = []
    reader.inproc.hook = lambda event: regions.append(event.segments.remote_region) if event.done else None
    reader.node.discard(reader.node.fetch(owner.offer(), 20.0).staged_id)
    assert regions[-1] == BOARD
    assert set(regions[:-1]) == {ARENA}


def test_a_read_of_the_word_that_may_go_on_keeps_its_scratch_too(world, owner):
    """Late bytes there could be a word that has ended meanwhile, and confirm another fetch."""
    reader = world.open("d", limits=NodeLimits(fetches=1, self_test_bytes=1))
    reader.node.connect(peer="p", address=owner.node.address)
    over = threading.Event()

    def hang() -> None:
        raise Unquiesced("hangs", over.is_set)

    reader.during_read(hang, region=BOARD)
    fetch_fails(reader, owner.offer(), Outcome.FAILED)
    fetch_fails(reader, owner.offer("u"), Outcome.FULL)
    over.set()
    eventually(lambda: reader.node.stats().quarantined_pages == 0)
    reader.node.discard(reader.node.fetch(owner.offer("v"), 20.0).staged_id)
