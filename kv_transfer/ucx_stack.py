"""What the two transports over UCX share: one UCX to a process, and its environment.

Packages bring a UCX each (NIXL 1.23, ucxx 1.21 at the time of writing), and importing ucxx rewrites variables that
NIXL's reads. Two of them in one process have hung and crashed others, so whichever comes second is refused.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import MutableMapping

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
