"""HTTP as clients of every kind and age speak it: browsers, proxies that speak HTTP/1.0, compressed bodies."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from router.config import HttpLimits, RequestLimits
from router.edge.text import ModelText
from tests.router.http_client import WAIT_S, call, connected
from tests.router.running import MODEL, MODEL_DIR, Router, running

COMPLETIONS = "/v1/completions"
BODY_BYTES_MAX = 10_000
ANSWER = ModelText(MODEL_DIR).encode("a = 1", special_tokens=False)
ASKED = json.dumps({"model": MODEL, "prompt": "x = 1", "max_tokens": len(ANSWER)}).encode()
PAGE = "https://chat.example"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving() -> AsyncIterator[Router]:
    limits = RequestLimits(message_bytes_max=BODY_BYTES_MAX)
    async with running(http_port=0, requests=limits, http=HttpLimits(origins=(PAGE,))) as router:
        await router.worker("b", answer=ANSWER)
        yield router


def port(router: Router) -> int:
    assert router.bound.http_port is not None
    return router.bound.http_port


class TestBrowsers:
    @pytest.mark.parametrize("origin", [PAGE, "http://localhost:3000", "http://127.0.0.1", "https://[::1]:8443"])
    async def test_a_page_that_may_asks_first_and_then_reads(self, serving: Router, origin: str) -> None:
        asked = await call(
            port(serving),
            "OPTIONS",
            COMPLETIONS,
            origin=origin,
            access_control_request_method="POST",
            access_control_request_headers="authorization,content-type,x-stainless-os",
        )
        assert (asked.status, asked.body) == (200, b"")
        assert asked.headers["access-control-allow-origin"] == origin
        assert asked.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
        assert "post" in asked.headers["access-control-allow-methods"]
        answered = await call(port(serving), "POST", COMPLETIONS, ASKED, origin=origin)
        assert answered.status == 200
        assert answered.headers["access-control-allow-origin"] == origin
        assert answered.headers["vary"] == "origin"
        refused = await call(port(serving), "POST", COMPLETIONS, b"{}", origin=origin)
        assert (refused.status, refused.headers["access-control-allow-origin"]) == (400, origin)

    @pytest.mark.parametrize(
        "origin", ["https://evil.example", "null", "http://localhost.evil.example", PAGE + ":1", "http://localhost:"]
    )
    async def test_any_other_page_gets_no_leave(self, serving: Router, origin: str) -> None:
        for method, body in (("OPTIONS", None), ("POST", ASKED)):
            response = await call(port(serving), method, COMPLETIONS, body, origin=origin)
            assert "access-control-allow-origin" not in response.headers

    async def test_everybodys_page_if_so_configured(self) -> None:
        async with running(http_port=0, http=HttpLimits(origins=("*",))) as router:
            response = await call(port(router), "GET", "/ping", origin="https://any.example")
            assert response.headers["access-control-allow-origin"] == "*"

    async def test_who_names_no_page_hears_nothing_of_it(self, serving: Router) -> None:
        response = await call(port(serving), "GET", "/ping")
        assert not {name for name in response.headers if name.startswith("access-control") or name == "vary"}

    @pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/", "", "https://*.example"])
    async def test_what_is_no_origin_is_no_configuration(self, origin: str) -> None:
        (problem,) = HttpLimits(origins=(origin,)).problems()
        assert "http.origins" in problem


class TestMethodsAndPaths:
    async def test_a_wrong_method_is_told_the_right_ones(self, serving: Router) -> None:
        for method, path, allowed in (
            ("PUT", COMPLETIONS, "post, options"),
            ("POST", "/v1/models", "get, head, options"),
            ("DELETE", "/v1/models/nano", "get, head, options"),
        ):
            response = await call(port(serving), method, path)
            assert (response.status, response.headers["allow"]) == (405, allowed)

    async def test_options_tells_them_too(self, serving: Router) -> None:
        response = await call(port(serving), "OPTIONS", "/health")
        assert (response.status, response.headers["allow"]) == (200, "get, head, options")
        assert (await call(port(serving), "OPTIONS", "/nowhere")).status == 404

    @pytest.mark.parametrize("path", ["/v1/models/", "/v1/models?limit=1", "http://proxied.example/v1/models"])
    async def test_a_path_may_be_written_in_several_ways(self, serving: Router, path: str) -> None:
        response = await call(port(serving), "GET", path)
        assert [one["id"] for one in response.json["data"]] == [MODEL]


class TestEncodings:
    @pytest.mark.parametrize(
        ("encoding", "data"),
        [
            ("gzip", gzip.compress(ASKED)),
            ("GZIP", gzip.compress(ASKED)),
            ("x-gzip", gzip.compress(ASKED)),
            ("deflate", zlib.compress(ASKED)),
            ("identity", ASKED),
        ],
    )
    async def test_a_body_may_be_compressed(self, serving: Router, encoding: str, data: bytes) -> None:
        response = await call(port(serving), "POST", COMPLETIONS, data, content_encoding=encoding)
        assert response.status == 200

    @pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "nonsense"])
    async def test_any_other_encoding_is_refused_with_those_that_are_known(
        self, serving: Router, encoding: str
    ) -> None:
        response = await call(port(serving), "POST", COMPLETIONS, ASKED, content_encoding=encoding)
        assert (response.status, response.error["code"]) == (415, "unsupported_media_type")
        assert response.headers["accept-encoding"] == "gzip, deflate"

    async def test_a_bomb_is_as_large_as_what_comes_out_of_it(self, serving: Router) -> None:
        data = gzip.compress(b" " * 50_000_000)
        assert len(data) > BODY_BYTES_MAX
        small = gzip.compress(b" " * (BODY_BYTES_MAX + 1))
        for bomb in (data, small):
            response = await call(port(serving), "POST", COMPLETIONS, bomb, content_encoding="gzip")
            assert response.status == 413

    @pytest.mark.parametrize("data", [ASKED, gzip.compress(ASKED)[:-9], b""])
    async def test_what_is_not_what_it_says_is_refused(self, serving: Router, data: bytes) -> None:
        response = await call(port(serving), "POST", COMPLETIONS, data, content_encoding="gzip")
        assert (response.status, response.error["param"]) == (400, "body")

    async def test_a_byte_order_mark_is_no_part_of_it(self, serving: Router) -> None:
        response = await call(port(serving), "POST", COMPLETIONS, b"\xef\xbb\xbf" + ASKED)
        assert response.status == 200


class TestHistories:
    """Answers go back as they came, whoever keeps them."""

    async def test_an_answer_that_refused_is_text(self, serving: Router) -> None:
        texts: list[list[int]] = []
        ways: list[dict[str, Any]] = [
            {"content": "no"},
            {"content": None, "refusal": "no"},
            {"refusal": "no"},
            {"content": [{"type": "refusal", "refusal": "no"}]},
            {"content": "no", "refusal": None, "annotations": [], "audio": None, "function_call": None},
        ]
        for said in ways:
            history = [{"role": "user", "content": "go"}, {"role": "assistant", **said}]
            response = await call(port(serving), "POST", "/tokenize", {"messages": history})
            texts.append(response.json["tokens"])
        assert texts == texts[:1] * 5

    @pytest.mark.parametrize(
        ("said", "field"),
        [
            ({"role": "user", "refusal": "no"}, "messages[0].content"),
            ({"role": "assistant", "content": None}, "messages[0].content"),
            ({"role": "assistant", "content": [{"type": "refusal"}]}, "messages[0].content[0].refusal"),
        ],
    )
    async def test_one_without_anything_in_it_is_refused(self, serving: Router, said: object, field: str) -> None:
        response = await call(port(serving), "POST", "/tokenize", {"messages": [said]})
        assert (response.status, response.error["param"]) == (400, field)


class TestNumbers:
    async def test_are_told_as_they_were_written(self, serving: Router) -> None:
        body = json.loads(ASKED) | {"max_tokens": 99_999_999}
        response = await call(port(serving), "POST", COMPLETIONS, body)
        assert response.error["message"].endswith("is 99999999")


class TestHttp10:
    """As proxies and old load generators speak it: no chunks, and the end of the connection is the end of a stream."""

    @staticmethod
    async def ask(serving: Router, body: bytes) -> tuple[bytes, bytes]:
        async with connected(port(serving)) as connection, asyncio.timeout(WAIT_S):
            head = f"POST {COMPLETIONS} HTTP/1.0\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.writer.write(head.encode() + body)
            headers, _, rest = (await connection.reader.read()).partition(b"\r\n\r\n")
            return headers, rest

    async def test_a_stream_ends_with_its_connection(self, serving: Router) -> None:
        headers, said = await self.ask(serving, json.dumps(json.loads(ASKED) | {"stream": True}).encode())
        assert b"transfer-encoding" not in headers
        assert b"connection: close" in headers
        *events, done, end = said.split(b"\n\n")
        assert (done, end) == (b"data: [DONE]", b"")
        texts = [json.loads(event.removeprefix(b"data: "))["choices"][0]["text"] for event in events]
        assert "".join(texts) == "a = 1"

    async def test_many_answers_in_one_stream(self, serving: Router) -> None:
        asked = json.loads(ASKED) | {"stream": True, "n": 4, "stream_options": {"include_usage": True}}
        _, said = await self.ask(serving, json.dumps(asked).encode())
        *_, usage, done, _ = said.split(b"\n\n")
        assert done == b"data: [DONE]"
        assert json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"] == 4 * len(ANSWER)

    async def test_a_whole_answer_and_a_refusal(self, serving: Router) -> None:
        headers, said = await self.ask(serving, ASKED)
        assert headers.startswith(b"HTTP/1.1 200")
        assert json.loads(said)["choices"][0]["text"] == "a = 1"
        headers, said = await self.ask(serving, b"{}")
        assert headers.startswith(b"HTTP/1.1 400")
        assert json.loads(said)["error"]["param"] == "prompt"
