"""Text streams: joined pieces are the whole answer, no piece ends in half a character, stop strings never leak."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from router.edge.text import ModelText, StopMatcher, TextStream, TokenBytes

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


@pytest.mark.asyncio
async def test_others_are_served_while_a_long_prompt_is_tokenized(model: ModelText) -> None:
    long = "the cat sat on the mat and x = 1\n" * 8000
    encoding = asyncio.create_task(asyncio.to_thread(model.encode, long))
    turns = 0
    while not encoding.done():
        await asyncio.sleep(0)
        turns += 1
    assert len(encoding.result()) > 100_000
    assert turns > 100


def test_special_tokens_are_not_text(model: ModelText) -> None:
    stream = TextStream(model)
    end = model.tokenizer.token_to_id("<|endoftext|>")
    assert end is not None
    assert stream.feed((*model.encode("x = 1"), end)).text + stream.finish().text == "x = 1"


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        ModelText(tmp_path)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    """A tokenizer in the manner of Llama 2: spaces are letters, the first of a text is dropped, bytes as a fallback."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ran away from the man"] * 20, trainer)
    folder = tmp_path_factory.mktemp("sentencepiece")
    said = json.loads(tokenizer.to_str())
    said["added_tokens"] = [token for token in said["added_tokens"] if not token["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(said))
    return ModelText(folder)


@settings(max_examples=500, deadline=None)
@given(words=st.lists(st.sampled_from(["the", "cat", " ", " dog", "é", "😀", "漢"]), min_size=1, max_size=12))
def test_an_answer_is_decoded_as_what_follows_its_prompt(sentencepiece: ModelText, words: list[str]) -> None:
    prompt, whole = sentencepiece.encode("the man"), sentencepiece.encode("the man " + "".join(words))
    assume(whole[: len(prompt)] == prompt)
    stream = TextStream(sentencepiece, prompt=prompt)
    pieces = [stream.feed((token_id,)).text for token_id in whole[len(prompt) :]]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "the man" + "".join(pieces) + stream.finish().text == "the man " + "".join(words)


def test_a_prompt_that_ends_in_half_a_character_is_no_context(model: ModelText) -> None:
    face = model.encode("😀", special_tokens=False)
    assert len(face) > 1
    stream = TextStream(model, prompt=face[:1])
    assert stream.feed(model.encode("x = 1")).text + stream.finish().text == "x = 1"


def test_stop_strings_are_found_only_after_the_first_tokens(model: ModelText) -> None:
    token_ids = model.encode("a b a b a b")
    stream = TextStream(model, (" b",), unmatched_tokens=3)
    piece = stream.feed(token_ids)
    assert piece.stop == " b"
    assert piece.text.startswith("a b a")


def test_what_the_model_recommends_is_read_and_nothing_else(tmp_path: Path) -> None:
    shutil.copy(MODEL / "tokenizer.json", tmp_path)
    said = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 99, "top_p": None, "eos_token_id": 3, "min_p": "high"}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert ModelText(tmp_path).recommended == {"temperature": 0.6, "top_k": 20, "max_tokens": 99}


def test_added_tokens_of_any_letters_are_spelled_as_the_library_does() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokenizer.add_tokens(["é", "a b", "\u0120", "漢字"])
    tokenizer.add_special_tokens(["<|漢|>"])
    spelled = TokenBytes(tokenizer)
    for token_id in range(tokenizer.get_vocab_size() + 1):
        assert spelled[token_id].decode(errors="replace") == tokenizer.decode([token_id])
