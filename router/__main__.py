"""`python -m router CONFIG.json` runs one router; `-` reads the configuration from standard input.

People use `tandem up`, which builds the configuration. The first line on standard
output is {"port": ..., "metrics_port": ..., "http_port": ..., "worker_port": ...}, once the ports are open."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import msgspec
import uvloop

from router.access import AccessRefused
from router.config import from_json
from router.edges.fleet import EdgeFailed
from router.main import Bound, PortTaken, serve
from router.metering.journal import JournalError
from router.process import allow_connections, is_up

FAILED, BAD_CONFIG, PORT_TAKEN = 1, 2, 4


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
    allow_connections()
    try:
        uvloop.run(serve(config, _say_where))
    except (AccessRefused, JournalError) as error:
        print(f"configuration: {error}", file=sys.stderr)
        return BAD_CONFIG
    except PortTaken as error:
        print(error, file=sys.stderr)
        return PORT_TAKEN
    except EdgeFailed as error:
        print(error, file=sys.stderr)
        return FAILED
    return 0


def _say_where(bound: Bound) -> None:
    is_up()
    ports = {
        "port": bound.port,
        "metrics_port": bound.metrics_port,
        "http_port": bound.http_port,
        "worker_port": bound.worker_port,
    }
    print(msgspec.json.encode(ports).decode(), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
