"""How many decode legs a worker takes, and how many of them fetch at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLimits:
    #: Legs open at once, fetching and decoding together; one more is refused.
    legs: int = 64
    #: Legs that read KV blocks at once; the others wait their turn, within their deadline.
    fetches: int = 4
    fetch_timeout_s: float = 10.0
    #: Fetches begun before their legs are ordered, while the prompts are computed; 0 waits for the orders.
    fetches_ahead: int = 8

    def problems(self) -> list[str]:
        found = []
        if self.legs < 1:
            found.append(f"decode.legs: must be at least 1, is {self.legs}")
        if self.fetches < 1:
            found.append(f"decode.fetches: must be at least 1, is {self.fetches}")
        if self.fetches_ahead < 0:
            found.append(f"decode.fetches_ahead: must not be negative, is {self.fetches_ahead}")
        if not 0 < self.fetch_timeout_s < float("inf"):
            found.append(f"decode.fetch_timeout_s: must be more than 0, is {self.fetch_timeout_s}")
        return found

    def refusal(self, open_legs: int) -> str:
        """Why one more leg is not taken; empty when it is."""
        return f"decode is full: {open_legs} of {self.legs} legs" if open_legs >= self.legs else ""
