"""What is particular to the prefill role: admission, the hand-off, pinned leases."""
