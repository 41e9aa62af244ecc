"""What `tandem tenant` and `tandem key` need beside `router.tenants_edit` and `router.edge.keys`: which files, and how
their refusals are told."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from router.core.tenant import BookRefused
from router.edge.keys import KeysRefused, StoredKey
from router.metering.journal import JournalError
from router.tenants_edit import Refused
from tandem.settings import ConfigError, Given

TENANTS_FILE, KEYS_FILE, PEPPER_FILE = "router.tenants_file", "router.auth.keys_file", "router.auth.pepper_file"
USAGE_LEDGER = "router.usage_ledger"


@dataclass(frozen=True, slots=True)
class KeyFiles:
    store: Path
    pepper: Path


def tenants_file(option: Path | None, given: Mapping[str, Given]) -> Path:
    return option or named(TENANTS_FILE, given)


def key_files(option: Path | None, given: Mapping[str, Given]) -> KeyFiles:
    store = option or named(KEYS_FILE, given)
    pepper = given.get(PEPPER_FILE)
    return KeyFiles(store, Path(pepper.value) if pepper and pepper.value else store.with_name("pepper"))


def named(key: str, given: Mapping[str, Given]) -> Path:
    """The file that a key of the configuration names."""
    if key not in given or not given[key].value:
        raise ConfigError([f"{key}: names no file; set it in the configuration, or pass --file"])
    return Path(given[key].value)


@contextmanager
def refusals() -> Iterator[None]:
    """Every way in which the files refuse, as one."""
    try:
        yield
    except BookRefused as refused:
        raise Refused("\n".join(str(problem) for problem in refused.problems)) from None
    except (KeysRefused, JournalError, tomllib.TOMLDecodeError) as refused:
        raise Refused(str(refused)) from None


def key_facts(key: StoredKey, now: float) -> dict[str, Any]:
    """Without the hash."""
    found: dict[str, Any] = msgspec.to_builtins(key)
    del found["hash"]
    found["scopes"] = sorted(found["scopes"])
    return {**found, "state": key.state(now)}
