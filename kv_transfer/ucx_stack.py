"""What transports over UCX have to know: one UCX to a process, its environment, and the lane it will take.

Packages bring a UCX each (NIXL 1.23, ucxx 1.21 at the time of writing), and importing ucxx rewrites variables that
NIXL's reads. Two of them in one process have hung and crashed others, so whichever comes second is refused.

UCX chooses its lane itself and tells nobody: from NVLink, RDMA or cross-memory attach it falls to its own TCP without a
word. `lane` goes by what its choice depends on, as both sides told each other when they met: the host, the PID
namespace, the right to read the other's memory (tried, not guessed), RDMA devices in use, and UCX_TLS.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Mapping, MutableMapping
from enum import Enum
from pathlib import Path

import msgspec

from kv_transfer.shm import is_readable
from kv_transfer.transport import TransportError

_STACKS = {"NIXL": ("nixl_cu12", "nixl_cu13", "nixl"), "ucxx": ("ucxx", "ucp")}


def only(stack: str) -> None:
    """Raises TransportError when another UCX than that of `stack` ("NIXL" or "ucxx") is loaded in this process."""
    for other, modules in _STACKS.items():
        loaded = [module for module in modules if sys.modules.get(module) is not None]
        if other != stack and loaded:
            raise TransportError(
                f"{loaded[0]} is loaded in this process, with a UCX of its own; {stack} needs another process"
            )


def prepare_environment(environment: MutableMapping[str, str], host: str) -> list[str]:
    """Sets what UCX reads from the environment, unless it is set; the other UCX settings found there.

    Without a device given, UCX listens on every interface; a node on loopback must not.
    """
    environment.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    if is_loopback(host):
        environment.setdefault("UCX_NET_DEVICES", "lo")
    expected = ("UCX_WARN_UNUSED_ENV_VARS", "UCX_NET_DEVICES")
    return sorted(
        f"{name}={value}" for name, value in environment.items() if name.startswith("UCX_") and name not in expected
    )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class UcxLane(Enum):
    CMA = "cma"
    CUDA = "cuda"
    RDMA = "rdma"
    #: Emulated: the owner's process takes part.
    TCP = "tcp"


class Place(msgspec.Struct, frozen=True):
    """Where a process is, as far as UCX's choice of a lane depends on it."""

    pid: int
    #: New at every boot of a host.
    boot: str
    pid_namespace: str
    #: Ports of RDMA devices that are up and that UCX may use: "mlx5_0:1".
    rdma: tuple[str, ...]
    #: UCX_TLS; empty allows everything.
    tls: str

    @classmethod
    def here(cls, environment: Mapping[str, str] | None = None) -> Place:
        found = os.environ if environment is None else environment
        return cls(
            pid=os.getpid(),
            boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            pid_namespace=os.readlink("/proc/self/ns/pid"),
            rdma=_rdma_ports(Path("/sys/class/infiniband"), found.get("UCX_NET_DEVICES", "all")),
            tls=found.get("UCX_TLS", ""),
        )


def _rdma_ports(devices: Path, allowed: str) -> tuple[str, ...]:
    up = [
        f"{state.parents[2].name}:{state.parent.name}"
        for state in sorted(devices.glob("*/ports/*/state"))
        if "ACTIVE" in state.read_text()
    ]
    names = allowed.split(",")
    return tuple(port for port in up if {"all", port, port.partition(":")[0]} & set(names))


_CMA_TLS = frozenset({"cma", "shm", "sm", "all"})
_CUDA_TLS = frozenset({"cuda_ipc", "cuda", "all"})
_RDMA_TLS = frozenset(
    {"ib", "rc", "rc_v", "rc_verbs", "rc_x", "rc_mlx5", "dc", "dc_x", "dc_mlx5", "ud", "ud_v", "ud_x", "srd", "all"}
)


def lane(here: Place, there: Place, *, address: int, on_device: bool) -> UcxLane:
    """What UCX will read `there` through. `address` is of registered host memory there; `on_device`: KV is in VRAM."""

    def allowed(names: frozenset[str]) -> bool:
        return all(_allows(place.tls, names) for place in (here, there))

    if here.boot == there.boot and on_device and allowed(_CUDA_TLS):
        return UcxLane.CUDA
    same_processes = here.boot == there.boot and here.pid_namespace == there.pid_namespace
    if same_processes and not on_device and allowed(_CMA_TLS) and is_readable(there.pid, address):
        return UcxLane.CMA
    if here.rdma and there.rdma and allowed(_RDMA_TLS):
        return UcxLane.RDMA
    return UcxLane.TCP


def _allows(tls: str, names: frozenset[str]) -> bool:
    if tls.startswith("^"):
        return not names & set(tls[1:].split(","))
    return not tls or bool(names & set(tls.split(",")))
