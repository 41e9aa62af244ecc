"""What a client of OpenAI's protocol sees: one real router, scripted workers, real HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import pytest_asyncio

from protos import control_pb2
from router.config import AuthConfig, HttpLimits, RequestLimits
from router.core.limits import CoreLimits
from router.edge import keys
from router.edge.chat import ChatTemplate, Said
from router.edge.openai_body import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from router.edge.text import ModelText
from tests.router.http_client import Response, call, connected
from tests.router.running import CONTEXT, DECODE, MODEL, MODEL_DIR, VOCAB, WAIT_S, Router, Worker, running

TEXT = ModelText(MODEL_DIR)
SAID = "def größe(x):\n    return '😀' + x  # 漢字\n"
ANSWER = TEXT.encode(SAID, special_tokens=False)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODY_BYTES_MAX = 1_000_000


@pytest_asyncio.fixture
async def router() -> AsyncIterator[Router]:
    async with running(http_port=0) as router:
        yield router


def port(router: Router) -> int:
    assert router.bound.http_port is not None
    return router.bound.http_port


async def post(router: Router, path: str, body: dict[str, Any] | bytes, **headers: str) -> Response:
    return await call(port(router), "POST", path, body, **headers)


def completion(**values: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "x = 1", "max_tokens": len(ANSWER), "temperature": 0, **values}


def chat(**values: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {"model": MODEL, "messages": messages, "max_tokens": len(ANSWER), "temperature": 0, **values}


class TestCompletions:
    async def test_a_whole_answer(self, router: Router) -> None:
        await router.pair(ANSWER)
        response = await post(router, COMPLETIONS, completion())
        assert response.status == 200
        assert response.headers["content-type"] == "application/json"
        said = response.json
        assert said["id"].startswith("cmpl-")
        story = await router.control.Explain(control_pb2.ExplainRequest(request_id=said["id"]))
        assert response.headers["x-request-id"] == said["id"] == story.request_id
        assert (said["object"], said["model"]) == ("text_completion", MODEL)
        assert said["choices"] == [{"index": 0, "text": SAID, "logprobs": None, "finish_reason": "length"}]
        prompt_tokens = len(TEXT.encode("x = 1"))
        assert said["usage"] == {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(ANSWER),
            "total_tokens": prompt_tokens + len(ANSWER),
            "prompt_tokens_details": {"cached_tokens": 2},
        }
        await router.is_idle()

    async def test_a_stream(self, router: Router) -> None:
        await router.pair(ANSWER)
        response = await post(router, COMPLETIONS, completion(stream=True))
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        events = response.events
        assert len({(event["id"], event["created"], event["model"], event["object"]) for event in events}) == 1
        assert "".join(event["choices"][0]["text"] for event in events) == SAID
        assert not any("\ufffd" in event["choices"][0]["text"] for event in events)
        reasons = [event["choices"][0]["finish_reason"] for event in events]
        assert reasons == [None] * (len(events) - 1) + ["length"]
        assert not any("usage" in event for event in events)

    @pytest.mark.parametrize(
        ("prompt", "prompts"),
        [
            ("x", [TEXT.encode("x")]),
            (["x", "y"], [TEXT.encode("x"), TEXT.encode("y")]),
            ([5, 6, 7], [(5, 6, 7)]),
            ([[5, 6], [7]], [(5, 6), (7,)]),
        ],
    )
    async def test_prompts_are_texts_or_tokens_one_or_many(
        self, router: Router, prompt: object, prompts: list[tuple[int, ...]]
    ) -> None:
        worker = await router.worker("b", answer=ANSWER)
        said = (await post(router, COMPLETIONS, completion(prompt=prompt))).json
        assert [choice["index"] for choice in said["choices"]] == list(range(len(prompts)))
        assert {choice["text"] for choice in said["choices"]} == {SAID}
        assert said["usage"]["prompt_tokens"] == sum(map(len, prompts))
        assert said["usage"]["completion_tokens"] == len(prompts) * len(ANSWER)
        orders = await worker.wait_for("decode", len(prompts))
        assert sorted(tuple(order.decode.token_ids) for order in orders) == sorted(prompts)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_n_answers_to_each_prompt_have_seeds_of_their_own(self, router: Router, stream: bool) -> None:
        worker = await router.worker("b", answer=ANSWER)
        body = completion(prompt=["x", "y"], n=2, seed=7, stream=stream, stream_options={"include_usage": True})
        response = await post(router, COMPLETIONS, body)
        if stream:
            choices = [choice for event in response.events for choice in event["choices"]]
            usage = response.events[-1]["usage"]
        else:
            choices, usage = response.json["choices"], response.json["usage"]
        for index in range(4):
            assert "".join(choice["text"] for choice in choices if choice["index"] == index) == SAID
        assert usage["prompt_tokens"] == len(TEXT.encode("x")) + len(TEXT.encode("y"))
        assert usage["completion_tokens"] == 4 * len(ANSWER)
        orders = await worker.wait_for("decode", 4)
        assert sorted(order.decode.sampling.seed for order in orders) == [7, 7, 8, 8]

    async def test_every_wish_reaches_the_worker(self, router: Router) -> None:
        worker = await router.worker("b")
        wishes = {
            "max_tokens": 9,
            "min_tokens": 2,
            "temperature": 0.5,
            "top_p": 0.25,
            "top_k": 11,
            "min_p": 0.125,
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
            "repetition_penalty": 1.5,
            "seed": 3,
            "stop_token_ids": [4, 5],
            "ignore_eos": True,
            "logprobs": 2,
        }
        async with connected(port(router)) as connection:
            await connection.send("POST", COMPLETIONS, {"prompt": "x", **wishes})
            (order,) = await worker.wait_for("decode")
        sampling = order.decode.sampling
        assert {name: list(sampling.stop_token_ids) if name == "stop_token_ids" else getattr(sampling, name)
                for name in wishes} == wishes  # fmt: skip

    async def test_fields_that_cannot_change_the_answer_are_ignored(self, router: Router) -> None:
        await router.worker("b", answer=ANSWER)
        harmless = {
            "user": "u",
            "cache_salt": "mine",
            "kv_transfer_params": {"x": 1},
            "metadata": {},
            "logprobs": None,
            "echo": False,
            "best_of": 1,
            "top_k": -1,
            "no_such_field": 3,
        }
        assert (await post(router, COMPLETIONS, completion(**harmless))).json["choices"][0]["text"] == SAID

    @pytest.mark.parametrize("stop", ["urn '😀'", ["never", "urn '😀'"]])
    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_stop_string_across_tokens_ends_the_answer_before_it(
        self, router: Router, stop: object, stream: bool
    ) -> None:
        worker = await router.worker("b", answer=ANSWER)
        worker.pause_at = len(ANSWER) - 1  # it would go on
        response = await post(router, COMPLETIONS, completion(stop=stop, stream=stream))
        choices = [event["choices"][0] for event in response.events] if stream else response.json["choices"]
        assert "".join(choice["text"] for choice in choices) == SAID[: SAID.index("urn '😀'")]
        assert choices[-1]["finish_reason"] == "stop"
        await worker.wait_for("cancel")
        await router.is_idle()

    @pytest.mark.parametrize("stream", [False, True])
    async def test_logprobs(self, router: Router, stream: bool) -> None:
        worker = await router.worker("b")
        async with connected(port(router)) as connection:
            await connection.send("POST", COMPLETIONS, completion(max_tokens=2, logprobs=1, stream=stream))
            await logprobs_from(worker)
            response = await connection.response()
        choices = [event["choices"][0] for event in response.events] if stream else response.json["choices"]
        found = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        token, other = (TEXT.tokenizer.decode([it], skip_special_tokens=False) for it in (300, 301))
        assert sum((entry["tokens"] for entry in found), []) == [token, token]
        assert sum((entry["token_logprobs"] for entry in found), []) == [-0.5, -0.5]
        assert sum((entry["top_logprobs"] for entry in found), []) == [{token: -0.5, other: -0.25}] * 2
        assert sum((entry["text_offset"] for entry in found), []) == [0, len(token)]

    async def test_usage_comes_at_the_end_of_a_stream_when_asked_for(self, router: Router) -> None:
        await router.pair(ANSWER)
        events = (
            await post(router, COMPLETIONS, completion(stream=True, stream_options={"include_usage": True}))
        ).events
        assert all(event["usage"] is None for event in events[:-1])
        assert events[-1]["choices"] == []
        assert events[-1]["usage"]["completion_tokens"] == len(ANSWER)
        assert events[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}

    async def test_usage_grows_along_the_stream_when_asked_for(self, router: Router) -> None:
        await router.pair(ANSWER)
        options = {"include_usage": True, "continuous_usage_stats": True}
        events = (await post(router, COMPLETIONS, completion(stream=True, stream_options=options))).events
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts)
        assert counts[0] < counts[-1] == len(ANSWER)
        assert {event["usage"]["prompt_tokens"] for event in events} == {len(TEXT.encode("x = 1"))}

    async def test_any_text_comes_out_of_a_stream_whole(self, router: Router) -> None:
        random = Random(7)
        alphabet = "ab \n\"\\'{}<>&\t\u2028é한漢字😀👩‍👩‍👧שלום\u0301\u200d"
        worker = await router.worker("b", answer=ANSWER)
        for _ in range(60):
            said = "".join(random.choices(alphabet, k=random.randint(1, 40)))
            worker.answer = TEXT.encode(said, special_tokens=False)
            worker.tokens_per_step = random.randint(1, 4)
            begin = random.randrange(len(said))
            stop = said[begin : begin + random.randint(1, 4)] if random.random() < 0.5 else None
            expected = said[: said.index(stop)] if stop else TEXT.decode(worker.answer)
            body = completion(max_tokens=len(worker.answer), stop=stop)
            whole = (await post(router, COMPLETIONS, body)).json["choices"][0]
            events = (await post(router, COMPLETIONS, {**body, "stream": True})).events
            assert whole["text"] == expected
            assert "".join(event["choices"][0]["text"] for event in events) == expected
            assert events[-1]["choices"][0]["finish_reason"] == whole["finish_reason"] == ("stop" if stop else "length")


async def logprobs_from(worker: Worker) -> None:
    (order,) = await worker.wait_for("decode")
    entry = {"sampled": {"token_id": 300, "logprob": -0.5}, "top": [{"token_id": 301, "logprob": -0.25}]}
    output = {"leg_id": order.decode.leg_id, "token_ids": [300, 300], "logprobs": [entry, entry], "finish_reason": 2}
    await worker.send(step={"outputs": [output]})


class TestChat:
    async def test_a_whole_answer(self, router: Router) -> None:
        await router.pair(ANSWER)
        said = (await post(router, CHAT, chat())).json
        assert said["id"].startswith("chatcmpl-")
        assert said["object"] == "chat.completion"
        message = {"role": "assistant", "content": SAID, "refusal": None}
        assert said["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]
        assert said["usage"]["completion_tokens"] == len(ANSWER)

    async def test_a_stream_begins_with_the_role_and_ends_with_the_reason(self, router: Router) -> None:
        await router.pair(ANSWER)
        events = (await post(router, CHAT, chat(stream=True))).events
        assert {event["object"] for event in events} == {"chat.completion.chunk"}
        choices = [event["choices"][0] for event in events]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"]["content"] for choice in choices[1:-1]) == SAID
        assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "length")
        assert all(choice["finish_reason"] is None for choice in choices[:-1])

    async def test_content_may_be_parts_and_the_limit_has_two_names(self, router: Router) -> None:
        worker = await router.worker("b", answer=ANSWER)
        parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]
        body = chat(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
        del body["max_tokens"]
        response = await post(router, CHAT, {**body, "max_completion_tokens": len(ANSWER)})
        assert response.json["choices"][0]["message"]["content"] == SAID
        (order,) = await worker.wait_for("decode")
        prompt = TEXT.tokenizer.decode(list(order.decode.token_ids))
        assert prompt == "System: be brief\nUser: hi\nyou\nAssistant:"

    async def test_a_models_own_template_is_used(self, router: Router, tmp_path: Path) -> None:
        template = (
            "{{ bos_token }}{% for message in messages %}\n<{{ message.role }}>{{ message['content'] | tojson }}"
            "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
            "{% if messages[0].role == 'assistant' %}{{ raise_exception('the user speaks first') }}{% endif %}"
        )
        (tmp_path / "chat_template.jinja").write_text(template)
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}}')
        own = ChatTemplate(TEXT, tmp_path)
        assert own.adds_special_tokens
        assert own.render([Said("user", "<é>")], ask=True) == '<s><user>"<é>"<assistant>'
        with pytest.raises(ValueError, match="the user speaks first"):
            _refused(own, [Said("assistant", "x")])

    @pytest.mark.parametrize("several", [False, True])
    async def test_a_template_may_stand_in_the_tokenizers_configuration(self, tmp_path: Path, several: bool) -> None:
        template = "{{ messages[0].content }}!"
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named if several else template}))
        assert ChatTemplate(TEXT, tmp_path).render([Said("user", "hi")], ask=True) == "hi!"

    async def test_a_template_cannot_reach_out(self, tmp_path: Path) -> None:
        (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
        with pytest.raises(ValueError, match="cannot render"):
            _refused(ChatTemplate(TEXT, tmp_path), [Said("user", "x")])

    @pytest.mark.parametrize("stream", [False, True])
    async def test_logprobs(self, router: Router, stream: bool) -> None:
        worker = await router.worker("b")
        async with connected(port(router)) as connection:
            body = chat(max_tokens=2, logprobs=True, top_logprobs=1, stream=stream)
            await connection.send("POST", CHAT, body)
            await logprobs_from(worker)
            response = await connection.response()
        choices = [event["choices"][0] for event in response.events] if stream else response.json["choices"]
        (entry, _) = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        token, other = (TEXT.tokenizer.decode([it], skip_special_tokens=False) for it in (300, 301))
        assert (entry["token"], entry["logprob"], entry["bytes"]) == (token, -0.5, list(token.encode()))
        assert entry["top_logprobs"] == [{"token": other, "logprob": -0.25, "bytes": list(other.encode())}]


def _refused(template: ChatTemplate, messages: list[Said]) -> None:
    from router.core.errors import Invalid

    try:
        template.render(messages, ask=True)
    except Invalid as error:
        raise ValueError(error.message) from None


TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
CALLED: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
JSON = {"type": "json_object"}
FEATURES: Any = {"model": {"features": ["structure", "logit_bias"]}}
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}


class TestForms:
    @pytest.mark.parametrize(
        ("asked", "reaches"),
        [
            ({"response_format": {"type": "text"}}, None),
            ({"response_format": {"type": "json_object"}}, ("json_object", True)),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
                ("json_schema", SCHEMA),
            ),
            ({"structured_outputs": {"json": SCHEMA}}, ("json_schema", SCHEMA)),
            ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, ("json_schema", SCHEMA)),
            ({"structured_outputs": {"regex": "[a-z]+"}}, ("regex", "[a-z]+")),
            ({"structured_outputs": {"choice": ["a", 'b"\n']}}, ("grammar", 'root ::= "a" | "b\\"\\n"')),
            ({"structured_outputs": {"grammar": "root ::= [a]"}}, ("grammar", "root ::= [a]")),
            ({"structured_outputs": {"json_object": True}}, ("json_object", True)),
        ],
    )
    @pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
    async def test_reach_the_engine(
        self, router: Router, path: str, asked: dict[str, Any], reaches: tuple[str, object] | None
    ) -> None:
        worker = await router.worker("b", answer=ANSWER, **FEATURES)
        body = {**(chat() if path == CHAT else completion()), "temperature": 1, **asked, "logit_bias": {"5": -1.5}}
        assert (await post(router, path, body)).status == 200
        (order,) = await worker.wait_for("decode")
        sampling = order.decode.sampling
        assert dict(sampling.logit_bias) == {5: -1.5}
        kind = sampling.structure.WhichOneof("kind")
        if reaches is None:
            assert kind is None
            return
        value = getattr(sampling.structure, kind)
        assert (kind, json.loads(value) if kind == "json_schema" else value) == reaches
        assert sampling.HasField("seed"), "else it could not be replayed"

    async def test_n_answers_with_a_form_differ_in_their_seeds(self, router: Router) -> None:
        worker = await router.worker("b", answer=ANSWER, **FEATURES)
        await post(router, CHAT, chat(n=3, temperature=1, response_format={"type": "json_object"}))
        orders = await worker.wait_for("decode", 3)
        assert len({order.decode.sampling.seed for order in orders}) == 3

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("asked", "field"),
        [
            ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, "response_format"),
            ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
            ({"tools": [TOOL], "tool_choice": NAMED}, "tool_choice"),
        ],
    )
    async def test_that_the_engine_cannot_follow_are_refused_by_the_name_they_had(
        self, router: Router, asked: dict[str, Any], field: str, stream: bool
    ) -> None:
        worker = await router.worker("b", **FEATURES)
        async with connected(port(router)) as connection:
            await connection.send("POST", CHAT, chat(**asked, stream=stream))
            (order,) = await worker.wait_for("decode")
            failed = {"leg_id": order.decode.leg_id, "failure": "FAILURE_INVALID", "detail": "/secret/path.py: no"}
            await worker.send(leg_failed=failed)
            response = await connection.response()
        assert (response.status, response.error["param"]) == (400, field)
        assert "secret" not in response.error["message"]

    async def test_too_large_are_refused_with_the_limit(self) -> None:
        async with running(http_port=0, requests=RequestLimits(structure_bytes_max=100, logit_bias_max=2)) as router:
            await router.worker("b", **FEATURES)
            response = await post(router, CHAT, chat(structured_outputs={"regex": "a" * 101}))
            assert (response.status, response.error["param"]) == (400, "structured_outputs")
            assert "100" in response.error["message"]
            for bias, param in (({"1": 1, "2": 1, "3": 1}, "logit_bias"), ({"1": 101}, "logit_bias[1]")):
                response = await post(router, CHAT, chat(logit_bias=bias))
                assert (response.status, response.error["param"]) == (400, param)


class TestEcho:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("prompt", ["x = 1", ["x = 1", "y"], list(TEXT.encode("x = 1"))])
    async def test_repeats_each_prompt_before_its_answers(self, router: Router, prompt: object, stream: bool) -> None:
        await router.worker("b", answer=ANSWER)
        response = await post(router, COMPLETIONS, completion(prompt=prompt, n=2, echo=True, stream=stream))
        choices = [event["choices"][0] for event in response.events] if stream else response.json["choices"]
        prompts = ["x = 1", "y"] if prompt == ["x = 1", "y"] else ["x = 1"]
        for index in range(2 * len(prompts)):
            said = "".join(choice["text"] for choice in choices if choice["index"] == index)
            assert said == prompts[index // 2] + SAID


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": f"does {name}", "parameters": schema}}


class TestTools:
    """What the engine does with a grammar is the engine's; here the answers that one would give."""

    @pytest_asyncio.fixture
    async def hermes(self, tmp_path: Path) -> AsyncIterator[Router]:
        for file in ("tokenizer.json", "generation_config.json"):
            (tmp_path / file).write_bytes((MODEL_DIR / file).read_bytes())
        (tmp_path / "chat_template.jinja").write_text(
            "{% for tool in tools or [] %}[{{ tool | tojson }}]{% endfor %}"
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
            "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
            "{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}{% endfor %}"
        )
        async with running(http_port=0, model_dir=str(tmp_path)) as router:
            yield router

    async def said(self, router: Router, text: str, **asked: Any) -> tuple[dict[str, Any], str, Worker]:
        """The message and the reason, which are the same streamed and whole; and who answered."""
        answer = TEXT.encode(text, special_tokens=False)
        worker = await router.worker("b", answer=answer, **FEATURES)
        body = chat(**{"max_tokens": len(answer), **asked})
        whole = (await post(router, CHAT, body)).json["choices"][0]
        message = whole["message"]
        calls: list[dict[str, Any]] = []
        content = ""
        for event in (await post(router, CHAT, {**body, "stream": True})).events:
            choice = event["choices"][0]
            content += choice["delta"].get("content") or ""
            for part in choice["delta"].get("tool_calls", ()):
                if part["index"] == len(calls):
                    calls.append({"id": part["id"], "type": part["type"], "function": {"arguments": "", "name": ""}})
                for name, value in part["function"].items():
                    calls[part["index"]]["function"][name] += value
        assert choice["finish_reason"] == whole["finish_reason"]
        assert content == (message["content"] or "")
        assert [call["function"] for call in calls] == [call["function"] for call in message.get("tool_calls", [])]
        assert all(call["id"].startswith("call_") for call in calls)
        return message, whole["finish_reason"], worker

    async def test_a_named_function_gets_its_arguments(self, router: Router) -> None:
        arguments = '{"city": "Köln"}'
        message, reason, worker = await self.said(router, arguments, tools=[tool("f", city={})], tool_choice=NAMED)
        assert message["content"] is None
        assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": arguments}
        assert reason == "length"
        order = (await worker.wait_for("decode"))[0]
        assert json.loads(order.decode.sampling.structure.json_schema) == tool("f", city={})["function"]["parameters"]

    async def test_of_several_the_model_calls_the_one_it_chooses(self, router: Router) -> None:
        tools = [tool("f"), tool("g", x={"type": "integer"})]
        message, reason, worker = await self.said(
            router, '{"name": "g", "arguments": {"x": 3}}', tools=tools, tool_choice="required"
        )
        assert message["tool_calls"][0]["function"] == {"name": "g", "arguments": '{"x": 3}'}
        assert (message["content"], reason) == (None, "tool_calls")
        schema = json.loads((await worker.wait_for("decode"))[0].decode.sampling.structure.json_schema)
        assert [form["properties"]["name"] for form in schema["anyOf"]] == [{"const": "f"}, {"const": "g"}]

    async def test_a_call_that_was_cut_off_is_content(self, router: Router) -> None:
        message, reason, _ = await self.said(router, '{"name": "f", "argu', tools=[tool("f")], tool_choice="required")
        assert (message["content"], reason) == ('{"name": "f", "argu', "length")
        assert "tool_calls" not in message

    async def test_calls_that_are_up_to_the_model_are_read(self, hermes: Router) -> None:
        first, second = '{"name": "f", "arguments": {"x": "<tool"}}', '{"name": "g"}'
        text = f"I look. <tool_call>\n{first}\n</tool_call>\n<tool_call>{second}</tool_call>"
        message, reason, worker = await self.said(hermes, text, tools=[tool("f"), tool("g")])
        assert (message["content"], reason) == ("I look. ", "tool_calls")
        functions = [call["function"] for call in message["tool_calls"]]
        assert functions == [{"name": "f", "arguments": '{"x": "<tool"}'}, {"name": "g", "arguments": "{}"}]
        prompt = TEXT.decode(tuple((await worker.wait_for("decode"))[0].decode.token_ids))
        assert '"description": "does f"' in prompt
        assert not (await worker.wait_for("decode"))[0].decode.sampling.HasField("structure")

    async def test_one_call_at_most_is_read_where_no_more_are_wanted(self, hermes: Router) -> None:
        text = '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g"}</tool_call>'
        message, _, _ = await self.said(hermes, text, tools=[tool("f"), tool("g")], parallel_tool_calls=False)
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["f"]

    @pytest.mark.parametrize("text", ["1 <tool", "x <tool_call>{not json}</tool_call> y", "a <tool_call>", "plain"])
    async def test_what_is_no_call_is_content(self, hermes: Router, text: str) -> None:
        message, reason, _ = await self.said(hermes, text, tools=[tool("f")], tool_choice="auto")
        assert (message["content"], reason) == (text, "length")

    async def test_calls_and_their_results_go_into_the_prompt(self, hermes: Router) -> None:
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": None, "tool_calls": [CALLED]},
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
        ]
        _, _, worker = await self.said(hermes, "ok", messages=messages, tools=[tool("f")], tool_choice="none")
        prompt = TEXT.decode(tuple((await worker.wait_for("decode"))[0].decode.token_ids))
        call = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
        assert prompt == f"<user>?<assistant>{call}<tool>42#c1"


class TestOpenApi:
    async def test_the_document_names_every_path_and_every_field_that_is_read(self, router: Router) -> None:
        document = (await call(port(router), "GET", "/openapi.json")).json
        assert document["openapi"].startswith("3.1")
        schemas = document["components"]["schemas"]
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                sent: dict[str, Any] | None = {} if method == "post" else None
                answer = await call(port(router), method.upper(), path.format(model=MODEL), sent)
                assert str(answer.status) in operation["responses"], (method, path)
        for kind in (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody):
            assert schemas[kind.__name__]["properties"].keys() >= set(kind.__struct_fields__)

    async def test_its_ranges_are_those_that_are_checked(self, router: Router) -> None:
        await router.worker("b", answer=ANSWER)
        document = (await call(port(router), "GET", "/openapi.json")).json
        properties = document["components"]["schemas"]["CompletionBody"]["properties"]
        for name in ("temperature", "min_p", "presence_penalty", "frequency_penalty", "n", "seed"):
            schema = next(one for one in properties[name]["anyOf"] if one["type"] != "null")
            low, high = schema["minimum"], schema["maximum"]
            for value in (low - 1, high + 1 if high < 2**62 else 2**64):
                response = await post(router, COMPLETIONS, completion(**{name: value}))
                assert (response.status, response.error["param"]) == (400, name), value
            assert (await post(router, COMPLETIONS, completion(**{name: low}))).status == 200


class TestOtherPaths:
    async def test_models_health_and_version(self, router: Router) -> None:
        async def get(path: str) -> Response:
            return await call(port(router), "GET", path)

        assert (await get("/ping")).status == 200
        assert (await get("/health")).status == 503
        await router.worker("b")
        assert (await get("/health")).status == 200
        (model,) = (await get("/v1/models")).json["data"]
        assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", CONTEXT)
        assert (await get(f"/v1/models/{MODEL}")).json == model
        assert (await get(f"/v1/models/{MODEL}/")).json == model
        missing = await get("/v1/models/no-such")
        assert (missing.status, missing.error["code"]) == (404, "model_not_found")
        assert (await get("/version")).json.keys() == {"version"}

    async def test_metrics_for_get_and_head(self, router: Router) -> None:
        page = await call(port(router), "GET", "/metrics")
        assert b"tandem_requests_queued 0.0" in page.body
        head = await call(port(router), "HEAD", "/metrics")
        assert head.status == 200
        assert int(head.headers["content-length"]) > 0

    async def test_tokenize_and_back(self, router: Router) -> None:
        await router.worker("b")
        said = (await post(router, "/tokenize", {"model": MODEL, "prompt": SAID, "return_token_strs": True})).json
        assert said["tokens"] == list(TEXT.encode(SAID))
        assert (said["count"], said["max_model_len"]) == (len(ANSWER), CONTEXT)
        assert len(said["token_strs"]) == said["count"]
        assert (await post(router, "/detokenize", {"tokens": said["tokens"]})).json == {"prompt": SAID}
        messages = [{"role": "user", "content": "hi"}]
        assert (await post(router, "/tokenize", {"messages": messages})).json["tokens"] == list(
            TEXT.encode("User: hi\nAssistant:")
        )
        wrong = await post(router, "/detokenize", {"tokens": [1, 10**9]})
        assert (wrong.status, wrong.error["param"]) == (400, "tokens[1]")

    async def test_the_request_id_is_echoed_or_made(self, router: Router) -> None:
        response = await call(port(router), "GET", "/ping", x_request_id="mine-1")
        assert response.headers["x-request-id"] == "mine-1"
        for bad in ("x" * 129, "a\tb", "\xff"):
            response = await call(port(router), "GET", "/no-such", x_request_id=bad)
            assert response.status == 404
            assert len(response.headers["x-request-id"]) == 32

    async def test_unknown_paths_and_methods(self, router: Router) -> None:
        for method, path, status in (
            ("GET", "/", 404),
            ("POST", "/v1/embeddings", 404),
            ("GET", COMPLETIONS, 405),
            ("DELETE", "/v1/models", 405),
        ):
            response = await call(port(router), method, path)
            assert response.status == status
            assert path in response.error["message"]


#: (path, body, the field at fault, a word of the message)
BAD: list[tuple[str, dict[str, Any], str, str]] = [
    (COMPLETIONS, completion(model="no-such"), "", "no-such"),
    (COMPLETIONS, {"max_tokens": 3}, "prompt", "missing"),
    (COMPLETIONS, completion(prompt=None), "prompt", "str"),
    (COMPLETIONS, completion(prompt=""), "prompt", "empty"),
    (COMPLETIONS, completion(prompt=[]), "prompt", "empty"),
    (COMPLETIONS, completion(prompt=["ok", ""]), "prompt[1]", "empty"),
    (COMPLETIONS, completion(prompt=[[]]), "prompt[0]", "empty"),
    (COMPLETIONS, completion(prompt=["x", 1]), "prompt", "one kind"),
    (COMPLETIONS, completion(prompt=[1, -1]), "prompt[1]", "0"),
    (COMPLETIONS, completion(prompt=[1, VOCAB]), "prompt[1]", str(VOCAB)),
    (COMPLETIONS, completion(prompt=[1, 2**63 - 1]), "prompt[1]", str(VOCAB)),
    (COMPLETIONS, completion(prompt=[5] * CONTEXT), "prompt", str(CONTEXT)),
    (COMPLETIONS, completion(prompt="the cat " * CONTEXT), "prompt", str(CONTEXT)),
    (COMPLETIONS, completion(prompt=["x"] * 65), "prompt", "64"),
    (COMPLETIONS, completion(n=0), "n", "1"),
    (COMPLETIONS, completion(n=65), "n", "64"),
    (COMPLETIONS, completion(n=10**400), "n", "int"),
    (COMPLETIONS, completion(max_tokens=0), "max_tokens", "1"),
    (COMPLETIONS, completion(max_tokens=-1), "max_tokens", "1"),
    (COMPLETIONS, completion(max_tokens=CONTEXT), "max_tokens", str(CONTEXT)),
    (COMPLETIONS, completion(max_tokens="3"), "max_tokens", "int"),
    (COMPLETIONS, completion(max_tokens=True), "max_tokens", "int"),
    (COMPLETIONS, completion(max_tokens=1.5), "max_tokens", "int"),
    (COMPLETIONS, completion(max_tokens=10**30), "max_tokens", "int"),
    (COMPLETIONS, completion(temperature=-0.1), "temperature", "0"),
    (COMPLETIONS, completion(temperature="hot"), "temperature", "float"),
    (COMPLETIONS, completion(top_p=0), "top_p", "more than 0"),
    (COMPLETIONS, completion(top_k=-2), "top_k", "0"),
    (COMPLETIONS, completion(seed=-1), "seed", "0"),
    (COMPLETIONS, completion(logprobs=21), "logprobs", "20"),
    (COMPLETIONS, completion(stop=["x"] * 17), "stop", "16"),
    (COMPLETIONS, completion(stop=["ok", ""]), "stop[1]", "1"),
    (COMPLETIONS, completion(stop=3), "stop", "str"),
    (COMPLETIONS, completion(stop_token_ids=[VOCAB]), "stop_token_ids[0]", str(VOCAB)),
    (COMPLETIONS, completion(stream="yes"), "stream", "bool"),
    (COMPLETIONS, completion(stream_options={"include_usage": 3}), "stream_options.include_usage", "bool"),
    (COMPLETIONS, completion(echo=True, logprobs=1), "echo", "not supported"),
    (COMPLETIONS, completion(suffix="x"), "suffix", "not supported"),
    (COMPLETIONS, completion(best_of=2), "best_of", "not supported"),
    (COMPLETIONS, completion(logit_bias={"5": 1}), "logit_bias", "not supported"),
    (COMPLETIONS, completion(prompt_logprobs=1), "prompt_logprobs", "not supported"),
    (CHAT, {"model": MODEL}, "messages", "missing"),
    (CHAT, chat(messages=[]), "messages", "empty"),
    (CHAT, chat(messages="hi"), "messages", "array"),
    (CHAT, chat(messages=[{"content": "x"}]), "messages[0].role", "missing"),
    (CHAT, chat(messages=[{"role": "user"}]), "messages[0].content", "missing"),
    (CHAT, chat(messages=[{"role": "king", "content": "x"}]), "messages[0].role", "king"),
    (CHAT, chat(messages=[{"role": "tool", "content": "x"}]), "messages[0]", "template"),
    (CHAT, chat(messages=[{"role": "assistant", "tool_calls": [CALLED]}]), "messages[0]", "template"),
    (CHAT, chat(messages=[{"role": "assistant", "tool_calls": [{}]}]), "messages[0].tool_calls[0].function", "missing"),
    (CHAT, chat(messages=[{"role": "user", "tool_calls": [CALLED]}]), "messages[0].tool_calls", "assistant"),
    (
        CHAT,
        chat(messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}]),
        "messages[0].tool_calls[0].function.arguments",
        "JSON object",
    ),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "messages[0].content[0].type",
        "image",
    ),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text", "missing"),
    (CHAT, chat(messages=[{"role": "user", "content": "the cat " * CONTEXT}]), "messages", str(CONTEXT)),
    (CHAT, chat(tools=[{"type": "function"}]), "tools[0].function", "missing"),
    (CHAT, chat(tools=[{"type": "retrieval"}]), "tools[0].type", "retrieval"),
    (CHAT, chat(tools=[TOOL]), "tool_choice", "'auto' is not supported with this model"),
    (CHAT, chat(tools=[TOOL, TOOL], tool_choice="required"), "tools", "same name"),
    (CHAT, chat(tools=[TOOL], tool_choice=NAMED, response_format=JSON), "tool_choice", "together"),
    (CHAT, chat(tools=[TOOL], tool_choice={**NAMED, "function": {"name": "g"}}), "tool_choice.function.name", "'g'"),
    (CHAT, chat(tools=[TOOL], tool_choice="sometimes"), "tool_choice", "sometimes"),
    (CHAT, chat(tools=[TOOL], tool_choice=NAMED), "tool_choice", "not supported by this model's engine"),
    (CHAT, chat(tool_choice="required"), "tool_choice", "needs tools"),
    (CHAT, chat(response_format=JSON), "response_format", "not supported by this model's engine"),
    (CHAT, chat(response_format={"type": "xml"}), "response_format.type", "xml"),
    (CHAT, chat(response_format={"type": "json_schema"}), "response_format.json_schema.schema", "missing"),
    (CHAT, chat(structured_outputs={"regex": "a"}), "structured_outputs", "not supported by this model's engine"),
    (CHAT, chat(structured_outputs={}), "structured_outputs", "exactly one"),
    (CHAT, chat(structured_outputs={"regex": "a", "json": {}}), "structured_outputs", "exactly one"),
    (CHAT, chat(structured_outputs={"choice": []}), "structured_outputs.choice", "1"),
    (CHAT, chat(structured_outputs={"structural_tag": "x"}), "structured_outputs.structural_tag", "not supported"),
    (CHAT, chat(structured_outputs={"regex": "a"}, response_format=JSON), "structured_outputs", "together"),
    (COMPLETIONS, completion(guided_json={}, guided_regex="a"), "guided_regex", "not supported"),
    (COMPLETIONS, completion(logit_bias={"x": 1}), "logit_bias[x]", "token id"),
    (COMPLETIONS, completion(logit_bias={"5": "x"}), "logit_bias[...]", "float"),
    (CHAT, chat(audio={"voice": "x"}), "audio", "not supported"),
    (CHAT, chat(modalities=["audio"]), "modalities", "not supported"),
    (CHAT, chat(logprobs=3), "logprobs", "bool"),
    (CHAT, chat(top_logprobs=3), "top_logprobs", "logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "logprobs", "20"),
    ("/tokenize", {}, "prompt", "either"),
    ("/tokenize", {"prompt": "x", "messages": []}, "prompt", "either"),
    ("/tokenize", {"prompt": ""}, "prompt", "empty"),
    ("/detokenize", {"tokens": [-1]}, "tokens[0]", "0"),
]
NOT_JSON = [
    b"",
    b"{",
    b"nonsense",
    b"[]",
    b"null",
    b'"x"',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": ' + b"[" * 100_000,
]


@pytest_asyncio.fixture(scope="class", loop_scope="class")
async def serving() -> AsyncIterator[Router]:
    """One router for all bad input, which must be up at the end."""
    limits = RequestLimits(message_bytes_max=BODY_BYTES_MAX)
    http = HttpLimits(read_timeout_s=3.0, head_bytes_max=20_000)
    async with running(http_port=0, requests=limits, http=http) as router:
        await router.worker("b", answer=ANSWER)
        yield router
        assert (await post(router, COMPLETIONS, completion())).status == 200
        status = await router.is_idle()
        assert sum(status.outcomes.values()) == 1, "bad input never reaches the core"


class TestBadInput:
    @pytest.mark.asyncio(loop_scope="class")
    @pytest.mark.parametrize(("path", "body", "field", "names"), BAD, ids=lambda value: str(value)[:60])
    async def test_is_refused_naming_the_field(
        self, serving: Router, path: str, body: dict[str, Any], field: str, names: str
    ) -> None:
        for stream in (False, True):
            response = await post(serving, path, {"stream": stream, **body} if path.startswith("/v1") else body)
            assert response.status == (400 if field else 404)
            error = response.error
            assert (error["param"] or "") == field
            assert names in error["message"]
            assert error["type"] == ("invalid_request_error" if field else "not_found")
            assert error["code"]

    @pytest.mark.asyncio(loop_scope="class")
    @pytest.mark.parametrize("data", NOT_JSON, ids=lambda data: repr(data[:40]))
    async def test_what_is_no_json_object_is_refused(self, serving: Router, data: bytes) -> None:
        for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
            response = await post(serving, path, data)
            assert response.status == 400
            assert response.error["type"] == "invalid_request_error"

    @pytest.mark.asyncio(loop_scope="class")
    async def test_a_prompt_too_long_has_the_code_that_clients_look_for(self, serving: Router) -> None:
        for body in (completion(prompt=[5] * CONTEXT), completion(max_tokens=CONTEXT)):
            assert (await post(serving, COMPLETIONS, body)).error["code"] == "context_length_exceeded"

    @pytest.mark.asyncio(loop_scope="class")
    @pytest.mark.parametrize("said", ["soon", "nan", "inf", ""])
    async def test_a_timeout_must_be_a_number(self, serving: Router, said: str) -> None:
        if said:
            response = await post(serving, COMPLETIONS, completion(), x_tandem_timeout_s=said)
            assert (response.status, response.error["param"]) == (400, "x-tandem-timeout-s")
        response = await post(serving, COMPLETIONS, completion(), x_tandem_timeout_s="-1")
        assert (response.status, response.headers["x-should-retry"]) == (504, "false")

    @pytest.mark.asyncio(loop_scope="class")
    async def test_a_body_past_the_limit_is_refused_with_the_limit(self, serving: Router) -> None:
        response = await post(serving, COMPLETIONS, b" " * (BODY_BYTES_MAX + 1))
        assert response.status == 413
        assert str(BODY_BYTES_MAX) in response.error["message"]
        assert response.headers["connection"] == "close"

    @pytest.mark.asyncio(loop_scope="class")
    async def test_a_body_past_what_fits_the_models_context_is_refused_with_the_reason(self) -> None:
        async with running(http_port=0) as router:
            await router.worker("b", answer=ANSWER)
            said = json.dumps(completion()).encode()
            response = await post(router, COMPLETIONS, said + b" " * (1 << 20))
            assert response.status == 200
            response = await post(router, COMPLETIONS, said + b" " * (2 << 20))
            assert response.status == 413
            assert "context" in response.error["message"]

    @pytest.mark.asyncio(loop_scope="class")
    async def test_a_body_that_never_ends_is_refused_while_it_comes(self, serving: Router) -> None:
        async with connected(port(serving)) as connection:
            await connection.send("POST", COMPLETIONS, None, content_length=None, transfer_encoding="chunked")

            async def pour() -> None:
                while True:
                    connection.writer.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
                    await connection.writer.drain()

            pouring = asyncio.create_task(pour())
            assert (await connection.response()).status == 413
            pouring.cancel()
            await asyncio.gather(pouring, return_exceptions=True)

    @pytest.mark.asyncio(loop_scope="class")
    async def test_a_client_that_waits_to_be_asked_for_a_body_too_large_is_told_at_once(self, serving: Router) -> None:
        async with connected(port(serving)) as connection:
            await connection.send("POST", COMPLETIONS, None, content_length="999999999", expect="100-continue")
            assert (await connection.response()).status == 413

    @pytest.mark.asyncio(loop_scope="class")
    async def test_a_body_that_does_not_come_times_out(self, serving: Router) -> None:
        async with connected(port(serving)) as connection:
            await connection.send("POST", COMPLETIONS, b'{"prompt"', content_length="100")
            response = await connection.response()
            assert (response.status, response.error["code"]) == (408, "body_too_slow")
            assert await connection.reader.read() == b""

    @pytest.mark.asyncio(loop_scope="class")
    @pytest.mark.parametrize("sent", [b"", b"POST /v1/compl", b"POST / HTTP/1.1\r\nhost: x\r\n"])
    async def test_a_head_that_does_not_come_times_out(self, serving: Router, sent: bytes) -> None:
        async with connected(port(serving)) as connection:
            connection.writer.write(sent)
            assert (await connection.response()).status == 408
            assert await connection.reader.read() == b""

    @pytest.mark.asyncio(loop_scope="class")
    async def test_a_head_too_large_is_refused(self, serving: Router) -> None:
        async with connected(port(serving)) as connection:
            connection.writer.write(b"GET /ping HTTP/1.1\r\n")
            for number in range(21):
                connection.writer.write(b"x-%d: " % number + b"x" * 1000 + b"\r\n")
                await connection.writer.drain()
                await asyncio.sleep(0)
            response = await connection.response()
            assert (response.status, response.error["code"]) == (431, "head_too_large")

    @pytest.mark.asyncio(loop_scope="class")
    @pytest.mark.parametrize(
        "sent",
        [
            b"nonsense\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET /ping HTTP/1.1\r\nno colon\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\nabc",
            b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org\r\n\r\n",
        ],
        ids=lambda sent: repr(sent[:30]),
    )
    async def test_what_is_not_http_is_refused_and_cut_off(self, serving: Router, sent: bytes) -> None:
        async with connected(port(serving)) as connection:
            connection.writer.write(sent)
            response = await connection.response()
            assert response.status in (400, 404)
            assert response.error["message"]


async def test_no_body_makes_a_fault_of_ours() -> None:
    random = Random(11)
    fields = ["model", "prompt", "messages", "tokens", *(name for _, body, *_ in BAD for name in body)]
    values: list[Any] = [
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**63,
        10**40,
        0.5,
        1e308,
        -1e-308,
        "",
        "x",
        "\u0000",
        "😀",
    ]
    values += [[], {}, [None], [""], ["x"], [5], [[5]], [[]], [5, "x"], [{}], {"x": 1}, {"include_usage": True}, MODEL]
    values += [[{"role": "user", "content": "hi"}], [{"role": "user", "content": [{"type": "text", "text": 3}]}]]
    valid: dict[str, dict[str, Any]] = {
        COMPLETIONS: {"prompt": "x"},
        CHAT: {"messages": [{"role": "user", "content": "hi"}]},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [5]},
    }
    async with running(http_port=0) as router:
        await router.worker("b")
        async with connected(port(router)) as connection:
            for _ in range(2000):
                path, body = random.choice(list(valid.items()))
                wrong = {random.choice(fields): random.choice(values) for _ in range(random.randint(1, 3))}
                await connection.send("POST", path, {**body, **wrong}, x_tandem_timeout_s="0.001")
                response = await connection.response()
                assert response.status in (200, 400, 404, 504), (wrong, response)
                assert response.status == 200 or response.error["message"]
        await router.is_idle()


class TestCallers:
    @pytest_asyncio.fixture
    async def key(self, tmp_path: Path) -> str:
        with keys.editing(tmp_path / "keys.json", tmp_path / "pepper") as editor:
            store, _, key = editor.store.create(editor.pepper, "acme", time.time(), env="test")
            editor.save(store)
        (tmp_path / "tenants.toml").write_text("[tenants.acme]\n")
        return key

    async def test_are_who_their_keys_say(self, tmp_path: Path, key: str) -> None:
        auth = AuthConfig(mode="keys", keys_file=str(tmp_path / "keys.json"))
        async with running(http_port=0, auth=auth, tenants_file=str(tmp_path / "tenants.toml")) as router:
            worker = await router.worker("b", answer=ANSWER)
            for authorization in (None, "Bearer nonsense", "Basic abc"):
                for method, path in (
                    ("POST", COMPLETIONS),
                    ("POST", CHAT),
                    ("POST", "/tokenize"),
                    ("POST", "/detokenize"),
                    ("GET", "/v1/models"),
                    ("GET", f"/v1/models/{MODEL}"),
                    ("GET", "/v1/models/no-such"),
                    ("GET", "/metrics"),
                ):
                    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "tokens": [5]}
                    if path == "/tokenize":
                        del body["messages"]
                    sent = body if method == "POST" else None
                    response = await call(port(router), method, path, sent, authorization=authorization)
                    assert (response.status, response.error["type"]) == (401, "authentication_error")
            for path in ("/health", "/ping", "/version"):
                assert (await call(port(router), "GET", path)).status == 200
            bearer = f"Bearer {key}"
            assert (await post(router, COMPLETIONS, completion(), authorization=bearer)).status == 200
            (order,) = await worker.wait_for("decode")
            assert order.decode.tenant == "acme"
            metrics = await call(port(router), "GET", "/metrics", authorization=bearer)
            assert (metrics.status, metrics.error["type"]) == (403, "permission_error")


class TestRates:
    async def test_what_is_left_is_said_with_every_answer_and_a_refusal_says_when(self, tmp_path: Path) -> None:
        with keys.editing(tmp_path / "keys.json", tmp_path / "pepper") as editor:
            store, _, key = editor.store.create(editor.pepper, "acme", time.time(), env="test")
            editor.save(store)
        limits = "requests_per_minute = 6\ntokens_per_minute = 60000\nburst_s = 30.0"
        (tmp_path / "tenants.toml").write_text(f"[tenants.acme]\n{limits}\n")
        auth = AuthConfig(mode="keys", keys_file=str(tmp_path / "keys.json"))
        async with running(http_port=0, auth=auth, tenants_file=str(tmp_path / "tenants.toml")) as router:
            await router.worker("b", answer=ANSWER)
            bearer = f"Bearer {key}"
            for left, stream in ((2, False), (1, True), (0, True)):
                response = await post(router, COMPLETIONS, completion(stream=stream), authorization=bearer)
                assert response.status == 200
                said = {name: value for name, value in response.headers.items() if name.startswith("x-ratelimit-")}
                assert said["x-ratelimit-limit-requests"] == "6"
                assert said["x-ratelimit-remaining-requests"] == str(left)
                reset_s = int(said["x-ratelimit-reset-requests"].removesuffix("s"))
                assert 10 * (2 - left) < reset_s <= 10 * (3 - left)
                assert said["x-ratelimit-limit-tokens"] == "60000"
                assert 29_000 < int(said["x-ratelimit-remaining-tokens"]) < 30_000
            refused = await post(router, COMPLETIONS, completion(), authorization=bearer)
            assert (refused.status, refused.error["type"]) == (429, "rate_limit_error")
            assert refused.error["code"] == "requests_per_minute"
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"
            assert 0 < int(refused.headers["retry-after-ms"]) <= 10_000
            assert 1 <= int(refused.headers["retry-after"]) <= 10

    async def test_without_limits_nothing_is_said_of_them(self, router: Router) -> None:
        await router.worker("b", answer=ANSWER)
        headers = (await post(router, COMPLETIONS, completion())).headers
        assert not any(name.startswith("x-ratelimit") for name in headers)
        assert headers["x-request-id"]


class TestEnds:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("tokens_before", [0, 5])
    async def test_a_client_that_leaves_frees_both_sides(
        self, router: Router, stream: bool, tokens_before: int
    ) -> None:
        prefill, decode = await router.pair(ANSWER)
        prefill.serving = bool(tokens_before)
        decode.pause_at = 8
        async with connected(port(router)) as connection:
            await connection.send("POST", COMPLETIONS, completion(stream=stream))
            await prefill.wait_for("prefill")
            if tokens_before:
                await decode.wait_for("decode")
            if tokens_before and stream:
                assert (await connection.head()).status == 200
                await connection.chunk()
        await (decode if tokens_before else prefill).wait_for("cancel")
        status = await router.is_idle()
        assert dict(status.outcomes)["cancelled"] == 1

    async def test_of_many_answers_all_are_cancelled(self, router: Router) -> None:
        worker = await router.worker("b", answer=ANSWER)
        worker.pause_at = 5
        async with connected(port(router)) as connection:
            await connection.send("POST", CHAT, chat(n=4, stream=True))
            await worker.wait_for("decode", 4)
        await worker.wait_for("cancel", 4)
        assert dict((await router.is_idle()).outcomes)["cancelled"] == 4

    async def test_the_headers_deadline_ends_it(self, router: Router) -> None:
        worker = await router.worker("b")
        response = await post(router, COMPLETIONS, completion(stream=True), x_tandem_timeout_s="1")
        assert (response.status, response.error["type"]) == (504, "timeout")
        await worker.wait_for("cancel")

    async def test_an_error_after_the_first_byte_is_an_event(self, router: Router) -> None:
        worker = await router.worker("b", answer=ANSWER)
        worker.pause_at = 5
        response = await post(router, COMPLETIONS, completion(stream=True), x_tandem_timeout_s="1")
        assert response.status == 200
        *chunks, error = response.events
        assert chunks
        assert error["error"]["code"] == "deadline_exceeded"

    async def test_without_workers_it_says_when_to_come_back(self) -> None:
        async with running(http_port=0, limits=CoreLimits(path_wait_s=0.0)) as router:
            response = await post(router, COMPLETIONS, completion(stream=True))
            assert (response.status, response.error["code"]) == (503, "no_workers")
            assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("1", "1000")

    async def test_a_full_queue_is_429_with_a_time_for_streams_too(self) -> None:
        async with running(http_port=0, limits=CoreLimits(queue_requests_max=1)) as router:
            await router.worker("b", capacity={"decode_legs": 1})
            legs = (await router.status()).workers[0].capacity.decode_legs
            async with connected(port(router)) as connection:
                await connection.send("POST", COMPLETIONS, completion(n=legs + 1))
                await router.until(lambda status: status.requests_queued == 1)
                for stream in (False, True):
                    response = await post(router, COMPLETIONS, completion(stream=stream))
                    assert (response.status, response.error["type"]) == (429, "rate_limit_error")
                    assert int(response.headers["retry-after-ms"]) > 0

    async def test_a_decode_worker_lost_in_mid_stream_does_not_break_the_text(self, router: Router) -> None:
        _, decode = await router.pair(ANSWER)
        decode.pause_at = len(ANSWER) // 2
        async with connected(port(router)) as connection:
            await connection.send("POST", COMPLETIONS, completion(stream=True))
            await router.until(lambda status: any(it.completion_tokens == decode.pause_at for it in status.requests))
            await router.leave(decode)
            await router.worker("d2", DECODE, answer=ANSWER)
            events = (await connection.response()).events
        assert "".join(event["choices"][0]["text"] for event in events) == SAID

    async def test_a_client_that_never_reads_is_cut_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        create = socket.create_server

        def create_small(*arguments: Any, **options: Any) -> socket.socket:
            """The kernel keeps little for who does not read."""
            listener = create(*arguments, **options)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            return listener

        monkeypatch.setattr(socket, "create_server", create_small)
        answer = (300, 301, 302, 303) * 900
        http = HttpLimits(write_timeout_s=0.5)
        async with running(http_port=0, http=http, requests=RequestLimits(stream_tokens_max=128)) as router:
            await router.worker("b", answer=answer)
            async with connected(port(router), receive_bytes=4096) as connection:
                transport: Any = connection.writer.transport
                transport.pause_reading()
                many = [[5]] * 12
                body = completion(prompt=many, max_tokens=len(answer), stream=True)
                await connection.send("POST", COMPLETIONS, body)
                status = await router.until(lambda status: sum(status.outcomes.values()) == len(many))
                assert status.outcomes["finished"] < len(many)
                transport.resume_reading()
                with pytest.raises((ConnectionError, EOFError, ValueError, AssertionError)):
                    _ = (await connection.response()).events
            await router.is_idle()

    async def test_an_old_connection_is_closed_after_its_answer(self) -> None:
        age_s = 0.5
        async with running(http_port=0, connection_age_s_max=age_s) as router:
            await router.worker("b", answer=ANSWER)
            opened = time.monotonic()
            async with connected(port(router)) as connection:
                closes = False
                while not closes:
                    await connection.send("POST", COMPLETIONS, completion(stream=True))
                    response = await connection.response()
                    assert "".join(event["choices"][0]["text"] for event in response.events) == SAID
                    closes = response.headers.get("connection") == "close"
                assert time.monotonic() - opened > 0.8 * age_s
                assert await connection.reader.read() == b""

    async def test_one_connection_serves_many_requests(self, router: Router) -> None:
        await router.worker("b", answer=ANSWER)
        async with connected(port(router)) as connection:
            for stream in (True, False, True):
                await connection.send("POST", COMPLETIONS, completion(stream=stream))
                assert (await connection.response()).status == 200

    async def test_a_stopping_router_tells_the_clients_it_has(self) -> None:
        async with running(http_port=0) as router:
            worker = await router.worker("b", answer=ANSWER)
            worker.pause_at = 5
            async with connected(port(router)) as connection:
                await connection.send("POST", COMPLETIONS, completion(stream=True))
                assert (await connection.head()).status == 200
                body = await connection.chunk()
                router.stop.set()
                while chunk := await connection.chunk():
                    body += chunk
                *_, error = Response(200, {}, body).events
                assert error["error"]["type"] == "service_unavailable"


async def test_many_at_once_each_get_their_own_answer() -> None:
    async with running(http_port=0) as router:
        await router.pair(ANSWER)
        responses = await asyncio.gather(*(post(router, COMPLETIONS, completion(stream=True)) for _ in range(40)))
        for response in responses:
            assert "".join(event["choices"][0]["text"] for event in response.events) == SAID
        assert len({response.events[0]["id"] for response in responses}) == 40


async def test_no_more_connections_than_allowed() -> None:
    async with running(http_port=0, http=HttpLimits(connections_max=1)) as router, connected(port(router)) as first:
        await first.send("GET", "/ping")
        assert (await first.response()).status == 200
        async with connected(port(router)) as second:
            second.writer.write(b"GET /ping HTTP/1.1\r\n\r\n")
            with pytest.raises((ConnectionError, EOFError)):
                await second.response()
        await first.send("GET", "/ping")
        assert (await first.response()).status == 200


async def test_a_taken_port_is_said() -> None:
    from router.main import PortTaken

    async with running(http_port=0) as router:
        with pytest.raises(PortTaken, match="http_port"):
            async with running(http_port=port(router)):
                pass


class TestSdk:
    """The SDK that most clients are written with, where it is installed (vLLM brings it)."""

    @pytest_asyncio.fixture
    async def client(self, router: Router) -> AsyncIterator[Any]:
        openai = pytest.importorskip("openai")
        base_url = f"http://127.0.0.1:{port(router)}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=WAIT_S) as client:
            yield client

    async def test_completions(self, router: Router, client: Any) -> None:
        await router.pair(ANSWER)
        whole = await client.completions.create(model=MODEL, prompt="x", max_tokens=len(ANSWER))
        assert (whole.choices[0].text, whole.usage.completion_tokens) == (SAID, len(ANSWER))
        stream = await client.completions.create(model=MODEL, prompt="x", max_tokens=len(ANSWER), stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == SAID

    async def test_chat(self, router: Router, client: Any) -> None:
        await router.pair(ANSWER)
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": len(ANSWER)}
        whole = await client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == SAID
        stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == SAID
        assert chunks[-1].usage.completion_tokens == len(ANSWER)

    async def test_models(self, router: Router, client: Any) -> None:
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL

    async def test_errors_are_its_own_classes(self, router: Router, client: Any) -> None:
        import openai

        with pytest.raises(openai.InternalServerError) as nobody:
            await client.completions.create(model=MODEL, prompt="x")
        assert (nobody.value.status_code, nobody.value.code) == (503, "no_workers")
        await router.worker("b")
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="no-such", prompt="x")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model=MODEL, prompt="x", temperature=3)
        assert bad.value.param == "temperature"
        headers = {"x-tandem-timeout-s": "0.2"}
        with pytest.raises(openai.InternalServerError) as late:
            await client.completions.create(model=MODEL, prompt="x", extra_headers=headers)
        assert late.value.status_code == 504

    async def test_an_error_in_a_stream_is_raised(self, router: Router, client: Any) -> None:
        import openai

        worker = await router.worker("b", answer=ANSWER)
        worker.pause_at = 5
        headers = {"x-tandem-timeout-s": "1"}
        stream = await client.completions.create(
            model=MODEL, prompt="x", max_tokens=len(ANSWER), stream=True, extra_headers=headers
        )
        with pytest.raises(openai.APIError, match="deadline"):
            async for _ in stream:
                pass
