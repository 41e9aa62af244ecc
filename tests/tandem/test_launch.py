"""What `tandem up` tells its workers beyond their configuration."""

import os
from pathlib import Path

import pytest

from tandem import launch
from worker.config import from_json


@pytest.mark.parametrize(("cores", "told", "threads"), [(16, 0, 4), (2, 0, 1), (6, 0, 1), (16, 3, 3)])
def test_engines_share_the_cores_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, told: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    settings = ["cluster.prefill_workers=1", "cluster.decode_workers=3", "router.port=0", f"engine.cpu_threads={told}"]
    config = launch.load(None, {}, {}, settings)
    with launch.plan(config, tmp_path / "state", prompts=()) as plan:
        workers = [from_json(Path(spec.argv[-1]).read_bytes()) for spec in plan.specs if "worker" in spec.argv]
    assert [worker.engine_options.cpu_threads for worker in workers] == [threads] * 4
