"""Limits how long OpenMP threads spin at a barrier. Programs import this module before torch.

The threads of torch's CPU kernels wait for one another at the end of each parallel region. libgomp lets them
spin, by default for some 10 ms. Where another process uses one of the cores, all threads spin while the last
one waits for its time slice, and training slows down by much more than its share of the cores. libgomp reads
the limit when torch is imported.
"""

import os

SPIN_COUNT = 1000  # turns of a loop, some 0.05 ms; see benchmarks/contention.py

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
