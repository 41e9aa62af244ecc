"""OpenAI's protocol over HTTP, with the extensions that vLLM's clients use. No policy here: JSON to `generate`'s
values and back.

What is asked for and not supported is refused by name; what is unknown, or cannot change the answer, is ignored.
Chunks of a stream are bytes put together around each text: nothing else is encoded twice.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, Struct
from starlette.types import Receive, Send
from starlette.types import Scope as HttpScope

from router.config import HttpLimits, RequestLimits
from router.core.errors import Internal, Invalid, NotFound, OutOfRange, TandemError, Unavailable
from router.core.request import FinishReason, TokenLogprobs, Usage
from router.edge.admit import Asked
from router.edge.chat import ChatTemplate, Said
from router.edge.errors import MethodNotAllowed
from router.edge.generate import Accepted, Answer, End, Generator, Part, Wanted
from router.edge.http_server import ClientGone, Exchange
from router.edge.identity import Authenticator, Presented, Scope, presented
from router.edge.text import ModelText
from router.port import ModelView

T = TypeVar("T")

_encode = msgspec.json.encode
_log = logging.getLogger(__name__)

TIMEOUT_HEADER = "x-tandem-timeout-s"
_METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
_SEED_MAX = 2**63 - 1


# What clients send.

Int = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class _StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Body(Struct, kw_only=True):
    model: str | None = None
    max_tokens: Int | None = None
    min_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    n: Int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class _CompletionBody(_Body, kw_only=True):
    prompt: str | list[str | TokenId | list[TokenId]]
    logprobs: Int | None = None
    add_special_tokens: bool = True


class _Content(Struct):
    type: str
    text: str | None = None


class _Message(Struct):
    role: str
    content: str | list[_Content] | None = None
    tool_calls: list[object] | None = None
    function_call: object = None
    audio: object = None


class _ChatBody(_Body, kw_only=True):
    messages: list[_Message]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    add_generation_prompt: bool = True


class _TokenizeBody(Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[_Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class _DetokenizeBody(Struct, kw_only=True):
    model: str | None = None
    tokens: list[TokenId]


#: Fields that would change the answer if they were supported, each with the values that ask for nothing.
_NOTHING: tuple[object, ...] = (None, [], {}, "", False)
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(
        (
            "allowed_token_ids",
            "audio",
            "bad_words",
            "chat_template",
            "chat_template_kwargs",
            "continue_final_message",
            "documents",
            "echo",
            "functions",
            "guided_choice",
            "guided_grammar",
            "guided_json",
            "guided_regex",
            "include_stop_str_in_output",
            "logit_bias",
            "logits_processors",
            "prompt_embeds",
            "prompt_logprobs",
            "return_token_ids",
            "return_tokens_as_token_ids",
            "structured_outputs",
            "suffix",
            "tools",
            "truncate_prompt_tokens",
            "use_beam_search",
            "web_search_options",
        ),
        _NOTHING,
    ),
    "best_of": (None, 1),
    "function_call": (None, "none"),
    "modalities": (None, [], ["text"]),
    "response_format": (None, {"type": "text"}),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "tool_choice": (None, "none", "auto"),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

B = TypeVar("B", _CompletionBody, _ChatBody, _TokenizeBody, _DetokenizeBody)
#: " - at `$.messages[0].role`", and "missing required field `prompt`", as msgspec says them.
_AT = re.compile(r" - at `(?:\$\.?)?([^`]*)`$")
_MISSING = re.compile(r"missing required field `([^`]*)`")


def _parse(kind: type[B], data: bytes) -> B:
    """Raises Invalid that names the field."""
    try:
        said = msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:
        raise Invalid("body", f"is not JSON: {error}") from None
    if isinstance(said, dict):
        for name in said.keys() & _UNSUPPORTED.keys():
            if said[name] not in _UNSUPPORTED[name]:
                raise Invalid(name, "is not supported")
    try:
        return msgspec.convert(said, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        at, missing = _AT.search(text), _MISSING.search(text)
        path = at[1] if at else ""
        field = ".".join(filter(None, (path, missing[1]))) if missing else path
        raise Invalid(field or "body", _AT.sub("", text)) from None


def _asked(body: _Body, *, max_tokens: int | None, logprobs: int | None) -> Asked:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Asked(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=0 if body.top_k == -1 else body.top_k,  # vLLM's word for all
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        seed=body.seed,
        stop=stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
    )


def _prompts(prompt: str | list[str | int | list[int]]) -> list[tuple[str, str | tuple[int, ...]]]:
    """Each with the name it goes by: a text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [("prompt", prompt)]
    if not prompt:
        raise Invalid("prompt", "the prompt is empty")
    if all(isinstance(item, int) for item in prompt):
        return [("prompt", tuple(prompt))]  # type: ignore[arg-type]
    if all(isinstance(item, str) for item in prompt) or all(isinstance(item, list) for item in prompt):
        return [
            (f"prompt[{at}]", item if isinstance(item, str) else tuple(item))  # type: ignore[arg-type]
            for at, item in enumerate(prompt)
        ]
    raise Invalid("prompt", "must be a text, token ids, or a list of one kind of them")


def _said(messages: Sequence[_Message]) -> list[Said]:
    if not messages:
        raise Invalid("messages", "are empty")
    return [_one_said(f"messages[{at}]", message) for at, message in enumerate(messages)]


def _one_said(field: str, message: _Message) -> Said:
    if message.role not in _ROLES:
        raise Invalid(f"{field}.role", f"{message.role!r} is not supported; must be one of {', '.join(_ROLES)}")
    for name in ("tool_calls", "function_call", "audio"):
        if getattr(message, name):
            raise Invalid(f"{field}.{name}", "is not supported")
    content = message.content
    if content is None:
        raise Invalid(f"{field}.content", "is missing")
    if isinstance(content, str):
        return Said(_ROLES[message.role], content)
    for at, part in enumerate(content):
        if part.type != "text":
            raise Invalid(f"{field}.content[{at}].type", f"{part.type!r} is not supported; must be 'text'")
        if part.text is None:
            raise Invalid(f"{field}.content[{at}].text", "is missing")
    return Said(_ROLES[message.role], "\n".join(part.text or "" for part in content))


# What clients are told.


class _Form(NamedTuple):
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


_COMPLETION = _Form(False, "cmpl-", "text_completion", "text_completion", b',"text":', b"", b',"text":""')
_CHAT = _Form(
    True, "chatcmpl-", "chat.completion", "chat.completion.chunk", b',"delta":{"content":', b"}", b',"delta":{}'
)


def _reason(end: End) -> str:
    return FinishReason.STOP.value if end.stop_match else end.finished.reason.value


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
    }


class _LogprobWriter:
    """The log probabilities of one choice, in the form of either protocol."""

    def __init__(self, text: ModelText, form: _Form) -> None:
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
class _Call:
    """One accepted call: what to submit, and how to say what comes."""

    form: _Form
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


class _Choice:
    """Writes one choice of a streamed call."""

    def __init__(self, call: _Call, index: int, text: ModelText) -> None:
        form = call.form
        self._call = call
        self._before = b"data: " + call.head(form.chunk) + b',"choices":[{"index":%d' % index
        self._before_text = self._before + form.before_text
        self._prompt_tokens = len(call.accepted[index].request.prompt)
        self._logprobs = _LogprobWriter(text, form) if call.logprobs else None
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
        rest = b',"logprobs":null,"finish_reason":"%s"}]' % _reason(end).encode()
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
            return b',"usage":' + _encode(_usage(so_far))
        return b',"usage":null' if self._call.include_usage else b""


# The edge.

Handler = Callable[[Exchange], Awaitable[None]]


class OpenAIEdge:
    """An ASGI app."""

    def __init__(
        self,
        generator: Generator,
        authenticator: Authenticator,
        templates: dict[str, ChatTemplate],
        *,
        requests: RequestLimits,
        http: HttpLimits,
        version: str,
        metrics: Callable[[], bytes],
    ) -> None:
        """`metrics` is called on a thread."""
        self._generator = generator
        self._authenticator = authenticator
        self._templates = templates
        self._requests = requests
        self._http = http
        self._version = version
        self._metrics = metrics
        self._began = int(time.time())
        self._routes: dict[str, dict[str, Handler]] = {
            "/v1/completions": {"POST": self._completions},
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/models": {"GET": self._models},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
            "/health": {"GET": self._health},
            "/ping": {"GET": self._ping},
            "/version": {"GET": self._say_version},
            "/metrics": {"GET": self._say_metrics},
        }

    async def __call__(self, scope: HttpScope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            await self._handler(exchange)(exchange)
        except ClientGone:
            pass
        except TandemError as error:
            await exchange.fail(error)
        except Exception:
            _log.exception("internal error")
            await exchange.fail(Internal("internal error; the server's log has the details"))

    def _handler(self, exchange: Exchange) -> Handler:
        methods = self._routes.get(exchange.path)
        if methods is None and exchange.path.startswith("/v1/models/"):
            methods = {"GET": self._model}
        if methods is None:
            raise NotFound("path", exchange.path, f"there is no {exchange.path} here")
        method = "GET" if exchange.method == "HEAD" else exchange.method
        if method not in methods:
            raise MethodNotAllowed(f"{exchange.path} takes {', '.join(methods)}, not {exchange.method}")
        return methods[method]

    # Generating.

    async def _completions(self, exchange: Exchange) -> None:
        arrival = self._generator.now()
        body = _parse(_CompletionBody, await self._body(exchange))
        asked = _asked(body, max_tokens=body.max_tokens, logprobs=body.logprobs)
        wanted = [
            Wanted(
                model=body.model or "",
                prompt=prompt,
                prompt_field=field,
                asked=asked,
                timeout_s=_timeout_s(exchange),
                presented=_presented(exchange),
                special_tokens=body.add_special_tokens,
            )
            for field, prompt in _prompts(body.prompt)
        ]
        call = await self._call(exchange, _COMPLETION, body, wanted, arrival)
        await self._answer(exchange, call, stream=bool(body.stream))

    async def _chat(self, exchange: Exchange) -> None:
        arrival = self._generator.now()
        body = _parse(_ChatBody, await self._body(exchange))
        if body.top_logprobs is not None and not body.logprobs:
            raise Invalid("top_logprobs", "needs logprobs to be true")
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        prompt, special_tokens = await self._conversation(body.model or "", body.messages, body.add_generation_prompt)
        wanted = Wanted(
            model=body.model or "",
            prompt=prompt,
            prompt_field="messages",
            asked=_asked(body, max_tokens=max_tokens, logprobs=(body.top_logprobs or 0) if body.logprobs else None),
            timeout_s=_timeout_s(exchange),
            presented=_presented(exchange),
            special_tokens=special_tokens,
        )
        call = await self._call(exchange, _CHAT, body, [wanted], arrival)
        await self._answer(exchange, call, stream=bool(body.stream))

    async def _conversation(self, model: str, messages: Sequence[_Message], ask: bool) -> tuple[str, bool]:
        """The prompt's text, and whether the tokenizer is to add its special tokens."""
        template = self._templates[self._generator.model(model)]
        said = _said(messages)
        characters = sum(len(one.content) for one in said) + 100 * len(said)
        text = await self._generator.work(characters, lambda: template.render(said, ask=ask))
        return text, not template.adds_special_tokens

    async def _call(self, exchange: Exchange, form: _Form, body: _Body, wanted: list[Wanted], arrival: float) -> _Call:
        n = 1 if body.n is None else body.n
        if not 1 <= n <= self._requests.answers_max:
            raise Invalid("n", f"must be from 1 to {self._requests.answers_max}, is {n}")
        if n * len(wanted) > self._requests.answers_max:
            limit = self._requests.answers_max
            raise Invalid("prompt", f"{len(wanted)} prompts times n = {n} is more than {limit} answers")
        call_id = form.id_prefix + exchange.own_id
        accepted: list[Accepted] = []
        for one in wanted:
            first = await self._generator.accept(one, arrival)
            index = len(accepted)
            accepted += [_sibling(first, number, f"{call_id}-{index + number}") for number in range(n)]
        options = body.stream_options or _StreamOptions()
        return _Call(
            form=form,
            id=call_id,
            created=int(time.time()),
            accepted=accepted,
            n=n,
            logprobs=wanted[0].asked.logprobs is not None,
            include_usage=bool(options.include_usage),
            continuous_usage=bool(options.continuous_usage_stats),
        )

    async def _answer(self, exchange: Exchange, call: _Call, *, stream: bool) -> None:
        async with self._submitted(exchange, call) as answers:
            if stream:
                await self._stream(exchange, call, answers)
            else:
                await exchange.reply(await self._whole(call, answers))

    @asynccontextmanager
    async def _submitted(self, exchange: Exchange, call: _Call) -> AsyncIterator[list[Answer]]:
        """Closed at the end, and when the client leaves before."""
        answers: list[Answer] = []

        async def watch() -> None:
            await exchange.gone()
            for answer in answers:
                answer.close()

        watching = asyncio.create_task(watch())
        try:
            for accepted in call.accepted:
                answers.append(self._generator.submit(accepted))
            yield answers
        finally:
            watching.cancel()
            for answer in answers:
                answer.close()

    async def _stream(self, exchange: Exchange, call: _Call, answers: list[Answer]) -> None:
        text = self._generator.text(call.model)

        async def one(index: int, answer: Answer) -> End:
            choice = _Choice(call, index, text)
            async for part in answer.parts():
                if isinstance(part, End):
                    await exchange.event(choice.end(part))
                    return part
                if chunk := choice.part(part):
                    await exchange.event(chunk)
            raise AssertionError("an answer ended without its End")

        ends = await _together([one(index, answer) for index, answer in enumerate(answers)])
        if call.include_usage:
            usage = _encode(_usage(call.usage(ends)))
            await exchange.event(b"data: " + call.head(call.form.chunk) + b',"choices":[],"usage":' + usage + b"}\n\n")
        await exchange.done()

    async def _whole(self, call: _Call, answers: list[Answer]) -> bytes:
        text = self._generator.text(call.model)

        async def one(index: int, answer: Answer) -> tuple[dict[str, object], End]:
            pieces: list[str] = []
            logprobs: list[TokenLogprobs] = []
            async for part in answer.parts():
                if isinstance(part, Part):
                    pieces.append(part.text)
                    logprobs += part.logprobs
                else:
                    said = "".join(pieces)
                    content: dict[str, object] = {"text": said}
                    if call.form.chat:
                        content = {"message": {"role": "assistant", "content": said, "refusal": None}}
                    written = _LogprobWriter(text, call.form).write(logprobs) if call.logprobs else None
                    return {"index": index, **content, "logprobs": written, "finish_reason": _reason(part)}, part
            raise AssertionError("an answer ended without its End")

        found = await _together([one(index, answer) for index, answer in enumerate(answers)])
        rest = {"choices": [choice for choice, _ in found], "usage": _usage(call.usage([end for _, end in found]))}
        return call.head(call.form.whole) + b"," + _encode(rest)[1:]

    # The others.

    async def _models(self, exchange: Exchange) -> None:
        views = await self._generator.models_for(_presented(exchange))
        data = [self._model_card(view) for view in views]
        await exchange.reply(_encode({"object": "list", "data": data}))

    async def _model(self, exchange: Exchange) -> None:
        name = self._generator.model(exchange.path.removeprefix("/v1/models/"))
        for view in await self._generator.models_for(_presented(exchange)):
            if view.name == name:
                return await exchange.reply(_encode(self._model_card(view)))
        raise NotFound("model", name, f"model {name!r} is not served to this caller")

    def _model_card(self, view: ModelView) -> dict[str, object]:
        return {
            "id": view.name,
            "object": "model",
            "created": self._began,
            "owned_by": "tandem",
            "max_model_len": view.facts.max_model_len if view.facts else None,
        }

    async def _tokenize(self, exchange: Exchange) -> None:
        await self._generator.models_for(_presented(exchange))  # asks who it is
        body = _parse(_TokenizeBody, await self._body(exchange))
        model = self._generator.model(body.model or "")
        if (body.prompt is None) == (body.messages is None):
            raise Invalid("prompt", "either prompt or messages must be given")
        if body.messages is not None:
            text, special_tokens = await self._conversation(model, body.messages, body.add_generation_prompt)
            field = "messages"
        else:
            text, special_tokens, field = body.prompt or "", True, "prompt"
        if body.add_special_tokens is not None:
            special_tokens = body.add_special_tokens
        tokens = await self._generator.tokens(model, field, text, special_tokens=special_tokens)
        tokenizer = self._generator.text(model).tokenizer
        strs = [tokenizer.id_to_token(token_id) for token_id in tokens] if body.return_token_strs else None
        max_model_len = self._generator.facts(model).max_model_len
        said = {"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens, "token_strs": strs}
        await exchange.reply(_encode(said))

    async def _detokenize(self, exchange: Exchange) -> None:
        await self._generator.models_for(_presented(exchange))  # asks who it is
        body = _parse(_DetokenizeBody, await self._body(exchange))
        model = self._generator.model(body.model or "")
        tokenizer = self._generator.text(model).tokenizer
        size = tokenizer.get_vocab_size()
        if (at := next((at for at, token_id in enumerate(body.tokens) if token_id >= size), None)) is not None:
            raise OutOfRange(
                f"tokens[{at}]", f"token {body.tokens[at]} is outside the tokenizer's {size}", limit=str(size)
            )
        # A token is a few characters.
        decode = tokenizer.decode
        text = await self._generator.work(4 * len(body.tokens), lambda: decode(body.tokens, skip_special_tokens=False))
        await exchange.reply(_encode({"prompt": text}))

    async def _health(self, exchange: Exchange) -> None:
        """Whether a request could be served, as gRPC's health says it."""
        if not any(view.ready for view in self._generator.models()):
            raise Unavailable("NOT_READY", "no model can be served now", retry_after_s=1.0)
        await exchange.reply(b"{}")

    async def _ping(self, exchange: Exchange) -> None:
        """Whether the process lives."""
        await exchange.reply(b"{}")

    async def _say_version(self, exchange: Exchange) -> None:
        await exchange.reply(_encode({"version": self._version}))

    async def _say_metrics(self, exchange: Exchange) -> None:
        await self._authenticator.identify(_presented(exchange), Scope.ADMIN)
        await exchange.reply(await asyncio.to_thread(self._metrics), kind=_METRICS_TYPE)

    async def _body(self, exchange: Exchange) -> bytes:
        return await exchange.body(self._requests.message_bytes_max, self._http.read_timeout_s)


def _sibling(accepted: Accepted, number: int, request_id: str) -> Accepted:
    """One of a prompt's `n`: alike, but for its id, and for its seed, or all would say the same."""
    request = accepted.request
    sampling = request.sampling
    if sampling.seed is not None and number:
        sampling = replace(sampling, seed=(sampling.seed + number) % (_SEED_MAX + 1))
    return Accepted(replace(request, request_id=request_id, sampling=sampling), accepted.stops)


def _timeout_s(exchange: Exchange) -> float | None:
    """OpenAI's protocol has no word for a deadline; this header is ours."""
    said = exchange.header(TIMEOUT_HEADER)
    if not said:
        return None
    try:
        timeout_s = float(said)
    except ValueError:
        raise Invalid(TIMEOUT_HEADER, f"must be a number of seconds, is {said!r}") from None
    if not math.isfinite(timeout_s):
        raise Invalid(TIMEOUT_HEADER, f"must be a number of seconds, is {said!r}")
    return timeout_s


def _presented(exchange: Exchange) -> Presented:
    return presented(exchange.headers)


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All of it at once; the first that fails ends the others."""
    if len(work) == 1:
        return [await work[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
