"""What a tenant is limited in is reserved before it is used, and the time a refusal promises is true."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.admission import Admission, Admitted
from router.core.budget import Budgets, Record, ReplayError
from router.core.errors import Invalid, NotFound, OutOfRange, TandemError
from router.core.quota import OverQuota
from router.core.request import GenerationRequest, Lane, Sampling
from router.core.tenant import Budget, Period, PricePlan, Tenant, TenantBook

PLAN = PricePlan(name="list", prompt_micros=1_000_000, cached_prompt_micros=100_000, completion_micros=4_000_000)
#: A wall clock at noon, twelve hours before a day ends.
NOON = datetime(2026, 5, 31, 12, tzinfo=UTC).timestamp()


def owner(tenant: Tenant, *, budgets: Budgets | None = None) -> Admission:
    book = TenantBook(tenants={tenant.id: tenant}, plans={"list": PLAN})
    return Admission(book, budgets or Budgets(wall_offset_s=NOON))


def request(
    prompt: int = 10, output: int = 10, *, tenant: str = "t", lane: Lane = Lane.STANDARD, request_id: str = "r"
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        model="m",
        prompt=tuple(range(prompt)),
        sampling=Sampling(max_tokens=output),
        arrival=0.0,
        deadline=1e9,
        tenant=tenant,
        lane=lane,
    )


def admit(admission: Admission, now: float = 0.0, *, prompt: int = 10, output: int = 10) -> Admitted | TandemError:
    asked = request(prompt, output)
    return admission.why_not(now, asked) or admission.admit(now, asked)[0]


def refused(admission: Admission, now: float = 0.0, **what: int) -> OverQuota:
    answer = admit(admission, now, **what)
    assert isinstance(answer, OverQuota), answer
    return answer


def settle(admission: Admission, admitted: Admitted | TandemError, prompt: int, output: int) -> None:
    assert isinstance(admitted, Admitted)
    plan = admitted.plan or PricePlan(name="free")
    money = plan.price_micros(prompt_tokens=prompt, cached_prompt_tokens=0, completion_tokens=output)
    admission.settle(admitted, prompt_tokens=prompt, output_tokens=output, money_micros=money)


def test_a_request_that_can_never_fit_is_told_the_limit_and_no_time() -> None:
    admission = owner(Tenant(id="t", prompt_tokens_max=50, output_tokens_max=20, tokens_in_flight_max=60))
    for what, limit in (
        ({"prompt": 51}, "prompt_tokens_max"),
        ({"output": 21}, "output_tokens_max"),
        ({"prompt": 45, "output": 20}, "tokens_in_flight_max"),
    ):
        error = admit(admission, **what)
        assert isinstance(error, OutOfRange)
        assert error.limit == limit
        assert error.retry_after_s is None


def test_lanes_models_and_tenants_that_are_not_its_own_are_refused() -> None:
    admission = owner(Tenant(id="t", lanes=frozenset({Lane.BATCH}), models=frozenset({"other"})))
    assert isinstance(admission.why_not(0.0, request()), NotFound)
    admission = owner(Tenant(id="t", lanes=frozenset({Lane.BATCH})))
    assert isinstance(admission.why_not(0.0, request(lane=Lane.REALTIME)), Invalid)
    assert isinstance(admission.why_not(0.0, request(tenant="stranger")), NotFound)


def test_asking_for_a_lane_never_raises_it() -> None:
    tenant = Tenant(id="t", lanes=frozenset({Lane.STANDARD, Lane.BATCH}))
    assert tenant.lane_for(Lane.REALTIME) is Lane.STANDARD
    assert tenant.lane_for(Lane.BATCH) is Lane.BATCH
    assert tenant.lane_for(None) is Lane.STANDARD
    assert Tenant(id="t").lane_for(None) is Lane.STANDARD


def test_the_queue_of_a_tenant_is_bounded_and_empties_on_dispatch() -> None:
    admission = owner(Tenant(id="t", queue_requests_max=2))
    first, _ = admit(admission), admit(admission)
    error = refused(admission)
    assert error.reason == "QUEUE_REQUESTS_MAX"
    assert (error.quota.in_use, error.quota.value) == (2, 2)
    assert isinstance(first, Admitted)
    admission.dispatched(first)
    admission.dispatched(first)
    assert isinstance(admit(admission), Admitted)


def test_a_refused_request_leaves_no_trace() -> None:
    tenant = Tenant(id="t", requests_per_minute=10, tokens_per_minute=1000, queue_tokens_max=100)
    admission = owner(replace(tenant, budgets=(Budget(period=Period.DAY, tokens=1000),)))
    admit(admission, prompt=90, output=100)
    tenant = admission.book.tenants["t"]
    before = admission.rates(0.0, "t"), admission.budgets.balances(0.0, tenant)
    refused(admission, prompt=20)
    assert (admission.rates(0.0, "t"), admission.budgets.balances(0.0, tenant)) == before


def test_of_several_limits_the_one_that_refuses_longest_is_told() -> None:
    tenant = Tenant(id="t", requests_per_minute=1, budgets=(Budget(period=Period.DAY, tokens=30),))
    admission = owner(tenant)
    admit(admission)
    error = refused(admission)
    assert error.quota.limit == "budgets.day.tokens"
    assert error.retry_after_s == 12 * 3600


def test_a_budget_that_could_never_hold_it_promises_nothing() -> None:
    admission = owner(Tenant(id="t", budgets=(Budget(period=Period.DAY, tokens=15),)))
    assert refused(admission).retry_after_s is None
    admission = owner(Tenant(id="t", budgets=(Budget(period=Period.TOTAL, tokens=25),)))
    admit(admission)
    assert refused(admission).retry_after_s is None


def test_unused_tokens_come_back_when_a_request_ends() -> None:
    admission = owner(Tenant(id="t", tokens_per_minute=100))
    admitted = admit(admission, prompt=10, output=90)
    refused(admission)
    settle(admission, admitted, 10, 5)
    assert isinstance(admit(admission, prompt=10, output=70), Admitted)


@given(
    st.lists(st.tuples(st.floats(0.0, 40.0), st.integers(1, 80), st.integers(1, 80), st.floats(0.0, 1.0)), max_size=40),
    st.integers(1, 90),
)
@settings(deadline=None)
def test_retrying_when_told_to_succeeds_if_nothing_else_changes(
    history: list[tuple[float, int, int, float]], prompt: int
) -> None:
    budgets = (Budget(period=Period.HOUR, tokens=600), Budget(period=Period.DAY, money_micros=3_000))
    tenant = Tenant(id="t", requests_per_minute=6, tokens_per_minute=400, price_plan="list", budgets=budgets)
    admission, now = owner(tenant), 0.0
    running: list[tuple[Admitted, int, int]] = []
    for pause, size, output, used in history:
        now += pause
        answer = admit(admission, now, prompt=size, output=output)
        if isinstance(answer, Admitted):
            running.append((answer, size, output))
        if running and used > 0.5:
            first, size, output = running.pop(0)
            settle(admission, first, size, round(output * used))
    error = admission.why_not(now, asked := request(prompt))
    if error is not None:
        assert isinstance(error, OverQuota)
        assert error.retry_after_s is not None
        assert admission.why_not(now + error.retry_after_s, asked) is None


def test_a_thousand_at_once_on_a_budget_for_a_hundred() -> None:
    admission = owner(Tenant(id="t", budgets=(Budget(period=Period.MONTH, tokens=100 * 20),)))
    answers = [admit(admission) for _ in range(1000)]
    admitted = [answer for answer in answers if isinstance(answer, Admitted)]
    assert len(admitted) == 100
    for answer in admitted:
        settle(admission, answer, 10, 5)
    (balance,) = admission.budgets.balances(0.0, admission.book.tenants["t"])
    assert balance.tokens == 100 * 15


def test_a_request_counts_in_the_period_it_was_admitted_in() -> None:
    tenant = Tenant(id="t", budgets=(Budget(period=Period.DAY, tokens=100),))
    admission = owner(tenant)
    admitted = admit(admission, prompt=50, output=50)
    midnight = 12 * 3600.0
    assert isinstance(admit(admission, midnight, prompt=50, output=50), Admitted)
    settle(admission, admitted, 50, 0)
    assert admission.budgets.balances(midnight, tenant)[0].tokens == 100


def test_new_limits_apply_at_once_and_use_is_kept() -> None:
    admission = owner(Tenant(id="t", tokens_per_minute=100))
    admit(admission, prompt=10, output=90)
    admission.configure(0.0, TenantBook(tenants={"t": Tenant(id="t", tokens_per_minute=1000)}))
    assert isinstance(admit(admission, prompt=10, output=800), Admitted)
    assert refused(admission, prompt=10, output=100).reason == "TOKENS_PER_MINUTE"
    admission.configure(0.0, TenantBook(tenants={"t": Tenant(id="t")}))
    assert isinstance(admit(admission, prompt=10, output=10_000), Admitted)


# Records.


def history(seed: int, tenant: Tenant) -> tuple[Admission, list[Record], dict[int, tuple[int, int]]]:
    """Random admissions, grants and ends; also what each request really used until now."""
    random, admission = Random(seed), owner(tenant)
    records: list[Record] = []
    running: list[Admitted] = []
    used: dict[int, tuple[int, int]] = {}
    for step in range(200):
        now = step * 400.0
        asked = request(random.randint(1, 50), random.randint(1, 300), request_id=f"r{step}")
        if admission.why_not(now, asked) is None:
            admitted, record = admission.admit(now, asked)
            assert record is not None
            records.append(record)
            running.append(admitted)
            used[admitted.reservation] = (0, 0)
        for admitted in tuple(running):
            output = min(admitted.output_tokens, used[admitted.reservation][1] + random.randint(0, 100))
            granted = admission.grant(admitted, output)
            records += [granted] if granted is not None else []
            used[admitted.reservation] = (admitted.prompt_tokens, output)
            if random.random() < 0.3:
                running.remove(admitted)
                money = PLAN.price_micros(
                    prompt_tokens=admitted.prompt_tokens, cached_prompt_tokens=0, completion_tokens=output
                )
                settled = admission.settle(
                    admitted, prompt_tokens=admitted.prompt_tokens, output_tokens=output, money_micros=money
                )
                assert settled is not None
                records.append(settled)
    return admission, records, used


CAREFUL = Tenant(
    id="t",
    price_plan="list",
    budgets=(Budget(period=Period.DAY, tokens=20_000), Budget(period=Period.TOTAL, money_micros=10**9)),
)


@pytest.mark.parametrize("seed", range(5))
def test_replaying_the_records_gives_the_same_budgets(seed: int) -> None:
    admission, records, _ = history(seed, CAREFUL)
    again = Budgets(wall_offset_s=NOON, records=records)
    assert again.balances(80_000.0, CAREFUL) == admission.budgets.balances(80_000.0, CAREFUL)
    assert [held.number for held in again.open] == [held.number for held in admission.budgets.open]


@pytest.mark.parametrize("seed", range(5))
def test_after_a_crash_at_any_moment_nothing_used_is_forgotten(seed: int) -> None:
    _, records, used = history(seed, CAREFUL)
    again = Budgets(wall_offset_s=NOON, records=records)
    for held in again.open:
        prompt, output = used[held.number]
        assert prompt + output <= held.granted_tokens <= prompt + output + 64
        again.settle(held.number, tokens=held.granted_tokens, money_micros=held.granted_micros)
    assert not list(again.open)
    assert again.balances(80_000.0, CAREFUL)[1].tokens >= sum(map(sum, used.values()))


@pytest.mark.parametrize("seed", range(5))
def test_rewritten_records_say_the_same_in_fewer_lines(seed: int) -> None:
    admission, records, _ = history(seed, CAREFUL)
    rewritten = admission.budgets.rewritten()
    assert len(rewritten) < len(records)
    assert rewritten[0].number == records[-1].number + 1
    again = Budgets(wall_offset_s=NOON, records=rewritten)
    assert again.balances(80_000.0, CAREFUL) == admission.budgets.balances(80_000.0, CAREFUL)
    both = [again, admission.budgets]
    for held in again.open:
        settled = [one.settle(held.number, tokens=1, money_micros=1) for one in both]
        assert settled[0] == settled[1]
    assert again.balances(80_000.0, CAREFUL) == admission.budgets.balances(80_000.0, CAREFUL)


def test_a_gap_in_the_records_is_an_error() -> None:
    _, records, _ = history(0, CAREFUL)
    with pytest.raises(ReplayError, match="follows record"):
        Budgets(records=records[:10] + records[11:])


def test_a_clock_that_was_set_back_reopens_no_period() -> None:
    tenant = Tenant(id="t", budgets=(Budget(period=Period.DAY, tokens=20),))
    budgets = Budgets(wall_offset_s=NOON)
    records = [budgets.reserve(0.0, "t", "r", tokens=20, money_micros=0)]
    early = owner(tenant, budgets=Budgets(wall_offset_s=NOON - 86_400.0, records=records))
    refused(early)
