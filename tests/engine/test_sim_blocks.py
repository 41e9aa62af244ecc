"""Who holds which block, and what the prefix cache remembers."""

import numpy as np
import pytest

from engine.sim_blocks import BlockOwner, BlockPool, extend_digests, root_digest

ALICE = BlockOwner("alice", "salt-a")
BOB = BlockOwner("bob", "salt-b")


def digests_of(tokens: list[int], salt: str = "") -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, root_digest(salt), np.array(tokens, dtype=np.uint32), 4)
    return digests


def cache(pool: BlockPool, tokens: list[int], owner: BlockOwner) -> list[int]:
    """Takes, publishes and gives back the full blocks of a sequence."""
    digests = digests_of(tokens, owner.cache_salt)
    blocks, _ = pool.take(len(digests), owner)
    for block, digest in zip(blocks, digests, strict=True):
        pool.publish(block, digest)
    pool.give_back(blocks)
    return blocks


def test_a_prefix_is_found_up_to_the_first_difference() -> None:
    pool = BlockPool(8)
    blocks = cache(pool, list(range(12)), ALICE)
    assert pool.match(digests_of(list(range(12)), "salt-a")) == blocks
    assert pool.match(digests_of([*range(8), 99, 9, 10, 11], "salt-a")) == blocks[:2]
    assert pool.match(digests_of([99, *range(1, 12)], "salt-a")) == []
    assert pool.free == 8


def test_a_partly_filled_block_has_no_digest() -> None:
    assert len(digests_of(list(range(11)))) == 2
    assert digests_of(list(range(11))) == digests_of(list(range(8)))


def test_digests_extended_in_pieces_are_those_of_the_whole() -> None:
    grown: list[bytes] = []
    for end in (3, 4, 9, 10, 17):
        extend_digests(grown, root_digest(""), np.arange(end, dtype=np.uint32), 4)
    assert grown == digests_of(list(range(17)))


def test_salts_have_caches_of_their_own() -> None:
    pool = BlockPool(8)
    cache(pool, list(range(8)), ALICE)
    assert pool.match(digests_of(list(range(8)), "salt-b")) == []


def test_plain_blocks_go_first_then_the_least_recently_used_and_last_blocks_before_first() -> None:
    pool = BlockPool(5)
    old, new = cache(pool, list(range(8)), ALICE), cache(pool, list(range(100, 108)), ALICE)
    pool.hold(old)
    pool.give_back(old)  # used again
    (plain, *_), _ = pool.take(1, ALICE)
    assert plain not in old + new
    taken, _ = pool.take(3, ALICE)
    assert taken == [new[1], new[0], old[1]]
    assert pool.match(digests_of(list(range(8)), "salt-a")) == old[:1]
    pool.check_integrity([[plain], taken])


def test_holding_takes_a_cached_block_out_of_reach_until_the_last_reference_is_gone() -> None:
    pool = BlockPool(2)
    blocks = cache(pool, list(range(8)), ALICE)
    pool.hold(blocks)
    pool.hold(blocks[:1])
    assert pool.free == 0
    pool.give_back(blocks)
    assert pool.free == 1
    assert not pool.can_take(2)
    pool.give_back(blocks[:1])
    assert pool.can_take(2)
    assert not pool.can_take(1, beside=blocks)
    pool.check_integrity([])


def test_blocks_that_change_owner_are_named_once() -> None:
    pool = BlockPool(2)
    blocks, strangers = pool.take(2, ALICE)
    assert strangers == []  # never used before
    pool.give_back(blocks)
    blocks, strangers = pool.take(1, ALICE)
    assert strangers == []
    pool.give_back(blocks)
    blocks, strangers = pool.take(2, BOB)
    assert sorted(strangers) == [0, 1]
    pool.give_back(blocks)
    assert pool.take(2, BOB)[1] == []


def test_giving_back_twice_is_caught() -> None:
    pool = BlockPool(2)
    blocks, _ = pool.take(1, ALICE)
    pool.give_back(blocks)
    with pytest.raises(AssertionError, match="given back twice"):
        pool.give_back(blocks)
