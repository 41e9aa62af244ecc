"""Which tokens a leg is given, which it samples again, and with what sampling.

A leg's **base** is the number of generated tokens that its order carries as if they were prompt. Feeding a token back
as prompt must not change what follows. It would in three cases:

1. The sampler draws from a seeded stream: a new leg starts the stream from its beginning.
2. Presence or frequency penalties: engines count generated tokens, not prompt.
3. An answer that must have a form: engines begin a grammar with the first token they generate.

Then the decode leg *resamples* the first token from the prompt's KV and nothing is streamed from the prefill leg.

The same question comes up when a decode worker is lost after n tokens. Where tokens may be fed back, prompt + n
tokens are prefilled and the stream goes on. Where they may not but the answer is determined (a seed, or greedy), the
request is *replayed*: run from the prompt again, and the first n tokens, which are the same, are not streamed twice.
What is left, unseeded sampling under penalties, goes on from prompt + n tokens: again a sample, though its penalties
count from there. An answer with a form always has a seed (edges give it one), and ends where it cannot be replayed.
"""

from __future__ import annotations

from dataclasses import replace

from router.core.request import Sampling


def may_feed_back(sampling: Sampling) -> bool:
    """True when a generated token can be given to the next leg as prompt without changing what follows."""
    seeded = sampling.seed is not None and sampling.temperature > 0
    penalized = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
    return not (seeded or penalized or sampling.structure is not None)


def is_determined(sampling: Sampling) -> bool:
    """True when running the request again gives the same tokens."""
    return sampling.temperature == 0 or sampling.seed is not None


def resume_base(sampling: Sampling, generated: int, *, replay_failed: bool) -> int:
    """How many of the generated tokens the next leg is given."""
    if may_feed_back(sampling) or replay_failed or not is_determined(sampling):
        return generated
    return 0


def resamples(sampling: Sampling, base: int) -> bool:
    """True when the decode leg samples the first token itself. The last token of all has nothing after it to change."""
    return not may_feed_back(sampling) and sampling.max_tokens - base > 1


def leg_sampling(sampling: Sampling, base: int) -> Sampling:
    """What is left to generate once `base` tokens are given."""
    if base == 0:
        return sampling
    return replace(sampling, max_tokens=sampling.max_tokens - base, min_tokens=max(0, sampling.min_tokens - base))
