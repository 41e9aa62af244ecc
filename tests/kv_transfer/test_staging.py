"""Staging pages, against a set."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.staging import Staging


@given(st.integers(0, 24), st.data())
@settings(deadline=None)
def test_pages_are_free_or_in_use_never_both_and_never_lost(pages, data):
    staging = Staging(pages)
    taken: list[tuple[int, ...]] = []
    held: list[tuple[str, tuple[int, ...]]] = []
    for step in range(data.draw(st.integers(0, 30))):
        action = data.draw(st.sampled_from(["take", "give", "quarantine", "end"]))
        if action == "take":
            count = data.draw(st.integers(1, 8))
            got = staging.take(count)
            assert (got is None) == (count > pages - sum(len(p) for p in taken) - sum(len(p) for _, p in held))
            if got is not None:
                assert len(set(got)) == count
                taken.append(got)
        elif action == "give" and taken:
            staging.give_back(taken.pop(data.draw(st.integers(0, len(taken) - 1))))
        elif action == "quarantine" and taken:
            held.append((f"read {step}", taken.pop(data.draw(st.integers(0, len(taken) - 1)))))
            staging.quarantine(*held[-1])
        elif action == "end" and held:
            staging.end_quarantine(held.pop(data.draw(st.integers(0, len(held) - 1)))[0])
        staging.check_integrity(page for one in taken for page in one)
        assert staging.quarantined == sum(len(p) for _, p in held)


def test_a_run_is_kept_whole_where_there_is_one():
    staging = Staging(10)
    first, second, third = staging.take(3), staging.take(2), staging.take(5)
    assert first is not None
    assert third is not None
    staging.give_back(first)
    staging.give_back(third)
    assert staging.take(3) == (0, 1, 2), "the shortest run that is long enough"
    assert staging.take(5) == (5, 6, 7, 8, 9)
    assert second == (3, 4)


def test_scattered_pages_still_make_a_whole():
    staging = Staging(6)
    pages = [staging.take(1) for _ in range(6)]
    for page in pages[::2]:
        assert page is not None
        staging.give_back(page)
    assert sorted(staging.take(3) or ()) == [0, 2, 4]
    assert staging.take(1) is None


def test_giving_back_twice_is_a_defect_that_shows():
    staging = Staging(4)
    pages = staging.take(2)
    assert pages is not None
    staging.give_back(pages)
    with pytest.raises(AssertionError, match="free already"):
        staging.give_back(pages[:1])


def test_ending_an_unknown_quarantine_changes_nothing():
    staging = Staging(2)
    staging.end_quarantine("never was")
    staging.check_integrity(())
