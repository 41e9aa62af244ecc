"""The index of prefixes is bounded, follows use, and never joins tenants that do not share a salt."""

from __future__ import annotations

from random import Random

import pytest

from router.core.prefix import PrefixIndex
from router.core.salt import cache_salt
from router.core.tenant import Tenant

PROMPT = tuple(range(1000))


def test_it_finds_the_longest_known_beginning() -> None:
    index = PrefixIndex(chunk_tokens=100)
    index.learn(index.prefix(b"s", PROMPT), "w1", 10_000)
    index.learn(index.prefix(b"s", PROMPT[:250]), "w2", 10_000)
    other = (*PROMPT[:520], *range(5000, 5480))
    assert index.holders(index.prefix(b"s", other)) == {"w1": 500, "w2": 200}
    assert index.holders(index.prefix(b"s", tuple(range(7, 1007)))) == {}


def test_salts_never_meet() -> None:
    index = PrefixIndex(chunk_tokens=100)
    index.learn(index.prefix(b"one", PROMPT), "w1", 10_000)
    assert index.holders(index.prefix(b"two", PROMPT)) == {}
    assert index.holders(index.prefix(b"", PROMPT)) == {}
    assert index.holders(index.prefix(b"\0", PROMPT)) != index.holders(index.prefix(b"one", PROMPT))


def test_a_sharing_group_has_one_salt_and_everyone_else_has_their_own() -> None:
    one, two, alone = Tenant(id="one", sharing_group="g"), Tenant(id="two", sharing_group="g"), Tenant(id="g")
    assert cache_salt(b"k", one) == cache_salt(b"k", two)
    assert len({cache_salt(b"k", one), cache_salt(b"k", alone), cache_salt(b"k", Tenant(id="one"))}) == 3
    assert cache_salt(b"k", one) != cache_salt(b"other", one)


def test_a_worker_that_left_is_forgotten() -> None:
    index = PrefixIndex(chunk_tokens=100)
    index.learn(index.prefix(b"s", PROMPT), "w1", 10_000)
    index.forget("w1")
    index.forget("w1")
    assert len(index) == 0


@pytest.mark.parametrize("seed", range(3))
def test_it_stays_within_its_bounds(seed: int) -> None:
    random, index = Random(seed), PrefixIndex(chunk_tokens=10, chunks_max=5, holders_max=3)
    for _ in range(2000):
        prompt = tuple(random.randint(0, 1) for _ in range(random.randint(0, 80)))
        prefix = index.prefix(b"s", prompt)
        assert len(prefix) <= 5
        worker = f"w{random.randint(0, 6)}"
        if random.random() < 0.02:
            index.forget(worker)
        else:
            index.learn(prefix, worker, 200)
            assert all(len(held) <= 20 for held in index._held.values())
        index.check_integrity()
