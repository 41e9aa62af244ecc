"""Where a local cluster keeps its files, and how a second `tandem up` finds out that one is up.

    <state>/up.lock      held while a cluster is up; says where it is
    <state>/run-.../     one run: the processes' logs and configuration. The last few are kept
    <state>/latest       a link to the newest

Everything is readable by the user alone: the configuration holds the cluster's secret, and `operator-key` lets its
reader do what operators may.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TextIO

from trust.tls import PLAINTEXT, TlsFiles

_RUNS_KEPT = 10
_OPERATOR_KEY = "operator-key"


@dataclass(frozen=True, slots=True)
class Running:
    """A cluster that is up."""

    pid: int
    #: host:port of its router.
    address: str
    run_dir: str
    #: What clients on this machine speak to it.
    tls: TlsFiles = PLAINTEXT


class AlreadyUp(Exception):
    def __init__(self, state: Path, running: Running | None) -> None:
        where = f" at {running.address} (process {running.pid}, files in {running.run_dir})" if running else ""
        super().__init__(f"a cluster is up already{where}; stop it, or start this one with another --state-dir")
        self.state = state
        self.running = running


def default_state_dir(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "tandem"


@contextmanager
def new_run(state: Path, address: str, now: datetime, tls: TlsFiles = PLAINTEXT) -> Iterator[Path]:
    """The folder of a new run, while it is up. Raises AlreadyUp."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (state / "up.lock").open("a+") as lock:
        if not _locked(lock):
            raise AlreadyUp(state, _read(lock.name))
        run_dir = state / f"run-{now:%Y%m%d-%H%M%S}-{os.getpid()}"
        run_dir.mkdir(mode=0o700)
        lock.truncate(0)
        lock.write(json.dumps(asdict(Running(os.getpid(), address, str(run_dir), tls))))
        lock.flush()
        _point(state / "latest", run_dir)
        _prune(state)
        yield run_dir
        lock.truncate(0)


def _locked(lock: TextIO) -> bool:
    for _ in range(5):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)  # perhaps only `running` had a look
        else:
            return True
    return False


def running(state: Path) -> Running | None:
    """The cluster that is up on this state directory, if one is."""
    try:
        with (state / "up.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None  # nobody holds it: what it says is of a run that died
    except BlockingIOError:
        return _read(lock.name)
    except OSError:
        return None


def make_operator_key(run_dir: Path) -> str:
    """Of whoever may read the run's files: with it, operators' commands need no key of their own."""
    key = secrets.token_urlsafe(32)
    write_private(run_dir / _OPERATOR_KEY, key.encode())
    return key


def operator_key(there: Running) -> str:
    """Empty when it can't be read."""
    try:
        return (Path(there.run_dir) / _OPERATOR_KEY).read_text()
    except OSError:
        return ""


def write_private(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)


def _read(path: str) -> Running | None:
    try:
        said = json.loads(Path(path).read_text())
        return Running(**{**said, "tls": TlsFiles(**said["tls"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None  # just being written


def _point(link: Path, target: Path) -> None:
    fresh = link.with_name(f".latest-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target.name)
    fresh.replace(link)


def _prune(state: Path) -> None:
    runs = sorted((path for path in state.glob("run-*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for old in runs[:-_RUNS_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
