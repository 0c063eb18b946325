"""Many short runs in a row, each of which must end with exit code 0 and leave no thread behind.

    python -m benchmarks.exits [runs=500] [processes=1] [load=0]

Every run trains a tiny model for two steps with background saves. What takes long is to import the trainer, so that is
done once: each run is a fork of a process that has imported everything and started no thread. The run then ends as any
Python program does, by the interpreter's own finalisation, which is where a thread that is still alive aborts it.
``load`` busy loops compete for the cores, for such faults are races. Written to benchmarks/results/exits.json.
"""

from __future__ import annotations

import collections
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import fsdpsft.train
from fsdpsft.testing import free_port
from tests.e2e.killing import make_inputs

RESULT = Path(__file__).parent / "results" / "exits.json"
STEPS = 2


def be_one_process(settings: list[str], rank: int, processes: int, port: int, log: Path) -> int:
    """Be one process of one run; returns its exit code."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
        os.environ.update(LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return fsdpsft.train.main(settings)


def start_load(count: int) -> list[int]:
    """Fork ``count`` busy loops that end with this process; returns their process ids."""
    parent, started = os.getpid(), []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            while os.getppid() == parent:
                pass
            os._exit(0)
        started.append(child)
    return started


def main(options: dict[str, int]) -> int:
    """Do the runs one after another and write the result; 0 where every exit code was 0.

    A run's own processes return from here too, with their exit codes, so that they end like a program's main module:
    nothing here may clean up in a ``finally``.
    """
    codes: collections.Counter[int] = collections.Counter()
    words: list[str] = []
    processes, began = options["processes"], time.perf_counter()
    home = Path(tempfile.mkdtemp())
    shared = [*make_inputs(home), f"trainer.total_training_steps={STEPS}", "trainer.max_ckpt_to_keep=1"]
    load = start_load(options["load"])
    for number in range(options["runs"]):
        settings = [*shared, f"trainer.default_local_dir={home / 'run'}"]
        log, port, children = home / "log", free_port(), []
        for rank in range(processes):
            child = os.fork()
            if child == 0:
                return be_one_process(settings, rank, processes, port, log)
            children.append(child)
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        codes.update(ends)
        if any(ends):
            words.append(log.read_text().strip()[-300:])
            print(f"run {number}: exit codes {ends}", flush=True)
        shutil.rmtree(home / "run", ignore_errors=True)
        log.unlink(missing_ok=True)
    for child in load:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    shutil.rmtree(home)
    counted = {str(code): count for code, count in sorted(codes.items())}
    result = {**options, "exit_codes": counted, "last_words": words[:3], "seconds": round(time.perf_counter() - began)}
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps({**before, f"{processes} processes": result}, indent=1) + "\n")
    print(json.dumps(result, indent=1), flush=True)
    return 0 if set(codes) == {0} else 1


if __name__ == "__main__":
    given = {key: int(value) for key, value in (word.split("=") for word in sys.argv[1:])}
    sys.exit(main({"runs": 500, "processes": 1, "load": 0, **given}))
