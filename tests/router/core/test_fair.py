"""The order of dispatch, against a dumb model that looks at everything every time, and against the theory's bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.fair import FairLimits, FairQueue, Waiting
from router.core.request import Lane
from router.core.tenant import LANES, Selector, Tenant, TenantBook

EU: Selector = frozenset({("zone", "eu")})
#: Nothing is learned, so what is expected of a request is known.
FIXED = FairLimits(output_tokens_first=10, estimate_gain=0.0)


def book(*tenants: Tenant, floors: Mapping[Lane, float] | None = None) -> TenantBook:
    return TenantBook(tenants={tenant.id: tenant for tenant in tenants}, lane_floors=floors or {})


class Pool:
    """A queue and what was dispatched from it."""

    def __init__(self, of: TenantBook, limits: FairLimits = FIXED) -> None:
        self.queue = FairQueue(of, limits)
        self.now = 0.0
        self.pushed = 0
        self.running: dict[str, Waiting] = {}
        self.waiting: dict[str, Waiting] = {}

    def push(self, tenant: str, lane: Lane = Lane.STANDARD, *, prompt: int = 100, max_tokens: int = 10) -> str:
        self.pushed += 1
        waiting = Waiting(f"{tenant}-{self.pushed}", tenant, lane, prompt, max_tokens)
        self.waiting[waiting.key] = waiting
        self.queue.push(self.now, waiting)
        return waiting.key

    def pop(self) -> str | None:
        key = self.queue.peek(self.now)
        if key is not None:
            assert self.queue.pop(self.now) == key
            self.running[key] = self.waiting.pop(key)
        self.queue.check_integrity()
        return key

    def order(self, count: int) -> list[str]:
        """Tenants in order of dispatch, each request ended at once."""
        order = []
        for _ in range(count):
            if (key := self.pop()) is None:
                break
            order.append(self.running[key].tenant)
            self.end(key)
        return order

    def end(self, key: str, output: int | None = None) -> None:
        waiting = self.running.pop(key)
        self.queue.settle(self.now, key, waiting.prompt_tokens, waiting.max_tokens if output is None else output)
        self.queue.check_integrity()


def test_shares_follow_weights() -> None:
    pool = Pool(book(Tenant(id="a", weight=4), Tenant(id="b")))
    for _ in range(100):
        pool.push("a")
        pool.push("b")
    order = pool.order(50)
    assert order.count("a") == 40


def test_a_flow_is_first_come_first_served() -> None:
    pool = Pool(book(Tenant(id="a")))
    pushed = [pool.push("a", prompt=100 - n) for n in range(5)]
    assert [pool.pop() for _ in range(5)] == pushed
    assert pool.pop() is None


def test_idle_time_banks_nothing() -> None:
    pool = Pool(book(Tenant(id="idle"), Tenant(id="busy")))
    for _ in range(200):
        pool.push("busy")
    pool.order(100)
    for _ in range(100):
        pool.push("idle")
    assert 9 <= pool.order(20).count("idle") <= 11


def test_what_is_charged_and_given_back_leaves_no_newcomer_behind() -> None:
    """Somebody asks for long answers and cancels each when it was dispatched."""
    pool = Pool(book(Tenant(id="a"), Tenant(id="b")), FairLimits(output_tokens_first=1000, estimate_gain=0.0))
    for _ in range(50):
        pool.push("a", max_tokens=1000)
    begun = [pool.pop() for _ in range(10)]
    for key in begun:
        assert key is not None
        pool.end(key, 0)
    pool.push("b")
    assert pool.order(2).count("b") == 1


def test_who_comes_back_gets_its_share_of_what_is_being_computed_first() -> None:
    pool = Pool(book(Tenant(id="busy"), Tenant(id="back")))
    for _ in range(20):
        pool.push("busy")
    assert set(pool.order(4)) == {"busy"}
    pool.queue.computing = 400  # those four prompts
    for _ in range(4):
        pool.push("back")
    # Half of the 400 is its share, beside the turn that it has anyway; one costs 120.
    assert pool.order(5) == ["back", "back", "back", "busy", "back"]


def test_coming_back_all_the_time_gains_that_once() -> None:
    pool = Pool(book(Tenant(id="busy"), Tenant(id="back")))
    pool.queue.computing = 400
    for _ in range(200):
        pool.push("busy")
    order: list[str] = []
    while len(order) < 100:
        if not any(waiting.tenant == "back" for waiting in pool.waiting.values()):
            pool.push("back")
        order += pool.order(1)
    assert 49 <= order.count("back") <= 53


def test_a_debt_outlasts_an_empty_queue() -> None:
    pool = Pool(book(Tenant(id="a"), Tenant(id="b")))
    for _ in range(10):
        pool.push("b")
    pool.push("a", prompt=1000)
    pool.order(2)
    assert "a" not in pool.queue._where
    pool.push("a")
    assert pool.order(8).count("b") == 8


def test_many_credentials_of_one_tenant_are_one_share() -> None:
    """Names that no book knows are one tenant together."""
    pool = Pool(TenantBook(tenants={"known": Tenant(id="known")}, unknown=Tenant(id="anyone")))
    for n in range(100):
        pool.push(f"sybil{n}")
        pool.push("known")
    assert 9 <= pool.order(20).count("known") <= 11


def test_a_short_answer_gives_back_what_was_charged_for_a_long_one() -> None:
    pool = Pool(book(Tenant(id="a"), Tenant(id="b")))
    for _ in range(40):
        pool.push("a", prompt=0, max_tokens=10)
        pool.push("b", prompt=0, max_tokens=10)
    used = {"a": 0, "b": 0}
    for _ in range(36):
        key = pool.pop()
        assert key is not None
        tenant = pool.running[key].tenant
        used[tenant] += (output := 2 if tenant == "a" else 10)
        pool.end(key, output)
    assert abs(used["a"] - used["b"]) <= 10


def test_what_outgrows_its_prediction_is_charged_while_it_runs() -> None:
    pool = Pool(book(Tenant(id="a"), Tenant(id="b")))
    for _ in range(10):
        pool.push("a", prompt=10, max_tokens=1000)
        pool.push("b", prompt=10, max_tokens=10)
    first = pool.pop()
    assert first is not None
    assert first.startswith("a")
    for output in range(1, 200):
        pool.queue.grow(pool.now, first, output)
    pool.queue.check_integrity()
    assert set(pool.order(9)) == {"b"}


def test_lanes_are_strict() -> None:
    pool = Pool(book(Tenant(id="a")))
    batch, standard, realtime = (pool.push("a", lane) for lane in reversed(LANES))
    assert [pool.pop() for _ in range(3)] == [realtime, standard, batch]


def test_a_lane_gets_its_floor_and_no_more() -> None:
    pool = Pool(book(Tenant(id="a"), floors={Lane.STANDARD: 0.2, Lane.BATCH: 0.1}))
    for lane in LANES:
        for _ in range(1000):
            pool.push("a", lane)
    lanes = []
    for _ in range(1000):
        key = pool.pop()
        assert key is not None
        lanes.append(pool.running[key].lane)
        pool.end(key)
    assert lanes.count(Lane.STANDARD) == pytest.approx(200, abs=2)
    assert lanes.count(Lane.BATCH) == pytest.approx(100, abs=2)


def test_a_guarantee_goes_before_weights_and_is_paid_at_its_rate() -> None:
    pool = Pool(book(Tenant(id="g", weight=0.001, guaranteed_tokens_per_s=1100), Tenant(id="heavy", weight=1000)))
    for _ in range(2000):
        pool.push("heavy")
        pool.push("g")
    assert pool.order(1) == ["g"]
    order = []
    for second in range(10):
        pool.now = 1000.0 + second
        order.append(pool.order(100).count("g"))
    # 110 tokens each: ten a second, beside the one that its share is worth.
    assert sum(order) == 101
    assert all(count >= 10 for count in order)


def test_an_idle_guarantee_is_lent_and_does_not_pile_up() -> None:
    pool = Pool(book(Tenant(id="g", weight=0.001, guaranteed_tokens_per_s=1100), Tenant(id="heavy", weight=1000)))
    for _ in range(300):
        pool.push("heavy")
    assert pool.order(100) == ["heavy"] * 100
    pool.now = 3600.0
    for _ in range(100):
        pool.push("g")
    assert pool.order(100).count("g") == 11  # ten paid by the bucket, one by its share


def test_a_tenant_at_its_cap_holds_up_nobody_and_comes_back() -> None:
    pool = Pool(book(Tenant(id="a", weight=1000, tokens_in_flight_max=250), Tenant(id="b")))
    for _ in range(5):
        pool.push("a")
        pool.push("b")
    popped = [pool.pop() for _ in range(6)]
    ours = [key for key in popped if key and key.startswith("a")]
    assert len(ours) == 2
    assert pool.queue.capped_s(7.0, "a", Lane.STANDARD) == 7.0
    pool.end(ours[0])
    assert (pool.pop() or "").startswith("a")


def test_one_request_larger_than_the_cap_runs_alone() -> None:
    pool = Pool(book(Tenant(id="a", tokens_in_flight_max=50)))
    big, _ = pool.push("a"), pool.push("a")
    assert pool.pop() == big
    assert pool.pop() is None


def test_what_runs_again_goes_first_in_its_lane_and_is_charged_once() -> None:
    pool = Pool(book(Tenant(id="a"), Tenant(id="b")))
    first = pool.push("a")
    for _ in range(4):
        pool.push("a")
        pool.push("b")
    assert pool.pop() == first
    assert (pool.pop() or "").startswith("b")
    pool.waiting[first] = pool.running.pop(first)
    pool.queue.push(pool.now, pool.waiting[first], again=True)
    assert pool.pop() == first
    assert [pool.pop() is None or True for _ in range(2)] == [True, True]
    tenants = [key[0] for key in pool.running]
    assert abs(tenants.count("a") - tenants.count("b")) <= 1


def test_a_parked_selector_lets_others_by_until_the_next_round() -> None:
    pool = Pool(book(Tenant(id="pinned", pool=EU), Tenant(id="free")))
    pinned, free = pool.push("pinned"), pool.push("free")
    assert pool.queue.peek(0.0) == pinned
    pool.queue.park()
    assert pool.queue.parked == {EU}
    assert pool.pop() == free
    assert pool.pop() is None
    pool.queue.unpark()
    assert pool.pop() == pinned


def test_a_selector_that_was_idle_starts_level_with_the_others() -> None:
    pool = Pool(book(Tenant(id="pinned", pool=EU), Tenant(id="free")))
    for _ in range(300):
        pool.push("free")
    pool.order(100)
    for _ in range(100):
        pool.push("pinned")
    assert 9 <= pool.order(20).count("pinned") <= 11


def test_a_new_book_loses_nothing_and_counts_from_then_on() -> None:
    pool = Pool(book(Tenant(id="a"), Tenant(id="b"), Tenant(id="gone")))
    for _ in range(200):
        pool.push("a")
        pool.push("b")
    left = pool.push("gone")
    running = pool.pop()
    pool.queue.configure(1.0, book(Tenant(id="a", weight=4), Tenant(id="b", pool=EU)))
    pool.queue.check_integrity()
    assert running is not None
    pool.end(running)
    assert left in pool.queue
    order = pool.order(51)
    assert "gone" in order
    assert order.count("a") == pytest.approx(40, abs=2)
    assert len(pool.queue) == 401 - 52


def test_waits_are_predicted_from_the_flow_s_share() -> None:
    pool = Pool(book(Tenant(id="a", weight=3), Tenant(id="b")))
    for _ in range(2000):
        pool.push("a")
        pool.push("b")
    for _ in range(200):
        pool.now += 0.1
        pool.order(1)
    ahead = pool.queue.ahead(pool.now, "a", Lane.STANDARD)
    assert ahead.own_requests + ahead.others_requests == 3800
    # Ten requests leave each second, of which three quarters are its own.
    assert ahead.wait_s == pytest.approx(ahead.own_requests / 7.5, rel=0.05)


# The model: everything kept in lists, everything looked at for every answer.


@dataclass
class DumbFlow:
    tenant: Tenant
    lane: Lane
    counter: float = 0.0
    waiting: list[Waiting] = field(default_factory=list)
    was_ready: bool = False


class Dumb:
    """Shares, lanes, caps and selectors as `fair.py` describes them; guarantees and floors have their own tests."""

    def __init__(self, of: TenantBook) -> None:
        self.flows = [DumbFlow(tenant, lane) for tenant in of.tenants.values() for lane in LANES]
        self.held: dict[str, dict[str, int]] = {tenant: {} for tenant in of.tenants}
        self.costs: dict[str, float] = {}
        self.output: dict[str, int] = {}
        self.served: dict[tuple[Selector, Lane], float] = {}
        self.offset: dict[tuple[Selector, Lane], float] = {}

    def flow(self, waiting: Waiting) -> DumbFlow:
        return next(f for f in self.flows if (f.tenant.id, f.lane) == (waiting.tenant, waiting.lane))

    def expected(self, waiting: Waiting) -> int:
        return self.output.get(waiting.key, min(10, waiting.max_tokens))

    def ready(self, flow: DumbFlow) -> bool:
        held, cap = self.held[flow.tenant.id], flow.tenant.tokens_in_flight_max
        if not flow.waiting or cap is None or not held:
            return bool(flow.waiting)
        head = flow.waiting[0]
        return sum(held.values()) + head.prompt_tokens + self.expected(head) <= cap

    def lift(self, tenant: str) -> None:
        """After every change to a tenant, lane by lane."""
        for flow in self.flows:
            if flow.tenant.id != tenant:
                continue
            ready, place = self.ready(flow), (flow.tenant.pool, flow.lane)
            if ready and not flow.was_ready:
                mates = [f for f in self.flows if f.lane is flow.lane and f.was_ready]
                served = self.served.get(place, 0.0)
                if mates and not any(f.tenant.pool == flow.tenant.pool for f in mates):
                    others = {(f.tenant.pool, f.lane) for f in mates}
                    self.offset[place] = min(self.served.get(o, 0.0) + self.offset.get(o, 0.0) for o in others) - served
                same = [f for f in mates if f.tenant.pool == flow.tenant.pool]
                if same:
                    served = min(served, min((f.waiting[0].key not in self.costs, f.counter) for f in same)[1])
                flow.counter = max(flow.counter, served)
            flow.was_ready = ready

    def key(self, flow: DumbFlow) -> tuple[bool, float]:
        return (
            flow.waiting[0].key not in self.costs,
            flow.counter + self.offset.get((flow.tenant.pool, flow.lane), 0.0),
        )

    def best(self, parked: frozenset[Selector]) -> list[str]:
        """All that may leave next: more than one when counters are equal."""
        for lane in LANES:
            flows = [f for f in self.flows if f.lane is lane and self.ready(f) and f.tenant.pool not in parked]
            if flows:
                least = min(self.key(f) for f in flows)
                return [f.waiting[0].key for f in flows if self.key(f) == least]
        return []

    def pop(self, waiting: Waiting) -> None:
        flow = self.flow(waiting)
        flow.waiting.remove(waiting)
        if waiting.key not in self.costs:
            place = (flow.tenant.pool, flow.lane)
            self.served[place] = max(self.served.get(place, 0.0), flow.counter)
            self.output[waiting.key] = self.expected(waiting)
            self.charge(waiting, waiting.prompt_tokens + 2.0 * self.expected(waiting))
        self.held[flow.tenant.id][waiting.key] = waiting.prompt_tokens + self.output[waiting.key]
        self.lift(flow.tenant.id)

    def charge(self, waiting: Waiting, cost: float) -> None:
        flow = self.flow(waiting)
        self.costs[waiting.key] = self.costs.get(waiting.key, 0.0) + cost
        flow.counter += cost / flow.tenant.weight

    def settle(self, waiting: Waiting, cost: float) -> None:
        flow = self.flow(waiting)
        flow.counter += (cost - self.costs.pop(waiting.key)) / flow.tenant.weight
        self.held[flow.tenant.id].pop(waiting.key, None)
        self.output.pop(waiting.key)
        self.lift(flow.tenant.id)


TENANTS = (
    Tenant(id="a", weight=1, tokens_in_flight_max=400),
    Tenant(id="b", weight=4),
    Tenant(id="c", weight=0.5, pool=EU),
    Tenant(id="d", weight=2, pool=EU, tokens_in_flight_max=300),
)


def compare_with_the_model(pick: Callable[[Sequence[int]], int], steps: int) -> None:
    of = book(*TENANTS)
    queue, dumb = FairQueue(of, FIXED), Dumb(of)
    waiting: dict[str, Waiting] = {}
    running: dict[str, Waiting] = {}
    grown: dict[str, int] = {}
    for step in range(steps):
        action = pick(range(10))
        if action <= 3:
            tenant, lane = TENANTS[pick(range(4))].id, LANES[pick(range(3))]
            one = Waiting(f"r{step}", tenant, lane, pick(range(1, 200)), pick(range(1, 60)))
            waiting[one.key] = one
            queue.push(0.0, one)
            dumb.flow(one).waiting.append(one)
            dumb.lift(tenant)
        elif action <= 6:
            key = queue.peek(0.0)
            allowed = dumb.best(queue.parked)
            assert key in allowed if allowed else key is None
            if key is not None and pick(range(6)) == 0:
                queue.park()
            elif key is not None:
                queue.pop(0.0)
                running[key] = waiting.pop(key)
                dumb.pop(running[key])
        elif action == 7 and running:
            key = list(running)[pick(range(len(running)))]
            one = running.pop(key)
            grown.pop(key, None)
            output = pick(range(one.max_tokens + 1))
            queue.settle(0.0, key, one.prompt_tokens, output)
            dumb.settle(one, one.prompt_tokens + 2.0 * output)
        elif action == 8 and running:
            key = list(running)[pick(range(len(running)))]
            one = running[key]
            if pick(range(2)):
                output = pick(range(one.max_tokens + 1))
                queue.grow(0.0, key, output)
                if output > (had := dumb.output[key]):
                    dumb.output[key] = min(one.max_tokens, max(2 * had, output))
                    dumb.charge(one, 2.0 * (dumb.output[key] - had))
                    dumb.held[one.tenant][key] += dumb.output[key] - had
                    dumb.lift(one.tenant)
            else:
                waiting[key] = running.pop(key)
                queue.push(0.0, one, again=True)
                dumb.held[one.tenant].pop(key)
                dumb.flow(one).waiting.insert(0, one)
                dumb.lift(one.tenant)
        elif action == 9:
            if pick(range(2)):
                queue.unpark()
            elif waiting:
                key = list(waiting)[pick(range(len(waiting)))]
                one = waiting.pop(key)
                queue.remove(0.0, key)
                dumb.flow(one).waiting.remove(one)
                if key in dumb.costs:
                    queue.settle(0.0, key, one.prompt_tokens, 0)
                    dumb.settle(one, float(one.prompt_tokens))
                else:
                    dumb.lift(one.tenant)
        queue.check_integrity()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_it_chooses_what_a_model_chooses(data: st.DataObject) -> None:
    compare_with_the_model(lambda options: data.draw(st.sampled_from(options)), steps=60)


@pytest.mark.parametrize("seed", range(8))
def test_it_chooses_what_a_model_chooses_over_long_histories(seed: int) -> None:
    compare_with_the_model(Random(seed).choice, steps=1500)


@pytest.mark.parametrize("seed", range(6))
def test_service_differs_by_no_more_than_the_bound_at_every_instant(seed: int) -> None:
    """All flows backlogged throughout, answers of unpredictable length, room for so many KV tokens at once.

    Served: a prompt when it is dispatched, then token by token. Weighted, two tenants never differ by more than twice
    what the largest prompt, or a full cap of output, is worth to the lighter of them.
    """
    random = Random(seed)
    cap, prompt_max, output_max = 1500, 300, 400
    tenants = [Tenant(id=f"t{n}", weight=random.choice([1, 2, 4]), tokens_in_flight_max=cap) for n in range(5)]
    pool = Pool(book(*tenants), FairLimits(output_tokens_first=50))
    served = {tenant.id: 0.0 for tenant in tenants}
    left: dict[str, int] = {}
    made: dict[str, int] = {}
    for tenant in tenants:
        for _ in range(6):
            pool.push(tenant.id, prompt=random.randint(1, prompt_max), max_tokens=output_max)
    for _ in range(4000):
        while len(pool.running) < 8 and (key := pool.pop()) is not None:
            one = pool.running[key]
            served[one.tenant] += one.prompt_tokens
            left[key], made[key] = random.randint(1, output_max), 0
            pool.push(one.tenant, prompt=random.randint(1, prompt_max), max_tokens=output_max)
        for key in tuple(pool.running):
            tenant_id = pool.running[key].tenant
            made[key] += 1
            served[tenant_id] += 2.0
            pool.queue.grow(pool.now, key, made[key])
            if made[key] == left[key]:
                pool.end(key, made[key])
        for p, q in combinations(tenants, 2):
            unit = min(p.weight, q.weight)
            assert abs(served[p.id] / p.weight - served[q.id] / q.weight) <= 2 * max(prompt_max, 2 * cap) / unit
