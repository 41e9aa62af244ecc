"""Benchmarks: `make bench-NAME` runs `benchmarks/NAME.py`, prints a table and writes `benchmarks/out/NAME.json`.

Everything that is compared runs side by side in one run, and what is claimed is the ratio: machines differ, and are
noisy.
"""
