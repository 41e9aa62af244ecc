"""What clients of OpenAI's protocol send: JSON to values, each refusal with the field's name.

What is asked for and not supported is refused by name; what is unknown, or cannot change the answer, is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from router.core.errors import Invalid
from router.edge.admit import Asked
from router.edge.chat import Said

Int = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Body(Struct, kw_only=True):
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
    stream_options: StreamOptions | None = None


class CompletionBody(Body, kw_only=True):
    prompt: str | list[str | TokenId | list[TokenId]]
    logprobs: Int | None = None
    add_special_tokens: bool = True


class Content(Struct):
    type: str
    text: str | None = None


class Message(Struct):
    role: str
    content: str | list[Content] | None = None
    tool_calls: list[object] | None = None
    function_call: object = None
    audio: object = None


class ChatBody(Body, kw_only=True):
    messages: list[Message]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    add_generation_prompt: bool = True


class TokenizeBody(Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeBody(Struct, kw_only=True):
    model: str | None = None
    tokens: list[TokenId]


#: Fields that would change the answer if they were supported, each with the values that ask for nothing.
_NOTHING: tuple[object, ...] = (None, [], {}, "", False)
UNSUPPORTED: dict[str, tuple[object, ...]] = {
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

B = TypeVar("B", CompletionBody, ChatBody, TokenizeBody, DetokenizeBody)
#: " - at `$.messages[0].role`", and "missing required field `prompt`", as msgspec says them.
_AT = re.compile(r" - at `(?:\$\.?)?([^`]*)`$")
_MISSING = re.compile(r"missing required field `([^`]*)`")


def parse(kind: type[B], data: bytes) -> B:
    """Raises Invalid that names the field."""
    try:
        said = msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:
        raise Invalid("body", f"is not JSON: {error}") from None
    if isinstance(said, dict):
        for name in said.keys() & UNSUPPORTED.keys():
            if said[name] not in UNSUPPORTED[name]:
                raise Invalid(name, "is not supported")
    try:
        return msgspec.convert(said, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        at, missing = _AT.search(text), _MISSING.search(text)
        path = at[1] if at else ""
        field = ".".join(filter(None, (path, missing[1]))) if missing else path
        raise Invalid(field or "body", _AT.sub("", text)) from None


def asked(body: Body, *, max_tokens: int | None, logprobs: int | None) -> Asked:
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


def prompts(prompt: str | list[str | int | list[int]]) -> list[tuple[str, str | tuple[int, ...]]]:
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


def said_in(messages: Sequence[Message]) -> list[Said]:
    if not messages:
        raise Invalid("messages", "are empty")
    return [_one_said(f"messages[{at}]", message) for at, message in enumerate(messages)]


def _one_said(field: str, message: Message) -> Said:
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
