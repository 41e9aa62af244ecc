"""What was refused to strangers: counted, told to the log within bounds, and slowed down for each source.

A source is a network address without its port; of IPv6, the 64 bits that one subscriber has.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

from router.core.errors import TandemError

#: Sources remembered; of more, those unheard of for longest are forgotten.
_SOURCES_MAX = 4096
_WHO_CHARS_MAX = 128

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Source:
    #: Of the bucket, at `at`.
    left: float
    at: float
    #: Refusals since one was last told.
    untold: int = 0


class Refusals:
    """Belongs to one event loop."""

    def __init__(self, what: str, *, burst: float, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`what` begins the log's lines. A source may be refused `burst` times at once, and `per_s` on."""
        self._what = what
        self._burst = burst
        self._per_s = per_s
        self._clock = clock
        #: By reason; reasons are ours, so there are few.
        self.counts: Counter[str] = Counter()
        self._sources: OrderedDict[str, _Source] = OrderedDict()

    def note(self, source: str, error: TandemError, who: str = "") -> float:
        """Seconds until this source should come again: 0 while it has not been refused too often. Only what is told
        within that bound gets into the log, with the number of those that did not. `who` must hold no secret."""
        self.counts[error.reason] += 1
        now = self._clock()
        bucket = self._sources.pop(source, None) or _Source(self._burst, now)
        self._sources[source] = bucket
        if len(self._sources) > _SOURCES_MAX:
            self._sources.popitem(last=False)
        bucket.left = min(self._burst, bucket.left + (now - bucket.at) * self._per_s)
        bucket.at = now
        if bucket.left < 1:
            bucket.untold += 1
            return (1 - bucket.left) / self._per_s
        bucket.left -= 1
        untold, bucket.untold = bucket.untold, 0
        more = f" (and {untold} before it that were not told)" if untold else ""
        named = f" as {who[:_WHO_CHARS_MAX]!r}" if who else ""
        source = source or "unknown"
        _log.warning("%s refused from %s%s: %s: %s%s", self._what, source, named, error.reason, error.message, more)
        return 0.0

    def told(self) -> dict[str, int]:
        """How often, by reason. From any thread."""
        return dict(self.counts)


def source_of(peer: str) -> str:
    """From gRPC's name of a peer (`ipv4:127.0.0.1:40000`) or a plain address."""
    kind, colon, rest = unquote(peer).partition(":")
    if kind in ("ipv4", "ipv6") and colon:
        peer = rest.rpartition(":")[0].strip("[]")
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return kind or "unknown"  # a Unix socket, say
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
