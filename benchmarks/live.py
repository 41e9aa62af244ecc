"""`make bench-live`: a scenario of the simulator against real processes, beside the same scenario in virtual time.

A router, workers with the simulated engine and one client process per tenant; the scenario (`live.toml`) says who asks
for what, and how long the engines' steps take. Cost is counted as the simulator counts it: 1 per prompt token when its
first token arrives, 2 per generated token. What should agree: who was served how much, and the time to first token.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from random import Random

from benchmarks.cluster import MODEL, cluster, wait_ready
from benchmarks.report import Check, Row, environment, percentile, report
from engine.base import EngineOptions
from prefill.admission import PrefillLimits
from router.config import AuthConfig, RouterConfig
from router.edge import keys
from router.edge.identity import Scope
from simulator.scenario import LoadShape, Run, Scenario, all_scenarios, step_model
from tandem import AsyncClient, TandemError
from trust.join import join_key
from worker.config import Role

SCENARIO = "live"
SINCE, UNTIL = 10.0, 70.0
AGREE = 0.05
OPERATOR = "ops"
SECRET = b"of the benchmark's own cluster only"
#: For every process to be there before the first request.
HEAD_START_S = 5.0
VOCABULARY = (300, 4096)


@dataclass(slots=True)
class Seen:
    """What one tenant's clients saw. Seconds since the scenario began."""

    #: When, and how much cost.
    work: list[tuple[float, float]] = field(default_factory=list)
    #: When it was asked for, and how long the first token took.
    ttft: list[tuple[float, float]] = field(default_factory=list)
    #: Of whole answers: seconds per token after the first.
    tpot: list[float] = field(default_factory=list)
    asked: int = 0
    refused: int = 0
    wrong: int = 0

    def cost(self) -> float:
        return sum(cost for when, cost in self.work if SINCE <= when < UNTIL)

    def ttft_at(self, share: float) -> float | None:
        return percentile([took for when, took in self.ttft if SINCE <= when < UNTIL - SINCE], share)


def play(load: LoadShape, address: str, key: str, began: float, duration_s: float, seed: str) -> Seen:
    """One tenant's client process."""
    return asyncio.run(_play(load, address, key, began, duration_s, Random(seed)))


async def _play(load: LoadShape, address: str, key: str, began: float, duration_s: float, random: Random) -> Seen:
    seen, text = Seen(), Random(random.getstate()[1][0])
    async with AsyncClient(address, api_key=key, retries=0) as client, asyncio.TaskGroup() as tasks:

        def now() -> float:
            return time.monotonic() - began

        def lengths() -> tuple[int, int]:
            """Drawn as the simulator draws them, so that both runs ask for the same."""
            return random.randint(*load.prompt), random.randint(*load.output)

        async def ask(prompt_tokens: int, tokens: int) -> bool:
            prompt = [text.randrange(*VOCABULARY) for _ in range(prompt_tokens)]
            asked_at, got, first, seen_first = now(), 0, True, 0.0
            seen.asked += 1
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(duration_s - now()):
                        generation = client.generate(
                            prompt, max_tokens=tokens, return_token_ids=True, ignore_eos=True, temperature=0.0
                        )
                        async for delta in generation:
                            when = now()
                            if first:
                                seen_first = when - asked_at
                                seen.ttft.append((asked_at, seen_first))
                                seen.work.append((when, float(len(prompt))))
                                first = False
                            got += len(delta.token_ids)
                            seen.work.append((when, 2.0 * len(delta.token_ids)))
                        seen.wrong += got != tokens
                        seen.tpot.append((now() - asked_at - seen_first) / max(1, tokens - 1))
            except TandemError:
                seen.refused += 1
                return False
            return True

        async def keep_asking() -> None:
            while now() < duration_s:
                if not await ask(*lengths()):
                    await asyncio.sleep(0.05)

        await asyncio.sleep(max(0.0, -now()))
        if load.shape == "closed":
            for _ in range(load.depth):
                tasks.create_task(keep_asking())
        else:
            due = 0.0
            while due < duration_s:
                await asyncio.sleep(max(0.0, due - now()))
                tasks.create_task(ask(*lengths()))
                due += random.expovariate(load.rate_per_s)
    return seen


def live(scenario: Scenario, folder: Path) -> dict[str, Seen]:
    (shape,) = scenario.pools
    router, made = _router(scenario, folder)
    options = EngineOptions(
        name="",
        model=str(MODEL),
        served_model_name="nano",
        cluster_secret=SECRET,
        transports=("shm", "tcp"),
        block_tokens=16,
        kv_bytes_per_token=64,
        kv_cache_bytes=64 * shape.kv_tokens,
        max_batched_tokens=shape.step_tokens,
        prefix_caching=False,
        step_time=shape.hardware,
        speedup=1.0,
    )
    roles = [Role.PREFILL] * shape.prefill + [Role.DECODE] * shape.decode
    limits = PrefillLimits(running=shape.prefill_legs, queued=0)
    with (
        cluster("live", roles, options, engine="sim", logs=folder / "logs", router=router, prefill=limits) as there,
        ProcessPoolExecutor(len(scenario.loads), get_context("spawn")) as processes,
    ):
        wait_ready(there, len(roles), api_key=made[OPERATOR])
        began = time.monotonic() + HEAD_START_S
        playing = {
            load.tenant: processes.submit(
                play,
                load,
                there.address,
                made[load.tenant],
                began,
                scenario.duration_s,
                f"{scenario.seed}/{load.tenant}/{index}",
            )
            for index, load in enumerate(scenario.loads)
        }
        return {tenant: future.result() for tenant, future in playing.items()}


def _router(scenario: Scenario, folder: Path) -> tuple[RouterConfig, Mapping[str, str]]:
    """Its configuration, and everybody's key."""
    lines = []
    for tenant in scenario.tenants:
        lines += [f"[tenants.{tenant.id}]", f"weight = {tenant.weight}"]
        lines += [f"queue_requests_max = {tenant.queue_requests_max}"] if tenant.queue_requests_max else []
    (folder / "tenants.toml").write_text("\n".join(lines) + "\n")
    store, made = folder / "keys.json", {}
    for name in (OPERATOR, *(tenant.id for tenant in scenario.tenants)):
        scopes = frozenset({Scope.ADMIN if name == OPERATOR else Scope.INFERENCE})
        with keys.editing(store, store.with_name("pepper")) as editor:
            changed, _, made[name] = editor.store.create(editor.pepper, name, time.time(), scopes=scopes)
            editor.save(changed)
    config = RouterConfig(
        model_dir=str(MODEL),
        model_name="nano",
        port=0,
        log_level="WARNING",
        tenants_file=str(folder / "tenants.toml"),
        auth=AuthConfig(mode="keys", keys_file=str(store)),
        join_key=join_key(SECRET),
        step=step_model(scenario.pools[0].hardware),
    )
    return config, made


def virtual(run: Run) -> dict[str, Seen]:
    found = {}
    for load in run.scenario.loads:
        served = run.of(load.tenant)
        found[load.tenant] = Seen(
            work=run.work[load.tenant],
            ttft=[(one.request.arrival, one.ttft_s) for one in served if one.ttft_s is not None],
            tpot=[
                (one.ended_at - one.first_token_at) / (one.tokens - 1)
                for one in served
                if one.first_token_at is not None and one.ended_at is not None and one.error is None
            ],
            asked=len(served),
            refused=sum(1 for one in served if one.error is not None),
        )
    return found


def rows_and_checks(here: Mapping[str, Seen], there: Mapping[str, Seen]) -> tuple[list[Row], list[Check]]:
    """`here` is live, `there` virtual."""
    rows: list[Row] = []
    checks: list[Check] = []
    totals = [sum(seen.cost() for seen in one.values()) for one in (here, there)]
    for tenant in here:
        row: dict[str, str | int | float | bool | None] = {"what": tenant}
        for name, one, total in (("live", here, totals[0]), ("virtual", there, totals[1])):
            seen = one[tenant]
            row[f"share_{name}"] = round(seen.cost() / total, 4)
            row[f"ttft_p50_s_{name}"] = _rounded(seen.ttft_at(0.5))
            row[f"ttft_p99_s_{name}"] = _rounded(seen.ttft_at(0.99))
            row[f"tpot_p50_ms_{name}"] = round((percentile(seen.tpot, 0.5) or 0.0) * 1e3, 2)
            row[f"asked_{name}"], row[f"refused_{name}"] = seen.asked, seen.refused
        rows.append(row)
        for figure in ("share", "ttft_p50_s", "ttft_p99_s"):
            checks.append(_agrees(f"{tenant}: {figure}, live over virtual", row, figure))
    ratio = here["four"].cost() / here["one"].cost()
    checks.append(Check("live: service of 4 over 1", round(ratio, 3), "4 +- 5%", abs(ratio / 4 - 1) <= AGREE))
    checks.append(_same("all service, live over virtual", totals[0], totals[1]))
    wrong = sum(seen.wrong for seen in here.values())
    checks.append(Check("live: wrong answers", float(wrong), "0", not wrong))
    return rows, checks


def _agrees(name: str, row: Row, figure: str) -> Check:
    return _same(name, row[f"{figure}_live"], row[f"{figure}_virtual"])


def _same(name: str, one: object, other: object) -> Check:
    known = isinstance(one, int | float) and isinstance(other, int | float) and other
    ratio = float(one) / float(other) if known else None  # type: ignore[arg-type]
    ok = ratio is not None and abs(ratio - 1) <= AGREE
    return Check(name, None if ratio is None else round(ratio, 3), f"1 +- {AGREE:.0%}", ok)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def main() -> None:
    env = environment()
    scenario = next(one for one in all_scenarios() if one.name == SCENARIO)
    there = virtual(scenario.run())
    with tempfile.TemporaryDirectory() as folder:
        here = live(scenario, Path(folder))
    report("live", *rows_and_checks(here, there), env)


if __name__ == "__main__":
    main()
