"""What may be read of a prompt while steps that compute it are under way: with asynchronous scheduling vLLM schedules a
step, or takes blocks back, before it has heard of the step before. When it preempts cannot be brought about in a real
engine, so its side is played here; the node and its board are real."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.kv_transfer.nodes import Party, world

pytestmark = pytest.mark.vllm

BLOCK_TOKENS = 16
BLOCKS = [3, 4, 9, 2, 11]
TOKENS = 69


@pytest.fixture
def owner() -> Iterator[Party]:
    with world() as opened:
        yield opened.open("p")


class Engine:
    """One prompt of five blocks, of which a step computes two."""

    def __init__(self, owner: Party) -> None:
        from kv_transfer.vllm_connector import _Scheduler
        from kv_transfer.vllm_params import PrefillOrder

        core: Any = SimpleNamespace(node=owner.node, block_tokens=BLOCK_TOKENS)
        self.half = _Scheduler(core)
        self._node = owner.node
        order = PrefillOrder(
            transfer_id="t", hand_off=True, tenant="", reader="d", ttl_s=30.0, overlap=True, even_if_stopped=False
        )
        request: Any = SimpleNamespace(request_id="r", num_prompt_tokens=TOKENS)
        self.half.expect(request, order)

    def schedules(self, before: int) -> Any:
        """The step from that token on; what it will report."""
        from vllm.v1.core.sched.output import SchedulerOutput

        from kv_transfer.vllm_connector import _Computed

        step = SchedulerOutput.make_empty()
        step.num_scheduled_tokens = {"r": 2 * BLOCK_TOKENS}
        step.scheduled_cached_reqs.req_ids.append("r")
        step.scheduled_cached_reqs.num_computed_tokens.append(before)
        return _Computed(self.half.take_step(step).computes, None)

    def publishes(self) -> list[tuple[str, bytes]]:
        blocks = SimpleNamespace(get_block_ids=lambda request_id: (BLOCKS,))
        scheduler: Any = SimpleNamespace(kv_cache_manager=blocks)
        return self.half.publish(scheduler)

    @property
    def readable(self) -> int:
        """Blocks; zero without a lease."""
        lease = self._node._leases.find("t")
        return lease.blocks if lease else 0


def test_a_step_is_readable_when_it_is_over_and_no_step_before(owner: Party) -> None:
    engine = Engine(owner)
    first = engine.schedules(0)
    second = engine.schedules(32)
    assert engine.publishes() == []
    engine.half.computed(first)
    ((request_id, handle),) = engine.publishes()
    assert (request_id, bool(handle), engine.readable) == ("r", True, 2)
    engine.half.computed(second)
    assert engine.publishes() == []
    assert engine.readable == 4


def test_a_step_that_ends_after_its_blocks_were_taken_back_is_never_readable(owner: Party) -> None:
    engine = Engine(owner)
    first = engine.schedules(0)
    engine.half.preempted("r")
    engine.half.computed(first)
    assert engine.publishes() == []
    assert owner.node.stats().leases_held == 0


def test_blocks_taken_back_stay_unreadable_whatever_steps_report(owner: Party) -> None:
    engine = Engine(owner)
    engine.half.computed(engine.schedules(0))
    assert engine.publishes()
    second = engine.schedules(32)
    engine.half.preempted("r")
    assert owner.node.stats().leases_held == 0
    engine.half.computed(second)
    assert engine.publishes() == []
    again = engine.schedules(0)
    engine.half.computed(again)
    assert engine.publishes() == []
    assert owner.node.stats().leases_held == 0
