"""Tools: which of them an answer may or must call, and the calls in what the model wrote.

- A call that is *forced* is written under a grammar: the arguments alone where one function is named, an object with
  `name` and `arguments` where the model has the choice. So it has the form that its schema says, whatever the model.
- A call that is *up to the model* is written as the model was taught to. One way of writing is read here, which many
  models share: JSON between `<tool_call>` and `</tool_call>`. Of models whose template shows no such mark, "auto" is
  refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol
from uuid import uuid4

import msgspec
from msgspec import Struct

from router.core.errors import Invalid
from router.core.request import Structure, StructureKind
from router.edge.chat import MARK, ChatTemplate
from router.edge.text import overlap

_MARK_END = "</tool_call>"


class Function(Struct):
    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None


class Tool(Struct):
    type: Literal["function"]
    function: Function


class _Named(Struct):
    name: str


class NamedTool(Struct):
    type: Literal["function"]
    function: _Named


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class Called(NamedTuple):
    id: str
    name: str
    #: JSON.
    arguments: str

    def as_said(self) -> dict[str, object]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class Reader(Protocol):
    """Takes an answer's text apart, as it comes."""

    def feed(self, text: str) -> str:
        """What of it is content to show now."""
        ...

    def finish(self) -> tuple[str, list[Called]]:
        """The rest of the content, and the calls."""
        ...


class Use(NamedTuple):
    """What the tools of one call mean."""

    #: For the model's template.
    shown: Sequence[dict[str, object]] = ()
    #: What the answer must look like because of them.
    structure: Structure | None = None
    #: The one function whose arguments the answer is.
    named: str = ""
    #: The functions of which the answer calls one.
    required: tuple[str, ...] = ()
    #: The model may call, several functions or one at most.
    auto: bool = False
    several: bool = True

    def reader(self) -> Reader:
        if self.auto:
            return _Marked(None if self.several else 1)
        return _Chosen(self.required) if self.required else _Text()


NO_TOOLS = Use()


def use(tools: Sequence[Tool] | None, choice: ToolChoice | None, template: ChatTemplate, *, several: bool) -> Use:
    """Raises Invalid."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise Invalid("tool_choice", "needs tools")
        return NO_TOOLS
    if choice == "none":
        return NO_TOOLS
    functions = {tool.function.name: tool.function for tool in tools}
    if len(functions) < len(tools):
        raise Invalid("tools", "two functions have the same name")
    shown = [_shown(tool) for tool in tools] if template.has_tools else []
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in functions:
            raise Invalid("tool_choice.function.name", f"there is no function {name!r} in tools")
        return Use(shown=shown, structure=_form(_schema(functions[name])), named=name)
    if choice == "required":
        return Use(shown=shown, structure=_form(_any_of(tools)), required=tuple(functions))
    if not template.marks_calls:
        raise Invalid(
            "tool_choice",
            "'auto' is not supported with this model: its template does not say how it calls tools; "
            "'required', 'none' and naming a function are",
        )
    return Use(shown=shown, auto=True, several=several)


def _shown(tool: Tool) -> dict[str, object]:
    function = tool.function
    said = {"name": function.name, "description": function.description or "", "parameters": _schema(function)}
    return {"type": "function", "function": said}


def _schema(function: Function) -> dict[str, object]:
    return function.parameters or {"type": "object", "properties": {}}


def _any_of(tools: Sequence[Tool]) -> dict[str, object]:
    forms: list[dict[str, object]] = []
    for at, tool in enumerate(tools):
        schema = _schema(tool.function)
        if "$defs" in schema or "definitions" in schema:
            field = f"tools[{at}].function.parameters"
            raise Invalid(field, "has definitions, which only a tool_choice that names the function supports")
        properties = {"name": {"const": tool.function.name}, "arguments": schema}
        forms.append(
            {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        )
    return {"anyOf": forms}


def _form(schema: Mapping[str, object]) -> Structure:
    return Structure(StructureKind.JSON_SCHEMA, json.dumps(schema))


def new_call(name: str, arguments: str) -> Called:
    return Called(f"call_{uuid4().hex[:24]}", name, arguments)


class _Text:
    def feed(self, text: str) -> str:
        return text

    def finish(self) -> tuple[str, list[Called]]:
        return "", []


class _Chosen:
    """All of the answer is one call."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._pieces: list[str] = []

    def feed(self, text: str) -> str:
        self._pieces.append(text)
        return ""

    def finish(self) -> tuple[str, list[Called]]:
        text = "".join(self._pieces)
        called = _called(text)
        return ("", [called]) if called is not None and called.name in self._names else (text, [])


class _Marked:
    """Content up to the first mark; from there on calls, if they can be read as such."""

    def __init__(self, calls_max: int | None) -> None:
        self._calls_max = calls_max
        #: The longest end of what came so far that could begin a mark.
        self._held = ""
        self._calls: list[str] = []

    def feed(self, text: str) -> str:
        if self._calls:
            self._calls.append(text)
            return ""
        text = self._held + text
        begin = text.find(MARK)
        if begin >= 0:
            self._held = ""
            self._calls.append(text[begin:])
            return text[:begin]
        keep = overlap(text, MARK)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> tuple[str, list[Called]]:
        if not self._calls:
            return self._held, []
        text = "".join(self._calls)
        parts = [part.split(_MARK_END, 1)[0] for part in text.split(MARK)[1:]]
        calls = [called for part in parts if (called := _called(part)) is not None]
        return ("", calls[: self._calls_max]) if len(calls) == len(parts) else (text, [])


def _called(text: str) -> Called | None:
    """None for what is no call: it was cut off, or the model wrote something else."""
    try:
        said = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not isinstance(name := said.get("name"), str):
        return None
    arguments = said.get("arguments", {})
    return new_call(name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
