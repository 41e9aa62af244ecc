from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.harness import PACE, Cluster, cluster


@pytest.fixture(scope="package")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster for all tests that leave it as they found it; a module says on which engines, see the harness."""
    engine: str = request.param
    with cluster(tmp_path_factory.mktemp(engine), engine, *PACE[engine]) as running:
        running.wait_ready()
        yield running


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Cluster]:
    """A simulated cluster for one test."""
    with cluster(tmp_path, "sim", *PACE["sim"]) as running:
        running.wait_ready()
        yield running
