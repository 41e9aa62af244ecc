"""The bounds that the core keeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreLimits:
    #: Requests, and their prompt tokens, that may wait over all pools. More are refused.
    queue_requests_max: int = 10_000
    queue_tokens_max: int = 8_000_000
    #: Prefill legs, and transfers, that may fail before the decode worker computes the prompt itself.
    prefill_attempts_max: int = 3
    #: Decode legs that may fail before the request does.
    decode_attempts_max: int = 3
    #: Prompt tokens a decode worker computes itself at a time. One longer prompt may run alone.
    local_prefill_tokens_max: int = 8_192
    #: The longest prompt that a decode worker computes because prefill workers are far behind, one at a time; 0: none.
    #: How much longer its steps are then is its engine's `long_prefill_token_threshold` to say.
    overflow_tokens_max: int = 0
    #: Of the tokens a request may generate, how many get KV room reserved at dispatch. Engines preempt when a
    #: crowd of long answers outgrows that; reserving for the longest answer possible would leave memory idle.
    reserve_tokens_max: int = 512
    #: Times that a request of the batch lane may be made to wait for guaranteed realtime work.
    preemptions_max: int = 2
    #: A pool that nobody can serve keeps its queue this long; then it fails what waits and refuses what comes.
    path_wait_s: float = 60.0
    #: What a refused client is told to wait.
    retry_after_s: float = 1.0
    #: A worker that refused or failed a leg gets none for a while: doubling from the first to the second.
    rest_s_min: float = 0.1
    rest_s_max: float = 5.0
    #: A worker that has said nothing for this long is lost.
    silence_s_max: float = 30.0
    #: Ended requests whose stories are kept, and lines per story.
    history_max: int = 10_000
    story_lines_max: int = 64

    def __post_init__(self) -> None:
        for name in ("queue_requests_max", "queue_tokens_max", "prefill_attempts_max", "decode_attempts_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, is {getattr(self, name)}")
        for name in (
            "local_prefill_tokens_max",
            "overflow_tokens_max",
            "reserve_tokens_max",
            "preemptions_max",
            "path_wait_s",
            "retry_after_s",
            "history_max",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, is {getattr(self, name)}")
        if not 0 < self.rest_s_min <= self.rest_s_max:
            raise ValueError(f"rest_s_min must lie between 0 and rest_s_max, is {self.rest_s_min}")
        if self.silence_s_max <= 0:
            raise ValueError(f"silence_s_max must be positive, is {self.silence_s_max}")
        if self.story_lines_max < 8:
            raise ValueError(f"story_lines_max must be at least 8, is {self.story_lines_max}")
