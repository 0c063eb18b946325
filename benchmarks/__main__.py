"""``make bench``: the comparisons that fit into a quarter of an hour on two idle cores."""

from __future__ import annotations

import subprocess
import sys

COMMANDS = (
    ["benchmarks.bench_prepare"],
    ["benchmarks.bench_step", "--rounds", "2", "--steps", "3"],
    ["benchmarks.bench_overhead"],
)

if __name__ == "__main__":
    sys.exit(max(subprocess.run([sys.executable, "-m", *command], check=False).returncode for command in COMMANDS))
