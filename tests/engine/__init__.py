"""Engines: the simulated one against a dumb model of itself, and both against the seam they share."""
