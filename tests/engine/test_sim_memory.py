"""Bytes decide tokens: what the simulated model reads, and what it can't fail to notice."""

import random
import sys

import numpy as np
import pytest

from engine.sim_memory import POISON, U64, Chain, ChainMemory
from tests.engine.reference import chain_values

VOCAB = 1000
CHAIN = Chain("revision", VOCAB)


def tokens(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(VOCAB) for _ in range(count)]


def values_of(token_ids: list[int], salt: str = "") -> U64:
    return CHAIN.run(CHAIN.seed(salt), np.array(token_ids, dtype=np.uint32))


def filled(memory: ChainMemory, blocks: list[int], token_ids: list[int]) -> U64:
    values = values_of(token_ids)
    memory.write(blocks, 0, values)
    return values


def attended(memory: ChainMemory, blocks: list[int], position: int) -> int:
    table = np.array([blocks], dtype=np.int32)
    return int(memory.attend(table, np.array([0]), np.array([position]))[0])


def test_the_chain_is_the_same_in_any_pieces() -> None:
    token_ids = tokens(10_000)
    whole = values_of(token_ids)
    assert whole.tolist() == chain_values(CHAIN, "", token_ids)
    before, start = CHAIN.seed(""), 0
    for size in (1, 2, 4095, 1, 4097, 1804):
        piece = CHAIN.run(before, np.array(token_ids[start : start + size], dtype=np.uint32))
        assert np.array_equal(piece, whole[start : start + size])
        before, start = int(piece[-1]), start + size
    stepped = CHAIN.next(whole[:-1], np.array(token_ids[1:]))
    assert np.array_equal(stepped, whole[1:])


def test_salt_revision_and_every_token_change_all_that_follows() -> None:
    token_ids = tokens(50)
    whole = values_of(token_ids)
    changed = token_ids.copy()
    changed[20] += 1
    others = [
        values_of(token_ids, "salt"),
        Chain("another", VOCAB).run(Chain("another", VOCAB).seed(""), np.array(token_ids, dtype=np.uint32)),
    ]
    assert not any((other == whole).any() for other in others)
    assert (values_of(changed) == whole).tolist() == [True] * 20 + [False] * 30


@pytest.mark.parametrize(("block_tokens", "bytes_per_token"), [(16, 8), (32, 2048), (8, 4104), (16, 327_680)])
def test_what_is_attended_does_not_depend_on_where_it_lies(block_tokens: int, bytes_per_token: int) -> None:
    token_ids = tokens(200)
    memory = ChainMemory(blocks=40, block_tokens=block_tokens, bytes_per_token=bytes_per_token)
    blocks = random.Random(1).sample(range(40), -(-200 // block_tokens))
    filled(memory, blocks, token_ids)
    plain = ChainMemory(blocks=13, block_tokens=16, bytes_per_token=64)
    filled(plain, list(range(13)), token_ids)
    for position in (0, 1, 15, 16, 17, 100, 199):
        assert attended(memory, blocks, position) == attended(plain, list(range(13)), position)


def test_an_answer_reads_every_word_before_it() -> None:
    token_ids = tokens(600)
    memory = ChainMemory(blocks=38, block_tokens=16, bytes_per_token=64)
    blocks = list(range(38))
    filled(memory, blocks, token_ids)
    right = {position: attended(memory, blocks, position) for position in range(100, 600)}
    words = memory.arena.view(np.uint64)
    for word in random.Random(2).sample(range(64 * 8), 64):  # of the first 64 tokens
        words[word] ^= np.uint64(1)
        assert any(attended(memory, blocks, position) != bits for position, bits in right.items())
        words[word] ^= np.uint64(1)
    assert all(attended(memory, blocks, position) == bits for position, bits in right.items())


@pytest.mark.parametrize("wrong", ["missing", "swapped", "salt", "stale"])
def test_a_wrong_block_is_seen_at_the_next_token(wrong: str) -> None:
    token_ids = tokens(100)
    memory = ChainMemory(blocks=8, block_tokens=16, bytes_per_token=64)
    blocks = list(range(7))
    filled(memory, blocks, token_ids)
    right = attended(memory, blocks, 99)
    match wrong:
        case "missing":
            memory.scrub([2])
        case "swapped":
            blocks[1], blocks[3] = blocks[3], blocks[1]
        case "salt":
            memory.write([2], 0, values_of(token_ids, "another tenant's")[32:48])
        case "stale":
            memory.write([2], 0, values_of(tokens(100, seed=7))[32:48])
    assert attended(memory, blocks, 99) != right


@pytest.mark.parametrize(("bytes_per_token", "granule"), [(64, 1), (4096, 1), (8192, 4096), (131_072, 65_536)])
def test_a_wrong_byte_or_run_of_bytes_is_a_difference(bytes_per_token: int, granule: int) -> None:
    """`granule` is the shortest run that can't be wrong unseen; in the small layouts every single byte is seen."""
    token_ids = tokens(20)
    memory = ChainMemory(blocks=3, block_tokens=16, bytes_per_token=bytes_per_token)
    values = filled(memory, [2, 0], token_ids)
    assert memory.difference([2, 0], 0, values) == 0
    draw = random.Random(3)
    for _ in range(50):
        block, held = draw.choice([(2, 16), (0, 4)])
        start = block * memory.block_bytes + draw.randrange(held * bytes_per_token - granule + 1)
        kept = memory.arena[start : start + granule].copy()
        memory.arena[start : start + granule] ^= draw.randrange(1, 256)
        assert memory.difference([2, 0], 0, values) != 0
        memory.arena[start : start + granule] = kept
    assert memory.difference([2, 0], 5, values[5:]) == 0


def test_a_scrubbed_block_holds_nothing_of_before() -> None:
    memory = ChainMemory(blocks=2, block_tokens=16, bytes_per_token=128)
    filled(memory, [0, 1], tokens(32))
    memory.scrub([1])
    words = memory.arena.view(np.uint64).reshape(2, -1)
    assert (words[1] == POISON).all()
    assert not (words[0] == POISON).any()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_real_sizes_take_only_the_memory_that_is_written() -> None:
    """Llama-3-70B: 320 KiB per token, 1.3 million tokens."""
    memory = ChainMemory(blocks=40_000, block_tokens=32, bytes_per_token=327_680)
    assert memory.arena.nbytes > 400e9
    before = resident_bytes()
    values = filled(memory, list(range(100, 132)), tokens(1024))
    assert memory.difference(list(range(100, 132)), 0, values) == 0
    assert resident_bytes() - before < 64e6


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def test_slots_are_whole_words() -> None:
    with pytest.raises(ValueError, match="multiple of 8, got 100"):
        ChainMemory(blocks=1, block_tokens=16, bytes_per_token=100)
