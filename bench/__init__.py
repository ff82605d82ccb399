"""Benchmarks of dl_norm: see `python -m bench.table --help`."""

import os

# The profiler, which counts allocations and launches, otherwise reports each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
