"""Texts of every script through a whole router, with stop strings at every position.

    python -m tests.fuzz.text [--strings 1000] [--seed 1]

A worker answers each text in steps of a few tokens. What is streamed, joined, must be the whole answer, and with a stop
string what is before its first place; over gRPC and over OpenAI's protocol alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from random import Random

from protos import inference_pb2
from tests.router.http_client import connected
from tests.router.running import MODEL_DIR, Router, Worker, running

_PIECES = (
    *"abc XYZ 019 \n\t\"\\'{}<>&%\0\x7f\u2028\ufeff",
    *"éñßøåÅ" + "e\u0301o\u0308\u0323a\u20dd",
    *"שלוםمرحبا\u202e\u200f\u064b",
    *"漢字仮名カナ한글ไทยहिन्दी",
    *"\u200d\ufe0f\u200b\U0001f3fd\U000e0067",
    "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", "😀", "𝔘", "𠜎", "🧑🏿‍🚀", "❤️",
)  # fmt: skip


def texts(random: Random, count: int) -> list[str]:
    return ["".join(random.choices(_PIECES, k=random.randint(1, 24))) for _ in range(count)]


class Said:
    """A router, a worker that answers a given text, and both protocols to ask by."""

    def __init__(self, router: Router, worker: Worker, port: int) -> None:
        self._router = router
        self._worker = worker
        self._port = port

    def answer(self, text: str, tokens_per_step: int) -> None:
        self._worker.answer = self._router.text.encode(text, special_tokens=False)
        self._worker.tokens_per_step = tokens_per_step

    async def over_grpc(self, stop: str) -> list[str]:
        sampling = inference_pb2.Sampling(
            max_tokens=len(self._worker.answer), temperature=0.0, stop=[stop] if stop else []
        )
        call = self._router.generate(token_ids={"ids": [5]}, sampling=sampling)
        return [message.delta.text async for message in call if message.HasField("delta")]

    async def over_http(self, stop: str, *, stream: bool) -> list[str]:
        body = {"prompt": [5], "max_tokens": len(self._worker.answer), "temperature": 0, "stream": stream}
        async with connected(self._port) as connection:
            await connection.send("POST", "/v1/completions", json.dumps({**body, "stop": stop or None}).encode())
            response = await connection.response()
        said = response.events if stream else [response.json]
        return [event["choices"][0]["text"] for event in said]


async def check(said: Said, text: str, stop: str) -> None:
    expected = text[: text.index(stop)] if stop else text
    pieces = await said.over_grpc(stop)
    assert "".join(pieces) == expected, (text, stop, pieces)
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    for stream in (True, False):
        pieces = await said.over_http(stop, stream=stream)
        assert "".join(pieces) == expected, (text, stop, stream, pieces)


async def run(strings: int, seed: int, *, every_position: bool) -> int:
    """How many answers were asked for."""
    random, asked = Random(seed), 0
    async with running(http_port=0) as router:
        assert router.bound.http_port is not None
        worker = await router.worker("b", answer=(5,))
        said = Said(router, worker, router.bound.http_port)
        for number, text in enumerate(texts(random, strings)):
            assert router.text.decode(router.text.encode(text, special_tokens=False)) == text
            said.answer(text, random.randint(1, 5))
            places = range(len(text)) if every_position else (number % len(text),)
            stops = [text[at : at + random.randint(1, 4)] for at in places]
            for stop in ("", *stops) if every_position or number % 2 else stops:
                await check(said, text, stop)
                asked += 3
    return asked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strings", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    print(f"{MODEL_DIR.name}: {asked.strings} texts, a stop string at every position")
    began = time.monotonic()
    count = asyncio.run(run(asked.strings, asked.seed, every_position=True))
    print(f"ok: {count} answers, each as its text, in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
