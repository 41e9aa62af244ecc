"""Libraries that people build on OpenAI's protocol, unchanged; each prints a whole answer and a streamed one, which are
the same."""

from __future__ import annotations

import json

import pytest

from tests.clients.conftest import http_address, is_idle, node_program, program
from tests.cluster.harness import Cluster

#: Greedy, eight tokens: the library, what it needs, and a program that prints a whole and a streamed answer as JSON.
LIBRARIES = {
    "langchain": (
        ("langchain-openai",),
        """
        import json, sys
        from langchain_openai import ChatOpenAI

        chat = ChatOpenAI(model="tandem-nano", api_key="x", base_url=sys.argv[1], max_tokens=8, temperature=0)
        streamed = list(chat.stream("hello", stream_usage=True))
        assert streamed[-1].usage_metadata or any(one.usage_metadata for one in streamed)
        print(json.dumps([chat.invoke("hello").content, "".join(one.content for one in streamed)]))
        """,
    ),
    "llama-index": (
        ("llama-index-llms-openai-like",),
        """
        import json, sys
        from llama_index.core.llms import ChatMessage
        from llama_index.llms.openai_like import OpenAILike

        said = [ChatMessage(role="user", content="hello")]
        how = {"api_base": sys.argv[1], "api_key": "x", "max_tokens": 8, "temperature": 0, "is_chat_model": True}
        model = OpenAILike(model="tandem-nano", **how)
        streamed = "".join(one.delta or "" for one in model.stream_chat(said))
        print(json.dumps([model.chat(said).message.content, streamed]))
        """,
    ),
    "litellm": (
        ("litellm",),
        """
        import json, sys
        import litellm

        litellm.suppress_debug_info = True  # it goes where answers go

        how = {"api_base": sys.argv[1], "api_key": "x", "max_tokens": 8, "temperature": 0}
        how["messages"] = [{"role": "user", "content": "hello"}]
        whole = litellm.completion("hosted_vllm/tandem-nano", **how).choices[0].message.content
        streamed = litellm.completion("openai/tandem-nano", stream=True, **how)
        print(json.dumps([whole, "".join(one.choices[0].delta.content or "" for one in streamed)]))
        try:
            litellm.completion("openai/no-such", **how)
        except litellm.NotFoundError:
            pass
        else:
            raise AssertionError
        """,
    ),
    "pydantic-ai": (
        ("pydantic-ai-slim[openai]",),
        """
        import asyncio, json, sys
        from pydantic_ai import Agent
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider

        model = OpenAIChatModel("tandem-nano", provider=OpenAIProvider(base_url=sys.argv[1], api_key="x"))
        agent = Agent(model, model_settings={"max_tokens": 8, "temperature": 0})

        async def main():
            whole = (await agent.run("hello")).output
            async with agent.run_stream("hello") as run:
                return [whole, "".join([text async for text in run.stream_text(delta=True)])]

        print(json.dumps(asyncio.run(main())))
        """,
    ),
    "openai-agents": (
        ("openai-agents",),
        """
        import asyncio, json, sys
        from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
        from openai import AsyncOpenAI

        set_tracing_disabled(True)
        client = AsyncOpenAI(base_url=sys.argv[1], api_key="x")
        model = OpenAIChatCompletionsModel(model="tandem-nano", openai_client=client)
        agent = Agent(name="a", model=model, model_settings=ModelSettings(max_tokens=8, temperature=0))

        async def main():
            whole = (await Runner.run(agent, "hello")).final_output
            streamed = Runner.run_streamed(agent, "hello")
            async for _ in streamed.stream_events():
                pass
            return [whole, streamed.final_output]

        print(json.dumps(asyncio.run(main())))
        """,
    ),
}

NODE_LIBRARIES = {
    "openai": (
        ("openai",),
        """
        import OpenAI from "openai";

        const client = new OpenAI({ baseURL: process.argv[2], apiKey: "x", maxRetries: 0 });
        const [{ id: model }] = (await client.models.list()).data;
        const asked = { model, messages: [{ role: "user", content: "hello" }], max_tokens: 8, temperature: 0 };
        const whole = await client.chat.completions.create(asked);
        const stream = client.chat.completions.stream({ ...asked, stream_options: { include_usage: true } });
        const streamed = await stream.finalContent();
        if ((await stream.totalUsage()).completion_tokens !== 8) throw new Error("usage");
        console.log(JSON.stringify([whole.choices[0].message.content, streamed]));
        const gone = await client.chat.completions.create({ ...asked, model: "no-such" }).catch((error) => error);
        if (!(gone instanceof OpenAI.NotFoundError)) throw gone;
        for await (const _ of await client.chat.completions.create({ ...asked, max_tokens: 3000, stream: true })) break;
        """,
    ),
    "ai": (
        ("ai", "@ai-sdk/openai-compatible"),
        """
        import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
        import { generateText, streamText } from "ai";

        const provider = createOpenAICompatible({ name: "t", baseURL: process.argv[2], includeUsage: true });
        const how = { prompt: "hello", maxOutputTokens: 8, temperature: 0, maxRetries: 0 };
        const whole = await generateText({ model: provider("tandem-nano"), ...how });
        const streaming = streamText({ model: provider("tandem-nano"), ...how });
        let streamed = "";
        for await (const text of streaming.textStream) streamed += text;
        if ((await streaming.usage).outputTokens !== 8) throw new Error("usage");
        console.log(JSON.stringify([whole.text, streamed]));
        """,
    ),
}


def same(said: str) -> str:
    whole, streamed = json.loads(said)
    assert whole == streamed
    assert isinstance(whole, str)
    return whole


@pytest.mark.parametrize("library", LIBRARIES)
def test_in_python(serving: Cluster, library: str) -> None:
    needs, text = LIBRARIES[library]
    assert same(program(text, f"{http_address(serving)}/v1", needs=needs))
    assert is_idle(serving)


@pytest.mark.parametrize("library", NODE_LIBRARIES)
def test_in_javascript(serving: Cluster, library: str) -> None:
    needs, text = NODE_LIBRARIES[library]
    assert same(node_program(text, f"{http_address(serving)}/v1", needs=needs))
    assert is_idle(serving)
