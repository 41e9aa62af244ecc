"""What every protocol for clients does the same way: check a request and make it the core's, tokens to text.

An edge brings its protocol's fields into `Wanted`, and turns `Part`s and the `End` into its protocol's messages.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar
from uuid import uuid4

from router.config import RequestLimits
from router.core.effects import Finished, Tokens
from router.core.errors import Expired, NotFound, Unavailable
from router.core.rate import RateLeft
from router.core.request import GenerationRequest, TokenLogprobs
from router.core.worker import ModelFacts
from router.edge.admit import SEED_MAX, Asked, Rules
from router.edge.identity import NOBODY, Authenticator, Caller, Presented
from router.edge.text import ModelText, TextStream
from router.port import CorePort, ModelView, RequestStream

T = TypeVar("T")

#: Shorter prompts are tokenized here: a millisecond at most, and a thread adds a seventh to that.
_INLINE_CHARS_MAX = 4_000
#: Of an answer, that are said at once.
_PART_TOKENS_MAX = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One answer, as a client asks for it."""

    #: Empty takes the one model served, if there is only one.
    model: str
    prompt: str | tuple[int, ...]
    #: What the protocol calls the prompt.
    prompt_field: str
    asked: Asked
    #: Empty: the server makes one up.
    request_id: str = ""
    lane: str = ""
    #: None takes the longest there is.
    timeout_s: float | None = None
    #: What came with the call that can tell who makes it.
    presented: Presented = NOBODY
    #: Who that is, where it was asked already.
    caller: Caller | None = None
    #: Whether the tokenizer puts its special tokens around a text.
    special_tokens: bool = True


class Accepted(NamedTuple):
    request: GenerationRequest
    stops: tuple[str, ...]

    def sibling(self, number: int, request_id: str) -> Accepted:
        """Another answer to the same prompt: alike, but for its id, and for its seed, or all would say the same."""
        sampling = self.request.sampling
        if sampling.seed is not None and number:
            sampling = replace(sampling, seed=(sampling.seed + number) % (SEED_MAX + 1))
        return Accepted(replace(self.request, request_id=request_id, sampling=sampling), self.stops)


class Part(NamedTuple):
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    #: Of the answer so far, this part included.
    completion_tokens: int


class End(NamedTuple):
    finished: Finished
    #: The stop string that ended it, or "".
    stop_match: str


class Answer:
    """An answer on its way."""

    def __init__(self, stream: RequestStream, text: TextStream) -> None:
        self._stream = stream
        self._text = text
        self._completion_tokens = 0
        self._stop_match = ""
        #: Of what was to be said at once: what could not be, and what went wrong.
        self._unsaid: list[Part] = []
        self._broken: Exception | None = None

    async def parts(self, say: Callable[[Part], bool] | None = None) -> AsyncIterator[Part | End]:
        """Any number of Parts, some without text, then the End. Raises TandemError when the request fails.

        A Part that comes while the caller waits for one goes to `say` first, in the very turn of the loop that brings
        it; where that returns False, the caller gets it."""
        if say is not None:
            self._stream.at_once(partial(self._say, say))
        async for event in self._stream:
            if self._broken is not None:
                raise self._broken
            unsaid, self._unsaid = self._unsaid, []
            for part in unsaid:
                yield part
            if isinstance(event, Tokens):
                for part in self._parts(event):
                    yield part
            elif isinstance(event, Finished):
                if not self._stop_match:
                    rest = self._text.finish()
                    self._stop_match = rest.stop or ""
                    if rest.text:
                        yield Part(rest.text, (), (), self._completion_tokens)
                yield End(event, self._stop_match)
            else:
                raise event.error

    def _say(self, say: Callable[[Part], bool]) -> bool:
        try:
            for part in self._parts(self._stream.take()):
                if self._unsaid or not say(part):
                    self._unsaid.append(part)
        except Exception as error:  # the caller's, who waits; whoever brought the tokens has no part in it
            self._broken = error
        return self._broken is None and not self._unsaid

    def _parts(self, tokens: Tokens) -> list[Part]:
        parts: list[Part] = []
        for token_ids, logprobs in _in_parts(tokens):
            if self._stop_match:
                break  # on their way when the stop string was found
            text, stop, count = self._text.feed(token_ids)
            if stop:
                token_ids, logprobs = token_ids[:count], logprobs[:count]
            self._completion_tokens += len(token_ids)
            parts.append(Part(text, token_ids, logprobs, self._completion_tokens))
            if stop:
                self._stop_match = stop
                self._stream.stop_matched(self._completion_tokens)
        return parts

    def close(self) -> None:
        """The client leaves. Idempotent; cancels what has not ended."""
        self._stream.close()


def _in_parts(event: Tokens) -> Sequence[Tokens]:
    """What piled up while the reader lagged leaves in pieces, so that little of it waits to be written at a time."""
    token_ids, logprobs = event
    size = _PART_TOKENS_MAX // (1 + len(logprobs[0].top)) or 1 if logprobs else _PART_TOKENS_MAX
    if len(token_ids) <= size:
        return (event,)
    return [Tokens(token_ids[at : at + size], logprobs[at : at + size]) for at in range(0, len(token_ids), size)]


class Generator:
    def __init__(
        self, core: CorePort, texts: dict[str, ModelText], limits: RequestLimits, authenticator: Authenticator
    ) -> None:
        self._core = core
        self._authenticator = authenticator
        self._texts = texts
        self._rules = {name: Rules(limits, text) for name, text in texts.items()}
        self._limits = limits
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenize")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def now(self) -> float:
        return self._core.now()

    def models(self) -> list[ModelView]:
        return self._core.models()

    async def rates(self, accepted: Accepted) -> tuple[RateLeft, ...]:
        return await self._core.rates(accepted.request.tenant)

    async def models_for(self, presented: Presented) -> list[ModelView]:
        """Those that the caller may use. Raises Unauthenticated, PermissionDenied."""
        caller = await self._authenticator.caller(presented)
        return [view for view in self._core.models() if caller.tenant.may_use(view.name)]

    def text(self, model: str) -> ModelText:
        return self._texts[model]

    async def accept(self, wanted: Wanted, arrival: float) -> Accepted:
        """Raises TandemError. `arrival` is what `now` said when the request came."""
        caller = wanted.caller or await self._authenticator.caller(wanted.presented)
        name = self.model(wanted.model)
        rules, facts = self._rules[name], self.facts(name)
        rules.request_id(wanted.request_id)
        lane = caller.lane(rules.lane(wanted.lane) if wanted.lane else None)
        prompt = await self.tokens(name, wanted.prompt_field, wanted.prompt, special_tokens=wanted.special_tokens)
        rules.check_prompt(wanted.prompt_field, prompt, facts)
        sampling = rules.sampling(wanted.asked, len(prompt), facts)
        if sampling.structure is not None and sampling.seed is None and sampling.temperature > 0:
            # What must have a form can only be replayed when a worker is lost: it can't go on in the middle of one.
            sampling = replace(sampling, seed=secrets.randbelow(SEED_MAX + 1))
        timeout_s = self._limits.timeout_s_max if wanted.timeout_s is None else wanted.timeout_s
        if timeout_s <= 0:
            raise Expired("the deadline had passed on arrival")
        request = GenerationRequest(
            request_id=wanted.request_id or uuid4().hex,
            model=name,
            prompt=prompt,
            sampling=sampling,
            arrival=arrival,
            deadline=arrival + min(timeout_s, self._limits.timeout_s_max),
            tenant=caller.tenant.id,
            key_id=caller.identity.key_id,
            lane=lane,
            trace_id=wanted.presented.trace_id,
        )
        return Accepted(request, wanted.asked.stop)

    def submit(self, accepted: Accepted) -> Answer:
        """Whoever submits closes."""
        request = accepted.request
        text = TextStream(
            self._texts[request.model],
            accepted.stops,
            prompt=request.prompt,
            unmatched_tokens=request.sampling.min_tokens,
        )
        return Answer(self._core.submit(request), text)

    async def tokens(
        self, model: str, field: str, prompt: str | tuple[int, ...], *, special_tokens: bool = True
    ) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return prompt
        self._rules[model].check_text(field, prompt, self.facts(model))
        encode = self._texts[model].encode
        return await self.work(len(prompt), lambda: encode(prompt, special_tokens=special_tokens))

    async def work(self, characters: int, do: Callable[[], T]) -> T:
        """Does it here, or on a thread if that many characters take long."""
        if characters <= _INLINE_CHARS_MAX:
            return do()
        return await asyncio.get_running_loop().run_in_executor(self._threads, do)

    def model(self, name: str) -> str:
        served = ", ".join(sorted(self._texts))
        if not name and len(self._texts) == 1:
            return next(iter(self._texts))
        if name not in self._texts:
            raise NotFound("model", name, f"model {name!r} is not served here; served: {served}")
        return name

    def facts(self, name: str) -> ModelFacts:
        facts = next((view.facts for view in self._core.models() if view.name == name), None)
        if facts is None:
            raise Unavailable("NO_WORKERS", f"no worker for model {name!r} has joined yet", retry_after_s=1.0)
        return facts
