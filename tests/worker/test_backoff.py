from random import Random

from worker.backoff import Backoff


def test_waits_grow_to_their_cap_and_start_over_after_a_reset() -> None:
    backoff = Backoff(1, 8, Random(0))
    for ceiling in (1, 2, 4, 8, 8, 8):
        assert ceiling / 2 <= backoff.next_s() <= ceiling
    backoff.reset()
    assert backoff.next_s() <= 1


def test_workers_that_lost_a_router_together_come_back_apart() -> None:
    assert len({Backoff(1, 8, Random(f"w{n} r")).next_s() for n in range(100)}) == 100
