"""vLLM's CPU model worker with one defect repaired, which would let any tenant end the engine with one request.

A step that computes only a part of a prompt samples all the same, and vLLM then takes the draw back by setting the
offset of the request's generator. A CPU generator has no offset: a seeded request whose prompt is longer than a step
ends the engine ("CPU Generator does not use offset", 0.32.0). Here such a row's generator is out of sight while the
step samples. The row draws from the common generator, its token is thrown away as before, and its own draws are
untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker


class SeedKeepingCpuWorker(CPUWorker):
    """For vLLM's `worker_cls`."""

    def sample_tokens(self, grammar_output: Any) -> Any:
        with _generators_of_parts_held_back(self.model_runner):
            return super().sample_tokens(grammar_output)


@contextmanager
def _generators_of_parts_held_back(runner: Any) -> Iterator[None]:
    # The newer runner (with Triton) draws without generators and has neither attribute.
    if not isinstance(runner, CPUModelRunner):
        yield
        return
    generators = runner.input_batch.generators
    rows = np.flatnonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])
    held = {row: generators.pop(row) for row in rows.tolist() if row in generators}
    try:
        yield
    finally:
        generators.update(held)
