from decode.batch import StepBatch
from engine.base import FinishReason, StepOutput, TokenLogprobs


def output(*tokens: int, **fields: object) -> StepOutput:
    return StepOutput(leg_id="as the engine names it", token_ids=tokens, **fields)  # type: ignore[arg-type]


def test_outputs_of_one_leg_are_joined_in_order() -> None:
    batch = StepBatch()
    logprobs = [TokenLogprobs(token, -1.0) for token in (1, 2, 3)]
    batch.add("a", output(1, cached_tokens=16, logprobs=(logprobs[0],)))
    batch.add("b", output(9))
    batch.add("a", output(2, 3, logprobs=(logprobs[1], logprobs[2]), finish_reason=FinishReason.STOP))
    assert len(batch) == 2
    assert batch.take() == [
        ("a", output(1, 2, 3, cached_tokens=16, logprobs=tuple(logprobs), finish_reason=FinishReason.STOP)),
        ("b", output(9)),
    ]
    assert batch.take() == []


def test_one_take_is_bounded_but_always_gets_on() -> None:
    batch = StepBatch(entries_max=4)
    wide = TokenLogprobs(1, -1.0, top=((2, -2.0),) * 9)
    batch.add("a", output(1, logprobs=(wide,)))
    batch.add("b", output(1, 2))
    batch.add("c", output(1, 2))
    batch.add("d", output(1, 2))
    assert [[leg for leg, _ in batch.take()] for _ in range(3)] == [["a"], ["b", "c"], ["d"]]
