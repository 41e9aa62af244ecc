"""`make bench-isolation`: tenants on one cluster see nothing of each other, whatever fails.

**Blocks.** Thousands of requests of six tenants over one small set of prompts, which tempts caches to share, with
clients that go away, readers that stop until their leases have ended and workers that are killed. The simulated
engine's KV bytes are chained from the tenant's salt, its tokens follow from the bytes it reads, and what came over a
transport is compared whole: the salt is a tag in every byte. So each answer is compared with what the tenant's own salt
makes of the prompt, worked out here without an engine; and with what the other tenants' salts would have made, which
shows that the comparison could tell.

**Caches.** The same prompt twice: cached tokens for the same tenant, for its sharing group, and for a stranger.

**Time.** What tenant B's first token of a prompt takes when A has just asked the same, and when A asked another:
Kolmogorov-Smirnov's distance of the two distributions, beside the distance that chance alone exceeds once in a thousand
tries, and beside B's own cache, which must be seen.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import signal
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from benchmarks.cluster import MODEL, ROOT
from benchmarks.report import Check, Row, at_least, at_most, environment, report
from engine.base import EngineOptions
from engine.sim_memory import Chain
from engine.sim_model import read_model
from router.core.salt import cache_salt
from router.core.tenant import Tenant
from router.edge import keys
from router.edge.identity import Scope
from tandem import AsyncClient, Client, TandemError, rundir
from tandem.errors import Cancelled
from tests.engine.reference import answer

#: "c" and "d" share caches on purpose.
TENANTS = {name: Tenant(id=name, sharing_group="family" if name in "cd" else "") for name in "abcdef"}
REQUESTS, AT_ONCE, KILLS = 10_000, 24, 10
CANCELLED_SHARE = 0.05
#: Requests whose leases nobody is there to read, before each kill.
UNREAD = 4
ENDED_WITHIN_S = 60.0
TIMED = 250
START_S = 60.0
#: Per worker: room for a few dozen prompts, so that blocks change hands all the time.
_KV_TOKENS = 16_384
_KV_BYTES_PER_TOKEN = 64

_CONFIG = """
[cluster]
served_model_name = "nano"
[router]
tenants_file = "tenants.toml"
log_level = "WARNING"
[router.auth]
mode = "keys"
keys_file = "auth/keys.json"
[engine]
kv_bytes_per_token = {kv_bytes_per_token}
kv_cache_bytes = {kv_bytes}
staging_bytes = {staging_bytes}
block_tokens = 16
speedup = {speedup}
step_time = "h200-llama-3.1-8b"
transports = ["shm", "tcp"]
[worker.prefill]
lease_ttl_s = {lease_ttl_s}
[worker.decode]
fetches = 2
fetch_timeout_s = {fetch_timeout_s}
[supervisor]
restarts_max = 1000
first_restarts_max = 1000
backoff_first_s = 0.1
backoff_max_s = 0.2
"""


@dataclass(slots=True)
class Up:
    address: str
    folder: Path
    keys: dict[str, str]
    pepper: bytes
    operator: str

    def client(self, tenant: str) -> AsyncClient:
        return AsyncClient(self.address, api_key=self.keys[tenant], retries=0)

    def pids(self) -> dict[str, int]:
        with Client(self.address, api_key=self.operator) as client:
            return {worker.worker_id: worker.pid for worker in client.status().workers}

    def leases_expired(self) -> int:
        with Client(self.address, api_key=self.operator) as client:
            return sum(worker.load.leases_expired_total for worker in client.status().workers)


@contextmanager
def up(folder: Path, *, speedup: float, lease_ttl_s: float) -> Iterator[Up]:
    """A cluster of two prefill and two decode workers that are started again when they die."""
    (folder / "tandem.toml").write_text(
        _CONFIG.format(
            kv_bytes_per_token=_KV_BYTES_PER_TOKEN,
            kv_bytes=_KV_BYTES_PER_TOKEN * _KV_TOKENS,
            staging_bytes=_KV_BYTES_PER_TOKEN * _KV_TOKENS // 2,
            speedup=speedup,
            lease_ttl_s=lease_ttl_s,
            fetch_timeout_s=lease_ttl_s * 0.9,
        )
    )
    lines = [
        f'[tenants.{tenant.id}]\nsharing_group = "{tenant.sharing_group}"\n'
        if tenant.sharing_group
        else f"[tenants.{tenant.id}]\n"
        for tenant in TENANTS.values()
    ]
    (folder / "tenants.toml").write_text("".join(lines))
    store, made = folder / "auth" / "keys.json", {}
    for name in (*TENANTS, "ops"):
        with keys.editing(store, store.with_name("pepper")) as editor:
            scopes = frozenset({Scope.ADMIN if name == "ops" else Scope.INFERENCE})
            changed, _, made[name] = editor.store.create(editor.pepper, name, time.time(), scopes=scopes)
            editor.save(changed)
            pepper = editor.pepper
    state = folder / "state"
    command = [
        sys.executable,
        "-m",
        "tandem",
        "up",
        "--engine",
        "sim",
        "--prefill",
        "2",
        "--decode",
        "2",
        "--no-prompt",
    ]
    command += ["--port", "0", "--state-dir", str(state), "--config", str(folder / "tandem.toml")]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
    environ["PYTHONPATH"] = str(ROOT)
    output = folder / "up.out"
    with output.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=out, stderr=subprocess.STDOUT)
    try:
        give_up = time.monotonic() + START_S
        while "\nserving on" not in output.read_text():
            if process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"the cluster did not start:\n{output.read_text()}")
            time.sleep(0.1)
        running = rundir.running(state)
        assert running is not None
        yield Up(running.address, folder, made, pepper, made["ops"])
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


class Truth:
    """What an engine that sees only the tenant's own bytes answers."""

    def __init__(self, pepper: bytes) -> None:
        model = read_model(
            EngineOptions(name="", model=str(MODEL), served_model_name="nano", cluster_secret=b"", block_tokens=16)
        )
        self._chain = Chain(model.info.revision, model.info.vocab_size)
        self._usable = [int(token) for token in model.usable_tokens]
        secret = hmac.digest(pepper, b"cache salts", "sha256")
        self._salts = {name: cache_salt(secret, tenant).hex() for name, tenant in TENANTS.items()}
        self._known: dict[tuple[str, tuple[int, ...], int], list[int]] = {}

    def answer(self, tenant: str, prompt: tuple[int, ...], count: int) -> list[int]:
        key = (self._salts[tenant], prompt, count)
        if key not in self._known:
            self._known[key] = answer(self._chain, self._usable, key[0], prompt, count)
        return self._known[key]


@dataclass(slots=True)
class Storm:
    """What came of it."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    #: Answers that another tenant's salt would have made; of those that it could be told of.
    foreign: int = 0
    tellable: int = 0
    retried: int = 0
    cached: int = 0
    kills: int = 0
    leases_expired: int = 0


def prompts(random: Random, count: int) -> list[tuple[int, ...]]:
    """Many begin alike, and few end with a whole block."""
    stem = [random.randrange(300, 4096) for _ in range(400)]
    return [
        (
            *stem[: random.choice((0, 40, 160, 300))],
            *(random.randrange(300, 4096) for _ in range(random.randint(20, 200))),
        )
        for _ in range(count)
    ]


async def storm(there: Up, requests: int, kills: int, seed: int = 1) -> Storm:
    random, truth, result = Random(seed), Truth(there.pepper), Storm()
    asked = prompts(random, 40)
    clients = {name: there.client(name) for name in TENANTS}
    left = iter(range(requests - kills * UNREAD))
    done = 0

    async def one(prompt: tuple[int, ...]) -> None:
        name, count = random.choice("abcdef"), random.randint(2, 10)
        goes_away = random.random() < CANCELLED_SHARE
        generation = clients[name].generate(
            prompt, max_tokens=count, temperature=0.0, ignore_eos=True, return_token_ids=True, timeout_s=60.0
        )
        try:
            if goes_away:
                async for _ in generation:
                    break
                generation.close()
                result.outcomes["went away"] += 1
                return
            said = await generation.result()
        except Cancelled:
            result.outcomes["went away"] += 1
            return
        except TandemError as error:
            result.outcomes[error.reason or error.code] += 1
            return
        result.outcomes["finished"] += 1
        result.retried += bool(said.finished.route.retries)
        result.cached += bool(said.finished.usage.cached_prompt_tokens)
        tokens = list(said.token_ids)
        result.wrong += tokens != truth.answer(name, prompt, count)
        others = [truth.answer(other, prompt, count) for other in TENANTS if truth._salts[other] != truth._salts[name]]
        result.foreign += tokens in others
        result.tellable += truth.answer(name, prompt, count) not in others

    async def keep_asking() -> None:
        nonlocal done
        for _ in left:
            await one(random.choice(asked))
            done += 1

    async def keep_killing() -> None:
        """The readers stop until leases have ended; then a worker dies, each in turn."""
        for number in range(kills):
            while done < requests * (number + 1) // (kills + 1):  # noqa: ASYNC110 - kills are seldom
                await asyncio.sleep(0.05)
            pids = await asyncio.to_thread(there.pids)
            readers = [pid for name, pid in pids.items() if name.startswith("decode")]
            before = await asyncio.to_thread(there.leases_expired)
            for pid in readers:
                os.kill(pid, signal.SIGSTOP)
            try:
                for prompt in prompts(random, UNREAD):
                    tasks.create_task(one(prompt))
                async with asyncio.timeout(ENDED_WITHIN_S):
                    while (ended := await asyncio.to_thread(there.leases_expired)) <= before:  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
                result.leases_expired += ended - before
                os.kill(pids[sorted(pids)[number % len(pids)]], signal.SIGKILL)
            finally:
                for pid in readers:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
            result.kills += 1

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(keep_killing())
            for _ in range(AT_ONCE):
                tasks.create_task(keep_asking())
    finally:
        for client in clients.values():
            await client.close()
    return result


@dataclass(slots=True)
class Asked:
    cached_tokens: int
    ttft_s: float


async def ask(there: Up, tenant: str, prompt: tuple[int, ...]) -> Asked:
    async with there.client(tenant) as client:
        await client.models()  # so that connecting is not measured
        began, first = time.monotonic(), 0.0
        generation = client.generate(prompt, max_tokens=2, temperature=0.0, ignore_eos=True, return_token_ids=True)
        async for _ in generation:
            first = first or time.monotonic()
        assert generation.finished is not None
        return Asked(generation.finished.usage.cached_prompt_tokens, first - began)


async def caches(there: Up) -> dict[str, int]:
    """Cached tokens of a prompt that "a" and "c" have asked before."""
    prompt = tuple(Random(5).randrange(300, 4096) for _ in range(320))
    for tenant in "ac":
        await ask(there, tenant, prompt)
    return {
        "same salt": (await ask(there, "a", prompt)).cached_tokens,
        "same sharing group": (await ask(there, "d", prompt)).cached_tokens,
        "another salt": (await ask(there, "b", prompt)).cached_tokens,
    }


async def timing(there: Up, count: int) -> dict[str, list[float]]:
    """Times to first token of "b": after "a" asked the same, after "a" asked another, and after "b" itself did."""
    random = Random(7)
    found: dict[str, list[float]] = {"a asked the same": [], "a asked another": [], "b asked it before": []}

    def new() -> tuple[int, ...]:
        return tuple(random.randrange(300, 4096) for _ in range(1000))

    order = list(found) * count
    random.shuffle(order)
    for case in order:
        prompt = new()
        await ask(there, "b" if case == "b asked it before" else "a", new() if case == "a asked another" else prompt)
        found[case].append((await ask(there, "b", prompt)).ttft_s)
    return found


def ks_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference of the two cumulative distributions."""
    a, b = sorted(one), sorted(other)
    return max(abs(bisect_right(a, x) / len(a) - bisect_right(b, x) / len(b)) for x in (*a, *b))


def ks_bound(one: int, other: int) -> float:
    """What two samples of one distribution exceed once in a thousand tries (Smirnov's asymptotic)."""
    return 1.949 * ((one + other) / (one * other)) ** 0.5


def main() -> None:
    env = environment()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, up(Path(folder), speedup=1.0, lease_ttl_s=30.0) as there:
        shared = asyncio.run(caches(there))
        times = asyncio.run(timing(there, TIMED))
    with tempfile.TemporaryDirectory() as folder, up(Path(folder), speedup=20.0, lease_ttl_s=0.06) as there:
        result = asyncio.run(storm(there, REQUESTS, KILLS))
    rows += [{"what": f"cached tokens: {case}", "value": count} for case, count in shared.items()]
    for case, took in times.items():
        rows.append({"what": f"b's TTFT p50, ms: {case}", "value": round(sorted(took)[len(took) // 2] * 1e3, 2)})
    rows += [{"what": f"storm: {outcome}", "value": count} for outcome, count in sorted(result.outcomes.items())]
    rows += [
        {"what": "storm: workers killed", "value": result.kills},
        {"what": "storm: leases that ended unread", "value": result.leases_expired},
        {"what": "storm: answers after a failed leg", "value": result.retried},
        {"what": "storm: answers with cached tokens", "value": result.cached},
    ]
    same, other, own = times.values()
    checks = [
        at_least("cached tokens under one salt", shared["same salt"], 1),
        at_least("cached tokens within a sharing group", shared["same sharing group"], 1),
        at_most("cached tokens under another salt", shared["another salt"], 0),
        at_most(
            "KS distance of B's TTFT, A's cache warm and cold",
            round(ks_distance(same, other), 4),
            round(ks_bound(len(same), len(other)), 4),
        ),
        at_least("KS distance of B's TTFT, its own cache warm and cold", round(ks_distance(own, other), 4), 0.9),
        at_least("storm: requests", sum(result.outcomes.values()), REQUESTS),
        at_most("storm: wrong answers", result.wrong, 0),
        at_most("storm: answers made of another tenant's bytes", result.foreign, 0),
        Check(
            "storm: answers for which that could be told",
            round(result.tellable / max(1, result.outcomes["finished"]), 4),
            ">= 0.95",
            result.tellable >= 0.95 * result.outcomes["finished"],
        ),
    ]
    report("isolation", rows, checks, env)


if __name__ == "__main__":
    main()
