"""Steps of vLLM's EngineCore, and who has a say between them.

Whoever wants something of the core puts a command in; between two steps the loop obeys all that have come, in their
order. It computes while there is something to compute and sleeps while there is not, also while finished prompts are
pinned for their readers: `wake` says that a lease has ended. vLLM's own loop would step a thousand times a second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

#: Between two looks at requests that wait for memory which nobody has given back yet.
_STARVED_S = 0.002

Command = Callable[[], None]


class StepLoop:
    """`run` belongs to one thread, the others to any."""

    def __init__(self) -> None:
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._stopping = False

    def do(self, command: Command) -> None:
        self._commands.put(command)

    def wake(self) -> None:
        self._commands.put(_nothing)

    def stop(self) -> None:
        """Ends `run`, behind the commands that are there already."""
        self._commands.put(self._stop)

    def _stop(self) -> None:
        self._stopping = True

    def run(self, core: Any, stepped: Callable[[list[Any]], None]) -> None:
        """Until stopped. `stepped` is given each step's outputs, if any. Raises what a step raised."""
        while True:
            self._obey(0.0 if _has_work(core) else None)
            if self._stopping:
                return
            if not core.scheduler.has_requests():
                continue
            outputs, executed = core.step_fn()
            core.post_step(executed)
            stepped([output for of_client in (outputs or {}).values() for output in of_client.outputs])
            if not executed and core.scheduler.has_unfinished_requests():
                self._obey(_STARVED_S)

    def _obey(self, wait_s: float | None) -> None:
        """All commands that have come; waits for the first one, for ever if `wait_s` is None."""
        with contextlib.suppress(Empty):
            command = self._commands.get_nowait() if wait_s == 0.0 else self._commands.get(timeout=wait_s)
            while True:
                command()
                command = self._commands.get_nowait()


def _has_work(core: Any) -> bool:
    """Whether a step would do something even if nothing happens before it. vLLM's own `has_requests` is true for
    finished requests whose blocks are pinned, too."""
    scheduler = core.scheduler
    return bool(scheduler.has_unfinished_requests() or scheduler.finished_req_ids or core.batch_queue)


def _nothing() -> None:
    pass
