"""`python -m worker CONFIG.json` runs one worker; `-` reads the configuration from standard input.

The file is what `worker.config.to_json` writes. `tandem up` makes one for each of its workers."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from worker.config import from_json
from worker.main import end_hard, run
from worker.process import ExitCode


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m worker CONFIG.json | -", file=sys.stderr)
        return ExitCode.BAD_CONFIG
    try:
        text = sys.stdin.buffer.read() if argv[0] == "-" else Path(argv[0]).read_bytes()
        config = from_json(text)
    except (OSError, ValueError) as error:
        print(f"configuration: {error}", file=sys.stderr)
        return ExitCode.BAD_CONFIG
    code = run(config)
    # All is closed. What the interpreter would still tear down is an engine's libraries, and those take seconds.
    logging.shutdown()
    end_hard(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
