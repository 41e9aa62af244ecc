"""Prefill legs at one worker: in order of arrival to the engine, a lease on what it computed, and the lease's early end
when nobody will read it. Who may ask and when a leg expires is the caller's; see worker/legs.py."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Hashable
from dataclasses import dataclass, replace

from engine.base import Engine, Offered, PrefillLeg, PrefillResult
from prefill.admission import Places, PrefillLimits
from prefill.leases import LeaseAccount

log = logging.getLogger(__name__)

#: Releases waiting for the engine. Past it the oldest is left to its deadline.
_RELEASES_MAX = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillOrder:
    #: As the router names it; the engine knows the leg by an id of this process.
    leg: PrefillLeg
    timeout_s: float


class PrefillService:
    def __init__(self, engine: Engine, limits: PrefillLimits) -> None:
        self._engine = engine
        self._limits = limits
        self._places = Places(limits)
        self._leases = LeaseAccount()
        self._releases: asyncio.Queue[bytes] = asyncio.Queue(_RELEASES_MAX)

    async def run(self) -> None:
        """Ends leases, one after the other; until cancelled."""
        while True:
            handle = await self._releases.get()
            try:
                await self._engine.release(handle)
            except Exception:
                # The lease then ends at its deadline; an engine that is dead says so in `wait_dead`.
                log.exception("a lease could not be released early")

    async def serve(
        self, customer: Hashable, order: PrefillOrder, engine_leg_id: str, offered: Offered | None = None
    ) -> PrefillResult:
        """`offered` is told the handle early, if the blocks can be read while they are computed.

        Raises LegError. Cancelling gives the place in the queue back, or aborts the leg in the engine."""
        clock = asyncio.get_running_loop().time
        # Nobody can use the blocks once the request's time is over.
        ttl_s = min(self._limits.lease_ttl_s, order.timeout_s)
        leg = replace(order.leg, leg_id=engine_leg_id, lease_ttl_s=ttl_s)
        arrived = clock()
        async with self._places.take(len(leg.token_ids)):
            waited_s = clock() - arrived
            result = await self._engine.prefill(leg, offered)
        if result.handle is not None:
            self._leases.hand_out(clock(), customer, order.leg.leg_id, result.handle, ttl_s)
        return replace(result, queue_s=result.queue_s + waited_s)

    def leg_gone(self, customer: Hashable, leg_id: str) -> None:
        """The customer gave up a leg that was served already: it will not use the handle either."""
        if handle := self._leases.take(customer, leg_id):
            self.release(handle)

    def customer_gone(self, customer: Hashable) -> None:
        for handle in self._leases.take_all(customer):
            self.release(handle)

    def release(self, handle: bytes) -> None:
        if self._releases.full():
            self._releases.get_nowait()
            log.warning("leases are released more slowly than they are given up; one is left to its deadline")
        self._releases.put_nowait(handle)
