"""Transports by name, and what those over UCX agree on."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from kv_transfer import ucx_stack
from kv_transfer.registry import TransportUnavailable, make_transports
from kv_transfer.transport import TransportError
from kv_transfer.ucx_stack import Place, UcxLane, _rdma_ports, lane
from trust.tls import Tls, TlsFiles


def test_a_transport_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TransportUnavailable, match="unknown transport 'pigeon'"):
        make_transports(["pigeon"])
    with pytest.raises(TransportUnavailable, match="hub"):
        make_transports(["inproc"])

    monkeypatch.setitem(sys.modules, "nixl_cu12", None)
    with pytest.raises(TransportUnavailable, match="package nixl-cu12"):
        make_transports(["nixl"])
    assert [transport.name for transport in make_transports(["nixl", "tcp"])] == ["tcp"]


@pytest.mark.parametrize("names", [["nixl", "ucx"], ["tcp", "ucx", "nixl"]])
def test_nixl_and_ucx_together_are_refused_by_name(names: list[str]) -> None:
    with pytest.raises(TransportUnavailable, match='"nixl" and "ucx"'):
        make_transports(names)


def test_ucx_is_refused_where_kv_is_to_have_tls() -> None:
    with pytest.raises(TransportUnavailable, match='"ucx" has no TLS'):
        make_transports(["ucx", "tcp"], tls=Tls(TlsFiles()))


@pytest.mark.parametrize(("there", "wanted"), [("ucxx", "NIXL"), ("nixl_cu12", "ucxx")])
def test_a_second_ucx_is_refused_whoever_loaded_the_first(
    monkeypatch: pytest.MonkeyPatch, there: str, wanted: str
) -> None:
    for module in ("ucxx", "ucp", "nixl", "nixl_cu12", "nixl_cu13"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    ucx_stack.only(wanted)
    monkeypatch.setitem(sys.modules, there, ModuleType(there))
    with pytest.raises(TransportError, match=f"{there} is loaded in this process.*{wanted} needs another"):
        ucx_stack.only(wanted)


def test_ucx_stays_on_loopback_where_the_node_does_unless_told_otherwise() -> None:
    environment: dict[str, str] = {}
    assert ucx_stack.prepare_environment(environment, "127.0.0.1") == []
    assert environment["UCX_NET_DEVICES"] == "lo"
    chosen = {"UCX_NET_DEVICES": "eth0", "UCX_TLS": "tcp"}
    assert ucx_stack.prepare_environment(chosen, "localhost") == ["UCX_TLS=tcp"]
    assert chosen["UCX_NET_DEVICES"] == "eth0"
    public: dict[str, str] = {}
    ucx_stack.prepare_environment(public, "10.0.0.1")
    assert "UCX_NET_DEVICES" not in public


_BYTE = ctypes.create_string_buffer(1)
_HERE = Place(pid=os.getpid(), boot="b", pid_namespace="n", rdma=(), tls="")
_RDMA = msgspec.structs.replace(_HERE, boot="c", rdma=("mlx5_0:1",))


@pytest.mark.parametrize(
    ("here", "there", "on_device", "expected"),
    [
        (_HERE, _HERE, False, UcxLane.CMA),
        (_HERE, msgspec.structs.replace(_HERE, tls="tcp,cma"), False, UcxLane.CMA),
        (_HERE, msgspec.structs.replace(_HERE, tls="tcp"), False, UcxLane.TCP),
        (msgspec.structs.replace(_HERE, tls="^cma"), _HERE, False, UcxLane.TCP),
        (_HERE, msgspec.structs.replace(_HERE, pid_namespace="m"), False, UcxLane.TCP),
        (_HERE, msgspec.structs.replace(_HERE, boot="c"), False, UcxLane.TCP),
        (_RDMA, msgspec.structs.replace(_RDMA, boot="d"), False, UcxLane.RDMA),
        (_RDMA, msgspec.structs.replace(_RDMA, boot="d", tls="tcp,cma"), False, UcxLane.TCP),
        (_HERE, _RDMA, False, UcxLane.TCP),
        (_HERE, msgspec.structs.replace(_HERE, pid_namespace="m"), True, UcxLane.CUDA),
        (_HERE, msgspec.structs.replace(_HERE, boot="c"), True, UcxLane.TCP),
    ],
)
def test_the_lane_follows_from_where_both_are(here: Place, there: Place, on_device: bool, expected: UcxLane) -> None:
    assert lane(here, there, address=ctypes.addressof(_BYTE), on_device=on_device) is expected


def test_memory_that_may_not_be_read_is_no_lane() -> None:
    assert lane(_HERE, _HERE, address=8, on_device=False) is UcxLane.TCP


@pytest.mark.parametrize(
    ("allowed", "expected"), [("all", ("mlx5_0:1",)), ("lo", ()), ("eth0,mlx5_0:1", ("mlx5_0:1",)), ("mlx5_1:1", ())]
)
def test_rdma_is_ports_that_are_up_and_allowed(tmp_path: Path, allowed: str, expected: tuple[str, ...]) -> None:
    for device, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / device / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state + "\n")
    assert _rdma_ports(tmp_path, allowed) == expected
