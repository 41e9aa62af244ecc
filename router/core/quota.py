"""Refusals by a tenant's own limit, with the facts that a caller needs to do something about it."""

from __future__ import annotations

from dataclasses import dataclass

from router.core.errors import Rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaFacts:
    """What edges tell as google.rpc.QuotaFailure, or in HTTP headers."""

    tenant: str
    #: Name of the tenant's setting, for example `tokens_per_minute` or `budgets.month.tokens`.
    limit: str
    unit: str
    value: float
    in_use: float
    asked: float


class OverQuota(Rejected):
    """`reason` is `limit` in UPPER_SNAKE. With `retry_after_s`, the same request is admitted after that time if the
    tenant's load stays as it is; None: it will never be admitted under the present limits and use."""

    def __init__(self, message: str, quota: QuotaFacts, *, retry_after_s: float | None) -> None:
        super().__init__(quota.limit.replace(".", "_").upper(), message, retry_after_s=retry_after_s)
        self.quota = quota
