"""What a request that ended is billed, from what is known of it."""

from __future__ import annotations

from router.core.budget import Reservation
from router.core.lifecycle import State as Life
from router.core.request import Lane
from router.core.state import OpenRequest
from router.core.usage import UsageFacts, record_id


def usage_of(now: float, opened: OpenRequest, cost: float, completion_tokens: int, wall_s: float) -> UsageFacts:
    """`cost`: what its flow was charged. `wall_s`: `now`, in seconds since 1970."""
    admitted, request = opened.admitted, opened.request
    assert admitted is not None
    plan, money = admitted.plan, 0
    prompt_tokens = _billed_prompt(opened)
    cached_tokens = min(opened.cached_tokens, prompt_tokens) if opened.prompt_done else 0
    if plan is not None and prompt_tokens:
        money = plan.price_micros(
            prompt_tokens=prompt_tokens, cached_prompt_tokens=cached_tokens, completion_tokens=completion_tokens
        )
    return UsageFacts(
        record_id=record_id(admitted.tenant, request.request_id, admitted.wall_s),
        request_id=request.request_id,
        tenant=admitted.tenant,
        key_id=request.key_id,
        model=request.model,
        lane=request.lane,
        outcome=opened.state,
        ended_wall_s=wall_s,
        prompt_tokens=prompt_tokens,
        cached_prompt_tokens=cached_tokens,
        completion_tokens=completion_tokens,
        money_micros=money,
        price_plan="" if plan is None else plan.name,
        price_plan_version="" if plan is None else plan.version,
        prefill_tokens_computed=opened.computed_tokens,
        cost=cost,
        retries=opened.retries,
        preemptions=opened.preemptions,
        transfer_bytes=opened.transfer_bytes,
        queue_s=opened.dispatched_at - request.arrival if opened.dispatched_at is not None else 0.0,
        total_s=now - request.arrival,
    )


def usage_of_lost(held: Reservation, wall_s: float) -> UsageFacts:
    """Of a request that the router died with, known from the budgets' journal alone."""
    terms = held.terms
    prompt_tokens = min(terms.prompt_tokens, held.granted_tokens)
    return UsageFacts(
        record_id=held.record_id,
        request_id=held.request_id,
        tenant=held.tenant,
        key_id=terms.key_id,
        model=terms.model,
        lane=Lane(terms.lane or "standard"),
        outcome=Life.FAILED,
        ended_wall_s=wall_s,
        prompt_tokens=prompt_tokens,
        cached_prompt_tokens=0,
        completion_tokens=held.granted_tokens - prompt_tokens,
        money_micros=held.granted_micros,
        price_plan=terms.price_plan,
        price_plan_version=terms.price_plan_version,
        estimated=True,
    )


def _billed_prompt(opened: OpenRequest) -> int:
    """All of it once it was computed. Of one that the client gave up, or had no more time for, what was computed; of
    one that failed, nothing."""
    if opened.prompt_done:
        return len(opened.request.prompt)
    if opened.state in (Life.CANCELLED, Life.EXPIRED):
        return min(len(opened.request.prompt), opened.charged_prompt_tokens)
    return 0
