"""Measurements that anyone can repeat: `pytest benchmarks --benchmark-only`, `python -m benchmarks.NAME`."""
