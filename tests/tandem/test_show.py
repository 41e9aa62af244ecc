import pytest

from tandem import show
from tandem.values import Finished, FinishReason, Route, Timings, Usage


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 ms"),
        (0.00123, "1.2 ms"),
        (0.0994, "99.4 ms"),
        (0.25, "250 ms"),
        (0.9996, "1.0 s"),
        (59.9, "59.9 s"),
        (59.96, "1 min 0 s"),
        (3599.9, "1 h 0 min"),
        (7265, "2 h 1 min"),
    ],
)
def test_durations_are_said_as_people_do(seconds: float, text: str) -> None:
    assert show.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (150 << 10, "150 KiB"),
        (3 << 20, "3.0 MiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_sizes_are_said_in_powers_of_1024(count: int, text: str) -> None:
    assert show.size(count) == text


def test_a_story_says_who_served_and_what_the_hand_off_cost() -> None:
    finished = Finished(
        reason=FinishReason.LENGTH,
        stop_match="",
        usage=Usage(prompt_tokens=100, cached_prompt_tokens=64, completion_tokens=11),
        timings=Timings(queue_s=0, prefill_s=0.012, ttft_s=0.5, handoff_s=0.003, transfer_s=0.0005, total_s=1.5),
        route=Route(
            prefill_worker="p-0",
            decode_worker="d-0",
            transport="nixl",
            transfer_bytes=3 << 20,
            retries=1,
            local_prefill=False,
        ),
    )
    assert show.story("r1", finished).splitlines() == [
        "prefill   p-0     100 tokens, 64 of them cached, in 12.0 ms",
        "hand-off  3.0 ms  3.0 MiB by nixl, 0.5 ms of it on the move",
        "decode    d-0     11 tokens at 10 tokens/s",
        "again     1 leg   run again after a failure",
        "total     1.5 s   first token after 500 ms, ended by length",
        "more              tandem why r1",
    ]
