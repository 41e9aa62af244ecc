"""Answers that must have a form, from clients of OpenAI's protocol to real engines and back."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.harness import Cluster, cluster
from tests.fuzz.live import becomes_idle, http_url

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[a-z]{1,8}$"}, "size": {"enum": ["small", "large"]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "order", "parameters": SCHEMA}}]


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("forms"), "vllm", "--http-port", "0") as running:
        running.wait_ready()
        yield running
        assert becomes_idle(running) == []


def ask(serving: Cluster, **asked: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 80, **asked}
    request = urllib.request.Request(f"{http_url(serving)}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        message: dict[str, Any] = json.load(response)["choices"][0]["message"]
        return message


def assert_fits(said: str) -> None:
    value = json.loads(said)
    assert value.keys() == {"name", "size"}
    assert re.fullmatch("[a-z]{1,8}", value["name"])
    assert value["size"] in ("small", "large")


@pytest.mark.parametrize("temperature", [0, 1])
def test_hold_for_schemas_choices_expressions_and_tools(serving: Cluster, temperature: float) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    assert_fits(ask(serving, temperature=temperature, response_format=schema)["content"])
    choice = {"choice": ["yes", 'no "way"']}
    assert ask(serving, temperature=temperature, structured_outputs=choice)["content"] in choice["choice"]
    regex = {"regex": "[0-9]{3}-[a-c]d"}
    said = ask(serving, temperature=temperature, structured_outputs=regex)["content"]
    assert re.fullmatch(regex["regex"], said)
    named = {"type": "function", "function": {"name": "order"}}
    for tool_choice in (named, "required"):
        (call,) = ask(serving, temperature=temperature, tools=TOOLS, tool_choice=tool_choice)["tool_calls"]
        assert call["function"]["name"] == "order"
        assert_fits(call["function"]["arguments"])
