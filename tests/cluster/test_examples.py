"""Every file of examples/, run as its first line says, against live clusters."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.cluster.harness import PACE, ROOT, Cluster, clean_environment, cluster

#: The load generator's needs Locust, see tests/clients.
EXAMPLES = sorted(
    path.name
    for path in (ROOT / "examples").iterdir()
    if path.name.endswith((".py", ".sh")) and "locust" not in path.name
)
#: What an example needs beside Tandem.
LIBRARIES = {"openai_sdk.py": "openai"}


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("serving"), "sim", *PACE["sim"], "--http-port", "0") as running:
        running.wait_ready()
        yield running


def run(example: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["sh"] if example.endswith(".sh") else [sys.executable]
    environ = clean_environment() | {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    return subprocess.run(
        [*command, str(ROOT / "examples" / example), *arguments],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )


def base_url(serving: Cluster) -> str:
    found = re.search(r"^OpenAI's API on (http://\S+/v1)$", serving.output, re.MULTILINE)
    assert found, serving.output
    return found[1]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_works(serving: Cluster, example: str) -> None:
    if example in LIBRARIES:
        pytest.importorskip(LIBRARIES[example])
    over_http = example in ("openai_sdk.py", "http.sh")
    done = run(example, base_url(serving) if over_http else serving.address)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "failed: " not in done.stdout


def finished(cluster: Cluster) -> int:
    with cluster.client() as client:
        return client.status().outcomes.get("finished", 0)


def test_stock_grpc_spreads_calls_over_routers_and_survives_the_loss_of_one(serving: Cluster, fresh: Cluster) -> None:
    one, other = fresh, serving
    addresses = (one.address, other.address)
    before = finished(one), finished(other)
    for _ in range(6):
        assert run("stock_grpc.py", *addresses).returncode == 0
    assert finished(one) + finished(other) == sum(before) + 6
    one.stop()
    for _ in range(3):
        done = run("stock_grpc.py", *addresses)
        assert done.returncode == 0, done.stderr
