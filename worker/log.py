"""One line per event on stderr: text for people, JSON for collectors."""

from __future__ import annotations

import json
import logging
import sys

from worker.config import LogFormat, LogSettings


class _JsonLines(logging.Formatter):
    def __init__(self, worker_id: str) -> None:
        super().__init__()
        self._worker_id = worker_id

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 6),
            "level": record.levelname,
            "worker": self._worker_id,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def start_logging(settings: LogSettings, worker_id: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if settings.format is LogFormat.JSON:
        handler.setFormatter(_JsonLines(worker_id))
    else:
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s {worker_id} %(name)s: %(message)s"))
    logging.basicConfig(level=settings.level, handlers=[handler])
