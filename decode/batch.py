"""Step outputs on their way to one router. While nobody takes them, a leg's outputs are joined into one, so that what
waits is bounded by the legs open, and a slow reader gets fewer, larger messages rather than a longer queue."""

from __future__ import annotations

from engine.base import StepOutput


class StepBatch:
    def __init__(self, entries_max: int = 16 * 1024) -> None:
        #: Tokens and log probabilities in one `take`, so that no message grows without bound.
        self._entries_max = entries_max
        #: By leg, in the order in which they began to wait.
        self._waiting: dict[str, list[StepOutput]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, leg_id: str) -> bool:
        """Whether an output of its waits."""
        return leg_id in self._waiting

    def add(self, leg_id: str, output: StepOutput) -> None:
        self._waiting.setdefault(leg_id, []).append(output)

    def take(self) -> list[tuple[str, StepOutput]]:
        """At most one output for each leg, at least one leg unless none waits."""
        taken: list[tuple[str, StepOutput]] = []
        entries = 0
        while self._waiting and entries < self._entries_max:
            leg_id = next(iter(self._waiting))
            output = joined(self._waiting.pop(leg_id))
            entries += size(output)
            taken.append((leg_id, output))
        return taken


def joined(outputs: list[StepOutput]) -> StepOutput:
    if len(outputs) == 1:
        return outputs[0]
    return StepOutput(
        leg_id=outputs[0].leg_id,
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        finish_reason=outputs[-1].finish_reason,
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        cached_tokens=max(output.cached_tokens for output in outputs),
    )


def size(output: StepOutput) -> int:
    return len(output.token_ids) + sum(1 + len(entry.top) for entry in output.logprobs)
