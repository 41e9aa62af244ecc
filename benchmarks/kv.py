"""How fast each transport moves KV between two processes, beside what it cannot beat, in one run.

One process owns the memory, this one reads it through `Transport.read`. Beside the transports stand a copy within one
process (numpy), a raw `process_vm_readv`, and plain sockets (`sendall`, `recv_into`) with no protocol at all. Lanes
take turns in random order, round by round, so that a busy moment of the machine hurts all of them alike; a ratio is
the median of the rounds' ratios. "1024 x 16 KiB" are blocks in random order on both sides.

Then nothing is read for five seconds, and the CPU time of processes that each hold one connected transport is counted.

    make bench-kv
    make bench-kv ARGS="--seconds 10"
    make bench-kv ARGS="--ucx"              # ucxx in place of NIXL: a process has room for one UCX
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import mmap
import multiprocessing
import os
import random
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Check, Row, at_least, at_most, environment, percentile, report
from kv_transfer.registry import make_transports
from kv_transfer.transport import ARENA, STAGING, Region, Segments, Transport

MiB = 1 << 20
MEMORY_BYTES = 64 * MiB
IDLE_S = 5.0
READ_TIMEOUT_S = 60.0
#: Of a case in one round; small ones are repeated until about this much has moved.
BYTES_PER_ROUND = 64 * MiB

Bytes = NDArray[np.uint8]
Offsets = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Case:
    """`count` reads of `size` bytes; the same in both processes, without being sent."""

    count: int
    size: int

    def __str__(self) -> str:
        scales = ((MiB, "MiB"), (1024, "KiB"), (1, "B"))
        unit = next(f"{self.size // scale} {name}" for scale, name in scales if self.size >= scale)
        return unit if self.count == 1 else f"{self.count} x {unit}"

    @property
    def nbytes(self) -> int:
        return self.count * self.size

    def offsets(self, seed: int) -> Offsets:
        """Where the blocks lie: anywhere in the memory, each at a place of its own."""
        if self.count == 1:
            return np.zeros(1, np.uint64)
        places = np.random.default_rng(seed).permutation(MEMORY_BYTES // self.size)[: self.count]
        return places.astype(np.uint64) * np.uint64(self.size)

    @property
    def segments(self) -> Segments:
        return Segments(ARENA, STAGING, self.offsets(1), self.offsets(2), np.full(self.count, self.size, np.uint64))


#: The last one is about what a lease word takes.
CASES = (Case(1, MiB), Case(1, 16 * MiB), Case(1, 64 * MiB), Case(1024, 16 * 1024), Case(1, 8))
LARGE = CASES[2]

_Read = Callable[[], None]
_process_vm_readv = ctypes.CDLL(None, use_errno=True).process_vm_readv
_process_vm_readv.restype = ctypes.c_ssize_t


def allocate(seed: int) -> Bytes:
    """Every page of it touched."""
    memory = np.frombuffer(mmap.mmap(-1, MEMORY_BYTES), np.uint8)
    memory[:] = np.random.default_rng(seed).integers(0, 256, MEMORY_BYTES, np.uint8)
    return memory


def regions(arena: Bytes, staging: Bytes) -> Mapping[str, Region]:
    return {
        name: Region(name, int(memory.ctypes.data), memory.nbytes)
        for name, memory in ((ARENA, arena), (STAGING, staging))
    }


# --------------------------------------------------------------------------------------------------------- the owner


@dataclass(frozen=True, slots=True)
class Owner:
    pid: int
    address: int
    #: Of the plain sockets.
    port: int
    exports: Mapping[str, bytes]


def own(pipe: Connection, names: Sequence[str], seed: int) -> None:
    """A process that holds memory and transports until the pipe closes."""
    arena, staging = allocate(seed), allocate(0)
    transports = make_transports(names)
    for transport in transports:
        transport.register(regions(arena, staging))
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve_plainly, args=(listener, arena), daemon=True).start()
    exports = {transport.name: transport.export() for transport in transports}
    pipe.send(Owner(os.getpid(), int(arena.ctypes.data), listener.getsockname()[1], exports))
    pipe.poll(None)
    for transport in transports:
        transport.close()


def serve_plainly(listener: socket.socket, arena: Bytes) -> None:
    """Sends what a case consists of each time it is asked for."""
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory = arena.data
    places = [case.offsets(1).tolist() for case in CASES]
    while asked := connection.recv(1):
        case = CASES[asked[0]]
        for offset in places[asked[0]]:
            connection.sendall(memory[offset : offset + case.size])


@contextmanager
def owner_process(names: Sequence[str], seed: int) -> Iterator[Owner]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=own, args=(theirs, names, seed), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        ours.close()
        process.join(5)
        process.kill()


# --------------------------------------------------------------------------------------------------------- the lanes


def memcpy(case: Case, arena: Bytes, staging: Bytes) -> _Read:
    pairs = [(int(a), int(b)) for a, b in zip(case.offsets(1), case.offsets(2), strict=True)]

    def read() -> None:
        for remote, local in pairs:
            staging[local : local + case.size] = arena[remote : remote + case.size]

    return read


def raw_cma(case: Case, owner: Owner, staging: Bytes) -> _Read:
    def vectors(address: int, offsets: Offsets) -> Offsets:
        return np.stack([offsets + np.uint64(address), np.full(case.count, case.size, np.uint64)], axis=1)

    theirs, ours = vectors(owner.address, case.offsets(1)), vectors(int(staging.ctypes.data), case.offsets(2))
    count = ctypes.c_ulong(case.count)
    arguments = (
        owner.pid,
        ctypes.c_void_p(ours.ctypes.data),
        count,
        ctypes.c_void_p(theirs.ctypes.data),
        count,
        ctypes.c_ulong(0),
    )

    def read(_keep: object = (ours, theirs)) -> None:
        copied = _process_vm_readv(*arguments)
        if copied != case.nbytes:
            raise OSError(ctypes.get_errno(), f"process_vm_readv copied {copied} of {case.nbytes} bytes")

    return read


def plain_sockets(case: Case, connection: socket.socket, staging: Bytes) -> _Read:
    memory = staging.data
    places = case.offsets(2).tolist()
    ask = struct.pack("B", CASES.index(case))

    def read() -> None:
        connection.sendall(ask)
        for offset in places:
            left = memory[offset : offset + case.size]
            while left:
                left = left[connection.recv_into(left) :]

    return read


def through(case: Case, transport: Transport) -> _Read:
    segments = case.segments
    return lambda: transport.read("owner", segments, READ_TIMEOUT_S)


# ------------------------------------------------------------------------------------------------------ measurements


@dataclass(slots=True)
class Round:
    """Seconds of each read, by lane, of one case."""

    took_s: dict[str, list[float]]

    def gigabytes_per_s(self, lane: str, case: Case) -> float:
        return case.nbytes / median(self.took_s[lane]) / 1e9


def run_round(case: Case, lanes: Mapping[str, _Read], order: random.Random) -> Round:
    repeats = max(1, min(16, BYTES_PER_ROUND // case.nbytes // 2))
    found: dict[str, list[float]] = defaultdict(list)
    for lane in order.sample(sorted(lanes), len(lanes)):
        read = lanes[lane]
        for _ in range(repeats):
            began = time.perf_counter()
            read()
            found[lane].append(time.perf_counter() - began)
    return Round(found)


def check_bytes(case: Case, lanes: Mapping[str, _Read], arena: Bytes, staging: Bytes) -> None:
    """A lane that is fast and wrong is not fast. Also the first read, which wires a transport up."""
    for lane, read in lanes.items():
        staging[:] = 0
        read()
        for remote, local in zip(case.offsets(1).tolist(), case.offsets(2).tolist(), strict=True):
            if not np.array_equal(staging[local : local + case.size], arena[remote : remote + case.size]):
                raise AssertionError(f"{lane} brought other bytes than there are ({case})")


def measure(names: Sequence[str], seconds: float) -> dict[Case, list[Round]]:
    arena, staging = allocate(1), allocate(0)
    transports = make_transports(names)
    for transport in transports:
        transport.register(regions(arena, staging))
    rounds: dict[Case, list[Round]] = defaultdict(list)
    with owner_process(names, seed=1) as owner, socket.create_connection(("127.0.0.1", owner.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for transport in transports:
            transport.connect("owner", "1", owner.exports[transport.name])
        lanes = {
            case: {
                "memcpy": memcpy(case, arena, staging),
                "raw CMA": raw_cma(case, owner, staging),
                "sockets": plain_sockets(case, connection, staging),
                **{transport.name: through(case, transport) for transport in transports},
            }
            for case in CASES
        }
        for case in CASES:
            check_bytes(case, lanes[case], arena, staging)
        order = random.Random(0)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for case in CASES:
                rounds[case].append(run_round(case, lanes[case], order))
        for transport in transports:
            transport.close()
    return rounds


def idle_shares(names: Sequence[str]) -> dict[str, float]:
    """CPU time over time, of an owner that was read from and of this process holding all its readers."""
    shares: dict[str, float] = {}
    held = []
    owners: dict[str, Owner] = {}
    memory = allocate(1), allocate(0)
    contexts = [(name, owner_process([name], seed=1)) for name in names]
    try:
        for name, context in contexts:
            owners[name] = owner = context.__enter__()
            (transport,) = make_transports([name])
            held.append(transport)
            transport.register(regions(*memory))
            transport.connect("owner", "1", owner.exports[name])
            transport.read("owner", CASES[1].segments, READ_TIMEOUT_S)
        time.sleep(0.5)
        began = time.monotonic()
        before = {name: cpu_s(owner.pid) for name, owner in owners.items()} | {"readers": time.process_time()}
        time.sleep(IDLE_S)
        passed = time.monotonic() - began
        shares = {name: (cpu_s(owner.pid) - before[name]) / passed for name, owner in owners.items()}
        shares["readers"] = (time.process_time() - before["readers"]) / passed
    finally:
        for transport in held:
            transport.close()
        for name, context in contexts:
            if name in owners:
                context.__exit__(None, None, None)
    return shares


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------------------------------ report


def ratio(case: Case, rounds: Sequence[Round], lane: str, base: str) -> float | None:
    if not rounds or lane not in rounds[0].took_s:
        return None
    return median(found.gigabytes_per_s(lane, case) / found.gigabytes_per_s(base, case) for found in rounds)


def as_row(case: Case, rounds: Sequence[Round], lane: str) -> Row:
    took_s = [second for found in rounds for second in found.took_s[lane]]
    p50_s = percentile(took_s, 0.5) or float("nan")
    return {
        "what": lane,
        "read": str(case),
        "gigabytes_per_s_p50": case.nbytes / p50_s / 1e9,
        "gigabytes_per_s_best": case.nbytes / min(took_s) / 1e9,
        "ms_p50": p50_s * 1000,
        "over_memcpy": ratio(case, rounds, lane, "memcpy"),
        "over_raw_cma": ratio(case, rounds, lane, "raw CMA"),
        "over_sockets": ratio(case, rounds, lane, "sockets"),
        "reads": len(took_s),
    }


def checks(rounds: Mapping[Case, Sequence[Round]], idle: Mapping[str, float]) -> list[Check]:
    large = rounds[LARGE]
    nixl = [] if "ucx" in idle else [at_least("nixl over raw CMA, 64 MiB", ratio(LARGE, large, "nixl", "raw CMA"), 0.9)]
    return [
        *nixl,
        at_least("shm over raw CMA, 64 MiB", ratio(LARGE, large, "shm", "raw CMA"), 0.9),
        at_least("tcp over plain sockets, 64 MiB", ratio(LARGE, large, "tcp", "sockets"), 0.9),
        *(at_most(f"idle CPU of {name}, share of a core", idle[name], 0.02) for name in sorted(idle)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="to measure reads for")
    parser.add_argument("--ucx", action="store_true", help="measure ucxx instead of NIXL; needs requirements/ucx.txt")
    arguments = parser.parse_args()
    env = environment()
    over_ucx = ["ucx"] if arguments.ucx else ["nixl"] if importlib.util.find_spec("nixl_cu12") else []
    names = [*over_ucx, "shm", "tcp"]
    rounds = measure(names, arguments.seconds)
    idle = idle_shares(names)
    rows = [as_row(case, rounds[case], lane) for case in CASES for lane in sorted(rounds[case][0].took_s)]
    report("kv-ucx" if arguments.ucx else "kv", rows, checks(rounds, idle), env)


if __name__ == "__main__":
    main()
