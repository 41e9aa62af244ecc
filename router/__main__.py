"""`python -m router CONFIG.json` runs one router; `-` reads the configuration from standard input.

People use `tandem up`, which builds the configuration. The first line on standard
output is {"port": ..., "metrics_port": ..., "http_port": ..., "worker_port": ...}, once the ports are open."""

from __future__ import annotations

import gc
import logging
import resource
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
import uvloop

from router.access import AccessRefused
from router.config import from_json
from router.main import Bound, PortTaken, serve
from router.metering.journal import JournalError

BAD_CONFIG, PORT_TAKEN = 2, 4


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m router CONFIG.json | -", file=sys.stderr)
        return BAD_CONFIG
    try:
        config = from_json(sys.stdin.buffer.read() if argv[0] == "-" else Path(argv[0]).read_bytes())
    except (OSError, ValueError) as error:
        print(f"configuration: {error}", file=sys.stderr)
        return BAD_CONFIG
    logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _allow_connections()
    try:
        uvloop.run(serve(config, _say_where))
    except (AccessRefused, JournalError) as error:
        print(f"configuration: {error}", file=sys.stderr)
        return BAD_CONFIG
    except PortTaken as error:
        print(error, file=sys.stderr)
        return PORT_TAKEN
    return 0


def _allow_connections() -> None:
    """As many open files as the system lets this process have: each connection is one, and the default is few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with suppress(ValueError, OSError):  # some systems name a limit that they don't grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _say_where(bound: Bound) -> None:
    # What lives now lives on. Collecting it again and again costs milliseconds in the tail of decisions.
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    ports = {
        "port": bound.port,
        "metrics_port": bound.metrics_port,
        "http_port": bound.http_port,
        "worker_port": bound.worker_port,
    }
    print(msgspec.json.encode(ports).decode(), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
