"""Faults done to a cluster of real processes under load, and what every request and block must come to all the same.

A run of a case sends requests whose answers are known, does the fault, mostly while a read of KV stands in its middle
(inject.py), and waits for all of them. Each must end before its deadline, with the right tokens so far or a typed
error; two seconds later no worker may hold a block, a lease or a staged page, and no process may have died that nobody
killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tandem import AsyncClient, Cancelled, TandemError
from tandem.client import AsyncGeneration
from tests.cluster.harness import READY_TIMEOUT_S, Cluster, busy, cluster, descendants

SITE = Path(__file__).parent / "site"
ROOT = Path(__file__).parents[2]

#: Requests of a run, in flight at once.
REQUESTS = 10
ANSWER_TOKENS = 40
#: How many prompts there are, of each length.
PROMPTS = 12
PROMPT_TOKENS = {"sim": (512, 1024), "vllm": (160, 384)}
DEADLINE_S = {"sim": 30.0, "vllm": 120.0}
#: What a client may wait past its deadline before it counts as a hang.
SLACK_S = 5.0
#: Decode workers, and how long to wait for the second of them to be in mid-read, too, or for more swaps than one.
READERS, OTHERS_WITHIN_S = 2, 0.1
#: In which everything must be free again, unless a test gives it longer.
FREE_WITHIN_S = 2.0
#: Of leases, in the cases where they run out.
SHORT_TTL_S = 0.3

_REPORTS_EVERY_S = 0.1
SETTINGS = (
    "engine.prefix_caching=false",
    f"router.load_report_interval_s={_REPORTS_EVERY_S}",
    "router.limits.path_wait_s=300",
    "supervisor.restarts_max=100000",
    "supervisor.first_restarts_max=100000",
    "supervisor.backoff_first_s=0.05",
    "supervisor.backoff_max_s=0.1",
)
#: So few blocks that what one lease gave back is soon another's; steps so short that most prompts take several, and
#: their blocks stream.
ENGINE_SETTINGS = {
    "sim": (
        "engine.speedup=5",
        "engine.kv_cache_bytes=24MiB",
        "engine.staging_bytes=16MiB",
        "engine.max_batched_tokens=256",
    ),
    "vllm": (
        "engine.dtype=float32",
        "engine.max_model_len=1024",
        "engine.kv_cache_bytes=16MiB",
        "engine.staging_bytes=8MiB",
        "engine.max_running=16",
        "worker.decode.legs=16",
        "engine.max_batched_tokens=512",
    ),
}


@dataclass(slots=True)
class Tally:
    """What a case came to, over all its runs."""

    runs: int = 0
    #: Reads that stood in their middle when the fault was done.
    in_mid_read: int = 0
    requests: int = 0
    #: Of those, given up by the client before their end.
    aborted: int = 0
    wrong: int = 0
    hangs: int = 0
    #: Of processes that were not killed by the case.
    deaths: int = 0
    #: Blocks, leases and pages still held when everything should have been free.
    leaked: int = 0
    #: Requests that ended with a typed error.
    errors: Counter[str] = field(default_factory=Counter)
    #: Legs that were run again.
    retries: int = 0
    #: What faults inside the workers came to, see inject.py.
    said: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    seconds: float = 0.0

    def problems(self) -> list[str]:
        counts = {"wrong": self.wrong, "hangs": self.hangs, "deaths": self.deaths, "leaked": self.leaked}
        found = [f"{count} {what}" for what, count in counts.items() if count]
        return found + [f"{count} x {word}" for word, count in self.said.items() if must_not_be(word)]


#: How attacks may end. One that replays the handle of a fetch ahead waits for that to be given up, and fails.
_MAY_END = {"tampered": {"REFUSED"}, "stranger": {"REFUSED"}, "replayed": {"REFUSED", "FAILED"}}


def must_not_be(word: str) -> bool:
    """Whether what a worker said of an attack on it means that the attack came through."""
    what, _, outcome = word.partition("-")
    return what in _MAY_END and outcome not in _MAY_END[what]


@dataclass(frozen=True, slots=True)
class Held:
    """A read in its middle: who reads from whom, in which process."""

    owner: str
    reader: str
    transfer: str


@dataclass(slots=True)
class Site:
    """A running cluster with faults in it, and what outlasts one test of it."""

    cluster: Cluster
    #: What inject.py looks into.
    folder: Path
    #: By prompt, once it is learned.
    expected: dict[int, tuple[int, ...]] = field(default_factory=dict)
    kills: int = 0
    #: Of processes that nobody killed.
    deaths: int = 0


class Faults:
    """What is done to a site, and asked of it, in one event loop."""

    def __init__(self, site: Site, client: AsyncClient, seed: int, free_within_s: float) -> None:
        self.site = site
        self.cluster = site.cluster
        self.engine = site.cluster.engine
        self.client = client
        self.random = random.Random(seed)
        self._free_within_s = free_within_s
        self._folder = site.folder
        self._prompts = [
            _prompt(self.engine, tokens, number) for tokens in PROMPT_TOKENS[self.engine] for number in range(PROMPTS)
        ]

    async def learn(self) -> None:
        """What the prompts' answers are, asked one after another and without a fault; some of them twice."""
        if self.site.expected:
            return
        for number in range(len(self._prompts)):
            self.site.expected[number] = await self._answer(number)
        for number in range(0, len(self._prompts), 5):
            assert await self._answer(number) == self.site.expected[number], "the engine does not repeat itself"

    async def _answer(self, number: int) -> tuple[int, ...]:
        result = await self._generate(number).result()
        assert not result.finished.route.local_prefill
        return tuple(result.token_ids)

    def _generate(self, number: int) -> AsyncGeneration:
        return self.client.generate(
            self._prompts[number],
            max_tokens=ANSWER_TOKENS,
            temperature=0.0,
            ignore_eos=True,
            return_token_ids=True,
            timeout_s=DEADLINE_S[self.engine],
        )

    # -- requests

    async def ask(
        self, tally: Tally, abort: Callable[[], Awaitable[object]] | None = None, *, tokens_max: int | None = None
    ) -> None:
        """One request, to its end, or until `abort` returns or so many tokens have come; judged."""
        number = self.random.randrange(len(self._prompts))
        began = time.monotonic()
        tokens: list[int] = []
        tally.requests += 1
        try:
            whole = await self._read(number, tokens, tally, abort, tokens_max)
        except TandemError as error:
            tally.errors[error.code] += 1
            whole = False
        expected = self.site.expected[number]
        tally.wrong += tuple(tokens) != (expected if whole else expected[: len(tokens)])
        tally.hangs += time.monotonic() - began > DEADLINE_S[self.engine] + SLACK_S

    async def _read(
        self,
        number: int,
        tokens: list[int],
        tally: Tally,
        abort: Callable[[], Awaitable[object]] | None,
        tokens_max: int | None,
    ) -> bool:
        """Whether to its end."""
        stream = self._generate(number)

        async def read() -> bool:
            async for delta in stream:
                tokens.extend(delta.token_ids)
                if tokens_max is not None and len(tokens) >= tokens_max:
                    return False
            tally.retries += (await stream.result()).finished.route.retries
            return True

        reading = asyncio.create_task(read())
        if abort is not None:
            aborting = asyncio.ensure_future(abort())
            await asyncio.wait((reading, aborting), return_when=asyncio.FIRST_COMPLETED)
            aborting.cancel()
        if (abort is None or reading.done()) and await reading:
            return True
        tally.aborted += 1
        stream.close()
        with suppress(Cancelled, asyncio.CancelledError):
            await reading
        return False

    # -- faults

    @contextmanager
    def told(self, name: str, text: str = "") -> Iterator[None]:
        """The workers find this file meanwhile."""
        path = self._folder / name
        writing = path.with_suffix(".writing")
        writing.write_text(text)
        writing.rename(path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def stop_telling(self, *names: str) -> None:
        for name in names:
            (self._folder / name).unlink(missing_ok=True)

    async def held(self, tally: Tally) -> list[Held]:
        """The reads that stand in their middle, once there are some; best one of each reader."""
        give_up = time.monotonic() + DEADLINE_S[self.engine] / 2
        others_until: float | None = None
        while True:
            found = self._held()
            now = time.monotonic()
            if found and others_until is None:
                others_until = now + OTHERS_WITHIN_S
            if len(found) == READERS or (others_until and now > others_until):
                tally.in_mid_read += len(found)
                return found
            assert now < give_up, "no read of KV began"
            await asyncio.sleep(0.005)

    def _held(self) -> list[Held]:
        found = []
        for path in (self._folder / "held").iterdir():
            with suppress(FileNotFoundError):
                told = json.loads(path.read_text())
                found.append(Held(told["owner"], told["reader"], told["transfer"]))
        return found

    async def expired(self, held: Held) -> None:
        """Returns when the lease of a read that stands in its middle has run out."""
        await self._until(
            (self._folder / "expired" / held.transfer.replace("/", ":")).exists, "the lease did not expire"
        )

    async def heard(self, word: str, since: Counter[str]) -> None:
        """Returns when a worker has said so once more."""
        await self._until(lambda: self.said()[word] > since[word], f"nothing was {word}")

    async def _until(self, holds: Callable[[], bool], otherwise: str) -> None:
        give_up = time.monotonic() + DEADLINE_S[self.engine] / 2
        while not holds():
            assert time.monotonic() < give_up, otherwise
            await asyncio.sleep(0.005)

    def pids(self, worker: str) -> list[int]:
        """The worker's process, and its engine's."""
        pid = self.cluster.pid(worker)
        return [pid, *descendants(pid)]

    def kill(self, tally: Tally, worker: str) -> None:
        killed = self.pids(worker)
        for pid in killed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for marker in (self._folder / "held").iterdir():
            if int(marker.name.partition("-")[0]) in killed:
                marker.unlink(missing_ok=True)
        tally.kills += 1
        self.site.kills += 1

    async def all_ready(self) -> None:
        """All workers are there and have met."""
        give_up = time.monotonic() + READY_TIMEOUT_S[self.engine]
        while True:
            with suppress(TandemError):
                workers = (await self.client.status()).workers
                lanes = [lane for worker in workers for lane in worker.lanes]
                if (
                    sum(worker.state == "ready" for worker in workers) == 4
                    and sum(not lane.refusal for lane in lanes) >= 4
                ):
                    return
            assert time.monotonic() < give_up, self.cluster.output
            await asyncio.sleep(0.1)

    # -- what is left

    async def settle(self, tally: Tally) -> None:
        """After a run: counts what is still held, and who died."""
        give_up = time.monotonic() + self._free_within_s + _REPORTS_EVERY_S
        while True:
            left = ["the router does not answer"]
            with suppress(TandemError):
                left = busy(await self.client.status(requests=True))
            if not left or time.monotonic() > give_up:
                break
            await asyncio.sleep(0.02)
        if left:
            print("\n".join(left), flush=True)
            tally.leaked += sum(int(found.group(1)) for line in left if (found := re.search(r": (\d+) ", line))) or 1
            await asyncio.sleep(5.0)  # what one run left is not the next one's
        died = len(re.findall(r"^\S+ +died: ", self.cluster.output, re.MULTILINE))
        unasked = max(0, died - self.site.deaths - self.site.kills)
        tally.deaths += unasked
        self.site.deaths += unasked

    def said(self) -> Counter[str]:
        return Counter(word for path in (self._folder / "log").iterdir() for word in path.read_text().split())


def _prompt(engine: str, tokens: int, number: int) -> list[int]:
    if engine == "vllm":
        from tests.vllm.harness import prompt

        return list(prompt(tokens, start=997 * number))
    rng = random.Random(tokens * 1000 + number)
    return [rng.randrange(16, 4000) for _ in range(tokens)]


# ---------------------------------------------------------------------------------------------------------- the cases


async def lease_expires(faults: Faults, tally: Tally) -> None:
    with faults.told("ttl", str(SHORT_TTL_S)), faults.told("hold"):
        async with asyncio.TaskGroup() as requests:
            for _ in range(REQUESTS):
                requests.create_task(faults.ask(tally))
            held = await faults.held(tally)
            await faults.expired(held[0])
            faults.stop_telling("ttl")
            for _ in range(REQUESTS // 2):  # whose blocks are those that the lease gave back
                requests.create_task(faults.ask(tally))
            await asyncio.sleep(SHORT_TTL_S)
            faults.stop_telling("hold")


async def owner_killed(faults: Faults, tally: Tally) -> None:
    await _killed_in_mid_read(faults, tally, lambda held: held.owner)


async def reader_killed(faults: Faults, tally: Tally) -> None:
    await _killed_in_mid_read(faults, tally, lambda held: held.reader)


async def _killed_in_mid_read(faults: Faults, tally: Tally, whom: Callable[[Held], str]) -> None:
    await faults.all_ready()
    with faults.told("hold"):
        async with asyncio.TaskGroup() as requests:
            for _ in range(REQUESTS):
                requests.create_task(faults.ask(tally))
            held = await faults.held(tally)
            faults.kill(tally, whom(held[0]))
            faults.stop_telling("hold")


async def reader_stopped(faults: Faults, tally: Tally) -> None:
    with faults.told("ttl", str(SHORT_TTL_S)), faults.told("hold"):
        async with asyncio.TaskGroup() as requests:
            for _ in range(REQUESTS):
                requests.create_task(faults.ask(tally))
            held = await faults.held(tally)
            stopped = faults.pids(held[0].reader)
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            faults.stop_telling("hold")
            await faults.expired(held[0])
            faults.stop_telling("ttl")
            for pid in reversed(stopped):
                os.kill(pid, signal.SIGCONT)


async def abort_before_the_read(faults: Faults, tally: Tally) -> None:
    longest_s = {"sim": 0.05, "vllm": 0.3}[faults.engine]

    def after(seconds: float) -> Callable[[], Awaitable[object]]:
        return lambda: asyncio.sleep(seconds)

    async with asyncio.TaskGroup() as requests:
        for _ in range(REQUESTS // 2):
            requests.create_task(faults.ask(tally, after(faults.random.uniform(0, longest_s))))
            requests.create_task(faults.ask(tally, tokens_max=1))


async def abort_during_the_read(faults: Faults, tally: Tally) -> None:
    now = asyncio.Event()
    with faults.told("hold"):
        async with asyncio.TaskGroup() as requests:
            for _ in range(REQUESTS):
                requests.create_task(faults.ask(tally, now.wait))
            await faults.held(tally)
            now.set()
            await asyncio.sleep(0.02)
            faults.stop_telling("hold")


async def abort_after_the_read(faults: Faults, tally: Tally) -> None:
    async with asyncio.TaskGroup() as requests:
        for _ in range(REQUESTS):
            requests.create_task(faults.ask(tally, tokens_max=faults.random.randrange(2, ANSWER_TOKENS)))


async def peer_restarted(faults: Faults, tally: Tally) -> None:
    await faults.all_ready()
    faults.kill(tally, faults.random.choice(["prefill-0", "prefill-1"]))
    async with asyncio.TaskGroup() as requests:
        for _ in range(REQUESTS):
            requests.create_task(faults.ask(tally))
    await faults.all_ready()
    async with asyncio.TaskGroup() as requests:
        for _ in range(REQUESTS):
            requests.create_task(faults.ask(tally))


async def messages_scrambled(faults: Faults, tally: Tally) -> None:
    with faults.told("scramble"):
        for _ in range(2):
            async with asyncio.TaskGroup() as requests:
                for _ in range(REQUESTS):
                    requests.create_task(faults.ask(tally))


async def handles_forged(faults: Faults, tally: Tally) -> None:
    with faults.told("handles"):
        async with asyncio.TaskGroup() as requests:
            for _ in range(REQUESTS):
                requests.create_task(faults.ask(tally))


async def handles_swapped(faults: Faults, tally: Tally) -> None:
    said = faults.said()
    with faults.told("swap"):
        async with asyncio.TaskGroup() as requests:
            for _ in range(REQUESTS):
                requests.create_task(faults.ask(tally))
            await faults.heard("swapped", said)
            await asyncio.sleep(OTHERS_WITHIN_S)
            faults.stop_telling("swap")


Case = Callable[[Faults, Tally], Awaitable[None]]

CASES: Mapping[str, Case] = {
    "lease expires in mid-read": lease_expires,
    "owner killed in mid-read": owner_killed,
    "reader killed in mid-read": reader_killed,
    "reader stopped past the lease": reader_stopped,
    "abort before the read": abort_before_the_read,
    "abort during the read": abort_during_the_read,
    "abort after the read": abort_after_the_read,
    "peer restarted on its port": peer_restarted,
    "releases doubled, late, early": messages_scrambled,
    "handles tampered, replayed, another's": handles_forged,
    "handles of other requests": handles_swapped,
}
#: Those that kill workers; it takes some ten seconds to replace a real engine.
KILLING = frozenset({"owner killed in mid-read", "reader killed in mid-read", "peer restarted on its port"})

#: What workers say of these cases, when it was done to them. The others wait in their middle for what they do.
DONE = {
    "peer restarted on its port": {"same-port"},
    "releases doubled, late, early": {"scrambled", "overtaken"},
    "handles tampered, replayed, another's": {"tampered-REFUSED", "stranger-REFUSED"},
    "handles of other requests": {"swapped"},
}


async def run_case(faults: Faults, name: str, runs: int) -> Tally:
    tally = Tally()
    began = time.monotonic()
    said = faults.said()
    for _ in range(runs):
        await CASES[name](faults, tally)
        await faults.settle(tally)
        tally.runs += 1
    if name in KILLING:
        await faults.all_ready()
    tally.said = faults.said() - said
    undone = DONE.get(name, set()) - tally.said.keys()
    assert not undone, f"not done to the workers: {undone}, {tally}"
    assert tally.aborted or not name.startswith("abort"), f"no request was given up: {tally}"
    tally.seconds = time.monotonic() - began
    return tally


async def run_aborts(faults: Faults, aborts: int, at_once: int = 16) -> Tally:
    """So many requests, each given up at a moment of its own anywhere between its start and its end."""
    tally = Tally(runs=1)
    began = time.monotonic()
    whole_s = 1.0

    async def client() -> None:
        nonlocal whole_s
        while tally.aborted < aborts:
            seconds = faults.random.uniform(0, whole_s)

            asked = time.monotonic()
            await faults.ask(tally, lambda seconds=seconds: asyncio.sleep(seconds))  # type: ignore[misc]
            took_s = time.monotonic() - asked
            if took_s < seconds:  # it ended by itself
                whole_s += (took_s - whole_s) / 8
            else:
                whole_s *= 1.01

    async with asyncio.TaskGroup() as clients:
        for _ in range(at_once):
            clients.create_task(client())
    await faults.settle(tally)
    tally.seconds = time.monotonic() - began
    return tally


@contextmanager
def faulty_cluster(folder: Path, engine: str) -> Iterator[Site]:
    """Two workers of each role, ready. At the end everything is stopped."""
    inside = folder / "faults"
    inside.mkdir()
    settings = [part for key in (*SETTINGS, *ENGINE_SETTINGS[engine]) for part in ("--set", key)]
    changed = {
        "FAULTS_FOLDER": str(inside),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(SITE), str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        with cluster(folder, engine, "--prefill", "2", "--decode", "2", *settings) as running:
            running.wait_ready()
            yield Site(running, inside)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@asynccontextmanager
async def faults_at(site: Site, seed: int = 1, *, free_within_s: float = FREE_WITHIN_S) -> AsyncIterator[Faults]:
    """Ready to be asked, with the answers known."""
    async with AsyncClient(site.cluster.address, retries=0) as client:
        faults = Faults(site, client, seed, free_within_s)
        await faults.all_ready()
        await faults.learn()
        yield faults
