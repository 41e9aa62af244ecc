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
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from kv_transfer.registry import make_transports
from kv_transfer.transport import ARENA, BOARD, STAGING, Region
from tests.kv_transfer.memory import Bytes, allocate, layout, pattern, region, write_block

_MARK = "peer: "
ARENA_BYTES, BOARD_BYTES, STAGING_BYTES = 4 << 20, 1 << 16, 4 << 20


class PeerProcess:
    """`kind` is "transport" (which only is there), "node" (several transports, with commas) or "churn" (see below)."""

    def __init__(
        self,
        kind: str,
        transports: str,
        seed: int,
        environment: dict[str, str] | None = None,
        launcher: Sequence[str] = (),
    ) -> None:
        command = [*launcher, sys.executable, "-m", "tests.kv_transfer.processes", kind, transports, str(seed)]
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
        self.send(**command)
        return self._read()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # until all its threads have stopped

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def send(self, **command: object) -> None:
        assert self.process.stdin is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)

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
    kind: str,
    transports: str,
    seed: int = 1,
    environment: dict[str, str] | None = None,
    launcher: Sequence[str] = (),
) -> Iterator[PeerProcess]:
    peer = PeerProcess(kind, transports, seed, environment, launcher)
    try:
        yield peer
    finally:
        peer.close()


def in_another_namespace() -> list[str]:
    """A launcher of peers in a PID namespace of their own; skips where there can be none."""
    launcher = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    try:
        allowed = subprocess.run([*launcher, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("PID namespaces can't be made here")
    return launcher


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


def _serve_node(names: str, seed: int) -> None:
    from tests.kv_transfer.nodes import open_party

    party = open_party(f"p{seed}", make_transports(names.split(",")), incarnation=os.urandom(4).hex())
    _say({"address": party.node.address, "blocks": [party.block(block).hex() for block in range(party.where.blocks)]})
    for line in sys.stdin:
        command = json.loads(line)
        match command.pop("do"):
            case "offer":
                _say(party.offer(**command).hex())
            case "stream":
                _say(party.node.stream(**command).hex())
            case "publish":
                _say(party.node.publish(**command))
            case "take_ended":
                _say(party.node.take_ended())
            case "reuse":
                party.node.cancel(command["transfer_id"])
                party.node.take_ended()
                for block in command["blocks"]:
                    party.overwrite(block)
                _say(None)
            case "crash":
                raise RuntimeError("the engine has crashed, and nobody closed the node")
    party.node.close()


CHURN_LAYOUT = layout(segment_bytes=128 << 10, segments_per_block=2)


def _serve_churn(name: str, seed: int) -> None:
    """A node that overwrites blocks the moment their lease has ended, while it is read.

    Block i of the transfer "n" holds the number n + i, again and again.
    """
    from tests.kv_transfer.nodes import open_party

    party = open_party(f"p{seed}", make_transports([name]), lay=CHURN_LAYOUT, incarnation=os.urandom(4).hex())
    leased: dict[str, list[int]] = {}
    free = list(range(party.where.blocks))
    lock = threading.Lock()

    def reuse() -> None:
        while True:
            with lock:
                for transfer_id in party.node.take_ended():
                    for block in leased.pop(transfer_id):
                        party.overwrite(block)
                        free.append(block)
            time.sleep(0.0002)

    threading.Thread(target=reuse, daemon=True).start()
    _say(party.node.address)
    for line in sys.stdin:
        number, count, ttl_s = json.loads(line)["offer"]
        while len(free) < count:
            time.sleep(0.001)
        with lock:
            blocks, free[:count] = free[:count], []
            for i, block in enumerate(blocks):
                content = np.full(CHURN_LAYOUT.block_bytes // 8, number + i, np.uint64).tobytes()
                write_block(party.arena, party.layout, party.where, block, content)
            leased[str(number)] = blocks
            handle = party.offer(str(number), blocks, ttl_s=ttl_s)
        _say(handle.hex())


if __name__ == "__main__":
    {"transport": _serve_transport, "node": _serve_node, "churn": _serve_churn}[sys.argv[1]](
        sys.argv[2], int(sys.argv[3])
    )
