"""Transports by name. Importing this loads none of them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from kv_transfer.inproc import InprocHub, InprocTransport
from kv_transfer.transport import Transport, TransportError
from trust.tls import Tls

NAMES = ("inproc", "nixl", "shm", "tcp", "ucx")

log = logging.getLogger(__name__)


class TransportUnavailable(Exception):
    """A configured transport can't be had here; says what to do about it."""


def make_transports(
    names: Sequence[str], *, host: str = "127.0.0.1", hub: InprocHub | None = None, tls: Tls | None = None
) -> list[Transport]:
    """Fresh transports of these names, in that order, for one node that serves on `host`.

    Where both are allowed, "nixl" leaves to "tcp" the peers that UCX would reach by its own TCP (see nixl.py).
    What can't be had on this machine is left out and logged. Raises TransportUnavailable for an unknown name, and when
    nothing is left. "inproc" reaches the nodes whose transports were made with the same `hub`.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise TransportUnavailable(f"unknown transport {unknown[0]!r}; there are {', '.join(NAMES)}")
    if "nixl" in names and "ucx" in names:
        raise TransportUnavailable('transports "nixl" and "ucx" bring a UCX each; one process has room for one of them')
    if tls is not None and "ucx" in names:
        raise TransportUnavailable('transport "ucx" has no TLS, and this node\'s KV is to have it: name "tcp" instead')
    made, missing = [], []
    for name in names:
        try:
            made.append(_make(name, host, hub, tls, names))
        except TransportUnavailable as why:
            missing.append(str(why))
    if not made:
        raise TransportUnavailable("; ".join(missing) or "no transport is named")
    for why_not in missing:
        log.info("left out: %s", why_not)
    return made


def _make(name: str, host: str, hub: InprocHub | None, tls: Tls | None, names: Sequence[str]) -> Transport:
    match name:
        case "inproc":
            if hub is None:
                raise TransportUnavailable('transport "inproc" needs the hub that its nodes share')
            return InprocTransport(hub)
        case "nixl":
            return _make_nixl(host, over_tcp="tcp" not in names)
        case "shm":
            return _make_shm()
        case "tcp":
            from kv_transfer.tcp import TcpTransport

            return TcpTransport(host, tls)
        case "ucx":
            return _make_ucx(host)
    raise AssertionError(name)


def _make_nixl(host: str, *, over_tcp: bool) -> Transport:
    try:
        from kv_transfer.nixl import NixlTransport

        return NixlTransport(host, over_tcp=over_tcp)
    except ImportError as error:
        raise TransportUnavailable(f'transport "nixl" needs the package nixl-cu12 ({error})') from error


def _make_ucx(host: str) -> Transport:
    try:
        from kv_transfer.ucx import UcxTransport

        return UcxTransport(host)
    except ImportError as error:
        raise TransportUnavailable(f'transport "ucx" needs the package ucxx-cu12 ({error})') from error
    except TransportError as error:
        raise TransportUnavailable(f'transport "ucx": {error}') from error


def _make_shm() -> Transport:
    if sys.platform != "linux":
        raise TransportUnavailable('transport "shm" needs Linux')
    from kv_transfer.shm import ShmTransport

    return ShmTransport()
