"""Transports by name, and what those over UCX agree on."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from kv_transfer import ucx_stack
from kv_transfer.registry import TransportUnavailable, make_transports
from kv_transfer.transport import TransportError


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
