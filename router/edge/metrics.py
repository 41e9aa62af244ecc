"""The metrics' port: one page, for whoever reaches it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Receive, Scope, Send

from router.core.errors import NotFound
from router.edge.http_server import ClientGone, Exchange

PAGE_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


class MetricsEdge:
    """An ASGI app. `page` is called on a thread."""

    def __init__(self, page: Callable[[], bytes]) -> None:
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            if exchange.path not in ("/metrics", "/"):
                await exchange.fail(NotFound("path", exchange.path, f"there is no {exchange.path} here"))
                return
            await exchange.reply(await asyncio.to_thread(self._page), kind=PAGE_TYPE)
        except ClientGone:
            pass
