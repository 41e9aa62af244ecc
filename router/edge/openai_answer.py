"""What clients of OpenAI's protocol are told: answers, whole or in chunks.

Chunks of a stream are bytes put together around each text: nothing else is encoded twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from router.core.request import FinishReason, TokenLogprobs, Usage
from router.edge.generate import Accepted, End, Part
from router.edge.text import ModelText

_encode = msgspec.json.encode


class Form(NamedTuple):
    """What tells chat from completions, on the way out."""

    chat: bool
    id_prefix: str
    whole: str
    chunk: str
    #: Around a chunk's text, after its index.
    before_text: bytes
    after_text: bytes
    #: The choice's part of the last chunk.
    last: bytes


COMPLETION = Form(False, "cmpl-", "text_completion", "text_completion", b',"text":', b"", b',"text":""')
CHAT = Form(
    True, "chatcmpl-", "chat.completion", "chat.completion.chunk", b',"delta":{"content":', b"}", b',"delta":{}'
)


def finish_reason(end: End) -> str:
    return FinishReason.STOP.value if end.stop_match else end.finished.reason.value


def usage_of(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
    }


class LogprobWriter:
    """The log probabilities of one choice, in the form of either protocol."""

    def __init__(self, text: ModelText, form: Form) -> None:
        self._text = text
        self._form = form
        #: Characters of the tokens so far.
        self._offset = 0

    def write(self, entries: Iterable[TokenLogprobs]) -> dict[str, object]:
        return {"content": [self._chat(entry) for entry in entries]} if self._form.chat else self._completion(entries)

    def _token(self, token_id: int) -> str:
        return self._text.tokenizer.decode([token_id], skip_special_tokens=False)

    def _chat(self, entry: TokenLogprobs) -> dict[str, object]:
        top = [self._chat_token(*pair) for pair in entry.top]
        return {**self._chat_token(entry.token_id, entry.logprob), "top_logprobs": top}

    def _chat_token(self, token_id: int, logprob: float) -> dict[str, object]:
        token = self._token(token_id)
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    def _completion(self, entries: Iterable[TokenLogprobs]) -> dict[str, object]:
        tokens: list[str] = []
        logprobs: list[float] = []
        tops: list[dict[str, float]] = []
        offsets: list[int] = []
        for entry in entries:
            token = self._token(entry.token_id)
            top = {self._token(token_id): logprob for token_id, logprob in entry.top}
            tokens.append(token)
            logprobs.append(entry.logprob)
            tops.append({**top, token: entry.logprob})
            offsets.append(self._offset)
            self._offset += len(token)
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One accepted call: what to submit, and how to say what comes."""

    form: Form
    id: str
    created: int
    accepted: list[Accepted]
    #: Answers to each prompt; `accepted` has all of the first prompt, then all of the second.
    n: int
    logprobs: bool
    include_usage: bool
    continuous_usage: bool

    @property
    def model(self) -> str:
        return self.accepted[0].request.model

    def usage(self, ends: Sequence[End]) -> Usage:
        """A prompt counts once, however many answers it has."""
        usages = [end.finished.usage for end in ends]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in usages[:: self.n]),
            cached_prompt_tokens=sum(usage.cached_prompt_tokens for usage in usages[:: self.n]),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
        )

    def head(self, kind: str) -> bytes:
        """Every object's beginning, without the closing brace."""
        return _encode({"id": self.id, "object": kind, "created": self.created, "model": self.model})[:-1]


class Choice:
    """Writes one choice of a streamed call."""

    def __init__(self, call: Call, index: int, text: ModelText) -> None:
        form = call.form
        self._call = call
        self._before = b"data: " + call.head(form.chunk) + b',"choices":[{"index":%d' % index
        self._before_text = self._before + form.before_text
        self._prompt_tokens = len(call.accepted[index].request.prompt)
        self._logprobs = LogprobWriter(text, form) if call.logprobs else None
        self._none = b',"logprobs":null,"finish_reason":null}]'
        #: Of a choice's first chunk in a conversation: who speaks.
        self._opening = self._chunk(b',"delta":{"role":"assistant","content":""}', 0) if form.chat else b""

    def part(self, part: Part) -> bytes:
        """Empty when there is nothing to say yet."""
        if not part.text and not (self._logprobs and part.logprobs):
            return b""
        rest = self._none
        if self._logprobs is not None and part.logprobs:
            rest = b',"logprobs":' + _encode(self._logprobs.write(part.logprobs)) + b',"finish_reason":null}]'
        chunk = b"".join(
            (
                self._take_opening(),
                self._before_text,
                _encode(part.text),
                self._call.form.after_text,
                rest,
                self._usage(part.completion_tokens),
                b"}\n\n",
            )
        )
        return chunk

    def end(self, end: End) -> bytes:
        rest = b',"logprobs":null,"finish_reason":"%s"}]' % finish_reason(end).encode()
        usage = self._usage(end.finished.usage.completion_tokens)
        return b"".join((self._take_opening(), self._before, self._call.form.last, rest, usage, b"}\n\n"))

    def _chunk(self, middle: bytes, completion_tokens: int) -> bytes:
        return b"".join((self._before, middle, self._none, self._usage(completion_tokens), b"}\n\n"))

    def _take_opening(self) -> bytes:
        opening, self._opening = self._opening, b""
        return opening

    def _usage(self, completion_tokens: int) -> bytes:
        if self._call.continuous_usage:
            so_far = Usage(
                prompt_tokens=self._prompt_tokens, cached_prompt_tokens=0, completion_tokens=completion_tokens
            )
            return b',"usage":' + _encode(usage_of(so_far))
        return b',"usage":null' if self._call.include_usage else b""
