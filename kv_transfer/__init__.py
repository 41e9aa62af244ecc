"""Moves KV blocks between workers: leases, handles, transports, the vLLM connector."""
