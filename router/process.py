"""What every process of a router does for itself."""

from __future__ import annotations

import gc
import resource
from contextlib import suppress


def allow_connections() -> None:
    """As many open files as the system lets this process have: each connection is one, and the default is few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with suppress(ValueError, OSError):  # some systems name a limit that they don't grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def is_up() -> None:
    """What lives now lives on. Collecting it again and again costs milliseconds in the tail of decisions."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
