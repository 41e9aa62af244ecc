"""Rate limits hold exactly, whatever is reserved and given back in whatever order, and promised times are true."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.rate import Bucket, BusyRate

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.floats(0.0, 30.0), st.integers(1, 300)),
        st.tuples(st.just("refund"), st.floats(0.0, 30.0), st.floats(0.0, 1.0)),
    ),
    max_size=60,
)


@dataclass
class Level:
    """The dumb model: every reservation kept, the level computed again from the beginning each time."""

    rate: float
    burst: float
    #: (when, amount) in order of reservation; a refund lowers the amount of its reservation.
    taken: list[list[float]] = field(default_factory=list)

    def at(self, now: float) -> float:
        level, before = self.burst, 0.0
        for when, amount in self.taken:
            level = min(self.burst, level + (when - before) * self.rate) - amount
            before = when
        return min(self.burst, level + (now - before) * self.rate)


@given(STEPS, st.sampled_from([1.0, 7.0, 50.0]), st.sampled_from([60.0, 100.0]))
def test_the_level_is_that_of_a_bucket_refilled_step_by_step(
    steps: list[tuple[str, float, float]], rate: float, burst: float
) -> None:
    """With refunds it may be kinder than hindsight, by what was refunded at most, and is never above the brim."""
    bucket, model, now = Bucket(rate, burst), Level(rate, burst), 100.0
    reserved: list[tuple[list[float], int]] = []
    refunded = 0.0
    for kind, pause, amount in steps:
        now += pause
        if kind == "take":
            entry = [now, float(amount)]
            model.taken.append(entry)
            reserved.append((entry, bucket.take(now, amount)))
        elif reserved:
            entry, epoch = reserved.pop(0)
            unused = entry[1] * amount
            refunded += unused
            entry[1] -= unused
            bucket.give_back(unused, epoch)
        assert bucket.level(now) <= min(burst, model.at(now) + refunded) + 1e-6
        if not refunded:
            assert bucket.level(now) == pytest.approx(model.at(now), abs=1e-6)


@given(STEPS, st.integers(1, 300))
def test_the_time_promised_is_the_first_at_which_it_is_admitted(
    steps: list[tuple[str, float, float]], amount: int
) -> None:
    bucket, now = Bucket(5.0, 100.0), 1e6
    for _, pause, size in steps:
        now += pause
        if bucket.admits(now, size):
            bucket.take(now, size)
    at = max(now, bucket.admits_at(amount))
    assert bucket.admits(at, amount)
    assert at == now or not bucket.admits(at - 0.01, amount)


@given(st.lists(st.tuples(st.floats(0.0, 5.0), st.integers(1, 250)), max_size=80))
def test_no_window_sees_more_than_its_rate_and_a_burst(demands: list[tuple[float, int]]) -> None:
    bucket, now = Bucket(20.0, 100.0), 50.0
    admitted: list[tuple[float, int]] = []
    for pause, amount in demands:
        now += pause
        if bucket.admits(now, amount):
            bucket.take(now, amount)
            admitted.append((now, amount))
    for first, (since, _) in enumerate(admitted):
        total = 0
        for until, amount in admitted[first:]:
            # What is larger than a burst is admitted when the bucket is full, and the debt is paid before the next.
            assert total <= 20.0 * (until - since) + 100.0 + 1e-3 or amount > 100
            total += amount


def test_what_exceeds_the_burst_is_admitted_when_full_and_paid_back() -> None:
    bucket = Bucket(10.0, 100.0)
    assert bucket.admits(0.0, 1000)
    bucket.take(0.0, 1000)
    assert bucket.level(0.0) == -900
    assert not bucket.admits(89.0, 1)
    assert bucket.admits(bucket.admits_at(1), 1)


def test_a_refund_after_the_bucket_was_full_gives_nothing() -> None:
    bucket = Bucket(10.0, 100.0)
    epoch = bucket.take(0.0, 100)
    bucket.take(20.0, 100)
    bucket.give_back(90, epoch)
    assert bucket.level(20.0) == 0


def test_retuned_it_keeps_its_debt_in_tokens() -> None:
    bucket = Bucket(10.0, 100.0)
    bucket.take(0.0, 60)
    bucket.retune(1.0, 5.0, 100.0)
    assert bucket.level(1.0) == pytest.approx(50.0)


def test_the_rate_of_service_is_that_of_busy_times() -> None:
    rate = BusyRate(10.0)
    assert rate.per_s(0.0) is None
    rate.is_busy(100.0, True)
    for second in range(101, 121):
        rate.add(float(second), 50.0)
    rate.is_busy(120.0, False)
    assert rate.per_s(1000.0) == pytest.approx(50.0, rel=0.1)
