"""What a worker tells Prometheus. Gauges are read from snapshots when scraped; nothing is computed for nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from decode.ahead import AheadOutcome
from engine.base import EngineLoad, Staged
from worker.config import Role

_FETCH_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What the worker is doing now."""

    prefill_legs: int = 0
    decode_legs: int = 0
    links: int = 0
    engine: EngineLoad = EngineLoad()


class WorkerMetrics:
    def __init__(self, worker_id: str) -> None:
        self.registry = CollectorRegistry()
        self._legs_ended = Counter(
            "tandem_worker_legs_ended",
            "Legs by what became of them.",
            ["worker", "role", "outcome"],
            registry=self.registry,
        )
        self._fetch_s = Histogram(
            "tandem_worker_fetch_seconds",
            "Reading one request's KV blocks, from the order to the confirmed lease.",
            ["worker", "transport"],
            buckets=_FETCH_BUCKETS_S,
            registry=self.registry,
        )
        self._fetched_bytes = Counter(
            "tandem_worker_fetched_bytes", "KV bytes read from peers.", ["worker", "transport"], registry=self.registry
        )
        self._ahead = Counter(
            "tandem_worker_fetches_ahead",
            "Reads of blocks that were still being computed, by what became of them.",
            ["worker", "outcome"],
            registry=self.registry,
        )
        self._worker_id = worker_id

    def leg_ended(self, role: Role, outcome: str) -> None:
        self._legs_ended.labels(self._worker_id, role.value, outcome).inc()

    def fetched(self, staged: Staged) -> None:
        self._fetch_s.labels(self._worker_id, staged.transport).observe(staged.fetch_s)
        self._fetched_bytes.labels(self._worker_id, staged.transport).inc(staged.transfer_bytes)

    def fetched_ahead(self, outcome: AheadOutcome) -> None:
        self._ahead.labels(self._worker_id, outcome.value).inc()

    def show(self, snapshot: Callable[[], Snapshot]) -> None:
        """Registers the gauges. They call `snapshot` from the scraper's thread, so it must only read."""
        gauges: dict[str, tuple[str, Callable[[Snapshot], int]]] = {
            "prefill_legs": ("Prefill legs open.", lambda now: now.prefill_legs),
            "decode_legs": ("Decode legs open.", lambda now: now.decode_legs),
            "links": ("Routers linked.", lambda now: now.links),
            "kv_blocks_free": ("KV blocks that nothing holds.", lambda now: now.engine.kv_blocks_free),
            "kv_blocks": ("KV blocks in all.", lambda now: now.engine.kv_blocks_total),
            "leases_held": ("Leases pinned for readers.", lambda now: now.engine.leases_held),
            "staged_pages": ("Staging pages taken.", lambda now: now.engine.staged_pages),
            "transfers_corrupt": (
                "Reads since the start whose bytes were not the owner's (kv_verify).",
                lambda now: now.engine.transfers_corrupt_total,
            ),
        }
        for name, (text, value) in gauges.items():
            gauge = Gauge(f"tandem_worker_{name}", text, ["worker"], registry=self.registry)
            gauge.labels(self._worker_id).set_function(_reader(value, snapshot))


def _reader(value: Callable[[Snapshot], int], snapshot: Callable[[], Snapshot]) -> Callable[[], float]:
    return lambda: value(snapshot())


@contextmanager
def serve_metrics(metrics: WorkerMetrics, address: str) -> Iterator[int]:
    """Yields the port; 0 when `address` is empty and nothing is served."""
    if not address:
        yield 0
        return
    host, _, port = address.rpartition(":")
    server, thread = start_http_server(int(port), host, registry=metrics.registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
