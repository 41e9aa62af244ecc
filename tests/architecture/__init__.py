"""Checks of the code's own shape: which module may import which."""
