"""`python -m router.edges SOCKET BEGAN`: started by a router, which writes its configuration and what the files of
tenants and keys hold to standard input, as pickled values: it has checked them, and the files may be broken by now.
SOCKET is a file descriptor; BEGAN is when the router began, on the host's monotonic clock."""

from __future__ import annotations

import logging
import pickle
import socket
import sys

import uvloop

from router.access import AccessRefused, InForce
from router.config import RouterConfig
from router.edges.process import serve
from router.front import PortTaken
from router.process import allow_connections

LOST_CORE, FAILED = 1, 2


def main(argv: list[str]) -> int:
    to_core, began = socket.socket(fileno=int(argv[0])), float(argv[1])
    config: RouterConfig
    in_force: InForce
    config, in_force = pickle.load(sys.stdin.buffer)
    logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s edge %(name)s: %(message)s")
    allow_connections()
    try:
        return 0 if uvloop.run(serve(config, in_force, to_core, began)) else LOST_CORE
    except (AccessRefused, PortTaken) as error:
        print(error, file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
