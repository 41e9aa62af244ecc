"""The seam to what computes: the protocol, vLLM and the simulated engine."""
