"""The HTTP API as an OpenAPI document. Bodies are described by the very types that they are parsed into, ranges by the
very tables that they are checked against."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from router.config import RequestLimits
from router.edge.admit import RANGES
from router.edge.openai_body import UNSUPPORTED, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

Json = dict[str, Any]

_BODIES = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody)
_TEXT: Json = {"type": "string"}
#: As documents describe what comes in a stream of events.
_EVENT: Json = {"type": "object", "properties": {"data": _TEXT}, "required": ["data"]}
_COUNT: Json = {"type": "integer", "minimum": 0}


def _object(**properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


_FINISH_REASON = {"enum": ["stop", "length", "tool_calls", None]}
_SAID: dict[str, Json] = {
    "Error": _object(error=_object(message=_TEXT, type=_TEXT, param=_or_null(_TEXT), code=_or_null(_TEXT))),
    "Usage": _object(
        prompt_tokens=_COUNT,
        completion_tokens=_COUNT,
        total_tokens=_COUNT,
        prompt_tokens_details=_object(cached_tokens=_COUNT),
    ),
    "Model": _object(
        id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT, max_model_len=_or_null(_COUNT)
    ),
    "Completion": _object(
        id=_TEXT,
        object={"const": "text_completion"},
        created=_COUNT,
        model=_TEXT,
        choices={
            "type": "array",
            "items": _object(
                index=_COUNT, text=_TEXT, logprobs=_or_null({"type": "object"}), finish_reason=_FINISH_REASON
            ),
        },
        usage=_ref("Usage"),
    ),
    "ChatCompletion": _object(
        id=_TEXT,
        object={"const": "chat.completion"},
        created=_COUNT,
        model=_TEXT,
        choices={
            "type": "array",
            "items": _object(
                index=_COUNT,
                message=_object(role={"const": "assistant"}, content=_or_null(_TEXT)),
                logprobs=_or_null({"type": "object"}),
                finish_reason=_FINISH_REASON,
            ),
        },
        usage=_ref("Usage"),
    ),
    "Models": _object(object={"const": "list"}, data={"type": "array", "items": _ref("Model")}),
    "Tokens": _object(
        count=_COUNT,
        max_model_len=_COUNT,
        tokens={"type": "array", "items": _COUNT},
        token_strs=_or_null({"type": "array", "items": _or_null(_TEXT)}),
    ),
    "Text": _object(prompt=_TEXT),
    "Version": _object(version=_TEXT),
    "Empty": {"type": "object"},
}

#: What may go wrong, by status. 4xx are the caller's to cure; 429 and 503 say when to come back.
_WRONG = {
    400: "The request is wrong, and will be wrong again; `param` names the field.",
    401: "No credential came, or it does not hold.",
    403: "The credential may not do this.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    429: "A limit is reached; `retry-after` and `retry-after-ms` say for how long.",
    499: "Cancelled.",
    500: "A fault of the server.",
    503: "Nobody can serve this now.",
    504: "The deadline passed; the header x-tandem-timeout-s sets one.",
}
_ASKS_WHO = (401, 403)
_HAS_BODY = (400, 408, 413)
_GENERATES = (400, 401, 403, 404, 408, 413, 429, 499, 503, 504)


def _answers(name: str, wrong: tuple[int, ...], *, streams: bool = False) -> Json:
    content = {"application/json": {"schema": _ref(name)}}
    if streams:
        content["text/event-stream"] = {"schema": _EVENT}
    said: Json = {"200": {"description": "Done.", "content": content}}
    for status in wrong:
        said[str(status)] = {
            "description": _WRONG[status],
            "content": {"application/json": {"schema": _ref("Error")}},
        }
    return said


def _takes(body: type, answers: Json, summary: str) -> Json:
    content = {"application/json": {"schema": _ref(body.__name__)}}
    return {"post": {"summary": summary, "requestBody": {"required": True, "content": content}, "responses": answers}}


def _gives(answers: Json, summary: str, **more: object) -> Json:
    return {"get": {"summary": summary, "responses": answers, **more}}


def document(version: str, limits: RequestLimits, models: Iterable[str]) -> Json:
    models = sorted(models)
    _, bodies = msgspec.json.schema_components(
        _BODIES, schema_hook=lambda kind: {"description": "anything"}, ref_template="#/components/schemas/{name}"
    )
    for body in _BODIES:
        _narrow(bodies[body.__name__]["properties"], limits)
        bodies[body.__name__]["properties"]["model"] = {"enum": [*models, "", None]}
    talks = (*_ASKS_WHO, 404, 503, *_HAS_BODY)
    name = {"name": "model", "in": "path", "required": True, "schema": {"enum": list(models)}}
    paths = {
        "/v1/completions": _takes(CompletionBody, _answers("Completion", _GENERATES, streams=True), "Continue prompts"),
        "/v1/chat/completions": _takes(
            ChatBody, _answers("ChatCompletion", _GENERATES, streams=True), "Answer a message"
        ),
        "/v1/models": _gives(_answers("Models", _ASKS_WHO), "What is served to this caller"),
        "/v1/models/{model}": _gives(_answers("Model", (*_ASKS_WHO, 404)), "One model", parameters=[name]),
        "/tokenize": _takes(TokenizeBody, _answers("Tokens", talks), "A text's tokens"),
        "/detokenize": _takes(DetokenizeBody, _answers("Text", talks), "Tokens' text"),
        "/health": _gives(_answers("Empty", (503,)), "Whether a request could be served"),
        "/ping": _gives(_answers("Empty", ()), "Whether the process lives"),
        "/version": _gives(_answers("Version", ()), "The server's version"),
        "/openapi.json": _gives(_answers("Empty", ()), "This document"),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tandem", "version": version},
        "security": [{}, {"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": {**_SAID, **bodies},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _narrow(properties: Json, limits: RequestLimits) -> None:
    """What the types leave open and the checks do not."""
    ranges: dict[str, Json] = {name: {"minimum": low, "maximum": high} for name, (low, high) in RANGES.items()}
    ranges |= {
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 10},
        "top_k": {"minimum": -1},
        "max_tokens": {"minimum": 1},
        "max_completion_tokens": {"minimum": 1},
        "min_tokens": {"minimum": 0},
        "top_logprobs": {"minimum": 0, "maximum": limits.logprobs_max},
        "n": {"minimum": 1, "maximum": limits.answers_max},
    }
    for name, bounds in ranges.items():
        for schema in properties.get(name, {}).get("anyOf", ()):
            if schema.get("type") in ("integer", "number"):
                schema |= bounds
    if "max_tokens" in properties:
        properties |= {name: {"enum": list(nothing)} for name, nothing in UNSUPPORTED.items()}
