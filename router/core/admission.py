"""May this request come in? One owner reserves everything a tenant is limited in, and settles it when the request ends.

All limits are looked at before any is taken, so a refused request leaves no trace. Of several limits that refuse, the
one that refuses longest is told, so that the time promised is true.

| limit | reserved at admission | given back |
|---|---|---|
| requests per minute | 1 | never |
| tokens per minute | prompt + max_tokens | at the end, what was not used |
| queue: requests, prompt tokens | 1, prompt | at the first dispatch, or at the end |
| budgets: tokens, money | the most it can cost | at the end, down to what it did cost |

Tokens in flight are not reserved here: requests wait for that room (`fair.py`). Only what could never fit is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import inf

from router.core.budget import GRANT_TOKENS, Budgets, Record, Terms
from router.core.errors import Invalid, NotFound, OutOfRange, TandemError
from router.core.quota import OverQuota, QuotaFacts
from router.core.rate import Bucket, RateLeft
from router.core.request import GenerationRequest
from router.core.tenant import PricePlan, Tenant, TenantBook


@dataclass(slots=True, eq=False)
class _Account:
    """What a tenant has used of its limits."""

    tenant: Tenant
    plan: PricePlan | None
    requests: Bucket | None = None
    tokens: Bucket | None = None
    #: Admitted and not yet dispatched.
    waiting: int = 0
    waiting_tokens: int = 0


@dataclass(slots=True, eq=False)
class Admitted:
    """What one open request holds."""

    account: _Account
    prompt_tokens: int
    output_tokens: int
    plan: PricePlan | None
    #: When, in seconds since 1970.
    wall_s: float
    waits: bool = True
    tokens_epoch: int = 0
    #: In the budgets; 0 when nobody asks what it used.
    reservation: int = 0
    #: Output that the budgets' journal knows of.
    granted: int = 0

    @property
    def tenant(self) -> str:
        return self.account.tenant.id

    @property
    def money_micros_max(self) -> int:
        return _dearest(self.plan, self.prompt_tokens, self.output_tokens)


@dataclass(slots=True, eq=False)
class _Refusal:
    facts: QuotaFacts
    message: str
    #: Monotonic; inf when waiting does not help.
    retry_at: float


@dataclass(slots=True)
class Admission:
    book: TenantBook
    budgets: Budgets = field(default_factory=Budgets)
    #: What tenants without budgets use is reserved and settled, too.
    reserves_all: bool = False
    _accounts: dict[str, _Account] = field(default_factory=dict)

    def why_not(self, now: float, request: GenerationRequest, *, queue_wait_s: float = 0.0) -> TandemError | None:
        """`queue_wait_s`: how long the tenant's queue is expected to take to move on by one request."""
        tenant = self.book.tenant(request.tenant)
        if tenant is None:
            return NotFound("tenant", request.tenant, "the credential's tenant does not exist")
        if not tenant.may_use(request.model):
            return NotFound("model", request.model, f"model {request.model!r} is not served here")
        if request.lane not in tenant.lanes:
            return Invalid("lane", f"{request.lane.value!r} is not open to this tenant", limit="lanes")
        too_large = _too_large(tenant, len(request.prompt), request.sampling.max_tokens)
        if too_large is not None:
            return too_large
        refusals = self._refusals(now, self._account(now, tenant), request, queue_wait_s)
        worst = max(refusals, key=lambda refusal: refusal.retry_at, default=None)
        if worst is None:
            return None
        retry_after_s = None if worst.retry_at == inf else max(0.0, worst.retry_at - now)
        return OverQuota(worst.message, worst.facts, retry_after_s=retry_after_s)

    def admit(self, now: float, request: GenerationRequest) -> tuple[Admitted, Record | None]:
        """For a request that nothing speaks against. The record is to be written before the request is dispatched."""
        tenant = self.book.tenant(request.tenant)
        assert tenant is not None
        account = self._account(now, tenant)
        prompt, output = len(request.prompt), request.sampling.max_tokens
        admitted = Admitted(account, prompt, output, account.plan, self.budgets.wall_s(now))
        account.waiting += 1
        account.waiting_tokens += prompt
        if account.requests is not None:
            account.requests.take(now, 1)
        if account.tokens is not None:
            admitted.tokens_epoch = account.tokens.take(now, prompt + output)
        if not (tenant.budgets or self.reserves_all):
            return admitted, None
        plan = account.plan
        record = self.budgets.reserve(
            now,
            tenant.id,
            request.request_id,
            tokens=prompt + output,
            money_micros=_dearest(plan, prompt, output),
            terms=Terms(
                prompt,
                request.model,
                request.lane.value,
                request.key_id,
                "" if plan is None else plan.name,
                "" if plan is None else plan.version,
            ),
        )
        admitted.reservation, admitted.wall_s = record.reservation, record.wall_s
        return admitted, record

    def dispatched(self, admitted: Admitted) -> None:
        """It waits no more. Once is enough; a request that runs again was admitted before."""
        if admitted.waits:
            admitted.waits = False
            admitted.account.waiting -= 1
            admitted.account.waiting_tokens -= admitted.prompt_tokens

    def grant(self, admitted: Admitted, output_tokens: int) -> Record | None:
        """To be written before an order, or tokens up to this many, go out."""
        if not admitted.reservation or (output_tokens <= admitted.granted and admitted.granted):
            return None
        tokens = min(admitted.output_tokens, output_tokens + GRANT_TOKENS)
        admitted.granted = tokens
        return self.budgets.grant(
            admitted.reservation,
            tokens=admitted.prompt_tokens + tokens,
            money_micros=_dearest(admitted.plan, admitted.prompt_tokens, tokens),
        )

    def settle(self, admitted: Admitted, *, prompt_tokens: int, output_tokens: int, money_micros: int) -> Record | None:
        """`prompt_tokens` is 0 for what was never begun."""
        self.dispatched(admitted)
        used = prompt_tokens + output_tokens
        if admitted.account.tokens is not None:
            unused = admitted.prompt_tokens + admitted.output_tokens - used
            admitted.account.tokens.give_back(unused, admitted.tokens_epoch)
        if not admitted.reservation:
            return None
        return self.budgets.settle(admitted.reservation, tokens=used, money_micros=money_micros)

    def configure(self, now: float, book: TenantBook) -> None:
        """What is admitted stays; use is kept."""
        self.book = book
        for account in self._accounts.values():
            tenant = next((one for one in (book.tenant(account.tenant.id),) if one is not None), account.tenant)
            if tenant.id == account.tenant.id:
                _tune(now, account, tenant, book.plan_of(tenant))

    def rates(self, now: float, tenant_id: str) -> tuple[RateLeft, ...]:
        """Of a tenant in the book."""
        tenant = self.book.tenant(tenant_id)
        if tenant is None:
            return ()
        account = self._account(now, tenant)
        return tuple(
            RateLeft(unit, rate, max(0.0, bucket.level(now)), bucket.full_in_s(now))
            for unit, rate, bucket in (
                ("requests", tenant.requests_per_minute, account.requests),
                ("tokens", tenant.tokens_per_minute, account.tokens),
            )
            if rate is not None and bucket is not None
        )

    def check_integrity(self, open_requests: Iterable[Admitted]) -> None:
        waiting: dict[str, list[int]] = {}
        for admitted in open_requests:
            if admitted.waits:
                waiting.setdefault(admitted.tenant, []).append(admitted.prompt_tokens)
        for name, account in self._accounts.items():
            assert account.waiting == len(waiting.get(name, ()))
            assert account.waiting_tokens == sum(waiting.get(name, ()))
        self.budgets.check_integrity()

    def _account(self, now: float, tenant: Tenant) -> _Account:
        account = self._accounts.get(tenant.id)
        if account is None:
            account = self._accounts[tenant.id] = _Account(tenant, None)
            _tune(now, account, tenant, self.book.plan_of(tenant))
        return account

    def _refusals(
        self, now: float, account: _Account, request: GenerationRequest, queue_wait_s: float
    ) -> Iterator[_Refusal]:
        tenant, prompt, output = account.tenant, len(request.prompt), request.sampling.max_tokens
        for name, unit, limit, in_use, asked in (
            ("queue_requests_max", "requests", tenant.queue_requests_max, account.waiting, 1),
            ("queue_tokens_max", "tokens", tenant.queue_tokens_max, account.waiting_tokens, prompt),
        ):
            # One request may always wait, however long its prompt.
            if limit is not None and account.waiting and in_use + asked > limit:
                facts = QuotaFacts(tenant=tenant.id, limit=name, unit=unit, value=limit, in_use=in_use, asked=asked)
                yield _Refusal(facts, f"{in_use} {unit} are waiting, {limit} may", now + queue_wait_s)
        for name, unit, rate, bucket, asked in (
            ("requests_per_minute", "requests", tenant.requests_per_minute, account.requests, 1),
            ("tokens_per_minute", "tokens", tenant.tokens_per_minute, account.tokens, prompt + output),
        ):
            if rate is not None and bucket is not None and not bucket.admits(now, asked):
                in_use_now = bucket.burst - bucket.level(now)
                facts = QuotaFacts(tenant=tenant.id, limit=name, unit=unit, value=rate, in_use=in_use_now, asked=asked)
                yield _Refusal(facts, f"{rate:g} {unit} per minute are reached", bucket.admits_at(asked))
        spent = self.budgets.exhausted(
            now, tenant, tokens=prompt + output, money_micros=_dearest(account.plan, prompt, output)
        )
        if spent is not None:
            name = f"budgets.{spent.budget.period.value}.{spent.unit}"
            asked = prompt + output if spent.unit == "tokens" else _dearest(account.plan, prompt, output)
            facts = QuotaFacts(
                tenant=tenant.id, limit=name, unit=spent.unit, value=spent.limit, in_use=spent.in_use, asked=asked
            )
            what = "tokens" if spent.unit == "tokens" else "millionths of money"
            left = f"{max(0, spent.limit - spent.in_use)} {what} left"
            message = f"the budget per {spent.budget.period.value} has {left}, this may cost {asked}"
            yield _Refusal(facts, message, spent.retry_at)


def _too_large(tenant: Tenant, prompt: int, output: int) -> TandemError | None:
    for name, what, field_name, limit, asked in (
        ("prompt_tokens_max", "prompt tokens", "prompt", tenant.prompt_tokens_max, prompt),
        ("output_tokens_max", "tokens to generate", "sampling.max_tokens", tenant.output_tokens_max, output),
        ("tokens_in_flight_max", "prompt and generated tokens", "prompt", tenant.tokens_in_flight_max, prompt + output),
    ):
        if limit is not None and asked > limit:
            return OutOfRange(field_name, f"{asked} {what}, this tenant may have {limit}", limit=name)
    return None


def _dearest(plan: PricePlan | None, prompt: int, output: int) -> int:
    return 0 if plan is None else plan.price_max_micros(prompt_tokens=prompt, completion_tokens=output)


def _tune(now: float, account: _Account, tenant: Tenant, plan: PricePlan | None) -> None:
    account.tenant, account.plan = tenant, plan
    account.requests = _bucket(now, account.requests, tenant.requests_per_minute, tenant.burst_s)
    account.tokens = _bucket(now, account.tokens, tenant.tokens_per_minute, tenant.burst_s)


def _bucket(now: float, bucket: Bucket | None, per_minute: float | None, burst_s: float) -> Bucket | None:
    if per_minute is None:
        return None
    rate = per_minute / 60.0
    burst = max(1.0, rate * burst_s)
    if bucket is None:
        return Bucket(rate, burst)
    bucket.retune(now, rate, burst)
    return bucket
