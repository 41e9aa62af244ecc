"""Text streams: joined pieces are the whole answer, no piece ends in half a character, stop strings never leak."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.edge.text import ModelText, StopMatcher, TextStream

MODEL = Path(__file__).parents[2] / "models" / "tandem-nano"

#: Letters of many scripts, combining marks, emoji with modifiers and joiners, right-to-left text and controls.
ALPHABET = "abc \n\té\u0301\u0308ñßЖшקםערबि漢字カナ한글😀👩‍👩‍👧🏽🇩🇪\u200d\u202e\ufeff\0"
texts = st.one_of(st.text(min_size=1, max_size=60), st.text(alphabet=ALPHABET, min_size=1, max_size=60))


@pytest.fixture(scope="module")
def model() -> ModelText:
    return ModelText(MODEL)


def cut(token_ids: tuple[int, ...], sizes: list[int]) -> list[tuple[int, ...]]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(token_ids[at : at + size])
        at += size
    return [*pieces, token_ids[at:]]


@settings(max_examples=1000, deadline=None)
@given(text=texts, sizes=st.lists(st.integers(1, 5), max_size=40))
def test_pieces_joined_are_the_whole_answer(model: ModelText, text: str, sizes: list[int]) -> None:
    token_ids = model.encode(text, special_tokens=False)
    stream = TextStream(model)
    pieces = [stream.feed(piece).text for piece in cut(token_ids, sizes)]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + stream.finish().text == text == model.decode(token_ids)


@settings(max_examples=300, deadline=None)
@given(token_ids=st.lists(st.integers(0, 4095), max_size=60), sizes=st.lists(st.integers(1, 5), max_size=40))
def test_any_tokens_at_all_give_the_same_text_in_pieces(
    model: ModelText, token_ids: list[int], sizes: list[int]
) -> None:
    stream = TextStream(model)
    pieces = [stream.feed(piece).text for piece in cut(tuple(token_ids), sizes)]
    assert "".join(pieces) + stream.finish().text == model.decode(tuple(token_ids))


@settings(max_examples=500, deadline=None)
@given(text=texts, data=st.data())
def test_a_stop_string_at_any_place_ends_the_text_before_it(model: ModelText, text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : data.draw(st.integers(start + 1, len(text)))]
    stream = TextStream(model, (stop,))
    out, matched = [], None
    token_ids = model.encode(text, special_tokens=False)
    for number, token_id in enumerate(token_ids, 1):
        piece = stream.feed((token_id,))
        out.append(piece.text)
        if piece.stop is not None:
            matched = piece.stop
            assert stop in model.decode(token_ids[:number])
            break
    else:
        last = stream.finish()
        out.append(last.text)
        matched = last.stop
    assert matched == stop
    assert "".join(out) == text[: text.index(stop)]


def test_the_stop_that_begins_first_wins_and_of_those_the_longest() -> None:
    assert StopMatcher(("bc", "abc", "ab")).feed("xxabc") == ("xx", "abc")


def test_a_beginning_that_does_not_become_a_stop_is_given_out() -> None:
    matcher = StopMatcher(("END",))
    assert matcher.feed("the EN") == ("the ", None)
    assert matcher.feed("D") == ("", "END")
    matcher = StopMatcher(("END",))
    assert matcher.feed("the EN") == ("the ", None)
    assert matcher.feed("TRY") == ("ENTRY", None)
    assert matcher.feed("E") == ("", None)
    assert matcher.flush() == "E"


def test_special_tokens_are_not_text(model: ModelText) -> None:
    stream = TextStream(model)
    end = model.tokenizer.token_to_id("<|endoftext|>")
    assert stream.feed((*model.encode("x = 1"), end)).text + stream.finish().text == "x = 1"


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        ModelText(tmp_path)
