"""Benchmarks and the demo; run from the root of a checkout: ``python -m benchmarks --help``, ``.demo``."""

import os

__all__ = ["PROCESSORS"]

#: Processors of this process. Asked for here, before torch is imported: where OMP_PROC_BIND is set, loading
#: OpenMP binds the first thread to one of them, and they could no longer be seen.
PROCESSORS = tuple(
    sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
)
