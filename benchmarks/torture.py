"""Fifty kills: runs of the trainer that die at random moments, and must end as if nobody had touched them.

    python -m benchmarks.torture [seed=0] [kills=50]

One process, and two under torchrun; SIGKILL to all of them at once, or to one worker that torchrun then brings back;
most of the time while a checkpoint is being written, else anywhere. Now and then the newest checkpoint is damaged
before the next start, which must pass it over. After each kill every checkpoint that is there must pass its checksums,
and the model at the root must be one of theirs. At the end, losses, gradient norms and weights are compared bit for bit
with those of a run that was left alone. Written to benchmarks/results/torture.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fsdpsft.checkpoint.folder import RunFolder, verify
from fsdpsft.errors import CheckpointError
from tests.e2e.killing import STEPS_PER_EPOCH, Moment, command, curve, differences, make_inputs, run_and_kill

RESULT = Path(__file__).parent / "results" / "torture.json"
STEPS_BETWEEN_KILLS = 3
LONGEST_DELAY_S = 0.12
"""About as long as a save of the tiny model takes on a busy machine, so that kills fall into all of its parts."""


@dataclass
class Victim:
    """A run that is killed again and again, and what was seen of it."""

    folder: Path
    line: list[str]
    chance: random.Random
    starts: int = 0
    kills: dict[str, int] = field(default_factory=lambda: {"all, in a save": 0, "all, anywhere": 0, "one worker": 0})
    torn: int = 0
    damaged: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        """What the run said, all starts together."""
        return self.folder.with_suffix(".log")

    def reached(self) -> int:
        """The last step that any file speaks of."""
        names = [p.name for p in self.folder.glob("*global_step_*")]
        lines = curve(self.folder) if (self.folder / "metrics.jsonl").exists() else []
        return max([0, *(int(name.rpartition("_")[2]) for name in names), *(step for step, _, _ in lines)])

    def start(self, moments: list[Moment]) -> int:
        """Start, kill at the moments, look at what is left; returns the exit code."""
        ended = run_and_kill(self.line, self.folder, self.log, moments)
        self.starts += 1
        self.torn += ended.torn
        for moment in moments[: ended.kills]:
            kind = "one worker" if moment.victim == "worker" else f"all, {_PLACES[moment.during]}"
            self.kills[kind] += 1
        self.faults += what_is_wrong(self.folder)
        return ended.code

    def kill_all(self) -> None:
        """One start that ends in the death of all processes."""
        during = "save" if self.chance.random() < 0.75 else "step"
        step = self.reached() + self.chance.randint(1, STEPS_BETWEEN_KILLS)
        self.start([Moment(step, self.chance.uniform(0, LONGEST_DELAY_S), during)])

    def kill_workers(self, times: int) -> None:
        """One start in which a worker dies ``times`` times and comes back, and at last all die."""
        step, moments = self.reached(), []
        for number in range(times + 1):
            step += self.chance.randint(2, STEPS_BETWEEN_KILLS)
            delay = self.chance.uniform(0, LONGEST_DELAY_S)
            moments.append(Moment(step, delay, victim="worker" if number < times else "all"))
        self.start(moments)

    def damage(self) -> None:
        """Cut the newest checkpoint's state short, if there is another one to go on from."""
        checkpoints = RunFolder(self.folder).checkpoints()
        if len(checkpoints) >= 2:
            state = checkpoints[-1][1] / "trainer_state/rank-00000.safetensors"
            os.truncate(state, self.chance.randrange(state.stat().st_size))
            self.damaged += 1

    def report(self) -> dict[str, Any]:
        """The figures of this run."""
        text = self.log.read_text()
        return {
            "starts": self.starts,
            "kills": self.kills,
            "kills_that_left_a_half_written_checkpoint": self.torn,
            "resumed": len(re.findall("resuming at step", text)),
            "checkpoints_damaged_by_hand": self.damaged,
            "checkpoints_passed_over": len(re.findall("not resuming from", text)),
            "faults": self.faults,
        }


_PLACES = {"save": "in a save", "step": "anywhere"}


def what_is_wrong(folder: Path) -> list[str]:
    """Checkpoints under their final name that are not whole, and a root that is no checkpoint's model."""
    faults, models = [], set()
    for step, path in RunFolder(folder).checkpoints():
        try:
            verify(path)
        except CheckpointError as error:
            faults.append(f"step {step}: {error}")
        models.add(_digest(path / "model.safetensors"))
    root = folder / "model.safetensors"
    if root.exists() and _digest(root) not in models:
        faults.append("the root is no checkpoint's model")
    return faults


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def torture(home: Path, processes: int, kills: int, chance: random.Random) -> dict[str, Any]:
    """Kill a run of so many processes so many times, let it end, and compare it with one left alone."""
    epochs = kills * STEPS_BETWEEN_KILLS // STEPS_PER_EPOCH + 4
    shared = [*make_inputs(home), f"trainer.total_epochs={epochs}", "trainer.max_ckpt_to_keep=3"]
    folder, alone = home / f"killed-{processes}", home / f"alone-{processes}"
    line = command(processes, [*shared, f"trainer.default_local_dir={folder}"], max_restarts=20)
    victim = Victim(folder, line, chance)
    began = time.perf_counter()
    while (done := sum(victim.kills.values())) < kills:
        workers = min(chance.choice((0, 0, 2)) if processes > 1 else 0, kills - done - 1)
        if workers > 0:
            victim.kill_workers(workers)
        else:
            victim.kill_all()
        if chance.random() < 0.15:
            victim.damage()
    code = victim.start([])
    seconds = time.perf_counter() - began
    line = command(processes, [*shared, f"trainer.default_local_dir={alone}", "trainer.save_freq=-1"])
    assert run_and_kill(line, alone, home / "alone.log").code == 0
    differ = differences(folder, alone)
    return {
        "processes": processes,
        "steps": epochs * STEPS_PER_EPOCH,
        **victim.report(),
        "exit_code": code,
        "equal": code == 0 and not differ,
        "differences": differ,
        "seconds": round(seconds),
    }


def main(arguments: list[str]) -> int:
    """Run it all and write the result; 0 if everything was equal and nothing was at fault."""
    options = {"seed": 0, "kills": 50} | {key: int(value) for key, value in (word.split("=") for word in arguments)}
    chance = random.Random(options["seed"])
    runs = []
    for processes, share in ((1, 0.4), (2, 0.6)):
        with tempfile.TemporaryDirectory() as home:
            runs.append(torture(Path(home), processes, round(options["kills"] * share), chance))
        print(json.dumps(runs[-1], indent=1), flush=True)
    good = all(run["equal"] and not run["faults"] for run in runs)
    result = {**options, "torch": torch.__version__, "cpus": os.cpu_count(), "runs": runs, "all_equal": good}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
