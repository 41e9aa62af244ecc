"""Transport over NIXL (UCX inside): CUDA IPC over NVLink, RDMA, cross-memory attach on one host, TCP.

One-sided: the owner's engine does nothing while it is read. What is particular to NIXL 1.5 and shapes this file:

- **Idle.** Its Python API hard-codes a progress thread that polls without pause, a whole core per process. The thread
  is needed (wire-up and emulated lanes progress in it), so the agent is made with a delay of 100 ms; it still wakes at
  once when there is something to do.
- **Late bytes.** Where a lane is emulated (TCP), neither releasing a transfer nor removing the remote agent stops an
  answer that is under way: measured, all 8 MiB of a timed-out read arrived after both. So a read past its deadline is
  kept, not released, until NIXL says that it has ended, and reported as `Unquiesced` meanwhile. It ends when the peer
  goes on or dies.
- **Restart.** An agent's name is new in every life of a process; the former one's is never reused.
- **Pickle.** NIXL's helpers for descriptors are pickle; nothing here goes through them.
- **Readers that die over TCP.** UCX 1.23 can abort the *owner's* process when a reader dies in mid-read over its TCP
  lane (assertions in stubs.c and ucp_request.inl). The other lanes do not involve the owner. So `connect` refuses a
  peer that UCX would read over TCP, unless this transport was told that there is no other.

NIXL checks bounds in the reader's library only: whoever holds what `export` returns can read and write what was
registered. It is given to authenticated peers of the cluster, and never logged.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kv_transfer import ucx_stack
from kv_transfer.segments import check_bounds
from kv_transfer.transport import PeerGone, ReadTimedOut, Region, Segments, TransportError, Unquiesced
from kv_transfer.ucx_stack import Place, UcxLane

log = logging.getLogger(__name__)

#: How long the progress thread sleeps when nothing wakes it. Not "for ever": UCX may miss a wake-up on some devices.
_PROGRESS_DELAY_US = 100_000
#: Past its deadline, a read that is moving is given this long to end, so that a short deadline does not cost the peer.
_GRACE_S = 0.25
#: Reads of a few bytes end within this; only then is it worth sleeping.
_SPIN_S = 0.0002
_SLEEP_S = (0.00005, 0.0002)


class _ExportedRegion(msgspec.Struct, frozen=True):
    address: int
    nbytes: int
    memory: str
    device: int


class _Exported(msgspec.Struct, frozen=True):
    nixl: str
    agent: str
    metadata: bytes
    regions: dict[str, _ExportedRegion]
    place: Place


@dataclass(slots=True)
class _Remote:
    """A remote agent that ours knows."""

    agent: str
    regions: Mapping[str, _ExportedRegion]
    sizes: Mapping[str, int]
    lane: UcxLane
    connected: bool = True


@dataclass(slots=True, eq=False)
class _Hung:
    """A read past its deadline that has not ended; `transfer` is None when it has."""

    transfer: Any
    remote: _Remote


class NixlTransport:
    name = "nixl"

    def __init__(self, host: str = "127.0.0.1", *, over_tcp: bool = True) -> None:
        """Raises ImportError without the package. `host` is where this process's services listen. Without `over_tcp`
        peers in host memory whose only lane is UCX's TCP are refused."""
        _load()
        self._host = host
        self._over_tcp = over_tcp
        self._agent: Any = None
        self._exported = b""
        self._regions: Mapping[str, _ExportedRegion] = {}
        self._sizes: Mapping[str, int] = {}
        #: By peer.
        self._peers: dict[str, _Remote] = {}
        #: By agent: those in `_peers`, and those that hung reads still need.
        self._remotes: dict[str, _Remote] = {}
        self._hung: set[_Hung] = set()

    def register(self, regions: Mapping[str, Region]) -> None:
        agent_name = f"tandem-{os.getpid()}-{secrets.token_hex(8)}"
        self._agent = _make_agent(agent_name, self._host)
        self._regions = {name: _exported_region(region) for name, region in regions.items()}
        self._sizes = {name: region.nbytes for name, region in self._regions.items()}
        for region in self._regions.values():
            self._agent.register_memory([(region.address, region.nbytes, region.device, "")], region.memory)
        self._exported = msgspec.msgpack.encode(
            _Exported(
                version("nixl-cu12"), agent_name, self._agent.get_agent_metadata(), dict(self._regions), Place.here()
            )
        )

    def export(self) -> bytes:
        return self._exported

    def connect(self, peer: str, incarnation: str, exported: bytes) -> None:
        self.disconnect(peer)
        try:
            theirs = msgspec.msgpack.decode(exported, type=_Exported)
        except msgspec.MsgspecError as error:
            raise TransportError(f"{peer} exports what is no NIXL agent: {error}") from error
        here = version("nixl-cu12")
        if theirs.nixl != here:
            raise TransportError(f"NIXL {here} here, {theirs.nixl} at {peer}")
        remote = self._remotes.get(theirs.agent)
        if remote is None:
            lane = self._find_lane(peer, theirs)
            self._add_agent(peer, theirs)
            sizes = {name: region.nbytes for name, region in theirs.regions.items()}
            remote = _Remote(theirs.agent, theirs.regions, sizes, lane)
            self._remotes[theirs.agent] = remote
        remote.connected = True
        self._peers[peer] = remote

    def _find_lane(self, peer: str, theirs: _Exported) -> UcxLane:
        """Raises TransportError when another transport should be taken."""
        on_device = any(region.memory == "VRAM" for region in (*theirs.regions.values(), *self._regions.values()))
        address = next((region.address for region in theirs.regions.values() if region.memory == "DRAM"), 0)
        lane = ucx_stack.lane(Place.here(), theirs.place, address=address, on_device=on_device)
        if lane is UcxLane.TCP and not on_device and not self._over_tcp:
            raise TransportError(
                f"{peer} would be read over UCX's TCP, where a reader that dies can end the owner; tcp is preferred"
            )
        return lane

    def lane(self, peer: str) -> str:
        remote = self._peers.get(peer)
        return self.name if remote is None else f"{self.name}/{remote.lane.value}"

    def _add_agent(self, peer: str, theirs: _Exported) -> None:
        if theirs.agent == self._agent.name:
            return  # this process: NIXL knows its own agent
        try:
            name = self._agent.add_remote_agent(theirs.metadata)
            self._agent.make_connection(name)
        except Exception as error:
            raise TransportError(f"{peer} can't be added: {_describe(error)}") from error

    def read(self, peer: str, segments: Segments, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        remote = self._peers.get(peer)
        if remote is None:
            raise PeerGone(f"{peer} is not connected")
        check_bounds(segments, remote.sizes, self._sizes)
        if not segments.sizes.size:
            return
        transfer = self._post(peer, remote, segments)
        try:
            ended = self._wait(transfer, peer, deadline)
        except TransportError:
            _release(transfer)
            raise
        if not ended:
            hung = _Hung(transfer, remote)
            self._hung.add(hung)
            raise Unquiesced(f"the read from {peer} hangs", lambda: self._has_ended(hung))
        _release(transfer)
        if time.monotonic() > deadline:
            raise ReadTimedOut(f"the read from {peer} ended after its deadline")

    def _post(self, peer: str, remote: _Remote, segments: Segments) -> Any:
        """A transfer, not started. One-off descriptor lists: preparing and indexing them takes twice as long."""
        ours, theirs = self._regions[segments.local_region], remote.regions[segments.remote_region]
        agent = self._agent
        try:
            return agent.initialize_xfer(
                "READ",
                agent.get_xfer_descs(_descriptors(ours, segments.local, segments.sizes), ours.memory),
                agent.get_xfer_descs(_descriptors(theirs, segments.remote, segments.sizes), theirs.memory),
                remote.agent,
            )
        except Exception as error:
            raise PeerGone(f"{peer}: {_describe(error)}") from error

    def _wait(self, transfer: Any, peer: str, deadline: float) -> bool:
        """True when all bytes are in; False when they may still be coming, long past the deadline."""
        started = time.monotonic()
        sleep_s, sleep_s_max = _SLEEP_S
        try:
            state = self._agent.transfer(transfer)
            while state == "PROC":
                now = time.monotonic()
                if now > deadline + _GRACE_S:
                    return False
                if now > started + _SPIN_S:
                    time.sleep(sleep_s)
                    sleep_s = min(2 * sleep_s, sleep_s_max)
                state = self._agent.check_xfer_state(transfer)
        except Exception as error:
            # UCX ends everything on an endpoint when it fails: nothing of this read is under way.
            raise PeerGone(f"{peer}: {_describe(error)}") from error
        if state != "DONE":
            raise PeerGone(f"{peer}: the read ended in state {state}")
        return True

    def _has_ended(self, hung: _Hung) -> bool:
        if hung.transfer is None:
            return True
        try:
            if self._agent.check_xfer_state(hung.transfer) == "PROC":
                return False
        except Exception as error:
            log.info("a hung read ended: %s", _describe(error))
        self._drop(hung)
        if not hung.remote.connected:
            self._remove_agent(hung.remote)
        return True

    def _drop(self, hung: _Hung) -> None:
        _release(hung.transfer)
        hung.transfer = None
        self._hung.remove(hung)

    def disconnect(self, peer: str) -> None:
        remote = self._peers.pop(peer, None)
        if remote is not None and remote not in self._peers.values():
            remote.connected = False
            self._remove_agent(remote)

    def _remove_agent(self, remote: _Remote) -> None:
        if any(hung.remote is remote for hung in self._hung):
            return
        del self._remotes[remote.agent]
        if remote.agent == self._agent.name:
            return
        try:
            self._agent.remove_remote_agent(remote.agent)
        except Exception as error:
            log.warning("removing agent %s: %s", remote.agent, _describe(error))

    def close(self) -> None:
        """Destroying the agent is what stops everything: unlike a release, it leaves no late bytes behind."""
        for hung in list(self._hung):
            self._drop(hung)
        for peer in list(self._peers):
            self.disconnect(peer)
        self._remotes.clear()
        if self._agent is not None:
            self._agent.agent = None  # the last reference, see `_release`
            self._agent = None


def _release(transfer: Any) -> None:
    """Also takes the agent from the handle, which a traceback may keep: `close` must be what destroys the agent."""
    transfer.release()
    transfer._agent = None


def _load() -> Any:
    """NIXL's Python API, without what importing it does to logging."""
    raising = logging.raiseExceptions
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    from nixl_cu12 import _api

    logging.raiseExceptions = raising
    logging.getLogger("nixl").setLevel(logging.WARNING)
    return _api


def _exported_region(region: Region) -> _ExportedRegion:
    if region.device == "cpu":
        return _ExportedRegion(region.address, region.nbytes, "DRAM", 0)
    kind, _, index = region.device.partition(":")
    if kind != "cuda" or not index.isdigit():
        raise TransportError(f"region {region.name!r} is on {region.device!r}; NIXL reaches cpu and cuda:N")
    return _ExportedRegion(region.address, region.nbytes, "VRAM", int(index))


def _descriptors(region: _ExportedRegion, offsets: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Rows of (address, length, device), as NIXL takes them without building a Python object for each."""
    rows = np.empty((offsets.size, 3), np.uint64)
    rows[:, 0] = offsets
    rows[:, 0] += np.uint64(region.address)
    rows[:, 1] = sizes
    rows[:, 2] = region.device
    return rows


def _describe(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()


#: The configuration class is swapped for the time it takes to make an agent.
_making = threading.Lock()


def _make_agent(name: str, host: str) -> Any:
    """An agent with a UCX backend and a progress thread that sleeps."""
    ucx_stack.only("NIXL")
    found = ucx_stack.prepare_environment(os.environ, host)
    if found:
        log.warning("UCX settings in the environment: %s", ", ".join(found))
    api = _load()
    config = api.nixl_agent_config(
        enable_prog_thread=True,
        enable_listen_thread=False,
        backends=[],
        sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_RW,
    )
    bindings = api.nixlBind
    stock = bindings.nixlAgentConfig
    if not hasattr(stock, "pthrDelay"):
        raise TransportError(
            f"NIXL {version('nixl-cu12')} has no setting for its progress thread, which would never sleep"
        )

    class QuietConfig(stock):  # type: ignore[misc,valid-type]
        def __setattr__(self, attribute: str, value: object) -> None:
            super().__setattr__(attribute, _PROGRESS_DELAY_US if attribute == "pthrDelay" else value)

    with _making:
        bindings.nixlAgentConfig = QuietConfig
        try:
            agent = api.nixl_agent(name, config)
        except RuntimeError as error:
            raise TransportError(f"no NIXL agent: {error}") from error
        finally:
            bindings.nixlAgentConfig = stock
    # "peer" is what turns a dead peer into an error instead of a hang.
    agent.create_backend("UCX", {"ucx_error_handling_mode": "peer"})
    return agent
