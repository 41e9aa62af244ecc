"""One configuration file for a whole cluster on this machine, and what each of its processes is told.

The sections are the processes' own dataclasses, so a new field there is a new key here:

    [cluster]     engine, model, how many workers of each role          ClusterConfig, below
    [router]      router.config.RouterConfig
    [worker]      worker.config.WorkerConfig, for every worker
    [engine]      engine.base.EngineOptions, for every worker's engine
    [supervisor]  tandem.supervisor.RestartPolicy
    [tls]         trust.tls.TlsFiles, for what processes say to each other; [router.tls], for clients, is the same
                  unless it is given

A value comes from the file, else the environment (`TANDEM_ROUTER_PORT` for `router.port`), else a flag; the last of
them wins. Everything wrong is reported at once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeVar

from engine.base import EngineOptions
from router.config import RouterConfig
from tandem import settings
from tandem.client import API_KEY_VARIABLE, CA_VARIABLE, CERT_VARIABLE, INSECURE_VARIABLE, KEY_VARIABLE
from tandem.settings import ConfigError, Given, Key
from tandem.supervisor import RestartPolicy
from trust.tls import TlsFiles
from worker.config import Role, WorkerConfig

T = TypeVar("T")

SHIPPED_MODEL = Path(__file__).resolve().parents[1] / "models" / "tandem-nano"

#: Variables of our prefix that are not settings of a cluster.
CONFIG_FILE_VARIABLE = "TANDEM_CONFIG"
ADDRESS_VARIABLE = "TANDEM_ADDRESS"
STATE_DIR_VARIABLE = "TANDEM_STATE_DIR"
OTHER_VARIABLES = (
    CONFIG_FILE_VARIABLE,
    ADDRESS_VARIABLE,
    STATE_DIR_VARIABLE,
    API_KEY_VARIABLE,
    CA_VARIABLE,
    CERT_VARIABLE,
    KEY_VARIABLE,
    INSECURE_VARIABLE,
)

#: What is decided for each process, rather than by the user for all of them.
_ROUTER_FIXED = ("model_dir", "model_name", "operator_key_hash", "join_key", "worker_tls")
_WORKER_FIXED = ("role", "routers", "engine", "engine_options")
_ENGINE_FIXED = ("name", "model", "served_model_name", "cluster_secret", "tls")

_WORKERS_MAX = 64
_SECRET_BYTES_MIN = 16

#: Where a cluster on one machine has another default than its processes: somebody waits for Ctrl-C to be done.
_LOCAL_DEFAULTS = {"router.shutdown_grace_s": Given(10.0, "default of tandem up")}


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
        else:
            found += [
                f"model: {self.model} has no {name}; it must be a Hugging Face model directory"
                for name in ("config.json", "tokenizer.json")
                if not (self.model / name).is_file()
            ]
        if self.engine == "vllm" and not has_vllm():
            found.append("engine: vLLM is not installed here; install it (see README.md) or take engine sim")
        if self.secret_file is not None:
            if not self.secret_file.is_file():
                found.append(f"secret_file: {self.secret_file} is not a file")
            elif (size := self.secret_file.stat().st_size) < _SECRET_BYTES_MIN:
                found.append(
                    f"secret_file: {self.secret_file} must hold at least {_SECRET_BYTES_MIN} bytes, has {size}"
                )
        return found

    @property
    def engine_kind(self) -> Literal["vllm", "sim"]:
        if self.engine == "auto":
            return "vllm" if has_vllm() else "sim"
        return self.engine

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model.resolve().name


#: Sizes an engine cannot do without, or that are surely a slip; inclusive.
_ENGINE_RANGES: Mapping[str, tuple[float, float]] = {
    "block_tokens": (1, 1024),
    "kv_cache_bytes": (1 << 20, 1 << 50),
    "staging_bytes": (1 << 16, 1 << 50),
    "max_running": (1, 65_536),
    "cpu_threads": (0, 1024),
    "max_batched_tokens": (1, 1 << 20),
    "long_prefill_token_threshold": (0, 1 << 20),
    "max_model_len": (2, 1 << 24),
    "seed": (0, 2**63 - 1),
    "speedup": (0.0, 1e6),
    "kv_bytes_per_token": (1, 1 << 24),
}


def _keys() -> Iterator[Key]:
    yield from settings.keys(ClusterConfig, "cluster")
    yield from settings.keys(RouterConfig, "router", skip=_ROUTER_FIXED)
    yield from settings.keys(WorkerConfig, "worker", skip=_WORKER_FIXED)
    yield from settings.keys(EngineOptions, "engine", skip=_ENGINE_FIXED)
    yield from settings.keys(RestartPolicy, "supervisor")
    yield from settings.keys(TlsFiles, "tls")


#: Everything that can be set, by its name in the file.
KEYS: Mapping[str, Key] = {key.name: key for key in _keys()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration, valid."""

    cluster: ClusterConfig
    router: RouterConfig
    supervisor: RestartPolicy
    tls: TlsFiles
    #: What somebody set, by key, and where.
    given: Mapping[str, Given]

    def worker(self, *, worker_id: str, role: Role, routers: tuple[str, ...], secret: bytes) -> WorkerConfig:
        """What one worker is told."""
        return _worker(
            self.given, self.cluster, self.tls, worker_id=worker_id, role=role, routers=routers, secret=secret
        )

    def as_toml(self) -> str:
        """The configuration in force as a file that can be loaded again, each value with its origin."""
        lines: list[str] = []
        section = ""
        for key in KEYS.values():
            prefix, _, name = key.name.rpartition(".")
            if prefix != section:
                section = prefix
                lines += ["", f"[{section}]"]
            found = self.given.get(key.name, Given(key.default, "default"))
            setting = f"# {name} = " if found.value is None else f"{name} = {settings.to_toml(found.value)}"
            lines.append(f"{setting:<48}  # {found.origin}")
        return "\n".join(lines[1:]) + "\n"


def load(
    file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, tuple[str, object]] = MappingProxyType({}),
    assignments: Collection[str] = (),
) -> Config:
    """`flags` maps keys to the flag that sets them and its value; `assignments` are `KEY=VALUE`. Raises ConfigError
    with everything that is wrong."""
    return _checked(given_values(file, environ, flags, assignments))


def given_values(
    file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, tuple[str, object]] = MappingProxyType({}),
    assignments: Collection[str] = (),
) -> dict[str, Given]:
    """As `load`, but says no more than what is set and where: files that it names need not be there yet."""
    given = dict(_LOCAL_DEFAULTS)
    problems: list[str] = []
    for values, wrong in (
        settings.from_file(file, KEYS) if file is not None else ({}, []),
        settings.from_environment(environ, KEYS, OTHER_VARIABLES),
        settings.from_flags(flags, KEYS),
        settings.from_assignments(assignments, "--set", KEYS),
    ):
        given |= values
        problems += wrong
    if problems:
        raise ConfigError(problems)
    return given


def _checked(given: Mapping[str, Given]) -> Config:
    problems = [settings.locate(problem, given) for problem in _engine_problems(given)]

    def valid(build: Callable[[], T]) -> T | None:
        try:
            return build()
        except ConfigError as error:
            problems.extend(error.problems)
            return None

    cluster = valid(lambda: settings.build(ClusterConfig, "cluster", given))
    # What is wrong with the cluster's section is no reason to be silent about the others.
    standing_in = cluster or ClusterConfig(engine="sim")
    tls = valid(lambda: _tls(given)) or TlsFiles(insecure=True)
    router = valid(lambda: _router(given, standing_in, tls))
    supervisor = valid(lambda: settings.build(RestartPolicy, "supervisor", given))
    # A worker of both roles breaks every rule that one of either would.
    worker = valid(
        lambda: _worker(
            given, standing_in, tls, worker_id="any", role=Role.BOTH, routers=("localhost:1",), secret=b"any secret"
        )
    )
    if cluster and router and supervisor and worker and not problems:
        problems += [settings.locate(line, given) for line in _relations(cluster, router, worker, supervisor)]
        if not problems:
            return Config(cluster=cluster, router=router, supervisor=supervisor, tls=tls, given=given)
    raise ConfigError(problems)


def _engine_problems(given: Mapping[str, Given]) -> list[str]:
    return [
        f"engine.{name}: must be from {low:,} to {high:,}, is {given[key].value}"
        for name, (low, high) in _ENGINE_RANGES.items()
        if (key := f"engine.{name}") in given and given[key].value is not None and not low <= given[key].value <= high
    ]


def _relations(
    cluster: ClusterConfig, router: RouterConfig, worker: WorkerConfig, supervisor: RestartPolicy
) -> list[str]:
    """What is wrong between sections."""
    found = []
    options = worker.engine_options
    if options.staging_bytes > options.kv_cache_bytes:
        found.append(
            f"engine.staging_bytes: {options.staging_bytes:,} is more than "
            f"engine.kv_cache_bytes: {options.kv_cache_bytes:,}; what is staged could never be decoded at once"
        )
    if worker.decode.legs > options.max_running:
        found.append(
            f"worker.decode.legs: {worker.decode.legs} is more than engine.max_running: {options.max_running}; "
            "the surplus would hold KV blocks and wait"
        )
    if router.shutdown_grace_s >= supervisor.stop_grace_s:
        found.append(
            f"router.shutdown_grace_s: {router.shutdown_grace_s:g} is not less than "
            f"supervisor.stop_grace_s: {supervisor.stop_grace_s:g}; the router would be killed while it finishes"
        )
    if worker.stop_timeout_s >= supervisor.stop_grace_s:
        found.append(
            f"worker.stop_timeout_s: {worker.stop_timeout_s:g} is not less than "
            f"supervisor.stop_grace_s: {supervisor.stop_grace_s:g}; workers would be killed while their engines stop"
        )
    workers_port = router.worker_tls if router.worker_listen else router.tls
    if workers_port.serves and not worker.engine_options.tls.dials:
        found.append(
            "tls.ca: must say who vouches for router.tls.cert, as workers come to that port, too; or give workers one "
            "of their own with router.worker_listen"
        )
    if worker.engine_options.tls.dials and not workers_port.serves:
        found.append(
            "tls.cert: must be given with tls.ca: workers would expect TLS of a router that has no certificate"
        )
    workers = cluster.prefill_workers + cluster.decode_workers
    for name in ("health_address", "metrics_address", "engine_listen"):
        if (address := getattr(worker, name)) and not address.endswith(":0") and workers > 1:
            found.append(f"worker.{name}: {address} cannot serve {workers} workers on one machine; use port 0")
    return found


def _tls(given: Mapping[str, Given]) -> TlsFiles:
    tls = settings.build(TlsFiles, "tls", given)
    if problems := tls.problems():
        raise ConfigError([settings.locate(f"tls.{problem}", given) for problem in problems])
    return tls.absolute()  # processes run in folders of their own


def _router(given: Mapping[str, Given], cluster: ClusterConfig, tls: TlsFiles) -> RouterConfig:
    fixed: dict[str, object] = {
        "model_dir": str(cluster.model.resolve()),
        "model_name": cluster.model_name,
        "operator_key_hash": "",
        # Every run has a secret, from which the real one is made when it starts.
        "join_key": b"to come",
        "worker_tls": replace(tls, require_client_cert=bool(tls.cert and tls.ca)),
    }
    if not any(key.startswith("router.tls.") for key in given):
        fixed["tls"] = tls
    edges = given.get("router.edges", Given(1, ""))
    if edges.value not in (1, None) and not given.get("router.worker_listen", Given("", "")).value:
        fixed["worker_listen"] = "127.0.0.1:0"  # workers are on this machine
    return settings.build(RouterConfig, "router", given, fixed)


def _worker(
    given: Mapping[str, Given],
    cluster: ClusterConfig,
    tls: TlsFiles,
    *,
    worker_id: str,
    role: Role,
    routers: tuple[str, ...],
    secret: bytes,
) -> WorkerConfig:
    options = settings.build(
        EngineOptions,
        "engine",
        given,
        fixed={
            "name": worker_id,
            "model": str(cluster.model.resolve()),
            "served_model_name": cluster.model_name,
            "cluster_secret": secret,
            "tls": tls,
        },
    )
    return settings.build(
        WorkerConfig,
        "worker",
        given,
        fixed={"role": role, "routers": routers, "engine": cluster.engine_kind, "engine_options": options},
    )


def has_vllm() -> bool:
    """Without importing it, which takes seconds."""
    return importlib.util.find_spec("vllm") is not None
