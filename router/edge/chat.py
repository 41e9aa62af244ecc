"""A conversation as the text of one prompt: by the template that the model ships, or a plain one.

The plain one, for models that were not trained on conversations, is a line `Role: content` for each message, and
`Assistant:` for the answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from router.core.errors import Invalid
from router.edge.text import ModelText

#: How many models write that a call begins.
MARK = "<tool_call>"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Said(NamedTuple):
    role: str
    content: str
    #: Of an assistant: what it called, with `arguments` as an object; as templates take them.
    tool_calls: Sequence[dict[str, object]] = ()
    #: Of a tool: which call it answers.
    tool_call_id: str = ""
    name: str = ""

    @property
    def is_about_tools(self) -> bool:
        return bool(self.tool_calls) or self.role == "tool"

    def as_message(self) -> dict[str, object]:
        said: dict[str, object] = {"role": self.role, "content": self.content}
        given = {"tool_calls": list(self.tool_calls), "tool_call_id": self.tool_call_id, "name": self.name}
        return {**said, **{name: value for name, value in given.items() if value}}


class ChatTemplate:
    def __init__(self, text: ModelText, model_dir: Path) -> None:
        """Raises ValueError when the model's template is not one."""
        source = text.chat_template(model_dir)
        self._tokens = _special_tokens(model_dir / "tokenizer_config.json")
        self._template: jinja2.Template | None = None
        #: Whether it shows tools to the model, and the mark that calls are written with.
        self.has_tools = False
        self.marks_calls = False
        if source is not None:
            environment = _environment()
            try:
                self._template = environment.from_string(source)
                self.has_tools = "tools" in find_undeclared_variables(environment.parse(source))
                self.marks_calls = self.has_tools and MARK in source
            except jinja2.TemplateError as error:
                raise ValueError(f"model_dir: the chat template of {model_dir} is not one: {error}") from error

    @property
    def adds_special_tokens(self) -> bool:
        """Models' own templates write them out; the tokenizer must not add them again."""
        return self._template is not None

    def render(self, messages: Sequence[Said], *, ask: bool, tools: Sequence[dict[str, object]] = ()) -> str:
        """`ask` ends the text where the answer begins. Raises Invalid, if the template refuses the messages."""
        if not self.has_tools:
            for at, said in enumerate(messages):
                if said.is_about_tools:
                    raise Invalid(f"messages[{at}]", "is about tools, which this model's template does not know")
        if self._template is None:
            lines = [f"{said.role.capitalize()}: {said.content}" for said in messages]
            return "\n".join([*lines, "Assistant:"] if ask else lines)
        try:
            return self._template.render(
                **self._tokens,
                messages=[said.as_message() for said in messages],
                add_generation_prompt=ask,
                tools=list(tools) or None,
                documents=None,
            )
        except _Refused as error:
            raise Invalid("messages", f"the model's chat template refuses them: {error}") from None
        except Exception:  # a template is a program: it can fail in every way
            raise Invalid("messages", "the model's chat template cannot render them") from None


class _Refused(Exception):
    """What a template says by `raise_exception`."""


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json  # Jinja's own escapes for HTML
    return environment


def _raise(why: str) -> NoReturn:
    raise _Refused(why)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _special_tokens(path: Path) -> dict[str, str]:
    """Each is a text, or an object that has it as `content`."""
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named = {name: said.get(name) for name in _SPECIAL_TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    return {name: token for name, token in texts.items() if isinstance(token, str)}
