"""Changes to the tenants' file, as `tandem tenant` and operators' calls make them.

The file is a person's: a change touches the lines it is about and leaves comments and order alone. After each change
the whole is read again, as a router would, and only what is valid is written.
"""

from __future__ import annotations

import fcntl
import os
import re
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from router.core.tenant import LANES, Tenant, TenantBook
from router.tenants import book as as_book
from router.toml import to_toml

#: Every field at its default.
NOBODY = Tenant(id="nobody")

_HEADER = re.compile(r"\s*\[")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


class Refused(Exception):
    """What was asked cannot be done; nothing was changed."""


class NoTenant(Refused):
    pass


class TenantExists(Refused):
    pass


def facts(tenant: Tenant) -> dict[str, Any]:
    """Every field, as the file spells it."""
    found: dict[str, Any] = msgspec.to_builtins(tenant)
    found["lanes"] = [lane.value for lane in LANES if lane in tenant.lanes]
    found["pool"] = dict(sorted(tenant.pool))
    found["models"] = sorted(tenant.models) if tenant.models is not None else None
    found["budgets"] = [
        {key: value for key, value in budget.items() if value is not None} for budget in found["budgets"]
    ]
    return found


def values(assignments: Sequence[str]) -> dict[str, Any]:
    """From `KEY=VALUE`: the value as TOML has it, a plain word, or words with commas for a list. None, for an empty
    one, means the default."""
    return parsed(assigned(assignments))


def assigned(assignments: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for assignment in assignments:
        name, equals, raw = assignment.partition("=")
        if not equals:
            raise Refused(f"{assignment}: must be KEY=VALUE")
        found[name.strip()] = raw
    return found


def parsed(fields: Mapping[str, str]) -> dict[str, Any]:
    """The same, of keys and values apart."""
    hints = typing.get_type_hints(Tenant)
    if wrong := [name for name in fields if not _BARE.fullmatch(name)]:
        raise Refused(f"{wrong[0]}: is no name of a field")
    return {name: _value(name, raw.strip(), hints.get(name)) for name, raw in fields.items()}


def _value(name: str, raw: str, hint: object) -> Any:
    if not raw:
        return None
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    if name == "pool":
        pairs = [pair.partition("=") for pair in raw.split(",")]
        return {label.strip(): value.strip() for label, _, value in pairs}
    if "frozenset" in str(hint):
        return [word.strip() for word in raw.split(",")]
    return raw


# --- the tenants' file --------------------------------------------------------------------------------------------


def read(path: Path) -> TenantBook:
    return as_book(tomllib.loads(path.read_text()))


def add(path: Path, name: str, fields: Mapping[str, Any]) -> None:
    if not name or not name.isprintable() or '"' in name or "\\" in name:
        raise Refused(f"{name!r} cannot be a tenant's name")

    def change(text: str, table: dict[str, Any]) -> str:
        tenants = table.setdefault("tenants", {})
        if name in tenants:
            raise TenantExists(f"tenant {name!r} exists; `tandem tenant set` changes it")
        tenants[name] = {key: value for key, value in fields.items() if value is not None}
        section = [f"[tenants.{name if _BARE.fullmatch(name) else to_toml(name)}]"]
        section += [f"{key} = {to_toml(value)}" for key, value in tenants[name].items()]
        return text + ("\n" if text.strip() else "") + "\n".join(section) + "\n"

    _change(path, change)


def change(path: Path, name: str, fields: Mapping[str, Any]) -> None:
    def edit(text: str, table: dict[str, Any]) -> str:
        tenant = _tenant(table, name)
        lines = text.splitlines()
        start, end = _section(lines, name)
        for key, value in fields.items():
            at = next((at for at in range(start + 1, end) if re.match(rf"\s*{re.escape(key)}\s*=", lines[at])), None)
            tenant.pop(key, None)
            written = [] if value is None else [f"{key} = {to_toml(value)}"]
            if value is not None:
                tenant[key] = value
            first, last = (at, at + 1) if at is not None else (_last_said(lines, start, end) + 1,) * 2
            lines[first:last] = written
            end += len(written) - (last - first)
        return "\n".join(lines) + "\n"

    _change(path, edit)


def remove(path: Path, name: str) -> None:
    def edit(text: str, table: dict[str, Any]) -> str:
        _tenant(table, name)
        del table["tenants"][name]
        lines = text.splitlines()
        while (found := _find(lines, name)) is not None:
            start = found
            end = _next_header(lines, start)
            del lines[start : _last_said(lines, start, end) + 1]
        if not table["tenants"] and "tenants" not in tomllib.loads("\n".join(lines)):
            del table["tenants"]
        return "\n".join(lines) + "\n"

    _change(path, edit)


def _change(path: Path, edit: Callable[[str, dict[str, Any]], str]) -> None:
    """`edit` gives the new text, and changes the table to what that must say."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = path.read_text() if path.exists() else ""
        table = tomllib.loads(text)
        changed = edit(text, table)
        try:
            is_meant = tomllib.loads(changed) == table
        except tomllib.TOMLDecodeError:
            is_meant = False
        if not is_meant:
            raise Refused(f"{path}: is written in a way that only a person can change here; edit it by hand")
        as_book(table)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        fresh.write_text(changed)
        if path.exists():
            fresh.chmod(path.stat().st_mode & 0o777)
        fresh.replace(path)


def _tenant(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    if name not in table.get("tenants", {}):
        raise NoTenant(f"there is no tenant {name!r}")
    return table["tenants"][name]


def _section(lines: Sequence[str], name: str) -> tuple[int, int]:
    """The line of the tenant's header, and that after its last."""
    start = _find(lines, name, whole=True)
    if start is None:
        raise Refused(f"tenant {name!r} has no table [tenants.{name}] of its own; edit the file by hand")
    return start, _next_header(lines, start)


def _find(lines: Sequence[str], name: str, *, whole: bool = False) -> int | None:
    """The line of the header of the tenant's table; unless `whole`, one of a table below it will do."""
    spelled = "|".join(re.escape(one) for one in (name, f'"{name}"', f"'{name}'"))
    rest = r"\s*\]\s*(#.*)?" if whole else r"\s*(\.[^\]]*)?\]+\s*(#.*)?"
    header = re.compile(rf"\s*\[{'' if whole else '+'}\s*tenants\s*\.\s*({spelled}){rest}")
    return next((at for at, line in enumerate(lines) if header.fullmatch(line)), None)


def _next_header(lines: Sequence[str], start: int) -> int:
    return next((at for at in range(start + 1, len(lines)) if _HEADER.match(lines[at])), len(lines))


def _last_said(lines: Sequence[str], start: int, end: int) -> int:
    """The last line of a section that is neither empty nor a comment: those may belong to what follows."""
    return max(at for at in range(start, end) if at == start or lines[at].strip() and not _is_comment(lines[at]))


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")
