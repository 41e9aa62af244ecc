"""What waits for a client that does not read is little, is bounded, and leaves in pieces."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from router.config import RequestLimits
from router.core.effects import Finished, Tokens
from router.core.request import FinishReason, Route, Timings, TokenLogprobs, Usage
from router.edge.generate import Answer, End, Part
from router.edge.text import ModelText, TextStream
from router.port import RequestStream
from tests.router.running import MODEL_DIR

BYTES_MAX = 64 * 1024
END = Finished(
    reason=FinishReason.LENGTH,
    usage=Usage(prompt_tokens=1, cached_prompt_tokens=0, completion_tokens=1),
    timings=Timings(),
    route=Route(),
)


class Reader:
    def __init__(self, tokens_max: int = RequestLimits().stream_tokens_max) -> None:
        self.overran: list[str] = []
        self.stream = RequestStream(
            "r",
            tokens_max=tokens_max,
            cancel=lambda request_id: None,
            stop_matched=lambda request_id, tokens: None,
            overrun=self.overran.append,
        )

    def put_until_overrun(self, event: Tokens) -> int:
        count = 0
        while not self.overran:
            self.stream.put(event)
            count += len(event.token_ids)
        return count


@pytest.fixture(scope="module")
def text() -> ModelText:
    return ModelText(Path(MODEL_DIR))


def test_tokens_that_wait_take_less_than_64_kib_when_the_reader_is_given_up() -> None:
    reader = Reader()
    waiting = reader.put_until_overrun(Tokens((1_000_000,)))
    assert waiting == RequestLimits().stream_tokens_max + 1
    assert sys.getsizeof(reader.stream._token_ids) < BYTES_MAX - 16_384, "what the transport may hold comes on top"


def test_log_probabilities_count_as_tokens_do() -> None:
    reader = Reader(tokens_max=220)
    entry = TokenLogprobs(1, -1.0, tuple((token, -2.0) for token in range(20)))
    assert reader.put_until_overrun(Tokens((1,), (entry,))) == 11


@pytest.mark.asyncio
@pytest.mark.parametrize("logprobs", [None, 0, 20])
async def test_what_piled_up_leaves_in_pieces_and_nothing_of_it_is_lost(text: ModelText, logprobs: int | None) -> None:
    reader = Reader(tokens_max=1_000_000)
    token_ids = tuple(5 + number % 900 for number in range(3_000))
    entries: tuple[TokenLogprobs, ...] = ()
    if logprobs is not None:
        top = tuple((token, -2.0) for token in range(logprobs))
        entries = tuple(TokenLogprobs(token, -1.0, top) for token in token_ids)
    reader.stream.put(Tokens(token_ids, entries))
    reader.stream.put(END)
    parts = [part async for part in Answer(reader.stream, TextStream(text)).parts()]
    said = [part for part in parts if isinstance(part, Part)]
    assert isinstance(parts[-1], End)
    assert sum((part.token_ids for part in said), ()) == token_ids
    assert sum((part.logprobs for part in said), ()) == entries
    assert "".join(part.text for part in said) == text.decode(token_ids)
    assert max(len(part.text.encode()) + 64 * len(part.logprobs) * (1 + (logprobs or 0)) for part in said) < BYTES_MAX
    counts = [part.completion_tokens for part in said]
    assert counts == sorted(counts)
    assert len(said) > 5


@pytest.mark.asyncio
async def test_a_stop_string_is_found_in_what_piled_up(text: ModelText) -> None:
    reader = Reader(tokens_max=1_000_000)
    token_ids = text.encode("abc " * 700 + "END more", special_tokens=False)
    reader.stream.put(Tokens(token_ids))
    reader.stream.put(END)
    parts = [part async for part in Answer(reader.stream, TextStream(text, ("END",))).parts()]
    assert "".join(part.text for part in parts if isinstance(part, Part)) == "abc " * 700
    assert isinstance(parts[-1], End)
    assert parts[-1].stop_match == "END"
