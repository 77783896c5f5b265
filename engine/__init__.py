"""What infer.py is made of: devices, networks, pixels."""

import os

# Before torch loads libgomp: between two layers its threads then wait for 0.1 ms in a loop, no longer for
# several. On an idle machine a page takes as long; with both of two cores wanted by another program too it
# takes 0.7 of the time. Anything that somebody has set stays.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
