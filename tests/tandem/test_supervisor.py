import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.supervisor import (
    EXITS_TOLD_WRONG,
    ChildSpec,
    Died,
    Event,
    GaveUp,
    Left,
    Outcome,
    RestartPolicy,
    Restarts,
    Started,
    Stopped,
    Supervisor,
)

QUICK = RestartPolicy(
    backoff_first_s=0.02, backoff_max_s=0.1, restarts_max=4, first_restarts_max=2, settled_s=0.0, stop_grace_s=10.0
)

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", "-c", textwrap.dedent(code))


class Cluster:
    """A supervisor in the running loop, and what it said."""

    def __init__(self, folder: Path, policy: RestartPolicy = QUICK, **codes: str) -> None:
        self.events: list[Event] = []
        specs = [
            ChildSpec(
                name=name,
                argv=python(code),
                log=folder / f"{name}.log",
                group=name.split("_")[0],
                stop_stage=0 if name == "router" else 1,
            )
            for name, code in codes.items()
        ]
        self.supervisor = Supervisor(specs, policy, self.events.append)
        self.run = asyncio.create_task(self.supervisor.run())

    async def until(self, enough: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not enough():  # noqa: ASYNC110  (what is waited for happens in other processes)
                await asyncio.sleep(0.01)

    async def up(self, name: str, attempt: int = 1) -> int:
        """The pid, once that attempt runs far enough to have printed."""
        await self.until(lambda: len(self.pids(name)) >= attempt and self.supervisor.last_line(name) == "up")
        return self.pids(name)[attempt - 1]

    def pids(self, name: str) -> list[int]:
        return [event.pid for event in self.events if isinstance(event, Started) and event.name == name]

    def deaths(self, name: str) -> list[Died]:
        return [event for event in self.events if isinstance(event, Died) and event.name == name]

    async def outcome(self) -> Outcome:
        async with asyncio.timeout(60):
            return await self.run


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(enough: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not enough():
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def test_stopping_ends_all_children_in_order_of_their_stages(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, worker_1=SLEEP, router=SLEEP, worker_2=SLEEP)
    pids = [await cluster.up(name) for name in ("router", "worker_1", "worker_2")]

    cluster.supervisor.stop()
    assert await cluster.outcome() is Outcome.STOPPED

    stops = [event.name for event in cluster.events if isinstance(event, Stopped)]
    assert stops[0] == "router"
    assert sorted(stops[1:]) == ["worker_1", "worker_2"]
    assert not any(is_running(pid) for pid in pids)


async def test_a_child_that_dies_is_reported_with_its_last_words_and_started_again(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, worker=SLEEP)
    pid = await cluster.up("worker")
    cluster.supervisor.mark_ready("worker")

    os.kill(pid, signal.SIGKILL)
    second = await cluster.up("worker", attempt=2)

    (death,) = cluster.deaths("worker")
    assert death.pid == pid != second
    assert "SIGKILL" in death.reason
    assert death.last_lines == ("up",)
    assert death.restart_in_s == QUICK.backoff_first_s
    cluster.supervisor.stop()
    await cluster.outcome()


async def test_last_words_are_those_of_the_present_attempt(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, worker="import os; print('I was', os.getpid(), flush=True); raise SystemExit(3)")
    await cluster.outcome()

    assert len(cluster.deaths("worker")) == 3
    for death in cluster.deaths("worker"):
        assert death.reason == "exited with code 3"
        assert death.last_lines == (f"I was {death.pid}",)


async def test_a_crash_loop_is_given_up_and_ends_the_run_when_nobody_else_can_serve(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, router=SLEEP, worker="raise SystemExit(1)")
    assert await cluster.outcome() is Outcome.FAILED

    assert [death.restart_in_s for death in cluster.deaths("worker")] == [0.02, 0.04, None]
    assert cluster.events[-2] == GaveUp(name="worker", deaths=3, final=True)
    assert cluster.events[-1] == Stopped(name="router", killed=False)


async def test_a_crash_loop_leaves_the_others_of_its_group_serving(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, worker_1=SLEEP, worker_2="raise SystemExit(1)")
    await cluster.until(lambda: any(isinstance(event, GaveUp) for event in cluster.events))
    pid = await cluster.up("worker_1")

    assert GaveUp(name="worker_2", deaths=3, final=False) in cluster.events
    assert not cluster.run.done()
    assert is_running(pid)
    cluster.supervisor.stop()
    assert await cluster.outcome() is Outcome.STOPPED


@pytest.mark.parametrize("code", EXITS_TOLD_WRONG)
async def test_a_child_that_says_its_configuration_is_wrong_is_not_started_again(tmp_path: Path, code: int) -> None:
    cluster = Cluster(tmp_path, worker=f"raise SystemExit({code})")
    assert await cluster.outcome() is Outcome.FAILED
    assert len(cluster.pids("worker")) == 1


async def test_a_child_that_leaves_without_an_error_is_not_started_again(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, router=SLEEP, worker="pass")
    await cluster.until(lambda: Left(name="worker") in cluster.events)
    await cluster.up("router")
    assert len(cluster.pids("worker")) == 1
    assert not cluster.run.done()
    cluster.supervisor.stop()
    assert await cluster.outcome() is Outcome.STOPPED


async def test_the_run_ends_when_all_have_left(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, router="pass", worker="pass")
    assert await cluster.outcome() is Outcome.STOPPED


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, RestartPolicy(stop_grace_s=0.1), worker=STUBBORN)
    await cluster.up("worker")
    cluster.supervisor.stop()
    await cluster.outcome()
    assert cluster.events[-1] == Stopped(name="worker", killed=True)


async def test_killing_does_not_wait_for_an_orderly_stop(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, RestartPolicy(stop_grace_s=600.0), router=STUBBORN, worker=STUBBORN)
    pids = [await cluster.up(name) for name in ("router", "worker")]

    cluster.supervisor.stop()
    await asyncio.sleep(0)
    cluster.supervisor.kill()
    await cluster.outcome()
    assert not any(is_running(pid) for pid in pids)


async def test_what_a_dead_child_leaves_behind_is_ended_with_it(tmp_path: Path) -> None:
    parent = """
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        time.sleep(600)
    """
    cluster = Cluster(tmp_path, worker=parent)
    await cluster.until(lambda: cluster.supervisor.last_line("worker") != "")
    grandchild = int(cluster.supervisor.last_line("worker"))

    os.kill(cluster.pids("worker")[0], signal.SIGKILL)
    await cluster.until(lambda: not is_running(grandchild))
    cluster.supervisor.stop()
    await cluster.outcome()


async def test_a_child_ends_its_own_children_in_its_own_order(tmp_path: Path) -> None:
    """Only the child is asked to stop: a grandchild that got the signal as well would be seen to die."""
    parent = """
        import signal, subprocess, sys, threading
        asked = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: asked.set())
        child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
        print("up", flush=True)
        asked.wait()
        try:
            child.wait(0.3)
            print("it was ended by somebody else", flush=True)
        except subprocess.TimeoutExpired:
            print("ended in order", flush=True)
    """
    cluster = Cluster(tmp_path, worker=parent)
    await cluster.up("worker")
    cluster.supervisor.stop()
    await cluster.outcome()
    assert cluster.supervisor.last_line("worker") == "ended in order"


async def test_a_program_that_does_not_exist_fails_the_run(tmp_path: Path) -> None:
    spec = ChildSpec(name="worker", argv=(str(tmp_path / "none"),), log=tmp_path / "log", group="worker")
    with pytest.raises(ExceptionGroup):
        await Supervisor([spec], QUICK).run()


SUPERVISES_ONE = """
import asyncio, sys
from pathlib import Path
from tandem.supervisor import ChildSpec, RestartPolicy, Supervisor

log, *argv = sys.argv[1:]
spec = ChildSpec(name="child", argv=tuple(argv), log=Path(log), group="child")
asyncio.run(Supervisor([spec], RestartPolicy(), lambda event: print(event.pid, flush=True)).run())
"""


def test_children_and_grandchildren_do_not_outlive_a_killed_supervisor(tmp_path: Path) -> None:
    child_code = f"""
        import subprocess, sys, time
        print(subprocess.Popen([sys.executable, "-I", "-S", "-c", {STUBBORN!r}]).pid, flush=True)
        time.sleep(600)
    """
    log = tmp_path / "child.log"
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISES_ONE, str(log), *python(child_code)], stdout=subprocess.PIPE, text=True
    )
    assert supervisor.stdout is not None
    with supervisor:
        child = int(supervisor.stdout.readline())
        wait_until(lambda: log.read_text().endswith("up\n"))
        grandchild = int(log.read_text().split()[0])

        supervisor.kill()
        supervisor.wait()
        wait_until(lambda: not is_running(child))
        wait_until(lambda: not is_running(grandchild))


def test_backoff_doubles_up_to_its_cap_and_the_budget_ends() -> None:
    restarts = Restarts(RestartPolicy(backoff_first_s=1.0, backoff_max_s=5.0, restarts_max=5))
    restarts.ready(0.0)
    assert [restarts.died(float(now)) for now in range(6)] == [1.0, 2.0, 4.0, 5.0, 5.0, None]


def test_a_child_that_was_never_ready_has_fewer_restarts() -> None:
    restarts = Restarts(RestartPolicy(backoff_first_s=1.0, restarts_max=5, first_restarts_max=1))
    assert [restarts.died(float(now)) for now in range(2)] == [1.0, None]


def test_only_a_child_that_was_ready_long_enough_earns_its_budget_back() -> None:
    restarts = Restarts(RestartPolicy(backoff_first_s=1.0, backoff_max_s=8.0, restarts_max=5, settled_s=10.0))
    assert restarts.died(100.0) == 1.0  # 100 seconds of loading are no service
    restarts.ready(200.0)
    assert restarts.died(205.0) == 2.0
    restarts.ready(300.0)
    restarts.ready(309.0)  # said again: still the same service
    assert restarts.died(310.0) == 1.0
