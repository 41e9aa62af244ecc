"""The whole hand-off, without threads, in every order hypothesis can think of.

An owner with few blocks leases them, some while it computes them, loses control messages, expires, and reuses blocks at
the first moment it may. A reader copies block by block, while all that goes on, and confirms by the word. Whatever it
stages must be the bytes that were offered. The last test takes the confirmation away and expects the same machine to
find wrong bytes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kv_transfer.api import OfferRefused
from kv_transfer.board import Board, new_word
from kv_transfer.lease import LeaseTable, Transfer, TransferEvent, TransferState, TransferTable
from kv_transfer.staging import Staging

BLOCKS, PAGES, ROWS = 6, 6, 3


@dataclass
class Offer:
    transfer_id: str
    row: int
    word: int
    blocks: list[int]
    content: list[int]
    #: Its blocks are on the board from the beginning.
    at_once: bool = True


@dataclass
class Fetch:
    offer: Offer
    transfer: Transfer
    #: Blocks that it may read, and has read.
    ready: int = 0
    copied: int = 0


@dataclass
class Owner:
    board: Board = field(default_factory=lambda: Board(ROWS, BLOCKS, 0))
    arena: list[int] = field(default_factory=lambda: [0] * BLOCKS)
    free: list[int] = field(default_factory=lambda: list(range(BLOCKS)))

    def __post_init__(self) -> None:
        self.leases = LeaseTable(self.board, new_word, ttl_s_max=100.0)
        self.leased: dict[str, list[int]] = {}
        #: Legs that compute, and how many of their blocks they have computed.
        self.computing: dict[str, int] = {}


class HandOff(RuleBasedStateMachine):
    confirms = True

    def __init__(self) -> None:
        super().__init__()
        self.owner = Owner()
        self.now = 0.0
        self.numbers = itertools.count(1)
        self.transfers = TransferTable(Staging(PAGES), used_max=100)
        self.staging = [0] * PAGES
        self.offers: list[Offer] = []
        self.fetches: list[Fetch] = []
        self.staged: list[Fetch] = []
        self.mail: list[tuple[int, int]] = []

    # the owner

    @rule(count=st.integers(1, 3), ttl=st.floats(0.5, 20.0))
    def prefill(self, count, ttl):
        owner = self.owner
        if len(owner.free) < count:
            return
        blocks = [owner.free.pop() for _ in range(count)]
        content = [next(self.numbers) for _ in blocks]
        for block, value in zip(blocks, content, strict=True):
            owner.arena[block] = value
        name = f"t{len(self.offers)}"
        try:
            lease = owner.leases.offer(self.now, name, blocks, tokens=count, ttl_s=ttl)
        except OfferRefused:
            owner.free += blocks
            return
        owner.leased[name] = blocks
        self.offers.append(Offer(name, lease.row, lease.word, blocks, content))

    @rule(count=st.integers(1, 4), ttl=st.floats(0.5, 20.0))
    def begin_prefill(self, count, ttl):
        owner = self.owner
        if len(owner.free) < count:
            return
        name = f"t{len(self.offers)}"
        try:
            lease = owner.leases.stream(self.now, name, blocks=count, tokens=count, ttl_s=ttl)
        except OfferRefused:
            return
        blocks = [owner.free.pop() for _ in range(count)]
        content = [next(self.numbers) for _ in blocks]
        owner.leased[name], owner.computing[name] = blocks, 0
        self.offers.append(Offer(name, lease.row, lease.word, blocks, content, at_once=False))

    @precondition(lambda self: self.owner.computing)
    @rule(data=st.data(), chunk=st.integers(1, 3))
    def compute(self, data, chunk):
        owner = self.owner
        name = data.draw(st.sampled_from(sorted(owner.computing)))
        offer = next(offer for offer in self.offers if offer.transfer_id == name)
        begin, end = owner.computing[name], min(owner.computing[name] + chunk, len(offer.blocks))
        for block, value in zip(offer.blocks[begin:end], offer.content[begin:end], strict=True):
            owner.arena[block] = value
        owner.computing[name] = end
        owner.leases.publish(self.now, name, offer.blocks[:end], tokens_ready=end)
        if end == len(offer.blocks):
            del owner.computing[name]

    @precondition(lambda self: self.owner.computing)
    @rule(data=st.data())
    def abort(self, data):
        """Or preempt: the engine gives the blocks of a leg that computes to another in the same step."""
        owner = self.owner
        name = data.draw(st.sampled_from(sorted(owner.computing)))
        del owner.computing[name]
        owner.leases.withdraw(name)
        for block in owner.leased.pop(name):
            owner.free.append(block)
            owner.arena[block] = -next(self.numbers)

    @rule()
    def step(self):
        """The engine's step: blocks of ended leases are written over at once."""
        self.owner.leases.expire(self.now)
        for name in self.owner.leases.take_ended():
            for block in self.owner.leased.pop(name):
                assert block not in self.owner.free, "a block is freed twice"
                self.owner.free.append(block)
                self.owner.arena[block] = -next(self.numbers)

    @rule(data=st.data())
    def cancel_lease(self, data):
        done = [offer for offer in self.offers if offer.transfer_id not in self.owner.computing]
        if done:
            self.owner.leases.cancel(data.draw(st.sampled_from(done)).transfer_id)

    @rule(seconds=st.floats(0.1, 8.0))
    def wait(self, seconds):
        self.now += seconds

    @rule(data=st.data(), keep=st.booleans())
    def deliver(self, data, keep):
        """A control message arrives; keeping it makes it arrive again."""
        if not self.mail:
            return
        message = data.draw(st.sampled_from(self.mail))
        if not keep:
            self.mail.remove(message)
        self.owner.leases.release(self.now, *message)

    # the reader

    @rule(data=st.data())
    def begin(self, data):
        fresh = [o for o in self.offers if f"{o.transfer_id}" not in self.transfers._used]
        if not fresh:
            return
        offer = data.draw(st.sampled_from(fresh))
        transfer = self.transfers.begin(offer.transfer_id, len(offer.blocks))
        if transfer.state is TransferState.FETCHING:
            self.fetches.append(Fetch(offer, transfer, ready=len(offer.blocks) if offer.at_once else 0))

    @precondition(lambda self: any(not f.offer.at_once for f in self.fetches))
    @rule(data=st.data())
    def look(self, data):
        """Of a row that grows: the counts now, the ids when they are needed."""
        fetch = data.draw(st.sampled_from([f for f in self.fetches if not f.offer.at_once]))
        if fetch.transfer.state is not TransferState.FETCHING:
            return
        board, offer = self.owner.board, fetch.offer
        if board.word(offer.row) == offer.word or not self.confirms:
            fetch.ready = min(int(board._counts[offer.row, 1]), len(offer.blocks))
        else:
            self.transfers.apply(fetch.transfer, TransferEvent.WORD_GONE)
            self.fetches.remove(fetch)

    @precondition(lambda self: self.fetches)
    @rule(data=st.data())
    def copy_one(self, data):
        fetch = data.draw(st.sampled_from(self.fetches))
        if fetch.copied == fetch.ready:
            return
        offer, board = fetch.offer, self.owner.board
        page = fetch.transfer.pages[fetch.copied]
        block = offer.blocks[fetch.copied] if offer.at_once else int(board._ids[offer.row, fetch.copied])
        self.staging[page] = self.owner.arena[block]
        fetch.copied += 1
        if fetch.copied == len(fetch.offer.blocks):
            self.transfers.apply(fetch.transfer, TransferEvent.BYTES_IN)

    @precondition(lambda self: any(f.transfer.state is TransferState.CONFIRMING for f in self.fetches))
    @rule(data=st.data())
    def confirm(self, data):
        fetch = data.draw(st.sampled_from([f for f in self.fetches if f.transfer.state is TransferState.CONFIRMING]))
        held = self.owner.board.word(fetch.offer.row) == fetch.offer.word or not self.confirms
        self.transfers.apply(fetch.transfer, TransferEvent.WORD_HELD if held else TransferEvent.WORD_GONE)
        self.fetches.remove(fetch)
        self.mail.append((fetch.offer.row, fetch.offer.word))
        if held:
            self.staged.append(fetch)

    @precondition(lambda self: self.fetches)
    @rule(data=st.data(), event=st.sampled_from([TransferEvent.LOST, TransferEvent.CANCEL]))
    def fail(self, data, event):
        fetch = data.draw(st.sampled_from(self.fetches))
        self.transfers.apply(fetch.transfer, event)
        self.fetches.remove(fetch)
        self.mail.append((fetch.offer.row, fetch.offer.word))

    @precondition(lambda self: self.staged)
    @rule(data=st.data(), discard=st.booleans())
    def use(self, data, discard):
        fetch = data.draw(st.sampled_from(self.staged))
        self.staged.remove(fetch)
        if discard:
            self.transfers.apply(fetch.transfer, TransferEvent.DISCARD)
            return
        self.transfers.apply(fetch.transfer, TransferEvent.CLAIM)
        self.transfers.apply(fetch.transfer, TransferEvent.CONSUME)

    # what must hold

    @invariant()
    def staged_bytes_are_the_offered_bytes(self):
        for fetch in self.staged:
            assert [self.staging[page] for page in fetch.transfer.pages] == fetch.offer.content

    @invariant()
    def nothing_is_lost(self):
        self.owner.leases.check_integrity()
        self.transfers.check_integrity()
        leased = [block for blocks in self.owner.leased.values() for block in blocks]
        assert sorted(self.owner.free + leased) == list(range(BLOCKS))

    def teardown(self):
        """Every path ends with the blocks and pages free."""
        for fetch in self.fetches:
            self.transfers.apply(fetch.transfer, TransferEvent.CANCEL)
        for fetch in self.staged:
            self.transfers.apply(fetch.transfer, TransferEvent.DISCARD)
        for name in list(self.owner.computing):
            self.owner.leases.withdraw(name)
            self.owner.free += self.owner.leased.pop(name)
        self.now += 1000
        self.step()
        assert sorted(self.owner.free) == list(range(BLOCKS))
        assert self.transfers.staging.free == PAGES


HandOff.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestHandOff = HandOff.TestCase


def test_without_the_confirmation_wrong_bytes_get_through():
    class Unconfirmed(HandOff):
        confirms = False

    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            Unconfirmed,
            settings=settings(
                max_examples=2000,
                stateful_step_count=50,
                deadline=None,
                database=None,
                derandomize=True,
                print_blob=False,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
