"""``fsdpsft.train`` in which one rank fails at one step: python faulty_train.py FAULT RANK STEP key=value …"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from fsdpsft import train as trainer

FAULTS = {
    "raise": lambda: 1 / 0,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sleep": lambda: time.sleep(600),
    "launcher": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "hang up": lambda: os.kill(os.getppid(), signal.SIGHUP),
    "user signal": lambda: os.kill(os.getppid(), signal.SIGUSR1),
}


def main() -> int:
    fault, rank, at, *arguments = sys.argv[1:]
    honest = trainer.train_step

    def train_step(model: Any, optimizer: Any, step: Any, *args: Any) -> Any:
        if step.index + 1 == int(at) and model.mesh.rank == int(rank):
            FAULTS[fault]()
        return honest(model, optimizer, step, *args)

    trainer.train_step = train_step
    return trainer.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
