"""Engines by name. Importing this loads none of them."""

from __future__ import annotations

from engine.base import Engine, EngineOptions

KINDS = ("sim", "vllm")


def build_engine(kind: str, options: EngineOptions) -> Engine:
    """An unstarted engine. Raises ValueError for a kind, or an option of it, that does not exist."""
    match kind:
        case "sim":
            from engine.sim import SimEngine

            return SimEngine(options)
        case "vllm":
            from engine.vllm import VllmEngine

            return VllmEngine(options)
    raise ValueError(f"engine: there is no {kind!r}, only {', '.join(KINDS)}")
