"""Files that are read again when they change."""

from __future__ import annotations

from pathlib import Path

Signature = tuple[int, int, int] | None


def signature(path: Path) -> Signature:
    """Differs when the file was written or replaced; the link that Kubernetes swaps for a new version included."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
