"""Text in, text out: tokenizing, detokenizing as tokens come, stop strings. The only place that knows text.

Two promises about a stream. Its pieces, joined, are the text of the whole answer, up to the stop string if one
matched. And no piece ends in half a character: bytes that do not make a character yet are held until they do or the
answer ends.
"""

from __future__ import annotations

import json
from codecs import utf_8_decode
from pathlib import Path
from typing import NamedTuple, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel, DecodeStream

#: What the library shows for bytes that make no character, or none yet.
_HALF = "\ufffd"
#: Tokens of the prompt that an answer is decoded after.
_CONTEXT_TOKENS = 6


class ModelText:
    """A model's tokenizer. Encoding releases the GIL, so long prompts belong on a thread."""

    def __init__(self, model_dir: Path) -> None:
        """Raises ValueError when the folder has no readable tokenizer.json."""
        path = model_dir / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every fault
            raise ValueError(f"model_dir: {path} is not a readable tokenizer: {error}") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        #: Where a token stands for the same bytes wherever it is.
        self._token_bytes = TokenBytes(self.tokenizer) if isinstance(self.tokenizer.decoder, ByteLevel) else None
        #: What the model's authors recommend for sampling fields that a client leaves unset.
        self.recommended = _recommended(model_dir / "generation_config.json")

    def encode(self, text: str, *, special_tokens: bool = True) -> tuple[int, ...]:
        # Of a batch only does the library let go of the GIL; "fast" leaves out where in the text each token is.
        (encoded,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=special_tokens)
        return tuple(encoded.ids)

    def decode(self, token_ids: tuple[int, ...]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def spelling(self, prompt: tuple[int, ...] = ()) -> Spelling:
        """For one answer that follows `prompt`."""
        return _Alone(self._token_bytes) if self._token_bytes is not None else _InContext(self, prompt)

    def chat_template(self, model_dir: Path) -> str | None:
        """The model's own Jinja template, if it ships one; of several, the one called default."""
        alone = model_dir / "chat_template.jinja"
        if alone.is_file():
            return alone.read_text(encoding="utf-8")
        config = model_dir / "tokenizer_config.json"
        template = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
        if isinstance(template, list):
            template = next((one.get("template") for one in template if one.get("name") == "default"), None)
        return template if isinstance(template, str) else None


def _recommended(path: Path) -> dict[str, float]:
    """As other servers read the file: numbers of these names, and nothing else of it."""
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = {
        "temperature": "temperature",
        "top_p": "top_p",
        "top_k": "top_k",
        "min_p": "min_p",
        "repetition_penalty": "repetition_penalty",
        "max_new_tokens": "max_tokens",
    }
    return {ours: said[theirs] for theirs, ours in names.items() if isinstance(said.get(theirs), int | float)}


class Piece(NamedTuple):
    text: str
    #: The stop string that ended the answer; feed nothing after it.
    stop: str | None = None
    #: Tokens fed up to and including the one that completed the stop string.
    tokens: int = 0


class StopMatcher:
    """Finds the first of several strings in text that comes in pieces, and gives out nothing of it."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        assert all(stops)
        self._stops = stops
        #: The longest end of what came so far that could begin a stop string.
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """What may be given out, and the stop string once one is complete.

        Of several that match, the one that begins first wins; of those that begin together, the longest.
        """
        text = self._held + text
        matches = [(text.find(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if matches:
            at, _, stop = min(matches)
            self._held = ""
            return text[:at], stop
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


class Spelling(Protocol):
    """Of one answer's tokens, as they come. What makes no whole character yet is held back."""

    def spell(self, token_ids: tuple[int, ...]) -> str: ...

    def rest(self) -> str:
        """At the answer's end: half characters, as the tokenizer shows them."""
        ...


class TokenBytes(dict[int, bytes]):
    """What each token of a byte-level tokenizer stands for, once it was asked for; special ones for nothing. As the
    library has it: characters of the tokenizer's alphabet are a byte each, a token with any other is its own text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {token_id for token_id, one in tokenizer.get_added_tokens_decoder().items() if one.special}

    def __missing__(self, token_id: int) -> bytes:
        token = "" if token_id in self._special else self._tokenizer.id_to_token(token_id) or ""
        try:
            found = bytes(_BYTE_OF[character] for character in token)
        except KeyError:
            found = token.encode()
        self[token_id] = found
        return found


#: Visible characters of Latin-1 are the bytes that they are there, the other bytes are the characters after those.
_VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {
    chr(0x100 + at): byte for at, byte in enumerate(sorted(set(range(0x100)) - set(_VISIBLE)))
}


class _Alone:
    """A tenth of what the library's own stream takes, which spells every token together with those before it."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._held = b""

    def spell(self, token_ids: tuple[int, ...]) -> str:
        data = self._held + b"".join(map(self._token_bytes.__getitem__, token_ids))
        text, used = utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def rest(self) -> str:
        return self._held.decode(errors="replace")


class _InContext:
    """What a token looks like can depend on what is before it: SentencePiece drops the space at the beginning of a
    text. So an answer is decoded as what follows its prompt."""

    def __init__(self, text: ModelText, prompt: tuple[int, ...]) -> None:
        before = list(prompt[-_CONTEXT_TOKENS:])
        shown = text.decode(tuple(before))
        if shown.endswith(_HALF):  # the prompt ends in the middle of a character: what follows begins anew
            before, shown = [], ""
        self._text = text
        self._stream = DecodeStream(before, skip_special_tokens=True)
        #: Every token decoded, and how many characters of their text were seen so far.
        self._token_ids = before
        self._characters = len(shown)

    def spell(self, token_ids: tuple[int, ...]) -> str:
        self._token_ids.extend(token_ids)
        text = self._stream.step(self._text.tokenizer, list(token_ids)) or ""
        self._characters += len(text)
        return text

    def rest(self) -> str:
        return self._text.decode(tuple(self._token_ids))[self._characters :]


class TextStream:
    """One answer's tokens, as the text that follows `prompt`. The first `unmatched_tokens` tokens are not searched for
    stop strings."""

    def __init__(
        self,
        text: ModelText,
        stops: tuple[str, ...] = (),
        *,
        prompt: tuple[int, ...] = (),
        unmatched_tokens: int = 0,
    ) -> None:
        self._spelling = text.spelling(prompt)
        self._matcher = StopMatcher(stops) if stops else None
        self._unmatched_tokens = unmatched_tokens

    def feed(self, token_ids: tuple[int, ...]) -> Piece:
        """With stop strings, tokens are taken one at a time, to know which one completed a match."""
        if self._matcher is None:
            return Piece(self._spelling.spell(token_ids))
        out = []
        for number, token_id in enumerate(token_ids, 1):
            text = self._spelling.spell((token_id,))
            if self._unmatched_tokens:
                self._unmatched_tokens -= 1
                out.append(text)
                continue
            text, stop = self._matcher.feed(text)
            out.append(text)
            if stop is not None:
                return Piece("".join(out), stop, number)
        return Piece("".join(out))

    def finish(self) -> Piece:
        """What was held back: half characters, as the tokenizer shows them, and beginnings of stop strings."""
        rest = self._spelling.rest()
        if self._matcher is None:
            return Piece(rest)
        text, stop = self._matcher.feed(rest)
        return Piece(text, stop) if stop is not None else Piece(text + self._matcher.flush())
