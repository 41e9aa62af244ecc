"""Scenarios are data: who the tenants are, what they ask for, what happens, and what has to hold then.

A file in `simulator/scenarios/` is one scenario. `Scenario.run` plays it; `simulator/judge.py` looks at what happened.
"""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from random import Random
from typing import Any

from engine.step_time import step_time
from router.core.budget import Record
from router.core.core import Core
from router.core.estimate import StepModel
from router.core.fair import FairLimits
from router.core.limits import CoreLimits
from router.core.request import GenerationRequest, Lane, Sampling
from router.core.tenant import Budget, Period, PricePlan, Tenant, TenantBook
from router.core.worker import Role
from simulator.pool import MODEL, Served, SimulatedPool, WorkerShape, lane_of

SCENARIOS = Path(__file__).parent / "scenarios"

Range = tuple[int, int]

#: Prompts differ in their first token; the rest is cut from here.
_TEXT = tuple(range(1, 65_537))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadShape:
    """What one tenant asks for. `closed` keeps `depth` requests open; `poisson` and `steady` send `rate_per_s`;
    `burst` sends `count` at once at `start_s`."""

    tenant: str
    shape: str
    prompt: Range
    output: Range
    depth: int = 0
    rate_per_s: float = 0.0
    count: int = 0
    lane: Lane | None = None
    start_s: float = 0.0
    stop_s: float | None = None
    #: Declared; 0 declares the true length.
    max_tokens: int = 0
    timeout_s: float = 600.0
    #: The client goes away this long after it asked.
    cancel_after_s: float | None = None
    #: Tokens that all of its prompts begin with.
    shared_prefix: int = 0
    #: A new name for each request, as somebody would have who makes credentials up.
    made_up_names: bool = False
    #: A refused request is sent again when the refusal said so.
    retries: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    at: float
    #: `restart` (the router), `lose` (a worker).
    do: str
    worker: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolShape:
    prefill: int = 2
    decode: int = 2
    hardware: str = "h200-llama-3.1-8b"
    prefill_legs: int = 2
    decode_legs: int = 64
    kv_tokens: int = 400_000
    step_tokens: int = 8192
    cache_tokens: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)

    def worker(self) -> WorkerShape:
        return WorkerShape(
            step_time=step_time(self.hardware),
            prefill_legs=self.prefill_legs,
            decode_legs=self.decode_legs,
            kv_tokens=self.kv_tokens,
            step_tokens=self.step_tokens,
            cache_tokens=self.cache_tokens,
        )

    def scaled(self, share: float) -> PoolShape:
        return replace(self, prefill=max(1, round(self.prefill * share)), decode=max(1, round(self.decode * share)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    name: str
    #: What fair means here, for people.
    what: str
    duration_s: float
    seed: int
    pools: tuple[PoolShape, ...]
    tenants: tuple[Tenant, ...]
    unknown: Tenant | None
    plans: tuple[PricePlan, ...]
    loads: tuple[LoadShape, ...]
    happenings: tuple[Happening, ...]
    #: As they stand in the file; `judge.py` knows their kinds.
    checks: tuple[Mapping[str, Any], ...]
    #: How the run that this one is compared with differs; empty: there is none.
    reference: Mapping[str, Any]
    fast: bool = False

    @property
    def book(self) -> TenantBook:
        return TenantBook(
            tenants={tenant.id: tenant for tenant in self.tenants},
            plans={plan.name: plan for plan in self.plans},
            unknown=self.unknown,
        )

    def referred(self) -> Scenario:
        """The run to compare with: `only` these tenants' loads, on a `pool_share`, without guarantees."""
        changed = self
        if "only" in self.reference:
            only = self.reference["only"]
            changed = replace(changed, loads=tuple(load for load in self.loads if load.tenant in only))
        if "pool_share" in self.reference:
            share = self.reference["pool_share"]
            changed = replace(changed, pools=tuple(pool.scaled(share) for pool in self.pools))
        if self.reference.get("unrestricted"):
            free = tuple(replace(tenant, guaranteed_tokens_per_s=0.0) for tenant in self.tenants)
            changed = replace(changed, tenants=free)
        return changed

    def run(self) -> Run:
        return Run(self)


class Run:
    """One playing of a scenario, and what is remembered of it."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.book = scenario.book
        self.served: list[Served] = []
        #: By tenant: when, and how much cost (1 per prompt token computed, 2 per token generated).
        self.work: dict[str, list[tuple[float, float]]] = defaultdict(list)
        #: By tenant: when, and tokens of requests, asked for and dispatched.
        self.asked: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self.dispatched: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self.worker_labels: dict[str, Mapping[str, str]] = {}
        self.pool = SimulatedPool(self._new_core)
        self.pool.on_work = self._worked
        self._loads: dict[str, tuple[LoadShape, Random]] = {}
        self.pool.on_end = self._ended
        self._asked_ever = 0
        self._join()
        for index, load in enumerate(scenario.loads):
            self._begin(load, Random(f"{scenario.seed}/{load.tenant}/{index}"))
        for happening in scenario.happenings:
            self.pool.at(happening.at, lambda happening=happening: self._happens(happening))  # type: ignore[misc]
        self.pool.run(scenario.duration_s)

    def cost(self, tenant: str, since: float, until: float) -> float:
        return sum(cost for when, cost in self.work[tenant] if since <= when < until)

    def of(self, tenant: str) -> list[Served]:
        return [served for served in self.served if served.request.tenant == tenant]

    def _new_core(self, now: float, records: tuple[Record, ...]) -> Core:
        return Core(
            now=now,
            limits=CoreLimits(queue_requests_max=200_000, queue_tokens_max=10**9, path_wait_s=5.0, history_max=10),
            models=(MODEL,),
            book=self.book,
            fair=FairLimits(output_tokens_first=128),
            step=step_model(self.scenario.pools[0].hardware),
            cache_secret=b"simulated",
            wall_offset_s=1_800_000_000.0,
            records=records,
        )

    def _join(self) -> None:
        for number, shape in enumerate(self.scenario.pools):
            for role, count in ((Role.PREFILL, shape.prefill), (Role.DECODE, shape.decode)):
                for index in range(count):
                    worker_id = f"{number}-{role.value}-{index}"
                    self.worker_labels[worker_id] = shape.labels
                    self.pool.join(worker_id, role, shape.worker(), dict(shape.labels))

    def _happens(self, happening: Happening) -> None:
        if happening.do == "restart":
            self.pool.restart_router()
        elif happening.do == "lose":
            self.pool.lose(happening.worker)
        else:
            raise ValueError(f"unknown happening {happening.do!r}")

    # Clients.

    def _begin(self, load: LoadShape, random: Random) -> None:
        if load.shape in ("closed", "burst"):
            for _ in range(load.depth if load.shape == "closed" else load.count):
                self.pool.at(load.start_s, lambda: self._ask(load, random))
        elif load.shape in ("poisson", "steady"):
            self.pool.at(load.start_s, lambda: self._keep_asking(load, random))
        else:
            raise ValueError(f"unknown load shape {load.shape!r}")

    def _keep_asking(self, load: LoadShape, random: Random) -> None:
        if self._is_over(load):
            return
        self._ask(load, random)
        pause = random.expovariate(load.rate_per_s) if load.shape == "poisson" else 1 / load.rate_per_s
        self.pool.after(pause, lambda: self._keep_asking(load, random))

    def _is_over(self, load: LoadShape) -> bool:
        return self.pool.now >= (self.scenario.duration_s if load.stop_s is None else load.stop_s)

    def _ask(self, load: LoadShape, random: Random) -> None:
        self._asked_ever += 1
        prompt_tokens, output_tokens = random.randint(*load.prompt), random.randint(*load.output)
        name = f"{load.tenant}-{random.getrandbits(64):x}" if load.made_up_names else load.tenant
        first = self._asked_ever + 100_000
        prompt = _TEXT[: load.shared_prefix] + (first,) + _TEXT[1 : prompt_tokens - load.shared_prefix]
        self._send(load, random, name, prompt, output_tokens)

    def _send(self, load: LoadShape, random: Random, name: str, prompt: tuple[int, ...], output_tokens: int) -> None:
        pool = self.pool
        request = GenerationRequest(
            request_id=f"{name}#{len(self.served)}",
            model=MODEL,
            prompt=prompt,
            sampling=Sampling(max_tokens=load.max_tokens or output_tokens, temperature=0.0),
            arrival=pool.now,
            deadline=pool.now + load.timeout_s,
            tenant=name,
            lane=lane_of(self.book, name, load.lane),
        )
        self._loads[request.request_id] = (load, random)
        self.asked[self._tenant(name)].append((pool.now, len(prompt) + output_tokens))
        served = Served(request, output_tokens)
        self.served.append(served)
        pool.send(served)
        if load.cancel_after_s is not None:
            pool.after(load.cancel_after_s, lambda: pool.cancel(served))

    def _ended(self, served: Served) -> None:
        load, random = self._loads.pop(served.request.request_id)
        wait_s = getattr(served.error, "retry_after_s", None)
        if load.retries and wait_s is not None:
            again = served.request.prompt, served.output_tokens
            self.pool.after(wait_s, lambda: self._send(load, random, served.request.tenant, *again))
        elif load.shape == "closed" and not self._is_over(load):
            # A refused client comes back after a moment, others at once.
            self.pool.after(0.0 if served.error is None else 0.05, lambda: self._ask(load, random))

    def _tenant(self, name: str) -> str:
        known = self.book.tenant(name)
        return name if known is None else known.id

    def _worked(self, what: str, served: Served, amount: int) -> None:
        tenant = self._tenant(served.request.tenant)
        if what == "dispatched":
            self.dispatched[tenant].append((self.pool.now, amount))
        else:
            self.work[tenant].append((self.pool.now, amount * (2.0 if what == "generated" else 1.0)))


def step_model(hardware: str) -> StepModel:
    """What a router of such workers is told of them."""
    row = step_time(hardware)
    return StepModel(
        prefill_s=row.prefill_ms / 1e3,
        prefill_s_per_token=row.prefill_ms_per_token / 1e3,
        prefill_s_per_pair=row.prefill_ms_per_pair / 1e3,
        kv_bytes_per_token=row.kv_bytes_per_token,
        transfer_s=0.001,
        transfer_bytes_per_s=40e9,
    )


# Reading.


def load_scenario(path: Path) -> Scenario:
    raw = tomllib.loads(path.read_text())
    random = Random(raw.get("seed", 1))
    known = {"what", "duration_s", "seed", "pools", "tenants", "unknown", "plans", "loads", "happenings", "checks"}
    if unknown := raw.keys() - known - {"reference", "fast"}:
        raise ValueError(f"{path.name}: unknown {', '.join(sorted(unknown))}")
    return Scenario(
        name=path.stem,
        what=" ".join(raw["what"].split()),
        duration_s=float(raw["duration_s"]),
        seed=raw.get("seed", 1),
        pools=tuple(PoolShape(**pool) for pool in raw.get("pools", [{}])),
        tenants=tuple(_tenant(facts) for facts in _each(raw.get("tenants", ()), "id", random)),
        unknown=_tenant(raw["unknown"]) if "unknown" in raw else None,
        plans=tuple(PricePlan(**plan) for plan in raw.get("plans", ())),
        loads=tuple(_load(facts) for facts in _each(raw["loads"], "tenant", random)),
        happenings=tuple(Happening(**happening) for happening in raw.get("happenings", ())),
        checks=tuple(raw["checks"]),
        reference=raw.get("reference", {}),
        fast=raw.get("fast", False),
    )


def all_scenarios() -> list[Scenario]:
    return [load_scenario(path) for path in sorted(SCENARIOS.glob("*.toml"))]


def _each(entries: Iterable[Mapping[str, Any]], name: str, random: Random) -> Iterable[dict[str, Any]]:
    """An entry with `many` stands for that many, numbered; `x_from = [a, b]` draws its x for each from a to b."""
    for entry in entries:
        facts = dict(entry)
        many = facts.pop("many", None)
        for number in range(1 if many is None else many):
            one = {key: value for key, value in facts.items() if not key.endswith("_from")}
            for key, (low, high) in ((key, facts[key]) for key in facts if key.endswith("_from")):
                one[key.removesuffix("_from")] = random.randint(low, high)
            if many is not None:
                one[name] = f"{facts[name]}{number}"
            yield one


def _tenant(facts: Mapping[str, Any]) -> Tenant:
    given = dict(facts)
    if unknown := given.keys() - {field.name for field in fields(Tenant)}:
        raise ValueError(f"tenant {given.get('id')}: unknown {', '.join(sorted(unknown))}")
    if "lanes" in given:
        given["lanes"] = frozenset(Lane(lane) for lane in given["lanes"])
    if "pool" in given:
        given["pool"] = frozenset(given["pool"].items())
    if "budgets" in given:
        given["budgets"] = tuple(
            Budget(period=Period(budget.pop("period")), **budget) for budget in map(dict, given["budgets"])
        )
    return Tenant(**given)


def _load(facts: Mapping[str, Any]) -> LoadShape:
    given = dict(facts)
    for name in ("prompt", "output"):
        value = given[name]
        given[name] = (value, value) if isinstance(value, int) else tuple(value)
    if "lane" in given:
        given["lane"] = Lane(given["lane"])
    return LoadShape(**given)
