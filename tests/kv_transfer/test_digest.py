"""kv_verify: bytes that are not the owner's never reach an engine, whatever altered them, and the fetch says so."""

from __future__ import annotations

import logging

import pytest

from kv_transfer.api import FetchError, NodeLimits, Outcome
from kv_transfer.board import Board
from kv_transfer.digest import BlockDigests, page_map
from kv_transfer.transport import ARENA, Region
from tests.kv_transfer.memory import allocate, block_major, layer_major, layout, pattern, region
from tests.kv_transfer.nodes import Party, World, eventually

SMALL_PIECES = NodeLimits(piece_bytes=4096, self_test_bytes=1)


@pytest.fixture
def owner(world: World) -> Party:
    return world.open("p", verify=True)


@pytest.fixture
def reader(owner: Party, world: World) -> Party:
    reader = world.open("d", verify=True, limits=SMALL_PIECES)
    reader.node.connect(peer="p", address=owner.node.address)
    return reader


def flip(owner: Party, block: int, byte: int = 5) -> None:
    owner.arena[owner.where.block_stride * block + byte] ^= 1


def is_corrupt(reader: Party, handle: bytes) -> str:
    with pytest.raises(FetchError) as raised:
        reader.node.fetch(handle, 20.0)
    assert raised.value.outcome is Outcome.CORRUPT
    stats = reader.node.stats()
    assert (stats.staged_pages, stats.transfers_corrupt_total, stats.transfer_failures_total) == (0, 1, 1)
    return raised.value.detail


def test_blocks_that_are_as_they_were_offered_are_staged(owner, reader):
    fetched = reader.node.fetch(owner.offer(blocks=(3, 4, 9), tokens=40), 20.0)
    assert reader.staged(fetched.staged_id) == [owner.block(block) for block in (3, 4, 9)]
    reader.node.discard(fetched.staged_id)


def test_a_bit_that_flips_in_the_owners_memory_is_found_and_told(owner, reader, caplog):
    handle = owner.offer(blocks=(3, 4, 9))
    flip(owner, 9)
    with caplog.at_level(logging.ERROR, "kv_transfer.node"):
        detail = is_corrupt(reader, handle)
    assert detail == "1 of 3 blocks of t are not as p had them (inproc)"
    assert detail in caplog.text
    eventually(lambda: owner.node.take_ended() == ["t"])


def test_a_bit_that_flips_behind_the_last_token_is_found_too(owner, reader):
    handle = owner.offer(blocks=(3, 4), tokens=17)
    flip(owner, 4, byte=owner.layout.segment_bytes - 1)
    is_corrupt(reader, handle)


def test_a_byte_that_is_altered_on_the_way_is_found(owner, reader):
    reader.corrupt_one_byte()
    is_corrupt(reader, owner.offer(blocks=(3, 4)))


def test_without_digests_nobody_would_know(world):
    owner, reader = world.open("p"), world.open("d")
    reader.node.connect(peer="p", address=owner.node.address)
    reader.corrupt_one_byte()
    fetched = reader.node.fetch(owner.offer(blocks=(3, 4)), 20.0)
    assert reader.staged(fetched.staged_id) != [owner.block(3), owner.block(4)]
    reader.node.discard(fetched.staged_id)


@pytest.mark.parametrize("flipped", [None, 3, 4, 2, 11])
def test_blocks_that_are_read_while_they_are_computed_are_compared_too(owner, reader, flipped):
    """A block may be written until it is published, and not after that."""
    blocks = (3, 4, 9, 2, 11)
    handle = owner.node.stream(transfer_id="t", tenant="", reader="d", tokens=69, ttl_s=30)
    corrupt = flipped is not None
    for tokens, whole in ((40, 2), (64, 4), (69, 5)):
        for block in blocks[whole:]:
            flip(owner, block, byte=7)
        owner.node.publish("t", blocks, tokens)
        if flipped in blocks[:whole]:
            flip(owner, flipped)
            flipped = None
    if corrupt:
        is_corrupt(reader, handle)
    else:
        reader.node.discard(reader.node.fetch(handle, 20.0).staged_id)


def test_a_lease_that_ended_is_stale_and_not_corrupt(owner, reader):
    reader.during_read(lambda: (owner.node.cancel("t"), owner.overwrite(9)))
    with pytest.raises(FetchError) as raised:
        reader.node.fetch(owner.offer(), 20.0)
    assert raised.value.outcome is Outcome.STALE


def test_a_reader_that_verifies_wants_an_owner_that_makes_digests(world, reader):
    other = world.open("other")
    assert (
        reader.node.connect(peer="other", address=other.node.address).refusal
        == "other makes no digests: kv_verify is on here, off there"
    )


def test_a_reader_that_does_not_verify_reads_from_one_that_makes_digests(world, owner):
    reader = world.open("e")
    handle = owner.offer()
    flip(owner, 9)
    reader.node.discard(reader.node.fetch(handle, 20.0).staged_id)


def test_there_are_no_digests_of_device_memory():
    from kv_transfer.inproc import InprocHub, InprocTransport
    from kv_transfer.node import KvNode

    lay = layout()
    where, arena = layer_major(lay, 4), allocate(4 * lay.block_bytes)
    node = KvNode(
        name="g",
        incarnation="i",
        layout=lay,
        model="m",
        secret=b"s",
        transports=[InprocTransport(InprocHub())],
        verify=True,
    )
    on_gpu = Region(ARENA, int(arena.ctypes.data), arena.nbytes, "cuda:0")
    with pytest.raises(ValueError, match="kv_verify: digests are of host memory, arena is on cuda:0"):
        node.open(arena=on_gpu, arena_map=where, staging=region("staging", arena), staging_pages=4)
    node.close()


def test_a_block_has_one_digest_however_its_segments_lie():
    lay = layout()
    blocks = pattern(1, 4 * lay.block_bytes).reshape(4, lay.block_bytes)
    found = []
    for where in (layer_major(lay, 4), block_major(lay, 4)):
        arena = allocate(4 * lay.block_bytes)
        for block in range(4):
            for segment in range(lay.segments_per_block):
                at = block * where.block_stride + segment * where.segment_stride
                begin = segment * lay.segment_bytes
                arena[at : at + lay.segment_bytes] = blocks[block, begin : begin + lay.segment_bytes]
        found.append(BlockDigests(region(ARENA, arena), lay, where).of(range(4)))
    pages = allocate(4 * lay.block_bytes)
    pages[:] = blocks.ravel()
    found.append(BlockDigests(region("staging", pages), lay, page_map(lay, 4)).of(range(4)))
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 4


@pytest.mark.parametrize("blocks_per_row", [1, 2, 7, 4096])
def test_rows_have_room_for_both_ids_and_digests(blocks_per_row):
    board = Board(2, blocks_per_row, 1, digests=True)
    ids, digests = list(range(blocks_per_row)), [(1 << 64) - 1 - block for block in range(blocks_per_row)]
    board.publish(0, 1, ids, 1, digests)
    board.publish(1, 1, ids, 1, digests[::-1])
    assert board._ids[0].tolist() == board._ids[1].tolist() == ids
    assert board._digests is not None
    assert board._digests[0].tolist() == digests
    start = board.row_offset(1) + board.digests_offset
    assert board._memory[start : start + 8 * blocks_per_row].view("u8").tolist() == digests[::-1]


def test_nodes_without_kv_verify_spend_no_memory_on_it():
    assert Board(2, 100, 1).nbytes < Board(2, 100, 1, digests=True).nbytes
