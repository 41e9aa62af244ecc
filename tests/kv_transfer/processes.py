"""Peers in processes of their own: to be read from, stopped and killed.

Run as a module, this file is such a process: it speaks JSON lines on stdin and stdout, marked, because UCX writes
warnings to stdout.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kv_transfer.registry import make_transports
from kv_transfer.transport import ARENA, BOARD, STAGING, Region
from tests.kv_transfer.memory import Bytes, allocate, pattern, region

_MARK = "peer: "
ARENA_BYTES, BOARD_BYTES, STAGING_BYTES = 4 << 20, 1 << 16, 4 << 20


class PeerProcess:
    """`kind` is "transport" (answers nothing but "quit") or "node" (see `_serve_node`)."""

    def __init__(self, kind: str, transport: str, seed: int, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "tests.kv_transfer.processes", kind, transport, str(seed)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | (environment or {}),
        )
        self.hello = self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(_MARK):
                return json.loads(line.removeprefix(_MARK))
        raise AssertionError(f"the peer ended with {self.process.wait()}")

    def call(self, **command: object) -> Any:
        assert self.process.stdin is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self._read()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def cpu_s(self) -> float:
        with open(f"/proc/{self.process.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


@contextmanager
def peer_process(
    kind: str, transport: str, seed: int = 1, environment: dict[str, str] | None = None
) -> Iterator[PeerProcess]:
    peer = PeerProcess(kind, transport, seed, environment)
    try:
        yield peer
    finally:
        peer.close()


def exported_memory(seed: int) -> tuple[Bytes, Bytes]:
    """What a transport's peer has in its arena and on its board."""
    return pattern(seed, ARENA_BYTES), pattern(seed + 1000, BOARD_BYTES)


def memory_regions(seed: int) -> tuple[dict[str, Region], dict[str, Bytes]]:
    """Regions filled for `seed`, and the memory under them."""
    arena, board, staging = allocate(ARENA_BYTES), allocate(BOARD_BYTES), allocate(STAGING_BYTES)
    arena[:], board[:] = exported_memory(seed)
    memory = {ARENA: arena, BOARD: board, STAGING: staging}
    return {name: region(name, bytes_) for name, bytes_ in memory.items()}, memory


def _say(message: object) -> None:
    print(_MARK + json.dumps(message), flush=True)


def _serve_transport(name: str, seed: int) -> None:
    (transport,) = make_transports([name])
    regions, memory = memory_regions(seed)
    transport.register(regions)
    _say(transport.export().hex())
    sys.stdin.read()
    del memory


def _serve_node(name: str, seed: int) -> None:
    from tests.kv_transfer.nodes import open_party

    party = open_party(f"p{seed}", make_transports([name]), incarnation=os.urandom(4).hex())
    _say({"address": party.node.address, "blocks": [party.block(block).hex() for block in range(party.where.blocks)]})
    for line in sys.stdin:
        command = json.loads(line)
        match command.pop("do"):
            case "offer":
                _say(party.offer(**command).hex())
            case "take_ended":
                _say(party.node.take_ended())
            case "reuse":
                party.node.cancel(command["transfer_id"])
                party.node.take_ended()
                for block in command["blocks"]:
                    party.overwrite(block)
                _say(None)
    party.node.close()


if __name__ == "__main__":
    {"transport": _serve_transport, "node": _serve_node}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
