"""A little of what `make fuzz-grpc` does, against one cluster."""

from collections.abc import Iterator

import pytest

from tests.cluster.harness import Cluster, cluster
from tests.fuzz import grpc_methods, text
from tests.fuzz.live import becomes_idle

CASES = 40


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("fuzz"), "sim", "--http-port", "0") as running:
        running.wait_ready()
        yield running


def test_no_message_makes_a_fault_of_ours_or_leaves_anything_behind(serving: Cluster) -> None:
    words = ["--word=tandem-nano", "--word=text_input", "--word=x = 1"]
    assert grpc_methods.main([serving.address, f"--cases={CASES}", *words]) == 0
    assert becomes_idle(serving) == []
    assert serving.times_ready("router") == 1


@pytest.mark.asyncio
async def test_calls_that_can_be_served_are_among_them(serving: Cluster) -> None:
    """Else the fuzzer would only ever try the doors."""
    for method in grpc_methods.methods(serving.address):
        if method.full_name in grpc_methods.GOOD:
            outcome = await grpc_methods.fuzz(serving.address, method, 60, 3, ["tandem-nano"])
            served = outcome.codes["OK"] + outcome.codes["DEADLINE_EXCEEDED"]  # watching has no end of its own
            assert served > 3, (method.full_name, outcome.codes)


@pytest.mark.asyncio
async def test_any_text_is_streamed_whole_and_up_to_a_stop_string_anywhere() -> None:
    """`make fuzz-text` tries a thousand, and every position of each."""
    assert await text.run(120, 7, every_position=False) > 360
