"""Stop strings for gateways that leave them to the engine. Behind a router there are none: its edge owns text."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

#: Tokens decoded before those that a stop string can be in: a few decide how the next ones are written.
_CONTEXT_TOKENS = 8


class Tokenizer(Protocol):
    def decode(self, ids: list[int]) -> str: ...


def load_tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Loaded  # few workers need it

    loaded: Tokenizer = Loaded.from_file(str(folder / "tokenizer.json"))
    return loaded


class StopFinder:
    """Looks at an answer's end, token by token, for the first string that is complete."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...], unmatched_tokens: int) -> None:
        """The first `unmatched_tokens` tokens are not looked at."""
        self._tokenizer = tokenizer
        self._stops = stops
        self._unmatched_tokens = unmatched_tokens
        # No token is shorter than a byte.
        self._tail = max(len(stop.encode()) for stop in stops) + _CONTEXT_TOKENS

    def match(self, token_ids: list[int], new: int) -> tuple[str, int] | None:
        """Which string was completed by one of the `new` last tokens, and how many tokens there are with that one."""
        for end in range(len(token_ids) - new + 1, len(token_ids) + 1):
            text = self._tokenizer.decode(token_ids[max(self._unmatched_tokens, end - self._tail) : end])
            if found := [(text.find(stop), -len(stop), stop) for stop in self._stops if stop in text]:
                return min(found)[2], end
        return None
