"""How long computing and moving a prompt takes, from coefficients of the hardware at hand.

The coefficients are values from configuration (a fit to measured kernels, or to this cluster's own steps). Without
any, times are counted in prompt tokens, which orders workers as well as one can without knowing their speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModel:
    """A prefill of u uncached tokens of a prompt of n takes
    `prefill_s + u * prefill_s_per_token + (n^2 - (n - u)^2) * prefill_s_per_pair`."""

    prefill_s: float = 0.0
    prefill_s_per_token: float = 1.0
    prefill_s_per_pair: float = 0.0
    #: Prompt tokens that an engine computes in one step at most. A step that has begun is computed to its end.
    step_tokens: int = 8192
    kv_bytes_per_token: int = 0
    #: A hand-off's fixed part, and its rate where no lane has been measured.
    transfer_s: float = 0.0
    transfer_bytes_per_s: float = 1e10
    #: By how much a decode worker may delay those it decodes for, to compute a prompt itself rather than have it
    #: computed elsewhere and fetched.
    stall_s_max: float = 0.0

    def problems(self) -> list[str]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found = [f"step.{name}: must not be negative, is {value:g}" for name, value in values.items() if value < 0]
        found += [
            f"step.{name}: must be more than 0"
            for name in ("prefill_s_per_token", "step_tokens", "transfer_bytes_per_s")
            if not values[name]
        ]
        return found

    def compute_s(self, uncached_tokens: int, prompt_tokens: int) -> float:
        before = prompt_tokens - uncached_tokens
        pairs = prompt_tokens * prompt_tokens - before * before
        return self.prefill_s + self.prefill_s_per_token * uncached_tokens + self.prefill_s_per_pair * pairs

    def queue_s(self, tokens: int) -> float:
        """Until this many tokens before it are computed."""
        return self.prefill_s_per_token * tokens

    def begun_tokens(self, computed_tokens: float, tokens: int) -> int:
        """Of a prompt's tokens, those in steps that had begun once so many were computed."""
        return min(tokens, ceil(computed_tokens / self.step_tokens) * self.step_tokens)

    def move_s(self, prompt_tokens: int, gigabytes_per_s: float = 0.0) -> float:
        rate = gigabytes_per_s * 1e9 or self.transfer_bytes_per_s
        return self.transfer_s + prompt_tokens * self.kv_bytes_per_token / rate

    def may_stall(self, uncached_tokens: int, prompt_tokens: int) -> bool:
        """True when this is short enough for a decode worker to compute between its own steps. The step's fixed part
        is paid by the decodes anyway."""
        return self.compute_s(uncached_tokens, prompt_tokens) - self.prefill_s <= self.stall_s_max


#: Nothing is known: no prompt is worth computing at a decode worker that could be computed elsewhere.
UNKNOWN = StepModel()
