"""Benchmarks and the demo; run from the root of a checkout, for example ``python -m benchmarks.demo``."""
