"""What clients of OpenAI's protocol send: JSON to values, each refusal with the field's name.

What is asked for and not supported is refused by name; what is unknown, or cannot change the answer, is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, Struct

from router.core.errors import Invalid
from router.core.request import Structure, StructureKind
from router.edge.admit import Asked
from router.edge.chat import Said
from router.edge.openai_tools import Tool, ToolChoice

Int = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Struct):
    name: str | None = None
    schema: dict[str, object] | None = None


class ResponseFormat(Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Struct):
    """vLLM's; exactly one is set."""

    json: str | dict[str, object] | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1, max_length=1000)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: object = None
    whitespace_pattern: object = None


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
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


class CompletionBody(Body, kw_only=True):
    prompt: str | list[str | TokenId | list[TokenId]]
    logprobs: Int | None = None
    add_special_tokens: bool = True
    echo: bool | None = None


class Content(Struct):
    type: str
    text: str | None = None
    #: What stands for the text in an assistant's part of this type.
    refusal: str | None = None


class FunctionCalled(Struct):
    name: str
    arguments: str


class ToolCalled(Struct):
    function: FunctionCalled
    id: str = ""


class Message(Struct):
    role: str
    content: str | list[Content] | None = None
    tool_calls: list[ToolCalled] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: str | None = None
    function_call: object = None
    audio: object = None


class ChatBody(Body, kw_only=True):
    messages: list[Message]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    add_generation_prompt: bool = True
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None


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
            "functions",
            "guided_choice",
            "guided_grammar",
            "guided_json",
            "guided_regex",
            "include_stop_str_in_output",
            "logits_processors",
            "prompt_embeds",
            "prompt_logprobs",
            "return_token_ids",
            "return_tokens_as_token_ids",
            "suffix",
            "truncate_prompt_tokens",
            "use_beam_search",
            "web_search_options",
        ),
        _NOTHING,
    ),
    "best_of": (None, 1),
    "function_call": (None, "none"),
    "modalities": (None, [], ["text"]),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}

B = TypeVar("B", CompletionBody, ChatBody, TokenizeBody, DetokenizeBody)
#: " - at `$.messages[0].role`", and "missing required field `prompt`", as msgspec says them.
_AT = re.compile(r" - at `(?:\$\.?)?([^`]*)`$")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MISSING = re.compile(r"missing required field `([^`]*)`")


def parse(kind: type[B], data: bytes) -> B:
    """Raises Invalid that names the field."""
    try:
        said = msgspec.json.decode(data.removeprefix(_BYTE_ORDER_MARK))
    except (ValueError, RecursionError) as error:
        raise Invalid("body", f"is not JSON: {error}") from None
    if isinstance(said, dict):
        for name in said.keys() & UNSUPPORTED.keys():
            if not any(said[name] == nothing and type(said[name]) is type(nothing) for nothing in UNSUPPORTED[name]):
                raise Invalid(name, "is not supported")
    try:
        return msgspec.convert(said, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        at, missing = _AT.search(text), _MISSING.search(text)
        path = at[1] if at else ""
        field = ".".join(filter(None, (path, missing[1]))) if missing else path
        raise Invalid(field or "body", _AT.sub("", text)) from None


def asked(body: Body, *, max_tokens: int | None, logprobs: int | None, structure: Structure | None) -> Asked:
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
        structure=structure,
        logit_bias=tuple(_logit_bias(body.logit_bias or {})),
    )


def _logit_bias(said: dict[str, float]) -> Iterator[tuple[int, float]]:
    for name, bias in said.items():
        if not name.isdecimal() or not name.isascii() or len(name) > 18:
            raise Invalid(f"logit_bias[{name[:20]}]", "is not a token id")
        yield int(name), bias


class Formed(NamedTuple):
    """What an answer must look like, and the name of the field that says so."""

    field: str
    structure: Structure


def form(body: Body) -> Formed | None:
    """Raises Invalid."""
    wanted = [formed for formed in (_response_format(body.response_format), _structured(body)) if formed is not None]
    if len(wanted) > 1:
        raise Invalid("structured_outputs", "cannot be had together with response_format")
    return wanted[0] if wanted else None


def _response_format(said: ResponseFormat | None) -> Formed | None:
    if said is None or said.type == "text":
        return None
    if said.type == "json_object":
        return Formed("response_format", Structure(StructureKind.JSON_OBJECT))
    if said.json_schema is None or said.json_schema.schema is None:
        raise Invalid("response_format.json_schema.schema", "is missing")
    return Formed("response_format", Structure(StructureKind.JSON_SCHEMA, _text(said.json_schema.schema)))


def _structured(body: Body) -> Formed | None:
    said = body.structured_outputs
    if said is None:
        return None
    for name in ("structural_tag", "whitespace_pattern"):
        if getattr(said, name) is not None:
            raise Invalid(f"structured_outputs.{name}", "is not supported")
    found: list[Structure] = []
    if said.json is not None:
        schema = said.json if isinstance(said.json, str) else _text(said.json)
        found.append(Structure(StructureKind.JSON_SCHEMA, schema))
    if said.regex is not None:
        found.append(Structure(StructureKind.REGEX, said.regex))
    if said.choice is not None:
        found.append(Structure(StructureKind.GRAMMAR, "root ::= " + " | ".join(map(_text, said.choice))))
    if said.grammar is not None:
        found.append(Structure(StructureKind.GRAMMAR, said.grammar))
    if said.json_object:
        found.append(Structure(StructureKind.JSON_OBJECT))
    if len(found) != 1:
        raise Invalid("structured_outputs", "exactly one of json, regex, choice, grammar, json_object must be set")
    return Formed("structured_outputs", found[0])


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()


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
    for name in ("function_call", "audio"):
        if getattr(message, name):
            raise Invalid(f"{field}.{name}", "is not supported")
    role = _ROLES[message.role]
    if message.tool_calls and role != "assistant":
        raise Invalid(f"{field}.tool_calls", "are an assistant's")
    calls = [_one_called(f"{field}.tool_calls[{at}]", call) for at, call in enumerate(message.tool_calls or ())]
    content = message.content
    if content is None and role == "assistant":
        content = message.refusal
    if content is None and not calls:
        raise Invalid(f"{field}.content", "is missing")
    text = _content(f"{field}.content", content or "")
    return Said(role, text, calls, (message.tool_call_id or "") if role == "tool" else "", message.name or "")


def _content(field: str, content: str | list[Content]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_part(f"{field}[{at}]", part) for at, part in enumerate(content))


def _part(field: str, part: Content) -> str:
    if part.type not in ("text", "refusal"):
        raise Invalid(f"{field}.type", f"{part.type!r} is not supported; must be 'text'")
    said = part.text if part.type == "text" else part.refusal
    if said is None:
        raise Invalid(f"{field}.{part.type}", "is missing")
    return said


def _one_called(field: str, call: ToolCalled) -> dict[str, object]:
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise Invalid(f"{field}.function.arguments", "must be a JSON object, as text")
    return {"type": "function", "id": call.id, "function": {"name": call.function.name, "arguments": arguments}}
