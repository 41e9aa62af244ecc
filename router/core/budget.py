"""What tenants spend in a period, in tokens and money, and may. One owner, so concurrency can't overspend.

A request reserves the most it can cost when it is admitted and settles what it did cost when it ends. Every step is a
`Record`, numbered without gaps, that is written down before anything that depends on it is done: effects are carried
out in order, and a record precedes the order or the tokens it stands for. So whoever replays the records knows an upper
bound of what was spent, however the router ended:

    RESERVE    request admitted: the most it can cost
    GRANT      it may from now on have used this much; written ahead, for its prompt and every `GRANT_TOKENS` of output
    SETTLE     ended: what it cost. Settled requests of one period sum to what is spent
    BALANCE    what was spent in a period before; replaces all settled records when the journal is rewritten

A reservation that a crash left open is settled at its last grant: at most `GRANT_TOKENS` of output more than the client
got. Money is settled by the price plan of admission. Tenants without budgets reserve, too, where usage is recorded:
else a crash would leave nothing of what they had open.

Periods are by wall time: the core's monotonic clock + `wall_offset_s`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from math import inf
from typing import NamedTuple

from router.core.tenant import Budget, Period, Tenant
from router.core.usage import record_id

#: Output tokens granted at a time.
GRANT_TOKENS = 64


class Terms(NamedTuple):
    """What a bill says beside amounts, and the prompt's part of them."""

    prompt_tokens: int = 0
    model: str = ""
    lane: str = ""
    key_id: str = ""
    price_plan: str = ""
    price_plan_version: str = ""


class Step(Enum):
    RESERVE = "reserve"
    GRANT = "grant"
    SETTLE = "settle"
    BALANCE = "balance"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    number: int
    step: Step
    tenant: str
    #: When the request was admitted; of a balance, when its period began.
    wall_s: float
    tokens: int
    money_micros: int
    #: Which reservation it is about; 0 in a balance. A reservation bears the number of its first record.
    reservation: int = 0
    request_id: str = ""
    #: Of a balance.
    period: Period | None = None
    #: Of a reservation.
    terms: Terms | None = None


@dataclass(slots=True, eq=False)
class Reservation:
    number: int
    tenant: str
    request_id: str
    wall_s: float
    tokens: int
    money_micros: int
    terms: Terms
    granted_tokens: int = 0
    granted_micros: int = 0

    @property
    def record_id(self) -> str:
        """Of its usage."""
        return record_id(self.tenant, self.request_id, self.wall_s)


@dataclass(slots=True, eq=False)
class _Spent:
    """In the tenant's current period: settled and reserved together."""

    start: float
    tokens: int = 0
    money_micros: int = 0


@dataclass(frozen=True, slots=True)
class Exhausted:
    """A budget that has no room, and when its next period begins (monotonic; inf: never, or it could not hold it)."""

    budget: Budget
    unit: str
    limit: int
    in_use: int
    retry_at: float


@dataclass(frozen=True, slots=True)
class Balance:
    budget: Budget
    tokens: int
    money_micros: int
    ends_at: float


class ReplayError(ValueError):
    """The records are not one router's, in order and without gaps."""


class Budgets:
    def __init__(self, *, wall_offset_s: float = 0.0, records: Iterable[Record] = ()) -> None:
        self.wall_offset_s = wall_offset_s
        #: The latest admission. A clock that was set back does not reopen a period.
        self._latest_wall_s = 0.0
        #: Of the last record; the next is one more.
        self._number = 0
        self._spent: dict[str, dict[Period, _Spent]] = {}
        self._open: dict[int, Reservation] = {}
        self._bounds: dict[Period, tuple[float, float]] = {}
        for record in records:
            self._replay(record)

    @property
    def open(self) -> Iterator[Reservation]:
        """Reserved and not settled, oldest first."""
        return iter(tuple(self._open.values()))

    def exhausted(self, now: float, tenant: Tenant, *, tokens: int, money_micros: int) -> Exhausted | None:
        """Why this can't be reserved; of several reasons the one that lasts longest."""
        found = list(self._short(now, tenant, tokens, money_micros))
        return max(found, key=lambda short: short.retry_at, default=None)

    def reserve(
        self, now: float, tenant: str, request_id: str, *, tokens: int, money_micros: int, terms: Terms | None = None
    ) -> Record:
        return self._write(
            Record(
                number=self._number + 1,
                step=Step.RESERVE,
                tenant=tenant,
                wall_s=self.wall_s(now),
                tokens=tokens,
                money_micros=money_micros,
                reservation=self._number + 1,
                request_id=request_id,
                terms=terms,
            )
        )

    def grant(self, reservation: int, *, tokens: int, money_micros: int) -> Record:
        return self._write(self._about(Step.GRANT, reservation, tokens, money_micros))

    def settle(self, reservation: int, *, tokens: int, money_micros: int) -> Record:
        return self._write(self._about(Step.SETTLE, reservation, tokens, money_micros))

    def balances(self, now: float, tenant: Tenant) -> tuple[Balance, ...]:
        """Settled and reserved, by budget."""
        wall_s = self.wall_s(now)
        found = []
        for budget in tenant.budgets:
            start, end = self._bounds_of(budget.period, wall_s)
            spent = self._spent.get(tenant.id, {}).get(budget.period)
            if spent is None or spent.start < start:
                spent = _Spent(start)
            found.append(Balance(budget, spent.tokens, spent.money_micros, end - self.wall_offset_s))
        return tuple(found)

    def rewritten(self) -> tuple[Record, ...]:
        """Fewer records that say the same, numbered on from the last. Written as one, they replace all before."""
        reserves = [self._about(Step.RESERVE, held.number, held.tokens, held.money_micros) for held in self.open]
        grants = [self._about(Step.GRANT, held.number, held.granted_tokens, held.granted_micros) for held in self.open]
        first = self._number + 1
        records = (*self._settled(), *reserves, *grants)
        self._number += len(records)
        return tuple(replace(record, number=first + index) for index, record in enumerate(records))

    def check_integrity(self) -> None:
        for number, held in self._open.items():
            assert held.number == number <= self._number
            assert 0 <= held.granted_tokens <= held.tokens
            assert 0 <= held.granted_micros <= held.money_micros
        assert all(record.tokens >= 0 and record.money_micros >= 0 for record in self._settled())

    def wall_s(self, now: float) -> float:
        return max(now + self.wall_offset_s, self._latest_wall_s)

    def _short(self, now: float, tenant: Tenant, tokens: int, money_micros: int) -> Iterator[Exhausted]:
        for budget, balance in zip(tenant.budgets, self.balances(now, tenant), strict=True):
            for unit, limit, in_use, asked in (
                ("tokens", budget.tokens, balance.tokens, tokens),
                ("money_micros", budget.money_micros, balance.money_micros, money_micros),
            ):
                if limit is not None and in_use + asked > limit:
                    yield Exhausted(budget, unit, limit, in_use, balance.ends_at if asked <= limit else inf)

    def _about(self, step: Step, reservation: int, tokens: int, money_micros: int) -> Record:
        held = self._open[reservation]
        return Record(
            number=self._number + 1,
            step=step,
            tenant=held.tenant,
            wall_s=held.wall_s,
            tokens=tokens,
            money_micros=money_micros,
            reservation=reservation,
            request_id=held.request_id,
            terms=held.terms if step is Step.RESERVE else None,
        )

    def _write(self, record: Record) -> Record:
        self._apply(record)
        self._number = record.number
        return record

    def _replay(self, record: Record) -> None:
        if self._number and record.number != self._number + 1:
            raise ReplayError(f"record {record.number} follows record {self._number}")
        if record.step in (Step.GRANT, Step.SETTLE) and record.reservation not in self._open:
            raise ReplayError(f"record {record.number} is about reservation {record.reservation}, which is not open")
        self._write(record)

    def _apply(self, record: Record) -> None:
        self._latest_wall_s = max(self._latest_wall_s, record.wall_s)
        if record.step is Step.BALANCE:
            assert record.period is not None
            spent = self._spent.setdefault(record.tenant, {})
            spent[record.period] = _Spent(record.wall_s, record.tokens, record.money_micros)
        elif record.step is Step.RESERVE:
            self._open[record.reservation] = Reservation(
                record.reservation,
                record.tenant,
                record.request_id,
                record.wall_s,
                record.tokens,
                record.money_micros,
                record.terms or Terms(),
            )
            self._spend(record, record.tokens, record.money_micros)
        elif record.step is Step.GRANT:
            held = self._open[record.reservation]
            assert record.tokens <= held.tokens
            assert record.money_micros <= held.money_micros
            held.granted_tokens, held.granted_micros = record.tokens, record.money_micros
        else:
            held = self._open.pop(record.reservation)
            assert record.tokens <= held.tokens
            assert record.money_micros <= held.money_micros
            self._spend(record, record.tokens - held.tokens, record.money_micros - held.money_micros)

    def _spend(self, record: Record, tokens: int, money_micros: int) -> None:
        """In every period that the request was admitted in and that is not over."""
        periods = self._spent.setdefault(record.tenant, {})
        for period in Period:
            start = self._bounds_of(period, record.wall_s)[0]
            spent = periods.get(period)
            if spent is None or spent.start < start:
                spent = periods[period] = _Spent(start)
            if spent.start == start:
                spent.tokens += tokens
                spent.money_micros += money_micros

    def _settled(self) -> Iterator[Record]:
        held_by: dict[str, list[Reservation]] = {}
        for held in self._open.values():
            held_by.setdefault(held.tenant, []).append(held)
        for tenant, periods in self._spent.items():
            for period, spent in periods.items():
                here = [
                    held for held in held_by.get(tenant, ()) if self._bounds_of(period, held.wall_s)[0] == spent.start
                ]
                yield Record(
                    number=0,
                    step=Step.BALANCE,
                    tenant=tenant,
                    wall_s=spent.start,
                    tokens=spent.tokens - sum(held.tokens for held in here),
                    money_micros=spent.money_micros - sum(held.money_micros for held in here),
                    period=period,
                )

    def _bounds_of(self, period: Period, wall_s: float) -> tuple[float, float]:
        """The calendar is asked once per period: it costs more than all the rest."""
        start, end = self._bounds.get(period, (inf, -inf))
        if not start <= wall_s < end:
            start, end = self._bounds[period] = period.bounds(wall_s)
        return start, end
