"""What has to hold after a run, by kind. A check in a scenario's file names its kind and that kind's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import merge
from typing import Any

from router.core.quota import OverQuota
from simulator.scenario import Run


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure. `limit` is for people."""

    id: str
    value: float | None
    limit: str
    ok: bool


#: `reference` is the run to compare with, where the scenario has one.
Kind = Callable[[Run, Run | None, Mapping[str, Any]], Finding]


def judge(run: Run, reference: Run | None) -> list[Finding]:
    return [KINDS[check["kind"]](run, reference, check) for check in run.scenario.checks]


def _named(run: Run, check: Mapping[str, Any], value: float | None, limit: str, ok: bool) -> Finding:
    name = check.get("id", check["kind"].replace("_", "-"))
    return Finding(f"{run.scenario.name}/{name}", None if value is None else round(value, 6), limit, ok)


def _at_most(run: Run, check: Mapping[str, Any], value: float | None, limit: float) -> Finding:
    return _named(run, check, value, f"<= {limit:g}", value is not None and value <= limit)


def _at_least(run: Run, check: Mapping[str, Any], value: float | None, limit: float) -> Finding:
    return _named(run, check, value, f">= {limit:g}", value is not None and value >= limit)


def _window(run: Run, check: Mapping[str, Any]) -> tuple[float, float]:
    return check.get("since", 0.0), check.get("until", run.scenario.duration_s)


# Shares.


def _service_ratio(run: Run, _: Run | None, check: Mapping[str, Any]) -> Finding:
    """Service of the first of `of` over that of the second, at `target` give or take the share `within`."""
    first, second = (run.cost(tenant, *_window(run, check)) for tenant in check["of"])
    ratio = first / second if second else None
    target, within = check["target"], check["within"]
    ok = ratio is not None and abs(ratio / target - 1) <= within
    return _named(run, check, ratio, f"{target:g} +- {within:.0%}", ok)


def _gap(run: Run, _: Run | None, check: Mapping[str, Any]) -> Finding:
    """The largest difference of weighted service at any instant, as a share of the theory's bound,
    2 max(prompt cost, output cost of a full cap) / weight of the lighter one. All of `of` are backlogged throughout."""
    tenants = {name: run.book.tenants[name] for name in check["of"]}
    prompt_max = max(load.prompt[1] for load in run.scenario.loads if load.tenant in tenants)
    held_max = max(tenant.tokens_in_flight_max or 0 for tenant in tenants.values())
    bound = 2 * max(prompt_max, 2 * held_max) / min(tenant.weight for tenant in tenants.values())
    served = dict.fromkeys(tenants, 0.0)
    worst = 0.0
    for _when, name, cost in merge(*([(when, name, cost) for when, cost in run.work[name]] for name in tenants)):
        served[name] += cost / tenants[name].weight
        worst = max(worst, max(served.values()) - min(served.values()))
    return _at_most(run, check, worst / bound, 1.0)


def _jain(run: Run, _: Run | None, check: Mapping[str, Any]) -> Finding:
    """Of service / weight over all tenants that ask."""
    names = {load.tenant for load in run.scenario.loads}
    shares = [run.cost(name, *_window(run, check)) / run.book.tenants[name].weight for name in names]
    square = sum(share * share for share in shares)
    return _at_least(run, check, sum(shares) ** 2 / (len(shares) * square) if square else None, check["at_least"])


def _share(run: Run, _: Run | None, check: Mapping[str, Any]) -> Finding:
    """A tenant's part of all service."""
    window = _window(run, check)
    total = sum(run.cost(name, *window) for name in list(run.work))
    share = run.cost(check["tenant"], *window) / total if total else None
    target, within = check["target"], check["within"]
    ok = share is not None and abs(share / target - 1) <= within
    return _named(run, check, share, f"{target:g} +- {within:.0%}", ok)


def _conserves(run: Run, reference: Run | None, check: Mapping[str, Any]) -> Finding:
    """All service, against the reference run's."""
    assert reference is not None
    window = _window(run, check)
    ours, theirs = (sum(one.cost(name, *window) for name in list(one.work)) for one in (run, reference))
    return _at_least(run, check, ours / theirs if theirs else None, check["at_least"])


# Latency.


def _ttft(run: Run, reference: Run | None, check: Mapping[str, Any]) -> Finding:
    """A percentile of a tenant's time to first token, over the reference run's."""
    assert reference is not None
    ours, theirs = (_ttft_at(one, check) for one in (run, reference))
    ratio = ours / theirs if ours is not None and theirs else None
    return _at_most(run, check, ratio, check["at_most"])


def _ttft_at(run: Run, check: Mapping[str, Any]) -> float | None:
    since, until = _window(run, check)
    asked = [served for served in run.of(check["tenant"]) if since <= served.request.arrival < until]
    # Who never got a token waited at least until the end.
    times = sorted(run.scenario.duration_s if one.ttft_s is None else one.ttft_s for one in asked)
    return times[min(len(times) - 1, int(len(times) * check["percentile"]))] if times else None


def _guarantee(run: Run, _: Run | None, check: Mapping[str, Any]) -> Finding:
    """From `since` on, second by second: tokens of the tenant's requests that were dispatched, as a share of those
    asked for so far; the worst second counts. What was asked in the last `grace_s` of a second may go in the next."""
    since, until = _window(run, check)
    tenant, grace_s = check["tenant"], check.get("grace_s", 0.05)
    worst = 1.0
    for second in range(1, int(until - since) + 1):
        end = since + second
        asked = sum(tokens for when, tokens in run.asked[tenant] if since <= when < end - grace_s)
        begun = sum(tokens for when, tokens in run.dispatched[tenant] if since <= when < end)
        worst = min(worst, begun / asked)
    return _at_least(run, check, worst, check["at_least"])


def _delivered(run: Run, reference: Run | None, check: Mapping[str, Any]) -> Finding:
    """From `since` on, second by second: what was computed and generated for the tenant so far, as a share of what
    the reference run had; the worst second counts."""
    assert reference is not None
    since, until = _window(run, check)
    tenant = check["tenant"]
    shares = [
        run.cost(tenant, since, since + second) / reference.cost(tenant, since, since + second)
        for second in range(1, int(until - since) + 1)
    ]
    return _at_least(run, check, min(shares), check["at_least"])


def _longest_wait(run: Run, _: Run | None, check: Mapping[str, Any]) -> Finding:
    """The longest time in which no request of some flow that asks was served anything, over all flows."""
    flows: dict[tuple[str, str], list[float]] = {}
    for load in run.scenario.loads:
        lane = load.lane.value if load.lane is not None else "standard"
        flows[load.tenant, lane] = [load.start_s]
    for served in run.served:
        if served.dispatched_at is not None:
            flows[served.request.tenant, served.request.lane.value].append(served.dispatched_at)
    longest = 0.0
    for times in flows.values():
        ordered = [*sorted(times), run.scenario.duration_s]
        longest = max(longest, *(later - earlier for earlier, later in zip(ordered, ordered[1:], strict=False)))
    return _at_most(run, check, longest, check["at_most"])


# Limits.


def _overspend(run: Run, _: Run | None, check: Mapping[str, Any]) -> Finding:
    """What was used of every budget of the tenant beyond it, and beyond what is settled: both must be nothing."""
    tenant = run.book.tenants[check["tenant"]]
    used = [usage for usage in run.pool.usage if usage.tenant == tenant.id]
    tokens = sum(usage.prompt_tokens + usage.completion_tokens for usage in used)
    money = sum(usage.money_micros for usage in used)
    over = 0
    for balance in run.pool.core.admission.budgets.balances(run.pool.now, tenant):
        open_tokens = sum(held.tokens for held in run.pool.core.admission.budgets.open if held.tenant == tenant.id)
        over = max(over, tokens - (balance.budget.tokens or tokens), money - (balance.budget.money_micros or money))
        over = max(over, abs(balance.tokens - open_tokens - tokens))
    return _at_most(run, check, float(over), 0.0)


def _spent(run: Run, _: Run | None, check: Mapping[str, Any]) -> Finding:
    """How much of a budget in tokens was of use: a limit that refuses too early is wrong too."""
    tenant = run.book.tenants[check["tenant"]]
    used = [usage for usage in run.pool.usage if usage.tenant == tenant.id]
    tokens = sum(usage.prompt_tokens + usage.completion_tokens for usage in used)
    limit = min(budget.tokens for budget in tenant.budgets if budget.tokens is not None)
    return _at_least(run, check, tokens / limit, check["at_least"])


def _retries_succeed(run: Run, _: Run | None, check: Mapping[str, Any]) -> Finding:
    """Of requests that were told when to come back, and did, how many were admitted then."""
    tries: dict[tuple[int, ...], list[bool]] = {}
    for served in run.of(check["tenant"]):
        tries.setdefault(served.request.prompt, []).append(not isinstance(served.error, OverQuota))
    second = [outcomes[1] for outcomes in tries.values() if len(outcomes) > 1]
    return _at_least(run, check, sum(second) / len(second) if second else None, check["at_least"])


# Borders.


def _confined(run: Run, _: Run | None, check: Mapping[str, Any]) -> Finding:
    """Requests of a tenant that touched a worker without the label, and of others that touched one with it."""
    name, value = check["label"]
    crossed = 0
    for served in run.served:
        inside = {run.worker_labels[worker_id].get(name) == value for worker_id in served.workers}
        crossed += (served.request.tenant != check["tenant"]) in inside
    return _at_most(run, check, float(crossed), 0.0)


def _unavailable(run: Run, _: Run | None, check: Mapping[str, Any]) -> Finding:
    """Of a tenant's requests asked for in the window, the share that ended as UNAVAILABLE for want of workers."""
    since, until = _window(run, check)
    asked = [served for served in run.of(check["tenant"]) if since <= served.request.arrival < until]
    told = sum(1 for served in asked if getattr(served.error, "reason", "") == "NO_WORKERS")
    return _at_least(run, check, told / len(asked) if asked else None, 1.0)


def _lane(run: Run, _: Run | None, check: Mapping[str, Any]) -> Finding:
    """Requests of a tenant served in another lane than this one."""
    others = [one for one in run.of(check["tenant"]) if one.request.lane.value != check["lane"]]
    return _at_most(run, check, float(len(others)), 0.0)


def _preemptions(run: Run, _: Run | None, check: Mapping[str, Any]) -> Finding:
    return _at_least(run, check, float(run.pool.core.stats.preemptions), check["at_least"])


def _correct(run: Run, _: Run | None, check: Mapping[str, Any]) -> Finding:
    """Answers that ended well with another number of tokens than they have."""
    ended = [one for one in run.served if one.ended_at is not None and one.error is None and not one.lost]
    wrong = sum(1 for one in ended if one.tokens != one.output_tokens)
    return _at_most(run, check, float(wrong), 0.0)


KINDS: Mapping[str, Kind] = {
    "service_ratio": _service_ratio,
    "gap": _gap,
    "jain": _jain,
    "share": _share,
    "conserves": _conserves,
    "ttft": _ttft,
    "guarantee": _guarantee,
    "delivered": _delivered,
    "longest_wait": _longest_wait,
    "overspend": _overspend,
    "spent": _spent,
    "retries_succeed": _retries_succeed,
    "confined": _confined,
    "unavailable": _unavailable,
    "lane": _lane,
    "preemptions": _preemptions,
    "correct": _correct,
}
