"""Values as TOML writes them; the standard library only reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any


def to_toml(value: Any) -> str:
    """One value as TOML would write it."""
    match value:
        case bool():
            return "true" if value else "false"
        case Enum():
            return to_toml(value.value)
        case int() | float():
            return repr(value)
        case str() | Path():
            return json.dumps(str(value), ensure_ascii=False)
        case Mapping():
            return (
                "{ " + ", ".join(f"{json.dumps(k)} = {to_toml(v)}" for k, v in value.items()) + " }" if value else "{}"
            )
        case _:
            return "[" + ", ".join(to_toml(item) for item in value) + "]"
