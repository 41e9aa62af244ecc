from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.harness import Cluster, cluster


@pytest.fixture(scope="module")
def engine() -> str:
    """A module overrides this to run on another engine, or on several."""
    return "sim"


@pytest.fixture(scope="module")
def shared(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster for the tests of a module that leave it as they found it."""
    # Engine steps that take a moment, as real ones do: else every answer is done before anything can happen to it.
    pace = ["--set", "engine.speedup=5"] if engine == "sim" else []
    with cluster(tmp_path_factory.mktemp(engine), engine, *pace) as running:
        running.wait_ready()
        yield running


@pytest.fixture
def fresh(engine: str, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster for one test."""
    pace = ["--set", "engine.speedup=5"] if engine == "sim" else []
    with cluster(tmp_path, engine, *pace) as running:
        running.wait_ready()
        yield running
