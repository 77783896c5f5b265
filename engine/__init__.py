"""What infer.py is made of: devices, networks, pixels."""

import os

# Before torch loads libgomp: at the end of a layer its threads then wait for 0.04 ms in a loop, not for
# several (300000 is its own count). Alone, a page takes as long; where another program wants the cores too,
# 0.8 of the time that it takes with 5000 (fp32, two `python infer.py` side by side on 2 cores), which had
# been 0.7 of that with libgomp's own. What somebody has set stays.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
