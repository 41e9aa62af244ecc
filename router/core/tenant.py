"""Who may use the pools, and how much: the values that everything about tenancy is decided from.

A `TenantBook` is one immutable whole, valid by construction: building one that contradicts itself raises `BookRefused`
with every problem found, and the book in force stays. `TenantsChanged` (events.py) replaces it between two decisions;
what runs goes on, what waits is judged by the new book from then on.

Units: tokens are prompt + generated tokens, money is integer millionths of the plan's currency, rates per minute are
sustained with a burst of `burst_s` seconds' worth. None means no limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from math import inf, isfinite

from router.core.request import Lane

#: From the highest to the lowest.
LANES = tuple(Lane)

#: Labels that a worker must carry to serve a tenant; empty selects every worker that is not dedicated.
Selector = frozenset[tuple[str, str]]

ANYWHERE: Selector = frozenset()


class Period(Enum):
    """Calendar periods in UTC, for budgets."""

    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    #: Never starts again.
    TOTAL = "total"

    def bounds(self, wall_s: float) -> tuple[float, float]:
        """First second of the period that holds `wall_s` (seconds since 1970), and first second of the next."""
        if self is Period.TOTAL:
            return 0.0, inf
        moment = datetime.fromtimestamp(wall_s, UTC)
        hour = moment.replace(minute=0, second=0, microsecond=0)
        if self is Period.HOUR:
            return hour.timestamp(), (hour + timedelta(hours=1)).timestamp()
        day = hour.replace(hour=0)
        if self is Period.DAY:
            return day.timestamp(), (day + timedelta(days=1)).timestamp()
        month = day.replace(day=1)
        return month.timestamp(), (month + timedelta(days=31)).replace(day=1).timestamp()


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What may be spent in a period. Reserved in full at admission, so it can't be overspent."""

    period: Period
    tokens: int | None = None
    money_micros: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PricePlan:
    """Prices in millionths of `currency` per million tokens, and per request."""

    name: str
    version: str = "1"
    currency: str = "USD"
    prompt_micros: int = 0
    cached_prompt_micros: int = 0
    completion_micros: int = 0
    request_micros: int = 0

    def price_micros(self, *, prompt_tokens: int, cached_prompt_tokens: int, completion_tokens: int) -> int:
        """`prompt_tokens` includes the cached ones. Rounded up once, over the whole request."""
        millionths = (
            (prompt_tokens - cached_prompt_tokens) * self.prompt_micros
            + cached_prompt_tokens * self.cached_prompt_micros
            + completion_tokens * self.completion_micros
        )
        return self.request_micros + -(-millionths // 1_000_000)

    def price_max_micros(self, *, prompt_tokens: int, completion_tokens: int) -> int:
        """The most that such a request can cost, whatever is cached."""
        dearest = max(self.prompt_micros, self.cached_prompt_micros)
        millionths = prompt_tokens * dearest + completion_tokens * self.completion_micros
        return self.request_micros + -(-millionths // 1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    id: str
    weight: float = 1.0
    lanes: frozenset[Lane] = frozenset(LANES)
    #: Taken when a request names none; None means the highest it may use, but not above `standard`.
    default_lane: Lane | None = None

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    burst_s: float = 60.0
    #: KV tokens at workers, over all its requests. Requests wait for room under it; only one that could never fit is
    #: refused. It is what makes the bound on unfairness a real number.
    tokens_in_flight_max: int | None = None
    queue_requests_max: int | None = None
    #: Prompt tokens waiting.
    queue_tokens_max: int | None = None
    prompt_tokens_max: int | None = None
    output_tokens_max: int | None = None
    budgets: tuple[Budget, ...] = ()

    #: Served before any share in each model's pool; what is not used is lent.
    guaranteed_tokens_per_s: float = 0.0

    pool: Selector = ANYWHERE
    #: Tenants of one group share prefix caches on purpose. Empty: it shares with nobody.
    sharing_group: str = ""
    #: None: every model that is served.
    models: frozenset[str] | None = None
    price_plan: str = ""
    #: SPIFFE ids and DNS names in client certificates that make a caller this tenant.
    certificates: frozenset[str] = frozenset()

    def lane_for(self, asked: Lane | None) -> Lane:
        """What is asked for, or the next lower lane it may use: asking never raises. See `default_lane` for None."""
        if asked is None:
            asked = self.default_lane or Lane.STANDARD
        allowed = [lane for lane in LANES if lane in self.lanes]
        return next((lane for lane in allowed if LANES.index(lane) >= LANES.index(asked)), allowed[-1])

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCapacity:
    """Workers that the operator declares, so that promises can be checked before anyone relies on them."""

    name: str
    labels: frozenset[tuple[str, str]] = ANYWHERE
    #: What its workers sustain together, prompt and generated tokens, per model served.
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Problem:
    """`code` is for machines (UPPER_SNAKE), `where` is a path into the book such as `tenants.acme.weight`."""

    code: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message} ({self.code})"


class BookRefused(ValueError):
    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("; ".join(str(problem) for problem in problems))
        self.problems = problems


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantBook:
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    plans: Mapping[str, PricePlan] = field(default_factory=dict)
    #: Empty: nothing is declared, so guarantees and selectors are taken on trust.
    pools: tuple[PoolCapacity, ...] = ()
    #: Labels that close a worker to everybody who does not select them: trust domains are closed both ways.
    dedicated: frozenset[str] = frozenset({"trust"})
    #: Least share of dispatched work that a backlogged lane gets whatever waits above it.
    lane_floors: Mapping[Lane, float] = field(default_factory=lambda: {Lane.STANDARD: 0.10, Lane.BATCH: 0.05})
    #: Of a pool's capacity, how much may be promised as guarantees.
    guarantee_share_max: float = 0.8
    #: Who callers are that no tenant's credential vouches for: all of them together are this one. None: refused.
    unknown: Tenant | None = None

    def __post_init__(self) -> None:
        problems = tuple(_problems(self))
        if problems:
            raise BookRefused(problems)

    @classmethod
    def open(cls) -> TenantBook:
        """For a laptop: no credentials, no limits."""
        return cls(unknown=Tenant(id="default"))

    def tenant(self, name: str) -> Tenant | None:
        return self.tenants.get(name, self.unknown)

    def plan_of(self, tenant: Tenant) -> PricePlan | None:
        return self.plans.get(tenant.price_plan)

    def everyone(self) -> Iterator[Tenant]:
        yield from self.tenants.values()
        if self.unknown is not None and self.unknown.id not in self.tenants:
            yield self.unknown


def selects(selector: Selector, labels: frozenset[tuple[str, str]], dedicated: frozenset[str]) -> bool:
    """True when a worker with these labels may serve whoever has this selector."""
    return selector <= labels and all(label in selector for label in labels if label[0] in dedicated)


#: Selectors that differ. Each is looked at in every decision.
SELECTORS_MAX = 16

_AT_LEAST_ONE = (
    "requests_per_minute",
    "tokens_per_minute",
    "tokens_in_flight_max",
    "queue_requests_max",
    "queue_tokens_max",
    "prompt_tokens_max",
    "output_tokens_max",
)


def _problems(book: TenantBook) -> Iterator[Problem]:
    for name, tenant in book.tenants.items():
        where = f"tenants.{name}"
        if tenant.id != name:
            yield Problem("TENANT_ID", f"{where}.id", f"is {tenant.id!r}, filed under {name!r}")
        yield from _tenant_problems(book, tenant, where)
    if book.unknown is not None:
        yield from _tenant_problems(book, book.unknown, "unknown")
    yield from _certificate_problems(book)
    for name, plan in book.plans.items():
        yield from _plan_problems(name, plan)
    yield from _floor_problems(book)
    yield from _pool_problems(book)


def _certificate_problems(book: TenantBook) -> Iterator[Problem]:
    owners: dict[str, str] = {}
    for tenant in book.tenants.values():
        for name in sorted(tenant.certificates):
            where = f"tenants.{tenant.id}.certificates"
            if not name:
                yield Problem("CERTIFICATE", where, "holds an empty name")
            elif (owner := owners.setdefault(name, tenant.id)) != tenant.id:
                yield Problem("CERTIFICATE", where, f"{name!r} is {owner!r}'s already")


def _tenant_problems(book: TenantBook, tenant: Tenant, where: str) -> Iterator[Problem]:
    if not tenant.id:
        yield Problem("TENANT_ID", f"{where}.id", "is empty")
    if not 1e-3 <= tenant.weight <= 1e6:
        yield Problem("WEIGHT", f"{where}.weight", f"must be positive, from 0.001 to 1000000, is {tenant.weight}")
    rate = tenant.guaranteed_tokens_per_s
    if not (isfinite(rate) and rate >= 0):
        yield Problem("GUARANTEE", f"{where}.guaranteed_tokens_per_s", f"must not be negative, is {rate}")
    if not (isfinite(tenant.burst_s) and tenant.burst_s > 0):
        yield Problem("BURST", f"{where}.burst_s", f"must be positive, is {tenant.burst_s}")
    if not tenant.lanes:
        yield Problem("NO_LANES", f"{where}.lanes", "is empty: it could use nothing")
    for lane in tenant.lanes:
        if lane not in LANES:
            yield Problem("UNKNOWN_LANE", f"{where}.lanes", f"{lane!r} is none of {_names()}")
    if tenant.default_lane is not None and tenant.default_lane not in tenant.lanes:
        yield Problem("DEFAULT_LANE", f"{where}.default_lane", f"{tenant.default_lane!r} is not among its lanes")
    for name in _AT_LEAST_ONE:
        value = getattr(tenant, name)
        if value is not None and not value >= 1:
            yield Problem("LIMIT", f"{where}.{name}", f"must be at least 1, is {value}")
    if tenant.price_plan and tenant.price_plan not in book.plans:
        yield Problem("UNKNOWN_PLAN", f"{where}.price_plan", f"there is no plan {tenant.price_plan!r}")
    yield from _budget_problems(tenant, where)


def _budget_problems(tenant: Tenant, where: str) -> Iterator[Problem]:
    periods = [budget.period for budget in tenant.budgets]
    for index, budget in enumerate(tenant.budgets):
        here = f"{where}.budgets[{index}]"
        if budget.period in periods[:index]:
            yield Problem("BUDGET_TWICE", here, f"there is a budget per {budget.period.value} before")
        if budget.tokens is None and budget.money_micros is None:
            yield Problem("BUDGET_EMPTY", here, "limits neither tokens nor money")
        for name in ("tokens", "money_micros"):
            value = getattr(budget, name)
            if value is not None and value < 0:
                yield Problem("BUDGET", f"{here}.{name}", f"must not be negative, is {value}")
        if budget.money_micros is not None and not tenant.price_plan:
            yield Problem("BUDGET_NO_PLAN", f"{here}.money_micros", "it has no price plan, so nothing would be spent")


def _plan_problems(name: str, plan: PricePlan) -> Iterator[Problem]:
    if plan.name != name:
        yield Problem("PLAN_NAME", f"plans.{name}.name", f"is {plan.name!r}, filed under {name!r}")
    for price in ("prompt_micros", "cached_prompt_micros", "completion_micros", "request_micros"):
        if getattr(plan, price) < 0:
            yield Problem("PRICE", f"plans.{name}.{price}", f"must not be negative, is {getattr(plan, price)}")


def _floor_problems(book: TenantBook) -> Iterator[Problem]:
    for lane, floor in book.lane_floors.items():
        if lane not in LANES:
            yield Problem("UNKNOWN_LANE", "lane_floors", f"{lane!r} is none of {_names()}")
        if not 0 <= floor < 1:
            yield Problem("LANE_FLOOR", f"lane_floors.{lane.value}", f"must lie in [0, 1), is {floor}")
    if sum(book.lane_floors.values()) > 0.5:
        yield Problem("LANE_FLOORS", "lane_floors", f"sum to {sum(book.lane_floors.values()):g}, more than half")
    if not 0 < book.guarantee_share_max <= 1:
        yield Problem("GUARANTEE_SHARE", "guarantee_share_max", f"must lie in (0, 1], is {book.guarantee_share_max}")


def _pool_problems(book: TenantBook) -> Iterator[Problem]:
    names = [pool.name for pool in book.pools]
    for index, pool in enumerate(book.pools):
        if pool.name in names[:index]:
            yield Problem("POOL_TWICE", f"pools.{pool.name}", "is declared twice")
        if not (isfinite(pool.tokens_per_s) and pool.tokens_per_s > 0):
            yield Problem("POOL_CAPACITY", f"pools.{pool.name}", f"tokens_per_s must be positive: {pool.tokens_per_s}")
    selectors = {tenant.pool for tenant in book.everyone()}
    if len(selectors) > SELECTORS_MAX:
        yield Problem("SELECTORS", "tenants", f"{len(selectors)} different pool selectors, at most {SELECTORS_MAX}")
    elif book.pools:
        yield from _promise_problems(book)


def _promise_problems(book: TenantBook) -> Iterator[Problem]:
    """Guarantees can all be kept at once when, for every union of the sets of pools that tenants may use, the promises
    that can only be kept inside it fit into it (Hall's condition)."""
    promised: dict[frozenset[str], float] = {}
    for tenant in book.everyone():
        usable = frozenset(pool.name for pool in book.pools if selects(tenant.pool, pool.labels, book.dedicated))
        if not usable:
            labels = ", ".join(f"{name}={value}" for name, value in sorted(tenant.pool)) or "(none)"
            yield Problem("UNKNOWN_POOL", f"tenants.{tenant.id}.pool", f"no declared pool has the labels {labels}")
        elif tenant.guaranteed_tokens_per_s:
            promised[usable] = promised.get(usable, 0.0) + tenant.guaranteed_tokens_per_s
    unions: set[frozenset[str]] = set()
    for usable in promised:
        unions |= {usable} | {usable | other for other in unions}
    capacity = {pool.name: pool.tokens_per_s * book.guarantee_share_max for pool in book.pools}
    for union in sorted(unions, key=sorted):
        needed = sum(rate for usable, rate in promised.items() if usable <= union)
        there = sum(capacity[name] for name in union)
        if needed > there:
            yield Problem(
                "GUARANTEES_EXCEED_CAPACITY",
                f"pools.{'+'.join(sorted(union))}",
                f"{needed:g} tokens/s are guaranteed, {there:g} may be ({book.guarantee_share_max:.0%} of capacity)",
            )


def _names() -> str:
    return ", ".join(lane.value for lane in LANES)
