"""NVIDIA Dynamo's frontend and its mock engine, in an environment of their own, for as long as a benchmark needs them.

Its package asks for another one that the index has only a stub of, so it is installed with what its frontend and its
mock engine import, and no more. The environment is kept for the next run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.ports import free_port

VERSION = "1.6.1"
_ALONE = (f"ai-dynamo=={VERSION}", f"ai-dynamo-runtime=={VERSION}")
_BESIDE = ("pydantic>=2.10.6,<=2.13.5", "uvloop>=0.21", "msgspec>=0.19", "numpy", "packaging", "pyyaml")
_START_TIMEOUT_S = 60.0
_INSTALL_TIMEOUT_S = 300.0


class NotInstalled(Exception):
    pass


class DidNotStart(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Dynamo:
    http_port: int
    #: "frontend" and "engine".
    pids: Mapping[str, int]


def environment() -> Path:
    """The environment's Python, installed if it isn't there. Raises NotInstalled."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tandem-bench"
    folder = cache / f"dynamo-{VERSION}"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    try:
        _run(sys.executable, "-m", "venv", str(folder))
        _run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", *_ALONE)
        _run(str(python), "-m", "pip", "install", "--quiet", *_BESIDE)
    except (OSError, subprocess.SubprocessError) as error:
        raise NotInstalled(f"Dynamo could not be installed: {error}") from None
    (folder / "complete").touch()
    return python


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=_INSTALL_TIMEOUT_S, capture_output=True)


@contextmanager
def dynamo(
    python: Path, model_dir: Path, name: str, folder: Path, *, step_ms: float, running_max: int
) -> Iterator[Dynamo]:
    """A frontend with its KV-aware router, and one mock engine whose steps take that long, or next to no time for 0.

    Raises DidNotStart.
    """
    folder.mkdir(parents=True)
    model = _model_with_template(model_dir, folder / "model")
    http_port = free_port()
    env = {
        **os.environ,
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(folder / "kv"),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        **dict.fromkeys(
            ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST", "DYN_HTTP_RPC_HOST"),
            "127.0.0.1",
        ),
        "HF_HUB_OFFLINE": "1",
        "DYN_LOG": "warn",
    }
    (folder / "kv").mkdir()
    engine = (
        *("dynamo.mocker", "--model-path", str(model), "--model-name", name),
        *("--endpoint", f"dyn://{name}.backend.generate", "--block-size", "32"),
        *("--num-gpu-blocks-override", "65536", "--max-num-seqs", str(running_max), "--no-enable-prefix-caching"),
        *(
            ("--planner-profile-data", str(_flat_profile(folder, step_ms)))
            if step_ms
            else ("--speedup-ratio", "1000000")
        ),
    )
    frontend = (
        *("dynamo.frontend", "--namespace", name, "--router-mode", "kv"),
        *("--http-host", "127.0.0.1", "--http-port", str(http_port)),
    )
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for part, command in (("frontend", frontend), ("engine", engine)):
            with (folder / f"{part}.log").open("wb") as log:
                running[part] = subprocess.Popen(
                    [str(python), "-m", *command], env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT
                )
        _wait(f"http://127.0.0.1:{http_port}/v1/models", name, running, folder)
        yield Dynamo(http_port, {part: process.pid for part, process in running.items()})
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()


def _wait(url: str, model: str, running: Mapping[str, subprocess.Popen[bytes]], logs: Path) -> None:
    give_up = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < give_up:
        if ended := [part for part, process in running.items() if process.poll() is not None]:
            raise DidNotStart(f"Dynamo's {', '.join(ended)} ended; see {logs}")
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if any(card["id"] == model for card in json.load(answer)["data"]):
                return
        time.sleep(0.2)
    raise DidNotStart(f"Dynamo served no model within {_START_TIMEOUT_S:g} s; see {logs}")


def _model_with_template(model_dir: Path, to: Path) -> Path:
    """Dynamo serves no completions, either, of a model without a chat template."""
    to.mkdir()
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        shutil.copy(model_dir / file, to / file)
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    config.setdefault("chat_template", "{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
    (to / "tokenizer_config.json").write_text(json.dumps(config))
    return to


def _flat_profile(folder: Path, step_ms: float) -> Path:
    """Step times as its mock engine reads them: the same for every load."""
    path, grid = folder / "flat.npz", np.linspace(1, 8192, 100)
    np.savez(
        path,
        prefill_isl=grid,
        prefill_ttft_ms=np.full(100, step_ms),
        decode_active_kv_tokens=np.linspace(0, 2**21, 100),
        decode_context_length=grid,
        decode_itl=np.full((100, 100), step_ms),
    )
    return path
