"""One configuration file for a whole cluster on this machine, and what each of its processes is told.

The sections are the processes' own dataclasses, so a new field there is a new key here:

    [cluster]     engine, model, how many workers of each role          ClusterConfig, below
    [router]      router.config.RouterConfig
    [worker]      worker.config.WorkerConfig, for every worker
    [engine]      engine.base.EngineOptions, for every worker's engine
    [supervisor]  tandem.supervisor.RestartPolicy

A value comes from the file, else the environment (`TANDEM_ROUTER_PORT` for `router.port`), else a flag; the last of
them wins. Everything wrong is reported at once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from engine.base import EngineOptions
from tandem import settings
from tandem.settings import ConfigError, Given, Key
from tandem.supervisor import RestartPolicy
from worker.config import Role, WorkerConfig

SHIPPED_MODEL = Path(__file__).resolve().parents[1] / "models" / "tandem-nano"

#: Variables of our prefix that are not settings of a cluster.
CONFIG_FILE_VARIABLE = "TANDEM_CONFIG"
ADDRESS_VARIABLE = "TANDEM_ADDRESS"
STATE_DIR_VARIABLE = "TANDEM_STATE_DIR"
OTHER_VARIABLES = (CONFIG_FILE_VARIABLE, ADDRESS_VARIABLE, STATE_DIR_VARIABLE)

#: What the supervisor decides for each worker, rather than the user for all of them.
_WORKER_FIXED = ("role", "routers", "engine", "engine_options")
_ENGINE_FIXED = ("name", "model", "served_model_name", "cluster_secret")

_WORKERS_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The section `[cluster]`."""

    #: "auto" takes vLLM where it is installed, the simulated engine elsewhere.
    engine: Literal["auto", "vllm", "sim"] = "auto"
    #: A Hugging Face model directory.
    model: Path = SHIPPED_MODEL
    #: What clients call the model; empty takes the directory's name.
    served_model_name: str = ""
    prefill_workers: int = 1
    decode_workers: int = 1
    #: Holds the secret that authenticates workers to each other; without one, every run makes its own.
    secret_file: Path | None = None

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ValueError("\n".join(problems))

    def _problems(self) -> list[str]:
        found = [
            f"{name}: must be from 1 to {_WORKERS_MAX}, is {count}"
            for name, count in (("prefill_workers", self.prefill_workers), ("decode_workers", self.decode_workers))
            if not 1 <= count <= _WORKERS_MAX
        ]
        if not self.model.is_dir():
            found.append(f"model: {self.model} is not a folder; it must be a Hugging Face model directory")
        elif not (self.model / "config.json").is_file():
            found.append(f"model: {self.model} has no config.json; it must be a Hugging Face model directory")
        if self.engine == "vllm" and not has_vllm():
            found.append("engine: vLLM is not installed here; install it (see README.md) or take engine sim")
        if self.secret_file is not None and not self.secret_file.is_file():
            found.append(f"secret_file: {self.secret_file} is not a file")
        return found

    @property
    def engine_kind(self) -> Literal["vllm", "sim"]:
        if self.engine == "auto":
            return "vllm" if has_vllm() else "sim"
        return self.engine

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model.resolve().name


def has_vllm() -> bool:
    """Without importing it, which takes seconds."""
    return importlib.util.find_spec("vllm") is not None
