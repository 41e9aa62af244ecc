"""OpenAI's protocol over HTTP, with the extensions that vLLM's clients use. No policy here: `openai_body` brings JSON
to `generate`'s values, `openai_answer` brings those back, and this module says which path does what.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Send
from starlette.types import Scope as HttpScope

from router.config import HttpLimits, RequestLimits
from router.core.errors import Internal, Invalid, NotFound, OutOfRange, TandemError, Unavailable
from router.core.rate import RateLeft
from router.core.request import TokenLogprobs
from router.edge.chat import ChatTemplate
from router.edge.errors import BodyTooLarge, MethodNotAllowed
from router.edge.generate import Accepted, Answer, End, Generator, Part, Wanted
from router.edge.http_server import ClientGone, Exchange, is_visible
from router.edge.identity import Authenticator, Presented, Scope, presented
from router.edge.openai_answer import CHAT, COMPLETION, Call, Choice, Form, usage_of, whole_choice
from router.edge.openai_body import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Formed,
    StreamOptions,
    TokenizeBody,
    asked,
    form,
    parse,
    prompts,
    said_in,
)
from router.edge.openai_tools import NO_TOOLS, Use, use
from router.edge.openapi import document
from router.port import ModelView

T = TypeVar("T")

_encode = msgspec.json.encode
_log = logging.getLogger(__name__)

TIMEOUT_HEADER = "x-tandem-timeout-s"
#: What a body may have for each token of the model's context, and beside. It is parsed while everybody waits: a text in
#: no time, what was made to be slow in 20 ms for each megabyte.
_BODY_BYTES_PER_TOKEN = 32
_BODY_BYTES_BESIDE = 1 << 20
_METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


#: The origin of a page that this machine serves to itself.
_LOCAL_PAGE = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?")

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
        self._openapi = _encode(document(version, requests, templates))
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
            "/openapi.json": {"GET": self._say_openapi},
            "/metrics": {"GET": self._say_metrics},
        }

    async def __call__(self, scope: HttpScope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        exchange.also += self._shared(exchange.header("origin"))
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
        path = exchange.path.rstrip("/")
        methods = self._routes.get(path)
        if methods is None and path.startswith("/v1/models/"):
            methods = {"GET": self._model}
        if methods is None:
            raise NotFound("path", exchange.path, f"there is no {exchange.path} here")
        method = "GET" if exchange.method == "HEAD" else exchange.method
        if method == "OPTIONS":
            return partial(_options, allowed=_allowed(methods))
        if method not in methods:
            raise MethodNotAllowed(path, exchange.method, _allowed(methods))
        return methods[method]

    def _shared(self, origin: str) -> Iterator[tuple[bytes, bytes]]:
        """What lets a page in a browser read the answer, if it is one of this machine's or an origin that is named."""
        if not origin:
            return
        yield b"vary", b"origin"
        allowed = self._http.origins
        if "*" in allowed or origin in allowed or _LOCAL_PAGE.fullmatch(origin):
            yield b"access-control-allow-origin", b"*" if "*" in allowed else origin.encode()
            yield b"access-control-expose-headers", b"*"

    # Generating.

    async def _completions(self, exchange: Exchange) -> None:
        arrival = self._generator.now()
        who = _presented(exchange)
        caller = await self._authenticator.caller(who)  # before anything is done for whoever it is
        body = parse(CompletionBody, await self._body(exchange))
        if body.echo and body.logprobs is not None:
            raise Invalid("echo", "is not supported together with logprobs: a prompt's are not computed")
        formed = form(body)
        structure = formed.structure if formed else None
        wishes = asked(body, max_tokens=body.max_tokens, logprobs=body.logprobs, structure=structure)
        wanted = [
            Wanted(
                model=body.model or "",
                prompt=prompt,
                prompt_field=field,
                asked=wishes,
                timeout_s=_timeout_s(exchange),
                presented=who,
                caller=caller,
                special_tokens=body.add_special_tokens,
            )
            for field, prompt in prompts(body.prompt)
        ]
        with _named(formed.field if formed else ""):
            call = await self._call(exchange, COMPLETION, body, wanted, arrival)
            if body.echo:
                call = replace(call, echoes=[await self._repeated(one, call.model) for one in wanted])
            await self._answer(exchange, call, stream=bool(body.stream))

    async def _repeated(self, wanted: Wanted, model: str) -> str:
        prompt = wanted.prompt
        if isinstance(prompt, str):
            return prompt
        return await self._generator.work(4 * len(prompt), lambda: self._generator.text(model).decode(prompt))

    async def _chat(self, exchange: Exchange) -> None:
        arrival = self._generator.now()
        who = _presented(exchange)
        caller = await self._authenticator.caller(who)  # before anything is done for whoever it is
        body = parse(ChatBody, await self._body(exchange))
        if body.top_logprobs is not None and not body.logprobs:
            raise Invalid("top_logprobs", "needs logprobs to be true")
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        formed = form(body)
        several = body.parallel_tool_calls is not False
        tools = use(body.tools, body.tool_choice, self._template(body.model), several=several)
        if tools.structure is not None:
            if formed is not None:
                raise Invalid("tool_choice", f"cannot be had together with {formed.field}")
            formed = Formed("tool_choice", tools.structure)
        prompt, special_tokens = await self._conversation(body.model, body, tools)
        wanted = Wanted(
            model=body.model or "",
            prompt=prompt,
            prompt_field="messages",
            asked=asked(
                body,
                max_tokens=max_tokens,
                logprobs=(body.top_logprobs or 0) if body.logprobs else None,
                structure=formed.structure if formed else None,
            ),
            timeout_s=_timeout_s(exchange),
            presented=who,
            caller=caller,
            special_tokens=special_tokens,
        )
        with _named(formed.field if formed else ""):
            call = await self._call(exchange, CHAT, body, [wanted], arrival)
            await self._answer(exchange, replace(call, tools=tools), stream=bool(body.stream))

    def _template(self, model: str | None) -> ChatTemplate:
        return self._templates[self._generator.model(model or "")]

    async def _conversation(
        self, model: str | None, body: ChatBody | TokenizeBody, tools: Use = NO_TOOLS
    ) -> tuple[str, bool]:
        """The prompt's text, and whether the tokenizer is to add its special tokens."""
        template = self._template(model)
        said = said_in(body.messages or ())
        characters = sum(len(one.content) for one in said) + 100 * len(said)
        ask = body.add_generation_prompt
        text = await self._generator.work(characters, lambda: template.render(said, ask=ask, tools=tools.shown))
        return text, not template.adds_special_tokens

    async def _call(self, exchange: Exchange, form: Form, body: Body, wanted: list[Wanted], arrival: float) -> Call:
        n = 1 if body.n is None else body.n
        if not 1 <= n <= self._requests.answers_max:
            raise Invalid("n", f"must be from 1 to {self._requests.answers_max}, is {n}")
        if n * len(wanted) > self._requests.answers_max:
            limit = self._requests.answers_max
            raise Invalid("prompt", f"{len(wanted)} prompts times n = {n} is more than {limit} answers")
        call_id = form.id_prefix + exchange.own_id
        if exchange.request_id == exchange.own_id:
            exchange.request_id = call_id  # the header's, so that it names the request for `tandem why`
        accepted: list[Accepted] = []
        for one in wanted:
            first = await self._generator.accept(one, arrival)
            index = len(accepted)
            ids = [f"{call_id}-{number}" if number else call_id for number in range(index, index + n)]
            accepted += [first.sibling(number, one_id) for number, one_id in enumerate(ids)]
        options = body.stream_options or StreamOptions()
        return Call(
            form=form,
            id=call_id,
            created=int(time.time()),
            accepted=accepted,
            n=n,
            logprobs=wanted[0].asked.logprobs is not None,
            include_usage=bool(options.include_usage),
            continuous_usage=bool(options.continuous_usage_stats),
            tools=NO_TOOLS,
            echoes=(),
        )

    async def _answer(self, exchange: Exchange, call: Call, *, stream: bool) -> None:
        async with self._submitted(exchange, call) as answers:
            if stream:
                await self._stream(exchange, call, answers)
            else:
                await exchange.reply(await self._whole(call, answers))

    @asynccontextmanager
    async def _submitted(self, exchange: Exchange, call: Call) -> AsyncIterator[list[Answer]]:
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
            exchange.also += _rate_headers(await self._generator.rates(call.accepted[0]))
            yield answers
        finally:
            watching.cancel()
            for answer in answers:
                answer.close()

    async def _stream(self, exchange: Exchange, call: Call, answers: list[Answer]) -> None:
        text = self._generator.text(call.model)

        async def one(index: int, answer: Answer) -> End:
            choice = Choice(call, index, text)

            def say(part: Part) -> bool:
                if not exchange.has_room():
                    return False
                if chunk := choice.part(part):
                    exchange.event_now(chunk)
                return True

            async for part in answer.parts(say):
                if isinstance(part, End):
                    await exchange.event(choice.end(part))
                    return part
                if chunk := choice.part(part):
                    await exchange.event(chunk)
            raise AssertionError("an answer ended without its End")

        ends = await _together([one(index, answer) for index, answer in enumerate(answers)])
        if call.include_usage:
            usage = _encode(usage_of(call.usage(ends)))
            await exchange.event(b"data: " + call.head(call.form.chunk) + b',"choices":[],"usage":' + usage + b"}\n\n")
        await exchange.done()

    async def _whole(self, call: Call, answers: list[Answer]) -> bytes:
        text = self._generator.text(call.model)

        async def one(index: int, answer: Answer) -> tuple[dict[str, object], End]:
            pieces: list[str] = []
            logprobs: list[TokenLogprobs] = []
            async for part in answer.parts():
                if isinstance(part, Part):
                    pieces.append(part.text)
                    logprobs += part.logprobs
                else:
                    return whole_choice(call, index, "".join(pieces), logprobs, part, text), part
            raise AssertionError("an answer ended without its End")

        found = await _together([one(index, answer) for index, answer in enumerate(answers)])
        rest = {"choices": [choice for choice, _ in found], "usage": usage_of(call.usage([end for _, end in found]))}
        return call.head(call.form.whole) + b"," + _encode(rest)[1:]

    # The others.

    async def _models(self, exchange: Exchange) -> None:
        views = await self._generator.models_for(_presented(exchange))
        data = [self._model_card(view) for view in views]
        await exchange.reply(_encode({"object": "list", "data": data}))

    async def _model(self, exchange: Exchange) -> None:
        views = await self._generator.models_for(_presented(exchange))
        name = self._generator.model(exchange.path.rstrip("/").removeprefix("/v1/models/"))
        for view in views:
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
        await self._authenticator.caller(_presented(exchange))
        body = parse(TokenizeBody, await self._body(exchange))
        model = self._generator.model(body.model or "")
        if (body.prompt is None) == (body.messages is None):
            raise Invalid("prompt", "either prompt or messages must be given")
        if body.messages is not None:
            text, special_tokens = await self._conversation(model, body)
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
        await self._authenticator.caller(_presented(exchange))
        body = parse(DetokenizeBody, await self._body(exchange))
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

    async def _say_openapi(self, exchange: Exchange) -> None:
        await exchange.reply(self._openapi)

    async def _say_version(self, exchange: Exchange) -> None:
        await exchange.reply(_encode({"version": self._version}))

    async def _say_metrics(self, exchange: Exchange) -> None:
        await self._authenticator.identify(_presented(exchange), Scope.ADMIN)
        await exchange.reply(await asyncio.to_thread(self._metrics), kind=_METRICS_TYPE)

    async def _body(self, exchange: Exchange) -> bytes:
        bytes_max = self._requests.message_bytes_max
        if contexts := [view.facts.max_model_len for view in self._generator.models() if view.facts is not None]:
            bytes_max = min(bytes_max, _BODY_BYTES_PER_TOKEN * max(contexts) + _BODY_BYTES_BESIDE)
        try:
            return await exchange.body(bytes_max, self._http.read_timeout_s)
        except BodyTooLarge as error:
            if bytes_max == self._requests.message_bytes_max:
                raise
            why = (
                f"{_BODY_BYTES_PER_TOKEN} for each token of the model's context, and {_BODY_BYTES_BESIDE} for the rest"
            )
            raise BodyTooLarge("body", f"{error.description}: {why}", limit=error.limit) from None


def _allowed(methods: Iterable[str]) -> str:
    return ", ".join((*methods, *(("HEAD",) if "GET" in methods else ()), "OPTIONS"))


async def _options(exchange: Exchange, *, allowed: str) -> None:
    """Also what browsers ask first. Whose page it is was judged before."""
    wanted = exchange.header("access-control-request-headers")
    headers = [(b"allow", allowed.encode()), (b"access-control-allow-methods", allowed.encode())]
    if wanted and is_visible(wanted):
        headers.append((b"access-control-allow-headers", wanted.encode()))
    headers.append((b"access-control-max-age", b"600"))
    await exchange.reply(b"", kind=b"text/plain", headers=headers)


@contextmanager
def _named(field: str) -> Iterator[None]:
    """A form that is refused has the name that this request gave it."""
    try:
        yield
    except Invalid as error:
        if error.field == "sampling.structure" and field:
            raise Invalid(field, error.description, limit=error.limit) from None
        raise


def _rate_headers(rates: Iterable[RateLeft]) -> Iterator[tuple[bytes, bytes]]:
    """As they are once this request has taken its part."""
    for rate in rates:
        for what, said in (
            ("limit", f"{rate.per_minute:.0f}"),
            ("remaining", f"{math.floor(rate.left)}"),
            ("reset", _duration(rate.full_in_s)),
        ):
            yield f"x-ratelimit-{what}-{rate.unit}".encode(), said.encode()


def _duration(seconds: float) -> str:
    """As clients of this protocol read them: 20ms, 1s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


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
    return presented(exchange.headers, names=exchange.certificate_names, peer=exchange.peer)


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
