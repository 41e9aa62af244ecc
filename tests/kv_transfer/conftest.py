from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kv_transfer.nodes import World, world


@pytest.fixture(name="world")
def _world() -> Iterator[World]:
    """Nodes of this process; what they hold is checked and closed at the end."""
    with world() as opened:
        yield opened
