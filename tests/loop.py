"""The event loop, for tests of what happens on it."""

from __future__ import annotations

import asyncio


async def settle(turns: int = 100) -> None:
    """Gives a turn to everything that waits for nothing but turns, however long they take here."""
    for _ in range(turns):
        await asyncio.sleep(0)
