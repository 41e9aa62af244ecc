"""How long one engine step takes on hardware that isn't here.

A step computes T new prompt tokens, whose attention covers S token pairs, and one token for each of B sequences that
hold C tokens of context together:

    prefill = a + b*T + c*S        S = sum over chunks of end^2 - start^2
    decode  = a' + b'*B + c'*C     with a' + w*(1 - (1 - k/E)^B) for a mixture of experts: the experts B tokens reach
    mixed   = prefill(T, S) + b'*B + c'*C: weights are read once, so a' isn't paid twice

A mixed step is never shorter than a': weights are read for one token as for many.

The coefficients are least-squares fits, made for this project, to AIConfigurator 0.12.0's public tables of measured
kernels (github.com/ai-dynamo/aiconfigurator, SILICON mode, vLLM backend), over T >= 512 and B <= 256; `*_error` is a
fit's mean absolute error as a share. They are sums of kernel times, not served measurements: scheduling, sampling and
process hops add 1.5 to 3 ms to a real step. Fits whose error is past 5 % follow tables with jumps in them and are
worst at small batches.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step computes, as the step-time model counts it."""

    prefill_tokens: int = 0
    #: Sum over chunks of end^2 - start^2.
    prefill_pairs: int = 0
    decodes: int = 0
    context_tokens: int = 0

    def __bool__(self) -> bool:
        return bool(self.prefill_tokens or self.decodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """One row: a model on one engine's hardware. Times in milliseconds."""

    name: str
    prefill_ms: float
    prefill_ms_per_token: float
    prefill_ms_per_pair: float
    prefill_error: float
    decode_ms: float
    decode_ms_per_sequence: float
    decode_ms_per_context_token: float
    decode_error: float
    #: Time to read all experts' weights, and the share of them that one token reaches; dense models have none.
    experts_ms: float = 0.0
    expert_share: float = 0.0
    #: bf16 KV in all layers, over all GPUs of the engine.
    kv_bytes_per_token: int

    def step_s(self, work: StepWork) -> float:
        if not work:
            return 0.0
        weights_ms = self.decode_ms + self._experts_reached_ms(work.prefill_tokens + work.decodes)
        if work.prefill_tokens:
            weights_ms = max(weights_ms, self._prefill_ms(work))
        return (weights_ms + self._decodes_ms(work)) / 1e3

    def _prefill_ms(self, work: StepWork) -> float:
        return (
            self.prefill_ms
            + self.prefill_ms_per_token * work.prefill_tokens
            + self.prefill_ms_per_pair * work.prefill_pairs
        )

    def _decodes_ms(self, work: StepWork) -> float:
        return self.decode_ms_per_sequence * work.decodes + self.decode_ms_per_context_token * work.context_tokens

    def _experts_reached_ms(self, tokens: int) -> float:
        return self.experts_ms * (1 - (1 - self.expert_share) ** tokens)


_KV_LLAMA_8B = 131_072
_KV_LLAMA_70B = 327_680
_KV_QWEN3_32B = 262_144
_KV_DEEPSEEK_V3 = 70_272
_KV_GPT_OSS_120B = 73_728


def _row(
    name: str,
    kv_bytes_per_token: int,
    prefill: tuple[float, float, float, float],
    decode: tuple[float, float, float, float],
    experts: tuple[float, float] = (0.0, 0.0),
) -> StepTime:
    return StepTime(
        name=name,
        prefill_ms=prefill[0],
        prefill_ms_per_token=prefill[1],
        prefill_ms_per_pair=prefill[2],
        prefill_error=prefill[3],
        decode_ms=decode[0],
        decode_ms_per_sequence=decode[1],
        decode_ms_per_context_token=decode[2],
        decode_error=decode[3],
        experts_ms=experts[0],
        expert_share=experts[1],
        kv_bytes_per_token=kv_bytes_per_token,
    )


#: Names are GPU, model, then weights' type unless bf16, then tensor parallel size unless 1.
_ROWS = (
    _row("h100-llama-3.1-8b", _KV_LLAMA_8B, (1.28, 0.02028, 3.85e-7, 0.016), (6.42, 0.0108, 4.16e-5, 0.022)),
    _row("h200-llama-3.1-8b", _KV_LLAMA_8B, (0.61, 0.02053, 3.96e-7, 0.018), (4.91, 0.0123, 2.94e-5, 0.020)),
    _row("b200-llama-3.1-8b", _KV_LLAMA_8B, (1.47, 0.00993, 2.05e-7, 0.015), (3.37, 0.0046, 1.81e-5, 0.016)),
    _row("h100-llama-3-70b-tp4", _KV_LLAMA_70B, (4.54, 0.06189, 4.66e-7, 0.019), (15.20, 0.0328, 2.63e-5, 0.014)),
    _row("h100-llama-3-70b-tp8", _KV_LLAMA_70B, (6.04, 0.03882, 2.27e-7, 0.012), (9.93, 0.0271, 1.34e-5, 0.029)),
    _row("h200-llama-3-70b-tp4", _KV_LLAMA_70B, (2.74, 0.06183, 5.12e-7, 0.017), (12.07, 0.0331, 1.85e-5, 0.025)),
    _row("h100-llama-3-70b-fp8-tp2", _KV_LLAMA_70B, (6.80, 0.07160, 1.02e-6, 0.035), (16.30, 0.0439, 2.90e-5, 0.023)),
    _row("h100-llama-3-70b-fp8-tp4", _KV_LLAMA_70B, (5.58, 0.04795, 4.21e-7, 0.023), (10.24, 0.0369, 1.47e-5, 0.024)),
    _row("h200-llama-3-70b-fp8-tp2", _KV_LLAMA_70B, (4.89, 0.06573, 1.02e-6, 0.014), (13.04, 0.0416, 2.63e-5, 0.034)),
    _row("h200-llama-3-70b-fp8-tp4", _KV_LLAMA_70B, (5.45, 0.04344, 4.71e-7, 0.010), (8.74, 0.0366, 1.32e-5, 0.032)),
    _row("b200-llama-3-70b-fp8-tp2", _KV_LLAMA_70B, (11.21, 0.03352, 5.29e-7, 0.040), (11.08, 0.0291, 1.20e-5, 0.09)),
    _row("b200-llama-3-70b-fp8-tp4", _KV_LLAMA_70B, (8.98, 0.02395, 2.05e-7, 0.027), (8.36, 0.0198, 6.09e-6, 0.09)),
    _row("h100-qwen3-32b-fp8-tp2", _KV_QWEN3_32B, (18.68, 0.03409, 8.54e-7, 0.018), (20.93, 0.0645, 2.58e-5, 0.11)),
    _row("h200-qwen3-32b-fp8-tp2", _KV_QWEN3_32B, (21.96, 0.03122, 8.58e-7, 0.031), (20.39, 0.0540, 2.23e-5, 0.08)),
    _row(
        "h200-deepseek-v3-fp8-tp8",
        _KV_DEEPSEEK_V3,
        (36.63, 0.04908, 4.07e-7, 0.015),
        (14.92, 0.0398, 1.13e-5, 0.032),
        (17.50, 8 / 256),
    ),
    # Its table contradicts itself below B = 8, so no expert term could be fitted.
    _row("b200-deepseek-v3-fp8-tp8", _KV_DEEPSEEK_V3, (40.16, 0.03185, 1.53e-7, 0.015), (29.53, 0.0130, 5.70e-6, 0.09)),
    _row(
        "h100-gpt-oss-120b",
        _KV_GPT_OSS_120B,
        (33.7, 0.01840, 2.74e-7, 0.024),
        (4.10, 0.0423, 1.19e-5, 0.049),
        (16.69, 4 / 128),
    ),
    _row(
        "h200-gpt-oss-120b",
        _KV_GPT_OSS_120B,
        (33.3, 0.01828, 2.82e-7, 0.023),
        (3.71, 0.0436, 8.69e-6, 0.048),
        (16.07, 4 / 128),
    ),
    _row(
        "b200-gpt-oss-120b",
        _KV_GPT_OSS_120B,
        (25.95, 0.01088, 2.86e-7, 0.066),
        (2.32, 0.0385, 5.33e-6, 0.049),
        (8.73, 4 / 128),
    ),
)

STEP_TIMES = {row.name: row for row in _ROWS}

#: "flat-25ms": every step takes that long, whatever it computes. For benchmarks of what stands before the engine.
_FLAT = re.compile(r"flat-(\d{1,6}(?:\.\d{1,3})?)ms")


def step_time(name: str) -> StepTime:
    """Raises ValueError that lists the names there are."""
    if flat := _FLAT.fullmatch(name):
        return _row(name, _KV_LLAMA_8B, (0, 0, 0, 0), (float(flat[1]), 0, 0, 0))
    try:
        return STEP_TIMES[name]
    except KeyError:
        raise ValueError(f"step_time: no row {name!r}; there are {', '.join(sorted(STEP_TIMES))}") from None
