"""Fuzzes a cluster of its own: `python -m tests.fuzz.live grpc --cases 10000`, or `http`; other flags are the fuzzer's.

Afterwards the cluster must still serve, and hold nothing: no request, no leg, no lease, no block.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tandem.values import ClusterStatus
from tests.cluster.harness import ROOT, Cluster, cluster

#: Fetched by `make fuzz-http`, in an environment of its own.
HTTP_ENVIRONMENT = ROOT / ".venv-fuzz"
_IDLE_WITHIN_S = 20.0
#: Paths that take something: the cases are spread over these.
_PATHS_WITH_CHOICE = 5
_CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)
_HTTP_FLAGS = (
    f"--checks={','.join(_CHECKS)}",
    "--phases=fuzzing",
    "--continue-on-failure",
    "--generation-database=none",
    "--request-timeout=30",
    "--no-color",
    "--warnings=off",
)


def held(status: ClusterStatus) -> list[str]:
    """What is not back to how it was at the start."""
    found = [f"request {request.request_id} is {request.state}" for request in status.requests]
    for worker in status.workers:
        load = worker.load
        counts = {
            "prefill legs": worker.prefill_legs,
            "decode legs": worker.decode_legs,
            "leases": load.leases_held,
            "leased blocks": load.leased_blocks,
            "staged pages": load.staged_pages,
            "used blocks": load.kv_blocks_total - load.kv_blocks_free,
        }
        found += [f"{worker.worker_id}: {count} {what}" for what, count in counts.items() if count]
    return found


def becomes_idle(running: Cluster) -> list[str]:
    give_up = time.monotonic() + _IDLE_WITHIN_S
    while (left := held(running.status())) and time.monotonic() < give_up:
        time.sleep(0.2)
    return left


def http_url(running: Cluster) -> str:
    found = re.search(r"^OpenAI's API on (http://\S+)/v1$", running.output, re.MULTILINE)
    assert found is not None, running.output
    return found[1]


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("grpc", "http"))
    parser.add_argument("--cases", type=int, default=10_000)
    asked, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder), "sim", "--http-port", "0") as running:
        running.wait_ready()
        pid = running.pid("router")
        before, began = resident_mib(pid), time.monotonic()
        if asked.what == "grpc":
            words = ["tandem-nano", "def f(x):", "text_input", "stream", "max_tokens", "BYTES"]
            command = [sys.executable, "-m", "tests.fuzz.grpc_methods", running.address]
            command += [f"--word={word}" for word in words]
            command += [f"--cases={asked.cases}"]
        else:
            command = [str(HTTP_ENVIRONMENT / "bin" / "schemathesis"), "run", f"{http_url(running)}/openapi.json"]
            command += [f"--max-examples={-(-asked.cases // _PATHS_WITH_CHOICE)}", *_HTTP_FLAGS]
        done = subprocess.run([*command, *rest], cwd=ROOT)
        left = becomes_idle(running)
        with running.client() as client:
            served = "".join(delta.text for delta in client.generate("x = 1", max_tokens=4))
        grown = f"router {before:.0f} -> {resident_mib(pid):.0f} MiB"
        print(f"{time.monotonic() - began:.0f} s; {grown}; left: {left or 'nothing'}")
        return done.returncode or bool(left) or not served or running.times_ready("router") != 1


if __name__ == "__main__":
    sys.exit(main())
