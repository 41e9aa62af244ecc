"""Synchronous and deterministic: events in, effects out. No I/O, no clock, no protobuf."""
