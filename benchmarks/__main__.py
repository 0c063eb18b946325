"""``make bench``: the comparisons that fit into a quarter of an hour on two idle cores.

Most of that time goes into starting processes, one for each contender and round; hence steps of 8 rows here.
"""

from __future__ import annotations

import subprocess
import sys

COMMANDS = (
    ["benchmarks.bench_prepare"],
    ["benchmarks.bench_step", "--batch", "8", "--rounds", "2", "--steps", "3"],
    ["benchmarks.bench_overhead"],
)

if __name__ == "__main__":
    sys.exit(max(subprocess.run([sys.executable, "-m", *command], check=False).returncode for command in COMMANDS))
