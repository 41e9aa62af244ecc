"""Turns text into frozen dataclasses: file < environment < flags, and every value remembers where it came from.

Any dataclass can be a section: its fields are the keys, a field that is itself a dataclass is a section below. So there
is one list of settings, the dataclasses of the processes that use them, and nothing here to keep in step with it.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from router.toml import to_toml as to_toml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

ENV_PREFIX = "TANDEM_"

#: What Kubernetes sets in every pod for a service called `tandem...`: not settings.
_KUBERNETES = re.compile(r"_SERVICE_(HOST|PORT\w*)$|_PORT_\d+_(TCP|UDP)(_\w+)?$")
_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


class ConfigError(Exception):
    """Everything that is wrong, one line each: where it stands, the key, the value, what it may be."""

    def __init__(self, problems: Collection[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Key:
    """One setting: a leaf of a section."""

    #: Dotted, as in the file: `worker.decode.fetch_timeout_s`.
    name: str
    hint: Any
    #: dataclasses.MISSING when it must be given.
    default: Any

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.replace(".", "_").upper()


@dataclass(frozen=True, slots=True)
class Given:
    """A value somebody set, and where: `tandem.toml:12`, `TANDEM_ROUTER_PORT`, `--port`."""

    value: Any
    origin: str


def keys(cls: type[DataclassInstance], prefix: str, skip: Collection[str] = ()) -> Iterator[Key]:
    """The settings of a dataclass as a section called `prefix`; fields in `skip` are not the user's to set."""
    hints = typing.get_type_hints(cls)
    sections: list[tuple[type[DataclassInstance], str]] = []
    for field in dataclasses.fields(cls):
        name, hint = f"{prefix}.{field.name}", hints[field.name]
        if field.name in skip:
            continue
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            sections.append((hint, name))
        else:
            yield Key(name, hint, _default(field))
    for section, name in sections:  # after the leaves, as TOML wants it
        yield from keys(section, name)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def build(
    cls: type[T], prefix: str, given: Mapping[str, Given], fixed: Mapping[str, Any] = types.MappingProxyType({})
) -> T:
    """One section's dataclass. `fixed` holds the fields that are not settings. Raises ConfigError for what the
    dataclass itself refuses, naming the origin where the refusal begins with a key."""
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = dict(fixed)
    for field in dataclasses.fields(cls):
        name, hint = f"{prefix}.{field.name}", hints[field.name]
        if field.name in fixed:
            continue
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            values[field.name] = build(hint, name, given)
        elif name in given:
            values[field.name] = given[name].value
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError([locate(f"{prefix}.{line}", given) for line in str(error).splitlines()]) from None


def locate(problem: str, given: Mapping[str, Given]) -> str:
    """Puts the origin in front of a problem that begins with a key."""
    name = re.match(r"[\w.]*", problem)[0]  # type: ignore[index]  # an empty match is one, too
    return f"{given[name].origin}: {problem}" if name in given else problem


# --- where values come from ---------------------------------------------------------------------------------------


def from_file(path: Path, known: Mapping[str, Key]) -> tuple[dict[str, Given], list[str]]:
    """What a TOML file sets, and what is wrong with it."""
    try:
        text = path.read_text()
        table = tomllib.loads(text)
    except OSError as error:
        return {}, [f"{path}: cannot be read: {error.strerror}"]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return {}, [f"{path}: not TOML: {error}"]
    lines = _lines(text)
    given: dict[str, Given] = {}
    problems: list[str] = []
    for name, raw in _leaves(table, known):
        origin = f"{path}:{lines[name]}" if name in lines else str(path)
        _take(name, raw, origin, known, given, problems)
    return given, problems


def from_environment(
    environ: Mapping[str, str], known: Mapping[str, Key], other: Collection[str]
) -> tuple[dict[str, Given], list[str]]:
    """What `TANDEM_...` variables set. `other` are variables of this prefix that are read elsewhere. An empty variable
    counts as not set."""
    by_env = {key.env: key.name for key in known.values()}
    given: dict[str, Given] = {}
    problems: list[str] = []
    for variable, raw in sorted(environ.items()):
        if not variable.startswith(ENV_PREFIX) or variable in other or not raw:
            continue
        if _KUBERNETES.search(variable) or raw.startswith(("tcp://", "udp://")):
            continue
        if variable in by_env:
            _take(by_env[variable], raw, variable, known, given, problems)
        else:
            problems.append(f"{variable}: unknown{_suggestion(variable, [*by_env, *other])}")
    return given, problems


def from_assignments(
    assignments: Collection[str], flag: str, known: Mapping[str, Key]
) -> tuple[dict[str, Given], list[str]]:
    """What `--set key=value` sets."""
    given: dict[str, Given] = {}
    problems: list[str] = []
    for assignment in assignments:
        name, equals, raw = assignment.partition("=")
        if not equals:
            problems.append(f"{flag} {assignment}: must be KEY=VALUE")
        else:
            _take(name.strip(), raw.strip(), f"{flag} {name.strip()}", known, given, problems)
    return given, problems


def from_flags(flags: Mapping[str, tuple[str, Any]], known: Mapping[str, Key]) -> tuple[dict[str, Given], list[str]]:
    """What flags of their own set: key -> (flag, value)."""
    given: dict[str, Given] = {}
    problems: list[str] = []
    for name, (flag, value) in flags.items():
        _take(name, value, flag, known, given, problems)
    return given, problems


def _take(
    name: str, raw: Any, origin: str, known: Mapping[str, Key], given: dict[str, Given], problems: list[str]
) -> None:
    if name not in known:
        problems.append(f"{origin}: {name}: unknown key{_suggestion(name, known)}")
        return
    try:
        given[name] = Given(parse(raw, known[name].hint, name), origin)
    except ValueError as error:
        problems.append(f"{origin}: {name} = {raw!r}: {error}")


def _leaves(table: Mapping[str, Any], known: Mapping[str, Key], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for part, value in table.items():
        name = f"{prefix}{part}"
        if isinstance(value, dict) and name not in known:
            yield from _leaves(value, known, f"{name}.")
        else:
            yield name, value


def _lines(text: str) -> dict[str, int]:
    """Line numbers of keys, by a look at the plain forms of TOML; enough for messages."""
    found: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            section = f"{match[1]}."
        elif match := re.match(r"\s*([\w.-]+)\s*=", line):
            found.setdefault(section + match[1], number)
    return found


def _suggestion(name: str, candidates: Collection[str]) -> str:
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.75)
    if not close:  # the right word in the wrong section
        close = [candidate for candidate in candidates if candidate.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"; did you mean {close[0]}?" if close else ""


# --- one value ----------------------------------------------------------------------------------------------------


def parse(raw: Any, hint: Any, name: str = "") -> Any:
    """A TOML value, or text from elsewhere, as `hint` says. Raises ValueError that says what it may be."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if isinstance(raw, str) and raw.lower() == "none" else parse(raw, inner, name)
    if origin is tuple:
        items = [item.strip() for item in raw.split(",") if item.strip()] if isinstance(raw, str) else raw
        if not isinstance(items, list):
            raise ValueError("must be a list")
        return tuple(parse(item, arguments[0], name) for item in items)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _parse_mapping(raw)
    if origin is typing.Literal:
        return _one_of(raw, {str(choice): choice for choice in arguments})
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _one_of(raw, {str(member.value): member for member in hint})
    if hint in _SCALARS:
        return _SCALARS[hint](raw, name)
    raise TypeError(f"{name}: no way to read a {hint}")


def _one_of(raw: Any, choices: Mapping[str, Any]) -> Any:
    if str(raw) not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}{_suggestion(str(raw), choices)}")
    return choices[str(raw)]


def _parse_mapping(raw: Any) -> dict[str, str]:
    if isinstance(raw, str):
        pairs = [item.partition("=") for item in raw.split(",") if item.strip()]
        if not all(equals for _, equals, _ in pairs):
            raise ValueError("must be NAME=VALUE,NAME=VALUE")
        return {left.strip(): right.strip() for left, _, right in pairs}
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise ValueError("must be a table of texts")
    return dict(raw)


def _parse_bool(raw: Any, name: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if isinstance(raw, str) and raw.lower() in words:
        return words[raw.lower()]
    if not isinstance(raw, bool):
        raise ValueError("must be true or false")
    return raw


def _parse_int(raw: Any, name: str) -> int:
    """Counts of bytes may carry a unit: 256MiB."""
    if isinstance(raw, str):
        match = re.fullmatch(r"([-+]?\d[\d_]*)\s*([a-zA-Z]*)", raw)
        unit = match[2].lower() if match else ""
        if match is None or unit not in _UNITS or (unit and "bytes" not in name):
            raise ValueError("must be a whole number" + (", with or without a unit: 256MiB" if "bytes" in name else ""))
        return int(match[1]) * _UNITS[unit]
    if isinstance(raw, bool) or not isinstance(raw, int):
        raise ValueError("must be a whole number")
    return raw


def _parse_float(raw: Any, name: str) -> float:
    if isinstance(raw, str):
        try:
            return float(raw)
        except ValueError:
            raise ValueError("must be a number") from None
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise ValueError("must be a number")
    return float(raw)


def _parse_text(raw: Any, name: str) -> str:
    if not isinstance(raw, str):
        raise ValueError("must be text")
    return raw


def _parse_path(raw: Any, name: str) -> Path:
    return Path(_parse_text(raw, name)).expanduser()


_SCALARS = {bool: _parse_bool, int: _parse_int, float: _parse_float, str: _parse_text, Path: _parse_path}
