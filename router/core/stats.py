"""Counters and histograms as plain values; exporters read them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

from router.core.lifecycle import ENDS, State

_SECONDS = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class Histogram:
    """Counts per bucket (not cumulative); the last bucket is unbounded."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


@dataclass(slots=True)
class Stats:
    """Changed by the core alone, and only ever grows."""

    outcomes: dict[State, int] = field(default_factory=lambda: dict.fromkeys(ENDS, 0))
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    prefill_retries: int = 0
    decode_retries: int = 0
    local_prefills: int = 0
    #: Of these, because what was left to compute was short: all of the prompt, or after what was cached.
    local_short: int = 0
    local_cached: int = 0
    #: Of these, because prefill workers were far behind.
    local_overflow: int = 0
    #: Dispatches to a prefill worker for the prefix it holds, and the tokens that it was thought to hold.
    prefix_choices: int = 0
    prefix_tokens: int = 0
    preemptions: int = 0
    #: Requests refused because their first token was predicted to come after their deadline.
    refused_early: int = 0
    transfers: int = 0
    transfer_bytes: int = 0
    workers_lost: int = 0
    queue_wait_s: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    prefill_s: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    ttft_s: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    itl_s: Histogram = field(default_factory=lambda: Histogram(_STEP_SECONDS))
    handoff_s: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    transfer_s: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    total_s: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
