"""Runs a command and prints its wall-clock time and CPU time in seconds, and its peak memory in MiB, as JSON.

This is a small process of its own because on Linux the peak memory of a process includes that of the process that
forked it.
"""

import json
import resource
import subprocess
import sys
import time

start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - start
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
unit = 2**20 if sys.platform == "darwin" else 2**10
print(
    json.dumps({"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss / unit})
)
sys.exit(code)
