"""Random histories: workers come, fail and go, clients cancel, messages are late. Every request ends, every stream is
part of the undisturbed answer, and nothing is left at any worker.

One set of actions, driven twice: by Hypothesis, which shrinks what it finds, and by seeds, which run deeper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from router.core import events as ev
from router.core.lifecycle import State as Life
from router.core.request import Sampling
from router.core.stats import Stats
from router.core.worker import Role
from tests.router.core.world import Client, FakeWorker, World

SAMPLINGS = (
    Sampling(max_tokens=8, temperature=0.0),
    Sampling(max_tokens=1, temperature=0.0),
    Sampling(max_tokens=3, temperature=1.0),
    Sampling(max_tokens=12, min_tokens=5, temperature=0.0),
    Sampling(max_tokens=6, temperature=1.0, seed=3),
    Sampling(max_tokens=1, temperature=1.0, seed=4),
    Sampling(max_tokens=9, temperature=0.0, presence_penalty=0.5, ignore_eos=True),
    Sampling(max_tokens=7, temperature=0.8, frequency_penalty=1.0),
)
NAMES = ("a", "b", "c", "d", "e")
P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH
SHAPES = ((P, D), (P, P, D, D), (P, D, D), (P, P, D), (P, P, D, D), (D, D), (B, B), (P, D, B), ())
#: Which role somebody takes.
ROLES = (P, P, P, D, D, D, B)

T = TypeVar("T")
Pick = Callable[[Sequence[T]], T]


class Actions:
    """What can happen to a cluster. `pick` chooses among alternatives."""

    def __init__(self, pick: Pick) -> None:  # type: ignore[type-arg]
        self.pick = pick
        self.submitted = 0
        self.joined = 0
        self.world = World(
            queue_requests_max=8,
            queue_tokens_max=100,
            local_prefill_tokens_max=20,
            overflow_tokens_max=20,
            path_wait_s=5.0,
            history_max=5,
            reserve_tokens_max=4,
            silence_s_max=2.0,
        )

    def start(self) -> None:
        for name, role in zip(NAMES, self.pick(SHAPES), strict=False):
            self.world.join(name, role)

    def submit(self) -> None:
        self.submitted += 1
        length, first = self.pick((1, 3, 4, 9, 30)), self.pick(range(1, 41))
        self.world.submit(
            f"r{self.submitted}",
            tuple(1 + (first + i) % 40 for i in range(length)),
            sampling=self.pick(SAMPLINGS),
            timeout_s=self.pick((60.0, 60.0, 60.0, 4.0, 0.2, 0.0)),
        )

    def run(self) -> None:
        """All workers get on. One that drained leaves, and somebody takes its place."""
        for worker in tuple(self.world.workers.values()):
            self.world.step(worker)
            if worker.draining and not worker.legs and not worker.leases and self.world.is_linked(worker):
                self.world.lose(worker.facts.worker_id)
        free = [name for name in NAMES if name not in self.world.workers]
        if free and self.pick((True, False)):
            self._join(self.pick(free), self.pick(ROLES))

    def run_one(self) -> None:
        """One worker does one thing."""
        if (worker := self._a_worker()) is None:
            return
        kind = self.pick(("deliver", "compute", "report"))
        if kind == "deliver" and worker.inbox:
            self.world.deliver(worker)
        elif kind == "compute" and worker.legs:
            self.world.compute(worker, self.pick(sorted(worker.legs)))
        elif kind == "report" and worker.outbox:
            self.world.report(worker)

    def time_passes(self) -> None:
        seconds = self.pick((0.01, 0.01, 0.1, 0.1, 0.5, 5.0))
        if self.pick((True,) * 9 + (False,)):
            self._all_say_load()
        self.world.advance(seconds)

    def trouble(self) -> None:
        kind = self.pick(
            ("join", "rejoin", "fail", "fail", "fail", "lose", "lease", "lease", "drain", "role", "meet", "repeat")
        )
        workers = [worker for _, worker in sorted(self.world.workers.items())]
        if kind == "join" or not workers:
            self._join(self.pick(NAMES), self.pick(ROLES))
        elif kind == "fail":
            legs = [(worker, leg_id) for worker in workers for leg_id in sorted(worker.legs)]
            self._fail([leg for leg in legs if leg[1].endswith("/p")] or legs)
        elif kind == "lease":
            for worker in workers:
                worker.leases.clear()
        elif kind == "repeat":
            self._repeat([worker for worker in workers if worker.outbox])
        else:
            self._trouble_at(self.pick(workers), kind)

    def _fail(self, legs: list[tuple[FakeWorker, str]]) -> None:
        if legs:
            worker, leg_id = self.pick(legs)
            self.world.fail(worker, leg_id, self.pick((ev.Failure.ENGINE, ev.Failure.REJECTED, *ev.Failure)))

    def _repeat(self, talking: list[FakeWorker]) -> None:
        if talking:
            worker = self.pick(talking)
            last = worker.outbox[-1]
            if isinstance(last, ev.PrefillDone | ev.Fetched | ev.LegFailed):
                worker.outbox.append(last)

    def _trouble_at(self, worker: FakeWorker, kind: str) -> None:
        worker_id = worker.facts.worker_id
        if kind == "rejoin":
            self._join(worker_id, worker.role)
        elif kind == "lose":
            self.world.lose(worker_id)
        elif kind == "drain":
            self.world.post(ev.DrainRequested(worker_id))
        elif kind == "role":
            self.world.post(ev.SetRoleRequested(worker_id, self.pick(ROLES)))
        elif kind == "meet":
            self.world.say_lane(worker, self.pick(NAMES), self.pick(("", "", "", "dtype: f32 here, bf16 there")))

    def client_leaves(self) -> None:
        if (client := self._an_open_client()) is not None:
            self.world.post(ev.Cancel(client.request.key))

    def stop_string_found(self) -> None:
        client = self._an_open_client()
        if client is not None and client.tokens:
            client.stopped_after = self.pick(range(1, len(client.tokens) + 1))
            self.world.post(ev.StopMatched(client.request.key, client.stopped_after))

    def end(self) -> None:
        """Faults stop: everything ends by its deadline, and nothing is left."""
        self.world.check_agreement()
        self.world.settle()
        for _ in range(61):
            self._all_say_load()
            self.world.advance(1.0)
            self.world.settle()
        assert not self.open_clients()
        self.world.check_nothing_left()

    def open_clients(self) -> list[Client]:
        return [client for client in self.world.clients.values() if client.end is None]

    def check(self) -> None:
        assert {client.request.key for client in self.open_clients()} == set(self.world.core.state.requests)

    def _all_say_load(self) -> None:
        for worker in tuple(self.world.workers.values()):
            self.world.say_load(worker)
            while worker.outbox:
                self.world.report(worker)

    def _join(self, name: str, role: Role) -> None:
        self.joined += 1
        legs = self.pick((1, 2, 4))
        self.world.join(name, role, incarnation=f"i{self.joined}", prefill_legs=legs, decode_legs=legs)

    def _a_worker(self) -> FakeWorker | None:
        workers = sorted(self.world.workers)
        return self.world.workers[self.pick(workers)] if workers else None

    def _an_open_client(self) -> Client | None:
        clients = self.open_clients()
        return self.pick(clients) if clients else None


class Cluster(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.actions = Actions(lambda alternatives: self.data.draw(st.sampled_from(alternatives)))

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        self.data = data
        self.actions.start()

    @rule(data=st.data())
    def submit(self, data: st.DataObject) -> None:
        self.data = data
        self.actions.submit()

    @rule()
    def run(self) -> None:
        self.actions.run()

    @rule(data=st.data())
    def run_one(self, data: st.DataObject) -> None:
        self.data = data
        self.actions.run_one()

    @rule(data=st.data())
    def time_passes(self, data: st.DataObject) -> None:
        self.data = data
        self.actions.time_passes()

    @rule(data=st.data())
    def trouble(self, data: st.DataObject) -> None:
        self.data = data
        self.actions.trouble()

    @rule(data=st.data(), leaves=st.booleans())
    def end_one(self, data: st.DataObject, leaves: bool) -> None:
        self.data = data
        self.actions.client_leaves() if leaves else self.actions.stop_string_found()

    @invariant()
    def open_means_open_at_both_ends(self) -> None:
        self.actions.check()

    def teardown(self) -> None:
        self.actions.end()


TestCluster = Cluster.TestCase
TestCluster.settings = settings(
    max_examples=80, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)

#: How often each action is taken in a seeded history, per hundred.
ACTIONS = ("submit", "run", "run_one", "time_passes", "trouble", "client_leaves", "stop_string_found")
CALM = (20, 30, 35, 10, 3, 1, 1)
ROUGH = (20, 15, 40, 8, 12, 3, 2)


def live_through(seed: int, weights: Sequence[int], steps: int) -> Stats:
    random = Random(seed)
    actions = Actions(random.choice)
    actions.start()
    for name in random.choices(ACTIONS, weights, k=steps):
        getattr(actions, name)()
        actions.check()
    actions.end()
    return actions.world.core.stats


def test_in_random_histories_every_request_ends_and_nothing_is_left() -> None:
    seen = Stats()
    often = ("transfers", "prefill_retries", "decode_retries", "local_prefills", "local_overflow", "workers_lost")
    for seed in range(150):
        try:
            stats = live_through(seed, CALM if seed % 2 else ROUGH, steps=200)
        except BaseException as fault:
            fault.add_note(f"seed {seed}")
            raise
        for name in often:
            setattr(seen, name, getattr(seen, name) + getattr(stats, name))
        for outcome, count in stats.outcomes.items():
            seen.outcomes[outcome] += count
    # The histories are worth living through only if everything happens in them.
    assert seen.outcomes[Life.FINISHED] > 500
    assert min(seen.outcomes.values()) > 20
    assert min(getattr(seen, name) for name in often) > 100
