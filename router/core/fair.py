"""Who is served next: weighted fair shares, lanes, guarantees and caps, decided in O(log n).

A *flow* is one tenant's queue in one lane; its requests leave in order of arrival. Whoever holds several credentials of
one tenant is still one flow. Which flow is next, first match:

1. **Floors.** Lanes are strict, but of the work dispatched while a lane waits, its floor share is put aside, and as
   soon as that pays for the lane's head, the head leaves.
2. **Guarantees.** A tenant with a guaranteed rate has a bucket of it. While the bucket is above zero its requests leave
   before all shares and are paid from the bucket, not from the tenant's share. Of several such tenants, the one whose
   bucket has been refilling longest (virtual clock). An unused guarantee is lent simply because nobody asks for it;
   it is back with the next decision. The bucket holds a second's worth, so an idle hour is no licence to flood.
3. **Shares.** In the highest lane that waits, the flow with the smallest virtual counter. A dispatch charges
   cost / weight to the counter at once, with the cost *predicted* (uncached prompt + 2 x predicted output); what runs
   longer than predicted is charged again, by doubling; the end corrects the sum to what was really used. A flow that
   becomes ready starts no lower than the lane's virtual time (the counter served last, or the smallest of those
   that wait if that is less): idle time banks nothing. Debts stay. Virtual time counts work that is *done*: prompts
   that workers still compute were handed out while the flow was away, and its share of those is taken off where it
   starts. So of a full machine, who comes back gets its share of what becomes free first, as if that had been kept
   for it, and not one worker in turn with everybody; what it is ahead by is less than what the workers hold.

**Caps.** A tenant holds at most `tokens_in_flight_max` KV tokens at workers, or one request. A flow whose head does not
fit under it is set aside without holding up anyone, and comes back when the tenant's requests end. The cap makes the
bound on unfairness a real number: for two flows that are ready throughout,
|W_p/w_p - W_q/w_q| <= 2 max over both of max(prompt cost, output cost of what a tenant may hold) / w.

**Selectors.** Tenants may be confined to some workers. The head of a lane may not be placeable though the pool has room
elsewhere, so the caller can `park` a selector until the next round: others go on, on workers that the parked one
may not use. Nobody overtakes the head on the workers it waits for, so big requests don't starve. Each selector's flows
have their own virtual time, tied to the others' whenever they begin to wait.

What is dispatched again (its worker failed, or it was preempted) is ahead of its lane and is not charged twice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from router.core.heap import LazyHeap
from router.core.rate import Bucket, BusyRate
from router.core.request import Lane
from router.core.tenant import LANES, Selector, Tenant, TenantBook


class Waiting(NamedTuple):
    """What an order may depend on."""

    key: str
    tenant: str
    lane: Lane
    #: Prompt tokens to compute.
    prompt_tokens: int
    #: Tokens it may generate.
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FairLimits:
    #: Cost of one token.
    prompt_cost: float = 1.0
    output_cost: float = 2.0
    #: Output expected of a flow that nothing is known of, and how fast its own history replaces that.
    output_tokens_first: int = 256
    estimate_gain: float = 0.125
    #: How much of a guaranteed rate is kept for who does not use it at once.
    guarantee_burst_s: float = 1.0
    #: Time over which the rate of service is averaged, for predicting waits.
    rate_window_s: float = 10.0

    def cost(self, prompt_tokens: float, output_tokens: float) -> float:
        return self.prompt_cost * prompt_tokens + self.output_cost * output_tokens


@dataclass(frozen=True, slots=True)
class Ahead:
    """What a request finds before it when it begins to wait. Others are told of as a sum only."""

    own_requests: int
    own_cost: float
    others_requests: int
    others_cost: float
    #: 0 while nothing is known of the rate of service.
    wait_s: float


@dataclass(slots=True, eq=False)
class _Charge:
    """What a dispatched request has been charged so far."""

    flow: _Flow
    max_tokens: int
    output_tokens: int
    cost: float
    #: That the cost was divided by.
    weight: float
    #: KV tokens that count against the tenant's cap; 0 while it waits to run again.
    held: int = 0
    #: Paid from the guarantee and not from the share.
    guaranteed: bool = False
    #: Of the tokens paid from it, those that can be given back, in which epoch of the bucket.
    refundable: int = 0
    epoch: int = 0


@dataclass(slots=True, eq=False)
class _Flow:
    account: _Account
    lane: Lane
    output_estimate: float
    #: Virtual: cost / weight.
    counter: float = 0.0
    waiting: OrderedDict[str, Waiting] = field(default_factory=OrderedDict)
    #: Prompt tokens waiting.
    tokens: int = 0
    #: Since when the tenant's cap keeps its head back, and for how long it did so before.
    capped_since: float | None = None
    capped_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Account:
    tenant: Tenant
    flows: dict[Lane, _Flow] = field(default_factory=dict)
    #: KV tokens at workers: the sum of its charges' `held`.
    held: int = 0
    bucket: Bucket | None = None


@dataclass(slots=True, eq=False)
class _Rank:
    """The ready flows of one lane and one selector. Keys are (0 if the head runs again else 1, counter)."""

    flows: LazyHeap[tuple[int, float], _Flow] = field(default_factory=LazyHeap)
    #: Of the ready flows.
    weight: float = 0.0
    #: The counter served last; never goes back.
    served: float = 0.0
    #: Added to its counters wherever they are compared with another rank's.
    offset: float = 0.0

    def start(self, lent: float) -> float:
        """Where a flow that becomes ready begins: at the counter served last, less `lent`. Refunds can bring those that
        are ready below that: who charged much and gives it back must not leave newcomers behind."""
        first = self.flows.first()
        return self.served - lent if first is None else min(self.served - lent, self.flows.key(first)[1])

    def set(self, flow: _Flow, *, again: bool) -> None:
        if flow not in self.flows:
            self.weight += flow.account.tenant.weight
        self.flows.set(flow, (0 if again else 1, flow.counter))

    def drop(self, flow: _Flow) -> None:
        if flow in self.flows:
            self.flows.drop(flow)
            self.weight = self.weight - flow.account.tenant.weight if self.flows else 0.0


@dataclass(slots=True, eq=False)
class _Class:
    """All tenants of one selector."""

    ranks: dict[Lane, _Rank] = field(default_factory=lambda: {lane: _Rank() for lane in LANES})
    #: Tenants with a guarantee and a ready flow, by when their bucket would be full.
    promised: LazyHeap[float, _Account] = field(default_factory=LazyHeap)


@dataclass(frozen=True, slots=True)
class _Choice:
    flow: _Flow
    guaranteed: bool = False


class FairQueue:
    def __init__(self, book: TenantBook, limits: FairLimits | None = None) -> None:
        self._book = book
        self._limits = limits or FairLimits()
        self._accounts: dict[str, _Account] = {}
        self._classes: dict[Selector, _Class] = {}
        #: Where each waiting request waits.
        self._where: dict[str, _Flow] = {}
        #: Requests dispatched and not settled, whether they run or wait to run again.
        self._charges: dict[str, _Charge] = {}
        self._parked: set[Selector] = set()
        #: What the floors have put aside for each lane that waits, in cost.
        self._aside = dict.fromkeys(LANES, 0.0)
        self._choice: _Choice | None = None
        self._rate = BusyRate(self._limits.rate_window_s)
        self._output_estimate = float(self._limits.output_tokens_first)
        #: Prompt tokens waiting; and those that workers were given and have not computed yet, which whoever holds the
        #: workers says.
        self.tokens = 0
        self.computing = 0

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: object) -> bool:
        return key in self._where

    # What happens to requests.

    def push(self, now: float, waiting: Waiting, *, again: bool = False) -> None:
        key = waiting.key
        assert key not in self._where
        flow = self._flow(waiting.tenant, waiting.lane)
        flow.waiting[key] = waiting
        if again:
            flow.waiting.move_to_end(key, last=False)
            self._hold(self._charges[key], 0)
        self._where[key] = flow
        self._count(now, flow, waiting, 1)
        self._changed(now, flow.account)

    def peek(self, now: float) -> str | None:
        """The request that leaves next, of those whose selector is not parked."""
        self._choice = self._choose(now)
        return None if self._choice is None else next(iter(self._choice.flow.waiting))

    @property
    def is_guaranteed(self) -> bool:
        """What was peeked at leaves before all shares."""
        return self._choice is not None and self._choice.guaranteed

    def pop(self, now: float, *, cached_tokens: int = 0) -> str:
        """Takes what was peeked at, charging it for all but `cached_tokens` of its prompt."""
        choice, self._choice = self._choice, None
        assert choice is not None, "peek first"
        flow = choice.flow
        key, waiting = next(iter(flow.waiting.items()))
        assert self._fits(flow, waiting), "past the cap of its tenant"
        del flow.waiting[key]
        del self._where[key]
        self._count(now, flow, waiting, -1)
        cost = 0.0
        if key not in self._charges:
            charge = self._charges[key] = self._charge(now, choice, waiting, cached_tokens)
            cost = charge.cost
        charge = self._charges[key]
        self._hold(charge, waiting.prompt_tokens + charge.output_tokens)
        self._changed(now, flow.account)
        if cost:
            self._put_aside(flow.lane, cost)
        return key

    def remove(self, now: float, key: str) -> None:
        """For a request that ended while it waited. KeyError when it isn't here."""
        flow = self._where.pop(key)
        self._count(now, flow, flow.waiting.pop(key), -1)
        self._changed(now, flow.account)

    def grow(self, now: float, key: str, output_tokens: int) -> int:
        """A running request has generated this many tokens. When that is more than it was charged for, it is charged
        for twice as many. Returns for how many it is charged: until then there is no need to ask again."""
        charge = self._charges[key]
        if output_tokens <= charge.output_tokens:
            return charge.output_tokens
        more = min(charge.max_tokens, max(2 * charge.output_tokens, output_tokens)) - charge.output_tokens
        charge.output_tokens += more
        self._pay(now, charge, self._limits.output_cost * more, more)
        self._hold(charge, charge.held + more)
        self._changed(now, charge.flow.account)
        return charge.output_tokens

    def settle(self, now: float, key: str, prompt_tokens: int, output_tokens: int) -> float:
        """A dispatched request ended; its charge becomes what it really used. Returns that cost."""
        charge = self._charges.pop(key)
        flow, cost = charge.flow, self._limits.cost(prompt_tokens, output_tokens)
        if charge.guaranteed:
            bucket = flow.account.bucket
            unused = min(charge.output_tokens - output_tokens, charge.refundable)
            if bucket is not None and unused > 0:
                bucket.give_back(unused, charge.epoch)
        else:
            flow.counter += (cost - charge.cost) / charge.weight
        self._hold(charge, 0)
        if output_tokens:
            gain = self._limits.estimate_gain
            flow.output_estimate += (output_tokens - flow.output_estimate) * gain
            self._output_estimate += (output_tokens - self._output_estimate) * gain
        self._changed(now, flow.account)
        return cost

    def waiting_of(self, selector: Selector) -> list[str]:
        """All that wait for workers of this selector, flow by flow. Costs O(tenants)."""
        accounts = [account for account in self._accounts.values() if account.tenant.pool == selector]
        return [key for account in accounts for flow in account.flows.values() for key in flow.waiting]

    def is_charged(self, key: str) -> bool:
        return key in self._charges

    # What happens around them.

    def park(self) -> None:
        """What was peeked at can't be placed: nothing of its selector is looked at until `unpark`."""
        assert self._choice is not None, "peek first"
        self._parked.add(self._choice.flow.account.tenant.pool)
        self._choice = None

    def unpark(self) -> None:
        self._parked.clear()
        self._choice = None

    @property
    def parked(self) -> frozenset[Selector]:
        return frozenset(self._parked)

    def configure(self, now: float, book: TenantBook) -> None:
        """Nothing is lost: what waits and runs goes on under the new weights, caps and selectors."""
        self._book = book
        self._parked.clear()
        for name, account in tuple(self._accounts.items()):
            was, tenant = account.tenant, book.tenants.get(name)
            if tenant is None and book.unknown is not None and book.unknown.id == name:
                tenant = book.unknown
            if tenant is not None and tenant != was:
                self._retire(account)
                account.tenant = tenant
                self._set_guarantee(now, account)
                for flow in account.flows.values():
                    # Its distance to the virtual time it was on stays.
                    ranks = self._class(was.pool).ranks, self._class(tenant.pool).ranks
                    flow.counter += ranks[1][flow.lane].served - ranks[0][flow.lane].served
                self._changed(now, account)
            elif tenant is None and not account.held and not any(flow.waiting for flow in account.flows.values()):
                self._retire(account)
                del self._accounts[name]
        used = {account.tenant.pool for account in self._accounts.values()}
        self._classes = {selector: klass for selector, klass in self._classes.items() if selector in used}

    def ahead(self, now: float, tenant: str, lane: Lane) -> Ahead:
        """For one more request of this flow."""
        flow = self._flow(tenant, lane)
        own_cost = self._limits.cost(flow.tokens, len(flow.waiting) * flow.output_estimate)
        others = len(self) - len(flow.waiting)
        others_cost = self._limits.cost(self.tokens - flow.tokens, others * self._output_estimate)
        return Ahead(len(flow.waiting), own_cost, others, others_cost, self._wait_s(now, flow, own_cost))

    def capped_s(self, now: float, tenant: str, lane: Lane) -> float:
        """For how long, ever, the tenant's cap kept the flow back. Of two answers the difference is of use."""
        flow = self._flow(tenant, lane)
        return flow.capped_s + (0.0 if flow.capped_since is None else now - flow.capped_since)

    # Choosing.

    def _choose(self, now: float) -> _Choice | None:
        if not self._where:
            return None
        classes = [klass for selector, klass in self._classes.items() if selector not in self._parked]
        first = {lane: _first(classes, lane) for lane in LANES}
        for lane in reversed(LANES):
            flow = first[lane]
            if flow is not None and 0 < self._head_cost(flow) <= self._aside[lane]:
                return _Choice(flow)
        promised = self._first_promised(now, classes)
        if promised is not None:
            return _Choice(promised, guaranteed=True)
        return next((_Choice(flow) for lane in LANES if (flow := first[lane]) is not None), None)

    def _first_promised(self, now: float, classes: list[_Class]) -> _Flow | None:
        firsts = [account for klass in classes if (account := klass.promised.first()) is not None]
        account = min(firsts, key=lambda account: _bucket(account).full_at, default=None)
        if account is None or _bucket(account).level(now) <= _CRUMB:
            return None
        ranks = self._class(account.tenant.pool).ranks
        return next(
            flow for lane in LANES if (flow := account.flows.get(lane)) is not None and flow in ranks[lane].flows
        )

    # Charging.

    def _charge(self, now: float, choice: _Choice, waiting: Waiting, cached_tokens: int) -> _Charge:
        flow = choice.flow
        weight = flow.account.tenant.weight
        charge = _Charge(
            flow,
            waiting.max_tokens,
            output_tokens=_output(flow, waiting),
            cost=0.0,
            weight=weight,
            guaranteed=choice.guaranteed,
        )
        cost = self._limits.cost(waiting.prompt_tokens - cached_tokens, charge.output_tokens)
        if not choice.guaranteed:
            rank = self._class(flow.account.tenant.pool).ranks[flow.lane]
            rank.served = max(rank.served, flow.counter)
        self._pay(now, charge, cost, waiting.prompt_tokens + charge.output_tokens)
        self._rate.add(now, cost)
        return charge

    def _pay(self, now: float, charge: _Charge, cost: float, tokens: int) -> None:
        charge.cost += cost
        if not charge.guaranteed:
            charge.flow.counter += cost / charge.weight
        elif (bucket := charge.flow.account.bucket) is not None:
            epoch = bucket.take(now, tokens)
            # In a new epoch, what was taken in the one before can't be given back.
            charge.refundable = tokens + (charge.refundable if epoch == charge.epoch else 0)
            charge.epoch = epoch

    def _put_aside(self, served: Lane, cost: float) -> None:
        self._aside[served] = max(0.0, self._aside[served] - cost)
        for lane, floor in self._book.lane_floors.items():
            flow = _first(self._classes.values(), lane)
            if flow is None:
                self._aside[lane] = 0.0
            else:
                # Never more than its head costs: a lane that can't be served does not save up.
                self._aside[lane] = min(self._aside[lane] + floor * cost, self._head_cost(flow))

    def _head_cost(self, flow: _Flow) -> float:
        waiting = next(iter(flow.waiting.values()))
        return self._limits.cost(waiting.prompt_tokens, _output(flow, waiting))

    def _hold(self, charge: _Charge, tokens: int) -> None:
        charge.flow.account.held += tokens - charge.held
        charge.held = tokens

    # Where flows stand.

    def _retire(self, account: _Account) -> None:
        klass = self._class(account.tenant.pool)
        klass.promised.drop(account)
        for flow in account.flows.values():
            klass.ranks[flow.lane].drop(flow)

    def _changed(self, now: float, account: _Account) -> None:
        """Puts the account's flows where they belong. Called after every change to it."""
        self._choice = None
        klass = self._class(account.tenant.pool)
        ready = [self._rank(now, klass, flow) for flow in account.flows.values()]
        if account.bucket is not None and any(ready):
            klass.promised.set(account, account.bucket.full_at)
        else:
            klass.promised.drop(account)

    def _rank(self, now: float, klass: _Class, flow: _Flow) -> bool:
        """True when it is ready."""
        rank = klass.ranks[flow.lane]
        head = next(iter(flow.waiting.values()), None)
        fits = head is None or self._fits(flow, head)
        if fits and flow.capped_since is not None:
            flow.capped_s += now - flow.capped_since
            flow.capped_since = None
        elif not fits and flow.capped_since is None:
            flow.capped_since = now
        if head is None or not fits:
            rank.drop(flow)
            return False
        if flow not in rank.flows:
            if not rank.flows:
                self._rebase(rank, flow.lane)
            weight = rank.weight + flow.account.tenant.weight
            flow.counter = max(flow.counter, rank.start(self._limits.prompt_cost * self.computing / weight))
        rank.set(flow, again=head.key in self._charges)
        return True

    def _fits(self, flow: _Flow, head: Waiting) -> bool:
        account, charge = flow.account, self._charges.get(head.key)
        if account.tenant.tokens_in_flight_max is None or account.held == 0:
            return True
        output = _output(flow, head) if charge is None else charge.output_tokens
        return account.held + head.prompt_tokens + output <= account.tenant.tokens_in_flight_max

    def _rebase(self, rank: _Rank, lane: Lane) -> None:
        """A selector whose flows were all idle starts level with the one that is furthest behind."""
        others = [klass.ranks[lane] for klass in self._classes.values() if klass.ranks[lane].flows]
        if others:
            rank.offset = min(other.served + other.offset for other in others) - rank.served

    def _flow(self, name: str, lane: Lane) -> _Flow:
        tenant = self._book.tenant(name)
        account = self._accounts.get(name if tenant is None else tenant.id)
        if account is None:
            account = _Account(tenant or Tenant(id=name))
            self._accounts[account.tenant.id] = account
            self._set_guarantee(0.0, account)
        flow = account.flows.get(lane)
        if flow is None:
            flow = account.flows[lane] = _Flow(account, lane, float(self._limits.output_tokens_first))
        return flow

    def _set_guarantee(self, now: float, account: _Account) -> None:
        rate = account.tenant.guaranteed_tokens_per_s
        burst = rate * self._limits.guarantee_burst_s
        if not rate:
            account.bucket = None
        elif account.bucket is None:
            account.bucket = Bucket(rate, burst)
        else:
            account.bucket.retune(now, rate, burst)

    def _class(self, selector: Selector) -> _Class:
        klass = self._classes.get(selector)
        if klass is None:
            klass = self._classes[selector] = _Class()
        return klass

    def _count(self, now: float, flow: _Flow, waiting: Waiting, sign: int) -> None:
        flow.tokens += sign * waiting.prompt_tokens
        self.tokens += sign * waiting.prompt_tokens
        self._rate.is_busy(now, bool(self._where))

    # Predicting.

    def _wait_s(self, now: float, flow: _Flow, own_cost: float) -> float:
        rate = self._rate.per_s(now)
        if rate is None or not self._where:
            return 0.0
        weight = flow.account.tenant.weight
        ranks = [klass.ranks for klass in self._classes.values()]
        competing = sum(rank[flow.lane].weight for rank in ranks)
        if not flow.waiting:
            competing += weight
        above = any(rank[lane].flows for rank in ranks for lane in LANES[: LANES.index(flow.lane)])
        share = self._book.lane_floors.get(flow.lane, 0.0) if above else 1.0
        mine = (
            max(rate * share * weight / competing, flow.account.tenant.guaranteed_tokens_per_s) if competing else rate
        )
        return own_cost / mine if mine > 0 else 0.0

    # What must stay true.

    def check_integrity(self) -> None:
        """Costs O(everything)."""
        flows = [flow for account in self._accounts.values() for flow in account.flows.values()]
        assert sum(len(flow.waiting) for flow in flows) == len(self._where)
        assert sum(flow.tokens for flow in flows) == self.tokens
        for flow in flows:
            assert sum(waiting.prompt_tokens for waiting in flow.waiting.values()) == flow.tokens
            assert all(self._where[key] is flow for key in flow.waiting)
            head = next(iter(flow.waiting.values()), None)
            rank = self._class(flow.account.tenant.pool).ranks[flow.lane]
            assert (flow in rank.flows) == (head is not None and self._fits(flow, head))
            assert (flow.capped_since is not None) == (head is not None and flow not in rank.flows)
            if flow in rank.flows:
                assert head is not None
                assert rank.flows.key(flow) == (head.key not in self._charges, flow.counter)
        for account in self._accounts.values():
            # It may be above the cap: answers grow, and caps are lowered. Nothing is dispatched past it, see `pop`.
            assert account.held == sum(
                charge.held for charge in self._charges.values() if charge.flow.account is account
            )
        for charge in self._charges.values():
            assert charge.output_tokens <= charge.max_tokens


#: Tokens that rounding leaves in an empty bucket.
_CRUMB = 1e-3


def _first(classes: Iterable[_Class], lane: Lane) -> _Flow | None:
    best: tuple[tuple[int, float], _Flow] | None = None
    for klass in classes:
        rank = klass.ranks[lane]
        flow = rank.flows.first()
        if flow is not None:
            again, counter = rank.flows.key(flow)
            key = (again, counter + rank.offset)
            if best is None or key < best[0]:
                best = (key, flow)
    return None if best is None else best[1]


def _output(flow: _Flow, waiting: Waiting) -> int:
    """Tokens that it is expected to generate."""
    return min(waiting.max_tokens, max(1, round(flow.output_estimate)))


def _bucket(account: _Account) -> Bucket:
    assert account.bucket is not None
    return account.bucket
