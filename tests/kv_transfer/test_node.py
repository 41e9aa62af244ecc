"""The owner's side of a node, and its life."""

from __future__ import annotations

import threading

import grpc
import pytest

from kv_transfer import node
from kv_transfer.api import FetchError, NodeLimits, OfferRefused, Outcome
from kv_transfer.inproc import InprocHub, InprocTransport
from kv_transfer.node import KvNode
from kv_transfer.peer import PeerClient
from kv_transfer.segments import ArenaMap
from kv_transfer.transport import ARENA, STAGING, Region
from protos import kv_pb2, kv_pb2_grpc
from tests.kv_transfer.memory import allocate, layout, region
from tests.kv_transfer.nodes import SECRET, World, eventually, open_party


def test_a_lease_ends_on_time_though_the_engine_is_idle(world: World) -> None:
    woken = threading.Event()
    owner = world.open("p", on_ended=woken.set)
    owner.offer(ttl_s=0.05)
    assert woken.wait(60)
    assert owner.node.stats().leases_expired_total == 1
    assert owner.node.stats().leased_blocks == 0
    assert owner.node.take_ended() == ["t"]


def test_a_scheduler_that_cannot_be_woken_does_not_stop_leases_from_ending(world: World) -> None:
    def gone() -> None:
        raise RuntimeError("Event loop is closed")

    owner = world.open("p", on_ended=gone)
    owner.offer("a", ttl_s=0.02)
    eventually(lambda: owner.node.take_ended() == ["a"])
    owner.offer("b", ttl_s=0.02)
    eventually(lambda: owner.node.stats().leases_expired_total == 2)


def test_a_shorter_lease_offered_later_ends_first(world: World) -> None:
    owner = world.open("p")
    owner.offer("long", ttl_s=30)
    owner.offer("short", ttl_s=0.05)
    eventually(lambda: owner.node.take_ended() == ["short"])
    assert owner.node.stats().leases_held == 1


def test_release_by_handle_frees_exactly_once(world: World) -> None:
    woken = threading.Event()
    owner = world.open("p", on_ended=woken.set)
    handle = owner.offer()
    assert owner.node.release(handle)
    assert not owner.node.release(handle)
    assert woken.is_set()
    assert owner.node.take_ended() == ["t"]
    assert owner.node.take_ended() == []


def test_a_handle_of_another_node_or_life_releases_nothing(world: World) -> None:
    owner, other = world.open("p"), world.open("p", incarnation="i2")
    handle = owner.offer()
    other.offer()
    assert not other.node.release(handle)
    assert other.node.stats().leases_held == 1


def test_the_board_is_a_limit_that_names_itself(world: World) -> None:
    owner = world.open("p", limits=NodeLimits(rows=1, blocks_per_row=2))
    with pytest.raises(OfferRefused, match="3 blocks; a row holds 1 to 2"):
        owner.offer(blocks=(1, 2, 3))
    owner.offer(blocks=(1, 2))
    with pytest.raises(OfferRefused, match="all 1 rows"):
        owner.offer("u", blocks=(1,))


def _extend(address: str, handle: bytes, ttl_s: float) -> bool:
    with grpc.insecure_channel(address) as channel:
        request = kv_pb2.ExtendRequest(handle=kv_pb2.KvHandle.FromString(handle), ttl_s=ttl_s)
        return kv_pb2_grpc.KvPeerStub(channel).Extend(request, timeout=60.0).held


def test_a_peer_can_extend_a_lease(world: World) -> None:
    owner = world.open("p")
    handle = owner.offer(ttl_s=20.0)
    lease = owner.node._leases.find("t")
    assert lease is not None
    offered_until = lease.deadline
    assert _extend(owner.node.address, handle, 300.0)
    assert lease.deadline > offered_until + 200.0
    assert owner.node.take_ended() == []
    owner.node.cancel("t")
    assert not _extend(owner.node.address, handle, 30.0)


def test_a_forged_handle_moves_nothing(world: World) -> None:
    owner = world.open("p")
    message = kv_pb2.KvHandle.FromString(owner.offer())
    message.row += 1
    with pytest.raises(grpc.RpcError) as raised:
        _extend(owner.node.address, message.SerializeToString(), 1.0)
    assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert owner.node.stats().leases_held == 1


def test_a_release_that_gets_lost_costs_time_not_blocks(world: World) -> None:
    owner, reader = world.open("p"), world.open("d", limits=NodeLimits(releases_in_flight=0))
    assert not reader.node.connect(peer="p", address=owner.node.address).refusal
    reader.node.discard(reader.node.fetch(owner.offer(ttl_s=2.0), 20.0).staged_id)
    assert reader.node.stats().releases_lost_total == 1
    eventually(lambda: owner.node.take_ended() == ["t"])
    assert owner.node.stats().leases_expired_total == 1


def test_releases_that_could_not_be_sent_take_nobodys_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, reader = world.open("p"), world.open("d", limits=NodeLimits(releases_in_flight=1))
    assert not reader.node.connect(peer="p", address=owner.node.address).refusal

    def no_thread(*arguments: object) -> bool:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(PeerClient, "release", no_thread)
        reader.node.discard(reader.node.fetch(owner.offer("a"), 20.0).staged_id)
        eventually(lambda: reader.node.stats().releases_lost_total == 1)
    reader.node.discard(reader.node.fetch(owner.offer("b"), 20.0).staged_id)
    eventually(lambda: owner.node.take_ended() == ["b"])


def test_a_fetch_that_outlasts_the_nodes_end_fails_as_any_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_CLOSE_GRACE_S", 0.0)
    owner, reader = world.open("p"), world.open("d", limits=NodeLimits(piece_bytes=4096))
    reader.node.connect(peer="p", address=owner.node.address)
    handle, closing = owner.offer(), threading.Thread(target=reader.node.close)

    def close() -> None:
        closing.start()
        eventually(lambda: reader.node._courier._closed)

    reader.during_read(close)
    with pytest.raises(FetchError) as raised:
        reader.node.fetch(handle, 60.0)
    assert raised.value.outcome is Outcome.FAILED
    closing.join()
    assert reader.node.stats().fetches_in_flight == 0


def test_closing_ends_leases_and_fetches_and_may_come_twice(world: World) -> None:
    owner, reader = world.open("p"), world.open("d", limits=NodeLimits(piece_bytes=4096))
    reader.node.connect(peer="p", address=owner.node.address)
    handle, closing = owner.offer(), threading.Thread(target=reader.node.close)

    def close() -> None:
        closing.start()
        eventually(lambda: reader.node.closed)

    reader.during_read(close)
    with pytest.raises(FetchError) as raised:
        reader.node.fetch(handle, 20.0)
    assert raised.value.outcome is Outcome.FAILED
    closing.join()
    reader.node.close()
    with pytest.raises(FetchError, match="closed"):
        reader.node.fetch(owner.offer("u"), 20.0)
    owner.node.close()
    assert owner.node.stats().leases_held == 0
    assert all(owner.word(row) == 0 for row in range(256))


def test_an_owner_that_closes_in_mid_read_is_stale_or_gone_never_staged(world: World) -> None:
    owner, reader = world.open("p"), world.open("d", limits=NodeLimits(piece_bytes=4096))
    reader.node.connect(peer="p", address=owner.node.address)
    reader.during_read(owner.node.close)
    with pytest.raises(FetchError):
        reader.node.fetch(owner.offer(), 20.0)


def test_counts_come_back_to_nothing(world: World) -> None:
    owner, reader = world.open("p"), world.open("d")
    for number in range(20):
        fetched = reader.node.fetch(owner.offer(f"t{number}"), 20.0)
        reader.node.discard(fetched.staged_id)
    taken: list[str] = []

    def all_taken() -> bool:
        taken.extend(owner.node.take_ended())
        return len(taken) == 20

    eventually(all_taken)
    assert len(set(taken)) == 20
    stats = owner.node.stats()
    assert (stats.leases_held, stats.leased_blocks, stats.leases_ended_untaken) == (0, 0, 0)
    assert (stats.leases_offered_total, stats.leases_released_total) == (20, 20)
    assert reader.node.stats().staging_pages_free == 16


def _node(**changes: object) -> KvNode:
    facts: dict[str, object] = {
        "name": "n",
        "incarnation": "i",
        "layout": layout(),
        "model": "m",
        "secret": SECRET,
        "transports": [InprocTransport(InprocHub())],
    }
    return KvNode(**(facts | changes))  # type: ignore[arg-type]


def test_a_node_without_secret_or_transport_is_not_made():
    with pytest.raises(ValueError, match="secret"):
        _node(secret=b"")
    with pytest.raises(ValueError, match="transport"):
        _node(transports=[])


def test_memory_that_is_too_small_is_refused_by_name():
    lay = layout()
    memory = allocate(4 * lay.block_bytes)
    where = ArenaMap(blocks=4, segment_stride=lay.segment_bytes, block_stride=lay.block_bytes)
    node = _node()
    with pytest.raises(ValueError, match="5 pages"):
        node.open(arena=region(ARENA, memory), arena_map=where, staging=region(STAGING, memory), staging_pages=5)
    with pytest.raises(ValueError, match="end at byte"):
        node.open(
            arena=Region(ARENA, int(memory.ctypes.data), memory.nbytes - 1),
            arena_map=where,
            staging=region(STAGING, memory),
            staging_pages=1,
        )
    node.close()


def test_offers_and_addresses_need_an_open_node():
    node = _node()
    with pytest.raises(RuntimeError, match="not open"):
        node.offer(transfer_id="t", tenant="", reader="", block_ids=[1], tokens=1, ttl_s=1.0)
    node.close()


def test_a_port_in_use_is_an_error_at_start(world: World) -> None:
    port = int(world.open("p").node.address.rpartition(":")[2])
    with pytest.raises(RuntimeError):
        open_party("q", [InprocTransport(world.hub)], port=port)
