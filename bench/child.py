"""Runs a command and prints what it took: seconds, those of its processors, and its memory at the highest in MiB.

A process of its own, and a small one: on Linux a process counts as having had the memory of the one that forked it.
"""

import json
import resource
import subprocess
import sys
import time

began = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - began
used = resource.getrusage(resource.RUSAGE_CHILDREN)
unit = 2**20 if sys.platform == "darwin" else 2**10
print(json.dumps({"seconds": seconds, "processor": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss / unit}))
sys.exit(code)
