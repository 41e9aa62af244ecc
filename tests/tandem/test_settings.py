from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

import pytest

from tandem import settings
from tandem.settings import ConfigError, Given, Key


class Colour(Enum):
    RED = "red"
    GREEN = "green"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    wait_s: float = 1.0
    cache_bytes: int = 1024

    def __post_init__(self) -> None:
        if self.wait_s < 0:
            raise ValueError(f"wait_s: must not be negative, is {self.wait_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    secret: bytes
    port: int = 1
    colour: Colour = Colour.RED
    kind: Literal["auto", "sim"] = "auto"
    fast: bool = False
    names: tuple[str, ...] = ()
    limit: int | None = None
    folder: Path | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    inner: Inner = Inner()

    def __post_init__(self) -> None:
        if self.port == 666:
            raise ValueError("port: must not be 666\ncolour: goes badly with it")


KNOWN: Mapping[str, Key] = {key.name: key for key in settings.keys(Outer, "outer", skip={"secret"})}


def build(given: Mapping[str, Given]) -> Outer:
    return settings.build(Outer, "outer", given, fixed={"secret": b"x"})


def write(folder: Path, text: str) -> Path:
    path = folder / "t.toml"
    path.write_text(text)
    return path


def test_the_fields_of_the_dataclasses_are_the_keys() -> None:
    assert "outer.secret" not in KNOWN
    assert "outer.inner.wait_s" in KNOWN
    assert KNOWN["outer.inner.wait_s"].env == "TANDEM_OUTER_INNER_WAIT_S"
    assert KNOWN["outer.inner.wait_s"].default == 1.0


def test_every_kind_of_value_is_read_from_a_file(tmp_path: Path) -> None:
    text = """
        [outer]
        port = 5
        colour = "green"
        kind = "sim"
        fast = true
        names = ["a", "b"]
        limit = 7
        folder = "/tmp/x"
        labels = { zone = "a" }
        inner.wait_s = 2
        inner.cache_bytes = "3 MiB"
    """
    given, problems = settings.from_file(write(tmp_path, text), KNOWN)
    assert problems == []
    assert build(given) == Outer(
        secret=b"x",
        port=5,
        colour=Colour.GREEN,
        kind="sim",
        fast=True,
        names=("a", "b"),
        limit=7,
        folder=Path("/tmp/x"),
        labels={"zone": "a"},
        inner=Inner(wait_s=2.0, cache_bytes=3 << 20),
    )


def test_every_kind_of_value_is_read_from_the_environment() -> None:
    environ = {
        "TANDEM_OUTER_PORT": "5",
        "TANDEM_OUTER_COLOUR": "green",
        "TANDEM_OUTER_FAST": "yes",
        "TANDEM_OUTER_NAMES": "a, b",
        "TANDEM_OUTER_LIMIT": "none",
        "TANDEM_OUTER_LABELS": "zone=a,rack=7",
        "TANDEM_OUTER_INNER_CACHE_BYTES": "2GiB",
        "TANDEM_OUTER_KIND": "",
        "HOME": "/",
    }
    given, problems = settings.from_environment(environ, KNOWN, other=())
    assert problems == []
    outer = build(given)
    assert (outer.port, outer.colour, outer.fast, outer.names, outer.limit) == (5, Colour.GREEN, True, ("a", "b"), None)
    assert outer.labels == {"zone": "a", "rack": "7"}
    assert outer.inner.cache_bytes == 2 << 30
    assert outer.kind == "auto", "an empty variable counts as not set"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[outer]\nprot = 5", "t.toml:2: outer.prot: unknown key; did you mean outer.port?"),
        ("[outer]\n\nport = 'x'", "t.toml:3: outer.port = 'x': must be a whole number"),
        ("[outer]\nport = true", "t.toml:2: outer.port = True: must be a whole number"),
        ("[outer]\nport = 1.5", "t.toml:2: outer.port = 1.5: must be a whole number"),
        ("[outer]\nport = '1MiB'", "t.toml:2: outer.port = '1MiB': must be a whole number"),
        ("[outer]\nfast = 1", "t.toml:2: outer.fast = 1: must be true or false"),
        ("[outer]\nnames = 1", "t.toml:2: outer.names = 1: must be a list"),
        ("[outer]\nlabels = 1", "t.toml:2: outer.labels = 1: must be a table of texts"),
        ("[outer]\ncolour = 'gren'", "outer.colour = 'gren': must be one of red, green; did you mean green?"),
        ("[outer]\nkind = 'x'", "t.toml:2: outer.kind = 'x': must be one of auto, sim"),
        ("[outer.inner]\nwait_s = 'long'", "t.toml:2: outer.inner.wait_s = 'long': must be a number"),
        ("[outer]\ninner.cache_bytes = '1 XB'", "must be a whole number, with or without a unit: 256MiB"),
        ("[outer]\nwait_s = 5", "t.toml:2: outer.wait_s: unknown key; did you mean outer.inner.wait_s?"),
        ("[outr]\nport = 5", "t.toml:2: outr.port: unknown key; did you mean outer.port?"),
        ("port = ", "t.toml: not TOML: "),
    ],
)
def test_a_wrong_file_says_what_is_wrong_and_where(tmp_path: Path, text: str, problem: str) -> None:
    _, (found,) = settings.from_file(write(tmp_path, text), KNOWN)
    assert problem in found


def test_a_file_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    _, (problem,) = settings.from_file(tmp_path / "none.toml", KNOWN)
    assert problem == f"{tmp_path / 'none.toml'}: cannot be read: No such file or directory"


def test_an_unknown_variable_is_a_problem_with_a_suggestion() -> None:
    _, problems = settings.from_environment({"TANDEM_OUTER_PROT": "1", "TANDEM_OTHER": "1"}, KNOWN, {"TANDEM_OTHER"})
    assert problems == ["TANDEM_OUTER_PROT: unknown; did you mean TANDEM_OUTER_PORT?"]


def test_variables_that_kubernetes_sets_for_a_service_are_not_settings() -> None:
    environ = {
        "TANDEM_OUTER_SERVICE_HOST": "10.0.0.1",
        "TANDEM_OUTER_SERVICE_PORT": "5",
        "TANDEM_OUTER_SERVICE_PORT_GRPC": "5",
        "TANDEM_OUTER_PORT": "tcp://10.0.0.1:5",
        "TANDEM_OUTER_PORT_5_TCP": "tcp://10.0.0.1:5",
        "TANDEM_OUTER_PORT_5_TCP_ADDR": "10.0.0.1",
    }
    assert settings.from_environment(environ, KNOWN, other=()) == ({}, [])


def test_assignments_are_read() -> None:
    given, problems = settings.from_assignments(["outer.port=9", "outer.port", "outer.x=1"], "--set", KNOWN)
    assert given == {"outer.port": Given(9, "--set outer.port")}
    assert problems == ["--set outer.port: must be KEY=VALUE", "--set outer.x: outer.x: unknown key"]


def test_what_a_dataclass_refuses_is_told_with_where_it_came_from() -> None:
    with pytest.raises(ConfigError) as caught:
        build({"outer.inner.wait_s": Given(-1.0, "t.toml:3")})
    assert caught.value.problems == ("t.toml:3: outer.inner.wait_s: must not be negative, is -1.0",)
    with pytest.raises(ConfigError) as caught:
        build({"outer.port": Given(666, "TANDEM_OUTER_PORT")})
    assert caught.value.problems == (
        "TANDEM_OUTER_PORT: outer.port: must not be 666",
        "outer.colour: goes badly with it",
    )


@pytest.mark.parametrize("value", [True, 7, 0.5, 'a "b" \n é', ("a", "b"), {"zone": "a"}, {}, Colour.GREEN])
def test_what_is_written_as_toml_is_read_as_the_same(tmp_path: Path, value: object) -> None:
    import tomllib

    read = tomllib.loads(f"x = {settings.to_toml(value)}")["x"]
    assert read == {tuple: list, Colour: lambda colour: colour.value}.get(type(value), lambda same: same)(value)
