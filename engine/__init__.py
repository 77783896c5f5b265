"""What infer.py is made of: devices, networks, pixels."""

import os

# At the end of a layer libgomp's threads spin before they sleep: here 2000 turns (0.04 ms), by its own
# default 300,000 (several ms). Alone, a page takes as long; beside another busy program it is faster: of
# two `python infer.py` on 2 cores, fp32, 2000 turns take 0.8 of the time of 5000, and with direct
# convolutions 5000 took 0.7 of the default's. It must be set before torch loads libgomp; a value that
# is set already stays.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
