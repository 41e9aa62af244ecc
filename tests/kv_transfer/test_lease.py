"""The owner's lease and the reader's transfer, event by event, and against a dumb model."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kv_transfer.api import OfferRefused
from kv_transfer.board import HEADER, Board, RowHeader, id_offset, new_word
from kv_transfer.lease import (
    LEASE_TABLE,
    TRANSFER_TABLE,
    AlreadyUsed,
    LeaseEvent,
    LeaseState,
    LeaseTable,
    ProtocolError,
    TransferEvent,
    TransferState,
    TransferTable,
)
from kv_transfer.staging import Staging


@pytest.fixture
def board():
    return Board(rows=3, blocks_per_row=4, scratch_slots=1)


@pytest.fixture
def leases(board):
    words = itertools.count(100)
    table = LeaseTable(board, lambda: next(words), ttl_s_max=60.0)
    yield table
    table.check_integrity()


# -- the board


def test_a_row_says_word_counts_and_blocks(board):
    board.publish(1, word=77, block_ids=[4, 5], tokens=20)
    start = board.row_offset(1)
    raw = board._memory[start : start + board.row_bytes].tobytes()
    assert RowHeader.parse(raw[: HEADER.size]) == RowHeader(word=77, tokens_ready=20, blocks_ready=2)
    assert raw[16:24] == (4).to_bytes(4, "little") + (5).to_bytes(4, "little")
    board.withdraw(1)
    assert board.word(1) == 0


def test_rows_start_on_cache_lines_and_words_can_be_written_at_once(board):
    assert board.address % 64 == 0
    assert board.row_bytes % 64 == 0


def test_words_are_never_zero_and_fit_63_bits():
    assert all(0 < new_word() < 1 << 63 for _ in range(100))


def test_a_row_grows_by_ids_and_counts_and_keeps_its_word(board):
    board.publish(1, word=77, block_ids=[], tokens=0)
    assert board.word(1) == 77
    board.grow(1, 0, [4], tokens=16)
    board.grow(1, 1, [9, 2], tokens=40)
    start = board.row_offset(1)
    raw = board._memory[start : start + board.row_bytes]
    assert RowHeader.parse(raw[: HEADER.size].tobytes()) == RowHeader(word=77, tokens_ready=40, blocks_ready=3)
    assert raw[id_offset(0) : id_offset(3)].view("u4").tolist() == [4, 9, 2]


# -- the owner


def test_a_lease_ends_at_its_deadline_and_the_engine_hears_of_it_once(leases, board):
    lease = leases.offer(0.0, "a", [1, 2], tokens=20, ttl_s=5.0)
    assert board.word(lease.row) == lease.word
    assert leases.next_deadline() == 5.0
    assert leases.expire(4.9) == 0
    assert leases.expire(5.0) == 1
    assert board.word(lease.row) == 0
    assert leases.take_ended() == ["a"]
    assert leases.take_ended() == []
    assert leases.next_deadline() is None


def test_release_wins_once_and_everything_after_it_is_answered_ended(leases):
    lease = leases.offer(0.0, "a", [1], tokens=5, ttl_s=5.0)
    assert leases.release(1.0, lease.row, lease.word)
    assert not leases.release(1.0, lease.row, lease.word)
    assert leases.extend(1.0, lease.row, lease.word, 9.0) is None
    assert not leases.cancel("a")
    assert leases.expire(100.0) == 0
    assert leases.take_ended() == ["a"]


def test_a_release_that_comes_after_the_deadline_finds_the_lease_expired(leases):
    lease = leases.offer(0.0, "a", [1], tokens=5, ttl_s=5.0)
    assert not leases.release(5.0, lease.row, lease.word)
    assert leases.counts.ended[LeaseState.EXPIRED] == 1


def test_a_late_release_does_not_end_the_rows_next_lease(leases):
    first = leases.offer(0.0, "a", [1], tokens=5, ttl_s=1.0)
    leases.expire(1.0)
    leases.take_ended()
    others = [leases.offer(2.0, name, [1], tokens=5, ttl_s=9.0) for name in "bcd"]
    assert first.row in {lease.row for lease in others}
    assert not leases.release(3.0, first.row, first.word)
    assert leases.held == 3


def test_extending_moves_the_deadline_out_but_never_in_and_not_past_the_limit(leases):
    lease = leases.offer(0.0, "a", [1], tokens=5, ttl_s=10.0)
    assert leases.extend(1.0, lease.row, lease.word, 2.0) == 10.0
    assert leases.extend(5.0, lease.row, lease.word, 20.0) == 25.0
    assert leases.extend(5.0, lease.row, lease.word, 1e9) == 65.0
    assert leases.expire(64.9) == 0
    assert leases.expire(65.0) == 1


def test_extending_for_ever_does_not_grow_anything(leases):
    lease = leases.offer(0.0, "a", [1], tokens=5, ttl_s=10.0)
    for step in range(1000):
        leases.extend(step * 0.01, lease.row, lease.word, 10.0)
    assert len(leases._deadlines) <= 7


def test_a_row_stays_taken_until_the_engine_has_taken_the_end(leases):
    for name in "abc":
        leases.offer(0.0, name, [1], tokens=5, ttl_s=1.0)
    leases.expire(1.0)
    with pytest.raises(OfferRefused, match="all 3 rows"):
        leases.offer(2.0, "d", [1], tokens=5, ttl_s=1.0)
    assert leases.take_ended() == ["a", "b", "c"]
    leases.offer(2.0, "d", [1], tokens=5, ttl_s=1.0)


@pytest.mark.parametrize("blocks", [[], [1, 2, 3, 4, 5]])
def test_a_lease_of_no_blocks_or_too_many_is_refused(leases, blocks):
    with pytest.raises(OfferRefused, match="1 to 4"):
        leases.offer(0.0, "a", blocks, tokens=5, ttl_s=1.0)


def test_a_transfer_is_offered_once_at_a_time(leases):
    leases.offer(0.0, "a", [1], tokens=5, ttl_s=1.0)
    with pytest.raises(OfferRefused, match="offered already"):
        leases.offer(0.5, "a", [1], tokens=5, ttl_s=1.0)
    leases.expire(1.0)
    with pytest.raises(OfferRefused, match="offered already"):
        leases.offer(1.0, "a", [1], tokens=5, ttl_s=1.0)
    leases.take_ended()
    leases.offer(1.0, "a", [1], tokens=5, ttl_s=1.0)


def test_closing_ends_every_lease(leases, board):
    held = [leases.offer(0.0, name, [1], tokens=5, ttl_s=9.0) for name in "abc"]
    leases.cancel_all()
    assert all(board.word(lease.row) == 0 for lease in held)
    assert sorted(leases.take_ended()) == ["a", "b", "c"]


def test_rows_and_words_that_never_were_are_answered_ended(leases):
    lease = leases.offer(0.0, "a", [1], tokens=5, ttl_s=9.0)
    assert not leases.release(0.0, lease.row, lease.word + 1)
    assert not leases.release(0.0, 99, lease.word)
    assert not leases.release(0.0, -1, lease.word)
    assert leases.held == 1


def test_every_state_of_a_lease_answers_every_event_but_more_blocks_than_all():
    too_late = {(LeaseState.OFFERED, LeaseEvent.PUBLISH), (LeaseState.OFFERED, LeaseEvent.COMPLETE)}
    assert set(LEASE_TABLE) == set(itertools.product(LeaseState, LeaseEvent)) - too_late


def test_a_stream_has_no_deadline_before_it_is_complete(leases, board):
    lease = leases.stream(0.0, "a", blocks=2, tokens=20, ttl_s=5.0)
    assert board.word(lease.row) == lease.word
    assert leases.publish(3.0, "a", [7], tokens_ready=16)
    assert leases.next_deadline() is None
    assert leases.expire(1e6) == 0
    assert leases.publish(9.0, "a", [7, 8], tokens_ready=20)
    assert leases.next_deadline() == 14.0
    assert leases.release(10.0, lease.row, lease.word)
    assert leases.take_ended() == ["a"]


def test_readers_can_neither_end_nor_extend_a_stream(leases, board):
    lease = leases.stream(0.0, "a", blocks=2, tokens=20, ttl_s=5.0)
    assert not leases.release(1.0, lease.row, lease.word)
    assert leases.extend(1.0, lease.row, lease.word, 60.0) == float("inf")
    assert board.word(lease.row) == lease.word
    leases.publish(2.0, "a", [7, 8], tokens_ready=20)
    assert leases.next_deadline() == 7.0


def test_a_stream_that_is_withdrawn_is_gone_at_once_and_its_id_free(leases, board):
    lease = leases.stream(0.0, "a", blocks=2, tokens=20, ttl_s=5.0)
    leases.publish(1.0, "a", [7], tokens_ready=16)
    assert leases.withdraw("a")
    assert board.word(lease.row) == 0
    assert not leases.publish(2.0, "a", [7, 8], tokens_ready=20)
    assert not leases.withdraw("a")
    assert leases.take_ended() == []
    leases.offer(3.0, "a", [7, 8], tokens=20, ttl_s=5.0)


def test_withdrawing_a_lease_that_has_ended_by_itself_takes_its_end(leases):
    leases.offer(0.0, "a", [1], tokens=5, ttl_s=1.0)
    leases.expire(1.0)
    assert leases.withdraw("a")
    assert leases.take_ended() == []


def test_nothing_can_be_published_after_the_last_block(leases):
    leases.stream(0.0, "a", blocks=1, tokens=5, ttl_s=5.0)
    leases.publish(0.0, "a", [1], tokens_ready=5)
    with pytest.raises(ProtocolError, match="COMPLETE in OFFERED"):
        leases.publish(0.0, "a", [1], tokens_ready=5)


def test_a_stream_needs_a_row_with_room_for_all_its_blocks(leases):
    with pytest.raises(OfferRefused, match="1 to 4"):
        leases.stream(0.0, "a", blocks=5, tokens=80, ttl_s=1.0)


# -- the reader


@pytest.fixture
def transfers():
    table = TransferTable(Staging(8), used_max=4)
    yield table
    table.check_integrity()


def test_a_transfer_that_is_confirmed_claimed_and_consumed_gives_its_pages_back(transfers):
    transfer = transfers.begin("a", 3)
    assert transfer.state is TransferState.FETCHING
    for event, state in [
        (TransferEvent.BYTES_IN, TransferState.CONFIRMING),
        (TransferEvent.WORD_HELD, TransferState.STAGED),
        (TransferEvent.CLAIM, TransferState.CLAIMED),
        (TransferEvent.DISCARD, TransferState.CLAIMED),
    ]:
        assert transfers.apply(transfer, event) is state
        assert transfers.held_pages == 3
    assert transfers.apply(transfer, TransferEvent.CONSUME) is TransferState.CONSUMED
    assert transfers.staging.free == 8


def test_bytes_are_not_staged_before_the_word_was_read(transfers):
    transfer = transfers.begin("a", 3)
    with pytest.raises(ProtocolError, match=r"ROOM FOUND FETCHING\? WORD_HELD"):
        transfers.apply(transfer, TransferEvent.WORD_HELD)


def test_a_handle_is_good_once_unless_staging_was_full(transfers):
    assert transfers.begin("a", 9).state is TransferState.FULL
    transfer = transfers.begin("a", 8)
    with pytest.raises(AlreadyUsed):
        transfers.begin("a", 1)
    transfers.apply(transfer, TransferEvent.LOST)
    with pytest.raises(AlreadyUsed):
        transfers.begin("a", 1)


def test_the_memory_of_used_handles_is_bounded(transfers):
    for name in "abcdef":
        transfers.apply(transfers.begin(name, 1), TransferEvent.LOST)
    assert list(transfers._used) == ["c", "d", "e", "f"]


def test_a_handle_in_use_is_refused_even_when_it_was_forgotten(transfers):
    transfer = transfers.begin("a", 1)
    for name in "bcdef":
        transfers.apply(transfers.begin(name, 1), TransferEvent.LOST)
    with pytest.raises(AlreadyUsed):
        transfers.begin("a", 1)
    transfers.apply(transfer, TransferEvent.LOST)


def test_pages_of_a_read_that_may_go_on_are_kept_from_the_next(transfers):
    transfer = transfers.begin("a", 6)
    transfers.apply(transfer, TransferEvent.LOST, quiesced=False)
    assert transfers.begin("b", 3).state is TransferState.FULL
    transfers.staging.end_quarantine(transfer.read)
    transfers.apply(transfers.begin("b", 3), TransferEvent.CANCEL)


def test_what_is_fetched_ahead_has_half_of_the_pages_at_most(transfers):
    first = transfers.begin("a", 3, ahead=True)
    assert transfers.begin("b", 2, ahead=True).state is TransferState.FULL
    second = transfers.begin("b", 1, ahead=True)
    wanted = transfers.begin("c", 4)
    assert wanted.state is TransferState.FETCHING
    for transfer in (first, second, wanted):
        transfers.apply(transfer, TransferEvent.CANCEL)


def test_a_handle_fetched_ahead_is_used_up_only_when_the_engine_has_the_bytes(transfers):
    lost = transfers.begin("a", 1, ahead=True)
    with pytest.raises(AlreadyUsed):
        transfers.begin("a", 1)
    transfers.apply(lost, TransferEvent.LOST)
    again = transfers.begin("a", 1, ahead=True)
    for event in (TransferEvent.BYTES_IN, TransferEvent.WORD_HELD, TransferEvent.CLAIM, TransferEvent.CONSUME):
        transfers.apply(again, event)
    with pytest.raises(AlreadyUsed):
        transfers.begin("a", 1)


def test_one_handles_two_reads_that_may_go_on_are_kept_apart(transfers):
    for _ in range(2):
        transfers.apply(transfers.begin("a", 2, ahead=True), TransferEvent.LOST, quiesced=False)
    assert transfers.staging.quarantined == 4


def test_a_transfer_that_is_over_knows_no_event():
    over = {TransferState.CONSUMED, TransferState.DISCARDED, TransferState.FULL, TransferState.STALE}
    assert not any(state in over | {TransferState.FAILED} for state, _ in TRANSFER_TABLE)
    assert set(TRANSFER_TABLE.values()) | {TransferState.ROOM} == set(TransferState)


# -- both, against a model


class LeaseModel(RuleBasedStateMachine):
    """The model: a dictionary of deadlines. Control messages name leases of any age, or none."""

    offered: Bundle[tuple[str, int, int]] = Bundle("offered")

    def __init__(self) -> None:
        super().__init__()
        self.board = Board(rows=4, blocks_per_row=4, scratch_slots=0)
        self.table = LeaseTable(self.board, new_word, ttl_s_max=30.0)
        self.now = 0.0
        self.names = itertools.count()
        self.deadlines: dict[str, float] = {}
        #: Blocks published of four, and the time it will have.
        self.streams: dict[str, tuple[int, float]] = {}
        self.row_of: dict[str, tuple[int, int]] = {}
        self.ended: list[str] = []
        self.taken: list[str] = []

    def _expire(self) -> None:
        for name, deadline in sorted(self.deadlines.items(), key=lambda item: item[1]):
            if deadline <= self.now:
                self._end(name)

    def _end(self, name: str) -> bool:
        held = self.deadlines.pop(name, None) is not None
        if held:
            self.ended.append(name)
        return held

    @property
    def _full(self) -> bool:
        return len(self.deadlines) + len(self.streams) + len(self.ended) == 4

    @rule(target=offered, ttl=st.floats(0.0, 40.0))
    def stream(self, ttl):
        name = f"t{next(self.names)}"
        self._expire()
        if self._full:
            with pytest.raises(OfferRefused):
                self.table.stream(self.now, name, blocks=4, tokens=8, ttl_s=ttl)
            return name, 0, 1
        lease = self.table.stream(self.now, name, blocks=4, tokens=8, ttl_s=ttl)
        self.streams[name] = 0, min(ttl, 30.0)
        self.row_of[name] = (lease.row, lease.word)
        return name, lease.row, lease.word

    @rule(lease=offered, blocks=st.integers(0, 4))
    def publish(self, lease, blocks):
        name = lease[0]
        if name in self.deadlines:
            with pytest.raises(ProtocolError):
                self.table.publish(self.now, name, range(4), tokens_ready=8)
        elif name not in self.streams:
            assert not self.table.publish(self.now, name, range(4), tokens_ready=8)
        else:
            before, ttl = self.streams[name]
            ready = max(before, blocks)
            assert self.table.publish(self.now, name, range(ready), tokens_ready=2 * ready)
            if ready < 4:
                self.streams[name] = ready, ttl
            else:
                del self.streams[name]
                self.deadlines[name] = self.now + ttl

    @rule(lease=offered)
    def withdraw(self, lease):
        name = lease[0]
        known = [names.pop(name, None) is not None for names in (self.streams, self.deadlines)]
        if name in self.ended:
            self.ended.remove(name)
            known.append(True)
        assert self.table.withdraw(name) == any(known)

    @rule(target=offered, ttl=st.floats(0.0, 40.0), blocks=st.integers(1, 4))
    def offer(self, ttl, blocks):
        name = f"t{next(self.names)}"
        self._expire()
        if self._full:
            with pytest.raises(OfferRefused):
                self.table.offer(self.now, name, range(blocks), tokens=1, ttl_s=ttl)
            return name, 0, 1
        lease = self.table.offer(self.now, name, range(blocks), tokens=1, ttl_s=ttl)
        self.deadlines[name] = self.now + min(ttl, 30.0)
        self.row_of[name] = (lease.row, lease.word)
        return name, lease.row, lease.word

    @rule(lease=offered)
    def release(self, lease):
        name, row, word = lease
        self._expire()
        assert self.table.release(self.now, row, word) == self._end(name)

    @rule(lease=offered, ttl=st.floats(0.0, 40.0))
    def extend(self, lease, ttl):
        name, row, word = lease
        self._expire()
        deadline = self.table.extend(self.now, row, word, ttl)
        if name in self.deadlines:
            self.deadlines[name] = max(self.deadlines[name], self.now + min(ttl, 30.0))
        assert deadline == self.deadlines.get(name, float("inf") if name in self.streams else None)

    @rule(lease=offered)
    def cancel(self, lease):
        name = lease[0]
        if self.streams.pop(name, None) is not None:
            self.ended.append(name)
            assert self.table.cancel(name)
        else:
            assert self.table.cancel(name) == self._end(name)

    @rule(row=st.integers(-1, 5), word=st.integers(0, 5))
    def stray_release(self, row, word):
        self._expire()
        assert not self.table.release(self.now, row, word)

    @rule(seconds=st.floats(0.0, 15.0))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def expire(self):
        held = len(self.deadlines)
        self._expire()
        assert self.table.expire(self.now) == held - len(self.deadlines)

    @rule()
    def take(self):
        taken = self.table.take_ended()
        assert sorted(taken) == sorted(self.ended)
        self.taken += taken
        self.ended = []

    @invariant()
    def agrees(self):
        self.table.check_integrity()
        assert self.table.held == len(self.deadlines) + len(self.streams)
        assert self.table.next_deadline() == min(self.deadlines.values(), default=None)
        assert len(self.taken) == len(set(self.taken)), "blocks are freed once"
        standing = {self.board.word(row) for row in range(4)} - {0}
        assert standing == {self.row_of[name][1] for name in (*self.deadlines, *self.streams)}
        counts = {name: int(self.board._counts[self.row_of[name][0], 1]) for name in self.streams}
        assert counts == {name: blocks for name, (blocks, _) in self.streams.items()}


LeaseModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLeaseModel = LeaseModel.TestCase


class TransferModel(RuleBasedStateMachine):
    """Any events in any order: pages are never lost, doubled or shared."""

    running: Bundle[object] = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.table = TransferTable(Staging(6), used_max=3)
        self.ids = itertools.count()
        self.quarantined: list[str] = []

    @rule(target=running, blocks=st.integers(1, 4), ahead=st.booleans())
    def begin(self, blocks, ahead):
        room = self.table.staging.free
        if ahead:
            room = min(room, 3 - self.table.ahead_pages)
        transfer = self.table.begin(f"s{next(self.ids)}", blocks, ahead=ahead)
        assert (transfer.state is TransferState.FULL) == (blocks > room)
        return transfer

    @rule(transfer=running, event=st.sampled_from(TransferEvent), quiesced=st.booleans())
    def event(self, transfer, event, quiesced):
        if (transfer.state, event) not in TRANSFER_TABLE:
            with pytest.raises(ProtocolError):
                self.table.apply(transfer, event)
            return
        had = len(transfer.pages)
        self.table.apply(transfer, event, quiesced=quiesced)
        if not quiesced and had and not transfer.pages:
            self.quarantined.append(transfer.read)

    @rule(transfer=consumes(running))
    def forget(self, transfer):
        pass

    @rule()
    def quiet(self):
        if self.quarantined:
            self.table.staging.end_quarantine(self.quarantined.pop())

    @invariant()
    def whole(self):
        self.table.check_integrity()


TransferModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestTransferModel = TransferModel.TestCase
