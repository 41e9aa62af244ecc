"""vLLM's own disaggregated pair, for comparison: two of its API servers with NixlConnector, and a proxy before them.

    .venv/bin/python -m benchmarks.nixl_pair        # starts it and sends it three requests

Its proxy is in the client and does what vLLM's example proxies do: it asks the first server for one token, hands the
`kv_transfer_params` of the answer to the second one, and passes that one's stream on. NixlConnector imports `nixl`, a
front for the package that Tandem uses directly, and not part of Tandem: it is installed into a folder of its own
(requirements/bench-nixl.txt) the first time, and only these two servers see it.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.cluster import MODEL, ROOT, DidNotStart

REQUIREMENTS = ROOT / "requirements" / "bench-nixl.txt"
#: Made once, ignored by git and by the checks.
OVERLAY = ROOT / "build" / "nixl-overlay"
START_TIMEOUT_S = 120.0
#: A pair that failed is started again.
STARTS = 2
REQUEST_TIMEOUT_S = 60.0
#: The first hand-off wires the pair up, which takes it half a minute, and longer than NixlConnector itself waits for
#: the other side's answer (5 s, which can't be changed) if the cores are busy: it then fails the request, and begins
#: anew with the next.
_WIRE_UP_REQUESTS = 4


class CannotInstall(Exception):
    pass


class PairFailed(Exception):
    """It answered with an error."""


@dataclass(frozen=True, slots=True)
class NixlPair:
    prefill_port: int
    decode_port: int
    servers: tuple[subprocess.Popen[bytes], ...]

    async def stream(self, client: httpx.AsyncClient, prompt: Sequence[int], max_tokens: int) -> AsyncIterator[int]:
        """The answer as it comes: how many tokens are in each piece."""
        body = {"model": "m", "prompt": list(prompt), "temperature": 0, "ignore_eos": True}
        none = {"remote_engine_id": None, "remote_block_ids": None, "remote_host": None, "remote_port": None}
        asked = {"do_remote_decode": True, "do_remote_prefill": False, **none}
        first = await client.post(
            f"http://127.0.0.1:{self.prefill_port}/v1/completions",
            json=body | {"max_tokens": 1, "kv_transfer_params": asked},
        )
        first.raise_for_status()
        if not (told := first.json().get("kv_transfer_params")):
            raise PairFailed("the prefill server offered nothing")
        wanted = body | {"max_tokens": max_tokens, "stream": True, "kv_transfer_params": told}
        wanted["return_token_ids"] = True
        url = f"http://127.0.0.1:{self.decode_port}/v1/completions"
        async with client.stream("POST", url, json=wanted) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    said = json.loads(line[6:])
                    if "choices" not in said:
                        raise PairFailed(line[6:])
                    for choice in said["choices"]:
                        yield len(choice.get("token_ids") or ())


def install() -> Path:
    """The folder with `nixl` in it. Raises CannotInstall."""
    if not (OVERLAY / "nixl").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(OVERLAY)]
        done = subprocess.run([*command, "-r", str(REQUIREMENTS)], capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise CannotInstall((done.stderr.strip().splitlines() or ["pip failed"])[-1])
    return OVERLAY


@contextmanager
def nixl_pair(model: Path, logs: Path, kv_cache_bytes: int, max_model_len: int) -> Iterator[NixlPair]:
    """Returns at once; `wait_ready` waits. Raises CannotInstall."""
    overlay = install()
    logs.mkdir(parents=True, exist_ok=True)
    ports = free_ports(4)
    servers = []
    with ExitStack() as stack:
        for name, port, side in (("prefill", ports[0], ports[2]), ("decode", ports[1], ports[3])):
            log = stack.enter_context((logs / f"nixl-{name}.log").open("wb"))
            process = subprocess.Popen(
                _command(model, port, kv_cache_bytes, max_model_len),
                env=_environment(overlay, side),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            stack.callback(_end, process)
            servers.append(process)
        yield NixlPair(ports[0], ports[1], tuple(servers))


def wait_ready(pair: NixlPair, give_up: float) -> None:
    """At the latest until `give_up`, of the monotonic clock."""
    give_up = min(give_up, time.monotonic() + START_TIMEOUT_S)
    for port in (pair.prefill_port, pair.decode_port):
        while True:
            with suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            ended = any(server.poll() is not None for server in pair.servers)
            if ended or time.monotonic() > give_up:
                raise DidNotStart("a server of the NixlConnector pair did not start; see its log")
            time.sleep(0.5)


async def wire_up(pair: NixlPair) -> None:
    """Until a hand-off has come through. Raises what the last of a few came to."""
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as client:
        for left in reversed(range(_WIRE_UP_REQUESTS)):
            try:
                tokens = sum([count async for count in pair.stream(client, range(16, 528), 8)])
                if tokens == 8:
                    return
                raise PairFailed(f"{tokens} tokens of 8")
            except (PairFailed, httpx.HTTPError) as error:
                if not left:
                    raise
                print(f"wiring up: {error!r}", flush=True)


def _command(model: Path, port: int, kv_cache_bytes: int, max_model_len: int) -> list[str]:
    transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    # fmt: off
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(model), "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", str(max_model_len), "--kv-cache-memory-bytes", str(kv_cache_bytes), "--block-size", "32",
        "--no-enable-prefix-caching", "--enforce-eager", "--max-num-seqs", "64", "--max-num-batched-tokens", "2048",
        "--kv-transfer-config", json.dumps(transfer),
    ]
    # fmt: on


def _environment(overlay: Path, side_channel: int) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(overlay), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {
        "PYTHONPATH": path,
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel),
        "UCX_TLS": "tcp,shm,self",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _end(process: subprocess.Popen[bytes]) -> None:
    """With the engine processes that it has started."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


async def _try(pair: NixlPair) -> None:
    await wire_up(pair)
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as client:
        for _ in range(3):
            began = time.monotonic()
            tokens = [count async for count in pair.stream(client, range(16, 528), 8)]
            print(f"{sum(tokens)} tokens in {time.monotonic() - began:.1f} s", flush=True)


def main() -> None:
    logs = Path(tempfile.mkdtemp(prefix="nixl-pair-"))
    print(f"logs in {logs}", flush=True)
    with nixl_pair(MODEL, logs, 128 << 20, 4096) as pair:
        wait_ready(pair, time.monotonic() + START_TIMEOUT_S)
        asyncio.run(_try(pair))


if __name__ == "__main__":
    main()
