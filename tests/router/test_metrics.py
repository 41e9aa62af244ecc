"""What /metrics says is what the core counted."""

from dataclasses import fields

from router.core.lifecycle import State as Life
from router.core.snapshot import Snapshot, WorkerView
from router.core.stats import Stats
from router.core.worker import Capacity, KvEndpoint, Load, ModelFacts, PeerLane, Role, WorkerFacts
from router.metrics import RouterCollector, exposition

MODEL = ModelFacts(name="m", revision="r", max_model_len=4096, vocab_size=4096)
WORKER = WorkerView(
    facts=WorkerFacts(
        worker_id="decode-0",
        incarnation="i",
        role=Role.DECODE,
        model=MODEL,
        capacity=Capacity(prefill_legs=1, decode_legs=8, kv_blocks=100, block_tokens=32),
        kv=KvEndpoint(),
    ),
    role=Role.DECODE,
    draining=False,
    load=Load(kv_blocks_free=97),
    prefill_legs=0,
    decode_legs=3,
    lanes=(PeerLane(peer="prefill-0", transport="nixl", gigabytes_per_s=2.5),),
)


def test_the_page_holds_counters_gauges_and_cumulative_buckets() -> None:
    stats = Stats()
    stats.outcomes[Life.FINISHED] += 2
    stats.transfer_bytes += 4096
    for ttft_s in (0.003, 0.004, 100.0):
        stats.ttft_s.observe(ttft_s)
    snapshot = Snapshot(workers=(WORKER,), queued=4, running=3, queued_tokens=900, requests=(), outcomes={})
    page = exposition(RouterCollector(lambda: (stats, snapshot)))().decode()
    lines = set(page.splitlines())
    assert {
        'tandem_requests_total{outcome="finished"} 2.0',
        "tandem_transfer_bytes_total 4096.0",
        "tandem_requests_queued 4.0",
        'tandem_worker_decode_legs{role="decode",worker="decode-0"} 3.0',
        'tandem_worker_kv_blocks_free{role="decode",worker="decode-0"} 97.0',
        'tandem_lane_bytes_per_second{owner="prefill-0",reader="decode-0",transport="nixl"} 2.5e+09',
        'tandem_time_to_first_token_seconds_bucket{le="0.005"} 2.0',
        'tandem_time_to_first_token_seconds_bucket{le="+Inf"} 3.0',
        "tandem_time_to_first_token_seconds_count 3.0",
    } <= lines, page


def test_everything_that_the_core_counts_is_on_the_page() -> None:
    stats = Stats()
    counted = [field.name for field in fields(Stats) if isinstance(getattr(stats, field.name), int)]
    for number, name in enumerate(counted, start=1000):
        setattr(stats, name, number)
    snapshot = Snapshot(workers=(), queued=0, running=0, queued_tokens=0, requests=(), outcomes={})
    lines = exposition(RouterCollector(lambda: (stats, snapshot)))().decode().splitlines()
    for number, name in enumerate(counted, start=1000):
        assert f"tandem_{name}_total {float(number)}" in lines
