"""From a configuration to the processes of a cluster on this machine: their files, their command lines, their place."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import secrets
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from router.config import RouterConfig, with_absolute_paths
from router.config import to_json as router_to_json
from tandem import rundir, show
from tandem.client import Client
from tandem.config import ClusterConfig, Config, given_values
from tandem.config import load as load_config
from tandem.errors import PermissionDenied, TandemError, Unauthenticated
from tandem.local import ROUTER, PortRefused, choose_port
from tandem.settings import Given
from tandem.supervisor import ChildSpec
from tandem.up import Plan
from trust.join import join_key
from trust.tls import PLAINTEXT, TlsFiles
from worker.config import Role, WorkerConfig
from worker.config import to_json as worker_to_json

#: Asked when nothing else is.
PROMPT = "def fibonacci(n):\n"

_ROOT = Path(__file__).resolve().parents[1]
#: A file of this name in the current folder is the configuration unless another is named.
_CONFIG_HERE = Path("tandem.toml")


def load(
    file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, tuple[str, object]],
    assignments: Collection[str] = (),
) -> Config:
    """As `tandem.config.load`, with the file in the current folder, if there is one and no other is named."""
    return load_config(_file(file), environ, flags, assignments)


def given(file: Path | None, environ: Mapping[str, str]) -> Mapping[str, Given]:
    """What is set, from the same places, without a check of the whole."""
    return given_values(_file(file), environ)


def _file(named: Path | None) -> Path | None:
    return named or (_CONFIG_HERE if _CONFIG_HERE.exists() else None)


@contextmanager
def plan(config: Config, state_dir: Path, prompts: Sequence[str]) -> Iterator[Plan]:
    """Takes the state directory, while it lasts, and writes what the processes need. Raises AlreadyUp, PortRefused."""
    cluster = config.cluster
    if (there := rundir.running(state_dir)) is not None:
        raise rundir.AlreadyUp(state_dir, there)
    router = dataclasses.replace(config.router, port=_choose_port(config.router, _clients_tls(config)))
    router = dataclasses.replace(router, http_port=_choose_http_port(router))
    router = dataclasses.replace(router, worker_listen=_choose_worker_listen(router))
    tls = _clients_tls(config)
    address = f"{_reachable(router.host)}:{router.port}"
    with rundir.new_run(state_dir, address, datetime.now(), tls) as run_dir:
        secret = cluster.secret_file.read_bytes().strip() if cluster.secret_file else secrets.token_bytes(32)
        operator_key = rundir.make_operator_key(run_dir)
        router = dataclasses.replace(
            with_absolute_paths(router),
            operator_key_hash=hashlib.sha256(operator_key.encode()).hexdigest(),
            join_key=join_key(secret),
        )
        host, _, worker_port = router.worker_listen.rpartition(":")
        workers_address = f"{_reachable(host)}:{worker_port}" if worker_port else address
        specs = [_router_spec(router, run_dir)]
        for role, count in ((Role.PREFILL, cluster.prefill_workers), (Role.DECODE, cluster.decode_workers)):
            for number in range(count):
                name = f"{role.value}-{number}"
                worker = config.worker(worker_id=name, role=role, routers=(workers_address,), secret=secret)
                specs.append(_worker_spec(_with_threads(worker, cluster), run_dir))
        yield Plan(
            specs=specs,
            policy=config.supervisor,
            address=address,
            operator_key=operator_key,
            tls=tls,
            is_open=router.auth.mode == "none",
            http_address=None if router.http_port is None else f"{_reachable(router.host)}:{router.http_port}",
            run_dir=run_dir,
            prompts=prompts,
            engine=cluster.engine_kind,
            title=_title(cluster),
            state_flag="" if state_dir == rundir.default_state_dir(os.environ) else f"--state-dir {state_dir}",
        )


def _choose_port(router: RouterConfig, tls: TlsFiles) -> int:
    try:
        return choose_port(router.host, router.port)
    except PortRefused as error:
        who = ", by a Tandem router" if _is_router(router, tls) else ""
        raise PortRefused(f"{error}{who}; another can be named with --port, 0 takes any free one") from None


def _choose_http_port(router: RouterConfig) -> int | None:
    if router.http_port is None:
        return None
    try:
        port = choose_port(router.host, router.http_port)
        return port if port != router.port else choose_port(router.host, router.http_port)
    except PortRefused as error:
        raise PortRefused(f"{error}; another can be named with --http-port, 0 takes any free one") from None


def _choose_worker_listen(router: RouterConfig) -> str:
    if not router.worker_listen:
        return ""
    host, _, port = router.worker_listen.rpartition(":")
    return f"{host}:{choose_port(host.strip('[]'), int(port))}"


def _clients_tls(config: Config) -> TlsFiles:
    """For the clients that are started here: this user may read all of the cluster's files."""
    router = config.router
    if not router.tls.serves:
        return PLAINTEXT
    # Where workers come to the same port, the authority they believe vouches for it.
    ours = router.tls == config.tls or not router.worker_listen
    files = config.tls if ours else TlsFiles(cert=config.tls.cert, key=config.tls.key)
    return dataclasses.replace(files, server_name=router.tls.server_name or config.tls.server_name).absolute()


def _is_router(router: RouterConfig, tls: TlsFiles) -> bool:
    with Client(f"{_reachable(router.host)}:{router.port}", tls=tls) as client:
        try:
            client.status(timeout_s=1.0)
        except (Unauthenticated, PermissionDenied):
            return True
        except TandemError:
            return False
    return True


def _router_spec(router: RouterConfig, run_dir: Path) -> ChildSpec:
    return _spec(ROUTER, "router", router_to_json(router), run_dir, group=ROUTER, stop_stage=0)


def _with_threads(worker: WorkerConfig, cluster: ClusterConfig) -> WorkerConfig:
    """Every engine its part of the cores: more threads than those would wait for each other."""
    options, workers = worker.engine_options, cluster.prefill_workers + cluster.decode_workers
    threads = options.cpu_threads or max(1, len(os.sched_getaffinity(0)) // workers)
    return dataclasses.replace(worker, engine_options=dataclasses.replace(options, cpu_threads=threads))


def _worker_spec(worker: WorkerConfig, run_dir: Path) -> ChildSpec:
    # Workers stop last: the router lets requests finish, for which it needs them.
    return _spec(worker.worker_id, "worker", worker_to_json(worker), run_dir, group=worker.role.value, stop_stage=1)


def _spec(name: str, package: str, told: bytes, run_dir: Path, *, group: str, stop_stage: int) -> ChildSpec:
    file = run_dir / f"{name}.json"
    rundir.write_private(file, told)
    return ChildSpec(
        name=name,
        argv=(sys.executable, "-m", package, str(file)),
        cwd=_ROOT,  # so that `-m` finds these packages, whatever the user's folder holds
        log=run_dir / f"{name}.log",
        group=group,
        stop_stage=stop_stage,
    )


def _title(cluster: ClusterConfig) -> str:
    chosen = ", as vLLM is not installed" if cluster.engine == "auto" and cluster.engine_kind == "sim" else ""
    engine = "vLLM" if cluster.engine_kind == "vllm" else f"simulated engine{chosen}"
    return (
        f"{cluster.model_name}, {engine}: a router, {show.plural(cluster.prefill_workers, 'prefill worker')}, "
        f"{show.plural(cluster.decode_workers, 'decode worker')}"
    )


def _reachable(host: str) -> str:
    """Where processes on this machine reach what listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
