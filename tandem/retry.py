"""When a refused generation may be asked for again."""

from __future__ import annotations

import random

from tandem.errors import ResourceExhausted, TandemError, Unavailable

#: How often a generation is asked for again, unless the caller says otherwise.
RETRIES = 2

#: A server that asks for more than this does not mean "wait": a budget may renew tomorrow.
_WAIT_MAX_S = 60.0

_BACKOFF_FIRST_S = 0.25
_BACKOFF_MAX_S = 8.0


def wait_before_retry(error: TandemError, *, retried: int, retries: int, left_s: float | None) -> float | None:
    """How long to wait, in seconds, before asking again; None when that would not help, or not in time.

    The server's own time counts where it names one, and is never cut short, since it is true to the moment: what is
    added keeps many clients that were refused together from coming back together. Else exponential backoff with jitter.
    """
    if retried >= retries:
        return None
    if error.retry_after_s is not None and isinstance(error, ResourceExhausted | Unavailable):
        wait_s = error.retry_after_s * (1 + 0.1 * random.random()) + 0.01
    elif isinstance(error, Unavailable):
        wait_s = min(_BACKOFF_MAX_S, _BACKOFF_FIRST_S * 2**retried) * random.uniform(0.5, 1.0)
    else:
        return None
    if wait_s > _WAIT_MAX_S or (left_s is not None and wait_s >= left_s):
        return None
    return wait_s
