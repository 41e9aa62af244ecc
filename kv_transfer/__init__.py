"""Moves KV blocks between workers: leases, handles, transports, the vLLM connector.

`api` has the values and errors, `node.KvNode` does the work, `registry.make_transports` makes what a node needs, and
`local` lets a worker drive a node in another process. Nothing is imported here: gRPC and transports are heavy.
"""
