"""Benchmarks: each prints what it measured, on which machine, against what."""
