"""What is particular to the decode role: KV room, the fetch, step-batched token output."""
