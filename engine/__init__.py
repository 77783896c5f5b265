"""What infer.py is made of: devices, networks, pixels."""

import os

# Before torch loads libgomp: at the end of a layer its threads then wait for 0.04 ms in a loop, not for
# several (300000 is its own count). Alone, a page takes as long; where another program wants the cores
# too, less (two `python infer.py` side by side on 2 cores, fp32: 2000 takes 0.8 of the time of 5000; with
# all multiplications 5000 had taken 0.7 of libgomp's own). What somebody has set stays.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
