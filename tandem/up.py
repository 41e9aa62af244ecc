"""`tandem up`: the terminal's side of a local cluster. Shows it load, asks it one prompt, then says what happens to it.

On a terminal the loading processes are a live table; elsewhere, and once all are ready, everything is plain lines.
"""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tandem import show
from tandem.client import AsyncClient
from tandem.errors import TandemError
from tandem.local import LocalCluster, Member, Ready, State
from tandem.supervisor import ChildSpec, Died, Event, GaveUp, Left, Outcome, RestartPolicy, Started, Stopped
from trust.tls import PLAINTEXT, TlsFiles

_DEMO_TOKENS = 64
_DEMO_TIMEOUT_S = 60.0
#: Log lines shown of a process that died.
_LINES_SHOWN = 8
_REFRESH_PER_S = 8
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"

_STYLES = {State.READY: "green", State.DEAD: "red", State.GIVEN_UP: "bold red"}
#: Time, level and names in front of a log line: the table has no room for them.
_LOG_PREFIX = re.compile(r"^.{0,64}?\b(?:DEBUG|INFO|WARNING|ERROR)\b[\s:]*(?:(?:[\w-]+ )?[\w.]+: |[\d: -]*\[\S+\]:? )?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything decided before the first process starts."""

    specs: Sequence[ChildSpec]
    policy: RestartPolicy
    #: host:port for clients on this machine.
    address: str
    #: The same over HTTP, if that is served.
    http_address: str | None = None
    #: What clients on this machine speak.
    tls: TlsFiles = PLAINTEXT
    #: Callers are not asked who they are.
    is_open: bool = False
    #: For operators' calls to this cluster.
    operator_key: str
    run_dir: Path
    #: What to ask when ready.
    prompts: Sequence[str]
    #: "vllm" or "sim".
    engine: str
    title: str
    #: What the suggested commands need to find this cluster; empty where they find it by themselves.
    state_flag: str


async def up(plan: Plan, console: Console) -> int:
    """Runs the cluster until it is stopped or cannot go on; the exit code."""
    screen = _Screen(console)
    cluster = LocalCluster(plan.specs, plan.policy, plan.address, screen.on_event, plan.operator_key, plan.tls)
    screen.members = cluster.members
    screen.last_line = cluster.last_line
    screen.logs = {spec.name: spec.log for spec in plan.specs}
    console.print(f"[bold]tandem up[/]  {escape(plan.title)}", soft_wrap=True)
    console.print(f"logs in {escape(str(plan.run_dir))}", style="dim", soft_wrap=True)
    started = time.monotonic()
    running = asyncio.create_task(cluster.run())
    with _signals(cluster, screen):
        with screen.loading():
            await _first(running, cluster.wait_ready())
        if not running.done() and not cluster.is_stopping():
            console.print(f"ready after {show.duration(time.monotonic() - started)}\n", style="bold green")
            await _first(running, _serve(plan, console))
        outcome = await running
    return _farewell(plan, console, outcome, screen)


async def _first(running: asyncio.Task[Outcome], other: Coroutine[None, None, None]) -> None:
    """Waits for `other`, but no longer than the cluster runs."""
    task = asyncio.create_task(other)
    await asyncio.wait([running, task], return_when=asyncio.FIRST_COMPLETED)
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


async def _serve(plan: Plan, console: Console) -> None:
    async with AsyncClient(plan.address, tls=plan.tls) as client:
        for prompt in plan.prompts:
            await _ask(client, prompt, console)
    if plan.engine == "sim" and plan.prompts:
        console.print("The simulated engine makes tokens up; --engine vllm computes them.\n", style="dim")
    flag = f" {plan.state_flag}" if plan.state_flag else ""
    console.print(f"[bold]serving on {escape(plan.address)}[/]  ·  Ctrl-C stops everything")
    if plan.http_address is not None:
        scheme = "https" if plan.tls.dials else "http"
        console.print(f"OpenAI's API on {scheme}://{escape(plan.http_address)}/v1")
    if plan.is_open:
        console.print("UNAUTHENTICATED: whoever reaches it may use and steer this cluster", style="yellow")
    console.print("From another terminal:", style="dim")
    for command in (f'tandem generate{flag} "import os"', f"tandem status{flag}", f"tandem status{flag} --watch"):
        console.print(f"  {command}", style="cyan", markup=False, highlight=False, soft_wrap=True)


async def _ask(client: AsyncClient, prompt: str, console: Console) -> None:
    """One prompt through both pools, streamed."""
    console.print(Text(prompt, style="bold"), end="", soft_wrap=True)
    generation = client.generate(prompt, max_tokens=_DEMO_TOKENS, temperature=0.0, timeout_s=_DEMO_TIMEOUT_S)
    try:
        async for delta in generation:
            console.print(Text(delta.text, style="cyan"), end="", soft_wrap=True)
    except TandemError as error:
        console.print(f"\nthe prompt failed: {error.code}: {error.message}\n", style="red", markup=False)
        return
    console.print("\n")
    if generation.finished is not None:
        told = show.story(generation.request_id, generation.finished)
        console.print(told + "\n", style="dim", markup=False, soft_wrap=True)


def _farewell(plan: Plan, console: Console, outcome: Outcome, screen: _Screen) -> int:
    if outcome is Outcome.FAILED:
        console.print(f"[bold red]the cluster cannot serve[/]; logs in {escape(str(plan.run_dir))}", soft_wrap=True)
        return 1
    if screen.forced:
        console.print("killed", style="bold")
        return 130
    console.print("stopped", style="bold")
    return 0


class _Screen:
    """Turns events into lines, and members into a table while they load."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.members: dict[str, Member] = {}
        self.logs: dict[str, Path] = {}
        self.last_line: Callable[[str], str] = lambda name: ""
        #: A second Ctrl-C came.
        self.forced = False
        self._live: Live | None = None
        #: The last line of each process that died.
        self._last_words: dict[str, str] = {}

    @contextmanager
    def loading(self) -> Iterator[None]:
        if not self.console.is_terminal:
            yield
            return
        with Live(
            get_renderable=self._table, console=self.console, refresh_per_second=_REFRESH_PER_S, transient=True
        ) as self._live:
            yield
        self._live = None
        if any(member.state is State.READY for member in self.members.values()):  # else they were stopped
            self.console.print(self._table())

    def on_event(self, event: Event | Ready) -> None:
        live = self._live is not None
        match event:
            case Started(name=name, pid=pid, attempt=attempt):
                if not live:
                    self._say(name, f"started, process {pid}" if attempt == 1 else f"started again, process {pid}")
            case Ready(name=name, took_s=took_s, attempt=attempt):
                if not live or attempt > 1:
                    self._say(name, f"ready after {show.duration(took_s)}", "green")
            case Died():
                self._died(event)
            case Left(name=name):
                self._say(name, "has left; it will not be started again", "yellow")
            case GaveUp(name=name, deaths=deaths, final=final):
                what = f"died {deaths} times in a row" if deaths > 1 else "died"
                rest = "nobody is left in its place" if final else "the others go on"
                self._say(name, f"{what}; given up, {rest}. Its log: {self.logs[name]}", "bold red")
            case Stopped(name=name, killed=killed):
                if not live:
                    self._say(name, "killed" if killed else "stopped")

    def stopping(self) -> None:
        self.console.print("\nstopping; Ctrl-C again kills", style="bold")

    def _died(self, event: Died) -> None:
        then = f"; starting it again in {show.duration(event.restart_in_s)}" if event.restart_in_s is not None else ""
        self._say(event.name, f"died: {event.reason}{then}", "red")
        lines = event.last_lines[-_LINES_SHOWN:]
        if lines and lines[-1] == self._last_words.get(event.name):
            lines = lines[-1:]  # the same again: its story was told
        self._last_words[event.name] = lines[-1] if lines else ""
        for line in lines:
            self.console.print(f"    | {line}", style="dim", markup=False, highlight=False, soft_wrap=True)

    def _say(self, name: str, text: str, style: str = "") -> None:
        width = max(map(len, self.members), default=0)
        self.console.print(Text.assemble((f"{name:<{width}}  ", "bold"), (text, style)), soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
        table.add_column(width=max(map(len, self.members)))
        table.add_column(width=max(len(state.value) for state in State) + 2)
        table.add_column(width=len("59 min 59 s"), justify="right")
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for member in self.members.values():
            loading, ready = member.state is State.LOADING, member.state is State.READY
            spin = _SPINNER[int(time.monotonic() * _REFRESH_PER_S) % len(_SPINNER)]
            doing = _LOG_PREFIX.sub("", self.last_line(member.name)) if loading else ""
            table.add_row(
                Text(member.name, style="bold"),
                Text(
                    f"{spin if loading else '✓' if ready else ' '} {member.state.value}",
                    style=_STYLES.get(member.state, ""),
                ),
                show.duration(member.took_s if ready else time.monotonic() - member.since),
                Text(doing, style="dim"),
            )
        return table


@contextmanager
def _signals(cluster: LocalCluster, screen: _Screen) -> Iterator[None]:
    """The first signal stops in order, the second kills."""

    def on_signal(number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            screen.console.quiet = True  # the terminal is gone, and writing to it an error
        if cluster.is_stopping():
            screen.forced = True
            cluster.kill()
        else:
            cluster.stop()
            screen.stopping()

    loop = asyncio.get_running_loop()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else nohup was asked for
        numbers.append(signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
