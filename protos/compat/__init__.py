"""Protocols that others define, so that their clients work here: our own files, with their packages, names, numbers."""
