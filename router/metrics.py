"""Prometheus metrics, made from the core's own counters when they are asked for. Nothing is counted twice.

Names are `tandem_<noun>_<unit>` in base units. No label's values can be chosen by a client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from router.core.snapshot import Snapshot, WorkerView
from router.core.stats import Histogram, Stats

_COUNTERS = {
    "prompt_tokens": "Prompt tokens of requests that were dispatched",
    "cached_prompt_tokens": "Of these, found in a worker's prefix cache",
    "completion_tokens": "Tokens generated",
    "prefill_retries": "Prefill legs run again after a failure",
    "decode_retries": "Decode legs run again after a failure",
    "local_prefills": "Requests whose decode worker computed the prompt",
    "local_short": "Of these, because the prompt was short",
    "local_cached": "Of these, because what the decode worker did not have cached was short",
    "local_overflow": "Of these, because prefill workers were far behind",
    "prefix_choices": "Dispatches to a prefill worker for the prompt's beginning that it holds",
    "prefix_tokens": "Prompt tokens that these were thought to hold",
    "preemptions": "Times that batch work gave way to guaranteed realtime work",
    "refused_early": "Requests refused since their first token was predicted to come past their deadline",
    "transfers": "Hand-offs whose bytes arrived and were confirmed",
    "transfer_bytes": "KV bytes moved between workers",
    "workers_lost": "Links to workers that broke",
}
_HISTOGRAMS = {
    "queue_wait": ("queue_wait_s", "Arrival to dispatch"),
    "prefill": ("prefill_s", "Prefill leg at its worker"),
    "time_to_first_token": ("ttft_s", "Arrival to the first token handed to the edge"),
    "inter_token_latency": ("itl_s", "Between tokens of one answer"),
    "handoff": ("handoff_s", "Prefill known to be done to the decode worker's first step"),
    "transfer": ("transfer_s", "KV bytes on the move"),
    "request_duration": ("total_s", "Arrival to the end, however it ended"),
}
_WORKER_GAUGES: dict[str, tuple[str, Callable[[WorkerView], float]]] = {
    "prefill_legs": ("Prefill legs open at the worker", lambda worker: worker.prefill_legs),
    "decode_legs": ("Decode legs open at the worker", lambda worker: worker.decode_legs),
    "kv_blocks_free": ("KV blocks free", lambda worker: worker.load.kv_blocks_free),
    "kv_blocks": ("KV blocks in all", lambda worker: worker.facts.capacity.kv_blocks),
    "leases": ("Leases that the worker keeps for others", lambda worker: worker.load.leases_held),
    "draining": ("1 while the worker takes no new legs", lambda worker: worker.draining),
}


class RouterCollector(Collector):
    """`read` is called on the exporter's thread and must be safe there."""

    def __init__(
        self, read: Callable[[], tuple[Stats, Snapshot]], access: Callable[[], Iterable[Metric]] = lambda: ()
    ) -> None:
        self._read = read
        self._access = access

    def collect(self) -> Iterable[Metric]:
        stats, snapshot = self._read()
        yield from _counters(stats)
        yield from _gauges(snapshot)
        yield from self._access()
        for name, (field, text) in _HISTOGRAMS.items():
            yield _histogram(f"tandem_{name}_seconds", text, getattr(stats, field))


def _counters(stats: Stats) -> Iterator[Metric]:
    outcomes = CounterMetricFamily("tandem_requests", "Requests ended, by how", labels=["outcome"])
    for outcome, count in stats.outcomes.items():
        outcomes.add_metric([outcome.value], count)
    yield outcomes
    for field, text in _COUNTERS.items():
        yield CounterMetricFamily(f"tandem_{field}", text, value=getattr(stats, field))


def _gauges(snapshot: Snapshot) -> Iterator[Metric]:
    yield GaugeMetricFamily("tandem_requests_queued", "Requests that wait for a worker", value=snapshot.queued)
    yield GaugeMetricFamily("tandem_requests_running", "Requests dispatched and not ended", value=snapshot.running)
    yield GaugeMetricFamily("tandem_queued_prompt_tokens", "Prompt tokens waiting", value=snapshot.queued_tokens)
    for name, (text, value) in _WORKER_GAUGES.items():
        family = GaugeMetricFamily(f"tandem_worker_{name}", text, labels=["worker", "role"])
        for worker in snapshot.workers:
            family.add_metric([worker.facts.worker_id, worker.role.value], value(worker))
        yield family
    yield _lanes(snapshot)


def _lanes(snapshot: Snapshot) -> Metric:
    family = GaugeMetricFamily(
        "tandem_lane_bytes_per_second",
        "What the self-test of a pair of workers measured; 0 when they cannot exchange blocks",
        labels=["reader", "owner", "transport"],
    )
    for worker in snapshot.workers:
        for lane in worker.lanes:
            family.add_metric([worker.facts.worker_id, lane.peer, lane.transport], lane.gigabytes_per_s * 1e9)
    return family


def access_metrics(
    *,
    is_open: bool,
    joins_are_open: bool,
    refused: Mapping[str, Mapping[str, int]],
    expires: Mapping[str, float | None],
) -> Iterator[Metric]:
    """`refused`: of what, for which reason, how often. `expires`: of which ports' certificate, when."""
    yield GaugeMetricFamily("tandem_unauthenticated", "1 while callers are not asked who they are", value=is_open)
    yield GaugeMetricFamily("tandem_joins_open", "1 while anybody may be a worker", value=joins_are_open)
    family = CounterMetricFamily("tandem_refused", "Strangers turned away", labels=["what", "reason"])
    for what, reasons in refused.items():
        for reason, count in reasons.items():
            family.add_metric([what, reason], count)
    yield family
    ends = GaugeMetricFamily(
        "tandem_certificate_expiry_timestamp_seconds", "When the certificate in force ends", labels=["port"]
    )
    for port, moment in expires.items():
        if moment is not None:
            ends.add_metric([port], moment)
    yield ends


def edge_metrics(*, serving: int, restarts: int) -> Iterator[Metric]:
    yield GaugeMetricFamily("tandem_edges", "Processes that speak with clients", value=serving)
    yield CounterMetricFamily("tandem_edge_restarts", "Of these, started again after they died", value=restarts)


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
    cumulative = accumulate(histogram.counts)
    buckets = list(zip(bounds, map(float, cumulative), strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.sum)


def exposition(collector: Collector) -> Callable[[], bytes]:
    """The page, for others to serve."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return lambda: generate_latest(registry)
