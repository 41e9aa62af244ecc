"""Which bytes a read moves, against the same thing said byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.segments import ArenaMap, block_segments, check_bounds, merge, one_segment, pieces
from kv_transfer.transport import ARENA, STAGING, Segments, TransportError
from tests.kv_transfer.memory import block_bytes, block_major, layer_major, layout, pattern

BLOCKS, PAGES = 12, 10


def _moves(segments: Segments) -> dict[int, int]:
    """Every byte moved, as destination -> source."""
    moves: dict[int, int] = {}
    for remote, local, size in zip(segments.remote, segments.local, segments.sizes, strict=True):
        for i in range(int(size)):
            assert int(local) + i not in moves, "a byte is written twice"
            moves[int(local) + i] = int(remote) + i
    return moves


some_layouts = st.builds(layout, segment_bytes=st.sampled_from([1, 3, 8]), segments_per_block=st.integers(1, 4))
some_reads = st.integers(1, PAGES).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, BLOCKS - 1), min_size=n, max_size=n),
        st.permutations(range(PAGES)).map(lambda pages: pages[:n]),
    )
)


@given(some_layouts, some_reads, st.sampled_from([layer_major, block_major]), st.integers(0, 5), st.integers(1, 40))
@settings(deadline=None)
def test_blocks_land_in_their_pages_whatever_the_arenas_order_and_the_pieces(lay, read, order, offset, piece_bytes):
    blocks, pages = read
    plain = order(lay, BLOCKS)
    where = ArenaMap(blocks=BLOCKS, segment_stride=plain.segment_stride, block_stride=plain.block_stride, offset=offset)
    arena = pattern(1, where.end(lay))
    staging = np.zeros(PAGES * lay.block_bytes, np.uint8)
    segments = block_segments(lay, where, blocks, pages)
    cut = list(pieces(segments, piece_bytes))
    assert all(piece.nbytes <= piece_bytes for piece in cut)
    moves: dict[int, int] = {}
    for piece in cut:
        moves |= _moves(piece)
    assert moves == _moves(segments)
    for destination, source in moves.items():
        staging[destination] = arena[source]
    for block, page in zip(blocks, pages, strict=True):
        got = staging[page * lay.block_bytes : (page + 1) * lay.block_bytes].tobytes()
        assert got == block_bytes(arena, lay, where, block)
    assert len(moves) == len(blocks) * lay.block_bytes


def test_neighbours_on_both_sides_become_one_descriptor():
    lay = layout(segments_per_block=4)
    segments = block_segments(lay, block_major(lay, 16), [3, 4, 5, 9], [0, 1, 2, 3])
    assert segments.sizes.tolist() == [3 * lay.block_bytes, lay.block_bytes]
    one_layer = layout(segments_per_block=1)
    assert block_segments(one_layer, layer_major(one_layer, 16), [1, 2, 3], [7, 8, 9]).sizes.size == 1


def test_neighbours_on_one_side_only_stay_apart():
    lay = layout(segments_per_block=1)
    assert block_segments(lay, block_major(lay, 16), [3, 4], [5, 7]).sizes.size == 2
    assert block_segments(lay, block_major(lay, 16), [3, 5], [5, 6]).sizes.size == 2


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 4)), max_size=12))
@settings(deadline=None)
def test_merging_changes_no_move(rows):
    columns = [np.array([row[i] for row in rows], np.uint64) for i in range(3)]
    segments = Segments(ARENA, STAGING, *columns)
    merged = merge(segments)

    def pairs(of: Segments) -> list[tuple[int, int]]:
        return [
            (int(remote) + i, int(local) + i)
            for remote, local, size in zip(of.remote, of.local, of.sizes, strict=True)
            for i in range(int(size))
        ]

    assert pairs(merged) == pairs(segments)


@pytest.mark.parametrize(
    ("remote", "local", "nbytes"),
    [(96, 0, 8), (0, 60, 8), (2**64 - 4, 0, 8), (0, 2**64 - 4, 8), (0, 0, 2**64 - 1), (101, 0, 0), (0, 0, 101)],
)
def test_bytes_outside_a_region_are_refused_without_wrapping_around(remote, local, nbytes):
    segments = one_segment(ARENA, remote, STAGING, local, nbytes)
    with pytest.raises(TransportError, match="lie outside"):
        check_bounds(segments, {ARENA: 100}, {STAGING: 64})


def test_the_last_byte_of_a_region_is_inside():
    check_bounds(one_segment(ARENA, 92, STAGING, 56, 8), {ARENA: 100}, {STAGING: 64})


def test_a_region_nobody_registered_is_refused():
    with pytest.raises(TransportError, match="'arena' is not registered"):
        check_bounds(one_segment(ARENA, 0, STAGING, 0, 8), {}, {STAGING: 64})


@pytest.mark.parametrize(
    ("where", "says"),
    [
        (ArenaMap(blocks=3, segment_stride=2048, block_stride=6144), "end at byte"),
        (ArenaMap(blocks=2, segment_stride=2048, block_stride=2048), "overlap"),
        (ArenaMap(blocks=0, segment_stride=2048, block_stride=6144), "blocks=0"),
        (ArenaMap(blocks=2, segment_stride=100, block_stride=6144), "overlap"),
        (ArenaMap(blocks=2, segment_stride=2048, block_stride=100), "block_stride=100"),
    ],
)
def test_a_map_that_cannot_be_right_is_named(where, says):
    lay = layout()
    assert says in where.difference(lay, 2 * lay.block_bytes)
    assert not block_major(lay, 2).difference(lay, 2 * lay.block_bytes)
