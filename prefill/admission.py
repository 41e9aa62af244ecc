"""How many prefill legs a worker takes. The router decides order and fairness; a worker only keeps a short queue, so
that its engine never waits for the next order, and says no at once to what would wait behind it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLimits:
    #: Legs given to the engine at once.
    running: int = 8
    #: Legs that wait for one of those; one more is refused.
    queued: int = 8
    #: How long a finished prompt's blocks stay pinned for their reader.
    lease_ttl_s: float = 30.0

    @property
    def legs(self) -> int:
        return self.running + self.queued

    def problems(self) -> list[str]:
        found = []
        if self.running < 1:
            found.append(f"prefill.running: must be at least 1, is {self.running}")
        if self.queued < 0:
            found.append(f"prefill.queued: must not be negative, is {self.queued}")
        if not 0 < self.lease_ttl_s < float("inf"):
            found.append(f"prefill.lease_ttl_s: must be more than 0, is {self.lease_ttl_s}")
        return found

    def refusal(self, open_legs: int) -> str:
        """Why one more leg is not taken; empty when it is."""
        return f"prefill is full: {open_legs} of {self.legs} legs" if open_legs >= self.legs else ""
