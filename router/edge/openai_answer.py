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
from router.edge.openai_tools import Called, Use, new_call
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
#: Around a piece of the arguments that an answer consists of.
_BEFORE_ARGUMENTS = b',"delta":{"tool_calls":[{"index":0,"function":{"arguments":'
_AFTER_ARGUMENTS = b"}}]}"


def _reason(end: End, calls: Sequence[Called]) -> str:
    if calls:
        return "tool_calls"
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
    tools: Use
    #: What each prompt's answers begin with: the prompt, where it is to be repeated.
    echoes: Sequence[str]

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

    def echo(self, index: int) -> str:
        return self.echoes[index // self.n] if self.echoes else ""

    def head(self, kind: str) -> bytes:
        """Every object's beginning, without the closing brace."""
        return _encode({"id": self.id, "object": kind, "created": self.created, "model": self.model})[:-1]


def whole_choice(
    call: Call, index: int, said: str, logprobs: Sequence[TokenLogprobs], end: End, text: ModelText
) -> dict[str, object]:
    """One choice of a call that is not streamed."""
    reader = call.tools.reader()
    shown = call.echo(index) + reader.feed(said)
    rest, calls = reader.finish()
    content: dict[str, object] = {"text": shown + rest}
    reason = _reason(end, calls)
    if call.form.chat:
        if call.tools.named:
            shown, calls = "", [new_call(call.tools.named, said)]
        message: dict[str, object] = {"role": "assistant", "content": shown + rest, "refusal": None}
        if calls:
            message |= {"content": shown or None, "tool_calls": [called.as_said() for called in calls]}
        content = {"message": message}
    written = LogprobWriter(text, call.form).write(logprobs) if call.logprobs else None
    return {"index": index, **content, "logprobs": written, "finish_reason": reason}


class Choice:
    """Writes one choice of a streamed call."""

    def __init__(self, call: Call, index: int, text: ModelText) -> None:
        form = call.form
        self._call = call
        self._reader = call.tools.reader()
        self._before = b"data: " + call.head(form.chunk) + b',"choices":[{"index":%d' % index
        named = call.tools.named
        self._before_text = self._before + (_BEFORE_ARGUMENTS if named else form.before_text)
        self._after_text = _AFTER_ARGUMENTS if named else form.after_text
        self._prompt_tokens = len(call.accepted[index].request.prompt)
        self._logprobs = LogprobWriter(text, form) if call.logprobs else None
        self._none = b',"logprobs":null,"finish_reason":null}]'
        #: Goes before the first chunk: in a conversation who speaks, and the function whose arguments follow.
        self._opening = self._chunk(b',"delta":{"role":"assistant","content":""}') if form.chat else b""
        if named:
            self._opening += self._calls([new_call(named, "")])
        if echo := call.echo(index):
            self._opening += self._text(echo, self._none, 0)

    def part(self, part: Part) -> bytes:
        """Empty when there is nothing to say yet."""
        text = self._reader.feed(part.text)
        if not text and not (self._logprobs and part.logprobs):
            return b""
        rest = self._none
        if self._logprobs is not None and part.logprobs:
            rest = b',"logprobs":' + _encode(self._logprobs.write(part.logprobs)) + b',"finish_reason":null}]'
        return self._take_opening() + self._text(text, rest, part.completion_tokens)

    def end(self, end: End) -> bytes:
        completion_tokens = end.finished.usage.completion_tokens
        text, calls = self._reader.finish()
        before = self._take_opening()
        if text:
            before += self._text(text, self._none, completion_tokens)
        if calls:
            before += self._calls(calls)
        rest = b',"logprobs":null,"finish_reason":"%s"}]' % _reason(end, calls).encode()
        return b"".join((before, self._before, self._call.form.last, rest, self._usage(completion_tokens), b"}\n\n"))

    def _text(self, text: str, rest: bytes, completion_tokens: int) -> bytes:
        usage = self._usage(completion_tokens)
        return b"".join((self._before_text, _encode(text), self._after_text, rest, usage, b"}\n\n"))

    def _calls(self, calls: Sequence[Called]) -> bytes:
        said = [{"index": at, **called.as_said()} for at, called in enumerate(calls)]
        return self._chunk(b',"delta":{"tool_calls":' + _encode(said) + b"}")

    def _chunk(self, middle: bytes) -> bytes:
        return b"".join((self._before, middle, self._none, self._usage(0), b"}\n\n"))

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
