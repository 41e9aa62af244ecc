"""Programs of others against a live cluster. `make test-clients` runs them: they are fetched from the package index."""

from __future__ import annotations

import re
import shutil
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.environments import environment, node_environment
from tests.cluster.harness import PACE, Cluster, clean_environment, cluster

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if item.path.is_relative_to(HERE)]
    for item in mine:
        item.add_marker("clients")
        item.add_marker(pytest.mark.timeout(600))  # the first to need an environment makes it
    if "clients" not in config.option.markexpr:
        config.hook.pytest_deselected(items=mine)
        items[:] = [item for item in items if item not in mine]


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With vLLM's engine API at its workers."""
    engine_api = ("--set", "worker.engine_listen=127.0.0.1:0")
    with cluster(tmp_path_factory.mktemp("clients"), "sim", *PACE["sim"], "--http-port", "0", *engine_api) as running:
        running.wait_ready()
        yield running


def engine_address(serving: Cluster, worker: str) -> str:
    """Of a worker's own engine API, from its log."""
    (log,) = serving.state.glob(f"run-*/{worker}.log")
    found = re.search(r"vLLM's engine API on (\S+)", log.read_text())
    assert found, log.read_text()
    return found[1]


def program(text: str, *arguments: str, needs: tuple[str, ...], timeout_s: float = 60, **environ: str) -> str:
    """What a program, in Python, prints in an environment that has what it needs and nothing of ours."""
    command = [str(environment(*needs) / "python"), "-c", textwrap.dedent(text), *arguments]
    done = subprocess.run(
        command, env=clean_environment() | environ, cwd="/", capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def node_program(text: str, *arguments: str, needs: tuple[str, ...], timeout_s: float = 60) -> str:
    """The same for a program in JavaScript."""
    if shutil.which("npm") is None:
        pytest.skip("there is no node here")
    done = subprocess.run(
        ["node", "--input-type=module", "-", *arguments],
        input=textwrap.dedent(text),
        env=clean_environment(),
        cwd=node_environment(*needs),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def http_address(serving: Cluster) -> str:
    found = re.search(r"^OpenAI's API on (http://\S+)/v1$", serving.output, re.MULTILINE)
    assert found, serving.output
    return found[1]


def is_idle(serving: Cluster) -> bool:
    """Until no request and no leg is open."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        status = serving.status()
        if not status.requests and not any(worker.prefill_legs or worker.decode_legs for worker in status.workers):
            return True
        time.sleep(0.05)
    return False
