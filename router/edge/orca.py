"""xds.service.orca.v3.OpenRcaService: how loaded this router's cluster is, for clients that choose between routers.

gRPC's weighted round robin takes the figure either from this service or from a trailer of each call. Shares of what
there is, and rates, are all that is told; like health, it takes no credential.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import grpc

from router.core.lifecycle import State
from router.core.snapshot import Snapshot
from router.core.worker import Role
from router.edge import orca_wire as wire
from router.edge.errors import answer

SERVICE = "xds.service.orca.v3.OpenRcaService"
TRAILER = "endpoint-load-metrics-bin"

#: A report is this old at most, and rates are of at least so long.
_FRESH_S = 0.1
_RATES_OVER_S = 1.0
#: Between reports on a stream.
_INTERVAL_S_MIN = 0.1
_INTERVAL_S_DEFAULT = 10.0
_INTERVAL_S_MAX = 3600.0

_ENDED_BADLY = (State.REFUSED, State.EXPIRED, State.FAILED)


class LoadReports:
    """The report, made when it is asked for and kept for a moment."""

    def __init__(self, snapshot: Callable[[], Snapshot], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._snapshot = snapshot
        self._clock = clock
        self._report = b""
        self._made_at = -_FRESH_S
        self._rates = _Rates()

    def report(self) -> bytes:
        now = self._clock()
        if now - self._made_at >= _FRESH_S or not self._report:
            self._report = self._make(now, self._snapshot())
            self._made_at = now
        return self._report

    def trailer(self) -> tuple[tuple[str, bytes]]:
        return ((TRAILER, self.report()),)

    def _make(self, now: float, snapshot: Snapshot) -> bytes:
        prefill = _share(
            sum(view.prefill_legs for view in snapshot.workers) + snapshot.queued,
            sum(view.facts.capacity.prefill_legs for view in snapshot.workers if view.role is not Role.DECODE),
        )
        decode = _share(
            sum(view.decode_legs for view in snapshot.workers),
            sum(view.facts.capacity.decode_legs for view in snapshot.workers if view.role is not Role.PREFILL),
        )
        blocks = sum(view.load.kv_blocks_total for view in snapshot.workers)
        kv = _share(blocks - sum(view.load.kv_blocks_free for view in snapshot.workers), blocks) if blocks else 0.0
        self._rates.update(now, snapshot)
        return wire.report(
            cpu=min(1.0, self._rates.cpu),
            memory=min(1.0, kv),
            application=max(prefill, decode),
            requests_per_s=self._rates.requests,
            errors_per_s=self._rates.errors,
            named={"prefill_utilization": prefill, "decode_utilization": decode, "kv_utilization": kv},
        )


class _Rates:
    """Per second, over the last `_RATES_OVER_S` or more."""

    def __init__(self) -> None:
        self.cpu = 0.0
        self.requests = 0.0
        self.errors = 0.0
        self._since: tuple[float, float, int, int] | None = None

    def update(self, now: float, snapshot: Snapshot) -> None:
        cpu = time.process_time()
        ended = sum(snapshot.outcomes.values())
        badly = sum(snapshot.outcomes[state] for state in _ENDED_BADLY)
        if self._since is None:
            self._since = (now, cpu, ended, badly)
            return
        began, cpu_then, ended_then, badly_then = self._since
        if (seconds := now - began) >= _RATES_OVER_S:
            self.cpu = (cpu - cpu_then) / seconds
            self.requests = (ended - ended_then) / seconds
            self.errors = (badly - badly_then) / seconds
            self._since = (now, cpu, ended, badly)


def _share(used: int, there_is: int) -> float:
    """A cluster without workers is full."""
    return used / there_is if there_is else 1.0


class OrcaEdge:
    def __init__(self, loads: LoadReports) -> None:
        self._loads = loads

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE, {"StreamCoreMetrics": grpc.unary_stream_rpc_method_handler(self._stream)}
        )

    async def _stream(self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        async def reports() -> None:
            asked = wire.interval_s(data) or _INTERVAL_S_DEFAULT
            interval_s = min(max(asked, _INTERVAL_S_MIN), _INTERVAL_S_MAX)
            while True:
                await context.write(self._loads.report())
                await asyncio.sleep(interval_s)

        await answer(context, reports)
